"""Fine-tuning of a pre-trained checkpoint on one task, and its score (DATE 2024, Section IV-A, Table III).

One process per run; many runs may go side by side. A finished run is read from its result.json, not repeated.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

import detransformer.models  # noqa: F401  (AutoModel knows decoupled BERT)
from detransformer.files import atomic_folder
from detransformer.parallel.wire_model import wire_plan, wired
from detransformer.training.checkpoints import Checkpointer, Progress, read_result, write_result
from detransformer.training.config import FinetuneConfig, ModelRow, config_hash
from detransformer.training.data import Task, TrainingData
from detransformer.training.data.tasks import get_task
from detransformer.training.features import (
    PreparedTask,
    best_spans,
    by_length,
    collate,
    epoch_batches,
    prepare_task,
)
from detransformer.training.hardware import keep_freed_memory, make_accelerator, resolve_precision
from detransformer.training.jobs import advance, run_jobs
from detransformer.training.metrics import classification_scores, majority_score, squad_scores
from detransformer.training.optim import learning_rate, set_learning_rate
from detransformer.training.pretraining import PretrainResult, finish, prepare
from detransformer.training.summary import accuracy_table

# The paper's "Acc" for SQuAD is not defined there; exact match is the share of questions answered right.
TABLE_METRIC = {"mcc": "mcc", "accuracy": "accuracy", "f1": "exact_match"}


def finetune(
    checkpoint: PretrainResult | str | Path,
    task: str,
    config: FinetuneConfig,
    data: TrainingData,
    seed: int,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
    keep_model: bool = False,
) -> dict:
    """Fine-tunes `checkpoint` on `task` with `seed` into `output_dir/` and returns its scores (times 100).

    Args:
        checkpoint: what `pretrain` returned, or the folder of a saved model.
        output_dir: of this one run; holds result.json and, while it runs, a checkpoint.
        keep_model: leave what was fine-tuned in `output_dir/model`, a Hugging Face folder, too.

    Raises:
        ValueError: for an unknown task, a folder that is no checkpoint, damaged data.
    """
    chosen, folder = get_task(task), Path(output_dir)
    model_folder, source_identity = source_of(checkpoint)
    precision = resolve_precision(config.mixed_precision)
    resolved = dataclasses.replace(config, mixed_precision=precision)
    identity = config_hash(resolved, source_identity, task, seed, data.name, data.fingerprint)
    done = read_result(folder / "result.json", identity)
    if done is not None and (not keep_model or (folder / "model").is_dir()):
        return done
    prepared = prepared_task(data, task, config)
    set_seed(seed)  # the head's weights, then dropout
    model = load_model(model_folder, chosen, config.dropout)
    keep_freed_memory()
    accelerator = make_accelerator(precision)
    model, optimizer = prepare(model, model, config, precision, accelerator)
    progress = Progress()
    checkpointer = Checkpointer(folder / "checkpoint", accelerator, progress, config.checkpoint_every_s, identity)
    checkpointer.resume()
    _train(model, optimizer, prepared, config, seed, accelerator, checkpointer, data.special.pad, on_step)
    finish(optimizer)
    scores = evaluate(model, prepared, config, data.special.pad, accelerator)
    result = {
        "identity": identity,
        "task": task,
        "seed": seed,
        "metric": TABLE_METRIC[chosen.metric],
        "score": scores[TABLE_METRIC[chosen.metric]],
        "majority_score": _majority(prepared),
        **scores,
        **_wire_scores(model, prepared, config, data.special.pad, accelerator),
        "train_loss": float(np.mean(progress.losses[-20:])),
        "num_steps": progress.step,
        "train_rows": len(prepared.rows.train),
        "eval_rows": len(prepared.rows.validation),
        "seconds": round(progress.seconds, 3),
        "precision": precision,
        "source": data.name,
        "note": prepared.rows.note,
        "config": dataclasses.asdict(config),
    }
    if keep_model:
        with atomic_folder(folder / "model") as temporary:
            accelerator.unwrap_model(model).save_pretrained(temporary)
            data.save_tokenizer(temporary)
    write_result(folder / "result.json", result)
    checkpointer.remove()
    return result


def finetune_all(
    pretrained: Iterable[PretrainResult],
    configs: Mapping[str, FinetuneConfig],
    num_seeds: Mapping[str, int],
    data: TrainingData,
    output_dir: str | Path,
    num_jobs: int = 1,
    wire_rows: Iterable[ModelRow] | None = None,
) -> pd.DataFrame:
    """Every pre-trained row on every task of `configs`, with seeds 0.. of that task: one row a run.

    Args:
        num_jobs: runs side by side.
        wire_rows: rows that are scored with the `wire_formats` of their task too; None is all.
    """
    wired = None if wire_rows is None else set(wire_rows)
    cells = []
    for result in pretrained:
        for task, config in configs.items():
            if wired is not None and result.row not in wired:
                config = dataclasses.replace(config, wire_formats=())
            for seed in range(num_seeds[task]):
                folder = Path(output_dir) / result.row.key / task / f"seed{seed}"
                cells.append((result, task, config, seed, folder))
    jobs = [(*cell[:3], data, *cell[3:]) for cell in cells]
    if num_jobs == 1:
        _opened[data.name, data.fingerprint] = data
    records = run_jobs(_finetune_job, jobs, num_jobs, "fine-tuning", len(jobs), "run")
    models = [dataclasses.asdict(cell[0].row) | {"pretraining": cell[0].note} for cell in cells]
    return accuracy_table([model | record for model, record in zip(models, records, strict=True)])


_opened: dict[tuple, TrainingData] = {}  # of this process: a worker reads and tokenises a task once for all its runs


def _finetune_job(result: PretrainResult, task, config, data: TrainingData, seed, folder) -> dict:
    data = _opened.setdefault((data.name, data.fingerprint), data)
    record = finetune(result, task, config, data, seed, folder)
    advance()
    return record


def load_model(folder: Path, task: Task, dropout: float):
    """The checkpoint's encoder with a fresh head for `task`.

    Raises:
        ValueError: if `folder` holds no BERT checkpoint.
    """
    auto = AutoModelForQuestionAnswering if task.is_question_answering else AutoModelForSequenceClassification
    labels = {} if task.is_question_answering else {"num_labels": len(task.labels)}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the fresh head is meant, not missing
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


def source_of(checkpoint: PretrainResult | str | Path) -> tuple[Path, str]:
    """(model folder, what identifies its weights)."""
    if isinstance(checkpoint, PretrainResult):
        return checkpoint.checkpoint, checkpoint.identity
    weights = Path(checkpoint) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{checkpoint} has no model.safetensors: pre-train first, or give a saved model's folder.")
    with open(weights, "rb") as file:
        return Path(checkpoint), hashlib.file_digest(file, "sha256").hexdigest()


def _wire_scores(model, prepared, config, pad, accelerator) -> dict[str, float]:
    """The task's score when messages between four devices have each of `config.wire_formats`."""
    scores = {}
    for name in config.wire_formats:
        with wired(model, wire_plan(model.config, wire=name)):
            found = evaluate(model, prepared, config, pad, accelerator)
        scores[f"score_{name}"] = found[TABLE_METRIC[prepared.rows.task.metric]]
    return scores


def _majority(prepared: PreparedTask) -> float:
    """What guessing scores: the most frequent label, or, of questions, one answer to all, which is right nowhere."""
    task = prepared.rows.task
    return 0.0 if task.is_question_answering else majority_score(task, list(prepared.rows.validation["label"]))


def prepared_task(data: TrainingData, task: str, config: FinetuneConfig) -> PreparedTask:
    """The task's features, tokenised once for all rows and seeds."""
    key = (task, config.max_train_rows, config.max_eval_rows, config.seq_len, config.stride)
    if key not in data.prepared:
        rows = data.task(task, config.max_train_rows, config.max_eval_rows)
        data.prepared[key] = prepare_task(rows, data.tokenizer, config.seq_len, config.stride)
    return data.prepared[key]


def _train(model, optimizer, prepared, config, seed, accelerator, checkpointer, pad, on_step) -> None:
    progress, features = checkpointer.progress, prepared.train
    lengths = [len(feature.tokens) for feature in features]
    per_epoch = math.ceil(len(features) / config.batch_size)
    num_steps = max(1, round(config.num_epochs * per_epoch))
    epoch, batches = -1, []
    model.train()
    with tqdm(total=num_steps, initial=progress.step, desc=prepared.rows.task.name, unit="step", leave=False) as bar:
        while progress.step < num_steps:
            start_s = time.perf_counter()
            if progress.step // per_epoch != epoch:
                epoch = progress.step // per_epoch
                batches = epoch_batches(lengths, config.batch_size, seed, epoch)
            rate = learning_rate(progress.step, num_steps, config.learning_rate, config.warmup)
            set_learning_rate(optimizer, rate)
            rows = batches[progress.step % per_epoch]
            total = 0.0
            for start in range(0, len(rows), config.micro_batch_size or len(rows)):
                part = rows[start : start + (config.micro_batch_size or len(rows))]
                batch = collate([features[i] for i in part], pad)
                with accelerator.autocast():
                    loss = model(**{name: t.to(accelerator.device) for name, t in batch.items()}).loss
                loss = loss * (len(part) / len(rows))
                accelerator.backward(loss)
                total += loss.item()
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            progress.losses.append(total)
            progress.step += 1
            progress.seconds += time.perf_counter() - start_s
            bar.update()
            checkpointer.save_if_due()
            if on_step is not None:
                on_step(progress.step, total)


@torch.no_grad()
def evaluate(model, prepared: PreparedTask, config: FinetuneConfig, pad: int, accelerator: Accelerator) -> dict:
    """Scores of the validation rows, times 100."""
    model.eval()
    features, task = prepared.validation, prepared.rows.task
    predicted = np.zeros(len(prepared.rows.validation), dtype=np.int64)
    answers: dict[int, tuple[float, int, int]] = {}  # row -> (score, first character, last character)
    for numbers in by_length(features, config.eval_batch_size):
        part = [features[i] for i in numbers]
        batch = {name: t.to(accelerator.device) for name, t in collate(part, pad).items()}
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        with accelerator.autocast():
            output = model(**inputs)
        if not task.is_question_answering:
            predicted[[f.row for f in part]] = output.logits.argmax(-1).cpu().numpy()
            continue
        in_context = torch.zeros(batch["input_ids"].shape, dtype=torch.bool, device=accelerator.device)
        for i, feature in enumerate(part):
            in_context[i, : len(feature.tokens)] = torch.from_numpy(feature.offsets[:, 0] >= 0)
        spans = best_spans(output.start_logits.float(), output.end_logits.float(), in_context, config.max_answer_tokens)
        for feature, start, end, score in zip(part, *(s.tolist() for s in spans), strict=True):
            if feature.row not in answers or score > answers[feature.row][0]:
                answers[feature.row] = (score, int(feature.offsets[start, 0]), int(feature.offsets[end, 1]))
    rows = prepared.rows.validation
    if not task.is_question_answering:
        return classification_scores(task, predicted, rows["label"])
    rows = [rows[i] for i in range(len(rows))]
    texts = {row["id"]: row["context"][answers[i][1] : answers[i][2]] for i, row in enumerate(rows)}
    return squad_scores(texts, rows)
