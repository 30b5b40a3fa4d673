"""Functions of torch with an interval form: `torch.where`, `q.clamp(min=3)` and others.

Other pointwise functions have no interval form, but their arguments still determine a signature: a
function of `q - kv` is evaluated once per diagonal.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from sparse_flash.masks import blockwise
from sparse_flash.masks.blockwise import Numbers, full, int64, maximum, minimum, where
from sparse_flash.masks.kleene import EMPTY, FULL, UNKNOWN, Columns, NotUnderstoodError, Symbol
from sparse_flash.masks.ternary import (
    Interval,
    Ternary,
    Unknown,
    bounds,
    form_of,
    magnitude,
    operand,
    symbols,
)
from torch import Tensor

_PLAIN: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "subtract": operator.sub, "mul": operator.mul,
    "multiply": operator.mul, "floor_divide": operator.floordiv, "floordiv": operator.floordiv,
    "remainder": operator.mod, "mod": operator.mod, "neg": operator.neg, "negative": operator.neg,
    "abs": abs, "absolute": abs, "eq": operator.eq, "ne": operator.ne,
    "not_equal": operator.ne, "lt": operator.lt, "less": operator.lt, "le": operator.le,
    "less_equal": operator.le, "gt": operator.gt, "greater": operator.gt, "ge": operator.ge,
    "greater_equal": operator.ge, "bitwise_and": operator.and_, "and": operator.and_,
    "bitwise_or": operator.or_, "or": operator.or_, "bitwise_xor": operator.xor,
    "xor": operator.xor, "bitwise_not": operator.invert, "invert": operator.invert,
    "bitwise_left_shift": operator.lshift, "lshift": operator.lshift,
    "bitwise_right_shift": operator.rshift, "rshift": operator.rshift,
}  # fmt: skip
# Functions of the elements of their first argument; others are tensors of constants.
OF_ELEMENTS = ("isin", "bucketize")
_COMPOSITE = ("isclose", "softsign", "float_power")  # pointwise, though torch does not tag them
_OF_BOOLS = ("isin", "isclose", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit")
_SWAPPED = {"rsub": operator.sub, "rfloordiv": operator.floordiv, "rmod": operator.mod}


def _simple(operation: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any, **options: Any) -> Any:
        if options or len(values) > 2:
            raise NotUnderstoodError(f"{operation.__name__} with options")
        return operation(*map(_number, values))

    return apply


def _swapped(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: operation(_number(b), _number(a))


def _number(x: Any) -> Any:
    """A symbol or a number; a tensor of one element gives its value."""
    if isinstance(x, Symbol) or not isinstance(x, Tensor):
        return x
    if x.ndim == 0 and x.dtype == torch.bool:
        return bool(x)
    return operand(x)


def _truth(x: Any) -> Ternary:
    """Convert to bool: integers other than 0 are true."""
    if isinstance(x, Ternary):
        return x
    if isinstance(x, Symbol):
        nonzero: Any = x != 0
        return nonzero
    raise NotUnderstoodError(f"{type(x).__name__} as a truth value")


def _integer(x: Any) -> Any:
    """Convert to int64."""
    if not isinstance(x, Ternary):
        return operand(x)

    def form(modulus: int) -> tuple[Numbers, Columns]:
        return full(x.value, 0), x.columns()

    return Interval(int64(x.value == FULL), int64(x.value >= UNKNOWN), 1, form)


def _converted(x: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.to(...)`: a device is ignored; supported dtypes are int64 and bool."""
    given = [*args, *kwargs.values()]
    dtypes = [a for a in given if isinstance(a, torch.dtype)]
    if any(isinstance(a, Tensor | Symbol) for a in given):
        raise NotUnderstoodError(".to(another tensor)")
    if dtypes == [torch.int64]:
        return _integer(x)
    if dtypes == [torch.bool]:
        return _truth(x)
    return Unknown(x) if dtypes else x


def _least(a: Any, b: Any) -> Any:
    return _either(a, b, minimum)


def _most(a: Any, b: Any) -> Any:
    return _either(a, b, maximum)


def _either(a: Any, b: Any, choose: Callable[[Numbers, Any], Numbers]) -> Any:
    """The smaller or larger of two values; its signature includes their difference."""
    if _all_narrow(a, b):
        return Unknown(*symbols(a, b))
    a, b = operand(a), operand(b)
    if not isinstance(a, Interval):
        a, b = b, a
    if not isinstance(a, Interval) or isinstance(b, Unknown):
        return Unknown(*symbols(a, b))
    ends = zip(bounds(a), bounds(b), strict=True)
    lo, hi = (choose(x, y) for x, y in ends)

    def form(modulus: int) -> tuple[Numbers, Columns]:
        (base, p), (other, r) = a.form(), form_of(b)
        return base, [*p, *r, other - base]

    return Interval(lo, hi, max(a.largest, magnitude(b)), form)


def _all_narrow(*values: Any) -> bool:
    """Whether the result has fewer than 64 bits, so that later arithmetic could wrap."""
    narrow = any(isinstance(x, Symbol) and x.widened() is not x for x in values)
    return narrow and not any(isinstance(x, Interval) for x in values)


def _symbol(x: Any) -> Symbol:
    if not isinstance(x, Symbol):
        raise NotUnderstoodError("a reduction over a dimension")
    return x


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002 - torch's names
    x = x if min is None else _most(x, min)
    return x if max is None else _least(x, max)


def _where(condition: Any, a: Any, b: Any) -> Any:
    condition = _truth(condition)
    if any(isinstance(x, Ternary | bool) for x in map(_number, (a, b))):
        a, b = (_number(x) for x in (a, b))
        return (condition & a) | (~condition & b)
    narrow = _all_narrow(a, b)
    a, b = operand(a), operand(b)
    if narrow or isinstance(a, Unknown) or isinstance(b, Unknown):
        return Unknown(condition, *symbols(a, b))
    (a_lo, a_hi), (b_lo, b_hi) = (_ends(x, condition.value) for x in (a, b))
    surely, possibly = condition.value == FULL, condition.value >= UNKNOWN
    lo = where(surely, a_lo, where(possibly, minimum(a_lo, b_lo), b_lo))
    hi = where(surely, a_hi, where(possibly, maximum(a_hi, b_hi), b_hi))

    def form(modulus: int) -> tuple[Numbers, Columns]:
        (x, p), (y, r) = form_of(a), form_of(b)
        both = [full(lo, z) if isinstance(z, int) else z for z in (x, y)]
        return full(lo, 0), [*condition.columns(), *p, *r, *both]

    return Interval(lo, hi, max(magnitude(a), magnitude(b)), form)


def _ends(x: Any, like: Numbers) -> tuple[Numbers, Numbers]:
    if isinstance(x, Interval):
        return x.lo, x.hi
    both = full(like, x)
    return both, both


def _new(value: bool | int) -> Callable[..., Tensor]:
    """`q.new_ones(())`, the initial value of mask_mod combinators: a constant."""

    def make(x: Any, *size: Any, **options: Any) -> Tensor:
        if size not in ((), ((),)) or tuple(options.pop("size", ())):
            raise NotUnderstoodError("new tensors of a shape")
        options.pop("device", None)
        dtype = options.pop("dtype", torch.int64)
        return torch.full((), value, dtype=dtype, device=blockwise.device(x.like))

    return make


def _power(x: Any, n: Any) -> Any:
    n = _number(n)
    return x**n if type(n) is int and 1 <= n <= 64 else Unknown(*symbols(x, n))


def _of_elements(x: Any, *constants: Any, **options: Any) -> Unknown:
    if any(isinstance(a, Symbol) for a in (*constants, *options.values())) or "out" in options:
        raise NotUnderstoodError("a set that depends on indices")
    return Unknown(_symbol(x))


def _like(name: str, default: int | None = None) -> Callable[..., Any]:
    """`torch.zeros_like(q, dtype=torch.bool)`: the same value everywhere."""

    def make(x: Any, value: Any = default, *, dtype: Any = None, device: Any = None) -> Any:
        if dtype is None and isinstance(x, Interval | Ternary):
            dtype = torch.int64 if isinstance(x, Interval) else torch.bool
        if type(value) not in (bool, int) or dtype not in (torch.bool, torch.int64):
            raise NotUnderstoodError(f"{name} of {dtype}")
        if dtype == torch.bool:
            return Ternary(blockwise.states(x.like, FULL if value else EMPTY), list)
        number = full(x.like, value)
        return Interval(number, number, abs(value), lambda modulus: (number, []))

    return make


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    return _number(a) // _number(b) if rounding_mode == "floor" else Unknown(*symbols(a, b))


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether the torch function of this name works element by element.

    >>> is_pointwise("sin"), is_pointwise("sum")
    (True, False)
    """
    if name in _COMPOSITE:
        return True
    packet = getattr(torch.ops.aten, {"pow": "pow", "truediv": "div"}.get(name, name), None)
    tags = [tag for o in packet.overloads() for tag in getattr(packet, o).tags] if packet else []
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _otherwise(function: Any, *args: Any, **kwargs: Any) -> Unknown | Ternary:
    """Result of a pointwise function without an interval form."""
    name = getattr(function, "__name__", str(function)).strip("_")
    given = [*args, *kwargs.values()]
    if not is_pointwise(name) or "out" in kwargs or any(isinstance(a, list | tuple) for a in given):
        raise NotUnderstoodError(f"torch's {name}")
    found = Unknown(*symbols(*given))
    return found != 0 if name in _OF_BOOLS else found


# Operators of all symbols, by their torch names.
OPERATORS = {name: _simple(operation) for name, operation in _PLAIN.items()}
OPERATORS |= {name: _swapped(operation) for name, operation in _SWAPPED.items()}
Symbol.functions.update(OPERATORS)
Symbol.functions.update(
    {
        "where": _where,
        "minimum": _least,
        "maximum": _most,
        "min": lambda a, b: _least(
            _symbol(a), _symbol(b)
        ),  # with a number, torch reduces over a dimension
        "max": lambda a, b: _most(_symbol(a), _symbol(b)),
        "detach": lambda x: x,
        "contiguous": lambda x: x,
        "pow": _power,
        "square": lambda x: x * x,
        "div": _divide,
        "divide": _divide,
        "clamp": _clamp,
        "clip": _clamp,
        "clamp_min": _most,
        "clamp_max": _least,
        "logical_and": lambda a, b: _truth(a) & _truth(b),
        "logical_or": lambda a, b: _truth(a) | _truth(b),
        "logical_xor": lambda a, b: _truth(a) ^ _truth(b),
        "logical_not": lambda a: ~_truth(a),
        "bool": _truth,
        "long": _integer,
        "to": _converted,
        "float": Unknown,
        "double": Unknown,
        "int": Unknown,
        "zeros_like": _like("zeros_like", 0),
        "ones_like": _like("ones_like", 1),
        "full_like": _like("full_like"),
        "new_ones": _new(1),
        "new_zeros": _new(0),
    }
)
Symbol.functions.update(
    isin=lambda *args, **options: _of_elements(*args, **options) != 0, bucketize=_of_elements
)
Symbol.otherwise = staticmethod(_otherwise)


def _beside_floats(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operator of intervals. Beside a float, the result is a float, without bounds."""

    @functools.wraps(method)
    def apply(self: Interval, other: Any) -> Any:
        if type(other) is int or type(other) is Interval:
            return method(self, other)
        if isinstance(other, Tensor) and other.ndim == 0 and other.is_floating_point():
            return Unknown(self)
        return Unknown(self) if isinstance(other, float) else method(self, other)

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(Interval, _operator, _beside_floats(getattr(Interval, _operator)))
Interval.__pow__ = _beside_floats(Interval.__pow__)  # type: ignore[method-assign]
