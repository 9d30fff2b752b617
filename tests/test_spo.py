"""SPO: the tracker by hand, which prompts are drawn, and in which order a step does things."""

import argparse
import collections
import io
import math

import pytest
import torch
from preference_helpers import small_model
from rl_helpers import prompt_rows, train
from stage_helpers import base_weights, plain_descent
from train_helpers import assert_bit_equal, largest_difference, log_lines, weights, write_lines

from trainer import runtime, train_spo
from trainer.train_spo import (
    Tracker,
    draw_prompts,
    first_counts,
    forgetting,
    prompt_weights,
    scaled,
    stream_advantages,
)

NAME, BASE = "spo_32.pth", "full_sft_32.pth"


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def near(value, expected):
    return torch.allclose(torch.as_tensor(value).double(), f64(*expected), rtol=0, atol=6e-8)


def tracker_of(prompts=3, alpha=2.0, beta=6.0, **more):
    settings = dict(baseline="prompt", rho_min=0.875, rho_max=0.96, kl_half=0.06)
    tracker = Tracker(prompts, argparse.Namespace(**settings | more))
    tracker.alpha, tracker.beta = (torch.full_like(tracker.alpha, x) for x in (alpha, beta))
    return tracker


# ----------------------------------------------------------------------------------------------------------
# The tracker
# ----------------------------------------------------------------------------------------------------------


def test_first_counts_by_hand():
    """Eight answers' worth, of which 2 of 8 were right."""
    alpha, beta = first_counts(f64(2, 0, 8), 8, 0.875)
    assert near(alpha, [2.2222222, 8 * 0.5 / 9, 8 * 8.5 / 9]) and near(
        beta, [5.7777778, 8 * 8.5 / 9, 8 * 0.5 / 9]
    )
    alpha, beta = first_counts(f64(0, 0), 0, 0.875)
    assert alpha.tolist() == beta.tolist() == [0.5, 0.5]


def test_forgetting_by_hand():
    """2^(-D / half), between its bounds."""
    assert near(forgetting(f64(0, 0.003, 0.012, 0.06), 0.06, 0.875, 0.96), [0.96, 0.96, 0.875, 0.875])
    assert near(forgetting(f64(0.012, 0.06), 0.06, 0.0, 1.0), [0.8705506, 0.5])


def test_a_visit_by_hand():
    """alpha, beta = 2, 6; the policy has moved by .012; the answer is right."""
    tracker = tracker_of()
    assert near(tracker.value([1]), [0.25]) and near(prompt_weights(tracker.value([1])), [0.4830127])
    assert near(tracker.strength([1]), [8])
    rho = tracker.see([1], [1.0], [0.012])
    assert near(rho, [0.875])
    assert near(tracker.alpha, [2, 2.75, 2]) and near(tracker.beta, [6, 5.25, 6])
    assert near(tracker.value(), [0.25, 0.34375, 0.25])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.37])
@pytest.mark.parametrize("change", [0.0, 0.005, 0.012, 1.0])
def test_a_visit_is_a_moving_average(reward, change):
    """v <- v + (r - v) / (rho N + 1), for rewards between 0 and 1 too."""
    tracker, v = tracker_of(), 0.25
    rho = float(tracker.see([0], [reward], [change])[0])
    assert float(tracker.value([0])) == pytest.approx(v + (reward - v) / (rho * 8 + 1), abs=1e-14)
    assert float(tracker.strength([0])) == pytest.approx(8 * rho + 1)


def test_memory_settles_where_the_bounds_say():
    """1 / (1 - rho): 25 answers when the policy stands still, 8 when it runs."""
    for change, answers in ((0.0, 25), (9.0, 8)):
        tracker = tracker_of(1)
        for _ in range(400):
            tracker.see([0], [1.0], [change])
        assert float(tracker.strength([0])) == pytest.approx(answers, rel=1e-4)
        assert 0.99 < float(tracker.value([0])) <= 1


def test_a_prompt_seen_twice_in_a_step_learns_twice():
    once, twice = tracker_of(), tracker_of()
    twice.see([2, 2], [1.0, 0.0], [0.0, 0.0])
    once.see([2], [1.0], [0.0])
    once.see([2], [0.0], [0.0])
    assert twice.alpha.equal(once.alpha) and twice.beta.equal(once.beta)


def test_one_tracker_for_all():
    """--baseline global: the mean reward of a step, and the mean change."""
    tracker = tracker_of(5, baseline="global")
    assert tracker.alpha.shape == (1,) and tracker.value().shape == (5,)
    assert near(tracker.value([4, 0]), [0.25, 0.25]) and near(tracker.strength([1, 2, 3]), [8, 8, 8])
    rho = tracker.see([0, 3], [1.0, 0.5], [0.0, 0.024])
    assert near(rho, [0.875])
    assert near(tracker.value([2]), [(2 * 0.875 + 0.75) / (8 * 0.875 + 1)])


def test_state_makes_the_round_trip():
    """Through torch.save, without a class of ours in the file."""
    tracker = tracker_of()
    tracker.see([0, 2], [1.0, 0.0], [0.0, 0.0])
    tracker.visits[0] = 3
    tracker.answers = {2: ([5, 6, 7], [-0.5, -1.25, -0.1], True), 0: ([8], [-2.0], False)}
    tracker.mean_logp = -0.7
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = tracker_of(alpha=9.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.answers == {2: ([5, 6, 7], [-0.5, -1.25, -0.1], True), 0: ([8], [-2.0], False)}
    assert other.alpha.equal(tracker.alpha) and other.visits.tolist() == [3, 0, 0] and other.mean_logp == -0.7
    for one in (tracker, other):
        one.see([2], [0.4], [0.004])
    assert other.value().equal(tracker.value()) and other.beta.equal(tracker.beta)


# ----------------------------------------------------------------------------------------------------------
# Advantages and rewards
# ----------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """A = r - v is [.75, -.5, .25, -.5]; the std is that of a sample."""
    found = stream_advantages(f64(1, 0, 1, 0), f64(0.25, 0.5, 0.75, 0.5))
    assert near(found, [1.2247449, -0.8164966, 0.4082483, -0.8164966])
    assert float(found.mean()) == pytest.approx(0, abs=1e-12) and float(found.std()) == pytest.approx(1)


def test_equal_advantages_are_next_to_nothing():
    """Rounding does not become a direction."""
    assert stream_advantages(torch.full((3,), 0.1), torch.full((3,), 0.5)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "spec, rewards, expected",
    [
        ("correct:1", [0, 1, 0.25], [0, 1, 0.25]),
        ("correct", [0.5], [0.5]),
        ("correct:1,format:0.1", [0, 1.1, 1.0], [0, 1, 1 / 1.1]),
        ("correct:2", [2, 1], [1, 0.5]),
        ("correct:1, repetition:2", [-1, 1, 0], [0, 1, 0.5]),  # repetition: -.5 to 0
        ("model:1", [-3, 0, 3, -7, 20], [0, 0.5, 1, 0, 1]),  # what lies outside is clipped
        ("correct:1,format:-0.5", [-0.5, 1], [0, 1]),
    ],
)
def test_rewards_between_zero_and_one(spec, rewards, expected):
    found = scaled(rewards, spec)
    assert found.dtype == torch.float64 and near(found, expected)


@pytest.mark.parametrize(
    "component, low, high",
    [("overlong", -1, 0), ("tags", 0, 1.5), ("rules", -1.75, 1.75), ("tools", -1, 1)],
)
def test_every_component_has_its_range(component, low, high):
    """A reward inside its range is not clipped (trainer/rewards.py says how far each goes)."""
    assert near(scaled([low, (low + high) / 2, high], f"{component}:1"), [0, 0.5, 1])


def test_counts_stay_positive_whatever_the_reward():
    """Rewards beyond their range would make beta negative, and v more than 1."""
    tracker = tracker_of(1, 0.5, 0.5)
    for reward in (40.0, -40.0, 3.3) * 30:
        tracker.see([0], scaled([reward], "model:1"), [0.0])
        assert float(tracker.alpha) > 0 < float(tracker.beta) and 0 < float(tracker.value()) < 1


# ----------------------------------------------------------------------------------------------------------
# Which prompts
# ----------------------------------------------------------------------------------------------------------


def test_weights_favour_the_undecided():
    weights_of = prompt_weights(f64(0, 0.1, 0.5, 0.9, 1))
    assert near(weights_of, [0.05, 0.35, 0.55, 0.35, 0.05])


def test_prompts_are_drawn_without_replacement():
    w = prompt_weights(torch.linspace(0, 1, 40, dtype=torch.float64))
    for seed in range(50):
        assert len(set(draw_prompts(w, 30, seed))) == 30
    assert sorted(draw_prompts(w, 40, 1)) == list(range(40))
    counts = collections.Counter(draw_prompts(w, 100, 1))  # more than there are: each as often as the others
    assert len(counts) == 40 and sum(counts.values()) == 100 and set(counts.values()) == {2, 3}


def test_draws_are_a_function_of_the_seed():
    w = torch.ones(1000)
    assert draw_prompts(w, 20, 7) == draw_prompts(w, 20, 7) != draw_prompts(w, 20, 8)
    assert draw_prompts(w, 20, 2**64 - 1) == draw_prompts(w, 20, 2**64 - 1)  # seeds of 64 bits


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_come_as_often_as_they_weigh(count):
    """Chi square of 3,000 draws: the first prompt, and the second among those that are left."""
    w = prompt_weights(f64(0.0, 0.1, 0.3, 0.5, 0.9))
    share, draws = w / w.sum(), 3000
    drawn = [draw_prompts(w, count, runtime.mix_seed(3, seed)) for seed in range(draws)]
    seen = torch.bincount(torch.tensor([rows[-1] for rows in drawn]), minlength=5)
    second = torch.stack(
        [sum(share[i] * share[j] / (1 - share[i]) for i in range(5) if i != j) for j in range(5)]
    )
    expected = draws * (share if count == 1 else second)
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # exceeded once in a thousand
    uniform = torch.full((5,), draws / 5)
    assert float(((seen - uniform) ** 2 / uniform).sum()) > 30  # the test can tell


# ----------------------------------------------------------------------------------------------------------
# Steps of the stage
# ----------------------------------------------------------------------------------------------------------


class Watch:
    """What a run did, in order: (what, its inputs)."""

    def __init__(self, monkeypatch):
        self.seen, self.tracker = [], None
        watch = self

        class Watched(Tracker):
            def __init__(self, *inputs):
                super().__init__(*inputs)
                watch.tracker = self

            def see(self, rows, rewards, changes):
                watch.note("see", list(rows), list(rewards), list(changes))
                return super().see(rows, rewards, changes)

        monkeypatch.setattr(train_spo, "Tracker", Watched)
        for owner, name in ((train_spo, "stream_advantages"), (train_spo, "draw_prompts")):
            monkeypatch.setattr(owner, name, self.noting(name, getattr(owner, name)))
        monkeypatch.setattr(runtime, "optimizer_step", self.noting("optimizer_step", runtime.optimizer_step))

    def note(self, name, *inputs):
        self.seen.append((name, inputs))

    def noting(self, name, function):
        def noted(*inputs):
            self.note(name, *(x.clone() if torch.is_tensor(x) else x for x in inputs))
            return function(*inputs)

        return noted

    def of(self, name):
        return [inputs for what, inputs in self.seen if what == name]


def test_the_tracker_learns_after_the_policy(tmp_path, monkeypatch):
    """A is computed with what was known BEFORE the answer: replayed by hand from what it was told."""
    watch = Watch(monkeypatch)
    write_lines(tmp_path, "data.jsonl", prompt_rows(6))
    train("spo", tmp_path, "--init_samples", 0, "--learning_rate", 1e-3, steps=6)
    order = [name for name, _ in watch.seen]
    assert order == ["draw_prompts", "stream_advantages", "optimizer_step", "see"] * 6
    alpha, beta, visits, late = [0.5] * 6, [0.5] * 6, [0] * 6, 0
    told = zip(watch.of("draw_prompts"), watch.of("stream_advantages"), watch.of("see"))
    for (drawn, count, _), (r, v, *_), (rows, rewards, changes) in told:
        value = [a / (a + b) for a, b in zip(alpha, beta)]
        assert near(drawn, [math.sqrt(x * (1 - x)) + 0.05 for x in value]) and count == 4
        assert near(v, [value[row] for row in rows]) and r.tolist() == pytest.approx(rewards)
        for row, reward, change in zip(rows, rewards, changes):
            assert change > 0 if visits[row] else change == 0
            rho = min(max(2 ** (-change / 0.06), 0.875), 0.96)
            alpha[row], beta[row] = rho * alpha[row] + reward, rho * beta[row] + 1 - reward
            late += visits[row] > 0
            visits[row] += 1
    assert near(watch.tracker.alpha, alpha) and near(watch.tracker.beta, beta) and late > 8
    assert watch.tracker.visits.tolist() == visits


def test_the_change_is_that_of_the_prompts_last_answer(tmp_path, monkeypatch):
    """Mean |log pi_now - log pi_then| over its tokens, by the weights that the first step left."""
    from dataset.prompts import load_prompts
    from trainer import checkpoint

    rows = write_lines(tmp_path, "data.jsonl", prompt_rows(4))  # a step visits all of them
    with monkeypatch.context() as patch:
        first = Watch(patch)
        train("spo", tmp_path, steps=1)
    model = small_model(initializer_range=0.2)
    model.load_state_dict(weights(tmp_path, NAME))
    before = small_model(initializer_range=0.2)
    before.load_state_dict(weights(tmp_path, BASE))
    prompts, expected = load_prompts(rows, checkpoint.load_tokenizer(), 512)[0], {}
    for row, (ids, then, _) in first.tracker.answers.items():
        prompt = prompts.ids(row, False)
        with torch.no_grad():
            now, earlier = (log_probs(m, prompt, ids) for m in (model, before))
        assert then == pytest.approx(earlier.tolist(), abs=1e-5)
        expected[row] = float((now - torch.tensor(then)).abs().mean())
    assert sorted(expected) == [0, 1, 2, 3]

    second = Watch(monkeypatch)
    train("spo", tmp_path, "--from_resume", 0, steps=2)
    (_, _, none), (rows, _, changes) = second.of("see")
    assert none == [0, 0, 0, 0] and sorted(rows) == [0, 1, 2, 3]
    assert dict(zip(rows, changes)) == pytest.approx(expected, abs=1e-5) and min(changes) > 1e-4
    logged = [line["change"] for line in log_lines(tmp_path, "spo") if "change" in line]
    assert logged == pytest.approx([0, sum(changes) / 4], rel=1e-3)


def test_the_last_answer_is_kept(tmp_path, monkeypatch):
    """With the log-probabilities it was drawn with; the one before it is forgotten."""
    from trainer import rl

    watch, answered, original = Watch(monkeypatch), [], rl.Course.answer

    def answer(course, *inputs):
        answered.append(original(course, *inputs))
        return answered[-1]

    monkeypatch.setattr(rl.Course, "answer", answer)
    write_lines(tmp_path, "data.jsonl", prompt_rows(4))
    train("spo", tmp_path, "--init_samples", 0, steps=3)
    last, kept = {s.row: s for s in answered[2]}, watch.tracker.answers
    assert kept.keys() == last.keys() == {0, 1, 2, 3}
    for row, (ids, logps, _) in kept.items():
        assert ids == last[row].ids and logps == pytest.approx(last[row].logprobs, abs=1e-5)
    assert all(s.ids != last[s.row].ids for s in answered[1])


def test_the_last_answer_is_scored_behind_the_prompt_it_had(tmp_path, monkeypatch):
    """With thoughts: a policy that stands still has not changed."""
    write_lines(tmp_path, "data.jsonl", prompt_rows(4))
    watch = Watch(monkeypatch)
    train("spo", tmp_path, "--thinking_ratio", 1, "--learning_rate", 1e-12, steps=2)
    assert max(watch.of("see")[1][2]) < 1e-5 and all(answer[2] for answer in watch.tracker.answers.values())


def log_probs(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def test_trackers_begin_with_answers_to_every_prompt(tmp_path, monkeypatch):
    """--init_samples: (sum + .5) / (n + 1), N0 answers strong, before the first A."""
    watch = Watch(monkeypatch)
    write_lines(tmp_path, "data.jsonl", prompt_rows(7))
    train("spo", tmp_path, "--init_samples", 3, steps=1)
    ((drawn, *_),) = watch.of("draw_prompts")
    assert drawn.shape == (7,) and len(set(drawn.tolist())) > 3  # prompts are told apart
    ((_, v, *_),) = watch.of("stream_advantages")
    assert (v >= 0.5 / 4).all() and (v <= 3.5 / 4).all()
    untouched = [row for row in range(7) if not watch.tracker.visits[row]]
    assert len(untouched) == 3 and near(watch.tracker.strength(untouched), [8, 8, 8])


def test_a_global_baseline_has_no_memory_of_prompts(tmp_path, monkeypatch):
    """Every v is the same; D is the change of the mean log-probability of whole steps."""
    watch = Watch(monkeypatch)
    train("spo", tmp_path, "--baseline", "global", "--init_samples", 2, steps=3)
    for _, v, *_ in watch.of("stream_advantages"):
        assert v.shape == (4,) and len(set(v.tolist())) == 1
    (_, _, first), (_, _, second), _ = watch.of("see")
    assert set(first) == {0.0} and len(set(second)) == 1 and second[0] > 0
    assert watch.tracker.alpha.shape == (1,) and watch.tracker.mean_logp < 0
    assert int(watch.tracker.visits.sum()) == 12


def test_answers_as_good_as_expected_move_nothing(tmp_path, monkeypatch):
    """All rewards alike, and all trackers: nothing to learn."""
    from trainer import rl

    def rewards_of(course, samples, prompts=None):
        return [0.1] * len(samples), {"given": [0.1] * len(samples)}, [None] * len(samples)

    monkeypatch.setattr(rl.Course, "rewards_of", rewards_of)
    more = ["--init_samples", 0, "--batch_size", 6, "--reward", "correct:1"]
    train("spo", tmp_path, *more, steps=1)
    assert_bit_equal(weights(tmp_path, NAME), weights(tmp_path, BASE))


def test_figures_of_a_step(tmp_path, monkeypatch):
    """tracked, brier and reward are of the same answers; what a step could not know yet is not in them."""
    watch = Watch(monkeypatch)
    write_lines(tmp_path, "data.jsonl", prompt_rows(6))
    train("spo", tmp_path, steps=3)
    found = [line for line in log_lines(tmp_path, "spo") if "brier" in line]
    assert len(found) == 3
    for line, (r, v, *_) in zip(found, watch.of("stream_advantages")):
        assert line["tracked"] == pytest.approx(float(v.mean()), abs=1e-4)
        assert line["brier"] == pytest.approx(float(((r - v) ** 2).mean()), abs=1e-4)
        largest = float(stream_advantages(r, v).abs().max())
        assert line["advantage_max"] == pytest.approx(largest, abs=1e-3)
    assert found[0]["first_visits"] == 1 and found[-1]["first_visits"] < 1
    assert [line["visits"] for line in found] == pytest.approx([4 / 6, 8 / 6, 2], abs=1e-4)


FLAGS = {  # flag -> (what both runs have, what the second has besides)
    "epsilon": ("", "--epsilon 0.01"),
    "epsilon_high": ("", "--epsilon_high 0.01"),
    "beta": ("", "--beta 0.5"),
    "kl_type": ("--beta 0.5", "--kl_type k2"),
    "update_iters": ("", "--update_iters 3"),
    "mini_batch_size": ("", "--mini_batch_size 2"),
    "baseline": ("", "--baseline global"),
    "init_samples": ("", "--init_samples 0"),
    "kl_half": ("", "--kl_half 100"),
    "rho_min": ("", "--rho_min 0.1"),
    "rho_max": ("--kl_half 100", "--rho_max 0.9"),
    "temperature": ("", "--temperature 0.7"),
}


@pytest.fixture(scope="module")
def told():
    """Weights that three steps with two passes left, by their flags."""
    return {}


def run(flags, folder, told):
    if flags not in told:
        with pytest.MonkeyPatch.context() as patch:
            plain_descent(patch, 0.1)
            base_weights(folder, initializer_range=0.2)
            write_lines(folder, "data.jsonl", prompt_rows(4))
            train("spo", folder, "--update_iters", 2, "--grad_clip", 0, *flags.split())
        told[flags] = weights(folder, NAME)
    return told[flags]


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_is_dead(tmp_path, told, flag):
    both, besides = FLAGS[flag]
    one, other = run(both, tmp_path / "one", told), run(f"{both} {besides}", tmp_path / "other", told)
    assert largest_difference(one, other) > 1e-6


def test_runs_repeat(tmp_path, told):
    assert_bit_equal(run("", tmp_path / "one", told), run(" ", tmp_path / "other", told))


@pytest.mark.parametrize("flags", ["--rho_min 0.97", "--rho_max 1", "--rho_min 1 --rho_max 1"])
def test_bounds_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit):
        train_spo.parse_args(flags.split())
    assert "--rho_min must not be above --rho_max" in capsys.readouterr().err
