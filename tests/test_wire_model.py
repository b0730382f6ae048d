"""A wired model computes what the executor's devices compute over real messages, and is left as it was."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from conftest import SIZES
from detransformer.models import decouple, preset_config
from detransformer.parallel.plan import check_plan, layer_plan, published_plan
from detransformer.parallel.wire import TOKEN_FORMATS
from detransformer.parallel.wire_model import wire_plan, wired
from parity import TOLERANCE, UNEVEN, in_turn, run_plan

ORIGINAL = ("tp", "sp", "ulysses", "galaxy")
BLOCKS = ("bp+tp", "bp+sp", "bp+allgather", "bp+ulysses", "bp+heads")
WIRES = ("float32", "bfloat16", "int8", "int4")


@torch.no_grad()
def check(cluster, case, plan, folder, inputs=None):
    """What it gives is what real processes give: the same operations in the same order, but for gloo's all_reduce."""
    inputs, output = inputs or case.inputs, folder / "output.safetensors"
    with wired(case.model, plan) as model:
        ours = model(**load_file(inputs))
    run_plan(cluster, case, plan, inputs=inputs, reference=None, output=str(output))
    for name, expected in load_file(output).items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=TOLERANCE)
    return ours


@pytest.mark.parametrize("num_devices", [2, 3, 4])
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "model, method", [("original", m) for m in ORIGINAL] + [("decoupled", m) for m in BLOCKS] + [("narrow", "bp+heads")]
)
def test_it_is_what_devices_compute(cluster, cases, tmp_path, model, method, wire, num_devices):
    case = cases[model]
    ours = check(cluster, case, published_plan(method, case.config, UNEVEN[num_devices], wire), tmp_path)
    plain = case.model(**load_file(case.inputs))
    error = (ours.last_hidden_state - plain.last_hidden_state).abs().max()
    assert error < TOLERANCE if wire == "float32" else error > 1e-6


@pytest.mark.parametrize("wire", TOKEN_FORMATS)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_approximate_tokens_are_those_of_other_devices_alone(cluster, cases, tmp_path, wire, num_chunks):
    """As devices compute it; one device knows all tokens, and what travels besides K and V is int8."""
    case = cases["original"]
    plan = replace(published_plan("sp", case.config, UNEVEN[3], wire), num_chunks=num_chunks)
    ours = check(cluster, case, plan, tmp_path)
    plain = case.model(**load_file(case.inputs)).last_hidden_state
    assert 1e-5 < ((ours.last_hidden_state - plain).square().mean() / plain.square().mean()).sqrt() < 1
    for method, devices in (("tp", 3), ("ulysses", 3), ("sp", 1)):
        ours, rounded = (
            check(cluster, case, published_plan(method, case.config, UNEVEN[devices], name), tmp_path)
            for name in (wire, "int8")
        )
        assert torch.equal(ours.last_hidden_state, rounded.last_hidden_state)


@pytest.mark.parametrize("first, last", [("ulysses", "tensor"), ("heads", "sequence"), ("replicate", "ulysses")])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_mixed_plans_as_the_planner_makes_them(cluster, cases, tmp_path, first, last, num_chunks):
    case = cases["decoupled"]
    names = in_turn(case.config, first, last)
    plan = layer_plan("bp+auto", case.config, names, UNEVEN[3], "int8", num_chunks=num_chunks)
    check(cluster, case, plan, tmp_path)


@pytest.mark.parametrize("batch_size, seq_len", [(1, 1), (3, 2), (2, 7), (4, 33)])
@pytest.mark.parametrize("model", ["original", "decoupled"])
def test_splits_follow_each_request(cluster, cases, tmp_path, model, batch_size, seq_len):
    """7 tokens over 4 devices are 2, 2, 2 and 1, and with fewer tokens than devices some have none."""
    case = cases[model]
    inputs, _ = case.request(tmp_path, batch_size, seq_len)
    check(cluster, case, wire_plan(case.config), tmp_path, inputs)


@pytest.mark.parametrize("base", [BertForMaskedLM, BertForSequenceClassification, BertForQuestionAnswering])
@torch.no_grad()
def test_heads_read_the_rounded_output(base):
    torch.manual_seed(0)
    original = base(BertConfig(**SIZES)).eval()
    for model in (original, decouple(original, 2, 4), decouple(original, 2, 4, original_placement="bottom")):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for seq_len in (12, 5):
            ids = torch.randint(101, (3, seq_len))
            mask = (torch.arange(seq_len) < torch.tensor([[seq_len], [3], [1]])).long()
            plain = model(ids, attention_mask=mask)[0]
            for wire, least, most in (("float32", 0, 1e-5), ("bfloat16", 1e-6, 0.3), ("int8", 1e-6, 0.3)):
                with wired(model, wire_plan(model.config, wire=wire)):
                    ours = model(ids, attention_mask=mask)[0]
                error = ((ours - plain).square().mean() / plain.square().mean()).sqrt()
                assert least <= error < most
        assert torch.equal(model(ids, attention_mask=mask)[0], plain)  # as it was
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_is_left_behind(cases):
    model, threads, running = cases["original"].model, torch.get_num_threads(), threading.active_count()
    ids = torch.randint(101, (2, 9))
    with pytest.raises(RuntimeError, match="of the caller"), wired(model, wire_plan(model.config)):
        model(ids)
        raise RuntimeError("of the caller")
    assert "forward" not in vars(model) and threading.active_count() == running
    assert torch.get_num_threads() == threads


def test_it_may_be_called_again_after_a_bad_request(cases):
    model = cases["decoupled"].model
    with torch.no_grad(), wired(model, wire_plan(model.config)):
        expected = model(torch.zeros(1, 4, dtype=torch.long))[0]
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 1000))
        with pytest.raises(ValueError, match="above the model's 512"):
            model(torch.zeros(1, 600, dtype=torch.long))
        assert torch.equal(model(torch.zeros(1, 4, dtype=torch.long))[0], expected)


def test_outputs_may_be_trained_on(cases):
    """What comes out is an ordinary tensor: a fresh head behind it has gradients."""
    model, head = cases["original"].model, torch.nn.Linear(48, 2).double()
    with wired(model, wire_plan(model.config)):
        head(model(torch.zeros(1, 4, dtype=torch.long))[0]).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    "num_divisions, heads, expected", [(4, 12, 4), (2, 12, 2), (8, 12, 4), (None, 12, 4), (4, 2, 4)]
)
def test_the_plan_for_scores(num_divisions, heads, expected):
    config = preset_config("bert-base") if num_divisions is None else preset_config("bert-base", 4, num_divisions)
    config.num_attention_heads = heads
    plan = wire_plan(config, wire="bfloat16")
    check_plan(plan, config)
    assert plan.num_devices == expected and plan.wire == "bfloat16" and plan == wire_plan(config, wire="bfloat16")
    original = "heads" if heads >= expected else "sequence"
    assert plan.strategies.count(original) == (4 if num_divisions else 12)
    assert "sequence" in wire_plan(config, wire="means8").strategies


def test_what_cannot_be_wired_is_one_sentence(cases):
    model, config = cases["original"].model, cases["original"].config
    ids = torch.zeros(1, 4, dtype=torch.long)
    gpt2 = GPT2Model(GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=101))
    for made, plan, words in (
        (gpt2, wire_plan(config), "GPT2Model is no BERT"),
        (model, published_plan("pp", config, [1.0] * 2), "share no layer"),
        (model, wire_plan(cases["decoupled"].config), "is for decoupled layers"),
    ):
        with pytest.raises(ValueError, match=words), wired(made, plan):
            pass
    with wired(model, wire_plan(config)):
        for request, words in (
            (dict(inputs_embeds=torch.zeros(1, 4, 48), input_ids=None), "leave out inputs_embeds"),
            (dict(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4)), "has 4 axes"),
            (dict(input_ids=ids, output_hidden_states=True), "leave out output_hidden_states"),
        ):
            with pytest.raises(ValueError, match=words):
                model(**request)
    with (
        pytest.raises(ValueError, match="only infers"),
        wired(BertModel(config).train(), wire_plan(config)) as training,
    ):
        training(ids)
