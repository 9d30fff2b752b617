"""Names on disk, weights for others, and the exact state of a run.

    out/{weight}_{hidden}{_moe}.pth                 what other stages load: a state dict + "__metadata__"
    checkpoints/{weight}_{hidden}{_moe}_resume.pth  what continues this run: float32 weights, optimizers,
                                                    step, settings

Files appear whole or not at all: they are written beside their place, flushed to the disk, and renamed.
Nothing is ever unpickled: `torch.load(weights_only=True)` reads tensors and plain values only. Every file
carries a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
import zlib
from pathlib import Path

METADATA = "__metadata__"
FORMAT = 1

# Settings that do not change the numbers of a run, or that are compared in another form (see
# changed_settings).
FREE_SETTINGS = set(
    """data_path val_path val_fraction val_fraction_given val_interval cache_dir num_workers from_weight
    save_dir save_dtype save_interval checkpoint_dir from_resume log_interval use_wandb tracker wandb_project
    tax_path device dtype use_compile num_threads started epochs max_steps max_minutes batch_size
    accumulation_steps pack max_seq_len preset
    plan tokens_at_once debug_mode debug_interval debug_log_ratio val_prompts pass_k
    rollout_url rollout_shared_path judge_url""".split()
)


class CheckpointError(ValueError):
    """A weight or resume file is missing, damaged, or does not fit; the message is one line with a remedy."""


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def stem(weight: str, config) -> str:
    return f"{weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def weight_path(args, config, weight: str | None = None) -> Path:
    """Where weights of this name and width lie; default: those this run writes."""
    return Path(args.save_dir) / f"{stem(weight or args.save_weight, config)}.pth"


def resume_path(args, config) -> Path:
    return Path(args.checkpoint_dir) / f"{stem(args.save_weight, config)}_resume.pth"


def shown(path: Path) -> str:
    """A path as short as it can be typed."""
    path = Path(path).absolute()
    for base in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


# --------------------------------------------------------------------------------------------------
# Writing and reading a file
# --------------------------------------------------------------------------------------------------


class _Stream:
    """A binary file for torch.save that remembers the error behind torch's own message."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def write_file(content: dict, path: Path):
    """Save atomically: beside the place, flushed, renamed. Raises CheckpointError, and keeps the previous
    file, when the disk is full or the folder cannot be written."""
    import torch

    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(t.numel() * t.element_size() for t in distinct_tensors(content))
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        with temporary.open("wb") as file:
            stream = _Stream(file)
            try:
                torch.save(content, stream)
            except RuntimeError:  # torch reports a failed write as its own error
                raise stream.error or OSError(errno.EIO, "torch could not write the file") from None
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if full else "Make the folder writable"
        kept = "the previous file is still there" if path.exists() else "no file was left behind"
        raise CheckpointError(
            f"could not save {shown(path)} ({'disk full: ' if full else ''}{error.strerror or error}); "
            f"{kept}. {remedy}, or choose other folders with --save_dir and --checkpoint_dir"
        ) from None
    if hasattr(os, "O_DIRECTORY"):  # the rename itself survives a power cut (POSIX only)
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def read_file(path: Path, mmap: bool = False) -> dict:
    """The content of a file written by torch.save, tensors on the CPU (with mmap: read from the disk when
    they are used). Raises CheckpointError when it is missing, cut short, changed, or holds anything but
    tensors and plain values."""
    import torch

    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)} does not exist") from None
    except pickle.UnpicklingError as error:
        first = re.split(r"\. |\n", str(error).strip())[0]
        raise CheckpointError(
            f"{shown(path)} holds more than tensors and plain values, or is no weight file at all, and was "
            f"not opened: such a file could run code. Get it again from a source you trust ({first[:120]})"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AssertionError,
        AttributeError,
        struct.error,
        zipfile.BadZipFile,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EISDIR):
            raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror}") from None
        raise CheckpointError(
            f"{shown(path)} is damaged ({path.stat().st_size:,} bytes; probably cut short while it was "
            "copied or downloaded): get it again, or run the stage that writes it"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown(path)} does not hold a state dict but a {type(content).__name__}")
    return content


def distinct_tensors(content) -> list:
    """All tensors inside nested dicts and lists, shared storage (tied weights) once."""
    import torch

    found = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            found.setdefault(
                (value.data_ptr(), value.numel(), value.dtype) if value.numel() else id(value), value
            )
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(content)
    return list(found.values())


def checksum(content) -> int:
    """CRC-32 of nested dicts, lists, tensors and plain values, in order."""
    import torch

    def visit(value, crc):
        if isinstance(value, torch.Tensor):
            crc = zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode(), crc)
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return zlib.crc32(raw.numpy().data, crc)
        if isinstance(value, dict):
            for key, item in value.items():
                crc = visit(item, zlib.crc32(repr(key).encode(), crc))
            return crc
        if isinstance(value, list | tuple):
            for item in value:
                crc = visit(item, crc)
            return crc
        return zlib.crc32(repr(value).encode(), crc)

    return visit(content, 0)


def require_finite(tensors, path: Path):
    """Weights that are not numbers must never replace good ones."""
    import torch

    bad = [~torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    if bad and torch.stack([b.cpu() for b in bad]).any():
        kept = "the previous file is still there" if Path(path).exists() else "no file was written"
        raise CheckpointError(
            f"the weights contain NaN or infinity and were not saved to {shown(path)}; {kept}. Lower "
            "--learning_rate, or go back to the last save with --from_resume 1"
        )


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def tokenizer_hash(tokenizer) -> str:
    """Identifies the vocabulary: everything that decides the ids of a text."""
    from dataset.lm_dataset import TextEncoder

    return TextEncoder.of(tokenizer).fingerprint(with_template=False)[:16]


def load_tokenizer():
    """The vocabulary and chat template in model/."""
    from transformers import (
        PreTrainedTokenizerFast,
    )  # AutoTokenizer first imports every model's configuration

    return PreTrainedTokenizerFast.from_pretrained(Path(__file__).resolve().parents[1] / "model")


def template_hash(tokenizer) -> str:
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]


def save_weights(model, path: Path, metadata: dict, dtype: str = "float32", state: dict | None = None):
    """Write a model's state dict, or a part of it, and what it is: `metadata` must hold plain values; the
    config is added here."""
    import torch

    dtype = getattr(torch, dtype)
    tensors, state, seen = model.state_dict() if state is None else state, {}, {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)  # a tied tensor is converted, and stored, once
        if key not in seen:
            seen[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = seen[key]
    require_finite(seen.values(), path)
    metadata = {"format": FORMAT, "config": plain_config(model.config), **metadata}
    metadata["crc32"] = checksum([state, metadata])
    write_file({**state, METADATA: metadata}, path)


def plain_config(config) -> dict:
    """A configuration as plain values, without what transformers adds about itself."""
    skip = {"transformers_version", "architectures", "dtype", "_name_or_path"}
    return {k: v for k, v in config.to_dict().items() if k not in skip and is_plain(v)}


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def read_weights(path: Path) -> tuple[dict, dict]:
    """(state dict, metadata) of a weight file; metadata is empty for files of other projects (MiniMind's
    .pth)."""
    content = read_file(path)
    metadata = content.pop(METADATA, {})
    if "model" in content and isinstance(content["model"], dict):
        raise CheckpointError(
            f"{shown(path)} is a resume file: continue it with --from_resume 1, or load a file of out/"
        )
    if not content or not all(hasattr(t, "dtype") for t in content.values()):
        raise CheckpointError(f"{shown(path)} does not hold a state dict of tensors")
    if metadata:
        crc = metadata.get("crc32")
        if crc != checksum([content, {k: v for k, v in metadata.items() if k != "crc32"}]):
            raise CheckpointError(
                f"{shown(path)} was changed after it was written (checksum differs): get it again"
            )
    return content, metadata


def load_weights(model, path: Path, tokenizer=None) -> dict:
    """Fill `model` from a file, strictly; returns its metadata. Raises CheckpointError with one sentence
    that names both sides when architecture, vocabulary, names or shapes differ."""
    import torch

    state, metadata = read_weights(path)
    config = model.config
    tied = config.tie_word_embeddings and hasattr(model, "lm_head")  # a reward model has no head
    if tied and "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if tied and "lm_head.weight" in state:
        head, embedding = state["lm_head.weight"], state.get("model.embed_tokens.weight")
        if embedding is not None and (head.shape != embedding.shape or not torch.equal(head, embedding)):
            raise CheckpointError(
                f"{shown(path)} has an output head of its own, this model shares the embedding: pass "
                "--tie_word_embeddings 0"
            )
    mine, theirs = plain_config(config), metadata.get("config") or describe_state(state)
    differing = [f for f in ARCHITECTURE_FIELDS if f in theirs and f in mine and theirs[f] != mine[f]]
    if differing:
        flags = " ".join(f"--{f} {int(v) if isinstance(v := theirs[f], bool) else v}" for f in differing)
        sides = ", ".join(f"{f} {theirs[f]} (this run: {mine[f]})" for f in differing)
        raise CheckpointError(f"{shown(path)} was made with {sides}: pass {flags}, or other weights")
    if tokenizer is not None and metadata.get("tokenizer") not in (None, tokenizer_hash(tokenizer)):
        raise CheckpointError(
            f"{shown(path)} was trained with vocabulary {metadata['tokenizer']}, this run uses "
            f"{tokenizer_hash(tokenizer)}: the same number would mean another token. Restore "
            "model/tokenizer.json, or train anew with --from_weight none"
        )
    target = model.state_dict()
    missing, unexpected = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    if missing or unexpected:
        words = [f"lacks {few(missing)}"] * bool(missing) + [f"also has {few(unexpected)}"] * bool(unexpected)
        raise CheckpointError(
            f"{shown(path)} {' and '.join(words)} compared with this model: choose matching flags or weights"
        )
    wrong = [n for n in target if target[n].shape != state[n].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{shown(path)}: {name} is {tuple(state[name].shape)}, this model wants "
            f"{tuple(target[name].shape)} ({len(wrong)} such tensors): choose matching flags or weights"
        )
    require_finite_file(state, path)
    model.load_state_dict(state, strict=True)
    return metadata


# --------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------


def adapter_path(args, config, name: str | None = None) -> Path:
    """Where the adapter of this name and width is written: out/lora/lora_xxx_512.pth."""
    folder = Path(args.save_dir)
    return (
        folder if folder.name == "lora" else folder / "lora"
    ) / f"{stem(name or args.save_weight, config)}.pth"


def find_adapter(args, config, name: str) -> Path:
    """The file of an adapter: a path, or a name in out/lora (or in out, where MiniMind-3 puts it)."""
    if name.endswith(".pth"):
        return Path(name)
    place = adapter_path(args, config, name)
    beside = Path(args.save_dir) / place.name
    return beside if beside.exists() and not place.exists() else place


def save_adapter(lora_config, model, path: Path, metadata: dict, dtype: str = "float32"):
    """Write the trained adapter alone, with its settings and the checksum of the base it was trained on."""
    from model.model_lora import lora_state

    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(lora_config).items()}
    save_weights(model, path, {**metadata, "lora": settings}, dtype, lora_state(model))


def read_adapter(path: Path):
    """(tensors, LoRAConfig, metadata) of an adapter file; also of MiniMind's (`....lora.A.weight`, no scale).
    Raises CheckpointError for a file that holds none."""
    from model.model_lora import LoRAConfig

    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        hint = f" (there is {', '.join(near[:4])})" if near else ""
        raise CheckpointError(f"{shown(path)} does not exist{hint}: train it with trainer/train_lora.py")
    state, metadata = read_weights(path)
    state = {name.removeprefix("module.").removesuffix(".weight"): t for name, t in state.items()}
    if not all(".lora." in name for name in state):
        raise CheckpointError(f"{shown(path)} holds whole weights, not an adapter: give it as --weight")
    settings = metadata.get("lora")
    if settings is None:  # MiniMind's files: y = x W^T + x A^T B^T
        rank = next((t.shape[0] for name, t in state.items() if name.endswith(".A")), 0)
        settings = {"rank": rank, "alpha": float(rank)}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    require_finite_file(state, path)
    return state, LoRAConfig(**settings), metadata


def load_adapter(model, path: Path, base: dict, name: str = "default", scale: float = 1.0) -> str | None:
    """Add a trained adapter to a model whose file has the metadata `base`. Returns a sentence when it was
    trained on other weights of the same architecture; raises CheckpointError when it cannot fit."""
    from model.model_lora import apply_lora

    state, lora_config, metadata = read_adapter(path)
    mine, theirs = plain_config(model.config), metadata.get("config", {})
    differing = [f for f in ARCHITECTURE_FIELDS if f in theirs and f in mine and theirs[f] != mine[f]]
    if differing:
        sides = ", ".join(f"{f} {theirs[f]} (this base: {mine[f]})" for f in differing)
        raise CheckpointError(f"{shown(path)} was trained on a base with {sides}: use it with that base")
    if has_scaled_positions(theirs):
        if has_scaled_positions(mine) and mine["rope_parameters"] != theirs["rope_parameters"]:
            raise CheckpointError(
                f"{shown(path)} was trained with other positions ({theirs['rope_parameters']}) than the base "
                f"or an adapter before it has ({mine['rope_parameters']}): they do not go together"
            )
        take_positions(model.config, theirs)
    try:
        apply_lora(model, state, lora_config, name, scale)
    except ValueError as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None
    parent = metadata.get("parent") or {}
    if parent.get("crc32") not in (None, base.get("crc32")):
        return (
            f"note: {shown(path)} was trained on other weights ({parent.get('weight')}, step "
            f"{parent.get('step')}) than these ({base.get('stage')}, step {base.get('step')})"
        )
    return None


def named_adapters(names: str) -> list[tuple[str, float]]:
    """The names and strengths in "lora_a:0.5,lora_b": [("lora_a", 0.5), ("lora_b", 1.0)]. Raises
    CheckpointError when there is no name, or a strength that is no number of at least 0."""
    found = []
    for part in filter(None, map(str.strip, names.split(","))):
        name, colon, strength = part.rpartition(":")
        if not colon or re.search(r"[\\/]", strength):  # the colon of a Windows drive
            name, strength = part, "1"
        if not re.fullmatch(r"\d+\.?\d*|\.\d+", strength):
            raise CheckpointError(
                f"--lora_weight {part}: {strength!r} is no strength; write a number of at least 0, {name}:0.5"
            )
        found.append((name.strip(), float(strength)))
    if not found:
        raise CheckpointError(f"--lora_weight {names!r} names no adapter: give a name, or NAME:0.5 for half")
    return found


def merge_adapters(model, names: str, save_dir, base: dict) -> list[str]:
    """Merge the adapters `names` ("lora_a", or "lora_a:0.5,lora_b": half of one and all of another; names or
    .pth files) into a model whose file has the metadata `base`. Returns what is worth a word."""
    from types import SimpleNamespace

    from model.model_lora import merge_lora

    notes = []
    for number, (name, strength) in enumerate(named_adapters(names)):
        path = find_adapter(SimpleNamespace(save_dir=save_dir), model.config, name)
        notes.append(load_adapter(model, path, base, f"adapter{number}", strength))
    merge_lora(model)
    return [note for note in notes if note]


MOE_FIELDS = tuple(
    "num_experts num_experts_per_tok n_shared_experts moe_intermediate_size norm_topk_prob".split()
)
ARCHITECTURE_FIELDS = (
    *"""vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size qk_norm rope_theta rms_norm_eps tie_word_embeddings use_moe""".split(),
    *MOE_FIELDS,
)


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_finite_file(state: dict, path: Path):
    import torch

    bad = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise CheckpointError(
            f"{shown(path)} contains NaN or infinity in {few(bad)}: these weights are broken; use an "
            "earlier file or train the stage again"
        )


def describe_state(state: dict) -> dict:
    """What the shapes of a state dict without metadata say about its architecture."""
    found = {}
    if "model.embed_tokens.weight" in state:
        found["vocab_size"], found["hidden_size"] = state["model.embed_tokens.weight"].shape
    layers = {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}
    if layers:
        found["num_hidden_layers"] = max(layers) + 1
        found["qk_norm"] = "model.layers.0.self_attn.q_norm.weight" in state
        experts = {name.split(".")[5] for name in state if name.startswith("model.layers.0.mlp.experts.")}
        found["use_moe"] = bool(experts)
        if experts:
            shared = {n.split(".")[5] for n in state if n.startswith("model.layers.0.mlp.shared_experts.")}
            found["num_experts"], found["n_shared_experts"] = len(experts), len(shared)
            width = state["model.layers.0.mlp.experts.0.gate_proj.weight"].shape[0]
            found["moe_intermediate_size"] = width
        elif "model.layers.0.mlp.gate_proj.weight" in state:
            found["intermediate_size"] = state["model.layers.0.mlp.gate_proj.weight"].shape[0]
    return found


def guess_config(state: dict) -> dict:
    """Fields of a MiniMindConfig for a file without metadata (MiniMind's own .pth). What shapes do not tell
    is taken from MiniMind's two generations: 8 heads; with QK-norm eps 1e-6 and top-1 without shared
    expert, else 1e-5 and top-2."""
    found = describe_state(state)
    if "num_hidden_layers" not in found or "hidden_size" not in found:
        raise CheckpointError("this state dict is not a MiniMind model: it has no embedding or no layers")
    q_rows = state["model.layers.0.self_attn.q_proj.weight"].shape[0]
    k_rows = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
    norm = state.get("model.layers.0.self_attn.q_norm.weight")
    head_dim = norm.shape[0] if norm is not None else q_rows // 8
    found |= {
        "head_dim": head_dim,
        "num_attention_heads": q_rows // head_dim,
        "num_key_value_heads": k_rows // head_dim,
    }
    found["rms_norm_eps"] = 1e-6 if found["qk_norm"] else 1e-5
    if found["use_moe"]:
        found["num_experts_per_tok"] = 2 if found["n_shared_experts"] else 1
        found["intermediate_size"] = found["moe_intermediate_size"]
    head, embedding = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    found["tie_word_embeddings"] = head is None or (
        head.shape == embedding.shape and bool((head == embedding).all())
    )
    return found


def load_model(path: Path, tokenizer=None, **overrides):
    """(model in eval mode on the CPU, metadata) from a weight file alone: the architecture comes from its
    metadata, or from its shapes. For eval_llm and the scripts. overrides: fields of the configuration, such
    as inference_rope_scaling."""
    from model.model_minimind import MiniMindConfig, MiniMindLM

    state, metadata = read_weights(path)
    fields = metadata.get("config") or guess_config(state)
    del state
    if has_scaled_positions(fields):
        refuse_other_positions(fields, overrides.get("inference_rope_scaling"), overrides.get("yarn_factor"))
        overrides = {k: v for k, v in overrides.items() if k not in ("inference_rope_scaling", "yarn_factor")}
    try:
        config = MiniMindConfig(**{**fields, **overrides})
    except ValueError as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None
    model = MiniMindLM(config)
    return model.eval(), load_weights(model, path, tokenizer)


def new_model(args, tokenizer, rt):
    """The model of the architecture flags with random weights, the same on every process."""
    import torch

    from model.model_minimind import MiniMindLM
    from trainer.cli import model_config
    from trainer.runtime import mix_seed

    config = model_config(args)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} entries, --vocab_size {config.vocab_size} cannot hold "
            f"them: pass --vocab_size {len(tokenizer)}"
        )
    torch.manual_seed(mix_seed(args.seed))
    return MiniMindLM(config)


def load_from_weight(model, args, tokenizer, rt) -> dict | None:
    """What --from_weight asks for: None for `none`, else the weights are loaded and their origin returned.
    `auto` (reasoning): those of preference learning, or of fine-tuning where there are none."""
    if args.from_weight == "auto":
        args.from_weight = "dpo" if weight_path(args, model.config, "dpo").exists() else "full_sft"
    if args.from_weight == "none":
        return None
    path = weight_path(args, model.config, args.from_weight)
    if not path.exists():
        raise CheckpointError(missing_weight(path, args.from_weight))
    metadata = load_weights(model, path, tokenizer)
    rt.print(f"loaded {len(model.state_dict())} tensors from {shown(path)}")
    adopt_positions(model.config, metadata.get("config", {}), args)
    if model.config.rope_parameters["rope_type"] != "default":
        rt.print(describe_positions(model.config))
    if metadata.get("template") not in (None, template_hash(tokenizer)):
        rt.print(f"note: {shown(path)} was trained with another chat template than model/chat_template.jinja")
    return {"weight": args.from_weight, "step": metadata.get("step"), "crc32": metadata.get("crc32")}


def adopt_positions(config, theirs: dict, args):
    """Take from the configuration of a file what its weights know of positions: the longest length they were
    trained at, and YaRN's settings, which they cannot do without once they were trained with them. With
    --inference_rope_scaling 1 weights without such are stretched from that length."""
    if has_scaled_positions(theirs):
        refuse_other_positions(theirs, args.inference_rope_scaling, args.yarn_factor)
        take_positions(config, theirs)
        return
    if args.original_max_position_embeddings is None:
        length = theirs.get("original_max_position_embeddings", config.original_max_position_embeddings)
        config.original_max_position_embeddings = length
    if config.inference_rope_scaling:
        config.stretch_positions()


def has_scaled_positions(config: dict) -> bool:
    return (config.get("rope_parameters") or {}).get("rope_type", "default") != "default"


def take_positions(config, theirs: dict):
    """Everything that is about positions, from the plain values of a configuration into another."""
    names = "rope_parameters rope_theta inference_rope_scaling yarn_factor"
    for name in f"{names} max_position_embeddings original_max_position_embeddings".split():
        value = theirs.get(name, getattr(config, name))
        setattr(config, name, dict(value) if isinstance(value, dict) else value)


def refuse_other_positions(theirs: dict, scaling, factor):
    """Weights with scaled positions are what they are: flags that ask for others are an error."""
    rope = theirs["rope_parameters"]
    if scaling and (rope["rope_type"] != "yarn" or factor not in (None, rope["factor"])):
        kind = "YaRN" if rope["rope_type"] == "yarn" else rope["rope_type"]
        raise CheckpointError(
            f"these weights were trained with positions stretched by {kind} x{rope['factor']:g}, and keep "
            "them: leave out --inference_rope_scaling and --yarn_factor"
        )


def describe_positions(config) -> str:
    rope = config.rope_parameters
    kind = "YaRN" if rope["rope_type"] == "yarn" else rope["rope_type"]
    return f"positions: {kind} x{rope['factor']:g} over {rope['original_max_position_embeddings']:,}"


def note_length(config, dataset, args, fresh: bool):
    """Write the length of what will be learned into the configuration, as the longest length its weights were
    trained at, where they have not met a longer one before. fresh: they were trained on nothing before. With
    YaRN it stays the length before stretching, which YaRN needs."""
    length = getattr(dataset, "length_of_pieces", None)
    plain = config.rope_parameters["rope_type"] == "default"
    if length and plain and args.original_max_position_embeddings is None:
        before = 0 if fresh else config.original_max_position_embeddings
        config.original_max_position_embeddings = max(length, before)


def load_parent(args, parent: dict | None, tokenizer, rt):
    """The frozen model that this run began with, once more; None when its file is gone or another."""
    if parent is None:
        return None
    from trainer.cli import model_config

    path = weight_path(args, model_config(args), parent["weight"])
    try:
        model, metadata = load_model(path, tokenizer)
    except CheckpointError:
        return None
    if metadata.get("crc32") != parent["crc32"]:
        return None
    config = model_config(args)  # positions as the run has them: YaRN may have come with its flags
    adopt_positions(config, metadata.get("config", {}), args)
    take_positions(model.config, plain_config(config))
    return model.requires_grad_(False).to(rt.device)


def load_teacher(args, config, tokenizer, rt):
    """(frozen teacher in eval mode on the device, checksum of its weights): --from_teacher_weight and the
    other --teacher flags, for a student with `config`. Raises CheckpointError for a teacher that is not
    there, of another depth, or of another vocabulary."""
    from types import SimpleNamespace

    name = args.from_teacher_weight
    shape = SimpleNamespace(hidden_size=args.teacher_hidden_size, use_moe=bool(args.teacher_use_moe))
    path = Path(name) if name.endswith(".pth") else weight_path(args, shape, name)
    if not path.exists():
        missing = f"{shown(path)} does not exist"
        if not name.endswith(".pth"):  # a stage, which somebody can run
            missing = missing_weight(path, name).split(", or pass")[0]
        raise CheckpointError(
            f"{missing}, or choose a teacher with --from_teacher_weight, --teacher_hidden_size, "
            "--teacher_use_moe"
        )
    teacher, metadata = load_model(path)
    size, vocabulary = teacher.config.vocab_size, metadata.get("tokenizer")
    mine = tokenizer_hash(tokenizer)
    if size != config.vocab_size or vocabulary not in (None, mine):
        theirs = f"{vocabulary or 'unknown'}, {size:,} entries"
        raise CheckpointError(
            f"{shown(path)}: the teacher's vocabulary ({theirs}) is not the student's ({mine}, "
            f"{config.vocab_size:,} entries), and distributions over different tokens cannot be compared. "
            "Choose another teacher, or distil its text (scripts/write_answers.py)"
        )
    depth = teacher.config.num_hidden_layers
    if args.teacher_num_layers not in (None, depth):
        raise CheckpointError(
            f"{shown(path)} has {depth} layers, not {args.teacher_num_layers}: pass "
            f"--teacher_num_layers {depth}, or other weights"
        )
    million = sum(p.numel() for p in teacher.parameters()) / 1e6
    rt.print(f"teacher: {shown(path)}, {million:.2f}M parameters")
    crc32 = metadata.get("crc32") or checksum(teacher.state_dict())  # MiniMind's files have none
    return teacher.requires_grad_(False).to(rt.device), crc32


def load_reward_model(path: Path, tokenizer=None):
    """(RewardModel in eval mode on the CPU, metadata) from the file that trainer/train_reward.py wrote."""
    from model.model_minimind import MiniMindConfig
    from model.model_reward import RewardModel

    state, metadata = read_weights(path)
    if "score.weight" not in state:
        raise CheckpointError(
            f"{shown(path)} is no reward model (score.weight is missing): trainer/train_reward.py trains one"
        )
    if "config" not in metadata:
        raise CheckpointError(
            f"{shown(path)} does not say which architecture it has: only files of trainer/train_reward.py do"
        )
    model = RewardModel(MiniMindConfig(**metadata["config"]))
    return model.eval(), load_weights(model, path, tokenizer)


def missing_weight(path: Path, weight: str) -> str:
    """The sentence for weights that are not there: who writes them, and what similar files lie beside."""
    script = Path(__file__).with_name(f"train_{weight}.py")
    who = (
        f"It is written by the stage {weight!r}: run trainer/{script.name} first"
        if script.exists()
        else "Train it first"
    )
    near = sorted(p.name for p in path.parent.glob(f"{weight}_*.pth")) if path.parent.is_dir() else []
    hint = f" (there is {', '.join(near[:4])}: --preset or --hidden_size chooses the width)" if near else ""
    return f"{shown(path)} does not exist{hint}. {who}, or pass --from_weight none to start from scratch"


# --------------------------------------------------------------------------------------------------
# The state of a run
# --------------------------------------------------------------------------------------------------


def save(model, optimizers, args, rt, run: dict, log, path=None, write=None, trainable_only=False, **extra):
    """After a finished optimizer step: the weights for others, then everything to continue. All processes
    call it, the first one writes.

    `run` says what this run is (see describe). `write(model, path, metadata, dtype)` writes the weights to
    `path` (default: save_weights, weight_path). trainable_only: frozen weights are not part of the resume
    file. `extra`: what else the stage must find again in `find_resume(...)["extra"]` (plain values or
    tensors).
    """
    from trainer.runtime import bare

    log_state = log.state_dict()  # adds up over processes
    if not rt.is_main:
        return
    model = bare(model)
    path = path or weight_path(args, model.config)
    now = {"step": log.done, "metrics": log.latest, "sittings": log.sittings}
    (write or save_weights)(model, path, {**run, **now}, args.save_dtype)
    kept = [(n, p) for n, p in model.named_parameters() if p.requires_grad or not trainable_only]
    content = {
        "format": FORMAT,
        "model": {name: tensor.detach().float().cpu() for name, tensor in kept},
        "buffers": {name: tensor.detach().cpu() for name, tensor in model.named_buffers()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": rt.scaler.state_dict() if rt.scaler is not None else None,
        "step": log.done,
        "rows_seen": log.done * args.batch_size * args.accumulation_steps,
        "skipped": rt.skipped,
        "settings": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "started"
        },
        "config": plain_config(model.config),
        "dtype": str(rt.dtype),
        "device": rt.device.type,
        "world_size": rt.world_size,
        "run": run,
        "log": log_state,
        "extra": extra,
    }
    content["crc32"] = checksum(content)
    write_file(content, resume_path(args, model.config))


def describe(stage: str, args, tokenizer, data: str, total_steps: int, parent: dict | None) -> dict:
    """What a run is, for the metadata of its files: stage, vocabulary, template, data (fingerprint),
    length, and the weights it started from."""
    return {
        "stage": stage,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "data": data,
        "total_steps": total_steps,
        "parent": parent,
        "seed": args.seed,
    }


def find_resume(args, config, tokenizer, data: str, num_rows: int, rt) -> dict | None:
    """The state to continue, or None to start fresh. Refuses changed settings, naming old -> new.

    A run by --max_minutes goes on with the number of steps that its time was turned into (args.max_steps is
    set).
    """
    import torch

    from trainer import batches

    path = resume_path(args, config)
    if not args.from_resume:
        if path.exists() and rt.is_main:
            rt.print(
                f"note: {shown(path)} of an earlier run will be replaced at the first save (--from_resume "
                "1 continues it)"
            )
        return None
    if not path.exists():
        rt.print(f"nothing to resume: {shown(path)} does not exist; starting fresh")
        return None
    content = read_file(path)
    if "settings" not in content or "optimizers" not in content:
        raise CheckpointError(
            f"{shown(path)} is not a resume file of this project: pass --from_resume 0 to start fresh"
        )
    if content.pop("crc32", None) != checksum(content):
        raise CheckpointError(
            f"{shown(path)} was changed after it was written (checksum differs): pass --from_resume 0"
        )
    if args.max_minutes and not args.max_steps:
        args.max_steps = content["run"]["total_steps"]  # the time was turned into steps when the run began
    if args.use_compile == "auto":
        args.use_compile = content["settings"]["use_compile"]  # compiled code rounds in another order
    now = describe(content["run"]["stage"], args, tokenizer, data, batches.num_steps(num_rows, args), None)
    changes = changed_settings(content, args, config, now)
    if changes:
        raise CheckpointError(
            f"{shown(path)} belongs to another run ({'; '.join(changes)}). Continue with the old settings, "
            "or start a new run with --from_resume 0, for example from its weights with --from_weight "
            f"{args.save_weight}"
        )
    adopt_positions(config, content["config"], args)
    if str(args.use_compile) != content["settings"]["use_compile"]:
        rt.print("torch.compile was switched; the continuation will not be bit-equal")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    rt.print(
        f"resuming {shown(path)} of {when}: {content['step']} of {content['run']['total_steps']} steps are "
        "done"
    )
    if content["world_size"] != rt.world_size:
        rt.print(
            f"processes: {content['world_size']} -> {rt.world_size}; the rows of every step stay the same, "
            "sums may differ in the last digits"
        )
    if content.get("device") == rt.device.type == "cpu" and args.dtype == "auto":
        rt.dtype = getattr(torch, content["dtype"].removeprefix("torch."))  # measured, it might differ today
    if content["dtype"] != str(rt.dtype):
        rt.print(f"compute type: {content['dtype']} -> {rt.dtype}; the continuation will not be bit-equal")
    return content


def settings_of_resume(args) -> dict:
    """The flags of the run that --from_resume 1 would continue; {} when there is none, or none that can be
    read (`find_resume` says so)."""
    from trainer.cli import model_config

    path = resume_path(args, model_config(args))
    if not path.exists():
        return {}
    try:
        return read_file(path, mmap=True).get("settings", {})  # the tensors stay on disk
    except CheckpointError:
        return {}


def changed_settings(content: dict, args, config, run: dict) -> list[str]:
    """What differs between a saved run and this one, as "name old -> new"."""
    old = content["settings"]
    changes = []

    def compare(name, before, now):
        before, now = (list(v) if isinstance(v, tuple) else v for v in (before, now))
        if before != now:
            changes.append(f"{name} {before} -> {now}")

    mine, theirs = plain_config(config), content["config"]
    for field in ARCHITECTURE_FIELDS + ("dropout", "router_aux_loss_coef"):
        if field not in MOE_FIELDS or config.use_moe:
            compare(f"--{field}", theirs.get(field), mine.get(field))
    for name in ("inference_rope_scaling", "yarn_factor", "original_max_position_embeddings"):
        compare(f"--{name}", old.get(name), getattr(args, name, None))
    compare(
        "rows per step (--batch_size x --accumulation_steps)",
        old["batch_size"] * old["accumulation_steps"],
        args.batch_size * args.accumulation_steps,
    )
    compare("--max_seq_len", old["max_seq_len"], args.max_seq_len)
    compare("--pack", old["pack"], args.pack)
    for name in ("data", "tokenizer", "template"):
        compare({"data": "training data"}.get(name, name), content["run"].get(name), run.get(name))
    compare("steps (--max_steps, --epochs)", content["run"]["total_steps"], run["total_steps"])
    for name, value in vars(args).items():
        if name not in FREE_SETTINGS and name not in plain_config(config):
            compare(f"--{name}", old.get(name), str(value) if isinstance(value, Path) else value)
    return changes


def require_same_parent(content: dict, parent: dict | None, frozen_base: bool, args):
    """A run whose base is frozen can only go on upon the very weights it began with."""
    before = content["run"]["parent"]
    if frozen_base and before != parent:
        raise CheckpointError(
            f"the run to resume stands on {args.from_weight} weights with checksum "
            f"{(before or {}).get('crc32')}, the file now has {(parent or {}).get('crc32')}: restore it, or "
            "start a new run with --from_resume 0"
        )


def restore(content: dict | None, model, optimizers, rt, log) -> int:
    """Put a saved state back; returns the number of finished steps (0 for None)."""
    if content is None:
        return 0
    import torch

    from trainer.runtime import bare

    model = bare(model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            saved = content["model"].get(name, content["buffers"].get(name))
            if saved is None and not tensor.requires_grad and name not in content["buffers"]:
                continue  # frozen: it was read from --from_weight
            if saved is None or saved.shape != tensor.shape:
                raise CheckpointError(
                    f"the resume file has no matching {name}: pass --from_resume 0 to start fresh"
                )
            tensor.copy_(saved)
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if rt.scaler is not None and content["scaler"]:
        rt.scaler.load_state_dict(content["scaler"])
    rt.skipped = content["skipped"]
    log.load_state_dict(content["log"])
    return content["step"]
