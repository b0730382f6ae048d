"""Where original layers stand: kinds, conversion, and models whose last layer is decoupled: run, priced, planned."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertModel

from conftest import SIZES, Case
from detransformer.checkpoints import decouple_checkpoint
from detransformer.cluster.devices import preset_profile
from detransformer.models import DecoupledBertConfig, DecoupledBertModel, decouple, layer_kinds
from detransformer.models.configuration import ORIGINAL_PLACEMENTS, decoupled_config
from detransformer.models.overview import layer_pattern
from detransformer.parallel.plan import check_plan, layer_plan, published_plan, strategies_for
from detransformer.planning.cost import predict
from detransformer.planning.placement import bottleneck, place, place_freely
from detransformer.planning.profile import ClusterProfile, LinkProfile
from parity import STRATEGIES_OF_ORIGINAL, TOLERANCE, UNEVEN, check_run, run_plan, saved_case

PLACES = ("first", "bottom", "middle")  # those whose last layer is decoupled
METHODS = ("single", "bp+tp", "bp+sp", "bp+allgather", "bp+ulysses", "bp+heads")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Case]:
    """O D D O D, O O D D D and D O O D D with random weights, biases and LayerNorms."""
    folder = tmp_path_factory.mktemp("placements")
    torch.manual_seed(3)
    bert = BertModel(BertConfig(**SIZES)).double().eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {name: Case(folder / name, decouple(bert, 2, 4, original_placement=name)) for name in PLACES}


@pytest.mark.parametrize(
    "num_layers, num_original, placement, expected",
    [
        (12, 4, "last", "DDO DDO DDO DDO"),
        (12, 4, "first", "ODD ODD ODD ODD"),
        (12, 4, "bottom", "OOOODDDDDDDD"),
        (12, 4, "middle", "DDDDOOOODDDD"),
        (12, 4, "top", "DDDDDDDDOOOO"),
        (12, 3, "middle", "DDDDOOODDDDD"),
        (5, 2, "first", "ODD OD"),
        (5, 2, "last", "DDO DO"),
    ],
)
def test_where_original_layers_stand(num_layers, num_original, placement, expected):
    config = DecoupledBertConfig(
        num_hidden_layers=num_layers, num_original_layers=num_original, original_placement=placement
    )
    assert layer_pattern(config) == expected


def test_placements_have_as_many_original_layers_and_keep_the_groups():
    for num_layers, placement in itertools.product(range(1, 14), ORIGINAL_PLACEMENTS):
        for num_original in range(1, num_layers + 1):
            config = DecoupledBertConfig(
                num_hidden_layers=num_layers, num_original_layers=num_original, original_placement=placement
            )
            assert layer_kinds(config).count("original") == num_original
            if placement == "last":  # as released, and as checkpoints without the field mean it
                ends = [
                    (i + 1) * num_original // num_layers > i * num_original // num_layers for i in range(num_layers)
                ]
                assert [kind == "original" for kind in layer_kinds(config)] == ends


def test_a_checkpoint_without_the_field_is_the_published_structure(tmp_path):
    model = decouple(BertModel(BertConfig(**SIZES)), 2, 4)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("original_placement") == "last"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    reloaded = DecoupledBertModel.from_pretrained(tmp_path)
    assert layer_kinds(reloaded.config) == layer_kinds(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))


@pytest.mark.parametrize("placement", ORIGINAL_PLACEMENTS)
def test_one_division_is_bert_wherever_original_layers_stand(placement):
    torch.manual_seed(0)
    bert, ids = BertModel(BertConfig(**SIZES)).eval(), torch.randint(101, (2, 9))
    ours = decouple(bert, 2, 1, original_placement=placement)(ids)
    torch.testing.assert_close(ours.last_hidden_state, bert(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_bad_placement_is_one_sentence():
    with pytest.raises(StrictDataclassFieldValidationError, match="'original_placement' expected one of .*, got outer"):
        DecoupledBertConfig(original_placement="outer")


def test_a_checkpoint_is_converted_so(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    said = []
    decouple_checkpoint(str(tmp_path / "bert"), tmp_path / "ours", 2, 4, say=said.append, original_placement="first")
    assert "original layers first" in said[1]
    model = DecoupledBertModel.from_pretrained(tmp_path / "ours")
    assert layer_pattern(model.config) == "ODD OD"


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("method", [*METHODS, "pp"])
@pytest.mark.parametrize("place_", PLACES)
def test_plan_equals_single_device(cluster, places, place_, method, num_devices):
    case = places[place_]
    plan = published_plan(method, case.config, UNEVEN[num_devices])
    check_run(cluster, case, plan)


@pytest.mark.parametrize("strategy", STRATEGIES_OF_ORIGINAL)
def test_chunks_and_devices_without_sub_blocks(cluster, places, strategy):
    case = places["first"]
    plan = layer_plan("bp+auto", case.config, strategies_for(case.config, strategy), UNEVEN[4], num_chunks=3)
    check_run(cluster, case, plan)
    plan = replace(plan, sub_blocks=(2, 0, 1, 1))
    assert max(r["max_abs_error"] for r in run_plan(cluster, case, plan)) < TOLERANCE


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_the_last_reshard_is_compressed_too(cluster, places, wire):
    case = places["bottom"]
    results = run_plan(cluster, case, published_plan("bp+tp", case.config, UNEVEN[3], wire))
    assert TOLERANCE < max(r["relative_error"] for r in results) < 0.05  # as in test_parallel


@pytest.mark.parametrize("base", [BertForSequenceClassification, BertForQuestionAnswering])
def test_task_heads_after_a_decoupled_layer(cluster, tmp_path, base):
    torch.manual_seed(1)
    model = decouple(base(BertConfig(**SIZES)).double().eval(), 2, 4, original_placement="bottom")
    ids = torch.randint(101, (2, 9))
    with torch.no_grad():
        expected = model(ids)
    if base is BertForQuestionAnswering:
        expected = torch.stack([expected.start_logits, expected.end_logits], dim=-1)
    else:
        expected = expected.logits
    case = saved_case(tmp_path, model, {"input_ids": ids}, {"logits": expected})
    for method, num_devices in (("single", 1), ("bp+heads", 4)):
        results = run_plan(cluster, case, published_plan(method, model.config, UNEVEN[num_devices]))
        assert max(r["max_abs_error"] for r in results) < TOLERANCE


@pytest.mark.parametrize("method", ["bp+tp", "bp+heads"])
def test_gpt2_that_ends_in_a_decoupled_layer_writes_the_same_text(cluster, random_gpt2, tmp_path, method):
    sizes = dict(n_embd=48, n_layer=5, n_head=6, n_inner=70, vocab_size=101, n_positions=64)
    model = decouple(random_gpt2(sizes), 2, 4, original_placement="first")
    ids = torch.randint(101, (2, 9))
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 9:]
    with torch.no_grad():
        expected = {"last_hidden_state": model.transformer(ids).last_hidden_state}
    case = saved_case(tmp_path, model, {"input_ids": ids}, expected)
    prompt, decode = (published_plan(name, model.config, UNEVEN[3]) for name in (method, "bp+tp"))
    assert max(r["max_abs_error"] for r in run_plan(cluster, case, prompt)) < 1e-11
    plans = dict(prefill=prompt.to_dict(), decode=decode.to_dict())
    files = dict(checkpoint=case.checkpoint, inputs=case.inputs)
    results = cluster.run("generate", **files, **plans, max_new_tokens=8, dtype="float64")
    assert all(r["tokens"] == text.tolist() for r in results if r)


# Prices and plans ------------------------------------------------------------------------------------------------


def profiled(config, mbps=50.0, count=4):
    return ClusterProfile((preset_profile("rpi4b", config),) * count, LinkProfile(mbps * 1e6))


@pytest.mark.parametrize("placement", ORIGINAL_PLACEMENTS)
def test_the_planner_finds_a_plan_wherever_original_layers_stand(placement):
    small = BertConfig(hidden_size=96, num_hidden_layers=5, num_attention_heads=6, intermediate_size=384)
    config = decoupled_config(small, 2, 4, original_placement=placement)
    profile = profiled(config)
    found = place_freely(config, profile, 32)
    check_plan(found.plan, config)
    published = place(config, profile, 32)
    assert found.chosen.latency_s <= published.chosen.latency_s
    assert bottleneck(found.plan, config, profile, 32).startswith("Bottleneck: ")


def test_adjacent_original_layers_need_fewer_reshards():
    """As many original layers in a row are entered and left once, in groups twice each but for the ends."""
    counts = {}
    for placement in ORIGINAL_PLACEMENTS:
        config = decoupled_config(BertConfig(), 4, 4, original_placement=placement)
        plan = published_plan("bp+allgather", config, [1.0] * 4)
        counts[placement] = predict(config, plan, profiled(config), 128).counts["all_gather"]
    assert counts == {"last": 4, "first": 4, "bottom": 1, "middle": 2, "top": 1}
