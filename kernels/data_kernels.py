"""Kernels for layouts of data: their input from the data, and NaN for invalid rows.

They run on every GPU that the DSL compiles for. Where they cannot run, `functions_for` returns None
and `mark_invalid` returns False: PyTorch then computes the same, in many more launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.data_bits import Cut, cut_by, is_known
from sparse_flash.kernels.data_recipes import ALIGNED, Lines, list_sizes
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import BIT_TILES, TILES, Source, grid_of
from sparse_flash.masks.device_within import documents_and_rest, numbers_of
from sparse_flash.masks.modes import is_capturing
from torch import Tensor

_COUNTERS = 8  # pairs of counters that are zeroed at once, for as many schedules
_COUNTER_SIZE = ALIGNED * _COUNTERS
_WORDS = 12  # where `data_lists.Sizes` has the number of words
_DTYPES = ("bfloat16", "float16")
loaded: set[tuple[Any, int | None]] = set()  # functions and indices of devices with their code


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
        numbers: Document of each token, int32 (1 or P, length); None: there are no documents.
        errors: Why block rows are not as asked for, or 0, uint8 (P, nq). Kernels add to it.
        flat_errors: The same, (P x nq,).
    """

    def __init__(self, layout: DeviceLayout, documents: Any = None) -> None:
        """Allocate errors and counters, zeros unless a kernel for `documents` writes them first."""
        patterns, rows = layout.num_patterns, layout.source.num_blocks[0]
        device, size = layout.device, _COUNTER_SIZE  # of counters; then errors
        space = -(-patterns * rows // 4)
        if documents is None:
            array = torch.zeros(size + space, dtype=torch.int32, device=device)
        else:  # counters, a copy of cu_seqlens, errors, numbers
            length, size = documents.of.length, size + 2 * documents.of.lengths.shape[0]
            array = torch.empty(size + space + length, dtype=torch.int32, device=device)
            documents.numbers = array.as_strided((length,), (1,), size + space)
        self.space, self._taken = array.as_strided((size,), (1,), 0), 0
        self._captured = is_capturing(device)
        self.words: Tensor | None = None
        self.numbers: Tensor | None = None
        data = array.view(torch.uint8)
        self.errors = data.as_strided((patterns, rows), (rows, 1), 4 * size)
        self.flat_errors = data.as_strided((patterns * rows,), (1,), 4 * size)

    def counters(self) -> Tensor:
        """Two zeros for another schedule, int32."""
        device = self.errors.device
        # Every replay of a CUDA graph needs zeros.
        if self._taken == _COUNTERS or is_capturing(device) != self._captured:
            return torch.zeros(2, dtype=torch.int32, device=device)
        self._taken += 1
        return self.space.as_strided((2,), (1,), ALIGNED * (self._taken - 1))

    def copy_of_cu_seqlens(self) -> Tensor:
        """The copy that the kernel for documents made, int64 (n,)."""
        return self.space[_COUNTER_SIZE:].view(torch.int64)


def block_bits(layout: DeviceLayout, functions: Functions) -> BlockBits:
    """The blocks of a layout, cut to its capacity. Kept with the layout."""
    found: BlockBits | None = layout.derived_bits
    if found is None:
        found = _read_documents(layout, functions)
        _read_blocks(layout, functions, found)
        if layout.source.capacity is not None:
            _fit(layout, functions, found)
        if layout.keeps_what_is_derived:
            layout.derived_bits = found
    return found


def _read_blocks(layout: DeviceLayout, functions: Functions, found: BlockBits) -> None:
    """The words of chosen blocks, and errors of their indices."""
    source, function = layout.source, functions.of_data(layout.source)
    if function is None:
        return
    data = source.table if source.indices is None else source.indices
    assert data is not None
    if data.dtype in (torch.bool, torch.int16):
        data = data.view(torch.uint8) if data.dtype == torch.bool else data.int()
    shape = (len(found.flat_errors), source.static.num_words)
    found.words = torch.empty(shape, dtype=torch.int32, device=layout.device)
    arguments = (data.flatten(0, 1), found.words, found.flat_errors)
    _launch(function, layout.device, *arguments, source.num_blocks[1])


def _read_documents(layout: DeviceLayout, functions: Functions) -> BlockBits:
    """The numbers of documents, and errors of their cu_seqlens."""
    mask, device = layout.source.within, layout.device
    if mask is None or not mask.on_device:
        return BlockBits(layout)
    known = None if mask.by_head else documents_and_rest(mask)
    if known is None or known[0].is_numbered or not layout.keeps_what_is_derived:
        found, wrong = BlockBits(layout), layout.wrong_documents()
        assert wrong is not None
        found.errors += wrong
        found.numbers = numbers_of(mask, layout.source.heads)
        return found
    reader = known[0]
    cu_seqlens = reader.readable()
    found = BlockBits(layout, reader)
    arguments = (cu_seqlens, reader.numbers, found.flat_errors, found.space)
    _launch(functions.of_documents(cu_seqlens.dtype), device, *arguments)
    reader.make_copy = found.copy_of_cu_seqlens
    found.numbers = reader.numbers[None]
    return found


def _fit(layout: DeviceLayout, functions: Functions, found: BlockBits) -> None:
    """Take out rows beyond the capacity, marked, and blocks of which the mask leaves nothing."""
    source, device = layout.source, layout.device
    cut = cut_by(layout, layout.block, transposed=None)
    assert source.capacity is not None
    grid = grid_of(source.lengths, layout.block)
    assert grid is not None
    rows = len(found.flat_errors)
    fitting = torch.empty(rows, -(-source.num_blocks[1] // 32), dtype=torch.int32, device=device)
    counts = torch.empty(3, rows, dtype=torch.int32, device=device)
    lines = Lines(layout.block, source.heads[1], 1, transposed=False)
    options = list_sizes(source.static, grid, lines, 0, cut.facts)
    if found.words is None:
        options = (*options[:_WORDS], 0, *options[_WORDS + 1 :])
    rest = (constant_zeros((1, 4), device), constant_zeros((2,), device), found.flat_errors)
    one = constant_zeros((1, 1), device)
    data = (
        one if found.words is None else found.words,
        *tables(cut, layout.num_patterns, device),
        one if found.numbers is None else found.numbers,
    )
    _launch(functions.fit_rows, device, *data, *counts.unbind(), fitting, *rest, *options)
    ends = counts[1:].cumsum(1)
    most = (source.capacity[0], min(source.capacity))
    for n, code in enumerate((TILES, BIT_TILES)):
        if n == 0 or cut.facts.numbered:
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
    device = of_queries.device
    function = _marking(of_queries.dtype, device, len(others) == 2)
    if function is None:
        return False
    _launch(function, device, errors.view(-1), of_queries, others[0], others[-1], *heads, block)
    return True


@functools.cache
def _marking(dtype: torch.dtype, device: torch.device, backward: bool) -> Any:
    """The kernel of `mark_invalid`; None where there is none."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES or device.type != "cuda":
        return None
    name = f"invalid_rows_{name}_{'backward' if backward else 'forward'}"
    return _usable(device, DeviceFacts.of(device), functools.partial(_load, name))


def functions_for(layout: DeviceLayout, facts: DeviceFacts, transposed: bool) -> Functions | None:
    """The kernels for the schedules of a layout; None where they cannot make it, or not now."""
    functions: Functions | None = _usable(layout.device, facts, _functions)
    if functions is None or not is_known(layout.source):
        return None
    return functions if _ready(layout.device, functions.needed(layout.source, transposed)) else None


def tables(cut: Cut, patterns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Arguments states and table_of of `ListTiles`; zeros stand for absent ones."""
    return (
        constant_zeros((1, 1, 1), device) if cut.table is None else cut.table,
        constant_zeros((patterns,), device) if cut.table_of is None else cut.table_of,
    )


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
    return all((function, device.index) in loaded for function in functions)


def _launch(function: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    if device.index == torch._C._cuda_getDevice():
        function(*arguments)
    else:
        with torch.cuda.device(device):
            function(*arguments)
    loaded.add((function, device.index))


class Functions(NamedTuple):
    """The compiled kernels."""

    from_int64: Callable[..., None]
    from_int32: Callable[..., None]
    from_table: Callable[..., None]
    fit_rows: Callable[..., None]
    list_rows: Callable[..., None]
    list_columns: Callable[..., None]
    work_items: Callable[..., None]
    own_bits: Callable[..., None]
    number_int64: Callable[..., None]
    number_int32: Callable[..., None]

    def of_data(self, source: Source) -> Callable[..., None] | None:
        """The kernel that packs the data into words; None if all blocks are chosen."""
        indices = source.indices
        if indices is None:
            return None if source.table is None else self.from_table
        return self.from_int64 if indices.dtype == torch.int64 else self.from_int32

    def of_documents(self, dtype: torch.dtype) -> Callable[..., None]:
        """The kernel that numbers documents, for cu_seqlens of this dtype."""
        return self.number_int64 if dtype == torch.int64 else self.number_int32

    def needed(self, source: Source, transposed: bool) -> list[Callable[..., None]]:
        """The kernels that a schedule may launch."""
        mask, number, known = source.within, None, None
        cut = mask is not None and mask.on_device
        if mask is not None and cut and not mask.by_head:
            known = documents_and_rest(mask)
        if known is not None and not known[0].is_numbered:
            number = self.of_documents(known[0].readable().dtype)
        every = (
            self.of_data(source),
            None if source.capacity is None else self.fit_rows,
            self.list_columns if transposed else self.list_rows,
            self.work_items,
            number,
            self.own_bits if cut else None,
        )
        return [*filter(None, every)]


def data_kernel_names() -> list[str]:
    """The names of all kernels for layouts of data."""
    invalid = [f"invalid_rows_{d}_{p}" for d in _DTYPES for p in ("forward", "backward")]
    return [*Functions._fields, *invalid]


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
    if kind == "number":
        return document_bits.compile_number_documents(rest, arch)
    return data_lists.compile_list_tiles(name == "list_columns", name == "fit_rows", arch)


@functools.cache
def _load(name: str, arch: str) -> Callable[..., None]:
    """A kernel: from the disk, or compiled in a second or two."""
    key = f"{name} {arch}"
    return load_or_compile(f"{name}-{arch}", key, lambda: compile_data_kernel(name, arch))


@functools.cache
def _functions(arch: str) -> Functions:
    return Functions(*(_load(name, arch) for name in Functions._fields))
