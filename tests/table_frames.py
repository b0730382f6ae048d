"""Bench rows and Table III made up by a small rule, for the tests of tables."""

import itertools

import numpy as np
import pandas as pd

from detransformer.record.published import published
from detransformer.tables.accuracy import METRICS, ROW_COLUMNS, published_cells, structure_names

BANDWIDTHS = (1000, 750, 500, 250, 125)
SINGLE_S = {"bert-base": 1.57, "bert-large": 4.48}
# Megabits a method moves for one request; any order that TP > SP > BP will do.
MEGABITS = {
    "tp": 110, "sp": 80, "ulysses": 50, "galaxy": 115, "dtensor": 112, "pp": 6, "auto": 21, "bp+tp": 45, "bp+sp": 40,
    "bp+allgather": 42, "bp+ulysses": 21, "bp+heads": 22, "bp+paper": 40, "bp+auto": 20, "bp+narrow": 39,
}  # fmt: skip
PUBLISHED = ("tp", "sp", "bp+tp", "bp+sp", "bp+allgather", "bp+paper", "bp+auto")
WIRE = {"float32": (1.0, 1e-7), "bfloat16": (0.5, 4e-3), "int8": (0.26, 1.2e-2)}  # share of the bytes, output error
WAIT_S = 0.01


def communication_s(method: str, bandwidth_mbps: float, wire: str = "float32", link: str = "line-rate") -> float:
    return MEGABITS[method] / bandwidth_mbps * WIRE[wire][0] * (2 if link == "modelled" else 1)


def row(model: str, method: str, bandwidth_mbps: float = 500, link: str = "line-rate", **fields) -> dict:
    """One valid row of the bench; `fields` replace columns (num_devices, wire, num_original_layers, ...)."""
    block, single = method.startswith("bp"), method == "single"
    fields = dict(num_devices=1 if single else 4, wire="float32", num_original_layers=4) | fields
    devices = fields["num_devices"]
    alone = SINGLE_S[model]
    compute = alone if method in ("single", "dp", "pp") else 1.05 * alone / devices
    comm = 0.0 if single or method == "dp" else communication_s(method, bandwidth_mbps, fields["wire"], link)
    comm *= fields["num_original_layers"] / 4 if block else 1
    wait = 0.0 if single else WAIT_S
    latency = compute + comm + wait
    weights = 4e8 if method in ("single", "dp", "sp", "ulysses") else 1.2e8
    made = dict(
        model=model, method=method, plan=f"12 {method}", num_devices=devices, bandwidth_mbps=bandwidth_mbps, link=link,
        seq_len=128, batch_size=1, attention_width="narrow" if method == "bp+narrow" else "full", latency_s=latency,
        compute_s=compute, comm_s=comm, wait_s=wait, num_divisions=max(4, devices) if block else np.nan,
        throughput_rps=(devices if method == "dp" else 1) / latency, weights_bytes=weights,
        peak_rss_bytes=1.1 * weights, limit_s=alone / devices, over_limit=latency / (alone / devices),
        all_gather_count=0, all_reduce_count=24 if method == "tp" else 0,
        all_reduce_bytes=24e6 if method == "tp" else 0, all_to_all_count=16 if method == "bp+auto" else 0,
        relative_error=WIRE[fields["wire"]][1], max_abs_error=10 * WIRE[fields["wire"]][1],
        predicted_s=1.02 * latency, repeats=2, time_scale=4.0, pace="roofline", samples_s="", valid=True,
        why_invalid="",
    )  # fmt: skip
    made |= fields
    made["num_original_layers"] = fields["num_original_layers"] if block else np.nan
    return made


def latency_rows(links=("line-rate", "modelled")) -> pd.DataFrame:
    """Both models, five bandwidths; the paper's methods over every link, the others over the first."""
    rows = []
    for model in SINGLE_S:
        rows.append(row(model, "single"))
        for link, bandwidth in itertools.product(links, BANDWIDTHS):
            methods = MEGABITS if link == links[0] else PUBLISHED
            rows += [row(model, method, bandwidth, link) for method in methods]
        link = links[0]
        rows += [row(model, "dp", link=link)]
        scaled = itertools.product(("tp", "sp", "bp+paper", "bp+auto"), (2, 3, 8))
        rows += [row(model, method, 500, link, num_devices=count) for method, count in scaled]
        rows += [row(model, "bp+auto", b, link, num_original_layers=nb) for nb in (1, 2, 3) for b in BANDWIDTHS]
        compressed = itertools.product(("tp", "ulysses", "bp+auto"), ("bfloat16", "int8"))
        rows += [row(model, method, 125, link, wire=wire) for method, wire in compressed]
    return pd.DataFrame(rows)


SPREAD = 1.5  # standard deviation of three seeds: the middle one, and 1.5 points to both sides
TASKS = pd.DataFrame(dict(
    task=list(METRICS), metric=list(METRICS.values()), majority_score=[0.0, 50.0, 62.0, 35.0, 0.0],
    eval_rows=[1043, 872, 408, 9815, 10570],
))  # fmt: skip
STRUCTURE = dict(attention_width="full", original_placement="last")


def with_seeds(rows: pd.DataFrame, num_seeds: int) -> pd.DataFrame:
    """The rows of BERT-Base, once for each seed."""
    return rows[rows["model"] == "bert-base"].merge(pd.DataFrame({"seed": range(num_seeds)}), "cross")


def accuracy_rows(num_seeds: int = 3, **fields) -> pd.DataFrame:
    """Fine-tuning runs of every published row of BERT-Base: 0.8 times the published score, seeds `SPREAD` apart."""
    rows = with_seeds(published_cells(published("table_iii"), list(METRICS)).merge(TASKS, on="task"), num_seeds)
    score = 0.8 * rows.pop("published") + SPREAD * (rows["seed"] - (num_seeds - 1) / 2)
    made = dict(score=score, train_rows=3000, source="mirror", note="made up", pretraining="tiny")
    return rows.assign(**made | STRUCTURE | fields)


def pretraining_rows(num_seeds: int = 1) -> pd.DataFrame:
    """Pre-training of every published row of BERT-Base: more original layers, fewer divisions, less loss."""
    rows = with_seeds(published_cells(published("table_iii"), ["MLM"])[ROW_COLUMNS], num_seeds)
    num_original, num_divisions = rows["num_original_layers"].fillna(6), rows["num_divisions"].fillna(1)
    loss = 4 - 0.05 * num_original + 0.03 * num_divisions + 0.01 * rows["seed"]
    label = [f"bert-base {name}" for name in structure_names(rows)]
    made = dict(row=label, unigram_loss=5.0, unigram_perplexity=np.exp(5.0), valid_loss=loss, perplexity=np.exp(loss))
    return rows.assign(**made | STRUCTURE, tokens=10**6, hidden_size=128, source="mirror")
