"""The papers' numbers (data/published/*.csv) and the one rule that compares ours with them.

The rule is `RULE`, first match counts; `judge` applies it to one value and `verdict` to rows.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from detransformer.files import published_folder

TOLERANCE = 0.15
RULE = [
    ("not run", "nothing was obtained"),
    ("does not hold", "not on the published value's side of no effect (1 for a speedup, 0 for a difference)"),
    ("matches", f"within the tolerance of the published value ({TOLERANCE:.0%} unless told)"),
    ("holds, larger / holds, smaller", "off by more, with a larger or smaller effect on the same side of no effect"),
    ("differs, larger / differs, smaller", "off by more, for a value without a direction (a latency, a count)"),
    (
        "one seed / within noise",
        "a difference of accuracies that the seed alone could make, or that no second seed checks",
    ),
]
COLUMNS = ["claim", "expected", "obtained", "ratio", "verdict"]


def published(name: str) -> pd.DataFrame:
    """data/published/NAME.csv as a frame; its comment lines say where in which paper it stands.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    folder = published_folder()
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv")))
        raise ValueError(f"No published table {name!r} in {folder}; choose one of {known}.")
    return pd.read_csv(path, comment="#")


def published_claim(claim: str) -> float:
    """One value of the papers' running text by its name in text_claims.csv."""
    claims = published("text_claims").set_index("claim")["value"]
    if claim not in claims.index:
        raise ValueError(f"No published claim {claim!r}; choose one of {', '.join(claims.index)}.")
    return float(claims[claim])


def judge(expected: float, obtained: float | None, tolerance: float = TOLERANCE, neutral: float | None = None) -> str:
    """The verdict on one value, by `RULE`; `neutral` is the value of no effect."""
    if _missing(obtained):
        return "not run"
    if neutral is not None and (obtained - neutral) * (expected - neutral) <= 0:
        return "does not hold"
    if math.isclose(obtained, expected, rel_tol=0, abs_tol=tolerance * abs(expected)):
        return "matches"
    if neutral is None:
        return "differs, larger" if obtained > expected else "differs, smaller"
    return "holds, larger" if abs(obtained - neutral) > abs(expected - neutral) else "holds, smaller"


def verdict(
    expected: float | Sequence[float] | Mapping[str, float],
    obtained: float | None | Sequence[float | None] | Mapping[str, float | None],
    tolerance: float = TOLERANCE,
    neutral: float | None = None,
    claim: str | Sequence[str] = "",
) -> pd.DataFrame:
    """Rows of claim | expected | obtained | ratio | verdict, one for each expected value.

    `expected` and `obtained` are numbers, sequences of one length, or mappings from claim to value; an obtained value
    that is None, NaN or absent from the mapping is "not run". `neutral` is what no effect would be: 1 for a speedup, 0
    for a difference, None for a quantity without a direction.
    """
    if isinstance(expected, Mapping):
        claims, values = list(expected), list(expected.values())
        results = [obtained.get(c) for c in claims] if isinstance(obtained, Mapping) else _listed(obtained)
    else:
        values, results = _listed(expected), _listed(obtained)
        claims = [claim] * len(values) if isinstance(claim, str) else list(claim)
    if not len(values) == len(results) == len(claims):
        raise ValueError(
            f"{len(values)} expected values, {len(results)} obtained and {len(claims)} claims; give one of each a row."
        )
    rows = []
    for name, value, result in zip(claims, values, results, strict=True):
        result = None if _missing(result) else float(result)
        ratio = result / value if result is not None and value else None
        rows.append((name, float(value), result, ratio, judge(value, result, tolerance, neutral)))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype({"expected": float, "obtained": float, "ratio": float})


def _missing(value) -> bool:
    return value is None or value is pd.NA or value != value


def _listed(value) -> list:
    return list(value) if isinstance(value, (Sequence, pd.Series)) and not isinstance(value, str) else [value]
