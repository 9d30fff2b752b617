"""The comparison of reinforcement learning is one of equals: everybody samples, is paid and learns alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rl_helpers import prompt_rows
from train_helpers import write_lines

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench_rl
from scripts import bench_rl_peers as peers

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
MACHINE = dict(name="a | b", cores=2, capability="-", peaks={"float32": 1e9}, dtype="float32")


# -- figures


def run(seconds, tokens=1000, rss=2e9, **more):
    """A run whose first step, which warms up, is much slower."""
    steps = [peers.figures(s, s / 4, tokens) for s in (100 * seconds[0], *seconds)]
    return dict(steps=steps, rss_bytes=rss, rss_before_bytes=5e8, load_before=0.0, dtype="float32") | more


def summary(*seconds, **more):
    return bench_rl.summary([run(list(seconds), **more)], warmup=1)


def test_a_step_is_the_median_of_the_timed_steps_of_all_rounds():
    found = bench_rl.summary([run([1, 2, 9]), run([3, 4, 5], rss=3e9)], warmup=1)
    assert found["seconds"] == 3.5 and found["rollout_s"] == 3.5 / 4 and found["update_s"] == 3.5 * 3 / 4
    assert found["spread"] == pytest.approx((4 - 2) / 4)  # of the rounds' medians
    assert found["rss_bytes"] == 3e9 and found["above_start_bytes"] == 2.5e9


def test_seconds_are_scaled_only_where_numbers_of_tokens_differ():
    found = dict(ours=summary(2.0, tokens=8192), trl=summary(10.0, tokens=8100))
    assert bench_rl.normalise(found, 8192) is False and found["trl"]["seconds"] == 10.0
    found = dict(ours=summary(2.0, tokens=8192), trl=summary(10.0, tokens=4096))
    assert bench_rl.normalise(found, 8192) is True
    assert found["ours"]["seconds"] == 2.0
    assert [found["trl"][k] for k in ("seconds", "rollout_s", "update_s")] == [20.0, 5.0, 15.0]


def test_ours_is_compared_with_minimind_and_with_the_best_of_trl():
    found = dict(ours=summary(2.0, rss=1e9), minimind=summary(20.0, rss=4e9))
    found |= dict(minimind_shape=summary(12.0), trl=summary(10.0), trl_bfloat16=summary(6.0, rss=2e9))
    rows = bench_rl.compare(found)
    assert [(row["peer"], row["ratio"], row["memory"]) for row in rows] == [
        ("minimind", 10.0, 0.25),
        ("trl_bfloat16", 3.0, 0.5),
    ]
    del found["minimind"]
    assert bench_rl.compare(found)[0]["peer"] == "minimind_shape"
    assert bench_rl.compare({"ours": found["ours"]}) == []


def test_report_fits_the_ledger_and_says_what_was_scaled_or_not_computed(capsys):
    args = bench_rl.parse_args(["--data_path", "/some/where/rlaif.jsonl", "--threads", "1"])
    found = dict(ours=summary(2.0, silent_share=0.25), ours_float32=summary(4.0), trl=summary(8.0, rss=8e9))
    found["minimind"] = summary(20.0, cpu_share=0.7)
    result = bench_rl.report(args, found, MACHINE, wanted=8192, scaled=True)
    out = capsys.readouterr().out
    assert "seconds are those of 8,192 tokens" in out and "ours: 25 % of the groups" in out
    (row,) = result["rows"]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in page if line.startswith("| date |"))
    assert row.count("|") == head.count("|")
    assert "bench_rl.py --data_path rlaif.jsonl" in row and "/some" not in row
    assert "10.00x MiniMind (memory 1.00x), 4.00x trl (memory 0.25x) (ours float32 5.00x MiniMind" in row
    assert "seconds per 8,192 sampled tokens; 25% of ours' groups equal" in row
    result = bench_rl.report(args, found | dict(ours=summary(2.0)), MACHINE, wanted=8192, scaled=False)
    assert not any(word in result["rows"][0] for word in ("8,192", "equal", "noisy"))
    found["minimind"] = summary(20.0, cpu_share=0.5)  # others had half of the machine
    assert "noisy" in bench_rl.report(args, found, MACHINE, wanted=8192, scaled=False)["rows"][0]


def test_log_of_ours(tmp_path):
    lines = [{"event": "start"}, {"step": 0, "val_kl": 0.1, "time_s": 3.0}]
    for step, end in ((1, 7.0), (2, 9.5)):
        line = dict(step=step, time_s=end, rollout_s=1.5, sampled_tokens=96.0, memory_gb=0.5)
        lines.append(line | dict(degenerate=0.5 * (step - 1), grad_norm=float(step)))
    lines.append({"step": 2, "val_kl": 0.2, "time_s": 11.0})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = peers.steps_of_log(path)
    assert found["steps"][1] == dict(seconds=2.5, rollout_s=1.5, update_s=1.0, sampled_tokens=96)
    assert (found["silent_share"], found["moved"], found["cuda_peak_bytes"]) == (0.25, 1.0, 0.5e9)
    del lines[-2]["grad_norm"]  # of a step without a gradient
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert peers.steps_of_log(path)["moved"] == 0.0


# -- the command line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--contenders", "ours,verl"], "verl"),
        (["--contenders", "minimind"], "--minimind DIR"),
        (["--minimind", "no_such_folder"], "no MiniMind checkout"),
        (["--weights", "no_such.pth"], "no_such.pth"),
        (["--device", "abacus"], "abacus"),
        (["--num_generations", "1"], "--num_generations"),
    ],
)
def test_wrong_flags_end_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_rl.parse_args(argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and "\n" not in error


def test_bfloat16_joins_only_where_it_is_fast():
    args = bench_rl.parse_args([])
    assert bench_rl.default_contenders(args, MACHINE) == ["ours", "minimind_shape", "trl"]
    assert "trl_bfloat16" in bench_rl.default_contenders(args, MACHINE | dict(dtype="bfloat16"))


@pytest.mark.parametrize("most, batches", [(8, 8), (64, 1), (1000, 1), (7, 16)])
def test_micro_batches_of_trl_are_of_equal_size_and_no_larger_than_asked_for(most, batches):
    assert bench_rl.micro_batches(bench_rl.parse_args(["--trl_batch", str(most)])) == batches


def test_help_does_not_import_torch():
    code = (
        "import sys; from scripts import bench_rl\n"
        "try: bench_rl.parse_args(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--trl_batch" in done.stdout


# -- with the peers themselves


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Two steps of 2 prompts x 2 answers x 4 tokens, as the bench prepares them."""
    import torch

    from model.model_minimind import MiniMindConfig

    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = torch.get_num_threads()
    config = MiniMindConfig(**SHAPE, qk_norm=True, initializer_range=0.2)
    fields = [*peers.bench_contenders.DENSE_FIELDS, "use_moe", "n_shared_experts", "qk_norm"]
    shape = {name: getattr(config, name) for name in [*fields, "initializer_range"]}
    job = dict(shape=shape, steps=2, prompts_per_step=2, num_generations=2, max_gen_len=4, max_seq_len=64)
    job |= dict(learning_rate=1e-3, threads=1, device="cpu", seed=3, weights=None, dtype="float32")
    job |= dict(
        data_path=str(write_lines(tmp_path, "p.jsonl", prompt_rows(8))), folder=str(tmp_path / "start")
    )
    yield job | peers.job_prepare(job) | dict(contender="minimind_shape", micro_batches=2)
    torch.set_num_threads(before)


def ours(job):
    """Our model with the weights of the job."""
    model = peers.bench_contenders.our_model(job["shape"])
    peers.bench_contenders.load_weights(model, peers.read_weights(job["weights"]))
    return model


def test_everybody_gets_the_prompts_of_our_stage_in_its_order(job):
    from dataset.prompts import load_prompts
    from trainer.batches import Order
    from trainer.checkpoint import load_tokenizer

    train, _ = load_prompts(job["data_path"], load_tokenizer(), 64)
    order = Order(len(train), job["seed"]).rows(range(4))
    flat = [ids for step in peers.read_prompts(job) for ids in step]
    assert flat == [train.ids(row) for row in order] and len({map(tuple, flat)}) == 1
    assert peers.left_padded([[5, 6], [7]], 2)[0].tolist() == [[5, 6], [5, 6], [0, 7], [0, 7]]


def test_given_weights_are_those_that_everybody_starts_from(job, tmp_path):
    import torch

    other = job | dict(weights=job["weights"], seed=4, folder=str(tmp_path / "other"))
    found = peers.read_weights(peers.job_prepare(other)["weights"])
    torch.testing.assert_close(
        found["model.embed_tokens.weight"], ours(job).model.embed_tokens.weight.detach(), rtol=0, atol=0
    )


def test_minimind_shape_scores_as_our_model_does(job):
    """Padded on the left and in a batch it sees what we see alone: it computes the same thing, if slower. The
    sampler's score, of the last positions only, is the same again."""
    import torch

    model, tokenizer = peers.minimind_model(job), peers.peer_tokenizer()
    prompts = [peers.read_prompts(job)[0][0], peers.read_prompts(job)[0][1] + [7, 8, 9]]
    torch.manual_seed(1)
    found = peers.minimind_rollout(model, peers.generate_by_growing, prompts, tokenizer, job)
    n = found["mask"].shape[1]
    with torch.no_grad():
        theirs = peers.answer_logprobs(model, found["output"], found["seen"], n)
        for number, (row, logps) in enumerate(zip(found["output"], theirs)):
            ids = torch.tensor([prompts[number // 2] + row[-n:].tolist()])
            mine = ours(job)(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
            torch.testing.assert_close(logps, mine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["old"], theirs, rtol=1e-4, atol=1e-4)


def test_cached_sampling_draws_from_the_scored_distribution(job, monkeypatch):
    """With the likeliest token in place of a draw, the cache finds what one whole pass finds likeliest."""
    import torch

    model = peers.minimind_model(job)
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    ids, mask = peers.left_padded(peers.read_prompts(job)[0], 1)
    with torch.no_grad():
        output = peers.generate_by_growing(model, ids, mask, 4)
        seen = torch.cat([mask, torch.ones_like(output[:, ids.shape[1] :])], 1)
        likeliest = model(output, attention_mask=seen).logits[:, :-1].argmax(-1)
    ended = (output[:, ids.shape[1] :] == peers.EOS).cumsum(1) > 0
    same = output[:, ids.shape[1] :] == likeliest[:, ids.shape[1] - 1 :]
    assert (same | ended).all()


def test_rows_go_on_until_all_have_ended_and_only_real_tokens_count(job, monkeypatch):
    import torch

    script = iter([[peers.EOS, 50], [60, 51], [61, peers.EOS], [62, 63]])
    monkeypatch.setattr(torch, "multinomial", lambda p, n: torch.tensor(next(script))[:, None])
    prompts, model = peers.read_prompts(job)[0], peers.minimind_model(job)
    small = job | dict(num_generations=1)
    found = peers.minimind_rollout(model, peers.generate_by_growing, prompts, peers.peer_tokenizer(), small)
    answers = found["output"][:, -found["mask"].shape[1] :]
    assert answers.tolist() == [[2, 2, 2], [50, 51, 2]]
    assert found["mask"].tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("contender", ["minimind_shape", "trl"])
def test_a_peer_samples_what_it_was_asked_for_and_learns(job, contender):
    pytest.importorskip("trl" if contender == "trl" else "torch")
    found = (peers.job_trl if contender == "trl" else peers.job_minimind)(job)
    assert [step["sampled_tokens"] for step in found["steps"]] == [16, 16]  # seed 3 draws no end token
    assert found["moved"] > 1e-4 and 0 < found["cpu_share"] < 1.5
    for step in found["steps"]:
        assert 0 < step["rollout_s"] < step["seconds"]
        assert step["seconds"] == pytest.approx(step["rollout_s"] + step["update_s"])


def test_peers_are_paid_alike_and_only_for_what_differs():
    assert [peers.different_characters(text) for text in ("", "aab", "日日a")] == [0.0, 2.0, 2.0]


def test_a_contender_that_learned_nothing_is_refused(monkeypatch, tmp_path):
    args = bench_rl.parse_args(["--out_dir", str(tmp_path)])
    args.shape, args.prepared = SHAPE, dict(prompts="p", weights="w")
    monkeypatch.setattr(bench_rl, "run_job", lambda *_, **__: run([1.0]) | dict(moved=0.0))
    with pytest.raises(bench_rl.BenchError, match="moved no weight"):
        bench_rl.run_contender(args, "trl", 0)


@pytest.mark.slow
def test_a_whole_comparison(tmp_path):
    script, result = ROOT / "scripts" / "bench_rl.py", tmp_path / "result.json"
    names = ["ours", "minimind_shape", "trl"]
    command = [sys.executable, script, "--quick", "--threads", 1, "--contenders", ",".join(names)]
    command += ["--out_dir", tmp_path / "out", "--json", result]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    whole = json.loads(result.read_text(encoding="utf-8"))
    assert list(whole["contenders"]) == names and len(whole["rows"]) == 1
    assert all(one["seconds"] > 0 and one["rss_bytes"] > 1e8 for one in whole["contenders"].values())
    assert all(one["tokens_per_step"] <= 16 for one in whole["contenders"].values())
