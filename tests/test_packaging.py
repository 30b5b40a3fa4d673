"""The folders are what pyproject.toml says; docstring examples run; imports are lazy."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparse_flash

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = SETTINGS["project"]["optional-dependencies"]
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


def name_of(requirement):
    return re.match(r"[A-Za-z0-9-]+", requirement)[0]


def packages_of(extra):
    """Names of the packages that an extra installs, those of the extras in it included."""
    found = set()
    for requirement in EXTRAS[extra]:
        if match := re.match(r"sparse-flash\[(.*)\]", requirement):
            found.update(*(packages_of(name) for name in match[1].split(",")))
        else:
            found.add(name_of(requirement))
    return found


def test_every_dependency_is_pinned():
    pinned = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert {name_of(r) for r in SETTINGS["project"]["dependencies"]} | packages_of("dev") <= pinned


def test_the_core_needs_little():
    core = {name_of(r) for r in SETTINGS["project"]["dependencies"]}
    assert core == {"torch", "numpy", "einops", "nvidia-cutlass-dsl", "apache-tvm-ffi"}


def test_extras():
    from sparse_flash.extras import EXTRA_OF

    named = {"experiments", "plot", "scipy", "hub", "transformers", "baselines"}
    assert packages_of("peers") == packages_of("baselines")
    assert packages_of("all") == set().union(*map(packages_of, named))
    assert packages_of("all") - packages_of("baselines") <= packages_of("dev")
    distributions = {"PIL": "pillow"}
    for module, extra in EXTRA_OF.items():
        assert distributions.get(module, module) in packages_of(extra), module


def test_make_demo_installs_what_it_needs():
    makefile = (ROOT / "Makefile").read_text()
    assert "demo: install\n" in makefile
    assert "-c constraints.txt -e '.[experiments]'" in makefile


def test_dir_shows_public_names_only():
    from sparse_flash import masks

    assert dir(masks) == sorted(masks.__all__)
    assert dir(sparse_flash) == sorted([*sparse_flash.__all__, "__version__"])


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
