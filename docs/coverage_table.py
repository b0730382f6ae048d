"""Lines that tests run, by room: `python docs/coverage_table.py COVERAGE.json RUN` prints and saves them in RUN."""

import json
import sys
from pathlib import Path

import pandas as pd
from lines import room_of

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


if __name__ == "__main__":
    report, run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), RunFolder(sys.argv[2])
    note = f"Statements that `make test` runs, its processes counted but for emulated devices; {now()}, "
    table = run.save_table(by_room(report), "coverage", note=f"{note}commit {commit()['commit'][:12]}.")
    print(table.to_string(index=False, formatters={"share": "{:.1%}".format}))
    print(f"{table['run'].sum() / table['lines'].sum():.1%} of lines")
