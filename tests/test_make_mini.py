"""The embedded curriculum: deterministic, well-formed, true where it can be computed, split without leaks."""

import json
import re
import time
import unicodedata

import pytest

from dataset import make_mini as mm
from dataset import mini_tools
from dataset.mini_eval import accepted_forms, candidates, is_correct, normalise

SEED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(curriculum, {file name: rows}, CPU seconds) for one seed at the default size."""
    start = time.process_time()
    curriculum = mm.Curriculum(SEED)
    files = curriculum.files()
    return curriculum, files, time.process_time() - start


def texts_of(row):
    """Every text of a row of any format, with the reasoning."""
    if "text" in row:
        return [row["text"]]
    messages = row.get("conversations", []) + row.get("chosen", []) + row.get("rejected", [])
    return [m[k] for m in messages for k in ("content", "reasoning_content") if m.get(k)]


def training(files):
    return {name: rows for name, rows in files.items() if "heldout" not in name and "eval" not in name}


def questions_of(files, names=None):
    """User texts of training files plus the lines of pretraining question-answer documents."""
    found = []
    for name, rows in training(files).items():
        if names and name not in names:
            continue
        for row in rows:
            if "text" in row:
                found += row["text"].split("\n")
            for message in row.get("conversations", []) + row.get("chosen", []):
                if message["role"] == "user":
                    found.append(message["content"])
    return found


# ---- files -----------------------------------------------------------------------------------------------


def test_writes_the_same_bytes_twice_and_others_for_another_seed(tmp_path):
    first = mm.make_mini(tmp_path / "a", seed=1, size=0.05)
    again = mm.make_mini(tmp_path / "b", seed=1, size=0.05)
    other = mm.make_mini(tmp_path / "c", seed=2, size=0.05)
    assert first == again
    assert all(first["files"][n]["sha256"] != other["files"][n]["sha256"] for n in first["files"])
    for name in [*first["files"], "manifest.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((tmp_path / "a").glob("*.partial"))


def test_default_size_takes_seconds(world):
    assert world[2] < 10


def test_size_scales_the_training_files():
    small, large = mm.Curriculum(3, 0.1), mm.Curriculum(3, 0.3)
    assert 2 < len(large.pretrain()) / len(small.pretrain()) < 4
    assert 2 < len(large.sft()) / len(small.sft()) < 4
    assert len(small.eval_facts(True)) == len(large.eval_facts(True))


def test_command_line(tmp_path, capsys):
    mm.main(["--out_dir", str(tmp_path / "x"), "--size", "0.02", "--seed", "9"])
    assert "wrote" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["seed"] == 9 and manifest["held_out"]["frames"]
    with pytest.raises(SystemExit):
        mm.main(["--size", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        mm.main(["--out_dir", str(tmp_path / "file"), "--size", "0.02"])


def test_formats(world):
    for name, rows in world[1].items():
        assert rows, name
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            assert "{s}" not in line and "{o}" not in line and "{as}" not in line and "{p}" not in line, line
            if name.startswith("eval_"):
                keys = {"id", "kind", "question", "answers", "language", "group"}
                assert keys <= set(row) and row["question"] and row["answers"]
                continue
            if "text" in row:
                assert name.startswith("pretrain") and row["text"].strip()
                continue
            sides = [row["chosen"], row["rejected"]] if "chosen" in row else [row["conversations"]]
            for messages in sides:
                roles = [m["role"] for m in messages]
                assert roles[-1] == "assistant" and "user" in roles
                placeholder = name.startswith(("rlaif", "agent"))
                assert (messages[-1]["content"] == "") is placeholder
                for message in messages:
                    assert all(isinstance(v, str) for v in message.values())
                    if "tools" in message:
                        assert all(t["type"] == "function" for t in json.loads(message["tools"]))
            if "chosen" in row:
                assert row["chosen"][:-1] == row["rejected"][:-1] and row["chosen"] != row["rejected"]
            if name.startswith("agent"):
                assert row["gt"] and all(isinstance(v, str) for v in row["gt"])
            if name.startswith("rlaif"):
                assert row["answer"] and row["kind"]


def test_eval_ids_are_unique(world):
    for name, rows in world[1].items():
        if rows and "id" in rows[0]:
            ids = [row["id"] for row in rows]
            assert len(ids) == len(set(ids)), name


def test_languages_are_balanced(world):
    def share(rows):
        zh = sum(any("\u4e00" <= c <= "\u9fff" for c in "".join(texts_of(row))) for row in rows)
        return zh / len(rows)

    for name, rows in training(world[1]).items():
        assert 0.3 < share(rows) < 0.75, (name, share(rows))


# ---- nothing leaks ---------------------------------------------------------------------------------------


def test_unasked_facts_are_stated_but_never_asked(world):
    """Pretraining says every unasked fact in its canonical sentence; no answer of any other stage does."""
    curriculum, files, _ = world
    rows = files["eval_facts_unasked.jsonl"]
    pretrain = "\n".join(row["text"] for row in files["pretrain.jsonl"])
    questions = set(questions_of(files))
    for row in rows:
        assert row["question"] not in questions, row
    answers = set()
    for name, items in training(files).items():
        for item in items:
            for message in item.get("conversations", []) + item.get("chosen", []):
                if message["role"] == "assistant" and name != "pretrain.jsonl":
                    answers.add(message["content"])
    for _, _, query, fact, asked in curriculum.queries():
        if not asked:
            sentence = mm.answer_text(query, fact)
            assert sentence in pretrain, sentence
            assert sentence not in answers, sentence


def test_unasked_facts_are_not_in_pretraining_questions(world):
    """Every question-answer line of the pretraining text is about an asked fact. Sentences about unasked ones
    follow statements or headings only."""
    curriculum, files, _ = world
    unasked = {mm.answer_text(q, f) for _, _, q, f, asked in curriculum.queries() if not asked}
    carriers = ("Did you know?", "你知道吗？", "We learned this today.")
    marks = re.compile(r"^(Answer: |A: |Assistant: |回答：|答：|助手：)")
    found = 0
    for row in files["pretrain.jsonl"]:
        previous = ""
        for line in row["text"].split("\n"):
            assert not marks.match(line) or marks.sub("", line) not in unasked, line
            if line in unasked:
                found += 1
                asks = previous.endswith(("?", "？")) and not previous.endswith(carriers)
                assert not asks and not re.match(r"(Question|Q|User|问题|问|用户)[:：]", previous), (
                    previous,
                    line,
                )
            for sentence in unasked & {re.sub(r"^.*[?？] ?", "", line)} - {line}:  # "question? answer"
                assert line[: -len(sentence)].rstrip().endswith(carriers), line
            previous = line
    assert found > 100


def test_held_out_cores_and_frames_are_not_in_training(world):
    curriculum, files, _ = world
    questions = {q.strip() for q in questions_of(files)}
    lowered = {q.casefold() for q in questions}
    for row in files["eval_facts_paraphrase.jsonl"] + files["eval_chat.jsonl"]:
        assert row["question"] not in questions and row["question"].casefold() not in lowered, row
    # no question of a conversation contains the words of a held-out core about its fact
    text = "\n".join(questions_of(files, [n for n in files if not n.startswith("pretrain")])).casefold()
    for relation, key, _query, fact, _ in curriculum.queries():
        for cores in curriculum.split.unseen_cores((relation.name, *key)).values():
            for core in cores:
                filled = mm.clean_zh(mm.fill_slots(core, *fact[key[0]], key[0]), key[0]).casefold()
                assert filled not in text, (core, filled)


SPACED_SUM = re.compile(r"(?<![\d+*/-])(?<![+*/-] )(\d+) ?\+ ?(\d+)(?! ?[\d+*/-])(?=\s*=|\D|$)")
WORDED_SUM = re.compile(
    r"(?:add|sum of|add up) (\d+) and (\d+)|(\d+) plus (\d+)"
    r"|(\d+)(?:加上|加|与|和)(\d+)(?:的和|等于|是多少|相加|。)"
)


def test_held_out_sums_are_not_in_training(world):
    """No problem text asks for a held-out pair in either order. (One-digit column steps such as "7+8=15"
    inside longer sums are the building blocks and do occur.)"""
    curriculum, files, _ = world
    held = curriculum.split.held_sum
    pairs = 0
    for row in files["eval_sums.jsonl"]:
        a, b = map(int, row["id"].split("-")[1:3])
        assert held(a, b) and row["answers"] == [str(a + b)]
        pairs += 1
    assert pairs >= 500
    for name, rows in training(files).items():
        for row in rows:
            for text in texts_of(row):
                text = unicodedata.normalize("NFKC", text)
                for match in SPACED_SUM.finditer(text):
                    a, b = int(match[1]), int(match[2])
                    if max(a, b) > 9:
                        assert not held(a, b), (name, text)
                    elif f"{a} + {b}" in match[0]:
                        assert not held(a, b), (name, text)
                for match in WORDED_SUM.finditer(text.casefold()):
                    a, b = [int(g) for g in match.groups() if g]
                    if "+" not in match[0] and max(a, b) < 100 and "哪" not in text and "中较" not in text:
                        assert not held(a, b), (name, text)


def test_held_out_rows_are_not_training_rows(world):
    _, files, _ = world
    pairs = [
        ("pretrain.jsonl", "pretrain_heldout.jsonl"),
        ("sft.jsonl", "sft_heldout.jsonl"),
        ("reason.jsonl", "reason_heldout.jsonl"),
        ("dpo.jsonl", "dpo_heldout.jsonl"),
        ("rlaif.jsonl", "rlaif_heldout.jsonl"),
        ("agent_rl.jsonl", "agent_heldout.jsonl"),
        ("sft_tools.jsonl", "agent_heldout.jsonl"),
        ("lora_identity.jsonl", "lora_identity_heldout.jsonl"),
        ("lora_medical.jsonl", "lora_medical_heldout.jsonl"),
    ]
    for train, test in pairs:

        def key(row):
            return row.get("text") or json.dumps(
                row.get("conversations") or row.get("chosen"), ensure_ascii=False
            )

        def prompt(row):
            messages = row.get("conversations") or row.get("chosen") or []
            return next((m["content"] for m in messages if m["role"] == "user"), row.get("text"))

        train_rows = files[train]
        assert not {key(r) for r in train_rows} & {key(r) for r in files[test]}, test
        if not train.startswith(("pretrain", "sft.", "dpo")):
            assert not {prompt(r) for r in train_rows} & {prompt(r) for r in files[test]}, test


def test_split_is_balanced():
    split = mm.Split(11)
    for relation in split.relations:
        share = len(split.asked[relation.name]) / len(relation.facts)
        assert 0.55 < share < 0.8, relation.name
    assert 0.09 < sum(split.held_sum(a, b) for a in range(100) for b in range(a, 100)) / 5050 < 0.17
    assert all(split.held_sum(a, b) == split.held_sum(b, a) for a in range(100) for b in range(100))


# ---- what is said is true --------------------------------------------------------------------------------


def test_equations_are_true(world):
    """Every equation of every file holds; wrong ones exist only in rejected answers."""
    equation = re.compile(r"(?<![\d.])(\d+(?: ?[-+*] ?\d+)+) ?= ?(-?\d+)")
    count = 0
    for rows in world[1].values():
        for row in rows:
            messages = row.get("conversations", []) + row.get("chosen", [])
            texts = [row.get("text", "")] + [
                m.get(k, "") for m in messages for k in ("content", "reasoning_content")
            ]
            for text in texts:
                for left, right in equation.findall(unicodedata.normalize("NFKC", text)):
                    assert mini_tools.calculate(left) == int(right), text
                    count += 1
    assert count > 10_000


def test_column_steps():
    assert mm.sum_answer(23, 45, "en") == "3+5=8, 2+4+0=6, so 23 + 45 = 68."
    assert mm.sum_answer(9, 95, "en") == "9+5=14, 0+9+1=10, so 9 + 95 = 104."
    assert mm.sum_answer(7, 8, "zh") == "7+8=15，所以 7 + 8 = 15。"
    assert mm.sum_answer(43, 27, "en", "-") == "13-7=6, 4-2-1=1, so 43 - 27 = 16."


def test_tool_results_are_what_the_tools_return(world):
    calls = 0
    for name in ("sft.jsonl", "sft_tools.jsonl"):
        for row in world[1][name]:
            messages = row["conversations"]
            for call, result in zip(messages, messages[1:]):
                if "tool_calls" in call:
                    (wanted,) = json.loads(call["tool_calls"])
                    assert result["role"] == "tool"
                    assert json.loads(result["content"]) == mini_tools.run_tool(
                        wanted["name"], wanted["arguments"]
                    )
                    assert "error" not in json.loads(result["content"])
                    offered = [t["function"]["name"] for t in json.loads(messages[0]["tools"])]
                    assert wanted["name"] in offered
                    calls += 1
    assert calls > 1500


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("calculate_math", {"expression": "__import__('os')"}),
        ("calculate_math", {"expression": "9**9**9"}),
        ("calculate_math", {"expression": "1/0"}),
        ("calculate_math", {"expression": "9" * 10_000}),
        ("calculate_math", {"expression": "9" * 150 + "*" + "9" * 40}),
        ("calculate_math", {"expression": "(" * 150}),
        ("calculate_math", {"expression": None}),
        ("calculate_math", {"expression": "True+1"}),
        ("calculate_math", {"expression": "(1).real"}),
        ("calculate_math", {}),
        ("calculate_math", "1+1"),
        ("unit_converter", {"value": "nan", "from_unit": "km", "to_unit": "m"}),
        ("unit_converter", {"value": "inf", "from_unit": "km", "to_unit": "m"}),
        ("unit_converter", {"value": [], "from_unit": "km", "to_unit": "m"}),
        ("unit_converter", {"value": 1, "from_unit": "km", "to_unit": "kg"}),
        ("random_number", {"min": 9, "max": 1}),
        ("random_number", {"min": "a", "max": {}}),
        ("day_of_week", {"start": "Noday", "days": 2}),
        ("get_exchange_rate", {"from_currency": [], "to_currency": "x"}),
        ("no_such_tool", {}),
    ],
)
def test_odd_tool_arguments_become_errors(name, arguments):
    assert "error" in mini_tools.run_tool(name, arguments)


def test_canonical_answers_score_as_correct_and_others_do_not(world):
    """The sentence training teaches is accepted by the score; the sentence of another fact is not."""
    curriculum, files, _ = world
    rows = {r["id"]: r for r in files["eval_facts_paraphrase.jsonl"] + files["eval_facts_unasked.jsonl"]}
    by_query = {}
    for relation, key, query, fact, _ in curriculum.queries():
        by_query.setdefault((relation.name, key), []).append((fact, mm.answer_text(query, fact)))
    for relation, key, query, fact, _ in curriculum.queries():
        row = rows[f"{relation.name}-{key[1]}-{key[0]}-{relation.subject_key(fact)}"]
        right = mm.answer_text(query, fact)
        assert is_correct(row, right), (row, right)
        index = 1 if key[1] == "forward" else 0
        for other, sentence in by_query[relation.name, key]:
            if other[key[0]][index] != fact[key[0]][index]:
                assert not is_correct(row, sentence), (row, sentence)


def test_listing_every_candidate_is_not_an_answer(world):
    _, files, _ = world
    for row in files["eval_facts_unasked.jsonl"]:
        if row["kind"] == "fact":
            everything = candidates(row["relation"], row["language"], row["direction"])
            assert row["answers"][0] in everything
            assert not is_correct(row, ", ".join(everything)), row
            assert not is_correct(row, " ".join(everything)), row


def test_questions_do_not_contain_their_answer(world):
    _, files, _ = world
    for row in files["eval_facts_paraphrase.jsonl"] + files["eval_facts_unasked.jsonl"]:
        if row["relation"] in ("animal_class",):
            continue
        assert not is_correct(row, row["question"]), row


CAPITAL = dict(kind="fact", question="What is the capital of France?", answers=["Paris"], language="en",
               relation="capital", direction="forward", group="x", id="x")  # fmt: skip
SUM = dict(kind="number", question="What is 23 plus 45?", answers=["68"], language="en", group="2+2", id="x")
SMALL = dict(SUM, question="3 + 5 = ?", answers=["8"])
SYMBOL = dict(CAPITAL, relation="symbol", question="What is the symbol of helium?", answers=["He"])
ZH = dict(CAPITAL, question="“大”的反义词是什么？", answers=["小"], language="zh", relation="opposite_zh")
TENSE = dict(CAPITAL, question='What is the past tense of "run"?', answers=["ran"], relation="past")
CHAT = dict(kind="chat", question="Who are you?", answers=["MiniMind"], language="en", group="who", id="x")


@pytest.mark.parametrize(
    "row, reply, expected",
    [
        (CAPITAL, "The capital of France is Paris.", True),
        (CAPITAL, "paris", True),
        (CAPITAL, "  PARIS!! ", True),
        (CAPITAL, "Ｐａｒｉｓ", True),
        (CAPITAL, "<think>\n\n</think>\n\nParis<|im_end|>", True),
        (CAPITAL, "", False),
        (CAPITAL, "   ", False),
        (CAPITAL, "?!.", False),
        (CAPITAL, "Rome", False),
        (CAPITAL, "The capital of France is Rome.", False),
        (CAPITAL, "Paris or Rome", False),
        (CAPITAL, "It is not Paris.", False),
        (CAPITAL, "Parisian", False),
        (CAPITAL, "Comparison", False),
        (CAPITAL, "Paris " * 4, False),
        (CAPITAL, "Paris " * 200, False),
        (CAPITAL, "What is the capital of France?", False),
        (CAPITAL, "The capital of France is", False),
        (CAPITAL, "x" * 10_000 + " Paris", False),
        (dict(CAPITAL, question="What is the capital of Mexico?", answers=["Mexico City"]), "Mexico", False),
        (
            dict(CAPITAL, question="What is the capital of Mexico?", answers=["Mexico City"]),
            "Mexico City.",
            True,
        ),
        (SYMBOL, "The chemical symbol of helium is He.", True),
        (SYMBOL, "He", True),
        (SYMBOL, "he is here", False),
        (SYMBOL, "H", False),
        (SYMBOL, "He H Li", False),
        (ZH, "“大”的反义词是“小”。", True),
        (ZH, "小", True),
        (ZH, "“大”的反义词是“少”。", False),
        (ZH, "大", False),
        (ZH, "不是小", False),
        (TENSE, 'The past tense of "run" is "ran".', True),
        (TENSE, "France", False),
        (SUM, "68", True),
        (SUM, "23 + 45 = 68.", True),
        (SUM, "3+5=8, 2+4+0=6, so 23 + 45 = 68.", True),
        (SUM, "３＋５＝８，２＋４＋０＝６，所以 ２３ ＋ ４５ ＝ ６８。", True),
        (SUM, "23 + 45 = 68. 23 + 45 = 68.", True),
        (SUM, "The sum of 23 and 45 is 68.", True),
        (SUM, "", False),
        (SUM, "68" * 3, False),
        (SUM, "68 " * 30, False),
        (SUM, "168", False),
        (SUM, "6.8", False),
        (SUM, "-68", False),
        (SUM, "68 69", False),
        (SUM, "67 68", False),
        (SUM, " ".join(map(str, range(69))), False),
        (SUM, "23 + 45 = 67, 23 + 45 = 68.", False),
        (SUM, "23 + 45 = 68, 23 + 45 = 67.", False),
        (SUM, "3+5=8, 2+4+0=6, so 23 + 45 = 86.", False),
        (SUM, "23 + 45", False),
        (SMALL, "28", False),
        (SMALL, "8", True),
        (SMALL, "0123456789", False),
        (SMALL, "0 1 2 3 4 5 6 7 8", False),
        (SMALL, "3 5 8", True),
        (SMALL, "3+5=8, so 3 + 5 = 8.", True),
        (dict(SUM, question="10 - 30 = ?", answers=["-20"]), "10 - 30 = -20", True),
        (dict(SUM, question="10 - 30 = ?", answers=["-20"]), "20", False),
        (CHAT, "I am MiniMind, a small AI assistant.", True),
        (CHAT, "我是 MiniMind，一个小型人工智能助手。", True),
        (CHAT, "我是MiniMind", True),
        (CHAT, "I am ChatGPT.", False),
        (CHAT, "", False),
        (CHAT, "MiniMind " * 20, False),
    ],
)
def test_is_correct(row, reply, expected):
    assert is_correct(row, reply) is expected


def test_is_correct_never_raises():
    for row in (CAPITAL, SUM, SYMBOL, ZH, CHAT):
        for reply in (
            None,
            3,
            "\x00",
            "=",
            "= =",
            "+-*/",
            "１２３",
            "\ud83d",
            "💥" * 50,
            "-",
            "1e9",
            "9" * 400,
        ):
            assert is_correct(row, reply) is False


def test_aliases_and_normalisation():
    assert "aluminum" in accepted_forms("aluminium")
    assert normalise("  Hello,　Ｗorld! ") == " hello world "
    assert normalise("Bogotá") == " bogota "
