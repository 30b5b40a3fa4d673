"""One process at a time writes to a folder of results.

The lock belongs to the process: the operating system releases it however the process ends, so that
a run can be resumed at once, also after SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparse_flash.experiments.logger import make_writable
from sparse_flash.experiments.parallel import is_first_worker

LOCK = "run.lock"


class FolderInUseError(OSError):
    """Another process writes to this folder."""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same folder from running until the block ends.

    A second one is refused at once; it does not wait. The file run.lock names the owner while the
    block runs. It is left behind by a killed process, and then means nothing.

    Args:
        folder: Folder of results, of one run or of several; made if missing.

    Raises:
        FolderInUseError: Another process, or another thread of this one, has the folder.
        LogError: The folder cannot be made or written.

    Under torchrun only the first worker, which writes, takes the lock. Where the file system or the
    operating system has no locks, a warning says so, and the block runs without one.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with exclusive(folder), exclusive(folder):  # doctest: +IGNORE_EXCEPTION_DETAIL
    ...     pass
    Traceback (most recent call last):
    FolderInUseError: ... is in use by process ...
    >>> with exclusive(folder):
    ...     pass
    """
    if not is_first_worker():
        yield
        return
    make_writable(folder)
    path = folder / LOCK
    handle = _acquire(path)
    try:
        owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is locked: nobody else's is removed
            path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int:
    """An open, locked file descriptor of the file that has this name."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except BlockingIOError:
            owner = _owner(path)
            os.close(handle)
            raise FolderInUseError(
                f"{path.parent} is in use by {owner}: two runs would overwrite each other's files. "
                "Wait until it ends, stop it, or choose another folder with --out"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): nothing keeps a second "
                "process from writing to it",
                stacklevel=5,
            )
            return handle
        # An owner that ended since `open` has removed its file: the name may be of another one now.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock a file, or raise BlockingIOError at once; OSError where there are no locks."""
    try:
        import fcntl
    except ImportError as error:  # no Unix
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it has just begun, or just ended
        return "another process"
