"""Attention to the key blocks that a selector chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_flash import masks
from sparse_flash.api import block_sparse_attention
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.arguments import integer
from sparse_flash.nn.selectors import CompressedSelector, IndexSelector, PooledSelector
from sparse_flash.nn.self_attention import SelfAttention
from sparse_flash.selection import (
    attach_loss,
    merge_attention,
    selection_loss,
    tile_mass,
    topk_blocks,
)
from sparse_flash.selection.scores import Pool, checked_block

Selector = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_CAUSAL = masks.causal()
SELECTORS = ("moba", "dsa", "nsa")


class TopKAttention(nn.Module):
    """Exact attention of each block of queries to the key blocks that a selector scores best.

    The training signal depends on the selector:

    - scores that require no gradient are taken as they are (`PooledSelector`);
    - scores that do are trained to predict the attention paid to the chosen blocks, by
      `selection_loss`, whose gradient a backward pass through the output adds (`IndexSelector`);
    - a method `branch(q, k, v, kv_lens)` returns (out, lse) of a second set of keys, which are
      merged with those of the chosen blocks (`CompressedSelector`).

    Args:
        selector: Callable with q, k and kv_lens that returns scores `(b, h_kv or h, nq, nk)`.
        blocks: Key blocks for each block of queries, forced ones included.
        block: (block_q, block_kv), in tokens, or one number for both.
        causal: Whether queries see earlier keys only.
        sinks: Number of first key blocks that are always chosen.
        local: Number of key blocks up to a row's own that are always chosen.
        kl_weight: Factor of `selection_loss`.

    Attributes:
        chosen: Indices of the last call, int32 `(b, h_kv or h, nq, k)`; None before.
        num_blocks: Number of key blocks of the last call.
        selection_loss: That of the last call that computed one, a scalar; None before.

    Raises:
        TypeError: A number is not an int, or selector cannot be called.
        ValueError: There are fewer blocks than forced ones.

    >>> import torch
    >>> q, k, v = (torch.randn(2, 512, 4, 32) for _ in range(3))
    >>> attend = TopKAttention(PooledSelector((64, 64)), blocks=3, block=64)
    >>> attend(q, k, v).shape, attend.chosen.shape
    (torch.Size([2, 512, 4, 32]), torch.Size([2, 4, 8, 3]))
    """

    chosen: Tensor | None
    selection_loss: Tensor | None

    def __init__(
        self,
        selector: Selector,
        blocks: int,
        block: int | tuple[int, int] = 64,
        *,
        causal: bool = False,
        sinks: int = 0,
        local: int = 1,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not callable(selector):
            raise TypeError(f"selector must be callable with q, k, kv_lens, got {selector!r}")
        self.selector, self.causal = selector, causal
        self.block = checked_block(pair_of(block))
        given = (("blocks", blocks, 1), ("sinks", sinks, 0), ("local", local, 0))
        self.blocks, self.sinks, self.local = (integer("TopKAttention", *n) for n in given)
        if self.blocks < self.sinks + self.local:
            raise ValueError(
                f"blocks={self.blocks} must be at least sinks + local = {sinks} + {local}"
            )
        self.kl_weight = kl_weight
        self.chosen = self.selection_loss = None
        self.num_blocks = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Output `(b, s, h, d)` of q `(b, s, h, d)`, k and v `(b, s, h_kv, d)`, kv_lens `(b,)`."""
        if not len(q):  # nothing to choose
            return block_sparse_attention(q, k, v, masks.full(), kv_lens=kv_lens)
        scores = self._expanded(self.selector(q, k, kv_lens), q, k)
        forced = {"causal": self.causal, "sinks": self.sinks, "local": self.local}
        chosen = topk_blocks(scores, self.blocks, block=self.block, **forced)  # type: ignore[arg-type]
        within = _CAUSAL if self.causal else None
        lengths = (q.shape[1], k.shape[1])
        layout = BlockLayout.from_topk(chosen, self.block, *lengths, within=within)
        out, lse = block_sparse_attention(q, k, v, layout, kv_lens=kv_lens, return_lse=True)
        if torch.is_grad_enabled() and scores.requires_grad:
            mass = tile_mass(q.detach(), k.detach(), layout, lse.detach(), kv_lens=kv_lens)
            loss = selection_loss(scores, chosen, mass)
            out = attach_loss(out, loss, self.kl_weight)
            self.selection_loss = loss.detach()
        self.chosen, self.num_blocks = chosen, -(-k.shape[1] // self.block[1])
        branch = getattr(self.selector, "branch", None)
        if branch is None:
            return out
        others = branch(q, k, v, kv_lens)
        return merge_attention((out, others[0]), (lse, others[1]))[0]

    def _expanded(self, scores: Any, q: Tensor, k: Tensor) -> Tensor:
        """The selector's scores, for all batch entries.

        Raises:
            TypeError: They are not a tensor.
            ValueError: They have another shape.
        """
        if not isinstance(scores, Tensor):
            raise TypeError(f"the selector must return a tensor, got {type(scores).__name__}")
        b, q_len, h, _ = q.shape
        nq, nk = -(-q_len // self.block[0]), -(-k.shape[1] // self.block[1])
        heads = (1, k.shape[2], h)
        if (
            scores.ndim != 4
            or scores.shape[0] not in (1, b)
            or scores.shape[1] not in heads
            or scores.shape[2:] != (nq, nk)
        ):
            raise ValueError(
                "the selector must return scores (b, h_kv or h, nq, nk) = "
                f"({b}, {heads[1]} or {h}, {nq}, {nk}): ceil(tokens / block) rows and columns "
                f"for block={self.block}, got {tuple(scores.shape)}"
            )
        return scores.expand(b, -1, -1, -1)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return (
            f"blocks={self.blocks}, block={self.block}, causal={self.causal}, sinks={self.sinks}, "
            f"local={self.local}"
        )


class SelectedAttention(SelfAttention):
    """Projections to queries, keys and values, attention to chosen blocks, projection back.

    Args:
        dim: Width of the model; a multiple of `heads`.
        heads: Query heads.
        selector: "moba" (pooled q and k, no gradient), "dsa" (a small indexer that learns from the
            attention that was paid), "nsa" (compressed attention that scores the blocks and is
            merged with the output), or a callable as in `TopKAttention`.
        blocks: Key blocks for each block of queries, forced ones included.
        block: Size of the blocks, in tokens: one number, or (block_q, block_kv). Kernels compute
            tiles of 128 x 128: smaller blocks are united to these.
        causal: Whether queries see earlier keys only.
        sinks: Number of first key blocks that are always chosen.
        local: Number of key blocks up to a row's own that are always chosen. With causal, 0 lets
            pooled scores of a row's own block tell of later keys.
        pool: How "moba" and "dsa" pool tokens, as in `block_scores`.
        kv_heads: Key and value heads, a divisor of `heads`; default: as many.
        bias: Whether the projections have one.
        kl_weight: Factor of the loss of "dsa".

    Attributes:
        core: The `TopKAttention`, with the chosen blocks and the loss of the last call.

    Raises:
        TypeError: A size is not an int, or selector cannot be called.
        ValueError: Sizes do not fit each other, or the selector's name is unknown.

    >>> import torch
    >>> layer = SelectedAttention(64, 4, selector="dsa", blocks=3, block=64, causal=True)
    >>> y = layer(torch.randn(2, 512, 64))
    >>> y.sum().backward()  # trains the indexer, too
    >>> layer.core.selector.of_k.grad.abs().sum() > 0
    tensor(True)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        selector: str | Selector = "moba",
        blocks: int = 16,
        block: int | tuple[int, int] = 64,
        *,
        causal: bool = False,
        sinks: int = 0,
        local: int = 1,
        pool: Pool = "mean",
        kv_heads: int | None = None,
        bias: bool = True,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__(dim, heads, _CAUSAL if causal else masks.full(), kv_heads, bias)
        sizes = (self.heads, self.head_dim, self.kv_heads)
        self.core = TopKAttention(
            make_selector(selector, *sizes, pair_of(block), pool, causal),
            blocks,
            block,
            causal=causal,
            sinks=sinks,
            local=local,
            kl_weight=kl_weight,
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        q_offset: int | Tensor | None = None,
    ) -> Tensor:
        """Attention itself, `(b, s, h, d)`.

        Raises:
            ValueError: There is a cache: blocks are chosen among the keys of one call.
        """
        if q_offset is not None:
            raise ValueError(
                "SelectedAttention chooses among the keys of one call and takes no cache: call it "
                "with all tokens, or decode with SelfAttention and its weights"
            )
        return self.core(q, k, v, kv_lens)


def pair_of(block: int | tuple[int, int]) -> Any:
    """(block_q, block_kv) from a pair, or one number for both."""
    return (block, block) if isinstance(block, int) else block


def make_selector(
    selector: str | Selector,
    heads: int,
    head_dim: int,
    kv_heads: int,
    block: tuple[int, int],
    pool: Pool = "mean",
    causal: bool = False,
) -> Selector:
    """The selector of a name in `SELECTORS`; another callable as it is.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(selector, str):
        return selector
    if selector == "moba":
        return PooledSelector(block, pool, causal)
    if selector == "dsa":
        return IndexSelector(heads, head_dim, block, kv_heads, pool=pool, causal=causal)
    if selector == "nsa":
        return CompressedSelector(heads, head_dim, block, kv_heads, causal)
    raise ValueError(
        f"selector must be one of {', '.join(SELECTORS)}, or callable with q, k, kv_lens; got "
        f"{selector!r}"
    )
