"""Any Python predicate as a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparse_flash.masks.mask import Mask, pattern
from sparse_flash.masks.ternary import UNKNOWN, Index, Interval, Ternary, Truth
from torch import Tensor


@pattern
class custom(Mask):
    """allowed(q, kv) = fn(q, kv), any fn from broadcasting int64 index tensors to a bool tensor.

    Every tile is evaluated element by element, in chunks: exact, memory in proportion to the tiles
    kept. Two customs are equal if their functions are the same object.

    Raises:
        TypeError: fn cannot be called, or returns no bool tensor.

    >>> custom(lambda q, kv: (q - kv) % 3 != 1).density(99)
    0.6666666666666666
    """

    fn: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"custom: fn must be a function of (q_idx, kv_idx), got {self.fn!r}")

    def allowed(self, q: Index, kv: Index) -> Truth:
        """What the function says; nothing is known of whole blocks."""
        if isinstance(q, Interval):
            return Ternary(torch.full_like(q.lo, UNKNOWN, dtype=torch.int8))
        try:
            truth = self.fn(q, kv)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise TypeError(
                f"{self!r} uses `and`, `or`, `not` or `if` on tensors: write &, |, ~ or torch.where"
            ) from error
        if not isinstance(truth, Tensor) or truth.dtype != torch.bool:
            what = truth.dtype if isinstance(truth, Tensor) else type(truth).__name__
            raise TypeError(f"{self!r} must return a bool tensor, got {what}")
        return truth

    def __repr__(self) -> str:
        return f"custom({getattr(self.fn, '__qualname__', repr(self.fn))})"
