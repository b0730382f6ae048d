"""What an encoder's sentence vectors are worth without fine-tuning: linear probes, retrieval, and their baselines.

A probe is a logistic regression (scikit-learn) on frozen vectors, of a pair on [u, v, |u - v|, u v] (Conneau et al.
2017); how strongly it is regularised is chosen on a fifth of the training rows (Matthews correlation). Retrieval looks
for the paragraph of each SQuAD question among all by the cosine of their vectors. Beside them stand the most frequent
label and bags of words (TF-IDF). Differences to the original model have intervals from a paired bootstrap over the
validation rows: what another sample of rows would have said, not another training.

Shapes: N texts, D hidden, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel

import detransformer.models  # noqa: F401  (AutoModel knows decoupled BERT)
from detransformer.files import atomic_write
from detransformer.training.config import Checked, config_hash, positive
from detransformer.training.data import TrainingData
from detransformer.training.data.tasks import get_task
from detransformer.training.finetuning import source_of
from detransformer.training.hardware import place, resolve_precision
from detransformer.training.metrics import classification_scores, majority_score

RETRIEVAL = "retrieval"
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of C, the inverse strength of regularisation
TOKENS_PER_BATCH = 8192
RESAMPLES = 500


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """Rows and lengths of one task; of retrieval `max_train_rows` is the number of paragraphs, all if None.

    Args:
        max_train_rows, max_eval_rows: None takes all; a cut set is called reduced in every table.
        seq_len: tokens of a text, at most.
    """

    max_train_rows: int | None = positive(None)
    max_eval_rows: int | None = positive(None)
    seq_len: int = positive(128)


@dataclass(frozen=True)
class Outcome:
    """Of one model and task, a row each: predicted and true label, or the rank and number of a question's paragraph."""

    predicted: np.ndarray
    labels: np.ndarray
    note: str


@torch.no_grad()
def sentence_vectors(model, texts: Sequence[str], data: TrainingData, seq_len: int) -> np.ndarray:
    """Mean over tokens of the last layer's output, normalised [N, D]: sentence-transformers' mean pooling.

    Args:
        model: an encoder in eval mode, whose tokens are `data`'s.
    """
    tokenizer = type(data.tokenizer).from_str(data.tokenizer.to_str())  # a copy: truncation is a tokenizer's state
    tokenizer.enable_truncation(seq_len)
    rows = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(rows[order[end]]) <= TOKENS_PER_BATCH:
            end += 1
        part = order[start:end]
        ids = pad_sequence([rows[i] for i in part], batch_first=True, padding_value=data.special.pad)
        mask = pad_sequence([torch.ones_like(rows[i]) for i in part], batch_first=True)
        hidden = model(ids, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        vectors[part] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        start = end
    return vectors


def pair_features(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """One column of vectors as it is; of two [N, D] the four parts [N, 4 D]."""
    if len(vectors) == 1:
        return vectors[0]
    u, v = vectors
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1)


def fit_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Predicted labels of `test` by a logistic regression on `train`, features standardised unless sparse."""
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import matthews_corrcoef
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def made(strength: float):
        regression = LogisticRegression(C=strength, max_iter=200)
        return regression if issparse(train) else make_pipeline(StandardScaler(), regression)

    order = np.random.default_rng(0).permutation(train.shape[0])
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    strengths = STRENGTHS if issparse(train) else tuple(strength / 100 for strength in STRENGTHS)
    probes = ((made(c).fit(train[rest], labels[rest]), c) for c in strengths)
    scores = [(matthews_corrcoef(labels[held_out], each.predict(train[held_out])), c) for each, c in probes]
    return made(max(scores)[1]).fit(train, labels).predict(test)


def probe(
    checkpoint: Any, tasks: Mapping[str, ProbeConfig], data: TrainingData, output_dir: str | Path
) -> dict[str, Outcome]:
    """What the encoder of `checkpoint` (a folder, or a result that has one) predicts for each task; kept and read back.

    Raises:
        ValueError: for an unknown task, or a folder that is no checkpoint.
    """
    folder, source = source_of(getattr(checkpoint, "checkpoint", checkpoint))
    model, found = None, {}
    for name, config in tqdm(tasks.items(), desc=folder.name, unit="task", leave=False):
        identity = config_hash("probe", source, name, config, data.name, data.fingerprint)
        path = Path(output_dir) / f"{name}-{identity}.npz"
        if not path.exists():
            model = _encoder(folder) if model is None else model
            read = partial(sentence_vectors, model, data=data, seq_len=config.seq_len)
            _save(path, _retrieve(read, config, data) if name == RETRIEVAL else _classify(read, name, config, data))
        found[name] = _load(path)
    return found


def _encoder(folder: Path):
    """The encoder of a checkpoint, in bfloat16 where that is what this processor is fast with."""
    model, precision = AutoModel.from_pretrained(folder).eval(), resolve_precision("auto")
    place(model, precision)
    return model.cpu().to(torch.float32 if precision == "no" else torch.bfloat16)


def bag_of_words(tasks: Mapping[str, ProbeConfig], data: TrainingData) -> dict[str, Outcome]:
    """The same with TF-IDF vectors of words (and pairs of words) in place of a model's."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = {}
    for name, config in tasks.items():
        if name == RETRIEVAL:
            questions, paragraphs, _ = _questions(config, data)
            words = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit(paragraphs)
            found[name] = _retrieve(lambda texts, words=words: words.transform(texts), config, data)
            continue
        rows = data.task(name, config.max_train_rows, config.max_eval_rows)
        columns = rows.task.columns
        texts = [text for column in columns for text in rows.train[column]]
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts)
        features = []
        for part in (rows.train, rows.validation):
            vectors = [words.transform(part[column]) for column in columns]
            pairs = [] if len(columns) == 1 else [abs(vectors[0] - vectors[1]), vectors[0].multiply(vectors[1])]
            features.append(hstack([*vectors, *pairs]).tocsr())
        labels = [np.array(part["label"]) for part in (rows.train, rows.validation)]
        found[name] = Outcome(fit_probe(features[0], labels[0], features[1]), labels[1], rows.note)
    return found


def majority(tasks: Mapping[str, ProbeConfig], data: TrainingData) -> dict[str, Outcome]:
    """The same with the training rows' most frequent label for all; of retrieval one paragraph for all."""
    found = {}
    for name, config in tasks.items():
        if name == RETRIEVAL:
            questions, paragraphs, right = _questions(config, data)
            found[name] = Outcome(np.ones(len(questions)) * len(paragraphs), right, "")
            continue
        rows = data.task(name, config.max_train_rows, config.max_eval_rows)
        label = np.bincount(rows.train["label"]).argmax()
        labels = np.array(rows.validation["label"])
        found[name] = Outcome(np.full_like(labels, label), labels, rows.note)
    return found


def _classify(read, name: str, config: ProbeConfig, data: TrainingData) -> Outcome:
    rows = data.task(name, config.max_train_rows, config.max_eval_rows)
    features = [
        pair_features([read(part[column]) for column in rows.task.columns]) for part in (rows.train, rows.validation)
    ]
    labels = [np.array(part["label"]) for part in (rows.train, rows.validation)]
    return Outcome(fit_probe(features[0], labels[0], features[1]), labels[1], rows.note)


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


def _retrieve(read, config: ProbeConfig, data: TrainingData) -> Outcome:
    """`predicted` is the rank (from 1) of each question's paragraph."""
    questions, paragraphs, right = _questions(config, data)
    scores = read(questions) @ read(paragraphs).T
    scores = np.asarray(scores.todense()) if hasattr(scores, "todense") else scores
    ranks = (scores > scores[np.arange(len(right)), right][:, None]).sum(1) + 1
    note = f"{data.name}; {len(questions):,} questions of SQuAD's validation set, {len(paragraphs):,} paragraphs"
    return Outcome(ranks, right, note)


def _save(path: Path, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, predicted=outcome.predicted, labels=outcome.labels, note=outcome.note)


def _load(path: Path) -> Outcome:
    with np.load(path) as saved:
        return Outcome(saved["predicted"], saved["labels"], str(saved["note"]))


# Scores ----------------------------------------------------------------------------------------------------------


def score_columns(name: str) -> list[str]:
    """The scores of a task: its metric's, or recall at 1 and 10."""
    return [f"{RETRIEVAL}@1", f"{RETRIEVAL}@10"] if name == RETRIEVAL else [name]


def score(column: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """A score, times 100."""
    if column.startswith(RETRIEVAL):
        return 100 * float((predicted <= int(column.partition("@")[2])).mean())
    task = get_task(column)
    return classification_scores(task, predicted, labels)["mcc" if task.metric == "mcc" else "accuracy"]


def probe_table(outcomes: Mapping[str, dict[str, Outcome]], original: str) -> pd.DataFrame:
    """One row a model and score: row, task, metric, score, majority_score, difference to `original`, low, high, note.

    The interval is of the difference: 95%, by a bootstrap over the validation rows that both models share.
    """
    rng, rows = np.random.default_rng(0), []
    for row, found in outcomes.items():
        for name, outcome in found.items():
            base = outcomes[original][name]
            picks = rng.integers(0, len(base.labels), (RESAMPLES, len(base.labels)))
            for column in score_columns(name):
                value, known = (score(column, o.predicted, o.labels) for o in (outcome, base))
                low = high = float("nan")
                if row != original:
                    apart = [
                        score(column, outcome.predicted[p], outcome.labels[p])
                        - score(column, base.predicted[p], base.labels[p])
                        for p in picks
                    ]
                    low, high = np.percentile(apart, [2.5, 97.5])
                metric = "recall" if name == RETRIEVAL else get_task(name).metric
                guess = 0.0 if name == RETRIEVAL else majority_score(get_task(name), {"label": base.labels.tolist()})
                rows.append({"row": row, "task": column, "metric": metric, "score": value, "majority_score": guess,
                             "difference": value - known, "difference_low": low, "difference_high": high,
                             "eval_rows": len(base.labels), "note": base.note})  # fmt: skip
    return pd.DataFrame(rows)
