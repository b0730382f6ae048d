"""Decoupled ViT: its layer is two pre-norm layers on their slices, and what it shares with ViT is ViT's."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)
from transformers.models.vit.modeling_vit import ViTLayer

from detransformer.models.configuration import decoupled_config
from detransformer.models.conversion import decouple
from detransformer.opening import open_checkpoint
from detransformer.parallel.plan import published_plan
from parity import TOLERANCE, UNEVEN, run_plan, saved_case

SIZES = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=6, intermediate_size=30, image_size=12)
CONFIG = ViTConfig(**SIZES, patch_size=4, num_labels=3)
EXACT = dict(rtol=0, atol=TOLERANCE)


@pytest.fixture
def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**CONFIG.to_dict())).double().eval()
    for parameter in model.parameters():  # biases and LayerNorms too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("divisions", [2, 3])
def test_a_decoupled_layer_is_a_layer_on_each_slice(vit, divisions):
    """Against ViT's own layer, as wide as the slice and with the weights that read and write it."""
    decoupled, width = decouple(vit, 1, divisions), 24 // divisions
    x = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    narrow, whole, expected = ViTConfig(**CONFIG.to_dict() | {"hidden_size": width}), vit.vit.layers[1], []
    narrow.head_dim = 4  # all heads at full size
    narrow._attn_implementation = "sdpa"  # the other one takes softmax in float32
    for part in range(divisions):
        own = slice(part * width, (part + 1) * width)
        layer, state = ViTLayer(narrow).double().eval(), {}
        for name, value in whole.state_dict().items():
            if name.startswith(("attention.o_proj", "mlp.fc2", "layernorm")):
                state[name] = value[own]
            else:
                state[name] = value[:, own] if value.ndim == 2 else value
        layer.load_state_dict(state)
        expected.append(layer(x[..., own]))
    with torch.no_grad():
        torch.testing.assert_close(decoupled.vit.layers[1](x), torch.cat(expected, -1), **EXACT)


@pytest.fixture(scope="module")
def cases_of_vit(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Folders of an original and two decoupled ViTs (D D D O), beside a request and their single-device outputs."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(3)
    sizes = SIZES | dict(hidden_size=48, intermediate_size=70)
    model = ViTForImageClassification(ViTConfig(**sizes, patch_size=4, num_labels=3)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made = {"original": model, "decoupled": decouple(model, 1, 4), "narrow": decouple(model, 1, 4, "narrow")}
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    cases = {}
    for name, one in made.items():
        with torch.no_grad():
            expected = {"last_hidden_state": one.vit(pixels).last_hidden_state, "logits": one(pixels).logits}
        cases[name] = saved_case(folder / name, one, {"pixel_values": pixels}, expected)
    return cases


METHODS = [("original", m) for m in ("single", "pp", "tp", "sp", "ulysses", "galaxy")]
METHODS += [("decoupled", m) for m in ("bp+tp", "bp+sp", "bp+ulysses", "bp+heads")] + [("narrow", "bp+heads")]


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("model, method", METHODS)
def test_every_plan_equals_the_single_device(cluster, cases_of_vit, model, method, num_devices):
    case = cases_of_vit[model]
    plan = published_plan(method, case.config, UNEVEN[num_devices])
    errors = [r["max_abs_error"] for r in run_plan(cluster, case, plan) if "max_abs_error" in r]
    assert len(errors) == (1 if method == "pp" else plan.num_devices) and max(errors) < TOLERANCE


def test_what_does_not_fit_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="qkv_bias=False"):
        decoupled_config(ViTConfig(**SIZES, qkv_bias=False), 1, 2)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling cannot be decoupled"):
        decouple(ViTForMaskedImageModeling(CONFIG), 1, 2)
    vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ViT, which looks at images: give a model of text"):
        open_checkpoint(tmp_path)  # as run, serve, bench and plan do
