"""Keys and values as 8-bit whole numbers, and attention to them as one function for the compiler.

`attend` is written for torch's C++ compiler, which makes two loops of it that read every number once; run
uncompiled it is slow. What decides its speed is how the numbers lie in memory:

- Slots lie in blocks of 16, as many as a register has places. Within a block the keys are turned, so that 16
  scores grow side by side and nothing is ever summed across a register.
- Four whole numbers share one int32, hd / 4 dimensions apart: whole registers are read, and two shifts and a
  conversion make floats of them.
- Every block starts with its 16 scales.

A token's key and value have one scale each (per head), as its inputs have in the 8-bit products. K key/value
heads of `rows` rows are rows * K pairs; R queries share a pair, each of hd dimensions.
"""

import math

import torch
import torch.nn.functional as F

from model.precision import round_to_integers

WIDTH = 16  # slots of a block
BYTES = 4  # whole numbers in an int32
SPARE = 256  # slots there is room for when prompts were read


def in_words(x: torch.Tensor) -> torch.Tensor:
    """x (..., hd) float32 -> (..., 1 + hd / 4) int32: the bits of its scale, then its whole numbers."""
    rounded, scale = round_to_integers(x)
    first, second, third, fourth = rounded.to(torch.int32).chunk(BYTES, dim=-1)
    words = (first & 255) | (second & 255) << 8 | (third & 255) << 16 | fourth << 24
    return torch.cat((scale.view(torch.int32), words), dim=-1)


def from_words(words: torch.Tensor) -> list[torch.Tensor]:
    """The four whole numbers of each int32, as float32."""
    return [(words << (24 - 8 * i) >> 24).float() for i in range(BYTES)]


def places_of(slot: int, words: int) -> torch.Tensor:
    """Where in a pair's `words` the key and the value of a slot lie, counted from its first block, (2, words)
    int64."""
    block, place = divmod(slot, WIDTH)
    word = torch.arange(words)
    value = WIDTH + (words - 1) * place + word - 1
    value[0] = place
    return block * words * WIDTH + torch.stack((word * WIDTH + place, value))


def attend(qk, v, cache, bias, places):
    """One new token of each pair sees the slots before it and itself, and joins the cache.

    qk (pairs, R + 1, hd): queries and the key; v (pairs, hd); cache (pairs, 2, room, 1 + hd / 4, WIDTH) int32
    is written to; bias (pairs, blocks, WIDTH): -inf in slots not to be seen; places (2, 1 + hd / 4): as from
    `places_of` -> (pairs, R, hd) float32.
    """
    (pairs, blocks, _), hd, (_, _, room, words, _) = bias.shape, v.shape[-1], cache.shape
    new = in_words(torch.stack((qk[:, -1], v), dim=1))
    cache.view(pairs, 2, -1)[:, torch.arange(2)[:, None], places] = new

    size = words * WIDTH
    filled = cache.as_strided(
        (pairs, 2, blocks, words, WIDTH), (2 * room * size, room * size, size, WIDTH, 1)
    )
    key_scales, value_scales = filled[:, :, :, 0].view(torch.float32).unbind(1)
    keys = from_words(filled[:, 0, :, 1:])
    values = from_words(filled[:, 1, :, 1:].flatten(2).view(pairs, blocks, WIDTH, -1))
    weights = []
    for query in qk[:, :-1].unbind(1):
        parts = (part[:, None, :, None] for part in query.chunk(BYTES, dim=-1))
        scores = sum(part * key for part, key in zip(parts, keys)).sum(2) * (key_scales * hd**-0.5) + bias
        exponentials = (scores - scores.amax((1, 2), keepdim=True)).exp()
        weights.append(exponentials * (value_scales / exponentials.sum((1, 2), keepdim=True)))
    weights = torch.stack(weights, dim=1)[..., None]  # in memory once, else computed again for every part
    found = [(weight * value).sum((1, 2)) for weight in weights.unbind(1) for value in values]
    return torch.cat(found, dim=-1).view(pairs, -1, hd)


def attend_examples(pairs: int, R: int, hd: int):
    """Arguments of `attend` for the compiler, and which of their sizes are free, by name."""
    blocks, room, words = 10, 20, 1 + hd // BYTES
    arguments = [
        torch.zeros(pairs, R + 1, hd),
        torch.zeros(pairs, hd),
        torch.zeros(pairs, 2, room, words, WIDTH, dtype=torch.int32),
        torch.zeros(pairs, blocks, WIDTH),
        places_of(0, words),
    ]
    return arguments, [{0: "pairs"}, {0: "pairs"}, {0: "pairs", 2: "room"}, {0: "pairs", 1: "blocks"}, {}]


class RoundedCache:
    """The keys and values that a `KeyValueCache` holds after prompts were read, rounded, and those to come.

    It stands in for that class: `next_slot`, `visible`, `attend` for every layer, `drop`.
    """

    def __init__(self, cache, attention, limit: int):
        """attention: `attend` above, compiled; limit: there will be no more slots than that."""
        self.K, self.pad, self.padded = cache.K, cache.pad, cache.padded
        self.rows, self.length, self.limit, self.attention = cache.rows, cache.length, limit, attention
        blocks = -(-self.length // WIDTH)
        room = -(-min(limit, self.length + SPARE) // WIDTH)
        L, pairs, _, hd = cache.keys.shape
        self.words = torch.zeros(L, pairs, 2, room, 1 + hd // BYTES, WIDTH, dtype=torch.int32)
        for layer, both in zip(self.words, zip(cache.keys, cache.values)):
            x = torch.stack([part[:, : self.length].float() for part in both], dim=1)
            x = in_words(F.pad(x, (0, 0, 0, blocks * WIDTH - self.length))).unflatten(2, (blocks, WIDTH))
            keys, values = layer[:, :, :blocks].unbind(1)
            keys.copy_(x[:, 0].transpose(2, 3))
            values[:, :, 0] = x[:, 1, :, :, 0]
            values[:, :, 1:] = x[:, 1, :, :, 1:].reshape(values[:, :, 1:].shape)
        slots, pad = torch.arange(room * WIDTH), torch.tensor(self.pad).repeat_interleave(self.K)
        hidden = (slots < pad[:, None]) | (slots >= self.length)
        self.bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf).view(pairs, room, WIDTH)

    def next_slot(self) -> int:
        """Make the next slot visible, growing where there is no room -> its number."""
        slot, room = self.length, self.bias.shape[1]
        if slot == room * WIDTH:
            more = -(-min(self.limit, slot * 3 // 2 + 64) // WIDTH) - room
            self.words = F.pad(self.words[:, : self.rows * self.K], (0, 0, 0, 0, 0, more))
            self.bias = F.pad(self.bias[: self.rows * self.K], (0, 0, 0, more), value=-math.inf)
        self.bias[:, slot // WIDTH, slot % WIDTH] = 0
        self.length += 1
        return slot

    def visible(self, rows: int) -> list[tuple[torch.Tensor, ...]]:
        """What `attend` needs of each layer: its words, the bias, and the places of the last slot."""
        pairs, blocks = rows * self.K, -(-self.length // WIDTH)
        bias = self.bias[:pairs, :blocks].contiguous()
        places = places_of(self.length - 1, self.words.shape[4])
        return [(words, bias, places) for words in self.words[:, :pairs].unbind(0)]

    def attend(self, qk, v, words, bias, places):
        """qk (n, K, R + 1, hd) and v (n, K, hd) of new tokens -> what they find, (n, K * R * hd)."""
        return self.attention([], [qk.flatten(0, 1), v.flatten(0, 1), words, bias, places]).view(len(v), -1)

    def drop(self, row: int):
        """Forget a row: the last one moves into its place."""
        last, K = self.rows - 1, self.K
        if row != last:
            here, there = slice(row * K, row * K + K), slice(last * K, last * K + K)
            self.words[:, here] = self.words[:, there]
            self.bias[here] = self.bias[there]
            self.pad[row] = self.pad[last]
        self.pad.pop()
        self.rows = last
