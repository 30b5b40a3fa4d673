"""Hooks of mkdocs: links into the repository, and a site that loads nothing from elsewhere."""

import re

_OUTSIDE = re.compile(r"\]\(\.\./([^)]*)\)")
_TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`]*`")
_SHIM = "https://unpkg.com/iframe-worker/shim"


def on_page_markdown(markdown: str, config, **_: object) -> str:
    """Links to files outside docs/ lead to the repository; bars in tables are plain."""
    markdown = _OUTSIDE.sub(rf"]({config.extra['repository']}/blob/main/\1)", markdown)
    return _TABLE_ROW.sub(lambda row: _CODE.sub(_unescape, row[0]), markdown)


def _unescape(code: re.Match[str]) -> str:
    """In tables GitHub wants bars of code escaped, Python-Markdown does not."""
    return code[0].replace(r"\|", "|")


def on_post_page(output: str, **_: object) -> str:
    """Search in a site opened as files needs a stand-in for workers: ours, not one of a CDN."""
    return output.replace(_SHIM, "assets/iframe-worker.js")


def on_post_template(output_content: str, **_: object) -> str:
    """The page of errors, too."""
    return output_content.replace(_SHIM, "/assets/iframe-worker.js")
