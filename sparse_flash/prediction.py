"""What attention with a layout will cost: time, speed, memory, HBM traffic, and advice in words.

The work of the busiest multiprocessor follows from the schedule that the kernel would get. What a
unit of work costs was fitted to measured times, see `prediction_devices`; where a GPU was not
measured, it is estimated from peak numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_flash.kernels.attention import DTYPES, HEAD_DIMS
from sparse_flash.kernels.plan import Plan
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.coverage import percent
from sparse_flash.masks.modes import plain_torch
from sparse_flash.prediction_advice import advice
from sparse_flash.prediction_devices import Gpu, constants_of, gpu_of
from sparse_flash.prediction_io import streaming
from sparse_flash.prediction_kernels import Call, cost_of, kernels_of, mega_of

PASSES = ("forward", "backward")
_MIB = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """Predicted costs of attention with one layout.

    Args:
        forward_ms: GPU time of the forward pass.
        backward_ms: GPU time of the backward pass.
        forward_tflops: Speed, counted as the benchmark does: 4 x elements of stored tiles x
            head_dim, TFLOP/s.
        backward_tflops: The same of the backward pass, with 2.5 times the operations.
        forward_mib: Memory that the forward pass allocates, out and lse included, MiB.
        training_mib: Memory that both passes allocate, gradients included, MiB.
        forward_hbm_mb: HBM traffic of the forward pass, 10^6 bytes; see `prediction_io`.
        backward_hbm_mb: HBM traffic of the backward pass, 10^6 bytes.
        dense_forward_ms: Predicted forward time of dense attention of these shapes.
        dense_backward_ms: Predicted backward time of dense attention of these shapes.
        break_even_density: Density from which a pattern of this kind, with as many computed
            elements for each allowed one, takes as long as dense attention, 0..1.
        advice: Sentences.
        gpu: Name of the GPU model.
        source: Origin of the numbers.
    """

    forward_ms: float
    backward_ms: float
    forward_tflops: float
    backward_tflops: float
    forward_mib: float
    training_mib: float
    forward_hbm_mb: float
    backward_hbm_mb: float
    dense_forward_ms: float
    dense_backward_ms: float
    break_even_density: float
    advice: tuple[str, ...]
    gpu: str
    source: str

    @property
    def speed_up(self) -> float:
        """Time of dense attention over that of this layout, both passes."""
        dense = self.dense_forward_ms + self.dense_backward_ms
        return dense / (self.forward_ms + self.backward_ms)

    def __str__(self) -> str:
        rows = [
            ("forward", self.forward_ms, self.forward_tflops, self.forward_hbm_mb),
            ("backward", self.backward_ms, self.backward_tflops, self.backward_hbm_mb),
        ]
        lines = [f"{self.gpu}, {self.source}"]
        lines += [
            f"{which:9} {ms:9.3f} ms {tflops:6.0f} TFLOP/s {mb:9.1f} MB of HBM traffic"
            for which, ms, tflops, mb in rows
        ]
        lines.append(
            f"dense     {self.dense_forward_ms:9.3f} ms forward, {self.dense_backward_ms:.3f} ms "
            f"backward: this layout has {self.speed_up:.2f}x the speed"
        )
        lines.append(
            f"memory    {self.forward_mib:9.1f} MiB forward, {self.training_mib:.1f} MiB with the "
            "backward pass"
        )
        lines.append(f"break-even density against dense: {percent(self.break_even_density)}")
        return "\n".join([*lines, *(f"advice: {sentence}" for sentence in self.advice)])


@plain_torch()
def predict(
    layout: BlockLayout,
    heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
) -> Prediction:
    """Time, speed, memory and HBM traffic of attention with a layout, without running it.

    Args:
        layout: The layout, on any device; its number of heads and batch entries must fit.
        heads: Number of query heads.
        head_dim: Width of a head, a multiple of 8 from 16 to 256.
        batch: Number of batch entries; default 1.
        kv_heads: Number of key heads, a divisor of `heads`; default: as many.
        dtype: torch.bfloat16 or torch.float16.
        device: Name of a GPU, as "H200", or a CUDA device; default: the GPU here, or without one
            the H200.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A number out of range, a layout for other heads, or a GPU without numbers.

    >>> from sparse_flash import masks, predict
    >>> layout = masks.butterfly(128).layout(16384)
    >>> made = predict(layout, heads=16, head_dim=128, device="H200")
    >>> made.speed_up > 5, made.gpu
    (True, 'H200')
    """
    call = _checked(layout, batch, heads, kv_heads, head_dim, dtype)
    gpu = gpu_of(device)
    machine, costs = constants_of(gpu)
    kernels = {which: kernels_of(layout, call, gpu, which) for which in PASSES}
    lengths, mega = (layout.q_len, layout.kv_len), mega_of(call, layout.q_len)
    times, dense = dict.fromkeys(PASSES, 0.0), dict.fromkeys(PASSES, 0.0)
    origins = set()
    for which in PASSES:
        for kernel in kernels[which]:
            cost, origin = cost_of(kernel, gpu, costs)
            times[which] += kernel.milliseconds(cost, mega)
            dense[which] += kernel.dense_milliseconds(cost, call, lengths)
            origins.add(origin)
    flops = 4.0 * _stored_elements(layout) * call.head_dim * call.heads * call.batch
    forward_plan, backward_plan = (kernels[which][0].plan for which in PASSES)
    forward_hbm, backward_hbm = _traffic(layout, call, gpu, forward_plan)
    for which, nbytes in zip(PASSES, (forward_hbm, backward_hbm), strict=True):
        # No kernel is faster than its memory. The L2 cache may hold some of the data already.
        least = max(nbytes - gpu.facts.l2_bytes, 0.0) / gpu.hbm_gbs / 1e6
        times[which] = max(times[which], least)
    even = layout.density * sum(dense.values()) / sum(times.values())
    forward_mib = _forward_bytes(call, layout, forward_plan) / _MIB
    made = Prediction(
        forward_ms=times["forward"],
        backward_ms=times["backward"],
        forward_tflops=flops / times["forward"] / 1e9,
        backward_tflops=2.5 * flops / times["backward"] / 1e9,
        forward_mib=forward_mib,
        training_mib=forward_mib + _backward_bytes(call, layout, backward_plan) / _MIB,
        forward_hbm_mb=forward_hbm / 1e6,
        backward_hbm_mb=backward_hbm / 1e6,
        dense_forward_ms=dense["forward"],
        dense_backward_ms=dense["backward"],
        break_even_density=min(even, 1.0) or 1.0,
        advice=(),
        gpu=gpu.name,
        source=_source(machine, origins - {""}),
    )
    return replace(made, advice=tuple(advice(layout, forward_plan.config.tile, gpu, made)))


def _source(machine: str, origins: set[str]) -> str:
    if not machine:
        return "estimated from peak numbers"
    scaled = f", scaled from {', '.join(sorted(origins))}" if origins else ""
    return f"measured on {machine}{scaled}"


def _checked(
    layout: BlockLayout,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    dtype: torch.dtype,
) -> Call:
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout, got {type(layout).__name__}; a mask has one "
            "layout for each length: mask.layout(length)"
        )
    if layout.on_device:
        raise ValueError(
            "the tiles of this layout are found on the device at each call, so that its work is "
            "not known: pass layout.fixed()"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if integer("predict", name, size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be a multiple of 8 from 16 to 256, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    for name, size, given in zip(
        ("batch entries", "heads"), (batch, heads), layout.pattern_map.shape, strict=True
    ):
        if given not in (1, size):
            raise ValueError(f"the layout is made for {given} {name}, not {size}")
    return Call(batch, heads, kv_heads, head_dim, dtype)


def _stored_elements(layout: BlockLayout) -> float:
    return layout.tile_density * (
        layout.num_block_rows * layout.num_block_cols * layout.block[0] * layout.block[1]
    )


def _forward_bytes(call: Call, layout: BlockLayout, plan: Plan[Any]) -> int:
    """Out, lse, and the splits of rows."""
    rows = call.batch * call.heads * layout.q_len
    splits = plan.num_splits * sum(4 * math.prod(s) for s in plan.config.split_shapes)
    return rows * (2 * call.head_dim + 4) + splits


def _backward_bytes(call: Call, layout: BlockLayout, plan: Plan[Any]) -> int:
    """Dq, dk, dv, the sums of dq in float32, statistics, and the splits of columns."""
    queries = call.batch * call.heads * layout.q_len
    keys = call.batch * call.kv_heads * layout.kv_len
    config = plan.config
    sums = 4 * queries * config.head_dim if getattr(config, "dq", True) else 0
    splits = plan.num_splits * sum(4 * math.prod(s) for s in config.split_shapes)
    return 2 * call.head_dim * (queries + 2 * keys) + sums + 8 * queries + splits


def _traffic(layout: BlockLayout, call: Call, gpu: Gpu, plan: Plan[Any]) -> tuple[float, float]:
    """HBM bytes of both passes.

    Each array is read or written once, as far as the L2 cache holds the keys and values (queries
    and their gradients in the backward pass) of a head; the rest is read again for every tile.
    """
    d, tile = call.head_dim, plan.config.tile
    density = layout.computed_density(tile)
    pairs, kv_pairs = call.batch * call.heads, call.batch * call.kv_heads
    once_q, once_kv = 2 * pairs * layout.q_len * d, 2 * kv_pairs * layout.kv_len * d
    rows = pairs * layout.q_len
    length = max(layout.q_len, layout.kv_len)
    again = 2 * pairs * (streaming(length, d, tile[0], density) - streaming(length, d, length))
    missed = max(0.0, 1 - gpu.facts.l2_bytes / (4 * layout.kv_len * d))
    splits = plan.num_splits * sum(4 * math.prod(shape) for shape in plan.config.split_shapes)
    forward = 2 * (once_q + once_kv + splits) + 4 * rows + missed * max(again, 0.0)
    missed = max(0.0, 1 - gpu.facts.l2_bytes / (8 * layout.q_len * d))
    sums = 4 * rows * d  # dQ in float32, written and read
    backward = 5 * once_q + 4 * once_kv + 2 * sums + 12 * rows + missed * 2 * max(again, 0.0)
    return forward, backward
