"""How many layers until every token can influence every other."""

from __future__ import annotations

import torch
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch
from torch import Tensor
from torch.nn.functional import pad


@plain_torch()
def layers_to_reach(layout: BlockLayout, chunk: int = 1024) -> int | None:
    """The smallest L with (A or I)^L full, for a square layout of one pattern; None if none is.

    Works on `chunk` sources at a time: seen[i, j] says whether source j has influenced token i.
    """
    if layout.q_len != layout.kv_len:
        raise ValueError(
            f"reach needs as many queries as keys, got {layout.q_len}, {layout.kv_len}"
        )
    tiles, rows, cols = layout.tiles().float(), layout.tile_rows, layout.col_indices.long()
    worst = 1
    for start in range(0, layout.q_len, chunk):
        width = min(chunk, layout.q_len - start)
        sources = torch.arange(start, start + width, device=layout.device)
        seen = torch.zeros(layout.q_len, width, dtype=torch.float32, device=layout.device)
        seen[sources, sources - start] = 1
        layers = 0
        while not bool(seen.all()):
            wider = _spread(layout, tiles, rows, cols, seen)
            layers += 1
            if torch.equal(wider, seen):
                return None
            seen = wider
        worst = max(worst, layers)
    return worst


def _spread(layout: BlockLayout, tiles: Tensor, rows: Tensor, cols: Tensor, seen: Tensor) -> Tensor:
    """One layer: what each token has seen, and what the tokens that it attends to have seen."""
    n, block, width = layout.num_block_cols, layout.block[1], seen.shape[1]
    blocks = pad(seen, (0, 0, 0, n * block - len(seen))).view(n, block, width)
    total = blocks.clone()
    step = max(1, (1 << 24) // (block * width))
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        total.index_add_(0, rows[part], tiles[part] @ blocks[cols[part]])
    return (total.view(-1, width)[: len(seen)] > 0).float()
