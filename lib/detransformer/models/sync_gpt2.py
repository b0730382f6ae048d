"""GPT-2 whose layers sum their parts later, less often or partially: alternatives to decoupling for slow links.

Tensor parallelism cuts a layer by heads and FFN columns into P parts: X <- X + sum_p Attention_p(X), then
X <- X + sum_p FFN_p(X). Each sum is a message. These models have GPT-2's weights, under its names, and differ in what
a part reads (`SyncGPT2Config.sync`):

    parallel   attention and FFN read the same LayerNorm of X, so that a layer has one sum (GPT-J, 2021)
    ladder     X without the previous sub-layer's sum, which travels meanwhile (Ladder Residual, arXiv 2501.06589)
    parts      X as last fused, plus only the part's own additions since: tracks that are fused every D layers
               (Parallel Track, arXiv 2602.07306), or, if a share of the channels is summed at once, partial channels
               (CAAT-Net, arXiv 2506.19645)

They follow these papers' descriptions, not their code. Parallel Track's tracks also read and write narrower states;
here each has the whole width, so that all models have the same embeddings and as many parameters.

Shapes: B batch, T tokens, D hidden size, P parts, A = D/P the width of a part's heads.
"""

from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Cache,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from detransformer.models.configuration import config_fields, ffn_size, layer_kinds
from detransformer.models.stacked import DecoupledModel, made_from


@strict
class SyncGPT2Config(GPT2Config):
    """`GPT2Config`, and when a layer's parts are summed.

    Args:
        sync: `"parallel"`, `"ladder"` or `"parts"`, see above.
        num_divisions: P, for `"parts"`; a device takes whole parts, so at most P devices run the model.
        fuse_every: D, for `"parts"`: everything is summed after every D layers; None: only after the last one.
        shared_fraction: for `"parts"`: the fraction of the channels that is summed in every sub-layer.
        is_causal: whether a token attends to earlier ones only; False makes an encoder.

    Raises:
        ValueError: for sizes that do not divide, naming the value, the limit and a remedy.
    """

    model_type = "sync_gpt2"

    sync: Literal["parallel", "ladder", "parts"] = "parts"
    num_divisions: int = 4
    fuse_every: int | None = None
    shared_fraction: float = 0.0
    is_causal: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.fuse_every is not None and self.fuse_every < 1:
            raise ValueError(f"fuse_every={self.fuse_every} is below 1: give a number of layers, or None.")
        if not 0 <= self.shared_fraction <= 1:
            raise ValueError(f"shared_fraction={self.shared_fraction} is outside 0..1: give it as a fraction.")
        sizes = {"the number of heads": self.num_attention_heads, "the FFN's inner width": ffn_size(self)}
        for name, size in sizes.items() if self.sync == "parts" else ():
            if self.num_divisions < 1 or size % self.num_divisions:
                raise ValueError(
                    f"num_divisions={self.num_divisions} does not divide {name}, {size}: parts are equal, "
                    "choose a divisor."
                )

    @property
    def num_shared(self) -> int:
        """How many of the D channels (the first ones) are summed in every sub-layer."""
        return round(self.shared_fraction * self.hidden_size)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing, as for the decoupled models' configurations."""


class _InputOfParts(Conv1D):
    """D -> n*D; each part reads its own X and has its own columns of each of n maps: [P, B, T, D] -> [B, T, n*D]."""

    def __init__(self, num_parts: int, num_maps: int, num_out: int, num_in: int):
        super().__init__(num_out, num_in)
        self.num_parts, self.num_maps = num_parts, num_maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.unflatten(1, (self.num_maps, self.num_parts, -1)).permute(2, 0, 1, 3)  # [P, D, n, A]
        y = torch.bmm(x.flatten(1, 2), weight.flatten(2)).unflatten(1, x.shape[1:3])  # [P, B, T, n*A]
        return y.unflatten(-1, (self.num_maps, -1)).permute(1, 2, 3, 0, 4).flatten(2) + self.bias


class _OutputOfParts(Conv1D):
    """Each part's addition to X, without the bias: [B, T, P*A] -> [P, B, T, D]."""

    def __init__(self, num_parts: int, num_out: int, num_in: int):
        super().__init__(num_out, num_in)
        self.num_parts = num_parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.flatten(0, 1).unflatten(-1, (self.num_parts, -1)).transpose(0, 1)  # [P, B*T, A]
        made = torch.bmm(parts, self.weight.unflatten(0, (self.num_parts, -1)))
        return made.unflatten(1, x.shape[:2])


class SyncGPT2Block(GPT2Block):
    """One layer. Between layers X is whole, [B, T, D], or stacked with what is not added yet, [1 + n, B, T, D].

    n is 1 for a ladder, whose FFN is still to be added, and P for parts.
    """

    def __init__(self, config: SyncGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        following = layer_kinds(config)[layer_idx + 1 :]
        self.leaves_whole = not following or following[0].endswith("first")
        self.sync, self.num_shared, self.attn.is_causal = config.sync, config.num_shared, config.is_causal
        if config.sync == "parallel":
            del self.ln_2
        if config.sync == "parts":
            parts, width, inner = config.num_divisions, config.hidden_size, ffn_size(config)
            self.num_parts = parts
            self.attn.c_attn = _InputOfParts(parts, 3, 3 * width, width)
            self.attn.c_proj = _OutputOfParts(parts, width, width)
            self.mlp.c_fc = _InputOfParts(parts, 1, inner, width)
            self.mlp.c_proj = _OutputOfParts(parts, width, inner)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states and the result are as above; the other arguments are GPT2Block's (no cross-attention)."""
        kwargs.pop("encoder_attention_mask", None)

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)[0]

        stream, *unsummed = hidden_states if hidden_states.ndim == 4 else (hidden_states,)
        if self.sync == "parallel":
            normed = self.ln_1(stream)
            return stream + attend(normed) + self.mlp(normed)
        if self.sync == "ladder":
            attended = attend(self.ln_1(stream))
            stream = stream + unsummed[0] if unsummed else stream
            fed = self.mlp(self.ln_2(stream))
            stream = stream + attended
            return stream + fed if self.leaves_whole else torch.stack([stream, fed])
        own = torch.stack(unsummed) if unsummed else stream.new_zeros(self.num_parts, *stream.shape)
        made = attend(self.ln_1(stream + own))
        stream, own = self._added(stream, own, made, self.attn.c_proj.bias)
        made = self.mlp(self.ln_2(stream + own))
        stream, own = self._added(stream, own, made, self.mlp.c_proj.bias)
        return stream + own.sum(0) if self.leaves_whole else torch.cat([stream[None], own])

    def _added(
        self, stream: torch.Tensor, own: torch.Tensor, made: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the parts' outputs [P, B, T, D]: the sum of shared channels to X, the rest to each part's own."""
        shared, width = self.num_shared, made.shape[-1]
        stream = stream + bias + F.pad(made[..., :shared].sum(0), (0, width - shared))
        return stream, own + F.pad(made[..., shared:], (shared, 0))


class SyncGPT2Model(DecoupledModel, GPT2Model):
    """The layers of `SyncGPT2Config.sync` without a head; outputs as `transformers.GPT2Model`.

    `hidden_states`, if requested, are the outputs of `SyncGPT2Block`.
    """

    config_class = SyncGPT2Config
    layer_class = dict.fromkeys(("parallel", "ladder-first", "ladder", "parts-first", "parts"), SyncGPT2Block)
    _no_split_modules = ["SyncGPT2Block"]


class SyncGPT2LMHeadModel(DecoupledModel, GPT2LMHeadModel):
    """With GPT-2's LM head; outputs and `generate` as `transformers.GPT2LMHeadModel`."""

    config_class = SyncGPT2Config
    body_class = SyncGPT2Model


class SyncGPT2ForMaskedLM(SyncGPT2LMHeadModel):
    """Predicts the tokens themselves by the same head: labels [B, T] are not shifted; `is_causal` should be False."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: it does not continue a text."""
        return False


CLASSES = (  # the AutoModel class, the class whose tokenizer and configuration it has, the class
    (AutoModel, GPT2Model, SyncGPT2Model),
    (AutoModelForCausalLM, GPT2LMHeadModel, SyncGPT2LMHeadModel),
    (AutoModelForMaskedLM, GPT2LMHeadModel, SyncGPT2ForMaskedLM),
)


def synced(model: GPT2LMHeadModel, **sync) -> PreTrainedModel:
    """A model with `model`'s weights whose layers are summed otherwise; `sync` are `SyncGPT2Config`'s arguments.

    All weights are kept but the second LayerNorm where attention and FFN read the same one. A model that was trained
    as GPT-2 then computes something else, unless all channels are shared; training starts from it.
    """
    config = SyncGPT2Config(**config_fields(model.config) | sync)
    made_class = SyncGPT2LMHeadModel if config.is_causal else SyncGPT2ForMaskedLM
    state = model.state_dict()
    if config.sync == "parallel":
        state = {name: tensor for name, tensor in state.items() if ".ln_2." not in name}
    return made_from(made_class, config, model, state)
