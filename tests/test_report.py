"""The report card: it says what the files say, and nothing that a model or a file says becomes markup."""

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from train_helpers import log_lines, train

from scripts import report, report_lineage, report_page, report_results, report_sections
from trainer import checkpoint, cli, energy

NASTY = "<script>alert(1)</script><img src=x onerror=y> ![p](http://e.x/p.png) a|b `c` \x00 \ud800 & 中文"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pretraining, fine-tuning on it, and an adapter on that."""
    folder = tmp_path_factory.mktemp("runs")
    train("pretrain", folder, steps=6)
    train("full_sft", folder, "--from_weight", "pretrain", steps=4)
    train("lora", folder, "--lora_name", "lora_x", steps=2)
    return folder


@pytest.fixture
def out(trained, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path / "out"


def page_of(out, *flags, weight="full_sft", end="html", samples="0"):
    target = out.parent / f"page.{end}"
    argv = ["--save_dir", str(out), "--to", str(target), "--samples", samples, *flags]
    cli.run(report.main, report.parse_args, [*argv, *(["--weight", weight] if weight else [])])
    return target.read_text(encoding="utf-8")


def refused(capsys, *argv) -> str:
    """The one line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as end:
        cli.run(report.main, report.parse_args, list(map(str, argv)))
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "Traceback" not in message
    return message.splitlines()[-1]


def rewrite(path, target=None, without=(), **fields):
    """The same weights with other metadata, and the checksum of that."""
    model, metadata = checkpoint.load_model(path)
    kept = {k: v for k, v in metadata.items() if k not in ("crc32", *without)}
    checkpoint.save_weights(model, target or path, {**kept, **fields})


def statuses(path) -> list[tuple[str, str]]:
    return [(stage.name, stage.status) for stage in report_lineage.lineage(path)]


# ------------------------------------------------------------------------------------------------------------
# What is written down
# ------------------------------------------------------------------------------------------------------------


def test_weights_say_how_they_were_made(trained):
    metadata = checkpoint.read_weights(trained / "out/full_sft_32.pth")[1]
    (sitting,) = metadata["sittings"]
    assert sitting["event"] == "start" and sitting["machine"].startswith("cpu") and sitting["processor"]
    assert set(sitting["versions"]) == {"python", "torch", "transformers"} and sitting["folder"]
    (file,) = sitting["data"]["files"]
    assert file["sha256"] == hashlib.sha256((trained / "sft.jsonl").read_bytes()).hexdigest()
    assert sitting["data"]["rows"] > 0 and sitting["data"]["tokens"] > 0
    header = log_lines(trained, "full_sft")[0]
    assert {k: v for k, v in header.items() if k != "args"} == sitting, "the log says the same"


def test_a_continued_run_remembers_its_start(tmp_path):
    train("pretrain", tmp_path, steps=3)
    for steps in (3, 3):  # a finished run may be continued: nothing is left to do, and that is a sitting too
        train("pretrain", tmp_path, "--from_resume", "1", steps=steps)
    events = [s["event"] for s in checkpoint.read_weights(tmp_path / "out/pretrain_32.pth")[1]["sittings"]]
    assert events == ["start", "resume", "resume"]
    page = page_of(tmp_path / "out", weight="pretrain")
    assert page.count("resumed at step 3") == 2


class Counter:
    """A powercap folder with one package, one part of it, and one zone that is no package."""

    def __init__(self, folder, monkeypatch):
        for zone, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:1": "psys",
        }.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(f"{name}\n")
            (folder / zone / "max_energy_range_uj").write_text("1000000000\n")
        self.folder = folder
        self.set(0)
        monkeypatch.setattr(energy, "POWERCAP", folder)

    def set(self, joules: float):
        for zone in self.folder.iterdir():
            (zone / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")


def test_energy_is_what_the_packages_counted(tmp_path, monkeypatch):
    counter = Counter(tmp_path, monkeypatch)
    meter = energy.Meter()
    counter.set(250)
    assert meter.used() == 250, "one package, neither its parts nor the whole board"
    counter.set(950)
    assert meter.used() == 700
    counter.set(30)
    assert meter.used() == 80, "the counter starts again at 1000 J"
    assert energy.Meter(counts_cpu=False).used() is None, "unknown, not zero"


def test_a_run_logs_energy_where_it_is_counted(tmp_path, monkeypatch):
    (tmp_path / "counters").mkdir()
    counter = Counter(tmp_path / "counters", monkeypatch)
    original, total = energy.Meter.used, [0]

    def used(meter):
        total[0] += 36
        counter.set(total[0])
        return original(meter)

    monkeypatch.setattr(energy.Meter, "used", used)
    train("pretrain", tmp_path, steps=4)
    lines = [line["energy_j"] for line in log_lines(tmp_path) if "energy_j" in line]
    assert lines[0] == 36 and lines == sorted(lines)
    stage = report_lineage.lineage(tmp_path / "out/pretrain_32.pth")[-1]
    assert stage.number("energy_j") == lines[-1]
    assert report_lineage.energy_of(stage, watts=500) == (lines[-1] / 3600, "counted"), (
        "counted beats guessed"
    )


# ------------------------------------------------------------------------------------------------------------
# Lineage
# ------------------------------------------------------------------------------------------------------------


def test_every_parent_is_verified(trained):
    found = [("pretrain", "verified"), ("full_sft", "verified"), ("lora_x", "chosen")]
    assert statuses(trained / "out/lora/lora_x_32.pth") == found
    assert statuses(trained / "out/full_sft_32.pth") == [("pretrain", "verified"), ("full_sft", "chosen")]


def test_a_parent_that_changed_is_not_shown_as_one(out):
    rewrite(out / "pretrain_32.pth", seed=7)
    assert statuses(out / "full_sft_32.pth")[0] == ("pretrain", "changed")
    page = page_of(out)
    recorded = checkpoint.read_weights(out / "full_sft_32.pth")[1]["parent"]["crc32"]
    assert "has changed since" in page and f"crc32 {recorded}" in page


def test_a_parent_that_is_gone(out):
    (out / "pretrain_32.pth").unlink()
    assert statuses(out / "full_sft_32.pth")[0] == ("pretrain", "gone")
    page = page_of(out, "--watts", "9")
    assert "pretrain_32.pth is gone (step 6, crc32" in page
    assert page.count("at least ") == 6, "time, tokens and energy, in the summary and in the table"


def test_a_parent_under_another_name_is_found_by_its_checksum(out):
    (out / "pretrain_32.pth").rename(out / "first_32.pth")
    stage = report_lineage.lineage(out / "full_sft_32.pth")[0]
    assert (stage.name, stage.status) == ("first", "verified") and "knew it as pretrain_32.pth" in stage.note
    assert stage.log.name == "pretrain_log.jsonl", "its log is the one with its figures"


def test_a_damaged_parent_is_said(out):
    raw = bytearray((out / "pretrain_32.pth").read_bytes())
    spot = raw.index(
        checkpoint.read_weights(out / "pretrain_32.pth")[0]["model.norm.weight"].numpy().tobytes()
    )
    raw[spot + 3] ^= 1
    (out / "pretrain_32.pth").write_bytes(raw)
    (stage, _) = report_lineage.lineage(out / "full_sft_32.pth")
    assert stage.status == "damaged" and "checksum differs" in stage.ends


def test_a_cycle_ends(out):
    for name, other in {"a": "b", "b": "a"}.items():
        parent = {"weight": other, "step": 1, "crc32": None}
        rewrite(out / "full_sft_32.pth", out / f"{name}_32.pth", stage=name, parent=parent)
    assert statuses(out / "a_32.pth") == [("a", "cycle"), ("b", "not verified"), ("a", "chosen")]
    assert "a cycle" in page_of(out, weight="a")


def test_weights_that_were_trained_on_themselves(out):
    """full_sft on full_sft: the file of the parent is the child's own now."""
    crc32 = checkpoint.read_weights(out / "full_sft_32.pth")[1]["crc32"]
    rewrite(out / "full_sft_32.pth", step=9, parent={"weight": "full_sft", "step": 4, "crc32": crc32})
    (stage, _) = report_lineage.lineage(out / "full_sft_32.pth")
    assert stage.status == "changed" and "by this very stage" in stage.ends


def test_imported_weights_and_files_of_other_projects(out):
    import torch

    model, _ = checkpoint.load_model(out / "pretrain_32.pth")
    checkpoint.save_weights(model, out / "got_32.pth", {"stage": "imported", "parent": {"weight": "llama"}})
    assert "imported from a transformers folder of type llama" in page_of(out, weight="got")
    torch.save(model.state_dict(), out / "foreign_32.pth")
    page = page_of(out, weight="foreign")
    assert "a file without metadata, written by another project" in page and "not recorded" in page


def test_a_parent_cannot_lead_out_of_the_folder(out):
    model, _ = checkpoint.load_model(out / "pretrain_32.pth")
    parent = {"weight": "../out/full_sft", "step": 1, "crc32": None}
    checkpoint.save_weights(model, out / "odd_32.pth", {"stage": "odd", "parent": parent})
    assert statuses(out / "odd_32.pth")[0][1] == "gone"


@pytest.mark.parametrize("broken", [7, "x", [1], {"hidden_size": [2]}])
def test_metadata_of_any_kind_makes_a_page(out, broken):
    model, _ = checkpoint.load_model(out / "pretrain_32.pth")
    fields = dict.fromkeys(("parent", "metrics", "sittings", "seed", "step", "total_steps", "data"), broken)
    checkpoint.save_weights(model, out / "odd_32.pth", {"stage": broken, **fields})
    (out / "odd_log.jsonl").write_text('7\n[1]\n{"step": "x"}\n{"step": 1, "loss": "nan"}\n{"ste')
    assert "odd_32.pth" in page_of(out, weight="odd")


# ------------------------------------------------------------------------------------------------------------
# Logs and numbers
# ------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_logs(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    page = page_of(tmp_path / "out", end="md")
    seconds, tokens = 0.0, 0
    for name in ("pretrain", "full_sft"):
        lines = log_lines(trained, name)
        last = {k: v for line in lines for k, v in line.items()}
        row = next(
            line for line in page.splitlines() if line.startswith(f"| {name} | {last['total_steps']} |")
        )
        assert f"{last['tokens']:,}" in row and f"{last['time_s']:.1f} s" in row
        assert f"{last['tokens'] / last['time_s']:,.0f}" in row and f"{last['memory_gb']:.2f} GB" in row
        seconds, tokens = seconds + last["time_s"], tokens + last["tokens"]
        assert f"{last['val_loss']:.4g}" in page and lines[0]["commit"] in page
    total = next(line for line in page.splitlines() if line.startswith("| all |"))
    assert f"{tokens:,}" in total and f"{seconds:.1f} s" in total and "not available" in total


def test_an_estimate_is_power_times_time(out):
    stages = report_lineage.lineage(out / "full_sft_32.pth")
    hours = sum(stage.number("time_s") for stage in stages) / 3600
    page = page_of(out, "--watts", "7200", "--price_per_hour", "3600")
    assert f"{7200 * hours:.3g} Wh" in page and f">{3600 * hours:,.2f}<" in page
    assert page.count("(estimate)") == 3 and "7200 W (given by --watts)" in page
    assert report_lineage.energy_of(SimpleNamespace(number={"time_s": 1800.0}.get), 50.0) == (
        25.0,
        "estimate",
    )
    assert report_lineage.energy_of(SimpleNamespace(number={"time_s": 1800.0}.get), None)[0] is None


def test_missing_numbers_make_a_sum_a_lower_bound():
    assert report_lineage.total([1.0, None, 2.0]) == (3.0, "at least ")
    assert report_lineage.total([None]) == (None, "") and report_lineage.total([1, 2]) == (3, "")


def test_the_log_of_another_run_is_not_taken(out):
    """A later run of the same name wrote another log; the weights were kept."""
    lines = (out / "full_sft_log.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [json.loads(line) for line in lines]
    for line in changed:
        if "loss" in line:
            line["loss"] += 1
    (out / "full_sft_log.jsonl").write_text("\n".join(map(json.dumps, changed)), encoding="utf-8")
    stage = report_lineage.lineage(out / "full_sft_32.pth")[-1]
    assert stage.log is None and "of another run" in stage.log_note
    assert stage.number("tokens") > 0, "the weights themselves know"
    assert "of another run" in page_of(out)


def test_broken_lines_of_a_log_are_counted(out):
    with (out / "full_sft_log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n"words"\n{"step": 99, "loss":')
    page = page_of(out)
    assert "3 lines of it could not be read" in page and "<svg" in page


def test_lines_behind_the_weights_are_not_of_them(out):
    with (out / "full_sft_log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 50, "loss": 99.5, "tokens": 1}) + "\n")
    stage = report_lineage.lineage(out / "full_sft_32.pth")[-1]
    assert stage.log is not None and 99.5 not in report_lineage.figures(stage, "loss")[1]


def test_weights_of_before_this_was_recorded_take_it_from_the_log(out):
    rewrite(out / "full_sft_32.pth", without=["sittings"])
    stage = report_lineage.lineage(out / "full_sft_32.pth")[-1]
    assert report_lineage.command_to_repeat(stage) == log_lines(out.parent, "full_sft")[0]["command"]
    (out / "full_sft_log.jsonl").unlink()
    page = page_of(out)
    assert "Command: not recorded." in page and "No curves: no log" in page


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python a.py --max_minutes 5", "python a.py --max_minutes 5 --max_steps 12"),
        ("python a.py --max_minutes 5 --max_steps 3", "python a.py --max_minutes 5 --max_steps 3"),
        ("python a.py --epochs 2", "python a.py --epochs 2"),
    ],
)
def test_a_run_by_the_clock_is_repeated_by_its_steps(command, expected):
    stage = report_lineage.Stage("x", metadata={"total_steps": 12}, sittings=[{"command": command}])
    assert report_lineage.command_to_repeat(stage) == expected


def test_data_files_are_compared_with_what_was_read(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    weights = tmp_path / "runs/out/full_sft_32.pth"
    data = tmp_path / "runs/sft.jsonl"
    stage = report_lineage.lineage(weights)[-1]
    stage.sittings[0]["data"]["files"][0]["path"] = str(data)
    assert report_lineage.data_files(stage)[0][2] == "unchanged"
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert report_lineage.data_files(stage)[0][2] == "changed since"
    data.unlink()
    assert report_lineage.data_files(stage)[0][2] == "file is gone"


# ------------------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------------------


def benchmark_file(out, name, sha256, value):
    task = {"name": "sums", "kind": "choice", "n": 40, "metrics": {"acc": value}, "random": 0.25}
    task["intervals"] = {"acc": [value - 0.1, value + 0.1]}
    content = {
        "format": 1,
        "weights": {"sha256": sha256},
        "command": "python e.py",
        "tasks": [task, "odd", {}],
    }
    (out / "eval").mkdir(exist_ok=True)
    (out / f"eval/{name}_32.json").write_text(json.dumps(content), encoding="utf-8")


def test_benchmarks_stand_beside_each_other(out):
    for name, value in {"pretrain": 0.25, "full_sft": 0.5}.items():
        benchmark_file(out, name, hashlib.sha256((out / f"{name}_32.pth").read_bytes()).hexdigest(), value)
    page = page_of(out, end="md")
    row = "| sums, acc | 40 | 25.0 % | 25.0 % \\[15.0 % – 35.0 %\\] | 50.0 % \\[40.0 % – 60.0 %\\] |"
    assert row in page and "other weights" not in page and "python e.py" in page


def test_a_benchmark_of_an_adapter(out):
    benchmark_file(out, "full_sft", hashlib.sha256((out / "full_sft_32.pth").read_bytes()).hexdigest(), 0.5)
    (out / "eval/full_sft_32.json").rename(out / "eval/full_sft_32+lora_x.json")
    page = page_of(out, weight="lora_x", end="md")
    assert "| task, metric | n | by chance | lora_x |" in page and "other weights" not in page


def test_a_benchmark_of_other_weights_is_marked(out):
    benchmark_file(out, "full_sft", "0" * 64, 0.5)
    page = page_of(out)
    assert "(other weights)" in page and "was measured on other weights, not on full_sft_32.pth" in page


@pytest.mark.parametrize("content", ["", "[]", "{", '{"tasks": 3}', '{"tasks": [{"metrics": {"acc": "x"}}]}'])
def test_broken_results_are_no_reason_to_fail(out, content):
    (out / "eval").mkdir()
    for name in ("eval/full_sft_32.json", "ledger.json", "full_sft_eval.json"):
        (out / name).write_text(content, encoding="utf-8")
    assert "full_sft" in page_of(out)


def test_the_quickstarts_ledger_and_exams(out):
    rows = [{"stage": "full_sft", "metric": "sums", "before": 0.1, "after": 0.9, "items": 600}]
    rows += [{"stage": "other", "metric": "sums", "before": 0.2, "after": 0.3}]
    (out / "ledger.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    exams = {"metrics": {"sums": 0.9}, "intervals": {"sums": 0.024}, "items": {"sums": 600}}
    (out / "full_sft_eval.json").write_text(json.dumps(exams), encoding="utf-8")
    page = page_of(out, end="md")
    assert "| full_sft | one- and two-digit sums, unseen operands | 10.0 % | 90.0 % | 600 |" in page
    assert "| one- and two-digit sums, unseen operands | 90.0 % ± 2.4, n = 600 |" in page
    assert "20.0 %" not in page, "a stage that is no ancestor"


# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------


def test_answers_of_every_stage_are_the_engines(out):
    import eval_llm

    page = page_of(out, "--max_new_tokens", "5", weight="lora_x", end="md", samples="2")
    args = report.parse_args(["--max_new_tokens", "5"])
    heads = "| prompt | pretrain | full_sft | lora_x |"
    assert heads in page and "| text | pretrain |" in page
    stage = report_lineage.lineage(out / "full_sft_32.pth")[-1]
    (answer,) = report_results.answers_of(stage, [eval_llm.CHAT_PROMPTS[1]], args)
    row = next(line for line in page.splitlines() if line.startswith(f"| {eval_llm.CHAT_PROMPTS[1]} |"))
    assert row.split(" | ")[2] == report_page.words(answer)


def test_ones_own_prompts(out):
    page = page_of(out, "--prompt", "sun <b> moon", "--max_new_tokens", "3")
    assert "sun &lt;b&gt; moon" in page and "你好" not in page


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """All tags with their attributes, and the text outside of them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def assert_harmless(page):
    """No script, nothing from outside, no handlers."""
    loads = {"script", "img", "iframe", "object", "embed", "link", "base", "form", "video", "audio", "image"}
    for tag, attributes in Tags(page).tags:
        assert tag not in loads, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("#"), (tag, name, value)
    styles = "".join(re.findall(r"<style.*?</style>", page, flags=re.DOTALL))
    assert "@import" not in page and not re.search(r"url\((?!#)", page) and "http" not in styles
    assert "Content-Security-Policy" in page


def test_the_page_needs_nothing_from_outside(out):
    page = page_of(out)
    assert_harmless(page)
    assert "http://" not in page and "https://" not in page, "not even as the name of a format"
    assert page.count("<svg") == 2 and "xmlns" not in page and "currentColor" in page


BLOCKS = [
    ("text", NASTY),
    ("warn", NASTY),
    ("head", NASTY),
    ("code", NASTY),
    ("facts", [(NASTY, NASTY), (NASTY, (NASTY, "good"))]),
    ("cards", [(NASTY, NASTY, NASTY)]),
    ("table", [NASTY, NASTY], [[NASTY, (NASTY, "bad")]]),
    ("answers", [NASTY, NASTY], [[NASTY, NASTY + "\n\n" + NASTY]]),
    ("chain", [(NASTY, [NASTY], (NASTY, "good")), (NASTY, [NASTY], None)]),
    ("curves", NASTY, [("a<b>", "x&y", "y", [("<i>", [1, 2], [1.0, 2.0])])]),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0])
def test_no_text_becomes_markup(block):
    page = report_page.html(NASTY, NASTY, [(NASTY, []), (NASTY, [block])], NASTY)
    assert_harmless(page)
    assert "alert(1)" in Tags(page).text and "\x00" not in page


@pytest.mark.parametrize("block", BLOCKS[:-1], ids=lambda block: block[0])
def test_no_text_becomes_markdown(block):
    text, _ = report_page.markdown("t", "s", [("one", []), ("two", [block])], "f", "folder")
    if block[0] == "code":
        assert text.count("```") == 2
        return
    assert "<script" not in text and "<img" not in text and "![p](" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) <= 1


def test_a_models_answer_cannot_leave_its_cell(out, monkeypatch):
    monkeypatch.setattr(report_results, "answers_of", lambda stage, prompts, args: [NASTY] * len(prompts))
    page = page_of(out, samples="1")
    assert_harmless(page)
    assert "alert(1)" in Tags(page).text and "中文" in page
    text = page_of(out, samples="1", end="md")
    assert "<script" not in text and "![p](" not in text


def test_markdown_tables_are_well_formed(out):
    text = page_of(out, "--watts", "5", end="md")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        rows = table.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(widths) == 1 and re.fullmatch(r"\|(---\|)+", rows[1]), table
    for folder, file in re.findall(r"!\[[^\]]*\]\((\w+)/([\w.]+)\)", text):
        assert (out.parent / folder / file).read_bytes().startswith(b"\x89PNG")
    assert text.count("page_pictures/") == 2
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        assert re.search(rf"^## {link.replace('-', ' ')}$", text, flags=re.MULTILINE | re.IGNORECASE), link


def test_curves_are_drawn_only_where_there_is_one():
    records = [{"step": 1, "loss": 3.0, "lr": 0.1}, {"step": 2, "loss": 2.0, "lr": 0.1, "val_loss": 2.5}]
    stage = report_lineage.Stage("x", records=records)
    panels = report_sections.panels_of(stage)
    assert [panel[0] for panel in panels] == ["Loss", "Learning rate"]
    assert panels[0][3] == [("loss", [1, 2], [3.0, 2.0]), ("val_loss", [2], [2.5])]
    pairs = [{"step": s, "loss": 0.6, "accuracy": 0.5, "tax_loss": 2.0} for s in (1, 2)]
    titles = [p[0] for p in report_sections.panels_of(report_lineage.Stage("z", records=pairs))]
    assert titles == ["Loss of pairs", "Pairs", "Earlier stage, held out"], "two units, two panels"
    rewarded = [{"step": s, "loss": 0.1, "reward": s / 9, "length": 5.0, "val_bpb": "inf"} for s in (1, 2)]
    titles = [p[0] for p in report_sections.panels_of(report_lineage.Stage("y", records=rewarded))]
    assert titles == ["Reward", "Length of answers"], "its loss says nothing"


def test_long_curves_keep_their_ends():
    steps = list(range(5000))
    panel = ("t", "x", "y", [("loss", steps, [float(s) for s in steps])])
    assert len(report_page.draw([panel], "svg", "n")) < 60_000


def test_without_matplotlib_there_is_a_page(out, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in page_of(out) and "pip install matplotlib" in page_of(out, end="md")


def test_the_default_places_and_the_newest_weights(out):
    import os

    os.utime(out / "pretrain_32.pth", (2e9, 2e9))
    cli.run(report.main, report.parse_args, ["--save_dir", str(out), "--samples", "0"])
    there = sorted(p.name for p in (out / "report").iterdir())
    assert there == ["pretrain_32.html", "pretrain_32.md", "pretrain_32_pictures"], (
        "no part of a file is left"
    )


def test_what_is_wrong_is_said_in_one_line(out, tmp_path, capsys):
    target = tmp_path / "p.html"
    flags = ["--save_dir", out, "--to", target, "--samples", "0"]
    assert "dpo_*.pth does not exist" in refused(capsys, *flags, "--weight", "dpo")
    assert "there are no weights in" in refused(capsys, "--save_dir", tmp_path / "empty", "--to", target)
    assert "ends neither with .html nor with .md" in refused(capsys, "--to", "page.pdf")
    (out / "full_sft_32.pth").write_bytes(b"no weights")
    assert "full_sft_32.pth" in refused(capsys, *flags, "--weight", "full_sft")
    assert not target.exists()
    (tmp_path / "file").write_text("")
    assert refused(
        capsys, *flags[:2], "--to", tmp_path / "file/p.html", "--samples", "0", "--weight", "pretrain"
    )
