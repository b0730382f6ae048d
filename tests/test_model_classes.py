"""Every decoupled class stands for one of `transformers`, with its head and initialisation."""

import pytest
import torch

from detransformer.models import decouple
from detransformer.models.auto import CLASSES

BERT = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, vocab_size=100)
GPT2 = dict(n_embd=48, n_layer=4, n_head=3, vocab_size=100, n_positions=40, pad_token_id=0)
DISTILBERT = dict(dim=48, n_layers=4, n_heads=3, hidden_dim=64, vocab_size=100)
VIT = dict(
    hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, image_size=12, patch_size=4
)
OTHERS = {"decoupled_gpt2": GPT2, "decoupled_distilbert": DISTILBERT, "decoupled_vit": VIT}
SIZES = {config: OTHERS.get(config.model_type, BERT) for config in CLASSES}
CASES = [
    pytest.param(auto, original, decoupled, config, id=f"{auto.__name__}-{decoupled.__name__}")
    for config, table in CLASSES.items()
    for auto, original, decoupled in table
]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 100, (2, 3, 7), generator=torch.Generator().manual_seed(1))  # [B, choices, T]


@pytest.mark.parametrize("auto, original, decoupled, config", CASES)
def test_each_class_is_the_original_to_rounding_and_reloads(tmp_path, ids, auto, original, decoupled, config):
    torch.manual_seed(0)
    model = original(original.config_class(**SIZES[config])).eval()
    inputs = {"input_ids": ids if "MultipleChoice" in original.__name__ else ids[:, 0]}
    if original.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))}
    expected = model(**inputs)
    one_division = decouple(model, num_original_layers=2, num_divisions=1)
    assert type(one_division) is decoupled
    torch.testing.assert_close(one_division(**inputs)[0], expected[0], rtol=0, atol=1e-5)
    ours = decouple(model, num_original_layers=2, num_divisions=4)
    ours.save_pretrained(tmp_path)
    reloaded = auto.from_pretrained(tmp_path)
    assert type(reloaded) is decoupled
    torch.testing.assert_close(reloaded(**inputs)[0], ours(**inputs)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("auto, original, decoupled, config", CASES)
def test_a_new_model_is_drawn_once_and_whole(auto, original, decoupled, config):
    """Every weight has its initialisation, none is left as memory held it, and tied weights are one."""
    torch.manual_seed(0)
    model = decoupled(config(**SIZES[config], num_original_layers=2))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name
        elif "c_proj" in name:  # GPT-2 draws it narrower: 0.02 / sqrt(2 layers)
            assert parameter.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.2), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    assert model.config.num_hidden_layers == 4 and type(model.config) is config
    if model.get_output_embeddings() is not None:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("auto, original, decoupled, config", CASES)
def test_gradient_checkpointing_of_the_configuration_reaches_every_layer(auto, original, decoupled, config):
    model = decoupled(config(**SIZES[config], num_original_layers=2, gradient_checkpointing=True))
    body = model.base_model
    if hasattr(body, "encoder") or hasattr(body, "transformer"):
        layers = (body.encoder if hasattr(body, "encoder") else body.transformer).layer
    else:
        layers = body.h if hasattr(body, "h") else body.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 4
