"""The common style of all figures: fonts, a colour and marker for each method, a bandwidth axis, saving.

A notebook draws with seaborn on a tidy table: `sns.relplot(rows, hue="method", palette=COLOURS, style="method",
markers=MARKERS)`, then `save(run, "fig7a", grid)`. Published values are hollow or dashed, obtained ones filled.
"""

from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from detransformer.files import atomic_write
from detransformer.record.run import RunFolder

_BLUE, _ORANGE, _GREEN, _RED, _PINK = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"  # seaborn's `colorblind`
_BROWN, _ROSE, _GREY, _SKY, _DARK = "#ca9161", "#fbafe4", "#949494", "#56b4e9", "#333333"

# Relatives share a colour and differ by marker: TP and DTensor, SP and Ulysses.
_LOOKS = {
    "single": (_DARK, "d"),
    "dp": (_GREY, "X"),
    "pp": (_GREY, "v"),
    "tp": (_ORANGE, "o"),
    "sp": (_GREEN, "o"),
    "ulysses": (_GREEN, "s"),
    "galaxy": (_BROWN, "P"),
    "dtensor": (_ORANGE, "s"),
    "auto": (_SKY, "h"),
    "bp+tp": (_RED, "^"),
    "bp+sp": (_PINK, "<"),
    "bp+allgather": (_ROSE, ">"),
    "bp+ulysses": (_DARK, "s"),
    "bp+heads": (_DARK, "D"),
    "bp+paper": (_SKY, "X"),
    "bp+auto": (_BLUE, "p"),
    "bp+narrow": (_BLUE, "o"),
}
COLOURS = {method: colour for method, (colour, _) in _LOOKS.items()}
MARKERS = {method: marker for method, (_, marker) in _LOOKS.items()}

# Colours of the parts of a request's time, and of a device's events.
PARTS = {"compute": "#b3bccb", "communication": _ORANGE, "wait": "#e6e6e6"}
EVENTS = {
    "compute": PARTS["compute"],
    "all_reduce": _ORANGE,
    "all_gather": _GREEN,
    "all_to_all": _BLUE,
    "reduce_scatter": _PINK,
    "send": _RED,
    "receive": _ROSE,
    "wait": PARTS["wait"],
}

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.figsize": (5.6, 3.8),
    "figure.dpi": 100,
}


def use_style() -> None:
    """Apply the style to every figure of this process."""
    plt.rcParams.update(STYLE)


def bandwidth_axis(axis: Axes, bandwidths_mbps: pd.Series) -> None:
    """A logarithmic x axis with one labelled tick for each measured bandwidth."""
    log_axis(axis, "x", sorted(bandwidths_mbps.dropna().unique()))
    axis.tick_params(axis="x", rotation=45)  # 750 and 1000 are close on a logarithmic axis
    axis.set_xlabel("Bandwidth (Mbps)")


def log_axis(axis: Axes, which: str, ticks: Sequence[float]) -> None:
    """A logarithmic `x` or `y` axis, labelled at those `ticks` that lie on it."""
    axis.set(**{f"{which}scale": "log"})
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set(**{f"{which}ticks": shown, f"{which}ticklabels": [f"{tick:g}" for tick in shown]})
    getattr(axis, f"{which}axis").set_minor_locator(NullLocator())


def save(run: RunFolder, name: str, figure: object) -> None:
    """Save a matplotlib Figure, Axes or seaborn grid as figures/NAME.png; the same table gives the same bytes."""
    figure = getattr(figure, "figure", figure)
    assert isinstance(figure, matplotlib.figure.Figure)
    with atomic_write(run.figures / f"{name}.png", "wb") as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def draw_beside(
    data: pd.DataFrame, x: str, published: str = "published", obtained: str = "obtained", error: str = "", **look: str
) -> None:
    """Draw a published column hollow and dashed beside an obtained one, on the current axes of a seaborn grid.

    `error` names a column of standard errors of the obtained values. For `FacetGrid.map_dataframe`, which passes the
    colour and, with hues, the label.
    """
    axis, known, label = plt.gca(), data.dropna(subset=obtained), look.get("label")
    colour, stated, words = (look["color"], look["color"], None) if label else (_BLUE, _GREY, "published")
    axis.plot(data[x], data[published], "D--", ms=5, lw=1, mfc="none", color=stated, label=words)
    errors = known[error] if error else None
    own = dict(fmt="o-", ms=4.5, capsize=2, color=colour, label=label or "obtained")
    axis.errorbar(known[x], known[obtained], errors, **own)
