"""Beginning with the weights of another run: of smaller images, or of easier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.data import images
from sparse_flash.experiments.model import Encoder
from torch import Tensor

CHECKPOINT = "checkpoint.pt"


def begin_with(model: Encoder, source: str, places: Tensor | None) -> None:
    """Give the model the weights of a run.

    Learned positions of a smaller image are laid side by side until they fill the larger one, as
    FlashAttention (Dao et al., 2022) did for Path-X and Path-256. Nothing else depends on size.

    Args:
        model: Of the same layers and widths.
        source: The run's folder, or its checkpoint.
        places: Where the model's tokens are on their image (s, 2); None for what is no image.

    Raises:
        CheckpointError: There is none, or it is of a model with other sizes.
    """
    path = find_checkpoint(source)
    state = checkpoint.load(path, "give the folder of another run with --init")
    weights, mine = state["model"], model.state_dict()
    if "positions" in mine and "positions" in weights and mine["positions"].shape[0] > 0:
        weights["positions"] = _tiled(weights["positions"], mine["positions"], state, places, path)
    names = mine.keys() | weights.keys()
    wrong = sorted(n for n in names if _shape(mine.get(n)) != _shape(weights.get(n)))
    if wrong:
        raise checkpoint.CheckpointError(
            f"{path} is of a model with other sizes, or other attention with weights of its own "
            f"(different: {', '.join(wrong[:4])}): --init wants the same layers and widths"
        )
    model.load_state_dict(weights)


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
            f"there is no checkpoint {path} to begin with: give the folder of a run with --init"
        )
    if (path / CHECKPOINT).exists():
        return path / CHECKPOINT
    below = sorted(path.glob(f"*/{CHECKPOINT}"))
    if len(below) == 1:
        return below[0]
    found = ", ".join(str(run.parent) for run in below[:4])
    raise checkpoint.CheckpointError(
        f"{path} has the runs {found}: choose one with --init"
        if below
        else f"there is no {path / CHECKPOINT} to begin with: give the folder of a run with --init"
    )


def _shape(weight: Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)


def _tiled(
    old: Tensor, new: Tensor, state: dict[str, Any], places: Tensor | None, path: Path
) -> Tensor:
    """The old positions, of an image repeated over the new one; a CLS token keeps its own."""
    if old.shape == new.shape:
        return old
    task = state["config"]["task"]
    side = {"pathfinder": task.get("size"), "image": images.SIDE}.get(task["name"])
    first = int(state["config"]["model"]["pooling"] == "cls")
    if places is None or side is None or len(old) != side * side + first:
        raise checkpoint.CheckpointError(
            f"{path} has {len(old)} learned positions, and the model {len(new)}: only those of "
            "square images can be carried over to others"
        )
    token = torch.empty(side, side, dtype=torch.int64)
    there = images.places(task["order"], side)
    token[there[:, 0], there[:, 1]] = torch.arange(side * side)
    return torch.cat([old[:first], old[first + token[places[:, 0] % side, places[:, 1] % side]]])
