"""The figures of notebook 10 (CoFormer 2025, Figs. 1, 9, 10, 12 and Table V), from saved tables only.

Predicted values are named so; measured ones are filled marks, rows that failed their check are left out.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from detransformer.report.canvas import (
    COLOURS,
    bandwidth_axis,
    legend_below,
    need,
    panels,
    whole_ticks,
)
from detransformer.report.coformer_tables import POOLED, REFERENCE_DEVICE
from detransformer.tables.latency import checked_rows

LOOKS = {  # colour and marker
    "single": (COLOURS["single"], "s"),
    "galaxy": (COLOURS["galaxy"], "P"),
    "pp": (COLOURS["pp"], "v"),
    "auto": (COLOURS["auto"], "*"),
    "bp+paper": (COLOURS["tp"], "X"),
    "bp+auto": (COLOURS["bp+auto"], "*"),
    "devit": (COLOURS["bp+sp"], "d"),
    "coformer": (COLOURS["bp+tp"], "o"),
    "coformer-published": (COLOURS["bp+tp"], "^"),
    "small": (COLOURS["sp"], "p"),
}
PUBLISHED, OBTAINED = "0.35", "#0173b2"
TYPICAL_MBPS = 1000
MIN_POINTS = 6  # of accuracy that an axis spans


def tradeoff(frame: pd.DataFrame) -> Figure:
    """Accuracy against predicted latency at each bandwidth (Figs. 1, 10): measured accuracy of the small ViT."""
    rows = _shown(frame)
    rows = need(rows[rows["accuracy"].notna()], "coformer_latency", "methods with an accuracy")
    rates = sorted(rows["bandwidth_mbps"].unique())
    low, high = rows["accuracy"].min(), rows["accuracy"].max()
    middle, half = (low + high) / 2, max(MIN_POINTS, 1.2 * (high - low)) / 2  # noise is not to look like a difference
    figure, axes = panels(len(rates), width=3.3)
    for axis, mbps in zip(axes, rates, strict=True):
        for row in rows[rows["bandwidth_mbps"] == mbps].itertuples():
            colour, marker = LOOKS[row.method]
            axis.plot(row.latency_ms, row.accuracy, marker, color=colour, ms=8, ls="none", label=row.title)
        axis.set_xscale("log")
        axis.set(title=f"{mbps:g} Mbps", xlabel="Predicted latency (ms)")
        axis.margins(0.15)
        axis.set_ylim(middle - half, middle + half)
    axes[0].set_ylabel("Accuracy of the small ViT (%)")
    figure.suptitle("What speed costs in accuracy (paper Fig. 10)", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def bandwidth(frame: pd.DataFrame) -> Figure:
    """Latency by bandwidth of every method (Fig. 12): predicted lines; measured marks beside, at their own size."""
    predicted = need(_shown(frame), "coformer_latency", "predicted rows")
    measured = frame[frame["kind"] == "measured"]
    measured = checked_rows(measured) if len(measured) else measured
    parts = [part for part in (predicted, measured) if len(part)]
    figure, axes = panels(len(parts), width=4.8 if len(parts) > 1 else 7.2, sharey=False)
    for axis, part in zip(axes, parts, strict=True):
        kind = part["kind"].iloc[0]
        for method, line in part.groupby("method", sort=False):
            colour, marker = LOOKS[method]
            line = line.sort_values("bandwidth_mbps")
            title = line["title"].iloc[0]
            if method == "single":
                axis.axhline(line["latency_ms"].iloc[0], color=colour, ls="--", lw=1.2, label=f"{title} (TX2)")
                continue
            axis.plot(
                line["bandwidth_mbps"], line["latency_ms"], "-", marker=marker, color=colour, ms=6, lw=1.3, label=title
            )
            if kind == "measured":
                axis.plot(
                    line["bandwidth_mbps"],
                    line["predicted_ms"],
                    ls="none",
                    marker=marker,
                    mfc="none",
                    ms=9,
                    color=colour,
                )
        axis.set_yscale("log")
        bandwidth_axis(axis, part["bandwidth_mbps"])
        rings = "; rings: predicted" if kind == "measured" else ""
        axis.set_title(f"{kind}{rings}\n{part['size'].iloc[0]}", fontsize=9)
    axes[0].set_ylabel("Latency (ms)")
    figure.suptitle("One request on three Jetsons by bandwidth (paper Fig. 12)", fontsize=10)
    legend_below(figure, axes[0], columns=4 if len(parts) > 1 else 3)
    return figure


def energy(frame: pd.DataFrame) -> Figure:
    """Modelled energy of all devices and predicted memory of the fullest one, at 1000 Mbps (Figs. 9, 10)."""
    rows = _shown(frame)
    rates = rows["bandwidth_mbps"].unique()
    mbps = TYPICAL_MBPS if TYPICAL_MBPS in rates else max(rates, default=0)
    rows = need(rows[rows["bandwidth_mbps"] == mbps], "coformer_latency", "predicted rows")
    figure, axes = panels(2, width=4.4, sharey=False)
    places = np.arange(len(rows))
    colours = [LOOKS[method][0] for method in rows["method"]]
    for axis, column, words in (
        (axes[0], "energy_mj", "Energy of all devices (mJ), modelled"),
        (axes[1], "memory_mib", "Memory of the fullest device (MiB)"),
    ):
        drawn = axis.barh(places, rows[column], color=colours)
        axis.bar_label(drawn, fmt="%.0f", fontsize=8, padding=3)
        axis.set_xlabel(words)
        axis.set_xlim(0, 1.15 * rows[column].max())
        axis.set_yticks(places, rows["title"] if axis is axes[0] else [""] * len(rows))
        axis.invert_yaxis()
    figure.suptitle(f"Energy and memory of one request at {mbps:g} Mbps (paper Figs. 9, 10)", fontsize=10)
    return figure


def devices(frame: pd.DataFrame) -> Figure:
    """Accuracy, latency and energy by the number of devices; published hollow (Table V)."""
    rows = need(frame[frame["accuracy"].notna()], "coformer_devices", "accuracy")
    figure, axes = panels(3, width=3.2, sharey=False)
    whole, cut = rows[rows["case"] == "large model"], rows[rows["case"] != "large model"]
    for axis, column, words in (
        (axes[0], "accuracy", "Accuracy (%)"),
        (axes[1], "latency_ms", "Latency (ms)"),
        (axes[2], "energy_mj", "Energy (mJ)"),
    ):
        known = rows.drop_duplicates("num_devices", keep="first")
        axis.plot(
            known["num_devices"], known[f"published_{column}"], "D--", mfc="none", color=PUBLISHED, label="published"
        )
        error = cut["accuracy_std"].fillna(0) if column == "accuracy" else None
        axis.errorbar(
            cut["num_devices"], cut[column], yerr=error, fmt="o-", color=OBTAINED, capsize=3, label=_kind(column)
        )
        axis.plot(whole["num_devices"], whole[column], "s", color=COLOURS["single"], label="large model, whole")
        whole_ticks(axis, sorted(rows["num_devices"].unique()))
        axis.set(xlabel="Devices", ylabel=words)
        if column != "accuracy":
            axis.set_ylim(0)
        axis.legend(loc="best", fontsize=7)
    least, most = f"{cut['flops_share'].min():.0%}", f"{cut['flops_share'].max():.0%}"
    total = least if least == most else f"{least} to {most}"
    figure.suptitle(f"1 to 4 devices, together {total} of the FLOPs (paper Table V)", fontsize=10)
    return figure


def aggregators(ablation: pd.DataFrame, kinds: pd.DataFrame) -> Figure:
    """Sub-models alone and together, and every aggregator on them, over seeds; published hollow (Tables III, IV)."""
    need(ablation[ablation["accuracy"].notna()], "coformer_ablation", "accuracy")
    figure, (left, right) = panels(2, width=4.6, sharey=False)
    parts = list(dict.fromkeys(ablation["part"]))
    palette = sns.color_palette("colorblind", 2)
    steps = (("as cut", ablation["calibrated"].astype(str) == "False", -0.2, "0.6"),
             ("calibrated", ablation["calibrated"].astype(str) != "False", 0.2, palette[0]))  # fmt: skip
    for name, which, shift, colour in steps:
        rows = ablation[which]
        places = [parts.index(part) + shift for part in rows["part"]]
        left.bar(
            places, rows["accuracy"], 0.36, yerr=rows["accuracy_std"].fillna(0), color=colour, capsize=2, label=name
        )
    known = ablation[ablation["published_accuracy"].notna()]
    places = [parts.index(part) + 0.2 for part in known["part"]]
    left.plot(places, known["published_accuracy"], "D", mfc="none", color=PUBLISHED, label="published (DeiT-B)")
    left.set_xticks(range(len(parts)), parts, rotation=20)
    left.set(ylabel="Accuracy (%)", title="What calibration and aggregation do (Table III)")
    left.legend(fontsize=7)
    places = range(len(kinds))
    right.errorbar(places, kinds["given_up"], yerr=kinds["accuracy_std"].fillna(0), fmt="o", color=OBTAINED, capsize=3,
                   label="obtained")  # fmt: skip
    right.plot(places, kinds["published_given_up"], "D", mfc="none", color=PUBLISHED, label="published (ImageNet-1K)")
    right.set_xticks(places, kinds["kind"], rotation=20)
    right.set(ylabel="Points given up", title="Aggregators on the same sub-models (Table IV)")
    right.legend(fontsize=7)
    return figure


def _kind(column: str) -> str:
    return {"accuracy": "sub-models", "latency_ms": "sub-models, predicted", "energy_mj": "sub-models, modelled"}[
        column
    ]


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Predicted rows: of single devices the paper's, of ensembles the pooled features."""
    rows = frame[frame["kind"] == "predicted"]
    alone = rows["method"] == "single"
    ensembles = rows["plan"].str.contains("sent")
    return rows[(~alone | (rows["plan"] == REFERENCE_DEVICE)) & (~ensembles | rows["plan"].str.contains(POOLED))]
