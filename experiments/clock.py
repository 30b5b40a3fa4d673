"""Time of attention in a training step: forward and backward, of any implementation."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class AttentionClock:
    """Measures the time between marks on the inputs and on the output of attention.

    The marks are identities in the graph. Forward, attention runs from the mark on its inputs to
    the one on its output; backward, from the gradient of its output to those of its inputs.

    >>> clock = AttentionClock(torch.device("cpu"))
    >>> (x,) = clock.enter(torch.ones(3, requires_grad=True))
    >>> clock.leave(x.exp()).sum().backward()
    >>> clock.milliseconds() > 0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    def enter(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Mark the inputs of attention."""
        return _Mark.apply(self.starts, self.ends, self, *tensors)

    def leave(self, tensor: Tensor) -> Tensor:
        """Mark its output."""
        return _Mark.apply(self.ends, self.starts, self, tensor)[0]

    def now(self) -> Any:
        """A time stamp, of the device if it runs asynchronously."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float:
        """The sum of all intervals so far."""
        if self.device.type != "cuda":
            return 1000 * (sum(self.ends) - sum(self.starts))
        torch.cuda.synchronize(self.device)
        # Attention calls follow one another, so the n-th end belongs to the n-th start.
        return sum(a.elapsed_time(b) for a, b in zip(self.starts, self.ends, strict=True))


class _Mark(torch.autograd.Function):
    """Identity that appends the time to one list on the way forward, to another on the way back."""

    @staticmethod
    def forward(
        ctx: Any, forward: list[Any], backward: list[Any], clock: Any, *tensors: Any
    ) -> Any:
        ctx.backward_list, ctx.clock = backward, clock
        forward.append(clock.now())
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.backward_list.append(ctx.clock.now())
        return (None, None, None, *grads)
