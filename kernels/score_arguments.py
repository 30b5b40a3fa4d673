"""Score terms of a launch, for the kernels of all architectures: features, tensors and numbers.

`score_terms.py` has the device code that reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sparse_flash.kernels.attention import LOG2_E
from torch import Tensor


class ScoreFlags(NamedTuple):
    """Features of the scores that a kernel is compiled for."""

    softcap: bool = False
    alibi: bool = False
    sinks: bool = False


NO_FLAGS = ScoreFlags()


class KernelTerms(NamedTuple):
    """Arguments of a kernel: slopes and sinks, scale_log2, slope_scale and cap_scale of
    score_terms.py.
    """

    of_heads: tuple[Tensor, Tensor]
    scale_log2: float
    slope_scale: float
    cap_scale: float


class ScoreArguments(NamedTuple):
    """Values of the features.

    softcap: Bound of the scores; 0 for none.
    slopes: Of ALiBi, float32 (h,), or None.
    sinks: Logits without a value, float32 (h,), or None.
    """

    softcap: float
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def flags(self) -> ScoreFlags:
        """The features that are used."""
        return ScoreFlags(self.softcap > 0, self.slopes is not None, self.sinks is not None)

    def for_kernel(self, softmax_scale: float, unused: Tensor) -> KernelTerms:
        """The arguments of a kernel whose scores are scaled by a softmax_scale other than 0.

        unused: float32 (h,) on the device, in place of tensors that the kernel does not read.
        """
        unit = self.softcap or softmax_scale
        slopes = unused if self.slopes is None else self.slopes
        sinks = unused if self.sinks is None else self.sinks
        cap_scale = softmax_scale / self.softcap if self.softcap else 1.0
        return KernelTerms((slopes, sinks), unit * LOG2_E, -1 / unit, cap_scale)

    def with_lse(
        self, softmax_scale: float, lse: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """Tensors and numbers of `for_kernel`; lse `(b, h, s)` stands for unused tensors."""
        of_heads, *numbers = self.for_kernel(softmax_scale, lse.view(-1)[: lse.shape[1]])
        return of_heads, tuple(numbers)


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
