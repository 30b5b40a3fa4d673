"""Gradients of slopes and tables by the kernel of `kernels.sm80.bias_gradients`, on any GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations.score_features import widest
from sparse_flash.kernels.distance_table import DistanceBias
from sparse_flash.kernels.score_arguments import ScoreArguments
from sparse_flash.kernels.sm80 import bias_gradients


def wants_biases(call: AttentionCall) -> bool:
    """Whether slopes or tables need gradients."""
    return call.needs_grad and call.terms is not None and any(call.terms.wants[:3])


def plan_of(call: AttentionCall, terms: ScoreArguments) -> Any:
    """The plan of the kernel of a call. terms: Of its forward pass."""
    at = call.q_offset is not None
    make: Any = bias_gradients.bias_plan_at if at else bias_gradients.bias_plan
    flags = _graded(call, terms).flags
    return make(call.layout, widest(call), call.k, call.deterministic, flags)


def gradients_of(
    call: AttentionCall,
    plan: Any,
    terms: ScoreArguments,
    outputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slopes, table and image table; None where the kernel computes none.

    plan: Of `plan_of`. terms: Of the forward pass. outputs: Output and logsumexp. gradients: Of
    these.
    """
    inputs = bias_gradients.BackwardInputs(*gradients, call.q, call.k, call.v, *outputs)
    run: Any = bias_gradients.bias_gradients
    places: tuple[Any, ...] = (call.kv_lens,)
    if call.q_offset is not None:
        run, places = bias_gradients.bias_gradients_at, (*places, call.q_offset, call.kv_starts)
    given = (*places, call.softmax_scale, _graded(call, terms))
    (slopes, table), image = run(inputs, plan, *given, transient=call.transient)
    return slopes, table, image


def _graded(call: AttentionCall, terms: ScoreArguments) -> ScoreArguments:
    """The terms of the kernel: slopes with gradients are a bias by distance."""
    assert call.terms is not None
    of_slopes, of_table, of_image, _ = call.terms.wants
    by_distance = of_slopes or of_table
    if by_distance:
        bias = DistanceBias(call.terms.slopes, call.terms.table)
        terms = terms._replace(slopes=None, bias=bias)
    return terms._replace(sinks=None, graded=by_distance, image_graded=of_image)
