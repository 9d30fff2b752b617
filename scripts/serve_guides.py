"""Answers that must have a form: JSON of a schema, or a call of a tool.

At every token a grammar decides which tokens may come next; the others get probability zero (guided decoding:
Willard & Louf 2023, https://arxiv.org/abs/2307.09702). Grammars and their tables are llguidance's.
"""

import json

import numpy as np
import torch

from scripts.serve_protocol import ProtocolError

COMPACT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}  # as in the data


class Guide:
    """One answer on its way through a grammar. With `after`, the token that ends thoughts, the grammar begins
    behind it."""

    def __init__(self, matcher, vocab_size: int, after: int | None = None):
        self.matcher, self.vocab_size, self.after = matcher, vocab_size, after

    def allowed(self) -> torch.Tensor | None:
        """(V,) bool, or None: any."""
        if self.after is not None:
            return None
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool))

    def take(self, token: int):
        if self.after is not None:
            self.after = None if token == self.after else self.after
        elif not self.matcher.is_stopped():
            self.matcher.consume_token(token)


class Guides:
    """Grammars for one tokenizer. Each method gives what `Request.guide` takes."""

    def __init__(self, tokenizer, vocab_size: int, eos: int):
        from llguidance.hf import from_tokenizer

        self.vocab_size = vocab_size
        self.tokens = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        tags = ("<tool_call>", "</tool_call>", "</think>")
        self.open, self.close, self.think_end = (tokenizer.convert_tokens_to_ids(tag) for tag in tags)

    def json(self, schema: dict | None, thinking: bool):
        """JSON of a schema (None: any object)."""
        from llguidance import LLMatcher

        schema = {"type": "object"} if schema is None else schema
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)
        return self.maker(grammar, thinking, "response_format")

    def tool_call(self, tools: list[dict], names: list[str], single: bool, thinking: bool):
        """Calls of the tools of these names, one or (not single) several."""
        from llguidance import LLMatcher

        shapes = []
        for tool in tools:
            function = tool["function"]
            if function["name"] in names:
                arguments = function.get("parameters") or {"type": "object"}
                fields = {"name": {"const": function["name"]}, "arguments": arguments}
                shapes.append({"type": "object", "properties": fields, "required": list(fields)})
        for shape in shapes:
            shape["additionalProperties"] = False
        schema = json.dumps({"x-guidance": COMPACT, "anyOf": shapes})
        start = "start: call" if single else r'start: call ("\n" call)*'
        grammar = LLMatcher.grammar_from_lark(
            f'{start}\ncall: <[{self.open}]> "\\n" body "\\n" <[{self.close}]>\nbody: %json {schema}\n'
        )
        return self.maker(grammar, thinking, "tools")

    def maker(self, grammar: str, thinking: bool, param: str):
        from llguidance import LLMatcher

        fault = LLMatcher(self.tokens, grammar, log_level=0).get_error()
        if fault:
            reason = " ".join(fault.split())[:300]
            raise ProtocolError(400, f"{param}: this schema cannot be followed: {reason}", param)
        after = self.think_end if thinking else None
        return lambda: Guide(LLMatcher(self.tokens, grammar, log_level=0), self.vocab_size, after)
