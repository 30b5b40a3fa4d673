"""A compiled kernel with its launch state per device and stream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.kernels.plan import Plan

_binding = threading.Lock()


class Kernel:
    """A compiled kernel with its launch state. Thread safe.

    Argument order of the function: inputs and outputs, work lists (work, tiles, bits), work
    counter, split buffers, combine arrays (combine, counts), number of CTAs, scalars.

    The work counter is int32 (2,), zero before and after each launch. Launches that
    may overlap must not share one: each stream has its own, and so has each launch in a CUDA graph,
    whose replays may run on any stream.

    Args:
        function: The compiled function; it launches on torch's current stream.
        split_shapes: Shapes of the split buffers for one split, float32.
    """

    def __init__(
        self, function: Callable[..., None], split_shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        self.function, self.split_shapes = function, split_shapes
        self.counters: dict[tuple[int | None, int], Any] = {}  # by device index and stream
        self.no_splits: dict[int | None, tuple[Any, ...]] = {}  # by device index
        self.loaded: set[int | None] = set()  # indices of devices that have the kernel's code
        self._lock = threading.Lock()

    def launch(
        self,
        inputs: tuple[Tensor, ...],
        plan: Plan[Any],
        scalars: tuple[float, ...],
        device: torch.device,
        transient: bool = False,
    ) -> None:
        """Launch on the device's current stream.

        Args:
            inputs: Inputs and outputs, on `device`.
            plan: Plan with this kernel's config.
            scalars: Arguments that follow the number of CTAs.
            device: The device, with its index.
            transient: Keep no memory that this launch allocates. CUDA graph trees (torch.compile,
                mode "reduce-overhead") need that: their warm-up runs allocate from a pool in which
                only outputs may stay alive.

        Raises:
            RuntimeError: The first launch on a device is captured into a CUDA graph.
        """
        index = device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.launch(inputs, plan, scalars, device, transient)
        if transient or torch._C._cuda_isCurrentStreamCapturing():
            return self._launch_once(inputs, plan, scalars, device)
        # As Triton does: torch.cuda.current_stream makes an object first, which takes longer.
        counter = self.counters.get((index, torch._C._cuda_getCurrentRawStream(index)))
        if counter is None:
            return self._launch_first(inputs, plan, scalars, device)
        parts = self._parts(plan.num_splits, device) if plan.num_splits else self.no_splits[index]
        return self.function(
            *inputs, *plan.lists, counter, *parts, *plan.combine, plan.num_ctas, *scalars
        )

    def _launch_first(
        self,
        inputs: tuple[Tensor, ...],
        plan: Plan[Any],
        scalars: tuple[float, ...],
        device: torch.device,
    ) -> None:
        """Launch for the first time on this device and stream, and keep the launch state.

        Kept tensors must not be inference tensors, which other modes refuse to change. Threads wait
        for each other, so that one of them loads the kernel.
        """
        index, stream = device.index, torch._C._cuda_getCurrentRawStream(device.index)
        with self._lock, torch.inference_mode(False):
            counter = self.counters.get((index, stream))
            if counter is None:
                zeros = torch.zeros(2, dtype=torch.int32, device=device)
                (counter,) = kept_arguments([zeros])
            no_splits = self.no_splits.get(index) or kept_arguments(self._parts(0, device))
            self.no_splits[index] = no_splits
            parts = self._parts(plan.num_splits, device) if plan.num_splits else no_splits
            arguments = (*plan.lists, counter, *parts, *plan.combine, plan.num_ctas)
            self.function(*inputs, *arguments, *scalars)
            self.loaded.add(index)
            self.counters[index, stream] = counter  # last: others then launch without the lock

    def _launch_once(
        self,
        inputs: tuple[Tensor, ...],
        plan: Plan[Any],
        scalars: tuple[float, ...],
        device: torch.device,
    ) -> None:
        """Launch with a counter and split buffers for this launch alone."""
        if torch._C._cuda_isCurrentStreamCapturing():
            self._check_loaded(device)
            plan.captured = True  # its arrays must stay where they are
        counter = torch.zeros(2, dtype=torch.int32, device=device)
        parts = self._parts(plan.num_splits, device)
        arguments = (*plan.lists, counter, *parts, *plan.combine, plan.num_ctas)
        with contextlib.nullcontext() if device.index in self.loaded else self._lock:
            self.function(*inputs, *arguments, *scalars)
            self.loaded.add(device.index)

    def _check_loaded(self, device: torch.device) -> None:
        if device.index not in self.loaded:
            raise RuntimeError(
                "the first launch of a kernel loads it, which a CUDA graph cannot capture: "
                "run the same call once before the capture (see torch.cuda.graph: warm up)"
            )

    def _parts(self, number: int, device: torch.device) -> list[Tensor]:
        """Split buffers for this many splits."""
        return [
            torch.empty((number, *shape), dtype=torch.float32, device=device)
            for shape in self.split_shapes
        ]


def bind(plan: Any, kernels: dict[Any, Kernel], make: Callable[[Any], Kernel]) -> Kernel:
    """The kernel of a plan's config, loaded or compiled if need be, and kept with the plan.

    Plans with the same config share one kernel, and its counters. Thread safe.

    Args:
        plan: The plan.
        kernels: The kernels of this computation so far, by config.
        make: Loads or compiles the kernel of a config.
    """
    kernel = kernels.get(plan.config)
    if kernel is None:
        with _binding:
            kernel = kernels.get(plan.config)
            if kernel is None:
                kernel = kernels[plan.config] = make(plan.config)
    if plan.lasts:
        plan.lists, plan.combine = kept_arguments(plan.lists), kept_arguments(plan.combine)
    plan.kernel = kernel
    maker = getattr(plan, "of_form", None)  # of layouts of data: the next plan has the kernel
    if maker is not None:
        maker.kernel = kernel
    return kernel


def kept_arguments(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Tensors of many launches, on the same memory, in the form that the functions convert them to.

    To convert a tensor in each launch takes the host eight times as long as to pass this form.
    """
    import tvm_ffi

    return tuple(tvm_ffi.from_dlpack(x) if isinstance(x, Tensor) else x for x in tensors)
