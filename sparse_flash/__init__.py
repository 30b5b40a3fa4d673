"""Block-sparse attention research toolkit.

    Mask (what may attend) -> BlockLayout (which tiles exist) -> attention restricted to them

>>> import torch
>>> from sparse_flash import block_sparse_attention, masks
>>> q, k, v = (torch.randn(2, 300, 4, 32) for _ in range(3))
>>> block_sparse_attention(q, k, v, masks.local(64) | masks.global_tokens(8)).shape
torch.Size([2, 300, 4, 32])
"""

from pathlib import Path

from sparse_flash.install import check_one_install, folders

check_one_install(Path(__file__).resolve().parent, folders())

from sparse_flash import masks, scores
from sparse_flash.api import block_sparse_attention
from sparse_flash.density import Densities, computed_density, densities
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.records import clear_cache, set_cache_limit
from sparse_flash.prediction import Prediction, predict
from sparse_flash.selection import merge_attention
from sparse_flash.verification import Verification, verify

__version__ = "0.1.0"  # the only place: pyproject.toml reads it
__all__ = [
    "BlockLayout",
    "Densities",
    "Prediction",
    "Verification",
    "block_sparse_attention",
    "clear_cache",
    "computed_density",
    "densities",
    "masks",
    "merge_attention",
    "predict",
    "scores",
    "set_cache_limit",
    "verify",
]


def __dir__() -> list[str]:
    """The public names, without the modules that they come from."""
    return [*__all__, "__version__"]
