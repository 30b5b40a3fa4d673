"""Causal: no query sees a later key."""

from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.patterns.arguments import integer
from sparse_flash.masks.ternary import Index, Truth


@pattern
class causal(Pattern):
    """allowed(q, kv) = kv <= q + offset.

    With fewer queries than keys, `offset=kv_len - q_len` aligns the last query with the last key.
    Density for n tokens: (n + 1) / 2n. Reach: never (None), the past does not see the future.

    >>> print(causal().text(1024, width=4))
    ┌────────┐
    │▒▒      │
    │██▒▒    │
    │████▒▒  │
    │██████▒▒│
    └────────┘
    """

    offset: int = 0

    def __post_init__(self) -> None:
        integer("causal", "offset", self.offset, None)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """Kv <= q + offset."""
        return kv <= q + self.offset
