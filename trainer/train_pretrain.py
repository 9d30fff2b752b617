"""Pretraining: learn to predict the next token of plain text. Everything a model knows, it learns here.

    L = - 1/N * sum over documents, sum over t > 0:  log p(x_t | x_0 ... x_{t-1})

N counts the predicted tokens of the whole optimizer step, over micro-batches and processes, so that one
process with four batches and four processes with one give the same update. The first token of a document is
given, not predicted. A mixture of experts adds its balance loss (Fedus et al. 2021,
https://arxiv.org/abs/2101.03961, eq. 4).

    python trainer/train_pretrain.py
    python trainer/train_pretrain.py --preset minimind-3 --data_path my.jsonl --max_minutes 60
    torchrun --nproc_per_node 2 trainer/train_pretrain.py

Reads lines {"text": "..."}; writes out/pretrain_512.pth. Next: trainer/train_full_sft.py.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there


def token_loss(loss_sum, num_targets, aux_loss=None, num_micro=1):
    """What one micro-batch adds to L: its SUMMED cross-entropy over the targets of the whole step, and its
    share of the balance loss, which is a mean over the step's micro-batches. Zero targets are refused by the
    caller: 0/0 is no loss."""
    loss = loss_sum / num_targets
    return loss if aux_loss is None else loss + aux_loss / num_micro


def train_step(model, micro_batches, optimizers, lr_factor, args, rt) -> dict:
    """One optimizer step; returns what the log wants. A step without targets changes nothing and is
    counted."""
    from trainer import optim, runtime

    lr = optim.set_lr(optimizers, lr_factor)
    counts = [micro_batches.num_targets, len(micro_batches)]
    num_targets, num_micro = runtime.total(counts, rt)  # over all processes
    if num_targets == 0:
        rt.skipped += 1
        return {"lr": lr}
    loss_sum = aux_sum = 0.0
    for i, batch in enumerate(micro_batches):
        with runtime.no_sync(model, rt, last=i + 1 == len(micro_batches)):
            with rt.autocast():
                out = model(**batch, num_items_in_batch=1)  # divided by 1: the sum
                loss = token_loss(out.loss, num_targets, out.aux_loss, num_micro)
            runtime.backward(loss, rt)
        loss_sum += out.loss.detach()
        aux_sum += 0.0 if out.aux_loss is None else out.aux_loss.detach()
    grad_norm = runtime.optimizer_step(model, optimizers, rt, args.grad_clip)
    stats = {"lr": lr, "grad_norm": grad_norm, "num_tokens": micro_batches.num_tokens}
    stats["loss"] = loss_sum, micro_batches.num_targets
    if out.aux_loss is not None:
        stats["aux_loss"] = aux_sum, len(micro_batches)
    return stats


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight="pretrain",
        wandb_project="MiniMind-Pretrain",
        max_seq_len=None,  # see cli.settle
        default_data="dataset/pretrain_t2t_mini.jsonl or pretrain_hq.jsonl, else the embedded curriculum",
    )
    return parser.parse_args(argv)


def main(args):
    from dataset.lm_dataset import load_pretrain
    from trainer import batches, checkpoint, optim, progress, runtime
    from trainer.validation import validate

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["pretrain_t2t_mini.jsonl", "pretrain_hq.jsonl"], mini="pretrain.jsonl")
    train, val = batches.load(load_pretrain, path, tokenizer, args, rt)
    data = batches.fingerprint(train)

    model = checkpoint.new_model(args, tokenizer, rt)
    saved = checkpoint.find_resume(args, model.config, tokenizer, data, len(train), rt)
    parent = saved["run"]["parent"] if saved else checkpoint.load_from_weight(model, args, tokenizer, rt)
    seconds = batches.expected_seconds(model, args, rt, len(train))
    first = functools.partial(batches.first_micro_batch, train, args, rt)
    model, args.use_compile = runtime.maybe_compile(model, args.use_compile, rt, seconds, first)
    model = runtime.wrap(model, rt)
    optimizers = cli.build_optimizers(model, args, rt)

    def update(step, micro_batches):
        rt.seed_step(step)
        factor = optim.lr_factor(step, batches.num_steps(len(train), args), **cli.schedule(args))
        return train_step(model, micro_batches, optimizers, factor, args, rt)

    made = []
    if args.max_minutes and not args.max_steps:
        undo = runtime.snapshot(model, optimizers, rt)
        check = functools.partial(validate, model, val, args, rt)
        args.max_steps, made = batches.steps_for_minutes(train, args, rt, update, undo, check)
    run = checkpoint.describe("pretrain", args, tokenizer, data, batches.num_steps(len(train), args), parent)
    progress.announce(args, rt, model, run, path, train, val)
    log = progress.Progress(args, rt, model, run)
    log.start(checkpoint.restore(saved, model, optimizers, rt, log))
    log.catch_up(made)

    for step, micro_batches in batches.training_steps(train, args, rt, log.done):
        log.step(step, **update(step, micro_batches))
        if log.due(args.val_interval):
            with log.aside():
                log.log(**validate(model, val, args, rt))
        if log.due(args.save_interval):
            with log.aside():
                checkpoint.save(model, optimizers, args, rt, run, log)
    if log.done == log.total_steps:  # the run was not interrupted
        log.log(**validate(model, val, args, rt))
    checkpoint.save(model, optimizers, args, rt, run, log)
    log.finish()
    flags = progress.same_model_flags(args)
    if args.save_weight != "pretrain":
        flags += f" --from_weight {args.save_weight}"
    progress.farewell(args, rt, model, log, f"python trainer/train_full_sft.py{flags}")
    runtime.stop(rt)


if __name__ == "__main__":
    cli.run(main, parse_args)
