"""A rule as a list of NumPy operations: traced once, run for many rectangles of elements."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
Call = Callable[[], Any]

# Shapes of samples: of what queries, keys, or both determine.
_LINES: list[tuple[int, ...]] = [(1, 2, 1), (1, 1, 2)]
_FULL = (1, 2, 2)
_CACHE = 1 << 20  # bytes of the arrays of a piece: about half the cache of a core


class Value:
    """The result of one operation: an array for each rectangle.

    Args:
        function: A ufunc, or a function of arrays that returns a new array.
        inputs: Its arguments.

    Attributes:
        sample: The result for two queries and two keys. Its dtype is that of all results. Its
            shape, `(1, 2, 1)`, `(1, 1, 2)`, `(1, 2, 2)` or `()`, shows which indices matter.
    """

    __slots__ = ("function", "inputs", "sample")

    def __init__(self, function: Callable[..., NDArray[Any]], *inputs: Value) -> None:
        self.function, self.inputs = function, inputs
        self.sample: NDArray[Any] = np.asarray(function(*(value.sample for value in inputs)))

    @classmethod
    def number(cls, number: Any, dtype: Any) -> Value:
        """The same number everywhere."""
        array = np.asarray(number, dtype)
        return cls(lambda: array)

    def cast(self, dtype: Any) -> Value:
        """The value in another dtype; the lower bits, if that is smaller."""
        if self.sample.dtype == dtype:
            return self
        if not self.inputs and not self.sample.ndim:
            return Value.number(self.sample.astype(dtype), dtype)
        return Value(_Cast(dtype), self)

    def view(self, dtype: Any) -> Value:
        """The same bits in another dtype of this size."""
        return Value(_View(dtype), self)

    def shape(self, rectangles: Shape) -> tuple[int, ...]:
        """The shape of the array for rectangles `(n, height, width)`."""
        few = self.sample.shape
        if not few:
            return ()
        n, height, width = rectangles
        return (n, height if few[1] == 2 else 1, width if few[2] == 2 else 1)


class _Cast:
    """`astype`."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        return x.astype(self.dtype)


class _View:
    """The same memory in another dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        return x.view(self.dtype)


class Program:
    """The operations behind a value, in order.

    Rectangles are computed in pieces whose arrays fit the cache of a core together. Arrays are
    allocated once per shape and thread, and results share memory: the system zeroes no new pages.

    Args:
        result: The value to compute.
        q: Index of queries, from `index`.
        kv: Index of keys, from `index`.

    Attributes:
        bytes_each: Bytes of all arrays per element of a piece.
        of_torch: Whether functions of torch compute a part of it.

    >>> q, kv = Program.index([0, 1], 1), Program.index([0, 1], 2)
    >>> less = Value(np.less, Value(np.multiply, q, kv), Value.number(3, np.int64))
    >>> Program(less, q, kv).run(np.array([[[1], [2]]]), np.array([[[1, 2, 3]]]))
    array([[[ True,  True, False],
            [ True, False, False]]])
    """

    def __init__(self, result: Value, q: Value, kv: Value) -> None:
        self._values = _ordered(result, (q, kv))
        self._memory = _memory(self._values)
        self._bound = threading.local()
        if any(x.sample.ndim and x.sample.shape not in (*_LINES, _FULL) for x in self._values):
            raise ValueError("a value of another shape than the indices")
        full = {i: x for i, x in enumerate(self._values) if x.sample.shape == _FULL}
        sizes = {self._memory[i]: x.sample.itemsize for i, x in full.items() if i in self._memory}
        self.bytes_each = sum(sizes.values())
        most = [x.function.most for x in full.values() if hasattr(x.function, "most")]
        self.of_torch = bool(most)
        self._at_once = min([_CACHE // max(1, self.bytes_each), *most])  # elements of a piece

    @staticmethod
    def index(sample: Any, axis: int) -> Value:
        """An index: of queries (axis 1) or keys (axis 2). sample: Two of them."""
        array = np.asarray(sample, np.int64).reshape((1, 2, 1) if axis == 1 else (1, 1, 2))
        return Value(lambda: array)

    def run(self, q: NDArray[np.int64], kv: NDArray[np.int64]) -> NDArray[Any]:
        """The result for indices `(n, height, 1)` and `(n, 1, width)`, valid until the next run."""
        shape = (len(q), q.shape[1], kv.shape[2])
        bound: dict[Shape, _Bound] = self._bound.__dict__.setdefault("shapes", {})
        if shape not in bound:
            bound[shape] = _Bound(self._values, self._memory, shape, self._at_once)
        return bound[shape].run(q, kv)


class _Bound:
    """Operations with arrays for their arguments and results, for rectangles of one shape.

    Args:
        values: Queries, keys, ..., the result.
        memory: See `_memory`.
        shape: Shape of the rectangles.
        at_once: Elements of a piece.
    """

    def __init__(
        self, values: list[Value], memory: dict[int, int], shape: Shape, at_once: int
    ) -> None:
        # A single rectangle is cut between rows, several are cut between rectangles.
        axis = 0 if shape[0] > 1 else 1
        rows = at_once // max(1, math.prod(shape) // shape[axis])
        length = min(shape[axis], 1 << max(0, rows.bit_length() - 1))
        piece = (shape[0], length, shape[2]) if axis else (length, *shape[1:])
        arrays, inputs = _arrays(values, memory, shape, piece), _inputs(values)
        result, before = len(values) - 1, (slice(None),) * axis
        shapes = [value.sample.shape for value in values]
        moved = _LINES[:1] if axis else _LINES
        self._calls: tuple[list[Call], ...] = ([], [], [])  # on queries, on keys, on both
        for i, value in enumerate(values):
            if i > 1 and shapes[i] in _LINES and not _is_alias(i, values):
                given = [arrays[j] for j in inputs[i]]
                self._calls[_LINES.index(shapes[i])].append(_call(value, given, arrays[i]))
        for start in range(0, shape[axis], length):
            part = (*before, slice(start, start + length))
            rest = (*before, slice(shape[axis] - start))
            some = [
                x[part] if i == result or shapes[i] in moved
                else x[rest] if shapes[i] == _FULL else x
                for i, x in enumerate(arrays)
            ]  # fmt: skip
            self._calls[2].extend(
                _call(value, [some[j] for j in inputs[i]], some[i])
                for i, value in enumerate(values)
                if shapes[i] == _FULL and not _is_alias(i, values)
            )
        self._indices, self._result = arrays[:2], arrays[result]
        self._known = [False, False]  # whether arrays of an index are those of the previous run

    def run(self, *indices: NDArray[np.int64]) -> NDArray[Any]:
        """The result; operations on one index are skipped if it is that of the previous run."""
        for axis, (index, mine) in enumerate(zip(indices, self._indices, strict=True)):
            if not self._known[axis] or not np.array_equal(mine, index):
                self._known[axis] = False
                np.copyto(mine, index)
                for call in self._calls[axis]:
                    call()
                self._known[axis] = True
        for call in self._calls[2]:
            call()
        return self._result


def _call(value: Value, inputs: list[NDArray[Any]], out: NDArray[Any]) -> Call:
    """The operation of a value on these arrays."""
    if isinstance(value.function, np.ufunc):
        return functools.partial(value.function, *inputs, out=out)
    if isinstance(value.function, _Cast):
        return functools.partial(np.copyto, out, inputs[0], casting="unsafe")
    return lambda: np.copyto(out, value.function(*inputs))


def _is_alias(i: int, values: list[Value]) -> bool:
    """Whether a value has the memory of another one; the result has its own."""
    return isinstance(values[i].function, _View) and i < len(values) - 1


def _inputs(values: list[Value]) -> list[list[int]]:
    """The numbers of the inputs of each value."""
    number = {id(value): i for i, value in enumerate(values)}
    return [[number[id(x)] for x in value.inputs] for value in values]


def _arrays(
    values: list[Value], memory: dict[int, int], shape: Shape, piece: Shape
) -> list[NDArray[Any]]:
    """Arrays for the values: lines and the result as long as `shape`, others as `piece`."""
    arrays: list[NDArray[Any]] = [value.sample for value in values]
    kept: dict[int, NDArray[Any]] = {}
    for i, (value, inputs) in enumerate(zip(values, _inputs(values), strict=True)):
        if _is_alias(i, values):
            arrays[i] = value.function(arrays[inputs[0]])
        elif i in memory:
            if memory[i] not in kept:
                whole = value.sample.shape in _LINES or i == len(values) - 1
                size = value.shape(shape if whole else piece)
                kept[memory[i]] = np.empty(size, value.sample.dtype)
            arrays[i] = kept[memory[i]].view(value.sample.dtype)
    return arrays


def _memory(values: list[Value]) -> dict[int, int]:
    """The memory of each result by its number: one may use that of values no longer needed.

    Numbers, and values with the memory of another one, are absent.
    """
    inputs = _inputs(values)
    last = {j: i for i, numbers in enumerate(inputs) for j in numbers}
    viewed = {numbers[0] for i, numbers in enumerate(inputs) if _is_alias(i, values)}
    found: dict[int, int] = {}
    free: dict[int, list[int]] = {}  # by size of an element
    for i, value in enumerate(values):
        if not value.sample.ndim or _is_alias(i, values):
            continue
        found[i] = i
        if value.sample.shape != _FULL or i == len(values) - 1:
            continue
        size = value.sample.itemsize
        ends = [
            j
            for j in dict.fromkeys(inputs[i])
            if last[j] == i and j not in viewed and j in found and values[j].sample.shape == _FULL
        ]
        # An operation may overwrite an operand that no other operation reads.
        same = [j for j in ends if values[j].sample.itemsize == size]
        for j in ends:
            if j not in same[:1]:
                free.setdefault(values[j].sample.itemsize, []).append(found[j])
        if same:
            found[i] = found[same[0]]
        elif free.get(size):
            found[i] = free[size].pop()
    return found


def _ordered(result: Value, first: tuple[Value, ...]) -> list[Value]:
    """All values that the result needs, each after its inputs; `first` before all others."""
    done = {id(value): value for value in first}
    waiting = [result]
    while waiting:
        value = waiting[-1]
        missing = [x for x in value.inputs if id(x) not in done]
        if missing:
            waiting += missing
        else:
            done.setdefault(id(value), waiting.pop())
    order = list(done.values())
    if order[-1] is not result:  # an index itself
        order.append(Value(_Cast(result.sample.dtype), result))
    return order
