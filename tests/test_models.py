"""Decoupled BERT: equals BertModel where it must, counts what the paper counts, converts and reloads."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
)

from detransformer.models import DecoupledBertConfig, DecoupledBertModel, decouple, layer_kinds, preset_config
from detransformer.models.conversion import slice_parameter
from detransformer.models.sizes import layer_flops, model_parameters

SMALL = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, vocab_size=100)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases and LayerNorms too
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    types = torch.zeros(2, 11, dtype=torch.long)
    types[:, 5:] = 1
    ids = torch.randint(SMALL["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def test_decoupled_layer_is_equation_2(bert, batch):
    """One decoupled layer against sub-blocks written out one by one from the original's slices."""
    decoupled = decouple(bert, num_original_layers=1, num_divisions=4)
    layer, original = decoupled.encoder.layer[0], bert.encoder.layer[0]
    x = torch.randn(2, 5, 48)
    outputs = []
    for p, part in enumerate(x.split(12, dim=-1)):
        rows = slice(12 * p, 12 * p + 12)
        attention = original.attention

        def heads(linear, part=part, rows=rows):
            projected = part @ linear.weight[:, rows].T + linear.bias
            return projected.view(2, 5, 3, 16).transpose(1, 2)

        q, k, v = heads(attention.self.query), heads(attention.self.key), heads(attention.self.value)
        context = ((q @ k.transpose(2, 3) / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 48)
        out, norm = attention.output.dense, attention.output.LayerNorm
        z = context @ out.weight[rows].T + out.bias[rows] + part
        z = torch.nn.functional.layer_norm(z, (12,), norm.weight[rows], norm.bias[rows], norm.eps)
        first, second, norm = original.intermediate.dense, original.output.dense, original.output.LayerNorm
        inner = torch.nn.functional.gelu(z @ first.weight[:, rows].T + first.bias)
        y = inner @ second.weight[rows].T + second.bias[rows] + z
        outputs.append(torch.nn.functional.layer_norm(y, (12,), norm.weight[rows], norm.bias[rows], norm.eps))
    torch.testing.assert_close(layer(x), torch.cat(outputs, dim=-1), rtol=0, atol=1e-5)


def test_parameter_counts_of_the_paper():
    original, decoupled = preset_config("bert-base"), preset_config("bert-base", num_original_layers=4)
    assert round(model_parameters(original) / 1e6, 2) == 109.48
    assert round(model_parameters(decoupled) / 1e6, 2) == 109.61


@pytest.mark.parametrize("width", ["full", "narrow"])
@pytest.mark.parametrize("divisions", [1, 2, 4])
def test_counted_parameters_are_the_models(divisions, width):
    sizes = SMALL | dict(num_attention_heads=6, hidden_size=96)
    config = DecoupledBertConfig(**sizes, num_original_layers=2, num_divisions=divisions, attention_width=width)
    model = DecoupledBertModel(config)
    assert sum(p.numel() for p in model.parameters()) == model_parameters(config)


def test_flops_ratio_of_a_decoupled_layer():
    config = preset_config("bert-base", num_original_layers=4, num_divisions=4)
    ratios = [layer_flops(config, "decoupled", t) / layer_flops(config, "original", t) for t in (128, 384, 512)]
    assert [round(r, 2) for r in ratios] == [1.08, 1.23, 1.30]
    narrow = preset_config("bert-base", 4, 4, "narrow")
    assert round(layer_flops(narrow, "decoupled", 128) / layer_flops(narrow, "original", 128), 3) == 0.757


@pytest.mark.parametrize(
    "num_layers, num_original, expected",
    [(12, 4, "DDODDODDODDO"), (12, 1, "DDDDDDDDDDDO"), (12, 12, "OOOOOOOOOOOO"), (5, 2, "DDODO"), (24, 6, "DDDO" * 6)],
)
def test_the_last_layer_of_each_group_is_original(num_layers, num_original, expected):
    config = DecoupledBertConfig(num_hidden_layers=num_layers, num_original_layers=num_original)
    assert "".join(kind[0].upper() for kind in layer_kinds(config)) == expected


def test_masked_tokens_do_not_matter(bert, batch):
    decoupled = decouple(bert, 2, 4)
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1, 7:] = 5
    ours, other = decoupled(**batch).last_hidden_state, decoupled(**changed).last_hidden_state
    torch.testing.assert_close(ours[1, :7], other[1, :7], rtol=0, atol=1e-6)


def test_attentions_are_the_mean_over_sub_blocks(bert, batch):
    eager = decouple(bert, 2, 4)
    eager.set_attn_implementation("eager")
    output = eager(**batch, output_hidden_states=True, output_attentions=True)
    layer, mask = eager.encoder.layer[0].attention.self, batch["attention_mask"].bool()
    weights = []  # of each sub-block, written out
    for p, part in enumerate(output.hidden_states[0].split(12, dim=-1)):
        q, k = (
            (part @ linear.weight[p].T + linear.bias[p]).view(2, 11, 3, 16).transpose(1, 2)
            for linear in (layer.query, layer.key)
        )
        weights.append((q @ k.transpose(2, 3) / 4).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1))
    torch.testing.assert_close(output.attentions[0], torch.stack(weights).mean(0), rtol=0, atol=1e-5)


def test_narrow_slices_keep_a_part_of_every_head():
    config = DecoupledBertConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_original_layers=1,
        num_divisions=2,
        attention_width="narrow",
    )
    weight = torch.arange(64.0).view(8, 8)
    sliced = slice_parameter("attention.self.query.weight", weight, config)
    assert torch.equal(sliced[0], weight[[0, 1, 4, 5]][:, :4])
    assert torch.equal(sliced[1], weight[[2, 3, 6, 7]][:, 4:])
    sliced = slice_parameter("attention.output.dense.weight", weight, config)
    assert torch.equal(sliced[1], weight[4:][:, [2, 3, 6, 7]])


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_divisions=5), "num_divisions=5 does not divide hidden_size=768"),
        (dict(num_original_layers=0), "num_original_layers=0 is outside 1..12"),
        (dict(num_original_layers=13), "outside 1..12"),
        (dict(num_divisions=3, attention_width="narrow"), "does not divide the head size 64"),
    ],
)
def test_bad_sizes_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        DecoupledBertConfig(**fields)


def test_only_original_bert_is_decoupled(bert):
    with pytest.raises(ValueError, match="DecoupledBertModel cannot be decoupled"):
        decouple(decouple(bert, 2, 4))
