"""Names of the previous version: fields, flags and keys of files are still read."""

from __future__ import annotations

import json

import pytest
import torch
from sparse_flash.experiments import checkpoint, markdown, old_names
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.data.dataset import coordinates_of
from sparse_flash.experiments.data.images import Image
from sparse_flash.experiments.data.listops import ListOps
from sparse_flash.experiments.data.pathfinder import Pathfinder
from sparse_flash.experiments.train import RESULT, train
from sparse_flash.experiments.warm_start import CHECKPOINT

from sparse_flash import cli, masks
from tests.docpages import ROOT

FIELDS = [
    (ModelConfig, {"positions": "rotary"}, "reach", "initial_span", (2.0,)),
    (ListOps, {}, "easier", "curriculum", (40,)),
    (ListOps, {}, "easier_share", "curriculum_share", 0.3),
    (Pathfinder, {}, "easier", "curriculum", (6, 9)),
    (Pathfinder, {}, "easier_share", "curriculum_share", 0.3),
    (Pathfinder, {}, "mirrored", "augment", True),
]


@pytest.mark.parametrize(("cls", "others", "old", "new", "value"), FIELDS)
def test_old_fields_are_read_with_a_warning(cls, others, old, new, value):
    with pytest.warns(FutureWarning, match=rf"{cls.__name__}.{old} is now {cls.__name__}.{new};"):
        made = cls(**others, **{old: value})
    assert made == cls(**others, **{new: value})
    with pytest.warns(FutureWarning, match=new):
        assert getattr(made, old) == value
    assert old not in repr(made)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--model.reach", "--model.initial-span"),
        ("--task.easier", "--task.curriculum"),
        ("--task.easier-share", "--task.curriculum-share"),
        ("--task.easier_share", "--task.curriculum-share"),
        ("--task.mirrored", "--task.augment"),
        ("--task.no-mirrored", "--task.no-augment"),
    ],
)
def test_old_flags_are_read_with_a_warning(flag, name):
    with pytest.warns(FutureWarning, match=f"{flag} is now {name};"):
        assert old_names.arguments(["train", "x", flag, "1"]) == ["train", "x", name, "1"]
    with pytest.warns(FutureWarning, match=name):
        assert old_names.arguments([f"{flag}=1"]) == [f"{name}=1"]


def test_flags_of_own_tasks_are_left_alone():
    words = ["train", "my.py:Task", "--task.easier", "3", "--task.reach", "4"]
    assert old_names.arguments(words) == words


def test_an_old_flag_reaches_its_setting(capsys):
    flags = ["--task.easier", "2", "--model.positions", "rotary"]
    with (
        pytest.warns(FutureWarning, match="task.curriculum"),
        pytest.raises(ValueError, match="curriculum must be lengths"),
    ):
        cli.run(["train", "listops", *flags])


def older(saved):
    """The settings and metrics under the names of the previous version."""
    text = json.dumps(saved)
    for names in (old_names.MODEL, old_names.PATHFINDER, old_names.METRICS):
        for old, new in names.items():
            text = text.replace(f'"{new}"', f'"{old}"')
    return json.loads(text)


def test_old_results_and_checkpoints_are_resumed(tiny_config, tiny_data, tmp_path):
    result = train(tiny_config, tmp_path, "cpu", tiny_data)
    assert "majority_accuracy" in result["metrics"]
    path = tmp_path / RESULT
    path.write_text(json.dumps(older(result)))
    assert "reach" in path.read_text()
    assert "chance" in path.read_text()
    assert train(tiny_config, tmp_path, "cpu", tiny_data)["metrics"] == result["metrics"]
    path.unlink()
    state = checkpoint.load(tmp_path / CHECKPOINT)
    checkpoint.save(tmp_path / CHECKPOINT, state | {"config": older(state["config"])})
    again = train(tiny_config, tmp_path, "cpu", tiny_data)
    assert again["metrics"]["test_loss"] == result["metrics"]["test_loss"]
    assert "initial_span" in path.read_text(), "written under the new name"


@pytest.mark.parametrize("name", ["listops-short-cpu/comparison.json", "lra-h200/lra.json"])
def test_recorded_reports_are_read(name):
    text = (ROOT / "results" / name).read_text()
    assert '"chance"' in text, "recorded files are not rewritten"
    write = markdown.lra if "lra" in name else markdown.comparison
    assert "most frequent answer: " in write(json.loads(text))


def test_places_of_a_task_are_its_coordinates():
    class Old:
        def places(self):
            return torch.zeros(4, 2)

    with pytest.warns(FutureWarning, match=r"Old.places\(\) is now Old.coordinates\(\)"):
        assert coordinates_of(Old()).shape == (4, 2)
    assert coordinates_of(object()) is None


@pytest.mark.parametrize("task", [Pathfinder(), Image()], ids=["Pathfinder", "Image"])
def test_places_of_our_tasks_are_their_coordinates(task):
    with pytest.warns(FutureWarning, match=f"{type(task).__name__}.places is now"):
        assert task.places().equal(task.coordinates())


def test_the_former_spelling_of_a_pattern():
    assert masks.neighbourhood is masks.neighborhood
    mask = masks.parse("neighbourhood(4, 4, 1) | full()")
    assert mask == masks.neighborhood(4, 4, 1) | masks.full()
    assert "neighborhood" in repr(mask)
    assert "neighbourhood" not in dir(masks)
