"""The one rule that judges an obtained value against an expected one; `RULE` states it in words, first match counts.

The kind of a number (`KINDS`) decides whether it is judged. A value that the code was made or fitted to give is not
judged, and one that this hardware could not test, such as the accuracy of a model that guesses, is "not tested".
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

TOLERANCE = 0.15
KINDS = ("by construction", "fitted", "measured", "emulated", "predicted")
UNJUDGED = ("by construction", "fitted")
SIDES = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
NOT_JUDGED, NOT_TESTED, NOISE = "not judged", "not tested", "within noise"
RULE = [
    (NOT_JUDGED, "the value follows by construction, or was fitted to what is expected: there is nothing to judge"),
    (NOT_TESTED, "nothing was obtained, or it says nothing: a model at chance, a single seed"),
    (NOISE, "the interval of the repeats or seeds contains the limit, or no effect"),
    ("holds / does not hold", "for a limit (at least, at most, above, below): on its side of the limit or not"),
    ("does not hold", "for an effect: not on the published value's side of no effect (1: speedup, 0: difference)"),
    (
        "matches",
        f"the published value lies in the interval, or within {TOLERANCE:.0%} of the effect from ours (of the value, "
        "if it has no direction; or within another tolerance that is named)",
    ),
    ("holds, larger / holds, smaller", "off by more, with a larger or smaller effect on the same side"),
    ("differs, larger / differs, smaller", "off by more, for a value without a direction (a latency, a count)"),
]
COLUMNS = ["claim", "where", "expected", "obtained", "low", "high", "kind", "judged"]


@dataclass(frozen=True)
class Verdict:
    """One claim: what is expected, what was obtained, and how the two compare.

    Attributes:
        expected: the published value, or the limit if there is a `side`; a yes or no (string) must be equal.
        low, high: the interval of the obtained value, if there are repeats or seeds.
        neutral: the value of no effect: 1 for a speedup, 0 for a difference, None for a value without a direction.
        side: one of `SIDES` if `expected` is a limit.
        tested: False if the obtained value says nothing for or against the claim.
    """

    claim: str
    expected: float | str
    obtained: float | str | None
    kind: str
    where: str = ""
    low: float = math.nan
    high: float = math.nan
    neutral: float | None = None
    side: str = ""
    tolerance: float = TOLERANCE
    tested: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        if self.side and self.side not in SIDES:
            raise ValueError(f"side {self.side!r} is unknown; choose one of {', '.join(SIDES)}.")

    @property
    def judged(self) -> str:
        """The verdict, by `RULE`."""
        if self.kind in UNJUDGED:
            return NOT_JUDGED
        if not self.tested or pd.isna(self.obtained):
            return NOT_TESTED
        if isinstance(self.expected, str):
            return "matches" if self.obtained == self.expected else "does not hold"
        if self.side:
            return self._against_limit()
        return self._against_value() if self.neutral is None else self._against_effect()

    def _against_limit(self) -> str:
        if self.low < self.expected < self.high:
            return NOISE
        return "holds" if SIDES[self.side](self.obtained, self.expected) else "does not hold"

    def _against_effect(self) -> str:
        effect, found = self.expected - self.neutral, self.obtained - self.neutral
        if self.low <= self.neutral <= self.high:
            return NOISE
        if effect == 0:
            return self._against_value()
        if found * effect <= 0:
            return "does not hold"
        if self._is_near(self.tolerance * abs(effect)):
            return "matches"
        return "holds, larger" if abs(found) > abs(effect) else "holds, smaller"

    def _against_value(self) -> str:
        if self._is_near(self.tolerance * abs(self.expected)):
            return "matches"
        return "differs, larger" if self.obtained > self.expected else "differs, smaller"

    def _is_near(self, distance: float) -> bool:
        near = math.isclose(self.obtained, self.expected, rel_tol=1e-12, abs_tol=distance)
        return near or self.low <= self.expected <= self.high

    @property
    def row(self) -> dict:
        """One row of a table, by `COLUMNS`; a limit in words."""
        expected = f"{self.side} {self.expected:g}" if self.side else self.expected
        values = (self.claim, self.where, expected, self.obtained, self.low, self.high, self.kind, self.judged)
        return dict(zip(COLUMNS, values, strict=True))


def table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row per verdict: claim, where, expected, obtained, low, high, kind, judged."""
    frame = pd.DataFrame([verdict.row for verdict in verdicts], columns=COLUMNS)
    numbers = [name for name in ("expected", "obtained") if not frame[name].map(lambda v: isinstance(v, str)).any()]
    return frame.astype(dict.fromkeys([*numbers, "low", "high"], float))


def verdicts(
    expected: Mapping[str, float] | Sequence[float],
    obtained: Mapping[str, float | None] | Sequence[float | None],
    kind: str,
    claim: Sequence[str] = (),
    **options: object,
) -> pd.DataFrame:
    """`table` of values that share kind and `options` (of `Verdict`), one row each.

    `expected` and `obtained` map claims to values, or are sequences in the order of `claim`. A claim that the mapping
    `obtained` lacks was not obtained.

    Raises:
        ValueError: if their numbers differ.
    """
    if isinstance(expected, Mapping):
        claim, expected, obtained = list(expected), list(expected.values()), [obtained.get(name) for name in expected]
    triples = zip(claim, expected, obtained, strict=True)
    return table(Verdict(name, value, result, kind, **options) for name, value, result in triples)
