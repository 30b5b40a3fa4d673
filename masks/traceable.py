"""The bridge between torch.compile and masks or layouts.

An operator takes the mask or layout itself as an argument and reads it at run time. A compiled
graph therefore depends neither on the content of a mask nor on a length. Another mask or length
triggers no compilation, for arguments, closures, defaults and attributes alike.

From torch 2.13 on, masks and layouts are opaque reference types of `torch.library`. Older releases
cannot differentiate through an operator with such an argument. There each object has a handle, a
number in a CPU tensor, by which the operator finds the object. (A plain int does not work:
torch.compile recompiles for every int attribute of an nn.Module.)
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
from torch._library import opaque_object
from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
from torch._opaque_base import OpaqueBaseMeta

_RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
# SPARSE_FLASH_HANDLES=1 selects the path of older torch releases, for tests.
HANDLES = _RELEASE < (2, 13) or os.environ.get("SPARSE_FLASH_HANDLES") == "1"

_objects: dict[int, weakref.ref[Traceable]] = {}  # objects by handle
_AT_ONCE = 256  # handles created per batch; a single one takes several microseconds


@plain_torch()
def _more_handles() -> list[tuple[int, Tensor]]:
    """Unused handles. Also removes the handles of deleted objects.

    Numbers start at a random value, so that a handle of an exported program is invalid in another
    process.
    """
    for number, reference in list(_objects.items()):
        if reference() is None:
            _objects.pop(number, None)
    first = secrets.randbits(62)
    numbers = range(first, first + _AT_ONCE)
    tensor = torch.arange(first, first + _AT_ONCE, dtype=torch.int64, device="cpu")
    return list(zip(numbers, tensor.unbind(), strict=True))


class _Handles(threading.local):
    """Unused handles of this thread."""

    def __init__(self) -> None:
        self.spare: list[tuple[int, Tensor]] = []

    def take(self) -> tuple[int, Tensor]:
        """An unused handle. Not traceable: a compiled graph would return the same one each time."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        if not self.spare:
            self.spare = _more_handles()
        return self.spare.pop()


_handles = _Handles()


class _ByHandle:
    """Base of objects that operators receive by handle."""

    _handle: Tensor
    _number: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Assign a handle, which torch.compile requires on every object."""
        new = super().__new__(cls)
        number, handle = _handles.take()
        object.__setattr__(new, "_number", number)
        object.__setattr__(new, "_handle", handle)
        _objects[number] = weakref.ref(cast("Traceable", new))
        return new


class _Opaque(metaclass=OpaqueBaseMeta):
    """Base of objects that operators receive as opaque values."""


_Base: Any = _ByHandle if HANDLES else _Opaque


class Traceable(_Base):
    """A mask or a layout. Copies and pickles contain its fields without derived objects."""

    _derived: tuple[str, ...] = (
        "_handle",
        "_number",
    )  # attributes that copies do not share

    def __getstate__(self) -> dict[str, Any]:
        """Fields only."""
        return {name: x for name, x in self.__dict__.items() if name not in self._derived}


class _Inlined(dict[str, Any]):
    """How torch.compile treats members of masks and layouts: it traces them, as of other objects.

    Members without an entry are errors, even where a graph may break.
    """

    def __bool__(self) -> bool:
        return True  # an empty dict would be taken for none

    def get(self, name: str, default: Any = None) -> Any:
        return opaque_object.MemberType.INLINED


def leave_graph() -> None:
    """End the graph where torch.compile runs an operator on a mask itself instead of tracing it.

    The result would be a constant of the graph, which no operator takes.
    """
    if HANDLES or not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return
    from torch._dynamo.symbolic_convert import tls
    from torch._dynamo.variables.base import AsPythonConstantNotImplementedError

    if getattr(tls, "current_tx", None) is not None:
        reason: Any = "a mask made in a compiled function"
        raise AsPythonConstantNotImplementedError(reason)


if HANDLES:
    SCHEMA_TYPE = "Tensor"
else:
    register_opaque_type(Traceable, typ="reference", members=_Inlined())
    SCHEMA_TYPE = get_opaque_type_name(Traceable)


def to_operator(source: Traceable, like: Tensor) -> Any:
    """The operator argument that represents a mask or a layout.

    like: Another argument of the operator; if it is a fake tensor, the handle must be fake too.
    """
    if not HANDLES:
        return source
    if torch.compiler.is_compiling():
        return source._handle
    with getattr(like, "fake_mode", contextlib.nullcontext()):
        handle: Any = torch.tensor(source._number, device="cpu")
    handle.source = source  # lives as long as autograd holds the handle
    return handle


def source_of(argument: Any) -> Any:
    """The mask or layout of an operator argument, where it is known without looking it up."""
    return getattr(argument, "source", None) if isinstance(argument, Tensor) else argument


def from_operator(argument: Any) -> Any:
    """The mask or layout of an operator argument.

    Raises:
        RuntimeError: The object was deleted, or belongs to another process.
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
            "it, and export again in this process (torch 2.13 and newer need neither)"
        )
    return found
