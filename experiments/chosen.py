"""Which key blocks the layers of a model chose last, as pictures and numbers for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_flash.nn import TopKAttention

_SMALLEST = 256  # approximate pixels per side of a head's picture


def pictures(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A picture for each layer that chooses blocks: its heads next to each other.

    Rows are blocks of queries, columns blocks of keys. Black is chosen in all examples of the last
    batch, white in none.

    Yields:
        Name, and float32 `(1, height, width)` in 0..1.
    """
    for name, layer in _layers(model):
        if layer.chosen is None:
            continue
        often = frequencies(layer.chosen, layer.num_blocks)
        factor = max(1, _SMALLEST // max(often.shape[1:]))
        often = often.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        frame = torch.nn.functional.pad(often, (1, 1, 1, 1), value=0.5)
        yield f"chosen/{name}", 1.0 - torch.cat(list(frame), 1)[None]


def losses(model: nn.Module) -> dict[str, float]:
    """The last loss of each selector that has one, by name."""
    return {
        f"selection_loss/{name}": layer.selection_loss.item()
        for name, layer in _layers(model)
        if layer.selection_loss is not None
    }


def frequencies(chosen: Tensor, num_blocks: int) -> Tensor:
    """How often each block was chosen, over the batch: float32 `(h, nq, nk)` on the CPU.

    Args:
        chosen: Indices `(b, h, nq, k)`, -1 for none.
        num_blocks: Number of key blocks, nk.

    >>> frequencies(torch.tensor([[[[0, 1], [1, -1]]]]), 2)
    tensor([[[1., 1.],
             [0., 1.]]])
    """
    index = torch.where(chosen < 0, num_blocks, chosen).long()
    shape = (*chosen.shape[:3], num_blocks + 1)
    table = torch.zeros(shape, device=chosen.device).scatter_(3, index, 1.0)
    return table[..., :-1].mean(0).cpu()


def _layers(model: nn.Module) -> Iterator[tuple[str, TopKAttention]]:
    """Layers that choose, by their number."""
    found = [module for module in model.modules() if isinstance(module, TopKAttention)]
    for number, layer in enumerate(found):
        yield f"layer{number}", layer
