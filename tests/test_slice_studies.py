"""Orders of hidden units (notebook 03): the model stays the same, and grouping finds what belongs together."""

import copy

import numpy as np
import torch
from slice_studies import couplings, grouped, reordered


def test_a_reordered_model_computes_the_same(cases):
    """Any order of the hidden units gives the same outputs, in that order; the pooler's are as they were."""
    model = cases["original"].model
    order = np.random.default_rng(1).permutation(model.config.hidden_size)
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():
        expected, found = model(ids), reordered(copy.deepcopy(model), order)(ids)
    assert float((expected.last_hidden_state[..., order] - found.last_hidden_state).abs().max()) < 1e-12
    assert float((expected.pooler_output - found.pooler_output).abs().max()) < 1e-12


def test_units_that_are_coupled_share_a_slice():
    """Four groups of units, shuffled, are found again; each slice has its part of the units."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 6))
    order = grouped((groups[:, None] == groups) + 0.1, 4)
    assert sorted(order) == list(range(24))
    assert all(len(set(groups[part])) == 1 for part in order.reshape(4, 6))


def test_couplings_are_of_the_whole_model(cases):
    """They are symmetric, and the two maps of each of five layers have sum 1 in either direction."""
    found = couplings(cases["original"].model)
    assert np.allclose(found, found.T)
    assert np.isclose(found.sum(), 2 * 2 * 5)
