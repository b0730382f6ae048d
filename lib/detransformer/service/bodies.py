"""Bodies of requests and answers over HTTP, each field checked."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_TEXT = 20_000  # characters
MAX_DEADLINE_S = 600.0
MAX_NEW_TOKENS = 1024

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=8192)]


class Body(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, description="seconds to answer in")] = 60.0


class Classify(Body):
    """A text, or a pair of texts, or the tokens of one."""

    text: Text | None = None
    text_pair: Text | None = None
    input_ids: Tokens | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "Classify":
        return _either(self, "text", self.text)


class Answer(Body):
    """A question and the passage that has the answer, or the tokens of both."""

    question: Text | None = None
    passage: Text | None = None
    input_ids: Tokens | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "Answer":
        if (self.question is None) != (self.passage is None):
            raise ValueError("question and passage go together")
        return _either(self, "question and passage", self.question)


class Generate(Body):
    """A text to go on with, or its tokens."""

    text: Text | None = None
    input_ids: Tokens | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 32

    @model_validator(mode="after")
    def _one_of(self) -> "Generate":
        return _either(self, "text", self.text)


def _either(body: Body, name: str, value: str | None) -> Body:
    if (value is None) == (body.input_ids is None):
        raise ValueError(f"give either {name} or input_ids")
    if body.input_ids is not None and getattr(body, "text_pair", None) is not None:
        raise ValueError("text_pair goes with text, not with input_ids")
    return body


class Label(BaseModel):
    """A classifier's answer."""

    label: str
    probabilities: list[float]
    logits: list[float]


class Span(BaseModel):
    """Where the passage answers: its characters from `start` to `end`, and their text; "" where it does not.

    Of input_ids, the tokens from `start` to `end`.
    """

    answer: str | None
    start: int
    end: int


class Continuation(BaseModel):
    """What a text goes on with; `text` is null without a tokenizer."""

    text: str | None
    tokens: list[int]


class Health(BaseModel):
    """Whether the devices serve; the rest for who shows the token."""

    status: str
    devices: list[str] | None = None
    waiting: int | None = None
    model: str | None = None
    last_event: str | None = None


class Problem(BaseModel):
    """A refusal, in a sentence."""

    error: str
