"""A compiled kernel, and what its launches on each device and stream need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparse_flash.kernels.plans import num_sms
from torch import Tensor


class Kernel:
    """A compiled function that takes tensors, a counter, room for parts, tensors, and numbers.

    parts: The shapes of a part, one for each array of parts.
    work: Which of the first tensors lists the work items.
    """

    def __init__(
        self, function: Callable[..., None], parts: tuple[tuple[int, ...], ...], work: int
    ) -> None:
        self.function, self.shapes, self.work = function, parts, work
        self.num_ctas: dict[int, int] = {}  # of devices where it was launched
        self.no_parts: dict[int, list[Tensor]] = {}
        self.counters: dict[tuple[int, int], Tensor] = {}

    def launch(
        self,
        before: tuple[Tensor, ...],
        num_parts: int,
        after: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        device: torch.device,
    ) -> None:
        """Launch on the device's current stream."""
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(before, num_parts, after, numbers, device)
        counter = self.counter(device.index)
        parts = self.parts(num_parts, device)
        ctas = min(before[self.work].shape[0], self.num_ctas[device.index])  # there are items
        return self.function(*before, counter, *parts, *after, ctas, *numbers)

    def parts(self, number: int, device: torch.device) -> list[Tensor]:
        """Room for the parts of split rows or columns."""
        if number == 0 and device.index in self.no_parts:
            return self.no_parts[device.index]
        parts = [
            torch.empty((number, *shape), dtype=torch.float32, device=device)
            for shape in self.shapes
        ]
        if number == 0:
            self.no_parts[device.index] = parts
        return parts

    def counter(self, index: int) -> Tensor:
        """Zeros for a launch to count with; it leaves them zero.

        Launches that may overlap must not share them: each stream has its own, and so has each
        launch in a CUDA graph, whose replays may run on any stream.
        """
        if torch.cuda.is_current_stream_capturing():
            if index not in self.num_ctas:
                raise RuntimeError(
                    "the first launch of a kernel loads it, which a CUDA graph cannot capture: "
                    "run the same call once before the capture (see torch.cuda.graph: warm up)"
                )
            return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
        if index not in self.num_ctas:
            self.num_ctas[index] = num_sms(torch.device("cuda", index))
        # As Triton does: torch.cuda.current_stream makes an object first, which takes longer.
        key = (index, torch._C._cuda_getCurrentRawStream(index))
        if key not in self.counters:
            self.counters[key] = torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
        return self.counters[key]
