"""Objects derived from masks, cached as long as the mask lives or while recently used."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Hashable

    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.mask import Mask

GIBIBYTE = 1 << 30
_MOST_STATES = 64  # layouts of a mask that reads data: most are of values that never return
M = TypeVar("M", bound="Mask")


class Record:
    """Objects derived from a mask. Equal masks share one record.

    mask: The first of these masks, a weak reference.
    layouts: By lengths and device.
    calls: Prepared calls of attention, by their signature; see `prepare`.
    used: Time of the last lookup, in ticks of the cache.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = weakref.ref(mask)
        self.layouts: dict[Hashable, BlockLayout] = {}
        self.calls: dict[Hashable, Any] = {}
        self.used = 0
        self.lock = threading.RLock()

    def layout(self, key: Hashable, build: Callable[[], BlockLayout]) -> BlockLayout:
        """The layout of this key; built by the first thread that asks."""
        found = self.layouts.get(key)
        if found is None:
            with self.lock:
                found = self.layouts.get(key)
                if found is None:
                    found = self.layouts[key] = build()
        return found

    def trim(self, limit: int, most: int) -> None:
        """Remove the oldest layouts above a number of bytes or of layouts.

        The latest stays, and so do layouts read by a captured CUDA graph.
        """
        with self.lock:
            sizes = {key: layout.nbytes for key, layout in self.layouts.items()}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= limit and len(self.layouts) <= most:
                    return
                if not _is_captured(self.layouts[key]):
                    total -= sizes[key]
                    del self.layouts[key]
                    self.calls.clear()  # they hold layouts

    @property
    def nbytes(self) -> int:
        """Bytes of all layouts and of the objects derived from them."""
        return sum(layout.nbytes for layout in list(self.layouts.values()))

    @property
    def pinned(self) -> bool:
        """Whether a captured CUDA graph reads derived arrays, which then must not be freed."""
        return any(map(_is_captured, list(self.layouts.values())))

    def clear(self) -> None:
        """Remove everything."""
        self.layouts, self.calls = {}, {}


def _is_captured(layout: BlockLayout) -> bool:
    return any(getattr(value, "captured", False) for value in list(layout.derived.values()))


class RecordCache:
    """The records of masks, found by equality.

    A record lives as long as one of its masks. The cache keeps it alive longer, so that a mask
    constructed in every call is laid out once. Above `limit` bytes in total, the least recently
    used records are evicted, and old layouts of the record in use, whose mask may live for long:
    of other lengths, or of earlier states. Those of captured CUDA graphs are never evicted.
    """

    def __init__(self, limit: int = GIBIBYTE) -> None:
        self.limit = limit
        self.calls_of_data: dict[Hashable, Any] = {}  # prepared calls of layouts from data
        self.forms: dict[Hashable, Any] = {}  # of layouts from data, see `device_layout.Form`
        self._recent: dict[Mask, Record] = {}
        self._ticks = itertools.count()
        self._all: weakref.WeakSet[Record] = weakref.WeakSet()
        self._lock = threading.RLock()

    def of(self, mask: Mask) -> Record:
        """The record of a mask."""
        record = mask._record
        if record is None:  # fast path for masks constructed in every call
            record = self._recent.get(mask) or self._new_record(mask)
            record.used = next(self._ticks)
            mask.__dict__["_record"] = record
        return record

    def first_equal(self, mask: M) -> M:
        """The first mask equal to `mask`, if its record is cached; else `mask` itself.

        A composite constructed in every call thus becomes a single object. Its record is found by
        identity, and the new object is freed.
        """
        record = self._recent.get(mask)
        if record is None:
            return mask
        record.used = next(self._ticks)
        first = record.mask()
        return mask if first is None else cast("M", first)

    def _new_record(self, mask: Mask) -> Record:
        with self._lock:
            record = self._recent.get(mask)
            if record is None:
                record = self._recent[mask] = Record(mask)
                self._all.add(record)
            return record

    @property
    def nbytes(self) -> int:
        """Bytes of the objects that the cache keeps alive."""
        return sum(record.nbytes for record in list(self._recent.values()))

    def trim(self, mask: Mask) -> None:
        """Evict records beyond the limit. Call it after the record of a mask has grown."""
        self.of(mask).trim(self.limit, _MOST_STATES if mask.changeable else sys.maxsize)
        self._evict()

    def _evict(self) -> None:
        with self._lock:
            sizes = {mask: record.nbytes for mask, record in self._recent.items()}
            total = sum(sizes.values())
            oldest_first = sorted(self._recent, key=lambda mask: self._recent[mask].used)
            for mask in oldest_first[:-1]:
                if total <= self.limit:
                    return
                if not self._recent[mask].pinned:
                    total -= sizes[mask]
                    del self._recent[mask]

    def clear(self) -> None:
        """Remove all objects that no captured CUDA graph reads, also of live masks."""
        with self._lock:
            self.calls_of_data.clear()
            self.forms.clear()
            self._recent = {m: r for m, r in self._recent.items() if r.pinned}
            for record in list(self._all):
                if not record.pinned:
                    record.clear()


CACHE = RecordCache()


def clear_cache() -> None:
    """Free all cached layouts and schedules of masks; they are rebuilt on use.

    Arrays of captured CUDA graphs and layouts that you hold are not freed.

    >>> import sparse_flash
    >>> sparse_flash.clear_cache()
    """
    CACHE.clear()


def set_cache_limit(nbytes: int) -> None:
    """Set the memory limit of cached layouts and schedules of masks.

    It applies to all masks that are no longer referenced together, and to each one that is: a
    model keeps a layout of each of its masks, the latest, whatever its size.

    Args:
        nbytes: Bytes over all devices; default 1 GiB. 0 keeps only the latest layouts.

    Raises:
        TypeError: `nbytes` is not an int.
        ValueError: `nbytes` is negative.

    >>> import sparse_flash
    >>> sparse_flash.set_cache_limit(1 << 30)
    """
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"the limit must be an int, a number of bytes, got {nbytes!r}")
    if nbytes < 0:
        raise ValueError(f"the limit must be at least 0 bytes, got {nbytes}")
    CACHE.limit = nbytes
    CACHE._evict()


def inherit_changeable(mask: Any) -> None:
    """Mark a composite as changeable or on-device if an operand is."""
    for name in ("changeable", "on_device"):
        if any(getattr(operand, name) for operand in mask.operands()):
            object.__setattr__(mask, name, True)
