"""A rule as a list of NumPy operations: traced once, run for many rectangles of elements."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]


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

    Result arrays are allocated once per shape and thread. Later operations and rectangles reuse
    them: they stay in the cache, and the system zeroes no new pages.

    Args:
        result: The value to compute.
        q: Index of queries, from `index`.
        kv: Index of keys, from `index`.

    >>> q, kv = Program.index([0, 1], 1), Program.index([0, 1], 2)
    >>> less = Value(np.less, Value(np.multiply, q, kv), Value.number(3, np.int64))
    >>> Program(less, q, kv).run(np.array([[[1], [2]]]), np.array([[[1, 2, 3]]]))
    array([[[ True,  True, False],
            [ True, False, False]]])
    """

    def __init__(self, result: Value, q: Value, kv: Value) -> None:
        self._values = _ordered(result, (q, kv))
        self._bound = threading.local()
        sizes = [v.sample.itemsize for v in self._values if v.sample.size == 4]
        self.itemsize = max(sizes, default=1)  # bytes of the largest element

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
            bound[shape] = self._bind(shape)
        return bound[shape].run(q, kv)

    def _bind(self, shape: Shape) -> _Bound:
        """The operations with arrays for their results."""
        values = self._values
        number = {id(value): i for i, value in enumerate(values)}
        last = {id(x): i for i, value in enumerate(values) for x in value.inputs}
        # Other functions may return a view of an argument: its memory is not reused.
        viewed = {id(x) for value in values if not value.takes_out for x in value.inputs}
        arrays: list[Any] = [value.sample for value in values]
        steps: dict[tuple[int, ...], list[Any]] = {(1, 2, 1): [], (1, 1, 2): [], (): []}
        free: dict[int, list[NDArray[Any]]] = {1: [], 2: [], 4: [], 8: []}  # by size of an element
        for i, value in enumerate(values):
            if not value.inputs:
                continue
            inputs, out = [number[id(x)] for x in value.inputs], None
            if value.takes_out:
                full, size = value.shape(shape), value.sample.itemsize
                ends = [
                    arrays[number[id(x)]]
                    for x in {id(x): x for x in value.inputs}.values()
                    if last[id(x)] == i and id(x) not in viewed
                    if x.inputs and x.takes_out and x.sample.size == value.sample.size == 4
                ]
                # An operation may overwrite an operand that no other operation reads.
                memory = next((x for x in ends if x.itemsize == size), None)
                for x in ends:
                    if x is not memory:
                        free[x.itemsize].append(x)
                if memory is None and value.sample.size == 4 and free[size]:
                    memory = free[size].pop()
                out = np.empty(full, value.sample.dtype) if memory is None else memory
                out = out.view(value.sample.dtype)
                arrays[i] = out
            of = value.sample.shape
            steps[of if of in steps else ()].append((value.function, inputs, out, i))
        return _Bound(arrays, *steps.values())


class _Bound:
    """Operations with arrays for results of one shape.

    Args:
        arrays: Array of each value: queries, keys, ..., the result.
        of_q: Operations on queries alone: (function, indices of inputs, output array or None, index
            of the output).
        of_kv: Operations on keys alone.
        of_both: All others.
    """

    def __init__(
        self, arrays: list[Any], of_q: list[Any], of_kv: list[Any], of_both: list[Any]
    ) -> None:
        self.arrays, self._steps, self._of_both = arrays, (of_q, of_kv), of_both
        self._seen: list[Any] = [None, None]

    def run(self, *indices: NDArray[np.int64]) -> NDArray[Any]:
        """The result; operations on one index are skipped if it is that of the previous run."""
        for axis, index in enumerate(indices):
            if self._seen[axis] is None or not np.array_equal(self._seen[axis], index):
                self.arrays[axis] = self._seen[axis] = index
                self._compute(self._steps[axis])
        self._compute(self._of_both)
        return self.arrays[-1]

    def _compute(self, steps: list[Any]) -> None:
        arrays = self.arrays
        for function, inputs, out, number in steps:
            given = [arrays[i] for i in inputs]
            if out is None:
                arrays[number] = function(*given)
            else:
                function(*given, out=out)


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
