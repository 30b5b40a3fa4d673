"""The recorded models follow the curve: without a marker they guess, and a cut turns the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_flash.experiments import checkpoint, interventions, recipes, trained
from sparse_flash.experiments.canvases import canvas_model
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.curriculum import Curriculum, Stage
from sparse_flash.experiments.data import broken
from sparse_flash.experiments.data.pathfinder import draw
from sparse_flash.experiments.data.stream import held_out, workers
from sparse_flash.experiments.staged import TEST, follow

RECORDED = Path(__file__).parents[2] / "results" / "path-curricula"
CONTOUR = 14


def images_of(size: int, count: int, contour: int = CONTOUR, geometry: int | None = None):
    """Held-out images, of those on which the recorded runs were tested."""
    with workers() as threads:
        return held_out(threads, size, contour, geometry or size, "morton", count, TEST)


@pytest.fixture(scope="module")
def images():
    return images_of(128, 40)


def pixels(images):
    return draw(images.paddles, images.markers, images.size, images.geometry).int()


def test_the_marked_curve_joins_the_markers_where_the_label_is_one(images):
    curves = broken.marked_curves(images, CONTOUR)
    rows = torch.arange(len(images))
    last = curves * CONTOUR + CONTOUR - 1
    heads = images.paddles[rows, last, :2] + images.paddles[rows, last, 2:]
    to_the_end = (heads - images.markers[:, 1]).norm(dim=-1)
    assert set(curves.tolist()) == {0, 1}
    assert to_the_end[images.labels == 1].max() < 1
    assert to_the_end[images.labels == 0].min() > 3


def test_a_removed_marker_changes_pixels_around_it_alone(images):
    changed = pixels(images) != pixels(broken.without_a_marker(images))
    for difference, marker in zip(changed, images.markers[:, 1], strict=True):
        found = difference.nonzero().float()
        assert 5 <= len(found) < 60
        assert (found - marker).norm(dim=-1).max() < 6


@pytest.mark.parametrize("marked", [True, False])
def test_a_cut_removes_the_two_paddles_in_the_middle_of_one_curve(images, marked):
    cut = interventions.without_the_middle(images, CONTOUR, marked)
    gone = (cut.paddles != images.paddles).any(-1)
    assert gone.sum(1).eq(2).all()
    curve = broken.marked_curves(images, CONTOUR)
    first = (curve if marked else 1 - curve) * CONTOUR + 6
    assert gone.int().argmax(1).equal(first)
    before, after = pixels(images), pixels(cut)
    assert (after <= before + 1).all()  # ink only disappears, up to rounding
    assert ((before - after) > 100).flatten(1).sum(1).min() > 8


def test_some_images_have_a_broken_curve(images):
    made = broken.broken(images, CONTOUR, 0.5, seed=3)
    again = broken.broken(images, CONTOUR, 0.5, seed=3)
    assert made.paddles.equal(again.paddles)
    assert made.labels.equal(again.labels)
    gone = (made.paddles != images.paddles).any(-1)
    some = gone.any(1)
    assert 0.3 < some.float().mean() < 0.7
    assert gone.sum(1)[some].eq(2).all()
    assert (gone[:, 1:] & gone[:, :-1]).sum(1)[some].eq(1).all()
    first = gone.int().argmax(1)[some]
    place = first % CONTOUR
    assert place.min() >= 3
    assert place.max() + 1 <= CONTOUR - 4
    own = first // CONTOUR == broken.marked_curves(images, CONTOUR)[some]
    assert made.labels[some].equal(images.labels[some] * ~own)
    assert made.labels[~some].equal(images.labels[~some])
    assert own.any()
    assert not own.all()


def test_a_trained_model_is_loaded_with_its_averaged_weights(tmp_path):
    mask = "through(patches(PIXELS, PIXELS, (8, 16), 1), morton(PIXELS, PIXELS))"
    model = ModelConfig(
        dim=16, heads=2, layers=1, ffn=16, positions="rotary2d", initial_span=(3.0,), pooling="max"
    )
    stages = (Stage(32, (3,), (1.0,), 4, 1e-2, 16, evaluations=1),)
    tiny = Curriculum(stages, 32, mask, model=model, val=4, test=8, warmup=1, compile=False)
    result = follow(tiny, tmp_path, "cpu")
    found = trained.load(tmp_path)
    assert trained.curriculum_of(tmp_path) == tiny
    trained.export(tmp_path, tmp_path / "weights.pt")
    again = trained.load(tmp_path / "weights.pt")
    fresh = canvas_model(tiny, 32)
    for name, weight in found.state_dict().items():
        assert again.state_dict()[name].equal(weight)
    assert not found.head.weight.equal(fresh.head.weight)
    images = images_of(32, 8, 3)
    right = interventions.answers(found, images) == images.labels
    assert right.float().mean() == result["metrics"]["test_accuracy"]
    assert not found.training


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"config": {"task": {}}, "model": {}})
    with pytest.raises(checkpoint.CheckpointError, match="is not of a curriculum"):
        trained.load(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="there is no"):
        trained.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["path-x", "path-256"])
def test_recorded_weights_are_of_the_recipe(name):
    found = trained.curriculum_of(RECORDED / f"{name}-seed0" / "weights.pt")
    assert found == recipes.CURRICULA[name]()


def test_saliency_is_where_the_maximum_comes_from():
    # Each token attends to itself alone, so only tokens with the maximum of a channel decide.
    model = canvas_model(replace(recipes.path_x(), attention="local(0)"), 32).eval()
    some = images_of(32, 2, 3)
    tokens = some.take(torch.arange(2)).tokens
    with torch.no_grad():
        hidden = model.hidden(tokens, None)
        largest = hidden == hidden.amax(1, keepdim=True)
        empty = (largest & (tokens == 0)[..., None]).flatten(0, 1).any(0)
        model.head.weight[:, empty] = 0  # leave channels whose maximum is of ink
    decides = (largest & ~empty).any(-1)  # in token order
    maps = interventions.saliency(model, some)
    expected = torch.zeros(2, 32 * 32, dtype=torch.bool)
    expected[:, some.permutation] = decides
    assert (maps > 0).flatten(1).equal(expected)
    assert 0 < expected.sum() < expected.numel()
    assert maps.amax((1, 2)).tolist() == [1.0, 1.0]


def ones(name: str, images, device: str, batch_size: int, only=None) -> dict:
    """Share of answers 1 to label 1 and to label 0, by change, of a recorded run."""
    weights = RECORDED / f"{name}-seed0" / "weights.pt"
    model = trained.load(weights, images.size).to(device)
    found = interventions.share_of_ones(model, images, CONTOUR, batch_size, only)
    print(name, found)
    return found


def tells(found: dict) -> dict[str, float]:
    """Share of answers 1 to label 1 less that to label 0, by change: 0 if it tells nothing."""
    return {change: one - zero for change, (one, zero) in found.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100"], "must have (32, 64, 128, 256, 512) pixels per side, got 100"),
        (["--size", "-64"], "must have (32, 64, 128, 256, 512) pixels per side, got -64"),
        (["--images", "0"], "--images and --batch-size must be at least 1, got 0 and 4"),
        (["--batch-size", "-1"], "must be at least 1, got 1000 and -1"),
    ],
)
def test_refuses_wrong_options(arguments, words, capsys):
    weights = RECORDED / "path-x-seed0" / "weights.pt"
    with pytest.raises(SystemExit, match="2"):
        interventions._main([str(weights), *arguments])
    assert words in capsys.readouterr().err


def test_refuses_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        interventions._main([str(tmp_path)])
    assert f"there is no checkpoint {tmp_path}" in capsys.readouterr().err


@pytest.mark.thorough
def test_path_x_needs_both_markers_and_a_curve(images, one_thread):
    some, changes = images.subset(torch.arange(16)), ("one marker removed", "ends of both curves")
    told = tells(ones("path-x", some, "cpu", 2, changes))
    assert list(told) == ["no change", *changes]
    assert told["no change"] > 0.75
    assert max(abs(told[change]) for change in changes) < 0.5  # of 8 images with each label


@pytest.mark.thorough
def test_a_cut_of_the_marked_curve_turns_the_answer(one_thread):
    """The model of Path-256, on the canvas of its last but one stage, which a CPU can compute."""
    some = images_of(128, 16, geometry=256)
    some = some.subset((some.labels == 1).nonzero().squeeze(1)[:4])
    changes = ("marked curve cut", "other curve cut")
    found = {change: one for change, (one, _) in ones("path-256", some, "cpu", 2, changes).items()}
    assert found["no change"] > 0.7
    assert found["marked curve cut"] < 0.3
    assert found["other curve cut"] > 0.7


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["path-x", "path-256"])
def test_recorded_models_need_markers_and_curves(name):
    images = images_of({"path-x": 128, "path-256": 256}[name], 400)
    told = tells(ones(name, images, "cuda", 8))
    assert told["no change"] > 0.75
    assert abs(told["one marker removed"]) < 0.25
    assert abs(told["ends of both curves"]) < 0.25


@pytest.mark.gpu
def test_path_x_is_told_by_either_curve():
    told = tells(ones("path-x", images_of(128, 400), "cuda", 8))
    for one_curve in ("ends of the marked curve", "ends of the other curve"):
        assert told[one_curve] > 0.4


@pytest.mark.gpu
def test_path_256_follows_the_marked_curve():
    """Most correct answers 1 turn to 0 where it is cut, and few where the other one is."""
    found = ones("path-256", images_of(256, 400), "cuda", 8)
    for change in ("marked curve cut", "ends of the marked curve"):
        assert found[change][0] < 0.3
    for change in ("no change", "other curve cut", "ends of the other curve"):
        assert found[change][0] > 0.8
