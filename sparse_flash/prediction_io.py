"""The IO model of FlashAttention: elements that attention reads from and writes to HBM.

Source: Dao et al., FlashAttention (2022), theorem 2, proposition 4, appendix B. With N tokens,
head_dim d and on-chip memory for M elements, standard attention takes Theta(N d + N^2) accesses,
FlashAttention Theta(N^2 d^2 / M), and block-sparse FlashAttention Theta(N d + N^2 d^2 s / M), where
s is the fraction of stored blocks. The functions here count the accesses of the algorithms.
"""

from __future__ import annotations

import math


def standard(length: int, head_dim: int, backward: bool = False, passes: int = 0) -> float:
    """Accesses of attention that stores S and P, in elements.

    Forward (algorithm 0): reads Q, K; writes S; reads S, writes P; reads P, V; writes O: 4 N d +
    4 N^2. Backward (algorithm 3) computes dV from P and dO, dP from dO and V, dS from P and dP, dQ
    from dS and K, and dK from dS and Q: 10 N d + 7 N^2 more.

    Args:
        length: N, number of queries and of keys.
        head_dim: d, width of a head.
        backward: Add the backward pass.
        passes: Kernels of their own that read and write an N x N array, such as a mask, dropout,
            and their gradients: 2 N^2 each.

    >>> standard(1024, 64) / (4 * 1024**2)
    1.0625
    """
    linear, square = (14, 11) if backward else (4, 4)
    return linear * length * head_dim + (square + 2 * passes) * length**2


def flash(
    length: int, head_dim: int, on_chip: int, density: float = 1.0, backward: bool = False
) -> float:
    """Accesses of FlashAttention (algorithms 1 and 4; 5 where sparse), in elements.

    The outer loop reads each block of K and V once. In each of its T = ceil(4 N d / M) steps the
    inner loop goes through the stored blocks of queries. Forward it reads Q and O, writes O, and
    reads and writes two statistics of each row: 2 N d + density T (3 N d + 4 N). Backward it reads
    Q, O, dO and dQ, writes dQ, and reads two statistics, and the outer loop reads K and V and
    writes dK and dV: 4 N d + density T (5 N d + 2 N) more. Results are written at least once.

    Args:
        length: N, number of queries and of keys.
        head_dim: d, width of a head.
        on_chip: M, elements that fit the on-chip memory.
        density: s, fraction of stored blocks, 0..1.
        backward: Add the backward pass.

    >>> round(standard(1024, 64) / flash(1024, 64, on_chip=98304), 1)
    6.1
    """
    area, steps = length * head_dim, density * math.ceil(4 * length * head_dim / on_chip)
    total = 2 * area + max(steps * (3 * area + 4 * length), 2 * area)
    if backward:
        total += 4 * area + max(steps * (5 * area + 2 * length), 5 * area)
    return total


def streaming(length: int, head_dim: int, tile_m: int, density: float = 1.0) -> float:
    """Accesses of a forward pass that keeps a tile of queries and streams K and V, in elements.

    The order of FlashAttention-2 and of the kernels here: Q is read and O written once, and for
    each of the N / tile_m tiles of queries the stored blocks of K and V are read:
    2 N d + N + 2 N d density N / tile_m. An L2 cache takes most of these reads off the memory.

    >>> streaming(1024, 64, tile_m=128) / flash(1024, 64, on_chip=98304) < 1.7
    True
    """
    tiles = math.ceil(length / tile_m)
    return 2 * length * head_dim + length + 2 * length * head_dim * max(density * tiles, 1.0)
