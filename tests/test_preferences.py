"""Preference pairs, from a line of the file to the tensors of a micro-batch."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_helpers import REPO, assistant, byte_tokenizer, chat, repo_tokenizer, user, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preference_helpers import dpo_file, easy_pairs, pair, small_model

from dataset import check_data
from dataset.lm_dataset import DataError, TextEncoder, encode_prompt, render_conversation
from dataset.preferences import load_pairs
from dataset.rows import RowError, preference

END = "<|im_end|>"
TOOLS = [{"type": "function", "function": {"name": "weather", "description": 'says "now" <|im_end|>'}}]
CALL = assistant("", tool_calls=[{"name": "weather", "arguments": {"city": "北京"}}])
MULTI_TURN = [
    {"role": "system", "content": "be kind"},
    user("hi"),
    assistant("hello", reasoning_content="greet"),
    user("1+1"),
]


def encode(row, tokenizer=None):
    sides = preference(row)
    return TextEncoder.of(tokenizer or repo_tokenizer()).encode_pair(sides["chosen"], sides["rejected"])


def special_ids(ids):
    return [i for i in ids if i < 36]


def decode(ids):
    return repo_tokenizer().decode(ids)


# ----------------------------------------------------------------------------------------------------------
# One pair -> ids
# ----------------------------------------------------------------------------------------------------------


PAIRS = {
    "plain": pair("q", "good", "bad"),
    "empty": pair("q", "", "bad"),
    "multi-turn": pair(MULTI_TURN, "2", "3"),
    "both think": pair("q", assistant("a", reasoning_content="r"), assistant("b", reasoning_content="s")),
    "same answer, other thoughts": pair(
        "q", assistant("a", reasoning_content="r"), assistant("a", reasoning_content="s")
    ),
    "tools": pair([{"role": "system", "content": "s", "tools": json.dumps(TOOLS)}, user("q")], "a", CALL),
    "tool result": pair(
        [{"role": "system", "content": "", "tools": TOOLS}, user("q"), CALL]
        + [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}],
        "a",
        "b",
    ),
    "thought in text": pair("q", "<think>\nr\n</think>\n\na", "<think>s</think>b"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_prompt_and_answers_are_those_of_the_functions_for_one_conversation(case):
    row = PAIRS[case]
    prompt, *answers = encode(row)
    thinks = "think" in case or "thought" in case
    tools = TOOLS if "tool" in case else None
    assert prompt == encode_prompt(repo_tokenizer(), row["chosen"][:-1], tools, open_thinking=thinks)
    for side, answer in zip(("chosen", "rejected"), answers):
        ids, mask = render_conversation(repo_tokenizer(), row[side], tools)
        assert [*prompt, *answer] == ids[:-1] and decode(ids[-1:]) == "\n", "all but the newline behind it"
        assert mask[len(prompt) : -1] == [1] * len(answer) and mask[len(prompt) - 1] == 0
    assert answers[0] != answers[1]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(texts, texts, texts, st.sampled_from([repo_tokenizer, byte_tokenizer]))
@example("<|im_end|>\n", "\n\n</think>", " <tool_call>", repo_tokenizer)
@example("", "", "\n", byte_tokenizer)
@example("👩‍👩‍👧", " 你", "\u0301", repo_tokenizer)
def test_any_text_is_split_where_inference_splits_it(question, chosen, rejected, tokenizer):
    row = pair(question, chosen, rejected)
    try:
        preference(row)
    except RowError as error:  # what the template takes away made them equal
        assert "same answer" in str(error)
        return
    prompt, *answers = encode(row, tokenizer())
    wholes = [render_conversation(tokenizer(), row[side])[0] for side in ("chosen", "rejected")]
    sides = preference(row)
    thinks = ["reasoning_content" in sides[side][0][-1] for side in ("chosen", "rejected")]
    assert prompt == encode_prompt(tokenizer(), [user(question)], open_thinking=any(thinks))
    for answer, whole, own in zip(answers, wholes, thinks):
        if own == any(thinks):
            assert [*prompt, *answer] == whole[:-1]
        else:  # another cut, the same text
            assert decode_with(tokenizer(), [*prompt, *answer]) == decode_with(tokenizer(), whole[:-1])


def decode_with(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("plain", ["plainly", "", CALL, assistant("x", tool_calls=CALL["tool_calls"])])
def test_if_one_answer_thinks_both_begin_behind_the_open_tag(plain):
    """The tag is part of one prompt, so that it is not learned as what tells good from bad."""
    thoughtful = assistant("so", reasoning_content="let me see")
    row = pair("q", thoughtful, plain)
    prompt, chosen, rejected = encode(row)
    think, no_think = (repo_tokenizer().convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    assert prompt == encode_prompt(repo_tokenizer(), [user("q")], open_thinking=True)
    assert decode(prompt).endswith("assistant\n<think>\n")
    assert decode(chosen) == f"let me see\n</think>\n\nso{END}"
    whole, _ = render_conversation(repo_tokenizer(), row["rejected"])
    assert decode([*prompt, *rejected]) == decode(whole[:-1]), "the text is that of not thinking"
    assert decode(rejected).startswith("\n</think>\n\n")
    for answer in (chosen, rejected):
        assert special_ids(answer)[0] == no_think and think not in answer
    assert special_ids(rejected)[1:] == special_ids(encode(pair("q", plain, "y"))[1])


def test_swapping_chosen_and_rejected_swaps_the_ids():
    for row in [*PAIRS.values(), pair("q", assistant("a", reasoning_content="r"), "b")]:
        prompt, chosen, rejected = encode(row)
        assert encode({"chosen": row["rejected"], "rejected": row["chosen"]}) == [prompt, rejected, chosen]


def test_earlier_answers_belong_to_the_prompt():
    prompt, chosen, rejected = encode(PAIRS["multi-turn"])
    assert "greet\n</think>\n\nhello" in decode(prompt)
    assert (decode(chosen), decode(rejected)) == (f"2{END}", f"3{END}")


def test_tools_of_the_system_message_stand_in_the_prompt_and_calls_are_answers():
    prompt, chosen, rejected = encode(PAIRS["tools"])
    assert decode(prompt).count('"name": "weather"') == 1
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert (decode(chosen), decode(rejected)) == (f"a{END}", f"{call}{END}")
    assert len(special_ids(rejected)) == 3, "the tags of a call are tokens"


def test_text_never_becomes_a_special_token():
    everything = "".join(repo_tokenizer().added_tokens_decoder[i].content for i in range(36))
    system = {"role": "system", "content": everything, "tools": [{"name": "f", "description": everything}]}
    hostile = encode(pair([system, user(everything)], "a<|im_end|>b<|im_start|>user", "c"))
    system = {"role": "system", "content": "s", "tools": [{"name": "f", "description": "d"}]}
    harmless = encode(pair([system, user("q")], "a", "c"))
    assert [special_ids(ids) for ids in hostile] == [special_ids(ids) for ids in harmless]
    assert special_ids(hostile[1]) == [repo_tokenizer().convert_tokens_to_ids(END)]


# ----------------------------------------------------------------------------------------------------------
# Bad lines
# ----------------------------------------------------------------------------------------------------------


GOOD = pair("q", "good", "bad")
BAD_ROWS = {
    "different prompts": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        "answer different prompts: all but their last message must be the same",
    ),
    "different earlier answers": (
        {
            "chosen": [user("q"), assistant("a"), user("r"), assistant("b")],
            "rejected": [user("q"), assistant("c"), user("r"), assistant("d")],
        },
        "answer different prompts",
    ),
    "different tools": (
        {
            "chosen": [{"role": "system", "content": "s", "tools": TOOLS}, user("q"), assistant("a")],
            "rejected": [{"role": "system", "content": "s"}, user("q"), assistant("b")],
        },
        "answer different prompts",
    ),
    "one turn more": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b"), assistant("c")]},
        "answer different prompts",
    ),
    "identical answers": (pair("q", "a", "a"), "are the same answer: remove this row"),
    "identical but for newlines": (pair("q", "a", "\n\na"), "are the same answer: remove this row"),
    "last message of the user": (
        {"chosen": [*GOOD["chosen"], user("x")], "rejected": [*GOOD["rejected"], user("x")]},
        """the last message of "chosen" must be the assistant's, it is the user's""",
    ),
    "rejected ends with the user": (
        {"chosen": GOOD["chosen"], "rejected": [*GOOD["rejected"], user("x")]},
        """the last message of "rejected" must be the assistant's""",
    ),
    "no rejected": ({"chosen": GOOD["chosen"]}, """the key "rejected" is missing; this row has 'chosen'"""),
    "no chosen": ({"rejected": GOOD["rejected"]}, 'the key "chosen" is missing'),
    "no prompt": (pair([], "a", "b"), '"chosen" has no prompt before the answer'),
    "no answers": ({"chosen": [user("q")], "rejected": [user("q")]}, '"chosen" has no assistant turn'),
    "plain texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "list of messages, this is a string"),
    "empty lists": ({"chosen": [], "rejected": []}, '"chosen" must be a non-empty list of messages'),
    "chats": (chat("q", "a"), """the key "chosen" is missing; this row has 'conversations'"""),
    "documents": ({"text": "x"}, """the key "chosen" is missing; this row has 'text'"""),
}


def write_bad(folder, bad):
    """A file whose fourth line is bad: a good one, a blank one, a good one before it, a good one behind."""
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    good = [json.dumps(row) for row in easy_pairs(3)]
    path = folder / "bad.jsonl"
    path.write_text("\n".join([good[0], "", good[1], bad, good[2]]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("case", [*BAD_ROWS, "broken json", "not an object"])
def test_a_bad_line_is_named_in_one_sentence_by_training_and_by_the_doctor(tmp_path, case, capsys):
    texts = {
        "broken json": ('{"chosen": [', "not JSON"),
        "not an object": ("[1]", "a JSON object is expected"),
    }
    row, expected = (BAD_ROWS | texts)[case]
    path = write_bad(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_pairs(path, repo_tokenizer(), 64)
    message = str(caught.value)
    assert message.startswith(f"{path}:4: ") and expected in message and "\n" not in message
    assert "check_data.py FILE` lists every bad line" in message

    arguments = [str(path), "--format", "dpo", "--json", "-", "--no_tokens"]
    assert check_data.main(check_data.parse_args(arguments)) == 1
    report = json.loads(capsys.readouterr().out)
    assert [error["line"] for error in report["errors"]] == [4] and report["bad_rows"] == 1
    assert expected in report["errors"][0]["message"]


def test_the_doctor_lists_every_bad_row_of_a_file_of_pairs(tmp_path):
    """As a user types it: no format given, exit code 1."""
    path = write_jsonl(tmp_path / "bad.jsonl", [GOOD, *(row for row, _ in BAD_ROWS.values())])
    done = subprocess.run(
        [sys.executable, REPO / "dataset/check_data.py", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and f"format dpo, {len(BAD_ROWS) + 1} rows" in done.stdout
    listed = re.findall(r"bad\.jsonl:(\d+): ", done.stdout)
    assert [int(line) for line in listed] == list(range(2, len(BAD_ROWS) + 2))


def test_the_doctor_counts_the_tokens_that_training_will_see(tmp_path, capsys):
    """Also at the limit: a pair that just fits is not reported as too long."""
    rows = [pair(MULTI_TURN, "a " * n, "b") for n in range(1, 30, 3)]
    rows += [pair("q", assistant("a", reasoning_content="r"), "b"), PAIRS["tools"]]
    path = dpo_file(tmp_path, rows)
    pairs = load_pairs(path, repo_tokenizer(), 512)[0]
    limit = int(np.sort(pairs.lengths.max(1))[-4])
    check_data.main(check_data.parse_args([str(path), "--json", "-", "--max_seq_len", str(limit)]))
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"]["total"] == pairs.lengths.sum()
    assert report["tokens"]["targets"] == pairs.answers.sum()
    assert report["at_max_seq_len"]["longer"] == (pairs.lengths > limit).sum()


def test_pairs_longer_than_the_limit_are_left_out_and_counted(tmp_path):
    """Both sides must fit: an answer without its end would be compared with a whole one."""
    rows = [
        pair(f"q{n}", *answers) for n, answers in enumerate([("a", "b"), ("a " * 99, "b"), ("a", "b " * 99)])
    ]
    path = dpo_file(tmp_path, [*rows, pair("q3", "a " * 99, "b " * 99)])
    whole = load_pairs(path, repo_tokenizer(), 512)[0]
    assert len(whole) == 4 and whole.dropped == 0 and "left out" not in whole.summary()
    limit = int(whole.lengths[0].max())
    train, val = load_pairs(path, repo_tokenizer(), limit)  # exactly as long as the limit is not longer
    assert len(train) == 1 and train.dropped == 3 and val is None
    assert re.search(
        rf"^1 pairs, .*; 3 pairs longer than {limit} tokens left out .*--max_seq_len", train.summary()
    )
    with pytest.raises(DataError) as caught:
        load_pairs(path, repo_tokenizer(), limit - 1)
    message = str(caught.value)
    assert message.startswith(f"{path}: no pair fits into --max_seq_len {limit - 1} (all 4 are longer)")
    assert message.endswith("raise it") and "\n" not in message


# ----------------------------------------------------------------------------------------------------------
# Pairs -> a micro-batch
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    dpo_file(
        path, [*easy_pairs(20), PAIRS["multi-turn"], pair("q", assistant("a", reasoning_content="r"), "b")]
    )
    return path


def load(folder, max_seq_len=128, **more):
    return load_pairs(folder / "dpo.jsonl", repo_tokenizer(), max_seq_len, **more)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "dpo.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("chosen_rows", [[0], [20, 3, 21, 7, 3], list(range(22))])
def test_a_micro_batch_holds_every_sequence_whole_and_says_where(folder, pack, chosen_rows):
    pairs = load(folder, pack=pack)[0]
    batch = pairs.collate(chosen_rows, len(chosen_rows))
    encoded = [encode(row) for row in (rows_of(folder)[i] for i in chosen_rows)]
    prompts = [prompt for prompt, _, _ in encoded] * 2
    answers = [chosen for _, chosen, _ in encoded] + [rejected for _, _, rejected in encoded]
    ids, labels, positions, owner = (
        batch[name].flatten() for name in ("input_ids", "labels", "position_ids", "sequence_ids")
    )
    assert {batch[name].dtype for name in batch} == {torch.int64}
    assert batch["sequence_ids"].shape == batch["input_ids"].shape == batch["labels"].shape
    for number, (prompt, answer) in enumerate(zip(prompts, answers)):
        places = (owner == number).nonzero().flatten()
        assert ids[places].tolist() == [*prompt, *answer]
        assert positions[places].tolist() == list(range(len(places)))
        assert places.tolist() == list(range(int(places[0]), int(places[0]) + len(places))), "in one stretch"
        is_target = labels[places] != -100
        assert ids[places][is_target].tolist() == labels[places][is_target].tolist() == answer
        assert decode(answer).endswith(END)
        assert batch["answers"][number] == len(answer)
        assert batch["last"][number] == places[-1] and decode(ids[places[-1]].view(1)) == END
    padding = owner == -1
    assert (ids[padding] == pairs.pad_id).all() and (labels[padding] == -100).all()
    assert padding.sum() + sum(map(len, prompts + answers)) == ids.numel()
    assert batch["input_ids"].shape[1] <= pairs.max_seq_len
    if not pack:
        assert len(batch["input_ids"]) == 2 * len(chosen_rows)
    elif len(chosen_rows) > 5:
        assert padding.float().mean() < 0.1 and len(batch["input_ids"]) < 2 * len(chosen_rows)


def sequence_logprobs(model, batch):
    """Straight from the logits, one sequence at a time."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    logps = logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    logps = logps.gather(2, targets.clamp(min=0)[..., None]).squeeze(2) * (targets != -100)
    owner = batch["sequence_ids"][:, 1:]
    return torch.stack([logps[owner == number].sum() for number in range(len(batch["last"]))])


def test_packing_does_not_change_the_probability_of_an_answer(folder):
    from trainer.train_dpo import answer_logprobs

    model, rows = small_model(), [0, 20, 5, 21, 9]
    packed, plain = (load(folder, pack=pack)[0].collate(rows, 5) for pack in (True, False))
    with torch.no_grad():
        wanted = sequence_logprobs(model, plain)
        for batch in (packed, plain):
            found = answer_logprobs(model, batch, model.lm_head.weight)[0]
            torch.testing.assert_close(found / batch["answers"], wanted / batch["answers"], rtol=0, atol=1e-5)
            torch.testing.assert_close(sequence_logprobs(model, batch), wanted, rtol=1e-6, atol=1e-5)
        leaking = packed | {"position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
        leaked = answer_logprobs(model, leaking, model.lm_head.weight)[0]
    assert (leaked - wanted).abs().max() > 1e-2, "this model would notice if sequences saw each other"


def test_reference_values_travel_with_their_pairs(folder):
    pairs = load(folder)[0]
    pairs.reference = torch.arange(44.0)
    batch = pairs.collate([3, 0, 21], 3)
    assert batch["reference"].tolist() == [3, 0, 21, 25, 22, 43]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_a_micro_batch_without_pairs_has_no_loss_but_a_gradient(folder, moe, loss_type):
    """A process without a pair must meet the others in the backward pass, and must add nothing."""
    import functools

    from trainer.train_dpo import diagnostics, dpo_loss, preference_loss

    pairs = load(folder)[0]
    pairs.reference = -torch.arange(44.0)
    batch = pairs.collate([], 4)
    assert (batch["labels"] == -100).all() and batch["answers"].tolist() == [0, 0]
    assert batch["reference"].tolist() == [0, 0] and pairs.reference[0] == 0 and pairs.reference[1] == -1
    model = small_model(use_moe=moe, router_aux_loss_coef=0.0, tie_word_embeddings=False)
    pair_loss = functools.partial(preference_loss, beta=0.1, loss_type=loss_type)
    totals = {"loss": 3, "chosen_tokens": 20, "aux_loss": 2}
    head = model.lm_head.weight
    figures = functools.partial(diagnostics, beta=0.1)
    loss, sums = dpo_loss(model, batch, totals, head, pair_loss, figures, sft_weight=0.5)
    assert loss.detach() == 0 and all(value.detach() == 0 for value in sums.values())
    loss.backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "lm_head.weight" in reached and "model.embed_tokens.weight" in reached
    assert all((grad == 0).all() for grad in reached.values())
    if not moe:  # experts that no token visits have none in any batch
        assert reached.keys() == dict(model.named_parameters()).keys()


def test_thinned_keeps_whole_pairs(folder):
    pairs = load(folder)[0]
    assert pairs.thinned(22) is pairs and pairs.thinned(99) is pairs
    few = pairs.thinned(4)
    assert len(few) == 4 and len(pairs.thinned(0)) == 1 and few.num_targets == few.answers.sum()
    for mine, theirs in zip(range(4), (0, 7, 14, 21)):
        for (name, a), b in zip(few.collate([mine], 1).items(), pairs.collate([theirs], 1).values()):
            assert a.equal(b), name


def questions(pairs):
    found = set()
    for row in range(len(pairs)):
        text = decode(pairs.collate([row], 1)["input_ids"][0])
        found.add(re.search(r"question \d+", text)[0])
    return found


def test_the_held_out_share_is_of_questions(tmp_path):
    """Several pairs of one question, and one with another system prompt, lie on the same side."""
    rows = [pair(f"question {n}", f"good {k}", f"bad {k}") for k in range(3) for n in range(30)]
    rows += [
        pair([{"role": "system", "content": "be kind"}, user(f"question {n}")], "a", "b") for n in range(30)
    ]
    path = dpo_file(tmp_path, rows)
    train, val = load_pairs(path, repo_tokenizer(), 64, val_fraction=0.3)
    assert len(train) + len(val) == 120 and len(val) % 4 == 0
    assert questions(train) | questions(val) == {f"question {n}" for n in range(30)}
    assert not questions(train) & questions(val) and 0 < len(questions(val)) < 20
    again = load_pairs(dpo_file(tmp_path, rows[::-1], "b.jsonl"), repo_tokenizer(), 64, val_fraction=0.3)[1]
    assert questions(again) == questions(val), "whatever the order of the file"


def test_the_fingerprint_is_of_content_and_of_what_is_kept(tmp_path):
    rows = easy_pairs(10)
    prints = [load_pairs(dpo_file(tmp_path, rows), repo_tokenizer(), 64)[0].fingerprint()]
    elsewhere = dpo_file(tmp_path / "other", rows, "name.jsonl")
    assert load_pairs(elsewhere, repo_tokenizer(), 64)[0].fingerprint() == prints[0]
    prints += [load_pairs(elsewhere, repo_tokenizer(), 65)[0].fingerprint()]
    prints += [load_pairs(elsewhere, repo_tokenizer(), 64, val_fraction=0.3)[0].fingerprint()]
    swapped = [*rows[:-1], {"chosen": rows[-1]["rejected"], "rejected": rows[-1]["chosen"]}]
    other = [*rows[:-1], pair("q", "a", "b")]
    alike = [pair("a", "b", "c")] * 3, [pair("a", "c", "b")] * 3  # as long as each other
    for content in (swapped, other, rows[:-1], rows[::-1], *alike):
        prints += [load_pairs(dpo_file(tmp_path, content), repo_tokenizer(), 64)[0].fingerprint()]
    assert len(set(prints)) == len(prints)


def test_several_files_are_one_data_set(tmp_path):
    first, second = dpo_file(tmp_path, easy_pairs(5)), dpo_file(tmp_path, easy_pairs(7, seed=1), "b.jsonl")
    both = load_pairs(f"{first}, {second}", repo_tokenizer(), 64)[0]
    alone = [load_pairs(path, repo_tokenizer(), 64)[0] for path in (first, second)]
    assert len(both) == 12
    for row, (pairs, number) in {2: (alone[0], 2), 5: (alone[1], 0), 11: (alone[1], 6)}.items():
        wanted = pairs.collate([number], 1)
        assert all(tensor.equal(wanted[name]) for name, tensor in both.collate([row], 1).items())
