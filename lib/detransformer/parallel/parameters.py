"""A layer's parameters by role, independent of the architecture's names and storage.

Weights are cached by part. If one of several loaded plans needs a whole map, the others take views of it.

Shapes: D hidden, A attention width, I intermediate size, P sub-blocks of width d = D/P.
"""

from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from detransformer.models.naming import naming_of
from detransformer.parallel.linear import Linear, StackedLinear
from detransformer.parallel.weights import WeightSource

Range = tuple[int, int]


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
        names, (start, stop) = self.naming.qkv, columns or (0, self._width)
        parts = [(name, start, stop) for name in names]
        if len(names) == 1:  # packed
            parts = [(*names, third * self._width + start, third * self._width + stop) for third in range(3)]
        weight, bias = (
            self._source.take_joined([(f"{self._prefix}{name}.{kind}", *own) for name, *own in parts], axis, axis)
            for kind, axis in (("weight", int(self.naming.input_major)), ("bias", 0))
        )
        return Linear.of(weight, bias, self.naming.input_major, self._packs)

    def blocks(self, role: str, part: Range) -> StackedLinear:
        """Map `role` of sub-blocks start..stop: d -> I, I -> d or A -> d each; `qkv`: d -> 3A."""
        if self._keeps_whole:
            whole = self._once((role, "blocks"), lambda: self._read_blocks(role, (None, None)))
            return whole.part(*part)
        return self._once((role, "blocks", part), lambda: self._read_blocks(role, part))

    def _read_blocks(self, role: str, part: Range | tuple[None, None]) -> StackedLinear:
        names = self.naming.qkv if role == "qkv" else (getattr(self.naming, role),)
        weight, bias = (
            self._source.take_joined([(f"{self._prefix}{name}.{kind}", *part) for name in names], 0, axis=1)
            for kind in ("weight", "bias")
        )
        return StackedLinear.of(weight, bias, self.naming.input_major, self._packs)
