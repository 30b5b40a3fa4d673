"""The device of a run, by name."""

from __future__ import annotations

import re

import torch


def check_device(name: str) -> None:
    """Raise ValueError if no machine has a device of this name."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        return
    word = name.strip().lower()
    near = next((known for known in ("cuda", "cpu", "auto") if known in word), None)
    if word.startswith(("gpu", "nvidia")):
        near = "cuda"
    guess = f"; did you mean {near!r}?" if near else "."
    raise ValueError(f"unknown device {name!r}{guess} There are auto, cpu, cuda, cuda:0, ...")


def pick_device(name: str) -> torch.device:
    """The device by name; "auto" prefers a GPU.

    Raises:
        ValueError: There is no such device, or it cannot be used here.

    >>> pick_device("cpu")
    device(type='cpu')
    >>> pick_device("gpu")
    Traceback (most recent call last):
    ValueError: unknown device 'gpu'; did you mean 'cuda'? There are auto, cpu, cuda, cuda:0, ...
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(
                f"--device {name}: no CUDA GPU can be used here; leave it at auto, or choose cpu"
            )
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device {name}: torch sees {count} GPU{'s' * (count > 1)}, "
                f"{'cuda:0' if count == 1 else f'cuda:0 to cuda:{count - 1}'}"
            )
    return device
