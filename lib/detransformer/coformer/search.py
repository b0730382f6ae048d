"""Bayesian search of the decomposition policy (CoFormer 2025, Algorithm 1 lines 1-10, Eqs. 9-12 and 15-19).

A Gaussian process with a Matern kernel (nu = 1.5, length scale 1) is fitted to the policies that were evaluated, and
the next one is the candidate with the largest expected improvement. Where the printed Eqs. 9, 12 and 19 cannot
be meant as they stand, the standard form is used (docs/findings.md, "CoFormer's equations").
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from detransformer.coformer.evaluator import Evaluation
from detransformer.coformer.policy import Limits, Original, Policy, encode
from detransformer.coformer.sampling import mutate_policy, sample_policy, sample_uniform_policy
from detransformer.files import atomic_write

NOISE = 1e-6  # variance of the white noise epsilon, of standardised observations: evaluations are repeatable
LENGTH_SCALES = (0.05, 20.0)  # between which a fitted length scale is looked for
NUM_CANDIDATES = 256  # half of them neighbours of the best policies so far, half random
NUM_PARENTS = 5
FITTED = "bayesian, fitted length scale"
METHODS = ("bayesian", FITTED, "random", "uniform")  # of a search (Fig. 11)

Objective = Callable[[Policy], Evaluation]


@dataclass(frozen=True)
class SearchConfig:
    """How a policy is looked for.

    Args:
        num_initial, num_iterations: random policies first, then chosen ones.
        num_rows: training samples on which policies are compared.
        seed: of policies and samples.
    """

    num_initial: int = 10
    num_iterations: int = 40
    num_rows: int = 256
    seed: int = 0

    def __post_init__(self):
        for name, least in (("num_initial", 1), ("num_iterations", 0), ("num_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}: give a larger number.")

    @property
    def num_evaluations(self) -> int:
        return self.num_initial + self.num_iterations


@dataclass(frozen=True)
class SearchResult:
    """The policies that a search evaluated, in order."""

    method: str
    policies: tuple[Policy, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def best(self) -> int:
        """The number of the best evaluation, of equals the first."""
        return int(np.argmin([e.objective for e in self.evaluations]))

    @property
    def best_policy(self) -> Policy:
        return self.policies[self.best]

    @property
    def history(self) -> pd.DataFrame:
        """A row an evaluation: `policy` as JSON, `loss`, `latency_s`, `objective`, and the best objective so far.

        `best_loss` and `best_latency_s` are those of the best policy so far (Fig. 11).
        """
        rows = [
            {"method": self.method, "evaluation": i, "policy": json.dumps(p.to_dict()), **asdict(e)}
            for i, (p, e) in enumerate(zip(self.policies, self.evaluations, strict=True))
        ]
        frame = pd.DataFrame(rows)
        frame["best_objective"] = frame["objective"].cummin()
        leader = [int(np.argmin(frame["objective"][: i + 1])) for i in range(len(frame))]
        frame["best_loss"] = frame["loss"].to_numpy()[leader]
        frame["best_latency_s"] = frame["latency_s"].to_numpy()[leader]
        return frame


def search_policy(
    objective: Objective,
    original: Original,
    num_devices: int,
    config: SearchConfig,
    limits: Limits | None = None,
    method: str = "bayesian",
    history: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """The policy of the least objective (Eq. 8) among `config.num_evaluations`.

    Args:
        objective: an `Evaluator`, or another function of a policy.
        limits: of each device; None: C1 to C4 alone.
        method: `"bayesian"` has the published length scale of 1, `FITTED` fits it by maximum likelihood at each step;
            `"random"` chooses nothing, and `"uniform"` draws policies with the same sub-model on each device.
        history: a JSON file, written after each evaluation. Evaluations that it has are not repeated, and more
            iterations may be asked for than before: a search that was interrupted goes on as if it had not been.

    Raises:
        ValueError: for an unknown method, where no policy is within the limits, or where `history` is not one or is of
            other settings.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    draw = sample_uniform_policy if method == "uniform" else sample_policy
    chooses = method in ("bayesian", FITTED)
    settings = {"method": method, "seed": config.seed} | ({"num_initial": config.num_initial} if chooses else {})
    policies, evaluations = _load(history, settings)
    total, done = config.num_evaluations, len(policies)
    for i in tqdm(range(done, total), method, total, initial=done, unit="policy", disable=not progress):
        rng = np.random.default_rng([config.seed, i])  # of this evaluation alone, so that a search can go on anywhere
        if i < config.num_initial or not chooses:
            policy = draw(rng, original, limits, num_devices)
        else:
            best = np.argsort([e.objective for e in evaluations], kind="stable")[:NUM_PARENTS]
            parents = [policies[best[i % len(best)]] for i in range(NUM_CANDIDATES // 2)]
            candidates = [mutate_policy(rng, parent, original, limits) for parent in parents]
            candidates += [draw(rng, original, limits, num_devices) for _ in parents]
            candidates = [policy for policy in candidates if policy not in policies] or candidates
            vectors = (np.array([encode(policy, original) for policy in part]) for part in (policies, candidates))
            observed = np.array([e.objective for e in evaluations])
            policy = candidates[int(np.argmax(expected_improvement(*vectors, observed, method == FITTED)))]
        policies.append(policy)
        evaluations.append(objective(policy))
        _save(history, settings, policies, evaluations)
    return SearchResult(method, tuple(policies[:total]), tuple(evaluations[:total]))


def expected_improvement(
    evaluated: np.ndarray, candidates: np.ndarray, observed: np.ndarray, fit_length_scale: bool = False
) -> np.ndarray:
    """By how much each candidate is expected to be below the least of `observed`, in its standard deviations [C].

    Args:
        evaluated, candidates: encoded policies [n, F] and [C, F].
        observed: the objectives of those evaluated [n].
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


def _load(path: str | Path | None, settings: dict) -> tuple[list[Policy], list[Evaluation]]:
    if path is None or not Path(path).exists():
        return [], []
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        found = record["settings"]
        policies = [Policy.from_dict(row.pop("policy")) for row in record["evaluations"]]
        evaluations = [Evaluation(**row) for row in record["evaluations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the history of a search ({error}): remove it, or give another.") from error
    if found != settings:
        others = ", ".join(f"{name}={found.get(name)!r}" for name in settings if found.get(name) != settings[name])
        raise ValueError(f"{path} is of a search with {others}: give another file, or search as it did.")
    return policies, evaluations


def _save(path: str | Path | None, settings: dict, policies: list[Policy], evaluations: list[Evaluation]) -> None:
    if path is None:
        return
    rows = [{"policy": p.to_dict(), **asdict(e)} for p, e in zip(policies, evaluations, strict=True)]
    with atomic_write(path) as file:
        json.dump({"settings": settings, "evaluations": rows}, file)
