"""Images as sequences of pixels: Image (CIFAR-10 in grayscale), one token per pixel.

Source: Tay et al., Long Range Arena (2020).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.experiments.data import hub
from sparse_flash.experiments.data.archives import open_source
from sparse_flash.experiments.data.dataset import Batch, Examples, Split, Splits
from sparse_flash.experiments.data.files import DataError, cached
from sparse_flash.experiments.data.source import LARGEST, Look, Source, join, originals
from sparse_flash.experiments.old_names import METHODS, renamed_fields
from torch import Tensor
from tqdm import tqdm

from sparse_flash import masks

CIFAR = (
    "CIFAR-10 (Krizhevsky, 2009) is at https://www.cs.toronto.edu/~kriz/cifar.html; give "
    "cifar-10-python.tar.gz, or an archive or a folder of {train,test}/CLASS/*.{png,jpg}, or "
    "hf:uoft-cs/cifar10, with --task.source"
)
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32
_BATCH = re.compile(r"data_batch_[0-9]+|test_batch")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
Order = Literal["raster", "morton", "hilbert"]


def token_order(order: str, side: int) -> masks.TokenOrder:
    """The token order of a square image."""
    orders = {"raster": masks.raster, "morton": masks.morton, "hilbert": masks.hilbert}
    return orders[order](side, side)


def coordinates(order: str, side: int) -> Tensor:
    """The (row, column) of each token: int64 (side^2, 2)."""
    pixel = token_order(order, side).permutation
    return torch.stack([pixel // side, pixel % side], 1)


class Augmented(Examples):
    """Images of pixels as tokens, each in the eight rotations and reflections of a square.

    Example i of 8 n is image i % n under symmetry i // n.

    Args:
        images: Examples without padding.
        order: Order of the pixels.
        side: Pixels per side.
    """

    def __init__(self, images: Examples, order: Order, side: int) -> None:
        self.images, self.order, self.side = images, order, side
        self.labels = images.labels.repeat(8)
        self.ways = _ways(order, side).to(self.labels.device)

    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """Refused: only the images are cached."""
        raise TypeError("keep the images, and make Augmented of them again")

    def to(self, device: torch.device) -> Augmented:
        """The same examples on another device."""
        return Augmented(self.images.to(device), self.order, self.side)

    def subset(self, index: Tensor) -> Split:
        """Some of the examples, as pixels."""
        batch = self.take(index)
        return Split(batch.tokens.to(torch.uint8), None, batch.labels)

    def take(self, index: Tensor) -> Batch:
        """The examples at these indices."""
        way, index = index // len(self.images), index % len(self.images)
        batch = self.images.take(index)
        return Batch(batch.tokens.gather(1, self.ways[way]), None, batch.labels)


def _ways(order: Order, side: int) -> Tensor:
    """Permutations of tokens for the eight symmetries of a square: (8, side^2)."""
    there = token_order(order, side)
    pixels = torch.arange(side * side).view(side, side)
    turned = [pixels.rot90(quarters) for quarters in range(4)]
    laid = torch.stack([way for x in turned for way in (x, x.T)]).flatten(1)
    return there.inverse[laid[:, there.permutation]]


@renamed_fields(METHODS)
@dataclass(frozen=True)
class Image:
    """Grayscale CIFAR-10: 45,000 images for training, 5,000 for validation, 10,000 for testing."""

    source: str = "data/cifar-10-python.tar.gz"
    """The published archive or its folder, or images in {train,test}/CLASS/; or hf:uoft-cs/cifar10,
    or another data set of the Hugging Face Hub with the columns img and label."""
    order: Order = "raster"
    """The order of the pixels."""
    val: int = 5_000
    """Number of training images held out for validation."""

    vocabulary = 256
    classes = 10
    pairs = False
    length = SIDE * SIDE

    def coordinates(self) -> Tensor:
        """Row and column of each token: (1024, 2)."""
        return coordinates(self.order, SIDE)

    def load(self) -> Splits:
        """Read all images.

        Raises:
            DataError: Images are missing.
        """
        if hub.on_hub(self.source):
            return cached(self, (self.source,), self._read)
        source = open_source(self.source, CIFAR)
        return cached(self, source.paths(lambda: _find_images(source)), self._read)

    def _read(self) -> Splits:
        found: dict[str, list[tuple[NDArray[np.uint8], int]]] = {"train": [], "test": []}
        for split, image, label in tqdm(_images(self.source), desc="reading images", disable=None):
            found[split].append((image, label))
        for split, images in found.items():
            counts = np.bincount([label for _, label in images], minlength=len(CLASSES))
            if counts.min() < 1 or counts.min() != counts.max():
                raise DataError(
                    f"{self.source} has {counts.tolist()} images a class to {split}, and should "
                    f"have as many of each: {CIFAR}"
                )
        train, test = (self._split(images) for images in found.values())
        if not 0 < self.val < len(train):
            raise DataError(
                f"{self.source} has {len(train)} images to train with, of which --task.val must "
                f"leave some: 1..{len(train) - 1}, got {self.val}"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        return Splits(train.subset(order[self.val :]), train.subset(order[: self.val]), test)

    def _split(self, images: list[tuple[NDArray[np.uint8], int]]) -> Split:
        pixels = torch.from_numpy(np.stack([image.reshape(-1) for image, _ in images]))
        labels = torch.tensor([label for _, label in images])
        return Split(pixels[:, token_order(self.order, SIDE).permutation], None, labels)


def gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luminance of (..., 3) colors by ITU-R BT.601, rounded: (...).

    >>> gray(np.array([[255, 255, 255], [255, 0, 0]], np.uint8)).tolist()
    [255, 76]
    """
    return (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)


def _images(source: str) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
    """(train or test, grayscale image, label) of each image, from any source."""
    if hub.on_hub(source):
        images = hub.DataSet(source, CIFAR)
        for split in ("train", "test"):
            for number, (image, label) in enumerate(images.rows(split, "img|image", "label"), 1):
                name = f"{source}: {split} {number}"
                if label not in range(len(CLASSES)):
                    raise DataError(f"{name} has the label {label!r}, not 0..9: {CIFAR}")
                yield split, gray(pixels_of(image, name, "RGB", SIDE)), int(label)
        return
    files = open_source(source, CIFAR)
    known: dict[bytes, str] = {}
    for path, content in files.read(_find_images(files), LARGEST):
        name, (split, label, file) = files.at(path), ("", "", *path.split("/"))[-3:]
        if not _BATCH.fullmatch(file):
            yield split, gray(_decode(name, content)), CLASSES.index(label)
            continue
        other = known.setdefault(hashlib.sha256(content).digest(), name)
        if other != name:
            raise DataError(f"{name} is a copy of {other}: move one of them away; {CIFAR}")
        batch = _unpickle(name, content)
        part = "test" if file.startswith("test") else "train"
        colors = batch[b"data"].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        yield from ((part, x, int(y)) for x, y in zip(gray(colors), batch[b"labels"], strict=True))


def _find_images(source: Source) -> list[str]:
    """The files of the folder with the batches of CIFAR-10, or with train and test by class."""

    def files_of(look: Look, folder: str) -> list[str] | None:
        files = [join(folder, name) for name in look(folder).files if _BATCH.fullmatch(name)]
        images: list[str] = []
        for split in sorted(look(folder).folders.keys() & {"train", "test"}):
            for label in sorted(look(join(folder, split)).folders.keys() & {*CLASSES}):
                place = f"{join(folder, split)}/{label}"
                images += [f"{place}/{name}" for name in _pictures(source, look, place)]
        if files and images:
            raise DataError(
                f"{source.at(folder)} has batches of CIFAR-10 and folders train and test: give a "
                f"folder with one of the two; {CIFAR}"
            )
        return files or images or None

    return source.find(files_of, "data_batch_* and test_batch, or {train,test}/CLASS/*.{png,jpg}")


def _pictures(source: Source, look: Look, folder: str) -> list[str]:
    """The images of a folder; names must differ in more than the suffix."""
    names = [name for name in look(folder).files if name.lower().endswith(_SUFFIXES)]
    stems: dict[str, str] = {}
    for name in originals(names):
        other = stems.setdefault(name.rpartition(".")[0], name)
        if other != name:
            raise DataError(
                f"{source.at(folder)} has {other} and {name}: keep one of these; {CIFAR}"
            )
    return list(stems.values())


def _decode(name: str, content: bytes) -> NDArray[np.uint8]:
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(content)) as image:
            return pixels_of(image, name, "RGB", SIDE)
    except DataError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise errors of many types
        raise DataError(f"{name} is not an image, or is truncated ({error}): {CIFAR}") from error


def pixels_of(image: Any, name: str, mode: str, side: int) -> NDArray[np.uint8]:
    """The pixels of a square Pillow image, in this mode.

    Raises:
        DataError: It is not an image, or has another size.
    """
    if not hasattr(image, "convert"):
        raise DataError(f"{name} is not an image: {str(image)[:60]!r}")
    if image.size != (side, side):  # known before decompression
        raise DataError(f"{name} has {image.size[0]} x {image.size[1]} pixels, not {side} x {side}")
    return np.asarray(image.convert(mode))


class _Arrays(pickle.Unpickler):
    """Unpickler of numpy arrays and plain data; executes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow only the classes of arrays."""
        arrays = (module + ".").startswith("numpy.") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
        )
        if arrays or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(name: str, content: bytes) -> dict[bytes, Any]:
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], list(batch[b"labels"])
        wrong = [y for y in labels if y not in range(len(CLASSES))]
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * SIDE * SIDE):
            reason = f"its data has the shape {data.shape} and the type {data.dtype}"
        elif wrong:
            reason = f"it has the label {wrong[0]!r}, not 0..9"
        else:
            return batch
    except Exception as error:  # damaged bytes make pickle raise errors of any type
        reason = str(error)
    raise DataError(f"{name} is not a batch of CIFAR-10 ({reason}): {CIFAR}")
