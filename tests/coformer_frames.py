"""Runs and latencies of notebook 10 made up by a small rule, for the tests of its tables and figures."""

import pandas as pd

from detransformer.report import coformer_tables as tables

SEEDS = (0, 1, 2)
MODEL = dict(
    case="large model", accuracy=60.0, train_accuracy=90.0, num_devices=1, devices="tx2", flops_share=1.0,
    largest_share=1.0, latency_ms=123.48, idle_ms=0.0, energy_mj=1852.0, memory_mib=335.0,
)  # fmt: skip
LATENCIES = {"galaxy": 100.0, "pp": 160.0, "auto": 110.0, "bp+paper": 90.0, "bp+auto": 70.0, "coformer": 20.0,
             "coformer-published": 40.0, "devit": 30.0, "small": 31.0}  # fmt: skip


def run_rows() -> pd.DataFrame:
    found = {  # case: (group, rule, devices, accuracy, latency)
        "1 device": ("devices", "boosting", 1, 55.0, 31.0),
        "2 devices": ("devices", "boosting", 2, 56.0, 17.0),
        "coformer": ("main", "boosting", 3, 57.0, 14.0),
        "4 devices": ("devices", "boosting", 4, 56.5, 10.0),
        "uniform": ("uniform", "boosting", 3, 56.8, 22.0),
        "limit 30%": ("budgets", "boosting", 3, 58.0, 25.0),
        "rule none": ("rules", "none", 3, 56.0, 14.0),
        "rule published": ("rules", "published", 3, 57.1, 14.0),
    }
    rows = []
    for case, (group, rule, count, accuracy, milliseconds) in found.items():
        noise = (1.0, -1.0, 0.0) if case == "rule published" else (0.1, -0.1, 0.0)
        for seed in SEEDS:
            rows.append(
                dict(group=group, case=case, rule=rule, seed=seed, accuracy=accuracy + noise[seed], best_alone=50.0)
                | dict(held_out_accuracy=accuracy - 1, mean_alone=45.0)
                | dict(num_devices=count, devices="some", flops_share=0.25, largest_share=0.1)
                | dict(latency_ms=milliseconds, idle_ms=1.0, energy_mj=450.0, memory_mib=40.0, widths="", layers="")
            )
    return pd.DataFrame(rows)


def ablation_rows() -> pd.DataFrame:
    parts = {"sub-model 1": 45.0, "sub-model 2": 50.0, "sub-model 3": 48.0, "all": 57.0}
    return pd.DataFrame(
        [
            dict(part=part, calibrated=done, seed=seed, accuracy=accuracy if done else 5.0, latency_ms=14.0)
            for seed in SEEDS
            for done in (False, True)
            for part, accuracy in parts.items()
        ]
    )


def aggregator_rows() -> pd.DataFrame:
    kinds = {"coformer": 57.0, "attention": 56.0, "senet": 57.2, "average": 55.0, "majority": 54.0}
    return pd.DataFrame(
        [dict(kind=k, seed=s, accuracy=a + 0.01 * s, latency_ms=14.0) for s in SEEDS for k, a in kinds.items()]
    )


def missing_rows() -> pd.DataFrame:
    full = {"coformer": (57.0, 30.0), "coformer, drop 0.3": (56.0, 50.0), "average": (55.0, 52.0)}
    return pd.DataFrame(
        [
            dict(aggregator=name, missing=missing, seed=seed, accuracy=lost if missing else whole)
            for seed in SEEDS
            for name, (whole, lost) in full.items()
            for missing in range(4)
        ]
    )


def predicted_rows(bandwidths=(2, 100, 1000)) -> pd.DataFrame:
    rows = []
    for mbps in bandwidths:
        where = dict(bandwidth_mbps=mbps, kind="predicted", size="DeiT-B", energy_mj=900.0, memory_mib=100.0)
        for name, milliseconds in (("nano", 350.0), ("tx2", 123.48), ("orin", 128.0)):
            rows.append(
                where | dict(answers="exact", method="single", plan=name, num_devices=1, latency_ms=milliseconds)
            )
        for method, milliseconds in LATENCIES.items():
            answers = "decoupled" if "bp" in method else "exact" if method in ("galaxy", "pp", "auto") else "boosted"
            slow = 1000 / mbps if method in ("galaxy", "pp", "auto", "bp+paper", "bp+auto") else 1
            made = where | dict(answers=answers, method=method, num_devices=3, latency_ms=milliseconds * slow)
            plans = ("25% of the FLOPs, pooled features sent", "25% of the FLOPs, all tokens sent")
            rows += [made | dict(plan=plan) for plan in (plans if answers == "boosted" else ("plan",))]
    return pd.DataFrame(rows)


def measured_rows() -> pd.DataFrame:
    made = [("single", 60.0, True), ("galaxy", 30.0, True), ("coformer", 10.0, True), ("devit", 12.0, False)]
    return pd.DataFrame(
        [
            dict(bandwidth_mbps=1000, kind="measured", size="BERT-Base", answers="exact", method=method, plan="p",
                 num_devices=3, latency_ms=ms, predicted_ms=ms, valid=valid, why_invalid="" if valid else "late")
            for method, ms, valid in made
        ]
    )  # fmt: skip


def coformer_frames() -> dict[str, pd.DataFrame]:
    """Every table that a figure of notebook 10 reads."""
    runs, accuracies = run_rows(), tables.accuracies_of(run_rows(), MODEL)
    return {
        "coformer_ablation": tables.ablation_table(MODEL, ablation_rows()),
        "coformer_aggregators": tables.aggregator_table(MODEL, aggregator_rows()),
        "coformer_devices": tables.device_table(runs, MODEL),
        "coformer_latency": tables.latency_table(predicted_rows(), measured_rows(), accuracies),
    }
