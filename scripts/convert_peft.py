"""Adapters of this project as folders of peft (https://github.com/huggingface/peft), and back. The arithmetic
is the same, so numbers are copied and only names change."""

from pathlib import Path

from scripts.convert_hf import new_folder, read_file, read_json, write_json
from trainer.checkpoint import CheckpointError, shown

PREFIX = "base_model.model."
PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
# Settings of peft that would compute something else here, and the values that do not.
PLAIN = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
}


def write_peft_folder(state: dict, settings, num_layers: int, base: Path, folder: Path):
    """An adapter (tensors as in its file, LoRAConfig) as a folder of peft for the transformers folder `base`.
    It appears whole or not at all. Raises CheckpointError."""
    from safetensors.torch import save_file

    layers = sorted({name.partition(".lora.")[0] for name in state})
    experts = [layer for layer in layers if ".experts." in layer or layer.endswith(".mlp.gate")]
    if experts:
        raise CheckpointError(
            f"the adapter changes {experts[0]}: transformers keeps experts in one block, peft cannot adapt it"
        )
    tensors = {}
    for name, tensor in state.items():
        layer, _, part = name.partition(".lora.")
        tensors[f"{PREFIX}{layer}.{PARTS[part]}"] = tensor.contiguous()
    short = sorted({layer.rpartition(".")[2] for layer in layers})
    everywhere = len(layers) == len(short) * num_layers
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": short if everywhere else layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    with new_folder(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(part / "adapter_config.json", content)


def read_peft_folder(folder: Path):
    """(tensors as in a file of adapters, LoRAConfig) of a folder of peft. Raises CheckpointError when it
    holds something that is not possible here."""
    from model.model_lora import LoRAConfig

    content = read_json(folder / "adapter_config.json")
    if content.get("peft_type") != "LORA":
        kind = content.get("peft_type")
        raise CheckpointError(f"{shown(folder)}: peft_type is {kind!r}, and only LORA is read")
    for name, plain in PLAIN.items():
        if name in content and content[name] not in plain:
            raise CheckpointError(f"{shown(folder)}: {name} = {content[name]!r} is not possible here")
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{shown(path)} does not exist: the folder is incomplete")
    part_of = {ending: part for part, ending in PARTS.items()}
    state = {}
    for name, tensor in read_file(path).items():
        layer, mark, ending = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX) or f"lora_{ending}" not in part_of or not mark:
            raise CheckpointError(f"{shown(path)}: {name} is no part of LoRA that is known here")
        state[f"{layer}.lora.{part_of[f'lora_{ending}']}"] = tensor
    targets = content.get("target_modules")
    layers = sorted({name.partition(".lora.")[0] for name in state})
    try:
        settings = LoRAConfig(
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            dropout=float(content.get("lora_dropout") or 0.0),
            rslora=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
            targets=tuple(targets) if isinstance(targets, list) else tuple(layers),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{shown(folder)}: adapter_config.json is not complete: {error}") from None
    return state, settings
