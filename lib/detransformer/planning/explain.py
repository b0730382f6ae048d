"""Why this plan: what else there was, what limits it and what would help, from a `Placement`, in one screen of text."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from textwrap import fill

from transformers import PretrainedConfig

from detransformer.models.configuration import layer_kinds
from detransformer.parallel.plan import Plan
from detransformer.planning.compiled import Compiled
from detransformer.planning.placement import Alternative, Placement, device_speeds, place_freely, search_space
from detransformer.planning.profile import ClusterProfile

WIDTH, MIB = 80, 2**20
NUM_RIVALS, NUM_COUNTS, NUM_DEVICES = 3, 3, 8  # rows at most: other strategies, numbers of devices, devices
HELPS = 0.01  # what saves a smaller share of the latency does not help


def explanation(
    placement: Placement,
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    past: int = 0,
) -> dict:
    """What `explain` says, as numbers: seconds, bytes, and shares of the latency.

    `alternatives`, `splits`, `counts` (the best plan of each number of devices) and `helps` are rows for tables. All
    arguments are those that `placement` was made with.
    """
    plan, prediction = placement.plan, placement.chosen.prediction
    tokens = [sum(part) for part in zip(*plan.tokens(seq_len), strict=True)]
    splits = [
        {
            "device": device,
            "name": profile.devices[device].name,
            "tokens": tokens[rank],
            "heads": plan.heads[rank],
            "ffn_columns": plan.ffn_columns[rank],
            "sub_blocks": plan.sub_blocks[rank] if "block" in plan.strategies else None,
            "memory_bytes": prediction.memory_bytes[rank],
            "budget_bytes": memory_budget_bytes or profile.devices[device].memory_bytes,
        }
        for rank, device in enumerate(plan.device_ids)
    ]
    best = {a.plan.num_devices: a for a in reversed(placement.alternatives) if a.fits and a.plan.wire == plan.wire}
    counts = [
        {
            "num_devices": count,
            "latency_s": a.latency_s,
            "compute_s": a.prediction.compute_s,
            "comm_s": a.prediction.comm_s,
        }
        for count, a in sorted(best.items())
    ]
    request = dict(seq_len=seq_len, batch_size=batch_size, past=past)
    return {
        "latency_s": placement.chosen.latency_s,
        "plan": plan.describe(),
        "exact": placement.exact,
        "alternatives": [_row(kind, a, placement) for kind, a in _shown(placement, config)],
        "splits": splits,
        "left_out": list(placement.left_out),
        "limits": limits(plan, config, profile, **request),
        "counts": counts,
        "helps": helps(placement, config, profile, memory_budget_bytes=memory_budget_bytes, **request),
    }


def _shown(placement: Placement, config: PretrainedConfig) -> Iterator[tuple[str, Alternative]]:
    """(what it is, alternative), fastest first: the chosen one, and the best of each other kind."""
    chosen, rivals, counts, wires = placement.chosen, 0, {placement.plan.num_devices}, {placement.plan.wire}
    strategies, named = {placement.plan.strategies}, {*search_space(config), "single"}
    for a in placement.alternatives:
        plan = a.plan
        if a is chosen:
            named.discard(plan.method)
            yield "chosen", a
        elif plan.method in named:
            named.remove(plan.method)
            yield plan.method, a
        elif plan.method != "bp+auto":
            continue
        elif plan.wire not in wires:
            wires.add(plan.wire)
            yield plan.wire, a
        elif plan.num_devices not in counts and len(counts) <= NUM_COUNTS:
            counts.add(plan.num_devices)
            yield f"on {plan.num_devices} devices", a
        elif plan.num_devices == chosen.plan.num_devices and plan.strategies not in strategies and rivals < NUM_RIVALS:
            strategies.add(plan.strategies)
            rivals += 1
            yield "other strategies", a


def _row(kind: str, alternative: Alternative, placement: Placement) -> dict:
    plan, prediction = alternative.plan, alternative.prediction
    published = {"single": "one device", "bp+allgather": "BP+Allgather"}.get(plan.method, plan.method.upper())
    return {
        "kind": kind,
        "name": published if kind == plan.method else _short(plan) + (f", {kind}" if kind == plan.wire else ""),
        "plan": plan.describe(),
        "num_devices": plan.num_devices,
        "wire": plan.wire,
        "latency_s": prediction.latency_s,
        "compute_s": prediction.compute_s,
        "comm_s": prediction.comm_s,
        "sent_bytes": sum(prediction.bytes.values()),
        "memory_bytes": max(prediction.memory_bytes),
        "over_chosen": prediction.latency_s / placement.chosen.latency_s,
        "reason": alternative.reason,
    }


def _short(plan: Plan) -> str:
    """The strategies of original layers: `3 heads + tensor, 4 chunks`, or where they change often, how many of each."""
    original = [name for name in plan.strategies if name != "block"]
    runs = [(name, len(list(run))) for name, run in groupby(original)]
    runs = runs if len(runs) < 4 else Counter(original).most_common()
    words = " + ".join(f"{count} {name}" for name, count in runs)
    return words + (f", {plan.num_chunks} chunks" if plan.num_chunks > 1 else "")


def limits(
    plan: Plan,
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    past: int = 0,
) -> dict:
    """What `plan` spends its latency on, in shares that add up to 1; and its busiest `device`.

    `compute`: operations. `reading`: weights from memory, beyond that. `rate`: bytes on the links. `steps`: latency of
    the collectives' steps. Rate and steps may hide each other: each is taken at its mean with and without the other.
    """

    def latency_s(profile: ClusterProfile) -> float:
        return Compiled(config, plan, profile, seq_len, batch_size, past).price(plan.strategies).latency_s

    def without(rate: bool, steps: bool) -> float:
        link = replace(profile.link, step_latency_s={"*": 0.0}) if steps else profile.link
        return latency_s(replace(profile, link=link.at(float("inf")) if rate else link))

    whole_s, no_rate_s, no_steps_s, local_s = (without(*w) for w in ((0, 0), (1, 0), (0, 1), (1, 1)))
    rate_s = (whole_s - no_rate_s + no_steps_s - local_s) / 2
    tireless = replace(profile, devices=tuple(replace(d, memory_bytes_per_s=None) for d in profile.devices))
    tireless = replace(tireless, link=replace(profile.link, step_latency_s={"*": 0.0}).at(float("inf")))
    compute_s = latency_s(tireless)
    return {
        "device": plan.device_ids[Compiled(config, plan, profile, seq_len, batch_size, past).busiest(plan.strategies)],
        "compute": compute_s / whole_s,
        "reading": (local_s - compute_s) / whole_s,
        "rate": rate_s / whole_s,
        "steps": (whole_s - local_s - rate_s) / whole_s,
    }


def helps(
    placement: Placement,
    config: PretrainedConfig,
    profile: ClusterProfile,
    memory_budget_bytes: int | None = None,
    **request: int,
) -> list[dict]:
    """What the best plan would take with more of one thing each: `change`, `latency_s`, `speedup`; the best first."""
    link, wire = profile.link, placement.plan.wire
    fastest = max(range(len(profile.devices)), key=device_speeds(profile).__getitem__)
    one_more = replace(
        profile,
        devices=(*profile.devices, profile.devices[fastest]),
        link=replace(link, shares=(*link.shares, link.share(fastest)) if link.shares else ()),
    )
    blocks = getattr(config, "num_divisions", len(profile.devices) + 1)
    more = f"one more {profile.devices[fastest].name}"
    more += f" (but there are {blocks} sub-blocks)" if len(profile.devices) >= blocks else ""
    less_latency = replace(link, step_latency_s={kind: s / 2 for kind, s in link.step_latency_s.items()})
    roomier = tuple(replace(device, memory_bytes=2 * device.memory_bytes) for device in profile.devices)
    changes = {
        "twice the bandwidth": (replace(profile, link=link.at(2 * link.bandwidth_bps)), wire, memory_budget_bytes),
        "half the step latency": (replace(profile, link=less_latency), wire, memory_budget_bytes),
        more: (one_more, wire, memory_budget_bytes),
        "twice the memory": (replace(profile, devices=roomier), wire, memory_budget_bytes and 2 * memory_budget_bytes),
        "int8 on the wire": (profile, "int8", memory_budget_bytes),
    }
    if wire == "int8":
        del changes["int8 on the wire"]
    if all(a.fits for a in placement.alternatives):
        del changes["twice the memory"]
    rows = []
    for change, (changed, new_wire, budget) in changes.items():
        best = place_freely(config, changed, memory_budget_bytes=budget, wire=new_wire, **request).chosen
        speedup = placement.chosen.latency_s / best.latency_s
        rows.append({"change": change, "latency_s": best.latency_s, "speedup": speedup, "plan": best.plan.describe()})
    return sorted(rows, key=lambda row: row["latency_s"])


# In words ------------------------------------------------------------------------------------------------------------


def explain(
    placement: Placement,
    config: PretrainedConfig,
    profile: ClusterProfile,
    seq_len: int = 128,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
    past: int = 0,
) -> str:
    """Why `placement` is as it is, for a terminal of 80 columns and 40 lines; arguments as in `explanation`."""
    facts = explanation(placement, config, profile, seq_len, batch_size, memory_budget_bytes, past)
    kinds, plan = Counter(layer_kinds(config)), placement.plan
    title = f"{config.model_type}, {' and '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))} layers; "
    title += f"{batch_size} x {seq_len} tokens" + (f" after {past}" if past else "")
    title += f"; {len(profile.devices)} devices, {profile.link.bandwidth_bps / 1e6:g} Mbps, {plan.wire}"
    refused = [f"{row['name']} {row['reason']}." for row in facts["alternatives"] if row["reason"]]
    parts = [
        [title],
        _table(facts["alternatives"]),
        refused[:NUM_RIVALS],
        _splits(facts["splits"]),
        [f"{sentence[0].upper()}{sentence[1:]}." for sentence in facts["left_out"][:NUM_COUNTS]],
        [_limits(facts["limits"], profile), _helps(facts["helps"]), _more_devices(facts["counts"], plan)],
    ]
    return "\n".join("\n".join(fill(line, WIDTH, subsequent_indent="  ") for line in part if line) for part in parts)


def _table(rows: list[dict]) -> list[str]:
    lines = [f"{'plan':28}{'dev':>4}{'s':>8}{'compute':>8}{'comm':>8}{'KiB':>7}{'MiB':>6}  verdict"]
    for row in rows:
        name, over = row["name"] if len(row["name"]) < 28 else row["name"][:24] + "...", row["over_chosen"]
        verdict = "chosen" if row["kind"] == "chosen" else f"{over - 1:+.1%}" if over < 2 else f"{over:.1f}x"
        seconds = f"{row['latency_s']:8.3f}{row['compute_s']:8.3f}{row['comm_s']:8.3f}"
        sizes = f"{row['sent_bytes'] / 1024:7.0f}{row['memory_bytes'] / MIB:6.0f}"
        lines.append(f"{name:28}{row['num_devices']:4}{seconds}{sizes}  {'no room' if row['reason'] else verdict}")
    return lines


def _splits(rows: list[dict]) -> list[str]:
    """A line a device; devices that take the same in one line."""
    lines, alike = [], {}
    for row in rows:
        alike.setdefault(tuple(value for key, value in row.items() if key != "device"), []).append(row)
    for same in list(alike.values())[:NUM_DEVICES]:
        row, ids = same[0], [str(row["device"]) for row in same]
        which = f"Devices {', '.join(ids)}" if 1 < len(ids) < 6 else f"Device {ids[0]}"
        which += f" and {len(ids) - 1} like it" if len(ids) > 5 else ""
        takes = f"tokens {row['tokens']}, heads {row['heads']}, FFN columns {row['ffn_columns']}"
        takes += f", sub-blocks {row['sub_blocks']}" if row["sub_blocks"] is not None else ""
        room = f"{row['memory_bytes'] / MIB:.0f} of {row['budget_bytes'] / MIB:.0f} MiB"
        lines.append(f"{which} ({row['name']}): {takes}; {room}")
    return lines


def _limits(shares: dict, profile: ClusterProfile) -> str:
    """The bottleneck in words."""
    device = f"device {shares['device']} ({profile.devices[shares['device']].name})"
    names = {
        "compute": f"compute of {device}",
        "reading": f"reading weights on {device}",
        "rate": "bytes on the links",
        "steps": "latency of messages",
    }
    parts = sorted(((shares[key], words) for key, words in names.items() if shares[key] >= 0.005), reverse=True)
    return "Bottleneck: " + ", ".join(f"{words} {share:.0%}" for share, words in parts) + "."


def _helps(rows: list[dict]) -> str:
    useful = [
        f"{row['change']} {row['latency_s']:.3g} s ({row['speedup']:.2f}x)"
        for row in rows
        if row["speedup"] > 1 + HELPS
    ]
    useless = [row["change"] for row in rows if row["speedup"] <= 1 + HELPS]
    words = f"What would help: {', '.join(useful)}" if useful else "Nothing alone would help"
    return words + (f"; not: {', '.join(useless)}." if useful and useless else ".")


def _more_devices(counts: list[dict], plan: Plan) -> str:
    """Why more devices are slower, where they are."""
    by_count = {row["num_devices"]: row for row in counts}
    more = [row for count, row in by_count.items() if count > plan.num_devices]
    if not more:
        return ""
    own, row = by_count[plan.num_devices], min(more, key=lambda row: row["latency_s"])
    saved, added = own["compute_s"] - row["compute_s"], row["comm_s"] - own["comm_s"]
    return (
        f"Why are {row['num_devices']} devices slower than {plan.num_devices}? {row['latency_s']:.3g} s instead of "
        f"{own['latency_s']:.3g} s: compute takes {abs(saved):.2g} s {'less' if saved >= 0 else 'more'}, "
        f"messages that nothing hides {abs(added):.2g} s {'more' if added >= 0 else 'less'}."
    )
