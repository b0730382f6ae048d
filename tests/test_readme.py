"""The README's tables are those of the committed run, and what it points to is there."""

import re

import pytest

from detransformer.files import repository_root
from detransformer.report.claims import summarise
from detransformer.report.peers import methods_table
from detransformer.report.readme import REFERENCE, SECTIONS, render
from detransformer.report.runs import RunFolder
from report_frames import WAIT_S, communication_s, latency_rows

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
    tables = ("table_ii", "table_iii", "table_iv", "latency", "summary", "placement", "profile")
    tables += ("plan_map", "choices", "choice_cells", "unequal", "trace", "generation", "perplexity", "scale_out")
    for name in (*tables, "methods", "wire", "reads", "scaling", "prediction", "fit", "timeline", "efficiency"):
        assert len(run.load_table(name)), name
    figures = ("fig2a", "fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8", "table_iii", "table_iv")
    figures += ("plan_map", "choices", "predicted", "unequal", "trace", "generation", "perplexity", "scale_out")
    for name in (*figures, "bandwidth", "parts", "timeline", "wire"):
        assert (run.figures / f"{name}.png").stat().st_size > 10_000, name
        assert (run.figures / f"{name}.svg").is_file()
    assert len(list(run.notebooks.glob("*.ipynb"))) == 8
    assert run.manifest_path.is_file()


def run_of_all_methods(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path)
    latency = latency_rows()
    run.save_table(latency, "latency")
    run.save_table(methods_table(latency), "methods")
    run.save_table(summarise(run), "summary")
    return run


def test_peers_are_listed_with_what_they_cost(tmp_path):
    lines = SECTIONS["peers"][0](run_of_all_methods(tmp_path)).splitlines()
    assert lines[0].startswith("BERT-Base on four devices at 125 Mbps, link: line-rate")
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    latency = 1.05 * 1.57 / 4 + communication_s("bp+auto", 125, "int8") + WAIT_S
    assert f"| {latency:.2f} | {4 * latency / 1.57:.2f}x | 114 | 1.2% |" in rows["BP+Auto, int8"]
    assert rows["TP"].endswith("| rounding |") and "| 4.00x |" in rows["Single"]
    assert "DTensor" in rows and not any("[CLS]" in name for name in rows)


def test_claims_name_the_link_where_there_are_several_and_whose_plans(tmp_path):
    lines = SECTIONS["claims"][0](run_of_all_methods(tmp_path)).splitlines()
    groups = [line.split(" | ")[0].strip("| ") for line in lines if " values | " in line]
    assert groups[:5] == [
        "Table II, marks",
        "Table IV, speedups over TP and SP, line-rate link",
        "Table IV, speedups over TP and SP, fitted link",
        "Table IV (our plans), speedups over TP and SP, line-rate link",
        "Table IV (our plans), speedups over TP and SP, fitted link",
    ]
    assert any(line.startswith("| Largest speedup of BP+Auto over TP (our plans), fitted link |") for line in lines)


def test_a_section_needs_its_place_only_where_the_run_has_its_table(tmp_path):
    run = run_of_all_methods(tmp_path)
    readme = "<!-- claims -->\n<!-- /claims -->\n"
    with pytest.raises(ValueError, match="'peers'.*<!-- peers -->"):
        render(readme, run)
    (run.tables / "methods.csv").unlink()
    assert "all_reduces of TP" in render(readme, run), "there is no table_iv.csv either"
