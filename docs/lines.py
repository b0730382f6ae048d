"""Lines of Python by room of the package, and of what stands around it: files, lines, lines of docstrings.

python docs/lines.py
"""

import ast
from pathlib import Path

import pandas as pd

from detransformer.files import PACKAGE, with_docstring

ROOT = Path(__file__).parents[1]


def docstring_lines(text: str) -> int:
    """Lines of all docstrings of a module."""
    first = [node.body[0] for node in with_docstring(ast.parse(text))]
    return sum(one.end_lineno - one.lineno + 1 for one in first)


def lines_by_room() -> pd.DataFrame:
    """One row a room (a folder of the package; `top` are the files beside them), the package, notebooks and tests."""
    rows = []
    for part in (PACKAGE, ROOT / "notebooks", ROOT / "tests"):
        for path in sorted(part.rglob("*.py")):
            inside = path.relative_to(part).parts
            room = part.name if part != PACKAGE else f"lib: {inside[0]}" if len(inside) > 1 else "lib: top"
            text = path.read_text("utf-8")
            rows.append((room, 1, text.count("\n"), docstring_lines(text)))
    table = pd.DataFrame(rows, columns=["room", "files", "lines", "docstrings"]).groupby("room").sum()
    table.loc["lib"] = table[table.index.str.startswith("lib: ")].sum()
    return table


if __name__ == "__main__":
    print(lines_by_room().to_string())
