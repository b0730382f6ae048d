"""What a worker can be asked to do: run a plan, time collectives, check its link."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import detransformer.models  # noqa: F401  registers decoupled BERT with AutoConfig
from detransformer.cluster.pacing import Pacer
from detransformer.parallel.comm import Comm
from detransformer.parallel.executor import Executor
from detransformer.parallel.plan import Plan
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import device_steps, segments
from detransformer.planning.profile import DeviceProfile, LinkProfile

COLLECTIVE_TIMEOUT_S = 120


@dataclass
class WorkerState:
    """A worker's place in the cluster: `groups[n]` holds ranks 0..n-1. The last executor is kept for the next job."""

    rank: int
    num_ranks: int
    interface: str
    groups: dict[int, dist.ProcessGroup]
    executors: dict[str, Executor] = field(default_factory=dict)

    @classmethod
    def join(cls, rank: int, num_ranks: int, master: str, interface: str, threads: int) -> "WorkerState":
        torch.set_num_threads(threads)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{master}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        groups = {n: dist.new_group(list(range(n))) for n in range(2, num_ranks + 1)}
        return cls(rank, num_ranks, interface, groups)

    def comm(self, num_ranks: int, observer: Pacer | None = None) -> Comm:
        return Comm(self.groups.get(num_ranks), self.rank, num_ranks, observer)

    def sent_bytes(self) -> int:
        """Bytes that the kernel has sent on this device's interface."""
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == self.interface:
                return int(numbers.split()[8])
        return 0


def run_plan(
    state: WorkerState,
    checkpoint: str,
    plan: dict,
    inputs: str,
    repeats: int,
    warmup: int = 1,
    device: dict | None = None,
    link: dict | None = None,
    time_scale: float = 1.0,
    stream: int = 0,
    dtype: str = "float32",
    reference: str | None = None,
    output: str | None = None,
) -> dict | None:
    """Runs `plan` on this rank's device `repeats` times and reports every sample; None if the plan leaves it out.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        inputs: safetensors file of input_ids and, where given, attention_mask and token_type_ids [B, T].
        device: this rank's `DeviceProfile` as a dict, to pace by; None runs at the host's own speed.
        link: `LinkProfile` as a dict, where the link is modelled; None where it is real.
        time_scale: everything modelled lasts this many times longer; times are reported in the device's seconds.
        stream: so many requests back to back are timed as well, for throughput (pipeline, data parallel).
        reference: safetensors file of the single-device output to compare with, on the rank that has the result.
        output: file to write that result to.
    """
    plan_ = Plan.from_dict(plan)
    if state.rank >= plan_.num_devices:
        return None
    tensors = load_file(inputs)
    batch_size, seq_len = tensors["input_ids"].shape
    config = AutoConfig.from_pretrained(checkpoint)
    comm = state.comm(plan_.num_devices)
    key = f"{checkpoint} {sorted(plan.items())} {dtype}"
    is_new = key not in state.executors
    if is_new:
        state.executors.clear()
        weights = WeightSource(Path(checkpoint, "model.safetensors"), getattr(torch, dtype))
        state.executors[key] = Executor(config, plan_, weights, comm)
    executor = state.executors[key]
    executor.set_comm(comm)

    segment_s = None
    if device is not None:
        profile = DeviceProfile(**device)
        computes, _ = segments(device_steps(config, plan_, state.rank, seq_len, batch_size))
        segment_s = [time_scale * sum(profile.compute_s(c.flops, c.strategy) for c in part) for part in computes]
    link_s = None
    if link is not None:
        link_profile = LinkProfile(**link)

        def link_s(kind: str, num_bytes: int) -> float:
            return time_scale * link_profile.collective_s(kind, num_bytes, plan_.num_devices)

    for _ in range(warmup if is_new else 0):  # one that has run is warm
        executor(**tensors)
    pacer = comm.observer = Pacer(segment_s, link_s)
    samples = []
    for _ in range(repeats):
        comm.reset()
        pacer.reset()
        comm.barrier()
        sent = state.sent_bytes()
        start = time.perf_counter()
        pacer.begin()
        result = executor(**tensors)
        pacer.end()
        seconds = time.perf_counter() - start
        samples.append(
            {
                "latency_s": seconds / time_scale,
                "compute_s": pacer.compute_s / time_scale,
                "comm_s": pacer.comm_s / time_scale,
                "overrun_s": pacer.overrun_s / time_scale,
                "link_bytes": state.sent_bytes() - sent,
            }
        )
    record = {
        "samples": samples,
        "counts": dict(comm.counts),
        "bytes": dict(comm.bytes),
        "weights_bytes": executor.weights_bytes,
        "rss_bytes": psutil.Process().memory_info().rss,
    }
    if stream:
        comm.barrier()
        start = time.perf_counter()
        for _ in range(stream):
            pacer.begin()
            executor(**tensors)
            pacer.end()
        record["stream_s"] = (time.perf_counter() - start) / time_scale
    if result is not None:
        outputs = {"last_hidden_state": result.last_hidden_state}
        outputs |= {"pooler_output": result.pooler_output} if result.pooler_output is not None else {}
        outputs |= {"logits": result.logits} if result.logits is not None else {}
        if reference:
            expected = load_file(reference)
            record["max_abs_error"] = max(
                float((outputs[name] - tensor).abs().max()) for name, tensor in expected.items()
            )
        if output and state.rank == plan_.num_devices - 1:
            save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, output)
    return record


def check_link(state: WorkerState, num_bytes: int) -> dict:
    """Sends `num_bytes` over every link, one direction at a time: seconds of each round, 0 where this rank is idle.

    Both directions at once would measure something else too: acknowledgements that wait behind data.
    """
    world, n = state.comm(state.num_ranks), state.num_ranks
    pairs = [[(r, r + 1) for r in range(0, n - 1, 2)]] + ([[(n - 1, 0)]] if n % 2 else [])
    rounds = [dict(pair) for pair in pairs] + [{b: a for a, b in pair} for pair in pairs]
    buffer = torch.zeros(num_bytes, dtype=torch.uint8)
    seconds = []
    for to_rank in rounds:
        from_rank = {b: a for a, b in to_rank.items()}
        world.barrier()
        start = time.perf_counter()
        if state.rank in to_rank:
            dist.send(buffer, to_rank[state.rank])
        elif state.rank in from_rank:
            dist.recv(buffer, from_rank[state.rank])
        idle = state.rank not in to_rank and state.rank not in from_rank
        seconds.append(0.0 if idle else time.perf_counter() - start)
    return {"seconds": seconds}


def time_collective(state: WorkerState, kind: str, num_floats: int, num_devices: int, repeats: int) -> dict | None:
    """Times one collective on a group of `num_devices`; `num_floats` is this rank's part. Seconds of each repeat."""
    if state.rank >= num_devices:
        return None
    comm = state.comm(num_devices)
    x = torch.zeros(num_floats)
    seconds = []
    for _ in range(repeats + 1):
        comm.reset()
        comm.barrier()
        start = time.perf_counter()
        if kind == "all_reduce":
            comm.all_reduce(x)
        elif kind == "all_gather":
            comm.all_gather(x, [num_floats] * num_devices)
        elif state.rank == 0:
            comm.send(x, 1)
        elif state.rank == 1:
            comm.receive(x, 0)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "bytes": comm.bytes[kind]}


JOBS = {"run_plan": run_plan, "check_link": check_link, "time_collective": time_collective}
