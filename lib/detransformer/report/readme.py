"""Keeps tables of README.md and SECURITY.md in step with the committed run: `python -m detransformer.report.readme`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; its text is made from results/reference alone, and a test
holds the two together.
"""

import re
from collections.abc import Callable

import pandas as pd

from detransformer.files import atomic_write, repository_root
from detransformer.report.accuracy import mean_score
from detransformer.report.claims import OURS
from detransformer.report.coformer_tables import chosen_recipe
from detransformer.report.expected import published
from detransformer.report.findings import findings, mean_lines
from detransformer.report.peers import methods_at
from detransformer.report.runs import RunFolder
from detransformer.report.tables import MODEL_NAMES

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
POINTS = 2.0  # of accuracy that sub-models may give up: CoFormer's own are below it (Section I)
PEERS_AT = {"model": "bert-base", "bandwidth_mbps": 125}


COLUMNS = "| claim | published | obtained | verdict | notebook | minutes | hardware |\n|---|---|---|---|---|---|---|"
SPEEDUP, LARGE = "max speedup over tp", "bert large bp auto speedup over single 500mbps 4dev"


def headline(run: RunFolder) -> str:
    """What is claimed and what came of it, a row a claim: the paper's first, then this repository's own.

    A row whose table the run lacks is left out.
    """
    made = _made(run)
    summary = run.load_table("summary").astype(object)
    lines = [COLUMNS]

    def add(words: str, expected: str, obtained: str, verdict: str, notebook: str) -> None:
        lines.append(f"| {words} | {expected} | {obtained} | {verdict} | {notebook[:2]} | {made(notebook)} |")

    for words, claim in (
        ("Block over tensor parallelism, largest speedup (125 Mbps)", SPEEDUP),
        ("Block parallelism over one device (BERT-Large, 500 Mbps)", LARGE),
    ):
        rows = summary[summary["claim"].isin((claim, claim + OURS))]
        if len(rows):
            values = [
                f"{float(row.obtained):.2f} ({row.link} link{', our plans' if row.claim != claim else ''})"
                for row in rows.itertuples()
            ]
            verdicts = "; ".join(rows["verdict"] if rows["verdict"].nunique() > 1 else rows["verdict"][:1])
            add(words, _number(rows["expected"].iloc[0]), "; ".join(values), verdicts, rows["notebook"].iloc[0])
    for where, words in (
        ("Table IV", "Speedups over TP and SP at five bandwidths (Table IV)"),
        ("Table II", "What each parallelism is good for (Table II)"),
    ):
        for link, rows in summary[summary["where"] == where].groupby("link", sort=False):
            values = f"{len(rows)} values"
            add(f"{words}, {link} link", values, values, _counts(rows), rows["notebook"].iloc[0])
    if run.has_table("table_iii"):
        rows = mean_score(run.load_table("table_iii"))
        rows = rows[(rows["num_original_layers"] == 4) & (rows["num_divisions"] == 4) & (rows["over"] == "all")]
        for row in rows[rows["obtained"].notna()].itertuples():
            error = "" if pd.isna(row.share_std_error) else f" ± {row.share_std_error:.1f}"
            words = f"Mean score after decoupling, % of the original's ({MODEL_NAMES[row.model]}; Table III)"
            verdict = {"yes": "kept", "no": "not kept"}.get(row.kept, row.kept) + ", on small models"
            add(words, f"{row.published_share:.1f}", f"{row.obtained_share:.1f}{error}", verdict, "03_accuracy")
    if run.has_table("adaptive"):
        rows = run.load_table("adaptive")
        words = "The chosen plan is the best, on equal, unequal and changing devices and links"
        add(words, "-", f"{len(rows)} statements", _counts(rows), "08_adaptive")
    if run.has_table("coformer_recipes"):
        rows = run.load_table("coformer_recipes")
        row = chosen_recipe(rows[rows["method"] == "CoFormer"])
        coformer = published("coformer_tables").set_index("row")["latency_ms"]
        obtained = f"{row.speedup:.1f}x (predicted) for {row.given_up:.1f} points (of a small ViT)"
        words = "CoFormer's sub-models over the large model, for under 2 points of accuracy (100 Mbps)"
        verdict = "holds, larger" if row.given_up < POINTS else "does not hold"
        add(words, coformer["speedup over DeiT-B at 100 Mbps"], obtained, verdict, "10_comparison")
    if run.has_table("chaos"):
        rows = run.load_table("chaos")
        bad = f"{rows['lost'].sum()}, {rows['wrong'].sum()}, {rows['twice'].sum()}"
        words = f"Requests lost, wrong, answered twice while devices fail in {len(rows)} ways"
        obtained, verdict = f"{bad} of {rows['requests'].sum()}", "holds" if rows["held"].all() else "does not hold"
        lines.append(f"| {words} | - | {obtained} | {verdict} | `make chaos` | {_minutes_of_chaos(run)} |")
    return "\n".join(lines)


def _minutes_of_chaos(run: RunFolder) -> str:
    """Between its first row and its last, and what it ran on."""
    rounds = run.load_table("chaos_rounds")
    dates = pd.to_datetime(rounds["date"])
    return f"{(dates.max() - dates.min()).total_seconds() / 60:.0f} | {rounds['hardware'].iloc[-1]}"


def _counts(rows: pd.DataFrame) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts().items())


def claims(run: RunFolder) -> str:
    """The text's claims one by one, the tables' by how many cells got each verdict; by link where there are several."""
    summary = run.load_table("summary").astype(object)
    summary["link"] = summary["link"].fillna("")
    links = set(summary["link"]) - {""}
    made = _made(run)
    lines = [COLUMNS]
    for row in summary.itertuples():
        if row.where not in GROUPS:
            values = " | ".join(_number(value) for value in (row.expected, row.obtained))
            plain = row.claim.removesuffix(OURS)
            words = WORDING.get(plain, plain) + (OURS if plain != row.claim else "") + _over(row.link, links)
            lines.append(f"| {words} | {values} | {row.verdict} | {row.notebook[:2]} | {made(row.notebook)} |")
    for where, words in GROUPS.items():
        for link, rows in summary[summary["where"] == where].groupby("link", sort=False):
            notebook = rows["notebook"].iloc[0]
            cells = (
                f"{words}{_over(link, links)}",
                f"{len(rows)} values",
                _counts(rows),
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
    lines = [_in_short(run), "", *(f"- {sentence}" for sentence in run.load_table("which_one")["sentence"])]
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


def _in_short(run: RunFolder) -> str:
    """The advice that the tables below it come to."""
    cells = run.load_table("which_one").sort_values("bandwidth_mbps")
    parts = []
    for name, rows in cells.groupby("fastest_exact", sort=False):
        low, high = rows["bandwidth_mbps"].min(), rows["bandwidth_mbps"].max()
        parts.append(f"{name} at {low:g} Mbps" if low == high else f"{name} from {low:g} to {high:g} Mbps")
    fastest = " or ".join(cells["fastest"].unique())
    recipes = run.load_table("coformer_recipes")
    own = recipes[recipes["method"] == "CoFormer"].sort_values("given_up")
    best, worst = chosen_recipe(own), own.iloc[-1]
    text = (
        f"In short: for the large model's own answers take {', '.join(parts)}. Fastest at every bandwidth is {fastest}"
    )
    text += (
        f"; its sub-models give up {best.given_up:.1f} points ({best.recipe}) to {worst.given_up:.1f} ({worst.recipe})."
    )
    rivals = recipes[(recipes["recipe"] == best.recipe) & (recipes["method"] != "CoFormer")]
    if len(rivals):
        times, ahead = rivals["latency_ms"] / best.latency_ms, rivals["accuracy"] - best.accuracy
        names = " and ".join(rivals["method"])
        text += f" Trained as long, {names} take {times.min():.1f} to {times.max():.1f} times as long to answer, at "
        text += f"{ahead.min():+.1f} to {ahead.max():+.1f} points: unlike sizes buy latency"
        text += ", not accuracy." if ahead.max() > 0 else " and accuracy."
    return text


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
            f"{soak.minutes:g} minutes of load at {soak.answered_per_s:.0f} of {soak.capacity_per_s:.0f} requests a "
            f"second, with {soak.faults} faults: {soak.asked} requests, {soak.lost} lost, {soak.wrong} wrong, "
            f"{soak.twice} answered twice; p50 {1000 * soak.p50_s:.0f} ms, p99 {soak.p99_s:.1f} s, slowest "
            f"{soak.slowest_s:.1f} s; memory {soak.front_growth:+.1%} (front), {soak.devices_growth:+.1%} (devices).",
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
    "headline": (headline, "summary"),
    "claims": (claims, "summary"),
    "table_iv": (table_iv, "table_iv"),
    "peers": (peers, "methods"),
    "table_iii": (table_iii, "table_iii"),
    "adaptive": (adaptive, "adaptive"),
    "which_one": (which_one, "which_one"),
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
