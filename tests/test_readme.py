"""The README's tables are those of the committed run, and what it points to is there."""

import re

from detransformer.files import repository_root
from detransformer.report.readme import REFERENCE, render
from detransformer.report.runs import RunFolder

ROOT = repository_root()


def test_tables_are_those_of_the_reference_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render(text, RunFolder(ROOT / REFERENCE)) == text, "run `python -m detransformer.report.readme`"


def test_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_reference_run_is_complete():
    run = RunFolder(ROOT / REFERENCE)
    for name in ("table_ii", "table_iii", "table_iv", "latency", "summary", "placement", "profile"):
        assert len(run.load_table(name)), name
    for name in ("fig2a", "fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8", "table_iii", "table_iv"):
        assert (run.figures / f"{name}.png").stat().st_size > 10_000, name
        assert (run.figures / f"{name}.svg").is_file()
    assert len(list(run.notebooks.glob("*.ipynb"))) == 7
    assert run.manifest_path.is_file()
