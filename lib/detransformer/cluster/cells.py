"""The conditions of a measured row, and grids of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detransformer.cluster.devices import PACES
from detransformer.parallel.methods import METHODS
from detransformer.parallel.wire import check_wire

FLOAT32_METHODS = ("single", "dp", "dtensor")  # they send nothing, or PyTorch sends float32


@dataclass(frozen=True)
class Cell:
    """The conditions of one row. `num_original_layers` and `num_divisions` matter to BP methods only.

    `burns`: paced devices compute instead of sleeping (`Pacer`), to measure the cost of messages beside compute.
    """

    model: str
    method: str
    num_devices: int = 4
    bandwidth_mbps: float = 125.0
    num_original_layers: int = 4
    num_divisions: int = 4
    attention_width: str = "full"
    seq_len: int = 128
    batch_size: int = 1
    repeats: int = 5
    wire: str = "float32"
    pace: str = "measured"
    burns: bool = False

    def __post_init__(self):
        if self.pace not in PACES:
            raise ValueError(f"pace={self.pace!r} is unknown: choose one of {', '.join(PACES)}.")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown: choose from {', '.join(METHODS)}.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1: measure at least once.")
        if not self.bandwidth_mbps > 0:
            raise ValueError(f"bandwidth_mbps={self.bandwidth_mbps} must be above 0.")
        check_wire(self.wire)
        if self.method in FLOAT32_METHODS and self.wire != "float32":
            raise ValueError(f"{self.method} cannot send {self.wire}: use wire='float32'.")

    @property
    def needs_decoupled(self) -> bool:
        return self.method.startswith("bp+")

    @property
    def comparison(self) -> tuple:
        """The conditions that compared cells share: such cells are measured in turn."""
        sizes = self.seq_len, self.batch_size, self.repeats
        return self.model, self.num_devices, self.bandwidth_mbps, *sizes, self.pace


def grid(
    model: str,
    methods: Sequence[str],
    bandwidths_mbps: Sequence[float],
    num_devices: int = 4,
    wire: str = "float32",
    **common: Any,
) -> list[Cell]:
    """Cells of `methods` x `bandwidths_mbps`, method by method, so that a device loads each method's weights once.

    `single` and `dp` use no link: they have one cell, at the first bandwidth. `FLOAT32_METHODS` keep float32.
    """
    return [
        Cell(model, method, num_devices, mbps, wire="float32" if method in FLOAT32_METHODS else wire, **common)
        for method in methods
        for mbps in (bandwidths_mbps[:1] if method in ("single", "dp") else bandwidths_mbps)
    ]
