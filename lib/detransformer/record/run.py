"""A run's folder: `tables/` (CSV), `figures/` (PNG), `notebooks/` (executed), `manifest.json`.

The tables are the record, and all that passes from one notebook to the next and from notebooks to figures.
"""

import json
from pathlib import Path

import pandas as pd

from detransformer.files import atomic_write

NOTES = "notes.json"


class RunFolder:
    """The folder of one run; makes `tables/`, `figures/` and `notebooks/` in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tables, self.figures, self.notebooks = (self.path / name for name in ("tables", "figures", "notebooks"))
        for folder in (self.tables, self.figures, self.notebooks):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def save_table(self, frame: pd.DataFrame, name: str, note: str = "") -> pd.DataFrame:
        """Saves `frame` as tables/NAME.csv and returns it; `note` says what the rows were made from (`notes`).

        Raises:
            ValueError: for a table without rows.
        """
        if not len(frame):
            raise ValueError(f"Table {name!r} has no rows; a table is saved only when something was measured.")
        with atomic_write(self.tables / f"{name}.csv") as file:
            frame.to_csv(file, index=False)
        if note:
            with atomic_write(self.tables / NOTES) as file:
                json.dump(self.notes() | {name: " ".join(note.split())}, file, indent=2, sort_keys=True)
                file.write("\n")
        return frame

    def notes(self) -> dict[str, str]:
        """Table -> what its rows were made from, for tables saved with a note."""
        path = self.tables / NOTES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def has_table(self, name: str) -> bool:
        return (self.tables / f"{name}.csv").is_file()

    def load_table(self, name: str, made_by: str = "this notebook with `measure = True`") -> pd.DataFrame:
        """The saved table NAME.

        Raises:
            ValueError: if it is missing or damaged, naming the notebook or command that makes it (`made_by`).
        """
        path = self.tables / f"{name}.csv"
        if not path.is_file():
            raise ValueError(f"Table {name!r} is not in {self.tables}; run {made_by} first.")
        try:
            return pd.read_csv(path)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"Table {path} cannot be read ({error}); delete it and run {made_by} again.") from error
