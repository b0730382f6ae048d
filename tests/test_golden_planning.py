"""Prices and choices of plans, held to those of the cost model before it read the executor's own tape (tests/golden).

`prices.csv`: a random part of all published plans, on one to four devices, equal and 1:1:2:4, in 1, 2 and 4 chunks, on
all wires, at both paces. `choices.csv`: plans chosen over a grid, and for the conditions of three tables of the
reference run.
"""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from detransformer.cluster.devices import DeviceSpec, cluster_profile
from detransformer.models.configuration import is_decoder, preset_config
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import predict
from detransformer.planning.memory import held_bytes
from detransformer.planning.placement import method_plan
from detransformer.planning.problem import device_speeds
from detransformer.planning.profile import ClusterProfile

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(__file__).parents[1] / "results" / "reference"
MODELS = {  # name -> preset, layers that stay original, attention width
    "bert-base": ("bert-base", None, "full"),
    "bert-base 4": ("bert-base", 4, "full"),
    "bert-base narrow": ("bert-base", 4, "narrow"),
    "bert-large": ("bert-large", None, "full"),
    "bert-large 4": ("bert-large", 4, "full"),
    "gpt2": ("gpt2", None, "full"),
    "gpt2 4": ("gpt2", 4, "full"),
}


def rows_of(name: str) -> list[dict]:
    with open(GOLDEN / name, newline="") as file:
        return list(csv.DictReader(file))


def profile_of(config, row, shares=None) -> ClusterProfile:
    speeds = [float(speed) for speed in row["split"].split(":")]
    shares = [1.0, 0.5, 0.25, 1.0] if shares else [1.0] * 4
    specs = [DeviceSpec(speed=speed, link_share=share) for speed, share in zip(speeds, shares, strict=False)]
    return cluster_profile(specs, config, 1e6 * float(row["mbps"]), pace=row["pace"])


def check_price(row: dict) -> None:
    preset, num_original, width = MODELS[row["model"]]
    config = preset_config(preset, num_original, 4, width)
    profile = profile_of(config, row, row["shares"])
    plan = published_plan(row["method"], config, device_speeds(profile), row["wire"])
    plan = replace(plan, num_chunks=int(row["num_chunks"]))
    found = predict(config, plan, profile, int(row["seq_len"]), int(row["batch_size"]), int(row["past"]))
    assert found.latency_s == pytest.approx(float(row["latency_s"]), rel=1e-9)
    assert found.compute_s == pytest.approx(float(row["compute_s"]), rel=1e-9)
    assert " ".join(f"{kind}={n}" for kind, n in sorted(found.counts.items())) == row["counts"]
    assert sum(found.bytes.values()) == int(row["bytes"])
    if plan.stages and is_decoder(config):
        return  # the last stage reads the vocabulary too, the first no last LayerNorm: not counted so before
    assert [held_bytes(config, [plan], d) // 4 for d in plan.device_ids] == [int(n) for n in row["parameters"].split()]
    assert list(found.memory_bytes) == [int(n) for n in row["memory_bytes"].split()]


@pytest.mark.parametrize("model", MODELS)
def test_prices_are_what_they_were(model):
    for row in rows_of("prices.csv"):
        if row["model"] == model:
            try:
                check_price(row)
            except AssertionError as error:
                raise AssertionError(f"{row}: {error}") from error


@pytest.mark.parametrize("source", ["grid", "plan_map", "choices", "latency"])
@pytest.mark.slow
def test_choices_are_no_slower_than_they_were(source):
    for row in rows_of("choices.csv"):
        if row["source"] != source:
            continue
        config = preset_config(row["model"], None if row["method"] == "auto" else 4, 4)
        profile = profile_of(config, row)
        if source != "grid":
            link = ClusterProfile.load(REFERENCE / "profiles" / f"{row['model']}.json").link
            profile = ClusterProfile(profile.devices, link.at(1e6 * float(row["mbps"])))
        seq_len = int(row["seq_len"])
        plan = method_plan(row["method"], config, profile, seq_len=seq_len)
        seconds = predict(config, plan, profile, seq_len).latency_s
        assert seconds <= (1 + 1e-9) * float(row["latency_s"]), f"{row}: {plan.describe()}"
