"""Take a model elsewhere, or bring one here; every conversion is measured against the original.

    python scripts/convert_model.py hf --weight full_sft --to minimind-hf       # for transformers, vLLM, trl
    python scripts/convert_model.py hf --weight full_sft --lora_weight lora_identity --to merged-hf
    python scripts/convert_model.py native --folder minimind-hf --name imported # out/imported_512.pth
    python scripts/convert_model.py gguf --weight full_sft --to minimind.gguf --dtype q8_0
    python scripts/convert_model.py peft --lora_weight lora_identity --base minimind-hf --to identity-peft
    python scripts/convert_model.py lora --folder identity-peft --name back     # out/lora/back_512.pth

hf writes a folder that transformers opens as Llama, Qwen3 or Qwen3-MoE, without code of ours; gguf a file for
llama.cpp, Ollama and what is built on them. native reads such a folder, or a released checkpoint of one of
these classes. peft and lora do the same for an adapter of --weight. The certificate (parity.json, or
NAME.parity.json) says how far the logits are apart and whether greedy answers are the same, measured by
loading the written files with the target's own runtime.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

from trainer import cli

UNCHECKED = {"checked": "not checked: --check 0"}


def parse_args(argv=None):
    import eval_llm

    parser = eval_llm.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="hf|gguf|native|peft|lora")
    hf = kinds.add_parser("hf", help="weights of this project -> a transformers folder", allow_abbrev=False)
    hf.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights in it"
    )
    hf.add_argument(
        "--code",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = of this project's own class, with its code, for what fits no class of transformers",
    )
    native = kinds.add_parser("native", help="a transformers folder -> a weight file", allow_abbrev=False)
    native.add_argument("--folder", type=Path, required=True, metavar="DIR", help="with config.json")
    native.add_argument("--name", metavar="NAME", help="of the file NAME_WIDTH.pth, without it the folder's")
    native.add_argument("--save_dir", type=Path, default=ROOT / "out", metavar="DIR", help="where to write")
    gguf = kinds.add_parser("gguf", help="weights of this project -> a GGUF file", allow_abbrev=False)
    gguf.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write, .gguf")
    gguf.add_argument(
        "--dtype",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        default="f16",
        help="of the matrices in it; fewer bits are smaller and less exact",
    )
    peft = kinds.add_parser("peft", help="an adapter -> a folder of peft", allow_abbrev=False)
    peft.add_argument("--lora_weight", required=True, metavar="NAME", help="in out/lora, or a .pth file")
    peft.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base, written by hf")
    peft.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    lora = kinds.add_parser("lora", help="a folder of peft -> an adapter", allow_abbrev=False)
    lora.add_argument("--folder", type=Path, required=True, metavar="DIR", help="with adapter_config.json")
    lora.add_argument(
        "--name", metavar="NAME", help="of the file lora/NAME_WIDTH.pth, without it the folder's"
    )
    for sub in (hf, gguf, peft, lora):
        g = sub.add_argument_group("weights of this project")
        eval_llm.add_weight_flags(g)
        g.add_argument(
            "--tokenizer", type=Path, default=ROOT / "model", metavar="DIR", help="folder of tokenizer.json"
        )
        if sub in (hf, gguf):
            g.add_argument(
                "--lora_weight", default="None", metavar="NAMES", help="adapters to merge: a:0.5,b"
            )
            eval_llm.add_position_flags(g)
    for sub in (hf, gguf, native, peft):
        sub.add_argument("--check", type=cli.switch, default=1, metavar="0|1", help="0 = no certificate")
    return parser.parse_args(argv)


def load(args, **overrides):
    """(path, model, metadata, tokenizer) of the weights that the flags name, without adapters."""
    import eval_llm
    from trainer import checkpoint

    path, tokenizer = eval_llm.find_weights(args), eval_llm.load_tokenizer(args.tokenizer)
    return path, *checkpoint.load_model(path, tokenizer, **overrides), tokenizer


def merge(args, model, path, metadata):
    import eval_llm
    from trainer import checkpoint

    if eval_llm.has_adapters(args):
        for note in checkpoint.merge_adapters(model, args.lora_weight, path.parent, metadata):
            print(note)


def to_hf(args):
    import eval_llm
    from scripts.certificate import certify_transformers
    from scripts.convert_hf import write_folder
    from trainer.checkpoint import shown

    path, model, metadata, tokenizer = load(args, **eval_llm.position_overrides(args))
    merge(args, model, path, metadata)
    write_folder(model, args.tokenizer, args.to, args.dtype, bool(args.code))
    print(f"wrote {shown(args.to)} from {shown(path)}")
    certificate = UNCHECKED
    if args.check:
        certificate = certify_transformers(args.to, model, tokenizer, args.dtype, code=bool(args.code))
    finish(certificate, args.to / "parity.json")


def to_gguf(args):
    import eval_llm
    from scripts.certificate import certify_gguf
    from scripts.convert_gguf import write_gguf, write_modelfile
    from trainer.checkpoint import CheckpointError, shown

    if args.to.suffix != ".gguf":
        raise CheckpointError(f"--to {args.to}: the name of a GGUF file ends in .gguf")
    path, model, metadata, tokenizer = load(args, **eval_llm.position_overrides(args))
    merge(args, model, path, metadata)
    write_gguf(model, args.tokenizer, args.to, args.dtype, args.to.stem)
    print(f"wrote {shown(args.to)} ({args.to.stat().st_size / 2**20:.1f} MB) from {shown(path)}")
    print(f"wrote {shown(write_modelfile(args.to, model.config))}: ollama create {args.to.stem} -f it")
    certificate = certify_gguf(args.to, model, tokenizer, args.dtype) if args.check else UNCHECKED
    finish(certificate, args.to.with_suffix(".parity.json"))


def to_native(args):
    import eval_llm
    from scripts.certificate import certify_transformers
    from scripts.convert_hf import load_folder
    from trainer import checkpoint

    model, content = load_folder(args.folder)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    name = args.name or args.folder.resolve().name
    path = args.save_dir / f"{checkpoint.stem(name, model.config)}.pth"
    if path.exists():
        raise checkpoint.CheckpointError(f"{checkpoint.shown(path)} exists already: give another --name")
    metadata = {"stage": "imported", "parent": {"weight": content.get("model_type")}}
    tokenizer = None
    if (args.folder / "tokenizer.json").exists():
        tokenizer = eval_llm.load_tokenizer(args.folder)
        metadata["tokenizer"] = checkpoint.tokenizer_hash(tokenizer)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.save_weights(model, path, metadata, dtype)
    print(f"wrote {checkpoint.shown(path)} ({dtype})")
    if content.get("model_type") == "minimind":
        certificate = {"checked": "not checked: transformers has no class of this name, and no code is run"}
    elif not args.check:
        certificate = UNCHECKED
    elif tokenizer is None:
        certificate = {"checked": "not checked: there is no tokenizer.json in the folder"}
    else:
        written, _ = checkpoint.load_model(path)
        certificate = certify_transformers(args.folder, written.float(), tokenizer, dtype)
    try:
        finish(certificate, path.with_suffix(".parity.json"))
    except checkpoint.CheckpointError:
        path.unlink()  # nobody shall find it by its name
        raise


def to_peft(args):
    from scripts.certificate import certify_transformers
    from scripts.convert_peft import write_peft_folder
    from trainer import checkpoint

    if not (args.base / "config.json").exists():
        raise checkpoint.CheckpointError(f"--base {args.base} is no transformers folder: hf writes one")
    path, model, metadata, tokenizer = load(args)
    adapter = checkpoint.find_adapter(args, model.config, args.lora_weight)
    state, settings, _ = checkpoint.read_adapter(adapter)
    merge(args, model, path, metadata)
    write_peft_folder(state, settings, model.config.num_hidden_layers, args.base, args.to)
    print(f"wrote {checkpoint.shown(args.to)} from {checkpoint.shown(adapter)}")
    certificate = UNCHECKED
    if args.check:
        certificate = certify_transformers(args.base, model, tokenizer, "float32", adapter=args.to)
    finish(certificate, args.to / "parity.json")


def to_lora(args):
    from model.model_lora import apply_lora
    from scripts.convert_peft import read_peft_folder
    from trainer import checkpoint

    path, model, metadata, _ = load(args)
    state, settings = read_peft_folder(args.folder)
    checkpoint.require_finite_file(state, args.folder)
    try:
        apply_lora(model, state, settings)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{checkpoint.shown(args.folder)}: {error}") from None
    name = checkpoint.stem(args.name or args.folder.resolve().name, model.config)
    target = args.save_dir / "lora" / f"{name}.pth"
    if target.exists():
        raise checkpoint.CheckpointError(f"{checkpoint.shown(target)} exists already: give another --name")
    target.parent.mkdir(parents=True, exist_ok=True)
    parent = {"weight": metadata.get("stage"), "step": metadata.get("step"), "crc32": metadata.get("crc32")}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    checkpoint.save_adapter(settings, model, target, {"stage": "lora", "parent": parent}, dtype)
    print(f"wrote {checkpoint.shown(target)}, {len(state)} tensors for {checkpoint.shown(path)}")


def finish(certificate: dict, path: Path):
    from scripts.convert_hf import write_json
    from trainer.checkpoint import CheckpointError, shown

    write_json(path, certificate)
    for name, value in certificate.items():
        print(f"  {name:32} {value}")
    print(f"certificate: {shown(path)}")
    if certificate.get("passed") is False:
        raise CheckpointError("the converted model does not answer as the original does: do not use it")


def main(args):
    {"hf": to_hf, "gguf": to_gguf, "native": to_native, "peft": to_peft, "lora": to_lora}[args.kind](args)


if __name__ == "__main__":
    cli.run(main, parse_args)
