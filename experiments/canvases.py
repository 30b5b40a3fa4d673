"""The models of a curriculum: one per canvas size, all with the same weights."""

from __future__ import annotations

import torch
from sparse_flash.experiments.curriculum import Curriculum, Objective
from sparse_flash.experiments.data.images import coordinates
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.model import Encoder


def canvas_model(curriculum: Curriculum, size: int, objective: Objective = "labels") -> Encoder:
    """The model for a canvas of size x size pixels.

    For masked pixels it has one token more, and a head for each gray value.

    Raises:
        ValueError: Attention and sizes do not fit each other.
    """
    vocabulary, pretrains = Pathfinder.vocabulary, objective != "labels"
    return Encoder(
        curriculum.model,
        vocabulary + pretrains,
        vocabulary if pretrains else Pathfinder.classes,
        size**2,
        curriculum.kind(size),
        curriculum.block,
        coordinates(curriculum.order, size),
        mask_token=vocabulary if pretrains else None,
    )


def check_canvases(curriculum: Curriculum) -> None:
    """Build the model of each canvas once, so that impossible settings are refused before training.

    Raises:
        ValueError: Attention and sizes do not fit each other, or weights depend on the canvas.
    """
    label = curriculum.attention_label
    sizes = sorted({stage.size for stage in curriculum.stages})
    shapes = []
    with torch.random.fork_rng(devices=[]):
        for size in sizes:
            try:
                weights = canvas_model(curriculum, size).state_dict()
            except ValueError as error:
                raise ValueError(f"attention {label!r}: {error}") from error
            shapes.append({name: weight.shape for name, weight in weights.items()})
    wrong = [name for shape in shapes for name in shape if shape[name] != shapes[0].get(name)]
    if wrong:
        raise ValueError(
            f"attention {label!r} has weights whose shape depends on the canvas, {wrong[0]} say: a "
            f"curriculum carries weights from {sizes[0]} to {sizes[-1]} pixels"
        )
