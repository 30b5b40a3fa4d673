"""Attention with score terms on Hopper: plans, and how its kernels are launched."""

from __future__ import annotations

import functools

import torch
from sparse_flash.kernels import attention as shared
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.distance_table import DistanceBias, DistanceGrid, gradients_of
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.positions import PositionPlan
from sparse_flash.kernels.score_arguments import (
    BiasSums,
    Gradients,
    ScoreArguments,
    ScoreFlags,
    sink_gradients,
)
from sparse_flash.kernels.sm90 import attention, positions
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.scored_config import (
    scored_backward_configs,
    scored_forward_at_config,
    scored_forward_configs,
)
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor


@functools.cache
def _forward_planner(configs: tuple[ForwardConfig, ...]) -> Planner[ForwardConfig]:
    return Planner(configs, FORWARD_COSTS, 4 * configs[0].head_dim)


@functools.cache
def _backward_planner(configs: tuple[BackwardConfig, ...]) -> Planner[BackwardConfig]:
    return Planner(configs, BACKWARD_COSTS, 8 * configs[0].head_dim, transposed=True)


def forward_plan(
    layout: BlockLayout, q: Tensor, k: Tensor, flags: ScoreFlags
) -> Plan[ForwardConfig]:
    """As `attention.forward_plan`, for score features."""
    configs = scored_forward_configs(shared.DTYPES[q.dtype], q.shape[3], flags)
    facts = DeviceFacts.of(layout.device)
    sizes = (q.shape[0], q.shape[2], k.shape[2])
    return plan_of(layout, PlanKey(_forward_planner(configs), *sizes, facts))


def backward_plans(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool, flags: ScoreFlags
) -> attention.BackwardPlans:
    """As `attention.backward_plans`, for score features."""
    if not any(flags.of_backward.values()):
        return attention.backward_plans(layout, q, k, deterministic)
    dtype = shared.DTYPES[q.dtype]
    configs = scored_backward_configs(dtype, q.shape[3], deterministic, flags)
    facts = DeviceFacts.of(layout.device)
    sizes = (q.shape[0], q.shape[2], k.shape[2])
    return attention.BackwardPlans(
        plan_of(layout, PlanKey(_backward_planner(configs), *sizes, facts))
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan[ForwardConfig],
    kv_lens: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `attention.forward`, with score terms; softmax_scale is not 0."""
    q, softmax_scale = shared.with_positive_scale(q, softmax_scale)
    b, s, h, _ = q.shape
    out = q.new_empty((b, s, h, v.shape[3]))
    assert out.data_ptr(), "meta and fake tensors have no memory to launch on"
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    grid = DistanceGrid.of((s, k.shape[1]), plan.config.tile, transposed=False)
    of_scores, scale_log2 = terms.for_kernel(softmax_scale, grid=grid)
    inputs = (q, k, v, out, lse, shared.lengths_of(plan, kv_lens, k), of_scores)
    kernel = plan.kernel or attention.bind(plan)
    kernel.launch(inputs, plan, (scale_log2,), q.device, transient)
    return out, lse


def forward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor, flags: ScoreFlags
) -> PositionPlan[ForwardConfig]:
    """As `positions.forward_plan_at`, for score features; one query takes no kernel of its own."""
    config = scored_forward_at_config(shared.DTYPES[q.dtype], q.shape[3], flags)
    return positions.plan_of(layout, config, q, k)


def forward_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan[ForwardConfig],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `positions.forward_at`, with score terms; softmax_scale is not 0."""
    given = (kv_lens, q_offset, kv_starts)
    lengths = (plan.num_positions, k.shape[1])
    grid = DistanceGrid.of(lengths, plan.config.tile, transposed=False)
    of_scores = functools.partial(terms.for_kernel, grid=grid)
    return positions.forward_at(
        q, k, v, plan, *given, softmax_scale, of_scores, transient=transient
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plans: attention.BackwardPlans,
    kv_lens: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments,
    *,
    transient: bool = False,
) -> Gradients:
    """As `attention.backward`, with score terms."""
    plan = plans.dkdv
    call = shared.gradient_tensors(dout, dlse, q, k, v, out, lse, softmax_scale)
    lens, space = shared.lengths_of(plan, kv_lens, k), attention.workspace(plan.config, q, k)
    scalars, stats = call.scalars, space[-1]
    inputs = (*call.inputs, *call.results, *space, lens)
    grid = DistanceGrid.of((k.shape[1], q.shape[1]), plan.config.tile, transposed=True)
    sums = None
    if plan.config.distance_grads:
        sums = torch.zeros((q.shape[2], grid.length), dtype=torch.float32, device=q.device)
    if plan.config.scored:
        of_kernel = functools.partial(terms.for_kernel, backward=True, grid=grid)
        of_scores, scale_log2 = of_kernel(softmax_scale, sums=BiasSums(sums))
        inputs, scalars = (*inputs, of_scores), (*call.scalars[:2], scale_log2)
    (plan.kernel or attention.bind(plan)).launch(inputs, plan, scalars, q.device, transient)
    if plans.dq is not None:
        inputs = (q, k, v, call.inputs[4], call.dq, stats, lens)
        kernel = plans.dq.kernel or attention.bind(plans.dq)
        kernel.launch(inputs, plans.dq, call.scalars[1:], q.device, transient)
    of_sinks = None if terms.sinks is None else sink_gradients(terms.sinks, stats)
    of_bias = DistanceBias(None, None)
    if terms.bias is not None and sums is not None:
        of_bias = gradients_of(terms.bias, sums, grid)
    return Gradients(*call.results, of_sinks, of_bias)
