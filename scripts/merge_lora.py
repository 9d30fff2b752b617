"""Merge adapters into the weights they were trained on: one file that needs no adapter.

    python scripts/merge_lora.py --weight out/full_sft_512.pth --lora_weight lora_identity
    python scripts/merge_lora.py --weight out/dpo_512.pth --lora_weight lora_a:0.5,lora_b

W + s B A is computed in float32 and rounded once, to the type of the base's file. The base stays as it is.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=Path, required=True, metavar="FILE", help="weights of the base")
    parser.add_argument(
        "--lora_weight",
        required=True,
        metavar="NAMES",
        help="adapters in the folder lora beside it, or .pth files; NAME:0.5 = half of it",
    )
    parser.add_argument(
        "--save_path", type=Path, metavar="FILE", help="where to write (default: base and adapter's names)"
    )
    return parser.parse_args(argv)


def main(args):
    from trainer import checkpoint

    state, metadata = checkpoint.read_weights(args.weight)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    model, _ = checkpoint.load_model(args.weight)
    for note in checkpoint.merge_adapters(model, args.lora_weight, args.weight.parent, metadata):
        print(note)
    base, _, tail = args.weight.stem.rpartition(f"_{model.config.hidden_size}")
    names = "+".join(Path(name).stem for name, _ in checkpoint.named_adapters(args.lora_weight))
    default = args.weight.with_name(f"{base}+{names}_{model.config.hidden_size}{tail}.pth")
    path = args.save_path or default
    kept = {k: v for k, v in metadata.items() if k not in ("config", "crc32", "format")}
    checkpoint.save_weights(model, path, {**kept, "merged": args.lora_weight}, dtype)
    print(f"wrote {checkpoint.shown(path)}; talk to it: python eval_llm.py --weight {checkpoint.shown(path)}")


if __name__ == "__main__":
    from trainer import cli

    cli.run(main, parse_args)
