"""White-box distillation: a student learns from the whole distribution of a teacher, not from one token.

    p = softmax(z_teacher / T), q = softmax(z_student / T), at every answer token
    L = alpha * CE(student, text) + (1 - alpha) * T^2 * D(p, q)           summed, divided by the answer tokens

    forward   D = KL(p | q)      covers everything the teacher would say (default)
    reverse   D = KL(q | p)      says only what the teacher would say; for answers of the student's own
    jsd       D = b KL(p | m) + (1 - b) KL(q | m), m = b p + (1 - b) q, in between

T^2 keeps the gradient as large as the cross-entropy's (Hinton et al. 2015, https://arxiv.org/abs/1503.02531,
section 2.1). On-policy distillation, GKD: with probability --on_policy a step's answers are sampled from the
student and the teacher judges every token of them, so that the student learns from its own mistakes (Agarwal
et al. 2023, https://arxiv.org/abs/2306.13649, algorithm 1). Such a step has no cross-entropy.

    python trainer/train_distillation.py --teacher_hidden_size 768 --student_hidden_size 512
    python trainer/train_distillation.py --teacher_hidden_size 640 --teacher_use_moe 1 --divergence jsd
    torchrun --nproc_per_node 2 trainer/train_distillation.py --on_policy 0.5 --divergence reverse

Teacher and student must share one vocabulary. Black-box distillation, from a teacher whose text is all you
have, is fine-tuning: scripts/write_answers.py writes the text, trainer/train_full_sft.py reads it.

Reads lines {"conversations": [...]}, out/full_sft_768.pth (teacher) and out/full_sft_512.pth (student to
begin with); writes out/full_dist_512.pth. Next: python eval_llm.py --weight full_dist.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there

DIVERGENCES = ("forward", "reverse", "jsd")


def divergence_loss(student_logits, teacher_logits, kind="forward", temperature=1.0, jsd_beta=0.5):
    """D at every position: logits (n, V) -> (n,), not yet times T^2. jsd with jsd_beta 0 is forward, with 1
    reverse, as the two limits would have it."""
    import math

    import torch
    import torch.nn.functional as F

    log_q = F.log_softmax(student_logits / temperature, -1)
    log_p = F.log_softmax(teacher_logits / temperature, -1)
    if kind == "forward" or kind == "jsd" and jsd_beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse" or kind == "jsd" and jsd_beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log(1 - jsd_beta))
    to_p, to_q = ((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q))
    return jsd_beta * to_p + (1 - jsd_beta) * to_q


def teaching_loss(logits, targets, teacher_hidden, teacher_head, alpha, kind, temperature, jsd_beta):
    """The summed loss of a chunk of positions, and for the log its sums of cross-entropy, divergence, the
    teacher's entropy (nats), and agreement on the likeliest token."""
    import torch
    import torch.nn.functional as F

    teacher_logits = (teacher_hidden @ teacher_head.T).to(logits.dtype)
    divergence = divergence_loss(logits, teacher_logits, kind, temperature, jsd_beta)
    ce = F.cross_entropy(logits, targets, reduction="none")
    loss = (alpha * ce + (1 - alpha) * temperature**2 * divergence).sum()
    entropy = torch.distributions.Categorical(logits=teacher_logits).entropy()
    agree = (logits.argmax(-1) == teacher_logits.argmax(-1)).to(logits.dtype)
    figures = [ce.detach().sum(), divergence.detach().sum(), entropy.sum(), agree.sum()]
    return loss, torch.stack(figures)


def distillation_loss(model, batch, totals, teacher, head, teaching):
    """What one micro-batch adds to L, and its sums for the log. totals: answer tokens ("loss") and
    micro-batches of the whole step; teaching: `teaching_loss` with its settings."""
    from trainer.logprobs import answer_positions, hidden_states, linear_loss_sum

    hidden, aux_loss = hidden_states(model, batch)
    keep, targets = answer_positions(batch["labels"])
    # The teacher is frozen, so nothing is kept for a gradient; and it computes as the student does, rounding
    # included: a student that equals its teacher must find no difference.
    teacher_hidden = hidden_states(teacher, batch)[0][keep].detach()
    teaching = functools.partial(teaching, teacher_head=teacher.lm_head.weight.to(teacher_hidden.dtype))
    total, figures = linear_loss_sum(hidden[keep], head, teaching, targets, teacher_hidden)
    loss, sums = total / totals["loss"], {"loss": total}
    # A process without an answer in this step has the same names, for which the log adds up processes.
    figures = figures if len(figures) else total.new_zeros(4)
    sums |= dict(zip(("ce", "divergence", "teacher_entropy", "agreement"), figures))
    if aux_loss is not None:
        loss, sums["aux_loss"] = loss + aux_loss / totals["aux_loss"], aux_loss
    return loss, sums


def sample_answers(model, micro_batches, step, args, rt, pad_id):
    """The same prompts with the student's own answers: micro-batches whose labels are what it sampled, at
    temperature 1, up to --max_gen_len tokens. A function of (weights, seed, step, place of the row in it), so
    that any number of processes draws the same answers (but where rounding decides)."""
    from model.generation import Generator
    from trainer import batches, runtime

    engine = Generator(runtime.bare(model), "float32" if rt.device.type == "cpu" else "auto")
    own = batches.StepBatches()
    own.rows, own.num_rows = micro_batches.rows, micro_batches.num_rows
    places = iter(micro_batches.places)  # rows that fill up the last micro-batch come last
    for batch in micro_batches:
        prompts, seeds = [], []
        for of_row in batches.first_prompts(batch):
            seed = runtime.mix_seed(args.seed, step, next(places, 0))
            fitting = [prompt for prompt in of_row if len(prompt) < args.max_seq_len]
            prompts, seeds = prompts + fitting, seeds + [seed] * len(fitting)
        sequences = []
        if prompts:
            answers = engine.generate(prompts, max_new_tokens=args.max_gen_len, temperature=1.0, seed=seeds)
            sequences = [(p + a.ids, len(p)) for p, a in zip(prompts, answers)]
        new = batches.rows_of(sequences, args.max_seq_len, pad_id)
        own.num_targets += int((new["labels"][:, 1:] != batches.IGNORE).sum())
        own.num_tokens += int((new["input_ids"] != pad_id).sum())
        own.append({name: tensor.to(rt.device) for name, tensor in new.items()})
    return own


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight="full_dist",
        from_weight="full_sft",
        wandb_project="MiniMind-Distillation",
        epochs=6,
        max_seq_len=340,
        learning_rate=5e-4,
        muon_lr=2.5e-3,
        default_data="dataset/sft_t2t_mini.jsonl or sft_mini_512.jsonl, else the embedded curriculum",
    )
    g = parser.add_argument_group("teacher and student (the student's flags are those of the model above)")
    for name, flag, kind in (
        ("--student_hidden_size", "hidden_size", cli.positive_int),
        ("--student_num_layers", "num_hidden_layers", cli.positive_int),
        ("--student_use_moe", "use_moe", cli.switch),
        ("--from_student_weight", "from_weight", cli.plain_name),
    ):  # another name of a flag must not bring a default of its own
        g.add_argument(name, dest=flag, type=kind, metavar="X", default=argparse.SUPPRESS, help=f"= --{flag}")
    g.add_argument(
        "--from_teacher_weight",
        default="full_sft",
        metavar="NAME",
        help="weights of the teacher: name of a stage, or a .pth file; its architecture comes from the file",
    )
    g.add_argument(
        "--teacher_hidden_size",
        type=cli.positive_int,
        default=768,
        metavar="N",
        help="width in its file name",
    )
    g.add_argument(
        "--teacher_num_layers", type=cli.positive_int, metavar="N", help="depth it must have; without it: any"
    )
    g.add_argument("--teacher_use_moe", type=cli.switch, default=0, metavar="0|1", help="1 = the _moe file")
    g = parser.add_argument_group("distillation")
    g.add_argument(
        "--alpha",
        type=cli.fraction,
        default=0.5,
        metavar="X",
        help="share of the cross-entropy with the text",
    )
    g.add_argument(
        "--temperature", type=cli.positive_float, default=1.5, metavar="T", help="flattens both distributions"
    )
    g.add_argument("--divergence", choices=DIVERGENCES, default="forward", help="see above")
    g.add_argument("--jsd_beta", type=cli.fraction, default=0.5, metavar="B", help="b of jsd")
    g.add_argument(
        "--on_policy",
        type=cli.fraction,
        default=0.0,
        metavar="X",
        help="share of steps on the student's answers",
    )
    g.add_argument(
        "--max_gen_len",
        type=cli.positive_int,
        default=128,
        metavar="N",
        help="longest of those answers, in tokens",
    )
    cli.add_tax_path(parser)
    return parser.parse_args(argv)


def main(args):
    import random

    from dataset.lm_dataset import load_sft
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import held_out, means

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    path = cli.find_data(args, ["sft_t2t_mini.jsonl", "sft_mini_512.jsonl"], mini="sft.jsonl")
    train, val = batches.load(load_sft, path, tokenizer, args, rt)
    tax = batches.load_tax(path, tokenizer, args, rt)
    run = loop.Run("distillation", args, rt, tokenizer, path, train, val)
    model = checkpoint.new_model(args, tokenizer, rt)
    # its checksum is a setting of the run, as the data is
    teacher, args.teacher_crc32 = checkpoint.load_teacher(args, model.config, tokenizer, rt)
    run.load(model)
    run.other_bytes = sum(4 * p.numel() for p in teacher.parameters())
    head = model.lm_head.weight
    model, optimizers = run.prepare(model, dynamic=args.on_policy > 0)
    settings = dict(kind=args.divergence, temperature=args.temperature, jsd_beta=args.jsd_beta)
    teaching = functools.partial(teaching_loss, **settings)
    losses = {
        own: functools.partial(
            distillation_loss,
            teacher=teacher,
            head=head,
            teaching=functools.partial(teaching, alpha=0.0 if own else args.alpha),
        )
        for own in (False, True)
    }

    def update(step, micro_batches, lr_factor):
        own = random.Random(runtime.mix_seed(args.seed, step)).random() < args.on_policy
        if own:
            micro_batches = sample_answers(model, micro_batches, step, args, rt, tokenizer.pad_token_id)
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, losses[own])

    def check(model):
        """Of held-out answers, per token: cross-entropy, divergence from the teacher, agreement with it; and
        the alignment tax."""
        found = means(model, val, losses[False], args, rt)
        shown = {"ce": "val_loss", "divergence": "val_divergence", "agreement": "val_agreement"}
        figures = {name: found[key] for key, name in shown.items() if key in found}
        return figures | held_out(model, None, tax, args, rt)

    run.fit(model, optimizers, update, check, before=True)
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    run.end(model, f"python eval_llm.py --weight {args.save_weight}{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
