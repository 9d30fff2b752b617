"""Weights that go to transformers and come back: the same bits, the same answers, and a certificate that can
fail."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.model_lora import LoRAConfig, add_lora, lora_state
from model.model_minimind import MiniMindConfig, MiniMindLM
from scripts import convert_hf, convert_model
from scripts.certificate import certify_transformers
from scripts.convert_gguf import write_gguf
from scripts.convert_peft import write_peft_folder
from trainer import checkpoint, cli

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SHAPE |= dict(vocab_size=6400, intermediate_size=96, rms_norm_eps=1e-6, max_position_embeddings=512)
MOE = dict(use_moe=True, num_experts=4, num_experts_per_tok=2, n_shared_experts=0, moe_intermediate_size=48)
KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True)),
    "moe": ("Qwen3MoeForCausalLM", dict(qk_norm=True, **MOE)),
    "moe_sums": ("Qwen3MoeForCausalLM", dict(qk_norm=True, **MOE, norm_topk_prob=False)),
    "yarn": ("Qwen3ForCausalLM", dict(qk_norm=True, inference_rope_scaling=True)),
    "untied": ("Qwen3ForCausalLM", dict(qk_norm=True, tie_word_embeddings=False, head_dim=32)),
    "theta": ("LlamaForCausalLM", dict(rope_theta=1e4)),
}


def random_model(**fields):
    """Random weights and random norms: all-ones norms would hide one that is missing."""
    torch.manual_seed(0)
    model = MiniMindLM(MiniMindConfig(**SHAPE | fields)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.15) if p.ndim > 1 else p.data.normal_(1, 0.3)
    return model


def save(model, folder, name="full_sft", **metadata):
    tail = "_moe" if model.config.use_moe else ""
    path = folder / f"{name}_{model.config.hidden_size}{tail}.pth"
    metadata = {"stage": "full_sft", "tokenizer": checkpoint.tokenizer_hash(checkpoint.load_tokenizer())}
    checkpoint.save_weights(model, path, metadata)
    return path


def convert(*flags):
    convert_model.main(convert_model.parse_args([str(flag) for flag in flags]))


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as error:
        cli.run(convert_model.main, convert_model.parse_args, [str(flag) for flag in flags])
    err = capsys.readouterr().err
    assert error.value.code == 2 and "Traceback" not in err
    return err


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, kind):
    name, fields = KINDS[kind]
    path, folder = save(random_model(**fields), tmp_path), tmp_path / "hf"
    convert("hf", "--save_dir", tmp_path, "--to", folder)
    certificate = json.loads((folder / "parity.json").read_text())
    assert certificate["passed"] and certificate["max_logit_difference"] < 1e-5
    assert certificate["target"] == name and certificate["greedy_answers_identical"] == "20 of 20"
    convert("native", "--folder", folder, "--name", "back", "--save_dir", tmp_path)
    back = next(tmp_path.glob("back_64*.pth"))
    (first, about), (second, about_it) = checkpoint.read_weights(path), checkpoint.read_weights(back)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert about["config"] == about_it["config"] and about["tokenizer"] == about_it["tokenizer"]
    assert json.loads(back.with_suffix(".parity.json").read_text())["passed"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    save(random_model(qk_norm=True), tmp_path)
    convert("hf", "--save_dir", tmp_path, "--to", tmp_path / "hf", "--dtype", dtype)
    certificate = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert certificate["passed"] and certificate["weights"] == dtype
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    convert("native", "--folder", tmp_path / "hf", "--name", "half", "--save_dir", tmp_path)
    state, _ = checkpoint.read_weights(tmp_path / "half_64.pth")
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_a_certificate_can_fail(tmp_path):
    model, tokenizer, folder = random_model(qk_norm=True), checkpoint.load_tokenizer(), tmp_path / "hf"
    convert_hf.write_folder(model, convert_model.ROOT / "model", folder, "float32")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_norm.weight"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    certificate = certify_transformers(folder, model, tokenizer, "float32")
    assert not certificate["passed"] and certificate["max_logit_difference"] > 1e-3
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not certify_transformers(folder, model, tokenizer, "float32")["passed"]


def test_generate_stops_at_the_end_token_and_the_template_is_there(tmp_path):
    model = random_model(qk_norm=True)
    with torch.no_grad():  # a model that says nothing but the end
        model.model.embed_tokens.weight[2] *= 20
    convert_hf.write_folder(model, convert_model.ROOT / "model", tmp_path / "hf", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    generated = [
        theirs.generate(torch.tensor([[i]]), max_new_tokens=200, do_sample=True)[0].tolist()
        for i in range(3, 9)
    ]
    assert any(len(ids) < 201 for ids in generated)
    assert all(2 not in ids[1:-1] for ids in generated)
    messages = [{"role": "user", "content": "你好"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    own = checkpoint.load_tokenizer()
    assert text == own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_both_generations_of_transformers_are_told_the_same():
    """5 reads rope_parameters, dtype and num_local_experts, 4 the older words."""
    config = MiniMindConfig(**SHAPE, qk_norm=True, inference_rope_scaling=True, rope_theta=5e5, **MOE)
    content = convert_hf.to_hf_config(config, "bfloat16")
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 5e5
    for words in (content["rope_scaling"], content["rope_parameters"]):
        assert words["rope_type"] == "yarn" and words["factor"] == 16 and words["attention_factor"] == 1
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    assert content["num_experts"] == content["num_local_experts"] == 4


SMALL = dict(SHAPE, vocab_size=300)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, original_max_position_embeddings=16)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
THEIRS = {
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3))),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)),
    "moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    ),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_what_transformers_wrote_is_read(tmp_path, kind, shard):
    torch.manual_seed(0)
    theirs = THEIRS[kind]().eval()
    for p in theirs.parameters():
        p.data.normal_(0, 0.15) if p.ndim > 1 else p.data.normal_(1, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    ours, _ = convert_hf.load_folder(tmp_path / "theirs")
    x = torch.randint(0, 300, (2, 20))
    with torch.inference_mode():
        assert (ours(x).logits - theirs(x).logits).abs().max() < 1e-5


def test_without_a_tokenizer_nothing_is_certified(tmp_path):
    THEIRS["llama"]().save_pretrained(tmp_path / "theirs")
    convert("native", "--folder", tmp_path / "theirs", "--save_dir", tmp_path)
    certificate = json.loads((tmp_path / "theirs_64.parity.json").read_text())
    assert "not checked" in certificate["checked"] and "passed" not in certificate


def gguf_reader(path):
    import gguf

    return gguf.GGUFReader(path)


def read_gguf(path):
    """(settings, tensors as float32) of a GGUF file, read by the package gguf."""
    import gguf

    reader = gguf_reader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors
    }
    return settings, tensors


@pytest.mark.parametrize("kind", ["llama", "qwen3", "moe", "untied"])
def test_a_gguf_file_holds_the_model(tmp_path, kind):
    model = random_model(**KINDS[kind][1])
    save(model, tmp_path)
    convert("gguf", "--save_dir", tmp_path, "--to", tmp_path / "m.gguf", "--dtype", "f32", "--check", 0)
    settings, tensors = read_gguf(tmp_path / "m.gguf")
    config, state = model.config, model.state_dict()
    architecture = {"llama": "llama", "moe": "qwen3moe"}.get(kind, "qwen3")
    assert settings["general.architecture"] == architecture
    expected = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": config.head_dim,
        "rope.freq_base": 1e6,
    }
    assert {name: settings[f"{architecture}.{name}"] for name in expected} == expected
    assert settings[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokenizer = checkpoint.load_tokenizer()
    assert settings["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(6400))
    assert settings["tokenizer.ggml.pre"] == "qwen2" and not settings["tokenizer.ggml.add_bos_token"]
    assert [settings[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding")] == [1, 2, 0]
    assert settings["tokenizer.chat_template"] == tokenizer.chat_template
    assert torch.equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    assert ("output.weight" in tensors) == (kind == "untied")
    q, theirs = state["model.layers.1.self_attn.q_proj.weight"], tensors["blk.1.attn_q.weight"]
    if kind == "llama":  # numbers 0 and 8 of a head of 16 turn together: there they are 0 and 1
        assert torch.equal(theirs[16:20], q[[16, 24, 17, 25]])
    else:
        assert torch.equal(theirs, q)
    if kind == "moe":
        up = torch.stack([state[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4)])
        assert torch.equal(tensors["blk.0.ffn_up_exps.weight"], up)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert count == sum(p.numel() for p in model.parameters())


def test_types_of_a_gguf_file(tmp_path):
    model = random_model(qk_norm=True, intermediate_size=112)
    save(model, tmp_path)
    matrix, sizes = model.state_dict()["model.layers.0.mlp.up_proj.weight"], {}
    kinds = ("f32", 0), ("bf16", 2**-8), ("f16", 2**-11), ("q8_0", 1 / 100), ("q5_1", 1 / 25), ("q4_0", 1 / 8)
    for dtype, off in kinds:
        path = tmp_path / f"{dtype}.gguf"
        convert("gguf", "--save_dir", tmp_path, "--to", path, "--dtype", dtype, "--check", 0)
        _, tensors = read_gguf(path)
        assert (tensors["blk.0.ffn_up.weight"] - matrix).abs().max() <= off * matrix.abs().max()
        assert torch.equal(tensors["output_norm.weight"], model.model.norm.weight.detach())
        sizes[dtype] = path.stat().st_size
    assert sizes["q4_0"] < sizes["q5_1"] < sizes["q8_0"] < sizes["f16"] == sizes["bf16"] < sizes["f32"]
    reader = gguf_reader(tmp_path / "q4_0.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    expected = {"blk.0.attn_q": "Q4_0", "blk.0.ffn_down": "F16", "token_embd": "Q8_0", "output_norm": "F32"}
    assert {name: types[f"{name}.weight"] for name in expected} == expected  # rows of ffn_down: 112 numbers


def test_yarn_in_a_gguf_file(tmp_path):
    """llama.cpp multiplies 0.1 ln(factor) + 1 in by itself: ours, without temperature, has to take it out."""
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e5)
    for name, fields, temperature in (
        (
            "ours",
            dict(inference_rope_scaling=True, yarn_factor=4.0, original_max_position_embeddings=64),
            1.0,
        ),
        ("paper", dict(rope_parameters=yarn), 0.1 * math.log(4) + 1),
    ):
        save(random_model(**fields), tmp_path, name)
        convert("gguf", "--save_dir", tmp_path, "--weight", name, "--to", tmp_path / f"{name}.gguf")
        settings, _ = read_gguf(tmp_path / f"{name}.gguf")
        scaling = {k.removeprefix("llama.rope.scaling."): v for k, v in settings.items() if "scaling" in k}
        own = scaling.pop("attn_factor") * (0.1 * math.log(4) + 1)
        assert own == pytest.approx(temperature)
        assert scaling.pop("type") == "yarn" and scaling.pop("factor") == 4
        assert scaling.pop("original_context_length") == 64
        assert scaling == {"yarn_beta_fast": 32, "yarn_beta_slow": 1}


def test_a_modelfile_for_ollama(tmp_path):
    config = dict(inference_rope_scaling=True, yarn_factor=4.0, original_max_position_embeddings=512)
    save(random_model(**config), tmp_path)
    convert("gguf", "--save_dir", tmp_path, "--to", tmp_path / "my.gguf", "--check", 0)
    text = (tmp_path / "my.Modelfile").read_text(encoding="utf-8")
    settings, template = text.split('TEMPLATE """')
    assert settings.splitlines()[:2] == ["FROM ./my.gguf", "PARAMETER num_ctx 2048"]
    assert all(line.split()[0] in ("FROM", "PARAMETER") for line in settings.splitlines())
    assert 'PARAMETER stop "<|im_end|>"' in settings and template.endswith('"""\n')
    assert all(word in template for word in (".System", ".Tools", ".Messages", ".Thinking", ".ToolCalls"))


def in_ollamas_words(messages: list[dict], tools: list[dict], think: bool) -> dict:
    """A conversation as Ollama's server hands it to a template."""
    spoken = []
    for message in messages:
        calls = [
            {"Function": dict(Name=c["name"], Arguments=c["arguments"])} for c in message.get("calls", ())
        ]
        thoughts = message.get("reasoning_content", "")
        text = dict(Role=message["role"], Content=message["content"], Thinking=thoughts, ToolCalls=calls)
        spoken.append(text)
    system = spoken.pop(0)["Content"] if spoken[0]["Role"] == "system" else ""
    about = [{"Function": tool["function"]} for tool in tools]
    return dict(System=system, Tools=about, Messages=spoken, Think=think, IsThinkSet=True)


@pytest.mark.slow
def test_the_template_for_ollama_says_what_ours_says(tmp_path):
    """Rendered by text/template of Go, which is Ollama's; JSON is spaced otherwise there."""
    if shutil.which("go") is None:
        pytest.skip("needs the go command")
    tokenizer, folder = checkpoint.load_tokenizer(), convert_model.ROOT
    parameters = {"properties": {"city": {"type": "string"}}, "type": "object"}
    tool = {"name": "weather", "description": "Weather of a city", "parameters": parameters}
    tools = [{"type": "function", "function": tool}]
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": '你好, "you"\n<b>'}
    answer = {"role": "assistant", "content": "Hello!"}
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    asks = {"role": "assistant", "content": "", "calls": [call, call]}
    says = {"role": "assistant", "content": "Let me look.", "calls": [call]}
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "18"}]
    conversations = (
        [user],
        [system, user, answer, user],
        [user, thought, user],
        [user, asks, *results],
        [system, user, says, results[0], answer, user],
    )
    program = str(tmp_path / "render")
    subprocess.run(["go", "build", "-o", program, str(folder / "tests" / "render_ollama.go")], check=True)
    template = (folder / "scripts" / "ollama.template").read_text(encoding="utf-8").rstrip("\n")
    (tmp_path / "t").write_text(template, encoding="utf-8")
    for messages, some_tools, think in itertools.product(conversations, ([], tools), (False, True)):
        own = [{**m, "tool_calls": m["calls"]} if "calls" in m else m for m in messages]
        settings = dict(tokenize=False, add_generation_prompt=True, open_thinking=think)
        expected = tokenizer.apply_chat_template(own, tools=some_tools or None, **settings)
        content = in_ollamas_words(messages, some_tools, think)
        (tmp_path / "c.json").write_text(json.dumps(content), encoding="utf-8")
        command = [program, str(tmp_path / "t"), str(tmp_path / "c.json")]
        rendered = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
        tight = [re.sub(r'([":,\]}]) (?=["{\[])', r"\1", text) for text in (rendered, expected)]
        assert re.sub(r"\{[^\n]*\}", sort_json, tight[0]) == re.sub(r"\{[^\n]*\}", sort_json, tight[1])


def sort_json(found) -> str:
    """A line of JSON in one spelling; what is none stays."""
    try:
        return json.dumps(json.loads(found[0]), sort_keys=True)
    except ValueError:
        return found[0]


def test_without_llama_cpp_a_gguf_file_is_not_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NODE_PATH", raising=False)
    save(random_model(), tmp_path)
    to_gguf = ("gguf", "--save_dir", tmp_path, "--to")
    convert(*to_gguf, tmp_path / "m.gguf")
    certificate = json.loads((tmp_path / "m.parity.json").read_text())
    assert "not checked" in certificate["checked"] and "passed" not in certificate
    assert "exists already" in refused(capsys, *to_gguf, tmp_path / "m.gguf")
    save(random_model(qk_norm=True, **MOE, norm_topk_prob=False), tmp_path, "odd")
    assert "normalises" in refused(capsys, *to_gguf, tmp_path / "x.gguf", "--weight", "odd")
    tokenizer = json.loads((convert_model.ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(checkpoint.CheckpointError, match="has no name for the way"):
        write_gguf(random_model(), tmp_path / "tokenizer", tmp_path / "x.gguf", "f32", "x")
    assert not list(tmp_path.glob("x.gguf*"))


def test_minimind_releases_as_they_are(tmp_path):
    """A half-precision state dict without a word about itself, and a tokenizer that cuts text as GPT-2's."""
    model = random_model(qk_norm=True, num_attention_heads=8, num_key_value_heads=4)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "full_sft_64.pth")
    tokenizer = json.loads((convert_model.ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    tokenizer["pre_tokenizer"]["trim_offsets"] = True
    theirs = tmp_path / "theirs"
    shutil.copytree(
        convert_model.ROOT / "model", theirs, ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    (theirs / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    flags = ("--weight", tmp_path / "full_sft_64.pth", "--tokenizer", theirs)
    convert("hf", *flags, "--to", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "parity.json").read_text())["passed"]
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(stored[name], state[name].float()) for name in stored)
    convert("gguf", *flags, "--to", tmp_path / "m.gguf", "--check", 0)
    assert read_gguf(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "moe", "untied", "theta", "yarn", "yarn_moe"])
def test_llama_cpp_answers_alike(tmp_path, kind):
    """Needs NODE_PATH with the npm package node-llama-cpp."""
    few = dict(original_max_position_embeddings=16, inference_rope_scaling=True)
    random = {"yarn": few, "yarn_moe": few | KINDS["moe"][1]}.get(kind) or KINDS[kind][1]
    save(random_model(**random), tmp_path)
    convert("gguf", "--save_dir", tmp_path, "--to", tmp_path / "m.gguf", "--dtype", "f32")
    certificate = json.loads((tmp_path / "m.parity.json").read_text())
    if "checked" in certificate:
        pytest.skip(certificate["checked"])
    assert certificate["passed"] and certificate["greedy_answers_identical"] == "20 of 20"


def save_lora(folder, name="lora_a", **settings):
    """Random weights of a base and of an adapter for them."""
    model, config = random_model(qk_norm=True), LoRAConfig(rank=4, **settings)
    save(model, folder)
    add_lora(model, config)
    with torch.no_grad():
        for tensor in lora_state(model).values():
            tensor += 0.05 * torch.randn_like(tensor)
    (folder / "lora").mkdir()
    path = folder / "lora" / f"{name}_64.pth"
    checkpoint.save_adapter(config, model, path, {"stage": "lora"})
    return path


CLEAN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.arange(5, 25)[None]).logits, sys.argv[2])
print(model.generate(torch.tensor([[1, 5]]), max_new_tokens=3).shape)
"""


def test_shared_experts_go_with_their_code(tmp_path):
    """In a process that knows nothing of this project; and back without running that code."""
    model = random_model(use_moe=True, num_experts=2, moe_intermediate_size=32)
    path = save(model, tmp_path)
    sys.modules["transformers_modules"] = types.ModuleType("transformers_modules")  # of an earlier model
    convert("hf", "--save_dir", tmp_path, "--to", tmp_path / "hf", "--code", 1)
    certificate = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert certificate["passed"] and certificate["target"] == "MiniMindForCausalLM"
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "hf"), str(tmp_path / "logits")]
    where = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, cwd=tmp_path, env=where, check=True)
    expected = model(torch.arange(5, 25)[None]).logits
    assert (torch.load(tmp_path / "logits") - expected).abs().max() < 1e-5
    convert("native", "--folder", tmp_path / "hf", "--name", "back", "--save_dir", tmp_path)
    first, second = (checkpoint.read_weights(p) for p in (path, tmp_path / "back_64_moe.pth"))
    assert (
        all(torch.equal(first[0][k], second[0][k]) for k in first[0])
        and first[1]["config"] == second[1]["config"]
    )


def test_trl_trains_what_we_wrote(tmp_path):
    """Two steps of trl's SFTTrainer, with losses on answers alone: our template has the marks it asks for."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    save(random_model(qk_norm=True), tmp_path)
    convert("hf", "--save_dir", tmp_path, "--to", tmp_path / "hf", "--check", 0)
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    data = Dataset.from_list([{"messages": talk}] * 8)
    trainer = SFTTrainer(str(tmp_path / "hf"), args=settings, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    trainer.save_model(tmp_path / "trained")
    convert("native", "--folder", tmp_path / "trained", "--name", "trained", "--save_dir", tmp_path)
    assert json.loads((tmp_path / "trained_64.parity.json").read_text())["passed"]


def test_adapters_are_merged(tmp_path):
    save_lora(tmp_path)
    convert("hf", "--save_dir", tmp_path, "--to", tmp_path / "hf", "--lora_weight", "lora_a")
    merged = load_file(tmp_path / "hf" / "model.safetensors")
    base, _ = checkpoint.read_weights(tmp_path / "full_sft_64.pth")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], base[name])
    assert json.loads((tmp_path / "hf" / "parity.json").read_text())["passed"]


LORA = {
    "lora": {},
    "rslora": dict(rslora=True, alpha=7.0),
    "dora": dict(dora=True),
    "some": dict(targets=("q_proj", "model.layers.1.mlp.up_proj")),
}


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_goes_to_peft_and_back(tmp_path, kind):
    path, where = save_lora(tmp_path, **LORA[kind]), ("--save_dir", tmp_path)
    convert("hf", *where, "--to", tmp_path / "hf", "--check", 0)
    convert("peft", *where, "--lora_weight", "lora_a", "--base", tmp_path / "hf", "--to", tmp_path / "peft")
    certificate = json.loads((tmp_path / "peft" / "parity.json").read_text())
    assert certificate["passed"] and certificate["max_logit_difference"] < 1e-4, certificate
    assert "peft" in certificate["runtime"]
    convert("lora", *where, "--folder", tmp_path / "peft", "--name", "back")
    first, config, _ = checkpoint.read_adapter(path)
    second, config_back, _ = checkpoint.read_adapter(tmp_path / "lora" / "back_64.pth")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    fields = ("rank", "alpha", "dropout", "rslora", "dora")
    assert all(getattr(config, name) == getattr(config_back, name) for name in fields)


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_wrote_is_read(tmp_path, dora):
    import peft

    save(random_model(qk_norm=True), tmp_path)
    convert("hf", "--save_dir", tmp_path, "--to", tmp_path / "hf", "--check", 0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=dora)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "peft")
    convert("lora", "--save_dir", tmp_path, "--folder", tmp_path / "peft", "--name", "theirs")
    model, metadata = checkpoint.load_model(tmp_path / "full_sft_64.pth")
    x = torch.randint(0, 6400, (2, 20))
    before = model(x).logits
    checkpoint.merge_adapters(model, "theirs", tmp_path, metadata)
    with torch.inference_mode():
        ours, expected = model(x).logits, theirs(x).logits
    assert (ours - expected).abs().max() < 1e-4 < (before - expected).abs().max()


def test_adapters_that_do_not_fit(tmp_path, capsys):
    save_lora(tmp_path)
    where = ("--save_dir", tmp_path)
    convert("hf", *where, "--to", tmp_path / "hf", "--check", 0)
    to_peft = ("peft", *where, "--base", tmp_path / "hf", "--lora_weight")
    convert(*to_peft, "lora_a", "--to", tmp_path / "peft", "--check", 0)
    assert "does not exist" in refused(capsys, *to_peft, "lora_b", "--to", tmp_path / "x")
    assert "exists already" in refused(capsys, *to_peft, "lora_a", "--to", tmp_path / "peft")
    back = ("lora", *where, "--folder", tmp_path / "peft")
    config, weights = (
        tmp_path / "peft" / "adapter_config.json",
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    good, whole = json.loads(config.read_text()), load_file(weights)
    for change, says in (
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 5}, "has the shapes"),
        ({"r": None}, "not complete"),
    ):
        config.write_text(json.dumps(good | change))
        assert says in refused(capsys, *back)
    config.write_text(json.dumps(good))
    save_file({"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    assert "is no part of LoRA" in refused(capsys, *back)
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 64)}, weights)
    assert "model.layers.7.self_attn.q_proj, which this model does not have" in refused(capsys, *back)
    save_file(whole, weights)
    assert not list((tmp_path / "lora").glob("peft*"))
    model = random_model(qk_norm=True, **MOE)
    config = LoRAConfig(rank=2, targets=("experts.0.up_proj",))
    add_lora(model, config)
    state = lora_state(model)
    with pytest.raises(checkpoint.CheckpointError, match="experts in one block"):
        write_peft_folder(state, config, 2, tmp_path / "hf", tmp_path / "moe")


def test_bad_input_is_one_sentence(tmp_path, capsys):
    save(random_model(use_moe=True, num_experts=2, moe_intermediate_size=32), tmp_path)
    assert "shared expert" in refused(capsys, "hf", "--save_dir", tmp_path, "--to", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))
    save(random_model(), tmp_path, "dense")
    dense = ("hf", "--save_dir", tmp_path, "--weight", "dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "exists already" in refused(capsys, *dense, "--to", tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    words = refused(capsys, *dense, "--to", tmp_path / "y", "--tokenizer", tmp_path / "empty")
    assert "tokenizer.json" in words and "--load_from" not in words
    (tmp_path / "y.part").mkdir()  # somebody's own
    convert(*dense, "--to", tmp_path / "y", "--check", 0)
    assert (tmp_path / "y.part").exists() and (tmp_path / "y" / "config.json").exists()
    assert "ends in .gguf" in refused(capsys, "gguf", *dense[1:], "--to", tmp_path / "m.bin")
    assert "no whole number" not in refused(capsys, *dense, "--to", tmp_path / "z", "--yarn_factor", 8)
    base = ("--base", tmp_path / "none", "--lora_weight", "a", "--to", tmp_path / "z")
    assert "no transformers folder" in refused(capsys, "peft", *dense[1:], *base)
    native = ("native", "--save_dir", tmp_path, "--folder")
    assert "config.json does not exist" in refused(capsys, *native, tmp_path / "empty")

    folder = tmp_path / "theirs"
    THEIRS["qwen3"]().save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, whole = json.loads(config.read_text()), weights.read_bytes()
    for change, says in (
        ({"model_type": "gpt2"}, "'gpt2' is none that is known here"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic' is not possible"),
        ({"num_hidden_layers": 3}, "do not fit"),
        ({"num_attention_heads": "four"}, "num_attention_heads = 'four' is no whole number"),
        ({"vocab_size": -5}, "vocab_size = -5 is no whole number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor = '4'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate = False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale = 0.7"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": ["yarn"]}, "cannot be used"),
        ({"eos_token_id": "</s>"}, "cannot be used"),
        ({"rms_norm_eps": "x"}, "cannot be used"),
        ({"layer_types": 3}, "cannot be used"),
        ({convert_hf.OURS: {"dropout": "x"}}, "dropout"),
    ):
        config.write_text(json.dumps(good | change))
        assert says in refused(capsys, *native, folder)
    config.write_text("{")
    assert "cannot be read" in refused(capsys, *native, folder)
    config.write_text(json.dumps(good))
    weights.write_bytes(whole[:3000])
    assert "half there" in refused(capsys, *native, folder)
    weights.unlink()
    assert "does not exist: the folder is incomplete" in refused(capsys, *native, folder)
    index = folder / convert_hf.INDEX
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "does not hold tensors by name" in refused(capsys, *native, folder)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    assert "names no files" in refused(capsys, *native, folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside its folder" in refused(capsys, *native, folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors does not exist" in refused(capsys, *native, folder)
    assert not list(tmp_path.glob("theirs_*")) and not list(tmp_path.glob(".*.part"))
