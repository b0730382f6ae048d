"""Every published value beside what a run obtained, judged by `record.verdict`; reads the run's saved tables only.

For the paper's BP+Auto, the best of the paper's three plans is compared with the published value; our plans follow in
rows of their own, if measured. Counts, and the yes or no of Table II, must be equal. A score or a difference of scores
is judged only if the models have learned the task.
"""

from collections.abc import Iterator
from itertools import product

import pandas as pd

from detransformer.record.intervals import around
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.record.verdict import COLUMNS, TOLERANCE, Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.tables.accuracy import METRICS, is_original, learned, std_errors, structure_names
from detransformer.tables.latency import VARIANTS, links_of, select, speedup, table_iv, valid_rows

MODEL_NAMES = {"bert-base": "BERT-Base", "bert-large": "BERT-Large"}
OURS = " (our plans)"  # after the claim of a row whose plans are not the paper's
# Speedups in the text: model, Mbps, the slower method and the faster one (empty: DeTransformer). The largest over TP is
# taken at the cell of Table IV that has the published maximum, not at our largest.
SPEEDUPS = {
    "max_speedup_over_tp": ("bert-base", 125, "tp", ""),
    "bert_large_bp_auto_speedup_over_single_500mbps_4dev": ("bert-large", 500, "single", ""),
    "bert_large_tp_speedup_over_single_500mbps_4dev": ("bert-large", 500, "single", "tp"),
}
COUNTS = {
    "tp_allreduce_count_bert_base": ("tp", "all_reduce_count"),
    "bp_tp_allgather_count_nb4": ("bp+tp", "all_gather_count"),
    "bp_tp_allreduce_count_nb4": ("bp+tp", "all_reduce_count"),
}
SUMMARY_COLUMNS = ["claim", "where", "link", *COLUMNS[2:], "notebook"]


def summarise(run: RunFolder, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """One row per published value: claim, where, link, expected, obtained, low, high, kind, judged, notebook.

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


def text_claims(latency: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The single values of the paper's text: latencies, speedups (per link and variant) and collective counts."""
    rows, links = [], []
    latency = valid_rows(latency)
    for line in published("text_claims").itertuples():
        name, known = line.claim.replace("_", " "), dict(expected=line.value, where=line.where)
        if line.claim in SPEEDUPS:
            for link, variant, (value, low, high) in _speedups(*SPEEDUPS[line.claim], latency):
                known |= dict(obtained=value, low=low, high=high, kind="emulated", neutral=1, tolerance=tolerance)
                rows.append(Verdict(name + OURS * (variant == "ours"), **known))
                links.append(link)
            continue
        links.append("")
        if line.claim in COUNTS:  # the same for random and trained weights
            method, column = COUNTS[line.claim]
            obtained = select(latency, "bert-base", method)[column].median()
            rows.append(Verdict(name, obtained=obtained, kind="measured", tolerance=0, **known))
        else:  # an emulated device is paced to its published latency
            model = line.claim.removeprefix("single_device_latency_").replace("_", "-")
            obtained = select(latency, model, "single")["latency_s"].median()
            rows.append(Verdict(name, obtained=obtained, kind="by construction", tolerance=tolerance, **known))
    return verdict_table(rows).assign(link=links, notebook="06_latency")


def _speedups(model: str, bandwidth_mbps: float, slower: str, faster: str, latency: pd.DataFrame) -> Iterator[tuple]:
    """(link, variant, speedup with its interval): the paper's variant for every link, ours if measured."""
    for link, variant in product(links_of(latency) or [""], ("paper", "ours")):
        if faster and variant == "ours":
            continue
        methods, place = (slower, faster or VARIANTS[variant]), dict(link=link, bandwidth_mbps=bandwidth_mbps)
        value = speedup(*(select(latency, model, method, **place) for method in methods))
        if variant == "paper" or value[0] == value[0]:
            yield link, variant, value


def table_ii_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Table II: the paper's tick or cross for each approach and attribute, and what was measured.

    The plan determines the weights on a device, and the effect of copies (DP) and a pipeline (PP) on one request.
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
    """Table III, every cell unchanged. A smaller model trained on fewer rows is not expected to reach it."""
    rows = []
    for cell in _table_iii_cells(table).itertuples():
        low, high = around(cell.obtained_mean, cell.std_error)
        known = dict(low=low, high=high, tolerance=tolerance, tested=cell.learned)
        rows.append(Verdict(cell.claim, cell.published, cell.obtained_mean, "measured", "Table III", **known))
    return verdict_table(rows).assign(link="", notebook="02_pretraining")


def table_iii_differences(table: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Table III as the paper argues from it: decoupled minus original, which can be compared between scales.

    Tested if the original has learned the task and several seeds show the effect of the seed alone.
    """
    cells, where = _table_iii_cells(table), "Table III (difference)"
    originals = cells[is_original(cells)].set_index(["model", "task"])["learned"]
    rows = []
    for cell in cells[~is_original(cells)].itertuples():
        low, high = around(cell.obtained_difference, cell.difference_std_error)
        tested = originals[cell.model, cell.task] and low == low
        known = dict(low=low, high=high, neutral=0, tolerance=tolerance, tested=tested)
        differences = cell.published_difference, cell.obtained_difference
        rows.append(Verdict(f"{cell.claim}, minus original", *differences, "measured", where, **known))
    return verdict_table(rows).assign(link="", notebook="02_pretraining")


def _table_iii_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The published cells with the standard error of the obtained mean, and whether the task is learned."""
    tasks = list(METRICS)
    cells = table[table["task"].isin(tasks)].sort_values("task", key=lambda task: task.map(tasks.index), kind="stable")
    cells = cells.assign(learned=learned(cells), std_error=std_errors(cells))
    named = zip(cells["task"], cells["model"], structure_names(cells), strict=True)
    return cells.assign(claim=[f"{task}, {MODEL_NAMES[model]} {structure}" for task, model, structure in named])


def table_iv_claims(latency: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Table IV: every cell on every measured link; also with our plans, if measured."""
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
