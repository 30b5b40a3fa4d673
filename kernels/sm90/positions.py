"""Attention of queries at positions on Hopper: plans, and how their kernels are launched.

See `kernels.positions` for what positions are. One query per sequence has a kernel of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar, cast

import torch
from sparse_flash.kernels import launch
from sparse_flash.kernels import positions as shared
from sparse_flash.kernels.attention import DTYPES, TermsOfCall, gradient_tensors
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.positions import (
    PositionKey,
    PositionPlan,
    lists_of,
    num_splits,
    offsets_of,
    plan_of_key,
    row_splits,
)
from sparse_flash.kernels.sm90.attention import workspace
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import DqConfig
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.position_compile import load_position_function
from sparse_flash.kernels.sm90.position_config import (
    DecodeConfig,
    PositionConfig,
    backward_at_config,
    decode_config,
    dq_at_config,
    forward_at_config,
)
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

Config = TypeVar("Config", bound=PositionConfig)
_SATURATING_BYTES = 43 << 10  # loads in flight per SM that use all of an H200's bandwidth
_ROWS_OF_A_TILE = 64  # heads that a CTA of the decoding kernel takes


class PositionBackwardPlans(NamedTuple):
    """Plans of the kernels that compute the gradients.

    dkdv: Of dK and dV; of dQ too where its config says so (`config.dq`).
    dq: Of dQ where a kernel of its own computes it, else None.
    """

    dkdv: PositionPlan[BackwardConfig]
    dq: PositionPlan[DqConfig] | None = None


def forward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor
) -> PositionPlan[ForwardConfig] | PositionPlan[DecodeConfig]:
    """The plan of a layout of positions for queries `(b, s, h, d)` and keys `(b, s_kv, h_kv, d)`.

    One query per sequence takes the decoding kernel. Only shapes and dtype of the tensors are
    read; those of k but for its heads do not matter, nor does the number of queries if above 1.
    """
    dtype, head_dim = DTYPES[q.dtype], q.shape[3]
    if q.shape[1] == 1:
        return plan_of(layout, decode_config(dtype, head_dim), q, k)
    return plan_of(layout, forward_at_config(dtype, head_dim), q, k)


def backward_plans_at(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool = False
) -> PositionBackwardPlans:
    """The plans of the gradients, for the tensors of `forward_plan_at`."""
    dtype, head_dim = DTYPES[q.dtype], q.shape[3]
    plan = plan_of(layout, backward_at_config(dtype, head_dim, deterministic), q, k)
    if plan.config.dq:
        return PositionBackwardPlans(plan)
    return PositionBackwardPlans(plan, plan_of(layout, dq_at_config(dtype, head_dim), q, k))


def plan_of(layout: BlockLayout, config: Config, q: Tensor, k: Tensor) -> PositionPlan[Config]:
    """The plan of a layout of positions for a config."""
    facts = DeviceFacts.of(layout.device)
    key = key_of(config, q.shape[0], q.shape[2], k.shape[2], facts)
    return cast("PositionPlan[Config]", plan_of_key(layout, key))


def key_of(
    config: PositionConfig, batch: int, heads: int, kv_heads: int, facts: DeviceFacts
) -> PositionKey:
    """Key of a plan besides its layout: the backward kernel computes by key blocks."""
    transposed = isinstance(config, BackwardConfig)
    return PositionKey(config, batch, heads, kv_heads, facts, transposed)


def forward_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan[ForwardConfig] | PositionPlan[DecodeConfig],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    terms: TermsOfCall | None = None,
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
        terms: As of `kernels.positions.forward_at`.
        transient: As in `Kernel.launch`.

    Returns:
        out `(b, s, h, d)` in q's dtype, and lse `(b, h, s)` in float32. NaN for queries at
        positions that the layout does not have.
    """
    offsets = offsets_of(plan, kv_lens, q_offset, kv_starts)
    splits, numbers = splits_of(plan, q, k), tuple[int, ...]()
    if isinstance(plan.config, DecodeConfig):
        numbers = (pack_of(plan, q.shape[2], k.shape[2]),)
    if plan.kernel is None and q.numel() and k.shape[1]:
        _bind(plan)
    return shared.forward_at(
        q, k, v, plan, offsets, softmax_scale, splits, numbers, terms, transient=transient
    )


def pack_of(plan: PositionPlan[Any], heads: int, kv_heads: int) -> int:
    """Query heads of a CTA of the decoding kernel: those of a kv head, if they share a pattern.

    Above the rows of a tile it is their largest divisor that fits.
    """
    return _pack(heads // kv_heads if plan.pattern_map.shape[1] == 1 else 1)


@functools.lru_cache(maxsize=256)
def _pack(group: int) -> int:
    fitting = range(1, min(group, _ROWS_OF_A_TILE) + 1)
    return max(n for n in fitting if group % n == 0)


def splits_of(plan: PositionPlan[Any], q: Tensor, k: Tensor) -> int:
    """Number of splits per row, from shapes and the longest row."""
    config, sms = plan.config, plan.num_ctas
    if not isinstance(config, DecodeConfig):
        return row_splits(plan, q, k)
    (b, _, h, _), (_, s_kv, kv_heads, _) = q.shape, k.shape
    tiles = min(plan.longest, -(-s_kv // config.tile[1]))
    rows, slots = b * h // pack_of(plan, h, kv_heads), sms * config.ctas_per_sm
    saturating = max(sms, sms * _SATURATING_BYTES // config.bytes_in_flight)
    return num_splits(rows, tiles * config.steps, slots, saturating, 1.5)


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
    plan = plans.dkdv
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    offsets = offsets_of(plan, kv_lens, q_offset, kv_starts)
    lists, listed = lists_of(plan, offsets, q, k)
    call = gradient_tensors(dout, dlse, q, k, v, out, lse, softmax_scale, zeros=True)
    space, lens, starts = workspace(plan.config, q, k), offsets.kv_lens, offsets.kv_starts
    inputs = (*call.inputs, *call.results, *space, lens, lists.q_pad, starts)
    kernel = plan.kernel or _bind(plan)
    kernel.launch(inputs, listed, call.scalars, q.device, transient)
    if plans.dq is not None:
        numbers = (offsets.q_base, plans.dq.num_positions, *call.scalars[1:])
        kernel = plans.dq.kernel or _bind(plans.dq)
        rows = (lists.q_pad, lens, offsets.q_offset, starts)
        inputs = (q, k, v, call.inputs[4], call.dq, space[-1], *rows)
        kernel.launch(inputs, plans.dq, numbers, q.device, transient)  # type: ignore[arg-type]
    return call.results


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


_kernels: dict[Any, Kernel] = {}  # by config


def _bind(plan: PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: PositionConfig) -> Kernel:
    function = load_position_function(config)
    if isinstance(config, DecodeConfig):
        return UncountedKernel(function, ())
    return Kernel(function, () if isinstance(config, ForwardConfig) else config.split_shapes)
