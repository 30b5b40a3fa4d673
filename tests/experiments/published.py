"""Small data of the published forms, for the tests of what reads them."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image as Pillow
from sparse_flash.experiments.data.images import CLASSES, Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.data.text import Retrieval, Text


def png(value=0, size=32):
    file = io.BytesIO()
    Pillow.new("RGB", (size, size), (value, value, value)).save(file, "png")
    return file.getvalue()


def batch(value):
    data = np.arange(20 * 3072, dtype=np.int64).reshape(20, 3072) % 251 + value
    return pickle.dumps({b"labels": [*range(10)] * 2, b"data": data.astype(np.uint8)}, protocol=2)


SPLITS = ("train", "test")
REVIEWS = {
    f"aclImdb/{split}/{label}/{i}_7.txt": f"{label} {split} {i}".encode()
    for split in SPLITS
    for label in ("pos", "neg")
    for i in range(4)
}
BATCHES = {
    f"cifar-10-batches-py/{n}": batch(i) for i, n in enumerate(("data_batch_1", "test_batch"))
}
PICTURES = {
    f"pictures/{split}/{label}/{i}.png": png(10 * i + j)
    for split in SPLITS
    for j, label in enumerate(CLASSES)
    for i in range(2)
}
METADATA = "".join(f"imgs/0 sample_{i}.png {i} {i % 2} 1.0 14 2 1 4\n" for i in range(12)).encode()
CURVES = {f"curves/imgs/0/sample_{i}.png": png(i) for i in range(12)}
CURVES |= {"curves/metadata/0.npy": METADATA}
LISTS = b"Source\tTarget\n[MAX 4 [MIN 9 1 ] ]\t4\n[SM 7 6 ]\t3\n"
LISTOPS = {f"listops-1000/basic_{split}.tsv": LISTS for split in ("train", "val", "test")}
PAIRS = b"1.0\ta\tb\tone\ttwo\n0.0\tc\td\tthree\tfour\n"
RETRIEVAL = {f"tsv_data/new_aan_pairs.{split}.tsv": PAIRS for split in ("train", "eval", "test")}

# Data, how it is read, and the number of examples in each split.
TASKS = {
    "text": (REVIEWS, lambda s: Text(str(s), val=3), (5, 3, 8)),
    "batches": (BATCHES, lambda s: Image(str(s), val=5), (15, 5, 20)),
    "pictures": (PICTURES, lambda s: Image(str(s), val=5), (15, 5, 20)),
    "pathfinder": (CURVES, lambda s: Pathfinder(source=str(s)), (10, 1, 1)),
    "listops": (LISTOPS, lambda s: ListOps(source=str(s), min_length=1, max_length=9), (2, 2, 2)),
    "retrieval": (RETRIEVAL, lambda s: Retrieval(str(s), max_length=9), (2, 2, 2)),
}
every_task = pytest.mark.parametrize("name", TASKS)


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pack(path, contents, form="w:gz"):
    """An archive of files; a string instead of bytes is a hard link, with "->" a symbolic one."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, form) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                continue
            symbolic = content.startswith("->")
            member.type = tarfile.SYMTYPE if symbolic else tarfile.LNKTYPE
            member.linkname = content.removeprefix("->")
            archive.addfile(member)
    return path


def counts(task):
    splits = task.load()
    return tuple(len(part) for part in (splits.train, splits.val, splits.test))


def contents_of(task):
    """All examples, whatever their order."""
    splits = task.load()
    parts = (splits.train, splits.val, splits.test)
    return [
        sorted((x.numpy().tobytes(), int(y)) for x, y in zip(p.tokens, p.labels, strict=True))
        for p in parts
    ]


def first_folder(contents):
    return next(iter(contents)).split("/")[0]
