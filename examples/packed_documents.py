"""Packed documents: several documents in one sequence, without attention between them.

    python examples/packed_documents.py

Each document has the same result as alone, and no token is padding.
"""

import torch

from sparse_flash import block_sparse_attention, masks

LENGTHS = (300, 80, 500, 144)


def main() -> None:
    """Compare packed attention with attention for each document."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, sum(LENGTHS), 4, 32) for _ in range(3))
    mask = masks.documents(LENGTHS) & masks.causal()
    packed = block_sparse_attention(q, k, v, mask)
    alone = [
        block_sparse_attention(*parts, masks.causal())
        for parts in zip(*(x.split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)
    padded = len(LENGTHS) * max(LENGTHS)
    print(f"{sum(LENGTHS)} tokens instead of {padded}; density {mask.density(sum(LENGTHS)):.1%}")
    # Another packing for each batch entry; a new one compiles nothing.
    batch = masks.per_batch([masks.documents((512, 512)), masks.documents((300, 724))])
    q, k, v = (torch.randn(2, 1024, 4, 32) for _ in range(3))
    print("two packings:", tuple(block_sparse_attention(q, k, v, batch).shape))


if __name__ == "__main__":
    main()
