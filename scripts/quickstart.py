"""Train a small bilingual model on this computer's CPU, from nothing, and see what every stage gained.

    python scripts/quickstart.py                 # curriculum -> pretraining -> fine-tuning -> a conversation
    python scripts/quickstart.py --seeds 42,43,44    # three runs: mean and spread of every number
    python scripts/quickstart.py --out_dir my_try --seed 7

Needs only Python 3.10+; packages go to .venv in the repo unless the running environment has them. Every stage
is the ordinary command that you could type yourself (it is printed), so nothing here is special to the
demonstration.

Writes, below out/quickstart: the weights, one log and curve per stage, ledger.json and report.md (the gain
ledger).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bootstrap

# ------------------------------------------------------------------------------------------------------------
# The stages. A later stage adds an entry: its command, and which held-out metrics show what it did.
# ------------------------------------------------------------------------------------------------------------

HIDDEN = 256
SAMPLE = ["--items", "60"]  # of each exam, for models that cannot answer yet and would talk on and on
PRETRAIN_MINUTES, SFT_MINUTES = "5", "1.55"  # by the clock: a faster machine reads more and knows more
COMMON = "--preset tiny --max_seq_len 256 --batch_size 8 --device cpu".split()
# Half the stage's own rates: so short a fine-tuning gains nothing from more, and forgets less at these.
SFT_RATES = "--learning_rate 5e-4 --muon_lr 2.5e-3".split()


@dataclass
class Stage:
    name: str  # weight name: out/<name>_256.pth
    title: str
    script: str
    data: str  # file of the curriculum
    flags: list[str] = field(default_factory=list)
    compared_with: str = ""  # weight name whose metrics are the "before"; "" = the untrained model
    shows: list[str] = field(default_factory=list)  # metrics of scripts/eval_mini.py that make its rows


STAGES = [
    Stage(
        "pretrain",
        "pretraining: read the world",
        "trainer/train_pretrain.py",
        "pretrain.jsonl",
        ["--max_minutes", PRETRAIN_MINUTES],
        shows=["bits_per_byte"],
    ),
    Stage(
        "full_sft",
        "fine-tuning: learn to answer",
        "trainer/train_full_sft.py",
        "sft.jsonl",
        ["--max_minutes", SFT_MINUTES, *SFT_RATES],
        compared_with="pretrain",
        shows=["facts_asked", "facts_unasked", "sums", "chat", "ended"],
    ),
    Stage(
        "sft_only",
        "the same fine-tuning without pretraining (control)",
        "trainer/train_full_sft.py",
        "sft.jsonl",
        ["--max_minutes", SFT_MINUTES, *SFT_RATES, "--from_weight", "none", "--save_weight", "sft_only"],
        shows=["facts_asked", "facts_unasked", "sums", "chat", "ended"],
    ),
]

NAMES = {
    "bits_per_byte": "bits per byte of unseen text (lower is better)",
    "facts_asked": "facts asked in fine-tuning, in unseen words",
    "facts_unasked": "facts only read in pretraining, never asked",
    "sums": "one- and two-digit sums, unseen operands",
    "chat": "small talk",
    "ended": "answers that end by themselves",
}


# ------------------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------------------


def run_script(*command: str):
    """Run one of the project's scripts, its output below a line that shows the command. SystemExit if it
    fails."""
    shown = " ".join(str(c) for c in command)
    print(f"\n$ python {shown}", flush=True)
    child = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=ROOT)
    interrupted = False
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # the child got it too: let it finish its step and save
            interrupted = True
    if interrupted:
        raise SystemExit(130)
    if code:
        raise SystemExit(f"stopped: python {shown} ended with code {code}")


def relative(path: Path) -> str:
    """As a user would type it from the repo's root."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def examine(weight: Path, data_dir: Path, json_path: Path, *flags: str) -> dict:
    files = ["--weight", str(weight), "--data_dir", str(data_dir), "--json", str(json_path)]
    run_script("scripts/eval_mini.py", *files, *flags)
    return json.loads(json_path.read_text(encoding="utf-8"))


def last_of_log(path: Path) -> dict:
    """The newest value of every key in a stage's JSONL log."""
    merged: dict = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        merged |= json.loads(line)
    return merged


def run_once(out: Path, seed: int) -> dict:
    """Curriculum and all stages with one seed; returns the ledger."""
    started = time.time()
    data_dir = out / "data"
    out.mkdir(parents=True, exist_ok=True)
    run_script("dataset/make_mini.py", "--out_dir", str(data_dir), "--seed", str(seed))
    results: dict[str, dict] = {}
    ledger = {"seed": seed, "machine": machine(), "rows": [], "stages": {}}
    compiling = []  # the first stage finds out whether torch.compile works here, and the others do as it did
    for stage in STAGES:
        begin = time.time()
        run_script(
            stage.script,
            *COMMON,
            *compiling,
            *("--val_interval", "0", "--save_interval", "0"),
            *stage.flags,
            *("--data_path", relative(data_dir / stage.data), "--seed", str(seed)),
            *("--save_dir", relative(out), "--checkpoint_dir", relative(out / "checkpoints")),
        )
        seconds = time.time() - begin
        log = last_of_log(out / f"{stage.name}_log.jsonl")
        compiling = ["--use_compile", log["args"]["use_compile"]]
        ledger["stages"][stage.name] = {
            "title": stage.title,
            "seconds": round(seconds, 1),
            "tokens": log.get("tokens"),
            "tokens_per_s": log.get("tokens_per_s"),
            "peak_memory_gb": log.get("memory_gb"),
        }
        weight = out / f"{stage.name}_{HIDDEN}.pth"
        if not results:
            results[""] = examine(weight, data_dir, out / "untrained_eval.json", "--untrained", *SAMPLE)
        sample = SAMPLE if stage.name == "pretrain" else []
        results[stage.name] = examine(weight, data_dir, out / f"{stage.name}_eval.json", *sample)
        for metric in stage.shows:
            ledger["rows"].append(
                {
                    "stage": stage.name,
                    "metric": metric,
                    "before": results[stage.compared_with]["metrics"][metric],
                    "after": results[stage.name]["metrics"][metric],
                    "items": results[stage.name]["items"].get(metric),
                }
            )
    ledger["gain_of_pretraining"] = {
        metric: results["full_sft"]["metrics"][metric] - results["sft_only"]["metrics"][metric]
        for metric in ("facts_asked", "facts_unasked", "sums")
    }
    ledger["conversations"] = results["full_sft"]["conversations"]
    ledger["seconds"] = round(time.time() - started, 1)
    return ledger


def machine() -> dict:
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------


def show(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "bits_per_byte" else f"{100 * value:.1f} %"


def spread(values: list[float], metric: str) -> str:
    """mean, and +- the sample standard deviation when there are several."""
    text = show(metric, statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {show(metric, statistics.stdev(values))}"


def report(ledgers: list[dict]) -> str:
    """The gain ledger as Markdown, from one run or several."""
    first = ledgers[0]
    lines = ["# What every stage gained", ""]
    seeds = ", ".join(str(ledger["seed"]) for ledger in ledgers)
    where, seconds = first["machine"], statistics.mean(ledger["seconds"] for ledger in ledgers)
    lines += [f"Seeds: {seeds}. {where['system']}, {where['threads']} threads, torch {where['torch']}."]
    lines += [f"Total: {seconds:.0f} s a run.", ""]
    lines += ["| stage | held-out metric | before | after | items |", "|---|---|---:|---:|---:|"]
    for i, row in enumerate(first["rows"]):
        before = spread([ledger["rows"][i]["before"] for ledger in ledgers], row["metric"])
        after = spread([ledger["rows"][i]["after"] for ledger in ledgers], row["metric"])
        what = NAMES[row["metric"]]
        lines.append(f"| {row['stage']} | {what} | {before} | **{after}** | {row['items'] or ''} |")
    lines += ["", "What pretraining adds to the same fine-tuning (points):", ""]
    for metric in first["gain_of_pretraining"]:
        gain = spread([ledger["gain_of_pretraining"][metric] for ledger in ledgers], metric).replace(" %", "")
        lines.append(f"- {NAMES[metric]}: +{gain}".replace("+-", "-"))
    lines += ["", "| stage | seconds | tokens | tokens/s | peak memory |", "|---|---:|---:|---:|---:|"]
    for name, s in first["stages"].items():
        cells = [f"{name}: {s['title']}", f"{s['seconds']:.0f}", f"{s['tokens'] or 0:,}"]
        memory = "unknown" if s["peak_memory_gb"] is None else f"{s['peak_memory_gb']:.1f} GB"
        cells += [f"{s['tokens_per_s'] or 0:,.0f}", memory]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## A conversation with the model", ""]
    for messages in first["conversations"].values():
        for message in messages:
            who = "you" if message["role"] == "user" else "**MiniMind**"
            lines.append(f"- {who}: {message['content']}")
        lines.append("")
    lines += ["## Curves", ""]
    folder = "" if len(ledgers) == 1 else f"seed{first['seed']}/"
    lines += [f"![{name}]({folder}{name}_curve.png)" for name in first["stages"]]
    return "\n".join(lines) + "\n"


def write_json(path: Path, content):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv=None):
    keep_layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_layout)
    parser.add_argument("--seed", type=int, default=42, help="of curriculum and training (default: 42)")
    parser.add_argument(
        "--seeds", metavar="A,B,C", type=integers, help="several runs: mean and spread of all"
    )
    default = ROOT / "out" / "quickstart"
    parser.add_argument("--out_dir", type=Path, default=default, help="(default: out/quickstart)")
    return parser.parse_args(argv)


def main(args):
    bootstrap.ensure("requirements.txt")
    out = args.out_dir.resolve()
    seeds = args.seeds or [args.seed]
    ledgers = []
    for seed in seeds:
        folder = out if len(seeds) == 1 else out / f"seed{seed}"
        ledger = run_once(folder, seed)
        write_json(folder / "ledger.json", ledger)
        (folder / "report.md").write_text(report([ledger]), encoding="utf-8")
        ledgers.append(ledger)
    text = report(ledgers)
    if len(seeds) > 1:
        (out / "report.md").write_text(text, encoding="utf-8")
        write_json(out / "ledger.json", ledgers)
    print("\n" + text.split("## Curves")[0])
    where = relative(out)
    print(f"The ledger: {where}/report.md, {where}/ledger.json; curves and weights beside them.")
    print("Next, talk to it yourself, then train on your own text:")
    print(f"  python eval_llm.py --weight full_sft --save_dir {relative(folder)} --hidden_size {HIDDEN}")
    print("  python trainer/train_pretrain.py --data_path my_text.jsonl --max_minutes 60")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
