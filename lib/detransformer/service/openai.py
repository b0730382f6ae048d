"""OpenAI's routes: `/v1/embeddings`, `/v1/completions` (streamed too) and `/v1/models`."""

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from detransformer.service.bodies import Completions, Embeddings, Generate
from detransformer.service.sse import streamed
from detransformer.service.tasks import Tasks
from detransformer.service.tei import listed

MAX_TOKENS = 16  # OpenAI's default


def routes(tasks: Tasks) -> APIRouter:
    """All routes; those for another kind of model refuse with 424."""
    router, started = APIRouter(prefix="/v1"), int(time.time())
    model = {"id": tasks.name, "object": "model", "created": started, "owned_by": "detransformer"}

    @router.get("/models")
    async def models() -> dict:
        """The served model."""
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict:
        """The model of this name."""
        if name != tasks.name:
            raise HTTPException(404, f"there is no model {name!r}; this server has {tasks.name}.")
        return model

    @router.post("/embeddings")
    async def embeddings(body: Embeddings) -> dict:
        """A vector of each text, as numbers or as base64 of float32."""
        vectors, used = await tasks.vectors(listed(body.input), body)
        in_base64 = body.encoding_format == "base64"
        shown = [base64.b64encode(v.numpy().tobytes()).decode() if in_base64 else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)]
        usage = {"prompt_tokens": used, "total_tokens": used}
        return {"object": "list", "data": data, "model": tasks.name, "usage": usage}

    @router.post("/completions")
    async def completions(body: Completions) -> dict:
        """The text that follows each prompt; with `stream`, as events that end with [DONE]."""
        tasks.only("generation")
        options = dict(
            max_new_tokens=body.max_tokens or MAX_TOKENS,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            seed=body.seed,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            deadline_s=body.deadline_s,
        )
        prompts = [("text" if isinstance(prompt, str) else "input_ids", prompt) for prompt in listed(body.prompt)]
        wishes = [Generate(**{name: prompt}, **options) for name, prompt in prompts]
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        head |= {"created": int(time.time()), "model": tasks.name}
        if body.stream:
            counts = bool(body.stream_options and body.stream_options.include_usage)
            return await streamed("/v1/completions", _events(tasks, wishes[0], head, counts), last="[DONE]")
        texts = await tasks.write(wishes)
        choices = [_choice(text.text, text.reason, index) for index, text in enumerate(texts)]
        usage = _usage(sum(text.num_prompt_tokens for text in texts), sum(len(text.tokens) for text in texts))
        return head | {"choices": choices, "usage": usage}

    return router


def _choice(text: str, reason: str | None, index: int = 0) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(tasks: Tasks, wish: Generate, head: dict, counts: bool) -> AsyncIterator[str]:
    """A JSON event per piece of text, and one with the usage if the client asks for it (`counts`)."""
    num_tokens = 0
    async for piece in tasks.stream(wish):
        num_tokens += piece.token is not None
        if piece.text or piece.reason:
            yield json.dumps(head | {"choices": [_choice(piece.text, piece.reason)]})
    if counts:
        usage = _usage(tasks.num_tokens(wish), num_tokens)
        yield json.dumps(head | {"choices": [], "usage": usage})
