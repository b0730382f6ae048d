"""Text cut by another tokenizer than its source's: a checkpoint's own, also for text files, or one of fewer pieces.

Most of BERT's 30,522 pieces are too rare for a small model to learn them from little text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from detransformer.opening import has_tokenizer
from detransformer.training.data.sources import TrainingData, open_data
from detransformer.training.data.tasks import Task

VALID_EVERY = 20  # one article of so many is held out; of fewer, the last one
LONGEST = 8192  # characters of an article: a corpus may be a single line


class TextFiles:
    """Plain text files as a data source (see `sources.py` for what a source offers) that has no tokenizer of its own.

    Each line is an article; a longer one than `LONGEST` is cut, at spaces, into several.
    """

    name = "text"

    def __init__(self, paths: Sequence[str | Path]):
        """Takes files, and all .txt files of folders; ValueError where one is not there, or a folder has no text."""
        self.files: list[Path] = []
        for path in map(Path, paths):
            found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
            if not found or not found[0].is_file():
                raise ValueError(f"{path} has no text: give a text file, or a folder of .txt files.")
            self.files += found

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
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
        for article in chain.from_iterable(map(read_articles, self.files)):
            if last is not None and (number % VALID_EVERY == 0) == held_out:
                yield last
            number, last = number + 1, article
        if number < 2:
            named = ", ".join(map(str, self.files[:3]))
            raise ValueError(
                f"{named}: {number or 'no'} line of text, and one of {VALID_EVERY} is held out: give text with an "
                f"article a line, or more than {LONGEST:,} characters."
            )
        if (number % VALID_EVERY == 0 or number < VALID_EVERY) == held_out:
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


def text_for(
    checkpoint: str | Path, paths: Sequence[str | Path] | None, source: str, cache_dir: str | Path
) -> TrainingData:
    """The text of files, or of a data source where there are none, cut by the checkpoint's own tokenizer.

    Raises:
        ValueError: for a checkpoint without a tokenizer, or one that cannot be read, and as `TextFiles`.
    """
    if not has_tokenizer(checkpoint):
        raise ValueError(f"{checkpoint} has no tokenizer: copy its tokenizer.json or vocab.txt there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the tokenizer of {checkpoint} cannot be read ({error}): copy its files again.") from error
    if not paths:
        return open_data(source, cache_dir, tokenizer)
    text = TextFiles(paths)
    return TrainingData(text, cache_dir, f"{len(text.files)} text files", tokenizer)


def reduced_data(data: TrainingData, vocab_size: int | None, decoder: bool = False) -> TrainingData:
    """`data` with a vocabulary of `vocab_size`; itself where it has no more pieces, or None is asked.

    Perplexity is a token's, so it compares with that of the same vocabulary only.

    Args:
        decoder: what is encoded starts with [CLS], as a decoder's training text does, and has no [SEP].
    """
    if vocab_size is None or vocab_size >= data.vocab_size:
        return data
    tokenizer = reduced_tokenizer(data.tokenizer, vocab_size, decoder)
    note = f"{data.note}; {vocab_size:,} pieces of its vocabulary"
    return TrainingData(data.source, data.cache_dir, note, tokenizer, f"{data.name}-{vocab_size}-pieces")


def reduced_tokenizer(tokenizer: Tokenizer, vocab_size: int, decoder: bool = False) -> Tokenizer:
    """`tokenizer` with fewer pieces: special tokens, single ASCII characters, then the first others of its vocabulary.

    BERT's vocabulary is in order of frequency. Words are cut in shorter pieces instead; characters outside ASCII (after
    the tokenizer's normalisation, which takes accents away) make a word [UNK].

    Raises:
        ValueError: if `vocab_size` has no room for special tokens and characters.
    """
    described = json.loads(tokenizer.to_str())
    pieces = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    special = [token["content"] for token in described["added_tokens"]]
    single = [p for p in pieces if len(p.removeprefix("##")) == 1]
    characters = [p for p in single if p.isascii()]
    taken = {*special, *single}
    others = [p for p in pieces if p not in taken and not p.startswith("[unused")]
    room = vocab_size - len(special) - len(characters)
    if room < 0:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {len(special)} special tokens and {len(characters)} "
            f"characters: choose at least {len(special) + len(characters)}, or None for all."
        )
    numbers = {piece: number for number, piece in enumerate((*special, *characters, *others[:room]))}
    described["model"]["vocab"] = numbers
    described["post_processor"] = None
    for token in described["added_tokens"]:
        token["id"] = numbers[token["content"]]
    reduced = Tokenizer.from_str(json.dumps(described))
    reduced.post_processor = processors.TemplateProcessing(
        single="[CLS] $A" if decoder else "[CLS] $A [SEP]",
        pair="[CLS] $A $B" if decoder else "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")],
    )
    return reduced
