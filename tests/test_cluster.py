"""The emulated cluster: shaped links, pacing, bench rows, and devices that die or hang."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from detransformer.cluster import bench as bench_module
from detransformer.cluster import network
from detransformer.cluster.bench import Bench, measure_grid, timelines
from detransformer.cluster.cells import Cell, grid
from detransformer.cluster.devices import DEVICES, DeviceError, DeviceLost, DeviceSpec, jetson_share, preset_profile
from detransformer.cluster.jobs import link_rounds
from detransformer.cluster.network import EmulatedNetwork, can_emulate, remove_stale_namespaces
from detransformer.cluster.pacing import Arrivals, Pacer, seconds_of, timeline_rows
from detransformer.cluster.profiler import host_profile, profile_link, profile_operations
from detransformer.cluster.selfcheck import Check, first_time_scale, transfer_seconds, why_invalid
from detransformer.cluster.session import EmulatedCluster
from detransformer.models import preset_config
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import predict
from detransformer.planning.profile import LinkProfile

needs_namespaces = pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])


def test_pacer_waits_until_the_device_would_have_finished(tmp_path):
    arrivals = Arrivals(tmp_path / "arrivals", 1, create=True)
    pacer = Pacer([0.05, 0.0, 0.03], link_s=[0.02], arrivals=arrivals)
    start = time.perf_counter()
    pacer.begin()
    number = pacer.launch("all_reduce", 10)
    pacer.before_wait(number)
    pacer.after_wait(number)
    pacer.end()
    # no sooner; how much later is the host's affair
    assert 0.10 <= time.perf_counter() - start < 0.5
    assert pacer.compute_s == pytest.approx(0.08)
    assert pacer.modelled_s == pytest.approx(0.10, abs=0.005)
    assert [what for what, *_ in pacer.events] == ["compute", "compute", "all_reduce", "compute"]


def test_pacer_records_an_overrun():
    pacer = Pacer([0.01])
    pacer.begin()
    time.sleep(0.03)
    pacer.end()
    assert 0.015 < pacer.overrun_s < 0.2


def through(pacer, kind, when_s):
    """Launches a message and waits for it; seconds from `when_s` to its end."""
    number = pacer.launch(kind, 1)
    pacer.before_wait(number)
    pacer.after_wait(number)
    return time.perf_counter() - when_s


def two_pacers(folder, link_s=None) -> list[Pacer]:
    """Two devices that have begun a request."""
    Arrivals(folder / "arrivals", 2, create=True)
    both = [Pacer(None, link_s, Arrivals(folder / "arrivals", 2), rank, devices=(0, 1)) for rank in range(2)]
    for pacer in both:
        pacer.begin()
    return both


def test_a_modelled_transfer_begins_when_the_last_device_has_arrived(tmp_path):
    first, second = two_pacers(tmp_path, link_s=[0.1, 0.1])
    here = first.launch("all_gather", 1)
    time.sleep(0.05)
    there = second.launch("all_gather", 1)
    last = time.perf_counter()
    time.sleep(0.05)  # the real collective ends late: the modelled one began before
    for pacer, number in ((first, here), (second, there)):
        pacer.before_wait(number)
        pacer.after_wait(number)
        assert 0.099 < time.perf_counter() - last < 0.14
    # a message travels while its receiver is busy
    sent = time.perf_counter()
    assert 0.1 <= through(first, "send", sent) < 0.14
    time.sleep(0.05)
    assert 0.15 <= through(second, "receive", sent) < 0.19


def test_waits_are_split_from_transfers(tmp_path):
    """A device waits until the last one has launched a collective, a receiver until its message is sent."""
    first, second = two_pacers(tmp_path)
    for early, late, kinds in ((first, second, ("all_reduce", "all_reduce")), (second, first, ("receive", "send"))):
        early.reset()
        late.reset()
        here = early.launch(kinds[0], 1)
        early.before_wait(here)
        time.sleep(0.05)
        there = late.launch(kinds[1], 1)
        launched = late.launched[there][1]
        late.before_wait(there)
        time.sleep(0.01)
        for pacer, number in ((early, here), (late, there)):
            pacer.after_wait(number)
        assert [what for what, *_ in early.events] == ["compute", "compute", "wait", kinds[0]]
        assert [what for what, *_ in late.events] == ["compute", "compute", kinds[1]]
        (_, since, waited), (_, moved, done) = early.events[2:]
        assert waited == moved == launched < done
        sums = seconds_of(early.events)
        assert (sums["wait_s"], sums["comm_s"]) == pytest.approx((waited - since, done - moved))


def test_a_timeline_begins_at_the_first_start():
    first, second = [("compute", 3.0, 5.0), ("wait", 5.0, 6.0)], [("compute", 2.0, 6.0)]
    rows = timeline_rows([first, second], time_scale=2.0)
    assert rows[1] == {"rank": 0, "what": "wait", "start_s": 1.5, "stop_s": 2.0}


def test_bench_row_over_loopback(cluster, float32_folder):
    """A row of a model on disk: its single-device reference, prediction, counts and self-check."""
    cells = grid(float32_folder, ["single", "tp", "pp"], [100.0], 3, seq_len=16, repeats=3)
    frame = measure_grid(Bench(cluster, time_scale=1.0), cells)
    row = frame.set_index("method").loc["tp"]
    assert (row["all_reduce_count"], row["num_devices"], row["link"]) == (10, 3, "modelled")
    assert 0 < row["max_abs_error"] < 1e-4
    assert row["latency_s"] >= row["comm_s"] > 0
    # 10 all_reduces of [16, 48] at 100 Mbps, four ring steps each
    assert row["latency_s"] >= 10 * (4 * 2e-4 + 8 * 2 * 2 * 16 * 48 * 4 / 3 / (0.94 * 100e6))
    assert row["latency_s"] == pytest.approx(row["compute_s"] + row["comm_s"] + row["wait_s"])
    assert row["over_limit"] == pytest.approx(row["latency_s"] / row["limit_s"])
    single = frame.set_index("method").loc["single"]
    assert row["limit_s"] == pytest.approx(single["predicted_s"] / 3)
    assert 0 < row["relative_error"] < 1e-5 and row["weights_bytes"] < single["weights_bytes"]
    assert row["peak_rss_bytes"] > 0 and abs(row["pacing_error"]) < 0.5
    timeline = timelines(frame)
    events = timeline[(timeline["method"] == "tp") & (timeline["rank"] == 2)]
    assert (events["what"] == "all_reduce").sum() == 10 and (events["stop_s"] >= events["start_s"]).all()
    assert events["stop_s"].max() == pytest.approx(row["latency_s"], rel=0.3)  # the median of three is one of them
    pipeline = timeline[(timeline["method"] == "pp")].groupby("rank")["what"].agg(list)
    assert "send" in pipeline[0] and "receive" in pipeline[1] and "send" in pipeline[1]


def test_bench_on_other_wires(cluster, float32_folder):
    cells = grid(float32_folder, ["single", "tp", "ulysses"], [100.0], 2, "int8", seq_len=16, repeats=1)
    frame = measure_grid(Bench(cluster, time_scale=1.0), cells)
    assert frame["wire"].tolist() == ["float32", "int8", "int8"]
    rounded = frame[frame["wire"] == "int8"]
    assert (rounded["relative_error"] > 1e-4).all() and (rounded["relative_error"] < 0.2).all()
    plain = frame[frame["wire"] == "float32"]
    assert (plain["max_abs_error"] < 1e-4).all()
    assert rounded["reduce_scatter_count"].tolist() == [10, 0]


def test_a_host_that_cannot_carry_the_links_is_given_more_time(cluster, monkeypatch):
    """Also if only a check between two rounds shows it; with a time scale of the user's, the rows are rejected."""
    scales = []

    def check(session, *conditions) -> Check:
        scales.append(session.time_scale)
        return Check(*((50.0, 50.0) if len(scales) == 2 else (99.0, 99.0)), pacing_error=0.0)

    monkeypatch.setattr(bench_module, "check_cluster", check)
    conditions = dict(bandwidth_mbps=100.0, num_devices=2, scale=1.0, sends=True, num_trials=1, repeats=2)
    trial = dict(measure=lambda number, is_last: cluster.time_scale, late=lambda result: 0.0)
    found, scale, check_of_all = Bench(cluster).in_turn(**conditions, **trial)
    assert [results for results, _ in found] == [[1.5, 1.5]] and scale == 1.5
    assert scales == [1.0, 1.0, 1.5, 1.5, 1.5] and check_of_all.link_min_mbps == 99
    scales.clear()
    found, scale, check_of_all = Bench(cluster, time_scale=1.0).in_turn(**conditions, **trial)
    assert [results for results, _ in found] == [[1.0, 1.0]] and check_of_all.link_min_mbps == 50


def test_an_interrupted_grid_goes_on(cluster, float32_folder, tmp_path, monkeypatch):
    """Rows that were measured together before an interruption are kept; the next call measures the rest."""
    cells = grid(float32_folder, ["tp", "sp"], [100.0, 50.0], 2, seq_len=16, repeats=2)
    bench, path, measured = Bench(cluster, time_scale=1.0), tmp_path / "rows.json", []
    real = bench.measure

    def measure(group):
        if group[0].bandwidth_mbps == 50 and len(measured) == 1:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append([cell.method for cell in group])
        return real(group)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        measure_grid(bench, cells, path)
    assert len(json.loads(path.read_text())) == 2
    frame = measure_grid(bench, cells, path)
    assert measured == [["tp", "sp"], "interrupted", ["tp", "sp"]]
    assert frame[["method", "bandwidth_mbps"]].values.tolist() == [[c.method, c.bandwidth_mbps] for c in cells]
    assert all(len(json.loads(samples)) == 2 for samples in frame["samples_s"])
    path.write_text("{")
    with pytest.raises(ValueError, match="not a bench's row file"):
        measure_grid(bench, cells, path)


def test_bench_names_what_makes_a_row_invalid():
    good = dict(bandwidth_mbps=100, link_min_mbps=95.0, link_max_mbps=96.0, pacing_error=0.001, pacing_overrun=0.0)
    good |= dict(max_abs_error=1e-6, relative_error=1e-7, host_steal=0.0, wire="float32", packet_error_ms=0.1)
    assert why_invalid(good) == ""
    assert why_invalid(good | dict(link_min_mbps=float("nan"), link_max_mbps=float("nan"))) == ""
    for fields, words in [
        (dict(link_min_mbps=80.0), "carried 80 of 100 Mbps"),
        (dict(link_max_mbps=100.5), "carried 100.5 Mbps, more than"),
        (dict(pacing_error=0.05), "paced 5.0% too slow"),
        (dict(packet_error_ms=-0.8), "-0.80 ms more than the links' delay"),
        (dict(pacing_overrun=0.5), "late by 50.0%"),
        (dict(host_steal=0.4), "took 40%"),
        (dict(max_abs_error=1.0), "differs"),
        (dict(max_abs_error=float("nan")), "differs"),
        (dict(wire="int8", max_abs_error=1.0, relative_error=0.5), "differs"),
        (dict(wire="bfloat16", relative_error=0.05), "differs"),
    ]:
        assert words in why_invalid(good | fields), fields
    assert why_invalid(good | dict(wire="int8", max_abs_error=0.5, relative_error=0.03)) == ""


def test_checks_before_and_after_are_both_recorded():
    before, after = Check(95.0, 96.0, 0.001), Check(94.0, 95.5, 0.003)
    assert before.joined(after) == Check(94.0, 96.0, 0.003)


@pytest.mark.parametrize(
    "total_bps, num_devices, scale",
    [(0.0, 1, 1.0), (4 * 125e6, 4, 2.0), (2 * 500e6, 2, 1.0), (4 * 2e9, 4, 8.0), (8 * 1e9, 8, 8.0), (0.0, 3, 2.0)],
)
def test_time_scale_of_two_cores(total_bps, num_devices, scale):
    assert first_time_scale(total_bps, num_devices, num_cores=2) == scale


@pytest.mark.parametrize("num_devices", [2, 3, 4, 5, 8])
def test_every_link_is_checked_in_both_directions_and_never_at_once(num_devices):
    rounds = link_rounds(num_devices)
    for transfers in rounds:
        busy = [device for transfer in transfers for device in transfer]
        assert len(busy) == len(set(busy))
    assert {a for part in rounds for a, _ in part} == {b for part in rounds for _, b in part} == set(range(num_devices))


@pytest.mark.parametrize("method", ["tp", "sp"])
def test_a_device_needs_little_more_than_its_weights(cluster, tmp_path, method):
    """Peak resident memory of loading and running a model of 80 MB; 8 MiB for messages, activations, library code."""
    config = BertConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=4000)
    config.intermediate_size = 2048
    BertModel(config).save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.zeros(1, 32, dtype=torch.long)}, tmp_path / "inputs.safetensors")
    results = cluster.run(
        "run_plan",
        checkpoint=str(tmp_path / "model"),
        plan=published_plan(method, config, [1.0] * 4).to_dict(),
        inputs=str(tmp_path / "inputs.safetensors"),
        repeats=1,
    )
    for result in results:
        assert result["weights_bytes"] > 16 * 2**20
        assert 0.9 * result["weights_bytes"] < result["peak_rss_bytes"] < 1.25 * result["weights_bytes"] + 8 * 2**20


@pytest.mark.parametrize(
    "make, fields, words",
    [
        (Cell, dict(method="magic"), "method 'magic' is unknown"),
        (Cell, dict(method="tp", repeats=0), "measure at least once"),
        (Cell, dict(method="tp", bandwidth_mbps=0), "bandwidth_mbps=0 must be above 0"),
        (Cell, dict(method="tp", wire="float8"), "wire 'float8' is unknown"),
        (Cell, dict(method="dtensor", wire="int8"), "dtensor cannot send int8"),
        (EmulatedCluster, dict(num_devices=2, device=["rpi4b"]), "lists 1 devices and num_devices=2"),
        (EmulatedCluster, dict(num_devices=2, transport="pigeon"), "transport='pigeon'"),
        (EmulatedCluster, dict(num_devices=2, delay_s=0.01, transport="loopback"), "are set on shaped links"),
        (DeviceSpec, dict(preset="toaster"), "device 'toaster' is unknown"),
        (DeviceSpec, dict(speed=0.0), "speed=0.0 must be above 0"),
        (DeviceSpec, dict(link_share=float("inf")), "link_share=inf"),
        (DeviceSpec, dict(memory_bytes=0), "memory_bytes=0"),
    ],
)
def test_bad_arguments_are_refused(make, fields, words):
    with pytest.raises(ValueError, match=words):
        make(**({"model": "bert-base"} if make is Cell else {}) | fields)


def test_presets_are_the_papers_devices():
    """CoFormer 2025, Table VII; the Jetsons' rate is a share of their peak, and says so."""
    config = preset_config("bert-base")
    assert preset_profile("rpi4b", config).flops_per_s == pytest.approx(14.2e9, rel=0.01)
    assert jetson_share() == pytest.approx(35.1 / 0.12348 / 665.6, rel=0.001)
    for name, gib, peak, power_w in [("nano", 4, 235.8, 10), ("tx2", 8, 665.6, 15), ("orin-nano", 4, 640.0, 10)]:
        device = DEVICES[f"jetson-{name}"]
        assert (device.memory_bytes, device.peak_flops_per_s, device.power_w) == (gib * 2**30, peak * 1e9, power_w)
        profile = preset_profile(f"jetson-{name}", config)
        assert profile.flops_per_s == pytest.approx(0.4274 * peak * 1e9, rel=0.001)
        assert "modelled, not measured" in profile.source
        assert profile.memory_bytes_per_s == device.memory_bytes_per_s


UNEQUAL = ["rpi4b", DeviceSpec(speed=2.0, memory_bytes=2**29, name="desk"), DeviceSpec("jetson-tx2", link_share=0.5)]


def test_unequal_devices_have_their_own_profiles():
    config = preset_config("bert-base")
    cluster = EmulatedCluster(3, UNEQUAL, transport="loopback")
    pi, desk, jetson = cluster.profile(config).devices
    assert replace(pi, efficiency=()) == preset_profile("rpi4b", config) and jetson.name == "Jetson TX2 on a 0.5x link"
    assert (desk.name, desk.memory_bytes) == ("desk", 2**29)
    assert desk.flops_per_s == 2 * pi.flops_per_s
    assert desk.compute_s(1.0, "*", 48e6) == pi.compute_s(1.0, "*", 24e6) == 0.005  # reading weights, too
    assert cluster.profile(config).link.shares == (1.0, 1.0, 0.5)
    assert EmulatedCluster(2, transport="loopback").profile(config).link.shares == ()
    assert cluster.profile_name == (
        "Raspberry Pi 4B, Raspberry Pi 4B at 2x speed with 512 MiB, Jetson TX2 on a 0.5x link (emulated)"
    )
    assert EmulatedCluster(2, transport="loopback").profile_name == "Raspberry Pi 4B (emulated)"
    pis = EmulatedCluster(3, ["rpi4b", "rpi4b", "jetson-tx2"], transport="loopback")
    assert pis.profile_name == "2 x Raspberry Pi 4B, Jetson TX2 (emulated)"


def run_plan(session, case, method: str = "tp", **job) -> list[dict]:
    """Each device's result of a request to `case` under `method`."""
    plan = published_plan(method, case.config, [1.0] * session.num_devices).to_dict()
    return session.run("run_plan", checkpoint=case.checkpoint, plan=plan, **{"inputs": case.inputs} | job)


def carried_mbps(session, num_bytes: int) -> dict[tuple[int, int], float]:
    """(from, to) -> the rate of `num_bytes` over each link, on the host's clock."""
    check = dict(num_devices=session.num_devices, link_bytes=num_bytes, segment_s=0.01, num_segments=1)
    seconds = transfer_seconds(session.run("self_check", **check))
    return {pair: 8 * num_bytes / s / 1e6 for pair, s in seconds.items()}


@needs_namespaces
def test_unequal_devices_are_paced_and_shaped_each_as_it_is(cases):
    """A slow link is a slow link; the same layers take a device of twice the speed half the time; a death is named."""
    case = cases["original"]
    devices = ["rpi4b", DeviceSpec(speed=2.0), DeviceSpec(link_share=0.5, name="shed")]
    with EmulatedCluster(3, devices, 100e6, "namespaces") as session:
        for mbps in (100, 50):
            session.set_link(mbps * 1e6)
            carried = carried_mbps(session, 1_000_000)
            assert set(carried) == {(0, 1), (1, 0), (0, 2), (2, 0)}
            for pair, found in carried.items():
                limit = mbps / 2 if 2 in pair else mbps
                assert 0.6 * limit < found <= limit, pair
        profile = session.profile(case.config)
        slowed = [dict(asdict(device), flops_per_s=device.flops_per_s / 1000) for device in profile.devices]
        exact = dict(reference=case.reference, dtype="float64")
        results = run_plan(session, case, per_rank=[{"device": device} for device in slowed], repeats=2, **exact)
        first, fast, last = (seconds_of(r["samples"][1]["events"])["compute_s"] for r in results)
        # the first has 24 of 70 FFN columns, the others 23
        assert first == pytest.approx(2 * fast, rel=0.03) and first == pytest.approx(last, rel=0.03)
        assert all(result["max_abs_error"] < 1e-12 for result in results)
        os.kill(session.pids[2], signal.SIGKILL)
        with pytest.raises(DeviceLost, match=r"device 2 of 3 \(shed\) was killed by SIGKILL"):
            session.run("self_check", num_devices=3, link_bytes=0, segment_s=0.01, num_segments=1)


def test_a_failing_job_names_the_device_and_the_error(cases):
    with EmulatedCluster(2, transport="loopback") as session:
        with pytest.raises(DeviceError, match="device 0 of 2 .* failed in the job run_plan: .*missing"):
            run_plan(session, cases["original"], inputs="/missing.safetensors", repeats=1)


@pytest.mark.parametrize(
    "how, words", [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "has been silent for 10 s")]
)
@pytest.mark.slow
def test_a_lost_device_ends_the_run_and_is_named(cases, how, words):
    """Killed or frozen in the middle of inference: within 30 s one sentence names it, and nothing is left running."""
    case = cases["original"]
    with EmulatedCluster(3, transport="loopback") as session:
        pids = session.pids
        timer = threading.Timer(2.0, os.kill, (pids[1], how))
        timer.start()
        start = time.monotonic()
        slow = {"name": "slow", "memory_bytes": 1, "flops_per_s": 1e6, "source": "test"}
        with pytest.raises(DeviceLost, match=f"device 1 of 3 .*{words} during the job run_plan") as lost:
            run_plan(session, case, device=slow, repeats=50)
        assert lost.value.rank == 1
        assert time.monotonic() - start < 30
        timer.join()
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)


def test_what_a_worker_listens_at_is_the_clusters_address():
    """Its store, too, which torch alone would open at all addresses of the host."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "import json, psutil\nfrom detransformer.cluster.worker import join\n"
        "job = {'interface': 'lo', 'threads': 1, 'message_s': 60.0}\n"
        f"state = join(job, 0, {{'devices': [0], 'group': 1, 'store': '127.0.0.1:{port}'}})\n"
        "found = psutil.Process().net_connections('tcp')\n"
        "print(json.dumps([list(c.laddr) for c in found if c.status == psutil.CONN_LISTEN]))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert ["127.0.0.1", port] in found and {address for address, _ in found} == {"127.0.0.1"}


def test_operations_profile():
    """Whole layers and shares of them, all of which a device's profile then knows."""
    frame = profile_operations(preset_config("bert-base", 4), num_devices=(1, 4), num_chunks=(1, 4), repeats=2)
    profile = host_profile("here", frame)
    assert profile.flops_per_s == pytest.approx(1e9 * frame["gflops_per_s"][frame["efficiency"] == 1].iloc[0])
    for row in frame.itertuples():
        known = profile.efficiency_of(row.strategy, row.share, row.tokens, row.num_chunks)
        assert known == pytest.approx(min(1.0, row.efficiency))
    known = {name for name, strategy in STRATEGIES.items() if strategy.layer_kind in ("original", "decoupled")}
    assert set(frame["strategy"]) == known
    assert (frame["latency_s"] > 0).all()
    assert set(frame["num_chunks"]) == {1, 4}
    unchunked = frame[frame["num_chunks"] == 1]
    whole = unchunked[unchunked["strategy"] == "replicate"]
    assert whole["efficiency"].tolist() == [1.0]
    quarter = unchunked[(unchunked["strategy"] == "tensor") & (unchunked["num_devices"] == 4)]["gflops"].iloc[0]
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
    remove_stale_namespaces()
    assert not Path("/var/run/netns", name).exists()


@needs_namespaces
@pytest.mark.slow
def test_collectives_of_shaped_links_are_profiled():
    with EmulatedCluster(2, bandwidth_bps=100e6, transport="namespaces") as session:
        assert session.link == "line-rate"
        link, rows = profile_link(session, repeats=2)
    assert {"all_reduce", "all_gather", "send"} <= set(rows["kind"])
    assert all(0.3 < share <= 1 for share in link.efficiency.values())


@needs_namespaces
@pytest.mark.slow
def test_packets_of_a_delayed_link_are_late_and_its_rate_is_kept():
    """One way, any two devices; a changed delay counts from then on, also at a time scale."""
    with EmulatedCluster(2, bandwidth_bps=50e6, delay_s=0.02, transport="namespaces") as session:
        assert 0.02 <= session.packet_s() < 0.06
        results = session.run("time_collective", kind="send", num_floats=1, num_devices=2, repeats=3)
        assert min(results[1]["seconds"]) >= 0.02
        waited = [
            profile.collective_s("send", 4, 2)
            for profile in (session.profile(preset_config("bert-base")).link, LinkProfile(50e6))
        ]
        assert waited[0] - waited[1] == pytest.approx(2 * 0.02)
        session.delay_s = 0.01
        session.set_link(50e6, time_scale=2.0)
        assert 0.01 <= session.packet_s() < 0.03
        assert all(0.6 * 25 < found <= 25 for found in carried_mbps(session, 3_000_000).values())


@needs_namespaces
@pytest.mark.slow
def test_a_shared_medium_carries_one_message_at_a_time_and_is_priced_so(cases, tmp_path):
    """All that four devices send together has the rate: the kernel's counters, and what is priced, say how long."""
    case, rate_bps = cases["original"], 20e6
    with EmulatedCluster(4, bandwidth_bps=rate_bps, shared=True, transport="namespaces") as session:
        profile = session.profile(case.config)
        results = run_plan(session, case, inputs=case.request(tmp_path, 4, 64)[0], repeats=2)
        sent = sum(result["samples"][1]["link_bytes"] for result in results)
        counted = sum(sum(result["bytes"].values()) for result in results)
        assert counted < sent < 1.3 * counted  # headers and acknowledgements
        assert max(result["samples"][1]["latency_s"] for result in results) >= 8 * counted / rate_bps
    switched = replace(profile, link=replace(profile.link, shared=False))
    plan = published_plan("tp", case.config, [1.0] * 4)
    shared, own = (predict(case.config, plan, where, 64, 4) for where in (profile, switched))
    num_bytes, rate = sum(own.bytes.values()), profile.link.efficiency["*"] * rate_bps
    assert shared.bytes == own.bytes and counted == 4 * num_bytes
    assert shared.latency_s - own.latency_s == pytest.approx(8 * 3 * num_bytes / rate)


@needs_namespaces
def test_what_is_counted_is_what_the_kernel_sends(cases):
    """Bytes counted by the ring formula against the interface's counter: headers and acknowledgements add a little."""
    case = cases["original"]
    with EmulatedCluster(3, bandwidth_bps=500e6, transport="namespaces") as session:
        results = run_plan(session, case, "sp", reference=case.reference, dtype="float64", repeats=3)
    for result in results:
        assert result["max_abs_error"] < 1e-12
        counted, sent = sum(result["bytes"].values()), result["samples"][-1]["link_bytes"]
        assert counted < sent < 1.6 * counted
