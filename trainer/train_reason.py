"""Reasoning distillation: learn to think before answering, from the written thoughts of a larger model.

    L = - 1/W * sum over answer tokens t:  w_t log p(x_t | x_0 ... x_{t-1}),      W = sum of all w_t

It is fine-tuning on traces; the thoughts are targets too. w_t is 1, and --tag_weight on the tokens of the
tags that hold an answer together, <think> </think> <answer> </answer>: they are few, and an answer whose
thoughts do not end is lost whole. Only tags that the assistant itself writes are weighted, never one in a
question.
(DeepSeek-AI 2025, https://arxiv.org/abs/2501.12948, section 2.4, distils so; the weights are MiniMind's.)

Adaptive thinking: the prompt ends with `<think>` when thinking is wanted and with an empty, closed block when
it is not. Rows with and without thoughts, mixed, teach one model both: eval_llm.py --open_thinking 0|1.

    python trainer/train_reason.py                                  # from dpo, or full_sft if there is none
    python trainer/train_reason.py --data_path my_traces.jsonl,my_chats.jsonl --from_weight full_sft
    torchrun --nproc_per_node 2 trainer/train_reason.py

Reads lines {"conversations": [...]} whose answers have "reasoning_content", or begin with
<think>...</think> in their content (with or without <answer>...</answer> behind it), mixed with any others,
and out/dpo_512.pth; writes out/reason_512.pth. Next: python eval_llm.py --weight reason --open_thinking 1.
"""

import functools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there

TAGS = re.compile(rb"</?(?:think|answer)>")


def tag_weights(texts, is_target, tag_weight):
    """texts: the bytes of each token of a row; is_target: which of them the assistant writes. Returns a
    weight for each: 0 = no target, tag_weight = part of a tag, 1 = any other target.

    A tag may be one token or several, and its last one may also hold what follows (">\\n").
    """
    weights = [float(target) for target in is_target]
    i = 0
    while i < len(texts):
        if not is_target[i]:
            i += 1
            continue
        end = i
        while end < len(texts) and is_target[end]:
            end += 1
        starts, place = [], 0  # of each token of this answer in its text
        for text in texts[i:end]:
            starts.append(place)
            place += len(text)
        for tag in TAGS.finditer(b"".join(texts[i:end])):
            for j, start in enumerate(starts):
                if start < tag.end() and start + len(texts[i + j]) > tag.start():
                    weights[i + j] = tag_weight
        i = end
    return weights


def weighted_token_loss(logits, targets, weights):
    """logits (n, V), targets (n,), weights (n,) -> sum of w_t CE_t, and for the log the plain sum of CE_t."""
    import torch.nn.functional as F

    losses = F.cross_entropy(logits, targets, reduction="none")
    return (weights * losses).sum(), losses.detach().sum()[None]


def reason_loss(model, batch, totals, head):
    """What one micro-batch adds to L, and its sums for the log. totals: summed weights ("loss"), targets and
    micro-batches of the whole step."""
    from trainer.logprobs import answer_positions, hidden_states, linear_loss_sum, next_of

    hidden, aux_loss = hidden_states(model, batch)
    keep, targets = answer_positions(batch["labels"])
    weights = next_of(batch["loss_weights"])[keep]
    weighted, figures = linear_loss_sum(hidden[keep], head, weighted_token_loss, targets, weights)
    loss, sums = weighted / totals["loss"], {"loss": weighted, "token_loss": figures.sum()}
    if aux_loss is not None:
        loss, sums["aux_loss"] = loss + aux_loss / totals["aux_loss"], aux_loss
    return loss, sums


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight="reason",
        from_weight="auto",
        wandb_project="MiniMind-Reasoning",
        max_seq_len=720,
        learning_rate=5e-4,
        muon_lr=2.5e-3,
        val_fraction=0.02,
        default_data="dataset/r1_mix_1024.jsonl, else the embedded curriculum",
    )
    parser.add_argument(
        "--tag_weight",
        type=cli.positive_float,
        default=10.0,
        metavar="W",
        help="how many times a token of <think>, </think>, <answer>, </answer> counts",
    )
    cli.add_tax_path(parser)
    return parser.parse_args(argv)


def main(args):
    import torch

    from dataset.lm_dataset import TextEncoder, load_sft
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import held_out

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["r1_mix_1024.jsonl"], mini="reason.jsonl")
    train, val = batches.load(load_sft, path, tokenizer, args, rt)
    tax = batches.load_tax(path, tokenizer, args, rt)
    texts = TextEncoder.of(tokenizer).token_texts()

    def with_weights(batch):
        rows = zip(batch["input_ids"].tolist(), (batch["labels"] != batches.IGNORE).tolist())
        weights = [
            tag_weights([texts[i] for i in ids], is_target, args.tag_weight) for ids, is_target in rows
        ]
        return {"loss_weights": torch.tensor(weights)}

    train.annotate = with_weights
    run = loop.Run("reason", args, rt, tokenizer, path, train, val)
    model = run.load(checkpoint.new_model(args, tokenizer, rt))
    head = model.lm_head.weight
    model, optimizers = run.prepare(model)
    step_loss = functools.partial(reason_loss, head=head)

    def update(step, micro_batches, lr_factor):
        counts = {"loss": micro_batches.weight, "token_loss": micro_batches.num_targets}
        counts["aux_loss"] = len(micro_batches)
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, step_loss, counts)

    check = functools.partial(held_out, val=val, tax=tax, args=args, rt=rt)
    run.fit(model, optimizers, update, check, before=True)
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    run.end(model, f"python eval_llm.py --weight {args.save_weight} --open_thinking 1{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
