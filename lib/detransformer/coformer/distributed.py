"""Sub-models side by side on a cluster: each device runs its own and sends one message; the central one aggregates.

CoFormer (2025), Fig. 3 and Eqs. 3-6. A lost or late device is left out: the other devices make the answer, and
`EnsembleRun.sentence` names the missing one. Without the central device there is no answer.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from detransformer import machine
from detransformer.cluster.pacing import Pacer, sleep_until
from detransformer.cluster.session import EmulatedCluster
from detransformer.cluster.state import WorkerState
from detransformer.coformer.aggregator import Aggregator, aggregator_flops
from detransformer.coformer.ensemble import Ensemble, answer, load_ensemble
from detransformer.coformer.policy import FLOAT_BYTES
from detransformer.coformer.predictor import STRATEGY, roofline_s
from detransformer.planning.profile import DeviceProfile, LinkProfile

ANSWER_PART = "detransformer.coformer.distributed:answer_part"
DEADLINE_S = 5.0  # in the devices' seconds: how long the central device waits for the others
START_AFTER_S = 0.05  # longer than a job takes to reach its worker


@dataclass(frozen=True)
class EnsembleRun:
    """The answer to one request, and how it was made.

    Args:
        logits: [B, C], from the devices that answered.
        present: by device, whether it answered.
        lost: by device, why it was left out.
        samples_s: seconds of each repeat on the devices' clock, from the start to the central device's answer.
        records: each device's report, None for a lost one.
    """

    logits: torch.Tensor
    present: tuple[bool, ...]
    lost: dict[int, str]
    samples_s: list[float]
    records: list[dict | None]

    @property
    def latency_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def sentence(self) -> str:
        """How many sub-models answered, and why the others did not."""
        if all(self.present):
            return f"All {len(self.present)} sub-models answered."
        missing = [self.lost.get(i, f"device {i} was late") for i, here in enumerate(self.present) if not here]
        return f"{sum(self.present)} of {len(self.present)} sub-models answered: {'; '.join(missing)}."


def run_ensemble(
    cluster: EmulatedCluster, ensemble: Ensemble, inputs: dict[str, torch.Tensor], repeats: int = 1
) -> EnsembleRun:
    """One request on `cluster`; device n runs sub-model n at that device's speed.

    Args:
        inputs: input_ids (attention_mask, token_type_ids) [B, T], or pixel_values [B, 3, H, W].
        repeats: how often the request is timed; a device lost in between is left out of the later ones.

    Raises:
        DeviceLost, DeviceError: if the central device is lost or fails.
    """
    given, logits = cluster.folder / "inputs.safetensors", cluster.folder / "logits.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
    logits.unlink(missing_ok=True)
    aggregator, batch_size = ensemble.aggregator(), len(next(iter(inputs.values())))
    is_real = cluster.transport == "namespaces"  # the link between the devices
    link = LinkProfile(bandwidth_bps=cluster.bandwidth_bps, shares=cluster.link_shares)
    job = {"folder": str(ensemble.folder.resolve()), "inputs": str(given), "output": str(logits)}
    job |= {"time_scale": cluster.time_scale, "needed": ensemble.central}
    job["per_rank"] = [
        {
            "segment_s": segments(ensemble, rank, device.on(config), batch_size, aggregator),
            "link_s": None if is_real else [gather_seconds(ensemble, rank, link, batch_size, aggregator)],
        }
        for rank, (device, config) in enumerate(zip(cluster.devices, ensemble.policy.sub_models, strict=True))
    ]
    cluster.run(ANSWER_PART, **job)  # loads, and runs once to be warm
    samples = []
    for _ in range(repeats):
        start_at = time.perf_counter() + START_AFTER_S
        records = cluster.run(ANSWER_PART, **job, lost=sorted(cluster.lost), start_at=start_at)
        samples.append(records[ensemble.central]["latency_s"])
    present = tuple(records[ensemble.central]["present"])
    return EnsembleRun(load_file(logits)["logits"], present, dict(cluster.lost), samples, records)


def segments(
    ensemble: Ensemble, rank: int, device: DeviceProfile, batch_size: int, aggregator: Aggregator
) -> list[float]:
    """Modelled seconds of one device (Eqs. 4, 6): its sub-model, nothing while it waits, and the aggregation."""
    backbone = batch_size * roofline_s(ensemble.policy.sub_models[rank], ensemble.original, device)
    if rank != ensemble.central:
        return [backbone, 0.0, 0.0]
    flops = aggregator_flops(aggregator.kind, aggregator.widths, aggregator.num_labels)
    weight_bytes = sum(p.nbytes for p in aggregator.parameters())
    return [backbone, 0.0, device.compute_s(batch_size * flops, STRATEGY, weight_bytes)]


def message_widths(aggregator: Aggregator) -> list[int]:
    """Numbers per sample that each device sends: its pooled features, or logits."""
    return [width if aggregator.learned else aggregator.num_labels for width in aggregator.widths]


def gather_seconds(ensemble: Ensemble, rank: int, link: LinkProfile, batch_size: int, aggregator: Aggregator) -> float:
    """Modelled seconds until the message of `rank` is sent, or (central device) all others have come over its link."""
    sizes = [FLOAT_BYTES * batch_size * width for width in message_widths(aggregator)]
    return link.collective_s("send", sum(sizes) - sizes[rank] if rank == ensemble.central else sizes[rank], 2)


# On a device ------------------------------------------------------------------------------------------------------


def answer_part(
    state: WorkerState,
    folder: str,
    inputs: str,
    output: str,
    segment_s: list[float],
    link_s: list[float] | None,
    time_scale: float,
    lost: Sequence[int] = (),
    start_at: float | None = None,
) -> dict:
    """The job of one device, paced by modelled seconds of its segments and, if links are not real, its message.

    All start at `start_at` of their shared clock: a barrier would wait for a device that hangs. Without `start_at`, the
    sub-model is loaded and run once.
    """
    if state.kept.get("ensemble", ("",))[0] != folder:
        state.loaded.clear()
        state.kept.pop("ensemble", None)
        machine.free_unused()
        ensemble = load_ensemble(folder)
        state.kept["ensemble"] = folder, ensemble, ensemble.sub_model(state.rank), ensemble.aggregator()
    _, ensemble, sub_model, aggregator = state.kept["ensemble"]  # every device has the aggregator, which is small
    tensors = load_file(inputs)
    if start_at is None:
        answer(sub_model, tensors, aggregator)
        return {}
    batch_size, devices = len(next(iter(tensors.values()))), tuple(range(ensemble.num_devices))
    comm = state.comm(devices)
    scaled_s = [None if seconds is None else [time_scale * x for x in seconds] for seconds in (segment_s, link_s)]
    pacer = Pacer(*scaled_s, state.arrivals, comm.rank, devices)
    comm.reset()
    comm.observer = pacer
    sleep_until(start_at)
    pacer.begin()
    own = answer(sub_model, tensors, aggregator)
    shapes = [(batch_size, width) for width in message_widths(aggregator)]
    arrived = comm.start_gather(own, shapes, ensemble.central, timeout_s=DEADLINE_S * time_scale, absent=lost).wait()
    result = present = None
    if state.rank == ensemble.central:
        present = [x is not None for x in arrived]
        known = [torch.zeros(shape) if x is None else x for x, shape in zip(arrived, shapes, strict=True)]
        with torch.inference_mode():
            result = aggregator(known, present)
    pacer.end()
    record = {
        "latency_s": (time.perf_counter() - start_at) / time_scale,
        **{name: getattr(pacer, name) / time_scale for name in ("overrun_s", "modelled_s", "compute_s")},
        "bytes": dict(comm.bytes),
        "counts": dict(comm.counts),
        "weights_bytes": sum(p.nbytes for p in sub_model.parameters()),
    }
    if result is not None:
        record["present"] = present
        save_file({"logits": result.contiguous()}, output)
    return record
