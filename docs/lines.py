"""Lines of Python by room of the package, and of the notebooks and tests: files, lines, lines of docstrings.

python docs/lines.py
"""

import ast
from pathlib import Path

import pandas as pd

from detransformer.files import PACKAGE, with_docstring

ROOT = Path(__file__).parents[1]


def room_of(path: Path) -> str:
    """The folder of the package that a file lies in; `detransformer` for the files beside the folders."""
    inside = path.parts[path.parts.index("detransformer") + 1 :]
    return inside[0] if len(inside) > 1 else "detransformer"


def docstring_lines(text: str) -> int:
    """Lines of all docstrings of a module."""
    first = [node.body[0] for node in with_docstring(ast.parse(text))]
    return sum(one.end_lineno - one.lineno + 1 for one in first)


def lines_by_room() -> pd.DataFrame:
    """One row a room (`room_of`), the package, notebooks and tests."""
    rows = []
    for part in (PACKAGE, ROOT / "notebooks", ROOT / "tests"):
        for path in sorted(part.rglob("*.py")):
            room = f"lib: {room_of(path)}" if part == PACKAGE else part.name
            text = path.read_text("utf-8")
            rows.append((room, 1, text.count("\n"), docstring_lines(text)))
    table = pd.DataFrame(rows, columns=["room", "files", "lines", "docstrings"]).groupby("room").sum()
    table.loc["lib"] = table[table.index.str.startswith("lib: ")].sum()
    return table


if __name__ == "__main__":
    print(lines_by_room().to_string())
