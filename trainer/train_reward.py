"""A reward model: learn from pairs of answers a number that says how good an answer is.

    P(y_w is better than y_l) = sigmoid(r(x, y_w) - r(x, y_l))                          Bradley and Terry 1952
    L = - 1/P * sum over pairs:  log sigmoid(r_w - r_l)  +  c (r_w + r_l)^2

The second term keeps rewards near zero, which pairs alone leave open (Eisenstein et al. 2023,
https://arxiv.org/abs/2312.09244, section 2); it is small. The model is our own: the blocks of the weights it
starts from, with a new vector in place of the head (model/model_reward.py). First loss of this form for
language models: Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, section 3.3.

    python trainer/train_reward.py
    torchrun --nproc_per_node 2 trainer/train_reward.py --data_path my_pairs.jsonl

Reads lines {"chosen": [messages], "rejected": [messages]} and out/full_sft_512.pth; writes
out/reward_512.pth, the judge that reinforcement learning uses when it is given no other. Held-out accuracy:
how often the chosen answer gets more; calibration: whether pairs of which the model is 80 % sure are right
80 % of the time.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there


def bradley_terry_loss(rewards, center=0.0):
    """rewards (2B,): B chosen answers, then the B rejected ones. Returns the loss of each pair (B,)."""
    import torch.nn.functional as F

    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2


def reward_loss(model, batch, totals, center):
    """What one micro-batch adds to L, and its sums for the log. totals: pairs ("loss") and micro-batches of
    the whole step."""
    rewards, aux_loss = model(batch["input_ids"], batch["position_ids"], batch["last"])
    exists = batch["answers"].chunk(2)[0] > 0  # a process without a pair has one of empty answers
    losses = bradley_terry_loss(rewards, center) * exists
    loss = losses.sum() / totals["loss"]
    if aux_loss is not None:
        loss = loss + aux_loss / totals["aux_loss"]
    chosen, rejected = rewards.detach().chunk(2)
    sums = {"loss": losses.sum()} if aux_loss is None else {"loss": losses.sum(), "aux_loss": aux_loss}
    figures = {"accuracy": (chosen > rejected).float(), "reward_chosen": chosen, "reward_rejected": rejected}
    return loss, sums | {name: (values * exists).sum() for name, values in figures.items()}


def calibration_error(probabilities, bins=10):
    """Expected calibration error of P(chosen is better), (N,): |confidence - accuracy| per bin of confidence,
    weighted by its pairs (Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3). Between 0 and 0.5.

    The side the model believes in is its answer: confidence max(p, 1 - p), right if p > 1/2.
    """
    import torch

    confidence = torch.maximum(probabilities, 1 - probabilities)
    right = (probabilities > 0.5).double() + 0.5 * (probabilities == 0.5)  # undecided is half right
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = [
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).sum()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps) / len(probabilities))


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight="reward",
        from_weight="full_sft",
        wandb_project="MiniMind-Reward",
        max_seq_len=1024,
        optimizer="adamw",
        learning_rate=1e-4,
        batch_size=16,
        val_fraction=0.05,
        default_data="dataset/dpo.jsonl, else the embedded curriculum",
    )
    parser.add_argument(
        "--center",
        type=cli.non_negative_float,
        default=0.01,
        metavar="C",
        help="weight of the term that keeps rewards near zero",
    )
    return parser.parse_args(argv)


def main(args):
    from dataset.preferences import load_pairs
    from model.model_reward import RewardModel
    from trainer import batches, checkpoint, loop, runtime
    from trainer.validation import sequence_scores

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["dpo.jsonl"], mini="dpo.jsonl")
    train, val = batches.load(load_pairs, path, tokenizer, args, rt)
    run = loop.Run("reward", args, rt, tokenizer, path, train, val)
    language_model = run.load(checkpoint.new_model(args, tokenizer, rt))
    model = RewardModel(language_model.config)
    model.model = language_model.model
    model, optimizers = run.prepare(model, dynamic=True)

    def update(step, micro_batches, lr_factor):
        counts = {"loss": micro_batches.num_rows, "aux_loss": len(micro_batches)}
        step_loss = functools.partial(reward_loss, center=args.center)
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, step_loss, counts)

    def score(model, batch):
        return model(batch["input_ids"], batch["position_ids"], batch["last"])[0]

    def check(model):
        """Of the held-out pairs: loss, accuracy, calibration, and how far apart the rewards are."""
        if val is None:
            return {}
        chosen, rejected = sequence_scores(model, val, score, args, rt).double().chunk(2)
        margins = chosen - rejected
        return {
            "val_loss": float(-margins.sigmoid().log().mean()),
            "val_accuracy": float((margins > 0).double().mean()),
            "val_calibration_error": calibration_error(margins.sigmoid()),
            "val_margin": float(margins.mean()),
        }

    run.fit(model, optimizers, update, check, before=True)
    run.end(model, "this model rates answers: RewardModel.rate in model/model_reward.py")


if __name__ == "__main__":
    cli.run(main, parse_args)
