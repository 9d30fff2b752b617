"""Log-likelihoods: trees and shared beginnings give what one forward pass per request gives."""

import random

import pytest
import torch

from model.generation import Generator
from model.model_minimind import MiniMindConfig, MiniMindLM
from scripts import scoring
from scripts.convert_hf import write_folder
from trainer.checkpoint import load_tokenizer
from trainer.cli import ROOT

SHAPES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": False},
    "mixture": {"qk_norm": True, "use_moe": True, "num_experts_per_tok": 1, "n_shared_experts": 0},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def small_model(shape="llama", seed=0, **more):
    torch.manual_seed(seed)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindLM(MiniMindConfig(**size, **SHAPES[shape], **more)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def one_by_one(model, requests):
    """The plain way: a forward pass for each request."""
    scores = []
    for context, continuation in requests:
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :].float()
        targets = torch.tensor(continuation)
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
        scores.append((log_probs.double().sum().item(), bool((logits.argmax(-1) == targets).all())))
    return scores


def alike(ours, theirs, tolerance=1e-4):
    assert len(ours) == len(theirs)
    for (a, greedy), (b, also) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=tolerance) and greedy == also


def some_requests(seed=0):
    """Choices of one token and of several, contexts with a long common beginning, and loners."""
    draw = random.Random(seed)

    def ids(count):
        return [draw.randrange(10, 6400) for _ in range(count)]

    requests, headers = [], [ids(150), ids(90)]
    for header in headers:
        for _ in range(12):
            context = header + ids(draw.randrange(3, 30))
            requests += [(context, ids(draw.randrange(1, 9))) for _ in range(4)]
    requests += [(ids(20), [token]) for token in range(100, 104)]
    requests += [requests[0], (ids(1), ids(40)), (requests[0][0], ids(2))]
    draw.shuffle(requests)
    return requests


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_one_forward_pass_per_request(shape):
    model = small_model(shape)
    engine, requests = Generator(model, "float32"), some_requests()
    alike(scoring.log_likelihoods(engine, requests), one_by_one(model, requests))


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_what_is_read_together_does_not_matter(budget):
    model = small_model()
    engine, requests = Generator(model, "float32", prefill_tokens=budget), some_requests(1)
    alike(scoring.log_likelihoods(engine, requests), one_by_one(model, requests))


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.5), ("int8", 1.0)])
def test_other_types_are_near(dtype, tolerance):
    model = small_model()
    requests = some_requests(2)
    ours = scoring.log_likelihoods(Generator(model, dtype), requests)
    for (a, _), (b, _) in zip(ours, one_by_one(model, requests)):
        assert a == pytest.approx(b, abs=tolerance)


def test_what_is_alike_is_read_once(monkeypatch):
    engine, requests = Generator(small_model(), "float32"), some_requests()
    tokens, read = 0, engine.read

    def counting(layer, x, cos, sin):
        nonlocal tokens
        tokens += len(x) * (layer is engine.layers[0])
        return read(layer, x, cos, sin)

    monkeypatch.setattr(engine, "read", counting)
    scoring.log_likelihoods(engine, requests)
    plain = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    contexts = {tuple(context) for context, _ in requests}
    once = 150 + 90 + sum(len(c) - (150 if len(c) > 150 else 90 if len(c) > 90 else 0) for c in contexts)
    once += sum(len(continuation) - 1 for _, continuation in requests)
    assert tokens == once < plain / 4


def test_shared_beginnings():
    header, other = tuple(range(1000, 1300)), tuple(range(2000, 2400))
    contexts = sorted(
        [header + (i, i + 1) for i in range(5)] + [other + (7, i) for i in range(3)] + [(1,), (1, 2), (3, 4)]
    )
    groups = scoring.shared_beginnings(contexts)
    assert [contexts[first][:P] for P, first, _ in groups] == [header, other + (7,)]
    assert [last - first for _, first, last in groups] == [5, 3]


def test_no_group_shares_what_its_members_do_not():
    draw = random.Random(3)
    for _ in range(50):
        stems = [tuple(draw.choices((1, 2), k=draw.randrange(1, 400))) for _ in range(4)]
        contexts = sorted(draw.choice(stems) + tuple(draw.choices((1, 2), k=9)) for _ in range(30))
        seen = set()
        for P, first, last in scoring.shared_beginnings(contexts):
            assert len({c[:P] for c in contexts[first:last]}) == 1
            assert all(len(c) > P for c in contexts[first:last])
            assert seen.isdisjoint(range(first, last))
            seen.update(range(first, last))


def test_equal_contexts_nested_without_end():
    """Each context is the beginning of the next one."""
    model = small_model()
    requests = [(list(range(10, 10 + n)), [5, 6]) for n in range(1, 300, 2)]
    alike(scoring.log_likelihoods(Generator(model, "float32"), requests), one_by_one(model, requests))


def test_greedy_is_what_greedy_decoding_writes():
    engine = Generator(small_model(), "float32")
    (answer,) = engine.generate([[5, 6, 7]], max_new_tokens=6, temperature=0, ignore_eos=True)
    wrong = [*answer.ids[:-1], (answer.ids[-1] + 1) % 6400]
    (score, greedy), (_, other) = scoring.log_likelihoods(
        engine, [([5, 6, 7], answer.ids), ([5, 6, 7], wrong)]
    )
    assert greedy and not other
    assert score == pytest.approx(answer.logprobs.sum().item(), abs=1e-4)


def test_long_contexts_are_cut_on_the_left():
    model = small_model()
    engine = Generator(model, "float32")
    context, continuation = list(range(100, 180)), [7, 8, 9]
    cut = [(context[-(32 + 1 - 3) :], continuation)]
    alike(scoring.log_likelihoods(engine, [(context, continuation)], max_length=32), one_by_one(model, cut))


def test_what_cannot_be_scored_is_refused():
    engine = Generator(small_model(max_position_embeddings=64), "float32")
    for request, why in (
        (([1], []), "continuation of a request has no tokens"),
        (([], [1]), "context of a request has no tokens"),
        (([1], [2] * 65), "65 tokens does not fit into 64"),
        (([1], [6400]), r"outside 0\.\.6399"),
    ):
        with pytest.raises(ValueError, match=why):
            scoring.log_likelihoods(engine, [request])
    assert scoring.log_likelihoods(engine, []) == []


def test_pairs_are_cut_as_lm_eval_does(tokenizer):
    def encode(text):
        return tokenizer(text).input_ids

    pairs = [("2 + 2 =", " 4"), ("Answer: ", "A"), ("答案：", " 甲"), ("x\n\n", "y z"), ("the lo", "ng word")]
    for (context, continuation), (start, rest) in zip(pairs, scoring.encode_pairs(tokenizer, pairs)):
        plain = context.rstrip()
        assert start == encode(plain)
        assert rest == encode(context + continuation)[len(start) :]
    bos = tokenizer.bos_token_id
    assert scoring.encode_pairs(tokenizer, [("", "hello")]) == [([bos], encode("hello"))]
    ((start, _),) = scoring.encode_pairs(tokenizer, [("one", " two")], add_bos=True)
    assert start == [bos, *encode("one")]


def test_equal_to_transformers(tokenizer, tmp_path):
    """An independent reference: the exported folder in transformers' own class, texts through its
    tokenizer, a forward pass with padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = small_model("qwen3")
    write_folder(model, ROOT / "model", tmp_path / "hf", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    pairs = [
        (f"Question: How much is {a} + {b}?\nAnswer:", f" {c} apples")
        for a, b in ((1, 2), (30, 4))
        for c in (3, 34, "many")
    ] + [("问题：天空是什么颜色？\n答案：", text) for text in (" 蓝色", " 红色的吗")]
    expected = []
    for context, continuation in pairs:
        ids = their_tokenizer(context + continuation, return_tensors="pt").input_ids
        start = their_tokenizer(context, return_tensors="pt").input_ids.shape[1]
        with torch.inference_mode():
            log_probs = theirs(ids).logits[0, start - 1 : -1].log_softmax(-1)
        targets = ids[0, start:]
        found = log_probs.gather(1, targets[:, None]).sum().item()
        expected.append((found, bool((log_probs.argmax(-1) == targets).all())))
    requests = scoring.encode_pairs(tokenizer, pairs)
    alike(scoring.log_likelihoods(Generator(model, "float32"), requests), expected)


def test_bits_per_byte(tokenizer):
    model, text = small_model(), "早上好！Good morning.\n" * 20
    found = scoring.bits_per_byte(model, tokenizer, text, length=50)
    ids = tokenizer(text).input_ids
    windows = [([tokenizer.bos_token_id], ids[i : i + 50]) for i in range(0, len(ids), 50)]
    nats = -sum(score for score, _ in one_by_one(model, windows))
    assert found["tokens"] == len(ids) and found["bytes"] == len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(nats / len(text.encode()) / 0.6931471805599453, rel=1e-5)
    with pytest.raises(ValueError, match="empty"):
        scoring.bits_per_byte(model, tokenizer, "")


def test_a_model_that_knows_nothing_finds_all_tokens_alike(tokenizer):
    """All logits equal: a perplexity of the size of the vocabulary."""
    model = small_model()
    torch.nn.init.zeros_(model.model.norm.weight)
    found = scoring.bits_per_byte(model, tokenizer, "hello world, " * 9)
    assert found["perplexity"] == pytest.approx(6400, rel=1e-3)


def test_progress_reaches_the_end():
    seen = []
    engine = Generator(small_model(), "float32", prefill_tokens=100)
    scoring.log_likelihoods(engine, some_requests(), progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (len(some_requests()),) * 2
