"""The studies of notebook 03: calibration over tokens, and how much of the original's scores a changed encoder keeps.

A probe is a logistic regression (scikit-learn) on frozen vectors, for a pair on [u, v, |u - v|, u v] (Conneau et al.
2017); a fifth of the training rows decides its regularisation (Matthews correlation). Retrieval ranks all paragraphs
for each SQuAD question by the cosine of their vectors. Baselines are the most frequent label and bags of words
(TF-IDF). Differences to the original model have intervals from a paired bootstrap over the validation rows: the effect
of another sample of rows, not of another training.

Shapes: N texts, D hidden, C classes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import hstack, issparse
from seaborn import FacetGrid
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer, matthews_corrcoef
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel

import detransformer.models  # noqa: F401  (AutoModel knows decoupled BERT)
from detransformer.files import atomic_write
from detransformer.record.intervals import NUM_ERRORS, around
from detransformer.record.verdict import Verdict
from detransformer.tables.accuracy import compared, learned
from detransformer.training import CalibrationConfig, ModelRow, TrainingData, calibrate
from detransformer.training.config import Checked, config_hash, positive
from detransformer.training.data.tasks import get_task
from detransformer.training.finetuning import source_of
from detransformer.training.hardware import place, resolve_precision
from detransformer.training.metrics import classification_scores, majority_score
from detransformer.training.results import Result

STRUCTURE = ["num_original_layers", "num_divisions", "num_layers"]
RETRIEVAL = "retrieval"
STRENGTHS = (10.0, 1.0, 0.1, 0.01)  # of C, the inverse strength of regularisation; the first wins a tie
TEXTS_PER_BATCH = 64
RESAMPLES = 500
KEPT_PERCENT = 97.0  # of the original's mean over the tasks it has learned
BASELINES = ("majority", "bag of words")
RANGE = ["difference_low", "difference_high"]

Read = Callable[[Sequence[str]], Any]  # texts to vectors [N, D], an array or a sparse matrix


# Calibration over tokens -----------------------------------------------------------------------------------------


def calibration_curve(
    teacher: str | Path,
    row: ModelRow,
    budgets: Sequence[float],
    config: CalibrationConfig,
    data: TrainingData,
    output_dir: str | Path,
) -> list[Result]:
    """`row` as cut, after the closed form, and trained on each number of tokens, each training continuing the last.

    Args:
        budgets: total tokens trained on, ascending; each has a schedule of its own.

    Raises:
        ValueError: for budgets that do not ascend, and as `calibrate`.
    """
    untrained = dataclasses.replace(config, num_steps=0)
    found = [calibrate(teacher, row, dataclasses.replace(untrained, fit_sequences=0), data, output_dir)]
    if not row.is_original and config.fit_sequences:
        found.append(calibrate(teacher, row, untrained, data, output_dir))
    for budget in budgets:
        done = found[-1].tokens
        steps = round((budget - done) / config.tokens_per_step)
        if steps < 1:
            raise ValueError(
                f"a budget of {budget:,.0f} tokens is not above {done:,}: give ascending numbers of tokens."
            )
        chosen = dataclasses.replace(config, num_steps=steps, seed=config.seed + done)
        found.append(calibrate(teacher, row, chosen, data, output_dir, found[-1]))
    return found


def calibration_table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a model: row, Nb, Ndiv, num_layers (all), stage, tokens, errors, cosine, training seconds, source, note.

    stage: `sliced` or `cut` (fewer layers), `closed form`, `trained`; tokens are those trained on, or those that the
    closed form read. `error` is the last layer's, `mean_error` over layers, held-out and relative to the teacher's.
    """
    frame = pd.DataFrame(vars(result) | vars(result.row) | {"row": result.row.label} for result in results)
    frame["tokens"] = frame["tokens"].where(frame["tokens"] > 0, frame["fit_tokens"])
    frame["error"], frame["mean_error"] = frame["errors"].str[-1], frame["errors"].map(np.mean)
    frame["num_layers"] = frame["errors"].str.len()
    columns = ["row", *STRUCTURE, "stage", "tokens", "error", "mean_error", "cosine", "seconds", "source", "note"]
    return frame[columns].astype(dict.fromkeys(STRUCTURE, "Int64"))


# Probes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """Rows and lengths of one task; for retrieval `max_train_rows` is the number of paragraphs, all if None.

    Args:
        max_train_rows, max_eval_rows: None takes all; every table calls a cut set reduced.
        seq_len: the most tokens of a text.
    """

    max_train_rows: int | None = positive(None)
    max_eval_rows: int | None = positive(None)
    seq_len: int = positive(128)


@dataclass(frozen=True)
class Outcome:
    """For one model and task, by row: predicted and true label, or the rank and number of a question's paragraph."""

    predicted: np.ndarray
    labels: np.ndarray
    note: str


@torch.no_grad()
def sentence_vectors(
    model, texts: Sequence[str], data: TrainingData, seq_len: int, batch_size: int = TEXTS_PER_BATCH
) -> np.ndarray:
    """Mean over tokens of the last layer's output, normalised [N, D]: sentence-transformers' mean pooling.

    Args:
        model: an encoder in eval mode, with `data`'s tokens.
        batch_size: texts at once, shorter ones padded.
    """
    tokenizer = type(data.tokenizer).from_str(data.tokenizer.to_str())  # a copy: truncation is a tokenizer's state
    tokenizer.enable_truncation(seq_len)
    rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = pad_sequence([rows[i] for i in part], batch_first=True, padding_value=data.special.pad)
        mask = pad_sequence([torch.ones_like(rows[i]) for i in part], batch_first=True)
        hidden = model(ids, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        vectors[part] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return vectors


def pair_features(vectors: Sequence) -> Any:
    """One column of vectors unchanged; for two [N, D] the four parts [N, 4 D]."""
    if len(vectors) == 1:
        return vectors[0]
    u, v = vectors
    if issparse(u):
        return hstack([u, v, abs(u - v), u.multiply(v)]).tocsr()
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1)


def fit_probe(train, labels: np.ndarray, test) -> np.ndarray:
    """Predicted labels of `test` by a logistic regression on `train`, features standardised unless sparse."""
    order = np.random.default_rng(0).permutation(train.shape[0])
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    scale, by = ("passthrough", 1) if issparse(train) else (StandardScaler(), 100)
    probe = make_pipeline(scale, LogisticRegression(max_iter=200))
    strengths = {"logisticregression__C": [strength / by for strength in STRENGTHS]}
    search = GridSearchCV(probe, strengths, scoring=make_scorer(matthews_corrcoef), cv=[(rest, held_out)])
    return search.fit(train, labels).predict(test)


def probe(
    checkpoint: Any, tasks: Mapping[str, ProbeConfig], data: TrainingData, output_dir: str | Path
) -> dict[str, Outcome]:
    """Predictions of the encoder of `checkpoint` (a folder, or a result that has one) for each task; kept in a file.

    Raises:
        ValueError: for an unknown task, or a folder that is not a checkpoint.
    """
    folder, source = source_of(getattr(checkpoint, "checkpoint", checkpoint))
    model, found = None, {}
    for name, config in tqdm(tasks.items(), desc=folder.name, unit="task", leave=False, disable=None):
        identity = config_hash("probe", source, name, config, data.name, data.fingerprint)
        path = Path(output_dir) / f"{name}-{identity}.npz"
        if not path.exists():
            model = _encoder(folder) if model is None else model
            read = partial(sentence_vectors, model, data=data, seq_len=config.seq_len)
            made = outcome_of(read, name, config, data)
            with atomic_write(path, "wb") as file:
                np.savez_compressed(file, predicted=made.predicted, labels=made.labels, note=made.note)
        with np.load(path) as saved:
            found[name] = Outcome(saved["predicted"], saved["labels"], str(saved["note"]))
    return found


def _encoder(folder: Path):
    """The encoder of a checkpoint, in bfloat16 if this processor is fast with it."""
    model, precision = AutoModel.from_pretrained(folder).eval(), resolve_precision("auto")
    place(model, precision)
    return model.cpu().to(torch.float32 if precision == "no" else torch.bfloat16)


def bag_of_words(tasks: Mapping[str, ProbeConfig], data: TrainingData) -> dict[str, Outcome]:
    """As `probe`, with TF-IDF vectors of words (and pairs of words) in place of a model's."""
    found = {}
    for name, config in tasks.items():
        if name == RETRIEVAL:
            words, texts = TfidfVectorizer(sublinear_tf=True, stop_words="english"), _questions(config, data)[1]
        else:
            rows = data.task(name, config.max_train_rows, config.max_eval_rows)
            texts = [text for column in rows.task.columns for text in rows.train[column]]
            words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        found[name] = outcome_of(words.fit(texts).transform, name, config, data)
    return found


def majority(tasks: Mapping[str, ProbeConfig], data: TrainingData) -> dict[str, Outcome]:
    """As `probe`, with the training rows' most frequent label for all; for retrieval one paragraph for all."""
    found = {}
    for name, config in tasks.items():
        if name == RETRIEVAL:
            questions, paragraphs, right = _questions(config, data)
            found[name] = Outcome(np.ones(len(questions)) * len(paragraphs), right, "")
            continue
        rows = data.task(name, config.max_train_rows, config.max_eval_rows)
        labels = np.array(rows.validation["label"])
        found[name] = Outcome(np.full_like(labels, np.bincount(rows.train["label"]).argmax()), labels, rows.note)
    return found


def outcome_of(read: Read, name: str, config: ProbeConfig, data: TrainingData) -> Outcome:
    """From `read`'s vectors: a probe's predictions, or for retrieval the rank (from 1) of each question's paragraph."""
    if name == RETRIEVAL:
        questions, paragraphs, right = _questions(config, data)
        scores = read(questions) @ read(paragraphs).T
        scores = scores.toarray() if issparse(scores) else scores
        ranks = (scores > scores[np.arange(len(right)), right][:, None]).sum(1) + 1
        note = f"{data.name}; {len(questions):,} questions of SQuAD's validation set, {len(paragraphs):,} paragraphs"
        return Outcome(ranks, right, note)
    rows = data.task(name, config.max_train_rows, config.max_eval_rows)
    parts = (rows.train, rows.validation)
    train, test = (pair_features([read(part[column]) for column in rows.task.columns]) for part in parts)
    labels = [np.array(part["label"]) for part in parts]
    return Outcome(fit_probe(train, labels[0], test), labels[1], rows.note)


def _questions(config: ProbeConfig, data: TrainingData) -> tuple[list[str], list[str], np.ndarray]:
    """SQuAD's validation questions, the paragraphs, and the number of each question's paragraph."""
    rows = data.task("SQuAD").validation
    numbers = {text: i for i, text in enumerate(dict.fromkeys(rows["context"]))}
    paragraphs = list(numbers)[: config.max_train_rows]
    asked = [
        (q, numbers[c]) for q, c in zip(rows["question"], rows["context"], strict=True) if numbers[c] < len(paragraphs)
    ]
    order = np.random.default_rng(0).permutation(len(asked))[: config.max_eval_rows]
    return [asked[i][0] for i in order], paragraphs, np.array([asked[i][1] for i in order])


# Scores ----------------------------------------------------------------------------------------------------------


def scores_of(name: str, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The scores of a task, times 100, by column: its metric's, or recall at 1 and 10."""
    if name == RETRIEVAL:
        return {f"{RETRIEVAL}@{rank}": 100 * float((predicted <= rank).mean()) for rank in (1, 10)}
    task = get_task(name)
    return {name: classification_scores(task, predicted, labels)[task.metric]}


def probe_table(outcomes: Mapping[str, dict[str, Outcome]], original: str) -> pd.DataFrame:
    """One row a model and score: row, task, metric, score, majority_score, difference to `original`, low, high, note.

    The interval is for the difference: 95%, by a bootstrap over the validation rows that both models share.
    """
    rng, rows = np.random.default_rng(0), []
    for row, found in outcomes.items():
        for name, outcome in found.items():
            base, metric, guess = outcomes[original][name], "recall", 0.0
            if name != RETRIEVAL:
                task = get_task(name)
                metric, guess = task.metric, majority_score(task, {"label": base.labels.tolist()})
            picks = rng.integers(0, len(base.labels), (RESAMPLES, len(base.labels)))
            picks = picks[:0] if row == original else picks  # it does not differ from itself
            ours, theirs = (
                pd.DataFrame([scores_of(name, o.predicted[p], o.labels[p]) for p in (slice(None), *picks)])
                for o in (outcome, base)
            )
            apart = ours - theirs
            low, high = (apart[1:].quantile(share) for share in (0.025, 0.975))
            for column in ours:
                rows.append({
                    "row": row, "task": column, "metric": metric, "score": ours[column][0], "majority_score": guess,
                    "difference": apart[column][0], "difference_low": low[column], "difference_high": high[column],
                    "eval_rows": len(base.labels), "note": base.note,
                })  # fmt: skip
    return pd.DataFrame(rows)


# What is kept ----------------------------------------------------------------------------------------------------


def finetuned_scores(runs: pd.DataFrame, original: str) -> pd.DataFrame:
    """One row a model and task: score (mean over seeds), difference to `original`, its interval, as in table `probes`.

    The interval is two standard errors over paired seeds (the head's first weights, dropout, order of data).
    """
    rows = []
    for (row, task), group in runs.groupby(["row", "task"], sort=False):
        base = runs[(runs["row"] == original) & (runs["task"] == task)].set_index("seed")["score"]
        ours = group.set_index("seed")["score"]
        made = compared(ours, base)
        made["score"], made["score_std"] = made.pop("mean"), made.pop("std")
        error = made.pop("difference_std_error")
        error = math.nan if row == original or len(base) < 2 else error
        made["difference_low"], made["difference_high"] = around(made["difference"], error)
        known = {name: group[name].iloc[0] for name in ("metric", "majority_score", "eval_rows", "train_rows", "note")}
        rows.append({"row": row, "task": task} | made | known)
    return pd.DataFrame(rows)


def wide(scores: pd.DataFrame) -> pd.DataFrame:
    """One line a model, one column a score; an arrow marks a difference to the original beyond its interval."""
    marks = ["▲" if low > 0 else "▼" if high < 0 else "" for low, high in scores[RANGE].itertuples(index=False)]
    texts = [f"{score:.1f} {mark}".strip() for score, mark in zip(scores["score"], marks, strict=True)]
    cells = scores.assign(cell=pd.Series(texts, scores.index, dtype=str))
    order = list(dict.fromkeys(scores["row"]))
    return (
        cells.pivot(index="row", columns="task", values="cell")
        .loc[order, list(dict.fromkeys(scores["task"]))]
        .fillna("")
    )


def kept(scores: pd.DataFrame, original: str) -> pd.DataFrame:
    """One row a model: its mean over the tasks that `original` has learned, as a share of the original's.

    A task counts as learned if the original is above guessing and above every baseline in `scores`: a score that
    counting words reaches shows no knowledge that could be kept. Baselines have rows too, to compare shares with.

    Columns: row, num_tasks, mean, share (per cent), low, high, judged (share of `KEPT_PERCENT` or more),
    num_seeds (fewest). The interval adds the tasks' intervals as independent. If the original has learned nothing, the
    share is NaN and not tested.
    """
    base = scores[scores["row"] == original].set_index("task")
    floors = scores[scores["row"].isin(BASELINES)].groupby("task")["score"].max().reindex(base.index)
    base = base.assign(majority_score=base["majority_score"].clip(lower=floors.fillna(0)))
    known = list(base.index[learned(base)]) if len(base) else []
    whole, rows = base.loc[known, "score"].mean(), []
    for row, group in scores.groupby("row", sort=False):
        cells = group.set_index("task").reindex(known)
        if known and cells["score"].isna().any():
            continue
        share = 100 * cells["score"].mean() / whole
        spread = (cells["difference_high"] - cells["difference_low"]) / (2 * NUM_ERRORS)
        summed = math.sqrt((spread**2).sum(skipna=False)) / max(len(known), 1)
        low, high = around(share, 100 * summed / whole if row != original else math.nan)
        verdict = Verdict(f"{row}: share kept", KEPT_PERCENT, share, "measured", low=low, high=high, side="at least")
        judged = "" if row in (original, *BASELINES) else verdict.judged
        num_seeds = group["num_seeds"].min() if "num_seeds" in group else math.nan
        rows.append((row, len(known), cells["score"].mean(), share, low, high, judged, num_seeds))
    columns = ["row", "num_tasks", "mean", "share", "low", "high", "judged", "num_seeds"]
    return pd.DataFrame(rows, columns=columns).assign(tasks=", ".join(known))


def draw_intervals(grid: FacetGrid, points: pd.DataFrame) -> None:
    """Draws `low` to `high` of `share` at each point's `latency_ms`, in the panel of its `bandwidth_mbps`."""
    for mbps, part in points.groupby("bandwidth_mbps"):
        spread = part[["low", "high"]].sub(part["share"], axis=0).abs().fillna(0).T
        grid.axes_dict[mbps].errorbar(part["latency_ms"], part["share"], spread, fmt="none", color="0.7", zorder=0)
