"""Every published value beside what a run obtained, judged by `record.verdict`.

Reads the run's saved tables only. Where the paper says BP+Auto, the best of the paper's three plans stands beside the
published value; our plans follow in rows of their own, where they were measured. A count must be equal, and a yes or no
of Table II the same word. A score or a difference of scores is judged only where the models have learned the task.
"""

import pandas as pd

from detransformer.record.intervals import around
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.record.verdict import COLUMNS, TOLERANCE, Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.report.accuracy import PUBLISHED_COLUMNS, ROW_COLUMNS, completed, learned, std_errors
from detransformer.report.tables import (
    BASELINES,
    MODEL_NAMES,
    NUM_DEVICES,
    VARIANTS,
    links_of,
    select,
    select_variant,
    single_latency,
    speedup,
    table_iv,
    valid_rows,
)

OURS = f" ({VARIANTS['ours']})"  # after the place of a row that no published value was obtained by
SUMMARY_COLUMNS = ["claim", "where", "link", *COLUMNS[2:], "notebook"]
NAN = float("nan")


def summarise(run: RunFolder, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """One row a published value: claim, where, link, expected, obtained, low, high, kind, judged, notebook."""
    parts = [
        text_claims(_table(run, "latency"), tolerance),
        table_ii_claims(_table(run, "table_ii")),
        table_iii_claims(_table(run, "table_iii"), tolerance),
        table_iii_differences(_table(run, "table_iii"), tolerance),
        table_iv_claims(_table(run, "latency"), tolerance),
    ]
    return pd.concat([part.astype(object) for part in parts], ignore_index=True)[SUMMARY_COLUMNS]


def verdict_counts(summary: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each place in the paper got each verdict, by link where there is one."""
    place = summary["where"].str.replace(r" \(Rasp.*", "", regex=True)  # the device is not the place
    counts = pd.crosstab([place, summary["link"].fillna("").rename("link")], summary["judged"])
    return counts.rename_axis(columns=None).reset_index()


def text_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The single values of the paper's text: latencies, speedups (a row a link and variant) and collective counts."""
    stated = published("text_claims").set_index("claim")
    latency = valid_rows(latency) if len(latency) else latency
    rows, links = [], []
    for claim, line in stated.iterrows():
        is_speedup, is_count = "speedup" in claim, "_count_" in claim
        # An emulated device is paced to its published latency, and random weights send what trained ones would.
        kind = "measured" if is_count else "emulated" if is_speedup else "by construction"
        judged = dict(kind=kind, where=line["where"], tolerance=0 if is_count else tolerance)
        single = (None if is_speedup else _single_value(claim, latency), NAN, NAN)
        obtained = _speedups(claim, latency) if is_speedup else {}
        for (link, variant), (value, low, high) in (obtained or {("", "paper"): single}).items():
            name = claim.replace("_", " ") + (OURS if variant == "ours" else "")
            neutral = 1 if is_speedup else None
            rows.append(Verdict(name, line["value"], value, low=low, high=high, neutral=neutral, **judged))
            links.append(link)
    return verdict_table(rows).assign(link=links, notebook="06_latency")


def _speedups(claim: str, latency: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(link, variant) -> the obtained speedup and its interval; the paper's variant for every link, ours if measured.

    The largest speedup over TP is that of the cell of Table IV that has the published one, not the largest of ours.
    """
    if not len(latency):
        return {}
    found = {}
    cells = published("table_iv")
    largest = cells.loc[cells["over_tp"].idxmax()]
    model = "bert-large" if "bert_large" in claim else "bert-base"
    single = latency[(latency["method"] == "single") & (latency["model"] == model)]
    for link in links_of(latency):
        at_500 = dict(link=link, bandwidth_mbps=500, num_devices=NUM_DEVICES)
        there = dict(link=link, bandwidth_mbps=largest["bandwidth_mbps"])
        for variant in ("paper", "ours"):
            if claim == "max_speedup_over_tp":
                block = select_variant(latency, largest["model"], variant, **there)
                value = speedup(select(latency, largest["model"], "tp", **there), block)
            elif "bp_auto_speedup_over_single" in claim:
                value = speedup(single, select_variant(latency, model, variant, **at_500))
            elif "tp_speedup_over_single" in claim and variant == "paper":
                value = speedup(single, select(latency, model, "tp", **at_500))
            else:
                continue
            if variant == "paper" or pd.notna(value[0]):
                found[link, variant] = value
    return found


def _single_value(claim: str, latency: pd.DataFrame) -> float | None:
    """A claim without a link: a single-device latency in seconds, or collectives of a request."""
    if not len(latency):
        return None
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
    found = table.set_index("approach") if len(table) else table
    rows, links = [], []
    for _, marks in published("table_ii").iterrows():
        approach = marks["method"].upper()
        for attribute in marks.index.drop("method"):
            known = len(found) and approach in found.index
            obtained = found.loc[approach, f"{attribute}_obtained"] if known else "not run"
            follows = attribute == "memory_reduction" or approach in ("DP", "PP")
            claim, kind = f"{approach}: {attribute.replace('_', ' ')}", "by construction" if follows else "emulated"
            obtained = None if obtained == "not run" else obtained
            rows.append(Verdict(claim, marks[attribute], obtained, kind, "Table II"))
            links.append(found.loc[approach, "link"] if known else "")
    return verdict_table(rows).assign(link=links, notebook="06_latency")


def table_iii_claims(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table III, every cell as it stands. A smaller model trained on fewer rows is not expected to reach it."""
    rows = [
        Verdict(cell.claim, cell.expected, cell.obtained_mean, "measured", "Table III", cell.low, cell.high,
                tolerance=tolerance, tested=cell.learned)
        for cell in _table_iii_cells(table).itertuples()
    ]  # fmt: skip
    return verdict_table(rows).assign(link="", notebook="03_accuracy")


def table_iii_differences(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table III as the paper argues from it: decoupled minus original, which can be compared between scales.

    Tested where the original has learned the task and several seeds say what the seed alone does.
    """
    cells = _table_iii_cells(table)
    rows = []
    originals = cells[cells["original"]].set_index(["model", "task"])
    for cell in cells[~cells["original"]].itertuples():
        base = originals.loc[(cell.model, cell.task)]
        expected, obtained = cell.expected - base["expected"], cell.obtained_mean - base["obtained_mean"]
        low, high = around(obtained, cell.difference_std_error)
        known = dict(low=low, high=high, neutral=0, tolerance=tolerance, tested=base["learned"] and low == low)
        claim, where = f"{cell.claim}, minus original", "Table III (difference)"
        rows.append(Verdict(claim, expected, obtained, "measured", where, **known))
    return verdict_table(rows).assign(link="", notebook="03_accuracy")


def table_iv_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table IV, every cell over every link that was measured; our plans where a cell was measured with them."""
    if len(latency):
        cells = table_iv(latency, published("table_iv"))
        cells = cells[(cells["variant"] == "paper") | ((cells["variant"] == "ours") & cells["obtained"].notna())]
    else:
        cells = published("table_iv").melt(["bandwidth_mbps", "model"], var_name="baseline", value_name="published")
        cells["baseline"] = cells["baseline"].str.removeprefix("over_")
        cells = cells[cells["baseline"].isin(BASELINES)].assign(
            obtained=None, low=NAN, high=NAN, link="", variant="paper"
        )
    cells = cells.sort_values("variant", ascending=False, kind="stable")  # the paper's first
    rows = []
    for cell in cells.itertuples():
        claim = f"BP+Auto over {cell.baseline.upper()}, {MODEL_NAMES[cell.model]}, {cell.bandwidth_mbps:g} Mbps"
        ours = OURS if cell.variant == "ours" else ""
        known = dict(low=cell.low, high=cell.high, neutral=1, tolerance=tolerance)
        rows.append(Verdict(claim + ours, cell.published, cell.obtained, "emulated", f"Table IV{ours}", **known))
    return verdict_table(rows).assign(link=list(cells["link"]), notebook="06_latency")


def _table(run: RunFolder, name: str) -> pd.DataFrame:
    return run.load_table(name) if run.has_table(name) else pd.DataFrame()


def _table_iii_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The published cells (model, Nb, Ndiv, task) with the obtained mean, its interval, and whether it is learned."""
    keys, tasks = ROW_COLUMNS, list(PUBLISHED_COLUMNS)
    stated = published("table_iii").set_axis([*keys, *tasks], axis=1)
    cells = stated.melt(keys, tasks, var_name="task", value_name="expected")
    cells["original"] = cells["num_original_layers"] == "original"
    wanted = ["obtained_mean", "difference_std_error", "learned", "low", "high"]
    if len(table):
        found = completed(table)
        found["learned"] = learned(found)
        errors = std_errors(found)
        found["low"], found["high"] = zip(*map(around, found["obtained_mean"], errors), strict=True)
        for key in keys[1:]:
            found[key] = ["original" if pd.isna(n) else str(n) for n in found[key]]
        cells = cells.merge(found[[*keys, "task", *wanted]], how="left", on=[*keys, "task"])
    else:
        cells[wanted] = NAN
    cells["learned"] = cells["learned"].eq(True)
    cells["claim"] = [
        f"{c.task}, {MODEL_NAMES[c.model]} " + ("original" if c.original else f"Nb={c[2]}, Ndiv={c[3]}")
        for c in cells.itertuples()
    ]
    return cells
