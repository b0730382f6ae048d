"""Figures from made-up frames: what they show of published marks, limits and parts, and what lacking rows say."""

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from coformer_frames import coformer_frames
from decomposition_frames import decomposition_frames
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.report import adaptive_figures
from detransformer.report.accuracy_tables import table_iii
from detransformer.report.adaptive_tables import adaptive_verdicts, choice_cells
from detransformer.report.figures import FIGURES, draw
from detransformer.report.latency_figures import EVENTS
from detransformer.report.tables import METHOD_NAMES, table_iv
from detransformer.service.promises import NAMED_S, SERVED_S
from report_frames import (
    BANDWIDTHS,
    MEGABITS,
    SINGLE_S,
    SPREAD,
    WAIT_S,
    accuracy_rows,
    calibration_rows,
    choice_rows,
    communication_s,
    decoupling_rows,
    generation_rows,
    latency_rows,
    perplexity_rows,
    placement_rows,
    plan_map_rows,
    pretraining_rows,
    scale_out_rows,
    service_frames,
    table_iii_rows,
    timeline_rows,
    trace_rows,
    unequal_rows,
    wire_rows,
)

LIMIT = 4  # empty figures, in time, that one with rows may take on average; they took 2.9
FROM_LATENCY = [name for name, (tables, _) in FIGURES.items() if tables == ("latency",)]


def adaptive_frames() -> dict[str, pd.DataFrame]:
    frames = dict(plan_map=plan_map_rows(), choices=choice_rows(), unequal=unequal_rows(), trace=trace_rows())
    frames |= dict(generation=generation_rows(), perplexity=perplexity_rows(), scale_out=scale_out_rows())
    return frames | dict(choice_cells=choice_cells(frames["choices"]))


def accuracy_frames() -> dict[str, pd.DataFrame]:
    frames = dict(accuracy_runs=accuracy_rows(3), calibration=calibration_rows(), placements=placement_rows())
    return frames | dict(wire_accuracy=wire_rows())


@pytest.fixture(scope="module")
def all_tables(tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("figures") / "run")
    latency = latency_rows()
    run.save_table(latency, "latency")
    run.save_table(table_iv(latency, published("table_iv")), "table_iv")
    run.save_table(timeline_rows(), "timeline")
    run.save_table(table_iii(accuracy_rows(3), published("table_iii"), "", pretraining_rows()), "table_iii")
    for name, frame in accuracy_frames().items():
        run.save_table(frame, name)
    run.save_table(decoupling_rows(), "decoupling")
    steps = np.arange(1, 60)
    losses = [pd.DataFrame(dict(row=r, step=steps, train_loss=10 / steps**0.2 + i)) for i, r in enumerate("ab")]
    run.save_table(pd.concat(losses), "pretraining_loss")
    fig2a = [dict(model=m, device="Raspberry Pi 4B", latency_s=v, kind="published") for m, v in SINGLE_S.items()]
    fig2a += [dict(model=m, device="this machine", latency_s=v / 7, kind="measured") for m, v in SINGLE_S.items()]
    run.save_table(pd.DataFrame(fig2a), "fig2a")
    plans = [
        dict(model=m, num_devices=4, bandwidth_mbps=b, method=k, predicted_s=v / b + 0.4, chosen=k == "bp+sp")
        for m, b, (k, v) in itertools.product(SINGLE_S, BANDWIDTHS, MEGABITS.items())
        if k.startswith("bp")
    ]
    run.save_table(pd.DataFrame(plans), "placement")
    for name, frame in (adaptive_frames() | decomposition_frames() | coformer_frames() | service_frames()).items():
        run.save_table(frame, name)
    return run


@pytest.fixture
def full_run(all_tables, tmp_path) -> RunFolder:
    """All tables, no figure."""
    return RunFolder(shutil.copytree(all_tables.path, tmp_path / "run"))


def test_figures_are_the_same_bytes_from_the_same_table(full_run):
    draw(full_run, "fig7d")
    first = (full_run.figures / "fig7d.svg").read_bytes()
    draw(full_run, "fig7d")
    assert (full_run.figures / "fig7d.svg").read_bytes() == first


def test_fig7d_marks_the_two_published_speedups(full_run):
    figure = draw(full_run, "fig7d")
    for axis in figure.axes:
        marked = {line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"}
        assert marked == {3.27, 2.58}


def test_fig7a_bars_are_latency_over_the_original_single_device(full_run):
    figure = draw(full_run, "fig7a")
    first_tp_bar = figure.axes[0].patches[0]  # 1000 Mbps, line-rate link
    expected = (1.05 * 1.57 / 4 + communication_s("tp", 1000) + WAIT_S) / 1.57
    assert first_tp_bar.get_height() == pytest.approx(expected, rel=1e-6)


def test_a_single_link_and_few_bandwidths_are_enough(tmp_path):
    run = RunFolder(tmp_path)
    rows = latency_rows(links=("line-rate",))
    run.save_table(rows[(rows["method"] == "single") | rows["bandwidth_mbps"].isin([500, 125])], "latency")
    for name in ("fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8"):
        assert draw(run, name).axes, name


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_table_is_named_with_its_notebook(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{FIGURES[name][0][0]}.*run (\d\d_|`make \w+`|`detransformer )"):
        draw(RunFolder(tmp_path), name)


@pytest.mark.parametrize("name", FROM_LATENCY)
def test_rows_that_failed_their_self_check_are_not_drawn(tmp_path, name):
    run = RunFolder(tmp_path)
    run.save_table(latency_rows().assign(valid=False), "latency")
    with pytest.raises(ValueError, match="latency"):
        draw(run, name)


def test_each_round_of_a_fault_is_a_mark_and_the_promises_are_lines(full_run):
    (axis,) = draw(full_run, "faults").axes
    marks = {line.get_label(): len(line.get_xdata()) for line in axis.lines if line.get_marker() in ("o", "s")}
    assert marks == {"named": 5, "served again": 10}
    promised = [line.get_xdata()[0] for line in axis.lines if "promised" in line.get_label()]
    assert promised == [NAMED_S, SERVED_S]


def test_unknown_figure_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="fig9.*fig7a"):
        draw(RunFolder(tmp_path), "fig9")


def test_heat_maps_show_the_published_table_and_each_variant(full_run):
    figure = draw(full_run, "table_iv")
    assert len(figure.axes) == 2 * (1 + 3), "two links; published, the paper's plans, ours, narrow"
    shown = [axis.get_title() for axis in figure.axes if axis.axison]
    assert len(shown) == 7 and "obtained, our plans\nmodelled" in shown, "narrow was measured over one link"
    numbers = np.array(figure.axes[0].images[0].get_array())
    assert numbers.shape == (5, 4) and numbers[-1].tolist() == [2.81, 2.32, 2.03, 1.68], "125 Mbps is the lowest row"
    table = full_run.load_table("table_iv").set_index(["link", "variant", "model", "bandwidth_mbps", "baseline"])
    ours = np.array(figure.axes[2].images[0].get_array())
    assert ours[0, 3] == pytest.approx(table.loc[("line-rate", "ours", "bert-large", 1000, "sp"), "obtained"])
    assert f"{ours[0, 3]:.2f}" in [text.get_text() for text in figure.axes[2].texts]


def test_every_method_is_drawn_by_bandwidth_with_the_limit(full_run):
    figure = draw(full_run, "bandwidth")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:-1] == list(METHOD_NAMES.values()) and names[-1].startswith("limit")
    base = figure.axes[0]
    assert 1.57 / 4 in [line.get_ydata()[0] for line in base.lines]
    tp = 1.05 * 1.57 / 4 + communication_s("tp", 125) + WAIT_S
    assert any(line.get_ydata()[0] == pytest.approx(tp) for line in base.lines)


def test_parts_add_up_to_the_latency_in_order(full_run):
    axis = draw(full_run, "parts").axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:3] == ["BP+Auto, int8", "BP+Auto, bfloat16", "BP+Auto"] and "TP, int8" not in names
    bars = [bar for bar in axis.patches if bar.get_y() < names.index("TP") + 0.5 < bar.get_y() + 1]
    widths = [bar.get_width() for bar in bars]
    expected = [1.05 * 1.57 / 4, communication_s("tp", 125), WAIT_S]
    assert widths == pytest.approx(expected)
    ends = [bar.get_x() for bar in bars]
    assert ends == pytest.approx([0, expected[0], expected[0] + expected[1]])


def test_timeline_has_a_panel_a_method_and_a_lane_a_device(full_run):
    figure = draw(full_run, "timeline")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["TP", "SP", "BP+Auto"]
    assert len(figure.axes[0].get_yticklabels()) == 4
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [kind for kind in EVENTS if kind in named] and "all_to_all" in named and "send" not in named
    lanes = figure.axes[0].collections
    assert len(lanes) == 4 * 3 - 1, "compute, wait, all_reduce for each device; the last to arrive never waits"
    assert figure.axes[0].texts[0].get_text().strip() == "1.20 s"


def test_timeline_of_other_methods_shows_those(tmp_path):
    run = RunFolder(tmp_path)
    run.save_table(timeline_rows(methods=("pp",)), "timeline")
    assert [axis.get_title(loc="left") for axis in draw(run, "timeline").axes] == ["PP"]


def test_wire_figure_writes_the_error_above_compressed_bars(full_run):
    axis = draw(full_run, "wire").axes[0]
    assert [text.get_text() for text in axis.texts] == 3 * ["0.4%"] + 3 * ["1.2%"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["TP", "Ulysses", "BP+Auto"]


def test_scaling_goes_to_as_many_devices_as_were_measured(full_run):
    axis = draw(full_run, "fig7c").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3", "4", "8"]
    auto = next(line for line in axis.lines if line.get_label() == "BP+Auto")
    latency = 1.05 * 1.57 / 8 + communication_s("bp+auto", 500) + WAIT_S
    assert auto.get_ydata()[-1] == pytest.approx(1.57 / latency)


def test_an_older_run_without_the_new_columns_is_drawn(tmp_path):
    run = RunFolder(tmp_path)
    latency = latency_rows(links=("line-rate",))
    latency = latency[(latency["wire"] == "float32") & (latency["reads"] == "all")]
    latency = latency.drop(columns=["wait_s", "limit_s", "over_limit", "peak_rss_bytes", "relative_error", "reads"])
    run.save_table(latency, "latency")
    ratios = table_iv(latency, published("table_iv"))
    run.save_table(ratios[ratios["variant"] == "ours"].drop(columns=["variant", "method"]), "table_iv")
    for name in ("fig2b", "fig7a", "fig7d", "fig8", "bandwidth", "parts", "table_iv"):
        assert draw(run, name).axes, name


def test_the_command_draws_every_figure_as_svg_and_png_quickly_and_without_torch(full_run):
    """By how long an empty figure takes, so that a slow or busy machine is no failure."""
    code = (
        "import io, sys, time; sys.argv = ['detransformer', 'figures', sys.argv[1]]\n"
        "from detransformer.cli import main\n"
        "from detransformer.report.canvas import panels\n"
        "def plain():\n"
        "    start, (figure, _) = time.process_time(), panels(2, 4.2)\n"
        "    for kind in ('svg', 'png'): figure.savefig(io.BytesIO(), format=kind, dpi=150)\n"
        "    return time.process_time() - start\n"
        "plain(); before = [plain() for _ in range(5)]; start = time.process_time()\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "spent, after = time.process_time() - start, [plain() for _ in range(5)]\n"
        "assert 'torch' not in sys.modules\n"
        "print('empty figures', spent / (sum(before + after) / 10))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(full_run.path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < LIMIT * len(FIGURES), "rows computed while drawing?"
    assert {path.stem for path in full_run.figures.glob("*.svg")} == set(FIGURES)
    for name in FIGURES:
        svg = (full_run.figures / f"{name}.svg").read_text()
        assert "<svg" in svg and len(svg) > 5_000, name
        assert (full_run.figures / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_adaptive_verdicts_say_what_was_obtained():
    frames = adaptive_frames()
    names = ("choice_cells", "unequal", "trace", "generation")
    verdicts = adaptive_verdicts(*(frames[name] for name in names)).set_index("claim")
    near = verdicts.loc["cells whose chosen plan is within 3% of the best measured of a few"]
    assert near["obtained"] == 39 / 40 and near["judged"] == "holds" and near["expected"] == "at least 0.95"
    saved = verdicts.loc["changing link: time saved over the best fixed plan"]
    assert saved["obtained"] == pytest.approx(1 / 6) and saved["judged"] == "holds"
    for mbps in (1000, 125):
        over = verdicts.loc[f"unequal devices at {mbps} Mbps: planned split over the better even one"]
        assert over["obtained"] == pytest.approx(1.76) and over["judged"] == "holds"
    frames["generation"].loc[0, "equal_tokens"] = 15
    assert (adaptive_verdicts(*(frames[name] for name in names))["judged"] == "does not hold").sum() == 1


def test_the_trace_names_each_policy_with_its_total():
    figure = adaptive_figures.trace(trace_rows())
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["adaptive: 1.5 s", "fixed: a: 2.7 s", "fixed: b: 1.8 s"]


# --- accuracy ----------------------------------------------------------------------------------------------------


def test_table_iii_trends_are_differences_with_the_originals_band(full_run):
    figure = draw(full_run, "table_iii")
    assert len(figure.axes) == 2 * 7, "five tasks, their mean, perplexity; over Nb and over Ndiv"
    axis = next(axis for axis in figure.axes if axis.get_title() == "CoLA\n(mcc)")
    hollow = next(line for line in axis.lines if line.get_marker() == "D")
    assert hollow.get_ydata() == pytest.approx(np.array([39.85, 41.26, 41.20, 42.06]) - 40.43)
    filled = next(line for line in axis.lines if line.get_marker() == "o")
    assert filled.get_ydata() == pytest.approx(0.8 * hollow.get_ydata())
    band = axis.patches[0].get_height()
    assert band == pytest.approx(2 * SPREAD / 3**0.5), "mean plus and minus a standard error of three seeds"
    text = next(axis for axis in figure.axes if axis.get_title().startswith("MLM"))
    assert not any(line.get_marker() == "D" for line in text.lines), "the paper has no perplexity"


@pytest.mark.parametrize(
    "table",
    [
        table_iii_rows(),
        table_iii(accuracy_rows(1), published("table_iii"), pretraining=pretraining_rows()),
        table_iii(accuracy_rows(2).query("task == 'CoLA' and num_divisions == 4"), published("table_iii")),
        table_iii(accuracy_rows(1).head(0), published("table_iii")),
    ],
    ids=["older", "one seed", "no original, one task", "nothing run"],
)
def test_table_iii_is_drawn_from_what_there_is(tmp_path, table):
    run = RunFolder(tmp_path)
    run.save_table(table, "table_iii")
    assert len(draw(run, "table_iii").axes) >= 2 * 6


def test_every_seed_is_a_dot_and_the_original_a_band(full_run):
    figure = draw(full_run, "table_iii_noise")
    assert [axis.get_title() for axis in figure.axes] == [
        f"{task}, 3 seeds" for task in ("CoLA", "SST-2", "MRPC", "MNLI", "SQuAD")
    ]
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[0] == "original" and len(names) == 7
    dots = next(line for line in axis.lines if line.get_marker() == "o")
    assert sorted(dots.get_xdata()) == pytest.approx([0.8 * 40.43 + shift for shift in (-SPREAD, 0, SPREAD)])
    assert axis.patches[0].get_width() == pytest.approx(2 * SPREAD), "a standard deviation to both sides"


def test_dots_of_one_seed_have_no_band_and_variants_are_left_out(tmp_path):
    run = RunFolder(tmp_path)
    runs = accuracy_rows(1)
    run.save_table(pd.concat([runs, runs.assign(attention_width="narrow", score=1.0)]), "accuracy_runs")
    axis = draw(run, "table_iii_noise").axes[0]
    assert axis.get_title() == "CoLA, 1 seed" and not axis.patches
    assert all(len(line.get_xdata()) == 1 for line in axis.lines if line.get_marker() == "o")


def test_calibration_has_a_line_a_method_and_the_teacher(full_run):
    figure = draw(full_run, "calibration")
    assert len(figure.axes) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [
        "not trained on (sliced)",
        "plain",
        "distilled",
        "from scratch, 100,000,000 tokens",
        "original (teacher)",
    ]
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label() == "original (teacher)"]
    assert levels == [3.5] and figure.axes[0].get_xscale() == "log"


def test_calibration_of_one_method_is_drawn(tmp_path):
    run = RunFolder(tmp_path)
    rows = calibration_rows().query("method == 'distilled'").assign(teacher_valid_loss=np.nan)
    run.save_table(rows, "calibration")
    assert [text.get_text() for text in draw(run, "calibration").legends[0].get_texts()] == ["distilled"]


def test_placements_write_the_difference_to_the_published_place(full_run):
    axis = draw(full_run, "placements").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["last", "first", "bottom", "middle", "top"]
    assert [text.get_text() for text in axis.texts] == ["", "+0.050", "+0.200", "+0.100", "-0.050"]


def test_wire_accuracy_has_the_band_that_is_allowed(full_run):
    figure = draw(full_run, "wire_accuracy")
    axis = figure.axes[0]
    band = axis.patches[0]
    assert (band.get_y(), band.get_height()) == (pytest.approx(-0.3), pytest.approx(0.6))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["bfloat16", "int8"]
