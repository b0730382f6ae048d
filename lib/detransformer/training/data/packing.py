"""Text as packed token sequences [N, T]: tokenised once, kept as a memory-mapped file; and the masks of a batch.

Order and masks are functions of (seed, position in the stream): every row of Table III sees the same sequences with
the same masks, on any number of processes, and a resumed run goes on where it stopped.
T is the sequence length, N the number of sequences, K the masked positions in a sequence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from detransformer.files import atomic_write

ARTICLES_PER_BATCH = 512
IGNORED = -100  # cross entropy's ignore_index


@dataclass(frozen=True)
class SpecialTokens:
    """Token numbers that BERT's inputs are built with."""

    pad: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        numbers = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep", "mask")}
        missing = [name for name, number in numbers.items() if number is None]
        if missing:
            raise ValueError(f"the tokenizer has no [{missing[0].upper()}] token: use BERT's vocabulary.")
        return cls(**numbers)

    @property
    def all(self) -> tuple[int, ...]:
        return (self.pad, self.cls, self.sep, self.mask)


@dataclass(frozen=True)
class PackedText:
    """Memory-mapped sequences [N, T] and where they come from."""

    sequences: np.ndarray
    path: Path

    @property
    def num_tokens(self) -> int:
        return int(self.sequences.size)


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
) -> PackedText:
    """The packed text at `path`, made first if it is not there: NAME.bin (uint16 [N, T]) and NAME.json.

    Raises:
        ValueError: if the text is shorter than one sequence, the vocabulary is above 65,536, or the file is damaged.
    """
    description = path.with_suffix(".json")
    if not description.exists():
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
        with atomic_write(description) as file:  # last: it says that the tokens are whole
            json.dump({"num_sequences": count, "seq_len": seq_len}, file)
    try:
        count = json.loads(description.read_text())["num_sequences"]
        sequences = np.memmap(path, dtype=np.uint16, mode="r", shape=(count, seq_len))
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and {description.name}, it is made again.") from error
    return PackedText(sequences, path)


class MaskedBatches:
    """Masked micro-batches of a packed text, addressed by number.

    Args:
        sequences: [N, T].
        vocab_size, special: for random replacements and positions never masked.
        num_masked: K, masked positions a sequence.
    """

    def __init__(self, sequences: np.ndarray, vocab_size: int, special: SpecialTokens, num_masked: int, seed: int):
        self.sequences, self.vocab_size, self.special = sequences, vocab_size, special
        self.num_masked, self.seed = num_masked, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Row numbers of positions start..start+count of the endless stream; each epoch has its own order."""
        num = len(self.sequences)
        picked = []
        for position in range(start, start + count):
            epoch, offset = divmod(position, num)
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(num))
            picked.append(self._order[1][offset])
        return np.array(picked)

    def train_batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Micro-batch `index` of the shuffled stream."""
        rows = np.sort(self.rows(index * batch_size, batch_size))  # sorted reads are kinder to the disk
        return self._masked(rows, [self.seed, 1, index])

    def valid_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All sequences once, in order, with fixed masks."""
        for index, start in enumerate(range(0, len(self.sequences), batch_size)):
            rows = np.arange(start, min(start + batch_size, len(self.sequences)))
            yield self._masked(rows, [self.seed, 2, index])

    def target_counts(self) -> np.ndarray:
        """How often each piece of the vocabulary may be asked for in these sequences [V]: special tokens never are."""
        counts = count_tokens(self.sequences, self.vocab_size)
        counts[list(self.special.all)] = 0
        return counts

    def _masked(self, rows: np.ndarray, seed: list[int]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        )
        tokens = torch.from_numpy(self.sequences[rows].astype(np.int64))
        return mask_tokens(tokens, self.vocab_size, self.special, self.num_masked, generator)


class CutBatches:
    """Micro-batches of a packed text as it is, in pieces of several lengths, addressed by number.

    A model that has to read sentences must not see full sequences alone: of a packed sequence's T - 2 tokens batch 0, 1
    and 2 of three make 1, 2 and 6 pieces (where they divide), each between its own [CLS] and [SEP].
    """

    PIECES = (1, 2, 6)

    def __init__(self, sequences: np.ndarray, special: SpecialTokens, seed: int):
        self.special = special
        self._text = MaskedBatches(sequences, 0, special, 0, seed)

    def train_batch(self, index: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Micro-batch `index` of the shuffled stream: input_ids [pieces * batch_size, length]."""
        rows = np.sort(self._text.rows(index * batch_size, batch_size))
        body = torch.from_numpy(self._text.sequences[rows][:, 1:-1].astype(np.int64))
        pieces = self.PIECES[index % len(self.PIECES)]
        body = body.unflatten(1, (pieces if body.shape[1] % pieces == 0 else 1, -1)).flatten(0, 1)
        ends = (body.new_full((len(body), 1), token) for token in (self.special.cls, self.special.sep))
        return {"input_ids": torch.cat([next(ends), body, next(ends)], dim=1)}


def count_tokens(sequences: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token stands in `sequences` [N, T], which may be larger than memory -> [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(sequences), 8192):
        counts += np.bincount(sequences[start : start + 8192].ravel(), minlength=vocab_size)
    return counts


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
