"""What the tests of preference learning share: files of pairs, a small model, tiny runs of the DPO stage."""

import random
import signal
from pathlib import Path

import pytest
from data_helpers import assistant, user
from train_helpers import TINY, log_lines, sentence, write_lines

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
TIMED = {"tokens_per_s", "mfu", "memory_gb", "time_s", "eta_min"}  # what depends on the clock


def pair(question, chosen, rejected):
    """A row. Texts become one turn; lists of messages are the prompt, dicts the answers."""
    prompt = [user(question)] if isinstance(question, str) else question
    chosen, rejected = (assistant(a) if isinstance(a, str) else a for a in (chosen, rejected))
    return {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}


def easy_pairs(rows=40, seed=0) -> list[dict]:
    """The first word tells good from bad; behind it stand as many words as it happens."""
    draw = random.Random(seed)
    ends = [[f" {sentence(draw, 1, draw.choice([1, 3, 8]))}" for _ in "wl"] for _ in range(rows)]
    return [
        pair(f"{sentence(draw, 1, 6)} {number}", f"yes{good}", f"no{bad}")
        for number, (good, bad) in enumerate(ends)
    ]


def dpo_file(folder, rows=None, name="dpo.jsonl") -> Path:
    return write_lines(folder, name, easy_pairs() if rows is None else rows)


def small_model(**more):
    """Weights so large that every token of the context matters: what leaks between sequences is seen."""
    import torch

    from model.model_minimind import MiniMindConfig, MiniMindLM

    torch.manual_seed(0)
    return MiniMindLM(MiniMindConfig(**(SHAPE | dict(residual_init="normal", initializer_range=0.2) | more)))


def base_weights(folder, **more):
    """The weights a run starts from, out/full_sft_32.pth, without the time that training them takes."""
    from trainer import checkpoint

    model = small_model(initializer_range=0.05, **more)
    path = Path(folder) / "out" / f"full_sft_32{'_moe' if model.config.use_moe else ''}.pth"
    checkpoint.save_weights(model, path, {"stage": "full_sft"})
    return path


def flags(folder, *more, steps=6) -> list[str]:
    """The command line of a tiny float32 DPO run whose files all lie in `folder`; later flags win."""
    folder = Path(folder)
    if not (folder / "dpo.jsonl").exists():
        dpo_file(folder)
    if not list((folder / "out").glob("full_sft_32*.pth")):
        base_weights(folder)
    base = f"""--data_path {folder / "dpo.jsonl"} --save_dir {folder / "out"} --max_seq_len 64 --batch_size 4
        --checkpoint_dir {folder / "checkpoints"} --max_steps {steps} --log_interval 2 --save_interval 3
        --val_interval 4 --learning_rate 1e-3 --device cpu --dtype float32 --use_compile 0
        --num_threads 1""".split()
    held_out = [] if "--val_path" in more else ["--val_fraction", "0.2"]
    return [*base, *TINY, *held_out, *map(str, more)]


def train(folder, *more, steps=6):
    """Run the stage in this process, as its script would, without what would take most of its time: the
    picture at the end, and timing the machine for what "mfu" divides by."""
    from trainer import cli, progress, runtime, train_dpo

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress, "draw_curve", lambda log, picture: False)
            patch.setattr(runtime, "peak_flops", lambda rt: 1e11)
            cli.run(train_dpo.main, train_dpo.parse_args, flags(folder, *more, steps=steps))
    finally:  # a run that fails ends its process, so it leaves its handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def lines(folder, name="dpo") -> list[dict]:
    """The log without events and times."""
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in log_lines(folder, name)
        if "event" not in line
    ]


def validations(folder) -> list[dict]:
    return [line for line in lines(folder) if "val_loss" in line]
