"""How well does a model read on beyond the length it was trained at? Bits per byte of long texts, by the
length of the window and by the place in it, with positions as they are and stretched by YaRN.

    python scripts/eval_ppl.py --weight pretrain --text novel.txt
    python scripts/eval_ppl.py --weight pretrain --text zh.txt,en.txt --lengths 256,1024,2048 --yarn_factor 8

The text is cut into windows that do not overlap; in each, every token but the first is predicted from those
before it. All lengths see the same text. Bits per byte, nats / (ln 2 * UTF-8 bytes), do not depend on the
tokenizer.

    plain    the rotary positions of training, and beyond them what the model never saw
    yarn     the same positions squeezed into the trained range, where a frequency turns slowly
             (Peng et al. 2023, https://arxiv.org/abs/2309.00071); --yarn_factor says how far

A model that was trained on with YaRN is compared with itself without. Writes a table, a picture and JSON.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

from trainer import cli

TOKENS_AT_ONCE = 8192


def lengths(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 256,1024, not {text!r}") from None
    if any(found[-1] % length for length in found):
        raise argparse.ArgumentTypeError("all must divide the longest, so that they see the same text")
    if found[0] < 2:
        raise argparse.ArgumentTypeError("a window needs at least 2 tokens")
    return found


def parse_args(argv=None):
    import eval_llm

    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    g = parser.add_argument_group("which weights")
    eval_llm.add_weight_flags(g)
    g.add_argument(
        "--tokenizer", type=Path, default=ROOT / "model", metavar="DIR", help="folder of tokenizer.json"
    )
    g = parser.add_argument_group("what is measured")
    g.add_argument("--text", required=True, metavar="FILES", help="UTF-8 text files, separated by commas")
    g.add_argument(
        "--lengths",
        type=lengths,
        metavar="N,N",
        help="tokens in a window; without it half the trained length and 1, 2, 4, 8 times it",
    )
    g.add_argument(
        "--trained_length",
        type=cli.positive_int,
        metavar="N",
        help="length the weights were trained at; without it what is stored in them",
    )
    g.add_argument(
        "--yarn_factor",
        type=cli.number_type(float, low=1, high=1024),
        metavar="X",
        help="how far YaRN stretches the trained length; without it as far as the longest window needs",
    )
    g.add_argument(
        "--max_tokens",
        type=cli.positive_int,
        default=65536,
        metavar="N",
        help="of every text, from its start",
    )
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the computation"
    )
    g.add_argument("--to", type=Path, metavar="FILE", help="JSON, and a .png beside it; without it out/eval/")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def window_losses(model, windows):
    """Nats of every token but the first of each window, given those before it in the window: (W, L - 1)
    float32. windows: (W, L) int64."""
    import torch

    from trainer.logprobs import token_logprobs

    rows = max(1, TOKENS_AT_ONCE // windows.shape[1])
    found = []
    with torch.inference_mode():
        for start in range(0, len(windows), rows):
            batch = windows[start : start + rows].to(model.lm_head.weight.device)
            hidden, targets = model.model(batch)[0][:, :-1], batch[:, 1:]
            logps = token_logprobs(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())
            found.append(-logps.view(targets.shape).cpu())
    return torch.cat(found)


def bits_per_byte(nats, num_bytes) -> float:
    return float(nats.double().sum() / math.log(2) / num_bytes.double().sum())


def buckets(longest: int, trained: int) -> list[tuple[int, int]]:
    """Ranges of places in a window: up to the trained length, then always twice as far."""
    edges = [0, min(trained, longest)]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return list(zip(edges, edges[1:]))


def measure(model, ids, token_bytes, some_lengths: list[int], trained: int) -> dict:
    """Bits per byte of a text by window length, and by place in the longest window. ids: (N,) with N a
    multiple of the longest length; token_bytes: (V,) UTF-8 bytes of every token."""
    by_length, by_place = {}, {}
    for length in some_lengths:
        windows = ids[: len(ids) // length * length].view(-1, length)
        nats, sizes = window_losses(model, windows), token_bytes[windows[:, 1:]]
        by_length[length] = bits_per_byte(nats, sizes)
    for low, high in buckets(some_lengths[-1], trained):
        low, high = max(low - 1, 0), high - 1  # the first token of a window is not predicted
        by_place[f"{low + 1}-{high}"] = bits_per_byte(nats[:, low:high], sizes[:, low:high])
    return {"by_length": by_length, "by_place": by_place}


def rotary_table(config, factor: float | None):
    """Positions of a configuration: plain (None), or stretched by YaRN; those of weights that were trained
    with YaRN as they are."""
    from model.model_minimind import RotaryTable

    config = copy.deepcopy(config)
    if factor is None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    elif config.rope_parameters["rope_type"] == "default":
        config.yarn_factor = factor
        config.stretch_positions()
    return RotaryTable(config)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def read_ids(path: Path, tokenizer, multiple: int, most: int):
    """The token ids of a text file, cut to a multiple of `multiple`. Raises DataError."""
    import torch

    from dataset.rows import DataError

    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path} is no file: name text files with --text") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    ids = tokenizer(text[: 8 * most], add_special_tokens=False, verbose=False).input_ids[:most]
    if len(ids) < multiple:
        raise DataError(
            f"{path} has {len(ids):,} tokens, fewer than the longest window of {multiple:,}: give a longer "
            "text, shorter --lengths, or a larger --max_tokens"
        )
    return torch.tensor(ids[: len(ids) // multiple * multiple])


def main(args):
    import torch

    import eval_llm
    from dataset.lm_dataset import TextEncoder
    from trainer import checkpoint, runtime

    device = runtime.choose_device(args.device)
    if args.to and (args.to.suffix != ".json" or args.to.is_dir()):
        raise checkpoint.CheckpointError(f"--to {args.to}: name a .json file; the picture gets its name too")
    path, tokenizer = eval_llm.find_weights(args), eval_llm.load_tokenizer(args.tokenizer)
    model, metadata = checkpoint.load_model(path, tokenizer)
    model = model.to(device, getattr(torch, args.dtype))
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":
        raise checkpoint.CheckpointError(
            "these weights have positions of their own kind (llama3), not YaRN's"
        )
    own = rope["factor"] if rope["rope_type"] == "yarn" else None
    if own and args.yarn_factor not in (None, own):
        raise checkpoint.CheckpointError(
            f"these weights were trained with YaRN x{own:g}: leave out --yarn_factor"
        )
    trained = args.trained_length or int(model.config.original_max_position_embeddings * (own or 1))
    if args.trained_length and own is None:
        model.config.original_max_position_embeddings = args.trained_length
    some_lengths = args.lengths or [max(2, trained // 2), *(trained * k for k in (1, 2, 4, 8))]
    factor = own or args.yarn_factor or max(1.0, some_lengths[-1] / trained)
    variants = {"plain": rotary_table(model.config, None)}
    variants[f"yarn x{factor:g}"] = rotary_table(model.config, factor)
    token_bytes = torch.tensor(TextEncoder.of(tokenizer).token_bytes().copy())
    million = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{checkpoint.shown(path)}: {million:.2f}M parameters, trained at {trained:,} tokens")
    result = {
        "format": 1,
        "weights": {"file": path.name, "stage": metadata.get("stage"), "crc32": metadata.get("crc32")},
        "trained_length": trained,
        "yarn_factor": factor,
        "dtype": args.dtype,
        "texts": {},
    }
    for name in args.text.split(","):
        ids = read_ids(Path(name), tokenizer, some_lengths[-1], args.max_tokens)
        about = {"tokens": len(ids), "bytes": int(token_bytes[ids].sum())}
        for variant, model.model.rotary in variants.items():
            begin = time.perf_counter()
            about[variant] = measure(model, ids, token_bytes, some_lengths, trained)
            about[variant]["seconds"] = time.perf_counter() - begin
        result["texts"][name] = about
        print_table(name, about, list(variants), some_lengths, trained)
    target = args.to or ROOT / "out" / "eval" / f"{path.stem}_length.json"
    write(result, target, list(variants), trained)
    print(f"wrote {checkpoint.shown(target)} and {target.with_suffix('.png').name}")


def print_table(name: str, about: dict, variants: list[str], some_lengths: list[int], trained: int):
    print(f"\n{name}, {about['tokens']:,} tokens: bits per byte")
    print(f"  {'window':>16}" + "".join(f"{variant:>12}" for variant in variants))
    for length in some_lengths:
        times = f"{length / trained:g}x" if length != trained else "trained"
        row = "".join(f"{about[variant]['by_length'][length]:12.4f}" for variant in variants)
        print(f"  {length:>8,} {times:>7}{row}")
    print(f"  places in a window of {some_lengths[-1]:,}")
    for place in about[variants[0]]["by_place"]:
        row = "".join(f"{about[variant]['by_place'][place]:12.4f}" for variant in variants)
        print(f"  {place:>16}{row}")


def write(result: dict, target: Path, variants: list[str], trained: int):
    """JSON and picture; each appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    part.replace(target)
    picture = target.with_suffix(".png")
    part = picture.with_name(picture.name + ".part")
    plot(result, variants, trained, part)
    part.replace(picture)


def plot(result: dict, variants: list[str], trained: int, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = result["texts"]
    figure, axes = plt.subplots(len(texts), 2, figsize=(10, 3.6 * len(texts)), squeeze=False, sharey="row")
    for row, (name, about) in zip(axes, texts.items(), strict=True):
        for variant in variants:
            by_length, by_place = about[variant]["by_length"], about[variant]["by_place"]
            row[0].plot(list(by_length), list(by_length.values()), marker="o", label=variant)
            row[1].plot(range(len(by_place)), list(by_place.values()), marker="o", label=variant)
        row[0].axvline(trained, color="gray", linestyle=":", label="trained length")
        row[0].set(xscale="log", xlabel="tokens in a window", ylabel="bits per byte", title=Path(name).name)
        row[0].set_xticks(list(by_length), [f"{length:,}" for length in by_length], minor=False)
        row[0].minorticks_off()
        row[1].set_xticks(range(len(by_place)), list(by_place))
        row[1].set(xlabel=f"place in a window of {max(by_length):,} tokens", title=Path(name).name)
        for axis in row:
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, parse_args)
