"""Does a converted model answer as the original does? Measured with the target's own runtime, on fixed texts.

A certificate is a dictionary of plain values that goes beside the files. What could not be measured says "not
checked", and why.
"""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = (
    "中国的首都是",
    "春天来了，",
    "水在零度的时候",
    "从前有一座山，",
    "请介绍一下你自己。",
    "十二加三十等于",
    "小明有 15 个苹果，",
    "人工智能是",
    "我最喜欢的季节是秋天，因为",
    "Python 里的列表",
    "The capital of France is",
    "Once upon a time",
    "The sun rises in the",
    "To make bread you need",
    "Who are you?",
    "12 + 30 =",
    "def add(a, b):\n    return",
    "Water boils at",
    "My name is",
    "1, 2, 3, 4,",
)
TEXTS = (
    *PROMPTS,
    "😀👨‍👩‍👧 naïve café — “quotes” …",
    "3.14159 1,000,000 2026-11-29 0x7f",
    "for i in range(10):\n\tprint(f'{i:>3}')  # tabs\r\n",
    "  leading, trailing  \n\n\n   and   many   spaces ",
    "龘靐齉 ㄅㄆ 한국어 العربية Ελληνικά ไทย",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n</think><tool_call>",
    "I'll we've don't THEY'RE",
)
NEW_TOKENS = 32
LOGITS = 1e-4  # how far they may be apart in float32


def rounded(model, dtype: str):
    """A copy of a model with its weights rounded to a type, and computed with in float32."""
    import torch

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    return twin.eval()


def certify_transformers(folder, model, tokenizer, dtype: str, adapter=None, code: bool = False) -> dict:
    """The certificate of a transformers folder against a MiniMindLM and its tokenizer, both in float32.
    adapter: a folder of peft that is put on it (`model` has its own merged). code: run the code that is in
    the folder, as for --code 1: this very process has just copied it there from model/. Folders of other
    people are always opened without (convert_model.py native reads their tensors alone)."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.generation import Generator

    runtime = f"transformers {transformers.__version__}"
    options = {"dtype": torch.float32, "trust_remote_code": code}
    if code:  # transformers copies it into a package, which must not be one that was imported before
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]
        importlib.invalidate_caches()
    theirs = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    target = type(theirs).__name__
    if adapter is not None:
        try:
            import peft
        except ImportError:
            return {"checked": "not checked: peft is not installed (pip install peft)"}
        theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        runtime, target = f"{runtime}, peft {peft.__version__}", f"{target} with an adapter"
    their_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
    ours = rounded(model, dtype)
    engine, eos = Generator(ours, dtype="float32"), model.config.eos_token_id
    differences, alike = [], 0
    with torch.inference_mode():
        for text in PROMPTS:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            x = torch.tensor([ids])
            differences.append((ours(x).logits - theirs(x).logits).abs().max())
            (answer,) = engine.generate([ids], max_new_tokens=NEW_TOKENS, temperature=0)
            generated = theirs.generate(
                input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            alike += generated[0, len(ids) :].tolist() == answer.ids
    difference = torch.stack(differences).max().item()  # nan if one of them is
    same_ids = sum(
        tokenizer(text, add_special_tokens=False).input_ids
        == their_tokenizer(text, add_special_tokens=False).input_ids
        for text in TEXTS
    )
    return {
        "target": target,
        "runtime": runtime,
        "weights": dtype,
        "computed_in": "float32",
        "max_logit_difference": difference,
        "greedy_answers_identical": f"{alike} of {len(PROMPTS)}",
        "greedy_tokens": NEW_TOKENS,
        "eos_token_id": eos,
        "texts_with_identical_token_ids": f"{same_ids} of {len(TEXTS)}",
        "passed": difference < LOGITS and alike == len(PROMPTS) and same_ids == len(TEXTS),
    }


# Bits of a weight: the share of next tokens on which it has to agree
AGREEMENT = {16: 0.99, 8: 0.95, 5: 0.9, 4: 0.9}


def certify_gguf(path: Path, model, tokenizer, kind: str) -> dict:
    """The certificate of a GGUF file, by llama.cpp in the npm package node-llama-cpp, where NODE_PATH has it.
    In f32 whole greedy answers have to be the same. In the other types llama.cpp also rounds on the way, and
    one token in doubt changes the rest of an answer: there the likeliest next token counts, at every place of
    our answers. f16 and bf16 are compared with weights rounded alike, fewer bits with the original ones."""
    import torch

    from model.generation import Generator

    dtype = {"f16": "float16", "bf16": "bfloat16"}.get(kind, "float32")
    ours = rounded(model, dtype)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    answers = Generator(ours, dtype="float32").generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0)
    told = [prompt + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]
    found = ask_llama_cpp(path, {"texts": TEXTS, "prompts": prompts, "length": NEW_TOKENS, "told": told})
    if "version" not in found:
        return found
    alike = sum(a.ids == theirs for a, theirs in zip(answers, found["answers"], strict=True))
    agreed = places = 0
    for ids, theirs in zip(told, found["likeliest"], strict=True):
        with torch.inference_mode():
            likeliest = ours(torch.tensor([ids])).logits[0].argmax(-1)
        agreed += int((likeliest == torch.tensor(theirs)).sum())
        places += len(ids)
    same_ids = sum(
        tokenizer(text, add_special_tokens=False).input_ids == ids
        for text, ids in zip(TEXTS, found["ids"], strict=True)
    )
    bits = int(re.search(r"\d+", kind)[0])
    enough = alike == len(PROMPTS) if bits == 32 else agreed >= AGREEMENT[bits] * places
    return {
        "target": "llama.cpp",
        "runtime": f"node-llama-cpp {found['version']}",
        "weights": kind,
        "greedy_answers_identical": f"{alike} of {len(PROMPTS)}",
        "greedy_tokens": NEW_TOKENS,
        "likeliest_tokens_identical": f"{agreed} of {places}",
        "texts_with_identical_token_ids": f"{same_ids} of {len(TEXTS)}",
        "passed": enough and same_ids == len(TEXTS),
    }


def ask_llama_cpp(path: Path, questions: dict) -> dict:
    """What gguf_answers.mjs finds; or a certificate that says why there is nothing."""
    places = [Path(place) / "node-llama-cpp" for place in os.environ.get("NODE_PATH", "").split(os.pathsep)]
    package = next((place for place in places if (place / "dist" / "index.js").exists()), None)
    if package is None or shutil.which("node") is None:
        return {"checked": "not checked: NODE_PATH has no node-llama-cpp (npm install node-llama-cpp)"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.json"
        file.write_text(json.dumps(questions))
        script = Path(__file__).with_name("gguf_answers.mjs")
        command = ["node", str(script), str(package), str(Path(path).resolve()), str(file)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
        except subprocess.TimeoutExpired:
            return {"checked": "not checked: llama.cpp was not done within 600 seconds"}
    if ran.returncode:
        return {"checked": f"llama.cpp failed: {ran.stderr.strip()[-300:]}", "passed": False}
    return json.loads(ran.stdout.strip().splitlines()[-1])
