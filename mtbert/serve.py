"""A trained run as a small HTTP service: /predict, /embed, /healthz, and /openapi.json with the details.

    requests ──▶ limits, types ──▶ one queue ──▶ everything that waits, as one packed batch per task ──▶ answers

While the model works on a batch, the next requests gather: batches grow with the load, and nobody waits for a timer.
The model lives in one thread, so an answer is the one that `predict` gives. Names and texts from outside are only ever
compared and tokenised; none becomes a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import h11
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field
from uvicorn.protocols.http.h11_impl import H11Protocol

from mtbert import __version__
from mtbert.errors import UserError
from mtbert.predict import answer_texts, embed_texts
from mtbert.readers import no_character, no_text
from mtbert.trained import Trained

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Texts = Sequence[Sequence[str]]

BATCH_INPUTS = 512
"""Inputs that the model takes at once, unless one request alone has more."""
BODY_SECONDS = 30.0
"""For the head of a request, for its body, and for reading the answer."""
STOP_SECONDS = 10
"""After SIGTERM, for the requests that are in flight; what is not answered by then is turned away."""
STOPS = "the service is stopping"
MAX_WHERE = 100
"""Characters of a refusal that say where in the body."""
DRAINED_BODIES = 64
"""A body that is too large is read to its end and thrown away, up to so many times the limit: a client that is still
sending would not see the answer."""


@dataclass(frozen=True)
class Limits:
    body: int = 2**20  # bytes
    batch: int = 64  # inputs of a request
    characters: int = 10_000  # of a text
    waiting: int = 4096  # inputs in the queue; more are turned away with 503


# ------------------------------------------------------------------------------------------------ requests


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictRequest(_Body):
    task: str = Field(description="one of the tasks that /healthz lists", examples=["sst"])
    inputs: Annotated[list[str | tuple[str, str] | tuple[str, str, str]], FailFast()] = Field(
        description="texts, or pairs or triplets of texts as the task has them",
        examples=[["A fine film."], [["One.", "Two."]]],
    )


class Prediction(BaseModel):
    prediction: int | float | str = Field(
        description="class number (or its name where the task has names), or value within the task's range"
    )
    score: float = Field(
        description="as the head gives it: logit (with loss bce that of class 1), cosine, or value before it is clamped"
    )
    probability: Annotated[float | None, Field(description="of the predicted class, where there is such a thing")]


class PredictResponse(BaseModel):
    task: str
    predictions: list[Prediction] = Field(description="in the order of the inputs")


class EmbedRequest(_Body):
    inputs: Annotated[list[str], FailFast()] = Field(description="texts", examples=[["A sentence."]])


class EmbedResponse(BaseModel):
    vectors: list[list[float]] = Field(description="one per text, in their order; float32")


class Refusal(BaseModel):
    detail: str = Field(description="what was wrong, and where")


class Health(BaseModel):
    status: str
    run: str
    step: int
    tasks: dict[str, str] = Field(description="name → kind")
    waiting: int = Field(description="inputs in the queue")


# ------------------------------------------------------------------------------------------------ batching


@dataclass(eq=False)
class _Job:
    task: str | None  # None: vectors
    texts: Texts
    done: asyncio.Future[list[Any]]


class Batcher:
    """Gathers what is asked while the model works, and answers it together."""

    def __init__(self, run: Trained, waiting: int) -> None:
        self._run = run
        self._limit = waiting
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self.waiting = 0

    async def ask(self, task: str | None, texts: Texts, receive: Receive) -> list[Any]:
        """Answers to (of task None: vectors of) the texts; None for one without a wordpiece.

        Args:
            receive: of a request whose body has come; once its client has gone, the texts make room for others.
        """
        if self.waiting and self.waiting + len(texts) > self._limit:  # nobody waits: one of any size is welcome
            raise HTTPException(503, "too many inputs are waiting; try again in a moment", {"Retry-After": "1"})
        job = _Job(task, texts, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(texts)
        self._wake.set()
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((job.done, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            raise HTTPException(503, STOPS) from None
        finally:
            gone.cancel()
            if job in self._jobs:
                self._jobs.remove(job)
                self.waiting -= len(texts)
        if not job.done.done():
            job.done.cancel()
            raise HTTPException(499, "the client has gone")  # which nobody reads
        return job.done.result()

    async def work(self) -> None:
        """Runs for as long as the service does."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as pool:
            while True:
                await self._wake.wait()
                jobs = self._take()
                results = await loop.run_in_executor(pool, self._answer, jobs)
                for job, result in zip(jobs, results, strict=True):
                    if job.done.cancelled():  # the client has gone
                        continue
                    if isinstance(result, Exception):
                        job.done.set_exception(result)
                    else:
                        job.done.set_result(result)

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        taken = 0
        while self._jobs and (not jobs or taken + len(self._jobs[0].texts) <= BATCH_INPUTS):
            job = self._jobs.popleft()
            self.waiting -= len(job.texts)
            jobs.append(job)
            taken += len(job.texts)
        if not self._jobs:
            self._wake.clear()
        return jobs

    def _answer(self, jobs: list[_Job]) -> list[list[Any] | Exception]:
        """In the model's thread: all jobs of a task together."""
        results: list[list[Any] | Exception] = [[] for _ in jobs]
        for task in dict.fromkeys(job.task for job in jobs):
            mine = [at for at, job in enumerate(jobs) if job.task == task]
            texts = [text for at in mine for text in jobs[at].texts]
            try:
                found = iter(embed_texts(self._run, texts) if task is None else answer_texts(self._run, task, texts))
                for at in mine:
                    results[at] = [next(found) for _ in jobs[at].texts]
            except Exception as error:  # must reach the clients that wait, and not end the service
                for at in mine:
                    results[at] = error
        return results


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ------------------------------------------------------------------------------------------------ the service


def make_app(run: Trained, limits: Limits) -> FastAPI:
    batcher = Batcher(run, limits.waiting)
    name = run.run_dir.resolve().name

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batcher.work())
        yield
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    refusals: dict[int | str, dict[str, Any]] = {code: {"model": Refusal} for code in (413, 422, 503)}
    app = FastAPI(title=f"mtbert: {name}", version=__version__, lifespan=lifespan, responses=refusals)
    app.add_middleware(BodyLimit, limit=limits.body)

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        """One line, without the input: it may be long, and private."""
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])  # ends with a key that the client chose
        where = " ".join(where.split())[:MAX_WHERE]
        return JSONResponse({"detail": f"{where}: {first['msg']}" if where else first["msg"]}, 422)

    def check(texts: Texts) -> None:
        if not 1 <= len(texts) <= limits.batch:
            raise HTTPException(422, f"inputs: {len(texts)} of them; a request takes 1 to {limits.batch}")
        for number, pair in enumerate(texts):
            for text in pair:
                if why := no_text(text) or no_character(text):
                    raise HTTPException(422, f"inputs.{number}: {why}")
                if len(text) > limits.characters:
                    raise HTTPException(
                        422, f"inputs.{number}: {len(text):,} characters; a text may have {limits.characters:,}"
                    )

    async def ask(task: str | None, texts: Texts, request: Request) -> list[Any]:
        check(texts)
        answers = await batcher.ask(task, texts, request.receive)
        for number, answer in enumerate(answers):
            if answer is None:
                raise HTTPException(422, f"inputs.{number}: nothing in the text is a wordpiece")
        return answers

    @app.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> PredictResponse:
        """The task's answer to each input."""
        if body.task not in run.config.tasks:
            raise HTTPException(422, f"task: there is no such task; this run has {', '.join(run.config.tasks)}")
        texts = [[each] if isinstance(each, str) else list(each) for each in body.inputs]
        wanted = len(run.config.tasks[body.task].columns.text)
        for number, pair in enumerate(texts):
            if len(pair) != wanted:
                right = {1: "a text", 2: "a pair of texts", 3: "a text, its match and a hard negative"}[wanted]
                raise HTTPException(422, f"inputs.{number}: task {body.task} takes {right}")
        answers = await ask(body.task, texts, request)
        fields = [dict(zip(("prediction", "score", "probability"), answer, strict=True)) for answer in answers]
        return PredictResponse(task=body.task, predictions=[Prediction(**each) for each in fields])

    @app.post("/embed")
    async def embed(body: EmbedRequest, request: Request) -> EmbedResponse:
        """The sentence vector of each text, pooled as in training."""
        vectors = await ask(None, [[text] for text in body.inputs], request)
        return EmbedResponse(vectors=[vector.tolist() for vector in vectors])

    @app.get("/healthz")
    async def healthz() -> Health:
        kinds = {name: task.kind for name, task in run.config.tasks.items()}
        return Health(status="ok", run=name, step=run.step, tasks=kinds, waiting=batcher.waiting)

    return app


class BodyLimit:
    """Reads a request's body before anything else does: 413 when it is too large, 408 when it does not come."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            await _refuse(send, 408, f"the body did not come within {BODY_SECONDS:g} seconds")
            return
        except asyncio.CancelledError:
            await _refuse(send, 503, STOPS)
            return
        except ConnectionError:
            return
        if body is None:
            await _refuse(send, 413, f"the body is larger than {self.limit:,} bytes; send fewer inputs at a time")
            return
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return rest.pop() if rest else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """None where it is too large."""
        body, size, more = bytearray(), 0, True
        while more and size <= self.limit * DRAINED_BODIES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            size += len(message.get("body", b""))
            if size <= self.limit:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body) if size <= self.limit else None


async def _refuse(send: Send, status: int, detail: str) -> None:
    content = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})


def serve(run: Trained, host: str, port: int, limits: Limits) -> None:
    """Answer until SIGINT or SIGTERM. Port 0 takes a free one. Raises `UserError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that can be none, such as a..b
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None
    with listening:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"mtbert: http://{shown}:{listening.getsockname()[1]}  (try /docs; Ctrl-C ends it)", flush=True)
        make_server(run, limits).run(sockets=[listening])


class Impatient(H11Protocol):
    """uvicorn's protocol, which waits for ever for the head of a request and for a client that reads no answer."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            transport.abort()
        else:
            self._head = self.loop.call_later(BODY_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        _forget(self._head, self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the body has its own limit
            _forget(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(BODY_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_the_answer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_the_answer()

    def _watch_the_answer(self) -> None:
        """Whether it is read at all; slowly is well."""
        left = self.transport.get_write_buffer_size()
        if left and self._unread is None:
            self._unread = self.loop.call_later(BODY_SECONDS, self._has_been_read, left)

    def _has_been_read(self, left: int) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() >= left:
            self.transport.abort()
        else:
            self._watch_the_answer()


def _forget(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


def max_connections() -> int:
    """At once: half of the files that this process may open, so that no number of silent clients takes all."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else max(64, files // 2)


def make_server(run: Trained, limits: Limits) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            make_app(run, limits),
            http=Impatient,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )
