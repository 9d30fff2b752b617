"""A page from plain blocks: one HTML file that loads nothing from outside, or Markdown and its pictures.

    sections = [("Cost", [("text", "..."), ("table", ["stage", "time"], [["pretrain", "4 min"]])])]
    page = html("Report card: agent", "out/agent_256.pth", sections)

Blocks, each a tuple whose first entry is its kind:

    ("text", words)                   a paragraph
    ("warn", words)                   a paragraph that should be seen
    ("head", title)                   a smaller heading
    ("facts", [(name, value)])        a list of names and values
    ("cards", [(name, value, hint)])  large figures
    ("table", heads, rows)            the first column is words, the others are numbers or words
    ("answers", heads, rows)          a table of long texts, whose line breaks stay
    ("code", text)                    a command
    ("chain", [(title, words, link)]) boxes with arrows; link = what is known about the arrow to the next
    ("curves", name, panels)          a figure, see `draw`

Every text is escaped here and nowhere else: nothing that a model wrote can become markup. A value that is a
tuple (text, colour) is shown as a badge: "good", "bad" or "plain".
"""

import html as entities
import io
import re
from pathlib import Path

from scripts.report_lineage import is_number

LIMIT = 400  # points of a curve: a page cannot show more


# ------------------------------------------------------------------------------------------------------------
# Numbers as words
# ------------------------------------------------------------------------------------------------------------

UNKNOWN = "not recorded"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:,.0f}"


def millions(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e5 else f"{number:,}"


def figure(name: str, value) -> str:
    """A metric as it is usually written: shares in percent, all else with four digits."""
    if not is_number(value):
        return str(value)
    plain = ("bits", "bpb", "loss", "ppl", "perplexity", "nats", "margin", "logp", "kl", "reward", "length")
    if 0 <= value <= 1 and not any(word in name for word in plain):
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.4g}".removesuffix(".")


def watt_hours(energy: float) -> str:
    return f"{energy:.3g} Wh" if energy < 1000 else f"{energy / 1000:.3g} kWh"


# ------------------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------------------

INK = "#010203"  # in the drawing; on the page it becomes the colour of the text, light or dark
LINES = ("#3b76d6", "#e0701a", "#2b9b5a", "#a35bd1")


def draw(panels: list[tuple], format: str, name: str) -> bytes | None:
    """One figure of small panels (title, label of the x axis, label of the y axis, [(label, steps, values)]),
    as "svg" or "png". None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, whatever the settings say
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    ink = INK if format == "svg" else "#202428"
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": repr(name),  # identifiers that no other figure of the page has
        "font.family": "sans-serif",
        "font.size": 8,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, x, y, lines) in zip(grid, panels):
            for colour, (label, steps, values) in zip(LINES, lines):
                stride = -(-len(steps) // LIMIT)
                kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
                marker = "o" if len(kept) < 15 else None
                points = [steps[k] for k in kept], [values[k] for k in kept]
                axes.plot(*points, color=colour, linewidth=1.3, marker=marker, markersize=3, label=label)
            axes.set(title=title, xlabel=x, ylabel=y, facecolor="none")
            axes.grid(alpha=0.2, color=ink)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=7)
        for axes in list(grid)[len(panels) :]:
            axes.set_visible(False)
        file = io.BytesIO()
        if format == "png":
            figure.savefig(file, format="png", dpi=130, facecolor="white")
        else:
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def inline_svg(raw: bytes, label: str) -> str:
    """A drawing as part of a page: without what only a file of its own needs, in the page's colours."""
    text = raw.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="([^"]*)"', r'\1 style="max-width:\2"', text, count=1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# ------------------------------------------------------------------------------------------------------------
# HTML
# ------------------------------------------------------------------------------------------------------------

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser refuses all else

STYLE = Path(__file__).with_suffix(".css")


def escape(text) -> str:
    """Characters of markup as entities; control characters, which no page may hold, as a sign for them."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", str(text))
    return entities.escape(text)


def cell(value) -> str:
    if isinstance(value, tuple):
        return f'<span class="badge {value[1]}">{escape(value[0])}</span>'
    return escape(value)


NUMBER = re.compile(r"(at least )?[-−+]?\d[\d,.]*(\s.*)?|–|not recorded|not available|")


def html_table(heads, rows, style="") -> str:
    """Columns of numbers are set to the right, but for the first one and those of long texts."""
    numbers = [
        not style and all(not isinstance(row[i], tuple) and NUMBER.fullmatch(str(row[i])) for row in rows)
        for i in range(len(heads))
    ]
    mark = [' class="n"' if n and i else "" for i, n in enumerate(numbers)]
    lines = ["<tr>" + "".join(f"<th{m}>{escape(h)}</th>" for h, m in zip(heads, mark)) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td{m}>{cell(c)}</td>" for c, m in zip(row, mark)) + "</tr>" for row in rows]
    return f'<div class="wide"><table class="{style}">' + "\n".join(lines) + "</table></div>"


def html_chain(boxes) -> str:
    parts = []
    for i, (title, words, link) in enumerate(boxes):
        lines = "".join(f"<span>{escape(line)}</span>" for line in words)
        parts.append(f'<div class="box"><b>{escape(title)}</b>{lines}</div>')
        if i + 1 < len(boxes):
            parts.append(f'<div class="arrow"><i>→</i>{cell(link)}</div>')
    return f'<div class="chain">{"".join(parts)}</div>'


def html_block(block) -> str:
    kind, *rest = block
    if kind == "text":
        return f"<p>{escape(rest[0])}</p>"
    if kind == "warn":
        return f'<p class="warn">{escape(rest[0])}</p>'
    if kind == "head":
        return f"<h3>{escape(rest[0])}</h3>"
    if kind == "code":
        return f"<pre>{escape(rest[0])}</pre>"
    if kind == "facts":
        return "<dl>" + "\n".join(f"<dt>{escape(n)}</dt><dd>{cell(v)}</dd>" for n, v in rest[0]) + "</dl>"
    if kind == "cards":
        cards = [
            f'<div class="card"><span class="hint">{escape(name)}</span><b>{escape(value)}</b>'
            f'<span class="hint">{escape(hint)}</span></div>'
            for name, value, hint in rest[0]
        ]
        return f'<div class="cards">{"".join(cards)}</div>'
    if kind == "table":
        return html_table(*rest)
    if kind == "answers":
        return html_table(*rest, style="answers")
    if kind == "chain":
        return html_chain(rest[0])
    raw = draw(rest[1], "svg", rest[0])
    if raw is None:
        return "<p>No curves: they need matplotlib (pip install matplotlib).</p>"
    return f"<figure>{inline_svg(raw, f'Curves of {rest[0]}')}</figure>"


def html(title: str, subtitle: str, sections: list[tuple], footer: str = "") -> str:
    """The whole page."""
    links = [f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections) if i]
    parts = []
    for i, (name, blocks) in enumerate(sections):
        head = f'<h2 id="s{i}">{escape(name)}</h2>\n' if i else ""
        parts.append(head + "\n".join(html_block(block) for block in blocks))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><main>
<h1>{escape(title)}</h1>
<p class="sub">{escape(subtitle)}</p>
<nav>{"".join(links)}</nav>
{chr(10).join(parts)}
<footer>{escape(footer)}</footer>
</main></body></html>
"""


# ------------------------------------------------------------------------------------------------------------
# Markdown
# ------------------------------------------------------------------------------------------------------------


def words(text) -> str:
    """Text that means nothing to Markdown, in one line."""
    text = text[0] if isinstance(text, tuple) else str(text)
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text)
    text = re.sub(
        r"([\\`*\[\]|~$#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return "<br>".join(line.strip() for line in text.strip().splitlines())


def markdown_table(heads, rows) -> str:
    lines = ["| " + " | ".join(words(h) for h in heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(words(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def markdown_code(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"


def markdown_block(block, folder: str, pictures: dict[str, bytes]) -> str:
    kind, *rest = block
    if kind == "text":
        return words(rest[0])
    if kind == "warn":
        return f"> **Note:** {words(rest[0])}"
    if kind == "head":
        return f"### {words(rest[0])}"
    if kind == "code":
        return markdown_code(rest[0])
    if kind == "facts":
        return "\n".join(f"- {words(name)}: {words(value)}" for name, value in rest[0])
    if kind == "cards":
        return markdown_table(["", "", ""], rest[0])
    if kind in ("table", "answers"):
        return markdown_table(*rest)
    if kind == "chain":
        lines = []
        for i, (title, about, link) in enumerate(rest[0]):
            about = ", ".join(line for line in about if line)
            arrow = f" → ({words(link)})" if i + 1 < len(rest[0]) else ""
            lines.append(f"{i + 1}. **{words(title)}**: {words(about)}{arrow}")
        return "\n".join(lines)
    picture = draw(rest[1], "png", rest[0])
    if picture is None:
        return "No curves: they need matplotlib (`pip install matplotlib`)."
    file = re.sub(r"[^\w.+-]", "_", rest[0]) + ".png"
    pictures[file] = picture
    return f"![Curves of {words(rest[0])}]({folder}/{file})"


def markdown(title: str, subtitle: str, sections: list[tuple], footer: str, folder: str) -> tuple[str, dict]:
    """(the page, {file name: bytes} of its pictures), which belong into `folder` beside it."""
    pictures: dict[str, bytes] = {}
    names = [name for name, _ in sections[1:]]
    links = " · ".join(f"[{words(name)}](#{name.lower().replace(' ', '-')})" for name in names)
    parts = [f"# {words(title)}", words(subtitle), links]
    for i, (name, blocks) in enumerate(sections):
        parts += [f"## {words(name)}"] if i else []
        parts += [markdown_block(block, folder, pictures) for block in blocks]
    return "\n\n".join([*parts, words(footer)]) + "\n", pictures
