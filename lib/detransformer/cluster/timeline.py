"""Waiting and transfer in one request, from the events of all devices. Pure functions.

An event is (what, start, stop, launched) in seconds of one clock; a collective's start and stop are those of compute's
wait for it. The n-th collective launched is the same one on each device: it begins to move bytes when the last device
has launched it, and until then the others wait. A message from one device to the next begins when its sender has
launched it.
"""

import json
from collections.abc import Sequence

from detransformer.cluster.pacing import POINT_TO_POINT

TIMELINE_COLUMNS = (
    *("model", "method", "wire", "link", "bandwidth_mbps", "num_devices"),
    *("rank", "what", "start_s", "stop_s"),
)

Event = tuple[str, float, float, float]
Part = tuple[str, float, float]  # (compute, wait or a collective, start, stop)


def split_waits(events: Sequence[Sequence[Event]]) -> list[list[Part]]:
    """Cuts each collective of each device (rank order) into `wait`, until the last had launched it, and the transfer.

    Raises:
        ValueError: if the devices report different collectives.
    """
    events = [[tuple(event) for event in own] for own in events]  # JSON makes them lists
    group = [sorted((e for e in own if e[0] not in ("compute", *POINT_TO_POINT)), key=lambda e: e[3]) for own in events]
    active = [own for own in group if own]
    if any([e[0] for e in own] != [e[0] for e in active[0]] for own in active):
        raise ValueError("the devices made different collectives in one request: their events cannot be matched.")
    last_launch = [max(own[n][3] for own in active) for n in range(len(active[0]))] if active else []
    began = [dict(zip(own, last_launch, strict=False)) for own in group]
    for rank, own in enumerate(events[1:], start=1):
        sent = [e[3] for e in events[rank - 1] if e[0] == "send"]
        began[rank].update(zip((e for e in own if e[0] == "receive"), sent, strict=False))
    parts: list[list[Part]] = [[] for _ in events]
    for rank, own in enumerate(events):
        for event in own:
            what, start, stop, _ = event
            moved = min(max(began[rank].get(event, start), start), stop)
            parts[rank] += [("wait", start, moved)] if moved > start else []
            parts[rank] += [(what, moved, stop)] if stop > moved else []
    return parts


def seconds_of(parts: Sequence[Part]) -> dict[str, float]:
    """Sums of `compute_s`, `wait_s` and `comm_s` of one device's parts."""
    sums = {"compute_s": 0.0, "wait_s": 0.0, "comm_s": 0.0}
    for what, start, stop in parts:
        sums[f"{what}_s" if what in ("compute", "wait") else "comm_s"] += stop - start
    return sums


def timeline_rows(parts: Sequence[Sequence[Part]], time_scale: float = 1.0) -> list[dict]:
    """Rows of rank, what, start_s, stop_s from the parts of all devices, in their own seconds from the first start."""
    first = min((own[0][1] for own in parts if own), default=0.0)

    def since(seconds: float) -> float:
        return round((seconds - first) / time_scale, 6)

    return [
        {"rank": rank, "what": what, "start_s": since(start), "stop_s": since(stop)}
        for rank, own in enumerate(parts)
        for what, start, stop in own
    ]


def joined_runs(results: Sequence[Sequence[dict]]) -> list[dict]:
    """The results of several runs of one plan as those of a single run: a rank's samples one after another."""
    joined = []
    for same in zip(*results, strict=True):
        samples = [sample for result in same for sample in result["samples"]]
        peaks = [result["peak_rss_bytes"] for result in same]
        joined.append(same[-1] | {"samples": samples, "peak_rss_bytes": None if None in peaks else max(peaks)})
        for error in ("max_abs_error", "relative_error"):
            if error in same[-1]:
                joined[-1][error] = max(result[error] for result in same)
    return joined


def slowest_sums(results: list[dict], sample: int, scale: float) -> dict[str, float]:
    """`compute_s`, `wait_s` and `comm_s` of the rank with the largest latency, in the devices' seconds."""
    parts = split_waits([r["samples"][sample]["events"] for r in results])
    slowest = max(range(len(results)), key=lambda rank: results[rank]["samples"][sample]["latency_s"])
    return {name: seconds / scale for name, seconds in seconds_of(parts[slowest]).items()}


def median_timeline(row: dict, results: list[dict], scale: float) -> list[dict]:
    """The `timeline` rows of the sample whose latency is nearest to the row's median."""
    samples = json.loads(row["samples_s"])
    median = min(range(len(samples)), key=lambda i: abs(samples[i] - row["latency_s"]))
    conditions = {name: row[name] for name in TIMELINE_COLUMNS if name in row}
    parts = split_waits([r["samples"][median]["events"] for r in results])
    return [conditions | part for part in timeline_rows(parts, scale)]
