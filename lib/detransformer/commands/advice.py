"""The answer of `detransformer plan --advise`: decouple a model, compress its messages, both, or neither?

Decided by predicted latency alone; one screen of sentences, each from a price or a saved table.
"""

from collections.abc import Mapping

import pandas as pd
from transformers import PretrainedConfig

from detransformer.models.configuration import decoupled_config, is_decoder, original_config
from detransformer.planning.cost import alone_seconds
from detransformer.planning.placement import place_freely
from detransformer.planning.problem import Alternative
from detransformer.planning.profile import ClusterProfile
from detransformer.tables.costs import compression_costs, decoupling_costs, saved_tables

CHOICES = {  # the least change first: decoupling needs training
    "neither": "Leave the model and its messages as they are",
    "compress": "Compress messages, and leave the model as it is",
    "decouple": "Decouple the model, and leave messages as they are",
    "both": "Decouple the model and compress its messages",
}
WORTH = 0.05  # a change must save more than this fraction of the latency


def advice(
    config: PretrainedConfig, structure: tuple, profile: ClusterProfile, wire: str, request: dict
) -> tuple[pd.DataFrame, list[str]]:
    """Advice for a model on these devices: the prices, and lines of text with the choice and its costs.

    Args:
        structure: Nb, Ndiv and attention width of an original model if it is decoupled.
        wire: the format of compressed messages.
        request: seq_len, batch_size and memory_budget_bytes of `place_freely`.

    Raises:
        ValueError: if nothing fits the memory, as in `place_freely`.
    """
    original = original_config(config)
    decoupled = config if hasattr(config, "num_original_layers") else decoupled_config(original, *structure)
    priced, left_out = _priced(original, decoupled, profile, wire, request)
    latency_s = {name: choice.latency_s for name, choice in priced.items()}
    sizes = request["seq_len"], request["batch_size"]
    one_s = min(alone_seconds(original, profile, range(len(profile.devices)), *sizes))
    rows = [
        {"choice": name, "devices": c.plan.num_devices, "plan": c.plan.describe(), "predicted_s": c.latency_s}
        | {"over one device": one_s / c.latency_s, "sent_kib": sum(c.prediction.bytes.values()) / 2**10}
        for name, c in priced.items()
    ]
    chosen = advised(latency_s)
    words = f"{latency_s[chosen]:.3g} s"
    if chosen != "neither" and "neither" in latency_s:
        words += f", {latency_s['neither'] / latency_s[chosen]:.2f} times as fast as the best plan with neither"
    lines = [f"Advice: {chosen}. {CHOICES[chosen]}: {words}."]
    lines += [f"Left out: {name}: {why}." for name, why in left_out.items()]
    if other := next_best(latency_s, chosen):
        ratio = latency_s[chosen] / latency_s[other]
        worth = f"; a change is worth it from {WORTH:.0%} on" if ratio > 1 else ""
        lines.append(f"Next best: {other}, {latency_s[other]:.3g} s, {ratio:.2f} times as fast{worth}.")
    if priced[chosen].plan.num_devices == 1:
        lines.append("On these links one device is the best plan: the others would only wait for messages.")
    run, (stay, layers) = saved_tables(), (decoupled.num_original_layers, decoupled.num_hidden_layers)
    lines.append("Accuracy is not predicted; saved rows are of other models and settings:")
    lines += [f"- decouple (Nb={stay} of {layers} layers): {text}" for text in decoupling_costs(run, stay / layers)]
    if "compress" in priced:
        lines += [f"- compress: {text}" for text in compression_costs(run, wire, is_decoupled=chosen == "both")]
    return pd.DataFrame(rows), lines


def _priced(original, decoupled, profile, wire, request) -> tuple[dict[str, Alternative], dict[str, str]]:
    """The best plan under each of `CHOICES`, and why others are left out."""
    priced: dict[str, Alternative] = {}
    left_out: dict[str, str] = {}
    for name in CHOICES:
        config = decoupled if name in ("decouple", "both") else original
        wires = (wire if name in ("compress", "both") else "float32",)
        if wires != ("float32",) and is_decoder(config):
            left_out[name] = "a decoder's messages are float32"
            continue
        try:
            priced[name] = place_freely(config, profile, wires=wires, **request).chosen
        except ValueError as error:
            left_out[name] = str(error).rstrip(".")
    if not priced:
        raise ValueError(f"{left_out['neither']}.")
    return priced, left_out


def advised(latency_s: Mapping[str, float]) -> str:
    """The choice to make: the least change that no larger change beats by `WORTH`."""
    chosen, *larger = (name for name in CHOICES if name in latency_s)
    for name in larger:
        if latency_s[name] < (1 - WORTH) * latency_s[chosen]:
            chosen = name
    return chosen


def next_best(latency_s: Mapping[str, float], chosen: str) -> str | None:
    """The fastest of the other choices; of equals the least change."""
    others = [name for name in CHOICES if name in latency_s and name != chosen]
    return min(others, key=latency_s.__getitem__, default=None)
