"""Floating-point operations of a training step, and the kept part of the attention matrix."""

from __future__ import annotations

from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.config import RunConfig
from sparse_flash.experiments.data.dataset import has_pairs
from sparse_flash.experiments.densities import attention_densities


def density(config: RunConfig) -> float | None:
    """The kept fraction of a run's attention matrix, 0..1; see `Kind.density`."""
    return config.kind.density(config.length, config.block)


def step_flops(config: RunConfig) -> float | None:
    """Operations of the matrix products of a training step, 2 for a multiplication and addition.

    Forward and backward: 6 per token and weight of the layers, plus `attention_flops` per sequence,
    layer and head. Embeddings and the classifier are not counted. None if the operations of the
    attention are unknown.
    """
    model, length = config.model, config.length
    sequences = config.train.batch_size * (2 if has_pairs(config.task) else 1)
    weights = 4 * model.dim**2 + 2 * model.dim * model.ffn
    kept = density(config)
    head = attention_flops(config.kind, length, model.dim // model.heads, kept)
    if head is None:
        return None
    return sequences * model.layers * (6.0 * weights * length + model.heads * head)


def known_metrics(config: RunConfig) -> dict[str, float]:
    """step_gflops and the densities of a run; a number that its attention lacks is left out."""
    operations, head_dim = step_flops(config), config.model.dim // config.model.heads
    found = attention_densities(config.kind, config.length, config.block, head_dim)
    found["step_gflops"] = None if operations is None else 1e-9 * operations
    return {name: value for name, value in found.items() if value is not None}


def attention_flops(
    kind: AttentionKind, length: int, head_dim: int, kept: float | None
) -> float | None:
    """Operations of one head's attention to one sequence, forward and backward.

    With n tokens, head_dim d, and the kept fraction p of the attention matrix:

        with a matrix          4 p n^2 d forward (S, O), twice that backward (dV, dP, dQ, dK)
        linear, f = d          4 n f d + 2 n f forward (K'^T V, Q' of it; the normalizer), twice
                               that backward
        performer, f = size    as linear, and 4 n f d each way for the features of Q and K: they
                               are not trained, so that their own gradient is not computed
        linformer, r = size    8 n r d forward (mixtures of K and V; S, O), twice that backward

    Attention of a user counts its own by a static method `flops(length, head_dim)` of its class;
    without one, None is returned.

    S that is computed again in the backward pass is not counted, nor are elements of stored tiles
    that the mask excludes.

    Args:
        kind: The attention.
        length: Tokens of the sequence, n.
        head_dim: Channels of a head, d.
        kept: Result of `kind.density`, p; None for kinds without an attention matrix.

    >>> attention_flops(AttentionKind.of("dense"), 100, 8, 1.0)
    960000.0
    >>> attention_flops(AttentionKind.of("linear"), 100, 8, None)
    81600.0
    """
    if kind.type is not None and kind.type.flops is not None:
        return kind.type.flops(length, head_dim, kind.size)
    if kind.name in ("module", "selected"):
        counted = getattr(kind.user, "flops", None)
        operations = None if counted is None else counted(length, head_dim)
        return None if operations is None else float(operations)
    assert kept is not None
    return 12.0 * kept * length**2 * head_dim
