"""The environment variables that the package reads, in one place."""

import os
from dataclasses import dataclass
from pathlib import Path

from detransformer.files import repository_root, with_home

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
        return DataEnvironment(Path(with_home(named)).resolve(), "DETRANSFORMER_DATA", offline)
    if root is None:
        try:
            root = repository_root()
        except FileNotFoundError:
            root = Path.cwd()
    folders = [root / "data" / "mirror", Path.cwd() / "data" / "mirror"]
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    return DataEnvironment(found, "data/mirror", offline)


def cache_folder() -> Path:
    """Where generated checkpoints are kept: `DETRANSFORMER_CACHE`, else the user's cache folder.

    Raises:
        ValueError: where neither is known: no HOME, and no user of this number.
    """
    if named := os.environ.get("DETRANSFORMER_CACHE"):
        return Path(with_home(named)).resolve()
    try:
        return Path(with_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "detransformer")
    except ValueError as error:
        raise ValueError(f"there is no cache folder: set DETRANSFORMER_CACHE to one ({error})") from None


def debugging() -> bool:
    """Whether errors are shown with their traceback: `DETRANSFORMER_DEBUG`."""
    return bool(os.environ.get("DETRANSFORMER_DEBUG"))
