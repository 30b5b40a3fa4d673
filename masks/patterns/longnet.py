"""LongNet: dilated segments; longer ones are sparser."""

from __future__ import annotations

from sparse_flash.masks.arguments import integers, normalize, sizes
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth, never


@pattern
class longnet(Pattern):
    """allowed(q, kv) = for some (w, r): same segment of w tokens, both at `offset` modulo r.

    Source: Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens (2023), section 3.1.
    Heads may take different offsets: `per_head([longnet(w, r, offset=h) for h in range(r)])`.
    Density for n tokens, before overlaps: sum of w / (n r^2). Reach: computed.

    >>> longnet((64, 256), (1, 4)).density(1024)
    0.07421875
    """

    segments: int | tuple[int, ...]
    dilations: int | tuple[int, ...]
    offset: int = 0
    relative, tables = True, False

    def __post_init__(self) -> None:
        segments = sizes("longnet", "segments", self.segments)
        dilations = sizes("longnet", "dilations", self.dilations)
        integers(self, offset=0)
        if len(segments) != len(dilations):
            raise ValueError(f"longnet: {len(segments)} segments but {len(dilations)} dilations")
        normalize(self, segments=segments, dilations=dilations)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same segment, both at `offset` modulo the dilation."""
        rule = never(q)
        for w, r in zip(self.segments, self.dilations, strict=True):  # type: ignore[arg-type]
            on_grid = ((q % w) % r == self.offset % r) & ((kv % w) % r == self.offset % r)
            rule = rule | ((q // w == kv // w) & on_grid)
        return rule
