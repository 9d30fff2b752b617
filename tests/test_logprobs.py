"""Log-probabilities and losses over the vocabulary: as if all logits had been there at the same time."""

import pytest
import torch
import torch.nn.functional as F

from trainer import logprobs
from trainer.logprobs import answer_positions, hidden_states, linear_loss_sum, next_of, token_logprobs

WIDTH, VOCABULARY, CHUNK = 5, 11, 4
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """So that a few positions already cross borders."""
    monkeypatch.setattr(logprobs, "CHUNK", {"cpu": CHUNK, "other": CHUNK})


def inputs(size, dtype=torch.float64):
    """Hidden states, head, targets, and a weight of each position, so that no two gradients are alike."""
    draw = torch.Generator().manual_seed(size)
    hidden = torch.randn(size, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (size,), generator=draw)
    factors = torch.randn(size, generator=draw, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, factors


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------
# Log-probabilities of tokens
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_token_logprobs_and_their_gradients_are_those_of_log_softmax(size):
    hidden, weight, targets, factors = inputs(size)
    found = token_logprobs(hidden, weight, targets)
    wanted = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert found.dtype == torch.float64 and found.shape == (size,)
    close([found], [wanted])
    leaves = (hidden, weight)
    close(gradients((found * factors).sum(), *leaves), gradients((wanted * factors).sum(), *leaves))


def test_token_logprobs_against_finite_differences():
    hidden, weight, targets, _ = inputs(6)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets), (hidden, weight))


def test_token_logprobs_by_hand():
    """Logits (ln 2, 0, 0): probabilities 1/2, 1/4, 1/4."""
    hidden, weight = torch.tensor([[2.0], [2.0]]).log(), torch.tensor([[1.0], [0.0], [0.0]])
    found = token_logprobs(hidden, weight, torch.tensor([0, 2]))
    torch.testing.assert_close(found.exp(), torch.tensor([0.5, 0.25]))


def test_token_logprobs_of_large_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    weight = torch.tensor([[1.0], [0.0]]).requires_grad_()
    found = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, -1e4]
    assert all(g.isfinite().all() for g in gradients(found.sum(), hidden, weight))


def test_each_position_is_rounded_once_in_half_precision():
    """Hidden states in bfloat16, the head in float32: sums over the vocabulary are float32, every gradient
    has the type of what it belongs to, and autocast has no say."""
    hidden, weight, targets, factors = inputs(9)
    small = hidden.detach().bfloat16().requires_grad_()
    head = weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(small, head, targets)
    assert found.dtype == torch.float32
    by_hidden, by_weight = gradients((found * factors.float()).sum(), small, head)
    assert (by_hidden.dtype, by_weight.dtype) == (torch.bfloat16, torch.float32)
    exact = token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.05)
    wanted = gradients((exact * factors).sum(), hidden, weight)
    for a, b in zip((by_hidden, by_weight), wanted):
        assert F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.999

    floats = hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # the caller's float32 is not rounded either
        torch.testing.assert_close(
            token_logprobs(floats, head, targets).double(), exact, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("size", [0, 9])
def test_a_frozen_head_or_a_frozen_body_gets_no_gradient(size):
    hidden, weight, targets, factors = inputs(size)
    wanted = gradients((token_logprobs(hidden, weight, targets) * factors).sum(), hidden, weight)
    (token_logprobs(hidden, weight.detach(), targets) * factors).sum().backward()
    assert weight.grad is None
    close([hidden.grad], wanted[:1])
    hidden.grad = None
    (token_logprobs(hidden.detach(), weight, targets) * factors).sum().backward()
    assert hidden.grad is None
    close([weight.grad], wanted[1:])
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets).requires_grad


# ----------------------------------------------------------------------------------------------------------
# Any loss that is a sum over positions
# ----------------------------------------------------------------------------------------------------------


def distillation(logits, teacher, targets, factors):
    """A loss with rows of three kinds: KL to a distribution and cross-entropy, and a weight per position."""
    logps = logits.log_softmax(-1)
    kl = (teacher * (teacher.log() - logps)).sum(-1)
    cross_entropy = -logps.gather(1, targets[:, None]).squeeze(1)
    return (factors * (kl + 0.3 * cross_entropy)).sum(), torch.stack([kl.sum(), cross_entropy.sum()])


@pytest.mark.parametrize("size", SIZES)
def test_a_summed_loss_and_its_gradients_are_those_of_all_logits_at_once(size):
    hidden, weight, targets, factors = inputs(size)
    teacher = torch.rand(size, VOCABULARY, dtype=torch.float64).softmax(-1)
    seen = []

    def chunk_loss(logits, *rows):
        seen.append(len(logits))
        assert all(len(row) == len(logits) for row in rows)
        return distillation(logits, *rows)

    found, figures = linear_loss_sum(hidden, weight, chunk_loss, teacher, targets, factors)
    wanted, wanted_figures = distillation(hidden @ weight.T, teacher, targets, factors)
    assert max(seen, default=0) <= CHUNK and sum(seen) == size, "never more logits than a chunk's"
    assert found.shape == () and not figures.requires_grad
    leaves = (hidden, weight)
    # a factor from outside: the gradients were taken before it was known
    close(gradients(found * 2.5, *leaves), gradients(wanted * 2.5, *leaves))
    if size:
        close([found, figures], [wanted, wanted_figures])
    else:
        assert found == 0 and figures.shape == (0,)


def test_a_summed_loss_leaves_what_is_frozen_alone():
    hidden, weight, targets, factors = inputs(9)
    teacher = torch.rand(9, VOCABULARY, dtype=torch.float64).softmax(-1)
    rows = (distillation, teacher, targets, factors)
    wanted = gradients(linear_loss_sum(hidden, weight, *rows)[0], hidden, weight)
    linear_loss_sum(hidden, weight.detach(), *rows)[0].backward()
    assert weight.grad is None
    close([hidden.grad], wanted[:1])
    hidden.grad = None
    linear_loss_sum(hidden.detach(), weight, *rows)[0].backward()
    assert hidden.grad is None
    close([weight.grad], wanted[1:])
    found, figures = linear_loss_sum(hidden.detach(), weight.detach(), *rows)
    assert not found.requires_grad and figures.shape == (2,)


def test_without_gradients_a_summed_loss_takes_none():
    """Validation would pay for two more products with the vocabulary."""
    hidden, weight, targets, factors = inputs(9)
    teacher = torch.rand(9, VOCABULARY, dtype=torch.float64).softmax(-1)
    wanted = []

    def chunk_loss(logits, *rows):
        wanted.append(logits.requires_grad)
        return distillation(logits, *rows)

    with torch.no_grad():
        linear_loss_sum(hidden, weight, chunk_loss, teacher, targets, factors)
    assert wanted == [False] * 3


def test_a_summed_loss_in_half_precision_sees_float32_logits():
    hidden, weight, targets, factors = inputs(9)
    teacher = torch.rand(9, VOCABULARY, dtype=torch.float64).softmax(-1)
    seen = []

    def chunk_loss(logits, *rows):
        seen.append(logits.dtype)
        return distillation(logits, *rows)

    small, head = hidden.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    rows = (teacher.float(), targets, factors.float())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = linear_loss_sum(small, head, chunk_loss, *rows)
    by_hidden, by_weight = gradients(found, small, head)
    assert set(seen) == {torch.float32} and found.dtype == torch.float32
    assert (by_hidden.dtype, by_weight.dtype) == (torch.bfloat16, torch.float32)
    exact = gradients(
        linear_loss_sum(hidden, weight, distillation, teacher, targets, factors)[0], hidden, weight
    )
    for a, b in zip((by_hidden, by_weight), exact):
        assert F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.999


# ----------------------------------------------------------------------------------------------------------
# Which positions
# ----------------------------------------------------------------------------------------------------------


def test_answer_positions_by_hand():
    """The position before a target predicts it; the first of a row can not be predicted, whatever it says,
    and nothing travels from one row to the next."""
    labels = torch.tensor([[-100, -100, 7, 8, -100], [9, -100, -100, 5, 6]])
    keep, targets = answer_positions(labels)
    assert keep.tolist() == [1, 2, 7, 8] and targets.tolist() == [7, 8, 5, 6]
    keep, targets = answer_positions(torch.full((2, 5), -100))
    assert keep.shape == targets.shape == (0,) and targets.dtype == torch.int64


def test_what_belongs_to_the_next_token_by_hand():
    """Weights of tokens are moved as their labels are, so that both meet at one position."""
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert next_of(values).tolist() == [2, 3, 0, 5, 6, 0]
    assert next_of(values.long(), -100).tolist() == [2, 3, -100, 5, 6, -100]


def test_hidden_states_are_what_the_head_sees():
    from preference_helpers import small_model

    model = small_model()
    ids = torch.arange(12).view(2, 6) + 40
    batch = {"input_ids": ids, "position_ids": torch.arange(6).expand(2, 6), "labels": ids}
    with torch.no_grad():
        hidden, aux_loss = hidden_states(model, batch)
        logits = model(input_ids=ids, position_ids=batch["position_ids"]).logits
    assert aux_loss is None and hidden.shape == (12, 32)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, logits.flatten(0, 1))
    assert hidden_states(small_model(use_moe=True), batch)[1] > 0
