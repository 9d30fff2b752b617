"""The reward model: its loss against trl, its score against transformers, and the stage as a user runs it."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from preference_helpers import SHAPE, easy_pairs, pair, small_model
from stage_helpers import (
    ONE_STEP,
    base_weights,
    lines,
    plain_descent,
    refused,
    steps_of,
    train,
    validations,
)
from train_helpers import (
    MOE,
    assert_bit_equal,
    largest_difference,
    sft_file,
    stop_after,
    weights,
    write_lines,
)

from dataset.preferences import load_pairs
from model.model_reward import RewardModel
from trainer import checkpoint
from trainer.train_reward import bradley_terry_loss, calibration_error, reward_loss

NAME = "reward_32.pth"

# ----------------------------------------------------------------------------------------------------------
# Loss and calibration
# ----------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.0, 3.0], dtype=torch.float64)  # three chosen, three rejected


def test_the_loss_by_hand():
    """Differences 1, 0 and -4; sums 3, 0 and 2."""
    plain = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(4))]
    assert bradley_terry_loss(REWARDS).tolist() == pytest.approx(plain)
    centered = [x + 0.1 * s for x, s in zip(plain, (9, 0, 4))]
    assert bradley_terry_loss(REWARDS, 0.1).tolist() == pytest.approx(centered)


def test_the_gradient_by_hand():
    """d/d r_w = -sigmoid(r_l - r_w) + 2 c (r_w + r_l): a pair that is right by far teaches nothing more."""
    rewards = torch.tensor([1.0, 50.0, 0.0, -50.0], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(rewards, 0.1).sum().backward()
    wrong = 1 / (1 + math.e)
    assert rewards.grad.tolist() == pytest.approx([-wrong + 0.2, 0, wrong + 0.2, 0], abs=1e-12)


@pytest.mark.parametrize("center", [None, 0.01, 0.5])
def test_loss_and_gradient_are_those_of_trl(center):
    from trl.trainer.reward_trainer import RewardTrainer

    def gather(x):
        return x

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mine, theirs = (REWARDS.clone().requires_grad_() for _ in range(2))
    inputs = {"attention_mask": torch.ones(6, 1)}
    expected = RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=theirs[:, None]), inputs
    )
    loss = bradley_terry_loss(mine, center or 0.0).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs), rtol=1e-12, atol=1e-12
    )
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    assert metrics["accuracy"] == pytest.approx(1 / 3), "a tie is not right"


CALIBRATION = {
    "perfect": ([0.75, 0.75, 0.75, 0.25], 0.0),  # 75 % sure, three of four are right
    "certain": ([1.0, 1.0], 0.0),
    "overconfident": ([0.95, 0.05], 0.45),
    "always wrong": ([0.0, 0.0, 0.0], 1.0),
    "underconfident": ([0.6, 0.6], 0.4),
    "undecided": ([0.5, 0.5, 0.5], 0.0),  # half sure, and half right
    # (0.55 + 0.5) / 2 = 0.525 sure, 0.75 right; 0.9 sure, none of one right
    "two bins": ([0.55, 0.5, 0.1], (2 * 0.225 + 0.9) / 3),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_calibration_by_hand(name):
    probabilities, wanted = CALIBRATION[name]
    probabilities = torch.tensor(probabilities, dtype=torch.float64)
    assert calibration_error(probabilities) == pytest.approx(wanted, abs=1e-12)
    assert calibration_error(probabilities.flip(0)) == pytest.approx(wanted, abs=1e-12)


def test_calibration_of_one_bin_is_of_all_pairs_together():
    probabilities = torch.tensor([0.6, 0.3, 0.99, 0.2], dtype=torch.float64)
    wanted = abs((0.6 + 0.7 + 0.99 + 0.8) / 4 - 0.5)
    assert calibration_error(probabilities, bins=1) == pytest.approx(wanted)


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------


def reward_model(**more) -> RewardModel:
    """One whose score has learned something."""
    language_model = small_model(**more)
    model = RewardModel(language_model.config)
    model.model = language_model.model
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def one_by_one(model, sequences) -> torch.Tensor:
    """Without rows, padding or positions of others."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids]))[0] for ids in sequences])


def sequences_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(40, 6000, (n,), generator=draw).tolist() for n in lengths]


def test_a_fresh_score_finds_everything_worth_the_same():
    model = RewardModel(small_model().config)
    assert not model.score.weight.any()
    rewards, aux_loss = model(torch.tensor(sequences_of([9, 9])))
    assert rewards.tolist() == [0, 0] and rewards.dtype == torch.float32 and aux_loss is None


def test_the_score_is_that_of_the_last_token():
    """v . h_T; what stands before it counts through attention alone."""
    model, (ids,) = reward_model(), sequences_of([12])
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]))[0][0]
        by_hand = hidden @ model.score.weight[0]
        at = torch.tensor([3, 11, 0])
        found = model(torch.tensor([ids]), torch.arange(12)[None], at)[0]
    torch.testing.assert_close(found, by_hand[at])
    torch.testing.assert_close(one_by_one(model, [ids, ids[:4]]), by_hand[[11, 3]], rtol=1e-5, atol=1e-5)
    assert by_hand.std() > 0.1


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_rates_do_not_depend_on_padding_or_neighbours(kind):
    more = dict(use_moe=True, num_experts=3, moe_intermediate_size=32) if kind == "mixture" else {}
    model, sequences = reward_model(**more), sequences_of([5, 17, 1, 9, 30])
    alone = one_by_one(model, sequences)
    for batch_size in (1, 2, 16):
        torch.testing.assert_close(model.rate(sequences, batch_size), alone, rtol=1e-5, atol=1e-5)
    backwards = model.rate(sequences[::-1], 3).flip(0)
    torch.testing.assert_close(backwards, alone, rtol=1e-5, atol=1e-5)
    assert alone.std() > 0.1 and not model.rate(sequences).requires_grad
    assert model.rate([]).shape == (0,)


@pytest.mark.parametrize("pack", [True, False])
def test_pairs_are_scored_as_each_answer_alone(tmp_path, pack):
    """Rows hold several answers, that must not see each other; the score stands at the end of each."""
    path = write_lines(tmp_path, "pairs.jsonl", easy_pairs(7))
    pairs, _ = load_pairs(path, checkpoint.load_tokenizer(), 64, pack=pack, num_workers=1)
    model, rows = reward_model(), [4, 0, 6, 2]
    batch = pairs.collate(rows, len(rows))
    with torch.no_grad():
        found = model(batch["input_ids"], batch["position_ids"], batch["last"])[0]
    owner = batch["sequence_ids"].flatten()
    sequences = [batch["input_ids"].flatten()[owner == i].tolist() for i in range(2 * len(rows))]
    assert all(ids[-2:][0] == 2 or ids[-1] == 2 for ids in sequences), "each ends with <|im_end|>"
    torch.testing.assert_close(found, one_by_one(model, sequences), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, model.rate(sequences), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1


def test_names_and_numbers_are_those_of_transformers():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    ours = reward_model(rms_norm_eps=1e-6)
    config = ours.config
    shape = {name: getattr(config, name) for name in (*SHAPE, "vocab_size", "intermediate_size", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    llama = LlamaForSequenceClassification(
        LlamaConfig(**shape, rms_norm_eps=1e-6, num_labels=1, pad_token_id=0, rope_parameters=rope)
    ).eval()
    llama.load_state_dict(ours.state_dict(), strict=True)
    sequences = sequences_of([7, 12])
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in sequences])
    with torch.no_grad():
        theirs = llama(ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(ours.rate(sequences), theirs, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# The loss of a micro-batch
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("pairs"), "pairs.jsonl", easy_pairs(7))
    return load_pairs(path, checkpoint.load_tokenizer(), 64, num_workers=1)[0]


def test_sums_of_a_micro_batch(pairs):
    model, batch = reward_model(), pairs.collate([1, 5, 3], 3)
    loss, sums = reward_loss(model, batch, {"loss": 12, "aux_loss": 4}, 0.1)
    chosen, rejected = model(batch["input_ids"], batch["position_ids"], batch["last"])[0].detach().chunk(2)
    wanted = (-F.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).sum().item()
    assert loss.item() == pytest.approx(wanted / 12, rel=1e-5)
    assert sums["loss"].item() == pytest.approx(wanted, rel=1e-5)
    assert sums["accuracy"] == (chosen > rejected).sum() and "aux_loss" not in sums
    assert sums["reward_chosen"].item() == pytest.approx(chosen.sum().item(), rel=1e-5)
    assert sums["reward_rejected"].item() == pytest.approx(rejected.sum().item(), rel=1e-5)


def test_a_pair_that_does_not_exist_counts_nowhere(pairs):
    """A process without a pair in the last step of an epoch has a row of nothing, and is part of sums."""
    model = reward_model()
    torch.nn.init.ones_(model.score.weight)
    loss, sums = reward_loss(model, pairs.collate([], 4), {"loss": 1, "aux_loss": 1}, 0.1)
    loss.backward()
    assert loss == 0 and all(value.detach() == 0 for value in sums.values()), sums
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), "DDP waits for them"


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    before = base_weights(folder).read_bytes()
    train("reward", folder, "--learning_rate", 3e-3, "--val_interval", 10, steps=20)
    return SimpleNamespace(folder=folder, base=before, validations=validations(folder, "reward"))


def test_before_the_first_step_all_answers_are_worth_the_same(run):
    first = run.validations[0]
    wanted = {"val_loss": math.log(2), "val_accuracy": 0, "val_margin": 0, "val_calibration_error": 0}
    assert first["step"] == 0 and {name: first[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_pairs_that_are_easy_to_tell_apart_are_told_apart(run):
    last = run.validations[-1]
    assert last["val_accuracy"] == 1 and last["val_margin"] > 0.5 and last["val_loss"] < 0.5
    assert 0 < last["val_calibration_error"] < 0.5
    steps = steps_of(run.folder, "reward")
    assert steps[-1]["loss"] < 0.5 and steps[-1]["accuracy"] == 1
    assert all(abs(x["reward_chosen"] + x["reward_rejected"]) < 2 for x in steps), "held near zero"
    assert steps[-1]["reward_chosen"] > steps[-1]["reward_rejected"] + 0.5


def test_the_base_is_left_alone_and_the_file_says_what_it_is(run):
    assert (run.folder / "out/full_sft_32.pth").read_bytes() == run.base
    state, metadata = checkpoint.read_weights(run.folder / "out" / NAME)
    assert metadata["stage"] == "reward" and metadata["parent"]["weight"] == "full_sft"
    assert state["score.weight"].shape == (1, 32) and "lm_head.weight" not in state


def test_the_saved_file_is_the_model_that_was_examined(run):
    """Loaded as any file is: by itself, strictly, and it rates held-out answers as the log says."""
    tokenizer = checkpoint.load_tokenizer()
    model, metadata = checkpoint.load_reward_model(run.folder / "out" / NAME, tokenizer)
    assert isinstance(model, RewardModel) and not model.training and metadata["step"] == 20
    assert_bit_equal(model.state_dict(), weights(run.folder, NAME))
    held_out = load_pairs(run.folder / "data.jsonl", tokenizer, 64, val_fraction=0.2, num_workers=1)[1]
    batch = held_out.collate(list(range(len(held_out))), len(held_out))
    owner = batch["sequence_ids"].flatten()
    sequences = [batch["input_ids"].flatten()[owner == i].tolist() for i in range(2 * len(held_out))]
    chosen, rejected = model.rate(sequences).double().chunk(2)
    last, p = run.validations[-1], (chosen - rejected).sigmoid()
    assert last["val_margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert last["val_loss"] == pytest.approx(-p.log().mean().item(), rel=1e-4)
    assert last["val_accuracy"] == (chosen > rejected).double().mean()
    assert last["val_calibration_error"] == pytest.approx(calibration_error(p), abs=1e-4)


def test_files_that_are_no_reward_model_are_refused_in_one_sentence(run, tmp_path):
    def refuses(pattern, load, path):
        with pytest.raises(checkpoint.CheckpointError, match=pattern) as error:
            load(path)
        assert "\n" not in str(error.value)

    refuses("full_sft_32.pth.*score.weight", checkpoint.load_reward_model, run.folder / "out/full_sft_32.pth")
    refuses("nowhere.pth does not exist", checkpoint.load_reward_model, tmp_path / "nowhere.pth")
    refuses("reward_32.pth also has score.weight", checkpoint.load_model, run.folder / "out" / NAME)
    state, metadata = checkpoint.read_weights(run.folder / "out" / NAME)
    torch.save(state, tmp_path / "bare.pth")
    refuses("bare.pth does not say which architecture", checkpoint.load_reward_model, tmp_path / "bare.pth")
    del state["model.norm.weight"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(checkpoint.CheckpointError, match="lacks model.norm.weight"):
        checkpoint.load_weights(reward_model(), tmp_path / "torn.pth")


def test_one_step_is_the_gradient_of_the_formula(tmp_path, monkeypatch):
    """The mean over the pairs of the whole step, however it is cut. From a score that is not zero, which
    would keep the gradient from the blocks: the second of two steps."""
    plain_descent(monkeypatch, 0.1)
    path = write_lines(tmp_path, "data.jsonl", easy_pairs(4))
    cut = ["--batch_size", 1, "--accumulation_steps", 4, "--center", 0.1]
    train("reward", tmp_path, *ONE_STEP, *cut, steps=2)
    data = load_pairs(path, checkpoint.load_tokenizer(), 64, num_workers=1)[0]
    language_model = checkpoint.load_model(tmp_path / "out/full_sft_32.pth")[0]
    model = RewardModel(language_model.config)
    model.model = language_model.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        batch = data.collate(list(range(4)), 4)
        owner = batch["sequence_ids"].flatten()
        rewards = [model(batch["input_ids"].flatten()[owner == i][None])[0] for i in range(8)]
        chosen, rejected = torch.cat(rewards).chunk(2)
        (-F.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert largest_difference(model.state_dict(), weights(tmp_path, NAME)) < 1e-6
    moved = {n for n, t in weights(tmp_path, NAME).items() if (t - start[n]).abs().max() > 1e-5}
    assert {"score.weight", "model.layers.0.self_attn.v_proj.weight"} <= moved


def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch):
    more = ["--dropout", 0.1, "--accumulation_steps", 2]
    train("reward", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("reward", tmp_path / "broken", *more)
    (tmp_path / "broken/out/full_sft_32.pth").write_bytes(b"another file by now")
    train("reward", tmp_path / "broken", *more, "--from_resume", 1)
    assert_bit_equal(weights(tmp_path / "whole", NAME), weights(tmp_path / "broken", NAME))
    assert lines(tmp_path / "whole", "reward") == lines(tmp_path / "broken", "reward")


def test_a_mixture_of_experts_learns_too(tmp_path):
    train("reward", tmp_path, *MOE, "--learning_rate", 3e-3, steps=10)
    found = validations(tmp_path, "reward")
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["val_loss"] < 0.69 and (tmp_path / "out/reward_32_moe.pth").exists()
    steps = steps_of(tmp_path, "reward")
    assert all(line["aux_loss"] == pytest.approx(0.02, rel=0.5) for line in steps), "a mean, not over pairs"
    model, _ = checkpoint.load_reward_model(tmp_path / "out/reward_32_moe.pth")
    assert model.config.use_moe and model.rate([[1, 2, 3]]).isfinite().all()


def test_bad_pairs_and_missing_weights_end_in_one_line(tmp_path, capsys):
    write_lines(tmp_path, "data.jsonl", [*easy_pairs(3), pair("q", "a", "a")])
    refused(capsys, r"data.jsonl:4: .*are the same answer: remove this row", train, "reward", tmp_path)
    sft_file(tmp_path).rename(tmp_path / "data.jsonl")
    refused(capsys, r"data.jsonl:1: the key \"chosen\" is missing", train, "reward", tmp_path)
    write_lines(tmp_path, "data.jsonl", easy_pairs(9))
    wide = ["--hidden_size", 64]
    refused(capsys, "full_sft_64.pth does not exist.*train_full_sft.py", train, "reward", tmp_path, *wide)
    assert not list(tmp_path.glob("out/reward*")) and not list(tmp_path.glob("checkpoints/*"))
