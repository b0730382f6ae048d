"""The figures of latency: the paper's Figs. 2b, 7 and 8, Table IV, and all methods beside each other.

Each function takes saved tables and returns a Figure; `report.figures` names and saves them. Where several links were
measured each has panels of its own, titled by its name.
"""

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from detransformer.record.published import published_claim
from detransformer.report.canvas import (
    COLOURS,
    LOOKS,
    bandwidth_axis,
    legend_below,
    need,
    panel_grid,
    panels,
    whole_ticks,
)
from detransformer.report.peers import SCALING_BANDWIDTH_MBPS, methods_table, variant_name, wire_table
from detransformer.report.tables import (
    BASELINES,
    METHOD_NAMES,
    MODEL_NAMES,
    NUM_DEVICES,
    VARIANTS,
    links_of,
    normalised,
    select,
    single_latency,
    valid_rows,
)

PUBLISHED_METHODS = ("tp", "sp", "bp+tp", "bp+sp", "bp+allgather", "bp+paper", "bp+auto")  # Fig. 7, and ours
PARTS_BANDWIDTH_MBPS = 125
TIMELINE_METHODS = ("tp", "sp", "ulysses", "bp+paper", "bp+auto")
PARTS = {
    "compute": dict(color="#b3bccb"),
    "communication": dict(color=COLOURS["tp"]),
    "wait": dict(facecolor="white", edgecolor="0.4", hatch="////", linewidth=0.4),
}
EVENTS = {  # of a timeline
    "compute": PARTS["compute"],
    "all_reduce": dict(color=COLOURS["tp"]),
    "all_gather": dict(color=COLOURS["sp"]),
    "all_to_all": dict(color=COLOURS["bp+auto"]),
    "reduce_scatter": dict(color=COLOURS["bp+sp"]),
    "send": dict(color=COLOURS["bp+tp"]),
    "receive": dict(color=COLOURS["bp+allgather"]),
    "wait": PARTS["wait"],
}


def fig2b(latency: pd.DataFrame) -> Figure:
    """TP on BERT-Base over 1 to 4 devices at 500 Mbps: compute, communication, wait, and the speedup."""
    latency = valid_rows(latency)
    base = single_latency(latency, "bert-base")
    everywhere = dict(bandwidth_mbps=SCALING_BANDWIDTH_MBPS, num_devices=None)
    latency = latency[latency["num_devices"] <= NUM_DEVICES]
    counts = {
        link: select(latency, "bert-base", "tp", link=link, **everywhere)["num_devices"].nunique()
        for link in links_of(latency)
    }
    # a link over which only four devices were measured shows no scaling
    links = [link for link, count in counts.items() if count and count == max(counts.values())]
    if base is None or not links:
        raise ValueError(
            "Table 'latency' has no valid rows of bert-base single and tp at 500 Mbps; run 06_latency first."
        )
    figure, axes = panels(len(links), width=3.8, sharey=False)
    for axis, link in zip(axes, links, strict=True):
        rows = select(latency, "bert-base", "tp", link=link, **everywhere)
        rows = rows.groupby("num_devices")[["latency_s", "compute_s", "comm_s", "wait_s"]].median()
        rows.loc[1] = {"latency_s": base, "compute_s": base, "comm_s": 0.0, "wait_s": 0.0}
        rows = rows.sort_index()
        _stack(axis.bar, rows.index, rows, 0.6, "bottom")
        axis.set(xlabel="Devices", ylabel="Latency (s)" if axis is axes[0] else "")
        whole_ticks(axis, list(rows.index))
        axis.set_ylim(0, 1.25 * rows["latency_s"].max())
        right = axis.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        right.plot(rows.index, base / rows["latency_s"], "o-", color="0.2", ms=4, label="speedup (right axis)")
        right.set_ylim(0, max(4.2, 1.1 * (base / rows["latency_s"]).max()))
        if axis is axes[-1]:
            right.set_ylabel("Speedup over one device")
        axis.set_title(f"link: {link}")
    handles = [h for a in (axes[0], right) for h in a.get_legend_handles_labels()[0]]
    figure.suptitle("TP on BERT-Base at 500 Mbps (paper Fig. 2b)", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def fig7a(latency: pd.DataFrame) -> Figure:
    """Latency of BERT-Base on 4 devices over the single device's, the paper's methods by bandwidth."""
    return _normalised_bars(latency, "bert-base", "Fig. 7a")


def fig7b(latency: pd.DataFrame) -> Figure:
    """Latency of BERT-Large on 4 devices over the single device's, the paper's methods by bandwidth."""
    return _normalised_bars(latency, "bert-large", "Fig. 7b")


def fig7c(latency: pd.DataFrame) -> Figure:
    """Speedup of BERT-Base over the single device, by device count at 500 Mbps."""
    return _scaling(latency, "bert-base", "Fig. 7c", {})


def fig7d(latency: pd.DataFrame) -> Figure:
    """Speedup of BERT-Large over the single device, by device count at 500 Mbps, with the text's two values."""
    claims = {
        "bp+paper": published_claim("bert_large_bp_auto_speedup_over_single_500mbps_4dev"),
        "tp": published_claim("bert_large_tp_speedup_over_single_500mbps_4dev"),
    }
    return _scaling(latency, "bert-large", "Fig. 7d", claims)


def fig8(latency: pd.DataFrame) -> Figure:
    """Normalised latency of BP+Auto with Nb = 1, 2, 3, 4 on 4 devices, by bandwidth."""
    rows = normalised(valid_rows(latency))
    rows = rows[
        (rows["model"] == "bert-base")
        & (rows["method"] == "bp+auto")
        & (rows["num_devices"] == NUM_DEVICES)
        & (rows["num_divisions"] == 4)
    ]
    rows = need(rows, "latency", "bert-base bp+auto on 4 devices and single")
    counts = sorted(rows["num_original_layers"].dropna().unique())
    links = links_of(rows)
    figure, axes = panels(len(links), width=4.0)
    colours = sns.color_palette("viridis", len(counts))
    for axis, link in zip(axes, links, strict=True):
        for colour, count in zip(colours, counts, strict=True):
            line = rows[(rows["link"] == link) & (rows["num_original_layers"] == count)]
            line = line.groupby("bandwidth_mbps")["normalised"].median()
            axis.plot(line.index, line.values, "o-", ms=4, color=colour, label=f"Nb = {count:g}")
        axis.axhline(1, color="0.3", lw=1, ls="--")
        bandwidth_axis(axis, rows["bandwidth_mbps"])
        axis.set_ylim(0)
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Latency / single device")
    figure.suptitle("BP+Auto on 4 devices by number of original layers (paper Fig. 8)", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def table_iv(frame: pd.DataFrame) -> Figure:
    """Table IV as heat maps: published beside what was obtained with each variant's plans, one row of panels a link."""
    frame = frame.assign(variant=frame["variant"] if "variant" in frame else "ours")  # an older run had but one
    need(frame[frame["obtained"].notna()], "table_iv", "any measured cell")
    links = list(dict.fromkeys(frame.loc[frame["obtained"].notna(), "link"].fillna("")))
    variants = [v for v in VARIANTS if frame.loc[frame["variant"] == v, "obtained"].notna().any()]
    bandwidths = sorted(frame["bandwidth_mbps"].unique(), reverse=True)
    columns = [(m, b) for m in dict.fromkeys(frame["model"]) for b in BASELINES]
    top = max(frame["published"].max(), frame["obtained"].max())
    colours, norm = matplotlib.colormaps["cividis"], matplotlib.colors.LogNorm(0.8, top)
    figure, axes = panel_grid(len(links), 1 + len(variants), width=2.75, height=2.35)
    names = {"paper": "obtained, the paper's plans", "ours": "obtained, our plans", "narrow": "obtained, narrow"}
    for line, link in zip(axes, links, strict=True):
        rows = frame[frame["link"].fillna("") == link]
        shown = [("published", rows.drop_duplicates(["bandwidth_mbps", "model", "baseline"]), "published")]
        shown += [(names[v], rows[rows["variant"] == v], "obtained") for v in variants]
        for axis, (title, cells, value) in zip(line, shown, strict=True):
            if not len(cells):
                axis.set_axis_off()
                continue
            wide = cells.pivot(index="bandwidth_mbps", columns=["model", "baseline"], values=value)
            wide = wide.reindex(index=bandwidths, columns=pd.MultiIndex.from_tuples(columns))
            axis.imshow(wide.to_numpy(float), cmap=colours, norm=norm, aspect="auto")
            for (i, j), number in np.ndenumerate(wide.to_numpy(float)):
                dark = not np.isnan(number) and norm(number) < 0.5
                text = "not\nrun" if np.isnan(number) else f"{number:.2f}"
                axis.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
            axis.set_yticks(range(len(bandwidths)), [f"{b:g}" for b in bandwidths])
            labels = [f"{MODEL_NAMES.get(m, m).removeprefix('BERT-')}\n/ {b.upper()}" for m, b in columns]
            axis.set_xticks(range(len(columns)), labels, fontsize=8)
            axis.set_title(title if title == "published" else f"{title}\n{link}", fontsize=9)
            axis.grid(False)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel("Bandwidth (Mbps)")
    figure.suptitle("DeTransformer's speedup over TP and SP on 4 devices (paper Table IV)", fontsize=10)
    return figure


def bandwidth(latency: pd.DataFrame) -> Figure:
    """Latency of every method by bandwidth on 4 devices, with the single device and the limit, single / devices."""
    methods = need(methods_table(latency), "latency", "distributed methods on 4 devices")
    methods = methods[(methods["wire"] == "float32") & (methods["reads"] == "all")]
    links, models = list(dict.fromkeys(methods["link"])), list(dict.fromkeys(methods["model"]))
    figure, axes = panel_grid(len(links), len(models), width=4.4, height=3.5)
    handles = {}
    for (i, link), (j, model) in ((a, b) for a in enumerate(links) for b in enumerate(models)):
        axis, rows = axes[i][j], methods[(methods["link"] == link) & (methods["model"] == model)]
        for method in METHOD_NAMES:
            line = rows[rows["method"] == method].groupby("bandwidth_mbps")["latency_s"].median()
            if len(line):
                colour, marker, style, width = LOOKS[method]
                size = 9 if marker == "*" else 5
                look = dict(color=colour, marker=marker, ls=style, lw=width, ms=size, mew=0.8)
                look |= dict(mfc="none") if style != "-" else dict(mec="white", mew=0.5)
                handles[METHOD_NAMES[method]] = axis.plot(line.index, line.values, **look)[0]
        limit = _limit(latency, model)
        if limit:
            handles["limit: single / devices"] = axis.axhline(limit, color="0.2", lw=1.6, ls=(0, (1, 1)))
        axis.set_yscale("log")
        ticks = [t for t in (0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20) if _inside(t, axis)]
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        bandwidth_axis(axis, methods["bandwidth_mbps"])
        axis.set_title(f"{MODEL_NAMES.get(model, model)}, link: {link}")
    for line in axes:
        line[0].set_ylabel("Latency (s), logarithmic")
    figure.suptitle(f"All methods on {NUM_DEVICES} devices, Nb = 4, Ndiv = 4, float32 on the wire", fontsize=10)
    order = [name for name in (*METHOD_NAMES.values(), "limit: single / devices") if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=5)
    return figure


def parts(latency: pd.DataFrame) -> Figure:
    """Where the time goes: compute, communication and wait of each method at 125 Mbps, fastest on top."""
    methods = need(methods_table(latency), "latency", "distributed methods on 4 devices")
    # latencies reading all tokens; a compressed wire only where it is DeTransformer's, for the others see figure `wire`
    rows = methods[(methods["reads"] == "all") & (methods["method"] != "dp")]
    rows = rows[(rows["wire"] == "float32") | (rows["method"] == "bp+auto")]
    distance = (rows["bandwidth_mbps"] - PARTS_BANDWIDTH_MBPS).abs()
    rows = rows[distance == distance.groupby([rows["link"], rows["model"]]).transform("min")]
    links, models = list(dict.fromkeys(rows["link"])), list(dict.fromkeys(rows["model"]))
    tallest = rows.groupby(["link", "model"]).size().max()
    figure, axes = panel_grid(len(links), len(models), width=4.6, height=0.8 + 0.21 * tallest)
    for (i, link), (j, model) in ((a, b) for a in enumerate(links) for b in enumerate(models)):
        axis, here = axes[i][j], rows[(rows["link"] == link) & (rows["model"] == model)]
        axis.set_title(f"{MODEL_NAMES.get(model, model)}, link: {link}")
        if not len(here):
            axis.set_axis_off()
            continue
        here = here.sort_values("latency_s")
        places = np.arange(len(here))
        _stack(axis.barh, places, here, 0.72, "left")
        for place, seconds in zip(places, here["latency_s"], strict=True):
            axis.text(seconds, place, f" {seconds:.2f}", va="center", fontsize=8)
        limit = _limit(latency, model)
        if limit:
            axis.axvline(limit, color="0.2", lw=1.6, ls=(0, (1, 1)), label="limit: single / devices")
        axis.set_yticks(places, here["name"])
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlim(0, 1.1 * here["latency_s"].max())
        axis.set_xlabel(f"Latency (s) at {here['bandwidth_mbps'].iloc[0]:g} Mbps")
    figure.suptitle(f"Compute, communication and wait of the slowest of {NUM_DEVICES} devices", fontsize=10)
    legend_below(figure, axes[0][0])
    return figure


def timeline(frame: pd.DataFrame) -> Figure:
    """One inference over four devices: one panel a method, one lane a device, the first link, model and bandwidth."""
    for key in ("link", "model", "bandwidth_mbps"):
        frame = frame[frame[key] == frame[key].iloc[0]]
    frame = need(frame[(frame["wire"] == "float32") & (frame["reads"] == "all")], "timeline", "float32, all tokens")
    present = [m for m in METHOD_NAMES if (frame["method"] == m).any()]
    methods = [m for m in TIMELINE_METHODS if m in present] or present[:5]
    frame = frame[frame["method"].isin(methods)]
    figure, axes = panel_grid(len(methods), 1, width=9.0, height=1.05)
    ends = frame.groupby("method")["stop_s"].max()
    kinds = [kind for kind in EVENTS if (frame["what"] == kind).any()]
    for axis, method in zip(axes[:, 0], methods, strict=True):
        rows = frame[frame["method"] == method]
        ranks = sorted(rows["rank"].unique())
        for (rank, what), events in rows.groupby(["rank", "what"]):
            spans = list(zip(events["start_s"], events["stop_s"] - events["start_s"], strict=True))
            look = EVENTS[what] | (dict(linewidth=0) if what != "wait" else {})
            axis.broken_barh(spans, (ranks.index(rank) - 0.4, 0.8), **look)
        axis.axvline(ends[method], color="0.2", lw=1)
        axis.text(ends[method], (len(ranks) - 1) / 2, f" {ends[method]:.2f} s", va="center", fontsize=8)
        axis.set_yticks(range(len(ranks)), [f"{rank}" for rank in ranks])
        axis.invert_yaxis()
        axis.grid(False)
        axis.set_xlim(0, 1.08 * ends.max())
        axis.tick_params(axis="x", labelbottom=method == methods[-1])
        axis.set_ylabel("device", fontsize=8)
        axis.set_title(variant_name(method), loc="left", fontsize=9, pad=2)
    axes[-1, 0].set_xlabel("Time since the request (s)")
    first = frame.iloc[0]
    place = f"{MODEL_NAMES.get(first['model'], first['model'])} at {first['bandwidth_mbps']:g} Mbps"
    figure.suptitle(
        f"One inference over {frame['rank'].nunique()} devices: {place}, link: {first['link']}", fontsize=10
    )
    handles = [Patch(label=kind, **EVENTS[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def wire(latency: pd.DataFrame) -> Figure:
    """Compressed messages: latency by wire format of each method that was measured so, with the output error above."""
    table = need(wire_table(latency), "latency", "compressed messages (wire bfloat16 or int8)")
    table = table[table["bandwidth_mbps"] == table["bandwidth_mbps"].min()]
    places = table[["link", "model"]].drop_duplicates()
    formats = list(dict.fromkeys(table["wire"]))
    colours = dict(zip(formats, sns.color_palette("cividis", len(formats)), strict=True))
    figure, axes = panels(len(places), width=4.8, sharey=False)
    for axis, (link, model) in zip(axes, places.itertuples(index=False), strict=True):
        rows = table[(table["link"] == link) & (table["model"] == model)]
        methods = list(dict.fromkeys(rows["method"]))
        step = 0.84 / len(formats)
        for index, number_format in enumerate(formats):
            found = rows[rows["wire"] == number_format].set_index("method").reindex(methods)
            x = np.arange(len(methods)) - 0.42 + step * (index + 0.5)
            axis.bar(x, found["latency_s"], 0.92 * step, color=colours[number_format], label=number_format)
            for place, seconds, error in zip(x, found["latency_s"], found["relative_error"], strict=True):
                if number_format != "float32" and pd.notna(error):
                    axis.text(place, seconds, f"{error:.1%}", ha="center", va="bottom", fontsize=8)
        limit = _limit(latency, model)
        if limit:
            axis.axhline(limit, color="0.2", lw=1.6, ls=(0, (1, 1)), label="limit: single / devices")
        axis.set_xticks(range(len(methods)), [METHOD_NAMES.get(m, m) for m in methods])
        axis.grid(False, axis="x")
        axis.set_title(f"{MODEL_NAMES.get(model, model)}, link: {link}")
    axes[0].set_ylabel("Latency (s)")
    mbps = table["bandwidth_mbps"].iloc[0]
    figure.suptitle(f"Number formats of messages at {mbps:g} Mbps, with their output error", fontsize=10)
    legend_below(figure, axes[0])
    return figure


# --- parts -------------------------------------------------------------------------------------------------------


def _stack(bar, places, rows: pd.DataFrame, width: float, start: str) -> None:
    """Compute, communication and wait of `rows`, in bars on each other that end at `latency_s`."""
    compute = rows["compute_s"].clip(upper=rows["latency_s"])
    waiting = rows["wait_s"].clip(upper=rows["latency_s"] - compute)
    # what is neither compute nor waiting is communication; medians of the parts need not sum to the median
    values = {"compute": compute, "communication": rows["latency_s"] - compute - waiting, "wait": waiting}
    below = 0 * compute
    for name, value in values.items():
        if name != "wait" or value.any():
            bar(places, value, width, label=name, **{start: below}, **PARTS[name])
        below = below + value


def _limit(latency: pd.DataFrame, model: str) -> float | None:
    """Seconds of the modelled single device / devices; where a run did not record it, by the measured single device."""
    rows = valid_rows(latency)
    here = rows[(rows["model"] == model) & (rows["num_devices"] == NUM_DEVICES)]
    if here["limit_s"].notna().any():
        return float(here["limit_s"].median())
    base = single_latency(rows, model)
    return base / NUM_DEVICES if base else None


def _inside(value: float, axis: Axes) -> bool:
    low, high = axis.get_ylim()
    return low <= value <= high


def _normalised_bars(latency: pd.DataFrame, model: str, place: str) -> Figure:
    rows = normalised(valid_rows(latency))
    rows = need(rows[rows["model"] == model], "latency", f"{model} (single and distributed)")
    parts = [select(rows, model, method) for method in PUBLISHED_METHODS]
    rows = need(pd.concat(parts), "latency", f"{model} on {NUM_DEVICES} devices")
    links, bandwidths = links_of(rows), sorted(rows["bandwidth_mbps"].unique(), reverse=True)
    methods = [m for m in PUBLISHED_METHODS if (rows["method"] == m).any()]
    figure, axes = panels(len(links), width=max(3.6, 1.0 * len(bandwidths)))
    step = 0.84 / len(methods)
    for axis, link in zip(axes, links, strict=True):
        for index, method in enumerate(methods):
            part = rows[(rows["link"] == link) & (rows["method"] == method)]
            values = part.groupby("bandwidth_mbps")["normalised"].median().reindex(bandwidths)
            places = np.arange(len(bandwidths)) - 0.42 + step * (index + 0.5)
            axis.bar(places, values, 0.92 * step, color=COLOURS[method], label=METHOD_NAMES[method])
        axis.axhline(1, color="0.3", lw=1, ls="--")
        axis.set_xticks(range(len(bandwidths)), [f"{b:g}" for b in bandwidths])
        axis.grid(False, axis="x")
        axis.set_xlabel("Bandwidth (Mbps)")
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Latency / single device")
    figure.suptitle(f"{MODEL_NAMES[model]} on {NUM_DEVICES} devices, Nb = 4, Ndiv = 4 (paper {place})", fontsize=10)
    legend_below(figure, axes[0])
    return figure


def _scaling(latency: pd.DataFrame, model: str, place: str, claims: dict[str, float]) -> Figure:
    rows = normalised(valid_rows(latency))
    at_bandwidth = dict(bandwidth_mbps=SCALING_BANDWIDTH_MBPS, num_devices=None)
    rows = pd.concat([select(rows, model, method, **at_bandwidth) for method in PUBLISHED_METHODS])
    rows = need(rows, "latency", f"{model} at {SCALING_BANDWIDTH_MBPS} Mbps (single and distributed)")
    links = links_of(rows)
    methods = [m for m in PUBLISHED_METHODS if (rows["method"] == m).any()]
    figure, axes = panels(len(links), width=4.4)
    for axis, link in zip(axes, links, strict=True):
        for method in methods:
            line = rows[(rows["link"] == link) & (rows["method"] == method)].groupby("num_devices")["speedup"].median()
            line = pd.concat([pd.Series({1: 1.0}), line[line.index > 1].sort_index()])
            if len(line) > 1:
                colour, marker, style, width = LOOKS[method]
                look = dict(color=colour, marker=marker, ls=style, lw=width, ms=9 if marker == "*" else 5)
                axis.plot(line.index, line.values, label=METHOD_NAMES[method], **look)
        for method, value in claims.items():
            label = f"{METHOD_NAMES[method]}, published".replace("Paper", "Auto")  # as the paper calls it
            axis.plot([NUM_DEVICES], [value], "D", ms=8, mfc="none", mew=1.4, color=COLOURS[method], label=label)
        devices = sorted({1, 2, 3, 4, *rows["num_devices"]})
        axis.plot(devices, devices, color="0.6", lw=0.9, ls=":", label="ideal")
        axis.set_xlabel("Devices")
        axis.set_ylim(0)
        whole_ticks(axis, list(devices))
        axis.set_title(f"link: {link}")
    axes[0].set_ylabel("Speedup over one device")
    title = f"{MODEL_NAMES[model]} at {SCALING_BANDWIDTH_MBPS} Mbps, Nb = 4, Ndiv = 4 (paper {place})"
    figure.suptitle(title, fontsize=10)
    legend_below(figure, axes[0])
    return figure
