"""A run's folder: `tables/` (CSV and Markdown), `figures/` (SVG and PNG), `notebooks/` (executed), `manifest.json`.

The tables are the only thing that passes from one notebook to the next and from notebooks to figures. The CSV is the
record; the Markdown beside it is for reading, with a note that says what the rows were made from.
"""

import json
from pathlib import Path

import pandas as pd

from detransformer.files import atomic_write

# Which notebook makes a table, so that a missing one can be asked for by name.
TABLE_NOTEBOOKS = {
    "decoupling": "01_decoupling",
    "pretraining_loss": "02_pretraining",
    **dict.fromkeys(("pretraining", "placements", "widths", "calibration"), "02_pretraining"),
    **dict.fromkeys(("accuracy_runs", "table_iii", "wire_accuracy"), "03_accuracy"),
    "profile": "04_profiling",
    "efficiency": "04_profiling",
    "links": "04_profiling",
    "fig2a": "04_profiling",
    "placement": "05_placement",
    **dict.fromkeys(("latency", "timeline", "fig7_error", "methods", "wire", "reads"), "06_latency"),
    **dict.fromkeys(("pace", "overlap"), "06_latency"),
    **dict.fromkeys(("scaling", "prediction", "table_ii", "table_iv"), "06_latency"),
    "summary": "07_summary",
    **dict.fromkeys(("plan_map", "choices", "choice_cells", "unequal", "trace"), "08_adaptive"),
    **dict.fromkeys(("generation", "perplexity", "scale_out", "adaptive"), "08_adaptive"),
    **dict.fromkeys(("coformer_runs", "coformer_ablation", "coformer_aggregators"), "10_comparison"),
    **dict.fromkeys(("coformer_devices", "coformer_budgets", "coformer_rules"), "10_comparison"),
    **dict.fromkeys(("coformer_equal_flops", "coformer_missing", "coformer_latency"), "10_comparison"),
    **dict.fromkeys(("which_one", "not_run", "coformer_text", "coformer_recipes", "coformer"), "10_comparison"),
    **dict.fromkeys(("predictor_points", "predictor", "proxy_points", "proxy", "search_history"), "09_decomposition"),
    **dict.fromkeys(("search", "policies", "constraints", "decomposition"), "09_decomposition"),
}

TABLE_COMMANDS = {  # which command makes a table that no notebook does
    **dict.fromkeys(("chaos", "chaos_rounds"), "`make chaos`"),
    **dict.fromkeys(("soak", "soak_samples"), "`make soak`"),
    "coverage": "`make coverage`",
    "encrypted": "`python -m detransformer.cluster.encrypted`",
}


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

    def known_manifest(self) -> tuple[dict, str]:
        """The manifest with every part there, empty where it is not, and what is wrong with it, in a sentence."""
        parts = ("notebooks", "versions", "hardware", "data", "seeds", "parameters")
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            problem = ""
            if not isinstance(manifest, dict):
                raise ValueError
        except FileNotFoundError:
            manifest, problem = {}, "This run has no manifest.json: what made it is not known."
        except ValueError:
            manifest, problem = {}, "manifest.json is damaged: what made this run is not known."
        for part in parts:
            manifest[part] = manifest[part] if isinstance(manifest.get(part), dict) else {}
        manifest["notebooks"] = {name: e for name, e in manifest["notebooks"].items() if isinstance(e, dict)}
        return manifest, problem

    def save_table(
        self, frame: pd.DataFrame, name: str, note: str = "", markdown: pd.DataFrame | str | None = None
    ) -> pd.DataFrame:
        """Save `frame` as tables/NAME.csv and tables/NAME.md, and return it.

        `note` stands under the Markdown table (data source, row counts). `markdown` replaces the
        Markdown's body where the paper's wide form reads better than one row a fact.
        """
        if not len(frame):
            raise ValueError(f"Table {name!r} has no rows; a table is saved only when something was measured.")
        body = frame if markdown is None else markdown
        if isinstance(body, pd.DataFrame):
            body = to_markdown(body)
        with atomic_write(self.tables / f"{name}.csv") as file:
            frame.to_csv(file, index=False)
        with atomic_write(self.tables / f"{name}.md") as file:
            file.write(body.rstrip() + "\n" + (f"\n{note.strip()}\n" if note.strip() else ""))
        return frame

    def has_table(self, name: str) -> bool:
        return (self.tables / f"{name}.csv").is_file()

    def load_table(self, name: str) -> pd.DataFrame:
        """The saved table NAME; ValueError with what makes it, a notebook or command, if missing or damaged."""
        path = self.tables / f"{name}.csv"
        maker = (TABLE_NOTEBOOKS | TABLE_COMMANDS).get(name, "the notebook that makes it")
        if not path.is_file():
            raise ValueError(f"Table {name!r} is not in {self.tables}; run {maker} first.")
        try:
            frame = pd.read_csv(path)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"Table {path} cannot be read ({error}); delete it and run {maker} again.") from error
        return frame


def to_markdown(frame: pd.DataFrame) -> str:
    """`frame` as a Markdown table: four significant digits, empty cells for missing values, no index."""
    cells = frame.astype(object).map(_cell)
    return cells.to_markdown(index=False, disable_numparse=True)


def _cell(value) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
