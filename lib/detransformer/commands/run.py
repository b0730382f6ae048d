"""`detransformer run`: one request over a cluster's devices. On a real host it imports no torch: its worker does."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from detransformer.commands import options
from detransformer.files import with_home
from detransformer.presets import PRESETS

ENSEMBLE_FILE = "ensemble.json"  # in a folder that `detransformer decompose` made


def run(
    cluster: options.Cluster,
    model: options.Folder,
    host: options.Host = None,
    text: Annotated[
        str | None, typer.Option(parser=options.utf8, help="Text for the model, whose folder needs a tokenizer.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(parser=with_home, help="Image file for an ensemble of `decompose`.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(parser=options.utf8, help="The passage that a question is about.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of random tokens, instead of a text; default: 128.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto (the fastest plan), or one by name: single, tp, sp, bp+tp, bp+paper, ...")
    ] = "auto",
    plan: options.Plan = None,
    wire: options.Wires = options.FLOAT32,
    memory: options.Memory = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured requests.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a GPT-2 generates.")] = 64,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the whole model on the first device (or this machine).")
    ] = False,
    output: options.Output = None,
    wait: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds to wait for the other hosts.")] = 120,
    threads: options.Threads = None,
    transport: options.Transport = "auto",
    time_scale: options.TimeScale = None,
) -> None:
    """Answer a request over a cluster's devices: start the same command on every host of the file, in any order.

    The first device of the file decides on the request and its plan and prints the answer, which --output saves with
    latency and plan as JSON; the others wait for it. If a host does not come or is lost, all end with one sentence that
    names it. For a file with `emulated: true`, start the command once: all devices are processes of this machine.
    """
    from detransformer.cluster.request import Request
    from detransformer.cluster.run import run_emulated, run_on_hosts
    from detransformer.cluster.spec import ClusterSpec
    from detransformer.files import atomic_write
    from detransformer.folders import find_folder

    if text is not None and tokens is not None:
        raise ValueError(f"--tokens {tokens} cannot be combined with --text; give a text or a number of random tokens.")
    if image is not None and (text is not None or tokens is not None):
        raise ValueError(f"--image {image} cannot be combined with --text or --tokens; give what the model takes.")
    if context is not None and text is None:
        raise ValueError("--context needs --text, the question about it.")
    spec = ClusterSpec.load(cluster)
    if model in PRESETS and not Path(model).is_dir():
        raise ValueError(f"--model {model} is a preset with random weights, for bench and plan; give a model's folder.")
    # If a real host lacks the folder, its worker reports that to all hosts.
    with contextlib.nullcontext() if spec.emulated else contextlib.suppress(ValueError):
        model = str(find_folder(model))
    ensemble = (Path(model) / ENSEMBLE_FILE).is_file()
    if image is not None and not ensemble:
        raise ValueError(f"--image {image} is for an ensemble, and {model} is not one: make one with `decompose`.")
    if spec.emulated and host:
        raise ValueError(f"--host {host} is for real hosts, and {cluster} lists emulated devices; leave it out.")
    if ensemble and not spec.emulated:
        raise ValueError(
            f"{model} is an ensemble, which runs only on emulated devices, and {cluster} lists real hosts: set "
            "emulated: true in a copy of it."
        )
    request = Request(
        text=text,
        image=image,
        context=context,
        num_tokens=tokens or 128,
        method=method,
        plan=plan,
        wires=tuple(wire),
        memory_budget_bytes=options.in_bytes(memory),
        repeats=repeats,
        max_new_tokens=new_tokens,
        check=check,
    )
    if not spec.emulated:
        record = run_on_hosts(spec, model, request, host, wait, threads)
    else:
        if ensemble:
            from detransformer.coformer.ensemble_requests import run_emulated
        record = run_emulated(spec, model, request, transport, time_scale, threads or 1)
    if output and record:
        with atomic_write(output) as file:
            json.dump(record, file, indent=2)
        print(f"saved to {output}")
