"""Attention of a user, as a module of the encoder: a class, or a function of q, k, v, kv_lens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_SIZES = ("length", "heads", "head_dim")
FORMS = (
    "an nn.Module class that is called with length, heads, head_dim, and whose forward takes q, k, "
    "v, kv_lens; or a function of q, k, v, kv_lens"
)


class UserAttention(nn.Module):
    """A user's attention, whose output is checked.

    Args:
        attend: Function or module: q, k, v `(b, s, h, d)` and kv_lens (b,), or None where nothing
            is padding, to `(b, s, h, d)`.
        name: Its name in messages.
    """

    def __init__(self, attend: Callable[..., Any], name: str) -> None:
        super().__init__()
        self.attend, self.name = attend, name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        out = self.attend(q, k, v, kv_lens)
        if not isinstance(out, Tensor) or out.shape != q.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{self.name} must return a tensor (batch, sequence, heads, head_dim) as its q, "
                f"{tuple(q.shape)}, got {got}"
            )
        return out


def check_user_attention(value: Any, name: str) -> None:
    """Raise ValueError unless the object is a class or a function that can be used as attention."""
    if isinstance(value, nn.Module):
        raise ValueError(
            f"{name} is a module already; each layer makes its own: give the class, which is "
            "called with length, heads, head_dim"
        )
    if isinstance(value, type):
        if not issubclass(value, nn.Module):
            raise ValueError(f"{name} is a class, but no nn.Module: attention must be {FORMS}")
        if _sizes(value) is None:
            raise ValueError(
                f"{name}{inspect.signature(value)} cannot be called with length, heads, head_dim: "
                f"attention must be {FORMS}"
            )
        value = value.forward
        if not _binds(value, None, None, None, None, None):
            raise ValueError(f"{name}.forward{inspect.signature(value)} must take q, k, v, kv_lens")
        return
    if not callable(value):
        raise ValueError(f"{name} is {value!r}: attention must be {FORMS}")
    if not _binds(value, None, None, None, None):
        if _binds(value, None, None):
            raise ValueError(
                f"{name}{inspect.signature(value)} takes two arguments: attention must be {FORMS}. "
                "The mask of a predicate of (q_idx, kv_idx) is masks.custom(predicate)"
            )
        raise ValueError(
            f"{name}{inspect.signature(value)} must take q, k, v, kv_lens: attention must be "
            f"{FORMS}"
        )


def is_module(value: Any) -> bool:
    """Whether the object is an nn.Module class, or a module."""
    return isinstance(value, nn.Module) or (
        isinstance(value, type) and issubclass(value, nn.Module)
    )


def user_module(value: Any, name: str, length: int, heads: int, head_dim: int) -> UserAttention:
    """The module of a layer.

    Args:
        value: What `check_user_attention` accepts.
        name: Its name in messages.
        length: Tokens per sequence.
        heads: Number of heads.
        head_dim: Channels of a head.
    """
    if not isinstance(value, type):
        return UserAttention(value, name)
    args = dict(zip(_SIZES, (length, heads, head_dim), strict=True))
    return UserAttention(value(**args) if _sizes(value) else value(*args.values()), name)


def _sizes(value: type) -> bool | None:
    """Whether the class takes the sizes by name; False: by position; None: it does not."""
    if value.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return None
    if _binds(value, **dict.fromkeys(_SIZES)):
        return True
    try:
        names = list(inspect.signature(value).parameters)
    except (ValueError, TypeError):
        return False
    ordered = all(n not in _SIZES or _SIZES.index(n) == i for i, n in enumerate(names[:3]))
    return False if ordered and _binds(value, None, None, None) else None


def _binds(function: Callable[..., Any], *args: None, **named: None) -> bool:
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
