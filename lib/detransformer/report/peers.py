"""Tables beyond the paper's: all methods side by side, wire formats, what is read, scaling, the cost model's error.

Pure functions of the bench table `latency`, like `report.tables`: rows that failed their self-check are left out, and
`about` says of each table over which links, how messages travelled and how many rows were left out.
"""

import pandas as pd

from detransformer.record.published import published_claim
from detransformer.report.tables import (
    METHOD_NAMES,
    NUM_DEVICES,
    NUM_DIVISIONS,
    NUM_ORIGINAL_LAYERS,
    SEQ_LEN,
    checked_rows,
    comparable_rows,
    links_of,
    num_left_out,
    select,
    select_variant,
    single_latency,
    speedup,
    valid_rows,
)

SCALING_BANDWIDTH_MBPS = 500  # Section IV-C-2
PLACE = ["link", "model", "bandwidth_mbps"]
KINDS = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "send")
WIRES = ("float32", "bfloat16", "int8")
STRATEGY_ORDER = ("replicate", "tensor", "sequence", "ulysses", "heads", "galaxy", "block")
MIB = 2**20


def about(rows: pd.DataFrame, latency: pd.DataFrame | None = None) -> str:
    """A table's note: its links and wire formats, and of the `latency` it was made from how many rows were left out."""
    links = ", ".join(dict.fromkeys(link for link in rows["link"].dropna().astype(str) if link not in ("", "none")))
    wires = set(rows["wire"].dropna()) if "wire" in rows else {"float32"}
    wires = ", ".join([w for w in WIRES if w in wires] + sorted(wires - set(WIRES)))
    note = f"Link: {links or 'none'}. Wire: {wires}. Emulated Raspberry Pi 4B (paced compute), seq 128, batch 1."
    if latency is not None:
        note += f" {num_left_out(latency)} of {len(latency)} measured rows failed their self-check and are left out."
    return note


def variant_name(method: str, wire: str = "float32", reads: str = "all") -> str:
    """A method's name with what is not the default: `BP+Auto, int8, [CLS]`."""
    parts = [METHOD_NAMES.get(method, method)]
    parts += [wire] if wire != "float32" else []
    parts += ["[CLS]"] if reads == "cls" else []
    return ", ".join(parts)


def methods_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Peers side by side on 4 devices: one row a link, model, bandwidth, method, wire and reads, fastest first.

    `speedup` is over the single device reading the same tokens (NaN where that was not measured); `over_limit` is
    latency over the modelled single-device time / devices; `relative_error` the RMS of the output's difference from
    the single-device model's over the RMS of the output. A single device uses no link and stands at every bandwidth,
    its latency over the limit of four devices.
    """
    rows = _one_setting(comparable_rows(latency))
    spread = rows[rows["method"] != "single"]
    places = spread[PLACE].drop_duplicates()
    if not len(places):
        return pd.DataFrame()
    # BP on one device is no peer: the single device is that of the original model
    single = rows[(rows["method"] == "single") & rows["num_original_layers"].isna()].drop_duplicates(["model", "reads"])
    single = single.assign(over_limit=NUM_DEVICES * single["over_limit"] / single["num_devices"])
    everywhere = single.drop(columns=["link", "bandwidth_mbps"]).merge(places, on="model")
    rows = pd.concat([everywhere, spread], ignore_index=True)
    base = single.set_index(["model", "reads"])["latency_s"].to_dict()
    counts = [f"{kind}_count" for kind in KINDS if f"{kind}_count" in rows]
    sent = [f"{kind}_bytes" for kind in KINDS if f"{kind}_bytes" in rows]
    table = rows[[*PLACE, "method", "wire", "reads", "plan", "latency_s", "over_limit"]].copy()
    singles = [base.get(key, float("nan")) for key in zip(rows["model"], rows["reads"], strict=True)]
    table.insert(len(PLACE), "name", [variant_name(r.method, r.wire, r.reads) for r in rows.itertuples()])
    table.insert(table.columns.get_loc("over_limit"), "speedup", singles / rows["latency_s"])
    table["compute_s"], table["comm_s"], table["wait_s"] = rows["compute_s"], rows["comm_s"], rows["wait_s"]
    table["weights_mib"] = rows["weights_bytes"] / MIB
    table["peak_rss_mib"] = pd.to_numeric(rows["peak_rss_bytes"]) / MIB
    table["collectives"] = rows[counts].sum(axis=1).astype(int)
    table["sent_mib"] = rows[sent].sum(axis=1) / MIB
    table["relative_error"], table["max_abs_error"] = rows["relative_error"], rows["max_abs_error"]
    table["link"] = pd.Categorical(table["link"], links_of(spread))
    table = table.sort_values([*PLACE, "latency_s"], ignore_index=True)
    return table.astype({"link": str})


def methods_at(
    methods: pd.DataFrame, bandwidth_mbps: float, model: str = "bert-base", link: str | None = None
) -> pd.DataFrame:
    """`methods` at one place, in the form that a reader wants: no column that is the same in all rows.

    `link` None takes the table's first. The bandwidth is the measured one nearest to the wanted.
    """
    rows = methods[methods["model"] == model]
    rows = rows[rows["link"] == (link or next(iter(rows["link"]), None))]
    if len(rows):
        rows = rows[rows["bandwidth_mbps"] == min(rows["bandwidth_mbps"], key=lambda b: abs(b - bandwidth_mbps))]
    shown = ["name", "latency_s", "speedup", "over_limit", "weights_mib", "peak_rss_mib", "collectives", "sent_mib"]
    return rows[[*shown, "relative_error"]].reset_index(drop=True)


def reads_table(latency: pd.DataFrame) -> pd.DataFrame:
    """With and without reading all tokens: latency_s of both and `saved`, the share that reading [CLS] alone saves."""
    rows = _one_setting(comparable_rows(latency))
    keys = [*PLACE, "method", "wire"]
    rows = rows.assign(link=rows["link"].where(rows["method"] != "single", "none"))
    wide = rows.pivot_table(index=keys, columns="reads", values="latency_s", aggfunc="median", sort=False)
    if not {"all", "cls"} <= set(wide):
        return pd.DataFrame(columns=[*keys, "all_s", "cls_s", "saved"])
    wide = wide.dropna(subset=["all", "cls"]).reset_index()
    table = wide[keys].assign(all_s=wide["all"], cls_s=wide["cls"], saved=1 - wide["cls"] / wide["all"])
    return _sorted_by_method(table, ["wire"])


def wire_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Compressed messages, for every method that was measured with some: latency, bytes sent and output error.

    `over_float32` is the method's own float32 latency over this one, `over_tp` that of float32 TP.
    """
    methods = methods_table(latency)
    if not len(methods):
        return methods
    rows = methods[methods["reads"] == "all"]
    compressed = rows.loc[rows["wire"] != "float32", [*PLACE, "method"]].drop_duplicates()
    rows = rows.merge(compressed, on=[*PLACE, "method"])
    if not len(rows):
        return pd.DataFrame()
    plain = methods[(methods["wire"] == "float32") & (methods["reads"] == "all")]
    own = plain.set_index([*PLACE, "method"])["latency_s"].to_dict()
    keys = list(zip(*(rows[key] for key in PLACE), strict=True))
    nan = float("nan")
    rows = rows.assign(
        over_float32=[own.get((*key, m), nan) for key, m in zip(keys, rows["method"], strict=True)] / rows["latency_s"],
        over_tp=[own.get((*key, "tp"), nan) for key in keys] / rows["latency_s"],
    )
    shown = ["over_float32", "over_tp", "over_limit", "sent_mib", "relative_error", "max_abs_error"]
    rows["wire"] = pd.Categorical(rows["wire"], list(dict.fromkeys([*WIRES, *rows["wire"]])))
    table = _sorted_by_method(rows[[*PLACE, "method", "wire", "latency_s", *shown]], ["wire"])
    return table.astype({"wire": str})


def scaling_table(latency: pd.DataFrame, bandwidth_mbps: float = SCALING_BANDWIDTH_MBPS) -> pd.DataFrame:
    """Strong scaling at one bandwidth (Figs. 7c,d): latency, speedup over one device, and speedup / devices.

    More than four devices run a model of as many divisions (`num_divisions`).
    """
    rows = valid_rows(latency)
    parts = []
    for model in dict.fromkeys(rows["model"]):
        base = single_latency(rows, model)
        whole = rows.loc[(rows["model"] == model) & (rows["method"] == "single"), "weights_bytes"].median()
        for method in METHOD_NAMES:
            found = select(rows, model, method, bandwidth_mbps=bandwidth_mbps, num_devices=None)
            if method in ("single", "dp", "pp") or base is None or found["num_devices"].nunique() < 2:
                continue
            found = found.groupby(["link", "num_devices"], as_index=False)[["latency_s", "weights_bytes"]].median()
            one = {"num_devices": 1, "latency_s": base, "weights_bytes": whole, "link": found["link"].unique()}
            found = pd.concat([pd.DataFrame(one), found[found["num_devices"] > 1]])
            parts.append(found.assign(model=model, method=method, speedup=base / found["latency_s"]))
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True).assign(bandwidth_mbps=bandwidth_mbps)
    table["efficiency"] = table["speedup"] / table["num_devices"]
    table["weights_mib"] = table["weights_bytes"] / MIB
    table["num_divisions"] = table["num_devices"].clip(lower=NUM_DIVISIONS).where(table["method"].str.startswith("bp"))
    shown = ["num_devices", "num_divisions", "latency_s", "speedup", "efficiency", "weights_mib"]
    table["num_divisions"] = table["num_divisions"].astype("Int64")
    return _sorted_by_method(table[[*PLACE, "method", *shown]], ["num_devices"])


def prediction_error(latency: pd.DataFrame) -> pd.DataFrame:
    """Relative error of predicted against measured latency by link and method, with a row `all` a link."""
    rows = comparable_rows(latency)
    rows = rows[~rows["method"].isin(["single", "dp"]) & rows["predicted_s"].notna()]
    rows = rows.assign(error=(rows["predicted_s"] / rows["latency_s"] - 1).abs())
    together = pd.concat([rows, rows.assign(method="all")])
    table = together.groupby(["link", "method"])["error"].agg(["median", "max", "count"]).reset_index()
    return _sorted_by_method(table, [])


def efficiency_table(profile: pd.DataFrame) -> pd.DataFrame:
    """Compute efficiency by strategy (rows) and device count: FLOPs / time, over the whole layer's on one device.

    One row a model, way in which weights lie (`packed` or `plain`), strategy and number of chunks; requests of 128
    tokens. A run that packed no weights, or profiled one model in whole tokens, is named so.
    """
    known = {"model": "", "weights": "plain", "tokens": SEQ_LEN, "num_chunks": 1}
    profile = profile.assign(**{name: value for name, value in known.items() if name not in profile})
    keys = ["model", "weights", "strategy", "num_chunks"]
    rows = profile[profile["tokens"] == SEQ_LEN]
    wide = rows.pivot_table(index=keys, columns="num_devices", values="efficiency").sort_index(axis=1)
    wide = wide.rename(columns=lambda n: f"{n} device" + ("s" if n > 1 else "")).rename_axis(columns=None).reset_index()
    order = {strategy: index for index, strategy in enumerate(STRATEGY_ORDER)}
    place = wide["strategy"].map(order).fillna(len(order))
    wide = wide.assign(_place=place).sort_values(["model", "weights", "_place", "num_chunks"], ignore_index=True)
    return wide.drop(columns="_place")


def pace_table(latency: pd.DataFrame) -> pd.DataFrame:
    """How far a method's latency, and BP+Auto's speedup over it, depend on how small shares are paced.

    A row a model, method and bandwidth that was measured by both paces: seconds by the measured and by the roofline
    pace, and BP+Auto's speedup over the method by each, with its 95% interval where there are requests enough.
    """
    rows = checked_rows(latency)
    rows = rows[(rows["wire"] == "float32") & (rows["reads"] == "all") & (rows["num_devices"].isin((1, NUM_DEVICES)))]
    rows = rows[rows["num_original_layers"].isna() | (rows["num_original_layers"] == 4)]
    made = []
    for (model, method), part in rows.groupby(["model", "method"], sort=False):
        for mbps in sorted(part["bandwidth_mbps"].unique(), reverse=True):
            row = {"model": model, "method": method, "bandwidth_mbps": mbps}
            for pace in ("measured", "roofline"):
                alike = rows[(rows["model"] == model) & (rows["bandwidth_mbps"] == mbps) & (rows["pace"] == pace)]
                own, ours = alike[alike["method"] == method], alike[alike["method"] == "bp+auto"]
                if len(own) and len(ours):
                    value, low, high = speedup(own, ours)
                    row |= {f"{pace}_s": own["latency_s"].median(), f"{pace}_plan": own["plan"].iloc[0]}
                    row |= {f"{pace}_speedup": value, f"{pace}_low": low, f"{pace}_high": high}
            if "measured_s" in row and "roofline_s" in row:
                made.append(row)
    return pd.DataFrame(made)


def fig7_error(latency: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Latencies in seconds beside those of Fig. 7a, b, absolute.

    `curves` are published over one device's latency, whose published seconds they are multiplied by; the paper's
    BP+Auto is the best of its three plans. `error` is obtained over published, minus 1.
    Columns: model, method, bandwidth_mbps, published, obtained, error, link.
    """
    latency, parts = valid_rows(latency), []
    for link in links_of(latency):
        for curve in curves.itertuples():
            place = dict(link=link, bandwidth_mbps=curve.bandwidth_mbps)
            if curve.method == "bp+auto":
                rows = select_variant(latency, curve.model, "paper", **place)
            else:
                rows = select(latency, curve.model, curve.method, **place)
            one_s = published_claim(f"single_device_latency_{curve.model.replace('-', '_')}")
            published, obtained = curve.normalised_latency * one_s, rows["latency_s"].median()
            error = obtained / published - 1
            parts.append((curve.model, curve.method, curve.bandwidth_mbps, published, obtained, error, link))
    columns = ["model", "method", "bandwidth_mbps", "published", "obtained", "error", "link"]
    return pd.DataFrame(parts, columns=columns).dropna(subset="obtained").reset_index(drop=True)


def targets(latency: pd.DataFrame, bandwidth_mbps: float = 125) -> pd.DataFrame:
    """What BP+Auto (ours) reaches on each link and model: over TP, SP and the paper's plans, over the limit, with int8.

    One row a link and model at `bandwidth_mbps`; NaN where a row was not measured. `fastest` names what was measured
    fastest among float32 rows that read all tokens.
    """
    rows = _one_setting(comparable_rows(latency))
    plain = valid_rows(latency)
    found = []
    for link in links_of(rows):
        for model in dict.fromkeys(rows["model"]):
            place = dict(link=link, bandwidth_mbps=bandwidth_mbps)
            ours = select(plain, model, "bp+auto", **place)["latency_s"].median()
            if pd.isna(ours):
                continue
            int8 = select(rows[(rows["wire"] == "int8") & (rows["reads"] == "all")], model, "bp+auto", **place)
            tp, sp = (select(plain, model, baseline, **place)["latency_s"].median() for baseline in ("tp", "sp"))
            here = plain[(plain["model"] == model) & (plain["link"] == link) & (plain["num_devices"] == NUM_DEVICES)]
            here = _one_setting(here[(here["bandwidth_mbps"] == bandwidth_mbps) & (here["method"] != "bp+narrow")])
            found.append(
                {
                    "link": link,
                    "model": model,
                    "bandwidth_mbps": bandwidth_mbps,
                    "over_tp": tp / ours,
                    "over_sp": sp / ours,
                    "over_paper": select_variant(plain, model, "paper", **place)["latency_s"].median() / ours,
                    "over_limit": select(plain, model, "bp+auto", **place)["over_limit"].median(),
                    "int8_over_tp": tp / int8["latency_s"].median(),
                    "int8_over_limit": int8["over_limit"].median(),
                    "int8_error": int8["relative_error"].median(),
                    "fastest": here.loc[here["latency_s"].idxmin(), "method"],
                }
            )
    return pd.DataFrame(found)


def _one_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows on 4 devices (or one) of the original model or of Nb=4, Ndiv=4."""
    block = rows["method"].str.startswith("bp")
    papers = (rows["num_original_layers"] == NUM_ORIGINAL_LAYERS) & (rows["num_divisions"] == NUM_DIVISIONS)
    devices = (rows["num_devices"] == NUM_DEVICES) | (rows["method"] == "single")
    return rows[devices & (papers | ~block)]


def _sorted_by_method(table: pd.DataFrame, then: list[str]) -> pd.DataFrame:
    places = [key for key in PLACE if key in table]
    order = {method: index for index, method in enumerate(METHOD_NAMES)}
    table = table.assign(_order=table["method"].map(order).fillna(len(order)))
    table = table.sort_values([*places, "_order", *then], ignore_index=True)
    return table.drop(columns="_order")
