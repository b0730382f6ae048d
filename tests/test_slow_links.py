"""Where decoupling pays: what rows of notebook 14 say, and the advice that is made of prices and saved tables."""

import math

import pandas as pd
import pytest
import slow_link_studies as studies

from detransformer import cli
from detransformer.commands.advice import advised, next_best
from detransformer.files import repository_root
from detransformer.tables.claims import slow_link_claim
from detransformer.tables.costs import compression_costs, decoupling_costs, saved_tables

ROOT = repository_root()


def row(structure, mbps, latency_s, kind="predicted", plan="tensor on 4 devices", wire="float32", **fields):
    setting = dict(model="bert-base", num_devices=4, bandwidth_mbps=mbps, delay_ms=0.0, shared=False, wire=wire)
    made = dict(pace="measured", structure=structure, kind=kind, plan=plan, latency_s=latency_s, valid=True)
    return setting | made | dict(predicted_s=latency_s, samples_s=None) | fields


def rows_of(unmodified, decoupled, one_s=1.5):
    """Rows of three structures at the rates 10, 100, 1000."""
    rows = [row(studies.ONE_DEVICE, mbps, one_s, plan=studies.ONE_DEVICE) for mbps in (10, 100, 1000)]
    rows += [row("original", mbps, s) for mbps, s in zip((10, 100, 1000), unmodified, strict=True)]
    rows += [row("Nb=1", mbps, s) for mbps, s in zip((10, 100, 1000), decoupled, strict=True)]
    return pd.DataFrame(rows).reindex(columns=studies.COLUMNS)


def test_a_margin_is_over_the_faster_of_the_best_plan_and_one_device():
    table = studies.margins(rows_of([2.0, 1.0, 0.5], [1.0, 0.8, 0.6])).set_index("bandwidth_mbps")
    assert table["margin"].tolist() == pytest.approx([1.5, 1.25, 0.5 / 0.6])
    assert table["winner"].tolist() == ["Nb=1", "Nb=1", "original"]
    slow = rows_of([2.0, 1.0, 0.5], [1.8, 0.8, 0.6])
    assert studies.margins(slow)["winner"].iloc[0] == studies.ONE_DEVICE


def test_measured_margins_have_the_interval_of_interleaved_requests():
    samples = [str([2.0 + i / 100 for i in range(10)]), str([1.0 + i / 100 for i in range(10)])]
    rows = [row(studies.ONE_DEVICE, 10, 9.0, "emulated"), row("original", 10, 2.045, "emulated", samples_s=samples[0])]
    rows.append(row("Nb=1", 10, 1.045, "emulated", samples_s=samples[1]))
    (found,) = studies.margins(pd.DataFrame(rows).reindex(columns=studies.COLUMNS)).to_dict("records")
    assert found["margin_low"] <= found["margin"] <= found["margin_high"] and found["margin_low"] > 1.9
    rows[2]["valid"] = False
    assert not len(studies.margins(pd.DataFrame(rows).reindex(columns=studies.COLUMNS)))


def test_a_measured_margin_is_held_against_the_predicted_one():
    rows = rows_of([2.0, 1.0, 0.5], [0.75, 0.8, 0.5])
    measured = rows.assign(kind="emulated", latency_s=rows["latency_s"] * 1.02)
    verdicts = studies.slow_link_verdicts(pd.concat([rows, measured]))
    assert verdicts["where"].tolist() == [
        "10 Mbps, float32",
        "3 settings, all",
        "3 settings, without Nb=1",
        "all measured rows",
    ]
    assert verdicts[["expected", "obtained"]].iloc[0].tolist() == pytest.approx([2.0, 2.0])
    assert verdicts["judged"].tolist() == ["matches", "holds", "holds", "holds"]
    alone = studies.slow_link_verdicts(measured)
    assert alone["judged"].iloc[0] == "not tested"


def test_the_planned_structure_is_held_against_the_fastest_one():
    rows = [row(studies.ONE_DEVICE, 10, 2.0, "emulated"), row("original", 10, 1.5, "emulated")]
    rows += [row("Nb=4", 10, 1.4, "emulated"), row("Nb=1", 10, 1.0, "emulated")]
    rows = pd.DataFrame(rows).reindex(columns=studies.COLUMNS).assign(predicted_s=[2.0, 1.3, 1.4, 1.0])
    found = studies.planner_choices(rows).set_index("among")
    assert found.loc["all", ["planned", "fastest", "excess"]].tolist() == ["Nb=1", "Nb=1", 0.0]
    assert found.loc["without Nb=1", ["planned", "fastest"]].tolist() == ["original", "Nb=4"]
    assert found.loc["without Nb=1", "excess"] == pytest.approx(1.5 / 1.4 - 1)
    rows.loc[2, "valid"] = False
    assert studies.planner_choices(rows).set_index("among").loc["without Nb=1", "excess"] == 0


def test_crossovers_lie_between_rates_by_their_logarithm():
    def crossover(*decoupled):
        ends = studies.crossovers(studies.margins(rows_of([1.05 * 1.1, 1.05, 1.05 / 1.1], decoupled)))
        return tuple(ends[["from_mbps", "to_mbps"]].iloc[0])

    assert crossover(1.0, 1.0, 1.0) == pytest.approx((0.0, 100))
    halfway = crossover(1.0, 1.05 / (1.05 - 0.105), 1.0)  # gains 0.105, -0.105
    assert halfway == pytest.approx((0.0, math.sqrt(10 * 100)))
    assert crossover(0.9, 0.9, 0.8) == (0.0, math.inf) and crossover(2.0, 2.0, 2.0) == (0.0, 0.0)
    low, high = crossover(1.155 / (1.05 - 0.105), 1.05 / (1.05 + 0.105), 1.0)
    assert low == pytest.approx(math.sqrt(10 * 100)) and 100 < high < 1000


@pytest.mark.parametrize(
    "seconds, choice, second",
    [
        ((1.0, 0.97, 0.96, 0.951), "neither", "both"),
        ((1.0, 0.9, 0.88, 0.86), "compress", "both"),
        ((1.0, 0.9, 0.5, 0.48), "decouple", "both"),
        ((1.0, 0.6, 0.6, 0.4), "both", "compress"),
    ],
)
def test_the_least_change_that_no_larger_one_beats_by_five_per_cent(seconds, choice, second):
    latency_s = dict(zip(("neither", "compress", "decouple", "both"), seconds, strict=True))
    assert advised(latency_s) == choice and next_best(latency_s, choice) == second
    assert next_best({"neither": 1.0}, "neither") is None


def test_costs_name_the_row_that_they_are_from():
    run = saved_tables()
    kept, probes = run.load_table("kept"), run.load_table("probes")
    kept, tuned = (part for _, part in kept.groupby(kept["how"] == "fine-tuned"))
    for share, name in ((1 / 12, "Nb=1"), (1 / 3, "Nb=2"), (1.0, "Nb=3")):
        first, second, *more = decoupling_costs(run, share)
        fewer = next(sentence for sentence in more if sentence.startswith("Fewer layers"))
        quotes = [sentence for sentence in more if sentence.startswith("Fine-tuned")]
        assert [sentence.split("'")[1] for sentence in quotes] == tuned["row"].tolist()[1:]  # the first is the original
        quoted, cut = first.split("'")[1], fewer.split("'")[1]
        assert "3 layers" in cut and f"{kept.set_index('row').loc[cut, 'share']:.0f}%" in fewer
        assert name in quoted and "tokens" in quoted and quoted in set(kept["row"])
        assert f"{kept.set_index('row').loc[quoted, 'share']:.0f}%" in first
        found = probes[(probes["row"] == quoted) & (probes["task"] == "retrieval@1")]["difference"].iloc[0]
        assert f"{found:+.1f} points" in second
    assert "wire_accuracy" in compression_costs(run, "int8", is_decoupled=True)[0]
    assert compression_costs(run, "float9", False) == ["No saved table says what messages in float9 cost such a model."]
    assert decoupling_costs(None, 0.5) == ["No saved table says what decoupling costs; run notebook 03."]


def test_advice_leaves_out_what_cannot_be_run_and_says_why(capsys):
    """A GPT-2's messages are float32; a model that one device cannot hold whole may still be shared."""
    with pytest.raises(SystemExit):
        cli.main(["plan", "--advise", "--model", "gpt2", "--bandwidth", "10", "--seq-len", "16"])
    out = capsys.readouterr().out
    assert "Left out: compress: a decoder's messages are float32." in out and "- compress" not in out
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--advise", "--memory", "20"])
    assert end.value.code == 2 and "no plan fits" in capsys.readouterr().err


@pytest.mark.parametrize("example", ["emulated-four-pis", "unequal", "jetsons"])
def test_advice_is_one_screen_on_the_example_clusters(capsys, example):
    """The choice, its price and the next best agree with the table above them."""
    with pytest.raises(SystemExit) as end:
        options = ["--cluster", str(ROOT / "examples" / f"{example}.yaml"), "--bandwidth", "10", "--seq-len", "32"]
        cli.main(["plan", "--advise", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert end.value.code in (0, None) and len(lines) <= 24 and max(map(len, lines)) < 300
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    seconds = {row[0]: float(row[3]) for row in cells[2:]}
    assert list(seconds) == ["neither", "compress", "decouple", "both"]
    (advice,) = (line for line in lines if line.startswith("Advice: "))
    assert advice.split()[1].rstrip(".") == advised(seconds)
    assert any(line.startswith(f"Next best: {next_best(seconds, advised(seconds))}, ") for line in lines)
    assert any("table kept" in line for line in lines)


def test_the_claim_names_what_was_measured():
    rows = rows_of([2.0, 1.0, 0.5], [1.0, 0.8, 0.6]).assign(kind="emulated", repeats=1, time_scale=1.0)
    claim, paper, here, kind, sure = slow_link_claim(rows)
    assert paper == "-" and here == "float32: 1.50x at 10 Mbps" and kind == "emulated"
    assert sure.startswith("1 request a row, no interval; paced by measured efficiency")
    assert slow_link_claim(rows.assign(kind="predicted")) is None
    assert slow_link_claim(rows.assign(bandwidth_mbps=500.0)) is None
