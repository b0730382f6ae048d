"""How good the decomposer is: its latency predictor, its proxy of accuracy, its search (CoFormer 2025, Figs. 11, 16).

Each function returns a frame in the form in which its table is saved. What is timed on this machine is `measured`, what
follows from a device's roofline `modelled`; no row of the Jetsons is measured here, since nobody has them.

The text beside Fig. 16 says of the average validation loss of untrained sub-models that the error rate is lower where
it is larger, and calls it a good proxy of that error, which asks for the opposite. Read here: both rise together.
"""

import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from detransformer.cluster.devices import DeviceSpec
from detransformer.coformer.aggregator import make_aggregator
from detransformer.coformer.booster import BoostConfig, BoostTask, boost, load_calibrated, weights_hash
from detransformer.coformer.debo import SearchConfig, search_batches, search_policy
from detransformer.coformer.decomposer import decompose
from detransformer.coformer.evaluator import (
    DERIVED_FEATURES,
    PUBLISHED_FEATURES,
    Evaluator,
    LatencyPredictor,
    latency,
    profile_pool,
    roofline_s,
    validation_loss,
)
from detransformer.coformer.fusion import collect_outputs, ensemble_accuracy
from detransformer.coformer.policy import (
    Limits,
    Original,
    Policy,
    SubModelConfig,
    flops,
    memory_bytes,
    sample_policy,
    scale_policy,
    violations,
)
from detransformer.coformer.submodels import CoformerViTModel, features, sub_model_config
from detransformer.training.config import config_hash

HOST = "this machine"
MIN_TIMED = 12  # sub-models that are timed however long it takes: fewer fit no predictor
FEATURES = {
    "published": PUBLISHED_FEATURES,
    "published, FLOPs, weights": PUBLISHED_FEATURES + DERIVED_FEATURES,
}
LINE = "straight line over FLOPs"  # the rival of every predictor: two numbers
FITTED = "bayesian, fitted length scale"
SEARCHES = ("bayesian", FITTED, "random", "uniform")
# Of each proxy the way in which the error should go with it: a larger loss, fewer FLOPs.
PROXIES = {"loss": 1, "probe_error": 1, "loss_after_steps": 1, "log_flops": -1}
TARGETS = ("error_alone", "error_together")
INTERVAL = (0.025, 0.975)


# Latency ---------------------------------------------------------------------------------------------------------


def model_pool(original: Original, count: int, seed: int = 0, max_devices: int = 3) -> list[SubModelConfig]:
    """`count` different sub-models of random policies for one to `max_devices` devices, the whole model first."""
    rng = np.random.default_rng([seed, 16])
    pool = {original.whole: None}
    while len(pool) < count:
        policy = sample_policy(rng, original, None, int(rng.integers(1, max_devices + 1)))
        pool |= dict.fromkeys(policy.sub_models)
    return list(pool)[:count]


def modelled_pool(
    specs: Sequence[DeviceSpec], original: Original, num_configs: int = 400, seed: int = 0
) -> pd.DataFrame:
    """`profile_pool` of the devices' rooflines over the same `model_pool`; the column `kind` says `modelled`."""
    configs = model_pool(original, num_configs, seed)
    frame = pd.concat([profile_pool(spec, configs, original) for spec in specs], ignore_index=True)
    return frame.assign(kind="modelled", spread_s=0.0)


def measured_pool(
    config: PretrainedConfig, num_configs: int = 400, limit_s: float = 60.0, num_repeats: int = 3, seed: int = 0
) -> pd.DataFrame:
    """`profile_pool` of this machine: ViT sub-models of random weights, timed one after the other (batch 1, float32).

    Args:
        config: of the large ViT; `ViTConfig()` has DeiT-B's sizes.
        limit_s: after which no further sub-model is timed, once `MIN_TIMED` are.
        num_repeats: forward passes after a first one that does not count; their median is `latency_s`, their standard
            deviation `spread_s`.

    Raises:
        ValueError: for fewer than 2 repeats or `MIN_TIMED` sub-models.
    """
    if num_repeats < 2 or num_configs < MIN_TIMED:
        raise ValueError(
            f"num_repeats={num_repeats} and num_configs={num_configs}: give 2 or more and {MIN_TIMED} or more."
        )
    original, samples, rows = Original.of(config), [], []
    pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size)

    def measure(sizes: SubModelConfig) -> float:
        samples[:] = forward_s(random_backbone(config, sizes), pixels, num_repeats)
        return statistics.median(samples)

    start = time.perf_counter()
    pool = model_pool(original, num_configs, seed)
    for sizes in tqdm(pool, desc="timed on this machine", unit="sub-model", leave=False):
        if len(rows) >= MIN_TIMED and time.perf_counter() - start > limit_s:
            break
        row = profile_pool(DeviceSpec(name=HOST), [sizes], original, measure)
        rows.append(row.assign(spread_s=statistics.stdev(samples)))
    return pd.concat(rows, ignore_index=True).assign(kind="measured")


def random_backbone(config: PretrainedConfig, sizes: SubModelConfig) -> CoformerViTModel:
    """A ViT sub-model of these sizes whose weights are small random numbers, for timing."""
    layers = np.round(np.linspace(0, config.num_hidden_layers - 1, sizes.num_layers)).astype(int)
    with no_init_weights():
        model = CoformerViTModel(sub_model_config(config, sizes, layers.tolist()), add_pooling_layer=False)
    with torch.no_grad():
        for weight in model.parameters():  # memory that nobody wrote may hold denormals, which compute slowly
            weight.uniform_(-0.02, 0.02)
    return model.eval()


@torch.inference_mode()
def forward_s(model: torch.nn.Module, pixels: torch.Tensor, num_repeats: int) -> list[float]:
    """Seconds of each of `num_repeats` forward passes after a first one."""
    model(pixel_values=pixels)
    seconds = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        model(pixel_values=pixels)
        seconds.append(time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class PredictorStudy:
    """Predictors of each device, by its name (of all features), and their words on held-out sub-models."""

    predictors: Mapping[str, LatencyPredictor]
    points: pd.DataFrame


def predictor_study(
    pool: pd.DataFrame, original: Original, train_share: float = 0.75, max_iterations: int = 200, seed: int = 0
) -> PredictorStudy:
    """Predictors fitted to `train_share` of each device's rows in `pool`, and their predictions of the rest (Fig. 16a).

    `points` has, of each device, held-out sub-model and kind of predictor, `latency_s` and `predicted_s`: the published
    multi-layer perceptron over its four features, the same with FLOPs and weights, and a straight line over FLOPs.
    `whole_s` is the whole model's latency on the device.

    Raises:
        ValueError: where a part of the rows is empty.
    """
    predictors, points = {}, []
    for device, rows in pool.groupby("device", sort=False):
        order = np.random.default_rng([seed, 0]).permutation(len(rows))
        cut = round(train_share * len(rows))
        if not 0 < cut < len(rows):
            raise ValueError(f"train_share={train_share} leaves {cut} of {len(rows)} rows to fit: give 0.5 to 0.9.")
        train, test = rows.iloc[np.sort(order[:cut])], rows.iloc[np.sort(order[cut:])]
        predicted = {}
        for name, chosen in FEATURES.items():
            fitted = LatencyPredictor.fit(train, original, chosen, max_iterations=max_iterations, seed=seed)
            predicted[name], predictors[str(device)] = fitted.predict(test), fitted
        predicted[LINE] = np.polyval(np.polyfit(train["flops"], train["latency_s"], 1), test["flops"])
        whole = rows.loc[rows["flops"].idxmax(), "latency_s"]  # `model_pool` has it first, and it is the largest
        keep = ["device", "kind", "source", "flops", "latency_s", "spread_s"]
        points += [
            test[keep].assign(predictor=name, predicted_s=values, num_train=len(train), whole_s=whole)
            for name, values in predicted.items()
        ]
    return PredictorStudy(predictors, pd.concat(points, ignore_index=True))


def predictor_table(points: pd.DataFrame) -> pd.DataFrame:
    """Errors on held-out sub-models, one row a device and predictor.

    `rmse_ms`; the same as percent of the mean latency (`rmse_of_mean_pct`) and of the whole model's on that device
    (`rmse_of_whole_pct`), which compares devices of other speeds; `noise_ms` is the standard deviation of one timing.
    """
    rows = []
    for (device, kind, name), part in points.groupby(["device", "kind", "predictor"], sort=False):
        rmse_s = float(np.sqrt(((part["predicted_s"] - part["latency_s"]) ** 2).mean()))
        mean_s, whole_s = float(part["latency_s"].mean()), float(part["whole_s"].iloc[0])
        rows.append(
            {"device": device, "kind": kind, "predictor": name, "rmse_ms": 1e3 * rmse_s, "mean_ms": 1e3 * mean_s}
            | {"rmse_of_mean_pct": 100 * rmse_s / mean_s, "whole_ms": 1e3 * whole_s}
            | {"rmse_of_whole_pct": 100 * rmse_s / whole_s, "noise_ms": 1e3 * _root_mean_square(part["spread_s"])}
            | {"num_train": int(part["num_train"].iloc[0]), "num_test": len(part), "source": part["source"].iloc[0]}
        )
    return pd.DataFrame(rows)


def _root_mean_square(values: pd.Series) -> float:
    return float(np.sqrt((values**2).mean()))


# Accuracy --------------------------------------------------------------------------------------------------------


def probe_error(sub_model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Percent of the second half of `batches` that a ridge regression on [CLS] features, fitted to the first half, gets
    wrong: what a sub-model's features are worth once its head fits them, without a training step."""
    from sklearn.linear_model import RidgeClassifier

    with torch.inference_mode():
        first = [features(sub_model.eval(), batch)[:, 0] for batch in batches]
    x, y = torch.cat(first).numpy(), torch.cat([batch["labels"] for batch in batches]).numpy()
    half = len(x) // 2
    scale = x[:half].std(0) + 1e-6
    fitted = RidgeClassifier(alpha=10.0).fit(x[:half] / scale, y[:half])
    return 100 * float((fitted.predict(x[half:] / scale) != y[half:]).mean())


def proxy_points(
    evaluator: Evaluator,
    task: BoostTask,
    boosting: BoostConfig,
    output_dir: str | Path,
    limits: Limits | None = None,
    num_policies: int = 24,
    few_steps: int = 10,
    probe_rows: int = 1024,
    seed: int = 0,
) -> pd.DataFrame:
    """Random policies, what each proxy says of them, and the errors of their sub-models once calibrated (Fig. 16b).

    The published error is that of sub-models trained from scratch; here they are calibrated, each alone, as short as
    `boosting` says. Proxies see training samples, errors are of test samples.

    Columns: `loss` (Eq. 7, uncalibrated), `probe_error`, `loss_after_steps` (the loss after `few_steps` of
    calibration), `log_flops` (mean decimal logarithm of FLOPs), `SECONDS_of_PROXY`; `error_alone` is the mean over
    sub-models and `error_together` that of their averaged probabilities, in percent.
    """
    model, original, rng = evaluator.model, evaluator.original, np.random.default_rng([seed, 7])
    alone = replace(boosting, rule="none")
    probes = search_batches(task, probe_rows, seed)
    rows = []
    for number in tqdm(range(num_policies), desc="policies calibrated", unit="policy"):
        policy = sample_policy(rng, original, limits, len(evaluator.cluster.devices))
        cut = decompose(model, policy, evaluator.importance)
        clock, spent = time.perf_counter, {}
        start = clock()
        loss = float(np.mean(validation_loss(cut, evaluator.batches)))
        spent["loss"], start = clock() - start, clock()
        probed = float(np.mean([probe_error(sub_model, probes) for sub_model in cut]))
        spent["probe_error"] = clock() - start
        short = boost(cut, model, task, replace(alone, num_steps=few_steps), output_dir)
        spent["loss_after_steps"] = spent["loss"] + sum(result.seconds for result in short)
        after = float(np.mean(validation_loss(load_calibrated(short, cut), evaluator.batches)))
        start = clock()
        log_flops = float(np.mean([np.log10(flops(config, original)) for config in policy.sub_models]))
        spent["log_flops"] = clock() - start
        boosted = boost(cut, model, task, alone, output_dir)
        outputs = collect_outputs(load_calibrated(boosted, cut), task, "test")
        average = make_aggregator("average", outputs.widths, task.num_classes)
        together = ensemble_accuracy(average, None, outputs.logits, outputs.labels)
        rows.append(
            {"number": number, "policy": json.dumps(policy.to_dict()), "loss": loss, "probe_error": probed}
            | {"loss_after_steps": after, "log_flops": log_flops, "few_steps": few_steps}
            | {"num_steps": boosting.num_steps, "error_together": 100 - together}
            | {"error_alone": 100 - float(np.mean([result.score for result in boosted]))}
            | {f"seconds_{name}": seconds for name, seconds in spent.items()}
            | {"seconds_calibration": sum(result.seconds for result in boosted)}
        )
    return pd.DataFrame(rows)


def proxy_table(points: pd.DataFrame, num_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How each proxy goes with each error: Pearson's and Spearman's coefficient and their 95% bootstrap intervals.

    `expected_sign` is that of a proxy that says what it should; `seconds` is its mean cost a policy, and
    `seconds_calibration` what it saves.
    """
    rows = []
    draws = np.random.default_rng([seed, 95]).integers(len(points), size=(num_resamples, len(points)))
    for target in TARGETS:
        for proxy, sign in PROXIES.items():
            x, y = points[proxy].to_numpy(float), points[target].to_numpy(float)
            row = {"proxy": proxy, "target": target, "expected_sign": sign}
            for name, ranked in (("pearson", False), ("spearman", True)):
                row[name] = float(_correlation(x[None], y[None], ranked)[0])
                spread = _correlation(x[draws], y[draws], ranked)
                low, high = np.nanquantile(spread, INTERVAL) if np.isfinite(spread).any() else (np.nan, np.nan)
                row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
            row |= {"num_policies": len(points), "seconds": points[f"seconds_{proxy}"].mean()}
            rows.append(row | {"seconds_calibration": points["seconds_calibration"].mean()})
    return pd.DataFrame(rows)


def _correlation(x: np.ndarray, y: np.ndarray, ranked: bool) -> np.ndarray:
    """[R, N] and [R, N] -> [R]; NaN where a row does not vary."""
    from scipy.stats import rankdata

    if ranked:
        x, y = rankdata(x, axis=1), rankdata(y, axis=1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.divide((x * y).sum(1), scale, out=np.full(len(x), np.nan), where=scale > 1e-12)


# Search ----------------------------------------------------------------------------------------------------------


def balanced(evaluator: Evaluator, limits: Limits | None = None, num_policies: int = 32, seed: int = 0) -> Evaluator:
    """`evaluator` with the delta for which loss and latency vary alike over random policies.

    The paper does not give its delta. The losses of uncalibrated sub-models lie close to each other and to that of
    guessing, so that any delta that looks natural lets the latency alone decide, and the smallest sub-models win.

    Raises:
        ValueError: where latency does not vary.
    """
    rng = np.random.default_rng([seed, 8])
    count = len(evaluator.cluster.devices)
    drawn = [evaluator(sample_policy(rng, evaluator.original, limits, count)) for _ in range(num_policies)]
    losses, seconds = (np.array([getattr(e, name) for e in drawn]) for name in ("loss", "latency_s"))
    if not seconds.std() > 0:
        raise ValueError(f"the latency of {num_policies} random policies is the same: give 2 or more, or other limits.")
    return replace(evaluator, delta=float(losses.std() / seconds.std()))


def search_study(
    evaluator: Evaluator,
    task: BoostTask,
    config: SearchConfig,
    limits: Limits | None,
    output_dir: str | Path,
    num_seeds: int = 10,
    methods: Sequence[str] = SEARCHES,
) -> pd.DataFrame:
    """Searches of each method from each seed, one row an evaluation: `SearchResult.history`, `method` and `seed`.

    `"bayesian"` keeps the published length scale of 1, `FITTED` fits it at each step. A search that was interrupted
    goes on; one of another model, evaluator or limits begins anew.

    Raises:
        ValueError: for an unknown method.
    """
    unknown = [name for name in methods if name not in SEARCHES]
    if unknown:
        raise ValueError(f"method {unknown[0]!r} is unknown: choose among {', '.join(SEARCHES)}.")
    folder = Path(output_dir) / _search_key(evaluator, config, limits)
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    jobs = [(seed, method) for seed in range(num_seeds) for method in methods]
    # The matrices of the Gaussian process are small: more threads only wait for each other.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer, too
        for seed, method in tqdm(jobs, desc="searches", unit="search"):
            seeded = replace(config, seed=seed)
            history = folder / f"{method.split(',')[0]}{'-fitted' if method == FITTED else ''}-{seed}.json"
            found = search_policy(
                *(evaluator.model, task, evaluator.cluster, seeded, limits, method.split(",")[0]),
                history=history,
                evaluator=evaluator,
                fit_length_scale=method == FITTED,
            )
            frames.append(found.history.assign(method=method, seed=seed))
    return pd.concat(frames, ignore_index=True)


def _search_key(evaluator: Evaluator, config: SearchConfig, limits: Limits | None) -> str:
    """What the numbers of a search depend on besides its seed and its length, in 8 digits."""
    probe = model_pool(evaluator.priced_as or evaluator.original, 4)
    predictors = evaluator.predictors or [
        lambda c, d=d: roofline_s(c, evaluator.priced_as or evaluator.original, d) for d in evaluator.cluster.devices
    ]
    labels = [batch["labels"].tolist() for batch in evaluator.batches]
    return config_hash(
        weights_hash(evaluator.model),
        labels,
        [[float(predict(sizes)) for sizes in probe] for predict in predictors],
        [evaluator.delta, evaluator.central, evaluator.sent_tokens, config.num_initial],
        [evaluator.cluster.link.bandwidth_bps, repr(limits), repr(evaluator.priced_as)],
    )[:8]


def search_table(history: pd.DataFrame, rival: str = "random") -> pd.DataFrame:
    """What each method came to at the end, one row each: medians over seeds, quartiles of the objective, and `wins`.

    `wins` counts the seeds from which a method is at least as good as `rival` with as many evaluations, `ahead` those
    in which it is better; `evaluations_to_rival` is the median number after which it is as good as `rival` at its end,
    NaN where half of the seeds or more never are.
    """
    ends = history.groupby(["method", "seed"], sort=False).tail(1).set_index(["method", "seed"])
    rows = []
    for method in dict.fromkeys(history["method"]):
        end = ends.loc[method]
        best = end["best_objective"]
        row = {"method": method, "num_seeds": len(end), "num_evaluations": int(end["evaluation"].max()) + 1}
        row |= {"objective": best.median(), "objective_low": best.quantile(0.25), "objective_high": best.quantile(0.75)}
        row |= {"loss": end["best_loss"].median(), "latency_ms": 1e3 * end["best_latency_s"].median()}
        if rival in ends.index.get_level_values(0):
            other = ends.loc[rival]["best_objective"].reindex(best.index)
            row |= {"wins": int((best <= other).sum()), "ahead": int((best < other).sum())}
            own = history[history["method"] == method].set_index("seed")
            reached = [
                own.loc[seed].loc[lambda f, limit=limit: f["best_objective"] <= limit, "evaluation"].min() + 1
                for seed, limit in other.items()
            ]
            median = float(np.median([np.inf if pd.isna(n) else n for n in reached]))
            row["evaluations_to_rival"] = median if np.isfinite(median) else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def best_policies(history: pd.DataFrame) -> dict[str, Policy]:
    """Of each method the policy of the least objective over all seeds."""
    found = {}
    for method, rows in history.groupby("method", sort=False):
        found[str(method)] = Policy.from_dict(json.loads(rows.loc[rows["objective"].idxmin(), "policy"]))
    return found


# Policies --------------------------------------------------------------------------------------------------------


def policy_table(policies: Mapping[str, Policy], evaluator: Evaluator, limits: Limits | None = None) -> pd.DataFrame:
    """C_n of each device, its costs and the phases of Eq. 3, one row a method and device; all predicted, none measured.

    Sizes are those of the model that is priced (`Evaluator.priced_as`). `roofline_ms` is the device's own roofline,
    beside the predictor's `backbone_ms`; `idle_ms` is how long the device waits for the slowest.
    """
    priced, rows = evaluator.priced_as or evaluator.original, []
    whole, searched = flops(priced.whole, priced), flops(evaluator.original.whole, evaluator.original)
    for method, policy in policies.items():
        times = evaluator.latency(policy)
        sizes = scale_policy(policy, evaluator.original, priced)
        known = latency(sizes, priced, evaluator.cluster, None, evaluator.central, evaluator.sent_tokens)
        for n, (config, device) in enumerate(zip(sizes.sub_models, evaluator.cluster.devices, strict=True)):
            small = policy.sub_models[n]
            most = limits.flops[n] / searched if limits else np.inf
            rows.append(
                {"method": method, "device": device.name, "num_layers": config.num_layers}
                | {"hidden_size": config.hidden_size, "mean_heads": config.mean_heads}
                | {"mean_ffn_size": config.mean_ffn_size, "flops_share": flops(config, priced) / whole}
                | {"searched_flops_share": flops(small, evaluator.original) / searched}
                | {"max_flops_share": most, "memory_mib": memory_bytes(config, priced) / 2**20}
                | {"backbone_ms": 1e3 * times.backbone_s[n], "roofline_ms": 1e3 * known.backbone_s[n]}
                | {"send_ms": 1e3 * times.send_s[n], "idle_ms": 1e3 * times.idle_s[n]}
                | {"aggregate_ms": 1e3 * times.aggregate_s if n == times.central else 0.0}
                | {"total_ms": 1e3 * times.total_s, "central": n == times.central}
            )
    return pd.DataFrame(rows)


def constraint_table(policy: Policy, original: Original) -> pd.DataFrame:
    """Both `policy` and one that is broken on purpose, against each constraint of Eq. 8: how often broken, and how.

    The broken one is on each device the whole model with a layer more. C5 and C6 are what `policy` itself takes.
    """
    limits = Limits(
        tuple(flops(config, original) for config in policy.sub_models),
        tuple(memory_bytes(config, original) for config in policy.sub_models),
    )
    whole, layers = original.whole, original.num_layers + 1
    larger = SubModelConfig(layers, whole.hidden_size, (original.num_heads,) * layers, (original.ffn_size,) * layers)
    broken = Policy((larger,) * policy.num_devices)
    rows = []
    for name, checked in (("found", policy), ("broken on purpose", broken)):
        said = violations(checked, original, limits)
        for constraint in ("C1", "C2", "C3", "C4", "C5", "C6"):
            sentences = [sentence for sentence in said if sentence.startswith(f"{constraint}:")]
            rows.append(
                {"policy": name, "constraint": constraint, "violations": len(sentences)}
                | {"first": sentences[0] if sentences else ""}
            )
    return pd.DataFrame(rows)
