"""The tile mass on Hopper: which calls the kernel can take, and how it is launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.attention import DTYPES
from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.data_bits import kept_fragments
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.sm90 import attention
from sparse_flash.kernels.sm90.mass_config import BLOCKS, MassConfig, mass_config
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

_LOG2_E = math.log2(math.e)
PIECE = 100  # fewest tiles of a piece: small pieces keep the K of few heads in the L2 cache


def unsupported_reason(q: Tensor, k: Tensor, layout: BlockLayout) -> str | None:
    """Why the kernel cannot take these tensors, with the way out; None where it can."""
    if any(size not in BLOCKS for size in layout.block):
        return (
            f"it takes blocks of 64 or 128 queries and keys, the layout has {layout.block}: "
            "masks.retile changes them, impl='reference' takes any"
        )
    return attention.unsupported_reason(q, k, k)


class TileLists(NamedTuple):
    """The tiles of a layout as the kernel walks them.

    owners: Pattern of each batch entry and head, int32 (b * h,).
    starts: First tile of each block row of each pattern, and the end, int32 (P * nq + 1,).
    tiles: Block column, and bit tile or -1 (full), int32 (T, 2).
    bit_tiles: uint8 (N, block_q, ceil(block_kv / 8)).
    fragments: The same in the kernel's register order, by a key of `kept_fragments`.
    slots: Slots of a head.
    row_slots: Slots of a block row; 0 where tiles follow each other.
    by_column: Whether the slot in a row is the block column.
    """

    owners: Tensor
    starts: Tensor
    tiles: Tensor
    bit_tiles: Tensor
    fragments: dict[Hashable, Tensor]
    slots: int
    row_slots: int = 0
    by_column: bool = False


def tile_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    lists: TileLists,
    block: tuple[int, int],
    softmax_scale: float,
    kv_lens: Tensor | None,
) -> Tensor:
    """float32 (b, h, slots) on torch's current stream; see `sparse_flash.selection.tile_mass`.

    Raises:
        RuntimeError: The first launch is captured into a CUDA graph.
    """
    b, _, h, d = q.shape
    if softmax_scale <= 0:  # masked logits are -inf before they are scaled
        q = -q if softmax_scale < 0 else torch.zeros_like(q)
        softmax_scale = -softmax_scale or 1.0
    config = mass_config(DTYPES[q.dtype], d, block)
    if kv_lens is None:
        kv_lens = torch.full((b,), k.shape[1], dtype=torch.int32, device=q.device)
    else:
        kv_lens = kv_lens.to(q.device, torch.int32).clamp(0, k.shape[1])
    shape = (b * h, lists.slots, config.slices)
    slice_mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    if not slice_mass.numel():
        return slice_mass.new_zeros(b, h, lists.slots)
    bits = kept_fragments(lists.fragments, lists.bit_tiles)
    sms = DeviceFacts.of(q.device).num_sms
    num_ctas = min(b * h * lists.slots, sms * config.ctas_per_sm)
    rounds = max(1, b * h * lists.slots // (num_ctas * PIECE))
    inputs = (q, k, lse.float().contiguous(), kv_lens, *lists[:3], bits, slice_mass)
    scalars = (lists.row_slots, int(lists.by_column), rounds, num_ctas, softmax_scale * _LOG2_E)
    key = (config, q.device.index)
    if key not in _loaded and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first launch of a kernel loads it, which a CUDA graph cannot capture: run the "
            "same call once before the capture (see torch.cuda.graph: warm up)"
        )
    with torch.cuda.device(q.device):
        load_mass(config)(*inputs, *scalars)
    _loaded.add(key)
    return slice_mass.sum(2).view(b, h, lists.slots)


_loaded: set[tuple[MassConfig, int | None]] = set()  # configs by device that have the code


@functools.cache
def load_mass(config: MassConfig) -> Callable[..., None]:
    """The compiled kernel of a config."""
    return load(config, compile_mass)


def compile_mass(config: MassConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.tile_mass import TileMassSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys()),
        of.floats(of.b, of.h, of.q_len),  # lse
        of.ints(of.b),  # kv_lens
        of.ints(of.size()),  # owners
        of.ints(of.size()),  # starts
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), max(1, config.tile_m // 64), 128, 2),  # bits
        of.floats(of.size(), of.size(), config.slices),  # slice_mass
        *(Int32(0), Int32(0), Int32(1), Int32(1), Float32(1.0)),
    )
    return compile_kernel(TileMassSm90(config, of.dtype), arguments, config.arch)
