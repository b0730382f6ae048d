"""Models whose parts are added up later, less often or in part: what they compute, on one device and on several."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from detransformer.models import decouple
from detransformer.models.configuration import layer_kinds
from detransformer.models.sync_gpt2 import SyncGPT2Config, SyncGPT2ForMaskedLM, SyncGPT2LMHeadModel, synced
from detransformer.opening import open_checkpoint
from detransformer.parallel.executor import causal_mask, positions
from detransformer.parallel.layer import STRATEGIES
from detransformer.parallel.plan import check_plan, layer_plan, published_plan, strategies_for
from detransformer.planning.cost import predict
from detransformer.planning.placement import place_freely
from detransformer.planning.profile import ClusterProfile, DeviceProfile, LinkProfile
from parity import TOLERANCE, check_run, run_plan, saved_case, started

SMALL = dict(n_embd=48, n_layer=5, n_head=4, n_inner=72, vocab_size=101, n_positions=40)
ARCHITECTURES = {
    "parallel": dict(sync="parallel"),
    "ladder": dict(sync="ladder"),
    "tracks": dict(sync="parts", fuse_every=2),
    "channels": dict(sync="parts", shared_fraction=0.4),
    "both": dict(sync="parts", shared_fraction=0.4, fuse_every=3),
}


@pytest.fixture(scope="module")
def gpt2(random_gpt2) -> GPT2LMHeadModel:
    return random_gpt2(SMALL)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two sequences of 11 tokens, the second padded on the right."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    ids = torch.randint(SMALL["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


# --- the models -----------------------------------------------------------------------------------------------------


def written_out(model: GPT2LMHeadModel, ids: torch.Tensor, architecture: str, causal: bool) -> torch.Tensor:
    """The last hidden state by the definition, part after part, from the weights of the original."""
    body, parts = model.transformer, 4
    config = SyncGPT2Config(**SMALL, **ARCHITECTURES[architecture])
    num_shared, fuse_every = config.num_shared, config.fuse_every or config.n_layer
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    mask = mask.tril() if causal else mask

    def attention(layer, x: torch.Tensor, part: int) -> torch.Tensor:
        """What the part's only head adds to X."""
        own = slice(12 * part, 12 * part + 12)
        q, k, v = (y[..., own] for y in layer.attn.c_attn(x).split(48, dim=-1))
        scores = (q @ k.transpose(1, 2) / 12**0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v @ layer.attn.c_proj.weight[own]

    def ffn(layer, x: torch.Tensor, part: int) -> torch.Tensor:
        own = slice(18 * part, 18 * part + 18)
        return layer.mlp.act(layer.mlp.c_fc(x)[..., own]) @ layer.mlp.c_proj.weight[own]

    def whole(add, layer, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sum(add(layer, x, part) for part in range(parts)) + bias

    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    late, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(parts)]
    for number, layer in enumerate(body.h):
        subs = ((attention, layer.ln_1, layer.attn.c_proj.bias), (ffn, layer.ln_2, layer.mlp.c_proj.bias))
        if architecture == "parallel":
            x = x + sum(whole(add, layer, layer.ln_1(x), bias) for add, _, bias in subs)
        elif architecture == "ladder":
            for add, norm, bias in subs:
                made = whole(add, layer, norm(x), bias)
                x, late = x + late, made
        else:
            for add, norm, bias in subs:
                made = [add(layer, norm(x + own[part]), part) for part in range(parts)]
                x = x + bias
                x[..., :num_shared] += sum(made)[..., :num_shared]
                for part in range(parts):
                    own[part][..., num_shared:] += made[part][..., num_shared:]
            if (number + 1) % fuse_every == 0:
                x, own = x + sum(own), [torch.zeros_like(x) for _ in range(parts)]
    return body.ln_f(x + late + sum(own))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_computes_its_definition(gpt2, batch, architecture, causal):
    model = synced(gpt2, **ARCHITECTURES[architecture], is_causal=causal)
    with torch.no_grad():
        expected = written_out(gpt2, batch["input_ids"], architecture, causal)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            found = model.transformer(batch["input_ids"]).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_all_channels_shared_or_one_part_is_gpt2(gpt2, batch):
    expected = gpt2(**batch).logits
    for sync in (dict(shared_fraction=1.0), dict(num_divisions=1)):
        torch.testing.assert_close(synced(gpt2, **sync)(**batch).logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_the_originals(gpt2, architecture):
    """But for the second LayerNorm where there is one norm."""
    missing = 5 * 2 * 48 if architecture == "parallel" else 0
    assert synced(gpt2, **ARCHITECTURES[architecture]).num_parameters() == gpt2.num_parameters() - missing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_opened_and_generating(gpt2, batch, architecture, tmp_path):
    """By the AutoModel classes and by this package; text with kept keys and values as without."""
    model = synced(gpt2, **ARCHITECTURES[architecture])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(reloaded) is SyncGPT2LMHeadModel and open_checkpoint(tmp_path).config.sync == model.config.sync
    torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits, rtol=0, atol=TOLERANCE)
    body = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    expected = model.transformer(**batch).last_hidden_state
    torch.testing.assert_close(body(**batch).last_hidden_state, expected, rtol=0, atol=TOLERANCE)
    prompt = {name: tensor[:, :6] for name, tensor in batch.items()}
    texts = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*texts)


def test_a_masked_model_is_asked_for_the_tokens_themselves(gpt2, batch, tmp_path):
    model = synced(gpt2, sync="ladder", is_causal=False)
    assert type(model) is SyncGPT2ForMaskedLM and not model.can_generate()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 4] = 17
    made = model(**batch, labels=labels)
    expected = -made.logits[0, 4].log_softmax(-1)[17]
    torch.testing.assert_close(made.loss, expected.float())  # transformers takes losses in float32
    model.save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is SyncGPT2ForMaskedLM
    changed = batch["input_ids"].clone()
    changed[:, 6] = (changed[:, 6] + 1) % SMALL["vocab_size"]
    assert (model(changed).logits[:, 0] != model(batch["input_ids"]).logits[:, 0]).any(), "later tokens matter"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_learns(gpt2, batch, architecture):
    model = synced(gpt2, **ARCHITECTURES[architecture])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(fuse_every=0), "fuse_every=0 is below 1"),
        (dict(shared_fraction=1.5), "shared_fraction=1.5 is outside 0..1"),
        (dict(num_divisions=3), "num_divisions=3 does not divide the number of heads, 4"),
        (dict(num_divisions=4, n_inner=70), "num_divisions=4 does not divide the FFN's inner width, 70"),
    ],
)
def test_sizes_that_do_not_fit_are_said(fields, words):
    with pytest.raises(ValueError, match=words):
        SyncGPT2Config(**SMALL | fields)


def test_it_cannot_be_decoupled(gpt2):
    with pytest.raises(ValueError, match="SyncGPT2LMHeadModel cannot be decoupled"):
        decouple(synced(gpt2, sync="ladder"))


# --- over several devices -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(gpt2, batch, tmp_path_factory) -> dict[tuple[str, bool], SimpleNamespace]:
    """Each architecture on disk, causal and not, with a padded request and the single device's output."""
    made = {}
    for name, sync in ARCHITECTURES.items():
        for causal in (True, False):
            model, asked = synced(gpt2, **sync, is_causal=causal), dict(batch)
            if causal:  # what pads: as the executor has it
                asked["attention_mask"] = causal_mask(11, 0, batch["attention_mask"])
                asked["position_ids"] = positions(2, 11, 0, batch["attention_mask"])
            with torch.no_grad():
                expected = {"last_hidden_state": model.transformer(**asked).last_hidden_state}
            made[name, causal] = saved_case(tmp_path_factory.mktemp(f"{name}-{causal}"), model, batch, expected)
    return made


@pytest.mark.parametrize("speeds, num_chunks", [([1], 1), ([1, 1], 1), ([1, 1, 2], 3), ([1, 1, 1, 1], 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plan_equals_single_device(cluster, checkpoints, architecture, causal, speeds, num_chunks):
    case = checkpoints[architecture, causal]
    strategies = strategies_for(case.config, "tensor")
    check_run(cluster, case, layer_plan("tp", case.config, strategies, speeds, num_chunks=num_chunks))


def test_a_pipeline_is_cut_where_x_is_whole(cluster, checkpoints):
    """Of tracks that are fused after two of five layers: before the third one, not before the fourth."""
    case = checkpoints["tracks", True]
    plan = published_plan("pp", case.config, [1.0] * 2)
    with pytest.raises(ValueError, match="cut the model before layer 3, where X is not whole .a 'parts' layer."):
        check_plan(replace(plan, stages=(3, 2)), case.config)
    check_run(cluster, case, replace(plan, stages=(2, 3)))


@pytest.mark.parametrize("architecture", ["ladder", "both"])
def test_compressed_messages_move_the_output_by_little(cluster, checkpoints, architecture):
    """As tests/test_parallel.py has it for the other strategies."""
    case = checkpoints[architecture, True]
    plan = layer_plan("tp", case.config, strategies_for(case.config, "tensor"), [1, 1], wire="bfloat16")
    assert TOLERANCE < max(r["relative_error"] for r in run_plan(cluster, case, plan)) < 0.02


def test_the_messages_are_the_architectures(checkpoints):
    """Of 5 layers on 4 devices: one sum a layer, two, three fusions, two and the last; bytes by what is in them."""
    found = {}
    for name in ARCHITECTURES:
        case = checkpoints[name, True]
        plan = layer_plan("tp", case.config, strategies_for(case.config, "tensor"), [1.0] * 4)
        sums = [s for s in started(case, plan, 0, 10) if s.kind == "all_reduce"]
        found[name] = len(sums), sum(step.num_bytes for step in sums)
    whole, shared = (2 * 3 * 10 * channels * 8 // 4 for channels in (48, 19))
    assert found == {
        "parallel": (5, 5 * whole),
        "ladder": (10, 10 * whole),
        "tracks": (3, 3 * whole),
        "channels": (11, 10 * shared + whole),
        "both": (12, 10 * shared + 2 * whole),
    }


def test_devices_and_parts_must_agree(checkpoints):
    config = checkpoints["tracks", True].config
    with pytest.raises(ValueError, match="6 devices cannot share 4 sub-blocks: use at most 4 devices"):
        published_plan("tp", config, [1.0] * 6)
    with pytest.raises(ValueError, match="needs a decoupled model"):
        published_plan("bp+tp", config, [1.0] * 2)
    with pytest.raises(ValueError, match="'tensor' at layer 0 is for original layers, and this one is parts-first"):
        check_plan(layer_plan("tp", config, ["tensor"] * 5, [1.0] * 2), config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planner_takes_it(checkpoints, architecture):
    """On a fast link all devices, on a slow one a single one."""
    config = checkpoints[architecture, False].config
    devices = tuple(DeviceProfile(f"d{i}", 2**32, 1e8, "test") for i in range(4))
    kinds = {STRATEGIES[name].layer_kind for name in strategies_for(config, "tensor")}
    assert kinds == set(layer_kinds(config))
    for bandwidth_bps, expected in ((1e9, 4), (1e3, 1)):
        profile = ClusterProfile(devices, LinkProfile(bandwidth_bps, {"*": 0.0}))
        assert place_freely(config, profile, 32).plan.num_devices == expected


def test_a_ladder_hides_messages(checkpoints):
    """Where a sub-layer takes as long as a message, a ladder waits for its last message alone; TP for each."""
    ladder = checkpoints["ladder", False].config
    original = GPT2Config(**SMALL, is_causal=False)
    devices = tuple(DeviceProfile(f"d{i}", 2**32, 1e8, "test") for i in range(4))
    profile = ClusterProfile(devices, LinkProfile(2e8, {"*": 0.0}))
    waited = {}
    for name, config in (("ladder", ladder), ("tp", original)):
        plan = layer_plan("tp", config, strategies_for(config, "tensor"), [1.0] * 4)
        found = predict(config, plan, profile, 32)
        waited[name] = found.comm_s / (8 * sum(found.bytes.values()) / (2e8 * 0.94))
    assert waited["tp"] == pytest.approx(1.0)
    assert waited["ladder"] < 0.3
