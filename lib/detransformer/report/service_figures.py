"""Figures of a serving cluster that is broken on purpose, of one under load for long, and of what the tests run."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from detransformer.report.canvas import COLOURS, legend_below, need, panels
from detransformer.service.promises import NAMED_S, SERVED_S

PROMISED_S = {"named_s": NAMED_S, "served_s": SERVED_S}
SHORTEST_S = 0.05  # what took less is drawn there
LOOKS = {"named_s": ("named", "o", COLOURS["tp"]), "served_s": ("served again", "s", COLOURS["bp+auto"])}


def faults(frame: pd.DataFrame) -> Figure:
    """Seconds from each fault until the session names the device and until it answers again, each round a mark."""
    rows = need(frame, "chaos_rounds", "rounds")
    names = list(dict.fromkeys(rows["fault"]))[::-1]
    place = {name: number for number, name in enumerate(names)}
    figure, (axis,) = panels(1, width=6.4)
    figure.set_figheight(1.2 + 0.27 * len(names))
    for column, (label, marker, colour) in LOOKS.items():
        seen = rows[rows[column].notna()]
        shift = 0.14 if column == "named_s" else -0.14
        heights = seen["fault"].map(place) + shift
        axis.plot(seen[column].clip(lower=SHORTEST_S), heights, marker, ms=4.5, alpha=0.7, color=colour, label=label)
        axis.axvline(PROMISED_S[column], color=colour, lw=1, ls="--", label=f"{label}: promised")
    axis.set_yticks(range(len(names)), names)
    axis.set_xscale("log")
    ticks = [SHORTEST_S, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    axis.set_xticks(ticks, [f"\u2264 {ticks[0]:g}", *(f"{tick:g}" for tick in ticks[1:])])
    axis.minorticks_off()
    axis.set_xlabel("seconds after the fault")
    lost = int(rows[["lost", "wrong", "twice"]].to_numpy().sum())
    title = f"{len(rows)} faults under load, {int(rows['requests'].sum()):,} requests: "
    figure.suptitle(f"{title}{lost} lost, wrong or answered twice", fontsize=10)
    legend_below(figure, axis)
    return figure


def soak(frame: pd.DataFrame) -> Figure:
    """Memory and answers of a serving cluster under load, a fault a minute."""
    rows = need(frame, "soak_samples", "samples")
    minutes = rows["seconds"] / 60
    figure, (memory, answers) = panels(2, width=4.2, sharey=False)
    for column, label, colour in (
        ("front_mib", "front", COLOURS["bp+auto"]),
        ("devices_mib", "devices, together", COLOURS["tp"]),
    ):
        memory.plot(minutes, rows[column], ".-", ms=3, lw=0.8, color=colour, label=label)
    memory.set(xlabel="minutes", ylabel="memory of their own, MiB")
    memory.set_ylim(0)
    memory.legend(loc="center right")
    answers.plot(minutes, rows["answered"] - rows["answered"].iloc[0], lw=1.2, color=COLOURS["bp+auto"])
    answers.set(xlabel="minutes", ylabel="requests answered")
    answers.set_ylim(0)
    figure.suptitle("Under load, a fault a minute", fontsize=10)
    return figure


def coverage(frame: pd.DataFrame) -> Figure:
    """Share of each room's lines that the tests run."""
    rows = need(frame, "coverage", "lines").sort_values("share")
    figure, (axis,) = panels(1, width=5.6)
    figure.set_figheight(1.0 + 0.26 * len(rows))
    bars = axis.barh(rows["room"], rows["share"], color=COLOURS["bp+auto"])
    labels = [f"{row.share:.1%} of {row.lines:,}" for row in rows.itertuples()]
    axis.bar_label(bars, labels, padding=3, fontsize=8)
    axis.set_xlim(0, 1.25)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    total = (rows["share"] * rows["lines"]).sum() / rows["lines"].sum()
    figure.suptitle(f"Lines that the tests run: {total:.1%}", fontsize=10)
    return figure
