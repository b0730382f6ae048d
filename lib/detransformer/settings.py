"""The environment variables the package reads, in one place."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where generated checkpoints are kept: `DETRANSFORMER_CACHE`, else the user's cache folder."""
    named = os.environ.get("DETRANSFORMER_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detransformer"
