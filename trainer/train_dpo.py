"""Direct preference optimisation: from pairs of answers, one chosen and one rejected, learn to prefer.

    s(y)  = sum over answer tokens t:  log p(y_t | x, y_<t)
    Delta = [s(y_w) - s_ref(y_w)] - [s(y_l) - s_ref(y_l)]
    L     = - 1/P * sum over pairs:  log sigmoid(beta * Delta)

The reference is the model before the first step; its s_ref is computed once and kept. beta (s - s_ref) is the
implicit reward: the policy that maximises reward - beta KL(policy | reference) has exactly this one. Rafailov
et al. 2023, https://arxiv.org/abs/2305.18290, equation 7. Other losses by --loss_type:

    ipo           (Delta' - 1 / (2 beta))^2, Delta' of means over tokens  (Azar 2023, arXiv 2310.12036 eq. 17)
    dpop          Delta - lambda max(0, s_ref(y_w) - s(y_w))              (Pal 2024, arXiv 2402.13228 eq. 3)
    simpo         beta [mean(y_w) - mean(y_l)] - gamma, no reference      (Meng 2024, arXiv 2405.14734 eq. 6)
    sigmoid_norm  Delta of means over tokens

    python trainer/train_dpo.py
    python trainer/train_dpo.py --data_path my_pairs.jsonl --loss_type dpop --sft_weight 0.1
    torchrun --nproc_per_node 2 trainer/train_dpo.py

Reads lines {"chosen": [messages], "rejected": [messages]} and out/full_sft_512.pth; writes out/dpo_512.pth.
Next: python eval_llm.py --weight dpo.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there
from trainer.train_distillation import divergence_loss

LOSS_TYPES = ("sigmoid", "ipo", "dpop", "simpo", "sigmoid_norm")


def preference_loss(policy, reference, answers, beta, loss_type="sigmoid", dpop_lambda=5.0, simpo_gamma=0.5):
    """policy, reference: summed log-probabilities (2B,), B chosen answers, then the B rejected ones; answers:
    their tokens (2B,). Returns the loss of each pair (B,)."""
    import torch.nn.functional as F

    answers = answers.clamp(min=1)
    per_token = loss_type in ("ipo", "simpo", "sigmoid_norm")
    if loss_type == "simpo":
        reference = reference * 0
    gain = (policy - reference) / (answers if per_token else 1)
    gain_w, gain_l = gain.chunk(2)
    delta = gain_w - gain_l
    if loss_type == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    if loss_type == "dpop":  # a chosen answer must not become less likely than it was
        delta = delta - dpop_lambda * F.relu(-gain_w)
    if loss_type == "simpo":
        return -F.logsigmoid(beta * delta - simpo_gamma)
    return -F.logsigmoid(beta * delta)


def answer_logprobs(model, batch, head):
    """Summed log-probability of every answer of a micro-batch, (2B,) float32, and the balance loss."""
    import torch

    from trainer.logprobs import answer_positions, hidden_states, token_logprobs

    hidden, aux_loss = hidden_states(model, batch)
    keep, targets = answer_positions(batch["labels"])
    logps = token_logprobs(hidden[keep], head, targets)
    sums = torch.zeros(len(batch["last"]), dtype=logps.dtype, device=logps.device)
    return sums.index_add(0, batch["sequence_ids"].flatten()[keep], logps), aux_loss


def dpo_loss(model, batch, totals, head, pair_loss, figures, sft_weight=0.0):
    """What one micro-batch adds to L, and its sums for the log. pair_loss, figures: `preference_loss` and
    `diagnostics` with their settings; totals: pairs ("loss"), chosen tokens and micro-batches of the whole
    step."""
    policy, aux_loss = answer_logprobs(model, batch, head)
    reference, answers = batch["reference"], batch["answers"]
    losses = pair_loss(policy, reference, answers)
    losses = losses * (answers.chunk(2)[0] > 0)  # a process without a pair has one of empty answers
    loss = losses.sum() / totals["loss"]
    if sft_weight:
        loss = loss - sft_weight * policy.chunk(2)[0].sum() / totals["chosen_tokens"]
    if aux_loss is not None:
        loss = loss + aux_loss / totals["aux_loss"]
    sums = {"loss": losses.sum()} if aux_loss is None else {"loss": losses.sum(), "aux_loss": aux_loss}
    return loss, sums | figures(policy.detach(), reference, answers)


def diagnostics(policy, reference, answers, beta, loss_type="sigmoid") -> dict:
    """Sums over pairs: what to look at while preferences are learned. Rewards are beta (s - s_ref), summed
    over an answer's tokens whatever the loss, as trl shows them; simpo's, which know no reference, are its
    own: beta times the mean. Log-probabilities per token; if both fall, the model unlearns its good answers
    together with the bad ones (likelihood displacement)."""
    if loss_type == "simpo":
        rewards = beta * policy / answers.clamp(min=1)
    else:
        rewards = beta * (policy - reference)
    rewards_w, rewards_l = rewards.chunk(2)
    logps_w, logps_l = (policy / answers.clamp(min=1)).chunk(2)
    return {
        "reward_chosen": rewards_w.sum(),
        "reward_rejected": rewards_l.sum(),
        "margin": (rewards_w - rewards_l).sum(),
        "accuracy": (rewards_w > rewards_l).float().sum(),
        "logp_chosen": logps_w.sum(),
        "logp_rejected": logps_l.sum(),
    }


def kl_from_reference(model, batch, totals, head, reference):
    """Of a held-out micro-batch: KL(policy | reference), summed over the tokens of the chosen answers and the
    whole vocabulary. How far the policy has moved, whatever its log-probabilities did."""
    from trainer.logprobs import answer_positions, hidden_states, linear_loss_sum

    def kl(logits, reference_hidden):
        reference_logits = (reference_hidden @ reference_head.T).float()
        return divergence_loss(logits, reference_logits, "reverse").sum(), logits.new_zeros(0)

    hidden, reference_hidden = hidden_states(model, batch)[0], hidden_states(reference, batch)[0]
    keep, _ = answer_positions(batch["labels"])
    keep = keep[batch["sequence_ids"].flatten()[keep] < len(batch["last"]) // 2]
    reference_head = reference.lm_head.weight.to(reference_hidden.dtype)
    return None, {"kl": linear_loss_sum(hidden[keep], head, kl, reference_hidden[keep])[0]}


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight="dpo",
        from_weight="full_sft",
        wandb_project="MiniMind-DPO",
        max_seq_len=1024,
        optimizer="adamw",
        learning_rate=5e-6,
        weight_decay=0.0,
        batch_size=16,
        val_fraction=0.05,
        default_data="dataset/dpo.jsonl, else the embedded curriculum",
    )
    parser.set_defaults(exact=True)
    g = parser.add_argument_group("preferences")
    g.add_argument("--loss_type", choices=LOSS_TYPES, default="sigmoid", help="see above")
    g.add_argument(
        "--beta",
        type=cli.positive_float,
        default=0.1,
        metavar="X",
        help="how soon a margin is enough: large = stay close to the reference (simpo wants 2 to 10)",
    )
    g.add_argument(
        "--dpop_lambda", type=cli.non_negative_float, default=5.0, metavar="X", help="weight of dpop's term"
    )
    g.add_argument(
        "--simpo_gamma", type=cli.non_negative_float, default=0.5, metavar="X", help="margin simpo asks for"
    )
    g.add_argument(
        "--sft_weight",
        type=cli.non_negative_float,
        default=0.0,
        metavar="X",
        help="weight of fine-tuning on the chosen answers beside it, against their becoming less likely",
    )
    cli.add_tax_path(parser)
    return parser.parse_args(argv)


def main(args):
    import torch

    from dataset.preferences import load_pairs
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import held_out, means, sequence_scores

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["dpo.jsonl"], mini="dpo.jsonl")
    train, val = batches.load(load_pairs, path, tokenizer, args, rt)
    tax = batches.load_tax(path, tokenizer, args, rt)
    run = loop.Run("dpo", args, rt, tokenizer, path, train, val)
    model = run.load(checkpoint.new_model(args, tokenizer, rt))
    head = model.lm_head.weight
    model, optimizers = run.prepare(model, dynamic=True)

    def score(model, batch):
        return answer_logprobs(model, batch, head)[0]

    references = run.saved["extra"] if run.saved else {}  # a model that has moved is no reference
    held_out_pairs = None if val is None else val.fingerprint()
    if run.saved and val is not None and references.get("held_out") != held_out_pairs:
        raise checkpoint.CheckpointError(
            "the held-out pairs are not those this run began with, and their reference cannot be computed "
            "any more: give the old --val_path, or none with --val_fraction 0, or start a new run with "
            "--from_resume 0"
        )
    references["held_out"] = held_out_pairs
    for name, pairs in (("train", train), ("val", val)):
        if pairs is not None:
            if name not in references:
                rt.print(f"reference: log-probabilities of {len(pairs):,} pairs")
                as_trained = pairs is train
                references[name] = sequence_scores(model, pairs, score, args, rt, as_trained)
            pairs.reference = references[name]

    settings = dict(loss_type=args.loss_type, dpop_lambda=args.dpop_lambda, simpo_gamma=args.simpo_gamma)
    pair_loss = functools.partial(preference_loss, beta=args.beta, **settings)
    figures = functools.partial(diagnostics, beta=args.beta, loss_type=args.loss_type)
    step_loss = functools.partial(
        dpo_loss, head=head, pair_loss=pair_loss, figures=figures, sft_weight=args.sft_weight
    )

    def update(step, micro_batches, lr_factor):
        counts = {"loss": micro_batches.num_rows, "aux_loss": len(micro_batches)}
        counts["chosen_tokens"] = int(train.answers[micro_batches.rows, 0].sum())
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, step_loss, counts)

    def check(model):
        """The loss and the diagnostics of all held-out pairs, and the alignment tax."""
        found = {}
        if val is not None:
            policy, answers = (
                sequence_scores(model, val, score, args, rt),
                torch.from_numpy(val.answers).T.ravel(),
            )
            losses = pair_loss(policy, val.reference, answers)
            sums = {"loss": losses.sum(), **figures(policy, val.reference, answers)}
            found = {f"val_{name}": float(value) / len(val) for name, value in sums.items()}
            reference = checkpoint.load_parent(args, run.parent, tokenizer, rt)
            if reference is not None:
                kl = functools.partial(kl_from_reference, head=head, reference=reference)
                per_target = means(model, val, kl, args, rt)["kl"]
                found["val_kl"] = per_target * val.num_targets / int(val.answers[:, 0].sum())
        return found | held_out(model, None, tax, args, rt)

    run.fit(model, optimizers, update, check, before=True, **references)
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    run.end(model, f"python eval_llm.py --weight {args.save_weight}{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
