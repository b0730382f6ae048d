"""The fastest strategies: a beam search over (layer, strategy) under memory budgets.

A label is a partial plan: the times of its devices, links and collectives under way [n], and the bytes that each device
keeps [R]. It is dropped if no completion can fit the memory; if its lower bound (the least time of any completion,
ignoring memory) is above the best plan found so far; or if another label of the same strategy is at least as early
everywhere and keeps no more (Pareto). Of the rest, the `BEAM` labels of least bound stay, so that under memory budgets
a slightly faster plan may be missed.
"""

from itertools import pairwise

import numpy as np

from detransformer.planning.pieces import Pieces

BEAM = 32
ROUNDING = 1e-12  # relative; smaller differences come from the order of additions


def fastest(pieces: Pieces, room: np.ndarray, below_s: float = np.inf) -> tuple[str, ...] | None:
    """The strategies of the fastest plan found; None if none fits, or none takes less than `below_s`.

    `room` [R]: bytes that layers may take on each device.
    """
    stages = pieces.choices()
    num_pending = max(len(row.pending) for stage in stages for row in stage)
    stacks: dict[tuple[int, int], np.ndarray] = {}  # shared by layers of the same kinds
    matrices = []
    for before, after in pairwise(stages):
        key = id(before), id(after)
        if key not in stacks:
            stacks[key] = np.array([[pieces.matrix(a, b, num_pending) for b in after] for a in before])
        matrices.append(stacks[key])
    kept = [np.stack([row.kept for row in stage]) for stage in stages[1:]]
    beam = _Beam(matrices, kept, room)
    found = beam.run(below_s, 1)  # a good plan as a bound, so that few labels stay
    path = (beam.run(found[0] if found else below_s, BEAM) or found or (0.0, None))[1]
    return path and tuple(stage[i].name for stage, i in zip(stages[1:-1], path, strict=False))


class _Beam:
    """Stages of S choices, and max-plus matrices [S before, S, n, n] from each choice to each of the next stage.

    `kept` [S, R] of each stage are bytes, whose sums must stay within `room` [R].
    """

    def __init__(self, matrices: list[np.ndarray], kept: list[np.ndarray], room: np.ndarray):
        self.matrices, self.kept, self.room = matrices, kept, room
        numbers = np.arange(matrices[0].shape[-1])
        self.first = np.where(numbers <= len(room), 0.0, -np.inf)  # devices and link are free at 0
        after = [np.where(numbers < len(room), 0.0, -np.inf)[None]]
        for stack in matrices[:0:-1]:
            after.append((after[-1][:, :, None] + stack).max(2).min(1))
        self.to_go = after[::-1]  # [S, n] after each stage: its largest sum with a label is a lower bound
        least = np.array([rows.min(0) for rows in kept])
        self.least = least.sum(0) - least.cumsum(0)  # least bytes of the stages after each one

    def run(self, below_s: float, beam: int) -> tuple[float, list[int]] | None:
        """(seconds, choice a stage) of the best plan below `below_s` found with `beam` labels a choice."""
        times, kept, choice = self.first[None], np.zeros((1, len(self.room))), np.zeros(1, int)
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        for stack, more, to_go, least in zip(self.matrices, self.kept, self.to_go, self.least, strict=True):
            new_times = (stack[choice] + times[:, None, None, :]).max(-1)  # [labels, S, n]
            new_kept = kept[:, None] + more
            bound = (new_times + to_go).max(-1)
            parents, choice = np.nonzero((bound < below_s * (1 - ROUNDING)) & (new_kept + least <= self.room).all(-1))
            if not len(parents):
                return None
            times, kept, bound = new_times[parents, choice], new_kept[parents, choice], bound[parents, choice]
            staying = _best(np.hstack([times, kept]), bound, choice, beam)
            times, kept, choice, bound = times[staying], kept[staying], choice[staying], bound[staying]
            steps.append((parents[staying], choice))
        label, path = int(np.argmin(bound)), []
        seconds = float(bound[label])
        for parents, choice in reversed(steps):
            path.append(int(choice[label]))
            label = parents[label]
        return seconds, path[::-1]


def _best(labels: np.ndarray, bound: np.ndarray, choice: np.ndarray, beam: int) -> np.ndarray:
    """Indices of the `beam` labels of each choice with the least bound, without labels that another one dominates."""
    order, staying = np.lexsort((labels.sum(-1), bound, choice)), []
    labels = np.where(np.isneginf(labels), 0.0, labels)
    above = labels + ROUNDING * bound[:, None]
    for name in np.unique(choice):
        kept: list[int] = []
        for label in order[choice[order] == name]:
            if len(kept) == beam:
                break
            if not (labels[kept] <= above[label]).all(-1).any():
                kept.append(label)
        staying += kept
    return np.array(staying)
