"""Where a device's weights come from: parts of tensors, read from safetensors without loading the rest."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


class WeightSource:
    """Named tensors of a BERT checkpoint, whole or a range along one axis, in one dtype.

    `source` is a state dict or the path of a `model.safetensors`. Names are given without the `bert.` prefix that
    models with a head put before the encoder's.
    """

    def __init__(self, source: Mapping[str, torch.Tensor] | str | Path, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.num_bytes = 0  # of all that was taken
        if isinstance(source, (str, Path)):
            try:
                self._file = safe_open(str(source), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{source} cannot be read as safetensors ({error}): save the model again.") from error
            self._state, names = None, set(self._file.keys())
        else:
            self._file, self._state, names = None, source, set(source)
        self._names = names
        self._prefix = "bert." if any(name.startswith("bert.") for name in names) else ""

    def __contains__(self, name: str) -> bool:
        return self._resolve(name) in self._names

    def _resolve(self, name: str) -> str:
        return name if name in self._names else self._prefix + name

    def take(self, name: str, dim: int = 0, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The tensor `name`, or its part start..stop along `dim`, contiguous and on its own storage."""
        full_name = self._resolve(name)
        if full_name not in self._names:
            raise ValueError(
                f"the checkpoint has no weight {name!r}: it is not a BERT encoder, or was saved by another version."
            )
        index = (slice(None),) * dim + (slice(start, stop),)
        if self._file is not None:
            part = self._file.get_slice(full_name)[index]
        else:
            part = self._state[full_name][index]
        part = part.to(self.dtype, copy=True).contiguous()
        self.num_bytes += part.nbytes
        return part
