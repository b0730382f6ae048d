"""Text generated over 1 to 4 real processes is the single device's, token for token; plans, caches and errors."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from detransformer.models import decouple
from detransformer.parallel.comm import Comm
from detransformer.parallel.draw import END, Draw, Sampling
from detransformer.parallel.generation import Generator, check_generation
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.plan import layer_plan, published_plan, strategies_for
from detransformer.parallel.weights import WeightSource
from detransformer.planning.generation import place_generation, price_generation
from detransformer.planning.memory import cache_bytes, held_bytes
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from parity import UNEVEN, check_counts, run_plan, started

NEW_TOKENS = 12
ORIGINAL = [name for name, signature in STRATEGIES.items() if signature.layer_kind == "original"]
GOES_ON_AS = {"own": "tensor", "all": "replicate"}  # what decodes after a prompt whose keys and values are kept so


class Text:
    """A GPT-2 on disk in float64, two left-padded prompts, and what Hugging Face's model makes of them."""

    def __init__(self, folder, model):
        folder.mkdir()
        self.checkpoint, self.config, self.inputs = str(folder), model.config, str(folder / "inputs.safetensors")
        self.model = model
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
def texts(tmp_path_factory, random_gpt2) -> dict[str, Text]:
    folder = tmp_path_factory.mktemp("texts")
    gpt2 = random_gpt2(dict(n_embd=48, n_layer=5, n_head=6, n_inner=70, vocab_size=101, n_positions=64), std=0.3)
    return {
        "original": Text(folder / "original", gpt2),
        "decoupled": Text(folder / "decoupled", decouple(gpt2, num_original_layers=2, num_divisions=4)),
        "narrow": Text(folder / "narrow", decouple(gpt2, 2, 4, attention_width="narrow")),
    }


def plan_of(config, strategy: str, speeds, num_chunks: int = 1, devices=()):
    strategies = strategies_for(config, strategy)
    return layer_plan("bp+auto", config, strategies, speeds, num_chunks=num_chunks, devices=devices)


def generate(cluster, text, prefill, decode, **job):
    job = {"max_new_tokens": NEW_TOKENS, "dtype": "float64"} | job
    plans = {"prefill": prefill.to_dict(), "decode": decode.to_dict()}
    results = cluster.run("generate", checkpoint=text.checkpoint, inputs=text.inputs, **plans, **job)
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
    run_plan(cluster, text, prefill, output=str(output))
    got = load_file(output)
    assert ((got["last_hidden_state"] - text.hidden) * text.mask[..., None]).abs().max() < 1e-12
    assert got["next_token"].tolist() == [row[0] for row in text.tokens]
    results = generate(cluster, text, prefill, decode)
    assert len(results) == num_devices
    for rank, result in enumerate(results):
        assert result["tokens"] == text.tokens
        past = 9 + NEW_TOKENS - 2
        check_counts(result, started(text, decode, rank, 1, 2, past=past))
        assert result["weights_bytes"] == 2 * held_bytes(text.config, [prefill, decode], rank)
        assert result["cache_bytes"] == 2 * cache_bytes(text.config, decode, rank, 9 + NEW_TOKENS, 2)


def drawn(model, ids: torch.Tensor, mask: torch.Tensor, rows: list[Sampling]) -> list[list[int]]:
    """The definition once more: each token the largest of logit / temperature + Gumbel noise, among the nucleus."""
    made, generators = [], [torch.Generator().manual_seed(row.seed) for row in rows]
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        tokens = []
        for row, generator, own in zip(rows, generators, logits, strict=True):
            if not row.temperature:
                tokens.append(int(own.argmax()))
                continue
            probabilities = (own / row.temperature).softmax(-1)
            order = probabilities.argsort(descending=True).tolist()
            sums = [sum(float(probabilities[i]) for i in order[:n]) for n in range(len(order))]
            nucleus = [i for i, before in zip(order, sums, strict=True) if before < row.top_p]
            noise = -torch.log(-torch.log(torch.rand(len(own), generator=generator, dtype=torch.float64)))
            tokens.append(max(nucleus, key=lambda i: float(own[i] / row.temperature + noise[i])))
        made.append(tokens)
        ids = torch.cat([ids, torch.tensor(tokens)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.tensor(made).T.tolist()


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "rows",
    [
        [Sampling(0.9, seed=4), Sampling()],
        [Sampling(0.9, seed=4), Sampling(2.0, seed=2**62)],
        [Sampling(), Sampling(1.5, 0.6, 7)],
        [Sampling(0.7, 0.9, 4), Sampling(3.0, 0.2, 4)],
    ],
)
def test_tokens_are_drawn_alike_on_any_number_of_devices(cluster, texts, num_devices, rows):
    text = texts["original"]
    inputs = load_file(text.inputs)
    expected = drawn(text.model, inputs["input_ids"], inputs["attention_mask"], rows)
    plan = plan_of(text.config, "tensor", UNEVEN[num_devices])
    results = generate(cluster, text, plan, plan, sampling=[asdict(row) for row in rows])
    assert len(results) == num_devices and all(result["tokens"] == expected for result in results)
    assert expected != text.tokens


def test_draws_have_the_probabilities_of_a_softmax():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    seeds = 4000
    draws = [int(Draw([Sampling(1.3, seed=n)], 4)(logits, [4], Comm(None, 0, 1)).argmax()) for n in range(seeds)]
    found = torch.bincount(torch.tensor(draws), minlength=4) / seeds
    assert torch.allclose(found, (logits[0] / 1.3).softmax(-1), atol=3 * 0.5 / seeds**0.5)  # three standard errors
    among = Draw([Sampling(1.0, 0.7)], 4)(logits, [4], Comm(None, 0, 1))  # 0.66 + 0.24 is the first sum above 0.7
    assert among.isinf().tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"top_p": 2}, "top_p"),
    ],
)
def test_sampling_says_what_is_out_of_range(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**fields)


def test_generation_ends_where_every_row_has_ended(cluster, texts):
    text = texts["original"]
    plan = plan_of(text.config, "tensor", [1.0, 1.0])
    stops = [row[4] for row in text.tokens]  # each row's fifth token, unless it has one of both before
    last = max(min(row.index(stop) for stop in stops if stop in row) for row in text.tokens)
    for result in generate(cluster, text, plan, plan, stop_tokens=stops):
        assert result["tokens"] == [row[: last + 1] for row in text.tokens] and len(result["token_s"]) == last + 1


def test_rows_that_nobody_wants_end_on_all_devices_whoever_knows(texts):
    """What one device sends for such a row is chosen by all; the other row goes on."""
    text = texts["original"]
    plan = plan_of(text.config, "tensor", [1.0])
    inputs = load_file(text.inputs)
    made = Generator(text.config, plan, plan, WeightSource(Path(text.checkpoint), torch.float64), Comm(None, 0, 1))
    first = made.start(inputs["input_ids"], inputs["attention_mask"], NEW_TOKENS)
    made.finish([1])
    second = made.step(first)
    assert second.tolist() == [text.tokens[0][1], END] and not made.ended
    assert made.step(second).tolist() == [text.tokens[0][2], END]
    made.finish([0])
    made.step(second)
    assert made.ended
    best = torch.tensor([[[0.5, 7.0], [0.9, 8.0]]] * 2)  # [P, B, 2]: value and token of each row, from two devices
    draw = Draw([Sampling(), Sampling()], 9)
    draw.enough = {0}
    draw.end(best[1])
    values, tokens = best.unbind(-1)
    assert tokens.gather(0, values.argmax(0, keepdim=True))[0].tolist() == [END, 8]


def test_devices_in_another_order(cluster, texts):
    """A plan names its devices: the first one left out, the others turned round."""
    text = texts["decoupled"]
    plan = plan_of(text.config, "tensor", [1.0, 2.0, 1.0], devices=(3, 1, 2))
    results = generate(cluster, text, plan, plan)
    assert len(results) == 3 and all(result["tokens"] == text.tokens for result in results)


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


def test_numbers_that_are_not_finite_are_no_text(texts):
    text = texts["original"]
    plan = plan_of(text.config, "tensor", [1.0])
    inputs = load_file(text.inputs)
    made = Generator(text.config, plan, plan, WeightSource(Path(text.checkpoint), torch.float64), Comm(None, 0, 1))
    made.prefill.head.words[60, 0] = torch.nan
    with pytest.raises(ValueError, match="numbers that are not finite: look at its weights"):
        made.start(inputs["input_ids"], inputs["attention_mask"], NEW_TOKENS)


def test_too_long_a_text_is_refused_before_it_starts(texts):
    from detransformer.cluster.devices import DeviceError
    from detransformer.cluster.session import EmulatedCluster

    text = texts["original"]
    plan = plan_of(text.config, "tensor", [1.0])
    with EmulatedCluster(1, transport="loopback") as one, pytest.raises(DeviceError, match="64 positions.*56 tokens"):
        generate(one, text, plan, plan, max_new_tokens=57)


PI = DeviceProfile("pi", 4 * 2**30, 14e9, "assumed", 4.8e9)


def test_prompt_and_tokens_are_planned_apart():
    """At GPT-2's size: the prompt by tokens in chunks, further tokens by columns; neither slower than TP for both."""
    config = GPT2Config()
    for mbps in (125, 1000):
        profile = ClusterProfile((PI,) * 4, LinkProfile(1e6 * mbps))
        best = place_generation(config, profile, 128, 64)
        plan = published_plan("tp", config, [1.0] * 4)
        tensor = price_generation(config, plan, plan, profile, 128, 64)
        assert best.total_s < tensor.total_s and best.first_token_s <= tensor.first_token_s
        assert set(best.decode.strategies) == {"tensor"} and set(best.prefill.strategies) != {"tensor"}


def test_generation_under_a_budget():
    """Keys, values and weights count; what no plan can keep is said in MiB."""
    config = GPT2Config()
    profile = ClusterProfile((PI,) * 4, LinkProfile(1e9))
    free = place_generation(config, profile, 128, 64)
    tight = place_generation(config, profile, 128, 64, memory_budget_bytes=max(free.memory_bytes) - 2**20)
    assert max(tight.memory_bytes) < max(free.memory_bytes) and tight.total_s >= free.total_s
    with pytest.raises(ValueError, match="MiB more than a device has"):
        place_generation(config, profile, 128, 64, memory_budget_bytes=100 * 2**20)


def test_a_slow_device_is_left_out():
    config = GPT2Config()
    slow = replace(PI, name="slow", flops_per_s=14e7, memory_bytes_per_s=4.8e7)
    best = place_generation(config, ClusterProfile((slow, PI, PI), LinkProfile(1e9)), 64, 16)
    assert best.prefill.device_ids == best.decode.device_ids == (1, 2)
