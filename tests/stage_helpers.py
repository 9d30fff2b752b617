"""What the tests of the later stages share: their files, weights to begin with, and tiny runs."""

import random
import signal
from pathlib import Path

import pytest
from data_helpers import assistant, user
from preference_helpers import TIMED, easy_pairs, small_model
from train_helpers import TINY, log_lines, sentence, stage_module, write_lines

SAVED = {  # stage -> name of its files
    "lora": "lora/lora_identity",
    "reason": "reason",
    "dpo": "dpo",
    "distillation": "full_dist",
    "reward": "reward",
}
MIXTURE = dict(use_moe=True, num_experts=3, moe_intermediate_size=32)  # the fields of train_helpers.MOE


def with_thoughts(answer: str, thoughts: str, layout: str) -> dict:
    """An assistant's message with thoughts, in one of the two layouts that files use."""
    if layout == "beside":
        return assistant(answer, reasoning_content=thoughts)
    return assistant(f"<think>\n{thoughts}\n</think>\n\n{answer}")


def reason_rows(rows=40, seed=0) -> list[dict]:
    """Answers with thoughts in both layouts, with and without <answer>, and answers without thoughts."""
    draw, found = random.Random(seed), []
    for number in range(rows):
        question = user(f"{sentence(draw, 1, 6)} <answer> {number}")  # a tag in a question has no weight
        text, thoughts = sentence(draw, 1, 4), sentence(draw, 1, draw.choice([1, 5]))
        tagged = f"<answer>\n{text}\n</answer>" if number % 2 else text
        layout = draw.choice(["beside", "inside", None])
        answer = with_thoughts(tagged, thoughts, layout) if layout else assistant(text)
        found.append({"conversations": [question, answer]})
    return found


def chat_rows(rows=40, seed=0) -> list[dict]:
    """Answers of very different lengths: micro-batches hold unequal numbers of targets."""
    draw = random.Random(seed)
    return [
        {
            "conversations": [
                user(f"{sentence(draw, 1, 6)} {number}"),
                assistant(sentence(draw, 1, draw.choice([1, 4, 12]))),
            ]
        }
        for number in range(rows)
    ]


ROWS = {
    "lora": chat_rows,
    "reason": reason_rows,
    "dpo": easy_pairs,
    "distillation": chat_rows,
    "reward": easy_pairs,
}


def base_weights(folder, name="full_sft", seed=None, **more) -> Path:
    """The weights a run starts from, or a teacher's, without the time that training them takes."""
    import torch

    from trainer import checkpoint

    model = small_model(**({"initializer_range": 0.05} | more))
    if seed is not None:
        torch.manual_seed(seed)
        model.apply(model._init_weights)
    config = model.config
    path = Path(folder) / "out" / f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"
    checkpoint.save_weights(model, path, {"stage": name})
    return path


def flags(stage, folder, *more, steps=6) -> list[str]:
    """The command line of a tiny float32 run whose files all lie in `folder`; later flags win."""
    folder = Path(folder)
    if not (folder / "data.jsonl").exists():
        write_lines(folder, "data.jsonl", ROWS[stage]())
    moe = "--use_moe" in more
    if not (folder / f"out/full_sft_32{'_moe' if moe else ''}.pth").exists():
        base_weights(folder, **(MIXTURE if moe else {}))
    base = f"""--data_path {folder / "data.jsonl"} --save_dir {folder / "out"} --max_seq_len 64 --batch_size 4
        --checkpoint_dir {folder / "checkpoints"} --max_steps {steps} --log_interval 2 --save_interval 3
        --val_interval 4 --learning_rate 1e-3 --muon_lr 5e-3 --device cpu --dtype float32 --use_compile 0
        --num_workers 1 --num_threads 1""".split()
    if stage == "distillation" and "--from_teacher_weight" not in more:
        if not list((folder / "out").glob("teacher_*.pth")):
            base_weights(folder, "teacher", seed=1, initializer_range=0.2)
        base += "--from_teacher_weight teacher --teacher_hidden_size 32".split()
    held_out = [] if "--val_path" in more else ["--val_fraction", "0.2"]
    return [*base, *TINY, *held_out, *map(str, more)]


def train(stage, folder, *more, steps=6):
    """Run a stage in this process, as its script would, without what would take most of its time: the
    picture at the end, and timing the machine for what "mfu" divides by."""
    run_here(stage, flags(stage, folder, *more, steps=steps))


def run_here(stage, argv):
    """A stage with this command line, in this process."""
    from trainer import cli, progress, runtime

    module = stage_module(stage)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress, "draw_curve", lambda log, picture: False)
            patch.setattr(runtime, "peak_flops", lambda rt: 1e11)
            cli.run(module.main, module.parse_args, argv)
    finally:  # a run that fails ends its process, so it leaves its handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def lines(folder, stage) -> list[dict]:
    """The log without events and times."""
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in log_lines(folder, Path(SAVED[stage]).name)
        if "event" not in line
    ]


def validations(folder, stage) -> list[dict]:
    return [line for line in lines(folder, stage) if "val_loss" in line]


def steps_of(folder, stage) -> list[dict]:
    return [line for line in lines(folder, stage) if "lr" in line]


def plain_descent(patch, rate):
    """Weights then tell the gradients; AdamW would make a full step of a rounding error."""
    import torch

    from trainer import cli

    def build_optimizers(model, args, rt):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        optimizer.param_groups[0]["base_lr"] = rate
        return [optimizer]

    patch.setattr(cli, "build_optimizers", build_optimizers)


ONE_STEP = ["--val_fraction", 0, "--schedule", "constant", "--warmup_steps", 0, "--grad_clip", 0]


def refused(capsys, pattern, run, *inputs, **settings) -> str:
    """`run` ends with exit code 2 and one line of the errors that a user can mend; returns it."""
    import re

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*inputs, **settings)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.strip()]
    assert end.value.code == 2 and len(errors) == 1, captured.err
    assert re.search(pattern, errors[0]) and "Traceback" not in captured.err, errors[0]
    return errors[0]
