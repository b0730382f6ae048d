"""Collects what made a run, for its manifest: commit, package versions, hardware, data, seeds.

A run may be committed and shared, so nothing names a person, a host or a place outside the repository.
"""

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import tomllib
from pathlib import Path

import pandas as pd

from detransformer.files import repository_root
from detransformer.record.run import RunFolder
from detransformer.settings import data_environment


def commit(root: Path | None = None) -> dict:
    """Commit of a clone, by default this package's, and whether its files differ from it; "unknown" outside one."""
    try:
        root = root or repository_root()
        head = _git(root, "rev-parse", "--verify", "HEAD^{commit}").strip()
        return {"commit": head, "dirty": bool(changed_files(root))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}


def changed_files(root: Path) -> list[str]:
    """Uncommitted files: changed ones, and new ones that git does not ignore, outside results/.

    A run changes its own folder there, and nothing is computed from results/.

    Raises:
        OSError, subprocess.SubprocessError: outside a git clone, or without git.
    """
    status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".", ":!results")
    return [line[3:] for line in status.split("\0") if line]


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def kept_from(manifest: dict) -> dict[str, list[str]]:
    """Notebook -> the commits, other than the manifest's, that made its results or some of its rows."""
    kept = {}
    for name, entry in manifest["notebooks"].items():
        commits = {str(commit) for commit in (entry.get("commit"), *(entry.get("rows_kept_from") or ())) if commit}
        if others := sorted(commits - {manifest.get("commit")}):
            kept[name] = others
    return kept


def pins(root: Path) -> dict[str, str]:
    """Package -> version pin (`==2.13.0`, `==5.23.*`) from pyproject.toml, run-time and development."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project.get("optional-dependencies", {}).get("dev", [])]
    return dict(re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line).groups() for line in lines)


def versions(root: Path) -> dict[str, str]:
    """Installed versions of Python, this package and every pinned package ("missing" if not installed)."""
    found = {"python": platform.python_version()}
    for package in ("detransformer", *pins(root)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def data_setting(root: Path) -> dict:
    """The machine's data, without its path: the mirror's size and a digest of its file names and sizes."""
    environment = data_environment(root)
    folder, hub = environment.mirror, "offline" if environment.hub_offline else "tried"
    if not folder.is_dir():
        named = environment.mirror_named_by == "DETRANSFORMER_DATA"
        return {"mirror": "named but not there" if named else "none", "hub": hub}
    files = sorted((p.relative_to(folder).as_posix(), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    return {
        "mirror": "present",
        "mirror_files": len(files),
        "mirror_bytes": sum(size for _, size in files),
        "mirror_digest": hashlib.sha256(repr(files).encode()).hexdigest()[:16],
        "hub": hub,
    }


def data_sources(run: RunFolder) -> dict[str, list[str]]:
    """Table -> values of its `source` column, the data that its rows were made from."""
    found = {}
    for path in sorted(run.tables.glob("*.csv")):
        columns = pd.read_csv(path, nrows=0).columns
        if "source" in columns:
            values = pd.read_csv(path, usecols=["source"])["source"].dropna().astype(str).unique()
            found[path.stem] = sorted(values)
    return found


def seeds(parameters: dict, prefix: str = "") -> dict[str, object]:
    """Every parameter for seeds or their number, by its path, e.g. `03_accuracy.finetuning.CoLA.num_seeds`."""
    found = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            found |= seeds(value, f"{prefix}{key}.")
        elif key in ("seed", "seeds") or key.endswith(("_seed", "_seeds")):
            found[f"{prefix}{key}"] = value
    return found
