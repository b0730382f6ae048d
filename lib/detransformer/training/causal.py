"""Next-token training of small original and decoupled GPT-2 models with identical hyper-parameters: their perplexity.

The decoder's counterpart of `pretraining`, over Nb and Ndiv. Every row starts from the same seeded original weights (a
decoupled row from their slices) and sees the same sequences in the same order. A finished row is not trained again; an
interrupted one goes on.

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
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from detransformer.files import atomic_folder
from detransformer.models import decouple
from detransformer.models.configuration import decoupled_config
from detransformer.training.checkpoints import Checkpointer, Progress, read_result, write_history, write_result
from detransformer.training.config import (
    TOKENS_PER_SPECIAL,
    check_choice,
    check_fraction,
    check_micro_batches,
    check_positive,
    config_hash,
)
from detransformer.training.data import TrainingData, open_data, reduced_data
from detransformer.training.data.packing import MaskedBatches, count_tokens
from detransformer.training.hardware import AUTOCAST, make_accelerator
from detransformer.training.pretraining import evaluate, pack, train_steps
from detransformer.training.unigram import unigram_loss

COLUMNS = (
    *("model", "num_layers", "hidden_size", "num_original_layers", "num_divisions", "seed", "parameters"),
    *("train_tokens", "valid_tokens", "valid_loss", "unigram_loss", "perplexity", "unigram_perplexity", "seconds"),
    "source",
)


@dataclass(frozen=True)
class CausalRow:
    """A model of the table: Nb and Ndiv, or neither for the original."""

    num_original_layers: int | None = None
    num_divisions: int | None = None

    def __post_init__(self):
        if (self.num_original_layers is None) != (self.num_divisions is None):
            raise ValueError(
                f"row {self.num_original_layers}, {self.num_divisions} is half decoupled: "
                "give both num_original_layers and num_divisions, or neither."
            )

    @property
    def is_original(self) -> bool:
        return self.num_original_layers is None

    @property
    def key(self) -> str:
        """The row as a folder name."""
        return "original" if self.is_original else f"nb{self.num_original_layers}-ndiv{self.num_divisions}"


def causal_rows(rows: Iterable[CausalRow | Sequence[int]]) -> list[CausalRow]:
    """Rows from lists, e.g. `[[], [4, 4]]`: the original, and Nb = Ndiv = 4."""
    return [row if isinstance(row, CausalRow) else CausalRow(*row) for row in rows]


@dataclass(frozen=True)
class CausalConfig:
    """Next-token training of a small GPT-2; the defaults are six rows in about 25 minutes of one x86 core.

    Args:
        num_layers, hidden_size, num_heads: of the original model; its FFN is four times as wide.
        vocab_size: pieces of the data's vocabulary that are kept (`ReducedVocabulary`): with BERT's 30,522 most of such
            a small model's time goes into the LM head; None keeps all.
        num_steps: optimizer steps.
        seq_len: tokens in a packed sequence, [CLS] and [SEP] included.
        global_batch_size: sequences in one optimizer step over all processes.
        micro_batch_size: sequences in one forward pass; the rest is gradient accumulation.
        learning_rate, warmup, decay_power: of AdamW; linear warm-up, then polynomial decay to 0.
        dropout: of embeddings, residuals and attention.
        max_train_tokens, max_valid_tokens: text used; None takes all of it.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"` (accelerate).
        checkpoint_every_s: seconds between checkpoints.
        seed: of the weights and the data order: the same for every row.
    """

    num_layers: int = 8
    hidden_size: int = 128
    num_heads: int = 4
    vocab_size: int | None = 4096
    num_steps: int = 900
    seq_len: int = 128
    global_batch_size: int = 4
    micro_batch_size: int = 4
    learning_rate: float = 3e-3
    warmup: float = 0.1
    decay_power: float = 1.0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    max_train_tokens: int | None = 2_000_000
    max_valid_tokens: int | None = 50_000
    mixed_precision: str = "no"
    checkpoint_every_s: float = 60.0
    seed: int = 0

    def __post_init__(self):
        check_choice(self, "mixed_precision", AUTOCAST)
        check_fraction(self, "warmup")
        check_fraction(self, "dropout")
        check_positive(
            self,
            *("num_layers", "hidden_size", "num_heads", "vocab_size", "num_steps", "learning_rate"),
            *("global_batch_size", "micro_batch_size", "max_train_tokens", "max_valid_tokens"),
        )
        if self.seq_len < 8:
            raise ValueError(f"seq_len={self.seq_len} is below 8: [CLS] and [SEP] leave no text to learn, choose more.")
        check_micro_batches(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: "
                "every head takes an equal part, choose a divisor."
            )

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

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
    """`model` and its loss as one module, so that accelerate wraps the whole forward pass."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T - 2], labels [B, T - 2], the token after each -> mean loss in nats."""
        logits = self.model(input_ids, use_cache=False).logits  # [B, T - 2, V]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def build_model(row: CausalRow, config: CausalConfig, data: TrainingData) -> GPT2LMHeadModel:
    """The row's model at its seeded start: original weights, sliced where the row is decoupled."""
    set_seed(config.seed)
    model = GPT2LMHeadModel(config.original_config(data))
    return model if row.is_original else decouple(model, row.num_original_layers, row.num_divisions)


def make_optimizer(model: nn.Module, config: CausalConfig) -> AdamW:
    """AdamW with weight decay for all but bias and LayerNorm (by name: a stacked bias has two axes)."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or ".ln_" in name].append(parameter)
    plain, decayed = groups[True], groups[False]
    return AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        eps=1e-6,
        fused=True,
    )


def train_row(
    row: CausalRow,
    config: CausalConfig,
    data: TrainingData,
    output_dir: str | Path,
    save_weights: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> dict:
    """Trains one row into `output_dir/ROW/` (history.csv, result.json) and returns its row of the table.

    `save_weights` also writes model/, a Hugging Face folder in bfloat16. `on_step(step, loss)` is called after each
    step.

    Raises:
        ValueError: for sizes that do not divide, damaged data or a damaged checkpoint.
    """
    folder = Path(output_dir) / f"{row.key}-seed{config.seed}"
    identity = config_hash(row, config, data.name, data.fingerprint, "unigram_loss")
    done = read_result(folder / "result.json", identity)
    if done is not None and (not save_weights or (folder / "model").is_dir()):
        return {name: done[name] for name in COLUMNS}
    accelerator = make_accelerator(config.mixed_precision)
    with accelerator.main_process_first():  # one process packs the text, the others map it
        train, valid = pack(data, config)
    model = build_model(row, config, data)
    parameters = model.num_parameters()
    objective = NextTokenLoss(model)
    objective, optimizer = accelerator.prepare(objective, make_optimizer(objective, config))
    progress = Progress()
    checkpointer = Checkpointer(folder / "checkpoint", accelerator, progress, config.checkpoint_every_s, identity)
    set_seed(config.seed + 1 + accelerator.process_index)  # dropout: the same in every row
    checkpointer.resume()
    batches = NextTokenBatches(train.sequences, data, config.seed)
    train_steps(objective, optimizer, batches, config, accelerator, checkpointer, row.key, on_step)
    valid_batches = NextTokenBatches(valid.sequences, data, config.seed)
    valid_loss = evaluate(objective, valid_batches, config.micro_batch_size, accelerator)
    frequencies_loss = unigram_loss(batches, valid_batches, config.micro_batch_size)
    result = {
        "model": f"gpt2-{config.num_layers}x{config.hidden_size}",
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_original_layers": row.num_original_layers,
        "num_divisions": row.num_divisions,
        "seed": config.seed,
        "parameters": parameters,
        "train_tokens": config.num_steps * config.tokens_per_step,
        "valid_tokens": len(valid.sequences) * (config.seq_len - TOKENS_PER_SPECIAL),
        "valid_loss": valid_loss,
        "unigram_loss": frequencies_loss,
        "perplexity": math.exp(valid_loss),
        "unigram_perplexity": math.exp(frequencies_loss),
        "seconds": round(progress.seconds, 3),
        "source": data.name,
    }
    if accelerator.is_main_process:
        (folder / "result.json").unlink(missing_ok=True)
        if save_weights:
            with atomic_folder(folder / "model") as temporary:
                accelerator.unwrap_model(objective).model.to(torch.bfloat16).save_pretrained(temporary)
                data.save_tokenizer(temporary)
        write_history(folder, progress, "tokens", config.tokens_per_step)
        about = {"identity": identity, "row": dataclasses.asdict(row), "config": dataclasses.asdict(config)}
        write_result(folder / "result.json", about | result)
    accelerator.wait_for_everyone()
    checkpointer.remove()
    return result


def perplexity_table(
    rows: Iterable[CausalRow | Sequence[int]],
    settings: CausalConfig,
    folder: str | Path,
    data: TrainingData | None = None,
    seeds: Sequence[int] = (0,),
    save_weights: bool = False,
) -> pd.DataFrame:
    """Trains every row with every seed and tabulates validation loss and perplexity, in `COLUMNS`.

    Args:
        rows: `[]` is the original, `[Nb, Ndiv]` a decoupled model.
        settings: the same for all rows but for the seed.
        folder: where results and checkpoints are kept; what is finished there is not trained again.
        data: None takes `open_data`'s choice, kept in `folder/cache`.
        seeds: of the weights and the data order.
        save_weights: also writes each row's model, in bfloat16.

    Raises:
        ValueError: for sizes that do not divide, before anything is trained.
    """
    rows = causal_rows(rows)
    data = reduced_data(data or open_data(cache_dir=Path(folder) / "cache"), settings.vocab_size, decoder=True)
    for row in rows:
        if not row.is_original:
            decoupled_config(settings.original_config(data), row.num_original_layers, row.num_divisions)
    results = [
        train_row(row, dataclasses.replace(settings, seed=seed), data, folder, save_weights)
        for seed in seeds
        for row in rows
    ]
    table = pd.DataFrame(results, columns=list(COLUMNS))
    return table.astype({"num_original_layers": "Int64", "num_divisions": "Int64"})
