"""The simulated tools of the curriculum: definitions in the usual JSON form and deterministic results.

No network, no clock, no randomness: weather and time are functions of the city name, rates are a
fixed table, so that every answer can be checked. `run_tool(name, arguments)` returns a JSON-able
dict, `{"error": ...}` for anything it cannot do; it never raises on odd arguments.
"""

from __future__ import annotations

import ast
import hashlib
import operator

MAX_TEXT = 2000
MAX_VALUE = 10**12
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


def calculate(expression: str) -> int | float:
    """Value of a + - * / // % expression over numbers. ValueError for anything else or too large."""
    if not isinstance(expression, str) or len(expression) > 200:
        raise ValueError("expression must be a short string")
    cleaned = expression.replace("×", "*").replace("÷", "/").replace("−", "-")

    def walk(node: ast.AST) -> int | float:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            value = node.value
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = -walk(node.operand)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            value = _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        else:
            raise ValueError("only numbers and + - * / // % ( ) are allowed")
        if abs(value) > MAX_VALUE:
            raise ValueError("number too large")
        return value

    try:
        value = walk(ast.parse(cleaned.strip(), mode="eval"))
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise ValueError(f"cannot compute: {error}") from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
            city = str(arguments["city"])
            return {"time": f"{_number_of(city, 'hour', 0, 23):02d}:{_number_of(city, 'minute', 0, 59):02d}"}
        if name == "get_current_weather":
            city = str(arguments["location"])
            condition = list(CONDITIONS)[_number_of(city, "sky", 0, len(CONDITIONS) - 1)]
            return {"condition": condition, "temperature": _number_of(city, "degree", -5, 35)}
        if name == "unit_converter":
            value, pair = float(arguments["value"]), (str(arguments["from_unit"]), str(arguments["to_unit"]))
            if abs(value) > MAX_VALUE or value != value:
                return {"error": "number too large"}
            if pair in UNITS:
                result = value * UNITS[pair]
            elif pair[::-1] in UNITS:
                result = value / UNITS[pair[::-1]]
            else:
                return {"error": f"cannot convert {pair[0]} to {pair[1]}"[:100]}
            return {"result": int(result) if result.is_integer() else round(result, 4)}
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
    except (ValueError, TypeError, OverflowError) as error:
        return {"error": str(error)[:100]}
