"""Named barriers of the Hopper kernels."""

from enum import IntEnum


class ForwardBarrier(IntEnum):
    """Named barriers of the kernels with one work tile per query block."""

    ALL = 0  # the whole CTA
    TURN = 1  # one per warpgroup (two to four): its turn to issue GEMMs
    OWN = 5  # one per warpgroup, among its own threads


class DecodeBarrier(IntEnum):
    """Named barriers of the decoding kernel."""

    ALL = 0  # the whole CTA
    CONSUMERS = 1


class BackwardBarrier(IntEnum):
    """Named barriers of the backward kernel."""

    ALL = 0  # the whole CTA
    BOTH = 1  # both warpgroups
    READY = 2  # per buffer, one for each warpgroup with its store warp: the buffer is filled
    STAGGER = 10  # delays the second warpgroup


class SmallBackwardBarrier(IntEnum):
    """Named barriers of the backward kernel for small blocks."""

    ALL = 0  # the whole CTA
    CONSUMERS = 1


class Tile96BackwardBarrier(IntEnum):
    """Named barriers of the backward kernel with tiles of 96 keys."""

    ALL = 0  # the whole CTA
    P = 1  # the consumers: P is stored
    DS = 2  # likewise, dS
    P_FREE = 3  # likewise, P has been read
    READY = 4  # one for each warpgroup with its store warp: dQ is staged


class WideBackwardBarrier(IntEnum):
    """Named barriers of the backward kernel for large head_dims."""

    ALL = 0  # the whole CTA
    QUERIES = 1  # the warpgroup of dQ
