"""Scoring of answers to the curriculum's evaluation rows: one pure function, `is_correct(row, reply)`.

A row is {"id", "kind", "question", "answers": [accepted strings], "language", "group", ...}. Kinds:

    fact    the accepted answer must stand in the reply as a whole word or phrase, and no other candidate of
            the same relation may be there (listing every capital is not knowing one)
    number  every number in the reply must have a reason: part of the question, of an equation, or the answer;
            the last one must be the answer and no equation with the question's operands may say otherwise
    chat    one of the accepted keywords stands in the reply, which must be short and not one word repeated
    exact   the normalised reply equals an accepted answer

Normalisation folds full-width forms (NFKC), case, spaces and punctuation. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from dataset.mini_world import build_relations

MAX_REPLY = 600  # characters; an answer longer than this rambles
MAX_REPEATS = 3  # the accepted answer may be said this often

_ALIASES = {
    "aluminium": ["aluminum"],
    "Rene Laennec": ["René Laënnec"],
    "Bogota": ["Bogotá"],
    "Brasilia": ["Brasília"],
    "Charlotte Bronte": ["Charlotte Brontë"],
    "Emily Bronte": ["Emily Brontë"],
    "Washington": ["Washington D.C.", "Washington, D.C."],
    "米饭": ["大米", "米"],
    "图画": ["图片", "画"],
    "高兴": ["快乐", "开心"],
    "山": ["山脉", "高山"],
    "河流": ["河"],
    "大海": ["海"],
    "星星": ["星"],
    "鲸": ["鲸鱼"],
    "鸟类": ["鸟"],
    "鱼类": ["鱼"],
    "air pressure": ["pressure"],
    "electric current": ["current"],
}
_ORDINAL_DIGITS = {
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
    "sixth": "6th",
    "seventh": "7th",
    "eighth": "8th",
    "ninth": "9th",
    "tenth": "10th",
    "eleventh": "11th",
    "twelfth": "12th",
}


def accepted_forms(answer: str, language: str = "en") -> list[str]:
    """The answer and its accepted variants: other spellings, and the family name of a person."""
    forms = [answer, *_ALIASES.get(answer, [])]
    if answer in _ORDINAL_DIGITS:
        forms.append(_ORDINAL_DIGITS[answer])
    return forms


def normalise(text: str, *, case: bool = False) -> str:
    """NFKC, case folding (unless `case`), punctuation -> space, single spaces, one space at each end."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    if not case:
        text = text.casefold()
    text = "".join(c if c.isalnum() else ("" if c == "'" else " ") for c in text)
    return " " + " ".join(text.split()) + " "


def _is_cjk(text: str) -> bool:
    return any("\u3400" <= c <= "\u9fff" for c in text)


def _pattern(phrase: str) -> re.Pattern:
    """Whole-phrase match in normalised text: no ASCII letter or digit may touch it (in Chinese: anything)."""
    body = re.escape(phrase.strip())
    if _is_cjk(phrase):
        return re.compile(body)
    return re.compile(rf"(?<![a-zA-Z0-9]){body}(?![a-zA-Z0-9])")


@lru_cache(maxsize=1)
def _relations() -> dict:
    return {relation.name: relation for relation in build_relations()}


@lru_cache(maxsize=256)
def candidates(relation: str, language: str, direction: str) -> tuple[str, ...]:
    """Every possible answer of one relation, language and direction (subjects when asked in reverse)."""
    found = _relations().get(relation)
    if found is None:
        return ()
    index = 0 if direction == "reverse" else 1
    return tuple(sorted({fact[language][index] for fact in found.facts if language in fact}))


@lru_cache(maxsize=64)
def _is_case(relation: str, direction: str) -> bool:
    found = _relations().get(relation)
    return bool(found and found.case and direction == "forward")


def _fact(row: dict, reply: str) -> bool:
    relation, direction = row.get("relation", row.get("group", "")), row.get("direction", "forward")
    case = _is_case(relation, direction)
    text, question = normalise(reply, case=case), normalise(row.get("question", ""), case=case)
    accepted = {normalise(form, case=case).strip() for a in row["answers"] for form in accepted_forms(a)}
    everything = set(accepted)
    for candidate in row.get("candidates") or candidates(relation, row.get("language", "en"), direction):
        everything.update(normalise(form, case=case).strip() for form in accepted_forms(candidate))
    everything.discard("")
    # names from the other side of the relation are neutral, but may contain an answer (Mexico City, 巴西利亚)
    other = candidates(
        relation, row.get("language", "en"), "forward" if direction == "reverse" else "reverse"
    )
    neutral = {normalise(name, case=case).strip() for name in other} - everything - {""}
    hits = 0
    for phrase in sorted(
        everything | neutral, key=len, reverse=True
    ):  # longest first, so that parts do not count again
        pattern = _pattern(phrase)
        found = len(pattern.findall(text))
        if not found:
            continue
        if phrase in neutral:
            pass
        elif phrase in accepted:
            if (
                any(f" {no} {phrase} " in text for no in ("not", "not the", "not a"))
                or f"不是{phrase}" in text
            ):
                return False
            hits += found
        elif not pattern.search(question):
            # a one-character Chinese candidate inside another word ("大" in "大家") says nothing
            if len(phrase) > 1 or not _is_cjk(phrase) or re.search(rf"[“\" ]{phrase}[”\" ]", f" {reply} "):
                return False
        text = pattern.sub(" | ", text)
    return 0 < hits <= MAX_REPEATS


_EQUATION = re.compile(r"(\d+(?:\.\d+)?(?:\s*[-+*/x×÷]\s*\d+(?:\.\d+)?)+)\s*=\s*(-?\d+(?:\.\d+)?)")


def _numbers(text: str) -> list[float]:
    """All numbers of a text in order; a minus sign after a digit is an operator, elsewhere a sign."""
    found = []
    for match in re.finditer(r"\d+(?:\.\d+)?", text):
        before = text[: match.start()]
        sign = -1 if before.endswith("-") and not before[:-1].rstrip()[-1:].isdigit() else 1
        found.append(sign * float(match.group()))
    return found


def _number(row: dict, reply: str) -> bool:
    text = unicodedata.normalize("NFKC", reply).replace("−", "-")
    question = unicodedata.normalize("NFKC", row.get("question", "")).replace("−", "-")
    answers = {float(a) for a in row["answers"]}
    operands = sorted(abs(n) for n in _numbers(question))
    values = _numbers(text)
    if not values or values[-1] not in answers:
        return False
    claims = [
        float(result)
        for expression, result in _EQUATION.findall(text)
        if sorted(float(n) for n in re.findall(r"\d+(?:\.\d+)?", expression)) == operands
    ]
    if any(claim not in answers for claim in claims):
        return False
    loose = _numbers(_EQUATION.sub(" ", text))
    if any(n not in answers and abs(n) not in operands for n in loose):
        return False
    return len(claims) + sum(n in answers for n in loose) <= MAX_REPEATS


def _chat(row: dict, reply: str) -> bool:
    text = normalise(reply)
    words = text.split()
    if len(words) >= 8 and len(set(words)) <= len(words) // 4:
        return False  # one word over and over
    letters = text.replace(" ", "")
    if len(letters) >= 24 and len({letters[i : i + 4] for i in range(len(letters) - 3)}) < len(letters) // 4:
        return False  # one phrase over and over
    return any(_pattern(normalise(a)).search(text) for a in row["answers"])


def is_correct(row: dict, reply: str) -> bool:
    """True if `reply` answers the evaluation row. Pure; never raises on odd replies."""
    if not isinstance(reply, str) or not reply.strip() or len(reply) > MAX_REPLY:
        return False
    reply = reply.split("</think>")[-1].replace("<|im_end|>", "").strip()
    kind = row.get("kind", "fact")
    if kind == "number":
        return _number(row, reply)
    if kind == "chat":
        return _chat(row, reply)
    if kind == "exact":
        return normalise(reply) in {normalise(a) for a in row["answers"]}
    return _fact(row, reply)
