"""The simulated tools of the curriculum: definitions in the usual JSON form and deterministic results.

No network, no clock, no randomness: weather and time are functions of the city name, rates are a
fixed table, so that every answer can be checked. `run_tool(name, arguments)` returns a JSON-able
dict, `{"error": ...}` for anything it cannot do; it never raises on odd arguments.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
import re
import unicodedata

MAX_TEXT = 2000
MAX_VALUE = 10**12
MAX_EXPRESSION = 200  # characters
DECIMALS = 10  # of a result
MAX_ERROR = 200  # characters
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

UNITS = {
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("cm", "mm"): 10,
    ("kg", "g"): 1000,
    ("hour", "minute"): 60,
    ("minute", "second"): 60,
    ("day", "hour"): 24,
    ("week", "day"): 7,
}
# The curriculum draws from UNITS; what only a call may ask for stands here: sizes in the unit of size 1.
SIZES = {
    "length": {
        "km": 1_000_000,
        "m": 1000,
        "cm": 10,
        "mm": 1,
        "mile": 1_609_344,
        "foot": 304.8,
        "inch": 25.4,
    },
    "weight": {"t": 1_000_000, "kg": 1000, "斤": 500, "g": 1, "mg": 0.001, "pound": 453.59237},
    "time": {"week": 604_800, "day": 86_400, "hour": 3600, "minute": 60, "second": 1},
}
TEMPERATURES = {"celsius": (0, 1), "fahrenheit": (32, 5 / 9), "kelvin": (273.15, 1)}  # (zero point, degree)
UNIT_NAMES = {
    "km": "kilometer kilometre 公里 千米",
    "m": "meter metre 米",
    "cm": "centimeter centimetre 厘米",
    "mm": "millimeter millimetre 毫米",
    "mile": "mi 英里",
    "foot": "ft feet 英尺",
    "inch": "in inches 英寸",
    "t": "ton tonne 吨",
    "kg": "kilogram kilogramme 千克 公斤",
    "斤": "jin 市斤",
    "g": "gram gramme 克",
    "mg": "milligram 毫克",
    "pound": "lb 磅",
    "week": "周 星期",
    "day": "d 天 日",
    "hour": "h hr 小时",
    "minute": "min 分钟 分",
    "second": "s sec 秒 秒钟",
    "celsius": "c °c 摄氏度 摄氏",
    "fahrenheit": "f °f 华氏度 华氏",
    "kelvin": "k 开尔文 开",
}
UNIT_OF = {name: unit for unit, names in UNIT_NAMES.items() for name in [unit, *names.split()]}
RATES = {
    ("USD", "CNY"): 7.2,
    ("EUR", "USD"): 1.1,
    ("GBP", "USD"): 1.3,
    ("USD", "JPY"): 150,
    ("EUR", "CNY"): 7.9,
}
CITIES = {
    "Beijing": "北京",
    "Paris": "巴黎",
    "London": "伦敦",
    "Tokyo": "东京",
    "Rome": "罗马",
    "Berlin": "柏林",
    "Madrid": "马德里",
    "Moscow": "莫斯科",
    "Cairo": "开罗",
    "Shanghai": "上海",
    "Sydney": "悉尼",
    "Seoul": "首尔",
    "Bangkok": "曼谷",
    "Lima": "利马",
    "Oslo": "奥斯陆",
    "Dublin": "都柏林",
}
CONDITIONS = {"sunny": "晴", "cloudy": "多云", "rainy": "雨", "snowy": "雪", "windy": "大风"}
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _schema(name: str, description: str, **parameters: str) -> dict:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


TOOLS: dict[str, dict] = {
    schema["function"]["name"]: schema
    for schema in [
        _schema("calculate_math", "Compute an arithmetic expression", expression="string"),
        _schema("get_current_time", "Local time of a city", city="string"),
        _schema("get_current_weather", "Weather of a city", location="string"),
        _schema("unit_converter", "Convert units", value="number", from_unit="string", to_unit="string"),
        _schema("get_exchange_rate", "Exchange rate", from_currency="string", to_currency="string"),
        _schema("translate_text", "Translate a word", text="string", target_language="string"),
        _schema("random_number", "Random integer", min="integer", max="integer"),
        _schema("text_length", "Count characters", text="string"),
        _schema("reverse_text", "Reverse a text", text="string"),
        _schema("day_of_week", "Weekday some days after a weekday", start="string", days="integer"),
    ]
}


def _number_of(text: str, salt: str, low: int, high: int) -> int:
    digest = hashlib.sha256(f"{salt}:{text.strip().casefold()}".encode()).digest()
    return low + int.from_bytes(digest[:4], "big") % (high - low + 1)


def _city(name: str) -> str:
    """The English name of a city of the curriculum, so that 北京 has the weather of Beijing."""
    name = name.strip()
    return {chinese: english for english, chinese in CITIES.items()}.get(name.removesuffix("市"), name)


def _rounded(value: int | float) -> int | float:
    """Without the noise of binary fractions: 0.1 + 0.2 is 0.3, and a whole number is an int."""
    if isinstance(value, int):
        return value
    value = round(float(f"{value:.14g}"), DECIMALS)
    return int(value) if value.is_integer() else value


def _plain(expression: str) -> str:
    """The expression as Python writes it. ValueError for a character that no number and no operator has."""
    # NFKC would make 52 of 5², and 31/2 of 3½: powers become operators first, other such signs are refused
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "**" + unicodedata.normalize("NFKC", m[0]), expression)
    if any(unicodedata.category(c) == "No" for c in text):
        raise ValueError("write numbers with the digits 0 to 9")
    text = unicodedata.normalize("NFKC", text).strip(" =?\t\r\n")
    for sign, plain in (("×", "*"), ("÷", "/"), ("−", "-"), ("–", "-"), ("^", "**")):
        text = text.replace(sign, plain)
    text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), text).strip()
    if not text:
        raise ValueError("the expression is empty")
    odd = re.search(r"[^0-9.eE_+\-*/%() \t]", text)
    if odd:
        hint = "; a comma only separates thousands, as in 1,310" if odd[0] == "," else ""
        raise ValueError(f"{odd[0]!r} is not allowed, only numbers and + - * / // % ** ( ) are{hint}")
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"the expression has more than {MAX_EXPRESSION} characters")
    return text


def _power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent, or ValueError. The size is known from the logarithm before anything is computed: the
    digits of 9**9**9 would not fit into memory."""
    if base == 0 and exponent < 0:
        raise ZeroDivisionError("division by zero")
    if base < 0 and exponent != int(exponent):
        raise ValueError("a negative number has no fractional power")
    digits = exponent * math.log10(abs(base)) if base else 0
    if digits > math.log10(MAX_VALUE) + 1:  # a size that is cheap; `calculate` looks at the value itself
        raise ValueError("number too large")
    if digits < -DECIMALS:
        raise ValueError("number too small")
    return base**exponent


def calculate(expression: str) -> int | float:
    """Value of an expression of numbers with + - * / // % ** (or ^) and brackets, to ten decimals.

    Full-width signs, × ÷, 1,310 for 1310 and an = at either end are read as a person would. ValueError, with
    a sentence that says why, for anything else, for more than 200 characters and for values beyond 10**12.
    """
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        raise ValueError(f"the expression must be a string of at most {MAX_EXPRESSION} characters")

    def walk(node: ast.AST) -> int | float:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = walk(node.operand)
            value = -value if isinstance(node.op, ast.USub) else value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            value = _power(walk(node.left), walk(node.right))
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            value = _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        else:
            raise ValueError("only numbers and + - * / // % ** ( ) are allowed")
        if abs(value) > MAX_VALUE:
            raise ValueError("number too large")
        return value

    try:
        return _rounded(walk(ast.parse(_plain(expression), mode="eval")))
    except ZeroDivisionError:
        reason = "division by zero"
    except (SyntaxError, RecursionError, MemoryError):
        reason = "this is no complete expression, or it is nested too deeply"
    except (OverflowError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"cannot compute: {reason}")


def _unit(name: str) -> str:
    """The unit that a name means: km, KM, kilometers, 公里. ValueError if there is none."""
    folded = unicodedata.normalize("NFKC", name).strip().casefold()
    for candidate in (folded, folded.removesuffix("s")):
        if candidate in UNIT_OF:
            return UNIT_OF[candidate]
    raise ValueError(f"unknown unit {name[:40]}")


def convert(value: float, source: str, target: str) -> int | float:
    """A length, weight, time or temperature in another unit. ValueError for unknown units, for units of
    different kinds and for values beyond 10**12."""
    units = _unit(source), _unit(target)
    if not abs(value) <= MAX_VALUE:  # nan is refused as well
        raise ValueError("number too large")
    if set(units) <= set(TEMPERATURES):
        (zero, degree), (new_zero, new_degree) = (TEMPERATURES[unit] for unit in units)
        result = (value - zero) * degree / new_degree + new_zero
    else:
        sizes = next((table for table in SIZES.values() if set(units) <= set(table)), None)
        if sizes is None:
            raise ValueError(f"cannot convert {source} to {target}")
        result = value * sizes[units[0]] / sizes[units[1]]
    return _rounded(round(result, 4) if abs(result) >= 0.01 else float(result))


def run_tool(name: str, arguments: dict) -> dict:
    """Result of one simulated call."""
    from dataset.mini_world import WORDS, rows

    if name not in TOOLS:
        return {"error": f"unknown tool {name}"}
    if not isinstance(arguments, dict):
        return {"error": "arguments must be an object"}
    missing = [key for key in TOOLS[name]["function"]["parameters"]["required"] if key not in arguments]
    if missing:
        return {"error": f"missing argument {missing[0]}"}
    try:
        if name == "calculate_math":
            return {"result": calculate(arguments["expression"])}
        if name == "get_current_time":
            city = _city(str(arguments["city"]))
            return {"time": f"{_number_of(city, 'hour', 0, 23):02d}:{_number_of(city, 'minute', 0, 59):02d}"}
        if name == "get_current_weather":
            city = _city(str(arguments["location"]))
            condition = list(CONDITIONS)[_number_of(city, "sky", 0, len(CONDITIONS) - 1)]
            return {"condition": condition, "temperature": _number_of(city, "degree", -5, 35)}
        if name == "unit_converter":
            source, target = str(arguments["from_unit"]), str(arguments["to_unit"])
            return {"result": convert(float(arguments["value"]), source, target)}
        if name == "get_exchange_rate":
            pair = (str(arguments["from_currency"]), str(arguments["to_currency"]))
            return {"rate": RATES[pair]} if pair in RATES else {"error": "unknown rate"}
        if name == "translate_text":
            text, table = str(arguments["text"]).strip(), rows(WORDS)
            target = str(arguments["target_language"]).casefold()
            both = {w[0]: w[1] for w in table} if target in ("chinese", "zh") else {w[1]: w[0] for w in table}
            return {"translation": both[text]} if text in both else {"error": "unknown word"}
        if name == "random_number":
            low, high = int(arguments["min"]), int(arguments["max"])
            if low > high or high - low > MAX_VALUE:
                return {"error": "empty range"}
            return {"result": _number_of(f"{low}-{high}", "random", low, high)}
        if name == "text_length":
            return {"characters": len(str(arguments["text"])[:MAX_TEXT])}
        if name == "reverse_text":
            return {"result": str(arguments["text"])[:MAX_TEXT][::-1]}
        start, days = str(arguments["start"]), int(arguments["days"])
        if start not in WEEKDAYS:
            return {"error": "unknown weekday"}
        return {"day": WEEKDAYS[(WEEKDAYS.index(start) + days) % 7]}
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return {"error": str(error)[:MAX_ERROR]}
