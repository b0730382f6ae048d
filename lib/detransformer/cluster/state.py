"""A worker's cache between jobs: its groups, and each model's weights and executors."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from detransformer import machine
from detransformer.cluster.pacing import Arrivals, sleep_until
from detransformer.opening import open_checkpoint, read_configuration
from detransformer.parallel.comm import Comm
from detransformer.parallel.plan import Plan
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import launched_seconds
from detransformer.planning.pieces import compute_seconds
from detransformer.planning.profile import DeviceProfile, LinkProfile
from detransformer.planning.recorder import device_steps, segments
from detransformer.planning.tape import Compute
from detransformer.typed_json import from_json

Runner = TypeVar("Runner")
START_AFTER_S = 0.01  # longer than ranks take to leave a barrier


@dataclass
class Loaded:
    """This rank's weights for all loaded plans of a model, the executors made so far, and memory use."""

    config: PretrainedConfig
    weights: WeightSource | None  # None: the plan's executor loads its own (DTensor)
    held_with: list[Plan]
    own_bytes: int | None  # resident before loading: the interpreter and its libraries
    peak_above: int | None = None  # largest resident size since then, above `own_bytes`
    runners: dict[Any, Any] = field(default_factory=dict)  # executor by plan, generator by its two plans

    def compute(self, plan: Plan, rank: int, seq_len: int, batch_size: int, past: int = 0) -> list[list[Compute]]:
        """The compute steps of `rank` in a request, per segment between starts and waits, from the executor's tape."""
        return segments(device_steps(self.config, plan, rank, seq_len, batch_size, past))

    def pace(
        self, plan: Plan, rank: int, device: dict | None, link: dict | None, time_scale: float, *request: int
    ) -> tuple[list[float] | None, list[float] | None]:
        """Seconds of each segment on `device` and of each collective on `link`; None for what is not modelled.

        Args:
            device, link: a `DeviceProfile` and a `LinkProfile` as dicts.
            request: seq_len, batch_size and past.
        """
        segment_s = link_s = None
        if device is not None:
            profile = from_json(DeviceProfile, device)
            parts = self.compute(plan, rank, *request)
            segment_s = [time_scale * sum(compute_seconds(step, profile) for step in part) for part in parts]
        if link is not None:
            known = from_json(LinkProfile, link)
            link_s = [time_scale * seconds for seconds in launched_seconds(self.config, plan, rank, known, *request)]
        return segment_s, link_s


@dataclass
class WorkerState:
    """A worker's place in the cluster, its groups by their ranks, and its models."""

    rank: int
    interface: str  # network interface of the collectives
    groups: dict[tuple[int, ...], dist.ProcessGroup]
    timeout: timedelta  # of a message in these groups
    loaded: dict[Any, Loaded] = field(default_factory=dict)
    arrivals: Arrivals | None = None  # of this session, if all workers share one host
    device: int = 0  # in the cluster file; `rank` counts the present devices
    home: Mapping[str, Any] = field(default_factory=dict)  # settings that this host was started with: model, ...
    kept: dict[str, Any] = field(default_factory=dict)  # what one job leaves for the next
    tell: Callable[[Any], None] = lambda part: None  # sends the front a partial result of the job
    enough: Callable[[], Iterable[int]] = tuple  # rows of the job that the front no longer needs

    def takes_part(self, devices: tuple[int, ...]) -> bool:
        """Whether this rank is one of `devices`. All workers must call this, since all of them make a new group."""
        if len(devices) > 1 and devices not in self.groups:
            self.groups[devices] = dist.new_group(list(devices), timeout=self.timeout, sort_ranks=False)
        return self.rank in devices

    def comm(self, devices: tuple[int, ...]) -> Comm:
        """The collectives of `devices`, which include this rank."""
        return Comm(self.groups.get(devices), devices.index(self.rank), len(devices))

    def start_together(self, comm: Comm, devices: Sequence[int], count: int) -> None:
        """Returns on all of `devices` at the same moment, if they share a clock; `count` numbers the starts.

        A barrier alone releases ranks some milliseconds apart, which would count as waiting.
        """
        if self.arrivals is None:
            comm.barrier()
            return
        self.arrivals.write("start", self.rank, count, time.perf_counter())
        comm.barrier()
        sleep_until(self.arrivals.last("start", devices, count) + START_AFTER_S)

    def sent_bytes(self) -> int:
        """Bytes that the kernel has sent on this device's interface."""
        return psutil.net_io_counters(pernic=True, nowrap=False)[self.interface].bytes_sent

    def load(self, checkpoint: str, plans: Sequence[dict], dtype: str, keep_models: int = 0) -> Loaded:
        """The model in the folder `checkpoint` for `plans`, loaded if it is new.

        The first `keep_models` models stay; after them each new one replaces the last. All workers keep the same
        models, since those that load one also run it once to warm up.
        """
        held = [Plan.from_dict(plan) for plan in plans]
        key = (checkpoint, tuple(held), dtype)
        if key not in self.loaded:
            while len(self.loaded) > keep_models:
                self.loaded.popitem()
            machine.free_unused()
            machine.restart_peak()
            weights = None
            if held[0].runs != "dtensor":
                weights = WeightSource(Path(checkpoint), getattr(torch, dtype))
            config = read_configuration(checkpoint, images=True)
            if not config.architectures:  # infers the class from the weights
                config = open_checkpoint(checkpoint).config
            self.loaded[key] = Loaded(config, weights, held, machine.resident_bytes())
        return self.loaded[key]

    def runner(self, loaded: Loaded, key: Any, make: Callable[[], Runner]) -> tuple[Runner, bool]:
        """The executor or generator of `key`, made at the first call, and whether it is new."""
        is_new = key not in loaded.runners
        if is_new:
            with machine.large_blocks_apart():
                loaded.runners[key] = make()
            self.note_peak(loaded)
        return loaded.runners[key], is_new

    def note_peak(self, loaded: Loaded) -> int | None:
        """Largest resident size minus that before this model was loaded; None if the system does not report it.

        Once another model is loaded, the resident size is no longer this one's, and the earlier peak stays.
        """
        peak, is_last = machine.peak_bytes(), next(reversed(self.loaded.values())) is loaded
        if is_last and None not in (peak, loaded.own_bytes):
            loaded.peak_above = max(loaded.peak_above or 0, peak - loaded.own_bytes)
        return loaded.peak_above
