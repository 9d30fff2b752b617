"""What holds for every stage of reinforcement learning: resume is exact, two processes make the weights of
one, and what is logged is true."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import rl_helpers
import torch
from rl_helpers import ROWS, SAVED, flags, train
from stage_helpers import base_weights, plain_descent, refused
from test_resume import train_and_kill
from train_helpers import assert_bit_equal, largest_difference, log_lines, start_two, weights, write_lines

STAGES = list(SAVED)
TIMED = {"tokens_per_s", "mfu", "memory_gb", "time_s", "eta_min", "rollout_s", "score_s", "update_s"}
# More than one update per step, so that ratios differ from 1 and a critic, a tracker, a reference have a say.
BUSY = {
    "grpo": "--update_iters 2 --mini_batch_size 6 --beta 0.05 --dynamic_sampling 1".split(),
    "ppo": "--update_iters 2 --mini_batch_size 2 --early_stop_kl 0".split(),
    "spo": "--update_iters 2 --mini_batch_size 2".split(),
    "agent": "--update_iters 2 --mini_batch_size 6 --loss_type dapo".split(),
}


def lines(folder, stage):
    """The log without events and times."""
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in log_lines(folder, SAVED[stage])
        if "event" not in line
    ]


def file_of(stage):
    return f"{SAVED[stage]}_32.pth"


# ----------------------------------------------------------------------------------------------------------
# Resume
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, stage):
    """Weights bit by bit, and the same rollouts."""
    more = [*BUSY[stage], "--val_fraction", 0.2, "--val_interval", 3, "--debug_interval", 1]
    train(stage, tmp_path / "whole", *more, steps=12)
    updates = 4
    at = random.randint(2 * updates + 1, 8 * updates)
    print(f"killed in update {at}")
    train_and_kill(stage, tmp_path / "broken", more, "runtime.optimizer_step", at, "rl_helpers")
    train(stage, tmp_path / "broken", *more, "--from_resume", 1, steps=12)
    assert_bit_equal(
        weights(tmp_path / "whole", file_of(stage)), weights(tmp_path / "broken", file_of(stage))
    )
    assert lines(tmp_path / "whole", stage) == lines(tmp_path / "broken", stage)
    texts = [(tmp_path / d / f"out/{SAVED[stage]}_samples.jsonl").read_bytes() for d in ("whole", "broken")]
    assert texts[0] == texts[1] and texts[0].count(b"\n") > 12


# ----------------------------------------------------------------------------------------------------------
# Two processes
# ----------------------------------------------------------------------------------------------------------


def run(folder, stage):
    """A run of one process, or of one of two."""
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch, 0.05)
        more = [*BUSY[stage], "--grad_clip", 0, "--val_path", folder / "val.jsonl", "--val_interval", 2]
        train(stage, folder, *more, steps=0)  # an epoch: in its last step the second process has no prompt


def be_a_process(top, rank, ports):
    """Run by each of the two processes. Every rank leaves its weights, after every step."""
    from trainer import runtime

    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    original = runtime.optimizer_step
    for stage, port in zip(STAGES, json.loads(ports)):
        os.environ["MASTER_PORT"] = str(port)
        seen = []

        def step(model, *rest, seen=seen):
            norm = original(model, *rest)
            seen.append([p.detach().clone() for p in runtime.bare(model).parameters()])
            return norm

        runtime.optimizer_step = step
        run(Path(top) / stage, stage)
        torch.save(seen, Path(top) / f"{stage}_{rank}.pt")


def write_files(top):
    for stage in STAGES:
        write_lines(top / stage, "data.jsonl", ROWS[stage](9))
        write_lines(top / stage, "val.jsonl", ROWS[stage](5, seed=3))
        base_weights(top / stage, initializer_range=0.2)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders "one" and "two": the same runs by one process and by two."""
    top = tmp_path_factory.mktemp("both")
    for folder in ("one", "two"):
        write_files(top / folder)
    for stage in STAGES:
        run(top / "one" / stage, stage)
    start_two("test_rl_stages", top / "two", len(STAGES))
    return top


@pytest.mark.parametrize("stage", STAGES)
def test_both_processes_hold_the_same_weights_after_every_update(both, stage):
    first, second = (torch.load(both / "two" / f"{stage}_{rank}.pt") for rank in "01")
    assert len(first) == len(second) >= 3
    for mine, other in zip(first, second):
        assert all(a.equal(b) for a, b in zip(mine, other))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_make_the_weights_of_one(both, stage):
    one, two = (weights(both / folder / stage, file_of(stage)) for folder in ("one", "two"))
    base = weights(both / "one" / stage, "full_sft_32.pth")
    assert largest_difference(one, base) > 1e-4
    assert largest_difference(one, two) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_what_one_does(both, stage):
    one, two = (lines(both / folder / stage, stage) for folder in ("one", "two"))
    assert len(one) == len(two) and {"reward", "length", "entropy", "val_length"} <= set().union(*one)
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    if stage == "agent":
        steps = [line for line in one if "reward" in line]
        assert all(line["turns"] > 1.2 and line["tool_tokens"] > 0.1 for line in steps)


BYPASS = """
from trainer import rollout
from trainer.runtime import bare
original = rollout.hidden_states
rollout.hidden_states = lambda model, batch: original(bare(model), batch)
"""
BYPASS_OF_THE_CRITIC = """
from trainer import train_ppo
from trainer.runtime import bare
values = train_ppo.token_values
train_ppo.token_values = lambda critic, batch: values(bare(critic), batch)
"""


def test_a_forward_pass_around_the_wrapper_would_be_noticed(tmp_path):
    """The defect of the reference implementations: nothing averages the gradients, every process trains a
    model of its own."""
    write_files(tmp_path)
    start_two("test_rl_stages", tmp_path, len(STAGES), BYPASS)
    for stage in STAGES:
        updates = zip(*(torch.load(tmp_path / f"{stage}_{rank}.pt") for rank in "01"))
        same = [all(a.equal(b) for a, b in zip(mine, other)) for mine, other in updates]
        assert not all(same), stage


def test_a_critic_around_its_wrapper_would_be_noticed(tmp_path):
    write_files(tmp_path)
    code = "test_rl_stages.STAGES = ['ppo']"
    start_two("test_rl_stages", tmp_path, 1, BYPASS_OF_THE_CRITIC + code)
    updates = zip(*(torch.load(tmp_path / f"ppo_{rank}.pt") for rank in "01"))
    assert not all(a.equal(b) for mine, other in updates for a, b in zip(mine, other))


# ----------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_update_finds_a_policy_that_has_not_moved(tmp_path, stage):
    """Ratio 1, no drift, no KL to the model that the run began with, and the sampler's own
    log-probabilities. (Minibatches of more answers than there are: pi_old is scored on its own.)"""
    train(stage, tmp_path, "--beta", 0.1, "--mini_batch_size", 99, "--update_iters", 1, steps=1)
    (line,) = [x for x in lines(tmp_path, stage) if "reward" in x]
    assert line["drift"] == line["drift_k1"] == 0 and abs(line["kl"]) < 1e-8 and line["kl_k1"] == 0
    assert line["clip_low"] == line["clip_high"] == 0 and 0 < line["mismatch_max"] < 1e-4
    assert line["advantage_max"] >= line["advantage_std"] > 0
    assert line["mismatch"] < 1e-5 and abs(line["ratio_max"] - 1) < 1e-4 and line["ess"] > 0.9999


@pytest.mark.parametrize("stage", STAGES)
def test_policy_and_reference_are_rounded_alike(tmp_path, stage):
    """A reference that is scored in another type would show a KL before anything has moved."""
    more = "--dtype bfloat16 --beta 0.1 --mini_batch_size 99 --update_iters 1".split()
    train(stage, tmp_path, *more, steps=1)
    (line,) = [x for x in lines(tmp_path, stage) if "reward" in x]
    assert line["drift"] == line["kl"] == line["kl_k1"] == 0 and line["mismatch"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_worth_more_becomes_likelier(tmp_path, stage):
    """One update: of the samples it was made from, the better ones gain, the worse ones lose."""
    from test_rollout import by_hand

    from dataset.prompts import load_prompts
    from trainer import checkpoint, rollout

    train(stage, tmp_path, "--debug_interval", 1, "--batch_size", 8, "--mini_batch_size", 0, steps=1)
    text = (tmp_path / f"out/{SAVED[stage]}_samples.jsonl").read_text("utf-8")
    samples = [json.loads(x) for x in text.splitlines()]
    data, _ = load_prompts(
        tmp_path / "data.jsonl",
        checkpoint.load_tokenizer(),
        512,
        kind="agent" if stage == "agent" else "rlaif",
    )
    before, after = (
        checkpoint.load_model(tmp_path / "out" / name)[0] for name in ("full_sft_32.pth", file_of(stage))
    )
    gains, worth = [], []
    for line in samples:
        own = [bool(m) for m in line["mask"]]
        sample = rollout.Sample(
            line["row"], 0, data.ids(line["row"]), line["ids"], own, line["logprobs"], "eos"
        )
        then = by_hand(before, sample)
        assert then.tolist() == pytest.approx([p for p, m in zip(line["logprobs"], own) if m], abs=1e-3)
        gains.append(float((by_hand(after, sample) - then).sum()))
        worth.append(line["advantage"])
    mean = sum(worth) / len(worth)
    assert max(worth) > min(worth)
    assert sum((w - mean) * g for w, g in zip(worth, gains)) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_mixtures_train(tmp_path, stage):
    train(stage, tmp_path, *rl_helpers.MOE, steps=2)
    (line, *_) = [x for x in lines(tmp_path, stage) if "reward" in x]
    assert line["aux_loss"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_samples_are_written_and_shown(tmp_path, stage, capsys):
    train(stage, tmp_path, "--debug_mode", "--debug_interval", 2, steps=3)
    shown = capsys.readouterr().out
    samples = [
        json.loads(x)
        for x in (tmp_path / f"out/{SAVED[stage]}_samples.jsonl").read_text("utf-8").splitlines()
    ]
    assert {s["step"] for s in samples} == {1, 3} and "tokens are the policy's" in shown and ">>" in shown
    for sample in samples:
        assert len(sample["ids"]) == len(sample["mask"]) == len(sample["logprobs"])
        assert sample["version"] == sample["step"] - 1
        assert set(sample["parts"]) == {"language", "repetition"}


@pytest.mark.parametrize("stage", ["grpo", "agent"])
def test_groups_without_a_difference_change_nothing(tmp_path, stage):
    """Also when dynamic sampling finds no other: six tokens are all equally short, and all agents wrong."""
    more = ["--dynamic_sampling", 2] if stage == "grpo" else []
    train(stage, tmp_path, "--reward", "length:1" if stage == "grpo" else "correct:1", *more, steps=2)
    assert_bit_equal(weights(tmp_path, file_of(stage)), weights(tmp_path, "full_sft_32.pth"))
    for line in (x for x in lines(tmp_path, stage) if "degenerate" in x):
        assert line["degenerate"] == 1 and line["skipped"] > 0
        assert stage == "agent" or line["groups_kept"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_dies_leaves_the_state_of_the_last_step(tmp_path, capsys, stage):
    """Nothing of what was learned is lost, and the continued run is the uninterrupted one."""
    from trainer.rewards import RewardError, Rewards

    more, rate, seen = [*BUSY[stage], "--save_interval", 0], Rewards.__call__, []
    more += ["--dynamic_sampling", 0] if stage == "grpo" else []  # it would ask more than once in a step
    train(stage, tmp_path / "whole", *more, steps=4)

    def dies(self, answers):
        seen.append(1)
        if len(seen) > (3 if stage == "spo" else 2):  # its tracker asks once before the first step
            raise RewardError("the judge at http://nowhere does not answer")
        return rate(self, answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "__call__", dies)
        refused(capsys, "the judge at http://nowhere", train, stage, tmp_path / "broken", *more, steps=4)
    free = ["--debug_interval", 7, "--pass_k", 3, "--judge_url", "http://127.0.0.1:1"]  # change no number
    train(stage, tmp_path / "broken", *more, "--from_resume", 1, *free, steps=4)
    assert "2 of 4 steps are done" in capsys.readouterr().out
    assert_bit_equal(
        weights(tmp_path / "whole", file_of(stage)), weights(tmp_path / "broken", file_of(stage))
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_rollout_server_that_dies_leaves_the_state_of_the_last_step(tmp_path, capsys, monkeypatch, kind):
    """It is asked again, then the run ends; with the server back it becomes the uninterrupted one."""
    from fake_rollout_server import FakeServer

    from trainer import checkpoint, served

    monkeypatch.setattr(served.ServedEngine.__init__, "__defaults__", (30.0, 2, 0.005))  # the last: the pause
    flags("grpo", tmp_path / "base")  # writes the first weights
    policy, _ = checkpoint.load_model(tmp_path / "base/out/full_sft_32.pth")
    served.export_folder(policy, checkpoint.load_tokenizer().name_or_path, tmp_path / "served")
    more = [*BUSY["grpo"], "--save_interval", 0, "--rollout_engine", kind, "--rollout_url"]

    def here(folder):
        return [*more, server.url, "--rollout_shared_path", tmp_path / folder / "shared"]

    with FakeServer(kind, tmp_path / "served") as server:
        train("grpo", tmp_path / "whole", *here("whole"), steps=4)
        load, loads = server.load, []

        def dies_at_the_third(folder):
            loads.append(folder)
            if len(loads) > 2:
                server.fault = "die"
            load(folder)

        server.load = dies_at_the_third
        refused(capsys, re.escape(server.url), train, "grpo", tmp_path / "broken", *here("broken"), steps=4)
        assert len(loads) == 3 and len(set(server.calls[-3:])) == 1, "one request, tried three times"
        server.fault, server.load = None, load
        train("grpo", tmp_path / "broken", *here("broken"), "--from_resume", 1, steps=4)
    assert "2 of 4 steps are done" in capsys.readouterr().out
    one, other = (weights(tmp_path / folder, file_of("grpo")) for folder in ("whole", "broken"))
    assert_bit_equal(one, other)
    assert largest_difference(one, weights(tmp_path / "base", "full_sft_32.pth")) > 1e-4
    assert lines(tmp_path / "whole", "grpo")[-1] == lines(tmp_path / "broken", "grpo")[-1]


# ----------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_bad_input_ends_in_one_line(tmp_path, stage, capsys):
    def check(pattern, *more):
        return refused(capsys, pattern, train, stage, tmp_path, *more)

    check("--dropout", "--dropout", 0.1)
    check("reward", "--reward", "nonsense:1")
    check("train_reward.py", "--reward", "model:1")
    check("fits into --max_seq_len", "--max_seq_len", 8)
    check("--judge_url", "--reward", "judge:1")
    check("--judge_url", "--reward", "judge:1", "--reward_model_path", "x")
    check("--max_minutes", "--max_minutes", 1, "--max_steps", 0, "--schedule", "cosine")
    write_lines(tmp_path, "bad.jsonl", [{"conversations": [{"role": "assistant", "content": "x"}]}])
    check(r"bad\.jsonl:1: no user turn", "--data_path", tmp_path / "bad.jsonl")
    if stage == "agent":
        rows = [{key: row[key] for key in ("conversations",)} for row in ROWS["agent"](2)]
        write_lines(tmp_path, "nogt.jsonl", rows)
        check(r"nogt\.jsonl:1: .*gt", "--data_path", tmp_path / "nogt.jsonl")
        check("--max_total_len", "--max_total_len", 100)


def test_a_server_that_is_not_there(tmp_path, capsys):
    more = ["--rollout_engine", "sglang", "--rollout_url", "http://127.0.0.1:9"]
    refused(capsys, "127.0.0.1:9", train, "grpo", tmp_path, *more)
