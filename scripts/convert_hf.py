"""Weights of this project as a folder that transformers opens without any code of ours, and back.

The blocks of model_minimind.py are those of known models, so a class of transformers computes the same:
Llama, Qwen3 (with QK-norm) or Qwen3-MoE (with QK-norm and experts). Tensors keep their names; what has to be
told is the configuration, in words that transformers 4 and 5 both understand (5 reads `rope_parameters`, 4
reads `rope_theta` and `rope_scaling`; with one alone the other computes something else without a word).
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from trainer.checkpoint import CheckpointError, plain_config, require_finite_file, shown

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
OURS = "minimind_config"  # what transformers has no word for, in config.json
WHOLE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings"""
SHAPE = (
    WHOLE
    + """ hidden_act rms_norm_eps initializer_range tie_word_embeddings
    bos_token_id eos_token_id pad_token_id"""
)
MOE = "num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef"
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------


def model_type(config) -> str:
    """The `model_type` of the transformers class that computes what a MiniMindConfig describes. Raises
    CheckpointError when there is none."""
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if config.n_shared_experts:
        raise CheckpointError(
            f"a mixture with {config.n_shared_experts} shared experts fits no class of transformers: "
            "hf --code 1 writes it with the code of this project's own class"
        )
    if not config.qk_norm:
        raise CheckpointError(
            "a mixture without QK-norm fits no class of transformers, Qwen3-MoE has QK-norm: hf --code 1 "
            "writes it with the code of this project's own class"
        )
    return "qwen3_moe"


def to_hf_config(config, dtype: str) -> dict:
    """The content of config.json for a MiniMindConfig whose weights are stored as `dtype`."""
    kind = model_type(config)
    same = SHAPE + " use_cache rope_theta"
    content = {"architectures": [CLASSES[kind]], "model_type": kind}
    content |= {name: getattr(config, name) for name in same.split()}
    content |= {"attention_bias": False, "attention_dropout": 0.0, "torch_dtype": dtype, "dtype": dtype}
    rope = dict(config.rope_parameters)
    content["rope_parameters"] = rope
    if rope["rope_type"] != "default":
        content["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} | {
            "type": rope["rope_type"]
        }
    if kind == "llama":
        content |= {"mlp_bias": False, "pretraining_tp": 1}
    else:
        content |= {"use_sliding_window": False, "sliding_window": None}
        content["max_window_layers"] = config.num_hidden_layers
    if kind == "qwen3_moe":
        content |= {name: getattr(config, name) for name in MOE.split()}
        content |= {"num_experts": config.num_experts, "num_local_experts": config.num_experts}
        content |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
    own = "original_max_position_embeddings inference_rope_scaling yarn_factor residual_init dropout".split()
    content[OURS] = {name: getattr(config, name) for name in own}
    return content


def from_hf_config(content: dict, folder: Path):
    """The MiniMindConfig that computes what a config.json describes. Raises CheckpointError when there is
    none, and names the reason."""
    from model.model_minimind import rope_frequencies

    try:
        config = read_config(content, folder)
        rope_frequencies(config.head_dim, config.rope_parameters)
        for value in config.rope_parameters.values():
            if not isinstance(value, str | int | float | None):
                raise ValueError(f"rope_parameters: {value!r} is no number")
        for name in "dropout rms_norm_eps rope_theta initializer_range router_aux_loss_coef".split():
            if not isinstance(getattr(config, name), int | float) or getattr(config, name) < 0:
                raise ValueError(f"{name} = {getattr(config, name)!r} is no number that can be used")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not isinstance(getattr(config, name), int | None):
                raise ValueError(f"{name} = {getattr(config, name)!r} is no token id")
        return config
    except CheckpointError:
        raise
    except Exception as error:  # a value of another kind than it should be: each fails somewhere else
        words = " ".join(str(error.args[0] if error.args else error).split())
        words += " is missing" * (isinstance(error, KeyError) and " " not in words)
        raise CheckpointError(f"{folder}: config.json cannot be used: {words[:300]}") from None


def read_config(content: dict, folder: Path):
    from model.model_minimind import MiniMindConfig

    kind = content.get("model_type")
    if kind not in (*CLASSES, "minimind"):
        known = ", ".join((*CLASSES, "minimind"))
        raise CheckpointError(f"{folder}: model_type {kind!r} is none that is known here ({known})")
    layers = content.get("num_hidden_layers", 0)
    odd = {
        "attention_bias": content.get("attention_bias", False),
        "mlp_bias": content.get("mlp_bias", False),
        "use_sliding_window": content.get("use_sliding_window", False),
        "mlp_only_layers": content.get("mlp_only_layers") or False,
        "decoder_sparse_step": content.get("decoder_sparse_step", 1) != 1,
        "layer_types": set(content.get("layer_types") or ()) - {"full_attention"},
        "n_group": content.get("n_group", 1) not in (None, 1),
    }
    for name, wrong in odd.items():
        if wrong:
            raise CheckpointError(
                f"{folder}: {name} = {content.get(name)!r} is not possible in model_minimind.py"
            )
    fields = dict(content.get(OURS, {})) if isinstance(content.get(OURS), dict) else {}
    names = SHAPE + " rope_theta num_experts " + MOE
    if kind == "minimind":
        names += " qk_norm use_moe n_shared_experts original_max_position_embeddings inference_rope_scaling"
        names += " yarn_factor residual_init dropout"
        fields |= {"num_experts": content["n_routed_experts"]} if "n_routed_experts" in content else {}
    else:
        # where a file says nothing, what transformers' own classes take
        fields |= {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        fields |= {"qk_norm": kind != "llama", "use_moe": kind == "qwen3_moe"}
        if kind == "qwen3":
            fields["head_dim"] = 128
        if kind == "qwen3_moe":
            fields |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}
            fields |= {"num_experts": content.get("num_local_experts", 128), "n_shared_experts": 0}
            fields["router_aux_loss_coef"] = 0.001
    fields |= {name: content[name] for name in names.split() if content.get(name) is not None}
    for name in WHOLE.split():
        if type(fields.get(name, 1)) is not int or fields.get(name, 1) < 1:
            raise CheckpointError(f"{folder}: {name} = {fields[name]!r} is no whole number above 0")
    rope = content.get("rope_parameters") or content.get("rope_scaling")
    if rope:
        fields["rope_parameters"] = {"rope_theta": fields.get("rope_theta", 1e4), **rope}
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        for name in ("mscale", "mscale_all_dim", "truncate"):
            if rope.get(name) not in (None, True):
                raise CheckpointError(f"{folder}: {name} = {rope[name]!r} of rope_parameters is not possible")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            if isinstance(rope.get(name), str):
                raise CheckpointError(f"{folder}: {name} = {rope[name]!r} of rope_parameters is no number")
        if rope_type != "default" and "original_max_position_embeddings" not in {**rope, **fields}:
            fields["original_max_position_embeddings"] = fields.get("max_position_embeddings", 2048)
        if rope_type not in ("default", "yarn", "llama3"):
            raise CheckpointError(
                f"{folder}: rope_type {rope_type!r} is not possible: default, yarn and llama3 are"
            )
    eos = fields.get("eos_token_id")
    fields["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
    config = MiniMindConfig(**{k: v for k, v in fields.items() if v is not None})
    if config.num_hidden_layers != layers:
        raise CheckpointError(f"{folder}: config.json does not say how many layers there are")
    return config


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)} does not exist: is this a transformers folder?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown(path)} holds no JSON object")
    return content


def read_tensors(folder: Path) -> dict:
    """All tensors of a transformers folder, on the CPU, as they are stored. Pickled files are opened as
    tensors only."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{shown(folder / INDEX)} names no files (weight_map): download it again")
        files = sorted({folder / str(name) for name in weight_map.values()})
    else:
        files = [folder / "model.safetensors"]
        if not files[0].exists() and (folder / "pytorch_model.bin").exists():
            files = [folder / "pytorch_model.bin"]
    state = {}
    for path in files:
        if path.resolve().parent != folder.resolve():
            raise CheckpointError(f"{shown(folder / INDEX)} names {path.name!r} outside its folder")
        if not path.exists():
            raise CheckpointError(
                f"{shown(path)} does not exist: the folder is incomplete, download it again"
            )
        state |= read_file(path)
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(kinds) > 1:  # in a file of ours all weights are of one type; this one loses nothing
        state = {name: tensor.float() for name, tensor in state.items()}
    return state


def read_file(path: Path) -> dict:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix == ".bin"
            else load_file(path)
        )
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise CheckpointError(f"{shown(path)} does not hold tensors by name")
        return found
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"{shown(path)} is broken or only half there ({reason}): download it again"
        ) from None


def load_folder(folder: Path):
    """(MiniMindLM in eval mode on the CPU with the weights in their stored type, content of config.json).
    Raises CheckpointError."""
    import torch

    from model.model_minimind import MiniMindLM

    content = read_json(folder / "config.json")
    config, state = from_hf_config(content, folder), read_tensors(folder)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    require_finite_file(state, folder)
    with torch.device("meta"):
        model = MiniMindLM(config)
    try:
        model.load_state_dict(state, assign=True, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(
            f"{folder}: weights and config.json do not fit: {' '.join(lines)[:400]}"
        ) from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval(), content


def write_code(config, folder: Path, dtype: str) -> dict:
    """The model's own files into a folder, where no class of transformers fits (--code 1, never by itself);
    returns the content of config.json. Whoever opens that folder has to allow its code, and should look at it
    first: these are three files of model/, unchanged but for imports, which become lines `from .file import`,
    since those tell transformers which files belong together."""
    here = Path(__file__).resolve().parents[1] / "model"
    for name in ("model_minimind.py", "hf_minimind.py", "precision.py"):
        text = (here / name).read_text(encoding="utf-8")
        text = text.replace(
            "from model import precision", "from . import precision\nfrom .precision import for_both_passes"
        )
        text = text.replace("from model.", "from .")
        (folder / name).write_text(text, encoding="utf-8")
    classes = {"AutoConfig": "model_minimind.MiniMindConfig"}
    classes["AutoModelForCausalLM"] = "hf_minimind.MiniMindForCausalLM"
    about = {"architectures": ["MiniMindForCausalLM"], "auto_map": classes, "dtype": dtype}
    return plain_config(config) | about | {"torch_dtype": dtype}


def write_folder(model, tokenizer_folder: Path, folder: Path, dtype: str, code: bool = False):
    """A MiniMindLM as a transformers folder, of a class that transformers has, or with the code of its own.
    It appears whole or not at all; one that exists is not touched. Raises CheckpointError."""
    import torch
    from safetensors.torch import save_file

    content = None if code else to_hf_config(model.config, dtype)
    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    with new_folder(folder) as part:
        if code:
            content = write_code(model.config, part, dtype)
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", content)
        ids = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(part / "generation_config.json", ids)
        copy_tokenizer(tokenizer_folder, part, model.config)


@contextlib.contextmanager
def new_folder(folder: Path):
    """A folder to write files into, which appears whole or not at all; one that exists is not touched. Raises
    CheckpointError."""
    from safetensors import SafetensorError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{shown(folder)} exists already: name another folder, or remove it")
    part = folder.with_name(f".{folder.resolve().name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.glob("*.safetensors"):  # safetensors lets only the owner read
            shutil.copymode(next(part.glob("*.json")), file)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shown(folder)} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path, config):
    """tokenizer.json as it is; tokenizer_config.json with what both generations of transformers read."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
        elif name == "tokenizer.json":
            raise CheckpointError(f"{shown(source)} has no tokenizer.json: see --tokenizer")
    settings = (
        read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").exists() else {}
    )
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = config.max_position_embeddings
    template = source / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    write_json(target / "tokenizer_config.json", settings)


def same_config(a, b) -> list[str]:
    """Names of fields in which two MiniMindConfigs differ."""
    left, right = plain_config(a), plain_config(b)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
