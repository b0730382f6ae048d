"""Every plan on 1 to 4 real processes equals the single-device model, and counts what the cost model counts."""

import pytest

from detransformer.parallel.comm import Comm
from detransformer.parallel.executor import Executor
from detransformer.parallel.plan import published_plan
from detransformer.parallel.weights import WeightSource
from detransformer.planning.cost import Collective, device_parameters, device_steps

# float64: what is left is the order of summation
TOLERANCE = 1e-12
UNEVEN = {1: [1.0], 2: [1.0, 2.0], 3: [1.0, 1.0, 2.0], 4: [1.0, 2.0, 1.0, 1.0]}


def run(cluster, case, plan, reference=None, **job):
    results = cluster.run(
        "run_plan",
        checkpoint=case.checkpoint,
        plan=plan.to_dict(),
        inputs=case.inputs,
        reference=reference or case.reference,
        dtype="float64",
        repeats=1,
        warmup=0,
        **job,
    )
    return [result for result in results if result is not None]


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    "model, method",
    [("original", m) for m in ("single", "dp", "pp", "tp", "sp")]
    + [(model, m) for model in ("decoupled", "narrow") for m in ("single", "pp", "bp+tp", "bp+sp", "bp+allgather")],
)
def test_plan_equals_single_device(cluster, cases, model, method, num_devices, uneven):
    case = cases[model]
    plan = published_plan(method, case.config, UNEVEN[num_devices] if uneven else [1.0] * num_devices)
    results = run(cluster, case, plan)
    errors = [r["max_abs_error"] for r in results if "max_abs_error" in r]
    # A pipeline's result is on its last device; every other plan leaves it on all.
    assert len(errors) == (1 if method == "pp" else plan.num_devices)
    assert max(errors) < TOLERANCE
    for rank, result in enumerate(results):
        collectives = [s for s in device_steps(case.config, plan, rank, 11, 2) if isinstance(s, Collective)]
        kinds = {c.kind for c in collectives}
        assert result["counts"] == {k: sum(c.kind == k for c in collectives) for k in kinds}
        # the model counts float32, the run was float64
        assert result["bytes"] == {k: 2 * sum(c.num_bytes for c in collectives if c.kind == k) for k in kinds}
        assert result["weights_bytes"] == 8 * device_parameters(case.config, plan, rank)


def test_more_devices_than_sub_blocks(cluster, cases):
    """A device without a sub-block still takes part in the original layers."""
    case = cases["decoupled"]
    plan = published_plan("bp+tp", case.config, [1.0] * 4)
    from dataclasses import replace

    plan = replace(plan, sub_blocks=(2, 0, 1, 1))
    assert max(r["max_abs_error"] for r in run(cluster, case, plan)) < TOLERANCE


def test_a_wrong_weight_is_noticed(cluster, cases, tmp_path):
    """The parity check can fail: another model's output is not this one's."""
    case, other = cases["decoupled"], cases["original"]
    plan = published_plan("bp+tp", case.config, [1.0] * 2)
    results = run(cluster, case, plan, reference=other.reference)
    assert results[0]["max_abs_error"] > 1e-3


def test_output_is_written(cluster, cases, tmp_path):
    from safetensors.torch import load_file

    case = cases["original"]
    path = tmp_path / "output.safetensors"
    run(cluster, case, published_plan("tp", case.config, [1.0] * 3), output=str(path))
    written, expected = load_file(path), load_file(case.reference)
    assert set(written) == {"last_hidden_state", "pooler_output"}
    assert float((written["pooler_output"] - expected["pooler_output"]).abs().max()) < TOLERANCE


def test_state_dict_and_file_give_the_same_parts(cases):
    import torch

    case = cases["original"]
    from_file = WeightSource(f"{case.checkpoint}/model.safetensors", torch.float64)
    from_state = WeightSource(case.state, torch.float64)
    name = "encoder.layer.0.attention.output.dense.weight"
    assert torch.equal(from_file.take(name, 1, 8, 24), from_state.take(name, 1, 8, 24))
    assert from_file.num_bytes == from_state.num_bytes == 48 * 16 * 8
    with pytest.raises(ValueError, match="no weight 'encoder.layer.9"):
        from_state.take("encoder.layer.9.attention.output.dense.weight")


def test_task_heads(tmp_path, cases):
    """Classifier and question-answering heads give the Hugging Face model's logits."""
    import torch
    from transformers import BertForQuestionAnswering, BertForSequenceClassification

    for base in (BertForSequenceClassification, BertForQuestionAnswering):
        model = base(cases["original"].config).double().eval()
        ids = torch.randint(101, (2, 9))
        plan = published_plan("single", model.config)
        output = Executor(model.config, plan, WeightSource(model.state_dict(), torch.float64), Comm(None, 0, 1))(ids)
        with torch.no_grad():
            expected = model(ids)
        if base is BertForSequenceClassification:
            torch.testing.assert_close(output.logits, expected.logits)
        else:
            stacked = torch.stack([expected.start_logits, expected.end_logits], dim=-1)
            torch.testing.assert_close(output.logits, stacked)


def test_executor_refuses_what_does_not_fit(cases):
    case = cases["original"]
    with pytest.raises(ValueError, match="is for 2 devices and the group has 1"):
        Executor(case.config, published_plan("tp", case.config, [1, 1]), WeightSource(case.state), Comm(None, 0, 1))
    with pytest.raises(ValueError, match="needs a decoupled layer"):
        plan = published_plan("bp+tp", cases["decoupled"].config)
        Executor(case.config, plan, WeightSource(case.state), Comm(None, 0, 1))
