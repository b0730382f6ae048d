"""A training run's row of Table III and its recipe (DATE 2024, IV-A), checked when they are made.

`Recipe` has the fields common to all training; a finished run is found by the hash of what made it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedModel

from detransformer.models import decouple
from detransformer.models.configuration import ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS, PRESET_SIZES
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.training.hardware import resolve_precision

T = TypeVar("T")  # a configuration

MODELS = (*PRESET_SIZES, "gpt2", "minilm")
OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("no", "bf16", "bf16-weights", "auto")
NO_IDENTITY = ("checkpoint_every_s", "num_seeds")  # fields that do not change a run's result

# Fields that are checked -----------------------------------------------------------------------------------------


def checked(default, holds: Callable[[Any], bool], says: str) -> Any:
    """A field that refuses values for which `holds` is false; `says` follows the name and the value in the error."""
    return dataclasses.field(default=default, metadata={"check": (holds, says)})


def positive(default) -> Any:
    """A field whose value is above 0, or None."""
    says = "is not above 0: give a positive number"
    return checked(default, lambda value: value is None or 0 < value < math.inf, says)


def not_negative(default) -> Any:
    """A field whose value is 0 or more."""
    return checked(default, lambda value: 0 <= value < math.inf, "is below 0 or not finite: give 0 for none, or more")


def fraction(default) -> Any:
    """A field whose value is in 0..1."""
    return checked(default, lambda value: 0 <= value <= 1, "is outside 0..1: give it as a fraction")


def between(default, low: int, high: int) -> Any:
    """A field whose value is in low..high."""
    return checked(default, lambda value: low <= value <= high, f"is outside {low}..{high}: choose in that range")


def one_of(default, choices: Sequence[str]) -> Any:
    """A field whose value is one of `choices`."""
    return checked(default, lambda value: value in choices, f"is unknown: choose one of {', '.join(choices)}")


class Checked:
    """A dataclass that checks its fields when it is made; a ValueError names the field, its value and the limit."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (holds, says) = getattr(self, field.name), field.metadata.get("check", (lambda _: True, ""))
            if not holds(value):
                raise ValueError(f"{field.name}={value!r} {says}.")


def check_divides(divisor_name: str, divisor: int, name: str, value: int, why: str) -> None:
    """Raises ValueError if `divisor` does not divide `value`."""
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
        num_layers: of an original model cut to fewer layers, as a comparison for a decoupled one.
    """

    model: str = one_of("bert-base", MODELS)
    num_original_layers: int | None = None
    num_divisions: int | None = None
    attention_width: str = one_of("full", ATTENTION_WIDTHS)
    original_placement: str = one_of("last", ORIGINAL_PLACEMENTS)
    num_layers: int | None = positive(None)

    def __post_init__(self):
        super().__post_init__()
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
        """The row in words."""
        if self.is_original:
            return f"{self.model} original" if self.num_layers is None else f"{self.model}, {self.num_layers} layers"
        return ", ".join([f"{self.model} Nb={self.num_original_layers}, Ndiv={self.num_divisions}", *self._variant])

    def made_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model of this row's structure with the weights of `model`, an original model."""
        return model if self.is_original else decouple(model, *self.structure)

    @property
    def structure(self) -> tuple[int, int, str, str]:
        """The arguments of `decouple` and `decoupled_config` after the original model."""
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
        weight_decay: for all weights but biases and LayerNorm.
        max_grad_norm: gradients are clipped to it; None does not clip.
        mixed_precision: `"no"` (float32), `"bf16"` (autocast), `"bf16-weights"` (bfloat16 weights and activations,
            float32 copies in the optimizer), or `"auto"`, which becomes the fastest of these on this machine.
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

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "mixed_precision", resolve_precision(self.mixed_precision))


@dataclass(frozen=True, kw_only=True)
class StepRecipe(Recipe):
    """A recipe of `num_steps` optimizer steps.

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
class TextRecipe(StepRecipe):
    """A recipe over packed text.

    Args:
        seq_len: tokens in a packed sequence, [CLS] and [SEP] included.
        max_train_tokens, max_valid_tokens: text used; None takes all of it.
    """

    seq_len: int = between(128, 8, 512)
    max_train_tokens: int | None = positive(None)
    max_valid_tokens: int | None = positive(None)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe):
    """Fine-tuning of one task; NVIDIA's values are in the `paper` profile.

    Args:
        batch_size, num_epochs: rows in one optimizer step, and how often all rows are seen.
        micro_batch_size: rows in one forward pass, the rest is gradient accumulation; None takes the batch at once.
        seq_len: longest input; longer ones are cut (classification) or read in windows (SQuAD).
        doc_stride: tokens that two SQuAD windows share; None is a quarter of seq_len.
        max_train_rows, max_eval_rows: None takes all; every table calls a cut set reduced.
        wire_formats: number formats of messages in which the trained model is scored besides exact ones.
        num_seeds: runs of the task with seeds 0, 1, .. (`finetune_all`).
    """

    learning_rate: float = positive(5e-5)
    batch_size: int = positive(32)
    micro_batch_size: int | None = positive(None)
    num_epochs: float = positive(3.0)
    seq_len: int = between(128, 16, 512)
    doc_stride: int | None = None
    dropout: float = fraction(0.1)
    max_train_rows: int | None = positive(None)
    max_eval_rows: int | None = positive(None)
    wire_formats: tuple[str, ...] = checked(
        (), lambda names: set(names) <= set(WIRE_FORMATS), f"is unknown: choose among {', '.join(WIRE_FORMATS)}"
    )
    num_seeds: int = positive(1)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "wire_formats", tuple(self.wire_formats))  # a profile gives a list
        if not 0 <= self.stride < self.seq_len // 2:
            raise ValueError(
                f"doc_stride={self.doc_stride} is outside 0..{self.seq_len // 2 - 1}: windows of "
                f"seq_len={self.seq_len} must move on; choose less than half of it."
            )

    @property
    def stride(self) -> int:
        return self.seq_len // 4 if self.doc_stride is None else self.doc_stride


def make_config(kind: type[T], fields: dict) -> T:
    """A configuration from a profile's values; ValueError for an unknown name."""
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown[0]!r}: choose among {', '.join(known)}.")
    return kind(**fields)


def config_hash(*parts) -> str:
    """16 hexadecimal digits over dataclasses and plain values, without fields that do not change a run's result."""

    def plain(part):
        if not dataclasses.is_dataclass(part):
            return part
        counted = {name: value for name, value in dataclasses.asdict(part).items() if name not in NO_IDENTITY}
        return {type(part).__name__: counted}

    text = json.dumps([plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
