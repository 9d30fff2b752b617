"""Shared flags: one place, visible defaults, nonsense refused with a reason; and errors as one line."""

import re
import subprocess
import sys

import pytest
from train_helpers import REPO, stage_module

from trainer import cli

STAGES = ["pretrain", "full_sft", "lora", "reason", "dpo", "distillation", "reward"]
STAGES += ["grpo", "ppo", "spo", "agent"]

# MiniMind's flags of all its scripts, old and new spellings; what it declared but never read is left out.
MINIMIND_FLAGS = """
    --out_dir --save_dir --save_weight --epochs --batch_size --learning_rate --device --dtype
    --num_workers --accumulation_steps --grad_clip --warmup_iters --log_interval --save_interval
    --hidden_size --num_hidden_layers --max_seq_len --use_moe --data_path --from_weight
    --from_resume --use_wandb --wandb_project --use_compile
""".split()
OF_A_STAGE = {
    "lora": "--lora_name",
    "dpo": "--beta",
    "distillation": """--alpha --temperature --student_hidden_size --student_num_layers --student_use_moe
        --teacher_hidden_size --teacher_num_layers --teacher_use_moe --from_student_weight
        --from_teacher_weight""",
    "ppo": """--critic_learning_rate --clip_epsilon --vf_coef --kl_coef --gamma --lam --cliprange_value
        --ppo_update_iters --early_stop_kl --mini_batch_size --debug_log_ratio --reasoning --reward_model_path
        --max_gen_len --debug_mode --debug_interval --thinking_ratio --rollout_engine --sglang_base_url
        --sglang_shared_path""",
    "grpo": """--num_generations --beta --loss_type --epsilon --epsilon_high --reasoning --reward_model_path
        --max_gen_len --debug_mode --debug_interval --thinking_ratio --rollout_engine --sglang_base_url
        --sglang_shared_path""",
    "spo": "--beta --reasoning --reward_model_path --max_gen_len",
    "agent": """--num_generations --beta --loss_type --epsilon --epsilon_high --max_total_len --max_gen_len
        --debug_mode --debug_interval --thinking_ratio --reward_model_path --rollout_engine --sglang_base_url
        --sglang_shared_path""",
}


def parser_of(stage):
    """The parser a stage builds, caught on its way."""
    caught = []
    original = cli.StageParser.parse_args
    cli.StageParser.parse_args = lambda self, *a, **k: (caught.append(self), original(self, []))[1]
    try:
        stage_module(stage).parse_args([])
    finally:
        cli.StageParser.parse_args = original
    return caught[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_minimind_is_known(stage):
    known = {name for action in parser_of(stage)._actions for name in action.option_strings}
    assert {*MINIMIND_FLAGS, *OF_A_STAGE.get(stage, "").split()} <= known


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_default(stage):
    parser = parser_of(stage)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, "==SUPPRESS==") and action.option_strings:
            flag = re.escape(action.option_strings[-1])
            assert re.search(flag + r"\b.*?\(default: ", text), action.option_strings
    assert "None" not in text and str(REPO) not in text


@pytest.mark.parametrize("stage", STAGES)
def test_help_answers_without_torch(stage):
    code = (
        f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(REPO)!r})\n"
        f"from trainer import train_{stage} as stage\n"
        "try: stage.parse_args()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=20)


def test_architecture_flags_are_the_fields_of_the_config():
    import inspect

    from model.model_minimind import PRESETS, MiniMindConfig

    fields = set(inspect.signature(MiniMindConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(cli.ARCHITECTURE) | cli.NOT_FLAGS == fields
    assert set(cli.PRESETS) == set(PRESETS)


def test_bracketed_numbers_are_the_configs_defaults():
    from model.model_minimind import MiniMindConfig

    config = MiniMindConfig()
    for name, (kind, text) in cli.ARCHITECTURE.items():
        shown = re.search(r"\(([^()]*)\)$", text)[1]
        if name not in ("head_dim", "intermediate_size", "moe_intermediate_size"):
            value = getattr(config, name)
            assert shown == (str(int(value)) if kind == "bool" else shown)
            assert kind == "str" and shown == value or float(shown) == float(value), name


def test_the_config_takes_preset_and_flags():
    args = stage_module("pretrain").parse_args("--preset minimind-3 --hidden_size 128 --use_moe 1".split())
    config = cli.model_config(args)
    assert (config.hidden_size, config.num_key_value_heads, config.qk_norm) == (128, 4, True)
    assert config.use_moe is True
    plain = cli.model_config(stage_module("pretrain").parse_args([]))
    assert (plain.hidden_size, plain.num_hidden_layers) == (512, 8)


@pytest.mark.parametrize(
    "typed, reason",
    [
        ("--batch_size 0", "--batch_size: must be at least 1, not 0"),
        ("--batch_size two", "must be a whole number, not 'two'"),
        ("--batch_size 2.5", "must be a whole number"),
        ("--learning_rate -1", "must be above 0"),
        ("--learning_rate nan", "must be finite"),
        ("--dropout 1.5", "must be at most 1"),
        ("--use_moe maybe", "must be 0 or 1"),
        ("--val_fraction 0.9", "must be at most 0.5"),
        ("--max_seq_len 2", "must be at least 8"),
        ("--betas 0.9", "two numbers such as 0.9,0.95"),
        ("--betas 0.9,1.0", r"\[0, 1\)"),
        ("--schedule exponential", "invalid choice"),
        ("--preset big", "invalid choice"),
        ("--from_weight out/pretrain_512.pth", "plain name without folders"),
        ("--max_steps 5 --max_minutes 3", "give one of them"),
        ("--max_steps 5 --warmup_steps 5", "leaves nothing"),
        ("--num_attention_heads 6 --num_key_value_heads 4", "must be a multiple"),
        ("--val_path a --val_fraction 0.1", "do not give --val_fraction"),
        ("--bath_size 4", "unrecognized arguments: --bath_size"),
        ("--batch 4", "unrecognized arguments"),  # no guessing of abbreviations
    ],
)
def test_nonsense_ends_in_one_line_with_a_reason(typed, reason, capsys):
    with pytest.raises(SystemExit) as end:
        stage_module("pretrain").parse_args(typed.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.search(reason, error) and len(error.strip().splitlines()) == 1


def test_numbers_may_be_written_with_an_exponent():
    args = stage_module("pretrain").parse_args("--max_steps 2e3 --learning_rate 1e-4".split())
    assert args.max_steps == 2000 and args.learning_rate == 1e-4


def test_default_folders_come_from_the_place_of_the_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = stage_module("pretrain").parse_args(["--save_dir", "mine"])
    assert args.checkpoint_dir == REPO / "checkpoints" and str(args.save_dir) == "mine"


def test_an_unknown_default_is_a_mistake_of_the_stage():
    with pytest.raises(TypeError, match="no flag lerning_rate"):
        cli.stage_parser("doc", lerning_rate=1)


def test_a_flag_can_be_left_out():
    parser = cli.stage_parser("doc", muon_lr=cli.ABSENT)
    assert not hasattr(parser.parse_args([]), "muon_lr")


def test_errors_of_the_program_keep_their_traceback():
    def main(args):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main, lambda argv: None)


def test_running_out_of_memory_names_flags(capsys):
    def main(args):
        raise MemoryError

    with pytest.raises(SystemExit) as end:
        cli.run(main, stage_module("pretrain").parse_args, ["--batch_size", "32"])
    assert end.value.code == 2 and "--batch_size 16 --accumulation_steps 2" in capsys.readouterr().err


def test_data_is_found_in_the_usual_places(monkeypatch, tmp_path, capsys):
    from types import SimpleNamespace

    from dataset.rows import DataError

    monkeypatch.setattr(cli, "ROOT", tmp_path)
    (tmp_path / "dataset/mini").mkdir(parents=True)
    (tmp_path / "dataset/mini/pretrain.jsonl").touch()
    args = SimpleNamespace(data_path=None)
    assert cli.find_data(args, ["pretrain_hq.jsonl"], "pretrain.jsonl").endswith("mini/pretrain.jsonl")
    assert "no --data_path: using the embedded curriculum" in capsys.readouterr().out
    (tmp_path / "dataset/pretrain_hq.jsonl").touch()
    assert cli.find_data(args, ["pretrain_hq.jsonl"], "pretrain.jsonl").endswith("dataset/pretrain_hq.jsonl")
    with pytest.raises(DataError, match="--data_path .there is no dataset/my_bot.jsonl"):
        cli.find_data(args, ["my_bot.jsonl"], None)
    args.data_path = "mine.jsonl"
    assert cli.find_data(args, ["pretrain_hq.jsonl"], "pretrain.jsonl") == "mine.jsonl"


def settled(*flags, device="cpu", rows=256, width=256):
    flags = ["--hidden_size", width, *flags]
    args = cli.stage_parser("doc", max_seq_len=rows).parse_args([str(flag) for flag in flags])
    cli.settle(args, device)
    return args


def test_defaults_of_the_optimizers_follow_the_size_of_a_step():
    large, small = settled("--batch_size", 16), settled("--batch_size", 4)
    assert (large.learning_rate, large.muon_lr, large.muon_momentum) == (0.01, 0.02, 0.95)
    assert (small.learning_rate, small.muon_lr) == (0.01, 0.005)
    wide, narrow = settled("--batch_size", 4, width=1024), settled("--batch_size", 4, width=64)
    assert (wide.learning_rate, narrow.learning_rate) == (0.005, 0.01), "sinks with width"
    assert large.betas == pytest.approx((0.9, 0.99)) and small.betas == pytest.approx((0.6, 0.99))
    assert small.muon_momentum == pytest.approx(0.8)
    tiny = settled("--batch_size", 1)
    assert tiny.muon_lr == pytest.approx(0.005 * 0.5**0.5), "no further below 512 tokens"
    assert (tiny.learning_rate, tiny.betas, tiny.muon_momentum) == (
        small.learning_rate,
        small.betas,
        small.muon_momentum,
    )
    assert settled("--batch_size", 2, "--accumulation_steps", 8).muon_lr == 0.02, (
        "the step counts, not the batch"
    )
    adamw = settled("--batch_size", 4, "--optimizer", "adamw")
    assert (adamw.learning_rate, adamw.betas) == (2e-3, pytest.approx((0.9, 0.99)))


def test_what_is_given_stays():
    args = settled("--batch_size", 4, "--learning_rate", 0.5, "--betas", "0.1,0.2", "--muon_lr", 0.3)
    assert (args.batch_size, args.learning_rate, args.betas, args.muon_lr) == (4, 0.5, (0.1, 0.2), 0.3)


def test_a_longer_run_by_the_clock_takes_larger_steps():
    rows = [
        settled("--preset", "tiny", "--max_minutes", minutes).batch_size for minutes in (0.1, 5, 60, 6000)
    ]
    assert rows == sorted(rows) and rows[0] == 2 and rows[-1] == 64 and rows[1] < rows[2]
    assert settled().batch_size == 32 and settled(device="cuda").batch_size == 64


def test_default_rows_can_be_shared_by_processes():
    for device in ("cpu", "cuda"):
        for rows in (340, 512, 768, 1024):
            assert settled(device=device, rows=rows).batch_size % 8 == 0
    for minutes in (0.1, 1, 10):
        assert settled("--preset", "tiny", "--max_minutes", minutes, rows=768).batch_size % 2 == 0


def test_a_full_disk_is_one_line_wherever_it_shows():
    assert cli.is_for_the_user(OSError(28, "No space left on device"))
    assert not cli.is_for_the_user(OSError(9, "Bad file descriptor"))


def test_small_steps_are_made_of_short_rows():
    def shape(*flags, **options):
        args = settled(*flags, rows=None, **options)
        return args.batch_size, args.max_seq_len

    assert shape("--preset", "tiny", "--max_minutes", 0.1) == (8, 64)
    batch_size, long_row = shape("--preset", "tiny", "--max_minutes", 600)
    assert long_row == 340 and batch_size > 16
    assert shape("--max_minutes", 0.1, device="cuda")[1] == 340, "a GPU makes large steps"
    assert shape() == (24, 340) and shape("--batch_size", 4, "--max_minutes", 0.1) == (4, 64)
    assert shape("--max_seq_len", 512, "--max_minutes", 0.1) == (2, 512), "what is given stays"
