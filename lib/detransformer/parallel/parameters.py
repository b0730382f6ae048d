"""A layer's parameters by role, independent of the architecture's names and storage.

Weights are cached by part. If one of several loaded plans needs a whole map, the others take views of it.

Shapes: D hidden, A attention width, I intermediate size, P sub-blocks of width d = D/P.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from detransformer.models.configuration import architecture
from detransformer.parallel.linear import Linear, StackedLinear
from detransformer.parallel.weights import WeightSource

Range = tuple[int, int]


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
    input_major: bool
    pre_norm: bool  # LayerNorm stands before attention and FFN, not after their residuals
    eps: str | float  # the configuration's field of LayerNorm's epsilon, or its constant value
    activation: str  # the configuration's field of the FFN's activation

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
        input_major=False,
        pre_norm=False,
        eps="layer_norm_eps",
        activation="hidden_act",
    ),
    "distilbert": Naming(
        prefix="transformer.layer.{}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        attention_norm="sa_layer_norm",
        ffn_norm="output_layer_norm",
        input_major=False,
        pre_norm=False,
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
        input_major=False,
        pre_norm=True,
        eps="layer_norm_eps",
        activation="hidden_act",
    ),
}


def naming_of(config: PretrainedConfig) -> Naming:
    """The names of a model's architecture; ValueError if it is not supported."""
    return NAMING[architecture(config)]


def layers_of(body: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model without a head, original or decoupled, first to last."""
    return body.get_submodule(naming_of(body.config).prefix.removesuffix(".{}."))


class LayerParameters:
    """The parameters of one layer as its strategy takes them.

    `keeps_whole`: another plan needs all of them, so this one takes views. `packs`: products use all outputs of a map,
    so that its weights may be packed (`linear`); views cannot be.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        source: WeightSource,
        layer: int,
        keeps_whole: bool = False,
        packs: bool = True,
    ):
        self.naming = naming_of(config)
        self._source = source
        self._prefix = self.naming.prefix.format(layer)
        self._keeps_whole = keeps_whole
        self._packs = packs and not keeps_whole
        self._width = config.hidden_size

    def _once(self, key: tuple, read: Callable):
        """The cached result of `read()` for this part."""
        kept = self._source.kept
        key = (self._prefix, *key)
        if key not in kept:
            kept[key] = read()
        return kept[key]

    def _take(self, role: str, kind: str, dim: int = 0, part: Range | None = None) -> torch.Tensor:
        return self._source.take(f"{self._prefix}{getattr(self.naming, role)}.{kind}", dim, *(part or (None, None)))

    def bias(self, role: str) -> torch.Tensor:
        """The whole bias of map `role`, which is added once to a sum over devices."""
        if self._keeps_whole:
            return self.linear(role).bias
        return self._once((role, "bias"), lambda: self._take(role, "bias"))

    def norm(self, role: str, part: Range | None = None) -> list[torch.Tensor]:
        """Weight and bias of a LayerNorm, [D], or of sub-blocks start..stop, [p, d]."""
        return self._once((role, part), lambda: [self._take(role, kind, 0, part) for kind in ("weight", "bias")])

    def linear(self, role: str, outputs: Range | None = None, inputs: Range | None = None) -> Linear:
        """Outputs or inputs start..stop of `role` (`out`, `ffn_in`, `ffn_out`), or all; some inputs have no bias."""
        if self._keeps_whole and (outputs or inputs):
            return self.linear(role).part(outputs, inputs)

        def read() -> Linear:
            dim = int((inputs is None) == self.naming.input_major)  # the axis of the outputs, or inputs, in the file
            weight = self._take(role, "weight", dim, inputs or outputs)
            bias = None if inputs else self._take(role, "bias", 0, outputs)
            return Linear.of(weight, bias, self.naming.input_major, self._packs)

        return self._once((role, outputs, inputs), read)

    def qkv(self, columns: Range | None = None) -> Linear:
        """Q, K and V in one product, D -> 3A, or columns start..stop of each."""
        if columns == (0, self._width):  # one device's own part is all
            columns = None
        return self._once(("qkv", columns), lambda: self._read_qkv(columns))

    def _read_qkv(self, columns: Range | None) -> Linear:
        names = [self._prefix + name for name in self.naming.qkv]
        if not self.naming.input_major:
            weight, bias = (
                self._source.take_stacked([f"{name}.{kind}" for name in names], 0, *(columns or (None, None)))
                for kind in ("weight", "bias")
            )
            return Linear.of(weight, bias, False, self._packs)
        width = self._width
        start, stop = columns or (0, width)
        weight, bias = (
            torch.cat(
                [self._source.take(f"{names[0]}.{kind}", dim, i * width + start, i * width + stop) for i in range(3)],
                dim,
            )
            for kind, dim in (("weight", 1), ("bias", 0))
        )
        return Linear.of(weight, bias, True, self._packs)

    def blocks(self, role: str, part: Range) -> StackedLinear:
        """Map `role` of sub-blocks start..stop: d -> I, I -> d or A -> d each; `qkv`: d -> 3A."""
        if self._keeps_whole:
            whole = self._once((role, "blocks"), lambda: self._read_blocks(role, None))
            return whole.part(*part)
        return self._once((role, "blocks", part), lambda: self._read_blocks(role, part))

    def _read_blocks(self, role: str, part: Range | None) -> StackedLinear:
        names = self.naming.qkv if role == "qkv" else (getattr(self.naming, role),)
        weight, bias = (
            self._source.take_stacked([f"{self._prefix}{n}.{kind}" for n in names], 0, *(part or (None, None)), axis=1)
            for kind in ("weight", "bias")
        )
        return StackedLinear.of(weight, bias, self.naming.input_major, self._packs)
