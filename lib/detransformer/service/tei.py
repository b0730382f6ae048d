"""The routes of Text Embeddings Inference: `/embed`, `/predict`, `/rerank`, `/similarity`, `/info`."""

from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from detransformer import __version__
from detransformer.answers import scores
from detransformer.models.configuration import max_tokens
from detransformer.service.bodies import Embed, Predict, Rerank, Similarity, Vectors
from detransformer.service.tasks import Prompt, Tasks


def routes(tasks: Tasks) -> APIRouter:
    """All routes; those for another kind of model refuse with 424."""
    router = APIRouter()

    @router.post("/embed")
    async def embed(body: Embed) -> list[list[float]]:
        """A vector of each text."""
        return (await tasks.vectors(listed(body.inputs), body))[0].tolist()

    @router.post("/similarity")
    async def similarity(body: Similarity) -> list[float]:
        """How alike each sentence is to the source, from -1 to 1."""
        truncate = body.parameters and body.parameters.truncate
        return await tasks.similarities(body.inputs, Vectors(truncate=truncate, deadline_s=body.deadline_s))

    @router.post("/predict")
    async def predict(body: Predict) -> list[dict] | list[list[dict]]:
        """Labels and scores of a text, a pair, or each entry of a list."""
        tasks.only("classification")
        several = isinstance(body.inputs, list) and isinstance(body.inputs[0], list)
        pairs = body.inputs if several else [[body.inputs] if isinstance(body.inputs, str) else body.inputs]
        rows = [tasks.row(*pair, truncate=bool(body.truncate)) for pair in pairs]
        logits = await tasks.logits(rows, body.deadline_s)
        found = [tasks.labelled(x if body.raw_scores else scores(tasks.config, x)) for x in logits]
        return found if several else found[0]

    @router.post("/rerank")
    async def rerank(body: Rerank) -> list[dict]:
        """The texts ranked by how well they fit the query, best first."""
        tasks.only("classification")
        if tasks.config.num_labels != 1:
            words = f"{tasks.name} has {tasks.config.num_labels} labels"
            raise HTTPException(424, f"{words}; ranking needs a model with one label.")
        rows = [tasks.row(body.query, text, truncate=bool(body.truncate)) for text in body.texts]
        logits = await tasks.logits(rows, body.deadline_s)
        fits = [float(x if body.raw_scores else x.sigmoid()) for x in logits]
        ranked = sorted(range(len(fits)), key=lambda i: -fits[i])
        texts = [{"text": text} if body.return_text else {} for text in body.texts]
        return [{"index": i, "score": fits[i], **texts[i]} for i in ranked]

    @router.get("/info")
    async def info() -> dict:
        """The served model and its limits."""
        kind = {tasks.task: {}} if tasks.task != "base" else {"embedding": {"pooling": "+".join(tasks.pooling.modes)}}
        if tasks.task == "classification":
            labels = {"id2label": tasks.config.id2label, "label2id": tasks.config.label2id}
            kind = {"reranker" if tasks.config.num_labels == 1 else "classifier": labels}
        return {
            "model_id": tasks.name,
            "served_model_name": tasks.name,
            "model_dtype": "float32",
            "model_type": kind,
            "max_input_length": tasks.pooling.limit or max_tokens(tasks.config),
            "max_client_batch_size": tasks.max_texts,
            "max_batch_requests": tasks.session.max_batch,
            "max_concurrent_requests": tasks.session.max_waiting,
            "auto_truncate": tasks.pooling.limit is not None,
            "version": __version__,
        }

    return router


def listed(inputs: Any) -> list[Prompt]:
    """The texts, or rows of tokens, of a field that takes one or a list of them."""
    return inputs if isinstance(inputs, list) and not isinstance(inputs[0], int) else [inputs]
