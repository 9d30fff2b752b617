"""Tokenize a file once, in parallel and in constant memory, into arrays that are mapped instead of loaded.

A cache is a folder `<file>-<kind>-<key>` of plain little-endian arrays, N documents and M tokens in all:

    tokens.bin         uint16 (uint32 for vocabularies over 65,536)  (M,)  ids, document after document
    offsets.bin        int64  (N+1,)  where each document starts
    hashes.bin         uint64 (N,)    content hash, which decides the held-out documents
    answer_starts.bin, answer_ends.bin  int64  spans of target tokens, sorted (conversations only)
    meta.json          counts, source, and what the key was made of

The key is a hash of the file's content, the tokenizer, the chat template and the format version, so a cache
is never out of date: another file or tokenizer simply has another name. Folders appear whole (written aside,
then renamed). One process builds while others wait for it.

Worker processes are this very file started with `--worker`, fed through pipes: no fork, nothing of the
caller's program is imported again, and they end when the caller does.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import collections
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid

import numpy as np

from dataset import packing
from dataset.rows import (
    BLOCK_BYTES,
    DOCTOR,
    DataError,
    RowError,
    conversation,
    iter_blocks,
    parse_line,
    pretrain_text,
    validate,
)

FORMAT_VERSION = 1
STALE_LOCK_SECONDS = 60
SMALL_FILE_BYTES = 6 << 20  # starting workers takes longer than this
REPO = Path(__file__).resolve().parents[1]
BUILDING: list[float] = []  # seconds of each cache that this process had to build


class TokenCache:
    """One opened cache folder. Arrays are memory maps; pickling it passes the folder's name only."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.source = self.meta["source"]
        self.num_documents = self.meta["num_documents"]
        self.num_tokens = self.meta["num_tokens"]
        self.tokens = self._map("tokens.bin", np.dtype(self.meta["dtype"]))
        self.offsets = self._map("offsets.bin", np.int64)
        self.hashes = self._map("hashes.bin", np.uint64)
        self.has_answers = self.meta["kind"] != "pretrain"
        self.answer_starts = self._map("answer_starts.bin", np.int64)
        self.answer_ends = self._map("answer_ends.bin", np.int64)

    def __reduce__(self):
        return TokenCache, (self.folder,)

    def _map(self, name, dtype):
        path = self.folder / name
        if not path.stat().st_size:
            return np.empty(0, dtype)  # an empty file can not be mapped
        return np.memmap(path, dtype, mode="r").view(np.ndarray)

    def tokens_at(self, positions):
        """Ids (int64) at the given positions, and whether each may be a target."""
        ids = self.tokens[positions].astype(np.int64)
        if not self.has_answers:
            return ids, np.ones(len(ids), bool)
        if not len(self.answer_starts):
            return ids, np.zeros(len(ids), bool)
        span = np.searchsorted(self.answer_starts, positions, side="right") - 1
        return ids, (span >= 0) & (positions < self.answer_ends[np.maximum(span, 0)])

    def count_targets(self, starts, lengths):
        """(P,) targets of each piece."""
        if not self.has_answers:
            return np.maximum(lengths - 1, 0)
        return packing.count_targets(self.answer_starts, self.answer_ends, starts, lengths)


def open_cache(path, kind, encoder, cache_dir=None, num_workers=None, options=None):
    """The TokenCache of a file for `kind` ("pretrain", "sft" or "dpo"), built now if there is none.

    kind "dpo": every row makes two documents, the chosen one and the rejected one, and the last answer is all
    that is a target. encoder: `lm_dataset.TextEncoder`. num_workers: processes (0 = none, in this process;
    None = by file size and CPUs). options: what else decides the ids, e.g. {"add_system_ratio": 0.2, "seed":
    42}. Raises DataError.
    """
    folder = _writable_folder(path, cache_dir)
    content = _content_hash(path, folder)
    parts = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "content": content,
        "tokenizer": encoder.fingerprint(with_template=kind != "pretrain"),
        "options": options or {},
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / f"{_safe_name(path)}-{kind}-{key}"
    lock = _Lock(folder / f"{target.name}.lock")
    while not (target / "meta.json").exists():
        if lock.take():
            try:
                if not (target / "meta.json").exists():
                    _remove_leftovers(folder)
                    begin = time.monotonic()
                    _build(path, kind, encoder, num_workers, options or {}, parts, target, lock)
                    BUILDING.append(time.monotonic() - begin)
                    _remove_stale(target)
            finally:
                lock.release()
        else:
            lock.wait(target)
    return TokenCache(target)


# ------------------------------------------------------------------------------------------------------------
# Where, and under which name


def _writable_folder(path, cache_dir):
    """The given folder, or .token_cache beside the file, or out/.token_cache where that can not be
    written."""
    beside = Path(path).resolve().parent / ".token_cache" if Path(path).exists() else None
    if beside and not beside.parent.stat().st_mode & 0o222:
        beside = None  # read-only by its mode: an administrator could write there all the same, and must not
    for folder in [Path(cache_dir)] if cache_dir else [beside, REPO / "out" / ".token_cache"]:
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
            except OSError:
                continue
    tried = cache_dir or beside or "out/.token_cache"
    raise DataError(f"no folder to write the token cache to (tried {tried}): give a writable cache_dir")


def _safe_name(path):
    return "".join(c if c.isalnum() or c in "._" else "_" for c in Path(path).name)[:80]


def _content_hash(path, folder):
    """SHA-256 of the file. Remembered by path, size and time, unless the file was written a moment ago: then
    a second change within the clock's resolution could go unnoticed."""
    file = Path(path)
    if not file.is_file():
        return f"name:{path}"  # a data set of the hub, or missing: reading it will tell
    stat = file.stat()
    seen = {"path": str(file.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    place = hashlib.sha256(os.fsencode(seen["path"])).hexdigest()[:8]
    note = folder / f"{_safe_name(path)}-{place}.seen.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if all(known.get(name) == value for name, value in seen.items()):
            return known["content"]
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(1 << 22):
            digest.update(data)
    content = digest.hexdigest()
    if abs(time.time() - stat.st_mtime) > 5:
        _write_whole(note, json.dumps({**seen, "content": content}))
    return content


def _write_whole(path, text):
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _remove_leftovers(folder):
    """Half-built caches whose builder is gone."""
    for part in folder.glob("*.building-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_LOCK_SECONDS:
                owner = part.name.rsplit("-", 2)
                if not _alive(owner[-2]) or time.time() - part.stat().st_mtime > 86400:
                    shutil.rmtree(part, ignore_errors=True)


def _alive(pid):
    if os.name == "nt":
        return True  # os.kill would end it; the age decides alone
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


def _remove_stale(target, keep_others=3):
    """Caches of the same source and kind: those of older content or format go; of other tokenizers, templates
    and options the newest few stay."""
    mine = json.loads((target / "meta.json").read_text(encoding="utf-8"))
    others = []
    for folder in target.parent.glob("*-*-*"):
        if folder == target or not (folder / "meta.json").exists():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["source"] != mine["source"] or meta["kind"] != mine["kind"]:
                continue
            key, my_key = meta["key"], mine["key"]
            if key["content"] != my_key["content"] or key["format"] != my_key["format"]:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                others.append((folder.stat().st_mtime, folder))
    for _, folder in sorted(others)[:-keep_others]:
        shutil.rmtree(folder, ignore_errors=True)


class _Lock:
    """A file that says who is building. Its time is renewed while work goes on, so a killed builder is
    noticed."""

    def __init__(self, path):
        self.path = path
        self.renewed = 0.0

    def take(self):
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, PermissionError):
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()} {socket.gethostname()}")
        return True

    def renew(self):
        if time.monotonic() - self.renewed > 2:
            self.renewed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self):
        with contextlib.suppress(OSError):
            self.path.unlink()

    def wait(self, target):
        """Until the cache is there, or its builder is gone."""
        told = False
        while self.path.exists() and not (target / "meta.json").exists():
            with contextlib.suppress(OSError, ValueError):
                pid, host = self.path.read_text(encoding="utf-8").split()
                gone = host == socket.gethostname() and not _alive(pid)
                if gone or time.time() - self.path.stat().st_mtime > STALE_LOCK_SECONDS:
                    self.release()
                    return
            if not told:
                print(f"waiting for another process to finish {target.name}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)


# ------------------------------------------------------------------------------------------------------------
# Building


def _build(path, kind, encoder, num_workers, options, parts, target, lock):
    dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")
    part = target.with_name(f"{target.name}.building-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    before = Path(path).stat() if size else None
    if num_workers is None:
        num_workers = 0 if size and size < SMALL_FILE_BYTES else min(_cpus(), 32)
    task = {"path": str(path), "kind": kind, "dtype": dtype.str, "options": options}
    names = ("tokens", "offsets", "hashes", "answer_starts", "answer_ends")
    num_documents = num_tokens = num_answers = num_empty = 0
    progress = _Progress(Path(path).name, size)
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((part / f"{name}.bin").open("wb")) for name in names}
            files["offsets"].write(np.zeros(1, np.int64).tobytes())
            blocks = iter_blocks(path, BLOCK_BYTES)
            results = _encode_blocks(blocks, encoder.spec, task, num_workers)
            stack.enter_context(contextlib.closing(results))  # ends the workers whatever happens
            for result, read in results:
                if "error" in result:
                    raise DataError(result["error"])
                files["tokens"].write(result["tokens"])
                lengths = np.frombuffer(result["lengths"], np.int64)
                files["offsets"].write((np.cumsum(lengths) + num_tokens).tobytes())
                files["hashes"].write(result["hashes"])
                for name in ("answer_starts", "answer_ends"):
                    files[name].write((np.frombuffer(result[name], np.int64) + num_tokens).tobytes())
                num_answers += len(result["answer_starts"]) // 8
                num_documents += len(lengths)
                num_tokens += int(lengths.sum())
                num_empty += result["num_empty"]
                lock.renew()
                progress.add(read, num_tokens)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        if not num_documents:
            raise DataError(
                f"{path}: no documents ({num_empty} rows have an empty text): nothing to train on"
            )
        if before is not None and _changed(before, Path(path).stat()):
            raise DataError(f"{path} changed while it was read: start again when it is complete")
        meta = {
            "source": str(Path(path).resolve()) if size else str(path),
            "kind": kind,
            "key": parts,
            "dtype": dtype.str,
            "num_documents": num_documents,
            "num_tokens": num_tokens,
            "num_answers": num_answers,
            "num_empty": num_empty,
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(part, target)
        except OSError:
            if not (target / "meta.json").exists():
                raise
            # another process was faster; both hold the same
        progress.end(num_documents, num_tokens)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _changed(before, after):
    return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def _cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_blocks(blocks, spec, task, num_workers):
    """Yield `(result, bytes read)` in the order of the blocks, with few blocks in flight."""
    if not num_workers:
        encode = _block_encoder(spec, task)
        for first_row, block in blocks:
            # no thread pool in a process that may fork later (data loaders, launchers)
            with _no_tokenizer_threads():
                yield encode(first_row, block), len(block)
        return
    from concurrent.futures import ThreadPoolExecutor

    mine = threading.local()
    workers = []

    def run(first_row, block):
        if not hasattr(mine, "worker"):
            mine.worker = _Worker(spec, task)
            workers.append(mine.worker)
        return mine.worker.ask(first_row, block), len(block)

    pool = ThreadPoolExecutor(num_workers)  # a thread only waits for its process
    try:
        waiting = collections.deque()
        for first_row, block in blocks:
            waiting.append(pool.submit(run, first_row, block))
            if len(waiting) > num_workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        pool.shutdown()
        for worker in workers:  # one may have been starting just then
            worker.kill()


class _Worker:
    """A process that encodes blocks; one question, one answer."""

    def __init__(self, spec, task):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.settings = dict(spec=spec, task=task)

    def ask(self, first_row, block):
        try:
            if self.settings:
                _send(self.process.stdin, **self.settings)
                self.settings = None
            _send(self.process.stdin, first_row=first_row, block=block)
            return _receive(self.process.stdout)
        except (EOFError, OSError):
            raise RuntimeError(
                f"a tokenizing process ended early (exit code {self.process.wait()}): out of memory? "
                "Try num_workers=0"
            ) from None

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def _send(stream, **values):
    """One message: a line of JSON, then the values that are bytes, as they are."""
    parts = {name: value for name, value in values.items() if isinstance(value, bytes)}
    plain = {name: value for name, value in values.items() if name not in parts}
    head = {"plain": plain, "sizes": {name: len(part) for name, part in parts.items()}}
    stream.write(json.dumps(head).encode() + b"\n")
    for part in parts.values():
        stream.write(part)
    stream.flush()


def _receive(stream) -> dict:
    head = stream.readline()
    if not head.endswith(b"\n"):
        raise EOFError
    head = json.loads(head)
    message = head["plain"]
    for name, size in head["sizes"].items():
        message[name] = stream.read(size)
        if len(message[name]) < size:
            raise EOFError
    return message


def _worker_main():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes to the terminal, not into the answers
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        encode = _block_encoder(**_receive(sys.stdin.buffer))
        while True:
            _send(answers, **encode(**_receive(sys.stdin.buffer)))
    os._exit(0)


@contextlib.contextmanager
def _no_tokenizer_threads():
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _block_encoder(spec, task):
    """A function `(first_row, bytes) -> dict of array bytes`, or {"error": message} for the first bad row."""
    from dataset.lm_dataset import TextEncoder, with_system_prompt

    encoder = TextEncoder(*spec)
    path, kind, dtype, options = task["path"], task["kind"], np.dtype(task["dtype"]), task["options"]

    def encode(first_row, block):
        items, hashes, num_empty = [], [], 0
        for number, line in enumerate(block.split(b"\n"), first_row):
            if not line.strip():
                continue
            try:
                row = parse_line(line)
                if kind == "pretrain":
                    item = text = pretrain_text(row)
                    if not text.strip():
                        num_empty += 1
                        continue
                elif kind == "dpo":
                    item = pair = validate(row, "dpo")
                    text = _question(pair["chosen"][0][:-1])
                else:
                    messages, tools = conversation(row)
                    if options.get("add_system_ratio"):
                        messages = with_system_prompt(
                            messages, tools, options["add_system_ratio"], options["seed"], number
                        )
                    item, text = (messages, tools), _question(messages)
            except RowError as error:
                return {"error": f"{path}:{number}: {error}; {DOCTOR}"}
            items.append(item)
            hashes += [hashlib.blake2b(text.encode(), digest_size=8).digest()] * (2 if kind == "dpo" else 1)
        if kind == "pretrain":
            ids, starts, ends = encoder.encode_documents(items), (), ()
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        else:
            try:
                if kind == "dpo":
                    pairs = [encoder.encode_pair(item["chosen"], item["rejected"]) for item in items]
                    encoded = [
                        (prompt + answer, [0] * len(prompt) + [1] * len(answer))
                        for prompt, *answers in pairs
                        for answer in answers
                    ]
                else:
                    encoded = encoder.encode_conversations(items)
            except DataError as error:
                return {"error": f"{path}: {error}"}
            ids = [one for one, _ in encoded]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            mask = np.fromiter((bit for _, one in encoded for bit in one), np.int8, int(lengths.sum()))
            edges = np.diff(mask, prepend=0, append=0)
            starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        tokens = np.empty(int(lengths.sum()), dtype)
        position = 0
        for one in ids:
            tokens[position : position + len(one)] = one
            position += len(one)
        return {
            "tokens": tokens.tobytes(),
            "lengths": lengths.tobytes(),
            "hashes": b"".join(hashes),
            "answer_starts": np.asarray(starts, np.int64).tobytes(),
            "answer_ends": np.asarray(ends, np.int64).tobytes(),
            "num_empty": num_empty,
        }

    return encode


def _question(messages):
    """What precedes the first answer, without the system message: equal questions must be held out
    together."""
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] != "system":
            texts.append(f"{message['role']}\n{message['content']}")
    return "\n".join(texts)


class _Progress:
    """One line on stderr, rewritten on a terminal, else now and then; silent for what takes a moment."""

    def __init__(self, name, total):
        self.name, self.total, self.done = name, total, 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.shown = False

    def add(self, read, num_tokens):
        self.done += read
        now = time.monotonic()
        if now - self.last < (0.5 if self.terminal else 10):
            return
        self.last, self.shown = now, True
        rate = self.done / (now - self.start)
        line = (
            f"tokenizing {self.name}: {self.done / 1e6:,.1f} MB, {num_tokens:,} tokens, {rate / 1e6:.1f} MB/s"
        )
        if self.total:
            left = max(self.total - self.done, 0) / rate
            line += f", {min(100 * self.done / self.total, 100):.0f}%, {left:.0f} s left"
        print(
            f"\r{line}\x1b[K" if self.terminal else line,
            end="" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self, num_documents, num_tokens):
        seconds = time.monotonic() - self.start
        if self.shown or seconds > 3:
            print(
                f"{chr(13) if self.terminal else ''}tokenized {self.name}: {num_documents:,} documents, "
                f"{num_tokens:,} tokens in {seconds:.1f} s ({self.done / 1e6 / seconds:.1f} MB/s), "
                "kept for next time",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _worker_main()
    raise SystemExit("this is a library: load_pretrain and load_sft of dataset/lm_dataset.py use it")
