"""A conversation in which the model may call tools, over a model in this process or any OpenAI-compatible
server: what the terminal client, the web demo and the tool-use exam share.

    speak = local(native, settings)                     # or remote(client, "full_sft", settings)
    messages = [{"role": "user", "content": "What is 12 * 7?"}]
    for kind, value in converse(speak, messages, tools): ...
    messages                                            # has the answer, the calls and their results
"""

import codecs
import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator

from scripts.serve_protocol import AnswerParser, new_id
from trainer.checkpoint import CheckpointError
from trainer.tools import MAX_RESULT, Call, execute, offered, read_json

# What `speak` and `converse` yield: ("reasoning", text), ("content", text), ("call", {"id", "name",
# "arguments" as JSON text}), ("result", {"id", "name", "content", "ok"}), ("usage", so many tokens more),
# ("end", reason).
Piece = tuple[str, object]
Speak = Callable[[list[dict], list[dict] | None], Iterator[Piece]]

FIELDS = {"content": "content", "reasoning": "reasoning_content"}  # of a message


def local(native, settings: dict, thinking: bool = False) -> Speak:
    """native: `eval_llm.Native` or `eval_llm.Transformers`; settings: of `model.generation.Sampling`."""

    def speak(messages, tools):
        parser = AnswerParser(thinking, bool(tools))
        pieces = native.answer(native.encode(messages, thinking, tools), settings)
        count, called = 0, False
        for piece, tokens in pieces:
            count += tokens
            yield "usage", tokens  # also while a call is being written, and nothing else comes
            for kind, value in parser.put(piece):
                called |= kind == "call"
                yield kind, as_call(value) if kind == "call" else value
        for kind, value in parser.put("", last=True):
            yield kind, as_call(value) if kind == "call" else value
        cut = count >= settings.get("max_new_tokens", 1 << 30)
        yield "end", "tool_calls" if called else "length" if cut else "stop"

    return speak


def as_call(call: dict) -> dict:
    return {
        "id": new_id("call"),
        "name": call["name"],
        "arguments": json.dumps(call["arguments"], ensure_ascii=False),
    }


def remote(client, model: str, settings: dict, thinking: bool | None = None) -> Speak:
    """client: `openai.OpenAI`; settings: fields of a request; those that are not OpenAI's own go into
    `extra_body`. thinking: None = as the server does without being told."""

    def speak(messages, tools):
        own = ("max_tokens", "temperature", "top_p", "seed", "stop", "frequency_penalty", "presence_penalty")
        fields = {k: v for k, v in settings.items() if k in own and v is not None}
        extra = {k: v for k, v in settings.items() if k not in own and v is not None}
        if thinking is not None:  # servers of others need not know it
            extra["chat_template_kwargs"] = {"open_thinking": thinking, "enable_thinking": thinking}
        if tools:
            fields["tools"] = tools
        chunks = client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra or None,
            **fields,
        )
        calls: dict[int, dict] = {}
        reason, usage = None, None
        whole = {kind: whole_characters() for kind in FIELDS}
        with chunks:  # whoever stops listening closes the connection, and the server stops writing
            for chunk in chunks:
                usage = chunk.usage.completion_tokens if chunk.usage else usage
                for choice in chunk.choices or ():
                    delta = choice.delta
                    thoughts = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
                    for kind, text in (("reasoning", thoughts), ("content", delta.content)):
                        text = whole[kind](text or "")
                        if text:
                            yield kind, text
                    for part in delta.tool_calls or ():  # other servers send arguments in pieces
                        call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                        call["id"] += part.id or ""
                        call["name"] += (part.function.name if part.function else None) or ""
                        call["arguments"] += (part.function.arguments if part.function else None) or ""
                    reason = choice.finish_reason or reason
        if reason is None:
            raise BrokenOff("the answer broke off before its end")
        for index in sorted(calls):
            yield "call", {key: whole_characters()(text) for key, text in calls[index].items()}
        if usage is not None:
            yield "usage", usage
        yield "end", reason

    return speak


class BrokenOff(ValueError):
    """A server ended an answer without saying that it is complete, or never began one."""


def whole_characters() -> Callable[[str], str]:
    """A function that takes a text in pieces and gives it back as characters that exist: some servers cut an
    emoji into its two surrogates. What has no other half becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
    return lambda text: decoder.decode(text.encode("utf-16-le", "surrogatepass"))


def first_model(client, url: str) -> str:
    """The first model that a server lists. Raises CheckpointError."""
    try:
        names = model_names(client)
    except Exception as error:
        raise CheckpointError(explain(error, url)) from None
    if not names:
        raise CheckpointError(f"{url} lists no models: name one with --model")
    return names[0]


def model_names(client) -> list[str]:
    return [model.id for model in client.models.list().data]


def connect(url: str, key: str | None, **settings):
    """An `openai.OpenAI`; without a key, that of the environment variable MINIMIND_API_KEY. Raises
    CheckpointError when the address or the key cannot be one."""
    import openai

    key = key or os.environ.get("MINIMIND_API_KEY") or "none"
    try:
        key.encode("ascii")
        return openai.OpenAI(base_url=url, api_key=key, **settings)
    except UnicodeEncodeError:
        raise CheckpointError("an API key has ASCII characters only") from None
    except Exception as error:  # httpx.InvalidURL is no ValueError
        raise CheckpointError(f"{url!r} is no address: {error}") from None


def converse(
    speak: Speak, messages: list[dict], tools: list[dict] | None = None, rounds: int = 8
) -> Iterator[Piece]:
    """Answer, run the tools that were called, and go on until an answer calls none, at most `rounds` times.

    `messages` grows as it is said. When the iterator is closed in the middle, what was said stays.
    """
    for _ in range(rounds):
        said, calls, end, finished = speak(list(messages), tools), [], "stop", False
        message = {"role": "assistant", "content": ""}
        messages.append(message)
        try:
            for kind, value in said:
                if kind in FIELDS:
                    message[FIELDS[kind]] = message.get(FIELDS[kind], "") + value
                elif kind == "call":
                    calls.append(value)
                elif kind == "end":
                    end = value
                if kind != "end":  # of the whole, further down
                    yield kind, value
            finished = True
        finally:
            if not finished and not any(message.get(name) for name in FIELDS.values()):
                messages.pop()  # nothing was said, and a call that was not run would have no result
        results = [(call, *run(call, tools)) for call in calls]
        if calls:  # with all results before the next yield: whoever stops here leaves no call without one
            message["tool_calls"] = [as_tool_call(call) for call in calls]
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": content}
                for call, content, _ in results
            ]
        for call, content, ok in results:
            yield "result", {"id": call["id"], "name": call["name"], "content": content, "ok": ok}
        if not calls:
            yield "end", end
            return
    yield "end", "rounds"


def as_tool_call(call: dict) -> dict:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


class Background:
    """An iterator of pieces in a thread of its own, so that whoever shows them can stop at any time, also
    while a long prompt is being read and nothing comes.

        with contextlib.closing(Background(converse(...))) as pieces:
            for piece in pieces: ...        # None after every PAUSE seconds without one
    """

    PAUSE = 0.2

    def __init__(self, pieces: Iterator[Piece]):
        self.pieces, self.arrived, self.stopped = pieces, queue.SimpleQueue(), False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        try:
            with contextlib.closing(self.pieces):
                for piece in self.pieces:
                    if self.stopped:
                        break
                    self.arrived.put(piece)
        except Exception as error:  # goes to whoever iterates
            self.error = error
        self.arrived.put(None)

    def __iter__(self) -> Iterator[Piece | None]:
        while True:
            try:
                piece = self.arrived.get(timeout=self.PAUSE)
            except queue.Empty:
                yield None
                continue
            if piece is None:
                break
            yield piece
        if self.error:
            raise self.error

    def close(self, seconds: float = 2):
        """Ends with the next piece. A thread that gets none within these seconds is left to itself."""
        self.stopped = True
        self.thread.join(seconds)


def run(call: dict, tools: list[dict] | None) -> tuple[str, bool]:
    """(what the tool says, ok). Nothing of a call is ever evaluated: see trainer/tools.py."""
    try:
        arguments = read_json(call["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        return json.dumps({"error": f"arguments: {error}"[:MAX_RESULT]}, ensure_ascii=False), False
    return execute(Call(call["name"], arguments), allowed=offered(tools))


def recent(messages: list[dict], count: int) -> list[dict]:
    """The last messages, at most `count`, from a question on: a result without its call means nothing."""
    last = messages[-count:] if count else []
    first = next((i for i, message in enumerate(last) if message["role"] == "user"), len(last))
    return last[first:]


def explain(error: Exception, url: str) -> str:
    """One sentence about what went wrong with a server. An error that has nothing to do with
    one is raised."""
    import httpx
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{url} did not answer in time"
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
    if isinstance(cause, (httpx.ReadError, httpx.RemoteProtocolError)):
        return f"{url} ended the connection in the middle of an answer"
    if isinstance(error, (openai.APIConnectionError, httpx.TransportError)):
        return f"nobody answers at {url}: start scripts/serve_openai_api.py there, or check the address"
    if isinstance(error, openai.AuthenticationError):
        return f"{url} wants an API key, and this is none of its keys"
    if isinstance(error, (openai.OpenAIError, BrokenOff, CheckpointError)):
        body = error.body if isinstance(getattr(error, "body", None), dict) else {}
        return whole_characters()(" ".join(str(body.get("message") or error).split())[:500])
    if isinstance(error, (ValueError, TypeError, AttributeError, LookupError)):
        # what the SDK makes of a page that has nothing to do with this interface
        return f"{url} does not answer as an OpenAI-compatible server does: does the address end in /v1?"
    raise error
