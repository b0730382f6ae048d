"""Profile records: how fast devices compute and links carry. Data only: no measuring, no torch.

A profile is made for one model (DATE 2024, Section III-C: operations are profiled offline, repeated layers once). The
cost model takes its rates from it. Stored as versioned JSON with its provenance.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detransformer.files import atomic_write
from detransformer.typed_json import STRICT, from_json

if TYPE_CHECKING:
    from detransformer.planning.tape import Start

VERSION = 2

CALIBRATION_TOKENS = 128  # the published single-device latencies are at seq 128, batch 1 (Section IV-A)
SENT_KINDS = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "send")


def latency_steps(kind: str, num_devices: int) -> int:
    """How many latencies a collective of `num_devices` waits for one after the other.

    all_reduce goes round a ring in 2(P-1) steps, all_gather counts P-1 rounds. all_to_all and reduce_scatter have as
    many rounds but count one latency, which fits measurements (their bytes still share the device's link).
    """
    return {"all_reduce": 2 * (num_devices - 1), "all_gather": num_devices - 1}.get(kind, 1)


def message_delays(kind: str, num_devices: int) -> int:
    """How many times a collective waits for a packet to cross the links: twice in each round.

    In a round a rank waits for one message, which gloo sends when the receiver has said that it is ready.
    """
    rounds = {"all_reduce": 2 * (num_devices - 1), "send": 1, "receive": 1}
    return 2 * rounds.get(kind, num_devices - 1)


@dataclass(frozen=True)
class DeviceProfile:
    """One device's compute rates on one model.

    Args:
        name: preset or host name.
        memory_bytes: memory for model and activations.
        flops_per_s: of a whole original layer with `CALIBRATION_TOKENS` tokens.
        source: where the rates come from, in words.
        memory_bytes_per_s: the rate of reading weights, a lower bound for products of few tokens. None: not known, and
            ignored.
        efficiency: how fast shares of a layer run relative to the whole layer: rows of (strategy, share of the layer,
            tokens of the request, chunks, efficiency), as `cluster.profiler` measures them. Empty: all run as fast.

    Raises:
        ValueError: if two rows of `efficiency` are of the same share, tokens and chunks.
    """

    __pydantic_config__ = STRICT

    name: str
    memory_bytes: int
    flops_per_s: float
    source: str
    memory_bytes_per_s: float | None = None
    efficiency: tuple[tuple[str, float, int, int, float], ...] = ()

    def __post_init__(self):
        rows = Counter(tuple(share) for *share, _ in self.efficiency)
        for share, count in rows.items():
            if count > 1:
                raise ValueError(f"{self.name}: efficiency has {count} rows for {list(share)}; keep one.")

    def compute_s(
        self,
        flops: float,
        strategy: str = "replicate",
        weight_bytes: float = 0.0,
        share: float = 1.0,
        tokens: int = CALIBRATION_TOKENS,
        num_chunks: int = 1,
    ) -> float:
        """Seconds of one product: of its operations or of reading its weights, whichever is longer (a roofline)."""
        seconds = flops / (self.flops_per_s * self.efficiency_of(strategy, share, tokens, num_chunks))
        return max(seconds, weight_bytes / self.memory_bytes_per_s) if self.memory_bytes_per_s else seconds

    @cached_property
    def efficiency_of(self) -> Callable[[str, float, int, int], float]:
        """Efficiency of a strategy's share of the layer, by tokens and chunks; each value is computed once.

        Interpolated between measurements by the logarithms of tokens and share; outside them, the nearest is taken. Of
        numbers of chunks the next larger one that was measured counts, or the largest.
        """
        return cache(self._interpolated)

    def _interpolated(self, strategy: str, share: float, tokens: int, num_chunks: int) -> float:
        rows = [row for name, *row in sorted(self.efficiency) if name == strategy]
        if not rows or not share > 0:
            return 1.0
        measured = {n for *_, n, _ in rows}
        chunks = min((n for n in measured if n >= num_chunks), default=max(measured))
        by_tokens: dict[int, list[tuple[float, float]]] = {}
        for of_layer, of_tokens, n, efficiency in rows:
            if n == chunks:
                by_tokens.setdefault(of_tokens, []).append((math.log(of_layer), min(1.0, efficiency)))
        at = {n: np.interp(math.log(share), *zip(*pairs, strict=True)) for n, pairs in sorted(by_tokens.items())}
        return float(np.interp(math.log(tokens), [math.log(n) for n in at], list(at.values())))


@dataclass(frozen=True)
class LinkProfile:
    """The devices' links to their switch, and how close collectives come to the links' rate.

    Args:
        bandwidth_bps: of each device's link, in each direction; if links differ, the rate that `shares` divide.
        step_latency_s: of one of a collective's `latency_steps`, by collective kind; `"*"` for the other kinds.
        efficiency: share of the bandwidth that a device's bytes achieve, by collective kind; `"*"` for the others.
        source: where the figures come from, in words.
        shares: each device's fraction of `bandwidth_bps`, in the cluster's order; empty: all have all of it.
        shared: the links are one medium (Wi-Fi, a hub): `bandwidth_bps` is for all devices together.
        delay_s: how long a packet is under way between any two devices, besides its bytes' time.
    """

    __pydantic_config__ = STRICT

    bandwidth_bps: float
    step_latency_s: Mapping[str, float] = field(default_factory=lambda: {"*": 2e-4})
    efficiency: Mapping[str, float] = field(default_factory=lambda: {"*": 0.94})
    source: str = "assumed: 0.2 ms a ring step, 94% of the line rate (TCP over Ethernet)"
    shares: tuple[float, ...] = ()
    shared: bool = False
    delay_s: float = 0.0

    def __post_init__(self):
        if self.shares and self.shared:
            raise ValueError(f"shares={self.shares} of a shared medium: it has one rate, so leave them out.")
        if not all(share > 0 for share in (self.bandwidth_bps, *self.shares)):
            raise ValueError(f"bandwidth_bps={self.bandwidth_bps} and shares={self.shares} must be above 0.")

    def share(self, device: int) -> float:
        return self.shares[device] if self.shares else 1.0

    def at(self, bandwidth_bps: float) -> "LinkProfile":
        """The same step latency, efficiency and shares at another rate."""
        return replace(self, bandwidth_bps=bandwidth_bps)

    def collective_s(self, kind: str, num_bytes: float, num_devices: int) -> float:
        """Time of one collective of `num_devices` ranks that send `num_bytes` each."""
        latency = self.step_latency_s.get(kind, self.step_latency_s["*"])
        efficiency = self.efficiency.get(kind, self.efficiency["*"])
        if self.shared and kind not in ("send", "receive"):
            num_bytes = num_devices * num_bytes  # one after another
        waits_s = latency_steps(kind, num_devices) * latency + message_delays(kind, num_devices) * self.delay_s
        return waits_s + 8 * num_bytes / (self.bandwidth_bps * efficiency)

    def exchange_s(self, starts: Sequence["Start"], devices: Sequence[int]) -> float:
        """Time of one collective that `devices` start so: until the busiest one is done.

        If links differ, a device is busy with what it sends or receives over its share of the bandwidth. On a shared
        medium all are busy with what all of them send.
        """
        if self.shared:
            busiest = sum(start.num_bytes for start in starts) / len(starts)
        elif self.shares:
            largest = (max(start.num_bytes, start.received_bytes) for start in starts)
            busiest = max(size / self.shares[device] for size, device in zip(largest, devices, strict=True))
        else:
            busiest = max(start.num_bytes for start in starts)
        return self.collective_s(starts[0].kind, busiest, len(starts))


@dataclass(frozen=True)
class ClusterProfile:
    """The devices in rank order and the link between them."""

    devices: tuple[DeviceProfile, ...]
    link: LinkProfile

    def of(self, devices: Sequence[int]) -> "ClusterProfile":
        """The profile of these devices, in this order."""
        shares = tuple(self.link.shares[i] for i in devices) if self.link.shares else ()
        return ClusterProfile(tuple(self.devices[i] for i in devices), replace(self.link, shares=shares))

    def at(self, bandwidth_bps: float) -> "ClusterProfile":
        """The same devices, with links of another rate."""
        return replace(self, link=self.link.at(bandwidth_bps))

    def save(self, path: str | Path, provenance: Mapping | None = None) -> None:
        record = {"version": VERSION, **asdict(self), "provenance": dict(provenance or {})}
        with atomic_write(path) as file:
            json.dump(record, file, indent=2)

    @classmethod
    def load(cls, path: str | Path) -> "ClusterProfile":
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.get("version") != VERSION:
                raise ValueError(f"version {record.get('version')!r} is not {VERSION}")
            return from_json(cls, {name: record[name] for name in ("devices", "link")})
        except FileNotFoundError:
            raise ValueError(
                f"profile {path} does not exist: make it with `detransformer profile --output {path}`."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error).rstrip(".")
            raise ValueError(f"{path} is not a profile ({why}): make it again with `detransformer profile`.") from error
