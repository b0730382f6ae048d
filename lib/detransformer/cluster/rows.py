"""Measured rows kept in a file, so that an interrupted grid can be resumed."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detransformer.files import PACKAGE, atomic_write, data_folder

ROOMS = ("models", "parallel", "planning", "cluster")  # whose code makes rows


class RowFile:
    """The rows measured so far on a cluster, by their conditions, in a JSON file.

    The conditions include a fingerprint of the code and of `studies`, files beside the package that make the rows: rows
    of another version are measured again. Without a path nothing is kept.
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
        """The row that `put` was given for `cell` under the same conditions; None where there is none."""
        return self._kept.get(json.dumps(cell | self._conditions))

    def put(self, cell: dict, measured: Any) -> Any:
        """Keeps `measured`, and returns it."""
        self._kept[json.dumps(cell | self._conditions)] = measured
        if self._path:
            with atomic_write(self._path) as file:
                json.dump(self._kept, file)
        return measured

    def remove(self) -> None:
        """Deletes the file."""
        if self._path:
            self._path.unlink(missing_ok=True)


def _code_fingerprint(studies: Sequence[str]) -> str:
    """A digest of the code and the committed data that make rows."""
    folders = [*(PACKAGE / room for room in ROOMS), *map(data_folder, ("published", "measured"))]
    files = [file for folder in folders for kind in ("*.py", "*.csv") for file in sorted(folder.glob(kind))]
    digest = hashlib.sha256()
    for file in [*files, *map(Path, studies)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
