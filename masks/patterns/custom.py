"""Any Python predicate as a mask."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from sparse_flash.masks import (
    blockwise,
    functions,  # noqa: F401 - torch's functions of intervals
)
from sparse_flash.masks.kleene import Symbol, columns_of, without_type_checks
from sparse_flash.masks.mask import Mask, named
from sparse_flash.masks.modes import derived, tensors_made_on, unreadable
from sparse_flash.masks.patterns.reads import state_of
from sparse_flash.masks.ternary import EMPTY, UNKNOWN, Index, Interval, Ternary, Truth, Unknown
from torch import Tensor


class Unused:
    """Placeholder for the batch entry or head of a `mask_mod`, which must not use its value."""

    def __init__(self, name: str, owner: str, device: torch.device) -> None:
        self._name, self._owner, self.device = name, owner, device

    def new_ones(self, size: Any = (), **options: Any) -> Tensor:
        """Ones, the initial value of torch's `and_masks`; independent of the placeholder."""
        return torch.ones(size, **{"device": self.device, **options})

    def new_zeros(self, size: Any = (), **options: Any) -> Tensor:
        """Zeros, the initial value of torch's `or_masks`."""
        return torch.zeros(size, **{"device": self.device, **options})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        one = "per_head" if self._name == "h" else "per_batch"
        name = self._name
        call = "mask_mod(0, h, q, kv)" if name == "h" else "mask_mod(b, 0, q, kv)"
        count = "heads" if name == "h" else "batch"
        raise TypeError(
            f"{self._owner}: the mask_mod reads its argument {name!r}, so it is several "
            f"masks: write masks.{one}([masks.custom(lambda q, kv, {name}={name}: {call}) "
            f"for {name} in range({count})])"
        )

    __getattr__ = __index__ = __int__ = __float__ = __bool__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = __neg__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __abs__ = __getitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _refuse

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse every torch function."""
        given = [x for arg in args for x in (arg if isinstance(arg, tuple | list) else (arg,))]
        next(x for x in (*given, *(kwargs or {}).values()) if isinstance(x, Unused))._refuse()


@named
@dataclass(frozen=True, repr=False, eq=False)
class custom(Mask):
    """allowed(q, kv) = fn(q, kv), any fn from broadcasting int64 index tensors to a bool tensor.

    A layout first calls fn with intervals of indices, which decide most tiles as a whole. They
    support all operators of Python (`+ - * // % << >> & | ^ ~ abs`, comparisons), `torch.where`,
    `minimum`, `clamp` and similar functions, and tables (`numbers[q]`,
    `blocks[q // 128, kv // 128]`). Undecided tiles are evaluated element by element, once for each
    signature; if fn uses other functions, all tiles are. The layout is exact in both cases. Two
    customs are equal if their functions are the same object.

    A FlexAttention `mask_mod(b, h, q_idx, kv_idx)` that ignores b and h is accepted. One that uses
    them needs a mask for each head or batch entry; the error shows how.

    fn may read tensors, arrays and numbers from its closure, defaults, globals and attributes.
    Cached layouts detect changes of these (see `state`). Tensors that fn creates without a device
    are created on the device of the indices.

    Raises:
        TypeError: fn cannot be called with two arguments, or does not return a bool tensor of the
            broadcast shape of q and kv.

    >>> custom(lambda q, kv: (q - kv) % 3 != 1).density(99)
    0.6666666666666666
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    changeable = True
    relative = True
    not_understood: ClassVar[str] = ""  # reason why intervals failed in the latest call
    _derived = (*Mask._derived, "not_understood")

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"custom: fn must be a function of (q_idx, kv_idx), got {self.fn!r}")
        if isinstance(self.fn, types.FunctionType):
            needed = self.fn.__code__.co_argcount - len(self.fn.__defaults__ or ())
            if needed > 2 and not self._arity:
                self._refuse_arguments()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, custom) and _identity(self.fn) == _identity(other.fn)

    def __hash__(self) -> int:
        return hash(_identity(self.fn))

    def state(self) -> Hashable:
        """The state of everything that the function reads besides its arguments.

        Raises:
            TypeError: It reads a writable numpy array of more than 1 MiB.
        """
        return state_of(self.fn)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The result of the function, on intervals if it accepts them."""
        if isinstance(q, Interval):
            return self._of_intervals(q, kv)
        if isinstance(q, Symbol):  # arrays, which may refuse
            with without_type_checks():
                return self._call(q, kv)
        try:
            with tensors_made_on(q.device):
                truth = self._call(q, kv)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise TypeError(
                f"{self!r} uses `and`, `or`, `not` or `if` on tensors: write &, |, ~ or torch.where"
            ) from error
        except TypeError:
            if not self._arity:
                self._refuse_arguments()
            raise
        self._check(truth, q, kv)
        return truth

    def _call(self, q: Index, kv: Index) -> Any:
        if self._arity != 4:
            return self.fn(q, kv)
        entry, head = (Unused(name, repr(self), q.device) for name in ("b", "h"))
        mask_mod: Any = self.fn
        return mask_mod(entry, head, q, kv)

    @derived
    def _arity(self) -> int:
        """Number of arguments of the function: 2, 4 for a `mask_mod`, or 0 for other numbers."""
        return next((n for n in (2, 4) if _takes(self.fn, n)), 0)

    def _of_intervals(self, q: Interval, kv: Interval) -> Ternary:
        """The result on intervals; UNKNOWN everywhere if they do not support the function."""
        try:
            with tensors_made_on(q.device), without_type_checks():
                truth = self._call(q, kv)
            if isinstance(truth, Ternary):
                return truth
            if isinstance(truth, Unknown):  # of a function that has no interval form
                return Ternary(blockwise.states(q.lo, UNKNOWN), truth.columns)
            if not isinstance(truth, Symbol) and truth.ndim == 0 and truth.dtype == torch.bool:
                return Ternary(blockwise.states(q.lo, EMPTY), list) | truth
        except Exception as error:
            # Evaluating elements raises an error of the function itself again.
            object.__setattr__(self, "not_understood", f" (intervals do not support {error})")
        return Ternary(blockwise.states(q.lo, UNKNOWN), columns_of((q, kv)))

    def _check(self, truth: object, q: Tensor, kv: Tensor) -> None:
        if not isinstance(truth, Tensor) or truth.dtype != torch.bool:
            what = truth.dtype if isinstance(truth, Tensor) else type(truth).__name__
            raise TypeError(f"{self!r} must return a bool tensor, got {what}{_way_out(truth)}")
        reason = None if unreadable(q) or unreadable(kv) else unreadable(truth)
        if reason:
            raise TypeError(f"{self!r} must return a tensor with data, but {reason}")
        shape = torch.broadcast_tensors(q, kv)[0].shape
        if truth.ndim > len(shape) or any(
            n not in (1, m) for n, m in zip(truth.shape[::-1], shape[::-1], strict=False)
        ):
            raise TypeError(
                f"{self!r} must return the shape that q and kv broadcast to, {tuple(shape)}, "
                f"got {tuple(truth.shape)}"
            )

    def _refuse_arguments(self) -> NoReturn:
        raise TypeError(
            f"{self!r} must take two arguments, fn(q_idx, kv_idx), or four as FlexAttention's "
            f"mask_mod(b, h, q_idx, kv_idx), not {_arguments(self.fn)}"
        ) from None

    def __repr__(self) -> str:
        return f"custom({getattr(self.fn, '__qualname__', repr(self.fn))})"


def _identity(fn: Callable[..., object]) -> Hashable:
    """A key of the function; bound methods are new objects at every access."""
    if isinstance(fn, types.MethodType):
        return id(fn.__self__), fn.__func__
    return id(fn)


def _takes(fn: Callable[..., object], count: int) -> bool:
    try:
        inspect.signature(fn).bind(*[None] * count)
    except ValueError:  # a builtin without a signature
        return True
    except TypeError:
        return False
    return True


def _arguments(fn: Callable[..., object]) -> str:
    try:
        return str(inspect.signature(fn))
    except (ValueError, TypeError):
        return "others"


def _way_out(truth: object) -> str:
    """What to write in place of a result of another type than bool tensors."""
    if isinstance(truth, Tensor):
        return ": compare it, as in result != 0"
    if isinstance(truth, bool):
        return ": a constant is masks.full() or ~masks.full()"
    if type(truth).__module__ == "numpy":
        return ": make arrays tensors before, with torch.from_numpy(array)"
    return ""
