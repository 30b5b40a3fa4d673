"""The compile cache: found again, by other processes too; what is broken is made anew."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import warnings

import pytest
from sparse_flash.kernels import cache

pytest.importorskip("cutlass")

# A host function that compiles in a moment stands for a kernel; it says when it is compiled.
SOURCE = """
import sys, torch, cutlass.cute as cute
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
cache.load_or_compile("fill", sys.argv[1], build)(x, 7)
print(x[0].item())
"""


# Runs other code, its first argument, and then the script whose path is the second.
PRELUDE = """
import runpy, sys
code = sys.argv[1]
del sys.argv[:2]
exec(code)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Written once: the DSL reads what it compiles, in processes that may start at any time."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def run(script):
    return functools.partial(start, script)


def start(script, folder, key="key", wait=True, before=""):
    """Run the script with this cache; `before` is code that the process executes first."""
    process = subprocess.Popen(
        [sys.executable, *(["-c", PRELUDE, before] if before else []), str(script), key],
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


def test_second_process_compiles_nothing(run, tmp_path):
    assert run(tmp_path / "cache")[0] == ["compiled", "7"]
    assert run(tmp_path / "cache")[0] == ["7"]
    assert len(entries(tmp_path / "cache")) == 1
    assert run(tmp_path / "cache", "other")[0] == ["compiled", "7"]
    assert len(entries(tmp_path / "cache")) == 2


def test_concurrent_processes_compile_once(run, tmp_path):
    processes = [run(tmp_path / "cache", wait=False) for _ in range(3)]
    outputs = [result(p)[0] for p in processes]
    assert sorted(len(out) for out in outputs) == [1, 1, 2]
    assert all(out[-1] == "7" for out in outputs)


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_corrupt_entry_is_a_miss(run, tmp_path, damage):
    run(tmp_path / "cache")
    (path,) = entries(tmp_path / "cache")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    assert run(tmp_path / "cache")[0] == ["compiled", "7"]
    assert len(entries(tmp_path / "cache")) == 1
    assert run(tmp_path / "cache")[0] == ["7"]


def test_folder_that_cannot_be_written(run, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    out, err = run(folder)
    assert out == ["compiled", "7"]
    assert "every process will compile its own" in err
    assert cache.CACHE_VARIABLE in err


NO_LOCKS = """
import fcntl
def flock(*_): raise OSError({code}, "no locks here")
fcntl.flock = flock
"""
FULL = """
import os
def fsync(_): raise OSError(28, "No space left on device")
os.fsync = fsync
"""
READ_ONLY = """
import tempfile
def refuse(*_, **__): raise OSError(30, "Read-only file system")
tempfile.mkstemp = refuse
"""
NO_HOME = """
import os, pathlib
os.environ.pop("SPARSE_FLASH_CACHE_DIR")
os.environ.pop("XDG_CACHE_HOME", None)
def nobody(*_): raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = nobody
"""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_kernels_are_kept_all_the_same(run, tmp_path, code):
    out, err = run(tmp_path / "cache", before=NO_LOCKS.format(code=code))
    assert out == ["compiled", "7"]
    assert err.count("UserWarning") == 1
    assert "cannot be locked" in err
    assert cache.CACHE_VARIABLE in err
    out, err = run(tmp_path / "cache", before=NO_LOCKS.format(code=code))
    assert (out, err.count("UserWarning")) == (["7"], 0)


@pytest.mark.parametrize(
    ("folder", "before", "reason"),
    [
        ("/proc/nowhere", "", "No such file"),
        ("cache", FULL, "No space left"),
        ("cache", READ_ONLY, "Read-only file system"),
        ("cache", NO_HOME, "the user has no home folder"),
    ],
)
def test_folder_that_is_missing_full_or_read_only(run, tmp_path, folder, before, reason):
    out, err = run(tmp_path / folder, before=before)
    assert out == ["compiled", "7"]
    assert err.count("UserWarning") == 1
    assert "cannot be kept" in err
    assert reason in err
    assert "[Errno" not in err
    assert ("free space there, or set" in err) == (reason == "No space left")
    assert cache.CACHE_VARIABLE in err


def test_read_only_folder_is_read(run, tmp_path):
    run(tmp_path / "cache")
    out, err = run(tmp_path / "cache", before=READ_ONLY)
    assert (out, err.count("UserWarning")) == (["7"], 0)


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
