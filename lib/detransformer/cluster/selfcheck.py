"""Self-checks of links and pacing that make a measured row credible; a row that fails says why.

A shared host is disturbed now and then, and may be too slow for many devices on fast links: then the time scale slows
everything down, so that the host keeps up.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from detransformer.cluster.devices import preset_profile
from detransformer.cluster.session import EmulatedCluster
from detransformer.machine import usable_cores
from detransformer.planning.profile import ClusterProfile

MIN_LINK_SHARE = 0.9  # a link must carry at least this share of its rate, and never more than the rate
MAX_PACING_ERROR = 0.02  # relative excess of an idle device's paced segments over the modelled time
MAX_OVERRUN_SHARE = 0.03  # share of the modelled time by which the host may be late
MAX_ABS_ERROR = 1e-4  # float32 sums in another order move a LayerNormed output (size 1) by some 1e-6 a layer
# Largest relative error (RMS) of an output whose messages were rounded. One rounding of a row moves it by some 0.2%
# (bfloat16, 8 bits of mantissa) or 0.7% (int8: a step of max / 127, and a row's largest number is some three times its
# RMS), and roundings add up like noise. BERT-Base's 12 layers have 0.2 to 0.5% and 0.8 to 2.0%, by method; twice the
# layers have up to 1.4 times that. int4 has 10 to 30%. means8 and vq4 approximate other devices' tokens: their error is
# reported, and must be less than an unrelated output's.
MAX_RELATIVE_ERROR = {"bfloat16": 0.01, "int8": 0.04, "int4": 0.5, "means8": 1.0, "vq4": 1.0}
MAX_STEAL = 0.3  # of the processors, taken by other guests: above it a row says more about them
# The rate, summed over the devices' links, that two cores shape and move without making collectives late; above it
# everything is slowed from the start, although each link would pass its check.
MAX_TOTAL_BPS = 1e9
USUAL_DEVICE = "rpi4b"  # a core computes as much as one, beside its messages; a device twice as fast counts as two
MIN_CHECK_BYTES = 500_000  # on a slow link a shorter transfer shows latency, not rate
LINK_CHECK_S, DELAYS_A_CHECK = 0.15, 150  # a check's seconds, and delays: TCP needs some ten to fill a link
MAX_PACKET_ERROR_MS = 0.5  # deviation from the delay, in the devices' milliseconds
PACING_CHECK_S, PACED_SEGMENT_S = 0.1, 0.01  # the latter in the devices' seconds, as short as in fast plans
CHECK_ATTEMPTS = 10


@dataclass(frozen=True)
class Check:
    """One self-check: Mbps of the slowest and fastest link in the devices' seconds (NaN: no link), and pacing error.

    `packet_error_ms`: how much longer than the links' delay a packet took; 0 without a delay.
    """

    link_min_mbps: float
    link_max_mbps: float
    pacing_error: float
    packet_error_ms: float = 0.0

    def failures(self, bandwidth_mbps: float) -> list[str]:
        """The failed criteria, in words."""
        reasons = []
        if self.link_min_mbps < MIN_LINK_SHARE * bandwidth_mbps:
            reasons.append(f"a link carried {self.link_min_mbps:.0f} of {bandwidth_mbps:g} Mbps")
        if self.link_max_mbps > bandwidth_mbps:
            reasons.append(f"a link carried {self.link_max_mbps:.1f} Mbps, more than its {bandwidth_mbps:g}")
        if self.pacing_error > MAX_PACING_ERROR:
            reasons.append(f"idle devices were paced {self.pacing_error:.1%} too slow")
        if abs(self.packet_error_ms) > MAX_PACKET_ERROR_MS:
            reasons.append(f"a packet took {self.packet_error_ms:+.2f} ms more than the links' delay")
        return reasons

    def joined(self, other: "Check") -> "Check":
        """The worse of both in each field."""
        return Check(
            min(self.link_min_mbps, other.link_min_mbps),
            max(self.link_max_mbps, other.link_max_mbps),
            max(self.pacing_error, other.pacing_error),
            max(self.packet_error_ms, other.packet_error_ms, key=abs),
        )


def check_cluster(cluster: EmulatedCluster, bandwidth_mbps: float, num_devices: int, sends: bool) -> Check:
    """The first self-check of the running `cluster` that passes, or the last of `CHECK_ATTEMPTS` that failed.

    Links are checked if they are real and the devices use them (`sends`).
    """
    scale, checks_links = cluster.time_scale, sends and cluster.transport == "namespaces"
    seconds = LINK_CHECK_S + DELAYS_A_CHECK * cluster.delay_s * scale
    num_bytes = max(MIN_CHECK_BYTES, int(bandwidth_mbps * 1e6 / scale * seconds / 8)) if checks_links else 0
    is_delayed = checks_links and cluster.delay_s > 0
    segment_s = PACED_SEGMENT_S * scale
    paced = {"segment_s": segment_s, "num_segments": max(4, round(PACING_CHECK_S / segment_s))}
    shares = cluster.link_shares or [1.0] * cluster.num_devices
    for _ in range(CHECK_ATTEMPTS):
        packet_error_ms = 1e3 * (cluster.packet_s() - cluster.delay_s) if is_delayed else 0.0
        sizes = dict(num_devices=num_devices, link_bytes=num_bytes, in_turn=cluster.shared)
        results = cluster.run("self_check", **sizes, **paced)
        results = [result for result in results if result is not None]
        rates = [  # relative to the link's share of the bandwidth
            8 * num_bytes / seconds * scale / 1e6 / min(shares[source], shares[target])
            for (source, target), seconds in transfer_seconds(results).items()
        ]
        error = max(result["pacing_error"] for result in results)
        check = Check(min(rates, default=math.nan), max(rates, default=math.nan), error, packet_error_ms)
        if not check.failures(bandwidth_mbps):
            break
    return check


def transfer_seconds(results: Iterable[dict]) -> dict[tuple[int, int], float]:
    """(from, to) -> seconds of each transfer of a self-check, from its sender's start to its receiver's end."""
    starts = {(source, target): at for result in results for source, target, at in result["sent"]}
    received = [pair for result in results for pair in result["received"]]
    return {(source, target): at - starts[source, target] for source, target, at in received}


def wrong_output(wire: str, max_abs_error: float, relative_error: float) -> str:
    """The error of an output against the single device's, in words, if its wire does not explain it; else empty."""
    limit = MAX_RELATIVE_ERROR.get(wire)
    if limit is None and not max_abs_error <= MAX_ABS_ERROR:
        return f"output differs from the single device's by {max_abs_error:.1e}"
    if limit is not None and not relative_error <= limit:
        return f"output differs from the single device's by {relative_error:.1%} (RMS)"
    return ""


def why_invalid(row: Mapping[str, Any]) -> str:
    """Why a row's checks reject it, in words; empty for a valid row."""
    check = Check(row["link_min_mbps"], row["link_max_mbps"], row["pacing_error"], row["packet_error_ms"])
    reasons = check.failures(row["bandwidth_mbps"])
    if row["pacing_overrun"] > MAX_OVERRUN_SHARE:
        reasons.append(f"host late by {row['pacing_overrun']:.1%} of what is modelled")
    if row["host_steal"] > MAX_STEAL:
        reasons.append(f"other guests took {row['host_steal']:.0%} of the host's processors")
    reasons.append(wrong_output(row["wire"], row["max_abs_error"], row["relative_error"]))
    return "; ".join(filter(None, reasons))


def first_time_scale(total_bps: float, num_devices: float, num_cores: int) -> float:
    """The power of two by which everything is slowed so that `num_cores` carry the links (`total_bps`) and devices."""
    needed = max(total_bps / MAX_TOTAL_BPS, num_devices / num_cores)
    return 2.0 ** max(0, math.ceil(math.log2(needed)))


def host_time_scale(
    cluster: EmulatedCluster,
    config: PretrainedConfig,
    profile: ClusterProfile,
    devices: Sequence[int],
    sends: bool = True,
    at_once: bool = True,
) -> float:
    """The time scale to begin with on this host, if `devices` of `profile` compute a model of `config`.

    Args:
        sends: whether they send each other anything.
        at_once: whether they compute and send at the same time; the stages of a pipeline do so one after another.
    """
    together = sum if at_once else max
    usual_rate = preset_profile(USUAL_DEVICE, config).flops_per_s
    busy = together(profile.devices[i].flops_per_s / usual_rate for i in devices)
    if cluster.transport == "loopback":  # the host need not carry modelled links in time
        return first_time_scale(0.0, busy / 2, usable_cores())
    total_bps = profile.link.bandwidth_bps * together(profile.link.share(i) for i in devices)
    return first_time_scale(total_bps if sends else 0.0, busy, usable_cores())


def lateness(results: Sequence[dict | None]) -> float:
    """The share of the modelled time by which the host was late, on the worst device."""
    samples = [result.get("samples", [result]) for result in results if result is not None]
    return max(sum(s["overrun_s"] for s in own) / max(sum(s["modelled_s"] for s in own), 1e-9) for own in samples)


def warn_if_late(late: float, scale: float) -> None:
    """Prints a remedy if this host was too late."""
    if late > MAX_OVERRUN_SHARE:
        print(f"this host was late by {late:.0%} of what is modelled: slow everything by --time-scale {2 * scale:g}")
