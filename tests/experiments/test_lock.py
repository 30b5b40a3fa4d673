"""One process at a time writes to a folder of results."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest
from sparse_flash.experiments import lra, recipes
from sparse_flash.experiments.bench import run as bench
from sparse_flash.experiments.bench import steps
from sparse_flash.experiments.compare import compare
from sparse_flash.experiments.config import compared
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.lock import LOCK, FolderInUseError, exclusive
from sparse_flash.experiments.logger import LogError
from sparse_flash.experiments.lra import LraConfig
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.train import train

from sparse_flash import cli

OWNER = """
import sys, time
from pathlib import Path
from sparse_flash.experiments.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that has a folder."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_at_once(owner, tiny_config, capsys, monkeypatch):
    folder, process = owner
    refused = (
        f"{folder} is in use by process {process.pid} on {platform.node()}, since .*"
        "choose another folder with --out"
    )
    before = sorted(folder.iterdir())
    for task in (ListOps, Pathfinder):
        monkeypatch.setattr(task, "load", lambda _: pytest.fail("data was loaded"))
    with pytest.raises(FolderInUseError, match=refused):
        train(tiny_config, folder, "cpu")
    with pytest.raises(FolderInUseError, match=refused):
        compare(compared(tiny_config, "sdpa", "dense"), folder, "cpu")
    with pytest.raises(FolderInUseError, match=refused):
        lra.lra(LraConfig(), folder, "cpu")
    with pytest.raises(FolderInUseError, match=refused):
        follow(recipes.path_256(), folder, "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(FolderInUseError, match=refused):
        bench.bench("quick", folder)
    with pytest.raises(FolderInUseError, match=refused):
        steps.bench_steps(("text",), ("eager",), folder)
    monkeypatch.undo()
    assert cli.main(["train", "listops-short", "--out", str(folder), "--device", "cpu"]) == 1
    assert f"is in use by process {process.pid}" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before, "nothing was written"


def test_after_a_kill_the_folder_is_free_at_once(owner):
    folder, process = owner
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    assert (folder / LOCK).exists(), "the file of a killed process stays"
    with exclusive(folder):
        assert f'"pid": {os.getpid()},' in (folder / LOCK).read_text()
    assert not (folder / LOCK).exists()


def test_only_one_thread_has_a_folder(tmp_path):
    """However they come and go: an owner that ends removes the file that others wait to lock."""
    inside, most, refused = [], [], []

    def work():
        for _ in range(100):
            try:
                with exclusive(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except FolderInUseError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) + len(refused) == 400


def test_the_file_of_an_owner_that_just_ended_is_not_the_lock(tmp_path, monkeypatch):
    """Between `open` and the lock, the owner ends and removes its file; another makes a new one."""
    lock, removed = fcntl.flock, []

    def late(handle, operation):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
            (tmp_path / LOCK).touch()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with exclusive(tmp_path), pytest.raises(FolderInUseError), exclusive(tmp_path):
        pytest.fail("two owners")


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(MemoryError), exclusive(tmp_path):
        raise MemoryError
    with exclusive(tmp_path):
        pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    words = f"{tmp_path} cannot be locked .No locks available"
    with pytest.warns(UserWarning, match=words), exclusive(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as where there is no such module
    with pytest.warns(UserWarning, match="cannot be locked"), exclusive(tmp_path):
        pass


def test_other_workers_need_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with exclusive(tmp_path):
        with pytest.raises(FolderInUseError), exclusive(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with exclusive(tmp_path):
            pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder, words = tmp_path / "file" / "run", "cannot write to the log folder .* --out"
    with pytest.raises(LogError, match=words), exclusive(folder):
        pass
