"""Values that a Python function reads besides its arguments, and their state.

A layout built from a function is stale after a change of any tensor that the function reads.
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

_SMALL = 1 << 20  # bytes; the content of smaller arrays is hashed in every call
_MOST = 1000  # maximum number of values
_CONSTANT = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FOLLOWED = (Tensor, np.ndarray, list, dict, types.FunctionType, *_CONSTANT)
# Their functions are skipped: they read only constants.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "einops"}


class Version:
    """Identity of a tensor or another object, and version of its content.

    Compares by identity without keeping the object alive. A later object at the same address
    compares different.
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
    """The state of all values that `function` reads: closure, defaults, globals, attributes.

    - Tensors: identity, address and version. Every in-place operation of PyTorch increments the
      version; writes through `.data` or through a numpy array with shared memory do not.
    - Numpy arrays and inference tensors: content.
    - Numbers and strings: value.
    - Other objects: identity and attributes.
    - Functions and partials: the values that they read; functions of libraries are skipped.

    Raises:
        TypeError: An array or inference tensor has more than 1 MiB, so that its changes cannot be
            detected.

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
    """The states of all parts of an object."""
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
        except TypeError:  # some objects do not support weak references
            yield type(value).__qualname__
        inner = _attributes(value)
    for part in inner:
        yield from _walk(part, seen)


def _attributes(value: Any) -> Iterator[Any]:
    """Attribute values of an object and of its class, and the functions of the class."""
    yield from getattr(value, "__dict__", {}).values()
    for owner in type(value).__mro__:
        if not _in_library(owner.__module__):
            yield from (v for v in vars(owner).values() if isinstance(v, _FOLLOWED))
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield getattr(value, name, None)


def _read_by(function: types.FunctionType) -> Iterator[Any]:
    """Values in the closure and defaults of a function, and the globals that it names."""
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
    """Values of a module or class that a function may read, by the names in its code."""
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
        return Version(tensor, None)  # no data: evaluating the function raises
    if tensor.is_inference():  # inference tensors have no version
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
