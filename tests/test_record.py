"""Published values, the verdict rule at its edges, intervals, the run folder, and the summary of a run."""

import math

import numpy as np
import pandas as pd
import pytest

from detransformer.files import computing_part
from detransformer.record.intervals import around, bootstrap_median, bootstrap_ratio, samples_of
from detransformer.record.published import published, published_claim
from detransformer.record.run import RunFolder
from detransformer.record.verdict import COLUMNS, Verdict, verdicts
from detransformer.tables.accuracy import table_iii
from detransformer.tables.latency import table_ii
from detransformer.tables.summary import summarise
from table_frames import accuracy_rows, row

NAN = float("nan")


@pytest.mark.parametrize(
    ("expected", "obtained", "neutral", "said"),
    [
        (2.0, None, 1, "not tested"),
        (2.0, NAN, None, "not tested"),
        (2.81, 2.6, 1, "matches"),  # an effect of 1.6 for 1.81
        (2.81, 2.5, 1, "holds, smaller"),  # within 15% of the ratio, not of the effect
        (1.25, 1.12, 1, "holds, smaller"),
        (2.0, 2.16, 1, "holds, larger"),
        (2.0, 1.0, 1, "does not hold"),
        (1.08, 0.95, 1, "does not hold"),  # near, but a slowdown
        (0.5, 0.3, 1, "holds, larger"),  # a larger reduction
        (-4.0, 4.0, 0, "does not hold"),
        (0.0, 0.5, 0, "differs, larger"),  # no effect was published
        (1.57, 1.9, None, "differs, larger"),
        (1.57, 1.2, None, "differs, smaller"),
        ("yes", "yes", None, "matches"),
        ("yes", "no", None, "does not hold"),
    ],
)
def test_values_are_judged_by_their_effect(expected, obtained, neutral, said):
    assert Verdict("a claim", expected, obtained, "measured", neutral=neutral).judged == said


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(2.0, 2.9, "matches"), (2.0, 2.7, "holds, smaller"), (0.9, 2.9, "within noise"), (NAN, NAN, "holds, smaller")],
)
def test_an_interval_decides_where_there_is_one(low, high, said):
    assert Verdict("a speedup", 2.81, 2.4, "emulated", low=low, high=high, neutral=1).judged == said


@pytest.mark.parametrize(
    ("side", "obtained", "interval", "said"),
    [
        ("at least", 0.95, (NAN, NAN), "holds"),
        ("at least", 0.94, (NAN, NAN), "does not hold"),
        ("at most", 0.94, (0.90, 0.96), "within noise"),
        ("above", 0.95, (NAN, NAN), "does not hold"),
        ("below", 0.5, (0.4, 0.6), "holds"),
        ("at least", NAN, (NAN, NAN), "not tested"),
    ],
)
def test_limits_have_a_side(side, obtained, interval, said):
    low, high = interval
    found = Verdict("a share", 0.95, obtained, "measured", low=low, high=high, side=side)
    assert found.judged == said and found.row["expected"] == f"{side} 0.95"


def test_what_is_made_to_match_has_no_verdict_and_what_cannot_speak_is_not_tested():
    assert Verdict("a pace", 1.57, 1.57, "by construction").judged == "not judged"
    assert Verdict("a fit", 1.57, 9.0, "fitted").judged == "not judged"
    assert Verdict("accuracy at chance", 80.0, 50.0, "measured", tested=False).judged == "not tested"
    with pytest.raises(ValueError, match="kind 'guessed' is unknown; choose one of by construction"):
        Verdict("a claim", 1.0, 1.0, "guessed")
    with pytest.raises(ValueError, match="side 'near' is unknown; choose one of at least"):
        Verdict("a claim", 1.0, 1.0, "measured", side="near")


@pytest.mark.parametrize(("obtained", "said"), [(24, "matches"), (25, "differs, larger")])
def test_counts_must_be_equal(obtained, said):
    assert Verdict("a count", 24, obtained, "measured", tolerance=0).judged == said


def test_rows_from_sequences_and_mappings():
    assert verdicts([1.57], [1.57], "measured", ["s"])["judged"].tolist() == ["matches"]
    frame = verdicts({"a": 2.0, "b": 3.0}, {"a": 1.0}, "predicted")
    assert list(frame.columns) == COLUMNS and frame["obtained"].dtype == float
    assert frame["claim"].tolist() == ["a", "b"] and frame["judged"].tolist() == ["differs, smaller", "not tested"]
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        verdicts([1, 2], [1], "measured", ["a", "b"])


def test_a_bootstrap_interval_pairs_the_rounds():
    """What slows a whole round slows both methods, so that their ratio stays sharp; shuffled, it does not."""
    rounds = 1 + np.random.default_rng(1).exponential(0.3, 20)
    low, high = bootstrap_ratio(2.0 * rounds, rounds)
    assert low == high == pytest.approx(2.0)
    shuffled = bootstrap_ratio(2.0 * rounds, rounds[::-1])
    assert shuffled[0] < 2.0 < shuffled[1] and shuffled == bootstrap_ratio(2.0 * rounds, rounds[::-1])
    with pytest.raises(ValueError, match="3 and 2 samples cannot be paired"):
        bootstrap_ratio([1, 2, 3], [1, 2])


def test_a_median_has_an_interval_from_ten_samples_on():
    """It holds the median, is as wide as the samples differ, and is the same each time."""
    samples = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.2, 0.8, 1.0, 1.0]
    low, high = bootstrap_median(samples)
    assert 0.9 <= low < 1.0 < high <= 1.1 and (low, high) == bootstrap_median(samples)
    assert bootstrap_median([2.0] * 10) == (2.0, 2.0)
    assert all(math.isnan(end) for end in bootstrap_median(samples[:9]))


def test_intervals_of_seeds_and_samples_of_cells():
    assert around(1.0, 0.1) == (0.8, 1.2) and np.isnan(around(1.0, NAN)).all()
    assert samples_of("[1.5, 2]") == [1.5, 2.0] and samples_of(NAN) == []


def test_published_tables_are_the_papers():
    assert published_claim("single_device_latency_bert_base") == 1.57
    assert published("table_iv")["over_tp"].max() == 2.81 == published_claim("max_speedup_over_tp")
    assert published("table_iii").shape == (11, 8) and published("table_ii").shape == (5, 4)
    with pytest.raises(ValueError, match="'table_x'.*table_iii"):
        published("table_x")
    with pytest.raises(ValueError, match="'speed'.*max_speedup_over_tp"):
        published_claim("speed")


def test_table_is_saved_as_csv_with_a_note(tmp_path):
    run = RunFolder(tmp_path)
    frame = pd.DataFrame({"task": ["a|b", "c"], "value": [0.123456, None]})
    assert run.save_table(frame, "accuracy", note="Built-in data,\n10 rows.") is frame
    assert run.load_table("accuracy")["value"].iloc[0] == 0.123456, "the CSV keeps every digit"
    run.save_table(frame, "other")
    assert run.notes() == {"accuracy": "Built-in data, 10 rows."}
    with pytest.raises(ValueError, match="no rows"):
        run.save_table(frame.head(0), "accuracy")
    assert sorted(p.name for p in run.tables.iterdir()) == ["accuracy.csv", "notes.json", "other.csv"]


def test_missing_and_damaged_tables_name_their_notebook(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="'latency' is not in .*run 06_latency first"):
        run.load_table("latency", "06_latency")
    (run.tables / "latency.csv").write_text('a,b\n"1,2\n3')
    with pytest.raises(ValueError, match="latency.csv cannot be read.*run 06_latency again"):
        run.load_table("latency", "06_latency")
    (run.tables / "latency.csv").write_text("")
    with pytest.raises(ValueError, match="latency.csv cannot be read"):
        run.load_table("latency")


def test_summary_of_an_empty_run_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="'latency' is not in .*run 06_latency first"):
        summarise(RunFolder(tmp_path))


def partial_run(tmp_path, methods, link="line-rate"):
    run = RunFolder(tmp_path)
    rows = [row("bert-base", "single")]
    rows += [row("bert-base", method, 125, link) | {"latency_s": latency} for method, latency in methods.items()]
    run.save_table(pd.DataFrame(rows), "latency")
    run.save_table(table_ii(pd.DataFrame(rows), published("table_ii")), "table_ii")
    run.save_table(table_iii(accuracy_rows(1), published("table_iii")), "table_iii")
    return run


def test_summary_of_a_partial_run(tmp_path):
    run = partial_run(tmp_path, {"tp": 1.4, "sp": 1.1, "bp+paper": 0.7, "bp+auto": 0.5})
    summary = summarise(run).set_index("claim")
    assert summary.loc["single device latency bert base", "judged"] == "not judged"
    assert np.isnan(summary.loc["single device latency bert large", "obtained"])
    assert summary.loc["tp allreduce count bert base", "judged"] == "matches"
    found = summary.loc["BP+Auto over TP, BERT-Base, 125 Mbps", ["where", "link", "obtained", "judged"]]
    assert found.tolist() == ["Table IV", "line-rate", 2.0, "holds, smaller"], "the paper's plans are compared"
    ours = summary.loc["BP+Auto over TP, BERT-Base, 125 Mbps (our plans)", ["where", "obtained", "judged"]]
    assert ours.tolist() == ["Table IV (our plans)", pytest.approx(2.8), "matches"], "ours stands in a row of its own"
    assert summary.loc["BP+Auto over TP, BERT-Base, 250 Mbps", "judged"] == "not tested"
    assert summary.loc["max speedup over tp", "obtained"] == pytest.approx(2.0)
    assert summary.loc["max speedup over tp (our plans)", "obtained"] == pytest.approx(2.8)
    counts = summary["where"].value_counts()
    assert (summary.loc[summary["where"] == "Table IV", "judged"] == "not tested").sum() == 18
    assert counts["Table IV (our plans)"] == 2, "what ours was not measured for is no claim"
    assert counts["Table III"] == 55 and counts["Table II"] == 15
    differences = summary.loc[summary["where"] == "Table III (difference)", "judged"]
    assert differences.tolist() == ["not tested"] * 45, "one seed says nothing"


def test_each_link_has_its_own_claims(tmp_path):
    run = partial_run(tmp_path, {"tp": 1.4, "bp+paper": 0.7})
    modelled = [row("bert-base", m, 125, "modelled") | {"latency_s": t} for m, t in (("tp", 2.8), ("bp+paper", 1.0))]
    run.save_table(pd.concat([run.load_table("latency"), pd.DataFrame(modelled)]), "latency")
    summary = summarise(run)
    cells = summary[summary["claim"] == "BP+Auto over TP, BERT-Base, 125 Mbps"].set_index("link")
    assert cells["obtained"].to_dict() == {"line-rate": pytest.approx(2.0), "modelled": pytest.approx(2.8)}
    assert cells["judged"].to_dict() == {"line-rate": "holds, smaller", "modelled": "matches"}


def test_words_of_a_module_compute_nothing(tmp_path):
    """A docstring or comment may change without making a saved result stale; anything else may not."""
    texts = {
        "one.py": '"""Adds."""\n\ndef add(x):\n    """Adds one."""\n    return x + 1  # one\n',
        "words.py": '"""Sums."""\n\ndef add(x):\n    return x + 1\n',
        "two.py": '"""Adds."""\n\ndef add(x):\n    """Adds one."""\n    return x + 2  # one\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    one, words, two = (computing_part(tmp_path / name) for name in texts)
    assert one == words != two
    (tmp_path / "rows.csv").write_text("a\n1\n")
    assert computing_part(tmp_path / "rows.csv") == b"a\n1\n"
