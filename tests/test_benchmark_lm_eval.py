"""The same numbers as lm-evaluation-harness, item by item: its own model of transformers on the exported
folder, our adapter, and its client of servers on ours. Runs where it is installed:

pip install "lm_eval[api]==0.4.13" accelerate
python -m pytest -m slow tests/test_benchmark_lm_eval.py
"""

import json

import pytest
from serve_helpers import LiveServer, small_native

from model.generation import Generator
from scripts import benchmark_tasks as tasks_of
from scripts import eval_benchmark, lm_eval_minimind
from scripts.convert_hf import write_folder
from trainer import checkpoint
from trainer.cli import ROOT

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval")

ROWS = [
    {"id": str(i), "question": q, "choices": choices, "answer": "ABC"[i % 3]}
    for i, (q, choices) in enumerate(
        [
            ("What is hot?", ["the sun", "ice", "a cold drink of water"]),
            ("天空是什么颜色？", ["蓝色", "红色的", "没有颜色可以说"]),
            ("2 + 2 =", ["4", "5", "twenty-two"]),
            ("Which one barks?", ["a dog", " the cat", "no animal does"]),
        ]
        * 3
    )
]
PROMPTS = {
    "option": ("Question: {{question}}\nAnswer:", "{{choices}}"),
    "letter": (
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
        ["A", "B", "C"],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the same small model as weight file and transformers folder, and the questions."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = small_native(is_base=True, seed=1).engine.model
    checkpoint.save_weights(model, folder / "pretrain_32.pth", {"stage": "pretrain"})
    write_folder(model, ROOT / "model", folder / "hf", "float32")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (folder / "exam.jsonl").write_text(rows, encoding="utf-8")
    return folder


def theirs(model, place, rule, **more) -> list[list[float]]:
    """Log-likelihoods of every choice, by lm_eval's own evaluation of a local task."""
    text, choices = PROMPTS[rule]
    task = {
        "task": f"exam_{rule}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "exam.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": "{{'ABC'.index(answer)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0, **more)
    samples = sorted(found["samples"][task["task"]], key=lambda s: int(s["doc"]["id"]))
    return [([float(r[0]) for r in s["filtered_resps"]], s["acc"], s["acc_norm"]) for s in samples]


def ours(place, rule, *flags):
    args = eval_benchmark.parse_args(
        ["--save_dir", str(place), "--weight", "pretrain", "--tasks", "x", *flags]
    )
    native = eval_benchmark.load(args, "pretrain")
    (task,) = tasks_of.read_tasks(str(place / "exam.jsonl"))
    records, _ = eval_benchmark.ask_choices(native, task, rule=rule, args=args)
    return [(r["log_likelihoods"], float(r["acc"]), float(r["acc_norm"])) for r in records]


def alike(a, b):
    assert len(a) == len(b) == len(ROWS)
    for (logs, *decisions), (others, *same) in zip(a, b):
        assert logs == pytest.approx(others, abs=1e-3) and decisions == same


@pytest.mark.parametrize("rule", PROMPTS)
def test_transformers(place, rule):
    from lm_eval.models.huggingface import HFLM

    theirs_model = HFLM(pretrained=str(place / "hf"), dtype="float32", device="cpu", batch_size=3)
    alike(ours(place, rule), theirs(theirs_model, place, rule))
    alike(ours(place, rule, "--chat", "1"), theirs(theirs_model, place, rule, apply_chat_template=True))


@pytest.mark.parametrize("rule", PROMPTS)
def test_our_adapter(place, rule):
    model = lm_eval_minimind.register()(weight="pretrain", save_dir=str(place))
    alike(ours(place, rule), theirs(model, place, rule))
    alike(ours(place, rule, "--chat", "1"), theirs(model, place, rule, apply_chat_template=True))


@pytest.mark.parametrize("rule", PROMPTS)
def test_our_server(place, rule):
    """Prompts are sent as token ids, lm_eval's default: the server adds the bos token to texts."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with LiveServer() as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="text",
            tokenizer=str(place / "hf"),
            tokenizer_backend="huggingface",
        )
        alike(ours(place, rule), theirs(client, place, rule))


def test_rolling_and_generation(place):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    mine = lm_eval_minimind.register()(weight="pretrain", save_dir=str(place), max_length=32)
    other = HFLM(pretrained=str(place / "hf"), dtype="float32", device="cpu", batch_size=3, max_length=32)
    texts = ["A text that is longer than the window of tokens. " * 5, "短", "Hello"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    assert mine.loglikelihood_rolling(asked) == pytest.approx(other.loglikelihood_rolling(asked), abs=1e-2)
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts[1:])]
    assert mine.generate_until(asked) == other.generate_until(asked)
    assert isinstance(mine.engine, Generator)
