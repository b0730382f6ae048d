"""The accuracy side of the comparison (CoFormer 2025, Tables II to V and Fig. 13): one large model, cut in many ways.

A case is a policy with the rule it is boosted by; it is calibrated once a seed, and everything that tables say of it
is read from those runs. Accuracy is measured on the model trained here; latency, energy and memory beside it are of the
policy scaled to DeiT-B (`policy.scale_policy`), predicted or modelled.

By C2 to C4 sub-models share the large model's width, heads and FFN out, so N equal ones have 1/N of its FLOPs together:
a total that 1 to 4 devices can all spend is at most a quarter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
)

from detransformer.cluster.devices import DeviceSpec, cluster_profile
from detransformer.coformer.aggregator import KINDS, aggregator_flops, message_bytes
from detransformer.coformer.booster import BoostConfig, BoostTask, ImageTask, TextTask, weights_hash
from detransformer.coformer.debo import Calibrated, SearchConfig, calibrate_policy, search_policy
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.evaluator import STRATEGY, Latency, energy_j, latency, tdp_w
from detransformer.coformer.fusion import (
    AggregatorConfig,
    Outputs,
    collect_outputs,
    ensemble_accuracy,
    missing_table,
    train_aggregator,
)
from detransformer.coformer.policy import (
    INFINITE,
    Limits,
    Original,
    Policy,
    flops,
    memory_bytes,
    scale_policy,
    uniform_policy,
)
from detransformer.coformer.search import filled
from detransformer.models.configuration import preset_config
from detransformer.planning.profile import ClusterProfile
from detransformer.training.config import FinetuneConfig, ModelRow, PretrainConfig, config_hash, make_config
from detransformer.training.data import TrainingData
from detransformer.training.data.images import ImageData
from detransformer.training.data.reduced import reduced_data
from detransformer.training.finetuning import finetune
from detransformer.training.images import ImageConfig, train_vit
from detransformer.training.pretraining import pretrain_all

SEED_STEP = 10  # sub-model n of a run has the order of seed + n - 1: runs share none
MAIN = "coformer"


@dataclass(frozen=True)
class Lab:
    """What all cases share.

    Args:
        model, task: the trained large model and what it was trained on.
        devices: in the order in which device tables add them; the cluster of the paper first.
        bandwidth_bps: of the links that policies are searched and priced for.
        folder: of everything that is kept.
        priced: sizes by which policies are priced.
        pooling: what devices send of their tokens; a ViT's classifier reads the first.
        train_accuracy: of the large model on samples it was trained on, times 100.
    """

    model: PreTrainedModel
    task: BoostTask
    devices: tuple[DeviceSpec, ...]
    folder: Path
    boosting: BoostConfig
    aggregation: AggregatorConfig
    search: SearchConfig
    bandwidth_bps: float = 1e9
    priced: Original = field(default_factory=lambda: deit_b())
    pooling: str = "first"
    train_accuracy: float = math.nan

    @property
    def original(self) -> Original:
        return Original.of(self.model.config)

    def cluster(self, devices: Sequence[DeviceSpec]) -> ClusterProfile:
        return cluster_profile(devices, "", self.priced, self.bandwidth_bps, pace="roofline")


@dataclass(frozen=True)
class Case:
    """A policy for some devices, the rule its sub-models are boosted by, and how many seeds it is run with.

    `group` is the table that it belongs to.
    """

    group: str
    name: str
    policy: Policy
    devices: tuple[DeviceSpec, ...]
    num_seeds: int
    rule: str = "boosting"


def deit_b() -> Original:
    """DeiT-B: 12 layers of 768 over 197 tokens (Touvron et al. 2021), the sizes of ViT-B/16."""
    return Original.of(ViTConfig())


def image_lab(
    run_path: str | Path,
    data: ImageData,
    vit: Mapping,
    devices: Sequence[DeviceSpec],
    boosting: Mapping,
    aggregation: Mapping,
    search: Mapping,
) -> Lab:
    """A lab around the ViT that notebook 09 trains too (fields of `ImageConfig`), found again in the run's folder."""
    trained = train_vit(make_config(ImageConfig, dict(vit)), data, Path(run_path) / "checkpoints" / "images")
    return Lab(
        AutoModelForImageClassification.from_pretrained(trained.checkpoint).eval(),
        ImageTask(data),
        tuple(devices),
        Path(run_path) / "coformer",
        make_config(BoostConfig, dict(boosting)),
        make_config(AggregatorConfig, dict(aggregation)),
        make_config(SearchConfig, dict(search)),
        train_accuracy=trained.train_accuracy,
    )


# Policies ---------------------------------------------------------------------------------------------------------


def shared_limits(original: Original, cluster: ClusterProfile, share: float) -> Limits:
    """`share` of the large model's FLOPs in all, each device's part by its speed, so that all would end together."""
    rates = [1 / device.compute_s(1.0, STRATEGY) for device in cluster.devices]
    total = share * flops(original.whole, original)
    return Limits(tuple(total * rate / sum(rates) for rate in rates), (INFINITE,) * len(rates))


def find_policy(lab: Lab, devices: Sequence[DeviceSpec], limits: Limits) -> Policy:
    """The best policy that a search finds within `limits`, filled up to them; its history is kept in the folder."""
    cluster = lab.cluster(devices)
    key = config_hash(weights_hash(lab.model), lab.task.fingerprint, lab.search, limits, cluster)
    history = lab.folder / f"search-{len(devices)}-{key}.json"
    history.parent.mkdir(parents=True, exist_ok=True)
    priced = lab.priced
    found = search_policy(lab.model, lab.task, cluster, lab.search, limits, history=history, priced_as=priced)
    return filled(found.best_policy, lab.original, limits)


def device_sets(devices: Sequence[DeviceSpec]) -> dict[int, tuple[DeviceSpec, ...]]:
    """Which devices 1, 2, 3 and 4 of them are: TX2, TX2 and Orin Nano, all three, and a second TX2 (Table V)."""
    by_preset = {spec.preset: spec for spec in devices}
    fast, second = by_preset["jetson-tx2"], by_preset["jetson-orin-nano"]
    another = replace(fast, name=f"{fast.name} 2" if fast.name else "")
    return {1: (fast,), 2: (fast, second), len(devices): tuple(devices), len(devices) + 1: (*devices, another)}


def make_cases(
    lab: Lab, total_share: float, budgets: Sequence[float], rules: Sequence[str], num_seeds: Mapping[str, int]
) -> dict[str, Case]:
    """All cases by name: `coformer`, `uniform` (DeViT), `N devices`, `limit 30%`, `rule none`.

    Args:
        total_share: of the large model's FLOPs, over all devices of a case (`coformer`, `uniform`, `N devices`).
        budgets: the most FLOPs of each of the devices, as a share of the large model's (Fig. 13).
        num_seeds: by group: `main`, `uniform`, `devices`, `budgets`, `rules`.

    Raises:
        ValueError: for a group without a number of seeds.
    """
    missing = {"main", "uniform", "devices", "budgets", "rules"} - set(num_seeds)
    if missing:
        raise ValueError(f"num_seeds lacks {', '.join(sorted(missing))}: give a number of seeds for each group.")
    original, cases = lab.original, {}

    def add(group: str, name: str, policy: Policy, devices, rule: str = "boosting") -> None:
        cases[name] = Case(group, name, policy, tuple(devices), num_seeds[group], rule)

    for count, devices in device_sets(lab.devices).items():
        policy = find_policy(lab, devices, shared_limits(original, lab.cluster(devices), total_share))
        if count == len(lab.devices):
            add("main", MAIN, policy, devices)
        else:
            add("devices", f"{count} device{'s' if count > 1 else ''}", policy, devices)
    alike = Limits.share(original, total_share / len(lab.devices), len(lab.devices))
    add("uniform", "uniform", uniform_policy(original, len(lab.devices), alike), lab.devices)
    for budget in budgets:
        limits = Limits.share(original, budget, len(lab.devices))
        add("budgets", f"limit {budget:.0%}", find_policy(lab, lab.devices, limits), lab.devices)
    for rule in rules:
        add("rules", f"rule {rule}", cases[MAIN].policy, lab.devices, rule)
    return cases


def method_policies(lab: Lab, cases: Mapping[str, Case], published_share: float) -> dict[str, Policy]:
    """By method, what latency is compared of: the policies trained here, and one of the published share of FLOPs."""
    limits = shared_limits(lab.original, lab.cluster(lab.devices), published_share)
    return {
        MAIN: cases[MAIN].policy,
        f"{MAIN}-published": find_policy(lab, lab.devices, limits),
        "devit": cases["uniform"].policy,
        "small": cases["1 device"].policy,
    }


# What a policy costs ----------------------------------------------------------------------------------------------


def times_of(lab: Lab, case: Case) -> Latency:
    """Predicted seconds of the policy scaled to `lab.priced`, pooled features sent."""
    policy = scale_policy(case.policy, lab.original, lab.priced)
    return latency(policy, lab.priced, lab.cluster(case.devices), sent_tokens=1)


def costs_of(lab: Lab, case: Case) -> dict[str, float]:
    """FLOPs as shares of the large model's; latency, energy (modelled) and memory at `lab.priced` sizes."""
    times = times_of(lab, case)
    whole = flops(lab.original.whole, lab.original)
    shares = [flops(config, lab.original) / whole for config in case.policy.sub_models]
    scaled = scale_policy(case.policy, lab.original, lab.priced)
    return {
        "num_devices": case.policy.num_devices,
        "devices": ", ".join(spec.title for spec in case.devices),
        "flops_share": sum(shares),
        "largest_share": max(shares),
        "latency_ms": 1e3 * times.total_s,
        "idle_ms": 1e3 * max(times.idle_s),
        "energy_mj": 1e3 * energy_j(times, tdp_w(case.devices)),
        "memory_mib": max(memory_bytes(config, lab.priced) for config in scaled.sub_models) / 2**20,
        "widths": ", ".join(str(config.hidden_size) for config in case.policy.sub_models),
        "layers": ", ".join(str(config.num_layers) for config in case.policy.sub_models),
    }


def kind_latency_s(lab: Lab, case: Case, kind: str) -> float:
    """Eq. 3 with the messages and the products of another aggregator; devices send pooled features or logits."""
    times, cluster = times_of(lab, case), lab.cluster(case.devices)
    widths = [c.hidden_size for c in scale_policy(case.policy, lab.original, lab.priced).sub_models]
    classes = lab.task.num_classes
    done = [
        seconds
        if number == times.central
        else seconds + cluster.link.collective_s("send", message_bytes(kind, width, classes), len(widths))
        for number, (seconds, width) in enumerate(zip(times.backbone_s, widths, strict=True))
    ]
    work = aggregator_flops(kind, widths, classes, widths[times.central])
    return max(done) + cluster.devices[times.central].compute_s(work, STRATEGY)


# Runs -------------------------------------------------------------------------------------------------------------


def calibrate(lab: Lab, case: Case, seed: int, on_step: Callable | None = None) -> Calibrated:
    """One run of a case: its sub-models boosted, the aggregator on top; what is finished is not repeated."""
    boosting = replace(lab.boosting, seed=SEED_STEP * seed, rule=case.rule)
    folder = lab.folder / "sub-models"
    return calibrate_policy(
        lab.model, case.policy, lab.task, boosting, lab.aggregation, folder, pooling=lab.pooling, on_step=on_step
    )


def calibrate_all(lab: Lab, case: Case) -> list[Calibrated]:
    """All runs of a case, a seed each."""
    return [calibrate(lab, case, seed) for seed in range(case.num_seeds)]


def run_row(case: Case, seed: int, run: Calibrated) -> dict:
    """Accuracy (times 100) of all together, of the best and the mean sub-model alone, and what training took.

    `accuracy` is of the test samples; `held_out_accuracy`, of training samples held out, is what recipes are chosen by.
    """
    alone = run.test.accuracies
    return {
        "group": case.group,
        "case": case.name,
        "rule": case.rule,
        "seed": seed,
        "accuracy": run.accuracy,
        "held_out_accuracy": run.held_out_accuracy,
        "best_alone": max(alone),
        "mean_alone": sum(alone) / len(alone),
        "num_steps": run.boosted[0].num_steps,
        "seconds": sum(result.seconds for result in run.boosted),
    }


def run_rows(lab: Lab, cases: Mapping[str, Case], main: Sequence[Calibrated]) -> pd.DataFrame:
    """A row a case and seed, with the costs of its policy; `main` are the runs of case `coformer`."""
    rows = []
    for case in cases.values():
        runs = main if case.name == MAIN else (calibrate(lab, case, seed) for seed in range(case.num_seeds))
        costs = costs_of(lab, case)
        rows += [run_row(case, seed, run) | costs for seed, run in enumerate(runs)]
    return pd.DataFrame(rows)


def recipe_rows(lab: Lab, cases: Mapping[str, Case], recipes: Sequence[Mapping], num_seeds: int) -> pd.DataFrame:
    """Cases that are there already, calibrated by other recipes: the columns of `run_rows`, and `recipe`.

    Args:
        recipes: fields of `BoostConfig` that differ from the lab's, and `cases`, names of those to calibrate so
            (`coformer` alone where none are given), and `num_seeds` where they are others.
        num_seeds: at most; no more than the case has.

    Raises:
        ValueError: for a case or a field that there is not.
    """
    rows = []
    for recipe in map(dict, recipes):
        names, most = recipe.pop("cases", [MAIN]), recipe.pop("num_seeds", num_seeds)
        unknown = set(names) - set(cases)
        if unknown:
            raise ValueError(f"a recipe is for {sorted(unknown)}, which are no cases: choose of {', '.join(cases)}.")
        boosting = make_config(BoostConfig, asdict(lab.boosting) | recipe)
        changed = replace(lab, boosting=boosting)
        words = {"recipe": recipe_name(boosting)}
        for case in (cases[name] for name in names):
            costs = costs_of(changed, case)
            seeds = range(min(most, case.num_seeds))
            rows += [run_row(case, seed, calibrate(changed, case, seed)) | words | costs for seed in seeds]
    return pd.DataFrame(rows)


def recipe_name(boosting: BoostConfig) -> str:
    return f"{boosting.num_steps} steps, {boosting.target} targets"


def model_row(lab: Lab) -> dict[str, float]:
    """The large model itself: accuracy on test and training samples, and as DeiT-B on the TX2 what `costs_of` says."""
    whole = Case("model", "large model", Policy((lab.original.whole,)), device_sets(lab.devices)[1], 1)
    outputs = collect_outputs([lab.model], lab.task, "test", lab.folder / "sub-models", pooling=lab.pooling)
    accuracy = {"accuracy": outputs.accuracies[0], "train_accuracy": lab.train_accuracy}
    return {"case": whole.name} | accuracy | costs_of(lab, whole)


def ablation_rows(lab: Lab, case: Case, runs: Sequence[Calibrated]) -> pd.DataFrame:
    """Table III: sub-models as they were cut and calibrated, alone and aggregated; one row a seed.

    Columns: part (`sub-model N`, `all`), calibrated, seed, accuracy (times 100), latency_ms (predicted).
    """
    times, rows = times_of(lab, case), []
    parts = [*(f"sub-model {n}" for n in range(1, case.policy.num_devices + 1)), "all"]
    latencies = [*(1e3 * seconds for seconds in times.backbone_s), 1e3 * times.total_s]
    cut, folder = decompose(lab.model, case.policy), lab.folder / "sub-models"
    train, test = (collect_outputs(cut, lab.task, split, folder, pooling=lab.pooling) for split in ("train", "test"))

    def add(calibrated: bool, seed: int, outputs: Outputs, together: float) -> None:
        for part, milliseconds, accuracy in zip(parts, latencies, [*outputs.accuracies, together], strict=True):
            row = {"part": part, "calibrated": calibrated, "seed": seed}
            rows.append(row | {"accuracy": accuracy, "latency_ms": milliseconds})

    for seed, run in enumerate(runs):
        aggregator = _trained(lab, MAIN, train, seed)
        add(False, seed, test, ensemble_accuracy(aggregator, test.features, test.logits, test.labels))
        add(True, seed, run.test, run.accuracy)
    return pd.DataFrame(rows)


def aggregator_rows(lab: Lab, case: Case, runs: Sequence[Calibrated]) -> pd.DataFrame:
    """Table IV: every aggregator on the same calibrated sub-models; columns kind, seed, accuracy, latency_ms."""
    rows = []
    for seed, run in enumerate(runs):
        for kind in KINDS:
            aggregator = run.aggregator if kind == MAIN else _trained(lab, kind, run.train, seed)
            accuracy = ensemble_accuracy(aggregator, run.test.features, run.test.logits, run.test.labels)
            row = {"kind": kind, "seed": seed, "accuracy": accuracy}
            rows.append(row | {"latency_ms": 1e3 * kind_latency_s(lab, case, kind)})
    return pd.DataFrame(rows)


def missing_rows(lab: Lab, runs: Sequence[Calibrated], drop: float) -> pd.DataFrame:
    """Accuracy with each device lost: of the aggregator as trained, trained on with `drop`, and of the plain average.

    Columns: aggregator, missing (0: none, else the device from 1), seed, accuracy.
    """
    rows = []
    for seed, run in enumerate(runs):
        dropped = train_aggregator(
            MAIN,
            run.train.features,
            run.train.labels,
            replace(lab.aggregation, drop=drop),
            seed,
            pooling=lab.pooling,
            start=run.aggregator,
        ).aggregator
        average = _trained(lab, "average", run.train, seed)
        for name, aggregator in ((MAIN, run.aggregator), (f"{MAIN}, drop {drop:g}", dropped), ("average", average)):
            rows += [
                {"aggregator": name, "missing": row.missing, "seed": seed, "accuracy": row.accuracy}
                for row in missing_table(aggregator, run.test).itertuples()
            ]
    return pd.DataFrame(rows)


def _trained(lab: Lab, kind: str, outputs: Outputs, seed: int):
    return train_aggregator(
        kind,
        outputs.features,
        outputs.labels,
        lab.aggregation,
        SEED_STEP * seed,
        num_labels=lab.task.num_classes,
        pooling=lab.pooling,
    ).aggregator


# Text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextStudy:
    """A GLUE task for a BERT pre-trained by notebook 02's recipe, and how its sub-models are calibrated.

    Args:
        task: CoLA, SST-2, MRPC or MNLI.
        pretraining: the recipe, by whose hash the checkpoint is found again.
        finetuning, boosting: fields of `FinetuneConfig` and `BoostConfig`.
        vocab_size: as in notebook 02.
        total_share: as in `make_cases`.
    """

    task: str
    pretraining: Mapping
    finetuning: Mapping
    boosting: Mapping
    vocab_size: int | None = 8192
    total_share: float = 0.25
    num_seeds: int = 1


def text_lab(lab: Lab, study: TextStudy, data: TrainingData, run_path: str | Path) -> tuple[Lab, dict]:
    """A lab whose large model is BERT fine-tuned on a task, priced as BERT-Base, and the fine-tuning's scores.

    Devices: the fastest, no more than BERT has heads (C3 gives each sub-model one).
    """
    data = reduced_data(data, study.vocab_size)
    recipe = make_config(PretrainConfig, dict(study.pretraining))
    (pretrained,) = pretrain_all([ModelRow("bert-base")], recipe, data, Path(run_path) / "checkpoints")
    config, folder = make_config(FinetuneConfig, dict(study.finetuning)), Path(run_path) / "coformer-text" / study.task
    scores = finetune(pretrained, study.task, config, data, 0, folder / "teacher", keep_model=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher" / "model").eval()
    devices = device_sets(lab.devices)[min(len(lab.devices), model.config.num_attention_heads)]
    task, boosting = TextTask(data, study.task, config), make_config(BoostConfig, dict(study.boosting))
    sizes = Original.of(preset_config("bert-base"), seq_len=128)
    fields = dict(model=model, task=task, devices=devices, folder=folder, boosting=boosting, priced=sizes)
    return replace(lab, **fields), scores


def text_rows(lab: Lab, study: TextStudy, data: TrainingData, run_path: str | Path) -> pd.DataFrame:
    """CoFormer on text: the fine-tuned BERT, its sub-models together and alone, a row a seed (scores times 100)."""
    made, scores = text_lab(lab, study, data, run_path)
    limits = shared_limits(made.original, made.cluster(made.devices), study.total_share)
    case = Case("text", MAIN, find_policy(made, made.devices, limits), made.devices, study.num_seeds)
    common = {"task": study.task, "metric": made.task.metric, "train_rows": len(made.task.train_labels)}
    rows = [common | {"part": "BERT", "seed": 0, "score": scores["score"], "majority_score": scores["majority_score"]}]
    for seed in range(case.num_seeds):
        run = calibrate(made, case, seed)
        with torch.no_grad():
            decided = run.aggregator(run.test.features, run.test.logits).argmax(-1).numpy()
        rows.append(common | {"part": "all", "seed": seed, "score": made.task.score(decided)} | costs_of(made, case))
        rows += [common | {"part": f"sub-model {b.number}", "seed": seed, "score": b.score} for b in run.boosted]
    return pd.DataFrame(rows)
