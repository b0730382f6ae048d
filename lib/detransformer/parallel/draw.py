"""Draws the next token by its probability, with the same result on any number of devices.

With Gumbel noise, -log(-log(u)), the argmax of logit / temperature + noise is a draw from softmax(logits /
temperature). So devices exchange only what greedy decoding exchanges, their best value and its token, and agree because
all choose from the same numbers. Each row's noise comes from its own seed, whatever its batch. V: words of the
vocabulary, P: devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from detransformer.parallel.comm import Comm

END = -1  # in place of a token: the row has ended
NOT_FINITE = -2  # in place of a token: the model's numbers are not finite


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen. Temperature 0: the likeliest. `top_p`: among the fewest words of that probability.

    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}; give 0 (the likeliest token) to 100.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a probability above 0, at most 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a whole number from 0, below 2^63.")


class Draw:
    """Chooses the tokens of one generation, each row's noise by its own seed; every device has one.

    `enough` are rows that this device knows are no longer wanted. For these it sends `END` with the largest value there
    is, so that all devices end a row at the same token, whichever of them knew.
    """

    def __init__(self, rows: Sequence[Sampling], vocab_size: int):
        self.rows, self.vocab_size = rows, vocab_size
        self.enough: set[int] = set()
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]

    def end(self, best: torch.Tensor) -> None:
        """Marks the rows in `enough` as ended in `best` [B, 2], (value, token) of each row."""
        for row in self.enough:
            best[row, 0], best[row, 1] = torch.inf, END

    def __call__(self, logits: torch.Tensor, sizes: Sequence[int], comm: Comm) -> torch.Tensor:
        """Logits [B, V/P] of this device's words -> values [B, V/P]; the largest over all devices is the draw.

        `sizes[r]` is the number of words of rank r. Rows of temperature 0 stay as they are.
        """
        if not any(row.temperature for row in self.rows):
            return logits
        own = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
        values = logits.clone()
        if any(
            row.top_p < 1 and row.temperature for row in self.rows
        ):  # needs all logits; costs leave this out, so the observer, which paces by costs, is not told
            observer, comm.observer = comm.observer, None
            every = comm.start_all_gather(logits, [(len(logits), size) for size in sizes]).wait()
            comm.observer, whole = observer, torch.cat(every, -1)  # [B, V]
        for i, (row, generator) in enumerate(zip(self.rows, self._generators, strict=True)):
            if not row.temperature:
                continue
            uniform = torch.rand(self.vocab_size, generator=generator, dtype=torch.float64)
            noise = -(-uniform.log()).log()
            values[i] = logits[i] / row.temperature + noise[own].to(logits.dtype)
            if row.top_p < 1:
                values[i, logits[i] < least_of_nucleus(whole[i], row)] = -torch.inf
        return values


def least_of_nucleus(logits: torch.Tensor, row: Sampling) -> torch.Tensor:
    """The smallest logit among the fewest likeliest words that together have the probability `top_p`; logits [V]."""
    falling = logits.sort(descending=True).values
    before = (falling / row.temperature).softmax(-1).cumsum(-1).roll(1)
    before[0] = 0.0
    return falling[before < row.top_p].min()
