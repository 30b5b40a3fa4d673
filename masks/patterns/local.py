"""Local (sliding window): each query attends to the keys around it."""

from sparse_flash.masks.arguments import integers, normalize, window_of
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth, always


@pattern
class local(Pattern):
    """allowed(q, kv) = -right <= q - kv <= left, inclusive, in tokens; None is unlimited.

    `local(w)` means `local((w, w))`. Source: Beltagy et al., Longformer (2020), section 3.1.
    Density for n tokens, far from the ends: (left + 1 + right) / n. Reach: ceil((n - 1) / w).

    >>> local(256) == local((256, 256))
    True
    >>> print(local(100).text(1024, width=4))
    ┌────────┐
    │▓▓░░    │
    │░░▓▓░░  │
    │  ░░▓▓░░│
    │    ░░▓▓│
    └────────┘
    """

    window: int | tuple[int | None, int | None]
    tables, diagonal = False, True

    def __post_init__(self) -> None:
        normalize(self, window=window_of("local", self.window))

    @property
    def relative(self) -> bool:
        """True unless both sides are unlimited."""
        return self.window != (None, None)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """-right <= q - kv <= left."""
        left, right = self.window  # type: ignore[misc]
        if left is None and right is None:
            return always(q)
        if left is None:
            return kv - q <= right
        if right is None:
            return q - kv <= left
        return (q - kv <= left) & (kv - q <= right)


@pattern
class block_local(Pattern):
    """allowed(q, kv) = |q // block - kv // block| <= window: whole blocks around the query's own.

    Source: Zaheer et al., Big Bird (2020), section 2 (window attention, blocked).
    Density for m blocks, far from the ends: (2 window + 1) / m. Reach: ceil((m - 1) / window).

    >>> block_local(128, 1).layout(1024).num_partial
    0
    """

    block: int
    window: int
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, block=1, window=0)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """At most `window` blocks apart."""
        apart = q // self.block - kv // self.block
        return (apart <= self.window) & (apart >= -self.window)
