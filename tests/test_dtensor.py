"""PyTorch's tensor parallelism among our processes: the single device's output, and the collectives of `tp`."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from detransformer.cluster.devices import preset_profile
from detransformer.models import preset_config
from detransformer.parallel.comm import Comm
from detransformer.parallel.dtensor import DTensorExecutor, check_shards
from detransformer.parallel.plan import published_plan
from detransformer.planning.cost import predict
from detransformer.planning.profile import ClusterProfile, LinkProfile
from parity import TOLERANCE, run_plan


def bytes_of(case) -> int:
    return sum(tensor.nbytes for tensor in case.state.values() if tensor.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_two_devices_equal_one(cluster, cases, tmp_path, masked):
    """Outputs, collectives and weights; each collective ends a segment of compute that is paced, as in `tp`."""
    case = cases["original"]
    inputs, reference = case.inputs, case.reference
    if not masked:
        request = {"input_ids": load_file(inputs)["input_ids"]}
        with torch.no_grad():
            state = case.model(**request).last_hidden_state
        inputs, reference = str(tmp_path / "inputs"), str(tmp_path / "reference")
        save_file(request, inputs)
        save_file({"last_hidden_state": state}, reference)
    plan = published_plan("dtensor", case.config, [1.0] * 2)
    results = run_plan(cluster, case, plan, inputs=inputs, reference=reference)
    num_collectives, one_x = 2 * case.config.num_hidden_layers, 8 * 2 * 11 * case.config.hidden_size
    assert len(results) == 2
    for result in results:
        assert result["max_abs_error"] < TOLERANCE
        assert result["counts"] == {"all_reduce": num_collectives}
        assert result["bytes"] == {"all_reduce": num_collectives * one_x}  # 2 (P-1)/P of X, P = 2
        assert bytes_of(case) / 2 < result["weights_bytes"] < bytes_of(case)
        (sample,) = result["samples"]
        assert sum(event[0] == "compute" for event in sample["events"]) == 2 * num_collectives + 1


def test_one_device_runs_the_model_whole(cases):
    case = cases["original"]
    comm = Comm(None, 0, 1)
    executor = DTensorExecutor(case.checkpoint, published_plan("dtensor", case.config), comm, torch.float64)
    output = executor(**load_file(case.inputs))
    for name, expected in load_file(case.reference).items():
        torch.testing.assert_close(getattr(output, name), expected, rtol=0, atol=TOLERANCE)
    assert not comm.counts and output.logits is None
    assert executor.weights_bytes == bytes_of(case)


def test_plans_that_do_not_fit_are_refused(cases):
    case = cases["original"]
    two, three = (published_plan("dtensor", case.config, [1.0] * count) for count in (2, 3))
    with pytest.raises(ValueError, match="the plan is for 2 devices and the group has 1"):
        DTensorExecutor(case.checkpoint, two, Comm(None, 0, 1), torch.float64)
    with pytest.raises(ValueError, match="intermediate_size=70 does not divide by 3 devices"):
        DTensorExecutor(case.checkpoint, three, Comm(None, 0, 3), torch.float64)


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
