"""Documents -> full rows. Pure functions on numpy arrays; 10 million documents take seconds.

Best-fit decreasing: take documents from the longest to the shortest and put each into the row whose free
space it fills best. Because lengths are integers up to max_seq_len, rows with the same free space are
interchangeable and move in groups, so the work is one sort plus a number of steps that depends on
max_seq_len, not on the number of documents.
"""

import bisect

import numpy as np


def held_out(hashes, fraction):
    """(N,) bool: the documents to hold out, by content hash (uint64). A document and its copies stay
    together; at least one is held out when fraction > 0 and there is more than one kind of document."""
    if not fraction or len(hashes) < 2:
        return np.zeros(len(hashes), bool)
    limit = max(int(fraction * 2.0**64), int(hashes.min()))
    chosen = hashes <= np.uint64(min(limit, 2**64 - 1))
    return chosen if not chosen.all() else np.zeros(len(hashes), bool)


def split_documents(cache, documents, max_seq_len):
    """Pieces of at most max_seq_len of the chosen documents: `(starts, lengths, counts)`. No token is lost. A
    last piece of one token could teach nothing, so it takes one more token from the piece before."""
    doc_lengths = np.diff(cache.offsets)[documents]
    num_pieces = -(-doc_lengths // max_seq_len)
    owner = np.repeat(np.arange(len(documents)), num_pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = number * max_seq_len
    ends = np.minimum(starts + max_seq_len, doc_lengths[owner])
    lonely = np.flatnonzero((ends - starts == 1) & (number > 0))
    starts[lonely] -= 1
    ends[lonely - 1] -= 1
    counts = {
        "source_tokens": int(doc_lengths.sum()),
        "split_documents": int((num_pieces > 1).sum()),
        "cut_documents": 0,
        "dropped_documents": 0,
        "dropped_tokens": 0,
    }
    return starts + cache.offsets[:-1][documents][owner], (ends - starts).astype(np.int32), counts


def cut_conversations(cache, documents, max_seq_len, cut_answers=False):
    """One piece per chosen conversation: whole if it fits, else up to the end of its last answer that fits,
    else dropped. `(starts, lengths, counts)`.

    cut_answers: where the limit falls inside an answer, keep what fits of it. Its `<|im_end|>` lies behind
    the limit, so this teaches how the answer goes on, never to stop in the middle.
    """
    starts = cache.offsets[:-1][documents]
    lengths = np.diff(cache.offsets)[documents]
    limits = starts + max_seq_len
    fits = lengths <= max_seq_len
    kept = np.zeros_like(lengths)
    if len(cache.answer_ends):
        # the last answer of all that ends within the limit; perhaps one of an earlier conversation
        last = np.searchsorted(cache.answer_ends, limits, side="right") - 1
        kept = np.where(last >= 0, cache.answer_ends[np.maximum(last, 0)] - starts, 0)
        if cut_answers:
            begun = np.searchsorted(cache.answer_starts, limits, side="left") - 1
            inside = (begun >= 0) & (cache.answer_starts[np.maximum(begun, 0)] > starts) & (begun > last)
            kept = np.where(inside, max_seq_len, kept)
    kept = np.where(fits, lengths, np.maximum(kept, 0))
    keep = kept > 0
    counts = {
        "source_tokens": int(lengths.sum()),
        "split_documents": 0,
        "cut_documents": int((~fits & keep).sum()),
        "dropped_documents": int((~keep).sum()),
        "dropped_tokens": int((lengths - kept).sum()),
    }
    return starts[keep], kept[keep].astype(np.int32), counts


def count_targets(answer_starts, answer_ends, starts, lengths):
    """(P,) target tokens of each piece, given the sorted spans of all answers."""
    total = np.concatenate([[0], np.cumsum(answer_ends - answer_starts)])

    def before(positions):
        """Targets before these positions: whole answers, less what of the last one lies behind."""
        begun = np.searchsorted(answer_starts, positions, side="left")
        behind = np.concatenate([[0], answer_ends])[begun] - positions
        return total[begun] - np.where(begun > 0, np.maximum(behind, 0), 0)

    return before(starts + lengths) - before(starts)


def rows(lengths, capacity, pack=True):
    """Put pieces into rows: `(order, row_offsets)`. Row r holds the pieces
    order[row_offsets[r]:row_offsets[r+1]]. Rows come in the order of their first piece, and pieces in a row
    in the order they came."""
    if not pack:
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    row_of = best_fit(lengths, capacity)
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    first = np.full(num_rows, len(lengths), np.int64)
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    rank = np.empty(num_rows, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_rows)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])


def best_fit(lengths, capacity):
    """Row of each piece (N,) by best-fit decreasing. Lengths from 1 to capacity."""
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be between 1 and {capacity}")
    key = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64)  # uint16 sorts by radix
    order = np.argsort(key, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    row_of = np.empty(len(lengths), np.int64)
    num_rows, done = 0, 0
    groups = {}  # free space -> list of arrays of rows with that much left
    spaces = []  # its keys, sorted

    def put(space, some_rows):
        if space and len(some_rows):
            if space not in groups:
                groups[space] = []
                bisect.insort(spaces, space)
            groups[space].append(some_rows)

    for length in range(capacity, 0, -1):
        remaining = int(counts[length])
        while remaining:
            index = bisect.bisect_left(spaces, length)
            if index < len(spaces):
                space = spaces[index]
                free = groups[space].pop()
                if not groups[space]:
                    del groups[space], spaces[index]
            else:
                space = capacity
                needed = -(-remaining // (capacity // length))
                free = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            # the fullest row that fits takes as many as it can, before the next one
            each = space // length
            full = min(len(free), remaining // each)
            taken = np.repeat(free[:full], each)
            row_of[order[done : done + len(taken)]] = taken
            done += len(taken)
            remaining -= len(taken)
            put(space - each * length, free[:full])
            free = free[full:]
            if remaining and len(free):  # then fewer than `each` are left for the next row
                row_of[order[done : done + remaining]] = free[0]
                done += remaining
                put(space - remaining * length, free[:1])
                remaining, free = 0, free[1:]
            put(space, free)
    return row_of
