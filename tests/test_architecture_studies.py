"""The study of notebook 15: rows that are trained alike and kept, differences by seed, prices by the architecture."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from architecture_studies import (
    ArchitectureRecipe,
    architecture_rows,
    beside_losses,
    compared_losses,
    cost_rows,
    train_architectures,
)

from detransformer.training import open_data
from detransformer.training.pretraining import build_model

ROWS = architecture_rows(
    {
        "original": {},
        "decoupled": {"num_original_layers": 1, "num_divisions": 4},
        "ladder": {"sync": "ladder"},
        "tracks, D=2": {"sync": "parts", "fuse_every": 2},
    }
)
TINY = ArchitectureRecipe(
    **dict(num_layers=4, hidden_size=16, num_heads=4, vocab_size=512, num_steps=2, seq_len=16, global_batch_size=2),
    **dict(micro_batch_size=2, max_train_tokens=2000, max_valid_tokens=320),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data("built-in", tmp_path_factory.mktemp("cache"))


def test_rows_are_trained_once(data, tmp_path):
    """By seed, then by objective; a second call reads them back, and a masked model is asked for fewer tokens."""
    options = dict(seeds=[0, 1], objectives=["causal", "masked"])
    made = list(train_architectures(tmp_path, ROWS[1:3], TINY, data, **options))
    asked = [(row["seed"], row["objective"], row["architecture"]) for row in made]
    assert asked == [(s, o, a) for s in (0, 1) for o in ("causal", "masked") for a in ("decoupled", "ladder")]
    assert list(train_architectures(tmp_path, ROWS[1:3], TINY, data, **options)) == made
    assert len({row["valid_loss"] for row in made}) == 8 and len({row["tokens"] for row in made}) == 1


@pytest.mark.parametrize("masked", [True, False])
def test_all_start_from_the_same_weights_and_see_as_much(data, masked):
    recipe = replace(TINY, masked=masked)
    models = [build_model(row, recipe, data).eval() for row in ROWS]
    words = [model.transformer.wte.weight for model in models]
    assert all(torch.equal(weight, words[0]) for weight in words)
    ids = torch.randint(100, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 100
    with torch.no_grad():
        sees_later = [bool((m(ids).logits[:, 0] != m(changed).logits[:, 0]).any()) for m in models]
    assert sees_later == [masked] * len(ROWS)


def test_differences_are_by_seed():
    """Of a row without all seeds only those count that the original has too."""
    losses = {"original": [5.0, 6.0, 7.0], "ladder": [4.9, 5.9, 6.9], "tracks, D=2": [5.5]}
    runs = pd.DataFrame(
        {"objective": "causal", "architecture": name, "seed": seed, "valid_loss": loss, "unigram_loss": 6.5}
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    )
    found = compared_losses(runs).set_index("architecture")
    ladder, tracks = found.loc["ladder"], found.loc["tracks, D=2"]
    assert ladder["difference"] == pytest.approx(-0.1) and ladder["low"] == pytest.approx(ladder["high"])
    assert tracks["difference"] == pytest.approx(0.5) and pd.isna(tracks["low"])
    assert found.loc["original", "below_unigram"] == pytest.approx(0.5)


def test_prices_are_the_architectures():
    """Tracks of four layers, fused after two, send two sums; a ladder all that tensor parallelism sends."""
    costs = cost_rows(ROWS, TINY, [125])
    trained = costs[costs["size"] == "trained"].set_index("architecture")
    one_sum = 2 * 3 * 128 * 16 * 4 // 4
    assert trained.loc["tracks, D=2", "sent_bytes"] == 2 * one_sum
    assert trained.loc["ladder", "sent_bytes"] == trained.loc["original, tensor parallel", "sent_bytes"] == 8 * one_sum
    assert trained.loc["ladder", "latency_s"] < trained.loc["original, tensor parallel", "latency_s"]
    assert trained["parameters"].max() / trained["parameters"].min() < 1.05  # of so narrow a model biases are many
    base = costs[costs["size"] == "BERT-Base"].set_index("architecture")
    assert base.loc["original", "alone_s"] == pytest.approx(1.57, rel=0.01)  # as published of a Raspberry Pi
    losses = pd.DataFrame({"architecture": ["original", "ladder"], "difference": [0.0, 0.1]})
    assert len(beside_losses(costs, losses)) == 2 * 3  # the original has two plans
