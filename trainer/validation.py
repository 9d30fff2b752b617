"""Held-out loss and bits-per-byte, the two numbers by which stages of one kind are compared."""

from __future__ import annotations

import math

from trainer import batches, runtime


def held_out(model, val, tax, args, rt) -> dict:
    """The metrics of a stage that changes a model which could do something before: `validate` of its own
    held-out set, and as "tax_loss" of one of an earlier stage. What rises there is the alignment tax."""
    result = validate(model, val, args, rt)
    earlier = validate(model, tax, args, rt)
    return result | ({"tax_loss": earlier["val_loss"]} if earlier else {})


def preferences(model, pairs, figures, args, rt) -> dict:
    """`figures(model, batch)`, sums over the pairs of a micro-batch, as means over all held-out pairs, named
    val_...; {} for None."""
    if pairs is None:
        return {}
    import torch

    model = runtime.bare(model)
    was_training = model.training
    model.eval()
    sums: dict = {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches.validation_batches(pairs, args, rt):
            with rt.autocast():
                for name, value in figures(model, batch).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
    model.train(was_training)
    names = sorted(sums) if rt.world_size == 1 else sorted(runtime.broadcast(list(sums), rt))
    totals = runtime.total([sums.get(name, 0.0) for name in names], rt)
    by_name = dict(zip(names, totals))
    return {f"val_{name}": by_name[name] / len(pairs) for name in sums}


def validate(model, dataset, args, rt) -> dict:
    """{"val_loss", "val_bpb"} of a held-out set; {} for None. The same set gives the same numbers for any
    number of processes (up to rounding): sums are divided once.

    val_loss: nats per target token. val_bpb: bits per UTF-8 byte of the target text, sum of nats / (ln 2 *
    bytes); it does not depend on the vocabulary, so different tokenizers can be compared.
    """
    if dataset is None:
        return {}
    import torch

    model = runtime.bare(model)
    was_training = model.training
    model.eval()
    loss, num_targets = torch.zeros((), dtype=torch.float64), 0
    # Uncompiled: without gradients the blocks would be compiled a second time, for a few batches.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches.validation_batches(dataset, args, rt):
            with rt.autocast():
                out = model(**batch, num_items_in_batch=1, return_logits=False)
            loss += out.loss.double().cpu()
            num_targets += int((batch["labels"][:, 1:] != batches.IGNORE).sum())
    model.train(was_training)
    loss, num_targets = runtime.total([loss, num_targets], rt)
    result = {"val_loss": loss / max(num_targets, 1)}
    if dataset.num_bytes:
        result["val_bpb"] = loss / (math.log(2) * dataset.num_bytes)
    return result
