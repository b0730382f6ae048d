"""The studies of notebooks 12 and 13: one large model, decomposed in many ways, calibrated once a seed.

Accuracy is measured on the model trained here; latency, energy and memory are predicted or modelled for the policy
scaled to DeiT-B (`method_rows.scale_policy`).
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from coformer_tables import best_recipe
from method_rows import NUM_DIVISIONS, energy_j, original_layers, scale_policy, tdp_w
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, ViTConfig

from detransformer import training
from detransformer.cluster.devices import cluster_profile
from detransformer.cluster.spec import ClusterSpec
from detransformer.coformer.aggregator import CLASSES, Aggregator, aggregator_flops
from detransformer.coformer.booster import BoostConfig, boost
from detransformer.coformer.calibration import (
    AggregatorConfig,
    Calibrated,
    calibrate_policy,
    ensemble_accuracy,
    missing_table,
    train_aggregator,
)
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.outputs import Outputs, collect_outputs, weights_hash
from detransformer.coformer.policy import FLOAT_BYTES, Limits, Original, Policy, flops, memory_bytes
from detransformer.coformer.predictor import STRATEGY, fastest_device, latency, roofline_s
from detransformer.coformer.sampling import filled, uniform_policy
from detransformer.coformer.search import Evaluator, SearchConfig, search_policy, training_batches
from detransformer.coformer.tasks import ImageTask, TextTask
from detransformer.files import repository_root
from detransformer.models.configuration import preset_config
from detransformer.models.conversion import decouple
from detransformer.training.config import FinetuneConfig, ModelRow, config_hash, make_config
from detransformer.training.data.images import open_images
from detransformer.training.data.text import reduced_data
from detransformer.training.finetuning import finetune
from detransformer.training.images import ImageConfig, train_best_vit
from detransformer.training.pretraining import PretrainConfig, pretrain_all

DEIT = Original.of(ViTConfig())  # DeiT-B: 12 layers of 768 over 197 tokens (Touvron et al. 2021)
SEED_STEP = 10  # sub-model n of a run has the sample order of seed + n - 1: runs share no order


@dataclass(frozen=True)
class Lab:
    """A trained classifier, its task, the devices of its sub-models, and how these are calibrated."""

    model: torch.nn.Module
    task: ImageTask | TextTask
    devices: tuple
    folder: Path
    boosting: BoostConfig
    aggregation: AggregatorConfig
    search: SearchConfig
    priced: Original = DEIT  # sizes by which policies are priced
    train_accuracy: float = float("nan")

    @property
    def original(self) -> Original:
        return Original.of(self.model.config)

    def cluster(self, devices: Sequence = ()):
        """Devices and gigabit links, priced by operations and bytes alone."""
        return cluster_profile(devices or self.devices, self.priced, 1e9, pace="roofline")

    def evaluator(self, devices: Sequence = (), predictors: Sequence | None = None) -> Evaluator:
        """Eq. 8 at the priced sizes; delta is one unit of loss for the whole model's time on the fastest device."""
        cluster, batches = self.cluster(devices), training_batches(self.task, self.search.num_rows, self.search.seed)

        def priced_latency(policy: Policy):
            return latency(scale_policy(policy, self.original, self.priced), self.priced, cluster, predictors)

        fastest = cluster.devices[fastest_device(cluster.devices)]
        return Evaluator(self.model, batches, priced_latency, 1 / roofline_s(self.priced.whole, self.priced, fastest))


@dataclass(frozen=True)
class Case:
    """A policy for some devices, the boosting rule of its sub-models, and its number of seeds."""

    name: str
    policy: Policy
    devices: tuple
    num_seeds: int
    rule: str = "boosting"


def image_lab(run, settings: dict) -> Lab:
    """A small ViT trained from scratch on images by the best of some recipes; reused if it is trained already.

    A recipe in `settings["vit_recipes"]` has the fields that differ from `settings["vit"]`.
    """
    torch.set_num_threads(settings["num_threads"])
    data = open_images(settings["source"], cache_dir=run.path / "cache")
    data = data.cut(settings["max_train_rows"], settings["max_test_rows"]).hold_out(settings["held_out_share"])
    ways = [make_config(ImageConfig, settings["vit"] | dict(recipe)) for recipe in settings["vit_recipes"]]
    trained = train_best_vit(ways, data, run.path / "checkpoints" / "images")
    model = AutoModelForImageClassification.from_pretrained(trained.checkpoint).eval()
    devices = ClusterSpec.load(repository_root() / settings["cluster"]).device_specs
    recipes = {"boosting": BoostConfig, "aggregation": AggregatorConfig, "search": SearchConfig}
    made = {name: make_config(kind, settings.get(name, {})) for name, kind in recipes.items()}
    folder = run.path / "coformer"
    return Lab(model, ImageTask(data), devices, folder, **made, train_accuracy=trained.train_accuracy)


# Policies ---------------------------------------------------------------------------------------------------------


def shared_limits(lab: Lab, devices: Sequence, share: float) -> Limits:
    """`share` of the large model's FLOPs in all, each device's part by its speed, so that all would end together."""
    rates = [1 / device.compute_s(1.0, STRATEGY) for device in lab.cluster(devices).devices]
    total = share * flops(lab.original.whole, lab.original)
    return Limits(tuple(total * rate / sum(rates) for rate in rates), (float("inf"),) * len(rates))


def find_policy(lab: Lab, devices: Sequence, limits: Limits) -> Policy:
    """The best policy that a search finds within `limits`, grown to them; its history is kept in the folder."""
    key = config_hash(weights_hash(lab.model), lab.task.fingerprint, lab.search, limits, lab.cluster(devices))
    history = lab.folder / f"search-{len(devices)}-{key}.json"
    found = search_policy(lab.evaluator(devices), lab.original, len(devices), lab.search, limits, history=history)
    return filled(found.best_policy, lab.original, limits)


def main_case(lab: Lab, settings: dict, name: str = "coformer", devices: Sequence = ()) -> Case:
    """A policy with `total_share` of the FLOPs, split over `devices` (default: all of the lab) by speed."""
    devices = tuple(devices or lab.devices)
    limits = shared_limits(lab, devices, settings["total_share"])
    seeds = settings["num_seeds"]["main" if name == "coformer" else "devices"]
    return Case(name, find_policy(lab, devices, limits), devices, seeds)


def make_cases(lab: Lab, settings: dict) -> dict[str, Case]:
    """All cases by name: `coformer` and `N devices` (Table V), `uniform` (DeViT), `limit 30%` (Fig. 13).

    Devices are the TX2, the TX2 and the Orin Nano, all three, and all three with a second TX2.
    """
    by_preset, count = {spec.preset: spec for spec in lab.devices}, len(lab.devices)
    fast, seeds = by_preset["jetson-tx2"], settings["num_seeds"]
    sets = {"1 device": (fast,), "2 devices": (fast, by_preset["jetson-orin-nano"]), "coformer": lab.devices}
    sets |= {"4 devices": (*lab.devices, replace(fast, name=f"{fast.name} 2"))}
    cases = [main_case(lab, settings, name, devices) for name, devices in sets.items()]
    alike = Limits.share(lab.original, settings["total_share"] / count, count)
    cases.append(Case("uniform", uniform_policy(lab.original, count, alike), lab.devices, seeds["uniform"]))
    for budget in settings["budgets"]:
        policy = find_policy(lab, lab.devices, Limits.share(lab.original, budget, count))
        cases.append(Case(f"limit {budget:.0%}", policy, lab.devices, seeds["budgets"]))
    return {case.name: case for case in cases}


def costs(lab: Lab, case: Case) -> dict:
    """FLOPs as shares of the large model's; latency (predicted), energy (modelled) and memory at `lab.priced` sizes."""
    scaled, whole = scale_policy(case.policy, lab.original, lab.priced), flops(lab.original.whole, lab.original)
    times = latency(scaled, lab.priced, lab.cluster(case.devices))
    shares = [flops(config, lab.original) / whole for config in case.policy.sub_models]
    return {
        "num_devices": case.policy.num_devices,
        "flops_share": sum(shares),
        "largest_share": max(shares),
        "latency_ms": 1e3 * times.total_s,
        "energy_mj": 1e3 * energy_j(times, tdp_w(case.devices)),
        "memory_mib": max(memory_bytes(config, lab.priced) for config in scaled.sub_models) / 2**20,
        "widths": ", ".join(map(str, case.policy.widths)),
        "layers": ", ".join(str(config.num_layers) for config in case.policy.sub_models),
    }


# Runs -------------------------------------------------------------------------------------------------------------


def model_row(lab: Lab) -> dict:
    """The large model itself: accuracy on test and training samples, and its costs as DeiT-B on the TX2."""
    (fast,) = [spec for spec in lab.devices if spec.preset == "jetson-tx2"]
    whole = Case("large model", Policy((lab.original.whole,)), (fast,), 1)
    (accuracy,) = collect_outputs([lab.model], lab.task, "test", lab.folder).accuracies
    return {"case": whole.name, "accuracy": accuracy, "train_accuracy": lab.train_accuracy} | costs(lab, whole)


def recipe_of(lab: Lab, case: Case, seed: int = 0, **changes) -> BoostConfig:
    """The lab's recipe with the case's rule and the sample orders of `seed`."""
    return make_config(BoostConfig, asdict(lab.boosting) | {"seed": SEED_STEP * seed, "rule": case.rule} | changes)


def recipe_name(recipe: BoostConfig) -> str:
    """A recipe's name in tables."""
    return f"{recipe.num_steps} steps, {recipe.target} targets"


def calibrate(lab: Lab, case: Case, seed: int, **changes) -> Calibrated:
    """One run of a case: its sub-models boosted, then the aggregator; a finished run is not repeated."""
    recipe = recipe_of(lab, case, seed, **changes)
    return calibrate_policy(lab.model, case.policy, lab.task, recipe, lab.aggregation, lab.folder)


def run_rows(lab: Lab, case: Case, num_seeds: int | None = None, **changes) -> pd.DataFrame:
    """A row a seed: accuracy (times 100) of the ensemble and of the best sub-model alone, costs and seconds.

    `accuracy` is on the test samples; recipes are chosen by `held_out_accuracy`, on held-out training samples.
    """
    rows, price, name = [], costs(lab, case), recipe_name(recipe_of(lab, case, **changes))
    for seed in range(min(num_seeds or case.num_seeds, case.num_seeds)):
        made = calibrate(lab, case, seed, **changes)
        row = {"case": case.name, "rule": case.rule, "recipe": name, "seed": seed}
        row |= {"accuracy": made.accuracy, "held_out_accuracy": made.held_out_accuracy}
        row |= {"best_alone": max(made.test.accuracies), "seconds": sum(part.seconds for part in made.boosted)}
        rows.append(row | price)
    return pd.DataFrame(rows)


def all_runs(lab: Lab, cases: dict[str, Case], settings: dict) -> pd.DataFrame:
    """Runs of all cases by the lab's recipe, and of some by the recipes in `settings`, with fields that differ."""
    frames = [run_rows(lab, case) for case in cases.values()]
    for recipe in map(dict, settings["recipes"]):
        names, seeds = recipe.pop("cases", ["coformer"]), recipe.pop("num_seeds", settings["num_seeds"]["recipes"])
        frames += [run_rows(lab, cases[name], seeds, **recipe) for name in names]
    return pd.concat(frames, ignore_index=True)


def operations(model: torch.nn.Module, task: ImageTask) -> int:
    """Operations of the matrix products of one image."""
    batch, model = next(task.ordered_batches("test", 1)), copy.deepcopy(model)
    model.set_attn_implementation("eager")  # on a CPU, products of fused attention are not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=batch["pixel_values"])
    return counter.get_total_flops()


def decoupled_rows(lab: Lab, case: Case, settings: dict) -> pd.DataFrame:
    """DeTransformer's accuracy: the large model decoupled, and distilled by each recipe; a row a recipe and seed.

    It is decoupled in the priced shape. Its steps take the operations of all of `case`'s sub-models together, so both
    cost the same to distil. `as_cut` is its accuracy before.
    """
    cut = decouple(lab.model, original_layers(lab.original, lab.priced), NUM_DIVISIONS)
    share, rows = operations(cut, lab.task) / operations(lab.model, lab.task), []
    (as_cut,) = collect_outputs([cut], lab.task, "test", lab.folder).accuracies
    for recipe in ({}, *map(dict, settings["recipes"])):
        recipe.pop("cases", None)
        for seed in range(min(case.num_seeds, recipe.pop("num_seeds", settings["num_seeds"]["recipes"]))):
            like = recipe_of(lab, case, seed, **recipe)
            num_steps = max(1, round(like.num_steps * costs(lab, case)["flops_share"] / share))
            (made,) = boost([cut], lab.model, lab.task, replace(like, rule="none", num_steps=num_steps), lab.folder)
            (accuracy,) = collect_outputs([made.model], lab.task, "test", lab.folder).accuracies
            row = {"recipe": recipe_name(like), "seed": seed, "num_steps": num_steps, "flops_share": share}
            rows.append(row | {"as_cut": as_cut, "accuracy": accuracy, "seconds": made.seconds})
    return pd.DataFrame(rows)


def method_policies(lab: Lab, cases: dict[str, Case], published_share: float) -> dict[str, Policy]:
    """The policies whose latency is compared, by method: the trained ones, and one of the published share of FLOPs."""
    limits = shared_limits(lab, lab.devices, published_share)
    own = {"coformer": "coformer", "devit": "uniform", "small": "1 device"}
    policies = {method: cases[name].policy for method, name in own.items()}
    return policies | {"coformer-published": find_policy(lab, lab.devices, limits)}


def method_accuracies(large: float, recipes: pd.DataFrame, decoupled: pd.DataFrame) -> dict[str, float]:
    """Accuracy on the images by method, with the recipe by which methods are compared; exact methods have `large`.

    Args:
        recipes, decoupled: from `recipe_table` and `decoupled_table`.
    """
    best = best_recipe(recipes).set_index("case")
    means, recipe = best["accuracy"], best["recipe"].iloc[0]
    own = {"coformer": means["coformer"], "devit": means["uniform"], "small": means["1 device"]}
    own |= dict.fromkeys(("bp+paper", "bp+auto"), decoupled.set_index("recipe").loc[recipe, "accuracy"])
    return dict.fromkeys(("single", "galaxy", "pp", "auto"), large) | own


# Notebook 13 ------------------------------------------------------------------------------------------------------


def trained(
    lab: Lab, kind: str, outputs: Outputs, seed: int, drop: float = 0.0, start: Aggregator | None = None
) -> Aggregator:
    """An aggregator trained on these outputs of training samples."""
    config = replace(lab.aggregation, drop=drop)
    return train_aggregator(kind, outputs, lab.task.num_classes, config, SEED_STEP * seed, start)[0]


def ablation_rows(lab: Lab, case: Case) -> pd.DataFrame:
    """Table III: sub-models as cut and calibrated, alone and aggregated; one row a part and seed."""
    scaled = scale_policy(case.policy, lab.original, lab.priced)
    times, cut = latency(scaled, lab.priced, lab.cluster(case.devices)), decompose(lab.model, case.policy)
    parts = [*(f"sub-model {n}" for n in range(1, len(cut) + 1)), "all"]
    latencies, rows = [1e3 * seconds for seconds in (*times.backbone_s, times.total_s)], []
    train, test = (collect_outputs(cut, lab.task, split, lab.folder) for split in ("train", "test"))
    for seed in range(case.num_seeds):
        made = calibrate(lab, case, seed)
        as_cut = ensemble_accuracy(trained(lab, "coformer", train, seed), test)
        both = (False, [*test.accuracies, as_cut]), (True, [*made.test.accuracies, made.accuracy])
        for calibrated, accuracies in both:
            for part, latency_ms, accuracy in zip(parts, latencies, accuracies, strict=True):
                row = {"part": part, "calibrated": calibrated, "seed": seed}
                rows.append(row | {"accuracy": accuracy, "latency_ms": latency_ms})
    return pd.DataFrame(rows)


def aggregator_rows(lab: Lab, case: Case) -> pd.DataFrame:
    """Table IV: every aggregator on the same calibrated sub-models; Eq. 3 with its own messages and products."""
    scaled, cluster = scale_policy(case.policy, lab.original, lab.priced), lab.cluster(case.devices)
    times, widths = latency(scaled, lab.priced, cluster), scaled.widths
    central, classes, rows = times.central, lab.task.num_classes, []
    for kind, made_of in CLASSES.items():
        sizes = [FLOAT_BYTES * (width if made_of.learned else classes) for width in widths]
        sent = [cluster.link.collective_s("send", size, len(widths)) for size in sizes]
        sent[central] = 0.0
        fused_s = cluster.devices[central].compute_s(aggregator_flops(kind, widths, classes, widths[central]), STRATEGY)
        total_s = max(map(sum, zip(times.backbone_s, sent, strict=True))) + fused_s
        for seed in range(case.num_seeds):
            made = calibrate(lab, case, seed)
            aggregator = made.aggregator if kind == "coformer" else trained(lab, kind, made.train, seed)
            accuracy = ensemble_accuracy(aggregator, made.test)
            rows.append({"kind": kind, "seed": seed, "accuracy": accuracy, "latency_ms": 1e3 * total_s})
    return pd.DataFrame(rows)


def missing_rows(lab: Lab, case: Case, drop: float) -> pd.DataFrame:
    """Accuracy with each device lost: the aggregator as trained, then trained with `drop`, and the plain average."""
    frames = []
    for seed in range(case.num_seeds):
        made = calibrate(lab, case, seed)
        dropped = trained(lab, "coformer", made.train, seed, drop, start=made.aggregator)
        average = trained(lab, "average", made.train, seed)
        for name, one in (("coformer", made.aggregator), (f"coformer, drop {drop:g}", dropped), ("average", average)):
            frames.append(missing_table(one, made.test).assign(aggregator=name, seed=seed))
    return pd.concat(frames, ignore_index=True)


# Text -------------------------------------------------------------------------------------------------------------


def text_rows(lab: Lab, run, source: str, study: dict) -> pd.DataFrame:
    """CoFormer of a BERT that notebook 02 pre-trained, fine-tuned on a GLUE task: scores times 100, a row a part.

    By C3 there are at most as many devices as heads; the narrow BERTs here have two.
    """
    data = training.open_data(source, cache_dir=run.path / "cache")
    data = reduced_data(data, study.get("vocab_size", 8192))
    recipe = make_config(PretrainConfig, study["pretraining"])
    (pretrained,) = pretrain_all([ModelRow("bert-base")], recipe, data, run.path / "checkpoints")
    task, config = study["task"], make_config(FinetuneConfig, study["finetuning"])
    folder = run.path / "coformer-text" / task
    scores = finetune(pretrained, task, config, data, 0, folder / "teacher", keep_model=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher" / "model").eval()
    devices = lab.devices[1:][: model.config.num_attention_heads]  # TX2 and Orin Nano
    priced, boosting = Original.of(preset_config("bert-base"), 128), make_config(BoostConfig, study["boosting"])
    text = TextTask(data, task, config)
    lab = replace(lab, model=model, task=text, devices=devices, folder=folder, boosting=boosting, priced=priced)
    policy = find_policy(lab, devices, shared_limits(lab, devices, study.get("total_share", 0.25)))
    case, common = Case("text", policy, devices, study["num_seeds"]), {"task": task, "metric": text.metric}
    rows = [common | {"part": "BERT", "seed": 0, "score": scores["score"], "majority_score": scores["majority_score"]}]
    for seed in range(case.num_seeds):
        made = calibrate(lab, case, seed)
        with torch.no_grad():
            decided = made.aggregator(made.test.answers(made.aggregator)).argmax(-1).numpy()
        rows.append(common | {"part": "all", "seed": seed, "score": text.score(decided)} | costs(lab, case))
        for number, score in enumerate(made.scores, start=1):
            rows.append(common | {"part": f"sub-model {number}", "seed": seed, "score": score})
    return pd.DataFrame(rows)
