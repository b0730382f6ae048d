"""The studies of notebooks 04 to 09 on latency: the rows of the paper's tables and figures, and the link's profile.

Each function returns a frame in the form of its saved table; the notebooks argue, this module lists and measures.
"""

import itertools
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.utils.benchmark import Timer
from transformers import AutoModel

from detransformer.answers import random_tokens
from detransformer.cluster.bench import Bench, measure_grid, timelines
from detransformer.cluster.cells import Cell, grid
from detransformer.cluster.checkpoints import original_checkpoint
from detransformer.cluster.devices import (
    DEVICES,
    EFFICIENCY,
    DeviceSpec,
    cluster_profile,
    device_specs,
    efficiency_rows,
    host_efficiency,
    preset_profile,
)
from detransformer.cluster.profiler import profile_link
from detransformer.cluster.session import EmulatedCluster
from detransformer.machine import now
from detransformer.models.configuration import preset_config
from detransformer.parallel.methods import METHODS
from detransformer.parallel.plan import Plan, published_plan
from detransformer.planning.cost import alone_seconds, predict
from detransformer.planning.placement import place, place_freely
from detransformer.planning.profile import SENT_KINDS, ClusterProfile, LinkProfile
from detransformer.record.intervals import bootstrap_ratio, samples_of
from detransformer.record.published import published_claim

DEVICE = "rpi4b"  # of all predictions here
SCALING_MBPS = 500  # Table II and Figs. 2b, 7c,d
CORES = {"AVX-512": EFFICIENCY, "AVX2": EFFICIENCY.with_name("efficiency-avx2.csv")}  # of an AMD EPYC

# --- Notebook 04: one device, and links --------------------------------------------------------------------------


def single_device_rows(cluster: EmulatedCluster, models: Sequence[str], repeats: int) -> pd.DataFrame:
    """Fig. 2a: published, emulated and this host's single-device latency of each model, seq 128, batch 1."""
    device = DEVICES[cluster.devices[0].preset]
    emulated = measure_grid(Bench(cluster), [Cell(m, "single", 1, repeats=repeats) for m in models])
    rows = []
    for model, latency in zip(models, emulated["latency_s"], strict=True):
        published = published_claim(device.latency_claims[model])
        rows.append((model, device.name, published, "published"))
        rows.append((model, cluster.profile_name, latency, "measured"))
        rows.append((model, "this host, one core", host_latency(model, repeats), "measured"))
    return pd.DataFrame(rows, columns=["model", "device", "latency_s", "kind"])


@torch.inference_mode()
def host_latency(model: str, repeats: int) -> float:
    """Median seconds of one forward pass of a preset model on one core of this host; seq 128, batch 1."""
    loaded = AutoModel.from_pretrained(original_checkpoint(model).path).eval()
    inputs = random_tokens(loaded.config, 128)
    timer = Timer("loaded(**inputs)", globals={"loaded": loaded, "inputs": inputs}, num_threads=1)
    return statistics.median(timer.timeit(1).mean for _ in range(repeats))  # each after two passes to warm up


def save_profiles(
    folder: str | Path, cluster: EmulatedCluster, models: Sequence[str], num_original_layers: int, num_divisions: int
) -> pd.DataFrame:
    """Profiles the links as set, writes one profile a model to `folder`, and returns the links' rows.

    Modelled links cannot be measured: the assumed figures are written, and labelled so.
    """
    if cluster.transport == "namespaces":
        link, rows = profile_link(cluster)
    else:
        link = LinkProfile(cluster.bandwidth_bps)
        rows = pd.DataFrame({"kind": SENT_KINDS, "num_bytes": 0, "latency_s": None})
        rows["fitted_s"] = [link.collective_s(kind, 0, cluster.num_devices) for kind in SENT_KINDS]
    provenance = {"date": now(), "host": platform.platform()}
    for model in models:
        config = preset_config(model, num_original_layers, num_divisions)
        cluster.profile(config, link).save(Path(folder) / f"{model}.json", provenance | {"model": model})
    rows = rows.assign(num_devices=cluster.num_devices, bandwidth_mbps=cluster.bandwidth_bps / 1e6, link=cluster.link)
    return rows.assign(source=link.source)


# --- Results of notebook 04 for later notebooks --------------------------------------------------------------------


def measured_link(profiles: str | Path, model: str = "*") -> LinkProfile | None:
    """The link's figures in a folder written by `save_profiles`, for `model` or any; None if there are none."""
    path = next(iter(sorted(Path(profiles).glob(f"{model}.json"))), None)
    return ClusterProfile.load(path).link if path else None


def measured_efficiency(run_path: str | Path) -> dict[str, tuple]:
    """The efficiency of shares of each model's layers on this host, as measured by notebook 04 of the run; by model.

    Of notebook 04's two weight layouts, packed is the one that executors run.
    """
    path = Path(run_path) / "tables" / "profile.csv"
    if not path.is_file():
        return {}
    packed = pd.read_csv(path).query("weights == 'packed'")
    return {model: efficiency_rows(rows) for model, rows in packed.groupby("model")}


def measured_bench(run_path: str | Path, cluster: EmulatedCluster, time_scale: float | None = None) -> Bench:
    """A bench on `cluster` with links and efficiency of shares as measured by notebook 04 of the run."""
    link = measured_link(Path(run_path) / "profiles")
    return Bench(cluster, link, time_scale, efficiency=measured_efficiency(run_path))


def on_testbed(profile: ClusterProfile, time_scale: float) -> ClusterProfile:
    """`profile` as seen at `time_scale`: latency is software's, which is not slowed, so it looks smaller."""
    steps = {kind: seconds / time_scale for kind, seconds in profile.link.step_latency_s.items()}
    return replace(profile, link=replace(profile.link, step_latency_s=steps))


# --- Notebook 05: predictions --------------------------------------------------------------------------------------


def placement_table(
    profiles: str | Path,
    models: Sequence[str],
    bandwidths_mbps: Sequence[float],
    num_devices: int = 4,
    num_original_layers: int = 4,
    num_divisions: int = 4,
    memory_budget_mib: float | None = None,
) -> pd.DataFrame:
    """The paper's three plans for each model and bandwidth: predicted seconds, memory, the chosen plan and why not."""
    budget = None if memory_budget_mib is None else int(memory_budget_mib * 2**20)
    efficiency, specs, tables = measured_efficiency(Path(profiles).parent), device_specs(num_devices, DEVICE), {}
    for model in models:
        config = preset_config(model, num_original_layers, num_divisions)
        measured = dict(link=measured_link(profiles, model), efficiency=efficiency.get(model))
        for mbps in bandwidths_mbps:
            profile = cluster_profile(specs, config, mbps * 1e6, **measured)
            tables[model, num_devices, mbps] = place(config, profile, memory_budget_bytes=budget).table()
    keys = ["model", "num_devices", "bandwidth_mbps"]
    return pd.concat(tables, names=keys).reset_index(keys).reset_index(drop=True)


def collective_counts(model: str, num_original_layers: int, num_divisions: int, num_devices: int = 4) -> pd.DataFrame:
    """Collectives of one request under each method (Section IV-C-1), by the cost model; the bench counts the same."""
    rows = []
    for method in ("tp", "sp", "ulysses", "galaxy", "bp+tp", "bp+sp", "bp+allgather", "bp+ulysses", "bp+heads"):
        config = preset_config(model, num_original_layers if method.startswith("bp") else None, num_divisions)
        plan = published_plan(method, config, [1.0] * num_devices)
        profile = ClusterProfile((preset_profile(DEVICE, config),) * num_devices, LinkProfile(125e6))
        prediction = predict(config, plan, profile)
        counts = {kind: prediction.counts.get(kind, 0) for kind in SENT_KINDS if kind != "send"}
        sent = sum(prediction.bytes.values()) / 2**20
        rows.append({"model": model, "method": method, **counts, "sent_mib": sent})
    return pd.DataFrame(rows)


# --- Notebooks 06 to 08: rows on clean links -----------------------------------------------------------------------


def latency_cells(
    models: Sequence[str],
    methods: Sequence[str],
    bandwidths_mbps: Sequence[float],
    repeats: int,
    scaling_devices: Sequence[int] = (),
    scaling_methods: Sequence[str] = ("tp", "sp", "bp+auto"),
    fewer_original_layers: Sequence[int] = (),
    table_ii_methods: Sequence[str] = (),
    wire_formats: Sequence[str] = (),
    wire_methods: Sequence[str] = ("tp", "ulysses", "bp+auto"),
    wire_bandwidths_mbps: Sequence[float] = (),
    roofline_bandwidths_mbps: Sequence[float] = (),
) -> list[Cell]:
    """A grid of rows of notebooks 06 to 08 on clean links, model by model; rows not named are left out.

    Table IV and Figs. 7a,b: `methods` (["all"] for every one) x `bandwidths_mbps` on 4 devices. Figs. 2b and 7c,d:
    `scaling_methods` over other numbers of devices at one bandwidth; above 4 with as many divisions as devices. Fig. 8:
    BP+Auto with fewer original layers. Table II: data and pipeline parallelism at that one bandwidth. Beyond the paper:
    `wire_methods` with other wire formats; `methods` by the roofline pace.
    """
    methods = list(METHODS) if list(methods) == ["all"] else methods
    common, cells = dict(repeats=repeats), []
    for model in models:
        cells += grid(model, ["single"], [SCALING_MBPS], 4, **common)
        cells += grid(model, [m for m in methods if m != "single"], bandwidths_mbps, 4, **common)
        cells += grid(model, methods, roofline_bandwidths_mbps, 4, pace="roofline", **common)
        cells += grid(model, table_ii_methods, [SCALING_MBPS], 4, **common)
        for layers in fewer_original_layers:
            cells += grid(model, ["bp+auto"], bandwidths_mbps, 4, num_original_layers=layers, **common)
        for wire in wire_formats:
            cells += grid(model, wire_methods, wire_bandwidths_mbps, 4, wire, **common)
        for count in scaling_devices:
            divisions = max(count, 4)
            cells += grid(model, scaling_methods, [SCALING_MBPS], count, num_divisions=divisions, **common)
    return list(dict.fromkeys(cells))


def measure_latency(
    run_path: str | Path, cells: Sequence[Cell], transport: str = "auto"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measures `cells` on emulated clusters of 4 devices, or more if a cell needs them.

    The cost model uses notebook 04's profile if the run has it. Rows are kept in `latency_rows.json` in the run's
    folder; an interrupted run resumes there. Returns the rows in the cells' order, and the timelines of the first
    model's plain rows at the lowest bandwidth, in seconds from each request's start.
    """
    run_path = Path(run_path)
    cells = list(dict.fromkeys(cells))
    lowest = min(cell.bandwidth_mbps for cell in cells)
    plain = dict(model=cells[0].model, bandwidth_mbps=lowest, num_devices=4, wire="float32")
    plain |= dict(num_original_layers=4, num_divisions=4, pace=cells[0].pace)

    rows_path = run_path / "latency_rows.json"
    rows = {}
    for size in sorted({max(4, cell.num_devices) for cell in cells}):
        part = [cell for cell in cells if max(4, cell.num_devices) == size]
        with EmulatedCluster(size, bandwidth_bps=part[0].bandwidth_mbps * 1e6, transport=transport) as cluster:
            frame = measure_grid(measured_bench(run_path, cluster), part, rows_path)
        rows |= dict(zip(part, frame.to_dict("records"), strict=True))
    rows_path.unlink()
    frame = pd.DataFrame([rows[cell] for cell in cells])
    is_plain = [all(getattr(cell, name) == value for name, value in plain.items()) for cell in cells]
    return frame.drop(columns="timeline"), timelines(frame[is_plain])


def overlap_rows(
    run_path: str | Path,
    model: str,
    methods: Sequence[str] = ("tp", "bp+heads", "bp+auto", "auto"),
    bandwidth_mbps: float = 125,
    repeats: int = 10,
) -> pd.DataFrame:
    """The cost of messages beside compute on one core: two devices that sleep, and that compute all the time.

    Each device has its own core for its products and for all threads that send and receive, and runs at its own speed
    (time scale 1). If it sleeps once the host has done its products, messages have the core for themselves; if it goes
    on computing until the segment's time has passed, as a real device does, they share it.
    Columns: model, method, plan, num_devices, bandwidth_mbps, asleep_s, busy_s, cost (busy_s over asleep_s, minus 1)
    and its 95% interval, the samples, valid.
    """
    cells = [
        Cell(model, method, 2, bandwidth_mbps, repeats=repeats, burns=burns)
        for method in methods
        for burns in (False, True)
    ]
    rows_path = Path(run_path) / "overlap_rows.json"
    with EmulatedCluster(2, bandwidth_bps=bandwidth_mbps * 1e6, pins=True) as cluster:
        frame = measure_grid(measured_bench(run_path, cluster, time_scale=1.0), cells, rows_path)
    rows_path.unlink()
    rows = []
    for method, pair in frame.groupby("method", sort=False):
        asleep, busy = pair[~pair["burns"]].iloc[0], pair[pair["burns"]].iloc[0]
        low, high = bootstrap_ratio(samples_of(busy["samples_s"]), samples_of(asleep["samples_s"]))
        row = {"model": model, "method": method, "plan": busy["plan"], "num_devices": 2}
        row |= {"bandwidth_mbps": bandwidth_mbps, "asleep_s": asleep["latency_s"], "busy_s": busy["latency_s"]}
        row |= {"cost": busy["latency_s"] / asleep["latency_s"] - 1, "low": low - 1, "high": high - 1}
        row |= {"asleep_samples_s": asleep["samples_s"], "busy_samples_s": busy["samples_s"]}
        reasons = [r["why_invalid"] for r in (asleep, busy) if r["why_invalid"]]
        rows.append(row | {"valid": not reasons, "why_invalid": "; ".join(reasons)})
    return pd.DataFrame(rows)


def gains_by_core(
    run_path: str | Path, model: str, bandwidths_mbps: Sequence[float], num_original_layers: Sequence[int] = (4, 1)
) -> pd.DataFrame:
    """What decoupling gains over the best plan of the unmodified model, as priced, by the core that sets the pace.

    A core is one on which shares of layers were timed: this run's, or one of `CORES`; `none` is the roofline pace.
    """
    link, own = measured_link(Path(run_path) / "profiles"), measured_efficiency(run_path).get(model)
    hidden_size, specs = preset_config(model).hidden_size, device_specs(4, DEVICE)
    cores = {} if own is None else {"this run's": own}
    cores |= {core: host_efficiency(hidden_size, path) for core, path in CORES.items()} | {"none": ()}

    def priced(layers: int | None, mbps: float, efficiency: Sequence) -> float:
        config = preset_config(model, layers, 4)
        profile = cluster_profile(specs, config, 1e6 * mbps, link=link, efficiency=efficiency)
        return place_freely(config, profile).chosen.latency_s

    rows = []
    for (core, efficiency), mbps in itertools.product(cores.items(), bandwidths_mbps):
        unmodified_s = priced(None, mbps, efficiency)
        for layers in num_original_layers:
            decoupled_s = priced(layers, mbps, efficiency)
            row = dict(model=model, core=core, bandwidth_mbps=mbps, num_original_layers=layers, kind="predicted")
            row |= dict(unmodified_s=unmodified_s, decoupled_s=decoupled_s, gain=unmodified_s / decoupled_s)
            rows.append(row)
    return pd.DataFrame(rows)


# --- Notebooks 08 and 09: predictions ------------------------------------------------------------------------------


def in_words(plan: Plan) -> str:
    """A described plan and its number of devices."""
    return f"{plan.describe()} on {plan.num_devices} device{'s' if plan.num_devices > 1 else ''}"


def plan_map_rows(
    run_path: str | Path,
    models: Sequence[str],
    bandwidths_mbps: Sequence[float],
    seq_lens: Sequence[int],
    device_counts: Sequence[int],
) -> pd.DataFrame:
    """The chosen plan for each bandwidth, length and number of devices (Nb=4, Ndiv=4); nothing is measured."""
    rows = []
    efficiency, link = measured_efficiency(run_path), measured_link(Path(run_path) / "profiles")
    for model in models:
        config, measured = preset_config(model, 4, 4), dict(link=link, efficiency=efficiency.get(model))
        for count, mbps, length in itertools.product(device_counts, bandwidths_mbps, seq_lens):
            profile = cluster_profile(device_specs(count, DEVICE), config, 1e6 * mbps, **measured)
            best = place_freely(config, profile, seq_len=length).chosen
            rows.append((model, count, mbps, length, in_words(best.plan), best.prediction.latency_s, "predicted"))
    columns = ["model", "num_devices", "bandwidth_mbps", "seq_len", "plan", "predicted_s", "kind"]
    return pd.DataFrame(rows, columns=columns)


def scale_out_rows(
    models: Sequence[str], device_counts: Sequence[int], seq_lens: Sequence[int], bandwidths_mbps: Sequence[float]
) -> pd.DataFrame:
    """Predictions beyond this machine: one request, models with as many divisions as devices, at least 4.

    One layer in three is original. `speedup` is over one such device with the original model, whether or not it fits
    the memory; `fits` says whether the plan does. Memory does not exclude a plan: `memory_bytes` is the need of the
    fullest device.
    """
    rows = []
    for model in models:
        original = preset_config(model)
        for count, length, mbps in itertools.product(device_counts, seq_lens, bandwidths_mbps):
            if length > original.max_position_embeddings:
                continue
            config = preset_config(model, original.num_hidden_layers // 3, max(4, count))
            one = DeviceSpec(DEVICE).on(config)
            roomy = replace(one, memory_bytes=2**50)
            profile = ClusterProfile((roomy,) * count, LinkProfile(1e6 * mbps))
            (single,) = alone_seconds(original, profile, [0], length)
            best = place_freely(config, profile, seq_len=length).chosen
            memory = max(best.prediction.memory_bytes)
            rows.append(
                dict(model=model, num_devices=count, seq_len=length, bandwidth_mbps=mbps, plan=in_words(best.plan))
                | dict(predicted_s=best.prediction.latency_s, single_s=single, kind="predicted", device=one.name)
                | dict(speedup=single / best.prediction.latency_s, memory_bytes=memory, fits=memory <= one.memory_bytes)
            )
    return pd.DataFrame(rows)
