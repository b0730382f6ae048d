"""What a worker keeps of a model between jobs: weights, executors, and the segments that it is paced by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

import detransformer.models  # noqa: F401  registers decoupled models with AutoConfig
from detransformer import machine
from detransformer.parallel.executor import Executor
from detransformer.parallel.generation import Generator
from detransformer.parallel.plan import Plan
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import launched_seconds
from detransformer.planning.pieces import compute_seconds
from detransformer.planning.profile import DeviceProfile, LinkProfile
from detransformer.planning.recorder import device_steps, segments
from detransformer.planning.tape import Compute
from detransformer.typed_json import from_json


@dataclass
class Loaded:
    """This rank's weights of all plans that are held of a model, the executors made so far, and memory use."""

    config: PretrainedConfig
    weights: WeightSource | None  # None: the plan's executor loads its own (DTensor)
    held_with: list[Plan]
    own_bytes: int | None  # resident before loading: the interpreter and its libraries
    peak_above: int | None = None  # largest resident size since then, above `own_bytes`
    runners: dict[str, Executor | Generator] = field(default_factory=dict)
    segments: dict[tuple, list] = field(default_factory=dict)

    def compute(self, plan: Plan, rank: int, seq_len: int, batch_size: int, past: int = 0) -> list[list[Compute]]:
        """What `rank` computes of a request between its starts and waits, by the executor's own tape."""
        key = (key_of(plan), seq_len, batch_size, past)
        if key not in self.segments:
            self.segments[key] = segments(device_steps(self.config, plan, rank, seq_len, batch_size, past))
        return self.segments[key]

    def links(
        self, plan: Plan, rank: int, link: LinkProfile, seq_len: int, batch_size: int, past: int = 0
    ) -> list[float]:
        """Seconds of each collective that `rank` launches in a request, as the cost model has them."""
        key = (key_of(plan), "links", link.bandwidth_bps, seq_len, batch_size, past)
        if key not in self.segments:
            self.segments[key] = launched_seconds(self.config, plan, rank, link, seq_len, batch_size, past)
        return self.segments[key]

    def pace(
        self, plan: Plan, rank: int, device: dict | None, link: dict | None, time_scale: float, *request: int
    ) -> tuple[list[float] | None, list[float] | None]:
        """Seconds of each segment on `device` and of each collective on `link`; None where these are not modelled.

        Args:
            device, link: a `DeviceProfile` and a `LinkProfile` as dicts.
            request: seq_len, batch_size and past.
        """
        segment_s = link_s = None
        if device is not None:
            profile, parts = from_json(DeviceProfile, device), self.compute(plan, rank, *request)
            segment_s = [time_scale * sum(compute_seconds(step, profile) for step in part) for part in parts]
        if link is not None:
            seconds = self.links(plan, rank, from_json(LinkProfile, link), *request)
            link_s = [time_scale * s for s in seconds]
        return segment_s, link_s


def key_of(plan: Plan) -> str:
    """`plan` as a text, for a key."""
    return json.dumps(plan.to_dict())


def load_model(state: Any, checkpoint: str, plans: Sequence[dict], dtype: str, keep_models: int = 0) -> Loaded:
    """What is kept of the model for `plans`, read now where it is new.

    The first `keep_models` that were read stay; after them the last one read makes room for the next. All workers keep
    the same, since those that read a model anew also run it once to be warm.
    """
    key = json.dumps([checkpoint, list(plans), dtype])
    if key not in state.loaded:
        while len(state.loaded) > keep_models:
            state.loaded.popitem()
        machine.free_unused()
        held = [Plan.from_dict(plan) for plan in plans]
        machine.restart_peak()
        weights = None
        if held[0].runs != "dtensor":
            weights = WeightSource(Path(checkpoint), getattr(torch, dtype))
        config = AutoConfig.from_pretrained(checkpoint)
        state.loaded[key] = Loaded(config, weights, held, machine.resident_bytes())
    return state.loaded[key]


def executor_of(state: Any, loaded: Loaded, checkpoint: str, plan: Plan) -> Executor:
    """The plan's executor, made when first asked for; the peak counts from before the first weight is read."""
    if key_of(plan) not in loaded.runners:
        comm = state.comm(plan.device_ids)
        with machine.large_blocks_apart():
            if plan.runs == "dtensor":
                from detransformer.cluster.dtensor import DTensorExecutor

                executor = DTensorExecutor(checkpoint, plan, comm)
            else:
                executor = Executor(loaded.config, plan, loaded.weights, comm, loaded.held_with)
        loaded.runners[key_of(plan)] = executor
        note_peak(state, loaded)
    return loaded.runners[key_of(plan)]


def note_peak(state: Any, loaded: Loaded) -> int | None:
    """Largest resident size so far above what was there before this model was read; None where that is not told.

    Once another model is read, what is resident is no longer this one's, and what was noted before stands.
    """
    peak, is_last = machine.peak_bytes(), next(reversed(state.loaded.values())) is loaded
    if is_last and None not in (peak, loaded.own_bytes):
        loaded.peak_above = max(loaded.peak_above or 0, peak - loaded.own_bytes)
    return loaded.peak_above
