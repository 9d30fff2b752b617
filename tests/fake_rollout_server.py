"""A stand-in for a vLLM or SGLang server: their requests and answers, log-probabilities of a real small
model, and faults that can be switched on. Formats are those of vLLM 0.16 to 0.33 and SGLang 0.5.23.

    with FakeServer("vllm", folder) as server:
        engine = ServedEngine("vllm", server.url, ...)
        server.fault = "hang"
"""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

BROKEN = ["hang", "500", "nonsense", "die"]  # of any request
ODD = """other_format few short_logprobs no_logprobs nan positive empty stripped outside aborted
    too_long""".split()  # of generation requests: well-formed answers that break the contract


def read_folder(folder):
    """Our model from a Hugging Face folder."""
    from model.model_minimind import MiniMindConfig, MiniMindLM

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    fields = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype")}
    kinds = {"llama": {}, "qwen3": dict(qk_norm=True), "qwen3_moe": dict(qk_norm=True, use_moe=True)}
    fields |= kinds[config["model_type"]]
    model = MiniMindLM(MiniMindConfig(**fields | {"n_shared_experts": 0})).eval()
    state = load_file(Path(folder) / "model.safetensors")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model


@torch.no_grad()
def score(model, prompt, ids, temperature=1.0) -> list[float]:
    """Log-probability of every id behind a prompt, by a plain forward pass."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    logps = (logits / temperature).log_softmax(-1)
    return logps[torch.arange(len(ids)), torch.tensor(ids)].tolist()


class Listener(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, many connections at once wait a second for another try


class FakeServer:
    """fault: one of BROKEN or ODD, "400", or None; faulty_requests: how many requests it spoils (None = all).
    calls: paths, in order; bodies: of generation requests."""

    def __init__(self, kind, folder, logprobs_mode="raw_logprobs", dev_mode=True, version="0.16.0"):
        from model.generation import Generator

        self.kind, self.logprobs_mode, self.dev_mode, self.vllm_version = (
            kind,
            logprobs_mode,
            dev_mode,
            version,
        )
        self.fault, self.faulty_requests, self.ignores_updates = None, None, False
        self.calls, self.bodies, self.weight_version = [], [], "default"
        self.lock, self.released = threading.Lock(), threading.Event()
        self.model = read_folder(folder)
        self.generator = Generator(self.model, "float32")
        self.httpd = Listener(("127.0.0.1", 0), handler_of(self))
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.released.set()
        self.httpd.shutdown()
        self.httpd.server_close()

    def count(self, path) -> int:
        return Counter(self.calls)[path]

    def load(self, folder):
        from model.generation import Generator

        model = read_folder(folder)
        if not self.ignores_updates:
            self.model, self.generator = model, Generator(model, "float32")

    def takes_fault(self) -> str | None:
        """The fault of this request, if it has one."""
        with self.lock:
            if self.fault is None or self.faulty_requests == 0:
                return None
            if self.faulty_requests is not None:
                self.faulty_requests -= 1
            return self.fault

    def sample(self, prompt, seed, max_new_tokens, temperature, ends):
        with self.lock:
            (answer,) = self.generator.generate(
                [prompt],
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_token_ids=tuple(ends),
            )
        ids, reason = answer.ids, "stop" if answer.finish_reason == "eos" else "length"
        scored_at = temperature or 1.0
        if self.kind == "vllm" and self.logprobs_mode == "raw_logprobs":
            scored_at = 1.0
        return ids, score(self.model, prompt, ids, scored_at), reason

    def refuses(self, prompt) -> str | None:
        size = self.model.config.vocab_size
        return next((f"Token id {i} is out of vocabulary" for i in prompt if not 0 <= i < size), None)

    # ---- both kinds: (status, content); content is JSON, or text as it is --------------------------

    def answer(self, method, path, body):
        if (method, path) == ("GET", "/health"):
            return 200, ""
        return (self.answer_vllm if self.kind == "vllm" else self.answer_sglang)(method, path, body)

    def answer_vllm(self, method, path, body):
        if (method, path) == ("GET", "/version"):
            return 200, {"version": self.vllm_version}
        if (method, path) == ("POST", "/v1/completions"):
            return self.complete(body)
        if self.dev_mode and (method, path) == ("GET", "/server_info?config_format=json"):
            config = {"model_config": {"logprobs_mode": self.logprobs_mode}}
            return 200, {"vllm_config": config, "vllm_env": {}, "system_env": {}}
        if self.dev_mode and (method, path) == ("POST", "/collective_rpc"):
            if body["method"] != "reload_weights" or set(body["kwargs"]) != {"weights_path"}:
                return 500, {"error": {"message": "unexpected keyword argument", "code": 500}}
            self.load(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if self.dev_mode and (method, path) == ("POST", "/reset_prefix_cache"):
            return 200, "" if self.vllm_version == "0.16.0" else {"success": True}
        return 404, {"detail": "Not Found"}

    def complete(self, body):
        self.bodies.append(body)
        wrong = self.refuses(body["prompt"])
        if body["n"] > 1 and body["temperature"] < 1e-5:
            wrong = f"n must be 1 when using greedy sampling, got {body['n']}."
        if not -(2**63) <= body["seed"] + body["n"] < 2**63:
            wrong = "seed should be less than or equal to 9223372036854775807"
        if (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) != (1, 0, 0, 1):
            wrong = "the whole distribution was to be sampled"
        if wrong:
            message = {"message": wrong, "type": "BadRequestError", "param": None, "code": 400}
            return 400, {"error": message}
        choices = []
        for index in range(body["n"]):
            ids, logprobs, reason = self.sample(
                body["prompt"],
                body["seed"] + index,
                body["max_tokens"],
                body["temperature"],
                body["stop_token_ids"],
            )
            listed = {
                "text_offset": [0] * len(ids),
                "token_logprobs": logprobs,
                "tokens": ["?"] * len(ids),
                "top_logprobs": [{"?": p} for p in logprobs],
            }
            choices.append(
                {
                    "index": index,
                    "text": "?",
                    "logprobs": None if body.get("logprobs") is None else listed,
                    "finish_reason": reason,
                    "stop_reason": None,
                    "token_ids": ids if body.get("return_token_ids") else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": body["prompt"] if body.get("return_token_ids") else None,
                }
            )
        usage = {"prompt_tokens": len(body["prompt"]), "total_tokens": 0, "completion_tokens": 0}
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": choices[::-1], "usage": usage}

    def answer_sglang(self, method, path, body):
        if (method, path) == ("GET", "/model_info"):
            return 200, {
                "model_path": "somewhere",
                "is_generation": True,
                "weight_version": self.weight_version,
            }
        if (method, path) == ("POST", "/generate"):
            return self.generate(body)
        if (method, path) == ("POST", "/update_weights_from_disk"):
            try:
                self.load(body["model_path"])
            except FileNotFoundError as error:
                return 400, {
                    "success": False,
                    "message": f"Failed to load: {error}",
                    "num_paused_requests": 0,
                }
            self.weight_version = body.get("weight_version") or self.weight_version
            done = "Succeeded to update model weights."
            return 200, {"success": True, "message": done, "num_paused_requests": 0}
        if path == "/flush_cache":
            return 200, "Cache flushed.\nPlease check backend logs for more details."
        return 404, {"detail": "Not Found"}

    def generate(self, body):
        self.bodies.append(body)
        answers = []
        for prompt, sampling in zip(body["input_ids"], body["sampling_params"], strict=True):
            wrong = self.refuses(prompt)
            if not -(2**63) <= sampling["sampling_seed"] < 2**63:
                wrong = "sampling_seed must be in [-2**63, 2**63 - 1]"
            parts = [sampling[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")]
            if parts != [1, -1, 0, 1]:
                wrong = "the whole distribution was to be sampled"
            if wrong:
                return 400, {"error": {"message": wrong}}
            ids, logprobs, reason = self.sample(
                prompt,
                sampling["sampling_seed"],
                sampling["max_new_tokens"],
                sampling["temperature"],
                sampling["stop_token_ids"],
            )
            meta = {
                "id": "1",
                "finish_reason": {"type": reason, "length": len(ids)},
                "prompt_tokens": len(prompt),
                "weight_version": self.weight_version,
                "completion_tokens": len(ids),
                "cached_tokens": 0,
            }
            if reason == "stop":
                meta["finish_reason"] = {"type": "stop", "matched": ids[-1]}
            if body.get("return_logprob"):
                meta["input_token_logprobs"] = []
                meta["output_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids)]
            keeps_end = sampling.get("no_stop_trim") or reason != "stop"
            answers.append({"text": "?", "output_ids": ids if keeps_end else ids[:-1], "meta_info": meta})
        return 200, answers


def spoil(kind, content, fault):
    """A good answer with one fault."""
    if fault == "other_format":
        return {"something": "else"}
    choices = content["choices"] if kind == "vllm" else content
    if fault == "few":
        choices.pop()
    for choice in choices:
        if kind == "vllm":
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        else:
            ids, pairs = choice["output_ids"], choice["meta_info"]["output_token_logprobs"]
            logprobs = [pair[0] for pair in pairs]
        reason = "length"
        if fault == "stripped":
            ids, logprobs, reason = [*ids[:-1], 5], logprobs, "stop"
        elif fault == "short_logprobs":
            logprobs = logprobs[:-1]
        elif fault == "nan":
            logprobs = [float("nan"), *logprobs[1:]]
        elif fault == "positive":
            logprobs = [3.5, *logprobs[1:]]
        elif fault == "empty":
            ids, logprobs = [], []
        elif fault == "outside":
            ids = [10**6, *ids[1:]]
        elif fault == "too_long":
            ids, logprobs = [5] * 99, [-1.0] * 99
        elif fault == "aborted":
            reason, ids = "abort", [*ids[:-1], 5]
        if kind == "vllm":
            choice |= {"token_ids": ids, "finish_reason": reason}
            choice["logprobs"] = None if fault == "no_logprobs" else {"token_logprobs": logprobs}
        else:
            meta = choice["meta_info"]
            choice["output_ids"], meta["finish_reason"] = ids, {"type": reason}
            meta["output_token_logprobs"] = [[p, i, None] for p, i in zip(logprobs, ids)]
            if fault == "no_logprobs":
                del meta["output_token_logprobs"]
    return content


def handler_of(server: FakeServer):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.handle_one("GET", None)

        def do_POST(self):
            text = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.handle_one("POST", json.loads(text or "{}"))

        def handle_one(self, method, body):
            server.calls.append(urlsplit(self.path).path)
            fault = server.takes_fault()
            if fault == "hang":
                server.released.wait()
            if fault in ("hang", "die"):
                self.close_connection = True
                return
            if fault == "500":
                return self.send(500, {"error": {"message": "CUDA error: out of memory", "code": 500}})
            if fault == "400":
                return self.send(
                    400, {"error": {"message": "this model's maximum context is 32", "code": 400}}
                )
            if fault == "nonsense":
                return self.send(200, "<html>welcome</html>")
            status, content = server.answer(method, self.path, body)
            if fault and status == 200 and self.path in ("/v1/completions", "/generate"):
                content = spoil(server.kind, content, fault)
            self.send(status, content)

        def send(self, status, content):
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Handler
