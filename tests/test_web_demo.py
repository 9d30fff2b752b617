"""The web demo as a user clicks through it (streamlit's AppTest: the script without a browser)."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from serve_helpers import LiveServer, small_native
from streamlit.testing.v1 import AppTest

from scripts import web_demo, web_texts
from scripts.web_texts import TEXTS
from scripts.web_training import Log
from trainer import checkpoint

PAGE = str(web_demo.ROOT / "scripts" / "web_demo.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with small weights, into which the demo looks."""
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--save_dir", str(tmp_path)])
    native = small_native()
    metadata = {"stage": "full_sft", "tokenizer_hash": checkpoint.tokenizer_hash(native.tokenizer)}
    checkpoint.save_weights(native.engine.model, tmp_path / "full_sft_32.pth", metadata)
    web_demo.st.cache_resource.clear()
    web_demo.st.cache_data.clear()
    return tmp_path


def page():
    at = AppTest.from_file(PAGE, default_timeout=60).run()
    assert not at.exception, at.exception
    return at


def by_label(widgets, label):
    return next(widget for widget in widgets if widget.label == label)


def ask(at, question="How are you?"):
    by_label(at.slider, "Longest answer, in tokens").set_value(16)
    at.chat_input[0].set_value(question).run()
    assert not at.exception, at.exception
    return at


def said(at):
    return at.session_state["messages"]


def test_a_conversation(folder):
    at = page()
    by_label(at.text_area, "System prompt").set_value("Be short.")
    ask(ask(at), "And you?")
    assert [message["role"] for message in said(at)] == ["user", "assistant", "user", "assistant"]
    assert all(message["content"] for message in said(at)) and not at.error
    shown = [markdown.value for markdown in at.markdown]
    assert "How are you?" in shown and "And you?" in shown
    assert any("tokens" in caption.value for caption in at.caption)


def test_answer_again_edit_delete_and_start_anew(folder):
    at = ask(ask(page(), "first"), "second")
    before = [dict(message) for message in said(at)]
    by_label(at.button, "Answer again").click().run()
    assert said(at)[:3] == before[:3] and len(said(at)) == 4
    at.button(key="edit 0").click().run()
    at.text_area(key="text 0").set_value("changed")
    at.button(key="save 0").click().run()
    assert [m["content"] for m in said(at) if m["role"] == "user"] == ["changed"] and len(said(at)) == 2
    ask(at, "third")
    at.button(key="delete 0").click().run()
    assert said(at)[0]["content"] == "third" and len(said(at)) == 2
    by_label(at.button, "New conversation").click().run()
    assert said(at) == []


def test_seed_repeats_an_answer(folder):
    at = page()
    by_label(at.number_input, "Seed (0 = other answers every time)").set_value(7)
    first = [m["content"] for m in said(ask(at))]
    by_label(at.button, "Answer again").click().run()
    assert [m["content"] for m in said(at)] == first


def test_thoughts_are_folded_and_chinese(folder):
    at = page()
    at.toggle(key="thinking").set_value(True)
    ask(at)
    assert said(at)[1]["reasoning_content"] and at.expander[0].label == "Thoughts"
    at.segmented_control[0].set_value("中文").run()
    assert at.expander[0].label == "思考过程" and at.chat_input[0].placeholder == "问点什么"
    for name in TEXTS["English"]:
        assert TEXTS["中文"][name]


def test_calls_and_results_are_shown(folder, monkeypatch):
    def speak(messages, tools):
        if messages[-1]["role"] == "user":
            yield "call", {"id": "c1", "name": "calculate_math", "arguments": '{"expression": "6*7"}'}
        else:
            yield "content", "It is 42."

    monkeypatch.setattr("scripts.conversation.local", lambda *_: speak)
    at = page()
    at.multiselect(key="tools").set_value(["calculate_math"])
    ask(at)
    assert [code.value for code in at.code] == ['{"expression": "6*7"}', '{"result": 42}']
    assert said(at)[-1]["content"] == "It is 42."


def test_what_a_model_says_is_text(folder, monkeypatch):
    evil = '<img src=x onerror="alert(1)"> ![p](http://evil.example/p.png) $x$'
    monkeypatch.setattr(
        "scripts.conversation.local", lambda *_: lambda messages, tools: iter([("content", evil)])
    )
    at = ask(page(), evil)
    shown = [m for m in at.markdown if "onerror" in m.value]
    assert len(shown) == 2 and not any(m.allow_html or "![" in m.value for m in shown)
    assert "unsafe_allow_html" not in (web_demo.ROOT / "scripts" / "web_demo.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, harmless, plain",
    [
        ("\\`![b](u)\\`", "\\`!Z[b](u)\\`", "\\\\\\`!\\[b\\](u)\\\\\\`"),
        ("x ``` ![c](u) tail", "x ``` !Z[c](u) tail", "x \\`\\`\\` !\\[c\\](u) tail"),
        ("$5, \\$6", "\\$5, \\$6", "\\$5, \\\\\\$6"),
        (
            ":red[a] :smile: 12:30, at: b",
            ":Zred[a] :Zsmile: 12:30, at: b",
            ":Zred\\[a\\] :Zsmile: 12:30, at: b",
        ),
        ("a\nb\n\n- c\n- d", "a  \nb\n\n- c  \n- d", None),
        ("```\n$a:b:\nc\n```", "```\n$a:b:\nc\n```", None),
    ],
)
def test_words_without_effects(words, harmless, plain):
    """Z: a space without width."""
    assert web_texts.harmless(words).replace(web_texts.ZERO, "Z") == harmless
    assert plain is None or web_texts.plain(words).replace(web_texts.ZERO, "Z") == plain


def test_an_edit_belongs_to_its_question(folder):
    at = ask(ask(ask(page(), "one"), "two"), "three")
    second, third = [i for i, m in enumerate(said(at)) if m["role"] == "user"][1:]
    at.button(key=f"edit {second}").click().run()
    at.text_area(key=f"text {second}").set_value("two, edited").run()
    at.button(key="delete 0").click().run()
    assert not [area for area in at.text_area if area.key != "system"]
    at.button(key=f"edit {second}").click().run()
    assert at.text_area(key=f"text {second}").value == "three"


@pytest.mark.parametrize("address", ["http://[::1/v1", "http://a\nb/v1", "", "nonsense"])
def test_addresses_that_are_none(folder, address):
    at = page()
    at.radio(key="source").set_value("server").run()
    at.text_input(key="address").set_value(address).run()
    assert not at.exception and at.warning


def test_flags_that_are_unknown(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--savedir", "x"])
    assert "--savedir x" in page().warning[0].value


def test_an_error_is_shown_and_the_page_goes_on(folder, monkeypatch):
    def broken(messages, tools):
        yield "content", "half of an "
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr("scripts.conversation.local", lambda *_: broken)
        at = ask(page())
    assert at.error[0].value == "no more memory" and said(at)[1]["content"] == "half of an "
    ask(at, "again")
    assert not at.error and len(said(at)) == 4


def test_broken_weights_are_an_error_not_a_crash(folder):
    (folder / "full_sft_32.pth").write_bytes(b"nothing")
    at = ask(page())
    assert "full_sft_32.pth" in at.error[0].value.replace("\\", "")
    by_label(at.button, "New conversation").click().run()
    assert not at.error


def test_a_server_instead(folder):
    with LiveServer() as server:
        at = page()
        at.radio(key="source").set_value("server").run()
        at.text_input(key="address").set_value(f"{server.url}/v1").run()
        assert at.selectbox(key="name").options == ["chat", "text"]
        ask(at)
        assert said(at)[1]["content"] and not at.error
    ask(at, "still there?")
    assert "nobody answers at" in at.error[0].value


def test_without_weights_a_server_is_offered(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--save_dir", str(tmp_path / "none")])
    at = page()
    at.radio(key="source").set_value("here").run()
    assert "no weights" in at.info[0].value and "none" in at.info[0].value and at.chat_input[0].disabled


def test_long_context_reaches_the_model(folder, monkeypatch):
    import eval_llm

    asked, original = [], eval_llm.load
    monkeypatch.setattr(eval_llm, "load", lambda args: asked.append(args) or original(args))
    at = ask(page())
    by_label(at.toggle, "Long context (YaRN)").set_value(True).run()
    ask(at)
    assert [args.inference_rope_scaling for args in asked] == [0, 1]


def test_weights_and_adapters_that_are_found(tmp_path):
    (tmp_path / "lora").mkdir()
    names = [
        "full_sft_64.pth",
        "dpo_64_moe.pth",
        "reward_64.pth",
        "lora/lora_a_64.pth",
        "lora/lora_b_64_moe.pth",
        "lora/lora_c_8.pth",
    ]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    found = web_demo.find_weights(tmp_path)
    assert [p.name for p in found] == ["exported", "dpo_64_moe.pth", "full_sft_64.pth"]
    assert web_demo.find_adapters(tmp_path / "full_sft_64.pth") == ["lora_a"]
    assert web_demo.find_adapters(tmp_path / "dpo_64_moe.pth") == ["lora_b"]


def test_training_page(folder, monkeypatch):
    steps = [
        {"args": {}},
        *({"step": i, "loss": 5 - i, "val_loss": 4.0 + i, "note": "x"} for i in range(1, 4)),
    ]
    lines = [json.dumps(step) for step in steps] + ['{"step": 4, "lo']  # being written
    (folder / "grpo_log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert Log(folder / "grpo_log.jsonl").update()[-1] == {"step": 3, "loss": 2, "val_loss": 7.0}
    sample = {"step": 1, "question": "2+2?", "turns": ["<b>4</b>"], "reward": 1.0, "parts": {"correct": 1.0}}
    (folder / "grpo_samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")

    def training():
        from scripts import web_demo, web_training

        web_training.training_page(web_demo.save_dir())

    at = AppTest.from_function(training, default_timeout=60).run()
    assert not at.exception, at.exception
    assert [metric.label for metric in at.metric] == ["loss", "val_loss"] and at.metric[0].value == "2"
    assert at.code[0].value == "<b>4</b>" and "2+2?" in at.expander[0].label
    lines = ['{"step": "1"}', '{"step": 1, "reward": null}', "3", '{"step": 2, "question": "a\u2028b"}']
    (folder / "grpo_samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "odd_log.jsonl").mkdir()  # the newest, and no log
    (folder / "grpo_log.jsonl").write_text('{"step": "x"}\n{"step": [1]}\n', encoding="utf-8")
    at.run()
    assert not at.exception and at.caption[0].value == "…"
    (folder / "grpo_log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}', encoding="utf-8")
    at.run()
    assert not at.exception and "a b" in at.expander[-1].label
    (folder / "grpo_log.jsonl").unlink()
    assert (
        "No run has written a log" in AppTest.from_function(training, default_timeout=60).run().info[0].value
    )


def test_a_log_is_read_as_it_grows(tmp_path):
    path = tmp_path / "x_log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3}\n[1]\nnonsense\n{"step": 2, "no')
    log = Log(path)
    assert log.update() == [{"step": 1, "loss": 3}]
    with path.open("ab") as file:
        file.write('te": "é", "loss": 2}\n{"step": 3'.encode())
    assert log.update() == log.update() == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    path.write_bytes(b'{"step": 1, "loss": 9}\n')  # a new run
    assert log.update() == [{"step": 1, "loss": 9}]
    path.write_bytes(b'{"step": 1, "loss": 7}\n{"step": 2, "loss": 6}\n')  # one that is longer already
    assert log.update() == [{"step": 1, "loss": 7}, {"step": 2, "loss": 6}]


def test_conversation_as_markdown():
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "r\ns", "tool_calls": [call]},
    ]
    assert web_demo.as_markdown(messages) == "### user\n\nq\n\n### assistant\n\n> r\n> s\n\na\n\n`f` `{}`\n"


def test_one_answer_at_a_time():
    held = SimpleNamespace(acquire=lambda timeout: False, release=lambda: None)
    with pytest.raises(ValueError, match="another window"):
        list(web_demo.locked(lambda messages, tools: iter(()), held)([], None))


def test_no_usage_statistics():
    config = (web_demo.ROOT / "scripts" / ".streamlit" / "config.toml").read_text(encoding="utf-8")
    assert "gatherUsageStats = false" in config and 'address = "127.0.0.1"' in config
