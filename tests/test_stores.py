"""Stores listen at the address they were given, and nowhere else."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest

from detransformer.cluster.worker import bound_store

ADDRESS, OTHER = "127.0.0.1", "127.0.0.2"  # both this host's, as all of 127/8


def free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as found:
        return found.getsockname()[1]


def test_a_store_is_not_to_be_had_at_another_address_of_the_host():
    port, wait = free_port(), timedelta(seconds=10)
    store = bound_store(f"{ADDRESS}:{port}", None, True, wait)
    store.set("key", "value")
    assert bound_store(f"{ADDRESS}:{port}", None, False, wait).get("key") == b"value"
    with pytest.raises(OSError):
        socket.create_connection((OTHER, port), 2)
    found = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == port}
    assert found == {ADDRESS}


def test_what_a_worker_listens_at_is_the_clusters_address():
    port = free_port()
    code = (
        "import json, psutil\nfrom detransformer.cluster.worker import join\n"
        "job = {'interface': 'lo', 'threads': 1, 'message_s': 60.0}\n"
        f"state = join(job, 0, {{'devices': [0], 'group': 1, 'store': '{ADDRESS}:{port}'}})\n"
        "found = psutil.Process().net_connections('tcp')\n"
        "print(json.dumps([list(c.laddr) for c in found if c.status == psutil.CONN_LISTEN]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(capture_output=True, text=True, timeout=120, env=environment)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [ADDRESS, port] in found and {address for address, _ in found} == {ADDRESS}
