"""Model cards of pre-trained models in the Hugging Face Hub's format: YAML front matter, then Markdown.

Made from a run's tables alone (`pretraining`, `accuracy_runs`), so that a card says no more than was measured.
"""

from collections.abc import Mapping

import pandas as pd
import yaml

from detransformer.report.accuracy import MLM, learned

LICENSE = "apache-2.0"
TEXT = "wikimedia/wikipedia"
DATASETS = {  # task: (Hub dataset, config, kind of task)
    "CoLA": ("nyu-mll/glue", "cola", "text-classification"),
    "SST-2": ("nyu-mll/glue", "sst2", "text-classification"),
    "MRPC": ("nyu-mll/glue", "mrpc", "text-classification"),
    "MNLI": ("nyu-mll/glue", "mnli", "text-classification"),
    "SQuAD": ("rajpurkar/squad", "plain_text", "question-answering"),
}
METRICS = {"mcc": "matthews_correlation", "accuracy": "accuracy", "exact_match": "exact_match"}


def model_card(
    pretraining: Mapping,
    accuracy: pd.DataFrame,
    name: str,
    original: Mapping | None = None,
    original_accuracy: pd.DataFrame | None = None,
    training: Mapping | None = None,
    folder: str = "",
    repository: str = "",
) -> str:
    """The card of one pre-trained model.

    Args:
        pretraining: the model's row of table `pretraining`.
        accuracy: its rows of table `accuracy_runs`, one a task and seed; none where it was not fine-tuned.
        name: of the model, in the index and the title.
        original: the original model's row of `pretraining`, to compare a decoupled one with.
        original_accuracy: the original model's rows of `accuracy_runs`.
        training: hyper-parameters in the order they are to be listed (optimizer, rate, sequence length, ...).
        folder: where the model lies in the repository, for the loading example; `name` if empty.
        repository: address of the code, if it is public.
    """
    scores = _scores(accuracy)
    parts = [
        f"---\n{_front_matter(pretraining, scores, name)}---",
        f"# {name}",
        _what(pretraining, repository),
        "## Use",
        _use(pretraining, folder or name),
        "## Training",
        _training(pretraining, training or {}),
        "## Scores",
        _score_lines(pretraining, scores, original, _scores(original_accuracy)),
        "## Limits",
        _limits(pretraining, scores),
        "## Licence",
        "Weights and code: Apache-2.0. The text is from English Wikipedia, by its contributors, under Creative Commons "
        "Attribution-ShareAlike (CC BY-SA); the text itself is not part of this model.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(row: Mapping, scores: pd.DataFrame, name: str) -> str:
    results = [_result("fill-mask", "English Wikipedia, held out", TEXT, None, "perplexity", row["perplexity"], 1)]
    for score in scores.itertuples():
        dataset, config, kind = DATASETS[score.task]
        metric = METRICS.get(score.metric, score.metric)
        results.append(_result(kind, score.task, dataset, config, metric, score.score, score.num_seeds))
    datasets = [TEXT, *dict.fromkeys(DATASETS[task][0] for task in scores["task"])]
    tags = [
        "bert",
        "fill-mask",
        *([] if _is_original(row) else ["detransformer", "model-parallelism", "edge-inference"]),
    ]
    front = {
        "license": LICENSE,
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "datasets": datasets,
        "tags": tags,
        "model-index": [{"name": name, "results": results}],
    }
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _result(kind: str, title: str, dataset: str, config: str | None, metric: str, value: float, num_seeds: int) -> dict:
    words = f"{metric.replace('_', ' ')}, mean of {num_seeds} seeds" if num_seeds > 1 else f"{metric}, one seed"
    split = "validation_matched" if config == "mnli" else "validation"
    return {
        "task": {"type": kind},
        "dataset": {"name": title, "type": dataset} | ({"config": config, "split": split} if config else {}),
        "metrics": [{"type": metric, "value": round(float(value), 2), "name": words}],
    }


def _what(row: Mapping, repository: str) -> str:
    code = f"[DeTransformer, reproduced]({repository})" if repository else "DeTransformer, reproduced"
    width = f"hidden size {int(row['hidden_size'])}"
    if _is_original(row):
        return (
            f"A small BERT ({width}), the original structure: pre-trained to be compared with decoupled ones under "
            f"identical hyper-parameters. From {code}; the method is that of DeTransformer (DATE 2024)."
        )
    nb, ndiv = int(row["num_original_layers"]), int(row["num_divisions"])
    variant = [
        f"{row['attention_width']} sub-blocks" if row.get("attention_width", "full") != "full" else "",
        f"original layers placed {row['original_placement']}"
        if row.get("original_placement", "last") != "last"
        else "",
    ]
    variant = "".join(f", {words}" for words in variant if words)
    return (
        f"A small decoupled BERT ({width}): {nb} original layers, every other layer cut in {ndiv} sub-blocks that do "
        f"not talk to each other (Nb={nb}, Ndiv={ndiv}{variant}), so that {ndiv} devices run it together with few "
        f"messages. From {code}; the method is that of DeTransformer (DATE 2024)."
    )


def _use(row: Mapping, folder: str) -> str:
    known = "" if _is_original(row) else "import detransformer.models  # makes the Auto classes know decoupled models\n"
    lines = [
        "```python",
        f"{known}from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        f'model = AutoModelForMaskedLM.from_pretrained("{folder}")',
        'text = tokenizer("Paris is the [MASK] of France.", return_tensors="pt")',
        "print(tokenizer.decode(model(**text).logits[0].argmax(-1)))",
        "```",
    ]
    if not _is_original(row):
        lines += ["", "Over devices (after fine-tuning, for an answer that means something):", "", "```"]
        lines += [f"detransformer plan --model {folder} --bandwidth 125 --explain", "```"]
    return "\n".join(lines)


def _training(row: Mapping, training: Mapping) -> str:
    precision = row.get("precision")
    facts = {
        "objective": "masked language model, no next-sentence task",
        "text": f"English Wikipedia ({row['note']})",
        "tokens seen": f"{int(row['tokens']):,} in {int(row['num_steps']):,} steps",
        "seed": int(row.get("seed", 0)),
        "number format": precision if isinstance(precision, str) and precision != "no" else "float32",
        "time": f"{row['seconds'] / 3600:.1f} hours",
    }
    return "\n".join(f"- {name}: {value}" for name, value in (facts | dict(training)).items())


def _score_lines(row: Mapping, scores: pd.DataFrame, original: Mapping | None, originals: pd.DataFrame) -> str:
    compared = original is not None and not _is_original(row)
    lines = ["| task | score | most frequent label | seeds |" + (" original model |" if compared else "")]
    lines += ["|---|---|---|---|" + ("---|" if compared else "")]
    theirs = originals.set_index("task")
    for score in scores.itertuples():
        label = "-" if score.task == "SQuAD" else f"{score.majority_score:.1f}"
        line = f"| {score.task} ({score.metric.replace('_', ' ')}) | {_value(score)} | {label} | {score.num_seeds} |"
        if compared:
            line += f" {_value(theirs.loc[score.task]) if score.task in theirs.index else 'not run'} |"
        lines.append(line)
    line = f"| {MLM}, held-out text (perplexity, lower is better) | {row['perplexity']:.2f} | - | 1 |"
    lines.append(line + (f" {original['perplexity']:.2f} |" if compared else ""))
    notes = [f"{score.task}: {score.note}." for score in scores.itertuples() if isinstance(score.note, str)]
    spread = "Scores are times 100, mean ± standard deviation over fine-tuning seeds of this one pre-trained model."
    return "\n".join([*lines, "", " ".join([spread, *dict.fromkeys(notes)])])


def _limits(row: Mapping, scores: pd.DataFrame) -> str:
    lines = [
        f"- Trained on {int(row['tokens']):,} tokens at a reduced size, to compare structures: no match for a full "
        "BERT, and not meant for use in products.",
        "- It has the gaps and prejudices of its text, and has not been examined for them.",
    ]
    weak = list(scores.loc[~learned(scores), "task"]) if len(scores) else []
    if weak:
        lines.append(f"- No better than the most frequent label: {', '.join(weak)}.")
    if not len(scores):
        lines.append("- Not fine-tuned on any task here.")
    return "\n".join(lines)


def _scores(runs: pd.DataFrame | None) -> pd.DataFrame:
    """One row a task: mean score, spread (NaN for one seed), num_seeds and what the runs say of it."""
    columns = ["task", "metric", "score", "spread", "num_seeds", "majority_score", "eval_rows", "note"]
    if runs is None or not len(runs):
        return pd.DataFrame(columns=columns)
    rows = []
    for task, group in runs.groupby("task", sort=False):
        first = group.iloc[0]
        made = dict(task=task, metric=first["metric"], score=group["score"].mean(), spread=group["score"].std(ddof=1))
        made |= {name: first.get(name) for name in ("majority_score", "eval_rows", "note")}
        rows.append(made | {"num_seeds": len(group)})
    return pd.DataFrame(rows)[columns]


def _value(score) -> str:
    return f"{score.score:.2f}" if pd.isna(score.spread) else f"{score.score:.2f} ± {score.spread:.2f}"


def _is_original(row: Mapping) -> bool:
    return bool(pd.isna(row["num_original_layers"]))
