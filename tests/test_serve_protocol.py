"""The server's protocol without a server: how text is taken apart, and what a request may hold."""

import json
import random

import pytest
from pydantic import ValidationError

from scripts.serve_protocol import AnswerParser, ChatRequest, CompletionRequest, ProtocolError, sse

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "<b> 你好"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
F, G = ("call", {"name": "f", "arguments": {"x": "<b> 你好"}}), ("call", {"name": "g", "arguments": {}})
TABLE = [
    # text, thinking, tools -> what comes out
    ("hello", 0, 0, [("content", "hello")]),
    ("  hello  ", 0, 0, [("content", "hello  ")]),
    ("a < b </think> c", 0, 0, [("content", "a < b </think> c")]),
    ("let me see\n</think>\n\n42", 1, 0, [("reasoning", "let me see"), ("content", "42")]),
    ("\n</think>\n\n42", 1, 0, [("content", "42")]),
    ("never ends", 1, 0, [("reasoning", "never ends")]),
    ("ends in </thin", 1, 0, [("reasoning", "ends in </thin")]),
    ("a</think>b</think>c", 1, 0, [("reasoning", "a"), ("content", "b</think>c")]),
    (CALL, 0, 0, [("content", CALL)]),
    (CALL, 0, 1, [F]),
    (f"I will call.\n{CALL}", 0, 1, [("content", "I will call."), F]),
    (f"{CALL}\n{SECOND}", 0, 1, [F, G]),
    (f"{CALL}{SECOND} done", 0, 1, [F, G, ("content", "done")]),
    (f"why\n</think>\n\n{CALL}", 1, 1, [("reasoning", "why"), F]),
    (f"<tool_call> is thought of</think>{SECOND}", 1, 1, [("reasoning", "<tool_call> is thought of"), G]),
    ("<tool_call>no json</tool_call> ok", 0, 1, [("content", "<tool_call>no json</tool_call> ok")]),
    ('<tool_call>{"name": "f"', 0, 1, [("content", '<tool_call>{"name": "f"')]),
    ("x <tool_cal", 0, 1, [("content", "x <tool_cal")]),
    ("", 0, 1, []),
]


def parse(pieces, thinking, tools, single=False):
    parser, found = AnswerParser(bool(thinking), bool(tools), single), []
    for i, piece in enumerate(pieces):
        for kind, value in parser.put(piece, last=i == len(pieces) - 1):
            if found and kind != "call" and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + value)
            else:
                found.append((kind, value))
    return found


@pytest.mark.parametrize("text, thinking, tools, expected", TABLE)
def test_an_answer_is_taken_apart_however_it_comes_in_pieces(text, thinking, tools, expected):
    assert parse([text], thinking, tools) == expected
    assert parse([*text, ""], thinking, tools) == expected
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert parse(pieces, thinking, tools) == expected


def test_text_is_not_held_back_without_need():
    parser = AnswerParser(thinking=False, tools=True)
    assert parser.put("a < b") == [("content", "a < b")]
    assert parser.put(" <tool") == []
    assert parser.put("box>") == [("content", " <toolbox>")]


def test_one_call_only():
    assert parse([f"{CALL}\n{SECOND} and more"], 0, 1, single=True) == [F]
    assert parse([*f"{CALL}\n{SECOND}"], 0, 1, single=True) == [F]


def chat(**fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]} | fields)


REFUSED = [
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"role": "robot", "content": "hi"}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"temperature": "0.7"},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_p": 0},
    {"top_p": 1.1},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_completion_tokens": 1.5},
    {"n": 0},
    {"n": True},
    {"seed": "x"},
    {"stop": [1]},
    {"stream": "yes"},
    {"top_logprobs": 21},
    {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
    {"tool_choice": "maybe"},
    {"response_format": {"type": "xml"}},
    {"functions": []},
    {"a_new_field": 1},
]


@pytest.mark.parametrize("fields", REFUSED, ids=json.dumps)
def test_what_is_no_request(fields):
    with pytest.raises(ValidationError):
        chat(**fields)


def test_null_is_the_default_everywhere():
    fields = {name: None for name in ChatRequest.model_fields if name != "messages"}
    request = chat(**fields)
    assert request.sampling(5) == chat().sampling(5)
    assert not request.thinking() and request.offered() is None and request.forced() is None
    assert not request.include_usage and request.biases(10) == {}


def test_settings_reach_the_sampler():
    settings = dict(temperature=0.3, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.3, n=2, seed=5)
    sampling = chat(**settings, stop=["a", "b"], stop_token_ids=[9], ignore_eos=True).sampling(33)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.5, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.num_return_sequences, sampling.seed) == (1.3, 2, 5)
    assert sampling.stop == ("a", "b") and sampling.stop_token_ids == (9,) and sampling.ignore_eos
    assert sampling.max_new_tokens == 33
    assert chat(stop="x").sampling(1).stop == ("x",)
    assert chat(top_k=-1).sampling(1).top_k == 0  # vLLM's word for all
    assert 0 <= chat(seed=-(10**30)).sampling(1).seed < 1 << 62
    assert chat(max_completion_tokens=4, max_tokens=9).limit() == 4


def test_thinking_by_every_name():
    assert chat(open_thinking=True).thinking()
    assert chat(chat_template_kwargs={"open_thinking": True}).thinking()
    assert chat(chat_template_kwargs={"enable_thinking": True}).thinking()
    assert chat(reasoning_effort="low").thinking()
    for no in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert not chat(**no).thinking() and not chat(**no).thinking(default=True)
    assert chat().thinking(default=True) and chat(chat_template_kwargs={}).thinking(default=True)
    assert not chat().thinking()
    for wrong in ("false", 1, 0, []):
        with pytest.raises(ProtocolError, match="must be true or false"):
            chat(chat_template_kwargs={"enable_thinking": wrong}).thinking()
    with pytest.raises(ProtocolError, match="chat_template_kwargs.x is unknown"):
        chat(chat_template_kwargs={"x": 1}).thinking()


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]


def test_which_tools_are_offered_and_forced():
    assert chat(tools=TOOLS).offered() == TOOLS
    assert chat(tools=TOOLS, tool_choice="none").offered() is None
    assert chat(tools=TOOLS).forced() is chat(tools=TOOLS, tool_choice="auto").forced() is None
    assert chat(tools=TOOLS, tool_choice="required").forced() == ["f", "g"]
    one = {"type": "function", "function": {"name": "g"}}
    assert chat(tools=TOOLS, tool_choice=one).forced() == ["g"]
    for wrong in (
        {"tool_choice": "required"},
        {"tool_choice": one},
        {"tools": TOOLS[:1], "tool_choice": one},
    ):
        with pytest.raises(ProtocolError, match="tool_choice"):
            chat(**wrong).forced()


def test_messages_as_the_template_wants_them():
    message = {"role": "developer", "content": [{"type": "text", "text": "a"}, "b"], "name": "x"}
    plain = chat(messages=[message]).messages[0].plain()
    assert plain["role"] == "system" and plain["content"] == [{"type": "text", "text": "a"}, "b"]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    plain = chat(messages=[message]).messages[0].plain()
    assert plain["tool_calls"] == [{"name": "f", "arguments": '{"x": 1}'}]
    assert plain["reasoning_content"] == "hm"


def test_bias_and_stop_are_checked():
    assert chat(logit_bias={"5": -100}).biases(10) == {5: -100}
    for wrong in ({"10": 1}, {"-1": 1}, {"x": 1}, {"5": 101}):
        with pytest.raises(ProtocolError):
            chat(logit_bias=wrong).biases(10)
    for wrong in ("", [""], ["a"] * 17):
        with pytest.raises(ProtocolError):
            chat(stop=wrong).sampling(1)


def test_prompts_of_plain_completions():
    def prompts(prompt):
        return CompletionRequest(prompt=prompt).prompts()

    assert prompts("a") == ["a"] and prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]] and prompts([[1], [2]]) == [[1], [2]]
    with pytest.raises(ProtocolError):
        prompts([])


def test_events_are_one_line():
    event = sse({"text": "a\nb\u2028 你"})
    assert (
        event.endswith(b"\n\n")
        and event.count(b"\n") == 2
        and json.loads(event[6:])["text"] == "a\nb\u2028 你"
    )
