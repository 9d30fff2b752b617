"""White-box distillation: divergences against numbers by hand and trl, and the stage as a user runs it."""

import contextlib
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from preference_helpers import small_model
from stage_helpers import (
    MIXTURE,
    ONE_STEP,
    base_weights,
    chat_rows,
    lines,
    plain_descent,
    refused,
    steps_of,
    train,
    validations,
)
from train_helpers import MOE, assert_bit_equal, largest_difference, stop_after, weights, write_lines

from dataset.lm_dataset import load_sft
from model.precision import integer_products, multiplies_integers
from trainer import batches, checkpoint, logprobs, runtime, train_distillation
from trainer.train_distillation import DIVERGENCES, distillation_loss, divergence_loss, teaching_loss

NAME = "full_dist_32.pth"

# ----------------------------------------------------------------------------------------------------------
# Divergences
# ----------------------------------------------------------------------------------------------------------

TEACHER = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
BY_HAND = {
    ("forward", 1): 0.1196298,
    ("reverse", 1): 0.1232924,
    ("jsd", 1): 0.0300453,
    ("forward", 2): 0.0309906,
    ("reverse", 2): 0.0304237,
    ("jsd", 2): 0.0076561,
}


def logits(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("kind, temperature", BY_HAND)
def test_divergences_by_hand(kind, temperature):
    found = divergence_loss(STUDENT, TEACHER, kind, temperature)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(BY_HAND[kind, temperature], abs=5e-8)


def test_the_gradient_of_forward_at_temperature_2_by_hand():
    """T^2 dD / dz = T (q - p): as large as the cross-entropy's."""
    student = STUDENT.clone().requires_grad_()
    (4 * divergence_loss(student, TEACHER, "forward", 2.0)).sum().backward()
    assert student.grad[0].tolist() == pytest.approx([-0.2456573, 0.1529117, 0.0927456], abs=5e-8)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("jsd_beta", [0.1, 0.5, 0.8])
def test_divergences_are_their_definitions(temperature, jsd_beta):
    student, teacher = logits(5, 11), logits(5, 11, seed=1)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    m = jsd_beta * p + (1 - jsd_beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    wanted = {"forward": kl(p, q), "reverse": kl(q, p)}
    wanted["jsd"] = jsd_beta * kl(p, m) + (1 - jsd_beta) * kl(q, m)
    for kind in DIVERGENCES:
        found = divergence_loss(student, teacher, kind, temperature, jsd_beta)
        torch.testing.assert_close(found, wanted[kind], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergences_are_those_of_trl(monkeypatch, beta):
    """Loss and gradient, for all its betas; trl takes no T^2."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    kinds = [("jsd", beta)] + [("forward", 0.5)] * (beta == 0) + [("reverse", 0.5)] * (beta == 1)
    teacher, labels = logits(2, 4, 9, seed=1), torch.tensor([[1, -100, 3, 4], [5, 6, -100, 0]])
    other = logits(2, 4, 9).requires_grad_()
    expected = GKDTrainer.generalized_jsd_loss(other, teacher, labels, beta, 1.7, num_items_in_batch=6)
    expected.backward()
    for kind, jsd_beta in kinds:
        mine = logits(2, 4, 9).requires_grad_()
        loss = divergence_loss(mine, teacher, kind, 1.7, jsd_beta)[labels != -100].sum() / 6
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    student = logits(5, 11).requires_grad_()
    found = divergence_loss(student, logits(5, 11), kind, 1.5)
    found.sum().backward()
    assert found.abs().max() < 1e-14 and student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_tokens_that_are_all_but_impossible(kind):
    """A probability of e^-400 is none in float32: 0 log 0 must not become NaN."""
    sides = torch.tensor([[400.0, 0.0, -400.0]]), torch.tensor([[390.0, 0.0, 3.0]])
    student = sides[0].clone().requires_grad_()
    found = divergence_loss(student, sides[1], kind)
    found.sum().backward()
    assert 0 <= found.item() < 1e-6 and student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mix_with_cross_entropy_by_hand(alpha, temperature):
    """The teacher's logits come from its hidden states; figures are sums over positions, divergence without
    T^2, the rest at temperature 1."""
    student, teacher = torch.cat([STUDENT, 2 * TEACHER]), torch.cat([TEACHER, TEACHER])
    targets = torch.tensor([2, 0])
    settings = dict(alpha=alpha, kind="forward", temperature=temperature, jsd_beta=0.5)
    loss, figures = teaching_loss(student, targets, teacher, torch.eye(3, dtype=torch.float64), **settings)
    p = [math.exp(x) / sum(map(math.exp, (2, 1, 0))) for x in (2, 1, 0)]
    entropy = -2 * sum(x * math.log(x) for x in p)
    ce = math.log(2 * math.e + 1) + math.log(math.exp(4) + math.exp(2) + 1) - 4
    divergence = divergence_loss(student, teacher, "forward", temperature)
    assert divergence[0].item() == pytest.approx(BY_HAND["forward", temperature], abs=5e-8)
    divergence = divergence.sum().item()
    assert loss.item() == pytest.approx(alpha * ce + (1 - alpha) * temperature**2 * divergence)
    assert figures.tolist() == pytest.approx([ce, divergence, entropy, 2.0])
    other = torch.tensor([[0.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    assert teaching_loss(other, targets, teacher, torch.eye(3, dtype=torch.float64), **settings)[1][3] == 0, (
        "no agreement"
    )


# ----------------------------------------------------------------------------------------------------------
# The loss of a micro-batch
# ----------------------------------------------------------------------------------------------------------

SETTINGS = dict(alpha=0.3, kind="forward", temperature=1.5, jsd_beta=0.3)


def teacher_model(**more):
    """Wider and deeper than the student; its parameters would take a gradient if one reached them."""
    model = small_model(hidden_size=48, num_hidden_layers=3, **more)
    return model.eval()


def micro_batch():
    """A row of two packed conversations, and one with padding."""
    ids = torch.randint(40, 6000, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(14)]), torch.arange(24)])
    answers = torch.zeros(2, 24, dtype=torch.bool)
    answers[0, 3:9], answers[0, 15:24], answers[1, 5:20] = True, True, True
    return {"input_ids": ids, "labels": ids.masked_fill(~answers, -100), "position_ids": positions}


def loss_of(student, teacher, batch, **settings):
    teaching = functools.partial(teaching_loss, **(SETTINGS | settings))
    return distillation_loss(
        student, batch, {"loss": 30, "aux_loss": 1}, teacher, student.lm_head.weight, teaching
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_gradient_is_that_of_the_formula_on_full_logits(monkeypatch, kind):
    """In chunks whose borders fall inside an answer; and the teacher gets none."""
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 7)
    student, teacher, batch = small_model(tie_word_embeddings=kind != "jsd"), teacher_model(), micro_batch()
    loss, sums = loss_of(student, teacher, batch, kind=kind)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    keep = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    z, z_teacher = (m(**inputs).logits[:, :-1][keep] for m in (student, teacher))
    ce = F.cross_entropy(z, batch["labels"][:, 1:][keep], reduction="sum")
    divergence = divergence_loss(z, z_teacher.detach(), kind, 1.5, 0.3).sum()
    wanted = (0.3 * ce + 0.7 * 1.5**2 * divergence) / 30
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert sums["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert sums["divergence"].item() == pytest.approx(divergence.item(), rel=1e-4)
    assert sums["loss"].item() == pytest.approx(30 * wanted.item(), rel=1e-5)
    entropy = torch.distributions.Categorical(logits=z_teacher).entropy().sum().item()
    assert sums["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert sums["agreement"].item() == (z.argmax(-1) == z_teacher.argmax(-1)).sum().item()


COMPUTE = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "int8": integer_products,
}
needs_integers = pytest.mark.skipif(
    not multiplies_integers(torch.device("cpu")), reason="this CPU has no products of 8-bit numbers"
)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_integers)])
def test_rounding_is_no_difference_between_teacher_and_student(dtype, kind):
    """Both round alike, and behind that all is float32: a student that equals its teacher finds nothing,
    whatever the compute type. Divergences of bfloat16 logits would be a few percent off."""
    shape = dict(hidden_size=64, num_attention_heads=4)
    student, batch = small_model(**shape).train(), micro_batch()
    teacher = small_model(**shape).eval().requires_grad_(False)
    with COMPUTE[dtype]():
        loss, sums = loss_of(student, teacher, batch, kind=kind, alpha=0.0)
    assert abs(float(sums["divergence"])) / 30 < 1e-8 and sums["agreement"] == 30
    loss.backward()
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-6
    with torch.no_grad():
        teacher.model.layers[0].mlp.down_proj.weight.mul_(1.2)
    with COMPUTE[dtype]():
        assert float(loss_of(student, teacher, batch, kind=kind, alpha=0.0)[1]["divergence"]) / 30 > 1e-4


def test_a_micro_batch_without_answers_has_the_same_figures():
    """A process that has no row in the last step of an epoch adds zeros; processes add up what they have by
    name, so that the names must be the same."""
    student, teacher, batch = small_model(), teacher_model(), micro_batch()
    usual = loss_of(student, teacher, batch)[1]
    loss, sums = loss_of(student, teacher, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0 and sums.keys() == usual.keys()
    assert all(value.detach() == 0 for value in sums.values())
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters()), "DDP waits for them"


# ----------------------------------------------------------------------------------------------------------
# Answers of the student's own
# ----------------------------------------------------------------------------------------------------------


def test_prompts_of_packed_rows_by_hand():
    """Of every conversation what stands before its first answer; padding and a piece without any answer are
    no conversation."""
    x = -100
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 4, 3, 2, 0], [5, 1, 1, 2, 2, 5, 5, 0, 0, 0]]),
        "labels": torch.tensor([[x, x, 7, x, 9, x, x, 3, x, x], [x, x, x, x, 2, x, x, x, x, x]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]),
    }
    assert batches.first_prompts(batch) == [[[5, 6], [5, 4]], [[5, 1, 1, 2]]]
    batch["labels"].fill_(x)
    assert batches.first_prompts(batch) == [[], []]


def test_rows_of_sequences_by_hand():
    """Rounded up to 32; 20 + 12 fill a row, 30 have one of their own; what follows a prompt is a target."""
    sequences = [(list(range(100, 120)), 15), (list(range(200, 230)), 28), (list(range(300, 312)), 2)]
    found = batches.rows_of(sequences, 64, 0)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), ((2, 32), torch.int64)
    )
    assert found["input_ids"][0].tolist() == [*range(100, 120), *range(300, 312)]
    assert found["labels"][0].tolist() == [-100] * 15 + [*range(115, 120)] + [-100] * 2 + [*range(302, 312)]
    assert found["position_ids"][0].tolist() == [*range(20), *range(12)]
    assert found["input_ids"][1].tolist() == [*range(200, 230), 0, 0]
    assert found["labels"][1].tolist() == [-100] * 28 + [228, 229, -100, -100]
    assert found["position_ids"][1].tolist() == [*range(30), 0, 1]


def test_sequences_that_are_too_long_or_not_there():
    long = batches.rows_of([(list(range(1, 61)), 38)], 40, 0)
    assert long["input_ids"].tolist() == [list(range(1, 41))], "what does not fit is cut off"
    assert long["labels"].tolist() == [[-100] * 38 + [39, 40]]
    none = batches.rows_of([], 64, 7)
    assert none["input_ids"].shape == (1, 32) and (none["input_ids"] == 7).all()
    assert (none["labels"] == -100).all() and none["position_ids"].tolist() == [list(range(32))]


def greedy(model, prompt, count):
    """The likeliest continuation by whole forward passes, through <|im_end|>."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
    return ids


def own_answers(model, batch, pad_id=0, **settings):
    args = SimpleNamespace(**({"max_seq_len": 64, "max_gen_len": 6, "seed": 42} | settings))
    rt = runtime.Runtime(torch.device("cpu"), torch.float32, seed=42)
    given = batches.StepBatches([batch, batch | {"labels": torch.full_like(batch["labels"], -100)}])
    given.rows, given.places, given.num_rows = [3, 4], [0, 1], 2
    rt.seed_step(9)
    return train_distillation.sample_answers(model, given, 9, args, rt, pad_id), rt


def test_labels_are_what_the_student_itself_says():
    """A student so sure of itself that a sample is its likeliest answer; a second micro-batch without any
    prompt keeps its place, because processes make as many each."""
    model, batch = small_model().train(), micro_batch()
    with torch.no_grad():
        model.model.norm.weight.mul_(200)
    own, _ = own_answers(model, batch)
    prompts = [batch["input_ids"][row, a:b].tolist() for row, a, b in ((0, 0, 3), (0, 10, 15), (1, 0, 5))]
    said = [greedy(model, prompt, 6) for prompt in prompts]
    first, second = own
    found = set()
    for ids, labels, positions in zip(*(first[n].tolist() for n in ("input_ids", "labels", "position_ids"))):
        starts = [*[i for i, place in enumerate(positions) if place == 0], len(ids)]
        for a, b in zip(starts, starts[1:]):
            piece = [(i, label) for i, label in zip(ids[a:b], labels[a:b])]
            if any(label != -100 for _, label in piece):
                found.add((tuple(i for i, _ in piece), tuple(label for _, label in piece)))
    wanted = {
        (tuple(ids), (*[-100] * len(prompt), *ids[len(prompt) :])) for ids, prompt in zip(said, prompts)
    }
    assert found == wanted
    assert (second["labels"] == -100).all() and (second["input_ids"] == 0).all()
    assert own.num_targets == sum(len(ids) - len(prompt) for ids, prompt in zip(said, prompts))
    assert own.num_tokens == sum(map(len, said)) and (own.rows, own.num_rows) == ([3, 4], 2)
    assert model.training


def test_prompts_that_leave_no_room_are_left_out():
    """Of the three prompts, of 3, 5 and 5 tokens, a row of 5 has room for one token behind the first two."""
    own, _ = own_answers(small_model(), micro_batch(), max_seq_len=5)
    assert sum(int((batch["labels"] != -100).sum()) for batch in own) == own.num_targets <= 2
    assert own.num_targets > 0
    assert all(batch["input_ids"].shape[1] <= 5 for batch in own)


def test_samples_are_a_function_of_seed_and_step_and_disturb_no_other_draw():
    model, batch = small_model(), micro_batch()
    first, rt = own_answers(model, batch)
    drawn = torch.rand(3)
    torch.rand(100)
    second, _ = own_answers(model, batch)
    other, _ = own_answers(model, batch, seed=43)
    assert all(one[name].equal(two[name]) for one, two in zip(first, second) for name in one)
    assert not first[0]["labels"].equal(other[0]["labels"])
    rt.seed_step(9)
    assert torch.rand(3).equal(drawn), "dropout of such a step is that of any other"


def test_samples_do_not_depend_on_how_rows_are_shared():
    """Both rows in one micro-batch, in one each, or in two processes: the same answers."""
    model, batch = small_model(), micro_batch()
    args = SimpleNamespace(max_seq_len=64, max_gen_len=6, seed=42)
    rt = runtime.Runtime(torch.device("cpu"), torch.float32, seed=42)

    def answers(micro_batches, places):
        given = batches.StepBatches(micro_batches)
        given.places = places
        own = train_distillation.sample_answers(model, given, 9, args, rt, 0)
        labels = [label for new in own for label in new["labels"].flatten().tolist()]
        runs = itertools.groupby(labels, key=lambda label: label != -100)
        return sorted(tuple(run) for is_answer, run in runs if is_answer)

    first, second = ({name: t[row : row + 1] for name, t in batch.items()} for row in (0, 1))
    together = answers([batch], [0, 1])
    assert len(set(together)) == 3
    assert (
        together == answers([first, second], [0, 1]) == sorted(answers([first], [0]) + answers([second], [1]))
    )
    assert answers([first], [0]) != answers([first], [5]), "the same row again in a step draws anew"


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A wide teacher and a small student."""
    folder = tmp_path_factory.mktemp("run")
    base_weights(folder)
    base_weights(folder, "teacher", hidden_size=48, num_hidden_layers=3, initializer_range=0.2)
    paths = folder / "out/full_sft_32.pth", folder / "out/teacher_48.pth"
    before = [path.read_bytes() for path in paths]
    more = "--from_teacher_weight teacher --teacher_hidden_size 48 --teacher_num_layers 3 --alpha 0.2".split()
    train("distillation", folder, *more, steps=12)
    return SimpleNamespace(folder=folder, paths=paths, before=before, more=more)


def test_the_student_comes_nearer_to_its_teacher(run):
    found = validations(run.folder, "distillation")
    assert [line["step"] for line in found] == [0, 4, 8, 12]
    assert found[-1]["val_divergence"] < found[0]["val_divergence"] - 0.01
    steps = steps_of(run.folder, "distillation")
    assert all({"ce", "divergence", "teacher_entropy", "agreement"} <= line.keys() for line in steps)
    for line in steps:  # alpha 0.2, T 1.5
        assert line["loss"] == pytest.approx(0.2 * line["ce"] + 0.8 * 2.25 * line["divergence"], rel=1e-4)


def test_base_and_teacher_are_left_alone(run):
    assert [path.read_bytes() for path in run.paths] == run.before
    metadata = checkpoint.read_weights(run.folder / "out" / NAME)[1]
    assert metadata["stage"] == "distillation" and metadata["parent"]["weight"] == "full_sft"


def test_held_out_figures_are_means_over_answer_tokens(run):
    student, teacher = (checkpoint.load_model(path)[0] for path in run.paths)
    data = load_sft(
        run.folder / "data.jsonl", checkpoint.load_tokenizer(), 64, val_fraction=0.2, num_workers=1
    )[1]
    batch = data.batch(list(range(len(data))))
    keep = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        z, z_teacher = (m(**inputs).logits[:, :-1][keep] for m in (student, teacher))
    wanted = {
        "val_loss": F.cross_entropy(z, batch["labels"][:, 1:][keep]),
        "val_divergence": divergence_loss(z, z_teacher, "forward", 1.5).mean(),
        "val_agreement": (z.argmax(-1) == z_teacher.argmax(-1)).float().mean(),
    }
    first = validations(run.folder, "distillation")[0]
    assert int(keep.sum()) == data.num_targets > 10
    for name, value in wanted.items():
        assert first[name] == pytest.approx(float(value), rel=1e-4), name


def test_one_step_is_the_gradient_of_the_formula(tmp_path, monkeypatch):
    """Divided by the answer tokens of the whole step, however it is cut."""
    plain_descent(monkeypatch, 0.05)
    path = write_lines(tmp_path, "data.jsonl", chat_rows(6))
    cut = ["--pack", 0, "--batch_size", 2, "--accumulation_steps", 3]
    train("distillation", tmp_path, *ONE_STEP, *cut, "--divergence", "reverse", "--alpha", 0.3, steps=1)
    student, teacher = (
        checkpoint.load_model(tmp_path / f"out/{name}_32.pth")[0] for name in ("full_sft", "teacher")
    )
    data = load_sft(path, checkpoint.load_tokenizer(), 64, num_workers=1, pack=False)[0]
    batch = data.batch(list(range(len(data))))
    keep = batch["labels"][:, 1:] != -100
    z, z_teacher = (m(batch["input_ids"]).logits[:, :-1][keep] for m in (student, teacher))
    divergence = divergence_loss(z, z_teacher.detach(), "reverse", 1.5).mean()
    (0.3 * F.cross_entropy(z, batch["labels"][:, 1:][keep]) + 0.7 * 2.25 * divergence).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 0.05 * parameter.grad
    assert len(data) == 6
    assert largest_difference(student.state_dict(), weights(tmp_path, NAME)) < 1e-6
    assert largest_difference(weights(tmp_path, "full_sft_32.pth"), weights(tmp_path, NAME)) > 1e-3


def test_a_mixture_teaches_a_dense_student_and_the_other_way_round(tmp_path):
    base_weights(tmp_path, "teacher", seed=1, initializer_range=0.2, **MIXTURE)
    base_weights(tmp_path, "teacher", seed=1, initializer_range=0.2)
    more = "--from_teacher_weight teacher --teacher_hidden_size 32".split()
    train("distillation", tmp_path, *more, "--teacher_use_moe", 1)
    found = validations(tmp_path, "distillation")
    assert found[-1]["val_divergence"] < found[0]["val_divergence"]
    assert all("aux_loss" not in line for line in steps_of(tmp_path, "distillation"))
    train("distillation", tmp_path, *more, *MOE, "--divergence", "jsd")
    found = validations(tmp_path, "distillation")
    assert found[-1]["val_divergence"] < found[0]["val_divergence"]
    steps = steps_of(tmp_path, "distillation")
    assert all(line["aux_loss"] == pytest.approx(0.02, rel=0.5) for line in steps)


def test_a_run_on_its_own_answers_learns_what_the_teacher_thinks_of_them(tmp_path):
    """No text is learned from: the loss is T^2 times the divergence alone."""
    more = "--on_policy 1 --divergence reverse --max_gen_len 6 --log_interval 1 --learning_rate 5e-3".split()
    train("distillation", tmp_path, *more, "--val_fraction", 0, steps=12)
    steps = steps_of(tmp_path, "distillation")
    for line in steps:
        assert line["loss"] == pytest.approx(2.25 * line["divergence"], rel=1e-4)
    first, last = (sum(line["divergence"] for line in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last < 0.9 * first


def test_names_of_the_student_are_other_names_of_the_usual_flags():
    parse = train_distillation.parse_args
    flags = {"student_hidden_size": "hidden_size", "student_num_layers": "num_hidden_layers"}
    flags |= {"student_use_moe": "use_moe", "from_student_weight": "from_weight"}
    given = {"student_hidden_size": "48", "student_num_layers": "3", "student_use_moe": "1"}
    given["from_student_weight"] = "dpo"
    one, two = ({**vars(parse([*words])), "started": 0} for words in (
        [word for name, value in given.items() for word in (f"--{name}", value)],
        [word for name, value in given.items() for word in (f"--{flags[name]}", value)],
    ))  # fmt: skip
    assert one == two
    assert (one["hidden_size"], one["num_hidden_layers"], one["use_moe"]) == (48, 3, 1)
    assert one["from_weight"] == "dpo"
    plain = parse([])
    assert (plain.hidden_size, plain.num_hidden_layers, plain.use_moe) == (None, None, None)
    assert (plain.from_weight, plain.from_teacher_weight, plain.teacher_hidden_size) == ("full_sft",) * 2 + (
        768,
    )


# ----------------------------------------------------------------------------------------------------------
# Teachers that do not fit
# ----------------------------------------------------------------------------------------------------------


def test_teachers_that_are_not_there(tmp_path, capsys):
    base_weights(tmp_path, "teacher", seed=1)
    run = functools.partial(refused, capsys)
    advice = ".*--from_teacher_weight, --teacher_hidden_size"
    named = ["--from_teacher_weight", "full_sft", "--teacher_hidden_size", 64]
    line = run(
        f"full_sft_64.pth does not exist.*train_full_sft.py{advice}", train, "distillation", tmp_path, *named
    )
    assert "--from_weight none" not in line, "there is no teacher to be had from scratch"
    run(f"teacher_32_moe.pth does not exist{advice}", train, "distillation", tmp_path, "--teacher_use_moe", 1)
    given = ["--from_teacher_weight", tmp_path / "nowhere/big.pth"]
    run(f"nowhere/big.pth does not exist{advice}", train, "distillation", tmp_path, *given)
    given = ["--from_teacher_weight", tmp_path / "out/big.pth"]  # in a folder that is there
    run(f"out/big.pth does not exist{advice}", train, "distillation", tmp_path, *given)
    assert not list(tmp_path.glob("out/full_dist*")) and not list(tmp_path.glob("checkpoints/*"))


def test_teachers_that_do_not_fit(tmp_path, capsys):
    base_weights(tmp_path, "teacher", seed=1)
    run = functools.partial(refused, capsys)
    run("teacher_32.pth has 2 layers, not 3", train, "distillation", tmp_path, "--teacher_num_layers", 3)
    base_weights(tmp_path, "other", vocab_size=6500)
    other = ["--from_teacher_weight", tmp_path / "out/other_32.pth"]
    run(r"6,500 entries.*6,400 entries.*write_answers", train, "distillation", tmp_path, *other)
    path = tmp_path / "out/strange_32.pth"  # as many entries, but of another vocabulary
    checkpoint.save_weights(small_model(), path, {"tokenizer": "0123456789abcdef"})
    strange = ["--from_teacher_weight", path]
    run("strange_32.pth: the teacher's vocabulary .0123", train, "distillation", tmp_path, *strange)
    path.write_bytes(path.read_bytes()[:5000])
    run("strange_32.pth is damaged", train, "distillation", tmp_path, *strange)
    assert not list(tmp_path.glob("out/full_dist*")) and not list(tmp_path.glob("checkpoints/*"))


# ----------------------------------------------------------------------------------------------------------
# Going on
# ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch):
    """Which steps are on own answers, and what is sampled in them, are functions of the step."""
    more = ["--on_policy", 0.5, "--max_gen_len", 6, "--dropout", 0.1, "--dtype", "bfloat16"]
    asked = []
    original = train_distillation.sample_answers

    def sample_answers(model, micro_batches, step, *rest):
        asked.append(step)
        return original(model, micro_batches, step, *rest)

    monkeypatch.setattr(train_distillation, "sample_answers", sample_answers)
    train("distillation", tmp_path / "whole", *more)
    whole = asked.copy()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("distillation", tmp_path / "broken", *more)
    train("distillation", tmp_path / "broken", *more, "--from_resume", 1)
    assert asked == whole * 2 and 0 < len(whole) < 6
    assert_bit_equal(weights(tmp_path / "whole", NAME), weights(tmp_path / "broken", NAME))
    assert lines(tmp_path / "whole", "distillation") == lines(tmp_path / "broken", "distillation")


def test_another_teacher_is_refused(tmp_path, monkeypatch, capsys):
    """One of another name, and other weights under the same name."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train("distillation", tmp_path)
    path = tmp_path / "checkpoints/full_dist_32_resume.pth"
    before = path.read_bytes()
    resume = ["distillation", tmp_path, "--from_resume", 1]
    named = ["--from_teacher_weight", "full_sft", "--teacher_hidden_size", 32]
    refused(capsys, "--from_teacher_weight teacher -> full_sft", train, *resume, *named)
    refused(capsys, "--divergence forward -> jsd", train, *resume, "--divergence", "jsd")
    teacher = tmp_path / "out/teacher_32.pth"
    kept = teacher.read_bytes()
    base_weights(tmp_path, "teacher", seed=2)
    refused(capsys, "teacher.* -> ", train, *resume)
    assert path.read_bytes() == before
    teacher.write_bytes(kept)
    train(*resume)
    assert path.read_bytes() != before


def test_another_teacher_is_refused_though_its_file_says_nothing_of_itself(tmp_path, monkeypatch, capsys):
    """MiniMind's released files have no metadata, so no checksum either."""

    def write(seed):
        state = small_model().state_dict()
        state["model.norm.weight"] = torch.full((32,), 1.0 + seed)
        (tmp_path / "out").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "out/teacher_32.pth")

    write(0)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train("distillation", tmp_path)
    write(1)
    refused(capsys, "teacher.* -> ", train, "distillation", tmp_path, "--from_resume", 1)
    write(0)
    train("distillation", tmp_path, "--from_resume", 1)
