"""How masks and layouts pass through torch.compile: the only bridge between them.

An operator takes the mask or layout itself as an argument and looks at it when it runs. A compiled
graph therefore depends on neither the content of a mask nor a length: another mask or length
compiles nothing, wherever the object comes from (argument, closure, default, attribute).

From torch 2.13 on, masks and layouts are opaque reference types of `torch.library`. Older releases
cannot differentiate through an operator that takes one. There each object carries a handle, a
number in a tensor on the CPU, by which the operator finds the object. (A plain int would not do:
torch.compile compiles anew for every other int that an nn.Module holds.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import weakref
from typing import Any, Self, cast

import torch
from sparse_flash.masks.modes import plain_torch
from torch import Tensor
from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
from torch._opaque_base import OpaqueBaseMeta

_RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
# SPARSE_FLASH_HANDLES=1: as with an older torch, so that tests see both.
HANDLES = _RELEASE < (2, 13) or os.environ.get("SPARSE_FLASH_HANDLES") == "1"

_objects: dict[int, weakref.ref[Traceable]] = {}  # by their handles
_AT_ONCE = 256  # handles to make in one go: one by one each takes several microseconds


@plain_torch()
def _more_handles() -> list[tuple[int, Tensor]]:
    """Numbers that nobody has. They start anew at random, so that those of an exported program name
    nothing in another process. Those of objects that are gone are forgotten.
    """
    for number, reference in list(_objects.items()):
        if reference() is None:
            _objects.pop(number, None)
    first = secrets.randbits(62)
    numbers = range(first, first + _AT_ONCE)
    tensor = torch.arange(first, first + _AT_ONCE, dtype=torch.int64, device="cpu")
    return list(zip(numbers, tensor.unbind(), strict=True))


class _Handles(threading.local):
    """Handles that this thread has not given to an object yet."""

    def __init__(self) -> None:
        self.spare: list[tuple[int, Tensor]] = []

    def take(self) -> tuple[int, Tensor]:
        """A handle that nobody else has; a compiled graph would give the same one every time."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        if not self.spare:
            self.spare = _more_handles()
        return self.spare.pop()


_handles = _Handles()


class _ByHandle:
    """Base of what an operator takes by its handle."""

    _handle: Tensor
    _number: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Give the object its handle: torch.compile must find it on every object."""
        new = super().__new__(cls)
        number, handle = _handles.take()
        object.__setattr__(new, "_number", number)
        object.__setattr__(new, "_handle", handle)
        _objects[number] = weakref.ref(cast("Traceable", new))
        return new


class _Opaque(metaclass=OpaqueBaseMeta):
    """Base of objects that operators take as opaque values."""


_Base: Any = _ByHandle if HANDLES else _Opaque


class Traceable(_Base):
    """A mask or a layout. Copies and pickles contain its fields and nothing that was derived."""

    _derived: tuple[str, ...] = (
        "_handle",
        "_number",
    )  # attributes that belong to this object alone

    def __getstate__(self) -> dict[str, Any]:
        """Fields only."""
        return {name: x for name, x in self.__dict__.items() if name not in self._derived}


if HANDLES:
    SCHEMA_TYPE = "Tensor"
else:
    register_opaque_type(Traceable, typ="reference")
    SCHEMA_TYPE = get_opaque_type_name(Traceable)


def to_operator(source: Traceable, like: Tensor) -> Any:
    """The argument of an operator that stands for a mask or a layout.

    like: Another argument of the operator: a fake tensor cannot meet one that is not.
    """
    if not HANDLES:
        return source
    if torch.compiler.is_compiling():
        return source._handle
    with getattr(like, "fake_mode", contextlib.nullcontext()):
        handle: Any = torch.tensor(source._number, device="cpu")
    handle.source = source  # stays alive as long as autograd keeps the handle
    return handle


def from_operator(argument: Any) -> Any:
    """The mask or layout that an operator was given.

    Raises:
        RuntimeError: It is no longer there, or belongs to another process.
    """
    if not HANDLES:
        return argument
    if hasattr(argument, "source"):
        return argument.source
    reference = _objects.get(int(argument))
    found = None if reference is None else reference()
    if found is None:
        raise RuntimeError(
            "the mask or layout of this compiled or exported program is gone: keep a reference to "
            "it, and export anew in this process (torch 2.13 and newer need neither)"
        )
    return found
