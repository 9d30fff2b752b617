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

from dataset import mini_chat, mini_tasks, mini_tools, mini_world
from dataset.mini_eval import is_correct, normalise  # noqa: F401  (is_correct: this file's interface)
from dataset.mini_math import (
    OTHER_QUESTIONS,
    chain,
    draw_sum,
    other_math,
    sum_answer,
    word_problem,
)
from dataset.mini_split import (
    LANGUAGES,
    Inventor,
    Split,
    answer_text,
    conversation,
    hash_of,
    heading,
    render_question,
    statement,
    unique,
)
from dataset.mini_world import Query, Relation, clean_zh, fill_slots, upper_first

DEFAULT_OUT = Path(__file__).resolve().parent / "mini"

# how much of what, at --size 1
COUNTS = {
    "statements": 22,  # per fact, language and direction, in pretraining
    "titles": 4,  # per fact, language and direction: a heading and the canonical sentence
    "restated": 2,  # per fact, language and direction: two sentences that say the same
    "pretrain_qa": 7,  # per asked fact, language and direction
    "pretrain_sums": 5000,
    "pretrain_other_math": 1500,
    "pretrain_reading": 1000,  # per language, made-up facts with a question about one of them
    "pretrain_copying": 400,  # per language
    "stories": 300,  # per language
    "pretrain_chat": 500,  # per language
    "sft_facts": 7,  # per asked fact, language and direction
    "sft_sums": 3000,
    "sft_other_math": 700,
    "sft_chat": 1200,  # per language, single turn
    "sft_multi": 500,  # per language, several turns
    "sft_reading": 400,  # per language
    "sft_copying": 400,  # per language
    "sft_tools": 260,
    "tools": 5000,
    "tools_facts": 5,  # beside them, as sft_facts
    "identity": 640,
    "reason": 2000,
    "distill": 300,
    "dpo": 1400,
    "rlaif": 2400,
    "agent": 1000,
}
EVAL_SUMS = 600
# how question-answer text in pretraining marks its speakers
MARKS = {
    "en": [
        ("Question: ", "\nAnswer: "),
        ("Q: ", "\nA: "),
        ("User: ", "\nAssistant: "),
        ("", "\n"),
        ("", " "),
    ],
    "zh": [("问题：", "\n回答："), ("问：", "\n答："), ("用户：", "\n助手："), ("", "\n"), ("", "")],
}


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
        self.inventor = Inventor(self.relations)

    def rng(self, section: str) -> random.Random:
        return random.Random(hash_of(self.seed, section))

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

    def entry_documents(self, rng: random.Random, titles: int, restated: int) -> list[str]:
        """Entries of a reference book: a heading that names a subject and its property, then the sentence;
        and facts said twice. Both teach to carry a name over from what stands before. Nothing is asked."""
        entries: dict[str, list[str]] = {"en": [], "zh": []}
        for relation, key, query, fact, _ in self.queries():
            language = key[0]
            answer = answer_text(query, fact)
            for _ in range(titles):
                entries[language].append(heading(self.split, relation, key, fact, rng) + answer)
            for _ in range(restated):
                form = rng.choice(query.statements)
                first = statement(form, relation, fact, language, rng, wrap=True)
                again = rng.choice(mini_world.AGAIN[language]).replace("{st}", answer)
                entries[language].append(first + again)
        documents = []
        for texts in entries.values():
            rng.shuffle(texts)
            i = 0
            while i < len(texts):
                width = rng.randint(1, 6)
                documents.append("\n".join(texts[i : i + width]))
                i += width
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
        marks = MARKS[language]
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
        if rng.random() < 0.1:
            line = line.rstrip(".?!。？！").lower()  # as people type
        if rng.random() < 0.85 or not line.endswith(("?", "？")) or line[:2] in ("Hi", "He", "你好"):
            return line
        start = {"en": ["Hi! ", "Hello! ", "Please tell me: ", "Quick question: ", "I have a question. "],
                 "zh": ["你好！", "请问，", "问一下，", "我有个问题：", "请告诉我，"]}  # fmt: skip
        return rng.choice(start[language]) + line

    def copy_pair(self, rng: random.Random, language: str) -> tuple[str, str]:
        return self.inventor.copying(language, rng, mini_chat.COPY_TALK[language])

    def pretrain(self) -> list[dict]:
        rng = self.rng("pretrain")
        documents = self.fact_documents(rng, self.count("statements"))
        documents += self.entry_documents(rng, self.count("titles"), self.count("restated"))
        documents += self.qa_documents(rng, self.count("pretrain_qa"))
        documents += self.math_documents(rng)
        for language in LANGUAGES:
            documents += [self.story(rng, language) for _ in range(self.count("stories"))]
            pairs = [self.chat_pair(rng, language) for _ in range(self.count("pretrain_chat"))]
            pairs += [self.copy_pair(rng, language) for _ in range(self.count("pretrain_copying"))]
            documents += self.layout(pairs, language, rng)
            for _ in range(self.count("pretrain_reading")):
                documents += self.layout([self.inventor.reading(self.split, language, rng)], language, rng)
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
        return [{"text": d} for d in unique(documents) if d not in train]

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
                if key[0] == "en" and relation.name != "symbol" and rng.random() < 0.06:
                    question = question.lower()  # as people type
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
        for language in LANGUAGES:
            count = self.count("sft_reading")
            pairs = [self.inventor.reading(self.split, language, rng) for _ in range(count)]
            pairs += [self.copy_pair(rng, language) for _ in range(self.count("sft_copying"))]
            found += [{"conversations": conversation(*pair)} for pair in pairs]
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
        self,
        rng: random.Random,
        language: str,
        held: bool | None = False,
        name: str | None = None,
        small=False,
    ) -> dict:
        """One tool use: question part, call, result, answer sentence and expected value.

        `held` picks arguments of the held-out hash class (None: any); small: as in mini_tasks.draw_task."""
        name = name or rng.choice(list(mini_tools.TOOLS))
        # the translator's answers would give unasked words away
        words = [(w[0], w[1]) for w in mini_world.rows(mini_world.WORDS) if w[0] in self.split.asked["word"]]
        while True:
            task = mini_tasks.draw_task(rng, language, name, words, small)
            # languages share the hash class because arguments are the same objects
            is_held = self.split.held_class(5, "tool", name, json.dumps(task["arguments"], sort_keys=True))
            if held is None or is_held == held:
                return task

    def tool_rows(
        self,
        rng: random.Random,
        count: int,
        two_steps: float = 0.06,
        sloppy: float = 0.0,
        small: bool = False,
    ) -> list[dict]:
        """Conversations with calls and results: mostly one call, some with two, one after the other.
        sloppy: share of those with two in which the assistant does the first task only and forgets the
        second; small: as in mini_tasks.draw_task, with short answers."""
        found = []
        for i in range(count):
            language = LANGUAGES[i % 2]
            steps = 2 if rng.random() < two_steps else 1
            tasks = [self.tool_task(rng, language, small=small) for _ in range(steps)]
            messages = [mini_tasks.system_message(rng, [t["name"] for t in tasks], 1)]
            messages.append({"role": "user", "content": mini_tasks.question(tasks, language)})
            if len(tasks) == 2 and sloppy and rng.random() < sloppy:
                tasks = tasks[:1]
            for task in tasks:
                messages += mini_tasks.exchange(task)
            messages.append({"role": "assistant", "content": mini_tasks.answer(tasks, language, small)})
            found.append({"conversations": messages})
        return found

    def tools_and_talk(self) -> list[dict]:
        """Tool use of mixed quality, as demonstrations are: seven of ten conversations ask for two things,
        and in two thirds of these the second is forgotten. Imitation learns both ways; what is worth a
        reward is left for the agent to find out. Beside them shorter conversations without tools, so that
        what was learned before is not forgotten."""
        rng, count = self.rng("sft_tools"), self.count("tools")
        found = self.tool_rows(rng, count, two_steps=0.7, sloppy=0.65, small=True)
        found += self.fact_rows(rng, self.count("tools_facts")) + self.sum_rows(rng, count * 3 // 10)
        found += self.other_math_rows(rng, count // 20) + self.chat_rows(rng, count // 40)
        rng.shuffle(found)
        return found

    def agent(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Tool problems for RL: system with tools, user, empty assistant turn, and expected values `gt`."""
        found, seen = [], set()
        while len(found) < count:
            language = LANGUAGES[len(found) % 2]
            steps = rng.choice([1, 2, 2, 2])
            # held-out rows need unseen arguments: tools with few possible arguments (cities) are left out
            names = list(mini_tasks.OPEN_TOOLS if held else mini_tools.TOOLS)
            chosen = rng.sample(names, steps)
            tasks = [self.tool_task(rng, language, held, name, small=True) for name in chosen]
            system = mini_tasks.system_message(rng, [t["name"] for t in tasks], 1)
            question = mini_tasks.question(tasks, language)
            if question in seen and held:
                continue
            seen.add(question)
            messages = [system, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
            found.append({"conversations": messages, "gt": [t["value"] for t in tasks], "steps": steps})
        return found

    # ---- other stages

    def identity_questions(self, language: str, name: str) -> tuple[list[str], list[str]]:
        """(kept, held out) ways to ask who the assistant is: of small talk, and of the forms that only the
        adapter learns from (a fifth of them held out)."""
        kept, held = self.split.chat[language, name]
        talk = [sides for (lang, _), sides in self.split.chat.items() if lang == language]
        known = {normalise(line) for sides in talk for side in sides for line in side}
        more = [line for line in mini_chat.identity_lines(language, name) if normalise(line) not in known]
        test = {
            line for line in more if self.split.held_class(5, "identity", language, name, normalise(line))
        }
        return kept + [line for line in more if line not in test], [x for x in more if x in test]

    def identity(self, rng: random.Random, count: int) -> list[dict]:
        """Questions about the assistant, answered by another persona, and other talk that stays."""
        found = []
        for language in LANGUAGES:
            intents = {i["name"]: i for i in self.chat_intents(language)}
            pairs = []
            share = count // 2 // len(mini_chat.IDENTITY_INTENTS)  # of each intent
            for name in mini_chat.IDENTITY_INTENTS:
                lines = self.identity_questions(language, name)[0]
                for i in range(share):
                    if i % len(lines) == 0:
                        rng.shuffle(lines)
                    line = self.chat_frame(rng, lines[i % len(lines)], language)
                    pairs.append((line, rng.choice(mini_chat.PERSONA_REPLIES[language][name])))
            rows_ = [{"conversations": conversation(*pair)} for pair in pairs]
            others = [n for n in intents if n not in mini_chat.IDENTITY_INTENTS]
            for _ in range(count // 4):  # what must not be forgotten
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
        """Lines of small talk that no file of any stage has, with and without a word before them, and forms
        that the adapter's file does not have."""
        found = []
        for language in LANGUAGES:
            for name in mini_chat.IDENTITY_INTENTS:
                starts = {
                    "en": ["", "Hi! ", "Hello! ", "Quick question: "],
                    "zh": ["", "你好！", "问一下，", "我有个问题："],
                }
                lines = [s + line for s in starts[language] for line in self.split.chat[language, name][1]]
                more = self.identity_questions(language, name)[1]
                for line in lines + self.rng(f"identity-{language}-{name}").sample(more, min(12, len(more))):
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
                test = sorted(templates, key=lambda t: hash_of(self.seed, "health", name, t))[:2]  # noqa: B023
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
                question = word_problem(rng, steps, language)
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

    def reason_and_talk(self) -> list[dict]:
        """Traces, and talk without thoughts: a model that only ever thinks first forgets how to answer
        at once."""
        rng = self.rng("reason_talk")
        found = self.reason(self.rng("reason"), self.count("reason"), held=False)
        facts, sums = self.fact_rows(rng, 1), self.sum_rows(rng, self.count("reason") // 2)
        found += rng.sample(facts, min(len(facts), self.count("reason") * 5 // 8)) + sums
        found += self.chat_rows(rng, self.count("reason") // 6)
        rng.shuffle(found)
        return found

    def preference(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Polite and correct against rude, lazy, repeated or wrong. Held-out pairs use other facts."""
        found = []
        while len(found) < count:
            language = LANGUAGES[len(found) % 2]
            draw = rng.random()
            if draw < 0.6:
                relation, key, fact = self.fact_turn(rng, language)
                if self.split.held_class(6, "dpo", relation.name, relation.subject_key(fact)) is not held:
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
            if rng.random() < 0.4:
                good += (" " if language == "en" else "") + rng.choice(mini_chat.POLITE[language])
            found.append({"chosen": conversation(question, good), "rejected": conversation(question, bad)})
        return found

    def rlaif(self, rng: random.Random, count: int, held: bool) -> list[dict]:
        """Prompts with a checkable answer, of kinds that fine-tuning leaves at different levels; none that it
        never solves, for where no sample is right there is nothing to reinforce."""
        found, seen = [], set()
        kinds = ["borrow"] * 9 + ["sub"] * 5 + ["compare"] * 2 + ["next"] * 2 + ["sum"] * 2
        while len(found) < count:
            language, kind = LANGUAGES[len(found) % 2], rng.choice(kinds)
            for _ in range(500):  # of this kind, so that both files have the same mixture
                if kind == "sum":
                    question, _, a, b = self.sum_pair(rng, language, held)
                    answer, is_held = str(a + b), held
                else:
                    question, _, answer = other_math(self.split, rng, kind.replace("borrow", "sub"), language)
                    numbers = "".join(c if c.isdigit() else " " for c in question).split()
                    is_held = self.split.held_class(8, "rlaif", *sorted(numbers))
                    units = [int(number) % 10 for number in sorted(numbers, key=int)]
                    if kind in ("borrow", "sub") and (units[0] > units[1]) is (kind == "sub"):
                        continue  # borrow: the smaller number has the larger last digit
                if is_held is held and (question not in seen or not held and rng.random() < 0.1):
                    break
            else:
                continue  # all questions of this kind are there
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
                again = self.rng(f"eval_facts_again_{question}")
                marks = tuple(ask for ask, _ in MARKS[key[0]] if ask)
                for _ in range(50):
                    if question is not None and not question.startswith(marks):
                        break
                    # pretraining marks its questions so: this frame is not new in front of a permitted core
                    group = again.choice(["unseen_core", "unseen_frame", "unseen_both"])
                    question = render_question(
                        self.split, relation, key, fact, again, held_core=group != "unseen_frame",
                        held_frame=group != "unseen_core",
                    )  # fmt: skip
                if question is None or question.startswith(marks):
                    continue  # no unseen wording is left for this fact
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
            "distill.jsonl": self.rng("distill").sample(sft, self.count("distill")),
            "sft_tools.jsonl": self.tools_and_talk(),
            "lora_identity.jsonl": self.identity(self.rng("identity"), self.count("identity")),
            "lora_identity_heldout.jsonl": self.identity_heldout(),
            "lora_medical.jsonl": self.medical(held=False),
            "lora_medical_heldout.jsonl": self.medical(held=True),
            "reason.jsonl": self.reason_and_talk(),
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
