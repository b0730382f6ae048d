"""CIFAR-100 (Krizhevsky 2009) from the mirror folder or the Hub, or generated images for machines without data.

Rows are put in an order of which any prefix has every class equally often (to one row), so a cut set is a prefix and
a smaller one is part of a larger one. A training batch is a function of (seed, step) alone: epochs are shuffled, images
are padded, cropped and flipped.

Shapes: N images, B batch; images uint8 [N, 32, 32, 3], what a model reads float32 [B, 3, 32, 32].
"""

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from detransformer.files import atomic_write
from detransformer.settings import data_environment
from detransformer.training.data.packing import stream_rows
from detransformer.training.data.sources import choose_source, rows_note

IMAGE_SIZE, NUM_CHANNELS = 32, 3
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's training set, images in 0..1
CIFAR_CLASSES, CIFAR_ROWS = 100, {"train": 50_000, "test": 10_000}
PADDING = 4  # pixels that a training image is moved by, at most
HUB_NAME = "uoft-cs/cifar100"
MIRROR_FILES = ("cifar100.npz", "cifar100_subset.npz")  # in cifar100/, the first that exists

GENERATED_ROWS = {"train": 2000, "test": 400}
GENERATED_CLASSES, GENERATED_SEED = 20, 2025


@dataclass(frozen=True)
class ImageData:
    """Images with their classes, by split: `train`, `test`, and `held`, where rows were set aside (`hold_out`).

    Args:
        name: of the source, `mirror`, `hub` or `built-in`.
        images: uint8 [N, 32, 32, 3].
        labels: int64 [N], 0..num_classes - 1.
        full_rows: of the official `train` and `test` sets, to call smaller ones reduced.
    """

    name: str
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    num_classes: int
    full_rows: dict[str, int]

    @property
    def note(self) -> str:
        """Source and row counts, e.g. `mirror; reduced training set, 15,000 of 50,000 rows; 10,000 test rows`."""
        held = f" and {len(self.labels['held']):,} held out" if "held" in self.labels else ""
        train, test = len(self.labels["train"]), len(self.labels["test"])
        if self.name == "built-in":
            return f"built-in generated images, {train:,} training rows{held}; {test:,} test rows"
        return rows_note(self.name, "test", (train, self.full_rows["train"]), (test, self.full_rows["test"]), held)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any pixel or label."""
        digest = hashlib.sha256()
        for array in (part[split] for split in self.labels for part in (self.images, self.labels)):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]

    def cut(self, max_train_rows: int | None = None, max_test_rows: int | None = None) -> "ImageData":
        """The first rows of both splits, the classes equally often in each; None keeps all."""
        for name, limit in (("max_train_rows", max_train_rows), ("max_test_rows", max_test_rows)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} is below 1: give a number of rows, or None for all.")
        return self._with(train=("train", slice(max_train_rows)), test=("test", slice(max_test_rows)))

    def hold_out(self, share: float) -> "ImageData":
        """The last `share` of the training rows become the split `held`: nothing is trained on them.

        As of any first rows, the classes are about equally often in both parts.

        Raises:
            ValueError: for a share that leaves no row on either side, or where rows are held out already.
        """
        num = len(self.labels["train"])
        count = round(share * num)
        if not 0 < count < num or "held" in self.labels:
            raise ValueError(
                f"{share:g} of {num} training rows cannot be held out: give a share between 0 and 1 "
                "that leaves rows on both sides, once."
            )
        return self._with(train=("train", slice(-count)), held=("train", slice(-count, None)))

    def _with(self, **parts: tuple[str, slice]) -> "ImageData":
        """With these splits, each of the rows of a split here; the others stay."""
        images, labels = (
            arrays | {name: arrays[split][rows] for name, (split, rows) in parts.items()}
            for arrays in (self.images, self.labels)
        )
        return dataclasses.replace(self, images=images, labels=labels)

    def train_batch(self, seed: int, step: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Batch `step`: pixel_values [B, 3, 32, 32], labels [B], rows [B]; images are moved and flipped."""
        rows = stream_rows(len(self.labels["train"]), step * batch_size, batch_size, seed, 0)
        images = augmented(self.images["train"][rows], np.random.default_rng([seed, 1, step]))
        return _batch(images, self.labels["train"][rows], rows)

    def ordered_batches(self, split: str, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows of `split` (`train`, `test` or `held`) once, in order, as they are; keys as in `train_batch`."""
        for start in range(0, len(self.labels[split]), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self.labels[split])))
            yield _batch(self.images[split][rows], self.labels[split][rows], rows)


def open_images(source: str = "auto", cache_dir: str | Path = "data/cache") -> ImageData:
    """Images of `source`: `mirror`, `hub`, `built-in`, or `auto` for the first of these that is there.

    Args:
        cache_dir: where the Hub's images are kept once they are decoded.

    Raises:
        ValueError: for an unknown source, an explicit one that is not available, or damaged files.
    """
    paths = [data_environment().mirror / "cifar100" / name for name in MIRROR_FILES]
    path = next((path for path in paths if path.is_file()), paths[-1])
    cached = Path(cache_dir) / "cifar100-hub.npz"
    name, _ = choose_source(source, path, cached)
    if name == "built-in":
        return generated_images()
    if name == "mirror" and not path.is_file():
        raise ValueError(
            f"{path} is missing: copy it there, set DETRANSFORMER_DATA to the folder that has it, or choose "
            "the source hub or built-in."
        )
    arrays = _hub_images(cached) if name == "hub" else read_images(path)
    orders = {split: balanced_order(arrays[f"{split}_labels"]) for split in CIFAR_ROWS}
    images = {split: arrays[f"{split}_images"][order] for split, order in orders.items()}
    labels = {split: arrays[f"{split}_labels"][order].astype(np.int64) for split, order in orders.items()}
    return ImageData(name, images, labels, CIFAR_CLASSES, CIFAR_ROWS)


def read_images(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an npz file: train_images, train_labels, test_images, test_labels.

    Raises:
        ValueError: that names the file and the remedy, where it is damaged or holds something else.
    """
    names = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
    except KeyError as error:
        raise ValueError(f"{path} has no array {error}: copy it again from the original.") from error
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again from the original.") from error
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        shape = (IMAGE_SIZE, IMAGE_SIZE, NUM_CHANNELS)
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            problem = f"{split}_images is {images.dtype} {list(images.shape)} where uint8 [N, 32, 32, 3] is expected"
        elif labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            found = f"{labels.dtype} {list(labels.shape)}"
            problem = f"{split}_labels is {found} where {len(images)} integers are expected"
        elif outside := sorted(set(labels.tolist()).difference(range(CIFAR_CLASSES))):
            problem = f"{split}_labels has {outside[0]}, outside 0..{CIFAR_CLASSES - 1}"
        else:
            continue
        raise ValueError(f"{path}: {problem}; copy it again from the original.")
    return arrays


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Row numbers: the first row of each class, then the second of each, ..; any prefix is balanced to one row."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.concatenate([np.arange(count) for count in counts])
    return np.lexsort((labels, ranks))


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image [B, H, W, 3] moved by up to `PADDING` pixels, black beyond its edge; half of them flipped."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    top, left = rng.integers(0, 2 * PADDING + 1, size=(2, len(images), 1))
    rows, columns = top + np.arange(height), left + np.arange(width)  # [B, H], [B, W]
    moved = padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    turned = rng.random(len(images)) < 0.5
    return np.where(turned[:, None, None, None], moved[:, :, ::-1], moved)


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] of mean 0 and deviation 1 over CIFAR-100's training set."""
    scale = torch.tensor(STD) * 255
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float()
    return ((pixels - torch.tensor(MEAN) * 255) / scale).permute(0, 3, 1, 2).contiguous()


@cache
def generated_images() -> ImageData:
    """Twenty classes, each a coarse pattern of its own under noise: a set that can be learned.

    It stands in for CIFAR-100 in form only: accuracy on it says that the software works.
    """
    rng = np.random.default_rng(GENERATED_SEED)
    half = rng.normal(128, 20, size=(GENERATED_CLASSES, 4, 2, NUM_CHANNELS))
    coarse = np.concatenate([half, half[:, :, ::-1]], axis=2)  # its own mirror image: batches are flipped
    patterns = coarse.repeat(IMAGE_SIZE // 4, axis=1).repeat(IMAGE_SIZE // 4, axis=2)
    images, labels = {}, {}
    for split, num in GENERATED_ROWS.items():
        labels[split] = (np.arange(num) % GENERATED_CLASSES).astype(np.int64)
        noise = rng.normal(0, 50, size=(num, IMAGE_SIZE, IMAGE_SIZE, NUM_CHANNELS))
        images[split] = (patterns[labels[split]] + noise).clip(0, 255).astype(np.uint8)
    return ImageData("built-in", images, labels, GENERATED_CLASSES, GENERATED_ROWS)


def _batch(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
    return {"pixel_values": normalised(images), "labels": torch.from_numpy(labels), "rows": torch.from_numpy(rows)}


def _hub_images(cached: Path) -> dict[str, np.ndarray]:
    """The Hub's official set, downloaded and decoded once."""
    if not cached.is_file():
        from datasets import load_dataset

        arrays = {}
        for split in ("train", "test"):
            rows = load_dataset(HUB_NAME, split=split)
            arrays[f"{split}_images"] = np.stack([np.asarray(image.convert("RGB")) for image in rows["img"]])
            arrays[f"{split}_labels"] = np.array(rows["fine_label"], dtype=np.uint8)
        with atomic_write(cached, "wb") as file:
            np.savez(file, **arrays)
    try:
        return read_images(cached)
    except ValueError as error:
        raise ValueError(f"{error} It is a copy of the Hub's {HUB_NAME}: delete it and it is made again.") from error
