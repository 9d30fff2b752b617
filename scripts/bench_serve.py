"""The server under load: many streams at once against one, and against a server that answers one by one.

    python scripts/bench_serve.py --preset minimind2-small
    python scripts/bench_serve.py --preset minimind2-small --streams 32 --seconds 600 --only load

Three servers in turn, the same random weights, every stream a client of its own: one stream alone; --streams
of them; --streams of them at a server that writes one answer at a time (--max_rows 1). Answers have 32 to 160
tokens, and every client asks again at once. One request in twenty is dropped in the middle.

tokens/s is over all streams, the time to the first token is a request's. Client and server share the machine:
what the client costs is in the figures. A stream counts as wrong when it has other than the tokens it asked
for, or no [DONE]; and one in eight asks (by logit_bias) for one word again and again, and is wrong when it
gets any other: streams that were mixed up would show.
"""

import argparse
import asyncio
import functools
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench
from scripts.bench import say
from trainer import cli

KINDS = {"one": "one stream", "load": "{} streams", "serial": "{} streams, one answer at a time"}
WORDS = "river mountain story number letter tell why how what of the and people water time long small".split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=cli.PRESETS, default="minimind2-small", help="shape of the model")
    parser.add_argument("--streams", type=cli.positive_int, default=32, help="clients at once")
    parser.add_argument("--seconds", type=cli.positive_float, default=60, help="of each measurement")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="leave out the others")
    parser.add_argument("--dtype", default="auto", help="of the server")
    parser.add_argument("--threads", type=cli.count, default=0, help="of the server, 0 = all cores")
    parser.add_argument("--seed", type=cli.count, default=0, help="of weights and requests")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "bench", help="folder of the result")
    parser.add_argument("--json", type=Path, help="file of the result; without it in --out_dir")
    parser.add_argument("--ledger", action="store_true", help="append rows to docs/benchmarks.md")
    args = parser.parse_args(argv)
    args.task, args.threads = "serve", args.threads or bench.available_cores()
    args.command_line = bench.command_line(sys.argv[1:]).replace("bench.py", "bench_serve.py")
    return args


def write_weights(args, folder: Path):
    import torch

    from model.model_minimind import MiniMindConfig, MiniMindLM
    from scripts.bench_contenders import random_weights
    from trainer import checkpoint

    torch.manual_seed(args.seed)
    model = MiniMindLM(MiniMindConfig.from_preset(args.preset))
    random_weights(model, args.seed)
    tokenizer = checkpoint.load_tokenizer()
    metadata = {"stage": "full_sft", "tokenizer_hash": checkpoint.tokenizer_hash(tokenizer)}
    checkpoint.save_weights(model, folder / f"random_{model.config.hidden_size}.pth", metadata)


class Server:
    """scripts/serve_openai_api.py in a process of its own."""

    def __init__(self, args, folder: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py"), "--weight", "random"]
        command += ["--save_dir", str(folder), "--port", str(self.port), "--dtype", args.dtype, *flags]
        command += ["--num_threads", str(args.threads)]
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{self.port}"

    async def ready(self):
        import httpx

        async with httpx.AsyncClient() as http:
            for _ in range(600):
                if self.process.poll() is not None:
                    raise SystemExit(f"the server ended: {Path(self.log.name).read_text()}")
                try:
                    await http.get(f"{self.url}/health")
                    return
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
        raise SystemExit("the server does not answer")

    def memory(self) -> float:
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss / 2**30

    def stop(self) -> float:
        """Seconds until it has ended after SIGTERM."""
        begin = time.monotonic()
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
        return time.monotonic() - begin


@functools.cache
def marks() -> list[tuple[int, str]]:
    """Tokens that are plain words: (id, text)."""
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"].items()
    return [(i, token) for token, i in vocab if token.isascii() and token.isalpha() and len(token) > 3][:200]


class Client:
    """One stream after the other, until the time is over."""

    def __init__(self, server: Server, seed: int, found: dict):
        self.server, self.rng, self.found = server, random.Random(seed), found
        self.marks = marks()

    async def run(self, until: float):
        import httpx

        async with httpx.AsyncClient(timeout=httpx.Timeout(300)) as http:
            while time.monotonic() < until:
                try:
                    await self.ask(http, until)
                except httpx.HTTPError:
                    self.found["errors"] += 1

    async def ask(self, http, until: float):
        words = " ".join(self.rng.choices(WORDS, k=self.rng.randint(5, 60)))
        wanted, drop = self.rng.randint(32, 160), self.rng.random() < 0.05
        marked = self.rng.choice(self.marks) if self.rng.random() < 0.125 else None
        body = {
            "messages": [{"role": "user", "content": words}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": wanted,
            "ignore_eos": True,
            "temperature": 1.0,
        }
        if marked:
            body["logit_bias"] = {str(marked[0]): 100}
        begin, first, chunks, last, said = time.monotonic(), None, 0, "", ""
        async with http.stream("POST", f"{self.server.url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                self.found["errors"] += 1
                return
            async for line in answer.aiter_lines():
                if not line:
                    continue
                chunks += 1
                if first is None and '"role"' not in line:
                    first = time.monotonic() - begin
                if time.monotonic() < until:
                    self.found["in_time"] += '"role"' not in line
                usage = json.loads(line[6:]) if '"usage":{' in line else None
                if usage:
                    tokens = usage["usage"]["completion_tokens"]
                if marked and '"content"' in line:
                    said += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                last = line
                if drop and chunks > 10:
                    self.found["dropped"] += 1
                    return
        self.found["first"].append(first)
        self.found["requests"] += 1
        self.found["tokens"] += tokens
        mixed = marked is not None and said != marked[1] * wanted
        self.found["wrong"] += last != "data: [DONE]" or tokens != wanted or mixed


async def measure(args, folder: Path, kind: str) -> dict:
    server = Server(args, folder, *(["--max_rows", "1"] if kind == "serial" else []))
    found = {"errors": 0, "dropped": 0, "requests": 0, "tokens": 0, "wrong": 0, "in_time": 0, "first": []}
    try:
        await server.ready()
        streams = 1 if kind == "one" else args.streams
        memory = []

        async def watch(until):
            while time.monotonic() < until:
                memory.append(server.memory())
                await asyncio.sleep(1)

        before = await counted_tokens(server)
        begin = time.monotonic()
        until = begin + args.seconds
        clients = [Client(server, args.seed * 1000 + i, found).run(until) for i in range(streams)]
        at_the_end = asyncio.create_task(tokens_at(server, until))
        await asyncio.gather(watch(until), *clients)
        found["tokens_per_s"] = (await at_the_end - before) / args.seconds
        begin = time.monotonic()
        while await value(server, "minimind_rows_running") or await value(
            server, "minimind_requests_waiting"
        ):
            if time.monotonic() > begin + 30:
                found["errors"] += 1
                break
            await asyncio.sleep(0.1)
        found["seconds_to_idle"] = time.monotonic() - begin
    finally:
        found["seconds_to_stop"] = server.stop()
    first = sorted(found.pop("first"))
    found["first_p50"], found["first_p99"] = (
        first[min(int(q * len(first)), len(first) - 1)] for q in (0.5, 0.99)
    )
    third = max(len(memory) // 3, 1)
    found["memory"] = [max(memory[:third]), max(memory[third : 2 * third] or memory), max(memory[-third:])]
    return found


def speed(f: dict) -> str:
    first = f"first token after {f['first_p50']:.2f} s (p50), {f['first_p99']:.2f} s (p99)"
    return f"{f['tokens_per_s']:,.0f} tokens/s, {first}"


async def tokens_at(server: Server, when: float) -> float:
    await asyncio.sleep(when - time.monotonic())
    return await counted_tokens(server)


async def counted_tokens(server: Server) -> float:
    return await value(server, "minimind_generated_tokens_total")


async def value(server: Server, name: str) -> float:
    import httpx

    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{server.url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def main(args):
    import torch

    from scripts.bench_contenders import cpu_capability, cpu_name

    machine = {
        "name": cpu_name(),
        "cores": bench.available_cores(),
        "capability": cpu_capability(torch),
        "peaks": {},
    }
    say(f"machine    {machine['name']}, {machine['cores']} cores, {machine['capability']}")
    bench.warn_if_busy(args)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, Path(folder))
        for kind in args.only:
            found[kind] = asyncio.run(measure(args, Path(folder), kind))
            f = found[kind]
            name = KINDS[kind].format(args.streams)
            say(f"\n{name}: {f['tokens_per_s']:,.0f} tokens/s, {f['requests']} answers")
            say(f"  first token after {f['first_p50']:.2f} s (median), {f['first_p99']:.2f} s (99 %)")
            say(f"  wrong {f['wrong']}, errors {f['errors']}, dropped by the client {f['dropped']}")
            memory = ", ".join(f"{m:.2f}" for m in f["memory"])
            say(f"  memory of the server, in thirds of the time: {memory} GB")
            say(f"  idle {f['seconds_to_idle']:.1f} s after the last client")
            say(f"  ended {f['seconds_to_stop']:.1f} s after SIGTERM")
    rows = []
    for other in ("one", "serial"):
        if "load" in found and other in found:
            ratio = found["load"]["tokens_per_s"] / found[other]["tokens_per_s"]
            say(f"\n{args.streams} streams are {ratio:.2f}x {KINDS[other].format(args.streams)}")
            a, b = (f"{KINDS[kind].format(args.streams)}: {speed(found[kind])}" for kind in (other, "load"))
            rows.append(bench.ledger_row(args, a, b, f"{ratio:.2f}x", machine))
    bench.finish(args, {"found": found, "machine": machine, "rows": rows, "command": args.command_line})


if __name__ == "__main__":
    main(parse_args())
