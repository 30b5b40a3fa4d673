"""Interpretation of table values: bools, 0 and 1, or an additive mask; others are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sparse_flash.masks.modes import plain_torch, unreadable
from torch import Tensor

# The smallest finite float16. An additive mask forbids attention by -inf or by the smallest finite
# value of its dtype; no score bias is as low.
_NEVER = -65504.0


def truth_table(pattern: str, table: Any) -> np.ndarray:
    """Convert a table to bools `(rows, columns)`, true where attention is allowed.

    Bools, and integers and floats that are 0 or 1, are used directly. Floats that are 0, -inf or at
    most -65504 form an additive mask, which PyTorch and Hugging Face add to the scores; 0 allows.

    Raises:
        TypeError: The values are not real numbers, or a tensor has no data (meta, fake, sparse).
        ValueError: The table is empty, not two-dimensional, or its values are ambiguous.

    >>> truth_table("from_dense", torch.tensor([[0, -torch.inf], [0, 0]])).astype(int)
    array([[1, 0],
           [1, 1]])
    """
    array = _as_array(pattern, table)
    if array.ndim > 2 and max(array.shape[:-2]) == 1:
        array = array.reshape(array.shape[-2:])
    if array.ndim > 2:
        raise ValueError(f"{pattern}: {_more_dimensions(pattern, array.shape)}")
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"{pattern}: the table must be two-dimensional bools, "
            f"got shape {array.shape} of {array.dtype}"
        )
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind in "iu":
        if ((array != 0) & (array != 1)).any():
            raise ValueError(
                f"{pattern}: integers must be 0 and 1, got {array.min()}..{array.max()}; "
                "write table != 0 or table > 0"
            )
        return array == 1
    return _from_floats(pattern, array)


def _from_floats(pattern: str, array: np.ndarray) -> np.ndarray:
    zero, one = array == 0, array == 1
    if (zero | one).all():
        if zero.all():
            raise ValueError(
                f"{pattern}: all values are 0.0: as bools they allow nothing, as an additive mask "
                "everything; write table == 0 for the additive mask, table != 0 for bools"
            )
        return one
    if (zero | (array <= _NEVER)).all():
        return zero
    other = array[~(zero | (array <= _NEVER))].ravel()[0]
    raise ValueError(
        f"{pattern}: floats must be 0 and 1, or an additive mask of 0 and -inf (or at most "
        f"{_NEVER:.0f}), got {other} among {'them' if zero.any() else 'others'}; write the bools "
        "that are meant, for example table == 0 or table > 0.5"
    )


def _as_array(pattern: str, table: Any) -> np.ndarray:
    if isinstance(table, Tensor):
        reason = unreadable(table)
        if table.layout != torch.strided or table.is_nested:
            reason = f"a tensor of layout {table.layout} is not a table: call .to_dense() first"
        elif table.is_complex() or table.is_quantized:
            reason = f"a table of {table.dtype} has no meaning as a mask"
        if reason:
            raise TypeError(f"{pattern}: the table must hold bools, and {reason}")
        with plain_torch():
            table = table.detach()
            exact = not table.is_floating_point() or table.dtype in (torch.float16, torch.float64)
            return (table if exact else table.float()).cpu().numpy()
    array = np.asarray(table)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"{pattern}: the table must be two-dimensional bools, "
            f"got shape {array.shape} of {array.dtype}"
        )
    return array


def _more_dimensions(pattern: str, shape: tuple[int, ...]) -> str:
    got = f"the table must be (q_len, kv_len), got shape {shape}; "
    if len(shape) == 4:
        return got + (
            "for (batch, heads, q_len, kv_len) write masks.per_batch([masks.per_head("
            f"[masks.{pattern}(head) for head in entry]) for entry in table])"
        )
    one = f"[masks.{pattern}(t) for t in table]"
    return got + f"write masks.per_head({one}) for heads, masks.per_batch({one}) for a batch"
