"""`detransformer plan` and `profile`: predicts a model's plans on a cluster, and measures what predictions need."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detransformer import __version__
from detransformer.cluster.devices import DEVICES, DeviceSpec, describe_devices
from detransformer.commands import options
from detransformer.presets import PRESETS

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

    from detransformer.cluster.spec import ClusterSpec
    from detransformer.planning.placement import Placement

MAX_PROFILED, MAX_LISTED = 8, 8  # devices


def plan(
    model: options.Model = "bert-base",
    cluster: options.ClusterFile = None,
    devices: options.Devices = None,
    bandwidth: options.Bandwidth = None,
    memory: options.Memory = None,
    profile: Annotated[
        Path | None, typer.Option(parser=options.path, help="File made by `detransformer profile`.")
    ] = None,
    device: options.Preset = None,
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
    seq_len: options.Tokens = 128,
    batch_size: options.Batch = 1,
    wire: options.Wires = options.FLOAT32,
    explain: Annotated[bool, typer.Option("--explain", help="Show what limits the chosen plan.")] = False,
    advise: Annotated[
        bool, typer.Option("--advise", help="Show whether decoupling or compressing pays, and what it costs.")
    ] = False,
    output: options.Output = None,
    pace: options.Pace = "measured",
) -> None:
    """Predict all plans for a model on a cluster and choose one, which --output saves as JSON.

    --advise compares the unmodified model, the decoupled one, and both with compressed messages (--wire, else int8).
    """
    spec = cluster_of(cluster, devices, device, profile=profile)
    num_devices, rates = len(spec.devices), bandwidth or [spec.link.bandwidth_mbps]
    if output and len(rates) > 1:
        raise ValueError(f"--output {output} takes the plan of one bandwidth, and --bandwidth names several: give one.")
    if output and advise:
        raise ValueError(f"--output {output} takes a plan, and --advise compares several: leave one of them out.")

    from detransformer.files import atomic_write
    from detransformer.models.configuration import max_tokens
    from detransformer.planning.placement import bottleneck, place_freely
    from detransformer.planning.profile import ClusterProfile

    structure = num_original_layers, num_divisions, attention_width
    config = config_of(model, *structure)
    if seq_len > max_tokens(config):
        raise ValueError(f"--seq-len {seq_len} is out of range; give one from 1 to {max_tokens(config)}.")
    known = ClusterProfile.load(profile) if profile else None
    if known and len(known.devices) < num_devices:
        raise ValueError(
            f"--devices {num_devices} is more than the {len(known.devices)} in {profile}; profile them first."
        )
    for mbps in rates:
        if known:
            planned, name = known.of(range(num_devices)).at(mbps * 1e6), f"{num_devices} profiled devices"
        else:
            planned = spec.profile(config, pace, mbps * 1e6)
            name = f"{spec.name}: {on_devices(spec.device_specs)}" if cluster else on_devices(spec.device_specs)
        request = dict(seq_len=seq_len, batch_size=batch_size, memory_budget_bytes=options.in_bytes(memory))
        if advise:
            from detransformer.commands.advice import advice

            compressed = next((word for word in wire if word != "float32"), "int8")
            prices, lines = advice(config, structure, planned, compressed, request)
            shown = [markdown(prices), "", *lines]
        else:
            started = time.perf_counter()
            placement = place_freely(config, planned, wires=wire, **request)
            shown = _lines(placement, time.perf_counter() - started)
            shown += [bottleneck(placement.plan, config, planned, seq_len, batch_size)] if explain else []
        print(f"\n{model} on {name}, at {mbps:g} Mbps (predicted)\n", *shown, sep="\n")
        if output:
            chosen = placement.chosen
            with atomic_write(output) as file:
                json.dump({"plan": chosen.plan.to_dict(), "predicted_s": chosen.prediction.latency_s}, file, indent=2)
            print(f"saved to {output}")


def _lines(placement: "Placement", planning_s: float) -> list[str]:
    rows = placement.table().assign(
        devices=[_listed(a.plan.device_ids) for a in placement.alternatives],
        sent_kib=[sum(a.prediction.bytes.values()) / 2**10 for a in placement.alternatives],
        memory_mib=lambda frame: frame["memory_bytes"] / 2**20,
    )
    shown = [
        "method",
        "devices",
        "plan",
        "predicted_s",
        "compute_s",
        "comm_s",
        "sent_kib",
        "memory_mib",
        "fits",
        "reason",
    ]
    chosen = placement.chosen
    return [
        markdown(rows.drop_duplicates(["method", "devices"])[shown]),
        f"\nchosen: {chosen.plan.method} ({chosen.plan.describe()}), {chosen.prediction.latency_s:.3f} s: "
        f"the fastest that fits of {len(rows)} plans; planned in {planning_s:.2f} s.",
        *(f"{sentence}." for sentence in placement.left_out),
    ]


def _listed(devices: Sequence[int]) -> str:
    """Such as `0+1+3`, or their number."""
    return "+".join(map(str, devices)) if len(devices) <= MAX_LISTED else f"{len(devices)} devices"


def profile(
    output: Annotated[Path, typer.Option(parser=options.file_to_write, help="JSON file to save the profile to.")],
    model: options.Model = "bert-base",
    cluster: options.ClusterFile = None,
    devices: Annotated[
        int | None, typer.Option(min=2, max=MAX_PROFILED, help="Number of equal devices; default: 4.")
    ] = None,
    bandwidth: options.Bandwidth = None,
    device: Annotated[
        Literal[("host", *DEVICES)] | None,
        typer.Option(help="host (the default) is measured; the others have their published figures."),
    ] = None,
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
) -> None:
    """Measure what the planner needs: operations on this host and collectives over the links.

    For a cluster file of real hosts, this host is measured and the links are assumed as the file says; for an emulated
    one, the file's devices give the rates.
    """
    spec = cluster_of(cluster, devices, device if cluster else None)
    num_devices = len(spec.devices)
    if not 2 <= num_devices <= MAX_PROFILED:
        raise ValueError(f"{cluster} lists {num_devices} devices; a profile is made of 2 to {MAX_PROFILED}.")
    (mbps, *more) = bandwidth or [spec.link.bandwidth_mbps]
    if more:
        raise ValueError(f"--bandwidth names {len(more) + 1} rates; a profile is made at one.")

    from detransformer.cluster.devices import link_shares, preset_profile
    from detransformer.cluster.profiler import host_profile, profile_link, profile_operations
    from detransformer.cluster.session import EmulatedCluster
    from detransformer.planning.profile import ClusterProfile, LinkProfile

    config = config_of(model, num_original_layers, num_divisions, attention_width)
    if cluster and spec.emulated:
        computes = spec.profile(config).devices
    elif device in (None, "host"):
        operations = profile_operations(config)
        print(markdown(operations))
        computes = (host_profile(platform.node() or "host", operations),) * num_devices
    else:
        computes = (preset_profile(device, config),) * num_devices
    for name, rate, source in dict.fromkeys((c.name, c.flops_per_s, c.source) for c in computes):
        print(f"{name}: {rate / 1e9:.1f} GFLOP/s ({source})")
    link = LinkProfile(mbps * 1e6, shared=spec.link.shared)
    # measured with equal links, whatever their shares
    emulated = EmulatedCluster(num_devices, bandwidth_bps=link.bandwidth_bps, shared=link.shared)
    if emulated.transport == "namespaces" and spec.emulated:
        with emulated:
            link, rows = profile_link(emulated)
        print(markdown(rows))
    link = replace(link, shares=link_shares(spec.device_specs))
    print(f"link: {link.source}")
    provenance = {
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.platform(),
        "python": sys.version.split()[0],
        "detransformer": __version__,
    }
    ClusterProfile(computes, link).save(output, provenance)
    print(f"saved to {output}")


# --- Shared with bench ----------------------------------------------------------------------------------------------


def config_of(model: str, num_original_layers: int, num_divisions: int, attention_width: str) -> "PretrainedConfig":
    """The decoupled configuration of a preset, or a folder's own."""
    from detransformer.models.configuration import preset_config
    from detransformer.opening import open_checkpoint

    if model in PRESETS:
        return preset_config(model, num_original_layers, num_divisions, attention_width)
    return open_checkpoint(model).config


def cluster_of(file: Path | None, devices: int | None, device: str | None, **more: Any) -> "ClusterSpec":
    """The cluster of `--cluster`, or one of equal devices as the other options say.

    Args:
        more: further options that a file replaces, such as `delay` and `jitter` of the links, in ms.

    Raises:
        ValueError: if such an option is given beside a file.
    """
    from detransformer.cluster.spec import ClusterSpec, Device, Link

    if file is None:
        link = Link(delay_ms=more.get("delay") or 0, jitter_ms=more.get("jitter") or 0)
        equal = [Device(device=device or "rpi4b")] * (devices or 4)
        return ClusterSpec.model_construct(emulated=True, link=link, devices=equal)
    for name, value in {"devices": devices, "device": device, **more}.items():
        if value is not None:
            raise ValueError(f"--{name} {value} cannot be combined with --cluster, which sets it; leave one out.")
    return ClusterSpec.load(file)


def on_devices(specs: Sequence[DeviceSpec]) -> str:
    """Such as `4 x Raspberry Pi 4B`, or a list if they differ."""
    alike = len({spec.hardware for spec in specs}) == 1
    return f"{len(specs)} x {describe_devices(specs)}" if alike else describe_devices(specs)


def markdown(frame: "pd.DataFrame") -> str:
    """A Markdown table with four digits per number."""
    return frame.to_markdown(index=False, floatfmt=".4g")
