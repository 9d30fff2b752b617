"""Optimizers and schedules: Muon for the hidden matrices, AdamW for everything else, or AdamW for all.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix
by the nearest matrix with orthonormal rows or columns, so that every direction of the matrix learns at the
same speed. On small language models it reaches a given loss in roughly 40 % of AdamW's steps. Embeddings, the
tied head, the router of a mixture and all vectors are not maps between hidden spaces; they stay with AdamW.

Schedules are pure functions of the optimizer step, so resuming needs no scheduler state.
"""

import math
from collections import defaultdict

import torch

# Coefficients (a, b, c) of each step of `orthogonalise`.
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # as Muon was published: singular values end in 0.7 ... 1.2
# The best three quintics in a row for singular values in [0.01, 1]: they end in 0.73 ... 1.27. Each minimises
# the greatest distance to 1 over what the step before leaves (Polar Express, Amsel et al. 2025,
# https://arxiv.org/abs/2505.16932). About as exact as the five steps above, for three fifths of the products.
THREE_STEPS = (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)


def orthogonalise(matrices: torch.Tensor, coefficients=THREE_STEPS, scale: float = 1.0) -> torch.Tensor:
    """`scale` times the approximate U V^T of G = U S V^T, for a stack of matrices (n, rows, cols), in the
    dtype given.

    Newton-Schulz iteration on the shorter side, here for a wide matrix: each step X <- P X with
    P = a I + b A + c A^2, A = X X^T maps every singular value s to a s + b s^3 + c s^5, towards 1. Near 1 is
    exact enough, and it needs only matrix products. In float32 the factors P are multiplied with each other
    first and meet the long side of X once, at the end: A of the next step is P A P. In bfloat16 that would
    lose the small singular values, of which A holds the squares.
    """
    X, tall = matrices, matrices.shape[-2] > matrices.shape[-1]
    factors_first = X.dtype == torch.float32
    if not factors_first:
        X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)

    def times(P, X):
        return X @ P if tall else P @ X  # P is symmetric

    A = P = product = None
    for a, b, c in coefficients:
        if product is not None:
            A = P @ A @ P
        else:
            A = X.mT @ X if tall else X @ X.mT
            if factors_first:  # X itself is divided by its norm at the end
                norm = A.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None] + 1e-7
                A = A / norm**2
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        if factors_first:
            product = P if product is None else P @ product
        else:
            X = times(P, X)
    return times(product * (scale / norm), X) if factors_first else X.mul_(scale)


def blocks_of(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """A view of a matrix (rows, cols), cut along its shorter side: (n, block, cols), or (n, rows, block) if
    it is tall; block 0, or one that does not divide the side: the whole matrix, n = 1."""
    rows, cols = matrix.shape
    if not block or min(rows, cols) % block:
        block = min(rows, cols)
    if rows > cols:
        return matrix.unflatten(1, (-1, block)).transpose(0, 1)
    return matrix.unflatten(0, (-1, block))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of equal shape are orthogonalised as one batch.

    buf <- lerp(buf, g, 1 - momentum); u = lerp(g, buf, momentum) (Nesterov);
    W <- W (1 - lr * weight_decay) - lr * sqrt(max(1, rows / cols)) * orthogonalise(u).

    block: orthogonalise blocks of so many rows (columns if the matrix is tall) by themselves, as MuonBP does
    between its full steps (Khaled et al. 2025, https://arxiv.org/abs/2510.16981), which costs a fraction;
    0 = whole matrices.
    """

    def __init__(
        self,
        params,
        lr=0.02,
        momentum=0.95,
        weight_decay=0.0,
        ns_dtype=torch.float32,
        coefficients=THREE_STEPS,
        block=0,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.ns_dtype, self.coefficients, self.block = ns_dtype, coefficients, block
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices only, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self.update(params, shape, group)

    def update(self, params, shape, group):
        momentum, decay = group["momentum"], 1 - group["lr"] * group["weight_decay"]
        scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        size = blocks_of(params[0], self.block).shape
        stack = torch.empty(len(params), *size, dtype=self.ns_dtype, device=params[0].device)
        for p, u in zip(params, stack):  # one by one: the second look at a matrix finds it in the cache
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buf = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            grad, buf = blocks_of(p.grad, self.block), blocks_of(buf, self.block)
            torch.lerp(grad, buf, momentum, out=u) if u.dtype == p.dtype else u.copy_(
                grad.lerp(buf, momentum)
            )
        stack = orthogonalise(stack.flatten(0, 1), self.coefficients, -scale).view_as(stack)
        for p, u in zip(params, stack):
            blocks = blocks_of(p, self.block)
            torch.add(u, blocks, alpha=decay, out=blocks)


def split_parameters(model) -> tuple[list, list, list]:
    """(hidden matrices, other matrices, vectors), each tensor once: a tied head counts as its embedding.

    Hidden matrices map hidden space to hidden space inside a block; the router of a mixture is not one of
    them.
    """
    hidden, other, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif ".layers." in f".{name}" and not name.endswith("mlp.gate.weight"):
            hidden.append(p)
        else:
            other.append(p)
    return hidden, other, vectors


def build_optimizers(
    model,
    name: str = "muon",
    learning_rate: float = 3e-3,
    muon_lr: float = 0.02,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    muon_momentum: float = 0.95,
    muon_block: int = 0,
    ns_dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """`muon`: [AdamW for embeddings, head, router and vectors; Muon for hidden matrices]; `adamw`: [AdamW for
    all].

    Weight decay falls on hidden matrices only. Every group keeps its peak rate as "base_lr", see `set_lr`.
    """
    hidden, other, vectors = split_parameters(model)
    if name == "muon":
        groups = [dict(params=other + vectors, weight_decay=0.0)]
        settings = dict(weight_decay=weight_decay, ns_dtype=ns_dtype, block=muon_block)
        muon = [Muon(hidden, muon_lr, muon_momentum, **settings)] if hidden else []
    elif name == "adamw":
        groups = [
            dict(params=hidden, weight_decay=weight_decay),
            dict(params=other + vectors, weight_decay=0.0),
        ]
        muon = []
    else:
        raise ValueError(f"unknown optimizer {name!r}: choose muon or adamw")
    groups = [g for g in groups if g["params"]]
    device = next(model.parameters()).device.type
    fused = device in ("cuda", "cpu")
    adamw = (
        [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)] if groups else []
    )
    optimizers = [*adamw, *muon]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers, factor: float) -> float:
    """Set every group to its peak rate times `factor`; returns the first group's rate, for the log."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return optimizers[0].param_groups[0]["lr"]


def lr_factor(
    step: int,
    total_steps: int,
    schedule: str = "wsd",
    warmup_steps: int | None = 0,
    decay_fraction: float = 0.7,
    min_factor: float = 0.0,
) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total_steps`.

    wsd: warm-up, constant, then linear to min_factor over the last `decay_fraction` of the run;
    cosine: warm-up, then half a cosine to min_factor; linear: warm-up, then a straight line to min_factor;
    constant: warm-up only. Beyond the end the last value holds (it does not rise again). warmup_steps None:
    10, at most a quarter of the run.
    """
    if warmup_steps is None:
        warmup_steps = min(10, total_steps // 4)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    span = max(1, total_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - (1 - min_factor) * progress
    if schedule == "wsd":
        decay_steps = max(1, round(total_steps * decay_fraction))
        into_decay = step - (total_steps - decay_steps)
        return 1.0 if into_decay <= 0 else 1 - (1 - min_factor) * min(1.0, into_decay / decay_steps)
    raise ValueError(f"unknown schedule {schedule!r}: choose wsd, cosine, linear or constant")
