"""The scripts around a model: answers written to a file, adapters merged into a file, the examination."""

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import assistant, chat, user, write_jsonl
from preference_helpers import small_model
from stage_helpers import refused

from model.generation import Completion, Generator
from model.model_lora import LoRAConfig, adapters, add_lora
from scripts import eval_mini, write_answers
from scripts import merge_lora as merge_script
from trainer import checkpoint, cli


def run(script, *flags):
    cli.run(script.main, script.parse_args, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer()


@pytest.fixture(scope="module")
def weight(tmp_path_factory, tokenizer):
    """A model that likes to end: about every other answer is done after some tokens."""
    model, path = small_model(), tmp_path_factory.mktemp("out") / "full_sft_32.pth"
    with torch.no_grad():
        model.model.embed_tokens.weight[model.config.eos_token_id] *= 6
    metadata = {"stage": "full_sft", "step": 7, "tokenizer": checkpoint.tokenizer_hash(tokenizer)}
    checkpoint.save_weights(model, path, metadata)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


# ----------------------------------------------------------------------------------------------------------
# write_answers
# ----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "now", "arguments": "{}"}
QUESTIONS = [
    chat("one", "old answer"),  # format sft: the answer is written anew
    {"conversations": [user("two"), assistant("")]},  # format rlaif: a placeholder
    {"conversations": [{"role": "system", "content": "Be brief."}, user("three"), assistant("x")]},
    {
        "conversations": [
            {"role": "system", "content": "", "tools": json.dumps([TOOL])},
            user("four"),
            assistant("", tool_calls=json.dumps([CALL])),
            {"role": "tool", "content": "12:00"},
            assistant("x"),
        ]
    },
    chat("five", "first", "and then", "x"),
    {"conversations": [user("six"), assistant("<think>\nhm\n</think>\n\nyes"), user("why"), assistant("x")]},
]


def completion(text, finish_reason="eos"):
    return Completion(0, [5, 6], torch.zeros(2), finish_reason, 3, text)


def scripted(monkeypatch, replies, stop_before=None):
    """An engine that gives these answers to the questions, by their place; it remembers what it was asked."""
    asked = []

    def generate(self, prompts, tokenizer, **settings):
        first = len(asked)
        asked.extend(prompts)
        if stop_before is not None and first + len(prompts) > stop_before:
            raise KeyboardInterrupt
        return [completion(*replies(tokenizer.decode(p))) for p in prompts]

    monkeypatch.setattr(Generator, "generate", generate)
    return asked


def answers_of(folder, weight, *more, name="to.jsonl"):
    files = ["--weight", weight, "--data_path", folder / "from.jsonl", "--out_path", folder / name]
    run(write_answers, *files, "--device", "cpu", "--dtype", "float32", "--batch_size", 2, *more)
    return read(folder / name)


def test_answers_of_a_tiny_model_end_to_end(tmp_path, weight, tokenizer, capsys):
    """Those that end by themselves are there, word for word; the others are counted."""
    from dataset.lm_dataset import encode_prompt

    write_jsonl(tmp_path / "from.jsonl", [chat(f"question {n}", "x") for n in range(12)])
    found = answers_of(tmp_path, weight, "--max_new_tokens", 8, "--temperature", 0)
    engine = Generator(checkpoint.load_model(weight)[0], "float32")
    prompts = [encode_prompt(tokenizer, [user(f"question {n}")]) for n in range(12)]
    replies = engine.generate(prompts, tokenizer, max_new_tokens=8, temperature=0)
    wanted = [
        [user(f"question {n}"), assistant(reply.text.strip("\n"))]
        for n, reply in enumerate(replies)
        if reply.finish_reason == "eos" and reply.text.strip("\n")
    ]
    assert [row["conversations"] for row in found] == wanted and 0 < len(wanted) < 12
    assert f"{len(wanted)} answers; {12 - len(wanted)} did not end" in capsys.readouterr().out
    drawn = [answers_of(tmp_path, weight, "--max_new_tokens", 8, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_written_is_the_conversation_with_the_new_answer(tmp_path, weight, monkeypatch):
    """Tools and system message included; and it reads back as the same question."""
    from dataset.rows import iter_rows

    path = write_jsonl(tmp_path / "from.jsonl", QUESTIONS)
    asked = scripted(monkeypatch, lambda prompt: (f"\nanswer {len(prompt)}\n",))
    found = answers_of(tmp_path, weight)
    assert len(asked) == len(found) == len(QUESTIONS)
    pairs = zip(iter_rows(path, "rlaif"), iter_rows(tmp_path / "to.jsonl", "sft"))
    for number, (before, after) in enumerate(pairs):
        (question, tools), (messages, other_tools) = (row[1]["conversations"] for row in (before, after))
        assert tools == other_tools and (tools is not None) == (number == 3)
        if tools:
            assert messages[0] == {"role": "system", "content": ""}
        assert messages[:-1] == question
        assert messages[-1]["content"].startswith("answer ") and messages[-1].keys() == {"role", "content"}
    assert found[2]["conversations"][0] == {"role": "system", "content": "Be brief."}


def test_tools_without_a_system_message_get_one(tmp_path, weight, monkeypatch):
    write_jsonl(tmp_path / "from.jsonl", [{**chat("q", "x"), "tools": [TOOL]}])
    scripted(monkeypatch, lambda prompt: ("ok",))
    (row,) = answers_of(tmp_path, weight)
    system, question, answer = row["conversations"]
    assert system["role"] == "system" and json.loads(system["tools"]) == [TOOL]
    assert (question, answer) == (user("q"), assistant("ok"))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("plain", {"content": "plain"}),
        ("hm\n</think>\n\nyes", {"content": "yes", "reasoning_content": "hm"}),
        ("<think>\nhm\n</think>\n\nyes", {"content": "yes", "reasoning_content": "hm"}),
        ("\n</think>\n\nyes", {"content": "yes"}),
        ("hm\n</think>\n\n", None),
        ("\n\n", None),
    ],
)
def test_thoughts_are_kept_apart(text, wanted):
    row = write_answers.as_row([user("q")], None, completion(text))
    assert row == (wanted and {"conversations": [user("q"), {"role": "assistant", **wanted}]})
    for reason in ("length", "stop"):
        assert write_answers.as_row([user("q")], None, completion(text, reason)) is None


def test_an_interrupted_file_is_gone_on_with(tmp_path, weight, monkeypatch, capsys):
    """Nothing is asked twice, an answer that did not end is not asked for again, and a torn line is."""
    write_jsonl(tmp_path / "from.jsonl", [chat(f"question {n}", "x") for n in range(7)])

    def reply(prompt):
        number = prompt.split("question ")[1][0]
        return (f"answer {number}", "length" if number == "1" else "eos")

    with pytest.raises(SystemExit) as stop:
        scripted(monkeypatch, reply, stop_before=5)
        answers_of(tmp_path, weight)
    assert stop.value.code == 130 and not (tmp_path / "to.jsonl").exists()
    (partial,) = tmp_path.glob(".to.jsonl*")
    lines = partial.read_text(encoding="utf-8")
    assert lines.count("\n") == 1 + 4, "a line of settings, and the answers"
    partial.write_bytes(lines.encode() + '{"conversations": [{"content": "天'.encode()[:-1])
    refused(capsys, "temperature 0.7 -> 0.2.*delete it", answers_of, tmp_path, weight, "--temperature", 0.2)
    assert partial.read_bytes().startswith(lines.encode())
    capsys.readouterr()
    asked = scripted(monkeypatch, reply)
    found = answers_of(tmp_path, weight)
    out = capsys.readouterr().out
    assert "going on after 4 of 7" in out and "6 answers; 1 did not end" in out
    assert len(asked) == 3
    assert [row["conversations"][1]["content"][-1] for row in found] == list("023456")
    assert not list(tmp_path.glob(".to.jsonl*")), "nothing is left behind"


def test_texts_with_strange_ends_of_lines(tmp_path, weight, monkeypatch):
    """Unicode knows more ends of lines than files of JSON lines do."""
    strange = "a\u2028b\u2029c\x85d\x0be\x0cf\rg\nh"
    write_jsonl(tmp_path / "from.jsonl", [chat(f"{strange} {n}", "x") for n in range(4)])
    with pytest.raises(SystemExit):
        scripted(monkeypatch, lambda prompt: (strange,), stop_before=3)
        answers_of(tmp_path, weight)
    asked = scripted(monkeypatch, lambda prompt: (strange,))
    found = answers_of(tmp_path, weight)
    assert len(asked) == 2
    assert found == [{"conversations": [user(f"{strange} {n}"), assistant(strange)]} for n in range(4)]


def test_thoughts_are_asked_for_and_only_so_many_questions(tmp_path, weight, monkeypatch, tokenizer):
    write_jsonl(tmp_path / "from.jsonl", QUESTIONS)
    asked = scripted(monkeypatch, lambda prompt: ("ok",))
    assert len(answers_of(tmp_path, weight, "--limit", 3, "--open_thinking", 1)) == 3
    assert [tokenizer.decode(prompt)[-8:] for prompt in asked] == ["<think>\n"] * 3
    answers_of(tmp_path, weight, "--limit", 1)
    assert tokenizer.decode(asked[-1]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "flag, value", [("--temperature", -1), ("--top_p", 0), ("--max_new_tokens", 0), ("--batch_size", 0)]
)
def test_settings_without_a_meaning_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        write_answers.parse_args(["--weight", "a", "--data_path", "b", "--out_path", "c", flag, str(value)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.search(f"{flag}.* must be ", error) and "Traceback" not in error


def test_a_questions_answer_does_not_depend_on_its_batch(tmp_path, weight):
    """Nor on where an interrupted file is gone on with. The same question again gets another answer."""
    write_jsonl(tmp_path / "from.jsonl", [chat(f"question {n % 8}", "x") for n in range(32)])
    some = ["--max_new_tokens", 12, "--temperature", 1.0]
    one, two = (answers_of(tmp_path, weight, *some, "--batch_size", size) for size in (5, 32))
    assert one == two and len(one) > 3
    assert len({json.dumps(row) for row in one}) == len(one)


def test_missing_files_are_one_line(tmp_path, weight, capsys):
    out = ["--out_path", tmp_path / "to.jsonl", "--device", "cpu"]
    data = write_jsonl(tmp_path / "from.jsonl", QUESTIONS)
    asking = functools.partial(refused, capsys)
    nowhere = tmp_path / "nowhere.pth"
    asking("nowhere.pth does not exist", run, write_answers, "--weight", nowhere, "--data_path", data, *out)
    asking("no.jsonl does not exist", run, write_answers, "--weight", weight, "--data_path", "no.jsonl", *out)
    write_jsonl(data, [{"text": "x"}])
    asking("from.jsonl:1: ", run, write_answers, "--weight", weight, "--data_path", data, *out)


# ----------------------------------------------------------------------------------------------------------
# merge_lora
# ----------------------------------------------------------------------------------------------------------


def adapter(folder, name, seed, base=None, **more):
    """An adapter in the folder lora, as after training."""
    model, config = small_model(**more), LoRAConfig(4, 8.0)
    add_lora(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.B.normal_(0, 0.1, generator=draw)
    path = Path(folder) / "lora" / f"{name}_{model.config.hidden_size}.pth"
    parent = {"weight": "full_sft", "step": 7, "crc32": base}
    checkpoint.save_adapter(config, model, path, {"stage": "lora", "parent": parent})
    return path


@pytest.fixture(scope="module")
def adapted(weight):
    for seed, name in enumerate(("lora_a", "lora_b")):
        adapter(weight.parent, name, seed, checkpoint.read_weights(weight)[1]["crc32"])
    return weight


def matrices(path):
    """Of an adapter file: the full name of every adapted layer -> 2 B A (alpha 8, rank 4)."""
    state, _, _ = checkpoint.read_adapter(path)
    a, b = (
        {n.split(".lora.")[0]: t.double() for n, t in state.items() if n.endswith(x)} for x in (".A", ".B")
    )
    return {f"{name}.weight": 2 * b[name] @ a[name] for name in a}


def test_the_merged_file_is_base_and_adapter(adapted, tmp_path, capsys):
    """W + s B A, and every other tensor bit for bit; the base stays as it is."""
    before = adapted.read_bytes()
    path = tmp_path / "merged_32.pth"
    names = ["--lora_weight", "lora_a:0.5,lora_b", "--save_path", path]
    run(merge_script, "--weight", adapted, *names)
    assert "eval_llm.py --weight" in capsys.readouterr().out and adapted.read_bytes() == before
    (base, _), (merged, metadata) = (checkpoint.read_weights(p) for p in (adapted, path))
    first, second = (matrices(adapted.parent / f"lora/lora_{x}_32.pth") for x in "ab")
    assert len(first) == 14 and base.keys() == merged.keys()
    for name, tensor in merged.items():
        if name in first:
            wanted = base[name].double() + 0.5 * first[name] + second[name]
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
            assert (tensor - base[name]).abs().max() > 0.01
        else:
            assert tensor.equal(base[name]), name
    assert metadata["merged"] == "lora_a:0.5,lora_b" and metadata["stage"] == "full_sft"
    assert checkpoint.load_model(path, checkpoint.load_tokenizer())[0].config.hidden_size == 32


def test_the_usual_name_is_that_of_both(adapted):
    run(merge_script, "--weight", adapted, "--lora_weight", "lora_a:0.5,lora_b")
    path = adapted.parent / "full_sft+lora_a+lora_b_32.pth"
    assert path.exists()
    path.unlink()
    run(merge_script, "--weight", adapted, "--lora_weight", adapted.parent / "lora/lora_a_32.pth")
    (path,) = adapted.parent.glob("full_sft+*_32.pth")
    path.unlink()


def test_a_half_precision_base_stays_one(tmp_path):
    """Computed in float32, rounded once."""
    checkpoint.save_weights(small_model(), tmp_path / "full_sft_32.pth", {}, "float16")
    added = matrices(adapter(tmp_path, "lora_a", 0))
    path = tmp_path / "merged_32.pth"
    files = ["--weight", tmp_path / "full_sft_32.pth", "--lora_weight", "lora_a", "--save_path", path]
    run(merge_script, *files)
    base, merged = (checkpoint.read_weights(p)[0] for p in (tmp_path / "full_sft_32.pth", path))
    assert {t.dtype for t in merged.values()} == {torch.float16}
    for name, delta in added.items():
        wanted = (base[name].double() + delta).half()
        assert (merged[name] != wanted).float().mean() < 0.01, "but for ties of rounding"


def test_merging_what_is_not_there_is_one_line(adapted, tmp_path, capsys):
    before = sorted(p.name for p in adapted.parent.iterdir())
    asking = functools.partial(refused, capsys)
    base = ["--weight", adapted]
    asking(
        r"lora_x_32.pth does not exist \(there is .*lora_a_32",
        run,
        merge_script,
        *base,
        "--lora_weight",
        "lora_x",
    )
    asking("full_sft_32.pth holds whole weights", run, merge_script, *base, "--lora_weight", adapted)
    nowhere = ["--weight", tmp_path / "nowhere.pth", "--lora_weight", "lora_a"]
    asking("nowhere.pth does not exist", run, merge_script, *nowhere)
    asking("lora_a", run, merge_script, *base, "--lora_weight", "lora_a:1.2.3")
    assert sorted(p.name for p in adapted.parent.iterdir()) == before


# ----------------------------------------------------------------------------------------------------------
# eval_mini
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, finish_reason, wanted",
    [
        ("one and one\n</think>\n\n2", "eos", True),
        ("2", "eos", False),  # never closed
        ("\n</think>\n\n2", "eos", False),  # no thoughts
        ("one\n</think>\n\n", "eos", False),  # no answer
        ("one\n</think>\n\n2</think>", "eos", False),  # closed twice
        ("<think>\none\n</think>\n\n2", "eos", False),  # opened twice: the prompt has done it
        ("one\n</think>\n\n<think>2", "eos", False),
        ("one\n</think>\n\n2", "length", False),  # cut short
        ("", "eos", False),
    ],
)
def test_well_formed_thoughts(text, finish_reason, wanted):
    assert eval_mini.is_well_formed(SimpleNamespace(text=text, finish_reason=finish_reason)) is wanted


def test_an_unknown_exam_is_one_line(capsys, weight):
    line = refused(capsys, "sumz.*sums", run, eval_mini, "--weight", weight, "--exams", "sums,sumz")
    assert "reason_direct" in line and "bits_per_byte" in line


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    for name in ("sums", "reason", "identity"):
        rows = [{"question": f"{n}?", "answers": ["7"], "group": "g", "kind": "sum"} for n in range(3)]
        write_jsonl(folder / eval_mini.FILES[name], rows)
    return folder


def test_the_chosen_exams_with_and_without_an_adapter(adapted, exams, monkeypatch, capsys, tmp_path):
    """Thinking is asked for in the exam of that name alone, and may take three times as long."""
    seen = []

    def generate(self, prompts, tokenizer=None, max_new_tokens=0, **settings):
        weights = [p.detach().clone() for p in self.model.parameters()]
        seen.append((tokenizer.decode(prompts[0])[-12:], max_new_tokens, weights))
        return [completion("so\n</think>\n\n7") for _ in prompts]

    monkeypatch.setattr(Generator, "generate", generate)
    monkeypatch.setattr("dataset.mini_eval.is_correct", lambda row, text: text.endswith("7"))
    more = [
        "--data_dir",
        exams,
        "--exams",
        "sums,reason",
        "--max_new_tokens",
        9,
        "--json",
        tmp_path / "r.json",
    ]
    run(eval_mini, "--weight", adapted, *more)
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["metrics"] == {"sums": 1, "reason": 1, "well_formed": 1, "ended": 1}
    (end, limit, plain), (thinking, longer, _) = seen[:2]
    assert end.endswith("</think>\n\n") and limit == 9
    assert thinking.endswith("<think>\n") and longer == 27
    seen.clear()
    run(eval_mini, "--weight", adapted, *more, "--lora_weight", "lora_a:0.5,lora_b")
    model, metadata = checkpoint.load_model(adapted)
    checkpoint.merge_adapters(model, "lora_a:0.5,lora_b", adapted.parent, metadata)
    assert all(a.equal(b) for a, b in zip(seen[0][2], model.parameters()))
    assert not all(a.equal(b) for a, b in zip(seen[0][2], plain))
    missing = ["--weight", adapted, *more, "--lora_weight", "lora_x"]
    refused(capsys, "lora_x_32.pth does not exist", run, eval_mini, *missing)
