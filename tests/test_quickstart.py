"""The quickstart's own parts: reading pins, the report of one run and of several."""

import json

import pytest

from scripts import bootstrap, quickstart


def ledger(seed, after):
    rows = [
        {"stage": "pretrain", "metric": "bits_per_byte", "before": 4.6, "after": 0.5, "items": None},
        {"stage": "full_sft", "metric": "sums", "before": 0.0, "after": after, "items": 600},
    ]
    stage = {"title": "t", "seconds": 10.0, "tokens": 1000, "tokens_per_s": 100.0, "peak_memory_gb": 1.0}
    return {
        "seed": seed,
        "seconds": 12.0,
        "machine": {"system": "Linux x86_64", "threads": 2, "torch": "2.13.0"},
        "rows": rows,
        "stages": {"pretrain": stage, "full_sft": stage},
        "gain_of_pretraining": {"facts_unasked": after - 0.5},
        "conversations": {
            "en": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        },
    }


def test_the_report_of_one_run_shows_before_and_after():
    text = quickstart.report([ledger(1, 0.9)])
    assert "| 4.600 | **0.500** |" in text and "| 0.0 % | **90.0 %** | 600 |" in text
    assert "never asked: +40.0" in text and "**MiniMind**: Hello!" in text


def test_a_platform_that_tells_no_peak_memory_gets_its_report():
    without = ledger(1, 0.9)
    without["stages"]["pretrain"]["peak_memory_gb"] = None
    assert "| unknown |" in quickstart.report([without])


def test_the_report_of_several_runs_shows_mean_and_spread():
    text = quickstart.report([ledger(1, 0.9), ledger(2, 1.0)])
    assert "**95.0 % ± 7.1 %**" in text and "Seeds: 1, 2." in text


def test_files_of_a_run_are_written(tmp_path, monkeypatch):
    """Writing the ledger once failed after ten minutes of training: nothing had called it."""
    monkeypatch.setattr(quickstart.bootstrap, "ensure", lambda requirements: None)
    monkeypatch.setattr(
        quickstart, "run_once", lambda folder, seed, stages: folder.mkdir(parents=True) or ledger(seed, 0.9)
    )
    quickstart.main(quickstart.parse_args(["--seeds", "1,2", "--out_dir", str(tmp_path / "q")]))
    assert [x["seed"] for x in json.loads((tmp_path / "q/ledger.json").read_text(encoding="utf-8"))] == [1, 2]
    for name in ("report.md", "seed1/report.md", "seed2/ledger.json"):
        assert (tmp_path / "q" / name).stat().st_size > 0


def test_every_stage_reads_a_file_that_the_curriculum_writes_and_shows_known_metrics():
    from dataset.make_mini import Curriculum  # noqa: F401 - the generator imports without torch

    for stage in quickstart.STAGES:
        assert (quickstart.ROOT / stage.script).exists()
        assert set(stage.shows) <= set(quickstart.NAMES)


def test_pins_are_read_with_comments_and_includes():
    pins = bootstrap.read_pins(bootstrap.ROOT / "requirements-dev.txt")
    assert pins["torch"] == "2.13.0" and "pytest" in pins and "streamlit" in pins
    assert bootstrap.missing({"numpy": pins["numpy"]}) == []
    assert bootstrap.missing({"no-such-package": "1.0"}) == ["no-such-package"]


def test_a_line_that_is_no_pin_is_refused(tmp_path):
    (tmp_path / "r.txt").write_text("numpy>=2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="name==version"):
        bootstrap.read_pins(tmp_path / "r.txt")
