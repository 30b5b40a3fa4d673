"""Registries: named objects of this package and of installed packages with entry points."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

from sparse_flash.masks import suggestions

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dict of named objects that falls back on the entry points of a group.

    An installed package adds names in its pyproject.toml, without any change here:

        [project.entry-points."sparse_flash.masks"]
        banded = "my_package.patterns:banded"

    A registered name takes precedence over an entry point. The package is imported at the first
    lookup of its name.

    Args:
        what: Noun for messages: "pattern", "task".
        group: Group of entry points.

    Raises:
        KeyError: On lookup: the name is not registered.
        ValueError: On lookup: the package of the entry point cannot be imported.

    >>> numbers = Registry("number", "example.numbers")
    >>> numbers["one"] = 1
    >>> numbers["one"], "two" in numbers, numbers.names()
    (1, False, ['one'])
    """

    def __init__(self, what: str, group: str) -> None:
        super().__init__()
        self.what, self.group = what, group

    def installed(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages by name, not imported."""
        return _installed(self.group, tuple((path, _changed(path)) for path in sys.path))

    def names(self) -> list[str]:
        """All names, registered ones first."""
        return [*self, *sorted(self.installed().keys() - self.keys())]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.installed()

    def __missing__(self, name: str) -> T:
        point = self.installed().get(name)
        if point is None:
            raise KeyError(name)
        try:
            self[name] = point.load()
        except Exception as error:
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            raise ValueError(
                f"the {self.what} {name!r}{package} cannot be loaded from {point.value}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return self[name]


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them.

    >>> suggestion("lokal", ["local", "full"])
    "did you mean 'local'?"
    >>> suggestion("x", ["local", "full"])
    'known are full, local'
    """
    return suggestions.of_known(name, known)


@functools.lru_cache(maxsize=16)
def _installed(group: str, places: tuple[tuple[str, int], ...]) -> dict[str, EntryPoint]:
    """Read once for each state of the import path: a search takes 10 ms."""
    del places  # only a key
    return {point.name: point for point in entry_points(group=group)}


def _changed(folder: str) -> int:
    """The time of the last change of a folder, which an installation changes; ns, or 0."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0
