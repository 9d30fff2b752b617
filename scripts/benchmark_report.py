"""From right and wrong answers to what is told: shares with intervals, means, comparisons, tables, a picture.

For scripts/eval_benchmark.py. A record is one item's figures, {"id", "subject", "acc": True, ...}; an entry
is one task of a results file:

    {"name", "file", "sha256", "kind": "choice" | "generation" | "tools" | "bits_per_byte", "n",
     "metrics": {name: number}, "intervals": {name: [low, high]}, "random": share of a guesser, ...}
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MAIN = {"choice": "acc_norm", "generation": "acc", "tools": "right", "bits_per_byte": "bits_per_byte"}
HEAD = "| weights | task | n | acc | acc_norm | by chance | verdict |\n|---|---|---:|---|---|---:|---|"


# ------------------------------------------------------------------------------------------------------------
# Summing up
# ------------------------------------------------------------------------------------------------------------


def shares(records: list[dict], names) -> dict:
    """Means of true/false figures and their 95 % intervals (Wilson 1927): {"n", "metrics", "intervals"}."""
    from scripts.eval_toolcall import wilson

    n = len(records)
    metrics = {name: sum(r[name] for r in records) / n for name in names}
    return {"n": n, "metrics": metrics, "intervals": {m: list(wilson(v, n)) for m, v in metrics.items()}}


def by_subject(records: list[dict], names) -> dict:
    """`shares` of every subject."""
    subjects: dict[str, list] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record)
    return {subject: shares(some, names) for subject, some in sorted(subjects.items())}


def verdict(interval: list[float], chance: float) -> str:
    low, high = interval
    return "above chance" if low > chance else "below chance" if high < chance else "no different from chance"


def means(entries: list[dict]) -> dict:
    """The mean over choice tasks by rule, each task counting alike, with the 95 % interval of a mean of
    independent shares: {rule: {"tasks", "random", "acc": [mean, low, high], "acc_norm": ...}}."""
    found = {}
    for rule in dict.fromkeys(e["rule"] for e in entries if e["kind"] == "choice"):
        some = [e for e in entries if e.get("rule") == rule]
        k = len(some)
        found[rule] = {"tasks": k, "random": sum(e["random"] for e in some) / k}
        for name in ("acc", "acc_norm"):
            values = [e["metrics"][name] for e in some]
            half = 1.96 * math.sqrt(sum(p * (1 - p) / e["n"] for p, e in zip(values, some))) / k
            found[rule][name] = [sum(values) / k, sum(values) / k - half, sum(values) / k + half]
    return {rule: mean for rule, mean in found.items() if mean["tasks"] > 1}


def compare(first: list[dict], second: list[dict], metric: str) -> dict:
    """Two weights on the same items: the difference of their shares, its 95 % interval from the pairs, and
    the p-value of McNemar's exact test (1947): how often a fair coin would part the items on which they
    disagree at least as unevenly."""
    gained = sum(b[metric] and not a[metric] for a, b in zip(first, second, strict=True))
    lost = sum(a[metric] and not b[metric] for a, b in zip(first, second, strict=True))
    n, apart = len(first), gained + lost
    difference = (gained - lost) / n
    half = 1.96 * math.sqrt(max(apart - (gained - lost) ** 2 / n, 0)) / n
    tail = sum(math.comb(apart, i) for i in range(min(gained, lost) + 1))
    return {
        "metric": metric,
        "difference": difference,
        "interval": [difference - half, difference + half],
        "gained": gained,
        "lost": lost,
        "p": min(2 * tail / 2**apart, 1.0),
    }


def compare_all(results: list[dict], samples: list[dict]):
    """Every result against the first one, into `compared_with`. samples: {name of an entry: records}."""
    for result, records in zip(results[1:], samples[1:]):
        result["compared_with"] = {"weights": results[0]["name"], "tasks": {}}
        for e in result["tasks"]:
            if e["kind"] != "bits_per_byte":
                pair = samples[0][e["name"]], records[e["name"]]
                result["compared_with"]["tasks"][e["name"]] = compare(*pair, MAIN[e["kind"]])


# ------------------------------------------------------------------------------------------------------------
# Telling
# ------------------------------------------------------------------------------------------------------------


def with_interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def row_of(name: str, e: dict) -> str:
    """One entry as a row below HEAD."""
    cells = [name, e["name"], str(e["n"])]
    if e["kind"] == "choice":
        cells += [with_interval(e["metrics"][m], *e["intervals"][m]) for m in ("acc", "acc_norm")]
        cells += [f"{100 * e['random']:.1f}", e["verdict"]]
    elif e["kind"] == "bits_per_byte":
        cells += [f"{e['metrics']['bits_per_byte']:.4f} bits per byte", "", "", ""]
    else:
        metric, *others = e["metrics"]
        rest = ", ".join(f"{m} {100 * e['metrics'][m]:.0f} %" for m in others)
        cells += [with_interval(e["metrics"][metric], *e["intervals"][metric]), "", "", rest]
    return "| " + " | ".join(cells) + " |"


def subject_lines(e: dict) -> list[str]:
    return [
        f"    {subject}, n = {some['n']}: "
        + ", ".join(f"{m} {with_interval(v, *some['intervals'][m])}" for m, v in some["metrics"].items())
        for subject, some in e.get("subjects", {}).items()
    ]


def results_row(results: list[dict]) -> str:
    """A table with one row for every result: its main figure of every task, and their means."""
    names = list(dict.fromkeys(e["name"] for r in results for e in r["tasks"]))
    rules = list(dict.fromkeys(rule for r in results for rule in r["means"]))
    head = [*names, *(f"mean, {rule}" for rule in rules)]
    lines = ["| weights | " + " | ".join(head) + " |", "|---" + "|---:" * len(head) + "|"]
    for result in results:
        found, cells = {e["name"]: e for e in result["tasks"]}, [result["name"]]
        for name in names:
            e = found[name]
            value = e["metrics"][MAIN[e["kind"]]]
            cells.append(f"{value:.3f}" if e["kind"] == "bits_per_byte" else f"{100 * value:.1f}")
        cells += [f"{100 * result['means'][rule]['acc_norm'][0]:.1f}" for rule in rules]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentences(result: dict) -> list[str]:
    """Means, and what came of comparing."""
    lines = []
    for rule, mean in result["means"].items():
        both = ", ".join(f"{name} {with_interval(*mean[name])}" for name in ("acc", "acc_norm"))
        lines.append(
            f"{result['name']}, mean of {mean['tasks']} tasks, {rule}: {both}, "
            f"by chance {100 * mean['random']:.1f}"
        )
    other = result.get("compared_with", {"tasks": {}})
    for name, c in other["tasks"].items():
        low, high = c["interval"]
        lines.append(
            f"{result['name']} - {other['weights']}, {name}: {c['metric']} {100 * c['difference']:+.1f} "
            f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {c['p']:.3f}: "
            + ("they differ" if c["p"] < 0.05 else "no clear difference")
        )
    return lines


def draw(results: list[dict], picture: Path) -> bool:
    """acc_norm of every choice task with its interval and the guesser's score: a radar from three tasks on,
    else bars. Returns False, with a line, without matplotlib or such tasks."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: `pip install matplotlib` to get one")
        return False
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(e["rule"] for e in results[0]["tasks"] if e["kind"] == "choice"))
    series = [
        (r["name"] + f", {rule}" * (len(rules) > 1), [e for e in r["tasks"] if e.get("rule") == rule])
        for r in results
        for rule in rules
    ]
    if not series:
        print("no picture: there is no multiple-choice task")
        return False
    names, chance = zip(*((e["name"].removesuffix(" letter"), 100 * e["random"]) for e in series[0][1]))
    radar = len(names) >= 3
    turn = 2 * math.pi / len(names) if radar else 1.0
    around = (lambda values: [*values, values[0]]) if radar else list
    figure = Figure(figsize=(9, 6.5) if radar else (4 + 2 * len(names), 4.5), layout="constrained")
    axes = figure.subplots(subplot_kw={"polar": True} if radar else {})
    for i, (label, entries) in enumerate(series):
        values = [100 * e["metrics"]["acc_norm"] for e in entries]
        bounds = [[100 * bound for bound in e["intervals"]["acc_norm"]] for e in entries]
        spread = [
            [v - low for v, (low, _) in zip(values, bounds)],
            [b[1] - v for v, b in zip(values, bounds)],
        ]
        shift = (i - (len(series) - 1) / 2) * (0.3 if radar else 0.8) * turn / len(series)
        at = [turn * place + shift for place in range(len(names))]
        if radar:
            (line,) = axes.plot(around(at), around(values), linewidth=1.2, label=label)
            axes.errorbar(at, values, spread, fmt="o", color=line.get_color(), markersize=3, capsize=2)
        else:
            axes.bar(at, values, 0.7 / len(series), yerr=spread, capsize=3, label=label)
    places = [turn * place for place in range(len(names))]
    if radar:
        axes.plot(around(places), around(chance), "--", color="black", linewidth=1, label="by chance")
        axes.set_ylim(0, None)
        axes.set_rlabel_position(math.degrees(turn / 2))
    else:
        starts, ends = ([place + side for place in places] for side in (-0.45, 0.45))
        axes.hlines(chance, starts, ends, "black", "dashed", linewidth=1, label="by chance")
        axes.set_ylabel("%")
    axes.set_xticks(places, names)
    for label, place in zip(axes.get_xticklabels(), places if radar else ()):
        side = round(math.cos(place))  # beside the circle, not over it
        label.set_horizontalalignment({-1: "right", 0: "center", 1: "left"}[side])
    axes.set_title("acc_norm in %, with 95 % intervals")
    figure.legend(loc="outside right upper")
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f".{picture.name}.part")
    figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    temporary.replace(picture)
    return True


def write(path: Path, text: str):
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_results(result: dict, folder: Path):
    write(folder / f"{result['name']}.json", json.dumps(result, ensure_ascii=False, indent=1))


def append_row(result: dict, folder: Path):
    """One line in results.jsonl, which keeps every run."""
    line = {key: result[key] for key in ("name", "date", "command", "weights", "means", "seconds")}
    line["tasks"] = {e["name"]: {"n": e["n"], **e["metrics"]} for e in result["tasks"]}
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
