"""Layouts that data on the device decide: top-k blocks, tables of blocks, packed documents."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from sparse_flash.masks import device_tiles
from sparse_flash.masks.device_tiles import DeviceTiles, Source
from sparse_flash.masks.device_within import invalid_documents
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch
from torch import Tensor

_ARRAYS = (
    *("crow_indices", "col_indices", "bit_tile_indices", "bit_tiles"),
    *("ccol_indices", "row_indices", "transpose_order"),
)
_REASONS = {
    device_tiles.OUT_OF_RANGE: "an index that is neither -1 nor a block of keys (0..{last})",
    device_tiles.TILES: "more tiles than the capacity of {tiles} holds: raise capacity[0]",
    device_tiles.BIT_TILES: "more bit tiles than the capacity of {bit_tiles} holds: raise "
    "capacity[1]",
    device_tiles.DOCUMENTS: "documents whose cu_seqlens do not ascend from 0 to {q_len}",
}


class DeviceLayout(BlockLayout):
    """A BlockLayout whose tiles are found on the device, without a wait of the host.

    Made by `BlockLayout.from_topk`, `BlockLayout.from_blocks`, and by `.layout` of masks that read
    data on the device. Attention takes it as it is. All that looks at arrays or counts (`density`,
    repr, `save`, `crow_indices` and so on) makes the host wait, checks the layout (see `check`),
    and works on the layout that `fixed` returns.
    """

    on_device: ClassVar[bool] = True

    def __init__(self, source: Source) -> None:
        self.q_len, self.kv_len, self.block = source.lengths
        self.source = source
        self.derived, self.calls = {}, {}
        self._lists: dict[tuple[int, int], DeviceTiles] = {}
        self._noted: list[Tensor] = []
        self.derived_bits: Any = None  # what kernels made of the data
        self._fixed: BlockLayout | None = None
        self.signature = (source.lengths, source.heads, self.device)  # for checks of calls
        self.captured = is_capturing(self.device)  # what is derived belongs to the CUDA graph

    @property
    def pattern_map(self) -> Tensor:  # type: ignore[override]
        """The pattern of each batch entry and head that has rows of its own, int32."""
        patterns = torch.arange(self.num_patterns, dtype=torch.int32, device=self.device)
        return patterns.view(self.source.heads)

    @property
    def device(self) -> torch.device:
        """Where the data live, and all that is derived from them."""
        return self.source.device

    @property
    def num_patterns(self) -> int:
        """Batch entries and heads with rows of their own."""
        return self.source.num_patterns

    @property
    def nbytes(self) -> int:
        """Memory of the data, and of what was derived from them."""
        own = [x for x in (self.source.indices, self.source.table) if x is not None]
        lists = [x for tiles in self._lists.values() for x in tiles]
        fixed = 0 if self._fixed is None else self._fixed.nbytes
        derived = sum(value.nbytes for value in list(self.derived.values()))
        return sum(x.nbytes for x in (*own, *lists)) + fixed + derived

    @plain_torch()
    def tiles_at(self, tile: tuple[int, int]) -> DeviceTiles:
        """The tiles of this size, listed on the device; kept.

        What is listed while a CUDA graph is captured belongs to that graph, and is kept only with
        a layout that was made there.
        """
        found = self._lists.get(tile)
        if found is None:
            found = self.source.listed(tile)
            if self.keeps_what_is_derived:
                self._lists[tile] = found
        return found

    @property
    def keeps_what_is_derived(self) -> bool:
        """Whether what is derived now may be used later: not where it belongs to a CUDA graph."""
        return self.captured or not is_capturing(self.device)

    def note(self, errors: Tensor) -> None:
        """Let `check` look at errors that were found elsewhere, uint8 (P, nq)."""
        if not any(errors is known for known in self._noted):
            self._noted.append(errors)

    def wrong_documents(self) -> Tensor | None:
        """What invalid cu_seqlens add to the errors of block rows, uint8 (1, 1); None: nothing."""
        wrong = invalid_documents(self.source.within)
        return None if wrong is None else wrong.to(torch.uint8).view(1, 1) * device_tiles.DOCUMENTS

    def check(self) -> None:
        """Raise where the layout is not what was asked for; the host waits for the device.

        Raises:
            ValueError: An index is out of range, the capacity is too small, or cu_seqlens do not
                ascend to the length. Attention with such a layout gives NaN in the block rows.

        >>> layout = BlockLayout.from_topk(torch.tensor([[[[0], [7]]]]), (64, 64), 128)
        >>> layout.check()
        Traceback (most recent call last):
        ...
        ValueError: block row 1 of batch entry 0, head 0 has an index that is neither -1 nor a \
block of keys (0..1)
        """
        self.tiles_at(self.block)
        for errors in (*(tiles.errors for tiles in self._lists.values()), *self._noted):
            _raise_errors(self.source, errors)

    def fixed(self) -> BlockLayout:
        """The same layout with arrays of exact sizes, as of a mask; the host waits for the device.

        Raises:
            ValueError: As `check`.

        >>> layout = BlockLayout.from_topk(torch.tensor([[[[0, -1], [1, 0]]]]), (64, 64), 128)
        >>> layout.fixed().col_indices
        tensor([0, 0, 1], dtype=torch.int32)
        """
        self.check()
        return self.stored()

    @plain_torch()
    def stored(self) -> BlockLayout:
        """What `fixed` returns, unchecked: block rows with errors are empty."""
        if self._fixed is None:
            listed = self.tiles_at(self.block)
            count = int(listed.starts[-1])
            rows = torch.arange(len(listed.starts) - 1, device=self.device)
            rows = torch.repeat_interleave(rows, listed.starts.diff(), output_size=count)
            columns, entries = listed.tiles[:count].long().unbind(1)
            some = (listed.bit_tiles != 0).flatten(1).any(1)
            some = torch.cat([some, some.new_ones(1)])[entries]  # entry -1, the last, is full
            self._fixed = BlockLayout.from_tiles(
                self.lengths,
                rows[some],
                columns[some],
                listed.bit_tiles,
                entries[some],
                self.pattern_map,
            )
        return self._fixed

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAYS:
            return getattr(self.fixed(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are those of the fixed layout."""
        return _as_it_is, (self.fixed(),)

    def update_(self, other: BlockLayout) -> NoReturn:
        """Refused: data change the layout, not calls.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a layout of data on the device is not updated: make it anew from the new data, or "
            "inside the CUDA graph, which then reads the data at every replay"
        )


def _as_it_is(layout: BlockLayout) -> BlockLayout:
    """What a pickled layout of data becomes."""
    return layout


def is_capturing(device: torch.device) -> bool:
    """Whether work for the device goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _raise_errors(source: Source, errors: Tensor) -> None:
    """ValueError for the first block row with an error."""
    bad = errors.cpu().nonzero()
    if not len(bad):
        return
    pattern, row = bad[0].tolist()
    code = int(errors[pattern, row])
    q_len, kv_len, block = source.lengths
    tiles, bit_tiles = source.capacity or (None, None)
    known = {
        "last": -(-kv_len // block[1]) - 1,
        "tiles": tiles,
        "bit_tiles": bit_tiles,
        "q_len": q_len,
    }
    reason = next(text for bit, text in _REASONS.items() if code & bit)
    where = f"batch entry {pattern // source.heads[1]}, head {pattern % source.heads[1]}"
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise ValueError(f"block row {row} of {where} has {reason.format(**known)}{more}")
