"""The search: on a known objective better than chance, the same when it goes on after a stop, EI as in books."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from detransformer.coformer.policy import Limits, Original, flops
from detransformer.coformer.search import METHODS, Evaluation, SearchConfig, expected_improvement, search_policy

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINAL = Original(num_layers=4, hidden_size=96, num_heads=6, ffn_size=192, seq_len=16)
LIMITS = Limits.share(ORIGINAL, 0.5, 3)
SPEEDS = (1.0, 3.0, 2.0)  # of three devices


def synthetic(policy):
    """Loss falls with a sub-model's size, the slowest device is waited for: as Eq. 8, without a model."""
    whole = flops(ORIGINAL.whole, ORIGINAL)
    sizes = np.array([flops(config, ORIGINAL) / whole for config in policy.sub_models])
    loss, latency_s = float(np.mean(np.exp(-8 * sizes))), float(max(sizes / SPEEDS))
    return Evaluation(loss, latency_s, loss + 2.0 * latency_s)


def search(method="bayesian", seed=0, num_iterations=8, objective=synthetic, **kwargs):
    return search_policy(objective, ORIGINAL, 3, SearchConfig(6, num_iterations, seed=seed), LIMITS, method, **kwargs)


@pytest.mark.slow
def test_bayesian_search_is_at_least_as_good_as_chance():
    wins = 0
    for seed in range(5):
        found, drawn = (search(method, seed, num_iterations=24).evaluations for method in ("bayesian", "random"))
        assert found[:6] == drawn[:6]  # they start alike
        wins += min(e.objective for e in found) <= min(e.objective for e in drawn)
    assert wins >= 4


def test_the_best_policy_has_the_least_objective_and_none_is_evaluated_twice():
    result = search()
    objectives = [evaluation.objective for evaluation in result.evaluations]
    assert len(set(result.policies)) == 14 == len(objectives)
    assert synthetic(result.best_policy).objective == min(objectives)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_its_policies(method):
    result = search(method, num_iterations=2)
    assert len(result.policies) == 8
    alike = [len(set(policy.sub_models)) == 1 for policy in result.policies]
    assert all(alike) if method == "uniform" else not all(alike)


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    history, evaluated = tmp_path / "search.json", []

    def stops(policy):
        if len(evaluated) == 9:
            raise KeyboardInterrupt
        evaluated.append(policy)
        return synthetic(policy)

    with pytest.raises(KeyboardInterrupt):
        search(objective=stops, history=history)
    rest = []
    result = search(objective=lambda policy: rest.append(policy) or synthetic(policy), history=history)
    assert len(rest) == 5 and result == search()
    assert search(objective=None, history=history) == result  # all there
    more = search(num_iterations=9, history=history)
    assert more.policies[:14] == result.policies and len(more.policies) == 15


def test_a_damaged_history_and_wrong_settings_are_named(tmp_path):
    history = tmp_path / "search.json"
    for content in ("{}", "[]", "{"):
        history.write_text(content)
        with pytest.raises(ValueError, match="not the history of a search"):
            search(history=history)
    with pytest.raises(ValueError, match="num_initial=0"):
        SearchConfig(num_initial=0)
    with pytest.raises(ValueError, match="'genetic' is unknown"):
        search("genetic")


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
    np.testing.assert_allclose(expected_improvement(evaluated, candidates, observed), expected, rtol=1e-4, atol=1e-9)


def test_a_fitted_length_scale_and_equal_observations_are_no_obstacle():
    evaluated = np.linspace(0.2, 0.9, 8)[:, None] * np.ones(3)
    low, high = expected_improvement(evaluated, np.array([[0.1] * 3, [0.95] * 3]), evaluated.sum(1), True)
    assert low > 0.1 > high >= 0
    assert np.isfinite(expected_improvement(evaluated, evaluated + 0.05, np.ones(8))).all()
