"""The helpers of notebooks 11 to 13 on a tiny ViT: cases, runs that are kept, predictors, proxies, searches."""

from types import SimpleNamespace

import coformer_tables as tables
import comparison_studies as comparison
import decomposition_studies as decomposition
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from coformer_cases import JETSONS
from detransformer.coformer.aggregator import KINDS
from detransformer.coformer.booster import BoostConfig
from detransformer.coformer.calibration import AggregatorConfig
from detransformer.coformer.policy import Limits, Original, flops, violations
from detransformer.coformer.predictor import latency
from detransformer.coformer.sampling import sample_policy
from detransformer.coformer.search import METHODS, SearchConfig
from detransformer.coformer.tasks import ImageTask
from detransformer.training.data.images import generated_images
from detransformer.training.images import ImageConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(
    total_share=0.25, budgets=[0.5], recipes=[dict(num_steps=2, target="soft")],
    num_seeds=dict(main=2, uniform=1, devices=1, budgets=1, rules=1, recipes=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    torch.manual_seed(0)
    data = generated_images().cut(120, 48).hold_out(0.2)
    config = ImageConfig(hidden_size=48, num_layers=6, num_heads=6, patch_size=8).vit_config(data.num_classes)
    boosting = BoostConfig(num_steps=2, global_batch_size=16, micro_batch_size=16)
    search = SearchConfig(num_initial=2, num_iterations=1, num_rows=16)
    recipes = boosting, AggregatorConfig(num_epochs=2), search
    model, folder = ViTForImageClassification(config).eval(), tmp_path_factory.mktemp("lab")
    return comparison.Lab(model, ImageTask(data), JETSONS, folder, *recipes)


@pytest.fixture(scope="module")
def cases(lab):
    return comparison.make_cases(lab, SETTINGS)


# Notebooks 12 and 13 ------------------------------------------------------------------------------------------------


def test_every_case_has_a_policy_within_its_limits_and_the_same_total(lab, cases):
    assert list(cases) == ["1 device", "2 devices", "coformer", "4 devices", "uniform", "limit 50%"]
    for case in cases.values():
        assert not violations(case.policy, lab.original) and case.policy.num_devices == len(case.devices)
    limits = comparison.shared_limits(lab, lab.devices, 0.25)
    assert sum(limits.flops) == pytest.approx(0.25 * flops(lab.original.whole, lab.original))
    assert all(0.15 < comparison.costs(lab, case)["flops_share"] <= 0.25 for case in list(cases.values())[:4])
    assert comparison.main_case(lab, SETTINGS) == cases["coformer"], "found again"
    assert set(comparison.method_policies(lab, cases, 0.4)) == {"coformer", "coformer-published", "devit", "small"}


def test_runs_have_a_row_a_seed_and_tables_are_made_of_them(lab, cases):
    few = {name: cases[name] for name in ("1 device", "coformer", "uniform")}
    runs, model = comparison.all_runs(lab, few, SETTINGS), comparison.model_row(lab)
    assert runs.groupby(["recipe", "case"], sort=False).size().tolist() == [1, 2, 1, 1]
    assert runs["accuracy"].between(0, 100).all() and runs["held_out_accuracy"].notna().all()
    records = {path: path.stat().st_mtime_ns for path in lab.folder.rglob("result.json")}
    pd.testing.assert_frame_equal(comparison.all_runs(lab, few, SETTINGS), runs)
    assert {path: path.stat().st_mtime_ns for path in lab.folder.rglob("result.json")} == records, "trained again"
    recipes = tables.recipe_table(runs, model)
    decoupled = comparison.decoupled_rows(lab, cases["coformer"], SETTINGS)
    spent = cases["coformer"].policy.sub_models
    share = sum(flops(sizes, lab.original) for sizes in spent) / flops(lab.original.whole, lab.original)
    assert decoupled["num_steps"].tolist() == [max(1, round(2 * share / decoupled["flops_share"].iloc[0]))] * 2
    # Attention's two products are those of four sub-blocks of full width, all else is the original's.
    extra = 4 * 3 * 4 * 17 * 17 * 48
    whole = flops(lab.original.whole, lab.original)
    assert decoupled["flops_share"].iloc[0] == pytest.approx(1 + extra / whole, rel=0.01)
    decoupled = tables.decoupled_table(decoupled, model)
    assert decoupled["accuracy"].tolist() == [model["accuracy"] - given for given in decoupled["given_up"]]
    accuracies = comparison.method_accuracies(model["accuracy"], recipes, decoupled)
    assert accuracies["galaxy"] == model["accuracy"] and 0 <= accuracies["coformer"] <= 100
    assert accuracies["bp+paper"] == decoupled.set_index("recipe").loc["2 steps, hard targets", "accuracy"]


def test_parts_aggregators_and_lost_devices(lab, cases):
    case = cases["coformer"]
    cut = comparison.ablation_rows(lab, case)
    assert len(cut) == 2 * 2 * 4 and set(cut["part"]) == {"sub-model 1", "sub-model 2", "sub-model 3", "all"}
    kinds = comparison.aggregator_rows(lab, case)
    own = cut[cut["calibrated"] & (cut["part"] == "all")]["accuracy"].tolist()
    assert kinds.loc[kinds["kind"] == "coformer", "accuracy"].tolist() == own and set(kinds["kind"]) == set(KINDS)
    price = comparison.costs(lab, case)["latency_ms"]
    assert kinds["latency_ms"].iloc[0] == pytest.approx(price, rel=1e-3)
    lost = comparison.missing_rows(lab, case, 0.3)
    assert set(lost["aggregator"]) == {"coformer", "coformer, drop 0.3", "average"}
    assert lost.query("aggregator == 'coformer' and missing == 0")["accuracy"].tolist() == own


# Notebook 11 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator(lab):
    return lab.evaluator()


@pytest.fixture(scope="module")
def limits(lab):
    return Limits.share(lab.original, 0.5, 3)


def test_predictors_are_held_against_sub_models_they_have_not_seen(lab):
    pool = decomposition.modelled_pool(lab, 40)
    assert len(pool) == 120 and pool["flops"].iloc[0] == pool["flops"].max(), "the whole model is first"
    predictors, points = decomposition.predictor_points(pool, 20)
    predict = decomposition.predictors_of(lab, predictors)[1]
    assert predict(comparison.DEIT.whole) == pytest.approx(predictors["tx2"].predict(pool[:1])[0])
    assert list(predictors) == ["nano", "tx2", "orin"] and len(points) == 3 * 3 * 10
    assert (predictors["tx2"].predict(pool) > 0).all()
    known = pool.query("device == 'tx2'")
    fitted = decomposition.fit_predictor(known[10:], hidden_sizes=(32, 32), max_iterations=300)
    error = np.sqrt(np.mean((fitted.predict(known[:10]) - known["latency_s"][:10]) ** 2))
    assert error < 0.5 * known["latency_s"][:10].std(), "sub-models that no fit has seen"
    table = decomposition.predictor_table(points).set_index(["device", "predictor"])
    part = points[(points["device"] == "tx2") & (points["predictor"] == "published")]
    rmse = np.sqrt(np.mean((part["predicted_s"] - part["latency_s"]) ** 2))
    row = table.loc[("tx2", "published")]
    assert row["rmse_ms"] == pytest.approx(1e3 * rmse) and row["noise_ms"] == 0
    assert row["rmse_of_whole_pct"] == pytest.approx(100 * rmse / part["whole_s"].iloc[0])


def test_this_machine_is_timed_until_time_is_up():
    config = ViTConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=96, image_size=32)
    frame = decomposition.timed_pool(config, 30, limit_s=0.0, num_repeats=2)
    assert len(frame) == 12 and set(frame["kind"]) == {"measured"}
    assert (frame["latency_s"] > 0).all() and (frame["spread_s"] >= 0).all()
    pool = decomposition.model_pool(Original.of(config), 40)
    assert pool[0] == Original.of(config).whole and len(set(pool)) == 40


def test_a_probe_reads_features():
    def forward(pixel_values, labels):
        return SimpleNamespace(logits=model.base_model(pixel_values))

    model = torch.nn.Module()
    model.config = ViTConfig()
    model.base_model = torch.nn.Flatten(2)  # its features are the pixels
    model.base_model.forward = lambda pixel_values: (pixel_values,)
    model.forward = forward

    def batch(seed):
        labels = torch.arange(32) % 4
        noise = torch.randn(32, 1, 4, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": torch.nn.functional.one_hot(labels, 4)[:, None] + 0.05 * noise, "labels": labels}

    assert decomposition.probe_error(model, [batch(0), batch(1)]) == 0
    turned = batch(1) | {"labels": batch(1)["labels"].flip(0)}
    assert decomposition.probe_error(model, [batch(0), turned]) == 100


def test_proxies_of_policies_and_their_correlations(lab, evaluator, limits, tmp_path):
    settings = dict(num_policies=3, few_steps=1, probe_rows=64)
    points = decomposition.proxy_points(lab, evaluator, lab.task, tmp_path, limits, settings)
    assert len(points) == 3 == points["policy"].nunique() and points[list(decomposition.PROXIES)].notna().all(axis=None)
    assert points[["error_alone", "error_together"]].stack().between(0, 100).all()
    error = np.random.default_rng(0).uniform(50, 90, 40)
    points = pd.DataFrame(dict(error_alone=error, error_together=error - 5, probe_error=error, log_flops=-error))
    points = points.assign(loss=np.random.default_rng(1).normal(size=40), loss_after_steps=error**3)
    table = decomposition.correlations(points).set_index(["target", "proxy"]).loc["error_alone"]
    assert table.loc["probe_error", "pearson"] == pytest.approx(1) and table.loc["log_flops", "pearson"] < -0.99
    assert table.loc["loss_after_steps", "spearman"] == pytest.approx(1)
    assert table.loc["loss", "pearson_low"] < 0 < table.loc["loss", "pearson_high"]


def test_delta_balances_loss_and_latency(lab, evaluator, limits):
    weighted, rng = decomposition.balanced(lab, evaluator, limits, 4), np.random.default_rng([0, 8])
    found = [weighted(sample_policy(rng, lab.original, limits, 3)) for _ in range(4)]
    assert np.std([e.loss for e in found]) == pytest.approx(weighted.delta * np.std([e.latency_s for e in found]))


def test_searches_start_alike_and_go_on(lab, evaluator, limits, tmp_path):
    history = decomposition.search_history(lab, evaluator, limits, tmp_path, num_seeds=2)
    assert history.groupby(["method", "seed"]).size().eq(3).all() and set(history["method"]) == set(METHODS)
    assert (history["best_objective"] == history.groupby(["method", "seed"])["objective"].cummin()).all()
    leader = history.loc[history.query("method == 'random' and seed == 1")["objective"].idxmin()]
    last = history.query("method == 'random' and seed == 1").iloc[-1]
    assert last[["best_loss", "best_latency_s"]].tolist() == leader[["loss", "latency_s"]].tolist()
    again = decomposition.search_history(lab, evaluator, limits, tmp_path, num_seeds=2)
    pd.testing.assert_frame_equal(history, again)
    best = decomposition.best_policies(history)
    assert set(best) == set(METHODS) and len(set(best["uniform"].sub_models)) == 1
    policies = decomposition.policy_rows(best, lab, evaluator)
    ends = policies.groupby("method")[["backbone_ms", "send_ms", "idle_ms"]].sum().sum(axis=1) / 3
    times = latency(best["random"], lab.original, lab.cluster())
    assert policies["device"].tolist()[:3] == ["nano", "tx2", "orin"] and (ends > 0).all() and times.central == 1


def test_the_search_table_counts_seeds():
    def rows(method, seed, values):
        best = np.minimum.accumulate(values)
        made = dict(method=method, seed=seed, evaluation=range(len(values)), best_objective=best, best_loss=best)
        return pd.DataFrame(made | dict(best_latency_s=0.01))

    history = [rows("bayesian", 0, [5, 3, 1]), rows("bayesian", 1, [5, 4, 4]), rows("random", 0, [5, 3, 2])]
    table = decomposition.search_table(pd.concat([*history, rows("random", 1, [5, 3, 3])])).set_index("method")
    assert table.loc["bayesian", ["wins", "ahead", "num_seeds"]].tolist() == [1, 1, 2]
    assert table.loc["random", ["wins", "ahead"]].tolist() == [2, 0]
    assert table.loc["random", "evaluations_to_rival"] == 2.5 and np.isnan(
        table.loc["bayesian", "evaluations_to_rival"]
    )
    assert table.loc["bayesian", "objective"] == 2.5 and table.loc["bayesian", "latency_ms"] == 10
