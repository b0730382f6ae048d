"""Requests over the processes of the `cluster` fixture: what a plan's devices must have computed, sent and kept."""

from collections import Counter
from itertools import cycle
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import Plan
from detransformer.planning.memory import held_bytes
from detransformer.planning.recorder import device_steps
from detransformer.planning.tape import Start

TOLERANCE = 1e-12  # float64: what is left is the order of summation
UNEVEN = {1: [1.0], 2: [1.0, 2.0], 3: [1.0, 1.0, 2.0], 4: [1.0, 2.0, 1.0, 1.0]}  # speeds
STRATEGIES_OF_ORIGINAL = ("tensor", "sequence", "ulysses", "heads", "galaxy", "replicate")


def in_turn(config, *strategies: str) -> list[str]:
    """A strategy a layer: `block` for decoupled layers, these in turn for original ones."""
    originals = cycle(strategies)
    return ["block" if kind == "decoupled" else next(originals) for kind in layer_kinds(config)]


def saved_case(folder, model, inputs: dict, expected: dict) -> SimpleNamespace:
    """A model on disk with a request and its single-device output."""
    model.save_pretrained(folder)
    paths = {name: str(folder / f"{name}.safetensors") for name in ("inputs", "reference")}
    save_file(inputs, paths["inputs"])
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, paths["reference"])
    return SimpleNamespace(config=model.config, checkpoint=str(folder), **paths)


def run_plan(cluster, case, plan: Plan, **job) -> list[dict]:
    """The results of the devices that took part in one request of `case` in float64."""
    files = {"inputs": case.inputs, "reference": getattr(case, "reference", None)}
    job = {"dtype": "float64", "repeats": 1, "warmup": 0} | files | job
    results = cluster.run("run_plan", checkpoint=case.checkpoint, plan=plan.to_dict(), **job)
    return [result for result in results if result is not None]


def started(case, plan: Plan, rank: int, *request, **options) -> list[Start]:
    """The collectives that device `rank` starts, by its own tape; `request` are tokens and sequences."""
    steps = device_steps(case.config, plan, rank, *request, dtype=torch.float64, **options)
    return [step for step in steps if isinstance(step, Start)]


def check_counts(result: dict, starts: list[Start]) -> None:
    """A device counted what its tape says."""
    assert result["counts"] == dict(Counter(step.kind for step in starts))
    for kind in result["counts"]:
        assert result["bytes"][kind] == sum(step.num_bytes for step in starts if step.kind == kind)


def check_run(cluster, case, plan: Plan, seq_len: int = 11, batch_size: int = 2, **job) -> None:
    """Every device's output equals the single device's, and it counted and keeps what the cost model says."""
    results = run_plan(cluster, case, plan, **job)
    errors = [r["max_abs_error"] for r in results if "max_abs_error" in r]
    # A pipeline's result is on its last device; every other plan leaves it on all.
    assert len(errors) == (1 if plan.stages else plan.num_devices)
    assert max(errors) < TOLERANCE
    for rank, result in enumerate(results):
        check_counts(result, started(case, plan, rank, seq_len, batch_size))
        assert result["weights_bytes"] == 2 * held_bytes(case.config, [plan], plan.device_ids[rank])
