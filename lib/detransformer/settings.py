"""All environment variables that the package reads."""

import os
from dataclasses import dataclass
from pathlib import Path

from detransformer.files import repository_root, with_home

GROUP_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GROUP += ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
GROUP_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")
TRUE_WORDS = {"1", "on", "yes", "true"}


@dataclass(frozen=True)
class DataEnvironment:
    """Where to find data: the mirror folder, and whether the Hub may be asked."""

    mirror: Path
    mirror_named_by: str
    hub_offline: bool


def named_folders() -> dict[str, Path]:
    """DETRANSFORMER_DATA and DETRANSFORMER_CACHE, if set, as absolute paths: a kernel runs in another folder."""
    names = ("DETRANSFORMER_DATA", "DETRANSFORMER_CACHE")
    return {name: Path(with_home(os.environ[name])).resolve() for name in names if os.environ.get(name)}


def data_environment(root: Path | None = None) -> DataEnvironment:
    """DETRANSFORMER_DATA, else `data/mirror` in the repository (`root`), or outside one in the current folder.

    Also HF_HUB_OFFLINE.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE_WORDS
    if named := named_folders().get("DETRANSFORMER_DATA"):
        return DataEnvironment(named, "DETRANSFORMER_DATA", offline)
    if root is None:
        try:
            root = repository_root()
        except FileNotFoundError:
            root = Path.cwd()
    return DataEnvironment(root / "data" / "mirror", "data/mirror", offline)


def cache_folder() -> Path:
    """Where generated checkpoints are kept: `DETRANSFORMER_CACHE`, else the user's cache folder.

    Raises:
        ValueError: if neither is known, since HOME is unset and this user has no entry.
    """
    if named := named_folders().get("DETRANSFORMER_CACHE"):
        return named
    try:
        return Path(with_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "detransformer")
    except ValueError as error:
        raise ValueError(f"there is no cache folder: set DETRANSFORMER_CACHE to one ({error})") from None


def group_sizes() -> str:
    """The variables of a launcher (torchrun, MPI) that make this process one of several, such as `WORLD_SIZE=8`."""
    return ", ".join(f"{name}={os.environ[name]}" for name in GROUP_SIZES if os.environ.get(name, "1") not in ("", "1"))


def leave_group() -> str:
    """Deletes a launcher's variables of another job; returns `group_sizes` from before.

    Otherwise accelerate would wait for that job's other processes.
    """
    sizes = group_sizes()
    for name in [name for name in os.environ if name in GROUP or name.startswith(GROUP_PREFIXES)]:
        del os.environ[name]
    return sizes


def debugging() -> bool:
    """Whether errors are shown with their traceback: `DETRANSFORMER_DEBUG`."""
    return bool(os.environ.get("DETRANSFORMER_DEBUG"))
