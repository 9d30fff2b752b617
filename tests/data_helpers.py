"""What the tests of the data path share: the repo's tokenizer, a tokenizer of bytes, and files."""

import functools
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))


@functools.cache
def repo_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REPO / "model")


@functools.cache
def byte_tokenizer():
    """One token per byte, so that ids can be written out by hand; the repo's special tokens and template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = sorted(repo_tokenizer().added_tokens_decoder.items())
    names = [token.content for _, token in special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: number for number, name in enumerate(names + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=token.special) for name, (_, token) in zip(names, special)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = repo_tokenizer().chat_template
    return tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chat(*texts):
    """A conversation of alternating user and assistant texts."""
    return {"conversations": [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]}
