"""Every published value beside what a run obtained, with its verdict; what the run has not measured is "not run".

Reads the run's saved tables only. Where the paper says BP+Auto, the best of the paper's three plans stands beside the
published value; our plans follow in rows of their own, where they were measured. Verdicts follow `report.expected`;
three more stand here: a count must be equal, a yes or no of Table II must be the same word, and a difference between
two accuracies is judged only where it is beyond what several seeds say that the seed alone moves it (`one seed` and
`within noise` otherwise, by the rule of `report.accuracy`).
"""

import pandas as pd

from detransformer.report.accuracy import PUBLISHED_COLUMNS, ROW_COLUMNS, completed
from detransformer.report.expected import COLUMNS, TOLERANCE, judge, published, verdict
from detransformer.report.runs import RunFolder
from detransformer.report.tables import (
    BASELINES,
    MODEL_NAMES,
    NUM_DEVICES,
    VARIANTS,
    links_of,
    select,
    select_variant,
    single_latency,
    table_iv,
    valid_rows,
)

OURS = f" ({VARIANTS['ours']})"  # after the place of a row that no published value was obtained by
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
    """How many claims of each place in the paper got each verdict, by link where there is one."""
    place = summary["where"].str.replace(r" \(Rasp.*", "", regex=True)  # the device is not the place
    counts = pd.crosstab([place, summary["link"].fillna("").rename("link")], summary["verdict"])
    return counts.rename_axis(columns=None).reset_index()


def text_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The single values of the paper's text: latencies, speedups (a row a link and variant) and collective counts."""
    stated = published("text_claims").set_index("claim")
    latency = valid_rows(latency) if len(latency) else latency
    rows = []
    for claim, line in stated.iterrows():
        is_speedup = "speedup" in claim
        is_count = "_count_" in claim
        obtained = _speedups(claim, latency) if is_speedup else {("", "paper"): _single_value(claim, latency)}
        for (link, variant), value in (obtained or {("", "paper"): None}).items():
            row = verdict(line["value"], value, 0 if is_count else tolerance, 1 if is_speedup else None)
            name = claim.replace("_", " ") + (OURS if variant == "ours" else "")
            rows.append(row.assign(claim=name, where=line["where"], link=link, notebook="06_latency"))
    return pd.concat(rows, ignore_index=True)


def _speedups(claim: str, latency: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(link, variant) -> the obtained speedup; the paper's variant for every link, ours where it was measured."""
    if not len(latency):
        return {}
    found = {}
    model = "bert-large" if "bert_large" in claim else "bert-base"
    for link in links_of(latency):
        at_500 = dict(link=link, bandwidth_mbps=500, num_devices=NUM_DEVICES)
        for variant in ("paper", "ours"):
            if claim == "max_speedup_over_tp":
                cells = table_iv(latency, published("table_iv"))
                cells = cells[(cells["link"] == link) & (cells["variant"] == variant) & (cells["baseline"] == "tp")]
                value = cells["obtained"].max()
            elif "bp_auto_speedup_over_single" in claim:
                rows = select_variant(latency, model, variant, **at_500)
                value = (single_latency(latency, model) or float("nan")) / rows["latency_s"].median()
            elif "tp_speedup_over_single" in claim and variant == "paper":
                rows = select(latency, model, "tp", **at_500)
                value = (single_latency(latency, model) or float("nan")) / rows["latency_s"].median()
            else:
                continue
            if variant == "paper" or pd.notna(value):
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
        if pd.notna(obtained) and (pd.isna(cell.beyond_noise) or not cell.beyond_noise):
            said = "one seed" if pd.isna(cell.beyond_noise) else "within noise"
        ratio = obtained / expected if expected else None
        claim, where = f"{cell.claim}, minus original", "Table III (difference)"
        rows.append((claim, where, "", expected, obtained, ratio, said, "03_accuracy"))
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def table_iv_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Table IV, every cell over every link that was measured; our plans where a cell was measured with them."""
    if len(latency):
        cells = table_iv(latency, published("table_iv"))
        cells = cells[(cells["variant"] == "paper") | ((cells["variant"] == "ours") & cells["obtained"].notna())]
    else:
        cells = published("table_iv").melt(["bandwidth_mbps", "model"], var_name="baseline", value_name="published")
        cells["baseline"] = cells["baseline"].str.removeprefix("over_")
        cells = cells[cells["baseline"].isin(BASELINES)].assign(obtained=None, link="", variant="paper")
    cells = cells.sort_values("variant", ascending=False, kind="stable")  # the paper's first
    ours = [OURS if variant == "ours" else "" for variant in cells["variant"]]
    claims = [
        f"BP+Auto over {row.baseline.upper()}, {MODEL_NAMES[row.model]}, {row.bandwidth_mbps:g} Mbps"
        for row in cells.itertuples()
    ]
    claims = [claim + suffix for claim, suffix in zip(claims, ours, strict=True)]
    frame = verdict(cells["published"], cells["obtained"], tolerance, neutral=1, claim=claims)
    where = [f"Table IV{suffix}" for suffix in ours]
    return frame.assign(where=where, link=list(cells["link"]), notebook="06_latency")


def _table(run: RunFolder, name: str) -> pd.DataFrame:
    return run.load_table(name) if run.has_table(name) else pd.DataFrame()


def _table_iii_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The published cells (model, Nb, Ndiv, task) with the obtained mean, NaN where not run, and `beyond_noise`."""
    keys, tasks = ROW_COLUMNS, list(PUBLISHED_COLUMNS)
    stated = published("table_iii").set_axis([*keys, *tasks], axis=1)
    cells = stated.melt(keys, tasks, var_name="task", value_name="expected")
    cells["original"] = cells["num_original_layers"] == "original"
    wanted = ["obtained_mean", "beyond_noise"]
    if len(table):
        found = completed(table)
        for key in keys[1:]:
            found[key] = ["original" if pd.isna(n) else str(n) for n in found[key]]
        cells = cells.merge(found[[*keys, "task", *wanted]], how="left", on=[*keys, "task"])
    else:
        cells[wanted] = float("nan")
    cells["claim"] = [
        f"{c.task}, {MODEL_NAMES[c.model]} " + ("original" if c.original else f"Nb={c[2]}, Ndiv={c[3]}")
        for c in cells.itertuples()
    ]
    return cells
