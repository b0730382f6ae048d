"""A run's index.html: its executed notebooks as HTML, tables, figures, and what made them."""

import json
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from nbconvert import HTMLExporter

from detransformer.files import atomic_write
from detransformer.record.run import RunFolder

TEMPLATE = Path(__file__).with_name("index.html.jinja")
FACTS = ("profile", "command", "date", "commit", "dirty", "drawn")


def write_index(run: RunFolder) -> Path:
    """Write RUN/html/NOTEBOOK.html for each executed notebook and RUN/index.html, which links all that the run has."""
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True)
    exporter = HTMLExporter(template_name="basic")
    notebooks, notes = [], run.notes()
    manifest = json.loads(run.manifest_path.read_text(encoding="utf-8")) if run.manifest_path.is_file() else {}
    for path in sorted(run.notebooks.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = next(iter(notebook.cells[0].source.splitlines()), path.stem).lstrip("# ")
        body, _ = exporter.from_notebook_node(notebook)
        with atomic_write(run.path / "html" / f"{path.stem}.html") as file:
            file.write(template.render(title=title, body=body))
        entry = manifest.get("notebooks", {}).get(path.stem, {})
        notebooks.append(entry | {"name": path.stem, "title": title, "commit": entry.get("commit", "")[:12]})
    tables = [
        {"name": path.stem, "columns": list(pd.read_csv(path, nrows=0)), "note": notes.get(path.stem, "")}
        for path in sorted(run.tables.glob("*.csv"))
    ]
    figures = sorted(path.stem for path in run.figures.glob("*.png"))
    facts = {name: manifest[name] for name in FACTS if name in manifest} | manifest.get("hardware", {})
    page = template.render(
        title=f"Run {run.path.name}", notebooks=notebooks, tables=tables, figures=figures, facts=facts
    )
    with atomic_write(run.path / "index.html") as file:
        file.write(page)
    return run.path / "index.html"
