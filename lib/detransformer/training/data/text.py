"""Text cut by a checkpoint's own tokenizer: lines of plain text files, or another source's articles."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from detransformer.opening import has_tokenizer
from detransformer.training.data.sources import Tokenized, TrainingData, open_data
from detransformer.training.data.tasks import Task

VALID_EVERY = 20  # one line of so many is held out; of fewer, the last one


class TextFiles:
    """Plain text files as a data source (see `sources.py` for what a source offers): each line is an article."""

    name = "text"
    is_real = True

    def __init__(self, files: Sequence[Path], tokenizer: Tokenizer):
        self.files, self._tokenizer = list(files), tokenizer

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._tokenizer.to_str().encode())
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:12]

    def task_rows(self, task: Task, split: str) -> Dataset:
        raise ValueError(f"text files have no rows of {task.name}: choose a data source.")

    def articles(self, split: str) -> Iterator[str]:
        """Lines that are not empty: every 20th is of `validation` (of fewer the last one), the others of `train`."""
        held_out = split == "validation"
        number, last = 0, None
        for line in (line for path in self.files for line in open_text(path) if line):
            if last is not None and (number % VALID_EVERY == 0) == held_out:
                yield last
            number, last = number + 1, line
        if last is not None and (number % VALID_EVERY == 0 or number < VALID_EVERY) == held_out:
            yield last


def open_text(path: Path) -> Iterator[str]:
    """A file's lines, stripped; ValueError where it is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first.") from error


def text_data(paths: Sequence[str | Path], tokenizer: Tokenizer, cache_dir: str | Path) -> TrainingData:
    """The text of files, and of all .txt files of folders.

    Raises:
        ValueError: where one is not there, or a folder has no text.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise ValueError(f"{path} has no text: give a text file, or a folder of .txt files.")
        files += found
    return TrainingData(TextFiles(files, tokenizer), cache_dir, f"{len(files)} text files")


def retokenized(data: TrainingData, tokenizer: Tokenizer, cache_dir: str | Path) -> TrainingData:
    """`data`, cut by `tokenizer`."""
    return TrainingData(Tokenized(data.source, tokenizer), cache_dir, data.note)


def text_for(
    checkpoint: str | Path, paths: Sequence[str | Path] | None, source: str, cache_dir: str | Path
) -> TrainingData:
    """The text of files, or of a data source where there are none, cut by the checkpoint's own tokenizer.

    Raises:
        ValueError: for a checkpoint without a tokenizer, or one that cannot be read, and as `text_data`.
    """
    if not has_tokenizer(checkpoint):
        raise ValueError(f"{checkpoint} has no tokenizer: copy its tokenizer.json or vocab.txt there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the tokenizer of {checkpoint} cannot be read ({error}): copy its files again.") from error
    return (
        text_data(paths, tokenizer, cache_dir)
        if paths
        else retokenized(open_data(source, cache_dir), tokenizer, cache_dir)
    )
