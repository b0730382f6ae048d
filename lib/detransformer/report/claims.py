"""Every published value beside what a run obtained, with its verdict; what the run has not measured is "not run".

Reads the run's saved tables only. Verdicts follow `report.expected`; three more stand here: a count must be equal, a
yes or no of Table II must be the same word, and a difference between two accuracies is judged only where several
seeds say how much the seed alone moves it (`one seed` and `within noise` otherwise).
"""

import math

import pandas as pd

from detransformer.report.expected import COLUMNS, TOLERANCE, judge, published, verdict
from detransformer.report.runs import RunFolder
from detransformer.report.tables import (
    BASELINES,
    MODEL_NAMES,
    links_of,
    select,
    single_latency,
    table_iv,
    valid_rows,
)

SUMMARY_COLUMNS = ["claim", "where", "link", *COLUMNS[1:], "notebook"]


def summarise(run: RunFolder, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """One row a published value: claim, where, link, expected, obtained, ratio, verdict, notebook."""
    parts = [
        text_claims(_table(run, "latency"), tolerance),
        table_ii_claims(_table(run, "table_ii")),
        table_iii_claims(_table(run, "table_iii"), tolerance),
        table_iii_differences(_table(run, "table_iii"), tolerance),
        table_iv_claims(_table(run, "latency"), tolerance),
    ]
    return pd.concat([part.astype(object) for part in parts], ignore_index=True)[SUMMARY_COLUMNS]


def verdict_counts(summary: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each place in the paper got each verdict."""
    place = summary["where"].str.replace(r" \(Rasp.*", "", regex=True)  # the device is not the place
    return pd.crosstab(place, summary["verdict"]).reset_index(names="where")


def text_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The single values of the paper's text: latencies, speedups (a row a link) and collective counts."""
    stated = published("text_claims").set_index("claim")
    latency = valid_rows(latency) if len(latency) else latency
    links = links_of(latency) if len(latency) else []
    at_500 = dict(bandwidth_mbps=500)

    def median(column, model, method, **place):
        return select(latency, model, method, **place)[column].median() if len(latency) else None

    def speedup(model, method, link):
        return single_latency(latency, model) / median("latency_s", model, method, link=link, **at_500)

    def best_over_tp(link):
        cells = table_iv(latency, published("table_iv"))
        return cells[(cells["link"] == link) & (cells["baseline"] == "tp")]["obtained"].max()

    rows = []
    for claim, line in stated.iterrows():
        model = "bert-large" if "bert_large" in claim else "bert-base"
        found: dict[str, float | None] = {}
        exact, neutral = tolerance, None
        if claim.startswith("single_device_latency"):
            found[""] = single_latency(latency, model) if len(latency) else None
        elif "speedup_over_single" in claim:
            method, neutral = "bp+auto" if "bp_auto" in claim else "tp", 1
            if len(latency) and single_latency(latency, model):
                found = {link: speedup(model, method, link) for link in links}
        elif claim == "max_speedup_over_tp":
            found, neutral = {link: best_over_tp(link) for link in links}, 1
        elif "_count_" in claim:
            method = "bp+tp" if claim.startswith("bp_tp") else "tp"
            kind = "all_gather" if "allgather" in claim else "all_reduce"
            found[""], exact = median(f"{kind}_count", "bert-base", method), 0
        else:  # a claim of a paper or a section that this summary does not measure
            found[""] = None
        for link, obtained in (found or {"": None}).items():
            row = verdict(line["value"], obtained, exact, neutral, claim.replace("_", " "))
            rows.append(row.assign(where=line["where"], link=link, notebook="06_latency"))
    return pd.concat(rows, ignore_index=True)


def table_ii_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Table II: the paper's tick or cross for each approach and attribute, and what was measured."""
    found = table.set_index("approach") if len(table) else table
    rows = []
    for _, marks in published("table_ii").iterrows():
        approach = marks["method"].upper()
        for attribute in marks.index.drop("method"):
            known = len(found) and approach in found.index
            obtained = found.loc[approach, f"{attribute}_obtained"] if known else "not run"
            if obtained == "not run":
                obtained, said = None, "not run"
            else:
                said = "matches" if obtained == marks[attribute] else "does not hold"
            link = found.loc[approach, "link"] if known else ""
            claim = f"{approach}: {attribute.replace('_', ' ')}"
            rows.append((claim, "Table II", link, marks[attribute], obtained, None, said, "06_latency"))
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def table_iii_claims(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table III, every cell as it stands. A smaller model trained on fewer rows is not expected to reach it."""
    cells = _table_iii_cells(table)
    frame = verdict(cells["expected"], cells["obtained_mean"], tolerance, claim=list(cells["claim"]))
    return frame.assign(where="Table III", link="", notebook="03_accuracy")


def table_iii_differences(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table III as the paper argues from it: decoupled minus original, which can be compared between scales."""
    cells = _table_iii_cells(table)
    rows = []
    originals = cells[cells["original"]].set_index(["model", "task"])
    for cell in cells[~cells["original"]].itertuples():
        base = originals.loc[(cell.model, cell.task)]
        expected, obtained = cell.expected - base["expected"], cell.obtained_mean - base["obtained_mean"]
        said = judge(expected, obtained, tolerance, neutral=0)
        if pd.notna(obtained):
            counts = (cell.num_seeds, base["num_seeds"])
            if min(counts) < 2:
                said = "one seed"
            else:
                noise = math.hypot(cell.obtained_std / counts[0] ** 0.5, base["obtained_std"] / counts[1] ** 0.5)
                said = "within noise" if abs(obtained) <= 2 * noise else said  # two standard errors
        ratio = obtained / expected if expected else None
        claim, where = f"{cell.claim}, minus original", "Table III (difference)"
        rows.append((claim, where, "", expected, obtained, ratio, said, "03_accuracy"))
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def table_iv_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table IV, every cell over every link that was measured."""
    if len(latency):
        cells = table_iv(latency, published("table_iv"))
    else:
        cells = published("table_iv").melt(["bandwidth_mbps", "model"], var_name="baseline", value_name="published")
        cells["baseline"] = cells["baseline"].str.removeprefix("over_")
        cells = cells[cells["baseline"].isin(BASELINES)].assign(obtained=None, link="")
    claims = [
        f"BP+Auto over {row.baseline.upper()}, {MODEL_NAMES[row.model]}, {row.bandwidth_mbps:g} Mbps"
        for row in cells.itertuples()
    ]
    frame = verdict(cells["published"], cells["obtained"], tolerance, neutral=1, claim=claims)
    return frame.assign(where="Table IV", link=list(cells["link"]), notebook="06_latency")


def _table(run: RunFolder, name: str) -> pd.DataFrame:
    return run.load_table(name) if run.has_table(name) else pd.DataFrame()


def _table_iii_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The published cells (model, Nb, Ndiv, task) with the obtained mean, spread and seeds, NaN where not run."""
    names = {"cola_mcc": "CoLA", "sst2_acc": "SST-2", "mrpc_acc": "MRPC", "mnli_acc": "MNLI", "squad_acc": "SQuAD"}
    keys = ["model", "num_original_layers", "num_divisions"]
    stated = published("table_iii").set_axis([*keys, *names], axis=1).rename(columns=names)
    cells = stated.melt(keys, list(names.values()), var_name="task", value_name="expected")
    cells["original"] = cells["num_original_layers"] == "original"
    wanted = ["obtained_mean", "obtained_std", "num_seeds"]
    if len(table):
        found = table.copy()
        for key in keys[1:]:
            numbers = pd.to_numeric(found[key], errors="coerce")
            found[key] = ["original" if pd.isna(n) else str(int(n)) for n in numbers]
        cells = cells.merge(found[[*keys, "task", *wanted]], how="left", on=[*keys, "task"])
    else:
        cells[wanted] = float("nan")
    cells["claim"] = [
        f"{c.task}, {MODEL_NAMES[c.model]} " + ("original" if c.original else f"Nb={c[2]}, Ndiv={c[3]}")
        for c in cells.itertuples()
    ]
    return cells
