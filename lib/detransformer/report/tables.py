"""Tables II, III and IV of the DATE paper from measured rows, published values beside them.

Pure functions of frames: `latency` is the bench table (one row a method, model, bandwidth and device count). Only rows
that passed their self-check (`valid`) count; what was not measured is said to be not run. A table of an older run that
lacks a column is read as if it had been measured in the paper's setting, which was then the only one.
"""

import pandas as pd

from detransformer.record.intervals import MIN_SAMPLES, NUM_ERRORS, bootstrap_ratio, samples_of
from detransformer.report.accuracy import MLM, ROW_COLUMNS, completed, lower_is_better, mean_score

NUM_DEVICES = 4  # the paper's testbed
NUM_ORIGINAL_LAYERS, NUM_DIVISIONS = 4, 4  # Section IV-C-1: DeTransformer's configuration for Table IV and Fig. 7
SEQ_LEN = 128
BASELINES = ("tp", "sp")
MODEL_NAMES = {
    "bert-base": "BERT-Base",
    "bert-large": "BERT-Large",
    "gpt2": "GPT-2",
    "gpt2-medium": "GPT-2 Medium",
    "gpt2-large": "GPT-2 Large",
    "gpt2-xl": "GPT-2 XL",
    "opt-6.7b-shape": "7B shape",
}
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
PAPER_PLANS = ("bp+tp", "bp+sp", "bp+allgather")  # Section III-C, Plans 1 to 3
VARIANTS = {  # of DeTransformer in Table IV: whose plans, for a heading
    "paper": "the paper's plans",
    "ours": "our plans",
    "narrow": "the paper's plans, narrow sub-block",
}
# What a column says where a run did not record it: there was one wire format, all tokens were read, waiting was not
# told from sending, and devices were paced by the roofline.
UNRECORDED = {
    "pace": "roofline",
    "wire": "float32",
    "reads": "all",
    "attention_width": "full",
    "wait_s": 0.0,
    "batch_size": 1,
}
# Columns that tables show where they were measured.
OPTIONAL = ("limit_s", "over_limit", "peak_rss_bytes", "relative_error", "max_abs_error", "plan", "compute_s", "comm_s",
            "weights_bytes", "throughput_rps", "predicted_s")  # fmt: skip


def comparable_rows(latency: pd.DataFrame) -> pd.DataFrame:
    """Valid rows of one request of 128 tokens with full attention (or `bp+narrow`, by its name), any wire and reads.

    Columns that the run did not record are filled in, by `UNRECORDED` or as missing values.
    """
    latency = of_known_links(latency)
    absent = {name: UNRECORDED.get(name, float("nan")) for name in (*UNRECORDED, *OPTIONAL) if name not in latency}
    rows = latency.assign(**absent)
    for name, value in UNRECORDED.items():
        rows[name] = rows[name].where(rows[name].notna() & (rows[name].astype(str) != ""), value)
    rows = rows[rows["valid"].astype(str).str.lower() == "true"]
    if "seq_len" in rows:
        rows = rows[rows["seq_len"] == SEQ_LEN]
    narrow = (rows["attention_width"] == "narrow") & (rows["method"] == "bp+narrow")
    rows = rows[(rows["batch_size"] == 1) & ((rows["attention_width"] == "full") | narrow)]
    return _of_one_pace(rows)


def _of_one_pace(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a model at a bandwidth, rows of the measured pace where there are any, else those of the roofline."""
    is_measured = rows["pace"] == "measured"
    place = ["model", "link", "bandwidth_mbps"]
    preferred = is_measured.groupby([rows[name] for name in place], dropna=False).transform("any")
    single = rows["method"] == "single"  # its bandwidth is nobody's
    preferred = preferred.where(~single, (is_measured & single).groupby(rows["model"]).transform("any"))
    return rows[is_measured | ~preferred.astype(bool)]


def valid_rows(latency: pd.DataFrame) -> pd.DataFrame:
    """The paper's setting among the bench rows: `comparable_rows` with float32 on the wire and all tokens read."""
    rows = comparable_rows(latency)
    return rows[(rows["wire"] == "float32") & (rows["reads"] == "all")]


def of_known_links(latency: pd.DataFrame) -> pd.DataFrame:
    """Rows but those of a link that was fitted to the published speedups, which older runs have."""
    return latency[latency["link"] != "fitted"]


def checked_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Those that passed their self-check."""
    return rows[rows["valid"].astype(str).str.lower() == "true"]


def num_left_out(latency: pd.DataFrame) -> int:
    """Rows that failed their self-check, which no table counts."""
    return len(latency) - len(checked_rows(latency))


def links_of(latency: pd.DataFrame) -> list[str]:
    """The kinds of link that distributed rows were measured over."""
    links = latency.loc[latency["method"] != "single", "link"].dropna().unique()
    return sorted(links)


def single_latency(latency: pd.DataFrame, model: str) -> float | None:
    """Median single-device latency of the original model in seconds, or None where it was not measured."""
    rows = latency[(latency["method"] == "single") & (latency["model"] == model)]
    original = rows[rows["num_original_layers"].isna()]
    rows = original if len(original) else rows
    return float(rows["latency_s"].median()) if len(rows) else None


def speedup(slower: pd.DataFrame, faster: pd.DataFrame) -> tuple[float, float, float]:
    """How many times as fast the rows `faster` are as `slower`, by their medians, and its 95% interval.

    The interval is NaN unless each is one row of the same pace and time scale, with `MIN_SAMPLES` requests or more.
    """
    value = slower["latency_s"].median() / faster["latency_s"].median()
    alike = len(slower) == len(faster) == 1 and all(
        slower[name].iloc[0] == faster[name].iloc[0] for name in ("pace", "time_scale") if name in slower
    )
    if alike and "samples_s" in slower:
        samples = [samples_of(rows["samples_s"].iloc[0]) for rows in (slower, faster)]
        if len(samples[0]) == len(samples[1]) >= MIN_SAMPLES:
            return value, *bootstrap_ratio(*samples)
    return value, float("nan"), float("nan")


def select(
    latency: pd.DataFrame,
    model: str,
    method: str,
    *,
    link: str | None = None,
    bandwidth_mbps: float | None = None,
    num_devices: int | None = NUM_DEVICES,
    num_original_layers: int = NUM_ORIGINAL_LAYERS,
    num_divisions: int | None = None,
) -> pd.DataFrame:
    """Rows of one method; block-parallel methods (`bp+...`) only in the given decoupling.

    `num_divisions` None is the paper's, or as many as there are devices where those are more.
    """
    rows = latency[(latency["model"] == model) & (latency["method"] == method)]
    if method.startswith("bp"):
        divisions = rows["num_devices"].clip(lower=NUM_DIVISIONS) if num_divisions is None else num_divisions
        rows = rows[(rows["num_original_layers"] == num_original_layers) & (rows["num_divisions"] == divisions)]
    for column, wanted in (("link", link), ("bandwidth_mbps", bandwidth_mbps), ("num_devices", num_devices)):
        if wanted is not None:
            rows = rows[rows[column] == wanted]
    return rows


def normalised(latency: pd.DataFrame) -> pd.DataFrame:
    """Adds `normalised` (latency over the single device's) and `speedup` (its inverse) to distributed rows.

    Rows of a model without a valid single-device latency are left out.
    """
    rows = latency[latency["method"] != "single"].copy()
    base = rows["model"].map({m: single_latency(latency, m) for m in rows["model"].unique()}).astype(float)
    rows["normalised"] = rows["latency_s"] / base
    rows["speedup"] = base / rows["latency_s"]
    return rows[base.notna()]


def select_variant(latency: pd.DataFrame, model: str, variant: str, **place: object) -> pd.DataFrame:
    """Rows of DeTransformer as `VARIANTS` names it; `place` is passed on to `select`.

    `paper` is the best of the paper's three plans: `bp+paper`, or where that was not measured the fastest of the three.
    """
    if variant != "paper":
        return select(latency, model, {"ours": "bp+auto", "narrow": "bp+narrow"}[variant], **place)
    rows = select(latency, model, "bp+paper", **place)
    if len(rows):
        return rows
    plans = [select(latency, model, method, **place) for method in PAPER_PLANS]
    return min((rows for rows in plans if len(rows)), key=lambda rows: rows["latency_s"].median(), default=rows)


def table_iv(latency: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Table IV: speedup of DeTransformer (Nb=4, Ndiv=4) over TP and SP on 4 devices.

    One row a published cell, link and variant: bandwidth_mbps, model, baseline, variant (`VARIANTS`; other than the
    paper's only where it was measured at least half as often), method (what stands for the variant), published,
    obtained, low, high (its interval, where there are repeats), ratio, link, status (measured | not run).
    """
    latency = valid_rows(latency)
    parts = []
    for link in links_of(latency) or [None]:
        papers, *others = (_table_iv_cells(latency, published, link, variant) for variant in VARIANTS)
        wanted = papers["obtained"].notna().sum() / 2
        parts += [papers, *(cells for cells in others if cells["obtained"].notna().sum() >= max(wanted, 1))]
    return pd.concat(parts, ignore_index=True)


def _table_iv_cells(latency: pd.DataFrame, published: pd.DataFrame, link: str | None, variant: str) -> pd.DataFrame:
    rows = []
    for _, cell in published.iterrows():
        place = dict(link=link, bandwidth_mbps=cell["bandwidth_mbps"])
        block = select_variant(latency, cell["model"], variant, **place)
        for baseline in BASELINES:
            other = select(latency, cell["model"], baseline, **place)
            expected = cell[f"over_{baseline}"]
            obtained, low, high = speedup(other, block)
            rows.append(
                {
                    "bandwidth_mbps": cell["bandwidth_mbps"],
                    "model": cell["model"],
                    "baseline": baseline,
                    "variant": variant,
                    "method": block["method"].iloc[0] if len(block) else "",
                    "published": expected,
                    "obtained": obtained,
                    "low": low,
                    "high": high,
                    "ratio": obtained / expected,
                    "link": link or "",
                    "status": "measured" if pd.notna(obtained) else "not run",
                }
            )
    return pd.DataFrame(rows)


def table_iv_markdown(table: pd.DataFrame) -> str:
    """Table IV in the paper's form, `published / obtained by each variant` in each cell, one block a link."""
    blocks = []
    keys = ["bandwidth_mbps", "model", "baseline"]
    for link, rows in table.groupby("link", sort=False):
        variants = [v for v in VARIANTS if (rows["variant"] == v).any()]
        cells = rows.drop_duplicates(keys)[[*keys, "published"]]
        for variant in variants:
            obtained = rows.loc[rows["variant"] == variant, [*keys, "obtained"]]
            cells = cells.merge(obtained.rename(columns={"obtained": variant}), on=keys)
        values = [[_times(row[name]) for name in ("published", *variants)] for _, row in cells.iterrows()]
        cells["cell"] = [" / ".join(value) for value in values]
        cells["column"] = [f"{MODEL_NAMES.get(c.model, c.model)} {c.baseline.upper()}" for c in cells.itertuples()]
        wide = cells.pivot(index="bandwidth_mbps", columns="column", values="cell")
        wide = wide[list(dict.fromkeys(cells["column"]))].sort_index(ascending=False)
        wide.index.name = "Bandwidth (Mbps)"
        with_plans = " / ".join(f"with {VARIANTS[variant]}" for variant in variants)
        title = f"Link: {link or 'not run'}. Each cell: published / {with_plans}."
        blocks.append(f"{title}\n\n" + _markdown(wide.reset_index()))
    return "\n\n".join(blocks)


def table_iii_markdown(table: pd.DataFrame) -> str:
    """Table III in the paper's form (Nb, Ndiv, tasks), then its differences to the original in the same form.

    First `published / obtained mean ± standard deviation`, with the mean over tasks, its share of the original's, and
    perplexity; then `published difference / obtained difference ± standard error`. An arrow marks what is beyond noise.
    """
    cells = completed(table)
    cells["cell"] = [_score_cell(row) for row in cells.itertuples()]
    wide = _wide(cells, "cell")
    means = mean_score(table)
    everything = means[means["over"] == "all"]
    wide = _with_column(wide, "Mean (% of original)", everything, [_mean_cell(row) for row in everything.itertuples()])
    some = means[(means["over"] == "learned") & (means["num_tasks"] > 0)]
    if len(some) and set(some["tasks"]) != set(everything.loc[everything["num_tasks"] > 0, "tasks"]):
        wide = _with_column(wide, "Mean of learned tasks", some, [_mean_cell(row) for row in some.itertuples()])
    if MLM in wide:
        wide = wide[[name for name in wide if name != MLM] + [MLM]].rename(columns={MLM: "Held-out text, perplexity"})
    decoupled = cells[cells["num_original_layers"].notna()]
    decoupled = decoupled.assign(cell=[_difference_cell(row) for row in decoupled.itertuples()])
    return "\n\n".join(
        [
            "Each cell: published / obtained ± standard deviation over seeds.",
            _markdown(_titled(wide, cells)),
            f"▲ better and ▼ worse than the original by more than {NUM_ERRORS} standard errors of the difference; "
            "no mark: within that noise, or one seed. Published values are of one seed. Perplexity: lower is better.",
            "Differences to the original, published / obtained ± standard error.",
            _markdown(_titled(_wide(decoupled, "cell"), cells)),
        ]
    )


def _wide(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """One line a model row and one column a task, in the table's order; Nb and Ndiv as words."""
    keyed = cells.assign(**{name: cells[name].astype(object).map(_or_original) for name in ROW_COLUMNS[1:]})
    tasks = list(dict.fromkeys(keyed["task"]))
    pivot = keyed.pivot(index=ROW_COLUMNS, columns="task", values=column).reset_index()
    return keyed[ROW_COLUMNS].drop_duplicates().merge(pivot, on=ROW_COLUMNS)[ROW_COLUMNS + tasks].fillna("not run")


def _with_column(wide: pd.DataFrame, title: str, means: pd.DataFrame, values: list[str]) -> pd.DataFrame:
    keyed = means.assign(**{name: means[name].astype(object).map(_or_original) for name in ROW_COLUMNS[1:]})
    column = keyed[ROW_COLUMNS].assign(**{title: values})
    return wide.merge(column, on=ROW_COLUMNS, how="left").fillna({title: "-"})


def _titled(wide: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Headings with each task's metric, and the models' names."""
    metrics = cells.drop_duplicates("task").set_index("task")["metric"].fillna("")
    titles = {task: f"{task} ({metric.replace('_', ' ')})" for task, metric in metrics.items() if metric}
    names = {"model": "Model", "num_original_layers": "Nb", "num_divisions": "Ndiv"}
    wide = wide.assign(model=wide["model"].map(lambda model: MODEL_NAMES.get(model, model)))
    return wide.rename(columns=titles | names)


def _score_cell(row) -> str:
    spread = row.obtained_std if row.num_seeds > 1 else None
    if row.task == MLM:
        return _signed(row.obtained_mean, spread, "") + _mark(row)
    return _pair(row.published, row.obtained_mean, spread) + _mark(row)


def _difference_cell(row) -> str:
    obtained = _signed(row.obtained_difference, row.difference_std_error) + _mark(row)
    return obtained if row.task == MLM else f"{_signed(row.published_difference)} / {obtained}"


def _mean_cell(row) -> str:
    """`published (share) / obtained (share ± standard error)`, both over the tasks that were measured."""
    published = f"{row.published:.2f} ({row.published_share:.1f}%)"
    if pd.isna(row.obtained):
        return f"{published} / not run"
    error = "" if pd.isna(row.share_std_error) else f" ± {row.share_std_error:.1f}"
    return f"{published} / {row.obtained:.2f} ({row.obtained_share:.1f}{error}%)"


def _mark(row) -> str:
    if pd.isna(row.beyond_noise) or not row.beyond_noise:
        return ""
    return " ▲" if (row.obtained_difference > 0) != lower_is_better(row.task) else " ▼"


def _signed(value: float, spread: float | None = None, sign: str = "+") -> str:
    if pd.isna(value):
        return "not run"
    return f"{value:{sign}.2f}" + (f" ± {spread:.2f}" if spread is not None and pd.notna(spread) else "")


def _or_original(value) -> str:
    return "original" if pd.isna(value) else str(value)


TABLE_II_VARIANTS = {"BP": "paper", "BP (ours)": "ours"}


def table_ii(
    latency: pd.DataFrame, published: pd.DataFrame, model: str = "bert-base", bandwidth_mbps: float = 500
) -> pd.DataFrame:
    """Table II measured: does each approach lower latency, raise throughput and save memory against one device?

    One row an approach, the single device first: latency_s, throughput_rps, weights_mib and peak_rss_mib (of the
    fullest device), their ratios to the single device, and yes, no or not run beside the published mark. The mark for
    memory is by the weights. `BP` runs by the best of the paper's plans, `BP (ours)` by BP+Auto. Of the bandwidths
    measured, the nearest to the wanted one counts.
    """
    latency = valid_rows(latency)
    links = links_of(latency)
    link = links[0] if links else None
    single = latency[(latency["method"] == "single") & (latency["model"] == model)]
    single = single[single["num_original_layers"].isna()] if single["num_original_layers"].isna().any() else single
    nearest = _nearest(latency, link, bandwidth_mbps)
    marks = published.set_index(published["method"].str.upper())
    rows = [{"approach": "Single", "method": "single", "link": link or ""} | _absolute(single)]
    for approach in dict.fromkeys([*marks.index, *TABLE_II_VARIANTS]):
        if approach in TABLE_II_VARIANTS:
            found = select_variant(nearest, model, TABLE_II_VARIANTS[approach], link=link)
        else:
            found = select(nearest, model, approach.lower(), link=link)
        if approach not in marks.index and not len(found):
            continue
        method = found["method"].iloc[0] if len(found) else ""
        row = {"approach": approach, "method": method, "bandwidth_mbps": found["bandwidth_mbps"].median()}
        row |= _absolute(found)
        for attribute, column, better in (
            ("latency_reduction", "latency_s", "less"),
            ("throughput_increase", "throughput_rps", "more"),
            ("memory_reduction", "weights_bytes", "less"),
        ):
            ratio = found[column].median() / single[column].median()
            # 2%: repeats of one measurement differ by about that much.
            gained = ratio < 0.98 if better == "less" else ratio > 1.02
            row[f"{attribute}_published"] = marks[attribute].get(approach)
            row[f"{attribute}_obtained"] = ("yes" if gained else "no") if pd.notna(ratio) else "not run"
            row[f"{column.rsplit('_', 1)[0]}_ratio"] = ratio
        row["link"] = link or ""
        rows.append(row)
    return pd.DataFrame(rows)


def table_ii_markdown(table: pd.DataFrame) -> str:
    """Table II for reading: absolute values, and `published / obtained` for each mark."""
    shown = table[["approach"]].rename(columns={"approach": "Approach"})
    for column, title, digits in (
        ("latency_s", "Latency (s)", 3),
        ("throughput_rps", "Requests/s", 2),
        ("weights_mib", "Weights (MiB)", 0),
        ("peak_rss_mib", "Peak RSS (MiB)", 0),
    ):
        shown[title] = [f"{v:.{digits}f}" if pd.notna(v) else "" for v in table[column]]
    for attribute, title in (
        ("latency_reduction", "Lower latency"),
        ("throughput_increase", "Higher throughput"),
        ("memory_reduction", "Less memory"),
    ):
        pairs = zip(table[f"{attribute}_published"], table[f"{attribute}_obtained"], strict=True)
        shown[title] = ["" if pd.isna(b) else f"{'-' if pd.isna(a) else a} / {b}" for a, b in pairs]
    link = next((link for link in table["link"] if link), "not run")
    mbps = table["bandwidth_mbps"].median()
    where = f"Link: {link}" + (f", {mbps:g} Mbps" if pd.notna(mbps) else "")
    return f"{where}, wire float32. Marks: published / obtained.\n\n" + _markdown(shown)


def _absolute(rows: pd.DataFrame) -> dict[str, float]:
    return {
        "latency_s": rows["latency_s"].median(),
        "throughput_rps": rows["throughput_rps"].median(),
        "weights_mib": rows["weights_bytes"].median() / 2**20,
        "peak_rss_mib": pd.to_numeric(rows["peak_rss_bytes"]).median() / 2**20,
    }


def _nearest(latency: pd.DataFrame, link: str | None, bandwidth_mbps: float) -> pd.DataFrame:
    """Rows of each method on `link` at the measured bandwidth nearest to the wanted one."""
    rows = latency[latency["link"] == link].copy()
    rows["_distance"] = (rows["bandwidth_mbps"] - bandwidth_mbps).abs()
    nearest = rows.groupby(["model", "method"])["_distance"].transform("min")
    return rows[rows["_distance"] == nearest].drop(columns="_distance")


def _times(value: float) -> str:
    return "not run" if pd.isna(value) else f"{value:.2f}x"


def _pair(expected: float, obtained: float, spread: float | None = None) -> str:
    return f"{'-' if pd.isna(expected) else f'{expected:.2f}'} / {_signed(obtained, spread, '')}"


def _markdown(frame: pd.DataFrame) -> str:
    return frame.astype(str).to_markdown(index=False, disable_numparse=True)
