"""Prompts for reinforcement learning: what the model is asked, and what a right answer must say if that is
known.

    train, val = load_prompts("dataset/rlaif.jsonl", tokenizer, max_seq_len=512)
    prompt = train[7]                       # Prompt: messages, tools, expected
    ids = train.ids(7, open_thinking=False) # up to and including the generation prompt

Rows are {"conversations": [..., user, placeholder]}; where an answer can be checked, with "answer" (a value)
or "gt" (a list of values that must all be said).
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from dataset import packing
from dataset.lm_dataset import IGNORE, DataError, TextEncoder, encode_prompt
from dataset.rows import iter_rows


@dataclass(frozen=True)
class Prompt:
    messages: list
    tools: list | None
    expected: list[str] | None  # values a right answer states, all of them; None = nobody knows

    @property
    def question(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


class PromptDataset:
    """Prompts that fit into max_seq_len tokens; `dropped` counts those that do not."""

    unit, num_bytes, num_targets = "prompts", 0, 0

    def __init__(self, prompts, ids, tokenizer, max_seq_len, dropped=0):
        self.prompts, self.encoded, self.tokenizer = prompts, ids, tokenizer
        self.max_seq_len, self.dropped = max_seq_len, dropped
        self.pad_id = TextEncoder.of(tokenizer).pad
        self.tokens_per_row = float(np.mean([len(i) for i in ids])) if ids else 0.0

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, row) -> Prompt:
        return self.prompts[row]

    def ids(self, row, open_thinking=False) -> list[int]:
        """The tokens after which the model writes; open_thinking: behind an open <think>."""
        return self.thinking_ids(row) if open_thinking else self.encoded[row]

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (a data set lives as long as its run)
    def thinking_ids(self, row):
        prompt = self.prompts[row]
        return encode_prompt(self.tokenizer, prompt.messages, prompt.tools, True)

    @property
    def verifiable(self) -> bool:
        """Whether every answer can be checked."""
        return bool(self.prompts) and all(prompt.expected is not None for prompt in self.prompts)

    def collate(self, rows, size):
        """The prompts as a batch of texts, int64 (B, T): input_ids, labels, position_ids. Nothing of it is
        trained on; it tells the loop which rows a step has, and a compiler what a batch looks like."""
        import torch

        texts = [self.encoded[row] for row in rows] or [[self.pad_id] * 2]
        width = -(-max(map(len, texts)) // 32) * 32
        input_ids = torch.full((len(texts), width), self.pad_id)
        labels = torch.full((len(texts), width), IGNORE)
        for i, text in enumerate(texts):
            input_ids[i, : len(text)] = torch.tensor(text)
            labels[i, 1 : len(text)] = torch.tensor(text[1:])
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.arange(width).repeat(len(texts), 1),
        }

    def thinned(self, num_rows):
        """Evenly spaced prompts only, at most `num_rows` of them and at least one."""
        if num_rows >= len(self):
            return self
        rows = np.linspace(0, len(self) - 1, max(1, num_rows)).round().astype(int)
        return self.part(rows, self.dropped)

    def part(self, rows, dropped):
        prompts, ids = [self.prompts[r] for r in rows], [self.encoded[r] for r in rows]
        return PromptDataset(prompts, ids, self.tokenizer, self.max_seq_len, dropped)

    def fingerprint(self):
        """Hash of prompts and expected answers."""
        digest = hashlib.sha256(repr(self.max_seq_len).encode())
        for prompt, ids in zip(self.prompts, self.encoded):
            digest.update(np.array(ids, np.int32).tobytes() + repr(prompt.expected).encode())
        return digest.hexdigest()[:16]

    def summary(self):
        checkable = sum(prompt.expected is not None for prompt in self.prompts)
        line = f"{len(self):,} prompts of {self.tokens_per_row:.0f} tokens on average, {checkable:,} with a "
        line += "known answer"
        if self.dropped:
            line += f"; {self.dropped:,} longer than {self.max_seq_len} tokens left out"
            line += " (raise --max_seq_len to keep them)"
        return line


def load_prompts(path, tokenizer, max_seq_len, *, kind="rlaif", val_fraction=0.0):
    """`(train, val)` PromptDatasets; val is None when val_fraction is 0. kind "agent" wants "gt" in every
    row.

    `path`: one file, or several separated by commas. A prompt longer than max_seq_len is left out and
    counted: cut at its end it would ask nothing, cut at its beginning it would miss its tools. The held-out
    share is chosen by a hash of the tokens. Raises DataError naming file and line.
    """
    prompts = []
    names = [name.strip() for name in str(path).split(",") if name.strip()]
    for name in names:
        for _, row in iter_rows(name, kind):
            messages, tools = row["conversations"]
            prompts.append(Prompt(messages, tools, row.get("gt")))
    ids = encode_prompts(tokenizer, prompts)
    everything = PromptDataset(prompts, ids, tokenizer, max_seq_len)
    lengths = np.array([len(i) for i in ids])
    fits = lengths <= max_seq_len
    if not fits.any():
        raise DataError(
            f"{', '.join(names)}: no prompt fits into --max_seq_len {max_seq_len} (all {len(fits):,} are "
            "longer): raise it"
        )
    hashes = [hashlib.blake2b(np.array(i, np.int32).tobytes(), digest_size=8).digest() for i in ids]
    hashes = np.array([int.from_bytes(h, "little") for h in hashes], np.uint64)
    held_out = packing.held_out(hashes, val_fraction)
    train, val = (
        everything.part(np.flatnonzero(fits & side), int((~fits & side).sum()))
        for side in (~held_out, held_out)
    )
    return train, val if val_fraction else None


def encode_prompts(tokenizer, prompts) -> list[list[int]]:
    """Ids of every prompt up to and including the generation prompt, all texts encoded together."""
    encoder = TextEncoder.of(tokenizer)
    runs_of_each = [[run for run, _ in encoder.runs(p.messages, p.tools, True)] for p in prompts]
    encoded = iter(encoder.encode_texts([r for runs in runs_of_each for r in runs if isinstance(r, str)]))
    return [
        [i for run in runs for i in (next(encoded) if isinstance(run, str) else [run])]
        for runs in runs_of_each
    ]


def tool_reply(tokenizer, results: list[str], open_thinking=False) -> list[int]:
    """The ids that follow an assistant's <|im_end|> when tools answered: their results, and the prompt for
    the next turn. Found by rendering a conversation with and without them, so that the template alone
    decides; what a result says can never become a special token."""
    encoder = TextEncoder.of(tokenizer)
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    after = [*before, *({"role": "tool", "content": text} for text in results)]
    start, whole = list(encoder.runs(before, None)), list(encoder.runs(after, None, True, open_thinking))
    end = max(i for i, (_, is_answer) in enumerate(start) if is_answer) + 1  # behind <|im_end|>
    if [run for run, _ in whole[:end]] != [run for run, _ in start[:end]]:
        raise DataError(
            "the chat template changes what was said before when a tool answers: it cannot be used"
        )
    runs = [run for run, _ in whole[end:]]
    encoded = iter(encoder.encode_texts([run for run in runs if isinstance(run, str)]))
    return [i for run in runs for i in (next(encoded) if isinstance(run, str) else [run])]
