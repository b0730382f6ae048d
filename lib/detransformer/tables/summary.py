"""Every published value beside what a run obtained, judged by `record.verdict`; reads the run's saved tables only.

Where the paper says BP+Auto, the best of the paper's three plans stands beside the published value; our plans follow in
rows of their own, where they were measured. A count must be equal, and a yes or no of Table II the same word. A score
or a difference of scores is judged only where the models have learned the task.
"""

import math

import pandas as pd

from detransformer.record.intervals import around
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.record.verdict import COLUMNS, TOLERANCE, Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.tables.accuracy import (
    ROW_COLUMNS,
    is_original,
    learned,
    published_cells,
    std_errors,
    structure_names,
)
from detransformer.tables.latency import (
    MODEL_NAMES,
    VARIANTS,
    links_of,
    select,
    single_latency,
    single_rows,
    speedup,
    table_iv,
    valid_rows,
)

OURS = " (our plans)"  # after the claim of a row that no published value was obtained by
SUMMARY_COLUMNS = ["claim", "where", "link", *COLUMNS[2:], "notebook"]


def summarise(run: RunFolder, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """One row a published value: claim, where, link, expected, obtained, low, high, kind, judged, notebook.

    Raises:
        ValueError: for a run that lacks one of the tables, naming the notebook that makes it.
    """
    latency, scores = run.load_table("latency", "06_latency"), run.load_table("table_iii", "02_pretraining")
    parts = [
        text_claims(latency, tolerance),
        table_ii_claims(run.load_table("table_ii", "07_peers")),
        table_iii_claims(scores, tolerance),
        table_iii_differences(scores, tolerance),
        table_iv_claims(latency, tolerance),
    ]
    return pd.concat([part.astype(object) for part in parts], ignore_index=True)[SUMMARY_COLUMNS]


def verdict_counts(summary: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each place in the paper got each verdict."""
    place = summary["where"].str.replace(r" \(Rasp.*", "", regex=True)  # the device is not the place
    return pd.crosstab(place, summary["judged"]).rename_axis(columns=None).reset_index()


def text_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The single values of the paper's text: latencies, speedups (a row a link and variant) and collective counts."""
    rows, links = [], []
    latency = valid_rows(latency)
    for line in published("text_claims").itertuples():
        is_speedup, is_count = "speedup" in line.claim, "_count_" in line.claim
        # An emulated device is paced to its published latency, and random weights send what trained ones would.
        kind = "measured" if is_count else "emulated" if is_speedup else "by construction"
        found = _speedups(line.claim, latency) if is_speedup else {("", "paper"): (_single(line.claim, latency),)}
        for (link, variant), (value, *interval) in found.items():
            low, high = interval or (math.nan, math.nan)
            known = dict(low=low, high=high, neutral=1 if is_speedup else None, tolerance=0 if is_count else tolerance)
            name = line.claim.replace("_", " ") + OURS * (variant == "ours")
            rows.append(Verdict(name, line.value, value, kind, line.where, **known))
            links.append(link)
    return verdict_table(rows).assign(link=links, notebook="06_latency")


def _speedups(claim: str, latency: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(link, variant) -> the obtained speedup and its interval; the paper's variant for every link, ours if measured.

    The largest speedup over TP is that of the cell of Table IV that has the published one, not the largest of ours.
    """
    cells = published("table_iv")
    largest = cells.loc[cells["over_tp"].idxmax()]
    model = "bert-large" if "bert_large" in claim else "bert-base"
    found = {}
    for link in links_of(latency) or [""]:
        at_500 = dict(link=link, bandwidth_mbps=500)
        there = dict(link=link, bandwidth_mbps=largest["bandwidth_mbps"])
        for variant in ("paper", "ours"):
            method = VARIANTS[variant]
            if claim == "max_speedup_over_tp":
                pair = [select(latency, largest["model"], name, **there) for name in ("tp", method)]
            elif "bp_auto_speedup_over_single" in claim:
                pair = [single_rows(latency, model), select(latency, model, method, **at_500)]
            elif "tp_speedup_over_single" in claim and variant == "paper":
                pair = [single_rows(latency, model), select(latency, model, "tp", **at_500)]
            else:
                continue
            value = speedup(*pair)
            if variant == "paper" or value[0] == value[0]:
                found[link, variant] = value
    return found


def _single(claim: str, latency: pd.DataFrame) -> float | None:
    """A claim without a link: a single-device latency in seconds, or collectives of a request."""
    if claim.startswith("single_device_latency"):
        return single_latency(latency, "bert-large" if "bert_large" in claim else "bert-base")
    if "_count_" in claim:
        method = "bp+tp" if claim.startswith("bp_tp") else "tp"
        kind = "all_gather" if "allgather" in claim else "all_reduce"
        return select(latency, "bert-base", method)[f"{kind}_count"].median()
    return None  # a claim of a paper or a section that this summary does not measure


def table_ii_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Table II: the paper's tick or cross for each approach and attribute, and what was measured.

    Weights on a device follow from the plan, and so does what copies (DP) and a pipeline (PP) do to one request.
    """
    found, rows = table.set_index("approach"), []
    for _, marks in published("table_ii").iterrows():
        approach = marks["method"].upper()
        for attribute in marks.index.drop("method"):
            obtained = found.loc[approach, f"{attribute}_obtained"]
            follows = attribute == "memory_reduction" or approach in ("DP", "PP")
            claim, kind = f"{approach}: {attribute.replace('_', ' ')}", "by construction" if follows else "emulated"
            obtained = None if obtained == "not run" else obtained
            rows.append(Verdict(claim, marks[attribute], obtained, kind, "Table II"))
    return verdict_table(rows).assign(link=found["link"].iloc[0], notebook="07_peers")


def table_iii_claims(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table III, every cell as it stands. A smaller model trained on fewer rows is not expected to reach it."""
    rows = [
        Verdict(cell.claim, cell.published, cell.obtained_mean, "measured", "Table III", cell.low, cell.high,
                tolerance=tolerance, tested=cell.learned)
        for cell in _table_iii_cells(table).itertuples()
    ]  # fmt: skip
    return verdict_table(rows).assign(link="", notebook="02_pretraining")


def table_iii_differences(table: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Table III as the paper argues from it: decoupled minus original, which can be compared between scales.

    Tested where the original has learned the task and several seeds say what the seed alone does.
    """
    cells = _table_iii_cells(table)
    rows = []
    originals = cells[is_original(cells)].set_index(["model", "task"])
    for cell in cells[~is_original(cells)].itertuples():
        base = originals.loc[(cell.model, cell.task)]
        expected, obtained = cell.published - base["published"], cell.obtained_mean - base["obtained_mean"]
        low, high = around(obtained, cell.difference_std_error)
        known = dict(low=low, high=high, neutral=0, tolerance=tolerance, tested=base["learned"] and low == low)
        claim, where = f"{cell.claim}, minus original", "Table III (difference)"
        rows.append(Verdict(claim, expected, obtained, "measured", where, **known))
    return verdict_table(rows).assign(link="", notebook="02_pretraining")


def _table_iii_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The published cells (model, Nb, Ndiv, task) with the obtained mean, its interval, and whether it is learned."""
    keys = [*ROW_COLUMNS, "task"]
    low, high = zip(*map(around, table["obtained_mean"], std_errors(table)), strict=True)
    found = table.assign(learned=learned(table), low=low, high=high).astype(dict.fromkeys(keys[1:3], float))
    wanted = ["obtained_mean", "difference_std_error", "learned", "low", "high"]
    cells = published_cells(published("table_iii")).merge(found[[*keys, *wanted]], "left", on=keys)
    named = zip(cells["task"], cells["model"], structure_names(cells), strict=True)
    return cells.assign(claim=[f"{task}, {MODEL_NAMES[model]} {structure}" for task, model, structure in named])


def table_iv_claims(latency: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Table IV, every cell over every link that was measured; our plans where a cell was measured with them."""
    cells = table_iv(latency, published("table_iv"))
    cells = cells[(cells["variant"] == "paper") | ((cells["variant"] == "ours") & cells["obtained"].notna())]
    cells = cells.sort_values("variant", ascending=False, kind="stable")  # the paper's first
    rows = []
    for cell in cells.itertuples():
        claim = f"BP+Auto over {cell.baseline.upper()}, {MODEL_NAMES[cell.model]}, {cell.bandwidth_mbps:g} Mbps"
        ours = OURS * (cell.variant == "ours")
        known = dict(low=cell.low, high=cell.high, neutral=1, tolerance=tolerance)
        rows.append(Verdict(claim + ours, cell.published, cell.obtained, "emulated", f"Table IV{ours}", **known))
    return verdict_table(rows).assign(link=list(cells["link"]), notebook="06_latency")
