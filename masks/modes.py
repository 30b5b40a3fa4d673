"""Isolation of masks and layouts from the active PyTorch modes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

T = TypeVar("T")


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Run a block of code, or a decorated function, outside every PyTorch mode.

    Tensors created inside have data and can be used anywhere later: no inference mode, no
    gradients, no default device, no torch function or dispatch mode (FakeTensorMode,
    FlopCounterMode), no functorch transform, no autocast. The default dtype is not reset: code
    inside states its dtypes.

    >>> with torch.inference_mode(), torch.device("meta"), plain_torch():
    ...     table = torch.arange(3)
    >>> table, table.is_inference()
    (tensor([0, 1, 2]), False)
    """
    if is_plain():
        with torch.no_grad():
            yield
        return
    with contextlib.ExitStack() as stack:
        # Torch function modes first: they would intercept the switching of other modes.
        if torch._C._len_torch_function_stack():
            stack.enter_context(_no_function_modes())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(torch._C._DisableFuncTorch())
        if _dispatch_modes():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        yield


def is_plain() -> bool:
    """Whether only gradients need to be switched off."""
    return not (
        torch._C._len_torch_function_stack()
        or torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _dispatch_modes()
    )


def _dispatch_modes() -> int:
    from torch._ops import _len_torch_dispatch_stack_pre_dispatch

    return torch._C._len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch()


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    """Pop all torch function modes; a default device is the lowest of them."""
    modes = [
        torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())
    ]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def tensors_made_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which factory calls without a device use `device`."""
    return contextlib.nullcontext() if device.type == "cpu" else DeviceContext(device)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is a FakeTensor, which has shape and dtype but no data."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch.vmap maps over a tensor, at any level of transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on the tensor's device; meta knows no autocast."""
    if tensor.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def unreadable(tensor: Tensor) -> str | None:
    """Reason why the values of a tensor cannot be read now; None if they can.

    >>> unreadable(torch.empty(3, device="meta"))
    'a tensor on the meta device holds no data'
    """
    if tensor.is_meta:
        return "a tensor on the meta device holds no data"
    if is_fake(tensor):
        return "a fake tensor holds no data"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside a torch.func transform a tensor has no values of its own"
    return None


def refuse_mapped(name: str, tensor: Tensor, way_out: str) -> None:
    """ValueError for data of a mask or layout that torch.vmap maps over."""
    # Operators of compiled functions have a rule for it.
    if not torch.compiler.is_compiling() and is_mapped(tensor):
        raise ValueError(
            f"{name} inside torch.vmap: a mask or layout cannot be mapped; make it outside vmap, "
            f"{way_out}"
        )


class derived(Generic[T]):  # noqa: N801 - used like functools.cached_property
    """A property that is computed at first use, outside every PyTorch mode, and then cached.

    A compiled function that is the first to use it computes it in its graph.
    Threads may compute it at the same time; all receive the value cached first. Pickles and copies
    exclude it: the class sets `__reduce_ex__ = reduce_without_derived`.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, owner: None, cls: type) -> derived[T]: ...
    @overload
    def __get__(self, owner: object, cls: type) -> T: ...
    def __get__(self, owner: object | None, cls: type) -> derived[T] | T:
        if owner is None:
            return self
        kept = owner.__dict__
        if self.name not in kept:
            if torch.compiler.is_dynamo_compiling():  # traced: the graph computes it
                return self.make(owner)
            with plain_torch():
                value = self.make(owner)
            return kept.setdefault(self.name, value)
        return kept[self.name]


def reduce_without_derived(self: Any, protocol: Any) -> Any:
    """`__reduce_ex__` for classes with `derived` properties, without the cached values."""
    reduced = object.__reduce_ex__(self, protocol)
    if not isinstance(reduced, tuple) or not isinstance(reduced[2], dict):
        return reduced
    state = {
        name: value
        for name, value in reduced[2].items()
        if not isinstance(getattr(type(self), name, None), derived)
    }
    return (*reduced[:2], state, *reduced[3:])


def is_capturing(device: torch.device) -> bool:
    """Whether work for the device goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
