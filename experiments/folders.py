"""Where runs are kept by default, and where a run is found."""

from __future__ import annotations

from pathlib import Path

from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.naming import run_folder
from sparse_flash.experiments.warm_start import CHECKPOINT

RUNS = Path("runs/train")


def folder_of_run(task: str, attention: str, seed: int) -> Path:
    """The default folder of a run: runs/train/TASK/ATTENTION-seedSEED.

    Where runs/train/TASK itself holds a run of this attention and seed, as older versions kept
    them, it is that folder: the run is resumed there.

    Args:
        task: Name of the recipe.
        attention: Text of the attention; empty for that of the recipe.
        seed: The seed.

    >>> print(folder_of_run("listops", "sdpa", 3))
    runs/train/listops/sdpa-seed3
    """
    folder = RUNS / task
    if _holds(folder, attention, seed):
        return folder
    return run_folder(folder, attention, seed) if attention else folder / f"seed{seed}"


def _holds(folder: Path, attention: str, seed: int) -> bool:
    """Whether the folder has a checkpoint of a run of this attention and seed."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return False
    try:
        saved = checkpoint.load(path)["config"]
    except (checkpoint.CheckpointError, OSError):
        return False
    return (saved.get("attention"), saved.get("seed")) == (attention, seed)
