"""Data sets by `hf:NAME`, on folders in the forms that the Hub keeps; nothing is downloaded."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from sparse_flash.experiments.data import hub
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.images import CLASSES, Image, gray
from sparse_flash.experiments.data.listops import ListOps, evaluate
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Retrieval, Text
from sparse_flash.kernels.cache import cache_dir

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


def parquet(folder, **splits):
    """A folder as the Hub has it, a file for each split; its name for --task.source."""
    folder.mkdir(exist_ok=True)
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name, columns in splits.items():
        path = folder / f"{name}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(columns).to_parquet(path)
        card += [f"  - split: {name}", f"    path: {name}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return f"hf:{folder}"


def reviews(split, count=4):
    labels = [0, 1] * count
    return {"text": [f"{split} film {i}, {y}" for i, y in enumerate(labels)], "label": labels}


def test_text(tmp_path):
    source = parquet(tmp_path, train=reviews("train"), test=reviews("test"))
    splits = Text(source, max_length=40, val=3).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (5, 3, 8)
    for tokens, length, label in zip(
        splits.test.tokens, splits.test.lengths, splits.test.labels, strict=True
    ):
        content = bytes(tokens[:length].tolist()).decode()
        assert content.startswith("test film")
        assert content.endswith(str(label.item()))


def test_what_was_saved_to_disk(tmp_path):
    parts = {name: datasets.Dataset.from_dict(reviews(name)) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(Text(f"hf:{tmp_path / 'saved'}", max_length=40, val=3).load().test) == 8


def test_retrieval(tmp_path):
    rows = {"label": [1, 0], "text1": ["one", "two"], "text2": ["three", "four"]}
    source = parquet(tmp_path, train=rows, validation=rows, test=rows)
    splits = Retrieval(source, max_length=4).load()
    assert splits.val.labels.tolist() == [1, 0]
    assert bytes(splits.val.tokens[0, 1].tolist()) == b"thre"


def test_listops(tmp_path):
    rows = {"Source": ["( [MAX 4 ( [MIN 9 1 ] ) ] )", "[SM 7 6 ]"], "Target": [4, 3]}
    source = parquet(tmp_path, train=rows, validation=rows, test=rows)
    splits = ListOps(source=source, min_length=1, max_length=12).load()
    for split in (splits.train, splits.val, splits.test):
        assert split.labels.tolist() == [4, 3]
        for tokens, n, label in zip(split.tokens, split.lengths, split.labels, strict=True):
            assert evaluate(tokens[:n].tolist()) == label


def pictures(count, side, channels):
    generator = np.random.default_rng(0)
    shape = (side, side, 3)[: 2 + (channels > 1)]
    return [Pillow.fromarray(generator.integers(0, 256, shape, np.uint8)) for _ in range(count)]


def test_image(tmp_path):
    images = {name: pictures(20, 32, 3) for name in ("train", "test")}
    labels = list(range(10)) * 2
    source = parquet(tmp_path, **{n: {"img": x, "label": labels} for n, x in images.items()})
    splits = Image(source, val=5).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (15, 5, 20)
    expected = torch.from_numpy(gray(np.asarray(images["test"][3])))
    assert torch.equal(splits.test.tokens[3], expected.flatten())
    assert splits.test.labels.tolist() == labels


def test_pathfinder(tmp_path):
    rows = {"image": pictures(20, 32, 1), "label": [0, 1] * 10}
    whole = Pathfinder(32, source=parquet(tmp_path / "one", train=rows)).load()
    assert (len(whole.train), len(whole.val), len(whole.test)) == (16, 2, 2)
    three = parquet(tmp_path / "three", train=rows, validation=rows, test=rows)
    assert len(Pathfinder(32, source=three).load().val) == 20
    with pytest.raises(DataError, match=r"see --task.size\) has 32 x 32 pixels, not 64 x 64"):
        Pathfinder(64, source=three).load()
    two = parquet(tmp_path / "two", train=rows, test=rows)
    with pytest.raises(DataError, match="has train and test: give one with"):
        Pathfinder(32, source=two).load()


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:no/such-thing cannot be read .*the Large Movie"):
        Text("hf:no/such-thing").load()
    source = parquet(tmp_path / "a", train=reviews("train"))
    with pytest.raises(DataError, match=r"has train, and no test"):
        Text(source).load()
    source = parquet(tmp_path / "b", train={"review": ["x"]}, test={"review": ["x"]})
    with pytest.raises(DataError, match=r"columns review, and none that is called text"):
        Text(source).load()
    with pytest.raises(DataError, match=r"none that is called img or image"):
        Image(source).load()


def test_what_is_something_else(tmp_path):
    wrong = reviews("train") | {"label": [0, 1] * 3 + [2, 3]}
    source = parquet(tmp_path / "a", train=wrong, test=reviews("test"))
    with pytest.raises(DataError, match=r"train 7 is not a review with the label 0 or 1"):
        Text(source).load()
    text = {"img": ["x"], "label": [0]}
    source = parquet(tmp_path / "b", train=text, test=text)
    with pytest.raises(DataError, match=r"train 1 is not an image: 'x'"):
        Image(source).load()
    source = parquet(tmp_path / "c", train=reviews("train"), test=reviews("test"))
    file = next((tmp_path / "c").glob("test*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"cannot be read"):
        Text(source).load()

    pairs = {"label": [1], "text1": ["one"], "text2": [None]}
    source = parquet(tmp_path / "d", train=pairs, validation=pairs, test=pairs)
    with pytest.raises(DataError, match=r"train, row 1: not two texts, but \['one', None\]"):
        Retrieval(source).load()


def test_names_and_revisions(tmp_path, monkeypatch):
    asked = []

    def load(name, revision=None, **_):
        asked.append((name, revision))
        parts = {split: datasets.Dataset.from_dict(reviews(split)) for split in ("train", "test")}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hf:some/reviews", "hf:some/reviews@v2"):
        assert len(Text(source, max_length=40, val=3).load().test) == 8
    folder = tmp_path / "with@sign"
    folder.mkdir()
    Text(f"hf:{folder}", max_length=40, val=3).load()
    assert asked == [("some/reviews", None), ("some/reviews", "v2"), (str(folder), None)]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"not installed: pip install 'sparse-flash\[hub\]'"):
        Text("hf:stanfordnlp/imdb").load()


def test_a_folder_that_has_changed_is_read_anew(tmp_path):
    source = parquet(tmp_path / "a", train=reviews("train"), test=reviews("test"))
    text = Text(source, max_length=40, val=3)
    assert len(text.load().test) == 8
    parquet(tmp_path / "a", train=reviews("train"), test=reviews("test", 5))
    assert len(text.load().test) == 10
    assert hub.DataSet(source, "").names == ["train", "test"]


def table(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'"{text}",{label}\n' for text, label in zip(rows["text"], rows["label"], strict=True)]
    (folder / name).write_text("".join(["text,label\n", *lines]))


def test_copies_in_a_folder_are_refused(tmp_path):
    """`datasets` reads every table below a folder, a copy as further rows."""
    for name in ("train", "test"):
        for place in ("a", "a/backup", "b", "c"):
            table(tmp_path / place, f"{name}.csv", reviews(name))
    with pytest.raises(DataError, match=r"copy among the files for train: .*/train.csv repeats"):
        Text(f"hf:{tmp_path / 'a'}", max_length=40, val=3).load()
    table(tmp_path / "b", "train (1).csv", reviews("train", 2))  # another version
    with pytest.raises(DataError, match=r"train \(1\).csv repeats a file of the same name"):
        Text(f"hf:{tmp_path / 'b'}", max_length=40, val=3).load()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._train.csv"):
        (tmp_path / "c" / name).write_bytes(b"\0stray")
    assert len(Text(f"hf:{tmp_path / 'c'}", max_length=40, val=3).load().test) == 8


def test_copies_of_images_are_refused(tmp_path):
    """Images may be alike; but not with one name in two folders of one name."""
    for split in ("train", "test"):
        for label in CLASSES:
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                Pillow.new("RGB", (32, 32)).save(folder / f"{i}.png")
    splits = Image(f"hf:{tmp_path / 'images'}", val=5).load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (15, 5, 20)
    shutil.copytree(tmp_path / "images/train/cat", tmp_path / "images/old/train/cat")
    with pytest.raises(DataError, match=r"copy among the files for train: .*/cat/0.png repeats"):
        Image(f"hf:{tmp_path / 'images'}", val=5).load()


@pytest.mark.parametrize("trouble", ["no locks", "missing"])
def test_without_a_cache(tmp_path, trouble, monkeypatch):
    """`datasets` wants to lock and to write; one warning, for its cache and ours."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    source = parquet(tmp_path / "a", train=reviews("train"), test=reviews("test"))
    if trouble == "missing":
        monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", "/proc/nowhere")
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    for name in (source, "hf:some/reviews"):
        asked = []

        def load(name, cache_dir, asked=asked, **_):
            asked.append(cache_dir)
            parts = {x: datasets.Dataset.from_dict(reviews(x)) for x in ("train", "test")}
            return datasets.DatasetDict(parts)

        if name != source:
            monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.warns(UserWarning, match="set SPARSE_FLASH_CACHE_DIR") as told:
            assert len(Text(name, max_length=40, val=3).load().test) == 8
        assert len(told) == 1
        assert not any(str(cache_dir()) in folder for folder in asked)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"x" * 40])
def test_damage_to_what_was_saved_to_disk(tmp_path, content):
    parts = {name: datasets.Dataset.from_dict(reviews(name)) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert len(found) == 7
    for path in found:
        whole = path.read_bytes()
        path.write_bytes(content)
        if not (path.name == "dataset_info.json" and content == b"{}"):  # which may say nothing
            with pytest.raises(DataError, match=r"saved cannot be read"):
                Text(f"hf:{tmp_path / 'saved'}", max_length=40, val=3).load()
        path.write_bytes(whole)


def test_damage_that_shows_when_rows_are_read(tmp_path):
    images = {"img": pictures(20, 32, 3), "label": list(range(10)) * 2}
    source = parquet(tmp_path / "a", train=images, test=images)
    broken = datasets.Dataset.from_dict(
        {"img": [{"bytes": b"no image", "path": None}], "label": [0]}
    ).cast_column("img", datasets.Image())
    broken.to_parquet(tmp_path / "a/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"a: train 1 cannot be read \(.*: CIFAR-10"):
        Image(source, val=5).load()
