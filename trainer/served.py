"""Answers sampled by somebody else's server, vLLM or SGLang: ids in, ids and log-probabilities out.

    python trainer/served.py --weight out/full_sft_512.pth --to out/served       # a folder to start it with
    VLLM_SERVER_DEV_MODE=1 vllm serve out/served --dtype bfloat16 --port 8998    # or
    python -m sglang.launch_server --model-path out/served --dtype bfloat16 --port 8998
    python trainer/train_grpo.py --rollout_engine vllm --rollout_url http://127.0.0.1:8998

Before each step the weights go to the server as a folder in the format of transformers' Llama, Qwen3 or
Qwen3-MoE, so both must see --rollout_shared_path under the same name. What comes back is held to a
contract: ids of our vocabulary, one log-probability for each, the end token among them. What breaks it ends
the run with one sentence; nothing is padded, shifted or made up.

vLLM, 0.16 or newer: /v1/completions with `prompt` a list of ids, `logprobs` 0 (of the drawn token alone) and
`return_token_ids`; the end token comes with its log-probability. Samples of a prompt are `n` of one request,
seeded seed, seed + 1, ... Only with VLLM_SERVER_DEV_MODE=1 are there /collective_rpc (`reload_weights` with a
`weights_path`) and /reset_prefix_cache. Its log-probabilities are by default those of the raw logits, at
temperature 1; other temperatures need a server started with --logprobs-mode processed_logprobs.

SGLang, 0.5: /generate with `input_ids` and `return_logprob`, then /update_weights_from_disk and /flush_cache.
Log-probabilities are those after temperature (unless its environment says SGLANG_RETURN_ORIGINAL_LOGPROB=1,
which cannot be seen from here). `sampling_seed` acts with --enable-deterministic-inference only; without it
samples are as random, but another run draws others. `output_ids` lack the end token unless `no_stop_trim` is
set, which it is. Answers name the version of their weights, so a server that was restarted is noticed; of
vLLM's it is not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import shutil
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

AT_ONCE = 32  # requests in flight; each is a prompt with all its samples
KEPT = 2  # folders of weights on disk: the server's, and the one before
AGREEMENT = 0.25  # nats by which a server may differ on average: rounding is far below, other weights above

# Beside the trainer, not behind a proxy that the environment may name for the web.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

GO_ON = "start the server again, then continue with --from_resume 1"
START = {
    "vllm": "start vLLM 0.16 or newer with VLLM_SERVER_DEV_MODE=1 (trainer/served.py shows how)",
    "sglang": "start SGLang (trainer/served.py shows how)",
}


class RolloutError(RuntimeError):
    """A server does not answer, or not as agreed; the message is one sentence with a remedy."""


# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------


class ServedEngine:
    """The methods of rollout.LocalEngine, answered by a server. version: of the weights it samples from, -1
    before it was given any."""

    def __init__(self, kind: str, url: str, shared_path, timeout: float = 120.0, retries=4, pause=1.0):
        """kind: "vllm" or "sglang"; shared_path: folder in which weights are handed over; timeout, pause: in
        seconds. A request is tried 1 + retries times, after pauses that double."""
        if kind not in START:
            raise ValueError(f"kind must be vllm or sglang, not {kind!r}")
        if not is_address(url):
            raise RolloutError(f"--rollout_url {url} is no address: write it as http://127.0.0.1:8998")
        self.kind, self.url = kind, url.rstrip("/").removesuffix("/v1")
        self.shared_path = Path(shared_path)
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.version = -1
        self.vocabulary = None  # (size, end tokens) of the model that was handed over
        self.logprobs_mode = None  # of a vLLM server
        self.compared = False
        self.given_up = threading.Event()  # one request failed for good: the others need not be tried again

    def fail(self, problem: str, remedy: str = GO_ON) -> RolloutError:
        return RolloutError(f"the {self.kind} server at {self.url} {problem}: {remedy}")

    def request(self, path: str, body: dict | None = None, read=json.loads, remedy=GO_ON):
        """read(text of the answer). body: JSON to POST, None: GET. Server errors, silence and broken JSON are
        tried again; what the server refuses (HTTP 4xx) would be refused again."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        problem, tries = "", 0
        while tries <= self.retries:
            if tries and self.given_up.wait(self.pause * 2 ** (tries - 1)):
                break
            tries += 1
            try:
                with OPENER.open(request, timeout=self.timeout) as answer:
                    return read(answer.read().decode("utf-8"))
            except urllib.error.HTTPError as error:
                problem = f"answered {path} with HTTP {error.code}{message_of(error)}"
                if error.code < 500:
                    raise self.fail(problem, remedy) from None
            except ValueError:
                problem = f"answered {path} with something that is not JSON"
            except (OSError, http.client.HTTPException) as error:
                problem = what_happened(error, path, self.timeout)
        raise self.fail(f"{problem} ({tries} tries)", remedy)

    def check(self):
        """Is somebody there, of this kind, and able to take new weights? Whether the model fits is seen when
        it gets the first. Raises RolloutError."""
        start = START[self.kind]
        self.request("/health", read=str, remedy=start)
        if self.kind == "vllm":
            said = self.field(self.request("/version", remedy=start), "version")
            numbers = [int(part) for part in str(said).split(".")[:2] if part.isdigit()]
            if len(numbers) == 2 and numbers != [0, 0] and numbers < [0, 16]:  # built from source: often 0.0
                raise self.fail(f"is vLLM {said}, which cannot load weights from a new folder", start)
            self.find_logprobs_mode()
        elif not self.field(self.request("/model_info", remedy=start), "is_generation"):
            raise self.fail("does not generate text", start)

    def find_logprobs_mode(self):
        info = self.request("/server_info?config_format=json", remedy=START["vllm"])
        self.logprobs_mode = self.field(info, "vllm_config", "model_config", "logprobs_mode")
        if self.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise self.fail(
                f"was started with --logprobs-mode {self.logprobs_mode}, which gives no log-probabilities",
                "start it with --logprobs-mode processed_logprobs",
            )

    def field(self, answer, *names):
        """answer[names[0]][names[1]]...; RolloutError when there is no such thing."""
        for name in names:
            answer = answer.get(name) if isinstance(answer, dict) else None
        if answer is None:
            raise self.fail(f"gave an answer without {'.'.join(names)}", START[self.kind])
        return answer

    # ---- answers -------------------------------------------------------------------------------------

    def generate(self, prompts, seeds, num_return_sequences: int, max_new_tokens: int, temperature: float):
        """Completions a, a, b, b of prompts (lists of ids), one seed for each prompt, from the whole
        distribution (no top-p, no top-k). Log-probabilities as model.generation gives them: at `temperature`,
        for the greedy 0 at 1. Raises RolloutError."""
        import torch

        from model.generation import Completion

        if not prompts:
            return []
        if self.kind == "vllm" and temperature not in (0, 1):
            if self.logprobs_mode is None:
                self.find_logprobs_mode()
            if self.logprobs_mode != "processed_logprobs":
                raise self.fail(
                    f"gives log-probabilities at temperature 1 for samples drawn at {temperature}",
                    "start it with --logprobs-mode processed_logprobs, or sample with --temperature 1",
                )
        self.find_vocabulary()
        settings = (num_return_sequences, max_new_tokens, temperature)
        self.given_up.clear()
        with ThreadPoolExecutor(min(AT_ONCE, len(prompts))) as pool:
            asked = [pool.submit(self.ask, *both, *settings) for both in zip(prompts, seeds)]
            try:
                for future in wait(asked, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises the first failure without waiting for those before it
                groups = [future.result() for future in asked]
            except BaseException:
                self.given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [
            Completion(i, ids, torch.tensor(logprobs, dtype=torch.float32), reason, len(prompts[i]))
            for i, group in enumerate(groups)
            for ids, logprobs, reason in group
        ]

    def ask(self, prompt, seed, num_answers, max_new_tokens, temperature) -> list[tuple]:
        """(ids, log-probabilities, finish reason) of all answers to one prompt."""
        different = num_answers if temperature else 1  # vLLM refuses several greedy answers; they are equal
        make, path, read = INTERFACES[self.kind]
        settings = sampling_settings(temperature, self.vocabulary[1])
        answer = self.request(path, make(prompt, seed, different, max_new_tokens, settings))
        try:
            answers, versions = read(answer)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self.fail(f"answered {path} in another format than it should", START[self.kind]) from None
        for version in versions:
            if version not in (None, str(self.version)):
                raise self.fail(
                    f"samples from the weights {version!r}, not from those of step {self.version} (it was "
                    "restarted, or somebody else gave it weights)"
                )
        if len(answers) != different:
            raise self.fail(f"gave {len(answers)} answers instead of {different}", START[self.kind])
        checked = [self.checked(*one, max_new_tokens) for one in answers] * (num_answers // different)
        return [(list(ids), list(logprobs), reason) for ids, logprobs, reason in checked]

    def checked(self, ids, logprobs, reason, max_new_tokens):
        """An answer that keeps the contract, with the finish reason in our words. Raises RolloutError."""
        size, ends = self.vocabulary
        if not isinstance(ids, list) or not ids:
            raise self.fail("gave an empty answer, or one without token ids", START[self.kind])
        if not isinstance(logprobs, list) or None in logprobs:
            raise self.fail("gave token ids without log-probabilities", START[self.kind])
        if len(ids) != len(logprobs):
            raise self.fail(
                f"gave {len(ids)} token ids and {len(logprobs)} log-probabilities, which cannot be matched",
                f"it must keep the end token in both, so {START[self.kind]}",
            )
        outside = [i for i in ids if type(i) is not int or not 0 <= i < size]
        if outside:
            raise self.fail(
                f"drew token {outside[0]}, outside the vocabulary of {size:,} entries",
                "start it with a model of this vocabulary (trainer/served.py writes one)",
            )
        if not all(isinstance(p, int | float) and math.isfinite(p) and p < 1e-3 for p in logprobs):
            raise self.fail("gave log-probabilities that are NaN, infinite or above 0", START[self.kind])
        if len(ids) > max_new_tokens:
            raise self.fail(f"gave {len(ids)} tokens where at most {max_new_tokens} were asked for")
        if ids[-1] in ends:
            return ids, logprobs, "eos"
        if reason == "stop":
            setting = "no_stop_trim" if self.kind == "sglang" else "stop_token_ids"
            raise self.fail(
                f"ended an answer without the end token {ends[0]} (it ignored {setting}, or its model has "
                "another one)",
                "start it with a folder that trainer/served.py writes",
            )
        if reason != "length":
            raise self.fail(f"ended an answer by {reason!r}")
        return ids, logprobs, "length"

    def find_vocabulary(self):
        """Size and end tokens of the model; processes that handed over nothing read them in the folder that
        was."""
        if self.vocabulary is None:
            path = self.folder(self.version) / "config.json"
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except OSError:
                raise self.fail("was given no weights yet", f"{path} should be there") from None
            self.vocabulary = config["vocab_size"], end_tokens(config["eos_token_id"])

    # ---- weights -------------------------------------------------------------------------------------

    def folder(self, version: int) -> Path:
        return self.shared_path / f"version_{version}"

    def update(self, model, tokenizer, version: int):
        """Hand over the weights as they are now: a folder beside the last one, which the server loads, then
        forgets what it had computed with the old ones. Raises RolloutError."""
        folder = self.folder(version)
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        export_folder(model, tokenizer.name_or_path, beside)
        if folder.exists():  # of a run before this one
            shutil.rmtree(folder)
        os.replace(beside, folder)
        self.given_up.clear()
        where = str(folder.absolute())
        hint = f"it must see the folder {where}; {START[self.kind]}"
        if self.kind == "vllm":
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": where}}
            self.request("/collective_rpc", rpc, remedy=hint)
            flushed = self.request(
                "/reset_prefix_cache", {}, lambda text: json.loads(text or "{}"), remedy=hint
            )
            if flushed.get("success") is False:  # older ones say nothing
                raise self.fail("could not clear its prefix cache after loading new weights")
        else:
            update = {"model_path": where, "weight_version": str(version), "flush_cache": True}
            found = self.request("/update_weights_from_disk", update, remedy=hint)
            if self.field(found, "success") is not True:
                raise self.fail(f"did not load the weights ({found.get('message')})", hint)
            self.request("/flush_cache", {}, read=str)
        self.version = version
        self.vocabulary = model.config.vocab_size, end_tokens(model.config.eos_token_id)
        if not self.compared:
            self.compare(model)
            self.compared = True
        remove_old(self.shared_path, folder)

    def compare(self, model):
        """Does the server compute what this model computes? A few tokens, drawn there and scored here:
        another architecture, rotary base or vocabulary is seen at once, whatever it says of itself."""
        import torch

        size = self.vocabulary[0]
        prompt = [*range(min(size, 8)), size - 1]  # the last id: a server with fewer refuses it
        ids, theirs, _ = self.ask(prompt, 0, 1, 8, 0.0)[0]
        device, training = next(model.parameters()).device, model.training
        model.eval()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids], device=device)).logits[0, len(prompt) - 1 : -1]
        model.train(training)
        ours = logits.float().log_softmax(-1).gather(1, torch.tensor(ids, device=device)[:, None])
        distance = (ours[:, 0].cpu() - torch.tensor(theirs)).abs().mean().item()
        if not distance < AGREEMENT:
            raise self.fail(
                f"computes another model (log-probabilities differ by {distance:.2f} on average) although it "
                "was given these weights",
                "start it with the folder that trainer/served.py writes of this model",
            )


def is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        return False


def end_tokens(eos) -> list[int]:
    return list(eos) if isinstance(eos, list | tuple) else [eos]


def message_of(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, as " (...)"; vLLM and SGLang wrap it differently."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        content = json.loads(text)
        for name in ("error", "message", "detail"):
            content = content.get(name, content) if isinstance(content, dict) else content
        text = content if isinstance(content, str) else text
    except ValueError:
        pass
    text = " ".join(text.split())
    return f" ({text[:300]})" if text else ""


def what_happened(error: Exception, path: str, timeout: float) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"did not answer {path} within {timeout:g} s"
    if isinstance(reason, ConnectionRefusedError):
        return "does not exist (connection refused)"
    return f"broke off while answering {path} ({reason or type(reason).__name__})"


# --------------------------------------------------------------------------------------------------
# The two interfaces
# --------------------------------------------------------------------------------------------------


def sampling_settings(temperature: float, ends: list[int]) -> dict:
    """What both call alike. Everything is said: a server takes what is missing from the model's
    generation_config.json."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": ends,
        "skip_special_tokens": False,
    }


def vllm_request(prompt, seed, num_answers, max_new_tokens, settings) -> dict:
    from trainer.runtime import mix_seed

    return {
        "prompt": prompt,
        "n": num_answers,
        "max_tokens": max_new_tokens,
        "seed": mix_seed(seed) >> 1,  # vLLM adds the number of the sample: it must stay below 2^63
        "top_k": 0,
        "logprobs": 0,
        "return_token_ids": True,
        **settings,
    }


def vllm_answers(answer) -> tuple[list, list]:
    """[(ids, log-probabilities, reason)] in order, and the versions of the weights it names (none)."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    found = []
    for choice in choices:
        logprobs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        found.append((choice["token_ids"], logprobs, choice["finish_reason"]))
    return found, []


def sglang_request(prompt, seed, num_answers, max_new_tokens, settings) -> dict:
    from trainer.runtime import mix_seed

    settings = {**settings, "max_new_tokens": max_new_tokens, "top_k": -1, "no_stop_trim": True}
    return {
        "input_ids": [prompt] * num_answers,
        "sampling_params": [{**settings, "sampling_seed": mix_seed(seed, i)} for i in range(num_answers)],
        "return_logprob": True,
    }


def sglang_answers(answer) -> tuple[list, list]:
    """[(ids, log-probabilities, reason)] in order, and the versions of the weights it names."""
    found, versions = [], []
    for one in answer:
        meta = one["meta_info"]
        versions.append(meta.get("weight_version"))
        drawn = meta.get("output_token_logprobs")  # [log-probability, id, text]
        if drawn and any(i != token for i, (_, token, *_) in zip(one["output_ids"], drawn)):
            raise KeyError("log-probabilities of other tokens")
        logprobs = drawn and [logprob for logprob, *_ in drawn]
        found.append((one["output_ids"], logprobs, meta["finish_reason"]["type"]))
    return found, versions


INTERFACES = {
    "vllm": (vllm_request, "/v1/completions", vllm_answers),
    "sglang": (sglang_request, "/generate", sglang_answers),
}


# --------------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------------


def hf_config(config) -> dict:
    """The configuration of the transformers class that computes the same: Llama, Qwen3 with QK-norm,
    Qwen3-MoE with experts too. Raises RolloutError when there is none."""
    remedy = "such a model samples in this process: --rollout_engine torch"
    if config.use_moe and not config.qk_norm:
        raise RolloutError(f"no served architecture has experts without QK-norm; {remedy}")
    if config.use_moe and config.n_shared_experts:
        raise RolloutError(
            f"Qwen3-MoE has no shared experts, this model has {config.n_shared_experts}; {remedy}"
        )
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings
        initializer_range bos_token_id eos_token_id pad_token_id""".split()
    rope = dict(config.rope_parameters)
    kind, model_type = ("Qwen3", "qwen3") if config.qk_norm else ("Llama", "llama")
    found = {name: getattr(config, name) for name in names}
    found |= {"attention_bias": False, "attention_dropout": 0.0, "dtype": "float32", "use_cache": True}
    # transformers 5 reads rope_parameters, the servers' older ones the other two
    found |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        found["rope_scaling"] = rope
    if config.use_moe:
        kind, model_type = "Qwen3Moe", "qwen3_moe"
        names = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef"
        found |= {name: getattr(config, name) for name in names.split()}
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": model_type, **found}


def export_folder(model, tokenizer_folder, folder):
    """Write a model (float32) and its tokenizer as a Hugging Face folder that needs no code of ours. Raises
    RolloutError when no such architecture exists or the folder cannot be written; then none is left."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, config = Path(folder), hf_config(model.config)
    state = {name: t.detach().float().cpu().contiguous() for name, t in model.state_dict().items()}
    if config["tie_word_embeddings"]:  # stored once, as transformers does
        state.pop("lm_head.weight", None)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", config), ("generation_config.json", ends)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (Path(tokenizer_folder) / name).exists():
                shutil.copyfile(Path(tokenizer_folder) / name, folder / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RolloutError(
            f"could not write the weights to {folder} ({error}): free some space, make the folder writable, "
            "or choose another with --rollout_shared_path"
        ) from None


def remove_old(shared_path: Path, newest: Path):
    """Keep `newest` and the folder that was written before it. By time: a resumed run counts from a lower
    version."""
    others = [path for path in shared_path.glob("version_*") if path != newest and path.is_dir()]
    others.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in others[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)  # Windows: not while somebody reads it


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=Path, required=True, metavar="FILE", help="weights to serve")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    return parser.parse_args(argv)


def main(args):
    from trainer import checkpoint

    tokenizer = checkpoint.load_tokenizer()
    model, _ = checkpoint.load_model(args.weight, tokenizer)
    export_folder(model, tokenizer.name_or_path, args.to)
    print(f"wrote {checkpoint.shown(args.to)}")


if __name__ == "__main__":
    from trainer import cli

    cli.run(main, parse_args)
