"""What the pages in docs/ show was recorded, and what they point to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sparse_flash.experiments.data.listops import OPERATORS, ListOps, generate

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "val", "test")
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


def test_pathfinders_second_seed_was_recorded():
    runs = ROOT / "experiments" / "results" / "lra-h200" / "pathfinder"
    page = " ".join((ROOT / "docs" / "lra.md").read_text().split())
    sdpa, dense = (
        json.loads((runs / f"{name}-seed1" / "result.json").read_text())["metrics"]["test_accuracy"]
        for name in ("sdpa", "dense")
    )
    reached = f"SDPA reaches {100 * sdpa:.1f} % and ours dense {100 * dense:.1f} %"
    assert f"with another seed {reached}" in page


def test_what_listops_outermost_operator_tells():
    """The page shows the record, and the first training examples agree with it."""
    record = json.loads((ROOT / "experiments" / "results" / "listops-operators.json").read_text())
    page = " ".join((ROOT / "docs" / "lra.md").read_text().split())
    rate = {name: record[name]["right"] / record[name]["examples"] for name in SPLITS}
    train, val, test = (f"{rate[name]:.1%}".replace("%", " %") for name in SPLITS)
    assert f"{train} of the training examples, {val} of those" in page
    assert f"{test} of the test examples" in page
    few = generate(ListOps(train=3000, val=1, test=1)).train
    guess = {11 + i: record["guess"][name] for i, name in enumerate(OPERATORS)}
    roots, labels = few.tokens[:, 0], few.labels
    for root, value in guess.items():
        counts = labels[roots == root].bincount(minlength=10)
        assert counts[value] >= 0.85 * counts.max()
    right = sum((labels[roots == root] == value).sum().item() for root, value in guess.items())
    assert abs(right / len(few) - rate["train"]) < 3 * (rate["train"] / len(few)) ** 0.5


def test_what_path_256_learns_of_shorter_curves_was_recorded():
    page = " ".join((ROOT / "docs" / "pathfinder.md").read_text().split())
    recorded = ROOT / "experiments" / "results" / "path-h200" / "path-256-seed0" / "result.json"
    curve = {row[0]: row[2] for row in json.loads(recorded.read_text())["training_curve"]}
    first, fourth, fifth = (f"{curve[step]:.0%}".replace("%", " %") for step in (1000, 4000, 5000))
    assert f"it is right in {first} of them in the first 1,000 steps, in {fourth} from" in page
    assert f"step 3,000 to 4,000 and in {fifth} from step 4,000 to 5,000" in page


def test_the_pathfinder_table_is_of_recorded_runs():
    recorded = ROOT / "experiments" / "results" / "path-h200"
    page = (ROOT / "docs" / "pathfinder.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page if line[:1] == "|"]
    shown = {row[0]: row[1:] for row in rows[2:]}
    assert set(shown) == {path.parent.name for path in recorded.glob("*/result.json")}
    for name, row in shown.items():
        result = json.loads((recorded / name / "result.json").read_text())
        metrics = result["metrics"]
        assert row == [
            f"{result['config']['task']['size'] ** 2}",
            f"{metrics['steps']}",
            f"{metrics['training_seconds']:.0f}",
            f"{metrics['examples_per_second']:.0f}",
            f"{100 * metrics['test_accuracy']:.1f}",
        ]
