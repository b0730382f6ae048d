"""What the rooms offer is described: each has a docstring, and each public name one of its own and full types."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import detransformer
from detransformer.files import repository_root

PACKAGE = Path(detransformer.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def offered(room: Path) -> set[str] | None:
    """What the room's `__all__` lists, by itself or by the table it is made from; None: whatever is not private."""
    for statement in tree(room / "__init__.py").body:
        targets = [t.id for t in getattr(statement, "targets", []) if isinstance(t, ast.Name)]
        if {"__all__", "_PLACES"} & set(targets):
            parts = statement.value.values if isinstance(statement.value, ast.Dict) else [statement.value]
            return {name for part in parts for name in ast.literal_eval(part)}
    return None


def definitions(path: Path, names: set[str] | None) -> Iterator[Definition]:
    """The top-level functions and classes of a module that are called so; None: all that are not private."""
    for node in tree(path).body:
        if isinstance(node, Definition) and (node.name in names if names is not None else node.name[0] != "_"):
            yield node


def untyped(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Parameters without an annotation, and `return`; of a method, all but the first."""
    found = function.args
    listed = [*found.posonlyargs, *found.args, *found.kwonlyargs, found.vararg, found.kwarg]
    names = [a.arg for a in listed if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return names + (["return"] if function.returns is None and function.name != "__init__" else [])


def lacking(node: Definition) -> list[str]:
    """What a definition lacks: `docstring`, or names of what has no type; of a class, its constructor's."""
    found = [] if ast.get_docstring(node) else ["docstring"]
    functions = (
        [f for f in node.body if getattr(f, "name", "") == "__init__"] if isinstance(node, ast.ClassDef) else [node]
    )
    return found + [f"type of {name}" for function in functions for name in untyped(function)]


def faults(paths: list[Path], names: set[str] | None) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {', '.join(missing)}"
        for path in paths
        for node in definitions(path, names)
        if (missing := lacking(node))
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path)), f"{path.relative_to(PACKAGE)} opens with no docstring"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_public_names_of_a_room_are_described_and_typed(room):
    names, paths = offered(room), sorted(room.rglob("*.py"))
    found = faults(paths, names)
    assert not found, "\n".join(found)


def test_public_names_beside_the_rooms_are_described_and_typed():
    found = faults(sorted(PACKAGE.glob("*.py")), None)
    assert not found, "\n".join(found)


def test_what_a_room_offers_is_there():
    for room in ROOMS:
        module = import_module(f"detransformer.{room.name}")
        assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


def test_every_refusal_that_is_documented_is_tested():
    """Each row of docs/limits.md names words of a sentence, and the test file that has them."""
    text = (repository_root() / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| `([^`]+)` \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == text.partition("## What is refused")[2].count("\n| ") - 1
    for words, name in rows:
        found = (Path(__file__).parent / name).read_text(encoding="utf-8").replace("\\", "")
        assert words in found, f"{name} tests no sentence with {words!r}"
