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


def next_token_loss(model, batch, totals):
    """What one micro-batch adds to L, and its sums for the log. totals: targets ("loss") and micro-batches
    ("aux_loss") of the whole step."""
    out = model(**batch, num_items_in_batch=1)  # divided by 1: the sum
    sums = {"loss": out.loss} if out.aux_loss is None else {"loss": out.loss, "aux_loss": out.aux_loss}
    return token_loss(out.loss, totals["loss"], out.aux_loss, totals["aux_loss"]), sums


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
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import validate

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["pretrain_t2t_mini.jsonl", "pretrain_hq.jsonl"], mini="pretrain.jsonl")
    train, val = batches.load(load_pretrain, path, tokenizer, args, rt)
    run = loop.Run("pretrain", args, rt, tokenizer, path, train, val)
    model = run.load(checkpoint.new_model(args, tokenizer, rt))
    model, optimizers = run.prepare(model)

    def update(step, micro_batches, lr_factor):
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, next_token_loss)

    run.fit(model, optimizers, update, functools.partial(validate, dataset=val, args=args, rt=rt))
    flags = progress.same_model_flags(args)
    if args.save_weight != "pretrain":
        flags += f" --from_weight {args.save_weight}"
    run.end(model, f"python trainer/train_full_sft.py{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
