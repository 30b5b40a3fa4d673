"""Softcap, ALiBi and sinks in registers, where scores are scaled and masked.

The kernels scale scores as they take exponentials: P = exp2(scale_log2 S - max). So terms are
applied to S in units of 1 / scale_log2. With a softcap c, S becomes tanh(softmax_scale S / c), and
scale_log2 is c log2(e).

ALiBi adds coefficient |p_q - p_k| to S, with the coefficient -slope log2(e) / scale_log2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

LOG2_E = math.log2(math.e)
# Instead of -inf for tanh of masked elements: P is 0, and P times the derivative is not NaN.
MASKED = -1e18


class ScoreTerms(NamedTuple):
    """The argument of kernels with score terms; fields of other terms than theirs are `None`.

    On the host, a tuple of torch tensors and numbers.
    """

    slopes: cute.Tensor | None = None  # of ALiBi, (h,) float32
    slope_scale: Float32 | None = None  # -log2(e) / scale_log2
    cap_scale: Float32 | None = None  # of the softcap: softmax_scale / softcap
    sinks: cute.Tensor | None = None  # (h,) float32
    seed: cute.Tensor | None = None  # of dropout, (2,) int32: its low and its high word
    dropped: Int32 | None = None  # see dropout.py
    keep_scale: Float32 | None = None  # 256 / (256 - dropped)
    bias: cute.Tensor | None = None  # by distance: see distance_table.values_of
    bias_rows: Int32 | None = None  # DistanceGrid.rows
    bias_radius: Int32 | None = None  # DistanceBias.radius
    bias_sums: cute.Tensor | None = None  # gradients of the values, (h, length) float32
    image: cute.Tensor | None = None  # by distances on an image: see image_table.image_values
    image_numbers: cute.Tensor | None = None  # of positions, int32: see image_table
    image_sums: cute.Tensor | None = None  # gradients of these values, (h, length) float32
    sum_factors: cute.Tensor | None = None  # (h,) float32; with them sums are int64, times these

    def coefficient(self, head):
        """Coefficient of ALiBi."""
        return self.slopes[head] * self.slope_scale

    def sink(self, head):
        """Logit of a head's sink in base 2."""
        return self.sinks[head] * LOG2_E


def tanh(x):
    """Tanh as one MUFU; its relative error is at most 2^-11 (PTX ISA, tanh.approx.f32)."""
    return cute.arch.inline_ptx(
        "tanh.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


def absolute(x):
    """|x|, which the compiler makes a modifier of an operand."""
    return cute.arch.inline_ptx(
        "abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


@cute.jit
def apply_softcap(acc, cap_scale):
    """Replace S by tanh(cap_scale S); cap_scale is softmax_scale / softcap."""
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = tanh(acc[i] * cap_scale)


@cute.jit
def add_alibi(
    acc, coefficient, distance, transposed: cutlass.Constexpr, first: cutlass.Constexpr = 0
):
    """Add coefficient |p_q - p_k| to S.

    acc: Accumulators, from the thread's element `first` on. distance: Position of the query minus
    that of the key, for the thread's first element. transposed: Whether rows are keys.
    """
    start = coefficient * distance
    if coefficient < 0:  # the sign of usual slopes
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] - alibi_of(first + i, coefficient, start, transposed)
    else:
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] + alibi_of(first + i, coefficient, start, transposed)


@cute.jit
def fill_with_alibi(
    acc,
    coefficient,
    apart,
    own,
    tile: cutlass.Constexpr,
    transposed: cutlass.Constexpr = False,
):
    """Set accumulators to coefficient |p_q - p_k|, before a GEMM adds S to them.

    A tile whose distances have one sign, as almost all have, takes one FMA an element.

    acc: Accumulators of a tile. apart: Position of its first query minus that of its first key.
    own: Distance of the thread's first element minus `apart`. tile: Its queries and keys.
    transposed: Whether rows are keys.
    """
    num_queries, num_keys = tile
    distance = Float32(apart + own)
    if apart >= num_keys or apart <= -num_queries:
        slope = coefficient if apart > 0 else -coefficient
        start = slope * distance
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = slope * Float32(offset_of(i, transposed)) + start
    else:
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = coefficient * absolute(distance + Float32(offset_of(i, transposed)))


def alibi_of(i: int, coefficient, start, transposed: bool):
    """|coefficient| |distance| of a thread's element i. start: Of its first element, signed."""
    return absolute(coefficient * Float32(offset_of(i, transposed)) + start)


def offset_of(i: int, transposed: bool) -> float:
    """Distance of a thread's element i of an accumulator minus that of its first one."""
    row, column = 8 * (i // 2 % 2), i // 4 * 8 + i % 2
    return float(column - row if transposed else row - column)


@cute.jit
def with_sink(top, total, sink):
    """The maximum and the sum of a row with its sink, in base 2; (-inf, 0) where it is empty.

    top: Maximum, times scale_log2. total: Sum of exp2(score - top).
    """
    new = cute.arch.fmax(top, sink)
    shift = Float32(0.0) if new == -Float32.inf else new
    decay = cute.math.exp2(top - shift, fastmath=True)
    return shift, decay, total * decay + cute.math.exp2(sink - shift, fastmath=True)
