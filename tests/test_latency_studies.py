"""What notebooks 04 to 06 ask for: the rows of the paper's tables, profiles on any transport, placements."""

import pandas as pd
import pytest
from latency_studies import (
    CORES,
    collective_counts,
    gains_by_core,
    latency_cells,
    measure_latency,
    measured_efficiency,
    measured_link,
    overlap_rows,
    placement_table,
    save_profiles,
)

from detransformer.cluster.cells import Cell
from detransformer.cluster.devices import cluster_profile, device_specs
from detransformer.cluster.network import can_emulate
from detransformer.models.configuration import preset_config
from detransformer.parallel.methods import METHODS
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile


def test_cells_make_every_table_and_figure():
    wires = dict(wire_formats=("bfloat16", "int8"), wire_bandwidths_mbps=(500, 125))
    fewer = dict(fewer_original_layers=(1, 2, 3), table_ii_methods=("dp", "pp"))
    common = dict(methods=["tp", "sp", "bp+auto"], bandwidths_mbps=[1000, 125], scaling_devices=(2, 3), **wires)
    cells = latency_cells(["bert-base"], repeats=3, **fewer, **common)
    cells += latency_cells(["bert-large"], repeats=1, **common)
    assert len(cells) == len(set(cells))
    found = {(c.model, c.method, c.num_devices, c.bandwidth_mbps, c.num_original_layers) for c in cells}
    for model in ("bert-base", "bert-large"):
        assert (model, "single", 4, 500, 4) in found
        for bandwidth in (1000, 125):  # Table IV, Fig. 7a,b
            assert {(model, method, 4, bandwidth, 4) for method in ("tp", "sp", "bp+auto")} <= found
        for count in (2, 3):  # Figs. 2b, 7c,d
            assert {(model, method, count, 500, 4) for method in ("tp", "sp", "bp+auto")} <= found
    assert {("bert-base", "bp+auto", 4, 125, layers) for layers in (1, 2, 3)} <= found  # Fig. 8
    assert {("bert-base", method, 4, 500, 4) for method in ("dp", "pp")} <= found  # Table II
    assert {c.repeats for c in cells if c.model == "bert-large"} == {1}
    assert {(c.method, c.wire) for c in cells if c.wire != "float32"} == {
        (method, wire) for method in ("tp", "ulysses", "bp+auto") for wire in ("bfloat16", "int8")
    }


def test_all_methods_and_eight_devices():
    cells = latency_cells(["bert-base"], ["all"], [125], 1, scaling_devices=(2, 8))
    assert {c.method for c in cells if c.num_devices == 4 and c.bandwidth_mbps == 125} >= set(METHODS) - {"single"}
    assert {c.num_divisions for c in cells if c.num_devices == 8} == {8}
    assert {c.num_divisions for c in cells if c.num_devices != 8} == {4}


def test_gains_are_priced_by_each_core(tmp_path):
    rows = gains_by_core(tmp_path, "bert-base", [125], num_original_layers=[4]).set_index("core")
    assert list(rows.index) == [*CORES, "none"], "this run has not timed its own"
    assert (rows["gain"] == rows["unmodified_s"] / rows["decoupled_s"]).all()
    specs, config = device_specs(4, "rpi4b"), preset_config("bert-base", 4, 4)
    roofline = place_freely(config, cluster_profile(specs, config, 125e6, pace="roofline")).chosen.latency_s
    assert rows.loc["none", "decoupled_s"] == roofline
    assert rows["gain"].nunique() == 3, "the cores differ"


def test_shares_are_paced_as_executors_lay_weights_out(tmp_path):
    """Notebook 04 measures two layouts; executors run the packed one."""
    columns = ["model", "weights", "strategy", "share", "tokens", "num_chunks", "efficiency"]
    rows = [["bert-base", layout, "block", 0.25, 128, 1, e] for layout, e in (("plain", 0.9), ("packed", 0.8))]
    (tmp_path / "tables").mkdir()
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "tables" / "profile.csv", index=False)
    (row,) = measured_efficiency(tmp_path)["bert-base"]
    assert row == ("block", 0.25, 128, 1, 0.8)
    with pytest.raises(ValueError, match="2 rows for \\['block', 0.25, 128, 1\\]; keep one"):
        DeviceProfile("pi", 1, 1e9, "", efficiency=(row, row[:-1] + (0.9,)))


@pytest.mark.slow
def test_measuring_over_modelled_links(float32_folder, tmp_path):
    """Rows in the cells' order, from one cluster of four; the timeline keeps plain rows at the lowest bandwidth."""
    wanted = [("tp", 4, 2.0), ("sp", 2, 1.0), ("tp", 4, 1.0)]  # slow: a small model must not be late
    cells = [Cell(float32_folder, *row, seq_len=8, repeats=1) for row in wanted]
    rows, timeline = measure_latency(tmp_path, cells, transport="loopback")
    assert list(zip(rows["method"], rows["num_devices"], rows["bandwidth_mbps"], strict=True)) == wanted
    assert set(zip(timeline["method"], timeline["bandwidth_mbps"], strict=True)) == {("tp", 1.0)}
    assert sorted(timeline["rank"].unique()) == [0, 1, 2, 3]
    assert not (tmp_path / "latency_rows.json").exists()


def test_profiles_where_links_are_modelled(cluster, tmp_path):
    """Without namespaces there is nothing to measure: the assumed figures are written, and named so."""
    rows = save_profiles(tmp_path, cluster, ["bert-base"], 4, 4)
    assert set(rows["link"]) == {"modelled"} and rows["latency_s"].isna().all()
    profile = ClusterProfile.load(tmp_path / "bert-base.json")
    assert len(profile.devices) == 4 and profile.link.source.startswith("assumed")
    assert measured_link(tmp_path, "bert-base") == profile.link
    assert measured_link(tmp_path, "bert-large") is None


def test_a_measured_link_changes_the_choice(tmp_path):
    """A link on which each all_gather step costs 50 ms leaves BP+SP, which makes 16 of them, behind."""
    plain = placement_table(tmp_path, ["bert-base"], [125.0])
    assert plain[plain["chosen"]]["method"].tolist() == ["bp+sp"]
    link = LinkProfile(125e6, {"all_gather": 0.05, "*": 1e-4}, {"*": 0.94}, "test")
    devices = ClusterProfile((), link)
    devices.save(tmp_path / "bert-base.json")
    slow = placement_table(tmp_path, ["bert-base"], [125.0])
    assert slow[slow["chosen"]]["method"].tolist() != ["bp+sp"]


def test_placement_under_a_budget_names_what_does_not_fit(tmp_path):
    rows = placement_table(tmp_path, ["bert-large"], [10], memory_budget_mib=500).set_index("method")
    assert rows.loc["bp+tp", "chosen"] and not rows.loc["bp+allgather", "fits"]
    assert "more than its budget of 500 MiB" in rows.loc["bp+allgather", "reason"]


def test_counts_of_the_paper():
    counts = collective_counts("bert-base", 4, 4).set_index("method")
    assert counts.loc["tp", "all_reduce"] == 24
    assert (counts.loc["bp+tp", "all_gather"], counts.loc["bp+tp", "all_reduce"]) == (4, 8)


@pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1])
@pytest.mark.slow
def test_busy_devices_are_compared_with_sleeping_ones(float32_folder, tmp_path):
    """The same requests, in turn, on devices that keep to a core each; what a busy one computes has no effect."""
    (row,) = overlap_rows(tmp_path, float32_folder, ["tp"], 100.0, repeats=2).to_dict("records")
    assert (row["method"], row["num_devices"]) == ("tp", 2)
    assert row["busy_s"] == pytest.approx((1 + row["cost"]) * row["asleep_s"])
    assert row["low"] <= row["cost"] <= row["high"]
