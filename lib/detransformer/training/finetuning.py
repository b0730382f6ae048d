"""Fine-tuning of a pre-trained checkpoint on one task, and its score (DATE 2024, Section IV-A, Table III).

One process per run; several runs may go side by side. A finished run is read from its result.json, not repeated.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

import detransformer.models  # noqa: F401  (AutoModel knows decoupled BERT)
from detransformer.parallel.wire_model import wire_plan, wired
from detransformer.training.config import FinetuneConfig, config_hash
from detransformer.training.data import Task, TrainingData
from detransformer.training.data.tasks import get_task
from detransformer.training.features import LengthGrouped, PreparedTask, best_spans, by_length, collate, prepared_task
from detransformer.training.jobs import run_jobs
from detransformer.training.loop import Objective, Run, fit
from detransformer.training.metrics import classification_scores, majority_score, squad_scores
from detransformer.training.results import accuracy_table, read_result, write_result

EVAL_BATCH = 64
MAX_ANSWER_TOKENS = 30


def finetune(
    checkpoint: Any,
    task: str,
    config: FinetuneConfig,
    data: TrainingData,
    seed: int,
    output_dir: str | Path,
    keep_model: bool = False,
) -> dict:
    """Fine-tunes `checkpoint` on `task` with `seed` into `output_dir/` and returns its scores (times 100).

    Args:
        checkpoint: a result of training, or the folder of a saved model.
        output_dir: folder of this run; holds history.csv, result.json and, while it runs, a checkpoint.
        keep_model: also save the fine-tuned model in `output_dir/model`, a Hugging Face folder.

    Raises:
        ValueError: for an unknown task, a folder that is not a checkpoint, or damaged data.
    """
    chosen, folder = get_task(task), Path(output_dir)
    model_folder, source_identity = source_of(checkpoint)
    identity = config_hash(config, source_identity, task, seed, data.name, data.fingerprint)
    run = Run(task, folder, identity)
    done = read_result(run)
    if done is not None and (not keep_model or (folder / "model").is_dir()):
        return done
    prepared, pad = prepared_task(data, task, config), data.special.pad
    set_seed(seed)  # the head's weights, then dropout
    model = load_model(model_folder, chosen, config.dropout)
    order = LengthGrouped([len(feature.tokens) for feature in prepared.train], config.batch_size, seed)

    def batches(step: int) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        rows = order.rows(step)
        size = config.micro_batch_size or len(rows)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield len(part) / len(rows), collate([prepared.train[i] for i in part], pad)

    num_steps = max(1, round(config.num_epochs * order.steps_per_epoch))
    objective = Objective(model, lambda model, **batch: model(**batch).loss)
    trained = fit(objective, batches, config, num_steps, run)
    scores = evaluate(model, prepared, pad)
    for name in config.wire_formats:
        with wired(model, wire_plan(model.config, wire=name)):
            scores[f"score_{name}"] = evaluate(model, prepared, pad)[chosen.metric]
    record = {
        "task": task,
        "seed": seed,
        "metric": chosen.metric,
        "score": scores[chosen.metric],
        "majority_score": majority_score(chosen, prepared.rows.validation),
        **scores,
        "train_loss": float(np.mean(trained.losses[-20:])),
        "num_steps": num_steps,
        "train_rows": len(prepared.rows.train),
        "eval_rows": len(prepared.rows.validation),
        "precision": config.mixed_precision,
        "source": data.name,
        "note": prepared.rows.note,
        "config": dataclasses.asdict(config),
    }
    save = (model.save_pretrained, data.save_tokenizer) if keep_model else ()
    return write_result(run, trained, record, "rows", config.batch_size, *save)


def finetune_all(
    models: Mapping[str, Any],
    configs: Mapping[str, FinetuneConfig],
    data: TrainingData,
    output_dir: str | Path,
    num_jobs: int = 1,
    wire_rows: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Fine-tunes every model on every task of `configs`, with seeds 0.. (`num_seeds`); a row a run (`accuracy_table`).

    Args:
        models: folders or training results, by their label in the table's column `row`.
        num_jobs: runs side by side.
        wire_rows: labels of models that are also scored with their task's `wire_formats`; None is all.
    """
    jobs, known = [], []
    for label, model in models.items():
        folder = Path(output_dir) / re.sub(r"[^\w.-]+", "-", label)
        structure = dataclasses.asdict(model.row) if hasattr(model, "row") else {}
        facts = {"row": label} | structure | {"pretraining": getattr(model, "note", "as downloaded")}
        for task, config in configs.items():
            if wire_rows is not None and label not in wire_rows:
                config = dataclasses.replace(config, wire_formats=())
            for seed in range(config.num_seeds):
                jobs.append((model, task, config, data, seed, folder / task / f"seed{seed}"))
                known.append(facts)
    records = run_jobs(finetune, jobs, num_jobs, "fine-tuning")
    return accuracy_table([facts | record for facts, record in zip(known, records, strict=True)])


def load_model(folder: Path, task: Task, dropout: float):
    """The checkpoint's encoder with a fresh head for `task`.

    Raises:
        ValueError: if `folder` has no BERT checkpoint.
    """
    auto = AutoModelForQuestionAnswering if task.is_question_answering else AutoModelForSequenceClassification
    labels = {} if task.is_question_answering else {"num_labels": len(task.labels)}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the head is fresh on purpose, not missing
    try:
        model = auto.from_pretrained(
            folder, **labels, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no checkpoint of BERT: pre-train first, or give a model folder.") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model.config.model_type not in ("bert", "decoupled_bert"):
        raise ValueError(f"{folder} is a {model.config.model_type} checkpoint, not BERT: give a BERT model folder.")
    return model


def source_of(checkpoint: Any) -> tuple[Path, str]:
    """(model folder, identity of its weights) of a training result or a folder."""
    if hasattr(checkpoint, "identity"):
        return checkpoint.checkpoint, checkpoint.identity
    weights = Path(checkpoint) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{checkpoint} has no model.safetensors: pre-train first, or give a saved model's folder.")
    with open(weights, "rb") as file:
        return Path(checkpoint), hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def evaluate(model: PreTrainedModel, prepared: PreparedTask, pad: int) -> dict[str, float]:
    """Scores of the validation rows, times 100."""
    model.eval()
    features, task = prepared.validation, prepared.rows.task
    predicted = np.zeros(len(prepared.rows.validation), dtype=np.int64)
    answers: dict[int, tuple[float, int, int]] = {}  # row -> (score, first character, last character)
    for numbers in by_length(features, EVAL_BATCH):
        part = [features[i] for i in numbers]
        batch = {name: t.to(model.device) for name, t in collate(part, pad).items()}
        output = model(**{name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
        if not task.is_question_answering:
            predicted[[f.row for f in part]] = output.logits.argmax(-1).cpu().numpy()
            continue
        in_context = torch.zeros(batch["input_ids"].shape, dtype=torch.bool, device=model.device)
        for i, feature in enumerate(part):
            in_context[i, : len(feature.tokens)] = torch.from_numpy(feature.offsets[:, 0] >= 0)
        spans = best_spans(output.start_logits.float(), output.end_logits.float(), in_context, MAX_ANSWER_TOKENS)
        for feature, start, end, score in zip(part, *(s.tolist() for s in spans), strict=True):
            if feature.row not in answers or score > answers[feature.row][0]:
                answers[feature.row] = (score, int(feature.offsets[start, 0]), int(feature.offsets[end, 1]))
    rows = prepared.rows.validation
    if not task.is_question_answering:
        return classification_scores(task, predicted, rows["label"])
    rows = [rows[i] for i in range(len(rows))]
    texts = {row["id"]: row["context"][answers[i][1] : answers[i][2]] for i, row in enumerate(rows)}
    return squad_scores(texts, rows)
