"""Tables II, III and IV and those beyond the paper's, from rows whose every value the tests can compute."""

import numpy as np
import pandas as pd
import pytest

from detransformer.parallel.methods import METHODS
from detransformer.record.published import published
from detransformer.tables import peers
from detransformer.tables.latency import (
    METHOD_NAMES,
    comparable_rows,
    select,
    single_latency,
    speedup,
    table_ii,
    table_iv,
    valid_rows,
)
from detransformer.tables.style import COLOURS, MARKERS
from table_frames import MEGABITS, WAIT_S, communication_s, latency_rows, row

CELL = ["link", "variant", "model", "bandwidth_mbps", "baseline"]


def latency_s(method: str, bandwidth_mbps: float, **where) -> float:
    """Of BERT-Base on 4 devices, by the rule of `table_frames`."""
    return 1.05 * 1.57 / 4 + communication_s(method, bandwidth_mbps, **where) + WAIT_S


def test_every_method_has_a_name_and_a_look():
    assert set(METHODS) == set(METHOD_NAMES) == set(COLOURS) == set(MARKERS)
    assert len({(COLOURS[method], MARKERS[method]) for method in METHODS}) == len(METHODS), "two methods look alike"


# --- which rows count --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_papers", "is_comparable"),
    [
        ({}, True, True),
        ({"valid": False}, False, False),
        ({"seq_len": 384}, False, False),
        ({"batch_size": 4}, False, False),
        ({"attention_width": "narrow"}, False, False),  # of bp+auto, and not called so
        ({"wire": "int8"}, False, True),
    ],
)
def test_the_papers_setting_and_what_compares_with_it(change, is_papers, is_comparable):
    rows = pd.DataFrame([row("bert-base", "bp+auto") | change])
    assert (len(valid_rows(rows)), len(comparable_rows(rows))) == (is_papers, is_comparable)


def test_the_narrow_sub_block_counts_by_its_own_name():
    rows = pd.DataFrame([row("bert-base", "bp+narrow")])
    assert rows["attention_width"].item() == "narrow" and len(valid_rows(rows)) == 1


def test_more_devices_than_divisions_run_a_model_of_as_many():
    rows = pd.DataFrame([row("bert-base", "bp+auto", num_devices=8), row("bert-base", "bp+auto")])
    assert select(rows, "bert-base", "bp+auto", num_devices=8)["num_divisions"].tolist() == [8]


# --- Table IV ----------------------------------------------------------------------------------------------------


def test_table_iv_divides_the_right_rows():
    table = table_iv(latency_rows(), published("table_iv")).set_index(CELL)
    assert len(table) == 20 * (3 + 2), "the narrow sub-block was measured over the first link only"
    assert (table["status"] == "measured").all()
    paper = table.loc[("line-rate", "paper", "bert-base", 125, "tp")]
    assert paper["obtained"] == pytest.approx(latency_s("tp", 125) / latency_s("bp+paper", 125))
    assert paper["published"] == 2.81 and paper["ratio"] == pytest.approx(paper["obtained"] / 2.81)
    ours = table.loc[("modelled", "ours", "bert-base", 250, "sp")]
    assert ours["obtained"] == pytest.approx(
        latency_s("sp", 250, link="modelled") / latency_s("bp+auto", 250, link="modelled")
    )
    narrow = table.loc[("line-rate", "narrow", "bert-base", 125, "sp"), "obtained"]
    assert narrow == pytest.approx(latency_s("sp", 125) / latency_s("bp+narrow", 125))


def test_table_iv_says_not_run_for_absent_and_invalid_cells():
    latency = latency_rows(links=("line-rate",))
    latency = latency[latency["bandwidth_mbps"] != 750]
    latency.loc[(latency["method"] == "tp") & (latency["bandwidth_mbps"] == 125), "valid"] = False
    table = table_iv(latency, published("table_iv"))
    missing = table[(table["status"] == "not run") & (table["variant"] == "paper")]
    assert set(zip(missing["bandwidth_mbps"], missing["baseline"], strict=True)) == {
        (750, "tp"),
        (750, "sp"),
        (125, "tp"),
    }
    assert missing["obtained"].isna().all()


def test_table_iv_of_no_rows_at_all_is_twenty_cells_not_run():
    table = table_iv(latency_rows().head(0), published("table_iv"))
    assert len(table) == 20 and (table["status"] == "not run").all()


# --- Tables II and III -------------------------------------------------------------------------------------------


def test_table_ii_compares_with_one_device():
    table = table_ii(latency_rows(), published("table_ii")).set_index("approach")
    assert list(table.index) == ["Single", "DP", "PP", "TP", "SP", "BP", "BP (ours)"]
    assert table.loc["TP", "latency_reduction_obtained"] == "yes"
    assert table.loc["SP", "memory_reduction_obtained"] == "no"
    assert table.loc["BP", "memory_reduction_obtained"] == "yes"
    assert table.loc["DP", "throughput_increase_obtained"] == "yes"
    assert table.loc["PP", "throughput_increase_published"] == "yes"
    assert table.loc["BP", "latency_s"] == pytest.approx(latency_s("bp+paper", 500))
    assert table.loc["BP (ours)", "latency_s"] == pytest.approx(latency_s("bp+auto", 500))
    assert table.loc["Single", "weights_mib"] == pytest.approx(4e8 / 2**20)
    assert table.loc["TP", "peak_rss_mib"] == pytest.approx(1.32e8 / 2**20)
    assert table["link"].eq("line-rate").all() and table["bandwidth_mbps"].dropna().eq(500).all()


def test_table_ii_takes_the_nearest_bandwidth_and_says_not_run():
    latency = latency_rows(links=("line-rate",))
    latency = latency[(latency["method"] == "single") | (latency["bandwidth_mbps"] == 125)]
    table = table_ii(latency, published("table_ii")).set_index("approach")
    assert table.loc["TP", "bandwidth_mbps"] == 125
    assert table.loc["DP", "latency_reduction_obtained"] == "not run"
    assert table.loc["Single", "latency_s"] == pytest.approx(1.57)


# --- beyond the paper --------------------------------------------------------------------------------------------


def test_methods_stand_side_by_side_fastest_first():
    table = peers.methods_table(latency_rows())
    here = table[(table["link"] == "line-rate") & (table["model"] == "bert-base") & (table["bandwidth_mbps"] == 125)]
    assert here["latency_s"].is_monotonic_increasing
    assert not table.duplicated(["link", "model", "bandwidth_mbps", "name"]).any(), "no row of other devices or layers"
    assert set(here["method"]) == {"single", *MEGABITS} and len(here) == 1 + len(MEGABITS) + 6
    assert list(dict.fromkeys(table["link"])) == ["line-rate", "modelled"], "the clean link first"
    found = here.set_index("name")
    assert found.loc["BP+Auto, int8", "latency_s"] == pytest.approx(latency_s("bp+auto", 125, wire="int8"))
    assert found.loc["BP+Auto, int8", "relative_error"] == 1.2e-2
    assert found.loc["TP", "speedup"] == pytest.approx(1.57 / latency_s("tp", 125))
    assert found.loc["TP", "over_limit"] == pytest.approx(4 * latency_s("tp", 125) / 1.57)
    assert found.loc["Single", "over_limit"] == pytest.approx(4), "the limit is that of four devices"
    assert found.loc["TP", "collectives"] == 24 and found.loc["TP", "sent_mib"] == pytest.approx(24e6 / 2**20)
    assert found.loc["Ulysses", "weights_mib"] > 3 * found.loc["BP+Auto", "weights_mib"]


def test_wire_table_shows_gain_and_error_for_baselines_too():
    table = peers.wire_table(latency_rows()).set_index(["model", "method", "wire"])
    assert set(table.index.get_level_values("method")) == {"tp", "ulysses", "bp+auto"}
    assert (table["bandwidth_mbps"] == 125).all(), "only where some message was compressed"
    base = table.loc["bert-base"]
    assert list(base.loc["tp"].index) == ["float32", "bfloat16", "int8"]
    assert base.loc[("tp", "int8"), "over_float32"] == pytest.approx(
        latency_s("tp", 125) / latency_s("tp", 125, wire="int8")
    )
    assert base.loc[("bp+auto", "int8"), "over_tp"] == pytest.approx(
        latency_s("tp", 125) / latency_s("bp+auto", 125, wire="int8")
    )
    assert base.loc[("ulysses", "bfloat16"), "relative_error"] == 4e-3


def test_tables_of_what_was_not_measured_are_empty():
    latency = valid_rows(latency_rows())
    assert not len(peers.wire_table(latency))
    four = latency[latency["num_devices"].isin([1, 4])]
    assert not len(peers.scaling_table(four)), "one count of devices is no scaling"
    assert not len(peers.methods_table(latency[latency["method"] == "single"]))


def test_scaling_goes_from_one_device_to_eight():
    table = peers.scaling_table(latency_rows()).set_index(["link", "model", "method", "num_devices"])
    auto = table.sort_index().loc[("line-rate", "bert-base", "bp+auto")]
    assert list(auto.index) == [1, 2, 3, 4, 8] and list(auto["num_divisions"]) == [4, 4, 4, 4, 8]
    assert auto.loc[1, "speedup"] == 1 and auto.loc[1, "weights_mib"] == pytest.approx(4e8 / 2**20)
    expected = 1.57 / (1.05 * 1.57 / 8 + communication_s("bp+auto", 500) + WAIT_S)
    assert auto.loc[8, "speedup"] == pytest.approx(expected) and auto.loc[8, "efficiency"] == pytest.approx(
        expected / 8
    )


def test_prediction_error_by_link_and_over_all_methods():
    latency = latency_rows()
    latency.loc[(latency["method"] == "sp") & (latency["link"] == "modelled"), "predicted_s"] *= 1.5
    latency.loc[latency["method"] == "galaxy", "valid"] = False
    table = peers.prediction_error(latency).set_index(["link", "method"])
    assert table.loc[("line-rate", "tp"), "median"] == pytest.approx(0.02)
    assert table.loc[("modelled", "sp"), "median"] == pytest.approx(0.53)
    assert (
        table.loc[("modelled", "all"), "max"] == pytest.approx(0.53) and table.loc[("modelled", "all"), "count"] == 70
    )
    assert ("line-rate", "galaxy") not in table.index and "single" not in table.index.get_level_values("method")


def test_efficiency_has_a_row_a_strategy_and_chunks_and_a_column_a_device_count():
    profile = pd.DataFrame(
        [("block", 4, 1, 0.9), ("tensor", 1, 1, 1.0), ("tensor", 4, 1, 0.8), ("tensor", 4, 4, 0.6)],
        columns=["strategy", "num_devices", "num_chunks", "efficiency"],
    ).assign(model="bert-base", weights="packed", tokens=128)
    table = peers.efficiency_table(profile).drop(columns=["model", "weights"]).set_index(["strategy", "num_chunks"])
    assert list(table.index) == [("tensor", 1), ("tensor", 4), ("block", 1)], "in the order of the original layer first"
    assert list(table) == ["1 device", "4 devices"] and table["4 devices"].tolist() == [0.8, 0.6, 0.9]
    assert np.isnan(table.loc[("block", 1), "1 device"])
    both = pd.concat(profile.assign(weights=weights, tokens=128) for weights in ("packed", "plain"))
    longer = profile.assign(weights="packed", tokens=512)
    assert len(peers.efficiency_table(pd.concat([both, longer]))) == 2 * len(table)


def test_the_curves_of_fig_7_are_compared_in_seconds():
    table = peers.fig7_error(latency_rows(links=("line-rate",)), published("fig7")).set_index(["model", "method"])
    row = table.loc[("bert-base", "tp")].query("bandwidth_mbps == 125").iloc[0]
    assert row["published"] == pytest.approx(1.56 * 1.57) and row["obtained"] == pytest.approx(latency_s("tp", 125))
    assert row["error"] == pytest.approx(row["obtained"] / row["published"] - 1)
    papers = table.loc[("bert-base", "bp+paper")].query("bandwidth_mbps == 125").iloc[0]
    assert papers["obtained"] == pytest.approx(latency_s("bp+paper", 125)), "the paper's BP+Auto"


def test_a_speedup_has_an_interval_where_rounds_are_paired():
    rounds = [1 + 0.01 * i for i in range(10)]
    slower = pd.DataFrame([row("bert-base", "tp") | dict(time_scale=4.0, samples_s=str([2 * t for t in rounds]))])
    faster = pd.DataFrame([row("bert-base", "bp+auto") | dict(time_scale=4.0, samples_s=str(rounds))])
    slower["latency_s"], faster["latency_s"] = 2.09, 1.045
    assert speedup(slower, faster) == pytest.approx((2.0, 2.0, 2.0))
    for other in (faster.assign(time_scale=8.0), faster.assign(samples_s=str(rounds[:9])), pd.concat([faster, faster])):
        value, low, high = speedup(slower, other)
        assert value == pytest.approx(2.0) and np.isnan(low) and np.isnan(high)


def test_rows_of_the_measured_pace_go_before_those_of_the_roofline():
    roofline = latency_rows(links=("line-rate",))
    measured = roofline[(roofline["bandwidth_mbps"] == 125) & (roofline["method"] != "single")]
    both = pd.concat([roofline, measured.assign(pace="measured", latency_s=9.0)], ignore_index=True)
    rows = valid_rows(both)
    assert set(rows.loc[rows["bandwidth_mbps"] == 125, "latency_s"]) == {9.0}
    assert 9.0 not in set(rows.loc[rows["bandwidth_mbps"] != 125, "latency_s"])
    assert single_latency(rows, "bert-base") == single_latency(valid_rows(roofline), "bert-base")
