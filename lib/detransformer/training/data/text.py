"""Text cut by a checkpoint's own tokenizer: lines of plain text files, or another source's articles."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from detransformer.opening import has_tokenizer
from detransformer.training.data.sources import Tokenized, TrainingData, open_data
from detransformer.training.data.tasks import Task

VALID_EVERY = 20  # one article of so many is held out; of fewer, the last one
LONGEST = 8192  # characters of an article: a corpus may be a single line


class TextFiles:
    """Plain text files as a data source (see `sources.py` for what a source offers).

    Each line is an article; a longer one than `LONGEST` is cut, at spaces, into several.
    """

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
        """Articles in order: every 20th is of `validation` (of fewer the last one), the others of `train`.

        Raises:
            ValueError: where there is but one, so that none could be held out, or none.
        """
        held_out = split == "validation"
        number, last = 0, None
        for article in (article for path in self.files for article in read_articles(path)):
            if last is not None and (number % VALID_EVERY == 0) == held_out:
                yield last
            number, last = number + 1, article
        if number < 2:
            named = ", ".join(map(str, self.files[:3]))
            raise ValueError(
                f"{named}: {number or 'no'} line of text, and one of {VALID_EVERY} is held out: give text with an "
                f"article a line, or more than {LONGEST:,} characters."
            )
        if last is not None and (number % VALID_EVERY == 0 or number < VALID_EVERY) == held_out:
            yield last


def read_articles(path: Path) -> Iterator[str]:
    """A file's lines that are not empty, stripped, longer ones in pieces of some `LONGEST` characters, cut at a space.

    Raises:
        ValueError: where it is not UTF-8 text, or has JSON in its lines.
    """
    first, rest = True, ""
    try:
        with open(path, encoding="utf-8-sig") as file:
            while part := file.readline(LONGEST):
                if first and is_json(part):
                    raise ValueError(f"{path} has JSON in its lines: write the text alone, an article a line.")
                first, rest = False, rest + part
                whole_line = part.endswith("\n") or len(part) < LONGEST
                end = len(rest) if whole_line else rest.rfind(" ") + 1 or len(rest)
                if article := rest[:end].strip():
                    yield article
                rest = rest[end:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): unpack or convert it first.") from error
    if article := rest.strip():
        yield article


def is_json(line: str) -> bool:
    """Whether `line` is a JSON object, as a line of a .jsonl file is."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


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
