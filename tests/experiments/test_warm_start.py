"""Beginning with another run's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments.checkpoint import CheckpointError
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.data.images import coordinates
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.train import train
from sparse_flash.experiments.warm_start import begin_with, find_checkpoint

SCHEDULE = TrainConfig(
    steps=2, batch_size=2, lr=1e-3, warmup=0, eval_every=2, log_every=1, checkpoint_every=2
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FLASH_CACHE_DIR", str(tmp_path / "cache"))


def run_of(order="raster", **model):
    task = Pathfinder(32, 6, train=8, val=4, test=4, order=order)
    return RunConfig(task, 128, ModelConfig(dim=16, heads=2, layers=1, ffn=16, **model), SCHEDULE)


def encoder(run, size, order):
    return Encoder(
        run.model, 256, 2, size * size, "block_local(128, 0)", 128, coordinates(order, size)
    )


@pytest.mark.parametrize("orders", [("raster", "raster"), ("raster", "morton")])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_positions_are_laid_side_by_side(tmp_path, orders, pooling):
    run = run_of(orders[0], pooling=pooling)
    train(run, tmp_path / "small", "cpu")
    small, large = encoder(run, 32, orders[0]), encoder(run, 64, orders[1])
    begin_with(small, str(tmp_path / "small"), coordinates(orders[0], 32))
    begin_with(large, str(tmp_path / "small" / "checkpoint.pt"), coordinates(orders[1], 64))
    first = int(pooling == "cls")
    grids = []
    for model, order, side in ((small, orders[0], 32), (large, orders[1], 64)):
        grid, where = torch.empty(side, side, 16), coordinates(order, side)
        grid[where[:, 0], where[:, 1]] = model.positions.detach()[first:]
        grids.append(grid)
    assert torch.equal(grids[1], grids[0].repeat(2, 2, 1))
    assert torch.equal(large.positions[:first], small.positions[:first])
    for a, b in zip(small.layers.parameters(), large.layers.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_carried_over(tmp_path):
    run = run_of()
    with pytest.raises(CheckpointError, match="no checkpoint .*: give the folder of a run"):
        train(replace(run, init=str(tmp_path / "nowhere")), tmp_path / "a", "cpu")
    train(run, tmp_path / "small", "cpu")
    wider = replace(run.model, ffn=32)
    with pytest.raises(CheckpointError, match="other sizes, .*feed_forward"):
        begin_with(encoder(replace(run, model=wider), 32, "raster"), str(tmp_path / "small"), None)
    with pytest.raises(CheckpointError, match="only those of square images"):
        begin_with(encoder(run, 64, "raster"), str(tmp_path / "small"), None)


def test_a_resumed_run_keeps_its_own_weights(tmp_path):
    run = run_of()
    train(run, tmp_path / "first", "cpu")
    other = replace(run, init=str(tmp_path / "first"), train=replace(SCHEDULE, steps=4))
    whole = train(other, tmp_path / "whole", "cpu")
    train(other, tmp_path / "parts", "cpu", budget=1e-9)
    parts = train(other, tmp_path / "parts", "cpu")
    assert parts["metrics"]["test_loss"] == whole["metrics"]["test_loss"]
    assert (
        whole["metrics"]["test_loss"] != train(run, tmp_path / "x", "cpu")["metrics"]["test_loss"]
    )


def test_the_folder_of_the_only_run_inside(tmp_path):
    run = run_of()
    train(run, tmp_path / "all" / "sdpa-seed0", "cpu")
    path = tmp_path / "all" / "sdpa-seed0" / "checkpoint.pt"
    for given in (path, path.parent, path.parent.parent):
        assert find_checkpoint(str(given)) == path
    (tmp_path / "all" / "b").mkdir()
    (tmp_path / "all" / "b" / "checkpoint.pt").write_text("")
    with pytest.raises(CheckpointError, match="has the runs .*/b, .*/sdpa-seed0: choose one"):
        find_checkpoint(str(tmp_path / "all"))
    with pytest.raises(CheckpointError, match="no checkpoint .*/c: give the folder"):
        find_checkpoint(str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="is not a checkpoint .* another run with --init"):
        train(replace(run, init=str(tmp_path / "all" / "b")), tmp_path / "d", "cpu")


def test_a_missing_run_is_noticed_before_data_is_made(tmp_path):
    run = replace(run_of(), init=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(run, tmp_path / "a", "cpu", lambda: pytest.fail("data was loaded"))
