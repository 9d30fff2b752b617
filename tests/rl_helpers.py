"""What the tests of reinforcement learning share: prompts, tiny runs, and an engine that says what it is
told."""

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from data_helpers import assistant, user
from stage_helpers import base_weights, run_here
from train_helpers import MOE, TINY, stage_module, write_lines

SAVED = {"grpo": "grpo", "ppo": "ppo_actor", "spo": "spo", "agent": "agent"}
TOOLS = json.dumps(
    [
        {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
        for name, parameters in (
            ("calculate_math", {"type": "object", "properties": {"expression": {"type": "string"}}}),
            ("text_length", {"type": "object", "properties": {"text": {"type": "string"}}}),
        )
    ]
)


def prompt_rows(rows=24, seed=0) -> list[dict]:
    """Sums with their answers."""
    draw, found = random.Random(seed), []
    for number in range(rows):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        question = f"{a} + {b} = ? {'very ' * (number % 3)}quick"
        found.append({"conversations": [user(question), assistant("")], "answer": str(a + b)})
    return found


def agent_rows(rows=24, seed=0) -> list[dict]:
    """Tool tasks in the format of agent_rl.jsonl."""
    draw, found = random.Random(seed), []
    for _ in range(rows):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        system = {"role": "system", "content": "", "tools": TOOLS}
        messages = [system, user(f"What is {a} * {b}?"), assistant("")]
        found.append({"conversations": messages, "gt": [str(a * b)]})
    return found


ROWS = {"grpo": prompt_rows, "ppo": prompt_rows, "spo": prompt_rows, "agent": agent_rows}


def flags(stage, folder, *more, steps=3) -> list[str]:
    """The command line of a tiny float32 run whose files all lie in `folder`; later flags win."""
    folder = Path(folder)
    if not (folder / "data.jsonl").exists():
        write_lines(folder, "data.jsonl", ROWS[stage]())
    moe = "--use_moe" in more
    if not (folder / f"out/full_sft_32{'_moe' if moe else ''}.pth").exists():
        fields = dict(use_moe=True, num_experts=3, moe_intermediate_size=32) if moe else {}
        base_weights(folder, **{"initializer_range": 0.2} | fields)
    base = f"""--data_path {folder / "data.jsonl"} --save_dir {folder / "out"} --max_seq_len 512
        --batch_size 4 --checkpoint_dir {folder / "checkpoints"} --max_steps {steps} --log_interval 1
        --save_interval 2 --val_interval 0 --val_fraction 0 --learning_rate 1e-3 --device cpu --dtype
        float32 --use_compile 0 --num_threads 1 --max_gen_len 6 --pass_k 2 --val_prompts 4 --tax_path
        none""".split()
    if stage in ("grpo", "agent"):
        base += ["--num_generations", "3"]
    if stage == "spo":
        base += ["--init_samples", "1"]
    if stage == "agent":
        base += "--max_turns 3 --max_total_len 1024 --max_seq_len 480".split()
    base += ["--reward", "language:1,repetition:1"]  # a random model earns more or less of them
    return [*base, *TINY, *map(str, more)]


def parsed(stage, folder, *more, steps=3) -> argparse.Namespace:
    return stage_module(stage).parse_args(flags(stage, folder, *more, steps=steps))


def train(stage, folder, *more, steps=3):
    """Run a stage in this process, as its script would. An agent's conversations have several turns."""
    with pytest.MonkeyPatch.context() as patch:
        if stage == "agent":
            call_first(patch)
        run_here(stage, flags(stage, folder, *more, steps=steps))


CALL = '<tool_call>\n{"name": "calculate_math", "arguments": {"expression": "1 + 2"}}\n</tool_call><|im_end|>'


def call_first(patch):
    """A random model never calls a tool by chance. Here every second first turn is a call, with the
    log-probabilities that the model gives it; the turns behind it are the engine's own."""
    from dataset.lm_dataset import TextEncoder
    from model.generation import Completion
    from trainer import checkpoint, rollout

    encoder = TextEncoder.of(checkpoint.load_tokenizer())
    ids, original = encode(encoder, CALL), rollout.LocalEngine.generate

    def generate(self, prompts, seeds, num_return_sequences, max_new_tokens, temperature):
        found = original(self, prompts, seeds, num_return_sequences, max_new_tokens, temperature)
        for i in range(len(found)):
            prompt = prompts[i // num_return_sequences]
            if (i % num_return_sequences + sum(prompt)) % 2:
                continue
            if prompt.count(encoder.special_ids["<|im_start|>"]) == 3:  # system, user, the answer
                with torch.no_grad():
                    logits = self.generator.model(torch.tensor([prompt + ids])).logits[
                        0, len(prompt) - 1 : -1
                    ]
                logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)
                drawn = logps[torch.arange(len(ids)), torch.tensor(ids)]
                found[i] = Completion(found[i].prompt_index, list(ids), drawn, "eos", len(prompt))
        return found

    patch.setattr(rollout.LocalEngine, "generate", generate)


class Script:
    """An engine that answers what it is told: texts by turn, or a function of the context."""

    version = 0

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.contexts = tokenizer, reply, []

    def generate(self, prompts, seeds, num_return_sequences, max_new_tokens, temperature):
        from dataset.lm_dataset import TextEncoder
        from model.generation import Completion

        encoder, found = TextEncoder.of(self.tokenizer), []
        for prompt in prompts:
            self.contexts.append(list(prompt))
            for number in range(num_return_sequences):
                text = self.reply(len(self.contexts) - 1, number, prompt)
                ids = text if isinstance(text, list) else encode(encoder, text)
                reason = "eos" if ids[-1] == self.tokenizer.eos_token_id else "length"
                logprobs = torch.linspace(-1, -0.1, len(ids))
                found.append(Completion(0, ids, logprobs, reason, len(prompt)))
        return found


def encode(encoder, text: str) -> list[int]:
    """Text with <|im_end|> and the tags of calls as their tokens."""
    import re

    ids = []
    for part in re.split(r"(<\|im_end\|>|</?tool_call>|</?think>)", text):
        if part in encoder.special_ids:
            ids.append(encoder.special_ids[part])
        elif part:
            ids += encoder.encode_texts([part])[0]
    return ids


__all__ = ["MOE", "Script", "agent_rows", "flags", "parsed", "prompt_rows", "train"]
