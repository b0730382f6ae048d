"""Figures and tables from small synthetic frames made here: shapes, published marks, and what lacking rows say."""

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from detransformer.report.expected import published
from detransformer.report.figures import FIGURES, draw, draw_all
from detransformer.report.runs import RunFolder
from detransformer.report.tables import table_ii, table_iii_markdown, table_iv, table_iv_markdown

BANDWIDTHS = (1000, 750, 500, 250, 125)
SINGLE_S = {"bert-base": 1.57, "bert-large": 4.48}
# Megabits a method moves for one request in the synthetic rows; any order that TP > SP > BP will do.
MEGABITS = {"tp": 110, "sp": 80, "bp+tp": 45, "bp+sp": 40, "bp+allgather": 42, "bp+auto": 38}


def latency_rows(links=("clean", "fitted")) -> pd.DataFrame:
    rows = []
    for model, single in SINGLE_S.items():
        common = dict(model=model, seq_len=128, batch_size=1, wire="float32", valid=True, weights_bytes=4e8)
        rows.append(common | dict(method="single", num_devices=1, link=np.nan, latency_s=single, compute_s=single,
                                  comm_s=0.0, throughput_rps=1 / single))  # fmt: skip
        for link, bandwidth, devices, method in itertools.product(links, BANDWIDTHS, (2, 3, 4), MEGABITS):
            for nb in (1, 2, 3, 4) if method == "bp+auto" else (4,):
                block = method.startswith("bp")
                comm = MEGABITS[method] * (1 if not block else nb / 4) / bandwidth * (1 if link == "clean" else 2)
                compute = 1.05 * single / devices
                rows.append(common | dict(
                    method=method, num_devices=devices, bandwidth_mbps=bandwidth, link=link, latency_s=compute + comm,
                    compute_s=compute, comm_s=comm, num_original_layers=nb if block else np.nan,
                    num_divisions=4 if block else np.nan, throughput_rps=1 / (compute + comm),
                    weights_bytes=4e8 if method == "sp" else 1.2e8,
                ))  # fmt: skip
    return pd.DataFrame(rows)


def table_iii_rows() -> pd.DataFrame:
    rows = []
    for _, cell in published("table_iii").iterrows():
        for task in ("cola", "sst2", "mrpc", "mnli", "squad"):
            value = cell[[c for c in cell.index if c.startswith(task)][0]]
            rows.append(
                dict(
                    model=cell["model"],
                    num_original_layers=cell["num_original_layers_nb"],
                    num_divisions=cell["num_divisions_ndiv"],
                    task=task,
                    metric="MCC" if task == "cola" else "acc",
                    published=value,
                    obtained_mean=0.8 * value if cell["model"] == "bert-base" else np.nan,
                    obtained_std=1.5,
                    num_seeds=3,
                )  # fmt: skip
            )
    return pd.DataFrame(rows)


def decoupling_rows() -> pd.DataFrame:
    return pd.DataFrame(
        [
            dict(
                model="bert-base",
                num_divisions=n,
                attention_width=w,
                seq_len=s,
                layer_flops_ratio=1 + 0.02 * n * s / 128,
            )
            for n, w, s in itertools.product((2, 4, 8), ("full", "narrow"), (128, 384, 512))
        ]
    )


@pytest.fixture
def full_run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    latency = latency_rows()
    run.save_table(latency, "latency")
    run.save_table(table_iv(latency, published("table_iv")), "table_iv")
    run.save_table(table_iii_rows(), "table_iii")
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
    ]
    run.save_table(pd.DataFrame(plans), "placement")
    return run


def test_every_figure_is_drawn_as_svg_and_png(full_run):
    drawn, missing = draw_all(full_run)
    assert missing == {} and set(drawn) == set(FIGURES)
    for name in FIGURES:
        svg = (full_run.figures / f"{name}.svg").read_text()
        assert "<svg" in svg and len(svg) > 5_000, name
        assert (full_run.figures / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


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
    first_tp_bar = figure.axes[0].patches[0]  # 1000 Mbps, clean link
    expected = (1.05 * 1.57 / 4 + 110 / 1000) / 1.57
    assert first_tp_bar.get_height() == pytest.approx(expected, rel=1e-6)


def test_a_single_link_and_few_bandwidths_are_enough(tmp_path):
    run = RunFolder(tmp_path)
    rows = latency_rows(links=("clean",))
    run.save_table(rows[(rows["method"] == "single") | rows["bandwidth_mbps"].isin([500, 125])], "latency")
    for name in ("fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8"):
        assert draw(run, name).axes, name


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_table_is_named_with_its_notebook(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{FIGURES[name][0][0]}.*run 0\d_"):
        draw(RunFolder(tmp_path), name)


@pytest.mark.parametrize("name", ["fig2b", "fig7a", "fig7b", "fig7c", "fig7d", "fig8"])
def test_rows_that_failed_their_self_check_are_not_drawn(tmp_path, name):
    run = RunFolder(tmp_path)
    run.save_table(latency_rows().assign(valid=False), "latency")
    with pytest.raises(ValueError, match="latency"):
        draw(run, name)


def test_unknown_figure_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="fig9.*fig7a"):
        draw(RunFolder(tmp_path), "fig9")


def test_table_iv_divides_the_right_rows():
    latency = latency_rows(links=("clean",))
    table = table_iv(latency, published("table_iv")).set_index(["model", "bandwidth_mbps", "baseline"])
    assert len(table) == 20 and (table["status"] == "measured").all()
    auto = 1.05 * 1.57 / 4 + 38 / 125
    assert table.loc[("bert-base", 125, "tp"), "obtained"] == pytest.approx((1.05 * 1.57 / 4 + 110 / 125) / auto)
    assert table.loc[("bert-base", 125, "tp"), "published"] == 2.81


def test_table_iv_says_not_run_for_absent_and_invalid_cells():
    latency = latency_rows(links=("clean",))
    latency = latency[latency["bandwidth_mbps"] != 750]
    latency.loc[(latency["method"] == "tp") & (latency["bandwidth_mbps"] == 125), "valid"] = False
    table = table_iv(latency, published("table_iv"))
    missing = table[table["status"] == "not run"]
    assert set(zip(missing["bandwidth_mbps"], missing["baseline"], strict=True)) == {
        (750, "tp"),
        (750, "sp"),
        (125, "tp"),
    }
    assert missing["obtained"].isna().all()
    markdown = table_iv_markdown(table)
    assert "2.81x / not run" in markdown and "1.31x / not run" in markdown


def test_table_iv_of_no_rows_at_all_is_twenty_cells_not_run():
    table = table_iv(latency_rows().head(0), published("table_iv"))
    assert len(table) == 20 and (table["status"] == "not run").all()


def test_table_iii_markdown_has_the_papers_rows_and_both_values():
    markdown = table_iii_markdown(table_iii_rows())
    lines = [line for line in markdown.splitlines() if line.startswith("| BERT")]
    assert len(lines) == 11
    assert "42.06 / 33.65 ± 1.50" in markdown and "51.00 / not run" in markdown
    assert "| BERT-Base  | original" in markdown


def test_table_ii_compares_with_one_device():
    table = table_ii(latency_rows(), published("table_ii")).set_index("approach")
    assert table.loc["TP", "latency_reduction_obtained"] == "yes"
    assert table.loc["SP", "memory_reduction_obtained"] == "no"
    assert table.loc["BP", "memory_reduction_obtained"] == "yes"
    assert table.loc["DP", "latency_reduction_obtained"] == "not run"
    assert table.loc["PP", "throughput_increase_published"] == "yes"


def test_the_command_redraws_quickly_and_without_torch(full_run):
    code = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['detransformer', 'figures', sys.argv[1]]\n"
        "from detransformer.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
        "print('seconds', time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(full_run.path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 20
    assert len(list(full_run.figures.glob("*.svg"))) == len(FIGURES)
