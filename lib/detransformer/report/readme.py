"""Keeps tables of README.md and SECURITY.md in step with the committed run: `python -m detransformer.report.readme`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; its text is made from results/reference alone, and a test
holds the two together.
"""

import re

import pandas as pd

from detransformer.files import atomic_write, repository_root
from detransformer.record.published import published, published_claim
from detransformer.record.run import RunFolder
from detransformer.report import tables
from detransformer.report.accuracy import MLM, completed, learned, mean_score
from detransformer.report.adaptive_tables import adaptive_verdicts
from detransformer.report.claims import OURS, summarise
from detransformer.report.findings import findings, mean_lines
from detransformer.report.peers import methods_at
from detransformer.report.tables import links_of, select, select_variant, speedup, valid_rows

REFERENCE = "results/reference"
ROUNDING = 1e-5  # float32 sums in another order differ by some 1e-7
WORDING = {
    "single device latency bert base": "BERT-Base on one device, s (paced to it)",
    "single device latency bert large": "BERT-Large on one device, s (paced to it)",
    "max speedup over tp": "BP+Auto over TP, the largest published (BERT-Base, 125 Mbps)",
    "bert large bp auto speedup over single 500mbps 4dev": "BERT-Large, BP+Auto over one device, 500 Mbps",
    "bert large tp speedup over single 500mbps 4dev": "BERT-Large, TP over one device, 500 Mbps",
    "tp allreduce count bert base": "all_reduces of TP, BERT-Base",
    "bp tp allgather count nb4": "all_gathers of BP+TP, Nb=4",
    "bp tp allreduce count nb4": "all_reduces of BP+TP, Nb=4",
}
GROUPS = {
    "Table II": "Table II, marks",
    "Table IV": "Table IV, speedups over TP and SP",
    f"Table IV{OURS}": f"Table IV{OURS}, speedups over TP and SP",
    "Table III": "Table III, scores",
    "Table III (difference)": "Table III, differences to the original",
}
PEERS_AT = {"model": "bert-base", "bandwidth_mbps": 125}

# The first table of the README -----------------------------------------------------------------------------------


def headline(run: RunFolder) -> str:
    """What is claimed, what the paper has, what was found here, what kind of number that is and how sure it is.

    A row whose table the run lacks is left out.
    """
    rows = []
    if run.has_table("latency"):
        latency = run.load_table("latency")
        rows += [_over_tensor(latency), _by_decoupling(latency), _over_one_device(latency)]
        accuracy = _accuracy(run) if run.has_table("table_iii") else None
        rows += [accuracy, _same_outputs(latency)]
    if run.has_table("chaos"):
        rows.append(_under_faults(run.load_table("chaos")))
    lines = ["| claim | paper | here | kind | how sure |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows if row)])


def _over_tensor(latency: pd.DataFrame) -> tuple | None:
    """Decoupled BERT-Base against tensor parallelism, by the paper's plans and by ours."""
    place = dict(model="bert-base", bandwidth_mbps=125)
    rows, link = _rows_on_first_link(latency)
    slower = select(rows, method="tp", link=link, **place)
    parts, compared = [], []
    for words, variant in (("with the paper's plans", "paper"), ("with ours (BP+Auto)", "ours")):
        faster = select_variant(rows, variant=variant, link=link, **place)
        if len(faster) and len(slower):
            parts.append(f"{_times(speedup(slower, faster))} {words}")
            compared += [slower, faster]
    claim = "Block over tensor parallelism (BERT-Base, 4 devices, 125 Mbps)"
    published = published_claim("max_speedup_over_tp")
    return (claim, f"{published:g}x", "; ".join(parts), "emulated", _how_sure(compared)) if parts else None


def _by_decoupling(latency: pd.DataFrame) -> tuple | None:
    """Our runtime on the decoupled model against our runtime on the unmodified one: what decoupling itself buys."""
    rows, link = _rows_on_first_link(latency)
    parts, compared = [], []
    for mbps in sorted(rows["bandwidth_mbps"].dropna().unique()):
        place = dict(model="bert-base", link=link, bandwidth_mbps=mbps)
        slower, faster = (select(rows, method=method, **place) for method in ("auto", "bp+auto"))
        if len(slower) and len(faster):
            parts.append(f"{_times(speedup(slower, faster))} at {mbps:g} Mbps")
            compared += [slower, faster]
    claim = "What decoupling itself buys: the same runtime, decoupled over unmodified BERT-Base"
    return (claim, "-", ", ".join(parts), "emulated", _how_sure(compared)) if parts else None


def _over_one_device(latency: pd.DataFrame) -> tuple | None:
    rows, link = _rows_on_first_link(latency)
    place = dict(model="bert-large", link=link, bandwidth_mbps=500)
    single = rows[(rows["method"] == "single") & (rows["model"] == "bert-large")]
    parts, compared = [], []
    for words, variant in (("with the paper's plans", "paper"), ("with ours", "ours")):
        faster = select_variant(rows, variant=variant, **place)
        if len(faster) and len(single):
            parts.append(f"{_times(speedup(single, faster))} {words}")
            compared.append(faster)
    claim = "Block parallelism over one device (BERT-Large, 4 devices, 500 Mbps)"
    published = published_claim("bert_large_bp_auto_speedup_over_single_500mbps_4dev")
    sure = f"{_how_sure(compared)}; the one device is paced to its published latency"
    return (claim, f"{published:g}x", "; ".join(parts), "emulated", sure) if parts else None


def _accuracy(run: RunFolder) -> tuple | None:
    """Whether Table III was tested: only where the original model has learned the tasks."""
    cells = completed(run.load_table("table_iii"))
    means = mean_score(cells)
    ours = means[(means["num_original_layers"] == 4) & (means["num_divisions"] == 4) & means["obtained"].notna()]
    everything = ours[ours["over"] == "all"]
    if not len(everything):
        return None
    row = everything.iloc[0]
    ran = cells[(cells["task"] != MLM) & cells["obtained_mean"].notna() & (cells["model"] == row["model"])]
    originals = ran[ran["num_original_layers"].isna()]
    known = list(originals.loc[learned(originals), "task"])
    here = row["judged"] if row["judged"] != "holds" else f"{row['obtained_share']:.1f}%"
    if len(known) < len(originals):
        here += f": the original has learned {len(known)} of {len(originals)} tasks"
    for task in known if len(known) < len(originals) else ():
        decoupled = ran[(ran["task"] == task) & (ran["num_original_layers"] == 4) & (ran["num_divisions"] == 4)].iloc[0]
        score = originals.set_index("task")["obtained_mean"][task]
        error = decoupled["difference_std_error"]
        here += f"; {task} {decoupled['obtained_mean']:.1f}, original {score:.1f}"
        here += "" if pd.isna(error) else f" (difference {decoupled['obtained_difference']:+.1f} ± {error:.1f})"
    seeds = int(ran["num_seeds"].min())
    sure = f"small models, one pre-training each, {seeds} fine-tuning seeds or more"
    return (
        "Accuracy after decoupling (Table III)",
        f"{row['published_share']:.1f}% of the original's",
        here,
        "measured",
        sure,
    )


def _same_outputs(latency: pd.DataFrame) -> tuple | None:
    """The largest error of the outputs of any measured plan, in float32, among rows rejected for it too."""
    rows = tables.of_known_links(latency)
    rows = rows[(rows["wire"] == "float32") & rows["relative_error"].notna() & (rows["num_devices"] > 1)]
    if not len(rows):
        return None
    here = f"relative error {rows['relative_error'].max():.0e} at most (float32)"
    sure = f"all {len(rows)} distributed float32 rows, rejected ones included; tests also compare in float64"
    return "Every plan computes what one device computes", "-", here, "measured", sure


def _under_faults(rows: pd.DataFrame) -> tuple:
    bad = f"{rows['lost'].sum()}, {rows['wrong'].sum()}, {rows['twice'].sum()} of {rows['requests'].sum()}"
    sure = "a small BERT under tensor parallelism, three devices on one machine; "
    sure += "a request past its own deadline is not lost"
    return f"Requests lost, wrong, answered twice under {len(rows)} faults", "-", bad, "measured", sure


def _rows_on_first_link(latency: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    rows = valid_rows(latency)
    return rows, next(iter(links_of(rows)), "")


def _times(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return f"{value:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low == low else "")


def _how_sure(compared: list[pd.DataFrame]) -> str:
    """Repeats, pace and time scale of the rows compared, and what they lack."""
    rows = pd.concat(compared)
    repeats, scales = sorted(rows["repeats"].dropna().unique()), sorted(rows["time_scale"].dropna().unique())
    enough = repeats and repeats[0] >= tables.MIN_SAMPLES and len(scales) == 1
    plural = "" if repeats == [1] else "s"
    words = [f"{_range(repeats)} request{plural} a row, {'95% intervals' if enough else 'no interval'}"]
    paces = {
        "measured": "paced by measured efficiency",
        "roofline": "roofline pace (small products cost no more)",
    }
    found = set(rows["pace"])
    words.append(paces[found.pop()] if len(found) == 1 else "paces differ")
    if len(scales) > 1:
        words.append(f"time scales differ ({_range(scales)})")
    return "; ".join(words)


def _range(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}" if values else "unknown"


# The other tables -------------------------------------------------------------------------------------------------


def _counts(rows: pd.DataFrame) -> str:
    return ", ".join(f"{count} {judged}" for judged, count in rows["judged"].value_counts().items())


def claims(run: RunFolder) -> str:
    """The text's claims one by one, the tables' by how many cells got each verdict; by link where there are several."""
    summary = summarise(run).astype(object)
    summary["link"] = summary["link"].fillna("")
    links = set(summary["link"]) - {""}
    lines = ["| claim | published | obtained | kind | judged | notebook |", "|---|---|---|---|---|---|"]
    for row in summary.itertuples():
        if row.where not in GROUPS:
            values = " | ".join(_number(value) for value in (row.expected, row.obtained))
            plain = row.claim.removesuffix(OURS)
            words = WORDING.get(plain, plain) + (OURS if plain != row.claim else "") + _over(row.link, links)
            lines.append(f"| {words} | {values} | {row.kind} | {row.judged} | {row.notebook[:2]} |")
    for where, words in GROUPS.items():
        for link, rows in summary[summary["where"] == where].groupby("link", sort=False):
            kinds = " or ".join(rows["kind"].unique())
            cells = (f"{words}{_over(link, links)}", f"{len(rows)} values", "by value", kinds, _counts(rows))
            lines.append(f"| {' | '.join(cells)} | {rows['notebook'].iloc[0][:2]} |")
    return "\n".join(lines)


def table_iv(run: RunFolder) -> str:
    """Table IV from the measured latencies."""
    found = tables.table_iv(run.load_table("latency"), published("table_iv"))
    return (
        tables.table_iv_markdown(found)
        + "\n\nNb=4, Ndiv=4, four devices, seq 128, float32 on the wire, all tokens read."
    )


def peers(run: RunFolder) -> str:
    """All methods at one place, fastest first, on the run's first link: latency, over the limit, weights, error."""
    methods = run.load_table("methods")
    rows = methods_at(methods[methods["reads"] == "all"], **PEERS_AT)
    link, mbps = methods["link"].iloc[0], PEERS_AT["bandwidth_mbps"]
    lines = [f"BERT-Base on four devices at {mbps} Mbps, link: {link}; float32 on the wire unless named.", ""]
    lines += ["| method | latency, s | over the limit | weights on a device, MiB | output error |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows.itertuples():
        error = "rounding" if row.relative_error < ROUNDING else f"{row.relative_error:.1%}"
        values = [f"{row.latency_s:.2f}", f"{row.over_limit:.2f}x", f"{row.weights_mib:.0f}", error]
        lines.append(f"| {row.name} | {' | '.join('-' if 'nan' in value else value for value in values)} |")
    return "\n".join(lines)


def adaptive(run: RunFolder) -> str:
    """What notebook 08 set out to show and obtained."""
    lines = ["| claim | expected | obtained | judged |", "|---|---|---|---|"]
    names = ("choice_cells", "unequal", "trace", "generation")
    for row in adaptive_verdicts(*(run.load_table(name) for name in names)).itertuples():
        lines.append(f"| {row.claim} | {row.expected} | {_number(row.obtained)} | {row.judged} |")
    return "\n".join(lines)


def table_iii(run: RunFolder) -> str | None:
    """Table III's means and perplexity, and what differences, trends, wire, placements and calibration came to.

    None, which leaves the README as it is, for a run whose table has no seeds to judge differences by.
    """
    table = run.load_table("table_iii")
    if "beyond_noise" not in table:
        return None
    return "\n".join([*mean_lines(table), "", *(f"- {sentence}" for sentence in findings(run))])


def faults(run: RunFolder) -> str:
    """What became of a serving cluster that was broken in every way, and of one under load for half an hour."""
    lines = [
        "Three emulated devices under load, a small BERT (4 layers, width 48) under tensor parallelism; seconds are "
        "the longest of all rounds. A request that passes its own deadline is not counted as lost.",
        "",
        "| fault | rounds | named after, s | served after, s | requests | lost, wrong, twice |",
        "|---|---|---|---|---|---|",
    ]
    for row in run.load_table("chaos").itertuples():
        seconds = ["-" if pd.isna(value) else f"{value:.1f}" for value in (row.named_s, row.served_s)]
        counts = f"{row.lost}, {row.wrong}, {row.twice}"
        lines.append(f"| {row.fault} | {row.rounds} | {' | '.join(seconds)} | {row.requests} | {counts} |")
    if run.has_table("soak"):
        (soak,) = run.load_table("soak").itertuples()
        lines += [
            "",
            f"{soak.minutes:g} minutes of load at {soak.answered_per_s:.0f} of {soak.capacity_per_s:.0f} requests a "
            f"second, with {soak.faults} faults: {soak.asked} requests, {soak.lost} lost, {soak.wrong} wrong, "
            f"{soak.twice} answered twice, {soak.expired} past their deadline; p50 {1000 * soak.p50_s:.0f} ms, "
            f"p99 {soak.p99_s:.1f} s, slowest {soak.slowest_s:.1f} s; "
            f"memory {soak.front_growth:+.1%} (front), {soak.devices_growth:+.1%} (devices).",
        ]
    return "\n".join(lines)


def coverage(run: RunFolder) -> str:
    """The share of lines that tests run."""
    rows = run.load_table("coverage")
    low = rows.loc[rows["share"].idxmin()]
    return (
        f"They run {rows['run'].sum() / rows['lines'].sum():.0%} of the package's lines, least of `{low['room']}` "
        f"({low['share']:.0%}; [by room]({REFERENCE}/figures/coverage.png))."
    )


def encrypted(run: RunFolder) -> str:
    """What a tunnel costs, as it was saved."""
    rows = run.load_table("encrypted")
    note = (run.tables / "encrypted.md").read_text(encoding="utf-8").strip().splitlines()[-1]
    lines = [
        note,
        "",
        "| bandwidth, Mbps | encryption | throughput, Mbps | of the rate | round trip, ms | processor, s per GB |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows.itertuples():
        spent = "" if pd.isna(row.processor_s_per_gb) else f"{row.processor_s_per_gb:.0f}"
        cells = (f"{row.throughput_mbps:.1f}", f"{row.share_of_rate:.0%}", f"{row.round_trip_ms:.2f}", spent)
        lines.append(f"| {row.bandwidth_mbps:g} | {row.encryption} | {' | '.join(cells)} |")
    return "\n".join(lines)


# What each section needs of the run: one whose tables the run lacks keeps its text in the README, if it is there.
SECURITY_SECTIONS = {"encrypted": (encrypted, "encrypted")}
SECTIONS = {
    "headline": (headline, "latency"),
    "claims": (claims, "latency"),
    "table_iv": (table_iv, "latency"),
    "peers": (peers, "methods"),
    "table_iii": (table_iii, "table_iii"),
    "adaptive": (adaptive, "choice_cells"),
    "faults": (faults, "chaos"),
    "coverage": (coverage, "coverage"),
}


def render(readme: str, run: RunFolder, sections: dict = SECTIONS) -> str:
    """`readme` with every marked table made anew; ValueError where a marker is missing."""
    for name, (make, table) in sections.items():
        if not run.has_table(table):
            continue
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(readme):
            raise ValueError(f"There is no place for {name!r}: put <!-- {name} --> and <!-- /{name} --> in it.")
        found, body = pattern.search(readme), make(run)
        if body is not None:
            readme = readme[: found.end(1)] + body + "\n" + readme[found.start(2) :]
    return readme


def _over(link: str, links: set[str]) -> str:
    return f", {link} link" if link and len(links) > 1 else ""


def _number(value) -> str:
    number = pd.to_numeric(value, errors="coerce")
    return "-" if pd.isna(number) else f"{number:.3g}"


FILES = {"README.md": SECTIONS, "SECURITY.md": SECURITY_SECTIONS}

if __name__ == "__main__":
    for name, sections in FILES.items():
        path = repository_root() / name
        text = render(path.read_text(encoding="utf-8"), RunFolder(repository_root() / REFERENCE), sections)
        with atomic_write(path) as file:
            file.write(text)
