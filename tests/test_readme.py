"""The README's tables are those of the committed run, and what it points to is there."""

import re

import pytest

from detransformer.files import repository_root
from detransformer.report.claims import summarise
from detransformer.report.expected import published
from detransformer.report.peers import methods_table
from detransformer.report.readme import REFERENCE, SECTIONS, render
from detransformer.report.runs import RunFolder
from detransformer.training.summary import table_iii
from report_frames import (
    WAIT_S,
    accuracy_rows,
    calibration_rows,
    communication_s,
    latency_rows,
    placement_rows,
    pretraining_rows,
    table_iii_rows,
    wire_rows,
)

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
    tables += (
        "pretraining",
        "pretraining_loss",
        "placements",
        "widths",
        "calibration",
        "accuracy_runs",
        "wire_accuracy",
    )
    tables += ("wire_accuracy", "training_throughput", "training_throughput_loss")
    for name in (*tables, "methods", "wire", "reads", "scaling", "prediction", "fit", "timeline", "efficiency"):
        assert len(run.load_table(name)), name
    figures = ("fig2a", "fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8", "table_iii", "table_iv")
    figures += ("plan_map", "choices", "predicted", "unequal", "trace", "generation", "perplexity", "scale_out")
    figures += ("pretraining_loss", "placements", "calibration", "table_iii_noise", "wire_accuracy", "throughput")
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


def run_with_accuracy(tmp_path, num_seeds=3) -> RunFolder:
    run = RunFolder(tmp_path)
    run.save_table(table_iii(accuracy_rows(num_seeds), published("table_iii"), "", pretraining_rows()), "table_iii")
    return run


def test_accuracy_is_told_in_a_table_and_in_sentences(tmp_path):
    run = run_with_accuracy(tmp_path)
    for name, frame in (
        ("wire_accuracy", wire_rows()),
        ("placements", placement_rows()),
        ("calibration", calibration_rows()),
    ):
        run.save_table(frame, name)
    text = SECTIONS["table_iii"][0](run)
    assert "| BERT-Base Nb=4, Ndiv=4 | 5 | 75.8 (100.9%) | 60.6 (100.9 ± 0.0%) | 50.4 |" in text
    assert "keeps 100.9 ± 0.0% of the original's mean over all tasks (published 100.9%; at least 98%: yes)" in text
    assert "Of 30 differences to the original," in text and "published table is one seed a cell" in text
    assert "BERT-Base over Nb at Ndiv=4, by the slope:" in text and "BERT-Large" not in text
    assert "int8 by 0.40 points at most (8 of 10 within 0.3)" in text
    assert "(Nb=4, Ndiv=4), held-out loss: first +0.050 ± 0.010" in text
    assert "distilled 3.832 (3,000,000 tokens)" in text and "the original 3.500" in text


def test_accuracy_of_one_seed_is_not_judged(tmp_path):
    text = SECTIONS["table_iii"][0](run_with_accuracy(tmp_path, num_seeds=1))
    assert "No difference to the original can be judged: one seed a cell." in text and "one seed: CoLA" in text


def test_accuracy_of_an_older_run_leaves_the_text_as_it_is(tmp_path):
    run = RunFolder(tmp_path)
    run.save_table(table_iii_rows(), "table_iii")
    readme = "<!-- table_iii -->\nas it was\n<!-- /table_iii -->\n"
    assert render(readme, run) == readme
    assert "as it was" not in render(readme, run_with_accuracy(tmp_path / "new"))
