"""Every plan on 1 to 4 real processes equals the single-device model, and counts what the cost model counts."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from detransformer.parallel.codec import decode, encode
from detransformer.parallel.comm import Comm
from detransformer.parallel.executor import Executor
from detransformer.parallel.linear import Linear, StackedLinear, laid_out
from detransformer.parallel.plan import layer_plan, published_plan, strategies_for
from detransformer.parallel.weights import WeightSource
from detransformer.parallel.wire import message_bytes
from parity import STRATEGIES_OF_ORIGINAL, TOLERANCE, UNEVEN, check_counts, check_run, in_turn, run_plan, started

# RMS error over the RMS of the output, of a 5-layer model whose every message is rounded: 8 bits of mantissa err by up
# to 0.4% a number, 127 steps a row's largest by up to 0.4% of that, 7 steps by up to 7%, and errors add up over layers.
WIRE_TOLERANCE = {"bfloat16": 0.02, "int8": 0.05, "int4": 0.5}
ORIGINAL = ("single", "dp", "pp", "tp", "sp", "ulysses", "galaxy")
BLOCKS = ("bp+tp", "bp+sp", "bp+allgather", "bp+ulysses", "bp+heads")


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    "model, method",
    [("original", m) for m in ORIGINAL]
    + [("decoupled", m) for m in ("single", "pp", *BLOCKS)]
    + [("narrow", m) for m in ("bp+tp", "bp+heads")],
)
def test_plan_equals_single_device(cluster, cases, model, method, num_devices, uneven):
    case = cases[model]
    plan = published_plan(method, case.config, UNEVEN[num_devices] if uneven else [1.0] * num_devices)
    check_run(cluster, case, plan)


@pytest.mark.parametrize("num_devices, num_chunks", [(2, 2), (3, 4), (4, 3), (4, 12)])
@pytest.mark.parametrize("strategy", STRATEGIES_OF_ORIGINAL)
@pytest.mark.parametrize("model", ["original", "decoupled"])
def test_chunks_that_overlap_change_nothing(cluster, cases, model, strategy, num_devices, num_chunks):
    case = cases[model]
    strategies = strategies_for(case.config, strategy)
    speeds = UNEVEN[num_devices]
    plan = layer_plan("bp+auto", case.config, strategies, speeds, num_chunks=num_chunks)
    check_run(cluster, case, plan)


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES_OF_ORIGINAL)
@pytest.mark.parametrize("model", ["original", "decoupled"])
def test_a_device_may_be_too_slow_for_any_part(cluster, cases, model, strategy, num_chunks):
    """Not a head, not a token, not a column or sub-block."""
    case, speeds = cases[model], [1.0, 1.0, 0.01]
    strategies = strategies_for(case.config, strategy)
    plan = layer_plan("bp+auto", case.config, strategies, speeds, num_chunks=num_chunks)
    assert plan.heads[2] == plan.ffn_columns[2] == 0
    check_run(cluster, case, plan)


@pytest.mark.parametrize("last", STRATEGIES_OF_ORIGINAL)
@pytest.mark.parametrize("first", STRATEGIES_OF_ORIGINAL)
@pytest.mark.parametrize("direct", [False, True])
def test_any_strategy_may_follow_any_other(cluster, cases, first, last, direct):
    """Every pair of layouts, with and without a decoupled layer between."""
    for case in (cases["original"], cases["decoupled"]):
        layers = in_turn(case.config, first, last)
        plan = layer_plan("bp+auto", case.config, layers, UNEVEN[3], direct=direct, num_chunks=2)
        check_run(cluster, case, plan)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seq_len", [1, 3, 32, 128, 512])
@pytest.mark.parametrize(
    "model, method, num_chunks",
    [("original", "tp", 1), ("original", "sp", 1), ("original", "ulysses", 1), ("original", "galaxy", 4)]
    + [("decoupled", "bp+tp", 1), ("decoupled", "bp+sp", 1), ("decoupled", "bp+heads", 4)],
)
def test_lengths_and_batches(cluster, cases, tmp_path, model, method, num_chunks, seq_len, batch_size):
    case = cases[model]
    inputs, reference = case.request(tmp_path, batch_size, seq_len)
    plan = replace(published_plan(method, case.config, [1.0] * 4), num_chunks=num_chunks)
    check_run(cluster, case, plan, seq_len, batch_size, inputs=inputs, reference=reference)


@pytest.mark.parametrize("wire", WIRE_TOLERANCE)
@pytest.mark.parametrize(
    "model, method", [("original", m) for m in ORIGINAL if m != "single"] + [("decoupled", m) for m in BLOCKS]
)
def test_wire_formats(cluster, cases, model, method, wire):
    """Compressed messages move the output by no more than stated, and weigh what the cost model says."""
    case = cases[model]
    plan = published_plan(method, case.config, UNEVEN[3], wire)
    results = run_plan(cluster, case, plan)
    error = max(r["relative_error"] for r in results if "relative_error" in r)
    assert error < WIRE_TOLERANCE[wire]
    if results[-1]["counts"]:
        assert error > TOLERANCE  # something was rounded
    for rank, result in enumerate(results):
        check_counts(result, started(case, plan, rank, 11, 2))


def test_wire_messages_keep_what_they_carry():
    """bfloat16 keeps 8 bits of mantissa; int8 and int4 err by half a step of the largest; zeros and signs stay."""
    x = torch.randn(3, 5, 7, dtype=torch.float64) * 10.0 ** torch.arange(-8, 7).reshape(3, 5, 1)
    x[1, 2] = 0
    formats = ("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5001 / 127), ("int4", 0.5 / 7 + 2**-8)
    for number_format, relative in formats:
        message = torch.zeros(message_bytes(x.shape, number_format, 8), dtype=torch.uint8)
        encode(x, number_format, message)
        back = decode(message, x.shape, number_format, x.dtype)
        assert ((back - x).abs() <= relative * x.abs().amax(-1, keepdim=True)).all()
        assert (back[1, 2] == 0).all()
    assert message_bytes((4, 96), "int8") == 4 * 4 + 4 * 96  # the rows' scales travel in front of them
    assert message_bytes((4, 96), "int4") == 4 * 3 * (2 + 16)  # a scale for 32 numbers


def test_messages_of_tokens_keep_what_tokens_have_in_common():
    """K and V [2, t, B, n]: equal tokens of a segment stay as they are in int8, as do tokens of few other vectors."""
    torch.manual_seed(0)
    segments = torch.randn(2, 2, 3, 40, dtype=torch.float64)
    x = torch.cat([segments[:, :1].expand(-1, 8, -1, -1), segments[:, 1:].expand(-1, 5, -1, -1)], dim=1)
    few = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)[None, :, None, None].expand(2, 16, 3, 40)
    for number_format, tokens, num_bytes in (("means8", x, 2 * 2 * 3 * 44), ("vq4", few, 2 * 3 * 44 + 512 + 240)):
        message = torch.zeros(message_bytes(tokens.shape, number_format, 8), dtype=torch.uint8)
        encode(tokens, number_format, message)
        back = decode(message, tokens.shape, number_format, tokens.dtype)
        assert ((back - tokens).abs() <= 0.5001 / 127 * tokens.abs().amax(-1, keepdim=True)).all()
        assert num_bytes <= len(message) < num_bytes + 16


@pytest.mark.parametrize("wire", ["fp8", ""])
def test_bad_wire_is_one_sentence(cases, wire):
    with pytest.raises(ValueError, match=f"wire {wire!r} is unknown: choose one of float32"):
        published_plan("tp", cases["original"].config, [1.0] * 2, wire=wire)


def test_a_wrong_weight_is_noticed(cluster, cases):
    """The parity check can fail: another model's output is not this one's."""
    case, other = cases["decoupled"], cases["original"]
    plan = published_plan("bp+tp", case.config, [1.0] * 2)
    results = run_plan(cluster, case, plan, reference=other.reference)
    assert results[0]["max_abs_error"] > 1e-3


def test_output_is_written(cluster, cases, tmp_path):
    case = cases["original"]
    path = tmp_path / "output.safetensors"
    run_plan(cluster, case, published_plan("tp", case.config, [1.0] * 3), output=str(path))
    written, expected = load_file(path), load_file(case.reference)
    assert set(written) == {"last_hidden_state", "pooler_output"}
    assert float((written["pooler_output"] - expected["pooler_output"]).abs().max()) < TOLERANCE


def test_executor_refuses_what_does_not_fit(cases):
    case = cases["original"]
    with pytest.raises(ValueError, match="is for 2 devices and the group has 1"):
        Executor(case.config, published_plan("tp", case.config, [1, 1]), WeightSource(case.state), Comm(None, 0, 1))
    with pytest.raises(ValueError, match="is for decoupled layers"):
        plan = published_plan("bp+tp", cases["decoupled"].config)
        Executor(case.config, plan, WeightSource(case.state), Comm(None, 0, 1))


@pytest.mark.parametrize("num_in, num_out", [(5, 7), (48, 1024), (1024, 512), (3, 2048)])
def test_linear_maps_are_torchs_whatever_way_the_weight_lies(num_in, num_out):
    """Also where rows of the weight are a multiple of 4 KiB, and so padded; in parts, without a bias, without rows."""
    x, weight, bias = torch.randn(2, 3, num_in).double(), torch.randn(num_out, num_in).double(), torch.randn(num_out)
    bias, linear = bias.double(), Linear(laid_out(weight.mT), bias.double())
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(Linear(laid_out(weight.mT))(x), x @ weight.T)
    assert linear(x[:0]).shape == (0, 3, num_out)
    assert linear.weight.stride(0) * 8 % 4096 != 0
    blocks = StackedLinear(laid_out(weight.mT.expand(2, -1, -1)), bias.expand(2, -1))
    torch.testing.assert_close(blocks(x), expected)
    torch.testing.assert_close(StackedLinear(laid_out(weight.mT[None]), bias[None])(x[:1]), expected[:1])
