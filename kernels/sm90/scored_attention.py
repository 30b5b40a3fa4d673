"""Attention with softcap, ALiBi and sinks on Hopper: plans, and how its kernels are launched."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from sparse_flash.kernels import attention as shared
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.positions import PositionPlan
from sparse_flash.kernels.score_arguments import (
    Gradients,
    ScoreArguments,
    ScoreFlags,
    sink_gradients,
)
from sparse_flash.kernels.sm90 import attention, positions
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
    BackwardConfig,
    ForwardConfig,
    backward_configs,
    forward_configs,
)
from sparse_flash.kernels.sm90.position_config import forward_at_config
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

MOST_HEAD_DIM = 128  # of gradients with softcap or ALiBi


@functools.cache
def scored_forward_configs(
    dtype: str, head_dim: int, flags: ScoreFlags
) -> tuple[ForwardConfig, ...]:
    """The forward configs of a head_dim with these features."""
    return tuple(replace(c, **flags._asdict()) for c in forward_configs(dtype, head_dim))


@functools.cache
def scored_backward_configs(
    dtype: str, head_dim: int, deterministic: bool, flags: ScoreFlags
) -> tuple[BackwardConfig, ...]:
    """The backward configs of a head_dim with these features; sinks need no kernel of their own.

    The terms take the registers of K and V. With a softcap P' and P' times the derivative are there
    at a time: tiles of 128 queries, those of small head_dims, would spill.
    """
    if not (flags.softcap or flags.alibi):
        return backward_configs(dtype, head_dim, deterministic)
    if flags.softcap:
        head_dim = 128 if deterministic or head_dim > 96 else 96
    config = backward_configs(dtype, head_dim, deterministic)[0]
    return (
        replace(
            config,
            softcap=flags.softcap,
            alibi=flags.alibi,
            k_in_registers=0,
            v_in_registers=0,
            p_slices=4 if config.tile_m == 128 else config.p_slices,
        ),
    )


def checked_scored_configs() -> list[ForwardConfig | BackwardConfig]:
    """Configs whose compiled code tests look into."""
    everything = ScoreFlags(softcap=True, alibi=True, sinks=True)
    return [*scored_forward_configs("bfloat16", 64, everything)[:1]]


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
    if not (flags.softcap or flags.alibi):
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
    of_heads, numbers = terms.with_lse(softmax_scale, lse)
    inputs = (q, k, v, out, lse, shared.lengths_of(plan, kv_lens, k), *of_heads)
    kernel = plan.kernel or attention.bind(plan)
    kernel.launch(inputs, plan, numbers, q.device, transient)
    return out, lse


def forward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor, flags: ScoreFlags
) -> PositionPlan[ForwardConfig]:
    """As `positions.forward_plan_at`, for score features; one query takes no kernel of its own."""
    config = forward_at_config(shared.DTYPES[q.dtype], q.shape[3])
    return positions.plan_of(layout, replace(config, **flags._asdict()), q, k)


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
    of_scores = terms.with_lse
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
    of_heads: tuple[Tensor, ...] = ()
    if plan.config.scored:
        of_heads, numbers = terms.with_lse(softmax_scale, lse)
        scalars = (*call.scalars[:2], *numbers)
    inputs = (*call.inputs, *call.results, *space, lens, *of_heads)
    (plan.kernel or attention.bind(plan)).launch(inputs, plan, scalars, q.device, transient)
    if plans.dq is not None:
        inputs = (q, k, v, call.inputs[4], call.dq, stats, lens)
        kernel = plans.dq.kernel or attention.bind(plans.dq)
        kernel.launch(inputs, plans.dq, call.scalars[1:], q.device, transient)
    of_sinks = None if terms.sinks is None else sink_gradients(terms.sinks, stats)
    return Gradients(*call.results, of_sinks)
