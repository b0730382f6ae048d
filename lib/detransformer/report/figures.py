"""The papers' figures, drawn from a run's saved tables only: table in, Figure out.

`FIGURES` names each figure with the tables it needs and the function that draws it, most of them in modules beside this
one. A published value is hollow or hatched beside the obtained one. Drawing computes nothing but what the axes name.
"""

from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from detransformer.files import atomic_write
from detransformer.record.run import RunFolder
from detransformer.report import coformer_figures, coformer_search, service_figures
from detransformer.report.canvas import STYLE


def draw(run: RunFolder, name: str) -> Figure:
    """Draw figure NAME from the run's saved tables, save figures/NAME.svg and .png, and return it.

    Raises:
        ValueError: for an unknown name, a missing table, or a table without the rows the figure needs.
    """
    if name not in FIGURES:
        raise ValueError(f"No figure is called {name!r}; choose one of {', '.join(FIGURES)}.")
    tables, function = FIGURES[name]
    frames = [run.load_table(table) for table in tables]
    with matplotlib.rc_context(STYLE):
        figure = function(*frames)
        with atomic_write(run.figures / f"{name}.svg", "wb") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        with atomic_write(run.figures / f"{name}.png", "wb") as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return figure


FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "coformer_aggregators": (("coformer_ablation", "coformer_aggregators"), coformer_figures.aggregators),
    "coformer_devices": (("coformer_devices",), coformer_figures.devices),
    "coformer_tradeoff": (("coformer_latency",), coformer_figures.tradeoff),
    "coformer_bandwidth": (("coformer_latency",), coformer_figures.bandwidth),
    "coformer_energy": (("coformer_latency",), coformer_figures.energy),
    "predictor": (("predictor_points",), coformer_search.predictor),
    "proxy": (("proxy_points", "proxy"), coformer_search.proxy),
    "search": (("search_history",), coformer_search.search),
    "policies": (("policies",), coformer_search.policies),
    "faults": (("chaos_rounds",), service_figures.faults),
    "soak": (("soak_samples",), service_figures.soak),
    "coverage": (("coverage",), service_figures.coverage),
}
