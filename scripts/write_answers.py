"""Let a model answer a file of questions: training data from a teacher (black-box distillation).

    python scripts/write_answers.py --weight out/full_sft_768.pth --data_path dataset/rlaif.jsonl \\
        --out_path dataset/from_teacher.jsonl
    python trainer/train_full_sft.py --data_path dataset/from_teacher.jsonl --from_weight pretrain

Reads conversations (formats sft and rlaif): everything before the last answer is the question. Writes lines
{"conversations": [...]} with the teacher's answer, thoughts apart. Answers that do not end within
--max_new_tokens are left out and counted: they would teach not to stop. Interrupted, it goes on where it was.
"""

import argparse
import json
import os
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory


def parse_args(argv=None):
    from trainer.cli import count, fraction, non_negative_float, positive_int

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weight", type=Path, required=True, metavar="FILE", help="the teacher, out/full_sft_768.pth")
    add("--data_path", required=True, metavar="FILE", help="questions: .jsonl, .json or .parquet")
    add("--out_path", type=Path, required=True, metavar="FILE", help="where to write")
    add("--max_new_tokens", type=positive_int, default=512, help="longest answer (default: 512)")
    add("--temperature", type=non_negative_float, default=0.7, help="0 = the likeliest token (default: 0.7)")
    add("--top_p", type=fraction, default=0.95, help="share of the likeliest tokens (default: 0.95)")
    add("--open_thinking", type=int, choices=(0, 1), default=0, help="1 = think first (default: 0)")
    add("--batch_size", type=positive_int, default=32, help="questions at a time (default: 32)")
    add("--limit", type=count, default=0, help="only so many questions, 0 = all (default: 0)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--dtype", default="auto", help="of the answers (default: auto)")
    add("--seed", type=count, default=42, help="of the draws (default: 42)")
    args = parser.parse_args(argv)
    if not args.top_p:
        parser.error("--top_p must be above 0: 1 = all tokens")
    return args


def questions(path, limit: int):
    """(messages, tools) of every conversation, without its last answer."""
    from dataset.rows import iter_rows

    for count, (_, row) in enumerate(iter_rows(path, "rlaif")):
        if limit and count >= limit:
            return
        yield row["conversations"]


def main(args):
    from dataset.lm_dataset import encode_prompt
    from model.generation import Generator
    from trainer import checkpoint, runtime

    tokenizer = checkpoint.load_tokenizer()
    model, metadata = checkpoint.load_model(args.weight, tokenizer)
    engine = Generator(model.to(runtime.choose_device(args.device)), args.dtype)
    # a longer question leaves no room for an answer, and is left out
    longest = model.config.max_position_embeddings - args.max_new_tokens
    todo = list(questions(args.data_path, args.limit))
    partial = args.out_path.with_name(f".{args.out_path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    draws = ("max_new_tokens", "temperature", "top_p", "open_thinking", "dtype", "seed")
    settings = {name: getattr(args, name) for name in draws}
    settings["checksum of the weights"] = metadata.get("crc32")
    settings["checksum of the questions"] = zlib.crc32(json.dumps(todo).encode())
    lines = gone_on_with(partial, settings)
    if lines:
        print(f"going on after {len(lines)} of {len(todo)} questions")
    begin, tokens = time.perf_counter(), 0
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        for start in range(len(lines), len(todo), args.batch_size):
            part = todo[start : start + args.batch_size]
            prompts = [encode_prompt(tokenizer, m, tools, bool(args.open_thinking)) for m, tools in part]
            fits = [len(prompt) <= longest for prompt in prompts]
            seeds = [runtime.mix_seed(args.seed, start + i) for i in range(len(part))]  # of each question
            answers = iter(
                engine.generate(
                    [prompt for prompt, fit in zip(prompts, fits) if fit],
                    tokenizer,
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    seed=[seed for seed, fit in zip(seeds, fits) if fit],
                )
            )
            for (messages, tools), fit in zip(part, fits):
                answer = next(answers) if fit else None
                tokens += answer.num_tokens if answer else 0
                row = as_row(messages, tools, answer) if answer else None
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done, seconds = start + len(part), time.perf_counter() - begin
            left = seconds / (done - len(lines)) * (len(todo) - done)
            print(
                f"{done}/{len(todo)} questions | {tokens / seconds:,.0f} tokens/s | {left / 60:.1f} min left"
            )
    rows = [line for line in whole_lines(partial)[1:] if line != "null"]
    finished = partial.with_name(f"{partial.name}.done")
    finished.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="\n")
    os.replace(finished, args.out_path)
    partial.unlink()
    why = "did not end, were empty, or their question was too long"
    print(f"wrote {args.out_path}: {len(rows)} answers; {len(todo) - len(rows)} {why}")
    print(f"next:    python trainer/train_full_sft.py --data_path {args.out_path}")


def whole_lines(path: Path) -> list[str]:
    """Only "\\n" ends a line: texts may hold other ends of lines (U+2028). What follows the last one is
    torn, perhaps inside a character."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    return whole.decode("utf-8").split("\n") if whole else []


def gone_on_with(partial: Path, settings: dict) -> list[str]:
    """The answers that an interrupted run left; its first line holds the settings it was started with. Raises
    CheckpointError when they were others: two teachers would be mixed. Leaves a file that can be added to."""
    from trainer.checkpoint import CheckpointError

    header, *lines = (whole_lines(partial) if partial.exists() else []) or [json.dumps(settings)]
    before = json.loads(header) or {}
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        sides = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
        raise CheckpointError(
            f"{partial} was begun with other settings ({sides}): repeat them to go on with it, or delete it "
            "to begin anew"
        )
    partial.write_text("".join(line + "\n" for line in [header, *lines]), encoding="utf-8", newline="\n")
    return lines


def as_row(messages: list, tools, answer) -> dict | None:
    """The conversation with the answer, or None for one that did not end."""
    thoughts, found, content = answer.text.rpartition("</think>")
    content = (content if found else answer.text).strip("\n")
    if answer.finish_reason != "eos" or not content:
        return None
    message = {"role": "assistant", "content": content}
    if found and thoughts.strip():
        message["reasoning_content"] = thoughts.replace("<think>", "").strip("\n")
    messages = [dict(m) for m in messages]
    for m in messages:
        if "tool_calls" in m:
            m["tool_calls"] = json.dumps(m["tool_calls"], ensure_ascii=False)
    if tools:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = json.dumps(tools, ensure_ascii=False)
    return {"conversations": [*messages, message]}


if __name__ == "__main__":
    from trainer import cli

    cli.run(main, parse_args)
