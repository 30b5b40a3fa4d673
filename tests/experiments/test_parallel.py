"""Several processes that train one model: as if it were one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments.data.dataset import Sampler, Split
from sparse_flash.experiments.parallel import Workers
from sparse_flash.experiments.train import train

SCRIPT = """
import glob, json, os, sys
from pathlib import Path
import torch.distributed as dist
from tests.experiments.conftest import tiny
from tests.experiments.test_parallel import without_dropout
from sparse_flash.experiments.train import train

if __name__ == "__main__":
    config = without_dropout(tiny(), sys.argv[3])
    result = train(config, Path(sys.argv[1]), sys.argv[3], budget=float(sys.argv[2]))
    Path(f"{sys.argv[1]}-worker{os.environ['RANK']}").write_text(json.dumps(result["metrics"]))
    dist.barrier()
    dist.destroy_process_group()
    threads = [Path(path).read_text() for path in glob.glob("/proc/self/task/*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # they would abort the exit
"""


DEVICES = [  # and how far apart losses may be
    ("cpu", 1e-4),
    pytest.param(
        *("cuda", 2e-2),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
        ],
    ),
]


def without_dropout(config, device):
    """On a GPU with heads as wide as the kernels need."""
    dim = 32 if device == "cuda" else config.model.dim
    return replace(config, model=replace(config.model, dim=dim, dropout=0.0))


def torchrun(tmp_path, workers, out, budget, device):
    """The metrics that each worker returns."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
    run = subprocess.run(
        [sys.executable, *launcher, str(script), str(out), str(budget), device],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(Path(f"{out}-worker{i}").read_text()) for i in range(workers)]


@pytest.mark.parametrize(("device", "tolerance"), DEVICES)
def test_two_workers_compute_what_one_does(tmp_path, tiny_config, tiny_data, device, tolerance):
    """Interrupted, too; and only one of them writes."""
    config = without_dropout(tiny_config, device)
    alone = train(config, tmp_path / "alone", device, tiny_data)["metrics"]
    first = torchrun(tmp_path, 2, tmp_path / "both", 1e-9, device)
    assert [metrics["steps"] for metrics in first] == [4, 4]  # they agree when they log
    both = torchrun(tmp_path, 2, tmp_path / "both", "inf", device)
    assert both[0] == both[1]
    assert both[0]["test_loss"] == pytest.approx(alone["test_loss"], rel=tolerance)
    if device == "cpu":
        for name in ("test_accuracy", "best_eval_accuracy"):
            assert both[0][name] == pytest.approx(alone[name], rel=tolerance)
    assert (both[0]["steps"], both[0]["workers"]) == (config.train.steps, 2)
    assert json.loads((tmp_path / "both" / "result.json").read_text())["metrics"] == both[0]
    assert len(list((tmp_path / "both").glob("events*"))) == 1


def test_workers_share_a_batch():
    split = Split(torch.arange(40, dtype=torch.uint8)[:, None], None, torch.arange(40))
    whole = Sampler(split, 8, seed=3).batch(2).labels
    parts = [Sampler(split, 8, 3, (rank, 4)).batch(2).labels for rank in range(4)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    with pytest.raises(ValueError, match=r"batch_size=8 must be a multiple of the 3 workers"):
        Sampler(split, 8, 3, (0, 3))


def test_each_worker_takes_its_own_gpu(monkeypatch):
    assert Workers.join(torch.device("cpu")).size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each worker takes a GPU of its own"):
        Workers.join(torch.device("cuda:1"))
