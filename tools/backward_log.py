"""Tables of "What made the backward fast", from the recorded log of the backward kernels.

The log is prose with tables. `h200-backward.json` lists its findings, each with a quote of the log.
"""

from __future__ import annotations

import re

from tools import tables

LOG = tables.BENCH / "h200-backward.md"
FINDINGS = tables.BENCH / "h200-backward.json"


def changes() -> str:
    """Adopted changes, with speed before and after each."""
    rows = []
    for found in tables.read(FINDINGS)["changes"]:
        unit = f" {found['unit']}" if found["unit"] != "TFLOP/s" else ""
        speeds = f"{found['case']}: {found['before']} to {found['after']}{unit}"
        rows.append([found["change"], found["reason"], speeds])
    return tables.table(["change", "reason", "before and after"], rows)


def dead_ends() -> str:
    """Ideas that did not help."""
    found = tables.read(FINDINGS)["dead_ends"]
    return tables.table(["idea", "result"], [[x["idea"], x["result"]] for x in found])


def log_tables() -> list[list[list[str]]]:
    """The log's tables as lines of cells, without the rule below the head."""
    found: list[list[list[str]]] = []
    lines = LOG.read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [[head, *rows] for head, _, *rows in found]


def _table_with(column: str) -> list[list[str]]:
    """The last table of the log with this column."""
    return next(found for found in reversed(log_tables()) if column in found[0])


def memory() -> str:
    """Memory of forward and backward, in GiB."""
    _, *rows = _table_with("above the inputs")
    cells = [
        [f"{int(tokens):,}", layout.replace(r"\|", "|"), _gib(whole), _gib(above)]
        for tokens, layout, whole, above in rows
    ]
    return tables.table(["tokens", "layout", "everything", "above the inputs"], cells)


def _gib(mebibytes: str) -> str:
    return f"{int(mebibytes) / 1024:.1f} GiB"


def deterministic_cost() -> str:
    """Smallest and largest extra time of a deterministic backward pass, in per cent."""
    head, *rows = _table_with("deterministic")
    costs = []
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        if cells["deterministic"]:
            default = float(cells["shared memory"].partition(",")[0])
            costs.append(100 * (default / float(cells["deterministic"]) - 1))
    return f"{min(costs):.0f} to {max(costs):.0f} %"
