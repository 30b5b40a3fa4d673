"""Attention on Hopper: which calls the kernels can take, their plans, and how they are launched."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, fitting, plan_of
from sparse_flash.kernels.schedule import CostModel
from sparse_flash.kernels.sm90.compile import load_function
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
    BackwardConfig,
    DqConfig,
    ForwardConfig,
    backward_configs,
    dq_config,
    forward_configs,
)
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

Config = TypeVar("Config", ForwardConfig, BackwardConfig, DqConfig)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HEAD_DIMS = range(16, 257, 8)
_LOG2_E = math.log2(math.e)


class BackwardPlans(NamedTuple):
    """Plans of the kernels that compute the gradients.

    dkdv: Of dK and dV; of dQ too where its config says so (`config.dq`).
    dq: Of dQ where a kernel of its own computes it, else None.
    """

    dkdv: Plan[BackwardConfig]
    dq: Plan[DqConfig] | None = None


def _planners(
    configs_of: Callable[[str, int], tuple[Config, ...]],
    costs: CostModel,
    element_bytes: int,
    transposed: bool = False,
) -> dict[tuple[torch.dtype, int], Planner[Config]]:
    """Planners by dtype and head_dim; head_dims with the same configs share one.

    element_bytes: Bytes that the L2 cache should hold for each column of head_dim: see Planner.
    """
    shared: dict[tuple[Config, ...], Planner[Config]] = {}
    planners = {}
    for dtype, name in DTYPES.items():
        for head_dim in HEAD_DIMS:
            configs = configs_of(name, head_dim)
            if configs not in shared:
                token_bytes = element_bytes * configs[0].head_dim
                shared[configs] = Planner(configs, costs, token_bytes, transposed)
            planners[dtype, head_dim] = shared[configs]
    return planners


# K and V in 16 bits; by key blocks Q and dO in 16 bits, and the sums of dQ in 32.
FORWARD = _planners(forward_configs, FORWARD_COSTS, 4)
DQ = _planners(lambda dtype, head_dim: (dq_config(dtype, head_dim),), FORWARD_COSTS, 4)
BACKWARD = _planners(backward_configs, BACKWARD_COSTS, 8, transposed=True)
DETERMINISTIC_BACKWARD = _planners(
    functools.partial(backward_configs, deterministic=True), BACKWARD_COSTS, 8, transposed=True
)


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the way out; None where they can."""
    if q.dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {q.dtype}: convert q, k and v"
    if not q.is_cuda:
        return f"it needs a Hopper GPU, but q is on {q.device}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be a multiple of 8 from 16 to 256, got {q.shape[3]}: pad q, k and v"
    arch = DeviceFacts.of(q.device).arch
    if arch != "sm_90":
        capability = f"{arch[3:-1]}.{arch[-1]}"
        name = torch.cuda.get_device_name(q.device)
        return f"it needs a Hopper GPU (compute capability 9.0), {name} has {capability}"
    reason = dsl_unsupported_reason()
    if reason:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(x):
            return (
                f"{name} has strides {x.stride()}: the last must be 1, and all others, as the "
                f"address, multiples of 16 bytes: use {name}.contiguous()"
            )
    return None


def unsupported_blocks(layout: BlockLayout, q: Tensor, deterministic: bool) -> str | None:
    """Why the kernels cannot take a layout of data with such blocks; None where they can."""
    backward = DETERMINISTIC_BACKWARD if deterministic else BACKWARD
    key = q.dtype, q.shape[3]
    planners: list[Planner[Any]] = [FORWARD[key], backward[key]]
    if not backward[key].configs[0].dq:
        planners.append(DQ[key])
    if all(fitting(layout, planner) for planner in planners):
        return None
    return (
        f"a layout of data on the device has blocks of {layout.block}, which do not fit its tiles: "
        "take powers of two, at least 16 queries and 32 keys, or pass layout.fixed()"
    )


def is_aligned(x: Tensor) -> bool:
    """Whether TMA can load it: the stride of a dimension of size 1 does not matter."""
    b, s, h, d = x.stride()
    # Dynamo cannot trace an offset; a compiled graph meets the kernel's own check of addresses.
    if d != 1 or (not torch.compiler.is_compiling() and x.storage_offset() % 8):
        return False
    return not ((b | s | h) % 8) or not any(
        stride % 8 and size > 1 for stride, size in zip((b, s, h), x.shape, strict=False)
    )


def forward_plan(layout: BlockLayout, q: Tensor, k: Tensor) -> Plan[ForwardConfig]:
    """The plan of a layout for queries `(b, q_len, h, d)` and keys `(b, kv_len, h_kv, d)`.

    Only shapes and dtype of the tensors are read.
    """
    b, _, h, d = q.shape
    facts = DeviceFacts.of(layout.device)
    return plan_of(layout, PlanKey(FORWARD[q.dtype, d], b, h, k.shape[2], facts))


def backward_plans(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool = False
) -> BackwardPlans:
    """The plans of the gradients, for the tensors of `forward_plan`.

    One kernel computes all gradients and adds up dQ in memory, in any order; with `deterministic`
    it does so in fixed point. Above head_dim 128 there is no space for that: two kernels compute
    dK and dV, and dQ, both bitwise repeatable.
    """
    b, _, h, d = q.shape
    sizes = (b, h, k.shape[2], DeviceFacts.of(layout.device))
    planner = (DETERMINISTIC_BACKWARD if deterministic else BACKWARD)[q.dtype, d]
    dkdv: Plan[BackwardConfig] = plan_of(layout, PlanKey(planner, *sizes))
    if dkdv.config.dq:
        return BackwardPlans(dkdv)
    return BackwardPlans(dkdv, plan_of(layout, PlanKey(DQ[q.dtype, d], *sizes)))


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
    """Attention on torch's current stream: (out, lse).

    Args:
        q: Queries `(b, s, h, d)`, bfloat16 or float16, with strides as in `is_aligned`.
        k: Keys `(b, s_kv, h_kv, d)`.
        v: Values, shaped as the keys.
        plan: Of `forward_plan`.
        kv_lens: Number of valid keys per batch entry, int `(b,)`, on any device. None: all.
        softmax_scale: Factor of the logits, of any sign.
        transient: As in `Kernel.launch`.

    Returns:
        out `(b, s, h, d)` in q's dtype, and lse `(b, h, s)` in float32.
    """
    b, s, h, _ = q.shape
    device = q.device
    if softmax_scale <= 0:  # the kernel takes maxima before it scales
        q = -q if softmax_scale < 0 else torch.zeros_like(q)
        softmax_scale = -softmax_scale or 1.0
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    assert out.data_ptr(), "meta and fake tensors have no memory to launch on"
    lse = torch.empty(b, h, s, dtype=torch.float32, device=device)
    lens = plan.schedule.kv_lens if kv_lens is None else _clamped(kv_lens, k)
    inputs = (q, k, v, out, lse, lens)
    kernel = plan.kernel or bind(plan)
    kernel.launch(inputs, plan, (softmax_scale * _LOG2_E,), device, transient)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plans: BackwardPlans,
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
        plans: Of `backward_plans`.
        kv_lens: Number of valid keys per batch entry.
        softmax_scale: Factor of the logits.
        transient: As in `Kernel.launch`.
    """
    plan, device = plans.dkdv, q.device
    if not is_aligned(dout):
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    assert dq.data_ptr(), "meta and fake tensors have no memory to launch on"
    lens = plan.schedule.kv_lens if kv_lens is None else _clamped(kv_lens, k)
    done, bounds, dq_sum, stats = _workspace(plan.config, q, k)
    given = lse if dlse is None else dlse.contiguous()
    results = (dq, dk, dv, done, bounds, dq_sum, stats)
    scales = (softmax_scale, softmax_scale * _LOG2_E)
    outside = (q, k, v, out, dout, lse, given, *results, lens)
    scalars = (0 if dlse is None else 1, *scales)
    (plan.kernel or bind(plan)).launch(outside, plan, scalars, device, transient)
    if plans.dq is not None:
        kernel = plans.dq.kernel or bind(plans.dq)
        kernel.launch((q, k, v, dout, dq, stats, lens), plans.dq, scales, device, transient)
    return dq, dk, dv


def _workspace(config: BackwardConfig, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """done, bounds, dq_sum and stats of `BackwardSm90.__call__`; the first three are empty where
    the config needs none.
    """
    b, s, h, _ = q.shape
    device, float32, int32 = q.device, torch.float32, torch.int32
    tiles = -(-s // config.tile_m)
    chunks = 2 * tiles if config.dq else 0
    return (
        torch.empty((b, h, chunks), dtype=int32, device=device),
        torch.zeros((2 * config.fixed_point, b, k.shape[2]), dtype=int32, device=device),
        torch.empty((b, h, chunks, config.dq_chunk), dtype=float32, device=device),
        torch.empty((b, h, 2, tiles * config.tile_m), dtype=float32, device=device),
    )


def _clamped(kv_lens: Tensor, k: Tensor) -> Tensor:
    return kv_lens.to(k.device, torch.int32).clamp(0, k.shape[1])


_kernels: dict[Any, Kernel] = {}  # by config
_lock = threading.Lock()


def bind(plan: Plan[Config]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    config = plan.config
    kernel = _kernels.get(config)
    if kernel is None:
        with _lock:  # plans with the same config share one kernel, and its counters
            kernel = _kernels.get(config)
            if kernel is None:
                kernel = _kernels[config] = Kernel(load_function(config), config.split_shapes)
    plan.kernel = kernel
    return kernel
