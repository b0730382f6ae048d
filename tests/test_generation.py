"""Text generated over 1 to 4 real processes is the single device's, token for token; plans, caches and errors."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.models.configuration import layer_kinds
from detransformer.parallel.generation import check_generation
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.plan import layer_plan, published_plan
from detransformer.planning.generation import place_generation, price_generation
from detransformer.planning.memory import cache_bytes, held_bytes
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from detransformer.planning.recorder import device_steps
from detransformer.planning.tape import Start

NEW_TOKENS = 12
UNEVEN = {1: [1.0], 2: [1.0, 2.0], 3: [1.0, 1.0, 2.0], 4: [1.0, 2.0, 1.0, 1.0]}
ORIGINAL = [name for name, signature in STRATEGIES.items() if signature.layer_kind == "original"]
GOES_ON_AS = {"own": "tensor", "all": "replicate"}  # what decodes after a prompt whose keys and values are kept so


class Text:
    """A GPT-2 on disk in float64, two left-padded prompts, and what Hugging Face's model makes of them."""

    def __init__(self, folder, model):
        folder.mkdir()
        self.checkpoint, self.config, self.inputs = str(folder), model.config, str(folder / "inputs.safetensors")
        model.save_pretrained(folder)
        ids = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(5))
        self.mask = torch.ones_like(ids)
        self.mask[1, :3] = 0
        save_file({"input_ids": ids, "attention_mask": self.mask}, self.inputs)
        with torch.no_grad():
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            hidden = model.transformer(input_ids=ids, attention_mask=self.mask, position_ids=positions)
            self.hidden = hidden.last_hidden_state
            text = model.generate(
                ids, attention_mask=self.mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
        self.tokens = text[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Text]:
    folder = tmp_path_factory.mktemp("texts")
    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=48, n_layer=5, n_head=6, n_inner=70, vocab_size=101, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    gpt2 = GPT2LMHeadModel(config).double().eval()
    for parameter in gpt2.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return {
        "original": Text(folder / "original", gpt2),
        "decoupled": Text(folder / "decoupled", decouple(gpt2, num_original_layers=2, num_divisions=4)),
        "narrow": Text(folder / "narrow", decouple(gpt2, 2, 4, attention_width="narrow")),
    }


def plan_of(config, strategy: str, speeds, num_chunks: int = 1, devices=()):
    strategies = ["block" if kind == "decoupled" else strategy for kind in layer_kinds(config)]
    return layer_plan("bp+auto", config, strategies, speeds, num_chunks=num_chunks, devices=devices)


def generate(cluster, text, prefill, decode, **job):
    results = cluster.run(
        "generate",
        checkpoint=text.checkpoint,
        prefill=prefill.to_dict(),
        decode=decode.to_dict(),
        inputs=text.inputs,
        max_new_tokens=NEW_TOKENS,
        dtype="float64",
        **job,
    )
    return [result for result in results if result is not None]


# Every strategy on every number of devices, decoupled; original and narrow models on some of them.
CASES = [("decoupled", strategy, 3 - 2 * (n % 2), n) for strategy in ORIGINAL for n in (1, 2, 3, 4)]
CASES += [("original", strategy, num_chunks, n) for strategy in ORIGINAL for num_chunks, n in ((1, 2), (3, 4))]
CASES += [("narrow", "heads", 1, 3), ("narrow", "tensor", 3, 4)]


@pytest.mark.parametrize("model, strategy, num_chunks, num_devices", CASES)
def test_text_equals_single_device(cluster, texts, tmp_path, model, strategy, num_chunks, num_devices):
    """Also: each prompt's last hidden state, what is counted, and what is kept, as the cost model says."""
    text = texts[model]
    speeds = UNEVEN[num_devices]
    prefill = plan_of(text.config, strategy, speeds, num_chunks)
    decode = plan_of(text.config, GOES_ON_AS[STRATEGIES[strategy].cache], speeds)
    output = tmp_path / "output.safetensors"
    cluster.run(
        "run_plan",
        checkpoint=text.checkpoint,
        plan=prefill.to_dict(),
        inputs=text.inputs,
        repeats=1,
        warmup=0,
        dtype="float64",
        output=str(output),
    )
    got = load_file(output)
    assert ((got["last_hidden_state"] - text.hidden) * text.mask[..., None]).abs().max() < 1e-12
    assert got["next_token"].tolist() == [row[0] for row in text.tokens]
    results = generate(cluster, text, prefill, decode)
    assert len(results) == num_devices
    for rank, result in enumerate(results):
        assert result["tokens"] == text.tokens
        past = 9 + NEW_TOKENS - 2
        steps = device_steps(text.config, decode, rank, 1, 2, past, torch.float64)
        started = [step for step in steps if isinstance(step, Start)]
        assert result["counts"] == dict(Counter(step.kind for step in started))
        assert sum(result["bytes"].values()) == sum(step.num_bytes for step in started)
        assert result["weights_bytes"] == 2 * held_bytes(text.config, [prefill, decode], rank)
        assert result["cache_bytes"] == 2 * cache_bytes(text.config, decode, rank, 9 + NEW_TOKENS, 2)


def test_devices_in_another_order(cluster, texts):
    """A plan names its devices: the first one left out, the others turned round."""
    text = texts["decoupled"]
    plan = plan_of(text.config, "tensor", [1.0, 2.0, 1.0], devices=(3, 1, 2))
    results = cluster.run(
        "generate",
        checkpoint=text.checkpoint,
        prefill=plan.to_dict(),
        decode=plan.to_dict(),
        inputs=text.inputs,
        max_new_tokens=NEW_TOKENS,
        dtype="float64",
    )
    assert results[0] is None and all(result["tokens"] == text.tokens for result in results[1:])


def test_what_cannot_take_turns_is_refused(texts):
    config = texts["original"].config
    heads, replicate = plan_of(config, "heads", [1.0, 1.0]), plan_of(config, "replicate", [1.0, 1.0])
    with pytest.raises(ValueError, match="keeps own keys under 'heads', and 'replicate' needs all"):
        check_generation(config, heads, replicate)
    with pytest.raises(ValueError, match=r"split alike, and their heads are \(3, 3\) and \(2, 4\)"):
        check_generation(config, heads, plan_of(config, "tensor", [1.0, 2.0]))
    with pytest.raises(ValueError, match="pipeline"):
        pipeline = published_plan("pp", config, [1.0, 1.0])
        check_generation(config, pipeline, pipeline)


def test_too_long_a_text_is_refused_before_it_starts(cluster, texts):
    from detransformer.cluster.devices import DeviceError
    from detransformer.cluster.session import EmulatedCluster

    text = texts["original"]
    plan = plan_of(text.config, "tensor", [1.0])
    with EmulatedCluster(1, transport="loopback") as one, pytest.raises(DeviceError, match="64 positions.*56 tokens"):
        one.run(
            "generate",
            checkpoint=text.checkpoint,
            prefill=plan.to_dict(),
            decode=plan.to_dict(),
            inputs=text.inputs,
            max_new_tokens=57,
        )


PI = DeviceProfile("pi", 4 * 2**30, 14e9, "assumed", 4.8e9)


def test_prompt_and_tokens_are_planned_apart():
    """At GPT-2's size: the prompt by tokens in chunks, further tokens by columns; neither slower than TP for both."""
    config = GPT2Config()
    for mbps in (125, 1000):
        profile = ClusterProfile((PI,) * 4, LinkProfile(1e6 * mbps))
        best = place_generation(config, profile, 128, 64)[0]
        plan = published_plan("tp", config, [1.0] * 4)
        tensor = price_generation(config, plan, plan, profile, 128, 64)
        assert best.total_s < tensor.total_s and best.first_token_s <= tensor.first_token_s
        assert set(best.decode.strategies) == {"tensor"} and set(best.prefill.strategies) != {"tensor"}


def test_generation_under_a_budget():
    """Keys, values and weights count; what no plan can keep is said in MiB."""
    config = GPT2Config()
    profile = ClusterProfile((PI,) * 4, LinkProfile(1e9))
    free = place_generation(config, profile, 128, 64)[0]
    tight = place_generation(config, profile, 128, 64, memory_budget_bytes=max(free.memory_bytes) - 2**20)[0]
    assert max(tight.memory_bytes) < max(free.memory_bytes) and tight.total_s >= free.total_s
    with pytest.raises(ValueError, match="MiB more than a device has"):
        place_generation(config, profile, 128, 64, memory_budget_bytes=100 * 2**20)


def test_a_slow_device_is_left_out():
    config = GPT2Config()
    slow = replace(PI, name="slow", flops_per_s=14e7, memory_bytes_per_s=4.8e7)
    best = place_generation(config, ClusterProfile((slow, PI, PI), LinkProfile(1e9)), 64, 16)[0]
    assert best.prefill.device_ids == best.decode.device_ids == (1, 2)
