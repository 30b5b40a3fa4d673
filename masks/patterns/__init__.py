"""The pattern library: each pattern states its formula, source, density and reach."""

from sparse_flash.masks.patterns.butterfly import butterfly
from sparse_flash.masks.patterns.causal import causal
from sparse_flash.masks.patterns.custom import custom
from sparse_flash.masks.patterns.dilated import dilated
from sparse_flash.masks.patterns.documents import block_diagonal, documents
from sparse_flash.masks.patterns.from_data import from_blocks, from_dense, from_scipy
from sparse_flash.masks.patterns.full import full
from sparse_flash.masks.patterns.global_tokens import global_tokens, sinks
from sparse_flash.masks.patterns.images import axial, neighborhood, patches
from sparse_flash.masks.patterns.local import block_local, local
from sparse_flash.masks.patterns.longnet import longnet
from sparse_flash.masks.patterns.published import bigbird, longformer, star, star_attention
from sparse_flash.masks.patterns.random_blocks import random_blocks, random_blocks_per_row
from sparse_flash.masks.patterns.sparse_transformer import fixed, strided

__all__ = [
    "axial",
    "bigbird",
    "block_diagonal",
    "block_local",
    "butterfly",
    "causal",
    "custom",
    "dilated",
    "documents",
    "fixed",
    "from_blocks",
    "from_dense",
    "from_scipy",
    "full",
    "global_tokens",
    "local",
    "longformer",
    "longnet",
    "neighborhood",
    "patches",
    "random_blocks",
    "random_blocks_per_row",
    "sinks",
    "star",
    "star_attention",
    "strided",
]
