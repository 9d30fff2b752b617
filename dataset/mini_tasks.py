"""Tool problems of the embedded curriculum: a request in words, the call it needs, its result and the answer.

A task is {"name", "arguments", "ask", "say", "value", "result"}: `ask` is the request in a sentence, `say`
the answer sentence without its full stop, `value` what a correct final answer must contain.
"""

from __future__ import annotations

import json
import random

from dataset import mini_tools
from dataset.mini_world import WORDS, rows, upper_first

# per tool and language: requests, and the answer sentence last
TEXTS = {
    "calculate_math": {
        "en": ["what is {a} {word} {b}", "calculate {a} {sign} {b}", "how much is {a} {sign} {b}",
               "{expression} = {v}"],
        "zh": ["{a}{word}{b}等于多少", "计算{a} {sign} {b}", "算一下{a}{word}{b}", "{expression} = {v}"],
    },
    "get_current_time": {
        "en": ["what time is it in {city}", "tell me the time in {city}", "what is the time in {city}",
               "The time in {city} is {v}"],
        "zh": ["{city}现在几点", "告诉我{city}的时间", "{city}现在是什么时间", "{city}现在是{v}"],
    },
    "get_current_weather": {
        "en": ["what is the weather in {city}", "how is the weather in {city}",
               "tell me the weather in {city}",
               "It is {sky} in {city}, {v} degrees"],
        "zh": ["{city}天气怎么样", "告诉我{city}的天气", "查一下{city}的天气", "{city}的天气是{sky}，{v}度"],
    },
    "unit_converter": {
        "en": ["convert {value} {from_unit} to {to_unit}",
               "how many {to_unit} are {value} {from_unit}",
               "{value} {from_unit} = {v} {to_unit}"],
        "zh": ["把{value} {from_unit}换算成{to_unit}", "{value} {from_unit}是多少{to_unit}",
               "{value} {from_unit} = {v} {to_unit}"],
    },
    "get_exchange_rate": {
        "en": ["what is the exchange rate from {from_currency} to {to_currency}",
               "how many {to_currency} is one {from_currency}", "1 {from_currency} = {v} {to_currency}"],
        "zh": ["{from_currency}兑{to_currency}的汇率是多少", "查一下{from_currency}到{to_currency}的汇率",
               "1 {from_currency} = {v} {to_currency}"],
    },
    "translate_text": {
        "en": ['translate "{text}" into {target} with the tool',
               'use the translator for "{text}" into {target}',
               '"{text}" is "{v}" in {target}'],
        "zh": ["用工具把“{text}”翻译成{target}", "用翻译工具把“{text}”译成{target}",
               "“{text}”的{target}是“{v}”"],
    },
    "random_number": {
        "en": ["give me a random number from {min} to {max}", "pick a random number between {min} and {max}",
               "The random number is {v}"],
        "zh": ["给我一个{min}到{max}的随机数", "在{min}和{max}之间选一个随机数", "随机数是{v}"],
    },
    "text_length": {
        "en": ['how many characters are in "{text}"', 'count the characters of "{text}"',
               '"{text}" has {v} characters'],
        "zh": ["“{text}”有多少个字符", "数一数“{text}”的字符数",
               "“{text}”有{v}个字符"],
    },
    "reverse_text": {
        "en": ['reverse the text "{text}"', 'write "{text}" backwards', '"{text}" backwards is "{v}"'],
        "zh": ["把“{text}”倒过来写", "反转文字“{text}”", "“{text}”倒过来是“{v}”"],
    },
    "day_of_week": {
        "en": ["which weekday is {days} days after {start}", "what day comes {days} days after {start}",
               "{days} days after {start} is {v}"],
        "zh": ["{start}之后{days}天是星期几", "从{start}起过{days}天是哪天", "{start}之后{days}天是{v}"],
    },
}  # fmt: skip
RESULT_KEY = {
    "get_current_time": "time",
    "get_current_weather": "temperature",
    "get_exchange_rate": "rate",
    "translate_text": "translation",
    "text_length": "characters",
    "day_of_week": "day",
}  # the others call it "result"
# tools whose arguments are so many that some of them can stay unseen
OPEN_TOOLS = ("calculate_math", "unit_converter", "random_number", "text_length", "day_of_week")


def draw_task(
    rng: random.Random, language: str, name: str, words: list[tuple[str, str]], small: bool = False
) -> dict:
    """A random task for one tool. `words`: (English, Chinese) pairs for the translator; small: numbers whose
    results a small model can copy."""
    en, show = language == "en", {}
    if name == "calculate_math":
        sign, *names = rng.choice([("*", "times", "乘以"), ("*", "times", "乘以"), ("-", "minus", "减")])
        a, b = (11, 99), (2, 9) if sign == "*" else (2, 99)
        a, b = rng.randint(*(a if small else (100, 999))), rng.randint(*(b if small else (2, 99)))
        arguments = {"expression": f"{a} {sign} {b}"}
        show = {"a": a, "b": b, "sign": sign, "word": f"{names[0 if en else 1]}"}
    elif name in ("get_current_time", "get_current_weather"):
        city = rng.choice(list(mini_tools.CITIES))
        arguments = {"city" if name == "get_current_time" else "location": city}
        show = {"city": city if en else mini_tools.CITIES[city]}
    elif name == "unit_converter":
        source, target = rng.choice(list(mini_tools.UNITS))
        arguments = {"value": rng.randint(2, 99), "from_unit": source, "to_unit": target}
    elif name == "get_exchange_rate":
        source, target = rng.choice(list(mini_tools.RATES))
        arguments = {"from_currency": source, "to_currency": target}
    elif name == "translate_text":
        english, chinese = rng.choice(words)
        text, target = rng.choice([(english, "Chinese"), (chinese, "English")])
        arguments = {"text": text, "target_language": target}
        show = {"target": target if en else {"Chinese": "中文", "English": "英文"}[target]}
    elif name == "random_number":
        arguments = {"min": rng.randint(1, 20), "max": rng.randint(30, 99)}
    elif name in ("text_length", "reverse_text"):
        vocabulary = [english for english, *_ in rows(WORDS)]
        arguments = {
            "text": " ".join(rng.sample(vocabulary, rng.randint(1, 2) if name == "text_length" else 1))
        }
    else:
        arguments = {"start": rng.choice(mini_tools.WEEKDAYS), "days": rng.randint(2, 60)}
    result = mini_tools.run_tool(name, arguments)
    value = str(result[RESULT_KEY.get(name, "result")])
    if name == "get_current_weather":
        show["sky"] = result["condition"] if en else mini_tools.CONDITIONS[result["condition"]]
    *asks, say = [text.format(**(arguments | show), v=value) for text in TEXTS[name][language]]
    return {
        "name": name,
        "arguments": arguments,
        "ask": rng.choice(asks),
        "say": say,
        "value": value,
        "result": result,
    }


def system_message(rng: random.Random, needed: list[str], distractors: int) -> dict:
    """An empty system message that offers the needed tools and some others."""
    names = list(dict.fromkeys(needed))
    names += rng.sample([n for n in mini_tools.TOOLS if n not in names], distractors)
    rng.shuffle(names)
    return {"role": "system", "content": "", "tools": json.dumps([mini_tools.TOOLS[n] for n in names])}


def question(tasks: list[dict], language: str) -> str:
    """The user's sentence for one task or for several, one after the other."""
    last = tasks[-1]["ask"]
    if language == "en":
        asks = last.startswith(("what", "how", "which")) and len(tasks) == 1
        return upper_first(", and then ".join(t["ask"] for t in tasks)) + ("?" if asks else ".")
    asks = any(word in last for word in ("多少", "怎么样", "几", "什么", "哪"))
    return "，然后".join(t["ask"] for t in tasks) + ("？" if asks else "。")


def answer(tasks: list[dict], language: str, short: bool = False) -> str:
    """The final answer: one sentence per task; short: one for all, with the results alone."""
    if short:
        values = [t["value"] for t in tasks]
        if language == "zh":
            return f"结果是{'，'.join(values)}。"
        return f"The result{'s are' if len(values) > 1 else ' is'} {' and '.join(values)}."
    if language == "en":
        return " ".join(t["say"] + "." for t in tasks)
    return "".join(t["say"] + "。" for t in tasks)


def exchange(task: dict) -> list[dict]:
    """The assistant's call and the tool's result as messages."""
    call = [{"name": task["name"], "arguments": task["arguments"]}]
    return [
        {"role": "assistant", "content": "", "tool_calls": json.dumps(call, ensure_ascii=False)},
        {"role": "tool", "content": json.dumps(task["result"], ensure_ascii=False)},
    ]
