"""Probes of frozen vectors: the vectors themselves, what a probe and retrieval find, their table."""

import numpy as np
import pandas as pd
import pytest
import torch
from accuracy_studies import (
    Outcome,
    ProbeConfig,
    bag_of_words,
    fit_probe,
    kept,
    majority,
    probe,
    probe_table,
    sentence_vectors,
    wide,
)
from pretraining_studies import published_runs
from transformers import AutoModel

from detransformer.files import repository_root
from detransformer.record.published import published
from detransformer.record.run import RunFolder
from detransformer.tables.accuracy import table_iii
from detransformer.tables.claims import structure_of

TASKS = {
    "SST-2": ProbeConfig(max_train_rows=200, max_eval_rows=80, seq_len=32),
    "MRPC": ProbeConfig(max_train_rows=100, max_eval_rows=40, seq_len=32),
    "retrieval": ProbeConfig(max_train_rows=50, max_eval_rows=40, seq_len=64),
}


def test_vectors_do_not_depend_on_the_company(data, small_bert):
    model = AutoModel.from_pretrained(small_bert).eval()
    texts = ["the film is warm and clever.", "Anna bought a red kite in Paris.", "dull"]
    together = sentence_vectors(model, texts, data, 32)
    alone = np.concatenate([sentence_vectors(model, [text], data, 32) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    ids = torch.tensor([data.tokenizer.encode(texts[0]).ids])
    mean = model(ids).last_hidden_state.mean(1)
    np.testing.assert_allclose(together[0], (mean / mean.norm()).detach().numpy()[0], atol=1e-5)


def test_a_probe_finds_what_is_there_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    noise = rng.normal(size=(400, 8))
    there = noise + labels[:, None]
    found = [(fit_probe(x[:300], labels[:300], x[300:]) == labels[300:]).mean() for x in (there, noise)]
    assert found[0] > 0.9 and found[1] < 0.65


def test_outcomes_are_kept_and_make_a_table(data, small_bert, tmp_path):
    outcomes = {"small original": probe(small_bert, TASKS, data, tmp_path)}
    again = probe(small_bert, TASKS, data, tmp_path)
    assert all(np.array_equal(again[name].predicted, outcomes["small original"][name].predicted) for name in TASKS)
    outcomes |= {"bag of words": bag_of_words(TASKS, data), "majority": majority(TASKS, data)}
    table = probe_table(outcomes, "small original")
    assert list(table["task"].unique()) == ["SST-2", "MRPC", "retrieval@1", "retrieval@10"]
    own = table[table["row"] == "small original"]
    assert (own["difference"] == 0).all() and own["difference_low"].isna().all()
    words = table[(table["row"] == "bag of words") & (table["task"] == "SST-2")].iloc[0]
    assert words["score"] > 90 and words["difference_low"] <= words["difference"] <= words["difference_high"]
    guess = table[(table["row"] == "majority") & (table["task"] == "SST-2")].iloc[0]
    assert guess["score"] == pytest.approx(guess["majority_score"]) and guess["score"] < 65
    assert wide(table).loc["bag of words", "SST-2"].startswith(f"{words['score']:.1f}")


def test_the_share_kept_is_of_what_the_original_has_learned():
    labels = np.tile([0, 1], 200)
    right, half = Outcome(labels, labels, ""), Outcome(np.where(np.arange(400) < 300, labels, 1 - labels), labels, "")
    blind = Outcome(np.zeros(400, dtype=int), labels, "")
    outcomes = {"m original": {"SST-2": right, "MRPC": blind}, "m, 3 layers, cut": {"SST-2": half, "MRPC": right}}
    table = kept(probe_table(outcomes, "m original"), "m original").set_index("row")
    assert table.loc["m original", "share"] == 100 and table["tasks"].unique().tolist() == ["SST-2"]
    cut = table.loc["m, 3 layers, cut"]
    assert cut["share"] == 75 and cut["low"] < 75 < cut["high"] and cut["judged"] == "does not hold"
    outcomes |= {"bag of words": {"SST-2": right, "MRPC": blind}}  # a task that counting words does as well is no test
    table = kept(probe_table(outcomes, "m original"), "m original").set_index("row")
    assert table["share"].isna().all() and table.loc["m, 3 layers, cut", "judged"] == "not tested"
    outcomes |= {"bag of words": {"SST-2": blind, "MRPC": blind}}
    table = kept(probe_table(outcomes, "m original"), "m original").set_index("row")
    assert table.loc["bag of words", "share"] == 50 and table.loc["bag of words", "judged"] == ""
    assert structure_of("m Nb=2, Ndiv=4, 1,000,000 tokens") == "m Nb=2, Ndiv=4"
    assert structure_of("m, 3 layers, cut") == "m, 3 layers"


def test_notebook_02_goes_on_where_nothing_was_fine_tuned(tmp_path):
    runs = published_runs(RunFolder(tmp_path))
    assert runs.empty and {"structure", "score", "pretraining", "f1"} <= set(runs)
    models = pd.read_csv(repository_root() / "results/reference/tables/pretraining.csv")
    table = table_iii(runs, published("table_iii"), "quick", models)
    tasks = table[table["task"] != "MLM"]  # perplexity is pre-training's
    assert tasks["obtained_mean"].isna().all() and set(tasks["status"]) == {"not run (profile quick)"}
