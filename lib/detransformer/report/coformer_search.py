"""Tables and figures of notebook 09, CoFormer's decomposer (2025, Figs. 11 and 16): from saved rows only.

What stands on the axes is measured on this machine, modelled or predicted as the rows say: titles and legends repeat
it. Figures are named and saved by `report.figures`.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from detransformer.record.published import published
from detransformer.record.verdict import Verdict
from detransformer.record.verdict import table as verdict_table
from detransformer.report.canvas import legend_below, need, panel_grid, panels

PHASES = {"backbone_ms": "computing", "send_ms": "sending", "idle_ms": "waiting for the slowest"}
PROXY_NAMES = {
    "loss": "loss, uncalibrated (published)",
    "probe_error": "error of a ridge probe (%)",
    "loss_after_steps": "loss after a few steps",
    "log_flops": "mean log10 FLOPs",
}
TARGET_NAMES = {"error_alone": "each alone, mean", "error_together": "averaged"}
MARKS = ("o", "s", "x", "^")
MIN_SEEDS = 10  # of a search before a share of them is judged


# Tables ----------------------------------------------------------------------------------------------------------


def decomposition_verdicts(
    predictor: pd.DataFrame, proxy: pd.DataFrame, search: pd.DataFrame, policies: pd.DataFrame
) -> pd.DataFrame:
    """One row a claim, judged by `record.verdict`; a share of seeds is not tested below `MIN_SEEDS` of them."""
    return verdict_table([*_predictor_claims(predictor), *_proxy_claims(proxy), *_search_claims(search, policies)])


def _predictor_claims(errors: pd.DataFrame) -> list[Verdict]:
    rmse_ms = float(published("coformer_search").set_index("claim")["value"]["latency_predictor_rmse"])
    one = published("coformer_tables").set_index(["table", "row"]).loc[("V", "1 device")]
    limit = 100 * rmse_ms / float(one["latency_ms"])
    rows = []
    modelled = errors[(errors["kind"] == "modelled") & (errors["predictor"] == "published")]
    if len(modelled):
        worst = modelled.loc[modelled["rmse_ms"].idxmax()]
        claim = f"RMSE of the latency predictor in ms, worst modelled device ({worst['device']})"
        rows.append(Verdict(claim, rmse_ms, worst["rmse_ms"], "by construction", side="at most"))
    for device, part in errors[errors["kind"] == "measured"].groupby("device", sort=False):
        part = part.set_index("predictor")
        claim = f"RMSE of the latency predictor in % of the whole model's latency, {device} (measured)"
        rows.append(
            Verdict(claim, round(limit, 1), part.loc["published", "rmse_of_whole_pct"], "measured", side="at most")
        )
        rivals = part.drop("published")["rmse_ms"]
        claim = f"the same over that of the best rival ({rivals.idxmin()})"
        over = part.loc["published", "rmse_ms"] / rivals.min()
        rows.append(Verdict(claim, 1.0, over, "measured", side="at most"))
    return rows


def _proxy_claims(proxies: pd.DataFrame) -> list[Verdict]:
    rows = []
    for target, part in proxies.groupby("target", sort=False):
        part = part.set_index("proxy")
        own, name = part.loc["loss"], TARGET_NAMES.get(str(target), target)
        claim = f"correlation of uncalibrated loss with calibrated error, {name}"
        known = dict(low=own["pearson_low"], high=own["pearson_high"], tested=own["pearson_low"] == own["pearson_low"])
        rows.append(Verdict(claim, 0.0, own["pearson"], "measured", side="above", **known))
        signed = part["expected_sign"] * part["pearson"]
        best = signed.drop("loss").idxmax()
        claim = f"correlation of the best other proxy ({PROXY_NAMES.get(best, best)}), {name}, less that of the loss"
        rows.append(Verdict(claim, 0.0, signed[best] - signed["loss"], "measured", side="at least"))
    return rows


def _search_claims(searches: pd.DataFrame, policies: pd.DataFrame) -> list[Verdict]:
    searches, rows = searches.set_index("method"), []
    if "random" in searches.index:
        for method in [name for name in searches.index if name.startswith("bayesian")]:
            seeds = searches.loc[method, "num_seeds"]
            claim = f"share of {seeds:.0f} seeds in which {method} is at least as good as random"
            share = searches.loc[method, "wins"] / seeds
            rows.append(Verdict(claim, 0.9, share, "predicted", side="at least", tested=seeds >= MIN_SEEDS))
    both = {"bayesian", "uniform"}
    found = []
    if both <= set(searches.index):
        objective, latency, loss = (searches[name] for name in ("objective", "latency_ms", "loss"))
        found += [
            ("objective of uniform, which searches nothing, less that of bayesian", 0.0,
             objective["uniform"] - objective["bayesian"]),
            ("latency of uniform over bayesian (predicted)", 1.0, latency["uniform"] / latency["bayesian"]),
            ("loss of uniform less that of bayesian", 0.0, loss["uniform"] - loss["bayesian"]),
        ]  # fmt: skip
    if both <= set(policies["method"]):
        waits, paces = waiting_share(policies), pace_ms(policies)
        found += [
            ("latency a FLOP of the best policy, uniform over bayesian (predicted)", 1.0,
             paces["uniform"] / paces["bayesian"]),
            ("share of the devices' time spent waiting, uniform less bayesian (predicted)", 0.0,
             waits["uniform"] - waits["bayesian"]),
        ]  # fmt: skip
    return rows + [Verdict(claim, limit, value, "predicted", side="above") for claim, limit, value in found]


def waiting_share(policies: pd.DataFrame) -> pd.Series:
    """By method, the part of all devices' time until the slowest is done in which they wait for it."""
    sums = policies.groupby("method", sort=False)[list(PHASES)].sum()
    return sums["idle_ms"] / sums.sum(axis=1)


def pace_ms(policies: pd.DataFrame) -> pd.Series:
    """By method, milliseconds until the slowest is done over the share of the large model's FLOPs that all compute."""
    made = policies.assign(ends_ms=policies[list(PHASES)].sum(axis=1)).groupby("method", sort=False)
    return made["ends_ms"].max() / made["flops_share"].sum()


# Figures ---------------------------------------------------------------------------------------------------------


def predictor(frame: pd.DataFrame) -> Figure:
    """Predicted against profiled latency of sub-models that no fit has seen, a panel a device (Fig. 16a)."""
    rows = need(frame[frame["predicted_s"].notna()], "predictor_points", "held-out sub-models")
    devices, names = list(dict.fromkeys(rows["device"])), list(dict.fromkeys(rows["predictor"]))
    num_columns = min(2, len(devices))
    figure, axes = panel_grid(-(-len(devices) // num_columns), num_columns, width=4.2, height=3.0)
    for axis in axes.flat[len(devices) :]:
        axis.set_visible(False)
    for axis, device in zip(axes.flat, devices, strict=False):
        part = rows[rows["device"] == device]
        most = 1e3 * max(part["latency_s"].max(), part["predicted_s"].max())
        axis.plot([0, most], [0, most], color="0.5", lw=0.9, ls=":")
        for mark, name, colour in zip(MARKS, names, sns.color_palette("colorblind"), strict=False):
            here = part[part["predictor"] == name]
            look = dict(mfc="none") if mark != "x" else {}
            axis.plot(1e3 * here["latency_s"], 1e3 * here["predicted_s"], mark, ms=5, color=colour, label=name, **look)
        axis.set_title(f"{device} ({part['kind'].iloc[0]})")
        axis.set(xlabel="Latency (ms)", ylabel="Predicted (ms)")
    figure.suptitle("Latency predictor on held-out sub-models (CoFormer Fig. 16, top)", fontsize=10)
    legend_below(figure, axes.flat[0], columns=3)
    return figure


def proxy(points: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Error after calibration over each proxy of it, a mark a policy (Fig. 16b)."""
    rows = need(points[points["error_alone"].notna()], "proxy_points", "calibrated policies")
    names = [name for name in PROXY_NAMES if name in rows]
    figure, axes = panel_grid(-(-len(names) // 2), 2, width=4.2, height=2.8)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    known = table.set_index(["proxy", "target"])
    for axis, name in zip(axes.flat, names, strict=False):
        said = []
        for colour, target in zip(sns.color_palette("colorblind"), TARGET_NAMES, strict=False):
            look = dict(color=colour, label=TARGET_NAMES[target])
            axis.plot(rows[name], rows[target], "o", ms=4, **look)
            if (name, target) in known.index:
                one = known.loc[(name, target)]
                said.append(f"{one['pearson']:.2f} ({one['pearson_low']:.2f} to {one['pearson_high']:.2f})")
        axis.set_xlabel(PROXY_NAMES[name])
        axis.set_ylabel("Error (%)")
        axis.set_title("r = " + ", ".join(said), fontsize=8.5)
    steps = rows["num_steps"].iloc[0]
    figure.suptitle(f"Proxies of the error after {steps:g} steps a sub-model (CoFormer Fig. 16, bottom)", fontsize=10)
    legend_below(figure, axes.flat[0])
    return figure


def search(frame: pd.DataFrame) -> Figure:
    """The best policy so far over evaluations: median over seeds, quartiles shaded (Fig. 11)."""
    rows = need(frame[frame["best_objective"].notna()], "search_history", "evaluations")
    figure, axes = panels(3, width=3.4, sharey=False)
    columns = {
        "best_objective": "Objective (Eq. 8)",
        "best_loss": "Loss, uncalibrated",
        "best_latency_s": "Latency (ms), predicted",
    }
    methods = list(dict.fromkeys(rows["method"]))
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for colour, method in zip(sns.color_palette("colorblind"), methods, strict=False):
            by = rows[rows["method"] == method].groupby("evaluation")[column]
            low, middle, high = (by.quantile(q) * (1e3 if column.endswith("_s") else 1) for q in (0.25, 0.5, 0.75))
            axis.fill_between(middle.index + 1, low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(middle.index + 1, middle, color=colour, lw=1.6, label=method)
        axis.set(xlabel="Evaluations", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        f"The best policy so far, median and quartiles of {rows['seed'].nunique()} seeds (CoFormer Fig. 11)",
        fontsize=10,
    )
    legend_below(figure, axes[0])
    return figure


def policies(frame: pd.DataFrame) -> Figure:
    """What each device does until the slowest is done, and its part of the large model's FLOPs, by method."""
    rows = need(frame[frame["backbone_ms"].notna()], "policies", "policies")
    methods, devices = list(dict.fromkeys(rows["method"])), list(dict.fromkeys(rows["device"]))
    figure, axes = panels(len(methods), width=2.9)
    colours = [*sns.color_palette("colorblind", 2), (0.85, 0.85, 0.85)]
    for axis, method in zip(axes, methods, strict=True):
        part = rows[rows["method"] == method].set_index("device").reindex(devices)
        base = np.zeros(len(devices))
        for colour, (column, label) in zip(colours, PHASES.items(), strict=True):
            axis.bar(range(len(devices)), part[column], 0.7, bottom=base, color=colour, label=label)
            base = base + part[column].to_numpy()
        for place, share in enumerate(part["flops_share"]):
            axis.text(place, base[place], f"{share:.1%}", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(devices)), devices)
        axis.grid(False, axis="x")
        axis.set_title(method, fontsize=9)
    axes[0].set_ylabel("Milliseconds (predicted)")
    figure.suptitle("The best policy of each method; above each bar: share of the large model's FLOPs", fontsize=10)
    legend_below(figure, axes[0])
    return figure
