"""The code blocks of README and docs/: which ones run, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("console", "text")  # shell input with its output, and drawings
_BLOCK = re.compile(
    r"(?:<!-- pending: (?P<pending>\w+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?[^\n]*\n"
    r"(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    language: Of the fence.
    title: "" where there is none.
    pending: Feature that a block waits for; None where it should run.
    line: Line of the page.
    """

    language: str
    title: str
    pending: str | None
    code: str
    line: int

    @property
    def foreign(self) -> bool:
        """Code of a package that is not installed here: it is parsed, not run."""
        return self.title.endswith("(not run)")

    @property
    def needs_gpu(self) -> bool:
        """Code for a CUDA GPU."""
        return self.title == "needs a GPU"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            match["language"],
            match["title"] or "",
            match["pending"],
            match["code"],
            text[: match.start("code")].count("\n") + 1,
        )
        for match in _BLOCK.finditer(text)
    ]
