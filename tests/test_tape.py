"""What is recorded is what is executed: the tape that is priced and paced, against the executor on real processes.

One executor runs whole requests on the tape; put together of recorded layers, the same device's steps must be the same
list. And devices that do send must have launched what was recorded, in its order, with its bytes (also test_parallel).
"""

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.models.configuration import is_decoder
from detransformer.parallel.executor import Executor
from detransformer.parallel.layer import STRATEGIES, KeyValueCache
from detransformer.parallel.plan import layer_plan, published_plan, strategies_for
from detransformer.parallel.weights import WeightSource
from detransformer.parallel.wire import WIRE_FORMATS
from detransformer.planning.memory import held_bytes
from detransformer.planning.recorder import device_steps, segments
from detransformer.planning.tape import Compute, Start, Step, Tape, TapeComm

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, intermediate_size=20, vocab_size=31)
GPT2_SIZES = dict(n_embd=24, n_layer=3, n_head=6, n_inner=20, vocab_size=31)
UNEVEN = {1: [1.0], 2: [1.0, 2.0], 3: [1.0, 1.0, 2.0], 4: [1.0, 2.0, 1.0, 1.0]}
ORIGINAL = [name for name, strategy in STRATEGIES.items() if strategy.layer_kind == "original"]
SEQ_LEN, BATCH_SIZE = 11, 2


@pytest.fixture(scope="module")
def models() -> dict:
    """name -> (configuration, weights without numbers)."""
    with torch.device("meta"):
        bert, gpt2 = BertModel(BertConfig(**SIZES)), GPT2LMHeadModel(GPT2Config(**GPT2_SIZES))
        made = {"bert": bert, "bert, decoupled": decouple(bert, 1, 4), "bert, narrow": decouple(bert, 1, 4, "narrow")}
        made |= {"gpt2": gpt2, "gpt2, decoupled": decouple(gpt2, 1, 4)}
    return {name: (model.config, model.state_dict()) for name, model in made.items()}


def joined(steps: list[Step]) -> list[tuple]:
    """Starts, waits, and the sums of products between them."""
    found: list[tuple] = []
    for step in steps:
        if not isinstance(step, Compute):
            found.append(step)
        elif found and isinstance(found[-1], tuple):
            found[-1] = found[-1][0] + step.flops, found[-1][1] + step.weight_bytes
        else:
            found.append((step.flops, step.weight_bytes))
    return found


def check(model, plan, past: int = 0) -> None:
    """Every rank of `plan`: a request, or a decoder's token after `past` others, run whole on the tape."""
    (config, state), seq_len = model, 1 if past else SEQ_LEN
    ids = torch.zeros(BATCH_SIZE, seq_len, dtype=torch.long, device="meta")
    for rank in range(plan.num_devices):
        tape, weights = Tape(), WeightSource(state)
        device = Executor(config, plan, weights, TapeComm(rank, plan.num_devices, tape))
        cache = None
        if past:
            cache = KeyValueCache(past + seq_len)
            cache.num_tokens = past
        with tape:
            device(ids, cache=cache)
        steps = device_steps(config, plan, rank, seq_len, BATCH_SIZE, past)
        recorded, run = joined(steps), joined(list(tape.cut()))
        if not is_decoder(config):  # the pooler, whose reading is part of the latency that presets are calibrated on
            recorded[-1], run[-1] = recorded[-1][0], run[-1][0]
        assert recorded == run, f"{plan.describe()}, rank {rank}"
        assert weights.num_bytes == held_bytes(config, [plan], rank)


@pytest.mark.parametrize("strategy", ORIGINAL)
@pytest.mark.parametrize("model", ["bert", "bert, decoupled", "bert, narrow", "gpt2", "gpt2, decoupled"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_layers_put_together_are_the_whole_request(models, model, strategy, num_devices):
    """In 1 and 3 chunks, with uneven shares; in one chunk also a decoder's further tokens."""
    config, _ = models[model]
    names = strategies_for(config, strategy)
    for num_chunks in (1, 3):
        check(models[model], layer_plan("test", config, names, UNEVEN[num_devices], num_chunks=num_chunks))
    if is_decoder(config):
        check(models[model], layer_plan("test", config, names, UNEVEN[num_devices]), past=7)


@pytest.mark.parametrize("wire", WIRE_FORMATS[1:])
@pytest.mark.parametrize("strategy", ORIGINAL)
def test_compressed_messages_are_recorded_as_they_are_sent(models, strategy, wire):
    config, _ = models["bert, decoupled"]
    for direct in (False, True):
        names = strategies_for(config, strategy)
        check(
            models["bert, decoupled"],
            layer_plan("test", config, names, UNEVEN[4], wire, direct=direct, num_chunks=2),
        )


def test_any_strategy_after_any_other(models):
    config, _ = models["bert"]
    for first in ORIGINAL:
        for second in ORIGINAL:
            for direct in (False, True):
                names = (first, second, first)
                check(models["bert"], layer_plan("test", config, names, UNEVEN[3], direct=direct, num_chunks=2))


@pytest.mark.parametrize("strategy", ORIGINAL)
def test_devices_launch_what_was_recorded(cluster, cases, strategy):
    """On real processes: each collective's kind and bytes, in order, and as many segments of compute as are paced."""
    case = cases["decoupled"]
    names = strategies_for(case.config, strategy)
    plan = layer_plan("test", case.config, names, [1.0, 2.0, 1.0, 1.0], num_chunks=3)
    results = cluster.run(
        "run_plan", checkpoint=case.checkpoint, plan=plan.to_dict(), inputs=case.inputs, repeats=1, dtype="float64"
    )
    for rank, result in enumerate(results):
        steps = device_steps(case.config, plan, rank, SEQ_LEN, BATCH_SIZE, dtype=torch.float64)
        (sample,) = result["samples"]
        started = [(step.kind, step.num_bytes) for step in steps if isinstance(step, Start)]
        assert [tuple(transfer[:2]) for transfer in sample["transfers"]] == started
        assert sum(event[0] == "compute" for event in sample["events"]) == len(segments(steps))


def test_a_pipeline_is_recorded_stage_by_stage(models):
    config, _ = models["bert"]
    plan = published_plan("pp", config, [1.0] * 3)
    kinds = [
        [step.kind for step in device_steps(config, plan, rank, SEQ_LEN) if isinstance(step, Start)]
        for rank in range(3)
    ]
    assert kinds == [["send"], ["receive", "send"], ["receive"]]


def test_a_strategy_may_look_at_no_split_that_it_does_not_name(models):
    """What it names is all that recordings depend on."""
    config, _ = models["bert"]
    plan = layer_plan("test", config, ("tensor",) * 3, [1.0] * 2)
    named = STRATEGIES["tensor"].splits
    STRATEGIES["tensor"].splits = ("heads",)
    try:
        with pytest.raises(IndexError):
            device_steps(config, plan, 0, 13)
    finally:
        STRATEGIES["tensor"].splits = named
