"""What the pages in docs/ show was recorded, and what they point to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert links
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


def test_the_lra_table_is_a_recorded_result():
    recorded = (ROOT / "experiments" / "results" / "lra-h200" / "lra.md").read_text().splitlines()
    page = (ROOT / "docs" / "lra.md").read_text().splitlines()
    table = [line for line in page if line.startswith("|")]
    assert len(table) >= 5
    assert table == recorded[2 : 2 + len(table)]
