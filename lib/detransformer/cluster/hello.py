"""How a worker and its front get to know each other, and what a worker shows on its host. Loads without torch.

Each proves to the other that it knows the cluster's secret, by the HMAC of a challenge. The worker says what it has of
the model, and the front compares that with what the first device has.
"""

import contextlib
import hmac
import json
import os
import secrets
import select
import selectors
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detransformer.cluster.facts import host_facts
from detransformer.cluster.line import Line, connect

ENDED = 4  # exit code of a worker that was told to end, or has lost its front
RETRY_S = 0.3  # between two attempts to reach the front
REACH_S = 5.0  # for the front to answer a hello
COMPARED = {  # what a hello says of a host -> (in words, what to do where two differ)
    "devices": ("a cluster file of other devices ({})", "use the same file on all hosts"),
    "versions": ("{}", "install the same versions on all hosts"),
    "config": ("a config.json whose digest is {}", "copy the model's folder anew"),
    "weights_bytes": ("weights of {} bytes", "copy the model's folder anew"),
    "weights": ("weights whose digest is {}", "copy the model's folder anew"),
}


def prove(secret: str, challenge: str) -> str:
    """What only who knows `secret` can answer to `challenge`."""
    return hmac.digest(secret.encode(), challenge.encode(), "sha256").hex()


def is_proof(shown: Any, secret: str, challenge: str) -> bool:
    """Whether `shown` is what `prove` says."""
    return hmac.compare_digest(str(shown).encode(), prove(secret, challenge).encode())


def meet(job: Mapping[str, Any], device: int | None, end: Callable[..., None]) -> Line:
    """A line to the front, which knows this one and is known: each has shown the other that it knows the secret.

    Ends this process (`end`) where the front does not answer within the job's `wait_s` (0: it is waited for).
    """
    deadline = time.monotonic() + (job["wait_s"] or float("inf"))
    facts = host_facts(job) if device is not None else {}
    told = False
    while True:
        try:
            line = connect(job["front"], 2.0)
            challenge = await_message(line)["challenge"]
            nonce = secrets.token_hex(16)
            hello = {"device": device, "pid": os.getpid(), "proof": prove(job["secret"], challenge), "nonce": nonce}
            line.send(hello | facts)
            welcome = await_message(line).get("welcome", "")
            if not is_proof(welcome, job["secret"], nonce):
                raise ConnectionError("it has another secret")
            return line
        except (OSError, LookupError) as error:
            why = (getattr(error, "strerror", None) or str(error) or "no answer").lower()
        if time.monotonic() > deadline:
            end(
                "lost",
                f"{job['first']}, the first device, does not answer at port {job['front'].rpartition(':')[2]} within "
                f"{job['wait_s']:g} s ({why}): start the same command there, and let that port and the next one "
                "through its firewall.",
            )
        if isinstance(end, End):
            if not told:
                told = True
                end.say(f"waiting for {job['first']}, the first device")
            end.alive()
        time.sleep(RETRY_S)


def await_message(line: Line) -> dict:
    """The next message's header.

    Raises:
        ConnectionError: where none comes in time, or the line is closed.
    """
    deadline = time.monotonic() + REACH_S
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(0.2):
                messages = line.receive()
                if messages is None:
                    raise ConnectionError("it closed the connection")
                if messages:
                    first, *line.unread = messages
                    return first.header
    raise ConnectionError("no answer")


def difference(name: str, hello: Mapping[str, Any], first: str, ours: Mapping[str, Any]) -> str:
    """In what the host `name` differs from the `first` one, by their hellos, as a sentence; empty where in nothing."""
    if hello.get("problem"):
        return f"{name} cannot take part: {hello['problem']}"
    for what, (words, remedy) in COMPARED.items():
        if ours.get(what) != hello.get(what):
            return f"{name} has {words.format(hello.get(what))}, and {first} {words.format(ours.get(what))}: {remedy}."
    return ""


class End:
    """What a worker shows on its host: that it runs, sentences for the user, and why it ends. A call ends it."""

    def __init__(self, job: Mapping[str, Any], device: int, words: int, starter: int = 0):
        self._path, self._words = job.get("end"), words
        self._sign = Path(f"{job['alive']}{device}") if job.get("alive") else None
        try:
            self._starter = os.pidfd_open(starter) if starter else None
        except ProcessLookupError:
            self()

    def alive(self) -> None:
        """A sign of life for the agent, in the times of a file; ends this process where its starter has ended."""
        if self._starter is not None and select.select([self._starter], [], [], 0)[0]:
            self()
        if self._sign:
            with contextlib.suppress(OSError):
                os.utime(self._sign)

    def say(self, sentence: str) -> None:
        """Shows the user of this host a sentence; nobody reads it where the host is emulated."""
        with contextlib.suppress(OSError):
            os.write(self._words, f"{sentence}\n".encode())

    def __call__(self, kind: str = "", sentence: str = "") -> None:
        write_end(self._path, kind, sentence)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(ENDED)  # gloo's threads would otherwise wait for peers that are gone


def write_end(path: str | None, kind: str, sentence: str) -> None:
    """Leaves why this host's part has ended for the process that started it; the first reason stays."""
    if path and kind:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            json.dump({"end": kind, "sentence": sentence}, file)
