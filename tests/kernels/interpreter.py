"""Runs small kernels as ordinary Python, a thread for each thread, where there is no GPU.

The sources of the kernels are executed with a stand-in for the DSL. It has all that kernels for
layouts of data use: numbers of fixed width, tensors, votes, shuffles, reductions and barriers.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

_here = threading.local()  # cta, thread, grid, memory of the CTA, and its meeting points


class Number:
    """A number of fixed width, with NumPy's arithmetic."""

    __slots__ = ("value",)
    __hash__ = None

    def __init__(self, value):
        self.value = value

    def to(self, kind):
        return kind(self.value)

    def __bool__(self):
        return bool(self.value)

    def __index__(self):
        return int(self.value)

    def __neg__(self):
        return Number(-self.value)


def _plain(x):
    return x.value if isinstance(x, Number) else x


def _operators():
    arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod")
    for name in (*arithmetic, "and", "or", "xor", "lshift", "rshift"):
        for prefix in ("", "r"):
            full = f"__{prefix}{name}__"

            def run(self, other, full=full):
                return Number(getattr(self.value, full)(_plain(other)))

            setattr(Number, full, run)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        full = f"__{name}__"

        def compare(self, other, full=full):
            return bool(getattr(self.value, full)(_plain(other)))

        setattr(Number, full, compare)


_operators()


def _kind(numpy_type):
    def make(value=0):
        value = _plain(value)
        if np.issubdtype(numpy_type, np.integer) and not isinstance(value, int):
            return Number(np.array(value).astype(numpy_type)[()])
        return Number(numpy_type(value))

    return make


Int32, Int64, Uint8, Float32 = map(_kind, (np.int32, np.int64, np.uint8, np.float32))
Float32.inf = Float32(np.inf)


class Pointer(SimpleNamespace):
    """An element of a tensor."""

    def __add__(self, other):
        return Pointer(data=self.data, at=self.at + int(other))


class Memory:
    """A tensor in memory."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, at):
        return Number(self.data[self._checked(at)])

    def __setitem__(self, at, value):
        self.data[self._checked(at)] = _plain(value)

    def _checked(self, at):
        at = tuple(map(int, at)) if isinstance(at, tuple) else (int(at),)
        assert len(at) == self.data.ndim
        assert all(0 <= i < n for i, n in zip(at, self.data.shape, strict=True)), (at, self.data)
        return at

    @property
    def iterator(self):
        return Pointer(data=self.data.reshape(-1), at=0)


def _size(tensor, mode):
    return Int32(tensor.data.shape[mode[0]])


def _range(*ends, unroll=None):
    for i in range(*map(int, ends)):
        yield Int32(i)


def _of_warp(value):
    """The values of all threads of a warp."""
    thread, state = _here.thread, _here.state
    first, _here.turn = thread // 32 * 32, 1 - _here.turn
    values = state.values[_here.turn]  # those of the turn before may still be read
    values[thread] = value
    state.warps[thread // 32].wait()
    return values[first : first + 32]


def _sync():
    _here.state.all.wait()


def _ballot(vote):
    bits = sum(1 << lane for lane, x in enumerate(_of_warp(bool(vote))) if x)
    return Int32(np.uint32(bits).astype(np.int32))


def _reduction(value, operation):
    return functools.reduce(operation, _of_warp(value))


def _atomic_add(goal, number, **_):
    with _here.state.lock:
        before = goal.data[goal.at]
        goal.data[goal.at] += _plain(number)
    return Number(before)


def _bits(_, write_only_types, read_only_args):
    """`mov.b32`, the one instruction of PTX that the kernels use."""
    return Number(read_only_args[0].value.view(type(write_only_types[0](0).value)))


def _best(choose):
    def run(*xs):
        kind = next(type(x.value) for x in xs if isinstance(x, Number))
        return Number(kind(choose(map(_plain, xs))))

    return run


class _Smem:
    """Memory of a CTA, allocated in one order by all threads."""

    def __init__(self):
        self.taken = 0

    def allocate_tensor(self, kind, layout, alignment):
        shape = layout if isinstance(layout, tuple) else (layout,)
        with _here.state.lock:
            kept = _here.state.memory
            if self.taken == len(kept):
                kept.append(Memory(np.zeros(shape, type(kind(0).value))))
        self.taken += 1
        return kept[self.taken - 1]


def _kernel(function):
    def bound(self, *arguments):
        def launch(grid, block, **_):
            for cta in range(int(grid[0])):
                _run(functools.partial(function, self, *arguments), cta, grid, int(block[0]))

        return SimpleNamespace(launch=launch)

    return bound


def _run(function, cta, grid, threads):
    """One CTA."""
    state = SimpleNamespace(
        values=([None] * threads, [None] * threads),
        warps=[threading.Barrier(32) for _ in range(threads // 32)],
        all=threading.Barrier(threads),
        lock=threading.Lock(),
        memory=[],
        errors=[],
    )

    def one(thread):
        _here.cta, _here.thread, _here.grid, _here.state = cta, thread, grid, state
        _here.turn = 0
        try:
            with np.errstate(over="ignore"):
                function()
        except BaseException as error:
            state.errors.append(error)
            for barrier in (*state.warps, state.all):
                barrier.abort()

    started = [threading.Thread(target=one, args=(n,)) for n in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for error in state.errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error


def _identity(function):
    return function


arch = SimpleNamespace(
    block_idx=lambda: (Int32(_here.cta),),
    thread_idx=lambda: (Int32(_here.thread),),
    grid_dim=lambda: (Int32(_here.grid[0]),),
    warp_idx=lambda: Int32(_here.thread // 32),
    lane_idx=lambda: Int32(_here.thread % 32),
    sync_threads=_sync,
    vote_ballot_sync=_ballot,
    shuffle_sync=lambda value, lane: _of_warp(value)[int(lane)],
    popc=lambda x: Int32((int(x) & 0xFFFFFFFF).bit_count()),
    warp_reduction=_reduction,
    atomic_add=_atomic_add,
    inline_ptx=_bits,
)


def _modules():
    cute = ModuleType("cutlass.cute")
    cute.jit, cute.kernel, cute.Tensor, cute.arch = _identity, _kernel, Memory, arch
    cute.size, cute.ceil_div = _size, lambda a, b: -(-a // b)
    cute.make_layout = lambda shape, stride=None: shape
    cutlass = ModuleType("cutlass")
    cutlass.Int32, cutlass.Int64, cutlass.Uint8, cutlass.Float32 = Int32, Int64, Uint8, Float32
    cutlass.BFloat16 = cutlass.Float16 = Float32
    cutlass.Constexpr = cutlass.Numeric = object
    cutlass.range, cutlass.range_constexpr, cutlass.const_expr = _range, range, _identity
    cutlass.min, cutlass.max = _best(min), _best(max)
    cutlass.utils = SimpleNamespace(SmemAllocator=_Smem)
    cutlass.cute = cute
    return {"cutlass": cutlass, "cutlass.cute": cute}


def load(monkeypatch, name):
    """The module `sparse_flash.kernels.<name>`, for this interpreter."""
    spec = importlib.util.find_spec(f"sparse_flash.kernels.{name}")
    for key, module in _modules().items():
        monkeypatch.setitem(sys.modules, key, module)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(kernel, *arguments):
    """Launch a kernel on tensors of the CPU and numbers."""
    kernel(*map(_argument, arguments), None)


def _argument(x):
    if isinstance(x, torch.Tensor):
        return Memory(x.float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy())
    return Float32(x) if isinstance(x, float) else Int32(x)
