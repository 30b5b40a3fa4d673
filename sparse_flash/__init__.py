"""Block-sparse attention research toolkit.

    Mask (what may attend) -> BlockLayout (which tiles exist) -> attention restricted to them

>>> import torch
>>> from sparse_flash import block_sparse_attention, masks
>>> q, k, v = (torch.randn(2, 300, 4, 32) for _ in range(3))
>>> block_sparse_attention(q, k, v, masks.local(64) | masks.global_tokens(8)).shape
torch.Size([2, 300, 4, 32])
"""

from sparse_flash import masks
from sparse_flash.api import block_sparse_attention
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.records import clear_cache, set_cache_limit

__version__ = "0.1.0"
__all__ = ["BlockLayout", "block_sparse_attention", "clear_cache", "masks", "set_cache_limit"]
