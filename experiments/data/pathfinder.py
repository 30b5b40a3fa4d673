"""Pathfinder: does a dashed curve join the two marked ends? Images of 32 to 512 pixels per side.

Source: Linsley et al. (2018); Tay et al., Long Range Arena (2020), for 32 pixels (Pathfinder) and
128 (Path-X); Dao et al., FlashAttention (2022), for 256. Generated images are stored as geometry, a
few hundred bytes each, and rendered on the device on demand. The release can be read instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from sparse_flash.experiments.data import hub
from sparse_flash.experiments.data import pathfinder_release as release
from sparse_flash.experiments.data.archives import open_source
from sparse_flash.experiments.data.dataset import (
    Batch,
    Examples,
    Split,
    Splits,
    check_curriculum_share,
)
from sparse_flash.experiments.data.files import DataError, cached
from sparse_flash.experiments.data.images import (
    Augmented,
    Order,
    coordinates,
    pixels_of,
    token_order,
)
from sparse_flash.experiments.data.pathfinder_release import RELEASE
from sparse_flash.experiments.data.source import Source
from sparse_flash.experiments.old_names import METHODS, PATHFINDER, renamed_fields
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from tqdm import tqdm

from sparse_flash.cores import available_cores

_CHUNK = 64  # images per task of a thread
_DRAWN = 256  # images rendered per step
_OUTSIDE = -1_000  # coordinate of padding paddles, pixels
_KEPT = 1 << 30  # bytes; a GPU stores the pixels of smaller sets, and renders larger ones per batch


@renamed_fields(PATHFINDER | METHODS)
@dataclass(frozen=True)
class Pathfinder:
    """Images of `size` x `size` pixels, half of them with both markers on one curve.

    Raises:
        ValueError: The settings allow no image.
    """

    size: Literal[32, 64, 128, 256, 512] = 32
    """Pixels per side."""
    contour: int = 14
    """Paddles per long curve: 14 in Long Range Arena; fewer are easier."""
    geometry: Literal[32, 64, 128, 256] | None = None
    """Size of the published images whose paddles, gaps, thickness and markers are drawn; None:
    `size`. A model trained on small canvases transfers to large ones with the same geometry."""
    curriculum: tuple[int, ...] = ()
    """Contours of the curriculum, with `train` images each: a model that follows short curves
    learns longer ones faster."""
    curriculum_share: float = 0.25
    """Fraction of the training steps with images of the curriculum."""
    train: int = 160_000
    """Training images."""
    val: int = 20_000
    """Validation images."""
    test: int = 20_000
    """Test images."""
    seed: int = 0
    """Seed of the images, not of the training."""
    order: Order = "raster"
    """The order of the pixels."""
    augment: bool = False
    """Train on the eight rotations and reflections of each image."""
    source: str = ""
    """Files to read instead of generating images: a folder of the Long Range Arena release with
    imgs and metadata, a folder above it (such as lra_release, for `size` and `contour`), an archive
    (lra_release.gz), or hf: and the name of a data set of the Hugging Face Hub with the columns
    image and label."""

    vocabulary = 256
    classes = 2
    pairs = False

    def __post_init__(self) -> None:
        if self.size not in (32, 64, 128, 256, 512):
            raise ValueError(f"size must be 32, 64, 128, 256 or 512 pixels, got {self.size}")
        if self.geometry not in (None, 32, 64, 128, 256):
            raise ValueError(f"geometry must be 32, 64, 128, 256 or None, got {self.geometry}")
        if self.size == 512 and self.geometry is None:
            raise ValueError(
                "no images of 512 pixels were published: choose their paddles with geometry "
                "(--task.geometry 256)"
            )
        if self.source and self.geometry is not None:
            raise ValueError(
                f"geometry applies to generated images, not to those in {self.source!r}: leave "
                "out geometry or source"
            )
        if not 3 <= self.contour <= 20:
            raise ValueError(f"contour must be in 3..20, got {self.contour}")
        if any(not 3 <= contour <= 20 for contour in self.curriculum):
            raise ValueError(f"curriculum must be contours in 3..20, got {self.curriculum}")
        if self.source and self.curriculum:
            raise ValueError(
                f"a curriculum needs generated images: with source {self.source!r} set curriculum "
                "to nothing (--task.curriculum without contours), or leave source empty"
            )
        check_curriculum_share(self.curriculum_share)
        if min(self.train, self.val, self.test) < 1:
            raise ValueError(
                "Pathfinder needs at least one image in each split, got "
                f"train={self.train}, val={self.val}, test={self.test}"
            )

    @property
    def length(self) -> int:
        """Tokens per image: one per pixel."""
        return self.size**2

    def coordinates(self) -> Tensor:
        """Row and column of each token: (size^2, 2)."""
        return coordinates(self.order, self.size)

    def load(self) -> Splits:
        """Generate the geometry of all images, or read the release.

        Raises:
            DataError: The source is missing or damaged, or has another size.
        """
        # These settings do not change the images.
        same = replace(
            self, curriculum_share=Pathfinder.curriculum_share, augment=Pathfinder.augment
        )
        if self.source:
            splits = self._load_published(same)
        else:
            splits = cached(same, (), self._generate, Drawings)
        train = self._laid(splits.train)
        if splits.first is None:
            return replace(splits, train=train)
        first = self._laid(splits.first)
        return replace(splits, train=train, first=first, first_share=self.curriculum_share)

    def _load_published(self, same: Pathfinder) -> Splits:
        if hub.on_hub(self.source):
            return cached(same, (self.source,), self._read_hub)
        source = open_source(self.source, RELEASE)

        def files() -> list[str]:
            metadata = release.find_metadata(source, self.size, self.contour)
            return [*metadata, *release.labels_of(source, metadata)]

        return cached(same, source.paths(files), lambda: self._read(source))

    def _laid(self, images: Examples) -> Examples:
        return Augmented(images, self.order, self.size) if self.augment else images

    def _generate(self) -> Splits:
        counts = (self.train, self.val, self.test)
        total = sum(counts) + self.train * len(self.curriculum)
        with tqdm(total=total, desc=f"{self.size}-pixel Pathfinder", disable=None) as bar:
            parts = [self._drawings(i, count, self.contour, bar) for i, count in enumerate(counts)]
            curriculum = [
                self._drawings(0, self.train, contour, bar) for contour in self.curriculum
            ]
        return Splits(*parts, first=joined(curriculum) if curriculum else None)

    def _drawings(self, split: int, count: int, contour: int, bar: tqdm[None]) -> Drawings:
        """The images of a split; splits share no seeds."""
        from sparse_flash.experiments.data import paddles as geometry

        start = (self.seed * 3 + split) << 28  # of the seeds

        def make(chunk: int) -> tuple[np.ndarray, np.ndarray]:
            seeds = start + np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            made = geometry.curves(self.size, contour, seeds % 2**32, self.geometry)
            bar.update(_CHUNK)
            return made

        chunks = -(-count // _CHUNK)
        with ThreadPoolExecutor(available_cores()) as pool:  # numba releases the GIL
            made = list(pool.map(make, range(chunks)))
            while True:  # some are discarded: see `paddles.mark`
                lines, ends = (np.concatenate(x) for x in zip(*made, strict=True))
                markers, labels = geometry.mark(ends, self.size, start % 2**32)
                kept = (labels >= 0).nonzero()[0][:count]
                if len(kept) == count:
                    break
                made += pool.map(make, range(len(made), len(made) + -(-chunks // 20)))
        lines, markers, labels = lines[kept], markers[kept], labels[kept]
        arrays = (torch.tensor(lines), torch.tensor(markers), torch.tensor(labels))
        return Drawings(*arrays, self.size, self.order, self.geometry)

    def _read(self, source: Source) -> Splits:
        metadata = release.find_metadata(source, self.size, self.contour)
        labels = release.labels_of(source, metadata)
        row = {path: i for i, path in enumerate(labels)}
        pixels = np.zeros((len(row), self.length), np.uint8)
        order, empty = token_order(self.order, self.size).permutation.numpy(), []
        images = source.read(row, release.LARGEST_IMAGE, "image")
        for path, content in tqdm(images, desc="reading images", total=len(row), disable=None):
            if content:
                pixels[row[path]] = release.gray(content, source.at(path), self.size)[order]
            else:
                empty.append(path)
        if len(empty) == len(row):
            raise DataError(f"{self.source} has no image that is not empty: {RELEASE}")
        if len(empty) > 1:  # the release contains one, 0/sample_172.png
            raise source.error(empty[0], f"is empty, and so are {len(empty) - 1} more images")
        kept = [i for path, i in row.items() if path not in empty]
        known = torch.tensor(list(labels.values()))
        return _parted(Split(torch.from_numpy(pixels), None, known).subset(torch.tensor(kept)))

    def _read_hub(self) -> Splits:
        """The splits of the data set; a single split is divided."""
        images = hub.DataSet(self.source, RELEASE)
        names = images.names
        if len(names) not in (1, len(hub.SPLITS)):
            raise DataError(
                f"{self.source} has {' and '.join(names) or 'no splits'}: give one with train, "
                f"validation and test, or with one of them, which is divided; {RELEASE}"
            )
        parts = [self._split(self._images(images, name)) for name in names]
        return _parted(parts[0]) if len(parts) == 1 else Splits(*parts)

    def _images(self, images: hub.DataSet, split: str) -> Iterable[tuple[np.ndarray, int]]:
        rows = images.rows(split, "image|img", "label")
        for number, (image, label) in enumerate(tqdm(rows, desc=split, disable=None), 1):
            name = f"{self.source}: {split} {number} (see --task.size)"
            if label not in (0, 1):
                raise DataError(f"{name} has the label {label!r}, not 0 or 1: {RELEASE}")
            yield pixels_of(image, name, "L", self.size), int(label)

    def _split(self, images: Iterable[tuple[np.ndarray, int]]) -> Split:
        some = list(images)
        if not some:
            raise DataError(f"{self.source} has no image that is not empty: {RELEASE}")
        pixels, labels = zip(*some, strict=True)
        tokens = torch.from_numpy(np.stack([x.reshape(-1) for x in pixels]))
        tokens = tokens[:, token_order(self.order, self.size).permutation]
        return Split(tokens, None, torch.tensor(labels))


def _parted(whole: Split) -> Splits:
    """Divide 80 : 10 : 10, as in Long Range Arena."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    tenth = max(1, len(whole) // 10)
    val, test, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    return Splits(whole.subset(train), whole.subset(val), whole.subset(test))


class Drawings(Examples):
    """Images as geometry: paddles int16 (n, paddles, 4), markers (n, 2, 2), labels (n,).

    `take` renders them on the device of the geometry. A GPU renders all images once if their pixels
    fit 1 GiB.
    """

    def __init__(
        self,
        paddles: Tensor,
        markers: Tensor,
        labels: Tensor,
        size: int,
        order: str,
        geometry: int | None = None,
    ) -> None:
        self.paddles, self.markers, self.labels = paddles, markers, labels
        self.size, self.order, self.geometry = size, order, geometry
        self.permutation = token_order(order, size).permutation.to(labels.device)

    def state(self) -> tuple[Tensor | int | str | None, ...]:
        """Arguments of the constructor that recreate it."""
        return self.paddles, self.markers, self.labels, self.size, self.order, self.geometry

    def to(self, device: torch.device) -> Examples:
        """The same images on another device."""
        drawings = self.on(device)
        small = len(self) * self.size**2 <= _KEPT
        return drawings.drawn() if small and device.type == "cuda" else drawings

    def on(self, device: torch.device) -> Drawings:
        """The same geometry on another device."""
        moved = (self.paddles.to(device), self.markers.to(device), self.labels.to(device))
        return Drawings(*moved, self.size, self.order, self.geometry)

    def changed(self, **tensors: Tensor) -> Drawings:
        """The same images with other paddles, markers or labels."""
        own = {"paddles": self.paddles, "markers": self.markers, "labels": self.labels}
        return Drawings(**own | tensors, size=self.size, order=self.order, geometry=self.geometry)

    def drawn(self) -> Split:
        """All images as pixels."""
        index = torch.arange(len(self), device=self.labels.device)
        pixels = [self._pixels(some) for some in index.split(_DRAWN)]
        return Split(torch.cat(pixels), None, self.labels)

    def subset(self, index: Tensor) -> Drawings:
        """Some of the images."""
        some = (self.paddles[index], self.markers[index], self.labels[index])
        return Drawings(*some, self.size, self.order, self.geometry)

    def take(self, index: Tensor) -> Batch:
        """The images at these indices."""
        tokens = torch.cat([self._pixels(some) for some in index.split(_DRAWN)])
        return Batch(tokens.long(), None, self.labels[index])

    def _pixels(self, index: Tensor) -> Tensor:
        """Pixels in token order: uint8 (b, s)."""
        images = draw(self.paddles[index], self.markers[index], self.size, self.geometry)
        return images.flatten(1)[:, self.permutation]


def joined(parts: list[Drawings]) -> Drawings:
    """All images of the parts; images with fewer paddles are padded by paddles far outside."""
    most = max(part.paddles.shape[1] for part in parts)
    paddles = [pad(p.paddles, (0, 0, 0, most - p.paddles.shape[1]), value=_OUTSIDE) for p in parts]
    markers, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("markers", "labels"))
    first = parts[0]
    return Drawings(torch.cat(paddles), markers, labels, first.size, first.order, first.geometry)


def draw(paddles: Tensor, markers: Tensor, size: int, geometry: int | None = None) -> Tensor:
    """Render images, uint8 (b, size, size), at twice the size, and scale down; the maximum is 255.

    The margin of an image follows from its paddles, whose reach is length plus margin.
    """
    from sparse_flash.experiments.data.paddles import drawing

    d, side = drawing(size, geometry), 2 * size
    pivot, offset = paddles[..., :2].float(), paddles[..., 2:].float()
    reach = offset.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    head, along = pivot + offset, offset / reach * d.paddle
    canvas = torch.zeros(len(paddles), side * side, device=paddles.device)
    lines = _coverage(
        2 * (head - along) + 0.5, 2 * along, d.thickness, 2 * (d.paddle + d.thickness)
    )
    _stamp(canvas, *lines, d.contrast, side)
    discs = 2 * markers + 0.5
    spots = _coverage(discs, torch.zeros_like(discs), 2 * d.marker, 2 * d.marker)
    _stamp(canvas, *spots, 1.0, side)
    small = avg_pool2d(canvas.view(-1, 1, side, side), 2)[:, 0]
    return (small / small.amax((1, 2), keepdim=True) * 255).round().to(torch.uint8)


def _coverage(start: Tensor, along: Tensor, half: float, radius: float) -> tuple[Tensor, Tensor]:
    """Pixels around the center of strokes (b, n, 2), and the covered fraction of each, 0..1.

    half: Half the width. radius: Radius of the pixels considered.
    """
    steps = torch.arange(-int(radius) - 2, int(radius) + 3, device=start.device)
    grid = torch.cartesian_prod(steps, steps)
    pixels = (start + along / 2).round()[:, :, None] + grid
    t = ((pixels - start[:, :, None]) * along[:, :, None]).sum(-1)
    t = (t / along.square().sum(-1).clamp(min=1e-6)[..., None]).clamp(0, 1)
    nearest = start[:, :, None] + t[..., None] * along[:, :, None]
    distance = (pixels - nearest).norm(dim=-1)
    return pixels, (half + 0.5 - distance).clamp(0, 1)


def _stamp(canvas: Tensor, pixels: Tensor, values: Tensor, contrast: float, side: int) -> None:
    """Draw strokes on canvases (b, side^2), combined by the maximum."""
    inside = ((pixels >= 0) & (pixels < side)).all(-1)
    index = (pixels[..., 0] * side + pixels[..., 1]).long().masked_fill(~inside, 0)
    values = values.masked_fill(~inside, 0) * contrast
    canvas.scatter_reduce_(1, index.flatten(1), values.flatten(1), "amax")
