"""Hooks of mkdocs: file names for links into the repository, and a site that works offline."""

import re

from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")
_MARKER = re.compile(r"<!-- [^>]* -->")
_TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`]*`")
_SHIM = "https://unpkg.com/iframe-worker/shim"


class Doctests(Preprocessor, Extension):
    """Examples of docstrings as code: Markdown takes `>>>` for a quotation."""

    def extendMarkdown(self, md) -> None:  # noqa: N802
        """Run before fences of code are found."""
        self.md = md
        md.preprocessors.register(self, "doctests", 28)

    def run(self, lines: list[str]) -> list[str]:
        """Put each block of lines from `>>>` to a blank line between fences."""
        found: list[str] = []
        inside = fenced = False
        for line in lines:
            fenced ^= line.lstrip().startswith("```")
            if not (fenced or inside) and line.startswith(">>> "):
                found.append("```pycon")
                inside = True
            elif inside and not line.strip():
                found.append("```")
                inside = False
            found.append(line)
        return [*found, "```"] if inside else found


def on_config(config, **_: object) -> None:
    """Docstrings are converted with the extensions of the site."""
    config.markdown_extensions.append(Doctests())


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to files outside docs/ become their names; bars in tables are plain.

    The site has no copy of these files, and the repository has no public address. Markers of
    generated texts are removed: at the start of a line they would end the paragraph.
    """
    markdown = _MARKER.sub("", markdown)
    markdown = _OUTSIDE.sub(_name, markdown)
    return _TABLE_ROW.sub(lambda row: _CODE.sub(_unescape, row[0]), markdown)


def _name(link: re.Match[str]) -> str:
    """`[results/x](../results/x)` becomes its code, `[the log](../log.md)` text and code."""
    text, path = link.groups()
    return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"


def _unescape(code: re.Match[str]) -> str:
    """In tables GitHub wants bars of code escaped, Python-Markdown does not."""
    return code[0].replace(r"\|", "|")


def on_post_page(output: str, **_: object) -> str:
    """Search in a site opened as files needs a stand-in for workers: ours, not one of a CDN."""
    return output.replace(_SHIM, "assets/iframe-worker.js")


def on_post_template(output_content: str, **_: object) -> str:
    """The page of errors, too."""
    return output_content.replace(_SHIM, "/assets/iframe-worker.js")
