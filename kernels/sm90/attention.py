"""Attention on Hopper: which calls the kernels can take, their plans, and how they are launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from sparse_flash.kernels import attention as shared
from sparse_flash.kernels import launch
from sparse_flash.kernels.attention import DTYPES, HEAD_DIMS
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.schedule import CostModel
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.compile import load_function
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
    DqConfig,
    backward_configs,
    dq_config,
    forward_configs,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

Config = TypeVar("Config", ForwardConfig, BackwardConfig, DqConfig)


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
    return shared.unsupported_reason(q, k, v, "a Hopper GPU", _unsupported_gpu)


def _unsupported_gpu(arch: str, found: str) -> str | None:
    if arch == "sm_90":
        return None
    return f"it needs a Hopper GPU (compute capability 9.0), {found}"


def unsupported_blocks(layout: BlockLayout, q: Tensor, deterministic: bool) -> str | None:
    """Why the kernels cannot take a layout of data with such blocks; None where they can."""
    planners = [FORWARD[q.dtype, q.shape[3]], *_gradient_planners(q, deterministic)]
    return shared.unsupported_blocks(layout, planners)


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
    it does so in fixed point. Above head_dim 128 `deterministic` takes two kernels instead: one
    computes dK and dV, one dQ, both bitwise repeatable.
    """
    sizes = (q.shape[0], q.shape[2], k.shape[2], DeviceFacts.of(layout.device))
    planners = _gradient_planners(q, deterministic)
    return BackwardPlans(*(plan_of(layout, PlanKey(planner, *sizes)) for planner in planners))


def _gradient_planners(q: Tensor, deterministic: bool) -> list[Planner[Any]]:
    """Planner of the kernel of all gradients, or those of dK and dV, and of dQ."""
    key = q.dtype, q.shape[3]
    backward = (DETERMINISTIC_BACKWARD if deterministic else BACKWARD)[key]
    return [backward] if backward.configs[0].dq else [backward, DQ[key]]


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
    """Attention on torch's current stream: (out, lse). See `kernels.attention.forward`."""
    if plan.kernel is None:
        bind(plan)
    return shared.forward(q, k, v, plan, kv_lens, softmax_scale, transient=transient)


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
    plan = plans.dkdv
    call = shared.gradient_tensors(dout, dlse, q, k, v, out, lse, softmax_scale)
    lens, space = shared.lengths_of(plan, kv_lens, k), workspace(plan.config, q, k)
    inputs = (*call.inputs, *call.results, *space, lens)
    (plan.kernel or bind(plan)).launch(inputs, plan, call.scalars, q.device, transient)
    if plans.dq is not None:
        dout, stats = call.inputs[4], space[-1]
        inputs = (q, k, v, dout, call.dq, stats, lens)
        kernel = plans.dq.kernel or bind(plans.dq)
        kernel.launch(inputs, plans.dq, call.scalars[1:], q.device, transient)
    return call.results


def workspace(config: BackwardConfig, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """done, bounds, dq_sum and stats of `BackwardSm90.__call__`; the first three are empty where
    the config needs none.
    """
    b, _, h, _ = q.shape
    chunks = 2 * shared.row_tiles_of(config, q) if config.dq else 0
    bounds, stats = shared.bounds_and_statistics(config, q, k)
    done = torch.empty((b, h, chunks), dtype=torch.int32, device=q.device)
    return done, bounds, stats.new_empty((b, h, chunks, config.dq_chunk)), stats


_kernels: dict[Any, Kernel] = {}  # by config


def bind(plan: Plan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: Any) -> Kernel:
    return Kernel(load_function(config), config.split_shapes)
