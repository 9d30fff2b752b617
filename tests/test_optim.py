"""Muon against torch.optim.Muon and its scalar map, AdamW by hand, schedules against transformers."""

import math

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.optim import (
    JORDAN,
    THREE_STEPS,
    Muon,
    blocks_of,
    build_optimizers,
    lr_factor,
    orthogonalise,
    set_lr,
    split_parameters,
)


def tiny_model(**fields):
    torch.manual_seed(0)
    config = dict(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return MiniMindForCausalLM(MiniMindConfig(**(config | fields)))


def test_newton_schulz_is_the_quintic_on_each_singular_value():
    """G = diag(3, 4): normalised 0.6, 0.8; each step maps s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    G = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))[None]
    one, five = orthogonalise(G, JORDAN[:1])[0], orthogonalise(G, JORDAN)[0]
    torch.testing.assert_close(one.diag(), torch.tensor([1.19326944, 0.97648192]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        five.diag(), torch.tensor([0.72287617, 1.11920393]).double(), rtol=1e-5, atol=0
    )
    assert one.fill_diagonal_(0).abs().max() < 1e-12


def test_three_steps_bring_singular_values_near_one():
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(96, 64, dtype=torch.float64))
    S = torch.logspace(
        0, -1.3, 64, dtype=torch.float64
    )  # the smallest is 0.01 after the division by the norm
    assert (S / S.norm()).min() > 0.01
    G = U @ torch.diag(S) @ V.T
    result = torch.linalg.svdvals(orthogonalise(G[None])[0])
    assert result.min() > 0.72 and result.max() < 1.28
    nearest = U @ V.T
    assert (orthogonalise(G[None])[0] - nearest).norm() / nearest.norm() < 0.28


def test_a_batch_of_matrices_equals_one_by_one_tall_and_wide():
    for shape in [(3, 8, 20), (3, 20, 8)]:
        G = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(orthogonalise(G), torch.cat([orthogonalise(g[None]) for g in G]))


def test_blocks_cut_the_shorter_side():
    G = torch.randn(8, 20, dtype=torch.float64)
    assert torch.equal(blocks_of(G, 4), torch.stack([G[:4], G[4:]]))
    assert torch.equal(blocks_of(G.mT, 4), torch.stack([G[:4].mT, G[4:].mT]))
    for whole in (0, 3):  # a side that the block does not divide stays whole
        assert torch.equal(blocks_of(G, whole), G[None]) and torch.equal(blocks_of(G.mT, whole), G.mT[None])
    blocks_of(G, 4)[1] = 0
    assert G[4:].abs().max() == 0 and G[:4].abs().min() > 0, "a view"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_an_update_by_its_formula(shape, block, dtype):
    """Two steps, two matrices of one shape, every block by itself."""
    torch.manual_seed(3)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    params = [torch.nn.Parameter(torch.randn(shape, dtype=exact)) for _ in range(2)]
    optimizer = Muon(params, lr=0.1, momentum=0.8, weight_decay=0.5, ns_dtype=dtype, block=block)
    expected, buffers = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for _ in range(2):
        for p, W, buf in zip(params, expected, buffers):
            p.grad = torch.randn(shape, dtype=exact)
            buf.copy_(0.8 * buf + 0.2 * p.grad)
            u = 0.2 * p.grad + 0.8 * buf
            wide = u if shape[0] < shape[1] else u.mT
            rows = block or 8
            parts = [orthogonalise(wide[None, i : i + rows].to(dtype))[0] for i in range(0, 8, rows)]
            turned = torch.cat(parts).to(exact)
            turned = turned if shape[0] < shape[1] else turned.mT
            W.copy_(W * (1 - 0.1 * 0.5) - 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5 * turned)
        optimizer.step()
    limit = 0.01 if dtype == torch.bfloat16 else 1e-5
    for p, W in zip(params, expected):
        torch.testing.assert_close(p.detach(), W, atol=limit, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 96), (3, 96, 32), (2, 40, 40)])
def test_float32_multiplies_the_factors_first_and_ends_where_the_iteration_does(shape):
    """float64 takes the steps one by one. Most singular values here are a ten thousandth of the largest."""
    torch.manual_seed(2)
    n, rows, cols = shape
    G = torch.randn(n, rows, 3) @ torch.randn(n, 3, cols) + 1e-4 * torch.randn(shape)
    for coefficients in (THREE_STEPS, JORDAN):
        exact = orthogonalise(G.double(), coefficients, -0.5)
        torch.testing.assert_close(orthogonalise(G, coefficients, -0.5).double(), exact, atol=1e-4, rtol=0)
        torch.testing.assert_close(exact, -0.5 * orthogonalise(G.double(), coefficients))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_updates_equal_torch_muon(shape):
    """torch iterates in bfloat16, so updates agree to a few percent in relative Frobenius norm."""
    torch.manual_seed(1)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1, coefficients=JORDAN)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(3):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
        da, db = ours.detach() - before[0], theirs.detach() - before[1]
        assert (da - db).norm() / db.norm() < 0.05


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_adamw_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    (optimizer,) = build_optimizers(model, "adamw", learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    for grad, value in [(0.5, 0.890000002), (-0.25, 0.8542630579)]:
        model.weight.grad = torch.full((1, 1), grad)
        optimizer.step()
        assert math.isclose(model.weight.item(), value, rel_tol=1e-6)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_optimised_exactly_once(moe, name):
    model = tiny_model(use_moe=moe)
    optimizers = build_optimizers(model, name)
    seen = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


def test_muon_gets_hidden_matrices_only():
    model = tiny_model(use_moe=True, qk_norm=True)
    hidden, other, vectors = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in other} == {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    }
    assert all(p.ndim == 1 for p in vectors)
    assert any("experts.3.down_proj" in names[id(p)] for p in hidden)
    adamw, muon = build_optimizers(model, "muon", weight_decay=0.1)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.0]
    assert [g["weight_decay"] for g in muon.param_groups] == [0.1]


def test_set_lr_scales_every_group_from_its_own_peak():
    adamw, muon = build_optimizers(tiny_model(), "muon", learning_rate=1e-3, muon_lr=0.02)
    assert set_lr([adamw, muon], 0.5) == 5e-4
    assert muon.param_groups[0]["lr"] == 0.01
    set_lr([adamw, muon], 1.0)
    assert muon.param_groups[0]["lr"] == 0.02


def reference(scheduler_for, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = scheduler_for(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_and_wsd_shapes_equal_transformers_after_the_warm_up():
    cosine = reference(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 4, 12, min_lr_rate=0.1), 13)
    ours = [lr_factor(s, 12, "cosine", warmup_steps=4, min_factor=0.1) for s in range(13)]
    assert ours[4:] == pytest.approx(cosine[4:], abs=1e-6)
    wsd = reference(
        lambda o: get_wsd_schedule(
            o,
            num_warmup_steps=0,
            num_stable_steps=6,
            num_decay_steps=4,
            decay_type="linear",
            min_lr_ratio=0.1,
        ),
        11,
    )
    ours = [lr_factor(s, 10, "wsd", decay_fraction=0.4, min_factor=0.1) for s in range(11)]
    assert ours == pytest.approx(wsd, abs=1e-6)


def test_no_schedule_rises_again_after_its_end_and_the_warm_up_never_starts_at_zero():
    for schedule in ("wsd", "cosine", "linear"):
        rates = [lr_factor(s, 20, schedule, warmup_steps=3, min_factor=0.05) for s in range(60)]
        assert rates[:3] == [0.25, 0.5, 0.75]
        assert all(b <= a for a, b in zip(rates[3:], rates[4:]))
        assert rates[20:] == pytest.approx([0.05] * 40)
    assert lr_factor(1000, 20, "constant") == 1.0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="muon or adamw"):
        build_optimizers(tiny_model(), "sgd")
    with pytest.raises(ValueError, match="wsd"):
        lr_factor(0, 10, "step")
