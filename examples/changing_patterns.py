"""A pattern that changes during training, under one CUDA graph where there is a GPU.

    python examples/changing_patterns.py

Each query block keeps the key blocks with the largest mean score, and updates it every few steps.
The layout changes in place: `update_`. Nothing is compiled or captured again.
"""

import torch
from torch import Tensor

from sparse_flash import BlockLayout, block_sparse_attention, masks

LENGTH, BLOCK, KEEP, HEADS, DIM = 1024, 128, 3, 2, 32


def choose(q: Tensor, k: Tensor) -> BlockLayout:
    """The layout of the `KEEP` best key blocks for each query block, one for all heads."""
    blocks = [x.float().mean(dim=(0, 2)).view(-1, BLOCK, DIM).mean(1) for x in (q, k)]
    best = (blocks[0] @ blocks[1].T).topk(KEEP, dim=1).indices.cpu()
    table = torch.zeros(LENGTH // BLOCK, LENGTH // BLOCK, dtype=torch.bool)
    table[torch.arange(len(table))[:, None], best] = True
    return masks.from_blocks(table, BLOCK).layout(LENGTH, device=q.device)


def main() -> None:
    """Replay a graph, or call again on a CPU, while the pattern changes."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, LENGTH, HEADS, DIM, device=device, dtype=dtype) for _ in range(3))
    layout = choose(q, k)

    def attend() -> Tensor:
        return block_sparse_attention(q, k, v, layout)

    out = attend()  # warm up: compiles the kernel on a GPU
    graph = None
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend()
    for step in range(3):
        q.copy_(torch.randn_like(q))
        layout.update_(choose(q, k))  # the same number of tiles each time
        if graph is None:
            out = attend()
        else:
            graph.replay()
        dense = block_sparse_attention(q, k, v, masks.from_dense(layout.to_dense().cpu()))
        error = (out - dense).abs().max().item()
        print(f"step {step}: {layout.num_tiles} tiles, largest difference {error:.1e}")
        assert error < 0.02


if __name__ == "__main__":
    main()
