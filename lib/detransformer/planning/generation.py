"""Plans for text generation: separate plans for the prompt and each further token (TPDS 2025: auto-regressive tasks).

A prompt has many tokens: compute dominates, and messages grow with it. A further token reads every weight for one row:
a device takes as long as reading them from memory, and messages are all latency. So a layer may be split by tokens in
the prompt and by columns afterwards, as long as both keep the same keys and values on a device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from detransformer.parallel.layer import REPLICATE, STRATEGIES
from detransformer.parallel.plan import Plan, layer_plan, strategies_for
from detransformer.planning.cost import predict
from detransformer.planning.memory import cache_bytes, held_bytes
from detransformer.planning.placement import CHUNKS
from detransformer.planning.problem import Problem
from detransformer.planning.profile import ClusterProfile


@dataclass(frozen=True)
class GenerationPlan:
    """How a text is generated, and the cost model's figures for it in seconds and bytes.

    `memory_bytes` has an entry per rank: weights of both plans, keys and values of all tokens, activations.
    """

    prefill: Plan
    decode: Plan
    first_token_s: float
    token_s: float  # of a further token, when half of them exist
    total_s: float
    memory_bytes: tuple[int, ...]


def price_generation(
    config: PretrainedConfig,
    prefill: Plan,
    decode: Plan,
    profile: ClusterProfile,
    prompt_len: int,
    num_tokens: int,
    batch_size: int = 1,
) -> GenerationPlan:
    """The predicted cost of `num_tokens` new tokens after prompts [batch_size, prompt_len]."""
    first = predict(config, prefill, profile, prompt_len, batch_size)
    past = prompt_len + num_tokens // 2
    further = predict(config, decode, profile, 1, batch_size, past=past)
    memory = tuple(
        held_bytes(config, [prefill, decode], device)
        + cache_bytes(config, decode, rank, prompt_len + num_tokens, batch_size)
        + first.activation_bytes
        for rank, device in enumerate(prefill.device_ids)
    )
    total = first.latency_s + (num_tokens - 1) * further.latency_s
    return GenerationPlan(prefill, decode, first.latency_s, further.latency_s, total, memory)


def generation_candidates(
    config: PretrainedConfig, speeds: Sequence[float], devices: Sequence[int] = ()
) -> Iterator[tuple[Plan, Plan]]:
    """All pairs of uniform strategies with the same keys and values, with chunks in the prompt; splits by `speeds`."""
    original = {name: strategy for name, strategy in STRATEGIES.items() if strategy.layer_kind == "original"}
    # one token cannot be split by tokens
    single = [name for name, s in original.items() if s.in_layout == s.out_layout == REPLICATE]

    def plan(strategy: str, num_chunks: int = 1) -> Plan:
        strategies = strategies_for(config, strategy)
        return layer_plan("bp+auto", config, strategies, speeds, num_chunks=num_chunks, devices=devices)

    for prompt in original:
        for further in single:
            if original[prompt].cache == original[further].cache:
                for num_chunks in CHUNKS:
                    yield plan(prompt, num_chunks), plan(further)


def place_generation(
    config: PretrainedConfig,
    profile: ClusterProfile,
    prompt_len: int,
    num_tokens: int,
    batch_size: int = 1,
    memory_budget_bytes: int | None = None,
) -> GenerationPlan:
    """The fastest plan for the whole text that fits, over all devices or over fewer of the fastest ones.

    Raises:
        ValueError: if none fits, saying how much is missing.
    """
    problem = Problem(config, profile, prompt_len, batch_size, budget=memory_budget_bytes)
    priced: list[tuple[int, GenerationPlan]] = []  # bytes over the budget of the device that lacks most
    for count in range(1, len(problem.order) + 1):
        chosen = sorted(problem.order[:count])
        speeds = [problem.speeds[i] for i in chosen]
        try:
            pairs = list(generation_candidates(config, speeds, chosen))
        except ValueError:  # more devices than heads or sub-blocks
            continue
        if count == 1:
            pairs = pairs[-1:]  # all strategies are the same on one device
        for prefill, decode in pairs:
            plan = price_generation(config, prefill, decode, profile, prompt_len, num_tokens, batch_size)
            over = max(needed - problem.budgets[i] for needed, i in zip(plan.memory_bytes, chosen, strict=True))
            priced.append((over, plan))
    over, plan = min(priced, key=lambda pair: pair[0])
    if over > 0:
        raise ValueError(
            f"no plan fits: the smallest ({plan.decode.describe()} on {plan.prefill.num_devices} devices) needs "
            f"{over / 2**20:.0f} MiB more than a device has; add devices or memory, or take a smaller model."
        )
    return min((plan for over, plan in priced if over <= 0), key=lambda plan: plan.total_s)
