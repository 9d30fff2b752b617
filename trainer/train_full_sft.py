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
from trainer.train_pretrain import next_token_loss  # the same loss; the labels decide what is a target


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
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import validate

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["sft_t2t_mini.jsonl", "sft_mini_512.jsonl"], mini="sft.jsonl")
    train, val = batches.load(load_sft, path, tokenizer, args, rt)
    run = loop.Run("full_sft", args, rt, tokenizer, path, train, val)
    model = run.load(checkpoint.new_model(args, tokenizer, rt))
    model, optimizers = run.prepare(model)

    def update(step, micro_batches, lr_factor):
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, next_token_loss)

    run.fit(model, optimizers, update, functools.partial(validate, dataset=val, args=args, rt=rt))
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    run.end(model, f"python eval_llm.py --weight {args.save_weight}{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
