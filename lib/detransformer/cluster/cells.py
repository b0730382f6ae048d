"""The conditions of a measured row, grids of them, and a file of rows from which an interrupted grid resumes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detransformer.files import PACKAGE, atomic_write, computing_digest, data_folder
from detransformer.parallel.methods import METHODS
from detransformer.parallel.wire import check_wire

ROOMS = ("models", "parallel", "planning", "cluster")  # subpackages whose code makes rows
FLOAT32_METHODS = ("single", "dp", "dtensor")  # they send nothing, or PyTorch sends float32


@dataclass(frozen=True)
class Cell:
    """The conditions of one row. `num_original_layers` and `num_divisions` matter to BP methods only.

    `burns`: paced devices compute instead of sleeping (`Pacer`), to measure what messages cost during compute.
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
        """The conditions that compared cells share; they are measured in turn."""
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
    """Cells of `methods` x `bandwidths_mbps`, ordered by method, so that a device loads each method's weights once.

    `single` and `dp` use no link: they have one cell, at the first bandwidth. `FLOAT32_METHODS` keep float32.
    """
    return [
        Cell(model, method, num_devices, mbps, wire="float32" if method in FLOAT32_METHODS else wire, **common)
        for method in methods
        for mbps in (bandwidths_mbps[:1] if method in ("single", "dp") else bandwidths_mbps)
    ]


class RowFile:
    """The rows measured so far on a cluster, by their conditions, in a JSON file.

    The conditions include a fingerprint of the code and of `studies` (files outside the package that make rows): rows
    of another version are measured again. Without a path nothing is saved.
    """

    def __init__(self, path: str | Path | None, cluster: Any, studies: Sequence[str] = ()):
        self._path = Path(path) if path else None
        self._kept: dict[str, Any] = {}
        if self._path and self._path.is_file():
            try:
                self._kept = json.loads(self._path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                raise ValueError(f"{path} is not a bench's row file: remove it or choose another name.") from None
        self._conditions = {"link": cluster.link, "device": cluster.profile_name, "code": _code_fingerprint(studies)}
        self._conditions |= {"delay_s": cluster.delay_s, "jitter_s": cluster.jitter_s}

    def get(self, cell: dict) -> Any:
        """The row that `put` kept for `cell` under the same conditions, or None."""
        return self._kept.get(json.dumps(cell | self._conditions))

    def put(self, cell: dict, measured: Any) -> Any:
        """Keeps `measured`, and returns it."""
        self._kept[json.dumps(cell | self._conditions)] = measured
        if self._path:
            with atomic_write(self._path) as file:
                json.dump(self._kept, file)
        return measured


def _code_fingerprint(studies: Sequence[str]) -> str:
    """A digest of the code and the committed data that make rows."""
    folders = [*(PACKAGE / room for room in ROOMS), *map(data_folder, ("published", "measured"))]
    files = [file for folder in folders for kind in ("*.py", "*.csv") for file in sorted(folder.glob(kind))]
    return computing_digest([*files, *map(Path, studies)])[:16]
