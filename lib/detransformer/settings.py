"""The environment variables that the package reads, in one place."""

import os
from dataclasses import dataclass
from pathlib import Path

from detransformer.files import repository_root

TRUE_WORDS = {"1", "on", "yes", "true"}


@dataclass(frozen=True)
class DataEnvironment:
    """Where to look: the mirror folder, and whether the Hub may be asked."""

    mirror: Path
    mirror_named_by: str
    hub_offline: bool


def data_environment(root: Path | None = None) -> DataEnvironment:
    """DETRANSFORMER_DATA, else `data/mirror` in the repository (`root`) or the current folder; HF_HUB_OFFLINE."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE_WORDS
    named = os.environ.get("DETRANSFORMER_DATA", "")
    if named:
        return DataEnvironment(Path(named).expanduser().resolve(), "DETRANSFORMER_DATA", offline)
    if root is None:
        try:
            root = repository_root()
        except FileNotFoundError:
            root = Path.cwd()
    folders = [root / "data" / "mirror", Path.cwd() / "data" / "mirror"]
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    return DataEnvironment(found, "data/mirror", offline)


def cache_folder() -> Path:
    """Where generated checkpoints are kept: `DETRANSFORMER_CACHE`, else the user's cache folder."""
    named = os.environ.get("DETRANSFORMER_CACHE")
    if named:
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detransformer"


def debugging() -> bool:
    """Whether errors are shown with their traceback: `DETRANSFORMER_DEBUG`."""
    return bool(os.environ.get("DETRANSFORMER_DEBUG"))
