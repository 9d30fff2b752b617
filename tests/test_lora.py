"""LoRA, rsLoRA and DoRA against peft on the same tensors, and what the stage promises: the base stays as it
was to the last bit, the adapter alone is saved, and a run can be stopped, split and repeated."""

import copy
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from train_helpers import (
    MOE,
    REPO,
    assert_bit_equal,
    flags,
    largest_difference,
    log_lines,
    stage_module,
    stop_after,
    train,
)

from model.model_lora import (
    ALL_LINEARS,
    LoRAConfig,
    LoRALinear,
    adapters,
    add_lora,
    apply_lora,
    lora_state,
    merge_lora,
    relative_sizes,
    row_lengths,
    scaled,
    unmerge,
)
from model.model_minimind import Linear, MiniMindConfig, MiniMindLM
from model.precision import integer_products, multiplies_integers

SMALL = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    residual_init="normal",
)
BASES = {
    "dense": {},
    "moe": dict(use_moe=True, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=48),
}
KINDS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(dora=True)}
RANK_4 = LoRAConfig(4)


def base_model(kind="dense", seed=0, **fields) -> MiniMindLM:
    """Random weights and norms: nothing may hide behind a zero or a one."""
    torch.manual_seed(seed)
    model = MiniMindLM(MiniMindConfig(**(SMALL | BASES[kind] | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1) if p.ndim > 1 else p.normal_(1, 0.3)
    return model


def adapted(model, config=RANK_4, seed=1, adapter_name="default") -> MiniMindLM:
    """A copy of the model with an adapter as after training: B and the lengths are not what they began as."""
    model = copy.deepcopy(model)
    add_lora(model, config, adapter_name)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            if name.endswith(f".{adapter_name}"):
                adapter.A.normal_(0, 0.1, generator=draw)
                adapter.B.normal_(0, 0.05, generator=draw)
                if adapter.m is not None:
                    adapter.m.mul_(0.8 + 0.4 * torch.rand(adapter.m.shape, generator=draw))
    return model.eval()


def own_weights(model) -> dict:
    """The weights of the base inside an adapted model, under the names of the base."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora." not in name}


def copied(state: dict) -> dict:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def tokens(B=2, T=20, seed=1):
    return torch.randint(3, 100, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, seed=1):
    return model(tokens(seed=seed)).logits


# --------------------------------------------------------------------------------------------------
# The arithmetic: peft, and numbers by hand
# --------------------------------------------------------------------------------------------------


def peft_twin(ours, config):
    """transformers' Llama with the same weights, adapted by peft with the same numbers; and the parameters
    that learn, as pairs (ours, peft's)."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {k: v for k, v in SMALL.items() if k != "residual_init"}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    llama = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, rope_parameters=rope)).eval()
    llama.load_state_dict(own_weights(ours), strict=True)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(ALL_LINEARS),
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    twin = peft.get_peft_model(llama, settings).eval()
    pairs = {}
    for name, adapter in adapters(ours).items():
        layer = twin.base_model.model.get_submodule(name.removesuffix(".lora.default"))
        pairs[f"{name}.A"] = (adapter.A, layer.lora_A["default"].weight)
        pairs[f"{name}.B"] = (adapter.B, layer.lora_B["default"].weight)
        if config.dora:
            pairs[f"{name}.m"] = (adapter.m, layer.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        for mine, theirs in pairs.values():
            theirs.copy_(mine)
    return twin, pairs


def assert_same_gradients(pairs, tolerance):
    for name, (mine, theirs) in pairs.items():
        off = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert off < tolerance, (name, off)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_its_gradients_equal_peft(kind):
    config = LoRAConfig(4, 16.0, **KINDS[kind])
    ours = adapted(base_model(), config)
    twin, pairs = peft_twin(ours, config)
    draw = torch.Generator().manual_seed(5)
    names = [name for name, module in ours.named_modules() if isinstance(module, LoRALinear)]
    assert len(names) == 7 * SMALL["num_hidden_layers"]
    for name in names:
        mine, theirs = ours.get_submodule(name), twin.base_model.model.get_submodule(name)
        x = torch.randn(2, 6, mine.in_features, generator=draw)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = mine(first), theirs(second)
        assert (a - b).abs().max() < 1e-6, name
        assert (a - F.linear(x, mine.weight)).abs().max() > 1e-2, "the adapter does something"
        wanted = torch.randn(a.shape, generator=draw)
        (a * wanted).sum().backward()
        (b * wanted).sum().backward()
        assert (first.grad - second.grad).norm() / second.grad.norm() < 1e-6, name
    assert_same_gradients(pairs, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_its_gradients_and_its_merged_weights_equal_peft(kind):
    config = LoRAConfig(4, 16.0, **KINDS[kind])
    ours = adapted(base_model(), config)
    twin, pairs = peft_twin(ours, config)
    x = tokens()
    first, second = ours(x, labels=x, return_logits=True), twin(input_ids=x, labels=x)
    assert (first.logits - second.logits).abs().max() < 1e-5
    first.loss.backward()
    second.loss.backward()
    assert_same_gradients(pairs, 1e-5)  # attention is computed in another order, which layers magnify
    merge_lora(ours)
    merged = twin.merge_and_unload().state_dict()
    assert largest_difference(ours.state_dict(), merged) < 1e-6


def test_the_strength_is_that_of_peft():
    assert LoRAConfig(4, 16.0).scale == 4.0 and LoRAConfig(4, 16.0, rslora=True).scale == 8.0
    for config in (LoRAConfig(4, 16.0), LoRAConfig(4, 16.0, rslora=True)):
        ours = adapted(base_model(num_hidden_layers=2), config)
        twin, _ = peft_twin(ours, config)
        theirs = twin.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
        assert ours.model.layers[0].self_attn.q_proj.lora["default"].scale == theirs == config.scale


def two_by_two(**kind) -> torch.nn.Module:
    """W = I, A = (1 2), B = (3 4)^T, strength 2."""
    model = torch.nn.Module()
    model.proj = Linear(2, 2, bias=False)
    with torch.no_grad():
        model.proj.weight.copy_(torch.eye(2))
    add_lora(model, LoRAConfig(rank=1, alpha=2.0, targets=("proj",), **kind))
    with torch.no_grad():
        model.proj.lora["default"].A.copy_(torch.tensor([[1.0, 2.0]]))
        model.proj.lora["default"].B.copy_(torch.tensor([[3.0], [4.0]]))
    return model


def test_two_by_two_by_hand():
    """W + 2 B A = I + 2 (3 6; 4 8)."""
    model = two_by_two()
    assert model.proj(torch.tensor([1.0, 1.0])).tolist() == [19.0, 25.0]
    before = merge_lora(model)
    assert model.proj.weight.tolist() == [[7.0, 12.0], [8.0, 17.0]]
    assert model.proj(torch.tensor([1.0, 1.0])).tolist() == [19.0, 25.0]
    unmerge(model, before)
    assert model.proj.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_two_by_two_by_hand_with_dora():
    """The same rows, brought back to the lengths of W's, 1; then to 2 and 1."""
    model = two_by_two(dora=True)
    first, second = torch.tensor([7.0, 12.0]) / 193**0.5, torch.tensor([8.0, 17.0]) / 353**0.5
    torch.testing.assert_close(model.proj.full_weight(), torch.stack([first, second]))
    with torch.no_grad():
        model.proj.lora["default"].m[0] = 2.0
    torch.testing.assert_close(model.proj.full_weight(), torch.stack([2 * first, second]))
    x = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(model.proj(x), torch.stack([2 * first.sum(), second.sum()]))


def test_adapters_begin_as_in_the_paper():
    model = base_model()
    add_lora(model, LoRAConfig(4, dora=True))
    for name, adapter in adapters(model).items():
        bound = adapter.A.shape[1] ** -0.5
        assert adapter.A.abs().max() <= bound and adapter.A.abs().mean() > 0.4 * bound, name
        assert not adapter.B.any(), name
        assert adapter.m.equal(row_lengths(model.get_submodule(name.removesuffix(".lora.default")).weight))


# --------------------------------------------------------------------------------------------------
# With and without: switching, stacking, merging
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit(base, kind):
    model = base_model(base)
    expected = logits(model)
    add_lora(model, LoRAConfig(4, **KINDS[kind]))
    assert logits(model).equal(expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_answers_and_unmerging_restores_the_base(base, kind):
    plain = base_model(base)
    model = adapted(plain, LoRAConfig(4, **KINDS[kind]))
    expected = logits(model)
    before = merge_lora(model)
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (logits(plain) - expected).abs().max() > 0.1
    assert not adapters(model) and model.state_dict().keys() == plain.state_dict().keys()
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    unmerge(model, before)
    assert_bit_equal(model.state_dict(), plain.state_dict())
    assert logits(model).equal(logits(plain))


def test_merging_rounds_once():
    """Into bfloat16 weights: the sum is taken in float32. Adding a rounded change would be off twice."""
    plain = base_model().bfloat16()
    model = adapted(plain, RANK_4)
    layer = model.model.layers[1].mlp.up_proj
    a, b = layer.lora["default"].A.float(), layer.lora["default"].B.float()
    expected = (layer.weight.float() + 4.0 * b @ a).bfloat16()
    merge_lora(model)
    assert model.model.layers[1].mlp.up_proj.weight.equal(expected)


def test_stacked_experts_are_multiplied_with_their_adapters():
    """In bfloat16 a mixture multiplies all experts' matrices at once and never calls their layers."""
    plain = base_model("moe")
    names = [n for n, m in plain.named_modules() if isinstance(m, Linear) and ".mlp.experts." in n]
    model = adapted(plain, LoRAConfig(4, targets=tuple(names)))
    with torch.autocast("cpu", torch.bfloat16):
        base, unmerged = logits(plain), logits(model)
        merge_lora(model)
        merged = logits(model)
    assert (unmerged - merged).abs().max() < 0.05 * (base - merged).abs().max()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_is_the_base_bit_for_bit(base, kind):
    plain = base_model(base)
    model = adapted(plain, LoRAConfig(4, **KINDS[kind]))
    before, names = logits(model), set(model.state_dict())
    with scaled(model, 0.0) as same:
        assert same is model and logits(model).equal(logits(plain))
    assert logits(model).equal(before) and set(model.state_dict()) == names
    with pytest.raises(KeyError), scaled(model, 0.0):
        raise KeyError
    assert logits(model).equal(before), "also after an error"
    for adapter in adapters(model).values():
        torch.nn.init.constant_(adapter.A, torch.inf)
    with scaled(model, 0.0):
        assert logits(model).equal(logits(plain)), "it is not multiplied by zero, it is not there"


def deltas(model, names, x):
    """What the adapters add to x W^T in every layer."""
    layers = [model.get_submodule(name) for name in names]
    with torch.no_grad():
        return [layer(x[..., : layer.in_features]) - F.linear(x[..., : layer.in_features], layer.weight)
                for layer in layers]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_strength_is_half_the_change(kind):
    config = LoRAConfig(4, **KINDS[kind])
    plain = base_model()
    model = adapted(plain, config)
    names = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    full = deltas(model, names, x)
    with scaled(model, 0.5):
        half = deltas(model, names, x)
        matrix = model.get_submodule(names[0]).full_weight()
    for a, b in zip(full, half):
        torch.testing.assert_close(b, a / 2, rtol=0, atol=2e-6)
    other = apply_lora(copy.deepcopy(plain), copied(lora_state(model)), config, scale=0.5)
    for a, b in zip(half, deltas(other, names, x)):
        assert a.equal(b), "given when it is loaded"
    merge_lora(other)
    torch.testing.assert_close(other.get_submodule(names[0]).weight, matrix)
    change = model.get_submodule(names[0]).full_weight() - plain.get_submodule(names[0]).weight
    torch.testing.assert_close(matrix - plain.get_submodule(names[0]).weight, change / 2, rtol=0, atol=1e-6)


def stacked(plain):
    """(a model with two adapters, the states of the two); they adapt different layers."""
    first = adapted(plain, RANK_4, seed=1)
    config = LoRAConfig(2, 8.0, targets=("q_proj", "down_proj"))
    second = adapted(plain, config, seed=2)
    model = copy.deepcopy(plain)
    apply_lora(model, copied(lora_state(first)), RANK_4, "first")
    apply_lora(model, copied(lora_state(second)), config, "second")
    return model, first, second


def test_two_adapters_add_up():
    plain = base_model()
    model, first, second = stacked(plain)
    names = [n for n, m in second.named_modules() if isinstance(m, LoRALinear)]
    assert len(names) == 4 and len(adapters(model)) == 14 + 4
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for both, a, b in zip(*(deltas(m, names, x) for m in (model, first, second))):
        torch.testing.assert_close(both, a + b, rtol=0, atol=2e-6)
    with scaled(model, 0.0, "second"):
        assert logits(model).equal(logits(first))
    with scaled(model, 0.0, "first"):
        assert logits(model).equal(logits(second))
    assert_bit_equal(lora_state(model, "first"), lora_state(first))
    expected = logits(model)
    merge_lora(model)
    assert (logits(model) - expected).abs().max() < 1e-5
    for name in names:
        sides = (m.get_submodule(name) for m in (first, second))
        change = sum(side.full_weight() - side.weight for side in sides)
        merged = model.get_submodule(name).weight
        torch.testing.assert_close(merged, plain.get_submodule(name).weight + change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [("lora", "dora"), ("dora", "lora"), ("dora", "dora")])
def test_dora_refuses_to_be_stacked(order):
    """It scales whole rows of the adapted matrix: what two of them mean depends on who comes first."""
    plain = base_model()
    configs = [LoRAConfig(4, **KINDS[kind]) for kind in order]
    states = [copied(lora_state(adapted(plain, config))) for config in configs]
    apply_lora(plain, states[0], configs[0], "first")
    expected = logits(plain)
    with pytest.raises(ValueError, match="DoRA .* cannot be stacked"):
        apply_lora(plain, states[1], configs[1], "second")
    assert logits(plain).equal(expected)


def test_an_adapter_never_replaces_another_in_silence():
    """`apply_lora` twice without names: both must count, or the second must be refused."""
    plain = base_model()
    states = [copied(lora_state(adapted(plain, RANK_4, seed))) for seed in (1, 2)]
    model = apply_lora(copy.deepcopy(plain), states[0], RANK_4)
    try:
        apply_lora(model, states[1], RANK_4)
    except ValueError as error:
        assert "default" in str(error)
    else:
        assert len(adapters(model)) == 2 * 14
        only_second = apply_lora(copy.deepcopy(plain), states[1], RANK_4)
        assert not torch.allclose(logits(model), logits(only_second))


@pytest.mark.parametrize("target", ["q_proj", "mlp.gate"])
def test_generation_never_forgets_an_adapter(target):
    """The engine packs weights: it must pack them with their adapters, or ask for merging."""
    from model.generation import Generator

    def answer(model):
        prompts = [row.tolist() for row in tokens(B=4, T=7)]
        completions = Generator(model, "float32").generate(prompts, max_new_tokens=8, temperature=0)
        return [list(map(int, completion.ids)) for completion in completions]

    plain = base_model("moe", num_experts_per_tok=1, n_shared_experts=0)
    model = adapted(plain, LoRAConfig(4, 64.0, targets=(target,)))
    merged = copy.deepcopy(model)
    merge_lora(merged)
    expected = answer(merged)
    assert expected != answer(plain), "else this proves nothing"
    try:
        got = answer(model)
    except ValueError as error:
        assert "merge adapters" in str(error)
    else:
        assert got == expected


def test_dora_computes_in_the_type_of_its_layer():
    """Else the residual stream grows to float32 at the first adapted layer, and all that follows is slow."""
    model = adapted(base_model(), LoRAConfig(4, dora=True))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.model.layers[0].self_attn.q_proj
        assert layer(x).dtype == F.linear(x, layer.weight).dtype == torch.bfloat16
        assert model.model(tokens())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_a_matrix_with_its_adapters(kind):
    """The router and the head multiply by it, and a mixture's experts round it once."""
    layer = adapted(base_model(), LoRAConfig(4, **KINDS[kind])).model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.full_weight()
    assert inside.equal(layer.full_weight())


def test_dora_on_a_row_of_zeros_is_finite():
    """An expert that no token ever visited still has the zeros it began with: 0 / 0 must not end the run."""
    model = base_model("moe", num_experts_per_tok=1)
    with torch.no_grad():
        model.model.layers[0].mlp.experts[1].down_proj.weight.zero_()
    expected = logits(model)
    add_lora(model, LoRAConfig(4, dora=True))
    assert logits(model).equal(expected)
    x = tokens()
    model(x, labels=x).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_size_of_a_change_is_a_number():
    """It goes into the log; a matrix of zeros (the output projections of a fresh model) has no ratio."""
    model = adapted(base_model(), RANK_4)
    sizes = relative_sizes(model)
    first = next(m for m in model.modules() if isinstance(m, LoRALinear))
    change = first.full_weight() - first.weight
    ratio = (change.norm() / first.weight.norm()).item()
    assert len(sizes) == 14 and sizes[0] == pytest.approx(ratio, rel=1e-4)
    with torch.no_grad():
        first.weight.zero_()
    assert all(map(torch.isfinite, torch.tensor(relative_sizes(model))))


# --------------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------------


def test_dropout_is_for_training_and_for_what_a_reads():
    config = LoRAConfig(4, dropout=0.5)
    plain = base_model()
    model = adapted(plain, config)
    without = apply_lora(copy.deepcopy(plain), copied(lora_state(model)), RANK_4)
    assert logits(model).equal(logits(model)) and logits(model).equal(logits(without)), "eval mode"
    model.train()
    assert not logits(model).equal(logits(model))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    adapter = layer.lora["default"]
    expected = F.linear(x, layer.weight) + 4.0 * dropped @ adapter.A.T @ adapter.B.T
    torch.testing.assert_close(layer(x), expected)


def test_an_adapter_that_is_loaded_into_a_finished_model_does_not_drop():
    """`load_model` hands out models in eval mode; an adapter that was trained with dropout must join that
    mode."""
    plain = base_model()
    config = LoRAConfig(4, dropout=0.5)
    state = copied(lora_state(adapted(plain, config)))
    model = apply_lora(plain, state, config)
    assert not any(module.training for module in model.modules())
    assert logits(model).equal(logits(model))


@pytest.mark.parametrize("targets", [ALL_LINEARS, ("model.layers.0.mlp.experts.1.gate_proj",)])
def test_experts_with_dropout_are_not_multiplied_all_at_once(targets):
    """One matrix cannot stand for a layer that drops inputs; neither if only some experts do."""
    model = adapted(base_model("moe"), LoRAConfig(4, dropout=0.5, targets=targets)).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert not logits(model).equal(logits(model))


def test_training_with_dropout_is_a_function_of_the_seed(tmp_path):
    for name, share in {"one": 0.3, "same": 0.3, "none": 0}.items():
        run(tmp_path / name, "--lora_dropout", share, "--val_fraction", 0, steps=3)
    one, same, none = (adapter_file(tmp_path / name) for name in ("one", "same", "none"))
    assert_bit_equal(one, same)
    assert largest_difference(one, none) > 1e-4


# --------------------------------------------------------------------------------------------------
# What is adapted
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_by_default_all_linear_layers_of_the_blocks_learn_and_nothing_else(base):
    model = base_model(base)
    names = add_lora(model, RANK_4)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == [n for n in layers if n != "lm_head" and not n.endswith("mlp.gate")]
    per_layer = 7 if base == "dense" else 4 + 3 * (3 + 1)  # three experts and a shared one
    assert len(names) == 2 * per_layer
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora.default.{part}" for name in names for part in "AB"}


def test_a_full_name_means_one_layer_and_a_short_one_every_layer():
    one = "model.layers.1.self_attn.v_proj"
    assert add_lora(base_model(), LoRAConfig(4, targets=(one,))) == [one]
    names = [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "o_proj")]
    assert add_lora(base_model(), LoRAConfig(4, targets=("o_proj", "q_proj"))) == names
    twice = LoRAConfig(4, targets=("q_proj", "model.layers.0.self_attn.q_proj"))
    assert len(add_lora(base_model(), twice)) == 2, "named twice, adapted once"
    assert len(add_lora(base_model("moe"), LoRAConfig(4, targets=("gate",)))) == 2, "not gate_proj"


@pytest.mark.parametrize("name", ["nonsense", "proj", "layers.0.self_attn", ""])
def test_a_name_that_means_nothing_is_refused_before_anything_is_changed(name):
    model = base_model()
    with pytest.raises(ValueError, match=rf"'{name}'; this model has down_proj, .*v_proj"):
        add_lora(model, LoRAConfig(4, targets=("q_proj", name)))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


EVERY_RUN: list = []  # more flags


@pytest.fixture(scope="module", autouse=True)
def brisk(tmp_path_factory):
    """Tokenizing a file again, and measuring how fast this machine is, take longer than three steps."""
    from trainer import runtime

    EVERY_RUN[:] = ["--cache_dir", tmp_path_factory.mktemp("cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "peak_flops", lambda rt: 1e11)
        yield


def run(folder, *more, **options):
    train("lora", folder, *EVERY_RUN, *more, **options)


def fails(capsys, pattern, *more, **options):
    """The stage ends with code 2, one line that says why, and no traceback."""
    with pytest.raises(SystemExit) as end:
        run(*more, **options)
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    assert re.search(pattern, lines[0]), error


def test_impossible_targets_end_the_run_in_one_line(tmp_path, capsys):
    targets = [tmp_path, "--lora_targets"]
    fails(capsys, r"--lora_targets q_proj,nope: .*'nope'; this model has .*q_proj", *targets, "q_proj,nope")
    fails(capsys, r"lm_head shares its matrix .*--tie_word_embeddings 0", *targets, "q_proj,lm_head")
    fails(capsys, r"'gate'; this model has", *targets, "gate")
    assert not (tmp_path / "out/lora").exists()


def test_the_head_of_a_model_with_tied_embeddings_is_refused_and_another_is_adapted():
    with pytest.raises(ValueError, match="shares its matrix with the embedding"):
        add_lora(base_model(), LoRAConfig(4, targets=("lm_head",)))
    plain = base_model(tie_word_embeddings=False)
    model = adapted(plain, LoRAConfig(4, targets=("lm_head",)))
    x = tokens()
    both = model(x, labels=x, return_logits=True)
    by_logits = F.cross_entropy(both.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(both.loss, by_logits, rtol=1e-6, atol=1e-6)
    assert abs(both.loss - plain(x, labels=x).loss) > 1e-2, "the loss sees the adapter, and so do the logits"
    head = model.lm_head.lora["default"]
    gradients = torch.autograd.grad(both.loss, [head.A, head.B])
    for ours, exact in zip(gradients, torch.autograd.grad(by_logits, [head.A, head.B])):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_merged_matrices(base):
    """With G the gradient of W' = W + s B A: s B^T G for A, and s G A^T for B; in every expert too."""
    model = adapted(base_model(base))
    merged = copy.deepcopy(model)
    merge_lora(merged)
    merged.requires_grad_(True)
    for each in (model, merged):
        out = each(tokens(), labels=tokens())
        (out.loss if out.aux_loss is None else out.loss + out.aux_loss).backward()
    expected = {name: p.grad for name, p in merged.named_parameters()}
    found = adapters(model)
    assert base == "dense" or any(".experts." in name for name in found)
    for name, adapter in found.items():
        G = expected[name.removesuffix(".lora.default") + ".weight"]
        for mine, exact in ((adapter.A, adapter.B.T @ G), (adapter.B, G @ adapter.A.T)):
            assert (mine.grad - adapter.scale * exact).norm() < 1e-4 * mine.grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_of_a_mixture_can_learn(kind):
    plain = base_model("moe")
    model = adapted(plain, LoRAConfig(2, 64.0, targets=("mlp.gate",), **KINDS[kind]))
    x = tokens()
    out = model(x, labels=x)
    assert not out.router_logits[0].equal(plain(x).router_logits[0]), "tokens visit other experts"
    (out.loss + out.aux_loss).backward()
    for name, adapter in adapters(model).items():
        assert all(p.grad.abs().max() > 0 for p in adapter.parameters()), name
    expected = logits(model)
    merge_lora(model)
    assert (logits(model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_without_tokens_does_not_leave_its_adapter_without_a_gradient(dtype):
    """Several processes would wait for it for ever."""
    model = adapted(base_model("moe", num_experts=8, num_experts_per_tok=1), RANK_4).train()
    x = tokens(B=1, T=6)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(x, labels=x)
    assert (out.router_logits[0] == 0).any(), "some expert is idle"
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------
# Runs: the base stays, the adapter is saved
# --------------------------------------------------------------------------------------------------


def adapter_path(folder, name="lora_identity_32"):
    return folder / "out/lora" / f"{name}.pth"


def adapter_file(folder, name="lora_identity_32") -> dict:
    from trainer import checkpoint

    return checkpoint.read_weights(adapter_path(folder, name))[0]


RUNS = {
    "lora": [],
    "dora": ["--use_dora", 1],
    "moe": [*MOE, "--use_rslora", 1],
    "head": ["--tie_word_embeddings", 0, "--lora_targets", "lm_head,q_proj"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four finished runs: folder, base file before, the model as it was in memory afterwards."""
    from trainer import checkpoint

    def finish(name):
        folder, models, new = tmp_path_factory.mktemp(name), [], checkpoint.new_model
        stem = f"full_sft_32{'_moe' if name == 'moe' else ''}.pth"
        flags("lora", folder, *RUNS[name])
        before = (folder / "out" / stem).read_bytes()

        def remember(*args):
            models.append(new(*args))
            return models[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "new_model", remember)
            run(folder, *RUNS[name], "--lora_rank", 4, steps=4)
        found = SimpleNamespace(folder=folder, base=folder / "out" / stem, before=before, model=models[0])
        found.adapter = adapter_path(folder, "lora_identity_32" + ("_moe" if name == "moe" else ""))
        return found

    return {name: finish(name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_training_leaves_the_base_as_it_was(finished, name):
    from trainer import checkpoint

    done = finished[name]
    assert done.base.read_bytes() == done.before
    state, _ = checkpoint.read_weights(done.base)
    assert_bit_equal(own_weights(done.model), state)
    assert all(p.requires_grad == (".lora." in n) for n, p in done.model.named_parameters())
    assert all(p.grad is None for n, p in done.model.named_parameters() if ".lora." not in n)


@pytest.mark.parametrize("name", RUNS)
def test_the_file_holds_the_adapter_alone_and_what_it_belongs_to(finished, name):
    from trainer import checkpoint

    done = finished[name]
    state, metadata = checkpoint.read_weights(done.adapter)
    parts = ("A", "B", "m") if name == "dora" else ("A", "B")
    layers = [n.removesuffix(".lora.default") for n in adapters(done.model)]
    assert set(state) == {f"{layer}.lora.{part}" for layer in layers for part in parts}
    assert_bit_equal(state, copied(lora_state(done.model)))
    assert all(state[f"{layer}.lora.B"].any() for layer in layers if ".experts." not in layer), "it learned"
    base = checkpoint.read_weights(done.base)[1]
    assert metadata["parent"] == {"weight": "full_sft", "step": base["step"], "crc32": base["crc32"]}
    assert metadata["stage"] == "lora" and metadata["step"] == 4
    assert metadata["config"] == base["config"] | {"residual_init": metadata["config"]["residual_init"]}
    assert metadata["lora"] == {
        "rank": 4,
        "alpha": 16.0,
        "dropout": 0.0,
        "rslora": name == "moe",
        "dora": name == "dora",
        "targets": ["lm_head", "q_proj"] if name == "head" else list(ALL_LINEARS),
    }


def test_the_log_says_what_the_stage_changed(finished, tmp_path, capsys):
    lines = [line for line in log_lines(finished["lora"].folder, "lora_identity") if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 4, 4][: len(lines)]
    assert lines[0]["lora_size"] == 0.0 < lines[-1]["lora_size"]
    assert lines[-1]["val_loss"] != lines[0]["val_loss"]
    run(tmp_path, "--lora_name", "lora_x", "--lora_rank", 2, steps=2)
    out = capsys.readouterr().out
    assert "LoRA: 14 layers adapted, " in out and "held out: val_loss" in out
    assert re.search(r"next: +python eval_llm.py --weight full_sft --lora_weight lora_x --hidden", out)
    learning = sum(tensor.numel() for tensor in adapter_file(tmp_path, "lora_x_32").values())
    assert f"{learning:,} parameters learn (" in out


def test_adapters_learn_what_the_base_did_not_know(tmp_path):
    """Eight chats, upon a random base whose weights may not move."""
    from train_helpers import write_lines

    rows = [[("user", f"how much is {i}"), ("assistant", f"it is {i * 7 % 10}")] for i in range(8)]
    rows = [{"conversations": [{"role": r, "content": c} for r, c in row]} for row in rows]
    write_lines(tmp_path, "sft.jsonl", rows)
    more = ["--val_fraction", 0, "--learning_rate", 2e-2, "--initializer_range", 0.5]
    run(tmp_path, *more, steps=20)
    losses = [line["loss"] for line in log_lines(tmp_path, "lora_identity") if "loss" in line]
    assert losses[0] > 10 and losses[-1] < 4


def test_muon_trains_adapters_too(tmp_path):
    """All that learns are matrices inside blocks: nothing is left for AdamW beside it."""
    run(tmp_path, "--optimizer", "muon", steps=2)
    assert all(t.any() for name, t in adapter_file(tmp_path).items() if name.endswith(".B"))


def test_a_tiny_learning_rate_is_not_lost_in_the_file(tmp_path):
    """At 1e-8 a half-precision file would hold zeros."""
    run(tmp_path, "--learning_rate", 1e-8, "--val_fraction", 0, steps=4)
    for name, tensor in adapter_file(tmp_path).items():
        if name.endswith(".B"):
            assert tensor.dtype == torch.float32 and 0 < tensor.abs().max() < 1e-7, name


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

BASE = {"stage": "full_sft", "step": 7, "crc32": 123}  # metadata of the base's file


def save(path, model, config, parent_crc=123, dtype="float32"):
    from trainer import checkpoint

    parent = {"weight": "full_sft", "step": 7, "crc32": parent_crc}
    checkpoint.save_adapter(config, model, path, {"stage": "lora", "parent": parent}, dtype)
    return path


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_file_brings_back_the_same_answers(tmp_path, base, kind):
    from trainer import checkpoint

    plain, config = base_model(base), LoRAConfig(4, 8.0, **KINDS[kind])
    model = adapted(plain, config)
    path = save(tmp_path / "a.pth", model, config)
    assert checkpoint.read_adapter(path)[1] == config
    fresh = copy.deepcopy(plain)
    assert checkpoint.load_adapter(fresh, path, BASE) is None
    assert logits(fresh).equal(logits(model))
    assert not any(p.requires_grad for a in adapters(fresh).values() for p in a.parameters())
    weaker = copy.deepcopy(plain)
    checkpoint.load_adapter(weaker, path, BASE, name="x", scale=0.5)
    assert {a.strength for a in adapters(weaker).values()} == {0.5}


def test_an_adapter_of_other_weights_is_loaded_with_a_note(tmp_path):
    from trainer import checkpoint

    plain, config = base_model(), LoRAConfig(4)
    path = save(tmp_path / "a.pth", adapted(plain, config), config, parent_crc=99)
    note = checkpoint.load_adapter(plain, path, BASE)
    assert "trained on other weights (full_sft, step 7) than these (full_sft, step 7)" in note
    assert len(adapters(plain)) == 14


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_adapter_of_minimind_loads(tmp_path, prefix):
    """Its files: half precision, no metadata, nn.Linear's names; and it adds B(A(x)) without a factor."""
    from trainer import checkpoint

    plain = base_model()
    draw, state, parts = torch.Generator().manual_seed(3), {}, {}
    for layer in (0, 1):
        for name in ("q_proj", "o_proj"):  # MiniMind adapts square matrices
            full = f"model.layers.{layer}.self_attn.{name}"
            parts[full] = [torch.randn(*s, generator=draw).mul(0.1).half() for s in ((8, 64), (64, 8))]
            state |= {f"{prefix}{full}.lora.{part}.weight": t for part, t in zip("AB", parts[full])}
    torch.save(state, tmp_path / "lora_identity_64.pth")
    model = copy.deepcopy(plain)
    assert checkpoint.load_adapter(model, tmp_path / "lora_identity_64.pth", BASE) is None

    def add(a, b):  # as MiniMind does it: the layer's forward plus the adapter's
        return lambda module, inputs, output: output + inputs[0] @ a.float().T @ b.float().T

    for full, matrices in parts.items():
        plain.get_submodule(full).register_forward_hook(add(*matrices))
    assert (logits(model) - logits(plain)).abs().max() < 1e-5
    assert (logits(model) - logits(base_model())).abs().max() > 0.1


def test_a_half_precision_file_loads(tmp_path):
    from trainer import checkpoint

    run(tmp_path, "--save_dtype", "float16", "--val_fraction", 0, steps=2)
    assert {t.dtype for t in adapter_file(tmp_path).values()} == {torch.float16}
    model, metadata = checkpoint.load_model(tmp_path / "out/full_sft_32.pth")
    assert checkpoint.load_adapter(model, adapter_path(tmp_path), metadata) is None
    exact = torch.load(tmp_path / "checkpoints/lora_identity_32_resume.pth", weights_only=True)["model"]
    for name, tensor in lora_state(model).items():
        kept = exact[name.replace(".lora.", ".lora.default.")]
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, kept.half().float(), rtol=0, atol=0)


def refuses(pattern, model, path):
    from trainer import checkpoint

    before = logits(model)
    with pytest.raises(checkpoint.CheckpointError, match=pattern) as error:
        checkpoint.load_adapter(model, path, BASE)
    assert "\n" not in str(error.value)
    assert not adapters(model) and logits(model).equal(before)


def test_an_adapter_that_cannot_fit_is_refused_in_one_sentence(tmp_path):
    from trainer import checkpoint

    config = RANK_4
    path = save(tmp_path / "a.pth", adapted(base_model(), config), config)
    other = base_model(hidden_size=48, head_dim=12)
    refuses(r"a.pth was trained on a base with hidden_size 64 \(this base: 48\)", other, path)
    refuses(r"use_moe False \(this base: True\)", base_model("moe"), path)
    refuses(r"num_hidden_layers 2 \(this base: 1\)", base_model(num_hidden_layers=1), path)
    refuses(r"none.pth does not exist \(there is a.pth\).*train_lora.py", base_model(), tmp_path / "none.pth")
    checkpoint.save_weights(base_model(), tmp_path / "whole.pth", {"stage": "full_sft"})
    refuses(r"whole.pth holds whole weights, not an adapter", base_model(), tmp_path / "whole.pth")
    with pytest.raises(checkpoint.CheckpointError, match="lacks .* and also has "):
        checkpoint.load_weights(base_model(), path)  # the other way round


def test_a_foreign_adapter_that_cannot_fit_is_refused_in_one_sentence(tmp_path):
    """Without metadata only names and shapes tell."""
    path, name = tmp_path / "a.pth", "model.layers.0.self_attn.q_proj"

    def write(**parts):
        torch.save({f"{name}.lora.{part}.weight": tensor for part, tensor in parts.items()}, path)

    write(A=torch.ones(8, 48), B=torch.ones(64, 8))
    refuses(r"q_proj has the shapes .*\(8, 48\).*this model wants .*\(8, 64\)", base_model(), path)
    write(A=torch.full((8, 64), torch.nan), B=torch.ones(64, 8))
    refuses("contains NaN", base_model(), path)
    write(A=torch.ones(8, 64))
    refuses("q_proj", base_model(), path)
    write(B=torch.ones(64, 8))
    refuses("q_proj", base_model(), path)
    name = "model.layers.5.self_attn.q_proj"
    write(A=torch.ones(8, 64), B=torch.ones(64, 8))
    refuses(r"layers.5.self_attn.q_proj, which this model does not have", base_model(), path)


def test_where_adapters_lie(tmp_path):
    from trainer import checkpoint

    args, config = SimpleNamespace(save_dir=tmp_path, save_weight="lora_a"), base_model().config
    usual = tmp_path / "lora/lora_a_64.pth"
    assert checkpoint.adapter_path(args, config) == checkpoint.find_adapter(args, config, "lora_a") == usual
    (tmp_path / "lora_a_64.pth").touch()
    assert checkpoint.find_adapter(args, config, "lora_a") == tmp_path / "lora_a_64.pth", "MiniMind's place"
    usual.parent.mkdir()
    usual.touch()
    assert checkpoint.find_adapter(args, config, "lora_a") == usual
    given = str(tmp_path / "elsewhere.pth")
    assert str(checkpoint.find_adapter(args, config, given)) == given


# --------------------------------------------------------------------------------------------------
# Resume
# --------------------------------------------------------------------------------------------------


def values(folder):
    """The log without what depends on the clock."""
    timed = {"tokens_per_s", "mfu", "memory_gb", "time_s", "eta_min"}
    lines = [line for line in log_lines(folder, "lora_identity") if "event" not in line]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_stopped_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    more = [*MOE, "--use_dora", 1, "--lora_dropout", 0.1, "--accumulation_steps", 2]
    run(tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path / "broken", *more)
    run(tmp_path / "broken", *more, "--from_resume", 1)
    whole, broken = (adapter_file(tmp_path / name, "lora_identity_32_moe") for name in ("whole", "broken"))
    assert_bit_equal(whole, broken)
    assert values(tmp_path / "whole") == values(tmp_path / "broken")


def test_the_resume_file_holds_no_frozen_weights_and_wants_the_same_base(tmp_path, monkeypatch, capsys):
    from trainer import checkpoint, cli

    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(tmp_path)
    content = torch.load(tmp_path / "checkpoints/lora_identity_32_resume.pth", weights_only=True)
    assert set(content["model"]) == {n.replace(".lora.", ".lora.default.") for n in adapter_file(tmp_path)}
    moments = [t for state in content["optimizers"][0]["state"].values() for t in state.values() if t.ndim]
    learning = sum(t.numel() for t in content["model"].values())
    assert sum(t.numel() for t in moments) == 2 * learning, "two averages of every parameter that learns"
    resume = [tmp_path, "--from_resume", 1]
    changed = ["--lora_rank", 4, "--lora_alpha", 8]
    fails(capsys, r"--lora_rank 8 -> 4.*--lora_alpha 16.0 -> 8.0", *resume, *changed)

    path = tmp_path / "out/full_sft_32.pth"
    base, adapter = path.read_bytes(), adapter_path(tmp_path).read_bytes()
    crc = checkpoint.read_weights(path)[1]["crc32"]
    args = stage_module("lora").parse_args(flags("lora", tmp_path))
    torch.manual_seed(1)
    checkpoint.save_weights(MiniMindLM(cli.model_config(args)), path, {"stage": "full_sft", "step": 2})
    other = checkpoint.read_weights(path)[1]["crc32"]
    fails(capsys, rf"stands on full_sft weights with checksum {crc}, the file now has {other}", *resume)
    assert adapter_path(tmp_path).read_bytes() == adapter, "nothing was written"
    path.write_bytes(base)
    run(*resume)
    run(tmp_path / "whole")
    assert_bit_equal(adapter_file(tmp_path), adapter_file(tmp_path / "whole"))


# --------------------------------------------------------------------------------------------------
# 8-bit products, torch.compile
# --------------------------------------------------------------------------------------------------

needs_integers = pytest.mark.skipif(
    not multiplies_integers(torch.device("cpu")), reason="this CPU has no products of 8-bit numbers"
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


@needs_integers
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_8_bit_products_adapters_learn_and_the_base_does_not(base, kind):
    model = adapted(base_model(base), LoRAConfig(4, **KINDS[kind])).train()
    x, found = tokens(), []
    for context in (torch.autocast("cpu", enabled=False), integer_products()):
        model.zero_grad(set_to_none=True)
        with context:
            loss = model(x, labels=x).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    (exact_loss, exact), (loss, gradients) = found
    assert loss != exact_loss and loss == pytest.approx(exact_loss, rel=0.01)
    for name, gradient in gradients.items():
        if ".lora." not in name:
            assert gradient is None, name
        elif base == "dense":  # in a mixture a token near the border may see another expert
            assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.98, name
        else:
            assert gradient.isfinite().all(), name


@needs_integers
def test_a_run_in_8_bit_products(tmp_path):
    flags("lora", tmp_path)
    before = (tmp_path / "out/full_sft_32.pth").read_bytes()
    run(tmp_path, "--dtype", "int8", steps=3)
    assert (tmp_path / "out/full_sft_32.pth").read_bytes() == before
    assert all(t.any() for name, t in adapter_file(tmp_path).items() if name.endswith(".B"))


@needs_integers
def test_an_adapted_head_is_as_exact_as_the_head_was():
    """8-bit products are for the blocks: a fresh adapter must not move the head among them."""
    plain = base_model(tie_word_embeddings=False)
    model = copy.deepcopy(plain)
    add_lora(model, LoRAConfig(4, targets=("lm_head",)))
    hidden = torch.randn(5, 64)
    with integer_products():
        assert model.lm_head(hidden).equal(plain.lm_head(hidden))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_run_gives_the_numbers_of_an_uncompiled_one(tmp_path, kind):
    more = {"lora": MOE, "rslora": ["--use_rslora", 1], "dora": ["--use_dora", 1]}[kind]
    for compiled in (0, 1):
        run(tmp_path / str(compiled), *more, "--use_compile", compiled, "--log_interval", 1)
    plain, compiled = (values(tmp_path / name) for name in "01")
    assert len(plain) == len(compiled) >= 6
    for one, two in zip(plain, compiled):
        for name in one.keys() & {"loss", "val_loss", "lora_size"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)


# --------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------

# A mixture's balance loss is a mean over micro-batches, which differ here.
PAIR = [*MOE, "--router_aux_loss_coef", 0, "--num_experts_per_tok", 1, "--accumulation_steps", 2]


def descend(folder):
    """A run of the stage by plain gradient descent: AdamW would divide a gradient by its own size, and so
    magnify the last digits in which one process and two differ."""
    from trainer import cli, runtime

    def build_optimizers(model, args, rt):
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=args.learning_rate)
        optimizer.param_groups[0]["base_lr"] = args.learning_rate
        return [optimizer]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "build_optimizers", build_optimizers)
        patch.setattr(runtime, "peak_flops", lambda rt: 1e11)
        more = ["--use_dora", 1, "--learning_rate", 1.0, "--schedule", "constant", "--val_fraction", 0.2]
        run(folder, *PAIR, *more, steps=3)


def be_a_process(folder, rank, port):
    """Run by each of the two processes."""
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
    descend(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from test_distributed import free_ports

    folder = tmp_path_factory.mktemp("pair")
    flags("lora", folder, *PAIR)  # data and base, before two look for them
    code = f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import test_lora"
    code += "; test_lora.be_a_process(*sys.argv[1:])"
    port = str(free_ports(1)[0])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return SimpleNamespace(folder=folder, outputs=outputs)


def test_two_processes_make_the_adapter_of_one(pair, tmp_path):
    descend(tmp_path)
    one, two = (adapter_file(folder, "lora_identity_32_moe") for folder in (tmp_path, pair.folder))
    assert largest_difference(one, two) < 1e-6
    assert max(t.abs().max() for name, t in one.items() if name.endswith(".B")) > 1e-3, "it moved"
    for first, second in zip(values(tmp_path), values(pair.folder)):
        assert first.keys() == second.keys()
        for key in first:
            assert first[key] == pytest.approx(second[key], rel=1e-4), key


def test_only_the_first_process_speaks(pair):
    first, second = pair.outputs
    assert "layers adapted" in first and "2 processes" in first and "layers adapted" not in second
