"""What the tests of the training path share: small files, the flags of a tiny run, and comparing weights."""

import importlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

WORDS = (
    "sun moon red blue water stone bird tree seven three runs sleeps 天 地 水 山 学习 你好 fast slow".split()
)
TINY = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --num_key_value_heads 1".split()
MOE = "--use_moe 1 --num_experts 3 --moe_intermediate_size 32".split()


def sentence(draw, low=3, high=30):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def pretrain_file(folder, rows=80, seed=0) -> Path:
    draw = random.Random(seed)
    return write_lines(folder, "pretrain.jsonl", [{"text": sentence(draw)} for _ in range(rows)])


def sft_file(folder, rows=80, seed=0) -> Path:
    """Answers of very different lengths: micro-batches hold unequal numbers of targets."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        turns = [("user", sentence(draw, 1, 6)), ("assistant", sentence(draw, 1, draw.choice([1, 4, 12])))]
        lines.append({"conversations": [{"role": role, "content": text} for role, text in turns]})
    return write_lines(folder, "sft.jsonl", lines)


def write_lines(folder, name, rows) -> Path:
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def stage_module(stage):
    return importlib.import_module(f"trainer.train_{stage}")


def flags(stage, folder, *more, steps=6) -> list[str]:
    """The command line of a tiny float32 run whose files all lie in `folder`; later flags win."""
    folder = Path(folder)
    data = {"pretrain": pretrain_file, "full_sft": sft_file, "lora": sft_file}[stage]
    path = folder / f"{'pretrain' if stage == 'pretrain' else 'sft'}.jsonl"
    if not path.exists():
        data(folder)
    base = f"""--data_path {path} --save_dir {folder / "out"} --checkpoint_dir {folder / "checkpoints"}
        --from_weight none --max_seq_len 48 --batch_size 4 --max_steps {steps} --log_interval 2
        --save_interval 3 --val_fraction 0.05 --val_interval 4 --device cpu --dtype float32 --use_compile 0
        --num_workers 1 --num_threads 1""".split()
    argv = [*base, *TINY, *map(str, more)]
    if stage == "lora":
        argv[argv.index("--from_weight") + 1] = "full_sft"
        base_file(stage_module(stage).parse_args(argv))
    return argv


def base_file(args) -> Path:
    """The weights that --from_weight names, if they are not there: random ones, none of them zero (a fresh
    model's residual projections are, and then no gradient reaches an adapter before them)."""
    import torch

    from model.model_minimind import MiniMindLM
    from trainer import checkpoint, cli

    config = cli.model_config(args)
    path = checkpoint.weight_path(args, config, args.from_weight)
    if args.from_weight != "none" and not path.exists():
        config.residual_init = "normal"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MiniMindLM(config)
        checkpoint.save_weights(model, path, {"stage": args.from_weight, "step": 2})
    return path


def train(stage, folder, *more, steps=6, curve=False):
    """Run a stage in this process, as its script would; the picture at the end takes as long as the rest."""
    from trainer import cli, progress

    module = stage_module(stage)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            if not curve:
                patch.setattr(progress, "draw_curve", lambda log, picture: False)
            cli.run(module.main, module.parse_args, flags(stage, folder, *more, steps=steps))
    finally:  # a run that fails ends its process, so it leaves its handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(folder, name="pretrain_32.pth") -> dict:
    from trainer import checkpoint

    return checkpoint.read_weights(Path(folder) / "out" / name)[0]


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def assert_bit_equal(first: dict, second: dict):
    assert first.keys() == second.keys()
    different = [name for name in first if not first[name].equal(second[name])]
    assert not different, different


def log_lines(folder, name="pretrain") -> list[dict]:
    text = (Path(folder) / "out" / f"{name}_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def stop_after(monkeypatch, steps: int):
    """Ask the run to stop as Ctrl-C does, in the middle of its `steps`-th optimizer step from now."""
    from trainer import runtime

    original, calls = runtime.optimizer_step, []

    def step_and_stop(model, optimizers, rt, grad_clip):
        calls.append(1)
        if len(calls) == steps:
            rt.stop_signal = "test"
        return original(model, optimizers, rt, grad_clip)

    monkeypatch.setattr(runtime, "optimizer_step", step_and_stop)


def start_two(module: str, top, num_runs: int, before: str = ""):
    """`module.be_a_process(top, rank, ports)` in two processes, with a port for each run; before: code that
    they run first. Fails with what they printed."""
    from test_distributed import free_ports

    code = f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import {module}\n{before}\n"
    code += f"{module}.be_a_process(*sys.argv[1:])"
    command, ports = [sys.executable, "-c", code, str(top)], json.dumps(free_ports(num_runs))
    processes = [
        subprocess.Popen([*command, rank, ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
