"""The search: on a known objective better than chance, the same when it goes on after a stop, EI as in books."""

import json
from functools import partial

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from detransformer.coformer.evaluator import Evaluation
from detransformer.coformer.policy import (
    Grid,
    Limits,
    Original,
    encode,
    flops,
    mutate_policy,
    sample_policy,
    sample_uniform_policy,
)
from detransformer.coformer.search import bayesian_search, expected_improvement, random_search

ORIGINAL = Original(num_layers=4, hidden_size=96, num_heads=6, ffn_size=192, seq_len=16)
GRID = Grid(8, 16)
LIMITS = Limits.share(ORIGINAL, 0.5, 3)
SPEEDS = (1.0, 3.0, 2.0)  # of three devices
SAMPLE = partial(sample_policy, original=ORIGINAL, limits=LIMITS, num_devices=3, grid=GRID)
UNIFORM = partial(sample_uniform_policy, original=ORIGINAL, limits=LIMITS, num_devices=3, grid=GRID)
MUTATE = partial(mutate_policy, original=ORIGINAL, limits=LIMITS, grid=GRID)
ENCODE = partial(encode, original=ORIGINAL)


def synthetic(policy):
    """Loss falls with a sub-model's size, the slowest device is waited for: as Eq. 8, without a model."""
    whole = flops(ORIGINAL.whole, ORIGINAL)
    sizes = np.array([flops(config, ORIGINAL) / whole for config in policy.sub_models])
    return Evaluation.of(float(np.mean(np.exp(-8 * sizes))), float(max(sizes / SPEEDS)), delta=2.0)


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):  # the matrices are small, and the threads of a busy machine wait for each other
        yield


def bayesian(seed=0, num_iterations=14, objective=synthetic, **kwargs):
    return bayesian_search(
        objective, SAMPLE, ENCODE, 6, num_iterations, seed, mutate=MUTATE, num_candidates=64, **kwargs
    )


def test_bayesian_search_is_at_least_as_good_as_chance():
    wins = 0
    for seed in range(10):
        found = bayesian(seed, num_iterations=24).evaluations
        drawn = random_search(synthetic, SAMPLE, 30, seed).evaluations
        assert found[:6] == drawn[:6]  # they start alike
        wins += min(e.objective for e in found) <= min(e.objective for e in drawn)
    assert wins >= 9


def test_the_history_has_the_best_so_far():
    result = bayesian()
    frame = result.history
    assert len(frame) == 20 and (frame["best_objective"] == frame["objective"].cummin()).all()
    best = frame.iloc[result.best]
    assert synthetic(result.best_policy).objective == best["objective"] == frame["best_objective"].iloc[-1]
    assert frame[["best_loss", "best_latency_s"]].iloc[-1].tolist() == best[["loss", "latency_s"]].tolist()
    assert json.loads(best["policy"]) == json.loads(json.dumps(result.best_policy.to_dict()))
    assert len(set(result.policies)) == 20  # nothing is evaluated twice


def test_uniform_policies_are_searched_the_same_way():
    result = bayesian_search(synthetic, UNIFORM, ENCODE, 3, 3, method="uniform", num_candidates=16)
    assert all(len(set(policy.sub_models)) == 1 for policy in result.policies)
    assert (result.history["method"] == "uniform").all()


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    history, evaluated = tmp_path / "search.json", []

    def stops(policy):
        if len(evaluated) == 9:
            raise KeyboardInterrupt
        evaluated.append(policy)
        return synthetic(policy)

    with pytest.raises(KeyboardInterrupt):
        bayesian(objective=stops, history=history)
    rest = []
    result = bayesian(objective=lambda policy: rest.append(policy) or synthetic(policy), history=history)
    assert len(rest) == 11 and result == bayesian()
    assert bayesian(objective=None, history=history) == result  # all there
    more = bayesian(num_iterations=15, history=history)
    assert more.policies[:20] == result.policies and len(more.policies) == 21


def test_a_history_of_something_else_is_refused(tmp_path):
    history = tmp_path / "search.json"
    bayesian(num_iterations=0, history=history)
    with pytest.raises(ValueError, match="seed=0"):
        bayesian(seed=1, history=history)
    with pytest.raises(ValueError, match="method='bayesian'"):
        random_search(synthetic, SAMPLE, 5, history=history)
    history.write_text("{}")
    with pytest.raises(ValueError, match="not the history of a search"):
        bayesian(history=history)
    with pytest.raises(ValueError, match="num_initial=0"):
        bayesian_search(synthetic, SAMPLE, ENCODE, num_initial=0)


def test_expected_improvement_is_what_it_says():
    """Against the integral of max(best - y, 0) over the posterior, which is Eq. 11's with the kernel of Eq. 16."""
    rng = np.random.default_rng(0)
    evaluated, observed, candidates = rng.random((6, 3)), rng.random(6), rng.random((4, 3))

    def kernel(a, b):
        theta = np.sqrt(3) * np.linalg.norm(a[:, None] - b[None], axis=-1)
        return (1 + theta) * np.exp(-theta)

    standardised = (observed - observed.mean()) / observed.std()
    inverse = np.linalg.inv(kernel(evaluated, evaluated) + 1e-6 * np.eye(6))
    k = kernel(candidates, evaluated)
    mean, variance = k @ inverse @ standardised, 1 - np.einsum("ci,ij,cj->c", k, inverse, k)
    best = standardised.min()
    expected = [
        quad(lambda y, m=m, s=s: (best - y) * norm.pdf(y, m, s), m - 12 * s, best)[0]
        for m, s in zip(mean, np.sqrt(variance), strict=True)
    ]
    np.testing.assert_allclose(expected_improvement(evaluated, observed, candidates), expected, rtol=1e-4, atol=1e-9)


def test_a_fitted_length_scale_and_equal_observations_are_no_obstacle():
    evaluated = np.linspace(0.2, 0.9, 8)[:, None] * np.ones(3)
    low, high = expected_improvement(evaluated, evaluated.sum(1), np.array([[0.1] * 3, [0.95] * 3]), True)
    assert low > 0.1 > high >= 0
    assert np.isfinite(expected_improvement(evaluated, np.ones(8), evaluated + 0.05)).all()
