"""The table of docs/scores.md: which implementation computes which score feature.

    python -m tools.score_table

prints it, from the implementations' own refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sparse_flash import masks
from sparse_flash.call import AttentionCall, terms_of_options
from sparse_flash.implementations import IMPLEMENTATIONS, Implementation
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    FEATURES,
    RELATIVE,
    RELATIVE_2D,
    SINKS,
    SLOPES,
    SOFTCAP,
    WIDTH,
    ScoreFeature,
)

HEAD_DIMS = (64, 128, 192, 256)
_HEADS = 2


def call_of(feature: ScoreFeature, head_dim: int, gradients: bool, offset: bool) -> AttentionCall:
    """A call that uses a feature, of tensors without values."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = (make(1, 8, _HEADS, head_dim, dtype=torch.bfloat16) for _ in "qk")
    width = head_dim // 2 if feature is WIDTH else head_dim
    v = make(1, 8, _HEADS, width, dtype=torch.bfloat16)
    terms: dict[ScoreFeature, dict[str, Any]] = {
        SOFTCAP: {"softcap": 30.0},
        SINKS: {"sinks": make(_HEADS), "wants": (False, False, False, gradients)},
        ALIBI: {"slopes": make(_HEADS)},
        SLOPES: {"slopes": make(_HEADS), "wants": (gradients, False, False, False)},
        RELATIVE: {"table": make(_HEADS, 3), "wants": (False, gradients, False, False)},
        RELATIVE_2D: {
            "image_table": make(_HEADS, 3, 3),
            "coordinates": make(2, 2, 4, dtype=torch.int32),
            "wants": (False, False, gradients, False),
        },
        DROPOUT: {"seed": make(1, dtype=torch.int64), "dropped": 26},
    }
    plain = terms_of_options((False,) * 4, 0.0, 0)
    given = None if feature is WIDTH else plain._replace(**terms[feature])
    at = make(1, dtype=torch.int32) if offset else None
    layout = masks.full().layout(8)
    tensors = (q, k, v, None, at, None)
    return AttentionCall(*tensors, layout, None, 1.0, False, gradients, False, given)


def cell(
    implementation: Implementation, feature: ScoreFeature, gradients: bool, offset: bool
) -> str:
    """Whether an implementation computes a feature, and up to which head_dim."""
    fits = [
        d
        for d in HEAD_DIMS
        if implementation.unsupported_scores(call_of(feature, d, gradients, offset)) is None
    ]
    if len(fits) == len(HEAD_DIMS):
        return "yes"
    return f"head_dim up to {max(fits)}" if fits else "no"


def table() -> Iterator[str]:
    """The lines of the table, in Markdown."""
    implementations = IMPLEMENTATIONS[::-1]
    names = [f"`{i.name}`" for i in implementations]
    yield f"| feature | pass | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    passes = {"forward": (False, False), "backward": (True, False)}
    passes["forward with `q_offset`"] = (False, True)
    for feature in FEATURES:
        for name, (gradients, offset) in passes.items():
            if feature is SLOPES and not gradients:
                continue
            cells = [cell(i, feature, gradients, offset) for i in implementations]
            title = feature.name[0].upper() + feature.name[1:]
            yield f"| {title} | {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
