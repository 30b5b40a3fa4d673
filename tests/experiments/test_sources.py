"""Where data is read from: one data root, links, archives, stray files, damage."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sparse_flash.experiments.data import files, source
from sparse_flash.experiments.data.archives import open_source
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Text

from tests.experiments.published import (
    CURVES,
    LISTOPS,
    LISTS,
    METADATA,
    PAIRS,
    RETRIEVAL,
    REVIEWS,
    TASKS,
    batch,
    contents_of,
    counts,
    every_task,
    first_folder,
    pack,
    png,
    write,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


@every_task
def test_a_copy_further_down_is_not_read(tmp_path, name):
    contents, task, expected = TASKS[name]
    write(tmp_path / "data", contents)
    write(tmp_path / "data/backup", contents)
    write(tmp_path / "data" / first_folder(contents) / "old", contents)
    assert counts(task(tmp_path / "data")) == expected
    assert counts(task(tmp_path / "data" / first_folder(contents))) == expected


@every_task
def test_copies_side_by_side_are_one_or_refused(tmp_path, name):
    contents, task, expected = TASKS[name]
    for place in ("a", "b"):
        write(tmp_path / "data" / place, contents)
    assert counts(task(tmp_path / "data")) == expected
    last = max((tmp_path / "data/b").rglob("*.*" if name != "batches" else "*batch*"))
    last.write_bytes(last.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"more than once, and not alike: .*/a/.*/b/.*task.source"):
        task(tmp_path / "data").load()
    shutil.rmtree(tmp_path / "data/b")
    assert counts(task(tmp_path / "data")) == expected


@every_task
@pytest.mark.parametrize("form", ["w", "w:gz", "w:xz", "w:bz2", "zip"])
def test_archives_hold_what_folders_do(tmp_path, name, form):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "data", contents)
    packed = pack(tmp_path / "packed", contents, form)
    assert counts(task(packed)) == expected
    if form == "w":  # in the order of the folder, so that all splits are the same
        ordered = dict(sorted(contents.items()))
        packed = pack(tmp_path / "ordered", ordered, form)
        if name != "pathfinder":  # in the order of its metadata
            assert contents_of(task(packed)) == contents_of(task(folder))
    twice = contents | {f"backup/{path}": content for path, content in contents.items()}
    assert counts(task(pack(tmp_path / "twice", twice, form))) == expected


@every_task
@pytest.mark.parametrize("symbolic", [False, True])
def test_links_in_archives(tmp_path, name, symbolic):
    """Each file is stored elsewhere and its own name is a link; likewise a whole folder."""
    contents, task, expected = TASKS[name]
    linked: dict[str, bytes | str] = {f"blobs/{i}": x for i, x in enumerate(contents.values())}
    for i, path in enumerate(contents):
        up = "../" * path.count("/")
        linked[path] = f"->{up}blobs/{i}" if symbolic else f"blobs/{i}"
    assert contents_of(task(pack(tmp_path / "linked", linked))) == contents_of(
        task(pack(tmp_path / "plain", contents))
    )
    moved: dict[str, bytes | str] = {f"store/{path}": x for path, x in contents.items()}
    moved["data"] = f"->store/{first_folder(contents)}"
    assert counts(task(pack(tmp_path / "moved", {"data/x": b"", **moved} | moved))) == expected
    broken = contents | {next(iter(contents)): "nowhere"}
    with pytest.raises(DataError, match=r"there is no .*\(a link to nowhere\) in it"):
        task(pack(tmp_path / "broken", broken)).load()
    circle = contents | {next(iter(contents)): next(iter(contents))}
    with pytest.raises(DataError, match="is a link to itself"):
        task(pack(tmp_path / "circle", circle)).load()


def test_a_file_stored_twice_in_an_archive_counts_once(tmp_path):
    path = pack(tmp_path / "data.tar", REVIEWS, "w")
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("./aclImdb/test/pos/0_7.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"newer"))
    splits = Text(str(path), val=3).load()
    assert len(splits.test) == 8
    assert b"newer" in {bytes(x[:5].tolist()) for x in splits.test.tokens}


@every_task
def test_links_in_folders(tmp_path, name):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "store", contents) / first_folder(contents)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(folder)
    (tmp_path / "data/again").symlink_to(folder)  # the same folder, not a copy
    (tmp_path / "data/circle").symlink_to(tmp_path / "data")
    (tmp_path / "data/nothing").symlink_to(tmp_path / "gone")
    assert counts(task(tmp_path / "data")) == expected
    wanted = tmp_path / "store" / next(iter(contents))
    wanted.rename(tmp_path / "elsewhere")
    wanted.symlink_to(tmp_path / "elsewhere")
    assert counts(task(tmp_path / "data")) == expected
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(DataError, match="there is no .*a link to nothing"):
        task(tmp_path / "data").load()
    wanted.unlink()
    os.mkfifo(wanted)  # to be read, somebody would have to write
    with pytest.raises(DataError, match="is not a regular file"):
        task(tmp_path / "data").load()


@every_task
def test_stray_files_are_ignored(tmp_path, name):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "data", contents)
    names = (".DS_Store", "Thumbs.db", "desktop.ini", "readme.md~", ".git/config", "notes.md")
    for place in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        write(place, dict.fromkeys(names, b"\0stray"))
    for path, content in contents.items():
        head, _, tail = path.rpartition("/")
        write(folder, {f"__MACOSX/{path}": content, f"{head}/._{tail}": b"\0stray"})
        write(folder, {f"{head}/.ipynb_checkpoints/{tail}": content})
    assert counts(task(folder)) == expected


@every_task
def test_copies_beside_a_file_are_ignored(tmp_path, name):
    contents, task, expected = TASKS[name]
    folder = write(tmp_path / "data", contents)
    for path, content in contents.items():
        stem, suffix = os.path.splitext(path)  # noqa: PTH122
        copies = (f"{stem} (1){suffix}", f"{stem} - Copy{suffix}", f"{path}.bak", f"{path}~")
        write(folder, dict.fromkeys(copies, content))
    assert counts(task(folder)) == expected


@pytest.mark.parametrize("name", ["text", "listops", "retrieval", "pathfinder"])
def test_text_that_an_editor_has_saved(tmp_path, name):
    """A byte order mark, Windows' line ends, blank last lines."""
    contents, task, _ = TASKS[name]
    before = contents_of(task(write(tmp_path / "plain", contents)))
    edited = {
        path: content
        if path.endswith(".png")
        else b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n\n\n"
        for path, content in contents.items()
    }
    assert contents_of(task(write(tmp_path / "edited", edited))) == before


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """An archive of 138 GB beside the data, or in it, is not opened."""
    opened = []
    plain = Path.open

    def counted(self, *args, **kwargs):
        opened.append(self.name)
        return plain(self, *args, **kwargs)

    for name, (contents, task, expected) in TASKS.items():
        folder = write(tmp_path / name, contents)
        coordinates = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
        for place in coordinates:
            with (place / "ILSVRC2012_img_train.tar").open("wb") as file:
                file.truncate(138 << 30)
        opened.clear()
        monkeypatch.setattr(Path, "open", counted)
        assert counts(task(folder)) == expected
        monkeypatch.undo()
        monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))
        assert {Path(path).name for path in contents} <= set(opened)
        assert "ILSVRC2012_img_train.tar" not in opened


@every_task
def test_a_file_far_too_large_is_refused_unread(tmp_path, name):
    contents, task, _ = TASKS[name]
    path = write(tmp_path / "data", contents) / next(iter(contents))
    with path.open("r+b") as file:
        file.truncate(1 << 36)
    with pytest.raises(DataError, match=r"bytes, and should have|line [0-9]+ has more than"):
        task(tmp_path / "data").load()


def test_a_folder_too_large_to_search(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MOST_NAMES", 100)
    write(tmp_path / "data", {f"other/{i}": b"" for i in range(120)})
    write(tmp_path / "data/deep/down", REVIEWS)
    with pytest.raises(DataError, match=r"too large to search, with more than 100 .*task.source"):
        Text(str(tmp_path / "data")).load()
    with pytest.raises(DataError, match=r"folders, most of them below .*/data/other: give the fo"):
        Text(str(tmp_path / "data")).load()
    assert counts(Text(str(tmp_path / "data/deep"), val=3)) == (5, 3, 8)
    monkeypatch.setattr(files, "MOST_FILES", 10)
    with pytest.raises(DataError, match="more than 10 files"):
        Text(f"hf:{tmp_path / 'data'}").load()


def test_what_is_missing_is_named(tmp_path):
    for name, wanted in (
        ("text", "{train,test}/{pos,neg}"),
        ("batches", "data_batch_"),
        ("pathfinder", "metadata/"),
        ("listops", "basic_train.tsv"),
        ("retrieval", "new_aan_pairs.train.tsv"),
    ):
        empty = write(tmp_path / name, {"README": b"", "data.tar.gz": b""})
        with pytest.raises(DataError) as error:
            TASKS[name][1](empty).load()
        assert f"{empty} has no {wanted}" in str(error.value)
        assert "give one of them, such as data.tar.gz" in str(error.value)
        for odd in ("a\0b", "x" * 5000, str(tmp_path / name / "README") + "/x"):
            with pytest.raises(DataError, match="cannot be read"):
                TASKS[name][1](odd).load()
    with pytest.raises(DataError, match="neither a folder nor a file"):
        Text("/dev/null").load()


RELEASED = {
    f"lra_release/lra_release/pathfinder{size}/{folder}/{path.removeprefix('curves/')}": (
        png(i, size) if path.endswith("png") else content
    )
    for size in (32, 64)
    for i, folder in enumerate(("curv_baseline", "curv_contour_length_9", "curv_contour_length_14"))
    for path, content in CURVES.items()
}
RELEASED |= {f"lra_release/{path}": content for path, content in LISTOPS.items()}
RELEASED |= {f"lra_release/lra_release/{path}": content for path, content in RETRIEVAL.items()}
RELEASED |= {f"lra_release/lra_release/{path}": b"another copy" for path in LISTOPS}


@pytest.mark.parametrize("place", ["", "lra_release", "lra_release/lra_release", "archive"])
def test_the_whole_release(tmp_path, place):
    folder = write(tmp_path / "data", RELEASED) / place
    if place == "archive":
        folder = pack(tmp_path / "lra_release.gz", RELEASED)
    assert counts(TASKS["retrieval"][1](folder)) == (2, 2, 2)
    if place != "lra_release/lra_release":
        assert counts(TASKS["listops"][1](folder)) == (2, 2, 2)
    for size in (32, 64):
        for i, contour in enumerate((6, 9, 14)):
            splits = Pathfinder(size, contour, source=str(folder)).load()
            assert splits.train.tokens.shape == (10, size**2)
            assert splits.train.tokens.unique().tolist() == [i]
    with pytest.raises(DataError, match=r"task.size 128 and --task.contour 14.*curv_baseline"):
        Pathfinder(128, source=str(folder)).load()


@every_task
def test_a_tar_that_ends_early(tmp_path, name):
    """At every boundary of blocks: where a file ends, tarfile sees the end of the archive."""
    contents, task, _ = TASKS[name]
    whole = pack(tmp_path / "whole", contents, "w").read_bytes()
    cut = tmp_path / "cut"
    end = len(whole.rstrip(b"\0"))
    for size in range(512, end, max(512, end // 40 // 512 * 512)):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="no tar archive, or is truncated .*download it again"):
            task(cut).load()
    altered = bytearray(whole)
    header = whole.rindex(b"ustar") - 257  # of the last file
    altered[header] ^= 1
    cut.write_bytes(altered)
    with pytest.raises(DataError, match="no tar archive, or is truncated"):
        task(cut).load()


@pytest.mark.parametrize("form", ["w:gz", "w:xz", "w:bz2", "zip"])
def test_compressed_archives_that_are_damaged(tmp_path, form):
    whole = pack(tmp_path / "whole", REVIEWS, form).read_bytes()
    path = tmp_path / "damaged"
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"^{path} is no .*archive, or is truncated"):
            Text(str(path), val=3).load()
    path.write_bytes(whole[:-8] + b"\0" * 8)  # the checksum of gz, or the directory of zip
    with contextlib.suppress(DataError):  # bz2 and xz may notice nothing, of what holds no data
        assert counts(Text(str(path), val=3)) == (5, 3, 8)
    assert form != "w:gz" or not _loads(path)


def _loads(path):
    with contextlib.suppress(DataError):
        Text(str(path), val=3).load()
        return True
    return False


DAMAGE = [
    ("text", "aclImdb/test/pos/0_7.txt", b"caf\xe9", r"pos/0_7.txt is not text in UTF-8"),
    ("text", "aclImdb/test/pos/0_7.txt", b"\n", r"pos/0_7.txt is not text: it is empty"),
    ("batches", "cifar-10-batches-py/test_batch", b"[]", "test_batch is not a batch of CIFAR-10"),
    (
        "batches",
        "cifar-10-batches-py/test_batch",
        pickle.dumps({b"labels": [*range(9), 12] * 2, b"data": np.zeros((20, 3072), np.uint8)}, 2),
        r"test_batch is not a batch of CIFAR-10 \(it has the label 12, not 0..9\)",
    ),
    (
        "batches",
        "cifar-10-batches-py/test_batch",
        pickle.dumps({b"labels": [*range(10)] * 2, b"data": np.zeros((20, 3072))}, 2),
        "shape .20, 3072. and the type float64",
    ),
    (
        "batches",
        "cifar-10-batches-py/data_batch_2",
        batch(0),
        "data_batch_2 is a copy of .*batch_1",
    ),
    ("batches", "cifar-10-batches-py/train/cat/0.png", png(), "has batches .* and folders train"),
    ("pictures", "pictures/test/cat/0.jpg", png(), r"test/cat has 0.jpg and 0.png: keep one"),
    ("pictures", "pictures/test/cat/0.png", b"", r"test/cat/0.png is not an image"),
    ("pictures", "pictures/test/cat/0.png", png(size=64), r"cat/0.png has 64 x 64 pixels"),
    ("pathfinder", "curves/metadata/0.npy", METADATA + b"imgs/0 x.png\n", "npy, line 13: not a"),
    ("pathfinder", "curves/metadata/0.npy", METADATA[:50] + b"\n" + METADATA, "npy, line 2"),
    ("pathfinder", "curves/metadata/0.npy", b"\x93NUMPY\1\0", "0.npy: not a line .* np.save"),
    ("pathfinder", "curves/metadata/0.npy", b"\xff\xfe", r"0.npy is not text in UTF-8 \(line 1"),
    (
        "pathfinder",
        "curves/metadata/1.npy",
        b"imgs/0 sample_0.png 0 1\n",
        "1.npy, line 1: another line gives .*imgs/0/sample_0.png the other label",
    ),
    ("listops", "listops-1000/basic_val.tsv", LISTS + b"[SM 1 ]\t10\n", "val.tsv, line 4"),
    ("listops", "listops-1000/basic_val.tsv", LISTS + b"\n" + LISTS, "val.tsv, line 4"),
    ("listops", "listops-1000/basic_val.tsv", b"\xff", r"val.tsv is not text in UTF-8 \(line 1"),
    ("listops", "listops-1000/basic_val.tsv", b"\n\n", r"val.tsv is empty"),
    ("retrieval", "tsv_data/new_aan_pairs.eval.tsv", PAIRS + b"0.0\ta\n", "eval.tsv, line 3"),
    ("retrieval", "tsv_data/new_aan_pairs.eval.tsv", PAIRS + b"2\t1\t2\ta\tb\n", "eval.tsv, row 3"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "file", "content", "message"), DAMAGE)
def test_damage_is_named(tmp_path, name, file, content, message, packed):
    contents, task, _ = TASKS[name]
    contents = contents | {file: content}
    where = pack(tmp_path / "data.tar", contents) if packed else write(tmp_path / "data", contents)
    with pytest.raises(DataError, match=message) as error:
        task(where).load()
    assert str(where) in str(error.value)


@pytest.mark.parametrize("name", ["listops", "retrieval"])
@pytest.mark.parametrize("split", [0, 1, 2])
def test_a_table_that_is_missing(tmp_path, name, split):
    contents, task, _ = TASKS[name]
    gone = list(contents)[split]
    rest = {path: x for path, x in contents.items() if path != gone}
    for where in (write(tmp_path / "data", rest), pack(tmp_path / "data.tar", rest)):
        with pytest.raises(DataError, match=f"there is no .*{gone}"):
            task(where).load()


def test_empty_images_of_pathfinder(tmp_path):
    """The release has one, 0/sample_172.png; several are a copy that was not finished."""
    one = CURVES | {"curves/imgs/0/sample_3.png": b""}
    assert sum(counts(Pathfinder(source=str(write(tmp_path / "one", one))))) == 11
    two = one | {"curves/imgs/0/sample_4.png": b""}
    with pytest.raises(DataError, match=r"sample_3.png is empty, and so are 1 more"):
        Pathfinder(source=str(write(tmp_path / "two", two))).load()


def test_metadata_of_pathfinder(tmp_path):
    table = io.BytesIO()
    np.save(table, np.array([line.split() for line in METADATA.decode().splitlines()]))
    saved = CURVES | {"curves/metadata/0.npy": table.getvalue()}
    combined = CURVES | {"curves/metadata/combined.npy": METADATA}
    alone = {k: v for k, v in combined.items() if k != "curves/metadata/0.npy"}
    expected = contents_of(Pathfinder(source=str(write(tmp_path / "plain", CURVES))))
    for name, contents in (("saved", saved), ("combined", combined), ("alone", alone)):
        assert contents_of(Pathfinder(source=str(write(tmp_path / name, contents)))) == expected
    again = CURVES | {"curves/metadata/1.npy": METADATA}
    with pytest.warns(UserWarning, match="lists 12 images again; each is taken once"):
        assert contents_of(Pathfinder(source=str(write(tmp_path / "again", again)))) == expected
    table = io.BytesIO()
    np.save(table, np.array([["a", 1]], dtype=object))
    pickled = CURVES | {"curves/metadata/0.npy": table.getvalue()}
    with pytest.raises(DataError, match="by np.save|of np.save"):
        Pathfinder(source=str(write(tmp_path / "pickled", pickled))).load()


def test_zip_links(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in REVIEWS.items():
            archive.writestr(name.replace("aclImdb", "store").replace("/", "\\"), content)
        link = zipfile.ZipInfo("data")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "store")
    assert counts(Text(str(path), val=3)) == (5, 3, 8)
    assert open_source(str(path), "").listing("", 9).folders == {"data": "store", "store": "store"}
