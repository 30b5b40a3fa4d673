"""Loaders of published data, on small data of the releases' form; and all that can be wrong."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from sparse_flash.experiments.data import files
from sparse_flash.experiments.data.dataset import Split, Splits
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.images import CLASSES, Image, coordinates, gray
from sparse_flash.experiments.data.listops import ListOps, evaluate
from sparse_flash.experiments.data.text import Retrieval, Text

from sparse_flash import masks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def archive(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


REVIEWS = {
    f"aclImdb/{split}/{label}/{i}_7.txt": f"a {label} film, {split} {i} ".encode() * 3
    for split in ("train", "test")
    for label in ("pos", "neg")
    for i in range(4)
} | {"aclImdb/README": b"not a review", "aclImdb/train/unsup/0_0.txt": b"no label"}


@pytest.mark.parametrize("form", ["folder", "w", "w:gz", "w:xz"])
def test_text(tmp_path, form):
    if form == "folder":
        source = write(tmp_path, REVIEWS) + "/aclImdb"
    else:
        source = archive(tmp_path / "reviews.tar", REVIEWS, form)
    splits = Text(source, max_length=40, val=3).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (5, 3, 8)
    known = torch.cat([splits.train.tokens, splits.val.tokens])
    assert len(known.unique(dim=0)) == 8  # of which none is in both
    for split, name in ((splits.train, "train"), (splits.val, "train"), (splits.test, "test")):
        for tokens, length, label in zip(split.tokens, split.lengths, split.labels, strict=True):
            content = bytes(tokens[:length].tolist())
            assert content.startswith(b"a pos film, " if label else b"a neg film, ")
            assert name.encode() in content
            assert not tokens[length:].any()
            assert length <= 40


def test_damaged_reviews(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*nowhere: the Large Movie Review"):
        Text(str(tmp_path / "nowhere")).load()
    whole = archive(tmp_path / "whole.tar.gz", REVIEWS)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes((tmp_path / "whole.tar.gz").read_bytes()[:-60])
    with pytest.raises(DataError, match=r"no tar archive, or is truncated .*download it again"):
        Text(str(cut)).load()
    foreign = tmp_path / "foreign.tar.gz"
    foreign.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="no tar archive"):
        Text(str(foreign)).load()
    fewer = {k: v for k, v in REVIEWS.items() if k != "aclImdb/test/pos/3_7.txt"}
    with pytest.raises(DataError, match=r"4 negative and 3 positive reviews to\s+test"):
        Text(archive(tmp_path / "fewer.tar.gz", fewer)).load()
    binary = REVIEWS | {"aclImdb/test/pos/3_7.txt": b"a\0b"}
    with pytest.raises(DataError, match="is not text"):
        Text(archive(tmp_path / "binary.tar.gz", binary)).load()
    with pytest.raises(ValueError, match=r"must leave some: 1\.\.7, got 8"):
        Text(whole, val=8).load()
    Text(whole, val=3).load()


PAIRS = [("1.0", "first text", "second text"), ("0.0", "b'third'", "x" * 50)]


def table(rows):
    return "".join(f"{label}\tid1\tid2\t{one}\t{two}\n" for label, one, two in rows)


def retrieval(folder, **changes):
    tables = dict.fromkeys(("train", "eval", "test"), table(PAIRS)) | changes
    return write(folder, {f"new_aan_pairs.{name}.tsv": rows for name, rows in tables.items()})


def test_retrieval(tmp_path):
    splits = Retrieval(retrieval(tmp_path), max_length=20).load()
    assert splits.train.tokens.shape == (2, 2, 20)
    assert splits.train.lengths.tolist() == [[10, 11], [5, 20]]
    assert splits.train.labels.tolist() == [1, 0]
    assert bytes(splits.val.tokens[1, 0, :5].tolist()) == b"third"


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ("1.0\tid1\tid2\tonly one\n", ", line 1: expected"),
        ("2\ta\tb\tc\td\n", ", row 1: the label is '2'"),
        ("", " is empty"),
    ],
)
def test_damaged_pairs(tmp_path, rows, wrong):
    with pytest.raises(DataError, match=f"new_aan_pairs.eval.tsv{wrong}"):
        Retrieval(retrieval(tmp_path, eval=rows)).load()


def test_missing_pairs(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*new_aan_pairs.train.tsv: Retrieval is in"):
        Retrieval(str(tmp_path)).load()
    (tmp_path / "new_aan_pairs.train.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not text in UTF-8"):
        Retrieval(str(tmp_path)).load()


def test_listops_of_the_release(tmp_path):
    rows = "Source\tTarget\n( ( ( [MAX 4 ) ( ( ( [MIN 9 ) 1 ) ] ) ) ]\t4\n[SM 7 6 ]\t3\n"
    source = write(tmp_path, {f"basic_{name}.tsv": rows for name in ("train", "val", "test")})
    splits = ListOps(source=source, min_length=1, max_length=12).load()
    for split in (splits.train, splits.val, splits.test):
        assert split.labels.tolist() == [4, 3]
        for tokens, length, label in zip(split.tokens, split.lengths, split.labels, strict=True):
            assert evaluate(tokens[:length].tolist()) == label
    with pytest.raises(DataError, match=r"has 7 tokens, more than max_length - 1 = 4"):
        ListOps(source=source, min_length=1, max_length=5).load()
    (tmp_path / "basic_val.tsv").write_text(rows + "[MAX 4 ")
    with pytest.raises(DataError, match="line 4: no ListOps"):
        ListOps(source=source, min_length=1, max_length=12).load()


def pictures(per_class=(3, 2)):
    generator = np.random.default_rng(0)
    for split, count in zip(("train", "test"), per_class, strict=True):
        for label in range(10):
            for i in range(count):
                yield split, label, i, generator.integers(0, 256, (32, 32, 3), np.uint8)


def png(pixels):
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "png")
    return file.getvalue()


def image_folder():
    return {f"{s}/{CLASSES[y]}/{i:04}.png": png(x) for s, y, i, x in pictures()}


def batches():
    """CIFAR-10 as published: colors one after the other, row by row."""
    rows = list(pictures())
    for name, split, part in (("data_batch_1", "train", 0), ("data_batch_2", "train", 1)):
        some = [r for r in rows if r[0] == split][part::2]
        yield f"cifar-10-batches-py/{name}", some
    yield "cifar-10-batches-py/test_batch", [r for r in rows if r[0] == "test"]


def published():
    return {
        name: pickle.dumps(
            {
                b"data": np.stack([x.transpose(2, 0, 1).reshape(-1) for *_, x in some]),
                b"labels": [y for _, y, _, _ in some],
            },
            protocol=2,
        )
        for name, some in batches()
    } | {"cifar-10-batches-py/batches.meta": b"", "cifar-10-batches-py/readme.html": b""}


@pytest.mark.parametrize("contents", [image_folder, published])
def test_images(tmp_path, contents):
    source = archive(tmp_path / "images.tar.gz", contents())
    splits = Image(source, val=10).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (20, 10, 20)
    expected = {(y, gray(x).tobytes()) for split, y, _, x in pictures() if split == "train"}
    both = [splits.train, splits.val]
    found = {
        (int(y), x.numpy().tobytes()) for s in both for x, y in zip(s.tokens, s.labels, strict=True)
    }
    assert found == expected
    assert splits.train.take(torch.tensor([0])).lengths is None


def test_pixels_in_another_order(tmp_path):
    source = write(tmp_path, image_folder())
    raster, morton = Image(source, val=10).load(), Image(source, "morton", val=10).load()
    order = masks.morton(32, 32).permutation
    assert torch.equal(raster.test.tokens[:, order], morton.test.tokens)
    where = coordinates("morton", 32)
    assert torch.equal(where[:, 0] * 32 + where[:, 1], order)


def test_damaged_images(tmp_path):
    contents = image_folder()
    first = next(iter(contents))
    with pytest.raises(DataError, match="is not an image, or is truncated"):
        Image(write(tmp_path / "cut", contents | {first: contents[first][:200]})).load()
    small = png(np.zeros((31, 32, 3), np.uint8))
    with pytest.raises(DataError, match="has 32 x 31 pixels"):
        Image(write(tmp_path / "small", contents | {first: small})).load()
    del contents[first]
    with pytest.raises(DataError, match="images a class to train"):
        Image(write(tmp_path / "fewer", contents)).load()
    with pytest.raises(ValueError, match=r"must leave some: 1..29"):
        Image(write(tmp_path / "all", image_folder()), val=30).load()


class Evil:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps({}), pickle.dumps(Evil())])
def test_a_batch_that_is_none(tmp_path, content, capsys):
    contents = published() | {"cifar-10-batches-py/test_batch": content}
    with pytest.raises(DataError, match="not a batch of CIFAR-10"):
        Image(archive(tmp_path / "x.tar.gz", contents)).load()
    assert "run by" not in capsys.readouterr().out


def made():
    made.calls += 1
    part = Split(torch.arange(6, dtype=torch.uint8).view(2, 3), None, torch.tensor([0, 1]))
    return Splits(part, part, part)


def test_a_cache_is_used_and_mended(tmp_path):
    made.calls = 0
    source = tmp_path / "source"
    source.write_text("one")
    for expected in (1, 1):
        files.cached(Text(str(source)), (str(source),), made)
        assert made.calls == expected
    (entry,) = (tmp_path / "cache" / "data").glob("*.pt")
    for damaged in (entry.read_bytes()[:-5], b"", entry.read_bytes()[:50] + b"x" * 900):
        entry.write_bytes(damaged)
        with pytest.warns(UserWarning, match="was damaged and is rebuilt"):
            splits = files.cached(Text(str(source)), (str(source),), made)
        assert splits.train.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert made.calls == 4
    source.write_text("other")
    files.cached(Text(str(source)), (str(source),), made)
    files.cached(Text(str(source), max_length=7), (str(source),), made)
    assert made.calls == 6


def test_files_changed_in_a_folder_are_read_anew(tmp_path):
    text = Text(write(tmp_path, REVIEWS) + "/aclImdb", max_length=40, val=3)
    before = text.load().test.tokens
    (tmp_path / "aclImdb/test/pos/0_7.txt").write_text("another review")
    assert not torch.equal(text.load().test.tokens, before)


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.cached(Text(), (), interrupted)
    assert not list((tmp_path / "cache" / "data").glob("*.pt"))
    made.calls = 0
    files.cached(Text(), (), made)
    assert made.calls == 1


def _load(source, log):
    text = Text(source, max_length=40, val=3)
    read = Text._read

    def counted(self):
        with Path(log).open("a") as file:
            file.write("x")
        return read(self)

    Text._read = counted
    assert len(text.load().train) == 5


def test_processes_that_come_together_build_once(tmp_path):
    source, log = archive(tmp_path / "reviews.tar", REVIEWS, "w"), tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_load, args=(source, str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:  # for as long as it takes: a test that hangs is stopped from outside
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "x"
