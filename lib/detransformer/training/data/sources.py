"""Which data to use: `auto` tries the mirror folder, then the Hub, then built-in data, and says which.

A source offers `name`, `tokenizer()`, `fingerprint()`, `task_rows(task, split)` and `articles(split)`; `TrainingData`
adds what every source needs: packed text, row counts and the words for reduced sets.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from detransformer.settings import data_environment
from detransformer.training.data.built_in import BuiltInSource
from detransformer.training.data.hub import HubSource, hub_problem
from detransformer.training.data.mirror import MirrorSource
from detransformer.training.data.packing import SpecialTokens, pack_text
from detransformer.training.data.tasks import Task, get_task

SOURCES = ("auto", "mirror", "hub", "built-in")


@dataclass(frozen=True)
class TaskRows:
    """A task's rows as used, and how they compare with the official set."""

    task: Task
    train: Dataset
    validation: Dataset
    source: str

    @property
    def note(self) -> str:
        """Source and row counts, e.g. `mirror; reduced training set, 2,000 of 67,349 rows; 872 validation rows`."""
        train, valid = len(self.train), len(self.validation)
        if self.source == BuiltInSource.name:
            return f"built-in generated set, {train:,} training rows; {valid:,} validation rows"
        task = self.task
        return rows_note(self.source, "validation", (train, task.full_train_rows), (valid, task.full_eval_rows))


def rows_note(source: str, kind: str, train: tuple[int, int], scored: tuple[int, int], held: str = "") -> str:
    """In words how many rows there are of how many of the official sets: training, and `kind`, by which is scored."""
    is_reduced = train[0] < train[1], scored[0] < scored[1]
    first = "reduced training set, {:,} of {:,} rows" if is_reduced[0] else "full training set, {:,} rows"
    second = f"reduced {kind} set, {{:,}} of {{:,}} rows" if is_reduced[1] else f"{{:,}} {kind} rows"
    return f"{source}; {first.format(*train)}{held}; {second.format(*scored)}"


class TrainingData:
    """A chosen source with its tokenizer, packed text and task rows; read once and kept.

    Two are equal that have the same name and fingerprint, wherever they were opened.

    Args:
        source: has text and rows, by `articles(split)`, `task_rows(task, split)`, `tokenizer()` and `fingerprint()`.
        cache_dir: where packed text is kept.
        note: which sources were tried and why this one was taken.
        tokenizer: by which the text is cut; None is the source's own.
        name: in tables; the source's own where it is empty.
    """

    def __init__(
        self, source: Any, cache_dir: str | Path, note: str, tokenizer: Tokenizer | None = None, name: str = ""
    ):
        self.source, self.cache_dir, self.note = source, Path(cache_dir), note
        self.name, self.fingerprint = name or source.name, source.fingerprint()
        if tokenizer is None:
            self.tokenizer = source.tokenizer()
        else:
            described = tokenizer.to_str()
            self.fingerprint = hashlib.sha256((self.fingerprint + described).encode()).hexdigest()[:12]
            self.tokenizer = Tokenizer.from_str(described)  # a copy: truncation is a tokenizer's state
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special = SpecialTokens.of(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingData) and (self.name, self.fingerprint) == (other.name, other.fingerprint)

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer as `AutoTokenizer` reads it."""
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **names).save_pretrained(folder)

    def packed(self, split: str, seq_len: int, max_tokens: int | None) -> np.ndarray:
        """The text of `split` as token sequences [N, seq_len], packed where it is not yet."""
        amount = "all" if max_tokens is None else str(max_tokens)
        path = self.cache_dir / f"{self.name}-{self.fingerprint}-{split}-{seq_len}-{amount}.bin"
        articles = self.source.articles(split)
        return pack_text(articles, self.tokenizer, seq_len, max_tokens, path, f"{self.name} {split} text")

    def packed_splits(self, recipe) -> tuple[np.ndarray, np.ndarray]:
        """The (training, validation) text of a `TextRecipe`."""
        limits = {"train": recipe.max_train_tokens, "validation": recipe.max_valid_tokens}
        return tuple(self.packed(split, recipe.seq_len, limit) for split, limit in limits.items())

    def text_note(self, sequences: np.ndarray) -> str:
        """Source and amount of packed text in words."""
        made = ", generated" if self.source.name == BuiltInSource.name else ""
        return f"{self.name} text, {sequences.size:,} different tokens{made}"

    def task(self, name: str, max_train_rows: int | None = None, max_eval_rows: int | None = None) -> TaskRows:
        """The rows of a task; a cut set is a seeded sample of the whole, the same for every model and seed."""
        task = get_task(name)
        parts = []
        for split, limit in (("train", max_train_rows), ("validation", max_eval_rows)):
            rows = _all_rows(self, task, split)
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(seed=0).select(range(limit))
            parts.append(rows)
        return TaskRows(task, *parts, source=self.name)


@cache
def _all_rows(data: TrainingData, task: Task, split: str) -> Dataset:
    return data.source.task_rows(task, split)


def choose_source(source: str, mirror: Path, cached: Path | None = None) -> tuple[str, str]:
    """Which source to take for `source`, and why: `auto` is the first of mirror, Hub and built-in data that is there.

    Args:
        mirror: the file or folder of the mirror that has these data.
        cached: a copy of the Hub's data, with which the Hub need not be asked.

    Raises:
        ValueError: for an unknown source, or `hub` where it does not answer.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is unknown: choose one of {', '.join(SOURCES)}.")
    if source in ("mirror", "built-in"):
        return source, f"{source} data, as asked"
    environment, skipped = data_environment(), []
    if source == "auto":
        if mirror.exists():
            return "mirror", f"the mirror folder ({environment.mirror_named_by})"
        skipped = [f"no {mirror}"]
    problem = None if cached is not None and cached.is_file() else hub_problem(environment.hub_offline)
    if problem is None:
        return "hub", "; ".join([*skipped, "the Hub"])
    if source == "hub":
        raise ValueError(
            f"source 'hub' is not available ({problem}): connect to the network, or choose mirror, built-in or auto."
        )
    return "built-in", "; ".join([*skipped, f"no Hub ({problem})", "built-in data"])


def open_data(
    source: str = "auto", cache_dir: str | Path = "data/cache", tokenizer: Tokenizer | None = None
) -> TrainingData:
    """Text and tasks of `source`: `mirror`, `hub`, `built-in`, or `auto` for the first of these that is there.

    The text is cut by `tokenizer`, or by the source's own.

    Raises:
        ValueError: for an unknown source, or an explicit one that is not available.
    """
    mirror = data_environment().mirror
    name, why = choose_source(source, mirror)
    made = {"mirror": lambda: MirrorSource(mirror), "hub": HubSource, "built-in": BuiltInSource}[name]()
    return TrainingData(made, cache_dir, why, tokenizer)
