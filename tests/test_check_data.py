import json
import subprocess
import sys

import pytest
from data_helpers import REPO, assistant, chat, repo_tokenizer, user, write_jsonl

from dataset import check_data
from dataset.lm_dataset import load_pretrain, load_sft

TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}])
PAIR = {"chosen": [user("q"), assistant("good one")], "rejected": [user("q"), assistant("bad")]}
AGENT = {
    "conversations": [{"role": "system", "content": "", "tools": TOOLS}, user("q"), assistant("")],
    "gt": ["1"],
}


def check(capsys, *arguments):
    """Exit code, report and printed text."""
    out = check_data.main(check_data.parse_args([*map(str, arguments), "--json", "-"]))
    report = json.loads(capsys.readouterr().out)
    return out, report, check_data.render(report) if isinstance(report, dict) else None


def test_every_format_is_recognised(tmp_path, capsys):
    rows = {
        "pretrain": {"text": "some text"},
        "sft": chat("q", "a"),
        "dpo": PAIR,
        "rlaif": chat("q", "无"),
        "agent": AGENT,
    }
    for kind, row in rows.items():
        code, report, text = check(capsys, write_jsonl(tmp_path / f"{kind}.jsonl", [row] * 3))
        assert (code, report["format"], report["rows"], report["bad_rows"]) == (0, kind, 3, 0)
        assert report["duplicate_rows"] == 2 and report["tokens"]["total"] > 0
        assert f"format {kind}" in text and "errors         none" in text


def test_every_bad_row_is_listed_with_its_line(tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    good, other = json.dumps(chat("q", "a")), json.dumps({"text": "x"})
    lines = [good, "", '{"conversations": []}', "{", other, good]
    file.write_bytes("\n".join(lines).encode() + b'\n{"conversations": "\xff"}\n')
    code, report, text = check(capsys, file)
    assert code == 1 and report["rows"] == 6 and report["bad_rows"] == 4
    assert [error["line"] for error in report["errors"]] == [3, 4, 5, 7]
    assert "bad.jsonl:7: not UTF-8" in text
    code, report, text = check(capsys, file, "--max_listed", 1)
    assert report["bad_rows"] == 4 and len(report["errors"]) == 1 and "and 3 more" in text


def test_the_layout_is_what_training_gets(tmp_path, capsys):
    documents = write_jsonl(tmp_path / "p.jsonl", [{"text": "word " * n} for n in range(1, 300, 7)])
    rows = [chat("q " * n, "a " * n, "more", "b " * 3 * n) for n in range(1, 90)]
    chats = write_jsonl(tmp_path / "s.jsonl", rows)
    for load, file in ((load_pretrain, documents), (load_sft, chats)):
        _, report, text = check(capsys, file, "--max_seq_len", 128)
        layout = report["at_max_seq_len"]
        for pack, name in ((True, "packed"), (False, "unpacked")):
            train = load(file, repo_tokenizer(), 128, pack=pack)[0].report()
            assert layout[name]["rows"] == train["rows"]
            assert layout[name]["padding_percent"] == pytest.approx(train["padding_percent"])
        kept = ("kept_percent", "kept_target_percent")
        for key in (*kept, "cut_documents", "dropped_documents", "split_documents"):
            assert layout[key] == pytest.approx(train[key]), key
        assert report["tokens"]["total"] == train["source_tokens"]
        assert report["tokens"]["targets"] == train["source_targets"]
        assert f"{layout['packed']['rows']:,} rows" in text


def test_figures_by_hand(tmp_path, capsys):
    rows = [chat("你好吗", "我很好"), chat("hello", "hi there", "and", "more"), chat("hello", "")]
    rows.append(chat("1+1", "2"))
    rows[0]["conversations"][1]["reasoning_content"] = "想"
    _, report, text = check(capsys, write_jsonl(tmp_path / "a.jsonl", rows), "--format", "sft")
    assert report["messages"] == {"user": 5, "assistant": 5, "assistant with reasoning": 1}
    assert report["user_turns"] == {"1": 3, "2": 1}
    assert report["languages"] == {"en": 2, "zh": 1, "none": 1}
    assert [w["message"] for w in report["warnings"]] == ["all answers are empty"]
    assert "note           1 rows: all answers are empty (first: line 3)" in text


def test_preference_pairs_are_compared(tmp_path, capsys):
    other_prompt = {"chosen": PAIR["chosen"], "rejected": [user("r"), assistant("bad")]}
    equal = {"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]}
    no_answer = {"chosen": PAIR["chosen"][:1] * 2, "rejected": PAIR["rejected"]}
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR, other_prompt, equal, PAIR, no_answer])
    code, report, _ = check(capsys, file)
    assert code == 1 and [e["line"] for e in report["errors"]] == [2, 3, 5]
    assert "all but their last message must be the same" in report["errors"][0]["message"]
    assert "are the same answer" in report["errors"][1]["message"]
    notes = {w["message"]: w["rows"] for w in report["warnings"]}
    assert notes == {"pairs whose chosen answer is the longer one": 2}


def test_agent_rows_without_tools_or_expected_values_are_noted(tmp_path, capsys):
    no_tools = {"conversations": [user("q"), assistant("")], "gt": ["1"]}
    rows = [AGENT, {**AGENT, "gt": []}, no_tools, {**AGENT, "gt": "1"}]
    code, report, _ = check(capsys, write_jsonl(tmp_path / "a.jsonl", rows))
    assert code == 1 and report["errors"][0]["line"] == 4
    notes = {w["message"] for w in report["warnings"]}
    assert notes == {"gt is empty: no reward can be computed", "no tools"}


def test_odd_texts_are_noted(tmp_path, capsys):
    rows = [{"text": "a \ufffd b"}, {"text": "<|im_end|>"}, {"text": " "}, {"text": "fine"}]
    _, report, _ = check(capsys, write_jsonl(tmp_path / "a.jsonl", rows))
    assert sum(w["rows"] for w in report["warnings"]) == 3 and len(report["warnings"]) == 3


def test_several_files_options_and_errors(tmp_path, capsys):
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 5)
    code, reports, _ = check(capsys, one, one, "--no_tokens")
    assert code == 0 and len(reports) == 2 and "tokens" not in reports[0]
    assert "tokens" not in check_data.render(reports[0]).replace("--no_tokens", "")
    with pytest.raises(SystemExit, match="missing.jsonl does not exist"):
        check_data.main(check_data.parse_args([str(tmp_path / "missing.jsonl")]))
    with pytest.raises(SystemExit, match="not a tokenizer folder"):
        check_data.main(check_data.parse_args([str(one), "--tokenizer", str(tmp_path)]))


def test_the_command_prints_a_report_in_any_locale_and_exits_1_on_errors(tmp_path):
    unknown_role = {"conversations": [{"role": "机器人", "content": "x"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [chat("你好", "😀"), unknown_role])
    script = str(REPO / "dataset" / "check_data.py")
    command = [sys.executable, script, str(file), "--json", str(tmp_path / "r.json")]
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert b"a.jsonl:2: message 1 has role" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["bad_rows"] == 1
