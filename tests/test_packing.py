import time
import types

import numpy as np
import pytest
from data_helpers import REPO  # noqa: F401  (puts the repo on the path)
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import packing


def slow_best_fit(lengths, capacity):
    """The definition: longest first, into the row with the least free space that still fits. Returns the free
    spaces, sorted."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_best_fit_fills_rows_like_the_obvious_loop(case):
    capacity, lengths = case
    row_of = packing.best_fit(np.array(lengths, np.int32), capacity)
    used = np.bincount(row_of, weights=lengths) if lengths else np.zeros(0)
    assert sorted(capacity - used) == slow_best_fit(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.booleans())
def test_rows_hold_every_piece_once_and_never_overflow(lengths, pack):
    order, offsets = packing.rows(np.array(lengths, np.int32), 50, pack)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in order[a:b]) for a, b in zip(offsets, offsets[1:])]
    assert sum(sums) == sum(lengths) and all(0 < s <= 50 for s in sums)
    assert all((np.diff(order[a:b]) > 0).all() for a, b in zip(offsets, offsets[1:]))
    firsts = [order[a] for a in offsets[:-1]]
    assert firsts == sorted(firsts)
    if not pack:
        assert len(sums) == len(lengths)


def test_packing_by_hand():
    # 7 and 3 fill a row, 6 and 4 another, 5 and 5 a third
    order, offsets = packing.rows(np.array([5, 7, 4, 3, 5, 6]), 10)
    assert [order[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == [[0, 4], [1, 3], [2, 5]]


def test_a_million_pieces_take_a_moment_and_always_the_same_rows():
    lengths = np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64) % 1024 + 1
    start = time.process_time()
    row_of = packing.best_fit(lengths, 1024)
    assert time.process_time() - start < 5
    assert (row_of == packing.best_fit(lengths, 1024)).all()
    fill = lengths.sum() / (1024 * (row_of.max() + 1))
    assert fill > 0.99


def test_lengths_out_of_range_are_refused():
    for lengths in ([0], [11], [-1, 3]):
        with pytest.raises(ValueError, match="between 1 and 10"):
            packing.best_fit(np.array(lengths), 10)


def cache_of(lengths, answers=()):
    """Stands for a token cache: documents of these lengths, answers as (document, start, end)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, ends = (np.array([offsets[a[0]] + a[side] for a in answers], np.int64) for side in (1, 2))
    return types.SimpleNamespace(offsets=offsets, answer_starts=starts, answer_ends=ends)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(4, 20))
def test_splitting_keeps_every_token_once(lengths, max_seq_len):
    cache = cache_of(lengths)
    starts, pieces, counts = packing.split_documents(cache, np.arange(len(lengths)), max_seq_len)
    covered = [position for s, n in zip(starts, pieces) for position in range(s, s + n)]
    assert covered == list(range(sum(lengths)))
    assert pieces.max() <= max_seq_len and pieces.min() >= 2
    assert counts["source_tokens"] == sum(lengths)
    inside = [(s, n) for s, n in zip(starts, pieces) if s not in cache.offsets]
    assert all(s not in cache.offsets for s, _ in inside)
    assert counts["split_documents"] == sum(n > max_seq_len for n in lengths)


def test_splitting_by_hand():
    starts, pieces, _ = packing.split_documents(cache_of([9, 3, 8]), np.array([0, 2]), 4)
    # 9 = 4 + 3 + 2 (not 4 + 4 + 1), the middle document is not chosen, 8 = 4 + 4
    assert list(zip(starts.tolist(), pieces.tolist())) == [(0, 4), (4, 3), (7, 2), (12, 4), (16, 4)]


def test_cutting_conversations_by_hand():
    answers = [(0, 3, 5), (0, 8, 10), (1, 8, 11), (2, 2, 4), (2, 6, 8), (2, 9, 12)]
    cache = cache_of([10, 12, 13], answers)
    counts = packing.count_targets(
        cache.answer_starts, cache.answer_ends, *np.array([[0, 10, 22], [10, 12, 8]])
    )
    assert counts.tolist() == [4, 3, 4]
    starts, kept, counts = packing.cut_conversations(cache, np.arange(3), 10)
    # the first fits; the second has no answer that ends within 10; the third keeps two of three answers
    assert list(zip(starts.tolist(), kept.tolist())) == [(0, 10), (22, 8)]
    assert (counts["cut_documents"], counts["dropped_documents"], counts["dropped_tokens"]) == (1, 1, 12 + 5)
    # with cut answers: the second keeps the first two tokens of its answer, the third one token of its last
    starts, kept, counts = packing.cut_conversations(cache, np.arange(3), 10, cut_answers=True)
    assert list(zip(starts.tolist(), kept.tolist())) == [(0, 10), (10, 10), (22, 10)]
    assert packing.count_targets(cache.answer_starts, cache.answer_ends, starts, kept).tolist() == [4, 2, 5]
    assert (counts["cut_documents"], counts["dropped_documents"], counts["dropped_tokens"]) == (2, 0, 2 + 3)
    starts, kept, _ = packing.cut_conversations(cache, np.arange(3), 8, cut_answers=True)
    assert list(zip(starts.tolist(), kept.tolist())) == [(0, 5), (22, 8)]  # no answer has begun after 8 of 12
    starts, kept, _ = packing.cut_conversations(cache, np.array([1]), 11)
    assert list(zip(starts.tolist(), kept.tolist())) == [(10, 11)]


def test_held_out_documents_are_a_function_of_their_hash_alone():
    hashes = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    chosen = packing.held_out(hashes, 0.05)
    assert 400 < chosen.sum() < 600
    assert (packing.held_out(hashes[::-1], 0.05)[::-1] == chosen).all()
    assert (packing.held_out(hashes, 0.1) >= chosen).all()  # a larger share contains the smaller
    assert packing.held_out(hashes, 0.0).sum() == 0
    assert packing.held_out(hashes[:5], 1e-9).sum() == 1
    assert packing.held_out(np.array([7, 7], np.uint64), 0.5).sum() == 0  # nothing would be left to train on
