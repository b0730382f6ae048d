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
    return nullable(frame[[*columns, "seconds", "tokens_per_s", "precision", "source", "note"]])


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
    return nullable(frame.reindex(columns=columns + [name for name in optional if name in frame]))


def nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Nb and Ndiv as whole numbers, empty for the original model."""
    return frame.astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
