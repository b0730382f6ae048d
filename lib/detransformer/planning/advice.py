"""Is it worth decoupling a model, compressing its messages, both, or neither? Decided by predicted latency alone."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from detransformer.models.configuration import is_decoder
from detransformer.planning.placement import place_freely
from detransformer.planning.problem import Alternative
from detransformer.planning.profile import ClusterProfile

CHOICES = ("neither", "compress", "decouple", "both")  # the least change first: decoupling needs training
WORTH = 0.05  # a change must save more than this fraction of the latency


def priced_choices(
    original: PretrainedConfig,
    decoupled: PretrainedConfig,
    profile: ClusterProfile,
    wire: str = "int8",
    **request: int | None,
) -> tuple[dict[str, Alternative], dict[str, str]]:
    """The best plan under each of `CHOICES`, and why others are left out.

    Args:
        wire: the format of compressed messages; a decoder's messages are float32.
        request: seq_len, batch_size and memory_budget_bytes of `place_freely`.

    Raises:
        ValueError: if nothing fits the memory, as in `place_freely`.
    """
    configs = dict(zip(CHOICES, (original, original, decoupled, decoupled), strict=True))
    priced: dict[str, Alternative] = {}
    left_out: dict[str, str] = {}
    for name, config in configs.items():
        compresses = name in ("compress", "both")
        if compresses and is_decoder(config):
            left_out[name] = "a decoder's messages are float32"
            continue
        try:
            priced[name] = place_freely(config, profile, wires=(wire if compresses else "float32",), **request).chosen
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
