"""What all kernel configs have in common, and their exact text form."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar


class KernelConfig(Protocol):
    """All that one kernel is compiled for: a frozen dataclass of numbers, bools and strings.

    The compile key is its repr; the name of its class says what the kernel computes.
    """

    @property
    def dtype(self) -> str:
        """Of q, k and v: "bfloat16" or "float16"."""
        ...

    @property
    def head_dim(self) -> int:
        """The largest head_dim; smaller ones are padded with zeros by the loads."""
        ...

    @property
    def arch(self) -> str:
        """Compiler target, as "sm_90a"."""
        ...

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of the tiles of its schedule."""
        ...

    @property
    def tile_cost(self) -> float:
        """Time of a full tile relative to other configs for the same computation."""
        ...

    @property
    def shared_memory(self) -> int:
        """Shared memory of a CTA, in bytes."""
        ...

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 arrays that one part of a split row leaves behind."""
        ...


Config = TypeVar("Config")


def parse_config(text: str, classes: Iterable[type[Config]]) -> Config:
    """The config with this repr. Nothing is evaluated: arguments must be literals.

    Args:
        text: `repr(config)`.
        classes: The dataclasses that it may be of.

    Raises:
        ValueError: It is no call of one of the classes with literal keyword arguments.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Example:
    ...     head_dim: int
    ...     dtype: str = "bfloat16"
    >>> parse_config("Example(head_dim=64, dtype='float16')", [Example])
    Example(head_dim=64, dtype='float16')
    """
    names = {c.__name__: c for c in classes}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("it is no call with keyword arguments")
        given: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return names[getattr(call.func, "id", "")](**given)
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{text!r} is no config ({error}): pass the repr of one of {', '.join(names)}"
        ) from error
