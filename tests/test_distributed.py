"""Two processes (gloo, CPU) do what one does: same updates, same weights on both, one exchange per update.

Starting processes takes seconds, so two are started once and run all scenarios; each test looks at one
result.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_helpers import REPO, largest_difference, log_lines, sft_file, stop_after, train, weights

SCENARIOS = ["gradients", "unequal", "exchanges", "bad_gradient", "draws", "interrupted", "stage"]
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, residual_init="normal")


def small_model(**more):
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**SHAPE, **more))


def settings(batch_size, accumulation_steps):
    return SimpleNamespace(
        device="cpu", dtype="float32", seed=3, num_threads=1, grad_clip=1.0, epochs=1, max_steps=3,
        batch_size=batch_size, accumulation_steps=accumulation_steps,
    )  # fmt: skip


def descend(folder, args, rt, **more):
    """Three steps of plain gradient descent through the stages' own loss; the weights tell the
    gradients."""
    from dataset.lm_dataset import load_sft
    from trainer import batches, checkpoint, loop, runtime
    from trainer.train_pretrain import next_token_loss

    data = load_sft(folder / "sft.jsonl", checkpoint.load_tokenizer(), 48, num_workers=1, pack=False)[0]
    model = runtime.wrap(small_model(**more), rt)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["base_lr"] = 1.0
    counts = []
    for _, micro_batches in batches.training_steps(data, args, rt):
        loop.optimizer_step(model, micro_batches, [optimizer], 0.5, args, rt, next_token_loss)
        counts.append(micro_batches.num_targets)
    return runtime.bare(model).state_dict(), counts


def scenario_gradients(folder, rt):
    state, counts = descend(folder, settings(4, 2), rt)
    return {"state": state, "counts": counts}


def scenario_unequal(folder, rt):
    """A mixture of experts whose ranks hold very different numbers of targets; no rank may wait for an idle
    expert."""
    state, _ = descend(folder, settings(2, 1), rt, use_moe=True, num_experts=4, num_experts_per_tok=1)
    return {"state": state}


def scenario_exchanges(folder, rt):
    """How often gradients travel in a step of four micro-batches, and in one of a single micro-batch."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from trainer import batches, loop, runtime
    from trainer.train_pretrain import next_token_loss

    model = runtime.wrap(small_model(), rt)
    travelled = []

    def hook(state, bucket):
        travelled.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    result = []
    for num_micro in (1, 4, 1):
        travelled.clear()
        ids = torch.randint(40, 6000, (num_micro, 2, 16), generator=torch.Generator().manual_seed(rt.rank))
        step = batches.StepBatches({"input_ids": x, "labels": x} for x in ids)
        step.num_targets = 30 * num_micro
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["base_lr"] = 0.1
        loop.optimizer_step(model, step, [optimizer], 1.0, settings(2, num_micro), rt, next_token_loss)
        result.append(len(travelled))
    return {"exchanges": result}


def scenario_bad_gradient(folder, rt):
    """NaN on the second process only: both must skip, or they part for ever."""
    from trainer import runtime

    model = runtime.wrap(torch.nn.Linear(3, 1), rt)
    with torch.no_grad():
        runtime.bare(model).weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = torch.ones(2, 3) * (float("nan") if rt.rank == 1 and step == 0 else 1.0)
        runtime.backward(model(x).sum() / 4, rt)
        runtime.optimizer_step(model, [optimizer], rt, 0.0)
    return {"state": runtime.bare(model).state_dict(), "skipped": rt.skipped}


def scenario_draws(folder, rt):
    rt.seed_step(5)
    return {"draw": torch.rand(3).tolist()}


def scenario_interrupted(folder, rt):
    """The middle part of a run that begins and ends with one process; it stops on a signal to one process
    only."""
    from trainer import runtime

    with pytest.MonkeyPatch.context() as patch:
        if rt.rank == 1:
            stop_after(patch, 4)
        train("full_sft", folder / "changing", "--from_resume", 1, "--batch_size", 4, steps=12)
    assert runtime.total is not None
    return {}


def scenario_stage(folder, rt):
    train("pretrain", folder / "two", "--val_fraction", 0.2, steps=4)
    return {}


def be_a_process(folder, rank, ports):
    """Run by each of the two processes: all scenarios, results into files."""
    from trainer import runtime

    torch.set_num_threads(1)
    folder = Path(folder)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    for name, port in zip(SCENARIOS, json.loads(ports)):
        os.environ["MASTER_PORT"] = str(port)
        if name in ("interrupted", "stage"):  # whole stages start the processes themselves
            rt = SimpleNamespace(rank=int(rank))
        else:
            rt = None
            before = gloo_threads()
            rt = runtime.start(settings(4, 1))
            during = gloo_threads()
        result = globals()[f"scenario_{name}"](folder, rt)
        torch.save(result, folder / f"{name}_{rank}.pt")
        if name not in ("interrupted", "stage"):
            runtime.stop(rt)
            torch.save([before, during, gloo_threads()], folder / f"threads_{name}_{rank}.pt")


def gloo_threads() -> int:
    """How many threads of this process wait for something to send; Linux tells."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    sft_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        train("full_sft", folder / "changing", steps=12)  # the first part of `interrupted`, with one process
    ports = json.dumps(free_ports(len(SCENARIOS)))
    code = f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import test_distributed"
    code += "; test_distributed.be_a_process(*sys.argv[1:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(rank), ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    found = {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in SCENARIOS
    }
    return SimpleNamespace(folder=folder, outputs=outputs, **found)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have names on Linux only")
def test_the_threads_of_the_groups_end_with_them(results):
    """A thread that held a tensor while the interpreter ended would kill a process that had done its work."""
    for rank in (0, 1):  # of a scenario without a DDP model, which would keep its group's
        before, during, after = torch.load(results.folder / f"threads_draws_{rank}.pt", weights_only=True)
        assert before == after < during


def alone(folder, args, **more):
    from trainer import runtime

    return descend(folder, args, runtime.start(args), **more)


@pytest.mark.parametrize("batch_size, accumulation_steps", [(8, 1), (4, 2), (2, 4)])
def test_two_processes_make_the_update_of_one(results, batch_size, accumulation_steps):
    """1 x 8, 1 x 4 x 2, 1 x 2 x 4 and 2 processes x 4, on rows with unequal numbers of answer tokens."""
    state, counts = alone(results.folder, settings(batch_size, accumulation_steps))
    assert largest_difference(state, results.gradients[0]["state"]) < 1e-6
    pair = [sum(both) for both in zip(*(r["counts"] for r in results.gradients))]
    assert pair == counts and results.gradients[0]["counts"] != results.gradients[1]["counts"]


def test_a_mixture_with_idle_experts_does_not_hang_and_agrees(results):
    """Without its balance loss: that is a mean over micro-batches, which differ here."""
    first, second = (r["state"] for r in results.unequal)
    assert largest_difference(first, second) == 0.0


def test_all_processes_hold_identical_weights(results):
    for result in (results.gradients, results.unequal, results.bad_gradient):
        assert largest_difference(result[0]["state"], result[1]["state"]) == 0.0


def test_gradients_travel_once_per_update(results):
    """With four micro-batches as often as with one: no_sync works. (The first update may use other
    buckets.)"""
    for result in results.exchanges:
        assert result["exchanges"][1] == result["exchanges"][2] >= 1


def test_a_nan_on_one_process_skips_the_step_on_both(results):
    for result in results.bad_gradient:
        assert result["skipped"] == 1
        torch.testing.assert_close(result["state"]["weight"], torch.full((1, 3), 0.9))


def test_processes_draw_differently(results):
    assert results.draws[0]["draw"] != results.draws[1]["draw"]


def test_one_two_one_processes_equal_an_uninterrupted_run(results, tmp_path):
    lines = log_lines(results.folder / "changing", "full_sft")
    assert lines[-1]["step"] == 8 and "processes: 1 -> 2" in results.outputs[0]
    train("full_sft", results.folder / "changing", "--from_resume", 1, steps=12)
    train("full_sft", tmp_path / "whole", steps=12)
    first = weights(results.folder / "changing", "full_sft_32.pth")
    second = weights(tmp_path / "whole", "full_sft_32.pth")
    assert largest_difference(first, second) < 1e-5


def test_a_stage_gives_the_numbers_of_one_process(results, tmp_path):
    train("pretrain", tmp_path / "one", "--val_fraction", 0.2, steps=4)
    timed = {"tokens_per_s", "mfu", "memory_gb", "time_s", "eta_min"}
    for one, two in zip(log_lines(tmp_path / "one")[1:], log_lines(results.folder / "two")[1:]):
        assert one.keys() == two.keys()
        for name in one.keys() - timed:
            assert one[name] == pytest.approx(two[name], rel=1e-4), name


def test_only_the_first_process_speaks_and_writes(results):
    first, second = results.outputs
    assert "Model Params" in first and "Model Params" not in second and "step 4/4" not in second


@pytest.mark.slow
def test_torchrun_from_another_folder(tmp_path):
    from train_helpers import flags

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_ports(1)[0]), str(REPO / "trainer/train_pretrain.py"), *flags("pretrain", tmp_path)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and (tmp_path / "out/pretrain_32.pth").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
def test_ctrl_c_under_torchrun_saves(tmp_path):
    """The terminal sends it to all processes, and torchrun passes it on: twice, but it is one wish."""
    import signal

    from train_helpers import flags

    from trainer import checkpoint

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_ports(1)[0]), str(REPO / "trainer/train_pretrain.py")]
    command += flags("pretrain", tmp_path, "--log_interval", 1, "--save_interval", 0, steps=100_000)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    out, _ = process.communicate(timeout=240)
    assert "To continue: torchrun --nproc_per_node 2" in out
    assert checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]["step"] >= 3


@pytest.mark.slow
def test_an_impossible_split_ends_in_one_line(tmp_path):
    from train_helpers import flags

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_ports(1)[0]), str(REPO / "trainer/train_pretrain.py"), *flags("pretrain", tmp_path)]
    done = subprocess.run(
        [*command, "--batch_size", "3"], cwd="/", capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0 and "cannot be shared by 2 processes" in done.stderr
