"""Values that a Python function reads besides its arguments, and their state.

A layout built from a function is stale after a change of any tensor that the function reads.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sparse_flash.masks.modes import plain_torch, unreadable
from torch import Tensor

_SMALL = 1 << 20  # bytes; the content of smaller arrays is hashed in every call
_MOST = 1000  # maximum number of values
_CONSTANT = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Attributes of classes that are not followed: slots, and methods written in C.
_DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
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

    - Tensors: identity, address and version. In-place operations of PyTorch increment the version;
      fused optimizers, and writes through `.data` or a numpy array with shared memory, do not.
    - Numpy arrays, inference tensors and containers: content.
    - Numbers and strings: value.
    - Other objects: identity, attributes, and attributes of their class.
    - Functions, properties and partials: the values that they read; functions of libraries are
      skipped. Of modules and classes, members by the names in the code of the function.

    Values that a function computes or fetches elsewhere (environment, files, random numbers) are
    not found.

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
    return tuple(_walk(function, {}))


def _walk(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Hashable]:
    """The states of a value and of its parts. seen: Number of each value so far, by id."""
    if isinstance(value, _CONSTANT):
        yield (type(value), value)
        return
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return
    if id(value) in seen:
        yield seen[id(value)][0]
        return
    if len(seen) >= _MOST:
        raise TypeError(
            f"a custom mask reads an object of more than {_MOST} parts, whose changes cannot be "
            "noticed in time: let its function read the tensors that it needs, or build the layout "
            "with mask.layout(...) whenever they change"
        )
    seen[id(value)] = len(seen), value  # kept alive, so that no other value has its id
    if isinstance(value, Tensor):
        yield _tensor(value)
    elif isinstance(value, np.ndarray):
        yield _array(value)
    elif isinstance(value, np.generic):
        yield (type(value), value.item())
    else:
        yield from _parts(value, seen)


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Hashable]:
    """The states of all parts of an object."""
    if isinstance(value, types.FunctionType):
        if _in_library(value.__module__):
            return
        yield _identity(value)
        inner: Iterable[Any] = _read_by(value)
    elif isinstance(value, types.MethodType):
        inner = (value.__func__, value.__self__)
    elif isinstance(value, property):
        inner = (value.fget,)
    elif isinstance(value, staticmethod | classmethod):
        inner = (value.__func__,)
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict | list | tuple | set | frozenset | types.MappingProxyType):
        yield len(value)
        inner = (*_items(value), *_attributes(value))
    elif isinstance(value, type):
        yield _identity(value)
        inner = _of_class(value, with_functions=False)
    elif _in_library(type(value).__module__) and not hasattr(value, "__dict__"):
        yield _identity(value)
        inner = _content(value)
    else:
        yield _identity(value)
        inner = _attributes(value)
    for part in inner:
        yield from _walk(part, seen)


def _identity(value: Any) -> Hashable:
    try:
        return Version(value, None)
    except TypeError:  # some objects do not support weak references
        return type(value).__qualname__


def _items(value: Any) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, Mapping) else value


def _content(value: Any) -> Iterator[Any]:
    """The parts of a copy of an object of a library, such as the items of a deque."""
    try:
        _, *parts = value.__reduce_ex__(4)
    except (TypeError, AttributeError):  # a generator, a lock
        return
    for part in parts:
        yield list(part) if isinstance(part, Iterator) else part


def _attributes(value: Any) -> Iterator[Any]:
    """Attribute values of an object and of its class, and the functions of the class."""
    yield from getattr(value, "__dict__", {}).values()
    for owner in type(value).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield getattr(value, name, None)
    yield from _of_class(type(value), with_functions=True)


def _of_class(kind: type, *, with_functions: bool) -> Iterator[Any]:
    """Attributes of a class and its bases, but for those of libraries and of Python's own names."""
    for owner in kind.__mro__:
        if _in_library(owner.__module__):
            continue
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType | property | staticmethod | classmethod):
                if with_functions:
                    yield value
            elif not (name.startswith("__") or isinstance(value, _DESCRIPTORS)):
                yield value


def _read_by(function: types.FunctionType) -> Iterator[Any]:
    """Values in the closure and defaults of a function, and the globals that it names."""
    names = set(_names(function.__code__))
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not yet assigned
            value = None
        yield value
        yield from _members(value, names)
    yield from function.__dict__.values()
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        yield value
        yield from _members(value, names)


def _members(owner: Any, names: set[str], above: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Values of a module or class that a function may read, by the names in its code."""
    if not isinstance(owner, types.ModuleType | type) or owner in above:
        return
    if _in_library(owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__):
        return
    known = vars(owner) if isinstance(owner, types.ModuleType) else dir(owner)
    for name in sorted(names.intersection(known)):
        value = getattr(owner, name, None)
        yield value
        yield from _members(value, names, (*above, owner))


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
    if tensor.layout != torch.strided or tensor.is_nested:  # without an address
        return Version(tensor, None if tensor.is_inference() else tensor._version)
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
