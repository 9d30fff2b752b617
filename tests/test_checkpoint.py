"""Files: whole or not at all, strict on load, one sentence when something does not fit."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from train_helpers import REPO, assert_bit_equal

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import checkpoint
from trainer.checkpoint import CheckpointError

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=100
)


def new_model(**changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**(SHAPE | {"residual_init": "normal"} | changes)))


def saved(tmp_path, model=None, dtype="float32", **metadata):
    path = tmp_path / "pretrain_32.pth"
    checkpoint.save_weights(model or new_model(), path, {"stage": "pretrain", "step": 7, **metadata}, dtype)
    return path


def test_names():
    args = SimpleNamespace(save_dir="out", checkpoint_dir="checkpoints", save_weight="pretrain")
    dense, moe = MiniMindConfig(hidden_size=512), MiniMindConfig(hidden_size=640, use_moe=True)
    assert str(checkpoint.weight_path(args, dense)) == os.path.join("out", "pretrain_512.pth")
    assert str(checkpoint.weight_path(args, moe, "full_sft")) == os.path.join("out", "full_sft_640_moe.pth")
    assert checkpoint.resume_path(args, moe).name == "pretrain_640_moe_resume.pth"


@pytest.mark.parametrize("changes", [{}, {"use_moe": True}, {"qk_norm": True, "tie_word_embeddings": False}])
def test_weights_come_back_bit_equal_and_are_a_plain_state_dict(tmp_path, changes):
    model = new_model(**changes)
    path = saved(tmp_path, model)
    other = new_model(**changes)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    metadata = checkpoint.load_weights(other, path)
    assert_bit_equal(model.state_dict(), other.state_dict())
    assert (metadata["stage"], metadata["step"]) == ("pretrain", 7)
    content = torch.load(path, weights_only=True)
    assert set(content) == set(model.state_dict()) | {"__metadata__"}


def test_a_tied_head_is_stored_once(tmp_path):
    model = new_model()
    size = saved(tmp_path, model).stat().st_size
    numbers = sum(p.numel() for p in model.parameters()) * 4
    assert numbers < size < numbers + 30_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_dtypes_only_when_asked(tmp_path, dtype):
    path = saved(tmp_path, dtype=dtype)
    state, _ = checkpoint.read_weights(path)
    assert {t.dtype for t in state.values()} == {getattr(torch, dtype)}
    model = new_model()
    checkpoint.load_weights(model, path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("moe", [False, True])
def test_minimind_files_load(tmp_path, with_head, dtype, moe):
    """Its trainers write `{name: tensor.half()}` and nothing else; the tied head may be there or not."""
    model = new_model(use_moe=moe)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if not with_head:
        del state["lm_head.weight"]
    torch.save(state, tmp_path / "theirs.pth")
    other = new_model(use_moe=moe)
    assert checkpoint.load_weights(other, tmp_path / "theirs.pth") == {}
    assert all(p.to(dtype).equal(state[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3),
        dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1, qk_norm=True,
             rms_norm_eps=1e-6, use_moe=True, num_experts_per_tok=1, n_shared_experts=0),
        dict(hidden_size=64, num_attention_heads=8, num_hidden_layers=1, use_moe=True, num_experts=5),
    ],
)  # fmt: skip
def test_the_architecture_of_a_minimind_file_is_read_from_its_shapes(tmp_path, config):
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=100, **config)).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    other, _ = checkpoint.load_model(tmp_path / "theirs.pth")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_load_model_needs_the_file_only(tmp_path):
    model = new_model(qk_norm=True, rope_theta=5e4).eval()
    other, metadata = checkpoint.load_model(saved(tmp_path, model))
    assert other.config.rope_theta == 5e4 and not other.training
    ids = torch.arange(12)[None]
    assert other(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_hidden_layers": 4}, r"num_hidden_layers 2 \(this run: 4\): pass --num_hidden_layers 2"),
        ({"hidden_size": 64}, r"hidden_size 32 \(this run: 64\)"),
        ({"vocab_size": 90}, r"vocab_size 100 \(this run: 90\)"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads 1 \(this run: 2\)"),
        ({"qk_norm": True}, r"pass --qk_norm 0"),
        ({"use_moe": True}, r"use_moe False \(this run: True\)"),
        ({"rope_theta": 1e4}, r"rope_theta 1000000.0 \(this run: 10000.0\)"),
    ],
)
def test_another_architecture_names_both_sides(tmp_path, changes, sentence):
    """The fields alone would not always show in shapes: rope_theta does not, a depth of 2 loads into 4."""
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load_weights(new_model(**changes), saved(tmp_path))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_hidden_layers": 4}, r"num_hidden_layers 2 \(this run: 4\)"),
        ({"vocab_size": 90}, r"vocab_size 100"),
        ({"num_key_value_heads": 2}, r"k_proj.weight is \(16, 32\), this model wants \(32, 32\)"),
    ],
)
def test_so_do_files_without_metadata(tmp_path, changes, sentence):
    torch.save(new_model().state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load_weights(new_model(**changes), tmp_path / "theirs.pth")


def test_missing_and_unexpected_names(tmp_path):
    state = new_model().state_dict()
    state["model.extra"] = state.pop("model.norm.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="lacks model.norm.weight and also has model.extra"):
        checkpoint.load_weights(new_model(), tmp_path / "odd.pth")


def test_another_vocabulary_is_refused(tmp_path):
    tokenizer = checkpoint.load_tokenizer()
    model = new_model(vocab_size=6400)
    checkpoint.load_weights(
        model, saved(tmp_path, model, tokenizer=checkpoint.tokenizer_hash(tokenizer)), tokenizer
    )
    with pytest.raises(CheckpointError, match="trained with vocabulary 0123, this run uses"):
        checkpoint.load_weights(model, saved(tmp_path, model, tokenizer="0123"), tokenizer)


def damaged(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "cut by a little":
        data = data[:-10]
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data = b""
    elif damage == "text":
        data = b"version https://git-lfs.github.com/spec/v1\n"
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "cut by a little", "one bit", "empty", "text"])
def test_damaged_files_are_noticed(tmp_path, damage):
    path = saved(tmp_path)
    damaged(path, damage)
    with pytest.raises(CheckpointError, match="pretrain_32.pth"):
        checkpoint.load_weights(new_model(), path)


def test_a_changed_number_and_changed_metadata_are_noticed(tmp_path):
    path = saved(tmp_path)
    for change in (
        lambda content: content["model.norm.weight"].mul_(2),
        lambda content: content["__metadata__"].update(stage="full_sft"),
    ):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "tampered.pth")
        with pytest.raises(CheckpointError, match="changed after it was written"):
            checkpoint.load_weights(new_model(), tmp_path / "tampered.pth")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"model.norm.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        checkpoint.read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_resume_file_is_no_weight_file(tmp_path):
    torch.save({"model": {}, "optimizers": []}, tmp_path / "resume.pth")
    with pytest.raises(CheckpointError, match="is a resume file"):
        checkpoint.read_weights(tmp_path / "resume.pth")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_weights_never_replace_good_ones(tmp_path, poison):
    path = saved(tmp_path)
    before = path.read_bytes()
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight[3] = poison
    with pytest.raises(
        CheckpointError, match="NaN or infinity and were not saved.*previous file is still there"
    ):
        saved(tmp_path, model)
    assert path.read_bytes() == before


def test_broken_weights_do_not_load(tmp_path):
    state = new_model().state_dict()
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="contains NaN or infinity in model.norm.weight"):
        checkpoint.load_weights(new_model(), tmp_path / "nan.pth")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace", "shutil.disk_usage"])
def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, where):
    path = saved(tmp_path)
    before = path.read_bytes()
    module, name = where.split(".")
    full = no_space if name != "disk_usage" else lambda path: SimpleNamespace(free=1000)
    monkeypatch.setattr({"torch": torch, "os": os, "shutil": checkpoint.shutil}[module], name, full)
    with pytest.raises(CheckpointError, match="disk full.*previous file is still there.*--save_dir"):
        saved(tmp_path, step=8)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_disk_that_fills_up_while_writing_keeps_the_previous_file(tmp_path):
    """The real thing as far as a test can go: the kernel refuses to let the file grow."""
    pytest.importorskip("resource")
    code = f"""
import resource, sys
sys.path.insert(0, {str(REPO)!r})
import torch
from pathlib import Path
from trainer.checkpoint import CheckpointError, write_file
path = Path({str(tmp_path / "w.pth")!r})
write_file({{"a": torch.zeros(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_file({{"a": torch.zeros(1_000_000)}}, path)
except CheckpointError as error:
    assert "disk full" in str(error) and "previous file is still there" in str(error), error
    assert torch.load(path, weights_only=True)["a"].shape == (10,)
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert os.listdir(tmp_path) == ["w.pth"]


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Make the folder writable"):
        checkpoint.write_file({}, tmp_path / "file" / "w.pth")


def test_missing_weights_name_the_stage_that_writes_them(tmp_path):
    (tmp_path / "full_sft_256.pth").touch()
    message = checkpoint.missing_weight(tmp_path / "full_sft_512.pth", "full_sft")
    assert "does not exist (there is full_sft_256.pth" in message
    assert "run trainer/train_full_sft.py first" in message and "--from_weight none" in message


def test_checksums_see_every_part():
    base = {"a": torch.zeros(3), "b": [1, {"c": "x"}]}
    changed = [
        {"a": torch.zeros(3, dtype=torch.float64), "b": [1, {"c": "x"}]},
        {"a": torch.zeros(1, 3), "b": [1, {"c": "x"}]},
        {"a": torch.zeros(3), "b": [1, {"c": "y"}]},
        {"a": torch.zeros(3), "B": [1, {"c": "x"}]},
        {"a": torch.tensor([0.0, 0.0, 1e-30]), "b": [1, {"c": "x"}]},
    ]
    sums = [checkpoint.checksum(content) for content in [base, *changed]]
    assert len(set(sums)) == 6
    assert checkpoint.checksum({"a": torch.ones(3, dtype=torch.bfloat16)})
