"""Shared fixtures: small models on disk and a cluster of real processes over loopback."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from detransformer.models import decouple

# Odd on purpose: 6 heads and 4 sub-blocks over 3 devices, 11 tokens over 2 to 4, 70 FFN columns.
SIZES = dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=70, vocab_size=101)


class Case:
    """A model on disk with a masked, padded request and its single-device output, all float64."""

    def __init__(self, folder, model):
        folder.mkdir()
        self.checkpoint, self.config = str(folder), model.config
        self.inputs, self.reference = str(folder / "inputs.safetensors"), str(folder / "reference.safetensors")
        self.state = model.state_dict()
        generator = torch.Generator().manual_seed(7)
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[1, 7:] = 0
        types = (torch.arange(11) > 4).long().expand(2, -1).contiguous()
        ids = torch.randint(101, (2, 11), generator=generator)
        request = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        model.save_pretrained(folder)
        with torch.no_grad():
            output = model(**request)
        save_file(request, self.inputs)
        save_file({"last_hidden_state": output[0], "pooler_output": output[1]}, self.reference)


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> dict[str, Case]:
    """`original`, `decoupled` (D O D D O) and `narrow`, with random weights, biases and LayerNorms."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    bert = BertModel(BertConfig(**SIZES)).double().eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {
        "original": Case(folder / "original", bert),
        "decoupled": Case(folder / "decoupled", decouple(bert, num_original_layers=2, num_divisions=4)),
        "narrow": Case(folder / "narrow", decouple(bert, 2, 4, attention_width="narrow")),
    }


@pytest.fixture(scope="session")
def cluster():
    """Four worker processes with real gloo between them, over loopback."""
    from detransformer.cluster.session import EmulatedCluster

    with EmulatedCluster(4, transport="loopback") as session:
        yield session
