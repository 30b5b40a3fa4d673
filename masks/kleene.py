"""Three-valued logic, and placeholders for tensors while a rule is applied to whole blocks.

A rule that receives `Symbol`s instead of index tensors returns two results for each block: its
truth (Kleene, 1938: EMPTY, UNKNOWN or FULL) and a signature, a few integers. Blocks with equal
signatures have equal elements. Blocks that logic cannot decide are evaluated once per signature.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
from sparse_flash.masks import blockwise
from sparse_flash.masks.blockwise import Numbers, maximum, minimum, where
from torch import Tensor

# Ordered so that "or" is the maximum, "and" the minimum, "not" the reflection.
EMPTY, UNKNOWN, FULL = 0, 1, 2

Columns = list[Numbers]


class NotUnderstoodError(TypeError):
    """An operation without a form for whole blocks: elements must be evaluated."""


class _Questions(threading.local):
    """Instructions of a rule that asked for the class of a symbol; None while no rule runs."""

    asked: set[tuple[FrameType, int]] | None = None


_questions = _Questions()


@contextlib.contextmanager
def without_type_checks() -> Iterator[None]:
    """Run a rule of the user on symbols, and refuse it if it asks `isinstance(q, Tensor)`.

    The rule could do something else for tensors. Torch itself asks too, while it looks for the
    overload of a function: `torch.remainder(q, 3)`. Such a call reaches `__torch_function__` from
    the same instruction, which `answer` removes.

    Raises:
        NotUnderstoodError: The rule asked.
    """
    before, _questions.asked = _questions.asked, set()
    try:
        yield
        if _questions.asked:
            raise NotUnderstoodError("isinstance")
    finally:
        _questions.asked = before


def answer(frame: FrameType) -> None:
    """Forget what torch asked in the call of one of its functions. frame: Of the caller."""
    if _questions.asked:
        _questions.asked.discard((frame, frame.f_lasti))


class Symbol:
    """A placeholder for the tensor of values in each of many blocks.

    Torch functions of a symbol are looked up in `functions`, by name.
    """

    functions: ClassVar[dict[str, Callable[..., Any]]] = {}
    otherwise: ClassVar[Callable[..., Any] | None] = None  # for unlisted functions
    __array_ufunc__ = None  # numpy defers operators to this class
    __hash__ = None  # type: ignore[assignment]
    like: Numbers  # one entry per block

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class itself: torch would read the memory of what claims to be a tensor."""
        frame = sys._getframe(1)
        if _questions.asked is not None and not _is_own(frame):
            _questions.asked.add((frame, frame.f_lasti))
        return type(self)

    def columns(self) -> Columns:
        """Integer tensors, one entry per block: equal entries mean equal values, index by index.

        An index counts from the start of its block; only blocks of equal size are compared.
        """
        raise NotImplementedError

    def widened(self) -> Symbol:
        """The same integers as int64."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply torch functions by name: `torch.where(q > kv, q, kv)`, `tensor + q`."""
        answer(sys._getframe(1))
        name = getattr(func, "__name__", str(func))
        known = Symbol.functions.get(name.strip("_"))
        if func is Tensor.where or is_in_place(name):
            raise NotUnderstoodError(f"Tensor.{name}")  # its condition is another argument
        if known is not None:
            return known(*args, **(kwargs or {}))
        if Symbol.otherwise is not None:
            return Symbol.otherwise(func, *args, **(kwargs or {}))
        raise NotUnderstoodError(f"torch's {name}")

    def __getattr__(self, name: str) -> Any:
        """Tensor methods that are also torch functions."""
        if name.startswith("__"):
            raise AttributeError(name)
        known = Symbol.functions.get(name)
        if known is not None and name != "where":
            return functools.partial(known, self)
        method = getattr(Tensor, name, None)
        if callable(method) and Symbol.otherwise is not None and not is_in_place(name):
            return functools.partial(Symbol.otherwise, method, self)
        raise NotUnderstoodError(f".{name}")

    def __bool__(self) -> bool:
        raise NotUnderstoodError("`and`, `or`, `not` or `if`")

    def __iter__(self) -> NoReturn:
        raise NotUnderstoodError("iteration")

    def __getitem__(self, index: object) -> NoReturn:
        raise NotUnderstoodError("indexing of an index")


def _is_own(frame: FrameType) -> bool:
    """Whether code of this package runs in the frame."""
    return str(frame.f_globals.get("__name__")).startswith("sparse_flash.masks.")


def is_in_place(name: str) -> bool:
    """Whether this names an in-place method, such as `add_`."""
    return name.endswith("_") and not name.endswith("__")


class Ternary(Symbol):
    """A tensor of truth values EMPTY, UNKNOWN, FULL (int8) with Kleene's `&`, `|`, `~`, `^`.

    Args:
        value: The truth values, int8.
        decided_by: Function that returns the signature of undecided blocks; None: no signature.
        operands: Truth values that this one combines, instead of `decided_by`.

    >>> a, b = Ternary(torch.tensor([0, 1, 2])), Ternary(torch.tensor([1, 1, 1]))
    >>> (a | b).value, (a & b).value, (~a).value
    (tensor([1, 1, 2]), tensor([0, 1, 1]), tensor([2, 1, 0]))
    """

    def __init__(
        self,
        value: Numbers,
        decided_by: Callable[[], Columns] | None = None,
        operands: tuple[Ternary, ...] = (),
    ) -> None:
        self.value, self._decided_by, self._operands = value, decided_by, operands
        self.like = value

    @classmethod
    def of(
        cls, surely: Numbers, possibly: Numbers, decided_by: Callable[[], Columns] | None = None
    ) -> Ternary:
        """FULL where `surely` (and `possibly`), UNKNOWN where only `possibly`, EMPTY elsewhere."""
        value = blockwise.int8(surely) + blockwise.int8(possibly)
        if decided_by is None:
            return cls(value)
        return cls(value, lambda: [value, *decided_by()])  # a column marks undecided leaves by 1

    def columns(self) -> Columns:
        """The signature; columns of undecided leaves are 0 in decided blocks.

        Raises:
            NotUnderstoodError: The truth value has no signature.
        """
        return self._columns(self.value == self.value, blockwise.int64(self.value))

    def _columns(self, undecided: Numbers, decided: Numbers) -> Columns:
        """The signature; columns are `decided` where the whole expression is not `undecided`.

        Each column is selected once, however deep the expression is.
        """
        decided = where(undecided, blockwise.int64(self.value), decided)
        undecided = undecided & (self.value == UNKNOWN)
        if self._operands:
            return [c for each in self._operands for c in each._columns(undecided, decided)]
        if self._decided_by is None:
            raise NotUnderstoodError("a truth value of unknown origin")
        return [where(undecided, blockwise.int64(c), decided) for c in self._decided_by()]

    def __and__(self, other: Any) -> Ternary:
        return self._combine(other, minimum)

    def __or__(self, other: Any) -> Ternary:
        return self._combine(other, maximum)

    def __xor__(self, other: Any) -> Ternary:
        other = self._operand(other)
        return (self & ~other) | (~self & other)

    def __invert__(self) -> Ternary:
        return Ternary(FULL - self.value, operands=(self,))

    def __eq__(self, other: object) -> Ternary:  # type: ignore[override]
        return ~(self ^ other)

    def __ne__(self, other: object) -> Ternary:  # type: ignore[override]
        return self ^ other

    __hash__ = None
    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__
    __mul__ = __rmul__ = __and__  # bools, as in torch
    __add__ = __radd__ = __or__

    @property
    def device(self) -> torch.device:
        """Device of the represented tensor."""
        return blockwise.device(self.value)

    def _combine(self, other: Any, operation: Callable[[Numbers, Numbers], Numbers]) -> Ternary:
        other = self._operand(other)
        return Ternary(operation(self.value, other.value), operands=(self, other))

    def _operand(self, other: Any) -> Ternary:
        if isinstance(other, Ternary):
            return other
        if isinstance(other, Tensor) and other.ndim == 0 and other.dtype == torch.bool:
            other = bool(other)
        if isinstance(other, bool):
            return Ternary(blockwise.states(self.value, FULL if other else EMPTY), list)
        raise NotUnderstoodError(f"a truth value combined with {type(other).__name__}")


def columns_of(symbols: Iterable[Symbol]) -> Callable[[], Columns]:
    """The columns of all symbols, computed on demand."""
    return lambda: functools.reduce(operator.iadd, (symbol.columns() for symbol in symbols), [])
