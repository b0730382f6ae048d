"""Sub-models: a full-size one is the original, a smaller one is the original with the other parts taken out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    ViTForImageClassification,
)

from coformer_cases import BERT, CONFIGS, UNEQUAL, random_model
from detransformer.coformer.decomposer import choose_layers, choose_parts, deal, decompose, magnitude_importance
from detransformer.coformer.policy import Original, Policy, SubModelConfig, parameters
from detransformer.coformer.sampling import sample_policy
from detransformer.coformer.submodels import CoformerBertConfig, CoformerBertForSequenceClassification, sizes_of
from detransformer.models.naming import layers_of, naming_of

AUTO_CLASS = {
    BertForSequenceClassification: AutoModelForSequenceClassification,
    GPT2ForSequenceClassification: AutoModelForSequenceClassification,
    ViTForImageClassification: AutoModelForImageClassification,
}
# float64: where a weight lies in memory changes the order of a product's sums, and so the last bits.
EXACT = dict(rtol=0, atol=1e-12)
EACH_CLASS = pytest.mark.parametrize("model_class", CONFIGS, ids=lambda c: c.__name__)
pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(model):
    generator = torch.Generator().manual_seed(7)
    if model.config.model_type.endswith("vit"):
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64)}
    ids = torch.randint(1, 101, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output_of(model):
    with torch.no_grad():
        return model(**inputs_of(model))[0]


@EACH_CLASS
def test_one_sub_model_of_the_full_size_is_the_original(model_class):
    model = random_model(model_class)
    (whole,) = decompose(model, Policy((Original.of(model.config).whole,)))
    for name, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
    torch.testing.assert_close(output_of(whole), output_of(model), **EXACT)


@EACH_CLASS
def test_sub_models_have_the_sizes_of_their_policy_and_are_saved_and_loaded(model_class, tmp_path):
    model = random_model(model_class)
    original = Original.of(model.config, 9 if model_class is not ViTForImageClassification else None)
    for sizes, sub_model in zip(UNEQUAL.sub_models, decompose(model, UNEQUAL), strict=True):
        assert sizes_of(sub_model.config) == sizes
        assert sum(p.numel() for p in sub_model.base_model.parameters()) == parameters(sizes, original)
        hidden = sub_model.base_model(**inputs_of(model)).last_hidden_state
        assert hidden.shape == (2, original.seq_len, sizes.hidden_size)
        sub_model.save_pretrained(tmp_path)
        for loaded in (
            type(sub_model).from_pretrained(tmp_path, dtype=torch.float64),
            AUTO_CLASS[model_class].from_pretrained(tmp_path, dtype=torch.float64),
        ):
            assert type(loaded) is type(sub_model) and isinstance(loaded, model_class)
            torch.testing.assert_close(output_of(loaded), output_of(sub_model), **EXACT)


@EACH_CLASS
def test_taking_heads_ffn_and_layers_is_switching_the_others_off(model_class):
    """At the full embedding width, for which LayerNorms are the original's."""
    model = random_model(model_class)
    sizes = SubModelConfig(3, 48, (1, 3, 2), (17, 9, 30))
    (parts,) = choose_parts(magnitude_importance(model), Policy((sizes,)))
    (sub_model,) = decompose(model, Policy((sizes,)))
    naming, layers = naming_of(model.config), layers_of(model.base_model)
    for layer, heads, ffn in zip((layers[i] for i in parts.layers), parts.heads, parts.ffn, strict=True):
        columns = [c for head in heads for c in range(8 * head, 8 * head + 8)]
        for name, inner in ((naming.out, columns), (naming.ffn_out, ffn)):
            weight = layer.get_submodule(name).weight.data
            by_input = weight if naming.input_major else weight.T
            by_input[np.setdiff1d(np.arange(len(by_input)), inner)] = 0
    for i in sorted(set(range(5)) - set(parts.layers), reverse=True):
        del layers[i]
    torch.testing.assert_close(output_of(sub_model), output_of(model), **EXACT)


def test_a_sub_model_as_wide_as_its_heads_is_a_plain_smaller_model():
    model = random_model(BertForSequenceClassification)
    sizes = SubModelConfig(2, 16, (2, 2), (30, 30))
    (sub_model,) = decompose(model, Policy((sizes,)))
    plain = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=30, vocab_size=101,
                   num_labels=3)
    ).double().eval()  # fmt: skip
    plain.load_state_dict(sub_model.state_dict())
    torch.testing.assert_close(output_of(sub_model), output_of(plain), **EXACT)


def test_outputs_attentions_and_the_choice_of_attention_are_those_of_transformers():
    model = random_model(BertForSequenceClassification)
    sub_model = decompose(model, UNEQUAL)[0]
    fused = output_of(sub_model)
    sub_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = sub_model(**inputs_of(model), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.logits, fused)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 9, 20)] * 4
    assert [tuple(a.shape) for a in output.attentions] == [(2, 1, 9, 9), (2, 3, 9, 9), (2, 2, 9, 9)]


@EACH_CLASS
def test_sub_models_train(model_class):
    sub_model = decompose(random_model(model_class), UNEQUAL)[0].train()
    assert sub_model.training
    sub_model(**inputs_of(sub_model), labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, p in sub_model.named_parameters() if p.grad is None] == []


def test_new_sub_models_have_weights_of_the_usual_size():
    config = CoformerBertConfig(**BERT.to_dict(), layer_heads=[1, 2, 3, 4, 5], layer_ffn_sizes=[9] * 5)
    model = CoformerBertForSequenceClassification(config).bert
    assert model.encoder.layer[3].attention.self.query.weight.shape == (32, 48)
    assert 0.01 < float(model.encoder.layer[3].attention.output.dense.weight.detach().std()) < 0.03


# Parts -----------------------------------------------------------------------------------------------------------


def test_dealing_gives_each_important_items_and_none_twice():
    scores = np.array([5.0, 9.0, 1.0, 7.0, 3.0, 8.0])
    small, large = deal(scores, [2, 3])
    assert small.tolist() == [1, 3] and large.tolist() == [0, 4, 5]  # 9 and 7; 8, 5 and 3; the 1 is left over
    assert deal(scores, [2, 3], first=1)[1].tolist() == [1, 3, 4]


def test_dealing_shares_only_what_is_not_enough():
    first, second = deal(np.arange(4.0), [3, 3])
    assert len(set(first)) == len(set(second)) == 3
    assert set(first) | set(second) == {0, 1, 2, 3}
    assert [hand.tolist() for hand in deal(np.arange(2.0), [2, 2])] == [[0, 1], [0, 1]]


def test_layers_are_spread():
    assert choose_layers(5, 3).tolist() == [0, 2, 4] and choose_layers(5, 1).tolist() == [0]
    assert choose_layers(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert all(len(set(choose_layers(24, n))) == n for n in range(1, 25))


def test_sub_models_take_different_parts():
    model = random_model(BertForSequenceClassification)
    original = Original.of(model.config)
    rng = np.random.default_rng(0)
    importance = magnitude_importance(model)
    for _ in range(10):
        policy = sample_policy(rng, original, None, 3)
        policy = Policy(tuple(replace(c, num_layers=1, num_heads=c.num_heads[:1], ffn_sizes=c.ffn_sizes[:1])
                              for c in policy.sub_models))  # fmt: skip
        parts = choose_parts(importance, policy)
        for taken in ([p.dims for p in parts], [p.heads[0] for p in parts], [p.ffn[0] for p in parts]):
            together = np.concatenate(taken)
            assert len(together) == len(set(together))


def test_importance_is_the_norm_of_what_reads_and_writes_a_part():
    model = random_model(BertForSequenceClassification)
    layer, importance = model.bert.encoder.layer[2], magnitude_importance(model)
    attention = layer.attention
    rows = [m.weight[8:16] for m in (attention.self.query, attention.self.key, attention.self.value)]
    biases = [m.bias[8:16] for m in (attention.self.query, attention.self.key, attention.self.value)]
    numbers = [*rows, *biases, attention.output.dense.weight[:, 8:16]]
    expected = sum(float(n.detach().square().sum()) for n in numbers) ** 0.5
    assert importance.heads[2, 1] == pytest.approx(expected)
    column = [layer.intermediate.dense.weight[4], layer.intermediate.dense.bias[4], layer.output.dense.weight[:, 4]]
    assert importance.ffn[2, 4] == pytest.approx(sum(float(n.detach().square().sum()) for n in column) ** 0.5)


def test_what_cannot_be_decomposed_is_refused():
    with pytest.raises(ValueError, match="BertForMaskedLM cannot be decomposed"):
        decompose(BertForMaskedLM(BERT), UNEQUAL)
    with pytest.raises(ValueError, match="C3: layer 0 has 7 heads"):
        decompose(random_model(BertForSequenceClassification), Policy((SubModelConfig(1, 8, (7,), (8,)),)))
    with pytest.raises(ValueError, match="num_heads lists 2 layers"):
        CoformerBertConfig(**BERT.to_dict(), layer_heads=[1, 2])
    with pytest.raises(ValueError, match="encoder"):
        CoformerBertConfig(is_decoder=True)
