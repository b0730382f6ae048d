"""Table III with seeds: differences and their errors, means, trends, variants and number formats, from made-up runs."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pretraining_studies import data_note, variant_table, wire_table

from detransformer.record.published import published
from detransformer.tables.accuracy import learned, mean_score, scores_wide, table_iii, trends, typed
from detransformer.training.config import ModelRow
from detransformer.training.results import accuracy_table, pretraining_table
from table_frames import SPREAD, accuracy_rows, pretraining_rows

PUBLISHED = published("table_iii")
DIFFERENCES = ["published_difference", "obtained_difference", "difference_std_error", "beyond_noise"]


def one(runs: pd.DataFrame, task: str, nb, ndiv) -> pd.Series:
    """Which runs are those of one cell; Nb and Ndiv are None for the original."""
    number, divisions = runs["num_original_layers"].fillna(0), runs["num_divisions"].fillna(0)
    return (runs["task"] == task) & (number == (nb or 0)) & (divisions == (ndiv or 0))


def cell(table: pd.DataFrame, task: str, nb=None, ndiv=None, model="bert-base") -> pd.Series:
    rows = typed(table)
    return rows[one(rows, task, nb, ndiv) & (rows["model"] == model)].iloc[0]


def through_csv(table: pd.DataFrame, tmp_path) -> pd.DataFrame:
    table.to_csv(tmp_path / "table.csv", index=False)
    return pd.read_csv(tmp_path / "table.csv")


# --- the long table ----------------------------------------------------------------------------------------------


def test_differences_are_those_of_paired_seeds():
    runs = accuracy_rows(3)  # each seed moves all rows alike
    runs.loc[one(runs, "CoLA", 4, 4), "score"] += [0.1, 0.0, -0.1]
    row = cell(table_iii(runs, PUBLISHED), "CoLA", 4, 4)
    assert row["published_difference"] == pytest.approx(42.06 - 40.43)
    assert row["obtained_difference"] == pytest.approx(0.8 * 1.63) and row["num_seeds"] == 3
    assert row["difference_std_error"] == pytest.approx(0.1 / math.sqrt(3)), "the spread itself is some 1.5 points"
    assert row["beyond_noise"]
    original = cell(table_iii(runs, PUBLISHED), "CoLA")
    assert original[DIFFERENCES].isna().all(), "the original has no difference to itself"


def test_two_errors_make_a_difference(tmp_path):
    runs = accuracy_rows(3)
    for task, shift in (("SST-2", 0.02), ("MNLI", 3.0)):
        cells = one(runs, task, 3, 4)
        base = runs.loc[one(runs, task, None, None), "score"].to_numpy()
        runs.loc[cells, "score"] = base + shift + np.array([0.1, 0.0, -0.1])
    table = table_iii(runs, PUBLISHED)
    for frame in (table, through_csv(table, tmp_path)):
        assert not cell(frame, "SST-2", 3, 4)["beyond_noise"] and cell(frame, "MNLI", 3, 4)["beyond_noise"]


def test_one_seed_has_a_difference_and_no_error():
    table = table_iii(accuracy_rows(1), PUBLISHED)
    row = cell(table, "MRPC", 2, 4)
    assert row["obtained_difference"] == pytest.approx(0.8 * 3.19)
    assert np.isnan(row["difference_std_error"]) and pd.isna(row["beyond_noise"]) and np.isnan(row["obtained_std"])


def test_missing_tasks_and_rows_are_not_run():
    runs = accuracy_rows(2)
    runs = runs[runs["task"].isin(["CoLA", "MNLI"]) & ~one(runs, "CoLA", None, None)]
    table = table_iii(runs, PUBLISHED, "quick", pretraining_rows()[:2])
    assert len(table) == 11 * 6
    assert (
        cell(table, "SQuAD", 4, 4)["status"] == "not run (profile quick)"
        and cell(table, "SQuAD", 4, 4)["num_seeds"] == 0
    )
    assert np.isnan(cell(table, "CoLA", 4, 4)["obtained_difference"]), "there is no original to compare with"
    assert cell(table, "MLM")["status"] == "measured" and cell(table, "MLM", 4, 4)["status"].startswith("not run")
    assert np.isnan(cell(table, "CoLA", 4, 4, "bert-large")["obtained_mean"])
    nothing = table_iii(runs.head(0), PUBLISHED)
    assert len(nothing) == 55 and set(nothing["status"]) == {"not run"}


def test_variants_of_a_structure_are_not_the_published_row():
    runs = accuracy_rows(2)
    narrow, first = runs.assign(attention_width="narrow"), runs.assign(original_placement="first")
    both = pd.concat([runs, narrow.assign(score=0.0), first.assign(score=0.0)])
    with_variants, without = table_iii(both, PUBLISHED), table_iii(accuracy_rows(2), PUBLISHED)
    pd.testing.assert_frame_equal(with_variants, without)


def test_perplexity_is_the_sixth_column():
    one_seed = table_iii(accuracy_rows(2), PUBLISHED, pretraining=pretraining_rows(1))
    row = cell(one_seed, "MLM", 1, 4)
    assert row["metric"] == "perplexity" and np.isnan(row["published"])
    assert row["obtained_mean"] == pytest.approx(math.exp(row["valid_loss"]))
    assert np.isnan(row["obtained_std"]) and pd.isna(row["beyond_noise"]) and row["obtained_difference"] > 0
    row = cell(table_iii(accuracy_rows(2), PUBLISHED, pretraining=pretraining_rows(3)), "MLM", 1, 4)
    assert row["num_seeds"] == 3 and row["obtained_std"] > 0 and row["beyond_noise"]
    assert (one_seed["task"] == "MLM").sum() == 11 and len(table_iii(accuracy_rows(2), PUBLISHED)) == 55


def test_seeds_of_pre_training_are_told_from_those_of_fine_tuning():
    runs = pd.concat([accuracy_rows(2, pretraining_seed=0), accuracy_rows(2, pretraining_seed=1)])
    runs.loc[one(runs, "CoLA", 4, 4), "score"] += np.array([0.0, 0.2, 0.4, 0.6])
    row = cell(table_iii(runs, PUBLISHED), "CoLA", 4, 4)
    assert row["num_seeds"] == 4
    assert row["difference_std_error"] == pytest.approx(np.std([0, 0.2, 0.4, 0.6], ddof=1) / 2)


def test_learning_is_more_than_a_small_validation_set_makes():
    rows = pd.DataFrame(
        dict(metric="accuracy", score=[52.0, 52.0, 50.5], majority_score=50.0, eval_rows=[872, 9815, 10**6])
    )
    assert learned(rows).tolist() == [False, True, False], "one point at least"
    kinds = dict(metric=["mcc", "exact_match", "exact_match"], score=[5.0, 5.0, 15.0])
    rows = pd.DataFrame(kinds | dict(majority_score=0.0, eval_rows=1043))
    assert learned(rows).tolist() == [False, False, True], "of answers to questions, ten points"


# --- means and trends --------------------------------------------------------------------------------------------


def test_mean_score_is_a_share_of_the_originals_with_an_error(tmp_path):
    runs = accuracy_rows(3)
    runs.loc[one(runs, "CoLA", 4, 4), "score"] += [1.0, 0.0, -1.0]
    for table in (table_iii(runs, PUBLISHED), through_csv(table_iii(runs, PUBLISHED), tmp_path)):
        means = mean_score(table).set_index(["model", "num_original_layers", "num_divisions", "over"])
        row = means.loc[("bert-base", 4, 4, "all")]
        assert row["published"] == pytest.approx(75.78) and row["published_share"] == pytest.approx(100 * 75.78 / 75.08)
        assert row["obtained_share"] == pytest.approx(row["published_share"]) and row["judged"] == "holds"
        divisor = SPREAD / math.sqrt(3) / math.sqrt(5) * (row["obtained_share"] / 100 - 1)
        error = math.hypot(1 / math.sqrt(3) / 5, divisor) / (0.8 * 75.08)
        assert row["share_std_error"] == pytest.approx(100 * error)
        assert means.loc[("bert-base", 1, 4, "all"), "judged"] == "does not hold"
        assert means.loc[("bert-large", 4, 4, "all"), "judged"] == "not tested"


def test_mean_of_learned_tasks_leaves_out_those_at_chance():
    runs = accuracy_rows(2)
    runs.loc[runs["task"] == "MRPC", "score"] = 62.0
    means = mean_score(table_iii(runs, PUBLISHED, pretraining=pretraining_rows()))
    some = means[(means["over"] == "learned") & (means["num_divisions"] == 8)].iloc[0]
    assert some["tasks"] == "CoLA, SST-2, MNLI, SQuAD" and some["num_tasks"] == 4
    assert some["published"] == pytest.approx(np.mean([36.75, 91.28, 80.40, 74.82]))
    runs["score"] = runs["majority_score"]
    means = mean_score(table_iii(runs, PUBLISHED))
    assert set(means.loc[(means["over"] == "learned") & (means["num_divisions"] == 8), "judged"]) == {"not tested"}


def test_a_mean_with_one_seed_somewhere_has_no_error():
    runs = accuracy_rows(2)
    runs = runs[(runs["task"] != "SQuAD") | (runs["seed"] == 0)]
    row = mean_score(table_iii(runs, PUBLISHED)).set_index(["model", "num_original_layers", "num_divisions", "over"])
    row = row.loc[("bert-base", 4, 4, "all")]
    assert np.isnan(row["share_std_error"]) and row["judged"] == "not tested" and row["num_tasks"] == 5


def by_place(table: pd.DataFrame) -> pd.DataFrame:
    return trends(table).set_index(["model", "trend", "task"])


def test_trends_are_slopes_with_errors_over_seeds(tmp_path):
    table = table_iii(accuracy_rows(3), PUBLISHED, pretraining=pretraining_rows(3))
    for frame in (table, through_csv(table, tmp_path)):
        found = by_place(frame)
        cola = found.loc[("bert-base", "Nb", "CoLA")]
        slope = np.polyfit([1, 2, 3, 4], [39.85, 41.26, 41.20, 42.06], 1)[0]
        assert cola["published_slope"] == pytest.approx(slope) and cola["obtained_slope"] == pytest.approx(0.8 * slope)
        assert cola["slope_std_error"] == pytest.approx(SPREAD / math.sqrt(3) / math.sqrt(5))  # sum (x - mean)^2 = 5
        assert cola["judged"] == "within noise" and cola["points"] == "1, 2, 3, 4"
        ndiv = found.loc[("bert-base", "Ndiv", "CoLA")]
        assert ndiv["published_slope"] == pytest.approx((36.75 - 47.51) / 2), "a doubling of Ndiv"
        assert ndiv["judged"] == "matches"
        assert found.loc[("bert-base", "Nb", "MLM"), "judged"] == "holds", "perplexity falls with Nb"
        assert found.loc[("bert-base", "Nb", "mean"), "slope_std_error"] == pytest.approx(
            cola["slope_std_error"] / 5**0.5
        )
        assert found.loc[("bert-large", "Nb", "CoLA"), "why"] == "not run"
        assert ("bert-large", "Ndiv") not in {key[:2] for key in found.index}, "one point is no trend"


def test_trends_against_the_published_are_told_with_their_spread():
    runs = accuracy_rows(3)
    squad = runs["task"] == "SQuAD"
    runs.loc[squad, "score"] = 60 - 3 * runs["num_original_layers"].fillna(4) + 0.1 * runs["seed"]
    runs.loc[runs["task"] == "MRPC", "score"] = 62.0
    table = table_iii(runs, PUBLISHED, pretraining=pretraining_rows(1))
    found = by_place(table)
    assert found.loc[("bert-base", "Nb", "SQuAD"), "judged"] == "does not hold"
    assert found.loc[("bert-base", "Nb", "MRPC"), "why"] == "at chance"
    assert found.loc[("bert-base", "Nb", "MLM"), "why"] == "one seed"
    assert ("bert-base", "Nb", "mean of learned") in found.index


def test_trends_of_one_seed_and_of_few_points():
    found = by_place(table_iii(accuracy_rows(1), PUBLISHED))
    assert set(found.loc["bert-base", "why"]) == {"one seed"}
    runs = accuracy_rows(3)
    few = by_place(table_iii(runs[runs["num_original_layers"].isin([1, 4])], PUBLISHED)).loc[
        ("bert-base", "Nb", "CoLA")
    ]
    assert few["points"] == "1, 4" and few["published_slope"] == pytest.approx((42.06 - 39.85) / 3), (
        "at the same points"
    )
    assert set(trends(table_iii(runs.head(0), PUBLISHED))["why"]) == {"not run"}


# --- variants, number formats, tables of runs --------------------------------------------------------------------


def test_wire_table_says_what_a_number_format_costs():
    runs = accuracy_rows(3)
    runs = runs[one(runs, "CoLA", 4, 4) | one(runs, "MNLI", 4, 4) | one(runs, "CoLA", None, None)]
    runs["score_bfloat16"] = runs["score"] + 0.1
    runs["score_int8"] = np.where(runs["task"] == "CoLA", runs["score"] + np.tile([-1.0, 0.5, -0.7], 3), np.nan)
    table = wire_table(runs).set_index(["row", "task", "wire"])
    row = table.loc[("bert-base Nb=4, Ndiv=4", "CoLA", "int8")]
    assert row["change"] == pytest.approx(-0.4) and row["largest_change"] == pytest.approx(1.0) and not row["within"]
    assert row["num_seeds"] == 3 and row["change_std_error"] == pytest.approx(np.std([-1, 0.5, -0.7], ddof=1) / 3**0.5)
    assert table.loc[("bert-base original", "CoLA", "bfloat16"), "within"]
    assert ("bert-base Nb=4, Ndiv=4", "MNLI", "int8") not in table.index, "not scored with it"
    assert wire_table(runs, limit=0.5)["within"].all()
    one_seed = wire_table(runs[runs["seed"] == 0])
    assert one_seed["change_std_error"].isna().all() and len(one_seed) == 5


def test_wire_table_of_runs_without_other_formats_is_empty():
    assert len(wire_table(accuracy_rows(2))) == 0


def variants(num_seeds: int) -> pd.DataFrame:
    published_kind = pretraining_rows(num_seeds)
    decoupled = published_kind[published_kind["num_divisions"] == 4]
    moved = decoupled[decoupled["num_original_layers"] == 4]
    top = moved.assign(original_placement="top", valid_loss=moved["valid_loss"] - 0.1 - 0.02 * moved["seed"])
    return pd.concat([top, published_kind, moved.assign(attention_width="narrow", valid_loss=4.5)], ignore_index=True)


def test_placements_stand_beside_the_published_one():
    table = variant_table(variants(2), "original_placement")
    assert table["original_placement"].tolist() == ["last", "top"] and set(table["num_original_layers"]) == {4}
    assert table["row"].tolist() == ["bert-base Nb=4, Ndiv=4", "bert-base Nb=4, Ndiv=4, top"]
    assert table["difference"].tolist() == pytest.approx([0, -0.11]) and table["num_seeds"].tolist() == [2, 2]
    assert table["difference_std_error"].iloc[1] == pytest.approx(0.01), "paired seeds"
    assert variant_table(variants(1), "original_placement")["difference_std_error"].isna().all()
    widths = variant_table(variants(1), "attention_width")
    assert widths["attention_width"].tolist() == ["full", "narrow"] and widths["difference"].iloc[1] > 0


def test_placements_without_variants_are_empty():
    assert len(variant_table(pretraining_rows(), "original_placement")) == 0
    only_top = variants(1)
    only_top = only_top[(only_top["original_placement"] != "last") | only_top["num_original_layers"].isna()]
    assert len(variant_table(only_top, "original_placement")) == 0, "nothing to compare with"


def test_accuracy_table_keeps_what_only_some_runs_have():
    record = dict(
        model="bert-base", num_original_layers=4, num_divisions=4, task="CoLA", metric="mcc", seed=0, score=1.0
    )
    older = accuracy_table([record])
    assert "score_int8" not in older and "attention_width" not in older and older["num_divisions"].dtype == "Int64"
    newer = accuracy_table([record, record | dict(attention_width="narrow", score_int8=0.5, precision="bf16")])
    assert newer["score_int8"].isna().tolist() == [True, False] and newer["attention_width"][1] == "narrow"
    assert list(newer.columns[: len(older.columns)]) == list(older.columns)


def test_pretraining_table_has_structure_seed_and_speed():
    result = SimpleNamespace(
        row=ModelRow("bert-base", 4, 4, "narrow", "top"),
        history=pd.DataFrame({"train_loss": [5.0, 4.0]}),
        hidden_size=128, num_steps=2, tokens=1000, valid_loss=4.0, unigram_loss=5.0, valid_tokens=10, seconds=2.0,
        source="mirror", note="", seed=3, precision="bf16-weights",
    )  # fmt: skip
    row = pretraining_table([result]).iloc[0]
    assert row["attention_width"] == "narrow" and row["original_placement"] == "top" and row["seed"] == 3
    assert row["tokens_per_s"] == 500 and row["precision"] == "bf16-weights"
    assert row["unigram_loss"] == 5.0 and row["unigram_perplexity"] == pytest.approx(math.exp(5.0))


def test_the_wide_table_has_both_values_and_marks_what_is_beyond_noise():
    runs = accuracy_rows(3)
    runs.loc[one(runs, "MNLI", 4, 8), "score"] -= 9 + 0.1 * runs["seed"]
    wide = scores_wide(table_iii(runs, PUBLISHED, pretraining=pretraining_rows(2)))
    assert list(wide) == ["CoLA", "SST-2", "MRPC", "MNLI", "SQuAD", "perplexity"]
    assert wide.loc[("bert-base", "Nb=4, Ndiv=4"), "SST-2"].startswith("92.20 / 73.76 ± 1.50")
    assert wide.loc[("bert-base", "Nb=4, Ndiv=8"), "MNLI"].endswith(" ▼")
    assert wide.loc[("bert-base", "original"), "CoLA"] == "40.43 / 32.34 ± 1.50"
    assert wide.loc[("bert-large", "original"), "CoLA"].endswith("/ not run")
    assert wide.loc[("bert-base", "Nb=1, Ndiv=4"), "perplexity"].endswith("▼"), "of perplexity, less is better"


def test_the_note_of_the_runs_has_each_task_once():
    note = data_note(accuracy_rows(3))
    assert note.startswith("Pre-training: tiny. CoLA: made up; seeds 3.") and note.count("made up") == 5
