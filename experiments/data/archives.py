"""Tar and zip archives as folders: links are followed, damage is reported."""

from __future__ import annotations

import contextlib
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from sparse_flash.experiments.data.files import DataError
from sparse_flash.experiments.data.source import Folder, Listing, Source, check_size, is_stray

_MOST_LINKS = 40  # maximum number of links per path, as in Linux


class Member(NamedTuple):
    """A file of an archive.

    - `order`: Position in the archive.
    - `size`: Size in bytes.
    - `handle`: Object of the archive library that opens it.
    """

    order: int
    size: int
    handle: Any


class Archive(Source):
    """An archive as a tree of folders, files and links."""

    format: str

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name, where)
        self.members: dict[str, Member] = {}
        self.links: dict[str, str] = {}
        self.tree: dict[str, dict[str, None]] = {}  # names in each folder

    def _need_index(self) -> None:
        """List all members once, on demand, since it takes seconds."""
        if not self.tree:
            self.tree[""] = {}
            with self._unharmed():
                self._index()

    def _index(self) -> None:
        """List all members."""
        raise NotImplementedError

    def _open_all(self) -> contextlib.AbstractContextManager[Callable[[Member], IO[bytes]]]:
        """A context with the function that opens members."""
        raise NotImplementedError

    def _add(self, name: str, content: Member | str | None) -> None:
        """Add a file, a link (to the path of its target) or a folder (None)."""
        path = _normal(name)
        self.members.pop(path, None)  # a later member of the same name replaces the earlier
        self.links.pop(path, None)
        if isinstance(content, Member):
            self.members[path] = content
        elif content is not None:
            self.links[path] = content
        else:
            self.tree.setdefault(path, {})
        while path:
            folder, _, file = path.rpartition("/")
            siblings = self.tree.setdefault(folder, {})
            if file in siblings:
                break
            siblings[file] = None
            path = folder

    def resolve(self, path: str) -> str:
        """The path with all links followed.

        Raises:
            DataError: The links form a cycle.
        """
        start = path
        for _ in range(_MOST_LINKS):
            names = path.split("/")
            heads = ["/".join(names[: i + 1]) for i in range(len(names))] if self.links else []
            linked = next((i for i, head in enumerate(heads) if head in self.links), None)
            if linked is None:
                return path
            path = _normal(posixpath.join(self.links[heads[linked]], *names[linked + 1 :]))
        raise self.error(start, "is a link to itself")

    def listing(self, folder: str, most: int) -> Listing:
        """Names in a folder."""
        folders, files = dict[str, Hashable](), list[str]()
        self._need_index()
        here = self.resolve(folder)
        names = self.tree.get(here, {})
        if len(names) > most:
            raise OverflowError
        for name in sorted(names):
            if is_stray(name):
                continue
            path = posixpath.join(here, name)
            try:
                target = self.resolve(path) if path in self.links else path
            except DataError:  # a cycle of links; an error only if it is read
                target = path
            if target in self.tree and target not in self.members:
                folders[name] = target
            else:
                files.append(name)
        return Listing(folders, files)

    def read(
        self, files: Iterable[str], most: int, what: str = "file"
    ) -> Iterator[tuple[str, bytes]]:
        """Path and content of each of these files, in stored order, under all its names."""
        named: dict[int, tuple[Member, list[str]]] = {}
        for file in files:
            member = self._member(file, what)
            named.setdefault(member.order, (member, []))[1].append(file)
        with self._unharmed(), self._open_all() as opened:
            for _, (member, names) in sorted(named.items()):
                check_size(self, names[0], member.size, most)
                with opened(member) as stream:
                    content = stream.read()
                for name in names:
                    yield name, content

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[BinaryIO]:
        """Open a file for streaming."""
        member = self._member(file, "file")
        with self._unharmed(), self._open_all() as opened, opened(member) as stream:
            yield cast(BinaryIO, stream)

    def _member(self, file: str, what: str) -> Member:
        self._need_index()
        path = self.resolve(_normal(file))
        if path not in self.members:
            reason = "" if path == _normal(file) else f" (a link to {path})"
            raise DataError(f"{self.name}: there is no {what} {file}{reason} in it: {self.where}")
        return self.members[path]

    def paths(self, files: Callable[[], Iterable[str]]) -> tuple[str, ...]:
        """The path of the archive."""
        return (self.name,)

    def at(self, file: str) -> str:
        """Archive and path inside it."""
        return f"{self.name}: {file}" if file else self.name

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Convert errors of the archive libraries about damaged bytes to DataError."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":")
            raise DataError(
                f"{self.name} is no {self.format} archive, or is truncated ({reason}): download it "
                f"again; {self.where}"
            ) from error


class Tar(Archive):
    """A tar archive, compressed or not."""

    format = "tar"

    def _index(self) -> None:
        with tarfile.open(self.name) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members.clear()  # headers of millions of files take gigabytes
                if member.islnk():
                    self._add(member.name, _normal(member.linkname))
                elif member.issym():
                    self._add(member.name, _target(member.name, member.linkname))
                elif member.isfile():
                    handle = (member.offset_data, member.sparse)
                    self._add(member.name, Member(member.offset_data, member.size, handle))
                elif member.isdir():
                    self._add(member.name, None)
            # tarfile treats truncation between two files, or a damaged header of a file, as the end
            # of the archive.
            file = cast(BinaryIO, archive.fileobj)
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if end != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end of the archive is missing")
            while file.read(1 << 20):  # up to the checksum
                pass

    @contextlib.contextmanager
    def _open_all(self) -> Iterator[Callable[[Member], IO[bytes]]]:
        with tarfile.open(self.name) as archive:

            def opened(member: Member) -> IO[bytes]:
                info = tarfile.TarInfo()
                info.size = member.size
                info.offset_data, sparse = member.handle
                if sparse is not None:
                    info.type, info.sparse = tarfile.GNUTYPE_SPARSE, sparse
                return cast(IO[bytes], archive.extractfile(info))

            yield opened


class Zip(Archive):
    """A zip archive."""

    format = "zip"

    def _index(self) -> None:
        with zipfile.ZipFile(self.name) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")
                if info.is_dir():
                    self._add(name, None)
                elif stat.S_ISLNK(info.external_attr >> 16):
                    target = archive.read(info)[:4096].decode()
                    self._add(name, _target(name, target))
                else:
                    self._add(name, Member(info.header_offset, info.file_size, info.filename))

    @contextlib.contextmanager
    def _open_all(self) -> Iterator[Callable[[Member], IO[bytes]]]:
        with zipfile.ZipFile(self.name) as archive:
            yield lambda member: archive.open(member.handle)


def open_source(name: str, where: str) -> Source:
    """Open the folder or archive of this name.

    Raises:
        DataError: It does not exist, cannot be read, or is damaged.
    """
    path = Path(name)
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return Folder(name, where)
        if not path.is_file():
            raise DataError(f"{path} is neither a folder nor a file: {where}")
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}: {where}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): {where}") from error
    return (Zip if start in (b"PK\3\4", b"PK\5\6") else Tar)(name, where)


def _normal(path: str) -> str:
    """Normalize a path inside the archive: "a/b" for "./a//b" and "/a/b", "" for ".".

    >>> [_normal(path) for path in ("./a//b", "/a/b/", ".", "a/../../b")]
    ['a/b', 'a/b', '', '../b']
    """
    path = posixpath.normpath(path.lstrip("/") or ".")
    return "" if path == "." else path


def _target(link: str, target: str) -> str:
    """Target of a symbolic link as a path in the archive; ".." begins one outside.

    >>> _target("data/old", "../new"), _target("data/old", "/mnt/new")
    ('new', '../mnt/new')
    """
    if target.startswith("/"):
        return ".." + target
    return _normal(posixpath.join(posixpath.dirname(_normal(link)), target))
