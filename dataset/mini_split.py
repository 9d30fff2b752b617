"""What the embedded curriculum holds out, and how a fact becomes a statement, a question or an answer.

`Split(seed)` decides by hashes which facts are asked about, which question cores and frames stay unseen, and
which operand pairs no training text asks for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

from dataset import mini_chat, mini_world
from dataset.mini_eval import normalise
from dataset.mini_math import SUM_QUESTIONS
from dataset.mini_world import Query, Relation, clean_zh, fill_slots, full_width, upper_first

ASKED_SHARE = 0.68  # share of each relation's facts that SFT (and question text in pretraining) asks about
HELD_CORES = 0.2  # share of question cores that no training file contains
HELD_FRAMES = 0.2
HELD_SUMS = 0.13  # share of operand pairs {a, b} that no training file asks for
LANGUAGES = ("en", "zh")
FRAME_KIND = {"np": "np", "q": "q", "w": "q", "e": "e", "fill": "fill"}


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def hash_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def unique(items: Iterable[str]) -> list[str]:
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
                (relation.subject_key(f) for f in relation.facts),
                key=lambda k: hash_of(seed, relation.name, k),
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
                keep, held = self._divide(unique(templates[1:]), HELD_FRAMES, language, kind)
                held = [t for t in held if t != templates[0]]
                self.frames[language, kind] = ([t for t in templates if t not in held], held)
        self.sum_frames = {}
        for language, text in SUM_QUESTIONS.items():
            keep, held = self._divide(lines_of(text)[2:], 0.15, "sums", language)
            self.sum_frames[language] = (lines_of(text)[:2] + keep, held)
        self.chat: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
        for language, intents in (("en", mini_chat.CHAT_EN), ("zh", mini_chat.CHAT_ZH)):
            for intent in intents:
                # the most usual lines always stay
                first = {normalise(line) for line in intent["user"][:3]}
                rest = [line for line in intent["user"] if normalise(line) not in first]
                _, held = self._divide(rest, 0.2, "chat", language, intent["name"])
                kept = [line for line in intent["user"] if line not in held]
                self.chat[language, intent["name"]] = (kept, held)

    def _divide(self, items: list[str], share: float, *salt: object) -> tuple[list[str], list[str]]:
        """(kept, held out); lists of one or two items keep everything. Order of the kept ones stays."""
        count = 0 if len(items) < 3 else max(1, round(share * len(items)))
        # lines that differ only in case or punctuation go together
        groups: dict[str, list[str]] = {}
        for item in items:
            groups.setdefault(normalise(item.replace("{o}", "{s}")), []).append(item)
        held: set[str] = set()
        for group in sorted(groups, key=lambda g: hash_of(self.seed, *salt, g)):
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

    def held_class(self, share: int, *parts: object) -> bool:
        """True for one in `share` of everything, by hash."""
        return hash_of(self.seed, *parts) % share == 0

    def held_sum(self, a: int, b: int) -> bool:
        """True if no training text may ask for a + b or b + a (two operands below 100)."""
        a, b = min(a, b), max(a, b)
        return b < 100 and hash_of(self.seed, "sum", a, b) % 1000 < HELD_SUMS * 1000


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
    text = frame.replace("{what}", query.what).replace("{What}", upper_first(query.what))
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


def heading(split: Split, relation: Relation, key: tuple[str, str], fact: dict, rng: random.Random) -> str:
    """A heading that names what the sentence after it tells: "The capital of France. ", never a question."""
    cores = split.cores[(relation.name, *key)]
    kept = cores["np"][0] if "np" in cores else [c.rstrip("是有叫") for c in cores["fill"][0]]
    return question_text(
        relation.queries[key], fact, rng.choice(kept), rng.choice(mini_world.HEADINGS[key[0]])
    )


# ---- made-up facts -----------------------------------------------------------------------------------------

_SYLLABLES = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "l", "s")]


class Inventor:
    """Names and facts that do not exist. A question about such a text can only be answered by reading it, so
    a model that trains on them has to copy names from the question instead of knowing a few by heart."""

    def __init__(self, relations: list[Relation]):
        self.relations = relations
        self.real = {side for r in relations for f in r.facts for pair in f.values() for side in pair}
        words = {word for name in self.real for word in name.split()}
        self.english = sorted(word for word in words if word.isascii() and word.isalpha() and len(word) > 3)
        self.chinese = sorted({c for name in self.real for c in name if "\u4e00" <= c <= "\u9fff"})

    def english_word(self, rng: random.Random) -> str:
        """Syllables, or the head of one word of this world with the tail of another."""
        if rng.random() < 0.5:
            return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3))))
        head, tail = rng.sample(self.english, 2)
        return (head[: rng.randint(2, 4)] + tail[-rng.randint(2, 4) :]).lower()

    def chinese_word(self, rng: random.Random, length: int) -> str:
        return "".join(rng.sample(self.chinese, length))

    def like(self, text: str, rng: random.Random, symbol: bool = False) -> str:
        """Something new of the same form: number, symbol, Chinese or English name. Never a real name."""
        if text.isdigit():
            return str(rng.randint(2, 10 ** len(text)))
        if symbol:
            return rng.choice("ABCDEFGHIKLMNPRST") + rng.choice("jqwxz")  # no element is written so
        while True:
            core = text.strip("《》")
            if any(c in self.chinese for c in core):
                word = self.chinese_word(rng, min(max(len(core), 2), 4))
                found = text.replace(core, word)
            else:
                words = [self.english_word(rng) for _ in text.split()[:2]]
                found = " ".join(w.capitalize() if text[0].isupper() else w for w in words)
            if found not in self.real:
                return found

    def fact(self, relation: Relation, language: str, rng: random.Random) -> dict[str, tuple[str, str]]:
        """A made-up fact; where there are few possible objects (continents), one of them."""
        subject, obj = rng.choice([f for f in relation.facts if language in f])[language]
        objects = {f[language][1] for f in relation.facts if language in f}
        subject = "/".join(self.like(part, rng) for part in subject.split("/"))
        if relation.numeric or len(objects) > 12:
            obj = self.like(obj, rng, symbol=relation.case)
        return {language: (subject, obj)}

    def reading(self, split: Split, language: str, rng: random.Random) -> tuple[str, str]:
        """(text about one to three made-up things with a question about one of them, answer)."""
        relation = rng.choice([r for r in self.relations if language in r.languages])
        key = rng.choice([k for k in relation.queries if k[0] == language])
        query = relation.queries[key]
        facts = [self.fact(relation, language, rng) for _ in range(rng.randint(1, 3))]
        forms = [rng.choice(query.statements) for _ in facts]
        lines = [statement(form, relation, f, language, rng, wrap=False) for form, f in zip(forms, facts)]
        chosen = rng.choice(facts)
        question = render_question(split, relation, key, chosen, rng)
        glue = " " if language == "en" else ""
        return glue.join([*lines, question]), answer_text(query, chosen)

    def copying(self, language: str, rng: random.Random, talk: list[tuple[str, str]]) -> tuple[str, str]:
        """A line of talk and a reply that repeats a name or a word of it; now and then a real name."""
        ask, reply = rng.choice(talk)
        if rng.random() < 0.4:
            relation = rng.choice([r for r in self.relations if language in r.languages and not r.case])
            fact = rng.choice([f for f in relation.facts if language in f])
            word = rng.choice(fact[language]).split("/")[0]
        elif language == "en":
            word = " ".join(self.english_word(rng) for _ in range(rng.choice((1, 1, 2))))
            word = word.title() if "{n}" in ask or rng.random() < 0.3 else word
        else:
            word = self.chinese_word(rng, rng.randint(2, 4))
        ask, reply = (text.replace("{n}", word).replace("{w}", word) for text in (ask, reply))
        return upper_first(ask), upper_first(reply)
