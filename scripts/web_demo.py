"""Talk to a model in the browser, and watch one being trained.

    streamlit run scripts/web_demo.py
    streamlit run scripts/web_demo.py -- --save_dir out/quickstart

Models: weights and adapters in out/, transformers folders below it, or any OpenAI-compatible server. What a
model says is shown as text: no HTML of it is rendered, no picture is fetched, and no call is evaluated.
"""

import argparse
import contextlib
import copy
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import streamlit as st

from scripts.conversation import (
    Background,
    connect,
    converse,
    explain,
    local,
    model_names,
    recent,
    remote,
)
from scripts.web_texts import KEPT, TEXTS, harmless, plain, text
from scripts.web_training import newest_first, training_page
from trainer.tools import TOOLS

LONG = 1500  # characters of a question that is shown in a box of its own
THOUGHTS = ":material/lightbulb:"


def flags():
    """(flags behind the `--` of the command, those that are none)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out")
    return parser.parse_known_args(sys.argv[1:])


def save_dir() -> Path:
    """Where weights and logs are: --save_dir, else out/."""
    return flags()[0].save_dir.expanduser()


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


def find_weights(folder: Path) -> list[Path]:
    """Weight files and transformers folders, the newest first."""
    files = [p for p in folder.glob("*.pth") if not p.name.startswith("reward")]
    folders = [p.parent for p in folder.glob("*/config.json")]
    return newest_first([*files, *folders])


def find_adapters(weights: Path) -> list[str]:
    """Names of adapters beside the weights that were trained on this width."""
    width = weights.stem.partition("_moe")[0].rpartition("_")[2]
    moe = "_moe" if weights.stem.endswith("_moe") else ""
    return sorted(
        p.stem.removesuffix(f"_{width}{moe}") for p in weights.parent.glob(f"lora/*_{width}{moe}.pth")
    )


@st.cache_resource(max_entries=2, show_spinner=False)
def load(path: str, changed: float, adapters: tuple[str, ...], stretched: bool):
    """(model, lock); `changed` is the file's time, so that a newer file is loaded. stretched: with YaRN."""
    import eval_llm

    is_file = path.endswith(".pth")
    folder = {"save_dir": Path(path).parent} if is_file else {"load_from": Path(path)}
    args = (
        eval_llm.parse_args([]).__dict__
        | {"weight": path, "lora_weight": ",".join(adapters) or "None"}
        | {"inference_rope_scaling": int(stretched)}
        | folder
    )
    return eval_llm.load(SimpleNamespace(**args)), threading.Lock()


def locked(speak, lock):
    """One answer at a time: a model here has one engine for all windows."""
    busy = text("busy")

    def alone(messages, tools):
        if not lock.acquire(timeout=30):
            raise ValueError(busy)
        try:
            yield from speak(messages, tools)
        finally:
            lock.release()

    return alone


def choose_model(settings: dict):
    """The sidebar's part about models -> a function that makes `speak`, or None; and its name."""
    st.subheader(text("model"))
    weights = find_weights(save_dir())
    places = ["here", "server"]
    place = st.radio(
        text("source"),
        places,
        format_func=text,
        horizontal=True,
        key="source",
        **KEPT,
        index=0 if weights else 1,
    )
    if place == "here":
        if not weights:
            st.info(text("nothing").format(folder=plain(str(save_dir()))))
            st.code("python scripts/quickstart.py", language="bash")
            return None, ""
        path = st.selectbox(
            text("weights"),
            weights,
            format_func=lambda p: p.stem if p.is_file() else p.name,
            key="weights",
            **KEPT,
        )
        adapters = find_adapters(path) if path.is_file() else []
        chosen = (
            st.multiselect(text("adapters"), adapters, key=f"adapters {path}", **KEPT) if adapters else []
        )
        stretched = path.is_file() and st.toggle(text("yarn"), key="yarn", **KEPT, help=text("yarn_help"))

        def make(thinking):
            with st.spinner(text("loading")):
                model, lock = load(str(path), path.stat().st_mtime, tuple(chosen), stretched)
            own = {**settings, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
            own["max_new_tokens"] = own.pop("max_tokens")
            return locked(local(model, own, thinking), lock)

        return make, "+".join([path.stem, *chosen])
    address = st.text_input(text("address"), "http://127.0.0.1:8998/v1", key="address", **KEPT)
    key = st.text_input(text("key"), type="password", key="key", **KEPT)
    names, problem = list_models(address, key)
    if problem:
        st.warning(plain(problem))
    if names and (st.session_state.get("name") is None or st.session_state.get("asked_at") != address):
        st.session_state.name, st.session_state.asked_at = names[0], address  # a new server, or it came up
    name = st.selectbox(text("name"), names, key="name", **KEPT, accept_new_options=True)

    def ask(thinking):
        client = connect(address, key, timeout=60, max_retries=0)
        return remote(client, name, settings, thinking or None)

    return ask if name else None, name or ""


@st.cache_data(ttl=30, show_spinner=False)
def list_models(address: str, key: str) -> tuple[list[str], str]:
    try:
        return model_names(connect(address, key, timeout=5, max_retries=0)), ""
    except Exception as error:
        return [], explain(error, address)


# ------------------------------------------------------------------------------------------------------------
# Chat
# ------------------------------------------------------------------------------------------------------------


class Answer:
    """Shows an answer: as it grows, and afterwards."""

    def __init__(self):
        self.kind, self.words, self.place, self.shown = "", "", None, 0.0

    def add(self, kind: str, value):
        if kind in ("reasoning", "content"):
            if kind != self.kind:
                self.close()
                self.kind, self.words = kind, ""
                box = (
                    st.expander(text("thoughts"), expanded=True, icon=THOUGHTS)
                    if kind == "reasoning"
                    else st.container()
                )
                self.place = box.empty()
            self.words += value
            if time.monotonic() - self.shown > 0.06:  # the browser need not see every token
                self.place.markdown(harmless(self.words) + " ▌")
                self.shown = time.monotonic()
            return
        self.close()
        if kind == "call":
            show_call(value["name"], value["arguments"])
        elif kind == "result":
            show_result(value["content"])
        elif kind == "end" and value in ("length", "rounds"):
            st.caption(text("cut" if value == "length" else "rounds"))

    def close(self):
        if self.place is not None:
            self.place.markdown(harmless(self.words))
        self.kind, self.place = "", None


def show_call(name: str, arguments: str):
    with st.container(border=True):
        plain = re.sub(r"[^\w.\-]", "", name)[:64]
        st.markdown(f":material/build: {text('called')} `{plain}`")
        st.code(arguments, language="json", wrap_lines=True)


def show_result(content: str):
    ok = not re.match(r'{\s*"error":', content)  # what a tool says that failed: see trainer/tools.py
    with st.container(border=True):
        st.markdown(f":material/{'check_circle' if ok else 'error'}: {text('result')}")
        st.code(content, language="json", wrap_lines=True)


def show_turn(messages: list[dict]):
    """What was said in answer to a question."""
    for message in messages:
        if message["role"] == "tool":
            show_result(message["content"])
            continue
        if message.get("reasoning_content"):
            with st.expander(text("thoughts"), icon=THOUGHTS):
                st.markdown(harmless(message["reasoning_content"]))
        if message.get("content"):
            st.markdown(harmless(message["content"]))
        elif not message.get("tool_calls"):
            st.caption(text("silent"))
        for call in message.get("tool_calls", ()):
            show_call(call["function"]["name"], call["function"]["arguments"])


def turns(messages: list[dict]) -> list[tuple[int, list[dict]]]:
    """(place of the question, question and what follows it)."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return [(a, messages[a:b]) for a, b in zip(starts, [*starts[1:], len(messages)])]


def as_markdown(messages: list[dict]) -> str:
    lines = []
    for message in messages:
        lines.append(f"### {message['role']}\n")
        if message.get("reasoning_content"):
            lines.append("> " + message["reasoning_content"].replace("\n", "\n> ") + "\n")
        if message.get("content"):
            lines.append(message["content"] + "\n")
        for call in message.get("tool_calls", ()):
            lines.append(f"`{call['function']['name']}` `{call['function']['arguments']}`\n")
    return "\n".join(lines)


def sidebar() -> tuple:
    with st.sidebar:
        settings: dict = {}
        make, name = choose_model(settings)
        st.subheader(text("answers"))
        thinking = st.toggle(text("thinking"), key="thinking", **KEPT)
        tools = st.multiselect(text("tools"), list(TOOLS), key="tools", **KEPT)
        system = st.text_area(text("system"), key="system", **KEPT, height=68)
        settings["temperature"] = st.slider(
            text("temperature"), 0.0, 1.5, 0.7, 0.05, key="temperature", **KEPT
        )
        settings["top_p"] = st.slider("top-p", 0.05, 1.0, 0.9, 0.05, key="top_p", **KEPT)
        settings["max_tokens"] = st.slider(text("length"), 16, 4096, 512, 16, key="length", **KEPT)
        history = st.slider(text("history"), 0, 40, 20, 2, key="history", **KEPT)
        seed = st.number_input(text("seed"), 0, 2**31, 0, key="seed", **KEPT)
        settings["seed"] = int(seed) or None
        if st.button(text("new"), width="stretch", icon=":material/add_comment:"):
            st.session_state.messages, st.session_state.editing = [], None
            st.session_state.problem, st.session_state.note = "", {}
        messages = st.session_state.messages
        with st.popover(text("export"), width="stretch", disabled=not messages):
            asked = {"model": name, "system": system, "thinking": thinking, "tools": tools, **settings}
            whole = json.dumps({**asked, "messages": messages}, ensure_ascii=False, indent=1)
            for kind, content, ending in (
                ("JSON", whole, "json"),
                ("Markdown", as_markdown(messages), "md"),
            ):
                st.download_button(
                    kind, content, f"conversation.{ending}", on_click="ignore", width="stretch"
                )  # ignore: else it would end an answer that is being written
    return make, name, thinking, tools, system, history


def show_question(place: int, question: dict):
    """A question with what can be done to it."""
    state = st.session_state
    with st.chat_message("user"):
        if state.editing == place:
            changed = st.text_area(
                text("edit"), question["content"], key=f"text {place}", label_visibility="collapsed"
            )
            with st.container(horizontal=True):
                if st.button(text("save"), key=f"save {place}", type="primary") and changed.strip():
                    state.messages[place:] = [{"role": "user", "content": changed.strip()}]
                    state.editing, state.pending = None, True
                    st.rerun()
                if st.button(text("cancel"), key=f"cancel {place}"):
                    state.editing = None
                    st.rerun()
            return
        with st.container(horizontal=True, vertical_alignment="center"):
            long = len(question["content"]) > LONG
            with st.container(height=240 if long else "content", border=False, width="stretch"):
                st.markdown(harmless(question["content"]))
            if st.button("", key=f"edit {place}", type="tertiary", icon=":material/edit:", help=text("edit")):
                state.editing = place
                state.pop(f"text {place}", None)  # of another question that was here
                st.rerun()
            if st.button(
                "", key=f"delete {place}", type="tertiary", icon=":material/delete:", help=text("delete")
            ):
                length = next(len(turn) for start, turn in turns(state.messages) if start == place)
                del state.messages[place : place + length]
                state.editing = None
                st.rerun()


def answer(make, thinking: bool, tools: list[str], system: str, history: int):
    """Ask the model and show what it says as it comes. Pressing Stop, or anything else, ends this run of the
    script at its next call into Streamlit and starts the next one; what was said until then stays."""
    state, messages, done = st.session_state, st.session_state.messages, threading.Event()
    state.done, state.note = done, {"text": text("stopped")}
    note = state.note
    with st.chat_message("assistant"):
        st.button(text("stop"), key="stop", icon=":material/stop_circle:")
        shown, silence, view = st.container(), st.empty(), Answer()
        question = messages[-1]
        said = recent(messages[:-1], history)
        sent = [*([{"role": "system", "content": system}] if system.strip() else []), *said, question]
        begin = len(sent)
        started = last = touched = time.monotonic()
        tokens = 0
        try:
            speak = make(thinking)
            schemas = [TOOLS[name] for name in tools] or None
            with contextlib.closing(Background(converse(speak, sent, schemas))) as pieces:
                for piece in pieces:
                    kind, value = piece or ("nothing", None)
                    tokens += value if kind == "usage" else 0
                    if kind not in ("nothing", "usage"):
                        if touched > last:
                            silence.empty()
                        last = touched = time.monotonic()
                        with shown:
                            view.add(kind, value)
                    elif time.monotonic() > touched + 0.3:  # a long prompt or call: else Stop had no effect
                        touched = time.monotonic()
                        silence.caption(f"{touched - last:.0f} s …")
        except Exception as error:  # whatever it is, the page shows it and goes on
            note["text"] = ""
            state.problem = " ".join(str(error).split())[:500] or type(error).__name__
            if state.source == "server":
                with contextlib.suppress(Exception):
                    state.problem = explain(error, state.address)
        else:
            seconds = time.monotonic() - started
            note["text"] = f"{tokens} tokens, {tokens / seconds:.0f} / s" if tokens else ""
        finally:
            # The next run of the script may have begun, and this one's session is cut off from it then:
            # only the list and the note themselves are still shared.
            messages += copy.deepcopy(sent[begin:])
            done.set()
    st.rerun()


def chat_page():
    state = st.session_state
    for name, value in (
        ("messages", []),
        ("editing", None),
        ("pending", False),
        ("problem", ""),
        ("note", {}),
    ):
        state.setdefault(name, value)
    if "done" in state:  # an answer that was stopped is about to be put down
        state.done.wait(30)
    make, name, thinking, tools, system, history = sidebar()
    if not state.messages:
        st.markdown(f"## {plain(name) or 'MiniMind'}")
        st.markdown(text("empty"))
    for place, turn in turns(state.messages):
        show_question(place, turn[0])
        if len(turn) > 1:
            with st.chat_message("assistant"):
                show_turn(turn[1:])
    if state.problem:
        st.error(plain(state.problem))
    if state.messages and not state.pending and state.editing is None:
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button(text("again"), icon=":material/refresh:", type="tertiary", disabled=make is None):
                state.messages = state.messages[: turns(state.messages)[-1][0] + 1]
                state.pending = True
                st.rerun()
            st.caption(state.note.get("text", ""))
    asked = st.chat_input(text("ask"), disabled=make is None)
    if asked and asked.strip():
        state.messages.append({"role": "user", "content": asked.strip()})
        state.pending, state.editing = True, None
        st.rerun()
    if state.pending and make is not None and state.messages and state.messages[-1]["role"] == "user":
        state.pending, state.problem = False, ""
        answer(make, thinking, tools, system, history)
    state.pending = False


def main():
    st.set_page_config(page_title="MiniMind", page_icon="🧠", layout="centered")
    st.session_state.setdefault("language", "English")
    if flags()[1]:
        st.warning(plain(f"{' '.join(flags()[1])}: unknown. After -- there may be --save_dir FOLDER"))

    def training():
        training_page(save_dir())

    pages = [
        st.Page(chat_page, title=text("chat"), icon=":material/chat:", url_path="chat", default=True),
        st.Page(training, title=text("training"), icon=":material/monitoring:", url_path="training"),
    ]
    page = st.navigation(pages)
    st.sidebar.segmented_control(
        "Language / 语言", list(TEXTS), key="language", label_visibility="collapsed", required=True
    )
    page.run()


if __name__ == "__main__":
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    if get_script_run_ctx() is None:
        raise SystemExit("start it with: streamlit run scripts/web_demo.py")
    main()
