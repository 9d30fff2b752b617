"""Arithmetic of the embedded curriculum: questions, worked answers and what of it is held out.

A small transformer writes numbers from the left, but carries come from the right. So every answer works the
columns out first, ones before tens, and only then says the sum. Each step needs one fact about single digits:

    37 + 48  ->  "7+8=15, 3+4+1=8, so 37 + 48 = 85."      (the last summand of a step is the carry)
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from dataset import mini_chat
from dataset.mini_world import clean_zh

if TYPE_CHECKING:
    from dataset.mini_split import Split

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
        is_held = split.held_class(10, "chain", expression)
        if fine and (held is None and not is_held or held is is_held):
            return expression, steps, value


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
