"""A rule as a list of NumPy operations: traced once, run for many rectangles of elements."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
# A function, the numbers of its inputs, whether it takes `out`, the number of its result.
Step = tuple[Callable[..., Any], list[int], bool, int]

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

    @property
    def takes_out(self) -> bool:
        """Whether the function writes into an array given as `out`."""
        return isinstance(self.function, np.ufunc | _Cast) and self.sample.ndim > 0

    def shape(self, rectangles: Shape) -> tuple[int, ...]:
        """The shape of the array for rectangles `(n, height, width)`."""
        few = self.sample.shape
        if not few:
            return ()
        n, height, width = rectangles
        return (n, height if few[1] == 2 else 1, width if few[2] == 2 else 1)


class _Cast:
    """`astype`, with an optional output array."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __call__(self, x: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        if out is None:
            return x.astype(self.dtype)
        np.copyto(out, x, casting="unsafe")
        return out


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
        full = [(i, x) for i, x in enumerate(self._values) if x.sample.size == 4]
        self.bytes_each = sum(
            {self._memory.get(i, ~i): x.sample.itemsize for i, x in full}.values()
        )
        most = [x.function.most for _, x in full if hasattr(x.function, "most")]
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
    """Operations with arrays for their results, for rectangles of one shape.

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
        self._axis = axis = 0 if shape[0] > 1 else 1
        self._total = shape[axis]
        rows = at_once // max(1, math.prod(shape) // self._total)
        self._length = min(self._total, 1 << max(0, rows.bit_length() - 1))
        n, height, width = shape
        piece = (n, self._length, width) if axis else (self._length, height, width)
        number = {id(value): i for i, value in enumerate(values)}
        result = len(values) - 1
        self.arrays: list[Any] = [value.sample for value in values]
        self._steps: dict[tuple[int, ...], list[Step]] = {
            (1, 2, 1): [], (1, 1, 2): [], (1, 2, 2): []
        }  # fmt: skip
        kept: dict[int, NDArray[Any]] = {}
        for i, value in enumerate(values):
            if not value.inputs or not value.sample.ndim:  # its sample is its value
                continue
            whole = value.sample.size == 2 or i == result
            if i in memory and memory[i] in kept:
                self.arrays[i] = kept[memory[i]].view(value.sample.dtype)
            elif i in memory or i == result:
                size = value.shape(shape if whole else piece)
                self.arrays[i] = kept[memory.get(i, ~i)] = np.empty(size, value.sample.dtype)
            inputs = [number[id(x)] for x in value.inputs]
            self._steps[value.sample.shape].append((value.function, inputs, i in memory, i))
        sizes = [value.sample.size for value in values]
        moved = [(1, 2, 1)] if axis else [(1, 2, 1), (1, 1, 2)]
        self._cut = [i for i, x in enumerate(values) if x.sample.shape in moved] + [result]
        self._full = [i for i in memory if sizes[i] == 4 and i != result]
        self._seen: list[Any] = [None, None]

    def run(self, *indices: NDArray[np.int64]) -> NDArray[Any]:
        """The result; operations on one index are skipped if it is that of the previous run."""
        arrays, (of_q, of_kv, of_both) = self.arrays, self._steps.values()
        for axis, (index, steps) in enumerate(zip(indices, (of_q, of_kv), strict=True)):
            if self._seen[axis] is None or not np.array_equal(self._seen[axis], index):
                arrays[axis] = self._seen[axis] = index
                _compute(arrays, steps)
        if not of_both:
            return arrays[-1]
        result, before = arrays[-1], (slice(None),) * self._axis
        for start in range(0, self._total, self._length):
            some, part = list(arrays), (*before, slice(start, start + self._length))
            for i in self._cut:
                some[i] = arrays[i][part]
            if start + self._length > self._total:
                part = (*before, slice(self._total - start))
                for i in self._full:
                    some[i] = arrays[i][part]
            out = some[-1]
            _compute(some, of_both)
            if some[-1] is not out:
                out[...] = some[-1]
        return result


def _compute(arrays: list[Any], steps: list[Step]) -> None:
    for function, inputs, takes_out, number in steps:
        given = [arrays[i] for i in inputs]
        if takes_out:
            function(*given, out=arrays[number])
        else:
            arrays[number] = function(*given)


def _memory(values: list[Value]) -> dict[int, int]:
    """The memory of each result by its number: one may use that of values no longer needed.

    The results of functions without `out` are absent.
    """
    number = {id(value): i for i, value in enumerate(values)}
    last = {number[id(x)]: i for i, value in enumerate(values) for x in value.inputs}
    # Other functions may return a view of an argument: its memory is not reused.
    viewed = {number[id(x)] for value in values if not value.takes_out for x in value.inputs}
    found: dict[int, int] = {}
    free: dict[int, list[int]] = {1: [], 2: [], 4: [], 8: []}  # by size of an element
    for i, value in enumerate(values):
        if not value.inputs or not value.takes_out:
            continue
        found[i] = i
        if value.sample.size != 4 or value is values[-1]:
            continue
        size = value.sample.itemsize
        ends = [
            j
            for j in dict.fromkeys(number[id(x)] for x in value.inputs)
            if last[j] == i and j not in viewed and j in found and values[j].sample.size == 4
        ]
        # An operation may overwrite an operand that no other operation reads.
        same = [j for j in ends if values[j].sample.itemsize == size]
        for j in ends:
            if j not in same[:1]:
                free[values[j].sample.itemsize].append(found[j])
        if same:
            found[i] = found[same[0]]
        elif free[size]:
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
