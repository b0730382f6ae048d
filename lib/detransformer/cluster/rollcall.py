"""Who is there, and who is lost: the hosts of a cluster meet at the first device, and watch each other until the end.

torchrun's static rendezvous waits silently for a host that does not come, and a collective for one that is gone. So
each host's `detransformer run` is a `Member` that keeps a connection to a `Coordinator` on the first device, which says
when all are there and when one is lost, to all in the same words. Messages are JSON lines; nothing is pickled, and no
torch is loaded.
"""

import errno
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from detransformer.cluster.devices import DeviceError, DeviceLost

HEARTBEAT_S = 1.0
SILENCE_LIMIT_S = 10.0
TELL_AGAIN_S = 10.0  # who is still waited for
BLAME_S = 2.0  # a device that dies makes others fail before it is known to be lost
REFUSE_S = 3.0  # those that come a moment later are told too, why there is nothing to come to
MAX_LINE_BYTES = 2**20
LOST, REFUSED = "lost", "refused"  # why all end: a device failed them, or something is to be put right first


class Channel:
    """JSON lines over a connected socket. What comes in is read when a selector says that there is something."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5)  # of a send; longer than any peer that is alive leaves its buffer full
        self.socket = connection
        self.heard_at = time.monotonic()
        self._told_at = 0.0
        self._pending = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: dict) -> bool:
        """Whether it went out; a peer that is gone shows when it is read from."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        self._told_at = time.monotonic()
        return True

    def beat(self) -> None:
        """A sign of life, if the last message was long ago."""
        if time.monotonic() - self._told_at >= HEARTBEAT_S:
            self.send({})

    def receive(self) -> list[dict] | None:
        """Messages that have come in; None once the peer has closed its end, or does not speak JSON."""
        try:
            data = self.socket.recv(2**16)
            *lines, self._pending = (self._pending + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if not data or len(self._pending) > MAX_LINE_BYTES or not all(isinstance(m, dict) for m in messages):
            return None
        self.heard_at = time.monotonic()
        return [message for message in messages if message]

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self.heard_at

    def close(self) -> None:
        self.socket.close()


class Coordinator(threading.Thread):
    """On the first device: waits for all, lets them begin alike, and ends all when one is lost.

    Args:
        members: (name, address) of each device in rank order.
        port: where to listen, at the first device's address.
        wait_s: how long to wait for all.

    Raises:
        ValueError: if the port cannot be had.
    """

    def __init__(self, members: Sequence[tuple[str, str]], port: int, wait_s: float):
        super().__init__(daemon=True)
        self.members = dict(members)
        self.first = members[0][0]
        self.wait_s = wait_s
        address = members[0][1]
        try:
            self._listener = socket.create_server((address, port))
        except OSError as error:
            why = "is in use, perhaps by another run" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
            raise ValueError(
                f"port {port} of {address} {why}: end that, or choose another rendezvous.port on all hosts."
            ) from None
        self._here: dict[str, Channel] = {}  # by name, once they have said it
        self._hellos: dict[str, dict] = {}
        self._strangers: list[Channel] = []
        self._problem, self._refuse_at = "", float("inf")
        self._running = False
        self._finished: set[str] = set()
        self._failures: list[str] = []  # of collectives, in the words of those who saw them
        self._blame_at = float("inf")

    def titles(self, names: Sequence[str]) -> str:
        """Such as `pi3 (192.168.1.13) and pi4 (192.168.1.14)`."""
        return join_words([f"{name} ({self.members[name]})" for name in names])

    @property
    def _absent(self) -> list[str]:
        return [name for name in self.members if name not in self._here]

    def run(self) -> None:
        kind, sentence = self._watch()
        for channel in [*self._here.values(), *self._strangers]:
            channel.send({"end": kind, "sentence": sentence} if kind else {"done": True})
        self._listener.close()
        deadline = time.monotonic() + 2
        with selectors.DefaultSelector() as selector:  # until they have read it
            left = list(self._here.values())
            for channel in left:
                selector.register(channel, selectors.EVENT_READ)
            while left and time.monotonic() < deadline:
                for key, _ in selector.select(0.2):
                    if key.fileobj.receive() is None:
                        selector.unregister(key.fileobj)
                        left.remove(key.fileobj)
        for channel in [*self._here.values(), *self._strangers]:
            channel.close()

    def _watch(self) -> tuple[str, str]:
        """Until all have finished, ("", ""), or one is lost: (`LOST` or `REFUSED`, a sentence)."""
        deadline = time.monotonic() + self.wait_s
        told_at = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                changed = False
                for key, _ in selector.select(0.2):
                    if key.fileobj is self._listener:
                        channel = Channel(self._listener.accept()[0])
                        self._strangers.append(channel)
                        selector.register(channel, selectors.EVENT_READ)
                        continue
                    messages = key.fileobj.receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                    before = len(self._here)
                    end = self._take(key.fileobj, messages)
                    if end:
                        return end
                    changed = changed or len(self._here) != before
                for channel in self._here.values():
                    channel.beat()
                now = time.monotonic()
                if self._running:
                    end = self._lost(now)
                    if end or self._finished == set(self.members):
                        return end or ("", "")
                elif self._problem and (now > self._refuse_at or not self._absent):
                    return REFUSED, self._problem
                elif not self._absent:
                    end = self._compare()
                    if end:
                        return end
                    self._running = True
                    for channel in self._here.values():
                        channel.heard_at = now
                        channel.send({"go": True})
                elif now > deadline:
                    them = "it reaches" if len(self._absent) == 1 else "they reach"
                    return LOST, (
                        f"{self.titles(self._absent)} did not come within {self.wait_s:g} s: start the same command "
                        f"there, and check that {them} {self.titles([self.first])}, port {self._port}."
                    )
                elif changed or now - told_at > TELL_AGAIN_S:
                    told_at = now
                    for channel in self._here.values():
                        channel.send({"waiting": self.titles(self._absent)})

    @property
    def _port(self) -> int:
        return self._listener.getsockname()[1]

    def _take(self, channel: Channel, messages: list[dict] | None) -> tuple[str, str] | None:
        """Takes in what came over `channel` (None: it was closed); returns why all end, if they do."""
        name = next((name for name, known in self._here.items() if known is channel), None)
        if messages is None:
            channel.close()
            if name is None:
                self._strangers.remove(channel)
                return None
            del self._here[name]  # before all are there, it may come again
            if self._running and name not in self._finished:
                return LOST, (
                    f"{self.titles([name])} is lost: its `detransformer run` ended or was killed; "
                    "the others were stopped."
                )
        for message in messages or ():
            if name is None and "hello" in message:
                name = self._welcome(channel, message)
                if name and message.get("problem") and not self._problem:
                    self._problem = f"{self.titles([name])} cannot take part: {message['problem']}"
                    self._refuse_at = time.monotonic() + REFUSE_S
            elif name is None:
                continue
            elif message.get("finished"):
                self._finished.add(name)
            elif "failed" in message:
                sentence = f"{self.titles([name])} failed: {message['failed']}"
                if message.get("own"):
                    return LOST, f"{sentence.rstrip('.')}; the others were stopped."
                self._failures.append(sentence)
                self._blame_at = min(self._blame_at, time.monotonic() + BLAME_S)
        return None

    def _welcome(self, channel: Channel, message: dict) -> str | None:
        """The name of a device that has come, or None where it cannot be let in; then it is told why."""
        name, why = message["hello"], ""
        if name not in self.members:
            why = f"{name} is not in the cluster file of {self.first}: use the same file on all hosts."
        elif name in self._here:
            why = f"another host has come as {name} already: every host needs its own name."
        elif self._running:
            why = f"{self.first} is answering a request already: start all hosts again when it has ended."
        if why:
            channel.send({"end": REFUSED, "sentence": why})
            return None
        self._strangers.remove(channel)
        self._here[name], self._hellos[name] = channel, message
        return name

    def _lost(self, now: float) -> tuple[str, str] | None:
        for name, channel in self._here.items():
            if name not in self._finished and channel.silent_s > SILENCE_LIMIT_S:
                return LOST, (
                    f"{self.titles([name])} has been silent for {SILENCE_LIMIT_S:g} s: it is off, or its network is "
                    "down; the others were stopped."
                )
        return (LOST, f"{self._failures[0].rstrip('.')}; the others were stopped.") if now > self._blame_at else None

    def _compare(self) -> tuple[str, str] | None:
        """Whether all have the same model, cluster and versions as the first device."""
        ours = self._hellos[self.first]
        for name in self.members:
            for what, (words, remedy) in COMPARED.items():
                own, other = ours.get(what), self._hellos[name].get(what)
                if own != other:
                    text = f"{self.titles([name])} has {words.format(other)}, and {self.first} {words.format(own)}"
                    return REFUSED, f"{text}: {remedy}."
        return None


COMPARED = {  # what a hello says -> (in words, what to do where two differ)
    "devices": ("a cluster file of other devices ({})", "use the same file on all hosts"),
    "versions": ("{}", "install the same versions on all hosts"),
    "config": ("a config.json whose digest is {}", "copy the model's folder anew"),
    "weights_bytes": ("weights of {} bytes", "copy the model's folder anew"),
    "weights": ("weights whose digest is {}", "copy the model's folder anew"),
}


class Member:
    """This host's connection to the coordinator; `poll` often, at least once a second."""

    def __init__(self, channel: Channel, first: str):
        """`first`: the first device's name and address, in words."""
        self._channel = channel
        self._first = first
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    @classmethod
    def join(cls, first: str, address: str, port: int, wait_s: float, say: Callable[[str], None]) -> "Member":
        """Connects to the first device; says so where it has to wait for it.

        Raises:
            DeviceLost: if it cannot be reached in time.
        """
        deadline, told, why = time.monotonic() + wait_s, False, ""
        while True:
            try:
                connection = socket.create_connection((address, port), timeout=2)
                if connection.getsockname() == connection.getpeername():  # TCP can connect to itself; nobody listened
                    connection.close()
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return cls(Channel(connection), f"{first} ({address})")
            except OSError as error:
                why = (error.strerror or str(error) or "no answer").lower()
            if time.monotonic() > deadline:
                raise DeviceLost(
                    0,
                    f"{first}, the first device, does not answer at {address} port {port} within {wait_s:g} s ({why}): "
                    "start the same command there, and let that port and the next one through its firewall.",
                )
            if not told:
                told = True
                say(f"waiting for {first}, the first device, at {address} port {port}")
            time.sleep(0.3)

    def send(self, message: dict) -> None:
        self._channel.send(message)

    def poll(self, timeout_s: float = 0.2) -> list[dict]:
        """Messages of the coordinator.

        Raises:
            DeviceError: where it ends the run because a device is lost, or is itself.
            ValueError: where something is to be put right first.
        """
        self._channel.beat()
        messages = []
        if self._selector.select(timeout_s):
            messages = self._channel.receive()
            if messages is None:
                raise DeviceLost(0, f"{self._first}, the first device, is lost: its `detransformer run` ended.")
        elif self._channel.silent_s > SILENCE_LIMIT_S:
            raise DeviceLost(
                0,
                f"{self._first}, the first device, has been silent for {SILENCE_LIMIT_S:g} s: "
                "it is off, or its network is down.",
            )
        for message in messages:
            if message.get("end") == REFUSED:
                raise ValueError(message["sentence"])
            if "end" in message:
                raise DeviceError(0, message["sentence"])
        return messages

    def close(self) -> None:
        self._selector.close()
        self._channel.close()


def join_words(words: Sequence[str]) -> str:
    """Such as `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 2 else words)
