"""Patterns in two dimensions, for images in raster order (see `mask.through` for other orders)."""

from __future__ import annotations

from sparse_flash.masks.arguments import integers, normalize, sizes
from sparse_flash.masks.extents import Extents
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Truth


@pattern
class axial(Pattern):
    """allowed(q, kv) = same row or same column of an image of height x width.

    Source: Ho et al., Axial Attention in Multidimensional Transformers (2019).
    Density: (height + width - 1) / (height width). Reach: 2.

    >>> axial(16, 16).reach(256), axial(16, 16).density(256)
    (2, 0.12109375)
    """

    height: int
    width: int
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, height=1, width=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same row or column."""
        return (q // self.width == kv // self.width) | (q % self.width == kv % self.width)

    def extents(self) -> Extents:
        """One token per pixel."""
        return self.height * self.width, self.height * self.width


@pattern
class patches(Pattern):
    """allowed(q, kv) = the patches of q and kv are at most `radius` patches apart, both ways.

    The image of height x width is divided into patches of `size` (rows, columns) pixels. In Morton
    order, patches of 8 x 16 pixels are blocks of 128 tokens, so all tiles are full.
    Source: the windows of `neighborhood`, coarsened to blocks.
    Density, far from the border: (2 radius + 1)^2 rows columns / (height width).
    Reach: about the larger side, in patches, over radius.

    >>> from sparse_flash import masks
    >>> windows = masks.patches(256, 256, (8, 16), 1).through(masks.morton(256, 256))
    >>> layout = windows.layout(65536)
    >>> layout.num_tiles, layout.num_partial
    (4324, 0)
    """

    height: int
    width: int
    size: tuple[int, int]
    radius: int = 1
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, height=1, width=1, radius=0)
        size = sizes("patches", "size", self.size)
        if len(size) != 2 or self.height % size[0] or self.width % size[1]:
            raise ValueError(
                f"patches: size must be (rows, columns) that divide {self.height} x {self.width}, "
                f"got {self.size}"
            )
        normalize(self, size=size)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """At most `radius` patches apart in both directions."""
        rows, columns = self.size
        down = q // self.width // rows - kv // self.width // rows
        right = q % self.width // columns - kv % self.width // columns
        near = (down <= self.radius) & (down >= -self.radius)
        return near & (right <= self.radius) & (right >= -self.radius)

    def extents(self) -> Extents:
        """One token per pixel."""
        return self.height * self.width, self.height * self.width


@pattern
class neighborhood(Pattern):
    """allowed(q, kv) = |row(q) - row(kv)| <= r_y and |column(q) - column(kv)| <= r_x.

    `radius` is in pixels: one int, or (r_y, r_x). At the border the window is cut off.
    Source: Parmar et al., Image Transformer (2018), section 3.3 (2-D local attention).
    Density, far from the border: (2 r_y + 1) (2 r_x + 1) / (height width).
    Reach: the larger of ceil((height - 1) / r_y) and ceil((width - 1) / r_x).

    >>> neighborhood(16, 16, 5).reach(256)
    3
    """

    height: int
    width: int
    radius: int | tuple[int, int]
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, height=1, width=1)
        radius = sizes("neighborhood", "radius", self.radius, 0)
        if len(radius) > 2:
            raise ValueError(f"neighborhood: radius must be an int or (r_y, r_x), got {radius}")
        normalize(self, radius=(radius[0], radius[-1]))

    def allowed(self, q: Index, kv: Index) -> Truth:
        """At most `radius` pixels apart in both directions."""
        down, right = self.radius  # type: ignore[misc]
        rows = q // self.width - kv // self.width
        cols = q % self.width - kv % self.width
        return (rows <= down) & (rows >= -down) & (cols <= right) & (cols >= -right)

    def extents(self) -> Extents:
        """One token per pixel."""
        return self.height * self.width, self.height * self.width
