"""Tokens a second of this pre-training beside Hugging Face's Trainer: same model, same text, same machine, one run.

The implementations take turns, each in a process of its own, because settings of the memory allocator last as long as
a process and would help the others too. Only whole steps count, data loading included, after a warm-up. The other half
of the claim is the loss: on the very same batches all implementations must learn alike, step by step.
B sequences of T tokens a step, K masked positions a sequence, V vocabulary.
"""

import dataclasses
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import accelerate
import numpy as np
import pandas as pd
import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from detransformer.machine import cpu_model, now, usable_cores
from detransformer.models.decoupled_bert import BatchedLinear, DecoupledSelfAttention
from detransformer.parse import number, one_of, whole_number
from detransformer.record.provenance import own_commit
from detransformer.record.run import RunFolder
from detransformer.training.checkpoints import Checkpointer, Progress
from detransformer.training.config import PRECISIONS, ModelRow, PretrainConfig
from detransformer.training.data import TrainingData, open_data
from detransformer.training.data.packing import IGNORED, MaskedBatches
from detransformer.training.data.sources import SOURCES
from detransformer.training.hardware import keep_freed_memory, make_accelerator, resolve_precision
from detransformer.training.objective import MaskedLmLoss
from detransformer.training.optim import learning_rate
from detransformer.training.pretraining import build_model, prepare, train_steps

TRAINER, LINES, FLOAT32, FASTEST = "Trainer, default", "Trainer, line by line", "ours, float32", "ours, fastest"
IMPLEMENTATIONS = (TRAINER, LINES, FLOAT32, FASTEST)
OURS = (FLOAT32, FASTEST)
WAIT_S = 0.5  # how often the parent looks, so that Ctrl-C is heard

# Dense peak TFLOP/s (bfloat16 or, on older ones, float16 tensor cores; float32 without TF32), from NVIDIA's data
# sheets: H200, H100 and A100 (SXM), L40S, L4, A10, V100, T4, and the GeForce 4090's and 3090's architecture papers.
PEAK_TFLOPS = {
    **{"H200": (989.5, 66.9), "H100": (989.5, 66.9), "A100": (312.0, 19.5), "L40S": (362.0, 91.6)},
    **{"L4": (121.0, 30.3), "A10": (125.0, 31.2), "V100": (125.0, 15.7), "T4": (65.0, 8.1)},
    **{"RTX 4090": (165.2, 82.6), "RTX 3090": (71.0, 35.6)},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker process trains: a row with an implementation, on data that it opens for itself."""

    implementation: str
    row: ModelRow
    config: PretrainConfig
    data: TrainingData
    folder: str  # for what an implementation has to write somewhere; the parent removes it

    @property
    def precision(self) -> str:
        return resolve_precision(self.config.mixed_precision) if self.implementation == FASTEST else "no"


def bench_training(
    rows: Sequence[ModelRow],
    config: PretrainConfig,
    data: TrainingData,
    repeats: int,
    steps: int,
    warmup_steps: int,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    num_threads: int | None = None,
    peak_tflops: float | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Throughput and losses of `implementations` on each row: a row of the first frame each, a step of the second.

    Args:
        config: `global_batch_size` sequences at once; its `mixed_precision` is that of "ours, fastest".
        repeats: turns of each implementation; medians are reported, a speed-up is the median of turns side by side.
        steps, warmup_steps: measured ones of a turn, and those before them.
        num_threads: of each process; None is PyTorch's choice.
        peak_tflops: of the device, for its utilisation; None looks a GPU up by its name.

    Raises:
        ValueError: for settings that Trainer has no equal of, and counts below 1.
    """
    _check(rows, config, implementations, repeats=repeats, steps=steps, warmup_steps=warmup_steps)
    data.packed("train", config.seq_len, config.max_train_tokens)  # once, before the workers want it
    resolved = resolve_precision(config.mixed_precision)
    if resolved == "no":  # the fastest is float32: one row says it all
        implementations = [name for name in implementations if name != FASTEST or FLOAT32 not in implementations]
    learners = [name for name in implementations if name != LINES]
    threads = num_threads or torch.get_num_threads()
    rates: dict[tuple, list[dict]] = {}
    losses: list[dict] = []
    total = len(rows) * (repeats * len(implementations) + len(learners))
    with (
        tqdm(total=total, desc="bench-training", unit="turn") as bar,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        _workers(implementations, threads) as workers,
    ):
        for row in rows:
            jobs = {name: Job(name, row, config, data, folder) for name in implementations}
            for _ in range(repeats):
                for name, job in jobs.items():
                    bar.set_postfix_str(f"{row.label}, {name}")
                    turn = _result(workers[name].submit(_timed_turn, job, steps, warmup_steps))
                    rates.setdefault((row, name), []).append(turn)
                    bar.update()
            for name in learners:
                bar.set_postfix_str(f"{row.label}, {name}, loss")
                curve = _result(workers[name].submit(_loss_turn, jobs[name], steps))
                common = {"implementation": name, "row": row.label}
                losses += [common | {"step": step, "loss": loss} for step, loss in enumerate(curve, start=1)]
                bar.update()
    conditions = {
        **{"hidden_size": config.original_config(rows[0].model, data.vocab_size).hidden_size},
        **{"seq_len": config.seq_len, "batch": config.global_batch_size, "num_threads": threads},
    }
    made = _made_of(data, config)
    records = []
    for (row, name), turns in rates.items():
        seen = [turn["tokens"] / turn["seconds"] for turn in turns]
        base = [turn["tokens"] / turn["seconds"] for turn in rates.get((row, TRAINER), [])]
        median = statistics.median(seen)
        flops = statistics.median(turn["flops"] / turn["seconds"] for turn in turns)
        precision = turns[0]["precision"]
        peak = peak_tflops or _peak_tflops(precision)
        records.append(
            {"implementation": name, "row": row.label, "precision": "float32" if precision == "no" else precision}
            | conditions
            | {
                "tokens_per_s": median,
                "spread": (max(seen) - min(seen)) / median,
                "speedup": statistics.median(s / b for s, b in zip(seen, base, strict=True)) if base else math.nan,
                "model_gflops_per_s": flops / 1e9,
                "mfu": flops / (peak * 1e12) if peak else math.nan,
                "cpu_share": statistics.median(turn["cpu_seconds"] / turn["seconds"] for turn in turns) / threads,
                "steps": steps,
                "repeats": repeats,
            }
            | made
        )
    return pd.DataFrame(records), pd.DataFrame(losses, columns=["implementation", "row", "step", "loss"])


def loss_differences(losses: pd.DataFrame) -> pd.DataFrame:
    """Largest relative difference of a step's loss from "Trainer, default": a row for each other implementation."""
    wide = losses.pivot(index=["row", "step"], columns="implementation", values="loss")
    if TRAINER not in wide:
        return pd.DataFrame(columns=["row", "implementation", "largest_relative_difference"])
    gaps = wide.drop(columns=TRAINER).sub(wide[TRAINER], axis=0).abs().div(wide[TRAINER], axis=0)
    gaps = gaps.groupby("row", sort=False).max().stack()
    return gaps.rename("largest_relative_difference").reset_index()


def model_flops(model: BertForMaskedLM, num_tokens: int, num_predicted: int, seq_len: int) -> float:
    """FLOPs of a training step that the model's mathematics asks for: forward pass, and twice that backward.

    Two for each weight of a matrix product and token, and 4 T for each attention feature and token; the vocabulary
    projection for `num_predicted` positions only. (Kaplan et al. 2020, Section 2.1; Chowdhery et al. 2022, Appendix B.)
    """
    encoder = sum(m.weight.numel() for m in model.bert.modules() if isinstance(m, (nn.Linear, BatchedLinear)))
    head = sum(m.weight.numel() for m in model.cls.modules() if isinstance(m, nn.Linear))
    width = sum(  # of all layers and sub-blocks
        m.query.bias.numel()
        for m in model.modules()
        if isinstance(m, (transformers.models.bert.modeling_bert.BertSelfAttention, DecoupledSelfAttention))
    )
    return 6 * encoder * num_tokens + 12 * seq_len * width * num_tokens + 6 * head * num_predicted


def _check(rows, config: PretrainConfig, implementations, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is below 1: give a positive number.")
    if not rows:
        raise ValueError("no rows to measure: give at least one, such as original.")
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation {name!r} is unknown: choose among {'; '.join(IMPLEMENTATIONS)}.")
    if config.optimizer != "adamw":
        raise ValueError(f"optimizer={config.optimizer!r} is not one of Trainer's: compare with adamw.")
    if config.num_micro_batches != 1:
        raise ValueError(
            f"micro_batch_size={config.micro_batch_size} is not global_batch_size={config.global_batch_size}: "
            "the bench takes a batch at once, choose them equal."
        )
    if torch.cuda.device_count() > 1:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs are visible and Trainer would take all: set CUDA_VISIBLE_DEVICES=0."
        )
    for row in rows:
        config.check_row(row)


def _made_of(data: TrainingData, config: PretrainConfig) -> dict:
    """What a result row carries of its making."""
    made_by = own_commit()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = (torch, transformers, accelerate)
    return {
        "hardware": gpu or f"{cpu_model()}, {usable_cores()} cores",
        "versions": ", ".join(f"{package.__name__} {package.__version__}" for package in packages),
        "source": data.name,
        "seed": config.seed,
        "commit": made_by["commit"] + ("+" if made_by["dirty"] else ""),
        "date": now(),
    }


def _peak_tflops(precision: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return None if found is None else found[precision == "no"]


# --- Processes that take turns -----------------------------------------------------------------------------------


@contextmanager
def _workers(implementations: Sequence[str], num_threads: int) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """One process each; an exception, Ctrl-C too, ends them at once."""
    context = multiprocessing.get_context("spawn")
    quiet, os.environ["TQDM_DISABLE"] = os.environ.get("TQDM_DISABLE"), "1"  # tqdm reads it when it is imported
    pools = {name: ProcessPoolExecutor(1, context, _start, (num_threads,)) for name in implementations}
    try:
        yield pools
    except BaseException:
        for pool in pools.values():
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
        raise
    finally:
        os.environ.pop("TQDM_DISABLE") if quiet is None else os.environ.update(TQDM_DISABLE=quiet)
        for pool in pools.values():
            pool.shutdown()


def _start(num_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    torch.set_num_threads(num_threads)
    transformers.utils.logging.set_verbosity_error()
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _result(future):
    while True:
        try:
            return future.result(timeout=WAIT_S)
        except TimeoutError:
            if future.done():
                return future.result()


# --- In a worker -------------------------------------------------------------------------------------------------


def _sequences(job: Job) -> np.ndarray:
    return job.data.packed("train", job.config.seq_len, job.config.max_train_tokens).sequences


def _batches(job: Job) -> MaskedBatches:
    data, config = job.data, job.config
    return MaskedBatches(_sequences(job), data.vocab_size, data.special, config.num_masked, config.seed)


def _timed_turn(job: Job, steps: int, warmup_steps: int) -> dict:
    """Tokens, seconds and model FLOPs of `steps` training steps after `warmup_steps` others."""
    last = warmup_steps + steps
    config = dataclasses.replace(job.config, num_steps=last)
    job = dataclasses.replace(job, config=config)
    times: dict[int, float] = {}
    cpu: dict[int, float] = {}

    def clock(step: int) -> None:
        if step in (warmup_steps, last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[step], cpu[step] = time.perf_counter(), time.process_time()

    computed = steps * config.tokens_per_step
    if job.implementation in OURS:
        model = _train_ours(job, lambda step, loss: clock(step))
        tokens, predicted = computed, steps * config.global_batch_size * config.num_masked
    else:
        model, counts = _train_trainer(job, clock)
        tokens, predicted = sum(counts[warmup_steps:last]), computed
    return {
        "tokens": tokens,
        "seconds": times[last] - times[warmup_steps],
        "cpu_seconds": cpu[last] - cpu[warmup_steps],
        "flops": model_flops(model, tokens, min(predicted, tokens), config.seq_len),
        "precision": job.precision,
    }


def _loss_turn(job: Job, steps: int) -> list[float]:
    """The loss of each step on the batches of `MaskedBatches`, without dropout."""
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, num_steps=steps, dropout=0.0))
    if job.implementation not in OURS:
        return _same_batches_trainer(job)
    losses: list[float] = []
    _train_ours(job, lambda step, loss: losses.append(loss))
    return losses


def _train_ours(job: Job, on_step) -> BertForMaskedLM:
    """As `pretrain` does, without checkpoints."""
    keep_freed_memory()
    config, data, batches = job.config, job.data, _batches(job)
    accelerator = make_accelerator(job.precision)
    model = build_model(job.row, config, data.vocab_size, data.special.pad)
    objective, optimizer = prepare(MaskedLmLoss(model), model, config, job.precision, accelerator)
    checkpointer = Checkpointer(Path("unused"), accelerator, Progress(), math.inf, "never saved")
    train_steps(objective, optimizer, batches, config, accelerator, checkpointer, job.row.label, on_step)
    accelerator.free_memory()
    return model


class _Clock(TrainerCallback):
    """Calls `clock(step)` after each step."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        self.clock(state.global_step)


class _Counting:
    """A collator that notes how many tokens of each batch are text, not padding."""

    def __init__(self, collator):
        self.collator, self.counts = collator, []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        self.counts.append(int(batch["attention_mask"].sum()))
        return batch


def _train_trainer(job: Job, clock) -> tuple[BertForMaskedLM, list[int]]:
    """Trainer with its collator and its defaults: (model, tokens of each batch)."""
    data = job.data
    data.save_tokenizer(Path(job.folder))
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    count = job.config.num_steps * job.config.global_batch_size
    if job.implementation == LINES:
        cut = {"truncation": True, "max_length": job.config.seq_len, "return_special_tokens_mask": True}
        dataset = Dataset.from_dict(dict(tokenizer(_lines(data, count), **cut)))
    else:
        dataset = _packed_rows(_sequences(job)[:count].astype(np.int64), tokenizer)
    collator = _Counting(DataCollatorForLanguageModeling(tokenizer, mlm_probability=job.config.mask_fraction))
    model = build_model(job.row, job.config, data.vocab_size, data.special.pad)
    # The special-token mask reaches the collator, which else computes it again for every batch.
    arguments = _arguments(job.folder, job.config, remove_unused_columns=False)
    trainer = Trainer(model, arguments, collator, dataset, callbacks=[_Clock(clock)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, collator.counts


def _packed_rows(sequences: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The columns that Hugging Face's run_mlm.py makes of packed text."""
    special = np.isin(sequences, tokenizer.all_special_ids)
    return Dataset.from_dict(
        {
            "input_ids": sequences,
            "token_type_ids": np.zeros_like(sequences),
            "attention_mask": np.ones_like(sequences),
            "special_tokens_mask": special.astype(np.int64),
        }
    )


def _lines(data: TrainingData, count: int) -> list[str]:
    """The first `count` paragraphs of the training text that are not empty."""
    lines = (line for article in data.source.articles("train") for line in article.split("\n") if line.strip())
    return list(islice(lines, count))


def _arguments(folder: str, config: PretrainConfig, **others) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.num_steps,
        per_device_train_batch_size=config.global_batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **others,
    )


class _FullLabels(IterableDataset):
    """Our batches as the Trainer takes them: labels [B, T], -100 where no token was picked."""

    def __init__(self, batches: MaskedBatches, config: PretrainConfig):
        self.batches, self.config = batches, config

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.config.num_steps):
            batch = self.batches.train_batch(step, self.config.global_batch_size)
            labels = torch.full_like(batch["input_ids"], IGNORED)
            yield {
                "input_ids": batch["input_ids"],
                "labels": labels.scatter(1, batch["positions"], batch["labels"]),
            }


class _SameSchedule(Trainer):
    """Trainer with the learning rate of `train_steps`; keeps the loss of each step unrounded."""

    def __init__(self, *args, config: PretrainConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.config, self.losses = config, []

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        config = self.config
        share = lambda step: learning_rate(step, config.num_steps, 1.0, config.warmup, config.decay_power)  # noqa: E731
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def _same_batches_trainer(job: Job) -> list[float]:
    """Trainer's losses on our batches, from our first weights, with our AdamW settings and schedule."""
    config, data, batches = job.config, job.data, _batches(job)
    model = build_model(job.row, config, data.vocab_size, data.special.pad)
    arguments = _arguments(
        job.folder,
        dataclasses.replace(config, global_batch_size=1, micro_batch_size=1),  # an item is a whole batch
        weight_decay=config.weight_decay,
        adam_epsilon=1e-6,  # as in `make_optimizer`
        max_grad_norm=config.max_grad_norm,
    )
    trainer = _SameSchedule(model, arguments, lambda items: items[0], _FullLabels(batches, config), config=config)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.losses


# --- The command -------------------------------------------------------------------------------------------------


def parse_rows(text: str, model: str = "bert-base") -> list[ModelRow]:
    """`"original 4,4"` -> the original row and Nb=4, Ndiv=4.

    Raises:
        ValueError: for words that are neither.
    """
    rows = []
    for word in text.split():
        numbers = word.split(",")
        if word == "original":
            rows.append(ModelRow(model))
        elif len(numbers) == 2 and all(text.isdecimal() for text in numbers):
            rows.append(ModelRow(model, *map(int, numbers)))
        else:
            raise ValueError(f'--rows has {word}, which is no row; give original or Nb,Ndiv, such as "original 4,4".')
    if not rows:
        raise ValueError('--rows is empty; give original or Nb,Ndiv, such as "original 4,4".')
    return list(dict.fromkeys(rows))


def bench_training_command(
    rows: str,
    hidden_size: str,
    seq_len: str,
    batch: str,
    steps: str,
    repeats: str,
    precision: str,
    num_threads: str | None,
    source: str,
    peak_tflops: str | None,
    output: str,
) -> None:
    """Measures, prints a short table and saves `training_throughput` and `training_throughput_loss` in `output`."""
    chosen = parse_rows(rows)
    width = whole_number(hidden_size, "--hidden-size", 1)
    num_steps, num_sequences = whole_number(steps, "--steps", 1), whole_number(batch, "--batch", 1)
    num_repeats = whole_number(repeats, "--repeats", 1)
    threads = None if num_threads is None else whole_number(num_threads, "--num-threads", 1, 1024)
    peak = None if peak_tflops is None else number(peak_tflops, "--peak-tflops", 1e-3)
    head_size = 64 if width >= 512 else 32  # BERT's, and that of the profiles' reduced widths
    if width % head_size:
        raise ValueError(f"--hidden-size {width} is no multiple of {head_size}, a head's size; give one.")
    warmup_steps = max(2, num_steps // 5)
    tokens = whole_number(seq_len, "--seq-len", 8, 512)
    config = PretrainConfig(
        **dict(hidden_size=width, num_heads=width // head_size, intermediate_size=4 * width),
        **dict(num_steps=num_steps, seq_len=tokens, global_batch_size=num_sequences, micro_batch_size=num_sequences),
        **dict(optimizer="adamw", learning_rate=1e-3, warmup=0.1, decay_power=1.0, dropout=0.0),
        max_train_tokens=(num_steps + warmup_steps) * num_sequences * tokens,
        mixed_precision=one_of(precision, "--precision", PRECISIONS),
    )
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"--output {output} is a file; give the folder of a run, such as results/bench-training.")
    data = open_data(one_of(source, "--source", SOURCES), Path(output) / "cache")
    throughput, losses = bench_training(
        chosen, config, data, num_repeats, num_steps, warmup_steps, num_threads=threads, peak_tflops=peak
    )
    gaps = loss_differences(losses)
    note = _note(throughput, gaps, warmup_steps)
    run = RunFolder(output)
    run.save_table(throughput, "training_throughput", note)
    run.save_table(losses, "training_throughput_loss", note)
    shown = ["row", "implementation", "precision", "tokens_per_s", "spread", "speedup"]
    shown += ["mfu"] if throughput["mfu"].notna().any() else []
    print(throughput[shown].to_markdown(index=False, floatfmt=".4g"))
    print(note)


def _note(throughput: pd.DataFrame, gaps: pd.DataFrame, warmup_steps: int) -> str:
    first = throughput.iloc[0]
    words = (
        f"{first['hardware']}, threads: {first['num_threads']}; {first['versions']}; text: {first['source']}. "
        f"{first['repeats']} turns of {first['steps']} steps after {warmup_steps} others, batch {first['batch']} x "
        f"{first['seq_len']} tokens, hidden {first['hidden_size']}, no dropout. Medians; spread is (max - min) / "
        "median, a speed-up the median of turns side by side, cpu_share what the threads got of the processors (a CPU "
        "run below 0.9 was disturbed by other work). Line by line, padding does not count as tokens."
    )
    for gap in gaps.itertuples():
        words += (
            f" {gap.row}, {gap.implementation}: on the same batches no step's loss differs from Trainer's by more than "
            f"{gap.largest_relative_difference:.1e} of it."
        )
    return words
