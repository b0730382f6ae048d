"""The worker of one device, which the elastic agent there starts again and again.

The workers that are there form a group, ordered by device. The first device's leads: it plans for the devices that are
fit to serve, tells the front (`session`) who they are, and passes each batch on. Each worker leaves a sign of life in
the group's store a few times a second, so a device that was killed, hangs or is cut off is found by its silence,
whatever a collective says when it breaks; one that leaves because its agent starts the group anew says so first.
"""

import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save

from detransformer.cluster.answers import prepare
from detransformer.cluster.checkpoints import open_folder
from detransformer.cluster.host import blame, broadcast
from detransformer.cluster.jobs import JOBS, WorkerState
from detransformer.cluster.launcher import die_with_parent
from detransformer.cluster.run import Request, model_facts
from detransformer.cluster.spec import ClusterSpec
from detransformer.cluster.stores import bound_store
from detransformer.parallel.plan import Plan, is_decoder
from detransformer.planning.cost import compute_seconds
from detransformer.planning.profile import ClusterProfile, DeviceProfile
from detransformer.service.agent import ENDINGS
from detransformer.service.entry import AGENT, DEVICE
from detransformer.service.line import Line, tensors_of
from detransformer.service.patience import Patience
from detransformer.service.speeds import Speeds
from detransformer.typed_json import from_json

FORM_S = 6.0  # for all to come to a group that the rendezvous has made: their fork servers stand ready
COLLECTIVE_S = 60.0  # of a message: longer than any device computes between two
MEET_S = 20.0  # between two messages while there is nothing to do
BEAT_S = 0.2
SILENCE_S = 2.5  # without a sign of life: the device is lost
EVIDENCE_S = 1.5  # at most, to see who is gone when a collective broke
FRESH_S = 0.7  # a sign of life no older
AGENT_S = 4.0  # for the agent to start this worker anew, before it ends by itself
TRY_AGAIN_S = 60.0  # a slow device
LEADER = 0


class Group:
    """The devices that are there, in order; signs of life and farewells go through a store that the leader keeps."""

    def __init__(self, job: dict, device: int):
        """
        Raises:
            RuntimeError: where one that the rendezvous promised does not come.
        """
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=FORM_S)
        self._meeting = bound_store(host, port, count, rank == 0, wait, wait_for_workers=False)
        self._meeting.set(f"device/{rank}", json.dumps([device, model_facts(job["model"])]))
        told = [json.loads(self._meeting.get(f"device/{other}")) for other in range(count)]
        facts = dict(map(tuple, told))
        self.devices = tuple(sorted(facts))
        self.rank = self.devices.index(device)
        # Who keeps the store of the meeting is decided by addresses. With that device all evidence would be lost.
        where = job["addresses"][self.devices[0]], 0 if self.leads else int(self._meeting.get("store"))
        self.store = bound_store(*where, count, self.leads, wait, wait_for_workers=False)
        if self.leads:
            self._meeting.set("store", str(self.store.port))
        leading = facts[self.devices[0]]
        self.differing = {  # device -> what its checkpoint has otherwise than the first device's
            other: next(what for what in leading if leading[what] != facts[other][what])
            for other in self.devices
            if facts[other] != leading
        }
        os.environ["GLOO_SOCKET_IFNAME"] = job["interface"]
        torch.set_num_threads(job["threads"])
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=count,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )  # fmt: skip
        self._own = self.store.clone()  # of the thread that beats
        self._told = self.store.clone()  # of the thread that says farewell
        self._heard = {other: time.monotonic() for other in self.devices}
        self._beats: dict[int, bytes] = {}

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def beat(self, count: int) -> None:
        self._own.set(f"beat/{self.rank}", str(count))
        if self.leads:
            self._listen(self._own)

    def say(self, what: str) -> None:
        """Leaves the last words of this worker: why it ends."""
        self._told.set(f"end/{self.rank}", what)

    def last_words(self) -> dict[int, str]:
        """device -> its last words."""
        found = {}
        for rank, device in enumerate(self.devices):
            if rank != self.rank and self._told.check([f"end/{rank}"]):
                found[device] = self._told.get(f"end/{rank}").decode()
        return found

    def _listen(self, store: dist.Store) -> None:
        now = time.monotonic()
        for rank, device in enumerate(self.devices):
            if rank == self.rank or not store.check([f"beat/{rank}"]):
                continue
            beat = store.get(f"beat/{rank}")
            if self._beats.get(device) != beat:
                self._beats[device], self._heard[device] = beat, now

    def silent(self, limit_s: float) -> list[int]:
        """On the leader: devices of which nothing was heard for longer."""
        now = time.monotonic()
        return [device for device in self.devices[1:] if now - self._heard[device] > limit_s]


class Lifeline(threading.Thread):
    """Beats, watches the others and the batch (on the leader), and ends this worker when its agent asks for it."""

    def __init__(self, group: Group, line: Line | None, patience: Patience):
        super().__init__(daemon=True)
        self.group, self.line, self.patience = group, line, patience
        self._ending = threading.Lock()

    def run(self) -> None:
        count = 0
        try:
            while True:
                self.group.beat(count)
                count += 1
                silent = self.group.silent(SILENCE_S) if self.group.leads else []
                if silent:
                    self._end({d: f"has been silent for {SILENCE_S:g} s" for d in silent}, ENDINGS["lost"])
                if self.patience.is_over:
                    self._end({}, ENDINGS["lost"], "a message has not come, although all devices live: they meet anew")
                time.sleep(BEAT_S)
        except Exception:  # the store has gone, and with it the worker that kept it
            time.sleep(AGENT_S)
            os._exit(ENDINGS["lost"])

    def obey(self) -> None:
        """The agent starts the group anew, or ends it."""
        if self.group.leads:
            self._end(self.gone(), ENDINGS["asked"])
        self.farewell("")
        os._exit(ENDINGS["asked"])

    def farewell(self, why: str) -> None:
        try:
            self.group.say(why)
        except Exception:  # the store has gone
            pass

    def gone(self) -> dict[int, str]:
        """On the leader: device -> what happened to it, of those that neither live nor have said farewell."""
        deadline = time.monotonic() + EVIDENCE_S
        while True:
            try:
                words = self.group.last_words()
            except Exception:
                words = {}
            failed = {device: f"failed: {why}" for device, why in words.items() if why}
            silent = [device for device in self.group.silent(FRESH_S) if device not in words]
            pending = [d for d in self.group.devices[1:] if d not in words and d not in silent]
            if failed or (silent and (not pending or time.monotonic() > deadline - EVIDENCE_S / 3)):
                return failed or {device: "is gone: its process ended" for device in silent}
            if time.monotonic() > deadline:
                return {}
            if not pending:
                return {}
            time.sleep(BEAT_S / 2)

    def _end(self, gone: dict[int, str], code: int, why: str = "the devices meet anew") -> None:
        """Tells the front who is gone, or if nobody is, `why` this worker ends; once, and ends it."""
        with self._ending:
            try:
                if self.line:
                    self.line.send({"gone": {str(device): what for device, what in gone.items()}, "why": why})
            except OSError:
                pass
            os._exit(code)

    def broke(self, error: Exception, spec: ClusterSpec) -> None:
        """This worker's main thread cannot go on. Does not return."""
        sentence, own = blame(error, spec)
        if own:
            traceback.print_exc()
            sys.stderr.flush()
            self.farewell(sentence)
            if self.group.leads:
                self._end({self.group.devices[0]: f"failed: {sentence}"}, 1)
            os._exit(1)
        if self.group.leads:
            self._end(self.gone(), ENDINGS["lost"])
        time.sleep(AGENT_S)  # it beats on: the leader sees that it was not this one
        os._exit(ENDINGS["lost"])


class Server:
    """What a worker serves with: the group, and on the leader the line to the front and the plans."""

    def __init__(self, job: dict, group: Group, line: Line | None, patience: Patience):
        self.job, self.group, self.line, self.patience = job, group, line, patience
        timeout = timedelta(seconds=COLLECTIVE_S)
        self.state = WorkerState(group.rank, len(group.devices), job["interface"], {}, timeout)
        self.config = open_folder(job["model"]).config
        self.plans: dict[str, dict] = {}
        spec = ClusterSpec.load(job["cluster"])
        self.spec = spec
        self.fit = tuple(rank for rank, device in enumerate(group.devices) if device not in group.differing)
        profile = spec.profile(job["model"], self.config)
        self.profile: ClusterProfile = profile.of([group.devices[rank] for rank in self.fit])
        self.own = profile.devices[group.devices[group.rank]]
        self.pace = asdict(self.own) if job["paced"] else None
        self.speeds = Speeds(len(group.devices))
        self.slow_since = 0.0

    def serve(self) -> None:
        """Answers batches, until something breaks."""
        while True:
            header, payload = self._next() if self.line else (None, None)
            told = json.loads(broadcast(json.dumps(header).encode() if self.line else None, 0, self.group.rank))
            if told:
                self._answer(told, payload)
                if self.line:
                    self.patience.end()

    def _next(self) -> tuple[dict, bytes]:
        """The front's next batch with its plan; ({}, b"") when there was none for a while."""
        if not self.line.waits(MEET_S):
            return {}, b""
        header, payload = self.line.receive()
        inputs, request = tensors_of(payload), from_json(Request, header["request"])
        try:
            job = self.planned(request, inputs)
        except ValueError as error:
            word = "postponed" if self._needs_all(request) else "refused"
            self.line.send({"id": header["id"], word: str(error)})
            return {}, b""
        self.patience.begin(job["kind"], inputs["input_ids"].numel())
        return {"id": header["id"], **job}, payload

    def _needs_all(self, request: Request) -> bool:
        """Whether a request that cannot be planned for the devices that are here could be, if all were."""
        if self._complete:
            return False
        try:
            profile = self.spec.profile(self.job["model"], self.config)
            prepare(request, self.job["model"], self.config, profile, self._usual(request))
        except ValueError:
            return False
        return True

    @property
    def _complete(self) -> bool:
        return len(self.fit) == len(self.spec.members)

    def planned(self, request: Request, inputs: dict[str, torch.Tensor]) -> dict:
        """The job of a batch: its plan is that of the first of its kind, which the weights are held for.

        A plan that was given is for all devices: while one is away, another is made for the rest.

        Raises:
            ValueError: where none fits, or the request is at fault.
        """
        if not self._complete:
            request = replace(request, plan=None)
        key = json.dumps([request.method, request.plan, request.max_new_tokens], sort_keys=True)
        if key not in self.plans:
            prepared = prepare(request, self.job["model"], self.config, self._profile_now(), self._usual(request))
            job = prepared.job | ({"repeats": 1, "warmup": 0} if prepared.op == "run_plan" else {"warmup": 0})
            for name in job.keys() & {"plan", "prefill", "decode"}:
                plan = Plan.from_dict(job[name])
                job[name] = replace(plan, devices=tuple(self.fit[i] for i in plan.device_ids)).to_dict()
            last = self.fit[prepared.plan.device_ids[-1]]  # of prefill and decode alike
            told = {"kind": str(len(self.plans)), "op": prepared.op, "job": job, "last": last}
            self.plans[key] = told | {"method": prepared.plan.method}
        return self.plans[key]

    def _profile_now(self) -> ClusterProfile:
        """The fit devices, those that are slow at the moment being so."""
        factors = [self.speeds.factors[rank] for rank in self.fit]
        return replace(self.profile, devices=tuple(map(slowed, self.profile.devices, factors)))

    def _usual(self, request: Request) -> dict[str, torch.Tensor]:
        """A request of the length that is planned for."""
        new = request.max_new_tokens if is_decoder(self.config) else 0
        length = min(self.job["seq_len"], self.config.max_position_embeddings - new)
        return {"input_ids": torch.zeros(1, max(1, length), dtype=torch.int64)}

    def _answer(self, told: dict, payload: bytes | None) -> None:
        inputs = tensors_of(broadcast(payload, 0, self.group.rank))
        outputs: dict[str, torch.Tensor] = {}
        started = time.perf_counter()
        record = JOBS[told["op"]](
            self.state, checkpoint=self.job["model"], inputs=inputs, output=outputs, device=self.pace,
            time_scale=self.job["time_scale"], **told["job"],
        )  # fmt: skip
        last = told["last"]
        data = broadcast(save(outputs) if self.group.rank == last else None, last, self.group.rank)
        if self.line:
            seconds = time.perf_counter() - started
            self.line.send({"id": told["id"], "seconds": seconds, "method": told["method"]}, data)
        if told["op"] == "run_plan" and len(self.group.devices) > 1:
            spent_s, expected_s = self._compute(told["job"]["plan"], record, *inputs["input_ids"].shape)
            self._compare_speeds(time.perf_counter() - started, spent_s, expected_s)

    def _compute(self, plan: dict, record: dict | None, batch_size: int, seq_len: int) -> tuple[float, float]:
        """This device's seconds of compute, and what its profile says of them; NaN without a part."""
        if record is None:
            return math.nan, math.nan
        plan_ = Plan.from_dict(plan)
        (loaded,) = self.state.loaded.values()
        parts = loaded.compute(plan_, plan_.device_ids.index(self.group.rank), seq_len, batch_size)
        expected_s = sum(compute_seconds(c, self.own) for part in parts for c in part)
        (sample,) = record["samples"]
        spent_s = sum(stop - start for what, start, stop, _ in sample["events"] if what == "compute")
        return spent_s / self.job["time_scale"] + sample["overrun_s"], expected_s

    def _compare_speeds(self, batch_s: float, spent_s: float, expected_s: float) -> None:
        """On the leader: plans anew where a device has become slow, and after a while tries it again."""
        told = [torch.zeros(2, dtype=torch.float64) for _ in self.group.devices]
        dist.all_gather(told, torch.tensor([spent_s, expected_s], dtype=torch.float64))
        if not self.line:
            return
        changed = self.speeds.observe(batch_s, *torch.stack(told).T.tolist())
        if any(factor > 1 for factor in changed.values()):
            self.slow_since = time.monotonic()
        elif max(self.speeds.factors) > 1 and time.monotonic() - self.slow_since > TRY_AGAIN_S:
            changed = dict.fromkeys(self.speeds.forget(), 1.0)
        if changed:
            self.plans.clear()
            self.patience.forget()
            self.line.send({"slow": {str(self.group.devices[rank]): factor for rank, factor in changed.items()}})


def slowed(device: DeviceProfile, factor: float) -> DeviceProfile:
    """The profile of a device that takes `factor` times as long."""
    memory = device.memory_bytes_per_s and device.memory_bytes_per_s / factor
    return replace(device, flops_per_s=device.flops_per_s / factor, memory_bytes_per_s=memory)


def work(path: str) -> None:
    """What a worker does: `path` is the job's file. Returns never."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifelines: list[Lifeline] = []
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    job["model"] = job["models"].get(os.environ[DEVICE], job["model"])
    spec = ClusterSpec.load(job["cluster"])
    try:
        threading.Thread(target=_wait_for_the_end, args=(lifelines,), daemon=True).start()
        threading.Thread(target=_end_with, args=(int(os.environ[AGENT]),), daemon=True).start()
        group = Group(job, int(os.environ[DEVICE]))
    except Exception as error:  # not all came, and the agents begin anew; or this device cannot
        sentence, own = blame(error, spec)
        print(f"no group: {sentence}", file=sys.stderr, flush=True)
        os._exit(1 if own else ENDINGS["lost"])
    line = None
    if group.devices[group.rank] == LEADER:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(job["front"])
        line = Line(connection)
    patience = Patience()
    lifeline = Lifeline(group, line, patience)
    lifelines.append(lifeline)
    lifeline.start()
    try:
        server = Server(job, group, line, patience)
        if line:
            line.send({"here": group.devices, "differing": group.differing})
        elif group.leads:
            raise RuntimeError("the first device is not there; timed out")
        server.serve()
    except Exception as error:
        lifeline.broke(error, spec)


def _end_with(agent: int) -> None:
    """Ends this worker when the process `agent` has: its parent, the fork server, does not, while there are workers."""
    try:
        poller = select.poll()
        poller.register(os.pidfd_open(agent), select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        pass
    os._exit(ENDINGS["lost"])


def _wait_for_the_end(lifelines: list[Lifeline]) -> None:
    """SIGTERM, which all other threads block, is the agent's word to end."""
    signal.sigwait({signal.SIGTERM})
    if lifelines:
        lifelines[0].obey()
    os._exit(ENDINGS["asked"])
