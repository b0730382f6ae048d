"""What encryption costs: WireGuard between the devices of an emulated network, measured beside the same links without.

Each device gets a WireGuard interface over its shaped link, the kernel's or, where that has none, wireguard-go's. Real
hosts need nothing of this: an administrator sets up the tunnel, and the cluster file names its addresses (SECURITY.md).
`python -m detransformer.cluster.encrypted` prints a table.
"""

import argparse
import contextlib
import errno
import functools
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil

from detransformer.cluster.network import PREFIX as NAMESPACES
from detransformer.cluster.network import EmulatedNetwork, enter_namespace
from detransformer.cluster.spec import BANDWIDTH_LIMITS_MBPS
from detransformer.machine import cpu_model, die_with_parent, now, usable_cores
from detransformer.parse import number, words
from detransformer.record.run import RunFolder

PREFIX = "dtw"  # of interfaces, then as their namespaces
SUBNET = "10.78.0"  # inside the tunnels; 10.77.0 is outside
PORT = 51820
SOCKETS = Path("/var/run/wireguard")  # wireguard-go's, one an interface
START_S = 20.0  # of wireguard-go on a busy machine
CHUNK_BYTES = 2**16
NEEDED = "install it (Debian: apt install wireguard-tools, and wireguard-go where the kernel has no WireGuard)"
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL)  # what kernels without WireGuard answer


def run_in(namespace: str, *command: str, text: str = "") -> str:
    """Output of a short command in a network namespace; OSError with its last words where it fails."""
    entering = functools.partial(enter_namespace, namespace)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, preexec_fn=entering)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def socket_in(namespace: str, *kind: int) -> socket.socket:
    """A new socket of a network namespace, whichever thread uses it then; `kind` as for `socket.socket`."""

    def make() -> socket.socket:
        enter_namespace(namespace)
        return socket.socket(*kind)

    with ThreadPoolExecutor(1) as thread:  # what enters a namespace is a thread
        return thread.submit(make).result()


class Interface:
    """A WireGuard interface in a network namespace, with a key of its own and no peers yet. A context manager.

    `kind` says whose it is, `process` is wireguard-go where it is not the kernel's.

    Raises:
        OSError: on entering, where there is no WireGuard to be had, with what is missing.
    """

    def __init__(self, namespace: str, name: str, address: str):
        self.namespace, self.name, self.address = namespace, name, address
        self.kind = ""
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Interface":
        from pyroute2 import NetNS

        if not shutil.which("wg"):
            raise OSError(f"there is no wg: {NEEDED}.")
        private_key = run_in(self.namespace, "wg", "genkey")
        self.public_key = run_in(self.namespace, "wg", "pubkey", text=private_key)
        try:
            with NetNS(self.namespace) as space:
                self._create(space)
                run_in(
                    self.namespace,
                    *("wg", "set", self.name, "listen-port", str(PORT), "private-key", "/dev/stdin"),
                    text=private_key,
                )
                (index,) = space.link_lookup(ifname=self.name)
                space.addr("add", index=index, address=self.address, prefixlen=24)
                space.link("set", index=index, state="up")
        except BaseException:
            self.close()
            raise
        return self

    def _create(self, space) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            space.link("add", ifname=self.name, kind="wireguard")
            self.kind = "WireGuard (kernel)"
        except NetlinkError as error:
            if error.code not in UNSUPPORTED:
                raise
            self._start_userspace(space)
            self.kind = "WireGuard (wireguard-go)"

    def _start_userspace(self, space) -> None:
        if not shutil.which("wireguard-go"):
            raise OSError(f"this kernel has no WireGuard, and there is no wireguard-go: {NEEDED}.")

        def prepare() -> None:
            die_with_parent()
            enter_namespace(self.namespace)

        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                ["wireguard-go", "--foreground", self.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=prepare,
                env=os.environ | {"LOG_LEVEL": "error"},
            )
            deadline = time.monotonic() + START_S
            while not (self._socket.exists() and space.link_lookup(ifname=self.name)):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = ([line.strip() for line in log if line.strip()] or ["it said nothing"])[-1]
                    raise OSError(f"wireguard-go did not start: {last}")
                time.sleep(0.05)

    @property
    def _socket(self) -> Path:
        """Where `wg` reaches wireguard-go: a folder that all namespaces share, hence names of our own."""
        return SOCKETS / f"{self.name}.sock"

    def add_peer(self, public_key: str, address: str, endpoint: str) -> None:
        """Who has this key may send from `address` in the tunnel, and is reached at `endpoint` outside it."""
        peer = ("peer", public_key, "allowed-ips", f"{address}/32", "endpoint", f"{endpoint}:{PORT}")
        run_in(self.namespace, "wg", "set", self.name, *peer)

    def handshakes(self) -> dict[str, int]:
        """By peers' public keys, when each last proved its key, in seconds since 1970; 0: never."""
        lines = run_in(self.namespace, "wg", "show", self.name, "latest-handshakes").splitlines()
        return {key: int(at) for key, at in (line.split() for line in lines)}

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends wireguard-go; the kernel's interface goes with its namespace. Safe to call twice."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
            self._socket.unlink(missing_ok=True)


def remove_stale_sockets() -> None:
    """Removes what a killed run's wireguard-go left behind: a file that nobody listens at."""
    for path in SOCKETS.glob(f"{PREFIX}*.sock"):
        match = re.match(rf"{PREFIX}(\d+)-", path.name)
        if match and not Path("/proc", match[1]).exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def encrypted(network: EmulatedNetwork) -> Iterator[list[Interface]]:
    """An interface a device of a network that has been entered, each of which knows all others."""
    remove_stale_sockets()
    with contextlib.ExitStack() as stack:
        interfaces = [
            stack.enter_context(Interface(namespace, namespace.replace(NAMESPACES, PREFIX), f"{SUBNET}.{i + 1}"))
            for i, namespace in enumerate(network.namespaces)
        ]
        for own in interfaces:
            for other, endpoint in zip(interfaces, network.addresses, strict=True):
                if other is not own:
                    own.add_peer(other.public_key, other.address, endpoint)
        yield interfaces


def connected(server: str, client: str, address: str, timeout_s: float = 20.0) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection between two namespaces, to `address` of the first: (server's, client's).

    Raises:
        TimeoutError: where nothing comes through.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket_in(server, socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((address, 0))
        listener.listen()
        listener.settimeout(timeout_s)
        own = socket_in(client, socket.AF_INET, socket.SOCK_STREAM)
        own.settimeout(timeout_s)
        try:
            own.connect(listener.getsockname())
            other = listener.accept()[0]
        except BaseException:
            own.close()
            raise
    other.settimeout(timeout_s)
    for end in (own, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return other, own


def transfer(server: str, client: str, address: str, seconds: float) -> tuple[int, float]:
    """What one TCP connection carries to `address` if it is filled for so long: bytes, and seconds until the last."""
    receiver, sender = connected(server, client, address)
    data, until = os.urandom(CHUNK_BYTES), time.monotonic() + seconds

    def send() -> None:
        while time.monotonic() < until:
            sender.sendall(data)
        sender.shutdown(socket.SHUT_WR)

    with receiver, sender:
        thread = threading.Thread(target=send)
        thread.start()
        received, start = len(receiver.recv(1)), time.monotonic()
        while part := receiver.recv(CHUNK_BYTES):
            received += len(part)
        lasted = time.monotonic() - start
        thread.join()
    return received, lasted


def round_trip_s(server: str, client: str, address: str, repeats: int) -> float:
    """Median time of one byte to `address` and back, over one TCP connection."""
    echoing, asking = connected(server, client, address)

    def echo() -> None:
        while byte := echoing.recv(1):
            echoing.sendall(byte)

    with echoing, asking:
        thread = threading.Thread(target=echo)
        thread.start()
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            asking.sendall(b"x")
            asking.recv(1)
            samples.append(time.perf_counter() - start)
        asking.shutdown(socket.SHUT_WR)
        thread.join()
    return statistics.median(samples)


def processor_s(interfaces: Sequence[Interface]) -> float:
    """Processor time that wireguard-go has taken so far; 0 where the kernel encrypts, which counts it for nobody."""
    times = [psutil.Process(i.process.pid).cpu_times() for i in interfaces if i.process]
    return sum(spent.user + spent.system for spent in times)


def cost(bandwidths_mbps: Sequence[float], seconds: float = 3.0, repeats: int = 300) -> pd.DataFrame:
    """Throughput and round trip between two devices, with and without WireGuard, over the same shaped links.

    `processor_s_per_gb` is wireguard-go's time on both devices for each gigabyte (1e9 bytes) of payload; missing where
    the kernel encrypts.

    Raises:
        OSError: where there are no namespaces or no WireGuard.
    """
    rows = []
    with EmulatedNetwork(2, bandwidths_mbps[0] * 1e6) as network, encrypted(network) as interfaces:
        ends = network.namespaces[0], network.namespaces[1]
        for mbps in bandwidths_mbps:
            network.set_rate(mbps * 1e6)
            for kind, address in (("none", network.addresses[0]), (interfaces[0].kind, interfaces[0].address)):
                trip_s = round_trip_s(*ends, address, repeats)
                before = processor_s(interfaces)
                num_bytes, lasted_s = transfer(*ends, address, seconds)
                spent_s = processor_s(interfaces) - before
                inside = address == interfaces[0].address and interfaces[0].process is not None
                carried_bps = 8 * num_bytes / lasted_s
                rows.append(
                    {
                        "bandwidth_mbps": mbps,
                        "encryption": kind,
                        "throughput_mbps": carried_bps / 1e6,
                        "share_of_rate": carried_bps / (mbps * 1e6),
                        "round_trip_ms": trip_s * 1e3,
                        "processor_s_per_gb": spent_s / (num_bytes / 1e9) if inside else float("nan"),
                    }
                )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: a table on stdout, and in a run's folder where one is named; 2 and a sentence where it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m detransformer.cluster.encrypted", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bandwidth", default="125,1000", help="link rates in Mbps, separated by commas")
    parser.add_argument("--seconds", default="3", help="of each transfer")
    parser.add_argument("--output", help="folder of a run to save the table in")
    asked = parser.parse_args(arguments)
    try:
        rates = [number(word, "--bandwidth", *BANDWIDTH_LIMITS_MBPS) for word in words(asked.bandwidth, "--bandwidth")]
        load = os.getloadavg()[0]
        table = cost(rates, number(asked.seconds, "--seconds", 0.1, 600))
    except (ValueError, OSError) as error:
        print(f"encrypted: {error}", file=sys.stderr)
        return 2
    note = (
        f"One TCP connection between two network namespaces, {asked.seconds} s each. {cpu_model()}, {usable_cores()} "
    )
    note += f"cores, load {load:.1f} before; Linux {platform.release().partition('-')[0]}; {now()}."
    print(f"{table.to_markdown(index=False, floatfmt=('g', '', '.1f', '.3f', '.2f', '.1f'))}\n\n{note}")
    if asked.output:
        RunFolder(asked.output).save_table(table, "encrypted", note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
