"""Profile records: how fast devices compute and links carry. Facts in, no measuring, no torch.

A profile is made for one model (DATE 2024, Section III-C: operations are profiled offline, repeated layers once) and
is what the cost model multiplies and divides by. Stored as versioned JSON with its provenance.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from detransformer.files import atomic_write

VERSION = 1


@dataclass(frozen=True)
class DeviceProfile:
    """One device's compute rates on one model.

    Args:
        name: preset or host name.
        memory_bytes: what model and activations may take.
        flops_per_s: by strategy name; `"*"` stands for all that are not listed.
        source: where the rates come from, in words.
    """

    name: str
    memory_bytes: int
    flops_per_s: Mapping[str, float]
    source: str

    def compute_s(self, flops: float, strategy: str) -> float:
        return flops / (self.flops_per_s.get(strategy) or self.flops_per_s["*"])


@dataclass(frozen=True)
class LinkProfile:
    """One link rate for all devices, and how close collectives come to it.

    Args:
        bandwidth_bps: of each device's link, in each direction.
        step_latency_s: of one step of a ring (a message between neighbours), by collective kind; `"*"` for the rest.
        efficiency: share of the bandwidth that the ring's bytes achieve, by collective kind; `"*"` for the rest.
        source: where the figures come from, in words.
    """

    bandwidth_bps: float
    step_latency_s: Mapping[str, float] = field(default_factory=lambda: {"*": 2e-4})
    efficiency: Mapping[str, float] = field(default_factory=lambda: {"*": 0.94})
    source: str = "assumed: 0.2 ms a ring step, 94% of the line rate (TCP over Ethernet)"

    def at(self, bandwidth_bps: float) -> "LinkProfile":
        """The same step latency and efficiency at another rate."""
        return replace(self, bandwidth_bps=bandwidth_bps)

    def collective_s(self, kind: str, num_bytes: float, num_devices: int) -> float:
        """Time of one collective whose ranks send `num_bytes` each, in a ring of `num_devices`."""
        steps = {"all_reduce": 2 * (num_devices - 1), "all_gather": num_devices - 1}.get(kind, 1)
        latency = self.step_latency_s.get(kind, self.step_latency_s["*"])
        efficiency = self.efficiency.get(kind, self.efficiency["*"])
        return steps * latency + 8 * num_bytes / (self.bandwidth_bps * efficiency)


@dataclass(frozen=True)
class ClusterProfile:
    """The devices in rank order and the link between them."""

    devices: tuple[DeviceProfile, ...]
    link: LinkProfile

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
            devices = tuple(DeviceProfile(**fields) for fields in record["devices"])
            return cls(devices, LinkProfile(**record["link"]))
        except FileNotFoundError:
            raise ValueError(
                f"profile {path} does not exist: make it with `detransformer profile --output {path}`."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a profile ({error}): make it again with `detransformer profile`."
            ) from error
