"""What a tokenizer does to text: how far it compresses, whether text survives, what its entries are.

`trainer/train_tokenizer.py` prints this report after training and with --eval_only.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.rows import DataError

ROOT = Path(__file__).resolve().parents[1]

# For the comparison table: vocabulary sizes, and the parameters of 8 layers of width 512 without embedding.
KNOWN_VOCABULARIES = {"Yi": 64000, "Qwen2": 151643, "GLM": 151329, "Mistral": 32000, "Llama-3": 128000}
WIDTH, BODY_PARAMETERS = 512, 22_553_088

SAMPLES = {
    "Chinese": [
        "清晨的阳光照进窗户，小城慢慢醒来。卖早点的老人推着车走过石桥，豆浆的香气飘满了整条街。",
        "请用三句话解释一下，为什么天空看起来是蓝色的，而傍晚的太阳却是红色的？",
        "水在标准大气压下加热到一百度会沸腾，这时液态的水变成水蒸气，体积增大许多倍。",
    ],
    "English": [
        "The train left the station a little late, and nobody on the platform seemed to mind. It was warm.",
        "Could you explain in three sentences why the sky looks blue, while the evening sun looks red?",
        "Water boils at one hundred degrees at normal pressure: the liquid turns into steam and needs room.",
    ],
    "code": [
        "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
        "    return sum(values) / len(values)\n\n\n"
        "for name, row in table.items():\n    print(f'{name}: {mean(row):.2f}')\n",
        "for (int i = 0; i < n; ++i) {\n    if (a[i] > best) { best = a[i]; index = i; }\n}\n"
        'return {"index", index};\n',
    ],
    "digits": [
        "3.14159265358979 + 2.71828182845905 = 5.85987448204884",
        "1024 * 768 = 786432; 2026-11-21 07:30:59",
    ],
}


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(folder: Path):
    """The bare `tokenizers.Tokenizer` of a folder."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist. Pass a folder with a tokenizer.json, e.g. {ROOT / 'model'}")
    return Tokenizer.from_file(str(path))


def byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: printable Latin-1 as itself, the others from
    U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes(tokenizer) -> list[bytes]:
    """The bytes that each id stands for."""
    table, reserved = byte_of_character(), tokenizer.get_added_tokens_decoder()
    result = []
    for number in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(number)
        result.append(token.encode("utf-8") if number in reserved else bytes(table[c] for c in token))
    return result


def stream_text(ids: Iterable[int], bytes_of: list[bytes]) -> Iterator[str]:
    """Text as it becomes known while tokens arrive: half a character is kept until it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number in ids:
        if text := decoder.decode(bytes_of[number]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def measure(tokenizer, texts: list[str]) -> dict:
    """How well texts compress, and whether they survive a round trip, whole and streamed."""
    bytes_of = token_bytes(tokenizer)
    num_tokens, whole, streamed = 0, True, True
    for start in range(0, len(texts), 256):
        for text, encoding in zip(
            texts[start : start + 256],
            tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False),
        ):
            num_tokens += len(encoding.ids)
            whole &= tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
            streamed &= "".join(stream_text(encoding.ids, bytes_of)) == text
    num_bytes, characters = sum(len(text.encode("utf-8")) for text in texts), sum(map(len, texts))
    return {
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / max(num_tokens, 1),
        "chars_per_token": characters / max(num_tokens, 1),
        "round_trip": whole,
        "streaming": streamed,
    }


def print_compression(tokenizer, samples: dict[str, list[str]], others: dict) -> bool:
    """Table of bytes per token; `others` are tokenizers to compare with, by name. True if all survived."""
    print(
        f"{'text':24} {'bytes':>9} {'tokens':>8} {'chars/token':>12} {'bytes/token':>12} {'round trip':>11} "
        f"{'streaming':>10}" + "".join(f" {name[-24:]:>24}" for name in others)
    )
    good = True
    for name, texts in samples.items():
        row = measure(tokenizer, texts)
        good &= row["round_trip"] and row["streaming"]
        print(
            f"{name:24} {row['bytes']:9d} {row['tokens']:8d} {row['chars_per_token']:12.3f} "
            f"{row['bytes_per_token']:12.3f} {'ok' if row['round_trip'] else 'BROKEN':>11} "
            f"{'ok' if row['streaming'] else 'BROKEN':>10}"
            + "".join(f" {measure(other, texts)['bytes_per_token']:24.3f}" for other in others.values())
        )
    return good


def print_vocabulary(tokenizer) -> None:
    """What the entries are, with a few of each kind to look at."""
    kinds = {"Chinese": [], "Latin words": [], "digits and signs": [], "parts of characters": [], "other": []}
    reserved = tokenizer.get_added_tokens_decoder()
    for number, raw in enumerate(token_bytes(tokenizer)):
        if number in reserved:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            kinds["parts of characters"].append(repr(raw)[2:-1])
            continue
        if re.search(r"[\u3400-\u9fff]", text):
            kind = "Chinese"
        elif re.search(r"[A-Za-z]", text):
            kind = "Latin words"
        else:
            kind = "digits and signs" if text.isascii() else "other"
        kinds[kind].append(text)
    for kind, tokens in kinds.items():
        longest = sorted(tokens, key=lambda token: (-len(token), token))[:6]
        shown = " ".join(json.dumps(token, ensure_ascii=False) for token in longest)
        print(f"{kind:20} {len(tokens):5d}   longest: {shown}")


def print_known_vocabularies(vocab_size: int) -> None:
    """What a larger vocabulary would cost this model: the (tied) embedding as a share of all parameters."""
    title = f"embedding at width {WIDTH}"
    print(f"\n{'vocabulary':12} {'entries':>8} {title:>24} {'share of the model':>19}")
    for name, size in {**KNOWN_VOCABULARIES, "this one": vocab_size}.items():
        embedding = size * WIDTH
        print(
            f"{name:12} {size:8d} {embedding / 1e6:22.2f} M {embedding / (embedding + BODY_PARAMETERS):18.1%}"
        )


def print_template(folder: Path) -> None:
    """A short conversation through the chat template, as a model sees it."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        print("(transformers is not installed: the chat template is not shown)")
        return
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    messages = [
        {"role": "user", "content": "你好，2+3=?"},
        {"role": "assistant", "content": "5", "reasoning_content": "2+3 is 5."},
        {"role": "user", "content": "Thanks!"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    print(f"\nchat template, {len(ids)} tokens, decodes to itself: {tokenizer.decode(ids) == text}\n{text}")


def evaluate(folder: Path, samples: dict[str, list[str]], compare: list[Path]) -> bool:
    tokenizer = load_tokenizer(folder)
    print(f"\n{folder}: {tokenizer.get_vocab_size()} entries, sha256 {file_hash(folder / 'tokenizer.json')}")
    good = print_compression(tokenizer, samples, {str(other): load_tokenizer(other) for other in compare})
    print()
    print_vocabulary(tokenizer)
    print_known_vocabularies(tokenizer.get_vocab_size())
    if (folder / "tokenizer_config.json").is_file():
        print_template(folder)
    return good
