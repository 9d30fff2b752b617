"""`train_tokenizer.py --plan`: the time and memory of learning a vocabulary, from learning parts of it."""

import contextlib
import io
import time
from pathlib import Path

from dataset.rows import DataError
from trainer.tokenizer_corpus import Corpus
from trainer.tokenizer_report import evaluate

ROOT = Path(__file__).resolve().parents[1]


def show_plan(args, corpus: Corpus, samples: dict, reading: float, train, memory_per_byte: float) -> None:
    """Print it. samples: texts to measure on; reading: seconds of the first pass; train(pieces, vocab_size):
    what learns; memory_per_byte: bytes that it takes for a byte of text.

    A sixteenth and a quarter of the sample are trained on. From one to the other time grows by some factor,
    more than 4, because new text brings new words and merges become slower; the whole takes it once more.
    """

    def seconds_for(share: float) -> float:
        wanted = share * corpus.expected_bytes()

        def pieces():
            for batch in corpus.training_pieces():
                yield batch
                if sum(corpus.sampled_bytes.values()) >= wanted:
                    return

        begin = time.perf_counter()
        train(pieces(), args.vocab_size)
        return (time.perf_counter() - begin) * wanted / sum(corpus.sampled_bytes.values())

    def memory(size: float) -> float:
        return 0.1 + size * memory_per_byte / 1e9

    try:
        sixteenth, quarter = seconds_for(1 / 16), seconds_for(1 / 4)
    except DataError:
        print("time:    unknown, because a part of the text is too small for so many entries")
    else:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # the shipped vocabulary takes as long as a new one
            evaluate(ROOT / "model", samples | (corpus.heldout() if args.holdout else {}), args.compare)
        parts = {"reading": reading, "sampling and training": quarter * quarter / sixteenth}
        parts["measuring"] = time.perf_counter() - begin
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        print(f"time:    {sum(parts.values()):.1f} s: {shown}")
    size = corpus.expected_bytes()
    print(f"memory:  {memory(size):.2f} GB at its peak, for {size / 1e6:.1f} MB of text")
    less = max(1, round(size / 2 / (1 - args.holdout) / 1e6))
    print(f"change:  --max_bytes {less}M: half the text, {memory(size / 2):.2f} GB")
