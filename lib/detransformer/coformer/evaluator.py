"""The evaluator: what a policy costs and how good its sub-models are (CoFormer 2025, Section III-B, Eqs. 3-8).

Latency T is predicted, phase by phase; accuracy is stood in for by the validation loss of the untrained sub-models.
Devices and links are `planning`'s profiles. Profiles of emulated devices are rooflines, as the emulated cluster paces
them: what is predicted from them is a model of a model, and says so. Energy is modelled from thermal design power.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from detransformer.cluster.devices import DEVICES, DeviceSpec
from detransformer.coformer.policy import (
    FLOAT_BYTES,
    Limits,
    Original,
    Policy,
    SubModelConfig,
    flops,
    parameters,
    products,
    scale_policy,
)
from detransformer.planning.profile import ClusterProfile, DeviceProfile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STRATEGY = "replicate"  # whole products on one device: the name under which profiles list their rate
PUBLISHED_FEATURES = ("num_layers", "hidden_size", "mean_heads", "mean_ffn_size")  # supplementary A
DERIVED_FEATURES = ("flops", "weight_bytes")


# Phase 1: profiles and the predictor ------------------------------------------------------------------------------


def roofline_s(config: SubModelConfig, original: Original, device: DeviceProfile) -> float:
    """Seconds of a sub-model's backbone on a device: each product takes what computing or reading its weights takes."""
    listed = products(config, original)
    return sum(device.compute_s(product.flops, STRATEGY, product.weight_bytes) for product in listed)


def profile_pool(
    device: DeviceSpec,
    configs: Sequence[SubModelConfig],
    original: Original,
    measure: Callable[[SubModelConfig], float] | None = None,
) -> pd.DataFrame:
    """The runtime profile of a pool of sub-models on one device: features, `latency_s` and its `source`, a row each.

    Args:
        measure: seconds of a sub-model, timed on a real device; without, the latency is that of `device`'s roofline,
            which has no noise.
    """
    rows = []
    for config in configs:
        known = device.on(config)  # a profile asks a configuration for its hidden size alone
        source = "measured" if measure else f"roofline: {known.source}"
        seconds = measure(config) if measure else roofline_s(config, original, known)
        row = describe(config, original)
        rows.append({"device": device.title, **row, "latency_s": seconds, "source": source})
    return pd.DataFrame(rows)


def describe(config: SubModelConfig, original: Original) -> dict[str, float]:
    """What the predictor may look at; FLOPs and weights follow from the four published features."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "mean_heads": config.mean_heads,
        "mean_ffn_size": config.mean_ffn_size,
        "flops": flops(config, original),
        "weight_bytes": FLOAT_BYTES * parameters(config, original),
    }


@dataclass(frozen=True)
class LatencyPredictor:
    """f(C_n) of Eq. 4: a multi-layer perceptron with ReLU from a sub-model's sizes to its latency on one device.

    As published (supplementary A) it is "a three-layer MLP with 600 hidden dimension", read as three matrices, over
    l, d and the mean heads and FFN width. FLOPs and weights may be given too: they are products of the four, which a
    small network learns slowly. Features and latency are taken by their logarithm and standardised.

    Weights are plain arrays, [in, out] a layer: predicting needs no scikit-learn.
    """

    original: Original
    features: tuple[str, ...]
    shift: np.ndarray
    scale: np.ndarray
    target: tuple[float, float]
    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    @classmethod
    def fit(
        cls,
        frame: pd.DataFrame,
        original: Original,
        features: Sequence[str] = PUBLISHED_FEATURES + DERIVED_FEATURES,
        hidden_sizes: tuple[int, ...] = (600, 600),
        max_iterations: int = 500,
        seed: int = 0,
    ) -> "LatencyPredictor":
        """Fits the frame of `profile_pool`."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor

        inputs, seconds = np.log(frame[list(features)].to_numpy(float)), np.log(frame["latency_s"].to_numpy(float))
        shift, scale = inputs.mean(0), inputs.std(0)
        scale[scale == 0] = 1.0
        target = float(seconds.mean()), float(seconds.std()) or 1.0
        # Adam stops once the training loss stands still; without held-out points, which are few in a small pool.
        network = MLPRegressor(
            hidden_layer_sizes=hidden_sizes,
            learning_rate_init=2e-3,
            batch_size=min(64, len(frame)),
            max_iter=max_iterations,
            tol=1e-6,
            n_iter_no_change=30,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the error on held-out points is what counts
            network.fit((inputs - shift) / scale, (seconds - target[0]) / target[1])
        return cls(original, tuple(features), shift, scale, target, tuple(network.coefs_), tuple(network.intercepts_))

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Seconds of each row."""
        x = (np.log(frame[list(self.features)].to_numpy(float)) - self.shift) / self.scale
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if i < len(self.weights) - 1:
                x = np.maximum(x, 0.0)
        return np.exp(self.target[0] + self.target[1] * x[:, 0])

    def __call__(self, config: SubModelConfig) -> float:
        """Seconds of one sub-model."""
        return float(self.predict(pd.DataFrame([describe(config, self.original)]))[0])


# Latency and energy of a policy -----------------------------------------------------------------------------------


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
    predictors: Sequence[Callable[[SubModelConfig], float]] | None = None,
    central: int | None = None,
    sent_tokens: int | None = None,
) -> Latency:
    """Eqs. 3-6 for one request.

    Average pooling over the tokens and the linear map of Eq. 2 can change places: W Pool(X) + b = Pool(W X + b). So the
    "down-sampled features" that the paper sends may be the pooled ones, one token each, with the same result; Eq. 6 as
    printed multiplies M of them, which is read as all tokens. Which is sent is `sent_tokens`. Eq. 5 lets each device
    send at its link's rate r_n; that all of them share the central node's link is not in it, and not here.

    Args:
        cluster: devices in the policy's order and their link; r_n is its bandwidth times the device's share and the
            efficiency of `send`, and a message takes one step's latency more than Eq. 5 says.
        predictors: f of each device; without, the devices' rooflines.
        central: the device that aggregates and has its own features already; without, the fastest.
        sent_tokens: tokens of the features that each device sends, [sent_tokens, d_n] in float32; None: all S of them,
            as Eqs. 2 and 6 are printed; 1: pooled.

    Raises:
        ValueError: where policy, cluster and predictors are not of the same number of devices.
    """
    count = policy.num_devices
    if len(cluster.devices) != count or (predictors is not None and len(predictors) != count):
        raise ValueError(
            f"the policy has {count} sub-models, the cluster {len(cluster.devices)} devices"
            + (f" and there are {len(predictors)} predictors." if predictors is not None else ".")
        )
    if central is None:
        central = fastest_device(cluster.devices)
    tokens = original.seq_len if sent_tokens is None else sent_tokens
    if predictors is None:
        backbone = [roofline_s(c, original, d) for c, d in zip(policy.sub_models, cluster.devices, strict=True)]
    else:
        backbone = [float(predict(c)) for c, predict in zip(policy.sub_models, predictors, strict=True)]
    send = [
        0.0 if n == central else _send_s(cluster, n, FLOAT_BYTES * tokens * config.hidden_size)
        for n, config in enumerate(policy.sub_models)
    ]
    own, together = policy.sub_models[central].hidden_size, sum(c.hidden_size for c in policy.sub_models)
    aggregate = cluster.devices[central].compute_s(2 * tokens * own * together, STRATEGY)
    return Latency(tuple(backbone), tuple(send), aggregate, central)


def _send_s(cluster: ClusterProfile, device: int, num_bytes: int) -> float:
    link = cluster.link
    return link.collective_s("send", num_bytes / link.share(device), len(cluster.devices))


def fastest_device(devices: Sequence[DeviceProfile]) -> int:
    """By what it takes for the same product; of equals the first."""
    seconds = [device.compute_s(1e9, STRATEGY) for device in devices]
    return seconds.index(min(seconds))


def device_limits(devices: Sequence[DeviceProfile], max_compute_s: float | None = None) -> Limits:
    """Omega_n, what a device computes within `max_compute_s` (None: no limit), and Phi_n, its memory."""
    most = [max_compute_s / device.compute_s(1.0, STRATEGY) if max_compute_s else float("inf") for device in devices]
    return Limits(tuple(most), tuple(float(device.memory_bytes) for device in devices))


def tdp_w(specs: Sequence[DeviceSpec]) -> tuple[float, ...]:
    """Thermal design power of each device (Table VII)."""
    return tuple(DEVICES[spec.preset].power_w for spec in specs)


def energy_j(times: Latency, powers_w: Sequence[float], send_w: float = 0.0) -> float:
    """Modelled energy of one request over all devices: power times the time in which a device computes.

    While it sends, a device takes `send_w`, of which nothing is published; idle power is left out, as the paper
    subtracts it. With thermal design power (`tdp_w`) this is too high: the published 760.64 mJ of DeiT-B in 123.48 ms
    on a Jetson TX2 are 6.2 W of its 15 W (Table V). Ratios between policies are what it is good for.
    """
    busy = list(times.backbone_s)
    busy[times.central] += times.aggregate_s
    return sum(power * seconds for power, seconds in zip(powers_w, busy, strict=True)) + send_w * sum(times.send_s)


# Accuracy and the objective ---------------------------------------------------------------------------------------


def validation_loss(
    sub_models: Sequence["PreTrainedModel"], batches: Iterable[Mapping[str, "torch.Tensor"]]
) -> tuple[float, ...]:
    """The validation loss L_n of each sub-model, the mean over samples; Eq. 7 is the mean over them.

    Eq. 7 sums over samples, which scales the loss with the size of the data set and so delta with it; the text calls it
    the average. Models are put in eval mode for it. A causal model's loss is a mean over tokens, by which batches are
    weighted alike.

    Raises:
        ValueError: for no batches, or a model that gives no loss.
    """
    import torch

    batches = list(batches)
    if not batches:
        raise ValueError("no validation batch: give at least one, with labels.")
    losses = []
    for model in sub_models:
        was_training = model.training
        model.eval()
        total = count = 0
        with torch.inference_mode():
            for batch in batches:
                on_device = {name: value.to(model.device) for name, value in batch.items()}
                loss = getattr(model(**on_device), "loss", None)
                if loss is None:
                    raise ValueError(
                        f"{type(model).__name__} gave no loss: take sub-models with a head, and batches with labels."
                    )
                size = len(next(iter(batch.values())))
                total, count = total + size * float(loss), count + size
        model.train(was_training)
        losses.append(total / count)
    return tuple(losses)


@dataclass(frozen=True)
class Evaluation:
    """Psi(C) = L_val + delta T of one policy, and what it is made of."""

    loss: float
    latency_s: float
    objective: float

    @classmethod
    def of(cls, loss: float, latency_s: float, delta: float) -> "Evaluation":
        return cls(float(loss), float(latency_s), float(loss + delta * latency_s))


@dataclass(frozen=True)
class Evaluator:
    """Eq. 8 as a function of the policy: decomposes, measures the validation loss, predicts the latency.

    Args:
        model: the large model, with a task head.
        batches: a small part of the validation set, on which all policies are compared.
        cluster, predictors, central, sent_tokens: as in `latency`.
        delta: what a second counts in units of loss.
        importance: of `model`'s parts, found once; None: their magnitude.
        priced_as: sizes of a larger model of the same kind, by which latency is predicted (`scale_policy`); None: as
            large as `model` is. Of a small model a device's share of the time is that of its messages alone.
    """

    model: "PreTrainedModel"
    batches: Sequence[Mapping[str, "torch.Tensor"]]
    original: Original
    cluster: ClusterProfile
    predictors: Sequence[Callable[[SubModelConfig], float]] | None = None
    delta: float = 1.0
    central: int | None = None
    sent_tokens: int | None = None
    importance: object | None = None
    priced_as: Original | None = None

    def with_importance(self) -> "Evaluator":
        """The same with the importance found, so that not every policy finds it anew."""
        from detransformer.coformer.decomposer import magnitude_importance

        return self if self.importance else replace(self, importance=magnitude_importance(self.model))

    def latency(self, policy: Policy) -> Latency:
        priced = self.original
        if self.priced_as is not None:
            policy, priced = scale_policy(policy, self.original, self.priced_as), self.priced_as
        return latency(policy, priced, self.cluster, self.predictors, self.central, self.sent_tokens)

    def __call__(self, policy: Policy) -> Evaluation:
        from detransformer.coformer.decomposer import decompose

        sub_models = decompose(self.model, policy, self.importance)
        losses = validation_loss(sub_models, self.batches)
        return Evaluation.of(sum(losses) / len(losses), self.latency(policy).total_s, self.delta)
