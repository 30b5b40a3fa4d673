"""`BlockLayout.from_topk` and `BlockLayout.from_blocks`: layouts from data on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sparse_flash.masks import validation
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.device_tiles import Source
from sparse_flash.masks.device_within import form_of, readers, snapshot
from sparse_flash.masks.modes import is_plain, plain_torch, refuse_mapped
from sparse_flash.masks.records import CACHE
from sparse_flash.masks.traceable import Traceable
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.io import Lengths
    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.mask import Mask

Capacity = tuple[int, int]
_INTEGERS = (torch.int64, torch.int32, torch.int16)


def from_topk(  # noqa: D417 cls
    cls: type[BlockLayout],
    indices: Tensor,
    block: tuple[int, int],
    q_len: int,
    kv_len: int | None = None,
    *,
    within: Mask | None = None,
    capacity: Capacity | None = None,
) -> BlockLayout:
    """The layout in which each block of queries attends to k blocks of keys.

    Built on the device of the indices without a host synchronization, also inside CUDA graphs and
    compiled functions. A replayed graph reads the current indices. See `DeviceLayout`.

    Args:
        indices: Block columns for each block of queries, int `(1 or b, 1 or h or h_kv, nq, k)`, in
            any order. -1 stands for no block; repetitions count once. With h_kv heads, the query
            heads of one key head share its rows.
        block: (block_q, block_kv), in tokens; nq is ceil(q_len / block_q).
        q_len: Number of queries.
        kv_len: Number of keys; default: q_len.
        within: Mask that restricts the chosen blocks, element by element.
        capacity: Maximum numbers of tiles and bit tiles, over all rows; saves memory. Default: k
            tiles for each row.

    An index out of range, or more tiles than the capacity, marks the block row as invalid:
    `layout.check()` raises, and attention returns NaN for its queries.

    Raises:
        TypeError: An argument has the wrong type, or indices are not integers.
        ValueError: Shapes or lengths do not match.

    >>> from sparse_flash.masks import BlockLayout, causal
    >>> indices = torch.tensor([[[[0, -1], [0, 1], [2, 0]]]])  # b, h, nq, k
    >>> layout = BlockLayout.from_topk(indices, (64, 64), 192, within=causal())
    >>> layout.num_tiles, layout.num_partial, round(layout.density, 3)
    (5, 3, 0.391)
    """
    lengths = _lengths(q_len, kv_len, block)
    _check_tensor("indices", indices, _INTEGERS, "integers (int64, int32 or int16)")
    rows = -(-lengths[0] // lengths[2][0])
    if indices.shape[2] != rows or not indices.shape[3]:
        raise ValueError(
            f"indices must be (1 or batch, 1 or heads, {rows}, k) for {lengths[0]} queries in "
            f"blocks of {lengths[2][0]}, k at least 1, got {tuple(indices.shape)}"
        )
    return _layout("topk", indices, lengths, within, capacity)


def from_blocks(  # noqa: D417 cls
    cls: type[BlockLayout],
    table: Tensor,
    block: tuple[int, int],
    q_len: int,
    kv_len: int | None = None,
    *,
    within: Mask | None = None,
    capacity: Capacity | None = None,
) -> BlockLayout:
    """The layout of the blocks chosen by a table of bools; otherwise like `from_topk`.

    Args:
        table: Whether each block is chosen, bool `(1 or b, 1 or h or h_kv, nq, nk)`.
        block: (block_q, block_kv), in tokens; nq is ceil(q_len / block_q), nk of kv_len likewise.
        q_len: Number of queries.
        kv_len: Number of keys; default: q_len.
        within: Mask that restricts the chosen blocks, element by element.
        capacity: Maximum numbers of tiles and bit tiles, over all rows; default: all blocks of the
            table. Time and memory of the tile lists grow with it.

    Raises:
        TypeError: An argument has the wrong type, or the table is not bool.
        ValueError: Shapes or lengths do not match.

    >>> from sparse_flash.masks import BlockLayout
    >>> BlockLayout.from_blocks(torch.eye(4, dtype=torch.bool)[None, None], (64, 64), 256).density
    0.25
    """
    lengths = _lengths(q_len, kv_len, block)
    _check_tensor("table", table, (torch.bool,), "bools")
    shape = tuple(-(-n // side) for n, side in zip(lengths[:2], lengths[2], strict=True))
    if table.shape[2:] != shape:
        raise ValueError(
            f"table must be (1 or batch, 1 or heads, {shape[0]}, {shape[1]}) for "
            f"{lengths[0]} x {lengths[1]} tokens in blocks of {lengths[2]}, got "
            f"{tuple(table.shape)}"
        )
    return _layout("blocks", table, lengths, within, capacity)


def _lengths(q_len: int, kv_len: int | None, block: tuple[int, int]) -> Lengths:
    return validation.checked_lengths(q_len, q_len if kv_len is None else kv_len, block)


def _check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of {what}, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {what}, got {x.dtype}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be an ordinary tensor, got {kind}: use x.to_dense()")
    if x.ndim != 4 or not x.shape[0] or not x.shape[1]:
        raise ValueError(
            f"{name} must have 4 dimensions, (1 or batch, 1 or heads, block rows, ...), got "
            f"{tuple(x.shape)}"
        )
    refuse_mapped(name, x, "for all batch entries in one call")


class TracedLayout(NamedTuple):
    """Result of `from_topk` and `from_blocks` inside torch.compile, an argument for attention.

    kind: "topk" or "blocks".
    data: Indices or table.
    lengths: q_len, kv_len, block.
    within: Mask that restricts the blocks.
    capacity: Maximum numbers of tiles and bit tiles.
    """

    kind: str
    data: Tensor
    lengths: Lengths
    within: Mask | None
    capacity: Capacity | None


def _layout(
    kind: str, data: Tensor, lengths: Lengths, within: Mask | None, capacity: Capacity | None
) -> Any:
    capacity = checked_capacity(capacity)
    if torch.compiler.is_compiling():
        return TracedLayout(kind, data.detach(), lengths, within, capacity)
    if within is not None:
        _check_within(within, lengths)
    return layout_of_data(kind, data, lengths, within, capacity)


def layout_of_data(
    kind: str, data: Tensor, lengths: Lengths, within: Mask | None, capacity: Capacity | None
) -> BlockLayout:
    """The layout of validated data."""
    from sparse_flash.masks.device_layout import DeviceLayout

    return DeviceLayout(source_of(kind, data, lengths, within, capacity))


def checked_capacity(capacity: Any) -> Capacity | None:
    """A pair of ints, or None."""
    if capacity is None:
        return None
    if not (isinstance(capacity, tuple | list) and len(capacity) == 2):
        raise TypeError(f"capacity must be a pair of ints, (tiles, bit_tiles), got {capacity!r}")
    tiles, bit_tiles = (integer("layout", "capacity", n, 0) for n in capacity)
    return tiles, bit_tiles


def _check_within(within: Any, lengths: Lengths) -> None:
    if not isinstance(within, Traceable) or not hasattr(within, "patterns"):
        raise TypeError(f"within must be a Mask, like masks.causal(), got {type(within).__name__}")
    within.check_lengths(*lengths[:2])


def source_of(
    kind: str, data: Tensor, lengths: Lengths, within: Mask | None, capacity: Capacity | None
) -> Source:
    """A snapshot of validated data."""
    with plain_torch():
        heads, data = _with_heads_of(within, data.detach())
        within = None if within is None else snapshot(within, data.device)
        rows = data.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        if rows.dtype == torch.int16:
            rows = rows.int()  # the number of blocks, which stands for none, may not fit
        indices, table = (rows, None) if kind == "topk" else (None, rows)
        return Source(lengths, heads, indices, table, within, capacity, rows.device)


def _with_heads_of(within: Mask | None, data: Tensor) -> tuple[tuple[int, int], Tensor]:
    """(batch entries, heads) of data and mask combined, and the data expanded to them."""
    shape = tuple(data.shape[:2])
    if within is None or not within.by_head:
        return (shape[0], shape[1]), data
    given = within.patterns()[1].shape
    for name, mine, theirs in zip(("batch entries", "heads"), shape, given, strict=True):
        grouped = name == "heads" and theirs % mine == 0
        if 1 not in (mine, theirs) and mine != theirs and not grouped:
            raise ValueError(
                f"`within` has masks for {theirs} {name}, but the data have {mine}: give both one "
                "number, or one for all"
            )
    b, h = (max(mine, theirs) for mine, theirs in zip(shape, given, strict=True))
    repeats = (b // shape[0], h // shape[1])
    data = data.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1)
    return (b, h), data


def layout_of_call(mask: Mask, q_len: int, kv_len: int, device: torch.device) -> BlockLayout:
    """As `mask.layout`, of a mask that reads tensors; masks of one form are checked once."""
    form = form_of(mask)
    key = (form, q_len, kv_len, device)
    if form is None or not is_plain():
        return mask.layout(q_len, kv_len, device=device)
    known = CACHE.forms.get(key)
    if known is None:
        known = CACHE.forms[key] = mask.layout(q_len, kv_len, device=device).form
    layout: BlockLayout = known.layout(snapshot(mask, device, in_call=True))
    return layout


def of_mask(mask: Mask, lengths: Lengths, device: torch.device) -> BlockLayout:
    """The layout of a mask that reads tensors on the device, from their current values."""
    from sparse_flash.masks.device_layout import DeviceLayout

    kept = snapshot(mask, device)
    heads = tuple(mask.patterns()[1].shape)
    read = list(readers(kept))
    capacity = next((m.capacity for m in read if m.capacity is not None), None)
    device = read[0].cu_seqlens.device  # with its index, as the copies are there
    return DeviceLayout(Source(lengths, (heads[0], heads[1]), None, None, kept, capacity, device))
