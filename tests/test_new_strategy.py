"""A strategy is one class: one is defined here, run over real processes, priced and planned; nothing else is added."""

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from detransformer.models import preset_config
from detransformer.parallel.comm import Comm, Pending
from detransformer.parallel.executor import Executor
from detransformer.parallel.layer import SEQ, STRATEGIES, Request, Strategy, register, together
from detransformer.parallel.parameters import LayerParameters
from detransformer.parallel.plan import Plan, layer_plan, strategies_for
from detransformer.parallel.reshard import gather_tokens
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import predict
from detransformer.planning.memory import held_bytes
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.recorder import device_steps
from detransformer.planning.tape import Compute, Start


class GatheredX(Strategy):
    """SP that gathers X and computes K and V of all tokens on every device: half the bytes, more products."""

    in_layout = out_layout = SEQ
    splits = ("tokens_share",)

    def load(self, parameters: LayerParameters) -> None:
        self.load_attention(parameters, own_heads=False)
        self.load_rest(parameters)

    def __call__(self, chunks: Iterable[Pending], request: Request) -> Iterator[torch.Tensor]:
        xs = [chunk.wait() for chunk in chunks]
        gathers = [gather_tokens(x, self.comm, c, self.plan.wire) for x, c in zip(xs, request.chunks, strict=True)]
        qkv = [self.qkv(gather.wait()) for gather in gathers]  # [B, T, 3, D]
        k, v = together([part[:, :, 1] for part in qkv]), together([part[:, :, 2] for part in qkv])
        k, v = self.remember(k, v, request)
        for part, x, chunk in zip(qkv, xs, request.chunks, strict=True):
            start, stop = chunk.of(self.comm.rank)
            mask = request.mask_of(chunk.start + start, chunk.start + stop)
            yield self.after_attention(self.attend(part[:, start:stop, 0], k, v, mask), x)


@pytest.fixture
def name() -> Iterator[str]:
    """The strategy under a name of its own, forgotten afterwards."""
    register("own")(GatheredX)
    yield "own"
    del STRATEGIES["own"]


def run_rank(rank: int, size: int, store: Path, folder: str, inputs: str, plan: Plan, out: Path) -> None:
    """One device of a request, in a process of its own: writes its output, what it sent and its weights' bytes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    register("own")(GatheredX)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    comm, weights = Comm(dist.group.WORLD, rank, size), WeightSource(folder, torch.float64)
    output = Executor(AutoConfig.from_pretrained(folder), plan, weights, comm)(**load_file(inputs))
    save_file({"state": output.last_hidden_state.contiguous()}, out / f"{rank}.safetensors")
    record = {"sent": [transfer[:2] for transfer in comm.transfers], "weights": weights.num_bytes}
    (out / f"{rank}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("model", ["original", "decoupled"])
def test_it_runs_over_real_processes(cases, tmp_path, name, model):
    """Every device has the single device's output, and launched and keeps what its own tape says."""
    case, size = cases[model], 3
    plan = layer_plan("own", case.config, strategies_for(case.config, name), [1.0, 1.0, 2.0], num_chunks=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # which imports everything once
    arguments = size, tmp_path / "store", case.checkpoint, case.inputs, plan, tmp_path
    ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0] * size
    expected = load_file(case.reference)["last_hidden_state"]
    for rank in range(size):
        state = load_file(tmp_path / f"{rank}.safetensors")["state"]
        assert float((state - expected).abs().max()) < 1e-12
        record = json.loads((tmp_path / f"{rank}.json").read_text())
        steps = device_steps(case.config, plan, rank, 11, 2, dtype=torch.float64)
        assert record["sent"] == [[step.kind, step.num_bytes] for step in steps if isinstance(step, Start)]
        assert record["weights"] == 2 * held_bytes(case.config, [plan], rank)


def test_it_is_priced_and_planned(name):
    """Its operations, bytes and weights are known without a word about it elsewhere, and the planner looks at it."""
    config = preset_config("bert-base")
    devices = tuple(DeviceProfile(f"d{i}", 2**32, 1e10, "test") for i in range(4))
    profile = ClusterProfile(devices, LinkProfile(1e8, {"*": 0.0}))
    plan = layer_plan("own", config, (name,) * 12, [1.0] * 4)
    found = predict(config, plan, profile)
    flops = sum(step.flops for step in device_steps(config, plan, 0, 128) if isinstance(step, Compute))
    assert found.compute_s == pytest.approx(flops / 1e10)
    sequence = predict(config, layer_plan("sp", config, ("sequence",) * 12, [1.0] * 4), profile)
    assert found.counts == sequence.counts == {"all_gather": 13}
    one_x = 3 * 32 * 768 * 4
    assert (found.bytes["all_gather"], sequence.bytes["all_gather"]) == (13 * one_x, 25 * one_x)
    placement = place_freely(config, profile)
    assert any(set(a.plan.strategies) == {name} for a in placement.alternatives)
