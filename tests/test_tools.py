"""Tools: whatever a model writes becomes a result or an error that it can read; nothing hangs or raises."""

import json
import random
import threading
from pathlib import Path

import pytest

from dataset import mini_tools
from trainer.tools import MAX_RESULT, TOOLS, Call, execute, offered, parse_calls

ROOT = Path(__file__).resolve().parents[1]
SUM = '{"name": "calculate_math", "arguments": {"expression": "2+3"}}'
LENGTH = Call("text_length", {"text": "abc"})
MEASURE = '{"name": "text_length", "arguments": %s}'


def block(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def error_of(call: Call, **options) -> str:
    observation, ok = execute(call, **options)
    assert not ok
    return json.loads(observation)["error"]


# ----------------------------------------------------------------------------------------------------------
# Reading calls
# ----------------------------------------------------------------------------------------------------------


def test_well_formed_calls_are_read_in_order_and_executed():
    text = f"First {block(SUM)} and {block(MEASURE % json.dumps({'text': '你好'}))} done."
    calls = parse_calls(text)
    assert calls == [Call("calculate_math", {"expression": "2+3"}), Call("text_length", {"text": "你好"})]
    assert [execute(call) for call in calls] == [('{"result": 5}', True), ('{"characters": 2}', True)]


def test_arguments_may_come_as_a_string_that_holds_an_object():
    (call,) = parse_calls(block(MEASURE % json.dumps('{"text": "abc"}')))
    assert call == LENGTH


@pytest.mark.parametrize(
    "text, names",
    [
        ("no call at all", []),
        ("", []),
        (None, []),
        (f"<think>{block(SUM)}</think>The answer is 5.", []),
        (f"perhaps {block(SUM)}\n</think>\n\n5", []),  # the prompt opened the think block
        (f"<think>which?</think>{block(SUM)}", ["calculate_math"]),
        (f"{block(SUM)}<think>{block(MEASURE % '{}')}", ["calculate_math"]),  # a thought without an end
        (f"{block(SUM)}</tool_call></tool_call>", ["calculate_math"]),
    ],
)
def test_only_calls_behind_the_thoughts_count(text, names):
    assert [call.name for call in parse_calls(text)] == names


def test_a_tag_within_a_string_is_text():
    (call,) = parse_calls(block(MEASURE % '{"text": "<tool_call>"}'))
    assert execute(call) == ('{"characters": 11}', True)


MALFORMED = {
    "no JSON": ("calculate 2+3", "not valid JSON"),
    "single quotes": (SUM.replace('"', "'"), "not valid JSON"),
    "two calls": (SUM + "\n" + SUM, "not valid JSON"),
    "trailing comma": (SUM[:-1] + ",}", "not valid JSON"),
    "empty": ("", "empty"),
    "blank": (" \n ", "empty"),
    "a list of calls": (f"[{SUM}]", "not a list"),
    "an empty list": ("[]", "not a list"),
    "a string": ('"calculate_math"', "not a string"),
    "a number": ("5", "not a number"),
    "null": ("null", "not null"),
    "no name": ('{"arguments": {}}', "no name"),
    "OpenAI's shape": (f'{{"type": "function", "function": {SUM}}}', "no name"),
    "name is a number": ('{"name": 5, "arguments": {}}', "name must be"),
    "name is a list": ('{"name": ["a"], "arguments": {}}', "name must be"),
    "name is empty": ('{"name": "", "arguments": {}}', "name must be"),
    "name is a sentence": ('{"name": "please add", "arguments": {}}', "name must be"),
    "name is long": ('{"name": "%s", "arguments": {}}' % ("a" * 65), "name must be"),
    "no arguments": ('{"name": "text_length"}', "no arguments"),
    "arguments is a list": (MEASURE % "[1]", "not a list"),
    "arguments is null": (MEASURE % "null", "not null"),
    "arguments is a boolean": (MEASURE % "true", "not a boolean"),
    "arguments is a text": (MEASURE % '"abc"', "holds no JSON object"),
    "arguments is a string of a list": (MEASURE % '"[1]"', "not a list"),
    "arguments is a string of a string": (MEASURE % json.dumps('"{}"'), "not a string"),
    "10,000 digits": (MEASURE % ('{"text": %s}' % ("9" * 10_000)), "more than 100 digits"),
    "10,000 decimals": (MEASURE % ('{"text": 0.%s}' % ("9" * 10_000)), "too long or too large"),
    "beyond floats": (MEASURE % '{"text": 1e999}', "too long or too large"),
    "NaN": (MEASURE % '{"text": NaN}', "NaN is no JSON"),
    "Infinity": (MEASURE % '{"text": -Infinity}', "Infinity is no JSON"),
    "depth 100": (MEASURE % ('{"text": %s}' % ("[" * 100 + "]" * 100)), "nested too deeply"),
    "depth 100,000": (MEASURE % ('{"text": %s}' % ("[" * 100_000)), "nested too deeply"),
    "objects, deep": ('{"a":' * 100_000, "nested too deeply"),
    "half of a surrogate pair": (MEASURE % r'{"text": "\ud83d"}', "surrogate"),
    "nested": (f"<tool_call>{SUM}", "a tool_call inside a tool_call"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_call_becomes_an_error_that_says_why(kind):
    """And the well-formed call behind it is executed all the same."""
    body, reason = MALFORMED[kind]
    wrong, right = parse_calls(block(body) + block(SUM))
    assert reason in wrong.error and reason in error_of(wrong)
    assert "<tool_call>" not in wrong.error
    assert execute(right) == ('{"result": 5}', True)


@pytest.mark.parametrize("text", ["<tool_call>", f"<tool_call>{SUM}", f"<tool_call>{SUM}</tool_call"])
def test_an_unclosed_call_is_an_error_even_if_complete(text):
    first, last = parse_calls(block(SUM) + text)
    assert not first.error and last.error == "a tool_call is not closed"


def test_many_tags_cost_linear_time():
    """A scan from every tag to the end of the text would take 10^10 steps here."""
    assert len(parse_calls("<tool_call>" * 100_000)) == 1
    assert len(parse_calls("<tool_call></tool_call>" * 20_000)) == 20_000
    assert parse_calls("</tool_call>" * 100_000 + "</think>" * 100_000) == []


def random_json(rng: random.Random, depth=0):
    """Anything that JSON can say, with keys that calls have."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 7:
        keys = ["name", "arguments", "expression", "text", "value", "min", ""]
        return {rng.choice(keys): random_json(rng, depth + 1) for _ in range(rng.randrange(5))}
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    texts = [*TOOLS, "1", "km", "9**9", "().__class__", "</think>", "\ud800", "\x00", "你好"]
    return [None, rng.choice([True, False]), rng.randrange(-(10**30), 10**30), rng.uniform(-1e9, 1e9),
            rng.choice(texts), float("nan")][kind]  # fmt: skip


def test_no_text_makes_the_parser_or_a_tool_raise():
    rng, read, succeeded = random.Random(0), 0, 0
    names = list(TOOLS)
    for number in range(1500):
        kind = number % 3
        if kind == 0:
            body = json.dumps(random_json(rng))
        elif kind == 1:  # a call of a real tool with some of its arguments, of any type
            name = rng.choice(names)
            keys = TOOLS[name]["function"]["parameters"]["required"]
            arguments = {key: random_json(rng, 3) for key in keys if rng.random() < 0.9}
            body = json.dumps({"name": name, "arguments": arguments})
        else:
            body = bytes(rng.randrange(256) for _ in range(rng.randrange(60))).decode("latin-1")
        text = list(block(body) + block(SUM))
        for _ in range(rng.choice([0, 0, 1, 3])):  # single characters are lost or doubled
            place = rng.randrange(len(text))
            text[place] = rng.choice(["", text[place] * 2])
        for call in parse_calls("".join(text)):
            observation, ok = execute(call)
            assert len(observation) <= MAX_RESULT and observation.encode()
            assert ok or json.loads(observation)["error"]
            read, succeeded = read + 1, succeeded + ok
    assert read > 1500 and succeeded > 500  # the fuzz reaches the tools


# ----------------------------------------------------------------------------------------------------------
# Executing
# ----------------------------------------------------------------------------------------------------------


def test_only_offered_tools_can_be_called():
    assert execute(LENGTH, allowed=["text_length"])[1]
    error = error_of(LENGTH, allowed=["reverse_text", "random_number"])
    assert "no tool text_length" in error and "the tools are random_number, reverse_text" in error
    assert "no tools are offered" in error_of(LENGTH, allowed=[])
    assert "no tool format_disk" in error_of(Call("format_disk", {}))
    assert "no tool format_disk" in error_of(Call("format_disk", {}), allowed=["format_disk"])


def test_offered_names_whatever_the_list_looks_like():
    assert offered(list(TOOLS.values())) == list(TOOLS)
    odd = [None, 5, "text_length", {}, {"function": None}, {"function": {"name": 5}}, {"name": "flat"}, []]
    assert offered([*odd, TOOLS["text_length"], TOOLS["text_length"]]) == ["flat", "text_length"]
    assert offered(None) == offered([]) == offered({"name": "x"}) == []


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("unit_converter", {"value": 2.5, "from_unit": "km", "to_unit": "m"}, {"result": 2500}),
        ("unit_converter", {"value": " 2.5 ", "from_unit": "km", "to_unit": "m"}, {"result": 2500}),
        ("unit_converter", {"value": "-1e1", "from_unit": "km", "to_unit": "m"}, {"result": -10000}),
        ("day_of_week", {"start": "Monday", "days": 2.0}, {"day": "Wednesday"}),
        ("day_of_week", {"start": "Monday", "days": "2"}, {"day": "Wednesday"}),
        ("day_of_week", {"start": "Monday", "days": "2.0"}, {"day": "Wednesday"}),
        ("day_of_week", {"start": "Monday", "days": 2.5}, "days must be an integer, not a number"),
        ("day_of_week", {"start": "Monday", "days": "two"}, "days must be an integer, not 'two'"),
        ("day_of_week", {"start": "Monday", "days": True}, "days must be an integer, not a boolean"),
        ("day_of_week", {"start": 1, "days": 2}, "start must be a string, not a number"),
        ("day_of_week", {"start": "Noday", "days": 2}, "unknown weekday"),
        ("text_length", {"text": None}, "text must be a string, not null"),
        ("text_length", {"text": ["a"]}, "text must be a string, not a list"),
        ("text_length", {"text": {"a": 1}}, "text must be a string, not an object"),
        ("text_length", {}, "wrong arguments for text_length: missing text; it takes text"),
        (
            "get_exchange_rate",
            {"from": "USD", "to_currency": "CNY"},
            "missing from_currency; unexpected from; it takes from_currency, to_currency",
        ),
        ("unit_converter", {"value": False, "from_unit": "km", "to_unit": "m"}, "value must be a number"),
        ("unit_converter", {"value": "nan", "from_unit": "km", "to_unit": "m"}, "value must be a number"),
        ("unit_converter", {"value": "1_0", "from_unit": "km", "to_unit": "m"}, "value must be a number"),
        ("unit_converter", {"value": "1e999", "from_unit": "km", "to_unit": "m"}, "value must be a number"),
        (
            "unit_converter",
            {"value": "9" * 5000, "from_unit": "km", "to_unit": "m"},
            "value must be a number",
        ),
        ("unit_converter", {"value": float("inf"), "from_unit": "km", "to_unit": "m"}, "must be a number"),
        ("unit_converter", {"value": 10**400, "from_unit": "km", "to_unit": "m"}, "too large"),
    ],
)
def test_arguments_are_checked_against_the_schema(name, arguments, expected):
    if isinstance(expected, dict):
        observation, ok = execute(Call(name, arguments))
        assert ok and json.loads(observation) == expected
    else:
        assert expected in error_of(Call(name, arguments))


@pytest.mark.parametrize("call", [Call(["a"], {}), Call("text_length", [1]), Call(None, None)])
def test_a_call_built_by_hand_may_be_wrong_too(call):
    assert "needs a name" in error_of(call)


def test_long_results_are_cut():
    observation, ok = execute(Call("reverse_text", {"text": "ab" * 900}))
    assert ok and len(observation) == MAX_RESULT
    assert observation.startswith('{"result": "baba') and observation.endswith("…")
    assert len(execute(Call("x", {}), extra={"x": lambda: {"error": "e" * 9000}})[0]) == MAX_RESULT


# ----------------------------------------------------------------------------------------------------------
# Tools of one's own
# ----------------------------------------------------------------------------------------------------------


def own(function, seconds=20.0, **arguments):
    return execute(Call("mine", arguments), allowed=["mine"], seconds=seconds, extra={"mine": function})


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


def raising(error):
    def tool():
        raise error

    return tool


def test_a_tool_of_ones_own_is_called_with_its_arguments():
    assert own(lambda a, b=1: {"sum": a + b}, a=2, b=3) == ('{"sum": 5}', True)
    assert "no tool mine" in error_of(Call("mine", {}), allowed=["text_length"], extra={"mine": dict})
    own_length = {"text_length": lambda text: "mine"}
    assert execute(LENGTH, extra=own_length) == ('"mine"', True)  # before the simulated one


@pytest.mark.parametrize(
    "result, text",
    [
        ("plain", '"plain"'),
        (None, "null"),
        ([1, "二"], '[1, "二"]'),
        ({3}, '"{3}"'),
        (float("nan"), '"nan"'),
        (Path("a"), '"a"'),
        ("\ud800", '"?"'),
        ({"error": None, "x": 1}, '{"error": null, "x": 1}'),
    ],
)
def test_any_result_becomes_text(result, text):
    assert own(lambda: result) == (text, True)


def test_a_result_that_contains_itself():
    circle = []
    circle.append(circle)
    assert own(lambda: circle) == ('"[[...]]"', True)


@pytest.mark.parametrize(
    "error, says",
    [
        (ValueError("no such city"), "the tool failed: ValueError: no such city"),
        (SystemExit(3), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RecursionError(), "RecursionError"),
        (Unprintable(), "Unprintable"),
        (ValueError("x" * 10_000), "xxx"),
    ],
)
def test_what_a_tool_raises_is_an_observation(error, says):
    observation, ok = own(raising(error))
    assert not ok and says in json.loads(observation)["error"]


def test_wrong_arguments_and_errors_that_a_tool_returns():
    assert "unexpected keyword argument" in own(lambda: 1, x=2)[0]
    assert own(lambda: {"error": "closed today"}) == ('{"error": "closed today"}', False)


def test_a_tool_that_never_returns_ends_in_an_error():
    """Its thread is a daemon, so that the process can end."""
    forever, threads = threading.Event(), []

    def tool():
        threads.append(threading.current_thread())
        forever.wait()

    observation, ok = own(tool, seconds=0.05)
    assert not ok and json.loads(observation) == {"error": "the tool gave no answer within 0.05 seconds"}
    (thread,) = threads
    assert thread.is_alive() and thread.daemon
    forever.set()


def test_everything_works_outside_the_main_thread():
    """Signals would not."""
    found = []

    def work():
        found.append(execute(parse_calls(block(SUM))[0]))
        found.append(own(lambda: 1))
        found.append(own(threading.Event().wait, seconds=0.05)[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [('{"result": 5}', True), ("1", True), False]


# ----------------------------------------------------------------------------------------------------------
# The calculator and the converter
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2**10", 1024),
        ("2^10", 1024),
        ("2 ^ -1", 0.5),
        ("-2**2", -4),
        ("2**3**2", 512),
        ("(-8)**3", -512),
        ("9**0.5", 3),
        ("0**0", 1),
        ("1**999999999999", 1),
        ("10**12", 10**12),
        ("5²+2¹⁰", 1049),
        ("+12.5+25+16.5", 54),
        ("1,310-718", 592),
        ("1,234,567.5*2", 2469135),
        ("（１，３１０－７１８）×２÷４＝？", 296),
        ("= 1+1", 2),
        ("1+1 =\n", 2),
        ("0.1+0.2", 0.3),
        ("0.1+0.2-0.3", 0),
        ("123456789.1*3", 370370367.3),
        ("7/3", 2.3333333333),
        ("7//2 + 7%4", 6),
        ("54*100/60", 90),
        ("1e3", 1000),
    ],
)
def test_values(expression, value):
    found = mini_tools.calculate(expression)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "expression, reason",
    [
        ("9**9**9", "too large"),
        ("2**1000000", "too large"),
        ("10**13", "too large"),
        ("999999999999**999999999999", "too large"),
        ("1.5**1e12", "too large"),
        ("999999*9999999", "too large"),
        ("1e400", "too large"),
        ("10**-400", "too small"),
        ("0**-1", "division by zero"),
        ("1/0", "division by zero"),
        ("1%0", "division by zero"),
        ("(-8)**0.5", "no fractional power"),
        ("9" * 10_000, "at most 200 characters"),
        ("9" * 199, "too large"),
        ("(" * 90 + "1" + ")" * 90 + "+", "nested too deeply"),
        ("(" * 150, "nested too deeply"),
        ("().__class__.__bases__", "not allowed"),
        ("(1).real", "not allowed"),
        ("__import__('os')", "not allowed"),
        ("(1)(2)", "are allowed"),
        ("1(2)", "are allowed"),
        ("'a'*9", "not allowed"),
        ("[1]*9", "not allowed"),
        ("1j", "not allowed"),
        ("True", "not allowed"),
        ("e", "are allowed"),
        ("1 if 1 else 2", "not allowed"),
        ("1+1=2", "not allowed"),
        ("1+1 # comment", "not allowed"),
        ("1\n+1", "not allowed"),
        ("1,31", "separates thousands"),
        ("3½", "digits 0 to 9"),
        ("5₂", "digits 0 to 9"),
        ("٣+1", "not allowed"),
        ("\x00", "not allowed"),
        ("\ud800", "not allowed"),
        ("5%", "no complete expression"),
        ("1 2", "no complete expression"),
        ("", "empty"),
        ("=?", "empty"),
        (None, "must be a string"),
        (5, "must be a string"),
    ],
)
def test_refused_expressions_say_why(expression, reason):
    with pytest.raises(ValueError, match=reason):
        mini_tools.calculate(expression)


def test_a_power_is_bounded_before_it_is_computed(monkeypatch):
    """Numbers that count the powers they are raised to: for 9**9**9 that must be the inner one only."""
    done = []

    class Counting(int):
        def __pow__(self, exponent):
            done.append(int(exponent))
            return int(self) ** exponent

    with pytest.raises(ValueError, match="too large"):
        mini_tools._power(Counting(9), 9**9)
    assert done == [] and mini_tools._power(Counting(9), 9) == 9**9 and done == [9]


def test_random_expressions_give_a_bounded_number_or_an_error():
    rng, values = random.Random(0), 0
    pieces = "1 23 456 0.5 9 + - * / ** ^ % // ( ) , e ×".split() + [" "]
    for _ in range(3000):
        try:
            value = mini_tools.calculate("".join(rng.choices(pieces, k=rng.randrange(1, 12))))
        except ValueError:
            continue
        assert type(value) in (int, float) and abs(value) <= mini_tools.MAX_VALUE
        values += 1
    assert values > 100


@pytest.mark.parametrize(
    "value, source, target, result",
    [
        (5, "公里", "米", 5000),
        (3, "千米", "厘米", 300_000),
        (1500, "毫米", "m", 1.5),
        (2, "公斤", "克", 2000),
        (2, "斤", "千克", 1),
        (90, "分钟", "小时", 1.5),
        (1, "周", "天", 7),
        (1, "天", "秒", 86_400),
        (3, "Kilometers", " METRES ", 3000),
        (5, "feet", "cm", 152.4),
        (2, "hours", "minutes", 120),
        (1, "mm", "km", 1e-06),
        (100, "摄氏度", "华氏度", 212),
        (98.6, "℉", "℃", 37),
        (0, "celsius", "K", 273.15),
        (-40, "C", "Fahrenheit", -40),
    ],
)
def test_units_by_many_names(value, source, target, result):
    found = mini_tools.convert(value, source, target)
    assert found == result and type(found) is type(result)


def test_the_pairs_of_the_curriculum_agree_with_the_sizes():
    for (source, target), factor in mini_tools.UNITS.items():
        assert mini_tools.convert(7, source, target) == 7 * factor
        assert mini_tools.convert(7 * factor, target, source) == 7


def test_every_unit_has_a_size_and_no_name_means_two():
    units = [unit for table in (*mini_tools.SIZES.values(), mini_tools.TEMPERATURES) for unit in table]
    assert sorted(units) == sorted(mini_tools.UNIT_NAMES)
    names = [name for unit, text in mini_tools.UNIT_NAMES.items() for name in [unit, *text.split()]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "source, target, reason",
    [("km", "kg", "cannot convert km to kg"), ("parsec", "m", "unknown unit parsec"), ("°C", "m", "cannot")],
)
def test_units_that_do_not_fit(source, target, reason):
    arguments = {"value": 1, "from_unit": source, "to_unit": target}
    assert reason in error_of(Call("unit_converter", arguments))


@pytest.mark.parametrize("name, key", [("get_current_weather", "location"), ("get_current_time", "city")])
def test_a_city_is_the_same_in_both_languages(name, key):
    beijing = mini_tools.run_tool(name, {key: "Beijing"})
    for city in ("北京", "北京市", " beijing"):
        assert mini_tools.run_tool(name, {key: city}) == beijing
    assert mini_tools.run_tool(name, {key: "巴黎"}) == mini_tools.run_tool(name, {key: "Paris"}) != beijing


def test_no_text_of_a_model_is_run_as_code():
    for name in ("trainer/tools.py", "dataset/mini_tools.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
        assert not any(word in source for word in ("eval(", "exec(", "import signal", "pickle"))
