"""The README's tables are those of the committed run, and what it points to is there."""

import math
import re

import pandas as pd
import pytest

from coformer_frames import MODEL, coformer_frames, missing_rows
from coformer_frames import run_rows as coformer_runs
from detransformer.files import repository_root
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.report import coformer_tables
from detransformer.report.accuracy_tables import table_iii
from detransformer.report.claims import summarise
from detransformer.report.peers import methods_table
from detransformer.report.readme import FILES, REFERENCE, SECTIONS, render
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


@pytest.mark.parametrize("name", FILES)
def test_tables_are_those_of_the_reference_run(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert render(text, RunFolder(ROOT / REFERENCE), FILES[name]) == text, "run `python -m detransformer.report.readme`"


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
    tables += ("predictor", "proxy", "search", "policies", "constraints", "decomposition", "coformer", "which_one")
    tables += tuple(f"coformer_{name}" for name in ("runs", "ablation", "aggregators", "devices", "budgets", "rules"))
    tables += tuple(f"coformer_{name}" for name in ("recipes", "equal_flops", "missing", "latency", "text"))
    for name in (*tables, "methods", "wire", "pace", "overlap", "scaling", "prediction", "timeline", "efficiency"):
        assert len(run.load_table(name)), name
    figures = ("fig2a", "fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8", "table_iii", "table_iv")
    figures += ("plan_map", "choices", "predicted", "unequal", "trace", "generation", "perplexity", "scale_out")
    figures += ("pretraining_loss", "placements", "calibration", "table_iii_noise", "wire_accuracy")
    figures += ("predictor", "proxy", "search", "policies", "coformer_aggregators", "coformer_devices")
    figures += ("coformer_bandwidth", "coformer_tradeoff", "coformer_energy")
    for name in (*figures, "bandwidth", "parts", "timeline", "wire"):
        assert (run.figures / f"{name}.png").stat().st_size > 10_000, name
        assert (run.figures / f"{name}.svg").is_file()
    for name in ("coformer_ablation", "coformer_aggregators", "coformer_devices"):  # Tables III, IV and V
        assert run.load_table(name).query("num_seeds > 1")["num_seeds"].min() >= 3, name
    assert len(list(run.notebooks.glob("*.ipynb"))) == 10
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
        "Table IV, speedups over TP and SP, modelled link",
        "Table IV (our plans), speedups over TP and SP, line-rate link",
        "Table IV (our plans), speedups over TP and SP, modelled link",
    ]
    ours = "| BP+Auto over TP, the largest published (BERT-Base, 125 Mbps) (our plans), modelled link |"
    assert any(line.startswith(ours) for line in lines)
    assert any("| by construction | not judged | 06 |" in line for line in lines)


def headline_rows(run: RunFolder) -> dict[str, list[str]]:
    lines = SECTIONS["headline"][0](run).splitlines()[2:]
    return {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}


def test_the_first_table_has_a_row_a_claim_and_only_of_what_was_run(tmp_path):
    run = run_of_all_methods(tmp_path)
    rows = headline_rows(run)
    assert len(rows) == 4
    paper, here, kind, sure = rows["Block over tensor parallelism (BERT-Base, 4 devices, 125 Mbps)"]
    assert (paper, kind) == ("2.81x", "emulated") and "x with the paper's plans; " in here
    assert sure == "2 requests a row, no interval; roofline pace (small products cost no more)"
    (decoupling,) = [cells for claim, cells in rows.items() if claim.startswith("What decoupling itself buys")]
    assert decoupling[0] == "-" and " at 125 Mbps" in decoupling[1]
    same = rows["Every plan computes what one device computes"]
    assert same[1].startswith("relative error ") and same[2] == "measured"

    run.save_table(table_iii(accuracy_rows(3), published("table_iii"), "", pretraining_rows()), "table_iii")
    save_chaos(run)
    rows = headline_rows(run)
    assert rows["Accuracy after decoupling (Table III)"][:2] == ["100.9% of the original's", "100.9%"]
    assert rows["Requests lost, wrong, answered twice under 2 faults"][1] == "2, 0, 0 of 800"


def test_a_model_at_chance_tests_no_accuracy(tmp_path):
    run, scores = run_of_all_methods(tmp_path), accuracy_rows(3)
    guessed = ~scores["task"].isin(["SST-2"])
    scores.loc[guessed, "score"] = scores["majority_score"] + 1.0
    run.save_table(table_iii(scores, published("table_iii"), "", pretraining_rows()), "table_iii")
    here = headline_rows(run)["Accuracy after decoupling (Table III)"][1]
    assert here.startswith("not tested: the original has learned 1 of 5 tasks; SST-2 ")


def test_intervals_are_shown_where_rounds_were_interleaved(tmp_path):
    run = run_of_all_methods(tmp_path)
    latency = run.load_table("latency")
    samples = [str([latency_s * (1 + i / 100) for i in range(10)]) for latency_s in latency["latency_s"]]
    run.save_table(latency.assign(samples_s=samples, repeats=10, pace="measured"), "latency")
    here, _, sure = headline_rows(run)["Block over tensor parallelism (BERT-Base, 4 devices, 125 Mbps)"][1:]
    assert here.count(" to ") == 2 and sure == "10 requests a row, 95% intervals; paced by measured efficiency"


def test_a_section_needs_its_place_only_where_the_run_has_its_table(tmp_path):
    run = run_of_all_methods(tmp_path)
    readme = "<!-- headline -->\n<!-- /headline -->\n<!-- claims -->\n<!-- /claims -->\n"
    place = "<!-- table_iv -->\n<!-- /table_iv -->\n"
    with pytest.raises(ValueError, match="'peers'.*<!-- peers -->"):
        render(readme + place, run)
    (run.tables / "methods.csv").unlink()
    text = render(readme + place, run)
    assert "all_reduces of TP" in text


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
    kept = "at least 98% of the original's mean over all tasks: holds (100.9 ± 0.0%, published 100.9%)."
    assert f"BERT-Base Nb=4, Ndiv=4, {kept}" in text
    assert "Of 30 differences to the original on tasks that it has learned," in text
    assert "published table is one seed a cell" in text
    assert "BERT-Base, slope over the number of original layers (Ndiv=4):" in text and "BERT-Large" not in text
    assert "int8 by 0.40 points at most (8 of 10 within 0.3)" in text
    assert "(Nb=4, Ndiv=4), held-out loss: first +0.050 ± 0.010" in text
    assert "distilled 3.832 (3,000,000 tokens)" in text and "the original 3.500" in text


def test_accuracy_of_one_seed_is_not_judged(tmp_path):
    text = SECTIONS["table_iii"][0](run_with_accuracy(tmp_path, num_seeds=1))
    assert "No difference to the original can be judged: nothing is learned, or by one seed a cell." in text
    assert "not tested (one seed): CoLA" in text and "over all tasks: not tested, since" in text


def test_accuracy_of_an_older_run_leaves_the_text_as_it_is(tmp_path):
    run = RunFolder(tmp_path)
    run.save_table(table_iii_rows(), "table_iii")
    readme = "<!-- table_iii -->\nas it was\n<!-- /table_iii -->\n"
    assert render(readme, run) == readme
    assert "as it was" not in render(readme, run_with_accuracy(tmp_path / "new"))


def test_which_one_names_the_fastest_and_what_it_costs(tmp_path):
    run, runs = RunFolder(tmp_path), coformer_runs().assign(seconds=60.0)
    accuracies = coformer_tables.accuracies_of(runs, MODEL)
    run.save_table(coformer_tables.which_one(coformer_frames()["coformer_latency"], accuracies), "which_one")
    run.save_table(coformer_tables.missing_summary(missing_rows()), "coformer_missing")
    recipes = coformer_tables.recipe_table(runs, pd.DataFrame(), MODEL, "400 steps, hard targets")
    run.save_table(recipes, "coformer_recipes")
    text = SECTIONS["which_one"][0](run)
    assert "fastest of all is CoFormer" in text
    assert text.startswith("In short, by prediction: for the large model's own answers take one device")
    assert "those of a small ViT give up 3.0 points (400 steps, hard targets)" in text
    assert "- One of three devices lost, aggregator coformer: 30.0% instead of 57.0%." in text
    assert "| CoFormer | 400 steps, hard targets | 57.0 ± 0.1 | 3.0 | 14.0 | 8.8x |" in text


def save_chaos(run: RunFolder) -> None:
    row = dict(rounds=5, served_s=8.04, requests=400, lost=0, wrong=0, twice=0, held=True)
    rows = [row | dict(fault="killed", named_s=0.9), row | dict(fault="stranger", named_s=math.nan, lost=2, held=False)]
    run.save_table(pd.DataFrame(rows), "chaos")
    dates = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:05:10+00:00")
    run.save_table(pd.DataFrame({"date": dates, "hardware": "2 cores (a processor)"}), "chaos_rounds")


def test_faults_are_counted(tmp_path):
    run = RunFolder(tmp_path)
    save_chaos(run)
    text = SECTIONS["faults"][0](run)
    assert "| killed | 5 | 0.9 | 8.0 | 400 | 0, 0, 0 |" in text and "| stranger | 5 | - | 8.0 | 400 | 2, 0, 0 |" in text
    soak = dict(
        minutes=30,
        capacity_per_s=52.1,
        answered_per_s=40.2,
        p50_s=0.04,
        p99_s=6.24,
        slowest_s=9.0,
        front_growth=0.01,
        devices_growth=-0.002,
        asked=900,
        answered=900,
    )
    run.save_table(pd.DataFrame([soak | dict(lost=0, wrong=0, twice=0, expired=3, faults=29)]), "soak")
    text = SECTIONS["faults"][0](run)
    assert "30 minutes of load at 40 of 52 requests a second, with 29 faults: 900 requests, 0 lost" in text
    assert "p50 40 ms, p99 6.2 s, slowest 9.0 s; memory +1.0% (front), -0.2% (devices)." in text


def test_coverage_is_told_with_the_room_that_has_least(tmp_path):
    run = RunFolder(tmp_path)
    rows = pd.DataFrame({"room": ["models", "cluster"], "lines": [100, 300], "run": [99, 240], "share": [0.99, 0.8]})
    run.save_table(rows, "coverage")
    assert "run 85% of the package's lines, least of `cluster` (80%;" in SECTIONS["coverage"][0](run)
