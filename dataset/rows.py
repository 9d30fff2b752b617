"""Files and line formats: what a row of each data set must look like, and reading it in constant memory.

    pretrain  {"text": "..."}
    sft       {"conversations": [{"role", "content", "reasoning_content"?, "tools"?, "tool_calls"?}, ...]}
    dpo       {"chosen": [messages], "rejected": [messages]}
    rlaif     {"conversations": [..., {"role": "assistant", "content": "<placeholder>"}], "answer"?: value}
    agent     {"conversations": [system with tools, user, ...], "gt": [expected values]}

LoRA and reasoning data use the sft format. Whatever the file (.jsonl, .json, .parquet, or the name of a
Hugging Face data set), it is read as blocks of JSON lines, so that everything behind this page sees one
format and a 10 GB file needs no more memory than a 10 MB one. Every complaint is a `DataError` that says
file, line, what and remedy.
"""

import codecs
import json
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("pretrain", "sft", "dpo", "rlaif", "agent")
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20
DOCTOR = "`python dataset/check_data.py FILE` lists every bad line"


class DataError(ValueError):
    """Something in a user's data is wrong. The message is one line: where, what, and what to do."""


class RowError(ValueError):
    """A row is wrong; whoever knows the file and the line turns this into a `DataError`."""


# ------------------------------------------------------------------------------------------------------------
# Reading


def iter_blocks(path, block_bytes=BLOCK_BYTES):
    """Yield `(first_row_number, bytes)`: whole JSON lines, about `block_bytes` at a time; rows count from 1.

    `path` is a .jsonl/.json file (JSON Lines, or one JSON array), a .parquet file, or the name of a data set
    on the Hugging Face hub (read through `datasets`). Raises DataError if it is missing or empty.
    """
    file = Path(path)
    if not file.exists():
        if looks_like_hub_name(path):
            yield from _blocks_of_rows(_hub_rows(str(path)), block_bytes)
            return
        raise DataError(
            f"{path} does not exist. Give the path of a .jsonl, .json or .parquet file, or fetch the public "
            "data with `python dataset/download.py --help`."
        )
    if file.is_dir():
        raise DataError(f"{path} is a folder: give one file, or several separated by commas")
    if file.suffix == ".parquet":
        yield from _blocks_of_rows(_parquet_rows(file), block_bytes)
        return
    with file.open("rb") as stream:
        start = stream.read(4096)
        if not start.strip() and file.stat().st_size <= 4096:
            raise DataError(f"{path} is empty: it must hold one JSON object per line")
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}:1: this file is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8 IN > OUT`")
        stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _blocks_of_rows(_json_array_rows(file, stream), block_bytes)
        else:
            yield from _blocks_of_lines(file, stream, block_bytes)


def _blocks_of_lines(file, stream, block_bytes):
    line_number, rest = 1, b""
    while True:
        data = stream.read(block_bytes)
        if not data:
            break
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            if len(rest) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file}:{line_number}: this line is longer than {MAX_LINE_BYTES >> 20} MB; "
                    "is the file one JSON object per line?"
                )
            continue
        block = rest + data[:cut]
        rest = data[cut:]
        yield line_number, block
        line_number += block.count(b"\n")
    if rest.strip():
        yield line_number, rest


def _blocks_of_rows(rows, block_bytes):
    number, first, lines, size = 0, 1, [], 0
    for row in rows:
        number += 1
        # a lone surrogate stays an escape sequence, so that validation can name the row
        lines.append(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        size += len(lines[-1]) + 1
        if size >= block_bytes:
            yield first, b"\n".join(lines) + b"\n"
            first, lines, size = number + 1, [], 0
    if lines:
        yield first, b"\n".join(lines) + b"\n"


def _json_array_rows(file, stream):
    """Elements of one big JSON array, decoded as they come."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    parser = json.JSONDecoder()
    text, number, done = "", 0, False
    while not done:
        data = stream.read(BLOCK_BYTES)
        try:
            text += decode(data, not data)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: element {number + 1} or later is not UTF-8 ({error.reason})") from None
        position = 0
        while True:
            while position < len(text) and text[position] in " \t\r\n,[":
                position += 1
            if position < len(text) and text[position] == "]":
                done = True
                break
            try:
                row, end = parser.raw_decode(text, position)
            except ValueError as error:
                if not data:
                    raise DataError(f"{file}: element {number + 1} is not JSON ({error})") from None
                break  # this element goes on in the next block
            if end == len(text) and data:
                break  # a number could go on in the next block
            number += 1
            position = end
            yield row
        text = text[position:]
        if len(text) > MAX_LINE_BYTES:
            raise DataError(
                f"{file}: element {number + 1} is not JSON, or longer than {MAX_LINE_BYTES >> 20} MB"
            )
        if not data:
            break


def _parquet_rows(file):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file}: reading parquet needs pyarrow: `pip install pyarrow`, or convert to .jsonl"
        ) from None
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from None


def looks_like_hub_name(path):
    """`owner/name` or `owner/name:split`, and not something that looks like a file."""
    text = str(path)
    parts = text.split(":")[0].split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~")) and "." not in parts[1][-8:]


def _hub_rows(name):
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name}: not a file; as a Hugging Face data set it needs `pip install datasets`"
        ) from None
    repo, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(repo, split=split or "train", streaming=True)
    except Exception as error:  # the hub client raises many types, all of them about this one name
        raise DataError(f"{name}: no such file, and not a readable Hugging Face data set ({error})") from None
    yield from data


def iter_json(path, first_row, block):
    """`(row_number, row)` of one block from `iter_blocks`; blank lines are skipped."""
    for number, line in enumerate(block.split(b"\n"), first_row):
        if line.strip():
            try:
                yield number, parse_line(line)
            except RowError as error:
                raise DataError(f"{path}:{number}: {error}; {DOCTOR}") from None


def parse_line(line):
    """One JSON object from the bytes of a line. Raises RowError."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
            "convert the file, e.g. `iconv -f GB18030 -t UTF-8 IN > OUT`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON ({error}); write one JSON object per line") from None
    if not isinstance(row, dict):
        raise RowError(f"a JSON object is expected, this is {_type(row)}")
    return row


def iter_rows(path, kind):
    """Yield `(row_number, row)` with every row validated for `kind`: what stages that need no cache read (DPO
    pairs, prompts). Conversations come back as `(messages, tools)` under
    "conversations"/"chosen"/"rejected"."""
    for first_row, block in iter_blocks(path):
        for number, row in iter_json(path, first_row, block):
            try:
                yield number, validate(row, kind)
            except RowError as error:
                raise DataError(f"{path}:{number}: {error}; {DOCTOR}") from None


# ------------------------------------------------------------------------------------------------------------
# Validation


def validate(row, kind):
    """Check one row and return it in canonical form. Raises RowError."""
    if kind == "pretrain":
        return {"text": pretrain_text(row)}
    if kind == "dpo":
        return preference(row)
    messages, tools = conversation(row, "conversations", need_answer=kind == "sft")
    if kind == "sft":
        return {"conversations": (messages, tools)}
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # a placeholder; the model writes this turn
    if not any(message["role"] == "user" for message in messages):
        raise RowError("no user turn, so there is nothing to answer")
    if kind == "rlaif":
        gt = next((row[name] for name in ("gt", "answer") if row.get(name) is not None), None)
        if gt is None:
            return {"conversations": (messages, tools)}
        gt = gt if isinstance(gt, list) else [gt]
    else:
        gt = _need(row, "gt")
    if not isinstance(gt, list):
        raise RowError(f'"gt" must be a list of expected values, this is {_type(gt)}')
    return {
        "conversations": (messages, tools),
        "gt": [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in gt],
    }


def preference(row):
    """{"chosen", "rejected"} as canonical `(messages, tools)` that share everything but the last message, an
    answer of the assistant. Raises RowError."""
    sides = {
        side: conversation({**row, "conversations": _need(row, side)}, side)
        for side in ("chosen", "rejected")
    }
    (chosen, tools), (rejected, other_tools) = sides["chosen"], sides["rejected"]
    for side, (messages, _) in sides.items():
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"the last message of \"{side}\" must be the assistant's, it is the {messages[-1]['role']}'s"
            )
    if chosen[:-1] != rejected[:-1] or tools != other_tools:
        raise RowError(
            '"chosen" and "rejected" answer different prompts: all but their last message must be the same'
        )
    if len(chosen) < 2:
        raise RowError('"chosen" has no prompt before the answer, so there is nothing to prefer it for')
    if chosen[-1] == rejected[-1]:
        raise RowError('"chosen" and "rejected" are the same answer: remove this row')
    return sides


def pretrain_text(row):
    text = _need(row, "text")
    if not isinstance(text, str):
        raise RowError(f'"text" must be a string, this is {_type(text)}')
    return _encodable(text, '"text"')


def conversation(row, key="conversations", need_answer=True):
    """Messages of a row in canonical form, and its tools (a list of dicts, or None). Raises RowError."""
    messages = _need(row, "conversations", key)
    if not isinstance(messages, list) or not messages:
        raise RowError(f'"{key}" must be a non-empty list of messages, this is {_type(messages)}')
    messages, tools = canonical(messages, row.get("tools"))
    if need_answer and not any(message["role"] == "assistant" for message in messages):
        raise RowError(f'"{key}" has no assistant turn, so there is nothing to learn')
    return messages, tools


def canonical(messages, tools=None):
    """What the chat template sees: plain strings and lists, so that nothing in it depends on spelling.

    - content: text, or a list of text parts joined, or "" when only tool calls are given
    - an assistant's `<think>...</think>` at the start of its content becomes reasoning_content
    - tools from the system message (`tools`, or `functions` in older files), as JSON text or as a list
    - tool_calls, as JSON text or as a list, each {"name": str, "arguments": JSON text}

    Returns `(messages, tools or None)`. Raises RowError, naming the message by its place from 1.
    """
    tools = _json_list(tools, "tools")
    result = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{where} must be an object with role and content, this is {_type(message)}")
        role = message.get("role")
        if role not in ROLES:
            hint = " (the keys from/value are ShareGPT's: rename them)" if "from" in message else ""
            raise RowError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}{hint}")
        calls = (
            _json_list(message.get("tool_calls"), f"tool_calls of {where}") if role == "assistant" else None
        )
        content = _text(message, where, optional=bool(calls))
        clean = {"role": role, "content": content}
        if role == "system":
            found = message.get("tools") or message.get("functions")
            tools = _json_list(found, f"tools of {where}") or tools
        elif role == "assistant":
            reasoning = message.get("reasoning_content")
            if reasoning is not None and not isinstance(reasoning, str):
                raise RowError(f"reasoning_content of {where} must be a string, this is {_type(reasoning)}")
            reasoning = _encodable((reasoning or "").strip("\n"), f"reasoning_content of {where}")
            if not reasoning and "</think>" in content:
                before, _, content = content.partition("</think>")
                reasoning = before.split("<think>")[-1].strip("\n")
            clean["content"] = content.lstrip("\n")
            if reasoning:
                clean["reasoning_content"] = reasoning
            if calls:
                clean["tool_calls"] = [_tool_call(call, where) for call in calls]
        result.append(clean)
    return result, tools


def _tool_call(call, where):
    call = call.get("function") or call
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError(f"a tool call of {where} has no name")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {
        "name": _encodable(name, "name"),
        "arguments": _encodable(arguments or "{}", f"arguments of {where}"),
    }


def _text(message, where, optional=False):
    content = message.get("content")
    if content is None:
        if optional or (message["role"] == "assistant" and message.get("reasoning_content")):
            return ""
        raise RowError(f"{where} ({message['role']}) has no content")
    if isinstance(content, list):
        parts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
                raise RowError(f"{where} has a content part that is not text; this model reads text only")
            parts.append(text)
        content = "".join(parts)
    if not isinstance(content, str):
        raise RowError(f"content of {where} must be a string, this is {_type(content)}")
    return _encodable(content, f"content of {where}")


def _json_list(value, what):
    """A list of objects, or its JSON text; None for nothing."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{what} is not valid JSON text ({error})") from None
    if not value:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{what} must be a list of objects, or the JSON text of one")
    return value


def _need(row, key, name=None):
    if key not in row:
        raise RowError(
            f'the key "{name or key}" is missing; this row has {", ".join(map(repr, row)) or "no keys"}'
        )
    return row[key]


def _encodable(text, what):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a surrogate pair ({text[error.start]!r}): broken text") from None
    return text


def _type(value):
    names = {str: "a string", dict: "an object", list: "a list", bool: "a truth value", int: "a number"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
