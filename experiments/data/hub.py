"""Data sets of the Hugging Face Hub, or folders that the package `datasets` can read.

The source of a task is then `hf:NAME`, `hf:NAME@REVISION` or `hf:FOLDER`. The package is optional;
it downloads, resumes interrupted downloads, and verifies.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from sparse_flash.experiments.data.files import HUB, DataError
from sparse_flash.experiments.data.source import digest, originals
from sparse_flash.kernels.cache import cache_dir, locked

if TYPE_CHECKING:
    from datasets import DatasetDict

_TABLES = {".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".txt", ".zip", ".tar"}
# Names in use for each split.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "eval"), "test": ("test",)}


def on_hub(source: str) -> bool:
    """Whether a source is the name of a data set, not of a file.

    >>> on_hub("hf:stanfordnlp/imdb"), on_hub("data/aclImdb")
    (True, False)
    """
    return source.startswith(HUB)


class DataSet:
    """A data set by its source.

    where: Advice on where to get the data, for messages.

    Raises:
        DataError: `datasets` is not installed, or cannot read this.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        self.splits = _open(source, where)

    @property
    def names(self) -> list[str]:
        """The available splits among train, val and test."""
        return [name for name, names in SPLITS.items() if any(x in self.splits for x in names)]

    def rows(self, split: str, *columns: str) -> Iterator[list[Any]]:
        """The rows of train, val or test, restricted to these columns.

        columns: Column names; alternatives of different data sets are separated by |.

        Raises:
            DataError: There is no such split or column.
        """
        there = [name for name in SPLITS[split] if name in self.splits]
        if not there:
            has = ", ".join(self.splits)
            raise DataError(f"{self.source} has {has}, and no {SPLITS[split][0]}: {self.where}")
        found = self.splits[there[0]]
        names = []
        for column in columns:
            known = [name for name in column.split("|") if name in found.column_names]
            if not known:
                raise DataError(
                    f"{self.source} has the columns {', '.join(found.column_names)}, and none that "
                    f"is called {column.replace('|', ' or ')}: {self.where}"
                )
            names.append(known[0])
        rows, number = iter(found.select_columns(names)), 0
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # errors of image and table readers about damaged bytes
                raise DataError(
                    f"{self.source}: {split} {number} cannot be read ({error}): {self.where}"
                ) from error
            yield [row[name] for name in names]


def _open(source: str, where: str) -> DatasetDict:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} is read by the package datasets, which is not installed: pip install "
            f"'sparse-flash[hub]', or give files instead; {where}"
        ) from error
    path = source.removeprefix(HUB)
    if not path.strip("@ "):
        raise DataError(f"{source!r} needs the name of a data set after 'hf:'; {where}")
    name, _, revision = path.partition("@")
    try:
        if (Path(path) / "dataset_dict.json").exists():  # written by save_to_disk
            return datasets.DatasetDict.load_from_disk(path)
        if Path(path).exists():
            # `datasets` would cache an old state of a folder.
            with _own_folder() as folder:
                _refuse_copies(path, folder)
                return datasets.load_dataset(path, cache_dir=folder, keep_in_memory=True)
        with locked(lambda: cache_dir() / "hub" / "writable.lock") as problem:
            pass
        if problem is None:
            folder = str(cache_dir() / "hub")
            return datasets.load_dataset(name, revision=revision or None, cache_dir=folder)
        with _own_folder() as folder:  # `files.cached` warns about it
            return datasets.load_dataset(
                name, revision=revision or None, cache_dir=folder, keep_in_memory=True
            )
    except DataError as error:
        raise DataError(f"{error}; {where}") from error
    except Exception as error:  # JSONDecodeError, KeyError, ...: no common base class
        raise DataError(f"{source} cannot be read ({error}): {where}") from error


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary cache folder, where `datasets` runs without file locks if unsupported."""
    import datasets

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with locked(lambda: Path(folder) / "probe.lock") as problem:
            pass
        if problem is not None:  # no other process uses the folder
            unlocked = mock.patch.object(datasets.builder, "FileLock", _no_lock)
            stack.enter_context(unlocked)
        yield folder


def _no_lock(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _refuse_copies(path: str, folder: str) -> None:
    """Raise DataError if `datasets` would read a file twice for one split of a folder.

    Two files are copies by name, or by content: any tables, and images with equal names in folders
    of equal names.
    """
    import datasets

    try:
        files = datasets.load_dataset_builder(path, cache_dir=folder).config.data_files or {}
    except Exception:
        return
    for split, names in files.items():
        paths = [file for file in (Path(str(name)) for name in names) if file.is_file()]
        for copy, original in [*_copies_by_name(paths), *_copies_by_content(paths)]:
            raise DataError(
                f"{path} has a copy among the files for {split}: {copy} repeats {original}, and "
                "its examples would count twice; move one of the two away"
            )


def _copies_by_name(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files named like copies of others beside them, with the original."""
    beside: dict[Path, list[str]] = {}
    for file in paths:
        beside.setdefault(file.parent, []).append(file.name)
    for folder, names in beside.items():
        for name in set(names) - set(originals(names)):
            yield folder / name, "a file of the same name with another suffix"


def _copies_by_content(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files with the content of others, with the original."""
    known: dict[object, str] = {}
    counts = Counter(_likeness(file) for file in paths)
    for file in paths:
        if counts[_likeness(file)] > 1:
            with file.open("rb") as stream:
                key = (_likeness(file), digest(stream))
            if key in known:
                yield file, known[key]
            known[key] = str(file)


def _likeness(file: Path) -> tuple[object, ...]:
    """A key that two copies share."""
    table = file.suffix.lower() in _TABLES
    return (file.stat().st_size, *(() if table else (file.parent.name, file.name)))
