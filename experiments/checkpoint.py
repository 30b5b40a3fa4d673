"""Checkpoints: written atomically, verified when read, resumed to the same numbers."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sparse_flash.masks.files import atomic_write

_SHOWN = 6  # settings that a message names
_MAGIC = b"sparse_flash checkpoint 2\n"


class CheckpointError(ValueError):
    """A file that is not a checkpoint of sparse_flash, is damaged, or belongs to another run."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists, dicts): a magic line, a SHA-256, the data.

    Raises:
        OSError: The disk is full or the folder cannot be written; an older checkpoint is kept.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    with atomic_write(path) as file:
        file.write(_MAGIC + hashlib.sha256(data).digest())
        file.write(data)


def load(
    path: Path, way_out: str = "delete it (or choose another folder) to start again"
) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU.

    Args:
        path: The file.
        way_out: Remedy for the user if the file cannot be read, for the message.

    Raises:
        CheckpointError: The file is not a checkpoint of sparse_flash, or is damaged.
    """
    content = path.read_bytes()
    header, digest = len(_MAGIC), hashlib.sha256().digest_size
    if content[:header] != _MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint of sparse_flash: {way_out}")
    data = content[header + digest :]
    if hashlib.sha256(data).digest() != content[header : header + digest]:
        raise CheckpointError(f"{path} is damaged (its checksum does not match): {way_out}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {way_out}") from error


def check_same(path: Path, different: Sequence[str]) -> None:
    """Refuse to resume a run with other settings.

    Args:
        path: File of the run.
        different: Differing settings, from `provenance.differences`.

    Raises:
        CheckpointError: Some settings differ.
    """
    if different:
        shown = sorted(different, key=lambda name: not name.startswith("task.name"))[:_SHOWN]
        if len(different) > _SHOWN:
            shown.append(f"and {len(different) - _SHOWN} more")
        raise CheckpointError(
            f"{path} belongs to a run with other settings (different: {'; '.join(shown)}). To "
            "resume it, give its settings again; to train with these, choose another folder with "
            f"--out, or delete {path.parent}"
        )


def random_state() -> dict[str, Any]:
    """The states of all random generators, as plain data and tensors."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - whatever a task may use
    python = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "python": [python[0], list(python[1]), python[2]],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; with another number of GPUs, their states are kept."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
