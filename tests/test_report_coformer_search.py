"""Figures and verdicts of notebook 09 from made-up rows: what they show, what they say of lacking or opposite ones."""

import numpy as np
import pandas as pd
import pytest

from decomposition_frames import decomposition_frames, policy_rows, predictor_points, proxy_points, search_history
from detransformer.coformer import studies
from detransformer.record.run import RunFolder
from detransformer.report.coformer_search import decomposition_verdicts, waiting_share
from detransformer.report.figures import draw

FIGURE_NAMES = ("predictor", "proxy", "search", "policies")


def verdicts(**replaced) -> pd.DataFrame:
    made = decomposition_frames() | replaced
    return decomposition_verdicts(made["predictor"], made["proxy"], made["search"], made["policies"])


def said(table: pd.DataFrame, words: str) -> pd.Series:
    (found,) = (row for _, row in table.iterrows() if words in row["claim"])
    return found


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for name, frame in decomposition_frames().items():
        folder.save_table(frame, name)
    return folder


def test_figures_are_drawn_from_saved_tables_alone(run):
    for name in FIGURE_NAMES:
        draw(run, name)
        assert (run.figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_say_what_is_modelled_and_what_is_measured(run):
    titles = [axis.get_title() for axis in draw(run, "predictor").axes]
    assert titles == ["tx2 (modelled)", f"{studies.HOST} (measured)"]
    assert "predicted" in draw(run, "policies").axes[0].get_ylabel()
    assert any("predicted" in axis.get_ylabel() for axis in draw(run, "search").axes)


def test_proxy_panels_carry_the_tables_correlations(run):
    figure, table = draw(run, "proxy"), run.load_table("proxy").set_index(["proxy", "target"])
    titles = {axis.get_xlabel(): axis.get_title() for axis in figure.axes}
    assert f"{table.loc[('log_flops', 'error_alone'), 'pearson']:.2f}" in titles["mean log10 FLOPs"]


def test_search_shows_each_method_and_its_last_evaluation(run):
    axis = draw(run, "search").axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert set(lines) == set(studies.SEARCHES) and lines["bayesian"][-1] == pytest.approx(4.045)
    assert axis.lines[0].get_xdata()[-1] == 8


def test_a_figure_without_rows_names_its_table(run):
    run.save_table(predictor_points().assign(predicted_s=np.nan), "predictor_points")
    with pytest.raises(ValueError, match="predictor_points"):
        draw(run, "predictor")


def test_what_holds():
    table = verdicts()
    assert said(table, "worst modelled device (tx2)")["expected"] == "at most 8.1"
    assert said(table, "worst modelled device (tx2)")["obtained"] == pytest.approx(2)
    assert said(table, "in % of the whole")["expected"] == "at most 6.6"
    assert said(table, "in % of the whole")["judged"] == "holds"
    assert said(table, "10 seeds in which bayesian is")["obtained"] == 1
    assert said(table, "latency of uniform over bayesian")["obtained"] == pytest.approx(1.5)
    assert said(table, "uncalibrated loss with calibrated error, each alone")["judged"] == "holds"
    assert said(table, "spent waiting")["judged"] == "holds"
    assert said(table, "latency a FLOP")["obtained"] == pytest.approx(1)
    few = studies.search_table(search_history().query("seed < 3"))
    assert said(verdicts(search=few), "3 seeds in which bayesian is")["judged"] == "not tested"


def test_what_does_not_hold_is_said():
    table = verdicts()
    assert said(table, f"best rival ({studies.LINE})")["judged"] == "does not hold"  # the line is better
    points = proxy_points()
    turned = points.assign(loss=-points["loss"])
    assert said(verdicts(proxy=studies.proxy_table(turned, 200)), "loss with calibrated error, averaged")["judged"] == (
        "does not hold"
    )
    noise = points.assign(loss=np.random.default_rng(1).normal(size=len(points)))
    assert said(verdicts(proxy=studies.proxy_table(noise, 200)), "loss with calibrated error, averaged")["judged"] == (
        "within noise"
    )
    history = search_history()
    worse = history["method"] == "bayesian"
    history.loc[worse, "best_objective"] += 1
    table = verdicts(search=studies.search_table(history))
    assert said(table, "seeds in which bayesian is")["judged"] == "does not hold"


def test_waiting_is_a_share_of_all_devices_time():
    shares = waiting_share(policy_rows())
    assert shares["bayesian"] == pytest.approx(3 / 31.5) and shares["uniform"] == pytest.approx(15 / 31.5)
