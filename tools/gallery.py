"""The gallery: picture, formula, source, densities and reach of every pattern.

A picture shows 256 queries and keys, an element a pixel. Allowed elements are dark, other elements
of stored tiles (32 x 32 here) are light, and tiles that are not stored stay empty. Numbers are of
4,096 tokens and blocks of 128 x 128, as the kernels use them.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from sparse_flash.masks import BlockLayout, Mask, parse

from sparse_flash import masks

PICTURES = Path(__file__).parent.parent / "docs" / "images" / "gallery"
LENGTH, BLOCK = 4096, 128
PICTURE_LENGTH, PICTURE_BLOCK, SCALE = 256, 32, 2
# Pattern: the examples for the numbers (4,096 tokens) and for the picture (256 tokens).
EXAMPLES = {
    "full": ("full()", "full()"),
    "causal": ("causal()", "causal()"),
    "local": ("local(256)", "local(24)"),
    "block_local": ("block_local(128, 1)", "block_local(32, 1)"),
    "dilated": ("dilated(64, 8)", "dilated(12, 4)"),
    "strided": ("strided(64)", "strided(16)"),
    "fixed": ("fixed(128, 8)", "fixed(32, 2)"),
    "global_tokens": ("global_tokens(64)", "global_tokens(16)"),
    "sinks": ("sinks(64)", "sinks(16)"),
    "butterfly": ("butterfly(128)", "butterfly(16)"),
    "block_diagonal": ("block_diagonal(512)", "block_diagonal(48)"),
    "documents": ("documents((700, 1500, 1896))", "documents((40, 100, 116))"),
    "random_blocks": ("random_blocks(0.1)", "random_blocks(0.2, block=32)"),
    "random_blocks_per_row": (
        "random_blocks_per_row(4096, 3)",
        "random_blocks_per_row(256, 2, block=32)",
    ),
    "axial": ("axial(64, 64)", "axial(16, 16)"),
    "neighborhood": ("neighborhood(64, 64, 5)", "neighborhood(16, 16, 2)"),
    "patches": (
        "patches(64, 64, (8, 16), 1).through(morton(64, 64))",
        "patches(16, 16, (4, 8), 0).through(morton(16, 16))",
    ),
    "longformer": ("longformer(256, 16)", "longformer(20, 6)"),
    "bigbird": ("bigbird(4096, block=128)", "bigbird(256, 16, 3, 1, 2)"),
    "longnet": ("longnet((512, 4096), (1, 8))", "longnet((32, 256), (1, 8))"),
    "star": ("star(1)", "star(3)"),
    "star_attention": ("star_attention(512)", "star_attention(64)"),
}
GROUPS = {
    "Windows": ("full", "causal", "local", "block_local", "dilated"),
    "Global tokens and sinks": ("global_tokens", "sinks"),
    "Fixed sparse patterns": ("strided", "fixed", "butterfly", "longnet"),
    "Blocks and documents": (
        "block_diagonal",
        "documents",
        "random_blocks",
        "random_blocks_per_row",
    ),
    "Images": ("axial", "neighborhood", "patches"),
    "Published combinations": ("longformer", "bigbird", "star", "star_attention"),
}


def markdown() -> str:
    """The sections of docs/gallery.md."""
    lines = [*_overview(), ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [_entry(name), ""]
    return "\n".join(lines).rstrip()


def _overview() -> list[str]:
    """A grid of all pictures, each a link to its section."""
    names = [name for group in GROUPS.values() for name in group]
    cells = [
        f'<a href="#{name}"><img src="images/gallery/{name}.png" alt="{name}">{name}</a>'
        for name in names
    ]
    return ['<div class="overview">', *cells, "</div>"]


def _entry(name: str) -> str:
    mask, picture = EXAMPLES[name]
    about, numbers = describe(name), measure(mask)
    layers = numbers["reach"]
    rows = [
        ["Formula", about["formula"]],
        ["Source", about["source"]],
        ["Example", f"`{mask}`, {LENGTH:,} tokens, tiles of {BLOCK}"],
        ["Density", f"{numbers['density']:.2%}".replace("%", " %")],
        ["Tile density", f"{numbers['tile_density']:.2%}".replace("%", " %")],
        ["Reach", {None: "never", 1: "1 layer"}.get(layers, f"{layers} layers")],
        ["Picture", f"`{picture}`, {PICTURE_LENGTH} tokens, tiles of {PICTURE_BLOCK}"],
    ]
    table = "\n".join(f"| {left} | {_cell(right)} |" for left, right in rows)
    image = f"![{name}: which keys each query sees](images/gallery/{name}.png)"
    return f"### `{name}`\n\n{image}{{ .mask }}\n\n| | |\n|---|---|\n{table}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def describe(name: str) -> dict[str, str]:
    """Formula and source of a pattern, from its docstring."""
    doc = inspect.cleandoc(getattr(masks, name).__doc__ or "")
    formula = " ".join(doc.partition("\n\n")[0].split())
    formula = re.match(r"(.*?)(?:\. |\.$|$)", formula)[1]  # type: ignore[index]
    formula = f"`{formula.replace('`', '')}`" if "(" in formula else formula
    source = re.search(r"Source: (.*?)\.(?:\s+Density|\n[A-Z]|\n\n|$)", doc, re.DOTALL)
    return {"formula": formula, "source": " ".join(source[1].split()) if source else "common"}


@functools.cache
def measure(text: str) -> dict[str, Any]:
    """Densities and reach of a mask."""
    mask = _mask(text)
    layout = mask.layout(LENGTH, block=(BLOCK, BLOCK))
    return {
        "density": layout.density,
        "tile_density": layout.tile_density,
        "reach": mask.reach(LENGTH),
    }


def _mask(text: str) -> Mask:
    method = re.fullmatch(r"(.*)\.through\((.*)\)", text)
    return parse(f"through({method[1]}, {method[2]})" if method else text)


def layout_of_picture(name: str) -> BlockLayout:
    """The layout that a picture shows."""
    block = (PICTURE_BLOCK, PICTURE_BLOCK)
    return _mask(EXAMPLES[name][1]).layout(PICTURE_LENGTH, block=block)


def picture_data(name: str) -> dict[str, Any]:
    """The content of a picture, compact enough for the PNG field `data`."""
    layout = layout_of_picture(name)
    return {"mask": EXAMPLES[name][1], "elements": round(layout.density * PICTURE_LENGTH**2),
            "tiles": layout.num_tiles}  # fmt: skip


def write_picture(name: str) -> None:
    """Draw one pattern: an indexed PNG with a transparent background."""
    layout = layout_of_picture(name)
    tiles = torch.zeros(layout.num_block_rows, layout.num_block_cols, dtype=torch.bool)
    tiles[layout.tile_rows, layout.col_indices.long()] = True
    stored = tiles.repeat_interleave(PICTURE_BLOCK, 0).repeat_interleave(PICTURE_BLOCK, 1)
    shown = stored.to(torch.uint8) + layout.to_dense().to(torch.uint8)
    image = Image.fromarray(shown.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1).numpy())
    image = image.convert("P")
    image.putpalette([0, 0, 0, 0xB8, 0xC0, 0xEB, 0x3F, 0x51, 0xB5])
    info = PngImagePlugin.PngInfo()
    info.add_text("data", json.dumps(picture_data(name)))
    PICTURES.mkdir(parents=True, exist_ok=True)
    image.save(PICTURES / f"{name}.png", transparency=0, optimize=True, pnginfo=info, bits=2)
