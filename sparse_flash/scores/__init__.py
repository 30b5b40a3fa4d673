"""Score terms as values: ALiBi, relative positions in one and two dimensions; dropout's bits.

A term is added to the scores of attention: `block_sparse_attention(..., bias=alibi(slopes))`. Terms
add with `+`. They hold tensors, compare by identity, and are read at every call; another value
compiles nothing.
"""

from sparse_flash.scores.bias import ScoreBias, alibi, alibi_slopes, relative, relative2d
from sparse_flash.scores.philox import keep_mask

__all__ = ["ScoreBias", "alibi", "alibi_slopes", "keep_mask", "relative", "relative2d"]
