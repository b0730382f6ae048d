"""Next-token training of small original and decoupled GPT-2 models with identical hyper-parameters: their perplexity.

The decoder's counterpart of `pretraining`, over Nb and Ndiv: rows start from the same seeded original weights and see
the same sequences in the same order.

Shapes: B batch, T sequence length, D hidden, V vocabulary. A packed sequence is [CLS], T - 2 tokens of text, [SEP]; the
text is predicted, the last [SEP] is not, because it stands at the same place in every sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.models.configuration import decoupled_config
from detransformer.training.config import (
    TOKENS_PER_SPECIAL,
    ModelRow,
    StepRecipe,
    check_divides,
    config_hash,
    fraction,
    not_negative,
    positive,
)
from detransformer.training.data import TrainingData, open_data, reduced_data
from detransformer.training.data.packing import MaskedBatches, count_tokens
from detransformer.training.hardware import resolve_precision
from detransformer.training.loop import Run
from detransformer.training.pretraining import pack, train_on_text
from detransformer.training.results import read_result


@dataclass(frozen=True, kw_only=True)
class CausalConfig(StepRecipe):
    """Next-token training of a small GPT-2; the defaults are six rows in about 25 minutes of one x86 core.

    Args:
        num_layers, hidden_size, num_heads: of the original model; its FFN is four times as wide.
        vocab_size: pieces of the data's vocabulary that are kept (`reduced_data`): with BERT's 30,522 most of such
            a small model's time goes into the LM head; None keeps all.
        seq_len: tokens in a packed sequence, [CLS] and [SEP] included.
        dropout: of embeddings, residuals and attention.
        max_train_tokens, max_valid_tokens: text used; None takes all of it.
    """

    num_layers: int = positive(8)
    hidden_size: int = positive(128)
    num_heads: int = positive(4)
    vocab_size: int | None = positive(4096)
    num_steps: int = positive(900)
    seq_len: int = 128
    global_batch_size: int = positive(4)
    micro_batch_size: int = positive(4)
    learning_rate: float = positive(3e-3)
    dropout: float = fraction(0.0)
    max_train_tokens: int | None = positive(2_000_000)
    max_valid_tokens: int | None = positive(50_000)
    checkpoint_every_s: float = not_negative(60.0)

    def __post_init__(self):
        super().__post_init__()
        if self.seq_len < 8:
            raise ValueError(f"seq_len={self.seq_len} is below 8: [CLS] and [SEP] leave no text to learn, choose more.")
        check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size, "every head takes an equal part")

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in a step."""
        return self.global_batch_size * (self.seq_len - TOKENS_PER_SPECIAL)

    def original_config(self, data: TrainingData) -> GPT2Config:
        """The original model's configuration, with the vocabulary of `data`."""
        return GPT2Config(
            n_layer=self.num_layers,
            n_embd=self.hidden_size,
            n_head=self.num_heads,
            n_positions=self.seq_len,
            vocab_size=data.vocab_size,
            # GPT-2's 0.02 is for width 768: a narrower layer's products keep their size with wider weights.
            initializer_range=0.02 * (768 / self.hidden_size) ** 0.5,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=data.special.cls,
            eos_token_id=data.special.sep,
            pad_token_id=data.special.pad,
        )


class NextTokenBatches(MaskedBatches):
    """Micro-batches of a packed text [N, T] in the order of `MaskedBatches`, with nothing masked."""

    def __init__(self, sequences: np.ndarray, data: TrainingData, seed: int):
        super().__init__(sequences, data.vocab_size, data.special, num_masked=0, seed=seed)

    def target_counts(self) -> np.ndarray:
        return count_tokens(self.sequences[:, 1:-1], self.vocab_size)

    def _masked(self, rows: np.ndarray, seed: list[int]) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.sequences[rows].astype(np.int64))
        return {"input_ids": tokens[:, :-2], "labels": tokens[:, 1:-1]}  # [B, T - 2] each


class NextTokenLoss(nn.Module):
    """`model` and its loss as one module."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T - 2], labels [B, T - 2], the token after each -> mean loss in nats."""
        logits = self.model(input_ids, use_cache=False).logits  # [B, T - 2, V]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def causal_rows(rows: Iterable[ModelRow | Sequence[int]]) -> list[ModelRow]:
    """Rows from lists, e.g. `[[], [4, 4]]`: the original, and Nb = Ndiv = 4."""
    return [row if isinstance(row, ModelRow) else ModelRow("gpt2", *row) for row in rows]


def build_model(row: ModelRow, config: CausalConfig, data: TrainingData) -> GPT2LMHeadModel:
    """The row's model at its seeded start: original weights, sliced where the row is decoupled."""
    set_seed(config.seed)
    model = GPT2LMHeadModel(config.original_config(data))
    return model if row.is_original else decouple(model, *row.structure)


def train_row(
    row: ModelRow,
    config: CausalConfig,
    data: TrainingData,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
) -> dict:
    """Trains one row into `output_dir/ROW-SEED/` (model/, history.csv, result.json) and returns its row of the table.

    `on_step(step, loss)` is called after each step.

    Raises:
        ValueError: for sizes that do not divide, damaged data or a damaged checkpoint.
    """
    config = dataclasses.replace(config, mixed_precision=resolve_precision(config.mixed_precision))
    identity = config_hash(row, config, data.name, data.fingerprint)
    run = Run(row.label, Path(output_dir) / f"{row.key}-seed{config.seed}", identity, on_step)
    record = read_result(run)
    if record is None:
        train, valid = (NextTokenBatches(text.sequences, data, config.seed) for text in pack(data, config))
        objective = NextTokenLoss(build_model(row, config, data))
        record = {"parameters": objective.model.num_parameters(), "config": dataclasses.asdict(config)}
        record = train_on_text(objective, config, data, train, valid, run, record)
    return {
        "model": f"gpt2-{config.num_layers}x{config.hidden_size}",
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_original_layers": row.num_original_layers,
        "num_divisions": row.num_divisions,
        "seed": config.seed,
        "parameters": record["parameters"],
        "train_tokens": record["tokens"],
        "valid_tokens": record["valid_tokens"] // config.seq_len * (config.seq_len - TOKENS_PER_SPECIAL),
        "valid_loss": record["valid_loss"],
        "unigram_loss": record["unigram_loss"],
        "perplexity": math.exp(record["valid_loss"]),
        "unigram_perplexity": math.exp(record["unigram_loss"]),
        "seconds": record["seconds"],
        "source": record["source"],
    }


def perplexity_table(
    rows: Iterable[ModelRow | Sequence[int]],
    settings: CausalConfig,
    folder: str | Path,
    data: TrainingData | None = None,
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Trains every row with every seed and tabulates validation loss and perplexity, one line a model.

    Args:
        rows: `[]` is the original, `[Nb, Ndiv]` a decoupled model.
        settings: the same for all rows but for the seed.
        folder: where results and checkpoints are kept; what is finished there is not trained again.
        data: None takes `open_data`'s choice, kept in `folder/cache`.
        seeds: of the weights and the data order.

    Raises:
        ValueError: for sizes that do not divide, before anything is trained.
    """
    rows = causal_rows(rows)
    data = reduced_data(data or open_data(cache_dir=Path(folder) / "cache"), settings.vocab_size, decoder=True)
    for row in rows:
        if not row.is_original:
            decoupled_config(settings.original_config(data), *row.structure)
    lines = [train_row(row, dataclasses.replace(settings, seed=seed), data, folder) for seed in seeds for row in rows]
    return pd.DataFrame(lines).astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
