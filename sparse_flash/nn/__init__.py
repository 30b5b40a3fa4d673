"""Modules for models."""

from sparse_flash.nn.selected import SelectedAttention, TopKAttention
from sparse_flash.nn.selectors import CompressedSelector, IndexSelector, PooledSelector
from sparse_flash.nn.self_attention import KVCache, SelfAttention

__all__ = [
    "CompressedSelector",
    "IndexSelector",
    "KVCache",
    "PooledSelector",
    "SelectedAttention",
    "SelfAttention",
    "TopKAttention",
]
