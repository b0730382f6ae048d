"""How a worker and its front identify each other, and what a worker shows on its host. Imports without torch.

Each proves that it knows the cluster's secret, by the HMAC of a challenge. The worker reports its versions and the
digests of its copy of the model, which the front compares with the first device's.
"""

import contextlib
import functools
import hashlib
import hmac
import importlib.metadata
import itertools
import json
import os
import secrets
import select
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detransformer import __version__
from detransformer.cluster.line import Line, connect

ENDED = 4  # exit code of a worker that was told to end, or lost its front
RETRY_S = 0.3  # between two attempts to reach the front
REACH_S = 5.0  # for the front to answer a hello
COMPARED = {  # field of a hello -> (in words, the remedy if two hosts differ)
    "devices": ("a cluster file of other devices ({})", "use the same file on all hosts"),
    "versions": ("{}", "install the same versions on all hosts"),
    "config": ("a config.json whose digest is {}", "copy the model's folder anew"),
    "weights": ("weights whose digest is {}", "copy the model's folder anew"),
}


# --- The handshake -----------------------------------------------------------------------------------------------


def prove(secret: str, challenge: str) -> str:
    """The answer to `challenge` that only a process that knows `secret` can give."""
    return hmac.digest(secret.encode(), challenge.encode(), "sha256").hex()


def is_proof(shown: Any, secret: str, challenge: str) -> bool:
    """Whether `shown` equals `prove(secret, challenge)`, in constant time."""
    return hmac.compare_digest(str(shown).encode(), prove(secret, challenge).encode())


def meet(
    job: Mapping[str, Any], device: int | None = None, meanwhile: Callable[[int], None] = lambda attempt: None
) -> Line:
    """A line to the front, after both ends have proved that they know the secret.

    Args:
        device: the device of this worker; None: of a process that reports how workers ended.
        meanwhile: called with the number of each attempt that failed, from 0.

    Raises:
        ConnectionError: if the front does not answer within the job's `wait_s` (0: no limit).
    """
    deadline = time.monotonic() + (job["wait_s"] or float("inf"))
    facts = host_facts(job) if device is not None else {}
    for attempt in itertools.count():
        try:
            line = connect(job["front"], 2.0)
            challenge = await_message(line)["challenge"]
            nonce = secrets.token_hex(16)
            hello = {"device": device, "pid": os.getpid(), "proof": prove(job["secret"], challenge), "nonce": nonce}
            line.send(hello | facts)
            if not is_proof(await_message(line).get("welcome", ""), job["secret"], nonce):
                raise ConnectionError("it has another secret")
            return line
        except (OSError, LookupError) as error:
            why = (getattr(error, "strerror", None) or str(error) or "no answer").lower()
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"{job['first']}, the first device, does not answer at port {job['front'].rpartition(':')[2]} within "
                f"{job['wait_s']:g} s ({why}): start the same command there, and let that port and the next one "
                "through its firewall."
            )
        meanwhile(attempt)
        time.sleep(RETRY_S)


def await_message(line: Line) -> dict:
    """The next message's header.

    Raises:
        ConnectionError: if none comes in time, or the line is closed.
    """
    deadline = time.monotonic() + REACH_S
    while select.select([line], [], [], max(0.0, deadline - time.monotonic()))[0]:
        messages = line.receive()
        if messages is None:
            raise ConnectionError("it closed the connection")
        if messages:
            first, *line.unread = messages
            return first.header
    raise ConnectionError("no answer")


# --- What must be the same on all hosts --------------------------------------------------------------------------


def difference(name: str, hello: Mapping[str, Any], first: str, ours: Mapping[str, Any]) -> str:
    """A sentence on how the host `name` differs from the host `first`, by their hellos; empty if they agree."""
    if hello.get("problem"):
        return f"{name} cannot take part: {hello['problem']}"
    for field, (words, remedy) in COMPARED.items():
        if ours.get(field) != hello.get(field):
            theirs, own = words.format(hello.get(field)), words.format(ours.get(field))
            return f"{name} has {theirs}, and {first} {own}: {remedy}."
    return ""


def host_facts(job: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `COMPARED` for this host, or its `problem`; empty if all devices are on one machine."""
    if not job.get("listed"):
        return {}
    torch = importlib.metadata.version("torch").partition("+")[0]
    facts = {"devices": job["listed"], "versions": f"detransformer {__version__} and torch {torch}"}
    try:
        return facts | model_facts(job["model"])
    except ValueError as error:
        return facts | {"problem": str(error)}


def model_facts(folder: str) -> dict[str, str]:
    """Digests of a model's config.json and weights.

    Raises:
        ValueError: if config.json or the weights are missing or unreadable.
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
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors or pytorch_model.bin: copy the whole checkpoint there.")
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    try:
        digests = "".join(_file_digest(file, *_stamp(file)) for file in files)
    except OSError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error.strerror}): copy them there again.") from None
    shown = {"config": json.dumps(kept, sort_keys=True), "weights": digests}
    return {field: hashlib.sha256(text.encode()).hexdigest()[:12] for field, text in shown.items()}


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.cache
def _file_digest(file: Path, *stamp: int) -> str:
    """SHA-256 of a file, cached by its `stamp`, since workers are restarted often."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- What a worker shows on its host -----------------------------------------------------------------------------


class End:
    """Ends this worker when called; until then sends its host heartbeats, and sentences for the user.

    Args:
        words: file descriptor for these sentences.
        starter: process id of the agent; 0: none. The worker ends with it.
    """

    def __init__(self, job: Mapping[str, Any], device: int, words: int, starter: int = 0):
        self._path, self._words = job.get("end"), words
        self._sign = Path(f"{job['alive']}{device}") if job.get("alive") else None
        try:
            self._starter = os.pidfd_open(starter) if starter else None
        except ProcessLookupError:
            self()

    def alive(self) -> None:
        """Touches the file that the agent watches; ends this process if the agent has ended."""
        if self._starter is not None and select.select([self._starter], [], [], 0)[0]:
            self()
        if self._sign:
            with contextlib.suppress(OSError):
                os.utime(self._sign)

    def say(self, sentence: str) -> None:
        """Shows this host's user a sentence; if the host is emulated, nobody reads it."""
        with contextlib.suppress(OSError):
            os.write(self._words, f"{sentence}\n".encode())

    def __call__(self, kind: str = "", sentence: str = "") -> None:
        write_end(self._path, kind, sentence)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(ENDED)  # gloo's threads would otherwise wait for lost peers


def write_end(path: str | None, kind: str, sentence: str) -> None:
    """Writes why this host's part has ended, for the process that started it; only the first reason counts."""
    if path and kind:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            json.dump({"end": kind, "sentence": sentence}, file)
