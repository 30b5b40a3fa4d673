"""The protocol of kernel configs."""

from __future__ import annotations

from typing import Protocol


class KernelConfig(Protocol):
    """Static parameters of one kernel: a frozen dataclass of numbers, bools and strings.

    The compile key is its repr. The name of its class names the computation.
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
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 buffers of one split of a row."""
        ...
