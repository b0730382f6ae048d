"""The studies of notebook 11: latency predictors, proxies of accuracy, searches; tables with one row a fact."""

import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from comparison_studies import DEIT, Lab
from method_rows import scale_policy
from scipy.stats import BootstrapMethod, pearsonr, spearmanr
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from threadpoolctl import threadpool_limits
from transformers import ViTConfig

from detransformer.coformer.aggregator import features_and_logits, make_aggregator
from detransformer.coformer.booster import boost
from detransformer.coformer.calibration import ensemble_accuracy
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.outputs import collect_outputs, weights_hash
from detransformer.coformer.policy import (
    FLOAT_BYTES,
    Limits,
    Original,
    Policy,
    SubModelConfig,
    flops,
    memory_bytes,
    parameters,
)
from detransformer.coformer.predictor import latency, roofline_s
from detransformer.coformer.sampling import sample_policy
from detransformer.coformer.search import (
    METHODS,
    Evaluator,
    SearchResult,
    search_policy,
    training_batches,
    validation_loss,
)
from detransformer.coformer.submodels import CoformerViTForImageClassification, sub_model_config
from detransformer.training.config import config_hash
from detransformer.typed_json import from_json

PUBLISHED_FEATURES = ("num_layers", "hidden_size", "mean_heads", "mean_ffn_size")  # supplementary A
DERIVED_FEATURES = ("flops", "weight_bytes")
PROXIES = {"loss": 1, "probe_error": 1, "loss_after_steps": 1, "log_flops": -1}  # sign of the relation to the error


# The latency predictor ------------------------------------------------------------------------------------------


def describe(config: SubModelConfig, original: Original) -> dict[str, float]:
    """The predictor's inputs; FLOPs and weights follow from the four published features."""
    described = {name: getattr(config, name) for name in PUBLISHED_FEATURES}
    weight_bytes = FLOAT_BYTES * parameters(config, original)
    return described | {"flops": flops(config, original), "weight_bytes": weight_bytes}


def fit_predictor(
    frame: pd.DataFrame,
    features: Sequence[str] = PUBLISHED_FEATURES + DERIVED_FEATURES,
    hidden_sizes: tuple[int, ...] = (600, 600),
    max_iterations: int = 500,
) -> Pipeline:
    """f(C_n) of Eq. 4: a multi-layer perceptron with ReLU from a sub-model's sizes to its latency on one device.

    The paper (supplementary A) says "a three-layer MLP with 600 hidden dimension", read here as three matrices, over
    l, d and the mean heads and FFN width. FLOPs and weights may be given too: they are products of the four, which a
    small network learns slowly. Features and latency enter as standardised logarithms.

    Args:
        frame: rows of `describe` with their `latency_s`.

    Returns:
        A regressor: `predict(frame)` gives the seconds of each row.
    """
    # Adam stops when the training loss stagnates; no points are held out for this, since a small pool has few.
    network = MLPRegressor(
        hidden_layer_sizes=hidden_sizes,
        learning_rate_init=2e-3,
        batch_size=min(64, len(frame)),
        max_iter=max_iterations,
        tol=1e-6,
        n_iter_no_change=30,
        random_state=0,
    )
    log_seconds = make_pipeline(FunctionTransformer(np.log, np.exp), StandardScaler())
    target = TransformedTargetRegressor(network, transformer=log_seconds)
    chosen = make_column_transformer((FunctionTransformer(np.log), list(features)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # only the error on held-out points counts
        return make_pipeline(chosen, StandardScaler(), target).fit(frame, frame["latency_s"].to_numpy(float))


def model_pool(original: Original, count: int, seed: int = 0) -> list:
    """`count` different sub-models of random policies for one to three devices, the whole model first."""
    rng, pool = np.random.default_rng([seed, 16]), {original.whole: None}
    while len(pool) < count:
        pool |= dict.fromkeys(sample_policy(rng, original, None, int(rng.integers(1, 4))).sub_models)
    return list(pool)[:count]


def modelled_pool(lab: Lab, count: int) -> pd.DataFrame:
    """The rooflines of all devices for the same sub-models of DeiT-B's size."""
    rows = []
    for device in lab.cluster().devices:
        known = {"device": device.name, "kind": "modelled", "source": f"roofline: {device.source}", "spread_s": 0.0}
        for sizes in model_pool(DEIT, count):
            rows.append(known | describe(sizes, DEIT) | {"latency_s": roofline_s(sizes, DEIT, device)})
    return pd.DataFrame(rows)


@torch.inference_mode()
def timed_pool(config: ViTConfig, num_configs: int, limit_s: float, num_repeats: int) -> pd.DataFrame:
    """Random-weight ViT sub-models timed on this machine for `limit_s`; the median of repeats, and their spread."""
    rows, start, original = [], time.perf_counter(), Original.of(config)
    pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size)
    for sizes in model_pool(original, num_configs):
        if len(rows) >= 12 and time.perf_counter() - start > limit_s:  # fewer fit no predictor
            break
        layers = list(range(sizes.num_layers))
        model = CoformerViTForImageClassification(sub_model_config(config, sizes, layers)).eval()
        seconds = []
        for _ in range(num_repeats + 1):
            before = time.perf_counter()
            model(pixel_values=pixels)
            seconds.append(time.perf_counter() - before)
        row = {"device": "this machine", "kind": "measured", "source": "timed", **describe(sizes, original)}
        rows.append(row | {"latency_s": statistics.median(seconds[1:]), "spread_s": statistics.stdev(seconds[1:])})
    return pd.DataFrame(rows)


def predictor_points(pool: pd.DataFrame, max_iterations: int) -> tuple[dict, pd.DataFrame]:
    """Predictors by device, with all features, and predictions for a held-out quarter of its sub-models.

    Feature sets are the published four, and these with FLOPs and weights; a straight line over FLOPs is a baseline.
    """
    features = {"published": PUBLISHED_FEATURES, "published, FLOPs, weights": PUBLISHED_FEATURES + DERIVED_FEATURES}
    predictors, points = {}, []
    for device, rows in pool.groupby("device", sort=False):
        order = np.random.default_rng([0, 0]).permutation(len(rows))
        cut = round(0.75 * len(rows))
        train, test = rows.iloc[np.sort(order[:cut])], rows.iloc[np.sort(order[cut:])]
        line = np.polyfit(train["flops"], train["latency_s"], 1)
        predicted = {"straight line over FLOPs": np.polyval(line, test["flops"])}
        for name, chosen in features.items():
            predictors[device] = fit_predictor(train, chosen, max_iterations=max_iterations)
            predicted[name] = predictors[device].predict(test)
        whole_s = rows.loc[rows["flops"].idxmax(), "latency_s"]
        kept = test[["device", "kind", "source", "flops", "latency_s", "spread_s"]].assign(whole_s=whole_s)
        points += [kept.assign(predictor=name, predicted_s=values) for name, values in predicted.items()]
    return predictors, pd.concat(points, ignore_index=True)


def predictors_of(lab: Lab, predictors: dict) -> list:
    """f of each of the lab's devices: the seconds of a sub-model, at DeiT-B's size."""

    def seconds(fitted, sizes) -> float:
        return float(fitted.predict(pd.DataFrame([describe(sizes, DEIT)]))[0])

    return [partial(seconds, predictors[device.name]) for device in lab.cluster().devices]


def predictor_table(points: pd.DataFrame) -> pd.DataFrame:
    """Root mean square errors on held-out sub-models: in ms, and in percent of the whole model's latency there.

    `noise_ms` is the standard deviation of one timing.
    """
    errors = {"error": (points["predicted_s"] - points["latency_s"]) ** 2, "noise": points["spread_s"] ** 2}
    groups = points.assign(**errors).groupby(["device", "kind", "predictor"], sort=False)
    means = groups[["error", "noise", "latency_s", "whole_s"]].mean()
    rmse_ms, whole_ms = 1e3 * means["error"] ** 0.5, 1e3 * means["whole_s"]
    made = pd.DataFrame({"rmse_ms": rmse_ms, "mean_ms": 1e3 * means["latency_s"], "whole_ms": whole_ms})
    noise_ms = 1e3 * means["noise"] ** 0.5
    return made.assign(rmse_of_whole_pct=100 * rmse_ms / whole_ms, noise_ms=noise_ms).reset_index()


# Proxies of accuracy --------------------------------------------------------------------------------------------


@torch.inference_mode()
def probe_error(sub_model, batches) -> float:
    """Percent of `batches`' second half that a ridge regression on [CLS] features of the first half gets wrong."""
    x = torch.cat([features_and_logits(sub_model.eval(), batch)[0] for batch in batches]).numpy()
    y, half = torch.cat([batch["labels"] for batch in batches]).numpy(), len(x) // 2
    scale = x[:half].std(0) + 1e-6
    fitted = RidgeClassifier(alpha=10.0).fit(x[:half] / scale, y[:half])
    return 100 * float((fitted.predict(x[half:] / scale) != y[half:]).mean())


def proxy_points(lab: Lab, evaluator: Evaluator, task, folder: Path, limits: Limits, settings: dict) -> pd.DataFrame:
    """Random policies, their proxies, and the errors of their sub-models on test images once calibrated (Fig. 16b).

    `error_alone` is the mean over sub-models, `error_together` the error of their averaged probabilities, in percent.
    The paper's errors are of sub-models trained from scratch; here they are calibrated, independently of each other.
    """
    model, rng, rows = lab.model, np.random.default_rng([0, 7]), []
    boosting, probes = replace(lab.boosting, rule="none"), training_batches(task, settings["probe_rows"])
    few = replace(boosting, num_steps=settings["few_steps"])
    for _ in range(settings["num_policies"]):
        policy = sample_policy(rng, lab.original, limits, len(lab.devices))
        cut = decompose(model, policy)
        runs = (boost(cut, model, task, recipe, folder) for recipe in (few, boosting))
        short, long = ([part.model for part in run] for run in runs)
        outputs = collect_outputs(long, task, "test", folder)
        average = make_aggregator("average", outputs.widths, task.num_classes)
        rows.append({
            "policy": json.dumps(asdict(policy)), "num_steps": boosting.num_steps,
            "loss": np.mean([validation_loss(sub_model, evaluator.batches) for sub_model in cut]),
            "probe_error": np.mean([probe_error(sub_model, probes) for sub_model in cut]),
            "loss_after_steps": np.mean([validation_loss(sub_model, evaluator.batches) for sub_model in short]),
            "log_flops": np.mean([np.log10(flops(config, lab.original)) for config in policy.sub_models]),
            "error_alone": 100 - np.mean(outputs.accuracies),
            "error_together": 100 - ensemble_accuracy(average, outputs),
        })  # fmt: skip
    return pd.DataFrame(rows)


def correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Pearson's coefficient of each proxy and error with a 95% bootstrap interval over policies, and Spearman's."""
    rows = []
    for target in ("error_alone", "error_together"):
        for proxy, sign in PROXIES.items():
            found = pearsonr(points[proxy], points[target])
            interval = found.confidence_interval(0.95, BootstrapMethod(2000, method="percentile", random_state=0))
            row = {"proxy": proxy, "target": target, "expected_sign": sign, "pearson": found.statistic}
            row |= {"pearson_low": interval.low, "pearson_high": interval.high, "num_policies": len(points)}
            rows.append(row | {"spearman": spearmanr(points[proxy], points[target]).statistic})
    return pd.DataFrame(rows)


# The search -----------------------------------------------------------------------------------------------------


def balanced(lab: Lab, evaluator: Evaluator, limits: Limits, num_policies: int = 32) -> Evaluator:
    """`evaluator` with the delta at which loss and latency vary equally over random policies; the paper gives none."""
    rng, count = np.random.default_rng([0, 8]), len(lab.devices)
    drawn = [evaluator(sample_policy(rng, lab.original, limits, count)) for _ in range(num_policies)]
    return replace(evaluator, delta=float(np.std([e.loss for e in drawn]) / np.std([e.latency_s for e in drawn])))


def evaluation_rows(method: str, found: SearchResult) -> pd.DataFrame:
    """A row an evaluation: `policy` as JSON, `loss`, `latency_s`, `objective`, and the best objective so far.

    `best_loss` and `best_latency_s` are the best policy's so far (Fig. 11).
    """
    frame = pd.DataFrame(map(asdict, found.evaluations))
    frame.insert(0, "method", method)
    frame.insert(1, "evaluation", frame.index)
    frame.insert(2, "policy", [json.dumps(asdict(policy)) for policy in found.policies])
    leader = [frame["objective"][: i + 1].idxmin() for i in frame.index]
    best = frame.loc[leader, ["objective", "loss", "latency_s"]].add_prefix("best_")
    return frame.join(best.reset_index(drop=True))


def search_history(lab: Lab, evaluator: Evaluator, limits: Limits, folder: Path, num_seeds: int) -> pd.DataFrame:
    """Searches by each method from each seed, one row an evaluation; an interrupted search is resumed."""
    settings = lab.search.num_initial, lab.search.num_rows
    key = config_hash(weights_hash(lab.model), evaluator.delta, limits, settings)[:8]
    frames, original, count = [], lab.original, len(lab.devices)
    with threadpool_limits(1, user_api="blas"):  # small matrices: more threads only wait for each other
        for seed in range(num_seeds):
            for method in METHODS:
                history = folder / key / f"{method.replace(' ', '-')}-{seed}.json"
                seeded = replace(lab.search, seed=seed)
                found = search_policy(evaluator, original, count, seeded, limits, method, history)
                frames.append(evaluation_rows(method, found).assign(seed=seed))
    return pd.concat(frames, ignore_index=True)


def search_table(history: pd.DataFrame) -> pd.DataFrame:
    """The end of each method's searches: medians over seeds, quartiles of the objective, and the comparison to random.

    `wins` counts the seeds from which a method is at least as good as random with as many evaluations, `ahead` the
    seeds from which it is better; `evaluations_to_rival` is the median number after which it reaches random's end.
    """
    ends = history.groupby(["method", "seed"], sort=False).last()
    rival, rows = ends.loc["random", "best_objective"], []
    for method, own in history.groupby("method", sort=False):
        best = ends.loc[method, "best_objective"]
        reached = own[own["best_objective"] <= own["seed"].map(rival)].groupby("seed")["evaluation"].min() + 1
        median = reached.reindex(best.index).fillna(np.inf).median()
        rows.append({
            "method": method, "num_seeds": len(best), "objective": best.median(),
            "objective_low": best.quantile(0.25), "objective_high": best.quantile(0.75),
            "loss": ends.loc[method, "best_loss"].median(),
            "latency_ms": 1e3 * ends.loc[method, "best_latency_s"].median(),
            "wins": int((best <= rival).sum()), "ahead": int((best < rival).sum()),
            "evaluations_to_rival": median if np.isfinite(median) else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def best_policies(history: pd.DataFrame) -> dict[str, Policy]:
    """For each method the policy of the least objective over all seeds."""
    best = history.loc[history.groupby("method", sort=False)["objective"].idxmin()]
    return {row.method: from_json(Policy, json.loads(row.policy)) for row in best.itertuples()}


def policy_rows(policies: dict[str, Policy], lab: Lab, evaluator: Evaluator) -> pd.DataFrame:
    """C_n of each device at the priced sizes, its costs and the phases of Eq. 3; all predicted."""
    priced, cluster, rows = lab.priced, lab.cluster(), []
    whole = flops(priced.whole, priced)
    for method, policy in policies.items():
        times, sizes = evaluator.latency(policy), scale_policy(policy, lab.original, priced)
        roofline = latency(sizes, priced, cluster)
        for n, (config, device) in enumerate(zip(sizes.sub_models, cluster.devices, strict=True)):
            rows.append({
                "method": method, "device": device.name, **{name: getattr(config, name) for name in PUBLISHED_FEATURES},
                "flops_share": flops(config, priced) / whole,
                "memory_mib": memory_bytes(config, priced) / 2**20, "backbone_ms": 1e3 * times.backbone_s[n],
                "roofline_ms": 1e3 * roofline.backbone_s[n], "send_ms": 1e3 * times.send_s[n],
                "idle_ms": 1e3 * times.idle_s[n], "total_ms": 1e3 * times.total_s,
            })  # fmt: skip
    return pd.DataFrame(rows)
