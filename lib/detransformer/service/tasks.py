"""The calls to a served model; every HTTP dialect translates to these.

Texts become rows of tokens, rows are sent in as few requests of the session as its batches permit, and outputs become
labels, spans, entities, vectors or text.
"""

import asyncio
import copy
import functools
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from starlette.exceptions import HTTPException
from transformers import PretrainedConfig, PreTrainedModel

from detransformer import answers
from detransformer.models.configuration import head_of, max_tokens
from detransformer.opening import Checkpoint, has_tokenizer, load_model, load_tokenizer
from detransformer.parallel.draw import Sampling
from detransformer.service.bodies import Generate, Sentences, Vectors
from detransformer.service.session import Session
from detransformer.service.waiting import Expired, cut, join_rows
from detransformer.service.writing import Writer

MAX_TEXTS = 128
OWN_PATHS = {  # task of `answers.TASKS` -> this project's own route
    "classification": "/classify",
    "token-classification": "/",
    "question-answering": "/answer",
    "generation": "/generate",
    "base": "/embed",
}
DOES = {
    "classification": "classifies texts",
    "token-classification": "labels the words of texts",
    "question-answering": "answers questions about a passage",
    "generation": "generates text",
    "base": "embeds texts",
}

Row = dict[str, torch.Tensor]
Prompt = str | list[int]


@dataclass(frozen=True)
class Piece:
    """Text since the last piece, and its token; `reason` "stop" or "length" if the text ends with it."""

    text: str
    token: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Written:
    """A generated text; the end token is not among `tokens`."""

    text: str
    tokens: list[int]
    reason: str
    num_prompt_tokens: int


def path_of(config: PretrainedConfig) -> str:
    """This project's own route for a model."""
    return OWN_PATHS[answers.task_of(config)]


class Tasks:
    """The calls of one session's model."""

    def __init__(self, session: Session):
        self.session, self.config = session, session.config
        self.name = Path(session.model).name
        self.task = answers.task_of(session.config)
        self.tokenizer = load_tokenizer(session.model, self.config) if has_tokenizer(session.model) else None
        self.max_texts = min(MAX_TEXTS, session.max_batch * session.max_waiting)
        self.pooling = answers.Pooling.of(session.model)

    def only(self, task: str) -> None:
        """
        Raises:
            HTTPException: 424 if the model does something else.
        """
        if self.task != task:
            raise HTTPException(424, f"{self.name} {DOES[self.task]}; this route is of a model that {DOES[task]}.")

    def row(self, text: Prompt, pair: str | None = None, truncate: bool = False) -> Row:
        """Tensors [1, T] by name.

        Raises:
            HTTPException: 422 for a text without tokens, or if the model's folder has no tokenizer.
        """
        if isinstance(text, list):
            return {"input_ids": torch.tensor([text])}
        if self.tokenizer is None:
            raise HTTPException(422, "the model's folder has no tokenizer: give tokens (input_ids).")
        limit = self.pooling.limit if self.task == "base" else None  # as sentence-transformers cuts
        limit = limit or (max_tokens(self.config) if truncate else None)
        row = answers.encode(self.config, self.tokenizer, text, pair, limit)
        if not row["input_ids"].numel():
            raise HTTPException(422, "the text has no tokens.")
        return row

    async def outputs(self, rows: Sequence[Row], deadline_s: float) -> list[dict[str, torch.Tensor]]:
        """The session's outputs [1, ...] for each row; if a row fails, its error is raised.

        Raises:
            HTTPException: 413 for more rows than fit the queue, 424 if the model's numbers are not finite.
        """
        if len(rows) > self.max_texts:
            raise HTTPException(413, f"{len(rows)} texts are asked for at once; give {self.max_texts} at most.")
        size, futures = self.session.max_batch, []
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        try:
            for part in parts:
                futures.append(self.session.submit(join_rows(part, left=False), deadline_s))
            async with asyncio.timeout(deadline_s + 1):
                found = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except TimeoutError:
            raise Expired("no answer by the deadline.") from None
        finally:
            for future in futures:
                future.cancel()
        if not all(torch.isfinite(tensor).all() for outputs in found for tensor in outputs.values()):
            raise HTTPException(424, f"{self.name} computes numbers that are not finite: look at its weights.")
        return [
            cut({name: tensor[i : i + 1] for name, tensor in outputs.items()}, row["input_ids"].shape[1])
            for part, outputs in zip(parts, found, strict=True)
            for i, row in enumerate(part)
        ]

    async def logits(self, rows: Sequence[Row], deadline_s: float) -> list[torch.Tensor]:
        """A classifier's logits [C] for each row."""
        self.only("classification")
        return [outputs["logits"][0] for outputs in await self.outputs(rows, deadline_s)]

    def labelled(self, scores: torch.Tensor) -> list[dict]:
        """Scores [C] with their labels, the largest first."""
        listed = [{"label": answers.label(self.config, i), "score": score} for i, score in enumerate(scores.tolist())]
        return sorted(listed, key=lambda one: -one["score"])

    async def vectors(self, texts: Sequence[Prompt], options: Vectors) -> tuple[torch.Tensor, int]:
        """Vectors [N, D] of texts, and the number of their tokens.

        Raises:
            HTTPException: 422 for `dimensions` that are not the model's.
        """
        self.only("base")
        size = self.config.hidden_size
        if options.dimensions not in (None, size):
            raise HTTPException(422, f"dimensions is {options.dimensions}, and the vectors have {size}: leave it out.")
        rows = [self.row(text, truncate=bool(options.truncate)) for text in texts]
        pooling = self.pooling
        if options.normalize is not None:
            pooling = replace(pooling, normalize=options.normalize)
        found = await self.outputs(rows, options.deadline_s)
        vectors = torch.cat([pooling(one["last_hidden_state"]) for one in found])
        return vectors, sum(row["input_ids"].numel() for row in rows)

    def has_mask(self, text: str) -> bool:
        """Whether a word of the text is masked."""
        return bool(self.tokenizer and self.tokenizer.mask_token and self.tokenizer.mask_token in text)

    async def fillings(self, texts: Sequence[str], top_k: int, deadline_s: float) -> list:
        """The likeliest tokens for the masks of each text.

        Raises:
            HTTPException: 424 for a model without an LM head; 422 for a text without a mask.
        """
        if head_of(self.config) != "masked-lm":
            raise HTTPException(424, f"{self.name} has no LM head, so it does not fill {self.tokenizer.mask_token}.")
        if not all(self.has_mask(text) for text in texts):
            raise HTTPException(422, f"some of the texts have no {self.tokenizer.mask_token}: send them separately.")
        rows = [self.row(text) for text in texts]
        found = list(zip(rows, await self.outputs(rows, deadline_s), strict=True))
        fill = functools.partial(answers.fill_masks, self.tokenizer)
        return await asyncio.to_thread(lambda: [fill(self._lm_head, *each, top_k) for each in found])

    @functools.cached_property
    def _lm_head(self) -> PreTrainedModel:
        """The checkpoint without its layers: embeddings and LM head, small enough for the front."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 0
        return load_model(Checkpoint(Path(self.session.model), config), torch.float32)

    async def similarities(self, sentences: Sentences, options: Vectors) -> list[float]:
        """The cosine of the source's vector and each sentence's."""
        texts = [sentences.source_sentence, *sentences.sentences]
        vectors, _ = await self.vectors(texts, options.model_copy(update={"normalize": True}))
        return (vectors[1:] @ vectors[0]).tolist()

    async def span(self, question: Prompt, passage: str | None, deadline_s: float) -> dict:
        """The answer in characters of the passage, with its probability; without a text, in tokens."""
        self.only("question-answering")
        row = self.row(question, passage)
        (outputs,) = await self.outputs([row], deadline_s)
        asked = answers.Text(self.tokenizer, question, passage) if passage else None
        return answers.find_answer(self.config, outputs, asked)[1]

    async def entities(self, texts: Sequence[str], deadline_s: float) -> list[list[dict]]:
        """The entities of each text, in characters."""
        self.only("token-classification")
        found = zip(await self.outputs([self.row(text) for text in texts], deadline_s), texts, strict=True)
        return [
            answers.find_entities(self.config, outputs, answers.Text(self.tokenizer, text))[1]["entities"]
            for outputs, text in found
        ]

    async def stream(self, wish: Generate) -> AsyncIterator[Piece]:
        """The text that follows, while its tokens are made; generation stops when nobody reads on.

        The session's errors are raised here; a refused prompt raises before the first piece.
        """
        self.only("generation")
        if wish.stop and self.tokenizer is None:
            raise ValueError("the model's folder has no tokenizer, so no stop string can be found: leave stop out.")
        seed = secrets.randbits(62) if wish.seed is None else wish.seed
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(item: int | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        sampling = [Sampling(wish.temperature, wish.top_p, seed)]
        future = self.session.submit(
            self.row(wish.prompt), wish.deadline_s, wish.max_new_tokens, sampling, lambda tokens: put(tokens[0])
        )
        future.add_done_callback(lambda _: put(None))
        writer = Writer(self.tokenizer, wish.stop, answers.end_tokens(self.config))
        deadline = loop.time() + wish.deadline_s + 1
        try:
            while (token := await asyncio.wait_for(queue.get(), deadline - loop.time())) is not None:
                text = writer.add(token)
                yield Piece(text, token, writer.reason)
                if writer.reason:
                    return
            future.result()
            yield Piece(writer.finish(), reason="length")
        except TimeoutError:
            raise Expired("no answer by the deadline.") from None
        finally:
            future.cancel()

    async def write(self, wishes: Sequence[Generate]) -> list[Written]:
        """Each prompt's text, whole."""
        self.only("generation")
        if len(wishes) > min(MAX_TEXTS, self.session.max_waiting):
            raise HTTPException(413, f"{len(wishes)} prompts are asked for at once; ask for fewer.")
        tasks = [asyncio.ensure_future(self._written(wish)) for wish in wishes]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _written(self, wish: Generate) -> Written:
        pieces = [piece async for piece in self.stream(wish)]
        ends = answers.end_tokens(self.config)
        tokens = [piece.token for piece in pieces if piece.token is not None and piece.token not in ends]
        return Written("".join(piece.text for piece in pieces), tokens, pieces[-1].reason, self.num_tokens(wish))

    def num_tokens(self, wish: Generate) -> int:
        """How many tokens the prompt has."""
        return self.row(wish.prompt)["input_ids"].shape[1]
