"""Data sets of the Hugging Face Hub, or folders in a form that the package `datasets` reads.

They go by `hf:NAME`, `hf:NAME@REVISION` or `hf:FOLDER` in place of a task's source. The package is
optional; it downloads, goes on where a download was interrupted, and verifies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_flash.experiments.data.files import HUB, DataError
from sparse_flash.kernels.cache import cache_dir

if TYPE_CHECKING:
    from datasets import DatasetDict

# A split by any of the names that are in use for it.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "eval"), "test": ("test",)}


def on_hub(source: str) -> bool:
    """Whether this is the name of a data set, not of a file.

    >>> on_hub("hf:stanfordnlp/imdb"), on_hub("data/aclImdb")
    (True, False)
    """
    return source.startswith(HUB)


class DataSet:
    """A data set by its source.

    where: Where one gets the data; shown if it is not there.

    Raises:
        DataError: `datasets` is not installed, or cannot read this.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        self.splits = _open(source, where)

    @property
    def names(self) -> list[str]:
        """Which of train, val and test there are."""
        return [name for name, names in SPLITS.items() if any(x in self.splits for x in names)]

    def rows(self, split: str, *columns: str) -> Iterator[list[Any]]:
        """The rows of train, val or test, of each the columns of these names.

        columns: Where a name differs from one data set to the next, all that are in use, with |
            between them.

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
        for row in found.select_columns(names):
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
    try:
        if (Path(path) / "dataset_dict.json").exists():  # what save_to_disk has written
            return datasets.DatasetDict.load_from_disk(path)
        if Path(path).exists():
            # Of a folder `datasets` would keep what it once was.
            with tempfile.TemporaryDirectory() as folder:
                return datasets.load_dataset(path, cache_dir=folder, keep_in_memory=True)
        name, _, revision = path.partition("@")
        folder = str(cache_dir() / "hub")
        return datasets.load_dataset(name, revision=revision or None, cache_dir=folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be read ({error}): {where}") from error
