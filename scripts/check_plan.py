"""Does `--plan` say what a run then needs? Plan and run of some settings, in processes of their own.

    python scripts/check_plan.py                                    # the settings below, about 20 minutes
    python scripts/check_plan.py --settings "train_pretrain.py --preset tiny --batch_size 64 --max_steps 80"

For each setting: first the plan, then the same command without --plan. Time is wall-clock from start to exit,
memory the largest resident set, as the kernel counts both (on CUDA: what the log calls memory_gb). The table
shows predicted, measured and measured / predicted; the exit status is 1 when one of them is off by more than
--tolerance. Settings share a folder: the first one writes the weights (pretrain_512.pth, full_sft_512.pth)
that the others begin with, unless they say something else. Nothing else should compute meanwhile.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench
from trainer import cli

SETTINGS = [
    "train_pretrain.py --save_weight full_sft --max_steps 15 --batch_size 16",
    "train_pretrain.py --preset tiny --max_steps 50 --val_interval 20 --save_interval 10",
    "train_pretrain.py --max_steps 6 --batch_size 8 --accumulation_steps 4 --max_seq_len 512",
    "train_pretrain.py --preset minimind-3-moe --batch_size 2 --max_steps 12",
    "train_full_sft.py --from_weight full_sft --save_weight packed --max_steps 12 --batch_size 8",
    "train_full_sft.py --from_weight full_sft --save_weight padded --pack 0 --max_steps 12 --batch_size 8",
    "train_lora.py --max_steps 60",
    "train_dpo.py --max_steps 20 --batch_size 8",
    "train_distillation.py --teacher_hidden_size 512 --hidden_size 256 --from_weight none --max_steps 30",
    "train_grpo.py --max_steps 6 --batch_size 4 --max_gen_len 64 --val_prompts 16 --reward language:1",
    "train_ppo.py --max_steps 6 --batch_size 16 --max_gen_len 64 --val_prompts 16 --reward language:1",
]
PLANNED = {
    "memory": re.compile(r"^memory: +([\d.]+) GB", re.M),
    "time": re.compile(r"^time: +([\d.]+) s", re.M),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="COMMAND",
        help="a script in trainer/ and its flags, in one word each",
    )
    parser.add_argument(
        "--work_dir", type=Path, metavar="DIR", help="folder for their files; without it a new one"
    )
    parser.add_argument("--tolerance", type=cli.positive_float, default=0.15, metavar="X", help="share")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix="check_plan-"))
    return args


def compare(setting: str, number: int, folder: Path) -> dict:
    """{"memory": (predicted, measured), "time": ...} of one setting, in GB and seconds."""
    script, *flags = shlex.split(setting)
    command = [sys.executable, ROOT / "trainer" / script, *flags, "--save_dir", folder / "out"]
    command += ["--checkpoint_dir", folder / "checkpoints"]
    bench.run_process([*command, "--plan"], log=folder / f"{number}_plan.txt")
    plan = (folder / f"{number}_plan.txt").read_text(encoding="utf-8")
    predicted = {}
    for name, pattern in PLANNED.items():
        found = pattern.search(plan)
        if found is None:
            raise bench.BenchError(f"{folder / f'{number}_plan.txt'}: the plan says nothing about {name}")
        predicted[name] = float(found[1])
    run = bench.run_process(command, log=folder / f"{number}_run.txt")
    logs = sorted(folder.glob("out/*_log.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in logs[-1].read_text(encoding="utf-8").splitlines()]
    of_tensors = (
        "cuda" in (folder / f"{number}_run.txt").read_text(encoding="utf-8").partition("machine: ")[2][:6]
    )
    told = max((line["memory_gb"] for line in lines if "memory_gb" in line), default=0.0)
    measured = told if of_tensors or not run["rss_bytes"] else run["rss_bytes"] / 1e9
    return {"memory": (predicted["memory"], measured), "time": (predicted["time"], run["wall_seconds"])}


def main(args):
    folder, off = args.work_dir, 0
    folder.mkdir(parents=True, exist_ok=True)
    bench.say(f"files: {folder}")
    bench.say("| setting | GB predicted | measured | ratio | s predicted | measured | ratio |")
    bench.say("|---|---|---|---|---|---|---|")
    for number, setting in enumerate(args.settings or SETTINGS):
        found = compare(setting, number, folder)
        ratios = {name: measured / predicted for name, (predicted, measured) in found.items()}
        off += sum(abs(ratio - 1) > args.tolerance for ratio in ratios.values())
        cells = [f"{p:.2f} | {m:.2f} | {m / p:.2f}" for p, m in (found["memory"],)]
        cells += [f"{p:.1f} | {m:.1f} | {m / p:.2f}" for p, m in (found["time"],)]
        bench.say(f"| {setting} | {' | '.join(cells)} |")
    if off:
        bench.say(f"{off} predictions are off by more than {args.tolerance:.0%}")
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, parse_args)
