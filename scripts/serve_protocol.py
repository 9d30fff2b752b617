"""OpenAI's chat interface, as far as this server speaks it: what a request may hold, how its text becomes
thoughts, words and tool calls, and what goes back. No model and no network in here.

Field by field: https://platform.openai.com/docs/api-reference/chat. From vLLM's dialect: top_k, min_p,
repetition_penalty, stop_token_ids, ignore_eos, chat_template_kwargs, reasoning_content.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from model.generation import Sampling, common_end
from trainer.tools import CLOSE, OPEN, parse_block

THINK_END = "</think>"
LONGEST_STOP = 256  # characters


class ProtocolError(Exception):
    """What the client did wrong, in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        return error_body(self.status, self.message, self.param, self.code)


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
}
KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kind = KINDS.get(status, "invalid_request_error")
    message, param = (text and text.encode("utf-8", "replace").decode()[:500] for text in (message, param))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------


class FirstError(FailFast):
    """Of a million wrong items, the first is told: a list of all errors would take gigabytes."""

    __hash__ = object.__hash__  # typing.Union wants it


Item = TypeVar("Item")
List = Annotated[list[Item], FirstError()]


class Strict(BaseModel):
    """No conversions ("0.7" is no number), and no field that would be ignored without a word."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def known(cls, data):
        """Fields that are unknown here but null ask for nothing."""
        if not isinstance(data, dict) or data.keys() <= cls.model_fields.keys():
            return data
        for name, value in data.items():
            if name not in cls.model_fields and value is not None:
                raise PydanticCustomError("unknown_field", "unknown field", {"field": str(name)})
        return {name: value for name, value in data.items() if name in cls.model_fields}


class Open(BaseModel):
    """Clients decorate these with fields of their own."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Part(Open):
    type: str
    text: str | None = None


class Function(Open):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Open):
    id: str | None = None
    type: str | None = "function"
    function: Function


class Message(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | List[str | Part] | None = None
    reasoning_content: str | None = None
    tool_calls: List[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict:
        """As the chat template of this project wants it."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if isinstance(self.content, list):
            message["content"] = [p if isinstance(p, str) else p.model_dump() for p in self.content]
        if self.role == "tool" and self.content is None:
            message["content"] = ""
        if getattr(self, "function_call", None):
            raise ProtocolError(400, "function_call is the old form: send tool_calls", "messages")
        if self.role == "assistant":
            if self.tool_calls:
                message["tool_calls"] = [call.function.model_dump() for call in self.tool_calls]
            elif self.content is None:
                message["content"] = ""
            if self.reasoning_content:
                message["reasoning_content"] = self.reasoning_content
        return message


class FunctionSchema(Open):
    name: str = Field(pattern=r"^[\w.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    type: Literal["function"] = "function"
    function: FunctionSchema


class ChosenFunction(Open):
    name: str


class ToolChoice(Open):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Open):
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Open):
    include_usage: bool | None = None


class Common(Strict):
    """Of both kinds of completion. null means the default, as everywhere in this interface."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = None
    stop: str | List[str] | None = None
    stop_token_ids: List[int] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self, max_tokens: int) -> Sampling:
        def or_default(value, default):
            return default if value is None else value

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 16 or not all(0 < len(text) <= LONGEST_STOP for text in stop):
            text = f"stop must be at most 16 texts, of 1 to {LONGEST_STOP} characters each"
            raise ProtocolError(400, text, "stop")
        return Sampling(
            max_new_tokens=max_tokens,
            temperature=at_least(0.01, or_default(self.temperature, 0.7)),
            top_p=at_least(1e-6, or_default(self.top_p, 0.92)),
            top_k=max(or_default(self.top_k, 0), 0),
            min_p=or_default(self.min_p, 0.0),
            repetition_penalty=at_least(0.01, or_default(self.repetition_penalty, 1.0)),
            num_return_sequences=or_default(self.n, 1),
            seed=None if self.seed is None else self.seed % (1 << 62),
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop=tuple(stop),
        )

    def biases(self, vocab_size: int) -> dict[int, float]:
        found = {}
        for token, bias in (self.logit_bias or {}).items():
            if not re.fullmatch(r"\d{1,9}", token, re.ASCII) or int(token) >= vocab_size:
                raise ProtocolError(
                    400, f"logit_bias: {token[:40]!r} is no token of this model", "logit_bias"
                )
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                text = "logit_bias: values are numbers between -100 and 100"
                raise ProtocolError(400, text, "logit_bias")
            found[int(token)] = float(bias)
        return found

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def at_least(least: float, value: float) -> float:
    """Settings that are nearly 0 divide logits into infinity; 0 itself is greedy."""
    return max(value, least) if value else value


class ChatRequest(Common):
    messages: List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: List[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    open_thinking: bool | None = None  # MiniMind's own name for it
    reasoning_effort: str | None = None
    # Accepted without effect: they do not change what is answered.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: List[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def thinking(self, default: bool = False) -> bool:
        """Does the answer begin with thoughts? By any of the names that clients have for it; `default`: for
        those that do not say."""
        known = {"open_thinking": self.open_thinking, **(self.chat_template_kwargs or {})}
        for name, value in known.items():
            where = f"chat_template_kwargs.{name}"
            if name not in ("open_thinking", "enable_thinking"):
                raise ProtocolError(400, f"{where} is unknown: use open_thinking or enable_thinking", where)
            if (
                value not in (None, True, False)
                or isinstance(value, (int, float))
                and not isinstance(value, bool)
            ):
                raise ProtocolError(400, f"{where} must be true or false", where)
        said = [value for value in known.values() if value is not None]
        if self.reasoning_effort is not None:
            said.append(self.reasoning_effort != "none")
        return any(said) if said else default

    def offered(self) -> list[dict] | None:
        """The tools as the template takes them; None where there are none, or none may be called."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def forced(self) -> list[str] | None:
        """The tools of which one must be called; None: the model decides."""
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            if name not in names:
                raise ProtocolError(400, f"tool_choice names {name!r}, which is not in tools", "tool_choice")
            return [name]
        if self.tool_choice == "required":
            if not names:
                raise ProtocolError(400, "tool_choice is 'required', but there are no tools", "tool_choice")
            return names
        return None


class CompletionRequest(Common):
    prompt: str | List[str] | List[int] | List[List[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: str | None = None

    def limit(self) -> int | None:
        return self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        if not self.prompt:
            raise ProtocolError(400, "prompt is an empty list", "prompt")
        return list(self.prompt)


# --------------------------------------------------------------------------------------------------------
# The text of an answer
# --------------------------------------------------------------------------------------------------------


class AnswerParser:
    """Sorts the text of an answer, as it comes, into ("reasoning", text), ("content", text) and ("call",
    {"name", "arguments"}). What may become a tag waits until it is certain, so no tag is ever handed out.

    Args:
        thinking: the text begins inside thoughts.
        tools: calls are looked for. A malformed one stays content, just as the model wrote it.
        single: the first call is the last thing (`parallel_tool_calls: false`).
    """

    def __init__(self, thinking: bool, tools: bool, single: bool = False):
        self.state = "reasoning" if thinking else "content"
        self.tools, self.single = tools, single
        self.waiting = ""
        self.begun = False  # something of the current part was handed out: what comes before is trimmed
        self.calls = 0

    @property
    def done(self) -> bool:
        return self.single and self.calls > 0

    def put(self, text: str, last: bool = False) -> list[tuple[str, Any]]:
        self.waiting += text
        found: list[tuple[str, Any]] = []
        while not self.done and self.advance(found, last):
            pass
        if last and self.state == "call" and not self.done:  # cut off in the middle of a call
            found.append(("content", OPEN + self.waiting))
        return merged(found)

    def advance(self, found: list, last: bool) -> bool:
        """Take one part off what waits. False when nothing is certain any more."""
        if self.state == "call":
            block, closed, rest = self.waiting.partition(CLOSE)
            if not closed:
                return False
            call = parse_block(block)
            if call.error:
                found.append(("content", OPEN + block + CLOSE))
            else:
                self.calls += 1
                found.append(("call", {"name": call.name, "arguments": call.arguments}))
            self.enter("content", rest)
            self.begun = bool(call.error)
            return True
        tag = THINK_END if self.state == "reasoning" else OPEN if self.tools else None
        before, met, rest = self.waiting.partition(tag) if tag else (self.waiting, "", "")
        hold = 0
        if tag and not met and not last:
            hold = common_end(before, tag)
        certain = before[: len(before) - hold]
        if met or (tag and not last):  # space before a tag belongs to nobody
            certain = certain.rstrip()
        text = certain if self.begun else certain.lstrip()
        if text:
            found.append((self.state, text))
            self.begun = True
        if met:
            self.enter("call" if tag == OPEN else "content", rest)
            return True
        self.waiting = "" if last else before[len(certain) :]
        return False

    def enter(self, state: str, rest: str):
        self.state, self.waiting, self.begun = state, rest, False


def merged(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Neighbouring pieces of one kind as one."""
    result: list[tuple[str, Any]] = []
    for kind, value in found:
        if result and kind != "call" and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + value)
        else:
            result.append((kind, value))
    return result


# --------------------------------------------------------------------------------------------------------
# Responses
# --------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Called(BaseModel):
    id: str
    type: str = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    refusal: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: Error


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "minimind"
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def usage_of(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def called(call: dict, index: int | None = None) -> dict:
    """A tool call as clients get it; streamed ones carry their index."""
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    found = {"id": new_id("call"), "type": "function", "function": function}
    return found if index is None else {"index": index, **found}


def sse(data: dict | str) -> bytes:
    """One server-sent event. Some clients also break lines at characters that JSON need not escape."""
    text = data
    if not isinstance(data, str):
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for character in "\x85\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
    return f"data: {text}\n\n".encode()
