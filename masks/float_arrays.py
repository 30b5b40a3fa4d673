"""Floats of elements while a rule is traced: sums and comparisons by numpy, the rest by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from sparse_flash.masks.arrays import Array
from sparse_flash.masks.dense import Dense, by_tensors
from sparse_flash.masks.functions import OPERATORS
from sparse_flash.masks.program import Value
from torch import Tensor

_EXACT = 1 << 53  # integers up to here become a float in one rounding


def _operator(ufunc: np.ufunc, function: Callable[..., Tensor]) -> Callable[[Any, Any], Any]:
    """An operator of floats and numbers, IEEE 754 as in torch; beside others, torch's own."""

    def apply(self: FloatArray, other: Any) -> Any:
        if type(other) is Array:
            other = other.floating(self)
        if type(other) is FloatArray:
            dtype = np.result_type(self.value.sample, other.value.sample)
            return Dense.of_value(Value(ufunc, self.value.cast(dtype), other.value.cast(dtype)))
        if type(other) is float or (type(other) is int and abs(other) <= _EXACT):
            number = Value.number(other, self.value.sample.dtype)
            return Dense.of_value(Value(ufunc, self.value, number))
        return by_tensors(function, self, other)

    return apply


class FloatArray(Dense):
    """Floats of many elements, which act as a tensor of float32 or float64.

    >>> (FloatArray(Value.number([[[0.5], [9]]], np.float32)) * 0.5 < 0.7).tensor()
    tensor([[[ True],
             [False]]])
    """

    functions: ClassVar[dict[str, Callable[..., Any]]] = dict(OPERATORS)

    __add__ = __radd__ = _operator(np.add, torch.add)
    __mul__ = __rmul__ = _operator(np.multiply, torch.mul)
    __sub__ = _operator(np.subtract, torch.sub)
    __truediv__ = _operator(np.true_divide, torch.true_divide)
    __lt__ = _operator(np.less, torch.lt)
    __le__ = _operator(np.less_equal, torch.le)
    __gt__ = _operator(np.greater, torch.gt)
    __ge__ = _operator(np.greater_equal, torch.ge)
    __eq__ = _operator(np.equal, torch.eq)
    __ne__ = _operator(np.not_equal, torch.ne)
    __hash__ = None  # type: ignore[assignment]


Dense.classes.update({np.float32: FloatArray, np.float64: FloatArray})
