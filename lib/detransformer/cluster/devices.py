"""Devices: presets from the papers, calibrated per model, as profiles for the cost model and the pacer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import BertConfig

from detransformer.models.configuration import preset_config
from detransformer.models.sizes import model_flops
from detransformer.planning.profile import DeviceProfile
from detransformer.report.expected import published_claim

CALIBRATION_SEQ_LEN = 128  # the published single-device latencies are at seq 128, batch 1 (Section IV-A)


@dataclass(frozen=True)
class Device:
    """A device of the papers. `latency_claims` maps a model to the published claim of its single-device latency."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    latency_claims: Mapping[str, str]


DEVICES = {
    "rpi4b": Device(
        "Raspberry Pi 4B",
        4 * 2**30,
        4.8e9,  # STREAM triad on a Raspberry Pi 4 (www.sci-pi.org.uk/bench/stream.html)
        {"bert-base": "single_device_latency_bert_base", "bert-large": "single_device_latency_bert_large"},
    ),
}


def preset_profile(name: str, config: BertConfig) -> DeviceProfile:
    """The profile of a preset device on a model of `config`.

    The rate is FLOPs over published latency of the model of the same hidden size: 14.2 GFLOP/s on BERT-Base, 17.6 on
    BERT-Large. One rate cannot fit both, so other sizes are interpolated between them by the logarithm of the hidden
    size, and held constant outside. Shares of a layer compute at the rate of the whole, as published TP curves imply,
    but no product is faster than its weights are read from memory.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown: choose one of {', '.join(DEVICES)}.")
    device = DEVICES[name]
    points = []
    for model, claim in device.latency_claims.items():
        known = preset_config(model)
        points.append((known.hidden_size, model_flops(known, CALIBRATION_SEQ_LEN) / published_claim(claim)))
    widths, rates = zip(*sorted(points), strict=True)
    rate = float(np.interp(np.log(config.hidden_size), np.log(widths), rates))
    source = f"preset, calibrated on published single-device latency ({', '.join(device.latency_claims)})"
    return DeviceProfile(device.name, device.memory_bytes, {"*": rate}, source, device.memory_bytes_per_s)
