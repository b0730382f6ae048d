"""What a decoupled model gains on slow links: over the best plan of the unmodified model, and over one device."""

import math
from collections.abc import Mapping

import pandas as pd

from detransformer.record.intervals import MIN_SAMPLES, bootstrap_ratio, samples_of

SETTING = ["model", "num_devices", "bandwidth_mbps", "delay_ms", "shared", "wire", "pace"]
ONE_DEVICE = "one device"


def margins(rows: pd.DataFrame) -> pd.DataFrame:
    """Each decoupled structure against the best plan of the unmodified model and one device, by setting and kind.

    `margin` is its speedup over the former (`margin_low`, `margin_high`: the 95% interval of interleaved requests),
    `over_one` over the latter; `winner` is the fastest structure of its setting.
    """
    made = []
    for key, part in rows[rows["valid"].astype(bool)].groupby([*SETTING, "kind"], sort=False, dropna=False):
        by = part.drop_duplicates("structure").set_index("structure")
        if "original" not in by.index:
            continue
        own = dict(zip([*SETTING, "kind"], key, strict=True))
        alone = _one_device(rows, own)
        plain = by.loc["original"]
        best_plain = min(plain["latency_s"], alone)  # in measurements, one device may be faster
        ranked = by["latency_s"].drop(ONE_DEVICE, errors="ignore").sort_values()
        winner = ranked.index[0] if ranked.iloc[0] < alone and not _is_alone(by.loc[ranked.index[0]]) else ONE_DEVICE
        for structure, row in by.drop(["original", ONE_DEVICE], errors="ignore").iterrows():
            low, high = _interval(plain, row) if plain["latency_s"] == best_plain else (math.nan, math.nan)
            made.append(
                own
                | dict(structure=structure, latency_s=row["latency_s"], unmodified_s=best_plain, one_device_s=alone)
                | dict(margin=best_plain / row["latency_s"], margin_low=low, margin_high=high)
                | dict(over_one=alone / row["latency_s"], winner=winner)
                | dict(plan=row["plan"], unmodified_plan=plain["plan"])
            )
    return pd.DataFrame(made)


def _one_device(rows: pd.DataFrame, own: Mapping) -> float:
    """One device's latency in a setting: it sends nothing, so the wire format does not matter."""
    alike = rows[rows["structure"] == ONE_DEVICE]
    for name in (*(name for name in SETTING if name != "wire"), "kind"):
        alike = alike[alike[name] == own[name]]
    return float(alike["latency_s"].median())


def _is_alone(row: pd.Series) -> bool:
    return str(row["plan"]).endswith("on 1 device")


def _interval(slower: pd.Series, faster: pd.Series) -> tuple[float, float]:
    samples = [samples_of(row["samples_s"]) for row in (slower, faster)]
    enough = len(samples[0]) == len(samples[1]) >= MIN_SAMPLES
    return bootstrap_ratio(*samples) if enough else (math.nan, math.nan)
