"""What the rooms offer is described: each has a docstring, and each public name one of its own and full types."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from detransformer.files import PACKAGE, repository_root

ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def untyped(function: Function) -> list[str]:
    """Parameters without an annotation, and `return`; of a method, all but the first."""
    found = function.args
    listed = [*found.posonlyargs, *found.args, *found.kwonlyargs, found.vararg, found.kwarg]
    names = [a.arg for a in listed if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return names + (["return"] if function.returns is None and function.name != "__init__" else [])


def lacking(node: Function | ast.ClassDef) -> list[str]:
    """What a definition lacks: `docstring`, or names of what has no type; of a class, its constructor's."""
    found = [] if ast.get_docstring(node) else ["docstring"]
    functions = (
        [f for f in node.body if getattr(f, "name", "") == "__init__"] if isinstance(node, ast.ClassDef) else [node]
    )
    return found + [f"type of {name}" for function in functions for name in untyped(function)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path)), f"{path.relative_to(PACKAGE)} opens with no docstring"


@pytest.mark.parametrize("room", [PACKAGE, *ROOMS], ids=lambda room: room.name)
def test_public_names_are_described_and_typed(room):
    """Those of a room's `__all__`; without one, and beside the rooms, those that do not begin with an underscore."""
    offered = getattr(import_module(f"detransformer.{room.name}"), "__all__", None) if room != PACKAGE else None
    faults = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {', '.join(missing)}"
        for path in sorted(room.glob("*.py") if room == PACKAGE else room.rglob("*.py"))
        for node in tree(path).body
        if isinstance(node, Function | ast.ClassDef)
        and (node.name in offered if offered else node.name[0] != "_")
        and (missing := lacking(node))
    ]
    assert not faults, "\n".join(faults)


def test_every_refusal_that_is_documented_is_tested():
    """Each row of docs/limits.md names words of a sentence, and the test file that has them."""
    text = (repository_root() / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| `([^`]+)` \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == text.partition("## What is refused")[2].count("\n| ") - 1
    for words, name in rows:
        found = (Path(__file__).parent / name).read_text(encoding="utf-8").replace("\\", "")
        assert words in found, f"{name} tests no sentence with {words!r}"
