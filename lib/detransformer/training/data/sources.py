"""Which data to use: `auto` tries the mirror folder, then the Hub, then built-in data, and says which.

A source offers `name`, `tokenizer()`, `fingerprint()`, `task_rows(task, split)` and `articles(split)`; `TrainingData`
adds what every source needs: packed text, row counts and the words for reduced sets.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class Source(Protocol):
    name: str
    is_real: bool

    def tokenizer(self) -> Tokenizer: ...
    def fingerprint(self) -> str: ...
    def task_rows(self, task: Task, split: str) -> Dataset: ...
    def articles(self, split: str): ...


class Tokenized:
    """Another source's text and tasks, cut by `tokenizer`."""

    def __init__(self, source: Source, tokenizer: Tokenizer, name: str | None = None):
        self.name, self.is_real = name or source.name, source.is_real
        self.articles, self.task_rows = source.articles, source.task_rows
        self._source, self._tokenizer = source, tokenizer

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self._tokenizer.to_str())  # a copy: truncation is a tokenizer's state

    def fingerprint(self) -> str:
        text = self._source.fingerprint() + self._tokenizer.to_str()
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
        parts = [
            f"reduced training set, {train:,} of {self.task.full_train_rows:,} rows"
            if train < self.task.full_train_rows
            else f"full training set, {train:,} rows",
            f"reduced validation set, {valid:,} of {self.task.full_eval_rows:,} rows"
            if valid < self.task.full_eval_rows
            else f"{valid:,} validation rows",
        ]
        return f"{self.source}; " + "; ".join(parts)


class TrainingData:
    """A chosen source with its tokenizer, packed text and task rows; read once and kept.

    Two are equal that have the same name and fingerprint, wherever they were opened.

    Args:
        source: one of the three sources.
        cache_dir: where packed text is kept.
        note: which sources were tried and why this one was taken.
    """

    def __init__(self, source: Source, cache_dir: str | Path, note: str):
        self.source, self.cache_dir, self.note = source, Path(cache_dir), note
        self.name, self.fingerprint = source.name, source.fingerprint()
        self.tokenizer = source.tokenizer()
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special = SpecialTokens.of(self.tokenizer)
        self._rows: dict[tuple[str, str], Dataset] = {}

    def __reduce__(self):
        """Another process opens the source for itself; what was read or tokenised here does not travel."""
        return TrainingData, (self.source, self.cache_dir, self.note)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingData) and (self.name, self.fingerprint) == (other.name, other.fingerprint)

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def __repr__(self) -> str:
        return f"TrainingData(source={self.name!r}: {self.note})"

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
        made = "" if self.source.is_real else ", generated"
        return f"{self.name} text, {sequences.size:,} different tokens{made}"

    def task(self, name: str, max_train_rows: int | None = None, max_eval_rows: int | None = None) -> TaskRows:
        """The rows of a task; a cut set is a seeded sample of the whole, the same for every model and seed."""
        task = get_task(name)
        parts = []
        for split, limit in (("train", max_train_rows), ("validation", max_eval_rows)):
            if (name, split) not in self._rows:
                self._rows[name, split] = self.source.task_rows(task, split)
            rows = self._rows[name, split]
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(seed=0).select(range(limit))
            parts.append(rows)
        return TaskRows(task, *parts, source=self.name)


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


def open_data(source: str = "auto", cache_dir: str | Path = "data/cache") -> TrainingData:
    """Text and tasks of `source`: `mirror`, `hub`, `built-in`, or `auto` for the first of these that is there.

    Raises:
        ValueError: for an unknown source, or an explicit one that is not available.
    """
    mirror = data_environment().mirror
    name, why = choose_source(source, mirror)
    made = {"mirror": lambda: MirrorSource(mirror), "hub": HubSource, "built-in": BuiltInSource}[name]()
    return TrainingData(made, cache_dir, why)
