"""Reasoning distillation: which tokens weigh more, the weighted loss, and the stage as a user runs it."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_helpers import small_model
from stage_helpers import (
    ONE_STEP,
    base_weights,
    chat_rows,
    lines,
    plain_descent,
    reason_rows,
    refused,
    steps_of,
    train,
    validations,
    with_thoughts,
)
from train_helpers import MOE, assert_bit_equal, largest_difference, stop_after, weights, write_lines

from dataset.lm_dataset import TextEncoder, load_sft
from trainer import checkpoint, logprobs
from trainer.train_reason import reason_loss, tag_weights, weighted_token_loss

NAME = "reason_32.pth"
TAG_NAMES = (b"<think>", b"</think>", b"<answer>", b"</answer>")


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.of(checkpoint.load_tokenizer())


@pytest.fixture(scope="module")
def texts(encoder):
    return encoder.token_texts()


# ----------------------------------------------------------------------------------------------------------
# Weights of tokens
# ----------------------------------------------------------------------------------------------------------


def weigh(*pieces):
    """pieces: bytes that the assistant writes, or text (str) that it does not. Tags count 10."""
    texts = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    return tag_weights(texts, [isinstance(piece, bytes) for piece in pieces], 10.0)


def test_a_tag_that_is_one_token():
    assert weigh("<think>\n", b"so", b"\n", b"</think>", b"\n\n", b"5", b"<|im_end|>") == [
        0,
        1,
        1,
        10,
        1,
        1,
        1,
    ]


def test_a_tag_of_several_tokens_the_last_of_which_holds_more():
    opening = b"<", b"ans", b"wer", b">\n"
    closing = b"</", b"ans", b"wer", b">"
    found = weigh("user", *opening, b"5", b"\n", *closing, b"<|im_end|>")
    assert found == [0, 10, 10, 10, 10, 1, 1, 10, 10, 10, 10, 1]
    assert weigh(b"a</think><", b"answer>b") == [10, 10], "two tags share a token"


def test_tags_of_others_have_no_weight():
    """Neither a whole one in a question, nor one that a question begins and an answer ends."""
    assert weigh("<answer>", "<think>", b"x", "</answer>") == [0, 0, 1, 0]
    assert weigh("<think", b">", b"x", b"</thi", "nk>") == [0, 1, 1, 1, 0]
    assert weigh("<think>", "x", "</think>") == [0, 0, 0]
    assert weigh() == []


def test_pieces_that_a_tag_shares_with_other_words():
    assert weigh(b"ans", b"wer", b"ing", b" the", b" answer", b"<", b"b", b">") == [1] * 8
    assert weigh(b"<", b"ans", b"wer", b"s", b">", b"< answer>", b"</ans", b">", b"th", b"ink") == [1] * 10
    assert weigh(b"<", b"answer>", b"<", b"answer") == [10, 10, 1, 1], "the second tag never ends"


def test_two_answers_in_one_row_do_not_join():
    """Packed one behind the other: what begins in the first must not end in the second, and places are
    counted from the start of each."""
    row = weigh(b"hi", b"</thi", "q", b"nk>", b"ok", b"</", b"think>", b"1", "", "")
    assert row == [1, 1, 0, 1, 1, 10, 10, 1, 0, 0]


def test_tags_need_not_be_in_pairs():
    """Each is weighted for itself; an answer that is cut short must not lose what it has."""
    assert weigh(b"</think>", b"a", b"</think>", b"<answer>", b"<answer>", b"b") == [10, 1, 10, 10, 10, 1]
    assert weigh(b"</answer>", b"<think>", b"x") == [10, 10, 1]


def test_places_are_counted_in_bytes():
    """A character of three bytes before a tag, and one that is cut into two tokens."""
    assert weigh("天".encode(), b"<ans", b"wer>", "天".encode()[:1], "天".encode()[1:]) == [1, 10, 10, 1, 1]


PIECES = st.sampled_from([*TAG_NAMES, b"<", b">", b"</", b"answer", b"think", b"x", b"\n", "天".encode()])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PIECES, max_size=12).map(b"".join),
    st.lists(st.integers(0, 60), max_size=20),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 3.0, 10.0]),
)
def test_weights_of_any_row(text, cuts, mask, tag_weight):
    """However a text is cut into tokens, and whoever writes which of them."""
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    texts = [text[a:b] for a, b in zip(cuts, cuts[1:])]
    is_target = [bool(mask >> (i % 32) & 1) or i % 5 == 0 for i in range(len(texts))]
    found = tag_weights(texts, is_target, tag_weight)
    assert len(found) == len(texts)
    for weight, target in zip(found, is_target):
        assert weight in ((1.0, tag_weight) if target else (0.0,))
    # Slowly: look at every place of every stretch of targets for every tag.
    owner = [i for i, piece in enumerate(texts) for _ in piece]
    ends = {(i, i + 1) for i in range(len(texts)) if is_target[i]}
    wanted = [float(target) for target in is_target]
    for tag in TAG_NAMES:
        for start in range(len(text)):
            tokens = sorted(set(owner[start : start + len(tag)]))
            if text[start : start + len(tag)] == tag and all((i, i + 1) in ends for i in tokens):
                for i in tokens:
                    wanted[i] = tag_weight
    assert found == wanted


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_texts_of_tokens_join_to_the_text(encoder, texts, text):
    ids = encoder.plain.encode(text, add_special_tokens=False).ids
    assert b"".join(texts[i] for i in ids) == text.encode()


def test_special_tokens_have_the_text_of_their_name(encoder, texts):
    assert len(texts) == encoder.vocab_size
    assert texts[encoder.eos] == b"<|im_end|>" and texts[encoder.special_ids["</think>"]] == b"</think>"
    lengths = encoder.token_bytes()
    ordinary = set(range(len(texts))) - set(encoder.special_ids.values())
    assert all(len(texts[i]) == lengths[i] for i in ordinary)


# ----------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Two entries, logits (0, ln 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0, math.log(3)]] * 3, dtype=torch.float64)
    targets, by_hand = torch.tensor([0, 1, 1]), torch.tensor([1.0, 10.0, 1.0])
    loss, figures = weighted_token_loss(logits, targets, by_hand)
    assert loss.item() == pytest.approx(math.log(4) + 11 * math.log(4 / 3))
    assert figures.tolist() == pytest.approx([math.log(4) + 2 * math.log(4 / 3)])
    assert not figures.requires_grad


def micro_batch():
    """Two rows of packed conversations, the second with padding; weights as the stage gives them."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(40, 6000, (2, 24), generator=draw)
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(14)]), torch.arange(24)])
    answers = torch.zeros(2, 24, dtype=torch.bool)
    answers[0, 3:9], answers[0, 15:24], answers[1, 5:20] = True, True, True
    factors = torch.where(torch.rand(2, 24, generator=draw) < 0.3, 10.0, 1.0)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~answers, -100),
        "position_ids": positions,
        "loss_weights": factors * answers,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_the_formula_on_full_logits(monkeypatch, tied):
    """sum of w CE / sum of w, over the next tokens; in chunks whose borders fall inside an answer."""
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 7)
    model, batch = small_model(tie_word_embeddings=tied), micro_batch()
    total = float(batch["loss_weights"].sum())
    loss, sums = reason_loss(model, batch, {"loss": total, "token_loss": 30}, model.lm_head.weight)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100)
    wanted = (batch["loss_weights"][:, 1:].flatten() * losses).sum() / total
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert sums["token_loss"].item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx(wanted.item() * total, rel=1e-5)


def test_weights_of_one_make_it_fine_tuning():
    from trainer.train_pretrain import next_token_loss

    model, batch = small_model(), micro_batch()
    batch["loss_weights"] = (batch["labels"] != -100).float()
    totals = {"loss": 30, "token_loss": 30, "aux_loss": 1}
    loss, sums = reason_loss(model, batch, totals, model.lm_head.weight)
    del batch["loss_weights"]
    assert loss.item() == pytest.approx(next_token_loss(model, batch, totals)[0].item(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx(sums["token_loss"].item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def targets_of(path, texts):
    """Of every row of a file: its text before the first target, and the text of its targets."""
    data, _ = load_sft(path, checkpoint.load_tokenizer(), 128, num_workers=1, pack=False)
    found = []
    for row in range(len(data)):
        ids, labels = (data[row][name].tolist() for name in ("input_ids", "labels"))
        first = next(i for i, label in enumerate(labels) if label != -100)
        answer = b"".join(texts[i] for i in labels if i != -100).decode()
        found.append((b"".join(texts[i] for i in ids[:first]).decode(), answer))
    return found


def test_both_layouts_give_the_same_targets(tmp_path, texts):
    """Thoughts are targets; <think> itself is the end of the prompt, open, or without thoughts closed."""
    question = {"role": "user", "content": "what is <answer>?"}
    answer, thoughts = "<answer>\n2 天\n</answer>", "one and one\nis two"
    messages = [with_thoughts(answer, thoughts, layout) for layout in ("beside", "inside")]
    messages.append({"role": "assistant", "content": "2 天"})
    path = write_lines(tmp_path, "data.jsonl", [{"conversations": [question, m]} for m in messages])
    beside, inside, without = targets_of(path, texts)
    assert beside == inside
    begin = "<|im_start|>user\nwhat is <answer>?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert beside == (begin, f"{thoughts}\n</think>\n\n{answer}<|im_end|>")
    assert without == (f"{begin}\n</think>\n\n", "2 天<|im_end|>")


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    before = base_weights(folder).read_bytes()
    tax = write_lines(folder, "tax.jsonl", chat_rows(10, seed=5))
    train("reason", folder, "--tax_path", tax, steps=12)
    return SimpleNamespace(folder=folder, base=before)


def test_the_log_has_both_losses_and_what_the_stage_cost(run):
    found = validations(run.folder, "reason")
    assert [line["step"] for line in found] == [0, 4, 8, 12]
    assert all({"val_loss", "val_bpb", "tax_loss"} <= line.keys() for line in found)
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.1
    assert found[-1]["tax_loss"] != found[0]["tax_loss"]
    steps = steps_of(run.folder, "reason")
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["token_loss"] < steps[0]["token_loss"]
    assert all(line["loss"] != line["token_loss"] for line in steps)


def test_held_out_losses_are_unweighted_and_those_of_the_weights(run):
    """Comparable with fine-tuning's: --tag_weight is no part of them."""
    model = checkpoint.load_model(run.folder / "out/full_sft_32.pth")[0]
    tokenizer = checkpoint.load_tokenizer()
    held_out = load_sft(run.folder / "data.jsonl", tokenizer, 64, val_fraction=0.2, num_workers=1)[1]
    earlier = load_sft(run.folder / "tax.jsonl", tokenizer, 64, num_workers=1)[0]
    first = validations(run.folder, "reason")[0]
    for name, data in {"val_loss": held_out, "tax_loss": earlier}.items():
        with torch.no_grad():
            loss = model(**data.batch(list(range(len(data)))), return_logits=False).loss
        assert first[name] == pytest.approx(loss.item(), rel=1e-4), name


def test_the_base_is_left_alone_and_the_file_says_where_it_comes_from(run):
    assert (run.folder / "out/full_sft_32.pth").read_bytes() == run.base
    metadata = checkpoint.read_weights(run.folder / "out" / NAME)[1]
    assert metadata["stage"] == "reason" and metadata["parent"]["weight"] == "full_sft"


def slow_weights(pieces, tag_weight):
    """Weights of the tokens of one answer: every byte of its text is asked whether it is part of a tag."""
    text, heavy = b"".join(pieces), set()
    for tag in TAG_NAMES:
        for start in range(len(text)):
            if text[start:].startswith(tag):
                heavy |= set(range(start, start + len(tag)))
    found, place = [], 0
    for piece in pieces:
        found.append(tag_weight if heavy & set(range(place, place + len(piece))) else 1)
        place += len(piece)
    return found


@pytest.mark.parametrize("tag_weight", [1, 10])
def test_one_step_is_the_gradient_of_the_formula(tmp_path, monkeypatch, texts, tag_weight):
    plain_descent(monkeypatch, 0.05)
    path = write_lines(tmp_path, "data.jsonl", reason_rows(6))
    more = [*ONE_STEP, "--pack", 0, "--batch_size", 6, "--tag_weight", tag_weight]
    train("reason", tmp_path, *more, steps=1)
    model = checkpoint.load_model(tmp_path / "out/full_sft_32.pth")[0]
    data = load_sft(path, checkpoint.load_tokenizer(), 64, num_workers=1, pack=False)[0]
    total, count = 0.0, 0.0
    assert len(data) == 6
    for row in range(len(data)):
        ids, labels = (data[row][name] for name in ("input_ids", "labels"))
        answer = (labels != -100).nonzero().flatten()
        factors = torch.tensor(slow_weights([texts[i] for i in labels[answer]], tag_weight))
        logps = model(ids[None]).logits[0].log_softmax(-1)
        total = total - (factors * logps[answer - 1, labels[answer]]).sum()
        count += factors.sum()
    (total / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    assert largest_difference(model.state_dict(), weights(tmp_path, NAME)) < 1e-6
    assert largest_difference(weights(tmp_path, "full_sft_32.pth"), weights(tmp_path, NAME)) > 1e-3


def test_the_denominator_is_the_weight_of_the_whole_step(tmp_path, monkeypatch):
    """Steps of 8 rows, whole or in parts that weigh differently; the last of the epoch is smaller."""
    plain_descent(monkeypatch, 0.05)
    for batch_size, accumulation, name in ((8, 1, "whole"), (4, 2, "halves"), (1, 8, "single")):
        write_lines(tmp_path / name, "data.jsonl", reason_rows(19))
        cut = ["--batch_size", batch_size, "--accumulation_steps", accumulation, "--max_steps", 0]
        train("reason", tmp_path / name, *ONE_STEP, *cut, "--pack", 0, "--log_interval", 1)
    start, whole = (weights(tmp_path / "whole", name) for name in ("full_sft_32.pth", NAME))
    assert largest_difference(start, whole) > 1e-3
    assert [line["step"] for line in lines(tmp_path / "whole", "reason")] == [1, 2, 3], "8 + 8 + 3"
    for name in ("halves", "single"):
        assert largest_difference(whole, weights(tmp_path / name, NAME)) < 1e-6
        for one, other in zip(
            lines(tmp_path / "whole", "reason"), lines(tmp_path / name, "reason"), strict=True
        ):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_it_starts_from_preference_learning_or_else_from_fine_tuning(tmp_path, capsys):
    base_weights(tmp_path, "dpo", seed=3)
    train("reason", tmp_path, "--val_fraction", 0, steps=1)
    parent = checkpoint.read_weights(tmp_path / "out" / NAME)[1]["parent"]
    dpo = checkpoint.read_weights(tmp_path / "out/dpo_32.pth")[1]
    assert (parent["weight"], parent["crc32"]) == ("dpo", dpo["crc32"])
    (tmp_path / "out/dpo_32.pth").rename(tmp_path / "out/dpo_64.pth")  # of another width: no candidate
    train("reason", tmp_path, "--val_fraction", 0, steps=1)
    assert checkpoint.read_weights(tmp_path / "out" / NAME)[1]["parent"]["weight"] == "full_sft"
    wide = ["--hidden_size", 48]
    refused(capsys, "full_sft_48.pth does not exist.*train_full_sft.py", train, "reason", tmp_path, *wide)


def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch):
    """Although a file that --from_weight auto would prefer has come in the meantime."""
    more = ["--dropout", 0.1, "--accumulation_steps", 2]
    train("reason", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train("reason", tmp_path / "broken", *more)
    base_weights(tmp_path / "broken", "dpo", seed=3)
    train("reason", tmp_path / "broken", *more, "--from_resume", 1)
    assert_bit_equal(weights(tmp_path / "whole", NAME), weights(tmp_path / "broken", NAME))
    assert lines(tmp_path / "whole", "reason") == lines(tmp_path / "broken", "reason")
    parent = checkpoint.read_weights(tmp_path / "broken/out" / NAME)[1]["parent"]
    assert parent["weight"] == "full_sft"


def test_another_tag_weight_is_another_run(run, capsys):
    more = ["--tax_path", run.folder / "tax.jsonl", "--from_resume", 1, "--tag_weight", 3]
    refused(capsys, "--tag_weight 10.0 -> 3.0", train, "reason", run.folder, *more, steps=12)


def test_a_mixture_of_experts_learns_too(tmp_path):
    train("reason", tmp_path, *MOE)
    found = validations(tmp_path, "reason")
    assert found[-1]["val_loss"] < found[0]["val_loss"]
    steps = steps_of(tmp_path, "reason")
    assert all(line["aux_loss"] == pytest.approx(0.02, rel=0.5) for line in steps), "a mean, not over tokens"
    assert (tmp_path / "out/reason_32_moe.pth").exists()
