"""The server as clients see it: openai's SDK, and raw requests for what no SDK would send."""

import json
import random
import socket
import sys
import threading
import time

import httpx
import openai
import pytest
from pydantic import ValidationError
from serve_helpers import LiveServer, small_native, wait_for
from transformers import AutoTokenizer

from model.batching import Request
from model.generation import Sampling
from model.model_minimind import MiniMindForCausalLM
from scripts import serve_openai_api
from scripts.serve_protocol import ChatRequest, CompletionRequest, ProtocolError
from trainer import checkpoint, cli
from trainer.checkpoint import CheckpointError

THINK_END, IM_END = 26, 2
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
        },
    }
    for name in ("first", "second")
]


@pytest.fixture(scope="module")
def server():
    with LiveServer() as server:
        yield server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, content="How are you?", stream=False, **settings):
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    settings = {"model": "chat", "max_tokens": 24} | settings
    return client.chat.completions.create(messages=messages, stream=stream, **settings)


def gather(chunks):
    """What a client makes of a stream: [message of each choice], usage."""
    found, usage = {}, None
    for chunk in chunks:
        assert chunk.id.startswith("chatcmpl-") and chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            known = found.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": [], "logprobs": []}
            )
            delta = choice.delta
            assert "finish_reason" not in known, "a chunk after the last"
            known["content"] += delta.content or ""
            known["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                assert call.index == len(known["calls"])
                known["calls"].append((call.id, call.function.name, call.function.arguments))
            known["logprobs"] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                known["finish_reason"] = choice.finish_reason
    return [found[i] for i in sorted(found)], usage


def test_models(client):
    assert [model.id for model in client.models.list()] == ["chat", "text"]
    assert client.models.retrieve("chat").id == "chat"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_streamed_and_whole_answers_are_the_same(client):
    settings = dict(seed=5, temperature=1.0, n=3, logprobs=True, top_logprobs=2)
    whole = ask(client, **settings)
    streamed, usage = gather(ask(client, stream=True, stream_options={"include_usage": True}, **settings))
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice, known in zip(whole.choices, streamed, strict=True):
        assert choice.message.role == "assistant" and choice.message.content == known["content"]
        assert choice.finish_reason == known["finish_reason"]
        assert choice.logprobs.content == known["logprobs"]
        text = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert choice.message.content.strip("�") in text.decode("utf-8", "replace")
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    tokens = sum(len(choice.logprobs.content) for choice in whole.choices)
    for found in (whole.usage, usage):
        assert found.completion_tokens == tokens
        assert found.total_tokens == found.prompt_tokens + tokens
    assert (
        ask(client, **settings | {"seed": 6}).choices[0].message.content != whole.choices[0].message.content
    )


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["你好", "é"]}, "b": {"type": "boolean"}}}
SCHEMA |= {"required": ["a", "b"], "additionalProperties": False}
ENDING = {str(THINK_END): 5}  # random weights would hardly come to an end
THOUGHTS = {"chat_template_kwargs": {"open_thinking": True}}


@pytest.mark.parametrize(
    "settings",
    [
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "second"}}},
        {"tools": TOOLS},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object"}, "max_tokens": 12},
        {"extra_body": THOUGHTS, "logit_bias": ENDING},
        {"extra_body": THOUGHTS, "tools": TOOLS, "tool_choice": "required", "logit_bias": ENDING},
        {"stop": ["e", "的"], "frequency_penalty": 1.5, "presence_penalty": -1},
    ],
    ids="calls one_call named tools schema json thoughts thoughts_calls stop".split(),
)
def test_seeded_answers_are_the_same_streamed_and_whole(client, settings):
    """Thoughts, words, calls, reasons and log-probs of three choices."""
    settings = dict(seed=11, temperature=1.0, n=3, max_tokens=200) | settings
    whole = ask(client, **settings)
    streamed, _ = gather(ask(client, stream=True, **settings))
    assert any(known["reasoning"] for known in streamed) == ("extra_body" in settings)
    for choice, known in zip(whole.choices, streamed, strict=True):
        message = choice.message
        assert (message.content or "") == known["content"]
        assert (getattr(message, "reasoning_content", None) or "") == known["reasoning"]
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        assert calls == [call[1:] for call in known["calls"]]
        assert bool(calls) == (settings.get("tool_choice") is not None)
        assert choice.finish_reason == known["finish_reason"]
        assert (choice.logprobs.content if choice.logprobs else []) == known["logprobs"]


@pytest.mark.parametrize("settings", [{"n": 2, "logprobs": 2}, {"n": 2, "echo": True, "logprobs": 0}, {}])
def test_plain_completions_are_the_same_streamed_and_whole(client, settings):
    settings |= dict(model="text", prompt=["The sky is", "天空"], seed=3, max_tokens=12)
    whole = client.completions.create(**settings)
    found = {choice.index: ["", [], None] for choice in whole.choices}
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            known = found[choice.index]
            known[0] += choice.text
            known[1] += choice.logprobs.token_logprobs if choice.logprobs else []
            known[2] = choice.finish_reason or known[2]
    assert len(found) == 2 * settings.get("n", 1)
    for choice in whole.choices:
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
        assert [choice.text, logprobs, choice.finish_reason] == found[choice.index]


def test_without_stream_options_there_is_no_usage(client):
    assert gather(ask(client, stream=True))[1] is None


def test_max_tokens_temperature_zero_and_finish_reasons(client):
    answer = ask(client, max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens == 4 and answer.choices[0].finish_reason == "length"
    assert ask(client, max_tokens=4, temperature=0, top_p=0.5).choices == answer.choices
    ended = ask(client, logit_bias={str(IM_END): 100})
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].message.content == ""
    newer = ask(client, max_tokens=openai.omit, max_completion_tokens=3)
    assert newer.usage.completion_tokens == 3


def test_stop_strings_end_an_answer_before_them(client):
    text = ask(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        answer = ask(client, temperature=0, max_tokens=40, stop=[stop, "never"], stream=stream)
        content = gather(answer)[0][0]["content"] if stream else answer.choices[0].message.content
        assert content == text[: text.index(stop)]


def test_content_as_parts_is_content(client):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]}
    ]
    assert ask(client, parts, temperature=0).choices == ask(client, temperature=0).choices
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        ask(client, image)


def test_system_prompt_tools_and_history_reach_the_model(client):
    def tokens(messages, **more):
        return ask(client, messages, max_tokens=1, **more).usage.prompt_tokens

    user = {"role": "user", "content": "hi"}
    plain = tokens([user])
    assert tokens([{"role": "system", "content": "Be short."}, user]) > plain
    assert tokens([user, {"role": "assistant", "content": "hello"}, user]) > plain
    assert tokens([user], tools=TOOLS) > plain + 50
    assert tokens([user], tools=TOOLS, tool_choice="none") == plain


def test_a_conversation_is_not_read_twice(client):
    messages = [{"role": "user", "content": "Tell me a story about a river and a mountain."}]
    first = ask(client, messages, temperature=0)
    messages += [{"role": "assistant", "content": "Once"}, {"role": "user", "content": "Go on."}]
    second = ask(client, messages, temperature=0)
    assert first.usage.prompt_tokens - 2 <= second.usage.prompt_tokens_details.cached_tokens
    assert ask(client, messages, temperature=0, seed=1).usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_tool_is_called(client, stream, parallel):
    settings = dict(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel, temperature=1)
    settings |= dict(logit_bias={str(IM_END): 3}, max_tokens=1000, seed=3)  # the call after which it ends
    answer = ask(client, stream=stream, **settings)
    if stream:
        ((known,), _) = gather(answer)
        calls, content, reason = known["calls"], known["content"], known["finish_reason"]
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls]
        content = message.content or ""
    assert reason == "tool_calls" and content == ""
    assert len(calls) > 1 if parallel else len(calls) == 1
    assert len({id for id, _, _ in calls}) == len(calls)
    assert all(name in ("first", "second") and json.loads(text)["x"] in (1, 2) for _, name, text in calls)


def test_the_named_tool_is_called_and_its_result_can_be_sent_back(client):
    choice = {"type": "function", "function": {"name": "second"}}
    question = {"role": "user", "content": "go"}
    answer = ask(
        client, [question], tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=60
    )
    message = answer.choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["second"] and message.content is None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"y": 2}'}
    again = ask(client, [question, message.model_dump(exclude_none=True), result], tools=TOOLS)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens + 20


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_apart(client, stream):
    thinking = {"chat_template_kwargs": {"open_thinking": True}}
    settings = dict(extra_body=thinking, seed=2, max_tokens=8)
    answer = ask(client, stream=stream, **settings)
    if stream:
        ((known,), _) = gather(answer)
        assert known["reasoning"] and known["content"] == ""
    else:
        message = answer.choices[0].message
        assert message.reasoning_content and message.content == ""
        assert answer.usage.completion_tokens_details.reasoning_tokens == 8
    settings["logit_bias"] = {str(THINK_END): 100}
    message = ask(client, **settings).choices[0].message
    assert (
        not getattr(message, "reasoning_content", None) and "</think>" in message.content
    )  # the first one ended it


def test_json_mode_and_schemas(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(3):
        answer = ask(client, response_format=form, temperature=1, seed=seed, max_tokens=60).choices[0]
        person = json.loads(answer.message.content)
        assert answer.finish_reason == "stop" and person["name"] in "ab" and 1 <= person["age"] <= 99
    answer = ask(
        client, response_format={"type": "json_object"}, logit_bias={"94": 50}, max_tokens=60, seed=1
    )
    assert answer.choices[0].message.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(client, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "no such"}}})


def test_plain_completions(client):
    answer = client.completions.create(
        model="text", prompt=["The sky", "天空"], n=2, max_tokens=5, echo=True, logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("The sky") and answer.choices[3].text.startswith("天空")
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None and all(x <= 0 for x in scores.token_logprobs[1:])
    assert len(scores.tokens) == len(scores.top_logprobs) == len(scores.text_offset) > 6
    only = client.completions.create(model="text", prompt="The sky", max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].text == "The sky" and only.usage.completion_tokens == 0
    assert (
        only.choices[0].logprobs.token_logprobs
        == scores.token_logprobs[: len(only.choices[0].logprobs.tokens)]
    )
    whole = client.completions.create(model="text", prompt="The sky", max_tokens=9, seed=4)
    pieces = client.completions.create(model="text", prompt="The sky", max_tokens=9, seed=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    ids = client.completions.create(model="text", prompt=[[5, 6, 7]], max_tokens=2)
    assert ids.usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="does not chat"):
        ask(client, model="text")


HI = {"messages": [{"role": "user", "content": "hi"}]}
OLD_CALL = {"role": "assistant", "content": "", "function_call": {"name": "f"}}


def raw(fields: str) -> bytes:
    return (json.dumps(HI)[:-1] + ", " + fields + "}").encode()


RAW = [
    # body, status, what the message says
    (b"{", 400, "JSON"),
    (b"", 400, ""),
    (b"[]", 400, ""),
    (b"\xff\xfe{}", 400, ""),
    (b'{"messages": ' + b"[" * 100_000, 400, ""),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
    (raw('"seed": ' + "9" * 5000), 400, ""),
    (raw('"temperature": NaN'), 400, "temperature"),
    ({**HI, "unheard_of": 1}, 400, "unheard_of: unknown field"),
    ({"messages": [{"role": "user"}]}, 400, "no content"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "takes 2048"),
    ({**HI, "n": 33}, 400, "33 answers"),
    ({**HI, "logit_bias": {"6400": 1}}, 400, "logit_bias"),
    ({**HI, "top_logprobs": 2}, 400, "logprobs"),
    ({"messages": [{"role": "user", "content": "hi"}] * 2000}, 400, "takes 2048"),
    ({**HI, "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
    ({**HI, "chat_template_kwargs": {"open_thinking": "false"}}, 400, "must be true or false"),
    (raw('"chat_template_kwargs": {"\\ud800": 1}'), 400, "unknown"),
    (raw('"tools": [{"function": {"name": "f", "description": "\\ud800"}}]'), 400, ""),
    ({"messages": [OLD_CALL]}, 400, "function_call"),
    ({**HI, "stop": [""]}, 400, "stop"),
    ({**HI, "stop": ["x" * 257]}, 400, "1 to 256 characters"),
    ({**HI, "stop_token_ids": [6400]}, 400, "0 to 6399"),
    ({**HI, "stop_token_ids": [1] * 129}, 400, "stop_token_ids"),
    ({**HI, "response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos"),
    ({**HI, "tool_choice": "any"}, 400, "tool_choice: Input should be 'none', 'auto' or 'required'; or: "),
    (b'{"messages": ]', 400, "the body is not JSON"),
    ({"model": "gpt-4", **HI}, 404, "there is chat, text"),
    ({"messages": [{"role": "user", "content": "x" * (5 << 20)}]}, 413, "4 MB"),
]


@pytest.mark.parametrize("body, status, says", RAW, ids=[str(i) for i in range(len(RAW))])
def test_bad_requests_get_an_error_of_openais_format(server, body, status, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", [0] * 200_000),
        ("messages", [{"role": "user", "content": [0] * 200_000}]),
        ("messages", [{"role": "assistant", "tool_calls": [0] * 200_000}]),
        ("stop", [0] * 200_000),
        ("stop_token_ids", ["x"] * 200_000),
        ("tools", [0] * 200_000),
        ("logit_bias", {str(i): "x" for i in range(20_000)}),
        ("unknown", {}),
        ("prompt", [1.5] * 200_000),
        ("prompt", [[1.5]] * 200_000),
    ],
)
def test_of_very_many_errors_the_first_is_told(field, value):
    """A list of a million errors took gigabytes, and the server with it."""
    kind = CompletionRequest if field == "prompt" else ChatRequest
    fields = (HI if kind is ChatRequest else {}) | {field: value}
    if field == "unknown":
        fields |= {f"field{i}": 1 for i in range(20_000)}
    try:
        kind(**fields).biases(6400)
    except ValidationError as error:
        assert error.error_count() <= 4
        text, where = serve_openai_api.complaint(error.errors())
        assert len(text) < 400 and where.startswith(field)
    except ProtocolError as error:
        assert field == "logit_bias" and len(error.message) < 100
    else:
        raise AssertionError("accepted")


def test_fields_of_others_ask_for_nothing_when_they_are_null(client):
    assert ask(client, extra_body={"functions": None, "audio": None, "modalities": ["text"]}).choices


TEXTS = [b'"\\ud800"', b"[-1]", b"[6400]", b"[" + b"9" * 30 + b"]", b"[]", b"[[]]", b'[["a"]]', b"[1.5]"]


@pytest.mark.parametrize("prompt", TEXTS, ids=[str(i) for i in range(len(TEXTS))])
def test_bad_prompts(server, prompt):
    headers = {"Content-Type": "application/json"}
    content = b'{"model": "text", "echo": true, "logprobs": 1, "prompt": ' + prompt + b"}"
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_settings_near_zero_give_numbers(client, name):
    """Divided by the smallest float, logits were infinite, and log-probs no numbers."""
    for value in (5e-324, 1e-40):
        settings = {"extra_body": {name: value}, "logprobs": True, "max_tokens": 3}
        entries = ask(client, **settings).choices[0].logprobs.content
        assert all(entry.logprob <= 0 for entry in entries)


def deep(levels):
    return {"type": "object", "properties": {"x": deep(levels - 1)}} if levels else {"type": "integer"}


SCHEMAS = [deep(150), {"const": "\ud800"}, {"$ref": "#/nowhere"}, {"type": 3}]


@pytest.mark.parametrize("schema", SCHEMAS, ids=["deep", "surrogate", "ref", "type"])
def test_schemas_that_cannot_be_followed(server, schema):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    form = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
    for more in (form, {"tools": [tool], "tool_choice": "required"}):
        headers, content = {"Content-Type": "application/json"}, json.dumps(body | more)
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=30)
        assert answer.status_code in (200, 400), answer.text


def test_tools_with_definitions_and_without_types(client):
    """As pydantic writes nested models; and parameters that do not say that they are an object."""
    nested = {"$defs": {"A": {"enum": [7]}}, "required": ["a"]} | {"properties": {"a": {"$ref": "#/$defs/A"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested}}]
    answer = ask(
        client, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=80, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["a"] == 7


@pytest.mark.parametrize("form", ["call", "schema"])
def test_an_answer_of_a_given_form_cannot_end_in_its_thoughts(client, form):
    settings = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    if form == "schema":
        schema = {"name": "x", "schema": {"enum": ["yes"]}}
        settings = {"response_format": {"type": "json_schema", "json_schema": schema}}
    ending = {str(IM_END): 100, str(THINK_END): -100}
    choice = ask(client, extra_body=THOUGHTS, logit_bias=ending, max_tokens=80, **settings).choices[0]
    assert choice.message.tool_calls if form == "call" else choice.message.content == '"yes"'


def test_a_schema_that_is_too_complex_is_refused_in_a_few_words(client):
    properties = {f"p{i}": {"type": "string"} for i in range(5000)}
    schema = {"type": "object", "properties": properties}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="follow its schema") as error:
        ask(client, response_format=form)
    assert "compute_time" not in error.value.message and len(error.value.message) < 500


def test_a_forced_call_and_a_schema_exclude_each_other(client):
    form = {"type": "json_object"}
    with pytest.raises(openai.BadRequestError, match="send one of the two"):
        ask(client, tools=TOOLS, tool_choice="required", response_format=form)
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}}}
    for seed in range(6):  # both offered: either comes, nothing else
        choice = ask(
            client, tools=TOOLS, response_format=schema, seed=seed, temperature=2, max_tokens=60
        ).choices[0]
        assert choice.message.tool_calls or choice.message.content == '"yes"'


def test_the_score_of_a_token_is_the_one_among_the_likeliest(client):
    for entry in ask(client, logprobs=True, top_logprobs=20, top_p=0.5).choices[0].logprobs.content:
        among = [top.logprob for top in entry.top_logprobs if top.bytes == entry.bytes]
        assert not among or entry.logprob in among


def test_a_large_body_in_pieces_is_refused_too(server):
    def pieces():
        yield b'{"messages": "'
        for _ in range(6):
            yield b"x" * (1 << 20)

    answer = httpx.post(f"{server.url}/v1/chat/completions", content=pieces(), timeout=30)
    assert answer.status_code == 413 and "4 MB" in answer.json()["error"]["message"]


def test_unknown_addresses_and_methods(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and path in answer.json()["error"]["message"]


def test_only_this_machines_names_are_answered(server):
    """DNS rebinding: a page of evil.example that resolves to 127.0.0.1."""
    for name, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("evil.example", 403)):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Host": name})
        assert answer.status_code == status
    assert "not as evil.example" in answer.json()["error"]["message"]


def test_many_at_once_get_what_they_would_get_alone(server, client):
    alone = [ask(client, f"Question {i}", seed=i).choices[0].message.content for i in range(24)]
    found = [None] * 24

    def work(i):
        answer = ask(client, f"Question {i}", seed=i, stream=i % 2 == 0)
        found[i] = gather(answer)[0][0]["content"] if i % 2 == 0 else answer.choices[0].message.content

    threads = [threading.Thread(target=work, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_his_place(server, stream):
    body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 2000, "n": 8}
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(timeout=0.4) as http:
            with http.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body | {"stream": stream}
            ) as answer:
                begin = time.monotonic()
                for _ in answer.iter_raw():
                    if time.monotonic() > begin + 0.2:
                        raise httpx.ReadTimeout("enough")
    wait_for(server.idle, 5)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    assert any(line.startswith('minimind_requests_total{ended="cancelled"') for line in lines)


def test_metrics(server, client):
    def value(name):
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    before = value("minimind_generated_tokens_total")
    ask(client, max_tokens=7, temperature=0)
    assert value("minimind_generated_tokens_total") == before + 7
    wait_for(lambda: value("minimind_rows_running") == 0)
    assert value("minimind_first_token_seconds_count") > 0


def test_keys_limits_and_origins():
    flags = ("--api_key", "secret", "--max_rows", "1", "--max_waiting", "1", "--timeout", "1.5")
    with LiveServer(*flags, "--cors_origin", "http://ui.local") as server:
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="guess", max_retries=0)
        for call in (wrong.models.list, lambda: ask(wrong)):
            with pytest.raises(openai.AuthenticationError):
                call()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert client.models.list().data
        lower = {"Authorization": "bearer secret"}
        assert httpx.get(f"{server.url}/v1/models", headers=lower).status_code == 200
        broken = dict(content=b"{", headers={"Origin": "http://ui.local"})
        answer = httpx.post(f"{server.url}/v1/chat/completions", **broken)
        assert answer.status_code == 401 and "access-control-allow-origin" in answer.headers
        endless = dict(extra_body={"ignore_eos": True}, max_tokens=2000)
        found = []

        def wait():
            with pytest.raises(openai.APIStatusError) as error:
                ask(client, **endless)
            found.append(error.value.status_code)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        threads[0].start()
        wait_for(lambda: server.worker.batches["chat"].rows)
        threads[1].start()
        wait_for(lambda: server.worker.num_waiting == 1)
        with pytest.raises(openai.RateLimitError, match="wait already"):
            ask(client)
        for thread in threads:
            thread.join()
        assert found == [504, 504]
        wait_for(server.idle)
        with pytest.raises(openai.APIError, match="1.5 seconds"):
            for _ in ask(client, stream=True, **endless):
                pass
        preflight = {"Origin": "http://ui.local", "Access-Control-Request-Method": "POST"}
        for origin, allowed in (("http://ui.local", True), ("http://evil.example", False)):
            headers = preflight | {"Origin": origin}
            answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
            assert ("access-control-allow-origin" in answer.headers) == allowed


def test_places_of_tokens_in_the_text(client):
    """Chinese and emoji are several tokens to a character, and begin with the first of them."""
    text, served = "你好😀 hello 龘", client.completions
    for prompt in (text, [1, *AutoTokenizer.from_pretrained(serve_openai_api.ROOT / "model").encode(text)]):
        choice = served.create(model="text", prompt=prompt, echo=True, logprobs=1, max_tokens=5).choices[0]
        found = choice.logprobs
        for token, begin in zip(found.tokens, found.text_offset, strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert choice.text[begin : begin + len(token)] == token
        assert any(token.startswith("bytes:\\x") for token in found.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_behind_a_stop_string_are_not_told(client, stream):
    settings = dict(model="text", prompt="The", seed=2, max_tokens=40, logprobs=0)
    whole = client.completions.create(**settings).choices[0]
    stop = next(c for c in whole.text[8:] if c.isalnum())
    answer = client.completions.create(**settings, stop=[stop], stream=stream)
    choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    offsets = [offset for c in choices for offset in (c.logprobs.text_offset if c.logprobs else ())]
    text = "".join(choice.text for choice in choices)
    assert stop not in text and text == whole.text[: len(text)] and offsets
    assert offsets == [offset for offset in whole.logprobs.text_offset if offset < len(text)]


def test_no_line_ends_in_the_middle_of_an_event(server):
    body = {"model": "text", "prompt": "a\u2028b\x85c", "echo": True, "stream": True, "max_tokens": 1}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines).startswith("a\u2028b\x85c")


def test_small_answers_are_sent_at_once():
    """A socket that does not say that it is one of TCP has no TCP_NODELAY: 40 ms for every answer."""
    with serve_openai_api.listen("127.0.0.1", 0) as made:
        made.listen()
        with socket.create_connection(made.getsockname()), made.accept()[0] as accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_nothing_need_wait_where_rows_are_free():
    with LiveServer("--max_waiting", "0", "--max_rows", "2") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert len(ask(client, n=2).choices) == 2
        prompts = dict(model="text", max_tokens=2)
        assert len(client.completions.create(prompt=["a", "b"], **prompts).choices) == 2
        with pytest.raises(openai.BadRequestError, match="more than 2 answers"):
            client.completions.create(prompt=["a", "b", "c"], **prompts)
        assert server.worker.open == {"chat": 0, "text": 0}


def test_what_still_runs_after_the_time_to_end_is_told_so():
    with LiveServer() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        endless = dict(extra_body={"ignore_eos": True}, max_tokens=2000)
        chunks = iter(ask(client, stream=True, **endless))
        next(chunks)
        found = []

        def wait():
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                ask(client, **endless)
            found.append(error.value.status_code)

        whole = threading.Thread(target=wait)
        whole.start()
        wait_for(lambda: len(server.worker.batches["chat"].rows) == 2)
        server.server.seconds = 0.2
        server.server.handle_exit(None, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        whole.join()
        assert found == [503]


def test_conversations_of_many_shapes_are_encoded_in_many_threads():
    native, interval, wrong = small_native(), sys.getswitchinterval(), []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(400):
                roles = rng.choices(["user", "assistant"], k=9) + ["user"]
                native.encode([{"role": r, "content": rng.choice(["a", ""])} for r in roles], False, None)
        except RuntimeError as error:
            wrong.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_two_models_of_one_name(tmp_path):
    native = small_native()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        checkpoint.save_weights(native.engine.model, tmp_path / folder / "full_sft_32.pth", {})
    weights = ",".join(str(tmp_path / folder / "full_sft_32.pth") for folder in ("a", "b"))
    with pytest.raises(CheckpointError, match="two models full_sft_32"):
        serve_openai_api.load_models(serve_openai_api.parse_args(["--weight", weights]))


def test_thinking_where_a_request_does_not_say():
    with LiveServer("--open_thinking", "1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert ask(client, max_tokens=4).choices[0].message.reasoning_content
        direct = {"chat_template_kwargs": {"enable_thinking": False}}
        assert ask(client, max_tokens=4, extra_body=direct).choices[0].message.content


def test_whoever_asks_less_comes_first():
    """One client with many requests, another with one: they take turns."""
    with LiveServer("--max_rows", "1", "--api_key", "a", "--api_key", "b") as server:
        ended, clients = [], {k: openai.OpenAI(base_url=f"{server.url}/v1", api_key=k) for k in "ab"}

        def work(key):
            ask(clients[key], max_tokens=60, extra_body={"ignore_eos": True})
            ended.append(key)

        threads = [threading.Thread(target=work, args=("a",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.worker.num_waiting >= 4)
        threads.append(threading.Thread(target=work, args=("b",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
        assert ended.index("b") <= 4 and len(ended) == 7


def test_the_end_lets_running_answers_finish_and_refuses_those_that_wait():
    with LiveServer("--max_rows", "1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = ask(client, stream=True, max_tokens=300, extra_body={"ignore_eos": True})
        next(iter(chunks))
        wait_for(lambda: server.worker.batches["chat"].rows)
        found = []

        def wait():
            with pytest.raises(openai.InternalServerError) as error:
                ask(client)
            found.append(error.value.status_code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_for(lambda: server.worker.num_waiting == 1)
        server.server.handle_exit(None, None)
        ((known,), _) = gather(chunks)
        waiting.join()
        assert known["finish_reason"] == "length" and found == [503]


def test_an_error_in_a_step_ends_its_requests_and_not_the_server(monkeypatch):
    with LiveServer() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        batch = server.worker.batches["chat"]
        with monkeypatch.context() as patch:
            patch.setattr(batch, "choose", lambda: 1 / 0)
            with pytest.raises(openai.InternalServerError):
                ask(client)
            with pytest.raises(openai.APIError):
                list(ask(client, stream=True))
            patch.setattr(server.worker, "feed", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError):
                ask(client)
        assert ask(client).choices


def test_a_signal_ends_the_process_with_0(tmp_path):
    import signal
    import subprocess

    native = small_native()
    metadata = {"stage": "full_sft", "tokenizer_hash": checkpoint.tokenizer_hash(native.tokenizer)}
    checkpoint.save_weights(native.engine.model, tmp_path / "full_sft_32.pth", metadata)
    script = serve_openai_api.ROOT / "scripts" / "serve_openai_api.py"
    command = [sys.executable, str(script), "--save_dir", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    line = next(line for line in process.stderr if line.startswith("serving"))
    url = line.split(" at ")[1].strip()
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chunks = ask(client, model="full_sft", stream=True, max_tokens=300, extra_body={"ignore_eos": True})
    next(iter(chunks))
    process.send_signal(signal.SIGTERM)
    ((known,), _) = gather(chunks)
    assert known["finish_reason"] == "length" and process.wait(20) == 0


def test_a_port_that_is_taken_is_said_before_the_weights_are_loaded(server, capsys):
    port = server.url.rsplit(":", 1)[1]
    for wrong in (port, "99999999"):
        with pytest.raises(SystemExit) as error:
            cli.run(serve_openai_api.main, serve_openai_api.parse_args, ["--port", wrong])
        assert error.value.code == 2 and f"port {wrong}" in capsys.readouterr().err


def test_transformers_folders(tmp_path):
    """Those of this project's architecture are served; others are named."""
    native = small_native()
    folder = tmp_path / "mine"
    hf = MiniMindForCausalLM(native.engine.config)
    hf.load_state_dict(native.engine.model.state_dict())
    hf.save_pretrained(folder)
    native.tokenizer.save_pretrained(folder)
    args = serve_openai_api.parse_args(["--load_from", str(folder), "--dtype", "float32"])
    ((name, served),) = serve_openai_api.load_models(args).items()
    assert name == "mine"
    request = Request([5, 6, 7], Sampling(max_new_tokens=8, temperature=0, ignore_eos=True))
    served.batch.add(request)
    ids = []
    while served.batch.busy:
        ids += [new.token for new in served.batch.step()]
    (expected,) = native.engine.generate([[5, 6, 7]], max_new_tokens=8, temperature=0, ignore_eos=True)
    assert ids == expected.ids

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="is a llama"):
        serve_openai_api.load_models(args)
