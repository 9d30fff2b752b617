"""The chat template: golden texts, what it guarantees for any conversation, and which tokens are answers."""

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

MODEL = Path(__file__).resolve().parents[1] / "model"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)

USER = {"role": "user", "content": "你好"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "天气 & <sky>", "parameters": {"type": "object"}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
EMPTY_THINK = "<think>\n\n</think>\n\n"


def render(messages, **kwargs):
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **kwargs)


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


# Golden texts ---------------------------------------------------------------------------------------


def test_user_and_answer_without_system():
    """No system message is invented."""
    assert render([USER, assistant("Hi!")]) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHi!<|im_end|>\n"
    )


def test_system_message():
    text = render([{"role": "system", "content": "Be brief."}, USER])
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"


def test_later_system_message_stays_where_it_is():
    text = render([USER, {"role": "system", "content": "Now rhyme."}], tools=[CLOCK])
    assert text.endswith("你好<|im_end|>\n<|im_start|>system\nNow rhyme.<|im_end|>\n")


def test_no_tools_is_no_tools_block():
    assert render([USER], tools=[]) == render([USER], tools=None) == render([USER])


def test_one_tool_after_the_system_text():
    text = render([{"role": "system", "content": "Be brief."}, USER], tools=[CLOCK])
    assert text == (
        "<|im_start|>system\nBe brief.\n\n"
        + TOOLS_HEAD
        + '{"type": "function", "function": {"name": "clock", "parameters": {}}}'
        + TOOLS_TAIL
        + "<|im_start|>user\n你好<|im_end|>\n"
    )


def test_two_tools_without_system_text():
    """One JSON object per line, letters of all scripts and <>& as they are."""
    text = render([USER], tools=[WEATHER, CLOCK])
    assert text == (
        "<|im_start|>system\n"
        + TOOLS_HEAD
        + '{"type": "function", "function": {"name": "weather", "description": "天气 & <sky>", '
        + '"parameters": {"type": "object"}}}\n'
        + '{"type": "function", "function": {"name": "clock", "parameters": {}}}'
        + TOOLS_TAIL
        + "<|im_start|>user\n你好<|im_end|>\n"
    )


def test_an_empty_system_message_with_tools_is_no_system_message():
    assert render([{"role": "system", "content": ""}, USER], tools=[CLOCK]) == render([USER], tools=[CLOCK])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("as_text", [True, False])
def test_one_tool_call(nested, as_text):
    arguments = {"city": "北京", "days": 2}
    call = {
        "name": "weather",
        "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments,
    }
    call = {"id": "call_1", "type": "function", "function": call} if nested else call
    text = render([USER, assistant(None, tool_calls=[call])])
    assert text.endswith(
        "<|im_start|>assistant\n" + EMPTY_THINK + "<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call><|im_end|>\n'
    )


def test_two_tool_calls_behind_text_and_a_call_without_arguments():
    calls = [{"name": "clock"}, {"name": "weather", "arguments": '{"city": "Rome"}'}]
    text = render([USER, assistant("I look.", tool_calls=calls)])
    assert text.endswith(
        EMPTY_THINK
        + 'I look.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n'
        + '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
    )


def test_results_of_two_tools_share_one_user_turn():
    results = [{"role": "tool", "content": "12:30"}, {"role": "tool", "content": "sunny"}]
    text = render(
        [USER, assistant("", tool_calls=[{"name": "clock"}]), *results, assistant("Sunny at 12:30.")]
    )
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n12:30\n</tool_response>\n<tool_response>\nsunny\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n" + EMPTY_THINK + "Sunny at 12:30.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "message",
    [
        assistant("4", reasoning_content="2+2"),
        assistant("\n4", reasoning_content="\n2+2\n"),
        assistant("<think>\n2+2\n</think>\n\n4"),
        assistant("2+2\n</think>\n\n4"),  # what a model writes behind an open <think>
        assistant("<think>2+2</think>4", reasoning_content=""),
        assistant("<think>2+2</think>4", reasoning_content=None),
    ],
    ids=["field", "field with newlines", "inline", "inline, tag in the prompt", "empty field", "null field"],
)
def test_reasoning_is_rendered_alike_however_it_is_given(message):
    text = "<|im_start|>assistant\n<think>\n2+2\n</think>\n\n4<|im_end|>\n"
    assert render([USER, message]).endswith("你好<|im_end|>\n" + text)
    again = [USER, message, USER, message]  # history keeps its reasoning: turns are never rewritten
    assert render(again).count(text) == 2


def test_empty_think_block_is_no_reasoning():
    assert render([USER, assistant("<think>\n\n</think>\n\n4")]) == render([USER, assistant("4")])


def test_an_answer_may_speak_about_the_closing_tag():
    text = render([USER, assistant("Write </think> last.", reasoning_content="r")])
    assert text.endswith("<think>\nr\n</think>\n\nWrite </think> last.<|im_end|>\n")
    text = render([USER, assistant("<think>r</think>Write </think> last.")])
    assert text.endswith("<think>\nr\n</think>\n\nWrite </think> last.<|im_end|>\n")


def test_leading_blanks_of_an_answer_stay():
    """Indented code must not lose its first indentation."""
    assert render([USER, assistant("    x = 1")]).endswith("</think>\n\n    x = 1<|im_end|>\n")


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        ({}, EMPTY_THINK),
        ({"open_thinking": False}, EMPTY_THINK),
        ({"enable_thinking": False}, EMPTY_THINK),
        ({"open_thinking": True}, "<think>\n"),
        ({"enable_thinking": True}, "<think>\n"),
        ({"open_thinking": True, "enable_thinking": False}, "<think>\n"),
    ],
)
def test_generation_prompt(flags, end):
    assert render([USER], add_generation_prompt=True, **flags) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n" + end
    )


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_as_list_of_parts_equals_content_as_text(role):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    for tools in (None, [CLOCK]):
        as_list = render([{"role": role, "content": parts}, USER], tools=tools)
        assert as_list == render([{"role": role, "content": "one two"}, USER], tools=tools)
        assert "one two" in as_list


@pytest.mark.parametrize(
    ("messages", "tools", "word"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], None, "text only"),
        ([{"role": "user", "content": {"text": "x"}}], None, "list of text parts"),
        ([{"role": "robot", "content": "x"}], None, "robot"),
        ([USER, assistant("", tool_calls='[{"name": "clock"}]')], None, "parse it first"),
        ([USER], '[{"name": "clock"}]', "parse it first"),
    ],
)
def test_what_would_be_dropped_silently_is_refused(messages, tools, word):
    with pytest.raises(jinja2.TemplateError, match=word):
        bare_template().render(messages=messages, tools=tools)


def bare_template():
    """The template in a plain sandbox without generation markers: as other engines hold it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain = TOKENIZER.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return environment.from_string(plain)


# For any conversation -------------------------------------------------------------------------------

words = st.text(alphabet="ab 你好\n1{}<>|\"'🙂é", max_size=12)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["clock", "weather"]),
            "arguments": st.dictionaries(words, words, max_size=2),
        }
    ),
    max_size=2,
)
users = st.fixed_dictionaries({"role": st.just("user"), "content": words})
tool_results = st.fixed_dictionaries({"role": st.just("tool"), "content": words})
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={"reasoning_content": words, "tool_calls": calls},
)
systems = st.fixed_dictionaries({"role": st.just("system"), "content": words})
conversations = st.tuples(
    st.lists(systems, max_size=1), st.lists(st.one_of(users, answers, tool_results), min_size=1, max_size=7)
).map(lambda parts: parts[0] + parts[1])


@settings(max_examples=150, deadline=None)
@given(conversations, st.sampled_from([None, [CLOCK], [WEATHER, CLOCK]]))
def test_more_turns_never_change_earlier_text(messages, tools):
    """So that a conversation can be continued from its key/value cache, and trained as one sequence. (In a
    run of tool results the turn is still open: there only its closing tag moves.)"""
    whole = render(messages, tools=tools)
    for k in range(1, len(messages) + 1):
        start = render(messages[:k], tools=tools)
        if k < len(messages) and messages[k - 1]["role"] == messages[k]["role"] == "tool":
            start = start.removesuffix("<|im_end|>\n")
        assert whole.startswith(start)


@settings(max_examples=100, deadline=None)
@given(conversations, answers)
def test_generation_prompt_is_what_the_answer_begins_with(messages, answer):
    """What the model was asked to continue is what it was trained to continue."""
    thinks = bool(answer.get("reasoning_content", "").strip("\n"))
    prompt = render(messages, add_generation_prompt=True, open_thinking=thinks)
    assert render([*messages, answer]).startswith(prompt)


@settings(max_examples=100, deadline=None)
@given(conversations)
def test_other_engines_render_the_same_text(messages):
    assert bare_template().render(messages=messages, add_generation_prompt=True) == render(
        messages, add_generation_prompt=True
    )


# Which tokens are answers ---------------------------------------------------------------------------


def answer_text(messages, **kwargs):
    out = TOKENIZER.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    assert len(ids) == len(mask) and TOKENIZER.decode(ids) == render(messages, **kwargs)
    return TOKENIZER.decode([token for token, is_answer in zip(ids, mask) if is_answer])


def test_assistant_mask_covers_exactly_what_the_model_writes():
    messages = [
        {"role": "system", "content": "Answer."},
        USER,
        assistant("  x = 1", reasoning_content="2+2 是 4"),
        USER,
        assistant("", tool_calls=[{"function": {"name": "clock", "arguments": {}}}]),
        {"role": "tool", "content": "12:30"},
        assistant("It is 12:30."),
    ]
    assert answer_text(messages, tools=[CLOCK]) == (
        "2+2 是 4\n</think>\n\n  x = 1<|im_end|>"
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
        "It is 12:30.<|im_end|>"
    )


def test_words_of_others_are_no_answers():
    assert answer_text([USER, {"role": "tool", "content": "x"}]) == ""
    assert answer_text([{"role": "system", "content": "s"}, USER, assistant("yes")]) == "yes<|im_end|>"


words_of_answers = st.text(alphabet="ab 你好1,。🙂", max_size=12)


@settings(max_examples=60, deadline=None)
@given(words_of_answers, words_of_answers)
def test_assistant_mask_decodes_to_the_answer(content, reasoning):
    text = answer_text([USER, assistant(content, reasoning_content=reasoning), USER])
    assert text == (f"{reasoning}\n</think>\n\n" if reasoning else "") + content + "<|im_end|>"
