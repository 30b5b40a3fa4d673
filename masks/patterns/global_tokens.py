"""Global tokens and sinks: keys for all queries."""

from sparse_flash.masks.arguments import integers
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth


@pattern
class global_tokens(Pattern):
    """allowed(q, kv) = q < n or kv < n: full rows and columns for the first n tokens.

    Source: Beltagy et al., Longformer (2020), section 3.1 (symmetric global attention).
    Density for s tokens: 2n / s - (n / s)^2. Reach: 2.

    >>> global_tokens(16).reach(128), global_tokens(16).density(128)
    (2, 0.234375)
    """

    n: int
    relative, tables = False, False

    def __post_init__(self) -> None:
        integers(self, n=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The query or the key is global."""
        return (q < self.n) | (kv < self.n)


@pattern
class sinks(Pattern):
    """allowed(q, kv) = kv < n: all queries attend to the first n keys.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023).
    Density for s tokens: n / s. Reach: never (None) alone; sinks attend only to themselves.

    >>> from sparse_flash import masks
    >>> (sinks(4) | masks.local((1023, 0))).density(4096)
    0.219512939453125
    """

    n: int
    relative, tables = False, False

    def __post_init__(self) -> None:
        integers(self, n=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The key is a sink."""
        return kv < self.n
