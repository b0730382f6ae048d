"""A user's request to a model: one record that crosses the line to the workers."""

from dataclasses import dataclass

from detransformer.typed_json import STRICT


@dataclass(frozen=True)
class Request:
    """A text, an image, or `num_tokens` random tokens, and how often it is run and how it is planned.

    A GPT-2 generates `max_new_tokens`, once. `wires` are the permitted formats of messages. `plan` (fields of a
    `Plan`) takes precedence over `method`.
    """

    __pydantic_config__ = STRICT

    text: str | None = None
    image: str | None = None
    context: str | None = None
    num_tokens: int = 128
    method: str = "auto"
    plan: dict | None = None
    wires: tuple[str, ...] = ("float32",)
    memory_budget_bytes: int | None = None
    repeats: int = 5
    max_new_tokens: int = 64
    check: bool = False
