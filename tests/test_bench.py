"""The bench measures what it says: bits per byte by hand, one held-out text for all, honest summaries."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench
from scripts import bench_contenders as contenders

MINIMIND = os.environ.get("MINIMIND_PATH")
SENTENCES = [
    "The moon turns around the earth in about twenty-seven days.",
    "月亮绕着地球转，大约二十七天转一圈。",
    "A list in Python keeps its order; a set does not.",
    "春天来了，树上长出了新的叶子，孩子们在院子里玩。",
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(240):
            text = f"{i}. " + " ".join(SENTENCES[(i + k) % 4] for k in range(1 + i % 5))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


def shape(**more):
    from model.model_minimind import MiniMindConfig

    small = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_norm=True
    )
    config = MiniMindConfig(**(small | more))
    fields = [*contenders.DENSE_FIELDS, *contenders.MOE_FIELDS, "use_moe", "n_shared_experts", "qk_norm"]
    return {name: getattr(config, name) for name in fields}


# -- bits per byte


def test_bits_per_byte_by_hand():
    # 3 tokens of probability 1/4 and one of 1/2: 3 * 2 + 1 = 7 bits, over 14 bytes
    nats = 3 * math.log(4) + math.log(2)
    assert math.isclose(contenders.bits_per_byte(nats, 14), 0.5)


def test_segments_are_cut_between_characters_and_join_to_the_text():
    text = "ab" + "中" * 5 + "c"  # 2 + 15 + 1 bytes
    pieces = contenders.split_segments(text, 7)
    assert pieces == ["ab中", "中中", "中中c"]
    assert "".join(pieces) == text
    assert contenders.split_segments("", 7) == []


def test_segment_nats_of_a_uniform_model_is_log_vocabulary_per_token():
    rows = [[1, 5, 6, 7], [1, 2], [1, 3, 3]]
    nats = contenders.segment_nats(lambda ids: torch.zeros(*ids.shape, 8), rows, batch_rows=2)
    assert nats == pytest.approx([3 * math.log(8), math.log(8), 2 * math.log(8)])


def test_segment_nats_scores_each_token_by_the_logits_before_it():
    """A model that is sure of (previous token + 1): sure and right costs nothing, sure and wrong a lot."""

    def logits_of(ids):
        return 50.0 * torch.nn.functional.one_hot((ids + 1) % 8, 8)

    nats = contenders.segment_nats(logits_of, [[1, 2, 3, 4], [1, 2, 7]], batch_rows=4)
    assert nats[0] == pytest.approx(0, abs=1e-6)
    assert nats[1] == pytest.approx(50, abs=1e-3)


def test_token_bytes_add_up_to_the_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    widths = contenders.token_bytes(tokenizer)
    text = "".join(SENTENCES) + " 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(widths[i] for i in ids) == len(text.encode())
    assert widths[tokenizer.bos_token_id] == widths[tokenizer.pad_token_id] == 0


# -- the held-out text


def test_split_keeps_copies_together_and_writes_every_document_once(text_file, tmp_path):
    with text_file.open("a", encoding="utf-8") as file:
        file.write(text_file.read_text(encoding="utf-8").splitlines()[0] + "\n")
    train, val = bench.split_text(text_file, tmp_path / "out", 0.2)
    sides = [
        [json.loads(x)["text"] for x in p.read_text(encoding="utf-8").splitlines()] for p in (train, val)
    ]
    assert len(sides[0]) + len(sides[1]) == 241
    assert not set(sides[0]) & set(sides[1])
    assert 20 < len(sides[1]) < 80
    segments, is_first = contenders.validation_segments(val, max_bytes=60, total_bytes=2000)
    assert 2000 <= sum(len(s.encode()) for s in segments) < 2060 and any(is_first) and not all(is_first)
    assert bench.split_text(text_file, tmp_path / "out", 0.2) == (train, val)
    other, other_val = bench.split_text(text_file, tmp_path / "out", 0.2, seed=1)
    assert other_val.read_text(encoding="utf-8") != val.read_text(encoding="utf-8")
    assert other.read_text(encoding="utf-8") != train.read_text(encoding="utf-8")


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"no": 1}\n', encoding="utf-8")
    with pytest.raises(bench.BenchError, match=r"bad.jsonl:2"):
        bench.split_text(path, tmp_path / "out", 0.5)


# -- jobs


def test_transformers_peer_trains_and_is_scored(text_file, tmp_path, threads):
    weights = tmp_path / "peer.pth"
    job = dict(
        contender="transformers", train_path=text_file, tokenizer=str(ROOT / "model"), shape=shape(), seed=1,
        threads=threads, device="cpu", autocast=False, compile=False, clock="wall", seconds=60, max_updates=6,
        learning_rate=1e-2, batch_size=4, accumulation=2, max_seq_len=48, workers=0, weights=weights,
    )  # fmt: skip
    result = contenders.job_train(job)
    assert result["updates"] == 6
    assert 0 < result["tokens"] <= result["slots"] <= 6 * 2 * 4 * 47
    assert 1.5 < result["bytes"] / result["tokens"] < 6
    scored = contenders.job_evaluate(job | {"val_path": text_file, "val_bytes": 1500})
    assert 0.5 < scored["bpb"] < math.log2(6400)
    assert scored["val_bytes"] >= 1500 and scored["longest_segment_tokens"] <= 340


def test_ours_and_transformers_score_the_same_weights_alike(text_file, tmp_path, threads):
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**shape(), residual_init="normal"))
    path = tmp_path / "ours.pth"
    torch.save(model.state_dict(), path)
    job = dict(
        shape=shape(), weights=path, tokenizer=str(ROOT / "model"), val_path=text_file, val_bytes=1000,
        threads=threads, device="cpu",
    )  # fmt: skip
    ours, theirs = (contenders.job_evaluate(job | {"contender": c}) for c in ("ours", "transformers"))
    assert ours["bpb"] == pytest.approx(theirs["bpb"], abs=1e-5)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_generation_makes_identical_tokens_and_counts_them(qk_norm, threads):
    job = dict(
        shape=shape(qk_norm=qk_norm), weights=None, minimind=None, seed=3, threads=threads, device="cpu",
        dtypes=["float32"], batches=[1, 3], new_tokens=12, prompt_tokens=5, repeats=1, compile=0,
    )  # fmt: skip
    found = contenders.job_generate(job)
    assert found["identical"] and min(found["different_tokens"]) > 3
    assert {(r["engine"], r["batch"]) for r in found["results"]} == {
        (f"{who} float32", b) for who in ("ours", "transformers") for b in (1, 3)
    } | {("(products alone) float32", b) for b in (1, 3)}
    assert all(len(r["seconds"]) == 1 and r["tokens_per_second"] > 0 for r in found["results"])


def test_the_ratio_of_what_auto_takes_comes_first():
    speed = {"transformers float32": 100.0, "transformers bfloat16": 80.0, "MiniMind float32": 50.0}
    speed |= {"ours float32": 150.0, "ours bfloat16": 160.0, "ours int8": 300.0, "(products alone) int8": 9e3}
    theirs, ours, ratios = bench.compare_generation(speed, "transformers", "int8")
    assert (theirs, ours) == ("transformers float32", "ours int8")
    assert list(ratios.items()) == [("auto (int8)", 3.0), ("best float type", 1.6), ("both float32", 1.5)]
    compiled = speed | {"ours int8 compiled": 400.0}
    _, ours, ratios = bench.compare_generation(compiled, "transformers", "int8")
    assert ours == "ours int8 compiled"
    assert list(ratios.items())[:2] == [("auto (int8 compiled)", 4.0), ("auto (int8)", 3.0)]
    _, ours, ratios = bench.compare_generation(speed, "MiniMind", "bfloat16")
    assert ours == "ours bfloat16" and next(iter(ratios.items())) == ("auto (bfloat16)", 3.2)
    assert ratios["int8"] == 6.0
    del speed["ours int8"]
    _, ours, ratios = bench.compare_generation(speed, "transformers", "int8")
    assert ours == "ours bfloat16" and next(iter(ratios)) == "best float type"


def test_data_job_counts_what_the_dataset_holds(text_file, tmp_path, threads):
    job = dict(
        train_path=text_file, tokenizer=str(ROOT / "model"), max_seq_len=64, cache_dir=tmp_path / "cache",
        threads=threads, seconds=0.05, batch_size=4, seed=0,
    )  # fmt: skip
    found = contenders.job_our_data(job)
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()]
    assert found["documents"] == 240 and found["batches_per_second"] > 0
    assert found["num_bytes"] <= sum(len(t.encode()) for t in texts)
    assert found["num_targets"] < found["num_tokens"]


# -- what is reported


def quality(name, bpb, seconds, **more):
    return (
        dict(name=name, seed=1, bpb=bpb, counted_seconds=seconds, counted_cpu=seconds, cpu_share=1.0) | more
    )


def test_summary_takes_the_shortest_budget_that_reaches_the_peer(capsys):
    args = bench.parse_args(["train", "--data_path", "x.jsonl", "--minutes", "8", "--fractions", "8,12,20"])
    args.device = "cpu"
    machine = dict(name="cpu", cores=2, capability="-", peaks={"float32": 1e9})
    runs = [
        quality("transformers", 3.0, 480.0),
        quality("ours", 3.1, 24.0, fraction=20.0),
        quality("ours", 2.9, 42.0, fraction=12.0),
        quality("ours", 2.7, 60.0, fraction=8.0),
    ]
    result = dict(machine=machine)
    bench.summarise_quality(args, result, "transformers", runs)
    assert result["summary"][0]["reached"]["fraction"] == 12
    assert "11.4x" in result["rows"][0]  # the seconds the process took, not those it was given
    bench.summarise_quality(args, result, "transformers", [quality("transformers", 1.0, 480.0), *runs[1:]])
    assert "not reached" in result["rows"][1]


def test_ledger_rows_name_no_folder_and_fit_the_table(monkeypatch, tmp_path):
    argv = [
        "train",
        "--data_path",
        "/some/where/text.jsonl",
        "--ledger",
        "--json",
        "/some/x.json",
        "--ours_flags",
        "--batch_size 8",
    ]
    args = bench.parse_args(argv)
    machine = dict(name="a | b", cores=2, capability="-", peaks={"float32": 1e9})
    row = bench.ledger_row(args, "A", "B", "2.0x", machine, "noisy: shared machine")
    head = [x for x in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").splitlines() if "date" in x][
        -1
    ]
    assert row.count("|") == head.count("|")
    assert "/some" not in row and "text.jsonl" in row and "--ledger" not in row


def test_log_of_ours_is_read_without_its_warm_up(tmp_path):
    lines = [{"event": "start", "args": {"max_seq_len": 64, "batch_size": 4, "accumulation_steps": 1}}]
    for step in range(1, 9):
        speed = 10 if step < 3 else 100 + step
        line = {"step": step, "tokens_per_s": speed, "time_s": step * 0.5, "tokens": step * 200, "loss": 5}
        lines.append(line)
    path = tmp_path / "bench_log.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    found = bench.read_our_log(tmp_path)
    assert found["tokens_per_second"] == 106 and found["step_seconds"] == 0.5 and found["tokens"] == 1600


# -- the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train"], "--data_path"),
        (["train", "--data_path", "x", "--minimind", "/nowhere"], "MiniMind checkout"),
        (["train", "--data_path", "x", "--contenders", "ours,nobody"], "nobody"),
        (["train", "--data_path", "x", "--contenders", "minimind"], "--minimind DIR"),
        (["train", "--data_path", "x", "--seconds", "0"], "nothing to do"),
        (["train", "--data_path", "x", "--fractions", "0"], "above 0"),
        (["generate", "--dtypes", "float7"], "float7"),
        (["sing"], "sing"),
    ],
)
def test_wrong_flags_end_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args(argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and "\n" not in error


def test_missing_data_file_is_one_line_and_exit_code_2(tmp_path, capsys):
    args = bench.parse_args(["data", "--data_path", str(tmp_path / "no.jsonl"), "--out_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        bench.main(args)
    assert stopped.value.code == 2 and "no.jsonl does not exist" in capsys.readouterr().err


def test_a_failing_contender_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(bench.BenchError, match="ended with 3"):
        bench.run_process(
            [sys.executable, "-c", "print('so it was'); raise SystemExit(3)"], log=tmp_path / "log"
        )
    measured = bench.run_process([sys.executable, "-c", "print(1)"], log=tmp_path / "log")
    assert measured["wall_seconds"] > 0 and (measured["rss_bytes"] or 1e9) > 1e6


# -- whole commands


def run_bench(*argv):
    command = [sys.executable, ROOT / "scripts" / "bench.py", *argv]
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_train_command_compares_ours_with_transformers(text_file, tmp_path):
    result = tmp_path / "result.json"
    out = run_bench(
        "train", "--quick", "--threads", 1, "--data_path", text_file, "--out_dir", tmp_path / "out",
        "--val_fraction", 0.1, "--contenders", "ours,transformers", "--minutes", 0.4, "--fractions", 1,
        "--json", result,
    )  # fmt: skip
    found = json.loads(result.read_text(encoding="utf-8"))
    assert set(found["contenders"]) == {"ours", "transformers"} and len(found["quality"]) == 2
    assert all(0 < run["bpb"] < 13 for run in found["quality"])
    assert found["contenders"]["ours"]["rss_bytes"] > 1e8 and "real tokens per second" in out


@pytest.mark.slow
@pytest.mark.skipif(not MINIMIND, reason="MINIMIND_PATH names no MiniMind checkout")
def test_minimind_takes_part_in_every_command(text_file, tmp_path):
    common = ["--quick", "--threads", 1, "--out_dir", tmp_path / "out", "--minimind", MINIMIND]
    data = ["--data_path", text_file]
    assert "MiniMind float32" in run_bench("generate", *common)
    assert "MiniMind, on the fly" in run_bench("data", *data, *common)
    tune = ["--tune_minimind", "--tune_lrs", "1e-3", "--tune_accums", "1"]
    out = run_bench(
        "train", *data, *common, "--val_fraction", 0.1, "--contenders", "minimind", "--minutes", 0.03, *tune
    )
    assert "MiniMind as shipped" in out and "bpb" in out


@pytest.mark.skipif(not MINIMIND, reason="MINIMIND_PATH names no MiniMind checkout")
def test_minimind_modules_leave_ours_in_place():
    import model.model_minimind as ours

    modules = contenders.minimind_modules(MINIMIND, restore=True)
    assert Path(modules.model.__file__).is_relative_to(Path(MINIMIND).resolve())
    assert sys.modules["model.model_minimind"] is ours
    assert modules.utils.get_lr(0, 10, 1.0) == pytest.approx(1.0)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not a MiniMind checkout"):
        contenders.minimind_modules(tmp_path)
