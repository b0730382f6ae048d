"""Lines that tests run, by room: `python docs/coverage_table.py COVERAGE.json RUN` saves them, and a figure, in RUN."""

import json
import sys
from pathlib import Path

import pandas as pd
from lines import room_of
from matplotlib.figure import Figure

from detransformer.machine import now
from detransformer.record.provenance import commit
from detransformer.record.run import RunFolder


def by_room(report: dict) -> pd.DataFrame:
    """One row a room (`room_of`): its lines, how many tests run, and their share."""
    counts = [
        {"room": room_of(Path(path)), "lines": of["summary"]["num_statements"], "run": of["summary"]["covered_lines"]}
        for path, of in report["files"].items()
    ]
    table = pd.DataFrame(counts).groupby("room", as_index=False).sum()
    return table.assign(share=table["run"] / table["lines"])


def draw(table: pd.DataFrame) -> Figure:
    """A bar a room, as long as the share of its lines that tests run."""
    figure = Figure(figsize=(5.6, 1.0 + 0.26 * len(table)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(table["room"], 100 * table["share"])
    axis.bar_label(bars, [f"{row.share:.1%} of {row.lines:,}" for row in table.itertuples()], padding=3)
    axis.set(xlim=(0, 125), xlabel="% of lines that tests run")
    return figure


def main() -> None:
    report, run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), RunFolder(sys.argv[2])
    note = f"Statements that `make test` runs, its processes counted but for emulated devices; {now()}, "
    table = run.save_table(by_room(report), "coverage", note=f"{note}commit {commit()['commit'][:12]}.")
    draw(table).savefig(run.figures / "coverage.png", dpi=150)
    print(f"{table['run'].sum() / table['lines'].sum():.1%} of lines; {run.figures}/coverage.png has them by room")


if __name__ == "__main__":
    main()
