"""Swap the attention of a GPT block, in the style of torchtitan and Lightning: one module per role.

    python examples/gpt_block.py --steps 50

On a CPU sparsity saves time from several thousand tokens on (`--length 8192`).
`CausalSelfAttention` is the usual dense one. `BlockSparseSelfAttention` has the same parameters and
differs in one method, so `swap_attention` also works on a trained model. The training module has
the methods of a LightningModule (`training_step`, `configure_optimizers`) and needs no Lightning;
with it, derive `LanguageModel` from `lightning.LightningModule` and pass it to a Trainer.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from sparse_flash import block_sparse_attention, masks


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model."""

    vocabulary: int = 64
    dim: int = 64
    heads: int = 4
    layers: int = 2
    length: int = 512


class CausalSelfAttention(nn.Module):
    """Dense causal attention, `(b, s, dim)` to `(b, s, dim)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Project, attend, project back."""
        b, s, dim = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, dim // self.heads).unbind(2)
        return self.out(self.attend(q, k, v).reshape(b, s, dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `(b, s, h, d)`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class BlockSparseSelfAttention(CausalSelfAttention):
    """The same parameters, attention within a mask."""

    def __init__(self, config: GPTConfig, mask: masks.Mask) -> None:
        super().__init__(config)
        self.mask = mask & masks.causal()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `(b, s, h, d)`: only the stored tiles are computed."""
        return block_sparse_attention(q, k, v, self.mask)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention: CausalSelfAttention = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim), nn.GELU(), nn.Linear(4 * config.dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added to its input."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token ids `(b, s)` to logits `(b, s, vocabulary)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.dim)
        self.positions = nn.Embedding(config.length, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.dim, config.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def swap_attention(model: GPT, layer_masks: dict[int, masks.Mask]) -> GPT:
    """Replace the attention of some blocks, weights kept; other blocks stay dense.

    Args:
        model: The model, changed in place.
        layer_masks: The mask of each block to replace, by its index.
    """
    for index, mask in layer_masks.items():
        block = model.blocks[index]
        dense = block.attention
        sparse = BlockSparseSelfAttention(model.config, mask).to(dense.qkv.weight)
        sparse.load_state_dict(dense.state_dict())
        block.attention = sparse
    return model


class LanguageModel(nn.Module):
    """Training of a GPT, with the methods of a LightningModule."""

    def __init__(self, model: GPT, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of a batch of token ids `(b, s)`."""
        logits = self.model(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(module: LanguageModel, steps: int, batch: int = 4) -> tuple[float, float]:
    """Train on rows that count from a random token; last loss, and seconds a step."""
    torch.manual_seed(0)
    optimizer, config = module.configure_optimizers(), module.model.config
    loss, start = torch.tensor(0.0), time.perf_counter()
    for step in range(steps):
        first = torch.randint(config.vocabulary, (batch, 1))
        ids = (first + torch.arange(config.length)) % config.vocabulary
        loss = module.training_step(ids, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), (time.perf_counter() - start) / steps


def main() -> None:
    """Train the dense model and the block-sparse one, from the same weights."""
    parser = argparse.ArgumentParser(description="Dense and block-sparse attention in a GPT block.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    config = GPTConfig(length=arguments.length)
    mask = masks.local((63, 0)) | masks.sinks(4)
    for name in ("dense", "block-sparse"):
        torch.manual_seed(0)
        model = GPT(config)
        if name == "block-sparse":
            swap_attention(model, dict.fromkeys(range(config.layers), mask))
        loss, seconds = fit(LanguageModel(model), arguments.steps)
        print(f"{name:>12}: loss {loss:.3f}, {1000 * seconds:.1f} ms a step")


if __name__ == "__main__":
    main()
