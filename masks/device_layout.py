"""Layouts defined by data on the device: top-k blocks, tables of blocks, packed documents."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from sparse_flash.masks import device_tiles
from sparse_flash.masks.device_tiles import DeviceTiles, Source
from sparse_flash.masks.device_within import form_of, invalid_documents
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import is_capturing, plain_torch
from sparse_flash.masks.records import CACHE
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.mask import Mask

_MOST_FORMS = 1024
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


class Form:
    """The common properties of layouts that differ in their data alone.

    source: A source of this form, without its data.
    plans: Makers of their plans, see `kernels.plan.DataPlans`.
    """

    def __init__(self, source: Source) -> None:
        static = source.static  # kept, as it is derived
        self.source = replace(source, indices=None, table=None, within=None)
        self.source.__dict__["static"] = static
        self.plans: dict[Hashable, Any] = {}

    def layout(self, within: Mask) -> DeviceLayout:
        """The layout of another mask of this form, a snapshot."""
        source = object.__new__(Source)
        source.__dict__.update(self.source.__dict__)
        source.__dict__["within"] = within
        return DeviceLayout(source, self)


def form_of_source(source: Source) -> Form | None:
    """The form of a source; None where it cannot be told. Forms are few and kept."""
    within = () if source.within is None else form_of(source.within)
    if within is None:
        return None
    dtype = None if source.indices is None else source.indices.dtype
    return kept_form((Form, source.static, dtype, within, source.device), source)


def kept_form(key: Hashable, source: Source) -> Form:
    """The form kept under a key, or a new one of this source."""
    found: Form | None = CACHE.forms.get(key)
    if found is None:
        if len(CACHE.forms) >= _MOST_FORMS:
            CACHE.forms.clear()
        found = CACHE.forms[key] = Form(source)
    return found


class DeviceLayout(BlockLayout):
    """A BlockLayout whose tiles are listed on the device, without a host synchronization.

    Built by `BlockLayout.from_topk`, `BlockLayout.from_blocks`, and by `.layout` of masks that read
    data on the device. Attention uses it directly. Access to arrays or counts (`density`, `save`,
    `crow_indices` and so on) synchronizes the host, checks the layout (see `check`), and uses the
    result of `fixed`. The repr of an invalid layout states the reason and does not raise.
    """

    on_device: ClassVar[bool] = True

    def __init__(self, source: Source, form: Form | None = None) -> None:
        self.q_len, self.kv_len, self.block = source.lengths
        self.source, self._form = source, form
        self.derived, self.calls = {}, {}
        self._lists: dict[tuple[int, int], DeviceTiles] = {}
        self._noted: list[Tensor] = []
        self.derived_bits: Any = None  # device data that kernels derived
        self._fixed: BlockLayout | None = None
        self.signature = (source.lengths, source.heads, self.device)  # identifies validated calls
        self.captured = is_capturing(self.device)  # derived tensors belong to the CUDA graph

    @property
    def pattern_map(self) -> Tensor:  # type: ignore[override]
        """The pattern of each batch entry and head with rows of its own, int32."""
        patterns = torch.arange(self.num_patterns, dtype=torch.int32, device=self.device)
        return patterns.view(self.source.heads)

    @property
    def form(self) -> Form | None:
        """The form that layouts of other data share; None where it cannot be told."""
        if self._form is None:
            self._form = form_of_source(self.source)
        return self._form

    @property
    def device(self) -> torch.device:
        """Device of the data and of everything derived from them."""
        return self.source.device

    @property
    def num_patterns(self) -> int:
        """Number of batch entries times heads with rows of their own."""
        return self.source.num_patterns

    @property
    def nbytes(self) -> int:
        """Bytes of the data and of the tensors derived from them."""
        own = [x for x in (self.source.indices, self.source.table) if x is not None]
        lists = [x for tiles in self._lists.values() for x in tiles if isinstance(x, Tensor)]
        fixed = 0 if self._fixed is None else self._fixed.nbytes
        derived = sum(value.nbytes for value in list(self.derived.values()))
        return sum(x.nbytes for x in (*own, *lists)) + fixed + derived

    @plain_torch()
    def tiles_at(self, tile: tuple[int, int]) -> DeviceTiles:
        """The tiles of this size, listed on the device and cached.

        A list made during the capture of a CUDA graph belongs to that graph. It is cached only if
        the layout was created in the same capture.
        """
        found = self._lists.get(tile)
        if found is None:
            found = self.source.listed(tile)
            if self.keeps_what_is_derived:
                self._lists[tile] = found
        return found

    @property
    def keeps_what_is_derived(self) -> bool:
        """Whether tensors derived now may be cached: not if they belong to a CUDA graph."""
        return self.captured or not is_capturing(self.device)

    def note(self, errors: Tensor) -> None:
        """Add errors of block rows that `check` will report, uint8 (P, nq)."""
        if not any(errors is known for known in self._noted):
            self._noted.append(errors)

    def wrong_documents(self) -> Tensor | None:
        """Error code of invalid cu_seqlens for all rows, uint8 (1, 1); None: no cu_seqlens."""
        wrong = invalid_documents(self.source.within)
        return None if wrong is None else wrong.to(torch.uint8).view(1, 1) * device_tiles.DOCUMENTS

    def check(self) -> None:
        """Raise if any block row is invalid. Synchronizes the host.

        Raises:
            ValueError: An index is out of range, the capacity is too small, or cu_seqlens do not
                ascend to the length. Attention with such a layout returns NaN in these rows.

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
        """The same layout with arrays of exact sizes, as from a mask. Synchronizes the host.

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
        """The layout of `fixed`, unchecked: block rows with errors are empty."""
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

    def __repr__(self) -> str:
        """As of every layout; the reason where it is not as asked for: printing must not fail."""
        if is_capturing(self.device):  # a captured kernel has not run
            return f"{self._shape_text()}, not known while a CUDA graph is captured)"
        if self.device.type == "meta":
            return f"{self._shape_text()}, not known on the meta device)"
        try:
            self.check()
        except ValueError as error:
            return f"{self._shape_text()}, invalid: {error})"
        return super().__repr__()

    def _shape_text(self) -> str:
        height, width = self.block
        return f"DeviceLayout({self.q_len} x {self.kv_len}, block {height} x {width}"

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAYS:
            return getattr(self.fixed(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles contain the fixed layout."""
        return _as_it_is, (self.fixed(),)

    def update_(self, other: BlockLayout) -> NoReturn:
        """Refused: this layout changes with its data, not by calls.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a layout of data on the device is not updated: make it again from the new data, or "
            "inside the CUDA graph, which then reads the data at every replay"
        )


def _as_it_is(layout: BlockLayout) -> BlockLayout:
    """Reconstructor of a pickled layout."""
    return layout


def _raise_errors(source: Source, errors: Tensor) -> None:
    """Raise ValueError for the first block row with an error."""
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
