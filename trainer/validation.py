"""Held-out loss and bits-per-byte, the two numbers by which stages of one kind are compared; and scores of
preference pairs."""

from __future__ import annotations

import contextlib
import math

from trainer import batches, runtime


def held_out(model, val, tax, args, rt) -> dict:
    """The metrics of a stage that changes a model which could do something before: `validate` of its own
    held-out set, and as "tax_loss" of one of an earlier stage. What rises there is the alignment tax."""
    result = validate(model, val, args, rt)
    earlier = validate(model, tax, args, rt)
    return result | ({"tax_loss": earlier["val_loss"]} if earlier else {})


def means(model, dataset, micro_loss, args, rt) -> dict:
    """The sums that a stage's `micro_loss(model, batch, totals)` gives for its log, over a held-out set, each
    divided by the targets; {} for None."""
    if dataset is None:
        return {}
    import torch

    model = runtime.bare(model)
    was_training = model.training
    model.eval()
    sums: dict = {}
    with torch.no_grad(), runtime.uncompiled(args):
        for batch in batches.validation_batches(dataset, args, rt):
            with rt.autocast():
                _, parts = micro_loss(model, batch, {"loss": 1, "aux_loss": 1})
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + float(part)
    model.train(was_training)
    names = runtime.broadcast(list(sums), rt)  # a process may have had no row, and no sums
    totals = runtime.total([sums.get(name, 0.0) for name in names], rt)
    return {name: total / max(dataset.num_targets, 1) for name, total in zip(names, totals)}


def sequence_scores(model, pairs, score, args, rt, as_trained=False):
    """`score(model, batch)` (2B,) of every sequence of preference pairs: (2P,) float32 on the CPU, the chosen
    answers, then the rejected ones, the same on every process. Without dropout, in the compute type of
    training. as_trained: by the very code that trains, compiled if it is, since compiled bfloat16 code rounds
    in other places; it is compiled for gradients, so it computes as if there would be some."""
    import torch

    model = runtime.bare(model)
    was_training = model.training
    model.eval()
    mine = list(range(rt.rank, len(pairs), rt.world_size))
    mine.sort(key=lambda pair: int(pairs.lengths[pair].max()))  # neighbours of like length pack best
    found = torch.zeros(2, len(pairs), dtype=torch.float64)
    compiled = as_trained and str(args.use_compile) == "1"
    stance = contextlib.nullcontext() if compiled else runtime.uncompiled(args)
    size = batches.micro_rows(args, rt.world_size) if compiled else args.batch_size  # memory as in training
    with torch.set_grad_enabled(compiled), stance:
        for start in batches.enough_of(range(0, len(mine), size), rt):
            rows = mine[start : start + size]
            batch = {name: t.to(rt.device) for name, t in pairs.collate(rows, len(rows)).items()}
            with rt.autocast():
                found[:, rows] = score(model, batch).detach().double().cpu().view(2, -1)
    model.train(was_training)
    return torch.tensor(runtime.total(found, rt)).float().flatten()


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
    with torch.no_grad(), runtime.uncompiled(args):
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
