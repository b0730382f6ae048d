"""What a training run is: the row of Table III, the pre-training recipe, the fine-tuning recipe (DATE 2024, IV-A).

All three are frozen and checked when made. A result is found again by the hash of everything that made it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import BertConfig

from detransformer.models.configuration import ATTENTION_WIDTHS, ORIGINAL_PLACEMENTS, PRESET_SIZES, decoupled_config
from detransformer.parallel.wire import WIRE_FORMATS

T = TypeVar("T")  # a configuration

OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("no", "bf16", "fp16", "bf16-weights", "auto")
TOKENS_PER_SPECIAL = 2  # [CLS] and [SEP] around a packed sequence


@dataclass(frozen=True)
class ModelRow:
    """One row of Table III: a model and, for decoupled ones, its Nb and Ndiv.

    Args:
        model: `"bert-base"` (12 layers) or `"bert-large"` (24 layers).
        num_original_layers: Nb; None is the original model.
        num_divisions: Ndiv; None for the original model.
        attention_width: of a sub-block, `"full"` (published) or `"narrow"`.
        original_placement: where the original layers stand, `"last"` of each group (published) or elsewhere.
    """

    model: str = "bert-base"
    num_original_layers: int | None = None
    num_divisions: int | None = None
    attention_width: str = "full"
    original_placement: str = "last"

    def __post_init__(self):
        if self.model not in PRESET_SIZES:
            raise ValueError(f"model {self.model!r} is unknown: choose one of {', '.join(PRESET_SIZES)}.")
        check_choice(self, "attention_width", ATTENTION_WIDTHS)
        check_choice(self, "original_placement", ORIGINAL_PLACEMENTS)
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
            return f"{self.model}-original"
        return "-".join([f"{self.model}-nb{self.num_original_layers}-ndiv{self.num_divisions}", *self._variant])

    @property
    def label(self) -> str:
        """The row as people read it."""
        if self.is_original:
            return f"{self.model} original"
        return ", ".join([f"{self.model} Nb={self.num_original_layers}, Ndiv={self.num_divisions}", *self._variant])

    @property
    def _variant(self) -> list[str]:
        width = [] if self.attention_width == "full" else [self.attention_width]
        return width + ([] if self.original_placement == "last" else [self.original_placement])


def model_rows(rows: Iterable[ModelRow | Sequence]) -> list[ModelRow]:
    """Rows from the profile's lists, e.g. `[["bert-base"], ["bert-base", 4, 4]]`."""
    return [row if isinstance(row, ModelRow) else ModelRow(*row) for row in rows]


def check_positive(config, *names: str) -> None:
    """Raises ValueError where a named value that is given is not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} is not above 0: give a positive number.")


def check_choice(config, name: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError where the value is not one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def check_fraction(config, name: str) -> None:
    """Raises ValueError where the value is outside 0..1."""
    value = getattr(config, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is outside 0..1: give it as a fraction.")


def check_micro_batches(config) -> None:
    """Raises ValueError where micro-batches do not divide the batch."""
    if config.global_batch_size % config.micro_batch_size:
        raise ValueError(
            f"micro_batch_size={config.micro_batch_size} does not divide global_batch_size={config.global_batch_size}: "
            "gradients accumulate over whole micro-batches, choose a divisor."
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-language-model pre-training; the defaults are the paper's recipe (7,038 steps, sequence length 128).

    Args:
        hidden_size, num_heads, intermediate_size: None takes BERT-Base's or BERT-Large's; smaller ones are a reduced
            scale, the number of layers stays the row's.
        initializer_range: standard deviation of the first weights; BERT's is 0.02, at any width. Scaled with the width
            as `CausalConfig`'s (0.049 at 128, 0.069 at 64), twelve layers that normalise after each block learned more
            slowly: the shorter the training, the more so.
        frequency_bias: whether the vocabulary's projection starts at the log frequencies of the training text's pieces,
            so that a short training is not spent on them; BERT's starts at 0.
        num_steps: optimizer steps.
        seq_len: tokens in a packed sequence, [CLS] and [SEP] included.
        global_batch_size: sequences in one optimizer step over all processes.
        micro_batch_size: sequences in one forward pass; the rest is gradient accumulation.
        optimizer: `"lamb"` (NVIDIA's recipe, which the paper follows) or `"adamw"`.
        learning_rate, warmup, decay_power: linear warm-up over that fraction of the steps, then polynomial decay to 0.
        max_train_tokens, max_valid_tokens: text used; None takes all of it.
        dropout: of hidden states and attention.
        mixed_precision: `"no"` (float32), `"bf16"` or `"fp16"` (accelerate's autocast), `"bf16-weights"` (bfloat16
            weights and activations, float32 copies in the optimizer), or `"auto"` for the fastest of this machine.
        checkpoint_every_s: seconds between checkpoints.
        seed: of the weights, the data order and the masks: the same for every row.
    """

    hidden_size: int | None = None
    num_heads: int | None = None
    intermediate_size: int | None = None
    initializer_range: float = 0.02
    frequency_bias: bool = False
    num_steps: int = 7038
    seq_len: int = 128
    global_batch_size: int = 65536
    micro_batch_size: int = 64
    optimizer: str = "lamb"
    learning_rate: float = 6e-3
    warmup: float = 0.2843
    decay_power: float = 0.5  # NVIDIA's PolyWarmUpScheduler
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mask_fraction: float = 0.15
    dropout: float = 0.1
    max_train_tokens: int | None = None
    max_valid_tokens: int | None = 2_000_000
    mixed_precision: str = "no"
    checkpoint_every_s: float = 600.0
    seed: int = 0

    def __post_init__(self):
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "mixed_precision", PRECISIONS)
        check_fraction(self, "warmup")
        check_fraction(self, "dropout")
        check_fraction(self, "mask_fraction")
        check_positive(
            self,
            *("hidden_size", "num_heads", "intermediate_size", "num_steps", "global_batch_size", "micro_batch_size"),
            *("learning_rate", "max_train_tokens", "max_valid_tokens", "mask_fraction", "initializer_range"),
        )
        if not 8 <= self.seq_len <= 512:
            raise ValueError(f"seq_len={self.seq_len} is outside 8..512: BERT has 512 positions, choose in that range.")
        check_micro_batches(self)

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

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
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise ValueError(
                f"num_heads={sizes['num_attention_heads']} does not divide hidden_size={sizes['hidden_size']}: "
                "every head takes an equal part, choose a divisor."
            )
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
            decoupled_config(
                original, row.num_original_layers, row.num_divisions, row.attention_width, row.original_placement
            )

    def scale_note(self, row: ModelRow) -> str:
        """The scale in words, so that a reduced one is never taken for the paper's."""
        config = self.original_config(row.model, vocab_size=1024)
        tokens = self.num_steps * self.tokens_per_step
        text = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {tokens:,} tokens pre-training"
        if config.hidden_size != PRESET_SIZES[row.model]["hidden_size"]:
            text = f"reduced width: {text}"
        return text


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of one task; NVIDIA's values are in the `paper` profile.

    Args:
        learning_rate, warmup, batch_size, num_epochs: linear warm-up, then linear decay to 0.
        seq_len: longest input, longer ones are cut (classification) or read in windows (SQuAD).
        micro_batch_size: rows in one forward pass, the rest is gradient accumulation; None takes the batch at once.
        doc_stride: tokens two SQuAD windows share; None is a quarter of seq_len.
        max_train_rows, max_eval_rows: None takes all; a cut set is called reduced in every table.
        wire_formats: number formats of messages that the trained model is scored with besides exact ones.
        mixed_precision: as in `PretrainConfig`.
        checkpoint_every_s: seconds between checkpoints.
    """

    learning_rate: float = 5e-5
    warmup: float = 0.1
    batch_size: int = 32
    micro_batch_size: int | None = None
    eval_batch_size: int = 64
    num_epochs: float = 3.0
    seq_len: int = 128
    doc_stride: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    max_answer_tokens: int = 30
    wire_formats: tuple[str, ...] = ()
    mixed_precision: str = "no"
    checkpoint_every_s: float = 600.0

    def __post_init__(self):
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "mixed_precision", PRECISIONS)
        object.__setattr__(self, "wire_formats", tuple(self.wire_formats))  # a profile gives a list
        for name in self.wire_formats:
            if name not in WIRE_FORMATS:
                raise ValueError(
                    f"wire_formats has {name!r}, which is unknown: choose among {', '.join(WIRE_FORMATS)}."
                )
        check_fraction(self, "warmup")
        check_fraction(self, "dropout")
        check_positive(self, "learning_rate", "batch_size", "eval_batch_size", "num_epochs", "max_answer_tokens")
        check_positive(self, "micro_batch_size", "max_train_rows", "max_eval_rows")
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
