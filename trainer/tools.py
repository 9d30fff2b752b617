"""What an agent can call: which tools there are, how calls are read from a text, and how they are run.

    calls = parse_calls('<tool_call>{"name": "text_length", "arguments": {"text": "hi"}}</tool_call>')
    observation, ok = execute(calls[0])     # '{"characters": 2}', True

Training and evaluation share this file, so that a call that earns a reward is one that would have
been executed. A model writes anything: whatever is wrong with a call becomes an observation {"error": "..."}
that says what to do better, never an exception. No text of a model is run as code.

The tools themselves: dataset/mini_tools.py. Tools of one's own: `extra` of `execute`.
"""

from __future__ import annotations

import json
import math
import re
import threading
import traceback
from dataclasses import dataclass

from dataset.mini_tools import TOOLS, run_tool

MAX_RESULT = 500  # characters of a result that the model gets to read
MAX_DIGITS = 100  # of a number in a call: reading and writing an integer takes time quadratic in its digits
MAX_DEPTH = 20  # of lists and objects inside each other
OPEN, CLOSE = "<tool_call>", "</tool_call>"  # errors never spell them: they are read by the model, and parsed
KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict
    error: str = ""  # why it cannot be executed; "" = well-formed


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def parse_calls(text: str) -> list[Call]:
    """Every <tool_call> ... </tool_call> of a model's text, in order; a malformed one has an `error`. Never
    raises; the time is linear in the text.

    Thoughts are not acted upon: what counts stands behind the last </think>, and before a <think> that is
    never closed. A tag inside a call ends it or spoils it, except <tool_call> inside a JSON string.
    """
    if not isinstance(text, str):
        return []
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    calls, start = [], text.find(OPEN)
    while start >= 0:
        start += len(OPEN)
        end = text.find(CLOSE, start)
        if end < 0:
            calls.append(Call("", {}, "a tool_call is not closed"))
            break
        calls.append(parse_block(text[start:end]))
        start = text.find(OPEN, end)
    return calls


def parse_block(block: str) -> Call:
    """The call in the text between the two tags."""
    name = ""
    try:
        if not block.strip():
            raise ValueError("the call is empty")
        name, arguments = read_call(block)
    except RecursionError:
        return Call(name, {}, "the call is nested too deeply")
    except ValueError as error:
        return Call(name, {}, "a tool_call inside a tool_call" if OPEN in block else str(error))
    if isinstance(arguments, str):  # as clients of OpenAI's interface send them
        try:
            arguments = read_json(arguments)
        except (ValueError, RecursionError):
            return Call(name, {}, "arguments is a string that holds no JSON object")
    if not isinstance(arguments, dict):
        return Call(name, {}, f"arguments must be an object, not {kind_of(arguments)}")
    return Call(name, arguments)


def read_call(block: str) -> tuple[str, object]:
    """(name, arguments) of a block; ValueError says what is wrong with it."""
    call = read_json(block)
    if isinstance(call, list):
        raise ValueError("a tool_call holds one call, not a list")
    if not isinstance(call, dict):
        raise ValueError(f"a call is an object with name and arguments, not {kind_of(call)}")
    name = call.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,64}", name):
        raise ValueError("name must be the name of a tool" if "name" in call else "the call has no name")
    if "arguments" not in call:
        raise ValueError("the call has no arguments; {} stands for none")
    return name, call["arguments"]


def read_json(text: str):
    """The value of a JSON text, strictly: ValueError for NaN and Infinity, for numbers too long or too large,
    for deep nesting, and for half of a surrogate pair, which no file and no tokenizer could take."""
    try:
        value = json.loads(text, parse_int=read_int, parse_float=read_float, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: at character {error.pos}, {error.msg}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in children(parent)]
    if level:
        raise ValueError("the call is nested too deeply")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
    return value


def read_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def read_float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if math.isinf(value):
        raise ValueError("a number is too long or too large")
    return value


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def children(value) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def kind_of(value) -> str:
    if value is None:
        return "null"
    return KINDS.get(type(value), "an object")


def offered(tools: list[dict] | None) -> list[str]:
    """The names in a conversation's list of tools, {"function": {"name": ...}} or {"name": ...}. Entries that
    are neither are passed over."""
    names = []
    for tool in tools if isinstance(tools, list) else []:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in names:
            names.append(name)
    return names


# ----------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------


def execute(call: Call, allowed=None, seconds: float = 2.0, extra=None) -> tuple[str, bool]:
    """(observation, ok): what the tool answers as JSON text, cut to MAX_RESULT characters. Never raises.

    allowed: the names offered in this conversation (None: all). extra: tools of one's own, name ->
    function(**arguments); they come before the simulated ones, may take `seconds`, and their arguments are
    theirs to check.
    """
    extra = extra or {}
    if call.error:
        return observe({"error": call.error})
    if not isinstance(call.name, str) or not isinstance(call.arguments, dict):
        return observe({"error": "a call needs a name and an object of arguments"})
    names = list(dict.fromkeys([*extra, *TOOLS]))
    if allowed is not None:
        names = [name for name in names if name in allowed]
    if call.name not in names:
        known = f"the tools are {', '.join(names)}" if names else "no tools are offered in this conversation"
        return observe({"error": f"there is no tool {call.name[:64]} here; {known}"})
    if call.name in extra:
        return run_in_thread(extra[call.name], call.arguments, seconds)
    arguments, problem = fit_arguments(call.name, call.arguments)
    return observe({"error": problem} if problem else run_tool(call.name, arguments))


def observe(result) -> tuple[str, bool]:
    """(JSON text, ok?) of what a tool returned; what JSON cannot say is said by str()."""
    ok = not (isinstance(result, dict) and result.get("error"))
    try:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(str(result), ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode()
    return (text if len(text) <= MAX_RESULT else text[: MAX_RESULT - 1] + "…"), ok


def run_in_thread(function, arguments: dict, seconds: float) -> tuple[str, bool]:
    """The observation of function(**arguments), or an error when that takes longer than `seconds`.

    A signal would end the function itself, but there are signals only in the main thread, and no alarm on
    Windows. A thread that is late is left alone: Python cannot stop it, and it ends with the process.
    """
    found = []

    def work():
        try:
            found.append(observe(function(**arguments)))
        except BaseException as error:  # sys.exit() in a tool ends a call, not the training
            reason = traceback.format_exception_only(type(error), error)[-1].strip()
            found.append(observe({"error": f"the tool failed: {reason[:200]}"}))

    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
    except RuntimeError as error:  # no more threads: too many tools were late
        return observe({"error": f"the tool could not be started: {error}"})
    return found[0] if found else observe({"error": f"the tool gave no answer within {seconds:g} seconds"})


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


def fit_arguments(name: str, arguments: dict) -> tuple[dict, str]:
    """(arguments as the schema of tool `name` types them, what is wrong with them or "")."""
    parameters = TOOLS[name]["function"]["parameters"]
    kinds = {key: rules["type"] for key, rules in parameters["properties"].items()}
    missing = [key for key in parameters["required"] if key not in arguments]
    unknown = [str(key)[:40] for key in arguments if key not in kinds]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unknown[:5])}"] if unknown else []
    if problems:
        return {}, f"wrong arguments for {name}: {'; '.join(problems)}; it takes {', '.join(kinds)}"
    fitted = {key: fit_value(value, kinds[key]) for key, value in arguments.items()}
    for key, value in fitted.items():
        if value is None:
            article = "an" if kinds[key] == "integer" else "a"
            return {}, f"{key} must be {article} {kinds[key]}, not {shown(arguments[key])}"
    return fitted, ""


def fit_value(value, kind: str) -> str | int | float | None:
    """`value` as a "string", "number" or "integer" of JSON schema, None if it is none. Numbers may be written
    as strings, as models often do; true and false are no numbers, although Python has it so."""
    if kind == "string":
        return value if isinstance(value, str) else None
    if isinstance(value, str):
        text = value.strip()
        if len(text) > MAX_DIGITS or not NUMBER.fullmatch(text):
            return None
        value = float(text) if set(text) & set(".eE") else int(text)
    if type(value) not in (int, float) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if kind == "integer" and isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


def shown(value) -> str:
    """A wrong value in an error: the text of a string, the kind of anything else."""
    return f"'{value[:40]}'" if isinstance(value, str) else kind_of(value)
