"""eval_llm with a tiny random model: every way to ask, every file it opens, what it says when it cannot."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eval_llm
from model.generation import Generator
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import checkpoint, cli

ROOT = Path(__file__).resolve().parents[1]


def tiny(hidden_size=32, **overrides):
    torch.manual_seed(hidden_size)
    config = dict(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512
    )
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden_size, **(config | overrides))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer()


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    identity = {"tokenizer": checkpoint.tokenizer_hash(tokenizer)}
    for name, stage, model in [
        ("full_sft_32", "full_sft", tiny()),
        ("pretrain_32", "pretrain", tiny()),
        ("dpo_32_moe", "dpo", tiny(use_moe=True, num_experts=2, moe_intermediate_size=32)),
    ]:
        checkpoint.save_weights(model, folder / f"{name}.pth", {**identity, "stage": stage})
    return folder


def run(monkeypatch, capsys, *flags, stdin=b"", terminal=None):
    """eval_llm in this process -> (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    if terminal is not None:  # what a person types
        lines = iter(terminal)
        asked = []

        def type_line(question=""):
            asked.append(question)
            line = next(lines, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", type_line)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", Terminal())
    try:
        cli.run(eval_llm.main, eval_llm.parse_args, [str(f) for f in flags])
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Terminal(io.StringIO):
    def isatty(self):
        return True


QUICK = ("--max_new_tokens", 6, "--seed", 1, "--device", "cpu", "--dtype", "float32")


def answers(output):
    return re.findall(r"💬: (.*)\n🧠: ((?:.|\n)*?)\n\[Speed\]: \d+\.\d\d tokens/s\n", output)


def test_prompt_flag_may_be_given_several_times(monkeypatch, capsys, out):
    code, output, err = run(
        monkeypatch, capsys, "--save_dir", out, "--prompt", "hello", "--prompt", "你好", *QUICK
    )
    assert code == 0 and [q for q, _ in answers(output)] == ["hello", "你好"]
    assert "full_sft_32.pth" in err and "0.2" in err and "float32" in err


def test_same_seed_same_answer(monkeypatch, capsys, out):
    flags = ("--save_dir", out, "--prompt", "hello", *QUICK)
    first, second = (answers(run(monkeypatch, capsys, *flags)[1]) for _ in range(2))
    assert first == second
    other = answers(run(monkeypatch, capsys, *flags, "--seed", 2, "--max_new_tokens", 20)[1])
    assert other != first


def test_piped_lines_are_prompts_and_nothing_is_asked(monkeypatch, capsys, out):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    stdin = "one\n\n  两个 \nthree".encode()
    code, output, _ = run(monkeypatch, capsys, "--save_dir", out, *QUICK, stdin=stdin)
    assert code == 0 and [q for q, _ in answers(output)] == ["one", "两个", "three"]
    assert "[0]" not in output


@pytest.mark.parametrize(
    "weight,prompts", [("full_sft", eval_llm.CHAT_PROMPTS), ("pretrain", eval_llm.TEXT_PROMPTS)]
)
def test_an_empty_pipe_gets_the_fixed_prompts(monkeypatch, capsys, out, weight, prompts):
    code, output, _ = run(monkeypatch, capsys, "--save_dir", out, "--weight", weight, *QUICK)
    assert code == 0 and tuple(q for q, _ in answers(output)) == prompts
    assert len(prompts) == 8


@pytest.mark.parametrize("end", ["", "/exit", EOFError, KeyboardInterrupt])
def test_chat_in_a_terminal_ends_politely(monkeypatch, capsys, out, end):
    code, output, err = run(monkeypatch, capsys, "--save_dir", out, *QUICK, terminal=["x", "1", "hi", end])
    assert code == 0 and output.count("🧠") == 1 and "Traceback" not in err


def test_terminal_choice_zero_asks_the_fixed_prompts(monkeypatch, capsys, out):
    code, output, _ = run(monkeypatch, capsys, "--save_dir", out, *QUICK, terminal=["0"])
    assert code == 0 and output.count("🧠") == 8


def test_ctrl_c_during_an_answer_ends_the_answer_only(monkeypatch, capsys, out):
    model = eval_llm.Native(eval_llm.parse_args(["--save_dir", str(out)]))

    def interrupted(prompt, settings):
        yield "partial", 1
        raise KeyboardInterrupt

    model.answer = interrupted
    monkeypatch.setattr(eval_llm, "load", lambda args: model)
    code, output, _ = run(monkeypatch, capsys, terminal=["1", "hi", "again", "/exit"])
    assert code == 0 and output.count("partial [stopped]") == 2
    code, output, _ = run(monkeypatch, capsys, "--prompt", "hi", "--prompt", "again")
    assert code == 130 and output.count("partial") == 1


@pytest.mark.parametrize("count", [0, 2, 3])
def test_the_model_sees_exactly_that_many_past_messages(monkeypatch, capsys, out, count):
    model = eval_llm.Native(eval_llm.parse_args(["--save_dir", str(out)]))
    seen = []
    model.encode = lambda messages, thinking: seen.append([m["content"] for m in messages]) or [1]
    model.answer = lambda ids, settings: iter([(f"answer {len(seen)}", 1)])
    monkeypatch.setattr(eval_llm, "load", lambda args: model)
    flags = [f for q in ("a", "b", "c") for f in ("--prompt", q)]
    run(monkeypatch, capsys, *flags, "--historys", count)
    past = ["a", "answer 1", "b", "answer 2"]
    assert seen[-1] == [*(past[-count:] if count else []), "c"]


def test_thoughts_of_an_answer_are_kept_apart_in_the_history():
    message = eval_llm.as_message("let me see\n</think>\n\nforty-two")
    assert message == {"role": "assistant", "content": "forty-two", "reasoning_content": "let me see"}
    assert eval_llm.as_message("plain") == {"role": "assistant", "content": "plain"}


def test_prompts_of_base_and_chat_weights(out, tokenizer):
    base = eval_llm.Native(eval_llm.parse_args(["--save_dir", str(out), "--weight", "pretrain"]))
    message = [{"role": "user", "content": "天空 is"}]
    assert base.encode(message, False) == [1, *tokenizer("天空 is", add_special_tokens=False).input_ids]
    chat = eval_llm.Native(eval_llm.parse_args(["--save_dir", str(out)]))
    for thinking in (False, True):
        text = tokenizer.decode(chat.encode(message, thinking))
        end = "<think>\n" if thinking else "<think>\n\n</think>\n\n"
        assert text == f"<|im_start|>user\n天空 is<|im_end|>\n<|im_start|>assistant\n{end}"


def save_folder(model, tokenizer, folder):
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_llama():
    """The same weights as transformers' Llama."""
    model = tiny()
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads rms_norm_eps rope_parameters max_position_embeddings tie_word_embeddings"
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names.split()}))
    llama.load_state_dict(model.state_dict())
    return llama.eval()


@pytest.mark.parametrize("make, engine", [(tiny, eval_llm.Native), (as_llama, eval_llm.Transformers)])
def test_a_transformers_folder_gives_the_same_greedy_text(
    monkeypatch, capsys, out, tokenizer, tmp_path, make, engine
):
    """By files, not by name: MiniMind took any path with `model` in it for its own weights."""
    folder = save_folder(make(), tokenizer, tmp_path / "my_model")
    assert type(eval_llm.load(eval_llm.parse_args(["--load_from", str(folder)]))) is engine
    flags = ("--prompt", "hello", "--temperature", 0, "--dtype", "float32", *QUICK)
    native = run(monkeypatch, capsys, "--save_dir", out, *flags)
    through_hf = run(monkeypatch, capsys, "--load_from", folder, *flags)
    assert native[0] == through_hf[0] == 0
    assert answers(native[1])[0] == answers(through_hf[1])[0]
    assert answers(native[1])[0][1]
    ours_alone = [("--lora_weight", "lora_a")]
    if engine is eval_llm.Transformers:
        ours_alone += [("--use_compile", 1), ("--dtype", "int8")]
    for flag in ours_alone:
        code, _, err = run(monkeypatch, capsys, "--load_from", folder, *flags, *flag)
        assert code == 2 and " ".join(map(str, flag)) in err and "transformers folder" in err


def test_broken_transformers_folders(monkeypatch, capsys, tokenizer, tmp_path):
    folder = save_folder(tiny(), tokenizer, tmp_path / "broken")
    config = folder / "config.json"
    for content, words in (("{", "config.json cannot be read"), ("[]", "config.json cannot be read")):
        whole = config.read_text()
        config.write_text(content)
        code, _, err = run(monkeypatch, capsys, "--load_from", folder, "--prompt", "x", *QUICK)
        assert code == 2 and words in err and "Traceback" not in err
        config.write_text(whole)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code, _, err = run(monkeypatch, capsys, "--load_from", folder, "--prompt", "x", *QUICK)
    assert code == 2 and "could not be loaded" in err and "Traceback" not in err
    weights.unlink()
    code, _, err = run(monkeypatch, capsys, "--load_from", folder, "--prompt", "x", *QUICK)
    assert code == 2 and "could not be loaded" in err and "Traceback" not in err


def test_use_compile_compiles_the_engine(monkeypatch, capsys, out):
    asked = []
    monkeypatch.setattr(Generator, "compile_all", lambda engine: asked.append(engine.dtype))
    flags = ("--save_dir", out, "--prompt", "x", "--dtype", "float32", *QUICK)
    for wanted in (0, 1):
        code, output, err = run(monkeypatch, capsys, *flags, "--use_compile", wanted)
        assert code == 0 and len(answers(output)) == 1
        assert len(asked) == wanted == int("compiling" in err)


def test_the_newest_file_is_taken_and_named(monkeypatch, capsys, out, tokenizer, tmp_path):
    checkpoint.save_weights(tiny(32), tmp_path / "full_sft_32.pth", {})
    time.sleep(0.02)
    checkpoint.save_weights(tiny(48), tmp_path / "full_sft_48.pth", {})
    code, _, err = run(monkeypatch, capsys, "--save_dir", tmp_path, "--prompt", "x", *QUICK)
    assert code == 0 and "taking the newest, full_sft_48.pth" in err
    code, _, err = run(
        monkeypatch, capsys, "--save_dir", tmp_path, "--hidden_size", 32, "--prompt", "x", *QUICK
    )
    assert code == 0 and "full_sft_32.pth:" in err and "taking the newest" not in err
    code, _, err = run(monkeypatch, capsys, "--weight", out / "dpo_32_moe.pth", "--prompt", "x", *QUICK)
    assert code == 0 and "dpo_32_moe.pth" in err


def test_mixture_weights_and_yarn(monkeypatch, capsys, out):
    flags = ("--save_dir", out, "--weight", "dpo", "--inference_rope_scaling", "--prompt", "x", *QUICK)
    code, output, _ = run(monkeypatch, capsys, *flags)
    assert code == 0 and len(answers(output)) == 1


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--weight", "grpo"], ["grpo_*.pth does not exist", "full_sft_32.pth"]),
        (["--hidden_size", "64"], ["full_sft_64.pth does not exist", "full_sft_32.pth", "--hidden_size"]),
        (["--preset", "minimind-3"], ["full_sft_768.pth does not exist"]),
        (["--num_hidden_layers", "9"], ["num_hidden_layers 2", "9"]),
        (["--load_from", "/nowhere"], ["/nowhere: there is neither config.json"]),
        (["--lora_weight", "lora_x"], ["lora_x"]),
        (["--top_p", "1.5"], ["--top_p", "at most 1"]),
        (["--temperature", "-1"], ["--temperature", "at least 0"]),
        (["--unknown", "1"], ["--unknown"]),
        (["--prompt", " "], ["--prompt is empty"]),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(monkeypatch, capsys, out, flags, words):
    flags = flags if "--prompt" in flags else [*flags, "--prompt", "x"]
    code, output, err = run(monkeypatch, capsys, "--save_dir", out, *flags)
    assert code == 2 and "Traceback" not in err and output == ""
    assert len(err.strip().splitlines()) == 1
    assert all(word in err for word in words), err


def test_a_damaged_file_and_a_wrong_vocabulary(monkeypatch, capsys, out, tmp_path):
    whole = (out / "full_sft_32.pth").read_bytes()
    (tmp_path / "full_sft_32.pth").write_bytes(whole[: len(whole) // 2])
    code, _, err = run(monkeypatch, capsys, "--save_dir", tmp_path, "--prompt", "x")
    assert code == 2 and "damaged" in err and "Traceback" not in err
    checkpoint.save_weights(tiny(), tmp_path / "full_sft_32.pth", {"tokenizer": "0123456789abcdef"})
    code, _, err = run(monkeypatch, capsys, "--save_dir", tmp_path, "--prompt", "x")
    assert code == 2 and "vocabulary" in err


def test_a_prompt_that_does_not_fit_is_said_and_the_others_are_answered(monkeypatch, capsys, out):
    stdin = f"short\n{'word ' * 3000}\nlast\n".encode()
    code, output, err = run(monkeypatch, capsys, "--save_dir", out, *QUICK, stdin=stdin)
    assert code == 2 and "512 positions" in err
    assert output.count("[Speed]") == 2 and "💬: last\n" in output


def test_bytes_that_are_not_utf8_are_refused_with_their_line(monkeypatch, capsys, out):
    code, output, err = run(monkeypatch, capsys, "--save_dir", out, *QUICK, stdin=b"fine\n\xff\xfe\n")
    assert code == 2 and "line 2" in err and "UTF-8" in err and len(answers(output)) == 1


def test_old_names_mean_the_same(tmp_path):
    args = eval_llm.parse_args(
        [
            "--out_dir",
            str(tmp_path),
            "--history_cnt",
            "2",
            "--lora_name",
            "l",
            "--model_mode",
            "0",
            "--max_seq_len",
            "9",
        ]
    )
    assert (args.save_dir, args.historys, args.lora_weight) == (tmp_path, 2, "l")
    assert (args.weight, args.max_new_tokens) == ("pretrain", 9)
    assert eval_llm.parse_args(["--load", "1"]).load_from == Path("MiniMind2")


def test_defaults_are_miniminds():
    args = eval_llm.parse_args([])
    defaults = dict(
        weight="full_sft", max_new_tokens=8192, temperature=0.85, top_p=0.95, historys=0, show_speed=1
    )
    assert {k: getattr(args, k) for k in defaults} == defaults
    assert args.save_dir == ROOT / "out" and args.open_thinking == 0 and not args.inference_rope_scaling


def test_help_is_quick_and_shows_defaults_from_any_directory(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "eval_llm.py"), "--help"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, encoding="utf-8")
    assert done.returncode == 0 and time.perf_counter() - start < 3
    for text in ("--temperature", "0.85", "--max_new_tokens", "8192", "--open_thinking"):
        assert text in done.stdout


def test_as_a_process_with_a_pipe_from_another_directory(out, tmp_path):
    command = [sys.executable, str(ROOT / "eval_llm.py"), "--save_dir", str(out), *map(str, QUICK)]
    done = subprocess.run(
        command, input="你好\n".encode(), capture_output=True, cwd=tmp_path, env=plain_env()
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(answers(done.stdout.decode("utf-8"))) == 1


def plain_env():
    """A locale that knows nothing but ASCII."""
    import os

    return {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}


def test_minimind_files_without_metadata_open(monkeypatch, capsys, tmp_path):
    state = {k: v.half() for k, v in tiny(64, num_attention_heads=8).state_dict().items()}
    torch.save(state, tmp_path / "full_sft_64.pth")
    code, output, _ = run(monkeypatch, capsys, "--save_dir", tmp_path, "--prompt", "x", *QUICK)
    assert code == 0 and len(answers(output)) == 1


def test_nothing_from_a_folder_is_executed(tmp_path, tokenizer, monkeypatch, capsys):
    """A config that asks for its own code is refused, not run."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        ),
        encoding="utf-8",
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')", encoding="utf-8")
    code, _, err = run(monkeypatch, capsys, "--load_from", tmp_path, "--prompt", "x", *QUICK)
    assert code == 2 and "could not be loaded" in err and "code was run" not in err


# ----------------------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(out):
    """Two adapters in the folder lora beside the weights."""
    from model.model_lora import LoRAConfig, adapters, add_lora

    model, metadata = checkpoint.load_model(out / "full_sft_32.pth")
    config = LoRAConfig(4)
    add_lora(model, config)
    for seed, name in enumerate(("lora_a", "lora_b")):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in adapters(model).values():
                layer.B.normal_(0, 0.2, generator=draw)
        parent = {"weight": "full_sft", "step": 7, "crc32": metadata["crc32"] if name == "lora_a" else 1}
        checkpoint.save_adapter(config, model, out / "lora" / f"{name}_32.pth", {"parent": parent})
    return out


def loaded(out, names):
    return eval_llm.Native(eval_llm.parse_args(["--save_dir", str(out), "--lora_weight", names])).engine.model


@pytest.mark.parametrize("names", ["lora_a", "lora_a:0.5", "lora_a,lora_b", "lora_a:0.5,lora_b:2", "path"])
def test_adapters_are_added_by_name_and_by_half(adapted, names):
    """W + s 4 B A of each (rank 4, alpha 16)."""
    parts = [part.partition(":") for part in names.split(",")]
    if names == "path":
        names, parts = str(adapted / "lora/lora_a_32.pth"), [("lora_a", "", "")]
    plain = checkpoint.load_model(adapted / "full_sft_32.pth")[0].state_dict()
    wanted = {name: tensor.double() for name, tensor in plain.items()}
    for name, _, scale in parts:
        state, config, _ = checkpoint.read_adapter(adapted / f"lora/{name}_32.pth")
        for key in (key for key in state if key.endswith("A")):
            delta = state[key[:-1] + "B"].double() @ state[key].double()
            layer = key.split(".lora.")[0]
            wanted[f"{layer}.weight"] += float(scale or 1) * config.alpha / config.rank * delta
    found = loaded(adapted, names).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    name = "model.layers.0.mlp.down_proj.weight"
    assert (found[name] - plain[name]).abs().max() > 0.05


def test_answers_with_an_adapter_are_those_of_the_merged_file(monkeypatch, capsys, adapted, tmp_path):
    from scripts import merge_lora

    path = tmp_path / "merged_32.pth"
    flags = ["--weight", adapted / "full_sft_32.pth", "--lora_weight", "lora_a", "--save_path", path]
    cli.run(merge_lora.main, merge_lora.parse_args, [str(flag) for flag in flags])
    ask = ("--prompt", "hello", *QUICK, "--max_new_tokens", 20)
    plain = run(monkeypatch, capsys, "--save_dir", adapted, *ask)
    code, output, err = run(monkeypatch, capsys, "--save_dir", adapted, "--lora_weight", "lora_a", *ask)
    merged = run(monkeypatch, capsys, "--weight", path, *ask)
    assert code == merged[0] == 0 and "with lora_a" in err and "note:" not in err
    assert answers(output) == answers(merged[1]) != answers(plain[1])


def test_an_adapter_of_other_weights_is_used_with_a_note(monkeypatch, capsys, adapted):
    flags = ("--save_dir", adapted, "--lora_weight", "lora_b", "--prompt", "x", *QUICK)
    code, output, err = run(monkeypatch, capsys, *flags)
    assert code == 0 and len(answers(output)) == 1
    assert "lora_b_32.pth was trained on other weights (full_sft, step 7)" in err


@pytest.mark.parametrize(
    "names", ["lora_x", "lora_a,lora_x:0.5", "lora_a:-1", "lora_a:1.2.3", "lora_a:2x", ","]
)
def test_an_adapter_that_is_not_there_is_one_line(monkeypatch, capsys, adapted, names):
    flags = ("--save_dir", adapted, "--lora_weight", names, "--prompt", "x", *QUICK)
    code, output, err = run(monkeypatch, capsys, *flags)
    errors = [line for line in err.splitlines() if "was trained on other" not in line]
    assert code == 2 and output == "" and len(errors) == 1 and "Traceback" not in err
    assert names.split(",")[-1].split(":")[0] in errors[0], errors
