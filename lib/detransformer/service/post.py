"""Elastic agents and what they are told: of all devices, emulated on this machine, or of the one that this host is."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from detransformer.cluster.checkpoints import open_folder
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, enter_namespace
from detransformer.cluster.spec import ClusterSpec

RETURN_S, MAX_RETURN_S = 1.0, 60.0  # an agent that has ended is started again after this long, doubled each time
LASTING_S = 60.0  # an agent that ran longer counts as new


class Post:
    """Keeps agents running from `start` to `close`; a context manager.

    Args:
        seq_len: length in tokens that is planned for.
        time_scale: emulated links and devices are so many times slower.
        paced: emulated devices compute no faster than their presets; else as fast as this machine.
        threads: of each device's compute.
        own: the device of the file that this host is; None: all are emulated here, in namespaces of their own.
        interface: of this host, where it is one of the cluster's.
        secret: what signs the rendezvous, the same on all hosts; one of its own where all are here.
        models: device -> a folder of its own, where a device has another copy of the model.
        variables: device -> environment variables of its processes, beside this one's.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        model: str,
        seq_len: int = 128,
        time_scale: float = 1.0,
        paced: bool = True,
        threads: int = 1,
        own: int | None = None,
        interface: str = "",
        secret: str = "",
        models: dict[int, str] | None = None,
        variables: dict[int, dict[str, str]] | None = None,
    ):
        self.spec, self.own, self.variables = spec, own, variables or {}
        self.agents: dict[int, subprocess.Popen] = {}
        self.kept = set(range(len(spec.members))) if own is None else {own}  # whose agents are to run
        self.network: EmulatedNetwork | None = None
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="detransformer-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self.front = str(self.folder / "front")  # the Unix socket that the leading worker comes to
        self.job_path = self.folder / "job.json"
        spec.profile(model, open_folder(model).config)  # raises what is wrong, before anything starts
        folders = {str(device): str(Path(folder).resolve()) for device, folder in (models or {}).items()}
        self.job = {
            "cluster": str(spec.path.resolve()),
            "model": str(Path(model).resolve()),
            "models": folders,
            "front": self.front,
            "addresses": [member.address for member in spec.members],
            "port": spec.port,
            "secret": secret or secrets.token_hex(32),
            "interface": interface or INTERFACE,
            "threads": threads,
            "time_scale": time_scale,
            "seq_len": seq_len,
            "paced": paced and own is None,
        }

    def start(self) -> None:
        """
        Raises:
            OSError: where this machine does not permit network namespaces.
        """
        if self.own is None:
            rate_bps = self.spec.bandwidth_bps / self.job["time_scale"]
            self.network = EmulatedNetwork(len(self.spec.members), rate_bps).__enter__()
            self.job["addresses"] = self.network.addresses
        self.job_path.touch(0o600)
        self.job_path.write_text(json.dumps(self.job), encoding="utf-8")
        for device in sorted(self.kept):
            self.start_agent(device)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def __enter__(self) -> "Post":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends agents and workers, and removes the namespaces; safe to call twice."""
        self._stop.set()
        if self._keeper:
            self._keeper.join(10)
        for agent in self.agents.values():
            end(agent)
        if self.network:
            self.network.close()
        self._folder.cleanup()

    def start_agent(self, device: int) -> None:
        """The agent of one device, in its namespace where it is emulated."""
        start = "from detransformer.service.entry import main; main()"
        command = [sys.executable, "-c", start, str(self.job_path), str(device)]
        namespace = self.network.namespaces[device] if self.network else None
        with open(self.folder / f"agent{device}.log", "ab") as log:
            self.agents[device] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | self.variables.get(device, {}),
                preexec_fn=namespace and (lambda: enter_namespace(namespace)),
            )  # fmt: skip

    def _keep(self) -> None:
        """Starts agents that have ended again, as a host's service manager would."""
        started = dict.fromkeys(self.kept, time.monotonic())
        due: dict[int, float] = {}
        wait_s: dict[int, float] = {}
        while not self._stop.wait(0.2):
            now = time.monotonic()
            for device in sorted(self.kept):
                if self.agents[device].poll() is None:
                    continue
                if device not in due:
                    lasted = now - started.get(device, now) > LASTING_S
                    wait_s[device] = RETURN_S if lasted else min(2 * wait_s.get(device, RETURN_S / 2), MAX_RETURN_S)
                    due[device] = now + wait_s[device]
                elif now >= due[device]:
                    del due[device]
                    end(self.agents[device])
                    self.start_agent(device)
                    started[device] = now

    def last_words(self) -> str:
        """The last line of each agent's log."""
        texts = [path.read_text(errors="replace") for path in sorted(self.folder.glob("agent*.log"))]
        return "; ".join(text.strip().splitlines()[-1] for text in texts if text.strip())


def end(agent: subprocess.Popen) -> None:
    """Kills an agent with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
