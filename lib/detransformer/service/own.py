"""This project's own route for each task, on single texts or tokens: `/classify`, `/answer`, `/generate`."""

from fastapi import APIRouter

from detransformer import answers
from detransformer.service.bodies import Answer, Classify, Generate
from detransformer.service.tasks import OWN_PATHS, Tasks


def routes(tasks: Tasks) -> APIRouter:
    """The route of the served model's task."""
    router, path = APIRouter(), OWN_PATHS[tasks.task]
    if tasks.task == "classification":

        @router.post(path)
        async def classify(body: Classify) -> dict:
            """The label of a text, with all probabilities and logits; for a regression both are its numbers."""
            row = tasks.row(body.input_ids or body.text, body.text_pair)
            (logits,) = await tasks.logits([row], body.deadline_s)
            return answers.classify(tasks.config, {"logits": logits[None]}, None)[1]

    elif tasks.task == "question-answering":

        @router.post(path)
        async def answer(body: Answer) -> dict:
            """Where a passage answers a question: characters `start` to `end`, or tokens if input_ids are given."""
            return await tasks.span(body.input_ids or body.question, body.passage, body.deadline_s)

    elif tasks.task == "generation":

        @router.post(path)
        async def generate(body: Generate) -> dict:
            """Continues a text; `text` is null without a tokenizer."""
            (written,) = await tasks.write([body])
            return {"text": written.text if tasks.tokenizer else None, "tokens": written.tokens}

    return router
