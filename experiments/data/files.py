"""Disk cache of parsed and generated data sets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments.data.dataset import Examples, Split, Splits
from sparse_flash.kernels.cache import cache_dir, load_or_make
from sparse_flash.masks.files import atomic_write

HUB = "hf:"  # prefix of sources for `hub`
MOST_FILES = 1_000_000  # maximum number of files in a folder
_MANY, _MUCH = 100, 0.01  # number and fraction of shared examples that trigger a warning
_DIGEST = 32  # bytes of the SHA-256 that precedes the data


class DataError(ValueError):
    """Data is missing, damaged, or of another type."""


def cached(
    task: Any,
    sources: tuple[str, ...],
    build: Callable[[], Splits],
    kind: Callable[..., Examples] = Split,
) -> Splits:
    """The result of `build`, cached for this task and the same files.

    task: A dataclass with all settings. sources: Paths of the files, archives or folders that are
    read, with or without "hf:"; empty for generated data. kind: Type of the splits. Concurrent
    processes build once. A truncated or altered cache file is rebuilt. An unusable cache raises a
    warning.
    """
    state = [_stamp(source.removeprefix(HUB)) for source in sources]
    name = type(task).__name__
    key = hashlib.sha256(repr((name, asdict(task), state)).encode()).hexdigest()[:16]
    entry = f"data/{name.lower()}-{key}"

    def make() -> Splits:
        splits = build()
        if sources:
            _warn_of_overlap(splits, str(getattr(task, "source", name)))
        return splits

    def store(splits: Splits) -> Splits:
        _write(cache_dir() / f"{entry}.pt", splits)
        return splits

    return load_or_make(
        entry,
        lambda: _read(cache_dir() / f"{entry}.pt", kind),
        make,
        store,
        "data sets",
        "every run will read or generate its own",
    )


def _stamp(source: str) -> str | None:
    """A fingerprint of a file or of the files in a folder; None if it does not exist."""
    try:
        if not Path(source).is_dir():
            return _digest(Path(source))
    except (OSError, ValueError):
        return None
    digest = hashlib.sha256()
    for path in sorted(walk(source)):
        digest.update(f"{path!r} {_digest(path)}".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def walk(folder: str) -> Iterator[Path]:
    """All files below a folder, without hidden ones; links are followed.

    Raises:
        DataError: There are more than MOST_FILES.
    """
    count, seen = 0, set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += 1 + len(files)
        if count > MOST_FILES:
            raise DataError(
                f"{folder} has more than {MOST_FILES:,} files: give the folder of the data "
                "itself with --task.source"
            )
        yield from (Path(here) / name for name in files if not name.startswith("."))


def _warn_of_overlap(splits: Splits, source: str) -> None:
    """Warn if training examples occur in validation or test data; published sets have up to 0.5 %.

    The examples are kept, as in published results. A larger fraction suggests an accidental copy.
    """
    train, sets = splits.train, {"validate": splits.val, "test": splits.test}
    if not isinstance(train, Split):
        return
    known = set(_rows(train))
    for name, others in sets.items():
        if isinstance(others, Split):
            count = sum(row in known for row in _rows(others))
            if count >= _MANY and count > _MUCH * len(others):
                warnings.warn(
                    f"{source}: {count} of {len(others)} examples to {name} are among those to "
                    "train with; look for copies in the data",
                    stacklevel=5,
                )


def _rows(split: Split) -> Iterator[int]:
    """A hash of each example's tokens."""
    for some in split.tokens.split(1024):
        yield from (hash(row.tobytes()) for row in some.contiguous().numpy())


def _read(path: Path, kind: Callable[..., Examples]) -> Splits | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        warnings.warn(f"{path} was damaged and is rebuilt", stacklevel=6)
        with contextlib.suppress(OSError):
            path.unlink()
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
