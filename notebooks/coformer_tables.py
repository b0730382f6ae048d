"""Tables II to V of CoFormer (2025) from rows of runs, with published values, and the claims judged from them.

A mean over seeds has its standard deviation and the number of seeds; rows of one seed have none, and test nothing.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd

from detransformer.record.intervals import around
from detransformer.record.published import published
from detransformer.record.verdict import Verdict

METHOD_TITLES = {
    "single": "one device",
    "galaxy": "Galaxy",
    "pp": "EdgeShard",
    "auto": "Auto (unmodified)",
    "bp+paper": "DeTransformer",
    "bp+auto": "DeTransformer, our plans",
    "devit": "DeViT",
    "coformer": "CoFormer",
    "coformer-published": "CoFormer, published FLOPs",
    "small": "one small model",
}
REFERENCE_DEVICE = "tx2"  # the paper's single device (Table V, Fig. 12)
EQUAL_FLOPS = {"1 device": "one small model", "coformer": "CoFormer", "uniform": "DeViT (uniform)"}  # by case
SPEEDUPS = {"DeiT-B": "speedup_over_tx2", "Galaxy": "speedup_over_galaxy"}
COSTS = ["num_devices", "flops_share", "largest_share", "latency_ms", "energy_mj", "memory_mib", "widths", "layers"]


def spread(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean accuracy, its standard deviation over seeds (NaN for one) and number of seeds; a row a group, in order."""
    groups = rows.groupby(list(by), sort=False, dropna=False)["accuracy"]
    made = groups.agg(["mean", "std", "count"]).reset_index()
    return made.rename(columns={"mean": "accuracy", "std": "accuracy_std", "count": "num_seeds"})


def ablation_table(model: Mapping, rows: pd.DataFrame) -> pd.DataFrame:
    """Table III: the large model, and its sub-models as cut and calibrated, alone and together."""
    made = spread(rows, ["part", "calibrated", "latency_ms"]).sort_values("calibrated", kind="stable")
    whole = {name: model[name] for name in ("accuracy", "train_accuracy", "latency_ms")}
    made = pd.concat([pd.DataFrame([{"part": "large model", "num_seeds": 1} | whole]), made], ignore_index=True)
    alone = zip(*_published("III", "decomposed only (three sub-models)"), strict=True)
    known = {f"sub-model {number}": values for number, values in enumerate(alone, start=1)}
    known |= {"large model": _published("III", "original DeiT-B")}
    known |= {"all": _published("III", "decomposed and aggregated")}
    shown = made["calibrated"].ne(False)  # the paper has no sub-models as cut
    for place, name in enumerate(("published_accuracy", "published_latency_ms")):
        made[name] = made["part"].map({part: values[place] for part, values in known.items()}).where(shown)
    return made


def aggregator_table(model: Mapping, rows: pd.DataFrame) -> pd.DataFrame:
    """Table IV: each aggregator on the same sub-models, and the points that it loses against the large model."""
    made, (whole, _) = spread(rows, ["kind", "latency_ms"]), _published("IV", "DeiT-B")
    known = [_published("IV", {"majority": "majority voting"}.get(kind, kind)) for kind in made["kind"]]
    return made.assign(
        given_up=model["accuracy"] - made["accuracy"],
        published_accuracy=[accuracy for accuracy, _ in known],
        published_given_up=[whole - accuracy for accuracy, _ in known],
        published_latency_ms=[latency_ms for _, latency_ms in known],
    )


def case_table(runs: pd.DataFrame, model: Mapping, cases: Sequence[str]) -> pd.DataFrame:
    """One row a case: accuracy over seeds, points lost, best sub-model alone, costs; speedup over the TX2 alone."""
    chosen = runs[runs["case"].isin(cases)]
    best_alone, costs = chosen.groupby("case")["best_alone"].mean(), chosen.groupby("case")[COSTS].first()
    made = spread(chosen, ["case", "rule"]).join(best_alone, on="case").join(costs, on="case")
    speedup, saved = model["latency_ms"] / made["latency_ms"], 1 - made["energy_mj"] / model["energy_mj"]
    return made.assign(given_up=model["accuracy"] - made["accuracy"], speedup=speedup, energy_saved=saved)


def device_table(runs: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """Table V: the large model on one device, then 1 to 4 sub-models with the same FLOPs together."""
    cases = ["1 device", "2 devices", "coformer", "4 devices"]
    made = case_table(runs, model, cases).sort_values("num_devices", kind="stable")
    whole = {name: model[name] for name in ("accuracy", *COSTS) if name in model}
    whole |= {"case": "large model", "given_up": 0.0, "num_seeds": 1}
    made = pd.concat([pd.DataFrame([whole]), made], ignore_index=True)
    table = published("coformer_tables").query("table == 'V'").set_index("row")
    rows = ["1 device", *(f"{count:g} devices" for count in made["num_devices"][1:])]
    for name, column in (("accuracy", "accuracy_pct"), ("latency_ms",) * 2, ("energy_mj",) * 2):
        made[f"published_{name}"] = [float(table[column].get(row, math.nan)) for row in rows]
    return made


def recipe_table(runs: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """Table II's fair part: CoFormer, equal sub-models and one small model of equal FLOPs, by their `recipe`."""
    rows = runs[runs["case"].isin(EQUAL_FLOPS)]
    columns = ["flops_share", "latency_ms", "seconds", "held_out_accuracy"]
    made = spread(rows, ["recipe", "case"]).join(
        rows.groupby(["recipe", "case"])[columns].mean(), on=["recipe", "case"]
    )
    made.insert(2, "method", made["case"].map(EQUAL_FLOPS))
    return made.assign(given_up=model["accuracy"] - made["accuracy"], speedup=model["latency_ms"] / made["latency_ms"])


def decoupled_table(rows: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """DeTransformer's accuracy by the recipe whose operations its distillation takes, and the points lost."""
    made = spread(rows, ["recipe", "num_steps", "flops_share", "as_cut"])
    return made.assign(given_up=model["accuracy"] - made["accuracy"])


def best_recipe(recipes: pd.DataFrame) -> pd.DataFrame:
    """The rows of the one recipe by which methods are compared: CoFormer's best on held-out training samples.

    Only recipes with which all methods were calibrated take part; test samples choose nothing.
    """
    whole = recipes[recipes.groupby("recipe")["case"].transform("nunique") == len(EQUAL_FLOPS)]
    own = whole[whole["case"] == "coformer"]
    by = "held_out_accuracy" if "held_out_accuracy" in own else "accuracy"  # the committed run held nothing out
    return whole[whole["recipe"] == own.loc[own[by].idxmax(), "recipe"]]


def missing_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by lost device for each aggregator, and the points that the loss costs."""
    made = spread(rows, ["aggregator", "missing"])
    full = made[made["missing"] == 0].set_index("aggregator")["accuracy"]
    return made.assign(lost=made["aggregator"].map(full) - made["accuracy"])


def latency_table(predicted: pd.DataFrame, measured: pd.DataFrame, accuracies: Mapping[str, float]) -> pd.DataFrame:
    """Figs. 10 and 12: all rows, with the accuracy of their method and speedups over the TX2 alone and over Galaxy.

    Speedups are between rows of the same kind, size and bandwidth; rows that failed their check have none.
    """
    rows = pd.concat([predicted, measured], ignore_index=True)
    rows = rows.assign(title=rows["method"].map(METHOD_TITLES), accuracy=rows["method"].map(accuracies))
    passed = rows[rows["valid"].fillna(True).astype(bool)] if "valid" in rows else rows
    alone = passed[
        (passed["method"] == "single") & ((passed["kind"] == "measured") | passed["plan"].eq(REFERENCE_DEVICE))
    ]
    for name, base, by in (
        ("tx2", alone, ["kind", "size"]),  # on no link: once for all bandwidths
        ("galaxy", passed[passed["method"] == "galaxy"], ["kind", "size", "bandwidth_mbps"]),
    ):
        known = base.groupby(by)["latency_ms"].first().rename("base_ms")
        rows[f"speedup_over_{name}"] = passed.join(known, on=by)["base_ms"] / passed["latency_ms"]
    return rows


def which_one(latency: pd.DataFrame, large_accuracy: float) -> pd.DataFrame:
    """By bandwidth: the fastest exact method, the fastest decoupled one, and the fastest of all; all predicted.

    Methods without a measured accuracy (FLOPs other than those trained) do not take part.
    """
    rows = latency[(latency["kind"] == "predicted") & (latency["method"] != "coformer-published")]
    made = []
    for mbps, part in rows.groupby("bandwidth_mbps"):
        best = {kind: some.loc[some["latency_ms"].idxmin()] for kind, some in part.groupby("answers")}
        fastest = part.loc[part["latency_ms"].idxmin()]
        row = {"bandwidth_mbps": mbps}
        for kind in ("exact", "decoupled"):
            row |= {f"fastest_{kind}": best[kind]["title"], f"{kind}_ms": best[kind]["latency_ms"]}
        made.append(row | {"fastest": fastest["title"], "fastest_ms": fastest["latency_ms"]})
        made[-1]["points_given_up"] = large_accuracy - fastest["accuracy"]
    return pd.DataFrame(made)


# Claims -----------------------------------------------------------------------------------------------------------


def difference(
    claim: str,
    first: pd.Series | float,
    second: pd.Series | float,
    side: str = "above",
    limit: float = 0.0,
    known: float | None = None,
) -> Verdict:
    """Points of accuracy of `first` over `second`, rows of means over seeds, with two standard errors on each side.

    The large model's accuracy may be a number, which has no error. `known` is the published difference.
    """
    rows = [row if isinstance(row, pd.Series) else {"accuracy": row} for row in (first, second)]
    obtained = rows[0]["accuracy"] - rows[1]["accuracy"]
    error = math.hypot(*(row.get("accuracy_std", 0.0) / row.get("num_seeds", 1) ** 0.5 for row in rows))
    low, high = around(obtained, error)
    where = "" if known is None else f"published {known:.2f}"
    return Verdict(claim, limit, obtained, "measured", where, low, high, side=side, tested=error == error)


def accuracy_claims(devices: pd.DataFrame, recipes: pd.DataFrame) -> list[Verdict]:
    """Points lost by CoFormer, and its points over methods of equal FLOPs, for each recipe that all share."""
    devices, large = devices.set_index("case"), float(devices["accuracy"].iloc[0])
    known = _published("III", "original DeiT-B")[0] - _published("III", "decomposed and aggregated")[0]
    made = []
    for recipe, part in recipes.groupby("recipe", sort=False):
        part = part.set_index("case")
        if set(EQUAL_FLOPS) <= set(part.index):
            own, name = part.loc["coformer"], f"CoFormer ({recipe})"
            made.append(difference(f"points given up by {name}", large, own, "at most", 2, known))
            made.append(difference(f"points of {name} over DeViT's like sub-models", own, part.loc["uniform"]))
            made.append(difference(f"points of {name} over one small model", own, part.loc["1 device"]))
    known = devices.loc["large model", "published_accuracy"] - devices.loc["4 devices", "published_accuracy"]
    claim = "points lost with 4 devices (Table V)"
    return [*made, difference(claim, large, devices.loc["4 devices"], "at most", 2, known)]


def speed_claims(latency: pd.DataFrame, devices: pd.DataFrame, recipes: pd.DataFrame) -> list[Verdict]:
    """Speedups and energy of CoFormer at the published share of FLOPs, all predicted, against the text and Table V."""
    rows = latency[(latency["kind"] == "predicted") & ~latency["plan"].str.contains("all tokens")]
    rows = rows.drop_duplicates(["method", "bandwidth_mbps"]).set_index(["method", "bandwidth_mbps"])
    text = published("coformer_tables").query("table == 'text'").set_index("row")["latency_ms"]
    text, own, found = text.str.rstrip("x").astype(float), rows.loc["coformer-published"].reindex([100, 1000]), {}
    for (base, column), (mbps, words) in product(SPEEDUPS.items(), {100: "100 Mbps", 1000: "1 Gbps"}.items()):
        found[f"speedup over {base} at {words}"] = own.loc[mbps, column]
    slower = rows["latency_ms"].get(("bp+paper", 1000), math.nan)
    found["DeTransformer latency relative to CoFormer"] = slower / own.loc[1000, "latency_ms"]
    made = [Verdict(claim, text[claim], value, "predicted", neutral=1.0) for claim, value in found.items()]
    energy = devices.set_index("case")
    saved = 1 - own.loc[1000, "energy_mj"] / energy.loc["large model", "energy_mj"]
    known = 1 - energy.loc["coformer", "published_energy_mj"] / energy.loc["large model", "published_energy_mj"]
    made.append(Verdict("energy saved against the TX2 alone (modelled)", known, saved, "predicted", neutral=0.0))
    like = recipes.drop_duplicates("case").set_index("case")["latency_ms"]
    for case in ("1 device", "uniform"):
        claim = f"latency of {EQUAL_FLOPS[case]} over CoFormer's"
        made.append(Verdict(claim, 1.0, like[case] / like["coformer"], "predicted", side="above"))
    return made


def aggregation_claims(
    ablation: pd.DataFrame, aggregators: pd.DataFrame, rules: pd.DataFrame, missing: pd.DataFrame
) -> list[Verdict]:
    """Aggregation against the best sub-model, aggregators and rules against each other, and a lost device."""
    cut, kinds = ablation[ablation["calibrated"].eq(True)].set_index("part"), aggregators.set_index("kind")
    best = cut.loc[cut["accuracy"].drop("all").idxmax()]
    known, values = kinds["published_accuracy"], cut["published_accuracy"]
    made = [
        difference("points of aggregation over the best sub-model (Table III)", cut.loc["all"], best,
                   known=values["all"] - values.drop("all").max()),
        difference("points of CoFormer's aggregator over the average (Table IV)", kinds.loc["coformer"],
                   kinds.loc["average"], known=known["coformer"] - known["average"]),
        difference("points of SENet over CoFormer's aggregator (Table IV)", kinds.loc["senet"], kinds.loc["coformer"],
                   "at most", 1, known["senet"] - known["coformer"]),
    ]  # fmt: skip
    by_rule = rules.set_index("rule")
    for rule, words in (("none", "equal weights"), ("published", "Eq. 13 as printed")):
        if rule in by_rule.index:
            claim = f"points of boosting over {words}"
            made.append(difference(claim, by_rule.loc["boosting"], by_rule.loc[rule]))
    lost = missing[missing["missing"] > 0].groupby("aggregator")[["accuracy", "accuracy_std", "num_seeds"]].mean()
    dropped = next(name for name in lost.index if "drop" in name)
    claim = "points of training with lost devices, where one is lost"
    return [*made, difference(claim, lost.loc[dropped], lost.loc["coformer"])]


def _published(table: str, row: str) -> tuple:
    """(accuracy, latency in ms) of a row of published/coformer_tables.csv; lists if it has one a sub-model."""
    found = published("coformer_tables").set_index(["table", "row"]).loc[(table, row)]
    cells = [[float(part) for part in str(found[name]).split("/")] for name in ("accuracy_pct", "latency_ms")]
    return tuple(cell if len(cell) > 1 else cell[0] for cell in cells)
