"""What all figures share: style, colours of methods, panels, axes and legends. Knows no table."""

import io

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A colour, marker and line a method in every figure. The colours are seaborn's `colorblind`; sixteen methods are told
# apart by colour and marker together, relatives share a colour: TP and DTensor, SP and Ulysses.
_BLUE, _ORANGE, _GREEN, _RED, _PINK = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"
_BROWN, _ROSE, _GREY, _SKY, _DARK = "#ca9161", "#fbafe4", "#949494", "#56b4e9", "#333333"
LOOKS: dict[str, tuple[str, str, str, float]] = {  # colour, marker, line style, line width
    "single": (_DARK, "", "--", 1.2),
    "dp": (_GREY, "x", ":", 1.2),
    "pp": (_GREY, "v", "-", 1.2),
    "tp": (_ORANGE, "o", "-", 1.4),
    "sp": (_GREEN, "o", "-", 1.4),
    "ulysses": (_GREEN, "s", "--", 1.4),
    "galaxy": (_BROWN, "P", "-", 1.4),
    "dtensor": (_ORANGE, "s", "--", 1.4),
    "auto": (_SKY, "*", ":", 1.6),
    "bp+tp": (_RED, "^", ":", 1.2),
    "bp+sp": (_PINK, "<", ":", 1.2),
    "bp+allgather": (_ROSE, ">", ":", 1.2),
    "bp+ulysses": (_DARK, "s", ":", 1.2),
    "bp+heads": (_DARK, "D", "-.", 1.2),
    "bp+paper": (_SKY, "X", "-", 1.8),
    "bp+auto": (_BLUE, "*", "-", 2.4),
    "bp+narrow": (_BLUE, "o", ":", 1.2),
}
COLOURS = {method: look[0] for method, look in LOOKS.items()}
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
    "svg.hashsalt": "detransformer",  # same table, same bytes
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
}


class NotebookFigure(Figure):
    """A Figure that a notebook shows without pyplot: nothing is registered, so nothing needs closing."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def need(rows: pd.DataFrame, table: str, what: str) -> pd.DataFrame:
    """`rows`, or a ValueError that names the table where there are none of `what`."""
    if not len(rows):
        raise ValueError(f"Table {table!r} has no valid rows of {what}; run the notebook that measures them first.")
    return rows


def panel_grid(num_rows: int, num_columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of rows and columns of panels, each `width` by `height` inches, and its axes [rows, columns]."""
    figure = NotebookFigure(figsize=(max(width * num_columns, 4.2), height * num_rows + 0.7), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def panels(count: int, width: float, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, each `width` inches wide, and its axes."""
    figure = NotebookFigure(figsize=(max(width * count, 4.6), 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def legend_below(figure: Figure, axis: Axes, columns: int = 4) -> None:
    """One legend for all panels, under them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def legend_beside(axis: Axes) -> None:
    """A legend to the right of its panel."""
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def whole_ticks(axis: Axes, values: list[float]) -> None:
    """Ticks at these values alone, written out rather than as powers."""
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def bandwidth_axis(axis: Axes, bandwidths: pd.Series) -> None:
    """A logarithmic x axis with a tick at each bandwidth that was measured."""
    axis.set_xscale("log", base=2)
    whole_ticks(axis, sorted(bandwidths.dropna().unique()))
    axis.tick_params(axis="x", labelrotation=45)  # 750 and 1000 are close on a logarithmic axis
    axis.set_xlabel("Bandwidth (Mbps)")
