"""The experiments of notebooks 09 and 10 at small size, with real processes: what they list, measure and keep."""

from dataclasses import replace

import adaptive_studies as adaptive
import pytest
from generation_studies import generation_rows
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from detransformer.cluster.bench import Bench
from detransformer.models import decouple
from detransformer.models.configuration import preset_config
from detransformer.planning.placement import place, place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile

PI = DeviceProfile("pi", 4 * 2**30, 14e9, "assumed", 4.8e9)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A decoupled BERT of 4 layers."""
    config = BertConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, vocab_size=101
    )
    folder = tmp_path_factory.mktemp("small")
    decouple(BertModel(config).eval(), num_original_layers=2, num_divisions=4).save_pretrained(folder)
    return str(folder)


def test_contenders_differ_in_more_than_chunks():
    config = preset_config("bert-base", 4, 4)
    profile = ClusterProfile((PI,) * 4, LinkProfile(125e6))
    best = place_freely(config, profile)
    plans = adaptive.contenders(best, place(config, profile), num_rivals=3)
    assert plans[0].strategies == best.plan.strategies and {plan.method for plan in plans} == {"bp+auto"}
    kinds = [(plan.strategies, plan.device_ids) for plan in plans]
    assert len(set(kinds)) == len(kinds) and 4 <= len(plans) <= 5
    assert place(config, profile).plan.strategies in [plan.strategies for plan in plans]


def test_sizes_in_words():
    config = preset_config("bert-base", 4, 8)
    devices = tuple(replace(PI, flops_per_s=14e9 * speed) for speed in (1, 1, 2, 4))
    plan = place_freely(config, ClusterProfile(devices, LinkProfile(1e9))).plan
    assert adaptive.sizes_in_words(plan) == "tokens 1:1:2:4, heads 1+1+3+7, sub-blocks 1+1+2+4"


def test_collectives_count_as_the_busiest_device_saw_them():
    one = [("all_gather", 100, 0.2), ("all_to_all", 50, 0.1)]
    other = [("all_gather", 80, 0.1), ("all_to_all", 60, 0.3)]
    assert adaptive.as_transferred([one, other]) == [("all_gather", 100, 0.2), ("all_to_all", 60, 0.3)]


@pytest.mark.slow
def test_choices_are_measured_once(small, tmp_path, monkeypatch):
    """All contenders of each cell, equal to the single device; a second call takes the rows from the run's folder."""
    grid = ([small], [1000, 125], [16], [2])
    rows = adaptive.choice_rows(tmp_path, *grid, num_rivals=1, transport="loopback")
    assert rows.groupby("bandwidth_mbps")["chosen"].sum().to_dict() == {125: 1, 1000: 1}
    assert len(rows) >= 4 and (rows["max_abs_error"] < 1e-4).all() and list(rows) == list(adaptive.GRID_COLUMNS)
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("measured again"))
    again = adaptive.choice_rows(tmp_path, *grid, num_rivals=1, transport="loopback")
    assert again.equals(rows)
    cells = adaptive.choice_cells(rows.assign(valid=True))
    assert len(cells) == 2 and (cells["over_best"] >= 1).all()


def test_every_policy_serves_the_same_requests(small, tmp_path):
    sizes = dict(num_devices=2, seq_lens=(8, 16), transport="loopback", time_scale=4)
    rows = adaptive.trace_rows(tmp_path, [(3, 1000), (3, 125)], small, "rpi4b", **sizes)
    served = [part[["request", "seq_len", "bandwidth_mbps"]].to_numpy().tolist() for _, part in rows.groupby("policy")]
    assert "adaptive" in set(rows["policy"]) and all(part == served[0] for part in served)
    assert len(served[0]) == 6 and (rows["max_abs_error"] < 1e-4).all() and (rows["choosing_s"] < 0.005).all()


@pytest.mark.slow
def test_generated_rows_tell_equal_tokens(tmp_path):
    """On two processes: every token is the single device's."""
    config = GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=101, n_positions=64)
    folder = tmp_path / "gpt2"
    decouple(GPT2LMHeadModel(config).eval(), num_original_layers=2, num_divisions=4).save_pretrained(folder)
    sizes = dict(prompt_lens=[4], max_new_tokens=6, transport="loopback")
    rows = generation_rows(tmp_path, str(folder), ["bp+auto"], [1000], 2, **sizes)
    assert rows["equal_tokens"].tolist() == rows["new_tokens"].tolist() == [6]
    original = tmp_path / "original"
    GPT2LMHeadModel(config).eval().save_pretrained(original)
    single = generation_rows(tmp_path, str(original), ["single"], [1000], 2, **sizes)
    assert single["equal_tokens"].tolist() == [6], "one device works, the cluster has two"
    assert rows["token_plan"].tolist() and (rows["predicted_token_s"] < rows["predicted_first_token_s"]).all()
