"""Element, tile and computed density of attention by name or mask."""

from __future__ import annotations

from sparse_flash.experiments.attention import AttentionKind

from sparse_flash import Densities, densities

DENSITIES = ("density", "tile_density", "computed_density")


def densities_of(kind: AttentionKind, length: int, block: int, head_dim: int) -> Densities | None:
    """The numbers of the layout of an attention's mask; None where there is no mask.

    FlexAttention computes the blocks of the layout, ours the tiles of its kernel.

    Args:
        kind: The attention.
        length: Number of tokens.
        block: Granularity of the layout, in tokens.
        head_dim: Width of a head.
    """
    if kind.mask is None:
        return None
    arch = "sm_90" if kind.name == "ours" else None
    return densities(kind.layout(length, block), head_dim, arch=arch)


def attention_densities(
    kind: AttentionKind, length: int, block: int, head_dim: int
) -> dict[str, float | None]:
    """Element, tile and computed density of an attention; None without an attention matrix.

    Arguments are those of `densities_of`.

    >>> found = attention_densities(AttentionKind.of("local(64)"), 2048, 128, 32)
    >>> {name: round(value, 2) for name, value in found.items()}
    {'density': 0.06, 'tile_density': 0.18, 'computed_density': 0.09}
    """
    if kind.name == "selected":
        return kind.user.densities(length, head_dim)
    found = densities_of(kind, length, block, head_dim)
    return {**found.record()} if found else dict.fromkeys(DENSITIES, kind.density(length, block))
