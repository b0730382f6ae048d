"""The jobs that `detransformer run` and a service give to workers: plan a request, answer it, report on it.

The front needs no torch for them: the first device's worker plans and reports, and all workers answer.
"""

import contextlib
import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from detransformer.answers import (
    Pooling,
    check_inputs,
    encode,
    random_tokens,
    read_outputs,
    single_device_outputs,
    task_of,
)
from detransformer.cluster.jobs import generate, output_errors, run_plan
from detransformer.cluster.request import Request
from detransformer.cluster.selfcheck import wrong_output
from detransformer.cluster.spec import ClusterSpec
from detransformer.cluster.state import WorkerState
from detransformer.models.configuration import generates, layer_kinds, max_tokens
from detransformer.opening import Checkpoint, load_tokenizer, open_checkpoint
from detransformer.parallel.generation import check_generation
from detransformer.parallel.plan import Plan, check_plan
from detransformer.planning.cost import compute_seconds, predict
from detransformer.planning.generation import place_generation, price_generation
from detransformer.planning.placement import place, place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile
from detransformer.typed_json import from_json

KEPT = ("latency_s", "overrun_s", "modelled_s", "link_bytes")  # fields of a sample; only a timeline needs the rest


@dataclass(frozen=True)
class Prepared:
    """A planned request; `notes` are sentences about the plan, such as which devices it leaves out."""

    job: dict  # arguments of `jobs.run_plan` (`plan`), or for a GPT-2 of `jobs.generate` (`prefill`, `decode`), as JSON
    plan: Plan
    predicted_s: float
    notes: tuple[str, ...] = ()


@functools.cache
def _opened(cluster: str, model: str) -> tuple[ClusterSpec, Checkpoint, ClusterProfile]:
    spec, checkpoint = ClusterSpec.load(cluster), open_checkpoint(model)
    return spec, checkpoint, spec.profile(checkpoint.config)


# --- Planning ----------------------------------------------------------------------------------------------------


def plan(
    state: WorkerState,
    request: Mapping[str, Any],
    seq_len: int | None = None,
    slower: Mapping[str, float] | None = None,
) -> dict:
    """Plans how the devices of the group answer a request.

    Args:
        seq_len: the length that a service plans for; None: that of the request's text.
        slower: device (in JSON a string) -> factor by which it is slower than its profile at present.

    Returns:
        `job` as in `Prepared` (with ranks of the group), `last` (the device that has the result), `busy` devices,
        words on each device's part, and the request's inputs as `tensors`. Or a sentence why there is no plan:
        `postponed` if all devices of the file together could answer, else `refused`.
    """
    asked, folder = from_json(Request, request), state.home["model"]
    _, checkpoint, whole = _opened(state.home["cluster"], folder)
    config, devices = checkpoint.config, state.home["group"]
    slowed = [_slowed(whole.devices[d], (slower or {}).get(str(d), 1.0)) for d in devices]
    profile = replace(whole.of(devices), devices=tuple(slowed))
    if seq_len is None:
        try:
            inputs = inputs_of(asked, folder, config)
        except ValueError as error:
            return {"refused": str(error)}
        shape = inputs["input_ids"].shape
    else:
        limit = max_tokens(config) - (asked.max_new_tokens if generates(config) else 0)
        inputs, shape = {}, (1, max(1, min(seq_len, limit)))
    try:
        prepared = prepare(asked, config, profile, *shape)
    except ValueError as error:
        if len(devices) < len(whole.devices):
            with contextlib.suppress(ValueError):
                prepare(asked, config, whole, *shape)
                return {"postponed": str(error)}
        return {"refused": str(error)}
    state.kept["prepared"] = prepared, asked, inputs, config
    return {
        "job": prepared.job,
        "last": devices[prepared.plan.device_ids[-1]],
        "busy": [devices[i] for i in prepared.plan.device_ids],
        "parts": [own_part(prepared.plan, rank) for rank in range(len(devices))],
        "tensors": inputs,
    }


def _slowed(device: DeviceProfile, factor: float) -> DeviceProfile:
    memory = device.memory_bytes_per_s and device.memory_bytes_per_s / factor
    return replace(device, flops_per_s=device.flops_per_s / factor, memory_bytes_per_s=memory)


def prepare(
    request: Request, config: PretrainedConfig, profile: ClusterProfile, batch_size: int, seq_len: int
) -> Prepared:
    """Plans `request` for a model on the devices of `profile`.

    Raises:
        ValueError: for a plan that does not fit the model or devices.
    """
    if not generates(config):
        chosen, notes = plan_of(request, config, profile, batch_size, seq_len)
        predicted_s = predict(config, chosen, profile, seq_len, batch_size).latency_s
        job = {"plan": chosen.to_dict(), "repeats": request.repeats}
        return Prepared(job, chosen, predicted_s, notes)
    if request.wires != ("float32",):
        raise ValueError("a GPT-2 is run with --wire float32: leave that option out.")
    new, budget = request.max_new_tokens, request.memory_budget_bytes
    if request.method == "auto" and request.plan is None:
        best = place_generation(config, profile, seq_len, new, batch_size, budget)
    else:
        chosen, _ = plan_of(request, config, profile, batch_size, seq_len)
        check_generation(config, chosen, chosen)
        best = price_generation(config, chosen, chosen, profile, seq_len, new, batch_size)
    job = {"prefill": best.prefill.to_dict(), "decode": best.decode.to_dict(), "max_new_tokens": new}
    return Prepared(job, best.prefill, best.total_s, (f"further tokens: {best.decode.describe()}",))


def inputs_of(request: Request, folder: str, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The request's text, or random tokens: input_ids and, for a text, its mask and types, [1, T] each.

    Raises:
        ValueError: for a text without tokenizer or without tokens, and for inputs that the model does not take.
    """
    if request.text is None:
        inputs = random_tokens(config, request.num_tokens)
    elif task_of(config) == "question-answering" and request.context is None:
        raise ValueError("the model answers questions about a passage: give --text QUESTION --context PASSAGE.")
    else:
        limit = Pooling.of(folder).limit if task_of(config) == "base" else None
        inputs = encode(config, load_tokenizer(folder, config), request.text, request.context, limit)
    check_inputs(config, inputs, request.max_new_tokens if generates(config) else 0)
    return inputs


def plan_of(
    request: Request, config: PretrainedConfig, profile: ClusterProfile, batch_size: int, seq_len: int
) -> tuple[Plan, tuple[str, ...]]:
    """The plan that `request` asks for, and notes on it.

    Raises:
        ValueError: for a plan that does not fit the model or the devices.
    """
    budget = request.memory_budget_bytes
    if request.plan is not None:
        try:
            given = Plan.from_dict(request.plan)
        except ValueError as error:
            raise ValueError(f"--plan is not a plan ({error}): make one with `detransformer plan`.") from None
        check_plan(given, config)
        if max(given.device_ids) >= len(profile.devices):
            raise ValueError(
                f"the plan uses device {max(given.device_ids)}, and the cluster has {len(profile.devices)} devices, "
                "numbered from 0: plan for this cluster."
            )
        return given, ()
    if request.method == "auto":
        placement = place_freely(config, profile, seq_len, batch_size, memory_budget_bytes=budget, wires=request.wires)
        method = "bp+auto" if "decoupled" in layer_kinds(config) else "auto"
        best = placement.plan if placement.plan.num_devices == 1 else replace(placement.plan, method=method)
        return best, placement.left_out
    methods = None if request.method == "bp+paper" else [request.method]
    (wire, *more) = request.wires
    if more:
        raise ValueError(f"--wire names several formats to choose from, and {request.method} takes one: give one.")
    chosen = place(config, profile, seq_len, batch_size, memory_budget_bytes=budget, methods=methods, wire=wire)
    return chosen.plan, ()


def own_part(plan: Plan, rank: int) -> str:
    """The share of device `rank` in `plan`, in words."""
    if rank not in plan.device_ids:
        return "the plan leaves this device out; it waits"
    place = plan.device_ids.index(rank)
    if plan.stages:
        return f"{plan.stages[place]} of {sum(plan.stages)} layers"
    if plan.num_devices == 1:
        return "the whole model"
    blocks, heads = plan.sub_blocks, plan.heads
    share = plan.tokens_share[place] / sum(plan.tokens_share)
    words = f"{blocks[place]} of {sum(blocks)} sub-blocks, " if sum(blocks) > 1 else ""
    return f"{words}{heads[place]} of {sum(heads)} heads, {share:.0%} of the tokens"


# --- Answering ---------------------------------------------------------------------------------------------------


def answer(
    state: WorkerState,
    job: Mapping[str, Any],
    inputs: Mapping[str, torch.Tensor],
    paced: bool = False,
    modelled_link: bool = False,
    time_scale: float = 1.0,
) -> dict:
    """Computes this device's part of a request, planned as `job`; on the last device `tensors` are the outputs.

    `paced`: compute takes as long as on the cluster file's device; `modelled_link`: messages do, too. `compute_s` are
    the seconds of compute as measured and by the device's profile; None if the device computes nothing, and for
    generated text.
    """
    _, _, profile = _opened(state.home["cluster"], state.home["model"])
    own, outputs = profile.devices[state.device], {}
    run = run_plan if "plan" in job else generate
    record = run(
        state,
        checkpoint=state.home["model"],
        inputs=inputs,
        output=outputs,
        device=asdict(own) if paced else None,
        link=asdict(profile.link) if modelled_link else None,
        time_scale=time_scale,
        **job,
    )
    compute_s = None
    if record and run is run_plan:
        made, sample = Plan.from_dict(job["plan"]), record["samples"][-1]
        batch_size, seq_len = inputs["input_ids"].shape
        loaded = next(reversed(state.loaded.values()))
        parts = loaded.compute(made, made.device_ids.index(state.rank), seq_len, batch_size)
        expected_s = sum(compute_seconds(step, own) for part in parts for step in part)
        computed_s = sum(stop - start for what, start, stop in sample["events"] if what == "compute")
        if expected_s:
            compute_s = computed_s / time_scale + sample["overrun_s"], expected_s
        record["samples"] = [{name: sample[name] for name in KEPT} for sample in record["samples"]]
    return {"record": record, "compute_s": compute_s, "tensors": outputs}


# --- Reporting ---------------------------------------------------------------------------------------------------


def report_on(state: WorkerState, results: Sequence[dict | None], inputs: Mapping[str, torch.Tensor]) -> dict:
    """The lines to print and the `--output` record for the request that was planned last.

    Args:
        results: the records of `answer`, one per device of the cluster file.
        inputs: the devices' outputs.
    """
    prepared, request, asked, config = state.kept["prepared"]
    plan, folder, outputs, task = prepared.plan, state.home["model"], dict(inputs), task_of(config)
    spec, checkpoint, _ = _opened(state.home["cluster"], folder)
    names = spec.names
    taking_part = {name: result for name, result in zip(names, results, strict=True) if result is not None}
    found, fields = read_outputs(folder, config, asked, outputs, request.text, request.context)
    batch_size, seq_len = asked["input_ids"].shape
    timed, times = (_generation_times if task == "generation" else _times)(request, prepared, taking_part)
    weights = {name: result["weights_bytes"] for name, result in taking_part.items()}
    lines = [
        f"plan: {plan.method}, {plan.describe()}, on {', '.join(names[i] for i in plan.device_ids)}; {plan.wire}",
        *(f"{note}." for note in prepared.notes),
        *([checkpoint.note] if checkpoint.note else []),
        f"weights: {', '.join(f'{name} {size / 2**20:.0f} MiB' for name, size in weights.items())}",
        f"{(request.text or f'{seq_len} random tokens')!r} -> {found}",
        timed,
    ]
    record = {
        "devices": list(names),
        "model": str(Path(folder).resolve()),
        "task": task,
        "request": {"text": request.text, "context": request.context, "seq_len": seq_len, "batch_size": batch_size},
        "answer": fields,
        **({"max_new_tokens": request.max_new_tokens} if task == "generation" else {}),
        "predicted_s": prepared.predicted_s,
        "weights_bytes": weights,
        "plan": prepared.job if task == "generation" else plan.to_dict(),
        "notes": list(prepared.notes),
        **times,
    }
    if request.check:
        expected = single_device_outputs(folder, config, asked, request.max_new_tokens)
        record["check"], words = compare(outputs, expected, plan.wire)
        lines.append(words)
    return {"lines": lines, "record": record}


def compare(outputs: dict, expected: dict, wire: str) -> tuple[dict, str]:
    """The errors of `outputs` against the single device's, and whether they agree, as fields and in words."""
    if "tokens" in expected:
        equal, total = int((outputs["tokens"] == expected["tokens"]).sum()), expected["tokens"].numel()
        words = "all tokens are" if equal == total else f"only {equal} of {total} tokens ARE"
        return {"equal_tokens": equal, "agrees": equal == total}, f"check: {words} the single device's"
    errors = output_errors(outputs, expected)
    agrees = not wrong_output(wire, errors["max_abs_error"], errors["relative_error"])
    size = f"{errors['max_abs_error']:.1e} at most, {errors['relative_error']:.1e} RMS"
    words = "agrees with" if agrees else "DIFFERS from"
    return errors | {"agrees": agrees}, f"check: the output {words} the single device's ({size})"


def _times(request: Request, prepared: Prepared, results: Mapping[str, dict]) -> tuple[str, dict]:
    """The slowest device's latency in each repeat, and the most bytes that a device sends, in words and as fields."""
    samples = [max(r["samples"][i]["latency_s"] for r in results.values()) for i in range(request.repeats)]
    latency_s, sent = statistics.median(samples), max(sum(r["bytes"].values()) for r in results.values())
    words = (
        f"latency: {latency_s:.4g} s, median of {len(samples)} ({min(samples):.4g} to {max(samples):.4g}); "
        f"predicted {prepared.predicted_s:.4g} s; a device sends {sent / 1024:.0f} KiB at most"
    )
    return words, {"latency_s": latency_s, "samples_s": samples, "sent_bytes": sent}


def _generation_times(request: Request, prepared: Prepared, results: Mapping[str, dict]) -> tuple[str, dict]:
    """The slowest device's seconds per token, and the bytes of keys and values, in words and as fields."""
    token_s = [max(r["token_s"][i] for r in results.values()) for i in range(request.max_new_tokens)]
    further_s = statistics.median(token_s[1:]) if len(token_s) > 1 else float("nan")
    cached = {name: result["cache_bytes"] for name, result in results.items()}
    words = (
        f"first token {token_s[0]:.4g} s, each further one {further_s:.4g} s (median), {len(token_s)} tokens in "
        f"{sum(token_s):.4g} s; predicted {prepared.predicted_s:.4g} s; keys and values "
        f"{max(cached.values()) / 2**20:.1f} MiB at most"
    )
    return words, {"token_s": token_s, "cache_bytes": cached}
