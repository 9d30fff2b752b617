"""The log: one terminal line is one JSON line, every metric is what its name says."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from train_helpers import flags, log_lines, stage_module, train

from trainer import progress, runtime


def new_log(tmp_path, total_steps=10, **more):
    from trainer import checkpoint

    argv = flags("pretrain", tmp_path, *[w for k, v in more.items() for w in (f"--{k}", v)])
    args = stage_module("pretrain").parse_args(argv)
    rt = runtime.start(args)
    model = checkpoint.new_model(args, checkpoint.load_tokenizer(), rt)
    return progress.Progress(args, rt, model, {"total_steps": total_steps, "stage": "pretrain"})


def test_a_line_is_the_ratio_of_sums_since_the_line_before(tmp_path, capsys):
    log = new_log(tmp_path)
    log.start(0)
    log.step(0, 0.1, 1.0, num_tokens=50, loss=(torch.tensor(30.0), 10), aux_loss=(2.0, 1))
    log.step(1, 0.2, 3.0, num_tokens=150, loss=(torch.tensor(270.0), 90), aux_loss=(4.0, 1))
    printed = capsys.readouterr().out.strip()
    record = log_lines(tmp_path)[-1]
    assert record["step"] == 2 and record["loss"] == 3.0, "300 / 100, not the mean of 3 and 3"
    assert record["aux_loss"] == 3.0 and record["tokens"] == 200
    assert (record["lr"], record["grad_norm"]) == (0.2, 3.0)
    assert len(printed.splitlines()) == 1 and printed.startswith("step 2/10 | loss 3.0000 |")
    shown = {part.split()[0] for part in printed.split(" | ")}
    assert shown == set(record) - {"total_steps"}, "terminal and file tell the same"


def test_speed_time_left_and_mfu(tmp_path, monkeypatch):
    """10 steps of 1000 tokens in 20 s: 500 tokens/s; time spent aside does not count; MFU is FLOP/s over
    the peak."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(runtime, "peak_flops", lambda rt: 1e9)
    log = new_log(tmp_path, total_steps=40, log_interval=10)
    log.start(0)
    for step in range(10):
        clock.now += 2.0
        with log.aside():
            clock.now += 5.0
        log.step(step, 0.1, 1.0, num_tokens=1000, loss=(1.0, 1))
    record = log_lines(tmp_path)[-1]
    assert record["tokens_per_s"] == 500 and record["eta_min"] == 1.0 and record["time_s"] == 70
    assert math.isclose(record["mfu"], 500 * log.flops_per_token / 1e9, rel_tol=1e-4)


def test_a_skipped_step_leaves_no_nan_in_the_log(tmp_path):
    log = new_log(tmp_path)
    log.start(0)
    log.rt.skipped = 1
    log.step(0, 0.1, math.nan, num_tokens=10, loss=(torch.tensor(math.nan), 10))
    log.step(1, 0.1, 1.0, num_tokens=10, loss=(torch.tensor(20.0), 10))
    record = log_lines(tmp_path)[-1]
    assert record["loss"] == 2.0 and record["skipped"] == 1
    log.step(2, 0.1)  # a step without targets
    log.step(3, 0.1)
    assert "loss" not in log_lines(tmp_path)[-1]


def test_every_line_is_json_even_with_infinity(tmp_path):
    log = new_log(tmp_path)
    log.start(0)
    log.log(val_loss=math.inf)
    log.step(0, 0.1, math.nan)
    log.step(1, 0.1, math.nan)
    text = (tmp_path / "out/pretrain_log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert log_lines(tmp_path)[1]["val_loss"] == "inf"


def test_due_counts_finished_steps_and_leaves_the_end_to_the_stage(tmp_path):
    log = new_log(tmp_path, total_steps=6)
    log.start(0)
    due = []
    for step in range(6):
        log.step(step, 0.1)
        due += [log.done] if log.due(3) else []
        assert not log.due(0)
    assert due == [3]


def test_the_first_line_says_what_ran(tmp_path):
    log = new_log(tmp_path)
    log.start(0)
    first = log_lines(tmp_path)[0]
    assert first["event"] == "start" and first["args"]["batch_size"] == 4
    assert {"torch", "python", "transformers"} <= set(first["versions"]) and "commit" in first


def test_a_resumed_log_is_cut_back_to_the_resumed_step_and_drops_a_torn_line(tmp_path):
    log = new_log(tmp_path)
    log.start(0)
    for step in range(6):
        log.step(step, 0.1, loss=(1.0, 1))
    with log.path.open("a") as file:
        file.write('{"step": 7, "lo')
    again = new_log(tmp_path)
    again.start(4)
    assert [(x.get("event"), x["step"]) for x in log_lines(tmp_path)] == [
        ("start", 0),
        (None, 2),
        (None, 4),
        ("resume", 4),
    ]


def test_open_sums_survive_a_resume(tmp_path):
    """A save between two lines must not lose the steps since the line before."""
    log = new_log(tmp_path, log_interval=4)
    log.start(0)
    for step in range(3):
        log.step(step, 0.1, num_tokens=10, loss=(torch.tensor(step * 10.0), 10))
    state = json.loads(json.dumps(log.state_dict()))
    again = new_log(tmp_path, log_interval=4)
    again.load_state_dict(state)
    again.start(3)
    again.step(3, 0.1, num_tokens=10, loss=(torch.tensor(30.0), 10))
    record = log_lines(tmp_path)[-1]
    assert record["loss"] == 1.5 and record["tokens"] == 40


def test_the_curve_is_a_picture(tmp_path):
    train("pretrain", tmp_path, steps=6, curve=True)
    picture = tmp_path / "out/pretrain_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_without_matplotlib_training_still_ends_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    train("pretrain", tmp_path, steps=2, curve=True)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out/pretrain_curve.png").exists()


@pytest.mark.parametrize("tracker", ["swanlab", "wandb", "tensorboard"])
def test_a_missing_tracker_is_named_before_training(tmp_path, monkeypatch, tracker, capsys):
    import sys

    for name in [
        n for n in sys.modules if n.split(".")[0] == tracker or n.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(SystemExit) as end:
        train("pretrain", tmp_path, "--use_wandb", "--tracker", tracker)
    assert end.value.code == 2 and f"pip install {tracker}" in capsys.readouterr().err


class Recorder:
    """A tracker that remembers what it was told."""

    opened = []

    def __init__(self, folder, project, name, run_id, settings):
        self.run_id, self.project, self.lines, self.finished = run_id or "fresh-id", project, [], False
        Recorder.opened.append(self)

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def finish(self):
        self.finished = True


def test_trackers_mirror_the_lines_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    from train_helpers import stop_after

    monkeypatch.setattr(progress, "SwanLab", Recorder)
    Recorder.opened.clear()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("pretrain", tmp_path, "--use_wandb")
    monkeypatch.setattr(progress, "new_run_id", lambda: "another")
    train("pretrain", tmp_path, "--use_wandb", "--from_resume", 1)
    first, second = Recorder.opened
    assert first.run_id == second.run_id == "fresh-id" and first.finished and second.finished
    assert first.project == "MiniMind-Pretrain"
    assert [step for step, metrics in first.lines if "loss" in metrics] == [2, 4]
    assert [step for step, metrics in second.lines if "loss" in metrics] == [6]
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(first.lines[0][1])


def offline(monkeypatch, tmp_path):
    """No account, no network: any connection fails at once."""
    import socket

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SWANLAB_API_KEY", "WANDB_API_KEY", "SWANLAB_MODE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracker, folder", [("swanlab", "swanlog"), ("wandb", "wandb"), ("tensorboard", "runs")]
)
def test_real_trackers_work_offline(tmp_path, monkeypatch, tracker, folder):
    pytest.importorskip(tracker)
    offline(monkeypatch, tmp_path)
    train("pretrain", tmp_path, "--use_wandb", "--tracker", tracker)
    assert any(path.is_file() for path in (tmp_path / "out" / folder).rglob("*"))
    train("pretrain", tmp_path, "--use_wandb", "--tracker", tracker, "--from_resume", 1)


def test_tensorboard_holds_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("pretrain", tmp_path, "--use_wandb", "--tracker", "tensorboard")
    events = EventAccumulator(str(next((tmp_path / "out/runs").iterdir()))).Reload()
    logged = [(e.step, round(e.value, 4)) for e in events.Scalars("loss")]
    assert logged == [(x["step"], round(x["loss"], 4)) for x in log_lines(tmp_path) if "loss" in x]


def test_model_sizes_are_written_as_minimind_writes_them():
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    with torch.device("meta"):
        small = MiniMindForCausalLM(MiniMindConfig.from_preset("minimind2-small"))
        moe = MiniMindForCausalLM(MiniMindConfig.from_preset("minimind2-moe"))
    assert progress.model_size(small) == "Model Params: 25.83M"
    assert progress.model_size(moe) == "Model Params: 145.03M-A91.95M"


def test_the_resume_command_is_the_typed_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = str(tmp_path / "train_pretrain.py")
    monkeypatch.setattr("sys.argv", [script, "--data_path", "a b.jsonl", "--from_resume", "0", "--seed", "3"])
    args = SimpleNamespace(save_weight="pretrain")
    expected = "python train_pretrain.py --data_path 'a b.jsonl' --seed 3 --from_resume 1"
    assert progress.resume_command(args) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert progress.resume_command(args).startswith("torchrun --nproc_per_node 2 ")


def test_the_next_command_holds_only_flags_that_it_knows(tmp_path):
    args = SimpleNamespace(
        preset="tiny", hidden_size=64, num_attention_heads=4, dropout=0.1, save_dir=tmp_path / "a b"
    )
    everything = progress.same_model_flags(args)
    assert "--preset tiny" in everything and "--num_attention_heads 4" in everything
    known = progress.same_model_flags(args, known=["preset", "hidden_size"])
    assert known == f" --preset tiny --hidden_size 64 --save_dir '{tmp_path / 'a b'}'"


def test_only_programs_that_run_now_are_noted(tmp_path, monkeypatch, capsys):
    """A load average still counts the stage before, which has ended."""
    import os

    from trainer import runtime

    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0), raising=False)
    for running, noted in ((0.2, False), (99.0, True)):
        monkeypatch.setattr(runtime, "others_running", lambda n=running: n)
        train("pretrain", tmp_path, steps=1)
        assert ("other programs keep this machine busy" in capsys.readouterr().out) is noted


def test_figures_for_the_file_are_not_printed():
    """Reinforcement learning has some forty figures; a line is for reading."""
    shown = progress.terminal_line({"step": 1, "total_steps": 2, "reward": 0.5, "ess": 0.9, "clip_low": 0.0})
    assert shown == "step 1/2 | reward 0.5000"
