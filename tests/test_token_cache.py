import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import REPO, byte_tokenizer, chat, repo_tokenizer, write_jsonl

from dataset import token_cache
from dataset.lm_dataset import (
    DataError,
    TextEncoder,
    encode_document,
    load_pretrain,
    load_sft,
    render_conversation,
)

ARRAYS = ("tokens", "offsets", "hashes", "answer_starts", "answer_ends")


def open_cache(path, kind="pretrain", tokenizer=None, **options):
    return token_cache.open_cache(path, kind, TextEncoder.of(tokenizer or repo_tokenizer()), **options)


def contents(cache):
    return {name: getattr(cache, name).tobytes() for name in ARRAYS}


def caches_in(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def test_a_cache_holds_every_document_as_encoded_alone(tmp_path):
    texts = ["one", "你好 😀", "  three\n", "x" * 5000]
    cache = open_cache(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]))
    documents = np.split(cache.tokens, cache.offsets[1:-1])
    assert [d.tolist() for d in documents] == [encode_document(repo_tokenizer(), t) for t in texts]
    assert cache.tokens.dtype == np.uint16 and cache.num_tokens == len(cache.tokens)


def test_a_cache_holds_the_mask_of_every_conversation(tmp_path):
    rows = [chat("a", "b", "c", "d e f"), chat("g", "")]
    cache = open_cache(write_jsonl(tmp_path / "a.jsonl", rows), "sft")
    wanted = [render_conversation(repo_tokenizer(), row["conversations"]) for row in rows]
    ids, is_target = cache.tokens_at(np.arange(cache.num_tokens))
    assert ids.tolist() == wanted[0][0] + wanted[1][0]
    assert is_target.tolist() == [bool(m) for m in wanted[0][1] + wanted[1][1]]
    counts = cache.count_targets(cache.offsets[:-1], np.diff(cache.offsets))
    assert counts.tolist() == [sum(wanted[0][1]), sum(wanted[1][1])]


def test_building_twice_and_with_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 1 << 12)
    file = write_jsonl(
        tmp_path / "a.jsonl", [chat(f"q{i} " * (i % 50), "答 " * (i % 77)) for i in range(2000)]
    )
    caches = [open_cache(file, "sft", cache_dir=tmp_path / str(n), num_workers=n) for n in (0, 1, 2)]
    caches.append(open_cache(file, "sft", cache_dir=tmp_path / "again", num_workers=0))
    assert all(contents(cache) == contents(caches[0]) for cache in caches)


def test_the_second_opening_reads_nothing_but_the_cache(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    os.utime(file, (1, 1))
    first = open_cache(file)
    monkeypatch.setattr(token_cache, "_build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(token_cache.hashlib, "sha256", counted := Counted(token_cache.hashlib.sha256))
    second = open_cache(file)
    assert second.folder == first.folder
    assert counted.bytes < 2_000_000  # the tokenizer's fingerprint; the file itself is known by size and time


class Counted:
    def __init__(self, make):
        self.make, self.bytes = make, 0

    def __call__(self, data=b""):
        self.bytes += len(data)
        return self.make(data)


def test_changed_content_tokenizer_template_or_options_make_another_cache(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a")] * 3)
    folders = [open_cache(file, "sft").folder]
    folders.append(open_cache(file, "sft", byte_tokenizer()).folder)
    changed = byte_tokenizer().chat_template
    try:
        byte_tokenizer().chat_template = changed.replace("# Tools", "# TOOLS")
        folders.append(open_cache(file, "sft", byte_tokenizer()).folder)
    finally:
        byte_tokenizer().chat_template = changed
    load_sft(file, repo_tokenizer(), 64, add_system_ratio=0.5)
    load_sft(file, repo_tokenizer(), 64, add_system_ratio=0.5, seed=1)
    assert len(set(folders)) == 3 and len(caches_in(tmp_path / ".token_cache")) >= 4


def test_a_change_of_the_same_size_within_the_clocks_resolution_is_seen(tmp_path):
    """Trusting size and time of a file written a moment ago would serve old tokens."""
    file = tmp_path / "a.jsonl"
    now = time.time_ns()
    for text in ("one", "two", "six"):
        write_jsonl(file, [{"text": text}])
        os.utime(file, ns=(now, now))
        assert open_cache(file).tokens.tolist() == encode_document(repo_tokenizer(), text)


def test_caches_of_older_content_are_removed(tmp_path):
    file = tmp_path / "a.jsonl"
    for text in ("one", "two", "three"):
        cache = open_cache(write_jsonl(file, [{"text": text}]))
    other = open_cache(write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}]))
    assert caches_in(tmp_path / ".token_cache") == sorted([cache.folder.name, other.folder.name])


def test_a_cache_survives_moving_the_clock_of_its_file(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    first = open_cache(file)
    os.utime(file, (10**9, 10**9))
    assert open_cache(file).folder == first.folder


def test_add_system_ratio_changes_tokens_only_where_it_says(tmp_path):
    rows = [
        chat("q", "a"),
        {"conversations": [{"role": "system", "content": "s"}, *chat("q", "a")["conversations"]]},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows * 20)
    train, _ = load_sft(file, repo_tokenizer(), 128, add_system_ratio=1.0, pack=False)
    text = [repo_tokenizer().decode(train[i]["input_ids"].tolist()) for i in range(40)]
    assert all(t.startswith("<|im_start|>system\n") for t in text)
    assert {re.search("system\n(.*?)<", t).group(1) for t in text[1::2]} == {"s"}
    assert len({re.search("system\n(.*?)<", t).group(1) for t in text[::2]}) > 3


def test_empty_texts_are_skipped_and_counted(tmp_path):
    cache = open_cache(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": " \n"}]))
    assert (cache.num_documents, cache.meta["num_empty"]) == (1, 2)


def test_a_vocabulary_over_65536_uses_four_bytes(tmp_path):
    encoder = TextEncoder.of(repo_tokenizer())
    spec = json.loads(encoder.spec[0])
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<far>", "id": 70_000})
    wide = TextEncoder(json.dumps(spec), *encoder.spec[1:])
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    cache = token_cache.open_cache(file, "pretrain", wide)
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens.tolist() == encode_document(repo_tokenizer(), "one")


def test_a_folder_that_can_not_be_written_falls_back_to_out(tmp_path, monkeypatch):
    file = write_jsonl(
        tmp_path / "data" / "a.jsonl" if (tmp_path / "data").mkdir() is None else None, [{"text": "a"}]
    )
    monkeypatch.setattr(token_cache, "REPO", tmp_path / "repo")
    (tmp_path / "data" / ".token_cache").write_text("in the way: no folder can be made here")
    assert open_cache(file).folder.parent == tmp_path / "repo" / "out" / ".token_cache"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="no folder to write the token cache"):
        open_cache(file, cache_dir=tmp_path / "file")


def test_a_folder_that_is_read_only_by_its_mode_is_left_alone_even_by_root(tmp_path, monkeypatch):
    """Root may write anywhere; a cache once appeared inside a read-only data collection that way."""
    (tmp_path / "data").mkdir()
    file = write_jsonl(tmp_path / "data" / "a.jsonl", [{"text": "a"}])
    monkeypatch.setattr(token_cache, "REPO", tmp_path / "repo")
    (tmp_path / "data").chmod(0o555)
    try:
        assert open_cache(file).folder.parent == tmp_path / "repo" / "out" / ".token_cache"
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["a.jsonl"]
    finally:
        (tmp_path / "data").chmod(0o755)


def test_an_error_in_a_worker_is_reported_like_any_other(tmp_path):
    file = write_jsonl(tmp_path / "数据.jsonl", [{"text": "甲"}] * 3 + [{"text": None}])
    with pytest.raises(DataError, match="数据.jsonl:4:"):
        open_cache(file, num_workers=1)
    assert caches_in(tmp_path / ".token_cache") == []


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 3)

    def ask(self, first_row, block):
        self.process.kill()
        return real(self, first_row, block)

    real = token_cache._Worker.ask
    monkeypatch.setattr(token_cache._Worker, "ask", ask)
    with pytest.raises(RuntimeError, match="tokenizing process ended early"):
        open_cache(file, num_workers=1)
    assert list((tmp_path / ".token_cache").glob("*-pretrain-*")) == []


# ----------------------------------------------------------------------------------------------------------
# Other processes

BUILD = """
import sys, time, resource
sys.path.insert(0, sys.argv[1])
from transformers import PreTrainedTokenizerFast
from dataset import token_cache
from dataset.lm_dataset import TextEncoder
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1] + "/model")
encoder = TextEncoder.of(tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 4:  # be slow, so that the test can interrupt
    real = token_cache._Lock.renew
    def renew(self):
        print("building", flush=True)
        time.sleep(float(sys.argv[4]))
        real(self)
    token_cache._Lock.renew = renew
cache = token_cache.open_cache(sys.argv[2], "pretrain", encoder, num_workers=int(sys.argv[3]))
print(cache.num_tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def start_build(file, *arguments):
    command = [sys.executable, "-c", BUILD, str(REPO), str(file), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_half_cache_and_the_next_one_takes_over(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 1000}] * 500)
    process = start_build(file, 0, 60)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    process.wait()
    folder = tmp_path / ".token_cache"
    (half,) = [p for p in folder.iterdir() if p.is_dir()]
    assert ".building-" in half.name and not (half / "meta.json").exists()
    os.utime(half, (1, 1))
    for lock in folder.glob("*.lock"):
        os.utime(lock, (1, 1))
    cache = open_cache(file)
    assert cache.num_documents == 500
    assert caches_in(folder) == [cache.folder.name] and not list(folder.glob("*.lock"))


def test_two_processes_at_once_build_one_whole_cache(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"word {i} " * 100} for i in range(4000)])
    processes = [start_build(file, 0, 0.1), start_build(file, 1, 0.1)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    cache = open_cache(file)
    assert {int(output[-2]) for output in outputs} == {cache.num_tokens}
    assert contents(cache) == contents(open_cache(file, cache_dir=tmp_path / "alone"))
    assert caches_in(tmp_path / ".token_cache") == [cache.folder.name]
    assert sum("building" in output for output in outputs) == 1  # the other one waited


def test_two_builders_without_a_lock_do_not_corrupt_each_other(tmp_path, monkeypatch):
    """A lock can be broken by a stopped clock or a network file system; the rename still decides."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    real = token_cache._build

    def both(path, kind, encoder, num_workers, options, parts, target, lock):
        real(path, kind, encoder, num_workers, options, parts, target, lock)
        real(path, kind, encoder, num_workers, options, parts, target, lock)

    monkeypatch.setattr(token_cache, "_build", both)
    cache = open_cache(file)
    assert cache.tokens.tolist() == encode_document(repo_tokenizer(), "one")
    assert caches_in(tmp_path / ".token_cache") == [cache.folder.name]


@pytest.mark.skipif(os.name == "nt", reason="resource is not there")
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """6 MB against 60 MB, of lines that repeat so that the test is about memory, not speed."""
    line = json.dumps({"text": "a b " * 4000}).encode() + b"\n"
    used = {}
    for size in (6, 60):
        file = tmp_path / f"{size}.jsonl"
        file.write_bytes(line * (size * 1_000_000 // len(line)))
        process = start_build(file, 0)
        used[size] = int(process.communicate()[0].split()[-1]) / 1024  # MB
    assert used[60] - used[6] < 30, used


def test_worker_processes_import_neither_torch_nor_transformers():
    """They start in a moment, and nothing of the caller's program runs in them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import dataset.lm_dataset, dataset.token_cache, tokenizers, jinja2;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(REPO)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cache_of_a_folder_moved_elsewhere_is_still_good(tmp_path):
    file = write_jsonl(
        tmp_path / "one" / "a.jsonl" if not (tmp_path / "one").mkdir() else None, [{"text": "a"}]
    )
    load_pretrain(file, repo_tokenizer(), 16)
    shutil.move(tmp_path / "one", tmp_path / "two")
    before = {p.name for p in (tmp_path / "two" / ".token_cache").iterdir()}
    train, _ = load_pretrain(tmp_path / "two" / "a.jsonl", repo_tokenizer(), 16)
    assert len(train) == 1
    assert before <= {p.name for p in Path(tmp_path / "two" / ".token_cache").iterdir()}
