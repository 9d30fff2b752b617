"""lm-evaluation-harness on weights of this project: its own command line, with a model called minimind.

    pip install lm_eval==0.4.13
    python scripts/lm_eval_minimind.py --model minimind --model_args weight=full_sft --tasks arc_easy,piqa
    python scripts/lm_eval_minimind.py --model minimind --model_args weight=out/dpo_512.pth --tasks my_task \\
        --include_path folder/with/yaml

model_args are flags of eval_llm.py (weight, hidden_size, use_moe, save_dir, load_from, lora_weight, device,
dtype, which is float32 if not given, ...), and max_length, add_bos_token as in lm_eval's own models. The
scores are those of scripts/scoring.py. Whatever else lm_eval offers works as ever: --num_fewshot,
--apply_chat_template, --log_samples. docs/evaluation.md also has its other ways, by the server and by
transformers.
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import eval_llm


def load(settings: dict):
    """`eval_llm.Native` from model_args. Raises CheckpointError, also for an argument that is no flag."""
    import argparse

    from trainer.checkpoint import CheckpointError

    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    eval_llm.add_model_flags(parser)
    parser.set_defaults(dtype="float32")
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    try:
        args, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise CheckpointError(f"--model_args: {error}") from None
    if unknown:
        raise CheckpointError(
            f"--model_args: {unknown[0].lstrip('-').partition('=')[0]} is no flag of eval_llm.py"
        )
    if eval_llm.is_folder(args.load_from) and eval_llm.architecture(args.load_from) != "minimind":
        raise CheckpointError(f"{args.load_from} is a model of another architecture: use --model hf")
    return eval_llm.Native(args)


@functools.cache  # a name is given once
def register():
    """Make lm_eval know the model; -> its class. Raises ImportError without lm_eval."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    from scripts import scoring

    @register_model("minimind")
    class MiniMind(LM):
        """The three questions that lm_eval asks a model, answered by the fast engine."""

        def __init__(
            self, batch_size=None, max_batch_size=None, max_length=None, add_bos_token=False, **flags
        ):
            super().__init__()  # how many requests are read together, the engine decides itself
            if flags.get("device") == "cuda:0":  # what lm_eval says when nobody chose
                flags["device"] = "auto"
            self.native = load(flags)
            self.engine, self.tokenizer = self.native.engine, self.native.tokenizer
            self._device, self.add_bos_token = self.engine.device, str(add_bos_token) in ("True", "1")
            self.max_length = int(max_length or self.engine.config.max_position_embeddings)

        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = [request.args for request in requests]
            encoded = scoring.encode_pairs(self.tokenizer, pairs, self.add_bos_token)
            scores = scoring.log_likelihoods(self.engine, encoded, self.max_length)
            for pair, score in zip(pairs, scores):
                self.cache_hook.add_partial("loglikelihood", pair, score)
            return scores

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows, owners = [], []
            for number, request in enumerate(requests):
                ids = self.tokenizer(request.args[0], verbose=False).input_ids
                parts = get_rolling_token_windows(ids, self.tokenizer.bos_token_id, self.max_length, 1)
                windows += map(make_disjoint_window, parts)
                owners += [number] * (len(windows) - len(owners))
            sums = [0.0] * len(requests)
            for owner, (score, _) in zip(
                owners, scoring.log_likelihoods(self.engine, windows, self.max_length)
            ):
                sums[owner] += score
            for request, score in zip(requests, sums):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            texts = []
            for context, settings in (request.args for request in requests):
                texts.append((context, sampling(settings)))
            found: list = [None] * len(texts)
            for wanted in {repr(how): how for _, how in texts}.values():  # those alike in one go
                rows = [i for i, (_, how) in enumerate(texts) if how == wanted]
                room = max(self.max_length - wanted["max_new_tokens"], 1)
                bos = [self.tokenizer.bos_token_id] * self.add_bos_token
                prompts = [(bos + self.tokenizer(texts[i][0]).input_ids)[-room:] for i in rows]
                for i, reply in zip(rows, self.engine.generate(prompts, self.tokenizer, **wanted)):
                    found[i] = reply.text
            for request, text in zip(requests, found):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return found

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        @property
        def tokenizer_name(self):
            return self.tokenizer.name_or_path.replace("/", "__")

        def chat_template(self, chat_template=False):
            return self.tokenizer.chat_template if chat_template else ""

    return MiniMind


def sampling(settings: dict) -> dict:
    """lm_eval's generation settings -> those of `Generator.generate`. The end-of-text token always ends."""
    stop = settings.get("until") or []
    stop = (stop,) if isinstance(stop, str) else tuple(text for text in stop if text)
    limit = next(
        (settings[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in settings), 256
    )
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    kept = {k: settings[k] for k in ("top_k", "top_p", "min_p", "repetition_penalty") if k in settings}
    return {"max_new_tokens": int(limit), "temperature": temperature, "stop": stop, **kept}


def main(_):
    from trainer.checkpoint import CheckpointError

    try:
        register()
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise CheckpointError("lm_eval is not installed: pip install lm_eval==0.4.13") from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from trainer import cli

    cli.run(main, lambda argv: argv)
