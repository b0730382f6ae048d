"""The cases of the comparison: limits and filled policies, costs, runs that are kept, aggregators, lost devices."""

import pytest
import torch
from transformers import ViTForImageClassification

from detransformer.cluster.devices import DeviceSpec
from detransformer.coformer import ablation
from detransformer.coformer.ablation import Case, Lab, deit_b, shared_limits
from detransformer.coformer.aggregator import KINDS
from detransformer.coformer.booster import BoostConfig, ImageTask
from detransformer.coformer.debo import SearchConfig
from detransformer.coformer.fusion import AggregatorConfig, collect_outputs
from detransformer.coformer.policy import Limits, Original, Policy, SubModelConfig, flops, uniform_policy, violations
from detransformer.coformer.search import filled
from detransformer.training.data.images import generated_images
from detransformer.training.images import ImageConfig

JETSONS = tuple(DeviceSpec(name) for name in ("jetson-nano", "jetson-tx2", "jetson-orin-nano"))
SMALL = Original(6, 192, 6, 768, seq_len=17, embedding_rows=213, patch_values=192)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    torch.manual_seed(0)
    data = generated_images().cut(120, 48).hold_out(0.2)
    config = ImageConfig(hidden_size=48, num_layers=6, num_heads=6, patch_size=8).vit_config(data.num_classes)
    model = ViTForImageClassification(config).eval()
    boosting = BoostConfig(num_steps=2, global_batch_size=16, micro_batch_size=16)
    search = SearchConfig(num_initial=2, num_iterations=1, num_rows=16)
    folder = tmp_path_factory.mktemp("lab")
    return Lab(model, ImageTask(data), JETSONS, folder, boosting, AggregatorConfig(num_epochs=2), search)


@pytest.fixture(scope="module")
def cases(lab):
    num_seeds = dict(main=2, uniform=1, devices=1, budgets=1, rules=1)
    return ablation.make_cases(lab, 0.25, [0.5], ["none"], num_seeds)


@pytest.fixture(scope="module")
def main(lab, cases):
    return ablation.calibrate_all(lab, cases["coformer"])


def share(config: SubModelConfig, original: Original) -> float:
    return flops(config, original) / flops(original.whole, original)


def test_shared_limits_go_by_speed_and_sum_to_the_share(lab):
    limits = shared_limits(SMALL, lab.cluster(JETSONS), 0.25)
    assert sum(limits.flops) == pytest.approx(0.25 * flops(SMALL.whole, SMALL))
    assert limits.flops[1] / limits.flops[0] == pytest.approx(665.6 / 235.8)


@pytest.mark.parametrize("total", [0.1, 0.25])
def test_a_filled_policy_is_valid_and_near_its_limits(lab, total):
    limits = shared_limits(SMALL, lab.cluster(JETSONS), total)
    start = Policy((SubModelConfig(2, 16, (1, 1), (32, 32)),) * 3)
    policy = filled(start, SMALL, limits)
    assert not violations(policy, SMALL, limits)
    shares = [share(config, SMALL) for config in policy.sub_models]
    assert 0.8 * total < sum(shares) <= total
    assert filled(policy, SMALL, limits) == policy


def test_a_layer_more_takes_what_others_leave(lab):
    start = Policy((SubModelConfig(1, 96, (6,), (768,)), SubModelConfig(2, 96, (0 + 1, 5), (32, 704))))
    policy = Policy((SubModelConfig(1, 96, (5,), (704,)), start.sub_models[1]))
    assert not violations(policy, SMALL)
    grown = filled(policy, SMALL, Limits.share(SMALL, 1.0, 2))
    assert grown.sub_models[0].num_layers == 6 and not violations(grown, SMALL)
    assert grown.sub_models[0].num_heads[1] == 1 and grown.sub_models[0].ffn_sizes[1] == 64


def test_no_two_sub_models_have_the_large_models_flops():
    for count in (2, 3):
        total = sum(share(c, SMALL) for c in uniform_policy(SMALL, count).sub_models)
        assert total == pytest.approx(1 / count, rel=0.1)


def test_devices_are_added_in_the_papers_order():
    sets = ablation.device_sets(JETSONS)
    presets = {count: [spec.preset for spec in devices] for count, devices in sets.items()}
    assert presets[1] == ["jetson-tx2"] and presets[3] == [spec.preset for spec in JETSONS]
    assert presets[2] == ["jetson-tx2", "jetson-orin-nano"] and presets[4].count("jetson-tx2") == 2


def test_cases_are_within_their_limits(lab, cases):
    assert list(cases) == ["1 device", "2 devices", "coformer", "4 devices", "uniform", "limit 50%", "rule none"]
    for name, case in cases.items():
        costs = ablation.costs_of(lab, case)
        assert costs["num_devices"] == len(case.devices) == case.policy.num_devices
        assert costs["flops_share"] <= (0.25 + 1e-9 if "limit" not in name else 1.5)
        assert costs["latency_ms"] > 0 and costs["memory_mib"] > 0
    assert cases["rule none"].policy == cases["coformer"].policy and cases["rule none"].rule == "none"
    assert len(set(cases["uniform"].policy.sub_models)) == 1
    with pytest.raises(ValueError, match="num_seeds lacks budgets"):
        ablation.make_cases(lab, 0.25, [], [], dict(main=1, uniform=1, devices=1, rules=1))


def test_the_whole_model_on_the_tx2_takes_what_is_published(lab):
    model = ablation.model_row(lab)
    assert model["latency_ms"] == pytest.approx(123.48, rel=1e-3) and model["flops_share"] == 1
    assert model["energy_mj"] == pytest.approx(15 * 123.48, rel=1e-3)
    assert deit_b().whole.hidden_size == 768 and deit_b().seq_len == 197


def test_runs_are_kept_and_differ_by_seed(lab, cases, main):
    records = {path: path.stat().st_mtime_ns for path in lab.folder.glob("sub-models/*/result.json")}
    assert len(records) >= 6
    again = ablation.calibrate(lab, cases["coformer"], 1)
    assert again.accuracy == main[1].accuracy
    assert {path: path.stat().st_mtime_ns for path in records} == records
    assert main[0].boosted[0].seed == 0 and main[1].boosted[0].seed == ablation.SEED_STEP


def test_every_case_has_a_row_a_seed_with_its_costs(lab, cases, main):
    few = {name: cases[name] for name in ("coformer", "1 device", "rule none")}
    rows = ablation.run_rows(lab, few, main)
    assert rows.groupby("case").size().to_dict() == {"coformer": 2, "1 device": 1, "rule none": 1}
    assert rows["accuracy"].between(0, 100).all() and (rows["best_alone"] >= rows["mean_alone"]).all()
    assert {"flops_share", "latency_ms", "energy_mj", "memory_mib"} <= set(rows)
    run, task = main[0], lab.task
    held = collect_outputs(run.sub_models, task, "held", pooling=lab.pooling)
    right = run.aggregator(held.features, held.logits).argmax(-1).numpy() == task.held_labels
    assert len(right) == 24 and rows["held_out_accuracy"].iloc[0] == pytest.approx(100 * right.mean())
    assert all(len(batch) == 96 for batch in (task.train_labels, run.train.labels)), "nothing is trained on those"


def test_other_recipes_are_runs_of_their_own(lab, cases, main):
    recipes = [dict(num_steps=4, target="soft", cases=["coformer", "1 device"]), dict(num_steps=2, num_seeds=1)]
    rows = ablation.recipe_rows(lab, cases, recipes, num_seeds=2)
    assert rows.groupby(["recipe", "case"], sort=False).size().to_dict() == {
        ("4 steps, soft targets", "coformer"): 2,
        ("4 steps, soft targets", "1 device"): 1,
        ("2 steps, hard targets", "coformer"): 1,
    }
    assert rows["num_steps"].tolist() == [4] * 3 + [2]
    assert rows["accuracy"].tolist()[3:] == [main[0].accuracy]  # the lab's own recipe: found again
    assert recipes[0]["cases"] == ["coformer", "1 device"]
    with pytest.raises(ValueError, match="no cases.*choose of 1 device"):
        ablation.recipe_rows(lab, cases, [dict(cases=["5 devices"])], 1)
    with pytest.raises(ValueError, match="steps"):
        ablation.recipe_rows(lab, cases, [dict(steps=3)], 1)


def test_ablation_has_sub_models_as_cut_and_calibrated(lab, cases, main):
    rows = ablation.ablation_rows(lab, cases["coformer"], main)
    assert len(rows) == 2 * 2 * 4 and set(rows["part"]) == {"sub-model 1", "sub-model 2", "sub-model 3", "all"}
    own = rows[rows["calibrated"] & (rows["part"] == "all")]["accuracy"]
    assert own.tolist() == [run.accuracy for run in main]
    costs = ablation.costs_of(lab, cases["coformer"])
    assert rows[rows["part"] == "all"]["latency_ms"].iloc[0] == pytest.approx(costs["latency_ms"])


def test_aggregators_share_the_sub_models(lab, cases, main):
    rows = ablation.aggregator_rows(lab, cases["coformer"], main)
    assert list(rows["kind"][: len(KINDS)]) == list(KINDS) and len(rows) == 2 * len(KINDS)
    own = rows[rows["kind"] == "coformer"]
    assert own["accuracy"].tolist() == [run.accuracy for run in main]
    assert own["latency_ms"].iloc[0] == pytest.approx(ablation.costs_of(lab, cases["coformer"])["latency_ms"], rel=1e-3)


def test_each_device_is_lost_once(lab, main):
    rows = ablation.missing_rows(lab, main[:1], 0.3)
    assert set(rows["aggregator"]) == {"coformer", "coformer, drop 0.3", "average"}
    assert rows.groupby("aggregator")["missing"].apply(list).map(lambda found: found == [0, 1, 2, 3]).all()
    full = rows[(rows["aggregator"] == "coformer") & (rows["missing"] == 0)]["accuracy"].iloc[0]
    assert full == main[0].accuracy


def test_methods_have_a_policy_each(lab, cases):
    policies = ablation.method_policies(lab, cases, 0.4)
    assert list(policies) == ["coformer", "coformer-published", "devit", "small"]
    assert policies["small"].num_devices == 1 and policies["coformer-published"].num_devices == 3


def test_seeds_and_steps_of_runs_do_not_overlap(cases):
    most = max(case.policy.num_devices for case in cases.values())
    assert most < ablation.SEED_STEP
    assert isinstance(cases["coformer"], Case)
