"""Write the embedded curriculum: a small bilingual world that lets every training stage show what it gained.

    python dataset/make_mini.py                       # dataset/mini/, a few seconds, no download
    python dataset/make_mini.py --seed 7 --size 2     # another split and twice the text
    python dataset/make_mini.py --stats               # only print the tables of docs/curriculum.md

One file per stage in the formats of docs/data.md, plus held-out files that measure *generalisation*:
facts asked in unseen words, facts that pretraining states but no question ever asks, sums with unseen
operands, unseen tool arguments. Everything is a pure function of (--seed, --size); `manifest.json` records
the split.
Standard library only. Tables and sentences: mini_world.py, mini_chat.py; tools: mini_tools.py; scoring:
mini_eval.py (`is_correct`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import mini_chat, mini_tools, mini_world  # noqa: E402
from dataset.mini_eval import is_correct, normalise  # noqa: E402, F401  (part of this file's interface)
from dataset.mini_world import Query, Relation, fill_slots, full_width, upper_first  # noqa: E402

DEFAULT_OUT = Path(__file__).resolve().parent / "mini"
ASKED_SHARE = 0.68  # share of each relation's facts that SFT (and question text in pretraining) asks about
HELD_CORES = 0.2  # share of question cores that no training file contains
HELD_FRAMES = 0.2
HELD_SUMS = 0.13  # share of operand pairs {a, b} that no training file asks for
LANGUAGES = ("en", "zh")
FRAME_KIND = {"np": "np", "q": "q", "w": "q", "e": "e", "fill": "fill"}

# how much of what, at --size 1
COUNTS = {
    "statements": 22,  # per fact, language and direction, in pretraining
    "pretrain_qa": 5,  # per asked fact, language and direction
    "pretrain_sums": 8000,
    "pretrain_other_math": 1500,
    "stories": 500,  # per language
    "pretrain_chat": 500,  # per language
    "sft_facts": 8,  # per asked fact, language and direction
    "sft_sums": 5000,
    "sft_other_math": 700,
    "sft_chat": 900,  # per language, single turn
    "sft_multi": 500,  # per language, several turns
    "sft_tools": 260,
    "tools": 1500,
    "identity": 240,
    "reason": 2400,
    "dpo": 1400,
    "rlaif": 1600,
    "agent": 1000,
}
EVAL_SUMS = 600
EVAL_PER_FACT = 1

SUM_QUESTIONS = {
    "en": """
        {a} + {b} = ?
        {a}+{b}=?
        {a} + {b} =
        {a} + {b}
        What is {a} + {b}?
        What is {a}+{b}?
        What's {a} + {b}?
        What is {a} plus {b}?
        What's {a} plus {b}?
        what is {a} plus {b}
        How much is {a} plus {b}?
        How much is {a} + {b}?
        Add {a} and {b}.
        Please add {a} and {b}.
        Calculate {a} + {b}.
        Please calculate {a} + {b}.
        Compute {a} + {b}.
        What is the sum of {a} and {b}?
        Find the sum of {a} and {b}.
        What do you get if you add {a} and {b}?
        Tell me {a} plus {b}.
        Can you add {a} and {b}?
        Can you tell me what {a} plus {b} is?
        Hi, what is {a} + {b}?
        Quick question: {a} + {b} = ?
        """,
    "zh": """
        {a} + {b} = ?
        {a}+{b}=?
        {a}+{b}等于多少?
        {a} + {b} 等于多少?
        {a}+{b}等于几?
        {a}加{b}等于多少?
        {a}加{b}等于几?
        {a}加{b}是多少?
        {a}加上{b}等于多少?
        {a}加上{b}是多少?
        请计算{a}+{b}。
        计算{a}+{b}
        计算 {a} + {b}。
        算一下{a}+{b}。
        请算一下{a}加{b}。
        帮我算一下{a}+{b}。
        {a}与{b}的和是多少?
        {a}和{b}相加等于多少?
        求{a}与{b}的和。
        请问{a}加{b}等于多少?
        你好,{a}+{b}等于多少?
        你知道{a}加{b}等于多少吗?
        告诉我{a}加{b}等于多少。
        """,
}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def conversation(*turns: str) -> list[dict]:
    """user, assistant, user, ... texts -> messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


class Split:
    """What is held out: facts, question cores, frames and operand pairs, as a pure function of the seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self.relations: list[Relation] = mini_world.build_relations()
        self.asked: dict[str, set[str]] = {}  # relation -> subject keys that training asks about
        for relation in self.relations:
            keys = sorted(
                (relation.subject_key(f) for f in relation.facts), key=lambda k: _hash(seed, relation.name, k)
            )
            self.asked[relation.name] = set(keys[: round(ASKED_SHARE * len(keys))])
        self._phrases: dict[tuple[str, str, str], set[str]] = {}
        self._unseen: dict[tuple[str, str, str], dict[str, list[str]]] = {}
        self.cores: dict[tuple[str, str, str], dict[str, tuple[list[str], list[str]]]] = {}
        for relation in self.relations:
            for (language, direction), query in relation.queries.items():
                self.cores[relation.name, language, direction] = {
                    kind: self._divide(
                        cores,
                        HELD_CORES,
                        relation.name,
                        language,
                        kind,
                        "" if relation.symmetric else direction,
                    )
                    for kind, cores in query.cores.items()
                }
        self.frames: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
        for language, frames in (("en", mini_world.FRAMES_EN), ("zh", mini_world.FRAMES_ZH)):
            for kind, templates in frames.items():
                keep, held = self._divide(_unique(templates[1:]), HELD_FRAMES, language, kind)
                held = [t for t in held if t != templates[0]]
                self.frames[language, kind] = ([t for t in templates if t not in held], held)
        self.sum_frames = {}
        for language, text in SUM_QUESTIONS.items():
            keep, held = self._divide(_lines(text)[2:], 0.15, "sums", language)
            self.sum_frames[language] = (_lines(text)[:2] + keep, held)
        self.chat: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
        for language, intents in (("en", mini_chat.CHAT_EN), ("zh", mini_chat.CHAT_ZH)):
            for intent in intents:
                self.chat[language, intent["name"]] = self._divide(
                    intent["user"], 0.15, "chat", language, intent["name"]
                )

    def _divide(self, items: list[str], share: float, *salt: object) -> tuple[list[str], list[str]]:
        """(kept, held out); lists of one or two items keep everything. Order of the kept ones stays."""
        count = 0 if len(items) < 3 else max(1, round(share * len(items)))
        # lines that differ only in case or punctuation go together
        groups: dict[str, list[str]] = {}
        for item in items:
            groups.setdefault(normalise(item.replace("{o}", "{s}")), []).append(item)
        held: set[str] = set()
        for group in sorted(groups, key=lambda g: _hash(self.seed, *salt, g)):
            if len(held) < count and (not held or len(held) + len(groups[group]) <= count):
                held.update(groups[group])
        return [i for i in items if i not in held], [i for i in items if i in held]

    def phrases(self, key: tuple[str, str, str]) -> set[str]:
        """Every wording of one query that training may use, see `phrase`."""
        if key not in self._phrases:
            relation = next(r for r in self.relations if r.name == key[0])
            query = relation.queries[key[1:]]
            self._phrases[key] = {
                phrase(query, core, frame)
                for kind, (kept, _) in self.cores[key].items()
                for frame_kind in (("q", "e") if kind == "w" and key[1] == "en" else (FRAME_KIND[kind],))
                for core in kept
                for frame in self.frames[key[1], frame_kind][0]
            }
        return self._phrases[key]

    def unseen_cores(self, key: tuple[str, str, str]) -> dict[str, list[str]]:
        """Held-out cores whose words stand in no wording that training may use."""
        if key not in self._unseen:
            relation = next(r for r in self.relations if r.name == key[0])
            known = "\n".join(self.phrases(key))
            query = relation.queries[key[1:]]

            def words(core: str) -> str:  # Chinese has no spaces that could mark the ends
                return phrase(query, core, "{q}") if key[1] == "en" else phrase(query, core, "{q}").strip()

            self._unseen[key] = {
                kind: [core for core in held if words(core) not in known]
                for kind, (_, held) in self.cores[key].items()
            }
        return self._unseen[key]

    def is_asked(self, relation: Relation, fact: dict) -> bool:
        return relation.subject_key(fact) in self.asked[relation.name]

    def held_sum(self, a: int, b: int) -> bool:
        """True if no training text may ask for a + b or b + a (two operands below 100)."""
        a, b = min(a, b), max(a, b)
        return b < 100 and _hash(self.seed, "sum", a, b) % 1000 < HELD_SUMS * 1000


def clean_zh(text: str, language: str) -> str:
    """Full-width punctuation for Chinese sentences; bare expressions like "3 + 4 = ?" stay as they are."""
    return full_width(text) if language == "zh" and any("\u4e00" <= c <= "\u9fff" for c in text) else text


def statement(
    template: str, relation: Relation, fact: dict, language: str, rng: random.Random, wrap: bool
) -> str:
    """One rendered statement sentence, sometimes inside a carrier phrase."""
    subject, obj = fact[language]
    text = fill_slots(template, subject, obj, language)
    if language == "zh":
        frame = rng.choice(mini_world.WRAPS_ZH) if wrap else "{st}"
        return full_width(frame.replace("{st}", text))
    frame = rng.choice(mini_world.WRAPS_EN) if wrap else "{St}"
    lower = text if template[0] in '{"' else text[:1].lower() + text[1:]  # names keep their capital
    return frame.replace("{St}", upper_first(text)).replace("{st}", lower)


def answer_text(query: Query, fact: dict) -> str:
    subject, obj = fact[query.language]
    text = fill_slots(query.answer, subject, obj, query.language)
    return full_width(text) if query.language == "zh" else upper_first(text)


def question_text(query: Query, fact: dict, core: str, frame: str) -> str:
    """Fill a core with the fact's subject (object when asked in reverse) and put the frame around it."""
    subject, obj = fact[query.language]
    core = fill_slots(core, subject, obj, query.language)
    text = frame
    for slot in ("q", "np", "e", "fill"):
        text = text.replace("{" + slot.capitalize() + "}", upper_first(core)).replace("{" + slot + "}", core)
    return clean_zh(text, query.language)


def phrase(query: Query, core: str, frame: str) -> str:
    """What a core in a frame looks like whatever the fact, without case and punctuation: two ways to build
    the same words count as one."""
    fact = {query.language: ("Xx/Xx" if "{p}" in core else "Xx", "Yy")}
    return normalise(question_text(query, fact, core, frame))


def render_question(
    split: Split, relation: Relation, key: tuple[str, str], fact: dict, rng: random.Random,
    held_core: bool = False, held_frame: bool = False,
) -> str | None:  # fmt: skip
    """A question with a kept or held-out core in a kept or held-out frame; None if there is no such core."""
    query, name = relation.queries[key], (relation.name, *key)
    if held_core:
        cores = split.unseen_cores(name)
    else:
        cores = {kind: kept for kind, (kept, _) in split.cores[name].items()}
    options = []
    for kind, texts in cores.items():
        if kind == "w":  # fits around direct and embedded frames
            frame_kinds = ("q", "e") if key[0] == "en" else ("q",)
        else:
            frame_kinds = (FRAME_KIND[kind],)
        for core in texts:
            options += [(core, frame_kind) for frame_kind in frame_kinds]
    if not options:
        return None
    # fill-in sentences are rarer than questions
    weights = [0.5 if frame_kind == "fill" else 1.0 for _, frame_kind in options]
    known = split.phrases(name) if held_core or held_frame else ()
    for _ in range(50):
        core, frame_kind = rng.choices(options, weights)[0]
        frame = rng.choice(split.frames[key[0], frame_kind][1 if held_frame else 0])
        if not known or phrase(query, core, frame) not in known:
            return question_text(query, fact, core, frame)
    return None


# ---- arithmetic ------------------------------------------------------------------------------------------


def column_steps(a: int, b: int, sign: str = "+") -> str:
    """Worked columns, ones first: "3+5=8, 2+4+0=6" (the last number is the carry, or the borrow for "-")."""
    a1, a0, b1, b0 = a // 10, a % 10, b // 10, b % 10
    if sign == "+":
        carry = (a0 + b0) // 10
        ones = f"{a0}+{b0}={a0 + b0}"
        return ones if a < 10 and b < 10 else f"{ones}, {a1}+{b1}+{carry}={a1 + b1 + carry}"
    borrow = int(a0 < b0)
    ones = f"{a0 + 10 * borrow}-{b0}={a0 + 10 * borrow - b0}"
    return ones if a < 10 and b < 10 else f"{ones}, {a1}-{b1}-{borrow}={a1 - b1 - borrow}"


def sum_answer(a: int, b: int, language: str, sign: str = "+") -> str:
    result = a + b if sign == "+" else a - b
    so = {"en": ", so", "zh": "，所以"}[language]
    text = f"{column_steps(a, b, sign)}{so} {a} {sign} {b} = {result}"
    return text + "." if language == "en" else text.replace(", ", "，") + "。"


def draw_operands(rng: random.Random) -> tuple[int, int]:
    """One- and two-digit operands: 15 % both one digit, 25 % mixed, 60 % both two digits."""
    draw = rng.random()
    if draw < 0.15:
        return rng.randint(0, 9), rng.randint(0, 9)
    if draw < 0.40:
        pair = [rng.randint(0, 9), rng.randint(10, 99)]
        rng.shuffle(pair)
        return pair[0], pair[1]
    return rng.randint(10, 99), rng.randint(10, 99)


def draw_sum(split: Split, rng: random.Random, held: bool = False) -> tuple[int, int]:
    while True:
        a, b = draw_operands(rng)
        if split.held_sum(a, b) == held:
            return a, b


OTHER_QUESTIONS = {
    "sub": {
        "en": ["{a} - {b} = ?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "What is {a} - {b}?",
               "How much is {a} minus {b}?", "Calculate {a} - {b}."],
        "zh": ["{a} - {b} = ?", "{a}减{b}等于多少?", "{a}-{b}等于多少?", "计算{a}-{b}。",
               "请问{a}减去{b}是多少?"],
    },
    "compare": {
        "en": ["Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?",
               "What is the larger of {a} and {b}?"],
        "zh": ["{a}和{b}哪个大?", "{a}与{b}哪个更大?", "{a}和{b}中较大的数是哪个?"],
    },
    "next": {
        "en": ["What number comes after {a}?", "Which number follows {a}?", "What comes next after {a}?"],
        "zh": ["{a}后面的数是几?", "{a}的下一个数是多少?", "比{a}大一的数是多少?"],
    },
    "mul": {
        "en": ["{a} * {b} = ?", "What is {a} times {b}?", "Multiply {a} by {b}."],
        "zh": ["{a}乘{b}等于多少?", "{a} * {b} = ?", "{a}乘以{b}是多少?"],
    },
    "chain": {
        "en": ["{e} = ?", "What is {e}?", "Calculate {e}.", "How much is {e}?", "Please compute {e}."],
        "zh": ["{e} = ?", "{e}等于多少?", "计算{e}。", "请算一下{e}。", "请问{e}是多少?"],
    },
}  # fmt: skip


def other_math(split: Split, rng: random.Random, kind: str, language: str) -> tuple[str, str, str]:
    """(question, direct answer, final answer) of a kind other than sums."""
    template = clean_zh(rng.choice(OTHER_QUESTIONS[kind][language]), language)
    if kind == "sub":
        a, b = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
        return template.format(a=a, b=b), sum_answer(a, b, language, "-"), str(a - b)
    if kind == "compare":
        a, b = rng.sample(range(1, 100), 2)
        big = str(max(a, b))
        end = {"en": f"The larger number is {big}.", "zh": f"较大的数是{big}。"}[language]
        return template.format(a=a, b=b), end, big
    if kind == "next":
        a = rng.randint(0, 99)
        end = {"en": f"The number after {a} is {a + 1}.", "zh": f"{a}后面的数是{a + 1}。"}[language]
        return template.format(a=a), end, str(a + 1)
    if kind == "mul":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        end = {"en": f"{a} * {b} = {a * b}.", "zh": f"{a} * {b} = {a * b}。"}[language]
        return template.format(a=a, b=b), end, str(a * b)
    expression, steps, value = chain(split, rng)
    end = {"en": f"{expression} = {value}.", "zh": f"{expression} = {value}。"}[language]
    return template.format(e=expression), end, str(value)


def chain(
    split: Split, rng: random.Random, held: bool | None = None
) -> tuple[str, list[tuple[int, str, int]], int]:
    """A three-operand + / - expression, values in 0..99 at every step: (text, [(a, sign, b)...], value)."""
    while True:
        numbers = [rng.randint(1, 60) for _ in range(3)]
        signs = [rng.choice("+-") for _ in range(2)]
        value, steps, fine = numbers[0], [], True
        for sign, number in zip(signs, numbers[1:], strict=True):
            steps.append((value, sign, number))
            if sign == "+" and split.held_sum(value, number):
                fine = False
            value = value + number if sign == "+" else value - number
            fine = fine and 0 <= value <= 99
        expression = f"{numbers[0]} {signs[0]} {numbers[1]} {signs[1]} {numbers[2]}"
        # held-out expressions are a hash class of their own, so that train and test never share one
        is_held = _hash(split.seed, "chain", expression) % 10 == 0
        if fine and (held is None and not is_held or held is is_held):
            return expression, steps, value


class Writer:
    """Writes the files of the curriculum and remembers what the manifest needs."""

    def __init__(self, out_dir: Path, seed: int, size: float):
        self.out_dir, self.seed, self.size = out_dir, seed, size
        self.files: dict[str, dict] = {}
        out_dir.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, items: list[dict]) -> None:
        data = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode("utf-8")
        partial = self.out_dir / (name + ".partial")
        partial.write_bytes(data)
        partial.replace(self.out_dir / name)
        self.files[name] = {
            "rows": len(items),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


class Curriculum:
    """All files as lists of rows. Each section draws from its own generator, so that sections do not disturb
    each other when one of them changes."""

    def __init__(self, seed: int = 42, size: float = 1.0):
        self.seed, self.size = seed, size
        self.split = Split(seed)
        self.relations = self.split.relations

    def rng(self, section: str) -> random.Random:
        return random.Random(_hash(self.seed, section))

    def count(self, name: str) -> int:
        return max(1, round(COUNTS[name] * self.size))

    def queries(self) -> Iterable[tuple[Relation, tuple[str, str], Query, dict, bool]]:
        """Every (relation, (language, direction), query, fact, asked?)."""
        for relation in self.relations:
            for key, query in relation.queries.items():
                for fact in relation.facts:
                    yield relation, key, query, fact, self.split.is_asked(relation, fact)

    # ---- pretraining

    def statements(self, rng: random.Random, per_query: int) -> dict[str, list[tuple[str, str]]]:
        """language -> [(subject, sentence)]; the canonical answer sentence is a quarter of them."""
        found: dict[str, list[tuple[str, str]]] = {"en": [], "zh": []}
        for relation, (language, direction), query, fact, _ in self.queries():
            pool: list[str] = []
            while len(pool) < per_query:
                pool += rng.sample(query.statements, len(query.statements))
            for i in range(per_query):
                template = query.answer if i % 4 == 0 else pool[i]
                text = statement(template, relation, fact, language, rng, wrap=True)
                found[language].append(
                    (fact[language][0] if direction == "forward" else fact[language][1], text)
                )
        return found

    def fact_documents(self, rng: random.Random, per_query: int) -> list[str]:
        """Statements in documents of a few sentences: half about one subject, half about many."""
        documents = []
        for language, sentences in self.statements(rng, per_query).items():
            glue = " " if language == "en" else ""
            rng.shuffle(sentences)
            half = len(sentences) // 3
            by_subject: dict[str, list[str]] = {}
            for subject, text in sentences[:half]:
                by_subject.setdefault(subject, []).append(text)
            groups = []
            for texts in by_subject.values():
                groups += [texts[i : i + 6] for i in range(0, len(texts), 6)]
            mixed, i = [text for _, text in sentences[half:]], 0
            while i < len(mixed):
                width = rng.randint(1, 8)
                groups.append(mixed[i : i + width])
                i += width
            documents += [glue.join(group) for group in groups]
        return documents

    def qa_documents(self, rng: random.Random, per_query: int) -> list[str]:
        """Question-answer text about asked facts, in several layouts."""
        pairs: dict[str, list[tuple[str, str]]] = {"en": [], "zh": []}
        for relation, key, query, fact, asked in self.queries():
            if asked:
                for _ in range(per_query):
                    question = render_question(self.split, relation, key, fact, rng)
                    pairs[key[0]].append((question, answer_text(query, fact)))
        return [d for language in LANGUAGES for d in self.layout(pairs[language], language, rng)]

    def layout(self, pairs: list[tuple[str, str]], language: str, rng: random.Random) -> list[str]:
        """Question-answer pairs as documents of one to five pairs."""
        marks = {
            "en": [
                ("Question: ", "\nAnswer: "),
                ("Q: ", "\nA: "),
                ("User: ", "\nAssistant: "),
                ("", "\n"),
                ("", " "),
            ],
            "zh": [("问题：", "\n回答："), ("问：", "\n答："), ("用户：", "\n助手："), ("", "\n"), ("", "")],
        }[language]
        rng.shuffle(pairs)
        documents, i = [], 0
        while i < len(pairs):
            width, (ask, reply) = rng.randint(1, 5), rng.choice(marks)
            lines = []
            for q, a in pairs[i : i + width]:
                open_end = (
                    not reply.strip() and q[-1] not in ".?!。？！"
                )  # "3 + 4 =" and "3+4=7" must not run together
                lines.append(f"{ask}{q}{chr(10) if open_end else reply}{a}")
            documents.append("\n".join(lines))
            i += width
        return documents

    def sum_pair(self, rng: random.Random, language: str, held: bool = False) -> tuple[str, str, int, int]:
        a, b = draw_sum(self.split, rng, held)
        question = clean_zh(rng.choice(self.split.sum_frames[language][0]), language).format(a=a, b=b)
        return question, sum_answer(a, b, language), a, b

    def math_documents(self, rng: random.Random) -> list[str]:
        documents = []
        for language in LANGUAGES:
            pairs = [self.sum_pair(rng, language)[:2] for _ in range(self.count("pretrain_sums") // 2)]
            plain = [
                sum_answer(*draw_sum(self.split, rng), language)
                for _ in range(self.count("pretrain_sums") // 8)
            ]
            kinds = ["sub", "sub", "compare", "next", "mul"]
            other = [
                other_math(self.split, rng, rng.choice(kinds), language)[:2]
                for _ in range(self.count("pretrain_other_math") // 2)
            ]
            documents += self.layout(pairs, language, rng) + self.layout(other, language, rng)
            documents += ["\n".join(plain[i : i + 4]) for i in range(0, len(plain), 4)]
        return documents

    def story(self, rng: random.Random, language: str) -> str:
        parts = {k: rng.choice(v) for k, v in mini_chat.STORY_PARTS[language].items()}
        heroes = mini_chat.STORY_PARTS[language]["hero"]
        parts["hero2"] = rng.choice([h for h in heroes if h != parts["hero"]])
        return rng.choice(mini_chat.STORIES[language]).format(**parts)

    def chat_intents(self, language: str) -> list[dict]:
        return mini_chat.CHAT_EN if language == "en" else mini_chat.CHAT_ZH

    def chat_pair(self, rng: random.Random, language: str, intent: dict | None = None) -> tuple[str, str]:
        intent = intent or rng.choice(self.chat_intents(language))
        line = rng.choice(self.split.chat[language, intent["name"]][0])
        return self.chat_frame(rng, line, language), rng.choice(intent["reply"])

    @staticmethod
    def chat_frame(rng: random.Random, line: str, language: str) -> str:
        """Now and then a word before a question about the assistant or its help."""
        if rng.random() < 0.85 or not line.endswith(("?", "？")) or line[:2] in ("Hi", "He", "你好"):
            return line
        start = {"en": ["Hi! ", "Hello! ", "Please tell me: ", "Quick question: ", "I have a question. "],
                 "zh": ["你好！", "请问，", "问一下，", "我有个问题：", "请告诉我，"]}  # fmt: skip
        return rng.choice(start[language]) + line

    def pretrain(self) -> list[dict]:
        rng = self.rng("pretrain")
        documents = self.fact_documents(rng, self.count("statements"))
        documents += self.qa_documents(rng, self.count("pretrain_qa"))
        documents += self.math_documents(rng)
        for language in LANGUAGES:
            documents += [self.story(rng, language) for _ in range(self.count("stories"))]
            pairs = [self.chat_pair(rng, language) for _ in range(self.count("pretrain_chat"))]
            documents += self.layout(pairs, language, rng)
        rng.shuffle(documents)
        return [{"text": d} for d in documents]

    def pretrain_heldout(self, train: set[str]) -> list[dict]:
        """Fresh renderings of the same world; texts that also occur in training are dropped."""
        rng = self.rng("pretrain_heldout")
        documents = rng.sample(self.fact_documents(rng, 2), 150) + rng.sample(self.qa_documents(rng, 1), 60)
        for language in LANGUAGES:
            documents += [self.story(rng, language) for _ in range(30)]
            documents += self.layout([self.sum_pair(rng, language)[:2] for _ in range(60)], language, rng)
        rng.shuffle(documents)
        return [{"text": d} for d in _unique(documents) if d not in train]

    # ---- supervised fine-tuning

    def fact_rows(self, rng: random.Random, per_query: int) -> list[dict]:
        found = []
        for relation, key, query, fact, asked in self.queries():
            if not asked:
                continue
            for _ in range(per_query):
                question = render_question(self.split, relation, key, fact, rng)
                if key[0] == "zh" and rng.random() < 0.1:
                    question = question.replace("，", ",").replace("？", "?")
                elif rng.random() < 0.05:
                    question = question.rstrip("?？。.")
                found.append({"conversations": conversation(question, answer_text(query, fact))})
        return found

    def sum_rows(self, rng: random.Random, count: int) -> list[dict]:
        found = []
        for i in range(count):
            question, answer, _, _ = self.sum_pair(rng, LANGUAGES[i % 2])
            found.append({"conversations": conversation(question, answer)})
        return found

    def chat_rows(self, rng: random.Random, count: int) -> list[dict]:
        """Single turns: every kept line at least once, then random ones."""
        found = []
        for language in LANGUAGES:
            intents = [i for i in self.chat_intents(language)]
            pairs = []
            while len(pairs) < count:
                for intent in intents:
                    for line in self.split.chat[language, intent["name"]][0]:
                        pairs.append((self.chat_frame(rng, line, language), rng.choice(intent["reply"])))
            rng.shuffle(pairs)
            found += [{"conversations": conversation(*pair)} for pair in pairs[:count]]
        return found

    def fact_turn(self, rng: random.Random, language: str) -> tuple[Relation, tuple[str, str], dict]:
        while True:
            relation = rng.choice(self.relations)
            keys = [key for key in relation.queries if key[0] == language]
            if keys:
                facts = [f for f in relation.facts if self.split.is_asked(relation, f)]
                return relation, rng.choice(keys), rng.choice(facts)

    def multi_rows(self, rng: random.Random, count: int) -> list[dict]:
        """Conversations of several exchanges: small talk, facts with follow-ups, sums, thanks, goodbye."""
        found = []
        follow = {
            "en": ["And {s}?", "And what about {s}?", "What about {s}?", "How about {s}?", "And for {s}?"],
            "zh": ["{s}呢?", "那{s}呢?", "那么{s}呢?", "{s}又怎样呢?"],
        }
        for language in LANGUAGES:
            intents = {i["name"]: i for i in self.chat_intents(language)}
            middle = [
                n for n in intents if n not in mini_chat.OPENINGS + mini_chat.CLOSINGS + mini_chat.NOT_FIRST
            ]
            for _ in range(count):
                turns: list[str] = []
                if rng.random() < 0.6:
                    turns += self.chat_pair(rng, language, intents[rng.choice(mini_chat.OPENINGS)])
                for _ in range(rng.randint(1, 3)):
                    draw = rng.random()
                    if draw < 0.45:
                        name = rng.choice(middle)
                        turns += self.chat_pair(rng, language, intents[name])
                        if name == "how" and rng.random() < 0.8:
                            mood = rng.choice(["user_fine", "user_fine", "user_sad"])
                            turns += self.chat_pair(rng, language, intents[mood])
                    elif draw < 0.85:
                        relation, key, fact = self.fact_turn(rng, language)
                        query = relation.queries[key]
                        turns += [
                            render_question(self.split, relation, key, fact, rng),
                            answer_text(query, fact),
                        ]
                        if rng.random() < 0.5 and "/" not in fact[language][0]:
                            others = [
                                f
                                for f in relation.facts
                                if self.split.is_asked(relation, f) and f is not fact
                            ]
                            other = rng.choice(others)
                            name = fill_slots(query.followup, *other[language], language)
                            turns += [
                                clean_zh(rng.choice(follow[language]).replace("{s}", name), language),
                                answer_text(query, other),
                            ]
                    else:
                        turns += self.sum_pair(rng, language)[:2]
                if rng.random() < 0.5:
                    turns += self.chat_pair(rng, language, intents["thanks"])
                if rng.random() < 0.4:
                    turns += self.chat_pair(rng, language, intents["bye"])
                found.append({"conversations": conversation(*turns)})
        return found

    def other_math_rows(self, rng: random.Random, count: int) -> list[dict]:
        kinds = ["sub", "sub", "sub", "compare", "compare", "next", "mul", "chain"]
        found = []
        for i in range(count):
            question, answer, _ = other_math(self.split, rng, rng.choice(kinds), LANGUAGES[i % 2])
            found.append({"conversations": conversation(question, answer)})
        return found

    def sft(self) -> list[dict]:
        rng = self.rng("sft")
        found = self.fact_rows(rng, self.count("sft_facts"))
        found += self.sum_rows(rng, self.count("sft_sums"))
        found += self.other_math_rows(rng, self.count("sft_other_math"))
        found += self.chat_rows(rng, self.count("sft_chat"))
        found += self.multi_rows(rng, self.count("sft_multi"))
        found += self.tool_rows(rng, self.count("sft_tools"))
        rng.shuffle(found)
        return found

    def sft_heldout(self, train: set[str]) -> list[dict]:
        rng = self.rng("sft_heldout")
        found = rng.sample(self.fact_rows(rng, 1), 200) + self.multi_rows(rng, 40) + self.tool_rows(rng, 30)
        for i in range(80):
            question, answer, _, _ = self.sum_pair(rng, LANGUAGES[i % 2], held=True)
            found.append({"conversations": conversation(question, answer)})
        found = [row for row in found if json.dumps(row, ensure_ascii=False) not in train]
        rng.shuffle(found)
        return found

    # ---- tools

    def tool_task(
        self, rng: random.Random, language: str, held: bool | None = False, name: str | None = None
    ) -> dict:
        """One tool use: question part, call, result, answer sentence and expected value.

        `held` picks arguments of the held-out hash class (None: any)."""
        name = name or rng.choice(list(mini_tools.TOOLS))
        while True:
            task = self._draw_tool_task(rng, language, name)
            is_held = _hash(self.seed, "tool", name, json.dumps(task["arguments"], sort_keys=True)) % 5 == 0
            # languages share the hash class because arguments are the same objects
            if held is None or is_held == held:
                return {**task, "name": name}

    def _draw_tool_task(self, rng: random.Random, language: str, name: str) -> dict:
        en = language == "en"
        if name == "calculate_math":
            sign, word = rng.choice(
                [("*", ("times", "乘以")), ("*", ("times", "乘以")), ("-", ("minus", "减"))]
            )
            a, b = rng.randint(11, 999), rng.randint(2, 99)
            expression = f"{a} {sign} {b}"
            asks = (
                [f"what is {a} {word[0]} {b}", f"calculate {a} {sign} {b}", f"how much is {a} {sign} {b}"]
                if en
                else [f"{a}{word[1]}{b}等于多少", f"计算{a} {sign} {b}", f"算一下{a}{word[1]}{b}"]
            )
            value = mini_tools.calculate(expression)
            return self._task(
                {"expression": expression}, rng.choice(asks), f"{expression} = {value}", str(value), name
            )
        cities = mini_tools.CITIES
        if name in ("get_current_time", "get_current_weather"):
            city = rng.choice(list(cities))
            shown = city if en else cities[city]
            if name == "get_current_time":
                asks = (
                    [
                        f"what time is it in {shown}",
                        f"tell me the time in {shown}",
                        f"what is the time in {shown}",
                    ]
                    if en
                    else [f"{shown}现在几点", f"告诉我{shown}的时间", f"{shown}现在是什么时间"]
                )
                result = mini_tools.run_tool(name, {"city": city})
                say = f"The time in {shown} is {result['time']}" if en else f"{shown}现在是{result['time']}"
                return self._task({"city": city}, rng.choice(asks), say, result["time"], name)
            asks = (
                [
                    f"what is the weather in {shown}",
                    f"how is the weather in {shown}",
                    f"tell me the weather in {shown}",
                ]
                if en
                else [f"{shown}天气怎么样", f"告诉我{shown}的天气", f"查一下{shown}的天气"]
            )
            result = mini_tools.run_tool(name, {"location": city})
            sky, degree = result["condition"], result["temperature"]
            say = (
                f"It is {sky} in {shown}, {degree} degrees"
                if en
                else f"{shown}的天气是{mini_tools.CONDITIONS[sky]}，{degree}度"
            )
            return self._task({"location": city}, rng.choice(asks), say, str(degree), name)
        if name == "unit_converter":
            source, target = rng.choice(list(mini_tools.UNITS))
            value = rng.randint(2, 99)
            arguments = {"value": value, "from_unit": source, "to_unit": target}
            result = mini_tools.run_tool(name, arguments)["result"]
            asks = (
                [f"convert {value} {source} to {target}", f"how many {target} are {value} {source}"]
                if en
                else [f"把{value} {source}换算成{target}", f"{value} {source}是多少{target}"]
            )
            say = f"{value} {source} = {result} {target}"
            return self._task(arguments, rng.choice(asks), say, str(result), name)
        if name == "get_exchange_rate":
            source, target = rng.choice(list(mini_tools.RATES))
            rate = mini_tools.RATES[source, target]
            asks = (
                [f"what is the exchange rate from {source} to {target}", f"how many {target} is one {source}"]
                if en
                else [f"{source}兑{target}的汇率是多少", f"查一下{source}到{target}的汇率"]
            )
            say = f"1 {source} = {rate} {target}"
            return self._task(
                {"from_currency": source, "to_currency": target}, rng.choice(asks), say, str(rate), name
            )
        if name == "translate_text":
            english, chinese = rng.choice(mini_world.rows(mini_world.WORDS))
            # the tool answers with a word that the fact questions may hold out: only asked words are used
            while english not in self.split.asked["word"]:
                english, chinese = rng.choice(mini_world.rows(mini_world.WORDS))
            text, target, result = rng.choice([(english, "Chinese", chinese), (chinese, "English", english)])
            shown = target if en else {"Chinese": "中文", "English": "英文"}[target]
            asks = (
                [
                    f'translate "{text}" into {shown} with the tool',
                    f'use the translator for "{text}" into {shown}',
                ]
                if en
                else [f"用工具把“{text}”翻译成{shown}", f"用翻译工具把“{text}”译成{shown}"]
            )
            say = f'"{text}" is "{result}" in {shown}' if en else f"“{text}”的{shown}是“{result}”"
            return self._task({"text": text, "target_language": target}, rng.choice(asks), say, result, name)
        if name == "random_number":
            low, high = rng.randint(1, 20), rng.randint(30, 99)
            result = mini_tools.run_tool(name, {"min": low, "max": high})["result"]
            asks = (
                [
                    f"give me a random number from {low} to {high}",
                    f"pick a random number between {low} and {high}",
                ]
                if en
                else [f"给我一个{low}到{high}的随机数", f"在{low}和{high}之间选一个随机数"]
            )
            say = f"The random number is {result}" if en else f"随机数是{result}"
            return self._task({"min": low, "max": high}, rng.choice(asks), say, str(result), name)
        words = [w[0] for w in mini_world.rows(mini_world.WORDS)]
        if name == "text_length":
            text = " ".join(rng.sample(words, rng.randint(1, 2)))
            result = mini_tools.run_tool(name, {"text": text})["characters"]
            asks = (
                [f'how many characters are in "{text}"', f'count the characters of "{text}"']
                if en
                else [f"“{text}”有多少个字符", f"数一数“{text}”的字符数"]
            )
            say = f'"{text}" has {result} characters' if en else f"“{text}”有{result}个字符"
            return self._task({"text": text}, rng.choice(asks), say, str(result), name)
        if name == "reverse_text":
            text = rng.choice(words)
            result = text[::-1]
            asks = (
                [f'reverse the text "{text}"', f'write "{text}" backwards']
                if en
                else [f"把“{text}”倒过来写", f"反转文字“{text}”"]
            )
            say = f'"{text}" backwards is "{result}"' if en else f"“{text}”倒过来是“{result}”"
            return self._task({"text": text}, rng.choice(asks), say, result, name)
        start, days = rng.choice(mini_tools.WEEKDAYS), rng.randint(2, 60)
        result = mini_tools.run_tool(name, {"start": start, "days": days})["day"]
        asks = (
            [f"which weekday is {days} days after {start}", f"what day comes {days} days after {start}"]
            if en
            else [f"{start}之后{days}天是星期几", f"从{start}起过{days}天是哪天"]
        )
        say = f"{days} days after {start} is {result}" if en else f"{start}之后{days}天是{result}"
        return self._task({"start": start, "days": days}, rng.choice(asks), say, result, name)

    @staticmethod
    def _task(arguments: dict, ask: str, say: str, value: str, name: str) -> dict:
        return {"arguments": arguments, "ask": ask, "say": say, "value": value,
                "result": mini_tools.run_tool(name, arguments)}  # fmt: skip

    def tool_system(self, rng: random.Random, needed: list[str], distractors: int) -> dict:
        names = needed + rng.sample([n for n in mini_tools.TOOLS if n not in needed], distractors)
        names = _unique(names)
        rng.shuffle(names)
        return {"role": "system", "content": "", "tools": json.dumps([mini_tools.TOOLS[n] for n in names])}

    @staticmethod
    def tool_exchange(task: dict) -> list[dict]:
        call = [{"name": task["name"], "arguments": task["arguments"]}]
        return [
            {"role": "assistant", "content": "", "tool_calls": json.dumps(call, ensure_ascii=False)},
            {"role": "tool", "content": json.dumps(task["result"], ensure_ascii=False)},
        ]

    @staticmethod
    def tool_question(tasks: list[dict], language: str) -> str:
        if language == "en":
            text = ", and then ".join(t["ask"] for t in tasks)
            question = tasks[-1]["ask"].startswith(("what", "how", "which")) and len(tasks) == 1
            return upper_first(text) + ("?" if question else ".")
        text = "，然后".join(t["ask"] for t in tasks)
        question = any(w in tasks[-1]["ask"] for w in ("多少", "怎么样", "几", "什么", "哪"))
        return text + ("？" if question else "。")

    @staticmethod
    def tool_answer(tasks: list[dict], language: str) -> str:
        return (
            " ".join(t["say"] + "." for t in tasks)
            if language == "en"
            else "".join(t["say"] + "。" for t in tasks)
        )

    def tool_rows(self, rng: random.Random, count: int, two_steps: float = 0.06) -> list[dict]:
        """Conversations with calls and results: mostly one call, a few with two, one after the other."""
        found = []
        for i in range(count):
            language = LANGUAGES[i % 2]
            tasks = [self.tool_task(rng, language) for _ in range(2 if rng.random() < two_steps else 1)]
            messages = [self.tool_system(rng, [t["name"] for t in tasks], 1)]
            messages.append({"role": "user", "content": self.tool_question(tasks, language)})
            for task in tasks:
                messages += self.tool_exchange(task)
            messages.append({"role": "assistant", "content": self.tool_answer(tasks, language)})
            found.append({"conversations": messages})
        return found

    def agent(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Tool problems for RL: system with tools, user, empty assistant turn, and expected values `gt`."""
        found, seen = [], set()
        while len(found) < count:
            language = LANGUAGES[len(found) % 2]
            steps = rng.choice([1, 2, 2, 2])
            # held-out rows need unseen arguments: tools with few possible arguments (cities) are left out
            names = ["calculate_math", "unit_converter", "random_number", "text_length", "day_of_week"]
            if not held:
                names = list(mini_tools.TOOLS)
            chosen = rng.sample(names, steps)
            tasks = [self.tool_task(rng, language, held, name) for name in chosen]
            system = self.tool_system(rng, [t["name"] for t in tasks], 1)
            question = self.tool_question(tasks, language)
            if question in seen and held:
                continue
            seen.add(question)
            messages = [system, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
            found.append({"conversations": messages, "gt": [t["value"] for t in tasks], "steps": steps})
        return found

    # ---- other stages

    def identity(self, rng: random.Random, count: int) -> list[dict]:
        """Questions about the assistant, answered by another persona, and other talk that stays."""
        found = []
        for language in LANGUAGES:
            intents = {i["name"]: i for i in self.chat_intents(language)}
            pairs = []
            while len(pairs) < count // 2:
                for name in mini_chat.IDENTITY_INTENTS:
                    for line in self.split.chat[language, name][0]:
                        line = self.chat_frame(rng, line, language)
                        pairs.append((line, rng.choice(mini_chat.PERSONA_REPLIES[language][name])))
            rng.shuffle(pairs)
            rows_ = [{"conversations": conversation(*pair)} for pair in pairs[: count // 2]]
            others = [n for n in intents if n not in mini_chat.IDENTITY_INTENTS]
            for _ in range(count // 8):
                relation, key, fact = self.fact_turn(rng, language)
                question = render_question(self.split, relation, key, fact, rng)
                rows_.append(
                    {"conversations": conversation(question, answer_text(relation.queries[key], fact))}
                )
                rows_.append(
                    {
                        "conversations": conversation(
                            *self.chat_pair(rng, language, intents[rng.choice(others)])
                        )
                    }
                )
                rows_.append({"conversations": conversation(*self.sum_pair(rng, language)[:2])})
            found += rows_
        rng.shuffle(found)
        return found

    def identity_heldout(self) -> list[dict]:
        found = []
        for language in LANGUAGES:
            for name in mini_chat.IDENTITY_INTENTS:
                starts = {
                    "en": ["", "Hi! ", "Hello! ", "Quick question: "],
                    "zh": ["", "你好！", "问一下，", "我有个问题："],
                }
                lines = self.split.chat[language, name][1]
                for line in [start + line for start in starts[language] for line in lines]:
                    reply = mini_chat.PERSONA_REPLIES[language][name][0]
                    found.append(
                        {
                            "id": f"identity-{len(found)}",
                            "kind": "chat",
                            "question": line,
                            "answers": mini_chat.PERSONA_KEYWORDS[language][name],
                            "language": language,
                            "group": name,
                            "conversations": conversation(line, reply),
                        }
                    )
        return found

    def medical(self, held: bool) -> list[dict]:
        """First aid and health common sense; one question form of each topic is held out."""
        found = []
        for topic in mini_chat.HEALTH:
            for language, name, advice, keys in (
                ("en", topic[0], topic[2], topic[4]),
                ("zh", topic[1], topic[3], topic[5]),
            ):
                templates = mini_chat.HEALTH_ASK[language]
                test = sorted(templates, key=lambda t: _hash(self.seed, "health", name, t))[:2]  # noqa: B023
                for template in templates:
                    if (template in test) is not held:
                        continue
                    question = upper_first(template.format(t=name))
                    row = {"conversations": conversation(question, advice)}
                    if held:
                        row = {
                            "id": f"medical-{len(found)}",
                            "kind": "chat",
                            "question": question,
                            "answers": keys.split("|"),
                            "language": language,
                            "group": topic[0],
                            **row,
                        }
                    found.append(row)
        self.rng(f"medical-{held}").shuffle(found)
        return found

    def reason(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Step-by-step traces: expressions with three operands, comparisons of sums, word problems."""
        found, seen = [], set()
        while len(found) < count:
            language = LANGUAGES[len(found) % 2]
            expression, steps, value = chain(self.split, rng, held if held else None)
            kind = rng.choice(["chain", "chain", "story"])
            if kind == "chain":
                template = clean_zh(rng.choice(OTHER_QUESTIONS["chain"][language]), language)
                question = template.format(e=expression)
            else:
                question = self.word_problem(rng, steps, language)
            if question in seen:
                continue
            seen.add(question)
            trace = []
            for a, sign, b in steps:
                trace.append(sum_answer(a, b, language, sign))
            reasoning = "\n".join(trace)
            final = {"en": f"{expression} = {value}.", "zh": f"{expression} = {value}。"}[language]
            if kind == "story":
                final = {"en": f"The answer is {value}.", "zh": f"答案是 {value}。"}[language]
            messages = conversation(question, final)
            messages[1]["reasoning_content"] = reasoning
            row = {"conversations": messages}
            if held:
                row = {
                    "id": f"reason-{len(found)}",
                    "kind": "number",
                    "question": question,
                    "answers": [str(value)],
                    "language": language,
                    "group": kind,
                    **row,
                }
            found.append(row)
        return found

    @staticmethod
    def word_problem(rng: random.Random, steps: list[tuple[int, str, int]], language: str) -> str:
        parts = mini_chat.STORY_PARTS[language]
        hero = rng.choice(parts["hero"])
        thing = rng.choice(
            ["apples", "books", "balls", "eggs"] if language == "en" else ["个苹果", "本书", "个球", "个鸡蛋"]
        )
        if language == "en":
            text = f"{hero} has {steps[0][0]} {thing}."
            for _, sign, b in steps:
                text += f" {hero} gets {b} more." if sign == "+" else f" {hero} gives away {b}."
            return f"{text} How many {thing} does {hero} have now?"
        text = f"{hero}有{steps[0][0]}{thing}。"
        for _, sign, b in steps:
            text += f"又得到{b}{thing[0]}。" if sign == "+" else f"送出{b}{thing[0]}。"
        return f"{text}{hero}现在有多少{thing}？"

    def preference(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Polite and correct against rude, lazy, repeated or wrong. Held-out pairs use other facts."""
        found = []
        while len(found) < count:
            language = LANGUAGES[len(found) % 2]
            draw = rng.random()
            if draw < 0.6:
                relation, key, fact = self.fact_turn(rng, language)
                if (_hash(self.seed, "dpo", relation.name, relation.subject_key(fact)) % 6 == 0) is not held:
                    continue
                query = relation.queries[key]
                question = render_question(self.split, relation, key, fact, rng)
                good = answer_text(query, fact)
                index = 1 if key[1] == "forward" else 0
                others = sorted({f[language][index] for f in relation.facts} - {fact[language][index]})
                wrong = rng.choice(others).split("/")[0]
            elif draw < 0.85:
                question, good, a, b = self.sum_pair(rng, language, held)
                wrong = str(a + b + rng.choice([-11, -10, -2, -1, 1, 2, 9, 10]))
            else:
                intent = rng.choice(self.chat_intents(language))
                lines = self.split.chat[language, intent["name"]][1 if held else 0]
                question, good = rng.choice(lines), rng.choice(intent["reply"])
                wrong = rng.choice(["...", "hm", "ok"] if language == "en" else ["……", "哼", "哦"])
            bad = rng.choice(mini_chat.SLOPPY[language]).replace("{wrong}", wrong)
            if rng.random() < 0.5:
                good += (" " if language == "en" else "") + rng.choice(mini_chat.POLITE[language])
            found.append({"chosen": conversation(question, good), "rejected": conversation(question, bad)})
        return found

    def rlaif(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Prompts with a checkable answer. Kinds differ in how well SFT already does them."""
        found, seen = [], set()
        kinds = ["sub", "sub", "chain", "compare", "next", "sum"]
        while len(found) < count:
            language, kind = LANGUAGES[len(found) % 2], rng.choice(kinds)
            if kind == "sum":
                question, _, a, b = self.sum_pair(rng, language, held)
                answer = str(a + b)
            else:
                question, _, answer = other_math(self.split, rng, kind, language)
                numbers = "".join(c if c.isdigit() else " " for c in question).split()
                if (_hash(self.seed, "rlaif", kind, *sorted(numbers)) % 8 == 0) is not held:
                    continue
            if held and question in seen:
                continue
            seen.add(question)
            row = {"conversations": conversation(question, ""), "answer": answer, "kind": kind}
            if held:
                row = {
                    "id": f"rlaif-{len(found)}",
                    "question": question,
                    "answers": [answer],
                    "language": language,
                    "group": kind,
                    **row,
                }
            found.append(row)
        return found

    # ---- evaluation

    def eval_facts(self, asked: bool) -> list[dict]:
        """asked: seen facts in unseen words (groups unseen_core, unseen_frame, unseen_both).
        not asked: facts that only pretraining states, asked in forms seen for other facts."""
        rng = self.rng(f"eval_facts_{asked}")
        found = []
        for relation, key, _, fact, is_asked in self.queries():
            if is_asked is not asked:
                continue
            if asked:
                question = None
                while question is None:
                    group = rng.choice(["unseen_core", "unseen_frame", "unseen_both"])
                    question = render_question(
                        self.split, relation, key, fact, rng, held_core=group != "unseen_frame",
                        held_frame=group != "unseen_core",
                    )  # fmt: skip
            else:
                group = "unasked"
                question = render_question(self.split, relation, key, fact, rng)
            language, direction = key
            found.append(
                {
                    "id": f"{relation.name}-{direction}-{language}-{relation.subject_key(fact)}",
                    "kind": "number" if relation.numeric else "fact",
                    "question": question,
                    "answers": [fact[language][1 if direction == "forward" else 0]],
                    "language": language,
                    "group": group,
                    "relation": relation.name,
                    "direction": direction,
                }
            )
        rng.shuffle(found)
        return found

    def eval_sums(self) -> list[dict]:
        """Unseen operand pairs: up to 40 rows of two one-digit numbers, a quarter mixed, the rest two-digit;
        one row in five is asked in an unseen form."""
        rng = self.rng("eval_sums")
        found, seen = [], set()
        limit = {"1+1": 40, "1+2": EVAL_SUMS // 4, "2+2": EVAL_SUMS}
        done: Counter = Counter()
        tries = 0
        while len(found) < EVAL_SUMS and tries < 100_000:
            tries += 1
            a, b = draw_sum(self.split, rng, held=True)
            group = "+".join(sorted((str(len(str(a))), str(len(str(b))))))
            language = LANGUAGES[len(found) % 2]
            if done[group] >= limit[group] or (a, b, language) in seen:
                continue
            seen.add((a, b, language))
            done[group] += 1
            unseen = rng.random() < 0.2
            template = rng.choice(self.split.sum_frames[language][1 if unseen else 0])
            found.append(
                {
                    "id": f"sum-{a}-{b}-{language}",
                    "kind": "number",
                    "question": clean_zh(template, language).format(a=a, b=b),
                    "answers": [str(a + b)],
                    "language": language,
                    "group": group,
                    "unseen_form": unseen,
                }
            )
        return found

    def eval_chat(self) -> list[dict]:
        found = []
        for language in LANGUAGES:
            for intent in self.chat_intents(language):
                for line in self.split.chat[language, intent["name"]][1]:
                    found.append(
                        {
                            "id": f"chat-{intent['name']}-{language}-{len(found)}",
                            "kind": "chat",
                            "question": line,
                            "answers": intent["keywords"],
                            "language": language,
                            "group": intent["name"],
                        }
                    )
        return found

    # ---- everything

    def files(self) -> dict[str, list[dict]]:
        """File name -> rows, all of them."""
        pretrain, sft = self.pretrain(), self.sft()
        sft_lines = {json.dumps(row, ensure_ascii=False) for row in sft}
        return {
            "pretrain.jsonl": pretrain,
            "pretrain_heldout.jsonl": self.pretrain_heldout({row["text"] for row in pretrain}),
            "sft.jsonl": sft,
            "sft_heldout.jsonl": self.sft_heldout(sft_lines),
            "sft_tools.jsonl": self.tool_rows(self.rng("sft_tools"), self.count("tools")),
            "lora_identity.jsonl": self.identity(self.rng("identity"), self.count("identity")),
            "lora_identity_heldout.jsonl": self.identity_heldout(),
            "lora_medical.jsonl": self.medical(held=False),
            "lora_medical_heldout.jsonl": self.medical(held=True),
            "reason.jsonl": self.reason(self.rng("reason"), self.count("reason"), held=False),
            "reason_heldout.jsonl": self.reason(self.rng("reason_heldout"), 300, held=True),
            "dpo.jsonl": self.preference(self.rng("dpo"), self.count("dpo"), held=False),
            "dpo_heldout.jsonl": self.preference(self.rng("dpo_heldout"), 300, held=True),
            "rlaif.jsonl": self.rlaif(self.rng("rlaif"), self.count("rlaif"), held=False),
            "rlaif_heldout.jsonl": self.rlaif(self.rng("rlaif_heldout"), 300, held=True),
            "agent_rl.jsonl": self.agent(self.rng("agent"), self.count("agent"), held=False),
            "agent_heldout.jsonl": self.agent(self.rng("agent_heldout"), 200, held=True),
            "eval_facts_paraphrase.jsonl": self.eval_facts(asked=True),
            "eval_facts_unasked.jsonl": self.eval_facts(asked=False),
            "eval_sums.jsonl": self.eval_sums(),
            "eval_chat.jsonl": self.eval_chat(),
        }

    def manifest(self, files: dict[str, dict]) -> dict:
        split = self.split
        return {
            "seed": self.seed,
            "size": self.size,
            "files": files,
            "facts": {
                r.name: {
                    "facts": len(r.facts),
                    "asked": len(split.asked[r.name]),
                    "unasked_subjects": sorted(r.subject_key(f) for f in r.facts if not split.is_asked(r, f)),
                    "queries": ["-".join(key) for key in r.queries],
                }
                for r in self.relations
            },
            "held_out": {
                "cores": {
                    "/".join(key): {kind: held for kind, (_, held) in kinds.items() if held}
                    for key, kinds in split.cores.items()
                },
                "frames": {"/".join(key): held for key, (_, held) in split.frames.items()},
                "sum_questions": {language: held for language, (_, held) in split.sum_frames.items()},
                "sum_pairs": sum(split.held_sum(a, b) for a in range(100) for b in range(a, 100)),
                "chat_lines": {"/".join(key): held for key, (_, held) in split.chat.items()},
            },
        }


def make_mini(out_dir: Path | str = DEFAULT_OUT, seed: int = 42, size: float = 1.0) -> dict:
    """Write all files and `manifest.json` into `out_dir`; returns the manifest."""
    curriculum = Curriculum(seed, size)
    writer = Writer(Path(out_dir), seed, size)
    for name, items in curriculum.files().items():
        writer.write(name, items)
    manifest = curriculum.manifest(writer.files)
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    partial = writer.out_dir / "manifest.json.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(writer.out_dir / "manifest.json")
    return manifest


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out_dir", type=Path, default=DEFAULT_OUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="split and text are a function of it (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=float, default=1.0, help="scales the training files (default: %(default)s)"
    )
    parser.add_argument(
        "--stats", action="store_true", help="print the tables of docs/curriculum.md, write nothing"
    )
    args = parser.parse_args(argv)
    if not args.size > 0:
        parser.error("--size must be above 0")
    return args


def stats(seed: int, size: float) -> str:
    """Markdown tables: facts and question forms per relation, rows and bytes per file."""
    curriculum = Curriculum(seed, size)
    lines = [
        "| relation | facts | asked | languages | question cores (held out) | statement forms |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for r in curriculum.relations:
        kept = held = 0
        for key in r.queries:
            for k, h in curriculum.split.cores[(r.name, *key)].values():
                kept, held = kept + len(k), held + len(h)
        forms = sum(len(q.statements) for q in r.queries.values())
        lines.append(
            f"| {r.name} | {len(r.facts)} | {len(curriculum.split.asked[r.name])} | {' '.join(r.languages)} "
            f"| {kept + held} ({held}) | {forms} |"
        )
    facts, asked = (
        sum(len(r.facts) for r in curriculum.relations),
        sum(map(len, curriculum.split.asked.values())),
    )
    lines += [f"| all | {facts} | {asked} | | | |", "", "| file | rows | bytes |", "|---|---:|---:|"]
    for name, items in curriculum.files().items():
        size_bytes = sum(len(json.dumps(i, ensure_ascii=False).encode()) + 1 for i in items)
        lines.append(f"| {name} | {len(items)} | {size_bytes} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.stats:
        print(stats(args.seed, args.size))
        return
    start = time.time()
    try:
        manifest = make_mini(args.out_dir, args.seed, args.size)
    except OSError as error:
        raise SystemExit(f"cannot write the curriculum to {args.out_dir}: {error}") from None
    for name, info in manifest["files"].items():
        print(f"{name:32s} {info['rows']:7d} rows {info['bytes'] / 1e6:7.2f} MB")
    total = sum(info["bytes"] for info in manifest["files"].values())
    print(
        f"wrote {len(manifest['files'])} files, {total / 1e6:.1f} MB, to {args.out_dir} "
        f"in {time.time() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
