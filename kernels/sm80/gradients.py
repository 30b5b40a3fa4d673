"""The gradients on Ampere and later: their plans, and how the kernels are launched."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sparse_flash.kernels import attention, launch
from sparse_flash.kernels.attention import (
    DTYPES,
    GradientTensors,
    TermsOfCall,
    bounds_and_statistics,
    gradient_tensors,
    lengths_of,
    row_tiles_of,
)
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.distance_table import DistanceBias, DistanceGrid
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.positions import (
    PositionKey,
    PositionPlan,
    lists_of,
    offsets_of,
    plan_of_key,
)
from sparse_flash.kernels.score_arguments import (
    NO_FLAGS,
    NO_SUMS,
    BiasSums,
    Gradients,
    ScoreArguments,
    ScoreFlags,
    sink_gradients,
)
from sparse_flash.kernels.sm80.attention import forward_planner, slots_of
from sparse_flash.kernels.sm80.backward_config import BackwardConfig, backward_config
from sparse_flash.kernels.sm80.compile import load_function
from sparse_flash.kernels.sm80.config import shared_memory_of, target_of
from sparse_flash.kernels.sm80.costs import COSTS
from sparse_flash.kernels.sm80.scored_config import scored_backward_config
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

NO_BIAS = DistanceBias(None, None)


@functools.cache
def planner_of(config: BackwardConfig) -> Planner[BackwardConfig]:
    """The planner of a config; Q, dO and the sums of dQ should stay in the L2 cache."""
    costs = COSTS[config.arch].backward
    return Planner((config,), costs, 8 * config.head_dim, transposed=True)


def backward_plan(
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    deterministic: bool = False,
    flags: ScoreFlags = NO_FLAGS,
) -> Plan[BackwardConfig]:
    """The plan of the gradients for queries `(b, q_len, h, d)` and keys `(b, kv_len, h_kv, d)`.

    Only shapes and dtype of the tensors are read.

    Args:
        layout: The layout.
        q: Queries; d is the larger head_dim of queries and values.
        k: Keys.
        deterministic: Bitwise repeatable: dQ is added up in fixed point.
        flags: Score terms.
    """
    facts = DeviceFacts.of(layout.device)
    limits = (target_of(facts), shared_memory_of(facts), deterministic)
    config = scored_backward_config(DTYPES[q.dtype], q.shape[3], *limits, flags)
    return plan_with(config, layout, q, k, facts)


def unsupported_blocks(
    layout: BlockLayout, q: Tensor, deterministic: bool, head_dim: int
) -> str | None:
    """Why the kernels cannot take a layout of data with such blocks; None where they can.

    head_dim: The larger one of queries and values.
    """
    facts, d = DeviceFacts.of(q.device), head_dim
    limits = (target_of(facts), shared_memory_of(facts))
    backward = planner_of(backward_config(DTYPES[q.dtype], d, *limits, deterministic))
    return attention.unsupported_blocks(layout, (forward_planner(q.dtype, d, *limits), backward))


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
    terms: ScoreArguments | None = None,
    *,
    transient: bool = False,
) -> Gradients:
    """The gradients on torch's current stream: dq, dk, dv, shaped as q, k and v, contiguous.

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
        softmax_scale: Factor of the logits; with terms other than 0.
        terms: Score terms. None: none.
        transient: As in `Kernel.launch`.
    """
    call = gradient_tensors(dout, dlse, q, k, v, out, lse, softmax_scale)
    rows = (lengths_of(plan, kv_lens, k),)
    of_kernel = terms_of(terms, (q.shape[1], k.shape[1]), plan.config.tile)
    space = _workspace(plan.config, q, k)
    return _launch(plan, plan, call, space, rows, terms, of_kernel, transient)


def backward_plan_at(
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    deterministic: bool = False,
    flags: ScoreFlags = NO_FLAGS,
) -> PositionPlan[Any]:
    """The plan of the gradients for queries at positions, for the tensors of `forward_plan_at`."""
    facts, (b, _, h, d) = DeviceFacts.of(layout.device), q.shape
    limits = (target_of(facts), shared_memory_of(facts), deterministic)
    config: Any = scored_backward_config(DTYPES[q.dtype], d, *limits, flags, offsets=True)
    slots = slots_of(facts, config.ctas_per_sm)
    key = PositionKey(config, b, h, k.shape[2], slots, transposed=True)
    return plan_of_key(layout, key)


def backward_at(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: PositionPlan[Any],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments | None = None,
    *,
    transient: bool = False,
) -> Gradients:
    """The gradients on torch's current stream: dq, dk, dv, shaped as q, k and v, contiguous.

    Keys that no query sees, and those outside kv_starts and kv_lens, get zeros. Arguments are those
    of `backward` and `positions.forward_at`.
    """
    if not q.numel() or not k.numel():
        sinks = None if terms is None or terms.sinks is None else torch.zeros_like(terms.sinks)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        return Gradients(dq, dk, dv, sinks, NO_BIAS)
    offsets = offsets_of(plan, kv_lens, q_offset, kv_starts)
    lists, listed = lists_of(plan, offsets, q, k)
    call = gradient_tensors(dout, dlse, q, k, v, out, lse, softmax_scale, zeros=True)
    rows: tuple[Tensor, ...] = (offsets.kv_lens, lists.q_pad, offsets.kv_starts)
    if plan.config.scored:
        shift = offsets.q_offset - offsets.kv_starts + offsets.q_base
        rows = (*rows, shift - lists.q_pad)
    of_kernel = terms_of(terms, (plan.num_positions, k.shape[1]), plan.config.tile)
    space = _workspace(plan.config, q, k)
    return _launch(plan, listed, call, space, rows, terms, of_kernel, transient)


def terms_of(
    terms: ScoreArguments | None,
    lengths: tuple[int, int],
    tile: tuple[int, int],
    sums: BiasSums = NO_SUMS,
) -> TermsOfCall | None:
    """The terms of a kernel by keys, for numbers of query and key positions.

    tile: Keys and queries of its tiles. sums: For the gradients of a bias' values.
    """
    if terms is None:
        return None
    grid = DistanceGrid.of(lengths[::-1], tile, transposed=True)
    return functools.partial(terms.for_kernel, backward=True, grid=grid, sums=sums)


def _launch(
    plan: Any,
    listed: Any,
    call: GradientTensors,
    space: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    terms: ScoreArguments | None,
    of_kernel: TermsOfCall | None,
    transient: bool,
) -> Gradients:
    """Launch a plan's kernel on the lists of a call.

    space: Of `_workspace`. rows: Lengths of the keys, and where rows lie. of_kernel: Of `terms_of`.
    """
    inputs: tuple[Any, ...] = (*call.inputs, *call.results, *space, rows[0])
    scalars, sinks = call.scalars, None
    if plan.config.scored:
        assert of_kernel is not None
        of_scores, scale_log2 = of_kernel(scalars[1])
        inputs, scalars = (*inputs, of_scores), (*scalars[:2], scale_log2)
    kernel = plan.kernel or bind(plan)
    kernel.launch((*inputs, *rows[1:]), listed, scalars, call.dq.device, transient)
    if terms is not None and terms.sinks is not None:
        sinks = sink_gradients(terms.sinks, space[-1])
    return Gradients(*call.results, sinks, NO_BIAS)


def _workspace(config: BackwardConfig, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """bounds, dq_sum and stats of `BackwardSm80.__call__`."""
    bounds, stats = bounds_and_statistics(config, q, k)
    dq_sum = stats.new_zeros((q.shape[0], q.shape[2], row_tiles_of(config, q), config.dq_chunk))
    return bounds, dq_sum, stats


_kernels: dict[Any, Kernel] = {}  # by config


def bind(plan: Plan[BackwardConfig] | PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: BackwardConfig) -> Kernel:
    return Kernel(load_function(config), config.split_shapes)
