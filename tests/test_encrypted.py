"""A cluster's links inside WireGuard: data pass, none can be read on the way, a stranger gets nothing; and its cost."""

import functools
import hashlib
import math
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from detransformer.cluster import encrypted as module
from detransformer.cluster.encrypted import (
    PORT,
    SOCKETS,
    SUBNET,
    Interface,
    connected,
    cost,
    encrypted,
    main,
    remove_stale_sockets,
    socket_in,
)
from detransformer.cluster.network import INTERFACE, EmulatedNetwork, can_emulate
from detransformer.record.run import RunFolder


@functools.cache
def can_encrypt() -> tuple[bool, str]:
    """Whether this machine lets us put WireGuard over emulated links, by trying, and why not."""
    permitted, why = can_emulate()
    if not permitted:
        return False, why
    try:
        with EmulatedNetwork(2, 100e6) as network, encrypted(network) as interfaces:
            return True, interfaces[0].kind
    except OSError as error:
        return False, str(error)


needs_wireguard = pytest.mark.skipif(not can_encrypt()[0], reason=can_encrypt()[1])
MARK = b"a film of great charm, and nobody else's business. "
PAYLOAD = MARK * 4000  # 204 kB
ETH_P_ALL, UDP = 3, 17
STRANGER = 2  # a device on the same network, whose key the others do not know


@pytest.fixture(scope="module")
def network():
    with EmulatedNetwork(3, 200e6) as made:
        yield made


@pytest.fixture(scope="module")
def pair(network):
    """Devices 0 and 1, inside a tunnel; device 2 is on the same switch, outside."""
    everyone = network.namespaces, network.addresses
    network.namespaces, network.addresses = network.namespaces[:2], network.addresses[:2]
    try:
        with encrypted(network) as interfaces:
            network.namespaces, network.addresses = everyone
            yield interfaces
    finally:
        network.namespaces, network.addresses = everyone


class Sniffer:
    """All frames on a device's cable, from outside the tunnel, while it is entered."""

    def __init__(self, namespace: str):
        self._socket = socket_in(namespace, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
        self._socket.bind((INTERFACE, ETH_P_ALL))
        self.frames: list[bytes] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while True:
            if select.select([self._socket], [], [], 0.2)[0]:
                self.frames.append(self._socket.recv(2**16))
            elif self._over.is_set():
                return

    def __enter__(self) -> "Sniffer":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def tunnelled_bytes(self) -> int:
        """In UDP datagrams to WireGuard's port."""
        datagrams = [f for f in self.frames if f[12:14] == b"\x08\x00" and f[23] == UDP]
        return sum(len(f) for f in datagrams if int.from_bytes(f[36:38]) == PORT)


def send_payload(server: str, client: str, address: str) -> bytes:
    """What arrives of PAYLOAD over one TCP connection to `address`."""
    receiver, sender = connected(server, client, address)
    with receiver, sender:
        thread = threading.Thread(target=lambda: (sender.sendall(PAYLOAD), sender.shutdown(socket.SHUT_WR)))
        thread.start()
        received = b"".join(iter(lambda: receiver.recv(2**16), b""))
        thread.join()
    return received


@needs_wireguard
def test_data_pass_through_the_tunnel_and_cannot_be_read_on_the_cable(network, pair):
    ends = network.namespaces[:2]
    with Sniffer(ends[1]) as plain:
        assert send_payload(*ends, network.addresses[0]) == PAYLOAD
    assert sum(frame.count(MARK) for frame in plain.frames) > 1000, "without the tunnel, whoever listens can read it"
    assert plain.tunnelled_bytes() == 0

    with Sniffer(ends[1]) as tunnelled:
        received = send_payload(*ends, pair[0].address)
    assert hashlib.sha256(received).digest() == hashlib.sha256(PAYLOAD).digest()
    assert tunnelled.tunnelled_bytes() > len(PAYLOAD), "it went over the cable, in WireGuard's datagrams"
    readable = [frame for frame in tunnelled.frames if MARK[:12] in frame or MARK[-14:] in frame]
    assert not readable
    inner = socket.inet_aton(pair[0].address)
    assert not any(inner in frame[:64] for frame in tunnelled.frames), "nor who talks to whom inside"


@needs_wireguard
@pytest.mark.parametrize("claimed", [STRANGER, 1], ids=["an address of its own", "a member's address"])
def test_who_has_another_key_gets_nothing(network, pair, claimed):
    server, member, stranger = network.namespaces
    name = stranger.replace("dtf", "dtw")
    with Interface(stranger, name, f"{SUBNET}.{claimed + 1}") as outsider:
        outsider.add_peer(pair[0].public_key, pair[0].address, network.addresses[0])
        with pytest.raises(TimeoutError):
            connected(server, stranger, pair[0].address, timeout_s=4)
        assert outsider.handshakes() == {pair[0].public_key: 0}, "device 0 never answered"
        assert set(pair[0].handshakes()) == {pair[1].public_key}
        assert send_payload(server, member, pair[0].address) == PAYLOAD, "those with known keys still talk"
    assert pair[1].handshakes()[pair[0].public_key] > time.time() - 600


def running(names: list[str]) -> list[int]:
    """Processes that were started for interfaces of these names."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if set(names) & set(p.info["cmdline"] or ())]


def namespaces_there(names: list[str]) -> list[str]:
    return [name for name in names if Path("/var/run/netns", name).exists()]


@needs_wireguard
def test_nothing_is_left_after_a_failure_inside():
    with pytest.raises(RuntimeError, match="inside"), EmulatedNetwork(2, 100e6) as network:
        with encrypted(network) as interfaces:
            names, namespaces = [i.name for i in interfaces], network.namespaces
            started = {i.process.pid for i in interfaces if i.process}
            assert set(running(names)) == started and namespaces_there(namespaces) == namespaces
            raise RuntimeError("inside")
    assert not running(names) and not namespaces_there(namespaces)
    assert not [path for path in SOCKETS.glob("*") if path.stem in names]


@needs_wireguard
def test_nothing_runs_on_after_its_owner_was_killed():
    code = (
        "import os, signal\n"
        "from detransformer.cluster.encrypted import encrypted\n"
        "from detransformer.cluster.network import EmulatedNetwork\n"
        "with EmulatedNetwork(2, 100e6) as network, encrypted(network) as interfaces:\n"
        "    print(*network.namespaces, *[i.name for i in interfaces], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    first, second, *names = owner.communicate(timeout=120)[0].split()
    assert owner.returncode == -signal.SIGKILL and len(names) == 2

    def left() -> list:
        remove_stale_sockets()  # as the next run does; a killed one leaves files that nobody listens at
        sockets = [path for path in SOCKETS.glob("*") if path.stem in names]
        return sockets + running(names) + namespaces_there([first, second])

    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left()


@needs_wireguard
def test_cost_is_measured_beside_the_same_link_without(tmp_path, capsys):
    table = cost([20.0], seconds=0.5, repeats=20)
    assert table["encryption"].tolist() == ["none", can_encrypt()[1]]
    plain, tunnelled = table.to_dict("records")
    assert 0 < tunnelled["throughput_mbps"] < plain["throughput_mbps"] <= 20 * 1.02
    assert plain["share_of_rate"] == pytest.approx(plain["throughput_mbps"] / 20)
    assert plain["round_trip_ms"] > 0 and tunnelled["round_trip_ms"] > 0
    assert math.isnan(plain["processor_s_per_gb"])
    if "go" in can_encrypt()[1]:
        assert tunnelled["processor_s_per_gb"] > 0
    assert main(["--bandwidth", "20", "--seconds", "0.2", "--output", str(tmp_path)]) == 0
    assert len(RunFolder(tmp_path).load_table("encrypted")) == 2
    assert "| none " in capsys.readouterr().out


def test_what_is_wrong_is_said_in_a_sentence(capsys):
    assert main(["--bandwidth", "fast"]) == 2
    assert capsys.readouterr().err == "encrypted: --bandwidth fast is not a number; give one from 0.1 to 100000.\n"


@pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])
def test_a_machine_without_the_tools_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    can_encrypt.cache_clear()
    try:
        works, why = can_encrypt()
    finally:
        can_encrypt.cache_clear()
    assert not works and why == f"there is no wg: {module.NEEDED}."
