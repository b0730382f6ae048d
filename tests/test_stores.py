"""Stores listen at the address they were given, and nowhere else."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest

from detransformer.cluster.stores import bound_store

ADDRESS, OTHER = "127.0.0.1", "127.0.0.2"  # both this host's, as all of 127/8
OWN = "import json, os, psutil; c = psutil.Process({}).net_connections('tcp'); "
OWN += "print(json.dumps([list(x.laddr) for x in c if x.status == psutil.CONN_LISTEN]), flush=True); "


def free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as found:
        return found.getsockname()[1]


def listening(code: str, *arguments: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_store_is_not_to_be_had_at_another_address_of_the_host():
    port = free_port()
    store = bound_store(ADDRESS, port, None, True, timedelta(seconds=10), wait_for_workers=False)
    store.set("key", "value")
    other = bound_store(ADDRESS, port, None, False, timedelta(seconds=10), wait_for_workers=False)
    assert other.get("key") == b"value"
    with pytest.raises(OSError):
        socket.create_connection((OTHER, port), 2)
    found = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == port}
    assert found == {ADDRESS}


def test_what_a_worker_listens_at_is_the_clusters_address():
    port = free_port()
    code = "from detransformer.cluster.jobs import WorkerState; "
    code += f"WorkerState.join(0, 1, '{ADDRESS}:{port}', True, 'lo', 1); "
    found = listening(code + OWN.format(""))
    assert [ADDRESS, port] in found and {address for address, _ in found} == {ADDRESS}
