"""Cost model: what a plan computes, sends and keeps on each device (Section III-C).

`planning.tape` records what each device computes, starts and waits for; a small simulation of all devices and links
then times it by the rates of a profile.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from detransformer.parallel.plan import Plan, published_plan
from detransformer.planning.memory import activation_bytes, memory_bytes, weights_bytes
from detransformer.planning.pieces import Pieces, compute_seconds
from detransformer.planning.profile import ClusterProfile, LinkProfile
from detransformer.planning.recorder import device_steps
from detransformer.planning.tape import Compute, Start


@dataclass(frozen=True)
class Prediction:
    """The cost model's figures for one request, in seconds and bytes; per-device figures in rank order."""

    latency_s: float
    compute_s: float
    comm_s: float
    counts: dict[str, int]
    bytes: dict[str, int]
    weights_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    activation_bytes: int


def predict(
    config: PretrainedConfig,
    plan: Plan,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    past: int = 0,
    pieces: Pieces | None = None,
) -> Prediction:
    """Latency and memory of one request under `plan` on the devices of `profile`; for a decoder, to its next token.

    Model parallel: when the last device is done; `compute_s` is the busiest device's, `comm_s` what is not hidden.
    Pipeline: the sum of all stages and messages (one request cannot overlap itself). Data parallel: one device's time.

    Args:
        pieces: those of this plan's split and request, if made already.
    """
    needed = max(plan.device_ids) + 1
    if needed > len(profile.devices):
        raise ValueError(f"the plan needs {needed} devices and the profile has {len(profile.devices)}.")
    if plan.stages:
        latency_s, compute_s, sent = _pipeline(config, plan, profile, seq_len, batch_size, past)
    else:
        pieces = pieces or Pieces(config, plan, profile, seq_len, batch_size, past)
        latency_s, compute_s, sent = pieces.price(plan.strategies)
    total: Counter[str] = Counter()
    for kind, num_bytes in sent:
        total[kind] += num_bytes
    weights = weights_bytes(config, plan)
    return Prediction(
        latency_s=latency_s,
        compute_s=compute_s,
        comm_s=latency_s - compute_s,
        counts=dict(Counter(kind for kind, _ in sent)),
        bytes=dict(total),
        weights_bytes=tuple(weights),
        memory_bytes=tuple(memory_bytes(config, plan, seq_len, batch_size, past)),
        activation_bytes=activation_bytes(config, seq_len, batch_size),
    )


def _pipeline(config, plan, profile, *request) -> tuple[float, float, list[tuple[str, int]]]:
    """(latency, seconds of compute, messages) of one request through all stages."""
    compute_s = sum(busy_seconds(config, plan, profile, *request))
    started = [start for rank in range(plan.num_devices) for start in _started(config, plan, rank, *request)]
    sent = [start for start in started if start.kind == "send"]
    messages_s = sum(_stage_seconds(sent, plan, profile.link))
    return compute_s + messages_s, compute_s, [(start.kind, start.num_bytes) for start in sent]


def _started(config, plan, rank, *request) -> list[Start]:
    return [step for step in device_steps(config, plan, rank, *request) if isinstance(step, Start)]


def busy_seconds(
    config: PretrainedConfig, plan: Plan, profile: ClusterProfile, seq_len: int, batch_size: int = 1, past: int = 0
) -> list[float]:
    """Seconds in which each device of `plan` computes, in rank order."""
    return [
        sum(
            compute_seconds(step, profile.devices[device])
            for step in device_steps(config, plan, rank, seq_len, batch_size, past)
            if isinstance(step, Compute)
        )
        for rank, device in enumerate(plan.device_ids)
    ]


def alone_seconds(
    config: PretrainedConfig, profile: ClusterProfile, devices: Sequence[int], seq_len: int, batch_size: int = 1
) -> list[float]:
    """Seconds of one request on each of `devices` alone, whether or not the model fits its memory."""
    single = published_plan("single", config)
    alone = [replace(single, devices=(device,)) for device in devices]
    return [predict(config, plan, profile, seq_len, batch_size).latency_s for plan in alone]


def launched_seconds(
    config: PretrainedConfig, plan: Plan, rank: int, link: LinkProfile, seq_len: int, batch_size: int = 1, past: int = 0
) -> list[float]:
    """Seconds that each collective which `rank` launches in one request occupies the links, in launch order.

    As `predict` prices them, for pacing a modelled link: every rank has the same seconds for the same collective.
    """
    request = seq_len, batch_size, past
    if plan.stages:
        return _stage_seconds(_started(config, plan, rank, *request), plan, link)
    started = [_started(config, plan, each, *request) for each in range(plan.num_devices)]
    return [link.exchange_s(same, plan.device_ids) for same in zip(*started, strict=True)]


def _stage_seconds(messages: Sequence[Start], plan: Plan, link: LinkProfile) -> list[float]:
    """Seconds that each message between a pipeline's stages is under way, on its narrowest link."""
    narrowest = min(link.share(device) for device in plan.device_ids)
    return [link.collective_s(m.kind, m.num_bytes / narrowest, plan.num_devices) for m in messages]
