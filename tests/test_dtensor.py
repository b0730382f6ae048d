"""PyTorch's tensor parallelism among our processes: the single device's output, and the collectives of `tp`."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from detransformer.cluster.devices import preset_profile
from detransformer.models import preset_config
from detransformer.parallel.comm import Comm
from detransformer.parallel.dtensor import DTensorExecutor, check_shards
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import predict
from detransformer.planning.profile import ClusterProfile, LinkProfile

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig
from detransformer.parallel.dtensor import DTensorExecutor
from detransformer.parallel.comm import Comm
from detransformer.parallel.plan import published_plan

class Log:
    def __init__(self):
        self.events = []
    def launch(self, kind, num_bytes):
        self.events.append([kind, num_bytes])
        return len(self.events)
    def before_wait(self, number):
        self.events.append("wait")
    def after_wait(self, number):
        self.events.append("done")

store, folder, inputs, rank, num_ranks = sys.argv[1:]
rank, num_ranks = int(rank), int(num_ranks)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
plan = published_plan("dtensor", AutoConfig.from_pretrained(folder), [1.0] * num_ranks)
group = dist.new_group(list(range(num_ranks)))
executor = DTensorExecutor(folder, plan, Comm(group, rank, num_ranks))
masked = load_file(inputs)
for request in (masked, {"input_ids": masked["input_ids"]}):
    log = Log()
    comm = Comm(group, rank, num_ranks)
    comm.observer = log
    executor.comm = comm
    output = executor(**request)
    print(json.dumps({
        "outputs": [output.last_hidden_state.tolist(), output.pooler_output.tolist()], "counts": comm.counts,
        "bytes": comm.bytes, "events": log.events, "weights_bytes": executor.weights_bytes,
    }))
dist.destroy_process_group()
"""


def run(case, num_ranks, folder) -> list[list[dict]]:
    """What each rank prints of the masked request and of the unmasked one."""
    arguments = [folder / "store", case.checkpoint, case.inputs]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments), str(rank), str(num_ranks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), results[0][1]
    return [[json.loads(line) for line in output.splitlines()] for output, _ in results]


@pytest.fixture(scope="module")
def single(cases) -> list[list[torch.Tensor]]:
    """The single device's output and pooled output for the masked request and the unmasked one."""
    model = BertModel.from_pretrained(cases["original"].checkpoint, dtype=torch.float64).eval()
    masked = load_file(cases["original"].inputs)
    with torch.no_grad():
        return [list(model(**r, return_dict=False)) for r in (masked, {"input_ids": masked["input_ids"]})]


def largest_difference(outputs, reference) -> float:
    pairs = zip(outputs, reference, strict=True)
    return max(float((torch.as_tensor(x, dtype=torch.float64) - y).abs().max()) for x, y in pairs)


TOLERANCE = 1e-12  # float64: sums in another order


@pytest.mark.slow
def test_two_devices_equal_one(cases, single, tmp_path):
    case = cases["original"]
    num_collectives, one_x = 2 * case.config.num_hidden_layers, 8 * 2 * 11 * case.config.hidden_size
    whole = sum(t.nbytes for t in case.state.values() if t.is_floating_point())
    for rank in run(case, 2, tmp_path):
        for result, reference in zip(rank, single, strict=True):
            assert largest_difference(result["outputs"], reference) < TOLERANCE
            assert result["counts"] == {"all_reduce": num_collectives}
            assert result["bytes"] == {"all_reduce": num_collectives * one_x}  # 2 (P-1)/P of X, P = 2
            assert result["events"] == [["all_reduce", one_x], "wait", "done"] * num_collectives
            assert whole / 2 < result["weights_bytes"] < whole


def test_one_device_runs_the_model_whole(cases, single):
    case = cases["original"]
    comm = Comm(None, 0, 1)
    executor = DTensorExecutor(case.checkpoint, published_plan("dtensor", case.config), comm)
    output = executor(**load_file(case.inputs))
    assert largest_difference([output.last_hidden_state, output.pooler_output], single[0]) < TOLERANCE
    assert not comm.counts and output.logits is None
    assert executor.weights_bytes == sum(t.nbytes for t in case.state.values() if t.is_floating_point())


def test_plans_that_do_not_fit_are_refused(cases):
    case = cases["original"]
    with pytest.raises(ValueError, match="the plan is for 2 devices and the group has 1"):
        DTensorExecutor(case.checkpoint, published_plan("dtensor", case.config, [1.0] * 2), Comm(None, 0, 1))
    with pytest.raises(ValueError, match="intermediate_size=70 does not divide by 3 devices"):
        DTensorExecutor(case.checkpoint, published_plan("dtensor", case.config, [1.0] * 3), Comm(None, 0, 3))


def test_costs_what_tp_costs():
    config = preset_config("bert-base")
    profile = ClusterProfile((preset_profile("rpi4b", config),) * 4, LinkProfile(125e6))
    dtensor, tp = (predict(config, published_plan(m, config, [1.0] * 4), profile) for m in ("dtensor", "tp"))
    assert (dtensor.latency_s, dtensor.counts, dtensor.bytes) == (tp.latency_s, tp.counts, tp.bytes)


def test_shards_must_be_equal():
    config = preset_config("bert-base")
    for num_devices in (1, 2, 3, 4):
        check_shards(config, num_devices)
    with pytest.raises(ValueError, match="num_attention_heads=12 does not divide by 5 devices"):
        check_shards(config, 5)
    config.intermediate_size = 3073
    with pytest.raises(ValueError, match="intermediate_size=3073 does not divide by 4 devices, .* or tp"):
        check_shards(config, 4)
