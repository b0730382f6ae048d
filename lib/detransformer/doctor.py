"""Checks what this machine can do, and names a remedy for each limit. Tries things rather than guessing."""

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from detransformer import machine
from detransformer.cluster.network import can_emulate
from detransformer.files import repository_root
from detransformer.record import provenance
from detransformer.settings import data_environment
from detransformer.training.data.hub import hub_problem

MIRROR_PARTS = ("glue", "squad", "wikipedia", "vocab")
NEEDED_DISK_GB, NEEDED_MEMORY_GB = 5, 6  # a quick run with its checkpoints; five processes with BERT-Large


@dataclass(frozen=True)
class Finding:
    """One check: its state (`ok`, `limited`: works with less, or `missing`), what was found, and the remedy."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding about this machine, most basic first."""
    python = Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        root = repository_root()
        found = [packages(root), clone(root)]
    except FileNotFoundError as error:
        remedy = "clone the repository; the package alone has no notebooks."
        found = [Finding("Notebooks", "missing", str(error), remedy)]
    return [python, *found, *hardware(), *data()]


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines, each remedy below its finding, and a closing sentence."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<18} {finding.state:<8} {finding.found}")
        lines += [f"{'':<27} -> {finding.remedy}"] if finding.remedy else []
    missing = [finding.name for finding in findings if finding.state == "missing"]
    closing = "`make reproduce` runs here; its tables name the limits."
    if missing:
        closing = f"Fix this before `make reproduce`: {', '.join(missing)}."
    return "\n".join([*lines, "", closing])


def packages(root: Path) -> Finding:
    """Compares the installed versions with the pins of pyproject.toml."""
    pins, found = provenance.pins(root), provenance.versions(root)
    wrong = {name: pin for name, pin in pins.items() if not _satisfies(found[name], pin.removeprefix("=="))}
    if not wrong:
        return Finding("Packages", "ok", f"all {len(pins)} as pinned, torch {found['torch']}")
    words = "; ".join(f"{name} {found[name]} (pinned {pin})" for name, pin in wrong.items())
    state = "missing" if any(found[name] == "missing" for name in wrong) else "limited"
    return Finding("Packages", state, words, "run `make install`, or `pip install -e '.[dev]'`.")


def clone(root: Path) -> Finding:
    """The clone's notebooks, and its commit."""
    count = len(list((root / "notebooks").glob("[0-9][0-9]_*.ipynb")))
    state = provenance.commit(root)
    changed = ", changed since" if state["dirty"] else ""
    return Finding("Notebooks", "ok", f"{count} notebooks, commit {state['commit'][:12]}{changed}")


def hardware() -> list[Finding]:
    """Cores, memory and disk against what four emulated devices need, the GPU, and whether links can be shaped."""
    cores, memory, disk = machine.usable_cores(), psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    gpus, remedy = machine.gpu_names(), "only the `paper` profile needs one; quick and laptop train on the processor."
    usable = bool(gpus) and torch.cuda.is_available()
    if gpus and not usable:
        remedy = "install the CUDA build of the pinned torch; training uses the processor until then."
    return [
        _enough("Processor", cores >= 2, f"{cores} core{'s' if cores > 1 else ''}, {machine.cpu_model()}",
                "four emulated devices need two cores; on one, times are stretched."),
        _enough("Memory", memory.available >= NEEDED_MEMORY_GB * 1e9,
                f"{memory.total / 1e9:.0f} GB, {memory.available / 1e9:.0f} GB available",
                f"BERT-Large on four devices needs {NEEDED_MEMORY_GB} GB; close programs or leave BERT-Large out."),
        _enough("Disk", disk.free >= NEEDED_DISK_GB * 1e9, f"{disk.free / 1e9:.0f} GB free in {Path.cwd()}",
                f"a quick run needs {NEEDED_DISK_GB} GB; free some, or use --output elsewhere."),
        _enough("GPU", usable, ", ".join(gpus) or "none", remedy),
        _enough("Emulated cluster", *can_emulate(),
                "run as root (or with CAP_NET_ADMIN and CAP_SYS_ADMIN); until then links are modelled in the process."),
    ]  # fmt: skip


def data() -> list[Finding]:
    """Whether a mirror folder has text and tasks, and whether the Hugging Face Hub answers within three seconds."""
    environment = data_environment()
    folder, named = environment.mirror, environment.mirror_named_by == "DETRANSFORMER_DATA"
    counts = {part: sum(1 for p in (folder / part).rglob("*") if p.is_file()) for part in MIRROR_PARTS}
    lacking = [part for part, count in counts.items() if not count]
    found = f"{folder}: {', '.join(f'{part} {count} files' for part, count in counts.items() if count) or 'empty'}"
    remedy = f"copy {', '.join(lacking)} there, or unset DETRANSFORMER_DATA to use the Hub."
    if not folder.is_dir():
        found = f"DETRANSFORMER_DATA names {folder}, which is not a folder" if named else "none"
        remedy = "set DETRANSFORMER_DATA to a mirror, or link one to data/mirror."
    problem = hub_problem(environment.hub_offline, timeout_s=3)
    built_in = "not needed with a mirror; without either, a small built-in corpus is used and the tables say so."
    return [
        _enough("Data mirror", not lacking, found, remedy),
        _enough("Hugging Face Hub", problem is None, problem or "reachable", built_in),
    ]


def _enough(name: str, is_enough: bool, found: str, remedy: str) -> Finding:
    return Finding(name, "ok", found) if is_enough else Finding(name, "limited", found, remedy)


def _satisfies(version: str, pin: str) -> bool:
    """Whether `2.13.0+cpu` satisfies `2.13.0`, `5.23.1` satisfies `5.23.*`."""
    version = version.split("+")[0]
    return version.startswith(pin[:-1]) if pin.endswith("*") else version == pin
