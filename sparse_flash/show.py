"""Output of `sparse-flash mask` besides layouts: the list of patterns, reach, limits of sizes."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Callable

from sparse_flash.masks.mask import PATTERNS, Mask

MOST_BLOCKS = 1 << 13  # each way: 2^26 tiles
LARGEST_BLOCK = 4096  # a tile has at most 2^24 elements
_SIGNATURE = 36  # characters before the description


def check_length(length: int, block: int) -> None:
    """Refuse sequences whose tiles are too many to be listed.

    Args:
        length: Number of queries or keys, the larger one.
        block: Number of tokens per block.

    Raises:
        ValueError: A number is below 1, or there are more than 2^13 blocks.

    >>> check_length(10**8, 128)
    Traceback (most recent call last):
    ValueError: --length 100000000 in blocks of 128 gives 781,250 x 781,250 tiles; at most 8,192 \
x 8,192 are listed: choose a --length up to 1048576
    """
    for name, value in (("length", length), ("block", block)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1 token, got {value}")
    blocks = -(-length // block)
    if blocks > MOST_BLOCKS:
        larger = -(-length // MOST_BLOCKS)
        way_out = f", or a --block of {larger} or more" if larger <= LARGEST_BLOCK else ""
        raise ValueError(
            f"--length {length} in blocks of {block} gives {blocks:,} x {blocks:,} tiles; at most "
            f"{MOST_BLOCKS:,} x {MOST_BLOCKS:,} are listed: choose a --length up to "
            f"{MOST_BLOCKS * block}{way_out}"
        )


def list_of_masks() -> str:
    """All names of a mask's text by topic, each with its signature and its first sentence."""
    topics: dict[str, list[str]] = {
        "Patterns. q and kv are the indices of a query and of a key.": [],
        "Masks made of masks, beside a | b, a & b and ~a.": [],
        "Token orders of images, for through(mask, order).": [],
    }
    patterns, composites, orders = topics.values()
    installed = [n for n in sorted(PATTERNS.installed()) if not _is_ours(PATTERNS.get(n))]
    for name, maker in PATTERNS.items():
        if name in installed:  # loaded by a lookup; a mask has no signature
            continue
        module = maker.__module__.rpartition(".")[2]
        topic = {"orders": orders, "mask": composites, "heads": composites}.get(module, patterns)
        topic.append(_entry(name, maker))
    parts = ["\n".join([title, *sorted(rows)]) for title, rows in topics.items()]
    if installed:
        line = f"Of installed packages: {', '.join(installed)}."
        parts.append(textwrap.fill(line, _columns()))
    return "\n\n".join(parts)


def _is_ours(maker: object) -> bool:
    """Whether it is a pattern's maker of this package; a mask as such is of another one."""
    return not isinstance(maker, Mask) and getattr(maker, "__module__", "").startswith(
        "sparse_flash."
    )


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def words_of_reach(mask: Mask, length: int) -> str:
    """The layers until information has spread as far as the mask allows, or bounds of them.

    >>> from sparse_flash import masks
    >>> words_of_reach(masks.causal(), 64), words_of_reach(masks.block_diagonal(8), 64)
    ('1 layer', 'never')
    """
    try:
        layers = mask.reach(length)
    except ValueError:  # too many pairs to follow: tiles give bounds
        lower, upper = mask.reach_bounds(length)
        return f"at least {lower} layers" + (f", at most {upper}" if upper is not None else "")
    if layers is None:
        return "never"
    return f"{layers} layer{'s' * (layers != 1)}"


def _entry(name: str, maker: Callable[..., object]) -> str:
    """A line; more where the terminal is narrow, or the signature long."""
    width = _columns()
    parameters = [
        str(p.replace(annotation=inspect.Parameter.empty))
        for p in inspect.signature(maker).parameters.values()
    ]
    head = f"  {name}({', '.join(parameters)})"
    first = " ".join((maker.__doc__ or "").partition("\n\n")[0].split())
    indent = " " * (_SIGNATURE + 2)
    if len(head) > _SIGNATURE:
        head += "\n" + indent
    lines = textwrap.wrap(first, max(40, width - len(indent)))
    return head.ljust(len(indent)) + f"\n{indent}".join(lines)
