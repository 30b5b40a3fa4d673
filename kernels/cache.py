"""Compiled kernels on disk: a process that finds one there starts in milliseconds, not seconds.

An entry is a shared library named after everything it depends on and after its own content, so that
a truncated or altered one is recognized and built again. Entries appear by renaming, whole; a lock
keeps processes that start together from compiling the same kernel. `load_or_make` holds what this
cache and that of data sets have in common.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sparse_flash.masks.files import atomic_write

CACHE_VARIABLE = "SPARSE_FLASH_CACHE_DIR"
ENTRY_POINT = "sparse_flash_kernel"
T = TypeVar("T")


def cache_dir() -> Path:
    """Where compiled kernels and data sets are kept.

    $SPARSE_FLASH_CACHE_DIR, or sparse_flash in the user's cache folder (XDG base directories).

    Raises:
        OSError: The variable is not set and the user has no home folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "sparse_flash"
    except RuntimeError as error:  # a container's user without a name
        raise FileNotFoundError(f"the user has no home folder: {error}") from error


def load_or_make(
    name: str,
    load: Callable[[], T | None],
    make: Callable[[], T],
    store: Callable[[T], T],
    contents: str,
    otherwise: str,
) -> T:
    """What `load()` finds in the cache; if it finds nothing, what `make()` makes for the cache.

    One process at a time makes an entry; the others wait for it and load it. The cache is never
    worth the result: if its folder is missing, full, read-only or on a file system without locks,
    one warning names the reason, and the new entry is returned. Errors of `make` propagate.

    Args:
        name: Path of the entry's lock file below `cache_dir()`, without the suffix ".lock".
        load: Returns the entry, or None if there is none that is whole.
        make: Makes the entry, in the absence of one.
        store: Writes the new entry, and returns the one to use: the new one, or a reloaded one.
        contents: Contents of the cache, for the warning: "compiled kernels".
        otherwise: Consequence of having no cache: "every process will compile its own".

    Raises:
        Exception: What `make` raises. OSErrors of `load` and `store` become a warning.
    """
    found = _without_failing(load)
    if found is not None:
        return found
    with locked(lambda: cache_dir() / f"{name}.lock") as problem:
        found = _without_failing(load)  # another process may have been quicker
        if found is not None:
            return found
        made = make()
        try:
            kept = store(made)
        except OSError as error:
            _warn(f"{contents} cannot be kept", error, otherwise, "that can be written")
            return made
    if problem is not None:
        cost = "processes that start together may each do the same work"
        _warn(f"{contents} cannot be locked", problem, cost, "on a file system with locks")
    return kept


def load_or_compile(name: str, key: str, build: Callable[[], Any]) -> Callable[..., None]:
    """The kernel from the cache, or built by `build()` (a DSL compilation) and then cached.

    Args:
        name: Name of the kernel, for people who look into the folder.
        key: Everything that it depends on besides versions and sources, such as its config.
        build: Compiles it.

    A folder that cannot be written costs a warning: the kernel is compiled for this process alone.
    """
    stem = f"{name}-{_digest(key.encode(), fingerprint().encode())}"

    def store(compiled: Any) -> Callable[..., None]:
        _store(stem, compiled)
        # A loaded kernel also has less call overhead than the DSL compiler's result.
        found = _load(stem)
        if found is None:
            raise OSError("the entry was written but cannot be loaded")
        return found

    return load_or_make(
        stem,
        lambda: _load(stem),
        build,
        store,
        "compiled kernels",
        "every process will compile its own",
    )


@functools.cache
def fingerprint() -> str:
    """What all kernels depend on: the machine, the compiler, its toolkit, our sources."""
    facts = [platform.machine()]
    for package in ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi"):
        try:
            facts.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            facts.append(f"{package}=none")
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return _digest(*(fact.encode() for fact in facts), *(path.read_bytes() for path in sources))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]


def _load(stem: str) -> Callable[..., None] | None:
    """The entry of this name; None where there is none that is whole."""
    import tvm_ffi

    for path in cache_dir().glob(f"{stem}-*.so"):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a folder mounted noexec
            if path.stem.removeprefix(f"{stem}-") == _digest(path.read_bytes()):
                for library in _runtime_libraries():
                    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
                return tvm_ffi.load_module(str(path))[ENTRY_POINT]
            path.unlink()
    return None


def _store(stem: str, compiled: Any) -> None:
    """Export the kernel, link it, and put it into the cache."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        compiled.export_to_c(str(source), function_name=ENTRY_POINT)
        _link(source, target)
        content = target.read_bytes()
    with atomic_write(cache_dir() / f"{stem}-{_digest(content)}.so") as file:
        file.write(content)


def _link(source: Path, target: Path) -> None:
    linker = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if linker is None:
        raise OSError("no C compiler (cc, gcc, clang) to link them with")
    command = [linker, "-shared", "-o", str(target), str(source)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if run.returncode:
        raise OSError(f"{linker} could not link them: {run.stderr.strip()[-200:]}")


def _runtime_libraries() -> list[str]:
    """The DSL's runtime, found without importing the DSL, which would take a second."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for flavor in ("cu13", "cu12"):  # as the DSL itself prefers
        for root in roots:
            found = root / flavor / "lib" / "libcute_dsl_runtime.so"
            if found.exists():
                return [str(found)]
    return []


@contextlib.contextmanager
def locked(path: Callable[[], Path]) -> Iterator[OSError | None]:
    """Hold the lock of the file `path()`, made if need be; yield the error if it cannot be had."""
    with contextlib.ExitStack() as stack:
        problem: OSError | None = None
        try:
            path().parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path().open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        except OSError as error:
            problem = error
        yield problem


def _without_failing(load: Callable[[], T | None]) -> T | None:
    """What `load()` returns; None if files cannot be read."""
    try:
        return load()
    except OSError:
        return None


def _warn(trouble: str, error: OSError, cost: str, folder: str) -> None:
    try:
        where = str(cache_dir())
    except OSError:
        where = "the user's cache folder"
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = "free space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    warnings.warn(
        f"{trouble} in {where} ({reason}): {cost}; {full}set {CACHE_VARIABLE} to a folder {folder}",
        stacklevel=4,
    )
