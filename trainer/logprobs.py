"""Log-probabilities of tokens, and losses over the vocabulary, without the logits of all positions in memory.

A vocabulary of 6,400 costs 25 kB per position in float32, and every stage beyond fine-tuning wants more than
the summed cross-entropy: the log-probability of each token (DPO, RL), or a comparison of two distributions
(distillation). Both go through the head a chunk of positions at a time, in float32, whatever the compute type
of the model is.

    hidden, head = hidden_states(model, batch), model.lm_head.weight
    keep, targets = answer_positions(batch["labels"])               # where something is learned, and what
    logps = token_logprobs(hidden[keep], head, targets)             # (n,)
    sums = linear_loss_sum(hidden[keep], head, chunk_loss, targets) # summed loss of a function of logits
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = {"cpu": 128, "other": 2048}  # positions whose logits exist at the same time
IGNORE = -100


def hidden_states(model, batch: dict) -> torch.Tensor:
    """Final hidden states (R * T, D) of a batch, through whatever wrapper `model` is, and its balance loss
    (None when dense)."""
    out = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        output_hidden_states=True,
        return_logits=False,
    )
    return out.hidden_states[0].flatten(0, 1), out.aux_loss


def next_of(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """(R, T) -> (R * T,): for every position what belongs to the token after it. The shift is done here and
    nowhere else."""
    return F.pad(values[:, 1:], (0, 1), value=fill).flatten()


def answer_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labels (R, T), -100 = not a target -> (flat positions whose NEXT token is a target (n,), those tokens
    (n,))."""
    targets = next_of(labels, IGNORE)
    keep = (targets != IGNORE).nonzero().squeeze(1)
    return keep, targets[keep]


def full_precision(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def chunks(hidden: torch.Tensor):
    size = CHUNK.get(hidden.device.type, CHUNK["other"])
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight^T)[target], chunk by chunk. The backward pass computes the logits once
    more: by then each position has a gradient of its own, and keeping its softmax would cost what chunks
    save."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_entropy):
        ctx.save_for_backward(hidden, weight, targets)
        w = weight.to(hidden.dtype)
        empty = full_precision(hidden).new_zeros(0)
        logps, entropies = [empty], [empty]
        for part in chunks(hidden):
            logits = full_precision(hidden[part] @ w.T)
            total = logits.logsumexp(-1)
            logps.append(logits.gather(1, targets[part, None]).squeeze(1) - total)
            if with_entropy:
                entropies.append(total - (logits.softmax(-1) * logits).sum(-1))
        logps, entropies = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=full_precision(weight[:0]).dtype)
        for part in chunks(hidden):
            by_logits = full_precision(hidden[part] @ w.T).softmax(-1).mul_(-grad[part, None])
            by_logits.scatter_add_(1, targets[part, None], grad[part, None])
            by_logits = by_logits.to(hidden.dtype)
            torch.mm(by_logits, w, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                grad_weight += by_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (n, D), weight (V, D), targets (n,) -> log-probabilities (n,), float32 (float64 for float64)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenLogProbs.apply(hidden, weight, targets, False)[0]


def token_logprobs_and_entropy(hidden, weight, targets, temperature=1.0):
    """As `token_logprobs` of the distribution softmax(logits / temperature), and the entropy of that
    distribution at every position (n,), in nats and without a gradient."""
    if temperature != 1:
        hidden = hidden / temperature
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenLogProbs.apply(hidden, weight, targets, True)


class LinearLossSum(torch.autograd.Function):
    """Sum over positions of chunk_loss(logits, ...), its gradients taken chunk by chunk in the forward pass:
    the loss is a sum, so only one number can still multiply them later."""

    @staticmethod
    def forward(ctx, hidden, weight, chunk_loss, *rows):
        w = weight.to(hidden.dtype)
        needs_grad = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        if weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=full_precision(weight[:0]).dtype)
        total, figures = full_precision(hidden.new_zeros(())), None
        for part in chunks(hidden):
            logits = full_precision(hidden[part] @ w.T).requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                loss, seen = chunk_loss(logits, *(row[part] for row in rows))
            total += loss.detach()
            seen = seen.detach()
            figures = seen if figures is None else figures + seen
            if needs_grad:
                (by_logits,) = torch.autograd.grad(loss, logits)
                by_logits = by_logits.to(hidden.dtype)
                torch.mm(by_logits, w, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += by_logits.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.num_rows = weight.dtype, len(rows)
        figures = total.new_zeros(0) if figures is None else figures
        ctx.mark_non_differentiable(figures)
        return total, figures

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        # In float32: beside a bfloat16 tensor a single number would be rounded to bfloat16 too.
        by_hidden = (full_precision(grad_hidden) * grad_total).to(grad_hidden.dtype)
        by_weight = None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype)
        return by_hidden, by_weight, None, *[None] * ctx.num_rows


def linear_loss_sum(hidden, weight, chunk_loss, *rows):
    """chunk_loss(logits (n, V) float32, *rows of the chunk) -> (summed loss, figures for the log (k,)).

    hidden (N, D), weight (V, D), rows: tensors with one entry per position. Returns (sum over all positions,
    summed figures); only the first has a gradient. No positions: zero, and no figures.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLossSum.apply(hidden, weight, chunk_loss, *rows)
