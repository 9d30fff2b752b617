"""The whole model in one file: a decoder-only transformer, dense or mixture-of-experts.

    x = x + Attention(RMSNorm(x))          grouped-query attention, rotary positions, optional QK-norm
    x = x + FeedForward(RMSNorm(x))        SwiGLU, or a mixture of SwiGLU experts

Dense without QK-norm it is the Llama block, with QK-norm the Qwen3 block, with experts the Qwen3-MoE block;
parameter names are theirs, so their checkpoints load strictly and ours open in their classes. MiniMind's
released `.pth` files (both generations) load as they are.

Dimensions in comments: B rows, T positions, S cached + new positions, V vocabulary, D hidden, H query heads,
K key/value heads, R = H / K, E experts, N = B * T tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from model import precision

# ------------------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------------------

PRESETS = {
    # For a laptop CPU: the embedded curriculum in minutes.
    "tiny": dict(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
        qk_norm=True,
    ),
    "minimind2-small": dict(hidden_size=512, num_hidden_layers=8),  # 25,829,888 parameters
    "minimind2-moe": dict(hidden_size=640, num_hidden_layers=8, use_moe=True),  # 145,029,760
    "minimind2": dict(hidden_size=768, num_hidden_layers=16),  # 104,030,976
    "minimind-3": dict(  # 63,912,192
        hidden_size=768,
        num_hidden_layers=8,
        num_key_value_heads=4,
        intermediate_size=2432,
        rms_norm_eps=1e-6,
        qk_norm=True,
    ),
    "minimind-3-moe": dict(  # 198,416,640, of which 63,936,768 work on a token
        hidden_size=768,
        num_hidden_layers=8,
        num_key_value_heads=4,
        intermediate_size=2432,
        rms_norm_eps=1e-6,
        qk_norm=True,
        use_moe=True,
        num_experts_per_tok=1,
        n_shared_experts=0,
        router_aux_loss_coef=1e-3,
    ),
}


class MiniMindConfig(PretrainedConfig):
    """Every architectural choice; `MiniMindConfig.from_preset("minimind-3", hidden_size=128)` starts from a
    known one.

    Args:
        hidden_size: width D.
        num_hidden_layers: number of blocks.
        num_attention_heads, num_key_value_heads: H and K; H must be a multiple of K.
        head_dim: size of one head; default hidden_size / num_attention_heads.
        intermediate_size: width of the SwiGLU; default 8/3 * hidden_size rounded up to a multiple of 64.
        qk_norm: RMSNorm on each query and key head before the rotation (Qwen3).
        rope_theta: base of the rotary frequencies.
        rope_parameters: transformers' dictionary, e.g. {"rope_type": "yarn", "factor": 16.0, ...}; wins over
            rope_theta.
        original_max_position_embeddings: the longest length the weights were trained at without YaRN; the
            stages write it.
        inference_rope_scaling, yarn_factor: True = YaRN: the positions of that length are stretched by the
            factor.
        residual_init: "zero" starts o_proj and down_proj at 0 (each block starts as the identity) and v_proj
            at a fifth, "scaled" draws o_proj and down_proj with std 0.02 / sqrt(2 * layers), "normal" with
            std 0.02.
        use_moe, num_experts, num_experts_per_tok, n_shared_experts, moe_intermediate_size, norm_topk_prob,
            router_aux_loss_coef: the mixture-of-experts feed-forward.
        dropout: on the embedding and both residual branches, in training.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 6400,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        original_max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        qk_norm: bool = False,
        rope_theta: float = 1e6,
        rope_parameters: dict | None = None,
        inference_rope_scaling: bool = False,
        yarn_factor: float = 16.0,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        residual_init: str = "zero",
        dropout: float = 0.0,
        use_moe: bool = False,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        n_shared_experts: int = 1,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = True,
        router_aux_loss_coef: float = 1e-2,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 64 * math.ceil(int(hidden_size * 8 / 3) / 64)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.original_max_position_embeddings = original_max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.qk_norm = qk_norm
        self.inference_rope_scaling, self.yarn_factor = inference_rope_scaling, yarn_factor
        scaling = kwargs.pop("rope_scaling", None)  # the older spelling of the same dictionary
        rope = dict(rope_parameters or scaling or {})
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        rope["rope_theta"] = float(rope.get("rope_theta", rope_theta))
        self.rope_theta = rope["rope_theta"]
        self.rope_parameters = rope
        if rope["rope_type"] != "default":  # which names its length itself, or else means this one
            length = rope.setdefault("original_max_position_embeddings", original_max_position_embeddings)
            self.original_max_position_embeddings = length
        if inference_rope_scaling and rope["rope_type"] == "default":
            self.stretch_positions()
        self.initializer_range = initializer_range
        self.residual_init = residual_init
        self.dropout = dropout
        self.use_moe = bool(use_moe)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.router_aux_loss_coef = router_aux_loss_coef
        self.use_cache = use_cache
        self._validate()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _validate(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even: the rotation works on pairs of numbers"
            )
        if self.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not supported: the feed-forward is SwiGLU (silu)"
            )
        if self.residual_init not in ("zero", "scaled", "normal"):
            raise ValueError(f"residual_init must be zero, scaled or normal, not {self.residual_init!r}")
        if not 1 <= self.yarn_factor <= 1024:
            raise ValueError(f"yarn_factor ({self.yarn_factor:g}) must lie between 1 and 1024")
        k, num_experts = self.num_experts_per_tok, self.num_experts
        if self.use_moe and not 1 <= k <= num_experts:
            raise ValueError(f"num_experts_per_tok ({k}) must lie in 1..num_experts ({num_experts})")

    def stretch_positions(self):
        """YaRN from now on: `original_max_position_embeddings` positions are stretched by `yarn_factor`."""
        self.inference_rope_scaling = True
        rope = yarn_defaults(self.original_max_position_embeddings, self.yarn_factor)
        self.rope_parameters = rope | {"rope_theta": self.rope_theta}
        self.max_position_embeddings = int(self.original_max_position_embeddings * self.yarn_factor)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MiniMindConfig":
        """A named configuration with some fields replaced. Raises ValueError on an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))


def yarn_defaults(original_max_position_embeddings: int = 2048, factor: float = 16.0) -> dict:
    """The YaRN dictionary of the MiniMind family: attention_factor 1.0 means no temperature (the paper's own
    value is 0.1 ln(factor) + 1)."""
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }


# ------------------------------------------------------------------------------------------------------------
# Rotary positions
# ------------------------------------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, rope_parameters: dict) -> tuple[torch.Tensor, float]:
    """Angular frequencies (head_dim / 2,) float32 and the factor that multiplies cos and sin.

    default: theta_j = base^(-2j/d). yarn (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2,
    with the ramp over the dimension index of the authors' released code, not over the wavelength as printed):
    frequencies that turn more than beta_fast times within the original context stay, those that turn less
    than beta_slow times are divided by `factor`, in between a linear ramp. Without attention_factor the
    temperature 0.1 ln(factor) + 1 applies.

    llama3: the same with a ramp over the number of turns, from low_freq_factor to high_freq_factor, without
    temperature (Llama 3.1; read by us to run such weights).
    """
    base = rope_parameters["rope_theta"]
    freqs = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    kind = rope_parameters.get("rope_type", "default")
    if kind == "default":
        return freqs, 1.0
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported: use default, yarn or llama3")
    factor = rope_parameters["factor"]
    original = rope_parameters["original_max_position_embeddings"]
    if kind == "llama3":
        turns = original * freqs / (2 * math.pi)
        slow, fast = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
        ramp = ((turns - slow) / (fast - slow)).clamp(0, 1)
        return freqs * ramp + freqs / factor * (1 - ramp), 1.0

    def dimension_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_that_turns(rope_parameters.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(dimension_that_turns(rope_parameters.get("beta_slow") or 1.0)), head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    attention_factor = rope_parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return freqs * (1 - ramp) + freqs / factor * ramp, attention_factor


class RotaryTable:
    """cos and sin of every position, (P, head_dim) float32 with both halves alike, built from the
    configuration on first use. A plain object, not a module buffer: a model created on the meta device has
    nothing stale to load."""

    def __init__(self, config: MiniMindConfig):
        self.config = config
        self.tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self.tables or self.tables[device][0].shape[0] < length:
            freqs, factor = rope_frequencies(self.config.head_dim, self.config.rope_parameters)
            size = max(1 << (length - 1).bit_length(), min(self.config.max_position_embeddings, 32768))
            positions = torch.arange(size, dtype=torch.float32)
            angles = torch.outer(positions, freqs)  # float32: bf16 positions collide past 256
            angles = torch.cat((angles, angles), dim=-1)
            self.tables[device] = ((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))
        return self.tables[device]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (x_j, x_{j + d/2}) by their angle (RoFormer, https://arxiv.org/abs/2104.09864, half-split
    layout). x (B, T, heads, head_dim); cos, sin (B, T, 1, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ------------------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), statistics in float32, rounded before the weight as Qwen3 and Llama
    do (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class Linear(nn.Linear):
    """The linear layer of the blocks: `nn.Linear`, or products of 8-bit integers while training under
    `precision.integer_products`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if precision.in_integers and torch.is_grad_enabled() and x.numel():
            return precision.IntegerLinear.apply(x, self.weight)
        return F.linear(x, self.weight, self.bias)


def matrix_of(linear: nn.Linear) -> torch.Tensor:
    """The matrix (out, in) that a linear layer multiplies by; of an adapted one (model_lora.py) with its
    adapters."""
    return linear.full_weight() if hasattr(linear, "full_weight") else linear.weight


BLOCK = 128  # query rows per block of `blocked_attention`


class BlockBiases:
    """The tensors of `block_biases`, in an object into which torch.compile does not look: for a list it would
    make new code for every length."""

    def __init__(self, blocks: list[torch.Tensor]):
        self.blocks = blocks


def block_biases(T: int, document_ids: torch.Tensor | None, dtype: torch.dtype, device) -> BlockBiases:
    """What `blocked_attention` adds to the scores of a block of query rows: 0 = may look, -inf = may not.

    One (B or 1, 1, rows, 1, keys) tensor per block, made once per forward pass and shared by all layers.
    document_ids (B, T): a position sees only its own document; None: plain causal.
    """
    slots = torch.arange(T, device=device)
    biases = []
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        visible = (slots[:end] <= slots[start:end, None])[None]
        if document_ids is not None:
            visible = visible & (document_ids[:, start:end, None] == document_ids[:, None, :end])
        bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
        biases.append(bias[:, None, :, None, :])
    return BlockBiases(biases)


@torch.compiler.disable  # torch 2.13 compiles its bfloat16 backward into NaN on some CPUs
def blocked_attention(q, k, v, biases: BlockBiases) -> torch.Tensor:
    """Causal attention as plain matrix products over blocks of query rows, each against the keys up to its
    end.

    For training on CPUs: the fused kernel's backward is slow there, and this computes only the lower half of
    the scores. q (B, T, H, hd), k, v (B, T, K, hd), biases from `block_biases` -> (B, T, H, hd).
    """
    B, T, H, hd = q.shape
    K = k.shape[2]
    R = H // K
    q = (q * hd**-0.5).view(B, T, K, R, hd).transpose(1, 2).reshape(B, K, T * R, hd)
    k = k.permute(0, 2, 3, 1).contiguous()  # (B, K, hd, T)
    v = v.transpose(1, 2).contiguous()  # (B, K, T, hd)
    outputs = []
    for i, bias in enumerate(biases.blocks):
        start, rows, end = i * BLOCK, bias.shape[2], bias.shape[4]
        scores = q[:, :, start * R : end * R] @ k[..., :end]  # (B, K, rows * R, end)
        scores = scores.view(B, K, rows, R, end) + bias
        weights = torch.softmax(scores, dim=-1)  # accumulates in float32 inside
        outputs.append(weights.view(B, K, rows * R, end) @ v[:, :, :end])
    out = torch.cat(outputs, dim=2).view(B, K, T, R, hd)
    return out.transpose(1, 2).reshape(B, T, H, hd)


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Block-diagonal causal mask (B, 1, T, T) bool, True = may look, from document numbers (B, T)."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def attention(q, k, v, mask) -> torch.Tensor:
    """Scaled dot-product attention. q (B, T, H, hd), k, v (B, S, K, hd) -> (B, T, H, hd).

    mask None: causal over T = S positions; BlockBiases: see `blocked_attention`; else (B or 1, 1, T, S) bool,
    True = may look.
    """
    if isinstance(mask, BlockBiases):
        return blocked_attention(q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245): key/value head g
    serves query heads g*R ... g*R + R - 1. With qk_norm, queries and keys are normalised per head before the
    rotation."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(D, H * self.head_dim, bias=False)
        self.k_proj = Linear(D, K * self.head_dim, bias=False)
        self.v_proj = Linear(D, K * self.head_dim, bias=False)
        self.o_proj = Linear(H * self.head_dim, D, bias=False)
        self.v_proj.is_value = self.o_proj.writes_residual = True  # see MiniMindLM._init_weights
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, cos, sin, mask=None, cache: Cache | None = None):
        """x (B, T, D) -> (B, T, D); cos, sin (B, T, 1, head_dim); mask: see `attention`. A cache receives the
        rotated keys and the values as (B, K, T, head_dim) and returns all of them."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return self.o_proj(attention(q, k, v, mask).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.down_proj.writes_residual = True

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def route(logits: torch.Tensor, k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose k experts per token. logits (N, E) -> probabilities (N, E), weights (N, k), experts (N, k);
    float32.

    With k = 1 a normalised weight is the constant 1, and the router would learn nothing from the language
    loss. Its value stays 1, as the checkpoints expect, but the gradient is that of the unnormalised
    probability (as in Switch Transformer, https://arxiv.org/abs/2101.03961): a straight-through estimate.
    """
    probs = torch.softmax(logits.float(), dim=-1)
    weights, experts = probs.topk(k, dim=-1)
    if normalise and k == 1:
        weights = 1.0 + (weights - weights.detach())
    elif normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return probs, weights, experts


def balance_loss(probs: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """E * sum_e f_e P_e of one layer: f_e = choices of expert e per valid token (no gradient), P_e = its mean
    probability. Exactly k when the load is even (Switch Transformer eq. 4, for top-k).
    probs (N, E), experts (N, k), valid (N,) 1/0 or None."""
    E = probs.shape[-1]
    chosen = F.one_hot(experts, E).sum(dim=1).to(probs.dtype)  # (N, E)
    if valid is None:
        return E * (chosen.mean(0) * probs.mean(0)).sum()
    valid = valid.to(probs.dtype)[:, None]
    count = valid.sum().clamp(min=1)
    return E * ((chosen * valid).sum(0) / count * ((probs * valid).sum(0) / count)).sum()


class MoEFeedForward(nn.Module):
    """A softmax router sends each token to `num_experts_per_tok` SwiGLU experts; shared experts see every
    token.

    No token is dropped: the (token, expert) pairs are sorted by expert, each expert multiplies its slice
    once, and the results are added back. All experts' weights enter the graph in every step, so an expert
    without tokens receives a zero gradient and distributed training does not wait for it.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        D, width = config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(D, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(D, width) for _ in range(config.num_experts))
        if config.n_shared_experts > 0:
            self.shared_experts = nn.ModuleList(FeedForward(D, width) for _ in range(config.n_shared_experts))
        self.has_shared = config.n_shared_experts > 0

    def stacked(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One projection of all experts, (E, in, out), ready for a grouped product."""
        return torch.stack([matrix_of(getattr(e, name)).to(dtype) for e in self.experts]).transpose(1, 2)

    def forward(self, x, valid=None):
        """x (B, T, D) -> output (B, T, D), balance loss (scalar), expert load (E,) = share of choices."""
        flat = x.reshape(-1, x.shape[-1])
        router_logits = F.linear(flat.float(), matrix_of(self.gate).float())  # routing decisions in float32
        probs, weights, experts = route(router_logits, self.top_k, self.norm_topk_prob)
        choices = experts.reshape(-1)  # (N * k,)
        order = torch.argsort(choices, stable=True)
        token = order // self.top_k
        counts = F.one_hot(choices, self.num_experts).sum(0)
        grouped = flat[token]  # (N * k, D), expert after expert
        hidden = F.silu(self.product(grouped, "gate_proj", counts)) * self.product(grouped, "up_proj", counts)
        out = self.product(hidden, "down_proj", counts).float() * weights.reshape(-1)[order][:, None]
        combined = torch.zeros(flat.shape, dtype=torch.float32, device=x.device).index_add(0, token, out)
        y = combined.to(x.dtype)
        if self.has_shared:
            for expert in self.shared_experts:
                y = y + expert(flat)
        aux = balance_loss(probs, experts, None if valid is None else valid.reshape(-1))
        load = counts.float() / counts.sum()
        return y.view_as(x), aux, load

    def product(self, x, name, counts):
        """x (N * k, in) in expert order times each expert's matrix -> (N * k, out)."""
        drops = any(getattr(getattr(e, name), "drops", False) for e in self.experts)  # adapters with dropout
        if x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and not drops:
            weight = self.stacked(name, x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))
        slices = x.split(
            counts.tolist()
        )  # the fallback: one wait for the counts, then one product per expert
        return torch.cat([getattr(e, name)(part) for e, part in zip(self.experts, slices)])


class Block(nn.Module):
    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = (
            MoEFeedForward(config)
            if config.use_moe
            else FeedForward(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout
        self.use_moe = config.use_moe

    def forward(self, x, cos, sin, mask=None, valid=None, cache=None):
        """x (B, T, D) -> x (B, T, D), and for a mixture its balance loss and expert load (else None,
        None)."""
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        h = self.post_attention_layernorm(x)
        if not self.use_moe:
            return x + self.drop(self.mlp(h)), None, None
        y, aux, load = self.mlp(h, valid)
        return x + self.drop(y), aux, load

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


# ------------------------------------------------------------------------------------------------------------
# Loss over the vocabulary
# ------------------------------------------------------------------------------------------------------------

# Positions whose logits exist at the same time: few enough for a CPU's cache, many for a GPU.
LOSS_CHUNK = {"cpu": 128, "other": 4096}
LOSS_ROUND = 128  # their number is rounded up to a multiple of this: few shapes, so kernels are prepared once


def chunk_cross_entropy(hidden, weight, targets):
    """hidden (n, D), weight (V, D), targets (n,) valid ids -> losses (n,) float32 and the gradient of each by
    its logits, softmax - onehot, (n, V) in hidden's dtype."""
    logits = (hidden @ weight.T).float()
    target_logits = logits.gather(1, targets[:, None])
    peak = logits.amax(dim=-1, keepdim=True)
    logits.sub_(peak).exp_()  # in place: this memory is touched often
    total = logits.sum(dim=-1, keepdim=True)
    losses = total.log() + peak - target_logits
    grad = logits.div_(total)
    grad.scatter_add_(1, targets[:, None], torch.full_like(target_logits, -1.0))
    return losses.squeeze(1), grad.to(hidden.dtype)


class LinearCrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], a chunk of positions at a time.

    The gradient by the logits is known as soon as the logits are, so both matrix gradients are taken in the
    forward pass and the (N, V) logits are never kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, num_valid, compute_chunk):
        """targets (N,) may be -100 from position num_valid on (anywhere when num_valid is None)."""
        needs_grad = hidden.requires_grad or weight.requires_grad
        w = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        chunk = LOSS_CHUNK.get(hidden.device.type, LOSS_CHUNK["other"])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, min(start + chunk, hidden.shape[0]))
            losses, grad = compute_chunk(hidden[part], w, targets[part].clamp(min=0))
            if num_valid is None or part.stop > num_valid:
                ignored = targets[part] == -100
                losses = losses.masked_fill(ignored, 0.0)
                grad = grad.masked_fill(ignored[:, None], 0.0)
            total += losses.sum()
            if needs_grad:
                torch.mm(grad, w, out=grad_hidden[part])
                if grad_weight is None:  # a frozen head
                    continue
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[part])
                else:
                    grad_weight += grad.T @ hidden[part]
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        # In float32: beside a bfloat16 tensor a single number would be rounded to bfloat16 too.
        grad_hidden = (grad_hidden.float() * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compute_chunk=chunk_cross_entropy
) -> torch.Tensor:
    """Summed next-token loss without the logits of all positions in memory.

    hidden (N, D), weight (V, D), targets (N,) with -100 = not a target -> float32 scalar; 0 when nothing is a
    target. `compute_chunk` may be a compiled `chunk_cross_entropy`.
    """
    num_valid = None  # on a GPU, finding the targets would make the host wait: compute all, ignore some
    if hidden.device.type == "cpu":
        keep = (targets != -100).nonzero().squeeze(1)  # prompts and padding cost no vocabulary product
        num_valid = keep.numel()
        fill = -num_valid % LOSS_ROUND
        hidden = F.pad(hidden[keep], (0, 0, 0, fill))
        targets = F.pad(targets[keep], (0, fill), value=-100)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearCrossEntropySum.apply(hidden, weight, targets, num_valid, compute_chunk)


# ------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------


class MiniMindModel(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)
        self.run_block = Block.forward  # replaced by its compiled form in `MiniMindLM.compile_blocks`
        self.gradient_checkpointing = False

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None
    ):
        """-> hidden states (B, T, D), balance loss (scalar: mean over layers, not yet multiplied by its
        coefficient, or None), expert load (layers, E) or None. See MiniMindLM.forward for the
        arguments."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        device = x.device
        if torch.is_autocast_enabled(device.type):  # the residual stream travels in the compute dtype
            x = x.to(torch.get_autocast_dtype(device.type))
        B, T, _ = x.shape
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        cos, sin = self.rotary(past + T, device)
        document_ids = None
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:  # left padding shifts the positions
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
                cos, sin = cos[position_ids], sin[position_ids]
            else:
                cos, sin = cos[None, past : past + T], sin[None, past : past + T]
        else:
            if attention_mask is None and past_key_values is None and T > 1:
                document_ids = (position_ids == 0).cumsum(-1).expand(B, T)
            cos, sin = cos[position_ids], sin[position_ids]
        cos, sin = cos.to(x.dtype).unsqueeze(2), sin.to(x.dtype).unsqueeze(2)
        mask = self.build_mask(attention_mask, past_key_values, past, B, T, device)
        if mask is None and device.type == "cpu" and (torch.is_grad_enabled() or document_ids is not None):
            mask = block_biases(T, document_ids, x.dtype, device)
        elif mask is None and document_ids is not None:
            mask = document_mask(document_ids)
        valid = None
        if self.config.use_moe and attention_mask is not None and attention_mask.dim() == 2:
            valid = attention_mask[:, -T:]
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)

        aux_losses, loads = [], []
        for layer in self.layers:
            args = (layer, x, cos, sin, mask, valid, past_key_values)
            if self.gradient_checkpointing and self.training:
                x, aux, load = torch.utils.checkpoint.checkpoint(
                    self.run_block, *args, use_reentrant=False, context_fn=precision.for_both_passes
                )
            else:
                x, aux, load = self.run_block(*args)
            if aux is not None:
                aux_losses.append(aux)
                loads.append(load.detach())
        aux_loss = torch.stack(aux_losses).mean() if aux_losses else None
        return self.norm(x), aux_loss, torch.stack(loads) if loads else None

    def build_mask(self, attention_mask, cache, past, B, T, device):
        """(B or 1, 1, T, S) bool, True = may look; None when plain causal attention over T positions is
        meant.

        Query i sits in slot past + i and sees slots up to its own that hold a real token. A padding row sees
        itself, so that no row of the softmax is empty (an empty row would be NaN).
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        if attention_mask is None and past == 0 and not getattr(cache, "is_compileable", False):
            return None
        slots = past + T
        if cache is not None and getattr(cache, "is_compileable", False):
            slots = cache.get_max_cache_shape()  # a static cache returns all its slots, filled or not
        query = torch.arange(past, past + T, device=device)[:, None]
        key = torch.arange(slots, device=device)[None, :]
        mask = (key <= query)[None, None]
        if attention_mask is not None:
            real = attention_mask.bool()
            if real.shape[1] < slots:
                real = F.pad(real, (0, slots - real.shape[1]), value=False)
            mask = (mask & real[:, None, None, :slots]) | (key == query)
        return mask


class MiniMindLM(nn.Module):
    """The language model, as the training stages and `model/generation.py` use it.

    `MiniMindForCausalLM`, at the end of this file, is the same model as a transformers class.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.build()
        self.apply(self._init_weights)

    def build(self):
        self.model = MiniMindModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.compute_chunk = chunk_cross_entropy

    def _init_weights(self, module):
        std, zero = self.config.initializer_range, self.config.residual_init == "zero"
        if getattr(module, "writes_residual", False) and self.config.residual_init != "normal":
            scaled = std / math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.weight, std=0.0 if zero else scaled)
        elif getattr(module, "is_value", False) and zero:
            # Before attention has learned where to look, a value is a random picture of an average of tokens.
            # The smaller it starts, the sooner what is learned outweighs it, which decides how good a wide
            # model is after its first hundred steps; a narrow one hardly notices.
            nn.init.normal_(module.weight, std=0.2 * std)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def compile_blocks(self, dynamic: bool = False):
        """Compile one block and the loss chunk (torch.compile): every layer shares the code, so this costs
        seconds. dynamic: for batches of any shape."""
        self.model.run_block = torch.compile(Block.forward, dynamic=dynamic)
        self.compute_chunk = torch.compile(chunk_cross_entropy, dynamic=True)
        return self

    def uncompile_blocks(self):
        """Take `compile_blocks` back."""
        self.model.run_block, self.compute_chunk = Block.forward, chunk_cross_entropy

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S) 1/0, padding on either side; not for packed rows.
            position_ids: (B, T). Without mask and cache, a position 0 starts a new document of a packed row:
                attention stays inside it.
            past_key_values: a transformers Cache.
            labels: (B, T), -100 = not a target; position t is scored by the logits at t - 1 (the shift is
                done here).
            num_items_in_batch: the loss is the SUM over targets divided by this count (of the whole optimizer
                step, over micro-batches and processes); default: the targets in this call.
            logits_to_keep: compute logits of the last n positions only (0 = all).
            return_logits: with labels, logits are only computed when asked for.

        Returns:
            loss (float32, without the balance loss), aux_loss (balance loss times its coefficient; None when
            dense), logits (B, T', V), past_key_values, hidden_states = (last,) when asked, router_logits
            holds the expert load (layers, E).
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden, aux_loss, load = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        )
        loss = logits = None
        if labels is not None:
            # Position T - 1 has no target here: moving labels instead of cutting hidden states keeps the
            # shape.
            targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
            if num_items_in_batch is None:
                num_items_in_batch = (targets != -100).sum().clamp(min=1)
            loss = linear_cross_entropy_sum(
                hidden.reshape(-1, hidden.shape[-1]), matrix_of(self.lm_head), targets, self.compute_chunk
            )
            loss = loss / num_items_in_batch
        if labels is None if return_logits is None else return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=None if aux_loss is None else aux_loss * self.config.router_aux_loss_coef,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(hidden,) if output_hidden_states else None,
            router_logits=None if load is None else (load,),
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, parameters that work on one token): they differ for a mixture of experts."""
    total = sum(p.numel() for p in model.parameters())
    config = model.config
    if not config.use_moe:
        return total, total
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.num_experts - config.num_experts_per_tok) * one_expert * config.num_hidden_layers
    return total, total - idle


def flops_per_token(config: MiniMindConfig, seq_len: int, num_active: int) -> float:
    """Training FLOPs per token, forward + backward: 6 per active weight in a matrix product (the tied head
    included, the embedding look-up not) + causal attention 6 * layers * H * head_dim * seq_len (half of the
    full square)."""
    matmul_params = num_active - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6.0 * matmul_params + attention


def __getattr__(name: str):
    """`MiniMindForCausalLM` is made when somebody asks for it: transformers' modelling code takes as long to
    import as torch, and training does not need it."""
    if name == "MiniMindForCausalLM":
        from model.hf_minimind import MiniMindForCausalLM

        return MiniMindForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
