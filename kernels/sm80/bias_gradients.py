"""The gradients of biases on Ampere and later: plans, and how their kernel is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparse_flash.kernels import launch
from sparse_flash.kernels.attention import DTYPES, is_aligned, lengths_of, row_tiles_of
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.distance_table import DistanceBias, DistanceGrid, gradients_of
from sparse_flash.kernels.image_table import image_gradient
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plan import Plan
from sparse_flash.kernels.positions import (
    PositionKey,
    PositionPlan,
    lists_of,
    offsets_of,
    plan_of_key,
)
from sparse_flash.kernels.score_arguments import BiasSums, ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80.attention import slots_of
from sparse_flash.kernels.sm80.bias_config import BiasGradientsConfig, bias_gradients_config
from sparse_flash.kernels.sm80.compile import load_function
from sparse_flash.kernels.sm80.config import target_of
from sparse_flash.kernels.sm80.gradients import plan_with, terms_of
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

_FIXED_BITS = 61  # of the sums in int64


class BiasGradients(NamedTuple):
    """Gradients of biases; None where not asked for."""

    distance: DistanceBias
    image: Tensor | None


class BackwardInputs(NamedTuple):
    """Tensors of a backward pass, as of `gradients.backward`."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def bias_plan(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool, flags: ScoreFlags
) -> Plan[BiasGradientsConfig]:
    """The plan of the gradients of biases; arguments are those of `gradients.backward_plan`."""
    facts = DeviceFacts.of(layout.device)
    given = (DTYPES[q.dtype], q.shape[3], target_of(facts), deterministic, flags)
    return plan_with(bias_gradients_config(*given), layout, q, k, facts)  # type: ignore[return-value]


def bias_plan_at(
    layout: BlockLayout, q: Tensor, k: Tensor, deterministic: bool, flags: ScoreFlags
) -> PositionPlan[Any]:
    """As `bias_plan`, for queries at positions."""
    facts, (b, _, h, d) = DeviceFacts.of(layout.device), q.shape
    given = (DTYPES[q.dtype], d, target_of(facts), deterministic, flags)
    config: Any = bias_gradients_config(*given, offsets=True)
    slots = slots_of(facts, config.ctas_per_sm)
    return plan_of_key(layout, PositionKey(config, b, h, k.shape[2], slots, transposed=True))


def bias_gradients(
    inputs: BackwardInputs,
    plan: Plan[BiasGradientsConfig],
    kv_lens: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments,
    *,
    transient: bool = False,
) -> BiasGradients:
    """The gradients of the terms' biases, on torch's current stream.

    Args:
        inputs: Tensors of the backward pass.
        plan: Of `bias_plan`.
        kv_lens: Number of valid keys per batch entry.
        softmax_scale: Factor of the logits, other than 0.
        terms: Score terms, without ALiBi that is not a bias.
        transient: As in `Kernel.launch`.
    """
    lens = lengths_of(plan, kv_lens, inputs.k)
    lengths = (inputs.q.shape[1], inputs.k.shape[1])
    keys = (torch.zeros_like(lens), lens)
    return _launch(plan, plan, inputs, lengths, (lens,), keys, softmax_scale, terms, transient)


def bias_gradients_at(
    inputs: BackwardInputs,
    plan: PositionPlan[Any],
    kv_lens: Tensor | None,
    q_offset: Tensor | int | None,
    kv_starts: Tensor | None,
    softmax_scale: float,
    terms: ScoreArguments,
    *,
    transient: bool = False,
) -> BiasGradients:
    """As `bias_gradients`, for queries at positions."""
    q, k = inputs.q, inputs.k
    if not q.numel() or not k.numel():
        return _zeros(terms)
    offsets = offsets_of(plan, kv_lens, q_offset, kv_starts)
    lists, listed = lists_of(plan, offsets, q, k)
    shift = offsets.q_offset - offsets.kv_starts + offsets.q_base
    rows = (offsets.kv_lens, lists.q_pad, offsets.kv_starts, shift - lists.q_pad)
    lengths = (plan.num_positions, k.shape[1])
    keys = (offsets.kv_starts, offsets.kv_lens)
    return _launch(plan, listed, inputs, lengths, rows, keys, softmax_scale, terms, transient)


def _zeros(terms: ScoreArguments) -> BiasGradients:
    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros_like(x)

    distance = DistanceBias(None, None) if terms.bias is None else terms.bias
    image = None if terms.image is None else terms.image.table
    return BiasGradients(DistanceBias(*map(zeros, distance)), zeros(image))


def _launch(
    plan: Any,
    listed: Any,
    inputs: BackwardInputs,
    lengths: tuple[int, int],
    rows: tuple[Tensor, ...],
    keys: tuple[Tensor, Tensor],
    softmax_scale: float,
    terms: ScoreArguments,
    transient: bool,
) -> BiasGradients:
    """Launch a plan's kernel on the lists of a call.

    lengths: Numbers of query and key positions. rows: Lengths of the keys, and where rows lie.
    keys: First valid key, and end of the valid keys, of each batch entry.
    """
    dout, dlse, q, k, v, out, lse = inputs
    config, (b, _, h, _) = plan.config, q.shape
    grid = DistanceGrid.of(lengths[::-1], config.tile, transposed=True)
    factors = fixed_point_factors(inputs, keys, terms) if config.fixed_sums else None
    sums = _new_sums(terms, grid, q, factors)
    of_kernel = terms_of(terms, lengths, config.tile, sums)
    assert of_kernel is not None
    of_scores, scale_log2 = of_kernel(softmax_scale)
    num_rows = row_tiles_of(config, q) * config.tile_m
    stats = torch.empty((b, h, 2, num_rows), dtype=torch.float32, device=q.device)
    dout = dout if is_aligned(dout) else dout.contiguous()
    of_lse = lse if dlse is None else dlse.contiguous()
    tensors: Any = (q, k, v, out, dout, lse, of_lse, stats, rows[0], of_scores, *rows[1:])
    scalars = (0 if dlse is None else 1, scale_log2)
    kernel = plan.kernel or bind(plan)
    kernel.launch(tensors, listed, scalars, q.device, transient)
    return _results(terms, grid, sums)


def _new_sums(
    terms: ScoreArguments, grid: DistanceGrid, q: Tensor, factors: Tensor | None
) -> BiasSums:
    """Zeros for the gradients that are asked for."""
    dtype = torch.float32 if factors is None else torch.int64
    distance = image = None
    if terms.graded:
        distance = torch.zeros((q.shape[2], grid.length), dtype=dtype, device=q.device)
    if terms.image_graded:
        assert terms.image is not None
        image = torch.zeros((q.shape[2], terms.image.length), dtype=dtype, device=q.device)
    return BiasSums(distance, image, factors)


def fixed_point_factors(
    inputs: BackwardInputs, keys: tuple[Tensor, Tensor], terms: ScoreArguments
) -> Tensor:
    """Powers of two of each head, by which no sum of dS reaches 2^62; float32 (h,).

    Since P sums to 1, the sum of |dS| over the keys of a query is at most
    2 |dO| max |V| + |dlse|, and dropout scales dP. NaN where a query of the head is not finite:
    integers have no NaN.
    """
    first, end = keys
    index = torch.arange(inputs.v.shape[1], device=inputs.v.device)
    valid = (index >= first[:, None]) & (index < end[:, None])
    values = torch.linalg.vector_norm(inputs.v, dim=3, dtype=torch.float32)  # (b, s_kv, h_kv)
    values = values.nan_to_num(0.0, 0.0).where(valid[..., None], 0).amax((0, 1))
    rows, poison = (
        torch.linalg.vector_norm(x, dim=3, dtype=torch.float32).sum((0, 1))
        for x in (inputs.dout, inputs.out)
    )
    bound = 2 * terms.keep_scale * rows * values.repeat_interleave(len(rows) // len(values))
    bound = bound + 0 * poison
    if inputs.dlse is not None:
        bound = bound + inputs.dlse.abs().sum((0, 2))
    _, exponent = torch.frexp(bound)
    factors = torch.ldexp(torch.ones_like(bound), (_FIXED_BITS - exponent).clamp(-126, 126))
    return factors.where(bound.isfinite(), torch.nan)


def _results(terms: ScoreArguments, grid: DistanceGrid, sums: BiasSums) -> BiasGradients:
    """The gradients of slopes and tables, from the sums."""

    def found(x: Tensor) -> Tensor:
        return x if sums.factors is None else x.double() / sums.factors.double()[:, None]

    distance, image = DistanceBias(None, None), None
    if sums.distance is not None:
        assert terms.bias is not None
        distance = gradients_of(terms.bias, found(sums.distance), grid)
        distance = DistanceBias(*(x if x is None else x.float() for x in distance))
    if sums.image is not None:
        assert terms.image is not None
        image = image_gradient(terms.image, found(sums.image)).float()
    return BiasGradients(distance, image)


_kernels: dict[Any, Kernel] = {}  # by config


def bind(plan: Plan[BiasGradientsConfig] | PositionPlan[Any]) -> Kernel:
    """Load or compile the kernel of a plan's config, and keep it with the plan."""
    return launch.bind(plan, _kernels, _make)


def _make(config: BiasGradientsConfig) -> Kernel:
    return Kernel(load_function(config), config.split_shapes)
