"""The comparison of stages is one of equals: the same tokens on both sides, counted alike, honest ratios."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import repo_tokenizer
from preference_helpers import dpo_file
from train_helpers import sft_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench, bench_stages
from scripts import bench_stages_peers as peers

PAD = 0


def prepared(tmp_path, stage, **more):
    """What both sides get of a small file, and the data set that our stage makes of its part."""
    from dataset.lm_dataset import load_sft
    from dataset.preferences import load_pairs

    job = dict(stage=stage, steps=3, batch_size=4, max_seq_len=64, seed=7, peer_batch=8)
    job |= dict(data_path=str((sft_file if stage == "lora" else dpo_file)(tmp_path / "data"))) | more
    folder = tmp_path / "stage"
    folder.mkdir()
    found = peers.prepare_data(job, folder, repo_tokenizer())
    load = load_sft if stage == "lora" else load_pairs
    train, _ = load(found["data"], repo_tokenizer(), job["max_seq_len"])
    return job, found, json.loads(Path(found["examples"]).read_text(encoding="utf-8")), train


def our_batches(job, train):
    """The batches of the steps of our stage, from the trainer's own code."""
    from types import SimpleNamespace

    from trainer import batches

    flags = dict(batch_size=job["batch_size"], accumulation_steps=1, max_steps=job["steps"], seed=job["seed"])
    args, rt = SimpleNamespace(**flags), SimpleNamespace(world_size=1, rank=0)
    order = batches.Order(len(train), job["seed"])
    for step in range(job["steps"]):
        rows = order.rows(batches.step_positions(step, len(train), args))
        yield batches.load_step(train, rows, args, rt)


# -- the same data


def test_lora_peers_get_our_token_ids_and_labels_in_our_order(tmp_path):
    job, found, examples, train = prepared(tmp_path, "lora")
    steps = list(our_batches(job, train))
    assert [step.num_tokens for step in steps] == [tokens for tokens, _ in found["our_steps"]]
    ours = []
    for step in steps:
        ids, labels = (step[0][name].flatten() for name in ("input_ids", "labels"))
        ours += zip(ids[ids != PAD].tolist(), labels[ids != PAD].tolist())
    theirs = [pair for example in examples for pair in zip(example["input_ids"], example["labels"])]
    shorter = min(len(ours), len(theirs))  # updates of a peer have nearly as many conversations as ours
    assert ours[:shorter] == theirs[:shorter] and shorter > 0.9 * len(ours)
    assert len(examples) == job["steps"] * found["micro_batch"] * found["accumulation"]


def test_dpo_peers_get_our_pairs_step_by_step(tmp_path):
    job, found, examples, train = prepared(tmp_path, "dpo")
    assert (found["micro_batch"], found["accumulation"]) == (4, 1) and len(examples) == 12
    for k, step in enumerate(our_batches(job, train)):
        mine = examples[4 * k : 4 * (k + 1)]
        assert step.num_tokens == sum(map(peers.real_tokens, mine)) == found["our_steps"][k][0]
        ids, labels, owner = (step[0][name].flatten() for name in ("input_ids", "labels", "sequence_ids"))
        for i, (side, number) in enumerate(itertools.product(("chosen_ids", "rejected_ids"), range(4))):
            prompt, answer = mine[number]["prompt_ids"], mine[number][side]
            assert ids[owner == i].tolist() == prompt + answer
            assert labels[owner == i].tolist() == [-100] * len(prompt) + answer


def test_a_small_file_is_repeated_and_long_rows_are_left_out(tmp_path):
    job, found, examples, train = prepared(tmp_path, "dpo", steps=30)
    assert len(examples) == 120 > found["rows"] == len(train)  # 40 pairs
    assert [step.num_tokens for step in our_batches(job, train)] == [
        sum(map(peers.real_tokens, examples[4 * k : 4 * (k + 1)])) for k in range(30)
    ]
    (tmp_path / "short").mkdir()
    _, fewer, examples, _ = prepared(tmp_path / "short", "dpo", steps=30, max_seq_len=24)
    assert 0 < fewer["rows"] < 40 and max(map(peers.longest, examples)) <= 24


def test_a_bad_row_is_named(tmp_path):
    from dataset.rows import DataError

    path = tmp_path / "bad.jsonl"
    path.write_text('{"conversations": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        prepared(tmp_path, "lora", data_path=str(path))


@pytest.mark.parametrize(
    "examples, at_once, split", [(16, 16, (16, 1)), (61.3, 16, (15, 4)), (3.6, 16, (4, 1)), (0.2, 4, (1, 1))]
)
def test_updates_of_the_peer_are_as_large_as_ours(examples, at_once, split):
    assert peers.split_update(examples, at_once) == split


def test_a_peer_that_trains_on_other_tokens_is_refused(tmp_path):
    job, found, examples, _ = prepared(tmp_path, "dpo")
    job |= {key: found[key] for key in ("examples", "micro_batch", "accumulation")}
    marks = [[sum(map(peers.real_tokens, examples[: 4 * (k + 1)])), k, 0] for k in range(3)]
    peers.check_tokens(marks, job)
    marks[1][0] -= 1
    with pytest.raises(SystemExit, match="trained on"):
        peers.check_tokens(marks, job)


def test_tokens_are_those_that_no_mask_hides():
    import torch

    counts = peers.Counts()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    counts.batch({"input_ids": torch.ones(2, 3), "attention_mask": mask})
    counts.batch({"input_ids": torch.ones(1, 5)})
    counts.step()
    assert (counts.tokens, counts.slots) == (9, 11) and counts.marks[0][0] == 9


# -- figures


def contender(speed, rss, reference=None, tokens=1000):
    """A summary of two runs, the second one twice as slow."""
    runs = []
    for factor in (1, 2):
        marks = [[100 * k, 1 if k < 2 else 1 + factor * 100 * (k - 2) / speed] for k in range(1, 13)]
        run = dict(marks=marks, rss_bytes=rss * factor, load_before=0.0, dtype="float32", padding=0.1)
        run |= dict(reference_seconds=reference, reference_tokens=tokens)
        run["tokens_per_second"] = bench_stages.tokens_per_second(marks)
        run["with_reference"] = bench_stages.with_reference(run)
        runs.append(run)
    return bench_stages.summary(runs)


def test_the_first_two_steps_are_not_counted():
    marks = [[500, 10.0], [900, 15.0], [1000, 16.0], [1300, 17.0]]
    assert bench_stages.tokens_per_second(marks) == 400 / 2


def test_reference_seconds_are_spread_over_the_tokens_they_were_for():
    run = dict(tokens_per_second=100.0, reference_seconds=5.0, reference_tokens=1000)
    assert bench_stages.with_reference(run) == pytest.approx(1000 / (10 + 5))
    assert bench_stages.with_reference(dict(tokens_per_second=100.0, reference_seconds=None)) == 100.0


def test_summary_and_ratios():
    found = dict(ours=contender(800, 2e9), peft=contender(200, 1e9), peft_packed=contender(400, 4e9))
    assert found["ours"]["tokens_per_second"] == pytest.approx(600) and found["ours"]["rss_bytes"] == 4e9
    assert found["ours"]["spread"] == pytest.approx(400 / 800)
    (row,) = bench_stages.compare(found, "tokens_per_second")
    assert (row["peer"], row["leanest"]) == ("peft_packed", "peft")
    assert (row["ratio"], row["memory"], row["leanest_memory"]) == pytest.approx((2.0, 0.5, 2.0))
    assert bench_stages.compare({"ours": found["ours"]}, "tokens_per_second") == []


def test_report_prints_both_figures_of_dpo_and_fits_the_ledger(capsys):
    args = bench_stages.parse_args(["dpo", "--data_path", "/some/where/pairs.jsonl"])
    found = dict(ours=contender(800, 1e9, reference=2), ours_float32=contender(400, 1e9, reference=2))
    found |= dict(trl=contender(100, 2e9), trl_precomputed=contender(200, 2e9, reference=20))
    machine = dict(name="a | b", cores=2, capability="-", peaks={"float32": 1e9})
    result = bench_stages.report(args, found, machine)
    out = capsys.readouterr().out
    by_figure = {(row["ours"], row["figure"]): row["peer"] for row in result["ratios"]}
    assert by_figure["ours", "with_reference"] == "trl"  # 20 seconds for 1,000 tokens cost more than the half
    assert by_figure["ours", "tokens_per_second"] == "trl_precomputed"
    assert "in the step" in out and "tokens/s with reference" in out
    (row,) = result["rows"]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in page if line.startswith("| date |"))
    assert row.count("|") == head.count("|")
    assert "bench_stages.py dpo" in row and "/some" not in row and "ours float32" in row


def test_a_peer_that_mixes_documents_is_called_by_name(capsys):
    args = bench_stages.parse_args(["lora", "--data_path", "x"])
    found = dict(ours=contender(800, 1e9), peft_packed=contender(100, 2e9) | dict(isolates=False))
    machine = dict(name="cpu", cores=2, capability="-", peaks={"float32": 1e9})
    bench_stages.report(args, found, machine)
    assert "SEE EACH OTHER" in capsys.readouterr().out


def test_lines_of_another_process_are_timed(tmp_path):
    log = tmp_path / "log"
    log.write_text("stage: of an earlier run\n", encoding="utf-8")
    code = "import time; print('reference: x'); time.sleep(0.4); print('stage: y'); time.sleep(0.1)"
    with bench_stages.LineTimes(log, ["reference:", "stage:"]) as lines:
        bench.run_process([sys.executable, "-u", "-c", code], log=log)
    assert 0.2 < lines.between("reference:", "stage:") < 2
    with bench_stages.LineTimes(log, ["reference:"]) as lines:
        time.sleep(0.05)
    with pytest.raises(bench.BenchError, match="not known"):
        lines.between("reference:", "stage:")


def test_log_and_compute_type_of_ours(tmp_path):
    log, terminal = tmp_path / "log.jsonl", tmp_path / "terminal"
    lines = [{"event": "start"}, {"step": 1, "tokens": 9, "tokens_per_s": 3, "time_s": 2.5, "loss": 8.0}]
    lines.append({"step": 1, "lora_size": 0.1, "time_s": 3})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert bench_stages.read_log(log) == ([[9, 2.5]], [8.0])
    terminal.write_text("a\nmachine: cpu (2 threads), int8 products, all else float32\n", encoding="utf-8")
    assert bench_stages.compute_type(terminal) == "int8"


# -- the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["lora"], "--data_path"),
        (["lora", "--data_path", "x", "--contenders", "ours,trl"], "trl"),
        (["dpo", "--data_path", "x", "--steps", "2"], "first 2"),
        (["dpo", "--data_path", "x", "--peer_dtype", "float7"], "float7"),
        (["dpo", "--data_path", "x", "--lora_rank", "4"], "lora_rank"),
        (["sing"], "sing"),
    ],
)
def test_wrong_flags_end_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_stages.parse_args(argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and "\n" not in error


@pytest.mark.parametrize("missing", [["trl"], ["peft", "trl"]])
def test_missing_packages_and_files_are_one_line(tmp_path, capsys, monkeypatch, missing):
    argv = ["lora", "--data_path", str(tmp_path / "no.jsonl"), "--out_dir", str(tmp_path)]
    find = bench_stages.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            bench_stages.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
        )
        with pytest.raises(SystemExit):
            bench_stages.main(bench_stages.parse_args(argv))
    error = capsys.readouterr().err
    assert f"{' and '.join(missing)} not installed: pip install -r requirements-dev.txt" in error
    with pytest.raises(SystemExit):
        bench_stages.main(bench_stages.parse_args([*argv, "--contenders", "ours"]))
    assert "no.jsonl does not exist" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys; from scripts import bench_stages\n"
        "try: bench_stages.parse_args(['dpo', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--peer_dtype" in done.stdout


# -- with the peers themselves


def peer_job(tmp_path, stage, shape, **more):
    """A job of a tiny peer whose weights are those of the model returned beside it."""
    import torch

    from model.model_minimind import MiniMindConfig, MiniMindLM

    job, found, _, train = prepared(tmp_path, stage)
    torch.manual_seed(0)
    ours = MiniMindLM(MiniMindConfig(**shape, residual_init="normal", initializer_range=0.1))
    torch.save(ours.state_dict(), tmp_path / "weights.pth")
    fields = [*peers.bench_contenders.DENSE_FIELDS, "use_moe", "n_shared_experts", "qk_norm"]
    job |= {key: found[key] for key in ("examples", "micro_batch", "accumulation")}
    job |= dict(folder=str(tmp_path / "peer"), weights=str(tmp_path / "weights.pth"), dtype="float32")
    job |= dict(shape={name: getattr(ours.config, name) for name in fields}, lora_rank=4, threads=1)
    return job | dict(packed=False, precomputed=False, defaults=False) | more, ours, train


@pytest.fixture
def one_thread(monkeypatch):
    import torch

    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the job sets it
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [False, True])
def test_peft_begins_at_our_loss_with_as_many_parameters(tmp_path, one_thread, qk_norm):
    import torch

    from model.model_lora import LoRAConfig, add_lora

    job, ours, _ = peer_job(tmp_path, "lora", SHAPE | dict(qk_norm=qk_norm))
    found = peers.job_peer(job)
    examples = json.loads(Path(job["examples"]).read_text(encoding="utf-8"))
    size = job["micro_batch"] * job["accumulation"]
    assert found["marks"][0][0] == sum(map(peers.real_tokens, examples[:size])) and len(found["marks"]) == 3
    losses, targets = [], 0
    for example in examples[:size]:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            losses.append(ours(ids, labels=labels, num_items_in_batch=1).loss.item())
        targets += int((labels != -100).sum())
    assert found["losses"][0] == pytest.approx(sum(losses) / targets, rel=1e-4)
    add_lora(ours, LoRAConfig(rank=job["lora_rank"]))
    assert found["learning"] == sum(p.numel() for p in ours.parameters() if p.requires_grad)


@pytest.mark.slow
def test_packing_of_the_peer_isolates_documents_on_a_cpu(tmp_path, one_thread):
    job, _, _ = peer_job(tmp_path, "lora", SHAPE, packed=True)
    found = peers.job_peer(job | dict(micro_batch=2, accumulation=2))
    assert found["isolates"] is True and found["padding"] == 0
    assert len(found["marks"]) == 3 and found["marks"][-1][0] <= 3 * 4 * 64


@pytest.mark.slow
def test_the_reference_of_trl_is_ours(tmp_path, one_thread):
    import torch

    from trainer.train_dpo import answer_logprobs

    job, ours, train = peer_job(tmp_path, "dpo", SHAPE, precomputed=True)
    trainer, counts = peers.dpo_trainer(job)
    columns = (trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps"))
    theirs = torch.tensor([list(column)[:4] for column in columns]).flatten()
    batch = next(our_batches(job, train))[0]
    with torch.no_grad():
        mine, _ = answer_logprobs(ours, batch, ours.lm_head.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert counts.reference_seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage, make", [("lora", sft_file), ("dpo", dpo_file)])
def test_a_whole_comparison(tmp_path, stage, make):
    script, result = ROOT / "scripts" / "bench_stages.py", tmp_path / "result.json"
    command = [sys.executable, script, stage, "--quick", "--threads", 1, "--data_path", make(tmp_path)]
    command += ["--out_dir", tmp_path / "out", "--json", result]
    command += ["--contenders", ",".join(bench_stages.NAMES[stage])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(result.read_text(encoding="utf-8"))["contenders"]
    assert list(found) == list(bench_stages.NAMES[stage]) and "fastest peer" in done.stdout
    assert all(one["tokens_per_second"] > 0 and one["rss_bytes"] > 1e8 for one in found.values())
    if stage == "dpo":  # the tokens of every step are the same for all
        tokens = {tuple(tokens for tokens, _ in one["runs"][0]["marks"]) for one in found.values()}
        assert len(tokens) == 1
        assert found["trl_precomputed"]["with_reference"] < found["trl_precomputed"]["tokens_per_second"]
        assert found["ours"]["reference_seconds"] > 0 and found["trl"]["reference_seconds"] is None
