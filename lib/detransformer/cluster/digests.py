"""Digests of whole files, remembered where reading them again would take long."""

import hashlib
import json
import time
from pathlib import Path

from detransformer.files import atomic_write
from detransformer.settings import cache_folder

REMEMBERED_BYTES = 2**26  # a smaller file is read each time
SETTLED_S = 2.0  # since a file's last change: a second change may not move its times, which are coarse


def file_digest(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal.

    That of a large file is kept in the cache folder for as long as inode, size and times of the file are the same: what
    a disk does to it without writing is not seen. A cache that cannot be written is done without.

    Raises:
        OSError: where the file cannot be read.
    """
    path = Path(path).resolve()
    if (found := known_digest(path)) is not None:
        return found
    before = _stamp(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
    if status.st_size >= REMEMBERED_BYTES and settled and before == _stamp(path):
        try:
            with atomic_write(_note(path)) as file:
                json.dump({"file": str(path), "stamp": before, "sha256": digest}, file)
        except OSError:
            pass
    return digest


def known_digest(path: str | Path) -> str | None:
    """`file_digest` of the file where it is remembered, else None."""
    path = Path(path).resolve()
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        return note["sha256"] if note["stamp"] == _stamp(path) else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
        return None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _note(path: Path) -> Path:
    return cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
