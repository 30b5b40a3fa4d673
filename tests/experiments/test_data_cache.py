"""The cache of data: read again if nothing has changed; without it, data are made again."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments.data import files
from sparse_flash.experiments.data.dataset import Split, Splits
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Text

from tests.experiments.published import (
    REVIEWS,
    TASKS,
    contents_of,
    counts,
    every_task,
    write,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


def test_examples_in_two_splits_are_told(tmp_path):
    """They are kept, for published data has some; but a warning says how many."""
    rows = torch.arange(400, dtype=torch.int64).view(-1, 1).expand(-1, 2)
    tokens = torch.stack([rows[:, 0] // 256, rows[:, 1] % 256], 1).to(torch.uint8)
    labels = torch.zeros(400, dtype=torch.int64)

    def splits(overlap):
        test = torch.arange(200 - overlap, 400 - overlap)
        whole = Split(tokens, None, labels)
        return Splits(whole.subset(torch.arange(200)), whole.subset(test), whole.subset(test))

    with pytest.warns(UserWarning, match="among those to train with") as told:
        found = files.cached(Text(str(tmp_path)), (str(tmp_path),), lambda: splits(150))
    assert [str(w.message) for w in told] == [
        f"{tmp_path}: 150 of 200 examples to {split} are among those to train with; look for "
        "copies in the data"
        for split in ("validate", "test")
    ]
    assert len(found.test) == 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.cached(Text(str(tmp_path), max_length=9), (str(tmp_path),), lambda: splits(1))


def fails(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@every_task
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, name, code, monkeypatch):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "data", contents)
    monkeypatch.setattr(fcntl, "flock", fails(code))
    with pytest.warns(UserWarning, match="cannot be locked .*set SPARSE_FLASH_CACHE_DIR") as told:
        assert counts(task(folder)) == expected
    assert len(told) == 1
    with warnings.catch_warnings():  # a cached entry is read without a lock
        warnings.simplefilter("error")
        assert counts(task(folder)) == expected


def cannot_be_written(name, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    if name == "missing":
        monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", "/proc/nowhere")
    elif name == "a file":
        folder.write_text("in the way")
    elif name == "full":
        monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    elif name == "read-only":
        folder.mkdir(exist_ok=True)
        plain = Path.open

        def read_only(self, mode="r", *args, **kwargs):
            if folder in self.parents and "w" in mode:
                fails(errno.EROFS)()
            return plain(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", read_only)
        monkeypatch.setattr("tempfile.mkstemp", fails(errno.EROFS))
    else:
        monkeypatch.delenv("SPARSE_FLASH_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def nobody(*_):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nobody)


@every_task
@pytest.mark.parametrize("trouble", ["missing", "a file", "full", "read-only", "no home"])
def test_a_cache_that_cannot_be_written(tmp_path, name, trouble, monkeypatch):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "data", contents)
    cannot_be_written(trouble, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="cannot be kept .*set SPARSE_FLASH_CACHE_DIR") as told:
        assert counts(task(folder)) == expected
    assert len(told) == 1


@pytest.mark.parametrize("trouble", ["locks", "missing", "full"])
def test_generated_data_without_a_cache(tmp_path, trouble, monkeypatch):
    if trouble == "locks":
        monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    else:
        cannot_be_written(trouble, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="SPARSE_FLASH_CACHE_DIR") as told:
        assert counts(Pathfinder(32, train=8, val=4, test=4, contour=6)) == (8, 4, 4)
    assert len(told) == 1


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", REVIEWS)
    Text(str(folder), val=3).load()
    cannot_be_written("read-only", tmp_path, monkeypatch)
    monkeypatch.setattr(Text, "_read", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counts(Text(str(folder), val=3)) == (5, 3, 8)


def test_a_file_that_changes_without_growing_is_read_anew(tmp_path):
    """Two files that change places leave number, sizes and latest time as they were."""
    folder = write(tmp_path / "data", REVIEWS)
    before = contents_of(Text(str(folder), val=3))
    one, two = (folder / f"aclImdb/test/{label}/0_7.txt" for label in ("pos", "neg"))
    os.utime(one, ns=(1, 1))
    assert contents_of(Text(str(folder), val=3)) == before
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    assert contents_of(Text(str(folder), val=3)) != before
