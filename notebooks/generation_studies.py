"""The study of notebook 10, on text generation: seconds to the first token and of each further one."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from latency_studies import measured_bench, on_testbed
from safetensors.torch import save_file
from tqdm.auto import tqdm

from detransformer.answers import single_device_outputs
from detransformer.cluster.bench import MAX_TIME_SCALE, Bench
from detransformer.cluster.cells import Cell, RowFile
from detransformer.cluster.selfcheck import check_cluster, host_time_scale
from detransformer.cluster.session import EmulatedCluster
from detransformer.opening import Checkpoint
from detransformer.parallel.plan import published_plan
from detransformer.planning.generation import GenerationPlan, place_generation, price_generation
from detransformer.planning.problem import device_speeds

# A token is many short segments, each some 0.1 ms late. A larger time scale would hide that, and the links' latency.
MAX_LATE_TOKENS = 0.1


def generation_rows(
    run_path: str | Path,
    model: str,
    methods: Sequence[str],
    bandwidths_mbps: Sequence[float],
    num_devices: int = 4,
    prompt_lens: Sequence[int] = (16, 32, 64),
    max_new_tokens: int = 64,
    transport: str = "auto",
) -> pd.DataFrame:
    """Greedy text after one prompt of each length: seconds to the first token and of each further one.

    `single` and `tp` run the original model, `bp+...` the decoupled one; `equal_tokens` counts tokens that equal those
    of the single-device Hugging Face model. `auto` and `bp+auto` are `planning.generation.place_generation`'s choice.
    A message's latency comes from software, so a time scale of k makes it k times smaller in the devices' seconds:
    `predicted_...` is the cost model's prediction with that latency, `predicted_unscaled_...` with all of it.
    """
    path = Path(run_path) / "generation_rows.json"
    rows = []
    with EmulatedCluster(num_devices, bandwidth_bps=bandwidths_mbps[0] * 1e6, transport=transport) as cluster:
        bench, kept = measured_bench(run_path, cluster), RowFile(path, cluster, [__file__])
        cells = [
            Cell(model, method, 1 if method == "single" else num_devices, mbps, seq_len=length, repeats=1)
            for method in methods
            for mbps in (bandwidths_mbps[:1] if method == "single" else bandwidths_mbps)
            for length in prompt_lens
        ]
        progress = tqdm(cells, unit="text", desc="generation")
        for cell in progress:
            progress.set_postfix_str(f"{cell.method} {cell.bandwidth_mbps:g} Mbps, prompt of {cell.seq_len}")
            key = asdict(cell) | {"max_new_tokens": max_new_tokens}
            rows.append(kept.get(key) or kept.put(key, measure_generation(bench, cell, max_new_tokens)))
    return pd.DataFrame(rows)


def plan_generation(bench: Bench, cell: Cell, max_new_tokens: int) -> GenerationPlan:
    """The plan of `cell`'s method for a prompt of its length and this many new tokens, with its prediction."""
    config, profile = bench.config(cell), bench.profile(cell)
    if cell.method in ("auto", "bp+auto"):
        return place_generation(config, profile, cell.seq_len, max_new_tokens)
    plan = published_plan(cell.method, config, device_speeds(profile))
    return price_generation(config, plan, plan, profile, cell.seq_len, max_new_tokens)


def measure_generation(bench: Bench, cell: Cell, max_new_tokens: int) -> dict:
    """One row of `generation_rows`; a row late by more than `MAX_LATE_TOKENS` is measured again at twice the scale."""
    cluster, checkpoint, planned = bench.cluster, bench.checkpoint(cell), plan_generation(bench, cell, max_new_tokens)
    inputs, expected = text_request(checkpoint, cell.seq_len, max_new_tokens, cluster.folder)
    profile, everybody = bench.profile(cell), bench.every_device(cell)
    sends = planned.prefill.num_devices > 1
    scale = host_time_scale(cluster, checkpoint.config, profile, planned.prefill.device_ids, sends)
    while True:
        scale, check = bench.set_link(cell.bandwidth_mbps, planned.prefill.num_devices, scale, sends)
        results = cluster.run(
            "generate",
            per_rank=[{"device": asdict(device)} for device in everybody.devices],
            checkpoint=str(checkpoint.path),
            prefill=planned.prefill.to_dict(),
            decode=planned.decode.to_dict(),
            inputs=str(inputs),
            max_new_tokens=max_new_tokens,
            link=asdict(profile.link) if cluster.transport == "loopback" else None,
            time_scale=scale,
        )
        results = [result for result in results if result]
        check = check.joined(check_cluster(cluster, cell.bandwidth_mbps, planned.prefill.num_devices, sends))
        overrun = max(r["overrun_s"] / r["modelled_s"] for r in results)
        if overrun <= MAX_LATE_TOKENS or 2 * scale > MAX_TIME_SCALE:
            break
        scale *= 2
    testbed = price_generation(
        checkpoint.config, planned.prefill, planned.decode, on_testbed(profile, scale), cell.seq_len, max_new_tokens
    )
    token_s = [max(r["token_s"][i] for r in results) for i in range(max_new_tokens)]
    equal = sum(a == b for a, b in zip(results[0]["tokens"][0], expected, strict=True))
    reasons = check.failures(cell.bandwidth_mbps)
    if overrun > MAX_LATE_TOKENS:
        reasons.append(f"host late by {overrun:.1%} of what is modelled")
    if equal < max_new_tokens:
        reasons.append(f"{max_new_tokens - equal} of {max_new_tokens} tokens are not the single device's")
    sent = max((r["bytes"] for r in results), key=lambda sent: sum(sent.values()))
    return {
        "model": cell.model,
        "method": cell.method,
        "prompt_plan": planned.prefill.describe(),
        "token_plan": planned.decode.describe(),
        "num_devices": planned.prefill.num_devices,
        "bandwidth_mbps": cell.bandwidth_mbps,
        "prompt_len": cell.seq_len,
        "new_tokens": max_new_tokens,
        "equal_tokens": equal,
        "first_token_s": token_s[0],
        "token_s": statistics.median(token_s[1:]),
        "total_s": sum(token_s),
        "predicted_first_token_s": testbed.first_token_s,
        "predicted_token_s": testbed.token_s,
        "predicted_unscaled_first_token_s": planned.first_token_s,
        "predicted_unscaled_token_s": planned.token_s,
        "sent_bytes_a_token": sum(sent.values()),
        "weights_bytes": max(r["weights_bytes"] for r in results),
        "cache_bytes": max(r["cache_bytes"] for r in results),
        "link": cluster.link,
        "device": cluster.profile_name,
        "time_scale": scale,
        "pacing_overrun": overrun,
        "valid": not reasons,
        "why_invalid": "; ".join(reasons),
    }


def text_request(checkpoint: Checkpoint, prompt_len: int, max_new_tokens: int, folder: Path) -> tuple[Path, list[int]]:
    """A file with a random prompt [1, prompt_len], and the greedy tokens with which Hugging Face's model continues."""
    path = folder / f"{checkpoint.path.name}-prompt{prompt_len}.safetensors"
    generator = torch.Generator().manual_seed(prompt_len)
    ids = torch.randint(checkpoint.config.vocab_size, (1, prompt_len), generator=generator)
    save_file({"input_ids": ids}, path)
    outputs = single_device_outputs(str(checkpoint.path), checkpoint.config, {"input_ids": ids}, max_new_tokens)
    return path, outputs["tokens"][0].tolist()
