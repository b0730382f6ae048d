"""The worker of a real host, started by torchrun with one process a host; and the same request on emulated devices.

All workers join gloo over the interface that has their host's address. The first one plans, and sends the plan as JSON
and the request's tensors as safetensors to all; each loads its own slices from its own copy of the checkpoint.
What it has to say goes to `detransformer run` on its host, over a Unix socket. Nothing is pickled.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load, load_file, save, save_file

from detransformer.cluster.answers import own_part, prepare, report
from detransformer.cluster.checkpoints import open_folder
from detransformer.cluster.devices import DeviceError
from detransformer.cluster.jobs import JOBS, WorkerState
from detransformer.cluster.launcher import die_with_parent
from detransformer.cluster.rollcall import HEARTBEAT_S
from detransformer.cluster.run import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.parallel.plan import Plan
from detransformer.planning.profile import ClusterProfile
from detransformer.typed_json import from_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from detransformer.cluster.session import EmulatedCluster

COLLECTIVE_ERRORS = ("peer", "gloo", "timed out", "timeout", "broken pipe", "connection")  # words in them
MAX_LATE = 0.03  # of what is modelled, by which the host may be late


class Parent:
    """The way to `detransformer run` on this host, which prints and watches. Ends this process when it has gone."""

    def __init__(self, folder: str):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(Path(folder) / "control"))
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, **message) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _beat(self) -> None:
        try:
            while True:
                self.send()
                time.sleep(HEARTBEAT_S)
        except OSError:
            os._exit(1)


def broadcast(data: bytes | None, source: int, rank: int) -> bytes:
    """`data` of rank `source` on all ranks: its length, then its bytes."""
    length = torch.tensor([len(data) if rank == source else 0])
    dist.broadcast(length, source)
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if rank == source and data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if len(buffer):
        dist.broadcast(buffer, source)
    return buffer.numpy().tobytes()


def work(job: dict, parent: Parent) -> dict | None:
    """This host's part of a request; the record on the first device, None on the others."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["GLOO_SOCKET_IFNAME"] = job["interface"]
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    threads = job["threads"] or torch.get_num_threads()
    state = WorkerState.join(rank, num_ranks, master, False, job["interface"], threads)  # torchrun keeps the store
    spec, model, folder = ClusterSpec.load(job["cluster"]), job["model"], Path(job["folder"])
    request, prepared, told = from_json(Request, job["request"]), None, None
    if rank == 0:
        config = open_folder(model).config
        prepared = prepare(request, model, config, spec.profile(model, config))
        last = prepared.plan.device_ids[-1]  # has the result, whatever the plan
        told = {"op": prepared.op, "job": prepared.job, "plan": prepared.plan.to_dict(), "last": last}
    told = json.loads(broadcast(json.dumps(told).encode(), 0, rank))
    tensors = broadcast(save(prepared.inputs) if prepared else None, 0, rank)
    parent.send(say=f"{spec.names[rank]}: {own_part(Plan.from_dict(told['plan']), rank)}")
    inputs, output = folder / "inputs.safetensors", folder / "output.safetensors"
    inputs.write_bytes(tensors)
    result = JOBS[told["op"]](state, checkpoint=model, inputs=str(inputs), output=str(output), **told["job"])
    results = [
        json.loads(broadcast(json.dumps(_summary(result)).encode() if rank == i else None, i, rank))
        for i in range(num_ranks)
    ]
    outputs = broadcast(output.read_bytes() if rank == told["last"] else None, told["last"], rank)
    if rank:
        parent.send(say=f"{spec.names[rank]}: done; the answer is on {spec.names[0]}")
        return None
    lines, record = report(request, prepared, config, model, spec.name, spec.names, results, load(outputs))
    for line in lines:
        parent.send(print=line)
    _insist(record)
    return record


def _summary(result: dict | None) -> dict | None:
    """A job's result without what only a timeline needs."""
    if result and "samples" in result:
        kept = ("latency_s", "overrun_s", "modelled_s", "link_bytes")
        result = result | {"samples": [{name: sample[name] for name in kept} for sample in result["samples"]]}
    return result


def _insist(record: dict) -> None:
    if not record.get("check", {}).get("agrees", True):
        raise DeviceError(0, f"the output differs from the single device's: {record['check']}")


def run_emulated(
    spec: ClusterSpec, model: str, request: Request, transport: str, time_scale: float | None, threads: int
) -> dict:
    """The same on the devices of `spec` emulated on this machine, at its links' rates; prints, and returns the record.

    Raises:
        ValueError: as `prepare`.
        DeviceError: where a worker is lost or fails, or the output differs from the single device's.
    """
    config = open_folder(model).config
    profile = spec.profile(model, config)
    prepared = prepare(request, model, config, profile)
    with spec.emulate(transport=transport, threads=threads) as cluster:
        shaped = cluster.transport == "namespaces"
        scale = set_time_scale(cluster, spec, profile, prepared.plan.device_ids, config, time_scale)
        inputs, output = cluster.folder / "inputs.safetensors", cluster.folder / "output.safetensors"
        save_file(prepared.inputs, inputs)
        results = cluster.run(
            prepared.op,
            per_rank=[{"device": asdict(device)} for device in profile.devices],
            checkpoint=str(Path(model).resolve()),
            inputs=str(inputs),
            output=str(output),
            link=None if shaped else asdict(profile.link),
            time_scale=scale,
            **prepared.job,
        )
        outputs = load_file(output)
        name = f"{spec.name} ({cluster.profile_name}, {cluster.link} link)"
    lines, record = report(request, prepared, config, model, name, spec.names, results, outputs)
    print("\n".join([name, *lines]))
    late = lateness(results)
    warn_if_late(late, scale)
    _insist(record)
    return record | {"time_scale": scale, "pacing_overrun": late}


def set_time_scale(
    cluster: "EmulatedCluster",
    spec: ClusterSpec,
    profile: ClusterProfile,
    devices: Sequence[int],
    config: "PretrainedConfig",
    time_scale: float | None,
) -> float:
    """Sets the links of `cluster` to the rate of `spec`, as much slower as asked, or as this host needs; how much."""
    from detransformer.cluster.bench import first_time_scale, usual_devices
    from detransformer.machine import usable_cores

    busy = usual_devices([profile.devices[i] for i in devices], config)
    total_bps = spec.bandwidth_bps * sum(profile.link.share(i) for i in range(len(profile.devices)))
    shaped = cluster.transport == "namespaces"
    scale = time_scale or first_time_scale(total_bps if shaped else 0.0, busy, usable_cores())
    cluster.set_link(spec.bandwidth_bps, scale)
    return scale


def warn_if_late(late: float, scale: float) -> None:
    """Says so where this host kept up with what is modelled less than 97%, and what to do about it."""
    if late > MAX_LATE:
        print(f"this host was late by {late:.0%} of what is modelled: slow all down by --time-scale {2 * scale:g}")


def lateness(results: Sequence[dict | None]) -> float:
    """By how much of what was modelled the host came late, on the device where it was worst."""
    samples = [result.get("samples", [result]) for result in results if result is not None]
    return max(sum(s["overrun_s"] for s in own) / max(sum(s["modelled_s"] for s in own), 1e-9) for own in samples)


def blame(error: Exception, spec: ClusterSpec | None) -> tuple[str, bool]:
    """(sentence, whether the error is this host's own); that of a broken collective names the other end, if it can."""
    text = " ".join(str(error).split())
    of_a_collective = isinstance(error, RuntimeError) and any(word in text.lower() for word in COLLECTIVE_ERRORS)
    own = isinstance(error, DeviceError) or not of_a_collective
    addresses = re.findall(r"\[?(\d+\.\d+\.\d+\.\d+)\]?:\d+", text)
    others = [m.name for m in spec.members if m.address in addresses] if spec and not own else []
    if others:
        return f"it lost its connection to {others[0]}", own
    return (text if isinstance(error, (ValueError, DeviceError)) else f"{type(error).__name__}: {text[:300]}"), own


def main() -> None:
    """The process that torchrun starts on a host: its part of the request in the job's file, told to its parent."""
    die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    parent = Parent(job["folder"])
    try:
        parent.send(finished=work(job, parent))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        sentence, own = blame(error, ClusterSpec.load(job["cluster"]))
        parent.send(error=sentence, own=own)
        time.sleep(0.2)
        os._exit(1)
    os._exit(0)  # gloo's threads would otherwise wait for peers that are gone


if __name__ == "__main__":
    main()
