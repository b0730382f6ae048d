"""Text as packed token sequences [N, T]: tokenised once, kept as a memory-mapped file; and the masks of a batch.

Order and masks are functions of (seed, position in the stream): every row of Table III sees the same sequences with
the same masks, on any number of processes, and a resumed run goes on where it stopped.
T is the sequence length, N the number of sequences, K the masked positions in a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm.auto import tqdm

from detransformer.files import atomic_write

ARTICLES_PER_BATCH = 512
IGNORED = -100  # cross entropy's ignore_index
MASK_FRACTION = 0.15  # of a sequence's text, in BERT's training


@dataclass(frozen=True)
class SpecialTokens:
    """Token numbers that an encoder's inputs are built with."""

    pad: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """By BERT's names, or else RoBERTa's."""
        numbers = {}
        for name, other in (("pad", "<pad>"), ("cls", "<s>"), ("sep", "</s>"), ("mask", "<mask>")):
            number = tokenizer.token_to_id(f"[{name.upper()}]")
            numbers[name] = tokenizer.token_to_id(other) if number is None else number
            if numbers[name] is None:
                raise ValueError(
                    f"the tokenizer has neither [{name.upper()}] nor {other}: use an encoder's vocabulary."
                )
        return cls(**numbers)

    @property
    def all(self) -> tuple[int, ...]:
        return (self.pad, self.cls, self.sep, self.mask)


def packed_sequences(articles: Iterator[str], tokenizer: Tokenizer, seq_len: int) -> Iterator[np.ndarray]:
    """Blocks [n, T] of `[CLS] text [SEP]`; [SEP] also stands between articles, a last short rest is left."""
    special = SpecialTokens.of(tokenizer)
    body = seq_len - 2
    rest: list[int] = []
    articles = iter(articles)
    while batch := list(islice(articles, ARTICLES_PER_BATCH)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            rest.extend(encoding.ids)
            rest.append(special.sep)
        count = len(rest) // body
        if count:
            block = np.empty((count, seq_len), dtype=np.uint16)
            block[:, 0], block[:, -1] = special.cls, special.sep
            block[:, 1:-1] = np.array(rest[: count * body], dtype=np.uint16).reshape(count, body)
            rest = rest[count * body :]
            yield block


def pack_text(
    articles: Iterator[str], tokenizer: Tokenizer, seq_len: int, max_tokens: int | None, path: Path, title: str
) -> np.ndarray:
    """The packed text at `path` as a memory map [N, T] of uint16, made first if it is not there.

    Raises:
        ValueError: if the text is shorter than one sequence, the vocabulary is above 65,536, or the file is damaged.
    """
    if not path.exists():
        if tokenizer.get_vocab_size() > 2**16:
            raise ValueError(
                f"the vocabulary has {tokenizer.get_vocab_size():,} tokens, packed text holds 65,536: use BERT's."
            )
        limit = None if max_tokens is None else max(1, max_tokens // seq_len)
        count = 0
        with atomic_write(path, "wb") as file, tqdm(desc=title, unit="tok", unit_scale=True, leave=False) as bar:
            for block in packed_sequences(articles, tokenizer, seq_len):
                block = block if limit is None else block[: limit - count]
                file.write(block.tobytes())
                count += len(block)
                bar.update(block.size)
                if count == limit:
                    break
            if not count:
                raise ValueError(
                    f"the {title} is shorter than one sequence of {seq_len} tokens: give more text (one line in twenty "
                    "of a file is held out), or a smaller sequence length."
                )
    try:
        return np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, seq_len)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again.") from error


@lru_cache(maxsize=4)  # an order of all Wikipedia takes longer to draw than a batch
def epoch_order(num_rows: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_rows)


def stream_rows(num_rows: int, start: int, count: int, *seed: int) -> np.ndarray:
    """Row numbers [count] from place `start` of an endless stream; each epoch has all rows in its own order."""
    places = np.arange(start, start + count)
    epochs = places // num_rows
    parts = []
    for epoch in np.unique(epochs):
        order = epoch_order(num_rows, *seed, int(epoch))
        parts.append(order[places[epochs == epoch] % num_rows])
    return np.concatenate(parts)


class TextBatches:
    """Micro-batches of a packed text, addressed by number.

    Args:
        sequences: [N, T].
        vocab_size, special: of the tokenizer that cut the text.
        seed: of the order, and of what is random in a batch.
    """

    def __init__(self, sequences: np.ndarray, vocab_size: int, special: SpecialTokens, seed: int):
        self.sequences, self.vocab_size, self.special, self.seed = sequences, vocab_size, special, seed

    def train_batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Micro-batch `index` of the shuffled stream."""
        rows = stream_rows(len(self.sequences), index * batch_size, batch_size, self.seed)
        return self._batch(self._tokens(np.sort(rows)), 1, index)  # sorted reads are kinder to the disk

    def valid_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All sequences once, in order, the same each time."""
        for index, start in enumerate(range(0, len(self.sequences), batch_size)):
            yield self._batch(self._tokens(slice(start, start + batch_size)), 2, index)

    def log_frequencies(self) -> torch.Tensor:
        """log p of each piece of the vocabulary [V], by how often it is to be predicted in these sequences.

        p(v) = (n_v + 1) / (N + V), n_v being how often piece v is to be predicted, N all of these, V the vocabulary.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(self.sequences), 8192):  # they may be larger than memory
            counts += np.bincount(self._predicted(self.sequences[start : start + 8192]), minlength=self.vocab_size)
        weights = torch.from_numpy(counts).double() + 1
        return (weights / weights.sum()).log()

    def _tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(self.sequences[rows].astype(np.int64))

    def _batch(self, tokens: torch.Tensor, split: int, index: int) -> dict[str, torch.Tensor]:
        """Batch `index` of `split` (1: training, 2: validation) of tokens [B, T]."""
        raise NotImplementedError

    def _predicted(self, sequences: np.ndarray) -> np.ndarray:
        """The tokens of `sequences` that may be asked for, in one axis."""
        raise NotImplementedError


class MaskedBatches(TextBatches):
    """With BERT's masks: input_ids [B, T], positions [B, K], labels [B, K].

    K is the same in every sequence, so that all weigh the same.
    """

    def _batch(self, tokens: torch.Tensor, split: int, index: int) -> dict[str, torch.Tensor]:
        seed = np.random.SeedSequence([self.seed, split, index]).generate_state(1, np.uint64)[0] >> 1
        generator = torch.Generator().manual_seed(int(seed))
        num_masked = max(1, round(MASK_FRACTION * (tokens.shape[1] - 2)))
        return mask_tokens(tokens, self.vocab_size, self.special, num_masked, generator)

    def _predicted(self, sequences: np.ndarray) -> np.ndarray:
        return sequences[~np.isin(sequences, self.special.all)]


class NextTokenBatches(TextBatches):
    """Nothing masked: input_ids and labels, the token after each, [B, T - 2].

    A sequence is [CLS], T - 2 tokens of text, [SEP]; the text is predicted, the last [SEP] is not, because it stands at
    the same place in every sequence.
    """

    def _batch(self, tokens: torch.Tensor, split: int, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens[:, :-2], "labels": tokens[:, 1:-1]}

    def _predicted(self, sequences: np.ndarray) -> np.ndarray:
        return sequences[:, 1:-1].ravel()


class CutBatches(TextBatches):
    """The text as it is, in pieces of several lengths: input_ids [pieces * B, length].

    A model that has to read sentences must not see full sequences alone: of a packed sequence's T - 2 tokens batch 0, 1
    and 2 of three make 1, 2 and 6 pieces (where they divide), each between its own [CLS] and [SEP].
    """

    PIECES = (1, 2, 6)

    def _batch(self, tokens: torch.Tensor, split: int, index: int) -> dict[str, torch.Tensor]:
        body, pieces = tokens[:, 1:-1], self.PIECES[index % len(self.PIECES)]
        body = body.unflatten(1, (pieces if body.shape[1] % pieces == 0 else 1, -1)).flatten(0, 1)
        opened = nn.functional.pad(body, (1, 0), value=self.special.cls)
        return {"input_ids": nn.functional.pad(opened, (0, 1), value=self.special.sep)}


def unigram_loss(train: TextBatches, valid: TextBatches, batch_size: int) -> float:
    """Mean loss of the training text's word frequencies over the labels that a model of `valid` is scored on.

    A model that has learned nothing of the order of words cannot do better. In nats a predicted token, as a model's.

    Args:
        batch_size: that of the model's evaluation: masks depend on it.
    """
    log_probability = train.log_frequencies()
    labels = torch.cat([batch["labels"].flatten() for batch in valid.valid_batches(batch_size)])
    return -float(log_probability[labels[labels != IGNORED]].mean())


def mask_tokens(
    tokens: torch.Tensor, vocab_size: int, special: SpecialTokens, num_masked: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """BERT's masks: of K positions a sequence 80% become [MASK], 10% a random token, 10% stay.

    tokens [B, T] -> input_ids [B, T], positions [B, K], labels [B, K]; special tokens are never picked (label -100
    where a sequence has fewer than K others).
    """
    scores = torch.rand(tokens.shape, generator=generator)
    never = torch.isin(tokens, torch.tensor(special.all))
    positions = scores.masked_fill(never, -1.0).topk(num_masked, dim=1).indices.sort(dim=1).values  # [B, K]
    labels = tokens.gather(1, positions)
    kind = torch.rand(positions.shape, generator=generator)
    random_tokens = torch.randint(0, vocab_size, positions.shape, generator=generator)
    replaced = torch.where(kind < 0.8, torch.full_like(labels, special.mask), labels)
    replaced = torch.where(kind >= 0.9, random_tokens, replaced)
    picked_never = never.gather(1, positions)
    replaced = torch.where(picked_never, labels, replaced)
    return {
        "input_ids": tokens.scatter(1, positions, replaced),
        "positions": positions,
        "labels": labels.masked_fill(picked_never, IGNORED),
    }
