"""Which rows make up a step: every row once per epoch, the same rows for any number of processes."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from train_helpers import (
    assert_bit_equal,
    flags,
    pretrain_file,
    sft_file,
    stage_module,
    train,
    weights,
    write_lines,
)

from trainer import batches, checkpoint
from trainer.progress import read_log
from trainer.runtime import TrainingError


def settings(batch_size=4, accumulation_steps=2, epochs=1, max_steps=0, seed=1):
    return SimpleNamespace(
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        schedule="wsd",
        warmup_steps=0,
        decay_fraction=0.4,
        min_lr_factor=0.0,
    )


def rows_of(step, num_rows, args):
    return batches.Order(num_rows, args.seed).rows(batches.step_positions(step, num_rows, args))


def test_every_row_comes_once_per_epoch():
    args = settings(epochs=3)
    seen = [row for step in range(batches.num_steps(21, args)) for row in rows_of(step, 21, args)]
    assert len(seen) == 63
    for epoch in range(3):
        assert sorted(seen[epoch * 21 : (epoch + 1) * 21]) == list(range(21))
    assert seen[:21] != seen[21:42], "each epoch has an order of its own"


def test_the_order_is_written_in_stone():
    """Numbers from numpy's frozen generator: a run begun with one version resumes in another."""
    assert batches.epoch_order(8, seed=42, epoch=0).tolist() == [4, 3, 7, 6, 0, 1, 5, 2]
    assert batches.epoch_order(8, seed=42, epoch=1).tolist() == [1, 2, 5, 6, 0, 3, 4, 7]


def test_max_steps_goes_on_beyond_the_epochs():
    args = settings(epochs=1, max_steps=10)
    assert batches.num_steps(21, args) == 10
    assert all(len(rows_of(step, 21, args)) == 8 for step in range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_items", [1, 5, 8, 24])
def test_processes_share_a_step_without_loss_or_overlap(world_size, num_items):
    shares = batches.split_step(list(range(num_items)), world_size, micro_size=3)
    assert sorted(item for share in shares for micro in share for item in micro) == list(range(num_items))
    assert len({len(share) for share in shares}) == 1, "all processes have the same number of micro-batches"
    assert all(len(micro) <= 3 for share in shares for micro in share)


def test_micro_batches_are_equal_parts_of_the_share():
    assert batches.micro_rows(settings(batch_size=32, accumulation_steps=3), world_size=2) == 24
    assert batches.micro_rows(settings(batch_size=32, accumulation_steps=8), world_size=8) == 32
    assert batches.micro_rows(settings(batch_size=32, accumulation_steps=1), world_size=8) == 4


def test_an_impossible_split_names_the_remedy():
    rt = SimpleNamespace(world_size=2)
    with pytest.raises(
        TrainingError, match="3 rows per step cannot be shared by 2 processes.*--batch_size 4"
    ):
        batches.check_split(settings(batch_size=3, accumulation_steps=1), rt)


def runtime_of(rank=0, world_size=1):
    import torch

    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        stopping=False,
        stop_signal=None,
        samples="",
        old_handlers={"already": "set"},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from dataset.lm_dataset import load_pretrain

    path = pretrain_file(tmp_path_factory.mktemp("data"))
    return load_pretrain(path, checkpoint.load_tokenizer(), 48, num_workers=1)[0]


def test_two_processes_see_the_rows_of_one(dataset):
    args = settings(epochs=2)
    alone = [b.rows for _, b in batches.training_steps(dataset, args, runtime_of())]
    pair = [
        [b.rows for _, b in batches.training_steps(dataset, args, runtime_of(rank, 2))] for rank in (0, 1)
    ]
    assert alone == [first + second for first, second in zip(*pair)]


def test_counts_are_those_of_the_tensors_and_sum_to_the_dataset(dataset):
    args, targets, tokens = settings(epochs=1), 0, 0
    for _, step in batches.training_steps(dataset, args, runtime_of()):
        labels = [batch["labels"][:, 1:] for batch in step]
        assert step.num_targets == sum(int((part != -100).sum()) for part in labels)
        targets, tokens = targets + step.num_targets, tokens + step.num_tokens
        assert {tuple(batch["input_ids"].shape) for batch in step} == {(4, 48)}, "one shape: compiled once"
    assert (targets, tokens) == (dataset.num_targets, dataset.num_tokens)


def test_starting_in_the_middle_gives_the_same_steps(dataset):
    args = settings(epochs=2)
    whole = [(step, b.rows) for step, b in batches.training_steps(dataset, args, runtime_of())]
    later = [(step, b.rows) for step, b in batches.training_steps(dataset, args, runtime_of(), start_step=2)]
    assert later == whole[2:]


def test_an_error_while_reading_ahead_reaches_the_loop(dataset, monkeypatch):
    def broken(rows):
        raise OSError("the disk went away")

    monkeypatch.setattr(dataset, "batch", broken)
    with pytest.raises(OSError, match="went away"):
        list(batches.training_steps(dataset, settings(), runtime_of()))


def test_filling_rows_are_padding_without_targets(dataset):
    batch = dataset.collate([3], size=4)
    assert (batch["labels"][1:] == -100).all() and (batch["input_ids"][1:] == dataset.pad_id).all()
    np.testing.assert_array_equal(batch["input_ids"][0], dataset[3]["input_ids"])
    empty = dataset.collate([], size=2)
    assert (empty["labels"] == -100).all() and empty["input_ids"].shape == (2, 48)


def test_the_fingerprint_changes_with_content_length_and_packing(tmp_path):
    from dataset.lm_dataset import load_sft

    tokenizer = checkpoint.load_tokenizer()
    first, again, other = (sft_file(tmp_path / name, seed=s) for name, s in [("a", 0), ("b", 0), ("c", 1)])

    def fingerprint(path, max_seq_len=48, **options):
        return load_sft(path, tokenizer, max_seq_len, num_workers=1, **options)[0].fingerprint()

    known = fingerprint(first)
    assert known == fingerprint(again), "the path does not matter"
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    rows[-1]["conversations"][-1]["content"] = "another answer"
    assert known != fingerprint(write_lines(tmp_path / "d", "sft.jsonl", rows)), (
        "answers count, not only questions"
    )
    assert known not in (fingerprint(other), fingerprint(first, 64), fingerprint(first, pack=False))


@pytest.mark.parametrize("schedule, stay", [("wsd", True), ("cosine", False)])
def test_max_minutes_is_turned_into_steps(schedule, stay, tmp_path, monkeypatch, capsys):
    """The steps that measured the speed stay where the schedule allows it, else they are taken back: the
    timed run equals `--max_steps N` bit for bit."""
    original, fitting = batches.steps_for_minutes, []

    def some_steps(*args):
        steps, made = original(*args)
        fitting.append(max(3 * len(made), 5))  # what fits depends on the machine
        assert steps >= 1 and bool(made) is stay
        return fitting[0], made

    monkeypatch.setattr(batches, "steps_for_minutes", some_steps)
    timed = ["--max_steps", 0, "--max_minutes", 0.2, "--schedule", schedule, "--epochs", 999]
    timed += ["--warmup_steps", 0, "--decay_fraction", 0.4]  # so that as few as 5 steps begin at the peak
    train("pretrain", tmp_path / "timed", *timed)
    assert "steps of" in capsys.readouterr().out
    train("pretrain", tmp_path / "counted", *timed[4:], steps=fitting[0])
    assert_bit_equal(weights(tmp_path / "timed"), weights(tmp_path / "counted"))
    logs = [read_log(tmp_path / name / "out" / "pretrain_log.jsonl") for name in ("timed", "counted")]
    timed_tokens, counted_tokens = (max(line.get("tokens", 0) for line in log) for log in logs)
    assert timed_tokens == counted_tokens, "the first steps count, too"
    train("pretrain", tmp_path / "timed", *timed, "--from_resume", 1)
    assert f"{fitting[0]} of {fitting[0]} steps are done" in capsys.readouterr().out and len(fitting) == 1


def test_a_short_run_validates_on_a_part_of_what_is_held_out(tmp_path, monkeypatch, capsys):
    from trainer import cli

    monkeypatch.setattr(batches, "steps_for_minutes", lambda *_: (2, []))
    lines = [{"text": f"text {i} " * 9} for i in range(400)]
    data = ["--data_path", write_lines(tmp_path, "many.jsonl", lines), "--val_fraction", 0.25]

    def held_out(*more):
        train("pretrain", tmp_path / "run", *data, *more)
        return re.search(r"held out: ([\d,]+) rows", capsys.readouterr().out)[1]

    def timed(minutes):
        return held_out("--max_steps", 0, "--max_minutes", minutes)

    whole = held_out()
    assert int(whole) > 10 and timed(60) == whole
    monkeypatch.setattr(cli, "validation_tokens", lambda args: 3.5 * args.max_seq_len)
    assert timed(60) == "3" and held_out() == whole


def test_the_share_of_validation_follows_from_the_model_and_the_time():
    from trainer import cli

    def tokens(*flags):
        args = stage_module("pretrain").parse_args([str(flag) for flag in flags])
        cli.settle(args, "cpu")
        return cli.validation_tokens(args)

    one, ten = (tokens("--preset", "tiny", "--max_seq_len", 64, "--max_minutes", m) for m in (1, 10))
    assert ten == pytest.approx(10 * one) and one > tokens("--max_seq_len", 64, "--max_minutes", 1) > 1000


def test_the_steps_that_fit_follow_from_the_median_time(dataset, monkeypatch):
    """Steps of 2 s after a first one of 20 s, validation of 4 s at the end and after every 10th step, 5.1 s
    kept back: after the first, steps are made for a fifth of the time. 14 steps and one validation take 50 of
    the 120 s, 25 more steps of 2.4 s fit into the rest."""
    from trainer import runtime

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(batches.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(batches.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(runtime, "synchronize", lambda rt: None)
    args, undone = settings(epochs=99), []
    args.max_minutes, args.val_interval, args.use_compile = 2.0, 10, "0"
    args.max_seq_len = 32
    rt = runtime_of()
    rt.started, rt.print = 0.0, print

    def rehearse(step, micro_batches):
        clock.now += 20.0 if step == 0 else 2.0

    def validate():
        clock.now += 4.0

    more = int((120 - 46 - 4 - 4 - 5.1) / 2.4)
    steps, made = batches.steps_for_minutes(dataset, args, rt, rehearse, lambda: undone.append(1), validate)
    assert (steps, len(made), undone) == (14 + more, 14, [])
    assert [seconds for _, seconds in made] == [20, *[2] * 13]
    args.schedule, clock.now = "linear", 0.0  # its rates depend on the number of steps: only four are made
    more = int((120 - 26 - 4 - 4 - 5.1) / 2.4)
    steps, made = batches.steps_for_minutes(dataset, args, rt, rehearse, lambda: undone.append(1), validate)
    assert (steps, made, undone) == (more, [], [1])


def test_the_held_out_file_wins_over_the_held_out_share(tmp_path):
    from trainer import runtime

    module = stage_module("pretrain")
    held_out = pretrain_file(tmp_path / "val", rows=20, seed=7)
    argv = flags("pretrain", tmp_path)
    argv[argv.index("--val_fraction") : argv.index("--val_fraction") + 2] = ["--val_path", str(held_out)]
    args = module.parse_args(argv)
    from dataset.lm_dataset import load_pretrain

    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    train, val = batches.load(load_pretrain, args.data_path, tokenizer, args, rt)
    assert train.report()["documents"] == 80 and val.report()["documents"] == 20
