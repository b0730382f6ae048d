"""Tables II and IV of the DATE paper, and the choice of bench rows for all latency tables.

Pure functions of the bench table `latency`: one row per method, model, bandwidth and number of devices. Rows that
failed their self-check are left out, and missing measurements read "not run".
"""

import itertools
import math

import pandas as pd

from detransformer.record.intervals import MIN_SAMPLES, bootstrap_ratio, samples_of

NUM_DEVICES = 4  # the paper's testbed
NUM_ORIGINAL_LAYERS, NUM_DIVISIONS = 4, 4  # Section IV-C-1: DeTransformer's configuration for Table IV and Fig. 7
SEQ_LEN = 128
MIB = 2**20
BASELINES = ("tp", "sp")
METHOD_NAMES = {  # in the order of tables and legends
    "single": "Single",
    "dp": "DP",
    "pp": "PP",
    "tp": "TP",
    "sp": "SP",
    "ulysses": "Ulysses",
    "galaxy": "Galaxy",
    "dtensor": "DTensor",
    "auto": "Auto (unmodified)",
    "bp+tp": "BP+TP",
    "bp+sp": "BP+SP",
    "bp+allgather": "BP+Allgather",
    "bp+ulysses": "BP+Ulysses",
    "bp+heads": "BP+Heads",
    "bp+paper": "BP+Paper",
    "bp+auto": "BP+Auto",
    "bp+narrow": "BP+Narrow",
}
# DeTransformer's plans: the best of the paper's three, ours, and ours with the sub-blocks of the authors' latency code.
VARIANTS = {"paper": "bp+paper", "ours": "bp+auto", "narrow": "bp+narrow"}


def checked_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that passed their self-check."""
    return rows[rows["valid"].astype(bool)]


def comparable_rows(latency: pd.DataFrame) -> pd.DataFrame:
    """Valid rows of one request of 128 tokens with full attention (or `bp+narrow`), in any wire format, of one pace."""
    rows = checked_rows(latency)
    as_named = (rows["attention_width"] != "narrow") | (rows["method"] == "bp+narrow")  # empty for original models
    return _of_one_pace(rows[(rows["seq_len"] == SEQ_LEN) & (rows["batch_size"] == 1) & as_named])


def _of_one_pace(rows: pd.DataFrame) -> pd.DataFrame:
    """For each model and bandwidth, the rows of the measured pace if there are any, else those of the roofline."""
    is_measured, single = rows["pace"] == "measured", rows["method"] == "single"
    place = ["model", "link", "bandwidth_mbps"]
    preferred = is_measured.groupby([rows[name] for name in place], dropna=False).transform("any")
    # A single device uses no link, so its row counts at every bandwidth.
    preferred = preferred.where(~single, (is_measured & single).groupby(rows["model"]).transform("any"))
    return rows[is_measured | ~preferred.astype(bool)]


def valid_rows(latency: pd.DataFrame) -> pd.DataFrame:
    """The paper's setting: `comparable_rows` whose messages are float32."""
    rows = comparable_rows(latency)
    return rows[rows["wire"] == "float32"]


def links_of(latency: pd.DataFrame) -> list[str]:
    """The kinds of link of the distributed rows."""
    return sorted(latency.loc[latency["method"] != "single", "link"].dropna().unique())


def single_latency(latency: pd.DataFrame, model: str) -> float:
    """Median latency of the original model on one device in seconds; NaN if it was not measured."""
    return float(select(latency, model, "single")["latency_s"].median())


def of_papers_structure(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of Nb=4 and Ndiv=4 (more devices: as many divisions) of block-parallel methods, all of the others."""
    divisions = rows["num_devices"].clip(lower=NUM_DIVISIONS)
    papers = (rows["num_original_layers"] == NUM_ORIGINAL_LAYERS) & (rows["num_divisions"] == divisions)
    return rows[papers | ~rows["method"].str.startswith("bp")]


def select(
    latency: pd.DataFrame,
    model: str,
    method: str,
    *,
    link: str | None = None,
    bandwidth_mbps: float | None = None,
    num_devices: int | None = NUM_DEVICES,
) -> pd.DataFrame:
    """Rows of one method and `of_papers_structure`; for `single` those of the original model, which uses no link."""
    rows = of_papers_structure(latency[(latency["model"] == model) & (latency["method"] == method)])
    if method == "single":
        return rows[rows["num_original_layers"].isna()]
    for column, wanted in (("link", link), ("bandwidth_mbps", bandwidth_mbps), ("num_devices", num_devices)):
        if wanted is not None:
            rows = rows[rows[column] == wanted]
    return rows


def speedup(slower: pd.DataFrame, faster: pd.DataFrame) -> tuple[float, float, float]:
    """How many times as fast `faster` is as `slower`, by their medians, and the 95% interval.

    The interval is NaN unless each is one row of the same pace and time scale, with `MIN_SAMPLES` requests or more.
    """
    value = slower["latency_s"].median() / faster["latency_s"].median()
    alike = ("pace", "time_scale")
    if len(slower) == len(faster) == 1 and all(slower[name].iloc[0] == faster[name].iloc[0] for name in alike):
        return value, *paired_interval(slower["samples_s"].iloc[0], faster["samples_s"].iloc[0])
    return value, math.nan, math.nan


def paired_interval(slower: object, faster: object) -> tuple[float, float]:
    """The 95% interval of a speedup from two cells of samples; NaN unless `MIN_SAMPLES` requests or more are paired."""
    above, below = samples_of(slower), samples_of(faster)
    return bootstrap_ratio(above, below) if len(above) == len(below) >= MIN_SAMPLES else (math.nan, math.nan)


def table_iv(latency: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Table IV: speedup of DeTransformer (Nb=4, Ndiv=4) over TP and SP on 4 devices.

    One row per published cell, link and variant (`VARIANTS`; others than the paper's only if measured):
    bandwidth_mbps, model, baseline, variant, method, published, obtained, low, high (the interval, if there are
    repeats), ratio, link, status (measured | not run).
    """
    rows, cells = valid_rows(latency), []
    for link, variant, cell in itertools.product(links_of(rows) or [""], VARIANTS, published.to_dict("records")):
        place = dict(link=link, bandwidth_mbps=cell["bandwidth_mbps"])
        method = VARIANTS[variant]
        block = select(rows, cell["model"], method, **place)
        for baseline in BASELINES:
            expected = cell[f"over_{baseline}"]
            obtained, low, high = speedup(select(rows, cell["model"], baseline, **place), block)
            row = {"bandwidth_mbps": cell["bandwidth_mbps"], "model": cell["model"], "baseline": baseline}
            row |= {"variant": variant, "method": method if len(block) else "", "published": expected}
            row |= {"obtained": obtained, "low": low, "high": high, "ratio": obtained / expected, "link": link}
            cells.append(row | {"status": "measured" if obtained == obtained else "not run"})
    table = pd.DataFrame(cells)
    measured = table.groupby(["link", "variant"])["obtained"].transform("count") > 0
    return table[measured | (table["variant"] == "paper")].reset_index(drop=True)


TABLE_II_MODEL, TABLE_II_MBPS = "bert-base", 500
TABLE_II_METHODS = {"BP": "bp+paper", "BP (ours)": "bp+auto"}
# Attribute of Table II -> the column measured for it, and whether more is better.
ATTRIBUTES = {
    "latency_reduction": ("latency_s", False),
    "throughput_increase": ("throughput_rps", True),
    "memory_reduction": ("weights_bytes", False),
}
GAIN = 0.02  # of one device; repeats of one measurement differ by about that much


def table_ii(latency: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Table II measured: does each approach lower latency, raise throughput and save memory against one device?

    One row per approach, the single device first: latency_s, throughput_rps, weights_mib and peak_rss_mib (of the
    fullest device), their ratios to the single device, and yes, no or not run beside the published mark. Weights decide
    the mark for memory. Of each method the measured bandwidth nearest to `TABLE_II_MBPS` counts.
    """
    latency = valid_rows(latency)
    latency = latency[latency["model"] == TABLE_II_MODEL]
    link = next(iter(links_of(latency)), "")
    distance = (latency["bandwidth_mbps"] - TABLE_II_MBPS).abs().where(latency["link"] == link)
    single = select(latency, TABLE_II_MODEL, "single")
    nearest = latency[distance == distance.groupby(latency["method"]).transform("min")]
    marks = published.set_index(published["method"].str.upper())
    rows = [{"approach": "Single", "method": "single", "link": link} | _absolute(single)]
    for approach in dict.fromkeys([*marks.index, *TABLE_II_METHODS]):
        found = select(nearest, TABLE_II_MODEL, TABLE_II_METHODS.get(approach, approach.lower()), link=link)
        if approach not in marks.index and not len(found):
            continue
        row = {"approach": approach, "method": next(iter(found["method"]), ""), "link": link}
        row |= {"bandwidth_mbps": found["bandwidth_mbps"].median()} | _absolute(found)
        for attribute, (column, more_is_better) in ATTRIBUTES.items():
            ratio = found[column].median() / single[column].median()
            gained = ratio > 1 + GAIN if more_is_better else ratio < 1 - GAIN
            row[f"{attribute}_published"] = marks[attribute].get(approach)
            row[f"{attribute}_obtained"] = ("yes" if gained else "no") if ratio == ratio else "not run"
            row[f"{column.rsplit('_', 1)[0]}_ratio"] = ratio
        rows.append(row)
    return pd.DataFrame(rows)


def _absolute(rows: pd.DataFrame) -> dict[str, float]:
    return {
        "latency_s": rows["latency_s"].median(),
        "throughput_rps": rows["throughput_rps"].median(),
        "weights_mib": rows["weights_bytes"].median() / MIB,
        "peak_rss_mib": rows["peak_rss_bytes"].astype(float).median() / MIB,
    }
