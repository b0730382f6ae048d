"""Bayesian search of the decomposition policy (CoFormer 2025, Algorithm 1 lines 1-10, Eqs. 7-12 and 15-19).

The objective is the validation loss plus the weighted latency (Eq. 8); the loss of the uncalibrated sub-models is a
proxy for their error after calibration. A Gaussian process with a Matern kernel (nu = 1.5, length scale 1) is fitted to
the evaluated policies, and the next one is the candidate with the largest expected improvement. Where the printed
Eqs. 9, 12 and 19 cannot be meant as they are, the standard form is used (docs/findings.md, "CoFormer's equations").
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from detransformer.coformer.decomposer import decompose
from detransformer.coformer.policy import Limits, Original, Policy, encode
from detransformer.coformer.predictor import Latency
from detransformer.coformer.sampling import mutate_policy, sample_policy, sample_uniform_policy
from detransformer.coformer.tasks import BoostTask
from detransformer.files import atomic_write
from detransformer.training.config import Checked, not_negative, positive
from detransformer.typed_json import from_json

NOISE = 1e-6  # variance of the white noise epsilon, on standardised observations: evaluations are repeatable
LENGTH_SCALES = (0.05, 20.0)  # bounds of a fitted length scale
NUM_CANDIDATES = 256  # half of them neighbours of the best policies so far, half random
NUM_PARENTS = 5
FITTED = "bayesian, fitted length scale"
METHODS = ("bayesian", FITTED, "random", "uniform")  # of search (Fig. 11)


# The objective ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Psi(C) = L_val + delta T of one policy, and its two terms."""

    loss: float
    latency_s: float
    objective: float


@dataclass(frozen=True)
class Evaluator:
    """Eq. 8 as a function of the policy: decomposes, measures the validation loss, predicts the latency.

    Args:
        model: the large model, with a task head.
        batches: a small part of the samples, on which all policies are compared.
        latency: predicts a policy's latency. For a small model, whose messages take most of the time, it may price the
            same shares of a larger one.
        delta: the weight of a second in units of loss.
    """

    model: PreTrainedModel
    batches: Sequence[Mapping[str, torch.Tensor]]
    latency: Callable[[Policy], Latency]
    delta: float

    def __call__(self, policy: Policy) -> Evaluation:
        sub_models = decompose(self.model, policy)
        loss = float(np.mean([validation_loss(sub_model, self.batches) for sub_model in sub_models]))
        latency_s = self.latency(policy).total_s
        return Evaluation(loss, latency_s, loss + self.delta * latency_s)


def training_batches(task: BoostTask, num_rows: int, seed: int = 0, batch_size: int = 64) -> list[dict]:
    """`num_rows` training samples, rounded up to whole batches, with labels, in the models' input format."""
    total = len(task.train_labels)
    steps = range(math.ceil(min(num_rows, total) / batch_size))
    batches = (task.train_batch(seed, step, min(batch_size, total)) for step in steps)
    return [{name: tensor for name, tensor in batch.items() if name != "rows"} for batch in batches]


@torch.inference_mode()
def validation_loss(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """The validation loss L_n of a sub-model, the mean over samples; Eq. 7 is the mean over sub-models.

    Eq. 7 sums over samples, so that the size of the data set scales the loss and hence delta; the text calls it the
    average. The model is put in eval mode.
    """
    model.eval()
    sizes = [len(batch["labels"]) for batch in batches]
    losses = [float(model(**{name: x.to(model.device) for name, x in batch.items()}).loss) for batch in batches]
    return float(np.average(losses, weights=sizes))


# The search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchConfig(Checked):
    """How a policy is searched.

    Args:
        num_initial, num_iterations: numbers of random policies first, then of chosen ones.
        num_rows: training samples on which policies are compared.
        seed: of policies and samples.
    """

    num_initial: int = positive(10)
    num_iterations: int = not_negative(40)
    num_rows: int = positive(256)
    seed: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The policies that a search evaluated, in order."""

    policies: tuple[Policy, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def best_policy(self) -> Policy:
        """The policy of least objective, of equals the first."""
        return self.policies[int(np.argmin([e.objective for e in self.evaluations]))]


def search_policy(
    objective: Callable[[Policy], Evaluation],
    original: Original,
    num_devices: int,
    config: SearchConfig,
    limits: Limits | None = None,
    method: str = "bayesian",
    history: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """The policy of least objective (Eq. 8) among `num_initial` + `num_iterations`.

    Args:
        objective: an `Evaluator`, or another function of a policy.
        limits: of each device; None: only C1 to C4.
        method: `"bayesian"` has the published length scale of 1, `FITTED` fits it by maximum likelihood at each step;
            `"random"` chooses nothing, and `"uniform"` draws policies with the same sub-model on each device.
        history: a JSON file of this search, written after each evaluation. Its evaluations are not repeated, and more
            iterations may be requested than before: an interrupted search continues as if uninterrupted. Its name
            must tell searches apart, as by a hash of all other arguments.

    Raises:
        ValueError: for an unknown method, if no policy is within the limits, or if `history` is damaged.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    draw = sample_uniform_policy if method == "uniform" else sample_policy
    chooses = method in ("bayesian", FITTED)
    found = _load(history)
    total, done = config.num_initial + config.num_iterations, len(found.policies)
    for i in tqdm(range(done, total), method, total, initial=done, unit="policy", disable=not progress):
        rng = np.random.default_rng([config.seed, i])  # for this evaluation alone, so that a search can resume anywhere
        if i < config.num_initial or not chooses:
            policy = draw(rng, original, limits, num_devices)
        else:
            observed = np.array([e.objective for e in found.evaluations])
            best = np.argsort(observed, kind="stable")[:NUM_PARENTS]
            parents = [found.policies[best[i % len(best)]] for i in range(NUM_CANDIDATES // 2)]
            candidates = [mutate_policy(rng, parent, original, limits) for parent in parents]
            candidates += [draw(rng, original, limits, num_devices) for _ in parents]
            candidates = [policy for policy in candidates if policy not in found.policies] or candidates
            vectors = (np.array([encode(p, original) for p in part]) for part in (found.policies, candidates))
            policy = candidates[int(np.argmax(expected_improvement(*vectors, observed, method == FITTED)))]
        found = SearchResult((*found.policies, policy), (*found.evaluations, objective(policy)))
        if history is not None:
            with atomic_write(history) as file:
                json.dump(asdict(found), file)
    return SearchResult(found.policies[:total], found.evaluations[:total])


def expected_improvement(
    evaluated: np.ndarray, candidates: np.ndarray, observed: np.ndarray, fit_length_scale: bool = False
) -> np.ndarray:
    """Expected improvement of each candidate below the least of `observed`, in its standard deviations [C].

    Args:
        evaluated, candidates: encoded policies [n, F] and [C, F].
        observed: the objectives of the evaluated policies [n].
    """
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    standardised = (observed - observed.mean()) / (observed.std() or 1.0)  # the prior mean is 0
    kernel = Matern(length_scale=1.0, length_scale_bounds=LENGTH_SCALES if fit_length_scale else "fixed", nu=1.5)
    process = GaussianProcessRegressor(kernel, alpha=NOISE).fit(evaluated, standardised)
    mean, deviation = process.predict(candidates, return_std=True)
    deviation = np.maximum(deviation, 1e-12)
    improvement = standardised.min() - mean
    z = improvement / deviation
    return improvement * norm.cdf(z) + deviation * norm.pdf(z)


def _load(path: str | Path | None) -> SearchResult:
    """The history at `path`; empty if there is none."""
    if path is None or not Path(path).exists():
        return SearchResult((), ())
    try:
        return from_json(SearchResult, json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is not the history of a search ({error}): remove it, or give another.") from error
