"""Shared by all decoupled models: maps and LayerNorms of all sub-blocks in one stacked tensor; layers and models.

Shapes: B batch, T tokens, M = B*T rows, D hidden size, P = Ndiv sub-blocks, d = D/P slice, H heads of size s, A = H*s.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from detransformer.models.configuration import architecture, ffn_size, layer_kinds
from detransformer.models.naming import layers_of


class BatchedLinear(nn.Module):
    """P independent linear maps as one batched matrix product: [P, M, in] -> [P, M, out]."""

    def __init__(self, num_blocks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, out_features, in_features))  # as nn.Linear, stacked
        self.bias = nn.Parameter(torch.empty(num_blocks, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class BatchedConv1D(nn.Module):
    """P independent linear maps, weights input-major as in GPT-2's Conv1D: [P, M, in] -> [P, M, out]."""

    def __init__(self, num_blocks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, in_features, out_features))  # as Conv1D, stacked
        self.bias = nn.Parameter(torch.empty(num_blocks, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class BatchedLayerNorm(nn.Module):
    """P independent LayerNorms of width d: [P, M, d] -> [P, M, d]."""

    def __init__(self, num_blocks: int, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, width))
        self.bias = nn.Parameter(torch.empty(num_blocks, width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x, self.weight.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), normed, self.weight.unsqueeze(1))


def split_hidden(hidden_states: torch.Tensor, num_divisions: int) -> torch.Tensor:
    """Cuts the hidden axis in slices: [B, T, D] -> [P, B*T, d]."""
    return hidden_states.flatten(0, 1).unflatten(-1, (num_divisions, -1)).transpose(0, 1)


def merge_hidden(slices: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Concatenates the slices again: [P, B*T, d] -> [B, T, D]."""
    return slices.transpose(0, 1).reshape(batch_size, -1, slices.shape[0] * slices.shape[2])


def attend_in_slices(
    attend: Callable, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs `attend`, one of transformers' attention functions, for one sub-block after the other.

    So `attend` sees the batch and heads that mask, cache and configuration assume. query, key and value are
    [P, B, H, T, s] each; key and value may be longer than query, by the cached tokens.

    Returns:
        The contexts [P, B*T, A], and the attention weights [B, H, T, T_all] (the mean over sub-blocks), or None if
        `attend` returns none.
    """
    attended = [attend(module, query[p], key[p], value[p], *args, **kwargs) for p in range(len(query))]
    context = torch.stack([context for context, _ in attended])  # [P, B, T, H, s]
    weights = [weights for _, weights in attended if weights is not None]
    return context.flatten(3).flatten(1, 2), torch.stack(weights).mean(0) if weights else None


class DecoupledLayer:
    """Mixin of every decoupled layer, before `transformers`' layer: that layer on each slice (Eq. 2).

    Its maps and LayerNorms are as wide as a slice, and stacked. A subclass puts its own attention in place, which takes
    x [P, B*T, d] and `batch_size`. `DecoupledModel` draws the weights.
    """

    def __init__(self, config: PretrainedConfig, *layer_idx: int):
        sizes = copy.copy(config)
        sizes.hidden_size = config.slice_width
        sizes.num_attention_heads = 1  # of the attention that is replaced: transformers refuses what does not divide
        if architecture(config) == "gpt2":
            sizes.n_inner = ffn_size(config)  # not 4 times the width of the slice
        super().__init__(sizes, *layer_idx)
        self.num_divisions = config.num_divisions
        for parent in list(self.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(parent, name, BatchedLinear(self.num_divisions, part.in_features, part.out_features))
                elif isinstance(part, Conv1D):
                    setattr(parent, name, BatchedConv1D(self.num_divisions, *part.weight.shape))
                elif isinstance(part, nn.LayerNorm):
                    setattr(parent, name, BatchedLayerNorm(self.num_divisions, *part.normalized_shape, part.eps))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; the other arguments are those of `transformers`' layer."""
        batch_size = hidden_states.shape[0]  # not len, which a trace would keep as a constant
        x = split_hidden(hidden_states, self.num_divisions)
        return merge_hidden(super().forward(x, *args, batch_size=batch_size, **kwargs), batch_size)


CODE_FILE = "detransformer_models.py"  # saved beside the weights; `transformers` reads it with trust_remote_code=True
CODE = '''"""The classes of this checkpoint, for programs that do not import the package detransformer themselves."""

try:
    from detransformer.models.auto import BY_NAME
except ImportError as error:
    raise ImportError(
        "this checkpoint is a decoupled model: install the package detransformer, which decoupled it, from its source"
    ) from error

globals().update(BY_NAME)
'''


def made_from(
    made_class: type[PreTrainedModel],
    config: PretrainedConfig,
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    **kwargs: bool,
) -> PreTrainedModel:
    """A `made_class` model with the weights `state` [name: tensor]; dtype, mode and generation settings as `model`.

    kwargs: arguments of the constructor.
    """
    config._attn_implementation = model.config._attn_implementation
    config.architectures = [made_class.__name__]
    with no_init_weights():  # every weight comes from `state`, and drawing 110 M random ones takes seconds
        made = made_class(config, **kwargs)
    made.tie_weights()  # the LM head's matrix is the word embeddings; drawing weights would have tied them
    made = made.to(next(model.parameters()).dtype)
    made.load_state_dict(state)
    if made.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


class DecoupledModel:
    """Mixin of every decoupled model, before `transformers`' class: its parts around layers given by `layer_kinds`.

    A model without a head names `layer_class`, the class of each kind of layer; a model with one names `body_class`,
    the decoupled model without it. `auto_map` names the class for each AutoModel class that opens such a checkpoint
    (`models.auto`).
    """

    auto_map: dict[str, str]
    layer_class: dict[str, type[nn.Module]]
    body_class: type[PreTrainedModel] | None = None

    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
        checkpointing = vars(config).pop("gradient_checkpointing", False)  # there is no layer to set it on
        with no_init_weights():  # of a model with a head, the original class makes a body that is discarded
            super().__init__(config, *args, **kwargs)
        config.num_hidden_layers = num_layers
        if checkpointing:
            config.gradient_checkpointing = True
        if self.body_class:
            has_pooler = hasattr(self.base_model, "pooler")
            pooler = {"add_pooling_layer": self.base_model.pooler is not None} if has_pooler else {}
            setattr(self, self.base_model_prefix, self.body_class(config, **pooler))
        else:
            for i, kind in enumerate(layer_kinds(config)):
                place = (i,) if architecture(config) == "gpt2" else ()  # in its cache; encoders have none
                layers_of(self).append(self.layer_class[kind](config, *place))
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in `transformers`, plus `CODE_FILE`, with which programs that never import this package open it."""
        self.config.auto_map = self.auto_map
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, CODE_FILE).write_text(CODE, encoding="utf-8")  # first, so that a push to the Hub has it
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # When it initialises custom code, `transformers` skips modules without parameters of their own, and so GPT-2's
        # attention and FFN, whose narrower c_proj `_init_weights` draws.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, BatchedLinear | BatchedConv1D):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, BatchedLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
