"""Style of pages and docstrings: plain sentences, and the field's words.

    python -m tools.prose             # exit 1 and a line for each finding

Pages are README, CONTRIBUTING and docs/, without code, tables and generated texts. Docstrings,
comments and messages of all Python files are checked for words, not for the length of sentences.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FOLDERS = ("masks", "kernels", "sparse_flash", "experiments", "tools", "examples", "tests")
LONGEST = 25  # words of a sentence
_WORDS_OF_A_MESSAGE = 4  # shorter strings are names and keys
_PROSE = {tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT)}
# House words, and what to write instead.
WORDS = {
    r"peers?": "baseline",
    r"on the wall": "wall-clock time",
    r"hand(?:s|ed)? over": "publish, pass",
    r"by heart": "overfits",
    r"goes? on where": "resumes",
    r"kinds? of attention is": "an attention is",
    r"[Ww]hat (?:is|was|are|were|has|have|it|they|a|an|the|one|makes|changes|comes) \w+": "a noun",
    r"[Tt]hose that": "a noun",
    r"(?<!there )(?<!There )(?:is|are) no (?!longer|more|less|need|\w+er\b)\w+": "is not a",
    r"anew|lest|needs not": "again, so that ... not, need not",
    r"(?:one|once|bytes|tokens|[Ee]xamples|[Pp]ixels|steps|[Ii]mages|[Mm]illiseconds) an? "
    r"(?:side|step|stage|tile|row|head|warp|thread|seed|query|image|token|block|batch)": "per",
    r"mirrored": "augment",
    r"utilize[sd]?": "use",
    r"very|basically|obviously": "nothing",
}
_SKIPPED = re.compile(
    r"```.*?```|<!-- report: [\w-]+ -->.*?<!-- end -->|<[^>]+>"
    r"|^\s*\|[^\n]*$|^#[^\n]*$|^:::.*?(?=^\S|\Z)",
    re.DOTALL | re.MULTILINE,
)
_LINK = re.compile(r"\[[^\]\n]*\](?=\()")  # titles of pages
_QUOTED = re.compile(r"^ *(?:>>>|\.\.\.) .*$|`[^`]*`|\"[^\"\n]+\"", re.MULTILINE)
_WORDS = re.compile("|".join(rf"\b(?P<w{i}>{rule})\b" for i, rule in enumerate(WORDS)))


def findings(text: str) -> Iterator[tuple[int, str]]:
    r"""Line and message of each finding.

    >>> list(findings("The peers run."))
    [(1, "'peers': write baseline")]
    >>> [message for _, message in findings("# Title\n\n" + "word " * 26 + "end.")]
    ['a sentence of 27 words']
    """
    text = _SKIPPED.sub(_blank, text)
    for match in _WORDS.finditer(_LINK.sub("", text)):
        better = [*WORDS.values()][int(match.lastgroup[1:])]  # type: ignore[index]
        yield _line(text, match.start()), f"{match[0]!r}: write {better}"
    for match in re.finditer(r"(?:[^.!?:;·\n]|[.:;](?=\S)|\n(?![\n\-\d*]))+", text):
        words = re.findall(r"[\w`'(/|-]+", match[0])
        if len(words) > LONGEST:
            yield _line(text, match.start()), f"a sentence of {len(words)} words"


def _blank(skipped: re.Match[str]) -> str:
    """The line breaks of a skipped part; a number within a sentence, or the end of one."""
    breaks = re.sub(r"[^\n]", "", skipped[0])
    return breaks or (". " if skipped[0].lstrip()[0] in "|#" else " n ")


def code_findings(code: str) -> Iterator[tuple[int, str]]:
    """Line and message of each finding in docstrings, comments and strings of several words.

    >>> list(code_findings("peers = 1  # the peers"))
    [(1, "'peers': write baseline")]
    """
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        text = token.string
        if token.type == tokenize.STRING:
            docstring = text.lstrip("rR").startswith('"""')
            if not docstring and text.count(" ") < _WORDS_OF_A_MESSAGE:
                continue
            text = text.replace('"""', "") if docstring else text.replace('"', "")
        elif token.type not in _PROSE:
            continue
        prose = _QUOTED.sub("", text)
        for match in _WORDS.finditer(prose):
            better = [*WORDS.values()][int(match.lastgroup[1:])]  # type: ignore[index]
            yield token.start[0] + _line(prose, match.start()) - 1, f"{match[0]!r}: write {better}"


def _line(text: str, position: int) -> int:
    return text[:position].count("\n") + 1


def main() -> int:
    """Print all findings; returns the exit code."""
    found = [
        f"{page.relative_to(ROOT)}:{line}: {message}"
        for page in PAGES
        for line, message in findings(page.read_text())
    ]
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found += [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path in files
        if path.name not in ("prose.py", "test_docs.py")  # they quote findings
        for line, message in code_findings(path.read_text())
    ]
    print("\n".join(found) or f"{len(PAGES)} pages and {len(files)} files read well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
