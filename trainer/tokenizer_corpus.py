"""The text that a tokenizer learns from: files read in constant memory, and a balanced sample of them.

`trainer/train_tokenizer.py` trains on what `Corpus.training_pieces` yields.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from dataset.rows import DOCTOR, DataError, RowError, conversation, iter_blocks, iter_json, pretrain_text

# Reading ------------------------------------------------------------------------------------------


def read_documents(path: Path) -> Iterator[list[str]]:
    """Yield the documents of one file as lists of strings, in constant memory. A row with "text" gives one
    string, a conversation one per message and tool. Raises DataError with file, line and remedy."""
    if not path.is_file():
        raise DataError(f"{path} is not a file. Give the path of a .jsonl, .json, .parquet or .txt file")
    if path.suffix == ".txt":
        yield from _read_plain(path)
        return
    for first_row, block in iter_blocks(path):
        for number, row in iter_json(path, first_row, block):
            try:
                yield [pretrain_text(row)] if "text" in row else _said(*conversation(row, need_answer=False))
            except RowError as error:
                raise DataError(f"{path}:{number}: {error}; {DOCTOR}") from None


def _said(messages: list[dict], tools: list[dict] | None) -> list[str]:
    texts = [json.dumps(tool, ensure_ascii=False) for tool in tools or []]
    for message in messages:
        texts += [message["content"], message.get("reasoning_content", "")]
        for call in message.get("tool_calls", []):
            texts.append(f'{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}')
    return [text for text in texts if text]


def _read_plain(path: Path) -> Iterator[list[str]]:
    """A .txt file in documents of about 4,000 bytes, cut at line ends."""
    lines, size = [], 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                lines.append(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1});"
                    " convert the file, e.g. `iconv -f GB18030 -t UTF-8 IN > OUT`"
                ) from None
            size += len(raw)
            if size > 4000:
                yield ["".join(lines)]
                lines, size = [], 0
    if lines:
        yield ["".join(lines)]


# Sampling -----------------------------------------------------------------------------------------


def language_of(document: list[str]) -> str:
    """'zh' if at least a quarter of the UTF-8 bytes belongs to characters of three bytes (nearly always
    Chinese), else 'en' (English, code, numbers). Cheap: needs only two lengths."""
    characters = sum(map(len, document))
    num_bytes = sum(len(text.encode("utf-8")) for text in document)
    return "zh" if (num_bytes - characters) * 1.5 >= 0.25 * num_bytes and num_bytes else "en"


def content_hash(*texts: str) -> int:
    """64 bits that depend on nothing but the text."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def place_of(document: list[str]) -> float:
    """A number in [0, 1) that depends on nothing but the content. Thresholds on it choose samples: no seed,
    no state, and a document keeps its fate when others are added."""
    return content_hash(*document) / 2**64


def sampling_rates(num_bytes: dict[str, int], max_bytes: int, zh_share: float) -> dict[str, float]:
    """Probability per language to take a document, so that about max_bytes are taken in the wished shares.
    A language with too little text is taken whole; the other shrinks with it, so that the shares hold."""
    share = {"zh": zh_share, "en": 1 - zh_share}
    present = {name: share[name] for name in share if share[name] > 0 and num_bytes.get(name, 0) > 0}
    if not present:
        raise DataError(
            f"no text in the wished language (bytes found: {num_bytes}). Change --zh_share or the data"
        )
    whole = sum(present.values())
    budget = min([max_bytes] + [num_bytes[name] * whole / part for name, part in present.items()])
    return {name: min(1.0, budget * part / whole / num_bytes[name]) for name, part in present.items()}


def split_long_runs(text: str, max_cjk: int = 8, max_run: int = 64) -> list[str]:
    """Cut runs that the word regex would count as one enormous word. Chinese has no blanks: a clause is one
    "word", so nearly all words would be different, which costs memory and lets BPE learn whole sentences by
    heart. Only training sees these cuts; the shipped tokenizer cuts with the regex alone. Joined, the pieces
    are the text."""
    cjk, other, blank = r"[\u3400-\u9fff]", r"[^\s\u3400-\u9fff]", r"\s"
    runs = ((cjk, max_cjk), (other, max_run), (blank, max_run))
    pattern = re.compile("|".join(rf"{kind}{{{length}}}(?={kind})" for kind, length in runs))
    pieces, start = [], 0
    for match in pattern.finditer(text):
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return [piece for piece in pieces if piece]


class Corpus:
    """A balanced sample of some files, streamed: memory does not depend on their size."""

    def __init__(
        self, paths: list[Path], max_bytes: int, zh_share: float, holdout: float, quiet: bool = False
    ):
        self.paths, self.holdout, self.quiet = paths, holdout, quiet
        self.num_documents, self.num_bytes, num_bytes = 0, {}, {"zh": 0, "en": 0}
        for document in self._stream("measuring"):
            self.num_documents += 1
            num_bytes[language_of(document)] += sum(len(text.encode("utf-8")) for text in document)
        self.num_bytes = num_bytes
        if not sum(self.num_bytes.values()):
            raise DataError(f"no text found in {', '.join(map(str, paths))}. Pass files with text in them")
        self.rates = sampling_rates(self.num_bytes, max_bytes, zh_share)
        self.sampled_bytes = {"zh": 0, "en": 0}

    def _stream(self, what: str) -> Iterator[list[str]]:
        """All documents, with a line of progress every few seconds. The second time the total is known;
        the first time it is guessed from the size of the files."""
        total = sum(self.num_bytes.values()) or sum(
            path.stat().st_size for path in self.paths if path.is_file()
        )
        seen, begin, last = 0, time.time(), time.time()
        for document in itertools.chain.from_iterable(map(read_documents, self.paths)):
            yield document
            seen += sum(len(text.encode("utf-8")) for text in document)
            if not self.quiet and time.time() - last > 3:
                last = time.time()
                speed = seen / (last - begin)
                left = max(total - seen, 0) / speed
                print(
                    f"{what} {min(seen / total, 1):4.0%} | {speed / 1e6:.1f} MB/s | {left:.0f} s left",
                    flush=True,
                )

    def expected_bytes(self) -> float:
        """Size of the sample, before it is drawn."""
        return sum(rate * self.num_bytes[name] for name, rate in self.rates.items()) * (1 - self.holdout)

    def training_pieces(self) -> Iterator[list[str]]:
        """Batches of strings for the BPE trainer. A string that occurs again (system prompt, tool definition)
        counts once: else its words would outweigh the language."""
        self.sampled_bytes = {"zh": 0, "en": 0}
        batch, size, seen = [], 0, set()
        for document in self._stream("sampling"):
            language = language_of(document)
            if place_of(document) >= self.rates.get(language, 0.0) * (1 - self.holdout):
                continue
            for text in document:
                key = content_hash(text)
                if key in seen:
                    continue
                seen.add(key)
                self.sampled_bytes[language] += len(text.encode("utf-8"))
                batch += split_long_runs(text)
                size += len(text)
            if size > 1_000_000:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def heldout(self, max_bytes: int = 1_000_000) -> dict[str, list[str]]:
        """Documents that training never saw, at most max_bytes per language."""
        kept, size = {"zh": [], "en": []}, {"zh": 0, "en": 0}
        for document in self._stream("held-out"):
            language = language_of(document)
            if place_of(document) >= 1 - self.holdout and size[language] < max_bytes:
                kept[language] += document
                size[language] += sum(len(text.encode("utf-8")) for text in document)
        return {f"held-out {name}": texts for name, texts in kept.items() if texts}
