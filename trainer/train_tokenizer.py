"""Train the vocabulary: byte-level byte-pair encoding (BPE), 6,400 entries.

Start from the 256 bytes, so that any text can be written. Then repeat: count the adjacent pairs of tokens
inside the words of a corpus and merge the most frequent pair into a new token, until the vocabulary is full.
Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1, on bytes as in GPT-2. Text is first cut
into words by Qwen2's regular expression, merges never cross a word; every digit is a word of its own, so
numbers always split the same way.

What is counted is a sample (trainer/tokenizer_corpus.py): as many bytes of Chinese as of English
(--zh_share), each distinct text once, and runs of Chinese cut to eight characters, because a clause without
blanks would otherwise be one long word.

You do not need this stage. Weights and vocabulary belong together: a model trained with one tokenizer reads
nonsense through another. The script is for study, and for those who start everything anew.

    python trainer/train_tokenizer.py --data_path dataset/pretrain.jsonl dataset/sft.jsonl
    python trainer/train_tokenizer.py --eval_only model

Reads .jsonl / .parquet rows of {"text": ...} or {"conversations": [...]}, or .txt; writes tokenizer.json,
tokenizer_config.json and chat_template.jinja to out/tokenizer. Same input, same files, byte for byte.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

from dataset.rows import DataError
from trainer import cli
from trainer.tokenizer_corpus import Corpus, read_documents
from trainer.tokenizer_plan import show_plan
from trainer.tokenizer_report import SAMPLES, evaluate, file_hash

# What the vocabulary must contain -----------------------------------------------------------------

# The first ids, in this order, with the same ids and roles as MiniMind's. Special ones vanish from decoded
# text (skip_special_tokens=True); the tags of tool calls and of thinking stay, because programs parse them.
SPECIAL_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
    <|audio_start|> <|audio_end|> <|audio_pad|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>
""".split()
PLAIN_TOKENS = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>".split()
PLAIN_TOKENS += [f"<|buffer{i}|>" for i in range(1, 10)]  # free for whoever extends a trained model
RESERVED_TOKENS = SPECIAL_TOKENS + PLAIN_TOKENS  # ids 0 ... 35

# Qwen2's word regex, character for character: converters recognise it by its hash, and llama.cpp and Ollama
# then cut text as we do (tokenizer.ggml.pre = qwen2).
WORD_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MEMORY_PER_BYTE = 40  # measured: BPE keeps every distinct word as a chain of its bytes


# Training and writing -----------------------------------------------------------------------------


def train_merges(pieces: Iterable[list[str]], vocab_size: int, show_progress: bool = False) -> dict:
    """The tokenizer as the JSON object of the `tokenizers` library. Merges learned with Qwen2's words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = len(RESERVED_TOKENS) + 256
    if vocab_size < smallest:
        raise DataError(
            f"--vocab_size must be at least {smallest}: {len(RESERVED_TOKENS)} reserved tokens and 256 bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=RESERVED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text is too small: only {tokenizer.get_vocab_size()} of {vocab_size} entries could be "
            "learned. Give more data or a smaller --vocab_size"
        )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in SPECIAL_TOKENS,
        }
        for number, token in enumerate(RESERVED_TOKENS)
    ]
    # "a b" instead of ["a", "b"]: every reader knows the older form, and byte-level tokens contain no blank.
    spec["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]
    ]
    spec["model"]["vocab"] = dict(sorted(spec["model"]["vocab"].items(), key=lambda item: item[1]))
    return spec


def tokenizer_config(template: str) -> dict:
    """tokenizer_config.json: roles and chat template, in words that transformers 4 and 5 both read."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": 32768,
        # Names by which a model that sees or hears finds its placeholders.
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "chat_template": template,
    }


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_config(folder: Path, template: str) -> None:
    write_text(folder / "chat_template.jinja", template)
    write_text(
        folder / "tokenizer_config.json",
        json.dumps(tokenizer_config(template), ensure_ascii=False, indent=2) + "\n",
    )


# Command line -------------------------------------------------------------------------------------


def byte_count(text: str) -> int:
    """'64M' -> 64000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 64M")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write a number from 0 to 1")
    return value


def parse_args(argv=None):
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--data_path", nargs="+", type=Path, default=[], help="files to learn from (.jsonl, .parquet, .txt)")
    add("--out_dir", type=Path, default=ROOT / "out" / "tokenizer", help="folder to write")
    add("--overwrite", action="store_true", help="replace a tokenizer that lies in --out_dir")
    add("--vocab_size", type=int, default=6400, help="entries, the 36 reserved tokens included")
    add(
        "--max_bytes",
        type=byte_count,
        default="32M",
        help="text to learn from at most; needs 40 times the memory",
    )
    add("--zh_share", type=share, default=0.5, help="share of Chinese among the sampled bytes")
    add("--holdout", type=share, default=0.01, help="share of documents kept for measuring, by content hash")
    add("--num_threads", type=int, default=2, help="threads for counting words")
    add("--eval_only", type=Path, metavar="DIR", help="train nothing, measure the tokenizer in DIR")
    add(
        "--eval_path",
        nargs="+",
        type=Path,
        default=[],
        help="files to measure on, besides the built-in samples",
    )
    add(
        "--compare", nargs="+", type=Path, default=[], metavar="DIR", help="tokenizers to measure beside ours"
    )
    add("--plan", action="store_true", help="train nothing: print how much memory and time it would take")
    add(
        "--config_only",
        type=Path,
        metavar="DIR",
        help="rewrite the config of DIR after its template was edited",
    )
    return parser.parse_args(argv)


def main(args) -> None:
    if args.plan and (args.config_only or args.eval_only):
        raise DataError("--plan is about training: leave --config_only and --eval_only out")
    os.environ["RAYON_NUM_THREADS"] = str(args.num_threads)  # read when `tokenizers` is first imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if args.config_only:
        template = args.config_only / "chat_template.jinja"
        if not template.is_file():
            raise DataError(
                f"{template} does not exist. Pass the folder of a tokenizer, e.g. {ROOT / 'model'}"
            )
        write_config(args.config_only, template.read_text(encoding="utf-8"))
        print(f"wrote {args.config_only / 'tokenizer_config.json'}")
        return

    samples = dict(SAMPLES)
    for path in args.eval_path:
        samples[path.name[:24]] = [text for document in read_documents(path) for text in document]
    if args.eval_only:
        if not evaluate(args.eval_only, samples, args.compare):
            raise DataError(
                f"{args.eval_only}: a text did not survive encoding and decoding (see BROKEN above)"
            )
        return

    if not args.data_path:
        raise DataError("nothing to learn from: pass --data_path FILE ..., or --eval_only DIR to measure")
    target = args.out_dir / "tokenizer.json"
    if target.exists() and not args.overwrite and not args.plan:
        raise DataError(
            f"{target} exists. Weights trained with it need it: choose another --out_dir, or pass --overwrite"
        )

    import tokenizers

    begin = time.time()
    corpus = Corpus(args.data_path, args.max_bytes, args.zh_share, args.holdout)
    found = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in corpus.num_bytes.items())
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in corpus.rates.items())
    print(f"{corpus.num_documents} documents: {found}; sampling {rates}; tokenizers {tokenizers.__version__}")
    if args.plan:
        show_plan(args, corpus, samples, time.time() - begin, train_merges, MEMORY_PER_BYTE)
        return
    print(f"about {0.1 + corpus.expected_bytes() * MEMORY_PER_BYTE / 1e9:.1f} GB of memory will be needed")
    spec = train_merges(corpus.training_pieces(), args.vocab_size, show_progress=True)

    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(spec, ensure_ascii=False, indent=1) + "\n")
    template = ROOT / "model" / "chat_template.jinja"
    write_config(args.out_dir, template.read_text(encoding="utf-8"))
    sampled = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in corpus.sampled_bytes.items())
    print(f"learned from {sampled} in {time.time() - begin:.0f} s{_peak_memory()}")
    for path in args.data_path:
        print(f"input  sha256 {file_hash(path)}  {path}")
    print(f"output sha256 {file_hash(target)}  {target}")
    if args.holdout:
        samples |= corpus.heldout()
    if not evaluate(args.out_dir, samples, args.compare):
        raise DataError(f"{args.out_dir}: a text did not survive encoding and decoding (see BROKEN above)")


def _peak_memory() -> str:
    try:
        import resource  # Unix only
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == "linux" else 1 << 30
    )
    return f", peak memory {peak:.2f} GB"


if __name__ == "__main__":
    cli.run(main, parse_args)
