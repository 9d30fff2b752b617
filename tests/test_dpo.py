"""Direct preference optimisation: the losses against trl, and the stage as a user runs it."""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from preference_helpers import (
    base_weights,
    dpo_file,
    easy_pairs,
    lines,
    pair,
    train,
    validations,
)
from stage_helpers import plain_descent
from test_distributed import free_ports
from train_helpers import (
    MOE,
    REPO,
    assert_bit_equal,
    largest_difference,
    sft_file,
    stop_after,
    weights,
)

from trainer.train_dpo import LOSS_TYPES, diagnostics, dpo_loss, preference_loss

NAME = "dpo_32.pth"

# ----------------------------------------------------------------------------------------------------------
# The losses
# ----------------------------------------------------------------------------------------------------------

PAIRS, LENGTH, WIDTH, VOCABULARY = 3, 9, 5, 11
ANSWERS = [3, 5, 1, 4, 2, 6]  # tokens of the answers, chosen first
HAND = SimpleNamespace(  # two pairs: gains of the chosen answers +1 and -1, of the rejected ones -1 and 0
    policy=torch.tensor([-12.0, -20.0, -15.0, -18.5], dtype=torch.float64),
    reference=torch.tensor([-13.0, -19.0, -14.0, -18.5], dtype=torch.float64),
    answers=torch.tensor([4, 10, 5, 8]),
)


@pytest.fixture(scope="module")
def case():
    """A micro-batch in float64 whose hidden states stand in for a model."""
    draw = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=draw, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH), generator=draw)
    mask = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.int64)
    for row, count in enumerate(ANSWERS):
        end = LENGTH - row % 3  # answers end at different places; what follows is padding
        mask[row, end - count : end] = 1
    hidden, head = randn(2 * PAIRS, LENGTH, WIDTH), 0.3 * randn(VOCABULARY, WIDTH)
    before = hidden + 0.5 * randn(2 * PAIRS, LENGTH, WIDTH)  # what the reference's blocks gave
    return SimpleNamespace(ids=ids, mask=mask, hidden=hidden, head=head, before=before)


def log_probs(hidden, head, ids, mask):
    """Of every next token (2B, T - 1), 0 where it is none of an answer's."""
    logps = (hidden @ head.T)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return logps * mask[:, 1:]


def ours(case, hidden, head, beta, loss_type, **settings):
    """Loss and figures by the function that the stage's optimizer step calls."""
    batch = {
        "input_ids": case.ids,
        "position_ids": torch.arange(LENGTH).expand_as(case.ids),
        "labels": case.ids.masked_fill(case.mask == 0, -100),
        "sequence_ids": torch.arange(2 * PAIRS)[:, None].expand_as(case.ids),
        "last": torch.arange(2 * PAIRS),
        "answers": case.mask.sum(1),
        "reference": log_probs(case.before, case.head, case.ids, case.mask).sum(1).detach(),
    }

    def model(**inputs):
        return SimpleNamespace(hidden_states=(hidden,), aux_loss=None)

    pair_loss = functools.partial(preference_loss, beta=beta, loss_type=loss_type)
    totals = {"loss": PAIRS, "chosen_tokens": sum(ANSWERS[:PAIRS])}
    figures = functools.partial(diagnostics, beta=beta, loss_type=loss_type)
    return dpo_loss(model, batch, totals, head, pair_loss, figures, **settings)


def theirs(case, hidden, head, beta, loss_types, loss_weights, monkeypatch):
    """trl's loss and logged metrics, from the same hidden states."""
    from trl.trainer import dpo_trainer

    def output(hidden, head):
        logits = hidden @ head.T
        logps = log_probs(hidden, head, case.ids, case.mask)
        blank = torch.zeros_like(logps)
        extra = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool()}
        return lambda **inputs: SimpleNamespace(logits=logits, log_probs=logps, **extra)

    monkeypatch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(dpo_trainer, "is_peft_model", lambda model: False)
    same = lambda x: x  # noqa: E731
    model, metrics = output(hidden, head), {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        ref_model=output(case.before, case.head),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same, unwrap_model=same),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        loss_types=loss_types,
        loss_weights=loss_weights,
        beta=beta,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        use_weighting=False,
        use_liger_kernel=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": case.ids,
        "attention_mask": torch.ones_like(case.ids),
        "completion_mask": case.mask,
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
def test_loss_gradient_and_figures_are_those_of_trl(case, loss_type, beta, monkeypatch):
    found = [x.clone().requires_grad_() for x in (case.hidden, case.head)]
    wanted = [x.clone().requires_grad_() for x in (case.hidden, case.head)]
    loss, sums = ours(case, *found, beta, loss_type)
    expected, metrics = theirs(case, *wanted, beta, [loss_type], [1.0], monkeypatch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for mine, other in zip(torch.autograd.grad(loss, found), torch.autograd.grad(expected, wanted)):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    names = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"}
    names |= {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    for name, other in names.items():
        assert float(sums[name]) / PAIRS == pytest.approx(metrics[other], rel=1e-6), name
    assert float(sums["loss"].detach()) / PAIRS == pytest.approx(float(expected.detach()))


def test_fine_tuning_beside_it_is_that_of_trl(case, monkeypatch):
    """Over the chosen tokens of the whole step, not a mean of means over pairs."""
    found = [x.clone().requires_grad_() for x in (case.hidden, case.head)]
    wanted = [x.clone().requires_grad_() for x in (case.hidden, case.head)]
    loss, _ = ours(case, *found, 0.1, "sigmoid", sft_weight=0.7)
    expected, _ = theirs(case, *wanted, 0.1, ["sigmoid", "sft"], [1.0, 0.7], monkeypatch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for mine, other in zip(torch.autograd.grad(loss, found), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_simpo_is_that_of_trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    policy = HAND.policy.clone().requires_grad_()
    losses = preference_loss(policy, HAND.reference, HAND.answers, 2.0, "simpo", simpo_gamma=0.8)
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    means = HAND.policy.clone().requires_grad_()
    expected, _, _ = CPOTrainer.cpo_loss(trainer, *(means / HAND.answers).chunk(2))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    mine, other = torch.autograd.grad(losses.sum(), policy)[0], torch.autograd.grad(expected.sum(), means)[0]
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def by_hand(x):
    """-log sigmoid(x)"""
    return math.log1p(math.exp(-x))


# Delta = (1 - -1, -1 - 0) = (2, -1); per token (1/4 + 1/5, -1/10 - 0) = (0.45, -0.1)
NUMBERS = {
    "sigmoid": [by_hand(0.2), by_hand(-0.1)],
    "ipo": [(0.45 - 5) ** 2, (-0.1 - 5) ** 2],
    "sigmoid_norm": [by_hand(0.045), by_hand(-0.01)],
    # the first chosen answer became likelier: nothing is added; the second lost 1 nat: 5 are taken from Delta
    "dpop": [by_hand(0.2), by_hand(0.1 * (-1 - 5))],
    # means -3 and -3, -2 and -2.3125; no reference
    "simpo": [by_hand(0.1 * (-3 + 3) - 0.5), by_hand(0.1 * (-2 + 2.3125) - 0.5)],
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_by_hand(loss_type):
    losses = preference_loss(HAND.policy, HAND.reference, HAND.answers, 0.1, loss_type)
    assert losses.tolist() == pytest.approx(NUMBERS[loss_type], rel=1e-12)
    if loss_type == "sigmoid":
        assert losses.mean().item() == pytest.approx(0.6712678, abs=5e-8)


def test_dpop_pulls_a_chosen_answer_back_only_where_it_fell():
    """d loss / d s(y_w) is beta sigmoid(-z), times 1 + lambda where the answer became less likely."""
    policy = HAND.policy.clone().requires_grad_()
    losses = preference_loss(policy, HAND.reference, HAND.answers, 0.1, "dpop", dpop_lambda=3.0)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    slope = [-0.1 / (1 + math.exp(0.2)), -0.1 / (1 + math.exp(0.1 * (-1 - 3)))]
    assert grad.tolist() == pytest.approx([slope[0], 4 * slope[1], -slope[0], -slope[1]], rel=1e-12)
    plain = preference_loss(HAND.policy, HAND.reference, HAND.answers, 0.1, "dpop", dpop_lambda=0.0)
    assert plain.tolist() == pytest.approx(NUMBERS["sigmoid"], rel=1e-12)


def test_simpo_asks_no_reference():
    """Not even one of infinite probability ratios."""
    settings = (HAND.answers, 2.0, "simpo")
    wanted = preference_loss(HAND.policy, HAND.reference, *settings)
    assert preference_loss(HAND.policy, HAND.reference + 100, *settings).equal(wanted)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_policy_that_is_its_reference(loss_type):
    """Without any difference the losses are constants: ln 2, or for ipo the square of what it aims at."""
    losses = preference_loss(HAND.policy, HAND.policy, HAND.answers, 0.1, loss_type)
    wanted = {"ipo": [25.0, 25.0], "simpo": NUMBERS["simpo"]}.get(loss_type, [math.log(2)] * 2)
    assert losses.tolist() == pytest.approx(wanted, rel=1e-12)


def test_swapping_chosen_and_rejected_negates_the_margin():
    def swap(x):
        return x.roll(2)

    first = diagnostics(HAND.policy, HAND.reference, HAND.answers, 0.1)
    second = diagnostics(swap(HAND.policy), swap(HAND.reference), swap(HAND.answers), 0.1)
    assert second["margin"] == -first["margin"] != 0
    assert second["reward_chosen"] == first["reward_rejected"]
    assert second["logp_chosen"] == first["logp_rejected"]
    assert (first["accuracy"], second["accuracy"]) == (1, 1), "one pair of two is right either way"
    for name in ("sigmoid", "sigmoid_norm"):  # -log sigmoid(x) + log sigmoid(-x) = -x
        one = preference_loss(HAND.policy, HAND.reference, HAND.answers, 0.1, name)
        other = preference_loss(swap(HAND.policy), swap(HAND.reference), swap(HAND.answers), 0.1, name)
        delta = torch.tensor([2.0, -1.0] if name == "sigmoid" else [0.45, -0.1], dtype=torch.float64)
        torch.testing.assert_close(one - other, -0.1 * delta)


def test_diagnostics_by_hand():
    found = diagnostics(HAND.policy, HAND.reference, HAND.answers, 0.1)
    wanted = {"reward_chosen": 0.0, "reward_rejected": -0.1, "margin": 0.1, "accuracy": 1.0}
    wanted |= {"logp_chosen": -3 - 2, "logp_rejected": -3 - 2.3125}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted)
    level = diagnostics(HAND.policy, HAND.policy, HAND.answers, 0.1)
    assert level["accuracy"] == 0, "a tie is not right"


def test_simpos_rewards_are_means_without_a_reference():
    found = diagnostics(HAND.policy, HAND.reference, HAND.answers, 2.0, "simpo")
    means = 2.0 * HAND.policy / HAND.answers
    assert float(found["reward_chosen"]) == pytest.approx(float(means[:2].sum()))
    assert float(found["margin"]) == pytest.approx(float(means[:2].sum() - means[2:].sum()))
    moved = diagnostics(HAND.policy, HAND.reference - 5, HAND.answers, 2.0, "simpo")
    assert all(found[name] == moved[name] for name in found)


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------

DIAGNOSTICS = {"accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twenty steps on pairs that are easy to tell apart; several tests look at what they left."""
    folder = tmp_path_factory.mktemp("run")
    before = base_weights(folder).read_bytes()
    train(folder, "--val_interval", 10, "--tax_path", sft_file(folder, rows=10), steps=20)
    return SimpleNamespace(folder=folder, base=before, validations=validations(folder), lines=lines(folder))


def test_before_the_first_step_nothing_is_preferred(run):
    first = run.validations[0]
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val_accuracy"] == 0 and abs(first["val_margin"]) < 1e-5
    assert abs(first["val_reward_chosen"]) < 1e-5 and abs(first["val_reward_rejected"]) < 1e-5


def test_preferences_are_learned_and_hold_for_unseen_questions(run):
    margins = [line["val_margin"] for line in run.validations]
    assert [line["step"] for line in run.validations] == [0, 10, 20] and margins == sorted(margins)
    last = run.validations[-1]
    assert margins[-1] > 0.1 and last["val_accuracy"] == 1 and last["val_loss"] < 0.65
    steps = [line for line in run.lines if "lr" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.02) and steps[-1]["loss"] < 0.65
    assert steps[-1]["margin"] > 0.1 > steps[0]["margin"] and steps[-1]["accuracy"] == 1


def test_the_log_says_what_to_look_at(run):
    steps = [line for line in run.lines if "lr" in line]
    assert len(steps) == 10 and all(DIAGNOSTICS | {"loss", "grad_norm", "tokens"} <= set(x) for x in steps)
    for line in run.validations:
        assert {f"val_{name}" for name in DIAGNOSTICS} | {"val_loss", "tax_loss"} <= line.keys()
        margin = line["val_reward_chosen"] - line["val_reward_rejected"]
        assert line["val_margin"] == pytest.approx(margin, abs=1e-5)
    assert all(-12 < x[name] < 0 for x in steps for name in ("logp_chosen", "logp_rejected"))


def test_the_base_is_read_and_left_alone(run):
    from trainer import checkpoint

    path = run.folder / "out/full_sft_32.pth"
    assert path.read_bytes() == run.base
    metadata = checkpoint.read_weights(run.folder / "out" / NAME)[1]
    parent = {"weight": "full_sft", "step": None, "crc32": checkpoint.read_weights(path)[1]["crc32"]}
    assert metadata["stage"] == "dpo" and metadata["parent"] == parent
    assert metadata["metrics"]["val_accuracy"] == 1


def sequence_logprobs(model, pairs):
    """(2P,) from the logits of one sequence at a time."""
    sums = []
    for row in range(len(pairs)):
        batch = pairs.collate([row], 1)
        for number in range(2):
            mine = batch["sequence_ids"] == number
            ids, labels = batch["input_ids"][mine], batch["labels"][mine]
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            sums.append(-F.nll_loss(logps[:-1], labels[1:], reduction="sum"))
    return torch.stack(sums).view(-1, 2).T.flatten()


def test_logged_figures_follow_from_the_two_files(run):
    """Policy minus base, over the held-out pairs, by plain logits: the reference is the model of
    --from_weight, and the pairs of the resume file's reference are those of the data."""
    from dataset.preferences import load_pairs
    from trainer import checkpoint

    sides = load_pairs(run.folder / "dpo.jsonl", checkpoint.load_tokenizer(), 64, val_fraction=0.2)
    base, tuned = (checkpoint.load_model(run.folder / "out" / name)[0] for name in ("full_sft_32.pth", NAME))
    saved = checkpoint.read_file(run.folder / "checkpoints/dpo_32_resume.pth")["extra"]
    for name, pairs in zip(("train", "val"), sides):
        reference = sequence_logprobs(base, pairs).detach()
        torch.testing.assert_close(saved[name], reference, rtol=1e-5, atol=1e-4)
    policy = sequence_logprobs(tuned, pairs).detach()
    answers = torch.from_numpy(pairs.answers).T.flatten()
    sums = diagnostics(policy, reference, answers, 0.1)
    sums["loss"] = preference_loss(policy, reference, answers, 0.1).sum()
    for name, value in sums.items():
        logged = run.validations[-1][f"val_{name}"]
        assert logged == pytest.approx(float(value) / len(pairs), abs=1e-4), name
    kl, count = 0.0, 0
    for row in range(len(pairs)):  # over the tokens of the chosen answers, all tokens they might have been
        batch = pairs.collate([row], 1)
        chosen = batch["sequence_ids"] == 0
        ids, is_answer = batch["input_ids"][chosen][None], batch["labels"][chosen][1:] != -100
        log_q, log_p = (m(input_ids=ids).logits[0, :-1][is_answer].log_softmax(-1) for m in (tuned, base))
        kl += (log_q.exp() * (log_q - log_p)).sum().item()
        count += int(is_answer.sum())
    assert count == pairs.answers[:, 0].sum()
    assert kl / count > 1e-3
    assert run.validations[-1]["val_kl"] == pytest.approx(kl / count, rel=1e-3)
    assert run.validations[0]["val_kl"] == pytest.approx(0, abs=1e-7)


EACH_LOSS = {
    "sigmoid": ["--dtype", "bfloat16"],
    "ipo": ["--dropout", 0.1],
    "dpop": ["--tie_word_embeddings", 0],
    "simpo": ["--beta", 2],
    "sigmoid_norm": ["--pack", 0],
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_learns(tmp_path, run, loss_type):
    """Each with something else that it must bear. The reference is of the whole model, in the type of the
    run, so that its own difference from it is nothing at all."""
    base_weights(tmp_path, tie_word_embeddings=loss_type != "dpop")
    train(tmp_path, "--loss_type", loss_type, *EACH_LOSS[loss_type], steps=8)
    first, *_, last = validations(tmp_path)
    expected = {"ipo": 25, "simpo": None}.get(loss_type, math.log(2))
    if expected:
        assert first["val_loss"] == pytest.approx(expected, abs=1e-6)
    if loss_type != "simpo":  # which compares no gains over a reference
        assert first["val_accuracy"] == 0 and abs(first["val_margin"]) < 1e-5
    assert last["val_margin"] > first["val_margin"] + 0.003
    assert last["val_loss"] < first["val_loss"]


def test_fine_tuning_beside_it_makes_chosen_answers_likelier(tmp_path, run):
    train(tmp_path, "--val_interval", 10, "--sft_weight", 1, steps=20)
    first, *_, last = validations(tmp_path)
    assert first["val_logp_chosen"] == run.validations[0]["val_logp_chosen"]
    assert last["val_logp_chosen"] > run.validations[-1]["val_logp_chosen"] + 0.2
    assert last["val_accuracy"] > 0.8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    base_weights(folder, use_moe=True, num_experts=3, moe_intermediate_size=32)
    train(folder, *MOE, steps=8)
    return folder


def test_a_mixture_of_experts_learns_too(mixture):
    first, *_, last = validations(mixture)
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6) and first["val_accuracy"] == 0
    assert last["val_margin"] > 0.01 and (mixture / "out/dpo_32_moe.pth").exists()


def test_the_balance_loss_of_a_mixture_is_logged(mixture):
    """As in every stage that adds it (docs/metrics.md): a mean over micro-batches, not over pairs. Even load
    gives coefficient x experts per token, 0.01 x 2."""
    steps = [line for line in lines(mixture) if "lr" in line]
    assert all(line.get("aux_loss", 0) == pytest.approx(0.02, rel=0.5) for line in steps)


# ----------------------------------------------------------------------------------------------------------
# How a step is cut
# ----------------------------------------------------------------------------------------------------------


CUT = ["--sft_weight", 0.3, "--grad_clip", 0, "--beta", 0.5]


def test_one_step_is_the_gradient_of_the_formula(tmp_path, monkeypatch):
    """Mean over pairs of -log sigmoid(beta Delta), and mean over their chosen tokens of -log p."""
    from dataset.preferences import load_pairs
    from trainer import checkpoint

    plain_descent(monkeypatch, 0.1)
    path = dpo_file(tmp_path, easy_pairs(4))
    train(tmp_path, *CUT, "--val_fraction", 0, "--schedule", "constant", "--warmup_steps", 0, steps=1)
    model = checkpoint.load_model(tmp_path / "out/full_sft_32.pth")[0]
    pairs = load_pairs(path, checkpoint.load_tokenizer(), 64)[0]
    policy = sequence_logprobs(model, pairs)
    chosen, rejected = (policy - policy.detach()).chunk(2)
    loss = -F.logsigmoid(0.5 * (chosen - rejected)).mean()
    (loss - 0.3 * policy.chunk(2)[0].sum() / pairs.answers[:, 0].sum()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert largest_difference(model.state_dict(), weights(tmp_path, NAME)) < 1e-6
    assert largest_difference(weights(tmp_path, "full_sft_32.pth"), weights(tmp_path, NAME)) > 1e-2


def test_the_denominator_is_the_pairs_of_the_whole_step(tmp_path, monkeypatch):
    """Steps of 8 pairs, whole or in parts, of answers of unequal lengths; the last of an epoch is smaller."""
    plain_descent(monkeypatch, 0.05)
    rows = easy_pairs(27)
    for batch_size, accumulation, name in ((8, 1, "whole"), (4, 2, "halves"), (1, 8, "single")):
        dpo_file(tmp_path / name, rows)
        cut = ["--batch_size", batch_size, "--accumulation_steps", accumulation, "--max_steps", 0]
        train(tmp_path / name, *CUT, *cut, "--val_fraction", 0)
    start, whole = (weights(tmp_path / "whole", name) for name in ("full_sft_32.pth", NAME))
    assert largest_difference(start, whole) > 1e-2
    assert lines(tmp_path / "whole")[-1]["step"] == 4, "8 + 8 + 8 + 3"
    for name in ("halves", "single"):
        assert largest_difference(whole, weights(tmp_path / name, NAME)) < 1e-6
        for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / name), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


# Of 9 pairs in steps of 4 the last step has one, so the second process none. Of 7 in steps of 4, one by one,
# the second process has one in the last step, and its last micro-batch, in which gradients travel, is empty.
TWO = {
    "no_pair": (9, ["--batch_size", 4, "--tie_word_embeddings", 0]),
    "no_last_pair_for_a_mixture": (
        7,
        ["--batch_size", 1, "--accumulation_steps", 4, *MOE, "--router_aux_loss_coef", 0],
    ),
}


def run_cut(folder, name):
    """One of the runs above, in this process or as one of two."""
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch, 0.05)
        more = ["--val_path", folder / "val.jsonl", "--max_steps", 0, "--log_interval", 1]
        train(folder / name, *CUT, *TWO[name][1], *more)


def be_a_process(folder, rank, ports):
    """Run by each of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    for name, port in zip(TWO, json.loads(ports)):
        os.environ["MASTER_PORT"] = str(port)
        run_cut(Path(folder), name)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders "one" and "two": the same runs by one process and by two."""
    top = tmp_path_factory.mktemp("both")
    for folder in (top / "one", top / "two"):
        dpo_file(folder, easy_pairs(5, seed=3), "val.jsonl")
        for name, (rows, more) in TWO.items():
            dpo_file(folder / name, easy_pairs(rows))
            moe = dict(use_moe=True, num_experts=3, moe_intermediate_size=32) if "--use_moe" in more else {}
            base_weights(folder / name, tie_word_embeddings="--tie_word_embeddings" not in more, **moe)
    code = f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import test_dpo"
    code += "; test_dpo.be_a_process(*sys.argv[1:])"
    command, ports = [sys.executable, "-c", code, str(top / "two")], json.dumps(free_ports(len(TWO)))
    processes = [
        subprocess.Popen([*command, rank, ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]
    for name in TWO:
        run_cut(top / "one", name)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return top


@pytest.mark.parametrize("name", TWO)
def test_two_processes_make_the_weights_of_one(both, name):
    file = "dpo_32_moe.pth" if "mixture" in name else NAME
    one, two = (weights(both / folder / name, file) for folder in ("one", "two"))
    start = weights(both / "one" / name, file.replace("dpo", "full_sft"))
    assert largest_difference(one, start) > 1e-3 and largest_difference(one, two) < 1e-6


@pytest.mark.parametrize("name", TWO)
def test_two_processes_log_what_one_does(both, name):
    """Losses and diagnostics are of pairs that exist, and so are the tokens."""
    one, two = (lines(both / folder / name) for folder in ("one", "two"))
    assert len(one) == len(two) and {"val_loss", "tokens"} <= set().union(*one)
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Going on
# ----------------------------------------------------------------------------------------------------------


def stop_and_go_on(folder, monkeypatch, *more, steps=8, at=5):
    """A run that is stopped at a step without a save, and continued where only its own files are left."""
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        train(folder, *more, steps=steps)
    assert lines(folder)[-1]["step"] < steps
    (folder / "out/full_sft_32.pth").rename(folder / "base.pth")
    (folder / "out/full_sft_32.pth").write_bytes(b"another file by now")
    train(folder, *more, "--from_resume", 1, steps=steps)


def test_a_resumed_run_is_bit_equal_and_keeps_its_reference(tmp_path, monkeypatch):
    """Recomputed from weights that have moved, or from none, the reference would be another."""
    from trainer import checkpoint, validation

    more = ["--dropout", 0.1, "--accumulation_steps", 2, "--sft_weight", 0.1]
    train(tmp_path / "whole", *more, steps=8)
    original, scored = validation.sequence_scores, []

    def sequence_scores(model, pairs, score, args, rt, *more):
        scored.append((args.from_resume, len(pairs)))
        return original(model, pairs, score, args, rt, *more)

    monkeypatch.setattr(validation, "sequence_scores", sequence_scores)
    stop_and_go_on(tmp_path / "broken", monkeypatch, *more)
    assert_bit_equal(weights(tmp_path / "whole", NAME), weights(tmp_path / "broken", NAME))
    # the one figure that asks for the base's file, which is garbage by now
    whole, broken = (
        [{k: v for k, v in line.items() if k != "val_kl"} for line in lines(tmp_path / name)]
        for name in ("whole", "broken")
    )
    assert whole == broken and any("val_kl" in line for line in lines(tmp_path / "whole"))
    whole, broken = (
        checkpoint.read_file(tmp_path / name / "checkpoints/dpo_32_resume.pth")["extra"]
        for name in ("whole", "broken")
    )
    for name in ("train", "val"):
        assert whole[name].equal(broken[name]), name
    in_training = {number for resumed, number in scored if not resumed}
    assert {number for resumed, number in scored if resumed} == {min(in_training)}, "validation alone"


def refused(folder, capsys, pattern, *more, **settings):
    """Ends with one line and exit code 2, and leaves the resume file as it was."""
    path = folder / "checkpoints/dpo_32_resume.pth"
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(SystemExit) as end:
        train(folder, *more, **settings)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and re.search(pattern, errors[0]), captured.err
    assert "Traceback" not in captured.err
    assert before is None or path.read_bytes() == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two runs that were stopped in the middle, one with held-out pairs of its own, one without any."""
    top = tmp_path_factory.mktemp("stopped")
    held_out = ["--val_path", dpo_file(top, easy_pairs(9, seed=4), "before.jsonl")]
    for name, more in {"with": held_out, "without": ["--val_fraction", 0]}.items():
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 4)
            train(top / name, *more)
    return top


@pytest.mark.parametrize(
    "change, words",
    [
        (["--beta", 0.2], "--beta 0.1 -> 0.2"),
        (["--loss_type", "ipo"], "--loss_type sigmoid -> ipo"),
        (["--sft_weight", 0.1], "--sft_weight 0.0 -> 0.1"),
        (["--max_seq_len", 63], "training data"),
        (["--batch_size", 5], "rows per step"),
    ],
)
def test_changed_settings_are_refused(stopped, capsys, change, words):
    refused(stopped / "without", capsys, words, "--from_resume", 1, "--val_fraction", 0, *change)


@pytest.mark.parametrize("name, number", [("with", 9), ("with", 7), ("without", 7)])
def test_other_held_out_pairs_are_refused(stopped, capsys, name, number):
    """The stored reference is of the pairs that were held out before. Of others, as many of them (9) or
    fewer, or where there were none, it can not be computed any more: the model has moved."""
    path = dpo_file(stopped, easy_pairs(number, seed=5), f"now{number}.jsonl")
    refused(stopped / name, capsys, "held.out|val_path", "--from_resume", 1, "--val_path", path)


def test_a_run_by_the_clock_goes_on_with_the_held_out_pairs_it_began_with(tmp_path, monkeypatch):
    """On a CPU --max_minutes validates a part of them in little time; it is not given again."""
    from trainer import batches, cli

    monkeypatch.setattr(cli, "validation_tokens", lambda args: 5 * args.max_seq_len)
    monkeypatch.setattr(batches, "steps_for_minutes", lambda *_: (8, []))
    clock = ["--max_steps", 0, "--max_minutes", 5]
    train(tmp_path / "whole", *clock)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(tmp_path / "broken", *clock)
    train(tmp_path / "broken", "--max_steps", 0, "--from_resume", 1)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


# ----------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------


def test_bad_pairs_end_in_one_line(tmp_path, capsys):
    path = dpo_file(tmp_path, [*easy_pairs(3), pair("q", "a", "a")])
    refused(tmp_path, capsys, r"dpo\.jsonl:4: .*are the same answer: remove this row")
    sft_file(tmp_path).rename(path)
    refused(tmp_path, capsys, r"dpo\.jsonl:1: the key \"chosen\" is missing")
    dpo_file(tmp_path)
    refused(
        tmp_path,
        capsys,
        r"no pair fits into --max_seq_len 8 \(all 40 are longer\)",
        "--max_seq_len",
        8,
        "--val_fraction",
        0,
    )
    assert not list(tmp_path.glob("out/dpo*")) and not list(tmp_path.glob("checkpoints/*"))


def test_a_missing_base_ends_in_one_line(tmp_path, capsys):
    base_weights(tmp_path)
    refused(
        tmp_path, capsys, "full_sft_64.pth does not exist.*run trainer/train_full_sft.py", "--hidden_size", 64
    )
