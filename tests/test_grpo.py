"""GRPO and its relatives: the losses by hand and against trl, what a step makes of a group, and that every
flag of the loss has a say."""

import argparse
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import rl_helpers
import torch
from preference_helpers import small_model
from rl_helpers import Script, prompt_rows, train
from stage_helpers import base_weights, plain_descent
from train_helpers import assert_bit_equal, largest_difference, log_lines, weights, write_lines

from trainer import rl_metrics, rollout, runtime, train_grpo
from trainer.rl_flags import LOSS_TYPES
from trainer.rollout import Sample, Trajectories
from trainer.train_grpo import (
    cispo_loss,
    clipped_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    reference_kl_loss,
    token_weights,
)

NAME = "grpo_32.pth"


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def near(value, expected, digits=6):
    return torch.allclose(torch.as_tensor(value).double(), f64(*expected), rtol=0, atol=0.6 * 10**-digits)


# ----------------------------------------------------------------------------------------------------------
# By hand: two answers of 3 and 2 tokens, the first better than the second
# ----------------------------------------------------------------------------------------------------------

OLD, NEW = f64(0.5, 0.2, 0.1, 0.4, 0.4).log(), f64(0.65, 0.3, 0.1, 0.2, 0.5).log()
BETTER = f64(1, 1, 1, -1, -1)
ANSWER, LENGTH = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 3, 3, 2, 2])
TOTALS = {"answers": 2, "loss": 5}


def summed(losses, loss_type, longest=4):
    return float((losses * token_weights(loss_type, LENGTH, TOTALS, longest)).sum())


def test_clipped_losses_by_hand():
    losses = clipped_loss(NEW - OLD, BETTER, 0.2, 0.2)
    assert near(losses, [-1.2, -1.2, -1, 0.8, 1.25])
    by_type = [summed(losses, kind) for kind in ("grpo", "dapo", "dr_grpo")]
    assert near(by_type, [-0.0541667, -0.27, -0.16875])


def test_clipping_higher_by_hand():
    losses = clipped_loss(NEW - OLD, BETTER, 0.2, 0.28)
    assert near(losses, [-1.28, -1.28, -1, 0.8, 1.25])
    by_type = [summed(losses, kind) for kind in ("grpo", "dapo", "dr_grpo")]
    assert near(by_type, [-0.0808333, -0.302, -0.18875])


@pytest.mark.parametrize("cap, expected", [(1.28, 0.5447839), (5.0, 0.5994818)])
def test_cispo_by_hand(cap, expected):
    losses = cispo_loss(NEW, NEW - OLD, BETTER, cap)
    assert near([summed(losses, "cispo")], [expected])


def test_gspo_by_hand():
    """The ratio of an answer is the geometric mean of its tokens', 1.2493330 and .7905694."""
    wide = gspo_loss(NEW - OLD, BETTER, 9.0, 9.0, ANSWER)
    assert near(wide, [-1.2493330] * 3 + [0.7905694] * 2)
    clipped = gspo_loss(NEW - OLD, BETTER, 0.2, 0.2, ANSWER)
    assert near(clipped, [-1.2] * 3 + [0.8] * 2) and near([summed(clipped, "gspo")], [-0.2])


def test_where_clipping_takes_the_gradient():
    """Only where the loss would push on: the second update still mends what the first overdid."""
    log_ratio = f64(1.5, 1.5, 0.5, 0.5, 1.0).log().requires_grad_()
    clipped_loss(log_ratio, f64(1, -1, 1, -1, 1), 0.2, 0.2).sum().backward()
    assert near(log_ratio.grad, [0, 1.5, -0.5, 0, -1])


def test_every_cispo_token_keeps_its_gradient():
    """sg(min(r, cap)) A at log pi, beyond the cap too."""
    logps = NEW.clone().requires_grad_()
    cispo_loss(logps, logps - OLD, BETTER, 1.28).sum().backward()
    assert near(logps.grad, [-1.28, -1.28, -1, 0.5, 1.25])


def test_kl_estimates_by_hand():
    ours, reference = f64(math.log(0.4)), f64(math.log(0.3))
    same = ours - ours
    assert near(reference_kl_loss(ours, reference, same, "k2"), [0.0413805])
    assert near(reference_kl_loss(ours, reference, same, "k3"), [0.0376821])
    assert near(reference_kl_loss(ours, reference, f64(math.log(2)), "corrected"), [2 * 0.0376821])
    figures = rl_metrics.kl_figures(ours, reference)
    assert near(figures["kl_k1"], [0.2876821]) and near(figures["kl"], [0.0376821])


# ----------------------------------------------------------------------------------------------------------
# Against trl
# ----------------------------------------------------------------------------------------------------------

ROWS, PROMPT, LONGEST, WIDTH, VOCABULARY = 4, 3, 7, 5, 11
ENDS = [7, 4, 1, 6]  # of the answers, in tokens


@pytest.fixture(scope="module")
def case():
    """Four answers in float64. Hidden states stand in for a model; in two answers a tool spoke in between."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ids = torch.randint(VOCABULARY, (ROWS, PROMPT + LONGEST), generator=draw)
    ended = torch.arange(LONGEST) < torch.tensor(ENDS)[:, None]
    tool = torch.ones(ROWS, LONGEST, dtype=torch.bool)
    tool[0, 2:4] = tool[3, 3] = False
    hidden, head = randn(ROWS, PROMPT + LONGEST, WIDTH), 0.4 * randn(VOCABULARY, WIDTH)
    now = log_probs(hidden, head, ids)
    return SimpleNamespace(
        ids=ids,
        ended=ended,
        tool=tool,
        mask=ended & tool,
        hidden=hidden,
        head=head,
        old=now + 0.3 * randn(ROWS, LONGEST),
        reference=now + 0.5 * randn(ROWS, LONGEST),
        sampler=now + 0.6 * randn(ROWS, LONGEST),
        advantages=f64(1.2, -0.7, 0.4, -0.9),
    )


def log_probs(hidden, head, ids, temperature=1.0):
    """Of the answers' tokens (ROWS, LONGEST)."""
    logps = (hidden @ head.T / temperature).log_softmax(-1)[:, PROMPT - 1 : -1]
    return logps.gather(2, ids[:, PROMPT:, None]).squeeze(2)


def settings(loss_type="grpo", **more):
    base = dict(temperature=1.0, tis_cap=0.0, beta=0.0, kl_type="k3", max_gen_len=LONGEST)
    base |= dict(loss_type=loss_type, epsilon=0.2, epsilon_high=0.28)
    return argparse.Namespace(**base | more)


def ours(case, hidden, head, args, parts=((0, 1, 2, 3),), off_policy=True):
    """Loss by the function that the stage's optimizer step calls, in micro-batches of the rows `parts`."""
    lengths = case.mask.sum(1)
    numbers = torch.full((ROWS, PROMPT + LONGEST), -1)
    numbers[:, PROMPT:][case.mask] = torch.arange(int(lengths.sum()))
    of_tokens = torch.arange(ROWS).repeat_interleave(lengths)
    step = SimpleNamespace(
        old=case.old[case.mask] if off_policy else None,
        reference=case.reference[case.mask] if args.beta else None,
        sampler=case.sampler[case.mask],
        advantages=case.advantages[of_tokens],
        sequence=of_tokens,
        length_of=lengths.double()[of_tokens],  # 1 / integers would be float32
        ratio=torch.ones(len(of_tokens)),
    )
    totals, loss, sums = {"answers": f64(ROWS)[0], "loss": f64(len(of_tokens))[0]}, 0.0, defaultdict(float)
    for part in map(list, parts):

        def model(part=part, **inputs):
            return SimpleNamespace(hidden_states=(hidden[part],), aux_loss=None)

        batch = {
            "input_ids": case.ids[part],
            "position_ids": torch.arange(PROMPT + LONGEST).expand_as(case.ids[part]),
            "labels": case.ids[part].masked_fill(numbers[part] < 0, -100),
            "tokens": numbers[part],
        }
        one, figures = grpo_loss(model, batch, totals, head, step, args)
        loss = loss + one
        for name, value in figures.items():
            sums[name] += float(value)
    return loss, {name: value / len(of_tokens) for name, value in sums.items()}


def theirs(case, hidden, head, args, off_policy=True):
    """trl's loss and logged figures, from the same hidden states."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logps = log_probs(hidden, head, case.ids, args.temperature)
    old = case.old if off_policy else logps.detach()
    same = lambda x, **_: x  # noqa: E731
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.ones_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if args.loss_type == "gspo" else "token",
        beta=args.beta,
        loss_type="grpo" if args.loss_type == "gspo" else args.loss_type,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        args=SimpleNamespace(
            use_bias_correction_kl=args.kl_type == "corrected", delta=None, steps_per_generation=1
        ),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=args.max_gen_len,
        use_vllm=bool(args.tis_cap),
        vllm_importance_sampling_correction=bool(args.tis_cap),
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        _metrics=metrics,
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=same,
            reduce=lambda x, reduction=None: x,
            gather_for_metrics=same,
            sync_gradients=True,
        ),
    )
    inputs = {
        "prompt_ids": case.ids[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": case.ids[:, PROMPT:],
        "completion_mask": case.ended.long(),
        "tool_mask": case.tool.long(),
        "advantages": case.advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": case.reference,
        # as trl's `token_truncate` makes it
        "importance_sampling_ratio": (old - case.sampler)
        .exp()
        .clamp(max=args.tis_cap or None, min=0)
        .detach(),
        "num_items_in_batch": case.mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


def with_gradients(compute, case, *rest, **more):
    """(loss, figures, gradient by hidden states, by the head)."""
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    loss, figures = compute(case, hidden, head, *rest, **more)
    loss.backward()
    return loss.detach(), figures, hidden.grad, head.grad


VARIANTS = {
    "grpo": settings("grpo", epsilon_high=0.2),
    "grpo, clip higher": settings("grpo"),
    "grpo, k3": settings("grpo", beta=0.3),
    "grpo, corrected": settings("grpo", beta=0.3, kl_type="corrected"),
    "dapo": settings("dapo"),
    "dapo, k3": settings("dapo", beta=0.3),
    "dr_grpo": settings("dr_grpo", max_gen_len=9),
    "gspo": settings("gspo", epsilon=0.05, epsilon_high=0.07),
    "gspo, k3": settings("gspo", epsilon=3e-4, epsilon_high=4e-4, beta=0.3),
    "cispo, cap 5": settings("cispo", epsilon=0.0, epsilon_high=5.0),
    "cispo, cap 1.2": settings("cispo", epsilon=0.0, epsilon_high=1.2),
    "cispo, k3": settings("cispo", epsilon=0.0, epsilon_high=1.2, beta=0.3),
    "grpo, sampler": settings("grpo", tis_cap=1.3),
    "cispo, sampler": settings("cispo", epsilon=0.0, epsilon_high=1.2, tis_cap=2.0, beta=0.3),
    "dapo, colder": settings("dapo", temperature=0.7),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("off_policy", [True, False])
def test_equals_trl(case, variant, off_policy):
    """Loss and gradients, in any micro-batches."""
    args = VARIANTS[variant]
    expected = with_gradients(theirs, case, args, off_policy=off_policy)
    assert expected[2].abs().max() > 1e-3
    for parts in ([(0, 1, 2, 3)], [(2, 0), (3,), (1,)]):
        found = with_gradients(ours, case, args, parts, off_policy=off_policy)
        for i in (0, 2, 3):
            assert (found[i] - expected[i]).abs().max() < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_at_the_log_probabilities_equals_trls(case, variant, monkeypatch):
    """Token by token: the sum over a vocabulary could hide a pair of errors."""
    args = VARIANTS[variant]
    start = log_probs(case.hidden, case.head, case.ids, args.temperature)
    theirs_at, ours_at = start.clone().requires_grad_(), start[case.mask].clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "log_probs", lambda *_: theirs_at)
        theirs(case, case.hidden, case.head, args)[0].backward()
    order = torch.randperm(
        len(ours_at), generator=torch.Generator().manual_seed(1)
    )  # as micro-batches shuffle
    given = (ours_at[order], order, torch.zeros(len(order)), None)
    monkeypatch.setattr(rollout, "policy_logprobs", lambda *_: given)
    ours(case, case.hidden, case.head, args)[0].backward()
    assert (ours_at.grad - theirs_at.grad[case.mask]).abs().max() < 1e-10
    assert theirs_at.grad[~case.mask].abs().max() == 0  # what tools said, and padding


@pytest.mark.parametrize(
    "variant",
    [
        "grpo",
        "grpo, k3",
        "dapo",
        "gspo",
    ],
)
def test_figures_equal_trls(case, variant):
    """clip_low, clip_high: the tokens that clipping takes out; kl: k3 to the reference."""
    args = VARIANTS[variant]
    _, found, _, _ = with_gradients(ours, case, args)
    _, expected, _, _ = with_gradients(theirs, case, args)
    if args.loss_type == "gspo":  # trl counts answers, the log counts tokens
        lengths = case.mask.sum(1).double()
        ratio = (((case_now(case) - case.old) * case.mask).sum(1) / lengths).exp()
        low = (case.advantages < 0) & (ratio < 1 - args.epsilon)
        high = (case.advantages > 0) & (ratio > 1 + args.epsilon_high)
        shares = [float((x * lengths).sum() / lengths.sum()) for x in (low, high)]
    else:
        shares = [expected["clip_ratio/low_mean"], expected["clip_ratio/high_mean"]]
    assert sum(shares) > 0.05
    assert [found["clip_low"], found["clip_high"]] == pytest.approx(shares, abs=1e-6)
    if args.beta:
        assert found["kl"] == pytest.approx(expected["kl"], abs=1e-6)


def case_now(case):
    return log_probs(case.hidden, case.head, case.ids)


def test_mismatch_with_the_sampler_by_hand(case):
    """w = min(pi_old / sampler, C), without a gradient of its own; the KL is not weighted."""
    args = settings("dapo", tis_cap=1.3, beta=0.3)
    found, figures, by_hidden, _ = with_gradients(ours, case, args)
    hidden = case.hidden.clone().requires_grad_()
    now = log_probs(hidden, case.head, case.ids)[case.mask]
    old, sampler, reference = (x[case.mask] for x in (case.old, case.sampler, case.reference))
    advantages = case.advantages[:, None].expand_as(case.mask)[case.mask]
    weight = torch.tensor([min(math.exp(x), 1.3) for x in (old - sampler).tolist()], dtype=torch.float64)
    assert 0 < (weight == 1.3).sum() < len(weight)
    surrogate = torch.minimum((now - old).exp() * advantages, (now - old).exp().clamp(0.8, 1.28) * advantages)
    d = now - reference
    expected = (-weight * surrogate + 0.3 * ((-d).exp() - 1 + d)).mean()
    expected.backward()
    assert abs(found - expected.detach()) < 1e-10 and (by_hidden - hidden.grad).abs().max() < 1e-10
    assert figures["mismatch"] == pytest.approx(float((old - sampler).abs().mean()))


def test_without_an_old_policy_it_is_the_policy_itself(case):
    """One update per step: ratio exactly 1, nothing clipped, no drift; the gradient is there all the same."""
    _, figures, by_hidden, _ = with_gradients(ours, case, settings("grpo"), off_policy=False)
    assert figures["clip_low"] == figures["clip_high"] == figures["drift"] == 0
    assert by_hidden.abs().max() > 1e-3


def test_logged_loss_is_the_loss(case):
    for loss_type in LOSS_TYPES:
        loss, figures, _, _ = with_gradients(ours, case, settings(loss_type), [(1, 3), (0, 2)])
        assert figures["loss"] == pytest.approx(float(loss), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Advantages
# ----------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """The std is that of a sample; that of the population would make 1.73165."""
    assert near(group_advantages(f64(1, 0, 0, 0)[None])[0], [1.49970] + [-0.49990] * 3, digits=5)
    assert near(group_advantages(f64(1, 0, 0, 0)[None], "none")[0], [0.75] + [-0.25] * 3)


def test_advantages_of_a_batch():
    """One std for all, the mean still of the group."""
    rewards = torch.stack([f64(1, 0, 0, 0), f64(1, 1, 1, 0)])
    std = math.sqrt(8 * 0.25 / 7)
    expected = torch.stack([f64(0.75, -0.25, -0.25, -0.25), f64(0.25, 0.25, 0.25, -0.75)]) / (std + 1e-4)
    assert torch.allclose(group_advantages(rewards, "batch"), expected, atol=1e-12)


@pytest.mark.parametrize("correct, divided, plain", [(1, 5.29, 1.75), (2, 6.93, 3.0), (4, 8.0, 4.0)])
def test_std_favours_prompts_that_are_nearly_solved_or_lost(correct, divided, plain):
    """Sum of |A| in a group of 8; `divided` is by the std of the population, ours is that of a sample."""
    rewards = (torch.arange(8) < correct).double()[None]
    assert float(group_advantages(rewards, "none").abs().sum()) == pytest.approx(plain)
    assert float(group_advantages(rewards).abs().sum()) == pytest.approx(divided * (7 / 8) ** 0.5, abs=5e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, -2.3, 1e6 + 0.1])
def test_equal_rewards_are_exactly_zero(scale, value):
    """0.1 + 0.1 + 0.1 is not three times 0.1, and a std of rounding errors would make a direction of that."""
    rewards = torch.stack([torch.full((7,), value).double(), torch.linspace(0, 1, 7).double()])
    advantages = group_advantages(rewards, scale)
    assert (advantages[0] == 0).all() and advantages[1].abs().max() > 0


def test_rounding_alone_is_not_a_difference():
    rewards = f64(0.1 + 0.2, 0.3, 0.3, 0.1 * 3)[None]
    assert rewards.amax() > rewards.amin() and (group_advantages(rewards) == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_do_not_know_each_others_order(scale):
    rewards = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 4, 0, 2])
    straight, mixed = group_advantages(rewards, scale), group_advantages(rewards[order], scale)
    assert torch.allclose(mixed, straight[order], rtol=0, atol=1e-14)
    assert straight.sum(1).abs().max() < 1e-12
    if scale != "batch":
        assert group_advantages(rewards[2:3], scale).equal(straight[2:3])


def test_no_groups():
    assert group_advantages(torch.zeros(0, 4, dtype=torch.float64), "batch").numel() == 0


# ----------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_it_is_reinforce_with_a_baseline(loss_type):
    """For answers of one token, - mean of (R - mean R) (onehot - p), whatever the clip and the sums."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=draw, dtype=torch.float64).requires_grad_()
    answers = torch.multinomial(logits.detach().softmax(0), 12, replacement=True, generator=draw)
    rewards = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    advantages = group_advantages(rewards, "none").flatten()
    logps = logits.log_softmax(0)[answers]
    log_ratio = logps - logps.detach()
    if loss_type == "cispo":
        losses = cispo_loss(logps, log_ratio, advantages, 5.0)
    elif loss_type == "gspo":
        losses = gspo_loss(log_ratio, advantages, 3e-4, 4e-4, torch.arange(12))
    else:
        losses = clipped_loss(log_ratio, advantages, 0.2, 0.2)
    dozen = f64(12)[0]
    weights_of = token_weights(loss_type, torch.ones(12).double(), {"answers": dozen, "loss": dozen}, 1)
    (losses * weights_of).sum().backward()
    score = torch.eye(5, dtype=torch.float64)[answers] - logits.detach().softmax(0)
    baseline = rewards.mean(1, keepdim=True)
    expected = -((rewards - baseline).flatten()[:, None] * score).mean(0)
    assert (logits.grad - expected).abs().max() < 1e-12 and expected.abs().max() > 0.01


def test_equal_rewards_have_no_policy_gradient(case):
    for loss_type in LOSS_TYPES:
        flat = group_advantages(torch.full((2, 2), 0.1, dtype=torch.float64)).flatten()
        same = SimpleNamespace(**vars(case) | {"advantages": flat})
        _, _, by_hidden, by_head = with_gradients(ours, same, settings(loss_type))
        assert (by_hidden == 0).all() and (by_head == 0).all()


def expected_gradient(kind, theta, reference, sampled_from=None):
    """Of the estimator, in exact expectation over the 5 tokens of the distribution that was sampled from."""
    theta = theta.clone().requires_grad_()
    logps = theta.log_softmax(0)
    old = logps.detach() if sampled_from is None else sampled_from
    if kind == "k1":
        estimates = logps - reference
    else:
        estimates = reference_kl_loss(logps, reference, logps - old, kind)
    (old.exp() * estimates).sum().backward()
    return theta.grad


def gradient_of_kl(theta, reference, reverse=False):
    """Of KL(policy | reference), or of KL(reference | policy)."""
    theta = theta.clone().requires_grad_()
    logps = theta.log_softmax(0)
    terms = reference.exp() * (reference - logps) if reverse else logps.exp() * (logps - reference)
    terms.sum().backward()
    return theta.grad


def test_gradients_of_kl_estimators():
    """k2 and the corrected one pull by KL(policy | reference), k3 by KL(reference | policy), k1 not."""
    draw = torch.Generator().manual_seed(0)
    theta, reference, then = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(3))
    reference, then = reference.log_softmax(0), then.log_softmax(0)
    forward, backward = gradient_of_kl(theta, reference), gradient_of_kl(theta, reference, reverse=True)
    assert min(forward.abs().max(), backward.abs().max(), (forward - backward).abs().max()) > 0.05

    def gap(kind, expected, **more):
        return (expected_gradient(kind, theta, reference, **more) - expected).abs().max()

    assert gap("k2", forward) < 1e-12 and gap("corrected", forward) < 1e-12 and gap("k3", backward) < 1e-12
    assert gap("k1", torch.zeros(5)) < 1e-12
    assert (
        gap("corrected", forward, sampled_from=then) < 1e-12
    )  # the others need samples of the policy itself
    assert gap("k2", forward, sampled_from=then) > 0.01 < gap("k3", backward, sampled_from=then)


def test_values_of_kl_estimators():
    """k3, and the corrected one off-policy too, are KL(policy | reference) on average, and never negative."""
    draw = torch.Generator().manual_seed(1)
    ours, reference, then = (
        torch.randn(5, generator=draw, dtype=torch.float64).log_softmax(0) for _ in "123"
    )
    kl = float((ours.exp() * (ours - reference)).sum())
    k3 = reference_kl_loss(ours, reference, ours - ours, "k3")
    assert float((ours.exp() * k3).sum()) == pytest.approx(kl) and (k3 >= 0).all()
    off_policy = reference_kl_loss(ours, reference, ours - then, "corrected")
    assert float((then.exp() * off_policy).sum()) == pytest.approx(kl)
    figures = rl_metrics.kl_figures(ours, reference)
    assert float(figures["kl"]) == pytest.approx(float(k3.sum()))


# ----------------------------------------------------------------------------------------------------------
# Answers that were cut off
# ----------------------------------------------------------------------------------------------------------


def sample(prompt, ids, reason):
    return Sample(0, 0, prompt, ids, [True] * len(ids), [-1.0] * len(ids), reason)


def test_masked_answers_leave_the_loss_and_its_denominator():
    samples = [sample([5, 6], [7, 8, 2], "eos"), sample([5, 6], [9, 10, 11, 12], "length")]
    rt = runtime.Runtime(torch.device("cpu"), torch.float32, seed=1)
    args = argparse.Namespace(tokens_at_once=0)
    for without_cut, tokens in ((True, 3), (False, 7)):
        own = Trajectories(samples, without_cut=without_cut)
        counts = rl_metrics.counts_of(own.micro_batches([0, 1], args, 0, rt))
        assert counts["loss"] == len(own.sampler) == tokens and counts["answers"] == 2
        assert own.length.tolist() == [3, tokens - 3] and own.spread([1.0, 2.0]).tolist()[:3] == [1, 1, 1]


TEXTS = ["seven<|im_end|>", "it is seven, I think", "no<|im_end|>", "7 is what we are looking for"]


def answers_of(monkeypatch, tokenizer):
    """Every prompt is answered by TEXTS; the second and the fourth do not end."""
    engine = Script(tokenizer, lambda call, number, prompt: TEXTS[number])
    engine.update = lambda *_: None
    monkeypatch.setattr(rollout, "make_engine", lambda *_: engine)


def pay(monkeypatch, *by_step):
    """by_step: rewards of the answers of every step; the last goes on."""
    from trainer import rl

    seen = []

    def rewards_of(course, samples, prompts=None):
        seen.append(1)
        rewards = by_step[min(len(seen), len(by_step)) - 1]
        rewards = (list(rewards) * len(samples))[: len(samples)]
        return rewards, {"given": rewards}, [None] * len(samples)

    monkeypatch.setattr(rl.Course, "rewards_of", rewards_of)


@pytest.fixture(scope="module")
def tokenizer():
    from trainer import checkpoint

    return checkpoint.load_tokenizer()


def by_hand(prompts, tokenizer, loss_type, advantages, taught, rate):
    """The weights after one on-policy step, in plain torch, one answer at a time."""
    from dataset.lm_dataset import TextEncoder

    model, encoder = small_model(initializer_range=0.2), TextEncoder.of(tokenizer)
    answers = [rl_helpers.encode(encoder, text) for text in TEXTS]
    tokens = len(prompts) * sum(len(ids) for ids, use in zip(answers, taught) if use)
    loss = 0.0
    for prompt in prompts:
        for ids, advantage, use in zip(answers, advantages, taught):
            if not use:
                continue
            whole = torch.tensor([prompt + ids])
            logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(1, torch.tensor(ids)[:, None]).sum()
            count = len(prompts) * len(TEXTS)
            constant = {"grpo": len(ids) * count, "dapo": tokens, "cispo": tokens, "dr_grpo": 30 * count}
            loss = loss - advantage * logps / constant.get(loss_type, len(ids) * count)
    loss.backward()
    return {name: (p - rate * p.grad).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("overlong", ["mask", "score"])
def test_a_step_of_the_stage_is_the_formula(tmp_path, monkeypatch, tokenizer, loss_type, overlong):
    """Weights after one step, by hand. With "mask" cut answers teach nothing and are not counted as tokens,
    but their rewards stay in the mean and the std of their group."""
    from dataset.prompts import load_prompts

    rows = write_lines(tmp_path, "data.jsonl", prompt_rows(3))
    prompts = [load_prompts(rows, tokenizer, 512)[0].ids(row, False) for row in range(3)]
    paid, rate = [1.0, 3.0, 0.0, 0.5], 0.5
    answers_of(monkeypatch, tokenizer)
    pay(monkeypatch, paid)
    plain_descent(monkeypatch, rate)
    more = "--num_generations 4 --max_gen_len 30 --batch_size 3 --grad_clip 0 --tis_cap 0".split()
    more += ["--loss_type", loss_type, "--overlong", overlong, "--dynamic_sampling", 0]
    train("grpo", tmp_path, *more, steps=1)

    mean = sum(paid) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in paid) / 3)
    divisor = 1.0 if loss_type == "dr_grpo" else std + 1e-4
    taught = [overlong == "score" or text.endswith("<|im_end|>") for text in TEXTS]
    advantages = [(r - mean) / divisor for r in paid]
    expected = by_hand(prompts, tokenizer, loss_type, advantages, taught, rate)
    found, base = weights(tmp_path, NAME), weights(tmp_path, "full_sft_32.pth")
    assert largest_difference(base, found) > 1e-3
    assert largest_difference(expected, {name: found[name] for name in expected}) < 1e-5


@pytest.mark.parametrize(
    "tries, differing, kept, sampled",
    [
        (0, [4, 5, 6, 7], 4, 4),  # off: what was sampled is learned from, equal or not
        (2, [0, 1, 2, 3, 4, 5, 6, 7], 4, 4),  # enough at once
        (2, [], 0, 12),  # nothing differs: all tries, and an empty step
        (9, [1, 4, 5, 6, 7], 4, None),  # until there are as many as asked for
    ],
)
def test_dynamic_sampling_fills_a_step_with_groups_that_differ(tries, differing, kept, sampled):
    from trainer.rl import groups_that_differ
    from trainer.rollout import Sample
    from trainer.runtime import Runtime

    class Prompts(list):
        verifiable = True

    def answer(rows, places, step):
        asked.extend(zip(rows, places))
        return [Sample(row, place, [1], [2]) for row, place in zip(rows, places) for _ in range(3)]

    def rewards_of(samples):
        found = [float(s.row in differing and i % 3 == 0) for i, s in enumerate(samples)]
        return found, {"correct": found}, found

    asked, args = [], argparse.Namespace(dynamic_sampling=tries, num_generations=3, seed=1)
    rt = Runtime(torch.device("cpu"), torch.float32, seed=1)
    course = argparse.Namespace(
        args=args, rt=rt, train=Prompts(range(8)), answer=answer, rewards_of=rewards_of
    )
    groups, figures = groups_that_differ(course, [0, 1, 2, 3], [0, 1, 2, 3], 0)
    assert len(groups) == kept and figures["groups_kept"] == (kept, len(asked))
    assert sampled is None or len(asked) == sampled
    assert len(asked) == len({place for _, place in asked}), (
        "every group has a place, and so draws, of its own"
    )
    for samples, rewards, parts, right in groups:
        assert len(samples) == 3 and len({(s.row, s.place) for s in samples}) == 1
        assert rewards == parts["correct"] == right
        assert not tries or (samples[0].row in differing and rewards == [1, 0, 0])
    equal = sum(row not in differing for row, _ in asked)
    assert figures["degenerate"] == (equal, len(asked)) and figures["all_wrong"] == (equal, len(asked))


def test_a_step_in_which_all_were_cut_moves_nothing(tmp_path):
    """--overlong mask with answers none of which ends."""
    train("grpo", tmp_path, "--overlong", "mask", "--max_gen_len", 2, steps=2)
    line = log_lines(tmp_path, "grpo")[-1]
    samples = [x for x in log_lines(tmp_path, "grpo") if "truncated" in x]
    assert all(x["truncated"] == 1 for x in samples), line
    assert_bit_equal(weights(tmp_path, NAME), weights(tmp_path, "full_sft_32.pth"))


# ----------------------------------------------------------------------------------------------------------
# Steps of the stage
# ----------------------------------------------------------------------------------------------------------


def weights_by_step(monkeypatch):
    """A list to which every step of the stage appends its weights."""
    from trainer import rl

    seen, original = [], rl.Course.figures

    def figures(course, *rest):
        state = runtime.bare(course.model).state_dict()
        seen.append({name: tensor.clone() for name, tensor in state.items()})
        return original(course, *rest)

    monkeypatch.setattr(rl.Course, "figures", figures)
    return seen


EQUAL, MIXED = [0.1], [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    "more", ["", "--update_iters 2 --mini_batch_size 6", "--loss_type cispo", "--use_moe"]
)
def test_equal_rewards_leave_every_bit_of_the_weights(tmp_path, monkeypatch, more):
    """Momentum and decay of earlier steps must not move them either."""
    pay(monkeypatch, MIXED, EQUAL, MIXED)
    seen = weights_by_step(monkeypatch)
    flags = rl_helpers.MOE if more == "--use_moe" else more.split()
    train("grpo", tmp_path, "--weight_decay", 0.1, *flags)
    first, second, third = seen
    assert_bit_equal(first, second)
    assert largest_difference(second, third) > 1e-4
    base = weights(tmp_path, "full_sft_32_moe.pth" if flags is rl_helpers.MOE else "full_sft_32.pth")
    assert largest_difference(base, {name: first[name] for name in base}) > 1e-4
    degenerate = [x["degenerate"] for x in log_lines(tmp_path, "grpo") if "degenerate" in x]
    assert degenerate == [0, 1, 0]


def test_a_kl_still_pulls_when_rewards_are_equal(tmp_path, monkeypatch):
    pay(monkeypatch, MIXED, EQUAL)
    seen = weights_by_step(monkeypatch)
    train("grpo", tmp_path, "--beta", 0.5, steps=2)
    assert largest_difference(*seen) > 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_group_without_a_difference_stays_in_the_denominator(tmp_path, monkeypatch, tokenizer, loss_type):
    """Its answers are not computed, but they are counted: half of the groups, half of the gradient."""
    answers_of(monkeypatch, tokenizer)
    moved, mixed = {}, [1.0, 0.0, 0.5, 0.1]
    for name, rewards in (("all", mixed), ("half", [*mixed, *mixed, *EQUAL * 8])):
        with monkeypatch.context() as patch:
            plain_descent(patch, 0.05)
            pay(patch, rewards)
            write_lines(tmp_path / name, "data.jsonl", prompt_rows(1) * 4)  # four times the same group
            more = f"--num_generations 4 --max_gen_len 30 --loss_type {loss_type} --tis_cap 0 --grad_clip 0"
            more += " --overlong score --dynamic_sampling 0"
            train("grpo", tmp_path / name, *more.split(), steps=1)
        base, found = weights(tmp_path / name, "full_sft_32.pth"), weights(tmp_path / name, NAME)
        moved[name] = {key: found[key] - base[key] for key in base}
    assert max(float(d.abs().max()) for d in moved["half"].values()) > 1e-4
    assert largest_difference(moved["all"], {key: 2 * d for key, d in moved["half"].items()}) < 1e-6


# ----------------------------------------------------------------------------------------------------------
# Every flag of the loss has a say
# ----------------------------------------------------------------------------------------------------------

TWICE = "--update_iters 2 --num_generations 4 --max_gen_len 8 --batch_size 3 --grad_clip 0"
FLAGS = {  # flag -> (what both runs have, what the second has besides)
    "epsilon": ("", "--epsilon 0.01 --epsilon_high 0.2"),
    "epsilon_high": ("", "--epsilon_high 9"),
    "cispo's cap": ("--loss_type cispo", "--epsilon_high 1.01"),
    "gspo's clip": ("--loss_type gspo", "--epsilon 9 --epsilon_high 9"),
    "beta": ("", "--beta 0.5"),
    "beta's size": ("--beta 0.1", "--beta 0.5"),
    "k2": ("--beta 0.5", "--kl_type k2"),
    "corrected": ("--beta 0.5", "--kl_type corrected"),
    "scale_rewards none": ("", "--scale_rewards none"),
    "scale_rewards batch": ("", "--scale_rewards batch"),
    "dr_grpo": ("--scale_rewards none", "--loss_type dr_grpo"),
    "gspo": ("", "--loss_type gspo"),
    "cispo": ("", "--loss_type cispo"),
    "tis_cap": ("--rollout_dtype bfloat16", "--tis_cap 0"),
    "tis_cap's size": ("--rollout_dtype bfloat16", "--tis_cap 0.9"),
    "mini_batch_size": ("", "--mini_batch_size 6"),
    "update_iters": ("", "--update_iters 3"),
    "temperature": ("", "--temperature 0.7"),
    "overlong mask": ("", "--overlong mask"),
    "overlong soft": ("", "--overlong soft"),
}


def pay_besides(patch):
    """Rewards that differ in every group, and more in some than in others, beside those of --reward."""
    from trainer import rl

    original = rl.Course.rewards_of

    def rewards_of(course, samples, prompts=None):
        rewards, parts, right = original(course, samples, prompts)
        return [r + (i % 4) * (1 + i // 4) for i, r in enumerate(rewards)], parts, right

    patch.setattr(rl.Course, "rewards_of", rewards_of)


@pytest.fixture(scope="module")
def told():
    """Runs of one step with two updates, by their flags: the weights they left."""
    return {}


def run(flags, folder, told, tokenizer):
    """The same samples in every run: what differs is what is made of them."""
    if flags not in told:
        with pytest.MonkeyPatch.context() as patch:
            if "bfloat16" not in flags:
                answers_of(patch, tokenizer)
            pay_besides(patch)
            plain_descent(patch, 0.03)
            base_weights(folder, initializer_range=0.2)
            more = TWICE.split() + ([] if "bfloat16" in flags else ["--tis_cap", "0"])
            train("grpo", folder, *more, *flags.split(), steps=1)
        told[flags] = weights(folder, NAME)
    return told[flags]


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_is_dead(tmp_path, told, tokenizer, flag):
    """A different value makes different weights from the same samples."""
    both, besides = FLAGS[flag]
    one = run(both, tmp_path / "one", told, tokenizer)
    other = run(f"{both} {besides}", tmp_path / "other", told, tokenizer)
    assert largest_difference(one, other) > 1e-5


def test_runs_repeat(tmp_path, told, tokenizer):
    """Without a different flag nothing differs."""
    assert_bit_equal(
        run("", tmp_path / "one", told, tokenizer), run(" ", tmp_path / "other", told, tokenizer)
    )


# ----------------------------------------------------------------------------------------------------------
# Defaults
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", (0.2, 0.2, "group", "score", 0)),
        ("--epsilon 0.1", (0.1, 0.1, "group", "score", 0)),
        ("--loss_type dapo", (0.2, 0.28, "group", "soft", 3)),
        ("--loss_type dapo --overlong mask --dynamic_sampling 0", (0.2, 0.28, "group", "mask", 0)),
        ("--loss_type dr_grpo", (0.2, 0.2, "none", "score", 0)),
        ("--loss_type gspo", (3e-4, 4e-4, "group", "score", 0)),
        ("--loss_type cispo", (0.0, 5.0, "group", "score", 0)),
        ("--loss_type cispo --epsilon_high 1.28", (0.0, 1.28, "group", "score", 0)),
        pytest.param(
            "--loss_type dr_grpo --epsilon 0.1",
            (0.1, 0.1, "none", "score", 0),
        ),
        pytest.param(
            "--epsilon 0",
            (0.0, 0.0, "group", "score", 0),
        ),
    ],
)
def test_defaults_that_follow_from_the_loss(flags, expected):
    args = train_grpo.parse_args(flags.split())
    found = (args.epsilon, args.epsilon_high, args.scale_rewards, args.overlong, args.dynamic_sampling)
    assert found == expected
