"""An endless stream of fresh Pathfinder images, generated in the background during training.

Images are generated in pools of a few thousand. Markers are balanced over all images of a pool, and
a pool is cached on disk with a checksum. The batch of a step depends only on the settings and the
step, so a resumed run sees the same images as an uninterrupted one, also on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from sparse_flash.experiments.data.broken import broken
from sparse_flash.experiments.data.dataset import Batch, Splits
from sparse_flash.experiments.data.files import cached
from sparse_flash.experiments.data.images import Augmented, Order
from sparse_flash.experiments.data.pathfinder import Drawings, joined

from sparse_flash.cores import available_cores

POOL = 8_192  # images generated per pool; some are discarded, see `paddles.mark`
_CHUNK = 256  # images per task of a thread
_AHEAD = 2  # pools prefetched
_HELD_OUT = 1 << 31  # first held-out seed


@dataclass(frozen=True)
class Pool:
    """Images that are generated together; equal pools have equal images."""

    size: int
    contour: int
    geometry: int | None
    order: Order
    seed: int
    """Seed of the first image; the other seeds are consecutive."""
    count: int = POOL
    """Images to generate; fewer remain."""

    def draw(self, threads: ThreadPoolExecutor) -> Drawings:
        """The images, from the disk cache if present.

        Raises:
            ValueError: The curves do not fit on the canvas.
        """
        splits = cached(self, (), lambda: self._build(threads), Drawings)
        assert isinstance(splits.train, Drawings)
        return splits.train

    def _build(self, threads: ThreadPoolExecutor) -> Splits:
        from sparse_flash.experiments.data import paddles as geometry

        seeds = self.seed + np.arange(self.count)
        chunks = np.array_split(seeds, -(-self.count // _CHUNK))
        made = threads.map(  # numba releases the GIL
            lambda some: geometry.curves(self.size, self.contour, some, self.geometry), chunks
        )
        lines, ends = (np.concatenate(parts) for parts in zip(*made, strict=True))
        markers, labels = geometry.mark(ends, self.size, self.seed)
        kept = labels >= 0
        images = Drawings(
            torch.from_numpy(lines[kept]),
            torch.from_numpy(markers[kept]),
            torch.from_numpy(labels[kept]),
            self.size,
            self.order,
            self.geometry,
        )
        nothing = images.subset(torch.arange(0))
        return Splits(images, nothing, nothing)


def held_out(
    threads: ThreadPoolExecutor,
    size: int,
    contour: int,
    geometry: int | None,
    order: Order,
    count: int,
    number: int,
) -> Drawings:
    """Images that no stream uses for training, with any seed.

    Args:
        threads: Threads that generate them.
        size: Pixels per side of the canvas.
        contour: Paddles per long curve.
        geometry: Size of the published images whose paddles are drawn; None: `size`.
        order: Order of the pixels.
        count: Number of images.
        number: Number of the set, 0..7; sets are disjoint.
    """
    more = count + count // 8 + 64  # some are discarded
    while True:
        pool = Pool(size, contour, geometry, order, _HELD_OUT + (number << 28), more)
        images = pool.draw(threads)
        if len(images) >= count:
            return images.subset(torch.arange(count))
        more *= 2


def workers(part: float = 1.0) -> ThreadPoolExecutor:
    """Threads for a part of the cores, of which two are reserved for training."""
    return ThreadPoolExecutor(max(1, round(part * (available_cores() - 2))), "draw")


class Stream:
    """Batches of fresh images of several contours, in a fixed order.

    Each image of a batch has one of the contours, sampled by their weights, and is augmented at
    random. All samples depend on `seed` and the number of the step.

    Args:
        size: Pixels per side of the canvas.
        geometry: Size of the published images whose paddles are drawn; None: `size`.
        order: Order of the pixels.
        contours: Paddles per long curve.
        weights: Relative frequency of each contour.
        batch_size: Images per step.
        seed: Seed of the images, their order and their mixture.
        reuse: Mean number of uses of an image, each in one of eight orientations.
        device: Device that renders the images.
        threads: Threads that generate the geometry.
        shard: Rank of this process, and number of processes that split each batch.
        broken: Fraction of the images in which a long curve is broken; see `broken.broken`.

    Raises:
        ValueError: The batch size is not a multiple of the number of processes.
    """

    def __init__(
        self,
        size: int,
        geometry: int | None,
        order: Order,
        contours: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        reuse: float,
        device: torch.device,
        threads: ThreadPoolExecutor,
        shard: tuple[int, int] = (0, 1),
        broken: float = 0.0,
    ) -> None:
        if batch_size % shard[1]:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {shard[1]} workers"
            )
        self.contours, self.weights = tuple(contours), torch.tensor(weights, dtype=torch.float64)
        self.batch_size, self.seed, self.device, self.shard = batch_size, seed, device, shard
        self.threads, self.broken = threads, broken
        each = self.weights / self.weights.sum() * batch_size
        self.steps = [max(1, round(POOL * reuse / count)) for count in each.tolist()]
        """Number of steps per pool of each contour."""
        start = seed * 2_654_435_761
        self.firsts = [
            Pool(size, contour, geometry, order, (start + (contour << 26)) % _HELD_OUT)
            for contour in contours
        ]
        # One thread per contour, which waits for the threads that generate.
        self.assemblers = ThreadPoolExecutor(len(self.firsts), "pool")
        self.pools: dict[tuple[int, int], Future[Drawings]] = {}
        self.mixed: tuple[tuple[int, ...], Augmented, list[int], list[int]] | None = None

    def prepare(
        self, step: int, ahead: int = _AHEAD, threads: ThreadPoolExecutor | None = None
    ) -> None:
        """Start to generate the pools of this step and `ahead` more of each contour; do not wait.

        Args:
            step: Step of the run.
            ahead: Pools of each contour to prefetch.
            threads: Threads that generate; default: those of the stream.
        """
        for which, steps in enumerate(self.steps):
            first = step // steps
            for number in range(first, first + 1 + ahead):
                if (which, number) not in self.pools:
                    draw, by = self._pool(which, number).draw, threads or self.threads
                    self.pools[which, number] = self.assemblers.submit(draw, by)
            for old in [k for k in self.pools if k[0] == which and k[1] < first]:
                self.pools.pop(old).cancel()

    def _pool(self, which: int, number: int) -> Pool:
        first = self.firsts[which]
        return replace(first, seed=(first.seed + number * POOL) % _HELD_OUT)

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        self.prepare(step)
        images, starts, counts = self._images(step)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        n = self.batch_size
        contour = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        places, ways = torch.rand(2, n, dtype=torch.float64, generator=generator)
        index = torch.tensor(starts)[contour] + (places * torch.tensor(counts)[contour]).long()
        index += len(images.images) * (8 * ways).long()
        rank, size = self.shard
        return images.take(index[rank::size].to(self.device))

    def _images(self, step: int) -> tuple[Augmented, list[int], list[int]]:
        """The images of the pools of this step; start and number of the images of each contour."""
        numbers = tuple(step // steps for steps in self.steps)
        if self.mixed is None or self.mixed[0] != numbers:
            pools = [self._pool_images(*key) for key in enumerate(numbers)]
            counts = [len(pool) for pool in pools]
            starts = [sum(counts[:i]) for i in range(len(counts))]
            images = joined(pools).on(self.device)
            mixed = Augmented(images, self.firsts[0].order, images.size)
            self.mixed = numbers, mixed, starts, counts
        return self.mixed[1:]

    def _pool_images(self, which: int, number: int) -> Drawings:
        """The images of a pool, some of them with a broken curve."""
        images, pool = self.pools[which, number].result(), self._pool(which, number)
        return broken(images, pool.contour, self.broken, pool.seed) if self.broken else images

    def close(self) -> None:
        """Cancel pools that have not been started."""
        self.assemblers.shutdown(wait=False, cancel_futures=True)
        self.pools.clear()
