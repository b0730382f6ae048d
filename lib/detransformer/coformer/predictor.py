"""Latency of a policy: profiles, the learned predictor, the three phases (CoFormer 2025, Eqs. 3-6).

Devices and links are `planning`'s profiles. Profiles of emulated devices are rooflines, as the emulated cluster paces
them: a prediction from them is a model of a model.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from detransformer.coformer.policy import (
    FLOAT_BYTES,
    Original,
    Policy,
    SubModelConfig,
    flops,
    parameters,
    products,
)
from detransformer.planning.profile import ClusterProfile, DeviceProfile

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.pipeline import Pipeline

STRATEGY = "replicate"  # whole products on one device: the name under which profiles list their rate
PUBLISHED_FEATURES = ("num_layers", "hidden_size", "mean_heads", "mean_ffn_size")  # supplementary A
DERIVED_FEATURES = ("flops", "weight_bytes")

Predict = Callable[[SubModelConfig], float]  # seconds of a sub-model on one device


def roofline_s(config: SubModelConfig, original: Original, device: DeviceProfile) -> float:
    """Seconds of a sub-model's backbone on a device: each product takes what computing or reading its weights takes."""
    return sum(device.compute_s(operations, STRATEGY, size) for operations, size in products(config, original))


def describe(config: SubModelConfig, original: Original) -> dict[str, float]:
    """What the predictor may look at; FLOPs and weights follow from the four published features."""
    described = {name: getattr(config, name) for name in PUBLISHED_FEATURES}
    weight_bytes = FLOAT_BYTES * parameters(config, original)
    return described | {"flops": flops(config, original), "weight_bytes": weight_bytes}


def fit_predictor(
    frame: "pd.DataFrame",
    features: Sequence[str] = PUBLISHED_FEATURES + DERIVED_FEATURES,
    hidden_sizes: tuple[int, ...] = (600, 600),
    max_iterations: int = 500,
) -> "Pipeline":
    """f(C_n) of Eq. 4: a multi-layer perceptron with ReLU from a sub-model's sizes to its latency on one device.

    As published (supplementary A) it is "a three-layer MLP with 600 hidden dimension", read as three matrices, over
    l, d and the mean heads and FFN width. FLOPs and weights may be given too: they are products of the four, which a
    small network learns slowly. Features and latency are taken by their logarithm and standardised.

    Args:
        frame: rows of `describe` with their `latency_s`.

    Returns:
        A regressor: `predict(frame)` gives the seconds of each row.
    """
    from sklearn.compose import TransformedTargetRegressor, make_column_transformer
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    # Adam stops once the training loss stands still; without held-out points, which are few in a small pool.
    network = MLPRegressor(
        hidden_layer_sizes=hidden_sizes,
        learning_rate_init=2e-3,
        batch_size=min(64, len(frame)),
        max_iter=max_iterations,
        tol=1e-6,
        n_iter_no_change=30,
        random_state=0,
    )
    log_seconds = make_pipeline(FunctionTransformer(np.log, np.exp), StandardScaler())
    target = TransformedTargetRegressor(network, transformer=log_seconds)
    chosen = make_column_transformer((FunctionTransformer(np.log), list(features)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the error on held-out points is what counts
        return make_pipeline(chosen, StandardScaler(), target).fit(frame, frame["latency_s"].to_numpy(float))


# Latency of a policy -----------------------------------------------------------------------------------


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
        """How long each device waits for the slowest: the synchronisation delay."""
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

    Average pooling over the tokens and the linear map of Eq. 2 can change places: W Pool(X) + b = Pool(W X + b). So the
    "down-sampled features" that the paper sends may be the pooled ones, one token each, with the same result; Eq. 6 as
    printed multiplies M of them, which is read as all tokens. Eq. 5 lets each device send at its link's rate r_n: that
    all of them share the central node's link is not in it, and not here.

    Args:
        cluster: devices in the policy's order and their link; r_n is its bandwidth times the device's share and the
            efficiency of `send`, and a message takes one step's latency more than Eq. 5 says.
        predictors: f of each device; without, the devices' rooflines.
        central: the device that aggregates and has its own features already; without, the fastest.
        sent_tokens: tokens of the features that each device sends, [sent_tokens, d_n] in float32; 1: pooled; None: all
            S of them, as Eqs. 2 and 6 are printed.

    Raises:
        ValueError: where policy and cluster are not of the same number of devices.
    """
    if len(cluster.devices) != policy.num_devices:
        raise ValueError(
            f"the policy has {policy.num_devices} sub-models, the cluster {len(cluster.devices)} devices: "
            "give one sub-model a device."
        )
    central = fastest_device(cluster.devices) if central is None else central
    tokens = original.seq_len if sent_tokens is None else sent_tokens
    if predictors is None:
        backbone = [roofline_s(c, original, d) for c, d in zip(policy.sub_models, cluster.devices, strict=True)]
    else:
        backbone = [float(predict(c)) for c, predict in zip(policy.sub_models, predictors, strict=True)]
    link, send = cluster.link, []
    for n, width in enumerate(policy.widths):
        num_bytes = FLOAT_BYTES * tokens * width / link.share(n)
        send.append(0.0 if n == central else link.collective_s("send", num_bytes, policy.num_devices))
    operations = 2 * tokens * policy.widths[central] * sum(policy.widths)
    aggregate = cluster.devices[central].compute_s(operations, STRATEGY)
    return Latency(tuple(backbone), tuple(send), aggregate, central)


def fastest_device(devices: Sequence[DeviceProfile]) -> int:
    """By what it takes for the same product; of equals the first."""
    seconds = [device.compute_s(1e9, STRATEGY) for device in devices]
    return seconds.index(min(seconds))
