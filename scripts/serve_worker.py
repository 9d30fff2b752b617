"""The thread that computes: it steps the running batches and hands tokens to the requests that wait for them.

    worker = Worker({"full_sft": batch}, max_waiting=256, timeout=600)
    worker.start()
    stream = worker.submit("full_sft", request, client="10.0.0.7")      # in an event loop
    async for new in stream: ...                                        # News, one per token

Clients take turns: of those that wait, the one that was served longest ago comes next, however many requests
another one has sent.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from model.batching import Batch, News, Request

log = logging.getLogger("minimind")

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Refused(Exception):
    """Not now: too many wait, or the server ends."""


class Overdue(Exception):
    """The time for a request is over."""


class Unanswerable(Exception):
    """What was asked for turned out to be impossible on the way."""


class Metrics:
    """What /metrics shows (Prometheus)."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        by_model = {"labelnames": ["model"], "registry": registry}
        self.requests = Counter(
            "minimind_requests", "requests by how they ended", ["model", "ended"], registry=registry
        )
        self.prompt_tokens = Counter("minimind_prompt_tokens", "tokens of prompts", **by_model)
        self.cached_tokens = Counter(
            "minimind_cached_tokens", "of these, tokens that did not have to be read again", **by_model
        )
        self.tokens = Counter("minimind_generated_tokens", "tokens of answers", **by_model)
        self.running = Gauge("minimind_rows_running", "answers that are being written", **by_model)
        self.waiting = Gauge("minimind_requests_waiting", "requests that wait for a place", **by_model)
        self.first = Histogram(
            "minimind_first_token_seconds", "from request to first token", buckets=SECONDS, **by_model
        )
        self.whole = Histogram(
            "minimind_request_seconds", "from request to last token", buckets=SECONDS, **by_model
        )


class Stream:
    """The tokens of one request, as they come: `async for news in stream` gives lists of News."""

    def __init__(self, worker: "Worker", model: str, request: Request, client: str, seconds: float):
        self.worker, self.model, self.request, self.client = worker, model, request, client
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Event()
        self.news: list[News] = []
        self.error: Exception | None = None
        self.closed = False
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.left = request.sampling.num_return_sequences  # answers that are not finished
        self.has_begun = False

    def deliver(self, news: list[News], closed: bool = False, error: Exception | None = None):
        """In the event loop."""
        if closed and not self.closed:
            self.worker.open[self.model] -= self.request.sampling.num_return_sequences
        self.news += news
        self.closed, self.error = self.closed or closed, self.error or error
        self.arrived.set()

    def __aiter__(self) -> AsyncIterator[list[News]]:
        return self

    async def __anext__(self) -> list[News]:
        """Raises what the worker ran into, after the tokens before it."""
        await self.arrived.wait()
        news, self.news = self.news, []
        if news:
            if not self.closed:
                self.arrived.clear()
            return news
        if self.error:
            raise self.error
        raise StopAsyncIteration

    def cancel(self):
        """Nobody listens any more: its place becomes free with the next step."""
        if not self.closed:
            self.request.cancelled = True
            self.worker.nudge()


class Worker:
    """Gives requests to the batches in turn, steps these, and delivers their tokens.

    Args:
        batches: by name of the model.
        max_waiting: answers that may wait for a row, for each model; one more is refused.
        timeout: seconds a request may take, waiting included.
    """

    def __init__(self, batches: dict[str, Batch], max_waiting: int = 256, timeout: float = 600):
        self.batches, self.max_waiting, self.timeout = batches, max_waiting, timeout
        self.metrics = Metrics()
        self.inbox: deque[Stream] = deque()
        self.queues: dict[str, OrderedDict[str, deque[Stream]]] = {name: OrderedDict() for name in batches}
        self.in_line = {name: 0 for name in batches}  # how many of them wait
        self.streams: dict[Request, Stream] = {}  # given to a batch, or waiting
        self.open = {name: 0 for name in batches}  # answers that were asked for and are not given yet
        self.change, self.stopping, self.closing = threading.Condition(), False, False
        self.deadline = float("inf")  # when what still runs has to end
        self.threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self.run, name="worker", daemon=True)

    # ---- from the event loop ------------------------------------------------------------------------------

    def start(self):
        self.thread.start()

    def close(self, seconds: float = float("inf")):
        """No more requests. Those that have not begun end; those that run may go on for so many seconds. May
        be called from a signal handler."""
        self.deadline = time.monotonic() + seconds
        self.closing = True

    def stop(self):
        self.stopping = True
        self.nudge()
        self.thread.join()

    def nudge(self):
        with self.change:
            self.change.notify()

    @property
    def num_waiting(self) -> int:
        return len(self.inbox) + sum(self.in_line.values())

    def submit(self, model: str, request: Request, client: str) -> Stream:
        """Raises Refused when too many wait, ValueError when it could never be answered."""
        self.batches[model].check(request)
        if self.closing or not self.thread.is_alive():
            raise Refused("the server is shutting down")
        answers = request.sampling.num_return_sequences
        if self.open[model] + answers > self.batches[model].max_rows + self.max_waiting:
            raise Refused("too many requests wait already: try again later")
        self.open[model] += answers
        stream = Stream(self, model, request, client, self.timeout)
        self.inbox.append(stream)
        self.nudge()
        return stream

    # ---- in the worker's thread ---------------------------------------------------------------------------

    def run(self):
        torch.set_num_threads(self.threads)  # a thread starts with torch's own choice
        while not self.stopping:
            with self.change:
                while not (self.stopping or self.inbox or self.streams):
                    self.change.wait()
            try:
                self.turn()
            except Exception as error:  # outside a step. Without this thread all would wait for ever.
                log.exception("the worker failed")
                for batch in self.batches.values():
                    batch.reset()
                self.queues = {name: OrderedDict() for name in self.batches}
                for stream in list(self.streams.values()):
                    self.end(stream, "error", error)

    def turn(self):
        self.sort_inbox()
        self.end_overdue()
        for name, batch in self.batches.items():
            self.feed(name, batch)
            self.count_waiting(name, batch)
            if batch.busy:
                self.step(name, batch)
            self.metrics.running.labels(name).set(len(batch.rows))

    def sort_inbox(self):
        while self.inbox:
            stream = self.inbox.popleft()
            self.streams[stream.request] = stream
            self.queues[stream.model].setdefault(stream.client, deque()).append(stream)

    def count_waiting(self, name: str, batch: Batch):
        self.in_line[name] = sum(map(len, self.queues[name].values())) + len(batch.waiting)
        self.metrics.waiting.labels(name).set(self.in_line[name])

    def end_overdue(self):
        now, before = time.monotonic(), len(self.streams)
        for stream in list(self.streams.values()):
            if stream.request.error:
                log.error("%s: a guide failed: %s", stream.model, stream.request.error)
                self.end(stream, "error", Unanswerable(str(stream.request.error)))
            elif stream.request.cancelled:
                self.end(stream, "cancelled", None)
            elif self.closing and (not stream.has_begun or now > self.deadline):
                self.end(stream, "refused", Refused("the server is shutting down"))
            elif now > stream.deadline:
                self.end(stream, "timeout", Overdue(f"no complete answer within {self.timeout:g} seconds"))
        if len(self.streams) < before:
            for queues in self.queues.values():
                for client, queue in list(queues.items()):
                    alive = deque(stream for stream in queue if not stream.request.cancelled)
                    queues[client] = alive
                    if not alive:
                        del queues[client]

    def feed(self, name: str, batch: Batch):
        """The next requests in turn, as many as there are places for and can be read soon."""
        queues = self.queues[name]
        while queues and self.wants(batch):
            client, queue = queues.popitem(last=False)
            stream = queue.popleft()
            if queue:
                queues[client] = queue  # to the end of the line
            batch.add(stream.request)

    def wants(self, batch: Batch) -> bool:
        if not batch.waiting:
            return True
        tokens = sum(len(request.prompt) for request in batch.waiting)
        rows = len(batch.rows) + sum(r.sampling.num_return_sequences for r in batch.waiting)
        return tokens < batch.prefill_tokens and rows < batch.max_rows

    def step(self, name: str, batch: Batch):
        try:
            news = batch.step(hurry=any(other.rows for other in self.batches.values()))
        except Exception as error:  # out of memory, say: its requests end, the server goes on
            log.exception("a step of %s failed", name)
            batch.reset()
            for stream in [s for s in self.streams.values() if s.model == name]:
                if stream not in self.queues[name].get(stream.client, ()):
                    self.end(stream, "error", error)
            return
        by_stream: dict[Stream, list[News]] = {}
        for new in news:
            by_stream.setdefault(self.streams[new.request], []).append(new)
        self.metrics.tokens.labels(name).inc(len(news))
        now = time.monotonic()
        for stream, part in by_stream.items():
            if not stream.has_begun:
                stream.has_begun = True
                self.metrics.first.labels(name).observe(now - stream.begin)
                self.metrics.prompt_tokens.labels(name).inc(len(stream.request.prompt))
                self.metrics.cached_tokens.labels(name).inc(stream.request.reused_tokens)
            stream.left -= sum(new.finish_reason is not None for new in part)
            if stream.left:
                self.hand_over(stream, part)
            else:
                self.end(stream, "done", None, part)

    def end(self, stream: Stream, how: str, error: Exception | None, news: list[News] = ()):
        self.streams.pop(stream.request, None)
        stream.request.cancelled = True  # whatever is left of it
        self.metrics.requests.labels(stream.model, how).inc()
        self.metrics.whole.labels(stream.model).observe(time.monotonic() - stream.begin)
        self.hand_over(stream, list(news), True, error)

    def hand_over(self, stream: Stream, *what):
        try:
            stream.loop.call_soon_threadsafe(stream.deliver, *what)
        except RuntimeError:  # the loop was closed: nobody is there
            stream.request.cancelled = True
