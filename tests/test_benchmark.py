"""Benchmarks: files of every kind and their mistakes, prompts, figures, and the whole command."""

import json
import math
import types

import pytest
import torch

from dataset.rows import DataError
from model.model_minimind import MiniMindConfig, MiniMindLM
from scripts import benchmark_report as report
from scripts import benchmark_tasks as tasks_of
from scripts import eval_benchmark, lm_eval_minimind
from scripts.benchmark_tasks import Item, Task, read_tasks
from trainer import checkpoint, cli

UNIFORM = {"id": "a-1", "benchmark": "demo", "subject": "s", "question": "1 + 1 =", "choices": ["1", "2"]}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

FLAT = "question,A,B,C,D,answer"
ROW = 'Which?,one,"two, too",three,four,B'
FORMATS = {
    "uniform.jsonl": lines({**UNIFORM, "choices": ["one", "two, too", "three", "four"], "answer": "B"}),
    "uniform.json": json.dumps([{"question": "Which?", "choices": list("wxyz"), "answer": "B"}], indent=1),
    "ceval.csv": f"id,{FLAT},explanation\n0,{ROW},because\n",
    "cmmlu.csv": ",Question,A,B,C,D,Answer\n0,Which?,one,two,three,four,B\n",  # A-CLUE has the same columns
    "mmlu.csv": 'Which?,one,"two\nlines",three,four,B\n',
    "uniform.csv": 'question,choices,answer\nWhich?,"[""w"", ""x""]",b\n',
    "five.csv": "question,A,B,C,D,E,answer\nWhich?,w,x,y,z,,B\n",
    "tmmlu.csv": "\ufeff" + f"{FLAT}\n{ROW}\n",
    "arc.jsonl": lines(
        {
            "id": "M1",
            "question": {
                "stem": "Which?",
                "choices": [{"text": c, "label": d} for c, d in zip("wxyz", "1234")],
            },
            "answerKey": "2",
        }
    ),
    "arc_hf.jsonl": lines(
        {"question": "Which?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"}
    ),
    "obqa_hf.jsonl": lines(
        {
            "question_stem": "Which?",
            "choices": {"text": list("wxyz"), "label": list("ABCD")},
            "answerKey": "B",
        }
    ),
    "mmlu_hf.jsonl": lines({"question": "Which?", "subject": "s", "choices": list("wxyz"), "answer": 1}),
    "piqa_hf.jsonl": lines({"goal": "Which?", "sol1": "w", "sol2": "x", "label": 1}),
    "siqa_hf.jsonl": lines(
        {"context": "So.", "question": "Which?", "answerA": "w", "answerB": "x", "answerC": "y", "label": "2"}
    ),
    "hellaswag.jsonl": lines({"ctx": "Which?", "endings": list("wxyz"), "label": "1"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_of_the_benchmarks(tmp_path, name):
    (task,) = read_tasks(put(tmp_path / name, FORMATS[name]))
    (item,) = task.items
    assert item.answer == 1 and len(item.choices) in (2, 3, 4) and task.kind == "choice"
    assert item.question in ("Which?", "So. Which?", "1 + 1 =")
    assert item.choices[1] in ("x", "two", "two, too", "two\nlines")


def test_numbers_are_asked_for_without_choices(tmp_path):
    rows = lines(
        {"question": "How many?", "answer": "He has 1,0<<1*18=18>>18.\n#### 1,018"},
        {"id": "g", "benchmark": "demo", "question": "And?", "answer": "18.0"},
    )
    gsm, uniform = read_tasks(put(tmp_path / "gsm8k_test.jsonl", rows))
    assert (gsm.name, gsm.kind, uniform.name) == ("gsm8k", "generation", "demo")
    assert gsm.items[0].answer == "1018" and gsm.items[0].solution.endswith("#### 1,018")
    assert uniform.items[0].answer == "18" and uniform.items[0].solution == "#### 18"


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "Which?", "choices": list("wxyz"), "answer": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    (task,) = read_tasks(str(tmp_path))
    assert task.items[0].answer == 2 and task.name == tmp_path.name


def test_a_folder_is_a_task_with_a_subject_per_file(tmp_path):
    for subject in ("law", "art"):
        for split in ("test", "dev"):
            put(tmp_path / "exam" / f"{subject}_{split}.csv", f"{FLAT}\n{ROW}\n")
    (task,) = read_tasks(str(tmp_path / "exam"))
    assert task.name == "exam" and [item.subject for item in task.items] == ["art", "law"]
    assert all("_test" in file for file in task.files)


def test_files_that_name_their_benchmark_are_tasks(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / f"{name}.jsonl", lines({**UNIFORM, "benchmark": name, "answer": "A"}))
    assert [task.name for task in read_tasks(str(tmp_path))] == ["a", "b"]


GOOD = {**UNIFORM, "answer": "B"}
MALFORMED = {
    "not JSON": (lines(GOOD) + "{oops\n", ":2: not JSON"),
    "no object": (lines(GOOD) + "[1]\n", ":2: a JSON object is expected"),
    "no question": (lines({"choices": ["a", "b"], "answer": "A"}), ':1: the key "question" is missing'),
    "empty question": (lines({**GOOD, "question": " "}), ":1: the question is empty"),
    "question is a list": (lines({**GOOD, "question": [1]}), ":1: the question must be a text"),
    "one choice": (lines({**GOOD, "choices": ["a"]}), "must be a list of 2 to 26 texts, this one has 1"),
    "choices are text": (lines({**GOOD, "choices": "ab"}), "is a text that is no JSON list"),
    "choices are a number": (lines({**GOOD, "choices": 2}), "this one is no list"),
    "null choice": (lines({**GOOD, "choices": ["a", None]}), "choice B must be a text, this is null"),
    "empty choice": (lines({**GOOD, "choices": ["a", ""]}), "choice B is empty"),
    "broken text": ('{"question": "\\ud800", "choices": ["a", "b"], "answer": "A"}\n', "half a surrogate"),
    "no answer": (lines(UNIFORM), ":1: it has no answer"),
    "answer out of range": (lines({**GOOD, "answer": "C"}), "the answer is 'C', which is none of A, B"),
    "number out of range": (lines({**GOOD, "answer": 2}), "the answer is 2, which is none of A, B"),
    "answer is a list": (lines({**GOOD, "answer": ["A"]}), "the answer is ['A'], which is none of"),
    "answer true": (lines({**GOOD, "answer": True}), "the answer is True, which is none of"),
    "no number": (lines({"question": "?", "answer": "many"}), "must be a number or end with '#### number'"),
    "mixed": (
        lines(GOOD, {"benchmark": "demo", "question": "?", "answer": 5}),
        ":2: it has no choices, unlike",
    ),
    "labels missing": (
        lines({"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}),
        "2 choices need as many labels",
    ),
    "empty file": ("", "is empty"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_row_gets_one_sentence(tmp_path, what):
    text, sentence = MALFORMED[what]
    file = put(tmp_path / "exam.jsonl", text)
    with pytest.raises(DataError) as error:
        read_tasks(file)
    assert sentence in str(error.value) and str(error.value).startswith(file)


MALFORMED_CSV = {
    "cells missing": (f"{FLAT}\n{ROW}\nWhich?,one,two\n", ":3: 3 cells where 6 are expected"),
    "quote not closed": (f'{FLAT}\n"Which?,one,two,three,four,B\n{ROW}\n', ":2: "),
    "no header": ("a,b\nc,d\n", ":1: the first line must name the columns"),
    "lines count": (f'{FLAT}\n"Two\nlines",a,b,c,d,A\nWhich?,a,b,c,d,E\n', ":4: the answer is 'E'"),
    "no answer": (f"{FLAT}\nWhich?,a,b,c,d,\n", ":2: it has no answer"),
    "choice missing": (f"{FLAT}\nWhich?,a,b,c,,A\n", ":2: choice D is empty"),
    "column missing": ("question,A,B,D,answer\nWhich?,a,b,c,A\n", "its choices are A, B, D"),
    "only a header": (f"{FLAT}\n", "holds no rows"),
}


@pytest.mark.parametrize("what", MALFORMED_CSV)
def test_a_malformed_csv_gets_one_sentence(tmp_path, what):
    text, sentence = MALFORMED_CSV[what]
    file = put(tmp_path / "exam.csv", text)
    with pytest.raises(DataError) as error:
        read_tasks(file)
    assert sentence in str(error.value) and str(error.value).startswith(file)


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "exam.csv").write_bytes(f"{FLAT}\n{ROW}\n什么？,a,b,c,d,A\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"exam\.csv:3: not UTF-8"):
        read_tasks(str(tmp_path / "exam.csv"))


def test_many_malformed_rows_get_a_sentence_each(tmp_path):
    bad = [{**GOOD, "answer": "Z"}, {**GOOD, "choices": []}]
    file, said = put(tmp_path / "exam.jsonl", lines(GOOD, *bad, GOOD)), []
    with pytest.raises(DataError, match="2 rows cannot be used, the first is .*:2: .*--skip_bad_rows 1"):
        read_tasks(file, complain=said.append)
    assert [line.split(": ")[0] for line in said] == [f"{file}:2", f"{file}:3"]
    (task,) = read_tasks(file, skip_bad_rows=True)
    assert len(task.items) == 2 and task.bad_rows == 2


def test_places_that_hold_no_task(tmp_path):
    (tmp_path / "exam" / "val").mkdir(parents=True)
    put(tmp_path / "exam.txt", "?")
    for place, why in (
        ("exam", "has the folders val: give one"),
        ("none", "does not exist"),
        ("exam.txt", "none of"),
    ):
        with pytest.raises(DataError, match=why):
            read_tasks(str(tmp_path / place))


def fake_hub(monkeypatch, load, subsets=("law", "art")):
    module = types.SimpleNamespace(load_dataset=load, get_dataset_config_names=lambda repo: list(subsets))
    monkeypatch.setitem(__import__("sys").modules, "datasets", module)


def test_hugging_face_data_sets(monkeypatch):
    asked = []

    def load(repo, subset, split):
        asked.append((repo, subset, split))
        return [{"question": "Which?", "A": "w", "B": "x", "answer": "B"}]

    fake_hub(monkeypatch, load)
    (task,) = read_tasks("owner/exam:*:val")
    assert asked == [("owner/exam", "law", "val"), ("owner/exam", "art", "val")]
    assert task.name == "exam" and [item.subject for item in task.items] == ["law", "art"]
    assert read_tasks("owner/exam:law:test")[0].name == "exam_law"
    read_tasks("owner/exam")
    assert asked[-1] == ("owner/exam", None, "test")


def test_no_network_is_one_sentence(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/exam' on the Hub\nwith details")

    fake_hub(monkeypatch, load)
    with pytest.raises(DataError) as error:
        read_tasks("owner/exam")
    assert "cannot be fetched from Hugging Face (Couldn't reach 'owner/exam' on the Hub)" in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Prompts and numbers
# ------------------------------------------------------------------------------------------------------------


def exam(count, subjects=("s", "t"), name="exam"):
    """Questions of which each subject has the same number; every fifth stands there twice."""
    items = [
        Item(str(i), f"{subject} question {i - (i % 5 == 4)}?", ["yes", "no"], i % 2, subject)
        for i in range(count)
        for subject in subjects
    ]
    return Task(name, items, [f"{name}.jsonl"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", (1, 3, 6))
def test_no_item_is_its_own_example(count, seed):
    task = exam(10)
    for item, examples in zip(task.items, tasks_of.few_shot(task, count, seed)):
        assert len(examples) == count and all(e.subject == item.subject for e in examples)
        assert item.question not in [e.question for e in examples]
        assert len({id(e) for e in examples}) == count


def test_examples_are_shared_and_repeat():
    task = exam(20, ("s",))
    examples = tasks_of.few_shot(task, 4)
    assert examples == tasks_of.few_shot(task, 4) != tasks_of.few_shot(task, 4, seed=1)
    assert len({tuple(e.id for e in found) for found in examples}) <= 4  # what can be shared is read once


def test_examples_from_elsewhere():
    task, pool = exam(4), [Item("p", f"other {i}?", ["a", "b"], 0, "s") for i in range(3)]
    for examples in tasks_of.few_shot(task, 2, pool=pool):
        assert [e.question for e in examples] == ["other 0?", "other 1?"]
    with pytest.raises(DataError, match="has 3 examples for item 0, not 5: give a smaller --fewshot"):
        tasks_of.few_shot(task, 5, pool=pool)


def test_prompts():
    item, example = Item("1", " Q? ", ["yes", "no"], 1, "s"), Item("2", "E?", ["a", "b"], 0, "s")
    assert tasks_of.context(item, "letter", "en", [example]) == (
        "E?\nA. a\nB. b\nAnswer: A\n\nQ?\nA. yes\nB. no\nAnswer:"
    )
    assert tasks_of.context(item, "option", "zh", [example]) == "问题：E?\n答案： a\n\n问题： Q? \n答案："
    solved = Item("3", "How many?", [], "18", "s", "9 + 9 = 18\n#### 18")
    assert tasks_of.context(solved, "generate", "en", [solved]).startswith(
        "Question: How many?\nAnswer: 9 + 9 = 18\n#### 18\n\nQuestion: How many?\nAnswer:"
    )
    assert Task("t", [Item("1", "天空是什么颜色", ["a", "b"], 0, "s"), item, item]).language == "en"


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 9 + 9 = 18.\n#### 18", "18"),
        ("#### $1,018.00\nQuestion: 7", "1018"),
        ("It costs $1,234.50.", "1234.5"),
        ("He has 3 left, so -4.", "-4"),
        ("\\boxed{72}", "72"),
        ("答案是 0.50 元", "0.5"),
        ("in 2024: .5", "0.5"),
        ("####\n", None),
        ("none at all", None),
        ("1e5 is written 100000", "100000"),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert tasks_of.answered_number(text) == number


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def records(*rights):
    return [{"subject": "s", "acc": bool(r), "acc_norm": bool(r)} for r in rights]


def test_interval_of_a_share():
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263 and 0 of 20."""
    found = report.shares(records(*[1] * 81, *[0] * 182), ["acc"])["intervals"]["acc"]
    assert found == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert report.shares(records(*[0] * 20), ["acc"])["intervals"]["acc"] == pytest.approx(
        [0, 0.1611], abs=1e-4
    )


def test_verdicts():
    assert report.verdict([0.26, 0.30], 0.25) == "above chance"
    assert report.verdict([0.20, 0.24], 0.25) == "below chance"
    assert report.verdict([0.24, 0.26], 0.25) == "no different from chance"


def test_two_weights_on_the_same_items():
    first, second = records(*[1] * 20, *[0] * 9, *[1] * 1, *[0] * 10), records(*[1] * 29, *[0] * 11)
    c = report.compare(first, second, "acc")
    assert (c["gained"], c["lost"]) == (9, 1) and c["difference"] == pytest.approx(0.2)
    assert c["p"] == pytest.approx(2 * (1 + 10) / 2**10)
    half = 1.96 * math.sqrt((10 - 64 / 40) / 40**2)
    assert c["interval"] == pytest.approx([0.2 - half, 0.2 + half])
    assert report.compare(first, first, "acc")["p"] == 1.0


def test_means_count_tasks_alike():
    entries = [
        {"kind": "choice", "rule": "option", "n": n, "random": r, "metrics": {"acc": a, "acc_norm": a}}
        for n, r, a in ((10, 0.25, 0.2), (1000, 0.5, 0.6))
    ]
    (mean,) = report.means([*entries, {"kind": "tools"}]).values()
    assert mean["acc"][0] == pytest.approx(0.4) and mean["random"] == pytest.approx(0.375)
    half = 1.96 / 2 * math.sqrt(0.16 / 10 + 0.24 / 1000)
    assert mean["acc"][2] - mean["acc"][1] == pytest.approx(2 * half)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two small models of random weights: pretrain_32 and full_sft_32."""
    folder = tmp_path_factory.mktemp("out")
    for seed, stage in enumerate(("pretrain", "full_sft")):
        torch.manual_seed(seed)
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        model = MiniMindLM(MiniMindConfig(**shape))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        checkpoint.save_weights(model, folder / f"{stage}_32.pth", {"stage": stage})
    return folder


def run(weights, *flags):
    cli.run(eval_benchmark.main, eval_benchmark.parse_args, ["--save_dir", str(weights), *flags])


def exam_file(folder, name, count=12, choices=3):
    rows = [
        {
            "id": str(i),
            "benchmark": name,
            "subject": f"s{i % 2}",
            "question": f"{name} {i}?",
            "choices": [f"answer {i * c} of {name}" for c in range(2, 2 + choices)],
            "answer": "ABC"[i % choices],
        }
        for i in range(count)
    ]
    return put(folder / f"{name}.jsonl", lines(*rows))


def test_the_whole_command(weights, tmp_path, capsys):
    files = ",".join(exam_file(tmp_path, name) for name in ("one", "two", "three"))
    numbers = put(tmp_path / "sums.jsonl", lines(*({"question": f"{i} + 1?", "answer": i} for i in (1, 2))))
    text = put(tmp_path / "text.txt", "Some text. 一些文字。")
    flags = ["--tasks", f"{files},{numbers}", "--text", text, "--rule", "option,letter", "--by_subject"]
    flags += [
        "--samples",
        str(tmp_path / "s.jsonl"),
        "--plot",
        str(tmp_path / "p.png"),
        "--max_new_tokens",
        "5",
    ]
    run(weights, "--weight", "pretrain,full_sft", "--fewshot", "1", *flags)
    out = capsys.readouterr().out
    result = json.loads((weights / "eval" / "full_sft_32.json").read_text(encoding="utf-8"))
    assert result["format"] == 1 and result["weights"]["stage"] == "full_sft"
    kinds = [(e["name"], e["kind"], e["n"]) for e in result["tasks"]]
    assert kinds[:2] == [("one", "choice", 12), ("one letter", "choice", 12)]
    assert kinds[-2:] == [("sums", "generation", 2), ("text", "bits_per_byte", 1)]
    one = result["tasks"][0]
    assert one["random"] == pytest.approx(1 / 3) and one["sha256"] and list(one["subjects"]) == ["s0", "s1"]
    low, high = one["intervals"]["acc"]
    assert 0 <= low <= one["metrics"]["acc"] <= high <= 1
    assert set(result["means"]) == {"option", "letter"} and result["means"]["letter"]["tasks"] == 3
    assert set(result["compared_with"]["tasks"]) == {e["name"] for e in result["tasks"][:-1]}
    assert "| full_sft_32 | one | 12 |" in out and "full_sft_32 - pretrain_32, one: acc_norm" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 2 * (6 * 12 + 2)
    mean = sum(s["acc"] for s in samples if s["weights"] == "full_sft_32" and s["task"] == "one") / 12
    assert mean == pytest.approx(one["metrics"]["acc"])
    runs = (weights / "eval" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in runs[-2:]] == ["pretrain_32", "full_sft_32"]
    assert not list((weights / "eval").glob(".*"))


def test_scores_are_those_of_the_plain_way(weights, tmp_path):
    """Every choice's log-likelihood from one forward pass of its own, and what is right from these."""
    file = exam_file(tmp_path, "plain", 6)
    run(weights, "--weight", "full_sft", "--tasks", file, "--samples", str(tmp_path / "s.jsonl"))
    tokenizer = checkpoint.load_tokenizer()
    model, _ = checkpoint.load_model(weights / "full_sft_32.pth", tokenizer)
    for row, line in zip(
        read_tasks(file)[0].items, (tmp_path / "s.jsonl").read_text().splitlines(), strict=True
    ):
        sample, start = json.loads(line), tokenizer(f"Question: {row.question}\nAnswer:").input_ids
        found = []
        for choice in row.choices:
            ids = tokenizer(f"Question: {row.question}\nAnswer: {choice}").input_ids
            with torch.inference_mode():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        assert sample["log_likelihoods"] == pytest.approx(found, abs=1e-4)
        assert sample["acc"] == (max(range(3), key=found.__getitem__) == row.answer)
        norm = [score / len(choice) for score, choice in zip(found, row.choices)]
        assert sample["acc_norm"] == (max(range(3), key=norm.__getitem__) == row.answer)


def test_chat_and_bos_change_the_prompt(weights, tmp_path):
    file, scores = exam_file(tmp_path, "chat", 4), []
    for flags in ([], ["--chat", "1"], ["--add_bos_token", "1"], ["--max_length", "8"]):
        run(weights, "--weight", "full_sft", "--tasks", file, "--samples", str(tmp_path / "s.jsonl"), *flags)
        scores.append([json.loads(line)["log_likelihoods"] for line in (tmp_path / "s.jsonl").open()])
    assert all(scores[i] != scores[j] for i in range(4) for j in range(i))
    assert json.loads((weights / "eval" / "full_sft_32.json").read_text())["tasks"][0]["cut"] == 12


def test_num_items_is_a_fixed_choice(weights, tmp_path):
    file, ids = exam_file(tmp_path, "some", 30), []
    for _ in range(2):
        run(weights, "--tasks", file, "--num_items", "5", "--samples", str(tmp_path / "s.jsonl"))
        ids.append([json.loads(line)["id"] for line in (tmp_path / "s.jsonl").open()])
    assert ids[0] == ids[1] and len(set(ids[0])) == 5 and ids[0] != list("01234")


def test_what_is_known_is_written_before_the_end(weights, tmp_path, monkeypatch):
    """A task that fails costs what is not done yet, and no file is half written."""
    numbers = put(tmp_path / "sums.jsonl", lines({"question": "1 + 1?", "answer": 2}))
    monkeypatch.setattr(eval_benchmark, "ask_numbers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(weights, "--weight", "pretrain", "--tasks", f"{exam_file(tmp_path, 'first')},{numbers}")
    result = json.loads((weights / "eval" / "pretrain_32.json").read_text(encoding="utf-8"))
    assert [e["name"] for e in result["tasks"]] == ["first"]


def test_tools(weights):
    run(weights, "--weight", "full_sft", "--tools", "1", "--max_new_tokens", "4")
    (entry,) = json.loads((weights / "eval" / "full_sft_32.json").read_text(encoding="utf-8"))["tasks"]
    assert entry["kind"] == "tools" and set(entry["metrics"]) == {"right", "called", "ended"}


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tasks", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--tasks", "{bad}"], "bad.jsonl:1: it has no answer"),
        (["--tasks", "{good},{good}"], "two tasks are called good"),
        (["--tasks", "{good}", "--fewshot", "50"], "has 5 examples for item"),
        (["--tasks", "{good}", "--weight", "nothing"], "does not exist"),
        (["--tasks", "{good}", "--max_length", "2"], "does not fit into 2; give a larger --max_length"),
        ([], "nothing to measure"),
        (["--tasks", "{good}", "--rule", "best"], "must be option, letter or option,letter"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_mistakes_get_one_line(weights, tmp_path, capsys, flags, sentence):
    files = {"bad": put(tmp_path / "bad.jsonl", lines(UNIFORM)), "good": exam_file(tmp_path, "good")}
    with pytest.raises(SystemExit) as end:
        run(weights, *[flag.format(**files) for flag in flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and sentence in err[-1]


def test_pictures(tmp_path):
    entry = {"kind": "choice", "rule": "option", "random": 0.25, "n": 9}
    entry |= {"metrics": {"acc_norm": 0.3}, "intervals": {"acc_norm": [0.2, 0.5]}}
    for count in (1, 4):
        results = [{"name": "w", "tasks": [{**entry, "name": f"t{i}"} for i in range(count)]}]
        assert report.draw(results, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")
    assert not report.draw(
        [{"name": "w", "tasks": [{"kind": "tools", "name": "tools"}]}], tmp_path / "no.png"
    )


# ------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness
# ------------------------------------------------------------------------------------------------------------


def test_without_lm_eval_one_sentence(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(SystemExit) as end:
        cli.run(lm_eval_minimind.main, lambda argv: argv, [])
    assert end.value.code == 2 and "pip install lm_eval" in capsys.readouterr().err


def test_settings_of_generation():
    asked = {"until": ["\n\n", ""], "max_gen_toks": 32, "do_sample": False, "temperature": 0.7}
    assert lm_eval_minimind.sampling(asked) == {"max_new_tokens": 32, "temperature": 0.0, "stop": ("\n\n",)}
    assert lm_eval_minimind.sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == {
        "max_new_tokens": 256,
        "temperature": 0.7,
        "stop": (),
        "top_p": 0.9,
    }


def test_model_args_are_flags_of_eval_llm(weights):
    from trainer.checkpoint import CheckpointError

    native = lm_eval_minimind.load({"weight": "full_sft", "save_dir": str(weights), "device": None})
    assert native.path.name == "full_sft_32.pth" and native.engine.dtype == torch.float32
    with pytest.raises(CheckpointError, match="wieght is no flag"):
        lm_eval_minimind.load({"wieght": "full_sft"})
