"""Why this plan: what else there was, and what limits it, in a table and a line of text for a terminal."""

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from detransformer.parallel.methods import PLANNED_METHODS
from detransformer.parallel.plan import Plan
from detransformer.planning.pieces import Pieces
from detransformer.planning.placement import Placement
from detransformer.planning.problem import MIB, Alternative
from detransformer.planning.profile import ClusterProfile

MAX_OTHERS = 6  # rows at most beside the published methods
COLUMNS = f"{'plan':36}{'dev':>4}{'s':>8}{'compute':>8}{'comm':>8}{'KiB':>7}{'MiB':>6}  verdict"


def explain(placement: Placement, config: PretrainedConfig, profile: ClusterProfile, *request: int) -> str:
    """The alternatives of `placement` and the bottleneck of the chosen plan; `request` as for `limits`."""
    lines = [COLUMNS, *(_line(a, placement) for a in _shown(placement))]
    shares = limits(placement.plan, config, profile, *request)
    parts = sorted(((share, what) for what, share in shares.items() if share >= 0.005), reverse=True)
    return "\n".join([*lines, "Bottleneck: " + ", ".join(f"{what} {share:.0%}" for share, what in parts) + "."])


def _shown(placement: Placement) -> Iterator[Alternative]:
    """The fastest of each kind: by method, number of devices and wire, and on the same devices by strategies."""
    chosen, seen = placement.plan, set()
    for a in placement.alternatives:
        where = a.plan.wire, a.plan.num_devices
        alike = where == (chosen.wire, chosen.num_devices)
        kind = *where, a.plan.strategies if alike else ""
        published = a.plan.method not in PLANNED_METHODS
        if published or (kind not in seen and len(seen) <= MAX_OTHERS):
            seen.add(kind)
            yield a


def _line(a: Alternative, placement: Placement) -> str:
    prediction, over = a.prediction, a.latency_s / placement.chosen.latency_s
    verdict = a.reason or ("chosen" if a is placement.chosen else f"{over - 1:+.1%}" if over < 2 else f"{over:.1f}x")
    name = f"{a.plan.method}: {a.plan.describe()}"
    name = name if len(name) < 36 else name[:32] + "..."
    seconds = "".join(f"{s:8.3f}" for s in (prediction.latency_s, prediction.compute_s, prediction.comm_s))
    sizes = f"{sum(prediction.bytes.values()) / 1024:7.0f}{max(prediction.memory_bytes) / MIB:6.0f}"
    return f"{name:36}{a.plan.num_devices:4}{seconds}{sizes}  {verdict}"


def limits(plan: Plan, config: PretrainedConfig, profile: ClusterProfile, *request: int) -> dict[str, float]:
    """What `plan` spends its latency on, in shares that add up to 1; `request`: seq_len, batch_size, past.

    Rate and steps of the links may hide each other: each is taken at its mean with and without the other.
    """

    def latency_s(profile: ClusterProfile) -> float:
        return Pieces(config, plan, profile, *request).price(plan.strategies)[0]

    def without(profile: ClusterProfile, rate: bool, steps: bool) -> ClusterProfile:
        link = replace(profile.link, step_latency_s={"*": 0.0}) if steps else profile.link
        return replace(profile, link=link.at(float("inf")) if rate else link)

    whole_s, no_rate_s, no_steps_s, local_s = (
        latency_s(without(profile, *cut)) for cut in ((False, False), (True, False), (False, True), (True, True))
    )
    tireless = replace(profile, devices=tuple(replace(d, memory_bytes_per_s=None) for d in profile.devices))
    compute_s = latency_s(without(tireless, rate=True, steps=True))
    rate_s = (whole_s - no_rate_s + no_steps_s - local_s) / 2
    return {
        "compute": compute_s / whole_s,
        "reading weights": (local_s - compute_s) / whole_s,
        "bytes on the links": rate_s / whole_s,
        "latency of messages": (whole_s - local_s - rate_s) / whole_s,
    }
