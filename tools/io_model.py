"""Table and figure of the IO model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_flash.experiments import markdown

from sparse_flash import masks, predict, prediction_io

ROOT = Path(__file__).parent.parent

ON_CHIP = 96 << 10  # 16-bit elements of the 192 KiB of an A100's multiprocessor
HEAD_DIM = 64
LENGTHS = [1 << k for k in range(10, 18)]
# Figure 2 of the paper (its second version; the first has 35.3 and 4.4 without dropout), in GB.
PAPER = {"batch": 64, "heads": 16, "length": 1024, "standard": 40.3, "flash": 4.4}


def _gb(elements: float, pairs: int = PAPER["batch"] * PAPER["heads"]) -> float:
    return 2 * elements * pairs / 1e9


def table() -> str:
    """Counted traffic of both passes at the paper's shape and at 16K tokens, in GB."""
    n = PAPER["length"]
    lines = [["attention", "counted, 1,024 tokens", "paper, 1,024 tokens", "counted, 16,384"]]

    def row(name: str, count: Any, measured: str) -> None:
        lines.append([name, f"{_gb(count(n)):.1f}", measured, f"{_gb(count(16 * n)):,.1f}"])

    def standard(passes: int) -> Any:
        return lambda n: prediction_io.standard(n, HEAD_DIM, True, passes)

    def flash(density: float) -> Any:
        return lambda n: prediction_io.flash(n, HEAD_DIM, ON_CHIP, density, backward=True)

    row("standard", standard(0), "")
    row("standard; mask, dropout and its gradient as passes", standard(3), f"{PAPER['standard']}")
    row("FlashAttention", flash(1.0), f"{PAPER['flash']}")
    row("block-sparse FlashAttention, density 0.25", flash(0.25), "")
    return markdown.table(lines)


def traffic() -> str:
    """HBM traffic by Nsight Compute's counters, and as `predict` gives it."""
    recorded = json.loads((ROOT / "results" / "costs" / "h200-traffic.json").read_text())
    head = ["attention, tokens", "batch x heads", "forward, MB", "backward, MB", "predicted, MB"]
    lines = [head]
    for row in recorded["rows"]:
        batch, length, heads = row["batch"], row["length"], row["heads"]
        predicted = ""
        if row["mask"]:
            layout = masks.parse(row["mask"]).layout(length)
            made = predict(layout, heads, row["head_dim"], batch=batch, device="H200")
            predicted = f"{made.forward_hbm_mb:,.0f} / {made.backward_hbm_mb:,.0f}"
        measured = [f"{row[f'{which}_mb']:,.0f}" for which in ("forward", "backward")]
        name = f"{row['mask'] or 'standard'}, {length:,}"
        lines.append([name, f"{batch} x {heads}", *measured, predicted])
    return markdown.table(lines)


def factor() -> str:
    """Traffic of standard attention over that of dense attention here, at the paper's shape."""
    recorded = json.loads((ROOT / "results" / "costs" / "h200-traffic.json").read_text())
    standard, dense = (
        sum(row[f"{w}_mb"] for w in ("forward", "backward")) for row in recorded["rows"][:2]
    )
    return f"{standard / 1e3:.1f} and {dense / 1e3:.1f} GB: {standard / dense:.1f} times less"


def data() -> dict[str, Any]:
    """Bytes of a forward pass of one head, in MB, by length."""
    kinds = {
        "standard": lambda n: prediction_io.standard(n, HEAD_DIM),
        "FlashAttention": lambda n: prediction_io.flash(n, HEAD_DIM, ON_CHIP),
        "block-sparse, density 0.1": lambda n: prediction_io.flash(n, HEAD_DIM, ON_CHIP, 0.1),
        "queries kept, no L2 cache": lambda n: prediction_io.streaming(n, HEAD_DIM, 128),
        "each array once": lambda n: 4.0 * n * HEAD_DIM,
    }
    found = {name: [round(2e-6 * f(n), 3) for n in LENGTHS] for name, f in kinds.items()}
    return {"lengths": LENGTHS, "megabytes": found}


def draw(shown: dict[str, Any], colors: tuple[str, str, str, tuple[str, ...]]) -> Any:
    """Lines by length, both axes logarithmic."""
    from matplotlib.figure import Figure

    ink, line, ours, others = colors
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = [(others[0], "-"), (ours, "-"), (ours, "--"), (others[0], "--"), (others[0], ":")]
    for (name, values), (color, style) in zip(shown["megabytes"].items(), styles, strict=True):
        axes.plot(shown["lengths"], values, style, color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(shown["lengths"], [f"{n // 1024}K" for n in shown["lengths"]])
    axes.set_xlabel("tokens", color=ink)
    axes.set_ylabel("MB of HBM traffic, one head, forward", color=ink)
    axes.tick_params(colors=ink, which="both", length=0)
    axes.grid(color=line, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=ink)
    return figure
