"""Training: learns, logs, resumes to the same numbers, stops clearly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments import train as module
from sparse_flash.experiments.checkpoint import CheckpointError
from sparse_flash.experiments.data.dataset import Sampler
from sparse_flash.experiments.logger import LogError
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.train import (
    CHECKPOINT,
    Interrupted,
    TrainingError,
    _Run,
    learning_rate,
    pick_device,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The child of the tests that kill: one thread, so that it computes exactly what this process does.
CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.experiments.test_train import slow_config
from sparse_flash.experiments.train import Interrupted, train
try:
    train(slow_config(), Path(sys.argv[1]), "cpu")
except Interrupted as stop:
    print(stop)
    sys.exit(143)
"""


def slow_config():
    from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig

    from tests.experiments.conftest import TINY

    return RunConfig(
        task=TINY,
        attention="local(6)",
        block=16,
        model=ModelConfig(dim=16, heads=2, layers=2, ffn=32),
        train=TrainConfig(steps=120, batch_size=8, eval_every=40, log_every=1, checkpoint_every=5),
    )


def weights(folder):
    return checkpoint.load(folder / CHECKPOINT)["model"]


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def of_the_best(config, data, folder):
    """Accuracy and loss on the test set by the checkpoint of the lowest validation loss."""
    model = Encoder.for_task(config.model, config.task, config.attention, config.block)
    model.load_state_dict(checkpoint.load(folder / CHECKPOINT)["best"])
    test = data.test.to("cpu")
    with torch.no_grad():
        (batch,) = test.batches(len(test))
        logits = model.eval()(batch.tokens, batch.lengths)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels).item()
    right = (logits.argmax(1) == batch.labels).double().mean().item()
    assert right != (logits.argmax(1) == 0).double().mean().item(), "it tells classes apart"
    return pytest.approx(right), pytest.approx(loss, rel=1e-4)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_learns_and_logs(tiny_config, tiny_data, tmp_path):
    config = replace(
        tiny_config, train=replace(tiny_config.train, steps=160, lr=1e-2, batch_size=16)
    )
    result = train(config, tmp_path, "cpu", tiny_data)
    losses = [value for _, value in scalars(tmp_path, "train/loss")]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2
    assert result == json.loads((tmp_path / "result.json").read_text())
    metrics = result["metrics"]
    assert (metrics["test_accuracy"], metrics["test_loss"]) == of_the_best(
        config, tiny_data, tmp_path
    )
    assert 0 < metrics["attention_share"] < 1
    assert metrics["peak_memory_MiB"] > 0
    assert 0 < metrics["density"] < 1
    assert result["machine"]["torch"] == torch.__version__
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    for tag in ("eval/accuracy", "eval/loss", "by_training_millisecond/eval/accuracy", "train/lr",
                "speed/tokens_per_second", "speed/attention_share", "speed/peak_memory_MiB",
                "final/test_accuracy"):  # fmt: skip
        assert tag in tags["scalars"], tag
    assert "mask" in tags["images"]
    assert "config/text_summary" in tags["tensors"]
    assert [step for step, _ in scalars(tmp_path, "eval/loss")] == list(range(8, 161, 8))
    for tag, column in (("loss", 2), ("accuracy", 3)):
        shown = scalars(tmp_path, f"by_training_millisecond/eval/{tag}")
        expected = [(round(1000 * row[1]), pytest.approx(row[column])) for row in result["curve"]]
        assert shown == expected
        assert len({step for step, _ in shown}) == 20  # each evaluation is a point of its own
    again = train(config, tmp_path, "cpu", tiny_data)  # it is finished: nothing is trained again
    assert again == result


def test_evaluations_of_one_millisecond_are_two_points():
    history = [("eval/loss", 0.5, 99, 0.0), ("by_training_millisecond/eval/loss", 0.5, 12, 0.0)]
    for seconds, expected in ((0.0119, 13), (0.0124, 13), (0.0136, 14), (70.0004, 70_000)):
        run = SimpleNamespace(
            log=SimpleNamespace(history=history), progress=SimpleNamespace(seconds=seconds)
        )
        assert _Run._milliseconds(run) == expected


@pytest.mark.parametrize("error", [ImportError("no triton"), torch.OutOfMemoryError("full")])
def test_a_peak_that_cannot_be_measured_is_left_out(error, monkeypatch):
    def fail(device):
        raise error

    monkeypatch.setattr(module, "matrix_peak", fail)
    with pytest.warns(UserWarning, match="the matrix peak was not measured: "):
        assert _Run._of_matrix_peak(SimpleNamespace(device=torch.device("cuda"))) == {}


def test_resuming_gives_the_same_numbers(tiny_config, tiny_data, tmp_path, monkeypatch):
    whole = train(tiny_config, tmp_path / "whole", "cpu", tiny_data)
    # Interrupt after step 15, when the last checkpoint is that of step 12.
    step = _Run._step

    def crash(self, bar):
        if self.progress.step == 15:
            raise MemoryError("crash")
        step(self, bar)

    monkeypatch.setattr(_Run, "_step", crash)
    with pytest.raises(MemoryError):
        train(tiny_config, tmp_path / "parts", "cpu", tiny_data)
    monkeypatch.setattr(_Run, "_step", step)
    torch.manual_seed(999)  # whatever happened in between
    parts = train(tiny_config, tmp_path / "parts", "cpu", tiny_data)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for name in ("test_accuracy", "test_loss", "best_eval_accuracy"):
        assert whole["metrics"][name] == parts["metrics"][name]
    for tag in ("train/loss", "eval/accuracy"):
        assert scalars(tmp_path / "whole", tag) == scalars(tmp_path / "parts", tag)


def test_training_begins_with_what_comes_first(tiny_config, tiny_data, tmp_path, monkeypatch):
    seen, batch = [], Sampler.batch

    def recorded(self, step):
        seen.append(len(self.split))
        return batch(self, step)

    monkeypatch.setattr(Sampler, "batch", recorded)
    data = replace(tiny_data, first=tiny_data.val, first_share=0.25)
    train(tiny_config, tmp_path / "run", "cpu", data)
    first = round(0.25 * tiny_config.train.steps)
    sizes = [len(data.val)] * first + [len(data.train)] * (tiny_config.train.steps - first)
    assert seen[1:] == sizes  # the first of all measures memory


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_runs_resume_to_the_same_numbers(number, code, tmp_path, one_thread):
    config = slow_config()
    whole = train(config, tmp_path / "whole", "cpu")
    folder = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (folder / CHECKPOINT).exists():
        assert child.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, number)
    output = child.communicate(timeout=60)[0].decode()
    assert child.returncode == code
    reached = checkpoint.load(folder / CHECKPOINT)["progress"]["step"]
    assert 0 < reached < config.train.steps
    if number == signal.SIGTERM:
        assert f"stopped at step {reached}; run the same command to resume" in output
    assert not (folder / "result.json").exists()
    resumed = train(config, folder, "cpu")
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert whole["metrics"]["test_loss"] == resumed["metrics"]["test_loss"]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no half-written files"


def test_sigterm_saves_and_stops(tiny_config, tiny_data, tmp_path, monkeypatch):
    step = _Run._step

    def terminate(self, bar):
        step(self, bar)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_Run, "_step", terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 5"):
        train(tiny_config, tmp_path, "cpu", tiny_data)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.load(tmp_path / CHECKPOINT)["progress"]["step"] == 5


def test_a_signal_ends_the_test_and_the_same_command_repeats_it(
    tiny_config, tiny_data, tmp_path, monkeypatch
):
    """The last checkpoint is there already: nothing waits for thousands of test examples."""
    whole = train(tiny_config, tmp_path / "whole", "cpu", tiny_data)
    finish = _Run._finish

    def terminate(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, stop)

    monkeypatch.setattr(_Run, "_finish", terminate)
    with pytest.raises(Interrupted, match="stopped during the test; run the same command"):
        train(tiny_config, tmp_path / "run", "cpu", tiny_data)
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(_Run, "_finish", finish)
    again = train(tiny_config, tmp_path / "run", "cpu", tiny_data)
    for name in ("steps", "test_loss", "test_accuracy"):
        assert again["metrics"][name] == whole["metrics"][name]


def poison(monkeypatch, step):
    """Put a NaN among the weights before that step."""
    original = _Run._step

    def poisoned(self, bar):
        if self.progress.step == step:
            with torch.no_grad():
                self.model.head.weight[0, 0] = torch.nan
        original(self, bar)

    monkeypatch.setattr(_Run, "_step", poisoned)


def test_nan_stops_the_run_and_spares_the_checkpoint(tiny_config, tiny_data, tmp_path, monkeypatch):
    poison(monkeypatch, step=13)
    with pytest.raises(TrainingError, match=r"at step 16 the loss is nan.* lower --train.lr"):
        train(tiny_config, tmp_path, "cpu", tiny_data)
    kept = checkpoint.load(tmp_path / CHECKPOINT)
    assert kept["progress"]["step"] == 12
    assert all(w.isfinite().all() for w in kept["model"].values())


def test_a_checkpoint_is_never_taken_of_nan(tiny_config, tiny_data, tmp_path, monkeypatch):
    """Also where checkpoints are more frequent than logged steps."""
    config = replace(
        tiny_config, train=replace(tiny_config.train, checkpoint_every=1, log_every=24)
    )
    poison(monkeypatch, step=3)
    with pytest.raises(TrainingError):
        train(config, tmp_path, "cpu", tiny_data)
    assert checkpoint.load(tmp_path / CHECKPOINT)["progress"]["step"] == 3


def test_foreign_and_damaged_checkpoints(tiny_config, tiny_data, tmp_path):
    train(tiny_config, tmp_path, "cpu", tiny_data)
    path = tmp_path / CHECKPOINT
    good = path.read_bytes()
    (tmp_path / "result.json").unlink()
    for bad, words in [
        (b"", "not a checkpoint of sparse_flash"),
        (b"PK\x03\x04 something else", "not a checkpoint of sparse_flash"),
        (good[:-100], "is damaged"),
        (good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], "is damaged"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=words):
            train(tiny_config, tmp_path, "cpu", tiny_data)
        assert path.read_bytes() == bad, "nothing is overwritten"
    path.write_bytes(good)
    other = replace(tiny_config, seed=1)
    with pytest.raises(CheckpointError, match=r"other settings \(different: seed: 0 -> 1\)"):
        train(other, tmp_path, "cpu", tiny_data)
    assert train(tiny_config, tmp_path, "cpu", tiny_data)["metrics"]["step_ms"] > 0


def test_damaged_result(tiny_config, tiny_data, tmp_path):
    result = train(tiny_config, tmp_path, "cpu", tiny_data)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable result .* delete it"):
        train(tiny_config, tmp_path, "cpu", tiny_data)
    (tmp_path / "result.json").unlink()
    again = train(tiny_config, tmp_path, "cpu", tiny_data)
    assert again["metrics"]["test_loss"] == result["metrics"]["test_loss"]


def test_settings_that_an_older_version_did_not_know(tiny_config, tiny_data, tmp_path):
    result = train(tiny_config, tmp_path, "cpu", tiny_data)
    path = tmp_path / "result.json"

    def without(group, name):
        """The settings of a result and of a checkpoint, from before there was such a one."""
        older = json.loads(json.dumps(result))
        del older["config"][group][name]
        path.write_text(json.dumps(older))
        state = checkpoint.load(tmp_path / CHECKPOINT)
        checkpoint.save(tmp_path / CHECKPOINT, state | {"config": older["config"]})

    without("model", "initial_span")  # is the default
    assert train(tiny_config, tmp_path, "cpu")["metrics"] == result["metrics"]
    path.unlink()
    again = train(tiny_config, tmp_path, "cpu", tiny_data)
    assert again["metrics"]["test_loss"] == result["metrics"]["test_loss"]
    without("train", "steps")  # is not
    with pytest.raises(
        CheckpointError, match=r"result.json .* \(different: train.steps: 5000 -> 24\)"
    ):
        train(tiny_config, tmp_path, "cpu", tiny_data)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint.pt .* \(different: train.steps: 5000 -> 24\)"
    ):
        train(tiny_config, tmp_path, "cpu", tiny_data)


def test_checkpoints_do_not_run_code(tmp_path):
    import hashlib
    import io

    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "exploded"),))

    buffer = io.BytesIO()
    torch.save({"model": Bomb()}, buffer)
    data = buffer.getvalue()
    path = tmp_path / "bomb.pt"
    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(data).digest() + data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from sparse_flash.experiments import checkpoint
path = Path(sys.argv[1])
checkpoint.save(path, {"value": torch.arange(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file grows beyond this
try:
    checkpoint.save(path, {"value": torch.zeros(1_000_000)})
except OSError as error:
    print(error)
"""


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert "could not write" in done.stdout
    assert "the old file is kept" in done.stdout
    assert checkpoint.load(path)["value"].tolist() == list(range(10))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_unwritable_log_folder(tiny_config, tiny_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LogError, match="cannot write to the log folder .* --out"):
        train(tiny_config, tmp_path / "file" / "run", "cpu", tiny_data)


def test_learning_rate(tiny_config):
    config = replace(tiny_config.train, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_compiled_training(tiny_config, tiny_data, tmp_path):
    config = replace(tiny_config, train=replace(tiny_config.train, steps=6, compile=True))
    eager = replace(tiny_config, train=replace(tiny_config.train, steps=6))
    eager_dropless, compiled_dropless = (
        replace(c, model=replace(c.model, dropout=0.0)) for c in (eager, config)
    )
    torch._dynamo.reset()
    a = train(compiled_dropless, tmp_path / "compiled", "cpu", tiny_data)
    b = train(eager_dropless, tmp_path / "eager", "cpu", tiny_data)
    assert a["metrics"]["test_loss"] == pytest.approx(b["metrics"]["test_loss"], rel=1e-3)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="no CUDA GPU can be used here"):
            pick_device("cuda")


def test_finished_runs_refuse_devices_that_do_not_exist(tiny_config, tiny_data, tmp_path):
    short = replace(tiny_config, train=replace(tiny_config.train, steps=2))
    result = train(short, tmp_path, "cpu", tiny_data)
    assert train(short, tmp_path, "cuda") == result  # as on the machine that trained it
    with pytest.raises(ValueError, match="unknown device 'gpu'; did you mean 'cuda'"):
        train(short, tmp_path, "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_training_on_a_gpu(tiny_config, tiny_data, tmp_path, graph):
    tiny_config = replace(tiny_config, model=replace(tiny_config.model, dim=32))  # for the kernels
    for attention in ("sdpa", "dense", tiny_config.attention):
        settings = replace(tiny_config.train, graph=graph)
        config = replace(tiny_config, attention=attention, train=settings)
        result = train(config, tmp_path / attention[:4], "cuda", tiny_data)
        assert graph or 0 < result["metrics"]["attention_share"] < 1
        assert not graph or "attention_share" not in result["metrics"]
        assert result["metrics"]["test_loss"] < 3


@pytest.mark.gpu
def test_what_cannot_be_captured_says_so(tiny_config, tiny_data, tmp_path):
    narrow = replace(tiny_config.model, dim=16, heads=2)  # head_dim 8: only the reference takes it
    with pytest.raises(RuntimeError, match="cannot become part of a CUDA graph"):
        train(replace(tiny_config, model=narrow), tmp_path / "run", "cuda", tiny_data)
