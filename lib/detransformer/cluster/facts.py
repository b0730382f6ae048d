"""What a host has: versions, and digests of its copy of the model, which all hosts of a cluster must have alike."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detransformer import __version__


def host_facts(job: Mapping[str, Any]) -> dict[str, Any]:
    """What all hosts must have alike, as a worker says it to the front; empty where all are one machine."""
    if not job.get("listed"):
        return {}
    torch = importlib.metadata.version("torch").partition("+")[0]
    facts = {"devices": job["listed"], "versions": f"detransformer {__version__} and torch {torch}"}
    try:
        return facts | model_facts(job["model"])
    except ValueError as error:
        return facts | {"problem": str(error)}


def model_facts(folder: str) -> dict[str, Any]:
    """What all hosts must have alike of the model: digests of config.json and of the weights, and their size.

    Raises:
        ValueError: if config.json or model.safetensors is missing or unreadable.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"model folder {folder} does not exist on this host: copy the checkpoint there.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: copy the whole checkpoint there.") from None
    except ValueError:
        raise ValueError(f"{folder}/config.json is damaged: copy the checkpoint there again.") from None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors: copy the whole checkpoint there.")
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    try:
        size = sum(file.stat().st_size for file in files)
        digests = "".join(_file_digest(file, *_stamp(file)) for file in files)
    except OSError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error.strerror}): copy them there again.") from None
    return {
        "config": _digest(json.dumps(kept, sort_keys=True).encode()),
        "weights_bytes": size,
        "weights": _digest(digests.encode()),
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@functools.cache
def _file_digest(file: Path, *stamp: int) -> str:
    """SHA-256 of a file, kept in memory while its `stamp` is the same: workers are started again and again."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
