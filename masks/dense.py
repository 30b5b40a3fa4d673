"""Arrays of elements while a rule is traced, and how functions of torch are applied to them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks.functions import OF_ELEMENTS, is_pointwise
from sparse_flash.masks.kleene import NotUnderstoodError, Symbol, answer, is_in_place
from sparse_flash.masks.program import Value
from torch import Tensor

_CONVERSIONS = {"to", "float", "double", "half", "bfloat16", "long", "int", "short", "byte", "bool"}


class Dense(Symbol):
    """A tensor of a value for every element, on the CPU; torch computes with it."""

    functions: ClassVar[dict[str, Callable[..., Any]]] = {}  # of torch, by their names
    classes: ClassVar[dict[type, Callable[[Value], Dense]]] = {}  # by the dtypes of numpy

    def __init__(self, value: Value) -> None:
        self._value = value

    @property
    def value(self) -> Value:
        """In the smallest dtype that holds everything."""
        return self._value

    @staticmethod
    def of_value(value: Value) -> Dense:
        """The array of a value, of the class for its dtype."""
        return Dense.classes.get(value.sample.dtype.type, Dense)(value)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that this stands for."""
        return self.tensor().dtype

    def whole(self) -> Value:
        """The value in the dtype of the tensor."""
        return self.value

    def tensor(self) -> Tensor:
        """A sample of what this stands for: two queries, two keys."""
        return torch.from_numpy(np.array(self.whole().sample))

    @property
    def device(self) -> torch.device:
        """Of the tensor that this stands for."""
        return torch.device("cpu")

    @property
    def shape(self) -> NoReturn:
        """Not known while a rule is traced."""
        raise NotUnderstoodError("the shape of indices")

    ndim = shape

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch's functions: known ones on arrays, other pointwise ones on tensors."""
        answer(sys._getframe(1))
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if func is Tensor.where or is_in_place(name) or "out" in kwargs:
            raise NotUnderstoodError(f"Tensor.{name}")
        return _apply(name.strip("_"), func, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Methods of tensors that are functions of torch, and conversions."""
        if name.startswith("__"):
            raise AttributeError(name)
        if is_in_place(name) or name == "where" or not hasattr(Tensor, name):
            raise NotUnderstoodError(f".{name}")
        return functools.partial(_apply, name, getattr(Tensor, name), self)


def _apply(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A function of torch: of arrays, where it is known, else of tensors."""
    if name in OF_ELEMENTS and not any(isinstance(x, Dense) for x in (*args[1:], *kwargs.values())):
        return by_tensors(function, *args, **kwargs)
    arrays = sorted((x for x in args if isinstance(x, Dense)), key=is_floating)
    others = any(isinstance(x, Tensor) and x.ndim for x in args if not isinstance(x, Dense))
    known = arrays[-1].functions.get(name) if arrays and not others else None
    pointwise = name in _CONVERSIONS or is_pointwise(name)
    if known is not None:
        try:
            return known(*args, **kwargs)
        except NotUnderstoodError:
            if not pointwise:
                raise
    if not pointwise:
        raise NotUnderstoodError(f"torch's {name}")
    return by_tensors(function, *args, **kwargs)


def by_tensors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply a function of torch to tensors in place of arrays; its result is an array again."""
    arrays = [x for x in (*args, *kwargs.values()) if isinstance(x, Dense)]
    return Dense.of_value(Value(_OfTensors(function, args, kwargs), *(x.whole() for x in arrays)))


class _OfTensors:
    """A function of torch, as one of arrays.

    Args:
        function: The function.
        args: Its arguments, with a `Dense` in the place of each array.
        kwargs: Its keyword arguments, likewise.
    """

    most = 1 << 15  # elements per call: for more, torch would start threads in each thread

    def __init__(
        self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._function = function
        self._args = [None if isinstance(x, Dense) else x for x in args]
        self._kwargs = {name: None if isinstance(x, Dense) else x for name, x in kwargs.items()}
        self._positions = [i for i, x in enumerate(args) if isinstance(x, Dense)]
        self._names = [name for name, x in kwargs.items() if isinstance(x, Dense)]

    def __call__(self, *values: NDArray[Any]) -> NDArray[Any]:
        tensors = [torch.from_numpy(np.asarray(x)) for x in values]
        args, kwargs, count = list(self._args), dict(self._kwargs), len(self._positions)
        for i, tensor in zip(self._positions, tensors[:count], strict=True):
            args[i] = tensor
        kwargs.update(zip(self._names, tensors[count:], strict=True))
        return self._function(*args, **kwargs).numpy()


def _by_torch(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)
    return lambda *args: by_tensors(method, *args)


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv"),
    *("mod", "rmod", "pow", "rpow", "lshift", "rlshift", "rshift", "rrshift", "and", "rand", "or"),
    *("ror", "xor", "rxor", "invert", "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
):
    setattr(Dense, f"__{_name}__", _by_torch(f"__{_name}__"))


def is_floating(x: Any) -> bool:
    """Whether this is an array of floats."""
    return isinstance(x, Dense) and x.dtype.is_floating_point
