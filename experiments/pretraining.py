"""Masked-pixel pretraining: predict the gray values of hidden pixels, before labels are used.

The task's own images are the only data, as in Amos et al., "Never Train from Scratch" (2023). The
encoder is that of the label stages. A linear head per token predicts each hidden pixel, by cross-
entropy over all gray values. Head and mask token are dropped afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from sparse_flash.experiments.curriculum import Stage
from sparse_flash.experiments.data.dataset import Batch
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.model import Encoder
from torch import Tensor

_BITS = (1 << 32) - 1
_TOKENS, _HEAD = "tokens.weight", "head."


def for_stage(stage: Stage, batch: Batch, key: tuple[int, ...], shard: tuple[int, int]) -> Batch:
    """The batch as the objective of a stage wants it; see `mask_pixels`."""
    if not stage.pretrains:
        return batch
    return mask_pixels(batch, stage.masked, Pathfinder.vocabulary, key, shard)


def mask_pixels(
    batch: Batch, masked: float, vocabulary: int, key: tuple[int, ...], shard: tuple[int, int]
) -> Batch:
    """Replace pixels of each image by the mask token; these pixels are to be predicted.

    Args:
        batch: Images, tokens `(b, s)`.
        masked: Fraction of the pixels to mask, above 0 and below 1.
        vocabulary: Number of gray values; the mask token is the next number.
        key: Numbers that determine the pixels, such as seed, stage and step.
        shard: Number of the first image within the whole batch, and distance to the next one.

    Returns:
        tokens `(b, s)` with mask tokens; queries `(b, n)`, the masked pixels; labels `(b, n)`,
        their gray values. n is the same for all images. Any device gives the same pixels.

    >>> images = Batch(torch.arange(8).view(2, 4), None, torch.zeros(2))
    >>> some = mask_pixels(images, 0.5, 256, (0, 0), (0, 1))
    >>> (some.tokens == 256).sum(1), some.queries.shape
    (tensor([2, 2]), torch.Size([2, 2]))
    >>> bool((some.labels == images.tokens.gather(1, some.queries)).all())
    True
    """
    count, length = batch.tokens.shape
    hidden = min(length - 1, max(1, round(masked * length)))
    order = pixel_order(count, length, key, shard, batch.tokens.device)
    queries = order[:, :hidden]
    tokens = batch.tokens.scatter(1, queries, vocabulary)
    return Batch(tokens, batch.lengths, batch.tokens.gather(1, queries), queries)


def pixel_order(
    count: int, length: int, key: tuple[int, ...], shard: tuple[int, int], device: torch.device
) -> Tensor:
    """A random order of the pixels of each image, int64 `(count, length)`.

    From a hash function of integers: CPUs and GPUs agree, and there is no state to save.
    """
    seed = 0x243F6A88  # any number but 0, which the hash keeps
    for number in key:
        seed = _hash((seed + number % (_BITS + 1)) & _BITS)
    first, every = shard
    image = first + every * torch.arange(count, device=device)
    row = _hash((image + seed) & _BITS)[:, None]
    pixel = torch.arange(length, device=device)
    scores = _hash((row + 0x9E3779B1 * pixel) & _BITS)
    return (scores * length + pixel).argsort(1)


def _hash(x: Any) -> Any:
    """Mix the bits of an int or an int64 tensor below 2^32; no product overflows."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _BITS
    return (x >> 16) ^ x


def carried(state: dict[str, Any], model: Encoder) -> dict[str, Any]:
    """The state of a stage, for the model of the next one.

    Between label stages it stays as it is. After pretraining, the model has the encoder's weights
    and their moving average, a new head, no mask token, and an optimizer without moments: those
    were of another loss.

    Args:
        state: "model", a state dict; "average", a tensor for each parameter; "optimizer".
        model: Model of the next stage, with its initial weights.
    """
    mine = model.state_dict()
    if state["model"][_TOKENS].shape == mine[_TOKENS].shape:
        return state

    def encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: own
            if name.startswith(_HEAD)
            else weights[name][: len(own)]
            if name == _TOKENS
            else weights[name]
            for name, own in mine.items()
        }

    names = [name for name, _ in model.named_parameters()]
    average = encoder(state["model"] | dict(zip(names, state["average"], strict=True)))
    return {
        "model": encoder(state["model"]),
        "average": [average[name] for name in names],
        "optimizer": {"state": {}},
    }
