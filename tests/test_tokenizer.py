"""The shipped vocabulary, and the script that trains one."""

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dataset.rows import DataError
from trainer import tokenizer_corpus, tokenizer_report
from trainer import train_tokenizer as stage

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def backend():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


# The shipped files ----------------------------------------------------------------------------------

RESERVED = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|object_ref_start|>": 3,
    "<|object_ref_end|>": 4,
    "<|box_start|>": 5,
    "<|box_end|>": 6,
    "<|quad_start|>": 7,
    "<|quad_end|>": 8,
    "<|vision_start|>": 9,
    "<|vision_end|>": 10,
    "<|vision_pad|>": 11,
    "<|image_pad|>": 12,
    "<|video_pad|>": 13,
    "<|audio_start|>": 14,
    "<|audio_end|>": 15,
    "<|audio_pad|>": 16,
    "<tts_pad>": 17,
    "<tts_text_bos>": 18,
    "<tts_text_eod>": 19,
    "<tts_text_bos_single>": 20,
    "<tool_call>": 21,
    "</tool_call>": 22,
    "<tool_response>": 23,
    "</tool_response>": 24,
    "<think>": 25,
    "</think>": 26,
    **{f"<|buffer{i}|>": 26 + i for i in range(1, 10)},
}


def test_reserved_tokens_have_their_ids_and_only_the_first_21_are_special(tokenizer, backend):
    assert len(RESERVED) == 36
    for token, number in RESERVED.items():
        assert tokenizer(token).input_ids == [number]
        assert backend.get_added_tokens_decoder()[number].special == (number <= 20)
    assert sorted(tokenizer.all_special_ids) == list(range(21))


def test_roles_and_size(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.model_max_length == 32768


def test_nothing_is_added_to_a_text(tokenizer):
    text = "plain text, 普通文字"
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert not set(tokenizer(text).input_ids) & set(range(36))


def test_tags_survive_skipping_of_special_tokens(tokenizer):
    ids = tokenizer("<|im_start|><think>a</think><tool_call>b</tool_call><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"


def test_words_are_cut_exactly_as_qwen2_cuts_them():
    """Converters know the word regex by this hash; with any other, llama.cpp would cut text differently."""
    spec = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    digest = hashlib.sha256(split["pattern"]["Regex"].encode()).hexdigest()
    assert digest.startswith("1ff7f410") and digest.endswith("319e")
    assert split == {
        "type": "Split",
        "pattern": {"Regex": stage.WORD_REGEX},
        "behavior": "Isolated",
        "invert": False,
    }
    assert byte_level == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    assert spec["normalizer"] is None and spec["post_processor"] is None
    assert spec["decoder"]["type"] == "ByteLevel"


def test_config_names_what_children_that_see_or_hear_look_up():
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in "image video audio vision_bos vision_eos audio_bos audio_eos".split():
        assert config[f"{key}_token"] in RESERVED
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # readable by transformers 4 and 5
    assert config["clean_up_tokenization_spaces"] is False
    assert "added_tokens_decoder" not in config  # tokenizer.json is the one place that lists them


def test_config_is_what_the_script_would_write():
    """`--config_only model` after an edit of the template keeps the two copies equal."""
    template = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == stage.tokenizer_config(template)


def test_every_digit_is_a_token_of_its_own(tokenizer, backend):
    ids = tokenizer("1234567890 3.14 ２０２６").input_ids
    assert [tokenizer.decode([i]) for i in ids[:10]] == list("1234567890")
    for raw in tokenizer_report.token_bytes(backend)[36:]:
        text = raw.decode("utf-8", "ignore")
        assert sum(character.isdecimal() for character in text) <= 1, text


HOSTILE = [
    "",
    " ",
    "\n\n \n",
    "\r\n\t x",
    "  two blanks before and after  ",
    "你好，世界！今天是２０２６年。",
    "𠮷野家 龘䶵",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 é vs e\u0301",
    "def f(x):\n    return x ** 2  # 平方\n",
    "\x00\x01\x7f\u200b\ufeff\ufffd\U0010ffff",
    "مرحبا بالعالم, שלום, नमस्ते",
    "<|im_start|>assistant\n<think>",
    "a" * 300,
    "我" * 300,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_round_trips_whole_and_streamed(tokenizer, backend, text):
    ids = backend.encode(text, add_special_tokens=False).ids
    assert backend.decode(ids, skip_special_tokens=False) == text
    assert "".join(tokenizer_report.stream_text(ids, tokenizer_report.token_bytes(backend))) == text
    assert tokenizer(text).input_ids == ids


def test_streaming_never_shows_half_a_character(backend):
    text = "字节🙂𠮷é"
    ids = backend.encode(text).ids
    assert len(ids) > len(text)  # some characters need several tokens, else this test shows nothing
    pieces = list(tokenizer_report.stream_text(ids, tokenizer_report.token_bytes(backend)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_streaming_of_a_cut_character_ends_in_one_replacement(backend):
    ids = backend.encode("🙂").ids
    assert "".join(tokenizer_report.stream_text(ids[:-1], tokenizer_report.token_bytes(backend))) == "\ufffd"


def test_text_of_users_need_not_become_reserved_tokens(tokenizer):
    """`split_special_tokens` disarms the 21 special tokens only; tags such as <think> stay. Without the
    list of added tokens no text can become any of the 36: what data code must use."""
    text = "".join(RESERVED)
    framing = "<|im_end|><|im_start|>system"
    assert min(tokenizer(framing, split_special_tokens=True).input_ids) > 35
    assert tokenizer("<think>", split_special_tokens=True).input_ids == [25]

    spec = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    assert min(plain.encode(text).ids) > 35
    assert plain.encode("ordinary text, 普通 1+1").ids == tokenizer("ordinary text, 普通 1+1").input_ids


def test_compression_of_the_built_in_samples(backend):
    """Far below these, somebody changed the vocabulary by mistake."""
    floor = {"Chinese": 3.0, "English": 3.1, "code": 2.3, "digits": 1.0}
    for name, texts in tokenizer_report.SAMPLES.items():
        row = tokenizer_report.measure(backend, texts)
        assert row["bytes_per_token"] >= floor[name] and row["round_trip"] and row["streaming"]


# The script -----------------------------------------------------------------------------------------


def write_corpus(path, num_rows=300, seed=0):
    """A small bilingual corpus out of random words: enough pairs for a few hundred merges."""
    rng = random.Random(seed)
    latin = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    chinese = [
        "".join(rng.choices("天地人山水火木金土日月星云雨风雪", k=rng.randint(1, 3))) for _ in range(200)
    ]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i in range(num_rows):
            text = " ".join(rng.choices(latin, k=12)) if i % 2 else "".join(rng.choices(chinese, k=12)) + "。"
            row = {"text": text} if i % 3 else {"conversations": [{"role": "user", "content": text}]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def train(data, out, *more):
    flags = ["--data_path", str(data), "--out_dir", str(out), "--vocab_size", "400", *map(str, more)]
    stage.main(stage.parse_args(flags))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_training_twice_gives_the_same_bytes(tmp_path, capsys):
    data = write_corpus(tmp_path / "text.jsonl")
    first = train(data, tmp_path / "a")
    assert first == train(data, tmp_path / "b")
    assert sorted(first) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    printed = capsys.readouterr().out
    assert hashlib.sha256(first["tokenizer.json"]).hexdigest() in printed
    assert hashlib.sha256(data.read_bytes()).hexdigest() in printed

    trained = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(trained) == 400 and trained("<|im_start|>").input_ids == [1]
    assert trained.decode(trained("山水 abc 🙂").input_ids) == "山水 abc 🙂"


def test_hash_does_not_depend_on_the_process(tmp_path):
    """A fresh interpreter with another hash seed and one thread trains the same file."""
    data = write_corpus(tmp_path / "text.jsonl")
    here = train(data, tmp_path / "a")["tokenizer.json"]
    command = [sys.executable, str(ROOT / "trainer" / "train_tokenizer.py"), "--data_path", str(data)]
    command += ["--out_dir", "there", "--vocab_size", "400", "--num_threads", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == here


def test_parquet_and_jsonl_of_the_same_rows_train_the_same_vocabulary(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"text": "".join(row)}
        for row in tokenizer_corpus.read_documents(write_corpus(tmp_path / "mixed.jsonl"))
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    a, b = train(tmp_path / "a.jsonl", tmp_path / "x"), train(tmp_path / "a.parquet", tmp_path / "y")
    assert a["tokenizer.json"] == b["tokenizer.json"]


def test_an_existing_tokenizer_is_not_overwritten_unless_asked(tmp_path):
    data = write_corpus(tmp_path / "text.jsonl")
    before = train(data, tmp_path / "a")
    with pytest.raises(DataError, match="--overwrite"):
        train(data, tmp_path / "a", "--zh_share", 0.2)
    assert before["tokenizer.json"] == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert before != train(data, tmp_path / "a", "--zh_share", 0.2, "--overwrite")


def test_sampling_keeps_the_wished_shares_and_the_budget():
    rates = tokenizer_corpus.sampling_rates({"zh": 3_000_000, "en": 1_000_000}, 1_000_000, zh_share=0.5)
    assert rates == {"zh": pytest.approx(1 / 6), "en": pytest.approx(1 / 2)}
    # Too little English: it is taken whole, and Chinese only as much, so that the halves stay halves.
    rates = tokenizer_corpus.sampling_rates({"zh": 3_000_000, "en": 300_000}, 1_000_000, zh_share=0.5)
    assert rates == {"zh": pytest.approx(0.1), "en": pytest.approx(1.0)}
    # A language that is not there takes nothing away from the other.
    assert tokenizer_corpus.sampling_rates({"zh": 500_000, "en": 0}, 1_000_000, zh_share=0.5) == {"zh": 1.0}
    with pytest.raises(DataError, match="zh_share"):
        tokenizer_corpus.sampling_rates({"zh": 0, "en": 500_000}, 1_000_000, zh_share=1.0)


def test_languages_are_told_apart():
    assert tokenizer_corpus.language_of(["今天天气很好"]) == "zh"
    assert tokenizer_corpus.language_of(["the weather, naïve café"]) == "en"
    assert tokenizer_corpus.language_of(["for (i = 0; i < n; ++i)"]) == "en"
    assert tokenizer_corpus.language_of([""]) == "en"


def test_held_out_documents_are_never_trained_on(tmp_path):
    data = write_corpus(tmp_path / "text.jsonl")
    corpus = tokenizer_corpus.Corpus([data], 10**9, zh_share=0.5, holdout=0.3, quiet=True)
    trained = "\n".join(piece for batch in corpus.training_pieces() for piece in batch)
    heldout = [text for texts in corpus.heldout().values() for text in texts]
    assert len(heldout) > 30 and trained
    assert not [text for text in heldout if text in trained]


def test_a_repeated_text_counts_once(tmp_path):
    data = tmp_path / "text.jsonl"
    rows = [{"text": "the same words"}] * 50 + [{"text": "别的文字"}]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    corpus = tokenizer_corpus.Corpus([data], 10**9, zh_share=0.5, holdout=0.0, quiet=True)
    corpus.rates = {"zh": 1.0, "en": 1.0}
    assert [piece for batch in corpus.training_pieces() for piece in batch] == ["the same words", "别的文字"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="我你他，。ab 1\n", max_size=200))
def test_cut_runs_join_to_the_text_and_are_short(text):
    pieces = tokenizer_corpus.split_long_runs(text, max_cjk=5, max_run=9)
    assert "".join(pieces) == text
    for piece in pieces:
        assert max(map(len, re.findall(r"[我你他]+", piece)), default=0) <= 5
        assert max(map(len, re.findall(r"[，。ab1]+", piece)), default=0) <= 9
        assert max(map(len, re.findall(r"[ \n]+", piece)), default=0) <= 9


def test_runs_of_chinese_are_cut_so_that_memory_stays_bounded():
    text = "天地玄黄宇宙洪荒" * 1000
    pieces = tokenizer_corpus.split_long_runs(text)
    assert set(pieces) == {"天地玄黄宇宙洪荒"} and len(pieces) == 1000


def test_pieces_are_drawn_lazily(tmp_path):
    """A file far larger than memory must work: what is held at a time does not grow with it."""
    data = tmp_path / "text.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for i in range(400):
            file.write(json.dumps({"text": f"document {i} " + "word " * 2000}) + "\n")
    corpus = tokenizer_corpus.Corpus([data], 10**9, zh_share=0.5, holdout=0.0, quiet=True)
    sizes = [sum(map(len, batch)) for batch in corpus.training_pieces()]
    assert len(sizes) >= 3 and max(sizes) < 1_100_000


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": broken}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "x"}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": 5}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xb0\xa1"}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"conversations": [{"role": "user"}]}\n', "a.jsonl:1"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt:2"),
        ("a.jsonl", b"", "a.jsonl"),
        ("a.txt", b"", "a.txt"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl"),
        ("a.parquet", b"no parquet", "a.parquet"),
    ],
)
def test_bad_input_is_named_with_file_and_line(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        train(tmp_path / name, tmp_path / "out")
    assert where in str(error.value) and not (tmp_path / "out").exists()


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "three short words"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="vocab_size"):
        train(tmp_path / "a.jsonl", tmp_path / "out", "--holdout", 0)


def test_a_missing_file_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "trainer" / "train_tokenizer.py"), "--data_path", "nowhere.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert "nowhere.jsonl" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_evaluation_prints_its_tables(capsys):
    stage.main(stage.parse_args(["--eval_only", str(MODEL), "--compare", str(MODEL)]))
    printed = capsys.readouterr().out
    for word in ("Chinese", "digits", "Qwen2", "151643", "77.5%", "12.7%", "<|im_start|>assistant"):
        assert word in printed
    assert "BROKEN" not in printed
