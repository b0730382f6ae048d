"""Original and decoupled models trained from scratch, with identical hyper-parameters (DATE 2024, IV-A).

Every row starts from the same seeded original weights (a decoupled row from their slices) and sees the same sequences
with the same masks. An encoder is a BERT that learns masked tokens, without next-sentence prediction; a decoder is a
small GPT-2 that learns the next token. A finished row is not trained again; an interrupted one is resumed.

Shapes: B batch, T tokens, K masked positions a sequence, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from detransformer.models.configuration import PRESET_SIZES, architecture, decoupled_config
from detransformer.models.naming import lm_logits
from detransformer.training.config import (
    OPTIMIZERS,
    ModelRow,
    TextRecipe,
    between,
    check_divides,
    config_hash,
    fraction,
    not_negative,
    one_of,
    positive,
)
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import IGNORED, MaskedBatches, NextTokenBatches, SpecialTokens, unigram_loss
from detransformer.training.jobs import run_jobs
from detransformer.training.loop import Objective, Run, fit, micro_batches
from detransformer.training.results import Result, as_result, read_result, write_result


@dataclass(frozen=True, kw_only=True)
class ScratchRecipe(TextRecipe):
    """Training of a model from scratch; `original_config` describes the original model.

    Args:
        hidden_size, num_heads: of the original model.
        dropout: of hidden states and attention.

    The targets are masked tokens, or the next token if `predicts_next`.
    """

    predicts_next = False

    hidden_size: int | None = positive(None)
    num_heads: int | None = positive(None)
    dropout: float = fraction(0.1)

    def original_config(self, model: str, vocab_size: int, special: SpecialTokens) -> PretrainedConfig:
        """The original model's configuration at this scale."""
        raise NotImplementedError

    def check_row(self, row: ModelRow) -> PretrainedConfig:
        """The configuration of `row`'s original except for the vocabulary; ValueError if `row` cannot be built."""
        original = self.original_config(row.model, 1024, SpecialTokens(0, 1, 2, 3))
        if not row.is_original:
            decoupled_config(original, *row.structure)
        return original

    def scale_note(self, row: ModelRow) -> str:
        """The scale in words, so that a reduced one is never taken for the paper's."""
        config, published = self.check_row(row), PRESET_SIZES.get(row.model, {})
        tokens = self.num_steps * self.tokens_per_step
        text = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {tokens:,} tokens pre-training"
        is_reduced = config.hidden_size != published.get("hidden_size", config.hidden_size)
        return f"reduced width: {text}" if is_reduced else text


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ScratchRecipe):
    """Masked-language-model pre-training; the defaults are the paper's recipe (7,038 steps, sequence length 128).

    Args:
        hidden_size, num_heads, intermediate_size: None takes BERT-Base's or BERT-Large's; smaller ones are a reduced
            scale, but the number of layers stays the row's.
        initializer_range: standard deviation of the first weights; BERT's is 0.02 at any width. When it was scaled with
            the width as `CausalConfig`'s (0.049 at 128, 0.069 at 64), twelve layers that normalise after each block
            learned more slowly, the more so the shorter the training.
        frequency_bias: whether the vocabulary's projection starts at the log frequencies of the training text's pieces,
            so that a short training need not learn them; BERT's starts at 0.
    """

    intermediate_size: int | None = positive(None)
    initializer_range: float = positive(0.02)
    frequency_bias: bool = False
    num_steps: int = positive(7038)
    global_batch_size: int = positive(65536)
    optimizer: str = one_of("lamb", OPTIMIZERS)
    learning_rate: float = positive(6e-3)
    warmup: float = fraction(0.2843)
    decay_power: float = positive(0.5)  # NVIDIA's PolyWarmUpScheduler
    max_valid_tokens: int | None = positive(2_000_000)

    def original_config(self, model: str, vocab_size: int, special: SpecialTokens) -> BertConfig:
        chosen = {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
        }
        sizes = PRESET_SIZES[model] | {name: value for name, value in chosen.items() if value is not None}
        heads = sizes["num_attention_heads"]
        check_divides("num_heads", heads, "hidden_size", sizes["hidden_size"], "every head takes an equal part")
        return BertConfig(
            **sizes,
            initializer_range=self.initializer_range,
            vocab_size=vocab_size,
            pad_token_id=special.pad,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class CausalConfig(ScratchRecipe):
    """Next-token training of a small GPT-2; the defaults are six rows in about 25 minutes of one x86 core.

    Args:
        num_layers, hidden_size, num_heads: of the original model; its FFN is four times as wide.
        vocab_size: pieces of the data's vocabulary that are kept (`reduced_data`): with BERT's 30,522 the LM head takes
            most of such a small model's time; None keeps all.
        dropout: of embeddings, residuals and attention.
    """

    predicts_next = True

    num_layers: int = positive(8)
    hidden_size: int = positive(128)
    num_heads: int = positive(4)
    vocab_size: int | None = positive(4096)
    num_steps: int = positive(900)
    seq_len: int = between(128, 8, 1024)
    global_batch_size: int = positive(4)
    micro_batch_size: int = positive(4)
    learning_rate: float = positive(3e-3)
    dropout: float = fraction(0.0)
    max_train_tokens: int | None = positive(2_000_000)
    max_valid_tokens: int | None = positive(50_000)
    checkpoint_every_s: float = not_negative(60.0)

    def __post_init__(self):
        super().__post_init__()
        check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size, "every head takes an equal part")

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in a step."""
        return self.global_batch_size * (self.seq_len - 2)  # [CLS] and the last [SEP] are not

    def original_config(self, model: str, vocab_size: int, special: SpecialTokens) -> GPT2Config:
        return GPT2Config(
            n_layer=self.num_layers,
            n_embd=self.hidden_size,
            n_head=self.num_heads,
            n_positions=self.seq_len,
            vocab_size=vocab_size,
            # GPT-2's 0.02 is for width 768; wider weights keep the scale of a narrower layer's products.
            initializer_range=0.02 * (768 / self.hidden_size) ** 0.5,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=special.cls,
            eos_token_id=special.sep,
            pad_token_id=special.pad,
        )


def masked_lm_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """input_ids [B, T], positions [B, K], labels [B, K] -> mean loss in nats over the labels that count.

    Loss and gradients are those of the whole sequence's logits, but only masked positions are projected onto the
    vocabulary, the widest product of a small BERT.
    """
    logits = logits_at(model, model.base_model(input_ids).last_hidden_state, positions)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def logits_at(model: PreTrainedModel, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """hidden [B, T, D], positions [B, K] -> the LM head's logits [B, K, V] there."""
    return lm_logits(model, hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))


def next_token_loss(model: GPT2LMHeadModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """input_ids [B, T - 2], labels [B, T - 2], the token after each -> mean loss in nats."""
    logits = model(input_ids, use_cache=False).logits  # [B, T - 2, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def build_model(row: ModelRow, config: ScratchRecipe, data: TrainingData) -> PreTrainedModel:
    """The row's model at its seeded start: original weights, sliced if the row is decoupled."""
    set_seed(config.seed)
    original = config.original_config(row.model, data.vocab_size, data.special)
    return row.made_of((GPT2LMHeadModel if architecture(original) == "gpt2" else BertForMaskedLM)(original))


def pretrain(row: ModelRow, config: ScratchRecipe, data: TrainingData, output_dir: str | Path) -> Result:
    """Trains one row into `output_dir/ROW/` (model/, history.csv, result.json).

    Args:
        config: a `PretrainConfig`, or a decoder's `CausalConfig`.

    Returns:
        The run's row, valid_loss, unigram_loss (of word frequencies alone on the same held-out tokens), valid_tokens,
        num_steps, tokens (trained on), hidden_size, seed, precision, source, note.

    Raises:
        ValueError: for sizes that do not divide, damaged data or a damaged checkpoint.
    """
    config.check_row(row)
    run = Run(row.label, Path(output_dir) / row.key, config_hash(row, config, data.name, data.fingerprint))
    done = read_result(run)
    if done is not None:
        return as_result(run, done, row=row)
    kind = NextTokenBatches if config.predicts_next else MaskedBatches
    train, valid = (kind(text, data.vocab_size, data.special, config.seed) for text in data.packed_splits(config))
    model = build_model(row, config, data)
    if isinstance(config, PretrainConfig) and config.frequency_bias:
        with torch.no_grad():
            model.cls.predictions.bias.copy_(train.log_frequencies())
    objective = Objective(model, next_token_loss if config.predicts_next else masked_lm_loss)
    set_seed(config.seed + 1)  # dropout: the same in every row
    trained = fit(objective, micro_batches(train.train_batch, config), config, config.num_steps, run)
    record = {
        "row": dataclasses.asdict(row),
        "valid_loss": evaluate(objective, valid.valid_batches(config.micro_batch_size)),
        "unigram_loss": unigram_loss(train, valid, config.micro_batch_size),
        "valid_tokens": int(valid.sequences.size),
        "num_steps": config.num_steps,
        "tokens": config.num_steps * config.tokens_per_step,
        "hidden_size": model.config.hidden_size,
        "seed": config.seed,
        "precision": config.mixed_precision,
        "source": data.name,
        "note": f"{config.scale_note(row)}; {data.text_note(train.sequences)}",
        "config": dataclasses.asdict(config),
    }
    save = (model.save_pretrained, data.save_tokenizer)
    return as_result(run, write_result(run, trained, record, "tokens", config.tokens_per_step, *save), row=row)


def pretrain_all(
    rows: Iterable[ModelRow],
    config: ScratchRecipe,
    data: TrainingData,
    output_dir: str | Path,
    num_jobs: int = 1,
) -> list[Result]:
    """Runs `pretrain` for each row with the same configuration, `num_jobs` side by side."""
    rows = list(rows)
    for row in rows:  # refuse what cannot work before hours are spent
        config.check_row(row)
    if num_jobs > 1:
        data.packed_splits(config)  # once, before the workers need it
    # By sub-blocks, then by decoupled layers, the slowest first: the last run to end should be a short one.
    slowest_first = sorted(rows, key=lambda row: (-(row.num_divisions or 1), row.num_original_layers or 0))
    run_jobs(pretrain, [(row, config, data, output_dir) for row in slowest_first], num_jobs, "pre-training")
    return [pretrain(row, config, data, output_dir) for row in rows]  # read back


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean loss of a labelled token over `batches`, in the model's own number format."""
    device = next(objective.parameters()).device
    objective.eval()
    total = count = 0.0
    for batch in batches:
        num = int((batch["labels"] >= 0).sum())
        total += float(objective(**{name: tensor.to(device) for name, tensor in batch.items()})) * num
        count += num
    return total / count
