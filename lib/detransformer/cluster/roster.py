"""The front's thread that admits workers, notices losses, and forms the group that computes.

Each worker keeps one line to the front. In a service, workers come back, and the present ones replace a broken group;
elsewhere (a bench, one request) the first loss ends all.
"""

import contextlib
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from detransformer.cluster.hello import difference, is_proof, prove
from detransformer.cluster.line import BEAT_S, DEVICE, MEMBER_BYTES, PEER, REQUEST, Line, Message

STRANGER_S, MAX_STRANGERS = 5.0, 64  # limits of connections without a valid hello: their age and number
SILENCE_S, SERVICE_SILENCE_S = 10.0, 2.5  # a worker without a heartbeat for this time is lost
FORM_S, SERVICE_FORM_S = 120.0, 15.0  # limit for a group to form
LAST_CALL_S = 1.5  # wait for further devices after the expected ones have come
RETURN_S = 8.0  # wait for the workers of a broken group before a group is formed without them
EVIDENCE_S = 1.0  # wait for a death to show after a collective broke or a job failed
CODE_S = 2.0  # wait for the exit code of a worker after its line was closed
REFUSED, LOST, DONE = "refused", "lost", "done"  # why all ends, as told to workers; REFUSED: a user has to act
FAILED = "failed: "  # prefix of a loss that the device reported itself
MEET_ANEW = "the devices regroup"


@dataclass(eq=False)
class Member:
    """A worker that has come: its hello and the number of its group, 0 while it waits for one."""

    device: int
    line: Line
    hello: dict
    group: int = 0
    ready: bool = False
    leaves: bool = False  # it was told to end or to restart
    closed_at: float | None = None
    noted: bool = False  # the user knows that its host differs


@dataclass(eq=False)
class Group:
    """The workers that compute together, by device."""

    number: int
    members: dict[int, Member]
    began: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> bool:
        return all(member.ready for member in self.members.values())


class Roster:
    """The workers of a cluster. All fields are read and written under the lock of `changed`.

    Args:
        names: the devices' names in sentences, in order.
        listener: the socket that workers connect to.
        store: ADDRESS:PORT at which the first device's worker keeps the store of the process group.
        secret: shared by front and workers.
        stays: lost workers come back, and the others go on meanwhile; else the first loss ends all.
        on_event: called with (kind, sentence, names) when devices come, are lost or are back. Kinds: waiting, lost,
            meeting, differing, serving.
    """

    def __init__(
        self,
        names: Sequence[str],
        listener: socket.socket,
        store: str,
        secret: str = "",
        stays: bool = False,
        on_event: Callable[[str, str, tuple[str, ...]], None] = lambda kind, sentence, names: None,
    ):
        self.names, self.stays = tuple(names), stays
        self.changed = threading.Condition()
        self.members: dict[int, Member] = {}
        self.group: Group | None = None
        self.left_out: dict[int, str] = {}  # devices that jobs have done without (`Fleet.run`, `needed`), and why
        self.lost: tuple[int, str] | None = None  # the device whose loss ended all, and how it was lost
        self.refused = ""  # what a user has to correct first, in a sentence
        self.why = "the devices have not joined yet"  # why there is no group
        self.job, self.asked, self.needed = 0, set(), None  # the current job: number, devices, `needed` of `Fleet.run`
        self.answers: dict[int, tuple[object, bytes]] = {}
        self.objections: dict[int, str] = {}  # device -> the current job's own error that it reported
        self.objected_at = 0.0
        self.on_part: Callable[[object], None] = lambda part: None  # called with a worker's partial results
        self._store, self._secret = store, secret
        self._silence_s, self._form_s = (SERVICE_SILENCE_S, SERVICE_FORM_S) if stays else (SILENCE_S, FORM_S)
        self._on_event, self._listener = on_event, listener
        self._strangers: dict[Line, tuple[str, float]] = {}  # -> its challenge and arrival time
        self._observers: set[Line] = set()  # launcher and agents, which report exit codes
        self._count = 0  # of groups
        self._ended: dict[int, str] = {}  # how a worker ended, in words
        self._failed: dict[int, tuple[str, bool]] = {}  # a worker's error, and whether it caused it
        self._failed_at = 0.0
        self._expected = set(range(len(names)))  # devices to wait for before a group is formed, for a while
        self._since, self._came_at = 0.0, 0.0  # when this wait began, and when the last worker came
        self._missed: set[int] = set()  # devices that were lost and are not back
        self._seen: set[int] = set()  # devices that have been in a group
        self._stop = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices of the ready group; none while a group forms."""
        group = self.group
        return tuple(group.members) if group and group.ready else ()

    def close(self, kind: str = DONE, sentence: str = "", wait_s: float = 2.0) -> None:
        """Tells all workers to end and why, and waits up to `wait_s` until they have; safe to call twice."""
        if self._stop.is_set():
            return
        with self.changed:
            for line in [*(member.line for member in self.members.values()), *self._observers]:
                line.tell({"end": kind, "sentence": sentence})
            self.group = None
            for member in self.members.values():
                member.leaves = True
            self.changed.wait_for(lambda: not (self.members or self._observers), wait_s)
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def announce(self, kind: str, sentence: str, devices: Collection[int]) -> None:
        """Tells the front's user of an event."""
        self._on_event(kind, sentence, tuple(self.names[device] for device in devices))

    def leave_out(self, device: int, how: str) -> None:
        """Jobs go on without this device."""
        self.left_out[device] = f"{self.names[device]} {how}"
        self._failed.pop(device, None)

    def regroup(self, gone: Mapping[int, str], why: str = MEET_ANEW) -> None:
        """Breaks the group: `gone` maps lost devices to how they were lost; all others restart."""
        group, self.group = self.group, None
        self._failed, self._failed_at = {}, 0.0
        members = group.members if group else {}
        for device, member in members.items():
            if self.members.get(device) is member:
                lives = device not in gone or gone[device].startswith(FAILED)
                member.leaves = lives and member.line.tell({"again": why})
                if not member.leaves:
                    self._forget(member)
        self._expected = set(members) - set(gone) | {0}
        self._since = time.monotonic()
        self._missed |= set(gone)
        self.why = "; ".join(f"{self.names[device]} {how}" for device, how in gone.items()) or why
        self.announce("lost" if gone else "meeting", self.why, gone)

    # --- Messages ---

    def _watch(self) -> None:
        while not self._stop.is_set():
            ready = self._selector.select(BEAT_S / 4)
            with self.changed:
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                        continue
                    try:
                        self._receive(key.fileobj, key.data)
                    except (ValueError, TypeError, LookupError):  # a message with wrong fields
                        self._drop(key.fileobj)
                        if key.data:
                            self._hear(key.data, None)
                self._look(time.monotonic())
                self.changed.notify_all()

    def _accept(self) -> None:
        try:
            line = Line(self._listener.accept()[0])
        except OSError:  # already closed again
            return
        if len(self._strangers) >= MAX_STRANGERS:
            return line.close()
        challenge = secrets.token_hex(16)
        self._strangers[line] = challenge, time.monotonic()
        self._selector.register(line, selectors.EVENT_READ)
        line.tell({"challenge": challenge})

    def _receive(self, line: Line, member: Member | None) -> None:
        messages = line.receive()
        if member is not None:
            self._hear(member, messages)
        elif messages is None:
            self._drop(line)
        elif line in self._strangers:
            if messages:
                self._meet(line, messages[0].header)
        else:
            for header, _ in messages:
                if header["ended"] in range(len(self.names)):
                    self._ended[header["ended"]] = how_ended(int(header["code"]), str(header.get("words", "")))

    def _drop(self, line: Line) -> None:
        self._strangers.pop(line, None)
        self._observers.discard(line)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(line)
        line.close()

    def _forget(self, member: Member) -> None:
        """Removes a member whose line is closed, or whom another worker has replaced."""
        self._drop(member.line)
        if self.members.get(member.device) is member:
            del self.members[member.device]

    def _meet(self, line: Line, hello: dict) -> None:
        """Admits a worker or an observer that proves that it knows the secret."""
        challenge, _ = self._strangers[line]
        device = hello.get("device")
        if not is_proof(hello.get("proof"), self._secret, challenge) or device not in (None, *range(len(self.names))):
            return self._drop(line)
        del self._strangers[line]
        line.limit_bytes = MEMBER_BYTES
        line.tell({"welcome": prove(self._secret, str(hello.get("nonce")))})
        if device is None:
            self._observers.add(line)
            return
        if known := self.members.get(device):
            if not self.stays:
                sentence = f"another host has already joined as {self.names[device]}: give every host its own name."
                line.tell({"end": REFUSED, "sentence": sentence})
                return self._drop(line)
            self._forget(known)
            if self.group and known is self.group.members.get(device):
                self.regroup({device: "is gone: its process ended"})
        member = self.members[device] = Member(device, line, hello)
        self._selector.modify(line, selectors.EVENT_READ, member)
        self._ended.pop(device, None)
        self._came_at = time.monotonic()
        if device == 0 or not self._since:
            self._since = self._came_at

    def _hear(self, member: Member, messages: list[Message] | None) -> None:
        if messages is None:
            self._forget(member)
            member.closed_at = time.monotonic()
        for header, payload in messages or ():
            if "ready" in header:
                member.ready = header["ready"] == member.group
                if self.group and member.ready and self.group.ready:
                    self._announce_serving()
            elif "result" in header and header["job"] == self.job:
                self.answers[member.device] = header["result"], payload
            elif "part" in header and header["job"] == self.job:
                self.on_part(header["part"])
            elif "error" in header and header.get("job", self.job) == self.job:
                text, whose = str(header["error"]), header.get("whose", DEVICE)
                if whose == REQUEST and self.stays:
                    self.objections[member.device] = text
                    self.objected_at = self.objected_at or time.monotonic()
                else:  # elsewhere an error of any kind ends all
                    self._failed[member.device] = text, whose != PEER
                    self._failed_at = self._failed_at or time.monotonic()

    # --- Losses ---

    def _look(self, now: float) -> None:
        for line in [line for line, (_, since) in self._strangers.items() if now - since > STRANGER_S]:
            self._drop(line)
        if gone := self._gone(now):
            self._lose(gone)
        elif self._failed and now - self._failed_at > EVIDENCE_S and self._all_heard():
            own = {device: FAILED + text for device, (text, is_own) in self._failed.items() if is_own}
            if own or not self.stays:
                self._lose(own or {device: FAILED + text for device, (text, _) in self._failed.items()})
            else:  # a message was lost, and no device is at fault
                self.regroup({})
        elif self.group and not self.group.ready and now - self.group.began > self._form_s:
            self._lose({d: "did not join the group" for d, m in self.group.members.items() if not m.ready})
        waiting = {d: m for d, m in self.members.items() if not m.group and not m.leaves}
        if self.stays:
            self._note_differing(waiting)
            waiting = {device: member for device, member in waiting.items() if not self._difference(member)}
        if self.group is None and not self._stop.is_set():
            self._form(waiting, now)
        elif waiting and self.devices and not self.asked:
            self.regroup({})
        for member in self.members.values():
            member.line.beat()

    def _all_heard(self) -> bool:
        """Whether all devices of the group have sent a heartbeat since a collective broke."""
        members = self.group.members.values() if self.group else ()
        return all(m.line.heard_at > self._failed_at for m in members if m.device not in self.left_out)

    def _gone(self, now: float) -> dict[int, str]:
        """The devices of the group (before the first group: of all) that have ended or fallen silent, and how."""
        gone = {}
        if not self.group:
            return {} if self.stays else dict(self._ended)
        for device, member in self.group.members.items():
            if device in self.left_out:
                continue
            text, is_own = self._failed.get(device, ("", False))
            if member.closed_at and is_own:  # it reported an error before it ended
                gone[device] = FAILED + text
            elif device in self._ended:
                gone[device] = self._ended[device]
            elif member.closed_at and now - member.closed_at >= (0 if self.stays else CODE_S):
                gone[device] = "is gone: its process ended"
            elif not member.closed_at and member.line.silent_for(self._silence_s):
                gone[device] = f"has been silent for {self._silence_s:g} s"
        return gone

    def _lose(self, gone: Mapping[int, str]) -> None:
        """Handles losses: leaves the devices out, regroups, or ends all."""
        spared = {device: how for device, how in gone.items() if not how.startswith(FAILED)}
        if spared and self.needed not in (None, *gone):
            for device, how in spared.items():
                self.leave_out(device, how)
        elif self.stays:
            self.regroup(gone)
        else:
            self.lost = self.lost or min(gone.items())
            self._failed.clear()

    # --- Groups ---

    def _form(self, waiting: Mapping[int, Member], now: float) -> None:
        """Makes a group of the waiting workers, once all are present or no more can be expected."""
        everyone = len(waiting) == len(self.names)
        if self.lost or self.refused:
            return
        if not self.stays:
            problems = [member for member in waiting.values() if everyone or member.hello.get("problem")]
            self.refused = next(filter(None, map(self._difference, problems)), "")
            if self.refused or not everyone:
                return
        elif not everyone:
            called = self._expected <= set(waiting) and now - self._came_at > LAST_CALL_S
            if 0 not in waiting or (not called and now - self._since < RETURN_S):
                return
        self._count += 1
        self.group = Group(self._count, dict(sorted(waiting.items())))
        for member in waiting.values():
            member.group = self._count
            member.line.tell({"group": self._count, "devices": sorted(waiting), "store": self._store})

    def _difference(self, member: Member) -> str:
        first = self.members.get(0, member)
        return difference(self.names[member.device], member.hello, self.names[0], first.hello)

    def _note_differing(self, waiting: Mapping[int, Member]) -> None:
        for device, member in waiting.items():
            if not member.noted and (found := self._difference(member)):
                member.noted = True
                self.announce("differing", f"{found} It is left out.", [device])

    def _announce_serving(self) -> None:
        devices = set(self.devices)
        if unnamed := (self._expected & self._seen) - devices - self._missed:
            self._missed |= unnamed
            self.announce("lost", f"{self._listed(unnamed)} did not return", unnamed)
        back, words = devices & self._missed, f"serving on {self._listed(devices)}"
        self._missed -= devices
        self._seen |= devices
        self.announce("serving", f"{self._listed(back)} back; {words}" if back else words, self.devices)

    def _listed(self, devices: Collection[int]) -> str:
        return join_words([self.names[device] for device in sorted(devices)])


def how_ended(code: int, words: str = "") -> str:
    """How a process ended, by its exit code and its last words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}" + (f" ({words})" if words else "")


def join_words(words: Sequence[str]) -> str:
    """Words in a sentence, such as `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 2 else words)
