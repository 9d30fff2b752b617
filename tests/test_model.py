"""The model against transformers' Llama, Qwen3 and Qwen3-MoE, and against itself: packed, cached, padded,
chunked."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.model_minimind import (
    PRESETS,
    MiniMindConfig,
    MiniMindForCausalLM,
    balance_loss,
    count_parameters,
    linear_cross_entropy_sum,
    rope_frequencies,
    route,
)

SMALL = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
)
MOE = dict(use_moe=True, num_experts=4, num_experts_per_tok=2, n_shared_experts=0, moe_intermediate_size=96)
KINDS = {"llama": {}, "qwen3": dict(qk_norm=True), "qwen3_moe": dict(qk_norm=True, **MOE)}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e6}


def random_model(seed=0, **fields) -> MiniMindForCausalLM:
    """Random weights AND random norms: all-ones norms would hide a swapped or forgotten one."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**(SMALL | fields))).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1) if p.ndim > 1 else p.data.normal_(1, 0.3)
    return model


def reference_model(kind: str, rope=DEFAULT_ROPE, **moe):
    shared = dict(SMALL, tie_word_embeddings=True, rope_parameters=rope)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shared)).eval()
    fields = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True) | moe
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **fields)).eval()


def to_reference_names(state: dict) -> dict:
    """transformers 5 keeps a mixture's experts stacked in memory (on disk they are one by one, like ours)."""
    stacked = {k: v for k, v in state.items() if ".experts." not in k}
    for layer in range(SMALL["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.gate_proj.weight" not in state:
            continue
        names = range(sum(k.startswith(prefix) and k.endswith("gate_proj.weight") for k in state))
        stacked[f"{prefix}.gate_up_proj"] = torch.stack(
            [
                torch.cat([state[f"{prefix}.{e}.gate_proj.weight"], state[f"{prefix}.{e}.up_proj.weight"]])
                for e in names
            ]
        )
        stacked[f"{prefix}.down_proj"] = torch.stack([state[f"{prefix}.{e}.down_proj.weight"] for e in names])
    return stacked


def tokens(B=2, T=20, seed=1):
    return torch.randint(0, 100, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "preset, total, active",
    [
        ("minimind2-small", 25_829_888, 25_829_888),
        ("minimind2-moe", 145_029_760, 91_945_600),
        ("minimind2", 104_030_976, 104_030_976),
        ("minimind-3", 63_912_192, 63_912_192),
        ("minimind-3-moe", 198_416_640, 63_936_768),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, total, active):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig.from_preset(preset))
    assert count_parameters(model) == (total, active)


def test_a_preset_takes_overrides_and_an_unknown_one_is_refused():
    assert MiniMindConfig.from_preset("minimind-3", hidden_size=128).hidden_size == 128
    with pytest.raises(ValueError, match="minimind2-small"):
        MiniMindConfig.from_preset("minimind-9")
    assert set(PRESETS) >= {"tiny", "minimind2-small", "minimind2-moe", "minimind2", "minimind-3"}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradient_equal_transformers(kind):
    ours, reference = random_model(**KINDS[kind]), reference_model(kind)
    reference.load_state_dict(to_reference_names(ours.state_dict()), strict=True)
    x = tokens()
    assert (ours(x).logits - reference(x).logits).abs().max() < 1e-5
    labels = x.clone()
    labels[0, :7] = -100
    a, b = ours.train()(x, labels=labels), reference.train()(x, labels=labels)
    assert math.isclose(a.loss.item(), b.loss.item(), rel_tol=1e-5)
    a.loss.backward()
    b.loss.backward()
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        ga, gb = ours.get_parameter(name).grad, reference.get_parameter(name).grad
        assert (ga - gb).abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_written_by_transformers_loads_strictly(kind, tmp_path):
    from safetensors.torch import load_file

    reference = reference_model(kind)
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(0, 0.1) if p.ndim > 1 else p.normal_(1, 0.3)
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: saved once
    ours = MiniMindForCausalLM(MiniMindConfig(**(SMALL | KINDS[kind]))).eval()
    ours.load_state_dict(state, strict=True)
    x = tokens()
    assert (ours(x).logits - reference(x).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_from_pretrained_round_trip(kind, tmp_path):
    ours = random_model(**KINDS[kind])
    ours.save_pretrained(tmp_path)
    for _ in range(3):
        _heap_dirt = torch.full((512, 512), float("nan"))  # tables must never come from uninitialised memory
        again = MiniMindForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens()).logits, ours(tokens()).logits)
    ignored = {"transformers_version", "dtype", "architectures", "_name_or_path"}
    a, b = ours.config.to_dict(), again.config.to_dict()
    assert {k: v for k, v in a.items() if k not in ignored} == {
        k: v for k, v in b.items() if k not in ignored
    }


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generate_gives_the_reference_tokens(kind):
    ours, reference = random_model(**KINDS[kind]), reference_model(kind)
    reference.load_state_dict(to_reference_names(ours.state_dict()), strict=True)
    args = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=99)
    x, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    assert torch.equal(
        ours.generate(x, attention_mask=mask, **args), reference.generate(x, attention_mask=mask, **args)
    )


# ---- rotary
# positions


def test_yarn_frequencies_equal_transformers():
    for theta, factor, original, extra in [
        (1e6, 16.0, 2048, {}),
        (1e6, 16.0, 2048, {"attention_factor": 1.0}),
        (1e4, 4.0, 64, {}),
        (1e4, 8.0, 131072, {}),
    ]:
        rope = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
        rope = rope | {"beta_fast": 32.0, "beta_slow": 1.0} | extra
        config = Qwen3Config(
            head_dim=96, max_position_embeddings=int(original * factor), rope_parameters=dict(rope)
        )
        expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
        freqs, attention_factor = rope_frequencies(96, rope)
        torch.testing.assert_close(freqs, expected, rtol=1e-6, atol=0)
        assert math.isclose(attention_factor, expected_factor, rel_tol=1e-9)


def test_yarn_by_hand():
    """d = 8, base 1e4, s = 4, L = 64: the ramp runs from dimension 0 to 2."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    freqs, attention_factor = rope_frequencies(8, rope)
    torch.testing.assert_close(freqs, torch.tensor([1, 0.0625, 0.0025, 0.00025]))
    assert math.isclose(attention_factor, 1.138629436, rel_tol=1e-9)


def test_yarn_model_equals_transformers_and_the_flag_means_factor_16():
    rope = dict(
        rope_type="yarn",
        rope_theta=1e6,
        factor=16.0,
        original_max_position_embeddings=2048,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.0,
    )
    ours = random_model(qk_norm=True, inference_rope_scaling=True)
    assert {k: ours.config.rope_parameters[k] for k in rope} == rope
    reference = reference_model("qwen3", rope=rope)
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = tokens(1, 80)
    assert (ours(x).logits - reference(x).logits).abs().max() < 1e-5
    plain = random_model(qk_norm=True)
    assert (ours(x).logits - plain(x).logits).abs().max() > 1e-3, "YaRN changed nothing"


# ---- packed, cached,
# padded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_equal_separate_documents(kind, training):
    """Both attention paths: block products (training on CPU) and the fused kernel with a mask."""
    model = random_model(**KINDS[kind]).train(training)
    lengths = [5, 150, 1, 100]  # crosses the edges of the 128-row blocks
    row = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.set_grad_enabled(training):
        packed = model(row, position_ids=positions).logits
        start = 0
        for n in lengths:
            alone = model(row[:, start : start + n]).logits
            assert (packed[:, start : start + n] - alone).abs().max() < 1e-5
            start += n


def test_changing_one_document_moves_no_logit_of_another():
    model = random_model(qk_norm=True)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    a = tokens(1, 20)
    b = a.clone()
    b[0, 3] = (b[0, 3] + 1) % 100
    la, lb = model(a, position_ids=positions).logits, model(b, position_ids=positions).logits
    assert torch.equal(la[:, 8:], lb[:, 8:])
    assert not torch.equal(la[:, 3:8], lb[:, 3:8])


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_for_every_split(kind):
    model = random_model(**KINDS[kind])
    x = tokens(2, 12)
    full = model(x).logits
    for split in range(1, 12):
        first = model(x[:, :split], use_cache=True)
        rest = model(x[:, split:], past_key_values=first.past_key_values, use_cache=True)
        both = torch.cat([first.logits, rest.logits], dim=1)
        assert (both - full).abs().max() < 1e-5, f"split at {split}"
    step, cache = [], None
    for t in range(12):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step.append(out.logits)
    assert (torch.cat(step, dim=1) - full).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_equals_single_rows(kind, dtype, tolerance):
    model = random_model(**KINDS[kind]).to(dtype)
    long, short = tokens(1, 12), tokens(1, 7, seed=2)
    batch = torch.cat([long, F.pad(short, (5, 0), value=0)])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    logits = model(batch, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for row, alone in ((0, model(long).logits), (1, model(short).logits)):
        got = logits[row, -alone.shape[1] :]
        assert (got - alone[0]).abs().max() <= tolerance * alone.abs().max().clamp(min=1)


def test_right_padding_does_not_touch_real_tokens():
    model = random_model(qk_norm=True)
    x = tokens(1, 9)
    padded = F.pad(x, (0, 4), value=0)
    mask = F.pad(torch.ones_like(x), (0, 4), value=0)
    assert (model(padded, attention_mask=mask).logits[:, :9] - model(x).logits).abs().max() < 1e-5


def test_logits_to_keep_are_the_last_ones():
    model, x = random_model(), tokens()
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, model(x).logits[:, -3:])


# ---- loss


def test_chunked_loss_and_gradients_equal_cross_entropy_in_float64():
    torch.manual_seed(0)
    for n, valid in [(2000, 0.7), (3, 1.0), (10, 0.0)]:
        hidden = torch.randn(n, 8, dtype=torch.float64)
        weight = torch.randn(11, 8, dtype=torch.float64)
        targets = torch.where(torch.rand(n) < valid, torch.randint(0, 11, (n,)), -100)
        h1, w1 = hidden.float().requires_grad_(), weight.float().requires_grad_()
        loss = linear_cross_entropy_sum(h1, w1, targets)
        loss.backward()
        h2, w2 = hidden.requires_grad_(), weight.requires_grad_()
        expected = F.cross_entropy(h2 @ w2.T, targets, reduction="sum", ignore_index=-100)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(h1.grad.double(), h2.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(w1.grad.double(), w2.grad, rtol=1e-4, atol=1e-4)


def test_loss_is_a_sum_over_the_given_count_and_zero_without_targets():
    model, x = random_model().train(), tokens()
    whole = model(x, labels=x).loss
    assert math.isclose(model(x, labels=x, num_items_in_batch=76).loss.item(), whole.item() / 2, rel_tol=1e-6)
    nothing = model(x, labels=torch.full_like(x, -100))
    nothing.loss.backward()
    assert nothing.loss.item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("moe", [False, True])
def test_projections_into_the_residual_stream_start_as_asked(moe):
    """A second initialisation of the same tensor is ignored by transformers: the setting once did nothing."""
    for setting, std in [("zero", 0.0), ("scaled", 0.02 / math.sqrt(6)), ("normal", 0.02)]:
        model = MiniMindForCausalLM(MiniMindConfig(**(SMALL | (MOE if moe else {})), residual_init=setting))
        for name, p in model.named_parameters():
            if p.ndim == 2:
                expected = std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                if setting == "zero" and name.endswith("v_proj.weight"):
                    expected = 0.02 / 5
                assert abs(p.std().item() - expected) <= 0.2 * expected, name


def test_the_first_loss_of_a_fresh_model_is_ln_vocab():
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL))
    assert abs(model(tokens(4, 60), labels=tokens(4, 60)).loss.item() - math.log(100)) < 0.1


# ---- MoE


def test_balance_loss_by_hand_and_against_transformers():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = torch.tensor([[2, 0.1, 0, -0.1], [0, 1, -0.2, 0.3], [0.2, 0, -0.4, 3], [1, 1.2, 0, 0.5]])
    for k, valid, value in [
        (1, None, 1.1535532),
        (2, None, 2.3702931),
        (2, torch.tensor([1, 1, 1, 0]), 2.4316330),
    ]:
        probs, _, experts = route(logits, k, True)
        ours = balance_loss(probs, experts, valid)
        assert math.isclose(ours.item(), value, rel_tol=1e-6)
        mask = None if valid is None else valid[None]
        assert math.isclose(ours.item(), load_balancing_loss_func((logits,), 4, k, mask).item(), rel_tol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_router_learns_from_the_language_loss_alone(k, normalise):
    """Normalising a single weight makes it the constant 1: the router of MiniMind's default got no
    gradient."""
    model = random_model(**(MOE | dict(num_experts_per_tok=k, norm_topk_prob=normalise))).train()
    model(tokens(), labels=tokens()).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-5


def test_top_1_normalised_still_weighs_its_expert_with_exactly_one():
    _, weights, _ = route(torch.randn(50, 4), 1, True)
    assert torch.equal(weights, torch.ones(50, 1))
    reference = reference_model("qwen3_moe", num_experts_per_tok=1)
    ours = random_model(qk_norm=True, **(MOE | dict(num_experts_per_tok=1)))
    reference.load_state_dict(to_reference_names(ours.state_dict()), strict=True)
    assert (ours(tokens()).logits - reference(tokens()).logits).abs().max() < 1e-5


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none():
    model = random_model(**(MOE | dict(num_experts_per_tok=1))).train()
    with torch.no_grad():
        for layer in model.model.layers:  # expert 0 always wins
            layer.mlp.gate.weight.zero_()
    model(tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if ".experts.3." in n]
    assert grads and all(g is not None and g.abs().max() == 0 for g in grads)


def test_shared_experts_see_every_token():
    model = random_model(**(MOE | dict(n_shared_experts=1)))
    names = set(model.state_dict())
    assert "model.layers.0.mlp.shared_experts.0.down_proj.weight" in names
    before = model(tokens()).logits
    model.model.layers[0].mlp.shared_experts[0].down_proj.weight.data.mul_(2)
    assert ((model(tokens()).logits - before).abs().amax(-1) > 0).all()


def test_grouped_product_equals_the_loop_over_experts():
    """bfloat16 takes the grouped kernel, float32 the loop; both are the same sum up to rounding."""
    model = random_model(**MOE)
    exact = model(tokens()).logits
    rounded = model.to(torch.bfloat16)(tokens()).logits.float()
    assert (rounded - exact).abs().max() < 0.15 * exact.abs().max()


def test_padding_is_outside_of_the_balance_loss():
    model = random_model(**MOE).train()
    x = tokens(1, 9)
    padded, mask = F.pad(x, (0, 6), value=3), F.pad(torch.ones_like(x), (0, 6), value=0)
    alone = model(x, labels=x).aux_loss
    assert math.isclose(
        model(padded, attention_mask=mask, labels=padded).aux_loss.item(), alone.item(), rel_tol=1e-5
    )


def test_nonsense_configurations_are_refused_with_a_reason():
    for fields, reason in [
        (dict(num_attention_heads=4, num_key_value_heads=3), "multiple"),
        (dict(head_dim=15), "even"),
        (dict(use_moe=True, num_experts=2, num_experts_per_tok=3), "num_experts"),
        (dict(residual_init="ones"), "residual_init"),
    ]:
        with pytest.raises(ValueError, match=reason):
            MiniMindConfig(**fields)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_the_compiled_block_has_the_gradient_of_the_plain_one():
    """In bfloat16, at a width and length where torch 2.13 compiled attention's backward into NaN."""
    torch.manual_seed(0)
    fields = dict(num_hidden_layers=1, vocab_size=64, residual_init="normal")
    plain = MiniMindForCausalLM(MiniMindConfig.from_preset("tiny", **fields))
    compiled = copy.deepcopy(plain).compile_blocks()
    ids = torch.randint(0, 64, (4, 256))
    positions = torch.arange(256).repeat(4, 1)
    positions[:, 100:] -= 100
    for model in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, position_ids=positions, labels=ids).loss
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters()):
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm(), name


@pytest.mark.parametrize("moe", [False, True])
def test_code_compiled_for_any_shape_serves_every_shape(monkeypatch, moe):
    """Preference pairs come in rows of every length: were there a new version for each, torch.compile would
    give up after eight, with a warning. (The backend that only traces makes the same versions.)"""
    import functools

    import torch._dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    mixture = dict(use_moe=True, num_experts=3, moe_intermediate_size=32) if moe else {}
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=100, **sizes, **mixture))
    model.compile_blocks(dynamic=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for T in range(32, 1056, 128):
            for B in (3, 1, 2):
                ids = torch.randint(3, 90, (B, T))
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(ids, position_ids=torch.arange(T).repeat(B, 1), labels=ids).loss
                loss.backward()
    torch._dynamo.reset()
