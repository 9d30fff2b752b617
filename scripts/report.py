"""The report card of a run: one page that says where weights come from and what they can do.

    python scripts/report.py                                # the newest weights in out/
    python scripts/report.py --weight agent --to agent.html # one file that can be mailed; or agent.md
    python scripts/report.py --save_dir out/quickstart --weight full_sft --watts 45 --price_per_hour 0.3

From the weight file it walks back to pretraining (each parent is checked by its checksum) and shows for every
stage: data, command, seed, hashes, versions, machine, time, tokens, memory, energy, curves; the results of
scripts/eval_benchmark.py (out/eval) and of scripts/quickstart.py, and answers of every stage to the same
prompts. What nobody wrote down is called not recorded. docs/report.md explains the page.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.report_lineage import Stage, folder_of, lineage
from scripts.report_results import answer_blocks, benchmark, benchmark_blocks
from scripts.report_sections import (
    attention,
    cost_blocks,
    curve_blocks,
    lineage_blocks,
    shape,
    stage_blocks,
    summary,
)
from trainer import cli


def sections_of(stages: list[Stage], args) -> list[tuple]:
    results = benchmark_blocks(stages, args)
    notes = [words for kind, words, *_ in results if kind == "warn"]
    has_benchmark = any(benchmark(stage, args.save_dir)[0] for stage in stages)
    none = (
        "No benchmark results: scripts/eval_benchmark.py writes them to the folder eval beside the weights."
    )
    sections = [
        ("Summary", summary(stages, args, attention(stages, notes))),
        ("Lineage", lineage_blocks(stages)),
        ("Results", results if has_benchmark else [("text", none), *results]),
        ("Curves", curve_blocks(stages)),
    ]
    if args.samples or args.prompt:
        sections.append(("Answers before and after each stage", answer_blocks(stages, args)))
    sections.append(("Cost", cost_blocks(stages, args)))
    sections.append(("Stages", [block for stage in stages for block in stage_blocks(stage, args)]))
    return sections


def find(args) -> Path:
    """The weight file of the flags; without --weight the newest one. Raises CheckpointError."""
    import eval_llm
    from trainer.checkpoint import CheckpointError, shown

    if args.weight is None:
        files = sorted(args.save_dir.glob("*_*.pth"), key=lambda p: p.stat().st_mtime)
        if not files:
            raise CheckpointError(
                f"there are no weights in {shown(args.save_dir)}: train some, or give --save_dir"
            )
        return files[-1]
    adapters = args.save_dir / "lora"
    if args.weight.startswith("lora") and not list(args.save_dir.glob(f"{args.weight}_*.pth")):
        if list(adapters.glob(f"{args.weight}_*.pth")):
            args = argparse.Namespace(**{**vars(args), "save_dir": adapters})
    return eval_llm.find_weights(args)


def write_whole(path: Path, content: bytes):
    """Beside its place, then renamed: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_pages(stages: list[Stage], sections: list[tuple], places: list[Path]):
    from scripts import report_page
    from trainer.checkpoint import shown

    own = stages[-1]
    title = f"Report card: {own.name}"
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    subtitle = f"{own.path.name} · {shape(own)} · {when}"
    footer = "Written by scripts/report.py from the weights, logs and results themselves; see docs/report.md."
    for place in places:
        if place.suffix == ".html":
            text = report_page.html(title, subtitle, sections, footer)
        else:
            folder = f"{place.stem}_pictures"
            text, pictures = report_page.markdown(title, subtitle, sections, footer, folder)
            for name, picture in pictures.items():
                write_whole(place.with_name(folder) / name, picture)
        write_whole(place, text.encode("utf-8", errors="replace"))  # a log may hold half a character
        print(f"wrote {shown(place)}")


def page(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".html", ".md"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither with .html nor with .md")
    return path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--weight", metavar="NAME", help="name of the weights or adapter, or a .pth file; default: the newest"
    )
    add(
        "--save_dir",
        "--out_dir",
        type=Path,
        default=ROOT / "out",
        metavar="DIR",
        help="folder of the weights",
    )
    add("--hidden_size", type=cli.positive_int, metavar="N", help="width, where there are several")
    add("--use_moe", type=cli.switch, metavar="0|1", help="1 = the _moe file, 0 = the dense one")
    add("--to", type=page, metavar="FILE", help="report.html or report.md; default: both in DIR/report")
    add(
        "--samples",
        type=cli.count,
        default=8,
        metavar="N",
        help="fixed prompts to answer, 0 = none (default: 8)",
    )
    add("--prompt", action="append", metavar="TEXT", help="answer this instead; may be given several times")
    add("--max_new_tokens", type=cli.positive_int, default=96, metavar="N", help="of an answer (default: 96)")
    add("--open_thinking", type=cli.switch, default=0, metavar="0|1", help="1 = answers begin with thoughts")
    add(
        "--watts",
        type=cli.positive_float,
        metavar="W",
        help="power of the machine, for an estimate of energy",
    )
    add(
        "--price_per_hour",
        type=cli.non_negative_float,
        metavar="X",
        help="price of the machine, in any currency",
    )
    add("--device", default="auto", help="of the answers: auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    args.preset = None  # eval_llm.py's find_weights asks for it
    return args


def main(args):
    path = find(args)
    print(f"reading {path.name} and the stages before it", flush=True)
    stages = lineage(path)
    for stage in stages:
        print(f"  {stage.name}: {stage.ends or stage.status}", flush=True)
    args.save_dir = folder = folder_of(path)  # of a .pth file, too
    places = [args.to] if args.to else [folder / "report" / f"{path.stem}{end}" for end in (".html", ".md")]
    write_pages(stages, sections_of(stages, args), places)


if __name__ == "__main__":
    cli.run(main, parse_args)
