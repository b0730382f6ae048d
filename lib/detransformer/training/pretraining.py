"""Masked-language-model pre-training of original and decoupled BERT with identical hyper-parameters (DATE 2024, IV-A).

Every row starts from the same seeded original weights (a decoupled row from their slices) and sees the same sequences
with the same masks. No next-sentence prediction. A finished row is not trained again; an interrupted one goes on.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import BertForMaskedLM

from detransformer.models import decouple
from detransformer.training.config import ModelRow, PretrainConfig, StepRecipe, config_hash
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import MaskedBatches
from detransformer.training.hardware import resolve_precision
from detransformer.training.jobs import run_jobs
from detransformer.training.loop import Run, fit, micro_batches
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.results import as_result, read_result, write_result
from detransformer.training.unigram import start_at_frequencies, unigram_loss


@dataclass(frozen=True)
class PretrainResult:
    """A pre-trained row: `checkpoint` is a Hugging Face model folder, `history` has a row a step.

    `unigram_loss` is what word frequencies alone reach on the same held-out tokens as `valid_loss`.
    """

    row: ModelRow
    checkpoint: Path
    history: pd.DataFrame
    valid_loss: float
    unigram_loss: float
    valid_tokens: int
    num_steps: int
    tokens: int
    unique_tokens: int
    seconds: float
    hidden_size: int
    seed: int
    precision: str
    source: str
    note: str
    identity: str


def build_model(row: ModelRow, config: PretrainConfig, vocab_size: int, pad_token_id: int = 0) -> BertForMaskedLM:
    """The row's model at its seeded start: original weights, sliced where the row is decoupled."""
    set_seed(config.seed)
    model = BertForMaskedLM(config.original_config(row.model, vocab_size, pad_token_id))
    return model if row.is_original else decouple(model, *row.structure)


def pretrain(
    row: ModelRow,
    config: PretrainConfig,
    data: TrainingData,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
) -> PretrainResult:
    """Pre-trains one row into `output_dir/ROW/` (model/, history.csv, result.json) and returns what came of it.

    `on_step(step, loss)` is called after each step.

    Raises:
        ValueError: for sizes that do not divide, damaged data or a damaged checkpoint.
    """
    config.check_row(row)
    config = dataclasses.replace(config, mixed_precision=resolve_precision(config.mixed_precision))
    run = Run(row.label, Path(output_dir) / row.key, config_hash(row, config, data.name, data.fingerprint), on_step)
    done = read_result(run)
    if done is not None:
        return as_result(PretrainResult, run, done, row=row)
    train, valid = masked_texts(data, config)
    model = build_model(row, config, data.vocab_size, data.special.pad)
    if config.frequency_bias:
        start_at_frequencies(model, train)
    record = {"row": dataclasses.asdict(row), "note": f"{config.scale_note(row)}; {text_note(data, train)}"}
    record["config"] = dataclasses.asdict(config)
    record = train_on_text(MaskedLmLoss(model), config, data, train, valid, run, record)
    return as_result(PretrainResult, run, record, row=row)


def train_on_text(
    objective: nn.Module,
    config: StepRecipe,
    data: TrainingData,
    train: MaskedBatches,
    valid: MaskedBatches,
    run: Run,
    record: dict,
) -> dict:
    """Trains the objective's model, scores it on `valid` and saves it; `record` gets what a `PretrainResult` has.

    `config` is a `PretrainConfig` or a decoder's `CausalConfig`.
    """
    set_seed(config.seed + 1)  # dropout: the same in every row, and with and without a teacher
    batches = micro_batches(train.train_batch, config)
    trained = fit(objective, batches, config, config.num_steps, run)
    trained.restore_float32()
    model = objective.model
    record |= {
        "valid_loss": evaluate(objective, valid.valid_batches(config.micro_batch_size)),
        "unigram_loss": unigram_loss(train, valid, config.micro_batch_size),
        "valid_tokens": int(valid.sequences.size),
        "num_steps": config.num_steps,
        "tokens": config.num_steps * config.tokens_per_step,
        "unique_tokens": int(train.sequences.size),
        "hidden_size": model.config.hidden_size,
        "seed": config.seed,
        "precision": config.mixed_precision,
        "source": data.name,
    }

    def save(place: Path) -> None:
        model.save_pretrained(place)
        data.save_tokenizer(place)

    return write_result(run, trained, record, "tokens", config.tokens_per_step, save)


def masked_texts(data: TrainingData, config: PretrainConfig) -> tuple[MaskedBatches, MaskedBatches]:
    """The (training, validation) text of a recipe with its masks, packed where it is not yet."""
    return tuple(
        MaskedBatches(text.sequences, data.vocab_size, data.special, config.num_masked, config.seed)
        for text in pack(data, config)
    )


def pack(data: TrainingData, config):
    """The (training, validation) text of a recipe, packed where it is not yet."""
    return (
        data.packed("train", config.seq_len, config.max_train_tokens),
        data.packed("validation", config.seq_len, config.max_valid_tokens),
    )


def pretrain_all(
    rows: Iterable[ModelRow],
    config: PretrainConfig,
    data: TrainingData,
    output_dir: str | Path,
    num_jobs: int = 1,
) -> list[PretrainResult]:
    """`pretrain` for each row, all with the same configuration, `num_jobs` of them side by side."""
    rows = list(rows)
    for row in rows:  # say what cannot work before hours are spent
        config.check_row(row)
    if num_jobs > 1:
        pack(data, config)  # once, before the workers want it
    # By sub-blocks, then by decoupled layers, the slowest first: the last run to end should be a short one.
    slowest_first = sorted(rows, key=lambda row: (-(row.num_divisions or 1), row.num_original_layers or 0))
    run_jobs(pretrain, [(row, config, data, output_dir) for row in slowest_first], num_jobs, "pre-training")
    return [pretrain(row, config, data, output_dir) for row in rows]  # read back


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean loss of a labelled token over `batches`, in the model's own number format."""
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    total = count = 0.0
    for batch in batches:
        num = int((batch["labels"] >= 0).sum())
        total += float(objective(**{name: tensor.to(device) for name, tensor in batch.items()})) * num
        count += num
    objective.train(was_training)
    return total / count


def text_note(data: TrainingData, train: MaskedBatches) -> str:
    """Source and amount of the training text in words."""
    return f"{data.name} text, {train.sequences.size:,} different tokens" + (
        "" if data.source.is_real else ", generated"
    )
