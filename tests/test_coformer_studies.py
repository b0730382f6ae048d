"""The studies of notebook 09 on a tiny ViT: what is held out, what correlates, what a search finds, what is broken."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import ViTConfig, ViTForImageClassification

from detransformer.cluster.devices import DeviceSpec
from detransformer.coformer import studies
from detransformer.coformer.booster import BoostConfig, ImageTask
from detransformer.coformer.debo import SearchConfig, make_evaluator
from detransformer.coformer.evaluator import LatencyPredictor
from detransformer.coformer.policy import Limits, Original, Policy, flops, parameters, sample_policy
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.training.data.images import generated_images

CONFIG = ViTConfig(
    hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=96, image_size=32, patch_size=16,
    num_labels=20,
)  # fmt: skip
ORIGINAL = Original.of(CONFIG)
LARGE = replace(ORIGINAL, num_layers=8, hidden_size=96, num_heads=12, ffn_size=192)
DEVICES = tuple(DeviceProfile(name, 2**30, rate, "test") for name, rate in (("a", 1e9), ("b", 3e9), ("c", 2e9)))
CLUSTER = ClusterProfile(DEVICES, LinkProfile(100e6))
LIMITS = Limits.share(ORIGINAL, 0.5, 3)
CONFIGURED = SearchConfig(num_initial=3, num_iterations=3, num_rows=64)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def task():
    return ImageTask(generated_images().cut(128, 60))


@pytest.fixture(scope="module")
def evaluator(task):
    torch.manual_seed(0)
    model = ViTForImageClassification(CONFIG).eval()
    return make_evaluator(model, task, CLUSTER, CONFIGURED, priced_as=LARGE)


# Latency ---------------------------------------------------------------------------------------------------------


def test_the_pool_has_the_whole_model_first_and_nothing_twice():
    pool = studies.model_pool(ORIGINAL, 40)
    assert pool[0] == ORIGINAL.whole and len(set(pool)) == 40
    assert pool == studies.model_pool(ORIGINAL, 40) != studies.model_pool(ORIGINAL, 40, seed=1)
    assert max(flops(config, ORIGINAL) for config in pool) == flops(ORIGINAL.whole, ORIGINAL)


def test_devices_are_profiled_on_the_same_sub_models_and_called_modelled():
    frame = studies.modelled_pool([DeviceSpec("jetson-nano"), DeviceSpec("jetson-tx2")], ORIGINAL, 15)
    first, second = (part.reset_index(drop=True) for _, part in frame.groupby("device", sort=False))
    assert first["flops"].equals(second["flops"]) and (first["latency_s"] > second["latency_s"]).all()
    assert set(frame["kind"]) == {"modelled"} and (frame["source"].str.startswith("roofline: ")).all()


def test_this_machine_is_timed_until_time_is_up():
    frame = studies.measured_pool(CONFIG, 30, limit_s=0.0, num_repeats=2)
    assert len(frame) == studies.MIN_TIMED and set(frame["kind"]) == {"measured"}
    assert (frame["latency_s"] > 0).all() and (frame["spread_s"] >= 0).all() and set(frame["device"]) == {studies.HOST}
    with pytest.raises(ValueError, match="num_repeats=1"):
        studies.measured_pool(CONFIG, 30, num_repeats=1)


def test_what_is_timed_has_the_sizes_asked_for():
    for sizes in studies.model_pool(ORIGINAL, 5):
        model = studies.random_backbone(CONFIG, sizes)
        assert sum(p.numel() for p in model.parameters()) == parameters(sizes, ORIGINAL)
        assert model.config.num_hidden_layers == sizes.num_layers
        assert len(studies.forward_s(model, torch.randn(1, 3, 32, 32), 2)) == 2


def test_predictors_are_held_against_sub_models_they_have_not_seen():
    pool = studies.modelled_pool([DeviceSpec("jetson-tx2")], ORIGINAL, 60)
    study = studies.predictor_study(pool, ORIGINAL, max_iterations=60)
    assert list(study.predictors) == [DeviceSpec("jetson-tx2").title]
    assert isinstance(study.predictors[DeviceSpec("jetson-tx2").title], LatencyPredictor)
    assert set(study.points["predictor"]) == {*studies.FEATURES, studies.LINE}
    assert (study.points["num_train"] == 45).all() and len(study.points) == 3 * 15
    table = studies.predictor_table(study.points).set_index("predictor")
    part = study.points[study.points["predictor"] == "published"]
    rmse = np.sqrt(np.mean((part["predicted_s"] - part["latency_s"]) ** 2))
    row = table.loc["published"]
    assert row["rmse_ms"] == pytest.approx(1e3 * rmse) and row["num_test"] == 15 and row["noise_ms"] == 0
    assert row["rmse_of_whole_pct"] == pytest.approx(100 * rmse / pool["latency_s"].iloc[0])
    assert row["rmse_of_mean_pct"] < 25  # it has learned the sizes, in few iterations
    with pytest.raises(ValueError, match="train_share=1.0"):
        studies.predictor_study(pool, ORIGINAL, train_share=1.0)


# Accuracy --------------------------------------------------------------------------------------------------------


def test_a_probe_reads_what_features_say(evaluator):
    class Model:
        """Its features are the pixels."""

        def eval(self):
            return self

        def base_model(self, pixel_values):
            return SimpleNamespace(last_hidden_state=pixel_values)

    def batch(seed):
        labels = torch.arange(32) % 4
        noise = torch.randn(32, 1, 4, generator=torch.Generator().manual_seed(seed))
        return {
            "pixel_values": torch.nn.functional.one_hot(labels, 4)[:, None].float() + 0.05 * noise,
            "labels": labels,
        }

    assert studies.probe_error(Model(), [batch(0), batch(1)]) == 0
    shuffled = batch(1) | {"labels": batch(1)["labels"].flip(0)}
    assert studies.probe_error(Model(), [batch(0), shuffled]) == 100


def test_proxies_and_errors_of_policies(evaluator, task, tmp_path):
    boosting = BoostConfig(num_steps=3, global_batch_size=16, micro_batch_size=16, mixed_precision="no")
    made = dict(num_policies=3, few_steps=1, probe_rows=128)
    points = studies.proxy_points(evaluator, task, boosting, tmp_path, LIMITS, **made)
    assert len(points) == 3 and points["policy"].nunique() == 3
    assert {*studies.PROXIES, *studies.TARGETS} <= set(points) and points[[*studies.PROXIES]].notna().all(axis=None)
    first = Policy.from_dict(json.loads(points["policy"].iloc[0]))
    assert points["loss"].iloc[0] == pytest.approx(evaluator(first).loss, rel=1e-5)
    assert points["log_flops"].iloc[0] == pytest.approx(
        np.mean([np.log10(flops(config, ORIGINAL)) for config in first.sub_models])
    )
    assert points["error_alone"].between(0, 100).all() and points["error_together"].between(0, 100).all()
    again = studies.proxy_points(evaluator, task, boosting, tmp_path, LIMITS, **made)  # nothing is trained again
    same = [*studies.PROXIES, *studies.TARGETS, "seconds_calibration", "policy"]
    pd.testing.assert_frame_equal(points[same], again[same])


def test_correlations_and_their_intervals():
    rng = np.random.default_rng(0)
    error = rng.uniform(50, 90, 40)
    points = pd.DataFrame(dict(error_alone=error, error_together=error - 5))
    points = points.assign(loss=rng.normal(size=40), probe_error=error, loss_after_steps=error**3, log_flops=-error)
    points = points.assign(seconds_calibration=2.0, **{f"seconds_{name}": 0.1 for name in studies.PROXIES})
    table = studies.proxy_table(points, num_resamples=300).set_index(["target", "proxy"]).loc["error_alone"]
    assert table.loc["probe_error", "pearson"] == pytest.approx(1)
    assert table.loc["log_flops", "pearson_high"] == pytest.approx(-1) and table.loc["log_flops", "expected_sign"] == -1
    assert table.loc["loss_after_steps", "spearman_low"] == pytest.approx(1)
    assert table.loc["loss_after_steps", "pearson"] < 1
    assert table.loc["loss", "pearson_low"] < 0 < table.loc["loss", "pearson_high"]
    still = studies.proxy_table(points.assign(loss=1.0), num_resamples=20).set_index(["target", "proxy"])
    assert np.isnan(still.loc[("error_alone", "loss"), "pearson"])


# Search ----------------------------------------------------------------------------------------------------------


def test_delta_balances_loss_and_latency(evaluator):
    weighted = studies.balanced(evaluator, LIMITS, 8)
    rng = np.random.default_rng([0, 8])
    found = [weighted(sample_policy(rng, ORIGINAL, LIMITS, 3)) for _ in range(8)]
    assert np.std([e.loss for e in found]) == pytest.approx(weighted.delta * np.std([e.latency_s for e in found]))
    with pytest.raises(ValueError, match="1 random policies"):
        studies.balanced(evaluator, LIMITS, 1)


def test_searches_start_alike_go_on_and_are_counted(evaluator, task, tmp_path):
    history = studies.search_study(evaluator, task, CONFIGURED, LIMITS, tmp_path, num_seeds=2)
    assert history.groupby(["method", "seed"]).size().eq(6).all() and set(history["method"]) == set(studies.SEARCHES)
    starts = history[history["evaluation"] < 3].groupby(["seed", "evaluation"])
    for _, rows in starts:
        assert rows.loc[rows["method"] != "uniform", "policy"].nunique() == 1
    pd.testing.assert_frame_equal(
        history, studies.search_study(evaluator, task, CONFIGURED, LIMITS, tmp_path, num_seeds=2)
    )
    assert len(list(tmp_path.iterdir())) == 1
    other = replace(evaluator, delta=2 * evaluator.delta)
    studies.search_study(other, task, CONFIGURED, LIMITS, tmp_path, num_seeds=1, methods=["random"])
    assert len(list(tmp_path.iterdir())) == 2  # of another objective nothing is taken over
    best = studies.best_policies(history)
    assert set(best) == set(studies.SEARCHES) and len(set(best["uniform"].sub_models)) == 1
    with pytest.raises(ValueError, match="'genetic' is unknown"):
        studies.search_study(evaluator, task, CONFIGURED, LIMITS, tmp_path, methods=["genetic"])


def test_the_search_table_counts_seeds():
    def rows(method, seed, values):
        best = np.minimum.accumulate(values)
        made = dict(method=method, seed=seed, evaluation=range(len(values)), objective=values, best_objective=best)
        return pd.DataFrame(made | dict(best_loss=best, best_latency_s=0.01))

    history = pd.concat(
        [
            *[rows("bayesian", 0, [5, 3, 1]), rows("bayesian", 1, [5, 4, 4])],
            *[rows("random", 0, [5, 3, 2]), rows("random", 1, [5, 3, 3])],
        ]
    )
    table = studies.search_table(history).set_index("method")
    assert table.loc["bayesian", ["wins", "ahead", "num_seeds"]].tolist() == [1, 1, 2]
    assert table.loc["random", ["wins", "ahead"]].tolist() == [2, 0]
    assert table.loc["random", "evaluations_to_rival"] == 2.5
    assert table.loc["bayesian", "objective"] == 2.5 and table.loc["bayesian", "latency_ms"] == 10
    assert "wins" not in studies.search_table(history[history["method"] == "bayesian"])


# Policies --------------------------------------------------------------------------------------------------------


def test_a_policy_is_told_device_by_device(evaluator):
    policy = sample_policy(np.random.default_rng(0), ORIGINAL, LIMITS, 3)
    table = studies.policy_table({"random": policy}, evaluator, LIMITS)
    times = evaluator.latency(policy)
    assert table["device"].tolist() == ["a", "b", "c"] and table["central"].tolist() == [False, True, False]
    assert table["backbone_ms"].tolist() == pytest.approx([1e3 * s for s in times.backbone_s])
    assert table["backbone_ms"].tolist() == pytest.approx(table["roofline_ms"].tolist())  # there is no predictor
    assert table["num_layers"].tolist() == [2 * config.num_layers for config in policy.sub_models]  # as it is priced
    assert (table["searched_flops_share"] <= table["max_flops_share"]).all() and (table["max_flops_share"] == 0.5).all()
    ends = table[["backbone_ms", "send_ms", "idle_ms"]].sum(axis=1)
    assert ends.tolist() == pytest.approx([ends.iloc[0]] * 3)
    assert ends.iloc[0] + table["aggregate_ms"].sum() == pytest.approx(table["total_ms"].iloc[0])


def test_a_broken_policy_breaks_every_constraint(evaluator):
    policy = sample_policy(np.random.default_rng(0), ORIGINAL, LIMITS, 3)
    table = studies.constraint_table(policy, ORIGINAL).set_index(["policy", "constraint"])
    assert (table.loc["found", "violations"] == 0).all()
    broken = table.loc["broken on purpose"]
    assert broken.index.tolist() == ["C1", "C2", "C3", "C4", "C5", "C6"] and (broken["violations"] > 0).all()
    assert all(row["first"].startswith(f"{name}:") for name, row in broken.iterrows())
