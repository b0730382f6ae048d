"""Calibration: a trained encoder is decoupled (or cut to fewer layers) and distilled from its original self.

The papers pre-train every decoupled model from scratch. Here the original's weights are sliced and brought back to the
original's function in three steps that need text but no labels: a closed-form fit of decoupled layers (`refit`);
training of each layer alone, with the teacher's input and the teacher's output as its target; then training of all
layers together, as the model runs. The loss is the error of each layer's output relative to the teacher's (as in
TinyBERT, Jiao et al. 2020), plus, for a model with an LM head or a classifier, the divergence from the teacher's
probabilities (Hinton et al. 2015, Section 2). Embeddings and heads stay the teacher's.

Shapes: B batch, T tokens, K masked positions a sequence, D hidden, V vocabulary or labels, L layers.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.checkpoints import copy_files, copy_tokenizer
from detransformer.files import atomic_folder
from detransformer.folders import OTHER_FILES
from detransformer.models import decouple, layer_kinds
from detransformer.models.configuration import ENCODER_HEADS, architecture, config_fields, decoupled_config, head_of
from detransformer.models.naming import layers_of
from detransformer.opening import load_model, open_checkpoint
from detransformer.training.config import ModelRow, TextRecipe, config_hash, fraction, not_negative, positive
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import CutBatches, MaskedBatches
from detransformer.training.finetuning import source_of
from detransformer.training.hardware import place
from detransformer.training.loop import Objective, Run, fit, micro_batches
from detransformer.training.pretraining import logits_at
from detransformer.training.refit import refit
from detransformer.training.results import Result, as_result, read_result, write_result

TEMPERATURE = 2.0  # divides both models' logits in the divergence


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(TextRecipe):
    """The recipe that brings a sliced model back to its original's function.

    Args:
        global_batch_size: small batches learn more from the same text.
        fit_sequences: sequences that the closed form reads; 0 leaves the slices as they are.
        alone_share: share of the steps in which each decoupled layer is trained alone, before all train together;
            after the closed form it did not help.
    """

    num_steps: int = not_negative(250)
    global_batch_size: int = positive(8)
    micro_batch_size: int = positive(8)
    learning_rate: float = positive(1e-3)
    fit_sequences: int = not_negative(256)
    alone_share: float = fraction(0.0)
    max_valid_tokens: int | None = positive(32_768)


@dataclass(frozen=True)
class LayerErrors:
    """The loss of a student: its distance from its teacher.

    Args:
        teacher: in eval mode; nothing here trains or saves it.
        depths: for each layer of the student, the number of teacher layers whose output it should match.
        alone: the student's layers that are trained alone, in the steps that ask for it.
    """

    teacher: PreTrainedModel
    depths: Sequence[int]
    alone: Sequence[int]

    @property
    def classifies(self) -> bool:
        return type(self.teacher).__name__.endswith(ENCODER_HEADS["classification"])

    @property
    def fills_masks(self) -> bool:
        return not self.classifies and self.teacher.base_model is not self.teacher

    def __call__(
        self,
        student: PreTrainedModel,
        input_ids: torch.Tensor,
        alone: torch.Tensor,
        positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids [B, T]; alone: whether each layer gets the teacher's input; positions [B, K] masked -> loss."""
        with torch.no_grad():
            expected = self._outputs(self.teacher, input_ids)
        targets = expected.hidden_states
        if bool(alone):
            layers = layers_of(student.base_model)
            errors = [
                relative_error(layers[i](targets[self.depths[i] - 1]), targets[self.depths[i]]) for i in self.alone
            ]
            return torch.stack(errors).mean()
        obtained = self._outputs(student, input_ids)
        outputs = obtained.hidden_states[1:]
        errors = [relative_error(x, targets[depth]) for x, depth in zip(outputs, self.depths, strict=True)]
        loss = torch.stack(errors).mean()
        if not self.classifies and not self.fills_masks:
            return loss
        ours = self._log_probabilities(student, obtained, positions)
        with torch.no_grad():
            theirs = self._log_probabilities(self.teacher, expected, positions)
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
        return loss + TEMPERATURE**2 * divergence

    def _outputs(self, model: PreTrainedModel, input_ids: torch.Tensor):
        """Hidden states, with a classifier's logits; an LM head is applied later, where needed."""
        whole = model if self.classifies else model.base_model
        return whole(input_ids, output_hidden_states=True)

    def _log_probabilities(self, model: PreTrainedModel, output, positions: torch.Tensor | None) -> torch.Tensor:
        """Of a classifier's labels, or of an LM head's tokens at the masked positions."""
        logits = output.logits if self.classifies else logits_at(model, output.last_hidden_state, positions)
        return F.log_softmax(logits.float() / TEMPERATURE, dim=-1)


def relative_error(ours: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error over the target's mean square, both over all tokens [B, T, D]: 1 if everything is missing."""
    ours, target = ours.float(), target.float()
    return (ours - target).square().mean() / target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def distance(student: PreTrainedModel, teacher: PreTrainedModel, sequences: torch.Tensor, depths: Sequence[int]):
    """(relative error of each layer's output, mean cosine of mean-pooled outputs) over sequences [N, T]."""
    errors, cosines = [], []
    student.eval()
    for ids in sequences.split(32):
        ours, theirs = (m.base_model(ids, output_hidden_states=True).hidden_states for m in (student, teacher))
        errors.append([float(relative_error(x, theirs[d])) for x, d in zip(ours[1:], depths, strict=True)])
        cosines.append(F.cosine_similarity(ours[-1].float().mean(1), theirs[-1].float().mean(1), dim=-1))
    return np.mean(errors, axis=0).round(5).tolist(), round(float(torch.cat(cosines).mean()), 5)


def calibrate(
    teacher: str | Path,
    row: ModelRow,
    config: CalibrationConfig,
    data: TrainingData,
    output_dir: str | Path,
    start: Result | None = None,
) -> Result:
    """Cuts `teacher` into `row`'s structure and trains it, in a folder of its own under `output_dir`.

    A finished calibration is read back, an interrupted one resumed. With 0 steps only the closed form runs; if that
    also has 0 sequences, the slices stay as they are.

    Args:
        teacher: folder of an original encoder, with or without a head.
        row: a decoupled structure, or an original one of fewer layers.
        data: the text; its tokenizer must be the teacher's.
        start: a calibration of the same row to continue, instead of the slices.

    Returns:
        The calibration's row, label, stage (`sliced` or `cut`, `closed form`, `trained`), tokens (trained on in all,
        with those of `start`, in `seconds`), fit_tokens (read by the closed form), errors (of each layer's output,
        first to last: means over held-out tokens of the squared error relative to the teacher's mean square), cosine
        (of the mean-pooled outputs), seed, precision, source, note.

    Raises:
        ValueError: for an original row, a teacher of another kind or vocabulary, or sizes that do not divide.
    """
    teacher = Path(teacher)
    if row.is_original and row.num_layers is None:
        raise ValueError(f"row {row.label} is the teacher itself: give num_original_layers and num_divisions.")
    start = start or Result(identity=None, checkpoint=None, tokens=0, fit_tokens=0, seconds=0.0)
    source = source_of(teacher)[1]
    identity = config_hash("calibration", source, row, config, data.name, data.fingerprint, start.identity)
    tokens = start.tokens + config.num_steps * config.tokens_per_step
    folder = Path(output_dir) / f"{row.key}-{tokens}tokens-{identity[:6]}"
    run = Run(f"{row.label}, {tokens:,} tokens", folder, identity)
    done = read_result(run)
    if done is not None:
        return as_result(run, done, row=row)
    original = load_teacher(teacher, data)
    student, depths = cut(original, row)
    train, valid = data.packed_splits(config)
    valid = torch.from_numpy(valid.astype(np.int64))
    fit_tokens = start.fit_tokens
    if start.checkpoint is not None:
        student = type(student).from_pretrained(start.checkpoint)
    elif not row.is_original and config.fit_sequences:
        rows = np.random.default_rng([config.seed, 3]).permutation(len(train))[: config.fit_sequences]
        refit(student.base_model, original.base_model, torch.from_numpy(train[np.sort(rows)].astype(np.int64)))
        fit_tokens = len(rows) * config.seq_len
    layers_of(student.requires_grad_(False).base_model).requires_grad_(True)
    for model in (original, student):
        place(model, config.mixed_precision)
    if config.mixed_precision == "bf16-weights":  # as its student will be
        original.to(torch.bfloat16)
    alone = [] if row.is_original else [i for i, kind in enumerate(layer_kinds(student.config)) if kind == "decoupled"]
    loss = LayerErrors(original, depths, alone)
    set_seed(config.seed + 1)
    num_alone = round(config.alone_share * config.num_steps) if alone and not start.tokens else 0
    kind = MaskedBatches if loss.fills_masks else CutBatches
    together = micro_batches(kind(train, data.vocab_size, data.special, config.seed).train_batch, config)

    def batches(step: int) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
        for share, batch in together(step):
            yield share, batch | {"alone": torch.tensor(step < num_alone)}

    trained = fit(Objective(student, loss), batches, config, config.num_steps, run)
    original.to(torch.float32)
    errors, cosine = distance(student, original, valid, depths)
    stage = "trained" if tokens else "closed form" if fit_tokens else "sliced" if alone else "cut"
    record = {
        "row": dataclasses.asdict(row),
        "config": dataclasses.asdict(config),
        "label": f"{row.label}, {f'{tokens:,} tokens' if tokens else stage}",
        "stage": stage,
        "tokens": tokens,
        "fit_tokens": fit_tokens,
        "errors": errors,
        "cosine": cosine,
        "seed": config.seed,
        "precision": config.mixed_precision,
        "source": data.name,
        "note": data.text_note(train),
    }
    trained.seconds += start.seconds
    save = (student.save_pretrained, partial(copy_tokenizer, str(teacher)))
    return as_result(run, write_result(run, trained, record, "tokens", config.tokens_per_step, *save), row=row)


def row_config(original: PretrainedConfig, row: ModelRow) -> PretrainedConfig:
    """The configuration of `row`, made from the original model's; ValueError if sizes do not divide."""
    if not row.is_original:
        return decoupled_config(original, *row.structure)
    return type(original)(
        **config_fields(original) | {"num_hidden_layers": row.num_layers or original.num_hidden_layers}
    )


def cut(teacher: PreTrainedModel, row: ModelRow) -> tuple[PreTrainedModel, list[int]]:
    """The student of `row` with the teacher's weights, and for each of its layers the number of teacher layers to it.

    A model of n of L layers keeps every L/n-th layer, including the last.

    Raises:
        ValueError: for sizes that do not divide, or more layers than the teacher has.
    """
    num_layers = teacher.config.num_hidden_layers
    if row.num_layers is None:
        return decouple(teacher, *row.structure), list(range(1, num_layers + 1))
    if not 1 <= row.num_layers < num_layers:
        raise ValueError(
            f"num_layers={row.num_layers} is outside 1..{num_layers - 1}: keep fewer layers than there are."
        )
    depths = [-(-(i + 1) * num_layers // row.num_layers) for i in range(row.num_layers)]
    student = type(teacher)(row_config(teacher.config, row))
    student.load_state_dict(teacher.state_dict(), strict=False)
    for layer, depth in zip(layers_of(student.base_model), depths, strict=True):
        layer.load_state_dict(layers_of(teacher.base_model)[depth - 1].state_dict())
    return student.eval(), depths


TRAINED_HEADS = ("masked-lm", "classification", "base")  # others are left out
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
DROPOUTS += ("dropout", "attention_dropout", "seq_classif_dropout")  # DistilBERT's names


def load_teacher(folder: Path, data: TrainingData) -> PreTrainedModel:
    """The original encoder in `folder`, with the head it was saved with; it must use `data`'s vocabulary.

    Raises:
        ValueError: for a folder without a complete encoder, or a vocabulary that is not `data`'s.
    """
    opened = open_checkpoint(folder)
    if opened.decoupled:
        raise ValueError(f"{folder} is decoupled already: give the original checkpoint.")
    if architecture(opened.config) not in ("bert", "distilbert"):
        raise ValueError(f"{folder} is a {opened.config.model_type} checkpoint: only encoders of text are calibrated.")
    if head_of(opened.config) not in TRAINED_HEADS:
        opened = open_checkpoint(folder, head="base")
    teacher = load_model(opened, torch.float32)
    tokenizer = folder / "tokenizer.json"
    known = json.loads(tokenizer.read_text("utf-8"))["model"].get("vocab") if tokenizer.is_file() else None
    if isinstance(known, list):  # pieces and scores, as in SentencePiece
        known = {piece: number for number, (piece, _) in enumerate(known)}
    if data.vocab_size > teacher.config.vocab_size or (known and known != data.tokenizer.get_vocab(False)):
        raise ValueError(
            f"{folder} has another vocabulary than the {data.name} text is cut into: read the text with its tokenizer."
        )
    for name in DROPOUTS:  # text is hardly ever repeated
        if getattr(teacher.config, name, None) is not None:
            setattr(teacher.config, name, 0.0)
    return teacher.eval().requires_grad_(False)


def save(result: Result, teacher: str | Path, output: str | Path) -> None:
    """Writes the model into a folder of its own, with the teacher's tokenizer files and a record of how it was made."""
    facts = {name: value for name, value in vars(result).items() if name not in ("row", "checkpoint", "history")}
    facts["valid_loss"] = result.errors[-1]  # the last layer's, on held-out text
    with atomic_folder(output) as folder:
        shutil.copytree(result.checkpoint, folder, dirs_exist_ok=True)
        copy_tokenizer(teacher, folder)
        copy_files(teacher, folder, OTHER_FILES)
        result.history.to_csv(folder / "calibration.csv", index=False)
        (folder / "calibration.json").write_text(json.dumps(facts, indent=1))
