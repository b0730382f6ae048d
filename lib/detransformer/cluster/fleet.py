"""The workers of a cluster, seen from their front: it waits until all have joined, and gives them jobs.

The front is the process that hands out jobs: a bench, `detransformer run` or a service. Imports without torch: a
board's memory is for the worker.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from detransformer.cluster.devices import DeviceError, DeviceLost
from detransformer.cluster.roster import CODE_S, EVIDENCE_S, FAILED, LOST, REFUSED, Group, Roster

START_S = 180.0  # limit for the first device's worker to start, which imports torch
LATE_S = 1.0  # wait for other answers after the needed device's
ANNOUNCE_S = 10.0  # between two sentences on absent devices


class JobFailed(Exception):
    """A job failed by its own error, which would occur on every device; no device is lost."""


class Fleet(Roster):
    """A cluster's workers and their jobs; a context manager that tells all workers why it ends. Arguments: `Roster`."""

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

    @property
    def number(self) -> int:
        """The number of the present group, from 1; 0 if there is none."""
        group = self.group
        return group.number if group else 0

    def wait(self, timeout_s: float, remedy: str = "") -> None:
        """Waits until all devices have joined; `remedy` ends the sentence on absent ones.

        The time counts from the arrival of the first device's worker, which this process starts.

        Raises:
            DeviceLost: if one did not come in time, or has ended.
            ValueError: if hosts differ in their model, cluster file or versions.
        """
        began, announced, announced_at = time.monotonic(), None, 0.0
        with self.changed:
            while len(self.devices) < len(self.names):
                self._check("starting")
                now = time.monotonic()
                limit_s, since = (timeout_s, self._since) if 0 in self.members else (START_S, began)
                absent = [device for device in range(len(self.names)) if device not in self.members]
                if now > max(began, since) + limit_s:
                    late = absent or [device for device, member in self.members.items() if not member.ready]
                    raise DeviceLost(late[0], f"{self._listed(late)} did not come within {limit_s:g} s{remedy}.")
                if absent and (absent != announced or now - announced_at > ANNOUNCE_S):
                    announced, announced_at = absent, now
                    sentence = f"waiting for {self._listed(absent)}"
                    self.announce("waiting", sentence, absent)
                    for device, member in self.members.items():
                        if device:  # the first device's user is the front's
                            member.line.tell({"say": sentence})
                self.changed.wait(0.1)

    def say(self, device: int, sentence: str) -> None:
        """Shows a sentence to the user at the host of `device`."""
        with self.changed:
            if member := self.members.get(device):
                member.line.tell({"say": sentence})

    def enough(self, rows: Sequence[int]) -> None:
        """Tells the workers that `rows` of the present job are no longer needed."""
        with self.changed:
            for device in self.asked:
                if member := self.members.get(device):
                    member.line.tell({"enough": list(rows), "job": self.job})

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
        on_part: Callable[[object], None] = lambda part: None,
    ) -> dict[int, tuple[object, bytes]]:
        """Gives each worker of the group one job; returns device -> (result, bytes of its tensors).

        Args:
            job: "package.module:function", or a function of `cluster.jobs`.
            payload: tensors as safetensors, which the function receives as `inputs`.
            per_device: further arguments, one mapping per device.
            devices: the devices to ask; None: all.
            needed: the one device whose result is required. Any other that dies, or has not answered a second after
                it, is left out of this result and from then on (`left_out` says why).
            number: the group's number; None: any group.
            meanwhile: called several times a second.
            on_part: called with each partial result that a worker sends before the end; must not block.

        Raises:
            DeviceLost: if a worker died, was silent or took too long. In a fleet that stays, the job may be retried.
            DeviceError: if a worker reports an error.
            JobFailed: in a fleet that stays, if the error is the job's own.
        """
        doing = job.rpartition(":")[2]
        with self.changed:
            self._check(doing)
            group = self.group
            if group is None or not group.ready or number not in (None, group.number):
                raise DeviceLost(0, self.why)
            self.job += 1
            asked = [d for d in (group.members if devices is None else devices) if d not in self.left_out]
            self.asked, self.needed, self.answers = set(asked), needed, {}
            self.objections, self.objected_at, self.on_part = {}, 0.0, on_part
            lines, job_number = {device: group.members[device].line for device in asked}, self.job
        try:
            for device, line in lines.items():
                own = {**(arguments or {}), **(per_device[device] if per_device else {})}
                with contextlib.suppress(OSError):  # the line is closed, which the roster notices
                    line.send({"job": job_number, "call": job, "arguments": own}, payload)
            return self._collect(group, doing, timeout_s, meanwhile)
        finally:
            with self.changed:
                self.asked, self.needed = set(), None

    def _collect(self, group: Group, doing: str, timeout_s: float, meanwhile: Callable[[], None]) -> dict:
        deadline, answered_at = time.monotonic() + timeout_s, None
        with self.changed:
            while left := self.asked - set(self.answers) - set(self.left_out) - set(self.objections):
                now = time.monotonic()
                if self.objections and now - self.objected_at > EVIDENCE_S:
                    break  # the others wait for a message from the one that failed
                if self.needed in self.answers:
                    answered_at = answered_at or now
                    ending = any(group.members[device].closed_at for device in left)  # its exit code is on the way
                    if now - answered_at > LATE_S + (CODE_S if ending else 0):
                        for device in left:
                            self.leave_out(device, "did not answer in time")
                        break
                self._check(doing)
                if self.group is not group:
                    raise DeviceLost(0, self.why)
                if now > deadline and self.stays:
                    self.regroup({}, "a message has not come although all devices are alive: they regroup")
                elif now > deadline:
                    late = min(left)
                    raise DeviceLost(late, f"{self.names[late]} had no result of {doing} after {timeout_s:.0f} s.")
                self.changed.wait(0.1)
                meanwhile()
            if self.objections:
                sentence = min(self.objections.items())[1]
                if left or self.answers or len(set(self.objections.values())) > 1:
                    self.regroup({}, "a job failed on some devices, so they regroup")
                raise JobFailed(sentence)  # if all failed alike, each has begun the messages that the others await
            return dict(self.answers)

    def _check(self, doing: str) -> None:
        if self.refused:
            raise ValueError(self.refused)
        if self.lost:
            device, how = self.lost
            stopped = "; the others were stopped." if len(self.names) > 1 else "."
            if how.startswith(FAILED):
                text = how.removeprefix(FAILED).rstrip(".")
                raise DeviceError(device, f"{self.names[device]} failed in the job {doing}: {text}{stopped}")
            raise DeviceLost(device, f"{self.names[device]} {how} during the job {doing}{stopped}")
