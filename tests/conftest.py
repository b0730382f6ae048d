"""Shared fixtures: small models on disk and a cluster of real processes over loopback."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background jobs; processes that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)  # would inherit it
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("test_hosts", "test_training_robust", "test_cli", "test_service", "test_training_jobs", "test_cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that at the end no process is left alone with one of them."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# Odd on purpose: 6 heads and 4 sub-blocks over 3 devices, 11 tokens over 2 to 4, 70 FFN columns.
SIZES = dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=70, vocab_size=101)


class Case:
    """A model on disk with a masked, padded request and its single-device output, all float64."""

    def __init__(self, folder, model):
        folder.mkdir()
        self.checkpoint, self.config, self.model = str(folder), model.config, model
        self.state = model.state_dict()
        model.save_pretrained(folder)
        self.inputs, self.reference = self.request(folder, 2, 11)

    def request(self, folder, batch_size: int, seq_len: int) -> tuple[str, str]:
        """Files of a request, its last sequence padded, and of the single device's output."""
        generator = torch.Generator().manual_seed(7)
        mask = torch.ones(batch_size, seq_len, dtype=torch.long)
        mask[-1, max(1, 2 * seq_len // 3) :] = 0
        types = (torch.arange(seq_len) > 4).long().expand(batch_size, -1).contiguous()
        ids = torch.randint(101, (batch_size, seq_len), generator=generator)
        request = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        with torch.no_grad():
            output = self.model(**request)
        inputs, reference = folder / "inputs.safetensors", folder / "reference.safetensors"
        save_file(request, inputs)
        save_file({"last_hidden_state": output[0], "pooler_output": output[1]}, reference)
        return str(inputs), str(reference)


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> dict[str, Case]:
    """`original`, `decoupled` (D O D D O) and `narrow`, with random weights, biases and LayerNorms."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    bert = BertModel(BertConfig(**SIZES)).double().eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {
        "original": Case(folder / "original", bert),
        "decoupled": Case(folder / "decoupled", decouple(bert, num_original_layers=2, num_divisions=4)),
        "narrow": Case(folder / "narrow", decouple(bert, 2, 4, attention_width="narrow")),
    }


def random_model(kind: type, config, std: float = 0.2):
    """A model of `kind` whose weights are random, the same each time, and large enough to matter."""
    torch.manual_seed(3)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def save_with_words(model, words: list[str], folder: Path) -> None:
    """Saves a model, and a tokenizer that knows these words."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def wait_until(condition: Callable[[], object], timeout_s: float, seen: Callable[[], object] = lambda: "") -> None:
    """Returns once `condition` holds; fails after `timeout_s` and shows what was `seen`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, seen()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def float32_folder(cases, tmp_path_factory) -> str:
    """The original model in float32, as a user's checkpoint."""
    folder = tmp_path_factory.mktemp("float32")
    BertModel.from_pretrained(cases["original"].checkpoint, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def random_gpt2():
    """A GPT-2 of given sizes, its biases and LayerNorms random too; float64, so that orders of summing hardly show."""

    def make(sizes: dict, std: float = 0.2) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
        return model

    return make


@pytest.fixture(scope="module")
def one_thread():
    """For torch and BLAS: threads of small products only wait for each other; and sums have one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cluster():
    """Four worker processes with real gloo between them, over loopback."""
    from detransformer.cluster.session import EmulatedCluster

    with EmulatedCluster(4, transport="loopback") as session:
        yield session


# Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The generated corpus and its tasks."""
    from detransformer.training import open_data

    return open_data("built-in", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory, data) -> Path:
    """Folder of a BERT of two layers with the tokenizer of `data`, small enough to learn in a second."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    folder = tmp_path_factory.mktemp("small")
    BertForMaskedLM(BertConfig(**sizes, vocab_size=data.vocab_size, initializer_range=0.07)).save_pretrained(folder)
    data.save_tokenizer(folder)
    return folder


class Steps(list):
    """The numbers, from 1, of the steps that were trained."""

    last = math.inf

    def interrupt(self, last: int, train: Callable, *arguments) -> None:
        """Calls `train`, which ends as by a crash after step `last` and its checkpoint; after 0: it would train."""
        self.last = last
        with pytest.raises(InterruptedError):
            train(*arguments)
        self.last = math.inf
        self.clear()


@pytest.fixture
def steps(monkeypatch) -> Steps:
    from detransformer.training import loop

    seen, rate = Steps(), loop.learning_rate

    def watched(step: int, *recipe) -> float:
        if step == seen.last:
            raise InterruptedError
        seen.append(step + 1)
        return rate(step, *recipe)

    monkeypatch.setattr(loop, "learning_rate", watched)
    return seen
