"""Schedules of layouts of data by kernels, and NaN for invalid rows.

They run on every GPU that the DSL compiles for. Where they cannot run, `schedule_of_data` returns
None and `mark_invalid` returns False: PyTorch then computes the same, in many more launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.data_bits import Cut, cut_by
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.kernels.schedule import WORK_FIELDS, CostModel, Schedule
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import BIT_TILES, TILES, Grid, grid_of
from torch import Tensor

MOST_SORTED = 1 << 14  # as in `work_items`
# Capacities that are exceeded are left to PyTorch until the kernels' marks were compared on a GPU.
WITH_CAPACITY = False
MOST_GROUPS = 1 << 10
_DTYPES = ("bfloat16", "float16")
_loaded: set[tuple[Any, int | None]] = set()  # functions and indices of devices with their code


class ScheduleSizes(NamedTuple):
    """Sizes of a schedule, all known on the host.

    batch, heads: Batch entries and heads with items.
    rows: Lines of each: rows of tiles, or columns for the backward pass.
    ctas: Number of CTAs.
    extra: Items at most beyond one for each line; a bound of split lines, too.
    groups: Groups of heads that are computed one after the other.
    """

    batch: int
    heads: int
    rows: int
    ctas: int
    extra: int
    groups: int

    @property
    def total(self) -> int:
        """Lines of all batch entries and heads."""
        return self.batch * self.heads * self.rows

    @property
    def rest(self) -> int:
        """Lines of the last round, which may be split; 0: none."""
        return self.total % self.ctas if self.total >= self.ctas else 0


class Lines(NamedTuple):
    """How the tiles of a layout are listed.

    tile: Queries and keys of a tile.
    heads: Number of query heads.
    group: Query heads of a key head.
    transposed: List by columns, for key heads.
    """

    tile: tuple[int, int]
    heads: int
    group: int
    transposed: bool


def schedule_of_data(
    layout: DeviceLayout, lines: Lines, sizes: ScheduleSizes, costs: CostModel, facts: DeviceFacts
) -> tuple[Schedule, Tensor] | None:
    """The schedule, and errors of block rows, uint8 (P, nq)."""
    source, device = layout.source, layout.device
    if sizes.groups >= MOST_GROUPS or (source.capacity is not None and not WITH_CAPACITY):
        return None
    functions: _Functions | None = _usable(device, facts, _functions)
    cut = cut_by(layout, lines.tile, lines.transposed) if functions else None
    if functions is None or cut is None or not _ready(device, *functions.needed(layout, cut)):
        return None
    found = _fitting_bits(layout, functions)
    if found is None:
        return None
    (words, errors), tables = found, _Tables(layout, cut)
    stacks = sizes.heads if source.heads[1] == lines.heads else source.heads[1]
    own_heads = stacks if lines.transposed else source.heads[1]
    count = source.heads[0] * own_heads * sizes.rows
    repeats = 1
    if lines.transposed:
        repeats = source.heads[0] * own_heads * lines.group // source.num_patterns
    capacity, own_most = source.capacities(lines.tile, cut.numbers is not None and not cut.sets)
    capacity, own_most = repeats * capacity, max(1, repeats * own_most)
    ints: Any = {"dtype": torch.int32, "device": device}
    listed, sums = torch.empty(4, count, **ints), torch.empty(4, **ints)
    tiles = torch.zeros(capacity + 1, 2, **ints)  # the last one stands for none
    own = torch.empty(own_most, 4, **ints) if cut.own else _dummies(device).own
    data = tables.arrays(words)
    options = tables.sizes(words, lines, own_heads if lines.transposed else 0)
    results = (tiles, own, errors.flatten())
    _launch(functions.count_tiles, device, data, listed[:2].unbind(), results, options)
    items = sizes.total + sizes.extra
    draft, keys = (
        torch.empty(items, WORK_FIELDS, **ints),
        torch.empty(items, dtype=torch.int64, device=device),
    )
    sort = items <= MOST_SORTED
    work = torch.empty_like(draft) if sort else draft
    combine = torch.empty(min(sizes.total, sizes.extra), WORK_FIELDS, **ints)
    _launch(
        *(functions.work_items, device, listed.unbind(), (draft, work, keys, combine, sums)),
        (sizes.batch, sizes.heads, source.heads[0], own_heads, sizes.rows, sizes.groups),
        (capacity, sizes.ctas, sizes.rest, costs.fewest_tiles),
        ((items - 1).bit_length() if sort else 0, costs.item, costs.partial_tile - 1),
        (costs.largest_share, costs.split, costs.combine, costs.long_item),
    )
    if not sort:
        work = draft[keys.argsort(stable=True)]
    _launch(functions.list_tiles, device, data, listed[2:].unbind(), results, options)
    bits = cut.bits
    if cut.own:
        bits = torch.empty(own_most, *cut.bits.shape[1:], **ints)
        o = tables.grid
        sides = (o.rows, *lines.tile, *source.lengths[:2], o.down, o.across)
        flags = (cut.numbered, tables.all_blocks, int(lines.transposed))
        _launch(functions.own_bits, device, (own, sums, data[3], cut.bits, bits), sides, flags)
    made = Schedule(
        counts=sums[:2],
        work=work,
        tiles=tiles,
        bits=bits,
        num_bit_tiles=len(bits),
        combine=combine,
        kv_lens=torch.full((sizes.batch,), layout.kv_len, **ints),
        num_splits=2 * sizes.extra,
        num_ctas=min(items, sizes.ctas),
        tile=lines.tile[::-1] if lines.transposed else lines.tile,
    )
    return made, errors


class _Tables:
    """What kernels are told of a layout and of the mask that cuts it, for tiles of one size."""

    def __init__(self, layout: DeviceLayout, cut: Cut) -> None:
        self.source, self.cut, self.device = layout.source, cut, layout.device
        grid = grid_of(layout.lengths, cut.tile)
        assert grid is not None
        self.grid: Grid = grid
        every = (1 << grid.cells) - 1
        self.all_blocks = every - (1 << 32) if every >= 1 << 31 else every  # as an int32

    def arrays(self, words: Tensor | None) -> tuple[Tensor, ...]:
        """words, states, table_of and numbers of `ListTiles`."""
        cut, dummy = self.cut, _dummies(self.device)
        one = _zeros(self.source.num_patterns, self.device)
        return (
            dummy.words if words is None else words,
            dummy.table if cut.table is None else cut.table,
            one if cut.table_of is None else cut.table_of,
            dummy.words if cut.numbers is None else cut.numbers,
        )

    def sizes(self, words: Tensor | None, lines: Lines, stacked: int) -> tuple[int, ...]:
        """The fields of `data_lists.Sizes`."""
        grid, cut, source = self.grid, self.cut, self.source
        q_len, kv_len, _ = source.lengths
        return (
            *(grid.rows, grid.cols, *lines.tile, q_len, kv_len, *grid[2:], *source.num_blocks),
            *(0 if words is None else words.shape[1], self.all_blocks),
            *(0 if cut.table is None else len(cut.table), cut.numbered),
            *(int(cut.own), cut.known, source.num_patterns, source.heads[1], lines.heads),
            *(lines.group, stacked),
        )


def _fitting_bits(
    layout: DeviceLayout, functions: _Functions
) -> tuple[Tensor | None, Tensor] | None:
    """As `_block_bits`, without the rows beyond the capacity, which are marked."""
    source = layout.source
    if source.capacity is None:
        return _block_bits(layout, functions)
    found = layout.derived_bits
    if found is None:
        cut = cut_by(layout, layout.block, transposed=None)
        if cut is None:
            return None
        words, errors = _block_bits(layout, functions)
        (nq, nk), patterns, device = source.num_blocks, source.num_patterns, layout.device
        if words is None:
            words = torch.full((patterns * nq, -(-nk // 32)), -1, dtype=torch.int32, device=device)
        tables, lines = _Tables(layout, cut), Lines(layout.block, 1, 1, transposed=False)
        counts = torch.empty(2, patterns * nq, dtype=torch.int32, device=device)
        dummy = _dummies(device)
        results = (dummy.tiles, dummy.own, errors.flatten())
        options = tables.sizes(words, lines, 0)
        data = tables.arrays(words)
        _launch(functions.count_tiles, device, data, counts.unbind(), results, options)
        ends = counts.cumsum(1)
        for n, (most, code) in enumerate(zip(source.capacity, (TILES, BIT_TILES), strict=True)):
            if n == 0 or cut.numbers is not None:
                beyond = (ends[n] > most) & (counts[n] > 0)
                words = words.masked_fill(beyond[:, None], 0)
                errors = errors | (beyond * code).to(torch.uint8).view_as(errors)
        found = (words, errors)
        if layout.keeps_what_is_derived:
            layout.derived_bits = found
    return found


def _block_bits(layout: DeviceLayout, functions: _Functions) -> tuple[Tensor | None, Tensor]:
    """Words of the chosen blocks, and errors, which kernels add to; kept with the layout."""
    source, device = layout.source, layout.device
    found = layout.derived_bits if source.capacity is None else None
    if found is None:
        nq, nk = source.num_blocks
        patterns = source.num_patterns
        wrong = layout.wrong_documents()
        if wrong is None:
            errors = torch.zeros(patterns, nq, dtype=torch.uint8, device=device)
        else:
            errors = wrong.expand(patterns, nq).contiguous()
        words: Tensor | None = None
        function = functions.of_data(layout)
        if function is not None:
            data = source.table if source.indices is None else source.indices
            assert data is not None
            if data.dtype in (torch.bool, torch.int16):
                data = data.view(torch.uint8) if data.dtype == torch.bool else data.int()
            words = torch.zeros(patterns * nq, -(-nk // 32), dtype=torch.int32, device=device)
            _launch(function, device, (data.flatten(0, 1), words, errors.flatten()), (nk, -1))
        found = (words, errors)
        if source.capacity is None and layout.keeps_what_is_derived:
            layout.derived_bits = found
    return found


class _Dummies(NamedTuple):
    """Arrays for arguments that are not looked at."""

    words: Tensor
    table: Tensor
    own: Tensor
    tiles: Tensor


@functools.cache
def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


@functools.cache
def _dummies(device: torch.device) -> _Dummies:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return _Dummies(zeros(1, 1), zeros(1, 1, 1), zeros(1, 4), zeros(1, 2))


def mark_invalid(
    errors: Tensor, heads: tuple[int, int], block: int, of_queries: Tensor, *others: Tensor
) -> bool:
    """Write NaN into results of block rows with errors, in place; False where nothing was done.

    Args:
        errors: Why block rows are not as asked for, or 0, uint8 (patterns, rows).
        heads: Batch entries and heads with patterns of their own.
        block: Queries of a block row.
        of_queries: Results (b, s, h, d), contiguous, in 16 bits.
        others: lse (b, h, s), or dk and dv (b, s_kv, h_kv, d), of which whole heads get NaN.
    """
    device, dtype = of_queries.device, str(of_queries.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or device.type != "cuda":
        return False
    name = f"invalid_rows_{dtype}_{'backward' if len(others) == 2 else 'forward'}"
    function = _usable(device, DeviceFacts.of(device), functools.partial(_load, name))
    if function is None:
        return False
    _launch(
        function, device, (errors.flatten(), of_queries, others[0], others[-1]), (*heads, block)
    )
    return True


def _usable(device: torch.device, facts: DeviceFacts, load: Callable[[str], Any]) -> Any:
    """What `load` makes for the device; None where its kernels cannot run there."""
    if device.type != "cuda" or _reason():
        return None
    return load(facts.arch + "a" * (facts.arch == "sm_90"))


@functools.cache
def _reason() -> str | None:
    return dsl_unsupported_reason()  # which looks into the packages that are installed


def _ready(device: torch.device, *functions: Callable[..., None]) -> bool:
    """Whether functions can be launched now: a CUDA graph cannot capture that code is loaded."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        return True
    return all((function, device.index) in _loaded for function in functions)


def _launch(function: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    flat = [x for some in arguments for x in some]
    if device.index == torch._C._cuda_getDevice():
        function(*flat)
    else:
        with torch.cuda.device(device):
            function(*flat)
    _loaded.add((function, device.index))


class _Functions(NamedTuple):
    """The compiled kernels."""

    from_int64: Callable[..., None]
    from_int32: Callable[..., None]
    from_table: Callable[..., None]
    count_tiles: Callable[..., None]
    work_items: Callable[..., None]
    list_tiles: Callable[..., None]
    own_bits: Callable[..., None]

    def of_data(self, layout: DeviceLayout) -> Callable[..., None] | None:
        """What makes words of the layout's data; None where all blocks are chosen."""
        indices = layout.source.indices
        if indices is None:
            return None if layout.source.table is None else self.from_table
        return self.from_int64 if indices.dtype == torch.int64 else self.from_int32

    def needed(self, layout: DeviceLayout, cut: Cut) -> list[Callable[..., None]]:
        """What a schedule launches."""
        lists = [self.count_tiles, self.work_items, self.list_tiles]
        of_data = self.of_data(layout)
        return [*lists, *([of_data] if of_data else []), *([self.own_bits] if cut.own else [])]


def data_kernel_names() -> list[str]:
    """The names of all kernels for layouts of data."""
    invalid = [f"invalid_rows_{d}_{p}" for d in _DTYPES for p in ("forward", "backward")]
    return [*_Functions._fields, *invalid]


def compile_data_kernel(name: str, arch: str) -> Any:
    """Compile a kernel for an architecture, as "sm_90a", whether or not there is a GPU."""
    from sparse_flash.kernels import data_lists, invalid_rows, work_items

    kind, _, rest = name.partition("_")
    if kind == "from":
        return data_lists.compile_block_bits(rest, arch)
    if kind == "invalid":
        _, dtype, direction = rest.split("_")
        return invalid_rows.compile_invalid_rows(dtype, direction == "backward", arch)
    if name == "work_items":
        return work_items.compile_work_items(arch)
    if name == "own_bits":
        return data_lists.compile_own_bits(arch)
    return data_lists.compile_list_tiles(name == "list_tiles", arch)


@functools.cache
def _load(name: str, arch: str) -> Callable[..., None]:
    """A kernel: from the disk, or compiled in a second or two."""
    key = f"{name} {arch}"
    return load_or_compile(f"{name}-{arch}", key, lambda: compile_data_kernel(name, arch))


@functools.cache
def _functions(arch: str) -> _Functions:
    return _Functions(*(_load(name, arch) for name in _Functions._fields))
