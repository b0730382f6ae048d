"""`detransformer run`: a session of one request, over a cluster's devices, real hosts or emulated ones.

On real hosts the same command runs on every one: it finds which device of the file this host is and starts the agent of
its worker (`hosts`). The first one is the front (`fleet`): it waits until all are there, and asks. This process loads
neither torch nor transformers there: the worker does, and the first device's worker plans. On an emulated cluster
(`session`) the same request goes the same way.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from detransformer.cluster.devices import DeviceError
from detransformer.cluster.fleet import DONE, Fleet
from detransformer.cluster.hosts import Hosts, interface_of, own_interfaces, own_rank
from detransformer.cluster.request import Request
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import atomic_write
from detransformer.parse import number, whole_number, words
from detransformer.presets import PRESETS

ENSEMBLE_FILE = "ensemble.json"  # in a folder of `detransformer decompose`
ANSWERING = "detransformer.cluster.answering"  # where the jobs of a request are


def run_command(
    cluster: str,
    model: str,
    host: str | None,
    text: str | None,
    image: str | None,
    context: str | None,
    tokens: str | None,
    method: str,
    plan: str | None,
    wire: str,
    memory: str | None,
    repeats: str,
    new_tokens: str,
    check: bool,
    output: str | None,
    wait: str,
    threads: str | None,
    transport: str,
    time_scale: str,
    run_ensemble: Callable[..., dict],
) -> None:
    """Runs a request over the devices of the file `cluster`; prints the answer and what it took.

    Where `model` is a folder of `detransformer decompose`, `run_ensemble` answers (`coformer.ensemble_requests`).
    """
    if text is not None and tokens is not None:
        raise ValueError(f"--tokens {tokens} stands beside --text; give a text or a number of random tokens.")
    if image is not None and (text is not None or tokens is not None):
        raise ValueError(f"--image {image} stands beside --text or --tokens; give what the model takes.")
    if context is not None and text is None:
        raise ValueError("--context needs --text, the question that it answers.")
    request = Request(
        text=text,
        image=image,
        context=context,
        num_tokens=whole_number(tokens or "128", "--tokens", 1),
        method=method,
        plan=read_plan(plan) if plan else None,
        wires=tuple(words(wire, "--wire", ("float32", "bfloat16", "int8"))),
        memory_budget_bytes=None if memory is None else int(number(memory, "--memory", 1) * 2**20),
        repeats=whole_number(repeats, "--repeats", 1),
        max_new_tokens=whole_number(new_tokens, "--new-tokens", 1),
        check=check,
    )
    wait_s = number(wait, "--wait", 1, 86_400)
    num_threads = None if threads is None else whole_number(threads, "--threads", 1, 1024)
    scale = None if time_scale == "auto" else number(time_scale, "--time-scale", 0.1, 64)
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder; give a file name.")
    spec = ClusterSpec.load(cluster)
    if model in PRESETS and not Path(model).is_dir():
        raise ValueError(f"--model {model} is a preset with random weights, for bench and plan; give a model's folder.")
    ensemble = (Path(model) / ENSEMBLE_FILE).is_file()
    if image is not None and not ensemble:
        raise ValueError(f"--image {image} is for an ensemble, and {model} is none: make one with `decompose`.")
    if spec.emulated:
        if host:
            raise ValueError(f"--host {host} is for real hosts, and {cluster} is of emulated devices; leave it out.")
        answer = run_ensemble if ensemble else run_emulated
        record = answer(spec, model, request, transport, scale, num_threads or 1)
    elif ensemble:
        raise ValueError(
            f"{model} is an ensemble, which runs on emulated devices alone, and {cluster} lists real hosts: set "
            "emulated: true in a copy of it."
        )
    else:
        record = run_on_hosts(spec, model, request, host, wait_s, num_threads)
    if output and record:
        with atomic_write(output) as file:
            json.dump(record, file, indent=2)
        print(f"saved to {output}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _say_who_is_missing(kind: str, sentence: str, names: Sequence[str]) -> None:
    if kind == "waiting":
        _say(sentence)


def read_plan(path: str) -> dict:
    """The plan in a file that `detransformer plan --output` or `run --output` wrote, or of a plan's fields alone."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = fields.get("plan", fields)
        if not {"strategies", "heads"} <= set(fields):
            raise ValueError("no strategies or heads in it")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--plan {path} is not a plan ({error}): make one with `detransformer plan`.") from None
    return fields


def ask(
    fleet: Fleet, request: Request, title: str, pace: Callable[[Mapping], Mapping] = lambda plan: {}
) -> tuple[dict, list]:
    """One request to the workers of `fleet`: planned, answered, printed; returns its record and the workers' own.

    `pace` says, of the plan, how the answer is paced: arguments of `answering.answer`.

    Raises:
        ValueError: where no plan fits, or the request is at fault.
        DeviceError: where a worker is lost or fails, or the output differs from the single device's.
    """
    everyone = range(len(fleet.names))
    asked = {"request": asdict(request), "devices": list(everyone)}
    plan, inputs = fleet.run(f"{ANSWERING}:plan", asked, devices=[0])[0]
    if "refused" in plan:
        raise ValueError(plan["refused"])
    names = [name.partition(" (")[0] for name in fleet.names]
    for device, part in enumerate(plan["parts"]):
        fleet.say(device, f"{names[device]}: {part}")
    told = {name: plan[name] for name in ("op", "job", "last")}
    answers = fleet.run(f"{ANSWERING}:answer", {**told, **pace(plan)}, inputs)
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
    """The request on the devices of `spec` emulated on this machine, at its links' rates; prints, returns the record.

    Raises:
        ValueError, DeviceError: as `ask`.
    """
    from detransformer.cluster.checkpoints import open_folder
    from detransformer.cluster.slowdown import lateness, set_time_scale, warn_if_late

    config = open_folder(model).config
    profile = spec.profile(model, config)
    home = {"cluster": str(spec.path.resolve()), "model": str(Path(model).resolve())}
    with spec.emulate(transport=transport, threads=threads, home=home) as cluster:

        def pace(plan: Mapping) -> Mapping:
            scale = set_time_scale(cluster, spec.bandwidth_bps, profile, plan["busy"], config, time_scale)
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
    """This host's part of a request; returns its record on the first device, which prints the answer.

    Raises:
        ValueError: for what is to be put right on this host or another.
        DeviceError: where a host does not come, is lost or fails; the sentence names it.
    """
    interfaces = own_interfaces()
    rank = own_rank(spec, host, interfaces)
    interface = interface_of(spec, rank, interfaces)
    titles = [f"{member.name} ({member.address})" for member in spec.members]
    options = dict(own=rank, interface=interface, stays=False, threads=threads or 0, wait_s=wait_s, words=sys.stderr)
    with Hosts(spec, model, **options) as here:
        _say(f"{spec.names[rank]}: device {rank + 1} of {len(titles)} of {spec.name}, on {interface}")
        if rank:
            here.start()
            here.wait()
            return None
        with Fleet(titles, here.listen(), here.store, on_event=_say_who_is_missing) as fleet:
            here.start()
            reach = f"{titles[0]}, port {spec.port}"
            fleet.wait(wait_s, f": start the same command there, and check that it reaches {reach}")
            record, _ = ask(fleet, request, spec.name)
            for device, name in enumerate(spec.names):
                if device:
                    fleet.say(device, f"{name}: done; the answer is on {spec.names[0]}")
            fleet.close(DONE)
        return record
