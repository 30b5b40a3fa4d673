"""Published patterns that are combinations of others."""

from __future__ import annotations

from sparse_flash.masks.arguments import integer
from sparse_flash.masks.mask import Mask, named
from sparse_flash.masks.patterns.documents import block_diagonal
from sparse_flash.masks.patterns.global_tokens import global_tokens, sinks
from sparse_flash.masks.patterns.local import block_local, local
from sparse_flash.masks.patterns.random_blocks import random_blocks_per_row


@named
def longformer(window: int = 256, n_global: int = 1) -> Mask:
    """local(window) | global_tokens(n_global), `window` per side.

    Source: Beltagy et al., Longformer (2020).
    Density for s tokens: about (2 window + 1 + 2 n_global) / s. Reach: 2.

    >>> longformer(128, 16)
    local((128, 128)) | global_tokens(16)
    """
    return local(window) | global_tokens(n_global)


@named
def bigbird(
    length: int,
    block: int = 64,
    window: int = 3,
    n_global: int = 2,
    n_random: int = 3,
    seed: int = 0,
) -> Mask:
    """`window` local blocks, `n_global` global blocks and `n_random` random blocks per row.

    Source: Zaheer et al., Big Bird: Transformers for Longer Sequences (2020), section 2 (ITC).
    Density for m blocks: about (window + 2 n_global + n_random) / m. Reach: 2, through the global
    blocks.

    >>> bigbird(1024, block=64).reach(1024)
    2
    """
    if integer("bigbird", "window", window) % 2 == 0:
        raise ValueError(f"bigbird: window must be an odd number of blocks, got {window}")
    mask: Mask = block_local(block, window // 2)
    if integer("bigbird", "n_global", n_global, 0):
        mask = mask | global_tokens(n_global * block)
    if integer("bigbird", "n_random", n_random, 0):
        mask = mask | random_blocks_per_row(length, n_random, block, seed)
    return mask


@named
def star(ring: int = 1) -> Mask:
    """local(ring) | global_tokens(1): a ring of satellites around one relay token.

    Source: Guo et al., Star-Transformer (2019).
    Density for s tokens: about (2 ring + 3) / s. Reach: 2.

    >>> star(1).reach(64)
    2
    """
    return local(ring) | global_tokens(1)


@named
def star_attention(block: int) -> Mask:
    """block_diagonal(block) | sinks(block): the own block and the first one, the anchor.

    Source: Acharya et al., Star Attention (2024), section 2.1 (context encoding).
    Density for m blocks: (2m - 1) / m^2. Reach: never (None); the anchor attends only to itself.

    >>> star_attention(256).density(1024)
    0.4375
    """
    return block_diagonal(block) | sinks(block)
