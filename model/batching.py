"""Continuous batching: requests join a running batch at any time and leave it one by one, each with settings
of its own. What a server needs; `generation.py` answers a fixed list of prompts, a little faster.

    batch = Batch(Generator(model), max_rows=32)
    batch.add(Request(prompt_ids, Sampling(max_new_tokens=64, temperature=0.7, seed=1)))
    while batch.busy:
        for new in batch.step():
            print(new.token, new.finish_reason)

A step reads a piece of the prompt at the head of the queue, at most `prefill_tokens` tokens so that nobody
waits long for their next one, then adds a token to every running row (iteration-level scheduling: Orca, Yu et
al. 2022, OSDI, section 3.1). With the same seed a request gets the answer that `Generator.generate` gives, up
to rounding: a row's draws depend on its seed alone.

Keys and values of finished conversations are kept, the newest ones. A prompt that begins as one of them, as
the next turn of a chat does, is read from where the two part.

Dimensions: n rows in flight, L layers, K key/value heads, hd head size, S slots, T tokens, V vocabulary.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import torch

from model.generation import Generator, KeyValueCache, Sampling, TextStream, row_seeds, sample, uniforms
from model.precision import prefers_bfloat16

DRAWS = 64  # random numbers made at once for a row
SHORTEST_PREFIX = 16  # tokens: finding less is not worth a copy


@dataclass(eq=False)
class Request:
    """What is asked for.

    Args:
        prompt: token ids.
        sampling: as for `Generator.generate`; with `num_return_sequences` as many rows are begun.
        tokenizer: for text and stop strings; None = tokens only.
        frequency_penalty, presence_penalty: subtracted from the logits of tokens the answer holds: the first
            as often as they are in it, the second once (as OpenAI's interface has them).
        logit_bias: token id -> what is added to its logit.
        top_logprobs: report so many of the likeliest tokens with every token.
        guide: None, or a function that makes an object which decides for one row which tokens may come next:
            `allowed()` -> (V,) bool or None for all, and `take(token)`.
        score_prompt: also fill `prompt_scores`: for every token of the prompt but the first its log-prob at
            temperature 1, and the likeliest tokens as with `top_logprobs`.
        reuse: begin with keys and values of an earlier prompt that began alike. They were computed in another
            shape, so the last bits differ: switch it off to repeat an answer exactly.
    """

    prompt: list[int]
    sampling: Sampling
    tokenizer: object = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    guide: object = None
    score_prompt: bool = False
    reuse: bool = True
    cancelled: bool = False  # set it at any time, from any thread: its rows leave with the next step

    def __post_init__(self):
        self.reused_tokens = 0  # of the prompt, in the end
        self.prompt_scores: list[tuple[float, list | None]] = []


@dataclass
class News:
    """One more token of a row."""

    request: Request
    sample: int  # number of the answer, 0 ... num_return_sequences - 1
    token: int
    logprob: float  # of the distribution it was drawn from
    piece: str  # the text that is certain with it
    finish_reason: str | None  # "eos", "stop", "length"
    top: list[tuple[int, float]] | None = None  # (token, log-prob at temperature 1), likeliest first


class Row:
    """One answer in the making."""

    def __init__(self, request: Request, number: int, seed: int, engine: Generator):
        s, self.request, self.number, self.ids = request.sampling, request, number, []
        V, device = engine.config.vocab_size, engine.device
        self.ends = engine.ends(s)
        self.text = TextStream(request.tokenizer, s.stop) if request.tokenizer else None
        self.seed = torch.tensor([seed], device=device)
        self.guide = request.guide() if request.guide else None
        self.seen = self.counts = self.bias = None
        if s.repetition_penalty != 1:
            self.seen = torch.zeros(V, dtype=torch.bool, device=device)
            self.seen[request.prompt if s.penalize_prompt else []] = True
        if request.frequency_penalty or request.presence_penalty:
            self.counts = torch.zeros(V, device=device)
        if request.logit_bias:
            self.bias = torch.zeros(V, device=device)
            self.bias[list(request.logit_bias)] = torch.tensor(list(request.logit_bias.values())).to(device)
        self.alike = (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty)  # drawn in one go

    def uniform(self) -> float:
        step = len(self.ids)
        if step % DRAWS == 0:
            self.numbers = uniforms(self.seed, step, DRAWS)[:, 0].tolist()
        return self.numbers[step % DRAWS]

    @property
    def plain(self) -> bool:
        return self.counts is None and self.bias is None and self.guide is None

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (V,) float32 as this request wants them, before the settings of `Sampling`."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.counts is not None:
            request = self.request
            logits = logits - self.counts * request.frequency_penalty
            logits = logits - (self.counts > 0) * request.presence_penalty
        allowed = self.guide.allowed() if self.guide else None
        return logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), -math.inf)

    def take(self, token: int):
        self.ids.append(token)
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.guide:
            self.guide.take(token)


class RunningCache(KeyValueCache):
    """Keys and values of rows that come and go.

    All rows write the same slot, as in `KeyValueCache`, so a row that joins is laid against the right end,
    and where it is longer than what is there, the others move to the right. Whenever the block is laid out
    anew, slots at the left that no row uses any longer are cut off.
    """

    def __init__(self, L, K, hd, dtype, device):
        super().__init__(L, K, hd, pad=[], length=0, limit=1 << 40, dtype=dtype, device=device)
        self.padded = True
        self.choose_kernel()

    def choose_kernel(self):
        """As `KeyValueCache` chooses, for as many rows as there are now."""
        half = self.keys.dtype != torch.float32
        on_gpu = self.keys.device.type != "cpu"
        self.fused = half and (self.rows < 4 or on_gpu or not prefers_bfloat16(self.keys.device))
        self.dense = half and not self.fused

    def lay_out(self, rows: int, longest: int = 0):
        """A new block with room for `rows` rows, as long as the longest row or as `longest`, and at least one
        more slot. What there is keeps its right end."""
        used = self.rows * self.K
        length = max([longest, *(self.length - pad for pad in self.pad)])
        shift = length - self.length
        start = max(-shift, 0)  # of what is kept, in the old block
        L, _, _, hd = self.keys.shape
        shape = (L, rows * self.K, self.room_for(length + 1), hd)
        new = []
        for block in (self.keys, self.values):
            fresh = torch.zeros(shape, dtype=block.dtype, device=block.device)
            fresh[:, :used, max(shift, 0) : length] = block[:, :used, start : self.length]
            new.append(fresh)
        self.keys, self.values = new
        self.length, self.pad = length, [pad + shift for pad in self.pad]
        self.bias = torch.full(
            (shape[1], 1, shape[2]), -math.inf, dtype=self.keys.dtype, device=new[0].device
        )
        for row, pad in enumerate(self.pad):
            self.bias[row * self.K : (row + 1) * self.K, :, pad:length] = 0

    def room_for(self, slots: int) -> int:
        """Slots to have when so many are needed. A dense block is multiplied to its end: it stays tight."""
        return -(-slots // 32) * 32 if self.dense else -(-(slots + slots // 4 + 32) // 64) * 64

    def add(self, keys: torch.Tensor, values: torch.Tensor):
        """One more row, whose tokens have keys and values (L, K, T, hd)."""
        T, row, K = keys.shape[2], self.rows, self.K
        if row == 0:
            self.length = 0
        capacity = self.keys.shape[1] // K
        if T > self.length or row == capacity:
            self.lay_out(max(capacity, 1) if row < capacity else 2 * row or 4, T)
        here, slots = slice(row * K, (row + 1) * K), slice(self.length - T, self.length)
        self.keys[:, here] = 0
        self.values[:, here] = 0
        self.keys[:, here, slots] = keys
        self.values[:, here, slots] = values
        self.bias[here] = -math.inf
        self.bias[here, :, slots] = 0
        self.pad.append(self.length - T)
        self.rows += 1

    def next_slot(self) -> int:
        self.choose_kernel()
        if self.length == self.keys.shape[2]:
            self.lay_out(self.keys.shape[1] // self.K)
        slot = self.length
        self.bias[: self.rows * self.K, :, slot] = 0
        self.length += 1
        return slot

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of a row's keys and values, (L, K, T, hd)."""
        here, slots = slice(row * self.K, (row + 1) * self.K), slice(self.pad[row], self.length)
        return self.keys[:, here, slots].clone(), self.values[:, here, slots].clone()


@dataclass(eq=False)
class Known:
    """Tokens whose keys and values (L, K, T, hd) were computed."""

    ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


class PrefixStore:
    """Sequences with their keys and values, the most recently used last, up to so many bytes."""

    def __init__(self, limit: int):
        self.limit, self.entries = limit, []

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def find(self, prompt: list[int]) -> tuple[int, Known | None]:
        """(tokens in common, the entry that begins most like the prompt), or (0, None). At least one token of
        the prompt is left to be read, for the logits behind it."""
        wanted, most, best = torch.tensor(prompt), SHORTEST_PREFIX - 1, None
        for entry in self.entries:
            n = min(len(entry.ids), len(prompt) - 1)
            common = int((entry.ids[:n] == wanted[:n]).cumprod(0).sum())
            if common > most:
                most, best = common, entry
        if best is None:
            return 0, None
        self.entries.remove(best)
        self.entries.append(best)
        return most, best

    def put(self, new: Known):
        if len(new.ids) < SHORTEST_PREFIX or new.bytes > self.limit:
            return
        self.entries = [e for e in self.entries if not begins_with(new.ids, e.ids)] + [new]
        while self.bytes > self.limit:
            self.entries.pop(0)


def begins_with(ids: torch.Tensor, start: torch.Tensor) -> bool:
    return len(start) <= len(ids) and torch.equal(ids[: len(start)], start)


class Reading:
    """A prompt that is being read."""

    def __init__(self, request: Request, keys, values, done: int):
        self.request, self.keys, self.values, self.done = request, keys, values, done


class Batch:
    """The running rows of one model and the requests that wait.

    Args:
        engine: the weights.
        max_rows: rows in flight at once.
        memory: bytes for keys and values of running rows. Rows share one block as long as its longest row, so
            a request waits until the block would fit with it at its full length.
        prefix_memory: bytes for those of finished ones.
        prefill_tokens: tokens of prompts read between two tokens of the running rows.
    """

    def __init__(
        self, engine: Generator, max_rows=32, memory=1 << 30, prefix_memory=1 << 28, prefill_tokens=256
    ):
        self.engine, self.max_rows, self.prefill_tokens = engine, max_rows, prefill_tokens
        self.L = len(engine.layers)
        self.limit = engine.config.max_position_embeddings
        per_slot = 2 * self.L * engine.K * engine.hd * engine.cache_dtype.itemsize
        self.slots = memory // per_slot
        self.prefixes = PrefixStore(prefix_memory)
        self.reset()

    def reset(self):
        """Forget all requests."""
        engine = self.engine
        self.waiting: deque[Request] = deque()
        self.reading: Reading | None = None
        self.rows: list[Row] = []
        self.cache = RunningCache(self.L, engine.K, engine.hd, engine.cache_dtype, engine.device)
        self.logits: torch.Tensor | None = None  # (n, V) float32: of every row's next token

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.reading or self.waiting)

    # ---- coming in -----------------------------------------------------------------------------------------

    def check(self, request: Request):
        """Raises ValueError when it could never be answered."""
        self.engine.check([request.prompt])
        n, longest = request.sampling.num_return_sequences, self.longest(request)
        if n > self.max_rows:
            raise ValueError(f"{n} answers at once are more than the {self.max_rows} that run here")
        if n * longest > self.slots:
            raise ValueError(
                f"{n} x {longest} tokens need more memory than there is for keys and values, "
                f"{self.slots} tokens: ask for fewer"
            )

    def add(self, request: Request):
        """Queue a request. Raises as `check`."""
        self.check(request)
        self.waiting.append(request)

    def longest(self, request: Request) -> int:
        return min(len(request.prompt) + request.sampling.max_new_tokens, self.limit)

    def fits(self, request: Request) -> bool:
        running = {row.request for row in self.rows}
        rows = len(self.rows) + request.sampling.num_return_sequences
        longest = max(map(self.longest, (request, *running)))
        return rows <= self.max_rows and rows * longest <= self.slots

    def read(self):
        """Some tokens of waiting prompts; a prompt that is done becomes rows."""
        budget = self.prefill_tokens if self.rows else max(self.prefill_tokens, self.engine.prefill_tokens)
        while budget > 0 and (self.reading or (self.waiting and self.fits(self.waiting[0]))):
            if self.reading is None:
                self.reading = self.begin(self.waiting.popleft())
            now = self.reading
            request = now.request
            part = request.prompt[now.done : now.done + budget]
            logits = self.engine.extend(part, now.keys, now.values, now.done, request.score_prompt).float()
            now.done += len(part)
            if request.score_prompt:
                targets = request.prompt[now.done - len(part) + 1 : now.done + 1]
                request.prompt_scores += scores_of(logits, targets, request.top_logprobs)
            budget -= len(part)
            if now.done == len(request.prompt):
                self.join(now, logits[-1:])
                self.reading = None

    def begin(self, request: Request) -> Reading:
        engine, T = self.engine, len(request.prompt)
        shape = (self.L, engine.K, T, engine.hd)
        keys, values = (torch.zeros(shape, dtype=engine.cache_dtype, device=engine.device) for _ in range(2))
        done, known = (
            self.prefixes.find(request.prompt) if request.reuse and not request.score_prompt else (0, None)
        )
        if known:
            keys[:, :, :done] = known.keys[:, :, :done]
            values[:, :, :done] = known.values[:, :, :done]
            request.reused_tokens = done
        return Reading(request, keys, values, done)

    def join(self, now: Reading, logits: torch.Tensor):
        """logits (1, V) behind the prompt."""
        request = now.request
        (seeds,) = row_seeds([request.prompt], request.sampling)
        for number, seed in enumerate(seeds):
            self.cache.add(now.keys, now.values)
            self.rows.append(Row(request, number, seed, self.engine))
        logits = logits.expand(len(seeds), -1)
        self.logits = logits.clone() if len(self.rows) == len(seeds) else torch.cat((self.logits, logits))
        self.prefixes.put(Known(torch.tensor(request.prompt), now.keys, now.values))

    # ---- one step ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[News]:
        """Read a little, then one token for every running row; an empty list when none is running yet."""
        self.leave([i for i, row in enumerate(self.rows) if row.request.cancelled])
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        if self.reading and self.reading.request.cancelled:
            self.reading = None
        self.read()
        if not self.rows:
            return []
        tokens, logprobs, tops = self.choose()
        news = [self.take(*one) for one in zip(self.rows, tokens, logprobs, tops)]
        finished = [i for i, new in enumerate(news) if new.finish_reason]
        for i in finished:
            self.remember(i)
        self.leave(finished)
        if self.rows:
            fed = torch.tensor([row.ids[-1] for row in self.rows], device=self.engine.device)
            self.logits = self.engine.decode(fed, self.cache).float()
        return news

    def choose(self) -> tuple[list[int], list[float], list]:
        """Every row's next token, its log-prob, and the likeliest tokens where they were asked for."""
        n, logits = len(self.rows), self.logits
        tops = [likeliest_few(logits[i], row.request.top_logprobs) for i, row in enumerate(self.rows)]
        changed = [i for i, row in enumerate(self.rows) if not row.plain]
        for i in changed:
            logits[i] = self.rows[i].adjust(logits[i])
        uniform = torch.tensor([row.uniform() for row in self.rows], device=logits.device)
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(row.alike, []).append(i)
        tokens, logprobs = [0] * n, [0.0] * n
        for members in groups.values():
            sampling = self.rows[members[0]].request.sampling
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([self.rows[i].seen for i in members])
            part = (logits, uniform) if len(members) == n else (logits[members], uniform[members])
            drawn = sample(part[0], sampling, part[1], seen)
            for i, token, logprob in zip(members, *(t.tolist() for t in drawn)):
                tokens[i], logprobs[i] = token, logprob
        return tokens, logprobs, tops

    def take(self, row: Row, token: int, logprob: float, top) -> News:
        request, s = row.request, row.request.sampling
        row.take(token)
        full = len(row.ids) >= s.max_new_tokens or len(request.prompt) + len(row.ids) >= self.limit
        reason = (
            "eos"
            if token in row.ends
            else "stop"
            if token in s.stop_token_ids
            else "length"
            if full
            else None
        )
        piece = ""
        if row.text is not None:
            piece = row.text.put(token, last=reason is not None)
            if row.text.stopped:
                reason = "stop"
        return News(request, row.number, token, logprob, piece, reason, top)

    def remember(self, i: int):
        row = self.rows[i]
        keys, values = self.cache.row(i)
        self.prefixes.put(Known(torch.tensor(row.request.prompt + row.ids[:-1]), keys, values))

    def leave(self, gone: list[int]):
        if not gone:
            return
        keep = list(range(len(self.rows)))
        for i in reversed(gone):  # from the end, so that the row moved in is one that stays
            self.cache.drop(i)
            keep[i] = keep[-1]
            keep.pop()
        self.rows = [self.rows[i] for i in keep]
        self.logits = self.logits[keep]


def likeliest_few(logits: torch.Tensor, count: int) -> list[tuple[int, float]] | None:
    """logits (V,) -> (token, log-probability at temperature 1) of the likeliest."""
    if not count:
        return None
    logprobs, ids = torch.log_softmax(logits, dim=-1).topk(min(count, len(logits)))
    return list(zip(ids.tolist(), logprobs.tolist()))


def scores_of(logits: torch.Tensor, targets: list[int], count: int) -> list[tuple[float, list | None]]:
    """logits (T, V) -> for each of the targets, at most T, its log-probability and the likeliest tokens."""
    logprobs = torch.log_softmax(logits[: len(targets)], dim=-1)
    own = logprobs[torch.arange(len(targets)), targets].tolist()
    return [(score, likeliest_few(row, count)) for score, row in zip(own, logprobs)]
