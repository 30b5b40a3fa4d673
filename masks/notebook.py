"""Masks and layouts in notebooks: numbers and small pictures, without matplotlib."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import TYPE_CHECKING

import torch
from sparse_flash.masks import picture
from sparse_flash.masks.coverage import hint, percent
from sparse_flash.masks.modes import plain_torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.mask import Mask

LENGTH = 4096  # default length, tokens
_LARGEST = 16384  # maximum tokens for automatic layouts of Python predicates
_CELLS = 128  # cells per side of a picture
_ELEMENTS = 1 << 25  # maximum number of elements counted one by one
_SIDE = 256  # minimum width of a picture, pixels
_GAP = 8  # pixels between pictures
_DARK = (8, 48, 107)


def lengths_of(mask: Mask, default: int = LENGTH) -> tuple[int, int]:
    """(q_len, kv_len) to show a mask at: its own lengths, else `default`.

    >>> from sparse_flash import masks
    >>> lengths_of(masks.causal()), lengths_of(masks.documents((30, 70)))
    ((4096, 4096), (100, 100))
    """
    q_len, kv_len = mask.extents()
    other = next((n for n in (q_len, kv_len) if n is not None), default)
    return q_len or other, kv_len or other


@plain_torch()
def layout_html(layout: BlockLayout, above: str = "") -> str:
    """An HTML fragment below 1 MB: a table of numbers and a picture of each pattern."""
    size = f"{layout.q_len:,} x {layout.kv_len:,}, block {layout.block[0]} x {layout.block[1]}"
    computed = layout.computed_density()
    rows = {
        "queries x keys": size,
        "tiles": f"{layout.num_tiles:,}, {layout.num_partial:,} of them partial, "
        f"{layout.num_bit_tiles:,} distinct bit tiles",
        "density": percent(layout.density),
        "tile density": percent(layout.tile_density),
        "computed density": f"{percent(computed)} (128 x 128 tiles)",
        "hint": hint(layout.density, computed, (128, 128)),
    }
    left = "style='text-align:left;white-space:nowrap'"
    table = "".join(
        f"<tr><th {left}>{name}</th><td style='text-align:left'>{value}</td></tr>"
        for name, value in rows.items()
        if value
    )
    shown, note = picture.panels(layout, None, picture.MOST_PANELS)
    figures = "".join(_figure(layout, number) for number in shown)
    title = above or f"<b>BlockLayout</b> on {layout.device}"
    return (
        f"<div>{title}<table>{table}</table>"
        f"<div style='display:flex;flex-wrap:wrap'>{figures}</div>{note}</div>"
    )


def _figure(layout: BlockLayout, pattern: int) -> str:
    data = base64.b64encode(png(_image(layout, pattern))).decode()
    name = picture.label(layout, pattern)
    caption = f"{name}: {picture.numbers(layout, pattern)}" if name else "queries down, keys across"
    style = f"width:{_SIDE}px;height:{_SIDE}px;image-rendering:pixelated;border:1px solid #999"
    return (
        f"<figure style='margin:6px;width:{_SIDE}px'>"
        f"<img alt='the pattern' style='{style}' src='data:image/png;base64,{data}'>"
        f"<figcaption style='font-size:80%'>{html.escape(caption)}</figcaption></figure>"
    )


@plain_torch()
def layout_png(layout: BlockLayout) -> bytes:
    """A PNG file with the pictures of at most 8 patterns side by side."""
    shown, _ = picture.panels(layout, None, picture.MOST_PANELS)
    images: list[Tensor] = []
    for number in shown:
        image = _image(layout, number)
        for axis in (0, 1):  # an integer number of pixels per cell
            image = image.repeat_interleave(max(1, _SIDE // image.shape[axis]), axis)
        framed = torch.full((image.shape[0] + 2, image.shape[1] + 2, 3), 150, dtype=torch.uint8)
        framed[1:-1, 1:-1] = image
        if images:
            images.append(torch.full((len(framed), _GAP, 3), 255, dtype=torch.uint8))
        images.append(framed)
    return png(torch.cat(images, 1))


def _image(layout: BlockLayout, pattern: int) -> Tensor:
    """One pixel per cell of a pattern, uint8 `(rows, columns, 3)`, from white to dark blue."""
    size = _CELLS
    if layout.q_len * layout.kv_len > _ELEMENTS:  # count whole tiles
        size = min(size, max(layout.num_block_rows, layout.num_block_cols))
    ink = picture.ink(layout.coverage(size, pattern).cpu())[..., None]
    dark = torch.tensor(_DARK, dtype=torch.float32, device="cpu")
    return (255 + ink * (dark - 255)).round().to(torch.uint8)


def png(image: Tensor) -> bytes:
    r"""The PNG file of an image, uint8 `(height, width, 3)` (RGB). Source: PNG, 3rd edition, 2003.

    >>> png(torch.zeros(2, 2, 3, dtype=torch.uint8))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    height, width, _ = image.shape
    lines = torch.nn.functional.pad(image.reshape(height, -1), (1, 0))  # filter 0: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(lines.contiguous().numpy().tobytes())
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@plain_torch()
def mask_html(mask: Mask) -> str:
    """An HTML fragment: a mask's repr, and its layout at its own lengths or at 4,096 tokens.

    If the mask has no automatic layout, the fragment has the reason.
    """
    title = f"<code>{html.escape(picture.shortened(repr(mask)))}</code>"
    layout, reason = _layout_of(mask)
    if layout is None:
        return f"<div>{title}<br>No picture: {html.escape(reason)}</div>"
    if mask.extents() == (None, None):
        title += f"<br>shown at {LENGTH:,} tokens: the mask fits any length"
    return layout_html(layout, title)


@plain_torch()
def mask_png(mask: Mask) -> bytes | None:
    """A PNG file of a mask's layout, as in `mask_html`; None if there is no picture."""
    layout, _ = _layout_of(mask)
    return None if layout is None else layout_png(layout)


def _layout_of(mask: Mask) -> tuple[BlockLayout | None, str]:
    """The layout to show, or None and a reason: a repr must be fast and never raises."""
    try:
        lengths = lengths_of(mask)
        if max(lengths) > _LARGEST and _calls_python(mask):
            call = f"mask.plot({lengths[0]}, {lengths[1]})"
            return None, f"its predicate takes long at {lengths[0]:,} tokens; {call} draws it"
        return mask.layout(*lengths), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _calls_python(mask: Mask) -> bool:
    """Whether a mask contains a `custom`."""
    return type(mask).__name__ == "custom" or any(map(_calls_python, mask.operands()))
