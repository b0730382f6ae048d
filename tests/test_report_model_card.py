"""Model cards: front matter that the Hub reads, and text that says no more than was measured."""

import pytest
import yaml
from huggingface_hub import ModelCard

from detransformer.report.model_card import model_card
from report_frames import accuracy_rows, pretraining_rows


def tables(num_seeds: int = 3):
    """(pre-training row, its runs) of the original and of Nb=4, Ndiv=4."""
    note = "reduced width: 12 layers, hidden 128"
    pretraining = pretraining_rows().assign(note=note, num_steps=100, seconds=7200.0, precision="bf16-weights")
    runs = accuracy_rows(num_seeds)
    original = pretraining[pretraining["num_original_layers"].isna()].iloc[0]
    decoupled = pretraining[(pretraining["num_original_layers"] == 4) & (pretraining["num_divisions"] == 4)].iloc[0]
    of = runs[(runs["num_original_layers"] == 4) & (runs["num_divisions"] == 4)]
    return (original, runs[runs["num_original_layers"].isna()]), (decoupled, of)


def parts(card: str) -> tuple[dict, str]:
    assert card.startswith("---\n")
    front, body = card[4:].split("\n---\n", 1)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_reads():
    (original, _), (row, runs) = tables()
    card = model_card(row, runs, "bert-nb4-ndiv4", original)
    front, _ = parts(card)
    assert front["license"] == "apache-2.0" and front["language"] == ["en"] and front["pipeline_tag"] == "fill-mask"
    assert front["datasets"] == ["wikimedia/wikipedia", "nyu-mll/glue", "rajpurkar/squad"]
    assert "detransformer" in front["tags"]
    results = front["model-index"][0]["results"]
    assert len(results) == 6 and front["model-index"][0]["name"] == "bert-nb4-ndiv4"
    cola = next(result for result in results if result["dataset"]["name"] == "CoLA")
    assert cola["metrics"][0]["type"] == "matthews_correlation" and cola["metrics"][0]["value"] == pytest.approx(33.65)
    data = ModelCard(card).data
    assert {result.metric_type for result in data.eval_results} >= {"perplexity", "accuracy", "exact_match"}


def test_text_has_scores_with_spread_beside_the_original():
    (original, originals), (row, runs) = tables()
    _, body = parts(model_card(row, runs, "small", original, originals, {"optimizer": "adamw"}, folder="models/small"))
    assert "| CoLA (mcc) | 33.65 ± 1.50 | 0.0 | 3 | 32.34 ± 1.50 |" in body
    assert "4 original layers, every other layer cut in 4 sub-blocks" in body and "- optimizer: adamw" in body
    assert 'from_pretrained("models/small")' in body and "import detransformer.models" in body
    assert "number format: bf16-weights" in body and "2.0 hours" in body and "CC BY-SA" in body


def test_an_original_of_one_seed_at_chance_says_so():
    (row, runs), _ = tables(num_seeds=1)
    runs.loc[runs["task"] == "MRPC", "score"] = 62.5
    front, body = parts(model_card(row, runs, "original"))
    assert "detransformer" not in front["tags"] and "import detransformer" not in body
    assert "| CoLA (mcc) | 32.34 | 0.0 | 1 |" in body and "No better than the most frequent label: MRPC." in body
    assert front["model-index"][0]["results"][1]["metrics"][0]["name"].endswith("one seed")


def test_a_model_without_tasks_has_a_card():
    (original, originals), (row, runs) = tables()
    front, body = parts(model_card(row, runs.head(0), "small", original, originals))
    assert len(front["model-index"][0]["results"]) == 1 and front["datasets"] == ["wikimedia/wikipedia"]
    assert "Not fine-tuned on any task here." in body
    _, body = parts(model_card(row, runs, "small", original))
    assert "| not run |" in body, "the original was not fine-tuned"
