"""Bench rows, timelines and Table III made up by a small rule, for the tests of tables and figures."""

import itertools

import numpy as np
import pandas as pd

from detransformer.record.published import published

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
    """One valid row of the bench; `fields` replace columns (num_devices, wire, reads, num_original_layers, ...)."""
    block, single = method.startswith("bp"), method == "single"
    fields = dict(num_devices=1 if single else 4, wire="float32", reads="all", num_original_layers=4) | fields
    devices = fields["num_devices"]
    alone = SINGLE_S[model] * (0.95 if fields["reads"] == "cls" else 1)
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
        predicted_s=1.02 * latency, repeats=2, time_scale=4.0, valid=True, why_invalid="",
    )  # fmt: skip
    made |= fields
    made["num_original_layers"] = fields["num_original_layers"] if block else np.nan
    return made


def latency_rows(links=("line-rate", "modelled")) -> pd.DataFrame:
    """Both models, five bandwidths; the paper's methods over every link, the others over the first."""
    rows = []
    for model in SINGLE_S:
        rows += [row(model, "single"), row(model, "single", reads="cls")]
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
        rows += [row(model, method, 125, link, reads="cls") for method in ("tp", "bp+auto")]
    return pd.DataFrame(rows)


def timeline_rows(methods=("pp", "tp", "sp", "bp+auto")) -> pd.DataFrame:
    """Four devices, six times compute, wait and one collective; a pipeline sends instead."""
    kinds = {"pp": "send", "tp": "all_reduce", "sp": "all_gather", "bp+auto": "all_to_all"}
    events = []
    for method, rank, step in itertools.product(methods, range(4), range(6)):
        start, wait = 0.2 * step, 0.01 * (3 - rank)
        events.append((method, rank, "compute", start, start + 0.1 - wait))
        events += [(method, rank, "wait", start + 0.1 - wait, start + 0.1)] if wait else []
        events.append((method, rank, kinds[method], start + 0.1, start + 0.2))
    frame = pd.DataFrame(events, columns=["method", "rank", "what", "start_s", "stop_s"])
    place = dict(model="bert-base", wire="float32", reads="all", link="line-rate", bandwidth_mbps=125, num_devices=4)
    return frame.assign(**place)


SPREAD = 1.5  # standard deviation of three seeds: the middle one, and 1.5 points to both sides
TASK_METRICS = {"CoLA": "mcc", "SST-2": "accuracy", "MRPC": "accuracy", "MNLI": "accuracy", "SQuAD": "exact_match"}
MAJORITY = {"CoLA": 0.0, "SST-2": 50.0, "MRPC": 62.0, "MNLI": 35.0, "SQuAD": 0.0}
EVAL_ROWS = {"CoLA": 1043, "SST-2": 872, "MRPC": 408, "MNLI": 9815, "SQuAD": 10570}


def published_cells():
    """(place, task, published value) of each of the paper's 55 cells; Nb and Ndiv None for the original."""
    for _, cell in published("table_iii").iterrows():
        nb, ndiv = (None if n == "original" else int(n) for n in cell.iloc[1:3])
        for task, value in zip(TASK_METRICS, cell.iloc[3:], strict=True):
            yield dict(model=cell["model"], num_original_layers=nb, num_divisions=ndiv), task, float(value)


def accuracy_rows(num_seeds: int = 3, model: str = "bert-base", **fields) -> pd.DataFrame:
    """Fine-tuning runs of every published row of `model`: 0.8 times the published score, seeds `SPREAD` apart."""
    rows = []
    for place, task, value in published_cells():
        for seed in range(num_seeds if place["model"] == model else 0):
            score = 0.8 * value + SPREAD * (seed - (num_seeds - 1) / 2)
            made = dict(task=task, metric=TASK_METRICS[task], seed=seed, score=score, majority_score=MAJORITY[task])
            made |= dict(
                eval_rows=EVAL_ROWS[task], train_rows=3000, source="mirror", note="made up", pretraining="tiny"
            )
            rows.append(place | made | fields)
    return pd.DataFrame(rows)


def pretraining_rows(num_seeds: int = 1) -> pd.DataFrame:
    """Pre-training of every published row of BERT-Base: more original layers, fewer divisions, less loss."""
    places = {tuple(place.values()): place for place, _, _ in published_cells() if place["model"] == "bert-base"}
    rows = []
    for place, seed in itertools.product(places.values(), range(num_seeds)):
        nb, ndiv = place["num_original_layers"] or 6, place["num_divisions"] or 1
        loss = 4 - 0.05 * nb + 0.03 * ndiv + 0.01 * seed
        label = "bert-base original" if ndiv == 1 else f"bert-base Nb={nb}, Ndiv={ndiv}"
        made = dict(row=label, attention_width="full", original_placement="last", seed=seed, source="mirror")
        made |= dict(unigram_loss=5.0, unigram_perplexity=np.exp(5.0))
        rows.append(place | made | dict(valid_loss=loss, perplexity=np.exp(loss), tokens=10**6, hidden_size=128))
    return pd.DataFrame(rows)


def table_iii_rows() -> pd.DataFrame:
    """The paper's Table III as older runs saved it; of BERT-Base four fifths of each score were obtained."""
    rows = []
    for place, task, value in published_cells():
        ran = place["model"] == "bert-base"
        made = dict(task=task, metric=TASK_METRICS[task], published=value, majority_score=MAJORITY[task])
        made |= dict(obtained_mean=0.8 * value if ran else np.nan, obtained_std=SPREAD, num_seeds=3 if ran else 0)
        rows.append(place | made | dict(status="measured" if ran else "not run", eval_rows=EVAL_ROWS[task]))
    return pd.DataFrame(rows)


def calibration_rows() -> pd.DataFrame:
    """Two structures, sliced: not trained on, trained on plainly and by distillation, and from scratch."""
    rows = []
    for index, name in enumerate(("bert-base Nb=4, Ndiv=4", "bert-base Nb=1, Ndiv=4")):
        place = dict(row=name, teacher_valid_loss=3.5, seconds=60.0)
        rows.append(place | dict(start="sliced", method="none", tokens=0, valid_loss=7 + index))
        for tokens in (10**5, 3 * 10**5, 10**6, 3 * 10**6):
            for method, better in (("plain", 0.0), ("distilled", 0.2)):
                loss = 3.9 + index / 5 - better + 2e4 / tokens**0.8
                rows.append(place | dict(start="sliced", method=method, tokens=tokens, valid_loss=loss))
        rows.append(place | dict(start="random", method="from scratch", tokens=10**8, valid_loss=3.7 + index / 5))
    frame = pd.DataFrame(rows)
    return frame.assign(tokens_share=frame["tokens"] / 1e8, perplexity=np.exp(frame["valid_loss"]))


def placement_rows() -> pd.DataFrame:
    losses = {"last": 4.0, "first": 4.05, "bottom": 4.2, "middle": 4.1, "top": 3.95}
    place = dict(model="bert-base", num_original_layers=4, num_divisions=4, attention_width="full", num_seeds=2)
    return pd.DataFrame(
        place
        | dict(row=f"bert-base Nb=4, Ndiv=4, {kind}", original_placement=kind, valid_loss=loss, valid_loss_std=0.02)
        | dict(difference=loss - 4.0, difference_std_error=0.01, perplexity=np.exp(loss))
        for kind, loss in losses.items()
    )


def wire_rows() -> pd.DataFrame:
    """Two structures; bfloat16 costs 0.05 points in every task, int8 0.2, and 0.4 in CoLA."""
    return pd.DataFrame(
        dict(row=f"bert-base {row}", task=task, metric=metric, wire=wire, num_seeds=3, limit=0.3, exact=50.0)
        | dict(change=-cost if task != "CoLA" or wire == "bfloat16" else -0.4, change_std_error=0.05)
        | dict(largest_change=0.5, within=task != "CoLA" or wire == "bfloat16")
        for row in ("original", "Nb=4, Ndiv=4")
        for task, metric in TASK_METRICS.items()
        for wire, cost in (("bfloat16", 0.05), ("int8", 0.2))
    )


def decoupling_rows() -> pd.DataFrame:
    return pd.DataFrame(
        [
            dict(
                model="bert-base",
                num_divisions=n,
                attention_width=w,
                seq_len=s,
                layer_flops_ratio=1 + 0.02 * n * s / 128,
            )
            for n, w, s in itertools.product((2, 4, 8), ("full", "narrow"), (128, 384, 512))
        ]
    )


def plan_map_rows() -> pd.DataFrame:
    plans = ("12 replicate on 1 device", "(2 block + heads) x4, 4 chunks on 4 devices")
    return pd.DataFrame(
        dict(model=m, num_devices=n, bandwidth_mbps=b, seq_len=s, plan=plans[b * s > 20_000], predicted_s=s / b / n)
        for m, n, b, s in itertools.product(SINGLE_S, (2, 4), BANDWIDTHS, (16, 128))
    )


def choice_rows() -> pd.DataFrame:
    """Three plans a cell; the chosen one is the fastest but in one cell, where it takes 10% more."""
    rows = []
    for m, n, b, s in itertools.product(SINGLE_S, (2, 4), BANDWIDTHS, (32, 128)):
        for i, plan in enumerate(("a", "b", "c")):
            latency = SINGLE_S[m] * s / 128 / n * (1 + 0.1 * i)
            if (m, n, b, s) == ("bert-base", 2, 125, 32) and i == 0:
                latency *= 1.21
            place = dict(model=m, num_devices=n, bandwidth_mbps=b, seq_len=s, plan=plan, chosen=i == 0)
            rows.append(place | dict(latency_s=latency, predicted_s=0.98 * latency, valid=True, why_invalid=""))
    return pd.DataFrame(rows)


def unequal_rows() -> pd.DataFrame:
    splits = {"planned": 0.25, "even, same strategies": 0.45, "even, best strategies": 0.44}
    return pd.DataFrame(
        dict(model="bert-base", speeds="1:1:2:4", split=k, bandwidth_mbps=b, latency_s=v, ideal_s=0.22, valid=True)
        | dict(over_ideal=v / 0.23, over_planned=v / 0.25)
        for b, (k, v) in itertools.product((1000, 125), splits.items())
    )


def trace_rows() -> pd.DataFrame:
    rows = []
    for policy, slow in (("adaptive", 0.05), ("fixed: a", 0.09), ("fixed: b", 0.06)):
        for i in range(30):
            mbps = 125 if 10 <= i < 20 else 1000
            place = dict(policy=policy, request=i, seq_len=(16, 64)[i % 2], bandwidth_mbps=mbps, estimate_mbps=mbps)
            place |= dict(plan="ab"[mbps < 500], switched=i in (11, 21), latency_s=slow, model="bert-base")
            rows.append(place | dict(device="Jetson TX2 (emulated)", num_devices=4))
    return pd.DataFrame(rows)


def generation_rows() -> pd.DataFrame:
    return pd.DataFrame(
        dict(model="gpt2", method=m, num_devices=1 if m == "single" else 4, bandwidth_mbps=b, prompt_len=16, valid=True)
        | dict(first_token_s=v, token_s=v / 2, predicted_first_token_s=v, predicted_token_s=v / 2, why_invalid="")
        | dict(new_tokens=16, equal_tokens=16)
        for m, v, rates in (("single", 0.2, (1000,)), ("tp", 0.1, (1000, 125)), ("bp+auto", 0.06, (1000, 125)))
        for b in rates
    )


def perplexity_rows() -> pd.DataFrame:
    sizes = [(None, None), (4, 4), (2, 4), (1, 4), (4, 2), (4, 8)]
    return pd.DataFrame(
        dict(num_original_layers=nb, num_divisions=nd, perplexity=60 + i) for i, (nb, nd) in enumerate(sizes)
    )


def scale_out_rows() -> pd.DataFrame:
    return pd.DataFrame(
        dict(model=m, num_devices=n, seq_len=s, bandwidth_mbps=b, speedup=n**0.8)
        for m, n, s, b in itertools.product(("bert-large", "gpt2-xl"), (2, 8, 64), (32, 512), (1000, 125))
    )


def service_frames() -> dict[str, pd.DataFrame]:
    """Rounds of chaos, samples of a soak and covered lines."""
    rounds = pd.DataFrame(
        [
            dict(fault=fault, round=number, named_s=named, served_s=5.0 + number, requests=90, lost=0, wrong=0, twice=0)
            for number in range(5)
            for fault, named in (("killed", 1.0 + number / 10), ("link flaps", None))
        ]
    )
    seconds = [10.0 * n for n in range(60)]
    samples = pd.DataFrame({"seconds": seconds, "front_mib": 300.0, "devices_mib": 900.0})
    samples["answered"] = [30 * n for n in range(60)]
    rooms = pd.DataFrame({"room": ["models", "cluster"], "lines": [100, 300], "run": [99, 240], "share": [0.99, 0.8]})
    return {"chaos_rounds": rounds, "soak_samples": samples, "coverage": rooms}
