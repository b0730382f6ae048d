"""The emulated cluster: shaped links, pacing, bench rows, and devices that die or hang."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from detransformer.cluster import network
from detransformer.cluster.bench import Bench, Cell, grid, measure_grid
from detransformer.cluster.network import EmulatedNetwork, can_emulate, remove_stale_namespaces
from detransformer.cluster.pacing import Pacer
from detransformer.cluster.profiler import profile_link, profile_operations
from detransformer.cluster.session import DeviceError, DeviceLost, EmulatedCluster
from detransformer.parallel.plan import published_plan

needs_namespaces = pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])


def test_pacer_waits_until_the_device_would_have_finished():
    pacer = Pacer([0.05, 0.03], link_s=lambda kind, num_bytes: 0.02)
    start = time.perf_counter()
    pacer.begin()
    pacer.before("all_reduce", 10)
    pacer.after("all_reduce", 10)
    pacer.end()
    # no sooner; how much later is the host's affair
    assert 0.10 <= time.perf_counter() - start < 0.5
    assert 0.08 <= pacer.compute_s < 0.4
    assert pacer.comm_s >= 0.02
    assert [what for what, *_ in pacer.events] == ["compute", "all_reduce", "compute"]


def test_pacer_records_an_overrun():
    pacer = Pacer([0.01])
    pacer.begin()
    time.sleep(0.03)
    pacer.end()
    assert 0.015 < pacer.overrun_s < 0.2


def test_bench_row_over_loopback(cluster, cases, tmp_path):
    """A row of a model on disk: its single-device reference, prediction, counts and self-check."""
    AutoModel.from_pretrained(cases["original"].checkpoint, dtype=torch.float32).save_pretrained(tmp_path / "model")
    cells = grid(str(tmp_path / "model"), ["single", "tp", "pp"], [100.0], 3, seq_len=16, repeats=2)
    path = tmp_path / "rows.json"
    frame = measure_grid(Bench(cluster, time_scale=1.0), cells, path, quiet=True)
    row = frame.set_index("method").loc["tp"]
    assert (row["all_reduce_count"], row["num_devices"], row["link"]) == (10, 3, "modelled")
    assert 0 < row["max_abs_error"] < 1e-4
    assert row["latency_s"] >= row["comm_s"] > 0
    # 10 all_reduces of [16, 48] at 100 Mbps, four ring steps each
    assert row["latency_s"] >= 10 * (4 * 2e-4 + 8 * 2 * 2 * 16 * 48 * 4 / 3 / (0.94 * 100e6))
    assert not path.exists()


def test_an_interrupted_grid_goes_on(cluster, cases, tmp_path, monkeypatch):
    """Rows measured before an interruption are kept; only the rest is measured by the next call."""
    folder = tmp_path / "model"
    AutoModel.from_pretrained(cases["original"].checkpoint, dtype=torch.float32).save_pretrained(folder)
    cells = grid(str(folder), ["single", "tp", "sp"], [100.0], 2, seq_len=16, repeats=1)
    bench, path, measured = Bench(cluster, time_scale=1.0), tmp_path / "rows.json", []
    real = bench.measure

    def measure(cell):
        if cell.method == "sp" and len(measured) == 2:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(cell.method)
        return real(cell)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        measure_grid(bench, cells, path, quiet=True)
    assert len(json.loads(path.read_text())) == 2
    frame = measure_grid(bench, cells, path, quiet=True)
    assert measured == ["single", "tp", "interrupted", "sp"]
    assert frame["method"].tolist() == ["single", "tp", "sp"]
    path.write_text("{")
    with pytest.raises(ValueError, match="not a bench's row file"):
        measure_grid(bench, cells, path, quiet=True)


def test_bench_names_what_makes_a_row_invalid(cluster):
    row = {
        "bandwidth_mbps": 100,
        "achieved_mbps": 120.0,
        "pacing_overrun": 0.5,
        "max_abs_error": 1.0,
        "host_steal": 0.4,
    }
    why = Bench(cluster)._why_invalid(row)
    assert "120 of 100 Mbps" in why and "late by 50.0%" in why and "differs" in why and "took 40%" in why
    good = dict(achieved_mbps=95.0, pacing_overrun=0.0, max_abs_error=1e-6, host_steal=0.0)
    assert Bench(cluster)._why_invalid(row | good) == ""
    assert Bench(cluster)._why_invalid(row | dict(max_abs_error=float("nan")))


@pytest.mark.parametrize("fields", [dict(method="magic"), dict(repeats=0), dict(bandwidth_mbps=0)])
def test_bad_cells_are_refused(fields):
    with pytest.raises(ValueError):
        Cell(**{"model": "bert-base", "method": "tp"} | fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_devices=0), "num_devices=0 is outside"),
        (dict(num_devices=2, device="toaster"), "device 'toaster' is unknown"),
        (dict(num_devices=2, bandwidth_bps=0), "above 0"),
        (dict(num_devices=2, transport="pigeon"), "transport='pigeon'"),
    ],
)
def test_bad_clusters_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        EmulatedCluster(**fields)


def test_a_failing_job_names_the_device_and_the_error(cases):
    with EmulatedCluster(2, transport="loopback") as session:
        plan = published_plan("tp", cases["original"].config, [1.0, 1.0]).to_dict()
        with pytest.raises(DeviceError, match="device 0 failed while run_plan: .*missing"):
            session.run("run_plan", checkpoint="/missing", plan=plan, inputs="/missing.safetensors", repeats=1)


@pytest.mark.parametrize(
    "how, words", [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "has been silent for 10 s")]
)
def test_a_lost_device_ends_the_run_and_is_named(cases, how, words):
    """Killed or frozen in the middle of inference: within 30 s one sentence names it, and nothing is left running."""
    case = cases["original"]
    with EmulatedCluster(3, transport="loopback") as session:
        pids = session.pids
        timer = threading.Timer(2.0, os.kill, (pids[1], how))
        timer.start()
        start = time.monotonic()
        slow = {"name": "slow", "memory_bytes": 1, "flops_per_s": {"*": 1e6}, "source": "test"}
        with pytest.raises(DeviceLost, match=f"device 1 of 3 .*{words} while run_plan") as lost:
            session.run(
                "run_plan",
                checkpoint=case.checkpoint,
                plan=published_plan("tp", case.config, [1.0] * 3).to_dict(),
                inputs=case.inputs,
                device=slow,
                repeats=50,
            )
        assert lost.value.rank == 1
        assert time.monotonic() - start < 30
        timer.join()
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)


def test_operations_profile():
    from detransformer.models import preset_config

    frame = profile_operations(preset_config("bert-base", 4), num_devices=(1, 4), repeats=2)
    assert set(frame["strategy"]) == {"block", "tensor", "sequence", "replicate"}
    assert (frame["latency_s"] > 0).all()
    whole = frame[frame["strategy"] == "replicate"]
    assert whole["efficiency"].tolist() == [1.0]
    quarter = frame[(frame["strategy"] == "tensor") & (frame["num_devices"] == 4)]["gflops"].iloc[0]
    assert quarter == pytest.approx(whole["gflops"].iloc[0] / 4)


@needs_namespaces
def test_namespaces_are_removed_also_after_a_failure():
    with pytest.raises(RuntimeError, match="boom"), EmulatedNetwork(2, 100e6) as made:
        names = [*made.namespaces, made.switch]
        assert all(Path("/var/run/netns", name).exists() for name in names)
        raise RuntimeError("boom")
    assert not any(Path("/var/run/netns", name).exists() for name in names)


@needs_namespaces
def test_namespaces_go_when_their_owner_is_killed():
    """As Jupyter kills a kernel: with its whole process group."""
    code = (
        "import time\nfrom detransformer.cluster.network import EmulatedNetwork\n"
        "with EmulatedNetwork(2, 100e6) as n: print(n.switch, flush=True); time.sleep(60)"
    )
    pipes = dict(stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes) as owner:
        switch = Path("/var/run/netns", owner.stdout.readline().strip())
        assert switch.exists()
        os.killpg(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while switch.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not switch.exists()


@needs_namespaces
def test_leftovers_of_dead_processes_are_removed():
    from pyroute2 import netns

    dead = 2**22 + 7  # above the largest process id
    name = f"{network.PREFIX}{dead}-d0"
    netns.create(name)
    assert name in remove_stale_namespaces()
    assert not Path("/var/run/netns", name).exists()


@needs_namespaces
def test_shaped_links_carry_their_rate_and_never_more():
    """Real gloo over namespaces at two rates; changed while connections are open."""
    with EmulatedCluster(2, bandwidth_bps=100e6, transport="namespaces") as session:
        assert session.link == "line-rate"
        for mbps in (50, 100):
            session.set_link(mbps * 1e6)
            results = session.run("check_link", num_bytes=int(mbps * 1e6 * 0.3 / 8))
            seconds = max(seconds for result in results for seconds in result["seconds"])
            achieved = 8 * int(mbps * 1e6 * 0.3 / 8) / seconds / 1e6
            assert 0.6 * mbps < achieved <= mbps
        link, rows = profile_link(session, repeats=2)
        assert set(rows["kind"]) == {"all_reduce", "all_gather", "send"}
        assert all(0.3 < share <= 1 for share in link.efficiency.values())


@needs_namespaces
def test_what_is_counted_is_what_the_kernel_sends(cases):
    """Bytes counted by the ring formula against the interface's counter: headers and acknowledgements add a little."""
    case = cases["original"]
    with EmulatedCluster(3, bandwidth_bps=500e6, transport="namespaces") as session:
        results = session.run(
            "run_plan",
            checkpoint=case.checkpoint,
            plan=published_plan("sp", case.config, [1.0] * 3).to_dict(),
            inputs=case.inputs,
            reference=case.reference,
            dtype="float64",
            repeats=3,
        )
    for result in results:
        assert result["max_abs_error"] < 1e-12
        counted, sent = sum(result["bytes"].values()), result["samples"][-1]["link_bytes"]
        assert counted < sent < 1.6 * counted
