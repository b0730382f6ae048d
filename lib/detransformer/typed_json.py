"""Dataclasses that cross JSON: a file, a pipe, a socket. JSON knows lists alone; what comes back has tuples again."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid")  # the `__pydantic_config__` of a dataclass that refuses fields it does not know
Record = TypeVar("Record")
_adapter = cache(TypeAdapter)


def from_json(kind: type[Record], fields: Mapping[str, Any]) -> Record:
    """The dataclass `kind` of `fields`, as `dataclasses.asdict` gave them before they crossed JSON.

    Raises:
        ValueError: for a field that is missing, or is not what it is declared; in a dataclass whose
            `__pydantic_config__` is `STRICT` also for one that is not known.
    """
    try:
        return _adapter(kind).validate_python(fields)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, found["loc"])) or kind.__name__
        raise ValueError(f"{place}: {found['msg'][0].lower()}{found['msg'][1:]}") from None
