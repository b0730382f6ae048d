"""`detransformer run`: one request over a cluster's devices, real hosts or emulated ones.

On real hosts the same command runs on every one: it finds its device in the file and starts the agent of its worker
(`hosts`). The first host is the front (`fleet`): it waits until all have joined, and asks. This process imports neither
torch nor transformers there: the worker does, and the first device's worker plans. On an emulated cluster (`session`)
the same request takes the same jobs.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from detransformer.cluster.devices import DeviceError
from detransformer.cluster.fleet import Fleet
from detransformer.cluster.hosts import ANSWERING, Hosts, interface_of, own_interfaces, own_rank
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def ask(
    fleet: Fleet, request: Request, title: str, pace: Callable[[Mapping], Mapping] = lambda plan: {}
) -> tuple[dict, list]:
    """Has the workers of `fleet` plan and answer one request, and prints it; returns its record and the workers' own.

    `pace` maps the plan to further arguments of `answering.answer`: how the answer is paced.

    Raises:
        ValueError: if no plan fits, or the request is at fault.
        DeviceError: if a worker is lost or fails, or the output differs from the single device's.
    """
    everyone = range(len(fleet.names))
    plan, inputs = fleet.run(f"{ANSWERING}:plan", {"request": asdict(request)}, devices=[0])[0]
    if "refused" in plan:
        raise ValueError(plan["refused"])
    names = [name.partition(" (")[0] for name in fleet.names]
    for device, part in enumerate(plan["parts"]):
        fleet.say(device, f"{names[device]}: {part}")
    answers = fleet.run(f"{ANSWERING}:answer", {"job": plan["job"], **pace(plan)}, inputs)
    results = [answers[device][0]["record"] for device in everyone]
    (made, _) = fleet.run(f"{ANSWERING}:report_on", {"results": results}, answers[plan["last"]][1], devices=[0])[0]
    record = {"cluster": title, **made["record"]}
    print("\n".join(made["lines"]), flush=True)
    if not record.get("check", {}).get("agrees", True):
        raise DeviceError(0, f"the output differs from the single device's: {record['check']}")
    return record, results


def run_emulated(
    spec: ClusterSpec, model: str, request: Request, transport: str, time_scale: float | None, threads: int
) -> dict:
    """Runs the request on the devices of `spec`, emulated on this machine; prints the answer and returns the record.

    Raises:
        ValueError, DeviceError: as `ask`.
    """
    from detransformer.cluster.selfcheck import host_time_scale, lateness, warn_if_late
    from detransformer.opening import open_checkpoint

    config = open_checkpoint(model).config
    profile = spec.profile(config)
    home = {"cluster": str(spec.path.resolve()), "model": str(Path(model).resolve())}
    with spec.emulate(transport=transport, threads=threads, home=home) as cluster:

        def pace(plan: Mapping) -> Mapping:
            scale = time_scale or host_time_scale(cluster, config, profile, plan["busy"])
            cluster.set_link(spec.bandwidth_bps, scale)
            return {"paced": True, "modelled_link": cluster.transport != "namespaces", "time_scale": scale}

        title = f"{spec.name} ({cluster.profile_name}, {cluster.link} link)"
        print(title)
        record, results = ask(cluster.fleet, request, title, pace)
        late = lateness(results)
        warn_if_late(late, cluster.time_scale)
    return record | {"time_scale": cluster.time_scale, "pacing_overrun": late}


def run_on_hosts(
    spec: ClusterSpec, model: str, request: Request, host: str | None, wait_s: float, threads: int | None
) -> dict | None:
    """Runs this host's part of a request; the first device prints the answer and returns the record.

    Raises:
        ValueError: for faults that a user has to correct on this host or another.
        DeviceError: if a host does not come, is lost or fails; the sentence names it.
    """
    interfaces = own_interfaces()
    rank = own_rank(spec, host, interfaces)
    interface = interface_of(spec, rank, interfaces)
    titles = [f"{member.name} ({member.address})" for member in spec.members]
    options = dict(own=rank, interface=interface, stays=False, threads=threads or 0, wait_s=wait_s)
    with Hosts(spec, model, **options) as here:
        _say(f"{spec.names[rank]}: device {rank + 1} of {len(titles)} of {spec.name}, on {interface}")
        if rank:
            here.start()
            here.wait()
            return None
        waiting = dict(on_event=lambda kind, sentence, _: _say(sentence) if kind == "waiting" else None)
        with Fleet(titles, here.listen(), here.store, **waiting) as fleet:
            here.start()
            reach = f"{titles[0]}, port {spec.port}"
            fleet.wait(wait_s, f": start the same command there, and check that it reaches {reach}")
            record, _ = ask(fleet, request, spec.name)
            for device, name in enumerate(spec.names):
                if device:
                    fleet.say(device, f"{name}: done; the answer is on {spec.names[0]}")
        return record
