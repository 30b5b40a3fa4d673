"""Attention on Ampere and later: which calls the kernels take, their plans, and the launches."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.sm80.compile import load_forward
from sparse_flash.kernels.sm80.config import (
    FORWARD_COSTS,
    ForwardConfig,
    capability_of,
    forward_configs,
    shared_memory_of,
    target_of,
)
from sparse_flash.kernels.sm90 import attention as shared
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

DTYPES, HEAD_DIMS = shared.DTYPES, shared.HEAD_DIMS


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the way out; None where they can."""
    if q.dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {q.dtype}: convert q, k and v"
    if not q.is_cuda:
        return f"it needs a GPU of compute capability 8.0 (Ampere) or later, but q is on {q.device}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be a multiple of 8 from 16 to 256, got {q.shape[3]}: pad q, k and v"
    facts = DeviceFacts.of(q.device)
    major, minor = capability_of(facts)
    if major < 8 or major > 12:
        name = torch.cuda.get_device_name(q.device)
        return (
            f"it needs compute capability 8.0 (Ampere) to 12.x, {name} has {major}.{minor}: use "
            "impl='reference'"
        )
    reason = dsl_unsupported_reason()
    if reason:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not shared.is_aligned(x):
            return (
                f"{name} has strides {x.stride()}: the last must be 1, and all others, as the "
                f"address, multiples of 16 bytes: use {name}.contiguous()"
            )
    return None


@functools.cache
def forward_planner(
    dtype: torch.dtype, head_dim: int, target: str, shared_memory: int
) -> Planner[ForwardConfig]:
    """The planner of the forward; K and V in 16 bits should stay in the L2 cache."""
    configs = forward_configs(DTYPES[dtype], head_dim, target, shared_memory)
    return Planner(configs, FORWARD_COSTS, 4 * configs[0].head_dim)


def slots_of(facts: DeviceFacts, ctas_per_sm: int) -> DeviceFacts:
    """The GPU as schedules see it: a multiprocessor for each CTA that runs at a time."""
    return replace(facts, num_sms=facts.num_sms * ctas_per_sm)


def forward_plan(layout: BlockLayout, q: Tensor, k: Tensor) -> Plan[ForwardConfig]:
    """The plan of a layout for queries `(b, q_len, h, d)` and keys `(b, kv_len, h_kv, d)`.

    Only shapes and dtype of the tensors are read.
    """
    b, _, h, d = q.shape
    facts = DeviceFacts.of(layout.device)
    planner = forward_planner(q.dtype, d, target_of(facts), shared_memory_of(facts))
    slots = slots_of(facts, planner.configs[0].ctas_per_sm)
    return plan_of(layout, PlanKey(planner, b, h, k.shape[2], slots))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan[ForwardConfig],
    kv_lens: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention on torch's current stream: (out, lse). Arguments are those of the Hopper forward.

    out is `(b, s, h, d)` in q's dtype, lse `(b, h, s)` in float32.
    """
    if plan.kernel is None:
        bind(plan)
    return shared.forward(q, k, v, plan, kv_lens, softmax_scale, transient=transient)  # type: ignore[arg-type]


_kernels: dict[Any, Kernel] = {}  # by config
_lock = threading.Lock()


def bind(plan: Plan[ForwardConfig]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    config = plan.config
    with _lock:  # plans with the same config share one kernel, and its counters
        kernel = _kernels.get(config)
        if kernel is None:
            kernel = _kernels[config] = Kernel(load_forward(config), config.split_shapes)
    plan.kernel = kernel
    return kernel
