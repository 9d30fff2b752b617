"""Examine a model on the held-out files of the embedded curriculum (dataset/make_mini.py).

    python scripts/eval_mini.py --weight out/full_sft_256.pth
    python scripts/eval_mini.py --weight out/pretrain_256.pth --data_dir dataset/mini --json result.json

Prints one line per metric: share of right answers with its 95 % interval, greedy decoding.

    bits_per_byte    of unseen text of the same world (plain text, no chat)
    facts_asked      facts that SFT asked about, in words it never used
    facts_unasked    facts that only stand in pretraining text: no question of any stage asks for them
    sums             one- and two-digit sums with operands never seen
    chat             small talk: an expected keyword in a short answer
    ended            answers that end by themselves

and by --exams, for the stages that teach something more:

    identity         who the assistant is, after the LoRA adapter of that name
    medical          first aid, in question forms never seen
    reason_direct    expressions and word problems of three numbers, answered at once
    reason           the same, thinking first (--open_thinking of eval_llm.py)
                     (and well_formed: thoughts that are not empty, end once, and have an answer behind them)
    problems         the prompts of reinforcement learning, by the rule that pays them (trainer/rewards.py)
    tools            tool tasks in two steps with unseen arguments, played to the end (and tools_one: in one)
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILES = {
    "facts_asked": "eval_facts_paraphrase.jsonl",
    "facts_unasked": "eval_facts_unasked.jsonl",
    "sums": "eval_sums.jsonl",
    "chat": "eval_chat.jsonl",
    "identity": "lora_identity_heldout.jsonl",
    "medical": "lora_medical_heldout.jsonl",
    "reason_direct": "reason_heldout.jsonl",
    "reason": "reason_heldout.jsonl",
    "problems": "rlaif_heldout.jsonl",
    "tools": "agent_heldout.jsonl",
}
THINKING = {"reason"}  # exams in which the model thinks first
DEFAULT_EXAMS = ("bits_per_byte", "facts_asked", "facts_unasked", "sums", "chat")
CONVERSATIONS = {
    "en": [
        "Hello!",
        "Who are you?",
        "What is the capital of Japan?",
        "What is 47 + 25?",
        "Thank you, goodbye!",
    ],
    "zh": ["你好！", "你叫什么名字？", "日本的首都是哪里？", "36加48等于多少？", "谢谢你，再见！"],
}


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def interval(share: float, n: int) -> float:
    """Half width of the 95 % Wilson interval of a share measured on n items."""
    z = 1.96
    return z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n) if n else 0.0


def answer(engine, tokenizer, conversations, max_new_tokens: int, open_thinking: bool = False) -> list:
    """Greedy answers to lists of messages, batched; Completion objects with their text."""
    from dataset.lm_dataset import encode_prompt

    prompts = [encode_prompt(tokenizer, messages, None, open_thinking) for messages in conversations]
    return engine.generate(prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, temperature=0)


def bits_per_byte(model, tokenizer, path: Path, max_seq_len: int = 512) -> float:
    """Sum of -log2 p over the text's tokens / its UTF-8 bytes."""
    import torch

    from dataset.lm_dataset import load_pretrain

    data, _ = load_pretrain(str(path), tokenizer, max_seq_len, num_workers=1)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(data), 16):
            batch = data.batch(list(range(start, min(start + 16, len(data)))))
            nats += model(**batch, num_items_in_batch=1, return_logits=False).loss.item()
    return nats / math.log(2) / data.num_bytes


def is_well_formed(reply) -> bool:
    """Whether an answer that began with thoughts is: thoughts, one </think>, an answer, and an end."""
    thoughts, *rest = reply.text.split("</think>")
    tags = "<think>" in reply.text  # the opening tag stands in the prompt
    return (
        len(rest) == 1
        and not tags
        and all(map(str.strip, (thoughts, *rest)))
        and reply.finish_reason == "eos"
    )


def examine(
    model,
    tokenizer,
    data_dir: Path,
    max_new_tokens: int = 64,
    engine=None,
    num_items: int = 0,
    exams=DEFAULT_EXAMS,
) -> dict:
    """All metrics of one model: {"metrics": {name: number}, "intervals": ..., "items": ..., "wrong":
    samples}. num_items: a fixed random choice of so many questions per exam, 0 = all. Thoughts may be three
    times as long as answers."""
    from dataset.mini_eval import is_correct
    from model.generation import Generator

    engine = engine or Generator(model, "float32")
    result = {"metrics": {}, "intervals": {}, "items": {}, "wrong": {}, "groups": {}}
    metrics = result["metrics"]
    if "bits_per_byte" in exams:
        metrics["bits_per_byte"] = bits_per_byte(model, tokenizer, data_dir / "pretrain_heldout.jsonl")
    ended = []
    for name in (name for name in ("problems", "tools") if name in exams):
        for metric, right in verified_tasks(
            engine, tokenizer, data_dir / FILES[name], name, num_items
        ).items():
            metrics[metric] = sum(right) / len(right)
            result["intervals"][metric] = interval(metrics[metric], len(right))
            result["items"][metric] = len(right)
    for name in (name for name in FILES if name in exams and name not in ("problems", "tools")):
        rows = read_rows(data_dir / FILES[name])
        if num_items:
            rows = random.Random(0).sample(rows, min(num_items, len(rows)))
        questions = [[{"role": "user", "content": r["question"]}] for r in rows]
        thinks = name in THINKING
        replies = answer(engine, tokenizer, questions, max_new_tokens * (3 if thinks else 1), thinks)
        if thinks:
            metrics["well_formed"] = sum(map(is_well_formed, replies)) / len(rows)
            result["intervals"]["well_formed"] = interval(metrics["well_formed"], len(rows))
            result["items"]["well_formed"] = len(rows)
        right = [is_correct(row, reply.text) for row, reply in zip(rows, replies)]
        ended += [reply.finish_reason == "eos" for reply in replies]
        metrics[name] = sum(right) / len(rows)
        result["intervals"][name] = interval(metrics[name], len(rows))
        result["items"][name] = len(rows)
        result["wrong"][name] = [
            {"question": row["question"], "expected": row["answers"], "reply": reply.text}
            for row, reply, ok in zip(rows, replies, right)
            if not ok
        ][:20]
        groups: dict[str, list] = {}
        for row, ok in zip(rows, right):
            groups.setdefault(row["group"], []).append(ok)
        result["groups"][name] = {g: sum(v) / len(v) for g, v in sorted(groups.items())}
    if ended:
        metrics["ended"] = sum(ended) / len(ended)
        result["items"]["ended"] = len(ended)
        result["intervals"]["ended"] = interval(metrics["ended"], len(ended))
    return result


def verified_tasks(engine, tokenizer, path: Path, name: str, num_items: int = 0) -> dict[str, list[float]]:
    """Greedy success on prompts of reinforcement learning, by the rule that pays for them: {metric: 0.0 or
    1.0 of each prompt}. Tools are played to the end, in at most four turns."""
    from types import SimpleNamespace

    from dataset.prompts import load_prompts
    from trainer import rollout
    from trainer.rewards import verified

    kind, play = ("agent", rollout.converse) if name == "tools" else ("rlaif", rollout.play_once)
    prompts, _ = load_prompts(path, tokenizer, 1024, kind=kind)
    prompts = prompts.thinned(num_items or len(prompts))
    settings = SimpleNamespace(seed=0, thinking_ratio=0.0, temperature=1.0, max_gen_len=96, max_turns=4)
    settings.max_total_len, rows = 2048, list(range(len(prompts)))
    local = rollout.LocalEngine.of(engine)
    samples = play(local, prompts, rows, rows, 0, settings, tokenizer, num_answers=1, greedy=True)
    right = [verified(rollout.describe(sample, prompts, settings)) for sample in samples]
    if name == "problems":
        return {"problems": right}
    steps = [len(prompts[row].expected) for row in rows]
    found = {"tools": [r for r, n in zip(right, steps) if n > 1]}
    return found | {"tools_one": [r for r, n in zip(right, steps) if n == 1]}


def talk(engine, tokenizer, turns: list[str], max_new_tokens: int = 64) -> list[dict]:
    """A conversation with memory: every answer joins the history of the next question."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        reply = answer(engine, tokenizer, [messages], max_new_tokens)[0]
        messages.append({"role": "assistant", "content": reply.text})
    return messages


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", required=True, metavar="FILE", help="a weight file, out/full_sft_256.pth")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=ROOT / "dataset" / "mini",
        metavar="DIR",
        help="the curriculum's folder",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="limit of an answer, in tokens (default: 64)"
    )
    parser.add_argument(
        "--lora_weight", metavar="NAMES", help="adapters to add, as in eval_llm.py: lora_identity"
    )
    parser.add_argument(
        "--exams",
        type=lambda text: text.split(","),
        default=list(DEFAULT_EXAMS),
        metavar="A,B",
        help=f"which of bits_per_byte, {', '.join(FILES)} (default: {','.join(DEFAULT_EXAMS)})",
    )
    parser.add_argument("--items", type=int, default=0, help="questions per exam, 0 = all (default: 0)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("auto", "float32", "bfloat16", "int8"),
        help="of the answers (default: float32, the same on every machine; bits_per_byte is always float32)",
    )
    parser.add_argument(
        "--use_compile", type=int, choices=(0, 1), default=0, help="1 = compile the engine (default: 0)"
    )
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads, 0 = all (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights of the same architecture instead"
    )
    args = parser.parse_args(argv)
    unknown = set(args.exams) - {*FILES, "bits_per_byte"}
    if unknown:
        known = f"bits_per_byte,{','.join(FILES)}"
        parser.exit(2, f"eval_mini.py: --exams {','.join(sorted(unknown))}: choose from {known}\n")
    return args


def main(args):
    import torch

    from model.generation import Generator
    from model.model_minimind import MiniMindLM
    from trainer import checkpoint

    started = time.time()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    path = Path(args.weight)
    if not path.exists():
        raise SystemExit(f"{path} does not exist; give a weight file such as out/full_sft_256.pth")
    if not (args.data_dir / FILES["sums"]).exists():
        raise SystemExit(f"{args.data_dir} holds no curriculum; write it with: python dataset/make_mini.py")
    tokenizer = checkpoint.load_tokenizer()
    model, metadata = checkpoint.load_model(path, tokenizer)
    if args.lora_weight:
        for note in checkpoint.merge_adapters(model, args.lora_weight, path.parent, metadata):
            print(note)
    if args.untrained:
        torch.manual_seed(0)
        model = MiniMindLM(model.config).eval()
    if args.use_compile:
        print("compiling the engine; the first time that takes about a minute", flush=True)
    engine = Generator(model, args.dtype, compile=bool(args.use_compile))
    result = examine(model, tokenizer, args.data_dir, args.max_new_tokens, engine, args.items, args.exams)
    result["conversations"] = {lang: talk(engine, tokenizer, turns) for lang, turns in CONVERSATIONS.items()}
    result["seconds"] = time.time() - started
    for name, value in result["metrics"].items():
        if name == "bits_per_byte":
            print(f"{name:15} {value:8.3f}")
        else:
            margin, items = result["intervals"][name], result["items"][name]
            print(f"{name:15} {100 * value:7.1f} %  +- {100 * margin:.1f}  ({items} items)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    return result


if __name__ == "__main__":
    from trainer import cli

    cli.run(main, parse_args)
