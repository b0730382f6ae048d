"""By how much an emulated cluster runs slower than its devices so that this host keeps up, and whether it did."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from detransformer.cluster.bench import first_time_scale, usual_devices
from detransformer.cluster.session import EmulatedCluster
from detransformer.machine import usable_cores
from detransformer.planning.profile import ClusterProfile

MAX_LATE = 0.03  # of what is modelled, by which the host may be late


def set_time_scale(
    cluster: EmulatedCluster,
    bandwidth_bps: float,
    profile: ClusterProfile,
    devices: Sequence[int],
    config: PretrainedConfig,
    time_scale: float | None,
) -> float:
    """Sets the links of `cluster` to a rate, as much slower as asked, or as this host needs; returns how much slower.

    `devices` of `profile` are those that compute a model of `config`.
    """
    busy = usual_devices([profile.devices[i] for i in devices], config)
    total_bps = bandwidth_bps * sum(profile.link.share(i) for i in range(len(profile.devices)))
    shaped = cluster.transport == "namespaces"
    scale = time_scale or first_time_scale(total_bps if shaped else 0.0, busy, usable_cores())
    cluster.set_link(bandwidth_bps, scale)
    return scale


def lateness(results: Sequence[dict | None]) -> float:
    """By how much of what was modelled the host came late, on the device where it was worst."""
    samples = [result.get("samples", [result]) for result in results if result is not None]
    return max(sum(s["overrun_s"] for s in own) / max(sum(s["modelled_s"] for s in own), 1e-9) for own in samples)


def warn_if_late(late: float, scale: float) -> None:
    """Says so where this host kept up with what is modelled less than 97%, and what to do about it."""
    if late > MAX_LATE:
        print(f"this host was late by {late:.0%} of what is modelled: slow all down by --time-scale {2 * scale:g}")
