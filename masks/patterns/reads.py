"""Values that a Python function reads besides its arguments, and their state.

A layout that was built from a function is stale once a tensor that the function reads has changed.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from sparse_flash.masks.modes import plain_torch, unreadable
from torch import Tensor

_SMALL = 1 << 20  # bytes of an array whose content is looked at in every call
_MOST = 1000  # values that are followed
_CONSTANT = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FOLLOWED = (Tensor, np.ndarray, list, dict, types.FunctionType, *_CONSTANT)
# Their functions are not followed: they read what never changes.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "einops"}


class Version:
    """A tensor or another object by identity, and the version of its content.

    Compares by identity without keeping the object alive, so that one that is made later at the
    same address is another.
    """

    __slots__ = ("content", "reference")

    def __init__(self, owner: object, content: Hashable) -> None:
        self.reference, self.content = weakref.ref(owner), content

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Version)
            and self.reference is other.reference
            and self.content == other.content
        )

    def __hash__(self) -> int:
        return hash((id(self.reference), self.content))


def state_of(function: Callable[..., Any]) -> Hashable:
    """The state of all that `function` reads: closure, defaults, globals, attributes, partials.

    Tensors count by identity, address and version, which every in-place operation of PyTorch
    raises (writing through `.data` or a numpy array that shares the memory does not); numpy arrays
    and inference tensors by content; numbers and text by value; other objects by identity and
    attributes; functions by the values that they read, except those of libraries.

    Raises:
        TypeError: An array or inference tensor of more than 1 MiB, whose changes cannot be
            noticed.

    >>> import torch
    >>> numbers = torch.zeros(4)
    >>> rule = lambda q, kv: numbers[q] == kv
    >>> before = state_of(rule)
    >>> _ = numbers.add_(1)
    >>> before == state_of(rule)
    False
    """
    seen: set[int] = set()
    return tuple(_walk(function, seen))


def _walk(value: Any, seen: set[int]) -> Iterator[Hashable]:
    if isinstance(value, _CONSTANT):
        yield (type(value), value)
        return
    if isinstance(value, types.ModuleType | type | types.BuiltinFunctionType) or id(value) in seen:
        return
    if len(seen) >= _MOST:
        raise TypeError(
            f"a custom mask reads an object of more than {_MOST} parts, whose changes cannot be "
            "noticed in time: let its function read the tensors that it needs, or build the layout "
            "with mask.layout(...) whenever they change"
        )
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield _tensor(value)
    elif isinstance(value, np.ndarray):
        yield _array(value)
    elif isinstance(value, np.generic):
        yield (type(value), value.item())
    else:
        yield from _parts(value, seen)


def _parts(value: Any, seen: set[int]) -> Iterator[Hashable]:
    """The states of what an object is made of."""
    if isinstance(value, types.FunctionType):
        if _in_library(value.__module__):
            return
        yield Version(value, None)
        inner: Any = _read_by(value)
    elif isinstance(value, types.MethodType):
        inner = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield tuple(key for key in value if isinstance(key, _CONSTANT))
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield len(value)
        inner = value
    else:
        try:
            yield Version(value, None)
        except TypeError:  # not every object can be referred to weakly
            yield type(value).__qualname__
        inner = _attributes(value)
    for part in inner:
        yield from _walk(part, seen)


def _attributes(value: Any) -> Iterator[Any]:
    """Values of attributes, of the object and of its class, and the functions of its class."""
    yield from getattr(value, "__dict__", {}).values()
    for owner in type(value).__mro__:
        if not _in_library(owner.__module__):
            yield from (v for v in vars(owner).values() if isinstance(v, _FOLLOWED))
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield getattr(value, name, None)


def _read_by(function: types.FunctionType) -> Iterator[Any]:
    """Values in a function's closure and defaults, and the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            yield None
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    names = set(_names(function.__code__))
    for name in sorted(names):
        if name in function.__globals__:
            value = function.__globals__[name]
            yield value
            if isinstance(value, types.ModuleType | type):
                yield from _members(value, names)


def _members(owner: types.ModuleType | type, names: set[str]) -> Iterator[Any]:
    """Values that a function may read of a module or class, by the names in its code."""
    module = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    if not _in_library(module):
        yield from (vars(owner)[name] for name in sorted(names & vars(owner).keys()))


def _in_library(module: str | None) -> bool:
    return bool(module) and str(module).partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _tensor(tensor: Tensor) -> Hashable:
    if unreadable(tensor):
        return Version(tensor, None)  # without values: evaluating the function says so
    if tensor.is_inference():  # has no version
        with plain_torch():
            if tensor.nbytes <= _SMALL:
                content = tensor.detach().clone().cpu()
                return Version(tensor, (content.dtype, tuple(content.flatten().tolist())))
        raise TypeError(
            f"a custom mask reads an inference tensor of {tensor.nbytes} bytes, whose changes "
            "cannot be noticed: clone it outside of torch.inference_mode"
        )
    return Version(tensor, (tensor.data_ptr(), tensor._version, tensor.shape))


def _array(array: np.ndarray) -> Hashable:
    if array.nbytes <= _SMALL and not array.dtype.hasobject:
        return (array.shape, array.dtype.str, hashlib.blake2b(array.tobytes()).digest())
    if not _writeable(array):
        return Version(array, None)
    raise TypeError(
        f"a custom mask reads a numpy array of {array.nbytes} bytes, whose changes cannot be "
        "noticed: make it a tensor with torch.from_numpy(array.copy()), or read-only with "
        "array.setflags(write=False)"
    )


def _writeable(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return True
        array = array.base
    return False
