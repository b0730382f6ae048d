"""The experiments behind notebook 08: is the chosen plan the fastest, on which devices, and while the link changes?

Each function measures on an emulated cluster and returns a frame in the form in which its table is saved.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from detransformer.cluster.bench import Bench, Cell, RowFile
from detransformer.cluster.experiments import load_link
from detransformer.cluster.session import EmulatedCluster
from detransformer.parallel.plan import Plan
from detransformer.planning.placement import Placement, place, place_freely

GRID_COLUMNS = (
    *("model", "num_devices", "bandwidth_mbps", "seq_len", "batch_size", "plan", "chosen", "latency_s", "predicted_s"),
    *("compute_s", "comm_s", "wait_s", "weights_bytes", "spread_s", "repeats", "time_scale", "device", "link", "wire"),
    *("max_abs_error", "pacing_overrun", "host_steal", "valid", "why_invalid"),
)


def contenders(placement: Placement, paper: Placement, num_rivals: int) -> list[Plan]:
    """The chosen plan, the best `num_rivals` others that run layers otherwise, and the best of the paper's three."""
    plans = [placement.plan]
    for alternative in placement.alternatives:
        known = {(plan.strategies, plan.device_ids) for plan in plans}
        if alternative.fits and (alternative.plan.strategies, alternative.plan.device_ids) not in known:
            plans.append(alternative.plan)
        if len(plans) > num_rivals:
            break
    if paper.plan not in plans:
        plans.append(paper.plan)
    return [replace(plan, method="bp+auto") for plan in plans]


def choice_rows(
    run_path: str | Path,
    models: Sequence[str],
    bandwidths_mbps: Sequence[float],
    seq_lens: Sequence[int],
    device_counts: Sequence[int],
    repeats: int = 1,
    num_rivals: int = 3,
    transport: str = "auto",
) -> pd.DataFrame:
    """The chosen plan and its best rivals, measured for every model, bandwidth, length and number of devices.

    One row a plan (`GRID_COLUMNS`), the chosen one marked. All plans of a model on so many devices are held at once, so
    that none waits for weights. Rows are kept in the run's folder as they come: an interrupted call goes on from there.
    """
    path = Path(run_path) / "choice_rows.json"
    rows = []
    progress = tqdm(
        total=len(models) * len(bandwidths_mbps) * len(seq_lens) * len(device_counts), unit="cell", desc="choices"
    )
    for count in device_counts:
        with EmulatedCluster(count, bandwidth_bps=bandwidths_mbps[0] * 1e6, transport=transport) as cluster:
            kept = RowFile(path, cluster)
            for model in models:
                bench = Bench(cluster, load_link(Path(run_path) / "profiles", model))
                plans = {}
                for mbps in bandwidths_mbps:
                    for seq_len in seq_lens:
                        cell = Cell(model, "bp+auto", count, mbps, seq_len=seq_len, repeats=repeats)
                        config, profile = bench.config(cell), bench.profile(cell)
                        best = place_freely(config, profile, seq_len=seq_len)
                        paper = place(config, profile, seq_len=seq_len)
                        plans[cell] = contenders(best, paper, num_rivals)
                held = list(dict.fromkeys(plan for part in plans.values() for plan in part))
                for cell, part in plans.items():
                    progress.set_postfix_str(f"{model} {count} devices {cell.bandwidth_mbps:g} Mbps {cell.seq_len}")
                    key = asdict(cell) | {"plans": [plan.to_dict() for plan in part]}
                    measured = kept.get(key)
                    if measured is None:
                        measured = kept.put(key, bench.measure_plans(cell, part, held))
                    rows += [row | {"chosen": i == 0} for i, row in enumerate(measured)]
                    progress.update()
    progress.close()
    return pd.DataFrame(rows)[list(GRID_COLUMNS)]


def choice_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a cell of `choice_rows`: the chosen plan's latency over that of the best measured one (valid rows)."""
    cells = []
    where = ["model", "num_devices", "bandwidth_mbps", "seq_len"]
    for key, part in rows[rows["valid"].astype(bool)].groupby(where, sort=False):
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


def sizes_in_words(plan: Plan) -> str:
    """What each device takes, such as `tokens 1:1:2:4, heads 1+1+3+7, sub-blocks 1+1+2+4`."""
    shares = [share / min(plan.tokens_share) for share in plan.tokens_share]
    parts = ["tokens " + ":".join(f"{share:g}" for share in shares), "heads " + "+".join(map(str, plan.heads))]
    if "block" in plan.strategies:
        parts.append("sub-blocks " + "+".join(map(str, plan.sub_blocks)))
    return ", ".join(parts)


def plan_to_json(plan: Plan) -> str:
    return json.dumps(plan.to_dict())
