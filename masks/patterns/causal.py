"""Causal: no query attends to a later key."""

from sparse_flash.masks.arguments import integers, saturate
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth


@pattern
class causal(Pattern):
    """allowed(q, kv) = kv <= q + offset.

    With fewer queries than keys, `offset=kv_len - q_len` aligns the last query with the last key;
    an offset other than 0 states the alignment, so the mask is not `relative`.
    Density for n tokens: (n + 1) / 2n. Reach: 1 (every earlier token; see `Mask.reach`).

    >>> print(causal().text(1024, width=4))
    ┌────────┐
    │▒▒      │
    │██▒▒    │
    │████▒▒  │
    │██████▒▒│
    └────────┘
    """

    offset: int = 0
    tables, diagonal = False, True

    def __post_init__(self) -> None:
        integers(self, offset=None)

    @property
    def relative(self) -> bool:
        """True unless an offset states the position of the queries."""
        return self.offset == 0

    def allowed(self, q: Index, kv: Index) -> Truth:
        """Kv <= q + offset."""
        return kv <= q + saturate(self.offset)
