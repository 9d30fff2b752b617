"""LoRA: teach a model something new by small matrices beside its own, which stay untouched.

    y = x W^T + (alpha / r) (x A^T) B^T          only A (r, in) and B (out, r) learn; B starts at zero
    L = - 1/N * sum over answer tokens t:  log p(x_t | x_0 ... x_{t-1})                 as in fine-tuning

Few parameters learn (about 1 %), so gradients, optimizer and files are small, many adapters can share one
base, and what the base knows is only one switch away. Hu et al. 2021, https://arxiv.org/abs/2106.09685,
section 4.1. The adapters themselves are in model/model_lora.py (with rsLoRA and DoRA).

    python trainer/train_lora.py                                    # who am I: lora_identity
    python trainer/train_lora.py --lora_name lora_medical --data_path my_medical_chats.jsonl
    torchrun --nproc_per_node 2 trainer/train_lora.py --lora_targets q_proj,v_proj --lora_rank 16

Reads lines {"conversations": [...]} and out/full_sft_512.pth; writes out/lora/lora_identity_512.pth. Next:
python eval_llm.py --weight full_sft --lora_weight lora_identity.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli  # the rest is imported where it is used: --help answers before torch is there
from trainer.train_pretrain import next_token_loss  # the same loss; only who may learn differs

CURRICULUM = ("lora_identity", "lora_medical")  # adapters for which the embedded curriculum has a file


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        save_weight=cli.ABSENT,  # --lora_name
        from_weight="full_sft",
        wandb_project="MiniMind-LoRA",
        epochs=10,
        max_seq_len=340,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.0,
        batch_size=4,  # a packed row holds several conversations
        default_data="dataset/<lora_name>.jsonl, else the embedded curriculum's file of that name",
    )
    g = parser.add_argument_group("adapter")
    g.add_argument(
        "--lora_name",
        "--save_weight",
        dest="save_weight",
        type=cli.plain_name,
        default="lora_identity",
        metavar="NAME",
        help="name of the adapter: of its file, and of the usual data file",
    )
    g.add_argument("--lora_rank", type=cli.positive_int, default=8, metavar="R", help="columns of A and B")
    g.add_argument(
        "--lora_alpha", type=cli.positive_float, default=16.0, metavar="X", help="strength: alpha / rank"
    )
    g.add_argument(
        "--lora_dropout",
        type=cli.fraction,
        default=0.0,
        metavar="X",
        help="share of A's inputs zeroed (not in lm_head and gate)",
    )
    g.add_argument(
        "--lora_targets",
        default="all",
        metavar="NAMES",
        help="linear layers to adapt, separated by commas: q_proj, or model.layers.0.self_attn.q_proj for "
        "one only; all = those of attention and feed-forward",
    )
    g.add_argument(
        "--use_rslora", type=cli.switch, default=0, metavar="0|1", help="1 = strength alpha / sqrt(rank)"
    )
    g.add_argument(
        "--use_dora", type=cli.switch, default=0, metavar="0|1", help="1 = also learn the rows' lengths"
    )
    cli.add_tax_path(parser)
    return parser.parse_args(argv)


def main(args):
    from dataset.lm_dataset import load_sft
    from model.model_lora import ALL_LINEARS, LoRAConfig, add_lora, relative_sizes
    from trainer import batches, checkpoint, loop, progress, runtime
    from trainer.validation import held_out

    if args.from_weight == "none":
        raise runtime.TrainingError("--from_weight none: an adapter needs trained weights to stand on")
    if args.save_dir.name == "lora":  # MiniMind's habit: the base lies above it
        args.save_dir = args.save_dir.parent
    rt = runtime.start(args)
    tokenizer = checkpoint.load_tokenizer()
    name = f"{args.save_weight}.jsonl"
    path = cli.find_data(args, [name], mini=name if args.save_weight in CURRICULUM else None)
    train, val = batches.load(load_sft, path, tokenizer, args, rt)
    tax = batches.load_tax(path, tokenizer, args, rt)
    run = loop.Run("lora", args, rt, tokenizer, path, train, val, frozen_base=True)
    model = checkpoint.new_model(args, tokenizer, rt)
    names = [name.strip() for name in args.lora_targets.split(",")]
    targets = ALL_LINEARS if names == ["all"] else tuple(names)
    lora_config = LoRAConfig(
        args.lora_rank,
        args.lora_alpha,
        args.lora_dropout,
        bool(args.use_rslora),
        bool(args.use_dora),
        targets,
    )
    run.load(model)
    try:
        adapted = add_lora(model, lora_config)
    except ValueError as error:
        raise runtime.TrainingError(f"--lora_targets {args.lora_targets}: {error}") from None
    run.weight_path = checkpoint.adapter_path
    run.save_weights = functools.partial(checkpoint.save_adapter, lora_config)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * learning / sum(p.numel() for p in model.parameters())
    rt.print(f"LoRA: {len(adapted)} layers adapted, {learning:,} parameters learn ({share:.2f} %)")
    bare = model
    model, optimizers = run.prepare(model)

    def update(step, micro_batches, lr_factor):
        return loop.optimizer_step(model, micro_batches, optimizers, lr_factor, args, rt, next_token_loss)

    def validate(model):
        sizes = relative_sizes(bare)
        return held_out(model, val, tax, args, rt) | {"lora_size": sum(sizes) / len(sizes)}

    run.fit(model, optimizers, update, validate, before=True)
    flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
    run.end(model, f"python eval_llm.py --weight {args.from_weight} --lora_weight {args.save_weight}{flags}")


if __name__ == "__main__":
    cli.run(main, parse_args)
