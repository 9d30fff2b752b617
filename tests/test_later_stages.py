"""What every stage after fine-tuning must do, written once for all of them."""

import json
import shutil
import warnings

import pytest
import torch
from data_helpers import assistant, user
from stage_helpers import MIXTURE, ONE_STEP, SAVED, base_weights, plain_descent, refused, train
from train_helpers import MOE, largest_difference, weights, write_lines

STAGES = ["dpo", "reason", "distillation", "reward"]  # LoRA has tests of its own for most of this
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def saved(folder, stage, moe=False) -> dict:
    return weights(folder, f"{SAVED[stage]}_32{'_moe' if moe else ''}.pth")


@pytest.mark.parametrize("stage", STAGES)
def test_updates_of_a_small_rate_are_not_lost_in_the_files(tmp_path, stage):
    """At 1e-8, between the rates that are usual for DPO and those of published recipes. A fresh score vector
    is zero, so that nothing but itself learns in a reward model's first steps."""
    before = torch.load(base_weights(tmp_path), weights_only=True)
    small = ["--optimizer", "adamw", "--learning_rate", 1e-8, "--weight_decay", 0, "--val_fraction", 0]
    train(stage, tmp_path, *small, steps=8)
    after = saved(tmp_path, stage)
    name = "score.weight" if stage == "reward" else "model.layers.0.mlp.down_proj.weight"
    start = before.get(name, torch.zeros_like(after[name]))
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert (after[name] != start).float().mean() > 0.5
    assert (after[name] - start).abs().max() < 1e-7


@pytest.mark.parametrize("stage", STAGES)
def test_a_mixtures_balance_loss_reaches_its_router(tmp_path, monkeypatch, stage):
    """Of one step, what the balance loss adds: nothing without it, twice as much with twice its weight."""
    plain_descent(monkeypatch, 0.1)
    moved = []
    for weight in (0, 1, 2):
        folder = tmp_path / str(weight)
        train(stage, folder, *ONE_STEP, *MOE, "--router_aux_loss_coef", weight, steps=1)
        moved.append(saved(folder, stage, moe=True))
    gates = [name for name in moved[0] if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    for name in gates:
        once, twice = (other[name] - moved[0][name] for other in moved[1:])
        assert once.abs().max() > 1e-5
        torch.testing.assert_close(twice, 2 * once, rtol=1e-2, atol=2e-7)


def test_a_student_that_begins_as_its_teacher_differs_in_nothing(tmp_path):
    """The stage as a whole, dense and mixture: the divergence of its first validation is zero."""
    from stage_helpers import validations

    for kind in ([], MOE):
        folder = tmp_path / str(len(kind))
        base_weights(folder, **(MIXTURE if kind else {}))
        teacher = ["--from_teacher_weight", "full_sft", "--teacher_hidden_size", 32]
        teacher += ["--teacher_use_moe", 1] if kind else []
        train("distillation", folder, *kind, *teacher, "--alpha", 0, steps=1)
        first = validations(folder, "distillation")[0]
        assert first["step"] == 0 and abs(first["val_divergence"]) < 1e-7 and first["val_agreement"] == 1


# A row of each kind that a user may have made by mistake, and the words of the one line that says so.
GOOD = {"conversations": [user("a"), assistant("b")]}
GOOD_PAIR = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
BAD_ROWS = {
    "text": ({"text": "fine"}, r"data\.jsonl:2: "),
    "no answer": ({"conversations": [user("a")], "chosen": [user("a")], "rejected": [user("a")]}, ":2: "),
    "role": (
        {key: [user("a"), {"role": "robot", "content": "b"}] for key in ("conversations", *GOOD_PAIR)},
        ":2: .*robot",
    ),
}


@pytest.mark.parametrize("stage", SAVED)
def test_bad_data_ends_in_one_line(tmp_path, stage, capsys):
    good = GOOD_PAIR if stage in ("dpo", "reward") else GOOD
    path = tmp_path / "data.jsonl"

    def check(pattern):
        refused(capsys, pattern, train, stage, tmp_path)

    for row, pattern in BAD_ROWS.values():
        write_lines(tmp_path, path.name, [good, row])
        check(pattern)
    path.write_text(json.dumps(good) + '\n{"unfinished\n', encoding="utf-8")
    check(r"data\.jsonl:2: ")
    path.write_bytes(b"")
    check(r"data\.jsonl is empty")
    long = json.loads(json.dumps(good).replace('"b"', json.dumps("word " * 200)))
    write_lines(tmp_path, path.name, [long])
    check("--max_seq_len")
    missing = ["--data_path", tmp_path / "nowhere.jsonl"]
    refused(capsys, r"nowhere\.jsonl does not exist", train, stage, tmp_path, *missing)
    written = {path.name for path in tmp_path.glob("out/**/*.pth")}
    assert written <= {"full_sft_32.pth", "teacher_32.pth"} and not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_pairs_of_different_questions_end_in_one_line(tmp_path, stage, capsys):
    other = {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]}
    write_lines(tmp_path, "data.jsonl", [GOOD_PAIR, other])
    refused(capsys, r"data\.jsonl:2: .*same", train, stage, tmp_path)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("stage", [*STAGES, "on_policy"])
def test_compiled_steps_make_the_weights_of_uncompiled_ones(tmp_path, monkeypatch, stage):
    """Batches of preference pairs, and of the student's own answers, have many shapes."""
    more, calls = [], []
    if stage == "on_policy":
        stage, more = "distillation", ["--on_policy", 1, "--divergence", "reverse", "--max_gen_len", 8]
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (calls.append(a[0]), original(*a, **k))[1])
    plain_descent(monkeypatch, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        for compiled in "01":
            train(stage, tmp_path / compiled, *more, "--grad_clip", 0, "--use_compile", compiled)
    assert any(call.__qualname__ == "Block.forward" for call in calls), "something was compiled"
    plain, compiled = (saved(tmp_path / name, stage) for name in "01")
    base = weights(tmp_path / "0", "full_sft_32.pth")
    shared = base.keys() & plain.keys()
    assert largest_difference({n: plain[n] for n in shared}, {n: base[n] for n in shared}) > 1e-4
    assert largest_difference(plain, compiled) < 1e-5
