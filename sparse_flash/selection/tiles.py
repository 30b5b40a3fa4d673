"""The tiles of a layout, one by one, as `tile_mass` walks them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_flash.kernels.data_bits import DEFAULT_ORDER, kept_fragments
from sparse_flash.kernels.sm90.mass import TileLists
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.modes import is_capturing, plain_torch


def slots_of(layout: BlockLayout) -> tuple[int, ...]:
    """The shape of the mass of one head."""
    if not isinstance(layout, DeviceLayout):
        return (_most_tiles(layout),)
    indices = layout.source.indices
    return layout.num_block_rows, layout.num_block_cols if indices is None else indices.shape[2]


@plain_torch()
def tile_lists(layout: BlockLayout, batch: int, heads: int) -> TileLists:
    """The tiles of a layout for so many batch entries and heads."""
    owners = layout.pattern_map.repeat_interleave(max(1, heads // layout.pattern_map.shape[1]), 1)
    owners = owners.expand(batch, heads).reshape(-1).contiguous()
    if isinstance(layout, DeviceLayout):
        listed, (rows, width) = layout.tiles_at(layout.block), slots_of(layout)
        fragments = {} if listed.fragments is None else listed.fragments
        lists = (listed.starts, listed.tiles, listed.bit_tiles, fragments)
        by_column = layout.source.indices is None
        return TileLists(owners, *lists, rows * width, width, by_column)
    crow = layout.crow_indices
    starts = torch.cat([crow[:, :-1].flatten(), crow[-1:, -1]])
    tiles = torch.stack([layout.col_indices, layout.bit_tile_indices], 1).int()
    return TileLists(owners, starts, tiles, layout.bit_tiles, {}, _most_tiles(layout))


def _most_tiles(layout: BlockLayout) -> int:
    """The most tiles of a pattern; with several patterns the host waits once for each layout."""
    if layout.num_patterns == 1:
        return layout.num_tiles
    crow, known = layout.crow_indices, layout.__dict__.get("_most_tiles")
    if known is None or known[0] is not crow:  # `update_` replaces it
        known = (crow, int((crow[:, -1] - crow[:, 0]).max()))
        layout.__dict__["_most_tiles"] = known
    most: int = known[1]
    return most


@plain_torch()  # kept lists outlive the modes of the call
def kept_lists(layout: BlockLayout, batch: int, heads: int) -> TileLists:
    """The same for a kernel: those of a stored layout are kept on it.

    Raises:
        RuntimeError: They would be made in the capture of a CUDA graph, which does not run it.
    """
    if isinstance(layout, DeviceLayout):
        return tile_lists(layout, batch, heads)
    capturing = is_capturing(layout.device)
    key = (KeptLists, batch, heads)
    kept = layout.derived.get(key)
    if kept is None:
        if capturing:
            raise RuntimeError(
                "the first call with a layout lists its tiles, which a CUDA graph cannot capture: "
                "run the same call once before the capture (see torch.cuda.graph: warm up)"
            )
        make = functools.partial(tile_lists, batch=batch, heads=heads)
        kept = layout.derived.setdefault(key, KeptLists(layout, make))
    lists: TileLists = kept.lists
    if capturing:
        kept.note_capture()
    return lists


class KeptLists:
    """The tiles of a stored layout, which follow it.

    Args:
        layout: The layout.
        make: Returns the lists of a layout.
    """

    def __init__(self, layout: BlockLayout, make: Callable[[BlockLayout], TileLists]) -> None:
        self.make, self.lists = make, _with_fragments(make(layout))
        self._captured: list[TileLists] = []  # CUDA graphs read them

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads the arrays."""
        return bool(self._captured)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays that are not the layout's own."""
        every = {id(lists): lists for lists in (self.lists, *self._captured)}
        return sum(x.nbytes for lists in every.values() for x in _arrays(lists))

    def note_capture(self) -> None:
        """Remember that a CUDA graph reads the present arrays."""
        if not any(lists is self.lists for lists in self._captured):
            self._captured.append(self.lists)

    @plain_torch()
    def follow(self, layout: BlockLayout) -> Callable[[], None]:
        """The step that makes these the tiles of another layout; nothing changes before.

        Raises:
            ValueError: The other layout has more tiles, bit tiles or patterns than a CUDA graph
                was captured with.
        """
        new = _with_fragments(self.make(layout))
        for lists in self._captured:
            _check_fits(lists, new)
        return functools.partial(self._take, new)

    def _take(self, new: TileLists) -> None:
        """Lists of captured graphs change in place; other calls take the new ones."""
        for lists in self._captured:
            for target, source in zip(_arrays(lists), _used(new), strict=True):
                target[: len(source)] = source
        self.lists = new


def _with_fragments(lists: TileLists) -> TileLists:
    """With spare bit tiles, as schedules have them, for captured graphs."""
    bits = kept_fragments({}, lists.bit_tiles)
    spares = bits.new_zeros(min(len(bits) + 16, 1024), *bits.shape[1:])
    return lists._replace(fragments={DEFAULT_ORDER: torch.cat([bits, spares])})


def _arrays(lists: TileLists) -> list[Tensor]:
    """The arrays that describe a pattern to a kernel."""
    return [lists.owners, lists.starts, lists.tiles, lists.fragments[DEFAULT_ORDER]]


def _used(lists: TileLists) -> list[Tensor]:
    """The same without spare entries."""
    *others, bits = _arrays(lists)
    return [*others, bits[: len(lists.bit_tiles)]]


def _check_fits(lists: TileLists, new: TileLists) -> None:
    names = ("heads", "block rows", "tiles", "bit tiles")
    for name, had, given in zip(names, _arrays(lists), _used(new), strict=True):
        if len(given) > len(had) or (name == "block rows" and len(given) != len(had)):
            raise ValueError(
                f"the layout has {len(given)} {name}, but a CUDA graph with tile_mass was captured "
                f"with {len(had)}: capture it with the layout that needs most"
            )
    if new.slots > lists.slots:
        raise ValueError(
            f"the layout has up to {new.slots} tiles in a pattern, but a CUDA graph with tile_mass "
            f"was captured with {lists.slots}: capture it with the layout that needs most"
        )
