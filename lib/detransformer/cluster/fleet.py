"""The workers of a cluster as their front uses them: it waits until they have met, and gives them jobs.

The front is the process that hands out jobs: of a bench, of `detransformer run` or of a service. `roster` says who is
there. Loads without torch: on a board its memory is the worker's.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from detransformer.cluster.devices import DeviceError, DeviceLost
from detransformer.cluster.roster import FAILED, REFUSED, Group, Roster, join_words

START_S = 180.0  # for the first device's worker to start, which imports torch
LATE_S = 1.0  # for the others to answer, after the one device whose answer is needed
CODE_S = 2.0  # for how one of these has ended to be told
TELL_AGAIN_S = 10.0  # who is still waited for
END_S = 2.0  # for the workers to read why all ends
LOST, DONE = "lost", "done"  # why all ends, beside `REFUSED`


class Fleet:
    """The workers of a cluster; a context manager, whose end tells all workers why.

    Args:
        names: what sentences call the devices, in order.
        listener: where workers connect to.
        store: ADDRESS:PORT at which the first device's worker keeps the store of the process group.
        secret: what each worker has to know.
        stays: workers that are lost come back, and the others go on meanwhile; else the first loss ends all.
        silence_s: without a sign of life, after which a worker is lost.
        form_s: for a group to form.
        on_event: is told (kind, sentence, names) when devices come, are lost or are back. Kinds: waiting, lost,
            meeting, differing, serving.
    """

    def __init__(
        self,
        names: Sequence[str],
        listener: socket.socket,
        store: str,
        secret: str = "",
        stays: bool = False,
        silence_s: float = 10.0,
        form_s: float = 120.0,
        on_event: Callable[[str, str, tuple[str, ...]], None] | None = None,
    ):
        self.names, self.stays = tuple(names), stays
        self._roster = Roster(names, listener, store, secret, stays, silence_s, form_s, on_event)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
        elif isinstance(error, (ValueError, DeviceError)):
            self.close(REFUSED if isinstance(error, ValueError) else LOST, str(error))
        else:
            words = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            self.close(LOST, f"{self.names[0]} failed: {words}; the others were stopped.")

    def close(self, kind: str = DONE, sentence: str = "", wait_s: float = END_S) -> None:
        """Tells all workers to end, and why; safe to call twice."""
        self._roster.close(kind, sentence, wait_s)

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices whose workers have met and take jobs; none while they meet."""
        return self._roster.devices

    @property
    def number(self) -> int:
        """Which group these are, counted from 1; 0 while there is none."""
        group = self._roster.group
        return group.number if group else 0

    @property
    def left_out(self) -> dict[int, str]:
        """The devices that jobs have done without (`run`, `needed`), and why."""
        return self._roster.left_out

    def wait(self, timeout_s: float, remedy: str = "") -> None:
        """Waits until all devices have met; `remedy` ends the sentence on those that did not come.

        The time counts from when the first device's worker has come, whose process is started by this one.

        Raises:
            DeviceLost: where one did not come in time, or has ended.
            ValueError: where hosts differ in their model, cluster file or versions.
        """
        roster, began, told, told_at = self._roster, time.monotonic(), None, 0.0
        with roster.changed:
            while len(roster.devices) < len(self.names):
                self._check("starting")
                now = time.monotonic()
                limit_s, since = (timeout_s, roster.first_came_at) if 0 in roster.members else (START_S, began)
                absent = [device for device in range(len(self.names)) if device not in roster.members]
                if now > max(began, since) + limit_s:
                    late = absent or [device for device, member in roster.members.items() if not member.ready]
                    titles = join_words([self.names[device] for device in late])
                    raise DeviceLost(late[0], f"{titles} did not come within {limit_s:g} s{remedy}.")
                if absent and (absent != told or now - told_at > TELL_AGAIN_S):
                    told, told_at = absent, now
                    sentence = f"waiting for {join_words([self.names[device] for device in absent])}"
                    roster.say("waiting", sentence, absent)
                    for device, member in roster.members.items():
                        if device:  # the first one's user is the front's
                            member.line.tell({"say": sentence})
                roster.changed.wait(0.1)

    def say(self, device: int, sentence: str) -> None:
        """Has the worker of `device` say a sentence to the user of its host."""
        with self._roster.changed:
            if member := self._roster.members.get(device):
                member.line.tell({"say": sentence})

    def hello(self, device: int) -> dict:
        """What the worker of `device`, which is in the group, said of itself."""
        return self._roster.group.members[device].hello

    def run(
        self,
        job: str,
        arguments: Mapping | None = None,
        payload: bytes = b"",
        per_device: Sequence[Mapping] | None = None,
        devices: Sequence[int] | None = None,
        timeout_s: float = 600.0,
        needed: int | None = None,
        number: int | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, tuple[object, bytes]]:
        """Gives each worker of the group one job; returns device -> (result, bytes of its tensors).

        Args:
            job: "package.module:function", or a function of `cluster.jobs`.
            payload: tensors as safetensors, which the function gets as `inputs`.
            per_device: further arguments, one mapping a device.
            devices: those that are asked; None: all.
            needed: the one device without which there is no result. Another that dies, or has not answered a second
                after that one, is left out from then on (`left_out` says why), and is not in the result.
            number: of the group that is meant; None: any.
            meanwhile: is called several times a second.

        Raises:
            DeviceLost: if a worker died, was silent or took too long. In a fleet that stays the job may be asked again.
            DeviceError: if a worker reports an error.
        """
        doing, roster = job.rpartition(":")[2], self._roster
        with roster.changed:
            self._check(doing)
            group = roster.group
            if group is None or not group.ready or number not in (None, group.number):
                raise DeviceLost(0, roster.why)
            roster.job += 1
            asked = [d for d in (group.members if devices is None else devices) if d not in roster.left_out]
            roster.asked, roster.needed, roster.answers = set(asked), needed, {}
            lines, job_number = {device: group.members[device].line for device in asked}, roster.job
        try:
            for device, line in lines.items():
                told = {**(arguments or {}), **(per_device[device] if per_device else {})}
                with contextlib.suppress(OSError):  # it has gone; the roster says so
                    line.send({"job": job_number, "call": job, "arguments": told}, payload)
            return self._collect(group, doing, timeout_s, meanwhile)
        finally:
            with roster.changed:
                roster.asked, roster.needed = set(), None

    def _collect(self, group: Group, doing: str, timeout_s: float, meanwhile: Callable[[], None]) -> dict:
        roster, deadline, answered_at = self._roster, time.monotonic() + timeout_s, None
        with roster.changed:
            while left := roster.asked - set(roster.answers) - set(roster.left_out):
                now = time.monotonic()
                if roster.needed in roster.answers:
                    answered_at = answered_at or now
                    ending = any(group.members[device].closed_at for device in left)  # how is told in a moment
                    if now - answered_at > LATE_S + (CODE_S if ending else 0):
                        for device in left:
                            roster.leave_out(device, "did not answer in time")
                        break
                self._check(doing)
                if roster.group is not group:
                    raise DeviceLost(0, roster.why)
                if now > deadline and self.stays:
                    roster.regroup({}, "a message has not come, although all devices live: they meet anew")
                elif now > deadline:
                    late = min(left)
                    raise DeviceLost(late, f"{self.names[late]} had no result after {timeout_s:.0f} s while {doing}.")
                roster.changed.wait(0.1)
                meanwhile()
            return dict(roster.answers)

    def _check(self, doing: str) -> None:
        """Raises where this fleet has ended."""
        if self._roster.refused:
            raise ValueError(self._roster.refused)
        if self._roster.lost:
            device, how = self._roster.lost
            stopped = "; the others were stopped." if len(self.names) > 1 else "."
            if how.startswith(FAILED):
                text = how.removeprefix(FAILED).rstrip(".")
                raise DeviceError(device, f"{self.names[device]} failed while {doing}: {text}{stopped}")
            raise DeviceLost(device, f"{self.names[device]} {how} while {doing}{stopped}")
