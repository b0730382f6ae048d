"""What notebooks 04 to 06 ask for: the rows of the paper's tables, profiles on any transport, placements."""

import pandas as pd
import pytest

from detransformer.cluster.experiments import (
    collective_counts,
    latency_cells,
    load_link,
    placement_table,
    prediction_error,
    save_profiles,
)
from detransformer.planning.profile import ClusterProfile, LinkProfile


def test_cells_make_every_table_and_figure():
    cells = latency_cells(
        ["bert-base", "bert-large"], ["tp", "sp", "bp+auto"], [1000, 125], {"bert-base": 3, "bert-large": 1}
    )
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


def test_profiles_where_links_are_modelled(cluster, tmp_path):
    """Without namespaces there is nothing to measure: the assumed figures are written, and named so."""
    rows = save_profiles(tmp_path, cluster, ["bert-base"], 4, 4)
    assert set(rows["link"]) == {"modelled"} and rows["latency_s"].isna().all()
    profile = ClusterProfile.load(tmp_path / "bert-base.json")
    assert len(profile.devices) == 4 and profile.link.source.startswith("assumed")
    assert load_link(tmp_path, "bert-base") == profile.link
    assert load_link(tmp_path, "bert-large") is None


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


def test_prediction_error():
    rows = pd.DataFrame({"method": ["tp", "tp", "single"], "predicted_s": [1.1, 0.8, 9], "latency_s": [1.0, 1.0, 1.0]})
    error = prediction_error(rows)
    assert error["method"].tolist() == ["tp"]
    assert error["median"].iloc[0] == pytest.approx(0.15)
    assert error["max"].iloc[0] == pytest.approx(0.2)
