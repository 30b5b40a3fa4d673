"""A vision transformer whose heads see different things: windows, and butterflies.

    python examples/vit_butterfly.py

Tokens are 32 x 32 patches of an image in Morton order, so that windows fill whole tiles.
"""

import torch
from torch import Tensor, nn

from sparse_flash import masks
from sparse_flash.nn import SelfAttention

SIDE, DIM, HEADS = 32, 64, 4


class Vit(nn.Module):
    """Two layers over 1,024 patches of 4 x 4 pixels; logits of 10 classes."""

    def __init__(self, mask: masks.Mask, order: masks.TokenOrder) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, kernel_size=4, stride=4)
        self.order = order
        self.positions = nn.Parameter(torch.zeros(SIDE * SIDE, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.layers = nn.ModuleList(SelfAttention(DIM, HEADS, mask=mask) for _ in range(2))
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, 128, 128) to (b, 10)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        x = self.order.permute(x)  # from raster order, once
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x.mean(1))


def main() -> None:
    """Two heads see 3 x 3 groups of 4 x 8 patches around them, two a butterfly of blocks."""
    order = masks.morton(SIDE, SIDE)
    window = masks.patches(SIDE, SIDE, (4, 8), 1).through(order)
    butterfly = masks.butterfly(block=32)
    mask = masks.per_head([window, window, butterfly, butterfly])
    layout = mask.layout(SIDE * SIDE, block=(32, 32))
    print(f"{layout.num_patterns} patterns for {HEADS} heads, density {layout.density:.1%}")
    in_raster = masks.patches(SIDE, SIDE, (4, 8), 1).layout(SIDE * SIDE, block=(32, 32))
    in_morton = window.layout(SIDE * SIDE, block=(32, 32))
    print(f"window: {in_raster.num_tiles} tiles in raster, {in_morton.num_tiles} in Morton order")
    logits = Vit(mask, order)(torch.randn(2, 3, 4 * SIDE, 4 * SIDE))
    logits.square().mean().backward()
    print("logits:", tuple(logits.shape))


if __name__ == "__main__":
    main()
