"""What people attach to a model: attention functions, exporters, Trainer, accelerate, peft, programs of their own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from detransformer.models import DecoupledBertModel, decouple

BERT = BertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=64, vocab_size=100)
GPT2 = GPT2Config(n_embd=48, n_layer=4, n_head=3, vocab_size=100, n_positions=40, eos_token_id=None, bos_token_id=None)


def make(original, width="full"):
    """A decoupled model, Ndiv=4, of random weights: D O D O."""
    torch.manual_seed(0)
    return decouple(original(GPT2 if "GPT2" in original.__name__ else BERT).eval(), 2, 4, width)


def batch(rows=2, tokens=7) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, tokens - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(ours: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)  # as float32 rounds


# --- masks and attention functions ----------------------------------------------------------------------------------


def test_an_attention_function_sees_the_batch_and_the_heads_of_the_configuration():
    """As flash attention is called: a mask [B, T], and the keys of [B, H, T, s]."""
    seen = []

    def attend(module, query, key, value, mask, scaling, **kwargs):
        seen.append((tuple(mask.shape), tuple(query.shape)))
        mask = mask[:, None, None, :].bool()
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return context.transpose(1, 2), None

    AttentionInterface.register("seen_by_a_test", attend)
    AttentionMaskInterface.register("seen_by_a_test", flash_attention_mask)
    model, inputs = make(BertModel), batch()
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("seen_by_a_test")
    assert_same(model(**inputs).last_hidden_state, expected, inputs["attention_mask"])
    assert seen == [((2, 7), (2, 3, 7, 16))] * (4 + 1 + 4 + 1)  # four sub-blocks, or one, in each of the layers


@pytest.mark.parametrize("original", [BertModel, GPT2LMHeadModel])
def test_a_mask_of_four_axes_is_that_of_two(original):
    model, inputs = make(original), batch()
    rows = inputs["attention_mask"].bool()
    whole = rows[:, None, None, :].expand(2, 1, 7, 7)
    if original is GPT2LMHeadModel:
        whole = whole & torch.ones(7, 7).tril().bool()
    assert_same(model(inputs["input_ids"], attention_mask=whole)[0], model(**inputs)[0], inputs["attention_mask"])


@pytest.mark.slow
def test_flex_attention_is_sdpa():
    model, inputs = make(BertModel), batch()
    with torch.no_grad():  # flex attention has no backward on a CPU
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("flex_attention")
        assert_same(model(**inputs).last_hidden_state, expected, inputs["attention_mask"])


# --- compilers and exporters ----------------------------------------------------------------------------------------


class Hidden(torch.nn.Module):
    """Tensors in, one tensor out, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask)[0]


@pytest.mark.slow
def test_compiled_in_one_graph():
    model, inputs = make(BertModel), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state, inputs["attention_mask"])


@pytest.mark.slow
def test_traced_and_exported_for_other_lengths():
    model, inputs, other = Hidden(make(BertModel)).eval(), batch(), batch(3, 11)
    with torch.no_grad():
        traced = torch.jit.trace(model, tuple(inputs.values()))
        assert_same(traced(**other), model(**other), other["attention_mask"])
        rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", max=500)
        axes = {name: {0: rows, 1: tokens} for name in inputs}
        exported = torch.export.export(model, (), inputs, dynamic_shapes=axes).module()
        assert_same(exported(**other), model(**other), other["attention_mask"])


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_both_exporters(tmp_path, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, inputs, other = Hidden(make(BertModel)).eval(), batch(), batch(3, 11)
    axes = {name: {0: "rows", 1: "tokens"} for name in inputs}
    options = {"dynamic_shapes": tuple(axes.values())} if dynamo else {"dynamic_axes": axes, "opset_version": 17}
    with torch.no_grad():
        path, names = tmp_path / "model.onnx", list(inputs)
        torch.onnx.export(model, tuple(inputs.values()), path, input_names=names, dynamo=dynamo, **options)
        run = onnxruntime.InferenceSession(path).run(None, {name: value.numpy() for name, value in other.items()})
        assert_same(torch.from_numpy(run[0]), model(**other), other["attention_mask"])


def test_int8_of_torch_sees_the_original_layers_alone():
    model = make(BertModel)
    converted = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    layers = [
        name
        for name, module in converted.named_modules()
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear) and "layer." in name
    ]
    assert {int(name.split(".")[2]) for name in layers} == {1, 3} and len(layers) == 2 * 6


# --- caches of generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["full", "narrow"])
@pytest.mark.parametrize("way", ["static in chunks", "looked up in the prompt", "assisted by the original"])
def test_every_way_to_generate_gives_the_greedy_text(way, width):
    model = make(GPT2LMHeadModel, width).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.transformer.wpe.weight, std=3.0)  # so that the text varies
    options = {
        "static in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
        "looked up in the prompt": {"prompt_lookup_num_tokens": 3},
        "assisted by the original": {"assistant_model": GPT2LMHeadModel(GPT2).double().eval()},
    }[way]
    inputs = {name: value[:1] for name, value in batch().items()}
    greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=False)
    assert len(set(greedy[0, 7:].tolist())) > 3
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, **options), greedy)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="num_divisions=4: call generate on padded prompts"):
        make(GPT2LMHeadModel).generate_batch([[1, 2, 3]])


# --- training -------------------------------------------------------------------------------------------------------


def test_trainer_keeps_checkpoints_reloads_the_best_and_resumes(tmp_path):
    inputs = batch()
    rows = [{name: value[i % 2] for name, value in inputs.items()} | {"labels": i % 2} for i in range(16)]

    def trainer(max_steps: int) -> Trainer:
        options = dict(save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, report_to=[])
        more = dict(load_best_model_at_end=True, gradient_checkpointing=True, use_cpu=True, disable_tqdm=True)
        arguments = TrainingArguments(tmp_path, max_steps=max_steps, learning_rate=1e-2, **options, **more)
        return Trainer(make(BertForSequenceClassification), arguments, train_dataset=rows, eval_dataset=rows[:4])

    first = trainer(4)
    first.train()
    best = AutoModelForSequenceClassification.from_pretrained(first.state.best_model_checkpoint)
    torch.testing.assert_close(best(**inputs).logits, first.model.eval()(**inputs).logits, rtol=0, atol=1e-5)
    second = trainer(6)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.state.global_step == 6


def test_accelerate_offloads_layers_to_disk(tmp_path):
    model, inputs = make(BertModel), batch()
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "pooler": "cpu"} | {f"encoder.layer.{i}": ("disk", "cpu")[i > 1] for i in range(4)}
    offloaded = DecoupledBertModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.encoder.layer[0].attention.self.query.weight.device.type == "meta"
    assert_same(offloaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state, inputs["attention_mask"])


def test_lora_of_decoupled_layers_by_target_parameters():
    peft = pytest.importorskip("peft")
    model, inputs = make(BertForSequenceClassification), batch()
    names = ["query.weight", "value.weight"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, task_type="SEQ_CLS", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if "lora_" in name and parameter.grad is not None]
    assert len(trained) == 4 * 2 * 2  # of each layer query and value, A and B
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = adapted.eval()(**inputs).logits
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_lora_of_modules_reaches_the_original_layers_alone():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make(BertModel), peft.LoraConfig(target_modules="all-linear"))
    assert {name.split(".")[2] for name in adapted.targeted_module_names if "layer" in name} == {"1", "3"}
    with pytest.raises(ValueError, match=r"BatchedLinear\(\) is not supported"):
        peft.get_peft_model(make(BertModel), peft.LoraConfig(target_modules=["query"]))


def test_prefix_tuning_where_the_cache_has_the_configurations_width():
    peft = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ids = batch()["input_ids"]
    narrow = peft.get_peft_model(make(GPT2LMHeadModel, "narrow"), prefix)
    narrow(ids, labels=ids).loss.backward()
    assert bool(narrow.prompt_encoder.default.embedding.weight.grad.any())
    with pytest.raises(ValueError, match="keys of width 16 a head for layer 0, and a decoupled layer keeps 64"):
        peft.get_peft_model(make(GPT2LMHeadModel), prefix)(ids)
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="takes no past_key_values, which prefix tuning adds"):
        peft.get_peft_model(make(BertForSequenceClassification), prefix)(**batch())


# --- a program that never imported us -------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from transformers import AutoModel, AutoModelForMaskedLM
folder, again = sys.argv[1:]
try:
    AutoModelForMaskedLM.from_pretrained(folder)
except ValueError as error:
    refused = str(error)
assert "detransformer.models" not in sys.modules
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
opened = AutoModel.from_pretrained(again, trust_remote_code=True)
print()  # transformers asked a question on this line
print(json.dumps([refused, type(model).__name__, type(opened).__name__]))
"""


def test_a_checkpoint_is_opened_by_a_program_that_never_imported_us(tmp_path, monkeypatch):
    """Without trust_remote_code it says what is to be allowed; what that program saves is opened in the same way."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make(BertForMaskedLM).save_pretrained(tmp_path / "one")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "one"), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, *classes = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in refused
    assert classes == ["DecoupledBertForMaskedLM", "DecoupledBertModel"]
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"config.json", "model.safetensors", "detransformer_models.py"}
