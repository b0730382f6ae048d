"""The jobs of a worker: run a plan, generate text, time collectives, check its link and its clock."""

import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig

from detransformer import machine
from detransformer.cluster.pacing import Pacer
from detransformer.cluster.state import Loaded, WorkerState
from detransformer.parallel.draw import Sampling
from detransformer.parallel.executor import Executor, request_shape
from detransformer.parallel.generation import Generator
from detransformer.parallel.linear import can_pack
from detransformer.parallel.plan import Plan, published_plan
from detransformer.planning.recorder import device_steps

Tensors = Mapping[str, torch.Tensor]


def run_plan(
    state: WorkerState,
    checkpoint: str,
    plan: dict,
    inputs: str | Tensors,
    repeats: int,
    warmup: int = 1,
    device: dict | None = None,
    link: dict | None = None,
    time_scale: float = 1.0,
    stream: int = 0,
    dtype: str = "float32",
    reference: str | None = None,
    output: str | dict[str, torch.Tensor] | None = None,
    held_with: Sequence[dict] = (),
    burns: bool = False,
    keep_models: int = 0,
) -> dict | None:
    """Runs this rank's part of `plan` `repeats` times and reports every sample; None if the plan leaves it out.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        inputs: input_ids and optionally attention_mask and token_type_ids [B, T], or a ViT's pixel_values; or a
            safetensors file of them.
        device: this rank's `DeviceProfile` as a dict, to pace by; None: the host's own speed.
        link: `LinkProfile` as a dict, if the link is modelled; None: it is real.
        time_scale: everything modelled lasts this many times longer; times are reported in the device's seconds.
        stream: number of requests that are also timed back to back, for throughput (pipeline, data parallel).
        reference: safetensors file of the single-device output to compare with, on the rank that has the result.
        output: file to write that result to, or a dict to put it into.
        held_with: all plans that are loaded at once, this one among them; their weights stay when another is run.
        burns: a paced segment computes products instead of sleeping.
        keep_models: number of earlier models that stay in memory.

    A sample's `events` are the pacer's, on the host's clock, which all workers share. `peak_rss_bytes` is the largest
    resident size while loading and running, minus that before; None if the system does not report it.
    """
    made = Plan.from_dict(plan)
    loaded = state.load(checkpoint, held_with or [plan], dtype, keep_models)
    if not state.takes_part(made.device_ids):
        return None
    tensors = _read(inputs)
    batch_size, seq_len = request_shape(loaded.config, tensors.get("pixel_values", tensors.get("input_ids")))
    executor, is_new = state.runner(loaded, made, lambda: _executor(state, loaded, checkpoint, made, dtype))
    comm = executor.comm
    machine.restart_peak()
    segment_s, link_s = loaded.pace(made, comm.rank, device, link, time_scale, seq_len, batch_size)
    comm.observer = None
    for _ in range(warmup if is_new else 0):
        executor(**tensors)
    pacer = comm.observer = Pacer(segment_s, link_s, state.arrivals, comm.rank, made.device_ids, burns)
    samples = []
    for sample in range(repeats):
        comm.reset()
        pacer.reset()
        sent = state.sent_bytes()
        state.start_together(comm, made.device_ids, sample)
        start = time.perf_counter()
        pacer.begin()
        result = executor(**tensors)
        pacer.end()
        seconds = time.perf_counter() - start
        samples.append(
            {
                "latency_s": seconds / time_scale,
                "overrun_s": pacer.overrun_s / time_scale,
                "modelled_s": pacer.modelled_s / time_scale,
                "link_bytes": state.sent_bytes() - sent,
                "events": [(what, *(round(s, 6) for s in seconds)) for what, *seconds in pacer.events],
                "transfers": [(kind, num_bytes, seconds / time_scale) for kind, num_bytes, seconds in comm.transfers],
            }
        )
    record = {
        "samples": samples,
        "counts": dict(comm.counts),
        "bytes": dict(comm.bytes),
        "weights_bytes": loaded.weights.num_bytes if loaded.weights else executor.weights_bytes,
        "peak_rss_bytes": state.note_peak(loaded),
    }
    if stream:
        comm.barrier()
        start = time.perf_counter()
        for _ in range(stream):
            pacer.begin()
            executor(**tensors)
            pacer.end()
        record["stream_s"] = (time.perf_counter() - start) / time_scale
    if result is not None:
        named = ("last_hidden_state", "pooler_output", "logits", "next_token")
        outputs = {name: tensor for name in named if (tensor := getattr(result, name, None)) is not None}
        if reference:
            record |= output_errors(outputs, load_file(reference))
        if output is not None and comm.rank == made.num_devices - 1:
            _hand_over(outputs, output)
    return record


def generate(
    state: WorkerState,
    checkpoint: str,
    prefill: dict,
    decode: dict,
    inputs: str | Tensors,
    max_new_tokens: int,
    device: dict | None = None,
    link: dict | None = None,
    time_scale: float = 1.0,
    dtype: str = "float32",
    output: str | dict[str, torch.Tensor] | None = None,
    sampling: Sequence[dict] = (),
    stop_tokens: Sequence[int] = (),
    tells: bool = False,
) -> dict | None:
    """Generates text: the prompt runs under plan `prefill`, each further token under `decode`. None if left out.

    Arguments as in `run_plan`; prompts are padded on the left. `sampling`: one `Sampling` per row, as dicts; if empty,
    tokens are the likeliest. Generation ends early if every row has had one of `stop_tokens`, or the front needs no
    more of it. `tells`: each token [B] is sent to the front when it is made.

    Returns `tokens` [B][max_new_tokens at most], the seconds of each token `token_s` (the first is the prompt's),
    `overrun_s` and `modelled_s` summed over them, `counts` and `bytes` of one decoding step's collectives, and the
    bytes of weights and of the KV cache.
    """
    plans = Plan.from_dict(prefill), Plan.from_dict(decode)
    devices = plans[0].device_ids
    loaded = state.load(checkpoint, [prefill, decode], dtype)
    if not state.takes_part(devices):
        return None
    parts = loaded.config, *plans, loaded.weights
    generator, is_new = state.runner(loaded, plans, lambda: Generator(*parts, state.comm(devices)))
    comm = generator.prefill.comm
    tensors = _read(inputs)
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    batch_size, seq_len = ids.shape

    comm.observer = None
    if is_new:  # warm up
        first = generator.start(ids, mask, min(2, max_new_tokens))
        if not generator.ended:
            generator.step(first)
    sizes = [(plans[0], seq_len, 0)] + [(plans[1], 1, seq_len + i) for i in range(max_new_tokens - 1)]
    paces = [  # modelled before, not between, the tokens
        loaded.pace(plan, comm.rank, device, link, time_scale, length, batch_size, past) for plan, length, past in sizes
    ]
    pacer = comm.observer = Pacer(*paces[0], state.arrivals, comm.rank, devices)
    state.start_together(comm, devices, 0)
    rows, has_result = [Sampling(**row) for row in sampling], comm.rank == plans[0].num_devices - 1
    made, token_s = [], []
    for segment_s, link_s in paces:
        comm.reset()
        start = time.perf_counter()
        pacer.segment_s, pacer.link_s = segment_s, link_s
        pacer.begin()
        asked = (ids, mask, max_new_tokens, rows, stop_tokens)
        made.append(generator.step(made[-1]) if made else generator.start(*asked))
        pacer.end()
        token_s.append((time.perf_counter() - start) / time_scale)
        if tells and has_result:
            state.tell(made[-1].tolist())
        if generator.ended:
            break
        generator.finish(state.enough())
    tokens = torch.stack(made, dim=1)  # [B, max_new_tokens at most]
    if output is not None and has_result:
        _hand_over({"tokens": tokens}, output)
    return {
        "tokens": tokens.tolist(),
        "token_s": token_s,
        "overrun_s": pacer.overrun_s / time_scale,
        "modelled_s": pacer.modelled_s / time_scale,
        "counts": dict(comm.counts),
        "bytes": dict(comm.bytes),
        "weights_bytes": loaded.weights.num_bytes,
        "cache_bytes": generator.cache.num_bytes,
    }


def _executor(state: WorkerState, loaded: Loaded, checkpoint: str, plan: Plan, dtype: str) -> Executor:
    comm = state.comm(plan.device_ids)
    if plan.runs == "dtensor":
        from detransformer.parallel.dtensor import DTensorExecutor

        return DTensorExecutor(checkpoint, plan, comm, getattr(torch, dtype))
    return Executor(loaded.config, plan, loaded.weights, comm, loaded.held_with)


def _read(inputs: str | Tensors) -> Tensors:
    return load_file(inputs) if isinstance(inputs, str) else inputs


def _hand_over(outputs: Tensors, target: str | dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in outputs.items()}
    if isinstance(target, dict):
        target.update(tensors)
    else:
        save_file(tensors, target)


def warm_up_libraries() -> None:
    """Runs each kernel once, so that the libraries' code and pools do not count as a model's memory."""
    can_pack()
    x, weight = torch.zeros(1, 8, 128, 64), torch.zeros(512, 512)
    with torch.inference_mode():
        F.embedding(torch.zeros(1, 128, dtype=torch.long), weight)
        F.linear(F.gelu(F.layer_norm(x.view(1, 128, 512), (512,))), weight, weight[0])
        F.scaled_dot_product_attention(x, x, x)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    device_steps(config, published_plan("single", config), 0, seq_len=1)  # and the tape


def output_errors(outputs: Tensors, expected: Tensors) -> dict[str, float]:
    """Errors of `outputs` against the single device's: the largest absolute one, and RMS relative to the output's."""
    errors = {name: (outputs[name] - tensor, tensor) for name, tensor in expected.items()}
    return {
        "max_abs_error": max(float(error.abs().max()) for error, _ in errors.values()),
        "relative_error": max(
            float(error.square().mean().sqrt() / t.square().mean().sqrt()) for error, t in errors.values()
        ),
    }


def self_check(
    state: WorkerState,
    num_devices: int,
    link_bytes: int,
    segment_s: float,
    num_segments: int,
    in_turn: bool = False,
) -> dict | None:
    """Sends `link_bytes` over every link (0: over none), then paces `num_segments` segments that compute nothing.

    Links are checked one direction at a time, since acknowledgements would wait behind data; `in_turn` also one after
    another, for a shared medium. Returns `sent` and `received`, (from, to, seconds on the host's clock) of each
    transfer's start and end as seen by this device, and `pacing_error`, the relative excess of the segments' time.
    """
    n = num_devices
    if state.rank >= n:
        return None
    comm = state.comm(tuple(range(n)))
    result: dict = {"sent": [], "received": []}
    buffer = torch.zeros(link_bytes, dtype=torch.uint8)
    rounds = link_rounds(n) if link_bytes else []
    for pairs in [[pair] for part in rounds for pair in part] if in_turn else rounds:
        comm.barrier()
        for source, target in pairs:
            if state.rank == source:
                result["sent"].append((source, target, time.perf_counter()))
                dist.send(buffer, group=comm.group, group_dst=target)
            elif state.rank == target:
                dist.recv(buffer, group=comm.group, group_src=source)
                result["received"].append((source, target, time.perf_counter()))
    comm.barrier()
    pacer = Pacer([segment_s, 0.0] * num_segments + [0.0])  # 0.0 between launch and wait, and after the last
    start = time.perf_counter()
    pacer.begin()
    for _ in range(num_segments):
        number = pacer.launch("check", 0)
        pacer.before_wait(number)
        pacer.after_wait(number)
    pacer.end()
    return result | {"pacing_error": (time.perf_counter() - start) / pacer.modelled_s - 1}


def link_rounds(num_devices: int) -> list[list[tuple[int, int]]]:
    """Rounds of (from, to): every device sends once and receives once, one at a time."""
    n = num_devices
    pairs = [[(r, r + 1) for r in range(0, n - 1, 2)]] + ([[(n - 1, 0)]] if n % 2 and n > 1 else [])
    return pairs + [[(b, a) for a, b in part] for part in pairs]


def time_collective(state: WorkerState, kind: str, num_floats: int, num_devices: int, repeats: int) -> dict | None:
    """Times one collective on `num_devices` ranks; returns each repeat's seconds and the bytes that this rank sends.

    `num_floats` is what this rank reduces, gathers, sends or (all_to_all, reduce_scatter) scatters.
    """
    if state.rank >= num_devices:
        return None
    comm = state.comm(tuple(range(num_devices)))
    x = torch.zeros(num_floats)
    parts = list(x[: max(1, num_floats // num_devices)].expand(num_devices, -1))
    shapes = [part.shape for part in parts]
    calls = {
        "all_reduce": lambda: comm.start_all_reduce(x).wait(),
        "all_gather": lambda: comm.start_all_gather(x, [x.shape] * num_devices).wait(),
        "all_to_all": lambda: comm.start_all_to_all(parts, shapes).wait(),
        "reduce_scatter": lambda: comm.start_reduce_scatter(parts).wait(),
    }
    if kind == "send" and state.rank == 0:
        calls["send"] = lambda: comm.send(x, 1)
    elif kind == "send" and state.rank == 1:
        calls["send"] = lambda: comm.receive(x.shape, x.dtype, 0)
    seconds = []
    for _ in range(repeats + 1):
        comm.reset()
        comm.barrier()
        start = time.perf_counter()
        calls.get(kind, lambda: None)()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "bytes": comm.bytes[kind]}
