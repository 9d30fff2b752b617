"""Device, precision, seeds, sums, signals and the guarded optimizer step."""

import contextlib
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from train_helpers import REPO  # noqa: F401  (puts the repo on the path)

from model import precision
from model.model_minimind import MiniMindConfig, MiniMindLM
from trainer import runtime, train_pretrain

CPU = torch.device("cpu")


def started(**more):
    return runtime.start(SimpleNamespace(device="cpu", dtype="float32", seed=1, num_threads=0, **more))


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.choose_device("auto").type == "mps"
    assert runtime.choose_device("auto", world_size=2).type == "cpu", "MPS runs one process"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.choose_device("auto", world_size=2, local_rank=1) == torch.device("cuda", 1)
    assert runtime.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(runtime.TrainingError, match="lower --nproc_per_node"):
        runtime.choose_device("auto", world_size=4, local_rank=2)


@pytest.mark.parametrize("wanted", ["cuda", "mps", "tpu", "gpu0"])
def test_an_impossible_device_is_explained(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(runtime.TrainingError, match=f"--device {wanted}"):
        runtime.choose_device(wanted)


def test_auto_dtype_follows_the_hardware(monkeypatch):
    for has, device, expected in [
        (True, CPU, torch.bfloat16),
        (False, CPU, torch.float32),
        (True, torch.device("cuda"), torch.bfloat16),
        (False, torch.device("cuda"), torch.float16),
        (False, torch.device("mps"), torch.float32),
    ]:
        monkeypatch.setattr(runtime, "prefers_bfloat16", lambda device, has=has: has)
        assert runtime.choose_dtype("auto", device) == expected
    assert runtime.choose_dtype("fp32", CPU) == torch.float32
    with pytest.raises(runtime.TrainingError, match="float16 on cpu"):
        runtime.choose_dtype("float16", CPU)
    with pytest.raises(runtime.TrainingError, match="--dtype int4 is unknown"):
        runtime.choose_dtype("int4", CPU)


def test_int8_is_for_cpus_that_have_its_products_and_auto_takes_it_for_wide_models(monkeypatch):
    def machine(integers: bool, bfloat16: bool):
        for module in (precision, runtime):
            monkeypatch.setattr(module, "multiplies_integers", lambda device: integers)
            monkeypatch.setattr(module, "prefers_bfloat16", lambda device: bfloat16)

    for able, width, expected in [
        (True, 256, torch.int8),
        (True, 128, torch.float32),
        (True, 0, torch.float32),  # a script that trains no model
        (False, 512, torch.float32),
    ]:
        machine(able, bfloat16=False)
        assert runtime.choose_dtype("auto", CPU, width) == expected
        machine(able, bfloat16=True)
        assert runtime.choose_dtype("auto", CPU, width) == torch.bfloat16
    with pytest.raises(runtime.TrainingError, match="--dtype int8 needs a CPU"):
        runtime.choose_dtype("int8", CPU)
    machine(True, bfloat16=False)
    for width, expected in [(128, torch.float32), (256, torch.int8)]:
        args = train_pretrain.parse_args(["--device", "cpu", "--hidden_size", str(width)])
        assert runtime.start(args).dtype == expected


def test_draws_are_a_function_of_seed_step_and_rank():
    def draw(seed, step, rank):
        rt = runtime.Runtime(CPU, torch.float32, seed=seed, rank=rank)
        rt.seed_step(step)
        return torch.rand(4).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    others = [draw(1, 5, 0), draw(1, 5, 1), draw(1, 6, 0), draw(2, 5, 0), draw(0, 6, 0), draw(6, 0, 0)]
    assert len({tuple(other) for other in others}) == 6


def test_total_keeps_types_and_nesting():
    rt = started()
    assert runtime.total(3, rt) == 3
    assert runtime.total([1, [2.5, torch.tensor(4)]], rt) == [1, [2.5, 4]]
    assert runtime.unflatten([0, [0, 0]], iter([1, 2, 3])) == [1, [2, 3]]


def model_and_optimizer(lr=0.1):
    model = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_the_norm_is_that_before_clipping_and_the_step_is_clipped():
    rt = started()
    model, optimizer = model_and_optimizer(lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 10.0)
    norm = runtime.optimizer_step(model, [optimizer], rt, grad_clip=1.0)
    assert math.isclose(norm, 10 * math.sqrt(6), rel_tol=1e-6)
    assert math.isclose((model.weight - before).norm().item(), 1.0, rel_tol=1e-4)
    assert model.weight.grad is None


def test_grad_clip_zero_means_no_clipping():
    model, optimizer = model_and_optimizer(lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 10.0)
    runtime.optimizer_step(model, [optimizer], started(), grad_clip=0.0)
    torch.testing.assert_close(before - model.weight, torch.full((2, 3), 10.0))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_a_row_of_them_stops_the_run(poison, capsys):
    rt = started()
    rt.samples = "step 8, rows 3, 5"
    model, optimizer = model_and_optimizer()
    model.weight.grad = torch.ones(2, 3)
    runtime.optimizer_step(model, [optimizer], rt, 1.0)
    weight = model.weight.detach().clone()
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    with pytest.raises(runtime.TrainingError, match="rows 3, 5.*--learning_rate"):
        for _ in range(runtime.MAX_BAD_STEPS):
            model.weight.grad = torch.ones(2, 3)
            model.weight.grad[1, 2] = poison
            runtime.optimizer_step(model, [optimizer], rt, 1.0)
    assert model.weight.equal(weight) and optimizer.state[model.weight]["momentum_buffer"].equal(momentum)
    assert rt.skipped == runtime.MAX_BAD_STEPS
    assert "step skipped, nothing changed (1 in a row); step 8, rows 3, 5" in capsys.readouterr().out


def test_a_good_step_in_between_starts_the_count_anew():
    rt = started()
    model, optimizer = model_and_optimizer()
    for i in range(4 * runtime.MAX_BAD_STEPS):
        model.weight.grad = torch.full((2, 3), math.nan if i % 4 else 1.0)
        runtime.optimizer_step(model, [optimizer], rt, 1.0)
    assert rt.bad_steps == 3


def test_loss_scaling_is_undone_before_clipping_and_an_overflow_only_lowers_the_scale():
    """float16's GradScaler on the CPU: the arithmetic is the same as on a GPU."""
    rt = started()
    rt.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = model_and_optimizer()
    runtime.backward(model.weight.sum(), rt)
    assert model.weight.grad[0, 0] == 2.0**10
    norm = runtime.optimizer_step(model, [optimizer], rt, 0.0)
    assert math.isclose(norm, math.sqrt(6), rel_tol=1e-6)
    weight = model.weight.detach().clone()
    runtime.backward(model.weight.sum() * 1e38 * 1e3, rt)
    runtime.optimizer_step(model, [optimizer], rt, 0.0)
    assert model.weight.equal(weight) and rt.scaler.get_scale() == 2.0**9


def test_snapshot_takes_steps_back():
    rt = started()
    model, optimizer = model_and_optimizer()
    before = model.weight.detach().clone()
    undo = runtime.snapshot(model, [optimizer], rt)
    model.weight.grad = torch.ones(2, 3)
    runtime.optimizer_step(model, [optimizer], rt, 1.0)
    undo()
    assert model.weight.equal(before) and not optimizer.state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_handlers_are_given_back(number, capfd, monkeypatch):
    rt = started()
    before = signal.getsignal(number)
    runtime.catch_signals(rt)
    os.kill(os.getpid(), number)
    assert rt.stop_signal and not rt.stopping
    runtime.total(0, rt)
    assert rt.stopping
    os.kill(os.getpid(), number)  # the same Ctrl-C, passed on by torchrun
    monkeypatch.setattr(runtime, "SECOND_CTRL_C_AFTER", -1)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    runtime.release_signals(rt)
    assert signal.getsignal(number) == before
    assert "finishing this step, then saving" in capfd.readouterr().err


def test_out_of_memory_is_recognised_and_names_flags():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        assert runtime.is_out_of_memory(error)
    assert not runtime.is_out_of_memory(RuntimeError("shape mismatch"))
    advice = runtime.memory_advice(SimpleNamespace(batch_size=32, accumulation_steps=2, max_seq_len=512))
    assert "--batch_size 16 --accumulation_steps 4" in advice and "--max_seq_len (now 512)" in advice


def test_a_real_failed_allocation_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert runtime.is_out_of_memory(caught.value)


def test_without_a_compiler_the_run_goes_on_uncompiled(monkeypatch, capsys):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    model = torch.nn.Linear(2, 2)
    assert runtime.maybe_compile(model, "auto", started()) == (model, "0")
    assert "torch.compile: off (no C++ compiler found" in capsys.readouterr().out
    assert runtime.maybe_compile(model, "0", started()) == (model, "0")


@pytest.mark.parametrize("factor, expected", [(1.0, "1"), (1.3, "0"), (float("nan"), "0")])
def test_a_wrong_compiled_gradient_turns_compiling_off(factor, expected, monkeypatch, capsys):
    """`compile_blocks` is replaced by one whose blocks have `factor` times the gradient."""
    model = MiniMindLM(
        MiniMindConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, residual_init="normal")
    )

    def compile_blocks(dynamic):
        plain = type(model.model.layers[0]).forward

        def run(*args):
            x, *rest = plain(*args)
            if not torch.compiler.get_stance() == "force_eager":
                x.register_hook(lambda grad: grad * factor)
            return x, *rest

        model.model.run_block = run

    model.compile_blocks = compile_blocks
    stance = ["default"]
    monkeypatch.setattr(torch.compiler, "get_stance", lambda: stance[0], raising=False)

    @contextlib.contextmanager
    def set_stance(name):
        stance[0] = name
        yield
        stance[0] = "default"

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    monkeypatch.setattr(runtime, "why_not_compile", lambda device: None)
    ids = torch.randint(0, 50, (2, 8))
    _, chosen = runtime.maybe_compile(
        model, "auto", started(), 1e9, lambda: {"input_ids": ids, "labels": ids}
    )
    assert chosen == expected
    assert ("torch.compile: off (compiled, this torch gives loss" in capsys.readouterr().out) == (
        chosen == "0"
    )
    assert all(p.grad is None for p in model.parameters())


def test_a_short_run_is_not_compiled(capsys):
    model = torch.nn.Linear(2, 2)
    assert runtime.maybe_compile(model, "auto", started(), expected_seconds=20) == (model, "0")
    assert "torch.compile: off (a short run)" in capsys.readouterr().out


def test_threads_are_shared_under_torchrun_and_a_number_wins(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    runtime.set_threads(0, CPU)
    assert chosen == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    runtime.set_threads(0, CPU)
    runtime.set_threads(3, CPU)
    assert chosen == [2, 3]


def test_gpu_rates_are_found_by_name(monkeypatch):
    import re

    def rate(name):
        return next((tflops for pattern, tflops in runtime.GPU_TFLOPS if re.search(pattern, name)), None)

    assert rate("NVIDIA H200") == rate("NVIDIA H100 80GB HBM3") == 989
    assert rate("NVIDIA H100 PCIe") == 756
    assert rate("NVIDIA L40S") == 362 and rate("NVIDIA L4") == 121
    assert rate("NVIDIA A100-SXM4-80GB") == 312 and rate("NVIDIA GeForce RTX 3090") == 71
    assert rate("Some new card") is None


def test_the_cpu_rate_is_measured():
    assert 1e9 < runtime.peak_flops(started()) < 1e15
