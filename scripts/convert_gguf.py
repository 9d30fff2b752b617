"""Weights of this project as one GGUF file, for llama.cpp, Ollama, LM Studio: configuration, tokenizer, chat
template and tensors. Written directly; nobody's converter is patched, which no new vocabulary gets through.

Three things have to be told in llama.cpp's way: its Llama turns neighbouring numbers of a head, not halves,
so rows of q_proj and k_proj change places (its Qwen3 turns halves, as we do); experts are one tensor; and the
rule that cuts text before the merges is not in the file, but named: Qwen2's, which our tokenizer has.
"""

import json
import math
from pathlib import Path

from scripts.convert_hf import model_type
from trainer.checkpoint import CheckpointError, shown

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# Qwen2's rule, by which llama.cpp's "qwen2" cuts
RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def halves_to_neighbours(weight, heads: int):
    """Rows of a projection (heads * hd, in) in another order: numbers j and j + hd/2 of a head, which turn
    together, become neighbours."""
    hd = weight.shape[0] // heads
    return weight.reshape(heads, 2, hd // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model, tokenizer_folder: Path, path: Path, kind: str, name: str):
    """A MiniMindLM as a GGUF file with matrices of type `kind` (vectors and the router stay float32). It
    appears whole or not at all. Raises CheckpointError."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("writing GGUF needs the package gguf: pip install gguf") from None

    config, architecture = model.config, ARCHITECTURES[model_type(model.config)]
    if config.use_moe and not config.norm_topk_prob:
        raise CheckpointError("llama.cpp normalises the weights of the chosen experts; this model does not")
    if config.rope_parameters["rope_type"] == "llama3":
        raise CheckpointError("positions of rope_type llama3 are not written as GGUF: default and yarn are")
    for file in (path, path.with_suffix(".Modelfile")):
        if file.exists():
            raise CheckpointError(f"{shown(file)} exists already: name another file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        add_settings(writer, config, kind, name)
        add_tokenizer(writer, config, tokenizer_folder)
        add_tensors(writer, model, architecture, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be written: {error}") from None
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def write_modelfile(gguf_path: Path, config) -> Path:
    """The Modelfile beside a GGUF file, with which `ollama create NAME -f FILE` takes it in. Its template
    says in Ollama's words what the chat template in the GGUF file says, with tools and thoughts: older
    versions read only this one, and know of both from here."""
    stretched = config.rope_parameters["rope_type"] == "yarn"
    longest = config.max_position_embeddings if stretched else config.original_max_position_embeddings
    template = Path(__file__).with_name("ollama.template").read_text(encoding="utf-8").rstrip("\n")
    lines = [
        f"FROM ./{gguf_path.name}",
        f"PARAMETER num_ctx {min(max(longest, 512), 8192)}",
        "PARAMETER temperature 0.85",
        "PARAMETER top_p 0.95",
        "PARAMETER repeat_penalty 1.0",
        'PARAMETER stop "<|im_end|>"',
        f'TEMPLATE """{template}"""',
    ]
    path = gguf_path.with_suffix(".Modelfile")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def add_settings(writer, config, kind: str, name: str):
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()])
    if "_" in kind:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_positions(writer, config)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_positions(writer, config):
    """The rotary frequencies, and YaRN's settings. llama.cpp multiplies the temperature 0.1 ln(factor) + 1 in
    by itself; the factor it is told comes on top, so it is told what remains."""
    import gguf

    from model.model_minimind import rope_frequencies

    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        _, temperature = rope_frequencies(config.head_dim, rope)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(temperature / (0.1 * math.log(rope["factor"]) + 1))
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def add_tokenizer(writer, config, folder: Path):
    import gguf

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
    rules = [piece.get("pattern", {}).get("Regex") for piece in pieces if piece["type"] == "Split"]
    whole = any(piece["type"] == "ByteLevel" and piece.get("use_regex", True) for piece in pieces)
    names = {(RULE,): "qwen2"} | ({(): "gpt-2"} if whole else {})  # MiniMind's own has no rule but GPT-2's
    name = names.get(tuple(rules))
    if content["model"]["type"] != "BPE" or name is None or content.get("normalizer"):
        raise CheckpointError(f"{shown(folder)}: llama.cpp has no name for the way this tokenizer cuts text")
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = {index: text for text, index in content["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(config.vocab_size):
        kind = gguf.TokenType.NORMAL
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif index not in texts:
            kind = gguf.TokenType.UNUSED
        tokens.append(texts.get(index, f"[PAD{index}]"))
        types.append(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def add_tensors(writer, model, architecture: str, kind: str):
    import gguf
    import torch

    config, state = model.config, dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for layer in range(config.num_hidden_layers if config.use_moe else 0):
        prefix = f"model.layers.{layer}.mlp.experts"
        for part in ("gate_proj", "up_proj", "down_proj"):
            parts = [state.pop(f"{prefix}.{e}.{part}.weight") for e in range(config.num_experts)]
            state[f"{prefix}.{part}.weight"] = torch.stack(parts)
    if architecture == "llama":
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for layer in range(config.num_hidden_layers):
            for part, count in heads.items():
                name = f"model.layers.{layer}.self_attn.{part}.weight"
                state[name] = halves_to_neighbours(state[name], count)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in state.items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if theirs is None:
            raise CheckpointError(f"llama.cpp's {architecture} has no tensor for {name}")
        array = tensor.detach().float().contiguous().numpy()
        wanted = gguf.GGMLQuantizationType[kind.upper()]
        if array.ndim == 1 or name.endswith("mlp.gate.weight"):
            wanted = gguf.GGMLQuantizationType.F32
        elif "_" in kind and array.shape[-1] % 32:
            wanted = gguf.GGMLQuantizationType.F16  # blocks of 32 do not fill its rows
        elif "_" in kind and name in ("model.embed_tokens.weight", "lm_head.weight"):
            wanted = (
                gguf.GGMLQuantizationType.Q8_0
            )  # a fifth of a small model, and what every token passes twice
        writer.add_tensor(theirs, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
