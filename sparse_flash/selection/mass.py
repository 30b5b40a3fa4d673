"""How much attention each stored tile was paid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_flash.checks import (
    check_are_tensors,
    check_kv_lens,
    check_layout,
    check_scale,
    check_tensors,
)
from sparse_flash.kernels.sm90 import mass as sm90
from sparse_flash.masks import BlockLayout, bits
from sparse_flash.masks.assemble import extent
from sparse_flash.masks.device_builders import TracedLayout
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.layout import FULL_TILE
from sparse_flash.masks.modes import is_capturing, is_fake, without_autocast
from sparse_flash.selection.operators import tile_mass_of_data
from sparse_flash.selection.tiles import kept_lists, slots_of, tile_lists

IMPLEMENTATIONS = ("auto", "reference", "sm90")
_LOGITS = 1 << 22  # in memory at a time


def tile_mass(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    lse: Tensor,
    *,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The attention probability of each stored tile: its sum over keys, mean over queries.

        mass[tile] = 1 / rows  sum_{i in rows of tile} sum_{j in tile, allowed} exp(s_ij - lse_i)

    With the lse of attention within the same layout the masses of a block row sum to 1 (less where
    queries have no keys). Not differentiable: a target for selectors (see `selection_loss`).

    Args:
        q: Queries `(b, q_len, h, d)`.
        k: Keys `(b, kv_len, h_kv, d)`.
        layout: The tiles, on the device of the inputs.
        lse: Logsumexp `(b, h, q_len)` that block_sparse_attention returns, over any set of keys.
        softmax_scale: Factor of the logits; default d ** -0.5.
        kv_lens: Number of valid keys per batch entry, int `(b,)`; default: all.
        impl: "auto", "reference" (PyTorch, any device), or "sm90": a kernel for Hopper that takes
            16-bit inputs, blocks of 64 or 128 queries and keys, and head_dim up to 256.

    Returns:
        float32 `(b, h, tiles)`, in the layout's order: entry t of batch entry and head with pattern
        p belongs to tile `crow_indices[p, 0] + t`. tiles is the largest number of tiles of a
        pattern; entries beyond a pattern's own are 0. Of `BlockLayout.from_topk` it is
        `(b, h, nq, k)`: the stored tiles of a row, ascending, then zeros; of
        `BlockLayout.from_blocks` `(b, h, nq, nk)`. Rows with errors are NaN (see `layout.check`).

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or devices that do not fit, or an implementation that cannot compute it.
        RuntimeError: The first call with a layout or kernel is captured into a CUDA graph, or the
            reference with a stored layout.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks
    >>> q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    >>> layout = masks.causal().layout(256, block=(64, 64))
    >>> _, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    >>> mass = tile_mass(q, k, layout, lse)
    >>> mass.shape, round(mass[0, 0, 1:3].sum().item(), 4)  # the second row has two tiles
    (torch.Size([1, 2, 10]), 1.0)
    """
    check_are_tensors(q, k, k)
    check_tensors(q, k, k)
    if isinstance(layout, TracedLayout):  # in a compiled function
        return tile_mass_of_data(q, k, layout, lse, softmax_scale, kv_lens, impl)
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout, got {type(layout).__name__}: mask.layout(q_len, "
            "kv_len) makes one"
        )
    check_layout(layout, q, (q.shape[1], k.shape[1]), k.shape[2])
    _check_lse(lse, q)
    if kv_lens is not None:
        check_kv_lens(kv_lens, q, k.shape[1])
    scale = check_scale(softmax_scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    reason = None if impl == "reference" else sm90.unsupported_reason(q, k, layout)
    if impl == "sm90" and reason:
        raise ValueError(f"impl='sm90' cannot compute this: {reason}")
    if q.is_meta or is_fake(q):
        return lse.new_empty(q.shape[0], q.shape[2], *slots_of(layout))
    with torch.no_grad(), without_autocast(q):
        by_kernel, sizes = impl != "reference" and not reason, (q.shape[0], q.shape[2])
        lists = kept_lists(layout, *sizes) if by_kernel else _lists_of_reference(layout, *sizes)
        inputs = (q, k, lse, lists, layout.block, scale, kv_lens)
        mass = sm90.tile_mass(*inputs) if by_kernel else _reference(*inputs)
        return _by_rows(mass, layout)


def _lists_of_reference(layout: BlockLayout, batch: int, heads: int) -> sm90.TileLists:
    if not isinstance(layout, DeviceLayout) and is_capturing(layout.device):
        raise RuntimeError(
            "impl='reference' of tile_mass cannot be captured into a CUDA graph with a stored "
            "layout, whose changes the graph would not see: run it outside the graph"
        )
    return tile_lists(layout, batch, heads)


def _check_lse(lse: Any, q: Tensor) -> None:
    shape = (q.shape[0], q.shape[2], q.shape[1])
    if not isinstance(lse, Tensor) or lse.shape != shape:
        got = tuple(lse.shape) if isinstance(lse, Tensor) else type(lse).__name__
        raise ValueError(
            f"lse must be (b, h, q_len) = {shape}, got {got}: block_sparse_attention returns it "
            "with return_lse=True"
        )
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"lse must be float32 or float64, got {lse.dtype}: pass it as block_sparse_attention "
            "returns it"
        )
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device}, but q is on {q.device}: move one of them")


def _by_rows(mass: Tensor, layout: BlockLayout) -> Tensor:
    """Of layouts of data on the device: (b, h, nq, slots of a row), NaN in rows with errors."""
    if not isinstance(layout, DeviceLayout):
        return mass
    b, h = mass.shape[:2]
    mass = mass.view(b, h, layout.num_block_rows, -1)
    bad = (layout.tiles_at(layout.block).errors != 0).view(*layout.source.heads, -1)
    bad = bad.repeat_interleave(max(1, h // bad.shape[1]), 1)
    return mass.masked_fill(bad[..., None], torch.nan)


def _reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    lists: sm90.TileLists,
    block: tuple[int, int],
    scale: float,
    kv_lens: Tensor | None,
) -> Tensor:
    """float32 (b, h, slots): tile by tile, gathered; some of each head at a time."""
    b, q_len, h, _ = q.shape
    rows = -(-q_len // block[0])
    top = (lists.owners.long() * rows).view(b, h, 1)
    first, end = lists.starts.long()[top], lists.starts.long()[top + rows]
    mass = torch.zeros(b, h, lists.slots + 1, dtype=torch.float32, device=q.device)
    step = max(1, _LOGITS // max(1, b * h * block[0] * block[1]))
    for start in range(0, lists.slots if b else 0, step):
        index = first + torch.arange(start, min(start + step, lists.slots), device=q.device)
        there, index = index < end, index.clamp(max=len(lists.tiles) - 1)
        row = torch.searchsorted(lists.starts, index.int(), right=True) - 1
        begin = lists.starts.long()[row]
        row = (row - top).clamp(0, rows - 1)
        columns = lists.tiles[index, 0].long()
        slot = index - first
        if lists.row_slots:
            slot = row * lists.row_slots + (columns if lists.by_column else index - begin)
        value = _of_tiles(q, k, lse, lists, block, scale, kv_lens, (row, columns, index))
        value = torch.where(there, value, 0.0).float()
        mass.scatter_(2, torch.where(there, slot, lists.slots), value)
    return mass[..., :-1]


def _of_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    lists: sm90.TileLists,
    block: tuple[int, int],
    scale: float,
    kv_lens: Tensor | None,
    places: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The mass of tiles (b, h, n) at these block rows, columns and indices."""
    (block_q, block_kv), (row, column, index) = block, places
    (b, q_len, h, _), kv_len = q.shape, k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_idx = row[..., None] * block_q + torch.arange(block_q, device=q.device)  # (b, h, n, block_q)
    kv_idx = column[..., None] * block_kv + torch.arange(block_kv, device=q.device)
    limit = torch.full((b,), kv_len, device=q.device) if kv_lens is None else kv_lens.to(q.device)
    limit = limit.clamp(0, kv_len).view(b, 1, 1, 1)
    allowed = (q_idx < q_len)[..., None] & (kv_idx < limit)[..., None, :]
    if len(lists.bit_tiles):
        entry = lists.tiles[index, 1]
        stored = bits.unpack(lists.bit_tiles[entry.clamp(min=0).long()], block_kv)
        allowed &= stored | (entry == FULL_TILE)[..., None, None]
    batch = torch.arange(b, device=q.device).view(b, 1, 1, 1)
    head = torch.arange(h, device=q.device).view(h, 1, 1)
    rows, keys = q_idx.clamp(max=q_len - 1), kv_idx.clamp(max=kv_len - 1)
    of_q = q[batch, rows, head].to(dtype)  # (b, h, n, block_q, d)
    of_k = k[batch, keys, head // (h // k.shape[2])].to(dtype)
    logsum = lse[batch, head, rows].to(dtype)[..., None]
    allowed &= logsum != -torch.inf
    logits = of_q @ of_k.transpose(-1, -2) * scale
    shares = torch.where(allowed, (logits - logsum).exp(), 0.0).sum((-2, -1))
    return shares / extent(row, q_len, block_q)
