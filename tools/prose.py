"""Style of the pages: plain sentences, and the field's words.

    python -m tools.prose             # exit 1 and a line for each finding

Checked are README, CONTRIBUTING and docs/, without code, tables and generated texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
LONGEST = 25  # words of a sentence
# House words, and what to write instead.
WORDS = {
    r"peers?": "baseline",
    r"on the wall": "wall-clock time",
    r"hand(?:s|ed)? over": "publish, pass",
    r"by heart": "overfits",
    r"goes? on where": "resumes",
    r"kinds? of attention is": "an attention is",
    r"what (?:is|was|are|were) (?:held|timed|tested|read|written)": "a noun",
    r"those that": "a noun",
    r"mirrored": "augment",
    r"utilize[sd]?": "use",
    r"very|basically|obviously": "nothing",
}
_SKIPPED = re.compile(
    r"```.*?```|<!-- report: [\w-]+ -->.*?<!-- end -->|<[^>]+>|^\s*\|.*$|^#.*$|^:::.*?(?=^\S|\Z)",
    re.DOTALL | re.MULTILINE,
)
_WORDS = re.compile("|".join(rf"\b(?P<w{i}>{rule})\b" for i, rule in enumerate(WORDS)))


def findings(text: str) -> Iterator[tuple[int, str]]:
    """Line and message of each finding.

    >>> list(findings("The peers run."))
    [(1, "'peers': write baseline")]
    >>> [message for _, message in findings("word " * 26 + "end.")]
    ['a sentence of 27 words']
    """
    text = _SKIPPED.sub(lambda m: re.sub(r"[^\n]", "", m[0]) or " n ", text)
    for match in _WORDS.finditer(text):
        better = [*WORDS.values()][int(match.lastgroup[1:])]  # type: ignore[index]
        yield _line(text, match.start()), f"{match[0]!r}: write {better}"
    for match in re.finditer(r"(?:[^.!?:;\n]|[.:;](?=\S)|\n(?![\n\-\d*]))+", text):
        words = re.findall(r"[\w`'(/|-]+", match[0])
        if len(words) > LONGEST:
            yield _line(text, match.start()), f"a sentence of {len(words)} words"


def _line(text: str, position: int) -> int:
    return text[:position].count("\n") + 1


def main() -> int:
    """Print all findings; returns the exit code."""
    found = [
        f"{page.relative_to(ROOT)}:{line}: {message}"
        for page in PAGES
        for line, message in findings(page.read_text())
    ]
    print("\n".join(found) or f"{len(PAGES)} pages read well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
