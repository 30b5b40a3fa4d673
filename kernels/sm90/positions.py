"""Attention of queries at positions on Hopper: plans, and how their kernels are launched.

Query i of batch entry b has position p = i + q_offset[b] - kv_starts[b], and key j position
r = j - kv_starts[b]. Attention is allowed where p >= 0, kv_starts[b] <= j < kv_lens[b] and
mask(p, r). The layout is one of positions: q_len above the largest p, kv_len at least that of the
keys. A query at a position that the layout does not have gets NaN, and so does every query of an
entry with a negative kv_starts: offsets lie on the device and cannot be checked on the host.

Nothing is built from step to step: a plan holds the layout's rows and tiles, and the kernels find
theirs by the offsets. Only the backward pass lists its tiles anew, on the device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.schedule import stack_heads
from sparse_flash.kernels.sm90.attention import DTYPES, is_aligned
from sparse_flash.kernels.sm90.config import BackwardConfig, DqConfig, ForwardConfig
from sparse_flash.kernels.sm90.position_compile import load_position_function
from sparse_flash.kernels.sm90.position_config import (
    DecodeConfig,
    PositionConfig,
    backward_at_config,
    decode_config,
    dq_at_config,
    forward_at_config,
)
from sparse_flash.kernels.sm90.position_lists import backward_lists
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.retile import retile
from torch import Tensor
from torch.nn.functional import pad

Config = TypeVar("Config", bound=PositionConfig)
ARRAYS = ("rows", "pattern_map", "tiles", "bits", "zeros", "unlimited")
_LOG2_E = math.log2(math.e)
_MAX_INT32 = 2**31 - 1
_SPLIT_BYTES = 1 << 28  # the most memory of the parts of split rows
_SATURATING_BYTES = 43 << 10  # loads in flight per SM that use all of an H200's bandwidth
_ROWS_OF_A_TILE = 64  # heads that a CTA of the decoding kernel takes
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
    combine: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.lists = (self.rows, self.pattern_map, self.tiles, self.bits)

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

    def follow(self, layout: BlockLayout) -> Callable[[], None]:
        """The step that makes this the plan of another layout, in place; nothing changes before.

        Raises:
            ValueError: The other layout needs more of something than this plan's arrays have.
        """
        assert self.rebuild is not None
        new = self.rebuild(layout)
        for name in ("rows", "pattern_map", "tiles", "bits"):
            given, capacity = len(getattr(new, name)), len(getattr(self, name))
            if given > capacity and not (name == "bits" and layout.num_bit_tiles <= capacity):
                raise ValueError(
                    f"no space for {given} entries of `{name}`: there were {capacity}; begin with "
                    "the layout that needs most"
                )
        return functools.partial(self._take, new)

    def _take(self, new: PositionPlan[Config]) -> None:
        for name in ("rows", "pattern_map", "tiles", "bits"):
            target, source = getattr(self, name), getattr(new, name)
            size = min(len(target), len(source))
            target[:size] = source[:size]
        self.longest = new.longest


class PositionBackwardPlans(NamedTuple):
    """Plans of the kernels that compute the gradients.

    dkdv: Of dK and dV; of dQ too where its config says so (`config.dq`).
    dq: Of dQ where a kernel of its own computes it, else None.
    """

    dkdv: PositionPlan[BackwardConfig]
    dq: PositionPlan[DqConfig] | None = None


@dataclass(frozen=True, slots=True)
class PositionKey:
    """Key of a plan besides its layout."""

    config: PositionConfig
    batch: int
    heads: int
    kv_heads: int
    facts: DeviceFacts
    transposed: bool = False  # compute by key blocks; backward configs of Hopper always do


def forward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor
) -> PositionPlan[ForwardConfig] | PositionPlan[DecodeConfig]:
    """The plan of a layout of positions for queries `(b, s, h, d)` and keys `(b, s_kv, h_kv, d)`.

    One query per sequence takes the decoding kernel. Only shapes and dtype of the tensors are
    read; those of k but for its heads do not matter, nor does the number of queries if above 1.
    """
    dtype, head_dim = DTYPES[q.dtype], q.shape[3]
    if q.shape[1] == 1:
        return _plan_of(layout, decode_config(dtype, head_dim), q, k)
    return _plan_of(layout, forward_at_config(dtype, head_dim), q, k)


def backward_plans_at(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool = False
) -> PositionBackwardPlans:
    """The plans of the gradients, for the tensors of `forward_plan_at`."""
    dtype, head_dim = DTYPES[q.dtype], q.shape[3]
    plan = _plan_of(layout, backward_at_config(dtype, head_dim, deterministic), q, k)
    if plan.config.dq:
        return PositionBackwardPlans(plan)
    return PositionBackwardPlans(plan, _plan_of(layout, dq_at_config(dtype, head_dim), q, k))


def _plan_of(layout: BlockLayout, config: Config, q: Tensor, k: Tensor) -> PositionPlan[Config]:
    facts = DeviceFacts.of(layout.device)
    key = PositionKey(config, q.shape[0], q.shape[2], k.shape[2], facts)
    return cast("PositionPlan[Config]", plan_of_key(layout, key))


def plan_of_key(layout: BlockLayout, key: PositionKey) -> PositionPlan[PositionConfig]:
    """The plan of a layout, from `layout.derived` or built and kept there. Thread safe."""
    plan = layout.derived.get(key)
    if plan is None:
        with _lock:
            plan = layout.derived.get(key)
            if plan is None:
                plan = layout.derived[key] = build_plan(layout, key)
    return cast("PositionPlan[PositionConfig]", plan)


def build_plan(layout: BlockLayout, key: PositionKey) -> PositionPlan[PositionConfig]:
    """The plan of a layout of any granularity."""
    config = key.config
    with plain_torch():  # the plan outlives the modes and transforms of the call that asks for it
        if key.transposed or isinstance(config, BackwardConfig):
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
    plan: PositionPlan[ForwardConfig] | PositionPlan[DecodeConfig],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at positions, on torch's current stream.

    Args:
        q: Queries `(b, s, h, d)`.
        k: Keys `(b, s_kv, h_kv, d)`; s_kv is at most the layout's kv_len.
        v: Values, shaped as k.
        plan: Of `forward_plan_at`.
        kv_lens: End of the valid keys of each batch entry, int32 (b,). None: all.
        q_offset: Index, among the keys, of the first query: a number, or int32 (b,). None: 0.
        kv_starts: First valid key of each batch entry, from which positions count, int32 (b,).
            None: 0.
        softmax_scale: Factor of the logits, of any sign.
        transient: As in `Kernel.launch`.

    Returns:
        out `(b, s, h, d)` in q's dtype, and lse `(b, h, s)` in float32. NaN for queries at
        positions that the layout does not have.
    """
    b, s, h, _ = q.shape
    if softmax_scale <= 0:  # the kernel takes maxima before it scales
        q = -q if softmax_scale < 0 else torch.zeros_like(q)
        softmax_scale = -softmax_scale or 1.0
    config = plan.config
    decoding = isinstance(config, DecodeConfig)
    splits = splits_of(plan, b, s, h, k.shape[1], k.shape[2])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    if not out.numel() or not k.shape[1]:
        return out.zero_(), lse.fill_(-torch.inf)
    used = splits if splits > 1 else 0
    parts = lse.new_empty((used, b, s, h, config.head_dim)), lse.new_empty((used, b, h, s))
    *arrays, base = offsets_of(plan, kv_lens, q_offset, kv_starts)
    inputs = (q, k, v, out, lse, *parts, *arrays)
    scalars: tuple[float, ...] = (base, plan.num_positions, splits)
    if decoding:
        scalars = (*scalars, pack_of(plan, h, k.shape[2]))
    kernel = plan.kernel or _bind(plan)
    scalars = (*scalars, softmax_scale * _LOG2_E)
    kernel.launch(inputs, plan, scalars, q.device, transient)  # type: ignore[arg-type]
    return out, lse


def pack_of(plan: PositionPlan[Any], heads: int, kv_heads: int) -> int:
    """Query heads of a CTA of the decoding kernel: those of a kv head, if they share a pattern.

    Above the rows of a tile it is their largest divisor that fits.
    """
    return _pack(heads // kv_heads if plan.pattern_map.shape[1] == 1 else 1)


@functools.lru_cache(maxsize=256)
def _pack(group: int) -> int:
    fitting = range(1, min(group, _ROWS_OF_A_TILE) + 1)
    return max(n for n in fitting if group % n == 0)


def splits_of(plan: PositionPlan[Any], b: int, s: int, h: int, s_kv: int, kv_heads: int) -> int:
    """Number of splits per row, from shapes and the longest row."""
    config, tile_n, sms = plan.config, plan.config.tile[1], plan.num_ctas
    tiles = min(plan.longest, -(-s_kv // tile_n))
    if isinstance(config, DecodeConfig):
        rows, slots = b * h // pack_of(plan, h, kv_heads), sms * config.ctas_per_sm
        saturating = max(sms, sms * _SATURATING_BYTES // config.bytes_in_flight)
        splits = num_splits(rows, tiles * config.steps, slots, saturating, 1.5)
    else:
        splits = num_splits(b * h * -(-s // config.tile[0]), tiles, sms, sms, 2.5)
    return max(1, min(splits, _SPLIT_BYTES // max(1, 4 * b * s * h * config.head_dim)))


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


def backward_at(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plans: PositionBackwardPlans,
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on torch's current stream: (dq, dk, dv), shaped as q, k and v, contiguous.

    Keys that no query sees, and those outside kv_starts and kv_lens, get zeros. Arguments are those
    of `attention.backward` and `forward_at`.
    """
    plan, device = plans.dkdv, q.device
    config, (b, s, h, _), (_, s_kv, h_kv, _) = plan.config, q.shape, k.shape
    dout = dout if is_aligned(dout) else dout.contiguous()
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lens, offset, starts, base = offsets_of(plan, kv_lens, q_offset, kv_starts)
    lists = backward_lists(plan, offset - starts + base, s, s_kv, h_kv)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    row_tiles = -(-s // config.tile_m) + 1
    chunks = 2 * row_tiles if config.dq else 0
    done = torch.empty((b, h, chunks), dtype=torch.int32, device=device)
    bounds = torch.zeros((2 * config.fixed_point, b, h_kv), dtype=torch.int32, device=device)
    dq_sum = lse.new_empty((b, h, chunks, config.dq_chunk))
    stats = lse.new_empty((b, h, 2, row_tiles * config.tile_m))
    given = lse if dlse is None else dlse.contiguous()
    scales = (softmax_scale, softmax_scale * _LOG2_E)
    tensors = (q, k, v, out, dout, lse, given, dq, dk, dv, done, bounds, dq_sum, stats)
    launched = Listed(plan, (lists.work, lists.tiles, plan.bits), (lists.counts,))
    scalars = (0 if dlse is None else 1, *scales)
    kernel = plan.kernel or _bind(plan)
    inputs: tuple[Tensor, ...] = (*tensors, lens, lists.q_pad, starts)
    kernel.launch(inputs, launched, scalars, device, transient)  # type: ignore[arg-type]
    if plans.dq is not None:
        numbers = (base, plans.dq.num_positions, *scales)
        kernel = plans.dq.kernel or _bind(plans.dq)
        inputs = (q, k, v, dout, dq, stats, lists.q_pad, lens, offset, starts)
        kernel.launch(inputs, plans.dq, numbers, device, transient)  # type: ignore[arg-type]
    return dq, dk, dv


@dataclass(eq=False)
class Listed:
    """What `Kernel.launch` reads of a plan, for the lists of one call."""

    plan: PositionPlan[BackwardConfig]
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


class UncountedKernel(Kernel):
    """A compiled kernel whose grid follows from its numbers: no counter, no split buffers."""

    def launch(self, inputs, plan, scalars, device, transient=False):  # type: ignore[no-untyped-def]
        """As `Kernel.launch`; keeps no memory in any case."""
        index = device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.launch(inputs, plan, scalars, device, transient)
        if torch._C._cuda_isCurrentStreamCapturing():
            self._check_loaded(device)
            plan.captured = True
        if index in self.loaded:
            return self.function(*inputs, *plan.lists, *scalars)
        with self._lock:
            self.function(*inputs, *plan.lists, *scalars)
            self.loaded.add(index)
        return None


_kernels: dict[PositionConfig, Kernel] = {}


def _bind(plan: PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    config = plan.config
    kernel = _kernels.get(config)
    if kernel is None:
        with _lock:  # plans with the same config share one kernel, and its counters
            kernel = _kernels.get(config)
            if kernel is None:
                function = load_position_function(config)
                if isinstance(config, DecodeConfig):
                    kernel = UncountedKernel(function, ())
                elif isinstance(config, ForwardConfig):
                    kernel = Kernel(function, ())
                else:
                    kernel = Kernel(function, config.split_shapes)
                _kernels[config] = kernel
    plan.kernel = kernel
    return kernel
