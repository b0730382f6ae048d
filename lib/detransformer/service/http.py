"""A session behind HTTP: one path for the model's task, and /health and /metrics.

Every answer but a metric is JSON; every refusal is `{"error": sentence}`. Who asks shows a token (`Authorization:
Bearer`), bodies are limited in size, each field is checked, and a full queue refuses with 503 and Retry-After.
"""

import asyncio
import math
import secrets
from collections.abc import Callable
from typing import Annotated

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

from detransformer import __version__, answers
from detransformer.models.configuration import generates
from detransformer.opening import has_tokenizer
from detransformer.service.bodies import Answer, Classify, Continuation, Generate, Health, Label, Problem, Span
from detransformer.service.session import Session
from detransformer.service.waiting import Expired, QueueFull, Unanswered

MAX_BODY_BYTES = 2**17
HEAD_S, BODY_S = 10.0, 10.0  # for each to come
UNANSWERED_RETRY_S = 5
PATHS = {"classification": "/classify", "question-answering": "/answer"}  # of `answers.TASKS`; a GPT-2 has /generate


class Impatient(H11Protocol):
    """Closes connections over which the head of a request does not come: who held many would keep others out."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forgive()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forgive()  # it has come, and is being answered
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_S, self.transport.close)

    def _forgive(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class SizeLimit:
    """Refuses bodies of more than `limit` bytes, by what is announced and by what comes, and those that come slowly."""

    def __init__(self, app: Callable, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.limit:
            return await self._refuse(scope, receive, send)
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_S):
                while more:  # whole, before anything reads it: it is small
                    message: Message = await receive()
                    if message["type"] != "http.request":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > self.limit:
                        return await self._refuse(scope, receive, send)
        except TimeoutError:
            return await problem(408, f"the body did not come within {BODY_S:g} s.")(scope, receive, send)
        whole = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

        async def replay() -> Message:
            return next(whole, None) or await receive()

        return await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        sentence = f"a body has {self.limit} bytes at most; send less at once."
        await problem(413, sentence)(scope, receive, send)


def problem(status: int, sentence: str, **headers: str) -> JSONResponse:
    """The answer to a request that is refused."""
    return JSONResponse({"error": sentence}, status, {name.replace("_", "-"): text for name, text in headers.items()})


REFUSALS = {
    400: "the body is no JSON",
    401: "no token, or another one",
    405: "another method",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "a field is missing, unknown or out of range, or the model does not take the input",
    503: "the queue is full, or all attempts broke off: ask again after Retry-After seconds",
    504: "no answer by the deadline",
}


def build_app(session: Session, token: str) -> FastAPI:
    """The application over a session that has been entered. `token` is what who asks must show."""
    responses = {status: {"model": Problem, "description": words} for status, words in REFUSALS.items()}
    app = FastAPI(title="DeTransformer", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(SizeLimit, limit=MAX_BODY_BYTES)
    bearer = HTTPBearer(auto_error=False)

    def is_token(given: str) -> bool:
        return secrets.compare_digest(given.encode(), token.encode())

    def check_token(shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not is_token(shown.credentials if shown else ""):
            raise HTTPException(401, "show the token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"})

    guarded = {"dependencies": [Depends(check_token)], "responses": responses}
    _add_task(app, session, guarded)

    unready = {503: {"model": Health}, 405: responses[405]}

    @app.get("/health", response_model=Health, response_model_exclude_none=True, responses=unready)
    def health(request: Request, response: Response) -> Health:
        """Whether the devices serve, and, with the token, which."""
        response.status_code = 200 if session.serving else 503
        status = "serving" if session.serving else "recovering"
        if not is_token(request.headers.get("Authorization", "").removeprefix("Bearer ")):
            return Health(status=status)  # what watches a service has no token
        names = [session.spec.names[device] for device in session.present]
        event = session.events[-1].sentence if session.events else ""
        model = session.model.rstrip("/").rpartition("/")[2]
        return Health(status=status, devices=names, waiting=session.num_waiting, model=model, last_event=event)

    registry = CollectorRegistry()
    registry.register(Collected(session))

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(check_token)])
    def metrics() -> PlainTextResponse:
        """Counts and seconds, as Prometheus reads them."""
        return PlainTextResponse(generate_latest(registry).decode(), media_type="text/plain; version=0.0.4")

    metrics_route = app.routes[-1]
    metrics_route.responses = {status: responses[status] for status in (401, 405)}
    _add_handlers(app)
    return app


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn is to serve `app`."""
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, http=Impatient)


def path_of(model: str, config: PretrainedConfig) -> str:
    """The path at which the model in this folder is asked.

    Raises:
        ValueError: for one without a head that this server knows.
    """
    if generates(config):
        return "/generate"
    task = answers.task_of(config)
    if task not in PATHS:
        named = ", ".join(config.architectures or ["no class is named"])
        raise ValueError(
            f"{model} has no head to answer with ({named}): serve a classifier, a model that answers questions, or a "
            "GPT-2."
        )
    return PATHS[task]


def _add_task(app: FastAPI, session: Session, guarded: dict) -> None:
    """The one path of what the model does."""
    tokenizer = answers.tokenizer_of(session.model, session.config) if has_tokenizer(session.model) else None
    config = session.config
    path = path_of(session.model, config)
    if path == "/generate":

        @app.post(path, response_model=Continuation, **guarded)
        async def generate(body: Generate) -> Continuation:
            """Goes on with a text, greedily."""
            inputs = encode(config, tokenizer, body.text, None, body.input_ids)
            outputs = await ask(session, inputs, body.deadline_s, max_new_tokens=body.max_new_tokens)
            tokens = answers.until_end(outputs["tokens"][0].tolist(), config)
            return Continuation(text=tokenizer.decode(tokens) if tokenizer else None, tokens=tokens)

    elif path == "/classify":

        @app.post(path, response_model=Label, **guarded)
        async def classify(body: Classify) -> Label:
            """The label of a text."""
            inputs = encode(config, tokenizer, body.text, body.text_pair, body.input_ids)
            outputs = await ask(session, inputs, body.deadline_s)
            _, fields = answers.classify(config, inputs, outputs, None)
            return Label(**{name: fields[name] for name in Label.model_fields})

    else:

        @app.post(path, response_model=Span, **guarded)
        async def answer(body: Answer) -> Span:
            """Where a passage answers a question."""
            inputs = encode(config, tokenizer, body.question, body.passage, body.input_ids)
            outputs = await ask(session, inputs, body.deadline_s)
            asked = answers.Text(tokenizer, body.question, body.passage) if body.passage else None
            _, fields = answers.find_answer(config, inputs, outputs, asked)
            return Span(answer=fields["answer"], start=fields["start"], end=fields["end"])


def encode(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | None,
    pair: str | None,
    input_ids: list[int] | None,
) -> dict[str, torch.Tensor]:
    """Tensors [1, T] by name.

    Raises:
        HTTPException: 422 for a text where the model's folder has no tokenizer, or one that has no tokens.
    """
    if input_ids is not None:
        return {"input_ids": torch.tensor([input_ids])}
    if tokenizer is None:
        raise HTTPException(422, "the model's folder has no tokenizer: give input_ids.")
    inputs = answers.encode(config, tokenizer, text, pair)
    if not inputs["input_ids"].numel():
        raise HTTPException(422, "the text has no tokens.")
    return inputs


async def ask(session: Session, inputs: dict[str, torch.Tensor], deadline_s: float, **options: int) -> dict:
    """The session's outputs. Raises what `_add_handlers` turns into an answer."""
    future = asyncio.wrap_future(session.submit(inputs, deadline_s, **options))
    try:
        return await asyncio.wait_for(future, deadline_s + 1)
    except TimeoutError:
        raise Expired("no answer by the deadline.") from None


def _add_handlers(app: FastAPI) -> None:
    paths = sorted({route.path for route in app.routes if route.path not in ("/openapi.json",)})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body") or "body"
        if found["type"] == "json_invalid":
            return problem(422, f"the body is no JSON ({found['ctx']['error']}).")
        return problem(422, f"{where}: {found['msg'].removeprefix('Value error, ')}.")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        sentence = error.detail
        if error.status_code == 404:
            sentence = f"there is no such path; this server has {', '.join(paths)}."
        headers = {name: text for name, text in (error.headers or {}).items()}
        return JSONResponse({"error": sentence}, error.status_code, headers)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return problem(503, str(error), Retry_After=str(math.ceil(error.retry_after_s)))

    @app.exception_handler(Unanswered)
    async def unanswered(request: Request, error: Unanswered) -> JSONResponse:
        return problem(503, str(error), Retry_After=str(UNANSWERED_RETRY_S))

    @app.exception_handler(Expired)
    async def expired(request: Request, error: Expired) -> JSONResponse:
        return problem(504, str(error))

    @app.exception_handler(ValueError)
    async def not_taken(request: Request, error: ValueError) -> JSONResponse:
        return problem(422, str(error))


class Collected:
    """A session's counts, for Prometheus."""

    def __init__(self, session: Session):
        self.session = session

    def collect(self):
        session, kept = self.session, list(self.session.seconds)
        for name in ("accepted", "answered", "refused", "expired", "unanswered", "retried", "losses", "batches"):
            yield CounterMetricFamily(f"detransformer_{name}", f"{name} so far", value=session.counts[name])
        yield GaugeMetricFamily("detransformer_waiting", "requests that wait", value=session.num_waiting)
        yield GaugeMetricFamily("detransformer_serving", "1 while devices serve", value=int(session.serving))
        devices = GaugeMetricFamily("detransformer_device", "1 where the device serves", labels=["name"])
        for number, name in enumerate(session.spec.names):
            devices.add_metric([name], int(session.serving and number in session.present))
        yield devices
        yield SummaryMetricFamily(
            "detransformer_seconds",
            "of the last requests, asked to answered",
            count_value=len(kept),
            sum_value=sum(kept),
        )
