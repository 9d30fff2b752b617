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

import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from model.generation import Generator, KeyValueCache, Sampling, TextStream, row_seeds, sample, uniforms
from model.precision import prefers_bfloat16

DRAWS = 64  # random numbers made at once for a row
BLOCK = 16  # tokens: finding fewer is not worth a copy
CANDIDATES = 8  # sequences that are compared with a prompt
HEADROOM = 64  # tokens that rows may grow after one joined before another has to make room


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
        top_logprobs: report the score of every token, its log-prob at temperature 1 without any penalty, and
            so many of the likeliest ones; None = neither.
        guide: None, or a function that makes an object which decides for one row which tokens may come next:
            `adjust(logits)` (V,) float32 -> logits, -inf where a token may not, and `take(token)`.
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
    top_logprobs: int | None = None
    guide: object = None
    score_prompt: bool = False
    reuse: bool = True
    cancelled: bool = False  # set it at any time, from any thread: its rows leave with the next step

    def __post_init__(self):
        self.error: Exception | None = None  # its guide failed, and it was cancelled
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
    score: float | None = None  # at temperature 1, if `top_logprobs` is not None
    top: list[tuple[int, float]] = ()  # (token, score), likeliest first


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
        return self.guide.adjust(logits) if self.guide else logits

    def fail(self, error: Exception):
        self.request.error, self.request.cancelled, self.guide = error, True, None

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

    def size(self, rows: int, longest: int) -> int:
        """Slots of a block for so many rows, one of them `longest` tokens long."""
        return row_room(rows) * self.room_for(longest + 1)

    def lay_out(self, rows: int, longest: int = 0):
        """A new block for `rows` rows, as long as the longest row or as `longest`, and at least one more
        slot. What there is keeps its right end."""
        used = self.rows * self.K
        length = max([longest, *(self.length - pad for pad in self.pad)])
        shift = length - self.length
        start = max(-shift, 0)  # of what is kept, in the old block
        L, _, _, hd = self.keys.shape
        shape = (L, row_room(rows) * self.K, self.room_for(length + 1), hd)
        for name in ("keys", "values"):
            block = getattr(self, name)
            fresh = torch.zeros(shape, dtype=block.dtype, device=block.device)
            fresh[:, :used, max(shift, 0) : length] = block[:, :used, start : self.length]
            setattr(self, name, fresh)
        self.length, self.pad = length, [pad + shift for pad in self.pad]
        self.bias = torch.full(
            (shape[1], 1, shape[2]), -math.inf, dtype=self.keys.dtype, device=self.keys.device
        )
        for row, pad in enumerate(self.pad):
            self.bias[row * self.K : (row + 1) * self.K, :, pad:length] = 0

    def room_for(self, slots: int) -> int:
        """Slots to have when so many are needed. A dense block is multiplied to its end: it stays tight."""
        return -(-slots // 32) * 32 if self.dense else -(-(slots + slots // 4) // 64) * 64

    def add(self, keys: torch.Tensor, values: torch.Tensor):
        """One more row, whose tokens have keys and values (L, K, T, hd)."""
        T, row, K = keys.shape[2], self.rows, self.K
        if row == 0:
            self.length = 0
        if T > self.length or (row + 1) * K > self.keys.shape[1]:
            self.lay_out(row + 1, T)
        here, slots = slice(row * K, (row + 1) * K), slice(self.length - T, self.length)
        for block, new in ((self.keys, keys), (self.values, values)):
            block[:, here] = 0
            block[:, here, slots] = new
        self.bias[here] = -math.inf
        self.bias[here, :, slots] = 0
        self.pad.append(self.length - T)
        self.rows += 1

    def tidy(self):
        """After rows have left: give back what is far more than the others need."""
        if not self.rows:
            self.length = 0
            return self.lay_out(1)
        longest = self.length - min(self.pad)
        if longest < self.length // 2 or 2 * row_room(self.rows) * self.K < self.keys.shape[1]:
            self.lay_out(self.rows)

    @property
    def full(self) -> bool:
        return self.length == self.keys.shape[2]

    def next_slot(self) -> int:
        self.choose_kernel()
        if self.full:
            self.lay_out(self.rows)
        slot = self.length
        self.bias[: self.rows * self.K, :, slot] = 0
        self.length += 1
        return slot

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of a row's keys and values, (L, K, T, hd)."""
        here, slots = slice(row * self.K, (row + 1) * self.K), slice(self.pad[row], self.length)
        return self.keys[:, here, slots].clone(), self.values[:, here, slots].clone()


def row_room(rows: int) -> int:
    """Rows to have when so many are needed."""
    return 1 << max(rows - 1, 0).bit_length()


@dataclass(eq=False)
class Known:
    """Tokens whose keys and values (L, K, T, hd) were computed."""

    ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


def block_names(ids: list[int]) -> Iterator[int]:
    """A number for every whole block of tokens: it stands for the block and all before it."""
    name = 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        name = hash((name, *ids[end - BLOCK : end]))
        yield name


class PrefixStore:
    """Sequences with their keys and values, up to so many bytes; the least recently used goes first. They are
    found by the blocks of tokens they begin with, whatever else is kept."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.entries: dict[Known, list[int]] = {}  # and its blocks, the least recently used first
        self.blocks: dict[int, dict[Known, None]] = {}  # entries that have it, the oldest first

    def find(self, prompt: list[int]) -> tuple[int, Known | None]:
        """(tokens in common, the entry that begins most like the prompt), or (0, None). At least one token of
        the prompt is left to be read, for the logits behind it. Of many entries that have the same last block
        in common with it, the newest are looked at."""
        alike: dict[Known, None] = {}
        for name in block_names(prompt):
            if name not in self.blocks:
                break
            alike = self.blocks[name]
        wanted, most, best = torch.tensor(prompt), 0, None
        for entry in itertools.islice(reversed(alike), CANDIDATES):
            n = min(len(entry.ids), len(prompt) - 1)
            common = int((entry.ids[:n] == wanted[:n]).cumprod(0).sum())
            if common > most:
                most, best = common, entry
        if best is None or most < BLOCK:
            return 0, None
        self.entries[best] = self.entries.pop(best)
        return most, best

    def put(self, new: Known, longer_than: Known | None = None):
        """Keep it; `longer_than`, which it begins with, is not needed any longer."""
        if len(new.ids) < BLOCK or new.bytes > self.limit:
            return
        if longer_than in self.entries and begins_with(new.ids, longer_than.ids):
            self.remove(longer_than)
        self.entries[new] = list(block_names(new.ids.tolist()))
        for name in self.entries[new]:
            self.blocks.setdefault(name, {})[new] = None
        self.bytes += new.bytes
        while self.bytes > self.limit:
            self.remove(next(iter(self.entries)))

    def remove(self, entry: Known):
        self.bytes -= entry.bytes
        for name in self.entries.pop(entry):
            del self.blocks[name][entry]
            if not self.blocks[name]:
                del self.blocks[name]


def begins_with(ids: torch.Tensor, start: torch.Tensor) -> bool:
    return len(start) <= len(ids) and torch.equal(ids[: len(start)], start)


class Reading:
    """Tokens that are being read: of a prompt, or again those of a row that had to make room."""

    def __init__(self, request: Request, ids: list[int], keys, values, done: int, row: Row | None, known):
        self.request, self.ids, self.keys, self.values = request, ids, keys, values
        self.done, self.row, self.known = done, row, known


class Batch:
    """The running rows of one model and the requests that wait.

    Args:
        engine: the weights.
        max_rows: rows in flight at once.
        memory: bytes for keys and values of running rows. Rows share one block as long as its longest row.
            When it outgrows this, the youngest row makes room: it is read again, and goes on, as soon as it
            fits. (While a block is laid out anew there are two for a moment, and a prompt that is being read
            lies beside it.)
        prefix_memory: bytes for those of finished rows.
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
        self.paused: list[Row] = []  # had to make room; they come before all that wait
        self.reading: Reading | None = None
        self.rows: list[Row] = []  # in the order in which they came, but for those moved into a gap
        self.cache = RunningCache(self.L, engine.K, engine.hd, engine.cache_dtype, engine.device)
        self.logits: torch.Tensor | None = None  # (n, V) float32: of every row's next token
        self.arrivals = 0

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.reading or self.paused or self.waiting)

    # ---- coming in -----------------------------------------------------------------------------------------

    def check(self, request: Request):
        """Raises ValueError when it could never be answered."""
        self.engine.check([request.prompt])
        n = request.sampling.num_return_sequences
        longest = min(len(request.prompt) + request.sampling.max_new_tokens, self.limit)
        if n > self.max_rows:
            raise ValueError(f"{n} answers at once are more than the {self.max_rows} that run here")
        if self.cache.size(n, longest) > self.slots:
            raise ValueError(
                f"{n} x {longest} tokens need more memory than there is for keys and values, "
                f"{self.slots} tokens: ask for fewer"
            )

    def add(self, request: Request):
        """Queue a request. Raises as `check`."""
        self.check(request)
        self.waiting.append(request)

    def fits(self, rows: int, tokens: int) -> bool:
        """Is there room for so many more rows of so many tokens, and for all to grow a little?"""
        n = len(self.rows) + rows
        longest = max(tokens, *self.cache_lengths()) + HEADROOM
        return n <= self.max_rows and (not self.rows or self.cache.size(n, longest) <= self.slots)

    def cache_lengths(self) -> list[int]:
        return [0, *(len(row.request.prompt) + len(row.ids) for row in self.rows)]

    def next_reading(self) -> Reading | None:
        if self.paused:
            row = self.paused[0]
            ids = row.request.prompt + row.ids
            return self.begin(row.request, ids, self.paused.pop(0)) if self.fits(1, len(ids)) else None
        if self.waiting:
            request = self.waiting[0]
            if self.fits(request.sampling.num_return_sequences, len(request.prompt)):
                return self.begin(self.waiting.popleft(), request.prompt, None)
        return None

    def read(self, hurry: bool):
        """Some tokens of waiting prompts; a prompt that is done becomes rows."""
        budget = self.prefill_tokens if hurry else max(self.prefill_tokens, self.engine.prefill_tokens)
        while budget > 0:
            self.reading = self.reading or self.next_reading()
            now = self.reading
            if now is None:
                return
            score = now.request.score_prompt and now.row is None
            part = now.ids[now.done : now.done + budget]
            logits = self.engine.extend(part, now.keys, now.values, now.done, score).float()
            now.done += len(part)
            if score:
                targets = now.ids[now.done - len(part) + 1 : now.done + 1]
                now.request.prompt_scores += scores_of(logits, targets, now.request.top_logprobs or 0)
            budget -= len(part)
            if now.done == len(now.ids):
                self.join(now, logits[-1:])
                self.reading = None

    def begin(self, request: Request, ids: list[int], row: Row | None) -> Reading:
        engine = self.engine
        shape = (self.L, engine.K, len(ids), engine.hd)
        keys, values = (torch.zeros(shape, dtype=engine.cache_dtype, device=engine.device) for _ in range(2))
        done, known = 0, None
        if request.reuse and not request.score_prompt:
            done, known = self.prefixes.find(ids)
        if known:
            keys[:, :, :done] = known.keys[:, :, :done]
            values[:, :, :done] = known.values[:, :, :done]
        if row is None:
            request.reused_tokens = done
        return Reading(request, ids, keys, values, done, row, known)

    def join(self, now: Reading, logits: torch.Tensor):
        """logits (1, V) behind what was read."""
        new = [now.row]
        if now.row is None:
            (seeds,) = row_seeds([now.ids], now.request.sampling)
            new = [Row(now.request, number, seed, self.engine) for number, seed in enumerate(seeds)]
            known = Known(torch.tensor(now.ids), now.keys, now.values)
            self.prefixes.put(known, now.known)
            for row in new:
                row.known = weakref.ref(known)  # it may be dropped from the store while the row runs
        for row in new:
            row.arrival, self.arrivals = self.arrivals, self.arrivals + 1
            self.cache.add(now.keys, now.values)
        logits = logits.expand(len(new), -1)
        self.logits = torch.cat((self.logits, logits)) if self.rows else logits.clone()
        self.rows += new

    # ---- one step ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, hurry: bool = False) -> list[News]:
        """One token for every running row, after reading a little; an empty list when none is running yet.
        hurry: read only a little, although no row runs here: those of other models wait."""
        self.leave([i for i, row in enumerate(self.rows) if row.request.cancelled])
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        self.paused = [row for row in self.paused if not row.request.cancelled]
        if self.reading and self.reading.request.cancelled:
            self.reading = None
        self.make_room()
        if self.rows:
            fed = torch.tensor([row.ids[-1] for row in self.rows], device=self.engine.device)
            self.logits = self.engine.decode(fed, self.cache).float()
        self.read(hurry or bool(self.rows))
        if not self.rows:
            return []
        news = [self.take(*one) for one in zip(self.rows, *self.choose())]
        finished = [i for i, new in enumerate(news) if new.finish_reason]
        for i in finished:
            self.remember(i)
        self.leave(finished)
        return [new for new in news if not new.request.error]

    def make_room(self):
        """Before the block grows beyond its memory, the youngest rows leave for a while."""
        while self.rows and self.cache.full:
            if (
                len(self.rows) == 1
                or self.cache.size(len(self.rows), max(self.cache_lengths())) <= self.slots
            ):
                return
            youngest = max(range(len(self.rows)), key=lambda i: self.rows[i].arrival)
            self.remember(youngest)
            self.paused.insert(0, self.rows[youngest])
            self.leave([youngest])

    def choose(self) -> tuple[list[int], list[float], list, list]:
        """Every row's next token, its log-prob, and where they were asked for its score and the likeliest
        tokens."""
        n, logits = len(self.rows), self.logits
        plain = {
            i: logits[i].clone() for i, row in enumerate(self.rows) if row.request.top_logprobs is not None
        }
        for i, row in enumerate(self.rows):
            if not row.plain:
                try:
                    logits[i] = row.adjust(logits[i])
                except Exception as error:  # of a guide: the others must not suffer
                    row.fail(error)
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
        scores, tops = [None] * n, [()] * n
        for i, row_logits in plain.items():
            ((scores[i], tops[i]),) = scores_of(
                row_logits[None], tokens[i : i + 1], self.rows[i].request.top_logprobs
            )
        return tokens, logprobs, scores, tops

    def take(self, row: Row, token: int, logprob: float, score: float | None, top) -> News:
        request, s = row.request, row.request.sampling
        try:
            row.take(token)
        except Exception as error:
            row.fail(error)
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
        return News(request, row.number, token, logprob, piece, reason, score, top)

    def remember(self, i: int):
        if not self.prefixes.limit:
            return
        row = self.rows[i]
        shorter, (keys, values) = row.known(), self.cache.row(i)
        known = Known(torch.tensor(row.request.prompt + row.ids[:-1]), keys, values)
        self.prefixes.put(known, shorter)
        row.known = weakref.ref(known)

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
        self.cache.tidy()


def scores_of(logits: torch.Tensor, targets: list[int], count: int) -> list[tuple[float, list]]:
    """logits (T, V) -> for each of the targets, at most T, its log-probability at temperature 1, and so many
    of the likeliest tokens with theirs."""
    logprobs = torch.log_softmax(logits[: len(targets)], dim=-1)
    own = logprobs[torch.arange(len(targets)), targets].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))
    return [(score, list(zip(*pair))) for score, *pair in zip(own, ids.tolist(), values.tolist())]
