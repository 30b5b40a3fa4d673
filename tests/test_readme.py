"""README: short, and its commands work."""

from __future__ import annotations

import re

import sparse_flash
from sparse_flash import cli
from tests.docpages import ROOT, blocks

README = ROOT / "README.md"


def test_at_most_800_words_without_code():
    text = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    assert len(text.split()) <= 800


def test_it_shows_a_mask_and_speeds():
    pictures = re.findall(r"<img src=\"([^\"]+)\"", README.read_text())
    assert len(pictures) >= 2
    assert all((ROOT / picture).exists() for picture in pictures)


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {sparse_flash.__version__}\n" in citation


def test_examples_are_short():
    python = [block.code for block in blocks(README) if block.language == "python"]
    assert [code.count("\n") for code in python] == [12, 11]


def test_a_command_of_the_gallery(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "gallery.md").read_text()
    command = re.search(r"\$ sparse-flash (mask show) (\".*\") (--length.*)", text)
    arguments = [*command[1].split(), command[2].strip('"'), *command[3].split()]
    assert cli.main([a.replace("4096", "1024") for a in arguments]) == 0
    assert (tmp_path / "mask.png").exists()
