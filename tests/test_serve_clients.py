"""Other clients than openai's own for Python. Each test runs where its client is installed:

pip install litellm langchain-openai schemathesis        and        npm install openai
python -m pytest -m slow tests/test_serve_clients.py     (in the folder of node_modules, or with NODE_PATH)
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serve_helpers import LiveServer, wait_for

pytestmark = pytest.mark.slow
TOOL = {
    "type": "function",
    "function": {
        "name": "first",
        "description": "the first",
        "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
    },
}
MESSAGES = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def server():
    with LiveServer() as server:
        yield server


def node_modules() -> Path | None:
    places = [Path.cwd(), *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))]
    found = [p for p in places if (p / "node_modules" / "openai").exists()]
    return found[0] if found else None


@pytest.mark.skipif(not shutil.which("node") or node_modules() is None, reason="needs node and npm's openai")
def test_openai_for_node(server):
    script = Path(__file__).parent / "node_client.mjs"
    command = ["node", str(script), f"{server.url}/v1"]
    done = subprocess.run(
        command, cwd=node_modules(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr
    wait_for(server.idle)


def test_litellm(server):
    litellm = pytest.importorskip("litellm")
    place = dict(
        model="openai/chat", api_base=f"{server.url}/v1", api_key="none", messages=MESSAGES, num_retries=0
    )
    settings = place | dict(max_tokens=20, seed=5, temperature=1)
    whole = litellm.completion(**settings)
    pieces = list(litellm.completion(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens <= 20
    forced = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=60)
    answer = litellm.completion(**settings | forced)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "first" and answer.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    again = MESSAGES + [answer.choices[0].message.model_dump(), result]
    assert litellm.completion(**settings | dict(tools=[TOOL], messages=again)).choices
    thinking = {"chat_template_kwargs": {"open_thinking": True}}
    assert litellm.completion(**settings, extra_body=thinking).choices[0].message.reasoning_content
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}
    assert litellm.completion(**settings, response_format=form).choices[0].message.content in (
        '"yes"',
        '"no"',
    )
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**settings | {"model": "openai/gpt-4"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**settings | {"top_p": 3})


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    place = dict(model="chat", base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    chat = langchain.ChatOpenAI(**place, max_tokens=20, temperature=1, seed=5)
    question = [HumanMessage("How are you?")]
    whole = chat.invoke(question)
    assert whole.usage_metadata["output_tokens"] <= 20
    assert "".join(piece.content for piece in chat.stream(question)) == whole.content
    assert [answer.content for answer in chat.batch([question] * 4)] == [whole.content] * 4
    forced = chat.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).bind(max_tokens=60)
    answer = forced.invoke(question)
    (call,) = answer.tool_calls
    assert call["name"] == "first" and call["args"]["x"] in (1, 2)
    again = [*question, answer, ToolMessage("3", tool_call_id=call["id"])]
    assert chat.bind_tools([TOOL]).invoke(again).response_metadata["finish_reason"]
    schema = {"title": "a", "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    structured = langchain.ChatOpenAI(**place, max_tokens=60, seed=5).with_structured_output(
        schema | {"additionalProperties": False}, method="json_schema"
    )
    assert structured.invoke(question)["x"] in (1, 2)
    with_scores = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
    assert with_scores.response_metadata["logprobs"]["content"]


@pytest.mark.skipif(not shutil.which("schemathesis"), reason="needs schemathesis")
def test_schemathesis_finds_no_5xx(server, tmp_path):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = ["schemathesis", "run", f"{server.url}/openapi.json", "--checks", checks]
    command += ["--max-examples", "60", "--request-timeout", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    wait_for(server.idle, 60)
