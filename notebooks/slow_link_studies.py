"""The studies of notebook 14: where decoupling pays, on links from 5 to 500 Mbps, delayed or not, and on shared media.

`predicted_rows` prices a whole grid, `measured_rows` measures part of it; both give rows with the same columns
(`COLUMNS`), distinguished by `kind`. `margins` and `crossovers` say what a decoupled model gains over the unmodified.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accuracy_studies import Outcome, ProbeConfig, outcome_of, sentence_vectors
from latency_studies import in_words, measured_bench, measured_efficiency, measured_link
from tqdm.auto import tqdm
from transformers import AutoModel

from detransformer.cluster.bench import measure_grid
from detransformer.cluster.cells import Cell
from detransformer.cluster.devices import cluster_profile, device_specs, preset_profile
from detransformer.cluster.session import EmulatedCluster
from detransformer.models.configuration import max_tokens, preset_config
from detransformer.parallel.plan import layer_plan, strategies_for
from detransformer.parallel.wire_model import wired
from detransformer.planning.cost import alone_seconds, predict
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, LinkProfile
from detransformer.record.intervals import bootstrap_median, samples_of
from detransformer.record.verdict import Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.tables.margins import ONE_DEVICE, SETTING, margins
from detransformer.training import TrainingData

COLUMNS = [
    *(*SETTING, "structure", "kind", "plan", "latency_s", "low", "high", "predicted_s", "samples_s", "repeats"),
    *("relative_error", "link_bytes", "link", "time_scale", "packet_error_ms", "device", "valid", "why_invalid"),
]
DEVICE = "rpi4b"
PAYS = 1.05  # speedup over the best plan of the unmodified model; below it, decoupling does not pay
NEAR = 0.03  # of the fastest structure's latency


def structure_of(num_original_layers: float | None) -> str:
    """A model's name in tables: `original`, or such as `Nb=4`."""
    return "original" if pd.isna(num_original_layers) else f"Nb={int(num_original_layers)}"


# Rows -------------------------------------------------------------------------------------------------------------


def predicted_rows(
    run_path: str | Path,
    model: str,
    structures: Sequence[int | None],
    bandwidths_mbps: Sequence[float],
    delays_ms: Sequence[float],
    wires: Sequence[str],
    device_counts: Sequence[int],
    paces: Sequence[str],
    shared: Sequence[bool] = (False,),
) -> pd.DataFrame:
    """The planner's best plan and its price for each structure (Nb; None: unmodified) and setting, and one device.

    A plan may leave devices out, so the unmodified model is never slower than on one device.
    """
    link, efficiency = measured_link(Path(run_path) / "profiles"), measured_efficiency(run_path).get(model)
    rows = []
    settings = itertools.product(device_counts, bandwidths_mbps, delays_ms, shared, paces)
    for count, mbps, delay_ms, on_one_air, pace in settings:
        specs = device_specs(count, DEVICE)
        for layers in structures:
            config = preset_config(model, layers, 4)
            profile = cluster_profile(specs, config, 1e6 * mbps, delay_ms / 1e3, link, pace, efficiency, on_one_air)
            common = dict(model=model, num_devices=count, bandwidth_mbps=mbps, delay_ms=delay_ms, shared=on_one_air)
            common |= dict(pace=pace, kind="predicted", device=profile.devices[0].name, valid=True)
            for wire in wires:
                best = place_freely(config, profile, wires=(wire,)).chosen
                named = dict(structure=structure_of(layers), wire=wire, plan=in_words(best.plan))
                rows.append(common | named | {"latency_s": best.latency_s, "predicted_s": best.latency_s})
                if layers is None:
                    (alone_s,) = alone_seconds(config, profile, [0], 128)
                    named = dict(structure=ONE_DEVICE, wire=wire, plan=ONE_DEVICE)
                    rows.append(common | named | {"latency_s": alone_s, "predicted_s": alone_s})
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def measured_rows(run_path: str | Path, model: str, groups: Sequence[Mapping], repeats: int) -> pd.DataFrame:
    """Rows of emulated devices; `groups` are arguments of `measured_group`.

    Measured rows are kept in `slow_link_rows.json` in the run's folder; an interrupted call resumes there.
    """
    saved = Path(run_path) / "slow_link_rows.json"
    frames = [measured_group(run_path, saved, model, repeats=repeats, **group) for group in groups]
    saved.unlink(missing_ok=True)
    frame = pd.concat(frames, ignore_index=True).assign(kind="emulated")
    intervals = [bootstrap_median(samples_of(samples)) for samples in frame["samples_s"]]
    frame["low"], frame["high"] = zip(*intervals, strict=True)
    return frame.reindex(columns=COLUMNS)


def measured_group(
    run_path: str | Path,
    saved: Path,
    model: str,
    structures: Sequence[int | None],
    bandwidths_mbps: Sequence[float],
    wires: Sequence[str],
    num_devices: int,
    repeats: int,
    delay_ms: float = 0.0,
    shared: bool = False,
) -> pd.DataFrame:
    """One device, and the planner's best plan for each structure and wire format, in turn at each bandwidth.

    `saved` is the file in which measured rows are kept.
    """
    cells = []
    for mbps in bandwidths_mbps:
        cells.append(Cell(model, "single", num_devices, mbps, repeats=repeats))
        for layers, wire in itertools.product(structures, wires):
            method, original_layers = ("auto", 4) if layers is None else ("bp+auto", layers)
            cells.append(Cell(model, method, num_devices, mbps, original_layers, wire=wire, repeats=repeats))
    links = dict(bandwidth_bps=1e6 * bandwidths_mbps[0], delay_s=delay_ms / 1e3, shared=shared)
    with EmulatedCluster(num_devices, DEVICE, **links) as cluster:
        frame = measure_grid(measured_bench(run_path, cluster), cells, saved)
    named = frame["num_original_layers"].map(structure_of).where(frame["method"] != "single", ONE_DEVICE)
    taken = frame["num_devices"].map(lambda n: f" on {n} device{'s' if n > 1 else ''}")
    return frame.assign(structure=named, plan=frame["plan"] + taken, num_devices=num_devices, shared=shared)


# Findings -------------------------------------------------------------------------------------------------------------


def crossovers(table: pd.DataFrame) -> pd.DataFrame:
    """The rates between which a decoupled structure pays (`PAYS`): `from_mbps`, below which one device wins, `to_mbps`.

    Interpolated between the grid's rates by their logarithm; 0 and infinite if it pays at the slowest and the fastest
    rate, both 0 if it pays at none.
    """
    keys, made = [name for name in SETTING if name != "bandwidth_mbps"], []
    for key, part in table.groupby([*keys, "kind", "structure"], sort=False):
        part = part.sort_values("bandwidth_mbps")
        rates, gain = np.log(part["bandwidth_mbps"].to_numpy()), part["margin"].to_numpy() - PAYS
        own = dict(zip([*keys, "kind", "structure"], key, strict=True)) | {"num_rates": len(part)}
        pays = np.flatnonzero(gain >= 0)
        if not len(pays):
            made.append(own | {"from_mbps": 0.0, "to_mbps": 0.0})
            continue
        first, last = pays[0], pays[-1]
        low = _zero(rates, gain, first - 1) if first else 0.0
        made.append(own | {"from_mbps": low, "to_mbps": _zero(rates, gain, last) if last + 1 < len(gain) else math.inf})
    return pd.DataFrame(made)


def _zero(rates: np.ndarray, gain: np.ndarray, place: int) -> float:
    """The rate at which the line from `place` to the next place crosses zero."""
    share = gain[place] / (gain[place] - gain[place + 1])
    return math.exp(rates[place] + share * (rates[place + 1] - rates[place]))


def beside(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows with the prediction for the same plan, and the prediction's error."""
    measured = rows[(rows["kind"] == "emulated") & rows["valid"].astype(bool)]
    return measured.assign(error=measured["predicted_s"] / measured["latency_s"] - 1)


def planner_choices(rows: pd.DataFrame) -> pd.DataFrame:
    """For each measured setting the structure that is predicted to be the fastest (`planned`), and the measured one.

    Structures are compared `among` all, and without Nb=1, which wins nearly everywhere. `excess` is the measured
    latency of the planned structure over that of the fastest one, minus 1.
    """
    measured, made = beside(rows), []
    keys = [name for name in SETTING if name != "wire"]
    for key, group in measured.groupby(keys, sort=False):
        is_alone = group["structure"] == ONE_DEVICE
        for wire, part in group[~is_alone].groupby("wire", sort=False):
            for left_out, among in ((None, "all"), ("Nb=1", "without Nb=1")):
                cells = pd.concat([group[is_alone].head(1), part[part["structure"] != left_out]], ignore_index=True)
                planned, fastest = (cells.loc[cells[name].idxmin()] for name in ("predicted_s", "latency_s"))
                found = dict(planned=planned["structure"], fastest=fastest["structure"])
                found["excess"] = planned["latency_s"] / fastest["latency_s"] - 1
                made.append(dict(zip(keys, key, strict=True)) | {"wire": wire, "among": among} | found)
    return pd.DataFrame(made, columns=[*keys, "wire", "among", "planned", "fastest", "excess"])


def slow_link_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """This repository's claims about slow links, not the paper's: Nb=1's margins as predicted and as measured.

    On four devices at 10, 25 and 500 Mbps, and with delay or on one medium at 50, if those were measured.
    """
    table, errors = margins(rows), beside(rows)["error"].abs()
    table = table[(table["structure"] == "Nb=1") & (table["num_devices"] == 4) & (table["pace"] == "measured")]
    is_plain = (table["delay_ms"] == 0) & ~table["shared"].astype(bool)
    table = table[table["bandwidth_mbps"].isin([10, 25, 500]).where(is_plain, table["bandwidth_mbps"] == 50)]
    predicted = table[table["kind"] == "predicted"].set_index(SETTING)["margin"]
    verdicts = []
    for row in table[table["kind"] == "emulated"].to_dict("records"):
        expected = predicted.get(tuple(row[name] for name in SETTING), math.nan)
        where = f"{row['bandwidth_mbps']:g} Mbps, {row['wire']}"
        where += f", {row['delay_ms']:g} ms" * (row["delay_ms"] > 0) + ", shared" * bool(row["shared"])
        bounds = dict(low=row["margin_low"], high=row["margin_high"], neutral=1.0, tested=expected == expected)
        claim = "Nb=1 over the best plan of the unmodified model"
        verdicts.append(Verdict(claim, expected, row["margin"], "emulated", where, **bounds))
    for among, cells in planner_choices(rows).groupby("among", sort=False):
        claim, where = f"the planned structure is within {NEAR:.0%} of the fastest", f"{len(cells)} settings, {among}"
        verdicts.append(Verdict(claim, 0.9, (cells["excess"] <= NEAR).mean(), "emulated", where, side="at least"))
    priced = "median error of a plan's price", 0.1, errors.median(), "emulated", "all measured rows"
    verdicts.append(Verdict(*priced, side="at most"))
    return verdict_table(verdicts)


# Coarser messages -----------------------------------------------------------------------------------------------------


def wire_outcomes(
    teacher: str | Path,
    tasks: Mapping[str, ProbeConfig],
    data: TrainingData,
    plans: Sequence[Sequence[str]],
    num_texts: int,
) -> tuple[pd.DataFrame, dict[str, dict[str, Outcome]]]:
    """What an unmodified encoder on four devices loses, untrained, if its original layers' messages are coarser.

    Each of `plans` names a strategy and a format. Texts are run one at a time, like requests: a padding token would be
    averaged into its segment. Returns a row a plan, on `num_texts` texts: bytes that a device sends, the reduction
    factor against float32, and the RMS of the output's difference over the output's RMS; and the probes' outcomes.
    """
    model = AutoModel.from_pretrained(teacher).eval()
    texts = data.task("SQuAD").validation["context"][:num_texts]
    exact = _hidden(model, texts, data)
    rows, outcomes = [], {ONE_DEVICE: probed(model, tasks, data)}
    profile = ClusterProfile((preset_profile(DEVICE, model.config),) * 4, LinkProfile(1e6))  # any: bytes count
    for strategy, wire in tqdm(plans, unit="plan", desc="messages"):
        plan = layer_plan("auto", model.config, strategies_for(model.config, strategy), [1.0] * 4, wire)
        with wired(model, plan):
            hidden = _hidden(model, texts, data)
            outcomes[f"{strategy}, {wire}"] = probed(model, tasks, data)
        error = math.sqrt(sum(float((h - e).square().sum()) for h, e in zip(hidden, exact, strict=True)))
        size = math.sqrt(sum(float(e.square().sum()) for e in exact))
        sent, plain = (
            sum(sum(predict(model.config, each, profile, len(e)).bytes.values()) for e in exact)
            for each in (plan, replace(plan, wire="float32"))
        )
        row = dict(strategy=strategy, wire=wire, num_devices=4, relative_error=error / size)
        mean_tokens = sum(map(len, exact)) / len(exact)
        rows.append(row | dict(sent_kib=sent / len(exact) / 2**10, over_float32=plain / sent, mean_tokens=mean_tokens))
    return pd.DataFrame(rows), outcomes


def probed(model, tasks: Mapping[str, ProbeConfig], data: TrainingData) -> dict[str, Outcome]:
    """The probes of `accuracy_studies`, with texts run one at a time."""

    def read(seq_len: int, texts: Sequence[str]) -> np.ndarray:
        return sentence_vectors(model, texts, data, seq_len, batch_size=1)

    return {name: outcome_of(partial(read, task.seq_len), name, task, data) for name, task in tasks.items()}


@torch.no_grad()
def _hidden(model, texts: Sequence[str], data: TrainingData) -> list[torch.Tensor]:
    """The last hidden state [T, D] of each text."""
    rows = [torch.tensor([e.ids[: max_tokens(model.config)]]) for e in data.tokenizer.encode_batch(list(texts))]
    return [model(ids).last_hidden_state[0] for ids in rows]
