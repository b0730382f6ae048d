"""Measures the cost model's inputs (DATE 2024, Section III-C): operations on this host, collectives on a cluster.

Operations: each strategy's share of one layer is timed on one core, without peers; a model's layers are alike, so one
is enough. Collectives: a few sizes of each kind, fitted by a latency per ring step and a fraction of the bandwidth.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, BertConfig

from detransformer import machine
from detransformer.cluster.devices import EFFICIENCY, EFFICIENCY_COLUMNS, efficiency_rows
from detransformer.cluster.session import EmulatedCluster
from detransformer.files import atomic_write
from detransformer.models.configuration import config_fields, layer_kinds, preset_config
from detransformer.parallel.codec import decode
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.layer import STRATEGIES, Request
from detransformer.parallel.plan import layer_plan, strategies_for
from detransformer.parallel.weights import WeightSource
from detransformer.planning.profile import CALIBRATION_TOKENS, DeviceProfile, LinkProfile, latency_steps
from detransformer.planning.recorder import Recorder
from detransformer.planning.tape import WHOLE, Compute, Tape, TapeComm
from detransformer.record import provenance

# Elements of X [128, 768] that one of four devices reduces, gathers, scatters or sends
WHOLE_X, QUARTER_X = 98_304, 24_576
COLLECTIVE_FLOATS = {"all_reduce": WHOLE_X, "all_gather": QUARTER_X, "all_to_all": QUARTER_X}
COLLECTIVE_FLOATS |= {"reduce_scatter": WHOLE_X, "send": WHOLE_X}
FIT_SHARES = (0.001, 0.25, 1.0, 3.0)  # of these sizes
WARM_ROUNDS = 2
_OTHER = torch.ones(2**24)  # 64 MiB, more than a core's caches


class LocalComm(TapeComm):
    """Stands in for the other ranks while one device is profiled: messages of the right size, in this host's memory."""

    _buffer, _read = Comm._buffer, staticmethod(decode)


def profile_operations(
    config: BertConfig,
    num_devices: Sequence[int] = (1, 2, 4),
    seq_lens: Sequence[int] = (CALIBRATION_TOKENS,),
    repeats: int = 10,
    num_chunks: Sequence[int] = (1, 2, 4),
    packs: bool = True,
) -> pd.DataFrame:
    """Times each strategy's share of one layer on this host, on one core, batch 1.

    All shares are timed in turn, in `repeats` rounds after two warm-up rounds, each with its weights fresh from memory,
    as in a model of many layers. The fastest round counts: other processes only make a round longer. For an original
    model, strategies of decoupled layers are left out. Without `packs`, weights are laid out for plain products.

    Returns rows of strategy, num_devices, share (of the layer), tokens, num_chunks (of these tokens), gflops (of the
    share), latency_s, gflops_per_s, and efficiency: the rate over that of the whole original layer of
    `CALIBRATION_TOKENS` tokens on one device.
    """
    decoupled = "decoupled" in layer_kinds(config)
    one_of_each = dict(num_hidden_layers=2, num_original_layers=1) if decoupled else dict(num_hidden_layers=1)
    small = type(config)(**{**config_fields(config), **one_of_each, "vocab_size": 32})
    state = AutoModel.from_config(small).state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = WeightSource(state)
        shares = [
            _Share(small, source, strategy, count, chunks, tokens, packs)
            for strategy in STRATEGIES
            for count in num_devices
            for chunks in num_chunks
            for tokens in dict.fromkeys((CALIBRATION_TOKENS, *seq_lens))
            if STRATEGIES[strategy].layer_kind in layer_kinds(small)
            and (STRATEGIES[strategy].splits or count == min(num_devices))
        ]
        for _ in tqdm(range(repeats + WARM_ROUNDS), desc="profile", unit="round"):
            for share in shares:
                share.time()
    finally:
        torch.set_num_threads(threads)
    frame = pd.DataFrame([share.row() for share in shares])
    return frame.assign(efficiency=frame["gflops_per_s"] / _whole_gflops_per_s(frame))


def _whole_gflops_per_s(operations: pd.DataFrame) -> float:
    is_whole = (operations["strategy"] == WHOLE) & (operations["num_chunks"] == 1)
    return float(operations[is_whole & (operations["tokens"] == CALIBRATION_TOKENS)]["gflops_per_s"].iloc[0])


class _Share:
    """One device's share of a layer under a strategy, and its seconds in each round."""

    def __init__(
        self,
        config: BertConfig,
        source: WeightSource,
        strategy: str,
        num_devices: int,
        num_chunks: int,
        tokens: int,
        packs: bool,
    ):
        kind = STRATEGIES[strategy].layer_kind
        strategies = strategies_for(config, strategy if kind == "original" else WHOLE)
        plan = layer_plan("bp+auto", config, strategies, [1.0] * num_devices, num_chunks=num_chunks)
        comm = LocalComm(0, num_devices, Tape())
        self.runner = STRATEGIES[strategy](config, plan, comm, source, strategies.index(strategy), packs=packs)
        self.request = Request.of(plan, 1, tokens)
        recorder = Recorder(config, plan, tokens)
        self.chunks = [Pending(torch.randn(shape)) for shape in recorder.shapes(strategy, 0)]
        recorded = [step for part in recorder.layer(strategy, 0).segments for step in part]
        self.gflops = sum(step.flops for step in recorded if isinstance(step, Compute)) / 1e9
        self.known = {"strategy": strategy, "num_devices": num_devices, "share": STRATEGIES[strategy].share(plan, 0)}
        self.known |= {"tokens": tokens, "num_chunks": num_chunks}
        self.seconds: list[float] = []

    @torch.inference_mode()
    def time(self) -> None:
        _OTHER.sum()  # evicts the caches
        start = time.perf_counter()
        list(self.runner(self.chunks, self.request))
        self.seconds.append(time.perf_counter() - start)

    def row(self) -> dict:
        latency = min(self.seconds[WARM_ROUNDS:])
        return self.known | {"gflops": self.gflops, "latency_s": latency, "gflops_per_s": self.gflops / latency}


def host_profile(name: str, operations: pd.DataFrame) -> DeviceProfile:
    """This host's rate on a whole layer and the efficiency of its shares, from `profile_operations`."""
    memory, source = psutil.virtual_memory().total, "measured: one layer a strategy, one core, fastest round"
    rate = 1e9 * _whole_gflops_per_s(operations)
    return DeviceProfile(name, memory, rate, source, efficiency=efficiency_rows(operations))


def profile_link(cluster: EmulatedCluster, repeats: int = 3) -> tuple[LinkProfile, pd.DataFrame]:
    """Times collectives over the shaped links of two or more devices at their present rate, and fits them.

    Returns the fitted profile and the rows it was fitted to: kind, num_bytes (sent per rank), latency_s, fitted_s.
    """
    n, rows = cluster.num_devices, []
    assert n > 1 and cluster.transport == "namespaces", "there is no link to measure"
    for kind, floats in COLLECTIVE_FLOATS.items():
        for share in FIT_SHARES:
            job = dict(kind=kind, num_floats=max(1, int(floats * share)), num_devices=n, repeats=repeats)
            results = cluster.run("time_collective", **job)
            seconds = [max(r["seconds"][i] for r in results) for i in range(repeats)]
            num_bytes = max(r["bytes"] for r in results)
            rows.append((kind, num_bytes, statistics.median(seconds) / cluster.time_scale))
    frame = pd.DataFrame(rows, columns=["kind", "num_bytes", "latency_s"])
    ideal = LinkProfile(cluster.bandwidth_bps, {"*": 0.0}, {"*": 1.0}, shared=cluster.shared)
    latency, efficiency = {}, {}
    for kind, part in frame.groupby("kind"):
        # Relative errors count: a millisecond matters more on a small message than on a large one.
        weight = 1 / part["latency_s"].to_numpy()
        steps = np.full(len(part), latency_steps(kind, n), float)
        columns = np.stack([steps, [ideal.collective_s(kind, size, n) for size in part["num_bytes"]]], axis=1)
        (step_s, over_ideal), *_ = np.linalg.lstsq(columns * weight[:, None], np.ones(len(part)), rcond=None)
        latency[kind] = max(float(step_s), 0.0)
        efficiency[kind] = float(min(1.0, 1 / over_ideal))
    latency["*"], efficiency["*"] = latency["send"], efficiency["send"]
    source = f"measured on {n} devices at {cluster.bandwidth_bps / 1e6:g} Mbps ({cluster.link})"
    link = LinkProfile(cluster.bandwidth_bps, latency, efficiency, source, shared=cluster.shared)
    fitted = [link.collective_s(r.kind, r.num_bytes, n) for r in frame.itertuples()]
    return link, frame.assign(fitted_s=fitted)


def save_efficiency(path: str | Path = EFFICIENCY) -> None:
    """Measures the efficiency of shares on this host, as assumed for a device without measurements of its own.

    Writes a row per hidden size, strategy, share of the layer, tokens of the request and chunks.
    """
    frames = []
    for model in ("bert-base", "bert-large"):
        config = preset_config(model, 4, 4)
        operations = profile_operations(config, seq_lens=(32, 128, 512))
        frames.append(operations.assign(hidden_size=config.hidden_size))
    made = f"one core of {machine.cpu_model()}, torch {torch.__version__}, {machine.now()[:10]}"
    with atomic_write(path) as file:
        file.write(
            "# Rate of a share of a layer over that of the whole original layer of 128 tokens; float32, batch 1,\n"
            f"# weights fresh from memory. Measured on {made},\n"
            f"# by `python -m detransformer.cluster.profiler` at commit {provenance.commit()['commit'][:12]}.\n"
        )
        pd.concat(frames)[["hidden_size", *EFFICIENCY_COLUMNS]].round(4).to_csv(file, index=False)


if __name__ == "__main__":
    save_efficiency(*sys.argv[1:2])
