"""Work of the busiest CTA of a schedule: what determines the time of a kernel."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparse_flash.kernels.schedule import Schedule
from sparse_flash.masks.layout import FULL_TILE
from sparse_flash.prediction_devices import Cost

_MOST_SIMULATED = 1 << 15  # work items


class Work(NamedTuple):
    """Amounts of work.

    items: Work items.
    tiles: Tiles, full or partial.
    partials: Partial tiles.
    splits: Items that are parts of a row.
    """

    items: float
    tiles: float
    partials: float
    splits: float

    def time(self, cost: Cost) -> float:
        """Microseconds of this work on one CTA."""
        tiles = self.tiles * cost.tile + self.partials * cost.partial
        return self.items * cost.item + tiles + self.splits * cost.split


def busiest(schedule: Schedule, cost: Cost) -> Work:
    """The work of the CTA that ends last.

    CTAs take items off the list in its order, each as soon as it is free (list scheduling: Graham,
    1969), as the kernels do. Of long lists, all CTAs are taken to end together.

    Args:
        schedule: The schedule, on any device.
        cost: What work costs.

    >>> from sparse_flash import masks
    >>> from sparse_flash.kernels.device import DeviceFacts
    >>> from sparse_flash.kernels.schedule import schedule
    >>> from sparse_flash.kernels.sm90.config import FORWARD_COSTS
    >>> facts = DeviceFacts("sm_90", num_sms=4, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> made = schedule(masks.full().layout(1024), 1, 1, (128, 128), facts, FORWARD_COSTS)
    >>> busiest(made, Cost(0, 1.5, 1, 0, 0, 0, 0))
    Work(items=2.0, tiles=16.0, partials=0.0, splits=0.0)
    """
    work = schedule.work.cpu().numpy()
    partial = (schedule.tiles[:, 1] != FULL_TILE).cpu().numpy()
    partial[-1] = False  # what items without tiles name
    before = np.concatenate([[0], partial.cumsum()])
    first, tiles = work[:, 3], work[:, 4]
    partials = before[first + tiles] - before[first]
    splits = work[:, 5] >= 0
    amounts = np.stack([np.ones_like(tiles), np.maximum(tiles, 1), partials, splits], 1)
    seconds = amounts @ np.array([cost.item, cost.tile, cost.partial, cost.split])
    if len(work) > _MOST_SIMULATED:
        return Work(*(amounts.sum(0) / schedule.num_ctas).tolist())
    owner = _owners(seconds, schedule.num_ctas)
    last = np.bincount(owner, seconds, schedule.num_ctas).argmax()
    return Work(*amounts[owner == last].sum(0).astype(float).tolist())


def most_parts(schedule: Schedule) -> int:
    """Parts of the row that is split most: a CTA combines them one after the other."""
    return int(schedule.combine[:, 4].max()) if schedule.num_splits else 0


def _owners(seconds: NDArray[np.float64], ctas: int) -> NDArray[np.int64]:
    """The CTA that computes each item."""
    free = [(0.0, cta) for cta in range(ctas)]
    owners = []
    for length in seconds.tolist():
        time, cta = free[0]
        owners.append(cta)
        heapq.heapreplace(free, (time + length, cta))
    return np.array(owners, dtype=np.int64)
