"""`detransformer run`: a request over a cluster's devices, real hosts or emulated ones.

On real hosts the same command runs on every one: it finds which device of the file this host is, waits until all are
there (`rollcall`), and starts torchrun with one worker (`host`). This process loads neither torch nor transformers
(torchrun and its worker do), and plans nothing: the first device's worker does. On an emulated cluster it loads both
and plans, and the same request goes to the workers of a session.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from detransformer import __version__
from detransformer.cluster.devices import DeviceError
from detransformer.cluster.digests import REMEMBERED_BYTES, file_digest, known_digest
from detransformer.cluster.rollcall import Channel, Coordinator, Member, join_words
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import atomic_write
from detransformer.parse import number, whole_number, words
from detransformer.presets import PRESETS

ENSEMBLE_FILE = "ensemble.json"  # in a folder of `detransformer decompose`
WORKER_SILENCE_S = 30  # a heartbeat may be late while torch loads a large model
END_S = 10  # torchrun waits for the others' when its worker is done


@dataclass(frozen=True)
class Request:
    """What is asked of a model: a text, or `num_tokens` random tokens, `repeats` times, and how it is planned.

    A GPT-2 goes on by `max_new_tokens`, once.

    `wires` are the formats that messages may have. `plan` (fields of a `Plan`) goes before `method`.
    """

    text: str | None = None
    image: str | None = None
    context: str | None = None
    num_tokens: int = 128
    method: str = "auto"
    plan: dict | None = None
    wires: tuple[str, ...] = ("float32",)
    memory_budget_bytes: int | None = None
    repeats: int = 5
    max_new_tokens: int = 64
    check: bool = False


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
) -> None:
    """Runs a request over the devices of the file `cluster`; prints the answer and what it took."""
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
        if ensemble:
            from detransformer.cluster.ensemble_requests import run_emulated
        else:
            from detransformer.cluster.host import run_emulated

        record = run_emulated(spec, model, request, transport, scale, num_threads or 1)
    elif ensemble:
        raise ValueError(
            f"{model} is an ensemble, which runs on emulated devices alone, and {cluster} lists real hosts: set "
            "emulated: true in a copy of it."
        )
    else:
        record = run_on_hosts(spec, model, request, host, wait_s, num_threads, _say)
    if output and record:
        with atomic_write(output) as file:
            json.dump(record, file, indent=2)
        print(f"saved to {output}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


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


# --- This host ---------------------------------------------------------------------------------------------------


def own_rank(spec: ClusterSpec, host: str | None, interfaces: Mapping[str, list[str]]) -> int:
    """Which device of the file this host is, by `host`, a device's name, or else by the addresses of its `interfaces`.

    Raises:
        ValueError: if it is none of them, or could be several.
    """
    own = {address for addresses in interfaces.values() for address in addresses}
    listed = join_words([f"{member.name} ({member.address})" for member in spec.members])
    here = [rank for rank, member in enumerate(spec.members) if _resolve(member.address) in own]
    if host is not None:
        if host not in spec.names:
            raise ValueError(f"--host {host} is not in {spec.path}, which lists {listed}.")
        rank = spec.names.index(host)
        if rank not in here and not spec.interface:
            raise ValueError(
                f"--host {host} has the address {spec.members[rank].address} in {spec.path}, and this host has "
                f"{_but_loopback(own)}: correct the file, or name its interface there."
            )
        return rank
    if not here:
        raise ValueError(
            f"this host's addresses ({_but_loopback(own)}) are not in {spec.path}, which lists {listed}: "
            "correct the file, or say which device this is by --host."
        )
    if len(here) > 1:
        raise ValueError(f"several devices of {spec.path} have this host's address: say which one this is by --host.")
    return here[0]


def own_interfaces() -> dict[str, list[str]]:
    """IPv4 addresses by network interface."""
    found = psutil.net_if_addrs().items()
    return {name: [a.address for a in addresses if a.family == socket.AF_INET] for name, addresses in found}


def _but_loopback(addresses) -> str:
    return ", ".join(sorted(a for a in addresses if not a.startswith("127."))) or "none but loopback"


def _resolve(address: str) -> str:
    try:
        return socket.gethostbyname(address)
    except OSError:  # not known here, so not this host
        return address


def model_facts(folder: str, say: Callable[[str], None] = lambda sentence: None) -> dict:
    """What all hosts must have alike of the model: digests of config.json and of the weights, and their size.

    `say` is told where large weights are read for the first time.

    Raises:
        ValueError: if config.json or model.safetensors is missing or unreadable.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"model folder {folder} does not exist on this host: copy the checkpoint there.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: copy the whole checkpoint there.") from None
    except ValueError:
        raise ValueError(f"{folder}/config.json is damaged: copy the checkpoint there again.") from None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors: copy the whole checkpoint there.")
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    try:
        size = sum(file.stat().st_size for file in files)
        if size >= REMEMBERED_BYTES and not all(map(known_digest, files)):
            say(f"{folder}: {size / 2**20:.0f} MiB are read to the end once, to compare the hosts' copies")
        digests = "".join(map(file_digest, files))
    except OSError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error.strerror}): copy them there again.") from None
    return {
        "config": _digest(json.dumps(kept, sort_keys=True).encode()),
        "weights_bytes": size,
        "weights": _digest(digests.encode()),
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _versions() -> str:
    return f"detransformer {__version__} and torch {importlib.metadata.version('torch').partition('+')[0]}"


# --- All hosts ---------------------------------------------------------------------------------------------------


def run_on_hosts(
    spec: ClusterSpec,
    model: str,
    request: Request,
    host: str | None,
    wait_s: float,
    threads: int | None,
    say: Callable[[str], None],
) -> dict | None:
    """This host's part of a request; returns its record on the first device, which prints the answer.

    Raises:
        ValueError: for what is to be put right on this host or another.
        DeviceError: where a host does not come, is lost or fails; the sentence names it.
    """
    interfaces = own_interfaces()
    rank = own_rank(spec, host, interfaces)
    own, first = spec.members[rank], spec.members[0]
    address = _resolve(own.address)
    interface = spec.interface or next(name for name, found in interfaces.items() if address in found)
    hello = {"hello": own.name, "versions": _versions()}
    hello["devices"] = ", ".join(f"{member.name} {member.address}" for member in spec.members)
    problem = ""
    try:
        hello |= model_facts(model, lambda sentence: say(f"{own.name}: {sentence}"))
    except ValueError as error:
        problem = hello["problem"] = str(error)
    coordinator = None
    if rank == 0:
        members = [(member.name, member.address) for member in spec.members]
        coordinator = Coordinator(members, spec.port, wait_s)
        coordinator.start()
    say(f"{own.name}: device {rank + 1} of {len(spec.members)} of {spec.name}, on {interface}")
    try:
        member = Member.join(first.name, first.address, spec.port, 3 if problem else wait_s, say)
    except DeviceError:
        if problem:
            raise ValueError(problem) from None
        raise
    try:
        member.send(hello)
        _meet(member, say)
        with tempfile.TemporaryDirectory(prefix="detransformer-") as folder:
            job = {"cluster": str(spec.path.resolve()), "model": model, "interface": interface, "threads": threads}
            job |= {"request": asdict(request), "folder": folder}
            with Worker(Path(folder), job, rank, spec, address) as worker:
                return _watch(member, worker, say)
    except KeyboardInterrupt:
        member.send({"failed": "it was interrupted", "own": True})
        raise
    finally:
        member.close()
        if coordinator:
            coordinator.join(timeout=5)


def _meet(member: Member, say: Callable[[str], None]) -> None:
    """Until all hosts are there."""
    while True:
        for message in member.poll():
            if "waiting" in message:
                say(f"waiting for {message['waiting']}")
            if message.get("go"):
                return


def _watch(member: Member, worker: "Worker", say: Callable[[str], None]) -> dict | None:
    """Until all hosts have finished; passes on what the worker says, and to the others that it failed."""
    record, verdict = None, None
    while True:
        for message in member.poll(0.1):
            if message.get("done"):
                return record
        for message in worker.messages():
            if "say" in message:
                say(message["say"])
            elif "print" in message:
                print(message["print"], flush=True)
            elif "finished" in message:
                record = message["finished"]
                member.send({"finished": True})
            elif "error" in message and verdict is None:
                verdict = message["error"]
                member.send({"failed": verdict, "own": message["own"]})
        if verdict is None and (why := worker.death()):
            verdict = why
            member.send({"failed": why, "own": True})


class Worker:
    """torchrun on this host with its one worker, and the socket over which that speaks. A context manager."""

    def __init__(self, folder: Path, job: dict, rank: int, spec: ClusterSpec, address: str):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "control"))
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._channel: Channel | None = None
        self._finished = False
        self._log = folder / "torchrun.log"
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        options = {
            "nnodes": len(spec.members),
            "nproc-per-node": 1,
            "node-rank": rank,
            "master-addr": _resolve(spec.members[0].address),
            "master-port": spec.port + 1,
            "local-addr": address,
            "max-restarts": 0,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        code = "from detransformer.cluster.launcher import torchrun; torchrun()"
        command = [sys.executable, "-c", code, *words, "-m", "detransformer.cluster.host", str(folder / "job.json")]
        with open(self._log, "wb") as log:
            # a session of its own: Ctrl-C is for this process, which ends the worker
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )

    def __enter__(self) -> "Worker":
        return self

    def messages(self) -> list[dict]:
        """What the worker has said since the last call."""
        found = []
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._channel = Channel(self._listener.accept()[0])
                self._selector.register(self._channel, selectors.EVENT_READ)
                continue
            messages = self._channel.receive()
            if messages is None:
                self._selector.unregister(self._channel)
                self._channel.close()
                self._channel = None
            found += messages or []
        self._finished = self._finished or any("finished" in message for message in found)
        return found

    def death(self) -> str:
        """Why the worker ended before it had finished, or "" while it works."""
        if self._finished:
            return ""
        if self._process.poll() is not None:
            log = self._log.read_text(errors="replace")
            code = re.search(r"exitcode\s*:\s*-(\d+)", log)
            if code:
                name = signal.Signals(int(code[1])).name
                return f"its worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
            lines = [line.strip() for line in log.splitlines() if "Error" in line]
            return f"its worker ended ({lines[-1] if lines else f'code {self._process.returncode}'})"
        silent_s = self._channel.silent_s if self._channel else 0
        return f"its worker has been silent for {WORKER_SILENCE_S} s" if silent_s > WORKER_SILENCE_S else ""

    def __exit__(self, kind, error, trace) -> None:
        """Waits for a torchrun whose worker has finished; ends any other, and with it its worker."""
        ends = (None, END_S if kind is None else 0), (self._process.terminate, 3), (self._process.kill, 3)
        for end, wait_s in ends:
            if end:
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                break
        self._selector.close()
        self._listener.close()
