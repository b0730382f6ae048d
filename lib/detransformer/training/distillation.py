"""Calibration: a trained original BERT decoupled by slicing, then trained on, with the original as its teacher.

The papers pre-train every decoupled model from the start. Slices of a trained model are a better start than chance, and
the original model says more of each token than its label does: its probabilities (Hinton et al. 2015, Section 2) and
what its original layers, which both models have at the same depth, make of it (as in TinyBERT, Jiao et al. 2020). With
the teacher's weights at 0, what is left is plain pre-training that goes on from the slices: what distillation adds is
the difference.

Shapes: B batch, T tokens, K masked positions a sequence, D hidden, V vocabulary.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM
from transformers.utils import logging as transformers_logging

from detransformer.checkpoints import FAMILIES, copy_tokenizer, load_original, read_config
from detransformer.files import atomic_folder
from detransformer.models import decouple, layer_kinds
from detransformer.training.config import Checked, ModelRow, PretrainConfig, config_hash, not_negative, positive
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import IGNORED
from detransformer.training.finetuning import source_of
from detransformer.training.hardware import place, resolve_precision
from detransformer.training.loop import Run
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.pretraining import PretrainResult, evaluate, masked_texts, text_note, train_on_text
from detransformer.training.results import as_result, read_result

METHODS = ("none", "plain", "distilled", "from scratch")  # as tables list them
COLUMNS = ["row", "start", "method", "tokens", "tokens_share", "valid_loss", "perplexity", "teacher_valid_loss"]


@dataclass(frozen=True)
class CalibrationConfig(Checked):
    """How a sliced model is trained on.

    Args:
        pretraining: steps, batches, text, optimizer, dropout and precision; its sizes are the teacher's and not read.
        ce_weight: of the cross-entropy of the masked tokens, as in pre-training.
        kl_weight: of the divergence from the teacher's probabilities of the masked tokens, times temperature squared.
        hidden_weight: of the squared error of the original layers' outputs, relative to the teacher's mean square.
        temperature: both models' logits are divided by it in the divergence.
    """

    pretraining: PretrainConfig
    ce_weight: float = not_negative(1.0)
    kl_weight: float = not_negative(1.0)
    hidden_weight: float = not_negative(1.0)
    temperature: float = positive(2.0)

    def __post_init__(self):
        super().__post_init__()
        if self.ce_weight + self.kl_weight + self.hidden_weight == 0:
            raise ValueError("ce_weight, kl_weight and hidden_weight are all 0: give at least one loss a weight.")

    @property
    def asks_teacher(self) -> bool:
        return self.kl_weight > 0 or self.hidden_weight > 0

    @property
    def method(self) -> str:
        """As tables call it."""
        return "distilled" if self.asks_teacher else "plain"


@dataclass(frozen=True)
class CalibrationResult(PretrainResult):
    """A calibrated row; `history`'s train_loss is the weighted sum, `valid_loss` the cross-entropy as everywhere.

    `sliced_valid_loss` and `teacher_valid_loss` are of the slices before any training and of the original model, over
    the same sequences and masks; `teacher_tokens` is what the teacher was pre-trained on, None where it is not known.
    """

    method: str
    sliced_valid_loss: float
    teacher_valid_loss: float
    teacher_tokens: int | None


class DistillationLoss(MaskedLmLoss):
    """A student and its loss as one module; in eval mode the masked-language-model loss alone.

    The teacher is kept beside the module: it has no gradients, stays in eval mode, and is in no checkpoint.
    """

    def __init__(self, student: BertForMaskedLM, teacher: BertForMaskedLM, config: CalibrationConfig):
        super().__init__(student)
        self.config = config
        kinds = layer_kinds(student.config)
        self.depths = [i + 1 for i, kind in enumerate(kinds) if kind == "original"]  # 0 is the embeddings' output
        self._beside = [teacher.eval().requires_grad_(False)]  # in a list, since a module would be registered

    @property
    def teacher(self) -> BertForMaskedLM:
        return self._beside[0]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As `MaskedLmLoss`; in training the weighted sum of `parts`."""
        if not self.training:
            return super().forward(input_ids, positions, labels)
        weights = {name: getattr(self.config, f"{name}_weight") for name in ("ce", "kl", "hidden")}
        parts = self.parts(input_ids, positions, labels, [name for name, weight in weights.items() if weight > 0])
        return sum(weights[name] * loss for name, loss in parts.items())

    def parts(
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, names: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """Of `ce`, `kl` and `hidden` those in `names`, in float32: means over the labels that count, or all tokens."""
        names, losses = set(names), {}
        logits, layers = self._read(self.model, input_ids, positions, "hidden" in names, bool(names - {"hidden"}))
        if names & {"kl", "hidden"}:
            with torch.no_grad():
                expected, targets = self._read(self.teacher, input_ids, positions, "hidden" in names, "kl" in names)
        if "ce" in names:
            losses["ce"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        if "kl" in names:
            ours, theirs = (F.log_softmax(x / self.config.temperature, dim=-1) for x in (logits, expected))
            each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # [B, K]
            counts = labels != IGNORED
            losses["kl"] = self.config.temperature**2 * (each * counts).sum() / counts.sum().clamp(min=1)
        if "hidden" in names:
            errors = [_relative_error(ours, target) for ours, target in zip(layers, targets, strict=True)]
            losses["hidden"] = torch.stack(errors).mean()
        return losses

    def _read(self, model: BertForMaskedLM, input_ids, positions, with_layers: bool, with_logits: bool):
        """(logits [B, K, V] of the masked positions, outputs [B, T, D] of the original layers), float32."""
        output = model.bert(input_ids, output_hidden_states=with_layers)
        layers = [output.hidden_states[depth].float() for depth in self.depths] if with_layers else []
        if not with_logits:
            return None, layers
        hidden = output.last_hidden_state
        picked = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return model.cls(picked).float(), layers


def _relative_error(ours: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error over the target's mean square [B, T, D]: 1 where all is missing."""
    scale = target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours - target).square().mean(-1) / scale).mean()


def calibrate(
    teacher: PretrainResult | str | Path,
    row: ModelRow,
    config: CalibrationConfig,
    data: TrainingData,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
) -> CalibrationResult:
    """Slices `teacher` into `row`'s structure and trains it on, in a folder of its own under `output_dir`.

    A finished calibration is read back, an interrupted one goes on; the folder holds what a pre-trained row's does, and
    the result can be fine-tuned as one. The seed is of order, masks and dropout: the first weights are the teacher's.

    Args:
        teacher: an original model's pre-training, or the folder of a BERT checkpoint with a masked-LM head.
        row: a decoupled row; of a `PretrainResult`, of the same model.
        data: the text; its tokenizer must be the teacher's.
        on_step: `on_step(step, loss)` is called after each step.

    Raises:
        ValueError: for an original row, a teacher of another kind or vocabulary, or sizes that do not divide.
    """
    checkpoint, source = source_of(teacher)
    if row.is_original:
        raise ValueError(f"row {row.label} is not decoupled: give num_original_layers and num_divisions.")
    if isinstance(teacher, PretrainResult) and not (teacher.row.is_original and teacher.row.model == row.model):
        raise ValueError(f"{teacher.row.label} cannot teach {row.label}: give the original {row.model}'s pre-training.")
    precision = resolve_precision(config.pretraining.mixed_precision)
    recipe = dataclasses.replace(config.pretraining, mixed_precision=precision)
    weights = {name: value for name, value in vars(config).items() if name != "pretraining"}
    identity = config_hash("calibration", source, row, recipe, weights, data.name, data.fingerprint)
    folder = Path(output_dir) / f"{row.key}-{config.method}-{recipe.num_steps}steps-{identity[:6]}"
    run = Run(f"{row.label} {config.method}", folder, identity, on_step)
    done = read_result(run)
    if done is not None:
        return as_result(CalibrationResult, run, done, row=row)
    original = load_teacher(checkpoint, data)
    student = _student(original, row, recipe.dropout)
    train, valid = masked_texts(data, recipe)
    for model in (original, student):
        place(model, precision)
    teacher_loss, sliced_loss = (
        evaluate(MaskedLmLoss(model), valid.valid_batches(recipe.micro_batch_size)) for model in (original, student)
    )
    if precision == "bf16-weights":  # as its student will be
        original.to(torch.bfloat16)
    tokens = recipe.num_steps * recipe.tokens_per_step
    record = {
        "row": dataclasses.asdict(row),
        "config": dataclasses.asdict(config),
        "method": config.method,
        "sliced_valid_loss": sliced_loss,
        "teacher_valid_loss": teacher_loss,
        "teacher_tokens": teacher.tokens if isinstance(teacher, PretrainResult) else None,
        "note": f"slices of a trained model of {student.config.num_hidden_layers} layers, hidden "
        f"{student.config.hidden_size}, {config.method} for {tokens:,} tokens; {text_note(data, train)}",
    }
    record = train_on_text(DistillationLoss(student, original, config), recipe, data, train, valid, run, record)
    return as_result(CalibrationResult, run, record, row=row)


def load_teacher(folder: Path, data: TrainingData) -> BertForMaskedLM:
    """The original BERT of `folder`, which must read `data`'s tokens.

    Raises:
        ValueError: for a folder without a whole BERT and its masked-LM head, or a vocabulary that is not `data`'s.
    """
    config = read_config(str(folder))
    if config["model_type"] != "bert":
        raise ValueError(f"{folder} is a {config['model_type']} checkpoint: only a BERT is calibrated.")
    verbosity = transformers_logging.get_verbosity()
    try:
        teacher, fresh = load_original(str(folder), FAMILIES["bert"], "masked-lm")
    finally:
        transformers_logging.set_verbosity(verbosity)
    if fresh:
        raise ValueError(
            f"{folder} has no weights for {fresh[0]}: give a checkpoint that was saved with its masked-LM head."
        )
    tokenizer = folder / "tokenizer.json"
    known = json.loads(tokenizer.read_text("utf-8"))["model"].get("vocab") if tokenizer.is_file() else None
    if data.vocab_size > teacher.config.vocab_size or (known and known != _vocabulary(data)):
        raise ValueError(
            f"{folder} has another vocabulary than the {data.name} text is cut into: read the text with its tokenizer."
        )
    return teacher


def _vocabulary(data: TrainingData) -> dict[str, int]:
    return json.loads(data.tokenizer.to_str())["model"]["vocab"]


def _student(teacher: BertForMaskedLM, row: ModelRow, dropout: float) -> BertForMaskedLM:
    """`teacher`'s slices, with this dropout; the teacher's own is never used."""
    teacher.config.hidden_dropout_prob = teacher.config.attention_probs_dropout_prob = dropout
    return decouple(teacher, *row.structure)


def save(result: CalibrationResult, teacher: str | Path, output: str | Path) -> None:
    """Writes the model as a folder of its own, with the teacher's tokenizer files and how it was made."""
    facts = {
        field.name: getattr(result, field.name)
        for field in dataclasses.fields(result)
        if field.name not in ("row", "checkpoint", "history")
    }
    with atomic_folder(output) as folder:
        shutil.copytree(result.checkpoint, folder, dirs_exist_ok=True)
        copy_tokenizer(str(teacher), folder)
        result.history.to_csv(folder / "calibration.csv", index=False)
        (folder / "calibration.json").write_text(json.dumps(facts, indent=1))


def calibration_table(
    results: Iterable[CalibrationResult], scratch_results: Iterable[PretrainResult] = ()
) -> pd.DataFrame:
    """What calibration comes to, one row a training: by row, then method, then tokens.

    Columns: row; start (`slices` or `scratch`); method (`none`: slices as they are; `plain`, `distilled`, `from
    scratch`); tokens trained on, and their share of the teacher's pre-training; valid_loss (nats a masked token);
    perplexity; teacher_valid_loss; seconds; seed; source; note.

    Args:
        results: of `calibrate`, any number a row.
        scratch_results: the same rows pre-trained from the start; those of other rows are left out.
    """
    results = list(results)
    rows, untrained = [], set()
    for result in results:
        if (result.row, result.sliced_valid_loss) not in untrained:
            untrained.add((result.row, result.sliced_valid_loss))
            bare = dataclasses.replace(result, valid_loss=result.sliced_valid_loss, tokens=0, seconds=0.0)
            rows.append(_line(bare, "slices", "none", result))
        rows.append(_line(result, "slices", result.method, result))
    by_row = {result.row: result for result in results}
    rows += [_line(r, "scratch", "from scratch", by_row[r.row]) for r in scratch_results if r.row in by_row]
    places = {label: place for place, label in enumerate(dict.fromkeys(row["row"] for row in rows))}
    rows.sort(key=lambda row: (places[row["row"]], METHODS.index(row["method"]), row["tokens"], row["seed"]))
    return pd.DataFrame(rows, columns=[*COLUMNS, "seconds", "seed", "source", "note"])


def _line(result: PretrainResult, start: str, method: str, calibrated: CalibrationResult) -> dict:
    known = calibrated.teacher_tokens is not None
    return {
        "row": result.row.label,
        "start": start,
        "method": method,
        "tokens": result.tokens,
        "tokens_share": result.tokens / calibrated.teacher_tokens if known else math.nan,
        "valid_loss": result.valid_loss,
        "perplexity": math.exp(min(result.valid_loss, 700.0)),
        "teacher_valid_loss": calibrated.teacher_valid_loss,
        "seconds": result.seconds,
        "seed": result.seed,
        "source": result.source,
        "note": result.note,
    }
