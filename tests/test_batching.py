"""Continuous batching: whoever comes and goes beside it, a request gets the answer it would get alone."""

import math
import random
from dataclasses import asdict

import pytest
import torch

from model.batching import BLOCK, Batch, Known, PrefixStore, Request
from model.generation import Generator, Sampling
from model.model_minimind import MiniMindConfig, MiniMindLM

V = 200
PER_TOKEN = 2 * 2 * 2 * 16 * 4  # bytes: keys and values, layers, heads, head size, float32


def make_model(**changes):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindLM(MiniMindConfig(**shape | {"vocab_size": V} | changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def engine():
    return Generator(make_model(qk_norm=True), dtype="float32")


def prompt_of(rng, length):
    return [rng.randrange(3, V) for _ in range(length)]


def run(batch, requests=(), rng=None):
    """All tokens, as (request, sample) -> [News]; with an `rng` the requests come in one by one."""
    waiting, found = list(requests), {}
    while waiting or batch.busy:
        while waiting and (rng is None or rng.random() < 0.3):
            batch.add(waiting.pop(0))
        for new in batch.step():
            found.setdefault((new.request, new.sample), []).append(new)
    return found


def ids_of(news):
    return [new.token for new in news]


@pytest.mark.parametrize(
    "changes", [{"qk_norm": True}, {"use_moe": True, "num_experts": 4}, {"dropout": 0.1}]
)
def test_equals_generate_whoever_runs_beside_it(changes):
    engine, rng = Generator(make_model(**changes), dtype="float32"), random.Random(1)
    requests = []
    for i in range(30):
        settings = dict(
            max_new_tokens=rng.randint(1, 60),
            temperature=rng.choice([0, 1, 0.7]),
            top_p=rng.choice([1, 0.9]),
            top_k=rng.choice([0, 0, 20]),
            min_p=rng.choice([0, 0.02]),
            repetition_penalty=rng.choice([1, 1.2]),
            num_return_sequences=rng.choice([1, 1, 3]),
            stop_token_ids=(rng.randrange(V),),
        )
        sampling = Sampling(**settings, seed=i)
        requests.append(Request(prompt_of(rng, rng.randint(1, 120)), sampling, reuse=False))
    batch = Batch(engine, max_rows=8, prefill_tokens=32)
    most, step = [0], batch.step
    batch.step = lambda: (most.append(len(batch.rows)), step())[1]
    found = run(batch, requests, rng)
    assert max(most) == 8  # it was full at times
    for request in requests:
        expected = engine.generate([request.prompt], **asdict(request.sampling))
        for sample, answer in enumerate(expected):
            news = found[request, sample]
            assert ids_of(news) == answer.ids and news[-1].finish_reason == answer.finish_reason
            assert [n.logprob for n in news] == pytest.approx(answer.logprobs.tolist(), abs=1e-4)


def test_compiled_layers():
    engine, rng = Generator(make_model(), "float32", compile=True), random.Random(4)
    assert engine.compiled
    requests = [
        Request(prompt_of(rng, rng.randint(1, 60)), Sampling(max_new_tokens=20, temperature=t, seed=1))
        for t in (0, 0, 0.8, 0.8, 1, 1)
    ]
    found = run(Batch(engine, max_rows=4), requests, rng)
    for request in requests:
        (expected,) = engine.generate([request.prompt], **asdict(request.sampling))
        assert ids_of(found[request, 0]) == expected.ids


@pytest.mark.parametrize("compile", [False, True])
def test_weights_of_eight_bits(compile):
    """Every row has other neighbours than in `generate`, so it rounds otherwise: its scores are those of the
    8-bit weights all the same, read in one go."""
    engine, rng = Generator(make_model(), "int8", compile=compile), random.Random(5)
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    requests = [Request(prompt_of(rng, rng.randint(1, 60)), sampling) for _ in range(6)]
    for (request, _), news in run(Batch(engine, max_rows=4), requests, rng).items():
        ids = request.prompt + ids_of(news)
        empty = torch.zeros(len(engine.layers), engine.K, len(ids), engine.hd, dtype=engine.cache_dtype)
        with torch.inference_mode():
            logits = engine.extend(ids, empty, empty.clone(), 0, all_logits=True)
        logprobs = logits.float().log_softmax(-1)
        expected = [logprobs[len(request.prompt) - 1 + i, new.token].item() for i, new in enumerate(news)]
        assert [new.logprob for new in news] == pytest.approx(expected, abs=0.5)


def test_half_precision_keeps_to_the_model(monkeypatch):
    """bfloat16 has other kernels for few and for many rows; their scores are those of one forward pass."""
    monkeypatch.setattr("model.batching.prefers_bfloat16", lambda device: True)
    model, rng = make_model(), random.Random(2)
    batch = Batch(Generator(model, dtype="bfloat16"), max_rows=6)
    sampling = Sampling(max_new_tokens=40, ignore_eos=True)
    requests = [Request(prompt_of(rng, rng.randint(1, 90)), sampling) for _ in range(12)]
    for (request, _), news in run(batch, requests, rng).items():
        ids = request.prompt + ids_of(news)
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = [logprobs[len(request.prompt) - 1 + i, new.token].item() for i, new in enumerate(news)]
        assert [new.logprob for new in news] == pytest.approx(expected, abs=0.35)


def test_a_long_prompt_does_not_hold_up_the_others(engine):
    rng = random.Random(3)
    batch = Batch(engine, prefill_tokens=16)
    first = Request(prompt_of(rng, 8), Sampling(max_new_tokens=30, temperature=0, ignore_eos=True))
    batch.add(first)
    batch.step()
    batch.add(Request(prompt_of(rng, 160), Sampling(max_new_tokens=1)))
    for _ in range(9):  # of 10 pieces
        (new,) = batch.step()
        assert new.request is first


def test_a_long_prompt_does_not_hold_up_other_models(engine):
    batch = Batch(engine, prefill_tokens=16)
    for hurry, tokens in ((True, 16), (False, 100)):
        batch.reset()
        batch.add(Request(prompt_of(random.Random(3), 100), Sampling(max_new_tokens=1)))
        news = batch.step(hurry)
        assert (batch.reading.done if batch.reading else 100) == tokens and bool(news) == (not hurry)


def test_a_conversation_is_read_from_where_it_ended(engine):
    rng = random.Random(4)
    batch = Batch(engine)
    sampling = Sampling(max_new_tokens=12, temperature=0, ignore_eos=True)
    first = Request(prompt_of(rng, 40), sampling)
    (answer,) = run(batch, [first]).values()
    again = first.prompt + ids_of(answer) + prompt_of(rng, 5)
    second, alone = Request(again, sampling), Request(again, sampling, reuse=False)
    (found,), (expected,) = run(batch, [second]).values(), run(batch, [alone]).values()
    assert ids_of(found) == ids_of(expected)
    assert second.reused_tokens == 40 + 11 and alone.reused_tokens == 0  # the last token was never fed
    other = Request(first.prompt[: BLOCK + 3] + [5, 6, 7], sampling)
    (found,) = run(batch, [other]).values()
    assert other.reused_tokens == BLOCK + 3
    assert ids_of(found) == engine.generate([other.prompt], **asdict(sampling))[0].ids


def test_known_conversations_stay_within_their_memory(engine):
    rng = random.Random(5)
    batch = Batch(engine, prefix_memory=100 * PER_TOKEN)
    prompts = [prompt_of(rng, 40) for _ in range(4)]
    for prompt in prompts:
        run(batch, [Request(prompt, Sampling(max_new_tokens=2, ignore_eos=True))])
        assert batch.prefixes.bytes <= 100 * PER_TOKEN
    newest, oldest = (Request(prompts[i], Sampling(max_new_tokens=1)) for i in (3, 0))
    run(batch, [newest, oldest])
    assert newest.reused_tokens == 39 and oldest.reused_tokens == 0


def known(ids):
    return Known(torch.tensor(ids), torch.zeros(1, 1, len(ids), 1), torch.zeros(1, 1, len(ids), 1))


def test_the_right_one_of_many_that_begin_alike_is_found():
    """Everybody has the same system prompt."""
    rng = random.Random(9)
    store, system = PrefixStore(1 << 20), prompt_of(rng, 20)
    chats = [system + prompt_of(rng, 40) for _ in range(100)]
    for ids in chats:
        store.put(known(ids))
    for ids in chats:
        common, entry = store.find(ids + [5, 6])
        assert common == 60 and entry.ids.tolist() == ids
    assert store.find(chats[0])[0] == 59  # one token is left to be read
    assert store.find(system + [7] * 9)[0] == 20 and store.find(system[:15] + [199] * 9) == (0, None)
    for entry in list(store.entries):
        store.remove(entry)
    assert not store.blocks and store.bytes == 0


def test_a_longer_conversation_replaces_the_shorter(engine):
    batch, rng = Batch(engine), random.Random(10)
    ids = prompt_of(rng, 30)
    for _ in range(4):  # turns
        (news,) = run(batch, [Request(ids, Sampling(max_new_tokens=20, ignore_eos=True))]).values()
        assert len(batch.prefixes.entries) == 1
        ids = ids + ids_of(news) + prompt_of(rng, 5)
    one_prompt = Request(ids, Sampling(max_new_tokens=9, ignore_eos=True, num_return_sequences=3))
    run(batch, [one_prompt])
    assert len(batch.prefixes.entries) == 3


def slots_of(batch):
    return batch.cache.keys.shape[1] // 2 * batch.cache.keys.shape[2]


def test_rows_make_room_for_each_other_and_go_on(engine):
    """More than fits: the youngest rows leave, are read again, and say what they would have said."""
    rng = random.Random(6)
    batch = Batch(engine, memory=700 * PER_TOKEN, prefix_memory=0)
    settings = dict(max_new_tokens=150, ignore_eos=True, top_p=0.9, repetition_penalty=1.1)
    requests = [Request(prompt_of(rng, 20), Sampling(**settings, seed=i), reuse=False) for i in range(6)]
    for request in requests:
        batch.add(request)
    found, paused, most = {}, 0, 0
    while batch.busy:
        for new in batch.step():
            found.setdefault(new.request, []).append(new)
        paused, most = max(paused, len(batch.paused)), max(most, len(batch.rows))
        assert slots_of(batch) <= 700
    assert paused > 0 and most > 1
    for request in requests:
        (expected,) = engine.generate([request.prompt], **asdict(request.sampling))
        assert ids_of(found[request]) == expected.ids


def test_what_can_never_fit_is_refused(engine):
    batch = Batch(engine, memory=400 * PER_TOKEN)
    with pytest.raises(ValueError, match="more memory than there is"):
        batch.add(Request([5] * 50, Sampling(max_new_tokens=400)))
    with pytest.raises(ValueError, match="40 answers at once"):
        batch.add(Request([5], Sampling(num_return_sequences=40)))


def test_memory_comes_back_when_rows_leave(engine):
    rng = random.Random(10)
    batch = Batch(engine)
    short = Sampling(max_new_tokens=60, ignore_eos=True)
    for _ in range(16):
        batch.add(Request(prompt_of(rng, 10), short))
    long = Request(prompt_of(rng, 2000), Sampling(max_new_tokens=20, ignore_eos=True))
    batch.add(long)
    while any(row.request is long for row in batch.rows) or batch.waiting or batch.reading:
        batch.step()
    assert len(batch.rows) == 16
    batch.step()
    assert batch.cache.length < 100 and slots_of(batch) <= 16 * 192
    while batch.busy:
        batch.step()
    assert slots_of(batch) <= 64


def test_a_cancelled_request_leaves_wherever_it_is(engine):
    rng = random.Random(7)
    batch = Batch(engine, max_rows=1, prefill_tokens=4)
    endless = Sampling(max_new_tokens=10_000, ignore_eos=True)
    running, waiting, third = (Request(prompt_of(rng, 4), endless) for _ in range(3))
    for request in (running, waiting, third):
        batch.add(request)
    batch.step()
    assert [row.request for row in batch.rows] == [running]
    running.cancelled = waiting.cancelled = True
    (new,) = batch.step()
    assert new.request is third
    third.cancelled = True
    assert batch.step() == [] and not batch.busy
    long = Request(prompt_of(rng, 3000), endless)
    batch.add(long)
    batch.step()
    assert batch.reading
    long.cancelled = True
    batch.step()
    assert not batch.busy


def test_penalties_are_those_of_openai(engine):
    """Greedy answers of a plain loop over the model, mu_j - c_j freq - (c_j > 0) pres, are the same."""
    rng = random.Random(8)
    for frequency, presence in ((1.5, 0), (0, 1.5), (0.7, -0.5)):
        request = Request(
            prompt_of(rng, 10),
            Sampling(max_new_tokens=25, temperature=0, ignore_eos=True),
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias={7: 2.0, 9: -100.0},
        )
        (news,) = run(Batch(engine), [request]).values()
        ids = []
        for _ in range(25):
            logits = engine.model(torch.tensor([request.prompt + ids])).logits[0, -1].float()
            for token in set(ids):
                logits[token] -= ids.count(token) * frequency + presence
            logits[7] += 2
            logits[9] -= 100
            ids.append(int(logits.argmax()))
        assert ids_of(news) == ids


def test_scores_of_the_prompt_and_the_likeliest_tokens(engine):
    rng = random.Random(9)
    sampling = Sampling(max_new_tokens=3, temperature=0.5, seed=1)
    request = Request(prompt_of(rng, 50), sampling, top_logprobs=4, score_prompt=True)
    batch = Batch(engine, prefill_tokens=16)
    batch.engine.prefill_tokens, before = 16, batch.engine.prefill_tokens
    (news,) = run(batch, [request]).values()
    batch.engine.prefill_tokens = before
    ids = request.prompt + ids_of(news)
    logprobs = engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    scores = request.prompt_scores + [(None, new.top) for new in news]
    assert len(scores) == len(ids) - 1
    expected = [logprobs[len(request.prompt) - 1 + i, new.token].item() for i, new in enumerate(news)]
    assert [new.score for new in news] == pytest.approx(expected, abs=1e-4)  # at temperature 1
    for i, (score, top) in enumerate(scores):
        values, tokens = logprobs[i].topk(4)
        assert [token for token, _ in top] == tokens.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
        if score is not None:
            assert score == pytest.approx(logprobs[i, ids[i + 1]].item(), abs=1e-4)


class OnlyEven:
    def __init__(self):
        self.taken = []

    def adjust(self, logits):
        return logits.masked_fill(torch.arange(V) % 2 == 1, -math.inf)

    def take(self, token):
        self.taken.append(token)


def test_a_guide_decides_what_may_come(engine):
    guided = Request([5, 6, 7], Sampling(max_new_tokens=40, seed=1, ignore_eos=True), guide=OnlyEven)
    free = Request([5, 6, 7], Sampling(max_new_tokens=40, seed=1, ignore_eos=True))
    found = run(Batch(engine), [guided, free])
    assert all(token % 2 == 0 for token in ids_of(found[guided, 0]))
    assert any(token % 2 for token in ids_of(found[free, 0]))


class Broken(OnlyEven):
    def adjust(self, logits):
        if len(self.taken) == 3:
            raise RuntimeError("no token is possible")
        return logits


class BrokenLater(OnlyEven):
    def take(self, token):
        super().take(token)
        if len(self.taken) == 4:
            raise RuntimeError("no token is possible")


@pytest.mark.parametrize("guide", [Broken, BrokenLater])
def test_a_guide_that_fails_ends_its_own_request_only(engine, guide):
    broken = Request([5, 6, 7], Sampling(max_new_tokens=10, seed=1, ignore_eos=True), guide=guide)
    other = Request([5, 6, 8], Sampling(max_new_tokens=10, seed=1, ignore_eos=True))
    found = run(Batch(engine), [broken, other])
    assert str(broken.error) == "no token is possible" and len(found[broken, 0]) == 3
    assert ids_of(found[other, 0]) == engine.generate([[5, 6, 8]], **asdict(other.sampling))[0].ids


def test_reset_forgets_everything(engine):
    batch = Batch(engine)
    batch.add(Request([5, 6, 7], Sampling(max_new_tokens=40)))
    batch.step()
    batch.reset()
    assert not batch.busy and batch.step() == []
    request = Request([5, 6, 7], Sampling(max_new_tokens=4, temperature=0, ignore_eos=True))
    (news,) = run(batch, [request]).values()
    assert ids_of(news) == engine.generate([[5, 6, 7]], **asdict(request.sampling))[0].ids
