"""Tables of notebook 10 from its runs: means over seeds beside published values, which method where, and verdicts.

A mean has its standard deviation over the seeds, empty for one seed. "Beyond noise" is further from zero than two
standard errors of the differences by seed, as everywhere; that of the test samples is not in it.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from detransformer.record.intervals import around
from detransformer.record.published import published
from detransformer.record.verdict import Verdict
from detransformer.record.verdict import table as verdict_table

METHOD_TITLES = {  # as tables and figures call them
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
POOLED = "pooled features"
EQUAL_FLOPS = {"1 device": "one small model", "coformer": "CoFormer", "uniform": "DeViT (uniform)"}  # by case
DEVICE_COUNTS = {"1 device": 1, "2 devices": 2, "coformer": 3, "4 devices": 4}
NOT_RUN = (
    ("ImageNet-1K (Tables II, IV, Figs. 9, 10, 11, 13)", "no copy of the data here; CIFAR-100 instead"),
    ("DeiT-B, ViT-L/16 of 224 pixels, trained", "a small ViT on 32 pixels is trained; DeiT-B's sizes are priced"),
    ("Swin-L (Figs. 9, 15, Table II)", "shifted windows and merged patches: the decomposer has no such layers"),
    ("COCO detection with Mask R-CNN (Fig. 9 e-h)", "no copy of the data here, and no detection head in the package"),
    ("Flan-T5-Large (Fig. 9 i-l)", "encoder and decoder: the decomposer takes BERT, GPT-2 and ViT"),
    ("GPT2-XL on Jetsons (Fig. 9 i-l)", "no trained weights here, and hours of a GPU to calibrate its sub-models"),
    ("T2T-ViT, EfficientFormer, PoolFormer, MobileViTv2 (Table II)", "other architectures, trained on ImageNet-1K"),
    ("Jetson Nano, TX2, Orin Nano (all latencies)", "no such devices here: predicted, and measured on emulated ones"),
    ("Energy (Figs. 9, 10, Table V)", "no power meter: modelled from thermal design power and computing seconds"),
)


# Accuracy ---------------------------------------------------------------------------------------------------------


def spread(rows: pd.DataFrame, by: Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """Mean of `value`, standard deviation over seeds (NaN for one) and number of seeds; a row a group, in order."""
    groups = rows.groupby(list(by), sort=False, dropna=False)[value]
    made = groups.agg(["mean", "std", "count"]).reset_index()
    return made.rename(columns={"mean": value, "std": f"{value}_std", "count": "num_seeds"})


def ablation_table(model: Mapping, rows: pd.DataFrame) -> pd.DataFrame:
    """Table III: the large model, its sub-models as cut and calibrated, alone and together; published values beside."""
    made = spread(rows, ["part", "calibrated", "latency_ms"]).sort_values("calibrated", kind="stable")
    whole = {"part": model["case"], "num_seeds": 1}
    whole |= {name: model[name] for name in ("accuracy", "train_accuracy", "latency_ms")}
    made = pd.concat([pd.DataFrame([whole]), made], ignore_index=True)
    alone, alone_ms = _published("III", "decomposed only (three sub-models)")
    known = {model["case"]: _published("III", "original DeiT-B")}
    known |= {f"sub-model {n}": pair for n, pair in enumerate(zip(alone, alone_ms, strict=True), start=1)}
    known["all"] = _published("III", "decomposed and aggregated")
    shown = made["calibrated"].isna() | made["calibrated"].eq(True)  # the paper has calibrated ones only
    for place, name in enumerate(("published_accuracy", "published_latency_ms")):
        made[name] = [known[part][place] if here else math.nan for part, here in zip(made["part"], shown, strict=True)]
    return made


def aggregator_table(model: Mapping, rows: pd.DataFrame) -> pd.DataFrame:
    """Table IV: each aggregator on the same sub-models, and what it gives up against the large model."""
    names = {"majority": "majority voting"}
    made = spread(rows, ["kind", "latency_ms"])
    made["given_up"] = model["accuracy"] - made["accuracy"]
    whole, _ = _published("IV", "DeiT-B")
    pairs = [_published("IV", names.get(kind, kind)) for kind in made["kind"]]
    return made.assign(
        published_accuracy=[accuracy for accuracy, _ in pairs],
        published_given_up=[whole - accuracy for accuracy, _ in pairs],
        published_latency_ms=[milliseconds for _, milliseconds in pairs],
    )


def case_table(
    runs: pd.DataFrame, model: Mapping, names: Sequence[str] = (), groups: Sequence[str] = ()
) -> pd.DataFrame:
    """One row a case of `names` or `groups`: accuracy over seeds, points given up, best sub-model alone, costs."""
    chosen = runs[runs["case"].isin(names) | runs["group"].isin(groups)]
    costs = ["num_devices", "devices", "flops_share", "largest_share", "latency_ms", "idle_ms", "energy_mj"]
    costs += ["memory_mib", "widths", "layers"]
    made = spread(chosen, ["case", "rule"])
    firsts = chosen.groupby("case", sort=False)[["best_alone", *costs]].first()
    firsts["best_alone"] = chosen.groupby("case")["best_alone"].mean()
    made = made.join(firsts, on="case")
    made.insert(4, "given_up", model["accuracy"] - made["accuracy"])
    return made


def device_table(runs: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """Table V: the large model on one device, then 1 to 4 sub-models of together the same FLOPs."""
    made = case_table(runs, model, list(DEVICE_COUNTS)).sort_values("num_devices", kind="stable")
    made = pd.concat([pd.DataFrame([_whole(model)]), made], ignore_index=True)
    table = published("coformer_tables").query("table == 'V'").set_index("row")
    rows = ["1 device", *(f"{count:g} devices" for count in made["num_devices"][1:])]
    for name, column in (("accuracy", "accuracy_pct"), ("latency_ms",) * 2, ("energy_mj",) * 2):
        made[f"published_{name}"] = [float(table[column].get(row, math.nan)) for row in rows]
    return made


def budget_table(runs: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """Fig. 13: the most FLOPs of a device; `saved` and `speedup` against the large model on the TX2."""
    made = case_table(runs, model, groups=("budgets",))
    made["speedup"] = model["latency_ms"] / made["latency_ms"]
    return made.assign(energy_saved=1 - made["energy_mj"] / model["energy_mj"])


def equal_flops_table(runs: pd.DataFrame, model: Mapping) -> pd.DataFrame:
    """The fair part of Table II: one small model, like sub-models and unlike ones, at about the same FLOPs together."""
    made = case_table(runs, model, list(EQUAL_FLOPS))
    return made.assign(method=made["case"].map(EQUAL_FLOPS))


def recipe_table(runs: pd.DataFrame, recipes: pd.DataFrame, model: Mapping, own: str) -> pd.DataFrame:
    """The cases of `EQUAL_FLOPS` by how their sub-models were calibrated; `own` names the recipe of `runs`."""
    rows = pd.concat([runs[runs["case"].isin(EQUAL_FLOPS)].assign(recipe=own), recipes], ignore_index=True)
    made = spread(rows, ["recipe", "case"])
    firsts = rows.groupby(["recipe", "case"], sort=False)[["flops_share", "latency_ms", "seconds"]].first()
    made = made.join(firsts, on=["recipe", "case"])
    made.insert(2, "method", made["case"].map(EQUAL_FLOPS))
    made.insert(3, "held_out_accuracy", rows.groupby(["recipe", "case"], sort=False)["held_out_accuracy"].mean().array)
    return made.assign(given_up=model["accuracy"] - made["accuracy"], speedup=model["latency_ms"] / made["latency_ms"])


def best_recipe(runs: pd.DataFrame, recipes: pd.DataFrame) -> pd.DataFrame:
    """`runs` with those of one recipe in their place: methods are compared by it.

    Of all recipes that `EQUAL_FLOPS` were calibrated by it is the one by which CoFormer is most accurate on training
    samples that were held out: test samples choose nothing.
    """
    parts = [part for _, part in recipes.groupby("recipe")] if len(recipes) else []
    whole = [part for part in parts if set(EQUAL_FLOPS) <= set(part["case"])]
    best = max([runs, *whole], key=lambda part: part.loc[part["case"] == "coformer", "held_out_accuracy"].mean())
    return runs if best is runs else pd.concat([best, runs[~runs["case"].isin(EQUAL_FLOPS)]], ignore_index=True)


def chosen_recipe(rows: pd.DataFrame) -> pd.Series:
    """Of `recipe_table`'s rows of one method, that of the recipe most accurate on held-out training samples.

    An older table has no such samples: there it is the one of the best test accuracy.
    """
    by = "held_out_accuracy" if "held_out_accuracy" in rows else "accuracy"
    return rows.sort_values(by, ascending=False, kind="stable").iloc[0]


def missing_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by the device lost, for each aggregator, and the points lost by it."""
    made = spread(rows, ["aggregator", "missing"])
    full = made[made["missing"] == 0].set_index("aggregator")["accuracy"]
    return made.assign(lost=made["aggregator"].map(full) - made["accuracy"])


def _whole(model: Mapping) -> dict:
    kept = ("case", "accuracy", "num_devices", "devices", "flops_share", "largest_share", "latency_ms", "idle_ms")
    return {name: model[name] for name in (*kept, "energy_mj", "memory_mib")} | {"given_up": 0.0, "num_seeds": 1}


# Latency ----------------------------------------------------------------------------------------------------------


def accuracies_of(runs: pd.DataFrame, model: Mapping) -> dict[str, float]:
    """Accuracy of each method that has one on the images: exact methods have the large model's."""
    means = runs.groupby("case")["accuracy"].mean()
    known = {"coformer": means["coformer"], "devit": means["uniform"], "small": means["1 device"]}
    return dict.fromkeys(("single", "galaxy", "pp", "auto"), model["accuracy"]) | known


def latency_table(predicted: pd.DataFrame, measured: pd.DataFrame, accuracies: Mapping[str, float]) -> pd.DataFrame:
    """Figs. 10 and 12: all rows, with the accuracy of their method and speedups over the TX2 alone and over Galaxy.

    Speedups are of rows of the same kind, size and bandwidth; rows that failed their check have none.
    """
    rows = pd.concat([predicted, measured], ignore_index=True)
    rows.insert(4, "title", rows["method"].map(METHOD_TITLES))
    rows["accuracy"] = rows["method"].map(accuracies)
    shown = rows[_passed(rows)]
    for name in ("tx2", "galaxy"):
        rows[f"speedup_over_{name}"] = math.nan
    for (kind, _), part in shown.groupby(["kind", "size"], sort=False):
        alone = part[(part["method"] == "single") & ((kind == "measured") | (part["plan"] == REFERENCE_DEVICE))]
        if len(alone):  # on no link: once for all bandwidths
            rows.loc[part.index, "speedup_over_tx2"] = alone["latency_ms"].iloc[0] / part["latency_ms"]
        for _, here in part.groupby("bandwidth_mbps"):
            galaxy = here.loc[here["method"] == "galaxy", "latency_ms"]
            if len(galaxy):
                rows.loc[here.index, "speedup_over_galaxy"] = galaxy.iloc[0] / here["latency_ms"]
    return rows


def _passed(rows: pd.DataFrame) -> pd.Series:
    """Predicted rows, and measured ones that passed their check."""
    checked = rows["valid"] if "valid" in rows else pd.Series(True, rows.index)
    return checked.fillna(True).astype(str).str.lower() == "true"


def which_one(latency: pd.DataFrame, accuracies: Mapping[str, float]) -> pd.DataFrame:
    """By bandwidth: the fastest exact method, the fastest decoupled one, and the fastest of all; all predicted.

    Methods whose accuracy nobody measured (other FLOPs than those trained) do not take part.
    """
    rows = latency[(latency["kind"] == "predicted") & (latency["method"] != "coformer-published")]
    made = []
    for mbps, part in rows.groupby("bandwidth_mbps"):
        best = {kind: some.loc[some["latency_ms"].idxmin()] for kind, some in part.groupby("answers")}
        exact, decoupled = best["exact"], best.get("decoupled")
        fastest = min(best.values(), key=lambda row: row["latency_ms"])
        kept, left = accuracies["single"], accuracies.get(fastest["method"], math.nan)
        row = {"bandwidth_mbps": mbps, "fastest_exact": exact["title"], "exact_ms": exact["latency_ms"]}
        if decoupled is not None:
            row |= {"fastest_decoupled": decoupled["title"], "decoupled_ms": decoupled["latency_ms"]}
        row |= {"fastest": fastest["title"], "fastest_ms": fastest["latency_ms"], "points_given_up": kept - left}
        made.append(row | {"sentence": _sentence(mbps, exact, decoupled, fastest, kept, left)})
    return pd.DataFrame(made)


def _sentence(mbps: float, exact: pd.Series, decoupled, fastest: pd.Series, kept: float, left: float) -> str:
    where = f" ({exact['plan']})" if exact["method"] in ("single", "auto") else ""
    words = f"At {mbps:g} Mbps the fastest with the large model's own answers is {exact['title']}{where}, "
    words += f"{exact['latency_ms']:.0f} ms"
    if decoupled is not None:
        words += f"; decoupled, {decoupled['title']}, {decoupled['latency_ms']:.0f} ms"
    if fastest["method"] == exact["method"]:
        return f"{words}; nothing is faster."
    times = exact["latency_ms"] / fastest["latency_ms"]
    price = f", at {left:.1f}% accuracy instead of {kept:.1f}%" if left == left else ", accuracy not measured here"
    return f"{words}; fastest of all is {fastest['title']}, {times:.1f} times as fast as the first{price}."


def not_run_table() -> pd.DataFrame:
    """What the paper shows and this notebook does not, with the reason of each."""
    return pd.DataFrame([{"what": what, "why": why} for what, why in NOT_RUN])


# Verdict ----------------------------------------------------------------------------------------------------------


def comparison_verdicts(
    model: Mapping,
    ablation: pd.DataFrame,
    aggregators: pd.DataFrame,
    runs: pd.DataFrame,
    missing: pd.DataFrame,
    latency: pd.DataFrame,
    best: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row a claim, judged by `record.verdict`.

    Args:
        ablation, aggregators, runs, missing: rows by seed, as `coformer.ablation` makes them.
        latency: what `latency_table` made.
        best: what `best_recipe` made, where sub-models were calibrated by other recipes, too.
    """
    rows = _accuracy_claims(model, ablation, aggregators, runs, missing)
    if best is not None and "recipe" in best:
        rows += _recipe_claims(model, best)
    rows += _speed_claims(model, runs, latency)
    return verdict_table(rows)


def _accuracy_claims(model, ablation, aggregators, runs, missing) -> list[Verdict]:
    by_case = {case: part.set_index("seed")["accuracy"] for case, part in runs.groupby("case")}
    by_kind = {kind: part.set_index("seed")["accuracy"] for kind, part in aggregators.groupby("kind")}
    own, given_up = by_case["coformer"], model["accuracy"]
    alone = ablation[ablation["calibrated"].eq(True) & (ablation["part"] != "all")].groupby("seed")["accuracy"].max()
    whole, cut = _published("III", "original DeiT-B")[0], _published("III", "decomposed and aggregated")[0]
    published_alone = max(_published("III", "decomposed only (three sub-models)")[0])
    kinds = {kind: _published("IV", kind)[0] for kind in ("average", "attention", "senet", "coformer")}
    five = published("coformer_tables").query("table == 'V'").set_index("row")["accuracy_pct"].astype(float)
    rows = [
        _at_most("points given up by CoFormer (Table III)", 2, whole - cut, given_up - own),
        _above("points of aggregation over the best sub-model (Table III)", cut - published_alone, own - alone),
        _above("points of CoFormer's aggregator over the average (Table IV)", kinds["coformer"] - kinds["average"],
               by_kind["coformer"] - by_kind["average"]),
        _at_most("points of SENet over CoFormer's aggregator (Table IV)", 1, kinds["senet"] - kinds["coformer"],
                 by_kind["senet"] - by_kind["coformer"]),
        _above("points of CoFormer over DeViT's like sub-models", None, own - by_case["uniform"]),
        _above("points of CoFormer over one small model of equal FLOPs", None, own - by_case["1 device"]),
    ]  # fmt: skip
    if "4 devices" in by_case:
        lost = five["1 device"] - five["4 devices"]
        rows.append(_at_most("points lost with 4 devices (Table V)", 2, lost, given_up - by_case["4 devices"]))
    for rule, what in (("none", "equal weights"), ("published", "Eq. 13 as printed")):
        if f"rule {rule}" in by_case:
            rows.append(_above(f"points of boosting over {what}", None, own - by_case[f"rule {rule}"]))
    gone = missing[missing["missing"] > 0].groupby(["aggregator", "seed"])["accuracy"].mean()
    dropped = next(name for name in missing["aggregator"] if "drop" in name)
    claim = "points of training with lost devices, where one is lost"
    rows.append(_above(claim, None, gone[dropped] - gone["coformer"]))
    return rows


def _recipe_claims(model, best) -> list[Verdict]:
    (name,) = best["recipe"].dropna().unique()
    by_case = {case: part.set_index("seed")["accuracy"] for case, part in best.groupby("case")}
    own, known = by_case["coformer"], _published("III", "original DeiT-B")[0]
    known -= _published("III", "decomposed and aggregated")[0]
    return [
        _at_most(f"points given up by CoFormer, {name}", 2, known, model["accuracy"] - own),
        _above(f"points of CoFormer over DeViT's like sub-models, {name}", None, own - by_case["uniform"]),
        _above(f"points of CoFormer over one small model of equal FLOPs, {name}", None, own - by_case["1 device"]),
    ]


def _speed_claims(model, runs, latency) -> list[Verdict]:
    rows = latency[latency["kind"] == "predicted"]
    own = rows[(rows["method"] == "coformer-published") & rows["plan"].str.contains(POOLED)].set_index("bandwidth_mbps")
    decoupled = rows[rows["method"] == "bp+paper"].set_index("bandwidth_mbps")["latency_ms"]
    text = published("coformer_tables").query("table == 'text'").set_index("row")["latency_ms"].str.rstrip("x")
    text, made = text.astype(float), []
    for base, name in (("DeiT-B", "tx2"), ("Galaxy", "galaxy")):
        for mbps, words in ((100, "100 Mbps"), (1000, "1 Gbps")):
            obtained = own[f"speedup_over_{name}"].get(mbps)
            made.append(
                _published_claim(f"speedup over {base} at {words}", text[f"speedup over {base} at {words}"], obtained)
            )
    ratio = decoupled.get(1000, math.nan) / own["latency_ms"].get(1000, math.nan)
    stated = text["DeTransformer latency relative to CoFormer"]
    made.append(_published_claim("DeTransformer's latency over CoFormer's, at 1 Gbps", stated, ratio))
    implied = text["speedup over Galaxy at 1 Gbps"] / text["DeTransformer speedup over Galaxy"]
    claim = "the same, from the published speedups of both over Galaxy"
    made.append(Verdict(claim, stated, implied, "by construction"))
    alone_ms = _published("III", "original DeiT-B")[1]
    for mbps, words in ((100, "100 Mbps"), (1000, "1 Gbps")):
        slower = text[f"speedup over Galaxy at {words}"] / text[f"speedup over DeiT-B at {words}"]
        found = rows[(rows["method"] == "galaxy") & (rows["bandwidth_mbps"] == mbps)]["latency_ms"]
        obtained = found.iloc[0] if len(found) else None
        claim = f"Galaxy's latency in ms at {words}, from the published speedups"
        made.append(_published_claim(claim, slower * alone_ms, obtained, neutral=None))
    energy = published("coformer_tables").query("table == 'V'").set_index("row")["energy_mj"].astype(float)
    saved = 1 - own["energy_mj"].get(1000, math.nan) / model["energy_mj"]
    expected = 1 - energy["3 devices"] / energy["1 device"]
    made.append(_published_claim("energy saved against the TX2 alone (modelled)", expected, saved, neutral=0))
    like = runs.groupby("case")["latency_ms"].first()
    faster = like["1 device"] / like["coformer"]
    words = "speedup over one small model of equal FLOPs: of devices side by side alone"
    made.append(Verdict(words, 1.0, faster, "predicted", side="above"))
    words = "latency of DeViT's like sub-models over CoFormer's"
    return [*made, Verdict(words, 1.0, like["uniform"] / like["coformer"], "predicted", side="above")]


def _published_claim(claim: str, expected: float, obtained: float | None, neutral: float | None = 1.0) -> Verdict:
    obtained = math.nan if obtained is None else float(obtained)
    return Verdict(claim, expected, obtained, "predicted", neutral=neutral)


def _at_most(claim: str, limit: float, known: float, by_seed: pd.Series) -> Verdict:
    return _of_seeds(claim, limit, by_seed, "at most", f"published {known:.2f}")


def _above(claim: str, known: float | None, by_seed: pd.Series) -> Verdict:
    return _of_seeds(claim, 0.0, by_seed, "above", "" if known is None else f"published {known:.2f}")


def _of_seeds(claim: str, limit: float, by_seed: pd.Series, side: str, where: str) -> Verdict:
    """A mean over seeds against a limit, with its interval; one seed tests nothing."""
    by_seed = by_seed.dropna()
    error = by_seed.std(ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else math.nan
    low, high = around(by_seed.mean(), error)
    known = dict(low=low, high=high, tested=len(by_seed) > 1)
    return Verdict(claim, limit, by_seed.mean(), "measured", where, side=side, **known)


def _published(table: str, row: str) -> tuple:
    """(accuracy, latency in ms) of a row of published/coformer_tables.csv; lists where it has one a sub-model."""
    frame = published("coformer_tables").set_index(["table", "row"])
    cells = (frame.loc[(table, row), name] for name in ("accuracy_pct", "latency_ms"))
    return tuple(_numbers(cell) for cell in cells)


def _numbers(cell) -> float | list[float]:
    parts = [float(part) for part in str(cell).split("/")]
    return parts if len(parts) > 1 else parts[0]
