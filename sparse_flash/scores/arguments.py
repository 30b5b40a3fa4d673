"""From the score arguments of a call to its `ScoreTerms`: checks, and sums of equal terms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_flash.call import ScoreTerms, terms_of_options
from sparse_flash.scores.bias import Alibi, Relative, Relative2d, ScoreBias
from sparse_flash.scores.philox import LEVELS


def score_terms(
    q: Tensor,
    lengths: tuple[int, int],
    bias: ScoreBias | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    generator: torch.Generator | None,
) -> ScoreTerms | None:
    """The terms of a call; None where it has none. Draws the seed of dropout.

    Args:
        q: Queries `(b, q_len, h, d)`.
        lengths: Number of queries and of keys.
        bias: As of `block_sparse_attention`, and so are the others.
        softcap: Bound of the scores.
        sinks: Logits without a value.
        dropout_p: Rate of dropout.
        generator: Source of the seed; None: torch's own of the device.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A shape, device or number that does not fit.
    """
    cap = check_softcap(softcap)
    dropped = dropped_levels(dropout_p)
    _check_generator(generator, q, dropped)
    if bias is None and not cap and sinks is None and not dropped:
        return None
    slopes, table, image, coordinates = _biases(bias, q, lengths)
    sinks = None if sinks is None else _per_head("sinks", sinks, q, 1)
    seed = _seed(q, generator) if dropped else None
    tensors = (slopes, table, image, sinks)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    recorded = torch.is_grad_enabled()
    wants = [x is not None and recorded and (transformed or x.requires_grad) for x in tensors]
    return terms_of_options(wants, cap, dropped, (*tensors, coordinates, seed))


def _is_number(x: object) -> bool:
    """Also of the symbols that torch.compile has for floats, of which hasattr is an error."""
    return isinstance(x, int | float) or hasattr(x, "__float__")


def dropped_levels(dropout_p: float) -> int:
    """Number of byte values, of 256, that drop an element: the rate is rounded to it.

    Raises:
        TypeError: No number.
        ValueError: Outside [0, 1), or nearer to 0 or 1 than to a multiple of 1 / 256.
    """
    if type(dropout_p) is float and dropout_p == 0.0:
        return 0
    if isinstance(dropout_p, bool | Tensor) or not _is_number(dropout_p):
        raise TypeError(f"dropout_p must be a number in [0, 1), got {_named(dropout_p)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    dropped = round(float(dropout_p) * LEVELS)
    if dropout_p > 0 and dropped in (0, LEVELS):
        raise ValueError(
            f"dropout_p={dropout_p} is nearer to {dropped // LEVELS} than to a multiple of 1/256, "
            "the resolution of the rate: pass 0.0, or a rate in 1/256..255/256"
        )
    return dropped


def check_softcap(softcap: float | None) -> float:
    """The cap as a float, 0 for none.

    Raises:
        TypeError: No number.
        ValueError: Not positive, or not finite.
    """
    if softcap is None:
        return 0.0
    if isinstance(softcap, Tensor):
        raise TypeError(
            "softcap must be a positive number or None, got a tensor: no gradient would reach it; "
            "pass softcap.item()"
        )
    if isinstance(softcap, bool) or not _is_number(softcap):
        raise TypeError(f"softcap must be a positive number or None, got {_named(softcap)}")
    if not 0 < softcap < math.inf:
        raise ValueError(
            f"softcap must be a positive, finite number, got {softcap}; pass None for no cap"
        )
    return float(softcap)


def _check_generator(generator: Any, q: Tensor, dropped: int) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {_named(generator)}")
    if not dropped:
        raise ValueError("generator is for dropout, but dropout_p is 0: leave it out")
    if generator.device.type != q.device.type:
        raise ValueError(
            f"generator is on {generator.device}, but q is on {q.device}: make a "
            f"torch.Generator({str(q.device)!r})"
        )


def _seed(q: Tensor, generator: torch.Generator | None) -> Tensor:
    """64 random bits (1,) on the device of q.

    Drawn on the device from torch's generator: manual_seed, checkpointing, CUDA graphs and vmap
    treat the draw as they treat torch's own dropout. In compiled graphs an operator draws, so that
    the numbers are those of eager mode.
    """
    if generator is None and torch.compiler.is_compiling():
        seed: Tensor = torch.ops.sparse_flash.dropout_seed(q)
        return seed
    return draw_seed(q, generator)


def draw_seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """64 random bits, int64 (1,), on the device of a tensor."""
    low, high = -(1 << 63), (1 << 63) - 1
    return torch.randint(
        low, high, (1,), dtype=torch.int64, device=like.device, generator=generator
    )


def _biases(
    bias: ScoreBias | None, q: Tensor, lengths: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """slopes, table, image_table and coordinates; terms of one kind are added up."""
    if bias is None:
        return None, None, None, None
    if not isinstance(bias, ScoreBias):
        raise TypeError(
            f"bias must be of sparse_flash.scores, such as alibi(slopes) or relative(table), got "
            f"{_named(bias)}"
        )
    slopes: Tensor | None = None
    table: Tensor | None = None
    image: Tensor | None = None
    grid: Relative2d | None = None
    for term in bias.terms:
        if isinstance(term, Alibi):
            more = _per_head("alibi: slopes", term.slopes, q, 1)
            slopes = more if slopes is None else slopes + more
        elif isinstance(term, Relative):
            table = _sum(table, _per_head("relative: table", term.table, q, 2))
        elif isinstance(term, Relative2d):
            _check_grid(term, grid, lengths)
            image = _sum(image, _per_head("relative2d: table", term.table, q, 3))
            grid = term
        else:
            raise TypeError(f"bias: {term!r} is not a term of sparse_flash.scores")
    coordinates = None if grid is None else grid.coordinates()
    return slopes, table, image, coordinates


def _check_grid(term: Relative2d, other: Relative2d | None, lengths: tuple[int, int]) -> None:
    if other is not None and term.grid != other.grid:
        raise ValueError(
            f"bias: {other!r} and {term!r} are of different grids: add terms of one height, width "
            "and order only"
        )
    tokens = term.height * term.width
    if max(lengths) > tokens:
        raise ValueError(
            f"relative2d: an image of {term.height} x {term.width} has {tokens} tokens, but there "
            f"are {lengths[0]} queries and {lengths[1]} keys: other tokens have no place on it"
        )


def _per_head(name: str, x: Tensor, q: Tensor, ndim: int) -> Tensor:
    """The tensor in the precision that is computed in, contiguous."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_named(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    heads = q.shape[2]
    if x.ndim != ndim or x.shape[0] != heads:
        rest = ", ..." if ndim > 1 else ","
        raise ValueError(
            f"{name} must be ({heads}{rest}), one entry for each query head of q, "
            f"got {tuple(x.shape)}"
        )
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move one of them")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return x.to(dtype).contiguous()


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    """The sum of two tables, whose first and last entries stand for all distances beyond."""
    if a is None:
        return b
    sides = [max(x, y) for x, y in zip(a.shape[1:], b.shape[1:], strict=True)]
    return _widened(a, sides) + _widened(b, sides)


def _widened(table: Tensor, sides: list[int]) -> Tensor:
    """Repeat the outermost entries until the dimensions after the heads have these sizes."""
    for dim, side in enumerate(sides, 1):
        margin = (side - table.shape[dim]) // 2
        if margin:
            shape = list(table.shape)
            shape[dim] = margin
            first, last = (table.narrow(dim, i, 1) for i in (0, table.shape[dim] - 1))
            table = torch.cat((first.expand(shape), table, last.expand(shape)), dim)
    return table


def _named(value: object) -> str:
    return f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
