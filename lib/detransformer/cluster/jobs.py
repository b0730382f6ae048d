"""What a worker can be asked to do: run a plan, time collectives, check its link and its clock."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, BertConfig

import detransformer.models  # noqa: F401  registers decoupled BERT with AutoConfig
from detransformer.cluster import memory
from detransformer.cluster.pacing import Arrivals, Pacer, sleep_until
from detransformer.parallel.comm import Comm
from detransformer.parallel.executor import Executor
from detransformer.parallel.plan import Plan
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import device_steps, segments
from detransformer.planning.profile import DeviceProfile, LinkProfile

COLLECTIVE_TIMEOUT_S = 120
START_AFTER_S = 0.01  # longer than ranks take to leave a barrier


@dataclass
class Loaded:
    """A plan's part on this device, kept for the next job: weights, and what loading them took."""

    executor: Executor
    comm: Comm
    own_bytes: int | None  # resident before loading: the interpreter and its libraries
    peak_bytes: int | None  # while loading and warming up


@dataclass
class WorkerState:
    """A worker's place in the cluster: `groups[n]` holds ranks 0..n-1. The last executor is kept for the next job."""

    rank: int
    num_ranks: int
    interface: str
    groups: dict[int, dist.ProcessGroup]
    loaded: dict[str, Loaded] = field(default_factory=dict)
    arrivals: Arrivals | None = None  # of this session, where all workers share one host

    @classmethod
    def join(
        cls, rank: int, num_ranks: int, master: str, interface: str, threads: int, arrivals: str = ""
    ) -> "WorkerState":
        torch.set_num_threads(threads)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{master}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        groups = {n: dist.new_group(list(range(n))) for n in range(2, num_ranks + 1)}
        _touch_libraries()
        return cls(rank, num_ranks, interface, groups, arrivals=Arrivals(arrivals, num_ranks) if arrivals else None)

    def comm(self, num_ranks: int, observer: Pacer | None = None) -> Comm:
        return Comm(self.groups.get(num_ranks), self.rank, num_ranks, observer)

    def start_together(self, comm: Comm, count: int) -> None:
        """Returns on all ranks of `comm` at the same moment, as far as they share a clock; `count` numbers them.

        A barrier lets ranks go some milliseconds apart, which would count as waiting.
        """
        if self.arrivals is None:
            comm.barrier()
            return
        self.arrivals.write("start", self.rank, count, time.perf_counter())
        comm.barrier()
        sleep_until(self.arrivals.last("start", comm.num_ranks, count) + START_AFTER_S)

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

    A sample's `events` are the pacer's, on the host's clock, which all workers share. `peak_rss_bytes` is the largest
    resident size while loading and running, above what was resident before; None where it is not told.
    """
    plan_ = Plan.from_dict(plan)
    if state.rank >= plan_.num_devices:
        state.loaded.clear()  # all ranks keep the same plan, so that all or none warm up with the next one
        return None
    tensors = load_file(inputs)
    batch_size, seq_len = tensors["input_ids"].shape
    config = AutoConfig.from_pretrained(checkpoint)
    key = f"{checkpoint} {sorted(plan.items())} {dtype}"
    is_new = key not in state.loaded
    if is_new:
        state.loaded.clear()
        state.loaded[key] = _load(state, checkpoint, config, plan_, dtype)
    loaded = state.loaded[key]
    executor, comm = loaded.executor, loaded.comm
    memory.restart_peak()

    segment_s = None
    if device is not None:
        profile = DeviceProfile(**device)
        computes, _ = segments(device_steps(config, plan_, state.rank, seq_len, batch_size))
        segment_s = [
            time_scale * sum(profile.compute_s(c.flops, c.strategy, c.weight_bytes) for c in part) for part in computes
        ]
    link_s = None
    if link is not None:
        link_profile = LinkProfile(**link)

        def link_s(kind: str, num_bytes: int) -> float:
            return time_scale * link_profile.collective_s(kind, num_bytes, plan_.num_devices)

    comm.observer = None
    for _ in range(warmup if is_new else 0):  # one that has run is warm
        executor(**tensors)
    pacer = comm.observer = Pacer(segment_s, link_s, state.arrivals, state.rank, plan_.num_devices)
    samples = []
    for sample in range(repeats):
        comm.reset()
        pacer.reset()
        sent = state.sent_bytes()
        state.start_together(comm, sample)
        start = time.perf_counter()
        pacer.begin()
        result = executor(**tensors)
        pacer.end()
        seconds = time.perf_counter() - start
        samples.append(
            {
                "latency_s": seconds / time_scale,
                "overrun_s": pacer.overrun_s / time_scale,
                "modelled_s": pacer.modelled_s / time_scale,
                "link_bytes": state.sent_bytes() - sent,
                "events": [(what, *(round(s, 6) for s in seconds)) for what, *seconds in pacer.events],
            }
        )
    peaks = (loaded.peak_bytes, memory.peak_bytes(), loaded.own_bytes)
    record = {
        "samples": samples,
        "counts": dict(comm.counts),
        "bytes": dict(comm.bytes),
        "weights_bytes": executor.weights_bytes,
        "peak_rss_bytes": None if None in peaks else max(peaks[:2]) - loaded.own_bytes,
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
            record |= _errors(outputs, load_file(reference), plan_.reads)
        if output and state.rank == plan_.num_devices - 1:
            save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, output)
    return record


def _load(state: WorkerState, checkpoint: str, config: BertConfig, plan: Plan, dtype: str) -> Loaded:
    """This device's part of `plan`; the peak counts from before the first weight is read."""
    memory.free_unused()
    memory.restart_peak()
    own_bytes = memory.resident_bytes()
    comm = state.comm(plan.num_devices)
    with memory.large_blocks_apart():
        if plan.method == "dtensor":
            from detransformer.cluster.dtensor import DTensorExecutor

            executor = DTensorExecutor(checkpoint, plan, comm)
        else:
            weights = WeightSource(Path(checkpoint, "model.safetensors"), getattr(torch, dtype))
            executor = Executor(config, plan, weights, comm)
    return Loaded(executor, comm, own_bytes, memory.peak_bytes())


def _touch_libraries() -> None:
    """Runs each kernel once: code and pools that the libraries bring in are the interpreter's own."""
    x, weight = torch.zeros(1, 8, 128, 64), torch.zeros(512, 512)
    with torch.inference_mode():
        F.embedding(torch.zeros(1, 128, dtype=torch.long), weight)
        F.linear(F.gelu(F.layer_norm(x.view(1, 128, 512), (512,))), weight, weight[0])
        F.scaled_dot_product_attention(x, x, x)


def _errors(outputs: dict, expected: dict, reads: str) -> dict:
    """How far `outputs` lie from the single device's: largest absolute error, and RMS error over the output's RMS."""
    if reads == "cls" and "last_hidden_state" in expected:
        expected = expected | {"last_hidden_state": expected["last_hidden_state"][:, :1]}
    errors = {name: (outputs[name] - tensor, tensor) for name, tensor in expected.items()}
    return {
        "max_abs_error": max(float(error.abs().max()) for error, _ in errors.values()),
        "relative_error": max(
            float(error.square().mean().sqrt() / t.square().mean().sqrt()) for error, t in errors.values()
        ),
    }


def self_check(
    state: WorkerState, num_devices: int, link_bytes: int, segment_s: float, num_segments: int
) -> dict | None:
    """Sends `link_bytes` over every link (0: over none), then paces `num_segments` segments that compute nothing.

    Links are checked one direction at a time: both at once would measure something else too, acknowledgements that wait
    behind data. Returns `sent` and `received`, (from, to, seconds on the host's clock) of each transfer's start and end
    as this device saw it, and `pacing_error`, by how much longer the segments took, relative.
    """
    n = num_devices
    if state.rank >= n:
        return None
    comm = state.comm(n)
    result: dict = {"sent": [], "received": []}
    buffer = torch.zeros(link_bytes, dtype=torch.uint8)
    for pairs in link_rounds(n) if link_bytes else []:
        comm.barrier()
        for source, target in pairs:
            if state.rank == source:
                result["sent"].append((source, target, time.perf_counter()))
                dist.send(buffer, group=comm.group, group_dst=target)
            elif state.rank == target:
                dist.recv(buffer, group=comm.group, group_src=source)
                result["received"].append((source, target, time.perf_counter()))
    comm.barrier()
    pacer = Pacer([segment_s, 0.0] * num_segments + [0.0])  # between launch and wait, and after the last, nothing
    start = time.perf_counter()
    pacer.begin()
    for _ in range(num_segments):
        number = pacer.launch("check", 0)
        pacer.before_wait(number)
        pacer.after_wait(number)
    pacer.end()
    return result | {"pacing_error": (time.perf_counter() - start) / pacer.modelled_s - 1}


def link_rounds(num_devices: int) -> list[list[tuple[int, int]]]:
    """Rounds of (from, to) in which every device sends once and receives once, and does one thing at a time."""
    n = num_devices
    pairs = [[(r, r + 1) for r in range(0, n - 1, 2)]] + ([[(n - 1, 0)]] if n % 2 and n > 1 else [])
    return pairs + [[(b, a) for a, b in part] for part in pairs]


def time_collective(state: WorkerState, kind: str, num_floats: int, num_devices: int, repeats: int) -> dict | None:
    """Times one collective on a group of `num_devices`; seconds of each repeat, and the bytes that this rank sends.

    `num_floats` is this rank's part: what it reduces, contributes, sends, or (all_to_all, reduce_scatter) deals out.
    """
    if state.rank >= num_devices:
        return None
    comm = state.comm(num_devices)
    x = torch.zeros(num_floats)
    parts = list(x[: max(1, num_floats // num_devices)].expand(num_devices, -1))
    shapes = [part.shape for part in parts]
    calls = {
        "all_reduce": lambda: comm.start_all_reduce(x).wait(),
        "all_gather": lambda: comm.start_all_gather(x, [x.shape] * num_devices).wait(),
        "all_to_all": lambda: comm.start_all_to_all(parts, shapes).wait(),
        "reduce_scatter": lambda: comm.start_reduce_scatter(parts).wait(),
    }
    if kind == "send" and state.rank == 0:
        calls["send"] = lambda: comm.send(x, 1)
    elif kind == "send" and state.rank == 1:
        calls["send"] = lambda: comm.receive(x.shape, x.dtype, 0)
    seconds = []
    for _ in range(repeats + 1):
        comm.reset()
        comm.barrier()
        start = time.perf_counter()
        calls.get(kind, lambda: None)()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "bytes": comm.bytes[kind]}


JOBS = {"run_plan": run_plan, "self_check": self_check, "time_collective": time_collective}
