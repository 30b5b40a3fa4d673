"""Schedules of layouts of data by kernels, and NaN for invalid rows.

They run on every GPU that the DSL compiles for. Where they cannot run, `schedule_of_data` returns
None and `mark_invalid` returns False: PyTorch then computes the same, in many more launches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.data_bits import Cut, CutFacts, cut_by, is_known
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.kernels.schedule import WORK_FIELDS, CostModel, Schedule
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import (
    BIT_TILES,
    TILES,
    Grid,
    Source,
    StaticSource,
    grid_of,
)
from sparse_flash.masks.device_within import documents_and_rest
from sparse_flash.masks.modes import is_capturing
from torch import Tensor

_COUNTERS = 8  # pairs of counters that are zeroed at once, for as many schedules
_WORDS = 12  # where `data_lists.Sizes` has the number of words
_ALIGNED = 4  # numbers: kernels take arrays at multiples of 16 bytes
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


class Recipe(NamedTuple):
    """Arguments of a schedule's kernels that do not depend on the data: see `recipe_of`.

    lists: The fields of `data_lists.Sizes`.
    items: The numbers of `work_items.WorkItems`.
    own: The numbers of `data_lists.OwnBits`.
    parts: Shape, strides and offset of parts of one array: work, combine, counts, kv_lens, tiles,
        begins, tiles and partial tiles of each line, and `own`.
    size: Numbers in that array.
    num_bits: Most bit tiles of their own.
    """

    lists: tuple[int, ...]
    items: tuple[float, ...]
    own: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    size: int
    num_bits: int


def schedule_of_data(
    layout: DeviceLayout, lines: Lines, sizes: ScheduleSizes, costs: CostModel, facts: DeviceFacts
) -> tuple[Schedule, Tensor] | None:
    """The schedule, and errors of block rows, uint8 (P, nq)."""
    device = layout.device
    functions: _Functions | None = _usable(device, facts, _functions)
    if functions is None or not is_known(layout.source):
        return None
    if not _ready(device, functions.needed(layout.source, lines.transposed)):
        return None
    found = _block_bits(layout, functions)
    cut = cut_by(layout, lines.tile, lines.transposed)
    recipe = recipe_of(layout.source.static, lines, sizes, costs, cut.facts)
    array = torch.empty(recipe.size, dtype=torch.int32, device=device)
    parts = [array.as_strided(*part) for part in recipe.parts]
    work, combine, totals, kv_lens, tiles, begins, counts, partials, own = parts
    used, data = found.counters(), _data(found.words, cut, layout.num_patterns, device)
    _launch(
        functions.list_columns if lines.transposed else functions.list_rows,
        device,
        (*data, begins, counts, partials, tiles, own, used, found.errors.view(-1)),
        recipe.lists,
    )
    results = (work, combine, totals, kv_lens)
    _launch(functions.work_items, device, (begins, counts, partials), results, recipe.items)
    bits = cut.bits
    if cut.facts.own:
        shape = (recipe.num_bits, *cut.bits.shape[1:])
        bits = torch.empty(shape, dtype=torch.int32, device=device)
        _launch(functions.own_bits, device, (own, used, data[3], cut.bits, bits), recipe.own)
    made = Schedule(
        counts=totals,
        work=work,
        tiles=tiles,
        bits=bits,
        num_bit_tiles=len(bits),
        combine=combine,
        kv_lens=kv_lens,
        num_splits=2 * sizes.extra,
        num_ctas=min(len(work), sizes.ctas),
        tile=lines.tile[::-1] if lines.transposed else lines.tile,
    )
    return made, found.errors


@functools.lru_cache(1024)
def recipe_of(
    source: StaticSource,
    lines: Lines,
    sizes: ScheduleSizes,
    costs: CostModel,
    cut: CutFacts,
) -> Recipe:
    """The recipe of a schedule.

    Args:
        source: Properties of the layout that do not depend on the data.
        lines: How the tiles are listed.
        sizes: Sizes of the schedule.
        costs: Costs of the kernel.
        cut: Facts of a `Cut`.
    """
    stacks = sizes.heads if source.heads[1] == lines.heads else source.heads[1]
    own_heads = stacks if lines.transposed else source.heads[1]
    count = source.heads[0] * own_heads * sizes.rows
    repeats = 1
    if lines.transposed:
        repeats = source.heads[0] * own_heads * lines.group // source.num_patterns
    capacity, own_most = source.capacities(lines.tile, cut.numbered > 0 and not cut.sets)
    capacity, own_most = repeats * capacity, max(1, repeats * own_most)
    grid = grid_of(source.lengths, lines.tile)
    assert grid is not None
    items, most_split = sizes.total + sizes.extra, min(sizes.total, sizes.extra)
    shapes = (
        *((items, WORK_FIELDS), (most_split, WORK_FIELDS), (2,), (sizes.batch,)),
        *((capacity + 1, 2), (count,), (count,), (count,), (own_most if cut.own else 1, 4)),
    )
    aligned = (-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes)
    starts = tuple(itertools.accumulate(aligned, initial=0))
    return Recipe(
        lists=list_sizes(source, grid, lines, own_heads, cut),
        items=(
            *(source.lengths[1], sizes.batch, sizes.heads, source.heads[0], own_heads),
            *(sizes.rows, sizes.groups),
            *(capacity, sizes.ctas, sizes.rest, costs.fewest_tiles, costs.item),
            *(costs.partial_tile - 1, costs.largest_share, costs.split, costs.combine),
            costs.long_item,
        ),
        own=(
            *(grid.rows, *lines.tile, *source.lengths[:2], grid.down, grid.across),
            *(cut.numbered, _all_blocks(grid), int(lines.transposed)),
        ),
        parts=tuple(zip(shapes, ((*shape[1:], 1) for shape in shapes), starts[:-1], strict=True)),
        size=starts[-1],
        num_bits=own_most,
    )


def list_sizes(
    source: StaticSource,
    grid: Grid,
    lines: Lines,
    stacked: int,
    cut: CutFacts,
) -> tuple[int, ...]:
    """The fields of `data_lists.Sizes`."""
    q_len, kv_len, _ = source.lengths
    return (
        *(grid.rows, grid.cols, *lines.tile, q_len, kv_len, *grid[2:], *source.num_blocks),
        *(source.num_words, _all_blocks(grid), cut.tables, cut.numbered, int(cut.own), cut.known),
        *(source.heads[1], lines.heads, lines.group, stacked),
    )


def _all_blocks(grid: Grid) -> int:
    """The set of all blocks of a tile, as an int32."""
    every = (1 << grid.cells) - 1
    return every - (1 << 32) if every >= 1 << 31 else every


def _data(
    words: Tensor | None, cut: Cut, patterns: int, device: torch.device
) -> tuple[Tensor, ...]:
    """words, states, table_of and numbers of `ListTiles`; zeros stand for absent ones."""
    one = constant_zeros((1, 1), device)
    return (
        one if words is None else words,
        constant_zeros((1, 1, 1), device) if cut.table is None else cut.table,
        constant_zeros((patterns,), device) if cut.table_of is None else cut.table_of,
        one if cut.numbers is None else cut.numbers,
    )


_zeros: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}  # graphs read them: kept


def constant_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int32 tensor of zeros that no kernel changes: one for each stream, made there."""
    on_gpu = device.type == "cuda"
    key = (shape, device, torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0)
    found = _zeros.get(key)
    if found is None:
        found = torch.zeros(shape, dtype=torch.int32, device=device)
        if not is_capturing(device):  # else it belongs to the CUDA graph
            _zeros[key] = found
    return found


class BlockBits:
    """A layout's data as kernels read them, for all of its schedules.

    Attributes:
        words: The chosen blocks, bit by bit, int32 (P x nq, ceil(nk / 32)); None: all are.
        errors: Why block rows are not as asked for, or 0, uint8 (P, nq). Kernels add to it.
    """

    def __init__(self, layout: DeviceLayout) -> None:
        patterns, rows = layout.num_patterns, layout.source.num_blocks[0]
        size = 4 * _ALIGNED * _COUNTERS  # bytes of the counters
        zeros = torch.zeros(size + patterns * rows, dtype=torch.uint8, device=layout.device)
        self._counters, self._taken = zeros[:size].view(torch.int32), 0
        self._captured = is_capturing(layout.device)
        self.words: Tensor | None = None
        self.errors = zeros.as_strided((patterns, rows), (rows, 1), size)

    def counters(self) -> Tensor:
        """Two zeros for another schedule, int32."""
        device = self.errors.device
        # Every replay of a CUDA graph needs zeros.
        if self._taken == _COUNTERS or is_capturing(device) != self._captured:
            return torch.zeros(2, dtype=torch.int32, device=device)
        self._taken += 1
        return self._counters.as_strided((2,), (1,), _ALIGNED * (self._taken - 1))


def _block_bits(layout: DeviceLayout, functions: _Functions) -> BlockBits:
    """The blocks of a layout, cut to its capacity. Kept with the layout."""
    found: BlockBits | None = layout.derived_bits
    if found is None:
        found, source, device = BlockBits(layout), layout.source, layout.device
        if not _number_documents(layout, functions, found.errors):
            wrong = layout.wrong_documents()
            if wrong is not None:
                found.errors += wrong
        function = functions.of_data(source)
        if function is not None:
            data = source.table if source.indices is None else source.indices
            assert data is not None
            if data.dtype in (torch.bool, torch.int16):
                data = data.view(torch.uint8) if data.dtype == torch.bool else data.int()
            shape = (len(found.errors.view(-1)), source.static.num_words)
            found.words = torch.empty(shape, dtype=torch.int32, device=device)
            arguments = (data.flatten(0, 1), found.words, found.errors.view(-1))
            _launch(function, device, arguments, (source.num_blocks[1],))
        if source.capacity is not None:
            _fit(layout, functions, found)
        if layout.keeps_what_is_derived:
            layout.derived_bits = found
    return found


def _number_documents(layout: DeviceLayout, functions: _Functions, errors: Tensor) -> bool:
    """Number the documents of a layout, and look for errors; False where there are none for it."""
    mask = layout.source.within
    if mask is None or not mask.on_device or mask.by_head:
        return False
    known = documents_and_rest(mask)
    if known is None or known[0].is_numbered or not layout.keeps_what_is_derived:
        return False
    cu_seqlens, length = known[0].cu_seqlens, known[0].extents()[0]
    numbers = torch.empty(length, dtype=torch.int32, device=layout.device)
    _launch(functions.number_documents, layout.device, (cu_seqlens, numbers, errors.view(-1)))
    known[0].numbers = numbers
    return True


def _fit(layout: DeviceLayout, functions: _Functions, found: BlockBits) -> None:
    """Take out rows beyond the capacity, marked, and blocks of which the mask leaves nothing."""
    source, device = layout.source, layout.device
    cut = cut_by(layout, layout.block, transposed=None)
    assert source.capacity is not None
    grid = grid_of(source.lengths, layout.block)
    assert grid is not None
    rows = len(found.errors.view(-1))
    fitting = torch.empty(rows, -(-source.num_blocks[1] // 32), dtype=torch.int32, device=device)
    counts = torch.empty(3, rows, dtype=torch.int32, device=device)
    lines = Lines(layout.block, source.heads[1], 1, transposed=False)
    options = list_sizes(source.static, grid, lines, 0, cut.facts)
    if found.words is None:
        options = (*options[:_WORDS], 0, *options[_WORDS + 1 :])
    rest = (constant_zeros((1, 4), device), constant_zeros((2,), device), found.errors.view(-1))
    arguments = (
        *_data(found.words, cut, layout.num_patterns, device),
        *counts.unbind(),
        fitting,
        *rest,
    )
    _launch(functions.fit_rows, device, arguments, options)
    ends = counts[1:].cumsum(1)
    most = (source.capacity[0], min(source.capacity))
    for n, code in enumerate((TILES, BIT_TILES)):
        if n == 0 or cut.numbers is not None:
            beyond = (ends[n] > most[n]) & (counts[1 + n] > 0)
            fitting.masked_fill_(beyond[:, None], 0)
            found.errors |= (beyond * code).to(torch.uint8).view_as(found.errors)
    found.words = fitting


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


def _ready(device: torch.device, functions: list[Callable[..., None]]) -> bool:
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
    fit_rows: Callable[..., None]
    list_rows: Callable[..., None]
    list_columns: Callable[..., None]
    work_items: Callable[..., None]
    own_bits: Callable[..., None]
    number_documents: Callable[..., None]

    def of_data(self, source: Source) -> Callable[..., None] | None:
        """The kernel that packs the data into words; None if all blocks are chosen."""
        indices = source.indices
        if indices is None:
            return None if source.table is None else self.from_table
        return self.from_int64 if indices.dtype == torch.int64 else self.from_int32

    def needed(self, source: Source, transposed: bool) -> list[Callable[..., None]]:
        """The kernels that a schedule may launch."""
        cut = source.within is not None and source.within.on_device
        every = (
            self.of_data(source),
            None if source.capacity is None else self.fit_rows,
            self.list_columns if transposed else self.list_rows,
            self.work_items,
            self.number_documents if cut else None,
            self.own_bits if cut else None,
        )
        return [*filter(None, every)]


def data_kernel_names() -> list[str]:
    """The names of all kernels for layouts of data."""
    invalid = [f"invalid_rows_{d}_{p}" for d in _DTYPES for p in ("forward", "backward")]
    return [*_Functions._fields, *invalid]


def compile_data_kernel(name: str, arch: str) -> Any:
    """Compile a kernel for an architecture, as "sm_90a", whether or not there is a GPU."""
    from sparse_flash.kernels import data_lists, document_bits, invalid_rows, work_items

    kind, _, rest = name.partition("_")
    if kind == "from":
        return data_lists.compile_block_bits(rest, arch)
    if kind == "invalid":
        _, dtype, direction = rest.split("_")
        return invalid_rows.compile_invalid_rows(dtype, direction == "backward", arch)
    if name == "work_items":
        return work_items.compile_work_items(arch)
    if name == "own_bits":
        return document_bits.compile_own_bits(arch)
    if name == "number_documents":
        return document_bits.compile_number_documents(arch)
    return data_lists.compile_list_tiles(name == "list_columns", name == "fit_rows", arch)


@functools.cache
def _load(name: str, arch: str) -> Callable[..., None]:
    """A kernel: from the disk, or compiled in a second or two."""
    key = f"{name} {arch}"
    return load_or_compile(f"{name}-{arch}", key, lambda: compile_data_kernel(name, arch))


@functools.cache
def _functions(arch: str) -> _Functions:
    return _Functions(*(_load(name, arch) for name in _Functions._fields))
