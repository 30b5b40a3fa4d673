"""Schedules of layouts of data by kernels; what does not depend on the data is prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparse_flash.kernels import data_kernels, launch
from sparse_flash.kernels.data_bits import Cut, cut_by
from sparse_flash.kernels.data_kernels import Functions, constant_zeros, tables
from sparse_flash.kernels.data_recipes import Lines, ScheduleSizes, recipe_of
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.schedule import CostModel, Schedule
from sparse_flash.masks.device_layout import DeviceLayout
from torch import Tensor

# Makes the schedule of a layout, with the errors of its block rows, uint8 (P, nq).
MakeSchedule = Callable[[DeviceLayout], tuple[Schedule, Tensor]]


def schedule_by_kernels(
    layout: DeviceLayout, lines: Lines, sizes: ScheduleSizes, costs: CostModel, facts: DeviceFacts
) -> MakeSchedule | None:
    """The maker of schedules for layouts of this form; None where kernels cannot run."""
    functions = data_kernels.functions_for(layout, facts, lines.transposed)
    if functions is None:
        return None
    cut = cut_by(layout, lines.tile, lines.transposed)
    return _Maker(layout, lines, sizes, costs, functions, cut).make


class _Maker:
    """Allocates and launches with arguments that were prepared for a form of layouts.

    Tensors that all launches share are kept as launches take them.
    """

    def __init__(
        self,
        layout: DeviceLayout,
        lines: Lines,
        sizes: ScheduleSizes,
        costs: CostModel,
        functions: Functions,
        cut: Cut,
    ) -> None:
        device = layout.device
        self.functions, self.facts = functions, cut.facts
        self.list_tiles = functions.list_columns if lines.transposed else functions.list_rows
        self.recipe = recipe_of(layout.source.static, lines, sizes, costs, cut.facts)
        self.bits = cut.bits
        self.num_splits = 2 * sizes.extra
        self.num_ctas = min(sizes.total + sizes.extra, sizes.ctas)
        self.tile = lines.tile[::-1] if lines.transposed else lines.tile
        kept = (constant_zeros((1, 1), device), *tables(cut, layout.num_patterns, device), cut.bits)
        self.zeros, self.states, self.table_of, self.mask_bits = launch.kept_arguments(kept)
        self.launched = {
            (function, device.index)
            for function in (self.list_tiles, functions.work_items, functions.own_bits)
            if cut.facts.own or function is not functions.own_bits
        }

    def make(self, layout: DeviceLayout) -> tuple[Schedule, Tensor]:
        """The schedule of a layout of the form, and the errors of its block rows."""
        device = layout.device
        if device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.make(layout)
        data = data_kernels.block_bits(layout, self.functions)
        recipe = self.recipe
        array = torch.empty(recipe.size, dtype=torch.int32, device=device)
        parts = [array.as_strided(*part) for part in recipe.parts]
        work, combine, totals, kv_lens, tiles, begins, counts, partials, own, *bits = parts
        numbers: Any = self.zeros if data.numbers is None else data.numbers
        used = data.counters()
        self.list_tiles(
            self.zeros if data.words is None else data.words,
            *(self.states, self.table_of, numbers, begins, counts, partials),
            *(tiles, own, used, data.flat_errors, *recipe.lists),
        )
        self.functions.work_items(
            begins, counts, partials, work, combine, totals, kv_lens, *recipe.items
        )
        if bits:
            self.functions.own_bits(own, used, numbers, self.mask_bits, bits[0], *recipe.own)
        data_kernels.loaded.update(self.launched)
        bit_tiles = bits[0] if bits else self.bits
        made = Schedule(
            counts=totals,
            work=work,
            tiles=tiles,
            bits=bit_tiles,
            num_bit_tiles=bit_tiles.shape[0],
            combine=combine,
            kv_lens=kv_lens,
            num_splits=self.num_splits,
            num_ctas=self.num_ctas,
            tile=self.tile,
        )
        return made, data.errors
