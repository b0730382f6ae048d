"""Loads a device's weights: parts of tensors, read straight into the memory in which they stay.

Byte ranges of safetensors files are read, not mapped: mapped pages would count as the device's memory beside the
weights themselves. A device holds only what it takes, and one buffer of `CHUNK_BYTES` while it loads.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CHUNK_BYTES = 2**20  # or one row of a tensor, where that is more
_PREFIXES = ("bert.", "roberta.", "distilbert.", "transformer.", "vit.")
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # in files of old versions
_RENAMED_IN_VIT = {  # parts of names in a ViT's files, and transformers' names in memory
    "encoder.layer.": "layers.",
    **{f"attention.attention.{name}.": f"attention.{name[0]}_proj." for name in ("query", "key", "value")},
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
_POINTER = b"version https://git-lfs"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, row-major from byte `offset` on."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def check_type(self) -> None:
        """Raises ValueError for numbers of an unsupported type, such as quantised ones."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.path} has weights of type {self.dtype}: save them as one of {', '.join(_DTYPES)}.")

    def copy(self, out: torch.Tensor, dim: int, start: int, stop: int, buffer: Callable[[int], torch.Tensor]) -> None:
        """Copies its part start..stop along `dim` into `out`, a tensor or a part of one; `buffer(n)` lends n bytes."""
        self.check_type()
        dtype = _DTYPES[self.dtype]
        first, last = (start, stop) if dim == 0 else (0, self.shape[0])
        row = math.prod(self.shape[1:])
        offset = self.offset + first * row * dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            if dim == 0 and out.dtype == dtype and out.is_contiguous():
                return self._read(file, out.view(-1), offset)
            step = max(1, CHUNK_BYTES // (row * dtype.itemsize))
            for begin in range(0, last - first, step):
                end = min(begin + step, last - first)
                chunk = buffer((end - begin) * row * dtype.itemsize).view(dtype)
                self._read(file, chunk, offset + begin * row * dtype.itemsize)
                rows = chunk.view(end - begin, *self.shape[1:])
                out[begin:end].copy_(rows if dim == 0 else rows.narrow(dim, start, stop - start))

    def _read(self, file, out: torch.Tensor, offset: int) -> None:
        memory = memoryview(out.view(torch.uint8).numpy())
        while memory:  # a read returns at most 2 GiB
            count = os.preadv(file.fileno(), [memory], offset)
            if count == 0:
                raise ValueError(f"{self.path} ends before its weights do: copy or save the model again.")
            memory, offset = memory[count:], offset + count


class WeightSource:
    """Named tensors of a checkpoint, whole or a range along one axis, in one dtype.

    `source` is a state dict, a file of weights, or a folder with one of `WEIGHT_FILES`. Safetensors files are read in
    parts, a `pytorch_model.bin` is mapped. Names come without the prefix (`bert.`, `transformer.`) of models with a
    head. `kept` is a cache for callers that read a part again.

    Raises:
        ValueError: if the files cannot be read.
    """

    def __init__(self, source: Mapping[str, torch.Tensor] | str | Path, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.num_bytes = 0  # of all tensors taken
        self.kept: dict = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._tensors: dict[str, torch.Tensor | _Stored]
        if isinstance(source, (str, Path)):
            found = dict(_tensors_in(Path(source)))
            is_vit = any(".layernorm_before." in name for name in found)
            self._tensors = {_renamed(name, is_vit): tensor for name, tensor in found.items()}
        else:
            self._tensors = dict(source)
        self._prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in self._tensors)), "")

    def __contains__(self, name: str) -> bool:
        return self._resolve(name) in self._tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its whole name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def check_type(self, name: str) -> None:
        """Raises ValueError if tensor `name` has numbers of an unsupported type, such as quantised ones."""
        tensor = self._tensors[self._resolve(name)]
        if isinstance(tensor, _Stored):
            tensor.check_type()
        elif tensor.dtype not in _DTYPES.values():
            raise ValueError(f"{name} has weights of type {tensor.dtype}: save them as one of {', '.join(_DTYPES)}.")

    def _resolve(self, name: str) -> str:
        return name if name in self._tensors else self._prefix + name

    def take(self, name: str, dim: int = 0, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The tensor `name`, or its part start..stop along `dim`, contiguous and on its own storage."""
        return self.take_joined([(name, start, stop)], dim)

    def once(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, the same object at each call."""
        if name not in self.kept:
            self.kept[name] = self.take(name)
        return self.kept[name]

    def pair(self, name: str) -> list[torch.Tensor | None]:
        """Weight and bias of map or LayerNorm `name`; None for a bias that it has not."""
        return [self.once(f"{name}.weight"), self.once(f"{name}.bias") if f"{name}.bias" in self else None]

    def take_joined(
        self, parts: Sequence[tuple[str, int | None, int | None]], dim: int = 0, axis: int = 0
    ) -> torch.Tensor:
        """Parts (name, start, stop) along `dim`, of one shape, joined along `axis`, read straight into one tensor.

        `take_joined([(q, a, b), (k, a, b), (v, a, b)])` of [D, D] is [3(b-a), D]; with `axis=1`, of [P, A, d], it is
        [b-a, 3A, d].

        Raises:
            ValueError: if the checkpoint has no such tensor.
        """
        found = []
        for name, start, stop in parts:
            if name not in self:
                raise ValueError(
                    f"the checkpoint has no weight {name!r}: it is of another model, or was saved by another version."
                )
            tensor = self._tensors[self._resolve(name)]
            first, last, _ = slice(start, stop).indices(tensor.shape[dim])
            found.append((tensor, first, last))
        tensor, first, last = found[0]
        shape = list(tensor.shape)
        shape[dim] = last - first
        shape[axis] *= len(found)
        device = None if isinstance(tensor, _Stored) else tensor.device
        joined = torch.empty(shape, dtype=self.dtype, device=device)
        for (tensor, first, last), out in zip(found, joined.chunk(len(found), axis), strict=True):
            if isinstance(tensor, _Stored):
                tensor.copy(out, dim, first, last, self._buffer)
            else:
                out.copy_(tensor.narrow(dim, first, last - first))
        self.num_bytes += joined.nbytes
        return joined

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """The only buffer: a new one for each tensor would leave holes between the weights."""
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(max(num_bytes, CHUNK_BYTES), dtype=torch.uint8)
        return self._memory[:num_bytes]


def refuse_pointer(path: Path) -> None:
    """Raises ValueError if `path` is a git-lfs pointer in place of the file."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its clone.")


def _renamed(name: str, is_vit: bool) -> str:
    if is_vit:
        for old, new in _RENAMED_IN_VIT.items():
            name = name.replace(old, new)
        return name
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _tensors_in(source: Path) -> "Iterator[tuple[str, torch.Tensor | _Stored]]":
    """All tensors of `source`, a file or a folder; ValueError if they cannot be read."""
    path = source
    if source.is_dir():
        found = [source / name for name in WEIGHT_FILES if (source / name).is_file()]
        if not found:
            raise ValueError(f"{source} has no weights; it needs one of {', '.join(WEIGHT_FILES)}.")
        path = found[0]
    try:
        files = [path]
        if path.suffix == ".json":
            refuse_pointer(path)
            files = sorted({path.parent / name for name in json.loads(path.read_text("utf-8"))["weight_map"].values()})
        for file in files:
            refuse_pointer(file)
            yield from _pickled(file).items() if file.suffix == ".bin" else _header(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "git-lfs" in str(error):
            raise
        raise ValueError(f"the weights in {source} cannot be read ({error}): save or copy the model again.") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` made, mapped where its format allows it; never runs code in it."""
    for mapped in (True, False):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
        except Exception as error:  # torch, pickle and zipfile each have their own
            first = error
    raise ValueError(f"{path.name} is damaged: {str(first).splitlines()[0]}")


def _header(path: Path) -> Iterator[tuple[str, _Stored]]:
    """The tensors in a safetensors file: 8 bytes of the header's length, the header as JSON, then the tensors."""
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if 8 + length > size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"the file ends before {name!r}")
        yield name, _Stored(path, fields["dtype"], tuple(fields["shape"]), 8 + length + begin)
