"""Tables beyond the paper's: all methods side by side, wire formats, scaling, pace, and the cost model's error.

Pure functions of the bench table `latency`, as in `tables.latency`: rows that failed their self-check are left out.
"""

import pandas as pd

from detransformer.planning.profile import SENT_KINDS
from detransformer.record.published import published_claim
from detransformer.tables.latency import (
    METHOD_NAMES,
    MIB,
    NUM_DEVICES,
    NUM_DIVISIONS,
    SEQ_LEN,
    checked_rows,
    comparable_rows,
    links_of,
    of_papers_structure,
    speedup,
    valid_rows,
)

SCALING_BANDWIDTH_MBPS = 500  # Section IV-C-2
PLACE = ["link", "model", "bandwidth_mbps"]
WIRES = ("float32", "bfloat16", "int8")
STRATEGY_ORDER = ("replicate", "tensor", "sequence", "ulysses", "heads", "galaxy", "block")


def methods_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Peers side by side on 4 devices: one row per link, model, bandwidth, method and wire format, fastest first.

    `speedup` is over the single device; `over_limit` is latency over (modelled single-device time / devices);
    `relative_error` is the RMS of the output's difference from the single-device model's over the RMS of the output.
    A single device uses no link: it has a row at every bandwidth, with its latency over the limit of four devices.
    """
    rows = _one_setting(comparable_rows(latency))
    spread = rows[rows["method"] != "single"]
    places = spread[PLACE].drop_duplicates()
    if not len(places):
        return pd.DataFrame()
    # BP on one device is no peer: `single` is the original model.
    single = rows[(rows["method"] == "single") & rows["num_original_layers"].isna()].drop_duplicates("model")
    single = single.assign(over_limit=NUM_DEVICES * single["over_limit"] / single["num_devices"])
    rows = pd.concat([single.drop(columns=["link", "bandwidth_mbps"]).merge(places, on="model"), spread])
    named = rows["method"].replace(METHOD_NAMES) + (", " + rows["wire"]).where(rows["wire"] != "float32", "")
    table = rows.assign(
        name=named,
        speedup=rows["model"].map(single.set_index("model")["latency_s"]) / rows["latency_s"],
        weights_mib=rows["weights_bytes"] / MIB,
        peak_rss_mib=rows["peak_rss_bytes"].astype(float) / MIB,
        collectives=rows.filter([f"{kind}_count" for kind in SENT_KINDS]).sum(axis=1).astype(int),
        sent_mib=rows.filter([f"{kind}_bytes" for kind in SENT_KINDS]).sum(axis=1) / MIB,
    )
    shown = [*PLACE, "name", "method", "wire", "plan", "latency_s", "speedup", "over_limit", "compute_s", "comm_s"]
    shown += ["wait_s", "weights_mib", "peak_rss_mib", "collectives", "sent_mib", "relative_error", "max_abs_error"]
    return table[shown].sort_values([*PLACE, "latency_s"], ignore_index=True)


def limit(latency: pd.DataFrame, model: str) -> float:
    """The modelled single-device time / devices, in seconds; NaN if nothing was measured."""
    rows = valid_rows(latency)
    return float(rows.loc[(rows["model"] == model) & (rows["num_devices"] == NUM_DEVICES), "limit_s"].median())


def time_parts(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` in long form: three rows for each, with `part` (compute, communication or wait) and its `seconds`.

    Communication is the rest, so that the three sum to the latency: the parts' medians need not sum to the median.
    """
    compute = rows["compute_s"].clip(upper=rows["latency_s"])
    wait = rows["wait_s"].clip(upper=rows["latency_s"] - compute)
    wide = rows.assign(compute=compute, communication=rows["latency_s"] - compute - wait, wait=wait)
    return wide.melt(list(rows), ["compute", "communication", "wait"], "part", "seconds")


def wire_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Every method that was measured with compressed messages: latency, bytes sent and output error.

    `over_float32` is the method's own float32 latency over this one, `over_tp` that of float32 TP.
    """
    methods = methods_table(latency)
    if not len(methods):
        return methods
    compressed = methods.loc[methods["wire"] != "float32", [*PLACE, "method"]].drop_duplicates()
    rows = methods.merge(compressed, on=[*PLACE, "method"])
    plain = methods[methods["wire"] == "float32"].rename(columns={"latency_s": "plain_s"})
    rows = rows.merge(plain[[*PLACE, "method", "plain_s"]], "left", on=[*PLACE, "method"])
    tensor = plain[plain["method"] == "tp"].rename(columns={"plain_s": "tensor_s"})
    rows = rows.merge(tensor[[*PLACE, "tensor_s"]], "left", on=PLACE)
    rows["over_float32"], rows["over_tp"] = rows["plain_s"] / rows["latency_s"], rows["tensor_s"] / rows["latency_s"]
    shown = ["wire", "latency_s", "over_float32", "over_tp", "over_limit", "sent_mib", "relative_error"]
    rows["wire"] = pd.Categorical(rows["wire"], WIRES)
    return _by_method(rows[[*PLACE, "method", *shown, "max_abs_error"]], ["wire"]).astype({"wire": str})


def scaling_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Strong scaling at one bandwidth (Figs. 7c,d): latency, speedup over one device, and speedup / devices.

    More than four devices run a model with as many divisions as devices (`num_divisions`).
    """
    rows, values = valid_rows(latency), ["latency_s", "weights_bytes"]
    is_single = (rows["method"] == "single") & rows["num_original_layers"].isna()
    one = rows[is_single].groupby("model")[values].median()
    rows = of_papers_structure(rows[rows["bandwidth_mbps"] == SCALING_BANDWIDTH_MBPS])
    rows = rows[~rows["method"].isin(["single", "dp", "pp"]) & rows["model"].isin(one.index)]
    several = rows.groupby(["model", "method"])["num_devices"].transform("nunique") > 1
    found = rows[several].groupby([*PLACE, "method", "num_devices"], as_index=False)[values].median()
    alone = found[[*PLACE, "method"]].drop_duplicates().join(one, on="model").assign(num_devices=1)
    table = pd.concat([alone, found[found["num_devices"] > 1]], ignore_index=True)
    table["speedup"] = table.join(one["latency_s"].rename("one_s"), on="model")["one_s"] / table["latency_s"]
    table["efficiency"] = table["speedup"] / table["num_devices"]
    table["weights_mib"] = table["weights_bytes"] / MIB
    divisions = table["num_devices"].clip(lower=NUM_DIVISIONS).where(table["method"].str.startswith("bp"))
    table["num_divisions"] = divisions.astype("Int64")
    shown = ["num_devices", "num_divisions", "latency_s", "speedup", "efficiency", "weights_mib"]
    return _by_method(table[[*PLACE, "method", *shown]], ["num_devices"])


def prediction_error(latency: pd.DataFrame) -> pd.DataFrame:
    """Relative error of predicted against measured latency, by link and method, with a row `all` per link."""
    rows = comparable_rows(latency)
    rows = rows[~rows["method"].isin(["single", "dp"]) & rows["predicted_s"].notna()]
    rows = rows.assign(error=(rows["predicted_s"] / rows["latency_s"] - 1).abs())
    together = pd.concat([rows, rows.assign(method="all")])
    return _by_method(together.groupby(["link", "method"])["error"].agg(["median", "max", "count"]).reset_index(), [])


def efficiency_table(profile: pd.DataFrame) -> pd.DataFrame:
    """Compute efficiency by strategy (rows) and device count: FLOPs / time, relative to the whole layer on one device.

    One row per model, weight layout (`packed` or `plain`), strategy and number of chunks, for requests of 128 tokens.
    """
    keys = ["model", "weights", "strategy", "num_chunks"]
    rows = profile[profile["tokens"] == SEQ_LEN]
    wide = rows.pivot_table(index=keys, columns="num_devices", values="efficiency").sort_index(axis=1)
    wide = wide.rename(columns=lambda n: f"{n} device" + ("s" if n > 1 else "")).rename_axis(columns=None).reset_index()
    wide["strategy"] = pd.Categorical(wide["strategy"], STRATEGY_ORDER)
    return wide.sort_values(keys, ignore_index=True).astype({"strategy": str})


def pace_table(latency: pd.DataFrame) -> pd.DataFrame:
    """How far a method's latency, and BP+Auto's speedup over it, depend on the pace of small shares.

    One row per model, method and bandwidth that was measured at both paces: seconds at the measured and the roofline
    pace, and BP+Auto's speedup over the method at each, with its 95% interval if there are enough requests.
    """
    rows = checked_rows(latency)
    rows = _one_setting(rows[rows["wire"] == "float32"]).sort_values("bandwidth_mbps", ascending=False, kind="stable")
    ours = dict(list(rows[rows["method"] == "bp+auto"].groupby(["model", "bandwidth_mbps", "pace"])))
    made = []
    for (model, method), part in rows.groupby(["model", "method"], sort=False):
        for mbps, at_rate in part.groupby("bandwidth_mbps", sort=False):
            row = {"model": model, "method": method, "bandwidth_mbps": mbps}
            for pace, own in at_rate.groupby("pace"):
                if (model, mbps, pace) in ours:
                    value, low, high = speedup(own, ours[model, mbps, pace])
                    row |= {f"{pace}_s": own["latency_s"].median(), f"{pace}_plan": own["plan"].iloc[0]}
                    row |= {f"{pace}_speedup": value, f"{pace}_low": low, f"{pace}_high": high}
            if "measured_s" in row and "roofline_s" in row:
                made.append(row)
    return pd.DataFrame(made)


def fig7_error(latency: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Our latencies beside those of Figs. 7a and 7b, in seconds.

    `curves` are published relative to one device's latency, so they are multiplied by its published seconds. The
    paper's BP+Auto is the best of its three plans, `bp+paper` here. `error` is obtained over published, minus 1.
    Columns: model, method, bandwidth_mbps, published, obtained, error, link.
    """
    keys = ["link", "model", "method", "bandwidth_mbps"]
    rows = _one_setting(valid_rows(latency)).groupby(keys, as_index=False)["latency_s"].median()
    curves = curves.replace({"method": {"bp+auto": "bp+paper"}}).merge(
        pd.Series(links_of(latency), name="link"), "cross"
    )
    table = curves.merge(rows.rename(columns={"latency_s": "obtained"}), "left", on=keys)
    claims = ("single_device_latency_" + table["model"].str.replace("-", "_")).map(published_claim)
    table["published"] = table["normalised_latency"] * claims
    return table.assign(error=table["obtained"] / table["published"] - 1)[[*keys, "published", "obtained", "error"]]


def _one_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows on 4 devices, or one, `of_papers_structure`."""
    return of_papers_structure(rows[(rows["num_devices"] == NUM_DEVICES) | (rows["method"] == "single")])


def _by_method(table: pd.DataFrame, then: list[str]) -> pd.DataFrame:
    """`table` sorted by place, then by method in the order of `METHOD_NAMES`."""
    order = {method: index for index, method in enumerate(METHOD_NAMES)}
    place = table["method"].map(order).fillna(len(order))
    keys = [key for key in PLACE if key in table]
    return table.assign(_order=place).sort_values([*keys, "_order", *then], ignore_index=True).drop(columns="_order")
