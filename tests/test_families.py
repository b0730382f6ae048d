"""Every family and head: outputs over one to four devices equal those of transformers' own class, in float64."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from detransformer.answers import task_of
from detransformer.models import decouple
from detransformer.models.configuration import FAMILIES, max_tokens
from detransformer.opening import load_model, open_checkpoint
from detransformer.parallel.plan import layer_plan, published_plan, strategies_for
from detransformer.planning.memory import held_bytes
from parity import UNEVEN, run_plan, saved_case

TOLERANCE = 1e-10  # float64: what is left is the order of summation
# Odd on purpose: 6 heads over 4 devices, 70 FFN columns, 11 tokens, uneven speeds.
ENCODER = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, intermediate_size=70, vocab_size=101)
SIZES = {
    "distilbert": dict(dim=48, n_layers=4, n_heads=6, hidden_dim=70, vocab_size=101, activation="relu"),
    "gpt2": dict(n_embd=48, n_layer=4, n_head=6, n_inner=70, n_positions=40, vocab_size=101, pad_token_id=1,
                 scale_attn_by_inverse_layer_idx=True),
    "roberta": ENCODER | dict(type_vocab_size=1, max_position_embeddings=30, hidden_act="gelu_new"),
    "xlm-roberta": ENCODER | dict(type_vocab_size=1, pad_token_id=3, layer_norm_eps=1e-3),
    "camembert": ENCODER | dict(type_vocab_size=2),
    "bert": ENCODER | dict(type_vocab_size=3, hidden_act="silu"),
}  # fmt: skip
HEADS = ("base", "classification", "token-classification", "question-answering")
METHODS = {"original": ("tp", "sp", "ulysses", "galaxy"), "decoupled": ("bp+tp", "bp+sp", "bp+ulysses")}


class Case:
    """A checkpoint in a folder, a request with padding, and transformers' outputs for it."""

    def __init__(self, folder, model):
        model.save_pretrained(folder)
        opened = open_checkpoint(folder)
        self.checkpoint, self.config, self.inputs = str(folder), opened.config, str(folder / "inputs.safetensors")
        padding = self.config.pad_token_id
        ids = torch.randint(5, 101, (3, 11), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        for row, length in ((1, 6), (2, 10)):
            mask[row, length:], ids[row, length:] = 0, padding
        request = {"input_ids": ids, "attention_mask": mask}
        if getattr(self.config, "type_vocab_size", 0) > 1:
            request["token_type_ids"] = (torch.arange(11) > 4).long().expand(3, -1).contiguous()
        loaded = load_model(opened, torch.float64)
        task = task_of(self.config)
        with torch.inference_mode():
            if task in ("base", "generation"):
                self.expected = {"last_hidden_state": loaded.base_model(**request).last_hidden_state.contiguous()}
            else:
                found = loaded(**request)
                spans = task == "question-answering"
                logits = torch.stack([found.start_logits, found.end_logits], -1) if spans else found.logits
                self.expected = {"logits": logits.contiguous()}
        save_file(request, self.inputs)
        self.real = mask.bool()  # nobody reads the hidden states of padding

    def error(self, outputs) -> float:
        (name,) = self.expected
        difference = (outputs[name] - self.expected[name]).abs()
        return float((difference[self.real] if difference.ndim == 3 else difference).max())


def small(model_type: str, head: str):
    family = FAMILIES[model_type]
    original = getattr(transformers, family.class_name(head))
    torch.manual_seed(3)
    options = {} if head == "question-answering" or head == "base" else {"num_labels": 3}
    model = original(original.config_class(**SIZES[model_type], **options)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module", params=[(name, head) for name in SIZES for head in HEADS], ids="-".join)
def pair(request, tmp_path_factory):
    """`original` and `decoupled` of one family and head."""
    model, folder = small(*request.param), tmp_path_factory.mktemp("family")
    return {
        "original": Case(folder / "original", model),
        "decoupled": Case(folder / "decoupled", decouple(model, num_original_layers=2, num_divisions=4)),
    }


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_plans_equal_transformers(cluster, pair, num_devices):
    for kind, case in pair.items():
        speeds = UNEVEN[num_devices]
        methods = METHODS[kind] if num_devices > 1 else ("single",)
        plans = [published_plan(method, case.config, speeds) for method in methods]
        if kind == "decoupled" and num_devices > 1:  # as BP+Auto plans: by heads, in chunks
            strategies = strategies_for(case.config, "heads")
            plans.append(layer_plan("bp+auto", case.config, strategies, speeds, num_chunks=2))
        for plan in plans:
            output = f"{case.checkpoint}/output.safetensors"
            results = run_plan(cluster, case, plan, output=output)
            assert case.error(load_file(output)) < TOLERANCE, (plan.method, kind)
            expected = held_bytes(case.config, [plan], plan.device_ids[0])
            assert results[0]["weights_bytes"] == 2 * expected  # float64, and the price is of float32


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_positions_of_robertas_kind_leave_some_for_padding(model_type):
    model = small(model_type, "base")
    longest = max_tokens(model.config)
    assert model(torch.full((1, longest), 7)).last_hidden_state.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_gpt2_without_a_padding_token_reads_the_last_token(tmp_path, cluster):
    model = small("gpt2", "classification")
    model.config.pad_token_id = None
    ids = torch.randint(5, 101, (1, 7))
    with torch.inference_mode():
        expected = {"logits": model(input_ids=ids).logits.clone()}
    case = saved_case(tmp_path, model, {"input_ids": ids}, expected)
    results = run_plan(cluster, case, published_plan("tp", model.config, UNEVEN[2]))
    assert [result["max_abs_error"] < TOLERANCE for result in results] == [True] * 2
