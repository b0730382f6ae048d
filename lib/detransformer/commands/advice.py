"""The answer of `detransformer plan --advise`: one screen of sentences, each from a price or a saved table."""

from typing import TYPE_CHECKING

from detransformer.planning.advice import WORTH, advised, next_best, priced_choices
from detransformer.tables.costs import compression_costs, decoupling_costs, saved_tables

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

    from detransformer.planning.profile import ClusterProfile

WORDS = {
    "neither": "Leave the model and its messages as they are",
    "compress": "Compress messages, and leave the model as it is",
    "decouple": "Decouple the model, and leave messages as they are",
    "both": "Decouple the model and compress its messages",
}


def advice(
    original: "PretrainedConfig", decoupled: "PretrainedConfig", profile: "ClusterProfile", wire: str, request: dict
) -> "tuple[pd.DataFrame, list[str]]":
    """Advice for a model on these devices: the prices, and lines of text with the choice and its costs."""
    import pandas as pd

    from detransformer.planning.cost import alone_seconds

    priced, left_out = priced_choices(original, decoupled, profile, wire, **request)
    latency_s = {name: choice.latency_s for name, choice in priced.items()}
    sizes = request["seq_len"], request["batch_size"]
    one_s = min(alone_seconds(original, profile, range(len(profile.devices)), *sizes))
    rows = [
        {"choice": name, "devices": c.plan.num_devices, "plan": c.plan.describe(), "predicted_s": c.latency_s}
        | {"over one device": one_s / c.latency_s, "sent_kib": sum(c.prediction.bytes.values()) / 2**10}
        for name, c in priced.items()
    ]
    chosen = advised(latency_s)
    lines = [f"Advice: {chosen}. {WORDS[chosen]}: {_seconds(latency_s, chosen)}."]
    lines += [f"Left out: {name}: {why}." for name, why in left_out.items()]
    other = next_best(latency_s, chosen)
    if other:
        ratio = latency_s[chosen] / latency_s[other]
        worth = f"; a change is worth it from {WORTH:.0%} on" if ratio > 1 else ""
        lines.append(f"Next best: {other}, {latency_s[other]:.3g} s, {ratio:.2f} times as fast{worth}.")
    if priced[chosen].plan.num_devices == 1:
        lines.append("On these links one device is the best plan: the others would only wait for messages.")
    run = saved_tables()
    named = f"Nb={decoupled.num_original_layers} of {decoupled.num_hidden_layers} layers"
    lines.append("Accuracy is not predicted; saved rows are of other models and settings:")
    lines += [f"- decouple ({named}): {text}" for text in decoupling_costs(run, _original_share(decoupled))]
    if "compress" in priced:
        lines += [f"- compress: {text}" for text in compression_costs(run, wire, is_decoupled=chosen == "both")]
    return pd.DataFrame(rows), lines


def _seconds(latency_s: dict[str, float], chosen: str) -> str:
    words = f"{latency_s[chosen]:.3g} s"
    if chosen != "neither" and "neither" in latency_s:
        words += f", {latency_s['neither'] / latency_s[chosen]:.2f} times as fast as the best plan with neither"
    return words


def _original_share(decoupled: "PretrainedConfig") -> float:
    return decoupled.num_original_layers / decoupled.num_hidden_layers
