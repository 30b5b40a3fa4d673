"""Pathfinder from easy to hard: longer curves, then larger images, each stage from the one before.

Attention that begins with the hard images often stays at chance; with rotary positions in pixels,
what was learned of curves on small images holds on large ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparse_flash.experiments import recipes
from sparse_flash.experiments.config import RunConfig
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.train import train

Size = Literal[32, 64, 128, 256]


@dataclass(frozen=True)
class Curriculum:
    """The stages, and what they share. Stage i has `sizes[i]`, `contours[i]` and `steps[i]`."""

    sizes: tuple[Size, ...] = (64, 64, 64, 128, 256)
    """Pixels a side."""
    contours: tuple[int, ...] = (6, 9, 14, 14, 14)
    """Paddles of a long curve."""
    steps: tuple[int, ...] = (5_000, 10_000, 30_000, 30_000, 30_000)
    """Optimiser steps."""
    images: int = 160_000
    """Training images of each stage."""
    attention: str = ""
    """A mask, if not 3 x 3 patches and a butterfly; PIXELS stands for the size."""
    seed: int = 0
    """Seed of images, weights and their order."""
    budget: float = float("inf")
    """Seconds of training for each stage."""

    def __post_init__(self) -> None:
        """All stages must be there, and possible."""
        lengths = {len(self.sizes), len(self.contours), len(self.steps)}
        if len(lengths) > 1 or not self.sizes:
            raise ValueError(
                "sizes, contours and steps must be as many as there are stages, got "
                f"{len(self.sizes)}, {len(self.contours)} and {len(self.steps)}"
            )
        for stage in range(len(self.sizes)):
            self.run(stage, "")

    def run(self, stage: int, init: str) -> RunConfig:
        """One stage, from the weights of the run `init`."""
        size, seed = self.sizes[stage], self.seed
        by_size = {64: recipes.path_64, 128: recipes.path_x, 256: recipes.path_256}
        base = by_size.get(size, recipes.path_64)()
        attention = self.attention.replace("PIXELS", str(size))
        if not attention:
            attention = recipes.patches_and_butterfly(size)
        held_out = min(2_000, self.images)
        assert isinstance(base.task, Pathfinder)
        task = replace(
            base.task,
            size=size,
            contour=self.contours[stage],
            easier=(),
            train=self.images,
            val=held_out,
            test=held_out,
            seed=seed,
        )
        steps = self.steps[stage]
        schedule = replace(base.train, steps=steps, warmup=min(base.train.warmup, steps // 5))
        return replace(base, task=task, attention=attention, train=schedule, seed=seed, init=init)


def follow(
    curriculum: Curriculum, out: Path, device: str = "auto", **changes: Any
) -> list[dict[str, Any]]:
    """Train stage after stage, a folder each; the same call resumes. Returns their results.

    changes: To the settings of every stage's run.

    Raises:
        FolderInUseError: Another process writes to the folder.
    """
    with exclusive(out):
        return _follow(curriculum, out, device, changes)


def _follow(
    curriculum: Curriculum, out: Path, device: str, changes: dict[str, Any]
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    init = ""
    for stage, (size, contour) in enumerate(
        zip(curriculum.sizes, curriculum.contours, strict=True)
    ):
        run = replace(curriculum.run(stage, init), **changes)
        folder = out / f"{stage + 1}-{size}px-contour{contour}"
        results.append(train(run, folder, device, budget=curriculum.budget))
        init = str(folder)
    return results
