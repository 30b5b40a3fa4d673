"""Floating-point operations of a training step, and the kept part of the attention matrix."""

from __future__ import annotations

from sparse_flash.experiments.attention import Kind
from sparse_flash.experiments.config import RunConfig


def density(config: RunConfig) -> float | None:
    """The kept fraction of a run's attention matrix, 0..1; see `Kind.density`."""
    return Kind.of(config.attention).density(config.length, config.block)


def step_flops(config: RunConfig) -> float:
    """Operations of the matrix products of a training step, 2 for a multiplication and addition.

    Of a token, forward and backward, 6 for each weight of the layers; of a sequence, layer and
    head, those of `attention_flops`. Embeddings and the classifier are not counted.
    """
    model, length = config.model, config.length
    sequences = config.train.batch_size * (2 if config.task.pairs else 1)
    weights = 4 * model.dim**2 + 2 * model.dim * model.ffn
    kind = Kind.of(config.attention)
    kept = kind.density(length, config.block)
    attention = model.heads * attention_flops(kind, length, model.dim // model.heads, kept)
    return sequences * model.layers * (6.0 * weights * length + attention)


def attention_flops(kind: Kind, length: int, head_dim: int, kept: float | None) -> float:
    """Operations of one head's attention to one sequence, forward and backward.

    With n tokens, head_dim d, and the kept fraction p of the attention matrix:

        with a matrix          4 p n^2 d forward (S, O), twice that backward (dV, dP, dQ, dK)
        linear, f = d          4 n f d + 2 n f forward (K'^T V, Q' of it; the normalizer), twice
                               that backward
        performer, f = size    as linear, and 4 n f d each way for the features of Q and K: they
                               are not trained, so that their own gradient is not computed
        linformer, r = size    8 n r d forward (mixtures of K and V; S, O), twice that backward

    S that is computed again in the backward pass is not counted, nor are elements of stored tiles
    that the mask excludes.

    Args:
        kind: Kind of attention.
        length: Tokens of the sequence, n.
        head_dim: Channels of a head, d.
        kept: What `kind.density` says, p; None for kinds without an attention matrix.

    >>> attention_flops(Kind.of("dense"), 100, 8, 1.0)
    960000.0
    >>> attention_flops(Kind.of("linear"), 100, 8, None)
    81600.0
    """
    match kind.name:
        case "linear":
            return 3.0 * _by_features(length, head_dim, head_dim)
        case "performer":
            return 3.0 * _by_features(length, head_dim, kind.size) + (
                8.0 * length * kind.size * head_dim
            )
        case "linformer":
            return 24.0 * length * kind.size * head_dim
    assert kept is not None
    return 12.0 * kept * length**2 * head_dim


def _by_features(length: int, head_dim: int, features: int) -> int:
    return 4 * length * features * head_dim + 2 * length * features
