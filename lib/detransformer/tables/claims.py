"""The claims at the top of the README, as sentences from a run's saved tables (`claims_table`)."""

import re

import pandas as pd

from detransformer.record.intervals import MIN_SAMPLES
from detransformer.record.published import published_claim
from detransformer.record.run import RunFolder
from detransformer.tables.latency import NUM_ORIGINAL_LAYERS, VARIANTS, links_of, select, speedup, valid_rows
from detransformer.tables.margins import margins

COLUMNS = ["claim", "paper", "here", "kind", "how sure"]
SLOW_MBPS = (10, 25)  # where the README says what decoupling gains
WORDS = "bag of words"  # the row of a model that counts words, in the tables `probes` and `kept`
WAYS = {"probe": ("by probes", "linear probes on frozen vectors"), "fine-tuned": ("fine-tuned", "fine-tuned")}
PACES = {"measured": "paced by measured efficiency", "roofline": "roofline pace (small products cost no more)"}


def claims_table(run: RunFolder) -> pd.DataFrame:
    """One row per claim: the paper's value, ours, its kind and its certainty.

    A claim without measured rows is left out.
    """
    latency = run.load_table("latency", "06_latency")
    by_core = run.load_table("pace_by_core") if run.has_table("pace_by_core") else None
    rows = [*latency_claims(latency, by_core), same_outputs(latency)]
    if run.has_table("slow_links"):
        rows.insert(-1, slow_link_claim(run.load_table("slow_links")))
    if run.has_table("kept"):
        rows.insert(-1, accuracy_claim(run.load_table("kept"), run.load_table("probes")))
    if run.has_table("chaos"):
        rows.append(under_faults(run.load_table("chaos")))
    return pd.DataFrame([row for row in rows if row], columns=COLUMNS)


def latency_claims(latency: pd.DataFrame, by_core: pd.DataFrame | None = None) -> list[tuple | None]:
    """Block over tensor parallelism, over the same runtime without decoupling, and over one device.

    `by_core` is table `pace_by_core`.
    """
    rows = valid_rows(latency)
    block = {"with the paper's plans": VARIANTS["paper"], "with our plans": VARIANTS["ours"]}
    tensor = {words: ("tp", method, 125) for words, method in block.items()}
    rates = sorted(rows["bandwidth_mbps"].dropna().unique())
    alike = {f"at {mbps:g} Mbps": ("auto", "bp+auto", mbps) for mbps in rates}
    alone = {words: ("single", method, 500) for words, method in block.items()}
    stated = "bert_large_bp_auto_speedup_over_single_500mbps_4dev"
    what = "What decoupling itself buys: the same runtime, decoupled over unmodified BERT-Base"
    paced = "; the one device is paced to its published latency"
    made = [
        ("Block over tensor parallelism (BERT-Base, 4 devices, 125 Mbps)", "max_speedup_over_tp", "bert-base", tensor),
        (what, "", "bert-base", alike, "" if by_core is None else _by_core(by_core)),
        ("Block parallelism over one device (BERT-Large, 4 devices, 500 Mbps)", stated, "bert-large", alone, paced),
    ]
    return [_speedup_row(rows, *claim) for claim in made]


def _by_core(gains: pd.DataFrame) -> str:
    """The range of what decoupling gains with the paper's Nb, as priced, over the cores that may set the pace."""
    rows = gains[(gains["num_original_layers"] == NUM_ORIGINAL_LAYERS) & (gains["core"] != "none")]
    ranges = rows.groupby("bandwidth_mbps")["gain"].agg(["min", "max"])
    parts = [f"{row.min:.2f} to {row.max:.2f} at {row.Index:g}" for row in ranges.itertuples()]
    return f"; priced from {rows['core'].nunique()} timings of cores: {', '.join(parts)} Mbps"


def _speedup_row(
    rows: pd.DataFrame, claim: str, stated: str, model: str, compared: dict, more: str = ""
) -> tuple | None:
    """A claim of speedups. `compared` maps words for the plans or link to (slower method, faster method, Mbps).

    `stated` names the published value.
    """
    link, parts, used = next(iter(links_of(rows)), ""), [], []
    for words, (*methods, mbps) in compared.items():
        pair = [select(rows, model, method, link=link, bandwidth_mbps=mbps) for method in methods]
        if all(map(len, pair)):
            parts.append(f"{_with_interval(*speedup(*pair))} {words}")
            used += [part[part["method"] != "single"] for part in pair]
    if not parts:
        return None
    paper = f"{published_claim(stated):g}x" if stated else "-"
    return claim, paper, "; ".join(parts), "emulated", _how_sure(pd.concat(used)) + more


def slow_link_claim(rows: pd.DataFrame) -> tuple | None:
    """What one original layer gains at `SLOW_MBPS`, as measured, by wire format (table `slow_links`)."""
    chosen = dict(kind="emulated", model="bert-base", num_devices=4, delay_ms=0, shared=False, valid=True)
    rows = rows[(rows[list(chosen)] == pd.Series(chosen)).all(axis=1) & rows["bandwidth_mbps"].isin(SLOW_MBPS)]
    gains: dict[str, list[str]] = {}
    for row in margins(rows.sort_values("bandwidth_mbps")).to_dict("records"):
        if row["structure"] == "Nb=1":
            gain = _with_interval(row["margin"], row["margin_low"], row["margin_high"])
            gains.setdefault(row["wire"], []).append(f"{gain} at {row['bandwidth_mbps']:g}")
    if not gains:
        return None
    claim = "On slow links: BERT-Base with one original layer over the best plan of the unmodified model, 4 devices"
    here = "; ".join(f"{wire}: {', '.join(each)} Mbps" for wire, each in gains.items())
    sure = dict.fromkeys(_how_sure(part) for _, part in rows.groupby("bandwidth_mbps"))  # compared within a rate
    return claim, "-", here, "emulated", "; ".join([*sure, "the next row has what it costs in scores"])


def _with_interval(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low == low else "")


def _how_sure(rows: pd.DataFrame) -> str:
    """Requests per row, whether there is an interval, and the pace of the compared rows."""
    fewest, scales = rows["repeats"].min(), sorted(rows["time_scale"].unique())
    enough = fewest >= MIN_SAMPLES and len(scales) == 1
    words = [f"{fewest:g} request{'s' if fewest > 1 else ''} a row, {'95% intervals' if enough else 'no interval'}"]
    paces = list(rows["pace"].unique())
    words.append(PACES[paces[0]] if len(paces) == 1 else "paces differ")
    if len(scales) > 1:
        words.append(f"time scales differ ({scales[0]:g} to {scales[-1]:g})")
    return "; ".join(words)


def accuracy_claim(shares: pd.DataFrame, probes: pd.DataFrame) -> tuple | None:
    """The share of scores that pretrained weights keep when decoupled or cut to fewer layers, by longest training.

    Of the structures that were scored in every way: the others are in table `kept`.
    """
    models = longest_trainings(shares[(shares["judged"].fillna("") != "") & shares["share"].notna()])
    ways = models["how"].nunique()
    models = models[models.groupby("structure")["how"].transform("nunique") == ways]
    if not len(models):
        return None
    parts = []
    for row, own in models.groupby("row", sort=False):
        kept = [f"{r.share:.1f}% ({r.low:.1f} to {r.high:.1f}) {WAYS[r.how][0]}" for r in own.itertuples()]
        parts.append(f"{row}: {', '.join(kept)}")
    sure = []
    for how, rows in models.groupby("how", sort=False):
        tasks = f"{WAYS[how][1]}: {rows['tasks'].iloc[0]}, the tasks that the original has learned"
        if how == "fine-tuned":
            sure.append(f"{tasks}; intervals over {rows['num_seeds'].min():g} paired seeds or more")
            continue
        counting = shares.loc[(shares["row"] == WORDS) & (shares["how"] == how), "share"]
        words = f"; counting words has {counting.iloc[0]:.1f}%" if len(counting) else ""
        sure.append(f"{tasks}{words}; intervals over validation rows")
    original, found = shares["row"].iloc[0], probes[probes["task"] == "retrieval@1"].set_index("row")["score"]
    if original in found:
        falls = [f"{found[row]:.1f}" for row in models["row"].unique()]
        sure.append(f"retrieval@1 falls from {found[original]:.1f} to {' and '.join(falls)}")
    sure = "; ".join([*sure, "one calibration each"])
    name = "Scores kept after decoupling a pretrained model"
    return name, "100.9% (Table III, trained anew)", "; ".join(parts), "measured", sure


def longest_trainings(shares: pd.DataFrame) -> pd.DataFrame:
    """Of table `kept` the last row of each structure, its longest training, by way of scoring; adds `structure`."""
    named = shares.assign(structure=shares["row"].map(structure_of))
    return named.drop_duplicates(["how", "structure"], keep="last")


def structure_of(label: str) -> str:
    """The structure in a label such as `minilm Nb=2, Ndiv=4, 1,000,000 tokens` or `minilm, 3 layers, cut`."""
    return re.sub(r", (sliced|cut|closed form|[\d,]+ tokens)$", "", label)


def same_outputs(latency: pd.DataFrame) -> tuple | None:
    """The largest output error of any measured plan in float32, including rows rejected for it."""
    rows = latency[(latency["wire"] == "float32") & latency["relative_error"].notna() & (latency["num_devices"] > 1)]
    if not len(rows):
        return None
    here = f"relative error {rows['relative_error'].max():.0e} at most (float32)"
    sure = f"all {len(rows)} distributed float32 rows, rejected ones included; tests also compare in float64"
    return "Every plan computes what one device computes", "-", here, "measured", sure


def under_faults(rows: pd.DataFrame) -> tuple:
    """The fate of requests to a serving cluster that was broken on purpose (table `chaos`)."""
    bad = f"{rows['lost'].sum()}, {rows['wrong'].sum()}, {rows['twice'].sum()} of {rows['requests'].sum()}"
    sure = "a small BERT under tensor parallelism, three devices on one machine; "
    sure += "a request past its own deadline is not lost"
    return f"Requests lost, wrong, answered twice under {len(rows)} faults", "-", bad, "measured", sure


def to_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown lines, as in the README."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
