"""Kernels that a call launches, with their plans, and what their work costs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from sparse_flash.kernels.attention import DTYPES
from sparse_flash.kernels.plan import Plan, PlanKey, plan_of, slots_of, tiles_at_once
from sparse_flash.kernels.sm80 import attention as sm80
from sparse_flash.kernels.sm80 import backward_config as sm80_backward
from sparse_flash.kernels.sm80 import gradients
from sparse_flash.kernels.sm80.config import shared_memory_of, target_of
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.config import backward_configs, forward_configs
from sparse_flash.masks import BlockLayout
from sparse_flash.prediction_devices import Cost, Gpu
from sparse_flash.prediction_work import busiest, most_parts

_GEMMS = {"forward": 2, "backward": 5}
_FIXED_US = {"forward": 8.0, "backward": 20.0}  # of kernels that were not measured
_EFFICIENCY = {"forward": 0.65, "backward": 0.6}  # their fraction of the peak in the main loop


class Call(NamedTuple):
    """Shapes of a call of attention."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Kernel(NamedTuple):
    """One launch.

    plan: Its plan.
    which: Pass, "forward" or "backward".
    transposed: Whether it computes by key blocks.
    slots: Work tiles that the GPU computes at a time.
    """

    plan: Plan[Any]
    which: str
    transposed: bool
    slots: int

    @property
    def name(self) -> str:
        """Name in the table of constants: pass, head_dim and tile, and slots of a CTA if several.

        >>> from sparse_flash import masks
        >>> from sparse_flash.prediction_devices import GPUS
        >>> call = Call(1, 8, 8, 128, torch.bfloat16)
        >>> [k.name for k in kernels_of(masks.causal().layout(1024), call, GPUS[0], "forward")]
        ['forward-128-128x128']
        """
        config = self.plan.config
        slots = f"-{config.slots}" if getattr(config, "slots", 1) > 1 else ""
        return f"{self.which}-{config.head_dim}-{config.tile[0]}x{config.tile[1]}{slots}"

    @property
    def gemms(self) -> int:
        """Matrix products of a tile: the backward pass without dQ has four, that of dQ three."""
        config = self.plan.config
        if self.which == "forward":
            return 2
        if not self.transposed:
            return 3
        return 5 if getattr(config, "dq", True) else 4

    @property
    def tile_flops(self) -> int:
        """Operations of a tile."""
        config = self.plan.config
        return 2 * self.gemms * config.tile[0] * config.tile[1] * config.head_dim

    @property
    def slowdown(self) -> float:
        """Time of an operation, in units of that of a work tile with a multiprocessor alone."""
        config = self.plan.config
        at_once = tiles_at_once(config)
        area = config.tile[0] * config.tile[1] / 128**2
        return at_once * config.tile_cost / area if at_once > 1 else 1.0

    def milliseconds(self, cost: Cost, mega: float) -> float:
        """Predicted time. mega: Elements of q / 2^20."""
        schedule = self.plan.schedule
        around = cost.fixed + cost.mega * mega + cost.combine * most_parts(schedule)
        return (around + busiest(schedule, cost).time(cost)) / 1e3

    def dense_milliseconds(self, cost: Cost, call: Call, lengths: tuple[int, int]) -> float:
        """The same for dense attention, whose rows are all alike. lengths: q_len and kv_len."""
        sizes = lengths[::-1] if self.transposed else lengths
        rows, tiles = (-(-n // t) for n, t in zip(sizes, self.plan.config.tile, strict=True))
        heads = call.kv_heads if self.transposed else call.heads
        tiles *= call.heads // heads
        items = rows * call.batch * heads
        busy = items / min(self.slots, items) * (cost.item + tiles * cost.tile)
        return (cost.fixed + cost.mega * mega_of(call, lengths[0]) + busy) / 1e3


def mega_of(call: Call, q_len: int) -> float:
    """Elements of q / 2^20."""
    return call.batch * call.heads * q_len * call.head_dim / 2**20


def kernels_of(layout: BlockLayout, call: Call, gpu: Gpu, which: str) -> list[Kernel]:
    """The kernels of a pass, planned as the implementation of the GPU plans them."""
    host, facts = layout.host, gpu.facts
    sizes = (call.batch, call.heads, call.kv_heads)
    if facts.arch == "sm_90":
        key = call.dtype, call.head_dim
        planners: list[Any] = [sm90.FORWARD[key] if which == "forward" else sm90.BACKWARD[key]]
        if which == "backward" and not planners[0].configs[0].dq:
            planners.append(sm90.DQ[key])
        ctas = 1
    else:
        target, shared = target_of(facts), shared_memory_of(facts)
        if which == "forward":
            planners = [sm80.forward_planner(call.dtype, call.head_dim, target, shared)]
        else:
            name = DTYPES[call.dtype]
            config = sm80_backward.backward_config(name, call.head_dim, target, shared)
            planners = [gradients.planner_of(config)]
        ctas = planners[0].configs[0].ctas_per_sm
        facts = sm80.slots_of(facts, ctas)
    plans = [plan_of(host, PlanKey(p, *sizes, facts)) for p in planners]
    return [
        Kernel(plan, which, p.transposed, slots_of(facts, plan.config).num_sms)
        for plan, p in zip(plans, planners, strict=True)
    ]


def cost_of(kernel: Kernel, gpu: Gpu, costs: dict[str, Cost]) -> tuple[Cost, str]:
    """What work costs in a kernel, and where that comes from where it was not measured.

    A kernel without constants takes those of the nearest head_dim for the same number of
    operations, or of other tiles of its own head_dim by the cost that plans give them. Without any
    constants, its main loop runs at a fraction of the peak.
    """
    if kernel.name in costs:
        return costs[kernel.name], ""
    # Without kernels of several slots, which have a fourth part in their names.
    near = [n for n in costs if n.startswith(f"{kernel.which}-") and n.count("-") == 2]
    if near:
        wanted = kernel.plan.config.head_dim
        same = "{}x{}".format(*kernel.plan.config.tile)
        near.sort(key=lambda name: not name.endswith(same))  # of as near ones, the same tile
        name = min(near, key=lambda n: abs(math.log(int(n.split("-")[1]) / wanted)))
        head_dim, _, size = name.partition("-")[2].partition("-")
        height, width = map(int, size.split("x"))
        flops = 2 * _GEMMS[kernel.which] * height * width * int(head_dim)
        ratio, base = kernel.tile_flops / flops * kernel.slowdown, costs[name]
        if int(head_dim) == wanted:
            ratio = _ratio_of_tiles(kernel, (height, width)) or ratio
        scaled = {
            field: getattr(base, field) * ratio for field in ("item", "tile", "partial", "split")
        }
        return base._replace(**scaled), f"head_dim {head_dim}"
    speed = gpu.tflops * 1e6 * _EFFICIENCY[kernel.which] / kernel.slots  # operations in 1 us
    us = kernel.tile_flops / speed
    return Cost(_FIXED_US[kernel.which], 1.5 * us, us, 0.1 * us, us, 0.1, 0.0), "peak"


def _ratio_of_tiles(kernel: Kernel, tile: tuple[int, int]) -> float | None:
    """Time of a tile over that of another kernel for Hopper of this head_dim; None: there is none.

    tile: Of the other kernel.
    """
    mine = kernel.plan.config
    make: Any = forward_configs if kernel.which == "forward" else backward_configs
    found: list[Any] = [c for c in make(mine.dtype, mine.head_dim) if c.tile == tile]
    if mine.arch != "sm_90a" or not found:
        return None
    busy, other = (c.tile_cost * tiles_at_once(c) for c in (mine, found[0]))
    return busy / other
