"""Data doctor: read a data file the way training does, and say what is in it and what is wrong with it.

    python dataset/check_data.py dataset/sft_mini_512.jsonl --max_seq_len 340
    python dataset/check_data.py dataset/dpo.jsonl --json report.json

Knows every format (pretrain, sft/lora/reason, dpo, rlaif, agent; see docs/data.md) and finds out which one it
is. Bad rows are listed with line numbers. The file is streamed; what stays in memory is about 30 bytes per
row. Ends with exit code 1 if there are errors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

import argparse
import array
import collections
import hashlib
import json
import os
import re
import types

from dataset.rows import KINDS, DataError, RowError, iter_blocks, parse_line, validate

REPO = Path(__file__).resolve().parents[1]
PERCENTILES = (0, 25, 50, 75, 90, 95, 99, 100)
HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]+")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")
DIGITS = re.compile("[0-9]+")
BLANK = re.compile(r"\s+")


def detect(row):
    """The format of a row by its keys, or None."""
    if "text" in row:
        return "pretrain"
    if "chosen" in row or "rejected" in row:
        return "dpo"
    if "gt" in row:
        return "agent"
    if "conversations" in row:
        messages = row["conversations"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        placeholder = (
            isinstance(last, dict) and last.get("role") == "assistant" and not last.get("tool_calls")
        )
        if placeholder and str(last.get("content")).strip().lower() in ("", "none", "无", "空"):
            return "rlaif"
        return "sft"
    return None


class Doctor:
    """Collects figures row by row; `report()` at the end."""

    def __init__(self, encoder, kind, max_seq_len, max_listed):
        self.encoder, self.kind, self.max_seq_len, self.max_listed = encoder, kind, max_seq_len, max_listed
        self.rows, self.bad_rows, self.bytes = 0, 0, 0
        self.problems = []  # (line, message), the first few
        self.warnings = collections.Counter()
        self.examples = {}  # warning -> first line
        self.roles, self.turns, self.languages = (collections.Counter() for _ in range(3))
        self.characters = collections.Counter()
        self.lengths = array.array("q")  # tokens of each document (dpo: of both sides, one after the other)
        self.targets = array.array("q")
        self.answer_starts = array.array("q")  # positions in the imagined cache of all documents
        self.answer_ends = array.array("q")
        self.total = 0
        self.hashes = array.array("Q")

    def error(self, line, message):
        self.bad_rows += 1
        if len(self.problems) < self.max_listed:
            self.problems.append((line, message))

    def warn(self, line, message):
        self.warnings[message] += 1
        self.examples.setdefault(message, line)

    def block(self, first_row, block):
        """Check the rows of one block, then tokenize them together."""
        texts, conversations = [], []
        self.bytes += len(block)
        for line, data in enumerate(block.split(b"\n"), first_row):
            if not data.strip():
                continue
            self.rows += 1
            try:
                row = parse_line(data)
                if self.kind is None:
                    self.kind = detect(row)
                    if self.kind is None:
                        raise RowError(f"unknown format; keys: {', '.join(map(repr, row)) or 'none'}")
                found = validate(row, self.kind)
                if self.kind == "pretrain":
                    if not found["text"].strip():
                        self.warn(line, "empty text (skipped in training)")
                        continue
                    texts.append(found["text"])
                    self._look(line, found["text"], found["text"])
                else:
                    conversations += self._conversations(line, found)
            except RowError as error:
                self.error(line, str(error))
        if self.encoder and texts:
            for ids in self.encoder.encode_documents(texts):
                self._length(len(ids), max(len(ids) - 1, 0))
        if self.encoder and conversations:
            self._encode(conversations)

    def _conversations(self, line, found):
        """Checks that need a whole row; returns [(messages, tools), ...] to tokenize."""
        if self.kind == "dpo":
            (chosen, tools), (rejected, _) = found["chosen"], found["rejected"]
            if _size(chosen[-1]) > _size(rejected[-1]):
                self.warnings["pairs whose chosen answer is the longer one"] += 1
            items = [(chosen, tools), (rejected, tools)]
        else:
            items = [found["conversations"]]
        messages, tools = items[0]
        if self.kind == "agent":
            if not found["gt"]:
                self.warn(line, "gt is empty: no reward can be computed")
            if not tools:
                self.warn(line, "no tools")
        if self.kind == "sft" and not any(_size(m) for m in messages if m["role"] == "assistant"):
            self.warn(line, "all answers are empty")
        if self.kind == "sft" and messages[-1]["role"] != "assistant":
            self.warn(line, "the last message is not the assistant's (it teaches nothing)")
        for one, _ in items:
            for before, message in zip([None, *one], one):
                self.roles[message["role"]] += 1
                if before and before["role"] == message["role"] != "tool":
                    self.warn(line, f"two messages in a row by {message['role']}")
                if message.get("reasoning_content"):
                    self.roles["assistant with reasoning"] += 1
                if message.get("tool_calls"):
                    self.roles["assistant with tool calls"] += 1
        self.turns[sum(message["role"] == "user" for message in messages)] += 1
        if tools:
            self.roles["rows with tools"] += 1
        text = "\n".join(f"{m.get('reasoning_content', '')}{m['content']}" for one, _ in items for m in one)
        self._look(line, text, json.dumps([items], ensure_ascii=False))
        return items

    def _look(self, line, text, identity):
        """Language, duplicates, odd characters."""
        self.hashes.append(
            int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")
        )
        sizes = {
            name: sum(map(len, pattern.findall(text)))
            for name, pattern in (("han", HAN), ("latin", LATIN), ("digits", DIGITS), ("blank", BLANK))
        }
        sizes["other"] = len(text) - sum(sizes.values())
        self.characters.update(sizes)
        letters = 2 * sizes["han"] + sizes["latin"]  # one Chinese character says about as much as two letters
        share = 2 * sizes["han"] / letters if letters else -1
        self.languages[
            "none" if share < 0 else "zh" if share > 0.8 else "en" if share < 0.2 else "mixed"
        ] += 1
        if "\ufffd" in text:
            self.warn(line, "holds U+FFFD: text that was decoded with the wrong encoding")
        if "<|im_start|>" in text or "<|im_end|>" in text:
            self.warn(line, "holds <|im_start|> or <|im_end|> (kept as plain text)")

    def _encode(self, conversations):
        import numpy as np

        if self.kind in ("rlaif", "agent"):
            for messages, tools in conversations:
                runs = list(self.encoder.runs(messages, tools, generation_prompt=True))
                texts = [run for run, _ in runs if isinstance(run, str)]
                self._length(len(runs) - len(texts) + sum(map(len, self.encoder.encode_texts(texts))), 0)
            return
        if self.kind == "dpo":
            for chosen, rejected in zip(conversations[::2], conversations[1::2]):
                prompt, *answers = self.encoder.encode_pair(chosen, rejected)
                for answer in answers:
                    self._length(len(prompt) + len(answer), len(answer))
            return
        for ids, mask in self.encoder.encode_conversations(conversations):
            edges = np.diff(np.array(mask, np.int8), prepend=0, append=0)
            self.answer_starts.extend((np.flatnonzero(edges == 1) + self.total).tolist())
            self.answer_ends.extend((np.flatnonzero(edges == -1) + self.total).tolist())
            self._length(len(ids), sum(mask))

    def _length(self, tokens, targets):
        self.lengths.append(tokens)
        self.targets.append(targets)
        self.total += tokens

    def report(self, path):
        import numpy as np

        unique = len(np.unique(np.frombuffer(self.hashes, np.uint64))) if len(self.hashes) else 0
        report = {
            "file": str(path),
            "format": self.kind,
            "rows": self.rows,
            "megabytes": self.bytes / 1e6,
            "bad_rows": self.bad_rows,
            "errors": [{"line": line, "message": message} for line, message in self.problems],
            "warnings": [
                {"message": message, "rows": count, "first_line": self.examples.get(message)}
                for message, count in self.warnings.most_common()
            ],
            "duplicate_rows": len(self.hashes) - unique,
            "languages": dict(self.languages.most_common()),
            "characters_percent": {
                name: 100 * count / max(sum(self.characters.values()), 1)
                for name, count in self.characters.most_common()
            },
            "messages": dict(self.roles.most_common()),
            "user_turns": {str(turns): count for turns, count in sorted(self.turns.items())},
        }
        if len(self.lengths):
            lengths = np.frombuffer(self.lengths, np.int64)
            report["tokens"] = {
                "total": self.total,
                "targets": sum(self.targets),
                "mean": float(lengths.mean()),
                "percentiles": {
                    str(p): int(v)
                    for p, v in zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="nearest"))
                },
            }
            if self.characters:
                report["tokens"]["characters_per_token"] = sum(self.characters.values()) / max(self.total, 1)
            report["at_max_seq_len"] = self.layout(lengths)
        return report

    def layout(self, lengths):
        """What training at max_seq_len makes of the documents: computed by the functions training uses."""
        import numpy as np

        from dataset import packing

        T = self.max_seq_len
        layout = {"max_seq_len": T, "longer": int((lengths > T).sum())}
        if self.kind not in ("pretrain", "sft"):
            layout["longer_percent"] = 100 * layout["longer"] / len(lengths)
            return layout
        cache = types.SimpleNamespace(
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            answer_starts=np.frombuffer(self.answer_starts, np.int64),
            answer_ends=np.frombuffer(self.answer_ends, np.int64),
        )
        fit = packing.split_documents if self.kind == "pretrain" else packing.cut_conversations
        starts, pieces, counts = fit(cache, np.arange(len(lengths)), T)
        layout.update(counts)
        layout["kept_percent"] = 100 * int(pieces.sum()) / max(self.total, 1)
        if self.kind == "sft":
            kept = packing.count_targets(cache.answer_starts, cache.answer_ends, starts, pieces).sum()
        else:
            kept = (pieces - 1).sum()
        layout["kept_target_percent"] = 100 * int(kept) / max(sum(self.targets), 1)
        if self.kind == "sft":
            more = packing.count_targets(
                cache.answer_starts,
                cache.answer_ends,
                *packing.cut_conversations(cache, np.arange(len(lengths)), T, cut_answers=True)[:2],
            )
            layout["kept_target_percent_with_cut_answers"] = 100 * int(more.sum()) / max(sum(self.targets), 1)
        layout["conversations_without_target"] = counts["dropped_documents"]
        for name, pack in (("packed", True), ("unpacked", False)):
            num_rows = len(packing.rows(pieces, T, pack)[1]) - 1
            padding = 100 * (1 - int(pieces.sum()) / max(num_rows * T, 1))
            layout[name] = {"rows": num_rows, "padding_percent": padding}
        cut = np.minimum(lengths, T)
        layout["one_row_per_document_cut_at_max_seq_len"] = {
            "rows": len(lengths),
            "padding_percent": 100 * (1 - int(cut.sum()) / (len(lengths) * T)),
            "tokens_cut_percent": 100 * (1 - int(cut.sum()) / max(self.total, 1)),
        }
        return layout


def _size(message):
    size = len(message["content"]) + len(message.get("reasoning_content", ""))
    return size + sum(len(call["arguments"]) + 1 for call in message.get("tool_calls", ()))


def render(report):
    """The report as text."""
    size = f"{report['rows']:,} rows, {report['megabytes']:,.1f} MB"
    lines = [f"{report['file']}: format {report['format']}, {size}", ""]
    if report["bad_rows"]:
        lines.append(f"ERRORS: {report['bad_rows']:,} bad rows")
        lines += [f"  {report['file']}:{e['line']}: {e['message']}" for e in report["errors"]]
        if report["bad_rows"] > len(report["errors"]):
            lines.append(
                f"  ... and {report['bad_rows'] - len(report['errors']):,} more (--max_listed N lists more)"
            )
    else:
        lines.append("errors         none")
    for warning in report["warnings"]:
        where = f" (first: line {warning['first_line']})" if warning["first_line"] else ""
        lines.append(f"note           {warning['rows']:,} rows: {warning['message']}{where}")
    share = 100 * report["duplicate_rows"] / max(report["rows"], 1)
    lines.append(f"duplicates     {report['duplicate_rows']:,} rows ({share:.1f}%)")
    languages = ", ".join(
        f"{name} {100 * count / max(report['rows'], 1):.0f}%" for name, count in report["languages"].items()
    )
    characters = ", ".join(f"{name} {percent:.0f}%" for name, percent in report["characters_percent"].items())
    lines += [f"languages      rows: {languages}", f"               characters: {characters}"]
    if report["messages"]:
        lines.append("messages       " + ", ".join(f"{name} {n:,}" for name, n in report["messages"].items()))
        turns = [(turns, n) for turns, n in report["user_turns"].items() if int(turns) < 5]
        rest = sum(report["user_turns"].values()) - sum(n for _, n in turns)
        turns += [("5 or more", rest)] if rest else []
        lines.append("user turns     " + ", ".join(f"{turns}: {n:,} rows" for turns, n in turns))
    if "tokens" not in report:
        return "\n".join(lines)
    tokens = report["tokens"]
    percentiles = ", ".join(f"p{p} {value:,}" for p, value in tokens["percentiles"].items())
    lines += [
        f"tokens         {tokens['total']:,} in all, {tokens['targets']:,} targets "
        f"({100 * tokens['targets'] / tokens['total']:.1f}%), mean {tokens['mean']:.0f}",
        f"               {percentiles}",
    ]
    layout = report["at_max_seq_len"]
    lines += ["", f"at --max_seq_len {layout['max_seq_len']}: {layout['longer']:,} are longer"]
    if "packed" in layout:
        naive = layout["one_row_per_document_cut_at_max_seq_len"]
        if report["format"] == "pretrain":
            changed = f"{layout['split_documents']:,} documents split, nothing dropped"
        else:
            changed = (
                f"{layout['cut_documents']:,} conversations cut after the last answer that fits, "
                f"{layout['dropped_documents']:,} dropped because none fits"
            )
        with_cut = layout.get("kept_target_percent_with_cut_answers", 0)
        more = with_cut > layout["kept_target_percent"] + 1
        cut_answers = (
            f"\n                       (with cut answers: {with_cut:.1f}% of the targets)" if more else ""
        )
        lines += [
            f"  kept                 {layout['kept_percent']:.1f}% of the tokens, "
            f"{layout['kept_target_percent']:.1f}% of the targets ({changed}){cut_answers}",
            f"  packed (default)     {layout['packed']['rows']:,} rows, "
            f"{layout['packed']['padding_percent']:.1f}% padding",
            f"  --pack 0             {layout['unpacked']['rows']:,} rows, "
            f"{layout['unpacked']['padding_percent']:.1f}% padding",
            f"  (one row per document, cut: {naive['padding_percent']:.1f}% padding, "
            f"{naive['tokens_cut_percent']:.1f}% of the tokens lost)",
        ]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", help=".jsonl, .json or .parquet files, or Hugging Face data set names"
    )
    parser.add_argument(
        "--format", choices=KINDS, help="format of the rows (default: by the keys of the first row)"
    )
    parser.add_argument(
        "--max_seq_len", type=int, default=340, help="row length in tokens to plan for (default: 340)"
    )
    parser.add_argument("--tokenizer", default=str(REPO / "model"), help="tokenizer folder (default: model/)")
    parser.add_argument("--no_tokens", action="store_true", help="do not tokenize: several times faster")
    parser.add_argument(
        "--max_rows", type=int, default=0, help="look at the first N rows or a few more (0 = all)"
    )
    parser.add_argument("--max_listed", type=int, default=20, help="bad rows to list (default: 20)")
    parser.add_argument(
        "--json", metavar="PATH", help="also write the report as JSON here; - prints only JSON"
    )
    return parser.parse_args(argv)


def main(args):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode must not end the report
            stream.reconfigure(errors="backslashreplace")
    from dataset.lm_dataset import TextEncoder

    if args.max_seq_len < 4:
        raise SystemExit(f"--max_seq_len must be at least 4, not {args.max_seq_len}")
    reports = []
    try:
        encoder = None if args.no_tokens else TextEncoder.from_folder(args.tokenizer)
        for path in args.files:
            doctor = Doctor(encoder, args.format, args.max_seq_len, args.max_listed)
            for first_row, block in iter_blocks(path):
                doctor.block(first_row, block)
                if args.max_rows and doctor.rows >= args.max_rows:
                    break
            reports.append(doctor.report(path))
            if args.json != "-":
                print(render(reports[-1]), end="\n\n" if path != args.files[-1] else "\n", flush=True)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    if args.json:
        text = json.dumps(reports[0] if len(reports) == 1 else reports, ensure_ascii=False, indent=1)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return int(any(report["bad_rows"] for report in reports))


if __name__ == "__main__":
    try:
        raise SystemExit(main(parse_args()))
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        raise SystemExit(1) from None
