"""The command line: its output, exit codes, and messages about mistakes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from sparse_flash.experiments import registry
from sparse_flash.experiments.stopping import Interrupted, stop_on_signals
from sparse_flash.masks.mask import PATTERNS

import sparse_flash
from sparse_flash import cli, info
from sparse_flash.command import main
from sparse_flash.show import list_of_masks
from tests.test_import_time import cpu_seconds

TINY = ["--task.train", "60", "--task.val", "20", "--task.test", "20", "--task.max-length", "40",
        "--task.min-length", "4", "--task.max-depth", "4", "--train.steps", "4",
        "--train.batch-size", "4", "--model.dim", "8", "--model.layers", "1",
        "--device", "cpu"]  # fmt: skip


@pytest.fixture
def run(capsys):
    """The exit code, stdout and stderr of a command line."""

    def run(*words):
        try:
            code = main(list(words))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ends_with(monkeypatch, run):
    """What becomes of an error in a command."""

    def ends_with(error):
        def fail(_):
            raise error

        monkeypatch.setattr(cli, "run", fail)
        return run("mask")

    return ends_with


def python(*words, **options):
    command = [sys.executable, "-m", "sparse_flash", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_python_dash_m_and_version(run):
    done = python("--version")
    assert (done.returncode, done.stdout) == (0, f"sparse-flash {sparse_flash.__version__}\n")
    assert run("-V") == (0, done.stdout, "")


def test_info(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.pt").write_bytes(bytes(2**20))
    code, out, _ = run("info")
    assert code == 0
    versions = (sparse_flash.__version__, torch.__version__, "CuTe DSL")
    for words in (*versions, "reference", "sm90", "sm80"):
        assert words in out
    assert "data sets         1 files, 1.0 MiB" in out
    assert f"{tmp_path} (SPARSE_FLASH_CACHE_DIR moves it)" in out
    assert ("cannot run: it needs a Hopper GPU" in out) != torch.cuda.is_available()
    assert run("info", "--help")[0] == 0


def test_info_says_which_implementation_runs_and_what_is_missing(monkeypatch):
    found = info.implementations()
    assert [why for why in found.values() if why.startswith("runs")] == [
        'runs: impl="auto" takes it'
    ]
    monkeypatch.setattr(info, "_installed", lambda package: False)
    extras = info.extras()
    assert extras["hub"] == "misses datasets: pip install 'sparse-flash[hub]'"
    assert "dev" not in extras
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", "/proc/version/none")
    assert "cannot be written" in info.caches()["folder"]


def test_mask_list_has_every_pattern(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run("mask", "list")
    assert code == 0
    for name in PATTERNS:
        assert re.search(rf"^  {name}\(", out, re.MULTILINE), name
    assert re.search(r"^  local\(window\) +allowed\(q, kv\) = ", out, re.MULTILINE)
    assert "random_blocks(keep, block=128, seed=0)" in out
    assert max(map(len, out.splitlines())) <= 100
    assert list_of_masks() == out.rstrip("\n")


@pytest.mark.parametrize("words", [[], ["mask"], ["train"], ["compare"]])
def test_help_of_groups(run, words):
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert out.startswith(f"usage: {' '.join(['sparse-flash', *words])} [-h] ")
    assert "Args:" not in out
    for name in {"train": registry.TASKS, "mask": ("show", "list")}.get("".join(words), ()):
        assert f"  {name} " in out
    assert ("--version" in out) == (not words)
    assert run(*words) == (2, "", out)  # no command: the same, as an error


@pytest.mark.slow
def test_help_takes_at_most_1_5_times_import_torch():
    levels = ([], ["train", "listops"], ["compare", "lra"], ["bench"])
    script = "sys; sys.argv[1:] = {}; from sparse_flash.command import main; main()"
    found = {}
    for _ in range(3):  # another chance for a host whose clock changes
        torch_alone = cpu_seconds("torch")
        for level in levels:
            taken = cpu_seconds(script.format([*level, "--help"])) / torch_alone
            found[" ".join(level)] = min(taken, found.get(" ".join(level), taken))
        if max(found.values()) <= 1.5:
            return
    pytest.fail(f"times import torch: {found}")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("trian", 2, "unknown command 'trian'; did you mean 'train'? There are: mask, train"),
        ("show", 2, "unknown command 'show'; did you mean 'mask show'?"),
        ("version", 2, "unknown command 'version'; did you mean '--version'?"),
        ("help", 2, "did you mean '--help'?"),
        ("--device cpu", 2, "the option --device must follow a command: sparse-flash COMMAND"),
        ("train listop", 1, "unknown task 'listop'; did you mean 'listops'?"),
        ("train --device cpu", 2, "must follow a task: sparse-flash train TASK --device"),
        ("train listops --trian.lr 1", 2, "--train.lr FLOAT"),
        ("train listops --seed abc", 2, "Error parsing --seed"),
        ("bench --length 4k", 2, "Error parsing --length: a whole number is needed, got '4k'"),
        ("info all", 2, "Unrecognized options: all"),
        ("train listops --train.lr -1", 1, "lr must be positive and finite, got -1.0"),
        ("train listops --train.lr nan", 1, "lr must be positive and finite, got nan"),
        ("train listops --train.warmup -1", 1, "warmup must be 0 or positive and finite, got -1"),
        ("train listops --train.steps 0", 1, "steps must be at least 1, got 0"),
        ("train listops --model.heads 0", 1, "heads must be at least 1, got 0"),
        ("train listops --model.dim 7", 1, "dim=7 must be a multiple of heads=2"),
        ("train listops --block 0", 1, "block must be 1 to 4096 tokens, got 0"),
        ("train listops --seed -3", 1, "a seed must be 0 to 2^32 - 1, got -3"),
        ("train path-x --seed -3", 1, "a seed must be 0 to 2^32 - 1, got -3"),
        ("train path-x --budget 0", 1, "budget must be a positive number of seconds, got 0.0"),
        ("compare listops --seeds 1 -3", 1, "a seed must be 0 to 2^32 - 1, got -3"),
        ("compare lra --seeds -3", 1, "a seed must be 0 to 2^32 - 1, got -3"),
        ("train listops --task.train 0", 1, "got train=0, val=2000, test=2000"),
        ("train listops --task.max-length 3", 1, "got min_length=500, max_length=3"),
        ("train pathfinder --task.val 0", 1, "at least one image in each split, got train="),
        ("train listops --device gpu", 1, "unknown device 'gpu'; did you mean 'cuda'?"),
        ("train listops --device cuda:x", 1, "unknown device 'cuda:x'; did you mean 'cuda'?"),
        ("train listops --device tpu", 1, "unknown device 'tpu'. There are auto, cpu, cuda"),
        ("train listops --attention standrd", 1, "'standrd'; did you mean 'standard'?"),
        ("train listops --attention linformer", 1, "a size of at least 1, as in linformer(256)"),
        ("train listops --device cpu --attention flex:causal()", 1, "has no backward pass there"),
        ("compare listops --device cpu --attentions flex:causal() sdpa", 1, "no backward pass"),
        ("compare lra --device cpu --attentions flex:causal()", 1, "has no backward pass there"),
        ("mask show sdpa", 1, "it is an attention, not a mask; full() is the mask that"),
        ("mask show dense", 1, "did you mean 'full', as in full()"),
        ("mask show standrd", 1, "did you mean 'standard'? That is an attention, not a"),
        ("mask show loca(3)", 1, "did you mean 'local'?"),
        ("mask show local(3) --length 100000000", 1, "choose a --length up to 1048576"),
        ("mask show local(3) --length 100000000 --block 1024", 1, "8388608"),
        ("mask show local(3) --length 0", 1, "--length must be at least 1 token, got 0"),
        ("mask show local(3) --block 0", 1, "--block must be at least 1 token, got 0"),
        ("bench --rounds 0", 1, "rounds must be at least 1, got 0"),
        ("bench --length 512", 1, "are those of --mask SPEC"),
        ("bench --mask sdpa", 1, "it is an attention, not a mask"),
        ("bench --mask local(3) --length 0", 1, "--length must be at least 1, got 0"),
        ("bench --mask local(3) --length 100000000", 1, "choose a --length up to"),
        ("bench --mask local(3) --heads 3 --kv-heads 2", 1, "--kv-heads 2 must divide --heads 3"),
        ("bench --mask documents((9,7)) --length 5", 1, "is made for q_len=16, not 5"),
        ("train listops --out /dev/null", 1, "cannot write to the log folder /dev/null"),
        ("train listops --init /none", 1, "no checkpoint /none: give the folder of a run"),
        ("train text --task.source hf:", 1, "needs the name of a data set after 'hf:'"),
    ],
)  # fmt: skip
def test_mistakes(run, words, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*words.split(" "))
    err = " ".join(err.replace("│", " ").split())  # as one line, without tyro's box
    assert found == code
    assert message in err
    for internal in ("Traceback", "tyro", "TrainConfig", "dummy", "ListOps("):
        assert internal not in err


def test_runs_have_folders_by_task_attention_and_seed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("train", "listops-short", *TINY, "--attention", "local(5)")
    code, out, err = run(*command)
    assert code == 0
    (folder,) = (tmp_path / "runs/train/listops-short").iterdir()
    assert folder.name == "local(5)-seed0"
    assert f"--logdir '{folder.relative_to(tmp_path)}'" in out  # quoted for a shell
    assert "resuming" not in err
    assert "holds this run, finished: nothing to train" in run(*command)[2]

    code, _, err = run(*command, "--train.steps", "6")
    assert code == 1
    assert (
        "other settings (different: train.steps: 4 -> 6). To resume it, give its settings again; to"
        in err
    )
    assert f"or delete {folder.relative_to(tmp_path)}" in err

    (folder / "result.json").unlink()  # stopped before the end, as far as one can tell
    code, _, err = run(*command)
    assert code == 0
    assert f"resuming at step 4 of 4 from {folder.relative_to(tmp_path)}/checkpoint.pt" in err

    folder.rename(tmp_path / "old")  # the folder of an older version
    (tmp_path / "runs/train/listops-short").rmdir()
    (tmp_path / "old").rename(tmp_path / "runs/train/listops-short")
    assert "holds this run, finished" in run(*command)[2]
    assert run(*command, "--seed", "1")[0] == 0
    assert (tmp_path / "runs/train/listops-short" / folder.name.replace("seed0", "seed1")).exists()


def test_ctrl_c_saves_and_exits_with_130(run, tmp_path, monkeypatch):
    from sparse_flash.experiments.train import _Run

    step = _Run._step

    def interrupt(self, bar):
        step(self, bar)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Run, "_step", interrupt)
    command = ("train", "listops-short", *TINY, "--out", str(tmp_path / "run"))
    code, _, err = run(*command)
    assert code == 130
    assert "sparse-flash: stopped at step 2; run the same command to resume" in err
    monkeypatch.setattr(_Run, "_step", step)
    code, _, err = run(*command)
    assert code == 0
    assert "resuming at step 2 of 4" in err


def test_stops(ends_with):
    assert ends_with(KeyboardInterrupt()) == (130, "", "sparse-flash: interrupted\n")
    assert ends_with(Interrupted("saved", [signal.SIGTERM])) == (143, "", "sparse-flash: saved\n")
    assert ends_with(Interrupted("saved"))[0] == 143  # another worker received the signal
    assert ends_with(Interrupted("saved", [signal.SIGINT]))[0] == 130


def test_a_second_ctrl_c_stops_at_once():
    with stop_on_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt, match="the last checkpoint is kept"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_broken_pipe_is_silent():
    command = f"{sys.executable} -m sparse_flash mask list | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("Patterns.")
    assert done.returncode in (0, 141)  # 0 where all was written before the reader ended


def test_a_reader_that_has_gone(ends_with, monkeypatch):
    silenced = []
    monkeypatch.setattr("sparse_flash.command._silence_stdout", lambda: silenced.append(True))
    assert ends_with(BrokenPipeError()) == (141, "", "")
    assert silenced


def test_files_and_memory(ends_with):
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")
    assert ends_with(missing)[2] == "sparse-flash: /x: No such file or directory\n"
    assert "Free space there, or choose" in ends_with(OSError(errno.ENOSPC, "No space left"))[2]
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")):
        code, _, err = ends_with(error)
        assert code == 1
        assert "Lower the batch size or the length" in err
    module = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert "pip install 'sparse-flash[plot]'" in ends_with(module)[2]


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), RuntimeError("x")])
def test_errors_of_the_program_show_a_traceback(ends_with, error):
    with pytest.raises(type(error)):
        ends_with(error)


def test_a_slip_in_the_program_is_no_mistake_of_the_user(run, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda words: cli.check_length("a", 1))  # TypeError of `<`
    with pytest.raises(TypeError, match="'<' not supported"):
        run("mask")
    monkeypatch.setattr(cli, "run", lambda words: int("x"))  # not raised by us
    with pytest.raises(ValueError, match="invalid literal"):
        run("mask")


def test_warnings_are_one_line(monkeypatch, run):
    shown = []

    def warn(_):
        shown.append(warnings.formatwarning(UserWarning("the cache is full"), UserWarning, "a", 1))

    before = warnings.formatwarning
    monkeypatch.setattr(cli, "run", warn)
    assert run("mask")[0] == 0
    assert shown == ["sparse-flash: warning: the cache is full\n"]
    assert warnings.formatwarning is before
