"""Sub-models side by side on a cluster: each device runs its own, sends one message, the central one aggregates.

CoFormer (2025), Fig. 3 and Eqs. 3-6. A device that is lost or late is left out: the answer is made of the others', and
says so. Without the central device there is none.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from detransformer import machine
from detransformer.cluster.devices import DeviceError
from detransformer.cluster.jobs import Loaded, WorkerState
from detransformer.cluster.pacing import Pacer, sleep_until
from detransformer.cluster.session import EmulatedCluster
from detransformer.coformer.aggregator import Aggregator, aggregator_flops
from detransformer.coformer.ensemble import Ensemble, aggregate, answer, load_ensemble
from detransformer.parallel.wire import message_bytes
from detransformer.planning.profile import DeviceProfile, LinkProfile
from detransformer.typed_json import from_json

DEADLINE_S = 5.0  # in the devices' seconds: how long the central device waits for the others
START_AFTER_S = 0.05  # longer than a job takes to reach its worker
AGGREGATION = "replicate"  # whose rate small products on one device have

ANSWER_PART = "detransformer.cluster.ensembles:answer_part"


@dataclass(frozen=True)
class EnsembleRun:
    """What came of one request.

    Args:
        logits: [B, C], of the devices that answered.
        present: which these were.
        lost: by device, why it was left out.
        samples_s: seconds of each repeat on the devices' clock, from the start to the central device's answer.
        records: what each device reports, None of one that is lost.
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
        """Who is in the answer."""
        if all(self.present):
            return f"All {len(self.present)} sub-models answered."
        missing = [self.lost.get(i, f"device {i} was late") for i, here in enumerate(self.present) if not here]
        return f"{sum(self.present)} of {len(self.present)} sub-models answered: {'; '.join(missing)}."


def run_ensemble(
    cluster: EmulatedCluster,
    ensemble: Ensemble,
    inputs: dict[str, torch.Tensor],
    repeats: int = 1,
    deadline_s: float = DEADLINE_S,
    paced: bool = True,
) -> EnsembleRun:
    """One request on `cluster`, device n running sub-model n.

    Args:
        inputs: input_ids (attention_mask, token_type_ids) [B, T], or pixel_values [B, 3, H, W].
        repeats: the request is timed so often; a device lost in between is left out of those after it.
        deadline_s: how long the central device waits for the others, in the devices' seconds.
        paced: as slow as the devices; else at the host's own speed.

    Raises:
        ValueError: for another number of devices, or a deadline that is not above 0.
        DeviceLost, DeviceError: where the central device is lost or fails.
    """
    if cluster.num_devices != ensemble.num_devices:
        raise ValueError(
            f"the ensemble has {ensemble.num_devices} sub-models, the cluster {cluster.num_devices} devices: give a "
            f"cluster of {ensemble.num_devices}, or decompose the model for this one."
        )
    if not deadline_s > 0:
        raise ValueError(f"deadline_s={deadline_s} is not above 0: give the seconds to wait for a device.")
    given, logits = cluster.folder / "inputs.safetensors", cluster.folder / "logits.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
    logits.unlink(missing_ok=True)
    sizes = ensemble.policy.sub_models
    profiles = [device.on(config) for device, config in zip(cluster.devices, sizes, strict=True)]
    modelled = cluster.transport != "namespaces"
    link = asdict(LinkProfile(bandwidth_bps=cluster.bandwidth_bps, shares=cluster.link_shares)) if modelled else None
    job = {
        "folder": str(ensemble.folder.resolve()),
        "inputs": str(given),
        "output": str(logits),
        "link": link,
        "time_scale": cluster.time_scale,
        "deadline_s": deadline_s,
    }
    aggregator, batch_size = ensemble.aggregator(), len(next(iter(inputs.values())))
    per_rank = [
        {"segment_s": segments(ensemble, rank, profile, batch_size, aggregator) if paced else None}
        for rank, profile in enumerate(profiles)
    ]
    cluster.run(ANSWER_PART, per_rank, needed=ensemble.central, **job)  # loads, and runs once to be warm
    samples, records = [], []
    for _ in range(repeats):
        told = {"lost": sorted(cluster.lost), "start_at": time.perf_counter() + START_AFTER_S}
        records = cluster.run(ANSWER_PART, per_rank, needed=ensemble.central, **job, **told)
        central = records[ensemble.central]
        if central is None:
            raise DeviceError(ensemble.central, f"device {ensemble.central} aggregates and gave no answer.")
        samples.append(central["latency_s"])
    return EnsembleRun(
        load_file(logits)["logits"], tuple(records[ensemble.central]["present"]), dict(cluster.lost), samples, records
    )


def answer_part(
    state: WorkerState,
    folder: str,
    inputs: str,
    output: str,
    segment_s: list[float] | None,
    link: dict | None,
    time_scale: float,
    deadline_s: float,
    lost: Sequence[int] = (),
    start_at: float | None = None,
) -> dict:
    """The job of one device. Segments of compute: its sub-model, nothing while it waits, and the aggregation.

    All start at `start_at` of the clock that they share: a barrier would wait for a device that hangs. Without it, the
    sub-model is loaded and run once.
    """
    is_new = folder not in state.loaded
    ensemble, sub_model, aggregator = _loaded(state, folder)
    tensors = load_file(inputs)
    batch_size, devices = len(next(iter(tensors.values()))), tuple(range(ensemble.num_devices))
    comm = state.comm(devices)
    is_central = state.rank == ensemble.central
    shapes = [(batch_size, width) for width in _widths(aggregator)]
    paced_s = segment_s and [time_scale * seconds for seconds in segment_s]
    link_s = link and [time_scale * _gather_seconds(from_json(LinkProfile, link), shapes, state.rank, ensemble.central)]
    pacer = Pacer(paced_s, link_s, state.arrivals, comm.rank, devices)
    if start_at is None:
        if is_new:  # one that has run is warm
            answer(sub_model, tensors, aggregator)
        return {}
    comm.reset()
    comm.observer = pacer
    sent = state.sent_bytes()
    sleep_until(start_at)
    pacer.begin()
    own = answer(sub_model, tensors, aggregator)
    arrived = comm.start_gather(own, shapes, ensemble.central, timeout_s=deadline_s * time_scale, absent=lost).wait()
    result = aggregate(aggregator, arrived) if is_central else None
    pacer.end()
    record = {
        "latency_s": (time.perf_counter() - start_at) / time_scale,
        "overrun_s": pacer.overrun_s / time_scale,
        "modelled_s": pacer.modelled_s / time_scale,
        "link_bytes": state.sent_bytes() - sent,
        "bytes": dict(comm.bytes),
        "counts": dict(comm.counts),
        "weights_bytes": sum(p.nbytes for p in sub_model.parameters()),
        "peak_rss_bytes": machine.peak_bytes(),
        "compute_s": pacer.compute_s / time_scale,
    }
    if result is not None:
        record["present"] = [x is not None for x in arrived]
        save_file({"logits": result.contiguous()}, output)
    return record


def _loaded(state: WorkerState, folder: str) -> tuple[Ensemble, torch.nn.Module, Aggregator]:
    """This device's sub-model and, since it is small, the aggregator; kept for the next request."""
    if folder not in state.loaded:
        state.loaded.clear()
        machine.free_unused()
        machine.restart_peak()
        ensemble = load_ensemble(Path(folder))
        kept = Loaded(None, None, [], machine.resident_bytes())
        kept.runners["ensemble"] = (ensemble, ensemble.sub_model(state.rank), ensemble.aggregator())
        state.loaded[folder] = kept
    return state.loaded[folder].runners["ensemble"]


def _widths(aggregator: Aggregator) -> list[int]:
    """Numbers of each device's message for one sample."""
    return list(aggregator.widths) if aggregator.learned else [aggregator.num_labels] * len(aggregator.widths)


def segments(
    ensemble: Ensemble, rank: int, device: DeviceProfile, batch_size: int, aggregator: Aggregator
) -> list[float]:
    """Modelled seconds of one device (Eqs. 4, 6): its sub-model, nothing while it waits, and the aggregation."""
    from detransformer.coformer.evaluator import roofline_s  # and pandas: not on the devices

    backbone = batch_size * roofline_s(ensemble.policy.sub_models[rank], ensemble.original, device)
    fused = 0.0
    if rank == ensemble.central:
        flops = aggregator_flops(aggregator.kind, aggregator.widths, aggregator.num_labels, aggregator.hidden_size)
        weight_bytes = sum(p.nbytes for p in aggregator.parameters())
        fused = device.compute_s(batch_size * flops, AGGREGATION, weight_bytes)
    return [backbone, 0.0, fused]


def _gather_seconds(link: LinkProfile, shapes: Sequence[Sequence[int]], rank: int, central: int) -> float:
    """Modelled seconds until this rank's message is sent, or all others' have come over the central device's link."""
    sent = [message_bytes(shape, "float32") for shape in shapes]
    return link.collective_s("send", sum(sent) - sent[rank] if rank == central else sent[rank], 2)
