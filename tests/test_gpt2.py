"""Decoupled GPT-2: equals GPT2Model where it must, generates with and without its cache, converts and reloads."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
    OPTConfig,
)

from detransformer.checkpoints import decouple_checkpoint
from detransformer.models import (
    DecoupledGPT2Config,
    DecoupledGPT2LMHeadModel,
    DecoupledGPT2Model,
    architecture,
    decouple,
    ffn_size,
    layer_kinds,
    preset_config,
)
from detransformer.models.configuration import GPT2_SIZES, decoupled_config
from detransformer.models.conversion import slice_parameter
from detransformer.models.sizes import layer_flops, model_flops, model_parameters
from detransformer.opening import open_checkpoint

SMALL = dict(n_embd=48, n_layer=4, n_head=6, n_inner=70, vocab_size=101, n_positions=40)


@pytest.fixture(scope="module")
def gpt2(random_gpt2) -> GPT2LMHeadModel:
    return random_gpt2(SMALL)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Prompts of 9 tokens, the second of them padded on the left."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    ids = torch.randint(SMALL["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch, **options) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=12, pad_token_id=0, **{"do_sample": False} | options)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_attention_scales_as_gpt2(batch, options):
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(**SMALL, **options)).double().eval()
    ours = decouple(model, 1, 1)
    torch.testing.assert_close(ours(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=0, atol=1e-10)


def test_decoupled_layer_is_a_pre_norm_layer_on_each_slice(gpt2):
    """One decoupled layer against sub-blocks written out one by one from the original's slices."""
    layer = decouple(gpt2, num_original_layers=1, num_divisions=4).transformer.h[0]
    original = gpt2.transformer.h[0]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    causal = torch.ones(5, 5).tril().bool()
    outputs = []
    for p, part in enumerate(x.split(12, dim=-1)):
        own = slice(12 * p, 12 * p + 12)

        def norm(x, of, own=own):
            return torch.nn.functional.layer_norm(x, (12,), of.weight[own], of.bias[own], of.eps)

        packed = norm(part, original.ln_1) @ original.attn.c_attn.weight[own] + original.attn.c_attn.bias
        q, k, v = (t.view(2, 5, 6, 8).transpose(1, 2) for t in packed.split(48, dim=-1))
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~causal, -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 48)
        out, first, second = original.attn.c_proj, original.mlp.c_fc, original.mlp.c_proj
        z = part + context @ out.weight[:, own] + out.bias[own]
        inner = torch.nn.functional.gelu(norm(z, original.ln_2) @ first.weight[own] + first.bias, approximate="tanh")
        outputs.append(z + inner @ second.weight[:, own] + second.bias[own])
    torch.testing.assert_close(layer(x), torch.cat(outputs, dim=-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", ["full", "narrow"])
@pytest.mark.parametrize("num_divisions", [2, 4])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_with_and_without_cache(gpt2, batch, options, num_divisions, width):
    model = decouple(gpt2, 2, num_divisions, "full" if num_divisions == 4 else width)
    cached = generate(model, batch, **options)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(cached, generate(model, batch, use_cache=False, **beams))
    alone = {"input_ids": batch["input_ids"][1:, 4:], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    assert torch.equal(generate(model, alone, **options)[0], cached[1, 4:]), "padding on the left does not matter"


@pytest.mark.parametrize("num_divisions", [1, 4])
def test_a_quantised_cache_is_the_originals(gpt2, batch, num_divisions):
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    model = decouple(gpt2, 2, num_divisions)
    text = generate(model, batch, **options)
    if num_divisions == 1:
        assert torch.equal(text, generate(gpt2, batch, **options))
    assert text.shape == generate(model, batch).shape


def test_the_cache_holds_sub_blocks_inside_heads(gpt2, batch):
    model = decouple(gpt2, 2, 4)  # D O D O
    cache = model(**batch).past_key_values
    shapes = [tuple(layer.keys.shape) for layer in cache.layers]
    assert shapes == [(2, 6, 9, 32), (2, 6, 9, 8), (2, 6, 9, 32), (2, 6, 9, 8)]  # [B, H, T, P*s], [B, H, T, s]
    assert [layer.head_dim for layer in model.config.per_layer_config] == [32, 8, 32, 8]
    whole = model(batch["input_ids"]).logits
    first = model(batch["input_ids"][:, :6], use_cache=True)
    rest = model(batch["input_ids"][:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=0, atol=1e-10)


def test_attentions_are_the_mean_over_sub_blocks(gpt2, batch):
    model = decouple(gpt2, 2, 4).transformer
    model.set_attn_implementation("eager")
    layer, x = model.h[0], model.wte(batch["input_ids"]) + model.wpe(torch.arange(9))
    causal, weights = torch.ones(9, 9).tril().bool(), []
    for p, part in enumerate(x.split(12, dim=-1)):
        normed = torch.nn.functional.layer_norm(part, (12,), layer.ln_1.weight[p], layer.ln_1.bias[p], layer.ln_1.eps)
        q, k, _ = (normed @ layer.attn.c_attn.weight[p] + layer.attn.c_attn.bias[p]).view(2, 9, 3, 6, 8).unbind(2)
        scores = torch.einsum("bihs,bjhs->bhij", q, k) / 8**0.5
        weights.append(scores.masked_fill(~causal, -torch.inf).softmax(-1))
    obtained = model(batch["input_ids"], output_attentions=True).attentions[0]
    torch.testing.assert_close(obtained, torch.stack(weights).mean(0), rtol=0, atol=1e-10)


def test_gradient_checkpointing_is_the_same_step(batch):
    model = decouple(GPT2LMHeadModel(GPT2Config(**SMALL, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)), 2, 4).train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.transformer.h[0].attn.c_attn.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["full", "narrow"])
@pytest.mark.parametrize("divisions", [None, 1, 2, 4])
def test_counted_parameters_and_operations_are_the_models(divisions, width):
    original = GPT2Config(**SMALL | dict(n_head=4))
    config = original if divisions is None else decoupled_config(original, 2, divisions, width)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert sum(p.numel() for p in model.parameters()) == model_parameters(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 11, dtype=torch.long))
    head = 2 * 3 * 11 * config.hidden_size * config.vocab_size
    assert counter.get_total_flops() == model_flops(config, 11, batch_size=3) + head


@pytest.mark.parametrize(
    "name, millions", [("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61)]
)
def test_presets_have_the_published_sizes(name, millions):
    config = preset_config(name)
    assert round(model_parameters(config) / 1e6, 2) == millions
    assert layer_kinds(config) == ("original",) * config.n_layer
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2Model(config).parameters()) == model_parameters(config)
    decoupled = preset_config(name, 4, 4)
    assert isinstance(decoupled, DecoupledGPT2Config) and layer_kinds(decoupled).count("original") == 4
    assert (architecture(config), architecture(decoupled), ffn_size(decoupled)) == ("gpt2", "gpt2", 4 * config.n_embd)


def test_the_preset_for_planning_has_opt_6_7b_s_sizes():
    config = preset_config("opt-6.7b-shape", 8, 4)
    assert (config.hidden_size, config.num_hidden_layers, ffn_size(config)) == (4096, 32, 16384)
    assert round(model_parameters(preset_config("opt-6.7b-shape")) / 1e9, 2) == 6.66
    assert set(GPT2_SIZES) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "opt-6.7b-shape"}


def test_a_decoupled_layer_costs_as_one_of_bert():
    config, bert = preset_config("gpt2", 4, 4), preset_config("bert-base", 4, 4)
    assert layer_flops(config, "decoupled", 128) == layer_flops(bert, "decoupled", 128)


# --- conversion and files -------------------------------------------------------------------------------------------


def test_names_and_layouts_of_a_decoupled_layer(gpt2):
    state = decouple(gpt2, 2, 4).state_dict()
    prefix = "transformer.h.0."
    shapes = {name.removeprefix(prefix): tuple(v.shape) for name, v in state.items() if name.startswith(prefix)}
    assert shapes == {
        "ln_1.weight": (4, 12), "ln_1.bias": (4, 12), "ln_2.weight": (4, 12), "ln_2.bias": (4, 12),
        "attn.c_attn.weight": (4, 12, 144), "attn.c_attn.bias": (4, 144),
        "attn.c_proj.weight": (4, 48, 12), "attn.c_proj.bias": (4, 12),
        "mlp.c_fc.weight": (4, 12, 70), "mlp.c_fc.bias": (4, 70),
        "mlp.c_proj.weight": (4, 70, 12), "mlp.c_proj.bias": (4, 12),
    }  # fmt: skip


def test_narrow_slices_keep_a_part_of_every_head():
    config = DecoupledGPT2Config(
        n_embd=8, n_head=2, n_layer=2, num_original_layers=1, num_divisions=2, attention_width="narrow"
    )
    weight = torch.arange(192.0).view(8, 24)
    sliced = slice_parameter("attn.c_attn.weight", weight, config)
    assert torch.equal(sliced[0], weight[:4, [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]])  # of q, k and v
    assert torch.equal(sliced[1], weight[4:, [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]])
    bias = slice_parameter("attn.c_attn.bias", weight[0], config)
    assert torch.equal(bias[1], weight[0, [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]])
    sliced = slice_parameter("attn.c_proj.weight", weight[:, :8], config)
    assert torch.equal(sliced[1], weight[[2, 3, 6, 7], 4:8])


@pytest.fixture
def checkpoint(tmp_path, gpt2):
    folder = tmp_path / "gpt2"
    gpt2.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<|endoftext|>", "a", "b", "c", "ab", "abc"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    return folder


@pytest.mark.parametrize("head, kind", [("auto", DecoupledGPT2LMHeadModel), ("base", DecoupledGPT2Model)])
def test_a_checkpoint_folder_is_converted(checkpoint, tmp_path, gpt2, head, kind):
    said = []
    out = decouple_checkpoint(str(checkpoint), tmp_path / "out", 2, 4, head=head, say=said.append)
    model = kind.from_pretrained(out)
    layer = getattr(model, "transformer", model).h[0]
    torch.testing.assert_close(
        layer.attn.c_attn.weight[1], gpt2.transformer.h[0].attn.c_attn.weight[12:24], rtol=0, atol=0
    )
    assert said[0].startswith("GPT2") and said[-1].endswith("with tokenizer files.")
    assert (out / "merges.txt").read_text() == (checkpoint / "merges.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("abcab")["input_ids"] == GPT2Tokenizer.from_pretrained(checkpoint)("abcab")["input_ids"] == [5, 4]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "break_it, options, words",
    [
        (lambda folder: edit_config(folder, n_layer=5), {}, "not a whole GPT2LMHeadModel.*h.4"),
        (lambda folder: edit_config(folder, model_type="decoupled_gpt2"), {}, "decoupled already"),
        (lambda folder: edit_config(folder, model_type="opt"), {}, "is not supported: model_type is 'opt'"),
        (lambda folder: edit_config(folder, n_inner=64), {}, "do not fit config.json"),
        (lambda folder: None, {"num_divisions": 5}, "num_divisions=5 does not divide hidden_size=48"),
        (lambda folder: None, {"num_original_layers": 5}, "outside 1..4"),
        (lambda folder: None, {"head": "masked-lm"}, "--head masked-lm is not for GPT-2.*base, causal-lm"),
    ],
    ids=["layer-missing", "decoupled", "opt", "shape", "divisions", "layers", "head"],
)
def test_a_checkpoint_that_cannot_be_converted(checkpoint, tmp_path, break_it, options, words):
    break_it(checkpoint)
    with pytest.raises(ValueError, match=words):
        decouple_checkpoint(str(checkpoint), tmp_path / "out", **{"num_original_layers": 2} | options)
    assert not (tmp_path / "out").exists()


def test_other_models_have_no_architecture_here():
    with pytest.raises(ValueError, match="'opt' is not supported"):
        architecture(OPTConfig())
    with pytest.raises(ValueError, match="set add_cross_attention=False"):
        DecoupledGPT2Config(**SMALL, num_original_layers=2, add_cross_attention=True)


# --- checkpoints of latency runs ------------------------------------------------------------------------------------


@pytest.fixture
def small_preset(tmp_path, monkeypatch):
    """A cluster's checkpoints, where `gpt2` is small and kept in `tmp_path`."""
    from detransformer.cluster import checkpoints
    from detransformer.models import configuration

    monkeypatch.setenv("DETRANSFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(configuration.GPT2_SIZES, "gpt2", SMALL)
    return checkpoints


def test_presets_are_made_once_with_their_reference(small_preset, tmp_path):
    original = small_preset.original_checkpoint("gpt2")
    assert not original.decoupled and (original.path / "model.safetensors").is_file()
    model = GPT2LMHeadModel.from_pretrained(original.path)
    assert bool(model.transformer.h[0].mlp.c_proj.bias.any()) and bool((model.transformer.ln_f.weight != 1).any())
    config = preset_config("gpt2", 2, 4)
    decoupled = small_preset.decoupled_checkpoint("gpt2", config)
    assert decoupled.decoupled and decoupled.config.num_divisions == 4
    assert small_preset.decoupled_checkpoint("gpt2", config).path == decoupled.path
    assert open_checkpoint(decoupled.path).config.model_type == "decoupled_gpt2"
    from safetensors.torch import load_file

    for found in (original, decoupled):
        made = small_preset.request(found, 7, 2, tmp_path)
        expected = AutoModelForCausalLM.from_pretrained(found.path).eval().transformer(**load_file(made["inputs"]))
        reference = load_file(made["reference"])["last_hidden_state"]
        torch.testing.assert_close(reference, expected.last_hidden_state, rtol=0, atol=1e-6)  # as float32 rounds
    with pytest.raises(ValueError, match="seq_len=41 is outside 1..40"):
        small_preset.request(original, 41, 1, tmp_path)


def test_the_preset_for_planning_is_never_made(small_preset):
    for make in (
        lambda: small_preset.original_checkpoint("opt-6.7b-shape"),
        lambda: small_preset.decoupled_checkpoint("opt-6.7b-shape", preset_config("opt-6.7b-shape", 4, 4)),
    ):
        with pytest.raises(ValueError, match="opt-6.7b-shape.*planning only"):
            make()
