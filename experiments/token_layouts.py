"""The layout of a batch, decided by its tokens: made once, for all layers of an encoder.

Imported where it is needed: `torch.compiler.disable` loads TorchDynamo, which takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.experiments.model import Encoder


@torch.compiler.disable
def lay_out(encoder: Encoder, tokens: Tensor) -> None:
    """Give all layers the layout of a batch, outside of compiled graphs, which take it as input.

    Args:
        encoder: Its attention has a layout that tokens decide.
        tokens: Tokens `(b, s)`; hidden pixels count as background.
    """
    assert encoder.layouts is not None
    if encoder.mask_token is not None:
        tokens = tokens.masked_fill(tokens == encoder.mask_token, 0)
    layout = encoder.layouts(tokens)
    for layer in encoder.layers:
        layer.attention.core.layout = layout  # type: ignore[union-attr]
