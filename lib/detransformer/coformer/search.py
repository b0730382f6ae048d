"""Bayesian search of the decomposition policy (CoFormer 2025, Algorithm 1 lines 1-10, Eqs. 9-12 and 15-19).

A Gaussian process with a Matern kernel (nu = 1.5, length scale 1) is fitted to the policies that were evaluated, and
the next one is the candidate with the largest expected improvement.

Where the printed equations cannot be meant as they stand, the standard form is used:
- Eqs. 12 and 19 call Z the density and H the distribution function of the normal distribution and multiply the
  improvement by Z and sigma by H, and take the arg *min*. Expected improvement is (best - mean) times the distribution
  function plus sigma times the density, and it is *maximised*: what lowers the objective most on average is tried next.
- Eq. 9 takes the root of the distance too; the supplementary's Eq. 16 is the Matern kernel.
- The prior mean is 0, of observations that are never near 0: they are standardised first.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from detransformer.coformer.evaluator import Evaluation
from detransformer.coformer.policy import Grid, Limits, Original, Policy, SubModelConfig, violations
from detransformer.files import atomic_write

VERSION = 1
NOISE = 1e-6  # variance of the white noise epsilon, of standardised observations: evaluations are repeatable
LENGTH_SCALES = (0.05, 20.0)  # between which a fitted length scale is looked for
NUM_PARENTS = 5  # best policies whose neighbours are candidates

Objective = Callable[[Policy], Evaluation]
Sample = Callable[[np.random.Generator], Policy]
Mutate = Callable[[np.random.Generator, Policy], Policy]
Encode = Callable[[Policy], np.ndarray]


@dataclass(frozen=True)
class SearchResult:
    """What was evaluated, in order."""

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


def bayesian_search(
    objective: Objective,
    sample: Sample,
    encode: Encode | None,
    num_initial: int = 10,
    num_iterations: int = 40,
    seed: int = 0,
    mutate: Mutate | None = None,
    history: str | Path | None = None,
    num_candidates: int = 256,
    fit_length_scale: bool = False,
    method: str = "bayesian",
    progress: bool = False,
) -> SearchResult:
    """The policy of the least objective among `num_initial` random ones and `num_iterations` that are chosen.

    Args:
        sample: a random valid policy; half of the candidates (all, without `mutate`).
        mutate: a valid policy near another one; the rest of the candidates are neighbours of the best ones found.
        encode: a policy as a vector for the kernel; None chooses all policies at random.
        history: a JSON file, written after each evaluation; what it has already is not evaluated again, and more
            iterations may be asked for than before. A search that was interrupted goes on as if it had not been.
        fit_length_scale: by maximum likelihood at each step, instead of the published 1.
        method: names the rows of the history.

    Raises:
        ValueError: where `history` is not one, or is of other settings.
    """
    num_evaluations = num_initial + num_iterations
    if num_initial < 1 or num_iterations < 0:
        raise ValueError(f"num_initial={num_initial} must be above 0 and num_iterations={num_iterations} not below.")
    settings = dict(method=method, seed=seed)
    if encode:
        settings |= dict(num_initial=num_initial, num_candidates=num_candidates, mutates=mutate is not None)
        settings |= dict(fit_length_scale=fit_length_scale)
    policies, evaluations = _load(history, settings)
    for i in _steps(range(len(policies), num_evaluations), num_evaluations, method, progress):
        rng = np.random.default_rng([seed, i])  # of this evaluation alone, so that a search can go on anywhere
        if i < num_initial or encode is None:
            policy = sample(rng)
        else:
            known = set(policies)
            candidates = _candidates(rng, policies, evaluations, sample, mutate, num_candidates)
            candidates = [c for c in candidates if c not in known] or candidates
            observed = np.array([e.objective for e in evaluations])
            encoded, vectors = (np.array([encode(p) for p in listed]) for listed in (policies, candidates))
            gains = expected_improvement(encoded, observed, vectors, fit_length_scale)
            policy = candidates[int(np.argmax(gains))]
        policies.append(policy)
        evaluations.append(objective(policy))
        _save(history, settings, policies, evaluations)
    return SearchResult(method, tuple(policies[:num_evaluations]), tuple(evaluations[:num_evaluations]))


def random_search(
    objective: Objective,
    sample: Sample,
    num_evaluations: int,
    seed: int = 0,
    history: str | Path | None = None,
    method: str = "random",
    progress: bool = False,
) -> SearchResult:
    """Random decomposition (Fig. 11): the first policies are those that a Bayesian search of this seed starts with."""
    return bayesian_search(
        objective, sample, None, 1, num_evaluations - 1, seed, history=history, method=method, progress=progress
    )


def expected_improvement(
    evaluated: np.ndarray, observed: np.ndarray, candidates: np.ndarray, fit_length_scale: bool = False
) -> np.ndarray:
    """By how much each candidate is expected to be below the least of `observed`, in its standard deviations [C].

    Args:
        evaluated, candidates: encoded policies [n, F] and [C, F].
        observed: their objectives [n].
    """
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    spread = observed.std() or 1.0
    standardised = (observed - observed.mean()) / spread
    kernel = Matern(length_scale=1.0, length_scale_bounds=LENGTH_SCALES if fit_length_scale else "fixed", nu=1.5)
    process = GaussianProcessRegressor(kernel, alpha=NOISE).fit(evaluated, standardised)
    mean, deviation = process.predict(candidates, return_std=True)
    deviation = np.maximum(deviation, 1e-12)
    improvement = standardised.min() - mean
    z = improvement / deviation
    return improvement * norm.cdf(z) + deviation * norm.pdf(z)


def _candidates(
    rng: np.random.Generator,
    policies: list[Policy],
    evaluations: list[Evaluation],
    sample: Sample,
    mutate: Mutate | None,
    count: int,
) -> list[Policy]:
    near = count // 2 if mutate else 0
    order = np.argsort([e.objective for e in evaluations], kind="stable")[:NUM_PARENTS]
    parents = [policies[order[i % len(order)]] for i in range(near)]
    return [mutate(rng, parent) for parent in parents] + [sample(rng) for _ in range(count - near)]


def _steps(remaining: range, total: int, title: str, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(remaining, desc=title, total=total, initial=remaining.start, unit="policy", disable=not progress)


def _load(path: str | Path | None, settings: dict) -> tuple[list[Policy], list[Evaluation]]:
    if path is None or not Path(path).exists():
        return [], []
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']!r} is not {VERSION}")
        found = record["settings"]
        policies = [Policy.from_dict(row["policy"]) for row in record["evaluations"]]
        evaluations = [Evaluation(row["loss"], row["latency_s"], row["objective"]) for row in record["evaluations"]]
    except (ValueError, KeyError, TypeError) as error:
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
        json.dump({"version": VERSION, "settings": settings, "evaluations": rows}, file)


def filled(policy: Policy, original: Original, limits: Limits, grid: Grid | None = None) -> Policy:
    """`policy` grown step by step on `grid` until it is at its limits or nothing is left to give (C1-C6).

    A search is free to stay below its limits; rows that are compared at equal FLOPs should not.
    """
    grid, grows = grid or Grid.of(original), True
    while grows:
        grows = False
        for number in range(policy.num_devices):
            for kind in ("width", "ffn", "heads", "layers"):
                for layer in range(policy.sub_models[number].num_layers if kind in ("ffn", "heads") else 1):
                    larger = _larger(policy, number, kind, layer, original, grid)
                    listed = (*policy.sub_models[:number], larger, *policy.sub_models[number + 1 :])
                    if not violations(Policy(listed), original, limits):
                        policy, grows = Policy(listed), policy.sub_models[number] != larger or grows
    return policy


def _larger(policy: Policy, number: int, kind: str, layer: int, original: Original, grid: Grid) -> SubModelConfig:
    """One step more of `kind`; a layer more is like the last one, as far as the others leave room for it."""
    config = policy.sub_models[number]
    if kind == "width":
        return replace(config, hidden_size=config.hidden_size + grid.hidden_step)
    if kind == "layers":
        beside = [c for c in policy.sub_models if c.num_layers > config.num_layers]
        heads = original.num_heads - sum(c.num_heads[config.num_layers] for c in beside)
        ffn = original.ffn_size - sum(c.ffn_sizes[config.num_layers] for c in beside)
        if heads < 1 or ffn < grid.ffn_step:
            return config
        heads, ffn = min(heads, config.num_heads[-1]), min(ffn // grid.ffn_step * grid.ffn_step, config.ffn_sizes[-1])
        added = (*config.num_heads, heads), (*config.ffn_sizes, ffn)
        return SubModelConfig(config.num_layers + 1, config.hidden_size, *added)
    name, step = ("num_heads", 1) if kind == "heads" else ("ffn_sizes", grid.ffn_step)
    sizes = list(getattr(config, name))
    sizes[layer] += step
    return replace(config, **{name: tuple(sizes)})
