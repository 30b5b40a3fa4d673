"""Attention on Ampere and later: which calls the kernels take, their plans, and the launches."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from sparse_flash.kernels import attention as shared
from sparse_flash.kernels import launch
from sparse_flash.kernels.attention import DTYPES, TermsOfCall
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.distance_table import DistanceGrid
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.score_arguments import NO_FLAGS, ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80.compile import load_function
from sparse_flash.kernels.sm80.config import ForwardConfig, shared_memory_of, target_of
from sparse_flash.kernels.sm80.costs import COSTS
from sparse_flash.kernels.sm80.scored_config import scored_forward_configs
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the way out; None where they can."""
    gpu = "a GPU of compute capability 8.0 (Ampere) or later"
    return shared.unsupported_reason(q, k, v, gpu, _unsupported_gpu)


def _unsupported_gpu(arch: str, found: str) -> str | None:
    if 8 <= int(arch[3:-1]) <= 12:
        return None
    return f"it needs compute capability 8.0 (Ampere) to 12.x, {found}: use impl='reference'"


@functools.cache
def forward_planner(
    dtype: torch.dtype,
    head_dim: int,
    target: str,
    shared_memory: int,
    flags: ScoreFlags = NO_FLAGS,
) -> Planner[ForwardConfig]:
    """The planner of the forward; K and V in 16 bits should stay in the L2 cache."""
    configs = scored_forward_configs(DTYPES[dtype], head_dim, target, shared_memory, flags)
    return Planner(configs, COSTS[target].forward, 4 * configs[0].head_dim)


def slots_of(facts: DeviceFacts, ctas_per_sm: int) -> DeviceFacts:
    """The GPU as schedules see it: a multiprocessor for each CTA that runs at a time."""
    return replace(facts, num_sms=facts.num_sms * ctas_per_sm)


def forward_plan(
    layout: BlockLayout, q: Tensor, k: Tensor, flags: ScoreFlags = NO_FLAGS
) -> Plan[ForwardConfig]:
    """The plan of a layout for queries `(b, q_len, h, d)` and keys `(b, kv_len, h_kv, d)`.

    Only shapes and dtype of the tensors are read; d is the larger head_dim of queries and values.
    """
    b, _, h, d = q.shape
    facts = DeviceFacts.of(layout.device)
    planner = forward_planner(q.dtype, d, target_of(facts), shared_memory_of(facts), flags)
    slots = slots_of(facts, planner.configs[0].ctas_per_sm)
    return plan_of(layout, PlanKey(planner, b, h, k.shape[2], slots))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan[ForwardConfig],
    kv_lens: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments | None = None,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention on torch's current stream: (out, lse). See `kernels.attention.forward`."""
    if plan.kernel is None:
        bind(plan)
    of_kernel = terms_of(terms, (q.shape[1], k.shape[1]), plan.config.tile)
    return shared.forward(q, k, v, plan, kv_lens, softmax_scale, of_kernel, transient=transient)


def terms_of(
    terms: ScoreArguments | None, lengths: tuple[int, int], tile: tuple[int, int]
) -> TermsOfCall | None:
    """The terms of a forward kernel, for numbers of query and key positions."""
    if terms is None:
        return None
    grid = DistanceGrid.of(lengths, tile, transposed=False)
    return functools.partial(terms.for_kernel, grid=grid)


_kernels: dict[Any, Kernel] = {}  # by config


def bind(plan: Plan[ForwardConfig]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: ForwardConfig) -> Kernel:
    return Kernel(load_function(config), config.split_shapes)
