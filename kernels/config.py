"""What all kernel configs have in common."""

from __future__ import annotations

from typing import Protocol


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
