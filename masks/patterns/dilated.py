"""Dilated sliding window: wide context from few keys."""

from sparse_flash.masks.arguments import integers, normalize, saturate, window_of
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth


@pattern
class dilated(Pattern):
    """allowed(q, kv) = (q - kv) % dilation == 0 and -right <= (q - kv) / dilation <= left.

    The window counts kept keys, so it spans window x dilation tokens per side; None is unlimited.
    Source: Beltagy et al., Longformer (2020), section 3.1.
    Density for n tokens, far from the ends: (left + 1 + right) / n. Reach: never (None) for
    dilation > 1 alone: tokens with different remainders never interact.

    >>> import torch
    >>> dilated(2, 4)(torch.tensor(100), torch.arange(90, 111)).nonzero().flatten() + 90
    tensor([ 92,  96, 100, 104, 108])
    """

    window: int | tuple[int | None, int | None]
    dilation: int
    relative, tables, diagonal = True, False, True

    def __post_init__(self) -> None:
        normalize(self, window=window_of("dilated", self.window))
        integers(self, dilation=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """A multiple of `dilation` away, within the window."""
        left, right = self.window  # type: ignore[misc]
        rule = (q - kv) % self.dilation == 0
        if left is not None:
            rule = rule & (q - kv <= saturate(left * self.dilation))
        if right is not None:
            rule = rule & (kv - q <= saturate(right * self.dilation))
        return rule
