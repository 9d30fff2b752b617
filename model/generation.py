"""Sampling text from a model, fast: every prompt is read once, then all rows grow by one token per step.

    engine = Generator(model)                      # packs the weights; dtype="auto", "float32", "int8", ...
    answers = engine.generate(prompts, max_new_tokens=128, temperature=0.8, num_return_sequences=4, seed=1)
    answers[0].ids, answers[0].logprobs, answers[0].finish_reason
    for piece in engine.stream(prompt, tokenizer, temperature=0.8): print(piece, end="")

`prompts` is a list of lists of token ids, of unequal length; answers come back as a, a, b, b. Every setting
is a field of `Sampling`, an unknown one is an error. For a benchmark, time `engine.generate(prompts,
max_new_tokens=256, temperature=0, ignore_eos=True)`: it makes exactly `max_new_tokens` tokens per row, and
counts of tokens are in the answers.

How it is fast:
- q, k and v of a layer are one matrix, gate and up another, stored in the layout the CPU's matrix kernels
  want.
- Keys and values live in one preallocated block, right-aligned: all rows write the same slot in every step,
  and a step multiplies only the filled part. The queries that share a key/value head are the rows of one
  product: nothing is repeated.
- A prompt is read once for all its samples, prompts of equal length together and without padding.
- A finished row is replaced by the last one, so that the batch has no idle rows.
- Sampling needs one softmax, and sorts only as many candidates as top-p asks for.

Dimensions: n rows in flight, L layers, H query heads, K key/value heads, R = H / K, hd head size, S slots, V
vocabulary.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from model.ahead_of_time import EXAMPLE_ROWS, ahead_of_time
from model.model_minimind import attention, block_biases, matrix_of, rope_frequencies, route
from model.precision import (
    cpu_features,
    has_packed_products,
    multiplies_integers,
    prefers_bfloat16,
    prefers_integers,
    round_to_integers,
)
from model.rounded_cache import RoundedCache, attend, attend_examples

# ---------------------------------------------------------------------------------------------------------
# What is asked for, and what comes back
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How to choose tokens and when to stop. The processors act in this order, as in transformers: repetition
    penalty, temperature, top_k, top_p, min_p.

    Args:
        max_new_tokens: at most this many tokens per answer.
        temperature: logits are divided by it; 0 = always the likeliest token.
        top_k: only the k likeliest tokens; 0 = all.
        top_p: only the likeliest tokens that together reach this probability; 1 = all.
        min_p: only tokens at least this many times as likely as the likeliest; 0 = all.
        repetition_penalty: positive logits of tokens seen before are divided by it, negative ones multiplied;
            1 = off.
        penalize_prompt: the prompt's tokens count as seen.
        num_return_sequences: answers per prompt.
        seed: int, or one per prompt, or None = drawn from torch's generator. A row's draws depend on (seed,
            prompt, number of the sample) only, not on its neighbours in the batch.
        eos_token_ids: tokens that end an answer (kept in `ids`); None = those of the model's configuration.
        ignore_eos: never end at such a token.
        stop_token_ids: more tokens that end an answer, with finish reason "stop".
        stop: strings that end an answer (needs a tokenizer).
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalize_prompt: bool = True
    num_return_sequences: int = 1
    seed: int | Sequence[int] | None = None
    eos_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name, valid, meaning in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 = greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 = off)"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("stop", all(self.stop), "non-empty strings"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {meaning}, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, settings: dict) -> "Sampling":
        """Raises TypeError that names an unknown setting and the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise TypeError(f"unknown sampling setting {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**settings)


@dataclass
class Completion:
    """One answer. `logprobs` (float32, one per token) are of the distribution each token was drawn from:
    after penalty, temperature and truncation, renormalised. With temperature 0, of the distribution at
    temperature 1."""

    prompt_index: int
    ids: list[int]
    logprobs: torch.Tensor
    finish_reason: str  # "eos", "stop" (token or string) or "length"
    num_prompt_tokens: int
    text: str | None = None  # with a tokenizer: without special tokens, cut before a stop string

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


# --------------------------------------------------------------------------------------------------------
# Sampling one token
# ----------------------------------------------------------------------------------------------------------


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's repetition penalty (https://arxiv.org/abs/1909.05858, section 4.1) made to lower negative logits
    too. logits (n, V), seen (n, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sampling_log_probs(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None):
    """The distribution `sample` draws from, written plainly: logits (n, V) -> log-probabilities (n, V), -inf
    where a token cannot be drawn. A scorer needs it when samples were truncated; the tests hold `sample` to
    it."""
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, ids, outside), -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -math.inf
        )
    return torch.log_softmax(logits, dim=-1)


def likeliest(logits) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (n, V) float32 -> every row's likeliest token (n,) int64 and its log-prob (n,)."""
    best, tokens = logits.max(-1)  # faster than argmax
    return tokens, best - logits.logsumexp(-1)


def sample(
    logits, sampling: Sampling, uniform, seen=None, greedy=likeliest
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (n, V), one number in [0, 1) per row (n,) -> tokens (n,) int64 and their log-probs (n,) float32.

    The token is where the running sum of probabilities passes the row's number, so a row's choice depends on
    nothing but its own logits and number.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return greedy(logits)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        return sample_truncated(logits, sampling, uniform)
    if sampling.min_p > 0:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -math.inf
        )
    probs = torch.softmax(logits, dim=-1)
    tokens = draw(probs, uniform)
    return tokens, log_of(probs, tokens)


def sample_truncated(logits, sampling: Sampling, uniform, level: int = 0):
    """Top-k and top-p look at the likeliest candidates only; rows whose nucleus is wider are tried again with
    more."""
    V = logits.shape[-1]
    widths = (
        (64, 512, V) if logits.device.type == "cpu" else (V,)
    )  # a sort of everything costs a CPU 0.3 ms per row
    width = min(sampling.top_k or widths[level], V)
    values, ids = logits.topk(width)  # (n, width), likeliest first
    if sampling.top_k:
        probs = torch.softmax(values, dim=-1)
    else:
        probs = torch.softmax(logits, dim=-1).gather(1, ids)
    running = probs.cumsum(-1)
    keep = running - probs < sampling.top_p
    if sampling.min_p > 0:
        keep &= values >= values[:, :1] + math.log(sampling.min_p)
    kept = probs * keep
    choice = draw(kept, uniform)
    tokens = ids.gather(1, choice[:, None]).squeeze(1)
    logp = log_of(kept, choice) - kept.sum(-1).log()
    if not sampling.top_k and width < V:
        wider = (running[:, -1] < sampling.top_p).nonzero().squeeze(1)
        if len(wider):
            tokens[wider], logp[wider] = sample_truncated(logits[wider], sampling, uniform[wider], level + 1)
    return tokens, logp


def draw(weights, uniform):
    """Index (n,) at which the running sum of weights (n, W) first exceeds uniform (n,) times the total. A
    weight of zero adds nothing to the sum and is never where it is exceeded."""
    running = weights.cumsum(-1)
    target = uniform[:, None] * running[:, -1:]
    return torch.searchsorted(running, target, right=True).squeeze(1).clamp(max=weights.shape[-1] - 1)


def log_of(probs, index):
    return probs.gather(1, index[:, None]).squeeze(1).log()


# A random number as a pure function of (row's seed, step): no generator to carry, the same on every device.


def signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def uniforms(seeds: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1) for steps start ... start + count - 1 of every row: seeds (n,) int64 -> (count, n)
    float32. SplitMix64 (Steele, Lea & Flood 2014): a Weyl sequence through a mixing function; int64 wraps
    around as needed."""

    def shift(x, bits):  # int64 shifts copy the sign: clear it
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    steps = torch.arange(start + 1, start + count + 1, device=seeds.device)[:, None]
    z = seeds[None, :] + steps * signed(0x9E3779B97F4A7C15)
    z = (z ^ shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ shift(z, 31)
    return shift(z, 41).float() * 2.0**-23  # 23 bits: u * total stays below total in float32


def row_seeds(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """One 63-bit seed per answer from (seed, prompt, number of the answer). A prompt given twice with one
    seed counts on, so that its answers differ as those of `num_return_sequences` do. Raises ValueError when
    there are seeds, but not one per prompt."""
    seeds = sampling.seed
    if seeds is None:
        seeds = int(torch.randint(1 << 62, ()))
    if isinstance(seeds, int):
        seeds = [seeds] * len(prompts)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed has {len(seeds)} numbers for {len(prompts)} prompts: give one, or one each")
    N, seen, result = sampling.num_return_sequences, Counter(), []
    for seed, prompt in zip(seeds, prompts):
        digest = hashlib.blake2b(f"{seed}:{','.join(map(str, prompt))}".encode(), digest_size=8)
        first = seen[seed, tuple(prompt)]
        seen[seed, tuple(prompt)] += N
        row = []
        for j in range(first, first + N):
            one = digest.copy()
            one.update(f":{j}".encode())
            row.append(int.from_bytes(one.digest(), "little") >> 1)
        result.append(row)
    return result


# --------------------------------------------------------------------------------------------------------
# Text out of tokens
# ----------------------------------------------------------------------------------------------------------


class TextStream:
    """Turns tokens into text as they come. A character whose bytes are still incomplete waits for the next
    token, and so does the beginning of what may become a stop string."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.start = self.end = 0  # ids[start:end] were decoded before: context for the tokens after them
        self.waiting = ""
        self.text = ""  # what was handed out
        self.stopped = False

    def put(self, token: int, last: bool = False) -> str:
        """One more token -> the text that is certain now, often none. `last` also hands out what was
        waiting."""
        if self.stopped:
            return ""
        self.ids.append(token)
        return self.advance(last)

    def finish(self) -> str:
        """What was still waiting, without the bytes of an unfinished character."""
        return "" if self.stopped else self.advance(True)

    def advance(self, last: bool) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.end], skip_special_tokens=True)
        after = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        complete = not after.endswith("\ufffd")
        if complete or len(self.ids) - self.end > 8:  # no character is that long: the bytes are no valid text
            self.waiting += after[len(before) :]
            # One more piece of context than needed: some decoders look at the token before.
            self.start, self.end = self.end, len(self.ids)
        elif last:
            self.waiting += after[len(before) :].rstrip("\ufffd")
        return self.hand_out(last)

    def hand_out(self, last: bool) -> str:
        found = [i for i in (self.waiting.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped = True
            piece, self.waiting = self.waiting[: min(found)], ""
        else:
            hold = 0
            if not last:
                hold = max((common_end(self.waiting, s) for s in self.stop), default=0)
            cut = len(self.waiting) - hold
            piece, self.waiting = self.waiting[:cut], self.waiting[cut:]
        self.text += piece
        return piece


def common_end(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


# --------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------


def choose_dtype(wanted, device: torch.device) -> torch.dtype:
    """The type of all that is not multiplied in 8 bits, in an engine that is not compiled. auto: bfloat16
    where this machine multiplies it faster than float32, else float16 on CUDA, else float32."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in (None, "auto", "int8"):
        if prefers_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = getattr(torch, names.get(wanted, wanted), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {wanted!r} is unknown: use auto, float32, bfloat16, float16 or int8")
    return dtype


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The matrix (out, in) a layer multiplies with. A module whose `forward` was replaced computes something
    else."""
    if not isinstance(linear, nn.Linear) or "forward" in linear.__dict__ or linear.bias is not None:
        raise ValueError(
            "generation works on plain linear layers without bias, not on a "
            f"{type(linear).__name__} that computes something else: merge adapters into the weights first"
        )
    return matrix_of(linear).detach()


class Linear:
    """y = x W^T with W in the layout the kernels like best, on x86 CPUs oneDNN's packed one: up to 2.5 times
    as fast as torch's own product. With `norm`, the weight of an RMSNorm, `of_norm` normalises x first.

    Compiled code cannot take packed weights; it gets transposed ones (`packed=False`), which torch's own
    product of few rows likes better.
    """

    def __init__(
        self, weight: torch.Tensor, dtype: torch.dtype, norm: torch.Tensor | None = None, packed=True
    ):
        weight = weight.to(dtype)
        self.norm = None if norm is None else norm.to(dtype, copy=True)
        able = weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self.packed = packed and able and has_packed_products()
        # The number is the expected rows: the layout chosen for many rows is also the fastest for one.
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024)
        else:
            self.weight = weight if packed else weight.t().contiguous().t()

    def __call__(self, x):
        """x (n, in) -> (n, out)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def of_norm(self, x, eps):
        """RMSNorm(x) W^T."""
        return self(rms_norm(x, self.norm, eps))

    def add(self, x, residual):
        """residual + x W^T."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, None, "add")
        return self(x).add_(residual)


LIMIT = torch.tensor(127.0)  # divided by another tensor this is one call, a number is two


class RoundedLinear:
    """`Linear` in products of 8-bit integers: weights are rounded with one scale per output, every row of x
    by its own (LLM.int8(), https://arxiv.org/abs/2208.07339, section 3.1, vector-wise). Sums of whole numbers
    are exact, so a row's product does not depend on its neighbours. The scales are multiplied last, and with
    them 1 / RMS of a normalised row: rounding x or x / RMS gives the same whole numbers. The norm's weight is
    multiplied into W, which also keeps it from widening the range of a row (gamma migration,
    https://arxiv.org/abs/2209.13325, section 4.1).
    """

    def __init__(self, weight: torch.Tensor, norm: torch.Tensor | None = None):
        rounded, scale = round_to_integers(weight.float() if norm is None else weight.float() * norm)
        self.weight = rounded.t()
        self.scale = scale.t() / 127  # a row of x is divided by its peak / 127 and multiplied by its peak

    def product(self, x):
        """x (n, in) -> y (n, out), r (n, 1) float32, so that x W^T = r y."""
        if torch.compiler.is_compiling() or x.numel() < 8192:  # the same, which is faster depends on the size
            peak = x.abs().amax(-1, keepdim=True)
        else:
            peak = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
        peak = peak.float()
        # A row of zeros becomes NaN, then arbitrary whole numbers; times a peak of 0 their product is 0.
        rounded = (x * (LIMIT / peak)).round_().to(torch.int8)
        return torch._int_mm(rounded, self.weight).float().mul_(self.scale), peak

    def __call__(self, x):
        y, r = self.product(x)
        return y.mul_(r).to(x.dtype)

    def of_norm(self, x, eps):
        y, r = self.product(x)
        return y.mul_(inverse_rms(x.float(), eps).mul_(r)).to(x.dtype)

    def add(self, x, residual):
        y, r = self.product(x)
        return torch.addcmul(residual.float(), y, r).to(residual.dtype)


def pack(weight, norm, dtype, int8, compiled=False) -> Linear | RoundedLinear:
    """With int8 on a machine without products of 8-bit numbers, the rounded weights in `dtype`."""
    if int8 and multiplies_integers(weight.device):
        return RoundedLinear(weight, norm)
    if int8:
        rounded, scale = round_to_integers(weight.float())
        weight = rounded * scale
    return Linear(weight, dtype, norm, packed=not compiled)


class Layer:
    """The weights of one block, fused."""

    def __init__(self, block, make: Callable[..., Linear | RoundedLinear], config, dtype):
        attention = block.self_attn
        K, hd = config.num_key_value_heads, config.head_dim
        q, k, v = (weight_of(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        D = q.shape[1]
        # Output rows ordered by key/value head: its R queries, its key, its value.
        grouped = [w.view(K, -1, hd, D) for w in (q, k, v)]
        self.qkv = make(torch.cat(grouped, dim=1).reshape(-1, D), block.input_layernorm.weight.detach())
        self.out = make(weight_of(attention.o_proj))
        self.head_norm = None
        if config.qk_norm:
            R = config.num_attention_heads // K
            rows = [attention.q_norm.weight.detach()] * R + [attention.k_norm.weight.detach()]
            self.head_norm = torch.stack(rows).to(dtype)  # (R + 1, hd)
        mlp, mlp_norm = block.mlp, block.post_attention_layernorm.weight.detach()
        self.router = None
        if config.use_moe:
            self.mlp_norm = mlp_norm.to(dtype, copy=True)
            self.router = weight_of(mlp.gate).float().clone()
            self.experts = [FusedMLP(expert, make) for expert in mlp.experts]
            self.shared = [FusedMLP(e, make) for e in mlp.shared_experts] if mlp.has_shared else []
        else:
            self.mlp = FusedMLP(mlp, make, mlp_norm)


class FusedMLP:
    """SwiGLU; with `norm` after an RMSNorm."""

    def __init__(self, mlp, make, norm=None):
        self.gate_up = make(torch.cat((weight_of(mlp.gate_proj), weight_of(mlp.up_proj))), norm)
        self.down = make(weight_of(mlp.down_proj))

    def __call__(self, x):
        return self.down(gated(self.gate_up(x)))

    def add(self, x, residual):
        """residual + SwiGLU(x)."""
        return self.down.add(gated(self.gate_up(x)), residual)

    def add_of_norm(self, x, eps):
        """x + SwiGLU(RMSNorm(x))."""
        return self.down.add(gated(self.gate_up.of_norm(x, eps)), x)


def gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rms_norm(x, weight, eps):
    """As the model's RMSNorm in fewer, cheaper calls; eps is a tensor (1,) float32."""
    x32 = x.float()
    return (x32 * inverse_rms(x32, eps)).to(x.dtype).mul_(weight)


def inverse_rms(x, eps):
    """x (..., D) float32 -> 1 / sqrt(mean of squares + eps), (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()


# --------------------------------------------------------------------------------------------------------
# Keys and values
# ----------------------------------------------------------------------------------------------------------


class KeyValueCache:
    """Keys and values of all layers and rows, right-aligned: the next token of every row goes to slot
    `length`.

    keys, values (L, rows * K, S, hd). Row i's first token lies in slot pad[i]; `bias` (rows * K, 1, S) is
    -inf in slots that are not to be seen, or None when all are.

    torch's bfloat16 product copies an operand that is not dense, which took half of its time: with many rows
    it gets the whole block, masked where nothing was written yet, and the block grows in small steps
    (`dense`). Few rows, GPUs, and CPUs where bfloat16 products are slow take the fused kernel; it reads the
    filled part in place, and so does the float32 product.
    """

    def __init__(self, L, K, hd, pad: list[int], length: int, limit: int, dtype, device):
        self.K, self.length, self.limit, self.pad = K, length, limit, pad
        self.rows = len(pad)
        self.fused = dtype != torch.float32 and (
            self.rows < 4 or device.type != "cpu" or not prefers_bfloat16(device)
        )
        self.dense = dtype != torch.float32 and not self.fused
        shape = (L, self.rows * K, self.room(length + 128), hd)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.make_bias()

    def room(self, slots: int) -> int:
        """How many slots to have when the next goes beyond `length`; `slots` where room costs nothing."""
        if self.dense:
            return self.length // 32 * 32 + 32
        return min(self.limit, slots)

    def make_bias(self):
        self.bias = None
        self.padded = any(self.pad)
        if self.padded or self.dense:
            slots = torch.arange(self.keys.shape[2], device=self.keys.device)
            pad = torch.tensor(self.pad, device=self.keys.device).repeat_interleave(self.K)
            hidden = (slots < pad[:, None]) | (slots >= self.length)
            bias = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=self.keys.device)
            self.bias = bias.masked_fill_(hidden, -math.inf)[:, None]

    def next_slot(self) -> int:
        """Make the next slot visible, growing where there is no room -> its number."""
        slot = self.length
        if slot == self.keys.shape[2]:
            more = self.room(slot * 3 // 2 + 64) - slot
            n = self.rows * self.K
            self.keys, self.values = (
                F.pad(block[:, :n], (0, 0, 0, more)) for block in (self.keys, self.values)
            )
            self.make_bias()
        if self.bias is not None:
            self.bias[:, :, slot] = 0
        self.length += 1
        return slot

    def visible(self, rows: int) -> list[tuple]:
        """What `attend` needs of each layer: keys and values (rows * K, S, hd), the bias that goes with them,
        and where in them the last slot's belong, (rows, K, hd)."""
        pairs, end = rows * self.K, self.keys.shape[2] if self.dense else self.length
        bias = None if self.bias is None else self.bias[:pairs, :, :end]
        return [
            (keys, values, bias, *(x[:, self.length - 1].unflatten(0, (rows, -1)) for x in (keys, values)))
            for keys, values in zip(self.keys[:, :pairs, :end], self.values[:, :pairs, :end])
        ]

    def attend(self, qk, v, keys, values, bias, new_key, new_value):
        """qk (n, K, R + 1, hd) and v (n, K, hd) of new tokens -> what they find, (n, K * R * hd)."""
        new_key.copy_(qk[:, :, -1])
        new_value.copy_(v)
        q = qk.flatten(0, 1)[:, :-1]
        if self.fused:
            heads = (t.unsqueeze(0) for t in (q.to(keys.dtype), keys, values))
            mask = None if bias is None else bias.unsqueeze(0)
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        else:
            scores = torch.bmm(q * q.shape[-1] ** -0.5, keys.transpose(1, 2))
            if bias is not None:
                scores.add_(bias)
            out = torch.bmm(torch.softmax(scores, dim=-1), values)
        return out.view(len(v), -1)

    def drop(self, row: int):
        """Forget a row: the last one moves into its place."""
        last, K = self.rows - 1, self.K
        if row != last:
            here, there = slice(row * K, row * K + K), slice(last * K, last * K + K)
            for block in (self.keys, self.values):
                block[:, here] = block[:, there]
            if self.bias is not None:
                self.bias[here] = self.bias[there]
            self.pad[row] = self.pad[last]
        self.pad.pop()
        self.rows = last


# --------------------------------------------------------------------------------------------------------
# The engine
# ----------------------------------------------------------------------------------------------------------


class Row:
    """One answer in the making."""

    def __init__(self, index, prompt_index, prompt, seed, text):
        self.index, self.prompt_index, self.prompt, self.seed, self.text = (
            index,
            prompt_index,
            prompt,
            seed,
            text,
        )
        self.ids: list[int] = []
        self.logprobs: list[float] = []


@dataclass
class Token:
    """One step of one row, as `Generator.steps` yields it."""

    index: int  # number of the answer: prompt_index * num_return_sequences + sample
    token: int
    logprob: float
    piece: str  # the text this token completes; "" without a tokenizer
    finish_reason: str | None


class Generator:
    """A model's weights, packed for sampling.

    Args:
        model: a MiniMindLM, dense or mixture. It may go on training: changed parameters are noticed
            at the next call (`refresh()` does it at once, and is needed after writing to `parameter.data` and
            after a step of one of torch's fused optimizers, which leave no trace).
        dtype: "auto" = as in training: bfloat16 where this machine multiplies it faster, else int8 for models
            at least 256 wide on CPUs with fast products of 8-bit numbers, else float32; "int8" = 8-bit
            weights, and such products where the CPU has them.
        max_rows: rows in flight at once; more are done in turns.
        prefill_tokens: prompts are read together up to so many tokens at once (a longer one alone): bounds
            memory, and what fits the caches is faster; 0 = 2,048, with 8-bit products 512.
        compile: compile the layers of a dense model on a CPU, in int8 or float32: 8-bit products take about
            half the time then (keys and values are rounded to 8 bits too), float32 at one row. The compiler
            (torch needs a C++ one, such as g++) takes about a minute the first time. Compiled code rounds
            differently in the last place.
    """

    def __init__(self, model, dtype="auto", max_rows: int = 256, prefill_tokens: int = 0, compile=False):
        self.model, self.config = model, model.config
        self.device = next(model.parameters()).device
        self.int8 = dtype == "int8" or (
            dtype in (None, "auto") and prefers_integers(self.device, model.config.hidden_size)
        )
        integers = self.int8 and multiplies_integers(self.device)
        if self.int8 and not integers:
            warnings.warn(
                f"int8 saves no time on this {self.device.type}: it has no fast products of 8-bit numbers "
                "(CPUs with VNNI have); the rounded weights are multiplied as any others",
                stacklevel=2,
            )
        self.plain_dtype = choose_dtype(dtype, self.device)
        # With 8-bit products a large part of a step is the reading of keys and values: half the bytes.
        halve = integers and cpu_features().get("avx512_bf16")
        self.plain_cache_dtype = torch.bfloat16 if halve else self.plain_dtype
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens or (512 if integers else 2048)
        c = self.config
        self.K, self.hd = c.num_key_value_heads, c.head_dim
        self.R = c.num_attention_heads // self.K
        self.eps = torch.full((1,), c.rms_norm_eps, device=self.device)
        self.compiled = {}
        self.rounds_cache = integers and self.hd % 4 == 0  # when compiled
        exact = self.plain_dtype == torch.float32
        self.can_compile = self.device.type == "cpu" and not c.use_moe and (integers or exact)
        self.prepare(compile and self.can_compile)
        if self.for_compiler:
            try:
                self.compile_all()
            except Exception as error:  # whatever the compiler stack raises, uncompiled code still works
                first_line = (str(error).strip().splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first_line[:200]}"
                warnings.warn(f"not compiled ({reason}); torch needs a C++ compiler for it", stacklevel=2)
                self.prepare(False)
        elif compile:
            warnings.warn("not compiled: that is for dense models on CPUs in int8 or float32", stacklevel=2)

    def prepare(self, for_compiler: bool):
        """Weights and types for compiled code (float32, but for its 8-bit numbers) or for uncompiled."""
        self.for_compiler = for_compiler
        self.dtype = torch.float32 if for_compiler else self.plain_dtype
        self.cache_dtype = torch.float32 if for_compiler else self.plain_cache_dtype
        self.refresh()

    # ---- weights -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self):
        """Take the model's weights as they are now (20-40 ms for 26M parameters)."""
        model, dtype = self.model, self.dtype

        def make(weight, norm=None):
            return pack(weight, norm, dtype, self.int8, self.for_compiler)

        self.embedding = model.model.embed_tokens.weight.detach().to(dtype, copy=True)
        self.layers = [Layer(block, make, self.config, dtype) for block in model.model.layers]
        self.head = make(weight_of(model.lm_head), model.model.norm.weight.detach())
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self.versions = self.current_versions()

    def current_versions(self):
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]

    def rotary(self, length: int):
        """cos and sin (P, hd) float32; sin already carries the sign that goes with swapped halves."""
        if self.tables is None or self.tables[0].shape[0] < length:
            freqs, factor = rope_frequencies(self.hd, self.config.rope_parameters)
            positions = torch.arange(max(length, 1024 * math.ceil(length / 1024)), dtype=torch.float32)
            angles = torch.outer(positions, freqs)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            self.tables = (
                torch.cat((cos, cos), dim=-1).to(self.device),
                torch.cat((-sin, sin), dim=-1).to(self.device),
            )
        return self.tables

    def angles(self, positions, length: int):
        """cos and sin (N, 1, 1, hd) at positions (N,) below `length`."""
        return (t[positions.to(self.device), None, None].to(self.dtype) for t in self.rotary(length))

    # ---- layers ------------------------------------------------------------------------------------------
    # A layer's attention reads the cache; all that lies between two of them is one function, and with
    # `compile` one compiled function.

    def rotate(self, x, cos, sin):
        """x (..., hd) turned by its angle: swapping halves and signing sin equals the model's `rotate`."""
        return torch.addcmul(x * cos, x.roll(self.hd // 2, dims=-1), sin)

    def read(self, layer: Layer, x, cos, sin):
        """x (N, D), cos and sin (N or 1, 1, 1, hd) -> rotated queries and keys (N, K, R + 1, hd), the values
        (N, K, hd)."""
        qkv = layer.qkv.of_norm(x, self.eps).view(-1, self.K, self.R + 2, self.hd)
        qk = qkv[:, :, :-1]
        if layer.head_norm is not None:
            qk = rms_norm(qk, layer.head_norm, self.eps)
        v = qkv[:, :, -1]
        if torch.compiler.is_compiling():
            v = v.clone()  # else all of qkv would be kept, and copied again
        return self.rotate(qk, cos, sin), v

    def between(self, layer: Layer, following: Layer, out, x, cos, sin):
        """From what one layer's attention found, out (N, K * R * hd), to what the next one needs: x (N, D),
        and as `read`."""
        x = self.feed_forward(layer, layer.out.add(out, x))
        return x, *self.read(following, x, cos, sin)

    def end(self, layer: Layer, head: Linear | RoundedLinear, out, x):
        """From what the last layer's attention found to the logits (N, V)."""
        return head.of_norm(self.feed_forward(layer, layer.out.add(out, x)), self.eps)

    def call(self, function, weights: list, rows: list[torch.Tensor]):
        """function(*weights, *rows), by its compiled version if there is one."""
        compiled = self.compiled.get(function.__name__)
        return compiled(weights, rows) if compiled else function(*weights, *rows)

    def compile_all(self):
        """Compile attentions, the stretches between them, and the choice of the likeliest token."""
        D, heads, angles = self.config.hidden_size, self.K * self.R * self.hd, (1, 1, self.hd)
        x, out, cos, sin, logits = (
            torch.zeros(EXAMPLE_ROWS, *shape)
            for shape in ((D,), (heads,), angles, angles, (self.config.vocab_size,))
        )
        layer, facts = self.layers[0], [self.K, self.R, self.hd, self.config.rms_norm_eps]
        parts = [
            (self.read, [layer], [x, cos, sin]),
            (self.between, [layer, layer], [out, x, cos, sin]),
            (self.end, [layer, self.head], [out, x]),
            (likeliest, [], [logits]),
        ]
        if self.rounds_cache:
            parts.append((attend, [], *attend_examples(EXAMPLE_ROWS * self.K, self.R, self.hd)))
        self.compiled = {
            function.__name__: ahead_of_time(function, weights, rows, facts, *free)
            for function, weights, rows, *free in parts
        }

    def feed_forward(self, layer: Layer, x):
        """x (N, D) -> x + MLP(norm(x))."""
        if layer.router is None:
            return layer.mlp.add_of_norm(x, self.eps)
        h = rms_norm(x, layer.mlp_norm, self.eps)
        logits = F.linear(h.float(), layer.router)
        _, weights, experts = route(logits, self.config.num_experts_per_tok, self.config.norm_topk_prob)
        choices = experts.reshape(-1)
        order = choices.argsort(stable=True)
        token = order // experts.shape[1]
        counts = torch.bincount(choices, minlength=len(layer.experts)).tolist()
        parts = h[token].split(counts)
        out = torch.cat([expert(part) for expert, part in zip(layer.experts, parts) if len(part)])
        out = out.float() * weights.reshape(-1)[order][:, None]
        y = torch.zeros(h.shape, dtype=torch.float32, device=h.device).index_add_(0, token, out).to(h.dtype)
        for expert in layer.shared:
            y = expert.add(h, y)
        return x + y

    def prefill(self, prompts: list[list[int]], N: int, cache: KeyValueCache) -> torch.Tensor:
        """Read prompts sorted by length into the cache, N rows each -> logits (len(prompts) * N, V) after
        their last tokens. Prompts of one length form a batch; matrices see all tokens at once, attention one
        batch at a time."""
        logits = []
        for first, last in self.prefill_chunks(prompts):
            logits.append(self.prefill_chunk(prompts[first:last], first, N, cache))
        return torch.cat(logits).repeat_interleave(N, dim=0)

    def prefill_chunks(self, prompts):
        first, tokens = 0, 0
        for i, prompt in enumerate(prompts):
            if i > first and tokens + len(prompt) > self.prefill_tokens:
                yield first, i
                first, tokens = i, 0
            tokens += len(prompt)
        yield first, len(prompts)

    def prefill_chunk(self, prompts, first_prompt, N, cache):
        K, R, hd = self.K, self.R, self.hd
        groups = []  # (first token, prompts, T, first row, mask)
        start, row, lengths = 0, first_prompt * N, Counter(map(len, prompts))
        for T, G in sorted(lengths.items()):
            mask = None  # plain products beat the fused kernel of the CPU on short prompts
            if self.device.type == "cpu" and T <= 1024:
                mask = block_biases(T, None, self.dtype, self.device)
            groups.append((start, G, T, row, mask))
            start, row = start + G * T, row + G * N
        positions = torch.cat([torch.arange(len(p)) for p in prompts])
        cos, sin = self.angles(positions, len(prompts[-1]))
        x = self.embedding[torch.tensor([t for p in prompts for t in p], device=self.device)]
        qk, v = self.call(self.read, self.layers[:1], [x, cos, sin])
        for i in range(len(self.layers)):
            out = torch.empty(x.shape[0], K * R * hd, dtype=self.dtype, device=x.device)
            for start, G, T, row, mask in groups:
                part = slice(start, start + G * T)
                q = qk[part, :, :R].reshape(G, T, K * R, hd)
                k, value = (t.view(G, T, K, hd) for t in (qk[part, :, R], v[part]))
                rows, slots = slice(row * K, (row + G * N) * K), slice(cache.length - T, cache.length)
                for block, new in ((cache.keys, k), (cache.values, value)):
                    block[i, rows, slots].view(G, N, K, T, hd).copy_(new.transpose(1, 2)[:, None])
                out[part] = attention(q, k, value, mask).reshape(G * T, -1)
            if i + 1 < len(self.layers):
                x, qk, v = self.call(self.between, self.layers[i : i + 2], [out, x, cos, sin])
        ends = torch.tensor([len(p) for p in prompts], device=self.device).cumsum(0) - 1
        return self.call(self.end, [self.layers[-1], self.head], [out[ends], x[ends]])

    def extend(self, ids: list[int], keys, values, start: int, all_logits: bool = False) -> torch.Tensor:
        """Read tokens at positions `start`, `start` + 1, ... behind those whose keys and values lie in the
        first `start` slots of keys and values (L, K, S, hd); theirs are written to the next ones.
        -> logits behind the last of them (1, V), or behind each (len(ids), V)."""
        T, end, R = len(ids), start + len(ids), self.R
        cos, sin = self.angles(torch.arange(start, end), end)
        mask = None
        if start:
            mask = torch.ones(T, end, dtype=torch.bool, device=self.device).tril(start)[None, None]
        elif self.device.type == "cpu" and T <= 1024:
            mask = block_biases(T, None, self.dtype, self.device)
        x = self.embedding[torch.tensor(ids, device=self.device)]
        qk, v = self.call(self.read, self.layers[:1], [x, cos, sin])
        for i in range(len(self.layers)):
            keys[i, :, start:end] = qk[:, :, R].transpose(0, 1)
            values[i, :, start:end] = v.transpose(0, 1)
            seen = (block[i, :, :end].transpose(0, 1)[None].to(self.dtype) for block in (keys, values))
            out = attention(qk[:, :, :R].flatten(1, 2)[None], *seen, mask).reshape(T, -1)
            if i + 1 < len(self.layers):
                x, qk, v = self.call(self.between, self.layers[i : i + 2], [out, x, cos, sin])
        last = slice(None) if all_logits else slice(T - 1, T)
        return self.call(self.end, [self.layers[-1], self.head], [out[last], x[last]])

    def decode(self, tokens: torch.Tensor, cache: KeyValueCache | RoundedCache) -> torch.Tensor:
        """tokens (n,) -> logits (n, V) of the tokens after them; they take the cache's next slot."""
        slot = cache.next_slot()
        one_for_all = not (cache.padded or self.compiled)
        pads = cache.pad[:1] if one_for_all else cache.pad
        cos, sin = self.angles(slot - torch.tensor(pads), slot + 1)
        layers = cache.visible(len(tokens))
        x = self.embedding[tokens]
        qk, v = self.call(self.read, self.layers[:1], [x, cos, sin])
        for i in range(len(self.layers)):
            out = cache.attend(qk, v, *layers[i])
            if i + 1 < len(self.layers):
                x, qk, v = self.call(self.between, self.layers[i : i + 2], [out, x, cos, sin])
        return self.call(self.end, [self.layers[-1], self.head], [out, x])

    # ---- answers -----------------------------------------------------------------------------------------

    def ends(self, sampling: Sampling) -> frozenset[int]:
        """The tokens at which an answer ends with finish reason "eos"."""
        eos = sampling.eos_token_ids
        if eos is None:
            eos = self.config.eos_token_id
            eos = () if eos is None else (eos,) if isinstance(eos, int) else eos
        return frozenset(() if sampling.ignore_eos else eos)

    def check(self, prompts):
        limit, V = self.config.max_position_embeddings, self.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: there is no position to continue from")
            if len(prompt) >= limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, the model has {limit} positions: no room to answer"
                )
            if min(prompt) < 0 or max(prompt) >= V:
                raise ValueError(
                    f"prompt {i} holds a token id outside 0..{V - 1}: was another tokenizer used?"
                )

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], tokenizer=None, **settings) -> Iterator[list[Token]]:
        """Yield, after each step, the new token of every row in flight. `generate` and `stream` are built on
        it."""
        sampling = Sampling.of(settings)
        prompts = [list(map(int, p)) for p in prompts]
        self.check(prompts)
        if sampling.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if self.versions != self.current_versions():
            self.refresh()
        N = sampling.num_return_sequences
        seeds = row_seeds(prompts, sampling)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        per_turn = max(self.max_rows // N, 1)
        for first in range(0, len(order), per_turn):
            rows = [
                Row(
                    i * N + j,
                    i,
                    prompts[i],
                    seeds[i][j],
                    TextStream(tokenizer, sampling.stop) if tokenizer else None,
                )
                for i in order[first : first + per_turn]
                for j in range(N)
            ]
            yield from self.run(rows, sampling)

    def run(self, rows: list[Row], sampling: Sampling) -> Iterator[list[Token]]:
        """All rows from their prompts to their ends; rows of one prompt are neighbours, prompts sorted by
        length."""
        N, device = sampling.num_return_sequences, self.device
        limit = self.config.max_position_embeddings
        eos = self.ends(sampling)
        stop = frozenset(sampling.stop_token_ids)

        prompts = [row.prompt for row in rows[::N]]
        longest = len(prompts[-1])
        slots = min(longest + sampling.max_new_tokens, limit + longest)
        rounded = self.compiled.get("attend")
        cache = KeyValueCache(
            len(self.layers), self.K, self.hd, pad=[longest - len(r.prompt) for r in rows], length=longest,
            limit=longest if rounded else slots, dtype=self.cache_dtype, device=device,
        )  # fmt: skip
        logits = self.prefill(prompts, N, cache)
        if rounded:
            cache = RoundedCache(cache, rounded, slots)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
            for i, row in enumerate(rows if sampling.penalize_prompt else ()):
                seen[i, row.prompt] = True
        seeds = torch.tensor([row.seed for row in rows], device=device)
        greedy = self.compiled.get("likeliest", likeliest)
        for step in range(sampling.max_new_tokens):
            if step % 64 == 0:
                numbers = uniforms(seeds, step, 64)
            tokens, logprobs = sample(logits, sampling, numbers[step % 64], seen, greedy)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            news, finished = [], []
            for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist())):
                row.ids.append(token)
                row.logprobs.append(logprob)
                full = step + 1 == sampling.max_new_tokens or len(row.prompt) + step + 1 >= limit
                reason = "eos" if token in eos else "stop" if token in stop else "length" if full else None
                piece = ""
                if row.text is not None:
                    piece = row.text.put(token, last=reason is not None)
                    if row.text.stopped:
                        reason = "stop"
                if reason:
                    finished.append(i)
                news.append(Token(row.index, token, logprob, piece, reason))
            yield news
            if len(finished) == len(rows):
                return
            if finished:
                keep = list(range(len(rows)))
                for i in reversed(finished):  # from the end, so that the row moved in is one that goes on
                    cache.drop(i)
                    keep[i] = keep[-1]
                    keep.pop()
                rows = [rows[i] for i in keep]
                index = torch.tensor(keep, device=device)
                tokens, seeds, numbers = tokens[index], seeds[index], numbers[:, index]
                seen = None if seen is None else seen[index]
            logits = self.decode(tokens, cache)

    def generate(self, prompts: list[list[int]], tokenizer=None, **settings) -> list[Completion]:
        """All answers, those of one prompt together: a, a, b, b. With a tokenizer they carry their text."""
        prompts = [list(p) for p in prompts]
        N = Sampling.of(settings).num_return_sequences
        found = [([], [], []) for _ in range(len(prompts) * N)]
        reasons = [""] * len(found)
        for news in self.steps(prompts, tokenizer, **settings):
            for new in news:
                ids, logprobs, pieces = found[new.index]
                ids.append(new.token)
                logprobs.append(new.logprob)
                pieces.append(new.piece)
                if new.finish_reason:
                    reasons[new.index] = new.finish_reason
        return [
            Completion(
                prompt_index=i // N,
                ids=ids,
                logprobs=torch.tensor(logprobs, dtype=torch.float32),
                finish_reason=reason,
                num_prompt_tokens=len(prompts[i // N]),
                text=None if tokenizer is None else "".join(pieces),
            )
            for i, ((ids, logprobs, pieces), reason) in enumerate(zip(found, reasons))
        ]

    def stream(self, prompt: list[int], tokenizer, **settings) -> Iterator[str]:
        """Pieces of the answer to one prompt, whole characters only."""
        if Sampling.of(settings).num_return_sequences != 1:
            raise ValueError("stream gives one answer: num_return_sequences must be 1")
        for (new,) in self.steps([prompt], tokenizer, **settings):
            if new.piece:
                yield new.piece


def generate(model_or_engine, prompts, tokenizer=None, **settings) -> list[Completion]:
    """`Generator.generate` for one call; keep a Generator when there will be more."""
    engine = model_or_engine if isinstance(model_or_engine, Generator) else Generator(model_or_engine)
    return engine.generate(prompts, tokenizer, **settings)


def stream(model_or_engine, prompt, tokenizer, **settings) -> Iterator[str]:
    """`Generator.stream` for one call."""
    engine = model_or_engine if isinstance(model_or_engine, Generator) else Generator(model_or_engine)
    return engine.stream(prompt, tokenizer, **settings)
