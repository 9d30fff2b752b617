"""Train a small bilingual model on this computer's CPU, from nothing, and see what every stage gained.

    python scripts/quickstart.py                   # curriculum, pretraining, fine-tuning, a conversation
    python scripts/quickstart.py --stages all      # and what else a model can be taught: LoRA, reasoning, ...
    python scripts/quickstart.py --stages more     # only those, on the weights that an earlier run left
    python scripts/quickstart.py --stages rl       # of those only reinforcement learning
    python scripts/quickstart.py --seeds 42,43,44  # three runs: mean and spread of every number
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


# A pretrained student with 300 conversations, both times in the same steps; the rates are fine-tuning's own.
STUDENT = (
    "--from_weight pretrain --teacher_hidden_size 256 --batch_size 4 --max_steps 120 --learning_rate 1e-3 "
    "--muon_lr 5e-3 --temperature 3"
).split()


# Reinforcement learning: 256 answers in a step (the agent 192), four updates from them.
RL = ["--warmup_steps", "5"]
PROBLEMS = "--max_gen_len 64 --mini_batch_size 64 --learning_rate 3e-5".split()
GROUPS = "--batch_size 32 --num_generations 8 --dynamic_sampling 2 --max_steps 60 --val_interval 20"
SINGLE = "--batch_size 256 --max_steps 45 --val_interval 15"
TOOL_USE = "--max_seq_len 448 --max_gen_len 96 --max_total_len 900 --max_steps 14 --val_interval 7".split()


@dataclass
class Stage:
    name: str  # weight name: out/<name>_256.pth
    title: str
    script: str
    data: str  # file of the curriculum
    flags: list[str] = field(default_factory=list)
    compared_with: str = ""  # weight name whose metrics are the "before"; "" = the untrained model
    shows: list[str] = field(default_factory=list)  # metrics of scripts/eval_mini.py that make its rows
    costs: list[str] = field(default_factory=list)  # metrics of earlier stages: the alignment tax
    logged: list[str] = field(default_factory=list)  # held-out metrics of its own log, before and after
    heldout: str = ""  # file of the curriculum that its own log measures
    adapter: bool = False  # it writes lora/<name>_256.pth, to be added to what it is compared with
    more: bool = False  # only with --stages all or more
    rl: bool = False  # and with --stages rl


def on_problems(name: str, title: str, script: str, flags: str) -> Stage:
    """A stage of reinforcement learning on prompts whose answers can be checked."""
    return Stage(
        name,
        title,
        script,
        "rlaif.jsonl",
        [*RL, *PROBLEMS, *flags.split()],
        compared_with="full_sft",
        shows=["problems"],
        costs=["facts_asked", "sums"],
        heldout="rlaif_heldout.jsonl",
        more=True,
        rl=True,
    )


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
        ["--max_minutes", SFT_MINUTES, *SFT_RATES, "--from_weight", "none"],
        shows=["facts_asked", "facts_unasked", "sums", "chat", "ended"],
    ),
    Stage(
        "lora_identity",
        "LoRA: another name, the base untouched",
        "trainer/train_lora.py",
        "lora_identity.jsonl",
        "--epochs 3 --batch_size 2".split(),
        compared_with="full_sft",
        shows=["identity"],
        costs=["facts_asked", "sums"],
        heldout="lora_identity_heldout.jsonl",
        adapter=True,
        more=True,
    ),
    Stage(
        "reason",
        "reasoning: think first, when asked to",
        "trainer/train_reason.py",
        "reason.jsonl",
        "--epochs 1 --batch_size 4 --from_weight full_sft".split(),
        compared_with="full_sft",
        shows=["reason", "well_formed"],
        costs=["facts_asked", "sums"],
        heldout="reason_heldout.jsonl",
        more=True,
    ),
    Stage(
        "dpo",
        "preferences: polite and right rather than rude or wrong",
        "trainer/train_dpo.py",
        "dpo.jsonl",
        "--max_steps 120".split(),
        compared_with="full_sft",
        costs=["facts_asked", "sums"],
        logged=["val_accuracy", "val_margin", "val_logp_chosen"],
        heldout="dpo_heldout.jsonl",
        more=True,
    ),
    Stage(
        "reward",
        "reward model: a number for every answer",
        "trainer/train_reward.py",
        "dpo.jsonl",
        "--epochs 1".split(),
        logged=["val_accuracy", "val_calibration_error"],
        heldout="dpo_heldout.jsonl",
        more=True,
    ),
    Stage(
        "student_alone",
        "a pretrained model and only 300 conversations (control)",
        "trainer/train_distillation.py",
        "distill.jsonl",
        [*STUDENT, "--alpha", "1"],
        compared_with="pretrain",
        shows=["facts_asked", "sums"],
        costs=["bits_per_byte"],
        heldout="sft_heldout.jsonl",
        more=True,
    ),
    Stage(
        "student",
        "distillation: the same, taught by the fine-tuned model",
        "trainer/train_distillation.py",
        "distill.jsonl",
        [*STUDENT, "--alpha", "0"],
        compared_with="student_alone",
        shows=["facts_asked", "sums"],
        costs=["bits_per_byte"],
        logged=["val_agreement"],
        heldout="sft_heldout.jsonl",
        more=True,
    ),
    on_problems(
        "grpo",
        "GRPO: eight answers to a question, what is better than their average is reinforced",
        "trainer/train_grpo.py",
        GROUPS,
    ),
    on_problems(
        "cispo",
        "the same with the loss of CISPO",
        "trainer/train_grpo.py",
        f"{GROUPS} --loss_type cispo",
    ),
    on_problems(
        "spo",
        "SPO: one answer to each of many questions, compared with the question's past",
        "trainer/train_spo.py",
        SINGLE,
    ),
    on_problems(
        "ppo_actor",
        "PPO: an actor, and a critic that judges every token",
        "trainer/train_ppo.py",
        f"{SINGLE} --critic_learning_rate 3e-4 --critic_warmup 5 --update_iters 1 --kl_coef 0",
    ),
    Stage(
        "tools",
        "fine-tuning on tool use of mixed quality",
        "trainer/train_full_sft.py",
        "sft_tools.jsonl",
        [*SFT_RATES, *"--max_seq_len 512 --batch_size 4 --epochs 1 --from_weight full_sft".split()],
        compared_with="full_sft",
        shows=["tools", "tools_one"],
        costs=["facts_asked", "sums"],
        more=True,
        rl=True,
    ),
    Stage(
        "agent",
        "agent: calls tools, is paid for the result",
        "trainer/train_agent.py",
        "agent_rl.jsonl",
        [*RL, *TOOL_USE, *"--from_weight tools --loss_type grpo --batch_size 24 --num_generations 8".split()]
        + "--mini_batch_size 48 --learning_rate 3e-5 --val_prompts 100 --pass_k 0".split(),
        compared_with="tools",
        shows=["tools", "tools_one"],
        costs=["facts_asked", "sums"],
        heldout="agent_heldout.jsonl",
        more=True,
        rl=True,
    ),
]

NAMES = {
    "bits_per_byte": "bits per byte of unseen text (lower is better)",
    "facts_asked": "facts asked in fine-tuning, in unseen words",
    "facts_unasked": "facts only read in pretraining, never asked",
    "sums": "one- and two-digit sums, unseen operands",
    "chat": "small talk",
    "ended": "answers that end by themselves",
    "identity": "says who it is now, in unseen words",
    "reason_direct": "sums of three numbers and word problems, answered at once",
    "reason": "sums of three numbers and word problems, thinking first (before: answered at once)",
    "well_formed": "thoughts that end, with an answer behind them",
    "problems": "verified answers to unseen problems (differences, comparisons, ...)",
    "tools": "two-step tool tasks with unseen arguments, right at the end",
    "tools_one": "one-step tool tasks with unseen arguments",
    "val_accuracy": "unseen pairs: the better answer is preferred",
    "val_margin": "unseen pairs: margin between the two rewards",
    "val_logp_chosen": "unseen pairs: log-probability of the better answer, per token",
    "val_calibration_error": "unseen pairs: calibration error",
    "val_agreement": "likeliest token is the teacher's, unseen answers",
}
PLAIN = ("bits_per_byte", "val_margin", "val_logp_chosen")  # numbers, not shares
METRIC_EXAM = {
    "well_formed": "reason",
    "ended": "chat",
    "tools_one": "tools",
}  # metrics that an exam of another name gives
BEFORE = {"reason": "reason_direct"}  # what it must beat is another exam


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


def examine(stage: Stage, out: Path, data_dir: Path, json_path: Path, *flags: str) -> dict:
    files = [*weight_flags(stage, out), "--data_dir", str(data_dir), "--json", str(json_path)]
    run_script("scripts/eval_mini.py", *files, *flags)
    return json.loads(json_path.read_text(encoding="utf-8"))


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_of_log(path: Path) -> dict:
    """The newest value of every key in a stage's JSONL log."""
    merged: dict = {}
    for line in read_log(path):
        merged |= line
    return merged


def weight_flags(stage: Stage, out: Path) -> list[str]:
    """Which weights to examine for a stage."""
    if stage.adapter:
        base = out / f"{stage.compared_with}_{HIDDEN}.pth"
        return ["--weight", str(base), "--lora_weight", stage.name]
    return ["--weight", str(out / f"{stage.name}_{HIDDEN}.pth")]


def needed_metrics(name: str, stages: list[Stage]) -> list[str]:
    """What the ledger wants to know of the weights `name`: their own rows, and those compared with them."""
    found = []
    for stage in stages:
        if stage.name == name:
            found += stage.shows + stage.costs
        if stage.compared_with == name:
            found += [BEFORE.get(metric, metric) for metric in stage.shows + stage.costs]
    return found


def metrics_of(name: str, wanted: list[str], out: Path, data_dir: Path) -> dict:
    """The exam results of weights ("" = untrained), with at least the metrics `wanted`; what was measured
    before stays in <name>_eval.json."""
    path = out / f"{name or 'untrained'}_eval.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"metrics": {}, "items": {}}
    exams = {METRIC_EXAM.get(metric, metric) for metric in wanted if metric not in known["metrics"]}
    if not exams:
        return known
    stage = next(s for s in STAGES if s.name == (name or "pretrain"))
    flags = [] if name else ["--untrained"]
    flags += SAMPLE if name in ("", "pretrain") else []
    found = examine(stage, out, data_dir, path, "--exams", ",".join(sorted(exams)), *flags)
    for key in ("metrics", "intervals", "items", "wrong", "groups"):
        found[key] = known.get(key, {}) | found[key]
    write_json(path, found)
    return found


def run_once(out: Path, seed: int, stages: list[Stage]) -> dict:
    """Curriculum and stages with one seed; returns the ledger."""
    started = time.time()
    data_dir = out / "data"
    out.mkdir(parents=True, exist_ok=True)
    run_script("dataset/make_mini.py", "--out_dir", str(data_dir), "--seed", str(seed))
    ledger = {"seed": seed, "machine": machine(), "rows": [], "stages": {}}
    for stage in stages:  # of an earlier run
        (out / f"{stage.name}_eval.json").unlink(missing_ok=True)
    compiling = []  # the first stage finds out whether torch.compile works here, and the others do as it did
    for stage in stages:
        begin = time.time()
        heldout = ["--val_path", relative(data_dir / stage.heldout)] if stage.heldout else []
        run_script(
            stage.script,
            *COMMON,
            *(["--use_compile", "0"] if stage.more else compiling),  # the later ones are too short for it
            *("--val_interval", "0", "--save_interval", "0"),
            *heldout,
            *stage.flags,
            *("--data_path", relative(data_dir / stage.data), "--seed", str(seed)),
            *("--save_dir", relative(out), "--checkpoint_dir", relative(out / "checkpoints")),
            *("--lora_name" if stage.adapter else "--save_weight", stage.name),
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
        ledger["rows"] += rows_of(stage, stages, out, data_dir)
    if any(stage.name == "sft_only" for stage in stages):
        metrics = ["facts_asked", "facts_unasked", "sums"]
        with_it, without = (
            metrics_of(n, metrics, out, data_dir)["metrics"] for n in ("full_sft", "sft_only")
        )
        ledger["gain_of_pretraining"] = {metric: with_it[metric] - without[metric] for metric in metrics}
    if any(stage.name == "student" for stage in stages):
        metrics = ["facts_asked", "sums"]
        alone, taught, teacher = (
            metrics_of(n, metrics, out, data_dir)["metrics"] for n in ("student_alone", "student", "full_sft")
        )
        ledger["gap_closed"] = {m: (taught[m] - alone[m]) / (teacher[m] - alone[m]) for m in metrics}
    ledger["conversations"] = metrics_of("full_sft", [], out, data_dir).get("conversations", {})
    ledger["seconds"] = round(time.time() - started, 1)
    return ledger


def rows_of(stage: Stage, stages: list[Stage], out: Path, data_dir: Path) -> list[dict]:
    """The ledger's rows of a finished stage."""
    rows, metrics = [], stage.shows + stage.costs
    if metrics:
        after = metrics_of(stage.name, needed_metrics(stage.name, stages), out, data_dir)
        earlier = needed_metrics(stage.compared_with, stages)
        before = metrics_of(stage.compared_with, earlier, out, data_dir)
    for metric in metrics:
        rows.append(
            {
                "stage": stage.name,
                "metric": metric,
                "before": before["metrics"][BEFORE.get(metric, metric)],
                "after": after["metrics"][metric],
                "items": after["items"].get(metric),
                "cost": metric in stage.costs,
            }
        )
    lines = read_log(out / f"{stage.name}_log.jsonl")
    for metric in stage.logged:
        values = [line[metric] for line in lines if metric in line]
        rows.append({"stage": stage.name, "metric": metric, "before": values[0], "after": values[-1]})
    return rows


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
    return f"{value:.3f}" if metric in PLAIN else f"{100 * value:.1f} %"


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
        what = ("alignment tax: " if row.get("cost") else "") + NAMES[row["metric"]]
        lines.append(f"| {row['stage']} | {what} | {before} | **{after}** | {row.get('items') or ''} |")
    if "gain_of_pretraining" in first:
        lines += ["", "What pretraining adds to the same fine-tuning (points):", ""]
    for metric in first.get("gain_of_pretraining", {}):
        gain = spread([ledger["gain_of_pretraining"][metric] for ledger in ledgers], metric).replace(" %", "")
        lines.append(f"- {NAMES[metric]}: +{gain}".replace("+-", "-"))
    if "gap_closed" in first:
        lines += ["", "Of the gap between the student alone and its teacher, distillation closes:", ""]
    for metric in first.get("gap_closed", {}):
        lines.append(f"- {NAMES[metric]}: {spread([x['gap_closed'][metric] for x in ledgers], metric)}")
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
    parser.add_argument(
        "--stages",
        default="default",
        choices=("default", "all", "more", "rl"),
        help="default = pretraining and fine-tuning; all = everything that there is; more = all but the "
        "default ones, on their weights in --out_dir; rl = of those, reinforcement learning (default: "
        "default)",
    )
    default = ROOT / "out" / "quickstart"
    parser.add_argument("--out_dir", type=Path, default=default, help="(default: out/quickstart)")
    return parser.parse_args(argv)


def main(args):
    bootstrap.ensure("requirements.txt")
    out = args.out_dir.resolve()
    seeds = args.seeds or [args.seed]
    ledgers = []
    wanted = {"all": lambda s: True, "more": lambda s: s.more, "rl": lambda s: s.rl}
    stages = [s for s in STAGES if wanted.get(args.stages, lambda s: not s.more)(s)]
    for seed in seeds:
        folder = out if len(seeds) == 1 else out / f"seed{seed}"
        if args.stages in ("more", "rl") and not (folder / f"full_sft_{HIDDEN}.pth").exists():
            raise SystemExit(
                f"--stages {args.stages} needs the weights of a run before it in {relative(folder)}: none"
            )
        ledger = run_once(folder, seed, stages)
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
    print(f"All of it on one page: python scripts/report.py --save_dir {relative(folder)} --weight full_sft")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
