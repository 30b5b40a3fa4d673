"""Kernels of the operators for PyTorch's Autograd key.

`torch.library.register_autograd` makes such kernels too. Its own drop tangents, so that forward
mode is silently zero, and do not know the transforms of `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_flash.autograd import refuse_forward_mode

_functorch = torch._C._functorch


def register(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] = lambda *_: None,
) -> None:
    """Give an operator a backward formula; forward mode is refused.

    Args:
        library: Of the operator.
        name: Of the operator in the library.
        backward: `backward(ctx, *gradients of the outputs)`, as of `torch.autograd.Function`.
        setup_context: `setup_context(ctx, inputs, output)`, likewise.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def below(keys: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    class Function(torch.autograd.Function):
        forward: Any = staticmethod(below)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            result = backward(ctx, *gradients)
            return None, *(result if isinstance(result, tuple) else (result,))

    # Function.apply would start the transforms of torch.func, which have come this far already.
    apply: Any = super(torch.autograd.Function, Function).apply

    def kernel(keys: Any, *inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if _have_tangents(tensors):
            refuse_forward_mode()
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return below(keys, *inputs)
        with _one_level():
            return apply(keys, *inputs)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _one_level() -> Any:
    """Let a function of autograd run for the transform in progress, if there is one."""
    if _functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch import autograd_function

    return autograd_function.enable_single_level_autograd_function()  # type: ignore[attr-defined]


def _have_tangents(tensors: Iterable[Tensor]) -> bool:
    """Whether forward mode differentiates any of the tensors.

    The tensors of an inner transform hide the tangents of an outer `torch.func.jvp`; that they
    belong to its level is seen.
    """
    if forward_ad._current_level < 0:
        return False
    if _functorch.peek_interpreter_stack() is None:
        return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    jvp = {
        interpreter.level()
        for interpreter in retrieve_all_functorch_interpreters()
        if interpreter.key() == _functorch.TransformType.Jvp
    }
    return any(level in jvp for x in tensors for level in _levels(x))


def _levels(x: Tensor) -> Iterator[int]:
    """Levels of the transforms that x is a tensor of."""
    while _functorch.is_functorch_wrapped_tensor(x):
        yield _functorch.maybe_get_level(x)
        x = _functorch.get_unwrapped(x)
