"""The gradients on Ampere and later: their plans, and how the kernels are launched."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import replace
from typing import Any

import torch
from sparse_flash.kernels.compile import load
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.sm80.attention import DTYPES, slots_of
from sparse_flash.kernels.sm80.backward_compile import compile_backward
from sparse_flash.kernels.sm80.backward_config import (
    BACKWARD_COSTS,
    BackwardConfig,
    backward_config,
)
from sparse_flash.kernels.sm80.config import shared_memory_of, target_of
from sparse_flash.kernels.sm90 import positions
from sparse_flash.kernels.sm90.attention import is_aligned
from sparse_flash.kernels.sm90.position_lists import backward_lists
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

_LOG2_E = math.log2(math.e)


@functools.cache
def planner_of(config: BackwardConfig) -> Planner[BackwardConfig]:
    """The planner of a config; Q, dO and the sums of dQ should stay in the L2 cache."""
    return Planner((config,), BACKWARD_COSTS, 8 * config.head_dim, transposed=True)


def backward_plan(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool = False
) -> Plan[BackwardConfig]:
    """The plan of the gradients for queries `(b, q_len, h, d)` and keys `(b, kv_len, h_kv, d)`.

    Only shapes and dtype of the tensors are read.

    Args:
        layout: The layout.
        q: Queries.
        k: Keys.
        deterministic: Bitwise repeatable: dQ is added up in fixed point.
    """
    facts = DeviceFacts.of(layout.device)
    limits = (target_of(facts), shared_memory_of(facts))
    config = backward_config(DTYPES[q.dtype], q.shape[3], *limits, deterministic)
    return plan_with(config, layout, q, k, facts)


def plan_with(
    config: BackwardConfig, layout: BlockLayout, q: Tensor, k: Tensor, facts: DeviceFacts
) -> Plan[BackwardConfig]:
    """The plan of a layout with this config."""
    b, _, h, _ = q.shape
    slots = slots_of(facts, config.ctas_per_sm)
    return plan_of(layout, PlanKey(planner_of(config), b, h, k.shape[2], slots))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan[BackwardConfig],
    kv_lens: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on torch's current stream: (dq, dk, dv), shaped as q, k and v, contiguous.

    Args:
        dout: Gradient of out `(b, s, h, d)`, of any strides.
        dlse: Gradient of lse `(b, h, s)`, float32, of any strides. None: zeros.
        q: Queries; they, k, v, kv_lens and softmax_scale are those of `forward`.
        k: Keys.
        v: Values.
        out: Output of `forward`.
        lse: Output of `forward`.
        plan: Of `backward_plan`.
        kv_lens: Number of valid keys per batch entry.
        softmax_scale: Factor of the logits.
        transient: As in `Kernel.launch`.
    """
    if not is_aligned(dout):
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    assert dq.data_ptr(), "meta and fake tensors have no memory to launch on"
    lens = plan.schedule.kv_lens
    if kv_lens is not None:
        lens = kv_lens.to(q.device, torch.int32).clamp(0, k.shape[1])
    given = lse if dlse is None else dlse.contiguous()
    inputs = (q, k, v, out, dout, lse, given, dq, dk, dv, *_workspace(plan.config, q, k), lens)
    scalars = (0 if dlse is None else 1, softmax_scale, softmax_scale * _LOG2_E)
    (plan.kernel or bind(plan)).launch(inputs, plan, scalars, q.device, transient)
    return dq, dk, dv


def backward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool = False
) -> positions.PositionPlan[Any]:
    """The plan of the gradients for queries at positions, for the tensors of `forward_plan_at`."""
    facts, (b, _, h, d) = DeviceFacts.of(layout.device), q.shape
    limits = (target_of(facts), shared_memory_of(facts))
    config: Any = backward_config(DTYPES[q.dtype], d, *limits, deterministic)
    config = replace(config, offsets=True)
    slots = slots_of(facts, config.ctas_per_sm)
    key = positions.PositionKey(config, b, h, k.shape[2], slots, transposed=True)
    return positions.plan_of_key(layout, key)


def backward_at(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: positions.PositionPlan[Any],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on torch's current stream: (dq, dk, dv), shaped as q, k and v, contiguous.

    Keys that no query sees, and those outside kv_starts and kv_lens, get zeros. Arguments are those
    of `backward` and `sm90.positions.forward_at`.
    """
    dout = dout if is_aligned(dout) else dout.contiguous()
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    offsets = positions.offsets_of(plan, kv_lens, q_offset, kv_starts)
    shift = offsets.q_offset - offsets.kv_starts + offsets.q_base
    lists = backward_lists(plan, shift, q.shape[1], k.shape[1], k.shape[2])
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    given = lse if dlse is None else dlse.contiguous()
    inputs = (q, k, v, out, dout, lse, given, dq, dk, dv, *_workspace(plan.config, q, k))
    inputs = (*inputs, offsets.kv_lens, lists.q_pad, offsets.kv_starts)
    scalars = (0 if dlse is None else 1, softmax_scale, softmax_scale * _LOG2_E)
    listed: Any = positions.Listed(plan, (lists.work, lists.tiles, plan.bits), (lists.counts,))
    (plan.kernel or bind(plan)).launch(inputs, listed, scalars, q.device, transient)
    return dq, dk, dv


def _workspace(config: BackwardConfig, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """bounds, dq_sum and stats of `BackwardSm80.__call__`."""
    b, s, h, _ = q.shape
    tiles = -(-s // config.tile_m) + config.offsets  # at positions a tile may begin before query 0
    return (
        torch.zeros((2 * config.fixed_point, b, k.shape[2]), dtype=torch.int32, device=q.device),
        torch.zeros((b, h, tiles, config.dq_chunk), dtype=torch.float32, device=q.device),
        torch.empty((b, h, 2, tiles * config.tile_m), dtype=torch.float32, device=q.device),
    )


_kernels: dict[Any, Kernel] = {}  # by config
_lock = threading.Lock()


def bind(plan: Plan[BackwardConfig] | positions.PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    config = plan.config
    with _lock:  # plans with the same config share one kernel, and its counters
        kernel = _kernels.get(config)
        if kernel is None:
            kernel = Kernel(load(config, compile_backward), config.split_shapes)
            _kernels[config] = kernel
    plan.kernel = kernel
    return kernel
