"""A live server with small models of random weights."""

import threading
import time
from types import SimpleNamespace

import torch
import uvicorn
from transformers import AutoTokenizer

import eval_llm
from model.generation import Generator
from model.model_minimind import MiniMindConfig, MiniMindLM
from scripts import serve_openai_api
from scripts.serve_answers import Served
from scripts.serve_worker import Worker


def small_native(is_base=False, seed=0):
    """What `eval_llm.Native` makes of a weight file, without one."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = MiniMindLM(MiniMindConfig(**shape, max_position_embeddings=2048)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    native = SimpleNamespace(is_base=is_base, engine=Generator(model, dtype="float32"))
    native.tokenizer = AutoTokenizer.from_pretrained(eval_llm.ROOT / "model")
    native.encode = lambda *what: eval_llm.Native.encode(native, *what)
    native.answer = lambda *what: eval_llm.Native.answer(native, *what)
    return native


class LiveServer:
    """with LiveServer("--max_rows", "4") as server: server.url"""

    def __init__(self, *flags):
        self.args = serve_openai_api.parse_args([*flags])
        natives = {"chat": small_native(), "text": small_native(is_base=True, seed=1)}
        self.models = {name: Served(name, native, self.args) for name, native in natives.items()}
        batches = {name: served.batch for name, served in self.models.items()}
        self.worker = Worker(batches, self.args.max_waiting, self.args.timeout)
        self.app = serve_openai_api.create_app(self.models, self.worker, self.args)

    def __enter__(self):
        config = uvicorn.Config(self.app, port=0, log_level="critical", timeout_graceful_shutdown=5)
        self.server = serve_openai_api.Server(config, self.worker)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self.server.handle_exit(None, None)
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server does not end"

    def idle(self):
        return not self.worker.streams and not any(batch.busy for batch in self.worker.batches.values())


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
