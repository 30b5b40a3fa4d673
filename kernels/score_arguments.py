"""Score terms of a launch, for the kernels of all architectures: features, tensors and numbers.

`score_terms.py` has the device code that reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.attention import LOG2_E
from sparse_flash.kernels.distance_table import DistanceBias, DistanceGrid, values_of
from sparse_flash.kernels.image_table import ImageBias, image_numbers, image_values
from torch import Tensor

LEVELS = 256  # values of dropout's random byte


class ScoreFlags(NamedTuple):
    """Features of the scores that kernels are compiled for."""

    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    distance_bias: bool = False
    distance_grads: bool = False
    image_bias: bool = False
    image_grads: bool = False

    @property
    def of_forward(self) -> dict[str, Any]:
        """The features of the forward kernels for Hopper."""
        return self._without("distance_grads", "image_bias", "image_grads")

    @property
    def of_backward(self) -> dict[str, Any]:
        """The features of its backward kernels; the sinks' gradients need none, and ALiBi is a bias
        by distance there.
        """
        return self._without("sinks", "alibi", "image_bias", "image_grads")

    def _without(self, *names: str) -> dict[str, Any]:
        return {name: used for name, used in self._asdict().items() if name not in names}


NO_FLAGS = ScoreFlags()


class BiasSums(NamedTuple):
    """Sums that a kernel adds the gradients of a bias' values to; None: of a bias without.

    distance: Of a bias by distance, float32 or int64 (h, DistanceGrid.length).
    image: Of a bias by distances on an image, float32 or int64 (h, ImageBias.length).
    factors: Of each head's int64 sums, powers of two, float32 (h,). None: sums are float32.
    """

    distance: Tensor | None = None
    image: Tensor | None = None
    factors: Tensor | None = None


NO_SUMS = BiasSums()


class ScoreArguments(NamedTuple):
    """Values of the features.

    softcap: Bound of the scores; 0 for none.
    slopes: Of ALiBi without gradients, float32 (h,), or None.
    sinks: Logits without a value, float32 (h,), or None.
    seed: Of dropout, int64 (1,), or None.
    dropped: Number of byte values that drop an element.
    bias: By distance, or None.
    graded: Whether to compute the gradients of this bias.
    image: By distances on an image, or None.
    image_graded: Whether to compute the gradients of this bias.
    """

    softcap: float
    slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None = None
    dropped: int = 0
    bias: DistanceBias | None = None
    graded: bool = False
    image: ImageBias | None = None
    image_graded: bool = False

    @property
    def keep_scale(self) -> float:
        """Factor of kept elements with dropout; 1 without."""
        return LEVELS / (LEVELS - self.dropped)

    @property
    def flags(self) -> ScoreFlags:
        """The features that are used."""
        return ScoreFlags(
            softcap=self.softcap > 0,
            alibi=self.slopes is not None,
            sinks=self.sinks is not None,
            dropout=self.seed is not None,
            distance_bias=self.bias is not None,
            distance_grads=self.graded,
            image_bias=self.image is not None,
            image_grads=self.image_graded,
        )

    def for_kernel(
        self,
        softmax_scale: float,
        backward: bool = False,
        grid: DistanceGrid | None = None,
        sums: BiasSums = NO_SUMS,
    ) -> tuple[Any, float]:
        """The fields of a kernel's `score_terms.ScoreTerms`, and scale_log2.

        softmax_scale: Other than 0. backward: Whether for a backward kernel, which has no sinks.
        grid: Distances of the kernel, for a bias. sums: For the gradients of a bias' values.
        """
        unit = self.softcap or softmax_scale
        alibi = (None, None) if self.slopes is None else (self.slopes, -1 / unit)
        cap_scale = softmax_scale / self.softcap if self.softcap else None
        dropout: tuple[Any, ...] = (None, None, None)
        if self.seed is not None:
            dropout = (self.seed.view(torch.int32), self.dropped, self.keep_scale)
        bias: tuple[Any, ...] = (None, None, None)
        if self.bias is not None:
            assert grid is not None
            bias = (values_of(self.bias, grid, unit), grid.rows, self.bias.radius)
        image: tuple[Any, ...] = (None, None)
        if self.image is not None:
            assert grid is not None
            count = max(grid.rows, grid.columns)
            image = (image_values(self.image, unit), image_numbers(self.image, count))
        sinks = None if backward else self.sinks
        terms = (*alibi, cap_scale, sinks, *dropout, *bias, sums.distance)
        return (*terms, *image, sums.image, sums.factors), unit * LOG2_E


class Gradients(NamedTuple):
    """Gradients of q, k and v, and of score terms; None of terms that the call does not have."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    sinks: Tensor | None
    bias: DistanceBias


def sink_gradients(sinks: Tensor, stats: Tensor) -> Tensor:
    """-sum exp(sink - lse) delta over the queries of each head, float32 (h,).

    sinks: Logits (h,). stats: Row statistics of the backward pass, (b, h, 2, queries): lse in base
    2, inf where there is no query, and delta.
    """
    probability = torch.exp2(sinks[:, None] * LOG2_E - stats[:, :, 0])
    return -(probability * stats[:, :, 1].where(probability > 0, 0)).sum((0, 2))
