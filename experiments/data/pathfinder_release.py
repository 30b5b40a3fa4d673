"""The Pathfinder files of the Long Range Arena release: folders imgs and metadata."""

from __future__ import annotations

import io
import posixpath
import re
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.images import pixels_of
from sparse_flash.experiments.data.source import LARGEST, Look, Source, join, lines, originals

RELEASE = (
    "Pathfinder is in lra_release.gz at https://github.com/google-research/long-range-arena; give "
    "that or a folder such as lra_release/pathfinder32/curv_contour_length_14 with --task.source, "
    "or hf:NAME of a data set with the columns image and label, or leave it empty to generate "
    "images"
)
LARGEST_IMAGE = 1 << 24  # bytes


def find_metadata(source: Source, size: int, contour: int) -> list[str]:
    """The files metadata/*.npy of the folder with images of this size and contour.

    In a folder with 0.npy, 1.npy and so on, as released, other files (a combined.npy) repeat them.

    Raises:
        DataError: There is none, or all folders have names of another size or contour.
    """
    others: list[str] = []

    def files_of(look: Look, folder: str) -> list[str] | None:
        if not {"imgs", "metadata"} <= look(folder).folders.keys():
            return None
        place = join(folder, "metadata")
        names = [name for name in look(place).files if name.endswith(".npy")]
        numbered = [name for name in names if re.fullmatch("[0-9]+[.]npy", name)]
        names = sorted(numbered, key=lambda name: (len(name), name)) or originals(names)
        if folder and not _fits(folder, size, contour):
            others.append(source.at(folder))
            return []
        return [f"{place}/{name}" for name in names]

    try:
        return source.find(files_of, "metadata/*.npy beside a folder imgs")
    except DataError as error:
        if not others:
            raise
        raise DataError(
            f"{source.name} has no images with --task.size {size} and --task.contour {contour}, "
            f"but, by the names of folders, {', '.join(others)}: set these, or give one of the "
            f"folders with --task.source; {RELEASE}"
        ) from error


def _fits(folder: str, size: int, contour: int) -> bool:
    """Whether no folder name is that of another size or contour in the release.

    >>> [_fits("pathfinder32/" + f, 32, 6) for f in ("curv_baseline", "curv_contour_length_9", "x")]
    [True, False, True]
    """
    sizes = re.findall(r"pathfinder([0-9]+)", folder)
    contours = re.findall(r"curv_contour_length_([0-9]+)|curv_(baseline)", folder)
    named = [int(number or 6) for number, _ in contours]
    return {int(x) for x in sizes[-1:]} <= {size} and set(named[-1:]) <= {contour}


def labels_of(source: Source, metadata: list[str]) -> dict[str, int]:
    """The label of each image by path, in the order of the metadata files.

    Raises:
        DataError: A file is not metadata, or an image has two labels.
    """
    labels: dict[str, int] = {}
    again = 0
    for path in metadata:
        folder = posixpath.dirname(posixpath.dirname(path))
        for number, fields in _fields(source, path):
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                found = " ".join(fields)[:60]
                raise DataError(
                    f"{source.at(path)}, line {number}: not a line of metadata: {found!r}: "
                    f"{RELEASE}"
                )
            image, label = posixpath.normpath(join(folder, f"{fields[0]}/{fields[1]}")), fields[3]
            again += image in labels
            if labels.setdefault(image, int(label)) != int(label):
                raise DataError(
                    f"{source.at(path)}, line {number}: another line gives {image} the other "
                    f"label: {RELEASE}"
                )
    if again:
        warnings.warn(
            f"{source.name}: the metadata lists {again} images again; each is taken once",
            stacklevel=2,
        )
    return labels


def _fields(source: Source, path: str) -> Iterator[tuple[int, list[str]]]:
    """The numbered lines of a metadata file: text in the release, np.save elsewhere."""
    with source.open(path) as file:
        start = file.read(6)
    if start != b"\x93NUMPY":
        yield from ((number, line.split()) for number, line in lines(source, path))
        return
    ((_, content),) = source.read([path], LARGEST)
    try:
        table = np.load(io.BytesIO(content), allow_pickle=False)
        rows = table.astype(str).tolist()
        if table.ndim != 2:
            raise ValueError(f"the array has {table.ndim} dimensions, not 2")
    except Exception as error:  # damaged bytes make numpy raise errors of many types
        raise DataError(
            f"{source.at(path)}: not a line of metadata, but an array of np.save that cannot be "
            f"read ({error}): save a table of strings, or text; {RELEASE}"
        ) from error
    yield from enumerate(rows, 1)


def gray(content: bytes, name: str, size: int) -> NDArray[np.uint8]:
    """The pixels of an image file, (size * size,).

    Raises:
        DataError: It is not an image, is truncated, or has another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return pixels_of(image, f"{name} (see --task.size)", "L", size).reshape(-1)
    except DataError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise errors of many types
        raise DataError(f"{name} is not an image, or is truncated ({error}): {RELEASE}") from error
