"""A smaller vocabulary for small models: most of BERT's 30,522 pieces are too rare to be learned from little text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset
from tokenizers import Tokenizer, processors

from detransformer.training.data.sources import Source, TrainingData
from detransformer.training.data.tasks import Task


@dataclass(frozen=True)
class ReducedVocabulary:
    """`source` with fewer pieces: special tokens, single ASCII characters, then the first others of its vocabulary.

    BERT's vocabulary is in order of frequency. Words are cut in shorter pieces instead; characters outside ASCII (after
    the tokenizer's normalisation, which takes accents away) make a word [UNK]. Perplexity is a token's, so it compares
    with that of the same vocabulary only.
    """

    source: Source
    vocab_size: int
    decoder: bool = False  # what it encodes starts with [CLS], as a decoder's training text does, and has no [SEP]

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.vocab_size}-pieces"

    @property
    def is_real(self) -> bool:
        return self.source.is_real

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}-{self.vocab_size}"

    def task_rows(self, task: Task, split: str) -> Dataset:
        return self.source.task_rows(task, split)

    def articles(self, split: str) -> Iterator[str]:
        return self.source.articles(split)

    def tokenizer(self) -> Tokenizer:
        """The source's tokenizer with pieces numbered anew.

        Raises:
            ValueError: if `vocab_size` has no room for special tokens and characters.
        """
        described = json.loads(self.source.tokenizer().to_str())
        pieces = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
        special = [token["content"] for token in described["added_tokens"]]
        single = [p for p in pieces if len(p.removeprefix("##")) == 1]
        characters = [p for p in single if p.isascii()]
        taken = {*special, *single}
        others = [p for p in pieces if p not in taken and not p.startswith("[unused")]
        room = self.vocab_size - len(special) - len(characters)
        if room < 0:
            raise ValueError(
                f"vocab_size={self.vocab_size} has no room for {len(special)} special tokens and {len(characters)} "
                f"characters: choose at least {len(special) + len(characters)}, or None for all."
            )
        numbers = {piece: number for number, piece in enumerate((*special, *characters, *others[:room]))}
        described["model"]["vocab"] = numbers
        for token in described["added_tokens"]:
            token["id"] = numbers[token["content"]]
        described["post_processor"] = None
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A" if self.decoder else "[CLS] $A [SEP]",
            pair="[CLS] $A $B" if self.decoder else "[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")],
        )
        return tokenizer


def reduced_data(data: TrainingData, vocab_size: int | None, decoder: bool = False) -> TrainingData:
    """`data` with a vocabulary of `vocab_size`; itself where it has no more pieces, or None is asked."""
    if vocab_size is None or vocab_size >= data.vocab_size:
        return data
    source = ReducedVocabulary(data.source, vocab_size, decoder)
    return TrainingData(source, data.cache_dir, f"{data.note}; {vocab_size:,} pieces of its vocabulary")
