"""The fastest strategies: a shortest path over (layer, strategy) under memory budgets, exact for the cost model.

A label at a strategy of a layer is the time of each device, of the link and of collectives under way [n], and the bytes
that each device keeps [R]. The cost model is monotone (`planning.compiled`): a label is dropped that is nowhere below
another one; and one that cannot lead to less than the best plan found before, by a lower bound on what may follow.
"""

from itertools import pairwise

import numpy as np

from detransformer.planning.compiled import Compiled

EXACT_DEVICES = 8  # up to so many different ones all labels are kept; of more at most MAX_LABELS a layer and strategy
MAX_LABELS = 64
BLOCK = 64  # labels compared at once
PRICES = 14  # rounds of the search for a price of memory
ROUNDING = 1e-12  # relative; smaller differences come from the order of additions


def fastest(compiled: Compiled, below_s: float = np.inf) -> tuple[tuple[str, ...], bool] | None:
    """The strategies of the fastest plan within the budgets, and whether that is certain.

    None if no plan fits, or none is faster than `below_s`.
    """
    if not compiled.fits():
        return None
    stages = compiled.stages
    stacks: dict[tuple, np.ndarray] = {}
    for before, stage in pairwise(stages):
        if (*before, None, *stage) not in stacks:
            stacks[*before, None, *stage] = np.array([[compiled.piece(a, b).matrix for b in stage] for a in before])
    matrices = [stacks[*before, None, *stage] for before, stage in pairwise(stages)]
    kept = [np.stack([row.kept[compiled.groups] for row in stage]) for stage in stages[1:]]
    paths = Paths(matrices, kept, compiled.room[compiled.groups], compiled.first_label())
    path = paths.shortest(below_s, None if len(compiled.groups) <= EXACT_DEVICES else MAX_LABELS)
    names = path and tuple(stage[i].name for stage, i in zip(stages[1:-1], path, strict=False))
    return names and (names, not paths.cut)


class Paths:
    """Stages of S choices, and max-plus matrices [S before, S, n, n] from each choice to each of the next stage.

    `kept` [S, R] a stage are bytes, whose sums must stay within `room` [R]. Lower bounds are those without memory, and
    with a price on it (Lagrange): a plan that fits takes no less than its time and the price of its bytes, less that of
    the room.
    """

    def __init__(self, matrices: list[np.ndarray], kept: list[np.ndarray], room: np.ndarray, first: np.ndarray):
        self.matrices, self.first, self.cut = matrices, first, False
        self.end = np.where(np.arange(len(first)) < len(room), 0.0, -np.inf)
        least, most = (np.array([function(rows, axis=0) for rows in kept]) for function in (np.min, np.max))
        binding = most.sum(0) > room
        self.kept, self.room = [rows[:, binding] for rows in kept], room[binding]
        # What the stages after each one keep at least, and at most [stages, R].
        self.least, self.most = ((rows.sum(0) - rows.cumsum(0))[:, binding] for rows in (least, most))
        self.bounds = [(0.0, self._to_go(0.0))]
        if binding.any():
            self.bounds.append(self._best_price())

    def _used(self, kept: np.ndarray) -> np.ndarray:
        """Bytes [..., R] as a mean share of the room, at most 1 of what fits."""
        return (kept / self.room).mean(-1) if len(self.room) else np.zeros(kept.shape[:-1])

    def _to_go(self, price_s: float) -> list[np.ndarray]:
        """[S, n] after each stage: its largest sum with a label is the least time and price of all that may follow."""
        after = [self.end[None]]
        for stack, kept in zip(self.matrices[:0:-1], self.kept[:0:-1], strict=True):
            after.append(((after[-1][:, :, None] + stack).max(2) + price_s * self._used(kept)[:, None]).min(1))
        return after[::-1]

    def _best_price(self) -> tuple[float, list[np.ndarray]]:
        """The price of the room of the highest bound, and its `_to_go`; found by thirds: the bound is concave."""
        low, high = 0.0, 4 * self._at_start(*self.bounds[0])
        for _ in range(PRICES):
            prices = low + (high - low) / 3, high - (high - low) / 3
            priced = [(price, self._to_go(price)) for price in prices]
            rises = self._at_start(*priced[1]) > self._at_start(*priced[0])
            low, high = (prices[0], high) if rises else (low, prices[1])
        return priced[rises]

    def _at_start(self, price_s: float, to_go: list[np.ndarray]) -> float:
        """The lower bound on all paths."""
        times = (self.matrices[0][0] + self.first).max(-1) + to_go[0]
        return float((times.max(-1) + price_s * (self._used(self.kept[0]) - 1)).min())

    def shortest(self, below_s: float, limit: int | None) -> list[int] | None:
        """The choices of the shortest path that fits and is below `below_s`, found by `limit` labels a choice."""
        if max(self._at_start(*bound) for bound in self.bounds) >= below_s:
            return None
        found = self._run(below_s, 1)  # a good path, so that few labels need be kept
        better = self._run(found[0] if found else below_s, limit)
        return (better or found or (None, None))[1]

    def _run(self, below_s: float, limit: int | None) -> tuple[float, list[int]] | None:
        """(makespan, choice a stage) of the shortest path below `below_s`; sets `cut` where `limit` left labels out."""
        times, kept, choice, steps = self.first[None], np.zeros((1, len(self.room))), np.zeros(1, int), []
        self.cut = False
        for i, (stack, more) in enumerate(zip(self.matrices, self.kept, strict=True)):
            new_times = (stack[choice] + times[:, None, None, :]).max(-1)  # [labels, S, n]
            new_kept = np.maximum(kept[:, None] + more, self.room - self.most[i])  # nothing below that matters
            bounds = [(new_times + to_go[i]).max(-1) + p * (self._used(new_kept) - 1) for p, to_go in self.bounds]
            bound = np.max(bounds, axis=0)
            allowed = (bound < below_s * (1 - ROUNDING)) & (new_kept + self.least[i] <= self.room).all(-1)
            parents, choice = np.nonzero(allowed)
            times, kept, bound = new_times[parents, choice], new_kept[parents, choice], bound[parents, choice]
            staying = self._undominated(np.hstack([times, kept]), bound, choice, limit)
            if not len(staying):
                return None
            times, kept, choice, bound = times[staying], kept[staying], choice[staying], bound[staying]
            steps.append((parents[staying], choice))
        label, path = int(np.argmin(bound)), []
        makespan_s = float(bound[label])
        for parents, choice in reversed(steps):
            path.append(int(choice[label]))
            label = parents[label]
        return makespan_s, path[::-1]

    def _undominated(self, labels: np.ndarray, bound: np.ndarray, choice: np.ndarray, limit: int | None) -> np.ndarray:
        """Indices of the labels that stay: of each choice those of least bound that are somewhere below all others."""
        order, staying = np.lexsort((labels.sum(-1), bound, choice)), [np.empty(0, int)]
        labels = labels[:, labels.max(0, initial=-np.inf) > -np.inf]
        above = labels + ROUNDING * bound[:, None]
        for name in np.unique(choice):
            same, kept = order[choice[order] == name], np.empty(0, int)
            for block in np.split(same, range(BLOCK, len(same), BLOCK)):
                if limit and len(kept) > limit:
                    break
                block = block[~(labels[kept, None] <= above[block]).all(-1).any(0)]
                within = np.triu((labels[block, None] <= above[block]).all(-1), 1)
                kept = np.concatenate([kept, block[~within.any(0)]])
            self.cut |= bool(limit and len(kept) > limit)
            staying.append(kept[:limit])
        return np.concatenate(staying)
