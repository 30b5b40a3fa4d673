"""Initialization with the weights of another run, for example on smaller or easier images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.data import images
from sparse_flash.experiments.model import Encoder
from torch import Tensor

CHECKPOINT = "checkpoint.pt"
_OWN = (".core.selector.", ".core.mix", ".core.performer.")  # of attention that adds to a dense one


def begin_with(model: Encoder, source: str, coordinates: Tensor | None) -> None:
    """Give the model the weights of a run.

    Learned positions of a smaller image are tiled over the larger one, as
    FlashAttention (Dao et al., 2022) did for Path-X and Path-256. Nothing else depends on size.
    Selectors and learned mixtures that the run did not have begin as they are.

    Args:
        model: Model with the same layers and widths.
        source: The run's folder, or its checkpoint.
        coordinates: Row and column of each token of an image (s, 2); None without an image.

    Raises:
        CheckpointError: There is none, or it is of a model with other sizes.
    """
    path = find_checkpoint(source)
    state = checkpoint.load(path, "give the folder of another run with --init")
    weights, mine = state["model"], model.state_dict()
    if "positions" in mine and "positions" in weights and mine["positions"].shape[0] > 0:
        weights["positions"] = _tiled(
            weights["positions"], mine["positions"], state, coordinates, path
        )
    fresh = {n for n in mine.keys() - weights.keys() if any(part in n for part in _OWN)}
    names = (mine.keys() | weights.keys()) - fresh
    wrong = sorted(n for n in names if _shape(mine.get(n)) != _shape(weights.get(n)))
    if wrong:
        raise checkpoint.CheckpointError(
            f"{path} is of a model with other sizes, or other attention with weights of its own "
            f"(different: {', '.join(wrong[:4])}): --init wants the same layers and widths"
        )
    model.load_state_dict(mine | weights)


def find_checkpoint(source: str) -> Path:
    """The checkpoint of a run.

    Args:
        source: The run's folder, its checkpoint, or a folder with the folder of that one run.

    Raises:
        CheckpointError: There is none, or there are several runs.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            return path
        raise checkpoint.CheckpointError(
            f"there is no checkpoint {path}: give the folder of a run (train: --init FOLDER)"
        )
    if (path / CHECKPOINT).exists():
        return path / CHECKPOINT
    below = sorted(path.glob(f"*/{CHECKPOINT}"))
    if len(below) == 1:
        return below[0]
    found = ", ".join(str(run.parent) for run in below[:4])
    raise checkpoint.CheckpointError(
        f"{path} has the runs {found}: choose one (train: --init FOLDER)"
        if below
        else f"there is no checkpoint {path / CHECKPOINT}: give the folder of a run "
        "(train: --init FOLDER)"
    )


def _shape(weight: Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)


def _tiled(
    old: Tensor, new: Tensor, state: dict[str, Any], coordinates: Tensor | None, path: Path
) -> Tensor:
    """The old positions, of an image repeated over the new one; a CLS token keeps its own."""
    if old.shape == new.shape:
        return old
    task = state["config"]["task"]
    side = {"pathfinder": task.get("size"), "image": images.SIDE}.get(task["name"])
    first = int(state["config"]["model"]["pooling"] == "cls")
    if coordinates is None or side is None or len(old) != side * side + first:
        raise checkpoint.CheckpointError(
            f"{path} has {len(old)} learned positions, and the model {len(new)}: only those of "
            "square images can be carried over to others"
        )
    token = torch.empty(side, side, dtype=torch.int64)
    there = images.coordinates(task["order"], side)
    token[there[:, 0], there[:, 1]] = torch.arange(side * side)
    return torch.cat(
        [old[:first], old[first + token[coordinates[:, 0] % side, coordinates[:, 1] % side]]]
    )
