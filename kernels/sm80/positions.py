"""Attention of queries at positions on Ampere and later: plans, and how the kernel is launched.

Positions, offsets and plans are those of the Hopper kernels (see `sm90.positions`). One query per
sequence takes the same kernel as many do, with its keys split among CTAs.
"""

from __future__ import annotations

import threading
from typing import Any

from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.sm80.attention import DTYPES, slots_of
from sparse_flash.kernels.sm80.compile import load_forward_at
from sparse_flash.kernels.sm80.config import forward_at_config, shared_memory_of, target_of
from sparse_flash.kernels.sm90 import positions as shared
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor


def forward_plan_at(layout: BlockLayout, q: Tensor, k: Tensor) -> shared.PositionPlan[Any]:
    """The plan of a layout of positions for queries `(b, s, h, d)` and keys `(b, s_kv, h_kv, d)`.

    Only shapes and dtype of the tensors are read.
    """
    facts, (b, _, h, d) = DeviceFacts.of(layout.device), q.shape
    limits = (target_of(facts), shared_memory_of(facts))
    config: Any = forward_at_config(DTYPES[q.dtype], d, *limits)
    slots = slots_of(facts, config.ctas_per_sm)
    return shared.plan_of_key(layout, shared.PositionKey(config, b, h, k.shape[2], slots))


def forward_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Any,
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the Hopper `forward_at`, with a plan of `forward_plan_at`."""
    if plan.kernel is None:
        bind(plan)
    offsets = (kv_lens, q_offset, kv_starts)
    return shared.forward_at(q, k, v, plan, *offsets, softmax_scale, transient=transient)


_kernels: dict[Any, Kernel] = {}  # by config
_lock = threading.Lock()


def bind(plan: Any) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    with _lock:  # plans with the same config share one kernel, and its counters
        kernel = _kernels.get(plan.config)
        if kernel is None:
            kernel = _kernels[plan.config] = Kernel(load_forward_at(plan.config), ())
    plan.kernel = kernel
    return kernel
