"""Masks (what may attend to what), layouts (which tiles exist), and pictures of both.

>>> from sparse_flash import masks
>>> mask = masks.local(256) | masks.global_tokens(64) | masks.butterfly(block=128)
>>> layout = mask.layout(65536, block=(128, 128))
>>> layout.num_tiles, layout.num_partial, layout.num_bit_tiles
(7142, 1512, 4)
"""

from sparse_flash.masks.heads import HeadMasks, per_batch, per_head
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.mask import Mask, through
from sparse_flash.masks.orders import TokenOrder, hilbert, morton, order, raster
from sparse_flash.masks.parser import parse
from sparse_flash.masks.patterns import (
    axial,
    bigbird,
    block_diagonal,
    block_local,
    butterfly,
    causal,
    custom,
    dilated,
    documents,
    fixed,
    from_blocks,
    from_dense,
    from_scipy,
    full,
    global_tokens,
    local,
    longformer,
    longnet,
    neighborhood,
    patches,
    random_blocks,
    random_blocks_per_row,
    sinks,
    star,
    star_attention,
    strided,
)
from sparse_flash.masks.patterns.shift import shift
from sparse_flash.masks.retile import retile

neighbourhood = neighborhood  # the former spelling

__all__ = [
    "BlockLayout",
    "HeadMasks",
    "Mask",
    "TokenOrder",
    "axial",
    "bigbird",
    "block_diagonal",
    "block_local",
    "butterfly",
    "causal",
    "custom",
    "dilated",
    "documents",
    "fixed",
    "from_blocks",
    "from_dense",
    "from_scipy",
    "full",
    "global_tokens",
    "hilbert",
    "local",
    "longformer",
    "longnet",
    "morton",
    "neighborhood",
    "order",
    "parse",
    "patches",
    "per_batch",
    "per_head",
    "random_blocks",
    "random_blocks_per_row",
    "raster",
    "retile",
    "shift",
    "sinks",
    "star",
    "star_attention",
    "strided",
    "through",
]


def __dir__() -> list[str]:
    """The public names, without the modules that they come from."""
    return __all__
