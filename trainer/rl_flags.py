"""The flags that the stages of reinforcement learning share, once. No torch here: --help must answer at once.

parser = cli.stage_parser(__doc__, **rl_flags.DEFAULTS, save_weight="grpo", ...)
rl_flags.add_rollout(parser, num_generations=8, max_gen_len=256)
rl_flags.add_rewards(parser)
rl_flags.add_update(parser, beta=0.0)
rl_flags.add_watching(parser)
args = rl_flags.checked(parser, parser.parse_args(argv))
"""

from trainer import cli

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
EPSILON = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28), "cispo": (0.0, 5.0)}  # others: .2 both ways

# What differs from a supervised stage: rows are prompts, rates are small, and --dtype auto never means int8.
DEFAULTS = dict(
    about=dict(
        batch_size="prompts of a step, over all processes (x --accumulation_steps); memory follows "
        "--tokens_at_once instead",
        accumulation_steps="factor of --batch_size; there is no other difference between the two here",
        max_seq_len="longest prompt in tokens; longer ones are left out and counted",
    ),
    optimizer="adamw",
    weight_decay=0.0,
    batch_size=16,
    max_seq_len=512,
    schedule="constant",
    warmup_steps=0,
    log_interval=1,
    val_interval=20,
    save_interval=50,
    val_fraction=0.05,
    pack=cli.ABSENT,
)


def add_rollout(parser, num_generations: int | None, max_gen_len: int):
    """How answers are sampled. num_generations: default group size; None: one answer per prompt."""
    g = parser.add_argument_group("rollout (who answers, and how)")
    if num_generations is not None:
        g.add_argument(
            "--num_generations",
            type=cli.number_type(int, low=2, why="a group of one has nothing to be compared with"),
            default=num_generations,
            metavar="G",
            help="answers sampled per prompt: the group in which they are compared",
        )
    g.add_argument(
        "--max_gen_len",
        type=cli.positive_int,
        default=max_gen_len,
        metavar="N",
        help="longest answer, in tokens (agent: of one turn)",
    )
    g.add_argument(
        "--temperature",
        type=cli.positive_float,
        default=1.0,
        metavar="T",
        help="of sampling and of scoring alike; top-p and top-k stay off, since what they cut away could not "
        "be scored",
    )
    g.add_argument(
        "--thinking_ratio",
        type=cli.fraction,
        default=0.0,
        metavar="X",
        help="share of prompts that open a think block, drawn once for all answers to a prompt",
    )
    g.add_argument(
        "--rollout_engine",
        choices=("torch", "vllm", "sglang"),
        default="torch",
        help="who generates: this process, or a server",
    )
    g.add_argument(
        "--rollout_url",
        "--sglang_base_url",
        default="http://127.0.0.1:8998",
        metavar="URL",
        help="address of that server",
    )
    g.add_argument(
        "--rollout_shared_path",
        "--sglang_shared_path",
        metavar="DIR",
        help="folder in which new weights are handed to the server; without it rollout_weights/NAME below "
        "--save_dir",
    )
    g.add_argument(
        "--rollout_dtype",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
        default="auto",
        help="compute type of this process's sampling; auto = that of training",
    )
    g.add_argument(
        "--tis_cap",
        type=cli.non_negative_float,
        default=2.0,
        metavar="C",
        help="the sampler rounds otherwise than the scorer: every token's loss is weighted by their ratio, "
        "at most C (truncated importance sampling); 0 = not",
    )


def add_rewards(parser, default="auto"):
    """What an answer is worth."""
    g = parser.add_argument_group("rewards")
    g.add_argument(
        "--reward",
        default=default,
        metavar="NAME:W,...",
        help="components and weights, as correct:1,format:0.1 (docs/rl.md lists them); auto = that where the "
        "data knows the answers, else model:1,repetition:0.5",
    )
    g.add_argument(
        "--reward_model_path",
        metavar="PATH",
        help="for `model`: a file of trainer/train_reward.py or the folder of a Hugging Face reward model; "
        "without it the reward weights in --save_dir",
    )
    g.add_argument(
        "--trust_remote_code",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = run the code that comes with that folder (InternLM2-Reward needs it)",
    )
    g.add_argument("--judge_url", metavar="URL", help="for `judge`: an OpenAI-compatible server, .../v1")
    g.add_argument("--judge_model", default="judge", metavar="NAME", help="the model it should use")


def add_update(parser, beta: float, beta_names=("--beta",)):
    """What the policy learns from."""
    g = parser.add_argument_group("update")
    g.add_argument(
        *beta_names,
        dest="beta",
        type=cli.non_negative_float,
        default=beta,
        metavar="X",
        help="weight of the KL to the model that the run began with; 0 = none, and no such model in memory",
    )
    g.add_argument(
        "--kl_type",
        choices=("k2", "k3", "corrected"),
        default="k3",
        help="estimator of that KL in the loss: k2 has the gradient of KL(policy|reference), k3 is "
        "Schulman's, corrected = ratio x k3",
    )
    g.add_argument(
        "--mini_batch_size",
        type=cli.count,
        default=0,
        metavar="N",
        help="answers per optimizer update, over all processes; 0 = all of a step",
    )
    g.add_argument(
        "--tokens_at_once",
        type=cli.count,
        default=0,
        metavar="N",
        help="tokens in memory at once while training; 0 = 1,024 on a CPU (more is no faster), else 32,768",
    )
    g.add_argument(
        "--overlong",
        choices=("score", "mask", "soft"),
        help="answers cut off at --max_gen_len: score = as they are, mask = teach nothing, soft = DAPO's "
        "punishment on top, from four fifths of the length on; without it score (dapo soft)",
    )
    return g


def add_watching(parser):
    g = parser.add_argument_group("watching")
    g.add_argument(
        "--debug_mode", action="store_true", default=False, help="print samples with rewards and masks"
    )
    g.add_argument(
        "--debug_interval",
        type=cli.positive_int,
        default=20,
        metavar="STEPS",
        help="steps between samples that are written to NAME_samples.jsonl (and printed with --debug_mode)",
    )
    g.add_argument(
        "--val_prompts",
        type=cli.positive_int,
        default=256,
        metavar="N",
        help="held-out prompts that are answered at a validation",
    )
    g.add_argument(
        "--pass_k",
        type=cli.count,
        default=4,
        metavar="K",
        help="beside the likeliest answer sample K: the share of prompts with a right one is pass@K; 0 = off",
    )


def checked(parser, args):
    """What no single flag can see."""
    if args.dropout:
        parser.error("--dropout: two passes with different masks cannot be compared; it must be 0 here")
    if args.overlong is None:
        args.overlong = "score"
    if args.max_minutes and args.schedule in ("cosine", "linear"):
        parser.error(
            f"--max_minutes with --schedule {args.schedule} takes its first steps back, and samples cannot "
            "be taken back: use --max_steps, or the schedule constant or wsd"
        )
    if getattr(args, "reasoning", 0):
        args.thinking_ratio = args.thinking_ratio or 1.0
        args.from_weight = "reason" if args.from_weight == "full_sft" else args.from_weight
        args.reward += "" if args.reward == "auto" or "tags" in args.reward else ",tags:0.5"
    if args.judge_url is None and "judge" in args.reward:
        parser.error("--reward judge needs --judge_url")
    return args


def add_reasoning(parser):
    """--reasoning, MiniMind's switch for models that think first."""
    parser.add_argument(
        "--reasoning",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = every prompt opens a think block, start from the weights `reason`, and the reward `tags` "
        "is added; another --from_weight, --thinking_ratio above 0 or `tags` in --reward stay as given",
    )


def add_group_flags(g, loss_type):
    """The flags of group advantages and losses, for train_agent too."""
    g.add_argument("--loss_type", choices=LOSS_TYPES, default=loss_type, help="see above")
    g.add_argument(
        "--epsilon", type=cli.non_negative_float, metavar="X", help="lower clip; without it .2 (gspo 3e-4)"
    )
    g.add_argument(
        "--epsilon_high",
        type=cli.non_negative_float,
        metavar="X",
        help="upper clip; without it as --epsilon, dapo .28, gspo 4e-4; for cispo the cap itself, 5",
    )
    g.add_argument(
        "--scale_rewards",
        choices=("group", "batch", "none"),
        help="what advantages are divided by: std of the group, or of all; without it group (dr_grpo none)",
    )
    g.add_argument(
        "--update_iters",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="passes over the samples of a step",
    )


def with_loss_defaults(args):
    """The defaults that follow from --loss_type."""
    epsilon, high = EPSILON.get(args.loss_type, (0.2, None))
    args.epsilon = epsilon if args.epsilon is None else args.epsilon
    if args.epsilon_high is None:
        args.epsilon_high = args.epsilon if high is None else high
    args.scale_rewards = args.scale_rewards or ("none" if args.loss_type == "dr_grpo" else "group")
    dapo = args.loss_type == "dapo"
    if getattr(args, "dynamic_sampling", 0) is None:
        args.dynamic_sampling = 3 if dapo else 0
    if args.overlong is None:
        args.overlong = "soft" if dapo else "score"
    return args
