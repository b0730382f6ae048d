"""The front's side of a cluster over real sockets; its workers are lines of this process that say what a test wants."""

import ctypes
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import wait_until
from detransformer.cluster import hello, roster
from detransformer.cluster.devices import DeviceError, DeviceLost
from detransformer.cluster.fleet import Fleet, JobFailed
from detransformer.cluster.hello import meet
from detransformer.cluster.line import HEAD, Line, listen
from detransformer.cluster.worker import blame, resolve

NAMES = ["a (10.0.0.1)", "b (10.0.0.2)", "c (10.0.0.3)"]
FACTS = dict(devices="d", versions="v", config="c", weights="w")


class Worker:
    """A worker's line to the front at `address`."""

    def __init__(self, address: str, device: int | None, monkeypatch, secret: str = "s", **facts):
        monkeypatch.setattr(hello, "host_facts", lambda job: FACTS | facts)
        job = {"front": address, "secret": secret, "first": NAMES[0], "wait_s": 2.0}
        self.line = meet(job, device)
        self.heard: list = list(self.line.unread)

    def hear(self, key: str, timeout_s: float = 60.0) -> dict:
        """The next message that has `key`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in self.heard:
                if key in message.header:
                    self.heard.remove(message)
                    return message.header
            self.line.socket.settimeout(0.1)
            try:
                messages = self.line.receive()
            finally:
                self.line.socket.settimeout(5)
            if messages is None and not self.heard:
                time.sleep(0.05)
            self.heard += messages or []
            self.line.beat()
        raise AssertionError(f"no {key} in {timeout_s} s: {self.heard}")

    def join(self) -> dict:
        told = self.hear("group")
        self.line.send({"ready": told["group"]})
        return told


def said_and_gone(line: Line) -> None:
    line.send({"error": "it was interrupted", "whose": "device"})
    line.close()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Makes a fleet of three; all that it says is in its `said`."""
    made = []
    monkeypatch.setattr(roster, "SERVICE_SILENCE_S", 60.0)  # these workers send heartbeats only while they listen

    def start(**options) -> Fleet:
        said: list[tuple[str, str]] = []
        path = str(tmp_path / f"front{len(made)}")
        fleet = Fleet(NAMES, listen(path), "10.0.0.1:1", "s", on_event=lambda k, s, n: said.append((k, s)), **options)
        fleet.path, fleet.said = path, said
        made.append(fleet)
        return fleet

    yield start
    for fleet in made:
        fleet.close(wait_s=0)


def workers_of(fleet: Fleet, monkeypatch, devices=(0, 1, 2), **facts) -> list[Worker]:
    return [Worker(fleet.path, device, monkeypatch, **facts) for device in devices]


def joined(started, monkeypatch, **options) -> tuple[Fleet, list[Worker]]:
    """A fleet whose three workers have formed its first group, and these."""
    fleet = started(**options)
    workers = workers_of(fleet, monkeypatch)
    for worker in workers:
        worker.join()
    fleet.wait(5)
    return fleet, workers


def test_all_begin_together_answer_and_are_told_of_the_end(started, monkeypatch):
    fleet = started()
    workers = workers_of(fleet, monkeypatch, (2, 0, 1))
    assert [made.join()["devices"] for made in workers] == [[0, 1, 2]] * 3
    fleet.wait(5)
    asked = []

    def answer() -> None:
        for device, made in zip((2, 0, 1), workers, strict=True):
            if not asked or device not in asked:
                told = made.hear("job")
                assert told["arguments"] == {"x": 1, "own": device}
                asked.append(device)
                made.line.send({"job": told["job"], "result": device}, bytes([device]))

    found = fleet.run("job", {"x": 1}, per_device=[{"own": d} for d in range(3)], meanwhile=lambda: asked or answer())
    assert found == {device: (device, bytes([device])) for device in range(3)}
    fleet.close("done", "that is all", wait_s=0)
    assert all(made.hear("end") == {"end": "done", "sentence": "that is all"} for made in workers)


def test_who_ends_all_is_named(started, monkeypatch):
    monkeypatch.setattr(roster, "CODE_S", 0.5)
    for end, words in (
        (lambda at, made: made[2].line.close(), r"c \(10.0.0.3\) is gone: its process ended during the job job; the"),
        (
            lambda at, made: made[1].line.send({"error": "no memory", "whose": "device"}),
            r"b \(10.0.0.2\) failed .*: no mem",
        ),
        (lambda at, made: said_and_gone(made[2].line), r"c \(10.0.0.3\) failed in the job job: it was interrupted"),
        (lambda at, made: Worker(at, None, monkeypatch).line.send({"ended": 1, "code": -9}), "was killed by SIGKILL"),
    ):
        fleet, made = joined(started, monkeypatch)
        end(fleet.path, made)
        with pytest.raises(DeviceError, match=words):
            fleet.run("job", timeout_s=8, meanwhile=lambda made=made: [each.line.beat() for each in made])


def test_who_is_silent_or_does_not_come_is_named(started, monkeypatch):
    monkeypatch.setattr(roster, "SILENCE_S", 1.0)
    fleet, made = joined(started, monkeypatch)
    with pytest.raises(DeviceLost, match=r"b \(10.0.0.2\) has been silent for 1 s during the job job"):
        fleet.run("job", meanwhile=lambda: [made[device].line.beat() for device in (0, 2)])
    fleet = started()
    made = workers_of(fleet, monkeypatch, (0,))
    with pytest.raises(DeviceLost, match=r"b \(10.0.0.2\) and c \(10.0.0.3\) did not come within 1 s: come"):
        fleet.wait(1, ": come")
    assert all(kind == "waiting" and words.endswith("b (10.0.0.2) and c (10.0.0.3)") for kind, words in fleet.said)


def test_a_front_that_was_held_up_itself_blames_no_device(started, monkeypatch):
    monkeypatch.setattr(roster, "SILENCE_S", 2.0)
    fleet, made = joined(started, monkeypatch)
    for _ in range(3):  # nothing of this process runs, neither the front nor these workers
        ctypes.PyDLL(None).usleep(2_500_000)
        for each in made:
            each.line.beat()
        time.sleep(0.5)
    assert fleet.devices == (0, 1, 2) and fleet.lost is None


def test_hosts_that_differ_are_refused_or_left_out(started, monkeypatch):
    fleet = started()
    made = workers_of(fleet, monkeypatch, (0, 1))
    made += workers_of(fleet, monkeypatch, (2,), versions="detransformer 9")
    words = r"c \(10.0.0.3\) has detransformer 9, and a \(10.0.0.1\) v: install the same versions on all hosts\."
    with pytest.raises(ValueError, match=words):
        fleet.wait(5)
    fleet = started()
    made += workers_of(fleet, monkeypatch, (1,), problem="it has no model")
    made += workers_of(fleet, monkeypatch, (0,))
    with pytest.raises(ValueError, match=r"b \(10.0.0.2\) cannot take part: it has no model"):
        fleet.wait(5)
    monkeypatch.setattr(roster, "RETURN_S", 0.5)
    fleet = started(stays=True)
    first, second = workers_of(fleet, monkeypatch, (0, 1))
    other = workers_of(fleet, monkeypatch, (2,), weights="others")[0]
    assert first.join()["devices"] == second.join()["devices"] == [0, 1]
    wait_until(lambda: fleet.devices == (0, 1), 5)
    assert not other.heard
    assert any(kind == "differing" and "weights whose digest is others" in words for kind, words in fleet.said)


def test_a_group_that_breaks_is_formed_anew_where_workers_come_back(started, monkeypatch):
    fleet, made = joined(started, monkeypatch, stays=True)
    made[2].line.close()
    with pytest.raises(DeviceLost, match=r"c \(10.0.0.3\) is gone"):
        fleet.run("job")
    for each in made[:2]:
        assert each.hear("again")
        each.line.close()
    again = workers_of(fleet, monkeypatch, (1, 2, 0))
    assert {tuple(each.join()["devices"]) for each in again} == {(0, 1, 2)}
    wait_until(lambda: fleet.devices, 5)
    assert [kind for kind, _ in fleet.said if kind != "waiting"] == ["serving", "lost", "serving"]
    assert fleet.said[-1][1].startswith("c (10.0.0.3) back; serving on a")


def test_one_that_a_job_can_do_without_is_left_out(started, monkeypatch):
    fleet, made = joined(started, monkeypatch)
    heard = []

    def answer() -> None:
        if not heard:
            heard.append(made[0].hear("job"))
            made[0].line.send({"job": heard[0]["job"], "result": "mine"})
        for each in made:
            each.line.beat()

    assert fleet.run("job", needed=0, meanwhile=answer) == {0: ("mine", b"")}
    assert fleet.left_out == {d: f"{NAMES[d]} did not answer in time" for d in (1, 2)}


def test_strangers_are_shown_out(started, monkeypatch):
    fleet = started()
    with socket.socket(socket.AF_UNIX) as browser:
        browser.connect(fleet.path)
        browser.settimeout(5)
        browser.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 4096)
        while browser.recv(4096):
            pass
    with pytest.raises(ConnectionError, match=r"a \(10.0.0.1\), the first device, does not answer at port"):
        Worker(fleet.path, 0, monkeypatch, secret="another")
    made = workers_of(fleet, monkeypatch)
    with pytest.raises(AssertionError):
        workers_of(fleet, monkeypatch, (1,))[0].hear("group", 0.5)
    assert {tuple(each.join()["devices"]) for each in made} == {(0, 1, 2)}
    made[0].line.send({"job": "no number", "result": 1, "ready": "no number"})
    made[0].line.send({"error": 3, "job": "no number"})
    for each in made:
        each.line.send({"ready": 1})
    fleet.wait(5)


def test_a_line_takes_messages_in_any_pieces_and_refuses_what_is_none():
    one, other = socket.socketpair()
    near, far = Line(one), Line(other)
    near.send({"a": 1}, b"xyz")
    near.beat()
    near.send({"b": 2})
    found = []
    while len(found) < 2:
        found += far.receive()
    assert found == [({"a": 1}, b"xyz"), ({"b": 2}, b"")]
    data = HEAD.pack(8, 2) + b'{"c": 3}' + b"!!"
    for piece in (data[:5], data[5:15], data[15:]):
        one.sendall(piece)
        found = far.receive()
    assert found == [({"c": 3}, b"!!")]
    for bad in (b"\xff" * 64, HEAD.pack(3, 0) + b"[1]", HEAD.pack(3, 0) + b"{{{"):
        one, other = socket.socketpair()
        one.sendall(bad)
        assert Line(other).receive() is None
    near.close()
    assert far.receive() is None and not far.tell({"x": 1})


def test_a_job_is_a_public_function_of_this_package():
    from detransformer.cluster.jobs import run_plan

    assert resolve("run_plan") is resolve("detransformer.cluster.jobs:run_plan") is run_plan
    for name in ("os:system", "detransformer.cluster.jobs:_load", "detransformerx:y"):
        with pytest.raises(ValueError, match="is not a job"):
            resolve(name)
    with pytest.raises(ValueError, match="is not a job"):
        resolve("run_plan", "detransformer.cluster.answering")


def test_an_error_is_blamed_on_a_peer_the_device_or_the_request():
    text = "[pair.cc:553] Connection closed by peer [10.77.0.1]:8630"
    assert blame(RuntimeError(text)) == (f"RuntimeError: {text}", "peer"), "and not on who saw it"
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError("no space left")):
        assert blame(error)[1] == "device"
    assert blame(ValueError("no plan fits")) == ("no plan fits", "request")
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    for error in (IndexError("index out of range in self"), caught.value):
        assert blame(error)[1] == "request"


def failing(fleet: Fleet, workers: list, errors: dict[int, str]) -> None:
    """Asks the workers a job at which each of `errors` fails; the others never answer."""

    def answer() -> None:
        for device in list(errors):
            told = workers[device].hear("job")
            workers[device].line.send({"error": errors.pop(device), "whose": "request", "job": told["job"]})

    with pytest.raises(JobFailed, match="index out of range"):
        fleet.run("job", meanwhile=answer)


def test_a_job_that_fails_on_all_devices_takes_none_of_them(started, monkeypatch):
    fleet, workers = joined(started, monkeypatch, stays=True)
    failing(fleet, workers, dict.fromkeys(range(3), "index out of range"))
    assert fleet.devices == (0, 1, 2) and fleet.number == 1
    assert [kind for kind, _ in fleet.said if kind != "waiting"] == ["serving"]


def test_where_a_job_fails_on_one_device_all_meet_anew_and_none_is_lost(started, monkeypatch):
    fleet, workers = joined(started, monkeypatch, stays=True)
    failing(fleet, workers, {1: "index out of range"})
    assert fleet.devices == () and all("again" in made.hear("again") for made in workers)
    assert [kind for kind, _ in fleet.said if kind != "waiting"] == ["serving", "meeting"]


def test_a_worker_ends_with_its_starter_also_while_it_waits_for_the_front():
    """A service's worker waits without a limit for the first device; its agent may be killed meanwhile."""
    code = (
        "import sys\nfrom detransformer.cluster.worker import work\n"
        "job = {'front': '127.0.0.1:9', 'wait_s': 0, 'secret': '', 'first': 'pi1'}\n"
        "work(job, 0, int(sys.argv[1]))"
    )
    with subprocess.Popen(["sleep", "60"]) as starter:
        worker = subprocess.Popen([sys.executable, "-c", code, str(starter.pid)], stdout=subprocess.PIPE, text=True)
        try:
            assert "waiting for pi1" in worker.stdout.readline()
            starter.kill()
            assert worker.wait(20) is not None
        finally:
            worker.kill()
            worker.stdout.close()
