"""Tables made of saved rows are what they were: golden values that the code before `tables` gave for the same rows.

`golden/tables/saved/` has rows of the committed run, `golden/tables/` what was made of them. Where the two differ on
purpose, it is said here.
"""

from pathlib import Path

import adaptive_studies as adaptive
import pandas as pd
import pretraining_studies as variants
import pytest

from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.tables import accuracy, claims, latency, peers, summary

GOLDEN = Path(__file__).parent / "golden" / "tables"
# Columns that are no more: nothing showed them.
GONE = {
    "trends": ["published_rank", "obtained_rank", "one_seed_std_error", "expected_sign"],
    "table_iii": ["published_seeds"],
}


def saved(name: str) -> pd.DataFrame:
    return pd.read_csv(GOLDEN / "saved" / f"{name}.csv")


@pytest.fixture(scope="module")
def rows():
    return saved("latency")


@pytest.fixture(scope="module")
def scores():
    return accuracy.table_iii(saved("accuracy_runs"), published("table_iii"), "reference", saved("pretraining"))


def rounded(value: object) -> object:
    """A number, or text that is one, to nine digits; other text as it is."""
    try:
        return f"{float(value) + 0.0:.9g}" if abs(float(value)) > 1e-12 else "0"
    except (TypeError, ValueError):
        return value


def check(found: pd.DataFrame, name: str, keys: list[str], tmp_path: Path) -> None:
    """The same rows and values, whatever their order."""
    expected = pd.read_csv(GOLDEN / f"{name}.csv").drop(columns=GONE.get(name, []))
    found.to_csv(tmp_path / "found.csv", index=False)
    found = pd.read_csv(tmp_path / "found.csv")
    assert sorted(found) == sorted(expected)
    order = [frame.sort_values(keys, ignore_index=True)[sorted(frame)] for frame in (found, expected)]
    pd.testing.assert_frame_equal(*order, check_dtype=False, rtol=1e-6, atol=1e-12)


PLACE = ["model", "bandwidth_mbps"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("table_iv", [*PLACE, "baseline", "variant"]),
        ("table_ii", ["approach"]),
        ("methods", [*PLACE, "name"]),
        ("wire", [*PLACE, "method", "wire"]),
        ("scaling", [*PLACE, "method", "num_devices"]),
        ("prediction", ["method"]),
        ("efficiency", ["model", "weights", "strategy", "num_chunks"]),
        ("pace", [*PLACE, "method"]),
        ("fig7_error", [*PLACE, "method"]),
    ],
)
def test_tables_of_latency(rows, name, keys, tmp_path):
    make = {
        "table_iv": lambda: latency.table_iv(rows, published("table_iv")),
        "table_ii": lambda: latency.table_ii(rows, published("table_ii")),
        "methods": lambda: peers.methods_table(rows),
        "wire": lambda: peers.wire_table(rows),
        "scaling": lambda: peers.scaling_table(rows),
        "prediction": lambda: peers.prediction_error(rows),
        "efficiency": lambda: peers.efficiency_table(saved("profile")),
        "pace": lambda: peers.pace_table(rows),
        # Published points that were not measured stay in the table now, and the paper's BP+Auto is called what was run.
        "fig7_error": lambda: peers.fig7_error(rows, published("fig7")).dropna().replace({"bp+paper": "bp+auto"}),
    }
    check(make[name](), name, keys, tmp_path)


def test_table_iii_and_what_is_counted_from_it(scores, tmp_path):
    cell = [*accuracy.ROW_COLUMNS, "task"]
    check(scores, "table_iii", cell, tmp_path)
    scores.to_csv(tmp_path / "table_iii.csv", index=False)
    for table in (scores, pd.read_csv(tmp_path / "table_iii.csv")):
        check(accuracy.mean_score(table), "mean_score", [*accuracy.ROW_COLUMNS, "over"], tmp_path)
        check(accuracy.trends(table), "trends", ["model", "trend", "task"], tmp_path)
    wire = variants.wire_table(saved("accuracy_runs"))
    check(wire, "wire_accuracy", ["row", "task", "wire"], tmp_path)


def test_choices_and_their_verdicts(tmp_path):
    where = ["model", "num_devices", "bandwidth_mbps", "seq_len"]
    check(adaptive.choice_cells(saved("choices")), "choice_cells", where, tmp_path)
    verdicts = adaptive.adaptive_verdicts(adaptive.choice_cells(saved("choices")), saved("unequal"), saved("trace"))
    expected = pd.read_csv(GOLDEN / "adaptive.csv")
    kept = expected[~expected["claim"].str.startswith("texts")]  # generated texts are judged in notebook 10
    verdicts.to_csv(tmp_path / "found.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "found.csv"), kept, rtol=1e-6)


def test_every_claim_and_the_six_of_the_readme(rows, scores, tmp_path):
    run = RunFolder(tmp_path / "run")
    for name, table in {"latency": rows, "table_iii": scores, "chaos": saved("chaos")}.items():
        run.save_table(table, name)
    run.save_table(latency.table_ii(rows, published("table_ii")), "table_ii")
    # Tables II and III are made by 07 and 02 now; words and numbers stand in one column: numbers are rounded here.
    found = summary.summarise(run).replace({"notebook": {"07_peers": "06_latency", "02_pretraining": "03_accuracy"}})
    found.to_csv(tmp_path / "summary.csv", index=False)
    both = [pd.read_csv(path).map(rounded) for path in (tmp_path / "summary.csv", GOLDEN / "summary.csv")]
    pd.testing.assert_frame_equal(*both)
    expected = pd.read_csv(GOLDEN / "claims.csv")
    expected = expected[~expected["claim"].str.startswith("Accuracy after")]  # of a pretrained model now: see below
    six = claims.claims_table(run)
    assert six["claim"].tolist() == expected["claim"].tolist() and six["paper"].tolist() == expected["paper"].tolist()
    assert six["kind"].tolist() == expected["kind"].tolist()
    # "Ours" is called "our plans" everywhere, and all parts are separated by a semicolon.
    reworded = {"with our plans": "with ours", "ours (BP+Auto)": "ours", "Mbps, ": "Mbps; "}

    def plain(text: str) -> str:
        for old, new in reworded.items():
            text = text.replace(old, new)
        return text

    assert [plain(text) for text in six["here"]] == [plain(text) for text in expected["here"]]


def test_the_claim_of_accuracy_is_the_longest_training_of_each_structure():
    rows = [("m original", 60.0, None, None), ("m Nb=2, Ndiv=4, sliced", 30.0, 29.0, 31.0)]
    rows += [("m Nb=2, Ndiv=4, 1,000 tokens", 57.0, 94.0, 96.0), ("m, 3 layers, 1,000 tokens", 54.0, 89.0, 91.0)]
    rows += [("bag of words", 51.0, 84.0, 86.0)]
    shares = pd.DataFrame(rows, columns=["row", "mean", "low", "high"])
    shares = shares.assign(how="probe", share=shares["mean"] / 0.6, num_tasks=3, tasks="CoLA, SST-2, MRPC")
    shares = shares.assign(judged=["", *["does not hold"] * 3, ""])
    probes = shares.assign(task="retrieval@1", score=shares["mean"] / 2)
    claim = claims.accuracy_claim(shares, probes)
    decoupled = "m Nb=2, Ndiv=4, 1,000 tokens: 95.0% (94.0 to 96.0) by probes"
    assert claim[2] == f"{decoupled}; m, 3 layers, 1,000 tokens: 90.0% (89.0 to 91.0) by probes"
    assert "CoLA, SST-2, MRPC" in claim[4] and claims.accuracy_claim(shares.head(1), probes) is None
    assert "counting words has 85.0%" in claim[4]
    assert "falls from 30.0 to 28.5 and 27.0; one calibration each" in claim[4]
    tuned = shares.iloc[[0, 2]].assign(how="fine-tuned", share=70.0, low=60.0, high=80.0, num_seeds=3)
    claim = claims.accuracy_claim(pd.concat([shares, tuned]), probes)
    assert claim[2] == f"{decoupled}, 70.0% (60.0 to 80.0) fine-tuned", "the others were not fine-tuned"
    assert "over 3 paired seeds or more" in claim[4]


def test_the_gain_of_decoupling_names_the_cores_that_may_set_the_pace(rows):
    gains = [(4, "AVX2", 125, 1.2), (4, "AVX-512", 125, 1.1), (4, "none", 125, 1.3), (1, "AVX2", 125, 1.5)]
    gains = pd.DataFrame(gains, columns=["num_original_layers", "core", "bandwidth_mbps", "gain"])
    _, what, _ = claims.latency_claims(rows, gains)
    assert what[4].endswith("; priced from 2 timings of cores: 1.10 to 1.20 at 125 Mbps")
