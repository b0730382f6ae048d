"""The executor on a tape: its own products, starts and waits are what the cost model prices and the pacer paces.

A `Comm` that sends nothing writes down each start and each wait with its bytes; products are written down where they
are computed. Cut at starts and waits, both descriptions of a request must be the same list.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.models.configuration import layer_kinds
from detransformer.parallel import executor, linear, strategies
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.executor import Executor
from detransformer.parallel.plan import layer_plan
from detransformer.parallel.strategies import KeyValueCache
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import Compute, Start, Wait, device_parameters, device_steps

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, intermediate_size=20, vocab_size=31)
GPT2_SIZES = dict(n_embd=24, n_layer=3, n_head=6, n_inner=20, vocab_size=31)
SPEEDS = {
    1: ([1.0],),
    2: ([1.0, 1.0], [1.0, 2.0]),
    3: ([1.0] * 3, [1.0, 1.0, 2.0]),
    4: ([1.0] * 4, [1.0, 2.0, 1.0, 1.0]),
}
ORIGINAL_STRATEGIES = ("tensor", "sequence", "ulysses", "heads", "galaxy", "replicate")
SEQ_LEN, BATCH_SIZE = 11, 2


class Tape:
    """What one device does for a request, in order: `("start", kind, bytes)`, `("wait", n)` and sums of products."""

    def __init__(self):
        self.steps: list[tuple] = []
        self.num_started = 0

    def event(self, *event) -> None:
        self.steps.append(event)

    def product(self, flops: float, weight_bytes: float) -> None:
        """Joins the products between two events: the model lists Q apart from K and V, which lie packed."""
        if self.steps and self.steps[-1][0] == "products":
            _, flops_before, bytes_before = self.steps.pop()
            flops, weight_bytes = flops + flops_before, weight_bytes + bytes_before
        if flops or weight_bytes:
            self.steps.append(("products", flops, weight_bytes))


class TapeComm(Comm):
    """One rank of several that are not there: right shapes, nothing sent, everything written down."""

    def __init__(self, rank: int, num_ranks: int, tape: Tape):
        super().__init__(None, rank, num_ranks)
        self.tape = tape

    def _start(self, kind: str, num_bytes: int, run, result) -> Pending:
        number, self.tape.num_started = self.tape.num_started, self.tape.num_started + 1
        self.tape.event("start", kind, num_bytes)

        def finish():
            self.tape.event("wait", number)
            return result()

        return Pending(finish=finish)


@dataclass
class Model:
    config: object
    state: dict


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    torch.manual_seed(1)
    bert, gpt2 = BertModel(BertConfig(**SIZES)), GPT2LMHeadModel(GPT2Config(**GPT2_SIZES))
    made = {"bert": bert, "bert, decoupled": decouple(bert, 1, 4), "bert, narrow": decouple(bert, 1, 4, "narrow")}
    made |= {"gpt2": gpt2, "gpt2, decoupled": decouple(gpt2, 1, 4)}
    return {name: Model(model.config, model.state_dict()) for name, model in made.items()}


@pytest.fixture
def tape(monkeypatch) -> Tape:
    """Writes down each product of the executor, wherever it is computed."""
    tape = Tape()

    def hooked(call):
        def run(self, x):
            y = call(self, x)
            blocks, rows = (
                (len(x), x.shape[1]) if isinstance(self, linear.StackedLinear) else (1, x.numel() // x.shape[-1])
            )
            numbers = blocks * x.shape[-1] * y.shape[-1]
            tape.product(2 * rows * numbers, 4 * numbers if rows else 0)
            return y

        return run

    for kind in (linear.Linear, linear.StackedLinear):
        monkeypatch.setattr(kind, "__call__", hooked(kind.__call__))
    attend = strategies.attend

    def attended(q, k, v, head_size, mask):
        tape.product(4 * q.shape[1] * k.numel(), 0)
        return attend(q, k, v, head_size, mask)

    monkeypatch.setattr(strategies, "attend", attended)
    following = torch.nn.functional.linear

    def ends(x, weight, bias=None):
        """The pooler, whose reading is part of the calibrated latency, or a decoder's words."""
        rows = x.numel() // x.shape[-1]
        tape.product(2 * rows * weight.numel(), 0 if bias is not None else weight.nbytes)
        return following(x, weight, bias)

    monkeypatch.setattr(executor.F, "linear", ends)
    return tape


def priced(config, plan, rank: int, seq_len: int, past: int) -> Tape:
    """The cost model's list for the same device."""
    tape = Tape()
    for step in device_steps(config, plan, rank, seq_len, BATCH_SIZE, past=past):
        if isinstance(step, Compute):
            tape.product(step.flops, step.weight_bytes)
        elif isinstance(step, Start):
            tape.event("start", step.kind, step.num_bytes)
        else:
            assert isinstance(step, Wait)
            tape.event("wait", step.number)
    return tape


def check(model: Model, plan, tape: Tape, past: int = 0) -> None:
    """Every rank of `plan`: a request, or a decoder's token after `past` others."""
    source_state, seq_len = model.state, 1 if past else SEQ_LEN
    ids = torch.zeros(BATCH_SIZE, seq_len, dtype=torch.long)
    for rank in range(plan.num_devices):
        tape.steps, tape.num_started = [], 0
        weights = WeightSource(source_state)
        device = Executor(model.config, plan, weights, TapeComm(rank, plan.num_devices, tape))
        cache = None
        if past:
            cache = KeyValueCache(past + seq_len)
            cache.num_tokens = past
        device(ids, cache=cache)
        assert tape.steps == priced(model.config, plan, rank, seq_len, past).steps, f"{plan.describe()}, rank {rank}"
        assert weights.num_bytes == 4 * device_parameters(model.config, plan, rank)


@pytest.mark.parametrize("strategy", ORIGINAL_STRATEGIES)
@pytest.mark.parametrize("model", ["bert", "bert, decoupled", "bert, narrow", "gpt2", "gpt2, decoupled"])
@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_what_is_executed_is_what_is_priced(models, tape, model, strategy, num_devices):
    """In 1, 2 and 4 chunks, with even and uneven shares; in one chunk also a decoder's further tokens."""
    config = models[model].config
    names = ["block" if kind == "decoupled" else strategy for kind in layer_kinds(config)]
    for speeds in SPEEDS[num_devices]:
        for num_chunks in (1, 2, 4):
            plan = layer_plan("test", config, names, speeds, num_chunks=num_chunks)
            check(models[model], plan, tape)
        if "gpt2" in model:
            check(models[model], layer_plan("test", config, names, speeds), tape, past=7)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("strategy", ORIGINAL_STRATEGIES)
def test_compressed_messages_are_priced_as_they_are_sent(models, tape, strategy, wire):
    config = models["bert, decoupled"].config
    names = ["block" if kind == "decoupled" else strategy for kind in layer_kinds(config)]
    for direct in (False, True):
        plan = layer_plan("test", config, names, SPEEDS[4][1], wire, direct=direct, num_chunks=2)
        check(models["bert, decoupled"], plan, tape)


def test_the_tape_counts_what_is_there(models, tape):
    """The comparison can fail: another strategy's tape is another one."""
    config = models["bert"].config
    one, other = (priced(config, layer_plan("test", config, [n] * 3, [1.0] * 4), 0, 11, 0) for n in ("tensor", "heads"))
    assert one.steps != other.steps
    assert Counter(step[0] for step in one.steps)["start"] == 6  # two all_reduces a layer
