"""A mask of your own, its numbers, and its picture in the terminal and as a PNG.

python examples/custom_mask.py [PICTURE.png]
"""

import sys

import torch

from sparse_flash import block_sparse_attention, densities, masks

LENGTH, BLOCK = 2048, 128


def comb(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """The last 100 keys, and every 64th key before."""
    return (kv <= q) & ((q - kv < 100) | (kv % 64 == 0))


def main(picture: str | None = None) -> None:
    """Compare the comb with a pattern of the library that costs less."""
    window = (masks.local((99, 0)) | masks.sinks(32)) & masks.causal()
    for mask in (masks.custom(comb), window):
        layout = mask.layout(LENGTH, block=(BLOCK, BLOCK))
        print(f"{mask}\n{densities(layout, head_dim=32)}")
        print(mask.text(LENGTH, width=16))
    q, k, v = (torch.randn(1, LENGTH, 2, 32) for _ in range(3))
    out = block_sparse_attention(q, k, v, masks.custom(comb))
    print("output:", tuple(out.shape))
    if picture:
        masks.custom(comb).plot(LENGTH).savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
