"""Refusals over HTTP: one sentence each, in the shape of the path's dialect."""

import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from detransformer.cluster.fleet import JobFailed
from detransformer.service.bodies import OpenAIProblem, Problem
from detransformer.service.waiting import Expired, QueueFull, Unanswered

UNANSWERED_RETRY_S = 5
REFUSALS = {
    400: "the body cannot be read",
    401: "no token, or a wrong one",
    404: "no such path, or another model's name",
    405: "wrong method",
    408: "the body came too slowly",
    413: "the body is too large, or has too many texts",
    422: "a field is missing, out of range or contradicts another, or the model does not take the input",
    424: "the model cannot do it, or fails at this input",
    429: "the queue is full (OpenAI's and TEI's routes): ask again after Retry-After seconds",
    503: "the queue is full (other routes), or all attempts failed: ask again after Retry-After seconds",
    504: "no answer by the deadline",
}
OWN_ROUTES = ("/", "/classify", "/answer", "/generate")  # they answer 503 if the queue is full
TEI_TYPES = {401: "Unauthorized", 424: "Backend", 429: "Overloaded", 503: "Unhealthy", 504: "Backend"}
OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def is_openai(path: str) -> bool:
    """Whether a path is one of OpenAI's."""
    return path.startswith("/v1/")


def responses_of(path: str) -> dict[int, dict]:
    """The refusals that the description of a path lists."""
    model = OpenAIProblem if is_openai(path) else Problem
    return {status: {"model": model, "description": words} for status, words in REFUSALS.items()}


def as_problem(path: str, status: int, sentence: str) -> dict:
    """The body of a refusal."""
    if is_openai(path):
        kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}
    return {"error": sentence, "error_type": TEI_TYPES.get(status, "Validation")}


def problem(path: str, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response to a refused request."""
    return JSONResponse(as_problem(path, status, sentence), status, headers)


def refusal(path: str, error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, sentence and headers for an error of the session; other errors are raised again."""
    if isinstance(error, QueueFull):
        return 503 if path in OWN_ROUTES else 429, str(error), {"Retry-After": str(math.ceil(error.retry_after_s))}
    if isinstance(error, Unanswered):
        return 503, str(error), {"Retry-After": str(UNANSWERED_RETRY_S)}
    if isinstance(error, Expired):
        return 504, str(error), {}
    if isinstance(error, JobFailed):
        return 424, f"the model fails at this input ({error}).", {}
    if isinstance(error, ValueError):
        return 422, str(error), {}
    if isinstance(error, HTTPException):
        return error.status_code, error.detail, dict(error.headers or {})
    raise error


def add_handlers(app: FastAPI) -> None:
    """Gives all refusals of `app` the shape of their dialect."""
    paths = sorted(app.openapi()["paths"])

    async def refused(request: Request, error: Exception) -> JSONResponse:
        status, sentence, headers = refusal(request.url.path, error)
        if status == 405:
            sentence = f"{request.method} is not allowed here; use {headers['Allow']}."
        elif sentence == "Not Found":  # starlette's, for an unknown path
            sentence = f"there is no such path; this server has {', '.join(paths)}."
        return problem(request.url.path, status, sentence, headers)

    for kind in (HTTPException, QueueFull, Unanswered, Expired, JobFailed, ValueError):
        app.exception_handler(kind)(refused)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union, the member that matched furthest
        parts = (str(part) for part in found["loc"][1:])  # filtered below: names of union members, as of `str | list`
        where = ".".join(part for part in parts if part.isidentifier() or part.isdigit()) or "body"
        if found["type"] == "json_invalid":
            return problem(request.url.path, 422, f"the body is not JSON ({found['ctx']['error']}).")
        return problem(request.url.path, 422, f"{where}: {found['msg'].removeprefix('Value error, ')}.")
