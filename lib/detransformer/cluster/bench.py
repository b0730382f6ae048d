"""Latency bench: measures one row for every (model, method, devices, bandwidth, wire) on an emulated cluster.

Rows that are compared are measured together: at one time scale, and in rounds of one request each, so that a
disturbance of the host affects all of them. Rows carry their conditions and their self-check: links and pacing are
checked before each round and after the last (`cluster.selfcheck`). A case is planned once, before it is measured.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from detransformer.cluster.cells import Cell, RowFile
from detransformer.cluster.checkpoints import decoupled_checkpoint, original_checkpoint, request
from detransformer.cluster.devices import cluster_profile
from detransformer.cluster.pacing import seconds_of, timeline_rows
from detransformer.cluster.selfcheck import (
    MAX_OVERRUN_SHARE,
    Check,
    check_cluster,
    host_time_scale,
    lateness,
    why_invalid,
)
from detransformer.cluster.session import EmulatedCluster
from detransformer.models.configuration import PRESETS, decoupled_config, original_config, preset_config
from detransformer.opening import Checkpoint, open_checkpoint
from detransformer.parallel.plan import Plan
from detransformer.planning.cost import Prediction, alone_seconds, predict
from detransformer.planning.placement import method_plan
from detransformer.planning.profile import SENT_KINDS, ClusterProfile, LinkProfile

MAX_TIME_SCALE = 32
SLOWER = 1.5  # factor to the next time scale, if the host was late
KEPT_SHARE = 0.5  # of the free memory, for models that are measured in turn; others are reloaded each time
ATTEMPTS = 2  # for a disturbed request, at one time scale
DISTURBING_STEAL = 0.1  # a request is repeated if other guests of this machine took more of the processors
TIMELINE_COLUMNS = ("model", "method", "wire", "link", "bandwidth_mbps", "num_devices", "rank")
TIMELINE_COLUMNS += ("what", "start_s", "stop_s")
STREAM_REQUESTS = {"stages": 8, "copies": 2}  # back to back, to measure throughput: a pipeline fills and drains


@dataclass(frozen=True)
class Case:
    """A cell with everything that is decided before it is measured; `profile` has all devices of the cluster.

    `limit_s` is the physical limit: the original model's work over the summed speed of the plan's devices, without
    messages.
    """

    cell: Cell
    config: PretrainedConfig
    profile: ClusterProfile
    plan: Plan
    prediction: Prediction
    limit_s: float


@dataclass
class Bench:
    """Measures cells on one running cluster.

    Args:
        link: a measured profile for predictions.
        time_scale: None: the bench chooses.
        memory_budget_bytes: of each device.
        efficiency: model -> rows measured on this host (`devices.efficiency_rows`); default: the package's.
    """

    cluster: EmulatedCluster
    link: LinkProfile | None = None
    time_scale: float | None = None
    memory_budget_bytes: int | None = None
    efficiency: Mapping[str, Sequence] = field(default_factory=dict)
    _cases: dict[tuple[Cell, Plan | None], Case] = field(default_factory=dict)

    # --- Planning ---

    def case(self, cell: Cell, plan: Plan | None = None) -> Case:
        """`cell` with its plan: `plan`, or its method's.

        Raises:
            ValueError: if the plan does not fit the model or the memory budget.
        """
        if (cell, plan) not in self._cases:
            config, profile = self.config(cell), self.profile(cell)
            sizes = dict(seq_len=cell.seq_len, batch_size=cell.batch_size)
            budget = self.memory_budget_bytes
            taken = plan or method_plan(cell.method, config, profile, cell.wire, memory_budget_bytes=budget, **sizes)
            alone_s = alone_seconds(original_config(config), profile, taken.device_ids, **sizes)
            limit_s = 1 / sum(1 / seconds for seconds in alone_s)
            prediction = predict(config, taken, profile, **sizes)
            self._cases[cell, plan] = Case(cell, config, self.every_device(cell), taken, prediction, limit_s)
        return self._cases[cell, plan]

    def config(self, cell: Cell) -> PretrainedConfig:
        """The configuration of `cell`'s model, without making its checkpoint."""
        known = preset_config(cell.model) if cell.model in PRESETS else open_checkpoint(cell.model).config
        if not cell.needs_decoupled or hasattr(known, "num_original_layers"):
            return known
        width = "narrow" if cell.method == "bp+narrow" else cell.attention_width
        return decoupled_config(known, cell.num_original_layers, cell.num_divisions, width)

    def checkpoint(self, cell: Cell) -> Checkpoint:
        """The checkpoint of `cell`'s model, made if absent."""
        if cell.needs_decoupled:
            return decoupled_checkpoint(cell.model, self.config(cell))
        return original_checkpoint(cell.model)

    def profile(self, cell: Cell) -> ClusterProfile:
        """The devices and links that `cell` uses."""
        return self.every_device(cell).of(range(cell.num_devices))

    def every_device(self, cell: Cell) -> ClusterProfile:
        """All devices of the cluster, also those that `cell` leaves out: each worker gets a job."""
        cluster, efficiency = self.cluster, self.efficiency.get(cell.model)
        where = cell.bandwidth_mbps * 1e6, cluster.delay_s, self.link
        return cluster_profile(cluster.devices, self.config(cell), *where, cell.pace, efficiency, cluster.shared)

    # --- Measuring ---

    def measure(self, cells: Sequence[Cell], plans: Sequence[Plan] = (), held_with: Sequence[Plan] = ()) -> list[dict]:
        """Measures `cells` in turn, those that send most first: they are late first. Returns a row for each.

        Args:
            plans: one for each cell, instead of its method's.
            held_with: all plans of this model that will run on these devices; weights are loaded once for all.
        """
        asked = [self.case(cell, plan) for cell, plan in itertools.zip_longest(cells, plans)]
        order = sorted(range(len(asked)), key=lambda i: -sum(asked[i].prediction.bytes.values()))
        cases = [asked[i] for i in order]
        checkpoints = [self.checkpoint(case.cell) for case in cases]
        sends = any(sum(case.prediction.bytes.values()) for case in cases)
        num_devices = max(max(case.plan.device_ids) + 1 for case in cases)
        room = KEPT_SHARE * psutil.virtual_memory().available / self.cluster.num_devices
        needed = itertools.accumulate(max(case.prediction.weights_bytes) for case in cases)
        options = dict(held_with=[held.to_dict() for held in held_with])
        replaced = held_with or cases[0].cell.repeats == 1  # a model that runs once need not stay
        options["keep_models"] = 0 if replaced else sum(num_bytes <= room for num_bytes in needed)
        scale = self.time_scale or max(
            host_time_scale(self.cluster, c.config, c.profile, c.plan.device_ids, sends, c.plan.splits_layers)
            for c in cases
        )

        def measure(number: int, is_last: bool) -> list[dict]:
            case, cell = cases[number], cases[number].cell
            options["stream"] = STREAM_REQUESTS.get(case.plan.runs, 0) if is_last else 0
            sizes = (cell.seq_len, cell.batch_size)
            return self.run_plan(case.profile, checkpoints[number], case.plan, *sizes, burns=cell.burns, **options)

        first = cases[0].cell
        conditions = first.bandwidth_mbps, num_devices, scale, sends
        found, scale, check = self.in_turn(*conditions, measure, len(cases), first.repeats)
        rows = [self._row(case, runs, scale, check, steal) for case, (runs, steal) in zip(cases, found, strict=True)]
        return [rows[order.index(i)] for i in range(len(rows))]

    def run_plan(
        self, profile: ClusterProfile, checkpoint: Checkpoint, plan: Plan, seq_len: int, batch_size: int, **options: Any
    ) -> list[dict]:
        """Runs one request at the cluster's time scale; returns the participating devices' results of `jobs.run_plan`.

        `profile` has all devices of the cluster; `options` are further arguments of the job.
        """
        cluster = self.cluster
        results = cluster.run(
            "run_plan",
            per_rank=[{"device": asdict(device)} for device in profile.devices],
            checkpoint=str(checkpoint.path),
            plan=plan.to_dict(),
            **request(checkpoint, seq_len, batch_size, cluster.folder),
            repeats=1,
            link=asdict(profile.link) if cluster.transport == "loopback" else None,
            time_scale=cluster.time_scale,
            **options,
        )
        return [result for result in results if result is not None]

    def in_turn(
        self,
        bandwidth_mbps: float,
        num_devices: int,
        scale: float,
        sends: bool,
        measure: Callable[[int, bool], Any],
        num_trials: int,
        repeats: int,
        late: Callable[[Any], float] = lateness,
    ) -> tuple[list[tuple[list, float]], float, Check]:
        """Measures several trials in rounds of one request each; links and pacing are checked before each round.

        The host may share its processors: a request that was late, or during which other guests took much of the
        processors, is repeated, and the less disturbed attempt counts. If a request of the first round is late at every
        attempt, or a later check fails, all trials restart at `SLOWER` times the time scale.

        Args:
            scale: the first time scale.
            sends: whether the devices send each other anything.
            measure: (number, is_last) -> result of one request of a trial; links and time scale are already set.
            repeats: requests per trial.
            late: result -> the host's lateness as a share of the modelled time.

        Returns:
            Each trial's results with the host's largest steal, the time scale, and all checks joined.
        """
        where = self.cluster, bandwidth_mbps, num_devices, sends
        while True:
            found: list[list] = [[] for _ in range(num_trials)]
            steals = [0.0] * num_trials
            scale, check = self.set_link(bandwidth_mbps, num_devices, scale, sends)
            can_slow = not self.time_scale and SLOWER * scale <= MAX_TIME_SCALE
            requests = list(itertools.product(range(repeats), range(num_trials)))
            for turn, number in tqdm(requests, unit="request", desc=f"time scale {scale:g}", leave=False, disable=None):
                if turn and not number:
                    check = check.joined(check_cluster(*where))
                    if can_slow and check.failures(bandwidth_mbps):
                        break
                was_late, steal, result = _undisturbed(partial(measure, number, turn == repeats - 1), late)
                if was_late and not turn and can_slow:
                    break
                found[number].append(result)
                steals[number] = max(steals[number], steal)
            else:
                check = check.joined(check_cluster(*where))
                if not can_slow or not check.failures(bandwidth_mbps):
                    return list(zip(found, steals, strict=True)), scale, check
            scale *= SLOWER

    def set_link(self, bandwidth_mbps: float, num_devices: int, scale: float, sends: bool):
        """Sets and checks the links, doubling the time scale until the check passes; returns (scale, check)."""
        while True:
            self.cluster.set_link(bandwidth_mbps * 1e6, scale)
            check = check_cluster(self.cluster, bandwidth_mbps, num_devices, sends)
            if not check.failures(bandwidth_mbps) or self.time_scale or 2 * scale > MAX_TIME_SCALE:
                return scale, check
            scale *= 2

    def _row(self, case: Case, runs: Sequence[list[dict]], scale: float, check: Check, steal: float) -> dict:
        """The row of one plan; `runs` are its requests, each with its devices' results.

        `timeline` has the devices' events in the request whose latency is nearest the median.
        """
        # A request lasts as long as its slowest rank; a pipeline's last rank waits for all before it.
        cell, plan, config, last = case.cell, case.plan, case.config, runs[-1]
        samples = [[r["samples"][0] for r in run] for run in runs]
        slowest = [max(own, key=lambda sample: sample["latency_s"]) for own in samples]
        latencies, sums = [s["latency_s"] for s in slowest], [seconds_of(s["events"]) for s in slowest]
        compute_s, wait_s = (statistics.median(s[name] / scale for s in sums) for name in ("compute_s", "wait_s"))
        sender = max(last, key=lambda r: sum(r["bytes"].values()))
        latency, every = statistics.median(latencies), [r for run in runs for r in run]
        peaks = [r["peak_rss_bytes"] for r in every]
        throughput, is_real = 1 / latency, self.cluster.transport == "namespaces"
        if "stream_s" in last[0]:
            copies = plan.num_devices if plan.runs == "copies" else 1
            throughput = copies * STREAM_REQUESTS[plan.runs] / max(r["stream_s"] for r in last)
        median = min(range(len(runs)), key=lambda i: abs(latencies[i] - latency))
        row = asdict(cell) | {
            "plan": plan.describe(),
            "num_original_layers": getattr(config, "num_original_layers", None),
            "num_divisions": getattr(config, "num_divisions", None),
            "attention_width": getattr(config, "attention_width", None),
            "num_devices": plan.num_devices,
            "delay_ms": 1e3 * self.cluster.delay_s,
            "jitter_ms": 1e3 * self.cluster.jitter_s,
            "link": self.cluster.link,
            "wire": plan.wire,
            "latency_s": latency,
            "spread_s": max(latencies) - min(latencies),
            "compute_s": compute_s,
            "comm_s": latency - compute_s - wait_s,
            "wait_s": wait_s,
            "limit_s": case.limit_s,
            "over_limit": latency / case.limit_s,
            **{f"{kind}_count": sender["counts"].get(kind, 0) for kind in SENT_KINDS},
            **{f"{kind}_bytes": sender["bytes"].get(kind, 0) for kind in SENT_KINDS},
            "link_bytes": max(s["link_bytes"] for own in samples for s in own) if is_real else None,
            "throughput_rps": throughput,
            "weights_bytes": max(r["weights_bytes"] for r in last),
            "peak_rss_bytes": None if None in peaks else max(peaks),
            "predicted_s": case.prediction.latency_s,
            "time_scale": scale,
            **asdict(check),
            "pacing_overrun": lateness([{"samples": own} for own in zip(*samples, strict=True)]),
            "host_steal": steal,
            "max_abs_error": max(r["max_abs_error"] for r in every if "max_abs_error" in r),
            "relative_error": max(r["relative_error"] for r in every if "relative_error" in r),
            "repeats": len(runs),
            "device": self.cluster.profile_name,
            "samples_s": json.dumps([round(s, 6) for s in latencies]),
            "timeline": timeline_rows([s["events"] for s in samples[median]], scale),
        }
        why = why_invalid(row)
        return row | {"valid": not why, "why_invalid": why}


def _undisturbed(measure: Callable[[], Any], late: Callable[[Any], float]) -> tuple[bool, float, Any]:
    """(was late, the host's steal, result) of the least disturbed of `ATTEMPTS`; stops at an undisturbed one."""
    attempts = []
    for _ in range(ATTEMPTS):
        psutil.cpu_times_percent()  # the next call counts from here
        result = measure()
        steal, overrun = psutil.cpu_times_percent().steal / 100, late(result)
        attempts.append((overrun > MAX_OVERRUN_SHARE, steal, overrun, result))
        if not attempts[-1][0] and steal <= DISTURBING_STEAL:
            break
    was_late, steal, _, result = min(attempts, key=lambda attempt: attempt[:3])
    return was_late, steal, result


def measure_grid(bench: Bench, cells: Iterable[Cell], path: str | Path | None = None) -> pd.DataFrame:
    """Measures `cells` and returns a row for each, in their order; cells that are compared are measured in turn.

    With `path`, measured rows are written to that file, and a call after an interruption resumes from it if code and
    conditions are the same.
    """
    cells = list(dict.fromkeys(cells))
    kept = RowFile(path, bench.cluster)
    known: dict[Cell, dict] = {}
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        if row := kept.get(asdict(cell)):
            known[cell] = row
        else:
            groups.setdefault(cell.comparison, []).append(cell)
    progress = tqdm(groups.values(), unit="group", desc="bench")
    for group in progress:
        first, methods = group[0], " ".join(dict.fromkeys(cell.method for cell in group))
        where = f"{first.num_devices} devices {first.bandwidth_mbps:g} Mbps"
        progress.set_postfix_str(f"{first.model} {where}: {methods}")
        for cell, row in zip(group, bench.measure(group), strict=True):
            known[cell] = kept.put(asdict(cell), row)
    return pd.DataFrame([known[cell] for cell in cells])


def timelines(rows: pd.DataFrame) -> pd.DataFrame:
    """The events of all `rows` of `measure_grid`, each with its row's conditions."""
    events = [
        {name: row[name] for name in TIMELINE_COLUMNS if name in row} | event
        for row in rows.to_dict("records")
        for event in row["timeline"]
    ]
    return pd.DataFrame(events, columns=TIMELINE_COLUMNS)
