"""Dataclasses that cross JSON: a file, a pipe, a socket. JSON knows lists alone; what comes back has tuples again."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def from_json(kind: type[Record], fields: Mapping[str, Any]) -> Record:
    """The dataclass `kind` of `fields`, as `dataclasses.asdict` gave them before they crossed JSON.

    A field that is declared a tuple or a dataclass becomes one again, at any depth, so that the record equals the one
    that was sent.

    Raises:
        TypeError: for a field that is missing, not known, or cannot become what it is declared.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _restored(hints.get(name), value) for name, value in fields.items()})


def _restored(hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):  # of the declared ones only `SOMETHING | None` can be restored
        options = [option for option in get_args(hint) if option is not NoneType]
        return value if value is None or len(options) > 1 else _restored(options[0], value)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise TypeError(f"{value!r} has no fields of a {hint.__name__}")
        return from_json(hint, value)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{value!r} is no list")
        kinds = get_args(hint)
        return tuple(map(_restored, kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds, value))
    return value
