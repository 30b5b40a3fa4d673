"""The generator of dropout: Philox4x32 with seven rounds, one byte an element.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011). Philox4x32 passes
TestU01's BigCrush with seven rounds (table 2 there), of which FlashAttention-2's dropout has as
many; ten are a margin of safety for which every element would pay.

One evaluation gives 16 bytes, for the 2 x 2 x 2 x 2 elements whose queries agree in q / 16 and
q % 8 / 2, and whose keys do likewise. So a 16 x 16 tile of a tensor core's accumulators needs 16
evaluations, whether rows are queries or, in the transposed product, keys.

    counter = (unit(kv), unit(q), batch * heads + head, 0),   unit(x) = 4 (x // 16) + x % 8 // 2
    key = (low, high) 32 bits of the seed
    byte    = word 2 (q % 2) + kv % 2, byte 2 (q // 8 % 2) + kv // 8 % 2 of it
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
LEVELS = 256  # of a byte: the resolution of the rate
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """The four words of each counter, as int64 in 0..2^32 - 1.

    Products of 32-bit words wrap around in int64, which leaves all 64 bits right.

    Args:
        counter: Four int64 tensors of 32-bit words, which broadcast.
        key: Two likewise.
        rounds: Number of rounds.
    """
    a, b, c, d = counter
    low, high = key
    for i in range(rounds):
        if i:
            low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _LOW) ^ b ^ low,
            second & _LOW,
            (first >> 32 & _LOW) ^ d ^ high,
            first & _LOW,
        )
    return a, b, c, d


def keep_mask(seed: Tensor, dropped: int, pair: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Which elements dropout keeps: a pure function of its arguments, equal on all devices.

    An element is kept where its byte is at least `dropped`: with probability 1 - dropped / 256.

    Args:
        seed: int64 `(1,)`, as the call draws it from torch's generator.
        dropped: Number of byte values that drop an element, 0..256.
        pair: Batch entry * query heads + query head, an integer tensor.
        q: Positions of queries, an integer tensor; all three broadcast.
        kv: Positions of keys, an integer tensor.

    Returns:
        Whether to keep each element, bool.

    >>> import torch
    >>> from sparse_flash import scores
    >>> seed, pair = torch.tensor([7]), torch.tensor(0)
    >>> q, kv = torch.arange(64)[:, None], torch.arange(64)
    >>> keep = scores.keep_mask(seed, 64, pair, q, kv)
    >>> round(keep.double().mean().item(), 2)
    0.75
    """
    pair, q, kv = (x.to(torch.int64) for x in (pair, q, kv))
    seed = seed.to(torch.int64).reshape(())
    zero = torch.zeros_like(pair)
    counter = (_unit(kv) & _LOW, _unit(q) & _LOW, pair & _LOW, zero)
    words = philox4x32(counter, (seed & _LOW, seed >> 32 & _LOW))
    even, odd = (torch.where(kv % 2 == 0, words[i], words[i + 1]) for i in (0, 2))
    word = torch.where(q % 2 == 0, even, odd)
    byte = word >> 8 * (2 * (q // 8 % 2) + kv // 8 % 2) & 0xFF
    return byte >= dropped


def _unit(x: Tensor) -> Tensor:
    return 4 * (x >> 4) + (x % 8 >> 1)
