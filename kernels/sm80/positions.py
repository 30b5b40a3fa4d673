"""Attention of queries at positions on Ampere and later: plans, and how the kernel is launched.

See `kernels.positions` for what positions are. One query per sequence takes the same kernel as many
do, with its keys split among CTAs.
"""

from __future__ import annotations

from typing import Any

from sparse_flash.kernels import launch
from sparse_flash.kernels import positions as shared
from sparse_flash.kernels.attention import DTYPES
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.positions import (
    PositionKey,
    PositionPlan,
    offsets_of,
    plan_of_key,
    row_splits,
)
from sparse_flash.kernels.score_arguments import NO_FLAGS, ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80.attention import slots_of, terms_of
from sparse_flash.kernels.sm80.compile import load_function
from sparse_flash.kernels.sm80.config import ForwardConfig, shared_memory_of, target_of
from sparse_flash.kernels.sm80.scored_config import scored_forward_at_config
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor


def forward_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor, flags: ScoreFlags = NO_FLAGS
) -> PositionPlan[Any]:
    """The plan of a layout of positions for queries `(b, s, h, d)` and keys `(b, s_kv, h_kv, d)`.

    Only shapes and dtype of the tensors are read; d is the larger head_dim of queries and values.
    """
    facts, (b, _, h, d) = DeviceFacts.of(layout.device), q.shape
    limits = (target_of(facts), shared_memory_of(facts))
    config: Any = scored_forward_at_config(DTYPES[q.dtype], d, *limits, flags)
    slots = slots_of(facts, config.ctas_per_sm)
    return plan_of_key(layout, PositionKey(config, b, h, k.shape[2], slots))


def forward_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan[Any],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments | None = None,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of queries at positions, on torch's current stream: (out, lse).

    Args:
        q: Queries `(b, s, h, d)`.
        k: Keys `(b, s_kv, h_kv, d)`; s_kv is at most the layout's kv_len.
        v: Values `(b, s_kv, h_kv, d_v)`.
        plan: Of `forward_plan_at`.
        kv_lens: End of the valid keys of each batch entry, int32 (b,). None: all.
        q_offset: Index, among the keys, of the first query: a number, or int32 (b,). None: 0.
        kv_starts: First valid key of each batch entry, from which positions count, int32 (b,).
            None: 0.
        softmax_scale: Factor of the logits, of any sign; with terms other than 0.
        terms: Score terms. None: none.
        transient: As in `Kernel.launch`.
    """
    if plan.kernel is None and q.numel() and k.shape[1]:
        bind(plan)
    offsets, splits = offsets_of(plan, kv_lens, q_offset, kv_starts), row_splits(plan, q, k)
    of_kernel = terms_of(terms, (plan.num_positions, k.shape[1]), plan.config.tile)
    given = (plan, offsets, softmax_scale, splits)
    known = None if terms is None or terms.image is None else terms.image.num_tokens
    return shared.forward_at(q, k, v, *given, terms=of_kernel, known=known, transient=transient)


_kernels: dict[Any, Kernel] = {}  # by config


def bind(plan: PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: ForwardConfig) -> Kernel:
    return Kernel(load_function(config), ())  # splits have arrays of their own
