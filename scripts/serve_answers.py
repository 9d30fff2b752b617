"""From requests to tokens, and from tokens to what is sent: the part of the server between the protocol and
the worker."""

import asyncio
import codecs
import json
import logging
import time

from dataset.lm_dataset import DataError, TextEncoder
from eval_llm import say
from model.batching import Batch, Request
from scripts.serve_guides import Guides
from scripts.serve_protocol import (
    AnswerParser,
    ChatRequest,
    Common,
    CompletionRequest,
    ProtocolError,
    called,
    sse,
)
from scripts.serve_worker import Overdue, Refused, Unanswerable

log = logging.getLogger("minimind")


class Served:
    """A model under its name."""

    def __init__(self, name: str, native, args):
        self.name, self.tokenizer, self.encode, self.is_base = (
            name,
            native.tokenizer,
            native.encode,
            native.is_base,
        )
        engine = native.engine
        self.vocab_size = engine.config.vocab_size
        positions = engine.config.max_position_embeddings
        self.max_len = min(args.max_model_len or positions, positions)
        self.batch = Batch(
            engine, args.max_rows, int(args.cache_gb * 2**30), prefix_memory=int(args.prefix_gb * 2**30)
        )
        self.created = int(time.time())
        self.guides = None
        try:
            eos = engine.config.eos_token_id
            self.guides = Guides(self.tokenizer, self.vocab_size, eos if isinstance(eos, int) else eos[0])
        except ImportError:
            say("llguidance is not installed: response_format and forced tool calls are refused")
        self.token_texts = TextEncoder.of(self.tokenizer).token_texts()
        self.longest_token = max(map(len, self.token_texts))
        self.special = frozenset(self.tokenizer.all_special_ids)  # not part of an answer's text

    def refuse_long(self, text: str, messages: int):
        """Before a text is encoded, which nothing can interrupt: one that is too long however it is cut."""
        if len(text) > self.max_len * self.longest_token or messages > self.max_len // 4:
            self.room([0] * (self.max_len + 1), None, 0)

    def room(self, prompt: list[int], wanted: int | None, default: int) -> int:
        """How many tokens the answer may have. Raises ProtocolError when the prompt leaves none."""
        left = self.max_len - len(prompt)
        if left < 1:
            raise ProtocolError(
                400,
                f"the prompt has {len(prompt)} tokens or more; {self.name} takes {self.max_len} in all",
                "messages",
                "context_length_exceeded",
            )
        return min(left, wanted or default)

    def request(self, body: Common, prompt: list[int], max_tokens: int, **more) -> Request:
        """What both kinds of completion have in common, for the batch."""
        if not all(0 <= token < self.vocab_size for token in body.stop_token_ids or ()):
            raise ProtocolError(
                400, f"stop_token_ids: tokens are 0 to {self.vocab_size - 1}", "stop_token_ids"
            )
        if body.ignore_eos and more.get("guide"):
            raise ProtocolError(400, "ignore_eos: an answer of a given form ends with it", "ignore_eos")
        return Request(
            prompt,
            body.sampling(max_tokens),
            self.tokenizer,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=body.biases(self.vocab_size),
            reuse=body.seed is None,  # whoever wants an answer again wants it exactly
            **more,
        )

    def token_name(self, token: int) -> str:
        """As OpenAI writes it: tokens that are no whole characters by their bytes."""
        text = self.token_texts[token]
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

    def token_entry(self, token: int, logprob: float) -> dict:
        text = self.token_texts[token]
        return {"token": text.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(text)}


def encode_chat(served: Served, body: ChatRequest, tools, thinking: bool) -> list[int]:
    messages = [message.plain() for message in body.messages]
    served.refuse_long(json.dumps([messages, tools], ensure_ascii=False, default=str), len(messages))
    try:
        return served.encode(messages, thinking, tools)
    except (DataError, ValueError, TypeError, RecursionError) as error:
        # The tokenizer's own error for half of a surrogate pair is a TypeError.
        raise ProtocolError(400, " ".join(str(error).split())[:500], "messages") from None


def encode_text(served: Served, prompt: str | list[int]) -> list[int]:
    """bos and the text, as in pretraining; ids as they are."""
    if not isinstance(prompt, str):
        return prompt
    served.refuse_long(prompt, 0)
    encoder = TextEncoder.of(served.tokenizer)
    try:
        return [encoder.bos, *encoder.plain.encode(prompt, add_special_tokens=False).ids]
    except (TypeError, ValueError):
        raise ProtocolError(400, "prompt holds half of a surrogate pair", "prompt") from None


def guide_of(served: Served, body: ChatRequest, tools, thinking: bool):
    """What an answer has to look like, for `Request.guide`; None: whatever it likes."""
    forced, form = body.forced(), body.response_format
    schema = None
    if form is not None and form.type == "json_object":
        schema = {"type": "object"}
    elif form is not None and form.type == "json_schema":
        schema = form.json_schema.json_schema if form.json_schema else None
        if schema is None:
            raise ProtocolError(400, "response_format: json_schema.schema is missing", "response_format")
    if not forced and schema is None:
        return None
    if forced and schema is not None:
        text = "a tool call is forced, so response_format could not be followed: send one of the two"
        raise ProtocolError(400, text, "response_format")
    if served.guides is None:
        raise ProtocolError(400, "this server cannot force a form: install llguidance", "response_format")
    allowed = [tool for tool in tools or () if not forced or tool["function"]["name"] in forced]
    try:
        return served.guides.make(schema, allowed, bool(forced), body.parallel_tool_calls is False, thinking)
    except (ValueError, TypeError, RecursionError) as error:
        param = "tools" if forced else "response_format"
        raise ProtocolError(400, f"{param}: {' '.join(str(error).split())[:400]}", param) from None


# --------------------------------------------------------------------------------------------------------
# Choices
# --------------------------------------------------------------------------------------------------------


class ChatAnswer:
    """One choice of a chat completion, from tokens to what is sent."""

    def __init__(self, served: Served, body: ChatRequest, thinking: bool):
        tools = body.offered() is not None
        self.served, self.wants_logprobs = served, bool(body.logprobs)
        self.parser = AnswerParser(thinking, tools, single=body.parallel_tool_calls is False)
        self.tokens = self.reasoning_tokens = self.calls = 0
        self.finish_reason: str | None = None

    def put(self, new) -> tuple[dict, list[dict]]:
        """One more token -> (what is new of the message, log-probs)."""
        self.tokens += 1
        self.reasoning_tokens += self.parser.state == "reasoning"
        delta: dict = {}
        for kind, value in self.parser.put(new.piece, last=new.finish_reason is not None):
            if kind == "call":
                delta.setdefault("tool_calls", []).append(called(value, self.calls))
                self.calls += 1
            else:
                name = "reasoning_content" if kind == "reasoning" else "content"
                delta[name] = delta.get(name, "") + value
        if new.finish_reason or self.parser.done:
            ended = {"eos": "stop", "stop": "stop", "length": "length"}[new.finish_reason or "stop"]
            self.finish_reason = "tool_calls" if self.calls and ended == "stop" else ended
        return delta, [self.logprob_entry(new)] if self.wants_logprobs else []

    def logprob_entry(self, new) -> dict:
        top = [self.served.token_entry(*one) for one in new.top]
        return self.served.token_entry(new.token, new.score) | {"top_logprobs": top}


async def chat_deltas(stream, answers: list[ChatAnswer]):
    """(choice, delta, log-probs) as tokens come, those that came together as one; ends the stream when every
    choice is finished, or nobody listens."""
    try:
        async for news in stream:
            parts: dict[int, tuple[dict, list]] = {}
            for new in news:
                answer = answers[new.sample]
                if answer.finish_reason:
                    continue  # its one call is made
                delta, logprobs = parts.setdefault(new.sample, ({}, []))
                more, entries = answer.put(new)
                for key, value in more.items():
                    delta[key] = delta[key] + value if key in delta else value
                logprobs += entries
            for index, (delta, logprobs) in parts.items():
                yield index, delta, logprobs
            if all(answer.finish_reason for answer in answers):
                return
    finally:
        stream.cancel()


class TextAnswer:
    """One choice of a plain completion."""

    def __init__(self, served: Served, body: CompletionRequest, request: Request, text: str):
        self.served, self.body, self.request = served, body, request
        self.echo = text if body.echo else None
        self.tokens = 0
        self.finish_reason: str | None = None
        self.characters = codecs.getincrementaldecoder("utf-8")("ignore")
        self.offset = self.sent = 0  # characters: of the next token, and of what was handed out
        self.late: list[tuple] = []  # tokens whose text may still be cut off by a stop string

    def put(self, new) -> tuple[str, dict | None]:
        """One more token -> (text, log-probs), with what is echoed before the first."""
        text, ended = "", new.finish_reason
        if self.tokens == 0 and self.echo is not None:
            text, prompt, scores = self.echo, self.request.prompt, self.request.prompt_scores
            if isinstance(self.body.prompt, str) or isinstance(self.body.prompt[0], str):
                prompt, scores = prompt[1:], scores[1:]  # without bos, of which who sent a text does not know
            for token, score in zip(prompt, [(None, None), *scores]):  # the first has none, as at OpenAI's
                self.place(token, *score, in_text=True)
        if self.body.max_tokens != 0:
            self.tokens += 1
            text += new.piece
            self.place(new.token, new.score, new.top, in_text=new.token not in self.served.special)
        if ended:
            cut = ended == "length" or self.body.max_tokens == 0
            self.finish_reason = "length" if cut else "stop"
        self.sent += len(text)
        whole = ended and ended != "stop"
        ready = [entry for entry in self.late if whole or entry[0] < self.sent]
        self.late = self.late[len(ready) :]
        return text, self.logprobs(ready) if self.body.logprobs is not None else None

    def place(self, token: int, logprob, top, in_text: bool):
        self.late.append((self.offset, token, logprob, top))
        if in_text:  # a character of several tokens begins with the first of them
            self.offset += len(self.characters.decode(self.served.token_texts[token]))

    def logprobs(self, entries: list) -> dict:
        name = self.served.token_name
        return {
            "tokens": [name(token) for _, token, _, _ in entries],
            "token_logprobs": [logprob for _, _, logprob, _ in entries],
            "top_logprobs": [
                {name(t): p for t, p in reversed(top)} if top else None for _, _, _, top in entries
            ],
            "text_offset": [offset for offset, _, _, _ in entries],
        }


async def merged(streams: list):
    """(number of the stream, its news) of several streams, whoever comes first."""
    queue: asyncio.Queue = asyncio.Queue()

    async def forward(number, stream):
        try:
            async for news in stream:
                queue.put_nowait((number, news, None))
            queue.put_nowait((number, None, None))
        except Exception as error:
            queue.put_nowait((number, None, error))

    tasks = [asyncio.create_task(forward(*one)) for one in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            number, news, error = await queue.get()
            if error:
                raise error
            if news is None:
                left -= 1
            else:
                yield number, news
    finally:
        for task, stream in zip(tasks, streams):
            task.cancel()
            stream.cancel()


# --------------------------------------------------------------------------------------------------------
# Server-sent events
# --------------------------------------------------------------------------------------------------------


async def guarded(events):
    """A stream has begun with status 200: what goes wrong later is an event of its own, and no [DONE]."""
    try:
        async for event in events:
            yield event
        yield sse("[DONE]")
    except Exception as error:
        yield sse(error_of(error).body())


def error_of(error: Exception) -> ProtocolError:
    """What a client is told about an answer that was not given."""
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, Overdue):
        return ProtocolError(504, str(error), None, "timeout")
    if isinstance(error, Refused):
        return ProtocolError(503, str(error), None, "shutting_down")
    if isinstance(error, Unanswerable):
        return ProtocolError(400, str(error))
    log.error("an answer failed", exc_info=error)
    return ProtocolError(500, "the server failed to answer; its log says why")


async def chat_events(stream, answers: list[ChatAnswer], head: dict, body: ChatRequest, usage):
    extra = {"usage": None} if body.include_usage else {}

    def chunk(index, delta, logprobs=None, finish_reason=None):
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse(head | {"choices": [choice]} | extra)

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, delta, entries in chat_deltas(stream, answers):
        logprobs = {"content": entries} if entries else None
        if delta or logprobs:
            yield chunk(index, delta, logprobs)
        if answers[index].finish_reason:
            yield chunk(index, {}, None, answers[index].finish_reason)
    if body.include_usage:
        yield sse(head | {"choices": [], "usage": usage()})


async def text_events(pieces, head: dict, body: CompletionRequest, usage):
    extra = {"usage": None} if body.include_usage else {}
    async for index, text, logprobs, finish_reason in pieces:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if text or logprobs or finish_reason:
            yield sse(head | {"choices": [choice]} | extra)
    if body.include_usage:
        yield sse(head | {"choices": [], "usage": usage()})
