"""Atomic files and folders: each is written beside its destination, then renamed onto it. Also: where files lie."""

import ast
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The folder of committed data, `published` or `measured`: data/NAME in the clone, or the wheel's copy."""
    clone = PACKAGE.parents[1] / "data" / name
    return clone if clone.is_dir() and PACKAGE.parent.name == "lib" else PACKAGE / name


def computing_part(path: Path) -> bytes:
    """What of a file can change a result: a module's syntax without docstrings and comments, or all of another file."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_bytes())
    for node in with_docstring(tree):
        del node.body[0]
    return ast.dump(tree).encode()


def computing_digest(paths: Iterable[Path]) -> str:
    """A digest of the names of files and of all in them that can change a result."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + computing_part(path))
    return digest.hexdigest()


def with_docstring(tree: ast.Module) -> list[ast.AST]:
    """The module, classes and functions of `tree` that have a docstring, their first statement."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, False) is not None]


def with_home(path: str) -> str:
    """`path` with a leading ~ or ~USER expanded, which a shell does not do in --option=~/x or in quotes.

    Raises:
        ValueError: if that home folder is unknown, since nobody means a folder named ~.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"{path} begins with ~, and there is no such home folder: write the whole path, or ./{path}.")
    return whole


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file in `path`'s folder, which is created, and renames it onto `path` if the block succeeds.

    `mode` is "w" (UTF-8 text) or "wb". An exception in the block, or a full disk, removes the temporary file and leaves
    `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk's error names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a folder in a temporary one beside `path`; it replaces `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)


def repository_root() -> Path:
    """The clone this package runs from: the folder with `notebooks/` and `pyproject.toml`.

    Searches above the package (an editable install), then above the current directory. Raises FileNotFoundError.
    """
    for start in (PACKAGE, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
                return folder
    raise FileNotFoundError(
        f"No folder with notebooks/ and pyproject.toml above {Path.cwd()}; run this inside a clone of the repository."
    )


def last_words(log: str | Path) -> str:
    """The last line of a log; empty without one."""
    path = Path(log)
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip() if lines else ""
