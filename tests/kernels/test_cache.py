"""The compile cache: other processes find its entries; damaged entries are compiled again."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from sparse_flash.kernels import cache

cute = pytest.importorskip("cutlass.cute")

# A host function that compiles in a moment stands for a kernel; it says when it is compiled.
SOURCE = """
import torch, cutlass.cute as cute
from cutlass import Int32
from sparse_flash.kernels import cache

@cute.jit
def fill(x: cute.Tensor, value: Int32):
    x[0] = value

def build():
    print("compiled", flush=True)
    like = cute.runtime.from_dlpack(x, enable_tvm_ffi=True)
    return cute.compile(fill, like, Int32(1), options="--enable-tvm-ffi --gpu-arch sm_90a")

x = torch.zeros(4, dtype=torch.int32)
cache.load_or_compile("fill", "key", build)(x, 7)
print(x[0].item())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Written once: the DSL reads its source, in processes that may start at any time."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def run(script):
    return functools.partial(start, script)


def start(script, folder, wait=True):
    """Run the script with this cache."""
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, cache.CACHE_VARIABLE: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return result(process) if wait else process


def result(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split(), err


def entries(folder):
    return list(folder.glob("*.so"))


def test_processes_compile_once(run, tmp_path):
    """Of three that come together, one compiles; a later one does not."""
    processes = [run(tmp_path / "cache", wait=False) for _ in range(3)]
    outputs = [result(p)[0] for p in processes]
    assert sorted(len(out) for out in outputs) == [1, 1, 2]
    assert all(out[-1] == "7" for out in outputs)
    assert len(entries(tmp_path / "cache")) == 1
    assert run(tmp_path / "cache")[0] == ["7"]


@pytest.fixture(scope="module")
def compiled():
    """The script's kernel, compiled in this process."""
    from cutlass import Int32

    def fill(x, value):
        x[0] = value

    fill.__annotations__ = {"x": cute.Tensor, "value": Int32}
    like = cute.runtime.from_dlpack(torch.zeros(4, dtype=torch.int32), enable_tvm_ffi=True)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(cute.jit(fill), like, Int32(1), options=options)


@pytest.fixture
def load(compiled, monkeypatch):
    """Load or compile with the cache in a folder: whether it compiled, and the warnings' texts."""

    def load_from(folder, key="key"):
        built = []
        if folder is not None:
            monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kernel = cache.load_or_compile("fill", key, lambda: built.append(1) or compiled)
        x = torch.zeros(4, dtype=torch.int32)
        kernel(x, 7)
        assert x[0] == 7
        return len(built), [str(warning.message) for warning in said]

    return load_from


def test_each_key_has_an_entry(load, tmp_path):
    assert [load(tmp_path, key)[0] for key in ("one", "other", "one")] == [1, 1, 0]
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_corrupt_entry_is_a_miss(load, tmp_path, damage):
    assert load(tmp_path) == (1, [])
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()  # this process has it loaded: the damaged one is another file
    path.write_bytes(
        {
            "truncated": content[:middle],
            "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    assert load(tmp_path) == (1, [])
    assert len(entries(tmp_path)) == 1
    assert load(tmp_path) == (0, [])


def test_folder_that_cannot_be_written(load, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    compilations, (said,) = load(folder)
    assert compilations == 1
    assert "every process will compile its own" in said
    assert cache.CACHE_VARIABLE in said


def refuse(code):
    def refusing(*_, **__):
        raise OSError(code, os.strerror(code))

    return refusing


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_kernels_are_kept_all_the_same(load, tmp_path, monkeypatch, code):
    monkeypatch.setattr("fcntl.flock", refuse(code))
    compilations, (said,) = load(tmp_path)
    assert compilations == 1
    assert "cannot be locked" in said
    assert cache.CACHE_VARIABLE in said
    assert load(tmp_path) == (0, [])


def missing(monkeypatch):
    return "/proc/nowhere"


def full(monkeypatch):
    monkeypatch.setattr("os.fsync", refuse(errno.ENOSPC))


def read_only(monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", refuse(errno.EROFS))


def homeless(monkeypatch):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (missing, "No such file"),
        (full, "No space left"),
        (read_only, "Read-only file system"),
        (homeless, "the user has no home folder"),
    ],
)
def test_folder_that_is_missing_full_or_read_only(load, tmp_path, monkeypatch, trouble, reason):
    folder = trouble(monkeypatch) or (None if trouble is homeless else tmp_path)
    compilations, (said,) = load(folder)
    assert compilations == 1
    assert "cannot be kept" in said
    assert reason in said
    assert "[Errno" not in said
    assert ("free space there, or set" in said) == (reason == "No space left")
    assert cache.CACHE_VARIABLE in said


def test_read_only_folder_is_read(load, tmp_path, monkeypatch):
    load(tmp_path)
    read_only(monkeypatch)
    assert load(tmp_path) == (0, [])


def test_errors_of_the_compiler_are_passed_on(tmp_path, monkeypatch):
    """They are none of the cache's: nothing is compiled again, and nothing said of folders."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    built = []

    def build():
        built.append(1)
        raise FileNotFoundError("ptxas")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileNotFoundError, match="ptxas"):
            cache.load_or_compile("fill", "key", build)
    assert built == [1]


def test_entry_that_does_not_load_is_said_and_not_compiled_twice(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "_load", lambda stem: None)
    monkeypatch.setattr(cache, "_store", lambda stem, compiled: None)
    built = []

    def build():
        built.append(len(built))
        return built

    with pytest.warns(UserWarning, match="the entry was written but cannot be loaded"):
        assert cache.load_or_compile("fill", "key", build) is built
    assert built == [0]


def test_machine_without_a_linker_compiles_once(tmp_path, monkeypatch):
    class Compiled:
        def export_to_c(self, path, function_name):
            cache.Path(path).write_bytes(b"object")

    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None)
    built = []
    with pytest.warns(UserWarning, match="no C compiler"):
        cache.load_or_compile("fill", "key", lambda: built.append(Compiled()) or built[-1])
    assert len(built) == 1


def test_location(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert cache.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "sparse_flash"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir().parts[-2:] == (".cache", "sparse_flash")


def test_everything_that_matters_is_in_the_name(monkeypatch):
    import importlib.metadata

    before = cache.fingerprint.__wrapped__()
    assert before == cache.fingerprint.__wrapped__()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    assert cache.fingerprint.__wrapped__() != before
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "other")
    assert cache.fingerprint.__wrapped__() != before
