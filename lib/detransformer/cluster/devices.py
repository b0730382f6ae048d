"""Devices: presets from the papers as profiles for the cost model and the pacer, and devices derived from them.

A Raspberry Pi is calibrated on published latency. For the Jetsons, papers give peaks and one latency of one of them:
all three get the share of the peak that this one achieves. Their profiles say that they are modelled. Imports without
torch until a profile is asked for: `detransformer run` reads a cluster file on a board.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from detransformer.files import data_folder
from detransformer.planning.profile import CALIBRATION_TOKENS, ClusterProfile, DeviceProfile, LinkProfile

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

PACES = ("measured", "roofline")  # a share of a layer takes seconds as measured, or by its operations and bytes
MAX_DEVICES = 64  # of a cluster
BANDWIDTH_LIMITS_MBPS = (0.1, 100_000)  # of a link
DEIT_TOKENS, DEIT_PATCH = 197, 16  # DeiT-B: BERT-Base's layers on 14 x 14 patches of 16 x 16 x 3 and a class token
EFFICIENCY = data_folder("measured") / "efficiency.csv"  # made by `python -m detransformer.cluster.profiler FILE`
EFFICIENCY_COLUMNS = ("strategy", "share", "tokens", "num_chunks", "efficiency")
MEASURED_JETSON = "jetson-tx2"  # runs the whole DeiT-B in CoFormer 2025, Table V


class DeviceError(RuntimeError):
    """The device `rank` failed."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class DeviceLost(DeviceError):
    """A device died, did not join, or stopped answering."""


@dataclass(frozen=True)
class Device:
    """A device of the papers: a row of data/published/devices.csv.

    `latency_claims` maps a model to the published claim of its single-device latency; else the rate is modelled.
    `power_w` is the thermal design power.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops_per_s: float
    power_w: float
    latency_claims: Mapping[str, str]

    @classmethod
    def published(cls, name: str, latency_claims: Mapping[str, str] | None = None) -> "Device":
        """Reads the device `name` from the table, without pandas, since a board reads it too."""
        with open(data_folder("published") / "devices.csv", encoding="utf-8") as file:
            (row,) = (r for r in csv.DictReader(line for line in file if line[0] != "#") if r["device"] == name)
        memory, bandwidth = int(float(row["memory_gib"]) * 2**30), 1e9 * float(row["memory_gb_per_s"])
        return cls(name, memory, bandwidth, 1e9 * float(row["peak_gflops"]), float(row["tdp_w"]), latency_claims or {})


_LATENCIES = {"bert-base": "single_device_latency_bert_base", "bert-large": "single_device_latency_bert_large"}
DEVICES = {
    "rpi4b": Device.published("Raspberry Pi 4B", _LATENCIES),
    "jetson-nano": Device.published("Jetson Nano"),
    "jetson-tx2": Device.published("Jetson TX2"),
    "jetson-orin-nano": Device.published("Jetson Orin Nano"),
}


@dataclass(frozen=True)
class DeviceSpec:
    """One device of a cluster: a preset and the differences from it.

    Args:
        preset: a key of `DEVICES`.
        speed: 2.0 computes and reads weights twice as fast.
        memory_bytes: None: the preset's.
        link_share: its link's rate as a fraction of the cluster's bandwidth.
        name: shown in messages; empty: its hardware.
        profile: rates measured on the device, used instead of the preset's.
    """

    preset: str = "rpi4b"
    speed: float = 1.0
    memory_bytes: int | None = None
    link_share: float = 1.0
    name: str = ""
    profile: DeviceProfile | None = None

    def __post_init__(self):
        if self.preset not in DEVICES:
            raise ValueError(f"device {self.preset!r} is unknown: choose one of {', '.join(DEVICES)}.")
        for what in ("speed", "link_share"):
            if not 0 < getattr(self, what) < float("inf"):
                raise ValueError(f"{what}={getattr(self, what)} must be above 0: 1 is as fast as the preset.")
        if self.memory_bytes is not None and not self.memory_bytes > 0:
            raise ValueError(f"memory_bytes={self.memory_bytes} must be above 0, or None for the preset's.")

    @property
    def hardware(self) -> str:
        """The device in words, such as `Raspberry Pi 4B at 2x speed`."""
        words = self.profile.name if self.profile else DEVICES[self.preset].name
        words += f" at {self.speed:g}x speed" if self.speed != 1 else ""
        words += f" with {self.memory_bytes / 2**20:g} MiB" if self.memory_bytes is not None else ""
        return words + (f" on a {self.link_share:g}x link" if self.link_share != 1 else "")

    @property
    def title(self) -> str:
        return self.name or self.hardware

    def on(
        self, config: "PretrainedConfig", pace: str = "measured", efficiency: Sequence | None = None
    ) -> DeviceProfile:
        """Its profile for a model of `config`; arguments as in `cluster_profile`."""
        known = self.profile or preset_profile(self.preset, config)
        if pace == "roofline":
            known = replace(known, efficiency=())
        elif not known.efficiency:
            known = replace(known, efficiency=host_efficiency(config.hidden_size) if efficiency is None else efficiency)
        reads = known.memory_bytes_per_s
        return replace(
            known,
            name=self.title,
            memory_bytes=self.memory_bytes or known.memory_bytes,
            flops_per_s=self.speed * known.flops_per_s,
            source=known.source + (f", {self.speed:g} times as fast" if self.speed != 1 else ""),
            memory_bytes_per_s=reads and self.speed * reads,
        )


def device_specs(num_devices: int, device: str | DeviceSpec | Sequence[str | DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """One spec per device: `device` is a preset or spec for all, or a list of them.

    Raises:
        ValueError: if the list has another length.
    """
    listed = [device] * num_devices if isinstance(device, (str, DeviceSpec)) else list(device)
    if len(listed) != num_devices:
        raise ValueError(f"device lists {len(listed)} devices and num_devices={num_devices}: list one for each.")
    return tuple(DeviceSpec(spec) if isinstance(spec, str) else spec for spec in listed)


def describe_devices(specs: Sequence[DeviceSpec]) -> str:
    """Devices in words, such as `2 x Raspberry Pi 4B, Jetson TX2`; the hardware alone if all are alike."""
    runs = [(hardware, len(list(run))) for hardware, run in groupby(spec.hardware for spec in specs)]
    if len(runs) == 1:
        return runs[0][0]
    return ", ".join(f"{count} x {hardware}" if count > 1 else hardware for hardware, count in runs)


def link_shares(specs: Sequence[DeviceSpec]) -> tuple[float, ...]:
    """Each device's fraction of the cluster's bandwidth; empty if each has all of it."""
    shares = tuple(spec.link_share for spec in specs)
    return shares if set(shares) != {1.0} else ()


def cluster_profile(
    specs: Sequence[DeviceSpec],
    config: "PretrainedConfig",
    bandwidth_bps: float,
    delay_s: float = 0.0,
    link: LinkProfile | None = None,
    pace: str = "measured",
    efficiency: Sequence | None = None,
    shared: bool = False,
) -> ClusterProfile:
    """The profile of devices and links for a model of `config`.

    Args:
        link: a measured link.
        pace: `measured`: a share of a layer has its measured efficiency relative to the whole layer, from the device's
            own profile, or else from a core (`efficiency`); `roofline`: all shares compute at the whole layer's rate,
            but no product is faster than reading its weights.
        efficiency: rows of `DeviceProfile.efficiency`; None: the package's.
        shared: as in `LinkProfile`.
    """
    if pace not in PACES:
        raise ValueError(f"pace={pace!r} is unknown: choose one of {', '.join(PACES)}.")
    devices = tuple(spec.on(config, pace, efficiency) for spec in specs)
    known = link or LinkProfile(bandwidth_bps)
    link_now = dict(bandwidth_bps=bandwidth_bps, shares=link_shares(specs), shared=shared, delay_s=delay_s)
    return ClusterProfile(devices, replace(known, **link_now))


def preset_profile(name: str, config: "PretrainedConfig") -> DeviceProfile:
    """The profile of a preset device for a model of `config`.

    Raspberry Pi: FLOPs over published latency of the model of the same hidden size, 14.2 GFLOP/s on BERT-Base, 17.6 on
    BERT-Large. One rate cannot fit both, so rates are interpolated in the logarithm of the hidden size, and constant
    outside. Jetsons: `jetson_share` of their peak, for all models. The rate is a whole layer's; `host_efficiency` gives
    that of its shares.
    """
    import numpy as np

    from detransformer.models.configuration import preset_config
    from detransformer.models.sizes import model_flops
    from detransformer.record.published import published_claim

    device = DEVICES[name]
    if device.latency_claims:
        points = []
        for model, claim in device.latency_claims.items():
            known = preset_config(model)
            points.append((known.hidden_size, model_flops(known, CALIBRATION_TOKENS) / published_claim(claim)))
        widths, rates = zip(*sorted(points), strict=True)
        rate = float(np.interp(np.log(config.hidden_size), np.log(widths), rates))
        source = f"preset, calibrated on published single-device latency ({', '.join(device.latency_claims)})"
    else:
        rate = jetson_share() * device.peak_flops_per_s
        source = (
            f"preset, modelled, not measured: {jetson_share():.0%} of its published peak, the share that the "
            f"{DEVICES[MEASURED_JETSON].name} achieves on DeiT-B (CoFormer 2025, Tables V and VII)"
        )
    return DeviceProfile(device.name, device.memory_bytes, rate, source, device.memory_bytes_per_s)


@cache
def host_efficiency(hidden_size: int, path: Path = EFFICIENCY) -> tuple[tuple[str, float, int, int, float], ...]:
    """Rows of `DeviceProfile.efficiency` measured on one core, for the nearest hidden size in the table at `path`."""
    import pandas as pd

    table = pd.read_csv(path, comment="#")
    nearest = min(table["hidden_size"].unique(), key=lambda size: abs(math.log(size / hidden_size)))
    return efficiency_rows(table[table["hidden_size"] == nearest])


def efficiency_rows(operations: "pd.DataFrame") -> tuple[tuple[str, float, int, int, float], ...]:
    """A table of `profiler.profile_operations` as rows of `DeviceProfile.efficiency`."""
    return tuple(operations[list(EFFICIENCY_COLUMNS)].itertuples(index=False, name=None))


@cache
def jetson_share() -> float:
    """The share of its peak that a Jetson TX2 achieves on DeiT-B: 35.1 GFLOP in 123.48 ms of 665.6 GFLOPS, 43%."""
    from detransformer.models.configuration import preset_config
    from detransformer.models.sizes import model_flops
    from detransformer.record.published import published

    table = published("coformer_tables").set_index(["table", "row"])
    latency_s = float(table.loc[("V", "1 device"), "latency_ms"]) / 1e3
    layers, patch_values = preset_config("bert-base"), 3 * DEIT_PATCH**2
    patches = 2 * (DEIT_TOKENS - 1) * patch_values * layers.hidden_size
    return (model_flops(layers, DEIT_TOKENS) + patches) / latency_s / DEVICES[MEASURED_JETSON].peak_flops_per_s
