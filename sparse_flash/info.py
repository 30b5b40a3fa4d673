"""`sparse-flash info`: versions, GPU, which implementation runs, caches, extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

import sparse_flash
from sparse_flash.call import AttentionCall
from sparse_flash.implementations.choose import IMPLEMENTATIONS
from sparse_flash.kernels import dsl_unsupported_reason
from sparse_flash.kernels.cache import CACHE_VARIABLE, cache_dir
from sparse_flash.kernels.dsl import DSL_PACKAGE
from sparse_flash.masks import full

PROJECT = "sparse-flash"
_INTERNAL = ("all", "dev", "docs")  # extras that bring no feature of their own
_HEAD_DIM = 64


def version() -> str:
    """The version of sparse_flash.

    >>> version() == sparse_flash.__version__
    True
    """
    return sparse_flash.__version__


def info() -> None:
    """Show versions, GPUs, the implementation that would run, caches, extras."""
    print(report())


def report() -> str:
    """The text of `sparse-flash info`: a section a topic, a line a fact."""
    sections = {
        "versions": versions(),
        "GPU": gpus(),
        f"implementations, for bfloat16 and head_dim {_HEAD_DIM} on {_device().type}": (
            implementations()
        ),
        "cache": caches(),
        "extras": extras(),
    }
    return "\n\n".join("\n".join(_section(*section)) for section in sections.items())


def _section(title: str, facts: Mapping[str, str]) -> Iterator[str]:
    yield title
    width = max(map(len, facts), default=0)
    for name, fact in facts.items():
        yield f"  {name.ljust(width)}  {fact}"


def versions() -> dict[str, str]:
    """Versions of the packages that attention depends on."""
    return {
        "sparse_flash": f"{version()}, {Path(sparse_flash.__file__).parent}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda or "none: this build of torch has no CUDA",
        "CuTe DSL": dsl_unsupported_reason() or importlib.metadata.version(DSL_PACKAGE),
    }


def gpus() -> dict[str, str]:
    """Name, compute capability and memory of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return {"none": "torch sees no CUDA GPU; everything runs on the CPU, without kernels"}
    found = {}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors"
        )
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def implementations() -> dict[str, str]:
    """Which implementation `impl="auto"` takes for a usual call here, and why not the others."""
    q = torch.zeros(1, 1, 1, _HEAD_DIM, dtype=torch.bfloat16, device=_device())
    layout = full().layout(1, device=q.device)
    call = AttentionCall(q, q, q, None, None, None, layout, None, 1.0, False, False)
    found, chosen = {}, False
    for implementation in IMPLEMENTATIONS:  # best first
        reason = implementation.unsupported_reason(call)
        if reason is None:
            reason = "can run it too" if chosen else 'runs: impl="auto" takes it'
            chosen = True
        else:
            reason = f"cannot run: {reason}"
        found[implementation.name] = reason
    return found


def caches() -> dict[str, str]:
    """The cache folder, and the number and size of its files."""
    try:
        folder = cache_dir()
    except OSError as error:
        return {"folder": f"none: {error}; set {CACHE_VARIABLE}"}
    where = next(path for path in (folder, *folder.parents) if path.exists())
    if not (where.is_dir() and os.access(where, os.W_OK)):
        note = f"it cannot be written: nothing is kept; {CACHE_VARIABLE} chooses another"
        return {"folder": f"{folder}: {note}"}
    return {
        "folder": f"{folder} ({CACHE_VARIABLE} moves it)",
        "compiled kernels": f"{_size(folder.glob('*.so'))} (sparse-flash compile builds more)",
        "data sets": _size((folder / "data").glob("*.pt")),
    }


def _size(files: Iterable[Path]) -> str:
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"


def extras() -> dict[str, str]:
    """Whether the packages of each extra are installed, or the line that installs them."""
    try:
        requirements = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return {"none": f"{PROJECT} is not installed: it runs from its sources"}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra *== *['\"]([\w.-]+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra is None or name is None or extra[1] in _INTERNAL or name[0] == PROJECT:
            continue
        absent = missing.setdefault(extra[1], [])
        if not _installed(name[0]):
            absent.append(name[0])
    return {
        extra: f"misses {', '.join(absent)}: pip install '{PROJECT}[{extra}]'"
        if absent
        else "installed"
        for extra, absent in missing.items()
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
