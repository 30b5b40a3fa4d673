"""Any Python predicate as a mask."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NoReturn

import torch
from sparse_flash.masks.mask import Mask, named
from sparse_flash.masks.modes import tensors_made_on, unreadable
from sparse_flash.masks.patterns.reads import state_of
from sparse_flash.masks.ternary import UNKNOWN, Index, Interval, Ternary, Truth
from torch import Tensor


@named
@dataclass(frozen=True, repr=False, eq=False)
class custom(Mask):
    """allowed(q, kv) = fn(q, kv), any fn from broadcasting int64 index tensors to a bool tensor.

    Every tile is evaluated element by element, in chunks: exact, memory in proportion to the tiles
    kept. Two customs are equal if their functions are the same object.

    fn may read tensors, arrays and numbers from outside: closure, defaults, globals, attributes.
    In layouts that are cached, changes of those are noticed (see `state`). Tensors that fn makes
    without a device are made where the indices are.

    Raises:
        TypeError: fn cannot be called with two arguments, or returns no bool tensor of the shape
            that q and kv broadcast to.

    >>> custom(lambda q, kv: (q - kv) % 3 != 1).density(99)
    0.6666666666666666
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    changeable = True
    relative = True

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"custom: fn must be a function of (q_idx, kv_idx), got {self.fn!r}")
        if isinstance(self.fn, types.FunctionType):
            needed = self.fn.__code__.co_argcount - len(self.fn.__defaults__ or ())
            if needed > 2:
                self._refuse_arguments()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, custom) and _identity(self.fn) == _identity(other.fn)

    def __hash__(self) -> int:
        return hash(_identity(self.fn))

    def state(self) -> Hashable:
        """The state of everything that the function reads besides its arguments.

        Raises:
            TypeError: It reads a numpy array of more than 1 MiB that is not read-only.
        """
        return state_of(self.fn)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """What the function says; nothing is known of whole blocks."""
        if isinstance(q, Interval):
            return Ternary(torch.full_like(q.lo, UNKNOWN, dtype=torch.int8))
        try:
            with tensors_made_on(q.device):
                truth = self.fn(q, kv)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise TypeError(
                f"{self!r} uses `and`, `or`, `not` or `if` on tensors: write &, |, ~ or torch.where"
            ) from error
        except TypeError:
            if not _takes_two(self.fn):
                self._refuse_arguments()
            raise
        self._check(truth, q, kv)
        return truth

    def _check(self, truth: object, q: Tensor, kv: Tensor) -> None:
        if not isinstance(truth, Tensor) or truth.dtype != torch.bool:
            what = truth.dtype if isinstance(truth, Tensor) else type(truth).__name__
            raise TypeError(f"{self!r} must return a bool tensor, got {what}")
        reason = None if unreadable(q) or unreadable(kv) else unreadable(truth)
        if reason:
            raise TypeError(f"{self!r} must return a tensor with data, but {reason}")
        shape = torch.broadcast_shapes(q.shape, kv.shape)
        if truth.ndim > len(shape) or any(
            n not in (1, m) for n, m in zip(truth.shape[::-1], shape[::-1], strict=False)
        ):
            raise TypeError(
                f"{self!r} must return the shape that q and kv broadcast to, {tuple(shape)}, "
                f"got {tuple(truth.shape)}"
            )

    def _refuse_arguments(self) -> NoReturn:
        raise TypeError(
            f"{self!r} must take two arguments, fn(q_idx, kv_idx), not {_arguments(self.fn)}. For "
            "a FlexAttention mask_mod(b, h, q_idx, kv_idx) write "
            "custom(lambda q, kv: mask_mod(0, 0, q, kv)); where it differs between heads, "
            "per_head([custom(lambda q, kv, h=h: mask_mod(0, h, q, kv)) for h in range(heads)]), "
            "and likewise per_batch"
        ) from None

    def __repr__(self) -> str:
        return f"custom({getattr(self.fn, '__qualname__', repr(self.fn))})"


def _identity(fn: Callable[..., object]) -> Hashable:
    """What two equal functions share; a method is made anew at every access."""
    if isinstance(fn, types.MethodType):
        return id(fn.__self__), fn.__func__
    return id(fn)


def _takes_two(fn: Callable[..., object]) -> bool:
    try:
        inspect.signature(fn).bind(None, None)
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
