"""Published values, the verdict rule at its edges, the run folder, and the summary of full, partial and empty runs."""

import pandas as pd
import pytest

from detransformer.report.claims import summarise, table_iii_differences, verdict_counts
from detransformer.report.expected import judge, published, published_claim, verdict
from detransformer.report.runs import RunFolder, to_markdown
from detransformer.training.summary import table_iii
from report_frames import accuracy_rows, pretraining_rows, row


@pytest.mark.parametrize(
    ("expected", "obtained", "neutral", "said"),
    [
        (2.0, None, 1, "not run"),
        (2.0, float("nan"), None, "not run"),
        (2.0, 2.29, 1, "matches"),
        (2.0, 2.31, 1, "holds, larger"),
        (2.0, 1.69, 1, "holds, smaller"),
        (2.0, 1.0, 1, "does not hold"),
        (2.0, 0.5, 1, "does not hold"),
        (1.08, 0.95, 1, "does not hold"),  # within 15%, but a slowdown
        (0.5, 0.3, 1, "holds, larger"),  # a larger reduction
        (-4.0, 4.0, 0, "does not hold"),
        (1.57, 1.9, None, "differs, larger"),
        (1.57, 1.2, None, "differs, smaller"),
    ],
)
def test_the_rule(expected, obtained, neutral, said):
    assert judge(expected, obtained, neutral=neutral) == said


def test_counts_must_be_equal():
    assert judge(24, 24, tolerance=0) == "matches" and judge(24, 25, tolerance=0) == "differs, larger"


def test_rows_from_numbers_sequences_and_mappings():
    assert verdict(1.57, 1.57)["verdict"].tolist() == ["matches"]
    frame = verdict({"a": 2.0, "b": 3.0}, {"a": 1.0})
    assert frame["claim"].tolist() == ["a", "b"] and frame["verdict"].tolist() == ["differs, smaller", "not run"]
    assert frame["ratio"].iloc[0] == 0.5
    with pytest.raises(ValueError, match="2 expected values, 1 obtained"):
        verdict([1, 2], [1])


def test_published_tables_are_the_papers():
    assert published_claim("single_device_latency_bert_base") == 1.57
    assert published("table_iv")["over_tp"].max() == 2.81 == published_claim("max_speedup_over_tp")
    assert published("table_iii").shape == (11, 8) and published("table_ii").shape == (5, 4)
    with pytest.raises(ValueError, match="'table_x'.*table_iii"):
        published("table_x")
    with pytest.raises(ValueError, match="'speed'.*max_speedup_over_tp"):
        published_claim("speed")


def test_table_is_saved_as_csv_and_markdown(tmp_path):
    run = RunFolder(tmp_path)
    frame = pd.DataFrame({"task": ["a|b", "c"], "value": [0.123456, None]})
    assert run.save_table(frame, "accuracy", note="Built-in data, 10 rows.") is frame
    assert run.load_table("accuracy")["value"].iloc[0] == 0.123456, "the CSV keeps every digit"
    text = (run.tables / "accuracy.md").read_text()
    assert "| 0.1235" in text and "a\\|b" in text and text.endswith("\n\nBuilt-in data, 10 rows.\n")
    with pytest.raises(ValueError, match="no rows"):
        run.save_table(frame.head(0), "accuracy")
    assert sorted(p.name for p in run.tables.iterdir()) == ["accuracy.csv", "accuracy.md"]


def test_missing_and_damaged_tables_name_their_notebook(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="'latency' is not in .*run 06_latency first"):
        run.load_table("latency")
    (run.tables / "latency.csv").write_text('a,b\n"1,2\n3')
    with pytest.raises(ValueError, match="latency.csv cannot be read.*run 06_latency again"):
        run.load_table("latency")
    (run.tables / "latency.csv").write_text("")
    with pytest.raises(ValueError, match="latency.csv cannot be read"):
        run.load_table("latency")


def test_markdown_keeps_whole_numbers_and_empty_cells():
    text = to_markdown(
        pd.DataFrame({"n": pd.array([4, None], dtype="Int64"), "x": [123456.7, 1e-9], "b": [True, False]})
    )
    assert "| 4 " in text and "| 123457 | True" in text and "1e-09" in text and "<NA>" not in text


def test_summary_of_an_empty_run_says_not_run_everywhere(tmp_path):
    summary = summarise(RunFolder(tmp_path))
    assert set(summary["verdict"]) == {"not run"} and summary["obtained"].isna().all()
    counts = summary.groupby("where").size()
    assert counts["Table III"] == 55 and counts["Table IV"] == 20 and counts["Table II"] == 15
    stated = published("text_claims")["where"].value_counts()
    assert all(counts[where] == number for where, number in stated.items())


def partial_run(tmp_path, methods, link="line-rate"):
    run = RunFolder(tmp_path)
    rows = [row("bert-base", "single")]
    rows += [row("bert-base", method, 125, link) | {"latency_s": latency} for method, latency in methods.items()]
    run.save_table(pd.DataFrame(rows), "latency")
    return run


def test_summary_of_a_partial_run(tmp_path):
    run = partial_run(tmp_path, {"tp": 1.4, "sp": 1.1, "bp+paper": 0.7, "bp+auto": 0.5})
    summary = summarise(run).set_index("claim")
    assert summary.loc["single device latency bert base", "verdict"] == "matches"
    assert summary.loc["single device latency bert large", "verdict"] == "not run"
    assert summary.loc["tp allreduce count bert base", "verdict"] == "matches"
    found = summary.loc["BP+Auto over TP, BERT-Base, 125 Mbps", ["where", "link", "obtained", "verdict"]]
    assert found.tolist() == ["Table IV", "line-rate", 2.0, "holds, smaller"], "the paper's plans are compared"
    ours = summary.loc["BP+Auto over TP, BERT-Base, 125 Mbps (our plans)", ["where", "obtained", "verdict"]]
    assert ours.tolist() == ["Table IV (our plans)", pytest.approx(2.8), "matches"], "ours stands in a row of its own"
    assert summary.loc["BP+Auto over TP, BERT-Base, 250 Mbps", "verdict"] == "not run"
    assert summary.loc["max speedup over tp", "obtained"] == pytest.approx(2.0)
    assert summary.loc["max speedup over tp (our plans)", "obtained"] == pytest.approx(2.8)
    counts = verdict_counts(summary.reset_index()).set_index(["where", "link"])
    assert counts.loc[("Table IV", "line-rate"), "not run"] == 18
    assert counts.loc["Table IV (our plans)"].iloc[0].sum() == 2, "what ours was not measured for is no claim"


def test_the_fastest_of_the_papers_plans_stands_for_its_auto(tmp_path):
    run = partial_run(tmp_path, {"tp": 1.4, "sp": 1.1, "bp+tp": 0.8, "bp+allgather": 0.7})
    summary = summarise(run).set_index("claim")
    assert summary.loc["BP+Auto over TP, BERT-Base, 125 Mbps", "obtained"] == pytest.approx(2.0)
    assert not any(claim.endswith("(our plans)") for claim in summary.index)


def test_each_link_has_its_own_claims(tmp_path):
    run = partial_run(tmp_path, {"tp": 1.4, "bp+paper": 0.7})
    fitted = [row("bert-base", m, 125, "fitted") | {"latency_s": t} for m, t in (("tp", 2.8), ("bp+paper", 1.0))]
    run.save_table(pd.concat([run.load_table("latency"), pd.DataFrame(fitted)]), "latency")
    summary = summarise(run)
    cells = summary[summary["claim"] == "BP+Auto over TP, BERT-Base, 125 Mbps"].set_index("link")
    assert cells["obtained"].to_dict() == {"line-rate": pytest.approx(2.0), "fitted": pytest.approx(2.8)}
    assert cells["verdict"].to_dict() == {"line-rate": "holds, smaller", "fitted": "matches"}


def test_accuracy_differences_are_judged_only_with_seeds():
    def table(seeds, spread, score):
        rows = [("original", None, None, 50.0), ("cut", 4, 4, score)]
        return pd.DataFrame(
            [
                dict(
                    model="bert-base",
                    num_original_layers=nb,
                    num_divisions=nd,
                    task="CoLA",
                    obtained_mean=value,
                    obtained_std=spread,
                    num_seeds=seeds,
                )  # fmt: skip
                for _, nb, nd, value in rows
            ]
        )

    def said(frame):
        rows = table_iii_differences(frame, 0.15).set_index("claim")
        return rows.loc["CoLA, BERT-Base Nb=4, Ndiv=4, minus original", "verdict"]

    assert said(table(1, None, 51.63)) == "one seed"
    assert said(table(3, 2.0, 51.63)) == "within noise"
    assert said(table(3, 0.1, 51.63)) == "matches"  # the paper: 42.06 - 40.43 = 1.63
    assert said(table(3, 0.1, 45.0)) == "does not hold"


def test_accuracy_differences_follow_the_tables_own_verdict_on_noise(tmp_path):
    run = RunFolder(tmp_path)
    table = table_iii(accuracy_rows(3), published("table_iii"), pretraining=pretraining_rows(2))
    run.save_table(table, "table_iii")
    summary = summarise(run)
    assert (summary["where"] == "Table III").sum() == 55 and (summary["where"] == "Table III (difference)").sum() == 45
    said = summary.set_index("claim")["verdict"]
    assert said["CoLA, BERT-Base Nb=4, Ndiv=4, minus original"] == "holds, smaller", "the seeds are paired"
    assert said["SST-2, BERT-Base Nb=4, Ndiv=8, minus original"] == "within noise", "no difference at all"
    table["beyond_noise"] = table["beyond_noise"].where(table["task"] != "CoLA", False)
    run.save_table(table, "table_iii")
    said = summarise(run).set_index("claim")["verdict"]
    assert said["CoLA, BERT-Base Nb=4, Ndiv=4, minus original"] == "within noise"
    run.save_table(table_iii(accuracy_rows(1), published("table_iii")), "table_iii")
    counts = summarise(run).query("where == 'Table III (difference)'")["verdict"].value_counts()
    assert counts.to_dict() == {"one seed": 30, "not run": 15}
