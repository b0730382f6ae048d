"""The studies of notebook 09: is the chosen plan the fastest, even while a link changes?

Each function measures on an emulated cluster and returns a frame in the form of its saved table.
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from latency_studies import in_words, measured_bench, on_testbed
from tqdm.auto import tqdm

from detransformer.cluster.bench import MAX_TIME_SCALE, Bench
from detransformer.cluster.cells import Cell, RowFile
from detransformer.cluster.devices import DeviceSpec
from detransformer.cluster.selfcheck import host_time_scale
from detransformer.cluster.session import EmulatedCluster
from detransformer.parallel.plan import Plan, layer_plan
from detransformer.planning.cost import alone_seconds
from detransformer.planning.placement import Placement, place, place_freely
from detransformer.planning.profile import ClusterProfile
from detransformer.planning.runtime import PROBE_BYTES, RuntimePlanner, static_plans
from detransformer.record.verdict import Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.tables.latency import checked_rows

ORIGINAL_LAYERS = ("tensor", "heads", "ulysses", "sequence", "galaxy", "replicate", "one device")

GRID_COLUMNS = (
    *("model", "num_devices", "bandwidth_mbps", "seq_len", "batch_size", "plan", "chosen", "latency_s", "predicted_s"),
    *("compute_s", "comm_s", "wait_s", "weights_bytes", "spread_s", "repeats", "time_scale", "device", "link", "wire"),
    *("max_abs_error", "pacing_overrun", "host_steal", "valid", "why_invalid"),
)


def contenders(placement: Placement, paper: Placement, num_rivals: int) -> list[Plan]:
    """The chosen plan, the best `num_rivals` others with other strategies, and the best of the paper's three."""
    distinct: dict[tuple, Plan] = {}
    for plan in (placement.plan, *(a.plan for a in placement.alternatives if a.fits)):
        distinct.setdefault((plan.strategies, plan.device_ids), plan)
    plans = list(distinct.values())[: num_rivals + 1]
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

    One row a plan (`GRID_COLUMNS`), the chosen one marked. All plans of a model on the same number of devices are
    loaded at once, so that none waits for weights. Rows are kept in the run's folder; an interrupted call resumes.
    """
    rows = []
    for count in device_counts:
        with EmulatedCluster(count, bandwidth_bps=bandwidths_mbps[0] * 1e6, transport=transport) as cluster:
            bench = measured_bench(run_path, cluster)
            kept = RowFile(Path(run_path) / "choice_rows.json", cluster, [__file__])
            for model in models:
                plans = {}
                for mbps, seq_len in itertools.product(bandwidths_mbps, seq_lens):
                    cell = Cell(model, "bp+auto", count, mbps, seq_len=seq_len, repeats=repeats)
                    config, profile = bench.config(cell), bench.profile(cell)
                    best, paper = (choose(config, profile, seq_len=seq_len) for choose in (place_freely, place))
                    plans[cell] = contenders(best, paper, num_rivals)
                held = list(dict.fromkeys(plan for part in plans.values() for plan in part))
                for cell, part in tqdm(plans.items(), unit="cell", desc=f"choices {model} {count} devices"):
                    key = asdict(cell) | {"plans": [plan.to_dict() for plan in part]}
                    measured = kept.get(key) or kept.put(key, bench.measure([cell] * len(part), part, held))
                    rows += [row | {"chosen": i == 0} for i, row in enumerate(measured)]
    return pd.DataFrame(rows)[list(GRID_COLUMNS)]


def unequal_rows(
    run_path: str | Path,
    model: str,
    speeds: Sequence[float] = (1, 1, 2, 4),
    bandwidths_mbps: Sequence[float] = (1000, 500, 125),
    num_divisions: int = 8,
    seq_len: int = 128,
    repeats: int = 3,
    transport: str = "auto",
) -> pd.DataFrame:
    """Devices of these relative `speeds` (1: a Raspberry Pi 4B): the planned split against even ones.

    Splits: `planned`; `even, same strategies`; `even, best strategies`, those chosen by a planner that takes all
    devices to be equal. `ideal_s` is the model's work over the speed of all devices, nothing sent; `over_ideal` is the
    latency over `ideal_s` and the communication that could not be hidden.
    """
    rows = []
    specs = [DeviceSpec(speed=speed) for speed in speeds]
    with EmulatedCluster(len(speeds), specs, bandwidths_mbps[0] * 1e6, transport) as cluster:
        bench = measured_bench(run_path, cluster)
        kept = RowFile(Path(run_path) / "unequal_rows.json", cluster, [__file__])
        for mbps in tqdm(bandwidths_mbps, unit="rate", desc="unequal devices"):
            sizes = dict(num_divisions=num_divisions, seq_len=seq_len, repeats=repeats)
            cell = Cell(model, "bp+auto", len(speeds), mbps, **sizes)
            config, profile = bench.config(cell), bench.profile(cell)
            planned = place_freely(config, profile, seq_len=seq_len).plan
            alike = replace(profile, devices=(profile.devices[0],) * len(speeds))
            believed = place_freely(config, alike, seq_len=seq_len).plan
            same = layer_plan("bp+auto", config, planned.strategies, [1.0] * len(speeds), num_chunks=planned.num_chunks)
            splits = {"planned": planned, "even, same strategies": same, "even, best strategies": believed}
            plans = [replace(plan, method="bp+auto") for plan in splits.values()]
            measured = kept.get(asdict(cell)) or kept.put(asdict(cell), bench.measure([cell] * len(plans), plans))
            alone_s = alone_seconds(config, profile, range(len(speeds)), seq_len)
            ideal_s = 1 / sum(1 / seconds for seconds in alone_s)
            for (split, plan), row in zip(splits.items(), measured, strict=True):
                added = {"split": split, "sizes": sizes_in_words(plan), "devices": str(plan.device_ids)}
                added |= {"speeds": ":".join(f"{speed:g}" for speed in speeds), "ideal_s": ideal_s}
                rows.append(row | added | {"over_ideal": row["latency_s"] / (ideal_s + row["comm_s"])})
    frame = pd.DataFrame(rows)
    planned = frame[frame["split"] == "planned"].set_index("bandwidth_mbps")["latency_s"]
    frame["over_planned"] = frame["latency_s"] / frame["bandwidth_mbps"].map(planned)
    added = ["speeds", "split", "sizes", "devices", "ideal_s", "over_ideal", "over_planned"]
    return frame[[*added, *(c for c in GRID_COLUMNS if c != "chosen")]]


def trace_rows(
    run_path: str | Path,
    phases: Sequence[tuple[int, float]],
    model: str = "bert-base",
    device: str = "jetson-tx2",
    num_devices: int = 4,
    seq_lens: Sequence[int] = (16, 32, 64, 128),
    max_plans: int = 4,
    transport: str = "auto",
    time_scale: float | None = None,
) -> pd.DataFrame:
    """Requests of mixed lengths while the link's rate drops and recovers: run-time planning, and each plan alone.

    The planner is told each request's length, never the link's rate: it sees only the duration of its traffic. If the
    plan in use sends nothing, a probe is sent now and then, whose time counts as the request's. One row a request and
    policy, `adaptive` or `fixed: PLAN`, in the order of the requests; all policies serve the same requests.

    Args:
        phases: numbers of requests, each with the link's rate in Mbps.
    """
    path = Path(run_path) / "trace_rows.json"
    rate_of_each = [mbps for num_requests, mbps in phases for _ in range(num_requests)]
    rates = sorted(set(rate_of_each), reverse=True)
    lengths = np.random.default_rng(0).choice(list(seq_lens), len(rate_of_each)).tolist()
    stream = list(zip(lengths, rate_of_each, strict=True))
    with EmulatedCluster(num_devices, device, rates[0] * 1e6, transport) as cluster:
        bench, kept = measured_bench(run_path, cluster, time_scale=time_scale), RowFile(path, cluster, [__file__])
        cell = Cell(model, "bp+auto", num_devices, rates[0], seq_len=max(seq_lens), repeats=1)
        config = bench.config(cell)
        everyone = range(num_devices)
        scale = time_scale or min(MAX_TIME_SCALE, host_time_scale(cluster, config, bench.profile(cell), everyone))
        profile = on_testbed(bench.profile(cell), scale)
        plans = static_plans(config, profile, seq_lens, [1e6 * mbps for mbps in rates], max_plans)
        policies = {"adaptive": plans} | {f"fixed: {in_words(plan)}": [plan] for plan in plans}
        rows = []
        for policy, choices in policies.items():
            key = asdict(cell) | {"policy": policy, "stream": stream, "plans": [plan.to_dict() for plan in plans]}
            rows += kept.get(key) or kept.put(key, _serve(bench, cell, profile, scale, policy, choices, plans, stream))
    return pd.DataFrame(rows)


def _serve(
    bench: Bench,
    cell: Cell,
    profile: ClusterProfile,
    scale: float,
    policy: str,
    choices: Sequence[Plan],
    held: Sequence[Plan],
    stream: Sequence[tuple[int, float]],
) -> list[dict]:
    """Serves the stream by run-time planning over `choices`; rows as in `trace_rows`."""
    cluster, checkpoint = bench.cluster, bench.checkpoint(cell)
    seq_lens, rates = sorted({length for length, _ in stream}), sorted({mbps for _, mbps in stream})
    bandwidths = np.geomspace(0.5e6 * rates[0], 2e6 * rates[-1], 12).tolist()
    planner = RuntimePlanner(bench.config(cell), choices, profile, seq_lens, bandwidths)
    rows, mbps = [], None
    for number, (length, rate) in enumerate(tqdm(stream, unit="request", desc=policy)):
        if rate != mbps:
            cluster.set_link(rate * 1e6, scale)
            mbps = rate
        probe_s = 0.0
        if planner.needs_probe():
            num_bytes, probe_s = probe_link(cluster)
            planner.observe_probe(num_bytes, probe_s)
        started = time.perf_counter()
        choice = planner.choose(length)
        chosen_s = time.perf_counter() - started
        plan = choices[choice.index]
        results = bench.run_plan(
            profile.at(rate * 1e6), checkpoint, plan, length, 1, held_with=[other.to_dict() for other in held]
        )
        samples = [result["samples"][0] for result in results]
        estimate_bps = planner.bandwidth_bps
        for transfer in as_transferred([sample["transfers"] for sample in samples]):
            planner.observe(*transfer)
        overrun = max(sample["overrun_s"] / max(sample["modelled_s"], 1e-9) for sample in samples)
        rows.append(
            {
                "policy": policy,
                "request": number,
                "seq_len": length,
                "bandwidth_mbps": rate,
                "estimate_mbps": estimate_bps / 1e6,
                "plan": in_words(plan),
                "switched": choice.switched,
                "latency_s": max(sample["latency_s"] for sample in samples) + probe_s,
                "probe_s": probe_s,
                "predicted_s": choice.predicted_s,
                "choosing_s": chosen_s,
                "max_abs_error": max(r["max_abs_error"] for r in results if "max_abs_error" in r),
                "pacing_overrun": overrun,
                "model": cell.model,
                "device": cluster.profile_name,
                "num_devices": cluster.num_devices,
                "link": cluster.link,
                "time_scale": scale,
            }
        )
    return rows


def as_transferred(transfers: Sequence[Sequence[tuple[str, int, float]]]) -> list[tuple[str, int, float]]:
    """A request's collectives, from each device's own list: the busiest device's bytes, and seconds.

    The seconds are the longest that a device saw: a late device finds its data already there, and would overestimate
    the link. That others waited for it only makes the rate look smaller, for some of the collectives.
    """
    return [
        (same[0][0], max(num_bytes for _, num_bytes, _ in same), max(seconds for *_, seconds in same))
        for same in zip(*transfers, strict=True)
    ]


def probe_link(cluster: EmulatedCluster) -> tuple[int, float]:
    """One all_gather of `PROBE_BYTES` a device: (bytes that one sends, seconds)."""
    job = dict(kind="all_gather", num_floats=PROBE_BYTES // 4, num_devices=cluster.num_devices, repeats=1)
    results = cluster.run("time_collective", **job)
    seconds = max(result["seconds"][0] for result in results) / cluster.time_scale
    return max(result["bytes"] for result in results), seconds


def sizes_in_words(plan: Plan) -> str:
    """Each device's sizes, such as `tokens 1:1:2:4, heads 1+1+3+7, sub-blocks 1+1+2+4`."""
    shares = [share / min(plan.tokens_share) for share in plan.tokens_share]
    parts = ["tokens " + ":".join(f"{share:g}" for share in shares), "heads " + "+".join(map(str, plan.heads))]
    if "block" in plan.strategies:
        parts.append("sub-blocks " + "+".join(map(str, plan.sub_blocks)))
    return ", ".join(parts)


# Tables of these rows ---------------------------------------------------------------------------------------------


def choice_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a cell of table `choices`: the chosen plan's latency over the best measured plan's (valid rows)."""
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
    """(strategy of most original layers, or `one device`; chunks) of a described plan."""
    if plan.endswith("on 1 device"):
        return "one device", 1
    names = Counter(word for word in re.findall(r"[a-z]+", plan) if word in ORIGINAL_LAYERS)
    chunks = re.search(r"(\d+) chunks", plan)
    return names.most_common(1)[0][0], int(chunks[1]) if chunks else 1


def adaptive_verdicts(cells: pd.DataFrame, unequal: pd.DataFrame, trace: pd.DataFrame) -> pd.DataFrame:
    """One row a claim of this repository about adaptive execution, judged by `record.verdict`: all are limits."""
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
