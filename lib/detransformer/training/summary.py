"""Results of training as tables: loss curves, pre-trained models, and every fine-tuning run.

What the rows say together (Table III, its noise, variants) is counted in `tables.accuracy` and `tables.variants`.
"""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

ROW_COLUMNS = ["model", "num_original_layers", "num_divisions"]
VARIANT_COLUMNS = ["attention_width", "original_placement"]
STRUCTURE = ["num_original_layers", "num_divisions", "num_layers"]
LOSS_POINTS = 200  # a model, of its training losses


def loss_table(results: Iterable) -> pd.DataFrame:
    """Training losses of each `PretrainResult`: row, Nb, Ndiv, step, tokens, train_loss.

    Of longer runs a row is the mean over as many steps as leave `LOSS_POINTS` rows, with the last of these steps.
    """
    frames = []
    for result in results:
        window = -(-len(result.history) // LOSS_POINTS)
        parts = result.history.groupby((result.history["step"] - 1) // window)
        frame = parts.agg({"step": "max", "tokens": "max", "train_loss": "mean"})
        frame.insert(0, "row", result.row.label)
        frame.insert(1, "num_original_layers", result.row.num_original_layers)
        frame.insert(2, "num_divisions", result.row.num_divisions)
        frames.append(frame)
    return _nullable(pd.concat(frames, ignore_index=True))


def pretraining_table(results: Iterable) -> pd.DataFrame:
    """One row a pre-trained model: structure, seed, what it saw and how fast, its held-out loss, the scale in words.

    unigram_loss and unigram_perplexity are those of word frequencies alone on the same held-out tokens.
    """
    frame = _nullable(
        pd.DataFrame(
            {
                "row": r.row.label,
                "model": r.row.model,
                "num_original_layers": r.row.num_original_layers,
                "num_divisions": r.row.num_divisions,
                "attention_width": r.row.attention_width,
                "original_placement": r.row.original_placement,
                "seed": getattr(r, "seed", 0),
                "hidden_size": r.hidden_size,
                "num_steps": r.num_steps,
                "tokens": r.tokens,
                "first_loss": r.history["train_loss"].iloc[0],
                "last_loss": r.history["train_loss"].tail(10).mean(),
                "valid_loss": r.valid_loss,
                "unigram_loss": r.unigram_loss,
                "perplexity": math.exp(min(r.valid_loss, 700.0)),
                "unigram_perplexity": math.exp(r.unigram_loss),
                "valid_tokens": r.valid_tokens,
                "seconds": r.seconds,
                "tokens_per_s": r.tokens / r.seconds if r.seconds else float("nan"),
                "precision": getattr(r, "precision", None),
                "source": r.source,
                "note": r.note,
            }
            for r in results
        )
    )
    return frame if frame["precision"].notna().any() else frame.drop(columns="precision")


def calibration_table(results: Iterable) -> pd.DataFrame:
    """One row a model: row, Nb, Ndiv, num_layers, stage, tokens, errors, cosine, seconds of training, source, note.

    stage: `sliced` or `cut` (fewer layers) as they are, `closed form`, `trained`; tokens are those trained on, or what
    the closed form read. `error` is the last layer's, `mean_error` over layers, held-out and relative to the teacher's.
    """
    rows = []
    for result in results:
        structure = {name: getattr(result.row, name) for name in STRUCTURE}
        read = {"stage": result.stage, "tokens": result.tokens or result.fit_tokens}
        errors = {"error": result.errors[-1], "mean_error": float(np.mean(result.errors)), "cosine": result.cosine}
        known = {"seconds": result.seconds, "source": result.source, "note": result.note}
        rows.append({"row": result.row.label} | structure | read | errors | known)
    return pd.DataFrame(rows).astype(dict.fromkeys(STRUCTURE, "Int64"))


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
