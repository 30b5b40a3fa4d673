"""Sources of published data: a folder, or a tar or zip archive, searched for one data root.

A data root is a folder with a data set in the layout that a task expects. Only the files of that
root are opened. Everything else, copies included, is only listed.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sparse_flash.experiments.data.files import DataError

MOST_NAMES = 500_000  # maximum number of listed names in a search
LONGEST_LINE = 1 << 26  # bytes
LARGEST = 1 << 28  # bytes per file read at once; a batch of CIFAR-10 has 2^25
_FEW = 16
_ARCHIVES = (".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".zip")
_STRAY = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}
_STRAY |= {"lost+found", "system volume information"}
_COPY = re.compile(
    r"(.+?)(?: ?\(\d+\)| - copy(?: \(\d+\))?|[ _-]copy ?\d*|\.(?:bak|orig))$", re.IGNORECASE
)


class Listing(NamedTuple):
    """Content of a folder, without stray files.

    folders: Names, in order, with the identity of each folder (links to one folder share it).
    files: Names, in order, of all other entries.
    """

    folders: dict[str, Hashable]
    files: list[str]


Look = Callable[[str], Listing]


class Source(abc.ABC):
    """Files by their path below a folder, or in an archive; "" is the folder itself.

    Args:
        name: Path given by the user.
        where: Advice on where to get the data, appended to every message.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where

    @abc.abstractmethod
    def listing(self, folder: str, most: int) -> Listing:
        """Content of a folder.

        Raises:
            OSError: It cannot be read.
            OverflowError: It has more than `most` names.
        """

    @abc.abstractmethod
    def read(
        self, files: Iterable[str], most: int, what: str = "file"
    ) -> Iterator[tuple[str, bytes]]:
        """Path and content of each of these files: as given for a folder, as stored in an archive.

        Raises:
            DataError: There is no such file, it has more than `most` bytes, or it cannot be read.
        """

    @abc.abstractmethod
    def open(self, file: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for streaming.

        Raises:
            DataError: There is no such file.
        """

    @abc.abstractmethod
    def paths(self, files: Callable[[], Iterable[str]]) -> tuple[str, ...]:
        """The paths on disk whose changes indicate a change of any of these files."""

    @abc.abstractmethod
    def at(self, file: str) -> str:
        """The name of a file in messages."""

    def error(self, file: str, message: str) -> DataError:
        """A DataError about a file, with the advice."""
        return DataError(f"{self.at(file)} {message}: {self.where}")

    def find(self, files_of: Callable[[Look, str], list[str] | None], wanted: str) -> list[str]:
        """The files of the only data root: the source itself, or the nearest folder below it.

        Folders are searched level by level, down to the first level with a data root. A data root
        is not searched further. Several on that level are accepted if their files are equal.

        Args:
            files_of: Function that returns the data files of a folder, or None if the folder is not
                a data root. An empty list excludes the folder and all folders below.
            wanted: Content of a data root, for messages.

        Raises:
            DataError: There is no data root, several differ, or there is too much to search.
        """
        look = _Search(self)
        seen, level, archives = {look.identity}, [""], list[str]()
        while level:
            roots, below = {}, []
            for folder in level:
                try:
                    listing = look(folder)
                except _UnreadableError:
                    if not folder:
                        raise
                    continue
                files = files_of(look, folder)
                if files:
                    roots[folder] = files
                elif files is None:
                    archives += [f for f in listing.files if f.lower().endswith(_ARCHIVES)]
                    for name, identity in listing.folders.items():
                        if identity not in seen:
                            seen.add(identity)
                            below.append(join(folder, name))
            if roots:
                return self._only(roots)
            level = below
        hint = f" (but archives: give one of them, such as {archives[0]})" if archives else ""
        raise DataError(
            f"{self.name} has no {wanted}, and below it there is no folder with {wanted}{hint}: "
            f"{self.where}"
        )

    def _only(self, roots: dict[str, list[str]]) -> list[str]:
        first, *others = roots
        if others:
            names = {tuple(f[len(root) :] for f in files) for root, files in roots.items()}
            if len(names) > 1 or len({self._digest(*item) for item in roots.items()}) > 1:
                candidates = ", ".join(self.at(root) for root in roots)
                raise DataError(
                    f"{self.name} holds the data more than once, and not alike: {candidates}; "
                    f"give one of these folders with --task.source, or move the others away: "
                    f"{self.where}"
                )
        return roots[first]

    def _digest(self, root: str, files: list[str]) -> str:
        """Digest of names and contents."""
        contents = {}
        if len(files) > _FEW:  # one pass: each opening decompresses an archive
            for file, content in self.read(files, LARGEST):
                contents[file[len(root) :]] = hashlib.sha256(content).hexdigest()
        else:
            for file in files:
                with self.open(file) as stream:
                    contents[file[len(root) :]] = digest(stream)
        return repr(sorted(contents.items()))


class Folder(Source):
    """The files of a folder; links are followed."""

    def listing(self, folder: str, most: int) -> Listing:
        """Content of a folder."""
        folders, files, count = dict[str, Hashable](), list[str](), 0
        with os.scandir(Path(self.name) / folder) as entries:
            for entry in entries:
                count += 1
                if count > most:
                    raise OverflowError
                if is_stray(entry.name):
                    continue
                try:
                    status = entry.stat() if entry.is_dir() else None
                except OSError:  # a link cycle, or deleted meanwhile
                    status = None
                if status is None:
                    files.append(entry.name)
                else:
                    folders[entry.name] = (status.st_dev, status.st_ino)
        return Listing(dict(sorted(folders.items())), sorted(files))

    def read(
        self, files: Iterable[str], most: int, what: str = "file"
    ) -> Iterator[tuple[str, bytes]]:
        """Path and content of each of these files, as given."""
        for file in files:
            with self._opened(file, what) as (stream, size):
                check_size(self, file, size, most)
                try:
                    content = stream.read()
                except OSError as error:
                    raise self.error(file, f"cannot be read ({error})") from error
            yield file, content

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[BinaryIO]:
        """Open a file for streaming."""
        with self._opened(file, "file") as (stream, _):
            yield stream

    @contextlib.contextmanager
    def _opened(self, file: str, what: str) -> Iterator[tuple[BinaryIO, int]]:
        """A regular file and its size; reading a pipe could block forever."""
        path = Path(self.name) / file
        try:
            status = path.stat()
            regular = stat.S_ISREG(status.st_mode)
            stream = path.open("rb") if regular else None
        except FileNotFoundError as error:
            reason = " (a link to nothing)" if path.is_symlink() else ""
            raise DataError(f"there is no {what} {path}{reason}: {self.where}") from error
        except (OSError, ValueError) as error:
            raise self.error(file, f"cannot be read ({error})") from error
        if stream is None:
            raise self.error(file, "is not a regular file")
        with stream:
            yield stream, status.st_size

    def paths(self, files: Callable[[], Iterable[str]]) -> tuple[str, ...]:
        """The files themselves."""
        return tuple(os.path.join(self.name, file) for file in files())  # noqa: PTH118

    def at(self, file: str) -> str:
        """Its path on disk."""
        return str(Path(self.name) / file)


def lines(source: Source, file: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, without line ends and without blank lines at the end.

    Raises:
        DataError: There is no such file, or it is not text.
    """
    blank = list[int]()
    with source.open(file) as stream:
        for number in range(1, 1 << 62):
            try:
                line = stream.readline(LONGEST_LINE + 1)
            except OSError as error:
                raise source.error(file, f"cannot be read ({error})") from error
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise source.error(
                    file, f"is not text: line {number} has more than {LONGEST_LINE} bytes"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise source.error(
                    file, f"is not text in UTF-8 (line {number}: {error.reason})"
                ) from error
            if not text.strip():
                blank.append(number)
                continue
            yield from ((earlier, "") for earlier in blank)
            blank.clear()
            yield number, text


def find_tables(source: Source, names: list[str]) -> list[str]:
    """The paths of files of these names in the folder that has any of them.

    Raises:
        DataError: No folder has.
    """

    def files_of(look: Look, folder: str) -> list[str] | None:
        files = look(folder).files
        return [join(folder, name) for name in names if name in files] or None

    folder = posixpath.dirname(source.find(files_of, names[0])[0])
    return [join(folder, name) for name in names]


def digest(stream: BinaryIO) -> str:
    """The SHA-256 of a file of any size."""
    found = hashlib.sha256()
    while content := stream.read(1 << 20):
        found.update(content)
    return found.hexdigest()


def join(folder: str, name: str) -> str:
    """The path of an entry of a folder below the source.

    >>> join("", "train"), join("train", "pos")
    ('train', 'train/pos')
    """
    return f"{folder}/{name}" if folder else name


def is_stray(name: str) -> bool:
    """Whether this is a hidden file, or one that an operating system creates in folders.

    >>> [is_stray(name) for name in (".DS_Store", "._0_7.txt", "Thumbs.db", "0_7.txt")]
    [True, True, True, False]
    """
    return name.startswith(".") or name.endswith("~") or name.lower() in _STRAY


def originals(names: Iterable[str]) -> list[str]:
    """The names without names of copies.

    >>> originals(["0.npy", "0 (1).npy", "0 - Copy.npy", "0.npy.bak", "dog (1).npy"])
    ['0.npy', 'dog (1).npy']
    """
    names = list(names)
    known = set(names)
    return [name for name in names if _original(name) not in known]


def _original(name: str) -> str | None:
    """Name of the original, if the name is that of a copy."""
    if name.lower().startswith("copy of "):
        return name[len("copy of ") :]
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    if found := _COPY.match(name):
        return found[1]
    found = _COPY.match(stem)
    return found[1] + suffix if found else None


def check_size(source: Source, file: str, size: int, most: int) -> None:
    """Raise DataError if a file is far larger than all files that the task reads."""
    if size > most:
        raise source.error(file, f"has {size:,} bytes, and should have {most:,} at most")


class _UnreadableError(DataError):
    """A folder cannot be listed."""


class _Search:
    """Listings of a source, each read once, with at most MOST_NAMES names in total."""

    def __init__(self, source: Source) -> None:
        self.source, self.left = source, MOST_NAMES
        self.known: dict[str, Listing] = {}
        self.identity: Hashable = ""
        if isinstance(source, Folder):
            with contextlib.suppress(OSError):
                status = Path(source.name).stat()
                self.identity = (status.st_dev, status.st_ino)

    def __call__(self, folder: str) -> Listing:
        if folder not in self.known:
            try:
                listing = self.source.listing(folder, self.left)
            except OverflowError:
                raise DataError(
                    f"{self.source.name} is too large to search, with more than {MOST_NAMES:,} "
                    f"files and folders{self._largest(folder)}: give the folder of the data itself "
                    f"with --task.source; {self.source.where}"
                ) from None
            except OSError as error:
                raise _UnreadableError(
                    f"{self.source.at(folder)} cannot be read ({error}): {self.source.where}"
                ) from error
            self.left -= 1 + len(listing.folders) + len(listing.files)
            self.known[folder] = listing
        return self.known[folder]

    def _largest(self, last: str) -> str:
        """The folder directly below the source with most names, in words; `last` holds the rest."""
        counts = Counter({last.partition("/")[0]: self.left})
        for folder, listing in self.known.items():
            counts[folder.partition("/")[0]] += len(listing.folders) + len(listing.files)
        largest = counts.most_common(1)[0][0]
        return f", most of them below {self.source.at(largest)}" if largest else ""
