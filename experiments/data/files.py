"""Data as it is published (folders, archives, tables), and what was made of it, kept on disk."""

from __future__ import annotations

import fcntl
import hashlib
import io
import lzma
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments.data.dataset import Examples, Split, Splits
from sparse_flash.kernels.cache import cache_dir
from sparse_flash.masks.files import atomic_write

HUB = "hf:"  # before the name of what `hub` reads, be it a folder
_DIGEST = 32  # bytes of a SHA-256, before what it was taken of


class DataError(ValueError):
    """Data is missing, damaged, or not what it should be."""


def members(source: str, where: str) -> Iterator[tuple[str, bytes]]:
    """Path (below the source) and content of each file of a folder or a tar, in order of the paths
    for a folder and as stored for an archive.

    where: Where one gets the data; shown if it is not there.

    Raises:
        DataError: There is nothing, or the archive is damaged or cut off.
    """
    path = Path(source)
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    if not path.exists():
        raise DataError(f"there is no {path}: {where}")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name.removeprefix("./"), content.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(
            f"{path} is no tar archive, or not all of one ({error}): fetch it again; {where}"
        ) from error


def lines(source: str, where: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file.

    Raises:
        DataError: There is no such file, or it is no text.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"there is no {path}: {where}")
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}): {where}") from error


def cached(
    task: Any,
    sources: tuple[str, ...],
    build: Callable[[], Splits],
    kind: Callable[..., Examples] = Split,
) -> Splits:
    """What `build` returns, or what it returned before for this task and these very files.

    task: A dataclass with all settings. kind: What the splits are. Processes that come at the same
    time build once; a file that was cut off or altered is made anew.
    """
    state = [(source, *_stamp(Path(source.removeprefix(HUB)))) for source in sources]
    name = type(task).__name__
    key = hashlib.sha256(repr((name, asdict(task), state)).encode()).hexdigest()[:16]
    path = cache_dir() / "data" / f"{name.lower()}-{key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        splits = _read(path, kind)
        if splits is None:
            splits = build()
            _write(path, splits)
    return splits


def _stamp(path: Path) -> tuple[int, int, int]:
    """Number, size and latest time of the files in a folder, or of a file; zeros without any."""
    found = [p.stat() for p in (path.rglob("*") if path.is_dir() else (path,)) if p.is_file()]
    times = [s.st_mtime_ns for s in found]
    return len(found), sum(s.st_size for s in found), max(times, default=0)


def _read(path: Path, kind: Callable[..., Examples]) -> Splits | None:
    if not path.exists():
        return None
    data = path.read_bytes()
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        warnings.warn(f"{path} was damaged: it is made anew", stacklevel=4)
        return None
    state = torch.load(io.BytesIO(content), weights_only=True)
    parts = {name: kind(*arguments) for name, arguments in state.items()}
    return Splits(parts["train"], parts["val"], parts["test"], first=parts.get("first"))


def _write(path: Path, splits: Splits) -> None:
    content = io.BytesIO()
    parts = {"train": splits.train, "val": splits.val, "test": splits.test, "first": splits.first}
    torch.save({name: part.state() for name, part in parts.items() if part is not None}, content)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())
