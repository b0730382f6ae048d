"""Measures what the cost model needs (DATE 2024, Section III-C): operations on this host, collectives on a cluster.

Operations: one layer of each kind is timed as each strategy's share of it, on one core, without peers; repeated layers
are measured once. Collectives: a few sizes of each kind, fitted by a latency a ring step and a share of the bandwidth.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from transformers import AutoModel, BertConfig, BertModel

from detransformer.cluster.session import EmulatedCluster
from detransformer.models import DecoupledBertModel
from detransformer.models.configuration import DecoupledBertConfig, config_fields, layer_kinds
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.plan import HIDDEN, REPLICATE, SEQ, STRATEGIES, layer_plan
from detransformer.parallel.strategies import STRATEGY_CLASSES, Request
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import LAYER_COSTS, Arrival, Compute, Sizes, Tape
from detransformer.planning.profile import DeviceProfile, LinkProfile, latency_steps

# What one device reduces, contributes, deals out or sends of X [128, 768] on four devices
COLLECTIVE_FLOATS = {
    "all_reduce": 98_304,
    "all_gather": 24_576,
    "all_to_all": 24_576,
    "reduce_scatter": 98_304,
    "send": 98_304,
}
FIT_SHARES = (0.001, 0.25, 1.0, 3.0)  # of the sizes above


class LocalComm(Comm):
    """Stands in for the other ranks while one device is profiled: right shapes, no messages."""

    def start_all_reduce(self, x: torch.Tensor, wire: str = "float32", name: str = "sum") -> Pending:
        return Pending(x)

    def start_reduce_scatter(self, parts, wire: str = "float32", name: str = "sum") -> Pending:
        return Pending(parts[self.rank].clone())

    def start_all_gather(self, x: torch.Tensor, shapes, wire: str = "float32", name: str = "gather") -> Pending:
        return Pending(list(x.new_zeros(sum(s[0] for s in shapes), *x.shape[1:]).split([s[0] for s in shapes])))

    def start_all_to_all(self, parts, shapes, wire: str = "float32", name: str = "exchange") -> Pending:
        return Pending([parts[0].new_zeros(shape) for shape in shapes])


def profile_operations(
    config: BertConfig,
    num_devices: Sequence[int] = (1, 2, 4),
    seq_len: int = 128,
    batch_size: int = 1,
    repeats: int = 10,
    num_chunks: Sequence[int] = (1, 4),
) -> pd.DataFrame:
    """Times each strategy's share of one layer on this host, on one core.

    Returns rows of strategy, num_devices, num_chunks (of its tokens), gflops (of the share), latency_s (first
    quartile), gflops_per_s, and efficiency: the rate relative to the whole original layer's on one device. For an
    original model `block` is left out.
    """
    decoupled = isinstance(config, DecoupledBertConfig)
    one_layer = dict(num_hidden_layers=2 if decoupled else 1)
    one_layer |= dict(num_original_layers=1) if decoupled else {}
    small = type(config)(**{**config_fields(config), **one_layer, "vocab_size": 32})
    if decoupled:
        model = DecoupledBertModel(small)
    else:
        model = BertModel(small)
    state = model.state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            _time_share(small, state, strategy, count, chunks, seq_len, batch_size, repeats)
            for strategy in STRATEGIES
            for count in num_devices
            for chunks in num_chunks
            if (decoupled or strategy != "block") and (strategy != "replicate" or count == min(num_devices))
        ]
    finally:
        torch.set_num_threads(threads)
    frame = pd.DataFrame(rows)
    whole = frame[(frame["strategy"] == "replicate") & (frame["num_chunks"] == min(num_chunks))]["gflops_per_s"].iloc[0]
    return frame.assign(efficiency=frame["gflops_per_s"] / whole)


@torch.inference_mode()
def _time_share(
    config, state, strategy: str, num_devices: int, num_chunks: int, seq_len: int, batch_size: int, repeats: int
) -> dict:
    original = strategy if strategy != "block" else "replicate"
    strategies = ["block" if kind == "decoupled" else original for kind in layer_kinds(config)]
    plan = layer_plan("bp+auto", config, strategies, [1.0] * num_devices, num_chunks=num_chunks)
    layer = strategies.index(strategy)
    runner = STRATEGY_CLASSES[strategy](config, plan, LocalComm(None, 0, num_devices), WeightSource(state), layer)
    request, chunks = Request.of(plan, batch_size, seq_len), []
    for chunk in request.chunks:
        total = chunk.stop - chunk.start
        shape = {
            REPLICATE: (batch_size, total, config.hidden_size),
            SEQ: (batch_size, chunk.tokens[0], config.hidden_size),
            HIDDEN: (plan.sub_blocks[0], batch_size * total, config.hidden_size // sum(plan.sub_blocks)),
        }[STRATEGIES[strategy].in_layout]
        chunks.append(Pending(torch.randn(shape)))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        list(runner(chunks, request))
        seconds.append(time.perf_counter() - start)
    tape = Tape(num_devices)
    sizes = Sizes(config, plan, 0, batch_size, seq_len, tape)
    list(LAYER_COSTS[strategy].steps(sizes, [Arrival(tape)] * len(chunks)))
    flops = sum(step.flops for step in tape.steps if isinstance(step, Compute))
    latency = sorted(seconds[2:])[repeats // 4]  # neighbours on the same processors only ever make it longer
    return {
        "strategy": strategy,
        "num_devices": num_devices,
        "num_chunks": num_chunks,
        "gflops": flops / 1e9,
        "latency_s": latency,
        "gflops_per_s": flops / latency / 1e9,
    }


def host_profile(name: str, operations: pd.DataFrame) -> DeviceProfile:
    """This host's rates from `profile_operations`, at the largest device count measured, whole and in chunks."""
    largest = operations.sort_values("num_devices").groupby(["strategy", "num_chunks"]).last()
    rates = {
        strategy if num_chunks == 1 else f"{strategy}/{num_chunks}": float(row["gflops_per_s"]) * 1e9
        for (strategy, num_chunks), row in largest.iterrows()
    }
    rates["*"] = rates["replicate"]
    memory = psutil.virtual_memory().total
    return DeviceProfile(name, memory, rates, "measured: one layer a strategy, one core, first quartile")


def single_device_latency(checkpoint: str | Path, seq_len: int = 128, repeats: int = 3, threads: int = 1) -> float:
    """Median seconds of one forward pass of the model in the folder `checkpoint` on this host."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = AutoModel.from_pretrained(checkpoint).eval()
        ids = torch.randint(model.config.vocab_size, (1, seq_len))
        seconds = []
        with torch.inference_mode():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                model(input_ids=ids)
                seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return statistics.median(seconds[1:])


def profile_link(cluster: EmulatedCluster, repeats: int = 3) -> tuple[LinkProfile, pd.DataFrame]:
    """Times collectives over the cluster's links as they are set now, and fits them.

    Returns the fitted profile and the rows it was fitted to: kind, num_bytes (sent a rank), latency_s, fitted_s.

    Raises:
        ValueError: on a cluster of one device.
    """
    n = cluster.num_devices
    if n < 2:
        raise ValueError(f"num_devices={n} has no link to profile: take at least 2.")
    if cluster.transport != "namespaces":
        raise ValueError(
            "links are modelled here, not measured: a link profile needs network namespaces (run as root)."
        )
    rows = []
    for kind, floats in COLLECTIVE_FLOATS.items():
        for share in FIT_SHARES:
            results = cluster.run(
                "time_collective", kind=kind, num_floats=max(1, int(floats * share)), num_devices=n, repeats=repeats
            )
            seconds = [max(r["seconds"][i] for r in results) for i in range(repeats)]
            num_bytes = max(r["bytes"] for r in results)
            rows.append((kind, num_bytes, statistics.median(seconds) / cluster.time_scale))
    frame = pd.DataFrame(rows, columns=["kind", "num_bytes", "latency_s"])
    latency, efficiency = {}, {}
    for kind, part in frame.groupby("kind"):
        # Relative errors count: a millisecond matters more on a small message than on a large one.
        weight = 1 / part["latency_s"].to_numpy()
        columns = np.stack(
            [np.full(len(part), float(latency_steps(kind, n))), 8 * part["num_bytes"].to_numpy()], axis=1
        )
        (step_s, s_per_bit), *_ = np.linalg.lstsq(columns * weight[:, None], np.ones(len(part)), rcond=None)
        latency[kind] = max(float(step_s), 0.0)
        efficiency[kind] = float(min(1.0, 1 / (s_per_bit * cluster.bandwidth_bps)))
    latency["*"], efficiency["*"] = latency["send"], efficiency["send"]
    source = f"measured on {n} devices at {cluster.bandwidth_bps / 1e6:g} Mbps ({cluster.link})"
    link = LinkProfile(cluster.bandwidth_bps, latency, efficiency, source)
    fitted = [link.collective_s(r.kind, r.num_bytes, n) for r in frame.itertuples()]
    return link, frame.assign(fitted_s=fitted)
