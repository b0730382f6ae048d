"""Decoupled ViT: its layer is two pre-norm layers on their slices, and what it shares with ViT is ViT's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)
from transformers.models.vit.modeling_vit import ViTLayer

from detransformer.models.configuration import decoupled_config, layer_kinds
from detransformer.models.conversion import decouple
from detransformer.models.decoupled_vit import DecoupledViTForImageClassification
from detransformer.opening import open_checkpoint
from detransformer.parallel.plan import published_plan

SIZES = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=6, intermediate_size=30, image_size=12)
CONFIG = ViTConfig(**SIZES, patch_size=4, num_labels=3)
EXACT = dict(rtol=0, atol=1e-12)  # float64: only the order of sums differs


@pytest.fixture
def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**CONFIG.to_dict())).double().eval()
    for parameter in model.parameters():  # biases and LayerNorms too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outputs_of(model, pixels, **kwargs):
    with torch.no_grad():
        return model(pixel_values=pixels, **kwargs)


@pytest.mark.parametrize(("original_layers", "divisions"), [(4, 3), (1, 1), (2, 1)])
def test_undivided_it_is_the_original(vit, pixels, original_layers, divisions):
    decoupled = decouple(vit, original_layers, divisions)
    assert type(decoupled) is DecoupledViTForImageClassification and not decoupled.training
    torch.testing.assert_close(outputs_of(decoupled, pixels).logits, outputs_of(vit, pixels).logits, **EXACT)


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


@pytest.mark.parametrize("attention_width", ["full", "narrow"])
def test_it_is_saved_and_loaded(vit, pixels, attention_width, tmp_path):
    decoupled = decouple(vit, 2, 2, attention_width, "first")
    assert layer_kinds(decoupled.config) == ("original", "decoupled") * 2
    decoupled.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(decoupled)
    torch.testing.assert_close(outputs_of(loaded, pixels).logits, outputs_of(decoupled, pixels).logits, **EXACT)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Folders of an original and two decoupled ViTs (D D D O), beside a request and their single-device outputs."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(3)
    sizes = SIZES | dict(hidden_size=48, intermediate_size=70)
    model = ViTForImageClassification(ViTConfig(**sizes, patch_size=4, num_labels=3)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made = {"original": model, "decoupled": decouple(model, 1, 4), "narrow": decouple(model, 1, 4, "narrow")}
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    save_file({"pixel_values": pixels}, folder / "inputs.safetensors")
    for name, one in made.items():
        one.save_pretrained(folder / name)
        with torch.no_grad():
            state = one.vit(pixels).last_hidden_state
        reference = {"last_hidden_state": state, "logits": outputs_of(one, pixels).logits}
        save_file(reference, folder / f"{name}.safetensors")
    return {name: str(folder / name) for name in made}


METHODS = [("original", m) for m in ("single", "pp", "tp", "sp", "ulysses", "galaxy")]
METHODS += [("decoupled", m) for m in ("bp+tp", "bp+sp", "bp+ulysses", "bp+heads")] + [("narrow", "bp+heads")]


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("model, method", METHODS)
def test_every_plan_equals_the_single_device(cluster, checkpoints, model, method, num_devices):
    folder = checkpoints[model]
    plan = published_plan(method, AutoConfig.from_pretrained(folder), [1.0, 2.0, 1.0, 1.0][:num_devices])
    job = dict(checkpoint=folder, plan=plan.to_dict(), dtype="float64", repeats=1, warmup=0)
    inputs = str(Path(folder).with_name("inputs.safetensors"))
    results = cluster.run("run_plan", inputs=inputs, reference=f"{folder}.safetensors", **job)
    errors = [result["max_abs_error"] for result in results if result and "max_abs_error" in result]
    assert len(errors) == (1 if method == "pp" else plan.num_devices) and max(errors) < 1e-12


def test_hidden_states_attentions_and_the_choice_of_attention_are_those_of_transformers(vit, pixels):
    decoupled = decouple(vit, 2, 2)
    fused = outputs_of(decoupled, pixels).logits
    decoupled.set_attn_implementation("eager")
    output = outputs_of(decoupled, pixels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.logits, fused)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 24)] * 5
    assert [tuple(a.shape) for a in output.attentions] == [(2, 6, 10, 10)] * 4  # the mean over sub-blocks


def test_it_trains_from_weights_of_the_usual_size():
    model = DecoupledViTForImageClassification(decoupled_config(CONFIG, 1, 2)).train()
    weight = model.vit.layers[0].attention.q_proj.weight
    assert weight.shape == (2, 24, 12) and 0.01 < float(weight.detach().std()) < 0.03
    model(pixel_values=torch.randn(2, 3, 12, 12), labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_what_does_not_fit_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="num_divisions=5 does not divide hidden_size=24"):
        decouple(vit, 1, 5)
    with pytest.raises(ValueError, match="qkv_bias=False"):
        decoupled_config(ViTConfig(**SIZES, qkv_bias=False), 1, 2)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling cannot be decoupled"):
        decouple(ViTForMaskedImageModeling(CONFIG), 1, 2)
    vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ViT, which looks at images: give a model of text"):
        open_checkpoint(tmp_path)  # as run, serve, bench and plan do
