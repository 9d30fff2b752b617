"""LoRA, reasoning, distillation and the reward model on two processes (gloo, CPU) make the weights of one.

Starting processes takes seconds, so two are started once and run all stages, after one has done so alone.
"""

import json
import os
from pathlib import Path

import pytest
from stage_helpers import ROWS, SAVED, lines, plain_descent, train
from train_helpers import MOE, largest_difference, start_two, weights, write_lines

# Of 9 rows in steps of 4 the last step has one, so the second process none: it must still be part of every
# exchange, and count nowhere. Of 7, one by one, its last micro-batch, in which gradients travel, is empty.
# (A mixture's balance loss is a mean over micro-batches, which differ here.)
RUNS = {
    "reason": (
        7,
        ["--batch_size", 1, "--accumulation_steps", 4, *MOE, "--router_aux_loss_coef", 0, "--tag_weight", 7],
    ),
    "lora": (9, ["--batch_size", 4]),
    "distillation": (9, ["--batch_size", 4, "--alpha", 0.3, "--tie_word_embeddings", 0]),
    "on_policy": (
        9,
        ["--batch_size", 2, "--accumulation_steps", 2, "--on_policy", 0.6, "--max_gen_len", 8],
    ),
    "reward": (9, ["--batch_size", 4, "--center", 0.1]),
}
STAGE = {"on_policy": "distillation"}  # the others are called as their stage


def run(folder, name):
    """One of the runs above, in this process or as one of two."""
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch, 0.05)
        more = ["--val_path", folder / "val.jsonl", "--max_steps", 0, "--log_interval", 1, "--pack", 0]
        train(STAGE.get(name, name), folder, *more, "--epochs", 1, "--grad_clip", 0, *RUNS[name][1])


def be_a_process(top, rank, ports):
    """Run by each of the two processes."""
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    for name, port in zip(RUNS, json.loads(ports)):
        os.environ["MASTER_PORT"] = str(port)
        run(Path(top) / name, name)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders "one" and "two": the same runs by one process and by two."""
    from stage_helpers import MIXTURE, base_weights

    top = tmp_path_factory.mktemp("both")
    for folder in (top / "one", top / "two"):
        for name, (rows, more) in RUNS.items():
            stage = STAGE.get(name, name)
            write_lines(folder / name, "data.jsonl", ROWS[stage](rows))
            write_lines(folder / name, "val.jsonl", ROWS[stage](5, seed=3))
            fields = MIXTURE if "--use_moe" in more else {}
            base_weights(folder / name, **fields, tie_word_embeddings="--tie_word_embeddings" not in more)
            if stage == "distillation":
                base_weights(folder / name, "teacher", seed=1, initializer_range=0.2)
    for name in RUNS:
        run(top / "one" / name, name)
    start_two("test_distributed_stages", top / "two", len(RUNS))
    return top


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_weights_of_one(both, name):
    kind = "_moe" if "--use_moe" in RUNS[name][1] else ""
    file = f"{SAVED[STAGE.get(name, name)]}_32{kind}.pth"
    one, two = (weights(both / folder / name, file) for folder in ("one", "two"))
    base = weights(both / "one" / name, f"full_sft_32{kind}.pth")
    if name == "lora":  # B begins at zero
        assert all(tensor.abs().max() > 1e-5 for n, tensor in one.items() if n.endswith(".B"))
    else:
        shared = base.keys() & one.keys()  # a reward model has no head
        assert largest_difference({n: one[n] for n in shared}, {n: base[n] for n in shared}) > 1e-4
    assert largest_difference(one, two) < 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_does(both, name):
    """Losses and figures are of rows that exist, and so are the tokens."""
    one, two = (lines(both / folder / name, STAGE.get(name, name)) for folder in ("one", "two"))
    assert len(one) == len(two) and {"val_loss", "tokens"} <= set().union(*one)
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
