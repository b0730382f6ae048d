"""Jobs of a request, as `detransformer run` and a service give them to workers: plan it, answer it, report on it.

The front needs no torch for them: the first device's worker plans and reports, all of them answer.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from detransformer.cluster.answers import own_part, prepare, report
from detransformer.cluster.checkpoints import open_folder
from detransformer.cluster.jobs import WorkerState, generate, run_plan
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.parallel.plan import Plan, is_decoder
from detransformer.planning.cost import compute_seconds
from detransformer.planning.profile import ClusterProfile, DeviceProfile
from detransformer.typed_json import from_json

JOBS = {"run_plan": run_plan, "generate": generate}
PLANS = ("plan", "prefill", "decode")  # arguments of them that are plans


@functools.cache
def _opened(cluster: str, model: str) -> tuple[ClusterSpec, PretrainedConfig, ClusterProfile]:
    spec, config = ClusterSpec.load(cluster), open_folder(model).config
    return spec, config, spec.profile(model, config)


def plan(
    state: WorkerState,
    request: Mapping[str, Any],
    devices: Sequence[int],
    seq_len: int | None = None,
    slower: Mapping[str, float] | None = None,
) -> dict:
    """How `devices` of the cluster file answer a request.

    Args:
        seq_len: for a service, the length that is planned for; None: that of the request's own text.
        slower: device -> by how much it is slower than its profile at the moment.

    Returns:
        `op` and `job` of a run on ranks of the group, `last`, the device that has the result, and words on the plan;
        its tensors are the request's inputs. Or a sentence why not: `postponed` if all devices of the file together
        could answer, else `refused`.
    """
    asked = from_json(Request, request)
    spec, config, whole = _opened(state.home["cluster"], state.home["model"])
    ranks = {device: rank for rank, device in enumerate(sorted(state.home["group"]))}
    inputs = None if seq_len is None else _usual(asked, config, seq_len)
    slowed = [_slowed(whole.devices[d], (slower or {}).get(str(d), 1.0)) for d in devices]
    profile = replace(whole.of(devices), devices=tuple(slowed))
    try:
        prepared = prepare(asked, state.home["model"], config, profile, inputs)
    except ValueError as error:
        return {_why(asked, state.home["model"], config, whole, devices, inputs): str(error)}
    state.kept["prepared"] = prepared, asked, config
    job = dict(prepared.job)
    for name in job.keys() & set(PLANS):
        made = Plan.from_dict(job[name])
        job[name] = replace(made, devices=tuple(ranks[devices[i]] for i in made.device_ids)).to_dict()
    return {
        "op": prepared.op,
        "job": job,
        "last": devices[prepared.plan.device_ids[-1]],
        "method": prepared.plan.method,
        "busy": [devices[i] for i in prepared.plan.device_ids],
        "parts": [own_part(prepared.plan, rank) for rank in range(len(devices))],
        "tensors": prepared.inputs,
    }


def _why(request: Request, model: str, config: PretrainedConfig, whole: ClusterProfile, devices, inputs) -> str:
    """Whether a request that `devices` cannot answer has to wait for the others, or is refused."""
    if len(devices) < len(whole.devices):
        try:
            prepare(request, model, config, whole, inputs)
            return "postponed"
        except ValueError:
            pass
    return "refused"


def _usual(request: Request, config: PretrainedConfig, seq_len: int) -> dict[str, torch.Tensor]:
    new = request.max_new_tokens if is_decoder(config) else 0
    length = min(seq_len, config.max_position_embeddings - new)
    return {"input_ids": torch.zeros(1, max(1, length), dtype=torch.int64)}


def _slowed(device: DeviceProfile, factor: float) -> DeviceProfile:
    memory = device.memory_bytes_per_s and device.memory_bytes_per_s / factor
    return replace(device, flops_per_s=device.flops_per_s / factor, memory_bytes_per_s=memory)


def answer(
    state: WorkerState,
    op: str,
    job: Mapping[str, Any],
    last: int,
    inputs: Mapping[str, torch.Tensor],
    paced: bool = False,
    modelled_link: bool = False,
    time_scale: float = 1.0,
) -> dict:
    """This device's part of a request; its tensors are the outputs, on the device `last`.

    `paced`: as slow as the device of the cluster file; `modelled_link`: so is the link. `expected_s` and `spent_s` are
    what the device's profile says of the compute, and what that took; NaN without a part, or of generated text.
    """
    _, _, profile = _opened(state.home["cluster"], state.home["model"])
    own, outputs = profile.devices[state.device], {}
    record = JOBS[op](
        state,
        checkpoint=state.home["model"],
        inputs=inputs,
        output=outputs,
        device=asdict(own) if paced else None,
        link=asdict(profile.link) if modelled_link else None,
        time_scale=time_scale,
        **job,
    )
    spent_s = expected_s = math.nan
    if record and op == "run_plan":
        spent_s, expected_s = _compute(state, job["plan"], record, own, *inputs["input_ids"].shape)
        spent_s = spent_s / time_scale + record["samples"][-1]["overrun_s"]
        kept = ("latency_s", "overrun_s", "modelled_s", "link_bytes")  # the rest only a timeline needs
        record["samples"] = [{name: sample[name] for name in kept} for sample in record["samples"]]
    tensors = outputs if state.device == last else {}
    return {"record": record, "spent_s": spent_s, "expected_s": expected_s, "tensors": tensors}


def _compute(state: WorkerState, plan: Mapping, record: dict, own: DeviceProfile, batch_size: int, seq_len: int):
    """Seconds of compute of the last sample, on the host's clock, and those that the profile `own` says."""
    made = Plan.from_dict(plan)
    loaded = next(reversed(state.loaded.values()))
    parts = loaded.compute(made, made.device_ids.index(state.rank), seq_len, batch_size)
    expected_s = sum(compute_seconds(c, own) for part in parts for c in part)
    sample = record["samples"][-1]
    return sum(stop - start for what, start, stop, _ in sample["events"] if what == "compute"), expected_s


def report_on(state: WorkerState, results: Sequence[dict | None], inputs: Mapping[str, torch.Tensor]) -> dict:
    """Lines to print and the record of the request that was planned last; `inputs` are the outputs of its devices."""
    prepared, request, config = state.kept["prepared"]
    spec = ClusterSpec.load(state.home["cluster"])
    lines, record = report(request, prepared, config, state.home["model"], spec.names, results, dict(inputs))
    return {"lines": lines, "record": record}
