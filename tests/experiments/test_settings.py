"""Settings that differ, by name; numbers with which no run is possible."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments import checkpoint
from sparse_flash.experiments.checkpoint import CheckpointError, check_same
from sparse_flash.experiments.config import ModelConfig, TrainConfig
from sparse_flash.experiments.defaults import completed
from sparse_flash.experiments.device import pick_device
from sparse_flash.experiments.provenance import differences
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


def _without(settings, *path):
    """A copy of plain settings without one of them; "*" stands for each of a list."""
    name, *rest = path
    if name == "*":
        return [_without(each, *rest) for each in settings]
    if not rest:
        return {key: value for key, value in settings.items() if key != name}
    return settings | {name: _without(settings[name], *rest)}


RUNS = {"single": tiny(), "curriculum": path_x()}
NEWER = [
    ("single", ("model", "softcap"), {"model": replace(tiny().model, softcap=3.0)}),
    ("single", ("train", "clip"), {"train": replace(tiny().train, clip=3.0)}),
    ("single", ("task", "max_args"), {"task": replace(tiny().task, max_args=3)}),
    ("single", ("init",), {"init": "elsewhere"}),
    ("curriculum", ("model", "softcap"), {"model": replace(path_x().model, softcap=3.0)}),
    ("curriculum", ("clip",), {"clip": 3.0}),
    ("curriculum", ("stages", "*", "evaluations"), {"stages": path_x().stages[:1]}),
]


@pytest.mark.parametrize(("run", "path", "changes"), NEWER)
def test_a_setting_that_did_not_exist_has_its_default(run, path, changes):
    """Another value is a difference, and so is a setting that only the record has."""
    mine = RUNS[run]
    if path[-1] in ("max_args", "evaluations"):  # ours is not the default
        task, stages = getattr(mine, "task", None), getattr(mine, "stages", ())
        mine = (
            replace(mine, task=replace(task, max_args=type(task).max_args))
            if task
            else replace(mine, stages=tuple(replace(s, evaluations=20) for s in stages))
        )
    saved = _without(mine.record, *path)
    assert differences(saved, mine.record)
    assert differences(completed(saved, mine), mine.record) == []
    other = replace(mine, **changes)
    (line,) = differences(completed(saved, other), other.record)
    assert line.startswith(".".join(path[:2] if run == "single" else path[:1]))
    (line,) = differences(completed(mine.record | {"newer": 1}, mine), mine.record)
    assert line == "newer: 1 -> nothing"


def test_a_setting_without_a_default_stays_missing():
    saved = _without(path_x().record, "stages", "*", "lr")
    (line,) = differences(completed(saved, path_x()), path_x().record)
    assert line.startswith("stages: ")
    (line,) = differences(completed(_without(path_x().record, "stages"), path_x()), path_x().record)
    assert line.startswith("stages: nothing -> ")


def test_older_checkpoints_resume(tmp_path):
    """Of both kinds of runs, as long as the setting has its default."""
    settings = tiny()
    settings = replace(settings, train=replace(settings.train, steps=8))
    train(settings, tmp_path / "single", "cpu", budget=1e-9)
    path = tmp_path / "single" / "checkpoint.pt"
    state = checkpoint.load(path)
    state["config"] = _without(state["config"], "model", "softcap")
    checkpoint.save(path, state)
    (tmp_path / "single" / "result.json").unlink()
    capped = replace(settings, model=replace(settings.model, softcap=3.0))
    with pytest.raises(CheckpointError, match=r"different: model.softcap: 0.0 -> 3.0\)"):
        train(capped, tmp_path / "single", "cpu")
    assert train(settings, tmp_path / "single", "cpu")["metrics"]["steps"] == 8
    config = _without(path_x().record, "model", "softcap")
    result = {"config": config, "metrics": {"finished": True}}
    folder = tmp_path / "curriculum"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    assert follow(path_x(), folder, "cpu") == result
    capped_path = replace(path_x(), model=replace(path_x().model, softcap=3.0))
    with pytest.raises(CheckpointError, match=r"different: model.softcap: 0.0 -> 3.0\)"):
        follow(capped_path, folder, "cpu")
