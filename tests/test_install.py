"""Installations: the core alone, one checkout, and the wheel in a fresh environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import sparse_flash

ROOT = Path(__file__).parent.parent


def python(script, *arguments, cwd, executable=sys.executable, **variables):
    return subprocess.run(
        [executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | variables, check=False,
    )  # fmt: skip


# As in an environment with the dependencies of the core alone.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

OPTIONAL = {"PIL", "datasets", "matplotlib", "numba", "scipy", "tensorboard", "tqdm",
            "transformers", "tyro"}

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in OPTIONAL:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Core

import torch
from sparse_flash import __main__ as command
from sparse_flash import extras, masks
from sparse_flash.nn import SelfAttention

assert set(extras.EXTRA_OF) == OPTIONAL
mask = masks.local(8) | masks.sinks(2)
SelfAttention(32, 2, mask=mask)(torch.randn(1, 64, 32)).sum().backward()
mask.text(64)

def message(call):
    try:
        call()
    except ImportError as error:
        print(error)

message(lambda: mask.plot(64))
message(lambda: mask.layout(64).to_scipy())
message(lambda: __import__("sparse_flash.integrations.transformers"))
message(lambda: __import__("sparse_flash.experiments.train"))
print(command.main(["mask", "show", "causal()"]))
"""


def test_without_extras_the_core_works_and_the_rest_says_what_to_install(tmp_path):
    done = python(WITHOUT_EXTRAS, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "matplotlib is not installed: pip install 'sparse-flash[plot]'",
        "scipy is not installed: pip install 'sparse-flash[scipy]'",
        "transformers is not installed: pip install 'sparse-flash[transformers]'",
        "matplotlib is not installed: pip install 'sparse-flash[experiments]'",
        "1",
    ], done.stderr
    line = r"sparse-flash: \w+ is not installed: pip install 'sparse-flash\[experiments\]'\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_a_checkouts_root_does_not_mix_two_installs(tmp_path):
    """Python finds the folder sparse_flash there first, but not the folders beside it."""
    shutil.copytree(ROOT / "sparse_flash", tmp_path / "sparse_flash")
    done = python("import sparse_flash", cwd=tmp_path)
    assert done.returncode == 1
    assert "two installs would be mixed" in done.stderr
    assert f"pip install -e {tmp_path}" in done.stderr


BUILD = """
import sys
from setuptools import build_meta

print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
WHERE = """
import importlib.metadata, importlib.util

version = importlib.metadata.version("sparse-flash")
print(importlib.util.find_spec("sparse_flash").origin, version)
"""


def build(kind, source, folder):
    done = python(BUILD, kind, folder, cwd=source)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def modules_below(folder):
    """Python files of the package, as paths below sparse_flash."""
    parts = {
        "sparse_flash": "",
        "masks": "masks",
        "kernels": "kernels",
        "experiments": "experiments",
    }
    return {
        str(Path(inner) / path.relative_to(folder / part))
        for part, inner in parts.items()
        for path in (folder / part).rglob("*.py")
    }


def test_the_wheel_of_the_source_distribution_trains_in_a_fresh_environment(tmp_path):
    unwanted = shutil.ignore_patterns(".*", "results", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=unwanted)
    archive = build("build_sdist", tmp_path / "checkout", tmp_path)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert modules_below(source) == modules_below(ROOT)
    assert not [path for path in source.rglob("*.py") if "tests" in path.parts], (
        "not a part of them"
    )
    wheel = build("build_wheel", source, tmp_path)

    fresh = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    install = [
        "--python",
        fresh / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    subprocess.run([sys.executable, "-m", "pip", *install, wheel], check=True)
    (packages,) = (fresh / "lib").glob("python*/site-packages")
    # The development packages are visible; their own .pth files, with this checkout, are not read.
    others = [path for path in sys.path if "site-packages" in path]
    (packages / "others.pth").write_text("\n".join(others))

    where, version = python(WHERE, cwd=tmp_path, executable=fresh / "bin" / "python").stdout.split()
    assert Path(where).is_relative_to(fresh)
    assert version == sparse_flash.__version__
    sizes = "--task.train 40 --task.val 4 --task.test 4 --task.min-length 8 --task.max-length 32 "
    sizes += "--train.batch-size 2 --train.steps 1 --model.layers 1"
    command = [fresh / "bin" / "sparse-flash", "train", "listops-short", *sizes.split()]
    command += ["--device", "cpu", "--out", tmp_path / "run"]
    cache = {"SPARSE_FLASH_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | cache, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout
