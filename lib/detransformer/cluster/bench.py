"""Latency bench: one row for every (model, method, devices, bandwidth), measured on an emulated cluster.

Rows carry their conditions and their self-check; a row whose link or pacing failed it is marked invalid. A grid writes
each row when it is measured and picks up where it was interrupted.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import psutil
from tqdm.auto import tqdm
from transformers import BertConfig

from detransformer.cluster.checkpoints import Checkpoint, decoupled_checkpoint, original_checkpoint, request
from detransformer.cluster.session import EmulatedCluster
from detransformer.files import atomic_write
from detransformer.parallel.plan import BLOCK_METHODS, METHODS, Plan, published_plan
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.placement import auto_plan
from detransformer.planning.profile import LinkProfile

MIN_LINK_SHARE = 0.9  # a link must carry at least this share of its rate, and never more than the rate
MAX_OVERRUN_SHARE = 0.03  # of the modelled compute, by which the host may be late
MAX_ABS_ERROR = 1e-4  # float32 sums in another order move a LayerNormed output (size 1) by some 1e-6 a layer
MAX_TIME_SCALE = 8
# What two cores shape and move without making collectives late, summed over the devices' links; above it everything is
# run slower from the start. (At 2 Gbps a link still passes its check, but an all_gather takes twice its time.)
MAX_TOTAL_BPS = 1e9
ATTEMPTS = 2  # at one time scale, of a row that was disturbed
LINK_ATTEMPTS = 4  # a link's rate is what it carried in the best one
DISTURBING_STEAL = 0.1  # of the processors, taken by other guests of the same machine: worth another attempt
MAX_STEAL = 0.3  # above it a row says more about the neighbours than about the plan
STREAM_REQUESTS = {"pp": 8, "dp": 2}  # back to back, for throughput: a pipeline has to fill and drain
LINK_CHECK_S = 0.15
MIN_CHECK_BYTES = 500_000  # on a slow link a shorter transfer shows latency, not rate


@dataclass(frozen=True)
class Cell:
    """What one row measures. `num_original_layers` and `num_divisions` matter to BP methods only."""

    model: str
    method: str
    num_devices: int = 4
    bandwidth_mbps: float = 125.0
    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: str = "full"
    seq_len: int = 128
    batch_size: int = 1
    repeats: int = 5

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown: choose from {', '.join(METHODS)}.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1: measure at least once.")
        if not self.bandwidth_mbps > 0:
            raise ValueError(f"bandwidth_mbps={self.bandwidth_mbps} must be above 0.")

    @property
    def needs_decoupled(self) -> bool:
        return self.method in (*BLOCK_METHODS, "bp+auto")


class Bench:
    """Measures cells on one running cluster; keeps what rows share (link checks, time scales, requests)."""

    def __init__(
        self,
        cluster: EmulatedCluster,
        link: LinkProfile | None = None,
        time_scale: float | None = None,
        memory_budget_bytes: int | None = None,
    ):
        """`link` is a measured profile for predictions; `time_scale` None lets the bench choose."""
        self.cluster = cluster
        self.link = link
        self.fixed_time_scale = time_scale
        self.memory_budget_bytes = memory_budget_bytes
        self._achieved: dict[tuple[float, float], float] = {}

    def measure(self, cell: Cell) -> dict:
        """One row.

        A host that shares its processors is disturbed now and then: a row that was late, or during which other guests
        took much of the processors, is measured again; one that was late each time, at twice the time scale. The least
        disturbed attempt is the row.
        """
        checkpoint = self.checkpoint(cell)
        plan, prediction = self.plan(cell, checkpoint.config)
        files = request(checkpoint, cell.seq_len, cell.batch_size, self.cluster.folder)
        links_used = sum(prediction.bytes.values()) > 0
        scale = self.fixed_time_scale or _first_time_scale(cell.bandwidth_mbps, plan.num_devices if links_used else 1)
        while True:
            rows = []
            for _ in range(ATTEMPTS):
                scale, achieved = self._set_link(cell.bandwidth_mbps, scale, links_used)
                before = psutil.cpu_times()
                results = self._run(cell, plan, checkpoint, files)
                steal = _stolen_share(before, psutil.cpu_times())
                rows.append(self._row(cell, checkpoint.config, plan, prediction, results, scale, achieved, steal))
                if rows[-1]["valid"] and steal <= DISTURBING_STEAL:
                    return rows[-1]
            late = all(row["pacing_overrun"] > MAX_OVERRUN_SHARE for row in rows)
            if not late or self.fixed_time_scale or 2 * scale > MAX_TIME_SCALE:
                return min(rows, key=lambda row: (not row["valid"], row["host_steal"]))
            scale *= 2

    def checkpoint(self, cell: Cell) -> Checkpoint:
        if not cell.needs_decoupled:
            return original_checkpoint(cell.model)
        return decoupled_checkpoint(cell.model, cell.num_original_layers, cell.num_divisions, cell.attention_width)

    def plan(self, cell: Cell, config: BertConfig) -> tuple[Plan, Prediction]:
        """The plan that `cell` runs and what the cost model predicts for it."""
        self.cluster.bandwidth_bps = cell.bandwidth_mbps * 1e6
        profile = self.cluster.profile(config, self.link)
        if cell.num_devices > len(profile.devices):
            raise ValueError(f"{cell.num_devices} devices were asked for and the cluster has {len(profile.devices)}.")
        profile = type(profile)(profile.devices[: cell.num_devices], profile.link)
        if cell.method == "bp+auto":
            plan = auto_plan(
                config,
                profile,
                seq_len=cell.seq_len,
                batch_size=cell.batch_size,
                memory_budget_bytes=self.memory_budget_bytes,
            )
        else:
            plan = published_plan(cell.method, config, [1.0] * cell.num_devices)
        return plan, predict(config, plan, profile, cell.seq_len, cell.batch_size)

    def _set_link(self, bandwidth_mbps: float, scale: float, used: bool) -> tuple[float, float]:
        """Sets the links and, where they are used, checks them; doubles the time scale until they carry their rate.

        Returns (scale, Mbps achieved; NaN for a link that is not used or not real).
        """
        while True:
            self.cluster.set_link(bandwidth_mbps * 1e6, scale)
            if not used or self.cluster.transport != "namespaces":
                return scale, float("nan")
            achieved = self._link_rate(bandwidth_mbps, scale)
            enough = achieved >= MIN_LINK_SHARE * bandwidth_mbps
            if enough or self.fixed_time_scale or 2 * scale > MAX_TIME_SCALE:
                return scale, achieved
            scale *= 2

    def _link_rate(self, bandwidth_mbps: float, scale: float) -> float:
        """Mbps that the links carry, in the devices' seconds; checked until they pass or have failed often enough."""
        key = (bandwidth_mbps, scale)
        num_bytes = max(MIN_CHECK_BYTES, int(bandwidth_mbps * 1e6 / scale * LINK_CHECK_S / 8))
        for _ in range(LINK_ATTEMPTS):
            if self._achieved.get(key, 0) >= MIN_LINK_SHARE * bandwidth_mbps:
                break
            results = self.cluster.run("check_link", num_bytes=num_bytes)
            slowest_s = max(seconds for result in results for seconds in result["seconds"])
            self._achieved[key] = max(self._achieved.get(key, 0), 8 * num_bytes / slowest_s * scale / 1e6)
        return self._achieved[key]

    def _run(self, cell: Cell, plan: Plan, checkpoint, files) -> list[dict]:
        cluster = self.cluster
        profile = cluster.profile(checkpoint.config, self.link)
        modelled = cluster.transport == "loopback"
        results = cluster.run(
            "run_plan",
            per_rank=[{"device": asdict(device)} for device in profile.devices],
            checkpoint=str(checkpoint.path),
            plan=plan.to_dict(),
            inputs=str(files.inputs),
            reference=str(files.reference),
            repeats=cell.repeats,
            link=asdict(profile.link) if modelled else None,
            time_scale=cluster.time_scale,
            stream=STREAM_REQUESTS.get(cell.method, 0),
        )
        return [result for result in results if result is not None]

    def _row(
        self, cell: Cell, config: BertConfig, plan: Plan, prediction: Prediction, results, scale, achieved, steal
    ) -> dict:
        # A request lasts as long as its slowest rank; a pipeline's last rank waits for all before it.
        latencies = [max(r["samples"][i]["latency_s"] for r in results) for i in range(cell.repeats)]
        slowest = max(results, key=lambda r: sum(s["latency_s"] for s in r["samples"]))
        compute_s = statistics.median(s["compute_s"] for s in slowest["samples"])
        overrun = max(
            sum(s["overrun_s"] for s in r["samples"]) / max(sum(s["compute_s"] for s in r["samples"]), 1e-9)
            for r in results
        )
        error = max(r["max_abs_error"] for r in results if "max_abs_error" in r)
        sender = max(results, key=lambda r: sum(r["bytes"].values()))
        latency = statistics.median(latencies)
        throughput = 1 / latency
        if "stream_s" in results[0]:
            copies = plan.num_devices if cell.method == "dp" else 1
            throughput = copies * STREAM_REQUESTS[cell.method] / max(r["stream_s"] for r in results)
        row = {
            "model": cell.model,
            "method": cell.method,
            "plan": plan.describe(),
            "num_original_layers": getattr(config, "num_original_layers", None),
            "num_divisions": getattr(config, "num_divisions", None),
            "num_devices": plan.num_devices,
            "bandwidth_mbps": cell.bandwidth_mbps,
            "seq_len": cell.seq_len,
            "batch_size": cell.batch_size,
            "link": self.cluster.link,
            "wire": plan.wire,
            "latency_s": latency,
            "spread_s": max(latencies) - min(latencies),
            "compute_s": compute_s,
            "comm_s": latency - compute_s,
        }
        for kind in ("all_reduce", "all_gather", "send"):
            row[f"{kind}_count"] = sender["counts"].get(kind, 0)
            row[f"{kind}_bytes"] = sender["bytes"].get(kind, 0)
        row |= {
            "link_bytes": max(s["link_bytes"] for r in results for s in r["samples"])
            if self.cluster.transport == "namespaces"
            else None,
            "throughput_rps": throughput,
            "weights_bytes": max(r["weights_bytes"] for r in results),
            "predicted_s": prediction.latency_s,
            "time_scale": scale,
            "achieved_mbps": achieved,
            "pacing_overrun": overrun,
            "host_steal": steal,
            "max_abs_error": error,
            "repeats": cell.repeats,
            "device": self.cluster.profile_name,
            "samples_s": json.dumps([round(s, 6) for s in latencies]),
        }
        why = self._why_invalid(row)
        return row | {"valid": not why, "why_invalid": why}

    def _why_invalid(self, row: dict) -> str:
        reasons = []
        rate, achieved = row["bandwidth_mbps"], row["achieved_mbps"]
        if achieved == achieved and not MIN_LINK_SHARE * rate <= achieved <= rate:
            reasons.append(f"link carried {achieved:.0f} of {rate:.0f} Mbps")
        if row["pacing_overrun"] > MAX_OVERRUN_SHARE:
            reasons.append(f"host late by {row['pacing_overrun']:.1%} of compute")
        if row["host_steal"] > MAX_STEAL:
            reasons.append(f"other guests took {row['host_steal']:.0%} of the host's processors")
        if not row["max_abs_error"] <= MAX_ABS_ERROR:
            reasons.append(f"output differs from the single device's by {row['max_abs_error']:.1e}")
        return "; ".join(reasons)


def _first_time_scale(bandwidth_mbps: float, num_devices: int) -> float:
    """The power of two by which all is slowed so that the links together stay within `MAX_TOTAL_BPS`."""
    total_bps = bandwidth_mbps * 1e6 * num_devices if num_devices > 1 else 0
    return 2.0 ** max(0, math.ceil(math.log2(max(total_bps, 1) / MAX_TOTAL_BPS)))


def _stolen_share(before, after) -> float:
    """Share of processor time between two `psutil.cpu_times()` that a hypervisor gave to others; 0 where unknown."""
    total = sum(after) - sum(before)
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / total if total > 0 else 0.0


def check_cells(bench: Bench, cells: Iterable[Cell]) -> None:
    """Raises ValueError where a cell's plan does not fit its model or the memory budget; measures nothing."""
    for cell in cells:
        bench.plan(cell, bench.checkpoint(cell).config)


def measure_grid(
    bench: Bench, cells: Iterable[Cell], path: str | Path | None = None, quiet: bool = False
) -> pd.DataFrame:
    """Measures `cells` in order, one row each.

    With `path`, each row is written there when it is measured, and a call after an interruption goes on from there, as
    long as code and conditions are the same. The file goes when all are measured: the frame is the record.
    """
    cells = list(dict.fromkeys(cells))
    kept = _load_rows(path)
    conditions = {"link": bench.cluster.link, "device": bench.cluster.profile_name, "code": _code_fingerprint()}
    rows = []
    progress = tqdm(cells, disable=quiet, unit="row", desc="bench")
    for cell in progress:
        progress.set_postfix_str(f"{cell.model} {cell.method} {cell.num_devices} devices {cell.bandwidth_mbps:g} Mbps")
        key = json.dumps(asdict(cell) | conditions)
        if key not in kept:
            kept[key] = bench.measure(cell)
            if path:
                with atomic_write(path) as file:
                    json.dump(kept, file, indent=1)
        rows.append(kept[key])
    if path:
        Path(path).unlink(missing_ok=True)
    return pd.DataFrame(rows)


def _code_fingerprint() -> str:
    """Changes when the code that makes rows does: rows of another version are measured again."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in ("models", "parallel", "planning", "cluster"):
        for source in sorted((package / room).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _load_rows(path: str | Path | None) -> dict[str, dict]:
    if not path or not Path(path).is_file():
        return {}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not a bench's row file: remove it or choose another name.") from None
    return rows


def grid(
    model: str, methods: Sequence[str], bandwidths_mbps: Sequence[float], num_devices: int = 4, **common
) -> list[Cell]:
    """Cells of `methods` x `bandwidths_mbps`, method by method, so that a device loads each method's weights once.

    `single` uses no link and stands once, at the first bandwidth.
    """
    return [
        Cell(model, method, num_devices, bandwidth, **common)
        for method in methods
        for bandwidth in (bandwidths_mbps[:1] if method == "single" else bandwidths_mbps)
    ]
