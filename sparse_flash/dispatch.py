"""The implementations of attention, and which of them runs a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_flash import hopper, reference
from sparse_flash.masks import BlockLayout


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    `attend(q, k, v, layout, kv_lens, softmax_scale, deterministic)` returns (out, lse);
    `why_not(q, k, v, layout)` says why it cannot run such inputs, or None where it can.
    """

    name: str
    attend: Callable[
        [Tensor, Tensor, Tensor, BlockLayout, Tensor | None, float, bool], tuple[Tensor, Tensor]
    ]
    why_not: Callable[[Tensor, Tensor, Tensor, BlockLayout], str | None]


# Best first: "auto" takes the first one that can run the inputs; the last one runs all.
IMPLEMENTATIONS = (
    Implementation("sm90", hopper.attend, hopper.why_not),
    Implementation("reference", reference.attend, reference.why_not),
)


def choose(impl: str, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Implementation:
    """The implementation of that name, or with "auto" the best that can run these inputs.

    An implementation asked for by name never falls back to another; "auto" warns where a GPU is
    there and the kernels cannot be used.

    Raises:
        ValueError: No such implementation, or it cannot run these inputs (with the reason).
    """
    if impl == "auto":
        reasons: list[str] = []
        for implementation in IMPLEMENTATIONS:
            reason = implementation.why_not(q, k, v, layout)
            if reason is None:
                if reasons and q.is_cuda:
                    _warn(f"impl='auto' takes {implementation.name!r}, which is slow: {reasons[0]}")
                return implementation
            reasons.append(reason)
    for implementation in IMPLEMENTATIONS:
        if implementation.name == impl:
            reason = implementation.why_not(q, k, v, layout)
            if reason:
                raise ValueError(f"impl={impl!r} cannot run this: {reason}; use impl='auto'")
            return implementation
    known = ", ".join(repr(i.name) for i in IMPLEMENTATIONS)
    raise ValueError(f"unknown impl={impl!r}; there are 'auto', {known}")


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """Say so, while torch.compile traces too."""
    warnings.warn(message, stacklevel=3)
