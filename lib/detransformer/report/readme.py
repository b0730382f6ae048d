"""Keeps the README's tables in step with the committed run: `python -m detransformer.report.readme`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; its text is made from results/reference alone, and a test
holds the two together.
"""

import re

import pandas as pd

from detransformer.files import atomic_write, repository_root
from detransformer.report.runs import RunFolder

REFERENCE = "results/reference"
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
    "Table III": "Table III, scores",
    "Table III (difference)": "Table III, differences to the original",
}


def claims(run: RunFolder) -> str:
    """The text's claims one by one, the tables' by how many cells got each verdict."""
    summary = run.load_table("summary").astype(object)
    lines = ["| claim | published | obtained | verdict | notebook |", "|---|---|---|---|---|"]
    for row in summary.itertuples():
        if row.where not in GROUPS:
            values = " | ".join(_number(value) for value in (row.expected, row.obtained))
            lines.append(f"| {WORDING.get(row.claim, row.claim)} | {values} | {row.verdict} | {row.notebook[:2]} |")
    for where, words in GROUPS.items():
        rows = summary[summary["where"] == where]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts().items())
        lines.append(f"| {words} | {len(rows)} values | {counts} | see below | {rows['notebook'].iloc[0][:2]} |")
    return "\n".join(lines)


def table_iv(run: RunFolder) -> str:
    return (run.tables / "table_iv.md").read_text(encoding="utf-8").strip()


SECTIONS = {"claims": claims, "table_iv": table_iv}


def render(readme: str, run: RunFolder) -> str:
    """`readme` with every marked table made anew; ValueError where a marker is missing."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(readme):
            raise ValueError(f"README.md has no place for {name!r}: put <!-- {name} --> and <!-- /{name} --> in it.")
        found = pattern.search(readme)
        readme = readme[: found.end(1)] + make(run) + "\n" + readme[found.start(2) :]
    return readme


def _number(value) -> str:
    number = pd.to_numeric(value, errors="coerce")
    return "-" if pd.isna(number) else f"{number:.3g}"


if __name__ == "__main__":
    path = repository_root() / "README.md"
    text = render(path.read_text(encoding="utf-8"), RunFolder(repository_root() / REFERENCE))
    with atomic_write(path) as file:
        file.write(text)
