"""The flags every stage shares, written once, with per-stage defaults; and the frame that turns errors into
one line.

Light on purpose: nothing here imports torch before training starts, so `--help` answers at once.

    parser = stage_parser(__doc__, save_weight="pretrain", from_weight="none", batch_size=32)
    parser.add_argument("--beta", type=positive_float, default=0.1, help="...")  # the stage's own flags
    args = parser.parse_args(argv)  # checked: nonsense ends here
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import math
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Flag -> (MiniMindConfig field, type, help). None = what the preset says. A test keeps this table and the
# class alike.
ARCHITECTURE = {
    "hidden_size": ("int", "width of the model; part of the file names (512)"),
    "num_hidden_layers": ("int", "number of blocks (8)"),
    "num_attention_heads": ("int", "query heads (8)"),
    "num_key_value_heads": ("int", "key/value heads shared by groups of query heads (2)"),
    "head_dim": ("int", "size of a head (hidden_size / heads)"),
    "intermediate_size": (
        "int",
        "width of the feed-forward (8/3 hidden_size, rounded up to a multiple of 64)",
    ),
    "vocab_size": ("int", "entries of the embedding; must match the tokenizer (6400)"),
    "max_position_embeddings": ("int", "positions the rotary table covers (32768)"),
    "original_max_position_embeddings": (
        "int",
        "longest length the weights were trained at; without it what their file says (2048)",
    ),
    "inference_rope_scaling": (
        "bool",
        "1 = YaRN: the positions of the length that --from_weight was trained at are stretched, so that "
        "--max_seq_len can go beyond (0)",
    ),
    "yarn_factor": ("float", "how far YaRN stretches, 1 to 1024 (16)"),
    "rope_theta": ("float", "base of the rotary frequencies (1e6)"),
    "rms_norm_eps": ("float", "epsilon of the norms (1e-5)"),
    "qk_norm": ("bool", "1 = RMSNorm on query and key heads, as Qwen3 (0)"),
    "hidden_act": ("str", "activation of the feed-forward (silu)"),
    "tie_word_embeddings": ("bool", "1 = the output head is the embedding (1)"),
    "initializer_range": ("float", "standard deviation of fresh weights (0.02)"),
    "residual_init": (
        "str",
        "start of the projections that write the residual: zero, scaled or normal (zero)",
    ),
    "dropout": ("float", "share of activations zeroed in training, 0 to 1 (0)"),
    "use_moe": ("bool", "1 = mixture-of-experts feed-forward, and _moe in the file names (0)"),
    "num_experts": ("int", "routed experts (4)"),
    "num_experts_per_tok": ("int", "routed experts a token visits (2)"),
    "n_shared_experts": ("int", "experts every token visits (1)"),
    "moe_intermediate_size": ("int", "width of one expert (intermediate_size)"),
    "norm_topk_prob": ("bool", "1 = router weights of the chosen experts sum to one (1)"),
    "router_aux_loss_coef": ("float", "weight of the balance loss (0.01)"),
}
# Fields that are no flag: special token ids come with the tokenizer, the cache is a matter of inference,
# and a RoPE dictionary does not fit a command line.
NOT_FLAGS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "rope_parameters"}
PRESETS = ("tiny", "minimind2-small", "minimind2-moe", "minimind2", "minimind-3", "minimind-3-moe")


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def number_type(kind, low=None, high=None, above=None, why=""):
    """An argparse type that refuses what makes no sense, and says why."""

    def convert(text):
        try:
            value = kind(float(text)) if kind is int and re.fullmatch(r"\d+(\.0*)?e\d+", text) else kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        tail = f": {why}" if why else ""
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}{tail}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}{tail}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, not {text}{tail}")
        return value

    return convert


positive_int = number_type(int, low=1)
count = number_type(int, low=0)
positive_float = number_type(float, above=0)
non_negative_float = number_type(float, low=0)
fraction = number_type(float, low=0, high=1)


def switch(text):
    """0/1 flags; also true/false, yes/no, on/off."""
    known = {"0": 0, "false": 0, "no": 0, "off": 0, "1": 1, "true": 1, "yes": 1, "on": 1}
    if str(text).lower() not in known:
        raise argparse.ArgumentTypeError(f"must be 0 or 1, not {text!r}")
    return known[str(text).lower()]


def plain_name(text):
    """A weight name is the start of a file name."""
    if not text or re.search(r'[\\/:*?"<>|\s]', text):
        raise argparse.ArgumentTypeError(
            f"must be a plain name without folders, such as pretrain, not {text!r} (--save_dir is the folder)"
        )
    return text


def betas(text):
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers such as 0.9,0.95, not {text!r}") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise argparse.ArgumentTypeError(f"both must lie in [0, 1), not {text}")
    return first, second


# --------------------------------------------------------------------------------------------------
# The parser
# --------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The stage's docstring as it stands, and every default behind its flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default is None or action.default is argparse.SUPPRESS or not action.option_strings:
            return text
        if action.nargs == 0:
            return f"{text} (default: {'on' if action.default else 'off'})"
        default = action.default
        if isinstance(default, Path) and default.is_relative_to(ROOT):
            default = default.relative_to(ROOT)
        if isinstance(default, tuple):
            default = ",".join(f"{value:g}" for value in default)
        return f"{text} (default: {default})".replace("%", "%%")


class StageParser(argparse.ArgumentParser):
    """argparse that answers with one line, and checks what no single flag can see."""

    def error(self, message):
        print(f"{Path(self.prog).name}: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        parsed.started = time.monotonic()  # --max_minutes counts from here
        reason = what_is_wrong(parsed)
        if reason:
            self.error(reason)
        return parsed


def what_is_wrong(args) -> str | None:
    """A reason why these flags do not go together, or None."""
    if args.max_steps and args.max_minutes:
        return "--max_steps and --max_minutes both end the run: give one of them"
    if args.save_weight == "none":
        return "--save_weight none: a run needs a name to write to"
    if getattr(args, "val_path", None) and getattr(args, "val_fraction", 0) and args.val_fraction_given:
        return "--val_path already is the held-out data: do not give --val_fraction too"
    if (
        args.schedule == "wsd"
        and args.warmup_steps
        and args.max_steps
        and args.warmup_steps >= args.max_steps
    ):
        return f"--warmup_steps {args.warmup_steps} leaves nothing of --max_steps {args.max_steps}"
    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    if heads and kv_heads and heads % kv_heads:
        return f"--num_attention_heads {heads} must be a multiple of --num_key_value_heads {kv_heads}"
    return None


class Given(argparse.Action):
    """Remembers that the user gave the flag (the default does not)."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def stage_parser(doc: str, about: dict | None = None, **defaults) -> StageParser:
    """The shared flags with this stage's defaults. `defaults` may name any shared flag; a typo is an error.
    A default of `cli.ABSENT` leaves a flag out, for a stage that would ignore it. about: other help texts."""
    parser = StageParser(
        description=doc, formatter_class=HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    known = set()

    def add(group, *names, default=None, **options):
        name = names[0].removeprefix("--")
        known.add(name)
        default = defaults.get(name, default)
        if default is not ABSENT:
            options["help"] = (about or {}).get(name, options["help"])
            group.add_argument(*names, default=default, **options)

    def settled(name, text, default=None):
        """Help of a flag whose default `settle` finds, unless this stage has one of its own."""
        return f"; without it {text}" if defaults.get(name, default) is None else ""

    g = parser.add_argument_group("data")
    add(
        g,
        "--data_path",
        metavar="FILE",
        help="training data: .jsonl, .json, .parquet, a HuggingFace data set name, or several separated by "
        "commas; without it: "
        + defaults.get("default_data", "the stage's usual file in dataset/, else the embedded curriculum"),
    )
    known.add("default_data")
    add(
        g,
        "--val_path",
        metavar="FILE",
        help="held-out data; without it a fixed part of the training data is held out",
    )
    g.set_defaults(val_fraction_given=False)
    add(
        g,
        "--val_fraction",
        type=number_type(float, low=0, high=0.5),
        default=0.005,
        action=Given,
        metavar="X",
        help="share of the training documents held out by content hash, 0 = no validation",
    )
    add(
        g,
        "--val_interval",
        type=count,
        default=500,
        metavar="STEPS",
        help="steps between validations, 0 = at the end",
    )
    add(
        g,
        "--max_seq_len",
        type=number_type(int, low=8),
        default=512,
        metavar="T",
        help="tokens in a row" + settled("max_seq_len", "340, less in a CPU run of few --max_minutes", 512),
    )
    add(
        g,
        "--pack",
        type=switch,
        default=1,
        metavar="0|1",
        help="1 = fill rows with several documents that do not see each other; 0 = one document per row, "
        "padded",
    )
    add(
        g,
        "--cache_dir",
        metavar="DIR",
        help="where tokenized data is kept; without it: .token_cache beside the data",
    )
    add(
        g,
        "--num_workers",
        type=positive_int,
        metavar="N",
        help="processes that tokenize; without it: one per core",
    )

    g = parser.add_argument_group("model (a number in brackets is what you get without --preset)")
    add(g, "--preset", choices=PRESETS, metavar="NAME", help=f"a known architecture: {', '.join(PRESETS)}")
    kinds = {"int": positive_int, "float": non_negative_float, "bool": switch, "str": str}
    for name, (kind, text) in ARCHITECTURE.items():
        own = {"dropout": fraction, "n_shared_experts": count, "yarn_factor": number_type(float, 1, 1024)}
        kind = own.get(name, kinds[kind])
        add(
            g,
            f"--{name}",
            type=kind,
            metavar="0|1" if kind is switch else "N" if kind is not str else "S",
            help=text,
        )

    g = parser.add_argument_group(
        "length of the run (steps of the optimizer; of reinforcement learning: rollouts)"
    )
    add(g, "--epochs", type=positive_int, default=1, help="passes over the data")
    add(
        g,
        "--max_steps",
        type=count,
        default=0,
        metavar="STEPS",
        help="exactly this many steps instead, 0 = off",
    )
    add(
        g,
        "--max_minutes",
        type=non_negative_float,
        default=0.0,
        metavar="MIN",
        help="as many steps as fit into this time instead, start-up included: a few steps are timed "
        "first, then --max_steps is fixed, printed and stored; 0 = off",
    )
    add(
        g,
        "--batch_size",
        type=positive_int,
        metavar="ROWS",
        help="rows in memory at once per process; without it about 16k tokens, on a CPU 8k, and with "
        "--max_minutes down to 512 there, because many small steps learn faster at first",
    )
    add(
        g,
        "--accumulation_steps",
        type=positive_int,
        default=1,
        metavar="N",
        help="batches per optimizer step; rows per step = batch_size x accumulation_steps, shared by all "
        "processes",
    )

    add(
        g,
        "--plan",
        action="store_true",
        default=False,
        help="train nothing: make a few steps, then print parameters, FLOPs, peak memory and time of the "
        "whole run, and the flags to change",
    )

    g = parser.add_argument_group("optimizer")
    add(
        g,
        "--optimizer",
        choices=("muon", "adamw"),
        default="muon",
        help="muon = Muon for hidden matrices and AdamW for the rest; adamw = AdamW for all",
    )
    add(
        g,
        "--learning_rate",
        type=positive_float,
        metavar="LR",
        help="peak rate of AdamW"
        + settled(
            "learning_rate",
            "2e-3 for all, or beside muon (embeddings and norms) 1e-2, up to 2e-2 for small steps (below 4k "
            "tokens)",
        ),
    )
    add(
        g,
        "--muon_lr",
        type=positive_float,
        metavar="LR",
        help="peak rate of Muon" + settled("muon_lr", "0.02, down to 0.0035 for small steps"),
    )
    add(
        g,
        "--schedule",
        choices=("wsd", "cosine", "linear", "constant"),
        default="wsd",
        help="after the warm-up: wsd = constant, then linear down; cosine or linear = down from the start",
    )
    add(
        g,
        "--warmup_steps",
        "--warmup_iters",
        type=count,
        metavar="STEPS",
        help="steps to reach the peak; without it 10, at most a quarter of the run",
    )
    add(
        g,
        "--decay_fraction",
        type=fraction,
        default=0.7,
        metavar="X",
        help="last share of the run in which wsd decays",
    )
    add(
        g,
        "--min_lr_factor",
        type=fraction,
        default=0.0,
        metavar="X",
        help="rate at the end, as a share of the peak",
    )
    add(
        g,
        "--weight_decay",
        type=non_negative_float,
        default=0.1,
        metavar="X",
        help="pull of hidden matrices towards zero per step, times the rate; embeddings and norms are exempt",
    )
    add(
        g,
        "--betas",
        type=betas,
        metavar="B1,B2",
        help="AdamW's two averaging factors; without it 0.9,0.99, beside muon down to 0.6,0.99 for small "
        "steps",
    )
    add(
        g,
        "--muon_momentum",
        type=fraction,
        metavar="X",
        help="Muon's averaging factor; without it 0.95, down to 0.8 for small steps",
    )
    add(
        g,
        "--muon_block",
        type=count,
        metavar="ROWS",
        help="orthogonalise blocks of so many rows, for a fraction of the cost; 0 = whole matrices; "
        "without it 128 on a CPU, where the cost matters, else 0",
    )
    add(
        g,
        "--grad_clip",
        type=non_negative_float,
        default=1.0,
        metavar="NORM",
        help="longer gradients are scaled down to this norm, 0 = never",
    )

    g = parser.add_argument_group("files")
    add(
        g,
        "--from_weight",
        type=plain_name,
        default="none",
        metavar="NAME",
        help="weights to start from, by the name of the stage that wrote them; none = random",
    )
    add(g, "--save_weight", type=plain_name, metavar="NAME", help="name of the weights to write")
    add(
        g,
        "--save_dir",
        "--out_dir",
        type=Path,
        default=ROOT / "out",
        metavar="DIR",
        help="folder of weights, read and written; log and curve go there too",
    )
    add(
        g,
        "--checkpoint_dir",
        type=Path,
        default=ROOT / "checkpoints",
        metavar="DIR",
        help="folder of the resume file",
    )
    add(
        g,
        "--from_resume",
        type=switch,
        default=0,
        metavar="0|1",
        help="1 = continue exactly where the last save left off; starts fresh, and says so, when there is "
        "none",
    )
    add(
        g,
        "--save_interval",
        type=count,
        default=1000,
        metavar="STEPS",
        help="steps between saves, 0 = at the end",
    )
    add(
        g,
        "--save_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="numbers in the weight file; the half-size ones round away part of what a small learning "
        "rate learned (the resume file is always float32)",
    )

    g = parser.add_argument_group("log")
    add(g, "--log_interval", type=positive_int, default=10, metavar="STEPS", help="steps between log lines")
    add(g, "--use_wandb", action="store_true", default=False, help="also send the log to a tracker")
    add(
        g,
        "--tracker",
        choices=("swanlab", "wandb", "tensorboard"),
        default="swanlab",
        help="which tracker --use_wandb means; works offline and without an account (files in --save_dir)",
    )
    add(g, "--wandb_project", metavar="NAME", help="project name in the tracker")

    g = parser.add_argument_group("machine")
    add(g, "--device", default="auto", help="auto = CUDA, else MPS, else CPU; or cuda, cuda:1, mps, cpu")
    add(
        g,
        "--dtype",
        default="auto",
        help="compute type: bfloat16, float16 (CUDA, with loss scaling), float32, or int8 (x86 CPUs: 8-bit "
        "products, all else float32); auto = the fastest that the hardware has",
    )
    add(
        g,
        "--use_compile",
        choices=("0", "1", "auto"),
        default="auto",
        help="torch.compile: faster steps after a slower start; auto = for runs of more than three "
        "minutes, where a compiler is found",
    )
    add(
        g,
        "--num_threads",
        type=count,
        default=0,
        metavar="N",
        help="CPU threads, 0 = OMP_NUM_THREADS or all cores",
    )
    add(g, "--seed", type=count, default=42, help="decides initial weights, order of rows and every draw")

    unknown = set(defaults) - known
    if unknown:
        raise TypeError(f"stage_parser has no flag {', '.join(sorted(unknown))}")
    return parser


ABSENT = object()  # as a default in stage_parser: this stage has no such flag


def add_tax_path(parser):
    """--tax_path, for stages that change a model which could do something before."""
    parser.add_argument(
        "--tax_path",
        metavar="FILE",
        help="held-out conversations of an earlier stage: their loss before and after is what this stage "
        "costs (alignment tax); without it sft_heldout.jsonl beside the data, if there; none = do not look",
    )


def model_config(args):
    """The MiniMindConfig of --preset and the architecture flags; what was not given comes from the preset."""
    from model.model_minimind import MiniMindConfig

    given = {name: getattr(args, name) for name in ARCHITECTURE if getattr(args, name, None) is not None}
    for name, (kind, _) in ARCHITECTURE.items():
        if kind == "bool" and name in given:
            given[name] = bool(given[name])
    if getattr(args, "preset", None):
        return MiniMindConfig.from_preset(args.preset, **given)
    return MiniMindConfig(**given)


def schedule(args) -> dict:
    """The flags of the learning rate, as `optim.lr_factor` takes them."""
    return {
        "schedule": args.schedule,
        "warmup_steps": args.warmup_steps,
        "decay_fraction": args.decay_fraction,
        "min_factor": args.min_lr_factor,
    }


NOMINAL_CPU_FLOPS = 1.5e11  # a small CPU in training; a constant, so that a command means the same everywhere


SETTLED = "batch_size max_seq_len learning_rate betas muon_lr muon_momentum muon_block".split()


def settle(args, device_type: str):
    """Fill in the flags whose defaults depend on others: rows and their length, the optimizers' rates and
    averages.

    Small steps learn faster per token as long as a run is short. For a CPU run by --max_minutes the step has
    2.8 sqrt(expected tokens) tokens, at least 512: a fit to the best of a few runs between 0.05 and 2.5
    million tokens. Neighbours in a text resemble each other, so a small step learns more from many
    short rows than from few long ones. And a run of small steps is a run of few steps: between
    1,024 and 4,096 tokens its optimizers average over fewer of them, and Muon's rate is lower. Between
    1,024 and 512 Muon's rate falls with the square root of the step. The embeddings' rate falls with the
    square root of the width, from 256 on.
    """
    if args.from_resume:
        inherit(args)
    row = args.max_seq_len or 340  # MiniMind's length
    tokens = 16384 if device_type != "cpu" else 8192
    if device_type == "cpu" and args.max_minutes:
        expected = args.max_minutes * 60 * NOMINAL_CPU_FLOPS / flops_of_a_token(args, row)
        tokens = min(16384, max(512, 2.8 * expected**0.5))
        row = args.max_seq_len or min(row, max(64, int(tokens / 16) // 64 * 64))
    args.max_seq_len = row
    if args.batch_size is None:
        multiple = 8 if tokens >= 8 * row else 2  # so that usual numbers of processes can share a step
        args.batch_size = max(multiple, round(tokens / row / multiple) * multiple)
    tokens = args.batch_size * args.accumulation_steps * args.max_seq_len
    size = min(1.0, max(0.25, tokens / 4096)) if args.optimizer == "muon" else 1.0
    width = model_config(args).hidden_size
    defaults = {
        "learning_rate": 1e-2 * min(1.0, 256 / width) ** 0.5 if args.optimizer == "muon" else 2e-3,
        "betas": (1 - 0.1 / size, 0.99),
        "muon_lr": 0.02 * size * min(1.0, max(0.5, tokens / 1024)) ** 0.5,
        "muon_momentum": 1 - 0.05 / size,
        "muon_block": 128 if device_type == "cpu" else 0,
    }
    for name, value in defaults.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def inherit(args):
    """A continued run keeps the values that its first part settled on, where the flags are not given."""
    from trainer import checkpoint

    before = checkpoint.settings_of_resume(args)
    for name in SETTLED:
        if getattr(args, name, 0) is None and name in before:
            setattr(args, name, before[name])
    args.max_steps = args.max_steps or before.get("max_steps", 0)  # also what --max_minutes was turned into
    args.max_minutes = args.max_minutes or before.get("max_minutes", 0.0)  # decides how much is held out


def flops_of_a_token(args, max_seq_len: int) -> float:
    """Training FLOPs per token of the model that the flags describe."""
    import torch

    from model.model_minimind import MiniMindLM, count_parameters, flops_per_token

    config = model_config(args)
    with torch.device("meta"):
        active = count_parameters(MiniMindLM(config))[1]
    return flops_per_token(config, max_seq_len, active)


def validation_tokens(args) -> float:
    """Held-out tokens that a CPU looks at in 3 % of --max_minutes: a forward pass is a third of training."""
    return 0.03 * args.max_minutes * 60 * NOMINAL_CPU_FLOPS / (flops_of_a_token(args, args.max_seq_len) / 3)


def build_optimizers(model, args, rt) -> list:
    """The optimizers of the flags. Muon's iteration runs in the compute type: in bfloat16 it magnifies the
    last digit of a sum, so that float32 runs must not use it."""
    import torch

    from trainer import optim

    ns_dtype = torch.bfloat16 if rt.dtype == torch.bfloat16 else torch.float32
    return optim.build_optimizers(
        model,
        args.optimizer,
        args.learning_rate,
        args.muon_lr,
        args.weight_decay,
        args.betas,
        args.muon_momentum,
        args.muon_block,
        ns_dtype,
    )


def find_data(args, names, mini: str | None) -> str:
    """--data_path, or the first of the public files `names` that lies in dataset/, or the embedded
    curriculum's file `mini`, which is written on demand. Says what it chose when it chose. Raises DataError
    when there is nothing to choose."""
    if args.data_path:
        return args.data_path
    folder = ROOT / "dataset"
    for name in names:
        if (folder / name).exists():
            return str(folder / name)
    if mini is None:
        from dataset.rows import DataError

        looked = " or ".join(f"dataset/{name}" for name in names)
        raise DataError(f"no data: give a file with --data_path (there is no {looked})")
    path = folder / "mini" / mini
    if not path.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        from dataset import make_mini

        print(
            "writing the embedded curriculum to dataset/mini (no data was given, none was found in dataset/)"
        )
        begin = time.monotonic()
        make_mini.main([])
        if args.plan:  # the run will find it
            args.started += time.monotonic() - begin
    print(f"no --data_path: using the embedded curriculum, {path.relative_to(ROOT)}")
    return str(path)


# --------------------------------------------------------------------------------------------------
# The frame around main
# --------------------------------------------------------------------------------------------------


def run(main, parse_args, argv=None):
    """What a stage's `if __name__ == "__main__"` calls: errors a user can mend become one line on stderr
    and exit code 2, everything else keeps its traceback. Ctrl-C before training ends with 130; during
    training it is not an error (see runtime.catch_signals)."""
    # A million objects come with torch and stay: looking for garbage among them takes half a second of the
    # imports and most of a second at the end.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale says
    args = parse_args(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        leave("stopped before the work was done; what is on disk is whole", 130)
    except Exception as error:
        from trainer import runtime

        if runtime.is_out_of_memory(error):
            leave(runtime.memory_advice(args), 2)
        if not is_for_the_user(error):
            raise
        leave(" ".join(str(error).split()), 2)


def is_for_the_user(error: Exception) -> bool:
    """Errors whose message already says where and what to do: DataError, CheckpointError, TrainingError,
    RewardError, RolloutError, and failures of the file system."""
    if type(error).__name__ in {
        "DataError",
        "CheckpointError",
        "TrainingError",
        "RewardError",
        "RolloutError",
    }:
        return True
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return True
    # the configuration class refuses impossible shapes with a sentence of its own
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return (
        isinstance(error, ValueError) and frame is not None and frame.tb_frame.f_code.co_name == "_validate"
    )


def leave(message: str, code: int):
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
