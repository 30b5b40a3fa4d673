"""Costs of the work of both passes, by compiler target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from sparse_flash.kernels.schedule import CostModel


class Costs(NamedTuple):
    """The costs of a GPU's work, in units of the time of a full tile.

    forward: Of the forward kernel.
    backward: Of the backward kernel.
    estimated: Derived from the GPU's properties, and not measured.
    """

    forward: CostModel
    backward: CostModel
    estimated: bool = True


_H200 = CostModel(
    partial_tile=1.1,
    item=1.5,
    largest_share=0.5,
    long_item=2.5,
    fewest_tiles=8,
    split=1.0,
    combine=2.0,
    l2_share=0.6,
    last_l2_share=0.75,
)
_MEASURED = Costs(_H200, replace(_H200, partial_tile=1.05), estimated=False)


def _estimate(**changes: Any) -> Costs:
    forward, backward, _ = _MEASURED
    return Costs(replace(forward, **changes), replace(backward, **changes))


# The L2 cache of 8.0, 9.0 and 10.x has two halves, each of which may hold a copy of what both read:
# a group of heads may fill 0.6 of it. That of the others is one: all of it.
# GPUs of 8.6, 8.9, 11.0 and 12.x multiply half as much per cycle and multiprocessor with float32
# sums. A tile takes twice the cycles, and what does not depend on it costs half as many tiles.
_SMALL = _estimate(partial_tile=1.05, item=0.8, split=0.5, combine=1.0, l2_share=1.0)
COSTS = {
    "sm_80": _estimate(),
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": _MEASURED,
    "sm_100": _estimate(),
    "sm_110": _SMALL,
    "sm_120": _SMALL,
}
