"""Conversations with tools, as the terminal client, the web demo and the tool-use exam have them."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from serve_helpers import LiveServer, small_native

from scripts import chat_api, eval_toolcall
from scripts.conversation import Background, connect, converse, local, recent, remote
from trainer import cli
from trainer.checkpoint import CheckpointError
from trainer.tools import TOOLS

CALCULATOR = [TOOLS["calculate_math"]]


def call(arguments, name="calculate_math", number=1):
    return ("call", {"id": f"c{number}", "name": name, "arguments": arguments})


def script(*answers):
    """A model that says these answers one after another, and remembers what it was asked."""
    left, asked = list(answers), []

    def speak(messages, tools):
        asked.append([dict(message) for message in messages])
        yield from left.pop(0)

    speak.asked = asked
    return speak


def test_calls_are_run_and_their_results_go_back():
    speak = script(
        [
            ("reasoning", "hm"),
            call('{"expression": "6*7"}'),
            call('{"expression": "1+1"}', number=2),
            ("end", "tool_calls"),
        ],
        [("content", "42 "), ("content", "and 2"), ("usage", 5), ("end", "stop")],
    )
    messages = [{"role": "user", "content": "6*7?"}]
    pieces = list(converse(speak, messages, CALCULATOR))
    assert [
        kind for kind, _ in pieces
    ] == "reasoning call call result result content content usage end".split()
    assert [value["content"] for kind, value in pieces if kind == "result"] == [
        '{"result": 42}',
        '{"result": 2}',
    ]
    question, calls, first, second, answer = messages
    assert calls["reasoning_content"] == "hm" and [c["id"] for c in calls["tool_calls"]] == ["c1", "c2"]
    assert (first["role"], first["tool_call_id"], first["content"]) == ("tool", "c1", '{"result": 42}')
    assert answer == {"role": "assistant", "content": "42 and 2"}
    assert speak.asked[1] == messages[:4] and pieces[-1] == ("end", "stop")


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"expression": "9**9**9"}',
        '{"expression": "__import__(1)"}',
        "[" * 9999,
        '{"a": ' + "1" * 9999 + "}",
    ],
    ids=[str(i) for i in range(8)],
)
def test_whatever_a_call_holds_becomes_an_observation(arguments):
    messages = [{"role": "user", "content": "?"}]
    pieces = list(converse(script([call(arguments)], [("end", "stop")]), messages, CALCULATOR))
    (result,) = [value for kind, value in pieces if kind == "result"]
    assert not result["ok"] and "error" in json.loads(result["content"])


def test_tools_that_were_not_offered_are_not_run():
    pieces = list(converse(script([call("{}", name="random_number")], []), [], CALCULATOR))
    (result,) = [value for kind, value in pieces if kind == "result"]
    assert not result["ok"] and "there is no tool random_number" in result["content"]


def test_a_model_that_only_calls_is_stopped():
    speak = script(*[[call('{"expression": "1+1"}')]] * 5)
    pieces = list(converse(speak, [], CALCULATOR, rounds=3))
    assert pieces[-1] == ("end", "rounds") and len(speak.asked) == 3


@pytest.mark.parametrize("after, said", [(0, []), (1, ["half"]), (2, ["half an"])])
def test_who_stops_in_the_middle_keeps_what_was_said(after, said):
    speak = script([("content", "half"), ("content", " an"), call("{}"), ("end", "tool_calls")])
    messages = [{"role": "user", "content": "?"}]
    pieces = converse(speak, messages, CALCULATOR)
    for _ in range(after):
        next(pieces)
    pieces.close()
    assert [m["content"] for m in messages[1:]] == said and not any("tool_calls" in m for m in messages)


def test_who_stops_does_not_wait_for_a_model_that_says_nothing():
    goes_on = threading.Event()

    def speak(messages, tools):
        yield "content", "half"
        goes_on.wait(20)
        yield "content", " an"

    messages = [{"role": "user", "content": "?"}]
    talk = Background(converse(speak, messages))
    pieces = iter(talk)
    assert next(pieces) == ("content", "half")
    assert next(pieces) is None  # nothing comes, and who waits may look up
    talk.close(seconds=0.1)
    assert talk.thread.is_alive() and messages[1] == {"role": "assistant", "content": "half"}
    goes_on.set()
    talk.thread.join(20)
    assert not talk.thread.is_alive()


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_shown():
    def speak(messages, tools):
        yield "content", "half"
        raise ValueError("no more")

    found = []
    with pytest.raises(ValueError, match="no more"):
        for piece in Background(converse(speak, [])):
            found += [piece] if piece else []
    assert found == [("content", "half")]


def test_history_begins_with_a_question():
    roles = "user assistant tool assistant user assistant".split()
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert recent(messages, 0) == [] and recent(messages, 99) == messages
    assert [m["content"] for m in recent(messages, 4)] == ["4", "5"]
    assert recent(messages[:4], 3) == []


def test_a_model_here_and_on_a_server_say_the_same():
    settings = {"temperature": 0.0, "max_new_tokens": 12}
    messages = [{"role": "user", "content": "How are you?"}]
    here = list(local(small_native(), settings)(messages, None))
    with LiveServer() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        settings = {"temperature": 0.0, "max_tokens": 12, "top_k": 0, "seed": 1}
        there = list(remote(client, "chat", settings)(messages, None))
        thoughts = list(remote(client, "chat", settings, thinking=True)(messages, None))
    for pieces in (here, there):
        assert sum(value for kind, value in pieces if kind == "usage") == 12
        assert pieces[-1] == ("end", "length")
    assert (
        "".join(v for k, v in here if k == "content") == "".join(v for k, v in there if k == "content") != ""
    )
    assert {kind for kind, _ in thoughts} == {"reasoning", "usage", "end"}


class FakeServer:
    """Answers everything with the same bytes."""

    def __init__(self, body: bytes, kind="text/event-stream"):
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(200)
                self.send_header("content-type", kind)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def chunk(content: str, finish_reason=None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


def test_halves_of_characters_are_joined():
    """Some servers cut an emoji into its two surrogates; what has no other half is none."""
    with FakeServer(chunk("a\ud83d") + chunk("\ude00b\ud83d") + chunk("c", "stop")) as server:
        messages = [{"role": "user", "content": "?"}]
        list(converse(remote(connect(server.url, None), "m", {}), messages))
    assert messages[-1]["content"] == "a😀b\ufffdc"


HTML = b"<html><body>Another page</body></html>"


@pytest.mark.parametrize(
    "body, kind, says",
    [
        (chunk("half"), "text/event-stream", "broke off"),
        (chunk("half") + b"data: {bad\n\n", "text/event-stream", "end in /v1"),
        (b'data: {"id": "x", "choices": null}\n\n', "text/event-stream", "broke off"),
        (b'data: {"error": {"message": "no ![a](b)\\n more"}}\n\n', "text/event-stream", "no ![a](b) more"),
        (HTML, "text/html", "broke off"),
    ],
    ids="half bad null error html".split(),
)
def test_servers_that_are_none(capsys, tmp_path, body, kind, says):
    with FakeServer(body, kind) as server:
        flags = ["--base_url", server.url, "--model", "m"]
        with pytest.raises(SystemExit) as error:
            chat_api.main(chat_api.parse_args([*flags, "--prompt", "hi", "--prompt", "go on"]))
        out, err = capsys.readouterr()
        assert error.value.code == 2 and err.count("error: ") == 2 and says in err
        assert out.count("half") == 2 * (b"half" in body)
        with pytest.raises(CheckpointError, match=re.escape(says)):
            eval_toolcall.main(eval_toolcall.parse_args([*flags, "--json", str(tmp_path / "new" / "a.json")]))
        if kind == "text/html":  # the list of models is no list
            with pytest.raises(CheckpointError, match="end in /v1"):
                chat_api.main(chat_api.parse_args(["--base_url", server.url, "--prompt", "hi"]))


def test_addresses_and_keys_that_cannot_be():
    for url, key, says in (("http://[::1/v1", "k", "no address"), ("http://a", "ключ", "ASCII")):
        with pytest.raises(CheckpointError, match=says):
            connect(url, key)


def test_questions_of_your_own(monkeypatch, capsys):
    """An error or Ctrl-C ends the answer, not the program."""
    with LiveServer("--api_key", "secret") as server:
        monkeypatch.setenv("MINIMIND_API_KEY", "secret")
        args = eval_toolcall.parse_args(
            ["--base_url", f"{server.url}/v1", "--max_new_tokens", "4", "--interactive"]
        )
        lines = iter(["hi", "word " * 9000, "hi", "/exit"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        eval_toolcall.main(args)
        out, err = capsys.readouterr()
        assert out.count("🧠: ") == 3 and err.count("error: ") == 1 and "takes 2048" in err

    def interrupted(*_):
        yield "content", "half"
        raise KeyboardInterrupt

    lines = iter(["hi", "/exit"])
    eval_toolcall.ask_yourself(interrupted, args)
    assert "half [stopped]" in capsys.readouterr().out


def test_terminal_client(monkeypatch, capsys):
    with LiveServer() as server:
        flags = ["--base_url", f"{server.url}/v1", "--max_tokens", "8", "--seed", "1"]
        chat_api.main(chat_api.parse_args([*flags, "--prompt", "hi", "--prompt", "and?", "--tools", "all"]))
        out = capsys.readouterr().out
        assert "💬: hi" in out and "💬: and?" in out and "cut off at --max_tokens" in out
        lines = iter(["hi", "/new", "/exit"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
        chat_api.main(chat_api.parse_args(flags))
        assert "🧠: " in capsys.readouterr().out
        with pytest.raises(SystemExit):
            chat_api.main(chat_api.parse_args([*flags, "--model", "gpt-4", "--prompt", "hi"]))
        assert "there is no model 'gpt-4' here" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        cli.run(chat_api.main, chat_api.parse_args, [*flags, "--prompt", "hi"])
    assert error.value.code == 2 and "nobody answers at" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chat_api.parse_args(["--tools", "rm_rf"])
    assert "there is no tool rm_rf: choose from calculate_math" in capsys.readouterr().err
    assert chat_api.parse_args(["--tools", "calculate_math, text_length"]).tools[1] == "text_length"
    with pytest.raises(SystemExit):
        chat_api.parse_args(["--prompt", " "])


def test_a_models_text_does_not_steer_the_terminal():
    assert chat_api.printable("a\x1b[2Jb\x07\r你\n\tc") == "a[2Jb你\n\tc"


def test_exam_of_tool_use(monkeypatch, capsys, tmp_path):
    """A model that calls the right tool and repeats its result passes; one that guesses does not."""

    def oracle(messages, tools):
        if messages[-1]["role"] == "tool":
            results = [json.loads(m["content"]) for m in messages if m["role"] == "tool"]
            yield "content", "It is " + " and ".join(str(next(iter(r.values()))) for r in results) + "."
        else:
            question = messages[-1]["content"]
            calls = next(calls for q, _, calls in eval_toolcall.FIXED if q == question)
            for i, (name, arguments) in enumerate(calls):
                yield call(json.dumps(arguments), name, i)
        yield "end", "stop"

    def guess(messages, tools):
        yield "content", "It is 7."
        yield "end", "stop"

    path = tmp_path / "result.json"
    for speak, right in ((oracle, 1.0), (guess, 0.0)):
        monkeypatch.setattr(eval_toolcall, "speaker", lambda args, speak=speak: (speak, "fake"))
        eval_toolcall.main(eval_toolcall.parse_args(["--json", str(path)]))
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["metrics"]["right"] == right, [i for i in result["items"] if i["right"] != bool(right)]
    assert "right" in capsys.readouterr().out


def test_exam_over_a_server_and_on_a_file(capsys, tmp_path):
    row = {
        "conversations": [
            {"role": "system", "content": "", "tools": json.dumps(CALCULATOR)},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": ""},
        ],
        "gt": ["4"],
    }
    path = tmp_path / "agent.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with LiveServer() as server:
        flags = ["--base_url", f"{server.url}/v1", "--max_new_tokens", "8", "--data_path", str(path)]
        eval_toolcall.main(eval_toolcall.parse_args(flags))
    out = capsys.readouterr().out
    assert "chat: 1 questions" in out and "✗ 2+2?" in out
