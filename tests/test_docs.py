"""Pages: every block of code runs, links lead somewhere, claims are generated from results."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sparse_flash.experiments.data.listops import OPERATORS, ListOps, generate

from sparse_flash import cli
from tests.docpages import PAGES, ROOT, SHELL, blocks
from tools import backward_log, figures, gallery, prose, report, tables

SPLITS = ("train", "val", "test")


def by_name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """One namespace a page: later blocks use names of earlier ones, and import its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(page, tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language != "python":
            assert block.language in SHELL, f"{page.name}:{block.line}: {block.language!r}"
            continue
        filled = "\n" * block.line + block.code  # tracebacks show the page's line
        code = compile(filled, str(page), "exec", dont_inherit=True)
        if block.pending or block.foreign or (block.needs_gpu and not torch.cuda.is_available()):
            continue
        exec(code, names)


def write_files(page: Path, folder: Path) -> None:
    """Blocks whose title is the name of a Python file."""
    for block in blocks(page):
        if block.title.endswith(".py"):
            (folder / block.title).write_text(block.code)


def test_the_day_shows_real_output(tmp_path, monkeypatch, capsys):
    """`mask show` prints the output on the page, to the character."""
    page = ROOT / "docs" / "day.md"
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    shown = [b.code for b in blocks(page) if b.code.startswith("$ sparse-flash mask show")]
    assert len(shown) == 2
    for code in shown:
        command, _, output = code.partition("\n")
        assert cli.main(shlex.split(command.removeprefix("$ sparse-flash "))) == 0
        assert capsys.readouterr().out.strip() == output.strip()


def test_no_block_is_overlooked():
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), page.name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and not anchor.startswith("only-"):
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_regenerating_changes_no_page(page):
    assert report.regenerated(page.read_text()) == page.read_text(), "run python -m tools.report"


def test_regenerating_changes_no_figure():
    for path, data in figures.FIGURES.items():
        assert figures.stored_data(path) == data(), f"{path.name}: run python -m tools.report"


def test_pages_use_every_generated_text():
    used = set(re.findall(r"<!-- report: ([\w-]+) -->", "".join(p.read_text() for p in PAGES)))
    assert used == set(report.TEXTS)


def test_a_changed_number_is_noticed():
    text = "x <!-- report: demo-speed -->9.99<!-- end --> y"
    assert report.regenerated(text) != text
    with pytest.raises(KeyError, match="nothing"):
        report.regenerated("<!-- report: nothing --><!-- end -->")


def test_the_gallery_has_every_pattern():
    from sparse_flash.masks import patterns

    shown = {name for names in gallery.GROUPS.values() for name in names}
    assert shown == set(gallery.EXAMPLES)
    text = (ROOT / "docs" / "gallery.md").read_text()
    for name in patterns.__all__:
        assert f"`{name}`" in text or f"`{name}(" in text, name
    for name in shown:
        source = gallery.describe(name)["source"]
        assert source != "common" or name in ("full", "causal"), name


@pytest.mark.parametrize("name", sorted(gallery.EXAMPLES))
def test_a_picture_shows_its_mask(name):
    """Index 2 is an allowed element, 1 the rest of a stored tile."""
    path = gallery.PICTURES / f"{name}.png"
    assert figures.stored_data(path) == gallery.picture_data(name)
    with Image.open(path) as image:
        shown = torch.from_numpy(np.array(image)[:: gallery.SCALE, :: gallery.SCALE])
    layout = gallery.layout_of_picture(name)
    assert torch.equal(shown == 2, layout.to_dense())
    assert int((shown > 0).sum()) == layout.num_tiles * gallery.PICTURE_BLOCK**2


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in config, page.name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocstrings_handlers")
    out = tmp_path_factory.mktemp("site")
    subprocess.run(["make", "-s", "-o", "install-dev", "sources"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out


def test_site_asks_for_nothing_outside(site):
    """Fonts, scripts and styles of the site lie in its folder."""
    for page in site.glob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]*)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*https?:[^>]*", text)
        assert not loaded, (page.name, loaded)
        assert r"\|" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL), page.name


def test_site_renders_paragraphs_and_lists(site):
    """Markers of generated texts do not end a paragraph, and a list is not part of one."""
    for page in site.glob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert "<!-- report" not in text, page.name
        assert "<blockquote>" not in text, f"{page.name}: an example is shown as a quotation"
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
            assert not re.search(r"^(?:-|\d+\.) ", paragraph, re.MULTILINE), paragraph[:200]


def test_site_links_lead_to_anchors(site):
    """Links between pages, and to headings, as the browser follows them."""
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    known = {name: set(re.findall(r"\bid=\"?([^\s\">]+)", text)) for name, text in pages.items()}
    for name, text in pages.items():
        for link in re.findall(r"<a[^>]*\shref=\"?([^\s\">]+)", text):
            page, _, anchor = link.partition("#")
            if name == "404.html" or "://" in link or not (page or anchor):
                continue
            target = page or name
            assert (site / target).exists(), (name, link)
            if anchor and target in known:
                assert anchor in known[target], (name, link)


def test_site_search_finds_ten_questions(site):
    """One search finds the answer; one click more leads to the page that says more, if any."""
    text = (ROOT / "docs" / "faq.md").read_text().partition("## Limits")[0]
    questions = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert len(questions) == 10
    assert sum("](" in question for question in questions) >= 8
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["title"]: entry["location"] for entry in index}
    anchors_ = set(re.findall(r"\bid=\"?([^\s\">]+)", (site / "faq.html").read_text()))
    for question in questions:
        title = question.partition("\n")[0]
        assert title.endswith("?")
        page, _, anchor = found[title].partition("#")
        assert page == "faq.html", title
        assert anchor in anchors_, title


def test_no_address_is_made_up():
    """The repository has no public address: no page or package metadata names one."""
    files = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml")
    for path in (*PAGES, *(ROOT / name for name in files)):
        assert "/sparse-flash/" not in path.read_text(), path.name


def commands() -> list[list[str]]:
    """Words of the `sparse-flash` commands on all pages; those of a user's own files excepted."""
    text = "\n".join(b.code for p in PAGES for b in blocks(p) if b.language == "console")
    lines = re.findall(r"sparse-flash (.*)", text.replace("\\\n", " "))
    words = [shlex.split(line, comments=True) for line in lines]
    return [given for given in words if given and not any(".py:" in word for word in given)]


def test_commands_and_their_options_exist(capsys):
    """The names before the first option are a command, and its help has all options."""
    asked: dict[tuple[str, ...], set[str]] = {}
    for given in commands():
        names = [*itertools.takewhile(lambda word: re.fullmatch(r"[a-z0-9-]+", word), given)]
        names = [*itertools.takewhile(lambda word: not word.startswith("--"), names)]
        options = {word for word in given if word.startswith("--")}
        asked.setdefault(tuple(names), set()).update(options)
    assert len(asked) >= 8
    for names, options in asked.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*names, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code in (0, None), names
        for option in options:
            # `--train.no-graph` is shown with its opposite.
            assert option.replace("no-", "") in shown.replace("no-", ""), (names, option)


def test_what_listops_outermost_operator_tells():
    """The first training examples agree with the record."""
    recorded = ROOT / "results" / "listops-operators.json"
    record = json.loads(recorded.read_text())
    rate = {name: record[name]["right"] / record[name]["examples"] for name in SPLITS}
    few = generate(ListOps(train=3000, val=1, test=1)).train
    guess = {11 + i: record["guess"][name] for i, name in enumerate(OPERATORS)}
    roots, labels = few.tokens[:, 0], few.labels
    for root, value in guess.items():
        counts = labels[roots == root].bincount(minlength=10)
        assert counts[value] >= 0.85 * counts.max()
    right = sum((labels[roots == root] == value).sum().item() for root, value in guess.items())
    assert abs(right / len(few) - rate["train"]) < 3 * (rate["train"] / len(few)) ** 0.5


def test_blocks_are_python_or_shell():
    """A block that is parsed, not run, has a title that says so."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.code)


def test_prose_is_checked_below_headings_and_tables():
    page = (
        "# Title\n\n| a | b |\n\nThe peers run.\n\n```text\nThe peers run.\n```\n\nIt is no mask."
    )
    assert [line for line, _ in prose.findings(page)] == [5, 11]
    code = '"""What is held."""  # one a tile, anew\n'
    assert len(list(prose.code_findings(code))) == 3
    assert not list(prose.findings("There is no mask. It is no longer used, and no faster."))


def test_findings_quote_the_log():
    """Each adopted change and dead end of the backward has its figures in the recorded log."""
    log = " ".join(backward_log.LOG.read_text().split())
    found = tables.read(backward_log.FINDINGS)
    for finding in (*found["changes"], *found["dead_ends"]):
        assert " ".join(finding["quote"].split()) in log, finding
        figures_ = [str(finding[name]) for name in ("before", "after") if name in finding]
        assert all(figure in finding["quote"] for figure in figures_), finding
