"""What a decoupled model gains on slow links over the best plan of the unmodified model."""

import math
from collections.abc import Mapping

import pandas as pd

from detransformer.tables.latency import paired_interval

SETTING = ["model", "num_devices", "bandwidth_mbps", "delay_ms", "shared", "wire", "pace"]
ONE_DEVICE = "one device"


def margins(rows: pd.DataFrame) -> pd.DataFrame:
    """Each decoupled structure against the best plan of the unmodified model, by setting and kind.

    `margin` is its speedup (`margin_low`, `margin_high`: the 95% interval of interleaved requests); `winner` is the
    fastest structure of its setting.
    """
    made = []
    for key, part in rows[rows["valid"].astype(bool)].groupby([*SETTING, "kind"], sort=False, dropna=False):
        by = part[part["structure"] != ONE_DEVICE].drop_duplicates("structure").set_index("structure")
        if "original" not in by.index:
            continue
        own = dict(zip([*SETTING, "kind"], key, strict=True))
        alone = _one_device(rows, own)
        plain = by.loc["original"]
        best_plain = min(plain["latency_s"], alone)  # in measurements, one device may be faster
        fastest = by.loc[by["latency_s"].idxmin()]
        shares_out = fastest["latency_s"] < alone and not str(fastest["plan"]).endswith("on 1 device")
        winner = fastest.name if shares_out else ONE_DEVICE
        for structure, row in by.drop("original").iterrows():
            paired = plain["latency_s"] == best_plain
            low, high = paired_interval(plain["samples_s"], row["samples_s"]) if paired else (math.nan, math.nan)
            gain = dict(margin=best_plain / row["latency_s"], margin_low=low, margin_high=high)
            made.append(own | gain | dict(structure=structure, winner=winner))
    return pd.DataFrame(made)


def _one_device(rows: pd.DataFrame, own: Mapping) -> float:
    """One device's latency in a setting: it sends nothing, so the wire format does not matter."""
    alike = rows[rows["structure"] == ONE_DEVICE]
    for name in (*(name for name in SETTING if name != "wire"), "kind"):
        alike = alike[alike[name] == own[name]]
    return float(alike["latency_s"].median())
