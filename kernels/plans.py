"""The schedules of layouts: built once for each way of using them, kept as long as the layouts."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable

import torch
from sparse_flash.kernels.schedule import (
    BACKWARD_COSTS,
    Schedule,
    backward_schedule,
    best_config,
    schedule,
)
from sparse_flash.kernels.sm90.config import (
    Config,
    backward_configs,
    forward_configs,
    queries_config,
)
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _Schedules:
    """Schedules as attributes of this object.

    As attributes, because that is what torch.compile can follow: it runs `name_of` while it
    traces, takes the name as a constant, and reads the schedule where it finds it in later calls.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int | str, ...], str] = {}

    @torch.compiler.assume_constant_result
    def name_of(
        self,
        number: int,
        kind: str,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> str:
        """The attribute that holds the schedule of this layout for such tensors; builds it."""
        key = (number, kind, batch, heads, kv_heads, _bucket(kind, dtype, head_dim))
        name = self.names.get(key)
        if name is None:
            layout = layout_by_number(number)
            name = f"schedule_{next(_numbers)}"
            tile = _tile(kind, layout, dtype, head_dim)
            build = functools.partial(
                _build, kind=kind, tile=tile, batch=batch, heads=(heads, kv_heads), width=key[-1]
            )
            plan = build(layout)
            setattr(self, name, plan)
            self.names[key] = name
            layout.on_update.append(functools.partial(_follow, plan, build))
            weakref.finalize(layout, self._forget, key)
        return name

    def _forget(self, key: tuple[int | str, ...]) -> None:
        delattr(self, self.names.pop(key))


_numbers = itertools.count()
_schedules = _Schedules()


def schedule_of(kind: str, layout: BlockLayout, q: Tensor, k: Tensor) -> Schedule:
    """The schedule of a layout for these tensors.

    kind: "forward"; "backward" with dQ (whose kernel is `kernel_of` kind and tile), or "fixed", its
        repeatable variant; "keys", the backward without dQ, and dQ by "queries".
    """
    dtype = DTYPES[q.dtype]
    # operator.index: a size that varies is a symbol to torch.compile, and a schedule is for one.
    batch, _, heads, head_dim = (operator.index(size) for size in q.shape)
    kv_heads = operator.index(k.shape[2])
    name = _schedules.name_of(layout.number, kind, batch, heads, kv_heads, head_dim, dtype)
    return getattr(_schedules, name)


def _configs(kind: str, dtype: str, head_dim: int) -> tuple[Config, ...]:
    if kind == "forward":
        return forward_configs(dtype, head_dim)
    if kind == "queries":
        return (queries_config(dtype, head_dim),)
    return backward_configs(kind, dtype, head_dim)


@functools.cache
def _bucket(kind: str, dtype: str, head_dim: int) -> int:
    """Head_dims that share their configs."""
    return _configs(kind, dtype, head_dim)[0].head_dim


def _tile(kind: str, layout: BlockLayout, dtype: str, head_dim: int) -> tuple[int, int]:
    """Of the config that computes this layout soonest."""
    configs = _configs(kind, dtype, head_dim)
    if len(configs) == 1:
        return configs[0].tile
    if kind == "forward":
        return best_config(layout, configs).tile
    return best_config(layout.transpose(), configs, BACKWARD_COSTS).tile


def _build(
    layout: BlockLayout,
    kind: str,
    tile: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    width: int,
    tail: bool = True,
) -> Schedule:
    ctas = num_sms(layout.device)
    if kind in ("forward", "queries"):  # each head of K and V, in 16 bits
        return schedule(layout, batch, heads[0], tile, ctas, 4 * layout.kv_len * width, tail=tail)
    # Of each head Q and dO, in 16 bits, and the sums of dQ, in float32.
    size = 8 * layout.q_len * width * heads[0] // heads[1]
    return backward_schedule(layout, batch, heads, tile, ctas, size, tail=tail)


def _follow(
    plan: Schedule, build: Callable[..., Schedule], layout: BlockLayout
) -> Callable[[], None]:
    """What makes this schedule that of another layout, in place."""
    new = build(layout, tail=False)  # for whose parts there may be no room
    plan.check_room(new)
    return functools.partial(plan.update_, new)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
