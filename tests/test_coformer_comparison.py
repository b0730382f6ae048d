"""CoFormer beside other methods: what is predicted at DeiT-B's size, and a row that is really measured."""

import method_rows as comparison
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from coformer_cases import DEIT, JETSONS, SMALL
from detransformer.coformer.policy import Policy, parameters
from detransformer.coformer.predictor import Latency
from detransformer.coformer.sampling import uniform_policy
from detransformer.models.sizes import embedding_parameters

UNIFORM = uniform_policy(SMALL, 3)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    policies = {"coformer": UNIFORM, "devit": UNIFORM, "small": Policy(UNIFORM.sub_models[:1])}
    return comparison.predicted_rows(policies, SMALL, JETSONS, [2, 100, 1000], DEIT)


def one(rows: pd.DataFrame, method: str, mbps: float, plan: str = "") -> pd.Series:
    found = rows[(rows["method"] == method) & (rows["bandwidth_mbps"] == mbps) & rows["plan"].str.contains(plan)]
    assert len(found) == 1
    return found.iloc[0]


def test_peers_keep_as_much_outside_their_layers_as_the_vit():
    configs = comparison.peer_configs(DEIT)
    assert embedding_parameters(configs["exact"]) <= DEIT.embedding_rows * 768
    assert embedding_parameters(configs["exact"]) == pytest.approx(DEIT.embedding_rows * 768, rel=1e-3)
    assert configs["decoupled"].num_divisions == 4 and parameters(DEIT.whole, DEIT) > 85e6


def test_single_devices_take_what_is_published_and_no_link(rows):
    alone = rows[rows["method"] == "single"]
    assert one(alone, "single", 100, "tx2")["latency_ms"] == pytest.approx(123.48, rel=1e-3)
    assert alone.groupby("plan")["latency_ms"].nunique().eq(1).all() and (alone["sent_kib"] == 0).all()


def test_the_unmodified_model_planned_on_one_device_is_that_device(rows):
    planned = one(rows, "auto", 2)
    assert planned["num_devices"] == 1
    assert planned["latency_ms"] == pytest.approx(one(rows, "single", 2, "tx2")["latency_ms"], rel=1e-3)


def test_galaxy_sends_much_and_ensembles_once(rows):
    slow, fast = (one(rows, "galaxy", mbps)["comm_ms"] for mbps in (100, 1000))
    assert 5 < slow / fast < 10.1
    assert one(rows, "galaxy", 100)["rounds"] > 40
    pooled, printed = (one(rows, "coformer", 100, words) for words in ("pooled", "all tokens"))
    assert pooled["rounds"] == 1 and printed["sent_kib"] == pytest.approx(197 * pooled["sent_kib"])
    assert pooled["latency_ms"] < printed["latency_ms"] and pooled["compute_ms"] < printed["compute_ms"]
    assert one(rows, "small", 100)["sent_kib"] == 0


def test_parts_add_up_and_kinds_are_named(rows):
    ensembles = rows[rows["answers"] == "boosted"]
    assert (ensembles["compute_ms"] + ensembles["comm_ms"]).to_numpy() == pytest.approx(ensembles["latency_ms"])
    assert set(rows.loc[rows["answers"] == "exact", "method"]) == {"single", "galaxy", "pp", "auto"}
    assert set(rows.loc[rows["answers"] == "decoupled", "method"]) == {"bp+paper", "bp+auto"}
    assert (rows[["energy_mj", "memory_mib"]] > 0).all().all() and set(rows["kind"]) == {"predicted"}


def test_energy_is_power_times_computing_seconds(rows):
    times = Latency((1.0, 2.0), (0.5, 0.0), 0.25, central=1)
    assert comparison.energy_j(times, (10.0, 4.0)) == pytest.approx(10 * 1.0 + 4 * 2.25)
    assert comparison.tdp_w(JETSONS) == (10.0, 15.0, 10.0)  # Table VII
    row = one(rows, "single", 100, "nano")
    assert row["energy_mj"] == pytest.approx(10 * row["latency_ms"])
    whole = one(rows, "pp", 100)
    assert whole["energy_mj"] < 15 * whole["compute_ms"]


def test_no_bandwidth_measures_nothing(tmp_path):
    assert not len(comparison.measured_rows(tmp_path, {"coformer": UNIFORM}, SMALL, JETSONS, []))


@pytest.mark.slow
def test_an_ensemble_and_a_peer_are_measured_alike_and_kept(tmp_path):
    sizes = dict(hidden_size=96, num_hidden_layers=6, num_attention_heads=6, intermediate_size=384)
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, vocab_size=60, max_position_embeddings=32)).save_pretrained(tmp_path / "bert")
    given = (tmp_path, {"coformer": UNIFORM}, SMALL, JETSONS, [1000])
    common = dict(methods=["single"], model=str(tmp_path / "bert"), seq_len=16, time_scale=64, transport="loopback")
    rows = comparison.measured_rows(*given, **common)
    assert list(rows["method"]) == ["single", "coformer"] and list(rows["answers"]) == ["exact", "boosted"]
    assert (rows["latency_ms"] > 0).all() and (rows["max_abs_error"] < 1e-4).all()
    assert rows["valid"].astype(bool).equals(rows["why_invalid"] == "")
    own = rows.iloc[1]
    assert own["num_devices"] == 3 and own["sent_kib"] == pytest.approx(4 * 32 / 1024)
    again = comparison.measured_rows(*given, **common)
    assert again["latency_ms"].tolist() == rows["latency_ms"].tolist()
