"""Trained models of curricula: load one, and write one without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_flash.experiments import checkpoint, old_names
from sparse_flash.experiments.canvases import canvas_model
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.curriculum import Curriculum, Stage
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.warm_start import find_checkpoint


def load(source: str | Path, size: int | None = None) -> Encoder:
    """The trained model of a curriculum, on the CPU, in evaluation mode.

    Its weights are the moving average over the optimizer steps, which `train` tests.

    Args:
        source: Folder of the run, its checkpoint, or a file of `export`.
        size: Pixels per side of the canvas; None: that of the last stage.

    Returns:
        The encoder: pixels in Morton order, int64 (b, size^2), to logits float32 (b, 2).

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged, or not of a curriculum.
        ValueError: The attention does not fit the canvas.

    >>> from sparse_flash.experiments.trained import load
    >>> model = load("results/path-curricula/path-x-seed0/weights.pt")
    >>> sum(weight.numel() for weight in model.parameters())
    217474
    """
    state = _read(source)
    curriculum = _curriculum(state["config"])
    model = canvas_model(curriculum, size or curriculum.stages[-1].size)
    weights = dict(model.named_parameters())
    average = dict(zip(weights, state["average"], strict=True))
    if average["tokens.weight"].shape != model.tokens.weight.shape:
        raise checkpoint.CheckpointError(
            f"{source} stopped during masked-pixel pretraining and classifies nothing yet: train on"
        )
    model.load_state_dict(average, strict=False)  # buffers depend on the canvas
    return model.eval()


def export(source: str | Path, path: Path) -> None:
    """Write settings and averaged weights, without the optimizer: a fifth of the checkpoint.

    Args:
        source: Folder of the run, or its checkpoint.
        path: The file to write.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged, or not of a curriculum.
        OSError: The file cannot be written.
    """
    state = _read(source)
    checkpoint.save(path, {name: state[name] for name in ("config", "average")})


def curriculum_of(source: str | Path) -> Curriculum:
    """The settings of a run.

    Raises:
        CheckpointError: As for `load`.
    """
    return _curriculum(_read(source)["config"])


def _read(source: str | Path) -> dict[str, Any]:
    path = find_checkpoint(str(source))
    state = checkpoint.load(path, "give the folder of a run of a curriculum")
    if "average" not in state or "stages" not in state["config"]:
        raise checkpoint.CheckpointError(
            f"{path} is not of a curriculum: give the folder of a run of path-x or path-256"
        )
    return state


def _curriculum(saved: Mapping[str, Any]) -> Curriculum:
    """The settings that `Curriculum.record` wrote."""
    known = {field.name for field in fields(Curriculum)}
    settings = {name: x for name, x in old_names.config(saved).items() if name in known}
    settings["stages"] = tuple(Stage(**_tuples(stage)) for stage in settings["stages"])
    settings["model"] = ModelConfig(**_tuples(settings["model"]))
    return Curriculum(**settings)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
