"""Score terms of a launch, for the kernels of all architectures: features, tensors and numbers.

`score_terms.py` has the device code that reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.attention import LOG2_E
from torch import Tensor

LEVELS = 256  # values of dropout's random byte


class ScoreFlags(NamedTuple):
    """Features of the scores that a kernel is compiled for."""

    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False

    @property
    def of_backward(self) -> dict[str, bool]:
        """The features of backward kernels; the sinks' gradients need none."""
        return {name: used for name, used in self._asdict().items() if name != "sinks"}


NO_FLAGS = ScoreFlags()


class ScoreArguments(NamedTuple):
    """Values of the features.

    softcap: Bound of the scores; 0 for none.
    slopes: Of ALiBi, float32 (h,), or None.
    sinks: Logits without a value, float32 (h,), or None.
    seed: Of dropout, int64 (1,), or None.
    dropped: Number of byte values that drop an element.
    """

    softcap: float
    slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None = None
    dropped: int = 0

    @property
    def flags(self) -> ScoreFlags:
        """The features that are used."""
        tensors = (self.slopes, self.sinks, self.seed)
        return ScoreFlags(self.softcap > 0, *(x is not None for x in tensors))

    def for_kernel(self, softmax_scale: float, backward: bool = False) -> tuple[Any, float]:
        """The fields of a kernel's `score_terms.ScoreTerms`, and scale_log2.

        softmax_scale: Other than 0. backward: Whether for a backward kernel, which has no sinks.
        """
        unit = self.softcap or softmax_scale
        alibi = (None, None) if self.slopes is None else (self.slopes, -1 / unit)
        cap_scale = softmax_scale / self.softcap if self.softcap else None
        dropout: tuple[Any, ...] = (None, None, None)
        if self.seed is not None:
            dropout = (self.seed.view(torch.int32), self.dropped, LEVELS / (LEVELS - self.dropped))
        sinks = None if backward else self.sinks
        return (*alibi, cap_scale, sinks, *dropout, None, None, None), unit * LOG2_E


class Gradients(NamedTuple):
    """Gradients of q, k, v and the sinks; that of the sinks is None where there are none."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    sinks: Tensor | None


def sink_gradients(sinks: Tensor, stats: Tensor) -> Tensor:
    """-sum exp(sink - lse) delta over the queries of each head, float32 (h,).

    sinks: Logits (h,). stats: Row statistics of the backward pass, (b, h, 2, queries): lse in base
    2, inf where there is no query, and delta.
    """
    probability = torch.exp2(sinks[:, None] * LOG2_E - stats[:, :, 0])
    return -(probability * stats[:, :, 1].where(probability > 0, 0)).sum((0, 2))
