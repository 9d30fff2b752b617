"""Resume is exact or it is a bug: interrupted or killed and continued equals uninterrupted, bit for bit."""

import random
import subprocess
import sys

import pytest
import stage_helpers
import torch
from train_helpers import MOE, REPO, assert_bit_equal, flags, log_lines, stop_after, train, weights

from model.precision import multiplies_integers

STEPS = 12

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from {helpers} import train
from trainer import checkpoint, runtime

def kill_in(module, name, at_call):
    original, calls = getattr(module, name), []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, wrapper)

kill_in({target}, {name!r}, {at_call})
train({stage!r}, {folder!r}, *{more!r}, steps={steps})
"""


def train_and_kill(stage, folder, more, target, at_call, helpers="train_helpers"):
    """A real process that kill -9s itself in the middle of the given call."""
    module, name = target.split(".")
    code = KILLED.format(
        tests=str(REPO / "tests"),
        helpers=helpers,
        target=module,
        name=name,
        at_call=at_call,
        stage=stage,
        folder=str(folder),
        more=[str(m) for m in more],
        steps=STEPS,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr


def values(folder, stage):
    """The log without what depends on the clock."""
    timed = {"tokens_per_s", "mfu", "memory_gb", "time_s", "eta_min"}
    return [
        {k: v for k, v in line.items() if k not in timed}
        for line in log_lines(folder, stage)
        if "event" not in line
    ]


needs_integers = pytest.mark.skipif(
    not multiplies_integers(torch.device("cpu")), reason="this CPU has no products of 8-bit numbers"
)
CASES = [
    pytest.param("pretrain", [], "float32", id="pretrain"),
    pytest.param("full_sft", MOE, "bfloat16", id="sft moe bf16"),
    pytest.param("pretrain", MOE, "float32", id="pretrain moe", marks=pytest.mark.slow),
    pytest.param("full_sft", [], "bfloat16", id="sft bf16", marks=pytest.mark.slow),
    pytest.param("pretrain", [], "int8", id="pretrain int8", marks=needs_integers),
]


@pytest.mark.parametrize("stage, kind, dtype", CASES)
def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(tmp_path, stage, kind, dtype):
    more = [*kind, "--dtype", dtype, "--dropout", 0.1, "--accumulation_steps", 2]
    name = f"{stage}_32{'_moe' if kind else ''}.pth"
    train(stage, tmp_path / "whole", *more, steps=STEPS)
    at = random.randint(4, STEPS)
    print(f"killed in step {at}")  # shown if the test fails
    train_and_kill(stage, tmp_path / "broken", more, "runtime.optimizer_step", at)
    train(stage, tmp_path / "broken", *more, "--from_resume", 1, steps=STEPS)
    assert_bit_equal(weights(tmp_path / "whole", name), weights(tmp_path / "broken", name))
    assert values(tmp_path / "whole", stage) == values(tmp_path / "broken", stage)


@pytest.mark.parametrize("stage", sorted(stage_helpers.SAVED))
def test_a_later_stage_killed_and_resumed_equals_uninterrupted(tmp_path, stage):
    more = ["--dropout", 0.1, "--accumulation_steps", 2]
    if stage == "distillation":
        more += ["--on_policy", 0.5, "--max_gen_len", 8]
    name = f"{stage_helpers.SAVED[stage]}_32.pth"
    stage_helpers.train(stage, tmp_path / "whole", *more, steps=STEPS)
    at = random.randint(4, STEPS)
    print(f"killed in step {at}")
    train_and_kill(stage, tmp_path / "broken", more, "runtime.optimizer_step", at, "stage_helpers")
    stage_helpers.train(stage, tmp_path / "broken", *more, "--from_resume", 1, steps=STEPS)
    assert_bit_equal(weights(tmp_path / "whole", name), weights(tmp_path / "broken", name))


@pytest.mark.parametrize("target", ["checkpoint.os", "checkpoint.torch"])
def test_stopped_in_the_middle_of_a_save(tmp_path, monkeypatch, target):
    """Power fails between writing and renaming, or while writing: the save before is used, and leftovers do
    no harm."""
    from trainer import checkpoint

    train("pretrain", tmp_path / "whole", steps=STEPS)

    class PowerCut(BaseException):
        pass

    owner, name = (checkpoint.os, "replace") if target.endswith("os") else (torch, "save")
    original, calls = getattr(owner, name), []

    def cut(first, second, *rest):
        is_weights = str(first).endswith(".tmp") and ".pth" in str(first) or name == "save"
        calls.append(is_weights)
        if sum(calls) == 4:  # the resume file of the second save
            if name == "save":
                second.write(b"half a file")
            raise PowerCut
        return original(first, second, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(PowerCut):
            train("pretrain", tmp_path / "broken", steps=STEPS)
    assert list(tmp_path.rglob("*.tmp"))
    train("pretrain", tmp_path / "broken", "--from_resume", 1, steps=STEPS)
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("at", range(1, 7))
def test_every_boundary(tmp_path, monkeypatch, at):
    """Stopped after each step in turn: on a save, between saves, on a log line, at the very end."""
    train("pretrain", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        train("pretrain", tmp_path / "broken")
    train("pretrain", tmp_path / "broken", "--from_resume", 1)
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert values(tmp_path / "whole", "pretrain") == values(tmp_path / "broken", "pretrain")


def test_epochs_of_a_length_that_fits_no_step_resume_too(tmp_path, monkeypatch):
    more = ["--max_steps", 0, "--epochs", 2, "--batch_size", 7]
    train("pretrain", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        train("pretrain", tmp_path / "broken", *more)
    train("pretrain", tmp_path / "broken", *more, "--from_resume", 1)
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_a_measured_compute_type_stays_that_of_the_first_part(tmp_path, monkeypatch, capsys):
    """--dtype auto times products on a CPU; another answer tomorrow must not change the run."""
    from trainer import runtime

    monkeypatch.setattr(runtime, "prefers_bfloat16", lambda device: True)
    train("pretrain", tmp_path / "whole", "--dtype", "auto")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("pretrain", tmp_path / "broken", "--dtype", "auto")
    monkeypatch.setattr(runtime, "prefers_bfloat16", lambda device: False)
    train("pretrain", tmp_path / "broken", "--dtype", "auto", "--from_resume", 1)
    assert "will not be bit-equal" not in capsys.readouterr().out
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_a_continued_run_keeps_what_its_first_part_settled_on(tmp_path, monkeypatch):
    """Rows, their length and the number of steps may follow from --max_minutes, which is not given again."""
    from trainer import cli, train_pretrain

    train("pretrain", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("pretrain", tmp_path / "broken")
    words, dropped = flags("pretrain", tmp_path / "broken"), {"--batch_size", "--max_seq_len", "--max_steps"}
    words = [w for i, w in enumerate(words) if w not in dropped and (i == 0 or words[i - 1] not in dropped)]
    cli.run(train_pretrain.main, train_pretrain.parse_args, [*words, "--from_resume", "1"])
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_equal_and_stays_compiled(tmp_path, monkeypatch, capsys):
    from trainer import batches

    monkeypatch.setattr(batches, "expected_seconds", lambda *_: 1e9)
    more = ["--use_compile", "auto", "--dtype", "bfloat16"]
    train("pretrain", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("pretrain", tmp_path / "broken", *more)
    monkeypatch.setattr(batches, "expected_seconds", lambda *_: 1.0)
    train("pretrain", tmp_path / "broken", *more, "--from_resume", 1)
    assert capsys.readouterr().out.count("torch.compile on") == 3
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_nothing_to_resume_says_so_and_starts_fresh(tmp_path, capsys):
    train("pretrain", tmp_path / "a", "--from_resume", 1)
    out = capsys.readouterr().out
    assert "nothing to resume: " in out and "pretrain_32_resume.pth does not exist; starting fresh" in out
    train("pretrain", tmp_path / "b")
    assert_bit_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_finished_run_resumes_to_itself(tmp_path, capsys):
    train("pretrain", tmp_path)
    before = weights(tmp_path)
    train("pretrain", tmp_path, "--from_resume", 1)
    assert "6 of 6 steps are done" in capsys.readouterr().out
    assert_bit_equal(before, weights(tmp_path))


def test_a_new_run_says_that_it_will_replace_an_old_one(tmp_path, capsys):
    train("pretrain", tmp_path)
    capsys.readouterr()
    train("pretrain", tmp_path)
    assert "will be replaced at the first save" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (["--seed", 7], "--seed 42 -> 7"),
        (["--batch_size", 5], "rows per step .* 4 -> 5"),
        (["--learning_rate", 0.5], "--learning_rate 0.01 -> 0.5"),
        (["--schedule", "cosine"], "--schedule wsd -> cosine"),
        (["--optimizer", "adamw"], "--optimizer muon -> adamw"),
        (["--max_steps", 9], "steps .* 6 -> 9"),
        (["--max_seq_len", 40], "--max_seq_len 48 -> 40.*training data"),
        (["--dropout", 0.2], "--dropout 0.0 -> 0.2"),
        (["--inference_rope_scaling", 1], "--inference_rope_scaling None -> 1"),
        (["--num_hidden_layers", 3], "--num_hidden_layers 2 -> 3"),
        (["--betas", "0.9,0.95"], "--betas"),
        (["--val_fraction", 0.4], "training data .* -> "),
    ],
)
def test_changed_settings_are_refused_with_old_and_new(finished, change, words, capsys):
    import re

    before = (finished / "checkpoints/pretrain_32_resume.pth").read_bytes()
    with pytest.raises(SystemExit) as end:
        train("pretrain", finished, "--from_resume", 1, *change)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and re.search(words, error), error
    assert "--from_resume 0" in error and len(error.splitlines()) == 1
    assert (finished / "checkpoints/pretrain_32_resume.pth").read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train("pretrain", folder)
    return folder


def test_changed_data_is_refused(tmp_path, capsys):
    from train_helpers import pretrain_file

    train("pretrain", tmp_path)
    pretrain_file(tmp_path, seed=1)
    with pytest.raises(SystemExit):
        train("pretrain", tmp_path, "--from_resume", 1)
    assert "training data" in capsys.readouterr().err


def test_what_does_not_change_the_numbers_may_change(tmp_path, monkeypatch):
    """The same batch cut otherwise, other log and save intervals, the data file elsewhere."""
    import shutil

    train("pretrain", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train("pretrain", tmp_path / "broken")
    moved = shutil.move(tmp_path / "broken/pretrain.jsonl", tmp_path / "moved.jsonl")
    more = "--batch_size 2 --accumulation_steps 2 --log_interval 1 --save_interval 1 --val_interval 0".split()
    train("pretrain", tmp_path / "broken", "--from_resume", 1, "--data_path", moved, *more)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert max((first[n] - second[n]).abs().max() for n in first) < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "tampered", "foreign"])
def test_a_damaged_resume_file_is_noticed(tmp_path, damage, capsys):
    train("pretrain", tmp_path)
    path = tmp_path / "checkpoints/pretrain_32_resume.pth"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "tampered":
        content = torch.load(path, weights_only=True)
        content["step"] = 2
        torch.save(content, path)
    else:
        torch.save({"model": {}, "optimizer": {}, "epoch": 1}, path)
    with pytest.raises(SystemExit) as end:
        train("pretrain", tmp_path, "--from_resume", 1)
    assert end.value.code == 2
    pattern = {"truncated": "is damaged", "tampered": "changed after", "foreign": "not a resume file"}[damage]
    assert pattern in capsys.readouterr().err


def test_small_updates_are_not_lost_in_the_files(tmp_path):
    """At learning rate 1e-8 a float16 file would show no change at all after 20 steps."""
    train("pretrain", tmp_path, steps=1)
    before = weights(tmp_path)["model.layers.0.self_attn.q_proj.weight"]
    tiny = ["--from_weight", "pretrain", "--optimizer", "adamw", "--learning_rate", 1e-8, "--weight_decay", 0]
    train("full_sft", tmp_path, *tiny, steps=20)
    after = weights(tmp_path, "full_sft_32.pth")["model.layers.0.self_attn.q_proj.weight"]
    assert (after != before).float().mean() > 0.5
    assert (after.half() != before.half()).float().mean() < 0.05, "so small that half precision loses it"
    content = torch.load(tmp_path / "checkpoints/full_sft_32_resume.pth", weights_only=True)
    assert {t.dtype for t in content["model"].values()} == {torch.float32}


def test_extra_state_of_a_stage_comes_back(tmp_path):
    """Reinforcement-learning stages keep trackers; they travel in the resume file."""
    from train_helpers import stage_module

    from trainer import checkpoint, optim, progress, runtime

    args = stage_module("pretrain").parse_args(flags("pretrain", tmp_path, "--from_resume", 1))
    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.new_model(args, tokenizer, rt)
    optimizers = optim.build_optimizers(model)
    run = checkpoint.describe("spo", args, tokenizer, "data", 6, None)
    log = progress.Progress(args, rt, model, run)
    log.start(0)
    log.step(0, 0.1)
    checkpoint.save(model, optimizers, args, rt, run, log, baselines={"3": [0.5, 2.0]}, table=torch.ones(3))
    saved = checkpoint.find_resume(args, model.config, tokenizer, "data", 20, rt)
    assert saved["extra"]["baselines"] == {"3": [0.5, 2.0]} and saved["extra"]["table"].equal(torch.ones(3))
    assert checkpoint.restore(saved, model, optimizers, rt, log) == 1
