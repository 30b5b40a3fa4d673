"""Settings that differ, by name; numbers with which no run is possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments.checkpoint import CheckpointError, check_same
from sparse_flash.experiments.config import ModelConfig, TrainConfig
from sparse_flash.experiments.device import pick_device
from sparse_flash.experiments.recipes import path_x
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.train import train

from tests.experiments.conftest import tiny


def test_a_refusal_names_few_settings_the_task_first_and_the_ways_on():
    different = [f"{name}: 0 -> 1" for name in "abcdefgh"] + ["task.name: text -> listops"]
    words = (
        r"settings \(different: task.name: text -> listops; a: 0 -> 1; .*; e: 0 -> 1; and 3 more\)"
        r"\. To resume it, give its settings again; .* another folder with --out, or delete /runs/x"
    )
    with pytest.raises(CheckpointError, match=words):
        check_same(Path("/runs/x/checkpoint.pt"), different)
    check_same(Path("/runs/x/checkpoint.pt"), [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "a seed must be 0 to 2.32 - 1, got -1"),
        ({"seed": 2**32}, "a seed must be"),
        ({"block": 4097}, "block must be 1 to 4096 tokens, got 4097"),
    ],
)
def test_runs_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny(), **settings)


def test_numbers_without_a_range():
    for name in ("lr", "clip"):
        for value in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"^{name} must be positive and finite, got"):
                TrainConfig(**{name: value})
    for name in ("warmup", "weight_decay"):
        with pytest.raises(ValueError, match=f"^{name} must be 0 or positive and finite, got -1"):
            TrainConfig(**{name: -1})
    for name in ("dim", "heads", "layers", "ffn"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            ModelConfig(**{name: 0})


def test_budgets(tmp_path):
    for budget in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="budget must be a positive number of seconds"):
            train(tiny(), tmp_path, "cpu", budget=budget)
        with pytest.raises(ValueError, match="budget must be a positive number of seconds"):
            follow(path_x(), tmp_path, "cpu", budget)
    assert not list(tmp_path.iterdir())


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="--device cuda:1: torch sees 1 GPU, cuda:0"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="torch sees 2 GPUs, cuda:0 to cuda:1"):
        pick_device("cuda:2")
    for name in ("", "mps", "meta", "cpu:0", "cuda:-1"):
        with pytest.raises(ValueError, match="There are auto, cpu, cuda, cuda:0"):
            pick_device(name)
