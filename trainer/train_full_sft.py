"""Supervised fine-tuning: learn to answer. Same model, same loss as pretraining, but only what the
assistant says is a target.

    L = - 1/N * sum over answer tokens t:  log p(x_t | x_0 ... x_{t-1})

An answer begins behind the generation prompt and ends with <|im_end|>, which is a target too: that is how
the model learns to stop. Questions, system prompts and tool results are read, never predicted. N counts the
answer tokens of the whole optimizer step, over micro-batches and processes; a mean of means would give a
token of a short answer more weight than one of a long answer. Instruction tuning: Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, section 3.5, step 1.

    python trainer/train_full_sft.py
    python trainer/train_full_sft.py --preset minimind-3 --data_path my_chats.jsonl --epochs 2
    torchrun --nproc_per_node 2 trainer/train_full_sft.py

Reads lines {"conversations": [{"role", "content"}, ...]} and out/pretrain_512.pth; writes
out/full_sft_512.pth. Next: python eval_llm.py --weight full_sft.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there
from trainer.train_pretrain import token_loss  # the same loss; what is a target is decided by the labels


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
        save_weight="full_sft",
        from_weight="pretrain",
        wandb_project="MiniMind-Full-SFT",
        epochs=2,
        max_seq_len=768,
        learning_rate=1e-3,
        muon_lr=5e-3,
        default_data="dataset/sft_t2t_mini.jsonl or sft_mini_512.jsonl, else the embedded curriculum",
    )
    return parser.parse_args(argv)


def main(args):
    from dataset.lm_dataset import load_sft
    from trainer import batches, checkpoint, optim, progress, runtime
    from trainer.validation import validate

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["sft_t2t_mini.jsonl", "sft_mini_512.jsonl"], mini="sft.jsonl")
    train, val = batches.load(load_sft, path, tokenizer, args, rt)
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
    run = checkpoint.describe("full_sft", args, tokenizer, data, batches.num_steps(len(train), args), parent)
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
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    progress.farewell(args, rt, model, log, f"python eval_llm.py --weight {args.save_weight}{flags}")
    runtime.stop(rt)


if __name__ == "__main__":
    cli.run(main, parse_args)
