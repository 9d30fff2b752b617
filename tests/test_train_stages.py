"""The stages as a user meets them: they learn, they refuse bad input with one line, they stop when asked."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from train_helpers import MOE, REPO, flags, log_lines, sft_file, stage_module, train, weights, write_lines

STAGES = ["pretrain", "full_sft"]


# --------------------------------------------------------------------------------------------------
# The loss and the step
# --------------------------------------------------------------------------------------------------


def test_token_loss_by_hand():
    """Two micro-batches with 2 and 1 targets of a step with 3; -log p of the three: 0.5, 1.5, 4."""
    from trainer.train_pretrain import token_loss

    parts = [token_loss(torch.tensor(2.0), 3), token_loss(torch.tensor(4.0), 3)]
    assert math.isclose(sum(parts), 2.0, rel_tol=1e-6)  # the mean of means would be 2.5
    aux = [token_loss(torch.tensor(0.0), 3, torch.tensor(x), num_micro=2) for x in (1.0, 3.0)]
    assert math.isclose(sum(aux), 2.0, rel_tol=1e-6)


def step_weights(stage, micro_batches, num_steps=2, moe=False):
    """Weights after plain gradient descent on the same micro-batches: their difference is the gradient."""
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    from trainer import loop, runtime

    args = SimpleNamespace(device="cpu", dtype="float32", seed=0, num_threads=0, grad_clip=0.0)
    rt = runtime.start(args)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, residual_init="normal")
    model = MiniMindForCausalLM(MiniMindConfig(use_moe=moe, router_aux_loss_coef=0.0, **shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["base_lr"] = 1.0
    for _ in range(num_steps):
        micro_loss = stage_module(stage).next_token_loss
        loop.optimizer_step(model, micro_batches(), [optimizer], 0.5, args, rt, micro_loss)
    return model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moe", [False, True])
def test_accumulation_equals_one_large_batch_with_unequal_label_counts(tmp_path, stage, moe):
    """The bug of dividing by micro-batch: four rows with few and many labels, one by one and together."""
    from dataset.lm_dataset import load_sft
    from trainer import batches, checkpoint

    data = load_sft(sft_file(tmp_path), checkpoint.load_tokenizer(), 48, num_workers=1, pack=False)[0]
    counts = [int((data[i]["labels"][1:] != -100).sum()) for i in range(len(data))]
    rows = [counts.index(max(counts)), counts.index(min(counts)), 3, 4]

    def split(*groups):
        def make():
            step = batches.StepBatches(data.batch(group) for group in groups)
            step.num_targets = sum(counts[row] for group in groups for row in group)
            return step

        return make

    together = step_weights(stage, split(rows), moe=moe)
    one_by_one = step_weights(stage, split(*[[row] for row in rows]), moe=moe)
    uneven = step_weights(stage, split(rows[:3], rows[3:]), moe=moe)
    start = step_weights(stage, split(rows), num_steps=0, moe=moe)
    for other in (one_by_one, uneven):
        assert max((together[n] - other[n]).abs().max() for n in together) < 1e-6
    assert max((together[n] - start[n]).abs().max() for n in together) > 1e-3, "the step did something"


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_targets_changes_nothing_and_is_counted(stage):
    from trainer import batches, loop, runtime

    def nothing():
        step = batches.StepBatches([{"input_ids": torch.ones(2, 8, dtype=torch.int64)}])
        step[0]["labels"] = torch.full((2, 8), -100)
        return step

    start, after = step_weights(stage, nothing, num_steps=0), step_weights(stage, nothing, num_steps=3)
    assert all(start[name].equal(after[name]) for name in start)
    rt = runtime.start(SimpleNamespace(device="cpu", dtype="float32", seed=0, num_threads=0))
    stats = loop.optimizer_step(None, nothing(), [FakeOptimizer()], 1.0, None, rt, None)
    assert rt.skipped == 1 and "loss" not in stats


class FakeOptimizer:
    param_groups = [{"base_lr": 1.0}]


# --------------------------------------------------------------------------------------------------
# Whole runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_three_steps(tmp_path, stage, kind, capsys):
    from trainer import checkpoint

    train(stage, tmp_path, *(MOE if kind == "moe" else []), "--dtype", "auto", steps=3)
    out = capsys.readouterr().out
    assert "Model Params: " in out and "reads:" in out and "writes:" in out and "memory:" in out
    assert "step 3/3 | loss " in out and "val_bpb" in out
    assert "next:    python " + ("trainer/train_full_sft.py" if stage == "pretrain" else "eval_llm.py") in out
    name = f"{stage}_32{'_moe' if kind == 'moe' else ''}.pth"
    state, metadata = checkpoint.read_weights(tmp_path / "out" / name)
    assert metadata["stage"] == stage and metadata["step"] == metadata["total_steps"] == 3
    assert metadata["config"]["hidden_size"] == 32 and metadata["metrics"]["val_bpb"] > 0
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert ("aux_loss" in log_lines(tmp_path, stage)[-2]) == (kind == "moe")


def test_training_overfits_a_few_documents(tmp_path):
    rows = [{"text": f"the answer to question {i} is {i * 7 % 10}"} for i in range(8)]
    write_lines(tmp_path, "pretrain.jsonl", rows)
    train("pretrain", tmp_path, "--val_fraction", 0, "--hidden_size", 64, steps=100)
    losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
    assert losses[0] > 5 and losses[-1] < 0.5


def test_the_chain_from_pretraining_to_sft_records_its_parent(tmp_path, capsys):
    from trainer import checkpoint

    train("pretrain", tmp_path)
    train("full_sft", tmp_path, "--from_weight", "pretrain", steps=2)
    assert "loaded" in capsys.readouterr().out
    parent = checkpoint.read_weights(tmp_path / "out/full_sft_32.pth")[1]["parent"]
    origin = checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]
    assert parent == {"weight": "pretrain", "step": 6, "crc32": origin["crc32"]}


def test_two_runs_are_bit_equal(tmp_path):
    from train_helpers import assert_bit_equal

    for name in "ab":
        train("pretrain", tmp_path / name, "--dropout", 0.1, "--dtype", "bfloat16")
    assert_bit_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    train("pretrain", tmp_path / "c", "--dropout", 0.1, "--dtype", "bfloat16", "--seed", 1)
    assert not weights(tmp_path / "a")["model.norm.weight"].equal(
        weights(tmp_path / "c")["model.norm.weight"]
    )


def test_how_validation_is_cut_into_batches_does_not_matter(tmp_path):
    train(
        "pretrain",
        tmp_path,
        "--val_fraction",
        0.3,
        "--batch_size",
        4,
        "--learning_rate",
        1e-9,
        "--muon_lr",
        1e-9,
    )
    first = [x["val_loss"] for x in log_lines(tmp_path) if "val_loss" in x]
    train(
        "pretrain",
        tmp_path,
        "--val_fraction",
        0.3,
        "--batch_size",
        7,
        "--learning_rate",
        1e-9,
        "--muon_lr",
        1e-9,
    )
    second = [x["val_loss"] for x in log_lines(tmp_path) if "val_loss" in x]
    assert len(first) == 2 and first == pytest.approx(second, abs=1e-4)
    assert first[0] == pytest.approx(math.log(6400), abs=0.1), "a fresh model guesses"


def test_bits_per_byte_by_hand(tmp_path):
    """A uniform model over 6400 tokens: every target costs log2 6400 bits."""
    from dataset.lm_dataset import load_pretrain
    from trainer import checkpoint, runtime, validation

    args = stage_module("pretrain").parse_args(flags("pretrain", tmp_path))
    rt = runtime.start(args)
    data = load_pretrain(args.data_path, checkpoint.load_tokenizer(), 48, num_workers=1)[0]
    model = checkpoint.new_model(args, checkpoint.load_tokenizer(), rt)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    result = validation.validate(model, data, args, rt)
    assert result["val_loss"] == pytest.approx(math.log(6400), rel=1e-5)
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "pretrain.jsonl").read_text("utf-8").splitlines()
    ]
    pieces_lost = 0 if data.report()["split_documents"] == 0 else None
    if pieces_lost == 0:  # every byte of every text is a target
        assert data.num_bytes == sum(len(text.encode()) for text in texts)
    expected = math.log2(6400) * data.num_targets / data.num_bytes
    assert result["val_bpb"] == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux memory counters")
def test_memory_does_not_grow(tmp_path, monkeypatch):
    """After 200 steps as after 5: no graph, no batch, no log line is kept."""
    import gc

    from trainer import progress

    seen = {}
    original = progress.Progress.step

    def step(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        if step + 1 in (5, 20, 200):
            gc.collect()
            pages = int(open("/proc/self/statm").read().split()[1])
            tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
            seen[step + 1] = (tensors, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    monkeypatch.setattr(progress.Progress, "step", step)
    train("pretrain", tmp_path, "--save_interval", 50, "--val_interval", 50, steps=200)
    assert seen[200][0] <= seen[5][0] + 8, "tensors alive"
    assert seen[200][1] - seen[20][1] < 15, "megabytes of the process"


# --------------------------------------------------------------------------------------------------
# Bad input: one line, non-zero exit, nothing half-written
# --------------------------------------------------------------------------------------------------


def bad_file(tmp_path, content: bytes):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    return path


GOOD = b'{"text": "fine"}\n'
GOOD_CHAT = b'{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
NO_ANSWER = b'{"conversations": [{"role": "user", "content": "a"}]}\n'
BAD_INPUT = {
    "missing": ("pretrain", None, r"nowhere\.jsonl does not exist"),
    "empty": ("pretrain", b"", r"bad\.jsonl is empty"),
    "broken json": ("pretrain", GOOD + b'{"text": "unfinished\n', r"bad\.jsonl:2: "),
    "wrong keys": ("pretrain", GOOD + b'{"content": "x"}\n', r"bad\.jsonl:2: .*text"),
    "not utf-8": ("pretrain", GOOD + b'{"text": "\xff\xfe"}\n', r"bad\.jsonl:2: .*UTF-8"),
    "chat as text": ("pretrain", GOOD_CHAT, r"bad\.jsonl:1: "),
    "text as chat": ("full_sft", GOOD, r"bad\.jsonl:1: .*conversations"),
    "no assistant": ("full_sft", GOOD_CHAT + NO_ANSWER, r"bad\.jsonl:2: .*assistant"),
    "answers too long": (
        "full_sft",
        GOOD_CHAT.replace(b'"b"', b'"' + b"word " * 200 + b'"'),
        r"--max_seq_len",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_data_ends_in_one_line(tmp_path, case, capsys):
    stage, content, pattern = BAD_INPUT[case]
    path = tmp_path / "nowhere.jsonl" if content is None else bad_file(tmp_path, content)
    with pytest.raises(SystemExit) as end:
        train(stage, tmp_path, "--data_path", path)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and re.search(pattern, errors[0]), captured.err
    assert "Traceback" not in captured.err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def fails(capsys, code, pattern, *run):
    with pytest.raises(SystemExit) as end:
        train(*run)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == code and re.search(pattern, error), error


def test_bad_weights_end_in_one_line(tmp_path, capsys):
    sft = ["full_sft", tmp_path, "--from_weight", "pretrain"]
    fails(capsys, 2, r"pretrain_32.pth does not exist.*run trainer/train_pretrain.py first", *sft)
    train("pretrain", tmp_path, steps=1)
    fails(capsys, 2, r"num_hidden_layers 2 \(this run: 3\)", *sft, "--num_hidden_layers", 3)
    fails(capsys, 2, r"does not exist \(there is pretrain_32.pth", *sft, "--hidden_size", 64)
    fails(capsys, 2, r"vocab_size 6400 \(this run: 7000\)", *sft, "--vocab_size", 7000)
    fails(capsys, 2, r"--vocab_size 100 cannot hold them", *sft, "--vocab_size", 100)
    path = tmp_path / "out/pretrain_32.pth"
    path.write_bytes(path.read_bytes()[:5000])
    fails(capsys, 2, r"pretrain_32.pth is damaged \(5,000 bytes", *sft)
    assert not (tmp_path / "out/full_sft_32.pth").exists()


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_save(tmp_path, monkeypatch, capsys):
    import errno

    from trainer import checkpoint

    original, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) > 2:  # the first save worked: two files
            raise OSError(errno.ENOSPC, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", save)
    fails(
        capsys,
        2,
        r"could not save .*pretrain_32.pth \(disk full.*previous file is still there",
        "pretrain",
        tmp_path,
    )
    assert checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]["step"] == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_nan_in_the_data_path_stops_without_touching_good_weights(tmp_path, monkeypatch, capsys):
    """From the fourth step on the model's activations are NaN, as after a hardware error or a broken
    kernel."""
    from model.model_minimind import MiniMindModel
    from trainer import checkpoint

    original, calls = MiniMindModel.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        hidden, aux, load = original(self, *args, **kwargs)
        return hidden * (math.nan if len(calls) > 3 else 1.0), aux, load

    monkeypatch.setattr(MiniMindModel, "forward", forward)
    run = ["pretrain", tmp_path, "--val_fraction", 0]
    with pytest.raises(SystemExit) as end:
        train(*run, steps=20)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert re.search(r"step skipped, nothing changed \(1 in a row\); step 4, rows \d+, \d+", captured.out)
    assert "5 steps in a row" in captured.err and "--learning_rate" in captured.err
    state, metadata = checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")
    assert metadata["step"] in (3, 6) and all(t.isfinite().all() for t in state.values())


def test_a_number_that_breaks_once_skips_one_step(tmp_path, monkeypatch):
    from trainer import runtime

    original, calls = runtime.backward, []

    def backward(loss, rt):
        calls.append(1)
        original(loss * math.nan if len(calls) == 2 else loss, rt)

    monkeypatch.setattr(runtime, "backward", backward)
    train("pretrain", tmp_path)
    lines = [x for x in log_lines(tmp_path) if "lr" in x]
    assert lines[-1]["skipped"] == 1 and all(isinstance(x["loss"], float) for x in lines)


def test_impossible_shapes_are_refused_with_the_models_own_sentence(tmp_path, capsys):
    fails(capsys, 2, "must be even", "pretrain", tmp_path, "--head_dim", 5)


# --------------------------------------------------------------------------------------------------
# Ctrl-C at any moment
# --------------------------------------------------------------------------------------------------


def interrupt_in(monkeypatch, module, name, at_call=1, number=signal.SIGINT):
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


@pytest.mark.parametrize("moment", ["reading data", "building the model", "before the first step"])
def test_ctrl_c_before_training_writes_nothing(tmp_path, monkeypatch, capfd, moment):
    import dataset.lm_dataset
    from trainer import batches, checkpoint

    target = {
        "reading data": (dataset.lm_dataset, "load_pretrain"),
        "building the model": (checkpoint, "new_model"),
        "before the first step": (batches, "check_split"),
    }[moment]
    # Started in the background, Python leaves SIGINT ignored: behave as in a terminal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt_in(monkeypatch, *target)
    with pytest.raises(SystemExit) as end:
        train("pretrain", tmp_path)
    signal.signal(signal.SIGINT, handler)
    assert end.value.code == 130
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("moment", ["a step", "validation", "saving", "the last save", "the curve"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(tmp_path, monkeypatch, capfd, moment, number):
    from trainer import checkpoint, progress, runtime, validation

    target, done = {
        "a step": ((runtime, "optimizer_step", 2), 2),
        "validation": ((validation, "validate", 1), 4),
        "saving": ((checkpoint, "write_file", 1), 3),
        "the last save": ((checkpoint, "write_file", 3), 6),
        "the curve": ((progress, "draw_curve", 1), 6),
    }[moment]
    interrupt_in(monkeypatch, *target, number=number)
    train("pretrain", tmp_path, curve=moment == "the curve")
    out, err = capfd.readouterr()
    assert "finishing this step" in err and "Traceback" not in err
    assert checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]["step"] == done
    if done < 6:
        assert "--from_resume 1" in out.splitlines()[-1]
    monkeypatch.undo()
    train("pretrain", tmp_path, "--from_resume", 1)
    assert checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]["step"] == 6


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    from trainer import runtime

    monkeypatch.setattr(runtime, "SECOND_CTRL_C_AFTER", -1)
    interrupt_in(monkeypatch, runtime, "backward", 2)
    interrupt_in(monkeypatch, runtime, "optimizer_step", 2)
    with pytest.raises(SystemExit) as end:
        train("pretrain", tmp_path)
    assert end.value.code == 130


def test_the_script_itself_from_another_folder(tmp_path):
    """One real process: started elsewhere, interrupted by a real signal, exit code 0, and what it tells to
    type works."""
    argv = flags("pretrain", tmp_path, "--log_interval", 1, steps=100_000)
    script = REPO / "trainer/train_pretrain.py"
    process = subprocess.Popen(
        [sys.executable, script, *argv],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped (Ctrl-C). To continue: python " in out and "--from_resume 1" in out
    assert (tmp_path / "out/pretrain_32.pth").exists()


# --------------------------------------------------------------------------------------------------
# Which way imports point, and what code must not contain
# --------------------------------------------------------------------------------------------------


def sources():
    for folder in ("model", "dataset", "trainer", "scripts", "."):
        pattern = "*.py"
        yield from sorted((REPO / folder).glob(pattern))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path.name}: give the full name"
            for alias in node.names:
                yield node.module, alias.name


def full_names(path):
    for module, name in imports_of(path):
        yield f"{module}.{name}" if name else module


FORBIDDEN = {
    "model": ("dataset", "trainer", "scripts", "eval_llm"),
    "dataset": ("model", "trainer", "scripts", "eval_llm"),
    "trainer": ("scripts", "eval_llm"),
}


def test_imports_point_one_way():
    wrong = []
    for path in sources():
        room = path.parent.name if path.parent != REPO else "root"
        is_stage = room == "trainer" and path.name.startswith("train_")
        for name in full_names(path):
            of_stage = name.startswith("trainer.train_")
            if name.split(".")[0] in FORBIDDEN.get(room, ()):
                wrong.append((path.name, name))
            if of_stage and not is_stage:  # helpers, scripts and eval_llm never import a stage
                wrong.append((path.name, name))
    assert not wrong


def test_a_stage_takes_at_most_a_loss_from_another_stage():
    """And the agent GRPO's update: what it learns from is a group of conversations instead of answers."""
    for path in (REPO / "trainer").glob("train_*.py"):
        for name in full_names(path):
            if name.startswith("trainer.train_"):
                update = name == "trainer.train_grpo.learn_from_groups" and path.name == "train_agent.py"
                assert name.endswith("_loss") or update, f"{path.name} takes {name}"


def test_no_star_imports_and_nothing_unsafe():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), f"star import in {where}"
                if node.module == "pickle":
                    assert all(alias.name not in ("load", "loads") for alias in node.names), where
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except in {where}"
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "os.system"), f"{called} in {where}"
            assert called not in ("pickle.load", "pickle.loads"), f"{called} in {where}"
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"torch.load without weights_only in {where}"
            assert keywords.get("trust_remote_code") != "True", f"trust_remote_code in {where}"
            if called.endswith("load_state_dict"):
                assert keywords.get("strict") != "False", f"strict=False in {where}"
            if called.startswith("subprocess."):
                assert keywords.get("shell") != "True", f"shell=True in {where}"
        assert 'filterwarnings("ignore")' not in text, path.name
