"""The compared implementations: ours, and the baselines that researchers use today.

A baseline prepares a call for a case once, since planning is not timed. It raises UnsupportedError
with the reason where it cannot compute the case.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sparse_flash.experiments.bench.cases import PREDICATES, Case
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.layout import FULL_TILE
from torch import Tensor
from torch.nn import attention
from torch.nn.functional import pad, scaled_dot_product_attention

from sparse_flash import block_sparse_attention

Result = Tensor | tuple[Tensor, ...]
Call = Callable[[], Any]  # a Result


LARGEST_MATRIX = 1 << 32  # elements of a mask, a byte each


class UnsupportedError(ValueError):
    """A baseline cannot compute a case."""


@dataclass(frozen=True)
class Baseline:
    """`prepare(case, layout, q, k, v)` returns a call that computes the output `(b, s, h, d)`."""

    name: str
    package: str  # whose version is recorded, and whose absence leaves the baseline out
    module: str
    prepare: Callable[[Case, BlockLayout, Tensor, Tensor, Tensor], Call]

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "installed from sources"


def _ours(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    impl = "sm90" if _is_hopper(q) else "sm80"
    return lambda: block_sparse_attention(q, k, v, layout, impl=impl)


def _sm80(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    if not _is_hopper(q):
        raise UnsupportedError("on this GPU these are the kernels of `ours`")
    return lambda: block_sparse_attention(q, k, v, layout, impl="sm80")


def _is_hopper(q: Tensor) -> bool:
    return torch.cuda.get_device_capability(q.device) == (9, 0)


def _flash_attention_4(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    if case.built_in:
        causal = case.built_in == "causal"
        return lambda: output_of(flash_attn_func(q, k, v, causal=causal))
    if layout.num_partial:
        raise UnsupportedError("partial tiles need a predicate compiled into its kernel")

    def tensors(layout: BlockLayout) -> Any:
        full = layout.bit_tile_indices == FULL_TILE
        lists = (*_lists(layout, ~full), *_lists(layout, full))
        return BlockSparseTensorsTorch(*lists, block_size=layout.block)

    sparse = {"block_sparse_tensors": tensors(layout)}
    if q.requires_grad:
        sparse["block_sparse_tensors_bwd"] = tensors(layout.transpose())
    return lambda: output_of(flash_attn_func(q, k, v, **sparse))


def _grouped(q: Tensor, k: Tensor) -> bool:
    """Whether several query heads share a key head."""
    return q.shape[2] != k.shape[2]


def output_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a call that may return more."""
    return result if isinstance(result, Tensor) else result[0]


def _flex_attention(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    partial = layout.bit_tile_indices != FULL_TILE
    kinds = (*_lists(layout, partial), *_lists(layout, ~partial))

    exact = PREDICATES.get(str(case.mask))
    bits = _bits(layout) if layout.num_partial else None

    def predicate(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if exact:
            return exact(q_idx, kv_idx)
        return bits(b, h, q_idx, kv_idx) if bits else q_idx >= 0

    lengths = (case.length, case.length)
    blocks = BlockMask.from_kv_blocks(
        *kinds, BLOCK_SIZE=layout.block, mask_mod=predicate, seq_lengths=lengths
    )
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    compiled = compile_once(flex_attention)
    gqa = _grouped(q, k)
    return lambda: compiled(*heads_first, block_mask=blocks, enable_gqa=gqa).transpose(1, 2)


def _lists(layout: BlockLayout, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Padded lists of the kept tiles, by the layout's map of (batch or 1, heads or 1) to patterns.

    Returns:
        counts (batch or 1, heads or 1, rows); block columns, the same and (columns,).
    """
    nq, nk, device = layout.num_block_rows, layout.num_block_cols, layout.device
    rows = layout.tile_rows[keep].long()  # those of all patterns, one after the other
    counts = rows.bincount(minlength=layout.num_patterns * nq)
    rank = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[rows]
    columns = torch.zeros(layout.num_patterns * nq, nk, dtype=torch.int32, device=device)
    columns[rows, rank] = layout.col_indices[keep]
    patterns = layout.pattern_map.long()
    return counts.view(-1, nq)[patterns].int(), columns.view(-1, nq, nk)[patterns]


def _bits(layout: BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask of a layout's partial tiles, looked up in its bit tiles: exact for any mask."""
    nq, nk = layout.num_block_rows, layout.num_block_cols
    entries = torch.zeros(layout.num_patterns * nq, nk, dtype=torch.int32, device=layout.device)
    entries[layout.tile_rows.long(), layout.col_indices.long()] = layout.bit_tile_indices
    (height, width), tiles, patterns = layout.block, layout.bit_tiles, layout.pattern_map.long()
    batch, heads = (int(size > 1) for size in patterns.shape)

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row = patterns[b * batch, h * heads] * nq + q_idx // height
        tile = entries[row, kv_idx // width]
        return (tiles[tile, q_idx % height, kv_idx % width // 8] >> (kv_idx % 8)) & 1 > 0

    return allowed


@functools.cache
def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function, the same at each call; it raises where it cannot be compiled."""
    torch._dynamo.config.recompile_limit = 1000  # a graph for each shape, not one for all
    torch._functorch.config.donated_buffer = False  # the backward pass is timed again and again
    # The whole of it: else what cannot be compiled would run uncompiled, unnoticed.
    return torch.compile(function, dynamic=False, fullgraph=True)


def _cudnn(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    if layout.num_patterns > 1:
        raise UnsupportedError("its intervals are those of a mask that all heads share")
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    intervals = _intervals(case, layout.device).repeat(1, 1, case.batch)
    plan = create_mask_plan(intervals, q, k, v, build_backward=q.requires_grad)
    return lambda: flex_attn_func(q, k, v, mask_plan=plan)


def _intervals(case: Case, device: torch.device) -> Tensor:
    """Each query's visible keys as intervals [0, f0), [f1, f2), ...: int32 (1, n odd, queries).

    Ends ascend; [s, s) pads the intervals of a query.
    """
    mask, s = case.pattern, case.length
    kv, chunks = torch.arange(s, device=device), []
    for start in range(0, s, 1024):
        allowed = mask(torch.arange(start, min(start + 1024, s), device=device)[:, None], kv)
        row, edge = pad(allowed.int(), (1, 1)).diff(dim=1).nonzero().T  # starts, ends in turns
        counts = row.bincount(minlength=len(allowed))
        rank = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
        # An interval that starts at 0 needs no start; otherwise the first one is [0, 0).
        place = rank + torch.where(allowed[:, 0], -1, 1)[row]
        shape = (len(allowed), int(counts.max()) + 2)
        ends = torch.full(shape, s, dtype=torch.int32, device=device)
        ends[~allowed[:, 0], 0] = 0
        ends[row[place >= 0], place[place >= 0]] = edge[place >= 0].int()
        chunks.append(ends)
    most = max(chunk.shape[1] for chunk in chunks) // 2 * 2 + 1
    return torch.cat([pad(c, (0, most - c.shape[1]), value=s) for c in chunks]).T[None].contiguous()


def _sdpa(backend: attention.SDPBackend) -> Callable[..., Call]:
    def prepare(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
        if case.built_in is None:
            raise UnsupportedError("dense and causal only")
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))

        def call() -> Tensor:
            with attention.sdpa_kernel(backend):
                out = scaled_dot_product_attention(
                    q_, k_, v_, is_causal=case.built_in == "causal", enable_gqa=_grouped(q, k)
                )
            return out.transpose(1, 2)

        return call

    return prepare


def _reference(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return lambda: block_sparse_attention(q, k, v, layout, impl="reference")


def _sdpa_matrix(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    if case.length**2 * layout.num_patterns > LARGEST_MATRIX:
        raise UnsupportedError("the mask as a matrix of booleans takes more than 4 GiB")
    allowed = layout.to_dense()
    if allowed.ndim == 2:
        allowed = allowed[None, None]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    arguments: dict[str, Any] = {"attn_mask": allowed, "enable_gqa": _grouped(q, k)}
    return lambda: scaled_dot_product_attention(q_, k_, v_, **arguments).transpose(1, 2)


BASELINES = (
    Baseline("ours", "sparse-flash", "sparse_flash", _ours),
    Baseline("ours, sm80", "sparse-flash", "sparse_flash", _sm80),
    Baseline("FlashAttention-4", "flash-attn-4", "flash_attn", _flash_attention_4),
    Baseline("cudnn-frontend", "nvidia-cudnn-frontend", "cudnn", _cudnn),
    Baseline("FlexAttention", "torch", "torch", _flex_attention),
    Baseline("SDPA cuDNN", "torch", "torch", _sdpa(attention.SDPBackend.CUDNN_ATTENTION)),
    Baseline("SDPA flash", "torch", "torch", _sdpa(attention.SDPBackend.FLASH_ATTENTION)),
)

# For a case of the user's: also ours without kernels, and SDPA with any mask.
REFERENCE = Baseline("ours, reference", "sparse-flash", "sparse_flash", _reference)
MATRIX = Baseline("SDPA, mask as a matrix", "torch", "torch", _sdpa_matrix)
