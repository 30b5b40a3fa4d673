"""Data parallel training: the processes that torchrun started, or this one alone.

A step's batch is shared out, gradients are averaged, and all workers take the same step; the first
one writes. Settings have the meaning of a single process: `batch_size` is the global batch size.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")


def is_first_worker() -> bool:
    """Whether this process is the one that writes; known before the workers are connected.

    >>> is_first_worker()
    True
    """
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ["RANK"] == "0"


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Workers:
    """The processes that train one model together; `rank` is this one's number."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @classmethod
    def join(cls, device: torch.device) -> Workers:
        """The workers that torchrun started, connected by NCCL on GPUs and by Gloo on CPUs.

        Each takes the GPU with its number on its machine; a device with a number is refused.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=device)
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(
                    f"--device {device} under torchrun: each worker takes a GPU of its own, "
                    "use cuda or auto"
                )
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # Its functions take the process group of the time of their import as a default
            # argument. Imported later (by an optimizer), they would keep the group's threads alive
            # beyond `destroy_process_group`: a thread that outlives the interpreter aborts it.
            import_module("torch.distributed.nn")

            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_disconnect)
        return cls(dist.get_rank(), size, device)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the workers in place, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts, strict=True):
            x.copy_(part.view_as(x))

    def sums(self, *values: float) -> list[float]:
        """Sum of each number over the workers."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: Any) -> list[Any]:
        """The items of all workers, in the order of ranks."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items
