"""Masked-language-model pre-training of original and decoupled BERT with identical hyper-parameters (DATE 2024, IV-A).

Every row starts from the same seeded original weights (a decoupled row from their slices) and sees the same sequences
with the same masks. No next-sentence prediction. A finished row is not trained again; an interrupted one goes on.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import BertForMaskedLM

from detransformer.files import atomic_folder
from detransformer.models import decouple
from detransformer.training.checkpoints import (
    Checkpointer,
    Progress,
    as_result,
    read_result,
    write_history,
    write_result,
)
from detransformer.training.config import ModelRow, PretrainConfig, config_hash
from detransformer.training.data import TrainingData
from detransformer.training.data.packing import MaskedBatches, PackedText
from detransformer.training.hardware import choose_attention, keep_freed_memory, make_accelerator, resolve_precision
from detransformer.training.jobs import StepCounter, run_jobs
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.optim import MasterWeights, learning_rate, make_optimizer, set_learning_rate
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
    if row.is_original:
        return model
    return decouple(model, row.num_original_layers, row.num_divisions, row.attention_width, row.original_placement)


def pretrain(
    row: ModelRow,
    config: PretrainConfig,
    data: TrainingData,
    output_dir: str | Path,
    on_step: Callable[[int, float], None] | None = None,
) -> PretrainResult:
    """Pre-trains one row into `output_dir/ROW/` (model/, history.csv, result.json) and returns what came of it.

    Runs on whatever accelerate finds; under `accelerate launch` the global batch is shared by the processes.
    `on_step(step, loss)` is called after each step.

    Raises:
        ValueError: for sizes that do not divide, damaged data or a damaged checkpoint.
    """
    config.check_row(row)
    folder = Path(output_dir) / row.key
    precision = resolve_precision(config.mixed_precision)
    identity = config_hash(row, dataclasses.replace(config, mixed_precision=precision), data.name, data.fingerprint)
    done = read_result(folder / "result.json", identity)
    if done is not None:
        return as_result(PretrainResult, folder, done, row=row)
    keep_freed_memory()
    accelerator = make_accelerator(precision)
    with accelerator.main_process_first():  # one process packs the text, the others map it
        train, valid = pack(data, config)
    batches = MaskedBatches(train.sequences, data.vocab_size, data.special, config.num_masked, config.seed)
    model = build_model(row, config, data.vocab_size, data.special.pad)
    if config.frequency_bias:
        start_at_frequencies(model, batches)
    objective, optimizer = prepare(MaskedLmLoss(model), model, config, precision, accelerator)
    progress = Progress()
    checkpointer = Checkpointer(folder / "checkpoint", accelerator, progress, config.checkpoint_every_s, identity)
    set_seed(config.seed + 1 + accelerator.process_index)  # dropout: the same in every row
    checkpointer.resume()
    train_steps(objective, optimizer, batches, config, accelerator, checkpointer, row.label, on_step)
    finish(optimizer)
    valid_batches = MaskedBatches(valid.sequences, data.vocab_size, data.special, config.num_masked, config.seed)
    valid_loss = evaluate(objective, valid_batches, config.micro_batch_size, accelerator)
    result = {
        "identity": identity,
        "valid_loss": valid_loss,
        "unigram_loss": unigram_loss(batches, valid_batches, config.micro_batch_size),
        "valid_tokens": valid.num_tokens,
        "num_steps": config.num_steps,
        "tokens": config.num_steps * config.tokens_per_step,
        "unique_tokens": train.num_tokens,
        "seconds": round(progress.seconds, 3),
        "hidden_size": config.original_config(row.model, data.vocab_size).hidden_size,
        "seed": config.seed,
        "precision": precision,
        "source": data.name,
        "note": f"{config.scale_note(row)}; {text_note(data, train.num_tokens)}",
        "row": dataclasses.asdict(row),
        "config": dataclasses.asdict(config),
    }
    if accelerator.is_main_process:
        save_trained(folder, accelerator.unwrap_model(objective).model, data, progress, config, result)
    accelerator.wait_for_everyone()
    checkpointer.remove()
    return as_result(PretrainResult, folder, result, row=row)


def pack(data: TrainingData, config) -> tuple[PackedText, PackedText]:
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
    if num_jobs == 1:
        return [pretrain(row, config, data, output_dir) for row in rows]
    pack(data, config)  # once, before the workers want it
    jobs = [(row, config, data, output_dir) for row in sorted(rows, key=_slowest_first)]
    run_jobs(_pretrain_job, jobs, num_jobs, "pre-training", len(rows) * config.num_steps, "step")
    return [pretrain(row, config, data, output_dir) for row in rows]  # read back


def _pretrain_job(row: ModelRow, config: PretrainConfig, data: TrainingData, output_dir: Path) -> None:
    with StepCounter(config.num_steps) as report:
        pretrain(row, config, data, output_dir, report)


def _slowest_first(row: ModelRow) -> tuple[int, int]:
    """By sub-blocks, then by decoupled layers: the last run to end should be a short one."""
    return -(row.num_divisions or 1), row.num_original_layers or 0


def prepare(objective, model, config, precision: str, accelerator: Accelerator):
    """`objective` around `model` and its optimizer, in `precision` and on accelerate's device."""
    choose_attention(model, precision)
    if precision == "bf16-weights":
        float32 = [p.detach().clone() for p in model.parameters()]
        model.to(torch.bfloat16)
    optimizer = make_optimizer(model, config.optimizer, config.learning_rate, config.weight_decay)
    if isinstance(optimizer, MasterWeights):
        optimizer.set_copies(dict(zip(model.parameters(), float32, strict=True)))
    return accelerator.prepare(objective, optimizer)


def finish(optimizer) -> None:
    """Leaves the trained model in float32, whatever it was trained in."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, MasterWeights):
        inner.restore_float32()


def train_steps(objective, optimizer, batches, config, accelerator, checkpointer, title, on_step) -> None:
    """Trains from the checkpointer's step to `config.num_steps`; `objective(**batch)` is a micro-batch's mean loss.

    Raises:
        ValueError: if the micro-batches do not divide over the processes, or the loss is not finite.
    """
    progress = checkpointer.progress
    mine = range(accelerator.process_index, config.num_micro_batches, accelerator.num_processes)
    if config.num_micro_batches % accelerator.num_processes:
        raise ValueError(
            f"{config.num_micro_batches} micro-batches do not divide over {accelerator.num_processes} processes: "
            "choose global_batch_size and micro_batch_size so that they do."
        )
    objective.train()
    bar = tqdm(total=config.num_steps, initial=progress.step, desc=title, unit="step", mininterval=1.0)
    with bar:
        while progress.step < config.num_steps:
            start_s = time.perf_counter()
            rate = learning_rate(
                progress.step, config.num_steps, config.learning_rate, config.warmup, config.decay_power
            )
            set_learning_rate(optimizer, rate)
            total = torch.zeros((), device=accelerator.device)
            for number, micro in enumerate(mine, start=1):
                batch = batches.train_batch(progress.step * config.num_micro_batches + micro, config.micro_batch_size)
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                last = number == len(mine)
                with accelerator.autocast(), _sync(accelerator, objective, last):
                    loss = objective(**batch) / len(mine)
                    accelerator.backward(loss)
                total += loss.detach()
            accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            mean = accelerator.reduce(total, "mean").item()
            if not math.isfinite(mean):
                raise ValueError(
                    f"{title}: the loss is {mean} at step {progress.step + 1}; "
                    f"lower learning_rate={config.learning_rate}."
                )
            progress.losses.append(mean)
            progress.step += 1
            progress.seconds += time.perf_counter() - start_s
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            checkpointer.save_if_due()
            if on_step is not None:
                on_step(progress.step, mean)


def _sync(accelerator: Accelerator, model, last: bool):
    """Gradients are exchanged once a step, with the last micro-batch."""
    return nullcontext() if last else accelerator.no_sync(model)


@torch.no_grad()
def evaluate(objective, batches: MaskedBatches, batch_size: int, accelerator: Accelerator) -> float:
    """Mean loss of a labelled token over all validation sequences; every process computes it whole."""
    objective.eval()
    total = count = 0.0
    for batch in batches.valid_batches(batch_size):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        num = int((batch["labels"] >= 0).sum())
        with accelerator.autocast():
            total += float(accelerator.unwrap_model(objective)(**batch)) * num
        count += num
    objective.train()
    return total / count


def text_note(data: TrainingData, num_tokens: int) -> str:
    return f"{data.name} text, {num_tokens:,} different tokens" + ("" if data.source.is_real else ", generated")


def save_trained(
    folder: Path, model, data: TrainingData, progress: Progress, config: PretrainConfig, result: dict
) -> None:
    """Model, then history, then the result that says all is there."""
    (folder / "result.json").unlink(missing_ok=True)
    with atomic_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
        data.save_tokenizer(temporary)
    write_history(folder, progress, "tokens", config.tokens_per_step)
    write_result(folder / "result.json", result)
