"""The best k blocks of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_flash.masks.arguments import integer
from sparse_flash.selection.scores import checked_block


def topk_blocks(
    scores: Tensor,
    k: int,
    *,
    block: tuple[int, int],
    causal: bool = False,
    sinks: int = 0,
    local: int = 0,
) -> Tensor:
    """Indices of the k key blocks with the highest scores in each row, forced blocks first.

    No gradient passes: indices are integers. Nothing here waits for the GPU.

    Args:
        scores: Scores `(b, h, nq, nk)`; h is the number of query heads, or of key heads whose
            choice their query heads share.
        k: Blocks per row, forced ones included.
        block: (block_q, block_kv), in tokens: says where a row's own tokens lie.
        causal: Choose among blocks whose first key is not later than the row's last query.
        sinks: Number of first key blocks that are always chosen.
        local: Number of key blocks that are always chosen, counted back from that of the row's
            last query.

    Returns:
        int32 `(b, h, nq, k)`, ascending; -1, at the end of a row, where there are fewer blocks
        to choose from. For `BlockLayout.from_topk`.

    Raises:
        TypeError: scores is not a floating-point tensor, or a number is not an int.
        ValueError: scores is not (b, h, nq, nk), k is below 1, or less than the forced blocks.

    >>> scores = torch.tensor([[[[1.0, 2, 3, 4], [4, 3, 2, 1]]]])
    >>> topk_blocks(scores, 2, block=(64, 32)).tolist()
    [[[[2, 3], [0, 1]]]]
    >>> topk_blocks(scores, 2, block=(64, 32), causal=True, local=1).tolist()
    [[[[0, 1], [0, 3]]]]
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        what = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating-point tensor, got {what}")
    if scores.ndim != 4 or 0 in scores.shape[2:]:
        raise ValueError(f"scores must be (b, h, nq, nk), got {tuple(scores.shape)}")
    given = (("sinks", sinks, 0), ("local", local, 0), ("k", k, 1))
    sinks, local, k = (integer("topk_blocks", *number) for number in given)
    forced_number = min(sinks + local, scores.shape[3])
    if k < forced_number:
        raise ValueError(
            f"k={k} is less than the {forced_number} forced blocks (sinks={sinks}, local={local}): "
            f"give k of at least {forced_number}"
        )
    allowed, forced = forced_blocks(scores, checked_block(block), causal, sinks, local)
    largest = torch.finfo(scores.dtype).max
    ranked = scores.detach().clamp(-largest, largest)
    ranked = torch.where(forced, torch.inf, torch.where(allowed, ranked, -torch.inf))
    nk = scores.shape[3]
    best, indices = ranked.topk(min(k, nk), sorted=False)
    indices = torch.where(best == -torch.inf, nk, indices).sort().values
    indices = torch.where(indices == nk, -1, indices).int()
    return torch.nn.functional.pad(indices, (0, k - indices.shape[3]), value=-1)


def forced_blocks(
    scores: Tensor, block: tuple[int, int], causal: bool, sinks: int, local: int
) -> tuple[Tensor, Tensor]:
    """Which blocks may be chosen and which always are: bool (nq, nk) both."""
    block_q, block_kv = block
    nq, nk = scores.shape[2:]
    row, column = (torch.arange(n, device=scores.device) for n in (nq, nk))
    own = (((row + 1) * block_q - 1) // block_kv).clamp(max=nk - 1)[:, None]
    allowed = column <= own if causal else torch.ones_like(column <= own)
    recent = (column <= own) & (column > own - local)
    return allowed, ((column < sinks) | recent) & allowed
