"""Rows as they are measured, kept in a file so that a grid can be interrupted and resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from detransformer.files import atomic_write, data_folder

ROOMS = ("models", "parallel", "planning", "cluster")  # whose code makes rows


class RowFile:
    """What was measured so far on a cluster, by its conditions: kept in a JSON file, so that a grid can be resumed.

    With the conditions goes a fingerprint of the code: rows of another version are measured again. Without a path
    nothing is kept.
    """

    def __init__(self, path: str | Path | None, cluster: Any):
        self._path = Path(path) if path else None
        self._kept: dict[str, Any] = {}
        if self._path and self._path.is_file():
            try:
                self._kept = json.loads(self._path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                raise ValueError(f"{path} is not a bench's row file: remove it or choose another name.") from None
        self._conditions = {"link": cluster.link, "device": cluster.profile_name, "code": _code_fingerprint()}
        self._conditions |= {"delay_s": cluster.delay_s, "jitter_s": cluster.jitter_s}

    def get(self, what: dict) -> Any:
        """What `put` was given for `what`, under the same conditions; None where nothing was."""
        return self._kept.get(json.dumps(what | self._conditions))

    def put(self, what: dict, measured: Any) -> Any:
        """Keeps `measured`, and returns it."""
        self._kept[json.dumps(what | self._conditions)] = measured
        if self._path:
            with atomic_write(self._path) as file:
                json.dump(self._kept, file)
        return measured

    def remove(self) -> None:
        """Deletes the file."""
        if self._path:
            self._path.unlink(missing_ok=True)


def _code_fingerprint() -> str:
    """Changes when code or committed data that make rows do: rows of another version are measured again."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    rooms = [(package / room).glob("*.py") for room in ROOMS]
    tables = [data_folder(name).glob("*.csv") for name in ("published", "measured")]
    for source in (source for sources in (*rooms, *tables) for source in sorted(sources)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
