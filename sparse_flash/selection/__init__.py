"""Data-dependent sparsity: scores of blocks, the best k, and losses for selectors.

    q, k -> block_scores -> topk_blocks -> BlockLayout.from_topk -> block_sparse_attention
                |                                                        |
          selection_loss  <-----------------  tile_mass  <--------------lse

>>> import torch
>>> from sparse_flash import BlockLayout, block_sparse_attention, masks, selection
>>> q, k, v = (torch.randn(1, 512, 2, 32) for _ in range(3))
>>> scores = selection.block_scores(q, k, block=(64, 64))
>>> chosen = selection.topk_blocks(scores, 3, block=(64, 64), causal=True, sinks=1, local=1)
>>> chosen.shape, chosen[0, 0, 0].tolist()  # the first blocks have less than three to choose from
(torch.Size([1, 2, 8, 3]), [0, -1, -1])
"""

from sparse_flash.selection.loss import attach_loss, selection_loss
from sparse_flash.selection.mass import tile_mass
from sparse_flash.selection.merge import merge_attention
from sparse_flash.selection.scores import block_scores, pool_blocks
from sparse_flash.selection.topk import topk_blocks

__all__ = [
    "attach_loss",
    "block_scores",
    "merge_attention",
    "pool_blocks",
    "selection_loss",
    "tile_mass",
    "topk_blocks",
]
