"""`--plan`: what it says is true, and it leaves nothing behind."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import rl_helpers
import stage_helpers
import train_helpers
from train_helpers import REPO, assert_bit_equal, pretrain_file, stage_module, start_two, weights

TRAINERS = sorted(path.stem.removeprefix("train_") for path in (REPO / "trainer").glob("train_*.py"))


def files(folder) -> dict:
    """Every file below a folder with its content and time, but for the token cache."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and ".token_cache" not in path.parts
    }


def line(text, name) -> str:
    """The line of the plan that begins with `name:`."""
    found = re.findall(rf"^{name}: +(.*)$", text, re.M)
    assert len(found) == 1, text
    return found[0]


@pytest.mark.parametrize("stage", TRAINERS)
def test_every_trainer_has_the_flag(stage):
    args = stage_module(stage).parse_args(["--plan"])
    assert args.plan is True
    assert stage_module(stage).parse_args([]).plan is False


def test_pretraining(tmp_path, capsys):
    """Sizes, FLOPs, steps and tokens against what one counts by hand, and no file."""
    pretrain_file(tmp_path)
    before = files(tmp_path)
    train_helpers.train("pretrain", tmp_path, "--plan")
    text = capsys.readouterr().out
    assert files(tmp_path) == before
    assert list(tmp_path.rglob(".token_cache"))  # what the run needs anyway

    # 32 wide, 2 heads of 16, 1 key/value head, feed-forward 8/3 * 32 = 85.3 -> 128, vocabulary 6,400, tied.
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 128 + 2 * 32
    parameters = 6400 * 32 + 2 * block + 32
    assert line(text, "model") == (
        f"{parameters:,} parameters, {parameters:,} of them work on a token, {parameters:,} learn"
    )
    flops = 6 * parameters + 6 * 2 * 2 * 16 * 48  # and attention: half of the square of 48
    tokens = 4 * 48
    assert line(text, "compute") == (
        f"{flops:.4g} FLOPs per token, {flops * tokens:.4g} per step, {flops * tokens * 6:.4g} in all"
    )
    steps = line(text, "steps")
    assert steps.startswith("6 of 4 rows, 192 tokens each, 4 rows at a time; 1,152 tokens in all")
    amounts = dict(re.findall(r"(weights|gradients|optimizer state|rest) ([\d.]+)", text))
    assert "rest" in amounts and "fits" in line(text, "memory")
    assert re.match(r"[\d.]+ s; begun now, it would end at", line(text, "time"))


def test_epochs_count_every_row_once(tmp_path, capsys):
    """Without --max_steps the last step of an epoch is smaller; the tokens in all are those of the rows."""
    train_helpers.train("pretrain", tmp_path, "--plan", "--max_steps", 0, "--epochs", 3)
    text = capsys.readouterr().out
    steps = int(re.match(r"(\d+) of 4 rows", line(text, "steps"))[1])
    tokens = int(re.search(r"([\d,]+) tokens in all \(3.00 epochs\)", text)[1].replace(",", ""))
    assert tokens % (3 * 48) == 0
    assert steps == -(-tokens // 48 // 4)


def test_frozen_weights_do_not_learn(tmp_path, capsys):
    train_helpers.flags("lora", tmp_path)  # writes the base
    before = files(tmp_path)
    train_helpers.train("lora", tmp_path, "--plan", "--lora_rank", 2, "--lora_targets", "q_proj")
    text = capsys.readouterr().out
    assert files(tmp_path) == before
    assert line(text, "model").endswith(f"{2 * 2 * (32 + 32):,} learn")  # 2 layers, A and B of rank 2


@pytest.mark.parametrize("stage", ["dpo", "reward", "distillation", "reason"])
def test_later_stages(stage, tmp_path, capsys):
    stage_helpers.flags(stage, tmp_path)
    before = files(tmp_path)
    stage_helpers.train(stage, tmp_path, "--plan")
    text = capsys.readouterr().out
    assert files(tmp_path) == before
    assert line(text, "steps").startswith("6 of 4 ")
    # before the first step, after the fourth, at the end
    assert re.search(r"validation +[\d.]+ s   3 of ", text) and re.search(r"saving +[\d.]+ s   2 of ", text)


@pytest.mark.parametrize("stage", list(rl_helpers.SAVED))
def test_reinforcement_learning(stage, tmp_path, capsys):
    rl_helpers.flags(stage, tmp_path)
    before = files(tmp_path)
    rl_helpers.train(stage, tmp_path, "--plan")
    text = capsys.readouterr().out
    assert files(tmp_path) == before
    assert line(text, "steps").startswith("3 of 4 prompts")


def test_a_plan_changes_nothing_for_the_run(tmp_path):
    """The same weights, log and settings as without a plan, and one plan does not refuse to be continued."""
    train_helpers.train("pretrain", tmp_path / "alone")
    train_helpers.train("pretrain", tmp_path / "planned", "--plan")
    train_helpers.train("pretrain", tmp_path / "planned")
    assert_bit_equal(weights(tmp_path / "alone"), weights(tmp_path / "planned"))
    before = files(tmp_path / "planned")
    train_helpers.train("pretrain", tmp_path / "planned", "--plan")
    train_helpers.train("pretrain", tmp_path / "planned", "--plan", "--from_resume", 1)
    assert files(tmp_path / "planned") == before


def test_what_the_run_does_is_what_was_counted(tmp_path, monkeypatch, capsys):
    """Validations and saves of the run are as many as in the plan."""
    from trainer import checkpoint, validation

    done = {"save": 0, "validate": 0}

    def counting(module, name):
        original = getattr(module, name)

        def counted(*inputs, **more):
            done[name] += 1
            return original(*inputs, **more)

        monkeypatch.setattr(module, name, counted)

    counting(checkpoint, "save")
    counting(validation, "validate")
    more = ["--max_steps", 12, "--val_interval", 4, "--save_interval", 3, "--batch_size", 2]
    train_helpers.train("pretrain", tmp_path, *more, "--plan")
    text = capsys.readouterr().out
    planned = [int(n) for n in re.findall(r"(?:validation|saving) +[\d.]+ s   (\d+) of", text)]
    done.update(save=0, validate=0)
    train_helpers.train("pretrain", tmp_path, *more)
    assert planned == [done["validate"], done["save"]] == [3, 4]


def test_half_a_run_is_planned_from_where_it_stands(tmp_path, capsys, monkeypatch):
    """--from_resume 1 --plan counts what is left."""
    with pytest.MonkeyPatch.context() as patch:
        train_helpers.stop_after(patch, 4)
        train_helpers.train("pretrain", tmp_path, steps=10)
    capsys.readouterr()
    train_helpers.train("pretrain", tmp_path, "--plan", "--from_resume", 1, steps=10)
    text = capsys.readouterr().out
    assert re.search(r"steps +[\d.]+ s   6 of ", text)
    assert line(text, "steps").startswith("10 of 4 rows")


# ----------------------------------------------------------------------------------------------------------
# What does not fit
# ----------------------------------------------------------------------------------------------------------


def advised(text) -> list[str]:
    return re.findall(r"^(?:change:)? +(--.*)$", text, re.M)


def test_too_little_memory_is_not_tried(tmp_path, capsys, monkeypatch):
    """What does not fit by the formula is not begun; smaller batches with the same update are named, and by
    the same formula they fit."""
    from trainer import plan, progress, runtime

    monkeypatch.setattr(plan, "room_gb", lambda rt: 0.72)
    monkeypatch.setattr(plan, "rehearse", lambda *_: pytest.fail("a step was made"))
    more = ["--batch_size", 64, "--accumulation_steps", 3, "--max_seq_len", 256]
    train_helpers.train("pretrain", tmp_path, *more, "--plan")
    text = capsys.readouterr().out
    assert "by a formula" in line(text, "memory") and "does not fit" in line(text, "memory")
    found = re.match(r"--batch_size (\d+) --accumulation_steps (\d+): .* ([\d.]+) GB", advised(text)[0])
    rows, times, amount = int(found[1]), int(found[2]), float(found[3])
    assert rows * times == 64 * 3 and rows < 64

    module = stage_module("pretrain")
    args = module.parse_args(train_helpers.flags("pretrain", tmp_path, *more, "--batch_size", rows))
    rt = runtime.start(args)
    from model.model_minimind import MiniMindLM
    from trainer.cli import model_config

    def needed(rows):
        parts = progress.memory_parts(MiniMindLM(model_config(args)), args, rt, rows * 256)
        return sum(parts.values()) / 1e9

    assert needed(rows) == pytest.approx(amount, abs=0.006)
    assert needed(rows) <= 0.9 * 0.72 < needed(2 * rows)  # the mildest change


def test_memory_that_runs_out_is_a_result(tmp_path, capsys, monkeypatch):
    """Also what the formula lets pass can end without memory; the plan is printed all the same."""
    import torch

    from trainer import runtime

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime, "backward", no_memory)
    train_helpers.train("pretrain", tmp_path, "--plan", "--batch_size", 8)
    text = capsys.readouterr().out
    assert "ran out" in line(text, "memory")
    assert advised(text)[0].startswith("--batch_size 4 --accumulation_steps 2")


def test_rollouts_have_other_flags(tmp_path):
    """Half of what one can shorten, as often as needed."""
    from types import SimpleNamespace

    from trainer import plan, runtime

    args = rl_helpers.parsed("grpo", tmp_path, "--max_gen_len", 64, "--tokens_at_once", 4096)
    run = SimpleNamespace(args=args, rt=runtime.start(args), train=SimpleNamespace(tokens_per_row=20.0))
    amounts, parts = {"process": 1.0, "rest": 4.0}, {"activations": 1.0, "loss": 1.0}
    assert plan.flags_that_fit(run, amounts, parts, 2.2) == [
        "--max_gen_len 16 --tokens_at_once 1024 --val_prompts 1: 2.00 GB"
    ]
    assert plan.flags_that_fit(run, amounts, parts, 0.9) == []


# ----------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------


def test_enough_of(monkeypatch):
    """Everything in order for a run; a part of it, the last one first, while one rehearses, and an estimate
    for the rest."""
    from types import SimpleNamespace

    from trainer import batches

    now = [0.0]
    monkeypatch.setattr(batches.time, "perf_counter", lambda: now[0])

    def work(rt, items):
        seen = []
        for item in batches.enough_of(items, rt):
            seen.append(item)
            now[0] += 1.0
        return seen

    rt = SimpleNamespace(rehearsing=False, left_out=0.0)
    assert work(rt, range(100)) == list(range(100)) and rt.left_out == 0
    rt.rehearsing = True
    assert work(rt, range(3)) == [0, 1, 2] and rt.left_out == 0
    seen = work(rt, range(100))
    assert seen[0] == 99 and len(set(seen)) == len(seen) < 10
    assert max(seen[1:]) > 60 and min(seen[1:]) < 40  # from everywhere
    assert len(seen) + rt.left_out == pytest.approx(100)


class Rows:
    unit = "rows"

    def __len__(self):
        return 1000


def test_time_is_what_a_clock_that_ticks_evenly_says():
    """With steps of one second each, a run of so many steps takes so many seconds; and --max_minutes is
    turned into the steps that fit."""
    from types import SimpleNamespace

    from trainer import plan

    found = plan.Rehearsal(
        5.0, 2.0, [(3.0, 10, 10)] + [(1.0, 10, 10)] * 5, None, 2.0, 0.5, 1.0, 1.0, 1, 1, 0.0
    )
    settings = dict(batch_size=1, accumulation_steps=1, epochs=1, val_interval=100, save_interval=0)
    args = SimpleNamespace(**settings, max_steps=300, max_minutes=0.0)
    run = SimpleNamespace(args=args, train=Rows(), saved=None)
    total, parts = plan.times(run, found)
    seconds = {name: amount for name, (amount, _) in parts.items()}
    # before the first step, after 100 and 200, at the end
    assert total == 300 and seconds == {"start-up": 5, "steps": 302, "validation": 8, "saving": 1.5}
    args.max_steps, args.max_minutes = 0, 10.0
    total, parts = plan.times(run, found)
    assert 560 < sum(amount for amount, _ in parts.values()) < 600


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


def be_a_process(top, rank, ports):
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    os.environ["MASTER_PORT"] = str(json.loads(ports)[0])
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        train_helpers.train("pretrain", Path(top), "--plan")
    (Path(top) / f"plan_{rank}.txt").write_text(text.getvalue(), encoding="utf-8")


def test_two_processes(tmp_path):
    """The first one speaks, for each of them; both end, and nothing was written."""
    pretrain_file(tmp_path)
    start_two("test_plan", tmp_path, 1)
    text, silent = ((tmp_path / f"plan_{rank}.txt").read_text(encoding="utf-8") for rank in "01")
    assert "per process" in line(text, "memory") and "2 rows at a time" in line(text, "steps")
    assert not re.search(r"^(memory|time):", silent, re.M)
    assert not (tmp_path / "out").exists() and not (tmp_path / "checkpoints").exists()


def test_tokenizer(tmp_path, capsys):
    from trainer import cli

    module = stage_module("tokenizer")
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 9))) for _ in range(3000)]
    rows = [{"text": " ".join(draw.choice(words) for _ in range(50))} for _ in range(400)]
    path = train_helpers.write_lines(tmp_path, "text.jsonl", rows)
    before = files(tmp_path)
    argv = f"--data_path {path} --out_dir {tmp_path / 'new'} --vocab_size 400 --zh_share 0 --plan".split()
    cli.run(module.main, module.parse_args, argv)
    text = capsys.readouterr().out
    assert files(tmp_path) == before
    assert re.match(r"[\d.]+ s: reading", line(text, "time")) and "0.1" in line(text, "memory")
