"""Which numbers a machine multiplies, and training with products of 8-bit integers."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from model import precision
from model.model_minimind import MiniMindConfig, MiniMindLM
from model.precision import IntegerLinear, integer_products, round_to_integers

needs_integers = pytest.mark.skipif(
    not precision.multiplies_integers(torch.device("cpu")), reason="this CPU has no products of 8-bit numbers"
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
KINDS = {
    "dense": {},
    "moe": dict(use_moe=True, num_experts=3, num_experts_per_tok=2, n_shared_experts=1),
}


def tiny(kind="dense", **more) -> MiniMindLM:
    torch.manual_seed(3)
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    return MiniMindLM(MiniMindConfig(**sizes, residual_init="normal", **KINDS[kind], **more))


def loss_and_gradients(model, ids, integers: bool):
    model.zero_grad(set_to_none=True)
    with integer_products() if integers else torch.autocast("cpu", enabled=False):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dim", [-1, 0, (0, 1)])
def test_rounding_is_off_by_half_a_step_at_most_and_uses_the_whole_range(dim):
    x = torch.cat(
        [torch.randn(5, 40), torch.zeros(1, 40), torch.full((1, 40), -3e-20), 1e4 * torch.randn(2, 40)]
    )
    rounded, scale = round_to_integers(x, dim)
    assert rounded.dtype == torch.int8 and rounded.min() >= -127
    assert ((rounded * scale - x).abs() <= scale * 0.501).all()
    peaks = rounded.int().abs().amax(dim)
    expected = torch.full_like(peaks, 127)
    if dim == -1:
        expected[5] = 0
    assert torch.equal(peaks, expected)


@needs_integers
def test_integer_linear_is_the_exact_product_of_the_rounded_factors():
    """Every product computed again in float64 from operands rounded as the docstring says."""
    x, weight, grad = torch.randn(2, 20, 48), 0.02 * torch.randn(33, 48), 1e-6 * torch.randn(2, 20, 33)
    x[0, 3] *= 50
    x[1, 4], grad[1, 5] = 0, 0
    x.requires_grad_(), weight.requires_grad_()
    y = IntegerLinear.apply(x, weight)
    y.backward(grad)

    def restored(matrix, dim):
        rounded, scale = round_to_integers(matrix, dim)
        return rounded.double() * scale.double()

    with torch.no_grad():
        rows, grads = x.view(40, 48), grad.view(40, 33)
        _, x_scale = round_to_integers(rows)
        w = restored(weight, (0, 1))
        expected = restored(rows, -1) @ w.t()
        grad_x = restored(grads, -1) @ w
        # the inputs' scales stand with the gradient
        grad_weight = restored(grads * x_scale, 0).t() @ (restored(rows, -1) / x_scale.double())
    for ours, exact in ((y, expected), (x.grad, grad_x), (weight.grad, grad_weight)):
        torch.testing.assert_close(ours.double().view(exact.shape), exact, rtol=1e-5, atol=1e-16)
    off = (y - F.linear(x, weight)).norm() / y.norm()
    assert off < 0.02


@needs_integers
def test_integer_linear_leaves_frozen_weights_alone_and_does_not_hide_a_nan():
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16)
    IntegerLinear.apply(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    for bad in (float("nan"), float("inf")):
        x = torch.randn(4, 16)
        x[2, 3] = bad
        y = IntegerLinear.apply(x, weight.requires_grad_())
        assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()


@needs_integers
def test_a_frozen_weight_is_rounded_once_and_again_when_it_changes(monkeypatch):
    rounded = []

    def remember(x, dim=-1):
        rounded.append(x.shape)
        return round_to_integers(x, dim)

    monkeypatch.setattr(precision, "round_to_integers", remember)
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16)
    first = IntegerLinear.apply(x, weight)
    first.sum().backward()
    assert IntegerLinear.apply(x, weight).equal(first) and rounded.count(weight.shape) == 1
    weight.mul_(-2)
    assert IntegerLinear.apply(x, weight).equal(-2 * first) and rounded.count(weight.shape) == 2
    learning = weight.clone().requires_grad_()
    for _ in range(2):
        assert IntegerLinear.apply(x, learning).equal(-2 * first)
    assert rounded.count(weight.shape) == 4, "one that learns, every time"


@needs_integers
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trained_in_integers_has_nearly_the_float32_gradient(kind):
    model, ids = tiny(kind), torch.randint(3, 97, (4, 24))
    exact_loss, exact = loss_and_gradients(model, ids, integers=False)
    loss, gradients = loss_and_gradients(model, ids, integers=True)
    assert loss != exact_loss and (loss - exact_loss).abs() < 0.01 * exact_loss
    for name, gradient in gradients.items():
        if kind == "moe" and "experts" in name or name.endswith("mlp.gate.weight"):
            continue  # a token near the border may see another expert
        similarity = F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert similarity > (0.99 if kind == "dense" else 0.9), name


@needs_integers
def test_integers_are_for_training_only():
    model, ids = tiny(), torch.randint(3, 97, (2, 12))
    trained = model(ids).logits
    with integer_products():
        assert not torch.equal(model(ids).logits, trained)
        with torch.no_grad():
            exact = model(ids).logits
    assert torch.equal(model(ids).logits, trained)  # only within the context
    with torch.no_grad():
        assert torch.equal(model(ids).logits, exact)


@needs_integers
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_repeats_the_products_of_the_first_pass(kind):
    model, ids = tiny(kind), torch.randint(3, 97, (2, 24))
    loss, plain = loss_and_gradients(model, ids, integers=True)
    model.model.gradient_checkpointing = True
    again, gradients = loss_and_gradients(model.train(), ids, integers=True)
    assert loss == again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[name]), name


@needs_integers
@needs_compiler
def test_the_compiled_block_has_the_integer_gradient_of_the_plain_one():
    model, ids = tiny(), torch.randint(3, 97, (2, 24))
    loss, plain = loss_and_gradients(model, ids, integers=True)
    compiled_loss, compiled = loss_and_gradients(model.compile_blocks(), ids, integers=True)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-3, atol=0)
    for name, gradient in compiled.items():
        assert F.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("bfloat16_seconds, expected", [(0.2, True), (0.9, False), (2.0, False)])
def test_a_cpu_uses_bfloat16_where_it_is_clearly_faster(bfloat16_seconds, expected, monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(precision, "product_seconds", lambda *dtypes: seconds)
    assert precision.cpu_prefers_bfloat16.__wrapped__() is expected


def test_products_are_timed():
    seconds = precision.product_seconds(torch.float32, torch.bfloat16, rounds=2)
    assert all(0 < seconds[dtype] < 10 for dtype in (torch.float32, torch.bfloat16))
