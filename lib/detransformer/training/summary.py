"""Results of training as tables: loss curves, pre-trained models, and every fine-tuning run.

What the rows say together (Table III, its noise, variants) is counted in `tables.accuracy` and `tables.variants`.
"""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from detransformer.training.results import Result

ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
VARIANT_COLUMNS = ["attention_width", "original_placement"]
STRUCTURE = ["num_original_layers", "num_divisions", "num_layers"]
LOSS_POINTS = 200  # a model, of its training losses


def loss_table(results: Iterable[Result]) -> pd.DataFrame:
    """Training losses of each pre-trained model: row, Nb, Ndiv, step, tokens, train_loss.

    Of longer runs a row is the mean over as many steps as leave `LOSS_POINTS` rows, with the last of these steps.
    """
    frames = []
    for result in results:
        window = -(-len(result.history) // LOSS_POINTS)
        parts = result.history.groupby((result.history["step"] - 1) // window)
        frame = parts.agg({"step": "max", "tokens": "max", "train_loss": "mean"})
        structure = {name: getattr(result.row, name) for name in ROW_COLUMNS[1:]}
        frames.append(frame.assign(row=result.row.label, **structure))
    columns = ["row", *ROW_COLUMNS[1:], "step", "tokens", "train_loss"]
    return _nullable(pd.concat(frames, ignore_index=True)[columns])


def pretraining_table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a pre-trained model: structure, seed, what it saw and how fast, its held-out loss, the scale in words.

    unigram_loss and unigram_perplexity are those of word frequencies alone on the same held-out tokens.
    """
    rows = []
    for result in results:
        losses, seconds = result.history["train_loss"], result.seconds
        rows.append(vars(result) | vars(result.row) | {"row": result.row.label, "first_loss": losses.iloc[0]})
        rows[-1]["last_loss"] = losses.tail(10).mean()
        rows[-1]["tokens_per_s"] = result.tokens / seconds if seconds else math.nan
    frame = pd.DataFrame(rows)
    frame["perplexity"], frame["unigram_perplexity"] = np.exp(frame["valid_loss"]), np.exp(frame["unigram_loss"])
    columns = ["row", *ROW_COLUMNS, *VARIANT_COLUMNS, "seed", "hidden_size", "num_steps", "tokens", "first_loss"]
    columns += ["last_loss", "valid_loss", "unigram_loss", "perplexity", "unigram_perplexity", "valid_tokens"]
    return _nullable(frame[[*columns, "seconds", "tokens_per_s", "precision", "source", "note"]])


def calibration_table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a model: row, Nb, Ndiv, num_layers, stage, tokens, errors, cosine, seconds of training, source, note.

    stage: `sliced` or `cut` (fewer layers) as they are, `closed form`, `trained`; tokens are those trained on, or what
    the closed form read. `error` is the last layer's, `mean_error` over layers, held-out and relative to the teacher's.
    """
    frame = pd.DataFrame(vars(result) | vars(result.row) | {"row": result.row.label} for result in results)
    frame["tokens"] = frame["tokens"].where(frame["tokens"] > 0, frame["fit_tokens"])
    frame["error"], frame["mean_error"] = frame["errors"].str[-1], frame["errors"].map(np.mean)
    columns = ["row", *STRUCTURE, "stage", "tokens", "error", "mean_error", "cosine", "seconds", "source", "note"]
    return frame[columns].astype(dict.fromkeys(STRUCTURE, "Int64"))


def accuracy_table(records: list[dict]) -> pd.DataFrame:
    """One row a fine-tuning run: the model, task, seed, score (times 100) and where the rows came from.

    What only some runs have follows where any has it: the variant of the structure, the pre-training's seed, the number
    format of training, and `score_FORMAT`, the same trained model scored with that number format on the wire.
    """
    frame = pd.DataFrame(records)
    columns = ["row", *ROW_COLUMNS, "task", "metric", "seed", "score", "majority_score"]
    columns += ["accuracy", "mcc", "exact_match", "f1", "train_loss"]
    columns += ["num_steps", "train_rows", "eval_rows", "seconds", "source", "note", "pretraining"]
    optional = [*VARIANT_COLUMNS, "pretraining_seed", "precision"]
    optional += [name for name in frame.columns if name.startswith("score_")]
    return _nullable(frame.reindex(columns=columns + [name for name in optional if name in frame]))


def _nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Nb and Ndiv as whole numbers, empty for the original model."""
    return frame.astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
