"""Dataclasses that cross JSON (a file, pipe or socket), whose lists become tuples again."""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid")  # as `__pydantic_config__`: the dataclass refuses unknown fields
Record = TypeVar("Record")
_adapter = cache(TypeAdapter)


def from_json(kind: type[Record], fields: Mapping[str, Any], what: str = "") -> Record:
    """The dataclass `kind` from `fields`, which `dataclasses.asdict` made before they crossed JSON.

    Raises:
        ValueError: for a missing field or one of another type; with `STRICT` also for an unknown one. The sentence
            names `what`.
    """
    what = what or kind.__name__
    try:
        return _adapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, msg = ".".join(map(str, first["loc"])), first["msg"]
        if "error" in first.get("ctx", {}):  # raised by `__post_init__`
            raise ValueError(str(first["ctx"]["error"])) from None
        if first["type"] == "missing":
            raise ValueError(f"the {what} has no field {place!r}.") from None
        if first["type"] == "unexpected_keyword_argument":
            known = ", ".join(field.name for field in fields_of(kind))
            raise ValueError(f"a {what} has no field {place!r}: it has {known}.") from None
        owner = f"the {what}'s {place}" if place else f"the {what}"
        raise ValueError(f"{owner} is {first['input']!r}: {msg[0].lower()}{msg[1:]}.") from None
