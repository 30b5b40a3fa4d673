"""Everything: dense attention as a mask."""

from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth, always


@pattern
class full(Pattern):
    """allowed(q, kv) = true. Density 1, reach 1; `~full()` allows nothing.

    >>> full().layout(512).num_partial
    0
    """

    relative, tables, diagonal = False, False, True

    def allowed(self, q: Index, kv: Index) -> Truth:
        """Always."""
        return always(q)
