"""A session behind HTTP: the routes of four dialects (`own`, `hub`, `tei`, `openai`), and /health and /metrics.

Every answer but a metric or a stream is JSON, and so is every body, whatever its Content-Type. Clients show a token
(`Authorization: Bearer`), bodies are limited in size, each field is checked, and a full queue refuses with Retry-After.
"""

import asyncio
import secrets
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from detransformer import __version__
from detransformer.service import hub, openai, own, tei
from detransformer.service.bodies import Health
from detransformer.service.errors import add_handlers, problem, responses_of
from detransformer.service.session import Session
from detransformer.service.tasks import Tasks

MAX_BODY_BYTES = 2**20
HEAD_S, BODY_S = 10.0, 10.0  # limits for each to arrive
COUNTS = ("accepted", "answered", "refused", "expired", "unanswered", "failed", "retried", "losses", "batches")


class Impatient(H11Protocol):
    """Closes connections whose request head does not arrive: a client that held many would keep others out."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def _wait(self) -> None:
        arrived = self.cycle is not None and not self.cycle.response_complete  # it is being answered
        if arrived and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif not arrived and self._patience is None:
            self._patience = self.loop.call_later(HEAD_S, self.transport.close)


class SizeLimit:
    """Refuses bodies of more than `MAX_BODY_BYTES`, and bodies that arrive slowly.

    All bodies are read as JSON: one without Content-Type, or with that of a form (`curl -d`), is meant as JSON, too.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in Request(scope, receive).stream():  # read whole first: it is small
                    body += part
                    if len(body) > MAX_BODY_BYTES:
                        sentence = f"a body has {MAX_BODY_BYTES} bytes at most; send less at once."
                        return await problem(scope["path"], 413, sentence)(scope, receive, send)
        except ClientDisconnect:
            return None
        except TimeoutError:
            sentence = f"the body did not come within {BODY_S:g} s."
            return await problem(scope["path"], 408, sentence)(scope, receive, send)
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(whole, None) or await receive()

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = scope | {"headers": [*headers, (b"content-type", b"application/json")]}
        return await self.app(scope, replay, send)


def build_app(session: Session, token: str) -> FastAPI:
    """The application over a session that has been entered; clients must show `token`."""
    app = FastAPI(title="DeTransformer", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(SizeLimit)
    bearer = HTTPBearer(auto_error=False)

    def is_token(given: str) -> bool:
        return secrets.compare_digest(given.encode(), token.encode())

    def check_token(shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not is_token(shown.credentials if shown else ""):
            raise HTTPException(401, "show the token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"})

    tasks = Tasks(session)
    for dialect, path in ((own, "/"), (hub, "/"), (tei, "/"), (openai, "/v1/")):
        app.include_router(dialect.routes(tasks), dependencies=[Depends(check_token)], responses=responses_of(path))

    responses = responses_of("/")
    unready = {503: {"model": Health}, 405: responses[405]}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, response_model_exclude_none=True, responses=unready)
    def health(request: Request, response: Response) -> Health:
        """Whether the devices serve and, with the token, which."""
        response.status_code = 200 if session.serving else 503
        status = "serving" if session.serving else "recovering"
        if not is_token(request.headers.get("Authorization", "").removeprefix("Bearer ")):
            return Health(status=status)  # monitors have no token
        names = [session.spec.names[device] for device in session.present]
        event = session.events[-1].sentence if session.events else ""
        return Health(status=status, devices=names, waiting=session.num_waiting, model=tasks.name, last_event=event)

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(check_token)])
    def metrics() -> PlainTextResponse:
        """Counts and seconds for Prometheus."""
        text = generate_latest(Collected(session)).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    metrics_route = app.routes[-1]
    metrics_route.responses = {status: responses[status] for status in (401, 405)}
    add_handlers(app)
    return app


def server_config(app: FastAPI) -> uvicorn.Config:
    """uvicorn's configuration for `app`."""
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, http=Impatient)


class Collected:
    """A session's counts, for Prometheus."""

    def __init__(self, session: Session):
        self.session = session

    def collect(self):
        session, kept = self.session, list(self.session.seconds)
        for name in COUNTS:
            yield CounterMetricFamily(f"detransformer_{name}", f"{name} so far", value=session.counts[name])
        yield GaugeMetricFamily("detransformer_waiting", "requests that wait", value=session.num_waiting)
        yield GaugeMetricFamily("detransformer_serving", "1 while devices serve", value=int(session.serving))
        devices = GaugeMetricFamily("detransformer_device", "1 while the device serves", labels=["name"])
        for number, name in enumerate(session.spec.names):
            devices.add_metric([name], int(session.serving and number in session.present))
        yield devices
        words = "of the last requests, asked to answered"
        yield SummaryMetricFamily("detransformer_seconds", words, count_value=len(kept), sum_value=sum(kept))
