"""Lines that tests run, by room: `python docs/coverage_table.py COVERAGE.json RUN` saves them, and a figure, in RUN."""

import json
import sys
from pathlib import Path

import pandas as pd

from detransformer.machine import now
from detransformer.record.provenance import own_commit
from detransformer.record.run import RunFolder
from detransformer.report.figures import draw


def by_room(report: dict) -> pd.DataFrame:
    """One row a room (modules beside the rooms: `detransformer`): its lines, how many tests run, and their share."""
    counted: dict[str, list[int]] = {}
    for path, entry in report["files"].items():
        parts = Path(path).parts
        inside = parts[parts.index("detransformer") + 1 :]
        lines = counted.setdefault(inside[0] if len(inside) > 1 else "detransformer", [0, 0])
        lines[0] += entry["summary"]["num_statements"]
        lines[1] += entry["summary"]["covered_lines"]
    rows = [{"room": room, "lines": lines, "run": run, "share": run / lines} for room, (lines, run) in counted.items()]
    return pd.DataFrame(rows).sort_values("room", ignore_index=True)


def main() -> None:
    report, run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), RunFolder(sys.argv[2])
    note = f"Statements that `make test` runs, its processes counted but for emulated devices; {now()}, "
    table = run.save_table(by_room(report), "coverage", note=f"{note}commit {own_commit()['commit'][:12]}.")
    draw(run, "coverage")
    print(f"{table['run'].sum() / table['lines'].sum():.1%} of lines; {run.figures}/coverage.png has them by room")


if __name__ == "__main__":
    main()
