"""Curves of reinforcement learning from the logs of one run or several: reward, held-out success, KL, length.

    python scripts/plot_rl.py out/quickstart --out docs/rl_curves.png
    python scripts/plot_rl.py out/quickstart/seed42 out/quickstart/seed43 --stages grpo,spo

Each folder is a seed. Lines are means over the folders, the shade reaches from the lowest to the highest. A
reward that rises while success does not is the picture of reward hacking.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGES = ("grpo", "cispo", "spo", "ppo_actor", "agent")
PANELS = {  # figure of the log -> title
    "reward": "reward of the samples",
    "val_pass1": "held-out success, likeliest answer",
    "val_kl": "KL to the start, nats per token",
    "length": "tokens per answer",
}


def curve(folders, stage: str, figure: str) -> tuple[list, list, list, list]:
    """(steps, mean, lowest, highest) over the folders that have this stage's log."""
    from trainer.progress import read_log

    seen: dict[int, list[float]] = {}
    for folder in folders:
        for line in read_log(folder / f"{stage}_log.jsonl"):
            if isinstance(line.get(figure), int | float):
                seen.setdefault(line["step"], []).append(line[figure])
    steps = sorted(seen)
    values = [seen[step] for step in steps]
    return steps, [statistics.mean(v) for v in values], list(map(min, values)), list(map(max, values))


def draw(folders, stages, picture: Path):
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for stage in stages:
            steps, mean, low, high = curve(folders, stage, name)
            if steps:
                axes.plot(steps, mean, label=stage, linewidth=1.2, marker="o" if len(steps) < 12 else None)
                axes.fill_between(steps, low, high, alpha=0.15)
        axes.set(title=title, xlabel="step (one rollout and its updates)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(picture, format="png", dpi=110)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders with logs, or one with seed* in it")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("rl_curves.png"), help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    folders = [seed for f in args.folders for seed in (sorted(f.glob("seed*")) or [f])]
    stages = [s for s in args.stages.split(",") if any((f / f"{s}_log.jsonl").exists() for f in folders)]
    if not stages:
        raise SystemExit(
            f"no log of {args.stages} in {chr(44).join(map(str, folders))}: run quickstart.py --stages rl"
        )
    draw(folders, stages, args.out)
    print(f"{args.out}: {', '.join(stages)} of {len(folders)} run{'s' * (len(folders) > 1)}")


if __name__ == "__main__":
    main(parse_args())
