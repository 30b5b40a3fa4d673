"""Attention of queries at positions: plans, and arguments of a launch.

Query i of batch entry b has position p = i + q_offset[b] - kv_starts[b], and key j position
r = j - kv_starts[b]. Attention is allowed where p >= 0, kv_starts[b] <= j < kv_lens[b] and
mask(p, r). The layout is one of positions: q_len above the largest p, kv_len at least that of the
keys. A query at a position that the layout does not have gets NaN, and so does every query of an
entry with a negative kv_starts: offsets lie on the device and cannot be checked on the host.

Nothing is built from step to step: a plan holds the layout's rows and tiles, and the kernels find
theirs by the offsets. Only the backward pass lists its tiles in every call, on the device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from sparse_flash.kernels.attention import LOG2_E, TermsOfCall, with_positive_scale
from sparse_flash.kernels.config import KernelConfig
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.position_lists import BackwardLists, backward_lists
from sparse_flash.kernels.schedule import stack_heads
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.retile import retile
from torch import Tensor
from torch.nn.functional import pad

Config = TypeVar("Config", bound=KernelConfig)
ARRAYS = ("rows", "pattern_map", "tiles", "bits", "zeros", "unlimited")
_MAX_INT32 = 2**31 - 1
_SPLIT_BYTES = 1 << 28  # the most memory of the parts of split rows
_lock = threading.Lock()


@dataclass(eq=False)
class PositionPlan(Generic[Config]):
    """How a layout of positions is computed, whatever the offsets.

    Args:
        config: Config of the kernel that is launched.
        rows: First tile, number of tiles, first and last column of each block row, and of an
            empty row at the end, int32 (patterns, block rows + 1, 4).
        pattern_map: Pattern of each batch entry and head, int32 (1 or b, 1 or h).
        tiles: Column and bit tile (-1: full) of each tile, and a last one for rows without tiles,
            int32 (tiles + 1, 2).
        bits: Bit tiles in fragment order, int32 (bit tiles and spare ones, tile height / 64, 128,
            2).
        zeros: Offsets of calls that give none, int32 (b,).
        unlimited: Lengths of calls that give none, int32 (b,).
        num_positions: q_len of the layout.
        longest: Tiles of the longest row.
        num_ctas: Number of CTAs to launch.
        rebuild: Makes the plan of another layout for the same tensors. None in plans from arrays.

    For the backward pass rows are block columns, and the pattern map is that of k's heads.
    """

    config: Config
    rows: Tensor
    pattern_map: Tensor
    tiles: Tensor
    bits: Tensor
    zeros: Tensor
    unlimited: Tensor
    num_positions: int
    longest: int
    num_ctas: int
    rebuild: Callable[[BlockLayout], PositionPlan[Config]] | None = field(default=None, repr=False)
    kernel: Kernel | None = field(default=None, repr=False)
    captured: bool = False  # a CUDA graph reads the arrays
    num_splits: int = 0  # in the sense of `Plan`: split rows have arrays of their own here
    combine: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.lists: tuple[Any, ...] = (self.rows, self.pattern_map, self.tiles, self.bits)

    @property
    def lasts(self) -> bool:
        """Whether it is kept for many launches; one from arrays serves one call."""
        return self.rebuild is not None

    def arrays(self) -> list[Tensor]:
        """The arrays in the order of `ARRAYS`; the constructor takes them so."""
        return [getattr(self, name) for name in ARRAYS]

    def numbers(self) -> list[int]:
        """The numbers that follow the arrays in the constructor."""
        return [self.num_positions, self.longest, self.num_ctas]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(x.numel() * x.element_size() for x in self.arrays())

    def follow(self, layout: BlockLayout) -> Callable[[], None] | None:
        """As `Plan.follow`."""
        assert self.rebuild is not None
        new = self.rebuild(layout)
        try:
            self._check_capacity(new, layout)
        except ValueError:
            if self.captured:
                raise
            return None
        return functools.partial(self._take, new)

    def _check_capacity(self, new: PositionPlan[Config], layout: BlockLayout) -> None:
        """ValueError: the plan of this layout needs more of something than these arrays have."""
        for name in ("rows", "pattern_map", "tiles", "bits"):
            given, capacity = len(getattr(new, name)), len(getattr(self, name))
            if given > capacity and not (name == "bits" and layout.num_bit_tiles <= capacity):
                raise ValueError(
                    f"no space for {given} entries of `{name}`: there were {capacity}; begin with "
                    "the layout that needs most"
                )

    def _take(self, new: PositionPlan[Config]) -> None:
        for name in ("rows", "pattern_map", "tiles", "bits"):
            target, source = getattr(self, name), getattr(new, name)
            size = min(len(target), len(source))
            target[:size] = source[:size]
        self.longest = new.longest


@dataclass(frozen=True, slots=True)
class PositionKey:
    """Key of a plan besides its layout."""

    config: KernelConfig
    batch: int
    heads: int
    kv_heads: int
    facts: DeviceFacts
    transposed: bool = False  # compute by key blocks


def plan_of_key(layout: BlockLayout, key: PositionKey) -> PositionPlan[Any]:
    """The plan of a layout, from `layout.derived` or built and kept there. Thread safe."""
    plan: PositionPlan[Any] | None = layout.derived.get(key)
    if plan is None:
        with _lock:
            plan = layout.derived.get(key)
            if plan is None:
                plan = layout.derived[key] = build_plan(layout, key)
    return plan


def build_plan(layout: BlockLayout, key: PositionKey) -> PositionPlan[Any]:
    """The plan of a layout of any granularity."""
    config = key.config
    with plain_torch():  # the plan outlives the modes and transforms of the call that asks for it
        if key.transposed:
            tiled = retile(layout.transpose(), config.tile)
            tiled = stack_heads(tiled, key.heads // key.kv_heads)
        else:
            tiled = retile(layout, config.tile)
        device = layout.device
        longest = int(tiled.crow_indices.diff().max()) if tiled.crow_indices.numel() > 1 else 0
        bits = fragment_order(tiled.bit_tiles)
        spares = bits.new_zeros(min(len(bits) + 16, 1024), *bits.shape[1:])  # see `follow`
        return PositionPlan(
            config,
            _rows_of(tiled),
            tiled.pattern_map.contiguous(),
            pad(torch.stack([tiled.col_indices, tiled.bit_tile_indices], 1).int(), (0, 0, 0, 1)),
            torch.cat([bits, spares]),
            torch.zeros(key.batch, dtype=torch.int32, device=device),
            torch.full((key.batch,), _MAX_INT32, dtype=torch.int32, device=device),
            layout.q_len,
            longest,
            key.facts.num_sms,
            functools.partial(build_plan, key=key),
        )


def _rows_of(layout: BlockLayout) -> Tensor:
    """`PositionPlan.rows`: a kernel reads all it needs to know of a row at once."""
    first, count = layout.crow_indices, layout.crow_indices.diff()
    columns = pad(layout.col_indices, (0, 1)).int()
    start = first[:, :-1].long()
    last = (start + count - 1).clamp(min=0)
    fields = (first[:, :-1], count, columns[start], columns[last])
    rows = pad(torch.stack(fields, 2).int(), (0, 0, 0, 1))
    rows[:, -1, 0] = first[:, -1]
    return rows


class Offsets(NamedTuple):
    """Where the queries and keys of a call lie; all int32 on its device.

    kv_lens, q_offset, kv_starts: `(b,)`.
    q_base: Added to q_offset.
    """

    kv_lens: Tensor
    q_offset: Tensor
    kv_starts: Tensor
    q_base: int


def offsets_of(
    plan: PositionPlan[Any],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
) -> Offsets:
    """The offsets of a call, with the plan's arrays as defaults."""

    def given(x: Tensor | None, default: Tensor) -> Tensor:
        if x is None:
            return default
        if x.dtype == torch.int32 and x.device == default.device and x.is_contiguous():
            return x
        return x.to(default.device, torch.int32).contiguous()

    base = 0
    if not isinstance(q_offset, Tensor):
        base, q_offset = q_offset or 0, None
    lens, zeros = given(kv_lens, plan.unlimited), plan.zeros
    return Offsets(lens, given(q_offset, zeros), given(kv_starts, zeros), base)


def forward_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan[Any],
    offsets: Offsets,
    softmax_scale: float,
    splits: int,
    numbers: tuple[int, ...] = (),
    terms: TermsOfCall | None = None,
    *,
    known: int | None = None,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at positions, on torch's current stream.

    Args:
        q: Queries `(b, s, h, d)`.
        k: Keys `(b, s_kv, h_kv, d)`; s_kv is at most the layout's kv_len.
        v: Values, shaped as k.
        plan: Plan of a forward kernel, with its kernel bound.
        offsets: Positions of the call (see `offsets_of`).
        softmax_scale: Factor of the logits, of any sign.
        splits: Number of splits per row (see `row_splits`).
        numbers: Further scalar arguments of the kernel, before the scale.
        terms: Returns the kernel's score terms and scale_log2, from the positive scale. None: no
            terms.
        known: Number of positions that the terms know, if fewer than the layout has; queries beyond
            get NaN.
        transient: As in `Kernel.launch`.

    Returns:
        out `(b, s, h, d)` in q's dtype, and lse `(b, h, s)` in float32. NaN for queries at
        positions that the layout does not have.
    """
    b, s, h, _ = q.shape
    q, softmax_scale = with_positive_scale(q, softmax_scale)
    out = q.new_empty((b, s, h, v.shape[3]))
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    if not out.numel() or not k.shape[1]:
        return out.zero_(), lse.fill_(-torch.inf)
    splits = max(1, min(splits, _SPLIT_BYTES // max(1, 4 * b * s * h * plan.config.head_dim)))
    used = splits if splits > 1 else 0
    parts = lse.new_empty((used, b, s, h, plan.config.head_dim)), lse.new_empty((used, b, h, s))
    *arrays, base = offsets
    inputs, scale_log2 = (q, k, v, out, lse, *parts, *arrays), softmax_scale * LOG2_E
    if terms is not None:
        of_scores, scale_log2 = terms(softmax_scale)
        inputs = (*inputs, of_scores)
    num_positions = plan.num_positions if known is None else min(plan.num_positions, known)
    scalars = (base, num_positions, splits, *numbers, scale_log2)
    assert plan.kernel is not None
    plan.kernel.launch(inputs, plan, scalars, q.device, transient)  # type: ignore[arg-type]
    return out, lse


def row_splits(plan: PositionPlan[Any], q: Tensor, k: Tensor) -> int:
    """Number of splits per row where a CTA computes a tile of queries of a head."""
    (b, s, h, _), (tile_m, tile_n), slots = q.shape, plan.config.tile, plan.num_ctas
    tiles = min(plan.longest, -(-k.shape[1] // tile_n))
    return num_splits(b * h * -(-s // tile_m), tiles, slots, slots, 2.5)


@functools.lru_cache(maxsize=4096)
def num_splits(rows: int, steps: int, slots: int, saturating: int, overhead: float) -> int:
    """The number of parts of each of `rows` rows of `steps` steps that end first.

    `slots` CTAs run together, each at full speed where they are at most `saturating`. They run in
    rounds, each as long as a part and the overhead of an item; then comes the combination. The
    constants are in steps, from times of 1 to 66 splits on an H200.

    >>> num_splits(8, 1024, 264, 132, 1.5), num_splits(256, 64, 264, 132, 1.5)
    (16, 1)
    >>> num_splits(8, 66, 396, 176, 1.5)
    22
    """
    combination, by_part, lateness = 2.0, 0.12, 0.01
    best, least = 1, math.inf
    fitting = [i * n // max(rows, 1) for i in range(1, 9) for n in (slots, saturating)]
    fitting += [-(-steps // part) for part in range(1, 9)]  # short rows: all parts equally long
    for n in sorted({1, *(min(steps, n) for n in fitting)} - {0}):
        part = -(-steps // n)
        rounds, rest = divmod(rows * n, slots)
        slowed = rounds * slots / saturating + (max(1.0, rest / saturating) if rest else 0.0)
        cost = slowed * (part + overhead) + lateness * part
        cost += combination + by_part * n if n > 1 else 0.0
        best, least = (n, cost) if cost < least else (best, least)
    return best


def lists_of(
    plan: PositionPlan[Any], offsets: Offsets, q: Tensor, k: Tensor
) -> tuple[BackwardLists, Any]:
    """The tiles of the backward pass of a call, and the plan with them, for `Kernel.launch`."""
    shift = offsets.q_offset - offsets.kv_starts + offsets.q_base
    lists = backward_lists(plan, shift, q.shape[1], k.shape[1], k.shape[2])
    return lists, Listed(plan, (lists.work, lists.tiles, plan.bits), (lists.counts,))


@dataclass(eq=False)
class Listed:
    """What `Kernel.launch` reads of a plan, for the lists of one call."""

    plan: PositionPlan[Any]
    lists: tuple[Tensor, ...]
    combine: tuple[Tensor, ...]
    num_splits: int = 0

    @property
    def num_ctas(self) -> int:
        """Number of CTAs to launch."""
        return self.plan.num_ctas

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads the plan's arrays."""
        return self.plan.captured

    @captured.setter
    def captured(self, value: bool) -> None:
        self.plan.captured = value
