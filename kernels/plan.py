"""Plans: which kernel computes a layout, and by which schedule. Built once, kept on the layout.

    BlockLayout -> Plan(config, schedule) -> launch

A plan is found under its `PlanKey` in `layout.derived`, so it lives as long as the layout. Captured
CUDA graphs and compiled graphs hold the plan's arrays; `layout.update_` changes these in place.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from sparse_flash.kernels.choice import best_config, suits
from sparse_flash.kernels.config import KernelConfig
from sparse_flash.kernels.data_schedules import MakeSchedule
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.device_schedule import backward_schedule_maker, schedule_maker
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.schedule import (
    CostModel,
    Schedule,
    backward_schedule,
    schedule,
)
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import grid_of
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import is_capturing, is_plain, plain_torch
from torch import Tensor

Config = TypeVar("Config", bound=KernelConfig)
_lock = threading.Lock()  # threads that ask for the same plan get one


@dataclass(eq=False)
class Plan(Generic[Config]):
    """How a layout is computed: the config of the kernel and the schedule that it follows.

    Args:
        config: Config of the kernel that is launched.
        schedule: Its schedule.
        reschedule: Makes the schedule of another layout for the same tensors. None in plans that
            were unpacked: the plan that they were packed from follows for them.
        suits: Whether the config may compute another layout, see `choice.suits`; None: any.

    Attributes:
        lists: The schedule's work, tiles and bits, as a launch takes them.
        combine: The schedule's combine and counts, likewise.
        num_splits: Number of splits of all split rows.
        num_ctas: Number of CTAs to launch.
        kernel: The compiled kernel; None until the first launch.
    """

    config: Config
    schedule: Schedule
    reschedule: Callable[[BlockLayout], Schedule] | None = field(default=None, repr=False)
    suits: Callable[[BlockLayout], bool] | None = field(default=None, repr=False)
    kernel: Kernel | None = field(default=None, repr=False)
    captured: bool = False  # a CUDA graph reads the arrays
    # Of layouts of data: why block rows are not as asked for, uint8 (P, nq); None: no row can be.
    errors: Tensor | None = field(default=None, repr=False)
    of_form: DataPlans | None = field(default=None, repr=False)  # its maker

    def __post_init__(self) -> None:
        # Arguments of a launch, gathered once: `follow` changes only the contents of arrays.
        s = self.schedule
        self.lists: tuple[Any, ...] = (s.work, s.tiles, s.bits)
        self.combine: tuple[Any, ...] = (s.combine, s.counts)
        self.num_splits, self.num_ctas = s.num_splits, s.num_ctas

    @property
    def lasts(self) -> bool:
        """Whether it is kept for many launches; a plan of data serves one call."""
        return self.reschedule is not None

    @property
    def nbytes(self) -> int:
        """Memory of the schedule's arrays."""
        return self.schedule.nbytes

    @plain_torch()
    def follow(self, layout: BlockLayout) -> Callable[[], None] | None:
        """The step that makes this the plan of another layout, in place; nothing changes before.

        None: this plan does not suit the other layout, and no CUDA graph depends on it.

        Raises:
            ValueError: A CUDA graph depends on this plan. The other layout needs more work items,
                tiles, bit tiles or parts than its arrays have space for, or another config.
        """
        assert self.reschedule is not None
        try:
            self._check_config(layout)  # first: a schedule would be made in vain
            new = self.reschedule(layout)
            self.schedule.check_capacity(new)
        except ValueError:
            if self.captured:
                raise
            return None
        return functools.partial(self.schedule.update_, new)

    def _check_config(self, layout: BlockLayout) -> None:
        if self.suits is not None and not self.suits(layout):
            raise ValueError(
                f"tiles of {self.config.tile} would reach into blocks that nothing reads in the "
                "new pattern, and might find NaN there: capture the CUDA graph with a pattern that "
                "leaves such blocks, too"
            )


@dataclass(frozen=True, eq=False)
class Planner(Generic[Config]):
    """One computation of an architecture, such as its forward, for some head_dims and one dtype.

    Args:
        configs: Configs that can compute it; a plan takes the one that covers its layout at the
            least cost.
        costs: Costs of its work.
        token_bytes: Bytes of a head per key that the L2 cache should hold while the head is
            computed (per query of a query head where `transposed`).
        transposed: Compute by key blocks and key heads, from the transposed layout.
    """

    configs: tuple[Config, ...]
    costs: CostModel
    token_bytes: int
    transposed: bool = False


class PlanKey(NamedTuple):
    """Key of a plan of a layout. A named tuple, since every call constructs one.

    planner: The operation, with its candidate configs.
    batch: Number of batch entries.
    heads: Number of query heads.
    kv_heads: Number of key heads.
    facts: The GPU.
    """

    planner: Planner[Any]
    batch: int
    heads: int
    kv_heads: int
    facts: DeviceFacts


def plan_of(layout: BlockLayout, key: PlanKey) -> Plan[Any]:
    """The plan of a layout, from `layout.derived` or built and kept there. Thread safe.

    Raises:
        ValueError: The GPU has too little shared memory for all configs.

    >>> from sparse_flash import masks
    >>> from sparse_flash.kernels.sm90.attention import FORWARD
    >>> import torch
    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> layout = masks.causal().layout(1024)
    >>> key = PlanKey(FORWARD[torch.bfloat16, 64], batch=2, heads=8, kv_heads=8, facts=h200)
    >>> plan = plan_of(layout, key)
    >>> plan.config.tile, plan.num_ctas, plan is plan_of(layout, key)
    ((128, 128), 128, True)
    """
    plan = layout.derived.get(key)
    if plan is None:
        with _lock:
            plan = layout.derived.get(key)
            if plan is None:
                if isinstance(layout, DeviceLayout):
                    plan = _plan_of_data(layout, key)
                    if not layout.keeps_what_is_derived:
                        return plan
                else:
                    plan = _build(layout, key)
                layout.derived[key] = plan
    return plan


@plain_torch()  # a plan outlives the modes and transforms of the call that asks for it
def _build(layout: BlockLayout, key: PlanKey) -> Plan[Any]:
    config = best_config(layout, _configs_for(layout, key), key.planner.transposed)
    reschedule = functools.partial(_schedule, key, config, split_last_wave=False)
    may = functools.partial(suits, config, transposed=key.planner.transposed)
    plan = Plan(config, _schedule(key, config, layout), reschedule, may)
    if getattr(config, "slots", 1) > 1:  # few work tiles then begin on as many multiprocessors
        plan.num_ctas = min(plan.num_ctas, key.facts.num_sms)
    return plan


def _configs_for(layout: BlockLayout, key: PlanKey) -> list[Any]:
    """The possible configs; without those of several slots where there are few rows of tiles: with
    one slot in use these take longer than others.
    """
    configs, pairs = _possible_configs(key), key.batch * key.heads
    kept = [
        c
        for c in configs
        if getattr(c, "slots", 1) == 1 or pairs * -(-layout.q_len // c.tile[0]) > key.facts.num_sms
    ]
    return kept or configs


def _possible_configs(key: PlanKey) -> list[Any]:
    """The configs that the GPU has the shared memory for."""
    planner, capacity = key.planner, key.facts.shared_memory
    configs = [c for c in planner.configs if c.shared_memory <= capacity]
    if not configs:
        least = min(c.shared_memory for c in planner.configs)
        raise ValueError(
            f"the kernels need {least} bytes of shared memory, but this GPU ({key.facts.arch}) has "
            f"{capacity}: use impl='reference'"
        )
    return configs


def slots_of(facts: DeviceFacts, config: KernelConfig) -> DeviceFacts:
    """The GPU as a schedule sees it: a multiprocessor for each work tile that it runs at once."""
    at_once = tiles_at_once(config)
    return facts if at_once == 1 else replace(facts, num_sms=facts.num_sms * at_once)


def tiles_at_once(config: KernelConfig) -> int:
    """Work tiles that a multiprocessor computes at once."""
    # Facts of other architectures count them.
    return getattr(config, "resident_ctas", 1) * getattr(config, "slots", 1)


def fitting(layout: BlockLayout, planner: Planner[Any]) -> list[Any]:
    """The configs of a planner whose tiles can be listed on the device for a layout's blocks.

    Not those with several work tiles on a multiprocessor, such as those for small blocks: to choose
    them takes a count of the tiles, for which the host waits.
    Nor those whose bit tiles are padded to a multiple of 64 rows, which the lists do not expect.
    """
    return [
        c
        for c in planner.configs
        if tiles_at_once(c) == 1
        and c.tile[0] % 64 == 0
        and grid_of(layout.lengths, c.tile[::-1] if planner.transposed else c.tile)
    ]


class DataPlans:
    """Makes the plans of layouts of one form, for one key: only data differ from plan to plan."""

    def __init__(self, layout: DeviceLayout, key: PlanKey) -> None:
        planner, facts = key.planner, key.facts
        configs = _possible_configs(key)
        self.config = next(c for c in fitting(layout, planner) if c in configs)
        self.may_fail = layout.source.may_fail
        self.kernel: Kernel | None = None  # of the config, from the first launch on
        self.make: MakeSchedule
        if not planner.transposed:
            size = planner.token_bytes * layout.kv_len
            sizes = (key.batch, key.heads)
            self.make = schedule_maker(layout, *sizes, self.config.tile, facts, planner.costs, size)
        else:
            size = planner.token_bytes * layout.q_len * key.heads // key.kv_heads
            heads = (key.heads, key.kv_heads)
            self.make = backward_schedule_maker(
                layout, key.batch, heads, self.config.tile, facts, planner.costs, size
            )

    def plan(self, layout: DeviceLayout) -> Plan[Any]:
        """The plan of a layout of the form: nothing waits for its data."""
        made, errors = self.make(layout)
        if not self.may_fail:
            return Plan(self.config, made, kernel=self.kernel, of_form=self)
        if layout.keeps_what_is_derived:
            layout.note(errors)
        return Plan(self.config, made, kernel=self.kernel, errors=errors, of_form=self)


def _plan_of_data(layout: DeviceLayout, key: PlanKey) -> Plan[Any]:
    """The plan of a layout that data on the device decide."""
    if not is_plain():
        with plain_torch():
            return _plan_of_data(layout, key)
    if is_capturing(layout.device) or layout.form is None:
        return DataPlans(layout, key).plan(layout)  # its tensors belong to the CUDA graph
    on_gpu = layout.device.type == "cuda"
    stream = torch._C._cuda_getCurrentRawStream(layout.device.index) if on_gpu else 0
    plans: DataPlans | None = layout.form.plans.get((key, stream))
    if plans is None:
        plans = layout.form.plans[key, stream] = DataPlans(layout, key)
    return plans.plan(layout)


def _schedule(
    key: PlanKey, config: KernelConfig, layout: BlockLayout, split_last_wave: bool = True
) -> Schedule:
    """The schedule of a layout; parts for the last wave may not fit where a plan follows.

    Raises:
        ValueError: It has more bit tiles than the kernel can index.
    """
    planner, facts = key.planner, slots_of(key.facts, config)
    if not planner.transposed:
        size = planner.token_bytes * layout.kv_len
        made = schedule(
            *(layout, key.batch, key.heads, config.tile),
            *(facts, planner.costs, size, split_last_wave),
        )
    else:
        size = planner.token_bytes * layout.q_len * key.heads // key.kv_heads
        heads = (key.heads, key.kv_heads)
        made = backward_schedule(
            *(layout, key.batch, heads, config.tile),
            *(facts, planner.costs, size, split_last_wave),
        )
    most = getattr(config, "most_bit_tiles", math.inf)
    if made.num_bit_tiles > most:
        raise ValueError(
            f"the layout has {made.num_bit_tiles} distinct partial tiles, and the kernel can index "
            f"{most:.0f}: use a layout of full blocks, or compute the patterns in several calls"
        )
    return made
