"""The second page of the web demo: the curves of a run while it is being trained, and its samples."""

import contextlib
import json
import os
from pathlib import Path

import streamlit as st

from scripts.web_texts import KEPT, plain, text


def newest_first(paths) -> list[Path]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # it has just gone
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


FIRST = "loss val_loss val_bpb reward success val_pass1 kl length entropy lr grad_norm".split()
POINTS = 1000  # of a curve, at most: a page cannot show more


class Log:
    """The steps in a log. Every `update` reads what was written since the last one; a line that is being
    written waits until it is whole."""

    def __init__(self, path: Path):
        self.path, self.position, self.begin, self.steps = path, 0, None, []

    def update(self) -> list[dict]:
        with self.path.open("rb") as file:
            begin = (os.fstat(file.fileno()).st_ino, file.read(200).partition(b"\n")[0])
            if begin != self.begin or file.seek(0, 2) < self.position:  # a run has begun it anew
                self.position, self.begin, self.steps = 0, begin, []
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
        self.position += len(whole) + bool(whole)
        for line in whole.decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and type(entry.get("step")) is int:
                    self.steps.append({k: v for k, v in entry.items() if type(v) in (int, float)})
        return self.steps


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a file, which may be long."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - (1 << 18), 0))
        return file.read().decode("utf-8", "replace").strip("\n").split("\n")[-count:]


def training_page(save_dir: Path):
    place = Path(st.sidebar.text_input(text("folder"), str(save_dir), key="folder", **KEPT)).expanduser()
    depths = ("", "*/", "*/*/")  # a typed folder may be a whole disk
    paths = (path for depth in depths for path in place.glob(f"{depth}*_log.jsonl"))
    logs = newest_first(path for path in paths if path.is_file())
    if not logs:
        st.info(text("no_log").format(folder=plain(str(place))))
        st.code("python trainer/train_pretrain.py", language="bash")
        return
    with st.sidebar:
        path = st.selectbox(
            text("run"),
            logs,
            format_func=lambda p: str(p.relative_to(place)).removesuffix("_log.jsonl"),
            key="run",
            **KEPT,
        )
        live = st.toggle(text("live"), True, key="live", **KEPT)
    st.markdown(f"## {path.name.removesuffix('_log.jsonl')}")
    st.fragment(show_run, run_every=2 if live else None)(path)


def show_run(path: Path):
    import pandas

    if getattr(st.session_state.get("log"), "path", None) != path:
        st.session_state.log = Log(path)
    try:
        table = pandas.DataFrame(st.session_state.log.update())
    except OSError:  # it was taken away; a new run may write another
        table = pandas.DataFrame()
    if table.empty:
        st.caption("…")
        return
    table = table.groupby("step").last()
    names = [name for name in table.columns if table[name].nunique() > 1]
    default = [name for name in FIRST if name in names][:6]
    chosen = st.multiselect(text("figures"), sorted(names), default, key=f"figures {path}")
    last = table.ffill().iloc[-1]
    st.caption(f"{text('step')} {table.index[-1]:,}")
    columns = st.columns(2)
    for i, name in enumerate(chosen):
        with columns[i % 2]:
            st.metric(name, f"{last[name]:,.4g}")
            curve = table[name].dropna()
            st.line_chart(curve[:: -(-len(curve) // POINTS)], height=180, x_label=text("step"), y_label="")
    samples = path.with_name(path.name.replace("_log.jsonl", "_samples.jsonl"))
    if samples.exists():
        st.subheader(text("samples"))
        for line in tail(samples, 8):
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                show_sample(json.loads(line))


def show_sample(sample: dict):
    reward = sample.get("reward", 0.0)
    question = " ".join(str(sample.get("question")).split())[:80]
    label = f"{text('step')} {sample.get('step')} · {text('reward')} {reward:.3f} · {question}"
    with st.expander(plain(label)):
        st.json({"parts": sample.get("parts", {}), "expected": sample.get("expected")}, expanded=False)
        for turn in sample.get("turns") or [sample.get("text", "")]:
            st.code(str(turn), language=None, wrap_lines=True)
