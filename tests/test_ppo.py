"""PPO: advantages, whitening and losses by hand; a critic that reads where the token is predicted; an early
stop that moves nothing."""

import argparse
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from preference_helpers import small_model
from rl_helpers import parsed, train
from stage_helpers import base_weights, plain_descent
from train_helpers import assert_bit_equal, largest_difference, log_lines, weights

from model.model_reward import RewardModel
from trainer import batches, cli, loop, rl_metrics, rollout, runtime, train_ppo
from trainer.rollout import Sample, Trajectories
from trainer.train_ppo import (
    actor_loss,
    critic_loss,
    gae,
    policy_loss,
    token_rewards,
    token_values,
    value_loss,
    whiten,
)

NAME, BASE = "ppo_actor_32.pth", "full_sft_32.pth"


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def near(value, expected):
    return torch.allclose(torch.as_tensor(value).double(), f64(*expected), rtol=0, atol=6e-7)


@pytest.fixture
def rt():
    return runtime.Runtime(torch.device("cpu"), torch.float32, seed=1)


# ----------------------------------------------------------------------------------------------------------
# Advantages
# ----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
VALUES = torch.stack([f64(0.2, 0.4, 0.6, 0.8), f64(0.1, 0.3, 0, 0)])
SCORED = torch.stack([f64(0, 0, 0, 1), f64(0, -1, 0, 0)])  # at the last token of each


def test_advantages_and_returns_by_hand():
    advantages, returns = gae(SCORED, VALUES, MASK, 1.0, 0.95)
    assert near(advantages[MASK], [0.741975, 0.5705, 0.39, 0.2, -1.035, -1.3])
    assert near(returns[MASK], [0.941975, 0.9705, 0.99, 1, -0.935, -1])
    assert near(whiten(advantages[MASK]), [0.934022, 0.737279, 0.530180, 0.312182, -1.104806, -1.408857])


def test_what_stands_in_padding_does_not_matter():
    """Nor how much of it there is."""
    clean = gae(SCORED, VALUES, MASK, 0.99, 0.9)
    junk = torch.full((2, 3), 7.0, dtype=torch.float64)
    values, rewards = (torch.cat([torch.where(MASK, x, 9.0), junk], 1) for x in (VALUES, SCORED))
    wide = gae(rewards, values, torch.cat([MASK, junk > 8], 1), 0.99, 0.9)
    for short, long in zip(clean, wide):
        assert long[:, :4].equal(short) and (long[:, 4:] == 0).all() and (short[~MASK] == 0).all()


@pytest.mark.parametrize("junk", [0.0, 9.0])
def test_what_a_tool_said_is_skipped(junk):
    """The token before goes on with the first one after it: no discount for the gap, no value from it."""
    mask = torch.tensor([[1, 0, 0, 1]]).bool()
    advantages, returns = gae(f64(0, junk, 0, 1)[None], f64(0.5, junk, junk, 0.25)[None], mask, 0.99, 0.9)
    assert near(advantages[0], [0.41575, 0, 0, 0.75]) and near(returns[0], [0.91575, 0, 0, 1])


def test_lambda_one_and_zero():
    """lambda 1: all that is still to come, minus the value. lambda 0: one step of surprise."""
    rewards = f64(0.3, -0.2, 1)[None]
    values, mask = f64(0.5, 0.1, 0.7)[None], torch.ones(1, 3, dtype=torch.bool)
    to_come = f64(0.3 + 0.9 * (-0.2 + 0.9), -0.2 + 0.9, 1)
    assert torch.allclose(gae(rewards, values, mask, 0.9, 1.0)[1][0], to_come, atol=1e-12)
    surprise = f64(0.3 + 0.9 * 0.1 - 0.5, -0.2 + 0.9 * 0.7 - 0.1, 1 - 0.7)
    assert torch.allclose(gae(rewards, values, mask, 0.9, 0.0)[0][0], surprise, atol=1e-12)


def test_whitened_numbers():
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3 + 5
    white = whiten(numbers)
    assert white.dtype == torch.float32 and abs(float(white.mean())) < 1e-6
    assert float(white.double().var()) == pytest.approx(1, abs=1e-6)  # of a sample
    assert whiten(torch.full((7,), 0.1)).abs().max() < 1e-3  # rounding does not become a direction


def test_kl_in_the_reward_by_hand():
    old, reference = f64(0.5, 0.4).log().requires_grad_(), f64(0.25, 0.5).log()
    rewards = token_rewards(f64(1), torch.tensor([1]), old.detach(), reference, 0.1)
    assert near(rewards, [-0.0693147, 1.0223144])
    advantages, _ = gae(rewards[None], f64(0.3, 0.6)[None], torch.ones(1, 2, dtype=torch.bool))
    assert near(advantages[0], [0.6318839, 0.4223144])
    assert not rewards.requires_grad


def test_scores_stand_at_last_tokens():
    rewards = token_rewards(f64(1, -1), torch.tensor([3, 5]), torch.randn(6).double())
    assert rewards.tolist() == [0, 0, 0, 1, 0, -1]


# ----------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Ratios 1.5 and .5 with A of both signs: the worse of the two is taken."""
    old = f64(0, 0, 0, 0, 0)
    logps = f64(1.5, 1.5, 0.5, 0.5, 1.1).log().requires_grad_()
    losses = policy_loss(logps, old, f64(1, -1, 1, -1, 2), 0.2)
    assert near(losses.detach(), [-1.2, 1.5, -0.5, 0.8, -2.2])
    losses.sum().backward()
    assert near(logps.grad, [0, 1.5, -0.5, 0, -2.2])


def test_dual_clip_by_hand():
    """Where A < 0 the loss is at most c |A|, and beyond that has no gradient; A > 0 is as it was."""
    logps = f64(5, 2, 5, 0.5).log().requires_grad_()
    losses = policy_loss(logps, f64(0, 0, 0, 0), f64(-2, -2, 2, -2), 0.2, dual_clip=3.0)
    assert near(losses.detach(), [6, 4, -2.4, 1.6])
    losses.sum().backward()
    assert near(logps.grad, [0, 4, 0, 0])


def test_value_loss_by_hand():
    losses, clipped = value_loss(f64(0.5, 1.2), f64(0.1, 1), f64(1, 0.9), 0.2)
    assert float(losses.mean()) == pytest.approx(0.145) and clipped.tolist() == [True, False]
    plain, clipped = value_loss(f64(0.5, 1.2), f64(0.1, 1), f64(1, 0.9), 0)
    assert near(plain, [0.125, 0.045]) and not clipped.any()


def test_a_clipped_value_has_no_gradient():
    """Where the value has already moved too far towards the return; one that went astray comes back."""
    values = f64(0.5, -0.5).requires_grad_()
    value_loss(values, f64(0.1, 0.1), f64(1, 1), 0.2)[0].sum().backward()
    assert near(values.grad, [0, -1.5])


def test_clip_share_counts_lost_gradients():
    """A > 0 above, A < 0 below. A ratio outside that still learns is not counted."""
    ratio, advantages = f64(1.3, 1.3, 0.7, 0.7, 1.1, 0.7), f64(1, -1, 1, -1, 1, -2)
    logps = ratio.log().requires_grad_()
    blank = torch.zeros(6)
    found = rl_metrics.token_figures(
        logps, f64(*[0] * 6), blank, advantages, blank, 0.2, 0.2, argparse.Namespace()
    )
    assert (int(found["clip_high"]), int(found["clip_low"])) == (1, 2)
    policy_loss(logps, f64(*[0] * 6), advantages, 0.2).sum().backward()
    assert int((logps.grad == 0).sum()) == 3
    assert float(found["drift"]) == pytest.approx(float((ratio - 1 - ratio.log()).sum()))


def test_explained_variance_by_hand():
    returns, values = f64(1, 0, 0.5, 2), f64(0.8, 0.2, 0.5, 1)
    assert rl_metrics.explained_variance(values, returns) == pytest.approx(0.6205714, abs=6e-8)
    assert rl_metrics.explained_variance(returns, returns) == 1
    assert rl_metrics.explained_variance(-returns, returns) == pytest.approx(-3)
    assert rl_metrics.explained_variance(values, f64(1, 1, 1, 1)) == 0


def test_effective_share_by_hand():
    """(sum w)^2 / (n sum w^2)."""
    assert rl_metrics.effective_share(torch.ones(5)) == pytest.approx(1)
    assert rl_metrics.effective_share(f64(1, 0, 0, 0)) == pytest.approx(0.25)
    assert rl_metrics.effective_share(f64(1, 2, 3)) == pytest.approx(36 / 42)


# ----------------------------------------------------------------------------------------------------------
# The actor's loss, with hidden states in place of a model
# ----------------------------------------------------------------------------------------------------------

WIDTH, VOCABULARY = 5, 11


@pytest.fixture(scope="module")
def case():
    """Two answers of 4 and 2 tokens behind prompts of two, in float64."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 6), generator=draw)
    tokens = torch.tensor([[-1, -1, 0, 1, 2, 3], [-1, -1, 4, 5, -1, -1]])
    hidden, head = (
        torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((2, 6, 5), (VOCABULARY, 5))
    )
    now = log_probs(hidden, head, ids, tokens)
    noise = [torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(4)]
    return SimpleNamespace(
        ids=ids,
        tokens=tokens,
        hidden=hidden,
        head=head,
        old=now + 0.3 * noise[0],
        reference=now + 0.5 * noise[1],
        sampler=now + 0.3 * noise[0] + 0.3 * noise[2],
        advantages=noise[3],
    )


def log_probs(hidden, head, ids, tokens):
    logps = (hidden @ head.T)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return logps[tokens[:, 1:] >= 0]


def settings(**more):
    base = dict(temperature=1.0, tis_cap=0.0, clip_epsilon=0.2, dual_clip=0.0, beta=0.1, kl_type="k3")
    return argparse.Namespace(**base | dict(kl_in="loss", loss_type="ppo") | more)


def ours(case, with_reference=True, **more):
    """(loss, figures, gradient) by the function that the optimizer step calls, in two micro-batches."""
    args, hidden, figures = settings(**more), case.hidden.clone().requires_grad_(), {}
    step = SimpleNamespace(
        old=case.old,
        sampler=case.sampler,
        advantages=case.advantages,
        reference=case.reference if with_reference else None,
        ratio=torch.ones(6),
    )
    total = 0.0
    for row in (1, 0):  # not in the order of the tokens

        def model(row=row, **inputs):
            return SimpleNamespace(hidden_states=(hidden[row : row + 1],), aux_loss=None)

        part = {"input_ids": case.ids[row : row + 1], "tokens": case.tokens[row : row + 1]}
        part["labels"] = part["input_ids"].masked_fill(part["tokens"] < 0, -100)
        part["position_ids"] = torch.arange(6)[None]
        loss, sums = actor_loss(model, part, {"loss": 6}, case.head, step, args)
        total = total + loss
        for name, value in sums.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    total.backward()
    return float_of(total), figures, hidden.grad


def by_hand(case, kl=0.0, cap=0.0, dual=0.0):
    """Loss and gradient, written once more."""
    hidden = case.hidden.clone().requires_grad_()
    now = log_probs(hidden, case.head, case.ids, case.tokens)
    loss = 0.0
    for t in range(6):
        ratio, a = (now[t] - case.old[t]).exp(), float(case.advantages[t])
        choices = [-ratio * a, -ratio.detach().clamp(0.8, 1.2) * a + 0 * ratio]
        one = max(choices, key=float_of)
        if dual and a < 0 and float_of(one) > -dual * a:
            one = 0 * ratio - dual * a
        if cap:
            one = one * min(math.exp(float(case.old[t] - case.sampler[t])), cap)
        d = now[t] - case.reference[t]
        loss = loss + (one + kl * ((-d).exp() - 1 + d)) / 6
    loss.backward()
    return float_of(loss), hidden.grad


def float_of(tensor):
    return float(tensor.detach())


@pytest.mark.parametrize(
    "flags, hand",
    [
        (dict(beta=0.3), dict(kl=0.3)),
        (dict(beta=0.3, kl_in="reward"), {}),  # it stands in the advantages then
        (dict(tis_cap=1.2, beta=0.3), dict(cap=1.2, kl=0.3)),
        (dict(dual_clip=1.1, kl_in="reward"), dict(dual=1.1)),
    ],
)
def test_actor_loss_is_the_formula(case, flags, hand):
    loss, _, gradient = ours(case, **flags)
    expected, by_hidden = by_hand(case, **hand)
    assert loss == pytest.approx(expected, abs=1e-12) and (gradient - by_hidden).abs().max() < 1e-12
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    "more",
    [
        dict(clip_epsilon=0.01),
        dict(dual_clip=1.01),
        dict(beta=0.2),
        dict(kl_type="k2"),
        dict(kl_type="corrected"),
        dict(kl_in="reward"),
        dict(tis_cap=2.0),
        dict(temperature=0.7),
    ],
)
def test_no_flag_of_the_actors_loss_is_dead(case, more):
    assert (ours(case, **more)[2] - ours(case)[2]).abs().max() > 1e-4


def test_figures_of_the_actor(case):
    _, found, _ = ours(case, beta=0.3)
    now = log_probs(case.hidden, case.head, case.ids, case.tokens)
    ratio, d = (now - case.old).exp(), now - case.reference
    low = (case.advantages < 0) & (ratio < 0.8)
    high = (case.advantages > 0) & (ratio > 1.2)
    assert (found["clip_low"], found["clip_high"]) == (low.sum(), high.sum()) and low.any() | high.any()
    assert found["kl_k1"] == pytest.approx(float(d.sum())) and found["kl"] > 0
    assert found["drift"] == pytest.approx(float((ratio - 1 - ratio.log()).sum()))
    assert "kl" not in ours(case, with_reference=False)[1]


# ----------------------------------------------------------------------------------------------------------
# The critic
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def critic():
    """One with opinions: norms and head are not what they begin with."""
    model = RewardModel(small_model().config)
    model.model.load_state_dict(small_model(initializer_range=0.2).model.state_dict())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.5 + torch.rand(p.shape, generator=draw))
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=draw))
    return model.eval()


def sample(prompt, ids):
    return Sample(0, 0, prompt, ids, [True] * len(ids), [-1.0] * len(ids), "eos")


def values_of(critic, samples, rt):
    own = Trajectories(samples)
    args = argparse.Namespace(tokens_at_once=0, use_compile="0")
    everything = own.micro_batches(range(len(own)), args, 0, rt)
    return rollout.score(critic, everything, len(own.sampler), args, rt, token_values)


PROMPT, ANSWER = [5, 6, 7, 8], [20, 21, 22, 23, 24]


def test_a_value_is_read_where_its_token_is_predicted(critic, rt):
    """It does not know the token, but all before it."""
    before = values_of(critic, [sample(PROMPT, ANSWER)], rt)
    for t in range(len(ANSWER)):
        other = [*ANSWER[:t], 99, *ANSWER[t + 1 :]]
        after = values_of(critic, [sample(PROMPT, other)], rt)
        assert after[: t + 1].equal(before[: t + 1])
        assert t + 1 == len(ANSWER) or (after[t + 1 :] != before[t + 1 :]).all()
    asked = values_of(critic, [sample([5, 6, 7, 9], ANSWER)], rt)
    assert (asked != before).all()


def test_values_are_the_head_on_the_blocks_output(critic, rt):
    """The final norm is in the blocks already; once more would be another number. Packed or alone."""
    samples = [sample(PROMPT, ANSWER), sample([9, 10], [30, 31]), sample([11], [40, 41, 42, 43])]
    expected, twice = [], []
    for s in samples:
        ids = torch.tensor([s.prompt + s.ids])
        with torch.no_grad():
            hidden = critic.model(ids)[0][0, len(s.prompt) - 1 : -1]
            expected.append(critic.score(hidden).squeeze(1))
            twice.append(critic.score(critic.model.norm(hidden)).squeeze(1))
    found = values_of(critic, samples, rt)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert (found - torch.cat(twice)).abs().max() > 0.1


def test_critic_loss_is_the_formula(critic, rt):
    """A mean over the tokens of the step, times --vf_coef, whatever the micro-batches."""
    samples = [sample(PROMPT, ANSWER), sample([9, 10], [30, 31])]
    own = Trajectories(samples)
    now = values_of(critic, samples, rt)
    own.values, own.returns = now - torch.linspace(-0.5, 0.5, 7), now + torch.linspace(-1, 1, 7)
    expected, clipped = value_loss(now, own.values, own.returns, 0.2)
    assert 0 < clipped.sum() < 7
    for at_once in (0, 8):
        args = argparse.Namespace(tokens_at_once=at_once, vf_coef=0.3, cliprange_value=0.2)
        parts = own.micro_batches([0, 1], args, 0, rt)
        assert len(parts) == (2 if at_once else 1)
        found = [critic_loss(critic, part, {"loss": 7}, own, args) for part in parts]
        assert float_of(sum(loss for loss, _ in found)) == pytest.approx(
            0.3 * float(expected.mean()), rel=1e-5
        )
        assert sum(int(sums["value_clip"]) for _, sums in found) == clipped.sum()


# ----------------------------------------------------------------------------------------------------------
# A step that is refused
# ----------------------------------------------------------------------------------------------------------


def test_a_refused_step_moves_nothing(rt, tmp_path):
    """Weights, momentum and the count of steps stay bit by bit; the next step is as if it had never been."""
    args = parsed("ppo", tmp_path, "--weight_decay", 0.1, "--betas", "0.9,0.99")

    def begin():
        model = small_model(initializer_range=0.2)
        return model, cli.build_optimizers(model, args, rt)

    def step(model, optimizers, ids, refuse=None):
        def loss_of(model, batch, totals):
            loss = model(batch).logits.square().sum() / totals["loss"]
            return loss, {"loss": loss.detach(), "drift": torch.tensor(3.0)}

        micro = batches.StepBatches([torch.tensor([ids])])
        micro.num_targets = micro.num_tokens = len(ids)
        counts = {"loss": len(ids), "drift": 2}
        return loop.optimizer_step(model, micro, optimizers, 1.0, args, rt, loss_of, counts, refuse)

    asked = []
    model, optimizers = begin()
    step(model, optimizers, [5, 6, 7])
    before = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
    found = step(model, optimizers, [8, 9], lambda means: not asked.append(means))
    assert found["refused"] == (1, 1) and asked[0]["drift"] == 1.5
    assert_bit_equal(before[0], model.state_dict())
    for then, optimizer in zip(before[1], optimizers):
        now = optimizer.state_dict()["state"]
        assert then["state"].keys() == now.keys() and len(now)
        assert all(torch.equal(then["state"][k][n], now[k][n]) for k in now for n in now[k])
    assert all(p.grad is None for p in model.parameters())

    found = step(model, optimizers, [10, 11], lambda means: False)
    other, others = begin()
    step(other, others, [5, 6, 7])
    step(other, others, [10, 11])
    assert "refused" not in found and found["grad_norm"] > 0
    assert_bit_equal(model.state_dict(), other.state_dict())
    assert largest_difference(before[0], model.state_dict()) > 1e-5


# ----------------------------------------------------------------------------------------------------------
# Steps of the stage
# ----------------------------------------------------------------------------------------------------------


def lines(folder):
    return [line for line in log_lines(folder, "ppo_actor") if "reward" in line]


def test_early_stop_leaves_the_first_update_alone(tmp_path):
    """A bound that any drift exceeds: the first update is made, the others are as if never tried."""
    more = "--mini_batch_size 0 --weight_decay 0.1".split()
    train("ppo", tmp_path / "stop", *more, "--update_iters", 3, "--early_stop_kl", 1e-12, steps=1)
    train("ppo", tmp_path / "once", *more, "--update_iters", 1, steps=1)
    train("ppo", tmp_path / "free", *more, "--update_iters", 3, "--early_stop_kl", 0, steps=1)
    stop, once, free = (weights(tmp_path / name, NAME) for name in ("stop", "once", "free"))
    assert_bit_equal(stop, once)
    assert largest_difference(stop, free) > 1e-4 < largest_difference(stop, weights(tmp_path / "stop", BASE))
    stopped = [lines(tmp_path / name)[0]["early_stop"] for name in ("stop", "once", "free")]
    assert stopped == [1, 0, 0]


def spy(monkeypatch):
    """Lists to which every step appends what `gae` was given, as (rewards, values, mask)."""
    seen, original = [], train_ppo.gae

    def watched(rewards, values, mask, *rest):
        seen.append((rewards.clone(), values.clone(), mask.clone()))
        return original(rewards, values, mask, *rest)

    monkeypatch.setattr(train_ppo, "gae", watched)
    return seen


def test_a_step_in_which_all_were_cut_moves_nothing(tmp_path):
    """--overlong mask with answers none of which ends: nobody learns, nothing fails."""
    train("ppo", tmp_path, "--overlong", "mask", "--max_gen_len", 2, steps=2)
    assert all(line["truncated"] == 1 for line in lines(tmp_path)) and len(lines(tmp_path)) == 2
    assert_bit_equal(weights(tmp_path, NAME), weights(tmp_path, BASE))


def test_a_new_critic_expects_nothing(tmp_path, monkeypatch):
    """Its head is zero: the first advantages are the rewards themselves. Then it learns."""
    seen = spy(monkeypatch)
    train("ppo", tmp_path, "--critic_learning_rate", 1e-2, steps=2)
    assert (seen[0][1] == 0).all() and (seen[1][1][seen[1][2]] != 0).all()
    assert lines(tmp_path)[0]["explained_variance"] == 0


def test_what_actor_and_critic_are_taught(tmp_path, monkeypatch):
    """Returns are not whitened: with lambda 1 the score of the answer. Advantages are, over the whole step
    and not over a minibatch."""
    taught, original = [], train_ppo.critic_loss

    def critic_loss(critic, batch, totals, step, args):
        taught.append(step)
        return original(critic, batch, totals, step, args)

    monkeypatch.setattr(train_ppo, "critic_loss", critic_loss)
    seen = spy(monkeypatch)
    train("ppo", tmp_path, "--lam", 1, "--mini_batch_size", 2, "--update_iters", 1, steps=1)
    first, second = taught
    assert first is second and len(first) == 4
    scores = seen[0][0].sum(1)
    assert len(set(scores.tolist())) > 1 and first.returns.equal(scores[first.sequence])
    a, r = first.advantages.double(), first.returns.double()
    assert abs(float(a.mean())) < 1e-6 and float(a.var()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(a, (r - r.mean()) / r.std(), atol=1e-5)


def test_a_new_critic_begins_with_the_actors_blocks(tmp_path, monkeypatch):
    built = []
    original = train_ppo.new_critic

    def new_critic(course, *rest):
        critic, optimizers = original(course, *rest)
        built.append(copy.deepcopy(runtime.bare(critic).state_dict()))
        return critic, optimizers

    monkeypatch.setattr(train_ppo, "new_critic", new_critic)
    train("ppo", tmp_path, steps=1)
    base, (critic,) = weights(tmp_path, BASE), built
    assert (critic.pop("score.weight") == 0).all() and all(critic[n].equal(base[n]) for n in critic)
    assert len(critic) == sum(n.startswith("model.") for n in base)


def test_critic_warmup_leaves_the_actor_alone(tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    more = ["--critic_learning_rate", 1e-2, "--critic_warmup", 2]
    train("ppo", tmp_path / "two", *more, steps=2)
    base = weights(tmp_path / "two", BASE)
    assert_bit_equal(weights(tmp_path / "two", NAME), base)
    assert (seen[1][1][seen[1][2]] != 0).all()  # the critic has learned
    train("ppo", tmp_path / "three", *more, steps=3)
    assert largest_difference(weights(tmp_path / "three", NAME), base) > 1e-4


def test_the_kl_stands_in_the_loss_or_in_the_reward(tmp_path, monkeypatch):
    """Never in both. The score is the last token's reward; the KL is everybody's."""
    seen = spy(monkeypatch)
    for place in ("loss", "reward"):
        more = ["--kl_coef", 0.5, "--kl_in", place, "--early_stop_kl", 0]
        train("ppo", tmp_path / place, *more, steps=2)
    in_loss, in_reward = seen[1], seen[3]  # of the second step: in the first there is no KL yet
    last = in_loss[2].sum(1) - 1
    inner = torch.arange(in_loss[2].shape[1]) < last[:, None]
    assert (in_loss[0][inner] == 0).all() and inner.any()
    last = in_reward[2].sum(1) - 1
    inner = torch.arange(in_reward[2].shape[1]) < last[:, None]
    assert (in_reward[0][inner] != 0).all()


FLAGS = {  # flag -> (what both runs have, what the second has besides)
    "clip_epsilon": ("", "--clip_epsilon 0.01"),
    "dual_clip": ("", "--dual_clip 1.001"),
    "gamma": ("", "--gamma 0.5"),
    "lam": ("", "--lam 0.2"),
    "kl_coef": ("", "--kl_coef 0.5"),
    "kl_in": ("--kl_coef 0.5", "--kl_in reward"),
    "kl_type": ("--kl_coef 0.5", "--kl_type k2"),
    "update_iters": ("", "--update_iters 3"),
    "mini_batch_size": ("", "--mini_batch_size 0"),
    "critic_learning_rate": ("", "--critic_learning_rate 1e-2"),
    "cliprange_value": ("--critic_learning_rate 2e-2", "--cliprange_value 0.001"),
    "vf_coef": ("", "--vf_coef 0.01"),
    "critic_warmup": ("", "--critic_warmup 1"),
    "early_stop_kl": ("", "--early_stop_kl 1e-9"),
    "overlong": ("", "--overlong soft"),
}


@pytest.fixture(scope="module")
def told():
    """Weights that two steps with two passes left, by their flags."""
    return {}


def run(flags, folder, told, descent=False):
    if (flags, descent) not in told:
        with pytest.MonkeyPatch.context() as patch:
            if descent:
                plain_descent(patch, 0.05)
            base_weights(folder, initializer_range=0.2)
            more = "--mini_batch_size 2 --update_iters 2 --early_stop_kl 0 --grad_clip 0 --learning_rate 5e-3"
            train("ppo", folder, *more.split(), *flags.split(), steps=2)
        told[flags, descent] = weights(folder, NAME)
    return told[flags, descent]


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_is_dead(tmp_path, told, flag):
    both, besides = FLAGS[flag]
    descent = flag == "vf_coef"  # AdamW does not care how large a gradient is
    one = run(both, tmp_path / "one", told, descent)
    other = run(f"{both} {besides}", tmp_path / "other", told, descent)
    assert largest_difference(one, other) > 1e-5


def test_runs_repeat(tmp_path, told):
    assert_bit_equal(run("", tmp_path / "one", told), run(" ", tmp_path / "other", told))


def test_ratio_is_one_in_the_first_update(tmp_path, capsys):
    train("ppo", tmp_path, "--debug_log_ratio", "--tis_cap", 0, "--mini_batch_size", 0, steps=2)
    shown = [x for x in capsys.readouterr().out.splitlines() if "|ratio - 1| up to" in x]
    assert len(shown) == 2 and all(x.endswith("0.00e+00") for x in shown)
