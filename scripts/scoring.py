"""How likely does a model find a text? Log-probabilities of continuations, many at once, nothing read twice.

    engine = Generator(model, "float32")
    requests = encode_pairs(tokenizer, [("2 + 2 =", " 4"), ("2 + 2 =", " five")])
    log_likelihoods(engine, requests)         # [(-1.3, True), (-9.8, False)]

A request is (context ids, continuation ids); its score the sum of log p(token | all before it) over the
continuation, and whether greedy decoding would have written it. The rules are those of
lm-evaluation-harness 0.4, so that numbers can be compared item by item.

How it is fast:
- A context that several requests have in common, as the choices of a question do, is read once: their
  continuations hang on it like the branches of a tree, and a mask keeps branches from seeing each other
  (tree attention: SpecInfer, Miao et al. 2023, https://arxiv.org/abs/2305.09781, section 4.2).
- What the contexts of many trees begin with, such as the examples before a question, is read once too; its
  keys and values are shared.
- Matrices see the tokens of many trees in a row, without padding; logits exist where they are asked for.

Dimensions: L layers, H query heads, K key/value heads, hd head size, V vocabulary, P tokens of the shared
beginning, T tokens of a tree behind it, N tokens read together.
"""

import math
from collections.abc import Callable

import torch

from model.generation import Generator
from model.model_minimind import attention

Request = tuple[list[int], list[int]]  # ids of the context, ids of the continuation
GROUP_COST = 256  # tokens that could be read in the time which a group of its own takes, about
MAX_NESTING = 64  # beginnings within beginnings that are looked at
BRANCHES = 512  # tokens of a tree's branches; attention costs the square of a tree's size


# ------------------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------------------


def encode_pairs(tokenizer, pairs: list[tuple[str, str]], add_bos: bool = False) -> list[Request]:
    """Token ids of (context, continuation) texts, cut as lm-evaluation-harness cuts them: spaces at the end
    of a context go to the continuation, both are encoded as one text, and the continuation is what comes
    after as many tokens as the context alone has. An empty context becomes the bos token. add_bos: every
    context begins with that token.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + text) for context, text in pairs]
    texts = list(dict.fromkeys([*(c for c, _ in moved), *(c + t for c, t in moved)]))
    ids = dict(zip(texts, tokenizer(texts, verbose=False).input_ids)) if texts else {}
    bos, requests = [tokenizer.bos_token_id], []
    for context, continuation in moved:
        start, whole = ids[context], ids[context + continuation]
        rest = whole[len(start) :]
        if not start and rest[:1] == bos:  # the text begins with it already
            start, rest = rest[:1], rest[1:]
        start = bos + start if not start or (add_bos and start[:1] != bos) else start
        requests.append((start, rest))
    return requests


def shorten(request: Request, max_length: int) -> Request:
    """A request whose tokens, but for the last, which is not read, fit into max_length: its context loses
    tokens on the left. Raises ValueError when the continuation alone is longer, or either is empty."""
    context, continuation = request
    if not context or not continuation:
        raise ValueError(f"the {'continuation' if context else 'context'} of a request has no tokens")
    room = max_length + 1 - len(continuation)
    if room < 1:
        raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into {max_length}")
    return context[-room:], continuation


# ------------------------------------------------------------------------------------------------------------
# Trees and their common beginnings
# ------------------------------------------------------------------------------------------------------------


def plant(requests: list[Request]) -> list[tuple[tuple, list[tuple[int, list[int]]]]]:
    """Requests by context, sorted: [(context, [(number of the request, continuation), ...]), ...]. A tree
    whose branches would get longer than BRANCHES and its context is followed by another one."""
    by_context: dict[tuple, list] = {}
    for number, (context, continuation) in enumerate(requests):
        by_context.setdefault(tuple(context), []).append((number, continuation))
    trees = []
    for context, branches in sorted(by_context.items()):
        tokens = limit = max(BRANCHES, len(context))
        for branch in branches:
            tokens += len(branch[1])
            if tokens > limit:
                trees.append((context, []))
                tokens = len(branch[1])
            trees[-1][1].append(branch)
    return trees


def in_common(a: tuple, b: tuple) -> int:
    """How many tokens two contexts begin with alike. The last one is left to each: what comes after it is
    asked for."""
    end = min(len(a), len(b)) - 1
    return next((i for i in range(end) if a[i] != b[i]), end)


def shared_beginnings(contexts: list[tuple]) -> list[tuple[int, int, int]]:
    """Sorted contexts -> [(P, first, last), ...]: the contexts first ... last - 1 share their first P tokens,
    and reading these once saves more than a group costs. Contexts in no group share nothing worth it.

    A range is one group, or it is cut where neighbours have least in common, whichever saves more.
    """
    common = [in_common(a, b) for a, b in zip(contexts, contexts[1:])]

    def best(first: int, last: int, nesting: int = 0) -> tuple[int, list]:
        if last - first < 2:
            return 0, []
        least = min(common[first : last - 1])
        saved, groups = 0, []
        if nesting < MAX_NESTING:
            cuts = [i + 1 for i in range(first, last - 1) if common[i] == least]
            parts = [best(*part, nesting + 1) for part in zip([first, *cuts], [*cuts, last])]
            saved, groups = sum(s for s, _ in parts), [group for _, found in parts for group in found]
        as_one = (last - first - 1) * least - GROUP_COST
        return (as_one, [(least, first, last)]) if as_one > saved else (saved, groups)

    return best(0, len(contexts))[1]


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def log_likelihoods(
    engine: Generator,
    requests: list[Request],
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """(sum of log-probabilities in nats, is greedy) of every request, in their order.

    max_length: positions that a request may take, default those of the model; longer contexts are cut on the
    left. progress: is called with (requests done, all). Log-probabilities are taken in float32 and summed in
    float64. Raises ValueError for requests that cannot be scored (see `shorten`) and foreign token ids.
    """
    limit = engine.config.max_position_embeddings
    requests = [shorten(request, min(max_length or limit, limit)) for request in requests]
    V = engine.config.vocab_size
    if any(min(ids) < 0 or max(ids) >= V for request in requests for ids in request):
        raise ValueError(f"a request holds a token id outside 0..{V - 1}: was another tokenizer used?")
    trees = plant(requests)
    groups = shared_beginnings([context for context, _ in trees])
    alone = set(range(len(trees))).difference(*(range(first, last) for _, first, last in groups))
    scores: list = [None] * len(requests)
    done = 0
    for P, members in [(P, range(a, b)) for P, a, b in groups] + [(0, sorted(alone))]:
        chunks = in_chunks([trees[i] for i in members], P, engine.prefill_tokens)
        longest = max((size(tree, P) for chunk in chunks for tree in chunk), default=0)
        shape = (len(engine.layers), engine.K, P + longest, engine.hd)
        keys, values = (torch.empty(shape, dtype=engine.dtype, device=engine.device) for _ in range(2))
        if P:
            engine.extend(list(trees[members[0]][0][:P]), keys, values, 0)
        for chunk in chunks:
            for number, score in score_trees(engine, chunk, keys, values, P):
                scores[number] = score
                done += 1
            if progress:
                progress(done, len(requests))
    return scores


def size(tree, P: int) -> int:
    """Tokens of a tree behind its first P ones. The last token of a continuation is not read."""
    context, branches = tree
    return len(context) - P + sum(len(continuation) - 1 for _, continuation in branches)


def in_chunks(trees: list, P: int, budget: int) -> list[list]:
    """Trees that are read together: as many as have `budget` tokens, at least one."""
    chunks, tokens = [], budget + 1
    for tree in trees:
        if tokens + size(tree, P) > budget:
            chunks.append([])
            tokens = 0
        chunks[-1].append(tree)
        tokens += size(tree, P)
    return chunks


def score_trees(engine: Generator, trees: list, keys, values, P: int) -> list[tuple[int, tuple]]:
    """Trees whose contexts share their first P tokens, with keys and values of these in the first slots of
    keys, values (L, K, S, hd) -> (number of the request, its score) of every branch."""
    ids, positions, parts, where, targets, owners = [], [], [], [], [], []
    for context, branches in trees:
        start, stem = len(ids), len(context) - P
        ids += context[P:]
        positions += range(P, P + stem)
        cuts = []  # of branches, counted from the tree's first token
        for number, continuation in branches:
            branch = len(ids) - start
            ids += continuation[:-1]
            positions += range(P + stem, P + stem + len(continuation) - 1)
            cuts.append((branch, len(ids) - start))
            where += [start + stem - 1, *range(start + branch, len(ids))]
            targets += continuation
            owners.append((number, len(continuation)))
        parts.append((slice(start, len(ids)), tree_mask(P, stem, cuts, engine.device)))
    logits = read_trees(engine, ids, positions, parts, where, keys, values, P).float()
    targets = torch.tensor(targets, device=engine.device)
    log_probs = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(-1)
    lengths = [length for _, length in owners]
    sums = [part.sum().item() for part in log_probs.cpu().double().split(lengths)]
    greedy = [part.all().item() for part in (logits.argmax(-1) == targets).cpu().split(lengths)]
    return [(number, score) for (number, _), *score in zip(owners, sums, greedy)]


def tree_mask(P: int, stem: int, branches: list[tuple[int, int]], device):
    """(1, 1, T, P + T) bool, True = may look: every token sees the P shared ones, the tree's stem and its own
    branch, each up to itself. None = plain causal, for a tree of one branch without a shared beginning."""
    T = branches[-1][1]
    if P == 0 and sum(start < end for start, end in branches) < 2:
        return None
    mask = torch.ones(T, P + T, dtype=torch.bool, device=device).tril(P)
    for start, end in branches:
        mask[start:end, P + stem : P + start] = False
    return mask[None, None]


def read_trees(engine: Generator, ids, positions, parts, where, keys, values, P: int) -> torch.Tensor:
    """One forward pass over N tokens: matrices see all of them, attention one tree (a slice of the tokens and
    its mask) at a time -> logits (len(where), V) behind the tokens at `where`. A tree's keys and values
    follow the P shared ones in keys, values (L, K, S, hd), each in the place of the one before."""
    cos, sin = engine.angles(torch.tensor(positions), max(positions) + 1)
    x = engine.embedding[torch.tensor(ids, device=engine.device)]
    qk, v = engine.call(engine.read, engine.layers[:1], [x, cos, sin])
    for i in range(len(engine.layers)):
        out = torch.empty(len(ids), engine.K * engine.R * engine.hd, dtype=x.dtype, device=x.device)
        for part, mask in parts:
            end = P + part.stop - part.start
            keys[i, :, P:end] = qk[part, :, engine.R].transpose(0, 1)
            values[i, :, P:end] = v[part].transpose(0, 1)
            seen = (block[i, :, :end].transpose(0, 1)[None] for block in (keys, values))
            q = qk[part, :, : engine.R].flatten(1, 2)[None]
            out[part] = attention(q, *seen, mask)[0].flatten(1)
        if i + 1 < len(engine.layers):
            x, qk, v = engine.call(engine.between, engine.layers[i : i + 2], [out, x, cos, sin])
    rows = torch.tensor(where, device=engine.device)
    return engine.call(engine.end, [engine.layers[-1], engine.head], [out[rows], x[rows]])


# ------------------------------------------------------------------------------------------------------------
# Whole texts
# ------------------------------------------------------------------------------------------------------------


def text_windows(ids: list[int], bos: int, length: int) -> list[Request]:
    """A text's tokens as requests that together score each once: windows of `length` tokens that do not
    overlap, the first token of each after bos."""
    return [([bos], ids[start : start + length]) for start in range(0, len(ids), length)]


def bits_per_byte(model, tokenizer, text: str, length: int = 512, progress=None) -> dict:
    """How well a model predicts a text: bits per UTF-8 byte, which does not depend on the tokenizer.

    model: a MiniMindLM (computed in float32) or a Generator. The text is read in windows of `length` tokens
    that do not overlap, each after a bos token, so early tokens of a window are predicted from little; longer
    windows give lower numbers. -> {"bits_per_byte", "perplexity" (per token), "tokens", "bytes"}. Raises
    ValueError for an empty text.
    """
    engine = model if isinstance(model, Generator) else Generator(model, "float32")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ValueError("the text is empty")
    windows = text_windows(ids, tokenizer.bos_token_id, length)
    nats = -sum(score for score, _ in log_likelihoods(engine, windows, progress=progress))
    num_bytes = len(text.encode())
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity": math.exp(nats / len(ids)),
        "tokens": len(ids),
        "bytes": num_bytes,
    }
