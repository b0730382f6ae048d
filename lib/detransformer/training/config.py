"""What a training run is: the row of Table III and the recipe (DATE 2024, IV-A), checked when they are made.

`Recipe` holds what all kinds of training have in common; a finished run is found again by the hash of what made it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import BertConfig

from detransformer.models.configuration import ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS, PRESET_SIZES, decoupled_config
from detransformer.parallel.wire import WIRE_FORMATS

T = TypeVar("T")  # a configuration

MODELS = (*PRESET_SIZES, "gpt2", "minilm")
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("no", "bf16", "bf16-weights", "auto")
TOKENS_PER_SPECIAL = 2  # [CLS] and [SEP] around a packed sequence

# Fields that are checked -----------------------------------------------------------------------------------------


def positive(default) -> Any:
    """A field whose value is above 0, or None."""
    return dataclasses.field(default=default, metadata={"check": _check_positive})


def not_negative(default) -> Any:
    """A field whose value is 0 or more."""
    return dataclasses.field(default=default, metadata={"check": _check_not_negative})


def fraction(default) -> Any:
    """A field whose value is in 0..1."""
    return dataclasses.field(default=default, metadata={"check": _check_fraction})


def one_of(default, choices: Sequence[str]) -> Any:
    """A field whose value is one of `choices`."""

    def check(name: str, value) -> None:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")

    return dataclasses.field(default=default, metadata={"check": check})


def _check_positive(name: str, value) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name}={value} is not above 0: give a positive number.")


def _check_not_negative(name: str, value) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} is below 0 or not finite: give 0 for none, or more.")


def _check_fraction(name: str, value) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside 0..1: give it as a fraction.")


class Checked:
    """A dataclass whose fields are checked when it is made; a ValueError names the field, its value and the limit."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                field.metadata["check"](field.name, getattr(self, field.name))


def check_divides(divisor_name: str, divisor: int, name: str, value: int, why: str) -> None:
    """Raises ValueError where `divisor` does not divide `value`."""
    if value % divisor:
        raise ValueError(f"{divisor_name}={divisor} does not divide {name}={value}: {why}, choose a divisor.")


# Rows and recipes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRow(Checked):
    """One row of Table III: a model and, for decoupled ones, its Nb and Ndiv.

    Args:
        model: `"bert-base"` (12 layers) or `"bert-large"` (24 layers); `"gpt2"` for a decoder of any size.
        num_original_layers: Nb; None is the original model.
        num_divisions: Ndiv; None for the original model.
        attention_width: of a sub-block, `"full"` (published) or `"narrow"`.
        original_placement: where the original layers stand, `"last"` of each group (published) or elsewhere.
        num_layers: of an original model that keeps fewer layers than it had, beside which a decoupled one is judged.
    """

    model: str = "bert-base"
    num_original_layers: int | None = None
    num_divisions: int | None = None
    attention_width: str = one_of("full", ATTENTION_WIDTHS)
    original_placement: str = one_of("last", ORIGINAL_PLACEMENTS)
    num_layers: int | None = positive(None)

    def __post_init__(self):
        super().__post_init__()
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r} is unknown: choose one of {', '.join(MODELS)}.")
        if self.num_layers is not None and self.num_original_layers is not None:
            raise ValueError(
                f"row {self.model} has num_layers={self.num_layers} and Nb={self.num_original_layers}: give one."
            )
        if (self.num_original_layers is None) != (self.num_divisions is None):
            raise ValueError(
                f"row {self.model}, {self.num_original_layers}, {self.num_divisions} is half decoupled: "
                "give both num_original_layers and num_divisions, or neither."
            )

    @property
    def is_original(self) -> bool:
        return self.num_original_layers is None

    @property
    def key(self) -> str:
        """The row as a folder name."""
        if self.is_original:
            return f"{self.model}-original" if self.num_layers is None else f"{self.model}-{self.num_layers}layers"
        return "-".join([f"{self.model}-nb{self.num_original_layers}-ndiv{self.num_divisions}", *self._variant])

    @property
    def label(self) -> str:
        """The row as people read it."""
        if self.is_original:
            return f"{self.model} original" if self.num_layers is None else f"{self.model}, {self.num_layers} layers"
        return ", ".join([f"{self.model} Nb={self.num_original_layers}, Ndiv={self.num_divisions}", *self._variant])

    @property
    def structure(self) -> tuple[int, int, str, str]:
        """What `decouple` and `decoupled_config` take after the original model."""
        return self.num_original_layers, self.num_divisions, self.attention_width, self.original_placement

    @property
    def _variant(self) -> list[str]:
        width = [] if self.attention_width == "full" else [self.attention_width]
        return width + ([] if self.original_placement == "last" else [self.original_placement])


def model_rows(rows: Iterable[Mapping | Sequence]) -> list[ModelRow]:
    """Rows from the profile's lists or mappings, e.g. `[["bert-base", 4, 4], {"model": "minilm", "num_layers": 3}]`."""
    return [ModelRow(**row) if isinstance(row, Mapping) else ModelRow(*row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """How a model is optimised.

    Args:
        optimizer: `"adamw"`, or `"lamb"` (NVIDIA's recipe for BERT, which the paper follows).
        learning_rate, warmup, decay_power: linear warm-up over that fraction of the steps, then polynomial decay to 0.
        weight_decay: of all weights but biases and LayerNorm.
        max_grad_norm: to which gradients are clipped; None clips none.
        mixed_precision: `"no"` (float32), `"bf16"` (autocast), `"bf16-weights"` (bfloat16 weights and activations,
            float32 copies in the optimizer), or `"auto"` for the fastest of this machine.
        checkpoint_every_s: seconds between checkpoints.
    """

    optimizer: str = one_of("adamw", OPTIMIZERS)
    learning_rate: float = positive(1e-3)
    warmup: float = fraction(0.1)
    decay_power: float = positive(1.0)
    weight_decay: float = not_negative(0.01)
    max_grad_norm: float | None = positive(1.0)
    mixed_precision: str = one_of("no", PRECISIONS)
    checkpoint_every_s: float = not_negative(600.0)


@dataclass(frozen=True, kw_only=True)
class StepRecipe(Recipe):
    """A recipe of so many optimizer steps.

    Args:
        num_steps: optimizer steps.
        global_batch_size: samples (sequences, images) in one optimizer step.
        micro_batch_size: samples in one forward pass; the rest is gradient accumulation.
        seed: of the weights, the data order, masks and dropout.
    """

    num_steps: int = positive(1000)
    global_batch_size: int = positive(64)
    micro_batch_size: int = positive(64)
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        why = "gradients accumulate over whole micro-batches"
        check_divides("micro_batch_size", self.micro_batch_size, "global_batch_size", self.global_batch_size, why)

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StepRecipe):
    """Masked-language-model pre-training; the defaults are the paper's recipe (7,038 steps, sequence length 128).

    Args:
        hidden_size, num_heads, intermediate_size: None takes BERT-Base's or BERT-Large's; smaller ones are a reduced
            scale, the number of layers stays the row's.
        initializer_range: standard deviation of the first weights; BERT's is 0.02, at any width. Scaled with the width
            as `CausalConfig`'s (0.049 at 128, 0.069 at 64), twelve layers that normalise after each block learned more
            slowly: the shorter the training, the more so.
        frequency_bias: whether the vocabulary's projection starts at the log frequencies of the training text's pieces,
            so that a short training is not spent on them; BERT's starts at 0.
        seq_len: tokens in a packed sequence, [CLS] and [SEP] included.
        max_train_tokens, max_valid_tokens: text used; None takes all of it.
        dropout: of hidden states and attention.
    """

    hidden_size: int | None = positive(None)
    num_heads: int | None = positive(None)
    intermediate_size: int | None = positive(None)
    initializer_range: float = positive(0.02)
    frequency_bias: bool = False
    num_steps: int = positive(7038)
    seq_len: int = 128
    global_batch_size: int = positive(65536)
    optimizer: str = one_of("lamb", OPTIMIZERS)
    learning_rate: float = positive(6e-3)
    warmup: float = fraction(0.2843)
    decay_power: float = positive(0.5)  # NVIDIA's PolyWarmUpScheduler
    mask_fraction: float = fraction(0.15)
    dropout: float = fraction(0.1)
    max_train_tokens: int | None = positive(None)
    max_valid_tokens: int | None = positive(2_000_000)

    def __post_init__(self):
        super().__post_init__()
        if not 8 <= self.seq_len <= 512:
            raise ValueError(f"seq_len={self.seq_len} is outside 8..512: BERT has 512 positions, choose in that range.")

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def num_masked(self) -> int:
        """Masked positions in a sequence: a fixed number, so every sequence weighs the same."""
        return max(1, round(self.mask_fraction * (self.seq_len - TOKENS_PER_SPECIAL)))

    def original_config(self, model: str, vocab_size: int, pad_token_id: int = 0) -> BertConfig:
        """The original model's configuration at this scale (layers as in `model`)."""
        sizes = dict(PRESET_SIZES[model])
        chosen = {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
        }
        sizes |= {name: value for name, value in chosen.items() if value is not None}
        heads = sizes["num_attention_heads"]
        check_divides("num_heads", heads, "hidden_size", sizes["hidden_size"], "every head takes an equal part")
        return BertConfig(
            **sizes,
            initializer_range=self.initializer_range,
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )

    def check_row(self, row: ModelRow) -> None:
        """Raises ValueError where `row` cannot be built at this scale."""
        original = self.original_config(row.model, vocab_size=1024)
        if not row.is_original:
            decoupled_config(original, *row.structure)

    def scale_note(self, row: ModelRow) -> str:
        """The scale in words, so that a reduced one is never taken for the paper's."""
        config = self.original_config(row.model, vocab_size=1024)
        tokens = self.num_steps * self.tokens_per_step
        text = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {tokens:,} tokens pre-training"
        if config.hidden_size != PRESET_SIZES[row.model]["hidden_size"]:
            text = f"reduced width: {text}"
        return text


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe):
    """Fine-tuning of one task; NVIDIA's values are in the `paper` profile.

    Args:
        batch_size, num_epochs: rows in one optimizer step, and how often all rows are seen.
        micro_batch_size: rows in one forward pass, the rest is gradient accumulation; None takes the batch at once.
        seq_len: longest input, longer ones are cut (classification) or read in windows (SQuAD).
        doc_stride: tokens two SQuAD windows share; None is a quarter of seq_len.
        max_train_rows, max_eval_rows: None takes all; a cut set is called reduced in every table.
        wire_formats: number formats of messages that the trained model is scored with besides exact ones.
    """

    learning_rate: float = positive(5e-5)
    batch_size: int = positive(32)
    micro_batch_size: int | None = positive(None)
    eval_batch_size: int = positive(64)
    num_epochs: float = positive(3.0)
    seq_len: int = 128
    doc_stride: int | None = None
    dropout: float = fraction(0.1)
    max_train_rows: int | None = positive(None)
    max_eval_rows: int | None = positive(None)
    max_answer_tokens: int = positive(30)
    wire_formats: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "wire_formats", tuple(self.wire_formats))  # a profile gives a list
        unknown = [name for name in self.wire_formats if name not in WIRE_FORMATS]
        if unknown:
            raise ValueError(
                f"wire_formats has {unknown[0]!r}, which is unknown: choose among {', '.join(WIRE_FORMATS)}."
            )
        if not 16 <= self.seq_len <= 512:
            raise ValueError(f"seq_len={self.seq_len} is outside 16..512: BERT has 512 positions.")
        if not 0 <= self.stride < self.seq_len // 2:
            raise ValueError(
                f"doc_stride={self.doc_stride} is outside 0..{self.seq_len // 2 - 1}: windows of "
                f"seq_len={self.seq_len} must move on; choose less than half of it."
            )

    @property
    def stride(self) -> int:
        return self.seq_len // 4 if self.doc_stride is None else self.doc_stride


def finetune_recipes(recipes: dict[str, dict]) -> tuple[dict[str, FinetuneConfig], dict[str, int]]:
    """A profile's recipes, task -> {num_seeds, and FinetuneConfig's fields}, as configurations and numbers of seeds."""
    num_seeds = {task: recipe.get("num_seeds", 1) for task, recipe in recipes.items()}
    for task, number in num_seeds.items():
        if number < 1:
            raise ValueError(f"num_seeds={number} for {task} is below 1: give at least one seed.")
    configs = {}
    for task, recipe in recipes.items():
        fields = {name: value for name, value in recipe.items() if name != "num_seeds"}
        configs[task] = make_config(FinetuneConfig, fields)
    return configs, num_seeds


def make_config(kind: type[T], fields: dict) -> T:
    """A configuration from a profile's values; an unknown name is a ValueError."""
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown[0]!r}: choose among {', '.join(known)}.")
    return kind(**fields)


def config_hash(*parts) -> str:
    """16 hexadecimal digits over dataclasses and plain values; seconds between checkpoints do not count."""

    def plain(part):
        if dataclasses.is_dataclass(part):
            fields = dataclasses.asdict(part)
            fields.pop("checkpoint_every_s", None)
            return {type(part).__name__: fields}
        return part

    text = json.dumps([plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
