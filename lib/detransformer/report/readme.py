"""Keeps the README's tables in step with the committed run: `python -m detransformer.report.readme`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; its text is made from results/reference alone, and a test
holds the two together.
"""

import re
from collections.abc import Callable

import pandas as pd

from detransformer.files import atomic_write, repository_root
from detransformer.report.claims import OURS
from detransformer.report.findings import findings, mean_lines
from detransformer.report.peers import methods_at
from detransformer.report.runs import RunFolder

REFERENCE = "results/reference"
ROUNDING = 1e-5  # float32 sums in another order differ by some 1e-7
WORDING = {
    "single device latency bert base": "BERT-Base on one device, s (paced to it)",
    "single device latency bert large": "BERT-Large on one device, s (paced to it)",
    "max speedup over tp": "Largest speedup of BP+Auto over TP",
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
MEASURED_ON = {"06": "emulated Pi 4B", "08": "emulated Pi 4B"}  # notebook -> before the cores
PEERS_AT = {"model": "bert-base", "bandwidth_mbps": 125}


def claims(run: RunFolder) -> str:
    """The text's claims one by one, the tables' by how many cells got each verdict; by link where there are several."""
    summary = run.load_table("summary").astype(object)
    summary["link"] = summary["link"].fillna("")
    links = set(summary["link"]) - {""}
    made = _made(run)
    lines = [
        "| claim | published | obtained | verdict | notebook | minutes | hardware |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary.itertuples():
        if row.where not in GROUPS:
            values = " | ".join(_number(value) for value in (row.expected, row.obtained))
            plain = row.claim.removesuffix(OURS)
            words = WORDING.get(plain, plain) + (OURS if plain != row.claim else "") + _over(row.link, links)
            lines.append(f"| {words} | {values} | {row.verdict} | {row.notebook[:2]} | {made(row.notebook)} |")
    for where, words in GROUPS.items():
        for link, rows in summary[summary["where"] == where].groupby("link", sort=False):
            counts = ", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts().items())
            notebook = rows["notebook"].iloc[0]
            cells = (
                f"{words}{_over(link, links)}",
                f"{len(rows)} values",
                counts,
                "see below",
                notebook[:2],
                made(notebook),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _made(run: RunFolder) -> Callable[[str], str]:
    """Of a notebook: its compute minutes and what it ran on, as the manifest says."""
    manifest, _ = run.known_manifest()
    hardware, notebooks = manifest["hardware"], manifest["notebooks"]
    cores = f"{hardware['cores']} cores ({hardware['cpu']})" if hardware else "-"

    def cells(notebook: str) -> str:
        seconds = notebooks.get(notebook, {}).get("duration_s")
        emulated = MEASURED_ON.get(notebook[:2])
        minutes = "-" if seconds is None else f"{seconds / 60:.0f}" if seconds >= 60 else "1"
        return f"{minutes} | {f'{emulated}, ' if emulated else ''}{cores}"

    return cells


def table_iv(run: RunFolder) -> str:
    """Table IV as notebook 06 saved it."""
    return (run.tables / "table_iv.md").read_text(encoding="utf-8").strip()


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
    lines = ["| claim | expected | obtained | verdict |", "|---|---|---|---|"]
    for row in run.load_table("adaptive").itertuples():
        lines.append(f"| {row.claim} | {row.expected} | {_number(row.obtained)} | {row.verdict} |")
    return "\n".join(lines)


def table_iii(run: RunFolder) -> str | None:
    """Table III's means and perplexity, and what differences, trends, wire, placements and calibration came to.

    None, which leaves the README as it is, for a run whose table has no seeds to judge differences by.
    """
    table = run.load_table("table_iii")
    if "beyond_noise" not in table:
        return None
    return "\n".join([*mean_lines(table), "", *(f"- {sentence}" for sentence in findings(run))])


def which_one(run: RunFolder) -> str:
    """CoFormer or block parallelism: a sentence a bandwidth, what accuracy costs in training, and a lost device."""
    lines = [f"- {sentence}" for sentence in run.load_table("which_one")["sentence"]]
    missing = run.load_table("coformer_missing").set_index("aggregator")
    for name, rows in missing.groupby(level=0, sort=False):
        whole, without = rows.loc[rows["missing"] == 0, "accuracy"].item(), rows.loc[rows["missing"] > 0, "accuracy"]
        lines += [f"- One of three devices lost, aggregator {name}: {without.mean():.1f}% instead of {whole:.1f}%."]
    lines += [
        "",
        "| sub-models | calibrated by | accuracy, % | points given up | predicted, ms | over the large model |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in run.load_table("coformer_recipes").sort_values("accuracy").itertuples():
        spread = "" if pd.isna(row.accuracy_std) else f" ± {row.accuracy_std:.1f}"
        cells = (row.method, row.recipe, f"{row.accuracy:.1f}{spread}", f"{row.given_up:.1f}", f"{row.latency_ms:.1f}")
        lines.append(f"| {' | '.join(cells)} | {row.speedup:.1f}x |")
    return "\n".join(lines)


def faults(run: RunFolder) -> str:
    """What became of a serving cluster that was broken in every way, and of one under load for half an hour."""
    lines = [
        "Three emulated devices under load; seconds are the longest of all rounds.",
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
            f"{soak.minutes:g} minutes of load with {soak.faults} faults: {soak.asked} requests, {soak.lost} lost, "
            f"{soak.wrong} wrong, {soak.twice} answered twice; p50 {1000 * soak.p50_s:.0f} ms, "
            f"p99 {soak.p99_s:.1f} s; memory {soak.front_growth:+.1%} (front), {soak.devices_growth:+.1%} (devices).",
        ]
    return "\n".join(lines)


# What each section needs of the run: one whose tables the run lacks keeps its text in the README, if it is there.
SECTIONS = {
    "claims": (claims, "summary"),
    "table_iv": (table_iv, "table_iv"),
    "peers": (peers, "methods"),
    "table_iii": (table_iii, "table_iii"),
    "adaptive": (adaptive, "adaptive"),
    "which_one": (which_one, "which_one"),
    "faults": (faults, "chaos"),
}


def render(readme: str, run: RunFolder) -> str:
    """`readme` with every marked table made anew; ValueError where a marker is missing."""
    for name, (make, table) in SECTIONS.items():
        if not run.has_table(table):
            continue
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(readme):
            raise ValueError(f"README.md has no place for {name!r}: put <!-- {name} --> and <!-- /{name} --> in it.")
        found, body = pattern.search(readme), make(run)
        if body is not None:
            readme = readme[: found.end(1)] + body + "\n" + readme[found.start(2) :]
    return readme


def _over(link: str, links: set[str]) -> str:
    return f", {link} link" if link and len(links) > 1 else ""


def _number(value) -> str:
    number = pd.to_numeric(value, errors="coerce")
    return "-" if pd.isna(number) else f"{number:.3g}"


if __name__ == "__main__":
    path = repository_root() / "README.md"
    text = render(path.read_text(encoding="utf-8"), RunFolder(repository_root() / REFERENCE))
    with atomic_write(path) as file:
        file.write(text)
