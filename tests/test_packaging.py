"""The folders are what pyproject.toml says; docstring examples run; imports are lazy."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparse_flash

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"sparse_flash": "sparse_flash"} | {
    name: f"sparse_flash.{name}" for name in ("masks", "kernels", "experiments")
}


def modules():
    names = ["sparse_flash"]
    for root in FOLDERS.values():
        package = importlib.import_module(root)
        names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{root}.")]
    return sorted(set(names))


def test_declared_packages_are_the_folders():
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
        holding = {p.parent for p in (ROOT / folder).rglob("*.py")}
        assert all((h / "__init__.py").exists() for h in holding)
    assert found == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_version_is_one():
    assert sparse_flash.__version__ == SETTINGS["project"]["version"]


def test_every_dependency_is_pinned():
    import re

    def name(requirement):
        return re.match(r"[A-Za-z0-9-]+", requirement)[0]

    pinned = {
        name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    project = SETTINGS["project"]
    needed = {name(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert needed <= pinned


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_heavy_packages_are_imported_lazily():
    script = (
        "import sys, sparse_flash; from sparse_flash import masks; masks.causal().layout(256);"
        "heavy = ('cutlass', 'matplotlib', 'tensorboard', 'tyro', 'scipy');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_pattern_tells_formula_density_and_reach():
    from sparse_flash.masks import patterns

    data = {"from_dense", "custom", "from_blocks", "from_scipy"}
    for name in patterns.__all__:
        text = getattr(patterns, name).__doc__
        if name not in data:
            assert "density" in text.lower(), name
            assert "reach" in text.lower(), name
            assert "Source:" in text or name in {"causal", "full"}, name
        if isinstance(getattr(patterns, name), type):
            assert "allowed(q, kv) =" in text, name
