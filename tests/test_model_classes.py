"""Every decoupled class stands for one of `transformers`, with its head and initialisation."""

import pytest
import torch

from detransformer.models import decouple
from detransformer.models.auto import CLASSES, DECOUPLED_CLASS
from detransformer.models.naming import layers_of

BERT = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, vocab_size=100)
GPT2 = dict(n_embd=48, n_layer=4, n_head=3, vocab_size=100, n_positions=40, pad_token_id=0)
DISTILBERT = dict(dim=48, n_layers=4, n_heads=3, hidden_dim=64, vocab_size=100)
VIT = dict(
    hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, image_size=12, patch_size=4
)
OTHERS = {"decoupled_gpt2": GPT2, "decoupled_distilbert": DISTILBERT, "decoupled_vit": VIT}
SIZES = {config: OTHERS.get(config.model_type, BERT) for config in CLASSES}
OPENED = [
    pytest.param(auto, original, decoupled, id=f"{auto.__name__}-{decoupled.__name__}")
    for table in CLASSES.values()
    for auto, original, decoupled in table
]
DECOUPLED = [pytest.param(decoupled, id=decoupled.__name__) for decoupled in DECOUPLED_CLASS.values()]


def request(model_class) -> dict[str, torch.Tensor]:
    """Two images; two texts, or for multiple choice two times three."""
    generator = torch.Generator().manual_seed(1)
    if model_class.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    axes = (2, 3, 7) if "MultipleChoice" in model_class.__name__ else (2, 7)
    return {"input_ids": torch.randint(1, 100, axes, generator=generator)}


def new_model(decoupled, **options):
    torch.manual_seed(0)
    config = decoupled.config_class
    return decoupled(config(**SIZES[config], num_original_layers=2, **options))


def assert_tied(model) -> None:
    if model.get_output_embeddings() is not None:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("auto, original, decoupled", OPENED)
def test_each_class_is_the_original_to_rounding_and_reloads(tmp_path, auto, original, decoupled):
    torch.manual_seed(0)
    model = original(original.config_class(**SIZES[decoupled.config_class])).eval()
    inputs = request(original)
    expected = model(**inputs)[0]
    for undivided in ((2, 1), (4, 4)):
        ours = decouple(model, *undivided)
        assert type(ours) is decoupled and not ours.training
        torch.testing.assert_close(ours(**inputs)[0], expected, rtol=0, atol=1e-5)
    for width in ("full", "narrow"):
        ours = decouple(model, 2, 4, width)
        ours.save_pretrained(tmp_path)
        reloaded = auto.from_pretrained(tmp_path)
        assert type(reloaded) is decoupled and reloaded.config.attention_width == width
        torch.testing.assert_close(reloaded(**inputs)[0], ours(**inputs)[0], rtol=0, atol=1e-6)
        assert_tied(reloaded)


@pytest.mark.parametrize("decoupled", DECOUPLED)
def test_a_new_model_is_drawn_once_and_whole(decoupled):
    """Every weight has its initialisation, none is left as memory held it, and tied weights are one."""
    model = new_model(decoupled)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
        elif "c_proj" in name:  # GPT-2 draws it narrower: 0.02 / sqrt(2 layers)
            assert parameter.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.2), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    assert model.config.num_hidden_layers == 4 and type(model.config) is decoupled.config_class
    assert_tied(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("decoupled", DECOUPLED)
def test_gradients_reach_every_layer(decoupled, checkpointing):
    model = new_model(decoupled, gradient_checkpointing=checkpointing).train()
    model(**request(decoupled))[0].square().sum().backward()
    layers = layers_of(model.base_model)
    assert [layer.gradient_checkpointing for layer in layers] == [checkpointing] * 4
    assert [name for name, parameter in layers.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("decoupled", DECOUPLED)
def test_eager_attention_is_the_fused_one_and_outputs_are_recorded(decoupled):
    model, inputs = new_model(decoupled).eval(), request(decoupled)
    fused = model(**inputs)[0]
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output[0], fused, rtol=0, atol=1e-5)
    batch_size, num_tokens, _ = output.hidden_states[0].shape
    assert [tuple(state.shape) for state in output.hidden_states] == [(batch_size, num_tokens, 48)] * 5
    assert [tuple(w.shape) for w in output.attentions] == [(batch_size, 3, num_tokens, num_tokens)] * 4
