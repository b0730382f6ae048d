"""How each architecture names the parts of a layer and of an encoder's LM head."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.models.configuration import architecture


@dataclass(frozen=True)
class Naming:
    """Names and layout of an architecture's parameters. `input_major`: weights are [in, out], as in GPT-2's Conv1D."""

    prefix: str
    qkv: tuple[str, ...]  # Q, K and V, or all three packed in one
    out: str
    ffn_in: str
    ffn_out: str
    attention_norm: str
    ffn_norm: str
    input_major: bool = False
    pre_norm: bool = False  # LayerNorm stands before attention and FFN, not after their residuals
    eps: str | float = "layer_norm_eps"  # the configuration's field of LayerNorm's epsilon, or its constant value
    activation: str = "hidden_act"  # the configuration's field of the FFN's activation

    def eps_of(self, config: PretrainedConfig) -> float:
        """LayerNorm's epsilon."""
        return getattr(config, self.eps) if isinstance(self.eps, str) else self.eps


NAMING = {
    "bert": Naming(
        prefix="encoder.layer.{}.",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        attention_norm="attention.output.LayerNorm",
        ffn_norm="output.LayerNorm",
    ),
    "distilbert": Naming(
        prefix="transformer.layer.{}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention_norm="sa_layer_norm",
        ffn_norm="output_layer_norm",
        eps=1e-12,
        activation="activation",
    ),
    "gpt2": Naming(
        prefix="h.{}.",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        ffn_in="mlp.c_fc",
        ffn_out="mlp.c_proj",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        input_major=True,
        pre_norm=True,
        eps="layer_norm_epsilon",
        activation="activation_function",
    ),
    "vit": Naming(
        prefix="layers.{}.",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        out="attention.o_proj",
        ffn_in="mlp.fc1",
        ffn_out="mlp.fc2",
        attention_norm="layernorm_before",
        ffn_norm="layernorm_after",
        pre_norm=True,
    ),
}


def naming_of(config: PretrainedConfig) -> Naming:
    """The names of a model's architecture; ValueError if it is not supported."""
    return NAMING[architecture(config)]


def layers_of(body: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model without a head, original or decoupled, first to last."""
    return body.get_submodule(naming_of(body.config).prefix.removesuffix(".{}."))


def lm_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Applies the masked-LM head of `model`, original or decoupled, to hidden states [..., D]: logits [..., V]."""
    if hasattr(model, "cls"):
        return model.cls.predictions(states)
    if hasattr(model, "lm_head"):
        return model.lm_head(states)
    return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(states))))
