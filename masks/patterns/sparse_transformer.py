"""The two factorized patterns of the Sparse Transformer (Child et al., 2019), bidirectional.

The paper uses causal ones: `strided(128) & causal()`.
"""

from sparse_flash.masks.arguments import integers
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth


@pattern
class strided(Pattern):
    """allowed(q, kv) = |q - kv| < stride or (q - kv) % stride == 0.

    Source: Child et al., Generating Long Sequences with Sparse Transformers (2019), section 4.2,
    both heads of the strided pattern together.
    Density for n tokens: about 2 stride / n + 1 / stride.
    Reach: 2.

    >>> strided(16).reach(256)
    2
    """

    stride: int
    relative, tables, diagonal = True, False, True

    def __post_init__(self) -> None:
        integers(self, stride=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """At a distance below `stride`, or a multiple of it."""
        near = (q - kv < self.stride) & (kv - q < self.stride)
        return near | ((q - kv) % self.stride == 0)


@pattern
class fixed(Pattern):
    """allowed(q, kv) = q // stride == kv // stride or kv % stride >= stride - summary.

    All queries attend to the last `summary` tokens of each segment of `stride`.
    Source: Child et al. (2019), section 4.2, both heads of the fixed pattern together.
    Density for n tokens: about stride / n + summary / stride. Reach: 2.

    >>> fixed(16, 2).reach(256)
    2
    """

    stride: int
    summary: int = 1
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, stride=1, summary=1)
        if self.summary > self.stride:
            raise ValueError(f"fixed: summary {self.summary} exceeds the stride {self.stride}")

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same segment, or the key is a summary token."""
        same = q // self.stride == kv // self.stride
        return same | (kv % self.stride >= self.stride - self.summary)
