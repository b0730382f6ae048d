"""What this machine can do, in plain words, and what to do about what it cannot. Tries things rather than guessing."""

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from detransformer import machine
from detransformer.files import repository_root
from detransformer.record import provenance
from detransformer.settings import data_environment

MIRROR_PARTS = ("glue", "squad", "wikipedia", "vocab")
NEEDED_DISK_GB, NEEDED_MEMORY_GB = 5, 6  # a quick run with its checkpoints; five processes with BERT-Large


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok`, `limited` (works with less) or `missing`, what was found, and what to do."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding about this machine, most basic first."""
    return [
        python(),
        packages(),
        clone(),
        processor(),
        memory(),
        disk(),
        gpu(),
        network_emulation(),
        link_delay(),
        data_mirror(),
        hub(),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines, remedies below theirs, and a closing sentence."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<18} {finding.state:<8} {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<27} -> {finding.remedy}")
    missing = [f.name for f in findings if f.state == "missing"]
    if missing:
        lines.append(f"\nTo be put right before `make reproduce`: {', '.join(missing)}.")
    else:
        lines.append("\n`make reproduce` runs here; what is limited is named in its tables.")
    return "\n".join(lines)


def python() -> Finding:
    """Which Python runs this."""
    return Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def packages(root: Path | None = None) -> Finding:
    """Installed versions against the pins of pyproject.toml."""
    try:
        root = root or repository_root()
    except FileNotFoundError:
        return Finding("Packages", "limited", "no pyproject.toml to compare with", "run this inside a clone.")
    pins, found = provenance.pins(root), provenance.versions(root)
    off = [
        f"{name} {found[name]} (pinned {pin})"
        for name, pin in pins.items()
        if not _satisfies(found[name], pin.removeprefix("=="))
    ]
    if off:
        state = "missing" if any("missing" in text for text in off) else "limited"
        return Finding("Packages", state, "; ".join(off), "run `make install`, or `pip install -e '.[dev]'`.")
    return Finding("Packages", "ok", f"all {len(pins)} as pinned, torch {found['torch']}")


def clone() -> Finding:
    """Whether the notebooks are here, and of which commit."""
    try:
        root = repository_root()
    except FileNotFoundError as error:
        return Finding("Notebooks", "missing", str(error), "clone the repository; the package alone has no notebooks.")
    count = len(list((root / "notebooks").glob("[0-9][0-9]_*.ipynb")))
    state = provenance.commit(root)
    dirty = ", changed since" if state["dirty"] else ""
    return Finding("Notebooks", "ok", f"{count} notebooks, commit {state['commit'][:12]}{dirty}")


def processor() -> Finding:
    """How many cores may be used, and whether four devices can be emulated in time."""
    cores = machine.usable_cores()
    text = f"{cores} {'core' if cores == 1 else 'cores'}, {machine.cpu_model()}"
    if cores < 2:
        return Finding(
            "Processor", "limited", text, "four emulated devices want two cores; times are stretched on one."
        )
    return Finding("Processor", "ok", text)


def memory() -> Finding:
    """How much is free, against what the largest model needs."""
    total, free = (value / 1e9 for value in (psutil.virtual_memory().total, psutil.virtual_memory().available))
    text = f"{total:.0f} GB, {free:.0f} GB available"
    if free < NEEDED_MEMORY_GB:
        remedy = f"BERT-Large on four devices wants {NEEDED_MEMORY_GB} GB; close programs or leave BERT-Large out."
        return Finding("Memory", "limited", text, remedy)
    return Finding("Memory", "ok", text)


def disk() -> Finding:
    """How much is free where results go."""
    try:
        place = repository_root()
    except FileNotFoundError:
        place = Path.cwd()
    free = shutil.disk_usage(place).free / 1e9
    text = f"{free:.0f} GB free in {place}"
    if free < NEEDED_DISK_GB:
        return Finding(
            "Disk", "limited", text, f"a quick run wants {NEEDED_DISK_GB} GB; free some, or use --output elsewhere."
        )
    return Finding("Disk", "ok", text)


def gpu() -> Finding:
    """Whether torch can use one, without which it trains on the processor."""
    names = machine.gpu_names()
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "limited", "torch is not installed, so it cannot use one", "run `make install`.")
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Finding("GPU", "ok", ", ".join(torch.cuda.get_device_name(index) for index in range(count)))
    if names:
        remedy = "install the CUDA build of the pinned torch; training uses the processor until then."
        return Finding("GPU", "limited", f"{', '.join(names)} is here, but this torch cannot use it", remedy)
    return Finding(
        "GPU", "limited", "none", "only the `paper` profile needs one; quick and laptop train on the processor."
    )


def network_emulation() -> Finding:
    """Makes and removes a small network of namespaces with shaped links."""
    from detransformer.cluster.network import can_emulate

    remedy = "run as root (or with CAP_NET_ADMIN and CAP_SYS_ADMIN); until then links are modelled in the process."
    return _possible("Emulated cluster", can_emulate(), remedy)


def link_delay() -> Finding:
    """Whether links can be given latency and jitter."""
    from detransformer.cluster.network import can_delay

    remedy = "only `detransformer bench --delay` and `--jitter` need it: a kernel with sch_netem, as root."
    return _possible("Link delay", can_delay(), remedy)


def _possible(name: str, tried: tuple[bool, str], remedy: str) -> Finding:
    """What was tried, as (whether it works, why); the remedy where it does not."""
    works, reason = tried
    return Finding(name, "ok", reason) if works else Finding(name, "limited", reason, remedy)


def data_mirror() -> Finding:
    """Whether text and tasks lie in a mirror folder, and which."""
    try:
        folder = provenance.mirror_folder(repository_root())
    except FileNotFoundError:
        folder = provenance.mirror_folder(Path.cwd())
    environment = data_environment()
    if folder is None:
        named = environment.mirror_named_by == "DETRANSFORMER_DATA"
        found = f"DETRANSFORMER_DATA names {environment.mirror}, which is not a folder" if named else "none"
        return Finding(
            "Data mirror", "limited", found, "set DETRANSFORMER_DATA to a mirror, or link one to data/mirror."
        )
    counts = {part: sum(1 for p in (folder / part).rglob("*") if p.is_file()) for part in MIRROR_PARTS}
    listing = ", ".join(f"{part} {count} files" for part, count in counts.items() if count)
    lacking = [part for part, count in counts.items() if not count]
    if lacking:
        remedy = f"copy {', '.join(lacking)} there, or unset DETRANSFORMER_DATA to use the Hub."
        return Finding("Data mirror", "limited", f"{folder}: {listing or 'empty'}", remedy)
    return Finding("Data mirror", "ok", f"{folder}: {listing}")


def hub() -> Finding:
    """Whether the Hugging Face Hub answers within three seconds."""
    from detransformer.training.data.hub import hub_problem

    problem = hub_problem(data_environment().hub_offline, timeout_s=3)
    if problem is None:
        return Finding("Hugging Face Hub", "ok", "reachable")
    remedy = "not needed with a mirror; without either, a small built-in corpus is used and the tables say so."
    return Finding("Hugging Face Hub", "limited", problem, remedy)


def _satisfies(version: str, pin: str) -> bool:
    """Whether `2.13.0+cpu` satisfies `2.13.0`, `5.23.1` satisfies `5.23.*`."""
    version = version.split("+")[0]
    return version.startswith(pin[:-1]) if pin.endswith("*") else version == pin
