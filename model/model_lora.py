"""LoRA: a frozen matrix learns a low-rank correction (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = x W^T + s (x A^T) B^T        A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) with rslora

W stays as it is; A starts random and B at zero, so that training begins exactly at the base model. Section
4.1 of the paper; rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732; DoRA, which also learns the
length of every row of W: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5.

    adapters = add_lora(model, LoRAConfig(rank=8, alpha=16))     # freezes the model, except the adapters
    state = lora_state(model)                                    # what a file of adapters holds
    apply_lora(model, state, config, scale=0.5)                  # for inference; another name: adds itself
    with scaled(model, 0.0): ...                                 # switched off
    merge_lora(model)                                            # W + s B A, the adapters are gone

An adapted layer is a `Linear` that holds the very weight it had, under the same name: a state dict is the
base's plus `....q_proj.lora.<name>.A` and `.B`.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.model_minimind import Linear

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """rank r; alpha; dropout on what A reads; targets: names of linear layers, `q_proj` (in every layer) or
    `model.layers.0.self_attn.q_proj` (there only)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ALL_LINEARS

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """A and B of one layer, and with DoRA the length m (out,) of every row of the adapted matrix."""

    def __init__(self, weight: torch.Tensor, config: LoRAConfig):
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.strength = 1.0  # of the whole correction, for inference; see `scaled`
        self.A = nn.Parameter(weight.new_empty(config.rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))
        bound = 1 / math.sqrt(weight.shape[1])  # Kaiming-uniform with a = sqrt(5), as nn.Linear
        nn.init.uniform_(self.A, -bound, bound)
        self.m = nn.Parameter(row_lengths(weight.detach())) if config.dora else None

    def change(self) -> torch.Tensor:
        """s B A, (out, in), in the type of the weights whatever autocast says."""
        with torch.autocast(self.A.device.type, enabled=False):
            return self.scale * self.B @ self.A

    def delta(self, x: torch.Tensor, base: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to base = x W^T. x (..., in), base (..., out), weight W (out, in)."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        y = F.linear(F.linear(x, self.A), self.B) * self.scale
        if self.m is not None:
            # g (W + sBA) x - W x; the length is a constant for the gradient (section 4.3 of the paper)
            g = self.m / row_lengths((weight + self.change()).detach())
            y = ((g - 1) * base + g * y).to(base.dtype)
        return y * self.strength if self.strength != 1.0 else y

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The same as a change of W: (out, in)."""
        change = self.change()
        if self.m is not None:
            adapted = weight + change
            change = (self.m / row_lengths(adapted.detach()))[:, None] * adapted - weight
        return change * self.strength


def row_lengths(matrix: torch.Tensor) -> torch.Tensor:
    """(rows,), never 0: an expert that nobody visited may still have rows of zeros, and 0 / 0 is NaN."""
    return torch.linalg.vector_norm(matrix, dim=1).clamp(min=torch.finfo(matrix.dtype).tiny)


class LoRALinear(Linear):
    """A linear layer with adapters: it takes over the weight of the layer whose place it takes."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.plain = type(linear)
        self.lora = nn.ModuleDict()
        self.train(linear.training)

    def forward(self, x):
        base = self.plain.forward(self, x)
        y = base
        for adapter in self.lora.values():
            y = y + adapter.delta(x, base, self.weight)
        return y

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped, so that no single matrix stands for this layer."""
        return self.training and any(adapter.dropout for adapter in self.lora.values())

    def full_weight(self) -> torch.Tensor:
        """W with all corrections, (out, in): for who multiplies by the matrix without calling the layer."""
        return self.weight + sum(adapter.matrix(self.weight) for adapter in self.lora.values())


# ------------------------------------------------------------------------------------------------------------
# Adding and finding
# ------------------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def matching_layers(model: nn.Module, targets) -> list[str]:
    """Full names of the linear layers that `targets` mean. Raises ValueError for a target that means none, or
    the head of a model whose head is its embedding."""
    layers, found = linear_layers(model), []
    for target in targets:
        names = [name for name in layers if name == target or name.endswith("." + target)]
        if not names:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            raise ValueError(f"no linear layer is called {target!r}; this model has {known}")
        found += names
    if "lm_head" in found and model.config.tie_word_embeddings:
        raise ValueError(
            "lm_head shares its matrix with the embedding in this model, so an adapter would change both: "
            "leave it out, or use a model with --tie_word_embeddings 0"
        )
    return [name for name in layers if name in set(found)]


def check_stacking(layer: nn.Linear, name: str, config: LoRAConfig):
    """Raises ValueError where an adapter cannot join those that the layer has."""
    there = list(getattr(layer, "lora", {}).values())
    if there and (config.dora or any(adapter.m is not None for adapter in there)):
        raise ValueError(f"{name}: an adapter with DoRA rescales the whole matrix, so it cannot be stacked")


def attach(model: nn.Module, name: str, config: LoRAConfig, adapter_name: str) -> Adapter:
    """Give the layer `name` an adapter; the layer is replaced by a LoRALinear at the first one."""
    parent, _, last = name.rpartition(".")
    parent = model.get_submodule(parent)
    layer = getattr(parent, last)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer)
        setattr(parent, last, layer)
    check_stacking(layer, name, config)
    if adapter_name in layer.lora:
        raise ValueError(f"{name} already has an adapter called {adapter_name!r}: give this one another name")
    layer.lora[adapter_name] = Adapter(layer.weight, config).train(layer.training)
    return layer.lora[adapter_name]


def add_lora(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> list[str]:
    """Freeze the model and add trainable adapters; returns the names of the adapted layers. Raises ValueError
    when `config.targets` match nothing."""
    names = matching_layers(model, config.targets)
    model.requires_grad_(False)
    for name in names:
        attach(model, name, config, adapter_name)
    return names


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters by their full name (`model.layers.0.self_attn.q_proj.lora.default`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def relative_sizes(model: nn.Module) -> list[float]:
    """|s B A| / |W| of every adapted layer: how far training has moved it."""
    return [
        (
            sum(a.matrix(layer.weight) for a in layer.lora.values()).norm()
            / layer.weight.norm().clamp(min=1e-12)
        ).item()
        for layer in model.modules()
        if isinstance(layer, LoRALinear)
    ]


# ------------------------------------------------------------------------------------------------------------
# State, inference, merging
# ------------------------------------------------------------------------------------------------------------


def lora_state(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """`{"model.layers.0.self_attn.q_proj.lora.A": ..., "....lora.B": ...}` of one adapter."""
    mark = f".lora.{adapter_name}."
    return {name.replace(mark, ".lora."): p for name, p in model.named_parameters() if mark in name}


def apply_lora(model, state: dict, config: LoRAConfig, adapter_name: str = "default", scale: float = 1.0):
    """Add a trained adapter, for inference. Raises ValueError with one sentence when it does not fit."""
    parts: dict[str, dict] = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".lora.")
        parts.setdefault(layer, {})[part] = tensor
    layers, advice = linear_layers(model), "use it with the base it was trained on"
    for layer, tensors in parts.items():
        if layer not in layers:
            raise ValueError(f"the adapter changes {layer}, which this model does not have: {advice}")
        wanted = {
            "A": (config.rank, layers[layer].in_features),
            "B": (layers[layer].out_features, config.rank),
        }
        if config.dora:
            wanted["m"] = (layers[layer].out_features,)
        shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        if shapes != wanted:
            raise ValueError(
                f"the adapter of {layer} has the shapes {shapes}, this model wants {wanted}: {advice}"
            )
    for layer in parts:
        check_stacking(layers[layer], layer, config)
    for layer, tensors in parts.items():
        adapter = attach(model, layer, config, adapter_name)
        adapter.strength = scale
        with torch.no_grad():
            for part, tensor in tensors.items():
                getattr(adapter, part).copy_(tensor)
        adapter.requires_grad_(False)
    return model


@contextlib.contextmanager
def scaled(model: nn.Module, strength: float, adapter_name: str | None = None):
    """Within it, adapters (one, or all) count `strength` times; 0 = the base model, bit for bit."""
    chosen = [a for name, a in adapters(model).items() if adapter_name in (None, name.rsplit(".", 1)[-1])]
    before = [adapter.strength for adapter in chosen]
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    kept = [layer.lora for layer in layers]
    for adapter in chosen:
        adapter.strength = strength
    if strength == 0.0:  # x + 0 is x, but -0.0 + 0.0 is not -0.0, and zeros cost time
        for layer in layers:
            off = {n: a for n, a in layer.lora.items() if a not in chosen}
            layer.lora = nn.ModuleDict(off)
    try:
        yield model
    finally:
        for layer, lora in zip(layers, kept):
            layer.lora = lora
        for adapter, value in zip(chosen, before):
            adapter.strength = value


@torch.no_grad()
def merge_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """Add all corrections to the weights, in float32 and rounded once, and remove the adapters. Returns the
    weights as they were, for `unmerge`: subtracting would not restore them exactly."""
    before = {}
    for name, layer in list(linear_layers(model).items()):
        if not isinstance(layer, LoRALinear):
            continue
        before[name] = layer.weight.detach().clone()
        weight = layer.weight.float()
        change = sum(adapter.float().matrix(weight) for adapter in layer.lora.values())
        layer.weight.copy_(weight + change)
        plain = layer.plain(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return before


@torch.no_grad()
def unmerge(model: nn.Module, before: dict[str, torch.Tensor]):
    """The base weights again, bit for bit."""
    layers = linear_layers(model)
    for name, weight in before.items():
        layers[name].weight.copy_(weight)
