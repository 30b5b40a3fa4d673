"""The mask seen from other positions, by name."""

from __future__ import annotations

from sparse_flash.masks.mask import Mask, named


@named
def shift(mask: Mask, q: int = 0, kv: int = 0) -> Mask:
    """`mask.shift(q, kv)` as a function, for the text of masks.

    >>> from sparse_flash import masks
    >>> masks.parse("shift(local(3), 5)")
    shift(local((3, 3)), 5)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"shift takes a mask, got {mask!r}")
    return mask.shift(q, kv)
