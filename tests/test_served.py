"""Answers from vLLM and SGLang servers (played by fake_rollout_server.py): they are what the model would say,
weights arrive, and what breaks ends in one sentence."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from fake_rollout_server import BROKEN, ODD, FakeServer, score
from preference_helpers import small_model
from train_helpers import REPO

from trainer import served
from trainer.served import RolloutError, ServedEngine, export_folder

KINDS = ["vllm", "sglang"]
GENERATION = {"vllm": "/v1/completions", "sglang": "/generate"}
LOADING = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}
FLUSHING = {"vllm": "/reset_prefix_cache", "sglang": "/flush_cache"}
TOKENIZER = SimpleNamespace(name_or_path=str(REPO / "model"))
PROMPTS = [[5, 6, 7], [9], [8, 3, 8, 3, 30]]
SEEDS = [11, 12, 13]


def policy(seed=0, **fields):
    """Few tokens, so that answers end; distributions that differ from place to place."""
    shape = dict(vocab_size=40, qk_norm=True, max_position_embeddings=128)
    model = small_model(initializer_range=0.15, **shape | fields).eval()
    if seed:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny and the server has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def first_weights(tmp_path_factory):
    """What a server is started with."""
    folder = tmp_path_factory.mktemp("first")
    export_folder(policy(99), TOKENIZER.name_or_path, folder)
    return folder


@pytest.fixture
def start(tmp_path, first_weights):
    """start(kind, model, ...) -> (engine, server): the server runs on other weights until it gets these."""
    servers = []

    def run(kind, model=None, **settings):
        servers.append(FakeServer(kind, first_weights, **settings))
        engine = quick(kind, servers[-1].url, tmp_path / "shared")
        if model is not None:
            engine.update(model, TOKENIZER, 1)
        return engine, servers[-1]

    yield run
    for server in servers:
        server.close()


def quick(kind, url, folder, timeout=30.0):
    return ServedEngine(kind, url, folder, timeout=timeout, retries=2, pause=0.005)


def failure(call, *args) -> str:
    """The sentence of the RolloutError that call(*args) raises."""
    with pytest.raises(RolloutError) as caught:
        call(*args)
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 700
    return sentence


# ----------------------------------------------------------------------------------------------------------
# What comes back
# ----------------------------------------------------------------------------------------------------------


def test_answers_are_a_a_b_b_with_the_models_own_logprobs(kind, start):
    model = policy()
    engine, server = start(kind, model)
    answers = engine.generate(PROMPTS, SEEDS, 4, 24, 1.0)
    assert [a.prompt_index for a in answers] == [0] * 4 + [1] * 4 + [2] * 4
    assert {a.finish_reason for a in answers} == {"eos", "length"}
    for a in answers:
        prompt = PROMPTS[a.prompt_index]
        assert a.num_prompt_tokens == len(prompt) and a.logprobs.dtype == torch.float32
        assert a.logprobs.shape == (len(a.ids),)
        torch.testing.assert_close(a.logprobs, torch.tensor(score(model, prompt, a.ids)), atol=1e-4, rtol=0)
        ended = a.ids[-1] == model.config.eos_token_id
        assert ended == (a.finish_reason == "eos") and (ended or len(a.ids) == 24)
    for first in range(0, 12, 4):
        assert len({tuple(a.ids) for a in answers[first : first + 4]}) == 4, "samples of a group are alike"
    assert server.count(GENERATION[kind]) == 3 + 1, "one request per prompt, and one that compares"
    assert engine.generate([], [], 4, 24, 1.0) == []


def test_draws_follow_the_seed_of_the_prompt_and_nothing_else(kind, start):
    engine, _ = start(kind, policy())
    once = [a.ids for a in engine.generate(PROMPTS, SEEDS, 2, 12, 1.0)]
    assert [a.ids for a in engine.generate(PROMPTS[1:2], SEEDS[1:2], 2, 12, 1.0)] == once[2:4]
    assert [a.ids for a in engine.generate(PROMPTS, SEEDS, 1, 12, 1.0)] == once[::2], "first of its group"
    assert [a.ids for a in engine.generate(PROMPTS, [1, 2, 3], 2, 12, 1.0)] != once


def test_more_prompts_than_threads_keep_their_order(kind, start):
    model = policy()
    engine, _ = start(kind, model)
    prompts = [[5, 3 + i % 30, i % 7] for i in range(70)]
    answers = engine.generate(prompts, list(range(70)), 1, 3, 1.0)
    for prompt, a in zip(prompts, answers, strict=True):
        torch.testing.assert_close(a.logprobs, torch.tensor(score(model, prompt, a.ids)), atol=1e-4, rtol=0)


def test_greedy_answers_are_the_likeliest_tokens_at_temperature_one(kind, start):
    from model.generation import Generator

    model = policy()
    engine, _ = start(kind, model)
    answers = engine.generate(PROMPTS, SEEDS, 2, 8, 0.0)
    local = Generator(model, "float32").generate(
        PROMPTS, max_new_tokens=8, temperature=0, num_return_sequences=2
    )
    assert [a.ids for a in answers] == [a.ids for a in local]
    for ours, theirs in zip(answers, local):
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
    assert answers[0].ids is not answers[1].ids


def test_sglangs_logprobs_are_those_of_the_tempered_distribution(start):
    model = policy()
    engine, _ = start("sglang", model)
    (a,) = engine.generate(PROMPTS[:1], [3], 1, 12, 0.6)
    torch.testing.assert_close(
        a.logprobs, torch.tensor(score(model, PROMPTS[0], a.ids, 0.6)), atol=1e-4, rtol=0
    )


def test_vllms_raw_logprobs_are_refused_where_they_are_of_another_distribution(start):
    model = policy()
    engine, server = start("vllm", model)
    before = server.count(GENERATION["vllm"])
    said = failure(engine.generate, PROMPTS, SEEDS, 2, 8, 0.6)
    assert (
        "at temperature 1 for samples drawn at 0.6" in said and "--logprobs-mode processed_logprobs" in said
    )
    assert server.count(GENERATION["vllm"]) == before, "it was asked all the same"
    engine.generate(PROMPTS, SEEDS, 1, 4, 1.0)
    engine.generate(PROMPTS, SEEDS, 1, 4, 0.0)

    engine, _ = start("vllm", model, logprobs_mode="processed_logprobs")
    (a,) = engine.generate(PROMPTS[:1], [3], 1, 12, 0.6)
    torch.testing.assert_close(
        a.logprobs, torch.tensor(score(model, PROMPTS[0], a.ids, 0.6)), atol=1e-4, rtol=0
    )


# ----------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------


def test_after_an_update_the_server_samples_from_the_new_weights(kind, start, tmp_path):
    first, second = policy(), policy(7)
    engine, server = start(kind)
    assert engine.version == -1
    engine.update(first, TOKENIZER, 3)
    assert engine.version == 3 and engine.url == server.url

    def distance(model):
        a = engine.generate(PROMPTS[:1], [5], 1, 16, 1.0)[0]
        return (a.logprobs - torch.tensor(score(model, PROMPTS[0], a.ids))).abs().max()

    assert distance(first) < 1e-4 and distance(second) > 1e-2
    server.calls.clear()
    engine.update(second, TOKENIZER, 4)
    assert server.calls == [LOADING[kind], FLUSHING[kind]], "loaded, then forgot what it had computed"
    assert engine.version == 4 and distance(second) < 1e-4 and distance(first) > 1e-2
    names = {p.name for p in (tmp_path / "shared" / "version_4").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {"version_3", "version_4"}


def test_only_the_last_two_folders_stay_whatever_their_numbers(start, tmp_path):
    engine, _ = start("sglang")
    model = policy()
    (tmp_path / "shared" / "notes").mkdir(parents=True)  # somebody else's
    for version in (8, 9, 10, 4):  # a resumed run counts from a lower version
        engine.update(model, TOKENIZER, version)
        time.sleep(0.01)
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {"version_10", "version_4", "notes"}
    engine.update(policy(7), TOKENIZER, 4)  # the same step once more
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {"version_10", "version_4", "notes"}
    assert engine.generate(PROMPTS, SEEDS, 1, 4, 1.0)


def test_a_process_that_handed_over_nothing_reads_the_vocabulary_in_the_folder(kind, start, tmp_path):
    engine, server = start(kind, policy())
    other = quick(kind, server.url, tmp_path / "shared")
    assert "was given no weights yet" in failure(other.generate, PROMPTS, SEEDS, 1, 4, 1.0)
    other.version = 1  # as rollout.send_weights tells it
    same = zip(other.generate(PROMPTS, SEEDS, 2, 8, 1.0), engine.generate(PROMPTS, SEEDS, 2, 8, 1.0))
    assert all(a.ids == b.ids for a, b in same)


def test_a_server_that_computes_another_model_is_noticed_at_the_first_update(kind, start):
    engine, server = start(kind)
    server.ignores_updates = True
    assert "computes another model (log-probabilities differ by" in failure(
        engine.update, policy(), TOKENIZER, 0
    )


def test_comparing_leaves_the_models_mode_alone(start):
    engine, _ = start("vllm")
    model = policy().train()
    engine.update(model, TOKENIZER, 0)
    assert model.training


def test_a_server_with_a_smaller_vocabulary_is_noticed_at_the_first_update(start):
    engine, server = start("vllm")
    server.ignores_updates = True
    model = small_model(vocab_size=60, qk_norm=True)
    assert "HTTP 400 (Token id 59 is out of vocabulary)" in failure(engine.update, model, TOKENIZER, 0)


def test_a_restarted_sglang_server_is_noticed(start):
    engine, server = start("sglang", policy())
    server.weight_version = "default"
    said = failure(engine.generate, PROMPTS, SEEDS, 1, 4, 1.0)
    assert (
        "samples from the weights 'default', not from those of step 1" in said and "--from_resume 1" in said
    )


def test_failed_updates_keep_the_version_and_say_what_the_server_must_see(kind, start, tmp_path):
    engine, server = start(kind, policy())
    server.fault = "500"
    said = failure(engine.update, policy(7), TOKENIZER, 2)
    assert engine.version == 1 and "CUDA error: out of memory" in said and "(3 tries)" in said
    assert str(tmp_path / "shared" / "version_2") in said
    server.fault = None
    engine.update(policy(7), TOKENIZER, 2)
    assert engine.version == 2


def test_vllm_without_its_development_endpoints_is_told_the_variable(start):
    engine, server = start("vllm", dev_mode=False)
    for call in (engine.check, lambda: engine.update(policy(), TOKENIZER, 0)):
        said = failure(call)
        assert "HTTP 404" in said and "VLLM_SERVER_DEV_MODE=1" in said


def test_an_unflushed_cache_is_an_error(start, monkeypatch):
    engine, server = start("vllm", policy())
    monkeypatch.setattr(server, "answer_vllm", lambda method, path, body: (200, {"success": False}))
    assert "could not clear its prefix cache" in failure(engine.update, policy(7), TOKENIZER, 2)
    assert engine.version == 1


# ----------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------

MOE = dict(qk_norm=True, use_moe=True, num_experts=3, n_shared_experts=0, moe_intermediate_size=48)
SHAPES = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": dict(qk_norm=True, head_dim=24, tie_word_embeddings=False),
    "Qwen3MoeForCausalLM": MOE | dict(num_experts_per_tok=2, inference_rope_scaling=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_from_the_folder(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = small_model(rms_norm_eps=1e-6, rope_theta=1e4, **SHAPES[name]).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1) if p.ndim > 1 else p.data.normal_(1, 0.3)
    export_folder(model, REPO / "model", tmp_path / "hf")
    theirs, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == name and not any(found.values())
    x = torch.randint(0, 6400, (2, 40))
    with torch.no_grad():
        assert (theirs.eval()(x).logits - model(x).logits).abs().max() < 1e-5
    config = model.config
    ends = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    for there in (theirs.config, theirs.generation_config):
        assert (there.bos_token_id, there.eos_token_id, there.pad_token_id) == ends
    assert theirs.generation_config.top_p in (None, 1.0)  # servers take their defaults from there
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == config.eos_token_id and tokenizer.chat_template
    assert tokenizer.encode("天 and <|im_end|>")[-1] == config.eos_token_id


def test_the_configuration_can_be_read_by_older_readers_too():
    config = served.hf_config(small_model(inference_rope_scaling=True, rope_theta=1e4).config)
    assert config["rope_theta"] == 1e4 and config["rope_scaling"]["rope_type"] == "yarn"
    assert "rope_scaling" not in served.hf_config(small_model().config)
    json.dumps(config)


@pytest.mark.parametrize(
    "fields, why",
    [
        (MOE | {"qk_norm": False}, "experts without QK-norm"),
        (MOE | {"n_shared_experts": 1}, "no shared experts"),
    ],
)
def test_what_no_server_can_compute_is_refused(fields, why, tmp_path):
    said = failure(export_folder, small_model(**fields), REPO / "model", tmp_path / "hf")
    assert why in said and "--rollout_engine torch" in said and not (tmp_path / "hf").exists()


def test_a_folder_that_cannot_be_written_leaves_nothing(start, tmp_path, monkeypatch):
    (tmp_path / "shared").write_text("a file")
    engine, _ = start("vllm")
    assert "--rollout_shared_path" in failure(engine.update, policy(), TOKENIZER, 0)
    (tmp_path / "shared").unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in failure(engine.update, policy(), TOKENIZER, 0)
    assert not list((tmp_path / "shared").iterdir())


def test_the_script_writes_a_folder_to_start_a_server_with(tmp_path, capsys):
    from trainer import checkpoint

    model = small_model(qk_norm=True)
    checkpoint.save_weights(model, tmp_path / "w.pth", {"stage": "full_sft"})
    served.main(served.parse_args(["--weight", str(tmp_path / "w.pth"), "--to", str(tmp_path / "hf")]))
    assert (tmp_path / "hf" / "model.safetensors").exists() and "wrote" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------------

SAID = {  # of a broken server
    "hang": "did not answer {path} within 0.1 s",
    "500": "answered {path} with HTTP 500 (CUDA error: out of memory)",
    "nonsense": "answered {path} with something that is not JSON",
    "die": "broke off while answering {path}",
}
WRONG = {  # in well-formed answers
    "other_format": "in another format",
    "few": "gave 1 answers instead of 2",
    "short_logprobs": r"token ids and \d+ log-probabilities",
    "no_logprobs": "without log-probabilities",
    "nan": "NaN, infinite or above 0",
    "positive": "NaN, infinite or above 0",
    "empty": "gave an empty answer",
    "stripped": r"without the end token 2",
    "outside": "drew token 1000000, outside the vocabulary of 40 entries",
    "aborted": "ended an answer by 'abort'",
    "too_long": "gave 99 tokens where at most 6",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_servers_are_asked_again_and_then_end_in_one_sentence(kind, fault, start):
    engine, server = start(kind, policy())
    engine.timeout = 0.1 if fault == "hang" else 30.0
    server.fault, path = fault, GENERATION[kind]
    before = server.count(path)
    said = failure(engine.generate, PROMPTS[:1], [1], 2, 6, 1.0)
    assert SAID[fault].format(path=path) in said and server.url in said
    assert "(3 tries)" in said and "start the server again, then continue with --from_resume 1" in said
    assert server.count(path) - before == 3


@pytest.mark.parametrize("fault", BROKEN)
def test_a_server_that_recovers_in_time_is_forgiven(kind, fault, start):
    engine, server = start(kind, policy())
    expected = [a.ids for a in engine.generate(PROMPTS[:1], [1], 2, 6, 1.0)]
    engine.timeout = 0.1 if fault == "hang" else 30.0
    server.fault, server.faulty_requests = fault, 2
    assert [a.ids for a in engine.generate(PROMPTS[:1], [1], 2, 6, 1.0)] == expected


@pytest.mark.parametrize("fault", ODD)
def test_answers_that_break_the_contract_end_in_one_sentence(kind, fault, start):
    engine, server = start(kind, policy())
    server.fault = fault
    before = server.count(GENERATION[kind])
    said = failure(engine.generate, PROMPTS[:1], [1], 2, 6, 1.0)
    assert re.search(WRONG[fault], said) and server.url in said
    assert server.count(GENERATION[kind]) == before + 1, "the same request would be answered the same way"


def test_what_a_server_refuses_is_not_asked_again(kind, start):
    engine, server = start(kind, policy())
    server.fault = "400"
    before = server.count(GENERATION[kind])
    said = failure(engine.generate, PROMPTS[:1], [1], 2, 6, 1.0)
    assert "HTTP 400 (this model's maximum context is 32)" in said
    assert server.count(GENERATION[kind]) == before + 1


def test_an_end_token_that_sglang_cuts_off_is_never_made_up(start):
    """Without no_stop_trim the end token is missing in the ids, but not in the log-probabilities."""
    engine, server = start("sglang", policy())
    assert any(a.finish_reason == "eos" for a in engine.generate(PROMPTS, SEEDS, 4, 24, 1.0))
    generate = server.generate

    def trims(body):
        assert all(sampling.pop("no_stop_trim") for sampling in body["sampling_params"])
        return generate(body)

    server.generate = trims
    said = failure(engine.generate, PROMPTS, SEEDS, 4, 24, 1.0)
    assert re.search(r"gave (\d+) token ids and (\d+) log-probabilities, which cannot be matched", said)


def test_one_failure_for_good_ends_the_pauses_of_all_others(kind, start):
    engine, server = start(kind, policy())
    engine.pause, faults = 5.0, iter(["400"])
    server.takes_fault = lambda: next(faults, "500")
    began = time.monotonic()
    assert "HTTP 400" in failure(engine.generate, PROMPTS * 12, SEEDS * 12, 1, 4, 1.0)
    assert time.monotonic() - began < 4


def test_nobody_there(kind, start, tmp_path):
    engine, server = start(kind, policy())
    server.close()
    for call in (engine.check, lambda: engine.generate(PROMPTS, SEEDS, 2, 6, 1.0)):
        said = failure(call)
        assert "does not exist (connection refused) (3 tries)" in said and server.url in said
    assert "start vLLM 0.16" in failure(engine.check) if kind == "vllm" else True


def test_a_server_that_dies_in_the_middle_of_a_step(kind, start):
    engine, server = start(kind, policy())
    original, seen = server.takes_fault, []

    def dies_after_four():
        seen.append(1)
        server.fault = "die" if len(seen) > 4 else None
        return original()

    server.takes_fault = dies_after_four
    assert "broke off" in failure(engine.generate, PROMPTS * 4, SEEDS * 4, 1, 4, 1.0)


# ----------------------------------------------------------------------------------------------------------
# The first look
# ----------------------------------------------------------------------------------------------------------


def test_a_good_server_passes_the_check(kind, start):
    engine, server = start(kind)
    engine.check()
    assert "/health" in server.calls and not server.bodies


@pytest.mark.parametrize("version", ["0.16.0", "0.33.1.dev7+gabc", "1.0.0", "0.0.0.dev1", "dev"])
def test_versions_of_vllm_that_can_reload_pass(version, start):
    start("vllm", version=version)[0].check()


def test_check_refuses_what_cannot_work(start, tmp_path):
    assert "is vLLM 0.15.1, which cannot load weights from a new folder" in failure(
        start("vllm", version="0.15.1")[0].check
    )
    assert "--logprobs-mode raw_logits, which gives no log-probabilities" in failure(
        start("vllm", logprobs_mode="raw_logits")[0].check
    )
    for asked, there in (("vllm", "sglang"), ("sglang", "vllm")):
        url = start(there)[1].url
        assert "HTTP 404" in failure(quick(asked, url, tmp_path / "shared").check)
    engine, server = start("sglang")
    server.answer_sglang = lambda *_: (200, {"model_path": "x", "is_generation": False})
    assert "does not generate text" in failure(engine.check)


@pytest.mark.parametrize("url", ["localhost:8998", "file:///etc/hosts", "http://", "http://host:port", ""])
def test_addresses_that_are_none(url, tmp_path):
    assert "write it as http://127.0.0.1:8998" in failure(ServedEngine, "vllm", url, tmp_path)


def test_an_address_may_end_like_openais(start, tmp_path):
    _, server = start("vllm")
    quick("vllm", server.url + "/v1/", tmp_path).check()
    with pytest.raises(ValueError, match="vllm or sglang"):
        ServedEngine("llama.cpp", server.url, tmp_path)


def test_proxies_of_the_environment_are_not_asked(start, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    start("vllm")[0].check()
