"""The generation engine against transformers, against the model's own uncached pass, and against hand-made
numbers."""

import math
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import ahead_of_time, generation, precision, rounded_cache
from model.generation import (
    Generator,
    KeyValueCache,
    Sampling,
    TextStream,
    generate,
    sample,
    sampling_log_probs,
    uniforms,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.precision import round_to_integers
from model.rounded_cache import RoundedCache
from trainer import runtime

V = 211
KINDS = {
    "llama": dict(),
    "qwen3": dict(qk_norm=True, head_dim=24),
    "moe": dict(qk_norm=True, use_moe=True, num_experts=4, num_experts_per_tok=2, n_shared_experts=0),
    "shared": dict(use_moe=True, num_experts=4, num_experts_per_tok=1, n_shared_experts=1),
}


def tiny(kind="qwen3", seed=0, **overrides) -> MiniMindForCausalLM:
    """A random model whose every weight matters (norms too) and whose answers vary."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=V,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        moe_intermediate_size=48,
        max_position_embeddings=256,
    )
    model = MiniMindForCausalLM(MiniMindConfig(**(config | KINDS[kind] | overrides))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else 0.15 * torch.randn_like(p))
            if "experts" in name or "embed" in name:
                p.mul_(2)
    return model


def twin(model):
    """The same weights in transformers' class."""
    c = model.config
    shared = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if c.use_moe:
        peer = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **shared,
                num_experts=c.num_experts,
                num_experts_per_tok=c.num_experts_per_tok,
                moe_intermediate_size=c.moe_intermediate_size,
                norm_topk_prob=c.norm_topk_prob,
                decoder_sparse_step=1,
                mlp_only_layers=[],
            )
        )
        state = model.state_dict()  # one matrix per expert; transformers 5 fuses them
        with torch.no_grad():
            for i, layer in enumerate(peer.model.layers):
                one = f"model.layers.{i}.mlp.experts."
                gates, ups, downs = (
                    torch.stack([state.pop(f"{one}{e}.{n}_proj.weight") for e in range(c.num_experts)])
                    for n in ("gate", "up", "down")
                )
                layer.mlp.experts.gate_up_proj.copy_(torch.cat((gates, ups), dim=1))
                layer.mlp.experts.down_proj.copy_(downs)
        peer_state = peer.state_dict()
        peer.load_state_dict(state | {n: p for n, p in peer_state.items() if n not in state}, strict=True)
    elif c.qk_norm:
        peer = Qwen3ForCausalLM(Qwen3Config(**shared))
        peer.load_state_dict(model.state_dict(), strict=True)
    else:
        peer = LlamaForCausalLM(LlamaConfig(**shared))
        peer.load_state_dict(model.state_dict(), strict=True)
    return peer.eval()


def random_prompts(*lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=g).tolist() for n in lengths]


def left_padded(prompts):
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def next_logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].float()


@torch.no_grad()
def scored(model, prompt, ids, sampling=None):
    """Log-probs (len(ids),) of an answer by one uncached pass."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logp = sampling_log_probs(logits, sampling or Sampling())
    return logp.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[1] / "model")


# --------------------------------------------------------------------------------------------------------
# The same tokens as transformers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "moe"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate_for_a_batch_of_unequal_prompts(kind, penalty):
    model = tiny(kind)
    prompts = random_prompts(5, 17, 9, 9, 1)
    answers = Generator(model, "float32").generate(
        prompts, max_new_tokens=24, temperature=0, repetition_penalty=penalty, ignore_eos=True
    )
    peer = twin(model)
    peer.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, answers):  # alone: transformers' penalty counts the padding of a batch
        expected = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
        )[0, len(prompt) :]
        assert answer.ids == expected.tolist()
    assert len({t for a in answers for t in a.ids}) > 20  # constant answers would prove little


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_under_transformers_generate_gives_the_engines_answers(kind):
    model = tiny(kind)
    prompts = random_prompts(5, 17, 9)
    ids, mask = left_padded(prompts)
    model.generation_config.eos_token_id = None
    through_hf = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)[
        :, ids.shape[1] :
    ]
    ours = generate(Generator(model, "float32"), prompts, max_new_tokens=16, temperature=0, ignore_eos=True)
    assert [a.ids for a in ours] == through_hf.tolist()


# --------------------------------------------------------------------------------------------------------
# Cache, batches, padding
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_for_every_split(kind):
    model = tiny(kind)
    engine = Generator(model, "float32")
    (ids,) = random_prompts(12)
    with torch.inference_mode():
        full = model(torch.tensor([ids])).logits[0].float()
        for split in range(1, len(ids)):
            for rows in (1, 5):
                cache = generation.KeyValueCache(
                    3, 2, model.config.head_dim, [0] * rows, split, 12, torch.float32, torch.device("cpu")
                )
                logits = [engine.prefill([ids[:split]], rows, cache)[-1]]
                for token in ids[split:]:
                    logits.append(engine.decode(torch.tensor([token] * rows), cache)[-1])
                torch.testing.assert_close(torch.stack(logits), full[split - 1 :], rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "shared"])
def test_models_own_cache_equals_no_cache_for_every_split(kind):
    model = tiny(kind)
    (ids,) = random_prompts(10)
    x = torch.tensor([ids])
    with torch.no_grad():
        full = model(x).logits
        for split in range(1, len(ids)):
            past = model(x[:, :split], use_cache=True).past_key_values
            torch.testing.assert_close(
                model(x[:, split:], past_key_values=past).logits, full[:, split:], rtol=0, atol=3e-5
            )


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 3e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_left_padded_batch_through_the_model_equals_single_rows(kind, dtype, tolerance):
    model = tiny(kind).to(dtype)
    prompts = random_prompts(3, 11, 7)
    ids, mask = left_padded(prompts)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits.float()
    assert batch.isfinite().all()
    for row, prompt in zip(batch, prompts):
        with torch.no_grad():
            alone = model(torch.tensor([prompt])).logits[0].float()
        assert (row[-len(prompt) :] - alone).abs().max() < tolerance * max(1, alone.abs().max() / 4)


@pytest.mark.parametrize(
    "dtype,tolerance,quick", [("float32", 3e-5, True), ("bfloat16", 0.2, True), ("bfloat16", 0.2, False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unequal_prompts_equals_single_rows(monkeypatch, kind, dtype, tolerance, quick):
    """In bfloat16, where its products are quick, five rows attend otherwise than one: both are held to the
    model's uncached pass."""
    monkeypatch.setattr(generation, "prefers_bfloat16", lambda device: quick)
    model = tiny(kind)
    engine = Generator(model, dtype)
    prompts = random_prompts(3, 20, 7, 7, 12)
    settings = dict(max_new_tokens=16, seed=3, ignore_eos=True)  # past 32 slots, where a dense cache grows
    errors = []
    for prompt, answer in zip(prompts, engine.generate(prompts, **settings)):
        (alone,) = engine.generate([prompt], **settings)
        assert dtype == "bfloat16" or alone.ids == answer.ids
        for one in (answer, alone):
            errors.append((one.logprobs - scored(model, prompt, one.ids)).abs())
    errors = torch.cat(errors)
    assert errors.isfinite().all()
    # Rounding may send a token to another expert: then only most tokens are close.
    worst = errors.median() if model.config.use_moe and dtype == "bfloat16" else errors.max()
    assert worst < tolerance


def test_the_cache_grows_beyond_its_first_block():
    model = tiny(max_position_embeddings=1024)
    prompts = random_prompts(5, 9)
    answers = Generator(model, "float32").generate(prompts, max_new_tokens=420, seed=0, ignore_eos=True)
    for prompt, answer in zip(prompts, answers):
        assert (answer.logprobs - scored(model, prompt, answer.ids)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:int8 saves no time")
@pytest.mark.parametrize("kind", KINDS)
def test_int8_stays_close_to_float32(kind):
    model = tiny(kind)
    prompts = random_prompts(8, 3, 8, 12, 5, 8)
    answers = Generator(model, "int8").generate(prompts, max_new_tokens=16, seed=0, ignore_eos=True)
    off = torch.cat([a.logprobs - scored(model, p, a.ids) for p, a in zip(prompts, answers)])
    # Weights of another seed are off by 5. A mixture's router now and then picks another expert.
    assert off.abs().median() < 0.15 and off.abs().mean() < 0.5


def test_products_of_rounded_numbers_are_exact_and_rows_do_not_depend_on_neighbours():
    x, weight = torch.randn(33, 96), torch.randn(64, 96)
    x[3], weight[5] = 7.0, 7.0  # sums of 96 products of 127 with 127
    if not generation.multiplies_integers(torch.device("cpu")):
        pytest.skip("this CPU has no products of 8-bit numbers")
    layer = generation.pack(weight, None, torch.float32, int8=True)
    (a, a_scale), (b, b_scale) = round_to_integers(x), round_to_integers(weight)
    expected = (a.double() @ b.double().t()) * a_scale.double() * b_scale.double().t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-12)
    for i in (0, 3, 32):
        assert torch.equal(layer(x[i : i + 1]), layer(x)[i : i + 1])
    torch.testing.assert_close(layer.add(x, torch.ones(33, 64)), layer(x) + 1)
    zeros, eps = torch.zeros(2, 96), torch.full((1,), 1e-5)
    for y in (layer(zeros), layer.of_norm(zeros, eps), layer.add(zeros, torch.zeros(2, 64))):
        assert torch.equal(y, torch.zeros(2, 64))
    for wrong in (math.nan, math.inf):
        x[1, 2] = wrong
        for y in (layer(x), layer.of_norm(x, eps), layer.add(x, torch.ones(33, 64))):
            assert not y[1].isfinite().any() and y[2].isfinite().all()
    x[1, 2] = 0
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - layer(x)).norm() < 0.02 * layer(x).norm()


def test_a_norm_before_a_product_of_rounded_numbers_is_multiplied_after_it():
    if not generation.multiplies_integers(torch.device("cpu")):
        pytest.skip("this CPU has no products of 8-bit numbers")
    norm, eps = torch.rand(96) + 0.5, torch.full((1,), 1e-5)
    weight = torch.randn(64, 96)
    layer = generation.pack(weight, norm, torch.float32, int8=True)
    for rows in (5, 200):  # few and many rows find their peaks in two ways
        x = torch.randn(rows, 96) * torch.logspace(-2, 2, rows)[:, None]
        expected = F.rms_norm(x.double(), (96,), norm.double(), 1e-5) @ weight.double().t()
        assert (layer.of_norm(x, eps) - expected).norm() < 0.015 * expected.norm()
        half = layer.of_norm(x.bfloat16(), eps)
        assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.02 * expected.norm()


def test_int8_without_integer_products_multiplies_the_rounded_weights(monkeypatch):
    x, weight = torch.randn(7, 96), torch.randn(64, 96)
    monkeypatch.setattr(generation, "multiplies_integers", lambda device: False)
    with pytest.warns(UserWarning, match="int8 saves no time"):
        Generator(tiny(), "int8")
    rounded, scale = round_to_integers(weight)
    layer = generation.pack(weight, None, torch.float32, int8=True)
    torch.testing.assert_close(layer(x), x @ (rounded * scale).t())


@pytest.mark.parametrize("integers, bfloat16", [(True, False), (True, True), (False, False), (False, True)])
def test_auto_multiplies_as_training_does(monkeypatch, integers, bfloat16):
    for module in (generation, precision, runtime):
        monkeypatch.setattr(module, "multiplies_integers", lambda device: integers and device.type == "cpu")
        monkeypatch.setattr(module, "prefers_bfloat16", lambda device: bfloat16)
    for width in (64, 256):
        engine = Generator(tiny(hidden_size=width))
        auto = runtime.choose_dtype("auto", torch.device("cpu"), width)
        assert (torch.int8 if engine.int8 else engine.dtype) == auto
        assert not Generator(tiny(hidden_size=width), "float32").int8
    for device in map(torch.device, ("cuda", "mps")):
        assert generation.choose_dtype("auto", device) == runtime.choose_dtype("auto", device, 256)


def test_8_bit_products_halve_the_cache_where_the_cpu_has_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(generation, "multiplies_integers", lambda device: True)
    for able, cache in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(generation, "cpu_features", lambda able=able: {"avx512_bf16": able})
        monkeypatch.setattr(generation, "prefers_bfloat16", lambda device: False)
        engine = Generator(tiny(), "int8")
        assert (engine.dtype, engine.cache_dtype, engine.prefill_tokens) == (torch.float32, cache, 512)
        engine = Generator(tiny(), "float32")
        assert (engine.cache_dtype, engine.prefill_tokens) == (torch.float32, 2048)


ALL = ("read", "between", "attend", "end", "likeliest")


def as_it_is(function, *arguments):
    """In place of `ahead_of_time`: the same without compiling."""
    return lambda first, second=None: function(first) if second is None else function(*first, *second)


@pytest.fixture(scope="module", params=[("between", "attend"), pytest.param(ALL, marks=pytest.mark.slow)])
def compiled_engine(request):
    """An engine with its longest stretches compiled, or all: 10 s each, where that was not done before."""
    if not generation.multiplies_integers(torch.device("cpu")):
        pytest.skip("this CPU has no products of 8-bit numbers")
    if runtime.why_not_compile(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")

    def compile_some(function, *arguments):
        make = ahead_of_time.ahead_of_time if function.__name__ in request.param else as_it_is
        return make(function, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "ahead_of_time", compile_some)
        engine = Generator(tiny(), "int8", compile=True)
    assert set(engine.compiled) == set(ALL)
    return engine


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_compiled_stretches_compute_what_the_uncompiled_do(compiled_engine, rows):
    engine = compiled_engine
    x, out = torch.randn(rows, 64), torch.randn(rows, 4 * 24)
    x[0] = out[0] = 0
    cos, sin = torch.rand(2, rows, 1, 1, 24)
    for function, weights, inputs in (
        (engine.read, engine.layers[1:2], [x, cos, sin]),
        (engine.between, engine.layers[:2], [out, x, cos, sin]),
        (engine.between, engine.layers[1:], [out, x, cos, sin]),
        (engine.end, [engine.layers[2], engine.head], [out, x]),
        (generation.likeliest, [], [torch.randn(rows, V)]),
    ):
        torch.testing.assert_close(
            engine.call(function, weights, inputs), function(*weights, *inputs), rtol=1e-4, atol=1e-5
        )


@torch.inference_mode()
@pytest.mark.parametrize("rows, K, S", [(1, 1, 3), (1, 2, 90), (3, 2, 16), (40, 2, 90)])
def test_attention_over_rounded_keys_and_values(compiled_engine, monkeypatch, rows, K, S):
    """Through room that grows, and a row dropped, against exact attention over the unrounded ones."""
    monkeypatch.setattr(rounded_cache, "SPARE", 16)
    R, hd = 2, 24
    pad = torch.randint(0, S - 1, (rows,)).tolist()
    cache = KeyValueCache(2, K, hd, list(pad), S, S, torch.float32, torch.device("cpu"))
    cache.keys.normal_(std=3)
    cache.values.normal_()
    keys, values = (x[1].unflatten(0, (rows, K)).clone() for x in (cache.keys, cache.values))

    def attend(weights, inputs):
        twins = [x.clone() for x in inputs]
        out, plain = compiled_engine.call(rounded_cache.attend, weights, inputs), rounded_cache.attend(*twins)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inputs[2], twins[2], rtol=0, atol=0)  # what was written
        return out

    rounded = RoundedCache(cache, attend, limit=S + 50)
    rooms = {rounded.words.shape[3]}
    for step in range(50):
        if step == 25 and rows > 1:
            rounded.drop(0)
            order = [rows - 1, *range(1, rows - 1)]
            rows, pad, keys, values = rows - 1, [pad[i] for i in order], keys[order], values[order]
        assert rounded.next_slot() == S + step
        qk, v = torch.randn(rows, K, R + 1, hd), torch.randn(rows, K, hd)
        out = rounded.attend(qk, v, *rounded.visible(rows)[1])
        keys, values = (torch.cat((c, x[:, :, None]), 2) for c, x in ((keys, qk[:, :, R]), (values, v)))
        hidden = torch.arange(S + step + 1) < torch.tensor(pad)[:, None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)[:, None, None]
        exact = F.scaled_dot_product_attention(qk[:, :, :R], keys, values, attn_mask=bias).reshape(rows, -1)
        assert (out - exact).norm() < 0.03 * exact.norm()
        rooms.add(rounded.words.shape[3])
    assert len(rooms) == 2 and max(rooms) == math.ceil((S + 50) / 16)  # blocks


def test_many_rows_of_a_compiled_engine_stay_close_to_float32(compiled_engine, monkeypatch):
    made, init = [], RoundedCache.__init__
    monkeypatch.setattr(RoundedCache, "__init__", lambda *args, **named: made.append(init(*args, **named)))
    monkeypatch.setattr(rounded_cache, "SPARE", 16)
    prompts = random_prompts(*range(3, 33))
    answers = compiled_engine.generate(prompts, max_new_tokens=120, seed=0, stop_token_ids=range(3, V, 40))
    assert len(made) == 1 and len({a.num_tokens for a in answers}) > 5  # they end one by one
    model = compiled_engine.model
    off = torch.cat([a.logprobs - scored(model, p, a.ids) for p, a in zip(prompts, answers)])
    assert off.abs().median() < 0.15 and off.abs().mean() < 0.5  # weights of another seed are off by 5


def test_a_compiled_engine_answers_as_an_uncompiled_one_and_follows_training(compiled_engine, monkeypatch):
    monkeypatch.setattr(generation, "ahead_of_time", as_it_is)
    plain = Generator(compiled_engine.model, "int8", compile=True)  # so that it rounds keys and values too
    for lengths, settings in (
        ([5, 9, 9, 3], dict(temperature=0)),
        ([4], dict(temperature=0)),
        ([5, 7], dict(num_return_sequences=3, seed=1, repetition_penalty=1.3)),
    ):
        prompts = random_prompts(*lengths)
        with torch.no_grad():
            compiled_engine.model.model.layers[1].mlp.up_proj.weight.mul_(0.9)
        expected, answers = (
            engine.generate(prompts, max_new_tokens=12, ignore_eos=True, **settings)
            for engine in (plain, compiled_engine)
        )
        same = []
        for answer, other in zip(answers, expected):
            same.append(next((i for i, (a, b) in enumerate(zip(answer.ids, other.ids)) if a != b), 12))
            # Where a last place decides how a number is rounded to 8 bits, logits differ in the third place.
            assert (answer.logprobs - other.logprobs)[: same[-1]].abs().max() < 0.05
        assert min(same) >= 1 and sum(same) >= 8 * len(answers)


def test_what_was_compiled_once_is_found_again_and_only_where_it_fits(compiled_engine, monkeypatch):
    def never(*args):
        raise RuntimeError("the compiler was asked")

    monkeypatch.setattr(ahead_of_time, "make_package", never)
    layers, (K, R, hd) = compiled_engine.layers, (2, 2, 24)
    rows = [torch.zeros(ahead_of_time.EXAMPLE_ROWS, *shape) for shape in ((K * R * hd,), (64,))]
    rows += torch.zeros(2, len(rows[0]), 1, 1, hd)
    facts = [K, R, hd, compiled_engine.config.rms_norm_eps]
    assert ahead_of_time.ahead_of_time(compiled_engine.between, layers[:2], rows, facts)
    for other in (
        tiny(num_hidden_layers=1, intermediate_size=128),
        tiny(rms_norm_eps=1e-3),
        tiny(num_attention_heads=6),
    ):
        with pytest.warns(UserWarning, match="not compiled .*the compiler was asked"):
            assert not Generator(other, "int8", compile=True).compiled
    weight, threads = torch.zeros(3, 4), torch.get_num_threads()
    path = ahead_of_time.package_path("f", [weight], [2])
    assert path == ahead_of_time.package_path("f", [weight + 1], [2])
    assert path != ahead_of_time.package_path("f", [weight.t().contiguous().t()], [2])
    try:
        torch.set_num_threads(threads + 1)
        assert path != ahead_of_time.package_path("f", [weight], [2])
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_engine_for_compiled_float32_is_as_exact(kind, monkeypatch):
    """Its weights lie as the compiler wants them; here nothing is compiled."""

    monkeypatch.setattr(generation, "ahead_of_time", as_it_is)
    model = tiny(kind)
    engine = Generator(model, "float32", compile=True)
    assert set(engine.compiled) == {"read", "between", "end", "likeliest"}
    compare_with_an_uncompiled_engine(model, engine)


@pytest.mark.slow
def test_a_compiled_float32_engine_is_as_exact():
    if runtime.why_not_compile(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    model = tiny("qwen3")
    compare_with_an_uncompiled_engine(model, Generator(model, "float32", compile=True))


def compare_with_an_uncompiled_engine(model, engine):
    assert engine.compiled and not any(layer.qkv.packed for layer in engine.layers)
    plain = Generator(model, "float32")
    for lengths, settings in (([5, 9, 9, 3], dict(temperature=0)), ([4], dict(seed=1))):
        prompts = random_prompts(*lengths)
        for one, other in zip(*(e.generate(prompts, max_new_tokens=20, **settings) for e in (engine, plain))):
            assert one.ids == other.ids
            assert (one.logprobs - other.logprobs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "kind, head_dim, able", [("qwen3", 24, True), ("qwen3", 18, True), ("qwen3", 24, False)]
)
def test_types_fit_each_other_whatever_the_machine_prefers(monkeypatch, kind, head_dim, able):
    """Compiled code is in float32; where compiling fails, everything is as if it had not been asked for."""

    def broken(*arguments):
        raise RuntimeError("no compiler")

    if not generation.multiplies_integers(torch.device("cpu")):
        pytest.skip("this CPU has no products of 8-bit numbers")
    monkeypatch.setattr(generation, "prefers_bfloat16", lambda device: True)
    monkeypatch.setattr(generation, "cpu_features", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(generation, "ahead_of_time", as_it_is if able else broken)
    model = tiny(kind, head_dim=head_dim)
    plain = Generator(model, "int8")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine = Generator(model, "int8", compile=True)
    assert plain.can_compile and engine.can_compile and len(told) == 1 - able
    assert ("attend" in engine.compiled) == (able and head_dim == 24)
    types = (torch.float32, torch.float32) if able else (torch.bfloat16, torch.bfloat16)
    assert (engine.dtype, engine.cache_dtype) == types
    assert (plain.dtype, plain.cache_dtype) == (torch.bfloat16, torch.bfloat16)
    seen = []
    original = engine.between
    monkeypatch.setattr(engine, "between", lambda a, b, *rows: seen.append(rows) or original(a, b, *rows))
    engine.compiled.pop("between", None)
    prompts = random_prompts(5, 9, 9, 3, 7)
    for answer, prompt in zip(engine.generate(prompts, max_new_tokens=4, seed=0), prompts):
        assert (answer.logprobs - scored(model, prompt, answer.ids)).abs().max() < 1
    if able:  # nothing checks what compiled code is given
        assert {x.dtype for rows in seen for x in rows} == {torch.float32}


@pytest.mark.parametrize("kind, dtype", [("moe", "int8"), ("qwen3", "bfloat16")])
@pytest.mark.filterwarnings("ignore:int8 saves no time")
def test_what_cannot_be_compiled_says_so_and_works(kind, dtype):
    with pytest.warns(UserWarning, match="not compiled: that is for dense models"):
        engine = Generator(tiny(kind), dtype, compile=True)
    assert engine.generate(random_prompts(4), max_new_tokens=3)[0].num_tokens == 3


def test_more_rows_than_fit_are_done_in_turns_with_the_same_answers():
    model = tiny()
    prompts = random_prompts(4, 9, 6, 5, 8)
    settings = dict(max_new_tokens=8, seed=5, num_return_sequences=2)
    whole = Generator(model, "float32").generate(prompts, **settings)
    turns = Generator(model, "float32", max_rows=3, prefill_tokens=7).generate(prompts, **settings)
    assert [a.ids for a in whole] == [a.ids for a in turns]


def test_every_prompt_may_have_a_seed_of_its_own():
    """Then its draws do not depend on what else is asked."""
    engine = Generator(tiny(), "float32")
    (prompt,) = random_prompts(6)
    settings = dict(max_new_tokens=8, ignore_eos=True)
    alone = [engine.generate([prompt], seed=seed, **settings)[0].ids for seed in (3, 4)]
    three = engine.generate([prompt] * 3, seed=[4, 3, 4], **settings)
    assert [a.ids for a in three[:2]] == alone[::-1]
    assert three[2].ids not in alone, "the same seed and prompt again count on"
    with pytest.raises(ValueError, match="2 numbers for 3 prompts"):
        engine.generate([prompt] * 3, seed=[1, 2])


def test_the_engine_follows_a_model_that_goes_on_training():
    model = tiny()
    engine = Generator(model, "float32")
    (prompt,) = random_prompts(6)
    engine.generate([prompt], max_new_tokens=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.train()
    model(
        torch.tensor([prompt]), labels=torch.tensor([prompt])
    ).loss.backward()  # its tables still serve training
    optimizer.step()
    (answer,) = engine.generate([prompt], max_new_tokens=8, seed=0, ignore_eos=True)
    assert (answer.logprobs - scored(model.eval(), prompt, answer.ids)).abs().max() < 3e-5


def test_yarn_positions_are_the_models():
    model = tiny(inference_rope_scaling=True, original_max_position_embeddings=16)
    prompts = random_prompts(30, 11)
    for prompt, answer in zip(
        prompts, generate(Generator(model, "float32"), prompts, max_new_tokens=8, seed=0)
    ):
        assert (answer.logprobs - scored(model, prompt, answer.ids)).abs().max() < 3e-5


def test_replaced_forward_is_refused_instead_of_ignored():
    model = tiny()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="merge adapters"):
        Generator(model)


# --------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------

SETTINGS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=7),
    dict(top_k=1),
    dict(top_k=10**6),
    dict(top_p=0.85),
    dict(top_p=0.02),
    dict(top_p=0.9999),
    dict(min_p=0.1),
    dict(repetition_penalty=1.4),
    dict(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    dict(temperature=1.3, top_p=0.9, min_p=0.02),
]


def peer_log_probs(logits, seen_ids, s: Sampling):
    """transformers' processors in the order of its generate."""
    scores = logits.clone()
    if s.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(seen_ids, scores)
    if s.temperature != 1:
        scores = TemperatureLogitsWarper(s.temperature)(seen_ids, scores)
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(seen_ids, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(seen_ids, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(seen_ids, scores)
    return torch.log_softmax(scores, -1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_processor_gives_transformers_distribution_and_sample_draws_from_it(settings):
    torch.manual_seed(0)
    s = Sampling(**settings)
    vocabulary = 900  # wider than the sampler's first two candidate lists
    logits = (
        torch.randn(6, vocabulary) * torch.tensor([0.1, 0.5, 1, 2, 4, 9])[:, None]
    )  # flat to peaked, both signs
    seen_ids = torch.randint(vocabulary, (6, 30))
    seen = torch.zeros(6, vocabulary, dtype=torch.bool).scatter(1, seen_ids, True)
    expected = peer_log_probs(logits, seen_ids, s)
    plain = sampling_log_probs(logits, s, seen)
    assert torch.equal(plain.isinf(), expected.isinf())
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    # The quantiles of 4000 evenly spread numbers must reproduce every probability to within two grid steps.
    grid = (torch.arange(4000) + 0.5) / 4000
    for row in range(6):
        tokens, logp = sample(logits[row].expand(4000, -1), s, grid, seen[row].expand(4000, -1))
        assert not expected[row, tokens].isinf().any()
        torch.testing.assert_close(logp, expected[row, tokens], rtol=0, atol=2e-5)
        share = torch.bincount(tokens, minlength=vocabulary) / 4000
        assert (share - expected[row].exp()).abs().max() <= 2.1 / 4000


def test_penalty_lowers_negative_logits_too():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert generation.penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_penalty_counts_the_prompt_only_when_asked():
    model = tiny()
    (prompt,) = random_prompts(9)
    engine = Generator(model, "float32")
    first = next_logits(model, prompt)
    for counted in (True, False):
        (answer,) = engine.generate(
            [prompt], max_new_tokens=1, temperature=0, repetition_penalty=3.0, penalize_prompt=counted
        )
        seen = torch.zeros(1, V, dtype=torch.bool)
        if counted:
            seen[0, prompt] = True
        assert answer.ids == [int(generation.penalize(first[None], seen, 3.0).argmax())]


def test_temperature_zero_is_greedy_with_log_probs_at_temperature_one():
    model = tiny()
    (prompt,) = random_prompts(6)
    (answer,) = generate(
        Generator(model, "float32"), [prompt], temperature=0, max_new_tokens=8, ignore_eos=True
    )
    ids = list(prompt)
    for token in answer.ids:
        assert token == int(next_logits(model, ids).argmax())
        ids.append(token)
    assert (answer.logprobs - scored(model, prompt, answer.ids)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings", [dict(), dict(temperature=0.7), dict(temperature=0.8, top_k=20, top_p=0.9)], ids=str
)
def test_log_probs_of_the_sampler_are_those_of_a_scorer(settings):
    """What policy gradients rest on: ratio 1 on the first step, at any temperature and truncation."""
    model = tiny()
    prompts = random_prompts(5, 12)
    answers = Generator(model, "float32").generate(
        prompts, max_new_tokens=20, num_return_sequences=3, seed=1, **settings
    )
    for answer in answers:
        prompt = prompts[answer.prompt_index]
        expected = scored(model, prompt, answer.ids, Sampling(**settings))
        assert answer.logprobs.dtype == torch.float32
        assert (answer.logprobs - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings", [dict(), dict(temperature=0.7, top_p=0.8), dict(top_k=12, min_p=0.02)], ids=str
)
def test_sampled_frequencies_match_the_returned_log_probs(settings):
    """Chi-square over 6000 first tokens: below the 99.9 % point."""
    model = tiny()
    (prompt,) = random_prompts(6)
    count = 6000
    engine = Generator(model, "float32", max_rows=count)
    answers = engine.generate([prompt], max_new_tokens=1, num_return_sequences=count, seed=11, **settings)
    drawn = torch.tensor([a.ids[0] for a in answers])
    probs = {a.ids[0]: math.exp(a.logprobs[0]) for a in answers}
    expected = sampling_log_probs(next_logits(model, prompt)[None], Sampling(**settings))[0].exp()
    for token, p in probs.items():
        assert math.isclose(p, expected[token], rel_tol=1e-3, abs_tol=1e-6)
    observed = torch.bincount(drawn, minlength=V).float()
    assert observed[expected == 0].sum() == 0
    big = expected * count >= 5
    o = torch.cat((observed[big], observed[~big].sum()[None]))
    e = torch.cat((expected[big] * count, expected[~big].sum()[None] * count))
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    chi_square = ((o - e) ** 2 / e).sum().item()
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
    assert chi_square < limit


def test_random_numbers_are_splitmix64():
    def reference(seed, step):
        mask = (1 << 64) - 1
        z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 41) / 2**23

    seeds = torch.tensor([0, 1, 2**62 + 12345])
    table = uniforms(seeds, 5, 4)
    assert table.tolist() == [[reference(s, k) for s in seeds.tolist()] for k in range(5, 9)]
    many = uniforms(torch.arange(1000), 0, 100)
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002 and many.max() < 1


# --------------------------------------------------------------------------------------------------------
# Order, seeds, ends
# ----------------------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_are_neighbours_and_differ():
    """MiniMind gave a, b, a, b: groups mixed two prompts."""
    model = tiny()
    prompts = random_prompts(7, 4)
    answers = Generator(model, "float32").generate(prompts, num_return_sequences=4, max_new_tokens=12, seed=0)
    assert [a.prompt_index for a in answers] == [0, 0, 0, 0, 1, 1, 1, 1]
    for answer in answers:
        own = scored(model, prompts[answer.prompt_index], answer.ids)
        assert (answer.logprobs - own).abs().max() < 1e-5
    for group in (answers[:4], answers[4:]):
        assert len({tuple(a.ids) for a in group}) == 4
        assert len({a.ids[0] for a in group}) > 1


def test_a_prompt_given_twice_gets_the_samples_of_two_return_sequences():
    engine = Generator(tiny(), "float32")
    (prompt,) = random_prompts(6)
    twice = engine.generate([prompt, prompt], max_new_tokens=8, seed=0)
    both = engine.generate([prompt], max_new_tokens=8, seed=0, num_return_sequences=2)
    assert [a.ids for a in twice] == [a.ids for a in both]
    assert twice[0].ids != twice[1].ids


def test_a_seed_repeats_an_answer_whatever_its_batch_mates():
    engine = Generator(tiny(), "float32")
    prompts = random_prompts(6, 13, 9)
    settings = dict(max_new_tokens=15, seed=42, temperature=0.9, top_p=0.95)
    whole = [a.ids for a in engine.generate(prompts, **settings)]
    assert whole == [a.ids for a in engine.generate(prompts, **settings)]
    assert whole[::-1] == [a.ids for a in engine.generate(prompts[::-1], **settings)]
    assert whole == [engine.generate([p], **settings)[0].ids for p in prompts]
    assert whole != [a.ids for a in engine.generate(prompts, **(settings | dict(seed=43)))]


def test_without_a_seed_torchs_generator_decides():
    engine = Generator(tiny(), "float32")
    prompts = random_prompts(6)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(engine.generate(prompts, max_new_tokens=10)[0].ids)
    assert answers[0] == answers[1] != answers[2]


def test_each_row_stops_at_its_own_end_and_says_why():
    model = tiny()
    engine = Generator(model, "float32")
    prompts = random_prompts(6, 4, 9)
    free = engine.generate(prompts, max_new_tokens=30, seed=8, num_return_sequences=4, ignore_eos=True)
    stop = free[0].ids[5]
    eos = next(t for t in free[-1].ids if t != stop)
    ended = engine.generate(
        prompts,
        max_new_tokens=30,
        seed=8,
        num_return_sequences=4,
        eos_token_ids=(eos,),
        stop_token_ids=(stop,),
    )
    reasons = set()
    for whole, answer in zip(free, ended):
        ends = [i for i, t in enumerate(whole.ids) if t in (stop, eos)]
        n = ends[0] + 1 if ends else 30
        assert answer.ids == whole.ids[:n] and answer.num_tokens == n
        assert torch.allclose(answer.logprobs, whole.logprobs[:n], atol=1e-5)
        reason = "length" if not ends else "eos" if whole.ids[n - 1] == eos else "stop"
        assert answer.finish_reason == reason
        assert answer.num_prompt_tokens == len(prompts[answer.prompt_index])
        reasons.add(reason)
    assert {"eos", "stop"} <= reasons


def test_the_configurations_eos_ends_an_answer_unless_ignored():
    model = tiny()
    engine = Generator(model, "float32")
    (prompt,) = random_prompts(5)
    (free,) = engine.generate([prompt], max_new_tokens=10, seed=0, ignore_eos=True)
    model.config.eos_token_id = free.ids[2]
    (ended,) = engine.generate([prompt], max_new_tokens=10, seed=0)
    assert ended.finish_reason == "eos" and ended.ids[-1] == free.ids[2] and ended.num_tokens <= 3


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens_is_exact(count):
    answers = Generator(tiny(), "float32").generate(
        random_prompts(4, 8), max_new_tokens=count, ignore_eos=True
    )
    assert [(a.num_tokens, len(a.logprobs), a.finish_reason) for a in answers] == [
        (count, count, "length")
    ] * 2


def test_answers_end_where_the_positions_end():
    engine = Generator(tiny(max_position_embeddings=20), "float32")
    answers = engine.generate(random_prompts(19, 12), max_new_tokens=50, ignore_eos=True, seed=0)
    assert [(a.num_tokens, a.finish_reason) for a in answers] == [(1, "length"), (8, "length")]


def test_nonsense_is_refused_with_a_reason():
    engine = Generator(tiny(max_position_embeddings=20), "float32")
    (prompt,) = random_prompts(5)
    with pytest.raises(TypeError, match="max_length.*max_new_tokens"):
        engine.generate([prompt], max_length=5)
    for bad, word in [
        (dict(temperature=-1), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(stop="x"), "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=word):
            engine.generate([prompt], **bad)
    with pytest.raises(ValueError, match="20 positions"):
        engine.generate([[5] * 20])
    with pytest.raises(ValueError, match="empty"):
        engine.generate([prompt, []])
    with pytest.raises(ValueError, match="token id"):
        engine.generate([[V]])
    assert engine.generate([]) == []


# --------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello, world!",
    "你好，世界。今天天气怎么样？",
    "a😀b👩‍👩‍👧é ñ\n\tx  y",
    "𠮷野家 العربية हिन्दी",
    " ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer, text):
    """Fed byte by byte, the hardest split: every character outside ASCII comes in pieces."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    alphabet = {t: i for t, i in tokenizer.get_vocab().items() if len(t) == 1}
    single = [alphabet[c] for t in tokenizer.convert_ids_to_tokens(ids) for c in t]
    for tokens in (ids, single):
        stream = TextStream(tokenizer)
        pieces = [stream.put(t) for t in tokens] + [stream.finish()]
        assert "".join(pieces) == text
        assert not any("\ufffd" in p for p in pieces)


def test_an_answer_cut_inside_a_character_ends_before_it(tokenizer):
    alphabet = {t: i for t, i in tokenizer.get_vocab().items() if len(t) == 1}
    ids = [alphabet[c] for t in tokenizer.convert_ids_to_tokens(tokenizer("ok 你").input_ids) for c in t][:-1]
    stream = TextStream(tokenizer)
    assert "".join([stream.put(t) for t in ids[:-1]] + [stream.put(ids[-1], last=True)]) == "ok "


def test_stop_strings_never_show_even_in_part(tokenizer):
    text = "one two ENDED three END four"
    for stop, expected in (
        (("END four",), "one two ENDED three "),
        (("END ", "two"), "one "),
        (("absent",), text),
    ):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.put(t) for t in tokenizer(text).input_ids] + [stream.finish()]
        assert "".join(pieces) == expected


def test_stream_equals_generate_and_shows_no_special_tokens(tokenizer):
    model = tiny(vocab_size=len(tokenizer))
    prompt = tokenizer("你好").input_ids
    settings = dict(max_new_tokens=40, seed=3, temperature=2.0)
    engine = Generator(model, "float32")
    (answer,) = engine.generate([prompt], tokenizer, **settings)
    pieces = list(engine.stream(prompt, tokenizer, **settings))
    assert "".join(pieces) == answer.text
    decoded = tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert unicodedata.normalize("NFC", decoded.rstrip("\ufffd")).startswith(
        unicodedata.normalize("NFC", answer.text)
    )
    # the same answer, ended by a piece of its own text
    word = answer.text[5:8]
    (stopped,) = engine.generate([prompt], tokenizer, stop=word, **settings)
    assert stopped.finish_reason == "stop" and word not in stopped.text
    assert stopped.text == answer.text[: answer.text.find(word)]
    assert stopped.ids == answer.ids[: stopped.num_tokens] and stopped.num_tokens < answer.num_tokens
