"""Preference pairs -> batches: one prompt, a chosen answer and a rejected one, for DPO and the reward model.

    train, val = load_pairs("dataset/dpo.jsonl", tokenizer, max_seq_len=1024)
    batch = train.collate([0, 7, 3], size=3)

Both sides of a pair are rendered from one tokenized prompt (`TextEncoder.encode_pair`), so they share it id
by id. The sequences of a micro-batch are packed into rows as long as the longest of them: next to no padding,
and a row's sequences do not see each other.
"""

import hashlib

import numpy as np

from dataset import packing
from dataset.lm_dataset import IGNORE, DataError, PackedDataset, TextEncoder, _open_caches

ROUND = 32  # rows are as long as the longest sequence, rounded up to a multiple of this: few different shapes


class PairDataset:
    """Pairs; pair i is documents 2i (chosen) and 2i + 1 (rejected) of the cache."""

    def __init__(self, caches, pairs, max_seq_len, pad_id, pack, dropped):
        self.caches, self.max_seq_len, self.pad_id, self.pack = caches, max_seq_len, pad_id, pack
        bases = np.cumsum([0] + [cache.num_tokens for cache in caches])
        starts = np.concatenate([c.offsets[:-1] + base for c, base in zip(caches, bases)])
        lengths = np.concatenate([np.diff(cache.offsets) for cache in caches])
        answers = np.concatenate([cache.answer_ends - cache.answer_starts for cache in caches])
        self.starts = starts.reshape(-1, 2)[pairs]  # (P, 2) chosen, rejected
        self.lengths = lengths.reshape(-1, 2)[pairs].astype(np.int64)
        self.answers = answers.reshape(-1, 2)[pairs]  # (P, 2) tokens of the answers, <|im_end|> included
        self.pairs, self.dropped = pairs, dropped
        self.reference = None  # (2P,) float32, chosen, then rejected; set by DPO: log-probabilities

    def __len__(self):
        return len(self.starts)

    @property
    def tokens_per_row(self):
        """Mean tokens of a pair, both sides."""
        return float(self.lengths.sum() / max(len(self), 1))

    @property
    def num_targets(self):
        return int(self.answers.sum())

    unit, num_bytes = "pairs", 0  # bits per byte mean nothing here

    def collate(self, rows, size):
        """One micro-batch of the pairs `rows` (B of them). int64 tensors: input_ids, labels, position_ids
        (R, T); sequence_ids (R, T), the sequence a token belongs to, chosen 0 ... B-1, rejected B ... 2B-1,
        -1 for padding; last (2B,) the flat place of each sequence's last token; answers (2B,) tokens of each
        answer; with a reference, reference (2B,) float32. No rows: one without a target. `size` is ignored:
        shapes follow the sequences."""
        import torch

        chosen = np.asarray(rows or [0], np.int64)
        starts, lengths = self.starts[chosen].T.ravel(), self.lengths[chosen].T.ravel()
        width = min(-(-int(lengths.max()) // ROUND) * ROUND, self.max_seq_len)
        order, offsets = packing.rows(lengths, width, self.pack)
        packed = PackedDataset(
            self.caches, starts[order], lengths[order], offsets, width, self.pad_id, None, {}
        )
        everything = np.arange(len(packed))
        arrays = packed.arrays(everything)
        _, _, place, _ = packed._gather_plan(everything)
        sequence_ids = np.full(len(packed) * width, -1)
        sequence_ids[place] = np.repeat(order, lengths[order])
        last = np.empty(len(order), np.int64)
        last[order] = place[np.cumsum(lengths[order]) - 1]
        arrays |= {"sequence_ids": sequence_ids.reshape(-1, width), "last": last}
        arrays["answers"] = self.answers[chosen].T.ravel()
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if self.reference is not None:
            pairs = torch.from_numpy(chosen)
            batch["reference"] = self.reference.view(2, -1)[:, pairs].flatten()
        if not rows:  # nothing to learn, and no token that counts, but a batch
            batch["input_ids"].fill_(self.pad_id)
            batch["labels"].fill_(IGNORE)
            batch["answers"].zero_()
            batch.get("reference", batch["answers"]).zero_()
        return batch

    def thinned(self, num_rows):
        """The same data with evenly spaced pairs only, at most `num_rows` of them and at least one."""
        if num_rows >= len(self):
            return self
        rows = np.linspace(0, len(self) - 1, max(1, num_rows)).round().astype(np.int64)
        return PairDataset(
            self.caches, self.pairs[rows], self.max_seq_len, self.pad_id, self.pack, self.dropped
        )

    def fingerprint(self):
        """Hash of what the pairs are made of."""
        digest = hashlib.sha256(repr((self.max_seq_len, self.pack)).encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        for cache in self.caches:
            digest.update(cache.meta["key"]["content"].encode())
        return digest.hexdigest()[:16]

    def summary(self):
        chosen, rejected = self.answers.mean(0) if len(self) else (0, 0)
        line = (
            f"{len(self):,} pairs, {int(self.lengths.sum()):,} tokens; on average {chosen:.0f} tokens are "
            f"chosen, {rejected:.0f} rejected"
        )
        if self.dropped:
            line += f"; {self.dropped:,} pairs longer than {self.max_seq_len} tokens left out"
            line += " (raise --max_seq_len to keep them)"
        return line


def load_pairs(
    path, tokenizer, max_seq_len, *, cache_dir=None, val_fraction=0.0, pack=True, seed=42, num_workers=None
):
    """`(train, val)` PairDatasets from {"chosen", "rejected"} rows; val is None when val_fraction is 0.

    A pair of which one side is longer than max_seq_len is left out and counted: an answer without its end
    would be compared with a whole one. Held-out pairs are chosen by a hash of the question. Raises DataError
    naming file and line, for pairs whose prompts differ or whose answers do not.
    """
    caches = _open_caches(path, "dpo", tokenizer, cache_dir, num_workers)
    lengths = np.concatenate([np.diff(cache.offsets) for cache in caches]).reshape(-1, 2)
    fits = (lengths <= max_seq_len).all(1)
    hashes = np.concatenate([cache.hashes for cache in caches])[::2]
    held_out = packing.held_out(hashes, val_fraction)
    pad = TextEncoder.of(tokenizer).pad
    train, val = (
        PairDataset(caches, np.flatnonzero(fits & side), max_seq_len, pad, pack, int((~fits & side).sum()))
        for side in (~held_out, held_out)
    )
    if not len(train):
        names = ", ".join(str(cache.source) for cache in caches)
        raise DataError(
            f"{names}: no pair fits into --max_seq_len {max_seq_len} (all {len(fits):,} are longer): raise it"
        )
    return train, val if val_fraction else None
