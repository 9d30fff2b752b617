"""Long context: what YaRN changes, the length that weights remember, and training on at a longer one."""

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_convert import random_model, save
from train_helpers import TINY, assert_bit_equal, stop_after, train, weights, write_lines
from transformers import Qwen3Config, Qwen3ForCausalLM

from model.model_lora import LoRAConfig, add_lora
from model.model_minimind import MiniMindConfig, MiniMindLM
from scripts import convert_hf, eval_ppl
from trainer import checkpoint, cli

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
TEXT = "The ship sailed on, and the sea was calm. 天空很蓝，海水很静。\n" * 60


def test_losses_are_those_of_transformers(tmp_path):
    """By window and by place, plain and with YaRN, against Qwen3 of transformers."""
    ours = random_model(qk_norm=True, original_max_position_embeddings=16)
    windows = torch.randint(0, 6400, (3, 64))
    sizes = torch.randint(1, 5, (6400,), dtype=torch.uint8)
    for factor in (None, 4.0):
        ours.model.rotary = eval_ppl.rotary_table(ours.config, factor)
        config = copy.deepcopy(ours.config)
        if factor:
            config.yarn_factor = factor
            config.stretch_positions()
        theirs = Qwen3ForCausalLM(Qwen3Config(**convert_hf.to_hf_config(config, "float32"))).eval()
        theirs.load_state_dict(ours.state_dict())
        with torch.inference_mode():
            logits = theirs(windows).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(
            3, 63
        )
        assert (eval_ppl.window_losses(ours, windows) - expected).abs().max() < 1e-4
        found = eval_ppl.measure(ours, windows.flatten(), sizes, [32, 64], 16)
        bits = (expected.sum() / math.log(2) / sizes[windows[:, 1:]].sum()).item()
        assert found["by_length"][64] == pytest.approx(bits, rel=1e-5)
        assert list(found["by_place"]) == ["1-15", "16-31", "32-63"]
        part = (expected[:, 15:31].sum() / math.log(2) / sizes[windows[:, 16:32]].sum()).item()
        assert found["by_place"]["16-31"] == pytest.approx(part, rel=1e-5)


def test_weights_without_the_flag_are_as_trained_and_with_it_use_their_own_length(tmp_path):
    path = save(random_model(original_max_position_embeddings=96), tmp_path)
    x = torch.arange(5, 105)[None]
    plain, _ = checkpoint.load_model(path)
    scaled, _ = checkpoint.load_model(path, inference_rope_scaling=True, yarn_factor=8.0)
    with torch.inference_mode():
        assert torch.equal(plain(x).logits, random_model()(x).logits)
        assert not torch.allclose(scaled(x).logits, plain(x).logits, atol=1e-2)
    rope = scaled.config.rope_parameters
    assert (rope["original_max_position_embeddings"], rope["factor"]) == (96, 8)
    assert scaled.config.max_position_embeddings == 8 * 96


def long_file(folder, words=120, rows=40):
    return write_lines(
        folder, "long.jsonl", [{"text": f"{i} " + "sun moon stone " * words} for i in range(rows)]
    )


def positions(folder, name) -> tuple:
    config = checkpoint.read_weights(folder / "out" / f"{name}_32.pth")[1]["config"]
    rope = config["rope_parameters"]
    return config["original_max_position_embeddings"], rope["rope_type"], rope.get("factor")


def test_weights_remember_the_longest_length_they_were_trained_at(tmp_path):
    data = long_file(tmp_path)
    short = write_lines(tmp_path, "short.jsonl", [{"text": "red blue " * 5}] * 40)
    train("pretrain", tmp_path, "--data_path", data, "--max_seq_len", 64, steps=2)
    assert positions(tmp_path, "pretrain") == (64, "default", None)
    more = ("--from_weight", "pretrain", "--save_weight", "more", "--max_seq_len", 128, "--data_path")
    train("pretrain", tmp_path, *more, short, steps=2)
    assert positions(tmp_path, "more")[0] == 64  # rows of 128, but nothing in them is so long
    train("pretrain", tmp_path, *more, data, steps=2)
    assert positions(tmp_path, "more")[0] == 128
    again = ("--from_weight", "more", "--save_weight", "again", "--max_seq_len", 64, "--data_path", data)
    train("pretrain", tmp_path, *again, steps=2)
    assert positions(tmp_path, "again")[0] == 128


def test_one_long_document_among_thousands_does_not_count():
    from dataset.lm_dataset import PackedDataset

    def length(lengths):
        dataset = PackedDataset([], [0] * len(lengths), lengths, [0], 4096, 0, None, {})
        return dataset.length_of_pieces

    assert length([100] * 1000) == 100
    assert length([100] * 1000 + [900]) == 100
    assert length([100] * 1000 + [900] * 3) == 900


def test_training_goes_on_at_a_longer_length_with_yarn_and_later_stages_keep_it(tmp_path, monkeypatch):
    data = long_file(tmp_path)
    train("pretrain", tmp_path, "--data_path", data, "--max_seq_len", 64, steps=2)
    stretch = ["--from_weight", "pretrain", "--save_weight", "far", "--max_seq_len", 256, "--data_path", data]
    stretch += ["--inference_rope_scaling", 1, "--yarn_factor", 4]
    train("pretrain", tmp_path, *stretch, steps=4)
    assert positions(tmp_path, "far") == (64, "yarn", 4)
    whole = weights(tmp_path, "far_32.pth")
    with monkeypatch.context() as patch:  # the same run, stopped in the middle and resumed
        stop_after(patch, 2)
        train("pretrain", tmp_path, *stretch, steps=4)
    train("pretrain", tmp_path, *stretch, "--from_resume", 1, steps=4)
    assert_bit_equal(whole, weights(tmp_path, "far_32.pth"))
    assert positions(tmp_path, "far") == (64, "yarn", 4)

    train("full_sft", tmp_path, "--from_weight", "far", steps=2)
    assert positions(tmp_path, "full_sft") == (64, "yarn", 4)
    model, _ = checkpoint.load_model(tmp_path / "out" / "full_sft_32.pth")
    twin = MiniMindLM(
        MiniMindConfig(**{**model.config.to_dict(), "rope_parameters": None, "inference_rope_scaling": False})
    )
    twin.load_state_dict(model.state_dict())
    x = torch.arange(5, 85)[None]
    assert not torch.equal(model(x).logits, twin.eval()(x).logits)


def test_the_reference_and_adapters_have_the_positions_of_the_run(tmp_path, capsys):
    """The model that a run began with is as stretched as the run's own; an adapter brings its positions."""
    from types import SimpleNamespace

    import eval_llm
    from trainer import train_dpo

    config = dict(SMALL, original_max_position_embeddings=64)
    model = MiniMindLM(MiniMindConfig(**config, residual_init="normal")).eval()
    checkpoint.save_weights(model, tmp_path / "full_sft_32.pth", {"stage": "full_sft"})
    crc32 = checkpoint.read_weights(tmp_path / "full_sft_32.pth")[1]["crc32"]
    flags = ["--inference_rope_scaling", "1", "--yarn_factor", "4", "--save_dir", str(tmp_path)]
    args = train_dpo.parse_args([*TINY, *flags])
    parent, rt = {"weight": "full_sft", "crc32": crc32}, SimpleNamespace(device=torch.device("cpu"))
    reference = checkpoint.load_parent(args, parent, None, rt)
    assert reference.config.rope_parameters["factor"] == 4

    adapted = copy.deepcopy(model)
    adapted.config.yarn_factor = 4.0
    adapted.config.stretch_positions()
    add_lora(adapted, LoRAConfig(rank=2))
    (tmp_path / "lora").mkdir()
    checkpoint.save_adapter(LoRAConfig(rank=2), adapted, tmp_path / "lora" / "far_32.pth", {"stage": "lora"})
    base, metadata = checkpoint.load_model(tmp_path / "full_sft_32.pth")
    checkpoint.merge_adapters(base, "far", tmp_path, metadata)
    assert base.config.rope_parameters == adapted.config.rope_parameters

    checkpoint.save_weights(adapted, tmp_path / "x_32.pth", {}, state=base.state_dict())
    with pytest.raises(checkpoint.CheckpointError, match="YaRN x4, and keep them"):
        checkpoint.load_model(tmp_path / "x_32.pth", inference_rope_scaling=True, yarn_factor=8.0)
    same, _ = checkpoint.load_model(tmp_path / "x_32.pth", inference_rope_scaling=True)
    assert same.config.rope_parameters["factor"] == 4
    with pytest.raises(checkpoint.CheckpointError, match="stretches nothing"):
        eval_llm.position_overrides(eval_llm.parse_args(["--yarn_factor", "8"]))


def test_a_resumed_run_cannot_change_its_positions(tmp_path, capsys):
    train("pretrain", tmp_path, "--data_path", long_file(tmp_path), steps=4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        changed = ("--inference_rope_scaling", 1, "--from_resume", 1)
        train("pretrain", tmp_path, "--data_path", tmp_path / "long.jsonl", *changed, steps=4)
    assert "--inference_rope_scaling None -> 1" in capsys.readouterr().err


def run(*flags):
    eval_ppl.main(eval_ppl.parse_args([str(flag) for flag in flags]))


def test_the_command(tmp_path, capsys):
    save(random_model(original_max_position_embeddings=32), tmp_path, "pretrain")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    flags = ("--weight", "pretrain", "--save_dir", tmp_path, "--text", tmp_path / "a.txt")
    run(*flags, "--to", tmp_path / "x.json")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert result["trained_length"] == 32 and result["yarn_factor"] == 8
    (about,) = result["texts"].values()
    assert about["bytes"] <= len(TEXT.encode()) and about["tokens"] % 256 == 0
    assert list(about["plain"]["by_length"]) == ["16", "32", "64", "128", "256"]
    assert about["plain"]["by_length"]["256"] != about["yarn x8"]["by_length"]["256"]
    shown = re.search(r"256 +8x +([\d.]+) +([\d.]+)", printed)
    assert float(shown[1]) == pytest.approx(about["plain"]["by_length"]["256"], abs=1e-4)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))

    save(
        random_model(inference_rope_scaling=True, yarn_factor=4.0, original_max_position_embeddings=32),
        tmp_path,
    )
    run("--weight", "full_sft", *flags[2:], "--lengths", "64,128", "--to", tmp_path / "y.json")
    result = json.loads((tmp_path / "y.json").read_text(encoding="utf-8"))
    assert result["trained_length"] == 128 and "yarn x4" in result["texts"][str(tmp_path / "a.txt")]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    save(random_model(), tmp_path, "pretrain")
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("short.txt", "fewer than the longest"),
        ("odd.txt", "UTF-8"),
        ("no.txt", "is no file"),
    ):
        with pytest.raises(SystemExit) as error:
            flags = ["--weight", "pretrain", "--save_dir", tmp_path, "--text", tmp_path / name]
            cli.run(eval_ppl.main, eval_ppl.parse_args, [str(flag) for flag in flags])
        err = capsys.readouterr().err
        assert error.value.code == 2 and says in err and "Traceback" not in err
    assert not list(tmp_path.glob("*.json"))
