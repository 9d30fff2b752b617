"""Answers that must have a form: JSON of a schema, or a call of a tool.

At every token a grammar decides which tokens may come next; the others get probability zero (guided decoding:
Willard & Louf 2023, https://arxiv.org/abs/2307.09702). Grammars and their tables are llguidance's.
"""

import json
import math

import numpy as np
import torch

COMPACT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}  # as in the data


class Guide:
    """One answer on its way through a grammar. With `after`, the token that ends thoughts, the grammar begins
    behind it, and where the model would end its answer in the thoughts, it ends these. Raises ValueError when
    the grammar cannot go on, as when it became too complex."""

    def __init__(self, matcher, eos: int, after: int | None = None):
        self.matcher, self.eos, self.after = matcher, eos, after

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (V,) -> the same, -inf where a token may not come."""
        if self.after is not None:
            logits = logits.clone()
            logits[self.after] = torch.logaddexp(logits[self.after], logits[self.eos])
            logits[self.eos] = -math.inf
            return logits
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -math.inf)

    def take(self, token: int):
        if self.after is not None:
            self.after = None if token == self.after else self.after
        elif not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self.check()

    def check(self):
        if self.matcher.is_error():
            raise ValueError(f"the answer cannot be made to follow its schema: {reason(self.matcher)}")


def reason(matcher) -> str:
    """The error of a matcher, without the state that it prints behind it."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())[:300]


class Guides:
    """Grammars for one tokenizer, as `Request.guide` takes them."""

    def __init__(self, tokenizer, vocab_size: int, eos: int):
        from llguidance.hf import from_tokenizer

        self.eos = eos
        self.tokens = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        tags = ("<tool_call>", "</tool_call>", "</think>")
        self.open, self.close, self.think_end = (tokenizer.convert_tokens_to_ids(tag) for tag in tags)

    def make(self, schema: dict | None, tools: list[dict], forced: bool, single: bool, thinking: bool):
        """A maker of guides.

        Args:
            schema: JSON schema of an answer in words; None = there is none.
            tools: what may be called instead, and with `forced` must be.
            single: one call only.
            thinking: the form begins behind the thoughts.
        """
        from llguidance import LLMatcher

        rules, calls = [], []
        for i, tool in enumerate(tools):
            name, parameters = tool["function"]["name"], tool["function"].get("parameters") or {}
            arguments = json.dumps({**parameters, "type": "object", "x-guidance": COMPACT})
            start, end = (json.dumps(text) for text in (f'{{"name": "{name}", "arguments": ', "}"))
            rules += [f"call{i}: {start} arguments{i} {end}", f"arguments{i}: %json {arguments}"]
            calls.append(f"call{i}")
        starts = []
        if tools:
            rules.append(f'call: <[{self.open}]> "\\n" ({" | ".join(calls)}) "\\n" <[{self.close}]>')
            starts.append("call" if single else 'call ("\\n" call)*')
        if schema is not None and not forced:
            rules.append("words: %json " + json.dumps({**schema, "x-guidance": COMPACT}))
            starts.append("words")
        grammar = "\n".join([f"start: {' | '.join(starts)}", *rules, ""])
        first = LLMatcher(self.tokens, grammar_of(grammar), log_level=0)
        if first.is_error():
            raise ValueError(f"a schema cannot be followed: {reason(first)}")
        after = self.think_end if thinking else None
        return lambda: Guide(first.deep_copy(), self.eos, after)


def grammar_of(lark: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(lark)
