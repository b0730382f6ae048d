"""Hugging Face's task shape at `POST /`, as huggingface_hub's InferenceClient sends it: {inputs, parameters}.

The served model's task decides the body; answers are those of transformers' pipelines.
"""

import json
from collections.abc import AsyncIterator

from fastapi import APIRouter

from detransformer.answers import scores
from detransformer.service.bodies import (
    ClassificationParameters,
    FillParameters,
    Generate,
    HubClassification,
    HubEntities,
    HubFeatures,
    HubQuestion,
    HubText,
    Pair,
    Sentences,
    TextParameters,
)
from detransformer.service.sse import streamed
from detransformer.service.tasks import Piece, Tasks
from detransformer.service.tei import listed

PATH = "/"


def routes(tasks: Tasks) -> APIRouter:
    """`POST /` for the task of the served model."""
    router = APIRouter()
    add = {
        "classification": _classification,
        "token-classification": _entities,
        "question-answering": _question,
        "generation": _text,
        "base": _features,
    }[tasks.task]
    add(router, tasks)
    return router


def _classification(router: APIRouter, tasks: Tasks) -> None:
    @router.post(PATH)
    async def classify(body: HubClassification) -> list[list[dict]]:
        """Labels and scores of each text, the likeliest first."""
        given, wanted = body.inputs, body.parameters or ClassificationParameters()
        pairs = [Pair(text=one) if isinstance(one, str) else one for one in listed(given)]
        logits = await tasks.logits([tasks.row(pair.text, pair.text_pair) for pair in pairs], body.deadline_s)
        functions = {"sigmoid": lambda x: x.sigmoid(), "softmax": lambda x: x.softmax(-1), "none": lambda x: x}
        apply = functions.get(wanted.function_to_apply, lambda x: scores(tasks.config, x))
        return [tasks.labelled(apply(row))[: wanted.top_k] for row in logits]


def _entities(router: APIRouter, tasks: Tasks) -> None:
    @router.post(PATH)
    async def label(body: HubEntities) -> list:
        """The entities of a text, or of each text in a list."""
        found = await tasks.entities(listed(body.inputs), body.deadline_s)
        return found if isinstance(body.inputs, list) else found[0]


def _question(router: APIRouter, tasks: Tasks) -> None:
    @router.post(PATH)
    async def answer(body: HubQuestion) -> dict:
        """The answer, in characters of the context."""
        return await tasks.span(body.inputs.question, body.inputs.context, body.deadline_s)


def _features(router: APIRouter, tasks: Tasks) -> None:
    @router.post(PATH)
    async def embed(body: HubFeatures) -> list:
        """A vector of each text; similarities of `source_sentence` and `sentences`; tokens that fill a text's mask."""
        if isinstance(body.inputs, Sentences):
            return await tasks.similarities(body.inputs, body)
        texts = listed(body.inputs)
        if not any(tasks.has_mask(text) for text in texts):
            return (await tasks.vectors(texts, body))[0].tolist()
        wanted = body.parameters or FillParameters()
        found = await tasks.fillings(texts, wanted.top_k or 5, body.deadline_s)
        return found if isinstance(body.inputs, list) else found[0]


def _text(router: APIRouter, tasks: Tasks) -> None:
    @router.post(PATH)
    async def generate(body: HubText) -> list[dict]:
        """The text that follows; with `stream`, an event per token."""
        wanted = body.parameters or TextParameters()
        draws = wanted.do_sample or (wanted.do_sample is None and (wanted.temperature or wanted.top_p))
        wish = Generate(
            text=body.inputs,
            max_new_tokens=wanted.max_new_tokens,
            temperature=(wanted.temperature or 1.0) if draws else 0.0,
            top_p=wanted.top_p or 1.0,
            seed=wanted.seed,
            stop=wanted.stop or [],
            deadline_s=body.deadline_s,
        )
        before = body.inputs if wanted.return_full_text else ""
        if body.stream:
            return await streamed(PATH, _events(tasks.stream(wish), before))
        (written,) = await tasks.write([wish])
        return [{"generated_text": before + written.text}]


async def _events(pieces: AsyncIterator[Piece], before: str) -> AsyncIterator[str]:
    """A JSON event per piece, in the shape of Text Generation Inference."""
    whole, index = before, 0
    async for piece in pieces:
        whole, index = whole + piece.text, index + 1
        token = {"id": -1 if piece.token is None else piece.token, "text": piece.text, "logprob": None}
        event = {"index": index, "token": token | {"special": piece.token is None}, "generated_text": None}
        if piece.reason:
            reason = {"stop": "stop_sequence"}.get(piece.reason, piece.reason)
            details = {"finish_reason": reason, "generated_tokens": index, "seed": None}
            event |= {"generated_text": whole, "details": details}
        yield json.dumps(event)
