"""Latency of a policy: a sub-model on a device, and the three phases of a request (CoFormer 2025, Eqs. 3-6).

Devices and links are `planning`'s profiles. Profiles of emulated devices are rooflines, by which the emulated cluster
paces them: a prediction from them is a model of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from detransformer.coformer.policy import FLOAT_BYTES, Original, Policy, SubModelConfig, products
from detransformer.planning.profile import ClusterProfile, DeviceProfile

STRATEGY = "replicate"  # profiles' name for the rate of whole products on one device

Predict = Callable[[SubModelConfig], float]  # seconds of a sub-model on one device


def roofline_s(config: SubModelConfig, original: Original, device: DeviceProfile) -> float:
    """Seconds of a sub-model's backbone on a device: each product takes the longer of computing and reading weights."""
    return sum(device.compute_s(operations, STRATEGY, size) for operations, size in products(config, original))


@dataclass(frozen=True)
class Latency:
    """The three phases of Eq. 3 in seconds, by device; `aggregate_s` is the central node's."""

    backbone_s: tuple[float, ...]
    send_s: tuple[float, ...]
    aggregate_s: float
    central: int

    @property
    def total_s(self) -> float:
        """T = max(t1 + t2) + t3."""
        return max(map(sum, zip(self.backbone_s, self.send_s, strict=True))) + self.aggregate_s

    @property
    def idle_s(self) -> tuple[float, ...]:
        """How long each device waits for the slowest one: the synchronisation delay."""
        done = [a + b for a, b in zip(self.backbone_s, self.send_s, strict=True)]
        return tuple(max(done) - d for d in done)


def latency(
    policy: Policy,
    original: Original,
    cluster: ClusterProfile,
    predictors: Sequence[Predict] | None = None,
    central: int | None = None,
    sent_tokens: int | None = 1,
) -> Latency:
    """Eqs. 3-6 for one request.

    The "down-sampled features" that the paper sends may be the pooled ones, one token each, with the same result
    (`aggregator`); Eq. 6 as printed multiplies M of them, which is read as all tokens. In Eq. 5 each device sends at
    its link's rate r_n; that all of them share the central node's link is not in Eq. 5, and not here.

    Args:
        cluster: devices in the policy's order and their link; r_n is its bandwidth times the device's share and the
            efficiency of `send`, and a message takes one step's latency more than in Eq. 5.
        predictors: f of each device; default: the devices' rooflines.
        central: the device that aggregates and already has its own features; default: the fastest.
        sent_tokens: tokens of the features that each device sends, [sent_tokens, d_n] in float32; 1: pooled; None: all
            S of them, as Eqs. 2 and 6 are printed.
    """
    central = fastest_device(cluster.devices) if central is None else central
    tokens = original.seq_len if sent_tokens is None else sent_tokens
    predictors = predictors or [partial(roofline_s, original=original, device=d) for d in cluster.devices]
    backbone = [float(predict(c)) for c, predict in zip(policy.sub_models, predictors, strict=True)]
    link, send = cluster.link, []
    all_sent = sum(policy.widths) - policy.widths[central]
    for n, width in enumerate(policy.widths):
        num_bytes = FLOAT_BYTES * tokens * (all_sent if link.shared else width) / link.share(n)
        send.append(0.0 if n == central else link.collective_s("send", num_bytes, policy.num_devices))
    operations = 2 * tokens * policy.widths[central] * sum(policy.widths)
    aggregate = cluster.devices[central].compute_s(operations, STRATEGY)
    return Latency(tuple(backbone), tuple(send), aggregate, central)


def fastest_device(devices: Sequence[DeviceProfile]) -> int:
    """The device that takes least for the same product; of equals the first."""
    seconds = [device.compute_s(1e9, STRATEGY) for device in devices]
    return seconds.index(min(seconds))
