"""Tables of adaptive execution: the chosen plan against the best measured one, and what a plan's words say in short."""

import re
from collections import Counter

import pandas as pd

from detransformer.record.verdict import Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.tables.latency import checked_rows

ORIGINAL_LAYERS = ("tensor", "heads", "ulysses", "sequence", "galaxy", "replicate", "one device")


def choice_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a cell of table `choices`: the chosen plan's latency over that of the best measured one (valid rows)."""
    cells = []
    where = ["model", "num_devices", "bandwidth_mbps", "seq_len"]
    for key, part in checked_rows(rows).groupby(where, sort=False):
        chosen = part[part["chosen"].astype(bool)]
        if not len(chosen):
            continue
        best, own = part.loc[part["latency_s"].idxmin()], chosen.iloc[0]
        cells.append(
            dict(zip(where, key, strict=True))
            | {"chosen_plan": own["plan"], "latency_s": own["latency_s"], "best_plan": best["plan"]}
            | {"best_s": best["latency_s"], "over_best": own["latency_s"] / best["latency_s"], "num_plans": len(part)}
            | {"predicted_s": own["predicted_s"], "prediction_error": own["predicted_s"] / own["latency_s"] - 1}
        )
    return pd.DataFrame(cells)


def plan_in_short(plan: str) -> tuple[str, int]:
    """(strategy of most original layers, or `one device`; chunks) of a plan in words."""
    if plan.endswith("on 1 device"):
        return "one device", 1
    names = Counter(word for word in re.findall(r"[a-z]+", plan) if word in ORIGINAL_LAYERS)
    chunks = re.search(r"(\d+) chunks", plan)
    return names.most_common(1)[0][0], int(chunks[1]) if chunks else 1


def adaptive_verdicts(cells: pd.DataFrame, unequal: pd.DataFrame, trace: pd.DataFrame) -> pd.DataFrame:
    """One row a claim of this repository about adaptive execution, judged by `record.verdict`: all of them limits."""
    within = (cells["over_best"] <= 1.03).mean()
    rows = [
        ("cells whose chosen plan is within 3% of the best measured of a few", "at least", 0.95, within),
        ("median error of the prediction, chosen plans", "at most", 0.10, cells["prediction_error"].abs().median()),
    ]
    for mbps, part in checked_rows(unequal).groupby("bandwidth_mbps", sort=False):
        at, planned = f"unequal devices at {mbps:g} Mbps: ", part["split"] == "planned"
        even = part.loc[~planned, "over_planned"].min()
        rows.append((f"{at}planned split over the better even one", "at least", 1.5, even))
        over = part.loc[planned, "over_ideal"].max()
        rows.append((f"{at}over work / summed speed + communication", "at most", 1.15, over))
    spent = trace.groupby("policy", sort=False)["latency_s"].sum()
    saved = 1 - spent["adaptive"] / spent.drop("adaptive").min()
    rows.append(("changing link: time saved over the best fixed plan", "at least", 0.10, saved))
    return verdict_table(Verdict(claim, limit, value, "emulated", side=side) for claim, side, limit, value in rows)
