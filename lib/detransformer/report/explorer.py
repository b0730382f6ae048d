"""A control panel for the planner: other models, links, devices and budgets than a notebook's, and what is then best.

`plans` is the pure part: settings in, a row a method out, predicted by the cost model. `explorer` shows it: as widgets
where somebody sits at the notebook, as the table of the first settings where it is executed unwatched or ipywidgets
is not installed.
"""

import sys
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from detransformer.cluster.devices import cluster_profile, device_specs
from detransformer.cluster.experiments import load_link
from detransformer.cluster.spec import BANDWIDTH_LIMITS_MBPS
from detransformer.models.configuration import PRESETS, preset_config
from detransformer.parse import number, one_of, whole_number
from detransformer.planning.placement import place_freely
from detransformer.planning.problem import Alternative, Problem
from detransformer.planning.profile import LinkProfile
from detransformer.report.tables import METHOD_NAMES, MODEL_NAMES, SEQ_LEN, select, valid_rows

if TYPE_CHECKING:
    from ipywidgets import VBox
    from pandas.io.formats.style import Styler

MAX_DEVICES = 8
LINE_RATE = "line-rate"
COMPARED = ("single", "tp")  # beside the best plan, both of the unmodified model


@dataclass(frozen=True)
class Settings:
    """What a plan is looked for: a decoupled model, devices that are all alike, a link and one request.

    Args:
        model: of `PRESETS`.
        bandwidth_mbps: of each device's link.
        num_devices: at most; the planner may leave some out.
        memory_mib: that a plan may take on each device; None: the device's own.
        seq_len: tokens of the request, batch 1.
        device: a preset of `cluster.devices`.

    Raises:
        ValueError: for a value out of range, with the range.
    """

    model: str = "bert-base"
    bandwidth_mbps: float = 125.0
    num_devices: int = 4
    memory_mib: float | None = None
    seq_len: int = 128
    num_original_layers: int = 4
    num_divisions: int = 4
    device: str = "rpi4b"

    def __post_init__(self):
        one_of(self.model, "model", PRESETS)
        number(self.bandwidth_mbps, "bandwidth in Mbps", *BANDWIDTH_LIMITS_MBPS)
        whole_number(self.num_devices, "number of devices", 1, MAX_DEVICES)
        whole_number(self.seq_len, "sequence length", 1, preset_config(self.model).max_position_embeddings)
        if self.memory_mib is not None:
            number(self.memory_mib, "memory budget in MiB", 1)

    @property
    def memory_budget_bytes(self) -> int | None:
        return None if self.memory_mib is None else int(self.memory_mib * 2**20)


def plans(settings: Settings, link: LinkProfile | None = None, measured: pd.DataFrame | None = None) -> pd.DataFrame:
    """The best plan of the decoupled model beside one device and TP of the unmodified one: predicted, seconds and MiB.

    `speedup` is over one device, `memory_mib` the fullest device's, `lacks` says what a method needs more than the
    budget allows. `attrs` has `left_out`, a sentence for each device that the best plan leaves out, and `link`, where
    the link's figures come from.

    Args:
        link: what was measured of collectives (notebook 04); None: assumed, 0.2 ms a step and 94% of the rate.
        measured: bench rows; adds `measured_s` where one of them is of these settings and had no budget.

    Raises:
        ValueError: where no plan of the decoupled model fits the memory: what it lacks, and what would help.
    """
    decoupled = preset_config(settings.model, settings.num_original_layers, settings.num_divisions)
    original = preset_config(settings.model)
    specs = device_specs(settings.num_devices, settings.device)
    bandwidth_bps, budget = settings.bandwidth_mbps * 1e6, settings.memory_budget_bytes

    def profile(config):
        return cluster_profile(specs, settings.model, config, bandwidth_bps, link=link)

    best = place_freely(decoupled, profile(decoupled), settings.seq_len, memory_budget_bytes=budget)
    unmodified = Problem(original, profile(original), settings.seq_len, 1, budget=budget)
    compared = dict(zip(COMPARED, unmodified.published(COMPARED, "float32"), strict=True))
    table = pd.DataFrame([_row(name, a) for name, a in {"bp+auto": best.chosen, **compared}.items()])
    table.insert(4, "speedup", compared["single"].latency_s / table["predicted_s"])
    if measured is not None:
        table["measured_s"] = [_measured_s(measured, method, settings) for method in table["method"]]
    table.attrs |= {"left_out": list(best.left_out), "link": (link or LinkProfile(bandwidth_bps)).source}
    return table


def _row(method: str, alternative: Alternative) -> dict:
    prediction = alternative.prediction
    return {
        "method": method,
        "plan": alternative.plan.describe(),
        "devices": alternative.plan.num_devices,
        "predicted_s": prediction.latency_s,
        "compute_s": prediction.compute_s,
        "comm_s": prediction.comm_s,
        "memory_mib": max(prediction.memory_bytes) / 2**20,
        "lacks": alternative.reason,
    }


def _measured_s(latency: pd.DataFrame, method: str, settings: Settings) -> float:
    """Seconds of the valid row of these settings on the clean link; NaN where there is none."""
    if settings.memory_mib is not None or settings.seq_len != SEQ_LEN or settings.device != Settings.device:
        return float("nan")
    sends = method != "single"  # one device is as fast on any link
    rows = select(
        valid_rows(latency),
        settings.model,
        method,
        link=LINE_RATE,
        bandwidth_mbps=settings.bandwidth_mbps if sends else None,
        num_devices=settings.num_devices if sends else 1,
        num_original_layers=settings.num_original_layers,
        num_divisions=settings.num_divisions,
    )
    return float(rows["latency_s"].iloc[0]) if len(rows) else float("nan")


def shown(table: pd.DataFrame) -> "Styler":
    """`plans` as a notebook shows it, methods by name, columns without any entry left out."""
    named = table.assign(method=table["method"].map(METHOD_NAMES))
    empty = [name for name in ("lacks", "measured_s") if name in named and not named[name].replace("", None).count()]
    style = named.drop(columns=empty).style.hide().format(precision=3, na_rep="")
    return style.format("{:.2f}", subset="speedup").format("{:.0f}", subset="memory_mib")


def about(settings: Settings, table: pd.DataFrame) -> str:
    """What was planned for, by what figures, and which devices the best plan leaves out: a caption."""
    name = MODEL_NAMES[settings.model]
    hardware = device_specs(1, settings.device)[0].hardware
    budget = "its own memory" if settings.memory_mib is None else f"{settings.memory_mib:g} MiB"
    words = f"{name}, {settings.num_devices} x {hardware} of {budget} each, {settings.bandwidth_mbps:g} Mbps, "
    words += f"seq {settings.seq_len}, batch 1; predicted"
    return ". ".join([words, f"Link {table.attrs['link']}", *table.attrs["left_out"]]) + "."


def is_watched() -> bool:
    """Whether somebody is at the notebook: its front end said that input may be asked for.

    Those that show widgets say so with each cell; papermill and nbconvert, which execute a notebook for nobody, do not.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    request = kernel.get_parent("shell") if kernel is not None else {}
    return bool(request.get("content", {}).get("allow_stdin"))


def explorer(
    profiles: str | Path | None = None, measured: pd.DataFrame | None = None, **settings: object
) -> "Styler | VBox":
    """The plans of other settings: a control panel in a live notebook, else the table of `settings` alone.

    Args:
        profiles: the folder in which notebook 04 keeps what it measured of links; None, or without it: assumed.
        measured: as in `plans`.
        settings: fields of `Settings`, to begin with.

    Raises:
        ValueError: as `Settings` and, for the table, `plans` do.
    """
    start = Settings(**settings)
    if is_watched() and can_show_widgets():
        return panel(start, profiles, measured)
    table = plans(start, _link(profiles, start), measured)
    return shown(table).set_caption(about(start, table))


def can_show_widgets() -> bool:
    """Whether ipywidgets is installed."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return False
    return True


def _link(profiles: str | Path | None, settings: Settings) -> LinkProfile | None:
    return load_link(profiles, settings.model) if profiles is not None else None


def panel(start: Settings, profiles: str | Path | None = None, measured: pd.DataFrame | None = None) -> "VBox":
    """Widgets for model, bandwidth, devices, memory and tokens over the table of what they say.

    `children[:-1]` are the controls, described by the name of their field; `children[-1]` is the answer: the table, or
    the one sentence that says why there is none.
    """
    import ipywidgets

    layout = dict(style={"description_width": "9em"}, layout={"width": "36em"}, continuous_update=False)
    choice = {key: value for key, value in layout.items() if key != "continuous_update"}
    memory = "" if start.memory_mib is None else f"{start.memory_mib:g}"
    controls = {
        "model": ipywidgets.Dropdown(options=PRESETS, value=start.model, **choice),
        "bandwidth_mbps": ipywidgets.FloatText(value=start.bandwidth_mbps, **layout),
        "num_devices": ipywidgets.IntSlider(value=start.num_devices, min=1, max=MAX_DEVICES, **layout),
        "memory_mib": ipywidgets.Text(value=memory, placeholder="the device's own", **layout),
        "seq_len": ipywidgets.IntText(value=start.seq_len, **layout),
    }
    for name, control in controls.items():
        control.description = name
    answer = ipywidgets.HTML()

    def update(_change: object = None) -> None:
        answer.value = _answer(start, {name: control.value for name, control in controls.items()}, profiles, measured)

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), answer])


def _answer(start: Settings, values: dict, profiles: str | Path | None, measured: pd.DataFrame | None) -> str:
    """The table of what the controls say as HTML, or the sentence of a ValueError."""
    try:
        memory = values["memory_mib"].strip()
        values |= {"memory_mib": number(memory, "memory budget in MiB", 1) if memory else None}
        settings = replace(start, **values)
        table = plans(settings, _link(profiles, settings), measured)
    except ValueError as error:
        return f"<p>{escape(str(error))}</p>"
    return shown(table).set_caption(escape(about(settings, table))).to_html()
