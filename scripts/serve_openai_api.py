"""Serve models over OpenAI's interface: for openai's SDKs, LangChain, Open WebUI, FastGPT, Dify, curl.

    python scripts/serve_openai_api.py                            # the newest out/full_sft_*.pth
    python scripts/serve_openai_api.py --weight full_sft,dpo,agent
    python scripts/serve_openai_api.py --lora_weight lora_identity,lora_medical --host 0.0.0.0 --api_key KEY

    curl http://127.0.0.1:8998/v1/chat/completions -H "Content-Type: application/json" \\
         -d '{"model": "full_sft", "messages": [{"role": "user", "content": "你好"}], "stream": true}'

    POST /v1/chat/completions, /v1/completions      GET /v1/models, /health, /metrics (Prometheus), /docs

Every model that is served has a name: that of its weights, or weights:adapter. Requests without a model, or
with "minimind", get the first one. Requests of many clients run as one batch, and clients take turns. A
setting that would change the answer is honoured or refused, never ignored.
"""

import argparse
import asyncio
import hmac
import os
import re
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import eval_llm
from model.batching import Request
from scripts import serve_protocol as protocol
from scripts.serve_answers import (
    ChatAnswer,
    Served,
    TextAnswer,
    chat_deltas,
    chat_events,
    encode_chat,
    encode_text,
    error_of,
    guarded,
    guide_of,
    merged,
    text_events,
)
from scripts.serve_protocol import ChatRequest, CompletionRequest, ProtocolError, error_body, new_id, usage_of
from scripts.serve_worker import Overdue, Refused, Unanswerable, Worker
from trainer import cli
from trainer.checkpoint import CheckpointError

ALIAS = "minimind"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_args(argv=None):
    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    eval_llm.add_model_flags(parser, many=True)
    g = parser.add_argument_group("address")
    g.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 = reachable from other machines: set --api_key"
    )
    g.add_argument("--port", type=cli.count, default=8998, metavar="N", help="0 = any free one, printed")
    g.add_argument(
        "--api_key",
        action="append",
        default=[],
        metavar="KEY",
        help="only requests with this key are answered; may be given several times. Also: the environment "
        "variable MINIMIND_API_KEY, several separated by commas",
    )
    g.add_argument(
        "--cors_origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this address may ask, such as http://localhost:3000; * = all; without it none",
    )
    g = parser.add_argument_group("answers")
    g.add_argument(
        "--open_thinking",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = answers begin with thoughts where the request does not say: for weights that reason, and "
        "clients that cannot ask for it",
    )
    g = parser.add_argument_group("limits")
    g.add_argument("--num_threads", type=cli.count, default=0, metavar="N", help="CPU threads, 0 = all cores")
    g.add_argument(
        "--max_rows", type=cli.positive_int, default=32, metavar="N", help="answers written at once"
    )
    g.add_argument(
        "--max_waiting",
        type=cli.count,
        default=256,
        metavar="N",
        help="answers that may wait for one of them, for each model; more get status 429",
    )
    g.add_argument(
        "--max_tokens",
        type=cli.positive_int,
        default=2048,
        metavar="N",
        help="longest answer where the request gives none, in tokens",
    )
    g.add_argument(
        "--max_model_len",
        type=cli.positive_int,
        metavar="N",
        help="prompt and answer together, in tokens; without it the positions that the model has",
    )
    g.add_argument(
        "--cache_gb",
        type=cli.positive_float,
        default=1.0,
        metavar="GB",
        help="memory for keys and values, for each model (weights with an adapter are one of their own)",
    )
    g.add_argument(
        "--prefix_gb",
        type=cli.non_negative_float,
        default=0.25,
        metavar="GB",
        help="memory for those of finished chats, for each model: the next turn is read from where the last "
        "one ended",
    )
    g.add_argument(
        "--timeout", type=cli.positive_float, default=600.0, metavar="S", help="seconds a request may take"
    )
    g.add_argument(
        "--max_body_mb", type=cli.positive_float, default=4.0, metavar="MB", help="largest request"
    )
    g.add_argument(
        "--shutdown_seconds",
        type=cli.count,
        default=30,
        metavar="S",
        help="after Ctrl-C or SIGTERM running answers may go on for so long",
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


def load_models(args) -> dict[str, "Served"]:
    """Every combination of weights and adapters that the flags name, by name."""
    models, is_folder = {}, eval_llm.is_folder(args.load_from)
    adapters = [a for a in args.lora_weight.split(",") if a not in ("None", "none", "")]
    for weight in args.weight.split(",")[: 1 if is_folder else None]:
        for adapter in ("None", *adapters):
            wanted = argparse.Namespace(**vars(args) | {"weight": weight, "lora_weight": adapter})
            native = eval_llm.load(wanted)
            if not isinstance(native, eval_llm.Native):
                kind = eval_llm.architecture(args.load_from)
                raise CheckpointError(
                    f"{args.load_from} is a {kind}: only this project's own architecture, minimind, is served"
                )
            name = args.load_from.resolve().name if is_folder else Path(weight).stem
            name += "" if adapter == "None" else f":{adapter}"
            if name in models:
                raise CheckpointError(f"--weight names two models {name}: they need names of their own")
            models[name] = Served(name, native, args)
    return models


# ------------------------------------------------------------------------------------------------------------
# The interface
# ------------------------------------------------------------------------------------------------------------


def api_keys(args) -> list[str]:
    given = [*args.api_key, *os.environ.get("MINIMIND_API_KEY", "").split(",")]
    return [key.strip() for key in given if key.strip()]


def create_app(models: dict[str, Served], worker: Worker, args) -> FastAPI:
    keys = api_keys(args)
    errors = {
        status: {"model": protocol.ErrorResponse} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
    }

    @asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    about = "the answer; with stream: true its events"
    either = {200: {"description": about, "content": {"text/event-stream": {}}}}
    app = FastAPI(title="MiniMind", description=__doc__, lifespan=lifespan, responses=errors)

    def find(name: str | None) -> Served:
        if name in (None, "", ALIAS):
            return next(iter(models.values()))
        if name not in models:
            known = ", ".join(models)
            raise ProtocolError(
                404, f"there is no model {name[:80]!r} here; there is {known}", "model", "model_not_found"
            )
        return models[name]

    def check(served: Served, request: Request):
        try:
            served.batch.check(request)
        except ValueError as error:
            raise ProtocolError(400, str(error)) from None

    def submit(served: Served, request: Request, http: HttpRequest):
        host = http.client.host if http.client else ""
        # A key that nobody checks is no name: everybody sends the same.
        client = key_of(http.scope) if keys else host
        try:
            return worker.submit(served.name, request, client)
        except Refused as error:
            status, code = (503, "shutting_down") if worker.closing else (429, "queue_full")
            raise ProtocolError(status, str(error), None, code) from None
        except ValueError as error:
            raise ProtocolError(400, str(error)) from None

    # ---- chat ----------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions", response_model=protocol.ChatCompletion, responses=either)
    async def chat(body: ChatRequest, http: HttpRequest):
        served, thinking = find(body.model), body.thinking(bool(args.open_thinking))
        if served.is_base:
            raise ProtocolError(
                400, f"{served.name} continues text and does not chat: use /v1/completions", "model"
            )
        if body.top_logprobs and not body.logprobs:
            raise ProtocolError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        tools = body.offered()
        prompt = await asyncio.to_thread(encode_chat, served, body, tools, thinking)
        request = served.request(
            body,
            prompt,
            served.room(prompt, body.limit(), args.max_tokens),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            guide=await asyncio.to_thread(guide_of, served, body, tools, thinking),
        )
        stream = submit(served, request, http)
        answers = [ChatAnswer(served, body, thinking) for _ in range(request.sampling.num_return_sequences)]
        head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": served.name}

        def usage():
            completion, reasoning = (
                sum(getattr(a, n) for a in answers) for n in ("tokens", "reasoning_tokens")
            )
            return usage_of(len(prompt), completion, request.reused_tokens, reasoning)

        if body.stream:
            events = chat_events(stream, answers, head | {"object": "chat.completion.chunk"}, body, usage)
            return EventStream(events, [stream])
        messages = [{"role": "assistant", "content": None} for _ in answers]
        logprobs: list[list] = [[] for _ in answers]
        async with watched(http, stream):
            async for index, delta, entries in chat_deltas(stream, answers):
                for key, value in delta.items():
                    known = messages[index].get(key)
                    messages[index][key] = value if known is None else known + value
                logprobs[index] += entries
        choices = []
        for index, (answer, message) in enumerate(zip(answers, messages)):
            for call in message.get("tool_calls", ()):
                del call["index"]
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
            found = {"content": logprobs[index]} if body.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": found, "finish_reason": answer.finish_reason}
            )
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage()})

    # ---- plain text ----------------------------------------------------------------------------------------

    @app.post("/v1/completions", response_model=protocol.Completion, responses=either)
    async def complete(body: CompletionRequest, http: HttpRequest):
        served = find(body.model)
        if body.suffix:
            raise ProtocolError(400, "suffix: this model cannot fill in, only continue", "suffix")
        if body.best_of not in (None, body.n or 1):
            raise ProtocolError(400, "best_of other than n is not offered", "best_of")
        prompts = body.prompts()
        n, requests, answers = body.n or 1, [], []
        most = args.max_rows + args.max_waiting
        if len(prompts) * n > most:
            raise ProtocolError(400, f"more than {most} answers are asked for in one request", "prompt")
        for text in prompts:
            prompt = await asyncio.to_thread(encode_text, served, text)
            limit = 1 if body.max_tokens == 0 else body.limit()  # for none one is drawn, and not sent
            request = served.request(
                body,
                prompt,
                served.room(prompt, limit, 16),
                top_logprobs=body.logprobs,
                score_prompt=bool(body.echo) and body.logprobs is not None,
            )
            requests.append(request)
            check(served, request)  # before decoding, which wants ids that exist
            text = text if isinstance(text, str) or not body.echo else served.tokenizer.decode(prompt)
            answers += [TextAnswer(served, body, request, text) for _ in range(n)]
        streams = []
        try:
            for request in requests:
                streams.append(submit(served, request, http))
        except ProtocolError:
            for stream in streams:
                stream.cancel()
            raise
        head = {
            "id": new_id("cmpl"),
            "created": int(time.time()),
            "model": served.name,
            "object": "text_completion",
        }

        def usage():
            prompt = sum(len(request.prompt) for request in requests)
            cached = sum(request.reused_tokens for request in requests)
            return usage_of(prompt, sum(answer.tokens for answer in answers), cached)

        async def pieces():
            async for number, news in merged(streams):
                for new in news:
                    index = number * n + new.sample
                    yield index, *answers[index].put(new), answers[index].finish_reason

        if body.stream:
            return EventStream(text_events(pieces(), head, body, usage), streams)
        choices = [
            {"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(len(answers))
        ]
        async with watched(http, *streams):
            async for index, text, logprobs, finish_reason in pieces():
                choice = choices[index]
                choice["text"] += text
                choice["finish_reason"] = finish_reason
                if logprobs and choice["logprobs"]:
                    for key, values in logprobs.items():
                        choice["logprobs"][key] += values
                elif logprobs:
                    choice["logprobs"] = logprobs
        return JSONResponse(head | {"choices": choices, "usage": usage()})

    # ---- about ---------------------------------------------------------------------------------------------

    def card(served: Served) -> dict:
        return protocol.Model(
            id=served.name, created=served.created, max_model_len=served.max_len
        ).model_dump()

    @app.get("/v1/models", response_model=protocol.ModelList)
    async def list_models():
        return {"object": "list", "data": [card(served) for served in models.values()]}

    @app.get("/v1/models/{name}", response_model=protocol.Model)
    async def one_model(name: str):
        return card(find(name))

    @app.get("/health")
    async def health():
        if not worker.thread.is_alive():
            raise ProtocolError(503, "the thread that computes has ended")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # ---- what goes wrong -----------------------------------------------------------------------------------

    @app.exception_handler(ProtocolError)
    async def refused(_, error: ProtocolError):
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError):
        text, where = complaint(error.errors())
        return JSONResponse(error_body(400, text, where), 400)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException):
        text = f"{http.method} {http.url.path[:100]}: {error.detail}"
        return JSONResponse(error_body(error.status_code, text), error.status_code, error.headers)

    @app.exception_handler(Overdue)
    @app.exception_handler(Refused)
    @app.exception_handler(Unanswerable)
    async def failed(_, error):
        body = error_of(error)
        return JSONResponse(body.body(), body.status)

    local = args.host in LOOPBACK and not keys
    app.add_middleware(Gate, limit=int(args.max_body_mb * 2**20), local=local, keys=keys)
    if args.cors_origin:  # outermost: a page may read what the gate says, too
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=args.cors_origin, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def complaint(errors: list[dict]) -> tuple[str, str | None]:
    """(what is wrong with the first wrong field, its name). Of a field that may have several forms, what is
    wrong with each."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} (character {first['loc'][-1]})", None
    if first["type"] == "unknown_field":
        parts = [*named(first["loc"]), first["ctx"]["field"]]
    else:
        parts = named(first["loc"])
    where = ".".join(parts)[:100]
    field = named(first["loc"])[:1]
    what = dict.fromkeys(error["msg"] for error in errors if named(error["loc"])[:1] == field)
    text = "; or: ".join(list(what)[:4])
    return (f"{where}: {text}", where) if where else (text, None)


def named(loc) -> list[str]:
    """Of a place in a request, fields and numbers; not pydantic's names for the forms of a field."""
    forms = ("body", "str", "int", "float", "bool", "dict")
    return [str(part) for part in loc if part not in forms and re.fullmatch(r"[a-z_]+|\d+", str(part))][:6]


# ------------------------------------------------------------------------------------------------------------
# Connections
# ------------------------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends it, also before the first event, gives its requests up."""

    def __init__(self, events, streams: list):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(guarded(events), media_type="text/event-stream", headers=headers)
        self.streams = streams

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self.streams:
                stream.cancel()


@asynccontextmanager
async def watched(http: HttpRequest, *streams):
    """While somebody waits for a whole answer: when they hang up, the answer is given up."""

    async def watch():
        while not await http.is_disconnected():
            await asyncio.sleep(0.25)
        for stream in streams:
            stream.cancel()
            stream.deliver([], True, Overdue("the client hung up"))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


def key_of(scope) -> str:
    """The API key of a request, "" without one."""
    given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    scheme, _, key = given.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


class Gate:
    """What is checked before the app sees a request (ASGI middleware): its key, and its size, before it is in
    memory; and for a server that listens on this machine alone, the name it was asked by. Else a web page
    could have its own name point to 127.0.0.1, and read what the server says (DNS rebinding)."""

    LOCAL = {"localhost", "127.0.0.1", "[::1]", "host.docker.internal"}

    def __init__(self, app, limit: int, local: bool, keys: list[str]):
        self.app, self.limit, self.local = app, limit, local
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        name = headers.get(b"host", b"localhost").decode("latin-1").lower()
        name = name[: name.rfind(":")] if ":" in name and not name.endswith("]") else name
        if self.local and name not in self.LOCAL and not name.endswith(".localhost"):
            text = f"this server answers on this machine only, not as {name[:80]}: see --host"
            return await JSONResponse(error_body(403, text), 403)(scope, receive, send)
        if self.keys and scope["path"].startswith("/v1/"):
            given = key_of(scope).encode()
            if not any([hmac.compare_digest(given, key) for key in self.keys]):
                text = "this server wants an API key, and this is none of its keys"
                body = error_body(401, text, None, "invalid_api_key")
                return await JSONResponse(body, 401)(scope, receive, send)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return await self.refuse(scope, receive, send)
        seen, answered = 0, False

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise TooLarge
            return message

        async def noted(message):
            nonlocal answered
            if seen <= self.limit:  # else the app answers that it could not read the body: we know better
                answered = True
                await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            pass
        except Exception as error:  # caught here, the connection stays; further out it would be closed
            if answered:
                raise
            body = error_of(error)
            await JSONResponse(body.body(), body.status)(scope, receive, noted)
        if seen > self.limit and not answered:
            await self.refuse(scope, receive, send)

    async def refuse(self, scope, receive, send):
        text = f"the request is larger than {self.limit / 2**20:g} MB"
        await JSONResponse(error_body(413, text, None, "request_too_large"), 413)(scope, receive, send)


class TooLarge(Exception):
    pass


class Server(uvicorn.Server):
    """Ctrl-C and SIGTERM: what runs may finish, within --shutdown_seconds; what waits is refused; a second
    one ends at once. The process ends with 0."""

    def __init__(self, config, worker: Worker):
        self.seconds = config.timeout_graceful_shutdown or 0
        config.timeout_graceful_shutdown = self.seconds + 10  # the worker ends them; this is for the network
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig, frame):
        self.force_exit = self.should_exit
        self.should_exit = True
        self.worker.close(self.seconds)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises CheckpointError when the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family)
        # asyncio sends small answers at once (TCP_NODELAY) only where a socket says that it is one of TCP:
        # without it, each waits 40 ms for the other side's acknowledgement.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=made.detach())
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot listen on {host}, port {port} ({reason}): see --host, --port"
        ) from None


def main(args):

    from trainer import runtime

    config = uvicorn.Config(
        "",
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=args.shutdown_seconds,
        access_log=False,
    )
    address = listen(args.host, args.port)  # before the long work: the port may be taken
    runtime.set_threads(args.num_threads, runtime.choose_device(args.device))
    models = load_models(args)
    worker = Worker({name: served.batch for name, served in models.items()}, args.max_waiting, args.timeout)
    config.app = create_app(models, worker, args)
    if args.host not in LOOPBACK and not api_keys(args):
        eval_llm.say(f"warning: anybody who reaches {args.host} can use this server: set --api_key")
    shown = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    eval_llm.say(f"serving {', '.join(models)} at http://{shown}:{address.getsockname()[1]}/v1")
    Server(config, worker).run(sockets=[address])


if __name__ == "__main__":
    cli.run(main, parse_args)
