"""Latency bench: one row for every (model, method, devices, bandwidth, wire), measured on an emulated cluster.

Rows that are compared are measured together: at one time scale, and a request of each in turn, again and again, so that
what disturbs the host disturbs all of them. Rows carry their conditions and their self-check: links and pacing are
checked before each round and after the last, and a row that fails is marked invalid, with the reason. A grid writes
rows when they are measured and picks up where it was interrupted.
"""

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from tqdm.auto import tqdm
from transformers import BertConfig, GPT2Config, PretrainedConfig

from detransformer.cluster.checkpoints import (
    Checkpoint,
    decoupled_checkpoint,
    open_folder,
    original_checkpoint,
    request,
)
from detransformer.cluster.devices import PACES, preset_profile
from detransformer.cluster.session import EmulatedCluster
from detransformer.cluster.timeline import seconds_of, split_waits, timeline_rows
from detransformer.files import atomic_write, data_folder
from detransformer.machine import usable_cores
from detransformer.models.configuration import (
    PRESETS,
    config_fields,
    decoupled_config,
    preset_config,
)
from detransformer.parallel.methods import METHODS
from detransformer.parallel.plan import Plan, is_decoder, published_plan
from detransformer.parallel.wire import check_wire
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.placement import method_plan
from detransformer.planning.profile import SENT_KINDS, ClusterProfile, DeviceProfile, LinkProfile

FLOAT32_METHODS = ("single", "dp", "dtensor")  # send nothing, or by PyTorch's own means: float32 on any wire
MIN_LINK_SHARE = 0.9  # a link must carry at least this share of its rate, and never more than the rate
MAX_PACING_ERROR = 0.02  # by which paced segments of an idle device may be longer than modelled
MAX_OVERRUN_SHARE = 0.03  # of what is modelled, by which the host may be late
MAX_ABS_ERROR = 1e-4  # float32 sums in another order move a LayerNormed output (size 1) by some 1e-6 a layer
# Largest relative error (RMS) of an output whose messages were rounded. One rounding of a row moves it by some 0.2%
# (bfloat16, 8 bits of mantissa) or 0.7% (int8: a step of max / 127, and a row's largest number is some three times its
# RMS), and roundings add up like noise. BERT-Base's 12 layers have 0.2 to 0.5% and 0.8 to 2.0%, by method; twice the
# layers have up to 1.4 times that.
MAX_RELATIVE_ERROR = {"bfloat16": 0.01, "int8": 0.04}
MAX_TIME_SCALE = 32
SLOWER = 1.5  # the next time scale to try, over one at which the host was late
# What two cores shape and move without making collectives late, summed over the devices' links; above it everything is
# run slower from the start. (At 2 Gbps a link still passes its check, but an all_gather takes twice its time.)
MAX_TOTAL_BPS = 1e9
# A core computes a layer, whole or in shares, some seven times faster than a device, and messages take their part of
# it: four devices on two cores are in time at half their speed, most at the first try. All that is compared runs alike.
DEVICES_A_CORE = 1
USUAL_DEVICE = "rpi4b"  # of which a core carries so many; a device twice as fast counts as two
KEPT_SHARE = 0.5  # of the free memory, for models that are measured in turn: what does not fit is read each time
ATTEMPTS = 2  # at one time scale, of a request that was disturbed
CHECK_ATTEMPTS = 10  # of a self-check that fails: a shared host is disturbed now and then
DISTURBING_STEAL = 0.1  # of the processors, taken by other guests of the same machine: worth another attempt
MAX_STEAL = 0.3  # above it a row says more about the neighbours than about the plan
STREAM_REQUESTS = {"stages": 8, "copies": 2}  # back to back, for throughput: a pipeline has to fill and drain
LINK_CHECK_S = 0.15
MIN_CHECK_BYTES = 500_000  # on a slow link a shorter transfer shows latency, not rate
TIMELINE_COLUMNS = (
    *("model", "method", "wire", "link", "bandwidth_mbps", "num_devices"),
    *("rank", "what", "start_s", "stop_s"),
)
PACING_CHECK_S, PACED_SEGMENT_S = 0.1, 0.01  # the latter in the devices' seconds, as short as in fast plans


@dataclass(frozen=True)
class Cell:
    """What one row measures. `num_original_layers` and `num_divisions` matter to BP methods only.

    `burns`: paced devices compute where they would sleep (`Pacer`), to see what messages cost beside that.
    """

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
    wire: str = "float32"
    pace: str = "measured"
    burns: bool = False

    def __post_init__(self):
        if self.pace not in PACES:
            raise ValueError(f"pace={self.pace!r} is unknown: choose one of {', '.join(PACES)}.")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown: choose from {', '.join(METHODS)}.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1: measure at least once.")
        if not self.bandwidth_mbps > 0:
            raise ValueError(f"bandwidth_mbps={self.bandwidth_mbps} must be above 0.")
        check_wire(self.wire)
        if self.method in FLOAT32_METHODS and self.wire != "float32":
            raise ValueError(f"{self.method} cannot send {self.wire}: use wire='float32'.")

    @property
    def needs_decoupled(self) -> bool:
        return self.method.startswith("bp+")

    @property
    def comparison(self) -> tuple:
        """What is alike in cells that stand side by side, and so are measured in turn."""
        return self.model, self.num_devices, self.bandwidth_mbps, self.seq_len, self.batch_size, self.pace


@dataclass(frozen=True)
class Check:
    """One self-check: Mbps of the slowest and fastest link, in the devices' seconds (NaN: none used), and pacing."""

    link_min_mbps: float
    link_max_mbps: float
    pacing_error: float

    def failures(self, bandwidth_mbps: float) -> list[str]:
        """What is wrong, in words."""
        reasons = []
        if self.link_min_mbps < MIN_LINK_SHARE * bandwidth_mbps:
            reasons.append(f"a link carried {self.link_min_mbps:.0f} of {bandwidth_mbps:g} Mbps")
        if self.link_max_mbps > bandwidth_mbps:
            reasons.append(f"a link carried {self.link_max_mbps:.1f} Mbps, more than its {bandwidth_mbps:g}")
        if self.pacing_error > MAX_PACING_ERROR:
            reasons.append(f"idle devices were paced {self.pacing_error:.1%} too slow")
        return reasons

    def joined(self, other: "Check") -> "Check":
        """The worse of both in every respect."""
        return Check(
            min(self.link_min_mbps, other.link_min_mbps),
            max(self.link_max_mbps, other.link_max_mbps),
            max(self.pacing_error, other.pacing_error),
        )


class Bench:
    """Measures cells on one running cluster; `timelines` keeps the events of each cell's median sample."""

    def __init__(
        self,
        cluster: EmulatedCluster,
        link: LinkProfile | None = None,
        time_scale: float | None = None,
        memory_budget_bytes: int | None = None,
        efficiency: Mapping[str, Sequence] | None = None,
    ):
        """`link` is a measured profile for predictions; `time_scale` None lets the bench choose.

        `efficiency` has rows by model, as measured on this host (`profiler.efficiency_rows`); without, those that come
        with the package are taken.
        """
        self.cluster = cluster
        self.link = link
        self.efficiency = efficiency or {}
        self.fixed_time_scale = time_scale
        self.memory_budget_bytes = memory_budget_bytes
        self.timelines: dict[Cell, list[dict]] = {}
        self.on_round: Callable[[int], Any] | None = None

    def measure(self, cells: Sequence[Cell]) -> list[dict]:
        """A row for each of `cells`, which are measured in turn."""
        return self._compare([(cell, self.plan(cell, self.config(cell))[0]) for cell in cells])

    def measure_plans(self, cell: Cell, plans: Sequence[Plan], held_with: Sequence[Plan] = ()) -> list[dict]:
        """A row for each of `plans` under the conditions of `cell`, measured in turn.

        With `held_with` (all plans that will be run of this model on these devices) weights are loaded once for all.
        """
        return self._compare([(cell, plan) for plan in plans], held_with)

    def _compare(self, trials: Sequence[tuple[Cell, Plan]], held_with: Sequence[Plan] = ()) -> list[dict]:
        checkpoints = [self.checkpoint(cell) for cell, _ in trials]
        predictions = [
            self.predict(cell, checkpoint.config, plan)
            for (cell, plan), checkpoint in zip(trials, checkpoints, strict=True)
        ]
        sends = any(sum(prediction.bytes.values()) for prediction in predictions)
        checks_links = sends and self.cluster.transport == "namespaces"
        num_devices = max(max(plan.device_ids) + 1 for _, plan in trials)
        room = KEPT_SHARE * psutil.virtual_memory().available / self.cluster.num_devices
        needed = itertools.accumulate(max(prediction.weights_bytes) for prediction in predictions)
        keep_models = 0 if held_with else sum(num_bytes <= room for num_bytes in needed)
        scale = self.fixed_time_scale or max(
            self._first_scale(cell, plan, checkpoint.config, checks_links)
            for (cell, plan), checkpoint in zip(trials, checkpoints, strict=True)
        )

        def measure(number: int, is_last: bool) -> list[dict]:
            cell, plan = trials[number]
            files = request(checkpoints[number], cell.seq_len, cell.batch_size, self.cluster.folder)
            return self._run(cell, plan, checkpoints[number], files, held_with, is_last, keep_models)

        def make_row(number: int, results: list, scale: float, check: Check, steal: float) -> tuple[dict, list[dict]]:
            cell, plan = trials[number]
            joined = _joined(results)
            row = self._row(cell, checkpoints[number].config, plan, predictions[number], joined, scale, check, steal)
            return row, self._timeline(row, joined, scale)

        repeats = [cell.repeats for cell, _ in trials]
        best = self.in_turn(trials[0][0].bandwidth_mbps, num_devices, scale, checks_links, measure, make_row, repeats)
        self.timelines |= {cell: timeline for (cell, _), (_, timeline) in zip(trials, best, strict=True)}
        return [row for row, _ in best]

    def _first_scale(self, cell: Cell, plan: Plan, config: PretrainedConfig, checks_links: bool) -> float:
        """The time scale to begin with, so that this host carries the links and the devices of `plan`."""
        # Layers that run whole are large products, and what travels between them is one message at a time.
        worth = [usual_devices([device], config) for device in self.profile(cell).devices]
        busy = (sum if plan.splits_layers else max)(worth[device] for device in plan.device_ids)
        if self.cluster.transport == "loopback":  # the host need not carry modelled links in time
            busy /= 2
        total_bps = cell.bandwidth_mbps * 1e6 * busy if checks_links else 0.0
        return first_time_scale(total_bps, busy, usable_cores())

    def in_turn(
        self,
        bandwidth_mbps: float,
        num_devices: int,
        scale: float,
        checks_links: bool,
        measure: Callable[[int, bool], Any],
        make_row: Callable[[int, list, float, Check, float], tuple[dict, Any]],
        repeats: Sequence[int],
    ) -> list[tuple[dict, Any]]:
        """Rows of several trials, in rounds of one request of each, links and pacing being checked before each round.

        A host that shares its processors is disturbed now and then: a request that was late, or during which other
        guests took much of the processors, is run again, and the less disturbed one counts. Where one is late each time
        in the first round, all trials start anew at `SLOWER` times the time scale.

        Args:
            scale: the time scale to begin with.
            measure: runs a request of trial `number`, links and time scale being set; told whether it is its last.
            make_row: a row, and what belongs to it, of (number, what `measure` gave, time scale, check, host steal).
            repeats: requests of each trial.
        """
        while True:
            found: list[list] = [[] for _ in repeats]
            steals = [0.0] * len(repeats)
            scale, check = self.set_link(bandwidth_mbps, num_devices, scale, checks_links)
            for turn in range(max(repeats)):
                if turn:
                    check = check.joined(self.check(bandwidth_mbps, num_devices, checks_links))
                late = False
                for number, count in enumerate(repeats):
                    if turn >= count:
                        continue
                    attempts = []
                    for _ in range(ATTEMPTS):
                        before = psutil.cpu_times()
                        one = measure(number, turn == count - 1)
                        steal = _stolen_share(before, psutil.cpu_times())
                        overrun = make_row(number, [one], scale, check, steal)[0]["pacing_overrun"]
                        attempts.append((overrun > MAX_OVERRUN_SHARE, steal, overrun, one))
                        if not attempts[-1][0] and steal <= DISTURBING_STEAL:
                            break
                    is_late, steal, _, one = min(attempts, key=lambda attempt: attempt[:3])
                    found[number].append(one)
                    steals[number] = max(steals[number], steal)
                    late |= is_late
                if late and not turn and not self.fixed_time_scale and SLOWER * scale <= MAX_TIME_SCALE:
                    break
                if self.on_round:
                    self.on_round(turn)
            else:
                check = check.joined(self.check(bandwidth_mbps, num_devices, checks_links))
                return [make_row(n, found[n], scale, check, steals[n]) for n in range(len(repeats))]
            scale *= SLOWER

    def checkpoint(self, cell: Cell) -> Checkpoint:
        if not cell.needs_decoupled:
            return original_checkpoint(cell.model)
        config = self.config(cell)
        return decoupled_checkpoint(
            cell.model, config.num_original_layers, config.num_divisions, config.attention_width
        )

    def config(self, cell: Cell) -> PretrainedConfig:
        """The configuration of `cell`'s model, without making its checkpoint."""
        known = preset_config(cell.model) if cell.model in PRESETS else open_folder(cell.model).config
        if not cell.needs_decoupled or hasattr(known, "num_divisions"):
            return known
        width = "narrow" if cell.method == "bp+narrow" else cell.attention_width
        return decoupled_config(known, cell.num_original_layers, cell.num_divisions, width)

    def plan(self, cell: Cell, config: PretrainedConfig) -> tuple[Plan, Prediction]:
        """The plan that `cell` runs and what the cost model predicts for it."""
        profile = self.profile(cell)
        plan = method_plan(
            cell.method,
            config,
            profile,
            seq_len=cell.seq_len,
            batch_size=cell.batch_size,
            memory_budget_bytes=self.memory_budget_bytes,
            wire=cell.wire,
        )
        return plan, predict(config, plan, profile, cell.seq_len, cell.batch_size)

    def predict(self, cell: Cell, config: PretrainedConfig, plan: Plan) -> Prediction:
        """What the cost model says of `plan` under the conditions of `cell`."""
        return predict(config, plan, self.profile(cell), cell.seq_len, cell.batch_size)

    def profile(self, cell: Cell) -> ClusterProfile:
        """The devices and links that `cell` takes."""
        self.cluster.bandwidth_bps = cell.bandwidth_mbps * 1e6
        profile = self.cluster_profile(cell, self.config(cell))
        if cell.num_devices > len(profile.devices):
            raise ValueError(f"{cell.num_devices} devices were asked for and the cluster has {len(profile.devices)}.")
        return ClusterProfile(profile.devices[: cell.num_devices], profile.link)

    def cluster_profile(self, cell: Cell, config: PretrainedConfig) -> ClusterProfile:
        return self.cluster.profile(cell.model, config, self.link, cell.pace, self.efficiency.get(cell.model))

    def limit_s(self, cell: Cell, config: PretrainedConfig, devices: Sequence[int]) -> float:
        """The physical limit: the original model's work over the summed speed of `devices`, nothing ever sent."""
        original, profile = _original(config), self.profile(cell)
        single = published_plan("single", original)
        alone = [replace(single, devices=(device,)) for device in devices]
        return 1 / sum(1 / predict(original, plan, profile, cell.seq_len, cell.batch_size).latency_s for plan in alone)

    def set_link(self, bandwidth_mbps: float, num_devices: int, scale: float, checks_links: bool):
        """Sets and checks the links; doubles the time scale until the check passes. Returns (scale, check)."""
        while True:
            self.cluster.set_link(bandwidth_mbps * 1e6, scale)
            check = self.check(bandwidth_mbps, num_devices, checks_links)
            if not check.failures(bandwidth_mbps) or self.fixed_time_scale or 2 * scale > MAX_TIME_SCALE:
                return scale, check
            scale *= 2

    def check(self, bandwidth_mbps: float, num_devices: int, checks_links: bool) -> Check:
        """A self-check that passes, or the last of several that failed."""
        scale = self.cluster.time_scale
        num_bytes = max(MIN_CHECK_BYTES, int(bandwidth_mbps * 1e6 / scale * LINK_CHECK_S / 8)) if checks_links else 0
        segment_s = PACED_SEGMENT_S * scale
        paced = {"segment_s": segment_s, "num_segments": max(4, round(PACING_CHECK_S / segment_s))}
        for _ in range(CHECK_ATTEMPTS):
            results = self.cluster.run("self_check", num_devices=num_devices, link_bytes=num_bytes, **paced)
            results = [result for result in results if result is not None]
            shares = self.cluster.link_shares or [1.0] * self.cluster.num_devices
            rates = [  # of a link that has a share of the bandwidth, over that share
                8 * num_bytes / seconds * scale / 1e6 / min(shares[source], shares[target])
                for (source, target), seconds in transfer_seconds(results).items()
            ]
            error = max(result["pacing_error"] for result in results)
            check = Check(min(rates, default=math.nan), max(rates, default=math.nan), error)
            if not check.failures(bandwidth_mbps):
                break
        return check

    def _run(
        self,
        cell: Cell,
        plan: Plan,
        checkpoint: Checkpoint,
        files: Any,
        held_with: Sequence[Plan],
        is_last: bool,
        keep_models: int,
    ) -> list[dict]:
        """One request, and after the last one the stream that throughput is taken from."""
        cluster = self.cluster
        profile = self.cluster_profile(cell, checkpoint.config)
        modelled = cluster.transport == "loopback"
        results = cluster.run(
            "run_plan",
            per_rank=[{"device": asdict(device)} for device in profile.devices],
            checkpoint=str(checkpoint.path),
            plan=plan.to_dict(),
            inputs=str(files.inputs),
            reference=str(files.reference),
            repeats=1,
            link=asdict(profile.link) if modelled else None,
            time_scale=cluster.time_scale,
            stream=STREAM_REQUESTS.get(plan.runs, 0) if is_last else 0,
            held_with=[held.to_dict() for held in held_with],
            burns=cell.burns,
            keep_models=keep_models,
        )
        return [result for result in results if result is not None]

    def _row(
        self, cell: Cell, config: PretrainedConfig, plan: Plan, prediction: Prediction, results, scale, check, steal
    ) -> dict:
        # A request lasts as long as its slowest rank; a pipeline's last rank waits for all before it.
        repeats = len(results[0]["samples"])
        latencies = [max(r["samples"][i]["latency_s"] for r in results) for i in range(repeats)]
        sums = [_slowest_sums(results, i, scale) for i in range(repeats)]
        compute_s, wait_s = (statistics.median(s[name] for s in sums) for name in ("compute_s", "wait_s"))
        overrun = max(
            sum(s["overrun_s"] for s in r["samples"]) / max(sum(s["modelled_s"] for s in r["samples"]), 1e-9)
            for r in results
        )
        sender = max(results, key=lambda r: sum(r["bytes"].values()))
        latency = statistics.median(latencies)
        limit_s = self.limit_s(cell, config, plan.device_ids)
        throughput = 1 / latency
        if "stream_s" in results[0]:
            copies = plan.num_devices if plan.runs == "copies" else 1
            throughput = copies * STREAM_REQUESTS[plan.runs] / max(r["stream_s"] for r in results)
        row = {
            "model": cell.model,
            "method": cell.method,
            "plan": plan.describe(),
            "num_original_layers": getattr(config, "num_original_layers", None),
            "num_divisions": getattr(config, "num_divisions", None),
            "attention_width": getattr(config, "attention_width", None),
            "num_devices": plan.num_devices,
            "bandwidth_mbps": cell.bandwidth_mbps,
            "delay_ms": 1e3 * self.cluster.delay_s,
            "jitter_ms": 1e3 * self.cluster.jitter_s,
            "seq_len": cell.seq_len,
            "batch_size": cell.batch_size,
            "link": self.cluster.link,
            "wire": plan.wire,
            "pace": cell.pace,
            "burns": cell.burns,
            "latency_s": latency,
            "spread_s": max(latencies) - min(latencies),
            "compute_s": compute_s,
            "comm_s": latency - compute_s - wait_s,
            "wait_s": wait_s,
            "limit_s": limit_s,
            "over_limit": latency / limit_s,
        }
        for kind in SENT_KINDS:
            row[f"{kind}_count"] = sender["counts"].get(kind, 0)
            row[f"{kind}_bytes"] = sender["bytes"].get(kind, 0)
        peaks = [r["peak_rss_bytes"] for r in results]
        row |= {
            "link_bytes": max(s["link_bytes"] for r in results for s in r["samples"])
            if self.cluster.transport == "namespaces"
            else None,
            "throughput_rps": throughput,
            "weights_bytes": max(r["weights_bytes"] for r in results),
            "peak_rss_bytes": None if None in peaks else max(peaks),
            "predicted_s": prediction.latency_s,
            "time_scale": scale,
            **asdict(check),
            "pacing_overrun": overrun,
            "host_steal": steal,
            "max_abs_error": max(r["max_abs_error"] for r in results if "max_abs_error" in r),
            "relative_error": max(r["relative_error"] for r in results if "relative_error" in r),
            "repeats": repeats,
            "device": self.cluster.profile_name,
            "samples_s": json.dumps([round(s, 6) for s in latencies]),
        }
        why = why_invalid(row)
        return row | {"valid": not why, "why_invalid": why}

    def _timeline(self, row: dict, results: list[dict], scale: float) -> list[dict]:
        """The `timeline` rows of the sample whose latency is the row's median."""
        samples = json.loads(row["samples_s"])
        median = min(range(len(samples)), key=lambda i: abs(samples[i] - row["latency_s"]))
        conditions = {name: row[name] for name in TIMELINE_COLUMNS if name in row}
        parts = split_waits([r["samples"][median]["events"] for r in results])
        return [conditions | part for part in timeline_rows(parts, scale)]


def _joined(results: Sequence[Sequence[dict]]) -> list[dict]:
    """What several runs of one plan gave, as if it had been one: a rank's samples one after another."""
    joined = []
    for same in zip(*results, strict=True):
        samples = [sample for result in same for sample in result["samples"]]
        peaks = [result["peak_rss_bytes"] for result in same]
        joined.append(same[-1] | {"samples": samples, "peak_rss_bytes": None if None in peaks else max(peaks)})
        for error in ("max_abs_error", "relative_error"):
            if error in same[-1]:
                joined[-1][error] = max(result[error] for result in same)
    return joined


def _original(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that `config` was decoupled from, or itself."""
    added = ("num_original_layers", "num_divisions", "attention_width")
    kind = GPT2Config if is_decoder(config) else BertConfig
    return kind(**{name: value for name, value in config_fields(config).items() if name not in added})


def _slowest_sums(results: list[dict], sample: int, scale: float) -> dict[str, float]:
    """`compute_s`, `wait_s` and `comm_s` of the rank that took longest, in the devices' seconds."""
    parts = split_waits([r["samples"][sample]["events"] for r in results])
    slowest = max(range(len(results)), key=lambda rank: results[rank]["samples"][sample]["latency_s"])
    return {name: seconds / scale for name, seconds in seconds_of(parts[slowest]).items()}


def transfer_seconds(results: Iterable[dict]) -> dict[tuple[int, int], float]:
    """Seconds of each transfer (from, to) of a self-check, from its sender's start to its receiver's end."""
    starts = {(source, target): at for result in results for source, target, at in result["sent"]}
    received = [pair for result in results for pair in result["received"]]
    return {(source, target): at - starts[source, target] for source, target, at in received}


def why_invalid(row: dict) -> str:
    """What a row's checks say against it, in words; empty for a valid row."""
    check = Check(row["link_min_mbps"], row["link_max_mbps"], row["pacing_error"])
    reasons = check.failures(row["bandwidth_mbps"])
    if row["pacing_overrun"] > MAX_OVERRUN_SHARE:
        reasons.append(f"host late by {row['pacing_overrun']:.1%} of what is modelled")
    if row["host_steal"] > MAX_STEAL:
        reasons.append(f"other guests took {row['host_steal']:.0%} of the host's processors")
    limit = max((limit for name, limit in MAX_RELATIVE_ERROR.items() if name in row["wire"]), default=None)
    if limit is None and not row["max_abs_error"] <= MAX_ABS_ERROR:
        reasons.append(f"output differs from the single device's by {row['max_abs_error']:.1e}")
    if limit is not None and not row["relative_error"] <= limit:
        reasons.append(f"output differs from the single device's by {row['relative_error']:.1%} (RMS)")
    return "; ".join(reasons)


def usual_devices(devices: Iterable[DeviceProfile], config: PretrainedConfig) -> float:
    """As many of `USUAL_DEVICE` as compute what these do, on a model of `config`."""
    return sum(device.flops_per_s for device in devices) / preset_profile(USUAL_DEVICE, config).flops_per_s


def first_time_scale(total_bps: float, num_devices: float, num_cores: int) -> float:
    """The power of two by which all is slowed so that this host carries the links (`total_bps`) and the devices."""
    needed = max(total_bps / MAX_TOTAL_BPS, num_devices / (DEVICES_A_CORE * num_cores))
    return 2.0 ** max(0, math.ceil(math.log2(needed)))


def _stolen_share(before, after) -> float:
    """Share of processor time between two `psutil.cpu_times()` that a hypervisor gave to others; 0 where unknown."""
    total = sum(after) - sum(before)
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / total if total > 0 else 0.0


def check_cells(bench: Bench, cells: Iterable[Cell]) -> None:
    """Raises ValueError where a cell's plan does not fit its model or the memory budget; measures nothing."""
    for cell in cells:
        bench.plan(cell, bench.config(cell))


def measure_grid(
    bench: Bench,
    cells: Iterable[Cell],
    path: str | Path | None = None,
    quiet: bool = False,
    timeline: str | Path | None = None,
    in_timeline: Callable[[Cell], bool] = lambda cell: True,
    keep: bool = False,
) -> pd.DataFrame:
    """Measures `cells`, one row each, and returns them in this order; those that are compared in turn.

    With `path`, rows are written there when they are measured, and a call after an interruption goes on from there, as
    long as code and conditions are the same. The file goes when all are measured, unless `keep`: the frame is the
    record. With `timeline`, the events of the cells that `in_timeline` picks are saved to that file as CSV.
    """
    cells = list(dict.fromkeys(cells))
    kept = RowFile(path, bench.cluster)
    known: dict[Cell, dict] = {cell: row for cell in cells if (row := kept.get(asdict(cell))) is not None}
    missing = [cell for cell in cells if cell not in known]
    missing += [
        cell for cell in cells if timeline and in_timeline(cell) and cell in known and not known[cell]["timeline"]
    ]
    groups: dict[tuple, list[Cell]] = {}
    for cell in missing:
        groups.setdefault(cell.comparison, []).append(cell)
    with tqdm(total=sum(max(c.repeats for c in g) for g in groups.values()), disable=quiet, unit="round") as progress:
        progress.set_description("bench")
        for group in groups.values():
            first, methods = group[0], " ".join(dict.fromkeys(cell.method for cell in group))
            progress.set_postfix_str(
                f"{first.model} {first.num_devices} devices {first.bandwidth_mbps:g} Mbps: {methods}"
            )
            bench.on_round = lambda _: progress.update()
            for cell, row in zip(group, bench.measure(group), strict=True):
                wanted = timeline is not None and in_timeline(cell)
                record = {"row": row, "timeline": bench.timelines[cell] if wanted else []}
                known[cell] = kept.put(asdict(cell), record)
    events = [event for cell in cells if timeline and in_timeline(cell) for event in known[cell]["timeline"]]
    if timeline is not None:
        with atomic_write(timeline) as file:
            pd.DataFrame(events, columns=TIMELINE_COLUMNS).to_csv(file, index=False)
    if not keep:
        kept.remove()
    return pd.DataFrame([known[cell]["row"] for cell in cells])


class RowFile:
    """What was measured so far on a cluster, by its conditions: kept in a JSON file, so that a grid can be resumed.

    With the conditions goes a fingerprint of the code: rows of another version are measured again. Without a path
    nothing is kept.
    """

    def __init__(self, path: str | Path | None, cluster: EmulatedCluster):
        self._path = Path(path) if path else None
        self._kept = _load_rows(path)
        self._conditions = {"link": cluster.link, "device": cluster.profile_name, "code": _code_fingerprint()}
        self._conditions |= {"delay_s": cluster.delay_s, "jitter_s": cluster.jitter_s}

    def get(self, what: dict):
        """What `put` was given for `what`, under the same conditions; None where nothing was."""
        return self._kept.get(json.dumps(what | self._conditions))

    def put(self, what: dict, measured):
        self._kept[json.dumps(what | self._conditions)] = measured
        if self._path:
            with atomic_write(self._path) as file:
                json.dump(self._kept, file)
        return measured

    def remove(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


def _code_fingerprint() -> str:
    """Changes when code or committed data that make rows do: rows of another version are measured again."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    rooms = [(package / room).glob("*.py") for room in ("models", "parallel", "planning", "cluster")]
    tables = [data_folder(name).glob("*.csv") for name in ("published", "measured")]
    for source in (source for sources in (*rooms, *tables) for source in sorted(sources)):
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
    model: str,
    methods: Sequence[str],
    bandwidths_mbps: Sequence[float],
    num_devices: int = 4,
    wire: str = "float32",
    **common: Any,
) -> list[Cell]:
    """Cells of `methods` x `bandwidths_mbps`, method by method, so that a device loads each method's weights once.

    `single` and `dp` use no link and stand once, at the first bandwidth. Methods that send float32 alone stand with
    that.
    """
    return [
        Cell(
            model,
            method,
            num_devices,
            mbps,
            wire="float32" if method in FLOAT32_METHODS else wire,
            **common,
        )
        for method in methods
        for mbps in (bandwidths_mbps[:1] if method in ("single", "dp") else bandwidths_mbps)
    ]
