"""Programs that others wrote ask a service over two emulated devices: answers equal transformers' on one device.

Clients of three dialects (huggingface_hub, openai, llama-index) and the routes for which there is none; one service a
model kind for the whole file.
"""

import base64
import json
import re
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from conftest import random_model, save_with_words, wait_until
from detransformer.cluster.fleet import JobFailed
from detransformer.cluster.network import can_emulate
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import repository_root
from detransformer.service.http import build_app, server_config
from detransformer.service.session import Session
from detransformer.service.waiting import Asked, QueueFull, Waiting

openai = pytest.importorskip("openai")
llama = pytest.importorskip("llama_index.embeddings.text_embeddings_inference")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_emulate()[0], reason=can_emulate()[1]),
]

TOKEN = "the token of these tests"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a film great bad who wrote it jane austen in london not was . , ?".split()
TEXTS = ["the film was great", "a bad film , not great .", "who wrote it ?", "jane austen in london"]
PASSAGE = "Jane  Austen wrote it in London , not a film ."  # two spaces, capitals
CLUSTER = """
name: two for clients
emulated: true
link: {bandwidth_mbps: 1000}
devices:
  - {name: first, device: jetson-nano}
  - {name: second, device: jetson-nano}
"""


def bert(folder, kind, **fields):
    """A small BERT of random weights with its word list, saved in `folder`."""
    sizes = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=70)
    model = random_model(kind, BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64, **fields))
    save_with_words(model, WORDS, folder)
    return model


def embedding_bert(folder):
    model = bert(folder, BertModel)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    return model


def gpt2(folder):
    """A small GPT-2 of random weights with a byte-level tokenizer, saved in `folder`."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    words.train_from_iterator(TEXTS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    sizes = dict(n_embd=48, n_layer=4, n_head=6, n_inner=70, n_positions=1024, vocab_size=len(tokenizer))
    model = random_model(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0), std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@contextmanager
def served(folder, model):
    """The model in `folder` behind HTTP at `url`."""
    (folder.parent / "cluster.yaml").write_text(CLUSTER)
    spec = ClusterSpec.load(folder.parent / "cluster.yaml")
    with Session(spec, folder, method="tp", paced=False) as session:
        assert session.wait_for_all(120)
        server = uvicorn.Server(server_config(build_app(session, TOKEN)))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            running = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            running.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with (
                httpx.Client(base_url=url, headers=headers, timeout=120) as http,
                openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as ai,
            ):
                tokenizer = AutoTokenizer.from_pretrained(folder)
                hub = InferenceClient(base_url=url, api_key=TOKEN, timeout=120)
                yield SimpleNamespace(
                    session=session, model=model, tokenizer=tokenizer, url=url, http=http, ai=ai, hub=hub, folder=folder
                )
            server.should_exit = True
            running.join(10)


def service_of(name: str, save) -> object:
    """The fixture `name`: a service of the model that `save` makes in a folder."""

    @pytest.fixture(scope="module", name=name)
    def service(tmp_path_factory):
        folder = tmp_path_factory.mktemp(name) / "model"
        with served(folder, save(folder)) as started:
            yield started

    return service


LABELS, TAGS = dict(enumerate(["good", "bad", "neither"])), dict(enumerate(["O", "B-PER", "I-PER", "LOC"]))
embedder = service_of("embedder", embedding_bert)
classifier = service_of("classifier", lambda folder: bert(folder, BertForSequenceClassification, id2label=LABELS))
reranker = service_of("reranker", lambda folder: bert(folder, BertForSequenceClassification, num_labels=1))
reader = service_of("reader", lambda folder: bert(folder, BertForQuestionAnswering))
tagger = service_of("tagger", lambda folder: bert(folder, BertForTokenClassification, id2label=TAGS))
filler = service_of("filler", lambda folder: bert(folder, BertForMaskedLM))
writer = service_of("writer", gpt2)


@torch.inference_mode()
def vectors(service, texts=TEXTS, normalize=True) -> torch.Tensor:
    """The mean of the last hidden states of each text, by transformers."""
    found = [service.model(**service.tokenizer(t, return_tensors="pt")).last_hidden_state.mean(1) for t in texts]
    return F.normalize(torch.cat(found), dim=-1) if normalize else torch.cat(found)


@torch.inference_mode()
def logits(service, *texts) -> torch.Tensor:
    return service.model(**service.tokenizer(*texts, return_tensors="pt")).logits[0]


def continuation(service, prompt: str, num_tokens: int) -> tuple[str, list[int]]:
    """What transformers' greedy generation goes on with."""
    ids = service.tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = service.model.generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    tokens = made.tolist()
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    return service.tokenizer.decode(tokens), tokens


def close(found, expected, atol=1e-4) -> bool:
    return torch.allclose(torch.tensor(found), expected, atol=atol)


# --- huggingface_hub ---------------------------------------------------------------------------------------------


def test_hub_text_classification(classifier):
    pipe = pipeline("text-classification", model=classifier.model, tokenizer=classifier.tokenizer, top_k=None)
    for text in TEXTS:
        found, (expected,) = classifier.hub.text_classification(text), pipe([text])
        assert [one.label for one in found] == [one["label"] for one in expected]
        assert close([one.score for one in found], torch.tensor([one["score"] for one in expected]))
    (best,) = classifier.hub.text_classification(TEXTS[0], top_k=1, function_to_apply="none")
    assert close(best.score, logits(classifier, TEXTS[0]).max())


def test_hub_question_answering(reader):
    found = reader.hub.question_answering(question="who wrote it ?", context=PASSAGE)
    encoded = reader.tokenizer("who wrote it ?", PASSAGE, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        result = reader.model(**encoded)
    places = [i for i, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    start, end = result.start_logits[0], result.end_logits[0]
    first, last = max(((i, j) for i in places for j in places if i <= j), key=lambda s: float(start[s[0]] + end[s[1]]))
    assert (found.start, found.end) == (offsets[first][0], offsets[last][1])
    assert found.answer == PASSAGE[found.start : found.end] and 0 < found.score <= 1


def test_hub_question_answering_refuses_what_would_change_the_answer(reader):
    asked = {"inputs": {"question": "who wrote it ?", "context": PASSAGE}}
    plain = reader.http.post("/", json=asked | {"parameters": None}).json()
    same = {"handle_impossible_answer": True, "max_answer_len": 30}
    assert reader.http.post("/", json=asked | {"parameters": same}).json() == plain
    for name, value in (("handle_impossible_answer", False), ("max_answer_len", 3), ("top_k", 2)):
        reply = reader.http.post("/", json=asked | {"parameters": {name: value}})
        assert reply.status_code == 422 and f"{name} is {value}" in reply.json()["error"]


def test_hub_token_classification(tagger):
    pipe = pipeline(
        "token-classification", model=tagger.model, tokenizer=tagger.tokenizer, aggregation_strategy="simple"
    )
    for text in (PASSAGE, *TEXTS):
        found, expected = tagger.hub.token_classification(text), pipe(text)
        assert [(one.entity_group, one.start, one.end) for one in found] == [
            (one["entity_group"], one["start"], one["end"]) for one in expected
        ]
        assert [one.score for one in found] == pytest.approx([float(one["score"]) for one in expected], abs=1e-4)
    with pytest.raises(HfHubHTTPError) as refused:
        tagger.hub.token_classification(PASSAGE, aggregation_strategy="max")
    assert refused.value.response.status_code == 422


def test_hub_feature_extraction_and_similarity(embedder):
    assert close(embedder.hub.feature_extraction(TEXTS[0]).tolist(), vectors(embedder, TEXTS[:1]))
    raw = embedder.hub.feature_extraction(TEXTS[1], normalize=False)
    assert close(raw.tolist(), vectors(embedder, TEXTS[1:2], normalize=False))
    alike = embedder.hub.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert close(alike, vectors(embedder)[1:] @ vectors(embedder)[0])


def test_hub_fill_mask(filler):
    pipe = pipeline("fill-mask", model=filler.model, tokenizer=filler.tokenizer)
    for text, asked, given in (("the [MASK] was great", None, 5), ("who [MASK] it ?", 99, len(WORDS))):
        found, expected = filler.hub.fill_mask(text, top_k=asked), pipe(text, top_k=given)
        assert [(one.token, one.token_str, one.sequence) for one in found] == [
            (one["token"], one["token_str"], one["sequence"]) for one in expected
        ]
        assert close([one.score for one in found], torch.tensor([one["score"] for one in expected]))
    texts = ["[MASK] wrote [MASK]", "the [MASK] was bad"]
    found = filler.http.post("/", json={"inputs": texts}).json()
    assert [[one["sequence"] for one in words] for words in (*found[0], found[1])] == [
        [one["sequence"] for one in words] for words in (*pipe(texts[0]), pipe(texts[1]))
    ]
    for body, words in (
        ({"inputs": ["a [MASK]", "a"]}, "some of the texts have no [MASK]"),
        ({"inputs": "a [MASK]", "parameters": {"targets": ["film"]}}, "targets is ['film']"),
    ):
        reply = filler.http.post("/", json=body)
        assert reply.status_code == 422 and words in reply.json()["error"]
    assert len(filler.http.post("/embed", json={"inputs": "a film"}).json()[0]) == 48  # it has vectors, too


def test_hub_text_generation_whole_streamed_and_stopped(writer):
    text, tokens = continuation(writer, TEXTS[0], 24)
    assert writer.hub.text_generation(TEXTS[0], max_new_tokens=24) == text
    full = writer.hub.text_generation(TEXTS[0], max_new_tokens=24, return_full_text=True)
    assert full == TEXTS[0] + text
    pieces = list(writer.hub.text_generation(TEXTS[0], max_new_tokens=24, stream=True))
    assert "".join(pieces) == text and len(pieces) > 12
    stop = text[5:8]
    assert writer.hub.text_generation(TEXTS[0], max_new_tokens=24, stop=[stop]) == text[: text.index(stop)]
    details = writer.hub.text_generation(TEXTS[0], max_new_tokens=24, stream=True, details=True)
    assert list(details)[-1].generated_text == text


def test_own_generation(writer):
    text, tokens = continuation(writer, TEXTS[0], 12)
    reply = writer.http.post("/generate", json={"text": TEXTS[0], "max_new_tokens": 12})
    assert reply.json() == {"text": text, "tokens": tokens}


def test_hub_refusals_are_read_by_the_client(embedder, classifier, writer):
    with pytest.raises(HfHubHTTPError) as refused:
        embedder.hub.fill_mask("the [MASK] was great")
    assert refused.value.response.status_code == 424
    assert "does not fill [MASK]" in refused.value.response.json()["error"]
    for kind, words in (
        ({"do_sample": False, "temperature": 0.5}, "do_sample is false beside temperature"),
        ({"top_k": 5}, "top_k"),
        ({"stop_sequences": ["."]}, "stop_sequences"),
        ({"truncate": 3}, "truncate"),
    ):
        reply = writer.http.post("/", json={"inputs": "a", "parameters": kind})
        assert reply.status_code == 422 and words in reply.json()["error"]
    reply = classifier.http.post("/", json={"inputs": {"question": "who", "context": "jane"}})
    assert reply.status_code == 422


# --- openai ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_openai_embeddings(embedder, encoding):
    reply = embedder.ai.embeddings.create(model="any", input=TEXTS, encoding_format=encoding, user="someone")
    shown = [one.embedding for one in reply.data]
    if encoding == "base64":
        shown = [torch.frombuffer(bytearray(base64.b64decode(one)), dtype=torch.float32).tolist() for one in shown]
    assert close(shown, vectors(embedder)) and [one.index for one in reply.data] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == sum(len(embedder.tokenizer(text)["input_ids"]) for text in TEXTS)
    tokens = [embedder.tokenizer(text)["input_ids"] for text in TEXTS]
    again = embedder.ai.embeddings.create(model="any", input=tokens, encoding_format="float")
    assert close([one.embedding for one in again.data], vectors(embedder))


def test_openai_completions(writer):
    text, tokens = continuation(writer, TEXTS[1], 24)
    reply = writer.ai.completions.create(model="any", prompt=TEXTS[1], max_tokens=24, temperature=0)
    (choice,) = reply.choices
    assert choice.text == text and choice.finish_reason == ("length" if len(tokens) == 24 else "stop")
    assert reply.usage.completion_tokens == len(tokens)
    assert reply.usage.prompt_tokens == len(writer.tokenizer(TEXTS[1])["input_ids"])
    several = writer.ai.completions.create(model="any", prompt=TEXTS, max_tokens=9, temperature=0)
    assert [one.text for one in several.choices] == [continuation(writer, text, 9)[0] for text in TEXTS]


def test_openai_completions_stop_at_a_string(writer):
    text, _ = continuation(writer, TEXTS[1], 24)
    stop = text[6:9]
    for stream in (False, True):
        reply = writer.ai.completions.create(
            model="any", prompt=TEXTS[1], max_tokens=24, temperature=0, stop=[stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_openai_completions_are_drawn_by_their_seed(writer):
    def ask(seed: int | None, **options) -> str:
        asked = dict(model="any", prompt="a", max_tokens=20, temperature=1.5, seed=seed) | options
        return writer.ai.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(6) as pool:  # in batches with others, and alone: the same
        together = list(pool.map(ask, [1, 2, 3, 1, 2, 3]))
    assert together[:3] == together[3:] == [ask(seed) for seed in (1, 2, 3)] and len(set(together)) == 3
    assert ask(1, top_p=1e-6) == ask(1, temperature=0) == continuation(writer, "a", 20)[0]
    assert ask(None) != ask(None)


def test_openai_completions_come_while_they_are_made_and_end_when_nobody_reads(writer, monkeypatch):
    text, tokens = continuation(writer, TEXTS[2], 40)
    asked = dict(model="any", prompt=TEXTS[2], temperature=0, stream=True)
    chunks = list(writer.ai.completions.create(**asked, max_tokens=40, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.completion_tokens == len(tokens)

    made, settle = [], Waiting.settle

    def spy(self, batch, outputs, *rest):
        made.append(outputs["tokens"].shape[1])
        return settle(self, batch, outputs, *rest)

    monkeypatch.setattr(Waiting, "settle", spy)
    prompt = next(p for p in (*TEXTS, "a", "b", "c", "d") if len(continuation(writer, p, 900)[1]) == 900)
    answered = writer.session.counts["answered"]
    with writer.ai.completions.create(**asked | {"prompt": prompt}, max_tokens=900) as stream:
        assert next(iter(stream)).choices[0].finish_reason is None
        assert writer.session.counts["answered"] == answered, "the first piece comes before the answer is whole"
    wait_until(lambda: made, 60)
    assert made[0] < 900, "the devices stop when the client has gone"


def test_openai_models_and_refusals(embedder, classifier, writer):
    assert [one.id for one in writer.ai.models.list()] == ["model"]
    assert writer.ai.models.retrieve("model").owned_by == "detransformer"
    with pytest.raises(openai.NotFoundError, match="there is no model .some/other.; this server has model"):
        writer.ai.models.retrieve("some/other")
    with pytest.raises(openai.NotFoundError, match="no such path; this server has .*/v1/completions"):
        writer.ai.chat.completions.create(model="any", messages=[])
    with pytest.raises(openai.AuthenticationError, match="show the token"):
        openai.OpenAI(base_url=f"{writer.url}/v1", api_key="another", max_retries=0).models.list()
    for ask, words in (
        (lambda: writer.ai.completions.create(model="any", prompt="a", n=2), "n is 2"),
        (lambda: writer.ai.completions.create(model="any", prompt="a", logprobs=3), "logprobs is 3"),
        (lambda: writer.ai.completions.create(model="any", prompt="a", extra_body={"min_p": 0.1}), "min_p is 0.1"),
        (lambda: writer.ai.completions.create(model="any", prompt=["a", "b"], stream=True), "one prompt"),
        (lambda: writer.ai.completions.create(model="any", prompt="a", max_tokens=0), "max_tokens"),
        (lambda: writer.ai.completions.create(model="any", prompt="a " * 2000), "shorten"),
        (lambda: writer.ai.completions.create(model="any", prompt="a " * 2000, stream=True), "shorten"),
        (lambda: embedder.ai.embeddings.create(model="any", input="a", dimensions=7), "vectors have 48"),
    ):
        with pytest.raises(openai.UnprocessableEntityError, match=words):
            ask()
    for ask in (
        lambda: classifier.ai.completions.create(model="any", prompt="a"),
        lambda: writer.ai.embeddings.create(model="any", input="a"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            ask()
        assert refused.value.status_code == 424 and "this route is of a model that" in refused.value.message


# --- Text Embeddings Inference -----------------------------------------------------------------------------------


def test_llama_index_embeds_through_tei(embedder):
    client = llama.TextEmbeddingsInference(model_name="any", base_url=embedder.url, auth_token=TOKEN)
    assert close(client.get_text_embedding_batch(TEXTS * 5), vectors(embedder).repeat(5, 1))
    assert close(client.get_query_embedding(TEXTS[0]), vectors(embedder)[0])


def test_tei_embed_and_similarity(embedder):
    assert close(embedder.http.post("/embed", json={"inputs": TEXTS[0]}).json(), vectors(embedder)[:1])
    raw = embedder.http.post("/embed", json={"inputs": TEXTS, "normalize": False}).json()
    assert close(raw, vectors(embedder, normalize=False))
    long = {"inputs": "film " * 100}
    assert embedder.http.post("/embed", json=long).status_code == 422
    cut = embedder.http.post("/embed", json=long | {"truncate": True, "truncation_direction": "Right"}).json()
    assert close(cut, vectors(embedder, ["film " * 62]))
    reply = embedder.http.post("/embed", json=long | {"truncate": True, "truncation_direction": "Left"})
    assert reply.status_code == 422 and "truncation_direction is 'Left'" in reply.json()["error"]
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS}}
    assert close(embedder.http.post("/similarity", json=body).json(), vectors(embedder) @ vectors(embedder)[0])


def test_tei_predict(classifier):
    names = classifier.model.config.id2label
    whole = classifier.http.post("/predict", json={"inputs": [[text] for text in TEXTS]}).json()
    for text, found in zip(TEXTS, whole, strict=True):
        expected = logits(classifier, text).softmax(-1)
        assert {one["label"]: one["score"] for one in found} == pytest.approx(
            {names[i]: float(expected[i]) for i in range(3)}, abs=1e-4
        )
        alone = classifier.http.post("/predict", json={"inputs": text}).json()
        assert [one["label"] for one in alone] == [one["label"] for one in found]
    (pair,) = classifier.http.post("/predict", json={"inputs": [TEXTS[:2]], "raw_scores": True}).json()
    assert pair[0]["score"] == pytest.approx(float(logits(classifier, *TEXTS[:2]).max()), abs=1e-4)


def test_tei_rerank(reranker, classifier):
    asked = {"query": "who wrote it ?", "texts": TEXTS, "return_text": True}
    scores = {text: float(logits(reranker, "who wrote it ?", text).sigmoid()) for text in TEXTS}
    found = reranker.http.post("/rerank", json=asked).json()
    assert [one["text"] for one in found] == sorted(TEXTS, key=scores.get, reverse=True)
    assert all(TEXTS[one["index"]] == one["text"] for one in found)
    assert [one["score"] for one in found] == pytest.approx([scores[one["text"]] for one in found], abs=1e-4)
    assert "reranker" in reranker.http.get("/info").json()["model_type"]
    reply = classifier.http.post("/rerank", json=asked)
    assert reply.status_code == 424 and reply.json()["error_type"] == "Backend"


def test_tei_info_health_and_shapes_of_errors(embedder, classifier):
    info = embedder.http.get("/info").json()
    assert info["model_id"] == "model" and info["max_input_length"] == 64 and "embedding" in info["model_type"]
    assert classifier.http.get("/info").json()["model_type"]["classifier"]["id2label"]["1"] == "bad"
    assert embedder.http.head("/health").status_code == embedder.http.get("/health").status_code == 200
    many = embedder.http.post("/embed", json={"inputs": ["a"] * 129})
    assert many.status_code == 413 and many.json() == {
        "error": "129 texts are asked for at once; give 128 at most.",
        "error_type": "Validation",
    }
    assert classifier.http.post("/embed", json={"inputs": "a"}).status_code == 424
    empty = classifier.http.post("/", json={"inputs": [{"text": ""}]})
    assert empty.status_code == 422 and empty.json()["error"].startswith("inputs.0.text: String should have")
    other = classifier.http.get("/classify")
    assert other.status_code == 405 and other.json()["error"] == "GET is not allowed here; use POST."


def test_numbers_that_are_not_finite_are_no_answer(classifier, monkeypatch):
    def submit(self, *asked):
        future = Future()
        future.set_result({"logits": torch.tensor([[1.0, float("nan"), 0.0]])})
        return future

    monkeypatch.setattr(Session, "submit", submit)
    reply = classifier.http.post("/classify", json={"text": "a"})
    assert reply.status_code == 424 and "are not finite" in reply.json()["error"]


def test_a_full_queue_is_each_dialects_own_refusal(classifier, monkeypatch):
    def full(self, asked):
        raise QueueFull(64, 3.0)

    monkeypatch.setattr(Waiting, "add", full)
    for path, body, status in (
        ("/classify", {"text": "a"}, 503),
        ("/", {"inputs": "a"}, 503),
        ("/predict", {"inputs": "a"}, 429),
    ):
        reply = classifier.http.post(path, json=body)
        assert (reply.status_code, reply.headers["Retry-After"]) == (status, "3")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_is_json_whatever_its_content_type(classifier, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert classifier.http.post("/classify", content=b'{"text": "a film"}', headers=headers).status_code == 200


CALLS = re.findall(r"^    (\S.*?) +# served: an? (\w+)$", (repository_root() / "docs/serve.md").read_text(), re.M)


@pytest.mark.parametrize(("call", "kind"), CALLS)
def test_calls_that_are_shown_are_answered(request, call, kind):
    service = request.getfixturevalue(kind)
    tei = llama.TextEmbeddingsInference(model_name="any", base_url=service.url, auth_token=TOKEN)
    found = eval(call, {"hub": service.hub, "ai": service.ai, "http": service.http, "tei": tei})
    assert len(CALLS) == 11
    if isinstance(found, httpx.Response):  # the other clients raise what is refused
        found.raise_for_status()


# --- A request's own error ---------------------------------------------------------------------------------------


def test_a_job_that_fails_refuses_its_request_and_nobody_elses(reranker, monkeypatch):
    """Past the checks at the entry, real workers raise IndexError; others in the same batch are answered."""
    session, before = reranker.session, len(reranker.session.events)
    monkeypatch.setattr(Session, "_check", lambda self, inputs, new: None)
    good = torch.tensor([[2, 5, 7, 3]])
    bad = {"input_ids": good, "attention_mask": torch.ones_like(good), "token_type_ids": torch.full_like(good, 5)}
    fine = {"input_ids": good, "attention_mask": torch.ones_like(good)}
    attempts = []
    take = Asked.settle

    def spy(self, answer=None, error=None):
        attempts.append((self.attempts, type(error)))
        return take(self, answer, error)

    monkeypatch.setattr(Asked, "settle", spy)
    with session._waiting._changed:  # all wait before the first is taken
        futures = [session.submit(inputs) for inputs in (fine, bad, fine)]
    with pytest.raises(JobFailed, match="index out of range"):
        futures[1].result(60)
    with torch.inference_mode():
        expected = reranker.model(**fine).logits
    assert all(torch.allclose(futures[i].result(60)["logits"], expected, atol=1e-4) for i in (0, 2))
    with pytest.raises(JobFailed):
        session.submit(bad).result(60)
    assert attempts[-1] == (1, JobFailed), "alone it is not asked again"
    assert len(session.events) == before and session.present == (0, 1), "no device is lost"
    reply = reranker.http.post("/classify", json={"text": "who"})
    assert reply.status_code == 200


def test_a_job_that_fails_is_424_over_http(reranker, monkeypatch):
    monkeypatch.setattr(Session, "_check", lambda self, inputs, new: None)
    reply = reranker.http.post("/classify", json={"input_ids": [1, 99]})
    assert reply.status_code == 424 and "the model fails at this input" in reply.json()["error"]
    assert reranker.http.get("/health").json()["status"] == "serving"
